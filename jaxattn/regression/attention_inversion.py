r"""Recovery of the tokens that went into an attention layer.

Of tokens T, (n, d), a layer with weights :math:`W = W_Q W_K^\top` (its scale
folded in) and V computes, one or several heads at once,

.. math::

  S = \operatorname{softmax}_{\text{rows}}(T W T^\top), \qquad O = S T V.

Known are W and V, observed are S, or O, or both. The tokens are sought by

.. math::

  L(T) = \tfrac12 \|S - \hat S\|^2 + \tfrac12 \|O - \hat O\|^2
    + \tfrac12 \lambda \|T\|^2

with the terms of what was observed. The unknown is T flattened row by row.

What can be known at all is another question, which
:func:`identifiability_report` answers. S depends on :math:`T W T^\top` alone,
so that T and T G give the same S whenever :math:`G W G^\top = W`: a family of
:math:`\lfloor d / 2 \rfloor` dimensions for a generic W, of d (d - 1) / 2 for
a symmetric one. From the weights of one head alone the tokens are therefore
never recovered, though a loss of 0 is reached; from those of two heads they
are, up to their sign.

Source: arXiv 2310.12462; gradients, products with the Hessian, identifiability
and the attacks in closed form are derived here.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn import _checks, newton
from jaxattn.regression import _attention_layer as _layer
from jaxattn.regression._attention_closed_form import (
  check_causal,
  check_stochastic,
  congruence_solve,
  invert_closed_form,
  invert_subspace,
)
from jaxattn.regression._attention_layer import AttentionInversionData

__all__ = [
  "AttentionInversionData",
  "AttentionInversionResult",
  "congruence_solve",
  "curvature",
  "gauss_newton",
  "hvp",
  "identifiability_report",
  "invert_attention",
  "invert_closed_form",
  "invert_subspace",
  "loss",
  "predict",
  "prepare",
  "problem",
  "value_and_grad",
]

# Singular values of the Jacobian below this times the largest count as 0.
_RANK_TOL = 1e-9
# Of the first gradient of a phase: where a phase before the last one ends.
_ROUGH_TOL = 1e-3
# Unknowns up to which a dense Hessian is the cheaper one.
_DENSE_UNKNOWNS = 512


class AttentionInversionResult(NamedTuple):
  """The end of :func:`invert_attention`, of K starts.

  A loss of 0 does not say that the tokens are the true ones.

  Attributes:
    tokens: (n, d), of the start with the least loss.
    loss: (), their loss.
    all_losses: (K,).
    all_tokens: (K, n, d).
    num_steps: (K,), of all phases.
    reason: (K,), as in :class:`jaxattn.newton.NewtonResult`.
  """

  tokens: jax.Array
  loss: jax.Array
  all_losses: jax.Array
  all_tokens: jax.Array
  num_steps: jax.Array
  reason: jax.Array


def prepare(
  w: jax.Array,
  v: jax.Array | None = None,
  *,
  weights: jax.Array | None = None,
  output: jax.Array | None = None,
  ridge: float | jax.Array = 0.0,
  is_causal: bool = False,
) -> AttentionInversionData:
  """Collects a layer and what was observed of it.

  Args:
    w: (d, d), W_Q W_K^T with the scale folded in; (N, d, d) for several heads.
    v: (d, Hv) or (N, d, Hv), with ``output`` only.
    weights: (n, n) or (N, n, n), the observed S; rows sum to 1.
    output: (n, Hv) or (N, n, Hv), the observed O of each head.
    ridge: lambda, at least 0.
    is_causal: row i attends to tokens up to i only.

  Returns:
    A :class:`AttentionInversionData`.

  Raises:
    ValueError: if nothing was observed, shapes or dtypes do not fit, weights
      are negative, do not sum to 1 or lie on masked keys, or a value is not
      finite.

  Cost:
    O(1), beside the checks.

  Source:
    arXiv 2310.12462.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import attention_inversion
    >>> data = attention_inversion.prepare(
    ...   jnp.eye(3), weights=jnp.full((2, 2), 0.5)
    ... )
    >>> data.w.shape, data.weights.shape
    ((1, 3, 3), (1, 2, 2))
  """
  if weights is None and output is None:
    raise ValueError("at least one of weights, output must be given")
  if output is not None and v is None:
    raise ValueError("output requires v")
  if output is None and v is not None:
    raise ValueError("v is of no use without output")
  _checks.check_nonnegative("ridge", ridge)
  _checks.check_choice("is_causal", is_causal, (False, True))
  w = _heads("w", w)
  num, _, d = w.shape
  _checks.check_shape("w", w, (num, d, d), "(N, d, d)")
  length = None
  if weights is not None:
    weights = _heads("weights", weights).astype(w.dtype)
    length = weights.shape[-1]
    if weights.shape[-2] != length:
      raise ValueError(
        f"weights must be square (n, n), got {weights.shape[-2:]}"
      )
    _checks.check_shape("weights", weights, (num, length, length), "(N, n, n)")
    check_stochastic(weights)
    if is_causal:
      check_causal(weights)
  if output is not None:
    assert v is not None
    v, output = (
      _heads(name, x).astype(w.dtype)
      for name, x in (("v", v), ("output", output))
    )
    _checks.check_shape("v", v, (num, d, None), "(N, d, Hv)")
    shape = (num, length, v.shape[-1])
    _checks.check_shape("output", output, shape, "(N, n, Hv)")
    length = output.shape[-2]
  for name, x in (("w", w), ("v", v), ("output", output)):
    if x is not None and _checks.is_concrete(x) and not np.isfinite(x).all():
      raise ValueError(f"{name} contains non-finite values")
  assert length is not None
  bias = _causal_bias(length, w.dtype) if is_causal else None
  ridge = jnp.asarray(ridge, w.dtype)
  return AttentionInversionData(w, v, weights, output, ridge, bias)


def predict(
  tokens: jax.Array,
  w: jax.Array,
  v: jax.Array | None = None,
  *,
  is_causal: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
  """What the layer computes of tokens.

  Args:
    tokens: (n, d).
    w: (d, d), or (N, d, d) for several heads.
    v: (d, Hv), or (N, d, Hv); None = no output.
    is_causal: row i attends to tokens up to i only.

  Returns:
    weights: S, (n, n), or (N, n, n) if ``w`` has heads.
    output: O, (n, Hv) or (N, n, Hv); None without ``v``.

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Cost:
    O(n^2 d) a head.

  Source:
    arXiv 2310.12462.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import attention_inversion
    >>> tokens = jnp.array([[0.0, 0.0], [1.0, 0.0]])
    >>> weights, output = attention_inversion.predict(
    ...   tokens, jnp.eye(2), jnp.eye(2)
    ... )
    >>> [f"{x:.3f}" for x in weights[1]]
    ['0.269', '0.731']
  """
  _checks.check_choice("is_causal", is_causal, (False, True))
  tokens = jnp.asarray(tokens)
  _checks.check_rank("tokens", tokens, 2)
  _checks.check_floating("tokens", tokens)
  n, d = tokens.shape
  stack = _heads("w", w)
  _checks.check_shape("w", stack, (len(stack), d, d), "(N, d, d)")
  values = None
  if v is not None:
    _checks.check_rank("v", v, jnp.ndim(w))
    values = _heads("v", v)
    _checks.check_shape("v", values, (len(stack), d, None), "(N, d, Hv)")
  bias = _causal_bias(n, tokens.dtype) if is_causal else None
  parts = jax.jit(_layer.layer)(tokens, stack, values, bias)
  if jnp.ndim(w) == 3:
    return parts.probs, parts.output
  output = None if parts.output is None else parts.output[0]
  return parts.probs[0], output


def loss(x: jax.Array, data: AttentionInversionData) -> jax.Array:
  r"""Half the squared error of what was observed.

  .. math:: \tfrac12 \|S - \hat S\|^2 + \tfrac12 \|O - \hat O\|^2
    + \tfrac12 \lambda \|T\|^2

  Args:
    x: (n d,), the tokens row by row.
    data: from :func:`prepare`.

  Returns:
    ().

  Raises:
    ValueError: if shapes do not fit.

  Cost:
    O(n^2 d) a head.

  Source:
    arXiv 2310.12462.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import attention_inversion
    >>> data = attention_inversion.prepare(jnp.eye(1), weights=jnp.eye(2))
    >>> print(attention_inversion.loss(jnp.zeros(2), data))
    0.5
  """
  return _layer.loss_of(_layer.parts_of(x, data), data)


def value_and_grad(
  x: jax.Array, data: AttentionInversionData
) -> tuple[jax.Array, jax.Array]:
  r"""The loss and its gradient.

  .. math::

    \nabla L = E T W^\top + E^\top T W + S^\top R_O V^\top + \lambda T, \qquad
    E = J_S(R_O (T V)^\top + R_S)

  with the residuals :math:`R_S = S - \hat S`, :math:`R_O = O - \hat O` of what
  was observed, :math:`J_S` the derivative of the softmax, and a sum over heads.

  Args:
    x: (n d,), the tokens row by row.
    data: from :func:`prepare`.

  Returns:
    () and (n d,).

  Raises:
    ValueError: if shapes do not fit.

  Cost:
    O(n^2 d) a head, two to three times a loss.

  Source:
    derived here.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import attention_inversion
    >>> data = attention_inversion.prepare(jnp.eye(1), weights=jnp.eye(2))
    >>> x = jnp.array([0.0, 1.0])
    >>> value, grad = attention_inversion.value_and_grad(x, data)
    >>> [f"{g:.2f}" for g in grad]
    ['0.36', '-0.21']
  """
  parts = _layer.parts_of(x, data)
  upper, gap = _layer.residuals(parts, data)
  grad, _, _ = _layer.pull(parts, data, upper, gap)
  grad += data.ridge * parts.tokens
  return _layer.loss_of(parts, data), grad.reshape(-1)


def hvp(x: jax.Array, v: jax.Array, data: AttentionInversionData) -> jax.Array:
  r"""The product of the Hessian with a vector.

  .. math::

    \dot S = J_S(D W T^\top + T W D^\top), \qquad
    \dot O = \dot S T V + S D V, \\
    H[D] = \dot E T W^\top + \dot E^\top T W + E D W^\top + E^\top D W
      + (\dot S^\top R_O + S^\top \dot O) V^\top + \lambda D

  Args:
    x: (n d,), the tokens row by row.
    v: (n d,), the direction D.
    data: from :func:`prepare`.

  Returns:
    (n d,).

  Raises:
    ValueError: if shapes do not fit.

  Cost:
    O(n^2 d) a head. For many directions at one point take :func:`curvature`.

  Source:
    derived here.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import attention_inversion
    >>> data = attention_inversion.prepare(
    ...   jnp.eye(1), weights=jnp.eye(2), ridge=3.0
    ... )
    >>> print(attention_inversion.hvp(jnp.zeros(2), jnp.ones(2), data))
    [3. 3.]
  """
  _checks.check_shape("v", v, jnp.shape(x), "that of x")
  return _layer.hessian_product(_layer.slopes_of(x, data), v)


def curvature(
  x: jax.Array, data: AttentionInversionData
) -> newton.DenseCurvature | newton.OperatorCurvature:
  """The Hessian: a matrix up to 512 unknowns, beyond that by products.

  Args:
    x: (n d,), the tokens row by row.
    data: from :func:`prepare`.

  Returns:
    A dense curvature, or an operator for conjugate gradients.

  Raises:
    ValueError: if shapes do not fit.

  Cost:
    O(n^3 d^2) a head for the matrix, in a few large products, and n^3 numbers;
    O(n^2 d) a head for each product.

  Source:
    derived here; see :func:`hvp`.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import attention_inversion
    >>> data = attention_inversion.prepare(
    ...   jnp.eye(1), weights=jnp.eye(2), ridge=3.0
    ... )
    >>> print(attention_inversion.curvature(jnp.zeros(2), data).matrix)
    [[2.5 0.5]
     [0.5 2.5]]
  """
  slopes = _layer.slopes_of(x, data)
  if len(x) <= _DENSE_UNKNOWNS:
    return newton.DenseCurvature(_layer.dense_hessian(slopes))
  product = jax.tree_util.Partial(_layer.hessian_product, slopes)
  return newton.OperatorCurvature(product)


def gauss_newton(
  x: jax.Array, data: AttentionInversionData
) -> newton.OperatorCurvature:
  r"""The positive semidefinite part :math:`J^\top J + \lambda I`.

  Args:
    x: (n d,), the tokens row by row.
    data: from :func:`prepare`.

  Returns:
    An operator; J is the Jacobian of all that was observed.

  Raises:
    ValueError: if shapes do not fit.

  Cost:
    O(n^2 d) a head, and again for each product.

  Source:
    the Gauss-Newton method.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn import newton
    >>> from jaxattn.regression import attention_inversion
    >>> data = attention_inversion.prepare(jnp.eye(1), weights=jnp.eye(2))
    >>> h = attention_inversion.gauss_newton(jnp.array([0.0, 2.0]), data)
    >>> bool(jnp.linalg.eigvalsh(newton.curvature_dense(h, dim=2))[0] > -1e-6)
    True
  """
  parts = _layer.parts_of(x, data)
  product = jax.tree_util.Partial(_layer.gauss_newton_product, parts, data)
  return newton.OperatorCurvature(product)


@functools.lru_cache(maxsize=64)
def problem() -> newton.Problem:
  """The problem for :func:`jaxattn.newton.minimize`.

  Returns:
    A :class:`jaxattn.newton.Problem`; the same call gives the same object.

  Raises:
    Nothing.

  Cost:
    O(1).

  Source:
    arXiv 2310.12462.

  Example:
    >>> from jaxattn.regression import attention_inversion
    >>> attention_inversion.problem() is attention_inversion.problem()
    True
  """
  return newton.Problem(loss, value_and_grad, curvature, gauss_newton)


def invert_attention(
  rng: jax.Array,
  data: AttentionInversionData,
  length: int,
  *,
  num_starts: int = 16,
  init_scale: float | jax.Array = 1.0,
  x0: jax.Array | None = None,
  ridges: Sequence[float] = (),
  config: newton.NewtonConfig | None = None,
) -> AttentionInversionResult:
  """Recovers tokens by the approximate Newton method, from random starts.

  From weights and outputs most starts find the truth; from outputs alone a
  start must be close, and there are other tokens of (nearly) zero loss; from
  the weights of one head the truth is out of reach: see
  :func:`identifiability_report`. A loss of 0 is no recovery.

  Starts about 0 often run far out, where the softmax is saturated, and stay
  there. ``ridges`` holds them back: with more than three dimensions or so take
  ``ridges=(0.1, 0.01)``, whose steps are Gauss-Newton's.

  Args:
    rng: PRNG key of the starts.
    data: from :func:`prepare`.
    length: n, number of tokens, which is that of ``data``.
    num_starts: K.
    init_scale: standard deviation of the starts about ``x0``.
    x0: (n, d), what the starts are drawn around; None = 0.
    ridges: added to that of the data in phases before the last one, each from
      where the one before ended, to a gradient of 1e-3 of its first. All phases
      take a like share of the steps. Meant for starts that are not close: they
      are drawn towards 0 first.
    config: of the solver; None = 150 steps to a gradient of 1e-13 of the first,
      by conjugate gradients where there are more than 512 unknowns, with the
      exact Hessian or, if there are ``ridges``, that of Gauss-Newton.

  Returns:
    A :class:`AttentionInversionResult`.

  Raises:
    ValueError: if ``length`` is not that of the data, or shapes or options do
      not fit.

  Cost:
    A step and start: O(n^3 d^3) with a dense Hessian, or O(n^2 d) a product.

  Source:
    arXiv 2310.12462, with this project's solver.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import attention_inversion, invert_attention
    >>> rngs = jax.random.split(jax.random.key(0), 4)
    >>> truth = jax.random.normal(rngs[0], (4, 2))
    >>> w, v = jax.random.normal(rngs[1], (2, 2, 2))
    >>> weights, output = attention_inversion.predict(truth, w, v)
    >>> data = attention_inversion.prepare(w, v, weights=weights, output=output)
    >>> found = invert_attention(rngs[2], data, 4)
    >>> bool(abs(found.tokens - truth).max() < 1e-2)
    True
  """
  d = data.w.shape[-1]
  _checks.check_integer("length", length, 1, None)
  _checks.check_integer("num_starts", num_starts, 1, None)
  _checks.check_positive("init_scale", init_scale)
  ridges = tuple(map(float, ridges))
  for ridge in ridges:
    _checks.check_positive("ridges", ridge)
  observed = _layer.num_tokens(data)
  if length != observed:
    raise ValueError(
      f"length must be {observed}, the number of tokens observed, got {length}"
    )
  shape = (num_starts, length * d)
  starts = jax.random.normal(rng, shape, data.w.dtype)
  starts *= jnp.asarray(init_scale, data.w.dtype)
  if x0 is not None:
    _checks.check_shape("x0", x0, (length, d), "(n, d)")
    starts += jnp.asarray(x0, data.w.dtype).reshape(1, -1)
  if config is None:
    solver = "cholesky" if length * d <= _DENSE_UNKNOWNS else "cg"
    config = newton.NewtonConfig(
      max_steps=150,
      rtol=1e-13,
      curvature="gauss_newton" if ridges else "newton",
      linear_solver=solver,
    )
  if config.max_steps <= len(ridges):
    raise ValueError(
      f"max_steps must exceed the {len(ridges)} ridges, got {config.max_steps}"
    )
  return _solve(starts, data, config, ridges)


def identifiability_report(
  tokens: jax.Array, data: AttentionInversionData
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """What the observation tells about tokens like these, to first order.

  Args:
    tokens: (n, d), the truth, or tokens like it.
    data: from :func:`prepare`; says what is observed.

  Returns:
    rank: (), directions in which tokens can be told apart: singular values of
      the Jacobian above 1e-9 (or the rounding error) of the largest.
    nullity: (), directions in which they cannot: n d - rank. Tokens are not
      recoverable unless it is 0.
    condition: (), largest over smallest singular value: how much an error of
      the observation may grow.

  Raises:
    ValueError: if shapes do not fit.

  Cost:
    O(n^3 d^2) a head and a singular value decomposition of as many rows as
    there are numbers observed and n d columns.

  Source:
    derived here.

  Example:
    >>> import jax
    >>> from jaxattn.regression import (
    ...   attention_inversion,
    ...   identifiability_report,
    ... )
    >>> tokens, w = 0.5 * jax.random.normal(jax.random.key(0), (2, 2, 2))
    >>> weights, _ = attention_inversion.predict(tokens, w)
    >>> data = attention_inversion.prepare(w, weights=weights)
    >>> rank, nullity, _ = identifiability_report(tokens, data)
    >>> print(rank, nullity)
    2 2
  """
  shape = (_layer.num_tokens(data), data.w.shape[-1])
  _checks.check_shape("tokens", tokens, shape, "(n, d)")
  return _report(jnp.asarray(tokens, data.w.dtype).reshape(-1), data)


# --- shapes ---


def _heads(name: str, x: jax.Array) -> jax.Array:
  """A matrix for each head."""
  x = jnp.asarray(x)
  _checks.check_rank(name, x, (2, 3))
  _checks.check_floating(name, x)
  if 0 in x.shape:
    raise ValueError(f"{name} must not be empty, got shape {x.shape}")
  return x if x.ndim == 3 else x[None]


def _causal_bias(length: int, dtype: jax.typing.DTypeLike) -> jax.Array:
  visible = jnp.tril(jnp.ones((length, length), bool))
  return jnp.where(visible, 0.0, -jnp.inf).astype(dtype)


# --- the solver and the report ---


@functools.partial(jax.jit, static_argnums=(2, 3))
def _solve(
  starts: jax.Array,
  data: AttentionInversionData,
  config: newton.NewtonConfig,
  ridges: tuple[float, ...],
) -> AttentionInversionResult:
  share = config.max_steps // (len(ridges) + 1)
  rough = config._replace(max_steps=share, rtol=max(_ROUGH_TOL, config.rtol))
  last = config._replace(max_steps=config.max_steps - share * len(ridges))

  def phase(x: jax.Array, ridge: jax.Array) -> tuple[jax.Array, jax.Array]:
    eased = data._replace(ridge=data.ridge + ridge)
    found = newton.minimize(problem(), x, eased, config=rough)
    return found.x, found.num_steps

  def one(x: jax.Array) -> newton.NewtonResult:
    before = jnp.zeros((), jnp.int32)
    if ridges:
      x, steps = lax.scan(phase, x, jnp.asarray(ridges, x.dtype))
      before = steps.sum()
    found = newton.minimize(problem(), x, data, config=last)
    return found._replace(num_steps=before + found.num_steps)

  found = jax.vmap(one)(starts)
  tokens = found.x.reshape(len(starts), -1, data.w.shape[-1])
  # A start that overflowed has no finite loss.
  best = jnp.where(jnp.isnan(found.loss), jnp.inf, found.loss).argmin()
  return AttentionInversionResult(
    tokens=tokens[best],
    loss=found.loss[best],
    all_losses=found.loss,
    all_tokens=tokens,
    num_steps=found.num_steps,
    reason=found.reason,
  )


@jax.jit
def _report(
  x: jax.Array, data: AttentionInversionData
) -> tuple[jax.Array, jax.Array, jax.Array]:
  parts = _layer.parts_of(x, data)

  def observed(v: jax.Array) -> jax.Array:
    probs, output, _ = _layer.push(parts, data, v.reshape(parts.tokens.shape))
    seen = [] if data.weights is None else [probs.ravel()]
    return jnp.concatenate(seen if output is None else [*seen, output.ravel()])

  jacobian = jax.vmap(observed)(jnp.eye(len(x), dtype=x.dtype))
  values = jnp.linalg.svd(jacobian, compute_uv=False)
  rounding = max(jacobian.shape) * jnp.finfo(x.dtype).eps
  limit = max(_RANK_TOL, float(rounding)) * values[0]
  rank = ((values > limit) & (values > 0)).sum()
  # With fewer numbers observed than sought the rest of the values is 0.
  short = len(values) < len(x)
  least = jnp.zeros_like(limit) if short else values[-1]
  condition = jnp.where(least > 0, values[0] / least, jnp.inf)
  return rank, len(x) - rank, condition
