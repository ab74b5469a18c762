r"""Online softmax: attention over keys that arrive in parts.

For logits :math:`s_j` and values :math:`v_j` the state holds, per query,

.. math::

  m = \max_j s_j, \qquad \ell = \sum_j e^{s_j - m}, \qquad
  a = \sum_j e^{s_j - m} v_j,

and two states over disjoint keys merge by rescaling both to the larger
:math:`m`. The merge is associative and commutative up to rounding, so parts may
be folded in any order, on any device. Source: Milakov and Gimelshein, arXiv
1805.02867, algorithm 3; Rabe and Staats, arXiv 2112.05682.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxattn import _checks


class OnlineSoftmax(NamedTuple):
  r"""Softmax-weighted sums over the keys seen so far.

  A state of zeros with ``max = -inf`` has seen nothing. A state whose
  ``max`` is 0 holds unnormalized sums: :math:`(\phi Z, \phi k, 0)` merges a
  linear-attention state into a softmax.

  Attributes:
    acc: (..., T, Hv) weighted sum of values, relative to ``max``.
    denom: (..., T) sum of weights, relative to ``max``.
    max: (..., T) largest logit seen.
  """

  acc: jax.Array
  denom: jax.Array
  max: jax.Array


def online_softmax_init(
  logits: jax.Array,
  value: jax.Array,
  *,
  precision: jax.lax.PrecisionLike = None,
) -> OnlineSoftmax:
  """State after the first part of the keys.

  Args:
    logits: (..., T, S); -inf hides a key.
    value: (..., S, Hv); any columns, for instance stacked moments [x, x^2].
    precision: of the product of weights and values.

  Returns:
    The state, of the dtype of ``logits``.

  Raises:
    ValueError: if the numbers of keys differ.

  Cost:
    O(T S Hv) time, O(T S) memory for the weights of this part.

  Source:
    arXiv 1805.02867, algorithm 3.

  Example:
    >>> import jax.numpy as jnp
    >>> values = jnp.array([[1.0], [3.0]])
    >>> state = online_softmax_init(jnp.zeros((1, 2)), values)
    >>> out, lse = online_softmax_finalize(state)
    >>> print(out)
    [[2.]]
  """
  if logits.shape[-1] != value.shape[-2]:
    raise ValueError(
      f"value must have as many rows as logits has columns, got value "
      f"{value.shape} and logits {logits.shape}"
    )
  peak = logits.max(axis=-1)
  weights = jnp.exp(logits - _finite(peak)[..., None])
  acc = jnp.matmul(
    weights.astype(value.dtype),
    value,
    precision=precision,
    preferred_element_type=logits.dtype,
  )
  return OnlineSoftmax(acc, weights.sum(axis=-1), peak)


def online_softmax_update(
  state: OnlineSoftmax,
  logits: jax.Array,
  value: jax.Array,
  *,
  precision: jax.lax.PrecisionLike = None,
) -> OnlineSoftmax:
  """State after one more part of the keys.

  Args:
    state: of the keys before.
    logits: (..., T, S) of the new keys; -inf hides a key.
    value: (..., S, Hv) of the new keys.
    precision: of the product of weights and values.

  Returns:
    The new state.

  Raises:
    ValueError: if the numbers of keys differ.

  Cost:
    O(T S Hv) time, O(T S) memory for the weights of this part.

  Source:
    arXiv 1805.02867, algorithm 3.

  Example:
    >>> import jax.numpy as jnp
    >>> one, x = jnp.zeros((1, 1)), jnp.array([[4.0]])
    >>> state = online_softmax_update(online_softmax_init(one, x), one, 2 * x)
    >>> print(online_softmax_finalize(state)[0])
    [[6.]]
  """
  part = online_softmax_init(logits, value, precision=precision)
  return online_softmax_merge(state, part)


def online_softmax_merge(a: OnlineSoftmax, b: OnlineSoftmax) -> OnlineSoftmax:
  """State over the union of two disjoint sets of keys.

  Args:
    a: state over the first set.
    b: state over the second set, of the same shapes.

  Returns:
    The merged state; the arguments' order changes rounding only.

  Raises:
    ValueError: if the shapes of the states differ.

  Cost:
    O(T Hv) time and memory.

  Source:
    arXiv 1805.02867, section 3.1 (the operator is associative).

  Example:
    >>> import jax.numpy as jnp
    >>> a = online_softmax_init(jnp.zeros((1, 1)), jnp.array([[1.0]]))
    >>> print(online_softmax_merge(a, a).denom)
    [2.]
  """
  _checks.check_shape("b.acc", b.acc, a.acc.shape, "a.acc.shape")
  peak = jnp.maximum(a.max, b.max)
  safe = _finite(peak)
  wa, wb = jnp.exp(a.max - safe), jnp.exp(b.max - safe)
  acc = a.acc * wa[..., None] + b.acc * wb[..., None]
  return OnlineSoftmax(acc, a.denom * wa + b.denom * wb, peak)


def online_softmax_finalize(
  state: OnlineSoftmax,
) -> tuple[jax.Array, jax.Array]:
  """Attention output and log-sum-exp of everything seen.

  Args:
    state: over all keys.

  Returns:
    (..., T, Hv) weighted means and (..., T) log-sum-exp. A query that saw no
    key gets 0 and -inf.

  Raises:
    Nothing.

  Cost:
    O(T Hv) time and memory.

  Source:
    arXiv 1805.02867, algorithm 3.

  Example:
    >>> import jax.numpy as jnp
    >>> hidden = online_softmax_init(
    ...   jnp.full((1, 1), -jnp.inf), jnp.array([[5.0]])
    ... )
    >>> print(*online_softmax_finalize(hidden))
    [[0.]] [-inf]
  """
  empty = state.denom == 0
  denom = jnp.where(empty, 1, state.denom)
  lse = jnp.where(empty, -jnp.inf, _finite(state.max) + jnp.log(denom))
  return state.acc / denom[..., None], lse


def _finite(peak: jax.Array) -> jax.Array:
  # exp(-inf - (-inf)) is NaN; a row with nothing to see is shifted by 0.
  return jnp.where(jnp.isneginf(peak), jnp.zeros_like(peak), peak)
