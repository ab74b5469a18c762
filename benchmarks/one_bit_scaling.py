"""What do signs cost in training, and what does their kernel cost?

Peers: a training step of the twin of full precision, and one written plainly,
by ``jax.value_and_grad`` of the loss with the usual straight-through trick;
memory of weights in float32. Float32.
"""

import functools

import jax
import jax.numpy as jnp
from absl import app

from benchmarks import _race
from jaxattn.ntk import one_bit
from jaxattn.numerics import pack_signs

# A step of signs may take 1.15 times one of full precision.
_STEP_BAR = 1 / 1.15
_NUM_STEPS = 50
# Data, inputs and widths of the networks that are trained.
_SIZES = (512, 64, 512), (512, 64, 4096)
# Seconds that the exact kernel of 64 points in 16 dimensions may take.
_KERNEL_SECONDS = 5.0


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  rows = [row for sizes in _SIZES for row in training(*sizes)]
  rows += [kernel(16, 64), weights(4096, 64, 8)]
  _race.publish("one_bit_scaling", "Networks of signs", rows)


def training(n: int, d: int, m: int, rounds: int = 9) -> list[_race.Row]:
  """Gradient descent on n points by signs, latent weights, and plain code."""
  rngs = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(rngs[0], (n, d)) / d**0.5
  y = jax.random.rademacher(rngs[1], (n,), jnp.float32)
  params = one_bit.init(rngs[2], m, d)
  # Small beside 2 / n, which no eigenvalue of the kernel reaches.
  rate = 0.5 / n
  call = functools.partial(
    one_bit.train_one_bit,
    params,
    x,
    y,
    learning_rate=rate,
    num_steps=_NUM_STEPS,
  )
  log = call(quantized=True)[1]
  off = float(jnp.abs(log.loss - plain(params, x, y, rate)).max())
  if off > 1e-3 * float(log.loss[0]):
    raise RuntimeError(f"losses differ by {off}")
  seconds = _race.race(
    {
      "signs": lambda: call(quantized=True),
      "full": lambda: call(quantized=False),
      "plain": lambda: plain(params, x, y, rate),
    },
    rounds=rounds,
  )
  name = f"training, n = {n}, d = {d}, m = {m}"
  return [
    _race.ratio(f"{name}: full / signs", seconds, "signs", "full", _STEP_BAR),
    _race.ratio(f"{name}: plain JAX / signs", seconds, "signs", "plain"),
  ]


@jax.jit
def plain(
  params: one_bit.OneBit, x: jax.Array, y: jax.Array, rate: float
) -> jax.Array:
  """Losses of straight-through descent as it is usually written."""

  def loss(w: jax.Array) -> jax.Array:
    q = w + jax.lax.stop_gradient(jnp.where(w >= 0, 1.0, -1.0) - w)
    f = jax.nn.relu(x @ q.T) @ params.output / len(w) ** 0.5
    return ((f - y) ** 2).sum() / 2

  def step(w: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
    value, grad = jax.value_and_grad(loss)(w)
    return w - rate * grad, value

  w, values = jax.lax.scan(step, params.latent, length=_NUM_STEPS)
  return jnp.append(values, loss(w))


def kernel(d: int, n: int) -> _race.Row:
  """The exact kernel of n points: all 2^d networks of one neuron."""
  x = jax.random.normal(jax.random.key(0), (n, d))
  x /= jnp.linalg.norm(x, axis=1, keepdims=True)
  seconds = _race.race({"ours": lambda: one_bit.secant_kernel(x)}, rounds=5)
  name = f"exact kernel, d = {d}, n = {n}: {_KERNEL_SECONDS:g} s / ours"
  against = {"bar": [_KERNEL_SECONDS] * 5, **seconds}
  return _race.ratio(name, against, "ours", "bar", 1.0)


def weights(m: int, d: int, n: int) -> _race.Row:
  """Bytes of weights that packed networks read."""
  rngs = jax.random.split(jax.random.key(0))
  params = one_bit.init(rngs[0], m, d, paired=False)
  x = jax.random.normal(rngs[1], (n, d))
  words = pack_signs(params.latent)
  out = one_bit.packed_apply(x, words, params.output)
  off = jnp.abs(out - one_bit.apply(params, x)).max()
  if off > 1e-5:
    raise RuntimeError(f"outputs differ by {off}")
  return _race.figure(
    f"weights, m = {m}, d = {d}: bytes of float32 / packed",
    params.latent.nbytes / words.nbytes,
    32,
  )


if __name__ == "__main__":
  app.run(main)
