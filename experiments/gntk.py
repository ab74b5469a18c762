"""Graph kernels: trained networks, small graphs, molecules, a club of karate.

Five questions about arXiv 2309.07452 and 1905.13192:

1. Are networks of growing width, trained by gradient descent, what regression
   with the kernel says, for graphs and for the nodes of one?
2. How much of two numbers that a graph has, spanning trees and algebraic
   connectivity, does the kernel explain, beside counts of colors?
3. How well does it predict enthalpies of molecules?
4. Into which of two clubs do the members of one go, from two labels?
5. Data sets that the user has: ten-fold accuracy of an SVM.
"""

import functools
import itertools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import networkx
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import harness
from jaxattn.data import from_networkx, load_g2_molecules, load_tu, pad_graphs
from jaxattn.models import gnn_apply, gnn_init, gnn_with_taps, train_gnn
from jaxattn.ntk import (
  GraphBatch,
  descent_test,
  graph_gntk,
  kernel_factor,
  node_gntk,
  structured_ntk,
)
from jaxattn.numerics import (
  kernel_ridge_fit,
  kernel_ridge_predict,
  loo_residuals,
)
from jaxattn.scaling import fit_slope

_LEVELS = ("graphs", "nodes")
_TARGETS = ("log spanning trees", "algebraic connectivity")
# A ConfigDict: what type a field has is known at run time only.
Config = Any
_nodes_with_taps = functools.partial(gnn_with_taps, readout="node")


def run(config: Config, workdir: str | os.PathLike[str]) -> harness.Verdict:
  """Runs the experiment; see the module's docstring."""
  paths = tu_folders(config.tu)
  wd = harness.open_workdir(workdir, config)
  gaps = {level: _gaps(wd, level) for level in _LEVELS}
  atlas = wd.point("atlas", functools.partial(atlas_point, config))
  molecules = wd.point("molecules", functools.partial(molecules_point, config))
  club = wd.point("club", functools.partial(club_point, config))
  sets = {
    name: wd.point(f"tu/{name}", functools.partial(tu_point, config, path))
    for name, path in paths.items()
  }
  large = wd.point("large", functools.partial(large_point, config))
  figure = _draw(config, gaps, atlas, molecules, club)
  data = {
    **{f"{k}, {level}": x for level, g in gaps.items() for k, x in g.items()},
    **{f"atlas, {key}": x for key, x in atlas.items()},
    **{f"molecules, {key}": x for key, x in molecules.items()},
    **{f"club, {key}": x for key, x in club.items()},
    "widths": config.widths,
  }
  harness.save_figure(wd, figure, data)
  return harness.finish(
    wd,
    claim=(
      "Regression with the graph neural tangent kernel is what an infinitely "
      "wide graph network comes to by gradient descent, for graphs and for "
      "nodes."
    ),
    source="arXiv:2309.07452, abstract; kernel of arXiv:1905.13192",
    paper="equivalence at infinite width (no numbers)",
    checks=[
      *_gap_checks(config, gaps),
      *_atlas_checks(config, atlas),
      *_reported(config, molecules, club, sets, large),
    ],
    timed=[
      harness.Check("seconds of the large matrix, compiled anew", x)
      for k, x in large.items()
      if k == "seconds"
    ],
  )


# --- 1. networks ---


def _gaps(wd: harness.Workdir, level: str) -> dict[str, np.ndarray]:
  """(widths, seeds) distances, and (widths,) what the kernel is like."""
  config: Config = wd.config
  fn, condition = distances(config, level)
  return harness.sweep_widths(
    wd,
    f"gaps/{level}",
    jax.random.key(config.seed),
    fn,
    config.widths,
    config.num_seeds,
    then=lambda _, found: {**found, "condition": condition},
  )


def problem(
  config: Config, level: str
) -> tuple[GraphBatch, np.ndarray, np.ndarray]:
  """A batch, targets of all outputs, and which of them are trained on."""
  if level == "nodes":
    adjacencies, features, labels = _club()
    batch = _padded(adjacencies, features, np.float32)
    seen = np.arange(len(labels)) % config.labeled_every == 0
    return batch, labels, seen
  adjacencies, features = from_networkx(connected_graphs(7))
  places = np.linspace(0, len(features) - 1, config.num_graphs).astype(int)
  rng = np.random.default_rng(config.seed)
  places = rng.permutation(places)
  batch = _padded(
    [adjacencies[i] for i in places], [features[i] for i in places], np.float32
  )
  seen = np.arange(config.num_graphs) < config.num_train
  return batch, rng.normal(size=config.num_graphs), seen


def distances(config: Config, level: str) -> tuple[Callable[..., Any], float]:
  """Of a seed and a width: those of kernels, and of trained networks.

  And the least over the largest eigenvalue of the kernel that is trained on.
  """
  batch, targets, seen = problem(config, level)
  kernel = limit_kernel(config, level, batch)
  sizes = np.linalg.eigvalsh(kernel[seen][:, seen])
  rate = config.rate / sizes[-1]
  with jax.enable_x64(True):
    factor = kernel_factor(jnp.asarray(kernel[seen][:, seen]))
    want = np.asarray(
      descent_test(
        factor,
        jnp.asarray(kernel[:, seen]),
        jnp.asarray(targets[seen]),
        rate,
        config.num_steps,
      )
    )
  fn = functools.partial(
    one_network,
    config,
    level,
    batch,
    jnp.asarray(targets, jnp.float32),
    jnp.asarray(seen),
    jnp.asarray(kernel, jnp.float32),
    rate=float(rate),
    want=jnp.asarray(want, jnp.float32),
  )
  return fn, float(sizes[0] / sizes[-1])


def limit_kernel(config: Config, level: str, batch: GraphBatch) -> np.ndarray:
  """(n, n) kernel of infinite width, of all graphs or nodes; float64."""
  arch = {
    "num_blocks": config.num_blocks,
    "num_mlp_layers": config.gap_mlp_layers,
    "jumping": True,
  }
  with jax.enable_x64(True):
    op, x = (jnp.asarray(y, jnp.float64) for y in batch[:2])
    if level == "nodes":
      return np.asarray(node_gntk(op[0], x[0], **arch))
    return np.asarray(graph_gntk(GraphBatch(op, x, batch.mask), **arch))


def one_network(
  config: Config,
  level: str,
  batch: GraphBatch,
  targets: jax.Array,
  seen: jax.Array,
  kernel: jax.Array,
  rng: jax.Array,
  width: int,
  *,
  rate: float,
  want: jax.Array,
) -> dict[str, jax.Array]:
  """Distances of one network from its limit, before and after training."""
  readout, with_taps = (
    ("node", _nodes_with_taps) if level == "nodes" else ("sum", gnn_with_taps)
  )
  params = gnn_init(
    rng,
    width,
    batch.features.shape[2],
    num_blocks=config.num_blocks,
    num_mlp_layers=config.gap_mlp_layers,
    jumping=True,
  )
  own = structured_ntk(with_taps, params, batch).reshape(kernel.shape)
  start = gnn_apply(params, batch, readout=readout)
  shape = start.shape
  trained, _ = train_gnn(
    params,
    batch,
    start + targets.reshape(shape),
    learning_rate=rate,
    num_steps=config.num_steps,
    readout=readout,
    train_mask=seen.reshape(shape),
  )
  moved = gnn_apply(trained, batch, readout=readout) - start

  def gap(where: jax.Array) -> jax.Array:
    apart = jnp.where(where, moved.reshape(-1) - want, 0)
    return jnp.linalg.norm(apart) / jnp.linalg.norm(jnp.where(where, want, 0))

  return {
    "kernel": jnp.linalg.norm(own - kernel) / jnp.linalg.norm(kernel),
    "train": gap(seen),
    "test": gap(~seen),
  }


# --- 2. small graphs ---


def atlas_point(config: Config) -> dict[str, Any]:
  """R^2 of the kernel and of colors, on graphs that were not fitted."""
  graphs = connected_graphs(config.largest_graph)
  adjacencies, features = from_networkx(graphs)
  targets = np.array([_numbers(a) for a in adjacencies])
  order = np.random.default_rng(config.seed).permutation(len(graphs))
  fit, rest = order[: config.num_fit], order[config.num_fit :]
  gram = degree_gram(config, adjacencies, features)
  sizes = np.linalg.eigvalsh(gram[fit][:, fit])
  colors = [
    color_counts(adjacencies, features, h) for h in config.wl_iterations
  ]
  uniform = degree_gram(config, adjacencies, features, aggregate="uniform")
  out = {"least": sizes[0] / sizes[-1]}
  for i, target in enumerate(_TARGETS):
    score = functools.partial(_r2, config, targets[:, i], fit, rest)
    out[f"{target}, kernel"], predicted = score(gram)
    out[f"{target}, uniform"] = score(uniform)[0]
    out[f"{target}, colors"] = max(score(c @ c.T)[0] for c in colors)
    out[f"{target}, true"], out[f"{target}, predicted"] = (
      targets[rest, i],
      predicted,
    )
  return out


def _numbers(a: np.ndarray) -> tuple[float, float]:
  """Log of the number of spanning trees, and algebraic connectivity."""
  sizes = np.linalg.eigvalsh(np.diag(a.sum(1)) - a)
  return np.log(sizes[1:]).sum() - np.log(len(a)), sizes[1]


def degree_gram(
  config: Config,
  adjacencies: list[np.ndarray],
  features: list[np.ndarray],
  *,
  aggregate: str = "degree",
  **options: Any,
) -> np.ndarray:
  """The kernel of the configured network between all graphs; float64."""
  arch = {
    "num_blocks": config.num_blocks,
    "num_mlp_layers": config.num_mlp_layers,
    **options,
  }
  with jax.enable_x64(True):
    batch = _padded(adjacencies, features, np.float64, aggregate)
    return np.asarray(graph_gntk(batch, **arch))


def color_counts(
  adjacencies: list[np.ndarray], features: list[np.ndarray], iterations: int
) -> np.ndarray:
  """(G, colors) how often a graph has each color of Weisfeiler and Lehman.

  A color is that of the node before, and those of its neighbors, sorted; all
  that occur in any iteration count.
  """
  colors = [[row.tobytes() for row in np.asarray(x, float)] for x in features]
  columns = []
  for step in range(iterations + 1):
    if step:
      around = [[np.flatnonzero(row) for row in a] for a in adjacencies]
      colors = [
        [(c[u], *sorted(c[v] for v in near[u])) for u in range(len(c))]
        for c, near in zip(colors, around, strict=True)
      ]
    names: dict[Any, int] = {}
    colors = [[names.setdefault(x, len(names)) for x in c] for c in colors]
    columns.append(
      np.stack([np.bincount(c, minlength=len(names)) for c in colors])
    )
  return np.concatenate(columns, 1).astype(float)


def _r2(
  config: Config,
  y: np.ndarray,
  fit: np.ndarray,
  rest: np.ndarray,
  gram: np.ndarray,
) -> tuple[float, np.ndarray]:
  predicted = predict(config, gram, y, fit, rest)
  spread = np.square(y[rest] - y[rest].mean()).sum()
  return 1 - np.square(y[rest] - predicted).sum() / spread, predicted


def predict(
  config: Config,
  gram: np.ndarray,
  y: np.ndarray,
  fit: np.ndarray,
  rest: np.ndarray,
) -> np.ndarray:
  """Kernel ridge; the ridge by leaving one out of what is fitted."""
  with jax.enable_x64(True):
    k, k_rest = (jnp.asarray(gram[np.ix_(r, fit)]) for r in (fit, rest))
    y_fit = jnp.asarray(y[fit])
    errors = [
      float(jnp.abs(loo_residuals(k, y_fit, relative_ridge=r)).mean())
      for r in config.ridges
    ]
    ridge = config.ridges[int(np.nanargmin(errors))]
    model = kernel_ridge_fit(k, y_fit, relative_ridge=ridge)
    return np.asarray(kernel_ridge_predict(k_rest, model))


# --- 3. molecules ---


def molecules_point(config: Config) -> dict[str, Any]:
  """Mean absolute errors over folds, kcal/mol, of four models."""
  adjacencies, features, y = load_g2_molecules()
  composition = np.stack([x.sum(0) for x in features])
  colors = [
    color_counts(adjacencies, features, h) for h in config.wl_iterations
  ]
  gram = functools.partial(degree_gram, config, adjacencies, features)
  grams = {
    "kernel": [gram(normalize=True)],
    "without jumping": [gram(normalize=True, jumping=False)],
    "colors": [_unit(c @ c.T) for c in colors],
  }
  models = {
    name: [functools.partial(predict, config, k) for k in choices]
    for name, choices in grams.items()
  }
  models["composition"] = [functools.partial(least_squares, composition)]
  orders = [
    np.random.default_rng(config.seed + i).permutation(len(y))
    for i in range(config.num_splits)
  ]
  splits = [np.array_split(order, config.num_folds) for order in orders]
  out: dict[str, Any] = {"true": y}
  for name, choices in models.items():
    found = np.array([[_by_folds(m, y, s) for s in splits] for m in choices])
    # (choices, splits)
    errors = np.abs(found - y).mean(-1)
    best = int(errors.mean(1).argmin())
    out[name] = errors[best].mean()
    out[f"{name}, by split"] = errors[best]
    out[f"{name}, predicted"] = found[best, 0]
  return out


def least_squares(
  x: np.ndarray, y: np.ndarray, fit: np.ndarray, rest: np.ndarray
) -> np.ndarray:
  """A constant, and a number for each column."""
  x = np.concatenate([np.ones((len(x), 1)), x], 1)
  return x[rest] @ np.linalg.lstsq(x[fit], y[fit])[0]


def _unit(gram: np.ndarray) -> np.ndarray:
  root = np.sqrt(np.diagonal(gram))
  return gram / root[:, None] / root[None]


def _by_folds(
  model: Callable[..., np.ndarray], y: np.ndarray, folds: Sequence[np.ndarray]
) -> np.ndarray:
  predicted = np.zeros(len(y))
  for fold in folds:
    rest = np.setdiff1d(np.arange(len(y)), fold)
    predicted[fold] = model(y, rest, fold)
  return predicted


# --- 4. the karate club ---


def club_point(config: Config) -> dict[str, Any]:
  """Accuracies from two labels, and from all others."""
  adjacencies, features, y = _club()
  batch = _padded(adjacencies, features, np.float64)
  gram = limit_kernel(config, "nodes", batch)
  with jax.enable_x64(True):
    ends = np.array([0, len(y) - 1])
    rest = np.arange(1, len(y) - 1)
    fit = kernel_ridge_fit(
      jnp.asarray(gram[np.ix_(ends, ends)]),
      jnp.asarray(y[ends]),
      relative_ridge=config.club_ridges[0],
    )
    scores = kernel_ridge_predict(jnp.asarray(gram[:, ends]), fit)
    errors = loo_residuals(
      jnp.asarray(gram), jnp.asarray(y), relative_ridge=config.club_ridges[1]
    )
  scores = np.asarray(scores)
  return {
    "two labels": float((scores[rest] * y[rest] > 0).mean()),
    "one left out": float(((y - np.asarray(errors)) * y > 0).mean()),
    "scores": scores,
    "labels": y,
  }


def _club() -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
  club = networkx.karate_club_graph()
  adjacencies, features = from_networkx([club], features="onehot")
  names = [name for _, name in club.nodes(data="club")]
  return adjacencies, features, np.where(np.array(names) == "Mr. Hi", 1.0, -1.0)


# --- 5. sets of the user ---


def tu_folders(paths: str) -> dict[str, str]:
  """Folders by name; refuses what cannot be read before anything runs."""
  found: dict[str, str] = {}
  for path in filter(None, paths.split(",")):
    name = os.path.basename(os.path.normpath(path))
    if not os.path.isdir(path):
      raise ValueError(f"tu must name folders, got {path!r}, which is none")
    if name in found:
      raise ValueError(
        f"folders of tu must differ in name, got {found[name]!r} and {path!r}"
      )
    found[name] = path
  return found


def tu_point(config: Config, path: str) -> dict[str, float]:
  """Ten-fold accuracy of the best architecture and C, in percent."""
  # An extra of this package, so not imported with it.
  from sklearn import model_selection, svm

  adjacencies, features, labels = load_tu(path)
  folds = model_selection.StratifiedKFold(
    10, shuffle=True, random_state=config.seed
  )
  best = (0.0, 0.0)
  for blocks, layers, aggregate, normalize in itertools.product(
    config.tu_blocks,
    config.tu_layers,
    config.tu_aggregates,
    config.tu_normalize,
  ):
    gram = degree_gram(
      config,
      adjacencies,
      features,
      aggregate=aggregate,
      num_blocks=blocks,
      num_mlp_layers=layers,
      normalize=normalize,
    )
    # What a C means does not depend on the scale of a kernel.
    gram = gram / np.diagonal(gram).mean()
    for c in np.logspace(-2, 4, config.tu_num_c):
      model = svm.SVC(C=c, kernel="precomputed")
      scores = model_selection.cross_val_score(model, gram, labels, cv=folds)
      best = max(best, (100 * scores.mean(), 100 * scores.std()))
  return {"accuracy": best[0], "deviation": best[1]}


def large_point(config: Config) -> dict[str, float]:
  """What a Gram matrix of random trees holds, and its seconds; {} of none."""
  num, largest, blocks = config.large
  if not num:
    return {}
  rng = np.random.default_rng(config.seed)
  trees = [
    networkx.random_labeled_tree(int(n), seed=int(rng.integers(1 << 30)))
    for n in rng.integers(3, largest + 1, num)
  ]
  batch = _padded(*from_networkx(trees), np.float32)
  start = time.perf_counter()
  gram = np.asarray(
    graph_gntk(batch, num_blocks=blocks, num_mlp_layers=1, normalize=True)
  )
  seconds = time.perf_counter() - start
  sizes = np.linalg.eigvalsh(gram.astype(np.float64))
  return {
    "share of finite entries": float(np.isfinite(gram).mean()),
    # At most 1, by the inequality of Cauchy and Schwarz.
    "largest entry": float(np.abs(gram).max()),
    "least over largest eigenvalue": float(sizes[0] / sizes[-1]),
    "seconds": seconds,
  }


# --- graphs ---


def connected_graphs(largest: int) -> list[Any]:
  """All connected graphs of 2 to ``largest`` nodes, at most 7."""
  return [
    g
    for g in networkx.graph_atlas_g()
    if 2 <= len(g) <= largest and networkx.is_connected(g)
  ]


def _padded(
  adjacencies: list[np.ndarray],
  features: list[np.ndarray],
  dtype: Any,
  aggregate: str = "degree",
) -> GraphBatch:
  rows = [x.astype(dtype) for x in features]
  return pad_graphs(adjacencies, rows, aggregate=aggregate)


# --- checks ---


def _gap_checks(
  config: Config, gaps: dict[str, dict[str, np.ndarray]]
) -> list[harness.Check]:
  accepted, widest = config.accepted, config.widths[-1]
  checks = []
  for level, found in gaps.items():
    conditions = found["condition"]
    medians = {
      key: np.median(x, axis=1) for key, x in found.items() if x.ndim > 1
    }
    slope = fit_slope(config.widths, medians["test"]).slope
    kernel_slope = fit_slope(config.widths, medians["kernel"]).slope
    at = f"of {level}, width {widest}"
    checks += [
      harness.Check(
        f"slope of the distance of trained networks, {level}",
        slope,
        *accepted.gap_slope,
      ),
      harness.Check(f"distance {at}", medians["test"][-1], high=accepted.gap),
      harness.Check(f"distance on trained data {at}", medians["train"][-1]),
      harness.Check(f"slope of the distance of kernels, {level}", kernel_slope),
      harness.Check(f"distance of kernels {at}", medians["kernel"][-1]),
      harness.Check(
        f"least over largest eigenvalue of what is trained on, {level}",
        float(conditions[0]),
      ),
    ]
  return checks


def _atlas_checks(config: Config, atlas: dict[str, Any]) -> list[harness.Check]:
  checks = [harness.Check("least over largest eigenvalue", atlas["least"])]
  for target in _TARGETS:
    ours, theirs = (atlas[f"{target}, {k}"] for k in ("kernel", "colors"))
    checks += [
      harness.Check(f"R^2 of {target}", ours),
      harness.Check(
        f"R^2 of {target}, neighbors added up", atlas[f"{target}, uniform"]
      ),
      harness.Check(
        f"R^2 of {target}, more than by colors",
        ours - theirs,
        config.accepted.advantage,
      ),
    ]
  return checks


def _reported(
  config: Config,
  molecules: dict[str, Any],
  club: dict[str, Any],
  sets: dict[str, dict[str, float]],
  large: dict[str, float],
) -> list[harness.Check]:
  errors = [k for k, x in molecules.items() if np.ndim(x) == 0]
  checks = [
    harness.Check(f"error of enthalpies, {k}", molecules[k]) for k in errors
  ]
  checks += [
    harness.Check(
      f"error of enthalpies, {k}, {what} split", fn(molecules[f"{k}, by split"])
    )
    for k in errors
    for what, fn in (("best", np.min), ("worst", np.max))
  ]
  checks += [
    harness.Check(f"karate club, {k}", club[k])
    for k in ("two labels", "one left out")
  ]
  for name, found in sets.items():
    checks += [
      harness.Check(f"accuracy on {name}", found["accuracy"]),
      harness.Check(f"its deviation over folds, {name}", found["deviation"]),
    ]
    if name in config.tu_published:
      published = config.tu_published[name]
      checks.append(harness.Check(f"published accuracy on {name}", published))
  return [
    *checks,
    *(
      harness.Check(f"{k} of the large matrix", x)
      for k, x in large.items()
      if k != "seconds"
    ),
  ]


# --- figure ---


def _draw(
  config: Config,
  gaps: dict[str, dict[str, np.ndarray]],
  atlas: dict[str, Any],
  molecules: dict[str, Any],
  club: dict[str, Any],
) -> Figure:
  harness.use_style()
  figure, axes = plt.subplots(2, 3, figsize=(15.5, 9.4))
  _draw_gaps(axes[0, 0], config, gaps, "test", "Trained networks, unseen data")
  _draw_gaps(axes[0, 1], config, gaps, "kernel", "Kernels before training")
  _draw_club(axes[0, 2], club)
  for ax, target in zip(axes[1], _TARGETS, strict=False):
    score = atlas[f"{target}, kernel"]
    _draw_scatter(ax, atlas[f"{target}, true"], atlas[f"{target}, predicted"])
    ax.set(
      title=f"{target.capitalize()}: $R^2$ {score:.3f}",
      xlabel="of the graph",
      ylabel="by the kernel",
    )
  _draw_scatter(axes[1, 2], molecules["true"], molecules["kernel, predicted"])
  axes[1, 2].set(
    title=f"Enthalpies: mean error {molecules['kernel']:.1f} kcal/mol",
    xlabel="measured, kcal/mol",
    ylabel="by the kernel, kcal/mol",
  )
  return figure


def _draw_gaps(
  ax: Axes,
  config: Config,
  gaps: dict[str, dict[str, np.ndarray]],
  key: str,
  title: str,
) -> None:
  for level, color in zip(gaps, harness.PALETTE):
    found = gaps[level][key]
    ax.fill_between(
      config.widths, found.min(1), found.max(1), color=color, alpha=0.12, lw=0
    )
    harness.plot_loglog(ax, config.widths, np.median(found, 1), label=level)
  ax.set(title=title, xlabel="width m", ylabel="relative distance from limit")
  ax.legend()


def _draw_scatter(ax: Axes, true: np.ndarray, predicted: np.ndarray) -> None:
  ends = [min(true.min(), predicted.min()), max(true.max(), predicted.max())]
  ax.plot(ends, ends, color=harness.PALETTE[1], lw=1.2, zorder=1)
  ax.plot(true, predicted, "o", ms=4, alpha=0.6)


def _draw_club(ax: Axes, club: dict[str, Any]) -> None:
  scores, labels = club["scores"], club["labels"]
  for label, name, color in (
    (1, "Mr. Hi", harness.PALETTE[0]),
    (-1, "Officer", harness.PALETTE[1]),
  ):
    nodes = np.flatnonzero(labels == label)
    ax.bar(nodes, scores[nodes], color=color, label=name)
  ax.axhline(0, color=harness.PALETTE[5], lw=0.8)
  ax.set(
    title=f"Karate club from two labels: {100 * club['two labels']:.0f} %",
    xlabel="member",
    ylabel="score",
  )
  ax.legend()


if __name__ == "__main__":
  harness.main(run, "gntk")
