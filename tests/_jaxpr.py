"""Looks inside traced programs, loops included."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend
import numpy as np


def array_sizes(fn: Callable[..., Any], *args: Any) -> list[int]:
  """Numbers of elements of all arrays in the program of a call."""
  return list(_sizes(jax.make_jaxpr(fn)(*args).jaxpr))


def _sizes(jaxpr: Any) -> Iterator[int]:
  for var in (*jaxpr.invars, *jaxpr.constvars):
    yield int(np.prod(var.aval.shape, dtype=np.int64))
  for eqn in jaxpr.eqns:
    for var in eqn.outvars:
      yield int(np.prod(getattr(var.aval, "shape", ()), dtype=np.int64))
    for inner in jax.extend.core.jaxprs_in_params(eqn.params):
      yield from _sizes(inner)
