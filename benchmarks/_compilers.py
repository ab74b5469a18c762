"""What the compilers of accelerators say of a kernel: none need be there."""

import os
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

import jax

from tests.pallas_kernels._ladder import (
  CALLS,
  compiled_for,
  cuda_device,
  tpu_devices,
)

Figures = dict[str, float]

_DUMP = "JAXATTN_DUMP"
_KERNEL = re.compile(r"%?([\w-]+?)(\.\d+)? = .*custom_call_target=\"(\w+)\"")
_VMEM = re.compile(
  r'"used_scoped_memory_configs":\[\{"memory_space":"1",'
  r'"offset":"\d+","size":"(\d+)"'
)


def environment(platform: str, dump: str) -> dict[str, str]:
  """Variables under which a process compiles for ``platform`` into ``dump``."""
  shared = os.environ | {"JAX_PLATFORMS": "cpu", _DUMP: dump}
  if platform == "cuda":
    return shared | {
      "MOSAIC_GPU_DUMP_TO": dump,
      "MOSAIC_GPU_DUMP_PTXAS": "1",
      "MOSAIC_GPU_DUMP_HOST_LLVM": "1",
    }
  return shared | {
    # What libtpu would ask a TPU's host for.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "LIBTPU_INIT_ARGS": (
      f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
    ),
  }


def kernels_of(
  platform: str, fn: Callable[..., Any], *structs: Any
) -> dict[str, Figures]:
  """Figures of each kernel that ``fn`` calls, by its name if it has one.

  Must run in a process with the variables of ``environment``.
  """
  dump = pathlib.Path(os.environ[_DUMP])
  shutil.rmtree(dump)
  dump.mkdir()
  tpu = platform == "tpu"
  device = tpu_devices("v5e:2x2")[0] if tpu else cuda_device()
  # A program that was compiled before would leave nothing to read.
  jax.clear_caches()
  text = compiled_for(device, fn, *structs).as_text()
  lines = [m for m in map(_KERNEL.search, text.splitlines()) if m is not None]
  lines = [m for m in lines if m[3] == CALLS[platform]]
  if not lines:
    raise ValueError(f"there is no kernel for {platform} in the program")
  if tpu:
    return {
      m[1]: _bundles(dump, m[1])
      | {"vmem": int(_VMEM.findall(m.string)[0])}
      for m in lines
    }  # fmt: skip
  # Kernels that are the same one are compiled once.
  paths = dump.glob("*.ptxas")
  said = sorted(paths, key=lambda path: int(path.stem.split("_")[-1]))
  return {f"{i + 1} of {len(said)}": _registers(x) for i, x in enumerate(said)}


def _bundles(dump: pathlib.Path, name: str) -> Figures:
  """From a table of VLIW bundles, by what they hold."""
  (path,) = (
    path
    for path in dump.glob("*-final_hlo-static-per-bundle-utilization.txt")
    if re.search(rf"-{re.escape(name)}(\.\d+)?-\d+-final", path.name)
  )
  _, names, capacities, _, *rows = path.read_text().strip().splitlines()
  used = [sum(map(int, column)) for column in zip(*map(str.split, rows))]
  slots = dict(zip(names.split(", "), used, strict=True))
  mxu = int(capacities.split()[0])
  return {
    "bundles": len(rows),
    "mxu": slots["MXU"] / (mxu * len(rows)),
    "fills": slots["VLOAD:FILL"],
    "spills": slots["VSTORE:SPILL"],
  }


def _registers(said: pathlib.Path) -> Figures:
  """From what ptxas said, and from how the host launches the kernel."""
  text = said.read_text()
  launch = r"@mosaic_gpu_launch_kernel\((?:[^,]*,){10} i32 (\d+)"
  host = said.with_suffix(".ll").read_text()

  def number_before(what: str) -> int:
    # A warning of spills says it once more.
    return int(re.findall(rf"(\d+) {what}", text)[-1])

  (shared,) = re.findall(rf"call void {launch}", host)
  (used,) = re.findall(r"Used (\d+) registers", text)
  return {
    "registers": int(used),
    "spilled": number_before("bytes spill stores"),
    "filled": number_before("bytes spill loads"),
    "shared": int(shared),
  }
