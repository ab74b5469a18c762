"""Reweighted in-context learning: what a few clean examples are good for.

A small transformer is trained to regress in context, and frozen. It is then
shown prompts of which some examples are wrong, and V examples that are right.
On the idea of arXiv 2310.03331, one weight an example, learned on those V:

1. Error of RICL and LARICL beside that of plain prompting, fine-tuning, a
   prefix of vectors, examples that are learned, leaving examples out, and of
   showing the clean ones, after the prompt or instead of it; by kind of fault
   and by V.
2. Do the weights tell the wrong examples from the right ones?
3. What do the regularizer and the mode of weighting do?
4. The same on real prompts, patients of the diabetes table.
"""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from experiments import harness
from jaxattn.regression.reweighted_icl import (
  Prompt,
  icl_baseline,
  laricl,
  ricl,
  weighted_predict,
)

_BASELINES = {
  "icl": "vanilla",
  "append": "append",
  "clean only": "validation_only",
  "fine-tune": "fine_tune",
  "prefix": "prefix",
  "learned examples": "learned_examples",
  "influence": "influence",
}
# Vectors of the prefix, and their first standard deviation.
_PREFIX = 4, 0.02
# What is weighted, by the name that is appended to "ricl".
_MODES = {"": "embedding", ", logit": "logit", ", value": "value"}
_REWEIGHTED = (
  "ricl",
  "ricl, logit",
  "ricl, value",
  "laricl",
  "laricl, full step",
  "laricl, 5 rounds",
)
_SHOWN = {
  "icl": "plain prompt",
  "ricl": "RICL",
  "laricl": "LARICL",
  "fine-tune": "fine-tuning",
  "prefix": "prefix",
  "learned examples": "learned examples",
  "append": "clean appended",
  "clean only": "clean only",
  "influence": "worst left out",
}
_TITLES = {
  "clean": "clean",
  "bias_some": "biased",
  "noise_some": "random labels",
  "other_task": "another task",
  "imbalanced": "imbalanced",
}

# A ConfigDict: what type a field has is known at run time only.
Config = Any
Point = dict[str, Any]
# Prompt and clean examples of each task, inputs and labels to predict.
Tasks = tuple[Prompt, Prompt, jax.Array, jax.Array]


def run(config: Config, workdir: str | os.PathLike[str]) -> harness.Verdict:
  """Runs the experiment; see the module's docstring."""
  wd = harness.open_workdir(workdir, config)
  model, params = regressor(config), _train(wd)
  compare = functools.partial(comparison_point, config, model, params)
  pairs = [(c[0], v) for v in config.nums_val for c in config.corruptions]
  points = {
    (kind, v): wd.point(f"{kind}/V={v}", functools.partial(compare, kind, v))
    for kind, v in harness.progress(pairs, "prompts")
  }
  ridges = wd.point(
    "ridges", functools.partial(ridge_point, config, model, params)
  )
  diabetes = wd.point(
    "diabetes", functools.partial(diabetes_point, config, model, params)
  )
  figure = _draw(config, points)
  harness.save_figure(wd, figure, _figure_data(points))
  return harness.finish(
    wd,
    claim=(
      "One weight for each example of a prompt, learned on a few clean "
      "examples, beats plain prompting and fine-tuning where the prompt is "
      "wrong in part; a linear approximation gets much of it."
    ),
    source="arXiv:2310.03331, abstract",
    paper="reweighting beats prompting, fine-tuning and prefixes (no numbers)",
    checks=[
      *_claim_checks(config, points),
      *_auc_checks(config, points),
      *_training_checks(config, wd),
      *_reported(config, points, ridges, diabetes),
    ],
  )


# --- the in-context model ---


def regressor(config: Config) -> Any:
  """The model, untrained."""
  from jaxattn.models.icl import ICLRegressor

  return ICLRegressor(config.width, config.num_layers, config.num_heads)


def _train(wd: harness.Workdir) -> Any:
  from jaxattn.models import icl

  config: Config = wd.config
  model, rng = regressor(config), jax.random.key(config.seed)
  return harness.train_loop(
    rng,
    functools.partial(training_loss, config=config, model=model),
    icl.init_icl(rng, model, config.dim),
    # The loss draws its tasks itself.
    lambda step: (),
    optimizer=icl.icl_optimizer(config.train_steps),
    num_steps=config.train_steps,
    workdir=wd,
    name="icl",
    log_every=500,
    checkpoint_every=250,
  )


def training_loss(
  params: Any, batch: Any, rng: jax.Array, *, config: Config, model: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Mean squared error on fresh tasks; ``batch`` is empty."""
  from jaxattn.models import icl

  del batch
  sizes = {"dim": config.dim, "num_examples": config.num_examples}
  return icl.icl_loss(params, rng, model=model, **sizes), {}


# --- prompts, clean and spoiled ---


def spoiled_tasks(config: Config, kind: str, num_val: int) -> Tasks:
  """Tasks whose prompts are spoiled; all but that is the same for all kinds."""
  from jaxattn.looped.icl import sample_icl_task

  m = config.num_examples

  def draw(rng: jax.Array) -> Tasks:
    task = sample_icl_task(
      jax.random.fold_in(rng, 0),
      num_examples=m + max(config.nums_val),
      dim=config.dim,
      num_queries=config.num_queries,
    )
    prompt = Prompt(task.x[:m], task.y[:m])
    val = Prompt(task.x[m : m + num_val], task.y[m : m + num_val])
    rng = jax.random.fold_in(rng, 1)
    return spoil(config, rng, prompt, kind), val, task.queries, task.targets

  return jax.vmap(draw)(_rngs(config))


def spoil(config: Config, rng: jax.Array, prompt: Prompt, kind: str) -> Prompt:
  """A prompt as the configuration says that this kind is."""
  from jaxattn.data.icl import corrupt_prompt

  _, num, scale = next(c for c in config.corruptions if c[0] == kind)
  if not num:
    return prompt
  return corrupt_prompt(rng, prompt, kind=kind, num_corrupted=num, scale=scale)


def _rngs(config: Config) -> jax.Array:
  return jax.random.split(
    jax.random.fold_in(jax.random.key(config.seed), 1), config.num_tasks
  )


# --- errors of all methods ---


def comparison_point(
  config: Config, model: Any, params: Any, kind: str, num_val: int
) -> Point:
  """By method (tasks,) test errors; weights, and which examples are wrong."""
  tasks = spoiled_tasks(config, kind, num_val)
  errors, w = reweighted_errors(
    params, tasks, config.ridge, model=model, num_steps=config.num_steps
  )
  errors |= baseline_errors(params, tasks, model=model)
  clean = spoiled_tasks(config, "clean", num_val)[0]
  wrong = (tasks[0].y != clean.y) | (tasks[0].x != clean.x).any(-1)
  point = {f"error/{name}": x for name, x in errors.items()}
  return point | {f"w/{mode}": x for mode, x in w.items()} | {"wrong": wrong}


@functools.partial(jax.jit, static_argnames=("model", "num_steps"))
def reweighted_errors(
  params: Any,
  tasks: Tasks,
  ridge: float | jax.Array,
  *,
  model: Any,
  num_steps: int,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """By method (tasks,) errors, and by mode (tasks, m) weights of RICL."""

  def one(task: Tasks) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    prompt, val, query, target = task
    args = _apply_fn(model), params, prompt, val
    linear = functools.partial(laricl, *args, ridge=ridge)
    slow = functools.partial(ricl, *args, ridge=ridge, num_steps=num_steps)
    learned = {mode: slow(mode=mode).w for mode in _MODES.values()}
    found = {f"ricl{x}": (learned[mode], mode) for x, mode in _MODES.items()}
    found |= {
      "laricl": (linear().w, "embedding"),
      "laricl, full step": (linear(line_search=False).w, "embedding"),
      "laricl, 5 rounds": (linear(num_rounds=5).w, "embedding"),
    }
    errors = {
      name: _error(weighted_predict(*args[:3], query, w, mode=mode), target)
      for name, (w, mode) in found.items()
    }
    return errors, learned

  return jax.vmap(one)(tasks)


@functools.partial(jax.jit, static_argnames="model")
def baseline_errors(
  params: Any, tasks: Tasks, *, model: Any
) -> dict[str, jax.Array]:
  """By baseline (tasks,) errors."""
  apply_fn = _apply_fn(model)
  length, size = _PREFIX
  tokens = size * jax.random.normal(jax.random.key(0), (length, model.width))
  with_prefix = {**params, "prefix": {"tokens": tokens}}

  def one(task: Tasks) -> dict[str, jax.Array]:
    prompt, val, query, target = task
    errors = {}
    for name, kind in _BASELINES.items():
      start = with_prefix if kind == "prefix" else params
      found = icl_baseline(apply_fn, start, prompt, val, kind=kind)
      out = weighted_predict(
        apply_fn, found.params, found.prompt, query, found.w, mode="logit"
      )
      errors[name] = _error(out, target)
    return errors

  return jax.vmap(one)(tasks)


@functools.lru_cache(maxsize=4)
def _apply_fn(model: Any) -> Any:
  """The model as one function that all methods share: it is traced once."""
  return jax.jit(model.apply, static_argnums=4)


def _error(out: jax.Array, target: jax.Array) -> jax.Array:
  return jnp.square(out - target).mean()


def ridge_point(config: Config, model: Any, params: Any) -> Point:
  """(ridges,) median errors of RICL and of LARICL."""
  tasks = spoiled_tasks(config, config.ridge_kind, config.ridge_num_val)
  rows = []
  for ridge in config.ridges:
    errors, _ = reweighted_errors(
      params, tasks, ridge, model=model, num_steps=config.num_steps
    )
    rows.append([np.median(errors[name]) for name in ("ricl", "laricl")])
  ricl_row, laricl_row = np.array(rows).T
  return {"ricl": ricl_row, "laricl": laricl_row}


def diabetes_point(config: Config, model: Any, params: Any) -> Point:
  """By method (tasks,) errors on prompts of patients."""
  tasks = diabetes_tasks(config)
  errors, _ = reweighted_errors(
    params, tasks, config.ridge, model=model, num_steps=config.num_steps
  )
  return errors | baseline_errors(params, tasks, model=model)


def diabetes_tasks(config: Config) -> Tasks:
  """Rows of the table, principal components of unit size, scaled labels."""
  from sklearn import datasets

  table, target = map(np.asarray, datasets.load_diabetes(return_X_y=True))
  table = table - table.mean(0)
  u, _, _ = np.linalg.svd(table, full_matrices=False)
  dim = min(config.dim, table.shape[1])
  x = np.zeros((len(u), config.dim), np.float32)
  x[:, :dim] = u[:, :dim] * len(u) ** 0.5
  # Labels as large as those of the tasks that the model was trained on.
  y = (target - target.mean()) / target.std() * config.dim**0.5
  y = y.astype(np.float32)
  ends = np.cumsum([config.num_examples, config.diabetes_num_val])

  def draw(rng: jax.Array) -> Tasks:
    rows = jax.random.permutation(jax.random.fold_in(rng, 2), len(y))
    rows = rows[: ends[-1] + config.num_queries]
    xs = jnp.split(jnp.asarray(x)[rows], ends)
    ys = jnp.split(jnp.asarray(y)[rows], ends)
    prompt, val = (Prompt(*xy) for xy in zip(xs[:2], ys[:2], strict=True))
    rng = jax.random.fold_in(rng, 3)
    prompt = spoil(config, rng, prompt, config.diabetes_kind)
    return prompt, val, xs[2], ys[2]

  return jax.vmap(draw)(_rngs(config))


# --- checks ---


def _median(point: Point, name: str) -> float:
  return float(np.median(point[f"error/{name}"]))


def _ratio(point: Point, name: str, other: str) -> float:
  return _median(point, name) / _median(point, other)


def roc_auc(w: np.ndarray, wrong: np.ndarray) -> float:
  """How often a wrong example weighs less than a right one, in one prompt.

  Args:
    w: (prompts, m) weights.
    wrong: (prompts, m), which examples are wrong; both kinds in each prompt.

  Returns:
    The mean over prompts of the area under the ROC curve.
  """
  ranks = stats.rankdata(-w, axis=1)
  num, rest = wrong.sum(1), (~wrong).sum(1)
  total = np.where(wrong, ranks, 0).sum(1) - num * (num + 1) / 2
  return float((total / (num * rest)).mean())


def _claim_checks(
  config: Config, points: dict[tuple[str, int], Point]
) -> list[harness.Check]:
  checks = []
  accepted = config.accepted
  for kind in config.decided_kinds:
    for v in config.decided_nums_val:
      for name, other, allowed in (
        ("ricl", "icl", accepted.over_icl),
        ("ricl", "fine-tune", accepted.over_other),
        ("ricl", "clean only", accepted.over_other),
        ("laricl", "icl", accepted.over_icl),
      ):
        value = _ratio(points[kind, v], name, other)
        label = f"{name} / {other}, {_TITLES[kind]}, V={v}"
        checks.append(harness.Check(label, value, *allowed))
  for v in config.nums_val:
    value = _ratio(points["clean", v], "ricl", "icl")
    label = f"ricl / icl, clean, V={v}"
    checks.append(harness.Check(label, value, *accepted.clean))
  return checks


def _training_checks(
  config: Config, wd: harness.Workdir
) -> list[harness.Check]:
  """Errors of the model on the way; reported."""
  rows = harness.read_metrics(wd.path / "metrics.jsonl")
  loss = {r["step"]: r["loss"] for r in rows if r["series"] == "icl"}
  return [
    harness.Check(f"training error, step {step}", loss[step])
    for step in config.reported_steps
  ]


def _auc_checks(
  config: Config, points: dict[tuple[str, int], Point]
) -> list[harness.Check]:
  """How well weights tell wrong examples from right ones; reported."""
  checks = []
  for kind in config.auc_kinds:
    for v in config.auc_nums_val:
      for mode in _MODES.values():
        point = points[kind, v]
        label = f"area under ROC, {mode} weights, {_TITLES[kind]}, V={v}"
        area = roc_auc(point[f"w/{mode}"], point["wrong"])
        checks.append(harness.Check(label, area))
  return checks


def _reported(
  config: Config,
  points: dict[tuple[str, int], Point],
  ridges: Point,
  diabetes: Point,
) -> list[harness.Check]:
  """What decides nothing; all errors are in the data of the figure."""
  most = max(config.nums_val)
  pairs = [
    (kind, v, other)
    for kind in config.decided_kinds
    for v in config.decided_nums_val
    for other in ("prefix", "learned examples", "influence")
  ]
  pairs += [(c[0], most, "clean only") for c in config.corruptions]
  checks = [
    harness.Check(
      f"ricl / {other}, {_TITLES[kind]} prompts, V={v}",
      _ratio(points[kind, v], "ricl", other),
    )
    for kind, v, other in pairs
  ]
  kind, v = config.ridge_kind, config.ridge_num_val
  checks += [
    harness.Check(
      f"error, {name}, {_TITLES[kind]}, V={v}", _median(points[kind, v], name)
    )
    for name in (*_BASELINES, *_REWEIGHTED)
  ]
  checks += [
    harness.Check(f"the same, {name}, ridge={ridge:g}", value)
    for name in ("ricl", "laricl")
    for ridge, value in zip(config.ridges, ridges[name], strict=True)
  ]
  return checks + [
    harness.Check(f"error, {name}, diabetes", float(np.median(diabetes[name])))
    for name in (*_BASELINES, *_REWEIGHTED)
  ]


# --- the figure ---


def _figure_data(points: dict[tuple[str, int], Point]) -> Point:
  return {
    f"{kind}_{v}_{name.replace('/', '_')}": value
    for (kind, v), point in points.items()
    for name, value in point.items()
  }


def _draw(config: Config, points: dict[tuple[str, int], Point]) -> Figure:
  harness.use_style()
  figure, axes = plt.subplots(2, 2, figsize=(12, 8.4))
  for ax, kind in zip(axes[0], config.decided_kinds, strict=True):
    _draw_errors(ax, config, points, kind)
  _draw_kinds(axes[1, 0], config, points)
  _draw_weights(axes[1, 1], config, points)
  handles, labels = axes[0, 0].get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside upper center", ncols=5)
  return figure


def _style(name: str) -> dict[str, Any]:
  colors = (*harness.PALETTE, "#6b7480", "#1b1f24", "#8c564b")
  order = "ricl", "laricl", "clean only", "prefix", "append", "fine-tune"
  order = *order, "icl", "influence", "learned examples"
  reweighted = name in ("ricl", "laricl")
  return {
    "color": colors[order.index(name)],
    "marker": "o" if reweighted else "s",
    "zorder": 4 if reweighted else 3,
  }


def _draw_errors(
  ax: Axes, config: Config, points: dict[tuple[str, int], Point], kind: str
) -> None:
  for name, label in _SHOWN.items():
    errors = [_median(points[kind, v], name) for v in config.nums_val]
    width = 2.6 if name in ("ricl", "laricl") else 1.4
    ax.loglog(
      config.nums_val, errors, label=label, linewidth=width, **_style(name)
    )
  ax.set_xticks(config.nums_val, [str(v) for v in config.nums_val])
  ax.set_xticks([], minor=True)
  num = next(c[1] for c in config.corruptions if c[0] == kind)
  ax.set(
    title=f"{num} of {config.num_examples} examples: {_TITLES[kind]}",
    xlabel="clean examples V",
    ylabel="median error of queries",
  )


def _draw_kinds(
  ax: Axes, config: Config, points: dict[tuple[str, int], Point]
) -> None:
  kinds = [c[0] for c in config.corruptions]
  v = max(config.nums_val)
  for i, name in enumerate(_SHOWN):
    shift = 0.085 * (i - (len(_SHOWN) - 1) / 2)
    ax.semilogy(
      np.arange(len(kinds)) + shift,
      [_median(points[kind, v], name) for kind in kinds],
      linestyle="none",
      markersize=8,
      **_style(name),
    )
  labels = [_TITLES[kind].replace(" ", "\n") for kind in kinds]
  ax.set_xticks(range(len(kinds)), labels)
  ax.grid(visible=False, axis="x")
  ax.set(
    title=f"All kinds of prompts, V = {v}", ylabel="median error of queries"
  )


def _draw_weights(
  ax: Axes, config: Config, points: dict[tuple[str, int], Point]
) -> None:
  kinds = config.auc_kinds
  v = config.auc_nums_val[0]
  for i, (wrong, label) in enumerate(((True, "wrong"), (False, "right"))):
    w = [points[kind, v]["w/embedding"] for kind in kinds]
    masks = [points[kind, v]["wrong"] == wrong for kind in kinds]
    chosen = [x[mask] for x, mask in zip(w, masks, strict=True)]
    ax.bar(
      np.arange(len(kinds)) + 0.36 * (i - 0.5),
      [x.mean() for x in chosen],
      0.32,
      yerr=[x.std() for x in chosen],
      capsize=4,
      color=harness.PALETTE[1 - i],
      ecolor="#1b1f24",
      label=f"{label} examples",
    )
  ax.axhline(1, color="#6b7480", linewidth=1, zorder=0)
  ax.set_xticks(range(len(kinds)), [_TITLES[kind] for kind in kinds])
  ax.grid(visible=False, axis="x")
  ax.legend(loc="upper left", ncols=2)
  low, high = ax.get_ylim()
  ax.set_ylim(low, high + 0.15 * (high - low))
  ax.set(
    title=f"RICL's weights of embeddings, V = {v}",
    ylabel="mean and standard deviation",
  )


if __name__ == "__main__":
  harness.main(run, "reweighted-icl")
