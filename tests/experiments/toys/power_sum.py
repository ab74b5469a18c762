"""A sweep: sums of the first n squares grow like n^3."""

import functools
import os
import time

import jax.numpy as jnp
import matplotlib.pyplot as plt
import ml_collections

from experiments import harness


def square_sum(n: int, pause: float) -> dict[str, object]:
  time.sleep(pause)
  squares = jnp.arange(1, n + 1, dtype=jnp.float32) ** 2
  return {"sum": jnp.sum(squares), "largest": squares[-3:]}


def run(
  config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]
) -> harness.Verdict:
  wd = harness.open_workdir(workdir, config)
  sums = []
  for n in harness.progress(config.lengths, "lengths"):
    compute = functools.partial(square_sum, n, config.pause)
    sums.append(wd.point(f"sum/n={n}", compute)["sum"])
    wd.metrics.write(n, sum=sums[-1])
  harness.use_style()
  figure, ax = plt.subplots()
  fit = harness.plot_loglog(ax, config.lengths, sums, label="sum of squares")
  ax.set(xlabel="n", ylabel="sum", title="Sums of the first n squares")
  ax.legend()
  harness.save_figure(wd, figure, {"n": config.lengths, "sum": sums})
  return harness.finish(
    wd,
    claim="The sum of the first n squares grows like n³.",
    source="Faulhaber's formula",
    paper="3",
    checks=[
      harness.Check("slope", fit.slope, *config.accepted.slope),
      harness.Check("sum at the longest length", sums[-1]),
    ],
  )


if __name__ == "__main__":
  harness.main(run, "power-sum")
