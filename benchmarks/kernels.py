"""What compilers make of the kernels, by block size: no accelerator needed.

Each kernel is compiled ahead of time, and KERNELS.md is written from what the
compilers left: for a TPU the bundles of its program and what they hold, for a
GPU registers and shared memory. Nothing runs: these figures rank block sizes,
and are no times. ``make kernels`` installs the compilers and runs this.

Another operation, or another platform of one, is a line in ``SUBJECTS``; one
that takes other operands needs a function that makes those, too.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import _compilers, _kernel_words
from pallas_kernels.flash_attention import BlockSizes
from pallas_kernels.flash_attention import config as flash_config
from pallas_kernels.flash_attention import operands as flash
from pallas_kernels.ntk_attention import operands as ntk
from pallas_kernels.polynomial_attention import config as polynomial_config
from pallas_kernels.polynomial_attention import operands as polynomial
from pallas_kernels.relu_attention import operands as relu
from pallas_kernels.small_cache_attention import config as small_config
from pallas_kernels.small_cache_attention import operands as small
from pallas_kernels.tensor_attention import config as tensor_config
from pallas_kernels.tensor_attention import operands as tensor

RESULTS = pathlib.Path(__file__).parent / "KERNELS.md"
_LENGTH, _HEADS, _DIM = 16384, 4, 128
# Those of the gradients that one kernel of a GPU makes.
_TOGETHER = {"query": ("query",), "key, value": ("key", "value")}
_PACKAGES = {
  "tpu": ("jax", "jaxlib", "libtpu"),
  "cuda": ("jax", "jaxlib", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12"),
}

Sizes = tuple[int, ...]


class Case(NamedTuple):
  """One call with one choice of block sizes.

  Attributes:
    operands: without numbers.
    options: with the block sizes.
    bars: from what ``forward`` returns to what ``backward`` takes beside.
    work: what a step of the grid does,
    unit: in these.
  """

  operands: Any
  options: Any
  bars: Callable[..., tuple[Any, ...]]
  work: float
  unit: str


class Subject(NamedTuple):
  """Kernels of one operation on one platform.

  Attributes:
    operation: a folder of ``pallas_kernels``.
    platform: "tpu" or "cuda".
    default: block sizes that ``config`` names.
    others: block sizes to compare.
    case: from block sizes to a call.
  """

  operation: str
  platform: str
  default: Sizes
  others: tuple[Sizes, ...]
  case: Callable[[Sizes], Case]


def _tokens(heads: int = _HEADS, dim: int = _DIM) -> tuple[Any, Any, Any]:
  x = jax.ShapeDtypeStruct((1, _LENGTH, heads, dim), jnp.bfloat16)
  return x, x, x


def _twice(*results: Any) -> tuple[Any, ...]:
  """Cotangents are shaped as what they belong to."""
  return *results, *results


def _outputs_twice(out: Any, lse: Any) -> tuple[Any, ...]:
  """Of the outputs alone."""
  return out, lse, out


def _blocks(sizes: Sizes) -> BlockSizes:
  return BlockSizes(*sizes, *sizes)


def _flash(sizes: Sizes) -> Case:
  options = flash.Options(0.1, block_sizes=_blocks(sizes))
  work = sizes[0] * sizes[1] / 1000
  return Case(flash.Operands(*_tokens()), options, _twice, work, "1000 scores")


def _relu(sizes: Sizes) -> Case:
  number = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  threshold = number((1, _LENGTH, _HEADS))
  x = relu.Operands(*_tokens(), threshold, number(()))
  options = relu.Options(2, block_sizes=_blocks(sizes))
  work = sizes[0] * sizes[1] / 1000
  return Case(x, options, _twice, work, "1000 scores")


def _small(sizes: Sizes) -> Case:
  (block,) = sizes
  x = small.Operands(*_tokens(1, 1024))
  work = block * block * small_config.depth(block) / 1e6
  options = small.Options(block_size=block)
  return Case(x, options, _outputs_twice, work, "10^6 multiply-adds")


def _polynomial(sizes: Sizes) -> Case:
  (chunk,), dim = sizes, 32
  number = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  x = polynomial.Operands(
    number((_HEADS, dim, 1, _LENGTH)),
    number((_HEADS, dim, _LENGTH)),
    number((_HEADS, dim + 1, _LENGTH)),
  )
  weights = tuple(polynomial.multinomial_weights(dim, (1.0, 1.0, 0.5)))
  options = polynomial.Options(weights, 2, True, 1.0, chunk)

  def bars(out: Any, denominator: Any, total: Any) -> tuple[Any, ...]:
    del out, denominator
    return total, number((_HEADS, dim + 1, 1, _LENGTH))

  return Case(x, options, bars, chunk, "token")


def _ntk(sizes: Sizes) -> Case:
  number = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  features, state = (1, _LENGTH, _HEADS, 512), (_HEADS, 512, _DIM)
  prefix = number(features), number(state), number(state[:2])
  options = ntk.Options(0.1, block_sizes=_blocks(sizes))
  work = sizes[0] * sizes[1] / 1000
  x = ntk.Operands(*_tokens(), *prefix)
  return Case(x, options, _twice, work, "1000 scores")


def _tensor(sizes: Sizes) -> Case:
  query, narrow, _ = _tokens()
  wide = jax.ShapeDtypeStruct(narrow.shape, jnp.float32)
  x = tensor.Operands(query, wide, narrow, wide, narrow)
  q, k2 = sizes
  blocks = dataclasses.replace(
    tensor_config.TPU, block_q=q, block_k2=k2, block_q_bwd=q, block_k2_bwd=k2
  )
  options = tensor.Options(block_sizes=blocks)
  return Case(x, options, _outputs_twice, q * k2 / 1000, "1000 scores")


def _pair(sizes: BlockSizes) -> Sizes:
  return sizes.block_q, sizes.block_k


_TPU, _GPU = _pair(flash_config.TPU), _pair(flash_config.GPU)
_TPU_TILES = (256, 256), (512, 512), (512, 1024), (1024, 512), (1024, 1024)
_GPU_TILES = (64, 64), (64, 128), (128, 64)
_TENSOR = tensor_config.TPU.block_q, tensor_config.TPU.block_k2
_SMALL, _CHUNK = (small_config.BLOCK_SIZE,), (polynomial_config.TPU_CHUNK,)

SUBJECTS = (
  Subject("flash_attention", "tpu", _TPU, _TPU_TILES, _flash),
  Subject("relu_attention", "tpu", _TPU, ((512, 512), (1024, 512)), _relu),
  Subject(
    "polynomial_attention", "tpu", _CHUNK, ((128,), (256,), (512,)), _polynomial
  ),
  Subject("ntk_attention", "tpu", _TPU, ((512, 512), (1024, 512)), _ntk),
  Subject(
    "tensor_attention", "tpu", _TENSOR, ((256, 256), (256, 512)), _tensor
  ),
  Subject("small_cache_attention", "tpu", _SMALL, ((256,), (512,)), _small),
  Subject("flash_attention", "cuda", _GPU, _GPU_TILES, _flash),
  Subject("relu_attention", "cuda", _GPU, _GPU_TILES, _relu),
  Subject("ntk_attention", "cuda", _GPU, _GPU_TILES, _ntk),
  # As many tokens as features.
  Subject("polynomial_attention", "cuda", (640,), ((128,),), _polynomial),
)


def main(platform: str | None = None, path: str = "") -> None:
  """Writes KERNELS.md, or figures of one platform to ``path``."""
  if platform is not None:
    figures = [_figures(subject) for subject in _of(platform)]
    pathlib.Path(path).write_text(json.dumps(figures))
    return
  tables = [_section(platform) for platform in _PACKAGES]
  RESULTS.write_text("\n".join([_HEAD, *tables, _kernel_words.section()]))
  print(RESULTS.read_text())


def _of(platform: str) -> list[Subject]:
  return [s for s in SUBJECTS if s.platform == platform]


def _figures(subject: Subject) -> list[Any]:
  """[sizes, kernel, figures] of all kernels."""
  kind = {"tpu": "tpu", "cuda": "gpu"}[subject.platform]
  folder = f"pallas_kernels.{subject.operation}"
  backend = importlib.import_module(f"{folder}.mosaic_{kind}")
  rows: list[Any] = []
  for sizes in sorted({subject.default, *subject.others}):
    case = subject.case(sizes)
    reason = backend.supports(case.operands, case.options)
    if reason is not None:
      raise ValueError(f"{subject.operation}, blocks {sizes}: {reason}")
    for name, fn, args in _passes(backend, subject, case):
      found = _compilers.kernels_of(subject.platform, fn, *args)
      for kernel, figures in found.items():
        kernel = kernel.removeprefix(f"{subject.operation}_")
        if kind == "gpu":
          kernel = f"{name} ({kernel})" if len(found) > 1 else name
        rows.append([sizes, kernel, figures])
      print(subject.operation, sizes, name, file=sys.stderr, flush=True)
  return rows


def _passes(backend: Any, subject: Subject, case: Case) -> Any:
  """Name, function and arguments of what is compiled by itself."""

  def forward(x: Any) -> Any:
    return backend.forward(x, case.options)

  def backward(names: Any, x: Any, *more: Any) -> Any:
    bars = backend.backward(x, case.options, *more)
    return bars if names is None else [getattr(bars, n) for n in names]

  x = case.operands
  more = case.bars(*jax.eval_shape(forward, x))
  # A GPU's kernels have no name: only one of them is left in a program.
  together = {"backward": None} if subject.platform == "tpu" else _TOGETHER
  return [
    ("forward", forward, (x,)),
    *(
      (name, functools.partial(backward, names), (x, *more))
      for name, names in together.items()
    ),
  ]


# --- tables ---


def _section(platform: str) -> str:
  """The table of a platform, compiled in a process of its own."""
  with tempfile.TemporaryDirectory() as folder:
    dump, path = pathlib.Path(folder, "dump"), pathlib.Path(folder, "figures")
    dump.mkdir()
    subprocess.run(
      [sys.executable, "-m", "benchmarks.kernels", platform, str(path)],
      env=_compilers.environment(platform, str(dump)),
      check=True,
    )
    figures = json.loads(path.read_text())
  columns, row = {
    "tpu": (
      "bundles | bundles for | MXU | fills | spills | VMEM", _tpu_row
    ),
    "cuda": ("registers | bytes spilled | filled | shared memory", _gpu_row),
  }[platform]  # fmt: skip
  title = {"tpu": "TPU v5e", "cuda": "H100"}[platform]
  versions = (
    f"{p} {importlib.metadata.version(p)}" for p in _PACKAGES[platform]
  )
  lines = [
    f"## {title}", "", ", ".join(versions), "",
    f"| kernel | blocks | {columns} |",
    "|---" * (3 + columns.count("|")) + "|",
  ]  # fmt: skip
  for subject, rows in zip(_of(platform), figures):
    for sizes, kernel, found in rows:
      name = f"{subject.operation}: {kernel}"
      blocks = " x ".join(map(str, sizes))
      if tuple(sizes) == subject.default:
        blocks = f"**{blocks}**"
      cells = row(subject.case(tuple(sizes)), found)
      lines.append(f"| {name} | {blocks} | {cells} |")
  return "\n".join([*lines, ""])


def _tpu_row(case: Case, f: _compilers.Figures) -> str:
  each = f"{f['bundles'] / case.work:.1f} per {case.unit}"
  return (
    f"{f['bundles']} | {each} | {f['mxu']:.0%} | {f['fills']} | {f['spills']} "
    f"| {f['vmem'] / 2**20:.1f} MiB"
  )


def _gpu_row(case: Case, f: _compilers.Figures) -> str:
  del case
  return (
    f"{f['registers']} | {f['spilled']} | {f['filled']} | "
    f"{f['shared'] / 2**10:.0f} KiB"
  )


_HEAD = f"""# What compilers make of the kernels

Generated by `make kernels`, ahead of time: nothing ran, and nothing here is a
time. Kernels are compiled for a v6e by `make test-aot`, but not listed.
Default block sizes are **bold**: queries x keys, tokens of a chunk, or rows
and columns of a tile. Calls have {_LENGTH} queries and keys in bfloat16,
{_HEADS} heads of {_DIM}; polynomial attention is causal, of degree 2, in
float32 with heads of 32; for small caches there is one head of 1024.

* *bundles*: instructions of the program, each for all units of a core; *bundles
  for*: the same for the work of a step. A loop or a branch counts once.
* *MXU*: the share of the slots for products of matrices that is taken.
* *fills*, *spills*: vectors that come back to registers, and that had to leave.
* *VMEM*: what the compiler set aside for scratch and blocks.
* *registers*: of a thread, at most 255; *shared memory*: of a block, at most
  227 KiB.
* *1 of 3*: of the kernels of a pass, as they were compiled. One that is the
  same as one above, as those of NTK-Attention's gradient, is not there again.
"""


if __name__ == "__main__":
  main(*sys.argv[1:])
