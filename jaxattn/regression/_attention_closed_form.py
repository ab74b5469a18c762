r"""Recovery of tokens from attention without an iteration.

From weights S and outputs O of known V, :math:`T = S^{-1} O V^{-1}`. From the
weights alone, with :math:`\Pi` the centering of rows,

.. math::

  \log S \, \Pi = T W (\Pi T)^\top

has rank d and the column space of T: :math:`T = Q M` with known Q, and M is a
solution of the congruence :math:`M W M^\top = N` with known N.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import _checks

# Weights worse conditioned than this have no inverse worth the name.
_MAX_CONDITION = 1e12
# Rows of weights may miss 1 by what rounding to 16 bits costs.
_SUM_TOL = 1e-2
_MAX_DIM = 64
# Eigenvalues of the cosquare closer than this count as repeated.
_GAP = 1e-8


def invert_closed_form(
  w: jax.Array, v: jax.Array, weights: jax.Array, output: jax.Array
) -> jax.Array:
  r"""Tokens from attention weights and outputs, :math:`T = S^{-1} O V^{-1}`.

  Several heads are solved together, by least squares for each token: an error
  of :math:`O_h` reaches token i times the norm of row i of :math:`S_h^{-1}`, by
  which the equations of that head are divided. So a head that is close to
  singular does not spoil what others tell, unless it is needed.

  Args:
    w: (d, d) or (N, d, d), read for its shape only: given its weights, what a
      layer makes of tokens does not depend on queries and keys.
    v: (d, Hv) or (N, d, Hv), with N Hv at least d.
    weights: (n, n) or (N, n, n), S.
    output: (n, Hv) or (N, n, Hv), O.

  Returns:
    (n, d).

  Raises:
    ValueError: if shapes do not fit, values are fewer than dimensions, or
      (where values are known) weights are not stochastic, or the heads whose
      weights are not close to singular have values V that do not tell all d
      dimensions.

  Cost:
    O(N n^3 + N n d^2 Hv).

  Source:
    derived here.

  Example:
    >>> import jax
    >>> from jaxattn.regression import attention_inversion, invert_closed_form
    >>> rngs = jax.random.split(jax.random.key(0), 2)
    >>> tokens = jax.random.normal(rngs[0], (5, 2))
    >>> w, v = jax.random.normal(rngs[1], (2, 2, 2))
    >>> weights, output = attention_inversion.predict(tokens, w, v)
    >>> found = invert_closed_form(w, v, weights, output)
    >>> bool(abs(found - tokens).max() < 1e-2)
    True
  """
  w, v, weights, output = (
    _stacked(name, x)
    for name, x in (
      ("w", w),
      ("v", v),
      ("weights", weights),
      ("output", output),
    )
  )
  num, d, n = len(w), w.shape[-1], weights.shape[-1]
  _checks.check_shape("w", w, (num, d, d), "(N, d, d)")
  _checks.check_shape("v", v, (num, d, None), "(N, d, Hv)")
  _checks.check_shape("weights", weights, (num, n, n), "(N, n, n)")
  _checks.check_shape("output", output, (num, n, v.shape[-1]), "(N, n, Hv)")
  width = num * v.shape[-1]
  if width < d:
    raise ValueError(f"invert_closed_form needs d_v >= d, got {width} < {d}")
  check_stochastic(weights)
  if _checks.is_concrete(weights) and _checks.is_concrete(v):
    _check_conditions(np.asarray(weights), np.asarray(v))
  return _from_both(v, weights, output)


def invert_subspace(
  weights: jax.Array, w: jax.Array
) -> tuple[jax.Array, jax.Array]:
  r"""All that the weights of one head tell about its tokens.

  .. math:: T = Q M, \qquad M W M^\top = N

  Keys to which some query gives a weight of 0 tell nothing and are left out.

  Args:
    weights: (n, n), S; not causal.
    w: (d, d), read for its size: the space is that of the d largest singular
      values.

  Returns:
    q: Q, (n, d), with orthonormal columns.
    gram: N, (d, d), for :func:`congruence_solve`.

  Raises:
    ValueError: if shapes do not fit, weights are not stochastic, or no more
      than d keys have positive weights.

  Cost:
    O(n^3).

  Source:
    derived here.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import attention_inversion, invert_subspace
    >>> tokens = jax.random.normal(jax.random.key(0), (6, 2))
    >>> w = jnp.array([[1.0, 0.5], [-0.5, 1.0]])
    >>> weights, _ = attention_inversion.predict(tokens, w)
    >>> q, gram = invert_subspace(weights, w)
    >>> m = q.T @ tokens
    >>> bool(abs(q @ m - tokens).max() < 1e-4)
    True
    >>> bool(abs(m @ w @ m.T - gram).max() < 1e-3)
    True
  """
  weights, w = jnp.asarray(weights), jnp.asarray(w)
  _checks.check_rank("w", w, 2)
  d = w.shape[-1]
  _checks.check_shape("w", w, (d, d), "(d, d)")
  _checks.check_rank("weights", weights, 2)
  _checks.check_floating("weights", weights)
  n = weights.shape[-1]
  _checks.check_shape("weights", weights, (n, n), "(n, n)")
  if n <= d:
    raise ValueError(f"invert_subspace needs n > d, got n={n}, d={d}")
  check_stochastic(weights)
  kept = (weights >= jnp.finfo(weights.dtype).tiny).all(0)
  if _checks.is_concrete(kept) and kept.sum() <= d:
    raise ValueError(
      f"invert_subspace needs more than d={d} keys of positive weight, got "
      f"{int(kept.sum())}"
    )
  return _subspace(weights, kept, d)


def congruence_solve(n_mat: jax.Array, w: jax.Array) -> np.ndarray:
  r"""One solution of the congruence :math:`M W M^\top = N`.

  The cosquares :math:`W^{-1} W^\top` and :math:`N^{-1} N^\top` are similar by
  :math:`M^{-\top}`, so that M maps eigenvectors to eigenvectors and only their
  lengths are open. Eigenvalues come in pairs :math:`\lambda, 1 / \lambda`, and
  of the two lengths of a pair the product is given: one free number a pair,
  which is set here so that M is real if it can be.

  Args:
    n_mat: N, (d, d), real.
    w: W, (d, d), real, far from symmetric; d at most 64.

  Returns:
    M, (d, d), real if there is a real solution, otherwise complex. All others
    are M G with :math:`G W G^\top = W`.

  Raises:
    ValueError: if shapes do not fit, a value is not finite, a matrix is
      singular, or eigenvalues are repeated, as for a symmetric W.

  Cost:
    O(d^3), on the host.

  Source:
    derived here.

  Example:
    >>> import numpy as np
    >>> from jaxattn.regression import congruence_solve
    >>> w = np.array([[1.0, 0.5], [-0.5, 2.0]])
    >>> truth = np.array([[1.0, 2.0], [0.0, 1.0]])
    >>> m = congruence_solve(truth @ w @ truth.T, w)
    >>> print(abs(m @ w @ m.T - truth @ w @ truth.T).max() < 1e-12)
    True
  """
  left, right = _host("n_mat", n_mat), _host("w", w)
  _checks.check_rank("w", right, 2)
  d = right.shape[-1]
  _checks.check_shape("w", right, (d, d), "(d, d)")
  _checks.check_shape("n_mat", left, (d, d), "that of w")
  _checks.check_integer("d", d, 1, _MAX_DIM)
  roots_n, vectors_n = _cosquare("n_mat", left)
  roots_w, vectors_w = _cosquare("w", right)
  order = _assign(np.abs(roots_w[:, None] - roots_n[None]))
  vectors_n = vectors_n[:, order]
  pair = _assign(np.abs(roots_w[:, None] * roots_w[None] - 1))
  mate = _assign(np.abs(roots_w[:, None] - roots_w[None].conj()))
  index = np.arange(d)
  form_w = (vectors_w.T @ right @ vectors_w)[index, pair]
  form_n = (vectors_n.T @ left @ vectors_n)[index, pair]
  lengths = _lengths(roots_w, form_w / form_n, pair, mate)
  m = (vectors_w / lengths @ np.linalg.inv(vectors_n)).T
  small = np.abs(m.imag).max() <= 1e-6 * np.abs(m).max()
  return m.real if small else m


def check_stochastic(weights: jax.Array) -> None:
  """Raises unless concrete weights are non-negative and sum to 1 by rows."""
  if not _checks.is_concrete(weights):
    return
  x = np.asarray(weights)
  x = x.reshape(-1, *x.shape[-2:])
  if not np.isfinite(x).all():
    raise ValueError("weights contains non-finite values")
  _checks.check_nonnegative("weights", x.min())
  sums = x.sum(-1)
  bad = np.argwhere(np.abs(sums - 1) > _SUM_TOL)
  if len(bad):
    head, row = bad[0]
    where = f"row {row}" + (f" of head {head}" if len(x) > 1 else "")
    raise ValueError(
      f"weights rows must sum to 1, {where} sums to {sums[head, row]:.3g}"
    )


def check_causal(weights: jax.Array) -> None:
  """Raises if concrete (N, n, n) weights are not 0 on later keys."""
  if not _checks.is_concrete(weights):
    return
  later = np.triu(np.asarray(weights), 1).sum(-1)
  if later.max() > _SUM_TOL:
    head, row = np.argwhere(later > _SUM_TOL)[0]
    raise ValueError(
      f"weights must be 0 on later keys with is_causal, row {row} has "
      f"{later[head, row]:.3g} there"
    )


def _check_conditions(weights: np.ndarray, v: np.ndarray) -> None:
  """Raises unless heads that can be inverted tell all dimensions."""
  conditions = np.linalg.cond(weights)
  good = conditions <= _MAX_CONDITION
  rows = v.swapaxes(1, 2)[good].reshape(-1, v.shape[1])
  of_values = np.linalg.cond(rows) if len(rows) >= v.shape[1] else np.inf
  if of_values <= _MAX_CONDITION:
    return
  name, found = "v", of_values
  if not good.all():
    name, found = "weights", conditions.max()
  raise ValueError(
    f"condition number {found:.0e} of {name} exceeds {_MAX_CONDITION:.0e}; "
    "use invert_attention"
  )


@jax.jit
def _from_both(
  v: jax.Array, weights: jax.Array, output: jax.Array
) -> jax.Array:
  sizes = jnp.linalg.svd(weights, compute_uv=False)
  good = sizes[:, 0] <= _MAX_CONDITION * sizes[:, -1]
  eye = jnp.eye(weights.shape[-1], dtype=weights.dtype)
  weights = jnp.where(good[:, None, None], weights, eye[None])
  values = jnp.linalg.solve(weights, output)
  growth = jnp.linalg.norm(jnp.linalg.inv(weights), axis=2)
  trust = jnp.where(good[:, None], 1 / growth, 0)
  # One row a value, heads below each other: V^T t = (S^-1 O)^T of a token.
  left = v.transpose(0, 2, 1)

  def token(values: jax.Array, trust: jax.Array) -> jax.Array:
    rows = trust[:, None, None] * left
    q, r = jnp.linalg.qr(rows.reshape(-1, v.shape[1]))
    right = q.T @ (trust[:, None] * values).reshape(-1)
    return jax.scipy.linalg.solve_triangular(r, right)

  return jax.vmap(token, (1, 1))(values, trust)


@functools.partial(jax.jit, static_argnums=2)
def _subspace(
  weights: jax.Array, kept: jax.Array, d: int
) -> tuple[jax.Array, jax.Array]:
  logits = jnp.log(jnp.where(kept[None], weights, 1))
  share = kept.astype(weights.dtype)
  centering = jnp.diag(share) - share[:, None] * share[None] / share.sum()
  centered = logits @ centering
  q = jnp.linalg.svd(centered, full_matrices=False)[0][:, :d]
  # N (Q^T Pi) = Q^T Lc, for its transpose.
  gram = jnp.linalg.lstsq(centering @ q, (q.T @ centered).T)[0].T
  return q, gram


def _stacked(name: str, x: jax.Array) -> jax.Array:
  x = jnp.asarray(x)
  _checks.check_rank(name, x, (2, 3))
  _checks.check_floating(name, x)
  return x if x.ndim == 3 else x[None]


def _host(name: str, x: jax.Array) -> np.ndarray:
  if not _checks.is_concrete(x):
    raise ValueError("congruence_solve works on the host and cannot be traced")
  array = np.asarray(x, np.float64)
  if not np.isfinite(array).all():
    raise ValueError(f"{name} contains non-finite values")
  return array


def _cosquare(name: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Eigenvalues and eigenvectors of inv(X) X^T."""
  if np.linalg.cond(x) > _MAX_CONDITION:
    raise ValueError(f"{name} must be invertible, got a singular matrix")
  roots, vectors = np.linalg.eig(np.linalg.solve(x, x.T))
  roots, vectors = roots.astype(complex), vectors.astype(complex)
  gaps = np.abs(roots[:, None] - roots[None]) + np.eye(len(x))
  if gaps.min() < _GAP:
    raise ValueError(
      f"the eigenvalues of inv({name}) @ {name}.T must be distinct, got a gap "
      f"of {gaps.min():.0e}; a symmetric matrix has none"
    )
  return roots, vectors


def _assign(cost: np.ndarray) -> np.ndarray:
  from scipy import optimize

  return optimize.linear_sum_assignment(cost)[1]


def _lengths(roots: Any, ratio: Any, pair: Any, mate: Any) -> np.ndarray:
  """Numbers D_a with D_a D_pair(a) = ratio_a; conjugate where roots are."""
  index = np.arange(len(roots))
  size = np.sqrt(np.abs(ratio))
  leads = np.abs(roots) > 1
  lengths = np.where(leads, size, ratio / size)
  # On the unit circle the pair is the conjugate: both the same, and real.
  circle = (pair == mate) & (pair != index)
  upper = roots.imag > 0
  other = np.where(ratio.real > 0, size, np.where(upper, size, ratio / size))
  lengths = np.where(circle, other, lengths)
  return np.where(pair == index, np.sqrt(ratio), lengths)
