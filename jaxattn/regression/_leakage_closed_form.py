"""Attacks on gradients that need no optimization: label, span and APRIL."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxattn import _checks

ATTENTION_KEYS = ("w_q", "w_k", "w_v")


class SpanResult(NamedTuple):
  """The end of :func:`span_attack`.

  Attributes:
    ids: (n,), of the token nearest to the span, for each position.
    distances: (n, V) of each token at each position from the span, as a share
      of its length: 0 = inside. Exact to about the root of the rounding unit.
    rank: (), of the gradients; n if nothing is lost.
  """

  ids: jax.Array
  distances: jax.Array
  rank: jax.Array


def label_from_bias(grad_bias: jax.Array) -> jax.Array:
  r"""The class of a single example, from the gradient in the last bias.

  .. math:: \partial \ell / \partial b_c = \mathrm{softmax}(\cdot) - y

  is negative at the true class only.

  Args:
    grad_bias: (num_classes,) gradient of the cross-entropy in the bias of the
      logits, for one example.

  Returns:
    (), the class.

  Raises:
    ValueError: if ``grad_bias`` is no floating vector.

  Cost:
    O(num_classes).

  Source:
    iDLG, arXiv 2001.02610.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import label_from_bias
    >>> print(label_from_bias(jnp.array([0.2, -0.7, 0.5])))
    1
  """
  grad_bias = jnp.asarray(grad_bias)
  _checks.check_rank("grad_bias", grad_bias, 1)
  _checks.check_floating("grad_bias", grad_bias)
  return grad_bias.argmin()


def span_attack(
  leaked: Mapping[str, jax.Array],
  embed: jax.Array,
  pos: jax.Array,
  *,
  w_keys: Sequence[str] = ATTENTION_KEYS,
  tol: float | None = None,
  token_fn: Callable[[jax.Array], jax.Array] | None = None,
) -> SpanResult:
  r"""Reads discrete tokens off the column space of a gradient.

  With tokens z (n, d), the gradients in the weights of queries, keys and values
  are :math:`z^\top \delta`: their columns lie in the span of the n tokens. If
  n < d, a wrong token E[w] + pos[i] is almost surely outside of it. Rows of the
  gradient in the logits sum to 0, so those in queries and keys have rank n - 1
  at most: all three are needed.

  Args:
    leaked: gradients by name; those in ``w_keys`` are (d, ...).
    embed: (V, d), the vectors of all tokens there are.
    pos: (n, d), what is added at each position.
    w_keys: names of the gradients to use.
    tol: singular values below this, relative to the largest, are 0; None =
      1e-10 in float64 and 1e-5 in float32.
    token_fn: what the model does to E[w] + pos[i] before queries, keys and
      values, such as its first layer normalization: (V, d) -> (V, d); None =
      nothing.

  Returns:
    A :class:`SpanResult`.

  Raises:
    ValueError: if shapes do not fit, a name is missing, or n is not below d,
      as "span_attack needs n <= d-1, got n=16, d=16".

  Cost:
    O(V d n) time and O(V n) memory, beside one singular value decomposition;
    with ``token_fn`` n passes over a (V, d) array.

  Source:
    the rank argument is derived here; the check is that of DAGER, arXiv
    2405.15586.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import span_attack
    >>> embed = jax.random.normal(jax.random.key(0), (50, 8))
    >>> ids = jnp.array([7, 7, 30])
    >>> back = jax.random.normal(jax.random.key(1), (3, 4))
    >>> leaked = {"w_v": embed[ids].T @ back}
    >>> found = span_attack(leaked, embed, jnp.zeros((3, 8)), w_keys=["w_v"])
    >>> print(found.rank, jnp.flatnonzero(found.distances[0] < 1e-3))
    2 [ 7 30]
  """
  embed, pos = jnp.asarray(embed), jnp.asarray(pos)
  _checks.check_rank("embed", embed, 2)
  d = embed.shape[1]
  _checks.check_shape("pos", pos, (None, d), "(n, d)")
  n = len(pos)
  if n >= d:
    raise ValueError(f"span_attack needs n <= d-1, got n={n}, d={d}")
  gradient = stack_columns(leaked, w_keys)
  _checks.check_shape("leaked", gradient, (d, None), "(d, ...)")
  basis, rank = _span(gradient, n, tol)
  if token_fn is None:
    distances = _distances(embed, pos, basis)
  else:
    distances = jax.lax.map(
      lambda p: _distance(token_fn(embed + p[None]), basis), pos
    )
  return SpanResult(distances.argmin(1), distances, rank)


def april_attack(
  params: Mapping[str, jax.Array], leaked: Mapping[str, jax.Array]
) -> jax.Array:
  r"""Solves for the input of attention, given the gradient in positions.

  Without a residual connection around attention, z reaches the loss through
  queries, keys and values only. With :math:`G_{pos} = \delta_z`, the gradient
  in z itself, and :math:`G_q = z^\top \delta_q` and so on,

  .. math:: W_q G_q^\top + W_k G_k^\top + W_v G_v^\top = \delta_z^\top z,

  a linear system for z.

  Args:
    params: parameters of a block as :class:`jaxattn.models.LeakageBlock` names
      them: ``w_q``, ``w_k``, ``w_v`` (d, h) and ``pos`` (n, d).
    leaked: their gradients.

  Returns:
    (n, d) embeddings: z without the positions.

  Raises:
    ValueError: if a name is missing, shapes do not fit, n is not below d, or
      (where values are known) the system has no solution: "april_attack
      requires a block without residual connection", or more than one: the
      gradient in positions has to have rank n, which pooling of the first
      token alone does not give.

  Cost:
    O(d^2 (h + n)).

  Source:
    APRIL, arXiv 2112.14087.

  Example:
    >>> import jax
    >>> from jaxattn.models import LeakageBlock
    >>> from jaxattn.regression import april_attack
    >>> block = LeakageBlock(residual=False)
    >>> x = jax.random.normal(jax.random.key(0), (4, 16))
    >>> params = block.init(jax.random.key(1), x)["params"]
    >>> found = april_attack(params, jax.grad(block.loss)(params, x, 2))
    >>> bool(abs(found - x).max() < 1e-2)
    True
  """
  require_keys("params", params, (*ATTENTION_KEYS, "pos"))
  require_keys("leaked", leaked, (*ATTENTION_KEYS, "pos"))
  pos = jnp.asarray(params["pos"])
  _checks.check_rank("pos", pos, 2)
  n, d = pos.shape
  if n >= d:
    raise ValueError(f"april_attack needs n <= d-1, got n={n}, d={d}")
  back = jnp.asarray(leaked["pos"])
  _checks.check_shape("leaked['pos']", back, pos.shape, "(n, d)")
  right = stack_columns(params, ATTENTION_KEYS)
  right = right @ stack_columns(leaked, ATTENTION_KEYS).T
  z = jnp.linalg.lstsq(back.T, right)[0]
  misfit = jnp.linalg.norm(back.T @ z - right) / jnp.linalg.norm(right)
  room = jnp.finfo(z.dtype).eps ** 0.5
  if _checks.is_concrete(misfit) and not misfit <= room:
    raise ValueError(
      "april_attack requires a block without residual connection: the "
      f"gradients fit none (relative misfit {misfit:.1e})"
    )
  rank = numerical_rank(jnp.linalg.svd(back, compute_uv=False))
  if _checks.is_concrete(rank) and rank < n:
    raise ValueError(
      f"april_attack needs a gradient in pos of rank n={n}, got rank {rank}"
    )
  return z - pos


def require_keys(
  name: str, tree: Mapping[str, jax.Array], keys: Sequence[str]
) -> None:
  """Raises unless a dict of arrays has all of the keys."""
  missing = [k for k in keys if k not in tree]
  if missing:
    raise ValueError(
      f"{name} must have {', '.join(map(repr, keys))}, got "
      f"{sorted(tree)} without {', '.join(map(repr, missing))}"
    )


def stack_columns(
  tree: Mapping[str, jax.Array], keys: Sequence[str]
) -> jax.Array:
  """The (d, ...) arrays of these names beside each other, (d, h_1 + ...)."""
  require_keys("leaked", tree, keys)
  arrays = [jnp.asarray(tree[k]) for k in keys]
  return jnp.concatenate([x.reshape(len(x), -1) for x in arrays], 1)


def numerical_rank(values: jax.Array, tol: float | None = None) -> jax.Array:
  """How many descending singular values are not 0 up to ``tol``, relatively."""
  return (values > rank_tol(values.dtype, tol) * values[0]).sum()


def rank_tol(dtype: jax.typing.DTypeLike, tol: float | None = None) -> float:
  """The default tolerance of ranks, looser in single precision."""
  if tol is not None:
    return tol
  return 1e-10 if jnp.finfo(dtype).eps < 1e-12 else 1e-5


def _span(
  gradient: jax.Array, n: int, tol: float | None
) -> tuple[jax.Array, jax.Array]:
  """An orthonormal basis (d, n), padded by 0, and the rank."""
  if tol is not None:
    _checks.check_range("tol", tol, 0.0, 1.0, closed=False)
  u, s, _ = jnp.linalg.svd(gradient, full_matrices=False)
  rank = numerical_rank(s, tol)
  # No more than n: what is beyond is noise.
  inside = jnp.arange(len(s)) < rank
  return (u * inside[None].astype(u.dtype))[:, :n], rank


def _distances(embed: jax.Array, pos: jax.Array, basis: jax.Array) -> jax.Array:
  """(n, V), without the sums of tokens and positions: products only."""
  total = (pos**2).sum(1)[:, None] + (embed**2).sum(1)[None]
  total = total + 2 * pos @ embed.T
  # (n, V, r) would be large: the square of a sum once more.
  low, high = pos @ basis, embed @ basis
  inside = (low**2).sum(1)[:, None] + (high**2).sum(1)[None]
  inside = inside + 2 * low @ high.T
  tiny = jnp.finfo(total.dtype).tiny
  return jnp.sqrt(jnp.maximum(total - inside, 0) / jnp.maximum(total, tiny))


def _distance(tokens: jax.Array, basis: jax.Array) -> jax.Array:
  rest = tokens - (tokens @ basis) @ basis.T
  size = jnp.linalg.norm(tokens, axis=1)
  return jnp.linalg.norm(rest, axis=1) / jnp.maximum(
    size, jnp.finfo(size.dtype).tiny
  )
