"""One row an operation, direction and dtype: is it right, and how fast."""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn._dispatch import gpu_reason
from jaxattn._selfcheck import operations as operations_lib
from jaxattn._selfcheck.operations import OPERATIONS, Operation

# Largest error of a number over the largest number. Of 16 bits, weights are
# rounded before they meet the values, and results once more. Products of
# float32 are asked for in full: in bfloat16 they would miss this by ten times.
_BOUNDS = {"float32": 2e-4, "bfloat16": 4 * float(jnp.finfo("bfloat16").eps)}
DTYPES = tuple(_BOUNDS)
_ROUNDS = 10
_LONGEST_REASON = 160


class Row(NamedTuple):
  """One line of the table.

  Attributes:
    operation: its name.
    direction: "forward", or "gradient", which runs the forward pass too.
    dtype: of the operands.
    shape: of the operands.
    implementation: "pallas", or "pallas_interpret", which is not timed.
    error: largest error over the largest number; None if nothing came out.
    bound: what that may be.
    seconds: median time; None if it was not timed.
    peer: the fastest other implementation, and why not the others.
    ratio: its time over ours, the median of rounds.
    verdict: "ok", "WRONG", "WRONG: reason" or "not supported: reason".
  """

  operation: str
  direction: str
  dtype: str
  shape: str
  implementation: str
  error: float | None
  bound: float
  seconds: float | None
  peer: str
  ratio: float | None
  verdict: str


def selfcheck(
  operations: Sequence[Operation] = OPERATIONS,
  dtypes: Sequence[str] = DTYPES,
) -> Iterator[Row]:
  """Checks kernels on the default device, and times those that it compiles.

  Args:
    operations: what to check.
    dtypes: of the operands, "float32" or "bfloat16".

  Yields:
    Two rows, forward and gradient, for each operation and dtype.
  """
  for operation in operations:
    for dtype in dtypes:
      yield from _check(operation, dtype)


def is_wrong(row: Row) -> bool:
  """Whether the kernel failed, or returned something else than it should."""
  return row.verdict.startswith("WRONG")


def how_kernels_run() -> str:
  """The implementation to check: compiled, or interpreted."""
  compiled = jax.default_backend() == "tpu" or gpu_reason() is None
  return "pallas" if compiled else "pallas_interpret"


def _check(operation: Operation, dtype: str) -> list[Row]:
  implementation = how_kernels_run()
  shapes = operation.shapes if implementation == "pallas" else operation.tiny
  row = Row(
    operation.name,
    "",
    dtype,
    ", ".join("x".join(map(str, s)) for s in dict.fromkeys(shapes)),
    implementation,
    error=None,
    bound=_BOUNDS[dtype],
    seconds=None,
    peer="",
    ratio=None,
    verdict="",
  )
  rows = [row._replace(direction=d) for d in ("forward", "gradient")]
  try:
    bar, operands, want = _expected(operation, shapes, dtype)
  except Exception as error:
    verdict = f"WRONG: the reference failed: {_describe(error)}"
    return [row._replace(verdict=verdict) for row in rows]
  calls = (operands, want[:1]), ((bar, *operands), want[1:])
  # Of the peers too.
  highest = jax.default_matmul_precision("highest")
  with highest if dtype == "float32" else contextlib.nullcontext():
    return [_compare(operation, row, *c) for row, c in zip(rows, calls)]


def _expected(
  operation: Operation, shapes: operations_lib.Shapes, dtype: str
) -> tuple[jax.Array, list[jax.Array], list[np.ndarray]]:
  """Cotangent, operands, and what must come out: output, then gradients."""
  structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  out = jax.eval_shape(operation.reference, *structs)
  rng = np.random.default_rng(0)
  bar, *operands = (
    jnp.asarray(rng.standard_normal(x.shape), dtype) for x in (out, *structs)
  )
  wide = (x.astype(jnp.float32) for x in (bar, *operands))
  with jax.default_matmul_precision("highest"):
    want = _dense(operation.reference)(*wide)
  return bar, operands, [np.asarray(x, np.float64) for x in want]


@functools.cache
def _dense(reference: Callable[..., Any]) -> Callable[..., Any]:
  def run(bar: jax.Array, *operands: jax.Array) -> Any:
    out, vjp = jax.vjp(reference, *operands)
    return out, *vjp(bar)

  return _jit(run)


def _compare(
  operation: Operation,
  row: Row,
  args: Sequence[jax.Array],
  want: Sequence[np.ndarray],
) -> Row:
  """The row with what came out, and if that is right, how fast."""
  ours = functools.partial(operation.fn, implementation=row.implementation)
  run = _program(row.direction, ours, args)
  try:
    error = _error(run(), want)
  except Exception as raised:
    return row._replace(verdict=_failure(raised))
  ok = error <= row.bound
  row = row._replace(error=error, verdict="ok" if ok else "WRONG")
  if not ok or row.implementation != "pallas":
    return row
  peers, remarks = {}, []
  for name, fn in operations_lib.peers(operation).items():
    peer = _program(row.direction, fn, args)
    try:
      error = _error(peer(), want)
    except Exception as raised:
      remarks.append(f"not {name}: {_describe(raised)}")
      continue
    if error <= row.bound:
      peers[name] = peer
    else:
      remarks.append(f"not {name}: error {error:.1e}")
  return _race(row, run, peers, remarks)


def _program(
  direction: str, fn: Callable[..., Any], args: Sequence[jax.Array]
) -> Callable[[], Any]:
  def gradient(bar: jax.Array, *operands: jax.Array) -> Any:
    return jax.vjp(fn, *operands)[1](bar)

  run = _jit(fn if direction == "forward" else gradient)
  return functools.partial(run, *args)


def _jit(fn: Callable[..., Any]) -> Any:
  # On a CPU nothing is timed, and compiling is most of the work.
  is_cpu = jax.default_backend() == "cpu"
  options = {"xla_backend_optimization_level": 0} if is_cpu else None
  return jax.jit(fn, compiler_options=options)


def _error(got: Any, want: Sequence[np.ndarray]) -> float:
  """Largest error over the largest number, of any array; NaN if one has it."""
  pairs = zip(jax.tree.leaves(got), want, strict=True)
  errors = [np.abs(np.asarray(g, np.float64) - w).max() / np.abs(w).max()
            for g, w in pairs]  # fmt: skip
  return float(np.max(errors))


def _race(
  row: Row,
  run: Callable[[], Any],
  peers: dict[str, Callable[[], Any]],
  remarks: Sequence[str],
) -> Row:
  """The row with times of what is compiled already, ours and peers in turn."""
  contestants = {"": run, **peers}
  seconds: dict[str, list[float]] = {name: [] for name in contestants}
  for _ in range(_ROUNDS):
    for name, contestant in contestants.items():
      start = time.perf_counter()
      jax.block_until_ready(contestant())
      seconds[name].append(time.perf_counter() - start)
  medians = {name: statistics.median(times) for name, times in seconds.items()}
  ours = medians.pop("")
  if not medians:
    return row._replace(seconds=ours, peer="; ".join(remarks))
  best = min(medians, key=medians.__getitem__)
  ratios = [peer / our for peer, our in zip(seconds[best], seconds[""])]
  return row._replace(
    seconds=ours,
    peer="; ".join((best, *remarks)),
    ratio=statistics.median(ratios),
  )


def _failure(error: Exception) -> str:
  # Compilers raise NotImplementedError too, for what they lack; what was known
  # beforehand has the dispatcher's words.
  _, known, reason = str(error).partition("cannot run here: ")
  if known and isinstance(error, NotImplementedError):
    return f"not supported: {_shorten(reason)}"
  return f"WRONG: {_describe(error)}"


def _describe(error: Exception) -> str:
  return f"{type(error).__name__}: {_shorten(str(error))}"


def _shorten(text: str) -> str:
  text, most = " ".join(text.split()), _LONGEST_REASON
  return text if len(text) <= most else text[: most - 3] + "..."
