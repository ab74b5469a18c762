"""How fast are tangent kernels beside neural-tangents?

Version 0.6.5 does not import on a JAX that this package runs on, so it runs in
an environment of its own, which ``make bench-nt`` installs, as a
process that is asked for one kernel at a time. Each race takes in what the two
need to speak to each other, some tenths of a millisecond, on their side.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import jax
import numpy as np
from absl import app

from benchmarks import _race
from benchmarks.empirical_ntk import SIZES, STRUCTURED_BAR, setup
from benchmarks.softmax_ntk import KERNEL_BAR
from benchmarks.softmax_ntk import setup as softmax_setup
from jaxattn.models import mlp_with_taps
from jaxattn.ntk import empirical_ntk, mlp_ntk, softmax, structured_ntk

_ENVIRONMENT = f"{sys.prefix.removesuffix('-bench')}-nt"
_CONTRACTION = "JACOBIAN_CONTRACTION"
# ``jacobian`` may take 1.5 times what their contraction takes.
_JACOBIAN_BAR = 1 / 1.5
_SAME = 1e-5
# In float32 stax is off by 2e-5 of its own kernel in float64, ours by 1e-7.
_SAME_INFINITE = 1e-4


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  with tempfile.TemporaryDirectory() as folder:
    peer = Peer(pathlib.Path(folder))
    rows = [
      row for i in range(len(SIZES)) for row in finite(peer, f"mlp{i}", i)
    ]
    rows.append(two_layer(peer, 256, 4096, 64))
    rows.append(infinite(peer, 64, 256, 3))
    title = f"Tangent kernels beside {peer.versions}"
    peer.close()
  _race.publish("against_neural_tangents", title, rows)


class Peer:
  """The other process, and the folder in which networks are handed over."""

  def __init__(self, folder: pathlib.Path):
    """Starts it."""
    self._folder = folder
    script = pathlib.Path(__file__).with_name("_neural_tangents_peer.py")
    self._process = subprocess.Popen(
      [f"{_ENVIRONMENT}/bin/python", "-PWignore", script, folder],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    self.versions = self._answer()

  def close(self) -> None:
    """Ends it."""
    assert self._process.stdin is not None
    self._process.stdin.close()
    self._process.wait()

  def give(self, name: str, x: Any, *params: Any) -> None:
    """Hands over a network and data."""
    arrays = dict(enumerate((x, *params)))
    np.savez(
      self._folder / f"{name}.npz", **{f"{i:03}": y for i, y in arrays.items()}
    )

  def kernel(self, name: str, method: str) -> None:
    """Computes a kernel, there."""
    assert self._process.stdin is not None
    print(name, method, file=self._process.stdin, flush=True)
    self._answer()

  def result(self, name: str, method: str) -> np.ndarray:
    """What it computed."""
    self.kernel(name, method)
    return np.load(self._folder / f"{name}_{method}.npy")

  def _answer(self) -> str:
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError("neural-tangents ended; its error is above")
    return line.strip()


def finite(peer: Peer, name: str, which: int) -> list[_race.Row]:
  """Kernels of a network, in our ways and in theirs."""
  dim, widths, n = SIZES[which]
  model, params, x = setup(dim, widths, n)
  weights = [
    params["params"][f"layer_{i}"]["kernel"] for i in range(len(widths))
  ]
  peer.give(name, x, *weights)
  methods = {"contraction": _CONTRACTION, "vectors": "NTK_VECTOR_PRODUCTS"}
  ours = structured_ntk(mlp_with_taps, params, x)
  for method in methods.values():
    # Theirs has data, data, outputs, outputs.
    _same(ours.transpose(0, 2, 1, 3), peer.result(name, method))
  seconds = _race.race(
    {
      "structured": lambda: structured_ntk(mlp_with_taps, params, x),
      "jacobian": lambda: empirical_ntk(model.apply, params, x),
      **{
        key: lambda method=method: peer.kernel(name, method)
        for key, method in methods.items()
      },
    },
    rounds=5,
  )
  shape = "-".join(map(str, (dim, *widths)))
  questions = (
    ("contraction", "structured", STRUCTURED_BAR),
    ("contraction", "jacobian", _JACOBIAN_BAR),
    ("vectors", "structured", None),
  )
  return [
    _race.ratio(
      f"{shape}, n = {n}: {methods[theirs]} / {ours}",
      seconds,
      ours,
      theirs,
      bar,
    )
    for theirs, ours, bar in questions
  ]


def two_layer(peer: Peer, n: int, m: int, d: int) -> _race.Row:
  """The kernel of a softmax network: a formula against derivatives."""
  params, x = softmax_setup(n, m, d)
  peer.give("softmax", x, params.hidden, params.output)
  ours = softmax.ntk(params, x)
  _same(ours.transpose(0, 2, 1, 3), peer.result("softmax", "softmax"))
  seconds = _race.race(
    {
      "ours": lambda: softmax.ntk(params, x),
      "theirs": lambda: peer.kernel("softmax", "softmax"),
    },
    rounds=5,
  )
  name = f"softmax network, n = {n}, m = {m}, d = {d}: {_CONTRACTION} / ours"
  return _race.ratio(name, seconds, "ours", "theirs", KERNEL_BAR)


def infinite(peer: Peer, dim: int, n: int, depth: int) -> _race.Row:
  """Closed forms of infinite width."""
  x = setup(dim, (1,), n)[2]
  peer.give("stax", x, *[np.zeros((1, 1))] * (depth + 1))
  theirs = peer.result("stax", "stax")
  _same(mlp_ntk(x, depth=depth)[1], theirs, _SAME_INFINITE)
  seconds = _race.race(
    {
      "ours": lambda: mlp_ntk(x, depth=depth),
      "theirs": lambda: peer.kernel("stax", "stax"),
    }
  )
  name = f"{depth} hidden layers of infinite width, n = {n}: stax / ours"
  return _race.ratio(name, seconds, "ours", "theirs")


def _same(
  ours: jax.Array, theirs: np.ndarray, tolerance: float = _SAME
) -> None:
  off = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
  if not off < tolerance:
    raise RuntimeError(f"kernels differ by {off}")


if __name__ == "__main__":
  app.run(main)
