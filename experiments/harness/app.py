"""The command line of an experiment, the same for all of them.

``python -m experiments.<system> --config=configs/<system>.py:<tier>
--workdir=DIR [--config.<field>=value ...]`` ends with status 0 if the claim
was reproduced, 3 if not, 4 if that stays open, 2 if the call was wrong and 1
if the run crashed.
"""

import contextlib
import functools
import logging
import os
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from experiments.harness import config as config_lib
from experiments.harness import distributed
from experiments.harness import verdict as verdict_lib

RunFn = Callable[
  [ml_collections.ConfigDict, "str | os.PathLike[str]"], verdict_lib.Verdict
]

EXIT_STATUS = {
  verdict_lib.REPRODUCED: 0,
  verdict_lib.NOT_REPRODUCED: 3,
  verdict_lib.INCONCLUSIVE: 4,
}
BAD_USAGE = 2

_CONFIG_HELP = "path/to/config.py:TIER"


def main(run: RunFn, slug: str) -> None:
  """Runs an experiment as a program and exits with its status.

  Args:
    run: ``(config, workdir) -> Verdict``.
    slug: the system that ``run`` is about.
  """
  app.run(
    functools.partial(_run_and_report, run),
    flags_parser=functools.partial(parse_flags, slug=slug),
  )


def default_cache_dir() -> pathlib.Path:
  """Returns the folder of the compile cache that all experiments share."""
  base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(base) / "jaxattn" / "jax"


def parse_flags(
  argv: Sequence[str],
  *,
  slug: str,
  flag_values: flags.FlagValues = flags.FLAGS,
) -> ml_collections.ConfigDict:
  """Parses the command line; a mistake ends the program with status 2.

  Args:
    argv: program name and arguments.
    slug: the system that the configuration must be about.
    flag_values: where the flags are defined and their values kept.

  Returns:
    The configuration with its overrides.
  """
  _define_flags(flag_values)
  try:
    return _parse(list(argv), slug, flag_values)
  except (flags.Error, config_lib.UsageError) as error:
    sys.exit(_complain(error))


def describe(verdict: verdict_lib.Verdict) -> str:
  """Writes a verdict as a few lines for the terminal."""
  lines = [f"claim     {verdict.claim}", f"source    {verdict.source}"]
  lines += [f"paper     {verdict.paper}"]
  for name, value in (verdict.measured | verdict.timed).items():
    accepted = verdict.accepted.get(name)
    wanted = (
      f"  (accepted {verdict_lib.describe_range(accepted)})" if accepted else ""
    )
    lines.append(f"measured  {name} = {value:.6g}{wanted}")
  seconds = f"{verdict.seconds:.1f} s"
  return "\n".join([*lines, f"verdict   {verdict.verdict}  ({seconds})"])


def _define_flags(values: flags.FlagValues) -> None:
  text = functools.partial(flags.DEFINE_string, flag_values=values)
  switch = functools.partial(flags.DEFINE_bool, flag_values=values)
  number = functools.partial(flags.DEFINE_integer, flag_values=values)
  text("workdir", None, "Folder for everything that this run writes.")
  text("compile_cache", None, "Folder of compiled programs, if not the shared.")
  switch("profile", False, "Trace the run into WORKDIR/profile.")
  switch("debug_nans", False, "Stop at the operation that makes a NaN.")
  switch("distributed", False, "Join the processes of a cluster.")
  text("coordinator_address", None, "host:port of process 0, if no cluster.")
  number("num_processes", None, "How many there are, if no cluster.")
  number("process_id", None, "Which one this is, if no cluster.")
  number("initialization_timeout", 300, "Seconds to wait for the others.")
  # So that --help lists them: they are this program's, not a library's.
  for flag in values.get_flags_for_module(__name__):
    values.register_key_flag_for_module(sys.argv[0], flag)


def _parse(
  argv: list[str], slug: str, values: flags.FlagValues
) -> ml_collections.ConfigDict:
  spec, argv = _split_off_config(argv, slug, values)
  config = config_lib.load_config(spec)
  if config.slug != slug:
    raise config_lib.UsageError(
      f"--config={spec} is about {config.slug}, this program about {slug}"
    )
  default = config.copy_and_resolve_references()
  _check_field_names(argv, default)
  config_flags.DEFINE_config_dict(
    "config", config, _CONFIG_HELP, values, sys_argv=argv
  )
  try:
    rest = values(argv)
  except flags.IllegalFlagValueError as error:
    raise config_lib.UsageError(
      f"{error}; {config_lib.describe_fields(default)}"
    ) from error
  if len(rest) > 1:
    raise config_lib.UsageError(f"unexpected arguments {rest[1:]}")
  if not values.workdir:
    raise config_lib.UsageError("--workdir=DIR is required")
  config_lib.check_overrides(values.config, default)
  return values.config


def _split_off_config(
  argv: list[str], slug: str, values: flags.FlagValues
) -> tuple[str, list[str]]:
  # A parse of its own: only with the config at hand can its fields be flags.
  early = flags.FlagValues()
  flags.DEFINE_string("config", None, _CONFIG_HELP, flag_values=early)
  early.set_gnu_getopt(True)
  rest = early(argv, known_only=True)
  if early.config:
    return early.config, rest
  values(argv, known_only=True)  # --help needs no config
  raise config_lib.UsageError(
    f"--config is required, as --config=configs/{slug.replace('-', '_')}.py:"
    f"TIER with TIER one of {', '.join(config_lib.TIERS)}"
  )


def _check_field_names(
  argv: list[str], default: ml_collections.ConfigDict
) -> None:
  names = config_lib.field_names(default)
  for argument in argv:
    match = re.match(r"--?(?:no)?config\.([^=\[]+)", argument)
    if match and match[1] not in names:
      raise config_lib.UsageError(
        f"unknown field config.{match[1]}; "
        + config_lib.describe_fields(default)
      )


def _run_and_report(run: RunFn, config: ml_collections.ConfigDict) -> int:
  _set_up_logging()
  try:
    _set_up_jax()
    with _profiler():
      verdict = run(config, flags.FLAGS.workdir)
  except config_lib.UsageError as error:
    return _complain(error)
  if jax.process_index() == 0:
    print(describe(verdict))
  return EXIT_STATUS[verdict.verdict]


def _set_up_logging() -> None:
  # Our lines are shown; of absl's, which orbax writes by the dozen, only
  # warnings.
  absl_logging.set_verbosity(absl_logging.WARNING)
  logging.getLogger("experiments").setLevel(logging.INFO)


def _set_up_jax() -> None:
  cache = flags.FLAGS.compile_cache or str(default_cache_dir())
  jax.config.update("jax_compilation_cache_dir", cache)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_debug_nans", flags.FLAGS.debug_nans)
  if flags.FLAGS.distributed:
    distributed.initialize(
      flags.FLAGS.coordinator_address,
      flags.FLAGS.num_processes,
      flags.FLAGS.process_id,
      flags.FLAGS.initialization_timeout,
    )


def _profiler() -> contextlib.AbstractContextManager[Any]:
  if not flags.FLAGS.profile:
    return contextlib.nullcontext()
  return jax.profiler.trace(pathlib.Path(flags.FLAGS.workdir) / "profile")


def _complain(error: Exception) -> int:
  print(f"{pathlib.Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
  return BAD_USAGE
