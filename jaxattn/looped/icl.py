r"""In-context linear regression: examples of one task, and queries of it.

A task is a vector :math:`\theta \sim N(0, I_d)`. A prompt shows examples
:math:`(x_i, \langle \theta, x_i \rangle + \text{noise})`; what is asked for are
the values :math:`\langle \theta, x \rangle` of further inputs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxattn import _checks

__all__ = ["ICLTask", "sample_icl_task"]


class ICLTask(NamedTuple):
  """One task of in-context regression.

  Attributes:
    x: (num_examples, dim), inputs of the prompt.
    y: (num_examples,), their labels.
    queries: (num_queries, dim), inputs whose values are asked for.
    targets: (num_queries,), these values, without noise.
    w: (dim,), the task itself.
  """

  x: jax.Array
  y: jax.Array
  queries: jax.Array
  targets: jax.Array
  w: jax.Array


def sample_icl_task(
  rng: jax.Array,
  *,
  num_examples: int,
  dim: int,
  num_queries: int = 1,
  covariance: jax.Array | None = None,
  noise: float | jax.Array = 0.0,
) -> ICLTask:
  r"""Draws a linear task with Gaussian inputs.

  .. math:: \theta \sim N(0, I), \quad x \sim N(0, \Sigma), \quad
    y = \langle \theta, x \rangle + \sigma\, \varepsilon

  For many tasks map over ``rng`` with ``jax.vmap``.

  Args:
    rng: PRNG key.
    num_examples: examples in the prompt.
    dim: d, size of an input.
    num_queries: inputs whose values are asked for.
    covariance: Sigma, (d, d), positive definite; None = identity. Of examples
      and queries alike.
    noise: sigma, standard deviation of the noise of the examples' labels.

  Returns:
    An :class:`ICLTask`, float32 or as the covariance is.

  Raises:
    ValueError: if a size is below 1, the shape of ``covariance`` does not fit
      or ``noise`` is negative.

  Cost:
    O((num_examples + num_queries) d^2), and O(d^3) with a covariance.

  Source:
    the setting of arXiv 2208.01066, used by arXiv 2410.08292 and 2410.11268.

  Example:
    >>> import jax
    >>> from jaxattn.looped import sample_icl_task
    >>> task = sample_icl_task(jax.random.key(0), num_examples=8, dim=3)
    >>> task.x.shape, task.y.shape, task.targets.shape
    ((8, 3), (8,), (1,))
    >>> bool(abs(task.queries @ task.w - task.targets).max() < 1e-6)
    True
  """
  _checks.check_integer("num_examples", num_examples, 1, None)
  _checks.check_integer("dim", dim, 1, None)
  _checks.check_integer("num_queries", num_queries, 1, None)
  _checks.check_nonnegative("noise", noise)
  if covariance is not None:
    covariance = jnp.asarray(covariance)
    _checks.check_floating("covariance", covariance)
    _checks.check_shape("covariance", covariance, (dim, dim), "(dim, dim)")
  return _sample(rng, covariance, noise, num_examples, dim, num_queries)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _sample(
  rng: jax.Array,
  covariance: jax.Array | None,
  noise: float | jax.Array,
  num_examples: int,
  dim: int,
  num_queries: int,
) -> ICLTask:
  dtype = jnp.float32 if covariance is None else covariance.dtype
  rng_w, rng_x, rng_noise = jax.random.split(rng, 3)
  w = jax.random.normal(rng_w, (dim,), dtype)
  x = jax.random.normal(rng_x, (num_examples + num_queries, dim), dtype)
  if covariance is not None:
    x = x @ jnp.linalg.cholesky(covariance).T
  x, queries = x[:num_examples], x[num_examples:]
  error = jax.random.normal(rng_noise, (num_examples,), dtype)
  y = x @ w + jnp.asarray(noise, dtype) * error
  return ICLTask(x, y, queries, queries @ w, w)
