r"""Private gradients, and what the noise in them costs.

.. math::

  \bar g = \frac{1}{B} \Big( \sum_{i=1}^{B} g_i \min\big(1, C / \|g_i\|\big)
    + N(0, \sigma^2 C^2 I) \Big)

with a B that is no secret. One example more or less moves the sum by at most C:
:math:`\sigma` is then ``gaussian_sigma(epsilon, delta)``. An example *replaced*
by another moves it by up to 2 C, which takes twice the noise,
``gaussian_sigma(epsilon, delta, 2.0)``. Each example is clipped by itself:
clipping the mean would leave one example free to move it.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxattn import _checks
from jaxattn.numerics import _dtypes

# Norms of up to 3e7 entries were found right to two units of rounding.
_ROUNDING = 8


class DPGradientState(NamedTuple):
  """State of :func:`dp_gradient`.

  Attributes:
    rng: PRNG key.
    count: (), steps that were taken; step t draws from ``fold_in(rng, t)``.
  """

  rng: jax.Array
  count: jax.Array


def dp_gradient(
  rng: jax.Array,
  *,
  clip: float | jax.Array,
  noise_multiplier: float | jax.Array,
) -> optax.GradientTransformation:
  """Clips the gradient of each example, adds noise, and takes the mean.

  Put it first in an ``optax.chain``. Its updates are gradients by example, with
  a leading axis of the batch, as ``jax.vmap(jax.grad(loss), (None, 0))`` gives.
  An example whose gradient is not finite, or of a norm that overflows, counts
  as 0: a NaN in the release would give that example away. Where batches are
  sampled, B must not tell their size: pad them with gradients of 0.

  Args:
    rng: PRNG key of all noise; never use one twice.
    clip: C, the largest norm of an example's gradient over all leaves.
    noise_multiplier: sigma, at least 0: noise is sigma C on the sum. For
      neighbours of one example more or less ``gaussian_sigma(epsilon, delta)``,
      where one is replaced ``gaussian_sigma(epsilon, delta, 2.0)``.

  Returns:
    An ``optax.GradientTransformation`` from (B, ...) leaves to (...) leaves.
    16-bit ones are clipped, summed and perturbed in float32 and then rounded.

  Raises:
    ValueError: if ``clip`` is not positive or ``noise_multiplier`` negative;
      when called, if leaves have no common leading axis.

  Cost:
    O(B P) for P parameters, and B gradients in memory.

  Source:
    DP-SGD, arXiv 1607.00133, algorithm 1.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.privacy import dp_gradient
    >>> private = dp_gradient(jax.random.key(0), clip=1.0, noise_multiplier=0.0)
    >>> state = private.init(jnp.zeros(2))
    >>> grads = jnp.array([[4.0, 0.0], [0.0, 0.5]])
    >>> print(private.update(grads, state)[0].round(3))
    [0.5  0.25]
  """
  _checks.check_positive("clip", clip)
  _checks.check_nonnegative("noise_multiplier", noise_multiplier)

  def init(params: optax.Params) -> DPGradientState:
    del params
    return DPGradientState(rng, jnp.zeros((), jnp.int32))

  def update(
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None = None,
  ) -> tuple[optax.Updates, DPGradientState]:
    del params
    assert isinstance(state, DPGradientState)
    leaves, tree = jax.tree.flatten(updates)
    size = _batch_size(leaves)
    factor = _clip_factors(leaves, size, clip)
    rngs = jax.random.split(
      jax.random.fold_in(state.rng, state.count), len(leaves)
    )
    std = jnp.asarray(noise_multiplier * clip, factor.dtype)
    means = []
    for g, key in zip(leaves, rngs, strict=True):
      # A factor of 0 would not silence a NaN. Products at less than the full
      # precision, as accelerators take them, would exceed the clip.
      rows = jnp.where(_column(factor, g) > 0, g.astype(factor.dtype), 0)
      total = jnp.tensordot(factor, rows, 1, precision="highest")
      noise = jax.random.normal(key, total.shape, factor.dtype)
      means.append(((total + std * noise) / size).astype(g.dtype))
    return tree.unflatten(means), DPGradientState(state.rng, state.count + 1)

  return optax.GradientTransformation(init, update)


def perturbed_sgd_bound(
  *,
  f_gap: float,
  smoothness: float,
  dim: int,
  noise_std: float,
  num_steps: int,
  step_size: float | None = None,
) -> tuple[float, float]:
  r"""How small gradient descent with noisy gradients makes the gradient.

  For an L-smooth f, noise :math:`N(0, s^2 I_p)` on each gradient and a step
  :math:`\eta \le 1 / L`,

  .. math::

    \frac1T \sum_{t < T} E \|\nabla f(x_t)\|^2 \le
      \frac{2 (f(x_0) - f^*)}{\eta T} + \eta L p s^2,

  which the best step makes :math:`2 \sqrt{2 (f(x_0) - f^*) L p s^2 / T}`: of
  order :math:`T^{-1/2}`, as for any stochastic gradient.

  Args:
    f_gap: f(x_0) - f*, positive.
    smoothness: L, positive.
    dim: p, number of parameters.
    noise_std: s, at least 0.
    num_steps: T.
    step_size: eta, at most 1 / L; None = the one of least bound.

  Returns:
    The bound, and the step size that it is for.

  Raises:
    ValueError: if an argument is out of range.

  Cost:
    O(1).

  Source:
    derived here, from the descent lemma; arXiv 2311.13624 claims the rate.

  Example:
    >>> from jaxattn.privacy import perturbed_sgd_bound
    >>> bound, step_size = perturbed_sgd_bound(
    ...   f_gap=1.0, smoothness=1.0, dim=10, noise_std=0.1, num_steps=2000
    ... )
    >>> round(bound, 4), round(step_size, 4)
    (0.02, 0.1)
  """
  _checks.check_positive("f_gap", f_gap)
  _checks.check_positive("smoothness", smoothness)
  _checks.check_integer("dim", dim, 1, None)
  _checks.check_nonnegative("noise_std", noise_std)
  _checks.check_integer("num_steps", num_steps, 1, None)
  largest, power = 1 / smoothness, smoothness * dim * noise_std**2
  if step_size is None:
    best = math.sqrt(2 * f_gap / (num_steps * power)) if power else math.inf
    step_size = min(best, largest)
  _checks.check_positive("step_size", step_size)
  if step_size > largest * (1 + 1e-12):
    raise ValueError(
      f"step_size must be at most 1 / smoothness = {largest:.4g}, got "
      f"{step_size}"
    )
  return 2 * f_gap / (step_size * num_steps) + step_size * power, step_size


def _clip_factors(
  leaves: list[jax.Array], size: int, clip: float | jax.Array
) -> jax.Array:
  """(B,), by which examples are multiplied; 0 where one is not finite."""
  wide = jnp.result_type(*(_dtypes.accumulator(g.dtype) for g in leaves))
  squares = sum((g.astype(wide).reshape(size, -1) ** 2).sum(1) for g in leaves)
  norm = jnp.sqrt(jnp.asarray(squares))
  # A little less than the clip: the norm is known to rounding only.
  limit = jnp.asarray(clip, wide) * (1 - _ROUNDING * jnp.finfo(wide).eps)
  # An example without a gradient keeps none.
  factor = limit / jnp.maximum(norm, limit)
  return jnp.where(jnp.isfinite(norm), factor, 0)


def _column(factor: jax.Array, like: jax.Array) -> jax.Array:
  return factor.reshape(-1, *(1,) * (like.ndim - 1))


def _batch_size(leaves: list[jax.Array]) -> int:
  sizes = {jnp.shape(g)[:1] for g in leaves}
  if len(sizes) != 1 or () in sizes or (0,) in sizes:
    raise ValueError(
      "updates must be gradients by example, with one leading axis for all "
      f"leaves, got shapes {[jnp.shape(g) for g in leaves]}"
    )
  return sizes.pop()[0]
