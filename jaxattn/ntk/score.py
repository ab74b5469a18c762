r"""Denoisers learned by a two-layer softmax network, or by its kernel.

Data :math:`x_0` are blurred to :math:`x_t`, and the denoiser
:math:`f(x, t) = E[x_0 | x_t = x]` is regressed on pairs; the score follows from
it (:func:`jaxattn.sampling.score_from_denoiser`). Inputs are bounded, as the
kernel asks:

.. math:: z = 1.5\, \frac{u}{\sqrt{1 + \|u\|^2}}, \qquad u = (x, t / T, 1)

Labels are noisy: what fits them all is wrong, and training stops at the time
that is best on other pairs. Source: arXiv 2405.03251, its part on diffusion;
the features and the choice of the time are this project's.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxattn import _checks
from jaxattn.ntk import flow
from jaxattn.ntk.softmax import (
  TwoLayer,
  TwoLayerHistory,
  apply,
  init,
  limit_kernel,
  train_two_layer,
)
from jaxattn.numerics.linalg import power_iteration

__all__ = [
  "ScoreKernel",
  "ScoreNetwork",
  "fit_score_kernel",
  "fit_score_network",
  "score_features",
]

_METHODS = ("factor", "recursion")
# Times from 1 to 10^6, in units of one over the largest eigenvalue.
_NUM_TIMES, _DECADES = 26, 6
# Of the recursion, at half of the stable rate.
_NUM_STEPS = 4096
_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)

Pairs = tuple[jax.Array, jax.Array, jax.Array]


class ScoreKernel(NamedTuple):
  """A denoiser by kernel regression, stopped early.

  Attributes:
    coefficients: (n, d).
    centers: (n, d + 2) features of the pairs.
    sigma: () of the kernel.
    t_max: () T of the features.
    times: (S,) stopping times that were tried, of gradient flow on half the
      sum of squares.
    val_errors: (S,) means of squared errors over other pairs and coordinates.
    time_index: () the best; if it is the last, training was too short.
  """

  coefficients: jax.Array
  centers: jax.Array
  sigma: jax.Array
  t_max: jax.Array
  times: jax.Array
  val_errors: jax.Array
  time_index: jax.Array

  def denoise(self, x: jax.Array, t: jax.Array) -> jax.Array:
    """E[x_0 | x_t = x] of (n, d) points at times (n,), or one."""
    features = score_features(x, t, t_max=self.t_max)
    kernel = limit_kernel(features, self.centers, sigma=self.sigma)
    return _matmul(kernel, self.coefficients)


class ScoreNetwork(NamedTuple):
  """A denoiser by a network of finite width.

  Attributes:
    params: the network.
    start: the network before training, of which outputs are subtracted.
    t_max: () T of the features.
    history: its losses.
  """

  params: TwoLayer
  start: TwoLayer
  t_max: jax.Array
  history: TwoLayerHistory

  def denoise(self, x: jax.Array, t: jax.Array) -> jax.Array:
    """E[x_0 | x_t = x] of (n, d) points at times (n,), or one."""
    features = score_features(x, t, t_max=self.t_max)
    return apply(self.params, features) - apply(self.start, features)


def score_features(
  x: jax.Array, t: jax.Array, *, t_max: float | jax.Array
) -> jax.Array:
  """The bounded features of points and times.

  Args:
    x: (n, d), floating.
    t: (n,) times, or one.
    t_max: T, positive.

  Returns:
    (n, d + 2), of norm below 1.5.

  Raises:
    ValueError: if shapes do not fit or ``t_max`` is not positive.

  Cost:
    O(n d).

  Source:
    this project.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.ntk import score_features
    >>> features = score_features(jnp.zeros((1, 1)), 0.0, t_max=3.0)
    >>> print(features.shape, f"{jnp.linalg.norm(features):.3f}")
    (1, 3) 1.061
  """
  x = jnp.asarray(x)
  _checks.check_rank("x", x, 2)
  _checks.check_floating("x", x)
  _checks.check_scalar("t_max", t_max)
  _checks.check_positive("t_max", t_max)
  t = jnp.asarray(t, x.dtype)
  if t.ndim:
    _checks.check_shape("t", t, x.shape[:1], "(n,)")
  share = jnp.broadcast_to(t / jnp.asarray(t_max, x.dtype), x.shape[:1])
  u = jnp.concatenate((x, share[:, None], jnp.ones_like(x[:, :1])), 1)
  return 1.5 * u / jnp.sqrt(1 + jnp.square(u).sum(1, keepdims=True))


def fit_score_kernel(
  x_t: jax.Array,
  t: jax.Array,
  x0: jax.Array,
  *,
  val: Pairs,
  sigma: float = 1.0,
  t_max: float = 3.0,
  times: jax.Array | None = None,
  method: str = "factor",
  num_steps: int | None = None,
) -> ScoreKernel:
  """Fits a denoiser by the kernel of an infinitely wide softmax network.

  Args:
    x_t: (n, d), blurred data.
    t: (n,), their times, in (0, T].
    x0: (n, d), the data.
    val: (x_t, t, x0) of other pairs, which choose the stopping time.
    sigma: of the kernel.
    t_max: T of the features.
    times: (S,) stopping times to try; None = 26 from 1 to 10^6 over the largest
      eigenvalue. With ``"recursion"`` it must be None.
    method: ``"factor"``: eigenvalues, then all times at once. ``"recursion"``:
      descent at half of the stable rate, in memory of the kernel alone: for
      more than some 3000 pairs.
    num_steps: of ``"recursion"`` only: it stops after 1, 2, 4, ... steps, up to
      the last power of two that is not above; None = 4096. If ``time_index`` is
      the last of them, there were too few.

  Returns:
    A :class:`ScoreKernel`.

  Raises:
    ValueError: if shapes or dtypes do not fit, a number is not positive, a
      time is above ``t_max``, ``times`` comes with ``"recursion"``, or
      ``num_steps`` without it.

  Cost:
    O(n^3) (``"factor"``) or num_steps products of O(n^2 d); O(n^2) memory.

  Source:
    arXiv 2405.03251, its part on diffusion.

  Example:
    >>> import jax
    >>> from jaxattn.ntk import fit_score_kernel
    >>> x0, z = jax.random.normal(jax.random.key(0), (2, 200, 1))
    >>> x_t, t = (x0 + z) / 2**0.5, 0.693 * jax.numpy.ones(200)
    >>> fitted = fit_score_kernel(
    ...   x_t[:100], t[:100], x0[:100], val=(x_t[100:], t[100:], x0[100:])
    ... )
    >>> fitted.denoise(x_t, t).shape
    (200, 1)
  """
  x_t, t, x0 = _check_pairs(x_t, t, x0, t_max)
  v_t, v_time, v0 = _check_pairs(*val, t_max, prefix="val: ")
  _checks.check_shape("val: x_t", v_t, (None, x_t.shape[1]), "(n, d)")
  _checks.check_choice("method", method, _METHODS)
  if method == "recursion" and times is not None:
    raise ValueError("times must be None with method='recursion'")
  if method == "factor" and num_steps is not None:
    raise ValueError("num_steps must be None with method='factor'")
  num_steps = _NUM_STEPS if num_steps is None else num_steps
  _checks.check_integer("num_steps", num_steps, 1, None)
  _checks.check_scalar("sigma", sigma)
  _checks.check_positive("sigma", sigma)
  centers = score_features(x_t, t, t_max=t_max)
  kernel = limit_kernel(centers, sigma=sigma)
  others = limit_kernel(
    score_features(v_t, v_time, t_max=t_max), centers, sigma=sigma
  )
  if method == "recursion":
    times, alphas = _by_recursion(kernel, x0, num_steps)
  else:
    times, alphas = _by_factor(kernel, x0, times)
  errors = jnp.square(_matmul(others, alphas) - v0[None]).mean((1, 2))
  best = jnp.argmin(errors)
  return ScoreKernel(
    coefficients=alphas[best],
    centers=centers,
    sigma=jnp.asarray(sigma, x_t.dtype),
    t_max=jnp.asarray(t_max, x_t.dtype),
    times=times,
    val_errors=errors,
    time_index=best,
  )


def fit_score_network(
  rng: jax.Array,
  x_t: jax.Array,
  t: jax.Array,
  x0: jax.Array,
  *,
  width: int,
  num_steps: int,
  learning_rate: float | jax.Array | None = None,
  optimizer: optax.GradientTransformation | None = None,
  sigma: float = 1.0,
  t_max: float = 3.0,
) -> ScoreNetwork:
  """Fits a denoiser by training the hidden weights of a softmax network.

  Descent at a rate for ``num_steps`` stops at the time rate times steps of
  :func:`fit_score_kernel`.

  Args:
    rng: key.
    x_t: (n, d), blurred data.
    t: (n,), their times, in (0, T].
    x0: (n, d), the data.
    width: neurons, an even number.
    num_steps: steps.
    learning_rate: as in :func:`jaxattn.ntk.train_two_layer`.
    optimizer: instead of it.
    sigma: standard deviation of the first weights.
    t_max: T of the features.

  Returns:
    A :class:`ScoreNetwork`.

  Raises:
    ValueError: if shapes or dtypes do not fit, a number is not positive, a
      time is above ``t_max``, the width is odd, or not one of ``learning_rate``
      and ``optimizer`` is given.

  Cost:
    O(n width d) a step.

  Source:
    arXiv 2405.03251, its part on diffusion.

  Example:
    >>> import jax
    >>> from jaxattn.ntk import fit_score_network
    >>> x0, z = jax.random.normal(jax.random.key(0), (2, 50, 1))
    >>> x_t, t = (x0 + z) / 2**0.5, 0.693 * jax.numpy.ones(50)
    >>> fitted = fit_score_network(
    ...   jax.random.key(1), x_t, t, x0, width=64, num_steps=9,
    ...   learning_rate=1e-3,
    ... )
    >>> bool(fitted.history.losses[-1] < fitted.history.losses[0])
    True
  """
  x_t, t, x0 = _check_pairs(x_t, t, x0, t_max)
  features = score_features(x_t, t, t_max=t_max)
  start = init(
    rng, width, features.shape[1], x0.shape[1], sigma=sigma, dtype=x_t.dtype
  )
  params, history = train_two_layer(
    start,
    features,
    x0 + apply(start, features),
    learning_rate=learning_rate,
    num_steps=num_steps,
    optimizer=optimizer,
  )
  longest = jnp.asarray(t_max, x_t.dtype)
  return ScoreNetwork(params, start, longest, history)


def _check_pairs(
  x_t: jax.Array,
  t: jax.Array,
  x0: jax.Array,
  t_max: float,
  *,
  prefix: str = "",
) -> Pairs:
  x_t, t, x0 = map(jnp.asarray, (x_t, t, x0))
  _checks.check_rank(f"{prefix}x_t", x_t, 2)
  _checks.check_shape(f"{prefix}t", t, x_t.shape[:1], "(n,)")
  _checks.check_shape(f"{prefix}x0", x0, x_t.shape, "that of x_t")
  _checks.check_one_dtype(**{f"{prefix}x_t": x_t, f"{prefix}x0": x0})
  if not len(x_t):
    raise ValueError(f"{prefix}x_t must not be empty, got shape {x_t.shape}")
  _checks.check_scalar("t_max", t_max)
  _checks.check_positive("t_max", t_max)
  _checks.check_positive(f"{prefix}t", t)
  if _checks.is_concrete(t_max):
    _checks.check_range(f"{prefix}t", t, 0, float(t_max))
  return x_t, t, x0


def _by_factor(
  kernel: jax.Array, x0: jax.Array, times: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """Stopping times and the (S, n, d) coefficients at each."""
  factor = flow.kernel_factor(kernel)
  if times is None:
    powers = jnp.logspace(0, _DECADES, _NUM_TIMES, dtype=x0.dtype)
    times = powers / factor.eigenvalues[-1]
  # Of the outputs at other data the identity in place of their kernel.
  identity = jnp.eye(len(kernel), dtype=kernel.dtype)
  times = jnp.asarray(times)
  _checks.check_rank("times", times, 1)
  return times, flow.flow_test(factor, identity, x0, times)


def _by_recursion(
  kernel: jax.Array, x0: jax.Array, num_steps: int
) -> tuple[jax.Array, jax.Array]:
  largest, _ = power_iteration(
    functools.partial(_matmul, kernel), jnp.ones_like(kernel[0])
  )
  rate = 1 / largest
  steps = 2 ** jnp.arange(num_steps.bit_length())
  _, alphas = flow.descent_recursion(kernel, x0, rate, steps)
  return rate * steps, alphas
