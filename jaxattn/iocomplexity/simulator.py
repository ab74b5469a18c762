"""Schedules that run on real arrays through a cache which counts words.

Each schedule of :mod:`jaxattn.iocomplexity.counts` is a program that touches
data only through a :class:`Cache`. It returns true attention, and what it moved
equals :func:`io_count` to the word.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxattn import _checks
from jaxattn.iocomplexity import _backward, _forward, _training
from jaxattn.iocomplexity._cache import Cache
from jaxattn.iocomplexity._tiles import Mask
from jaxattn.iocomplexity.counts import IOCount, io_count

_SCHEDULES: dict[str, Callable[..., dict[str, np.ndarray]]] = {
  "fwd_large": _forward.fwd_large,
  "fwd_fa1": _forward.fwd_fa1,
  "fwd_small": _forward.fwd_small,
  "matmul": _forward.matmul,
  "bwd_large": _backward.bwd_large,
  "bwd_two_pass": _backward.bwd_two_pass,
  "bwd_small": _backward.bwd_small,
  "train_small": _training.train_small,
  "train_large": _training.train_large,
}
_MASKED = ("fwd_large", "fwd_small", "bwd_large", "bwd_small")

# Sides of each array: queries, keys, head.
_FORWARD = {"query": "qd", "key": "kd", "value": "kd"}
_ARRAYS = {
  "fwd": _FORWARD,
  "matmul": {"left": "qd", "right": "dk"},
  "bwd": {**_FORWARD, "out": "qd", "lse": "q", "out_grad": "qd"},
  "train": {
    "a1": "qd",
    "a2": "kd",
    "a3": "kd",
    "x": "dd",
    "y": "dd",
    "target": "qd",
  },
}


def simulate(
  algorithm: str,
  arrays: Mapping[str, Any],
  *,
  cache_words: int,
  block_size: int | tuple[int, ...] | None = None,
  mask: Any = None,
  trace: bool = False,
) -> tuple[dict[str, Any], IOCount]:
  r"""Runs one schedule on real arrays, and counts the words that it moves.

  Attention here is :math:`\mathrm{softmax}(Q K^\top) V` in float64: a scale is
  a factor of the queries.

  Args:
    algorithm: as in :func:`io_count`.
    arrays: inputs by name. For ``fwd_*``: ``query`` (N_q, d), ``key`` and
      ``value`` (N_k, d). For ``bwd_*``: these, the ``out`` (N_q, d) and
      ``lse`` (N_q,) of the forward pass, and ``out_grad`` (N_q, d). For
      ``matmul``: ``left`` (N_q, d) and ``right`` (d, N_k). For ``train_*``:
      ``a1`` and ``target`` (N_q, d), ``a2`` and ``a3`` (N_k, d), ``x`` and
      ``y`` (d, d).
    cache_words: M.
    block_size: as in :func:`io_count`.
    mask: (N_q, N_k) booleans, True = attend, for ``fwd_large``, ``fwd_small``,
      ``bwd_large`` and ``bwd_small``: blocks that are all False are skipped. It
      is part of the program and costs no words. A query that sees no key gives
      0, with zero gradient.
    trace: whether to record the words that were touched.

  Returns:
    Outputs by name, and an :class:`IOCount`. Outputs are ``out`` and ``lse``
    (of ``fwd_fa1`` ``out``, ``max`` and ``sum``, with lse = max + log(sum));
    ``query_grad``, ``key_grad`` and ``value_grad``; ``product``; ``x_grad``.
    With ``trace`` there is a :class:`Trace`, ``trace``, for :func:`replay`.

  Raises:
    ValueError: if there is no such algorithm, if arrays are missing, unknown or
      do not fit, if the schedule takes no mask, or if the cache is too small.

  Cost:
    Some microseconds a block operation of a schedule with a large cache, and a
    rank-1 update of one with a small cache.

  Source:
    arXiv 2410.09397 and 2205.14135.

  Example:
    >>> import numpy as np
    >>> query, key, value = np.random.default_rng(0).normal(size=(3, 12, 4))
    >>> arrays = {"query": query, "key": key, "value": value}
    >>> outputs, count = simulate("fwd_large", arrays, cache_words=64)
    >>> weights = np.exp(query @ key.T)
    >>> want = weights @ value / weights.sum(1, keepdims=True)
    >>> bool(np.allclose(outputs["out"], want)), count.total, count.peak
    (True, 396, 63)
  """
  _checks.check_choice("algorithm", algorithm, tuple(_SCHEDULES))
  _checks.check_integer("cache_words", cache_words, 1, None)
  if block_size is not None:
    given = block_size if isinstance(block_size, tuple) else (block_size,)
    for size in given:
      _checks.check_integer("block_size", size, 1, None)
  x, sizes = _read_arrays(algorithm, arrays)
  expected = io_count(
    algorithm,
    num_queries=sizes["q"],
    num_keys=sizes["k"],
    head_dim=sizes["d"],
    cache_words=cache_words,
    block_size=block_size,
  )
  hidden = _read_mask(algorithm, mask, (sizes["q"], sizes["k"]))
  cache = Cache(cache_words, trace=trace)
  outputs: dict[str, Any] = _SCHEDULES[algorithm](
    cache, x, expected.blocks, hidden
  )
  if trace:
    outputs["trace"] = cache.trace(list(outputs.values()))
  return outputs, IOCount(
    cache.reads, cache.writes, expected.blocks, cache.peak
  )


def _read_arrays(
  algorithm: str, arrays: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
  """Arrays as float64, and the sizes that they agree on."""
  layout = _ARRAYS[algorithm.split("_")[0]]
  if set(arrays) != set(layout):
    raise ValueError(
      f"{algorithm} takes the arrays {', '.join(layout)}, got "
      f"{', '.join(arrays) or 'none'}"
    )
  x = {name: np.array(arrays[name], np.float64) for name in layout}
  sizes: dict[str, int] = {}
  for name, sides in layout.items():
    _checks.check_rank(name, x[name], len(sides))
    for side, size in zip(sides, x[name].shape):
      sizes.setdefault(side, size)
    shape = tuple(sizes[side] for side in sides)
    _checks.check_shape(name, x[name], shape)
    if not x[name].size:
      raise ValueError(f"{name} must not be empty, got shape {x[name].shape}")
  return x, sizes


def _read_mask(algorithm: str, mask: Any, shape: tuple[int, int]) -> Mask:
  if mask is None:
    return None
  if algorithm not in _MASKED:
    raise ValueError(
      f"mask is taken by {', '.join(_MASKED)} alone, got algorithm "
      f"{algorithm!r}"
    )
  mask = np.asarray(mask)
  _checks.check_boolean("mask", mask)
  _checks.check_shape("mask", mask, shape, "(N_q, N_k)")
  return mask
