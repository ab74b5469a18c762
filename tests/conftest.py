"""Settings that every test runs under; must run before jax is used."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from absl import flags

_CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "jax"

# `JAXATTN_TEST_X64=0 pytest -m any_x64` is the second run of the suites that
# are written for both modes.
jax.config.update(
  "jax_enable_x64", os.environ.get("JAXATTN_TEST_X64", "1") == "1"
)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

# absl's parameterized test cases read flags; pytest's own are not absl's.
if not flags.FLAGS.is_parsed():
  flags.FLAGS(["pytest"], known_only=True)
