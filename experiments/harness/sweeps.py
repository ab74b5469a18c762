"""Sweeps over widths whose points outlive a kill."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments.harness.progress import progress
from experiments.harness.workdir import Workdir
from jaxattn.scaling import sweep


def sweep_widths(
  wd: Workdir,
  name: str,
  rng: jax.Array,
  fn: Callable[..., Mapping[str, jax.Array]],
  widths: Sequence[int],
  num_seeds: int,
  *,
  args: Sequence[Any] = (),
  memory_limit: int = 2**31,
  then: Callable[[int, dict[str, np.ndarray]], Mapping[str, Any]] | None = None,
) -> dict[str, np.ndarray]:
  """:func:`jaxattn.scaling.sweep` with progress, a point for each width.

  Seeds are divided among the devices of this process, if there are several
  and their number divides that of the seeds.

  Args:
    wd: where points are kept, as ``name/m=width``.
    name: of the points, and of the progress that is shown.
    rng: PRNG key.
    fn: ``(rng, width, *args)`` to arrays by name.
    widths: different positive integers.
    num_seeds: results for each width.
    args: as in ``sweep``.
    memory_limit: as in ``sweep``; 1 = seeds in turn.
    then: what is kept of a width: from it and the arrays, led by seeds, that
      were found; None = all of them.

  Returns:
    Arrays (widths, seeds, ...) by name, or (widths, ...) as ``then`` returns
    them.

  Example:
    >>> import tempfile
    >>> import ml_collections
    >>> from experiments import harness
    >>> def largest(rng, width):
    ...   return {"largest": jax.random.uniform(rng, (width,)).max()}
    >>> config = ml_collections.ConfigDict({"slug": "toy", "tier": "smoke"})
    >>> rng = jax.random.key(0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   wd = harness.open_workdir(folder, config)
    ...   found = sweep_widths(wd, "uniform", rng, largest, (3, 9), 4)
    >>> found["largest"].shape
    (2, 4)
  """

  def point(width: int) -> Mapping[str, Any]:
    values = sweep(
      rng,
      fn,
      (width,),
      num_seeds,
      args=args,
      memory_limit=memory_limit,
      mesh=_seed_mesh(num_seeds),
    ).values
    found = {key: np.asarray(x[0]) for key, x in values.items()}
    return found if then is None else then(width, found)

  points = [
    wd.point(f"{name}/m={width}", functools.partial(point, width))
    for width in progress(widths, name)
  ]
  return {key: np.stack([p[key] for p in points]) for key in points[0]}


def _seed_mesh(num_seeds: int) -> jax.sharding.Mesh | None:
  devices = jax.local_devices()
  if len(devices) == 1 or num_seeds % len(devices):
    return None
  axis_types = (jax.sharding.AxisType.Auto,)
  return jax.make_mesh((len(devices),), ("seeds",), axis_types, devices=devices)
