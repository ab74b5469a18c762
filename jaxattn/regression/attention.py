r"""Regression with one layer of attention, both of whose weights are unknown.

With inputs :math:`A_1` of queries, :math:`A_2` of keys and :math:`A_3` of
values, targets B, :math:`X = Q K^\top` and Y the weights of the values,

.. math::

  S = \operatorname{softmax}(A_1 X A_2^\top + \text{bias}), \qquad
  R = S A_3 Y - B, \qquad
  L(X, Y) = \tfrac12 \|R\|^2 + \tfrac12 \lambda_x \|X\|^2
    + \tfrac12 \lambda_y \|Y\|^2.

The loss of the source is :math:`\|R\|^2`, twice that. There is no
:math:`1/\sqrt d` in it: X holds it. Unknowns are flat and row-major,
:math:`x = [\operatorname{vec} X, \operatorname{vec} Y]`, so that
:math:`\operatorname{vec}(A_1 X A_2^\top) = (A_1 \otimes A_2) \operatorname{vec}
X`, a matrix that is never formed. With :math:`J_S` the Jacobian of the softmax,

.. math::

  P = J_S(R Y^\top A_3^\top), \quad \nabla_X L = A_1^\top P A_2 + \lambda_x X,
  \quad \nabla_Y L = (S A_3)^\top R + \lambda_y Y.

The loss is quadratic in Y alone, and not convex in X: methods find a minimum
near their start, and several starts are taken. X = 0, where all queries see the
same, is no good one. Source: arXiv 2309.07418; the formulas are derived here
and checked against automatic differentiation.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn import _checks, newton
from jaxattn.regression import _head_calculus as calculus
from jaxattn.regression import _head_methods as methods
from jaxattn.regression._head_calculus import AttentionRegressionData

__all__ = [
  "AttentionFit",
  "AttentionRegressionData",
  "curvature",
  "factor_qk",
  "fit_attention",
  "gauss_newton",
  "hessian_blocks",
  "hvp",
  "loss",
  "optimal_values",
  "predict",
  "prepare",
  "problem",
  "to_dot_product_attention",
  "value_and_grad",
]

_METHODS = ("joint", "greedy", "varpro", "sketched")
_CONFIG = newton.NewtonConfig(max_steps=100, mu0=0.1)
# Beyond heads of 24 dimensions products with the Hessian, unless told.
_MOST_DENSE = 2 * 24**2


class AttentionFit(NamedTuple):
  """What :func:`fit_attention` found.

  Attributes:
    x: (d1, d2), Q K^T.
    y: (d3, dv), weights of the values.
    result: of the solver, for the best start; its x is flat, and of X alone for
      ``"greedy"`` and ``"varpro"``.
    all_losses: (num_starts,), at the end of each.
    all_grad_norms: (num_starts,).
  """

  x: jax.Array
  y: jax.Array
  result: newton.NewtonResult
  all_losses: jax.Array
  all_grad_norms: jax.Array


def prepare(
  a1: jax.Array,
  a2: jax.Array,
  a3: jax.Array,
  b: jax.Array,
  *,
  ridge_x: float | jax.Array = 0.0,
  ridge_y: float | jax.Array = 0.0,
  is_causal: bool = False,
  mask: jax.Array | None = None,
) -> AttentionRegressionData:
  r"""Collects a problem.

  Args:
    a1: (n1, d1), inputs of queries.
    a2: (n2, d2), inputs of keys.
    a3: (n2, d3), inputs of values.
    b: (n1, dv), targets.
    ridge_x: lambda of X, at least 0. Without one X may grow for ever: take 1e-3
      of inputs of unit variance.
    ridge_y: lambda of Y, at least 0.
    is_causal: whether query i sees keys 0 to i only; needs n1 = n2.
    mask: (n1, n2) boolean, True = attend; together with ``is_causal``, both.

  Returns:
    An :class:`AttentionRegressionData`.

  Raises:
    ValueError: if shapes or dtypes do not fit, a number is negative, or a query
      may attend to no key, as "row 3 of mask has no allowed key".

  Cost:
    O(n1 n2) with a mask.

  Source:
    arXiv 2309.07418.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import attention
    >>> a = jnp.eye(3)
    >>> data = attention.prepare(a, a, a, a, is_causal=True)
    >>> print(data.num_keys)
    [1 2 3]
  """
  a1, a2, a3, b = (jnp.asarray(z) for z in (a1, a2, a3, b))
  for name, z in (("a1", a1), ("a2", a2), ("a3", a3), ("b", b)):
    _checks.check_rank(name, z, 2)
    _checks.check_floating(name, z)
    if 0 in z.shape:
      raise ValueError(f"{name} must not be empty, got shape {z.shape}")
  n1, n2 = len(a1), len(a2)
  if len(a3) != n2:
    raise ValueError(
      f"a2 and a3 must have the same number of rows, got {n2} and {len(a3)}"
    )
  _checks.check_shape("b", b, (n1, None), "(n1, dv)")
  for name, ridge in (("ridge_x", ridge_x), ("ridge_y", ridge_y)):
    _checks.check_scalar(name, ridge)
    _checks.check_nonnegative(name, ridge)
  _check_causal(is_causal, n1, n2)
  dtype = a1.dtype
  bias = _bias(n1, n2, is_causal, mask, dtype)
  # Without a mask nothing of n1 n2 numbers is made.
  num_keys = _num_keys(n1) if is_causal and mask is None else None
  a2, a3, b = (z.astype(dtype) for z in (a2, a3, b))
  ridges = jnp.asarray(ridge_x, dtype), jnp.asarray(ridge_y, dtype)
  return AttentionRegressionData(a1, a2, a3, b, *ridges, bias, num_keys)


def predict(
  x: jax.Array,
  y: jax.Array,
  a1: jax.Array,
  a2: jax.Array,
  a3: jax.Array,
  *,
  is_causal: bool = False,
  bias: jax.Array | None = None,
) -> jax.Array:
  r"""The output :math:`\operatorname{softmax}(A_1 X A_2^\top) A_3 Y`.

  Args:
    x: (d1, d2).
    y: (d3, dv).
    a1: (n1, d1), inputs of queries.
    a2: (n2, d2), inputs of keys.
    a3: (n2, d3), inputs of values.
    is_causal: whether query i sees keys 0 to i only; needs n1 = n2.
    bias: (n1, n2), added to the logits; ``prepare(...).bias`` of a mask.

  Returns:
    (n1, dv).

  Raises:
    ValueError: if shapes do not fit.

  Cost:
    O(n1 n2 (d2 + d3)); a block of queries at a time.

  Source:
    arXiv 2309.07418.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import attention
    >>> a3 = jnp.array([[1.0], [3.0]])
    >>> x, y = jnp.zeros((2, 2)), jnp.ones((1, 1))
    >>> print(attention.predict(x, y, jnp.eye(2), jnp.eye(2), a3))
    [[2.]
     [2.]]
  """
  _checks.check_shape("x", x, (a1.shape[1], a2.shape[1]), "(d1, d2)")
  _checks.check_shape("y", y, (a3.shape[1], None), "(d3, dv)")
  n1, n2 = len(a1), len(a2)
  _check_causal(is_causal, n1, n2)
  if bias is not None:
    _checks.check_shape("bias", bias, (n1, n2), "(n1, n2)")
  num_keys = _num_keys(n1) if is_causal else None
  # Neither targets nor ridges: what is asked for is of S alone.
  data = AttentionRegressionData(
    *(jnp.asarray(a) for a in (a1, a2, a3, a1[:, :0])),
    ridge_x=jnp.zeros(()),
    ridge_y=jnp.zeros(()),
    bias=bias,
    num_keys=num_keys,
  )
  return calculus.means(x, data) @ y


def loss(x: jax.Array, data: AttentionRegressionData) -> jax.Array:
  r"""The loss :math:`\tfrac12 \|R\|^2 + \dots`, half of the source's.

  Args:
    x: (p,), X and Y flat, row by row; p = d1 d2 + d3 dv.
    data: from :func:`prepare`.

  Returns:
    ().

  Raises:
    ValueError: if ``x`` has another size.

  Cost:
    O(n1 n2 (d2 + d3)).

  Source:
    arXiv 2309.07418, times one half.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import attention
    >>> a = jnp.eye(2)
    >>> data = attention.prepare(a, a, a, a)
    >>> print(attention.loss(jnp.zeros(8), data))
    1.0
  """
  return calculus.loss(x, data)


def value_and_grad(
  x: jax.Array, data: AttentionRegressionData
) -> tuple[jax.Array, jax.Array]:
  r"""The loss and its gradient, as in the module's docstring.

  Args:
    x: (p,), X and Y flat.
    data: from :func:`prepare`.

  Returns:
    () and (p,).

  Raises:
    ValueError: if ``x`` has another size.

  Cost:
    O(n1 n2 (d2 + d3)): four products with the (n1, n2) weights, of which a
    block of queries exists at a time.

  Source:
    derived here.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import attention
    >>> a = jnp.eye(2)
    >>> data = attention.prepare(a, a, a, a)
    >>> value, grad = attention.value_and_grad(jnp.zeros(8), data)
    >>> print(grad[4:])
    [-0.5 -0.5 -0.5 -0.5]
  """
  return calculus.value_and_grad(x, data)


def hvp(x: jax.Array, v: jax.Array, data: AttentionRegressionData) -> jax.Array:
  r"""The product of the Hessian with a vector.

  .. math::

    \dot S = J_S(A_1 \dot X A_2^\top), \quad
    \dot R = \dot S A_3 Y + S A_3 \dot Y, \quad
    \dot P = \frac{d}{dt} J_S(R Y^\top A_3^\top), \\
    (A_1^\top \dot P A_2 + \lambda_x \dot X,\;
      (\dot S A_3)^\top R + (S A_3)^\top \dot R + \lambda_y \dot Y)

  Args:
    x: (p,), X and Y flat.
    v: (p,), the direction.
    data: from :func:`prepare`.

  Returns:
    (p,).

  Raises:
    ValueError: if a size does not fit.

  Cost:
    O(n1 n2 (d2 + d3)), about two gradients; nothing of size p^2 or n1 n2.

  Source:
    derived here.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import attention
    >>> a = jnp.eye(2)
    >>> data = attention.prepare(a, a, a, a)
    >>> along_y = jnp.array([0.0, 0, 0, 0, 1, 0, 0, 0])
    >>> print(attention.hvp(jnp.zeros(8), along_y, data)[4:])
    [0.5 0.  0.5 0. ]
  """
  _checks.check_shape("v", v, (calculus.size(data),), "(d1 d2 + d3 dv,)")
  return calculus.product(*calculus.split(x, data), data, v, exact=True)


def curvature(
  x: jax.Array, data: AttentionRegressionData
) -> newton.DenseCurvature:
  """The Hessian as a matrix, the blocks of :func:`hessian_blocks`.

  Args:
    x: (p,), X and Y flat.
    data: from :func:`prepare`.

  Returns:
    A dense curvature.

  Raises:
    ValueError: if ``x`` has another size, or p is above 4096: then take
      ``linear_solver="cg"``, or ``problem(matrix_free=True)``.

  Cost:
    As :func:`hessian_blocks`.

  Source:
    derived here.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import attention
    >>> a = jnp.eye(2)
    >>> data = attention.prepare(a, a, a, a)
    >>> attention.curvature(jnp.ones(8), data).matrix.shape
    (8, 8)
  """
  return calculus.dense(x, data, exact=True)


def gauss_newton(
  x: jax.Array, data: AttentionRegressionData
) -> newton.DenseCurvature:
  """The positive semidefinite part of the Hessian: residuals as 0.

  Args:
    x: (p,), X and Y flat.
    data: from :func:`prepare`.

  Returns:
    A dense curvature.

  Raises:
    ValueError: as :func:`curvature`.

  Cost:
    As :func:`hessian_blocks`, less one of its products.

  Source:
    derived here.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import attention
    >>> a = jnp.eye(2)
    >>> data = attention.prepare(a, a, a, a)
    >>> matrix = attention.gauss_newton(jnp.ones(8), data).matrix
    >>> bool(jnp.linalg.eigvalsh(matrix)[0] > -1e-6)
    True
  """
  return calculus.dense(x, data, exact=False)


def hessian_blocks(
  x: jax.Array, y: jax.Array, data: AttentionRegressionData
) -> tuple[jax.Array, jax.Array, jax.Array]:
  r"""The blocks of the Hessian, as sums over queries j.

  With :math:`J_j = \operatorname{diag}(s_j) - s_j s_j^\top`,
  :math:`C_j = A_2^\top J_j A_3`, :math:`W_j = C_j Y`, :math:`p_j` a row of P
  and :math:`m_j = A_2^\top s_j`,

  .. math::

    H_{XX} = \sum_j a_j a_j^\top \otimes M_j + \lambda_x I, \quad
    M_j = W_j W_j^\top + A_2^\top \operatorname{diag}(p_j) A_2
      - (A_2^\top p_j) m_j^\top - m_j (A_2^\top p_j)^\top, \\
    (H_{XY})_{pa,mi} = \sum_j a_{jp} (W_{j,ai} Z_{jm} + C_{j,am} R_{ji}), \quad
    H_{YY} = Z^\top Z \otimes I + \lambda_y I, \quad Z = S A_3.

  Args:
    x: (d1, d2).
    y: (d3, dv).
    data: from :func:`prepare`.

  Returns:
    H_XX (d1 d2, d1 d2), H_XY (d1 d2, d3 dv) and H_YY (d3 dv, d3 dv).

  Raises:
    ValueError: if shapes do not fit.

  Cost:
    With all dimensions d, O(n1 n2 d^2 + n1 d^4), all in products of matrices;
    O((n1 + n2) d^2) memory beside the result, and a block of queries.

  Source:
    derived here.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import attention
    >>> a = jnp.eye(2)
    >>> data = attention.prepare(a, a, a, a)
    >>> x = jnp.zeros((2, 2))
    >>> print(attention.hessian_blocks(x, x, data)[2][0])
    [0.5 0.  0.5 0. ]
  """
  _check_unknowns(x, y, data)
  return calculus.blocks(x, y, data, exact=True)


def optimal_values(x: jax.Array, data: AttentionRegressionData) -> jax.Array:
  r"""The best Y for an X: :math:`(Z^\top Z + \lambda_y I)^{-1} Z^\top B`.

  The one of least norm where there are several, as at X = 0 without a ridge,
  where all queries see the same.

  Args:
    x: (d1, d2).
    data: from :func:`prepare`.

  Returns:
    (d3, dv).

  Raises:
    ValueError: if shapes do not fit.

  Cost:
    O(n1 n2 (d2 + d3) + n1 d3 (d3 + dv)).

  Source:
    least squares.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import attention
    >>> a = jnp.eye(2)
    >>> data = attention.prepare(a, a, a, 2 * jnp.ones((2, 1)))
    >>> print(attention.optimal_values(jnp.zeros((2, 2)), data).round(3))
    [[2.]
     [2.]]
  """
  _checks.check_shape("x", x, calculus.shapes(data)[0], "(d1, d2)")
  return methods.solve_values(calculus.means(x, data), data)


@functools.lru_cache(maxsize=64)
def problem(
  *, method: str = "joint", matrix_free: bool = False
) -> newton.Problem:
  r"""The problem for :func:`jaxattn.newton.minimize`.

  ``"joint"`` has both unknowns, x = [vec X, vec Y]. The others have X alone, of
  (d1 d2,), and the loss that is left with the best Y for it: ``"varpro"`` with
  its Hessian, :math:`H_{XX} - H_{XY} H_{YY}^{-1} H_{XY}^\top`, which converges
  as fast as joint; ``"greedy"`` with :math:`H_{XX}`, which is a step for X and
  the best Y in turn, and converges linearly.

  Args:
    method: ``"joint"``, ``"varpro"`` or ``"greedy"``.
    matrix_free: whether curvatures are products with vectors, for
      ``linear_solver="cg"``, instead of matrices.

  Returns:
    A :class:`jaxattn.newton.Problem`; the same call gives the same object.

  Raises:
    ValueError: if an option is not one of its choices.

  Cost:
    O(1).

  Source:
    arXiv 2309.07418.

  Example:
    >>> from jaxattn.regression import attention
    >>> attention.problem() is attention.problem()
    True
  """
  _checks.check_choice("method", method, _METHODS[:-1])
  _checks.check_choice("matrix_free", matrix_free, (False, True))
  if method == "joint":
    if not matrix_free:
      return newton.Problem(loss, value_and_grad, curvature, gauss_newton)
    exact, positive = (
      functools.partial(calculus.operator, exact=e) for e in (True, False)
    )
    return newton.Problem(loss, value_and_grad, exact, positive)
  build = methods.reduced_operator if matrix_free else methods.reduced_dense
  exact, positive = (
    functools.partial(build, schur=method == "varpro", exact=e)
    for e in (True, False)
  )
  return newton.Problem(
    methods.reduced_loss, methods.reduced_value_and_grad, exact, positive
  )


def fit_attention(
  rng: jax.Array,
  a1: jax.Array,
  a2: jax.Array,
  a3: jax.Array,
  b: jax.Array,
  *,
  ridge_x: float | jax.Array = 0.0,
  ridge_y: float | jax.Array = 0.0,
  is_causal: bool = False,
  mask: jax.Array | None = None,
  method: str = "joint",
  num_starts: int = 1,
  x0: jax.Array | None = None,
  config: newton.NewtonConfig | None = None,
) -> AttentionFit:
  r"""Fits one head of attention, or distils one, from inputs and outputs.

  Methods find a minimum near their start. Starts are X of normal entries of
  variance 1/4 and the best Y for it; few of them find the best minimum.

  Args:
    rng: PRNG key, of the starts and of samples.
    a1: (n1, d1), inputs of queries.
    a2: (n2, d2), inputs of keys.
    a3: (n2, d3), inputs of values.
    b: (n1, dv), targets.
    ridge_x: as in :func:`prepare`; 1e-3 or more keeps X from growing for ever.
    ridge_y: as in :func:`prepare`.
    is_causal: as in :func:`prepare`.
    mask: as in :func:`prepare`.
    method: ``"joint"``, Newton's method for X and Y together; ``"varpro"``, for
      X with the best Y; ``"greedy"``, for X and Y in turn; ``"sketched"``,
      joint, with a Hessian of a sample of queries.
    num_starts: starts, all at once; for ``"sketched"``, one after the other.
    x0: (d1, d2), the first start of X; None = random as the others.
    config: of the solver; None = 100 steps with ``mu0=0.1``, and with
      ``linear_solver="cg"``, which forms no Hessian, for more than 1152
      unknowns (heads of 24 dimensions), unless ``method`` is ``"sketched"``.
      For ``"sketched"``, ``sketch`` says how queries are drawn ("leverage"
      unless it is "uniform"), ``num_rows`` how many (None = 16 d1 d2; all,
      where there are no more), and ``refresh`` how often a step is exact; the
      first two are, and each that follows a bad one.

  Returns:
    An :class:`AttentionFit`.

  Raises:
    ValueError: if shapes, dtypes or options do not fit, as "method must be one
      of 'joint', 'greedy', 'varpro', 'sketched', got 'x'", or "dense Hessian of
      size d1*d2 + d3*dv = 8192 exceeds max_dense = 4096; use
      linear_solver='cg'".

  Cost:
    For each start and step O(n1 n2 d^2 + n1 d^4 + d^6); sketched, with m
    queries, O(n1 n2 d + m n2 d^2 + m d^4 + d^6); ``"cg"``, O(n1 n2 d) for each
    of its products. O((n1 + n2) d^2 + d^4) memory for each start, without d^4
    for ``"cg"``, and blocks of queries: (n1, n2) numbers are in a mask alone.

  Source:
    arXiv 2309.07418.

  Example:
    >>> import jax
    >>> from jaxattn.regression import attention, fit_attention
    >>> rngs = jax.random.split(jax.random.key(0), 3)
    >>> a = jax.random.normal(rngs[0], (100, 2))
    >>> x, y = jax.random.normal(rngs[1], (2, 2, 2))
    >>> b = attention.predict(x, y, a, a, a)
    >>> fit = fit_attention(
    ...   rngs[2], a, a, a, b, ridge_x=1e-5, ridge_y=1e-5, num_starts=16
    ... )
    >>> bool(fit.result.loss < 1e-3)
    True
  """
  data = prepare(
    a1,
    a2,
    a3,
    b,
    ridge_x=ridge_x,
    ridge_y=ridge_y,
    is_causal=is_causal,
    mask=mask,
  )
  _checks.check_choice("method", method, _METHODS)
  _checks.check_integer("num_starts", num_starts, 1, None)
  if x0 is not None:
    x0 = jnp.asarray(x0, data.a1.dtype)
    _checks.check_shape("x0", x0, calculus.shapes(data)[0], "(d1, d2)")
  if config is None:
    large = calculus.size(data) > _MOST_DENSE and method != "sketched"
    config = _CONFIG._replace(linear_solver="cg" if large else "cholesky")
  _check_sketch(data, method, config)
  return _fit(rng, x0, data, method, num_starts, config)


def factor_qk(
  x: jax.Array, rank: int | None = None
) -> tuple[jax.Array, jax.Array]:
  r"""Splits X into weights of queries and of keys, :math:`X \approx Q K^\top`.

  From :math:`X = U \Sigma W^\top`, :math:`Q = U \Sigma^{1/2}` and
  :math:`K = W \Sigma^{1/2}`: of all factors of that rank the closest, and of
  equal size.

  Args:
    x: (d1, d2).
    rank: r, at most min(d1, d2); None = that.

  Returns:
    Q (d1, r) and K (d2, r).

  Raises:
    ValueError: if ``x`` is no matrix or ``rank`` is out of its range.

  Cost:
    O(d^3).

  Source:
    the singular value decomposition.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import factor_qk
    >>> q, k = factor_qk(jnp.diag(jnp.array([4.0, 1.0])), rank=1)
    >>> print(abs(q @ k.T))
    [[4. 0.]
     [0. 0.]]
  """
  x = jnp.asarray(x)
  _checks.check_rank("x", x, 2)
  _checks.check_floating("x", x)
  rank = min(x.shape) if rank is None else rank
  _checks.check_integer("rank", rank, 1, min(x.shape))
  u, sizes, wt = jnp.linalg.svd(x, full_matrices=False)
  root = jnp.sqrt(sizes[None, :rank])
  return u[:, :rank] * root, wt[:rank].T * root


def to_dot_product_attention(
  x: jax.Array, y: jax.Array
) -> dict[str, jax.Array | float]:
  """Weights of a head that ``jax.nn.dot_product_attention`` evaluates.

  That function wants queries, keys and values of one size, so that weights are
  padded with zero columns; of its output the first dv columns count.

  Args:
    x: (d1, d2).
    y: (d3, dv).

  Returns:
    ``"query"`` (d1, H), ``"key"`` (d2, H), ``"value"`` (d3, H), with
    H = max(d1, d2, dv) or less, and ``"scale"``, 1.

  Raises:
    ValueError: if ``x`` or ``y`` is no matrix.

  Cost:
    O(d^3).

  Source:
    this project.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import attention
    >>> a, x, y = jax.random.normal(jax.random.key(0), (3, 4, 4))
    >>> w = attention.to_dot_product_attention(x, y)
    >>> q, k, v = (
    ...   (a @ w[name])[None, :, None] for name in ("query", "key", "value")
    ... )
    >>> out = jax.nn.dot_product_attention(q, k, v, scale=w["scale"])
    >>> want = attention.predict(x, y, a, a, a)
    >>> bool(jnp.allclose(out[0, :, 0], want, atol=1e-4))
    True
  """
  _checks.check_rank("y", y, 2)
  query, key = factor_qk(x)
  size = max(query.shape[1], y.shape[1])
  query, key, value = (
    jnp.pad(w, ((0, 0), (0, size - w.shape[1]))) for w in (query, key, y)
  )
  return {"query": query, "key": key, "value": value, "scale": 1.0}


# --- shapes ---


def _num_keys(n: int) -> jax.Array:
  """How many keys each query sees, if only those up to its own place."""
  return jnp.arange(1, n + 1, dtype=jnp.int32)


def _check_causal(is_causal: bool, n1: int, n2: int) -> None:
  _checks.check_choice("is_causal", is_causal, (False, True))
  if is_causal and n1 != n2:
    raise ValueError(f"is_causal needs n1 == n2, got {n1} and {n2}")


def _bias(
  n1: int, n2: int, is_causal: bool, mask: jax.Array | None, dtype: jnp.dtype
) -> jax.Array | None:
  """Minus infinity for who may not see whom, by the mask; None = no mask."""
  if mask is None:
    return None
  mask = jnp.asarray(mask)
  _checks.check_boolean("mask", mask)
  _checks.check_shape("mask", mask, (n1, n2), "(n1, n2)")
  allowed = mask & jnp.tri(n1, dtype=bool) if is_causal else mask
  if _checks.is_concrete(allowed):
    empty = ~np.asarray(allowed).any(1)
    if empty.any():
      raise ValueError(f"row {empty.argmax()} of mask has no allowed key")
  return jnp.where(allowed, 0, -jnp.inf).astype(dtype)


def _check_unknowns(
  x: jax.Array, y: jax.Array, data: AttentionRegressionData
) -> None:
  shape_x, shape_y = calculus.shapes(data)
  _checks.check_shape("x", x, shape_x, "(d1, d2)")
  _checks.check_shape("y", y, shape_y, "(d3, dv)")


def _check_sketch(
  data: AttentionRegressionData, method: str, config: newton.NewtonConfig
) -> None:
  """What the solver cannot know: here queries are sampled, not its rows."""
  if method != "sketched":
    if config.sketch is not None:
      raise ValueError(
        f"sketch must be None with method={method!r}, got {config.sketch!r}; "
        "use method='sketched'"
      )
    return
  if config.linear_solver != "cholesky":
    raise ValueError(
      f"linear_solver must be 'cholesky' with method='sketched', got "
      f"{config.linear_solver!r}"
    )
  _checks.check_choice("sketch", config.sketch, (None, "leverage", "uniform"))
  if config.num_rows is not None:
    _checks.check_integer("num_rows", config.num_rows, 1, None)
  _checks.check_integer("refresh", config.refresh, 0, None)
  calculus.check_dense(data, "method='joint' with linear_solver='cg'")


# --- fits ---


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _fit(
  rng: jax.Array,
  x0: jax.Array | None,
  data: AttentionRegressionData,
  method: str,
  num_starts: int,
  config: newton.NewtonConfig,
) -> AttentionFit:
  rng_starts, rng_solve = jax.random.split(rng)
  shape, dtype = calculus.shapes(data)[0], data.a1.dtype
  starts = jax.random.normal(rng_starts, (num_starts, *shape), dtype) / 2
  if x0 is not None:
    starts = starts.at[0].set(x0)
  solve = functools.partial(_solve, data=data, method=method, config=config)
  rngs = jax.random.split(rng_solve, num_starts)
  if num_starts == 1 or method == "sketched":
    # One by one: all at once, each step would be exact and sampled.
    found = lax.map(lambda each: solve(*each), (starts, rngs))
  else:
    found = jax.vmap(solve)(starts, rngs)
  finite = jnp.where(jnp.isfinite(found.loss), found.loss, jnp.inf)
  best = jax.tree.map(lambda z: z[jnp.argmin(finite)], found)
  x = best.x[: shape[0] * shape[1]].reshape(shape)
  if method in ("joint", "sketched"):
    y = calculus.split(best.x, data)[1]
  else:
    y = _finite_values(x, data)
  return AttentionFit(x, y, best, found.loss, found.grad_norm)


def _finite_values(x: jax.Array, data: AttentionRegressionData) -> jax.Array:
  """The best Y; 0 of data that are not finite, for what is handed back."""
  y = optimal_values(x, data)
  return jnp.where(jnp.isfinite(y), y, 0)


def _solve(
  x0: jax.Array,
  rng: jax.Array,
  *,
  data: AttentionRegressionData,
  method: str,
  config: newton.NewtonConfig,
) -> newton.NewtonResult:
  flat = x0.reshape(-1)
  if method in ("joint", "sketched"):
    flat = calculus.join(flat, _finite_values(x0, data))
  if method == "sketched":
    return methods.minimize_sampled(rng, problem(), flat, data, config)
  matrix_free = config.linear_solver == "cg"
  solved = problem(method=method, matrix_free=matrix_free)
  return newton.minimize(solved, flat, data, config=config)
