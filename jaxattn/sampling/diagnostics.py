r"""What several chains say of how well they sampled.

Both numbers are computed from ranks, so that they hold for laws without
moments, and from halves of chains, so that a drift shows.
"""

import math

import jax
import jax.numpy as jnp
from jax.scipy import special, stats

from jaxattn import _checks

__all__ = ["effective_sample_size", "potential_scale_reduction"]


def effective_sample_size(
  x: jax.Array, chain_axis: int = 0, sample_axis: int = 1
) -> jax.Array:
  r"""Independent draws that say as much about the bulk as these chains.

  Chains are cut into halves, draws replaced by the normal quantiles of their
  ranks; with :math:`\rho_t` the autocorrelation of all halves together

  .. math::

    \mathrm{ESS} = \frac{C n}{-1 + 2 \sum_{k < K} P_k + \max(\rho_{2K}, 0)},
    \qquad P_k = \min_{j \le k} (\rho_{2j} + \rho_{2j+1}),

  with K the first pair that is not positive (Geyer's initial monotone
  sequence).

  Args:
    x: draws of C chains, n each, real; other axes are parameters.
    chain_axis: the axis of the chains.
    sample_axis: the axis of the draws, at least 4.

  Returns:
    One number a parameter, at most :math:`C n \log_{10}(C n)`. A parameter that
    never moves in any chain has as many as there are draws: they say all that
    there is to say.

  Raises:
    ValueError: if the axes are not two of ``x``, ``x`` is not floating, or
      there are fewer than 4 draws.

  Cost:
    O(C n log(C n)) a parameter.

  Source:
    Vehtari, Gelman, Simpson, Carpenter, Buerkner, arXiv:1903.08008, section 3
    and 4.

  Example:
    >>> import jax
    >>> from jaxattn.sampling import effective_sample_size
    >>> x = jax.random.normal(jax.random.key(0), (8, 1000, 2))
    >>> ess = effective_sample_size(x)
    >>> ess.shape, bool((abs(ess / 8000 - 1) < 0.1).all())
    ((2,), True)
  """
  return _effective(_halves(x, chain_axis, sample_axis))


def potential_scale_reduction(
  x: jax.Array, chain_axis: int = 0, sample_axis: int = 1
) -> jax.Array:
  r"""R-hat: by how much chains differ more than one chain varies.

  .. math::

    \hat R = \sqrt{\frac{\tfrac{n-1}{n} W + B / n}{W}},

  W the mean variance within halves of chains and B / n the variance of their
  means, of normal quantiles of ranks; the larger of that and of the same for
  distances to the median. Chains that agree are below 1.01.

  Args:
    x: draws of C chains, n each, real; other axes are parameters.
    chain_axis: the axis of the chains.
    sample_axis: the axis of the draws, at least 4.

  Returns:
    One number a parameter; 1 where nothing ever moves, infinite where no chain
    moves but they are at different places.

  Raises:
    ValueError: as :func:`effective_sample_size`.

  Cost:
    O(C n log(C n)) a parameter.

  Source:
    arXiv:1903.08008, equations 1 to 4 and section 4.

  Example:
    >>> import jax
    >>> from jaxattn.sampling import potential_scale_reduction
    >>> x = jax.random.normal(jax.random.key(0), (2, 1000))
    >>> bool(potential_scale_reduction(x) < 1.01)
    True
    >>> bool(potential_scale_reduction(x.at[0].add(3.0)) > 1.5)
    True
  """
  return _rank_reduction(_halves(x, chain_axis, sample_axis))


@jax.jit
def _effective(halves: jax.Array) -> jax.Array:
  z = _quantiles(halves)
  num_chains, num = z.shape[:2]
  # With as many zeros as draws the transform does not wrap around.
  spectrum = jnp.fft.rfft(z - z.mean(1, keepdims=True), 2 * num, axis=1)
  covariance = jnp.fft.irfft(jnp.abs(spectrum) ** 2, 2 * num, axis=1)
  covariance = covariance[:, :num].mean(0) / num
  within, total = _variances(z)
  still = total == 0
  gap = within[None] - covariance
  correlation = 1 - gap / jnp.where(still, 1, total)[None]
  correlation = correlation.at[0].set(1)
  even = num // 2 * 2
  both = correlation[:even].reshape(-1, 2, *correlation.shape[1:])
  pairs = both.sum(1)
  positive = jnp.cumprod(pairs > 0, axis=0)
  before = jnp.roll(positive, 1, axis=0).at[0].set(1)
  # Half of the pair that ends the sum, lest chains that swing look too good.
  last = (before - positive) * jnp.maximum(both[:, 0], 0)
  pairs = jax.lax.cummin(pairs, axis=0) * positive
  total_length = (2 * pairs + last).sum(0) - 1
  size = num_chains * num
  length = jnp.maximum(total_length, 1 / math.log10(size))
  return jnp.where(still, size, size / length)


@jax.jit
def _rank_reduction(halves: jax.Array) -> jax.Array:
  middle = jnp.median(halves, axis=(0, 1), keepdims=True)
  folded = jnp.abs(halves - middle)
  return jnp.maximum(_reduction(halves), _reduction(folded))


def _reduction(halves: jax.Array) -> jax.Array:
  within, total = _variances(_quantiles(halves))
  stuck = jnp.where(total == 0, 1, jnp.inf)
  ratio = total / jnp.where(within == 0, 1, within)
  return jnp.where(within == 0, stuck, jnp.sqrt(ratio))


def _variances(z: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Within chains, and of all of them together."""
  num = z.shape[1]
  # Equal numbers have a variance of rounding, which must not be divided by.
  moves, differ = (z != z[:, :1]).any((0, 1)), (z != z[:1, :1]).any((0, 1))
  within = jnp.where(moves, z.var(1, ddof=1).mean(0), 0)
  total = within * (num - 1) / num + z.mean(1).var(0, ddof=1)
  return within, jnp.where(differ, total, 0)


def _halves(x: jax.Array, chain_axis: int, sample_axis: int) -> jax.Array:
  """(2 C, n // 2, ...): without the draw in the middle if n is odd."""
  x = jnp.asarray(x)
  _checks.check_floating("x", x)
  for name, axis in (("chain_axis", chain_axis), ("sample_axis", sample_axis)):
    _checks.check_integer(name, axis, -x.ndim, x.ndim - 1)
  if chain_axis % x.ndim == sample_axis % x.ndim:
    raise ValueError(
      f"chain_axis and sample_axis must differ, got {chain_axis} and "
      f"{sample_axis} for x of shape {x.shape}"
    )
  x = jnp.moveaxis(x, (chain_axis, sample_axis), (0, 1))
  num = x.shape[1]
  if num < 4:
    raise ValueError(f"x must hold at least 4 draws a chain, got {num}")
  return jnp.concatenate([x[:, : num // 2], x[:, -(num // 2) :]])


def _quantiles(x: jax.Array) -> jax.Array:
  """Normal quantiles of the ranks among all draws of a parameter."""
  size = x.shape[0] * x.shape[1]
  ranks = stats.rankdata(x.reshape(size, -1), method="average", axis=0)
  z = special.ndtri((ranks - 0.375) / (size + 0.25)).astype(x.dtype)
  return z.reshape(x.shape)
