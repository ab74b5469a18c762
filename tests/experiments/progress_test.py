"""Progress is a bar on a terminal and log lines elsewhere."""

import io
import logging
import sys

from experiments import harness
from experiments.harness import app


class _Terminal(io.StringIO):
  def isatty(self):
    return True


def test_lines_elsewhere(caplog):
  with caplog.at_level(logging.INFO, "experiments"):
    assert list(harness.progress((3, 1, 2), "widths")) == [3, 1, 2]
  assert caplog.messages == ["widths: 1 of 3", "widths: all 3 done"]


def test_bar_on_a_terminal(monkeypatch, caplog):
  terminal = _Terminal()
  monkeypatch.setattr(sys, "stderr", terminal)
  with caplog.at_level(logging.INFO, "experiments"):
    assert list(harness.progress((3, 1, 2), "widths")) == [3, 1, 2]
  assert "widths" in terminal.getvalue()
  assert "100%" in terminal.getvalue()
  assert not caplog.messages


def test_cache_is_in_the_users_cache_directory(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert app.default_cache_dir() == tmp_path / "jaxattn" / "jax"
  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setenv("HOME", str(tmp_path))
  assert app.default_cache_dir() == tmp_path / ".cache" / "jaxattn" / "jax"
