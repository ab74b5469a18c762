"""The self-check tells right kernels from wrong ones, and always goes on."""

import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from absl import flags

import jaxattn
from jaxattn import selfcheck
from jaxattn._selfcheck import checks, operations

_ROOT = pathlib.Path(__file__).parents[1]
_FLASH, *_, _SMALL_CACHE = operations.OPERATIONS


def _planted(name="planted", **by_implementation):
  """An operation whose implementations are right but for those given."""

  def fn(*operands, implementation):
    change = by_implementation.get(implementation, lambda x: x)
    return change(_FLASH.reference(*operands))

  shapes = ((1, 7, 2, 4),) * 3
  return _FLASH._replace(
    name=name, fn=fn, shapes=shapes, tiny=shapes, is_exact=False
  )


def _failing(error):
  def fail(*operands):
    raise error

  return fail


def _rows(operation, dtypes=("float32",)):
  return list(selfcheck.selfcheck([operation], dtypes))


def _verdicts(operation):
  return [row.verdict for row in _rows(operation)]


@pytest.fixture
def compiled(monkeypatch):
  """As where kernels are compiled."""
  monkeypatch.setattr(checks, "how_kernels_run", lambda: "pallas")


def test_every_kernel_is_checked():
  folders = (_ROOT / "pallas_kernels").glob("*/api.py")
  assert {path.parent.name for path in folders} == {
    operation.name for operation in operations.OPERATIONS
  }


def test_a_kernel_is_held_against_its_reference_and_not_timed():
  rows = _rows(_FLASH, checks.DTYPES)
  assert [(row.dtype, row.direction) for row in rows] == [
    ("float32", "forward"),
    ("float32", "gradient"),
    ("bfloat16", "forward"),
    ("bfloat16", "gradient"),
  ]
  for row in rows:
    assert row.implementation == "pallas_interpret"
    assert row.shape == "1x1100x2x8, 1x1100x1x8"
    assert row.verdict == "ok"
    eps = float(jnp.finfo(row.dtype).eps)
    assert eps / 100 < row.error <= min(row.bound, 20 * eps)
    assert (row.seconds, row.peer, row.ratio) == (None, "", None)


def test_table_names_the_machine_and_all_columns(capsys):
  assert selfcheck.main([_planted()]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith(f"jaxattn {jaxattn.__version__}, ")
  assert f"jax {jax.__version__}, jaxlib " in lines[0]
  assert lines[0].endswith("; platform cpu, device cpu")
  assert "no time is claimed" in lines[2]
  header, rule, *rows = lines[4:8]
  assert header == (
    "| operation | direction | dtype | shape | implementation | largest error "
    "(bound) | median ms | peer | peer / ours | verdict |"
  )
  assert rule == "|" + " --- |" * 10
  assert rows[0].startswith(
    "| planted | forward | float32 | 1x7x2x4 | pallas_interpret | 0.0e+00 "
    "(2.0e-04) | not timed | – | – | ok |"
  )
  assert rows[1].startswith("| planted | gradient | float32 |")
  assert lines[-1] == "4 rows: 4 ok, 0 wrong, 0 not supported"


@pytest.mark.parametrize(
  ("change", "forward"),
  [
    (lambda x: x * 1.001, "WRONG"),
    (lambda x: x.at[0, 0, 0, 0].set(jnp.nan), "WRONG"),
    # Right numbers, and a gradient that is not theirs.
    (lambda x: x + (x - jax.lax.stop_gradient(x)), "ok"),
  ],
)
def test_a_wrong_kernel_is_reported_and_the_rest_checked(
  change, forward, capsys
):
  wrong = _planted("broken", pallas_interpret=change)
  assert _verdicts(wrong) == [forward, "WRONG"]
  assert selfcheck.main([wrong, _planted()]) == 1
  *_, last = capsys.readouterr().out.splitlines()
  assert last.startswith("8 rows: ")
  assert not last.endswith(" 0 wrong, 0 not supported")


@pytest.mark.parametrize(
  ("error", "verdict"),
  [
    (
      RuntimeError("Mosaic\n failed: a | b"),
      "WRONG: RuntimeError: Mosaic failed: a | b",
    ),
    # What a compiler lacks was not known beforehand.
    (
      NotImplementedError("no rule for sin"),
      "WRONG: NotImplementedError: no rule for sin",
    ),
    (
      NotImplementedError("'pallas' cannot run here: H is 5"),
      "not supported: H is 5",
    ),
    (ValueError("x" * 1000), "WRONG: ValueError: " + "x" * 157 + "..."),
  ],
)
def test_a_kernel_that_raises_is_a_row(error, verdict, capsys):
  raising = _planted("raising", pallas_interpret=_failing(error))
  assert _verdicts(raising) == [verdict] * 2
  assert selfcheck.main([raising, _planted()]) == verdict.startswith("WRONG")
  cell = verdict.replace("|", "\\|")
  out = capsys.readouterr().out
  assert out.count(f" | – | not timed | – | – | {cell} |") == 4
  assert out.count("| planted |") == 4


def test_a_reference_that_raises_is_two_rows():
  operation = _planted()._replace(reference=_failing(RuntimeError("memory")))
  want = "WRONG: the reference failed: RuntimeError: memory"
  assert _verdicts(operation) == [want] * 2


def test_compiled_kernels_are_timed_against_the_best_peer(compiled):
  for row in _rows(_planted()):
    assert row.verdict == "ok"
    assert row.implementation == "pallas"
    assert row.peer == "xla"
    assert min(row.seconds, row.ratio) > 0
  # A wrong result has no time, and is no peer.
  assert _rows(_planted(pallas=lambda x: 2 * x))[0].seconds is None
  row = _rows(_planted(xla=lambda x: 2 * x))[0]
  assert (row.peer, row.ratio) == ("not xla: error 1.0e+00", None)
  assert row.seconds > 0
  row = _rows(_planted(xla=_failing(RuntimeError("memory"))))[0]
  assert row.peer == "not xla: RuntimeError: memory"
  assert row.verdict == "ok"


def _small(operation):
  return tuple(
    (1, 16, *shape[2:]) if len(shape) == 4 else shape
    for shape in operation.tiny
  )


_ALL = pytest.mark.parametrize(
  "operation", operations.OPERATIONS, ids=lambda o: o.name
)


@_ALL
def test_an_operation_is_what_its_reference_says(operation):
  assert _verdicts(operation._replace(tiny=_small(operation))) == ["ok", "ok"]


@_ALL
def test_a_platform_without_the_kernel_is_told(compiled, operation):
  for verdict in _verdicts(operation._replace(shapes=_small(operation))):
    assert verdict.startswith("not supported: it needs a TPU")


@pytest.mark.parametrize(
  ("device", "want"),
  [
    ({"platform": "cpu"}, "pallas_interpret"),
    ({"platform": "gpu", "compute_capability": "7.5"}, "pallas_interpret"),
    ({"platform": "gpu", "compute_capability": "9.0"}, "pallas"),
    ({"platform": "tpu"}, "pallas"),
  ],
)
def test_kernels_are_compiled_where_there_are_some(monkeypatch, device, want):
  devices = [types.SimpleNamespace(**device)]
  monkeypatch.setattr(jax, "local_devices", lambda: devices)
  monkeypatch.setattr(jax, "default_backend", lambda: device["platform"])
  assert checks.how_kernels_run() == want


def test_peers_of_a_gpu_and_of_tokamax(monkeypatch, tmp_path):
  assert list(operations.peers(_FLASH)) == ["xla"]
  module = "from jax.nn import dot_product_attention"
  (tmp_path / "tokamax.py").write_text(module)
  monkeypatch.syspath_prepend(tmp_path)
  # What is imported here is forgotten at the end.
  monkeypatch.setitem(sys.modules, "tokamax", None)
  monkeypatch.delitem(sys.modules, "tokamax")
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert list(operations.peers(_planted())) == ["xla"]
  for operation in (_FLASH, _SMALL_CACHE):
    peers = operations.peers(operation)
    assert list(peers) == ["xla", "cudnn", "tokamax"]
  q = jnp.arange(24.0).reshape(1, 3, 2, 4)
  assert jnp.allclose(peers["tokamax"](q, q, q), _FLASH.reference(q, q, q))


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--onyl=flash_attention", "Unknown command line flag 'onyl'"),
    ("--only=flash_attention,flash", "there is no flash\n"),
    ("--only=", "there is no operation"),
    ("flash_attention", "there is no flash_attention"),
  ],
)
def test_bad_calls_are_refused_with_the_usage(argument, message, capsys):
  with pytest.raises(SystemExit) as ended:
    selfcheck.parse_flags(["selfcheck", argument], flags.FlagValues())
  assert ended.value.code == 2
  said = capsys.readouterr().err
  assert message in said
  assert "usage: python -m jaxattn.selfcheck [--only=NAME,...]" in said
  assert all(operation.name in said for operation in operations.OPERATIONS)


def test_flags_choose():
  argv = ["selfcheck", "--only=relu_attention,flash_attention"]
  chosen = selfcheck.parse_flags(argv, flags.FlagValues())
  names = [operation.name for operation in chosen]
  assert names == ["flash_attention", "relu_attention"]


def test_command_ends_with_its_status():
  done = subprocess.run(
    [sys.executable, "-m", "jaxattn.selfcheck", "--onyl=x"],
    capture_output=True,
    text=True,
    cwd=_ROOT,
  )
  assert done.returncode == 2, done.stderr
  assert "Unknown command line flag 'onyl'" in done.stderr
