r"""Ridge regression and eigenvalues, as several rooms need them.

Closed-form least squares goes through :func:`ridge_solve`, the largest
eigenvalue of an operator through :func:`power_iteration`, and the two constants
of :math:`\ell\, G \preceq \tilde G \preceq h\, G` through
:func:`spectral_bounds`. Regression with a kernel, from its Gram matrix, is
:func:`kernel_ridge_fit`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy import linalg

from jaxattn import _checks
from jaxattn.numerics import _dtypes

__all__ = [
  "KernelRidge",
  "kernel_ridge_fit",
  "kernel_ridge_predict",
  "loo_residuals",
  "power_iteration",
  "ridge_solve",
  "spectral_bounds",
]


class KernelRidge(NamedTuple):
  """A fit of kernel ridge regression.

  Attributes:
    coef: (n,) or (n, k), what the kernel with each datum is multiplied by.
    offset: () or (k,), the mean of the targets.
  """

  coef: jax.Array
  offset: jax.Array


def kernel_ridge_fit(
  k: jax.Array, y: jax.Array, *, relative_ridge: float | jax.Array
) -> KernelRidge:
  r"""Regression in the space of a kernel, from its Gram matrix.

  .. math:: (K + \lambda I)\, \alpha = y - \bar y, \qquad
    \lambda = \lambda_{\text{rel}} \operatorname{tr}(K) / n

  Args:
    k: (n, n), symmetric positive semidefinite, floating.
    y: (n,) or (n, k) targets.
    relative_ridge: :math:`\lambda_{\text{rel}}`, at least 0; 0 needs a K that
      is not singular.

  Returns:
    A :class:`KernelRidge`, for :func:`kernel_ridge_predict`. NaN where the
    matrix is not positive definite to rounding.

  Raises:
    ValueError: if shapes or dtypes do not fit, or ``relative_ridge`` is no
      scalar or negative.

  Cost:
    O(n^3) time, O(n^2) memory.

  Source:
    standard.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.numerics import kernel_ridge_fit, kernel_ridge_predict
    >>> x = jnp.array([[1.0], [2.0], [3.0]])
    >>> fit = kernel_ridge_fit(x @ x.T, x[:, 0], relative_ridge=1e-4)
    >>> fit.offset
    Array(2., dtype=float32)
    >>> kernel_ridge_predict(x @ x.T, fit).shape
    (3,)
  """
  k, y = _check_kernel(k, y, relative_ridge)
  dtype = k.dtype
  coef, offset, _ = _kernel_ridge(k, y, relative_ridge)
  return KernelRidge(coef.astype(dtype), offset.astype(dtype))


def kernel_ridge_predict(k_test: jax.Array, fit: KernelRidge) -> jax.Array:
  r"""Predictions of a fit.

  .. math:: f(x) = \bar y + \sum_i k(x, x_i)\, \alpha_i

  Args:
    k_test: (n_test, n), kernel of new data with those of the fit.
    fit: from :func:`kernel_ridge_fit`.

  Returns:
    (n_test,) or (n_test, k), as the targets were.

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Cost:
    O(n_test n).

  Source:
    standard.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.numerics import KernelRidge, kernel_ridge_predict
    >>> fit = KernelRidge(jnp.array([1.0, -1.0]), jnp.array(5.0))
    >>> print(kernel_ridge_predict(jnp.array([[2.0, 0.5]]), fit))
    [6.5]
  """
  k_test, coef, offset = map(jnp.asarray, (k_test, *fit))
  _checks.check_rank("k_test", k_test, 2)
  _checks.check_one_dtype(k_test=k_test, coef=coef, offset=offset)
  _checks.check_shape("k_test", k_test, (None, len(coef)), "(n_test, n)")
  _checks.check_shape("offset of fit", offset, coef.shape[1:])
  wide = _dtypes.accumulator(k_test.dtype)
  product = jnp.matmul(
    k_test.astype(wide), coef.astype(wide), precision=lax.Precision.HIGHEST
  )
  offset = jnp.broadcast_to(offset.astype(wide), product.shape)
  return (product + offset).astype(k_test.dtype)


def loo_residuals(
  k: jax.Array, y: jax.Array, *, relative_ridge: float | jax.Array
) -> jax.Array:
  r"""Errors at each datum of the fit to all others, from one factorization.

  .. math:: e_i = [K_\lambda^{-1} (y - \bar y)]_i \,/\, [K_\lambda^{-1}]_{ii},
    \qquad K_\lambda = K + \lambda I

  Exact if the fits without one datum keep the mean and the ridge of all of
  them; targets that must not see their own mean are centered beforehand.

  Args:
    k: (n, n), symmetric positive semidefinite, floating.
    y: (n,) or (n, k) targets.
    relative_ridge: as of :func:`kernel_ridge_fit`.

  Returns:
    Targets minus predictions, as ``y``.

  Raises:
    ValueError: if shapes or dtypes do not fit, or ``relative_ridge`` is no
      scalar or negative.

  Cost:
    O(n^3) time, O(n^2) memory.

  Source:
    the inverse of a matrix without a row and column, by Schur complements.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.numerics import loo_residuals
    >>> y = jnp.array([1.0, 2.0, 3.0])
    >>> print(loo_residuals(jnp.eye(3), y, relative_ridge=0.1))
    [-1.  0.  1.]
  """
  k, y = _check_kernel(k, y, relative_ridge)
  coef, _, factor = _kernel_ridge(k, y, relative_ridge)
  return _loo(coef, factor).astype(k.dtype)


def ridge_solve(
  a: jax.Array, b: jax.Array, ridge: float | jax.Array
) -> jax.Array:
  r"""The minimizer of :math:`\|a x - b\|^2 + \lambda \|x\|^2`.

  .. math::

    x = (a^\top a + \lambda I)^{-1} a^\top b
      = a^\top (a a^\top + \lambda I)^{-1} b

  The first form is used where a is tall, the second where it is wide. A
  ``ridge`` that is known to be 0 is solved by a QR factorization, which does
  not square the condition number; a wide ``a`` then gives the solution of least
  norm. Without a ridge ``a`` must have full rank.

  Args:
    a: (n, p), floating.
    b: (n,) or (n, k), floating.
    ridge: lambda, one number, at least 0. Under ``jit`` a traced 0 takes the
      Cholesky path.

  Returns:
    (p,) or (p, k) in the dtype that ``a`` and ``b`` promote to. Where the
    system is singular it is NaN, or, as rounding hides that from both
    factorizations, some solution or none: nothing to rely on.

  Raises:
    ValueError: if shapes or dtypes do not fit, or ``ridge`` is no scalar or
      negative.

  Cost:
    O(n p min(n, p)) time, O(min(n, p)^2) memory; with 16-bit inputs everything
    is computed in float32.

  Source:
    standard; the second form is the first by the push-through identity.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.numerics import ridge_solve
    >>> a = jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    >>> print(ridge_solve(a, jnp.array([1.0, 4.0, 5.0]), 0.0).round(3))
    [1. 2.]
    >>> print(ridge_solve(a, jnp.array([1.0, 4.0, 5.0]), 1.0).round(3))
    [0.5 1.6]
  """
  a, b = jnp.asarray(a), jnp.asarray(b)
  _checks.check_rank("a", a, 2)
  _checks.check_floating("a", a)
  _checks.check_rank("b", b, (1, 2))
  _checks.check_floating("b", b)
  rows = (len(a), *b.shape[1:])
  _checks.check_shape("b", b, rows, "(n,) or (n, k)")
  _checks.check_scalar("ridge", ridge)
  _checks.check_nonnegative("ridge", ridge)
  exact = _checks.is_concrete(ridge) and not np.any(np.asarray(ridge))
  columns = b[:, None] if b.ndim == 1 else b
  dtype = jnp.promote_types(a.dtype, b.dtype)
  wide = _dtypes.accumulator(dtype)
  a, columns = a.astype(wide), columns.astype(wide)
  x = _qr_solve(a, columns) if exact else _gram_solve(a, columns, ridge)
  return x.astype(dtype).reshape(-1, *b.shape[1:])


def power_iteration(
  matvec: Callable[[jax.Array], jax.Array],
  v0: jax.Array,
  *,
  num_steps: int = 30,
) -> tuple[jax.Array, jax.Array]:
  r"""The eigenvalue of largest size of a symmetric operator.

  .. math:: v \leftarrow A v / \|A v\|, \qquad \mu = \langle v, A v \rangle

  The error of the eigenvalue shrinks by :math:`(\mu_2 / \mu_1)^2` a step. Of a
  positive semidefinite A the answer is never above the largest eigenvalue.

  Args:
    matvec: v -> A v, of a symmetric A, shapes as ``v0``.
    v0: the start, of any shape; not 0, and not orthogonal to the eigenvector.
    num_steps: products with A before the one that gives the eigenvalue.

  Returns:
    The eigenvalue, (), and its eigenvector of norm 1, as ``v0``. An operator
    that maps its start to 0 gives 0 and that start.

  Raises:
    ValueError: if ``v0`` is not floating, or is 0, or ``num_steps`` < 1.

  Cost:
    num_steps + 1 products.

  Source:
    von Mises' iteration.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.numerics import power_iteration
    >>> a = jnp.array([[2.0, 1.0], [1.0, 2.0]])
    >>> value, vector = power_iteration(lambda v: a @ v, jnp.array([1.0, 0.0]))
    >>> print(round(float(value), 3), vector.round(3))
    3.0 [0.707 0.707]
  """
  v0 = jnp.asarray(v0)
  _checks.check_floating("v0", v0)
  _checks.check_integer("num_steps", num_steps, 1, None)
  if _checks.is_concrete(v0) and not np.any(np.asarray(v0)):
    raise ValueError("v0 must not be 0")

  def step(v: jax.Array, _: None) -> tuple[jax.Array, None]:
    return _unit(matvec(v), v), None

  vector, _ = lax.scan(step, _unit(v0, v0), length=num_steps)
  return jnp.vdot(vector, matvec(vector)), vector


def spectral_bounds(
  gram: jax.Array, gram_approx: jax.Array
) -> tuple[jax.Array, jax.Array]:
  r"""How well one positive semidefinite matrix stands for another.

  The largest :math:`\ell` and the smallest :math:`h` with

  .. math:: \ell\, G \preceq \tilde G \preceq h\, G ,

  the extreme generalized eigenvalues; :math:`\max(h - 1, 1 - \ell)` is the
  error :math:`\varepsilon` of a subspace embedding or of a sampled Hessian. Of
  a singular G only its range counts for :math:`\ell`, and h is infinite if the
  approximation reaches out of that range.

  Args:
    gram: G, (p, p), symmetric positive semidefinite, not 0.
    gram_approx: the approximation, (p, p), symmetric positive semidefinite.

  Returns:
    low and high, each (). An indefinite approximation gives a negative ``low``;
    the infinite ``high`` is then not reliable.

  Raises:
    ValueError: if shapes or dtypes do not fit, or ``gram`` is 0.

  Cost:
    O(p^3): two symmetric eigenvalue problems, which a singular G survives and a
    Cholesky factorization would not.

  Source:
    Courant and Fischer's min-max theorem for the pencil of the two matrices.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.numerics import spectral_bounds
    >>> low, high = spectral_bounds(2 * jnp.eye(2), jnp.eye(2))
    >>> print(round(float(low), 3), round(float(high), 3))
    0.5 0.5
  """
  gram, gram_approx = jnp.asarray(gram), jnp.asarray(gram_approx)
  _checks.check_rank("gram", gram, 2)
  _checks.check_floating("gram", gram)
  _checks.check_floating("gram_approx", gram_approx)
  p = len(gram)
  _checks.check_shape("gram", gram, (p, p), "(p, p)")
  _checks.check_shape("gram_approx", gram_approx, (p, p), "(p, p)")
  if _checks.is_concrete(gram) and not np.any(np.asarray(gram)):
    raise ValueError("gram must not be 0")
  dtype = jnp.promote_types(gram.dtype, gram_approx.dtype)
  wide = _dtypes.accumulator(dtype)
  low, high = _spectral_bounds(gram.astype(wide), gram_approx.astype(wide))
  return low.astype(dtype), high.astype(dtype)


def above_rounding(sizes: jax.Array) -> jax.Array:
  """Which singular values of a tall matrix are more than rounding of its QR.

  Args:
    sizes: (d,), of the triangle.

  Returns:
    (d,), boolean.
  """
  # It hardly grows with the rows: copies of a constant column, of which all
  # products round alike, leave 50 units of rounding at 2e5 rows and at 2e6.
  least = (128 + len(sizes)) * jnp.finfo(sizes.dtype).eps
  return sizes > least * sizes.max(initial=0)


def _check_kernel(
  k: jax.Array, y: jax.Array, relative_ridge: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
  k, y = jnp.asarray(k), jnp.asarray(y)
  _checks.check_rank("k", k, 2)
  _checks.check_rank("y", y, (1, 2))
  _checks.check_one_dtype(k=k, y=y)
  n = len(k)
  _checks.check_shape("k", k, (n, n), "(n, n)")
  _checks.check_shape("y", y, (n, *y.shape[1:]), "(n,) or (n, k)")
  _checks.check_scalar("relative_ridge", relative_ridge)
  _checks.check_nonnegative("relative_ridge", relative_ridge)
  return k, y


@jax.jit
def _kernel_ridge(
  k: jax.Array, y: jax.Array, relative_ridge: float | jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Coefficients, means of the targets, and the factor of the matrix."""
  wide = _dtypes.accumulator(k.dtype)
  k, y = k.astype(wide), y.astype(wide)
  n, offset = len(k), y.mean(0)
  ridge = jnp.asarray(relative_ridge, wide) * jnp.trace(k) / n
  factor = jnp.linalg.cholesky(k + ridge * jnp.eye(n, dtype=wide))
  centered = y - jnp.broadcast_to(offset, y.shape)
  return linalg.cho_solve((factor, True), centered), offset, factor


@jax.jit
def _loo(coef: jax.Array, factor: jax.Array) -> jax.Array:
  eye = jnp.eye(len(factor), dtype=factor.dtype)
  half = linalg.solve_triangular(factor, eye, lower=True)
  diagonal = jnp.square(half).sum(0)
  return coef / diagonal.reshape(-1, *(1,) * (coef.ndim - 1))


@jax.jit
def _qr_solve(a: jax.Array, b: jax.Array) -> jax.Array:
  if a.shape[0] >= a.shape[1]:
    q, r = jnp.linalg.qr(a)
    return linalg.solve_triangular(r, q.T @ b)
  q, r = jnp.linalg.qr(a.T)
  return q @ linalg.solve_triangular(r, b, trans=1)


@jax.jit
def _gram_solve(
  a: jax.Array, b: jax.Array, ridge: float | jax.Array
) -> jax.Array:
  n, p = a.shape
  shift = jnp.asarray(ridge, a.dtype) * jnp.eye(min(n, p), dtype=a.dtype)
  if n >= p:
    factor = linalg.cho_factor(a.T @ a + shift, lower=True)
    return linalg.cho_solve(factor, a.T @ b)
  factor = linalg.cho_factor(a @ a.T + shift, lower=True)
  return a.T @ linalg.cho_solve(factor, b)


def _unit(v: jax.Array, otherwise: jax.Array) -> jax.Array:
  norm = jnp.sqrt(jnp.vdot(v, v))
  return jnp.where(norm > 0, v / jnp.where(norm > 0, norm, 1), otherwise)


@jax.jit
def _spectral_bounds(
  gram: jax.Array, approx: jax.Array
) -> tuple[jax.Array, jax.Array]:
  sizes, vectors = jnp.linalg.eigh(gram)
  noise = len(gram) * jnp.finfo(gram.dtype).eps
  kept = sizes > noise * sizes[-1]
  root = jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, sizes, 1)), 0)
  turned = vectors.T @ approx @ vectors
  pencil = root[:, None] * turned * root[None]
  # Outside the range of G stands a value that is surely between the extremes.
  pencil += jnp.diag(jnp.where(kept, 0, pencil[-1, -1]))
  values = jnp.linalg.eigvalsh(pencil)
  diagonal = jnp.diag(turned)
  outside = jnp.where(kept, 0, diagonal).sum()
  leaks = outside > noise * diagonal.sum()
  return values[0], jnp.where(leaks, jnp.inf, values[-1])
