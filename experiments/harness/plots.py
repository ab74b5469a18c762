"""Figures in one style, saved with the data that they show."""

import io
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from experiments.harness import files, points
from experiments.harness import workdir as workdir_lib
from jaxattn.scaling import Slope, fit_slope

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.axis import Axis
  from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart under every common colour blindness, in
# an order that puts strong hues first; yellow is left out (pale on white).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK = "#1b1f24"
MUTED = "#6b7480"
_MAX_TICKS = 9

_STYLE: dict[str, Any] = {
  "axes.axisbelow": True,
  "axes.edgecolor": MUTED,
  "axes.grid": True,
  "axes.grid.which": "major",
  "axes.labelcolor": INK,
  "axes.labelsize": 11,
  "axes.linewidth": 0.8,
  "axes.prop_cycle": f"cycler('color', {list(PALETTE)})",
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.titlelocation": "left",
  "axes.titlepad": 10,
  "axes.titlesize": 12,
  "axes.titleweight": "bold",
  "figure.constrained_layout.use": True,
  "figure.facecolor": "white",
  "figure.figsize": (7.2, 4.6),
  "figure.titlesize": 14,
  "font.family": "DejaVu Sans",
  "font.size": 10.5,
  "grid.color": "#e3e7ec",
  "grid.linewidth": 0.8,
  "legend.fontsize": 9.5,
  "legend.frameon": False,
  "lines.linewidth": 1.9,
  "lines.markersize": 5.5,
  "lines.markeredgecolor": "white",
  "lines.markeredgewidth": 0.7,
  "mathtext.fontset": "dejavusans",
  "pdf.fonttype": 42,
  "savefig.dpi": 160,
  "text.color": INK,
  "xtick.color": MUTED,
  "xtick.labelcolor": INK,
  "ytick.color": MUTED,
  "ytick.labelcolor": INK,
}


def use_style() -> None:
  """Sets matplotlib's defaults for this process, and the Agg backend."""
  import matplotlib
  import matplotlib.style

  matplotlib.use("Agg")
  matplotlib.style.use(["default", _STYLE])


def plot_loglog(ax: "Axes", x: ArrayLike, y: ArrayLike, *, label: str) -> Slope:
  """Draws points on log-log axes with their power law.

  Args:
    ax: axes to draw on.
    x: (n,) positive numbers.
    y: (n,) positive numbers.
    label: what the points are; the legend adds the exponent and its 95 %
      interval.

  Returns:
    The fit of :func:`jaxattn.scaling.fit_slope`.
  """
  x, y = np.asarray(x), np.asarray(y)
  fit = fit_slope(x, y)
  low, high = (float(v) for v in fit.interval)
  text = f"{label}: slope {float(fit.slope):.3f} [{low:.3f}, {high:.3f}]"
  (dots,) = ax.loglog(x, y, "o", label=text)
  ends = np.array([x.min(), x.max()], float)
  line = np.exp(float(fit.intercept)) * ends ** float(fit.slope)
  # Under the dots, and no entry of its own in the legend.
  ax.loglog(
    ends, line, color=dots.get_color(), alpha=0.55, zorder=dots.zorder - 1
  )
  _label_values(ax)
  return fit


def plot_bounded_errors(
  ax: "Axes", x: ArrayLike, errors: ArrayLike, bounds: ArrayLike, labels: Any
) -> None:
  """Draws errors as dots, and the bounds that they are under as dashed lines.

  Args:
    ax: axes to draw on.
    x: (n,) numbers.
    errors: (n, curves) largest errors of an output.
    bounds: (n, curves).
    labels: what the curves are.
  """
  curves = (np.asarray(y).T for y in (errors, bounds))
  for error, bound, label, color in zip(*curves, labels, PALETTE, strict=False):
    ax.semilogy(x, bound, "--", color=color)
    ax.semilogy(x, error, "o", color=color, label=label)
  ax.set(
    title="Error stays below its bound (dashed)",
    ylabel="largest error of the output",
  )


def save_figure(
  workdir: workdir_lib.Workdir, figure: "Figure", data: Mapping[str, Any]
) -> None:
  """Writes ``figure.png``, ``figure.pdf`` and ``figure_data.npz``.

  Args:
    workdir: the run's folder.
    figure: what to save; it is closed afterwards.
    data: the arrays that the figure shows, by name.
  """
  import matplotlib.pyplot as plt

  for ax in figure.axes:
    _thin_labels(ax.xaxis)
    _thin_labels(ax.yaxis)
  if jax.process_index() == 0:
    _save(figure, workdir.path / "figure.png", {})
    # No date, so that the same data give the same file.
    _save(figure, workdir.path / "figure.pdf", {"CreationDate": None})
    payload = points.encode_point(data)
    files.write_bytes(workdir.path / "figure_data.npz", payload)
  plt.close(figure)


def _label_values(ax: "Axes") -> None:
  """Labels the x that were measured, if they are few, and no others."""
  from matplotlib import ticker

  dots = [d for d in ax.get_lines() if d.get_marker() == "o"]
  values = np.unique(np.concatenate([np.asarray(d.get_xdata()) for d in dots]))
  if values.size <= _MAX_TICKS:
    ax.xaxis.set_major_locator(ticker.FixedLocator(list(values)))
    ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_locator(ticker.NullLocator())


def _thin_labels(axis: "Axis") -> None:
  """Labels 2 and 5 between powers of ten if these are few: more would touch."""
  from matplotlib import ticker

  if not isinstance(axis.get_minor_formatter(), ticker.LogFormatter):
    return
  low, high = axis.get_view_interval()
  labels = {2, 5} if high / low < 100 else set[int]()
  powers = axis.get_major_formatter()

  def label(x: float, place: int | None) -> str:
    digit = round(x / 10.0 ** np.floor(np.log10(x) + 1e-9))
    if digit not in labels:
      return ""
    return f"{x:g}" if 1e-3 <= x < 1e5 else powers(x, place)

  axis.set_minor_formatter(ticker.FuncFormatter(label))


def _save(
  figure: "Figure", path: pathlib.Path, metadata: dict[str, None]
) -> None:
  buffer = io.BytesIO()
  figure.savefig(buffer, format=path.suffix[1:], metadata=metadata)
  files.write_bytes(path, buffer.getvalue())
