"""Figures say the slope that they show, and carry their data."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments import harness
from jaxattn import scaling
from tests.experiments import toy

X = np.array([256, 512, 1024, 2048, 4096])
Y = 3.0 * X**0.7 * np.exp([0.02, -0.01, 0.0, 0.03, -0.02])


@pytest.fixture
def figure():
  with plt.rc_context():
    harness.use_style()
    figure, ax = plt.subplots()
    yield figure, ax
    plt.close(figure)


def test_plot_loglog_draws_the_fit_and_says_it(figure):
  _, ax = figure
  fit = harness.plot_loglog(ax, X, Y, label="budget")
  assert fit == scaling.fit_slope(X, Y)
  dots, line = ax.get_lines()
  np.testing.assert_allclose(dots.get_ydata(), Y)
  slope = np.diff(np.log(line.get_ydata())) / np.diff(np.log(line.get_xdata()))
  np.testing.assert_allclose(slope, fit.slope, rtol=1e-12)
  low, high = fit.interval
  assert dots.get_label() == (
    f"budget: slope {fit.slope:.3f} [{low:.3f}, {high:.3f}]"
  )
  assert len(ax.get_legend_handles_labels()[1]) == 1
  assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


def test_plot_loglog_labels_the_measured_x(figure):
  canvas, ax = figure
  harness.plot_loglog(ax, X, Y, label="a")
  harness.plot_loglog(ax, X[1:], Y[1:], label="b")
  canvas.canvas.draw()
  labels = [text.get_text() for text in ax.get_xticklabels()]
  assert labels == ["256", "512", "1024", "2048", "4096"]


@pytest.mark.parametrize(
  ("end", "labels"),
  [(900, ["50", "200", "500"]), (9000, []), (2e6, [])],
)
def test_save_figure_labels_few_ticks_between_powers(
  figure, tmp_path, end, labels
):
  canvas, ax = figure
  ax.loglog([25, end], [1, 10])
  harness.save_figure(harness.open_workdir(tmp_path, toy.config()), canvas, {})
  ticks = ax.get_xticklabels(minor=True)
  low, high = ax.get_xlim()
  found = [t.get_text() for t in ticks if low <= t.get_position()[0] <= high]
  assert [text for text in found if text] == labels


def test_save_figure_is_reproducible(figure, tmp_path):
  canvas, ax = figure
  ax.plot(X, Y)
  wd = harness.open_workdir(tmp_path, toy.config())
  names = ("figure.png", "figure.pdf", "figure_data.npz")
  harness.save_figure(wd, canvas, {"x": X, "y": Y})
  first = [(tmp_path / name).read_bytes() for name in names]
  harness.save_figure(wd, canvas, {"x": X, "y": Y})
  assert first == [(tmp_path / name).read_bytes() for name in names]
  assert first[0].startswith(b"\x89PNG")
  assert first[1].startswith(b"%PDF")
  with np.load(tmp_path / "figure_data.npz") as data:
    np.testing.assert_array_equal(data["y"], Y)
  assert not plt.fignum_exists(canvas.number)
