r"""How sparse softmax rows are: measured statistics and Gaussian predictions.

If inputs are Gaussian, :math:`x_j \sim N(0, I)`, then given a query the logits
of the *other* tokens are exactly independent :math:`N(0, \sigma^2)` with
:math:`\sigma = \text{scale}\, \|W_K W_Q^\top x_i\|`. (The logit of a token with
itself is not; it is often the largest.) With :math:`n` such logits and
:math:`\Phi` the normal distribution function, up to terms that vanish with n:

.. math::

  \#\{j : p_{ij} > t/n\} &\approx n\, \Phi(-(\log t + \sigma^2/2) / \sigma) \\
  \text{mass of the } k \text{ largest}
    &\approx \Phi(\sigma + \Phi^{-1}(k/n)) \\
  \text{smallest } k \text{ with tail mass } \le \varepsilon
    &\approx n\, \Phi(-\sigma - \Phi^{-1}(\varepsilon)).

At a **fixed** spread :math:`\sigma` a row therefore needs a constant *fraction*
of its keys. A power :math:`n^C` is enough only if the spread grows with the
context, :math:`\sigma = s \sqrt{\log n}`; then :math:`C = \max(0, 1 - s^2/2)`.
The limits are reached like :math:`1 / \log n`, and the formulas hold while
:math:`\sigma^2 < 2 \log n`: beyond, O(1) entries hold the mass and the sums are
ruled by extremes.

Source: arXiv 2404.02690 for the notion and the claim; the formulas are the
exact conditional law of the logits, put into the law of large numbers.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import log_ndtr, ndtri
from jax.typing import ArrayLike

from jaxattn import _checks, _compat
from jaxattn.attention import _profile, _rows
from jaxattn.numerics._dtypes import accumulator
from jaxattn.scaling import fit_slope

_CHUNK_SIZE = 2048


class SparsityProfile(NamedTuple):
  """Statistics of the rows of logits of one attention call.

  Only keys that a query sees count; n is their number. Floats have the
  accumulation dtype. For a query that sees no key, ``lse`` and ``max`` are -inf
  and everything else is 0.

  Source: arXiv 2404.02690 for ``count_above``: a row is (eps, n - N)-sparse
  with N = #{p > eps}.

  Attributes:
    mean: (B, N, T) mean of the logits.
    std: (B, N, T) standard deviation (divided by n).
    skew: (B, N, T) skewness; 0 for a Gaussian, and for equal logits.
    kurtosis: (B, N, T) excess kurtosis; 0 for a Gaussian, and for equal logits.
    lse: (B, N, T) log-sum-exp.
    max: (B, N, T) largest logit.
    count_above: (B, N, T, len(t)) int32 number of weights above t / n.
    topk_mass: (B, N, T, len(k)) sum of the k largest weights.
  """

  mean: jax.Array
  std: jax.Array
  skew: jax.Array
  kurtosis: jax.Array
  lse: jax.Array
  max: jax.Array
  count_above: jax.Array
  topk_mass: jax.Array


def sparsity_profile(
  query: jax.Array,
  key: jax.Array,
  *,
  t: Sequence[float] = (1.0, 4.0, 16.0),
  k: Sequence[int] = (1, 16, 64, 256),
  scale: float | jax.Array | None = None,
  is_causal: bool = False,
  mask: jax.Array | None = None,
  chunk_size: int | None = None,
) -> SparsityProfile:
  """Measures how sparse attention is, row by row, without a (T, S) array.

  Everything is exact, at any S: two passes over the keys, of which the first
  keeps a running list of the max(k) largest logits. Not differentiable.

  Args:
    query: (B, T, N, H), or (T, N, H) without a batch; floating.
    key: (B, S, K, H). K divides N.
    t: positive levels; weights above t / n are counted.
    k: numbers of largest weights to sum, in [1, S].
    scale: factor on the logits; None = 1 / sqrt(H). May be traced.
    is_causal: query t sees keys 0 to t.
    mask: boolean, broadcastable to (B, N, T, S); True = attend.
    chunk_size: keys visited at a time; None = 2048. Memory and speed only.

  Returns:
    A :class:`SparsityProfile`, without the B axis for unbatched inputs.

  Raises:
    ValueError: if shapes, dtypes or options do not fit; if t <= 0, or if a k
      is outside [1, S].

  Cost:
    2 T S H multiply-adds and O(T S log max(k)) time for the list, a head;
    O(T max(k)) memory beside a tile of logits.

  Source:
    arXiv 2404.02690; moments are merged as in Pébay, SAND2008-6212.

  Example:
    >>> import jax
    >>> q, key = jax.random.normal(jax.random.key(0), (2, 1, 128, 4, 16))
    >>> profile = sparsity_profile(q, key, k=(1, 16))
    >>> profile.std.shape, profile.topk_mass.shape
    ((1, 4, 128), (1, 4, 128, 2))
  """
  query, key = jnp.asarray(query), jnp.asarray(key)
  mask = None if mask is None else jnp.asarray(mask)
  sizes = _checks.check_attention(query, key, key, mask=mask)
  for name, levels in (("t", t), ("k", k)):
    if not isinstance(levels, Sequence) or not levels:
      raise ValueError(f"{name} must be a tuple of numbers, got {levels!r}")
  _checks.check_positive("t", t)
  for number in k:
    _checks.check_integer("k", number, 1, sizes.key_length)
  _rows.check_options(scale, is_causal, chunk_size)
  operands = (query, key, mask)
  operands = tuple(map(_checks.four_dims, operands))
  profile = _sparsity_profile(
    *operands,
    scale,
    jnp.asarray(t, accumulator(query.dtype)),
    k=tuple(k),
    is_causal=is_causal,
    chunk_size=_CHUNK_SIZE if chunk_size is None else chunk_size,
  )
  return profile if sizes.batch else jax.tree.map(lambda x: x[0], profile)


def row_sigma(
  x: jax.Array,
  w_query: jax.Array,
  w_key: jax.Array,
  *,
  scale: float | jax.Array | None = None,
) -> jax.Array:
  r"""Standard deviation of a row's logits over fresh standard normal tokens.

  :math:`\sigma_i = |\text{scale}|\, \|W_K W_Q^\top x_i\|_2`, exact for tokens
  :math:`x_j \sim N(0, I)` that are independent of :math:`x_i`; for tokens on
  the sphere of radius sqrt(d), as layer normalization gives them, up to O(1/d).

  Args:
    x: (..., d) tokens that the queries are made from.
    w_query: (d, H) of one head; query = x w_query.
    w_key: (d, H).
    scale: factor on the logits; None = 1 / sqrt(H).

  Returns:
    (...) standard deviations.

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Cost:
    2 d H multiply-adds a token.

  Source:
    This project; model of arXiv 2404.02690.

  Example:
    >>> import jax.numpy as jnp
    >>> print(row_sigma(jnp.array([3.0, 4.0]), jnp.eye(2), jnp.eye(2), scale=1))
    5.0
  """
  for name, array in (("x", x), ("w_query", w_query), ("w_key", w_key)):
    _checks.check_floating(name, array)
  _checks.check_rank("w_query", w_query, 2)
  dim, head_dim = w_query.shape
  _checks.check_shape("w_key", w_key, (dim, head_dim), "shape of w_query")
  if x.ndim == 0 or x.shape[-1] != dim:
    raise ValueError(f"x must have shape (..., {dim}), got {x.shape}")
  scale = 1 / math.sqrt(head_dim) if scale is None else scale
  dtype = accumulator(x.dtype)
  product = functools.partial(jnp.einsum, preferred_element_type=dtype)
  query = product("...d,dh->...h", x, w_query).astype(x.dtype)
  direction = product("...h,dh->...d", query, w_key)
  sigma = jnp.abs(scale) * jnp.linalg.norm(direction, axis=-1)
  return sigma.astype(x.dtype)


def gaussian_count_above(
  sigma: ArrayLike, n: ArrayLike, t: ArrayLike
) -> jax.Array:
  """Expected number of softmax weights above t / n in a Gaussian row.

  Args:
    sigma: standard deviation of the logits, >= 0.
    n: number of logits.
    t: level in units of the mean weight, > 0.

  Returns:
    The number, of the broadcast shape of the arguments.

  Raises:
    ValueError: if sigma < 0, n <= 0 or t <= 0.

  Cost:
    O(1) time and memory an element.

  Source:
    This project; notion of arXiv 2404.02690. At most
    n exp(-(log t + sigma^2 / 2)^2 / (2 sigma^2)) for log t > -sigma^2 / 2.

  Example:
    >>> print(f"{gaussian_count_above(1.0, 65536, 4.0):.0f}")
    1942
  """
  _check_row(sigma, n)
  _checks.check_positive("t", t)
  sigma, n, t = _floating(sigma, n, t)
  positive = jnp.where(sigma > 0, sigma, 1)
  level = jnp.where(
    sigma > 0,
    (jnp.log(t) + positive**2 / 2) / positive,
    jnp.where(t < 1, -jnp.inf, jnp.inf),
  )
  return n * jnp.exp(log_ndtr(-level))


def gaussian_topk_mass(
  sigma: ArrayLike, n: ArrayLike, k: ArrayLike
) -> jax.Array:
  """Softmax mass of the k largest of n Gaussian logits.

  Args:
    sigma: standard deviation of the logits, >= 0.
    n: number of logits.
    k: how many to keep, in [1, n]; need not be whole.

  Returns:
    The mass in [0, 1], of the broadcast shape of the arguments.

  Raises:
    ValueError: if sigma < 0, n <= 0 or k is outside [1, n].

  Cost:
    O(1) time and memory an element.

  Source:
    This project; notion of arXiv 2404.02690.

  Example:
    >>> print(f"{gaussian_topk_mass(1.0, 65536, 6554):.3f}")
    0.389
  """
  _check_row(sigma, n)
  if _checks.is_concrete(n):
    _checks.check_range("k", k, 1, n)  # pyright: ignore[reportArgumentType]
  sigma, n, k = _floating(sigma, n, k)
  return jnp.exp(log_ndtr(sigma + ndtri(k / n)))


def gaussian_budget(
  sigma: ArrayLike, n: ArrayLike, eps: ArrayLike
) -> jax.Array:
  """Smallest k that leaves a tail mass of at most eps in a Gaussian row.

  Accurate while exp(sigma^2) is well below n. At sigma^2 = log n the largest
  few logits, of which a row has too few, count: with n = 65536 and eps = 1/2 it
  is too small by 40 %.

  Args:
    sigma: standard deviation of the logits, >= 0.
    n: number of logits.
    eps: accepted tail mass, in (0, 1).

  Returns:
    The budget as a real number (round up to use it), of the broadcast shape of
    the arguments.

  Raises:
    ValueError: if sigma < 0, n <= 0 or eps is outside (0, 1).

  Cost:
    O(1) time and memory an element.

  Source:
    This project; notion of arXiv 2404.02690.

  Example:
    >>> print(f"{gaussian_budget(2.0, 65536, 0.1):.0f}")
    15482
  """
  _check_row(sigma, n)
  _checks.check_range("eps", eps, 0, 1, closed=False)
  sigma, n, eps = _floating(sigma, n, eps)
  return n * jnp.exp(log_ndtr(-sigma - ndtri(eps)))


def gaussian_exponent(s: ArrayLike) -> jax.Array:
  """Exponent C of the budget n^C when the spread is s sqrt(log n).

  The limit of large n of the slope of log gaussian_budget(s sqrt(log n), n,
  1/2); at n = 2^20 that slope is still lower by about 0.03 to 0.05.

  Args:
    s: growth of the spread, >= 0. At sqrt(2) and above C is 0: O(1) entries
      hold the mass.

  Returns:
    max(0, 1 - s^2 / 2).

  Raises:
    ValueError: if s < 0.

  Cost:
    O(1) time and memory an element.

  Source:
    This project; claim of arXiv 2404.02690, where C is not tied to the spread.

  Example:
    >>> print(gaussian_exponent(1.0))
    0.5
  """
  _checks.check_nonnegative("s", s)
  (s,) = _floating(s)
  return jnp.maximum(1 - s**2 / 2, 0)


def adaptive_budget(
  n: int, *, alpha: float, exponent: float, bucket: bool = True
) -> int:
  """Top-k budget alpha n^exponent for a context of n keys.

  Args:
    n: number of keys.
    alpha: factor, > 0.
    exponent: C in [0, 1].
    bucket: round up to a power of two (at most n), so that code that is
      compiled for a budget is compiled at most log2(n) times as n grows.

  Returns:
    The budget, an integer in [1, n].

  Raises:
    ValueError: if n is not a positive integer, alpha <= 0 or the exponent is
      outside [0, 1].

  Cost:
    O(1), on the host.

  Source:
    arXiv 2404.02690 (adaptive window alpha n^C).

  Example:
    >>> adaptive_budget(10_000, alpha=2.0, exponent=0.5)
    256
    >>> adaptive_budget(10_000, alpha=2.0, exponent=0.5, bucket=False)
    200
  """
  _checks.check_integer("n", n, 1, None)
  _checks.check_positive("alpha", alpha)
  _checks.check_range("exponent", exponent, 0, 1)
  # The last bits of the power must not add one to a whole number.
  budget = max(1, math.ceil(alpha * n**exponent * (1 - 1e-12)))
  if bucket:
    budget = 1 << (budget - 1).bit_length()
  return min(budget, n)


def fit_budget_law(ns: ArrayLike, ks: ArrayLike) -> tuple[float, float]:
  """Fits k = alpha n^C to budgets measured at several context lengths.

  Args:
    ns: (m,) context lengths, m >= 3.
    ks: (m,) budgets, for instance the smallest k with tail mass below eps.

  Returns:
    (alpha, C), for :func:`adaptive_budget`.

  Raises:
    ValueError: if ns and ks are not vectors of one length >= 3 of positive
      finite numbers.

  Cost:
    O(m), on the host.

  Source:
    This project: least squares by :func:`jaxattn.scaling.fit_slope`.

  Example:
    >>> alpha, exponent = fit_budget_law([256, 1024, 4096], [32, 64, 128])
    >>> print(round(alpha, 6), round(exponent, 6))
    2.0 0.5
  """
  ns, ks = np.asarray(ns), np.asarray(ks)
  _checks.check_rank("ns", ns, 1)
  _checks.check_shape("ks", ks, ns.shape, "shape of ns")
  _checks.check_positive("ns", ns)
  _checks.check_positive("ks", ks)
  fit = fit_slope(ns, ks)
  return math.exp(fit.intercept), fit.slope


def _check_row(sigma: ArrayLike, n: ArrayLike) -> None:
  _checks.check_nonnegative("sigma", sigma)
  _checks.check_positive("n", n)


def _floating(*xs: ArrayLike) -> list[jax.Array]:
  # 16 bits hold neither n nor the tails.
  dtype = accumulator(jnp.result_type(float, *xs))
  return [jnp.asarray(x, dtype) for x in xs]


@functools.partial(jax.jit, static_argnames=("k", "is_causal", "chunk_size"))
def _sparsity_profile(
  query: jax.Array,
  key: jax.Array,
  mask: jax.Array | None,
  scale: Any,
  t: jax.Array,
  *,
  k: tuple[int, ...],
  is_causal: bool,
  chunk_size: int,
) -> SparsityProfile:
  def profile(*operands: Any) -> SparsityProfile:
    query, key, mask, scale, t = lax.stop_gradient(operands)
    call = _rows.rows(query, key, mask, scale=scale, is_causal=is_causal)
    fields = _profile_rows(call, t, k, chunk_size)
    return jax.tree.map(_rows.from_rows, fields)

  profile = _compat.over_explicit_axes(profile, query)
  fields = profile(query, key, mask, scale, t)
  return jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), fields)


def _profile_rows(
  call: _rows.Rows, t: jax.Array, k: tuple[int, ...], chunk_size: int
) -> SparsityProfile:
  moments, lse, largest = _profile.summarize(call, chunk_size, max(k))
  log_n = jnp.log(jnp.maximum(moments.count, 1))
  level = jnp.log(t).reshape(1, 1, 1, 1, -1) + (lse - log_n)[..., None]
  seen = lse[..., None] > -jnp.inf
  weights = jnp.exp(largest - jnp.where(seen, lse[..., None], 0))
  mass = jnp.minimum(jnp.cumsum(weights, -1), 1)
  return SparsityProfile(
    moments.mean,
    *_profile.shape_of(moments),
    lse,
    largest[..., 0],
    _profile.count_above(call, chunk_size, level),
    mass[..., jnp.array(k) - 1],
  )
