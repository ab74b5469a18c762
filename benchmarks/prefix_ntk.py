"""What do closed forms save in the theory of prefixes?

Peers: a Jacobian per datum by ``vmap`` of ``jacrev``, contracted, against
``prefix_ntk``; ``jax.nn`` attention to prefix and context put together against
``prefix_attention``. Float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

from benchmarks import _race
from jaxattn.attention import prefix_attention
from jaxattn.ntk import prefix_ntk

_KERNEL_BAR = 20.0
# Length of the prefix, queries, and how many times faster it must be.
_ATTENTION_BARS = (256, 256, 1.0), (4096, 16, 1.2), (16384, 16, 1.2)
# Relative differences beyond which the two do not compute the same.
_SAME = 1e-5


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  rows = kernel(64, 8, 4096, 32)
  for length, queries, bar in _ATTENTION_BARS:
    rows += attention(length, queries, bar)
  _race.publish("prefix_ntk", "Kernels of prefixes", rows)


def kernel(n: int, v: int, m: int, d: int, rounds: int = 5) -> list[_race.Row]:
  """One kernel of n data with v outputs; the same numbers come out."""
  rng = np.random.default_rng(0)
  key, value, x = (_normal(rng, shape) for shape in ((m, d), (m, v), (n, d)))
  call = key, value, x / d**0.5
  ours, peer = jax.jit(prefix_ntk), jax.jit(by_jacobians)
  want = peer(*call)
  error = jnp.linalg.norm(ours(*call) - want) / jnp.linalg.norm(want)
  if error > _SAME:
    raise RuntimeError(f"kernels differ by {error}")
  seconds = _race.race(
    {
      "ours": functools.partial(ours, *call),
      "jax": functools.partial(peer, *call),
    },
    rounds=rounds,
  )
  memory = [_race.temporary_bytes(fn, *call) for fn in (peer, ours)]
  name = f"kernel, n = {n}, v = {v}, m = {m}, d = {d}"
  return [
    _race.ratio(
      f"{name}: vmap(jacrev), contracted / ours",
      seconds,
      "ours",
      "jax",
      _KERNEL_BAR,
    ),
    # A Jacobian has d entries where ours has one.
    _race.figure(f"{name}: the same, memory", memory[0] / memory[1], d),
  ]


def by_jacobians(key: jax.Array, value: jax.Array, x: jax.Array) -> jax.Array:
  """The kernel by automatic differentiation of each datum."""
  m = len(key)

  def output(key: jax.Array, value: jax.Array, x: jax.Array) -> jax.Array:
    return jax.nn.softmax(key @ x) @ value

  one = jax.vmap(jax.jacrev(output, argnums=(0, 1)), in_axes=(None, None, 0))
  left, right = (
    jnp.einsum("iamp,jbmp->iajb", y, y) for y in one(key, value, x)
  )
  return m * (left + right)


def attention(
  length: int, queries: int, bar: float, *, heads: int = 8, dim: int = 64
) -> list[_race.Row]:
  """As many keys in the context as queries; temporary memory besides."""
  rng = np.random.default_rng(0)
  call = [_normal(rng, (1, queries, heads, dim)) for _ in range(3)]
  call += [_normal(rng, (length, heads, dim)) for _ in range(2)]
  ours, peer = jax.jit(prefix_attention), jax.jit(concatenated)
  seconds = _race.race(
    {
      "ours": functools.partial(ours, *call),
      "jax.nn": functools.partial(peer, *call),
    }
  )
  memory = [_race.temporary_bytes(fn, *call) for fn in (peer, ours)]
  name = f"attention, m = {length}, T = S = {queries}"
  return [
    _race.ratio(
      f"{name}: jax.nn, prefix and context together / ours",
      seconds,
      "ours",
      "jax.nn",
      bar,
    ),
    _race.figure(f"{name}: the same, memory", memory[0] / max(memory[1], 1)),
  ]


def concatenated(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  prefix_key: jax.Array,
  prefix_value: jax.Array,
) -> jax.Array:
  """What attention to a prefix costs otherwise."""
  key = jnp.concatenate((prefix_key[None], key), 1)
  value = jnp.concatenate((prefix_value[None], value), 1)
  return jax.nn.dot_product_attention(query, key, value)


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> jax.Array:
  return jnp.asarray(rng.standard_normal(shape, np.float32))


if __name__ == "__main__":
  app.run(main)
