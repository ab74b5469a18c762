"""Is flow matching here as quick as in the libraries for it?

Peers: torchcfm and flow_matching (torch), with the same network of two hidden
layers of 128 units, batches of 256 and T = 24; diffrax, following the same
field. A peer that is not installed is named, and its rows are missing.
"""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import app

from benchmarks import _race
from jaxattn.models import FlowMLP
from jaxattn.sampling import flow_loss, integrate, sample_flow

_TRAIN_BAR, _SAMPLE_BAR, _SCAN_BAR = 1.5, 1.5, 1 / 1.05
_BATCH, _HORIZON, _HISTORY, _WIDTH, _STEPS = 256, 24, 24, 128, 50
# Waves of the time, as in our network.
_WAVES = 4
_RATE = 1e-3


def main(argv: list[str]) -> None:
  """Runs all races there are peers for, rewrites the section of RESULTS.md."""
  del argv
  rows = []
  for name, race in (
    ("torchcfm", against_torchcfm),
    ("flow_matching", against_flow_matching),
    ("diffrax", against_diffrax),
  ):
    peer = _installed(name)
    if peer is not None:
      rows += race()
  _race.publish("flow_matching_tsf", "Flow matching", rows)


def _installed(name: str) -> ModuleType | None:
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    print(f"no race against {name}: {error}; pip install 'jaxattn[peers]'")
    return None


# --- ours ---


def model_and_params() -> tuple[FlowMLP, Any]:
  """The network, with an output that is not 0."""
  model = FlowMLP(horizon=_HORIZON, history=_HISTORY, width=_WIDTH)
  x = jnp.zeros((1, _HORIZON, 1))
  params = model.init(jax.random.key(0), x, 0.5, jnp.zeros((1, _HISTORY, 1)))
  noise = jax.random.normal(jax.random.key(1), (_WIDTH, _HORIZON))
  params["params"]["head"]["kernel"] = noise / _WIDTH**0.5
  return model, params


def batch() -> tuple[jax.Array, jax.Array]:
  """Histories and futures."""
  keys = jax.random.split(jax.random.key(2))
  sizes = _HISTORY, _HORIZON
  history, future = (
    jax.random.normal(key, (_BATCH, size, 1))
    for key, size in zip(keys, sizes, strict=True)
  )
  return history, future


def train_call() -> Callable[[], Any]:
  """One step of Adam, and the next from where it ended."""
  model, params = model_and_params()
  optimizer = optax.adam(_RATE)
  # Whatever else a module may return.
  apply_fn: Any = model.apply

  @jax.jit
  def step(rng: jax.Array, params: Any, state: Any, data: Any) -> Any:
    rng, rng_loss = jax.random.split(rng)

    def loss(params: Any) -> jax.Array:
      return flow_loss(rng_loss, params, data, apply_fn=apply_fn)[0]

    grad = jax.grad(loss)(params)
    updates, state = optimizer.update(grad, state)
    return rng, optax.apply_updates(params, updates), state

  carry = [jax.random.key(3), params, optimizer.init(params)]
  data = batch()

  def run() -> Any:
    for _ in range(_STEPS):
      carry[:] = step(*carry, data)
    return carry

  return run


def sample_call() -> Callable[[], Any]:
  """A future of each history by Euler's method."""
  model, params = model_and_params()
  velocity = functools.partial(_velocity, model)
  history = batch()[0]
  shape = 1, _BATCH, _HORIZON, 1
  return lambda: sample_flow(
    jax.random.key(4),
    velocity,
    (params, history),
    shape,
    method="euler",
    num_steps=_STEPS,
  )


def _velocity(
  model: FlowMLP, x: jax.Array, t: jax.Array, cond: Any
) -> jax.Array:
  params, history = cond
  # Whatever else a module may return.
  v: Any = model.apply(params, x, t, history)
  return v


# --- torch ---


def torch_network() -> Any:
  """The same sizes: (x, t, history) in one vector."""
  import torch  # pyright: ignore[reportMissingImports]

  torch.manual_seed(0)
  return torch.nn.Sequential(
    torch.nn.Linear(_HORIZON + _HISTORY + 1 + 2 * _WAVES, _WIDTH),
    torch.nn.SiLU(),
    torch.nn.Linear(_WIDTH, _WIDTH),
    torch.nn.SiLU(),
    torch.nn.Linear(_WIDTH, _HORIZON),
  )


def torch_velocity(network: Any) -> Callable[..., Any]:
  """(x, t, history) -> the velocity, with the same features of time."""
  import torch  # pyright: ignore[reportMissingImports]

  rate = torch.pi * torch.arange(1, _WAVES + 1)

  def velocity(x: Any, t: Any, history: Any) -> Any:
    t = t.expand(len(x))[:, None]
    times = torch.cat([t, torch.sin(t * rate), torch.cos(t * rate)], 1)
    return network(torch.cat([x, history, times], 1))

  return velocity


def _torch_train(pair: Callable[[Any, Any], Any]) -> Callable[[], Any]:
  """Steps of Adam on ``pair(z, y) -> (t, x_t, u)``."""
  import torch  # pyright: ignore[reportMissingImports]

  network = torch_network()
  velocity = torch_velocity(network)
  optimizer = torch.optim.Adam(network.parameters(), lr=_RATE)
  history, future = (torch.randn(_BATCH, n) for n in (_HISTORY, _HORIZON))

  def run() -> Any:
    for _ in range(_STEPS):
      t, x, u = pair(torch.randn_like(future), future)
      loss = ((velocity(x, t, history) - u) ** 2).sum(1).mean()
      optimizer.zero_grad()
      loss.backward()
      optimizer.step()
    return None

  return run


def against_torchcfm() -> list[_race.Row]:
  """One step of training."""
  import torchcfm  # pyright: ignore[reportMissingImports]

  matcher = torchcfm.ConditionalFlowMatcher(sigma=0.0)
  call = _torch_train(matcher.sample_location_and_conditional_flow)
  return [_train_row("torchcfm", call)]


def against_flow_matching() -> list[_race.Row]:
  """One step of training, and samples."""
  import torch  # pyright: ignore[reportMissingImports]
  from flow_matching import (  # pyright: ignore[reportMissingImports]
    path,
    solver,
  )

  straight = path.CondOTProbPath()

  def pair(z: Any, y: Any) -> Any:
    found = straight.sample(x_0=z, x_1=y, t=torch.rand(len(y)))
    return found.t, found.x_t, found.dx_t

  velocity = torch_velocity(torch_network())
  history = torch.randn(_BATCH, _HISTORY)
  ode = solver.ODESolver(
    velocity_model=lambda x, t, **rest: velocity(x, t, history)
  )

  def sample() -> Any:
    with torch.no_grad():
      return ode.sample(
        x_init=torch.randn(_BATCH, _HORIZON),
        step_size=1 / _STEPS,
        method="euler",
      )

  seconds = _race.race({"ours": sample_call(), "peer": sample})
  question = (
    f"{_STEPS} Euler steps, {_BATCH} samples: flow_matching / sample_flow"
  )
  return [
    _train_row("flow_matching", _torch_train(pair)),
    _race.ratio(question, seconds, "ours", "peer", _SAMPLE_BAR),
  ]


def _train_row(name: str, call: Callable[[], Any]) -> _race.Row:
  seconds = _race.race({"ours": train_call(), "peer": call})
  question = f"{_STEPS} training steps of {_BATCH}: {name} / flow_loss"
  return _race.ratio(question, seconds, "ours", "peer", _TRAIN_BAR)


# --- diffrax ---


def against_diffrax() -> list[_race.Row]:
  """The same field by the same steps, and by adaptive ones."""
  import diffrax

  model, params = model_and_params()
  history = batch()[0]
  z = jax.random.normal(jax.random.key(5), (_BATCH, _HORIZON, 1))
  ts = jnp.linspace(0.0, 1.0, _STEPS + 1)

  def field(x: jax.Array, t: jax.Array) -> jax.Array:
    return _velocity(model, x, t, (params, history))

  @jax.jit
  def peer(z: jax.Array) -> Any:
    return diffrax.diffeqsolve(
      diffrax.ODETerm(lambda t, x, args: field(x, jnp.asarray(t))),
      diffrax.Euler(),
      0.0,
      1.0,
      1 / _STEPS,
      z,
    ).ys

  seconds = _race.race(
    {
      "ours": lambda: integrate(field, z, ts, method="euler"),
      "peer": lambda: peer(z),
      "tsit5": lambda: integrate(field, z, ts[jnp.array([0, -1])],
                                 method="tsit5"),
    }
  )  # fmt: skip
  where = f"batch of {_BATCH}"
  return [
    _race.ratio(
      f"{_STEPS} Euler steps, {where}: diffrax / integrate",
      seconds,
      "ours",
      "peer",
      _SCAN_BAR,
    ),
    _race.ratio(
      f"{where}: {_STEPS} Euler steps / tsit5 to 1e-3, both integrate",
      seconds,
      "tsit5",
      "ours",
    ),
  ]


if __name__ == "__main__":
  app.run(main)
