"""Settings that every test runs under; must run before jax is used."""

import collections
import gc
import importlib.metadata
import os
import pathlib
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA's older way to write loops compiles in a third of the time, and programs
# as small as these are compiled in one piece with a fifth less work than in the
# 32 that its threads could share. Other releases may lack the flags, and end
# the process at one that they do not know.
if importlib.metadata.version("jaxlib").startswith("0.10."):
  os.environ["XLA_FLAGS"] = " ".join(
    (
      os.environ.get("XLA_FLAGS", ""),
      "--xla_cpu_use_fusion_emitters=false",
      "--xla_cpu_parallel_codegen_split_count=1",
    )
  )

import jax
import pytest
from absl import flags

# `make test-aot`: compilers of an accelerator that is not there. One of them in
# a process, and only the tests marked for it.
_AOT = os.environ.get("JAXATTN_AOT")
_CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "jax"

# `JAXATTN_TEST_X64=0 pytest -m any_x64` is the second run of the suites that
# are written for both modes.
jax.config.update(
  "jax_enable_x64", os.environ.get("JAXATTN_TEST_X64", "1") == "1"
)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(_CACHE))

# Tracing makes millions of objects that live: looking for cycles among them
# every 700 of them is a twentieth of all the time.
gc.set_threshold(100_000, 50, 50)

# absl's parameterized test cases read flags; pytest's own are not absl's.
if not flags.FLAGS.is_parsed():
  flags.FLAGS(["pytest"], known_only=True)

# Tests of these rooms look at the memory of compiled programs; but not those of
# the files below, which look at numbers alone.
_OPTIMIZED = {"attention", "softmax"}
_NUMBERS = {
  "cache_test.py",
  "exact_test.py",
  "jacobian_test.py",
  "layer_gradients_test.py",
  "losses_test.py",
  "online_test.py",
  "polynomial_gradient_test.py",
  "polynomial_sketch_test.py",
  "prefix_exact_test.py",
  "prefix_fit_test.py",
  "tiles_test.py",
}

# Files whose slow tests compile more than they compute.
_COMPILED = {
  "attention_fit_test.py",
  "gnn_test.py",
  "gradient_error_test.py",
  "leverage_inversion_test.py",
}

# Seconds that each file took; files that grow past the limit must be split.
_FILE_LIMIT = 90.0
_seconds: collections.Counter[str] = collections.Counter()


@pytest.fixture(autouse=True)
def compile_fast(request: pytest.FixtureRequest) -> Iterator[None]:
  """Compiles without most optimizations: tests compute little.

  What is compiled so is not kept on disk: it is quick to make again.
  """
  file = request.path
  fast = file.parent.name not in _OPTIMIZED or file.name in _NUMBERS
  # Those of the size a paper states compute more than they compile, mostly.
  slow = request.node.get_closest_marker("slow") is not None
  fast &= not slow or file.name in _COMPILED
  jax.config.update("jax_disable_most_optimizations", fast)
  jax.config.update(
    "jax_persistent_cache_min_compile_time_secs", 1e9 if fast else 0.0
  )
  yield
  jax.config.update("jax_disable_most_optimizations", False)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
  """Frees what a file compiled.

  Each program maps memory; a process that keeps those of all files passes
  the kernel's limit of maps (65530), and LLVM then ends it by a signal.
  """
  yield
  jax.clear_caches()


def pytest_collection_modifyitems(
  config: pytest.Config, items: list[pytest.Item]
) -> None:
  wanted = {f"aot_{_AOT}"} if _AOT else set()
  aside = [
    item
    for item in items
    if wanted != {m.name for m in item.iter_markers()} & {"aot_tpu", "aot_cuda"}
  ]
  if aside:
    config.hook.pytest_deselected(items=aside)
    items[:] = [item for item in items if item not in set(aside)]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
  if "slow" not in report.keywords:
    _seconds[report.nodeid.split("::")[0]] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
  terminalreporter.section("slowest files")
  for file, seconds in _seconds.most_common(5):
    over = f" is over {_FILE_LIMIT:.0f} s" if seconds > _FILE_LIMIT else ""
    terminalreporter.line(f"{seconds:6.1f} s {file}{over}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
  # Only in the leg that has a machine to itself: a slow laptop is nobody's
  # fault, nor is a newer JAX.
  if (
    os.environ.get("JAXATTN_LIMIT_FILES") == "1"
    and max(_seconds.values(), default=0) > _FILE_LIMIT
    and session.exitstatus == 0
  ):
    session.exitstatus = 1
