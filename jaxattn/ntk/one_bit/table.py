"""Errors of networks of signs over sizes, data and steps."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn import _checks
from jaxattn.ntk.infinite import mlp_ntk
from jaxattn.ntk.one_bit.network import OneBit, init
from jaxattn.ntk.one_bit.training import effective_rate, train_one_bit
from jaxattn.numerics import power_iteration
from jaxattn.scaling import sweep

# Rows of a kernel that is kept, and rows at a time of one that is not.
_MAX_ROWS, _CHUNK = 4096, 1024


class ScalingTable(NamedTuple):
  """Mean squared errors over seeds, widths, numbers of data and of steps.

  Attributes:
    train: (S, W, D, C), on the data trained on.
    train_avg: the same of outputs averaged over a few steps.
    test: (S, W, D, C), on held-out data.
    test_avg: the same of averaged outputs.
    sizes: (W,) numbers of weights, m (d + 1).
    compute: (W, D, C) flops, 6 sizes data steps.
  """

  train: jax.Array
  train_avg: jax.Array
  test: jax.Array
  test_avg: jax.Array
  sizes: jax.Array
  compute: jax.Array


def scaling_table(
  rng: jax.Array,
  data: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
  widths: Sequence[int],
  data_sizes: Sequence[int],
  steps_grid: Sequence[int],
  *,
  num_seeds: int = 4,
  quantized: bool = True,
  learning_rate_fraction: float = 0.5,
  window: int = 10,
) -> ScalingTable:
  """Trains for all widths, numbers of data and seeds; errors by step.

  Each seed draws a network and data for each number of data: only errors at
  different steps share a run. The rate is a fraction of
  1 / lambda_max of the kernel of infinite width on the data trained on, and for
  signs 1 / :func:`effective_rate` times that. Rows of a width do not depend on
  the other widths.

  Args:
    rng: PRNG key.
    data: x (n, d), y (n,), x_test (n_test, d), y_test (n_test,).
    widths: even, different.
    data_sizes: ascending numbers of data, at most n.
    steps_grid: ascending numbers of steps, each at least ``window``.
    num_seeds: S.
    quantized: networks of signs, or of full precision.
    learning_rate_fraction: positive; from 2 on it diverges.
    window: steps averaged over.

  Returns:
    A :class:`ScalingTable`, for ``scaling.fit_power_law`` and its companions.

  Raises:
    ValueError: if shapes or dtypes do not fit, or grids are not as above.

  Cost:
    Sum over widths and sizes of S num_steps O(m n d); a compilation each.

  Source:
    arXiv 2001.08361, section 1.2, for what is held fixed and what varies.

  Example:
    >>> import jax
    >>> from jaxattn.ntk import one_bit
    >>> x = jax.random.normal(jax.random.key(0), (24, 8))
    >>> x /= jax.numpy.linalg.norm(x, axis=1, keepdims=True)
    >>> data = x[:16], x[:16, 0], x[16:], x[16:, 0]
    >>> table = one_bit.scaling_table(
    ...   jax.random.key(1), data, (8, 16), (8, 16), (10, 20), num_seeds=3
    ... )
    >>> table.test.shape, table.compute.shape
    ((3, 2, 2, 2), (2, 2, 2))
  """
  x, y, x_test, y_test = map(jnp.asarray, data)
  _checks.check_one_dtype(x=x, y=y, x_test=x_test, y_test=y_test)
  _checks.check_rank("x", x, 2)
  _checks.check_shape("y", y, (len(x),), "(n,)")
  _checks.check_shape("x_test", x_test, (None, x.shape[1]), "(n_test, d)")
  _checks.check_shape("y_test", y_test, (len(x_test),), "(n_test,)")
  _check_grid("data_sizes", data_sizes, 1, len(x))
  _check_grid("steps_grid", steps_grid, window, None)
  _checks.check_positive("learning_rate_fraction", learning_rate_fraction)
  fn = _table_fn(tuple(data_sizes), tuple(steps_grid), quantized, window)
  fraction = jnp.asarray(learning_rate_fraction, x.dtype)
  args = x, y, x_test, y_test, fraction
  errors = sweep(rng, fn, widths, num_seeds, args=args).values
  sizes = jnp.asarray(widths, x.dtype) * (x.shape[1] + 1)
  data_steps = np.outer(data_sizes, steps_grid).astype(x.dtype)
  return ScalingTable(
    **{name: jnp.moveaxis(e, 1, 0) for name, e in errors.items()},
    sizes=sizes,
    compute=6 * sizes[:, None, None] * data_steps[None],
  )


@functools.cache
def _table_fn(
  data_sizes: tuple[int, ...],
  steps_grid: tuple[int, ...],
  quantized: bool,
  window: int,
) -> Callable[..., dict[str, jax.Array]]:
  """What a sweep calls; cached, so that the same grid compiles once."""

  def errors_of_size(
    params: OneBit, x: jax.Array, y: jax.Array, test: Any, fraction: jax.Array
  ) -> dict[str, jax.Array]:
    x_test, y_test = test
    rate = fraction / largest_eigenvalue(x)
    if quantized:
      rate /= effective_rate().astype(x.dtype)
    _, log = train_one_bit(
      params,
      x,
      y,
      learning_rate=rate,
      num_steps=steps_grid[-1],
      quantized=quantized,
      window=window,
      x_eval=x_test,
      eval_steps=steps_grid,
    )
    at = np.array(steps_grid)
    return {
      "train": 2 * log.loss[at] / len(x),
      "train_avg": 2 * log.loss_avg[at] / len(x),
      "test": jnp.square(log.f_eval - y_test[None]).mean(-1),
      "test_avg": jnp.square(log.f_eval_avg - y_test[None]).mean(-1),
    }

  def errors(
    rng: jax.Array,
    width: int,
    x: jax.Array,
    y: jax.Array,
    x_test: jax.Array,
    y_test: jax.Array,
    fraction: jax.Array,
  ) -> dict[str, jax.Array]:
    each: list[dict[str, jax.Array]] = []
    for n in data_sizes:
      rng_order, rng_params = jax.random.split(jax.random.fold_in(rng, n))
      few = jax.random.permutation(rng_order, len(x))[:n]
      params = init(rng_params, width, x.shape[1], dtype=x.dtype)
      each.append(
        errors_of_size(params, x[few], y[few], (x_test, y_test), fraction)
      )
    return jax.tree.map(lambda *e: jnp.stack(e), *each)

  return errors


def largest_eigenvalue(x: jax.Array) -> jax.Array:
  """Of the kernel of full precision, which is in memory if it is small.

  From a random start: of centered data, the leading vector has both signs.
  """

  def kernel(rows: jax.Array) -> jax.Array:
    dim = float(x.shape[1])
    return mlp_ntk(rows, x, depth=1, weight_scale=dim, trainable="hidden")[1]

  def product(k: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.matmul(k, v, precision=lax.Precision.HIGHEST)

  if len(x) <= _MAX_ROWS:
    matvec = functools.partial(product, kernel(x))
  else:

    def matvec(v: jax.Array) -> jax.Array:
      row = lambda z: product(kernel(z[None])[0], v)  # noqa: E731
      return lax.map(row, x, batch_size=_CHUNK)

  start = jax.random.normal(jax.random.key(0), x.shape[:1], x.dtype)
  return power_iteration(matvec, start, num_steps=100)[0]


def _check_grid(
  name: str, grid: Sequence[int], low: int, high: int | None
) -> None:
  for value in grid:
    _checks.check_integer(name, value, low, high)
  if not grid or list(grid) != sorted(set(grid)):
    raise ValueError(f"{name} must be ascending, at least one, got {grid}")
