"""How fast is exact attention on a CPU, and how little memory does it take?

Peers: PyTorch's ``scaled_dot_product_attention`` and
``jax.nn.dot_product_attention``, float32, B=1, N=8, H=64. The floor is what the
products and exponentials alone would take, at the rates that XLA reaches
on this machine in the same run: ``floor / ours`` is 1 when nothing else costs
time, and ``PyTorch / floor`` is the most that any such code can win.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from absl import app
from jax import lax

from benchmarks import _race
from jaxattn.attention import softmax_attention

_HEADS, _DIM = 8, 64


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  rows = []
  for length in (4096, 8192):
    rows += forward(length)
  rows += causal(8192)
  rows += gradient(4096)
  rows += memory(16384)
  rows += small()
  _race.publish("attention", "Exact attention", rows)


def forward(length: int) -> list[_race.Row]:
  """Forward pass against both peers, and against the floor."""
  arrays = _inputs(length)
  ours = jax.jit(softmax_attention)
  dense = jax.jit(jax.nn.dot_product_attention)
  tensors = [torch.from_numpy(x).transpose(1, 2) for x in arrays]
  attend = torch.nn.functional.scaled_dot_product_attention
  seconds = _race.race(
    {
      "ours": functools.partial(ours, *arrays),
      "torch": functools.partial(attend, *tensors),
      "jax.nn": functools.partial(dense, *arrays),
      **_floor_contestants(),
    }
  )
  return [
    _race.ratio(
      f"forward, T = S = {length}: PyTorch / ours",
      seconds,
      "ours",
      "torch",
      1.5,
    ),
    _race.ratio(
      f"forward, T = S = {length}: jax.nn / ours",
      seconds,
      "ours",
      "jax.nn",
      4.5,
    ),
    *_floor_rows(f"forward, T = S = {length}", seconds, length, products=2),
    _race.ratio(
      f"matrix products alone, {_MATRIX} x {_MATRIX}: PyTorch / XLA",
      seconds,
      "products",
      "torch products",
    ),
  ]


def causal(length: int) -> list[_race.Row]:
  """What skipping hidden tiles saves."""
  arrays = _inputs(length)
  options: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (512, 0)},
  }
  seconds = _race.race(
    {
      name: functools.partial(
        jax.jit(functools.partial(softmax_attention, **kwargs)), *arrays
      )
      for name, kwargs in options.items()
    }
  )
  name = f"forward, T = S = {length}"
  return [
    _race.ratio(f"{name}: full / causal", seconds, "causal", "full", 1.7),
    _race.ratio(f"{name}: full / window of 512", seconds, "window", "full"),
  ]


def gradient(length: int) -> list[_race.Row]:
  """Forward and backward together."""
  *arrays, cotangent = _inputs(length, num=4)
  seconds = _race.race(
    {
      "ours": functools.partial(
        _pullback(softmax_attention), *arrays, cotangent
      ),
      "torch": functools.partial(_torch_pullback, *arrays, cotangent),
      "jax.nn": functools.partial(
        _pullback(jax.nn.dot_product_attention), *arrays, cotangent
      ),
      **_floor_contestants(),
    },
    rounds=7,
  )
  name = f"forward and backward, T = S = {length}"
  return [
    _race.ratio(f"{name}: PyTorch / ours", seconds, "ours", "torch", 1.4),
    _race.ratio(f"{name}: jax.nn / ours", seconds, "ours", "jax.nn", 3.0),
    *_floor_rows(name, seconds, length, products=7, exponentials=2),
  ]


def memory(length: int) -> list[_race.Row]:
  """Temporary bytes that the compiler reserves, forward and with gradient."""
  shape = jax.ShapeDtypeStruct((1, length, _HEADS, _DIM), jnp.float32)
  rows = []
  for name, wrap, count in (
    ("forward", jax.jit, 3),
    ("forward and backward", _pullback, 4),
  ):
    ours, dense = (
      _race.temporary_bytes(wrap(f), *(shape,) * count)
      for f in (softmax_attention, jax.nn.dot_product_attention)
    )
    question = f"temporary memory, {name}, T = S = {length}: jax.nn / ours"
    rows.append(_race.figure(question, dense / ours, 50.0))
  return rows


def small() -> list[_race.Row]:
  """Short sequences and decoding, where tiles have nothing to save."""
  rows = []
  for batch, queries, keys in ((8, 128, 128), (1, 1024, 1024), (1, 1, 8192)):
    arrays = [
      np.random.default_rng(0)
      .standard_normal((batch, n, _HEADS, _DIM))
      .astype(np.float32)
      for n in (queries, keys, keys)
    ]
    seconds = _race.race(
      {
        "ours": functools.partial(jax.jit(softmax_attention), *arrays),
        "jax.nn": functools.partial(
          jax.jit(jax.nn.dot_product_attention), *arrays
        ),
      },
      rounds=21,
    )
    name = f"forward, B = {batch}, T = {queries}, S = {keys}: jax.nn / ours"
    rows.append(_race.ratio(name, seconds, "ours", "jax.nn"))
  return rows


def _inputs(length: int, num: int = 3) -> list[np.ndarray]:
  rng = np.random.default_rng(0)
  shape = (1, length, _HEADS, _DIM)
  return [rng.standard_normal(shape).astype(np.float32) for _ in range(num)]


def _pullback(attend: Callable[..., Any]) -> Any:
  def run(query: Any, key: Any, value: Any, cotangent: Any) -> Any:
    return jax.vjp(attend, query, key, value)[1](cotangent)

  return jax.jit(run)


def _torch_pullback(*arrays: np.ndarray) -> torch.Tensor:
  *tensors, cotangent = (torch.from_numpy(x).transpose(1, 2) for x in arrays)
  leaves = [x.detach().requires_grad_() for x in tensors]
  out = torch.nn.functional.scaled_dot_product_attention(*leaves)
  out.backward(cotangent)
  assert leaves[0].grad is not None
  return leaves[0].grad


_REPEATS, _MATRIX, _VECTOR = 8, 1024, 1 << 18


def _floor_contestants() -> dict[str, Callable[[], Any]]:
  """A matrix product and an exponential, in cache, many times."""
  matrix = jnp.full((_MATRIX, _MATRIX), 1 / _MATRIX, jnp.float32)
  vector = jnp.zeros(_VECTOR, jnp.float32)

  @jax.jit
  def products(a: jax.Array) -> jax.Array:
    return lax.fori_loop(0, _REPEATS, lambda _, x: x @ a, a)

  @jax.jit
  def exponentials(x: jax.Array) -> jax.Array:
    return lax.fori_loop(0, 50 * _REPEATS, lambda _, y: jnp.exp(y - 1), x)

  tensor = torch.from_numpy(np.array(matrix))

  def torch_products() -> torch.Tensor:
    x = tensor
    for _ in range(_REPEATS):
      x = x @ tensor
    return x

  return {
    "products": functools.partial(products, matrix),
    "exponentials": functools.partial(exponentials, vector),
    "torch products": torch_products,
  }


def _floor_rows(
  name: str,
  seconds: dict[str, list[float]],
  length: int,
  products: int,
  exponentials: int = 1,
) -> list[_race.Row]:
  """How near we are to the floor, and where the floor leaves PyTorch."""
  scores = _HEADS * length**2
  flops = 2.0 * scores * _DIM * products
  rounds = zip(seconds["products"], seconds["exponentials"], strict=True)
  floor = [
    p * flops / (2.0 * _REPEATS * _MATRIX**3)
    + e * exponentials * scores / (50.0 * _REPEATS * _VECTOR)
    for p, e in rounds
  ]
  seconds = {**seconds, "floor": floor}
  return [
    _race.ratio(f"{name}: floor / ours", seconds, "ours", "floor"),
    _race.ratio(f"{name}: PyTorch / floor", seconds, "floor", "torch"),
  ]


if __name__ == "__main__":
  app.run(main)
