"""What do learned weights cost, beside fine-tuning and beside PyTorch?

32 prompts of 16 examples at once, 16 clean examples each, and the default
in-context model, untrained: what it says does not change what it costs.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from absl import app

from benchmarks import _race
from jaxattn.looped.icl import sample_icl_task
from jaxattn.models.icl import ICLRegressor, init_icl
from jaxattn.regression.reweighted_icl import (
  Prompt,
  icl_baseline,
  laricl,
  ricl,
)

_NUM_TASKS = 32
_NUM_EXAMPLES = 16
_DIM = 3
_STEPS = 150
_FINE_TUNE_STEPS = 60
_LARICL_BAR = 5.0
_FINE_TUNE_BAR = 2.0
_TORCH_BAR = 1.0
_ROUNDS = 5
# All methods on all tasks should take no longer, in seconds.
_BUDGET = 40.0

_MODEL = ICLRegressor()


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  params, tasks = _inputs()
  calls = _calls(params, tasks)
  seconds = _race.race(calls, rounds=_ROUNDS)
  per_step = {
    "ricl": [s / _STEPS for s in seconds["ricl"]],
    "fine_tune": [s / _FINE_TUNE_STEPS for s in seconds["fine_tune"]],
  }
  every = [sum(times) for times in zip(*seconds.values(), strict=True)]
  budget = {"budget": [_BUDGET] * len(every), "all": every}
  # Against PyTorch apart: its threads would disturb the others.
  peer = {"ours": calls["ricl"], "torch": torch_ricl(params, tasks)}
  raced = _race.race(peer, rounds=_ROUNDS)
  name = f"{_NUM_TASKS} prompts"
  rows = [
    _race.ratio(
      f"{name}: RICL / LARICL", seconds, "laricl", "ricl", _LARICL_BAR
    ),
    _race.ratio(
      f"{name}, a step: fine-tuning / RICL",
      per_step,
      "ricl",
      "fine_tune",
      _FINE_TUNE_BAR,
    ),
    _race.ratio(
      f"{name}: RICL in PyTorch / RICL", raced, "ours", "torch", _TORCH_BAR
    ),
    _race.ratio(
      f"{name}: {_BUDGET:g} s / all methods", budget, "all", "budget", 1.0
    ),
  ]
  _race.publish("reweighted_icl", "Reweighted in-context learning", rows)


def _inputs() -> tuple[Any, tuple[Prompt, Prompt]]:
  def draw(rng: jax.Array) -> tuple[Prompt, Prompt]:
    task = sample_icl_task(rng, num_examples=2 * _NUM_EXAMPLES, dim=_DIM)
    first = Prompt(task.x[:_NUM_EXAMPLES], task.y[:_NUM_EXAMPLES])
    return first, Prompt(task.x[_NUM_EXAMPLES:], task.y[_NUM_EXAMPLES:])

  rngs = jax.random.split(jax.random.key(0), _NUM_TASKS)
  params = init_icl(jax.random.key(1), _MODEL, _DIM)
  return params, jax.vmap(draw)(rngs)


def _calls(
  params: Any, tasks: tuple[Prompt, Prompt]
) -> dict[str, Callable[[], object]]:
  """Every method on all tasks at once."""
  methods = {
    "ricl": lambda *args: ricl(*args, num_steps=_STEPS).w,
    "laricl": lambda *args: laricl(*args).w,
    **{
      kind: functools.partial(icl_baseline, kind=kind)
      for kind in ("fine_tune", "prefix", "learned_examples", "influence")
    },
  }

  def batched(method: Callable[..., Any], params: Any) -> Callable[..., Any]:
    return jax.jit(jax.vmap(lambda p, v: method(_MODEL.apply, params, p, v)))

  starts = dict.fromkeys(methods, params)
  starts["prefix"] = {**params, "prefix": {"tokens": _prefix_tokens()}}
  return {
    name: functools.partial(batched(method, starts[name]), *tasks)
    for name, method in methods.items()
  }


def _prefix_tokens() -> jax.Array:
  return 0.02 * jax.random.normal(jax.random.key(2), (4, _MODEL.width))


def torch_ricl(
  params: Any, tasks: tuple[Prompt, Prompt]
) -> Callable[[], object]:
  """The same loop in PyTorch: batched tasks, Adam on the weights alone."""
  p = jax.tree.map(lambda x: torch.tensor(np.asarray(x)), params["params"])
  prompt, val = jax.tree.map(lambda x: torch.tensor(np.asarray(x)), tasks)
  predict = functools.partial(_torch_predict, p, prompt, val.x)
  ones = torch.ones(_NUM_TASKS, _NUM_EXAMPLES)
  with torch.no_grad():
    ours = jax.vmap(lambda p, v: _MODEL.apply(params, p, v.x))(*tasks)
    gap = float(abs(predict(ones).numpy() - np.asarray(ours)).max())
  if gap > 1e-4:
    raise RuntimeError(f"the two models differ by {gap}")

  def run() -> Any:
    w = ones.clone().requires_grad_()
    optimizer = torch.optim.Adam([w], lr=0.05)
    for _ in range(_STEPS):
      optimizer.zero_grad()
      error = ((predict(w) - val.y) ** 2).sum()
      loss = (error + 0.1 * ((w - 1) ** 2).sum()) / (2 * _NUM_EXAMPLES)
      loss.backward(inputs=[w])
      optimizer.step()
    return w.detach()

  return run


def _torch_predict(p: Any, prompt: Any, query: Any, w: Any) -> Any:
  m, num_queries = w.shape[1], query.shape[1]
  label = prompt.y[..., None]
  tokens = torch.cat([prompt.x, label, torch.ones_like(label)], -1)
  tokens = torch.cat([tokens, torch.nn.functional.pad(query, (0, 2))], 1)
  own = torch.cat([w, torch.ones(len(w), num_queries)], 1)
  z = (tokens @ p["embed"]["kernel"]) * own[..., None]
  mask = torch.arange(m + num_queries)[None] < m
  mask = mask | torch.eye(m + num_queries, dtype=torch.bool)
  for i in range(_MODEL.num_layers):
    layer = p[f"layer_{i}"]
    heads = [
      torch.einsum("btd,dnh->bnth", z, layer[name]["kernel"])
      + layer[name]["bias"][:, None]
      for name in ("query", "key", "value")
    ]
    out = torch.nn.functional.scaled_dot_product_attention(
      *heads, attn_mask=mask
    )
    z = z + torch.einsum("bnth,nhd->btd", out, layer["out"]["kernel"])
    z = z + layer["out"]["bias"]
    norm = layer["norm"]
    h = torch.nn.functional.layer_norm(
      z, z.shape[-1:], norm["scale"], norm["bias"], 1e-6
    )
    h = h @ layer["mlp_in"]["kernel"] + layer["mlp_in"]["bias"]
    h = torch.nn.functional.gelu(h, approximate="tanh")
    z = z + h @ layer["mlp_out"]["kernel"] + layer["mlp_out"]["bias"]
  return (z[:, m:] @ p["head"]["kernel"])[..., 0] + p["head"]["bias"]


if __name__ == "__main__":
  app.run(main)
