"""Every mistake in a call is answered with the list of what there is."""

import re
import sys

import pytest
from absl import flags
from absl.testing import parameterized

from experiments.harness import app
from experiments.harness import config as config_lib
from tests.experiments import processes

CONFIG = "tests/experiments/toys/configs/power_sum.py"


def _parse(*arguments):
  return app.parse_flags(
    ["power_sum", *arguments], slug="power-sum", flag_values=flags.FlagValues()
  )


class LoadConfigTest(parameterized.TestCase):
  def test_tiers_reach_get_config(self):
    spec = str(processes.ROOT / CONFIG)
    for tier in config_lib.TIERS:
      self.assertEqual(config_lib.load_config(f"{spec}:{tier}").tier, tier)
    self.assertEqual(config_lib.load_config(spec).tier, "cpu")

  def test_loaded_config_is_locked(self):
    config = config_lib.load_config(str(processes.ROOT / CONFIG))
    with self.assertRaisesRegex(AttributeError, "lenghts"):
      config.lenghts = (1,)

  def test_refuses_missing_file_with_those_there_are(self):
    with self.assertRaisesRegex(
      config_lib.UsageError, r"no config file .*nix\.py; .*power_sum\.py"
    ):
      config_lib.load_config(str(processes.ROOT / CONFIG[:-12]) + "nix.py:cpu")

  def test_refuses_unknown_tier_with_those_there_are(self):
    with self.assertRaisesRegex(
      config_lib.UsageError, "unknown tier 'gpu'.*smoke, cpu, full"
    ):
      config_lib.load_config(f"{CONFIG}:gpu")


@pytest.mark.parametrize(
  ("body", "message"),
  [
    ("", r"must define get_config\(tier\)"),
    ("{'tier': 'cpu'}", "string field 'slug'"),
    ("{'slug': 's', 'tier': 'gpu'}", "one of smoke, cpu, full, got 'gpu'"),
    (
      "{'slug': 's', 'tier': 'cpu', 'a': {'b': (1.0, float('inf'))}}",
      r"config\.a\.b\[1\] must be finite, got inf",
    ),
  ],
)
def test_refuses_malformed_config(tmp_path, body, message):
  path = tmp_path / "toy.py"
  path.write_text(
    "import ml_collections\n"
    f"def get_config(tier='cpu'): return ml_collections.ConfigDict({body})"
    if body
    else ""
  )
  with pytest.raises(config_lib.UsageError, match=message):
    config_lib.load_config(str(path))


def test_flags_override_fields(monkeypatch):
  monkeypatch.chdir(processes.ROOT)
  config = _parse(
    f"--config={CONFIG}:smoke",
    "--workdir=somewhere",
    "--config.pause=1",
    "--config.lengths=(8,16)",
    "--config.accepted.slope=(1.0,2)",
    "--noconfig.draw",
    "--config.label",
    "cubes",
  )
  assert config.tier == "smoke"
  assert (config.pause, config.lengths) == (1.0, (8, 16))
  assert config.accepted.slope == (1.0, 2)
  assert (config.draw, config.label) == (False, "cubes")


FIELDS = r"the fields are:\n  config.accepted.slope = \(2.98, 3.02\)"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "--config is required, as --config=configs/power_sum.py:TIER with"),
    (["--config=nix.py"], "no config file nix.py"),
    ([f"--config={CONFIG}:gpu"], "unknown tier 'gpu'"),
    ([f"--config={CONFIG}"], "--workdir=DIR is required"),
    ([f"--config={CONFIG}", "--workdir=w", "--bogus"], "flag 'bogus'"),
    ([f"--config={CONFIG}", "--workdir=w", "stray"], r"arguments \['stray'\]"),
    (
      [f"--config={CONFIG.replace('power_sum', 'descent')}", "--workdir=w"],
      "is about descent, this program about power-sum",
    ),
    (
      [f"--config={CONFIG}", "--workdir=w", "--config.lenght=3"],
      "unknown field config.lenght; " + FIELDS,
    ),
    (
      [f"--config={CONFIG}", "--workdir=w", "--config.accepted.slop=3"],
      "unknown field config.accepted.slop; " + FIELDS,
    ),
    (
      [f"--config={CONFIG}", "--workdir=w", "--config.pause=nan"],
      "config.pause must be finite, got nan; " + FIELDS,
    ),
    (
      [f"--config={CONFIG}", "--workdir=w", "--config.pause=soon"],
      "could not convert string to float: 'soon'; " + FIELDS,
    ),
    (
      [f"--config={CONFIG}", "--workdir=w", "--config.lengths=(8,'a')"],
      r"config.lengths must hold int, got 'a' in \(8, 'a'\)",
    ),
    (
      [f"--config={CONFIG}", "--workdir=w", "--config.lengths=(8,1.5)"],
      "config.lengths must hold int, got 1.5",
    ),
    (
      [f"--config={CONFIG}", "--workdir=w", "--config.tier=full"],
      "config.tier cannot be set by a flag",
    ),
  ],
)
def test_bad_usage_ends_with_status_2(monkeypatch, capsys, arguments, message):
  monkeypatch.chdir(processes.ROOT)
  with pytest.raises(SystemExit) as ended:
    _parse(*arguments)
  assert ended.value.code == 2
  assert re.search(message, capsys.readouterr().err)


def test_help_needs_no_config(capsys):
  values = flags.FlagValues()
  with pytest.raises(SystemExit):
    app.parse_flags(["toy", "--nothing"], slug="toy", flag_values=values)
  names = values.get_key_flags_for_module(sys.argv[0])
  assert {"workdir", "profile"} <= {flag.name for flag in names}
  assert "--config is required" in capsys.readouterr().err
