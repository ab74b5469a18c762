"""What every experiment is built from.

An experiment is one function, ``run(config, workdir) -> Verdict``::

  def run(config, workdir):
    wd = harness.open_workdir(workdir, config)
    ratios = [
      wd.point(f"ratio/n={n}", functools.partial(compute, n))["ratio"]
      for n in harness.progress(config.lengths, "lengths")
    ]
    harness.use_style()
    figure, ax = plt.subplots()
    fit = harness.plot_loglog(ax, config.lengths, ratios, label="ratio")
    harness.save_figure(wd, figure, {"ratio": ratios})
    checks = [harness.Check("slope", fit.slope, *config.accepted.slope)]
    return harness.finish(
      wd, claim="...", source="...", paper="...", checks=checks
    )

  if __name__ == "__main__":
    harness.main(run, "the-slug")
"""

from experiments.harness.app import main as main
from experiments.harness.checkpoint import Checkpointer as Checkpointer
from experiments.harness.config import TIERS as TIERS
from experiments.harness.config import UsageError as UsageError
from experiments.harness.config import check_parts as check_parts
from experiments.harness.config import load_config as load_config
from experiments.harness.distributed import device_mesh as device_mesh
from experiments.harness.metrics import MetricsWriter as MetricsWriter
from experiments.harness.metrics import read_metrics as read_metrics
from experiments.harness.plots import PALETTE as PALETTE
from experiments.harness.plots import plot_bounded_errors as plot_bounded_errors
from experiments.harness.plots import plot_loglog as plot_loglog
from experiments.harness.plots import save_figure as save_figure
from experiments.harness.plots import use_style as use_style
from experiments.harness.progress import progress as progress
from experiments.harness.sweeps import sweep_widths as sweep_widths
from experiments.harness.timing import least_seconds as least_seconds
from experiments.harness.train import TrainState as TrainState
from experiments.harness.train import train_loop as train_loop
from experiments.harness.verdict import Check as Check
from experiments.harness.verdict import Verdict as Verdict
from experiments.harness.verdict import decide as decide
from experiments.harness.verdict import finish as finish
from experiments.harness.workdir import Workdir as Workdir
from experiments.harness.workdir import open_workdir as open_workdir

__all__ = [
  "PALETTE",
  "TIERS",
  "Check",
  "Checkpointer",
  "MetricsWriter",
  "TrainState",
  "UsageError",
  "Verdict",
  "Workdir",
  "check_parts",
  "decide",
  "device_mesh",
  "finish",
  "least_seconds",
  "load_config",
  "main",
  "open_workdir",
  "plot_bounded_errors",
  "plot_loglog",
  "progress",
  "read_metrics",
  "save_figure",
  "sweep_widths",
  "train_loop",
  "use_style",
]
