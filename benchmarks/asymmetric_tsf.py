"""What do closed forms save on attention to scalars, and on N-Linear?

Float32. Peers: JAX's derivatives of the model as one writes it down, closed
forms that hold the weights of all heads, samples and lags at once, PyTorch's
``scaled_dot_product_attention`` with heads of size 1; for N-Linear ten epochs
of Adam, in one compiled loop and, as published, step by step in PyTorch.
Neural Tangents does not import beside this JAX.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch  # pyright: ignore[reportMissingImports]
from absl import app
from jax import lax

from benchmarks import _race
from experiments.asymmetric_tsf import series_windows
from jaxattn.models import (
  nlinear_fit,
  nlinear_predict,
  scalar_attention_apply,
  scalar_attention_grad,
  scalar_attention_init,
  scalar_attention_ntk,
)

_GRADIENT_BAR, _KERNEL_BAR, _FIT_BAR = 7.0, 30.0, 100.0
_SERIES = (("tmy3", 0, 96, 24, 8), ("co2", 0, 104, 26, 8))
_EPOCHS, _BATCH = 10, 32
# The best of them for the test part, which flatters the peer.
_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
_EQUAL = 0.01

Data = tuple[jax.Array, jax.Array]


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  rows = [*gradient(1024, 1024, 32), *kernel(256, 2048, 32)]
  for spec in _SERIES:
    rows += nlinear(spec)
  _race.publish("asymmetric_tsf", "Attention to scalars and N-Linear", rows)


def gradient(n: int, m: int, d: int) -> list[_race.Row]:
  """The gradient of the squared loss in the m weights."""
  params, x, y = _problem(n, m, d)
  calls = {
    "ours": scalar_attention_grad,
    "reverse": jax.jit(jax.grad(_loss(scalar_attention_apply))),
    "jax": jax.jit(jax.grad(_loss(plain))),
    "tensor": tensor_grad,
  }
  contestants: dict[str, Callable[[], Any]] = {
    name: functools.partial(call, params, x, y) for name, call in calls.items()
  }
  contestants["torch"] = torch_grad(params, x, y)
  seconds = _race.race(contestants)
  name = f"gradient, n = {n}, m = {m}, d = {d}"
  rows = [
    (f"{name}: jax.grad of the formula / ours", "ours", "jax", _GRADIENT_BAR),
    (f"{name}: closed form at once / ours", "ours", "tensor", None),
    (f"{name}: PyTorch / ours", "ours", "torch", None),
    (f"{name}: jax.grad of it / of our model", "reverse", "jax", None),
  ]
  return [_race.ratio(q, seconds, a, b, bar) for q, a, b, bar in rows]


def kernel(n: int, m: int, d: int) -> list[_race.Row]:
  """The tangent kernel of n samples."""
  params, x, _ = _problem(n, m, d)

  @jax.jit
  def peer(params: Any, x: jax.Array) -> jax.Array:
    def one(w: jax.Array, row: jax.Array) -> jax.Array:
      return plain({**params, "w": w}, row[None])[0]

    jacobian = jax.vmap(jax.grad(one), (None, 0))(params["w"], x)
    return jacobian @ jacobian.T

  seconds = _race.race(
    {
      "ours": lambda: scalar_attention_ntk(params, x, x),
      "jax": lambda: peer(params, x),
    }
  )
  name = f"kernel, n = {n}, m = {m}, d = {d}: Jacobians of JAX / ours"
  return [_race.ratio(name, seconds, "ours", "jax", _KERNEL_BAR)]


def nlinear(spec: tuple[Any, ...]) -> list[_race.Row]:
  """One solve against ten epochs."""
  train, _, test = series_windows(spec)
  fit = jax.jit(functools.partial(nlinear_fit, ridge=1e-3))
  ours = _error(fit(*train), test)
  runs = {rate: functools.partial(_adam(rate), *train) for rate in _RATES}
  errors = {rate: _error(run(), test) for rate, run in runs.items()}
  rate = min(errors, key=lambda rate: errors[rate])
  error = errors[rate] / ours - 1
  equal = "equal error" if abs(error) <= _EQUAL else f"error {error:+.1%}"
  seconds = _race.race(
    {
      "ours": lambda: fit(*train),
      "adam": runs[rate],
      "torch": torch_adam(rate, *train),
    }
  )
  name = f"N-Linear, {spec[0]}, {len(train[0])} windows, {_EPOCHS} epochs"
  return [
    _race.ratio(
      f"{name} of Adam ({equal}), {label} / ours", seconds, "ours", peer, bar
    )
    for peer, label, bar in (
      ("adam", "compiled", _FIT_BAR),
      ("torch", "PyTorch", None),
    )
  ]


def plain(params: Any, x: jax.Array) -> jax.Array:
  """The model as one writes it down."""
  logits = x[:, -1, None, None] * params["w"][None, :, None] * x[:, None]
  heads = jnp.einsum("imj,ij->im", jax.nn.softmax(logits, -1), x)
  return heads @ params["a"] / len(params["a"]) ** 0.5


@jax.jit
def tensor_grad(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
  """The closed form of the gradient with all weights at once."""
  w, a = params["w"], params["a"] / len(params["a"]) ** 0.5
  prob = jax.nn.softmax(x[:, -1, None, None] * w[None, :, None] * x[:, None])
  mean = jnp.einsum("imj,ij->im", prob, x)
  variance = jnp.einsum("imj,ij->im", prob, x**2) - mean**2
  return a * (((mean @ a - y) * x[:, -1]) @ variance)


def torch_grad(
  params: Any, x: jax.Array, y: jax.Array
) -> Callable[[], torch.Tensor]:
  """The same by autograd through fused attention."""
  a, x_, y_ = (torch.tensor(np.asarray(v)) for v in (params["a"], x, y))
  w = torch.tensor(np.asarray(params["w"]), requires_grad=True)
  (n, d), m = x_.shape, len(w)
  keys = x_[:, None, :, None].expand(n, m, d, 1)
  attend = torch.nn.functional.scaled_dot_product_attention

  def run() -> torch.Tensor:
    query = (x_[:, -1:] * w[None])[:, :, None, None]
    heads = attend(query, keys, keys, scale=1.0)[:, :, 0, 0]
    loss = ((heads @ a / m**0.5 - y_) ** 2).sum() / 2
    return torch.autograd.grad(loss, w)[0]

  return run


def torch_adam(rate: float, x: jax.Array, y: jax.Array) -> Callable[[], Any]:
  """Ten epochs of an N-Linear layer, a step at a time."""
  x_, y_ = (torch.tensor(np.asarray(v)) for v in (x, y))

  def run() -> Any:
    torch.manual_seed(0)
    layer = torch.nn.Linear(x_.shape[1], y_.shape[1], bias=False)
    optimizer = torch.optim.Adam(layer.parameters(), lr=rate)
    for _ in range(_EPOCHS):
      for rows in torch.randperm(len(x_)).split(_BATCH):
        last = x_[rows, -1:]
        loss = ((layer(x_[rows] - last) + last - y_[rows]) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return layer.weight

  return run


def _adam(rate: float) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """Ten epochs in one compiled loop; what is left of an epoch is dropped."""
  optimizer = optax.adam(rate)

  def loss(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.square(nlinear_predict(w, x) - y).mean()

  @jax.jit
  def run(x: jax.Array, y: jax.Array) -> jax.Array:
    n = len(x) // _BATCH * _BATCH
    keys = jax.random.split(jax.random.key(0), _EPOCHS)
    order = jax.vmap(lambda key: jax.random.permutation(key, len(x))[:n])(keys)

    def step(carry: Any, rows: jax.Array) -> tuple[Any, None]:
      w, state = carry
      grads = jax.grad(loss)(w, x[rows], y[rows])
      updates, state = optimizer.update(grads, state, w)
      return (optax.apply_updates(w, updates), state), None

    w = jnp.zeros((x.shape[1], y.shape[1]))
    carry = w, optimizer.init(w)
    return lax.scan(step, carry, order.reshape(-1, _BATCH))[0][0]

  return run


def _error(w: jax.Array, data: Data) -> float:
  return float(jnp.square(nlinear_predict(w, data[0]) - data[1]).mean())


def _loss(apply: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.square(apply(params, x) - y).sum() / 2

  # Of the weights that the theory trains.
  return lambda params, x, y: loss(
    {"w": params["w"], "a": lax.stop_gradient(params["a"])}, x, y
  )


def _problem(n: int, m: int, d: int) -> tuple[Any, jax.Array, jax.Array]:
  rngs = jax.random.split(jax.random.key(0), 3)
  params = scalar_attention_init(rngs[0], m, d)
  x = jax.random.normal(rngs[1], (n, d))
  return params, x, jax.random.normal(rngs[2], (n,))


if __name__ == "__main__":
  app.run(main)
