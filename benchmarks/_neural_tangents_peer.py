"""Serves kernels of neural-tangents to a race against it.

It runs in an environment of its own, on a JAX that neural-tangents still
imports on, and uses nothing of this project. Arguments: a folder. It holds
``0.npz``, ``1.npz``, ...: x, then the weights of each network. For a line "i
method" on standard input it computes that kernel, and answers with a line;
``i_method.npy`` holds what came out the first time.
"""

import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import neural_tangents as nt  # pyright: ignore[reportMissingImports]
import numpy as np
from neural_tangents import stax  # pyright: ignore[reportMissingImports]


def network(params: list[jax.Array], x: jax.Array) -> jax.Array:
  """ReLU layers with weights of variance 1 and the factors of this project."""
  h = x / x.shape[1] ** 0.5
  for w in params[:-1]:
    h = jax.nn.relu(h @ w) * (2 / w.shape[1]) ** 0.5
  return h @ params[-1]


def softmax(params: list[jax.Array], x: jax.Array) -> jax.Array:
  """Two layers, of which the first is trained, over the root of the width."""
  hidden, output = params
  m = len(hidden)
  return m**0.5 * jax.nn.softmax(x @ hidden.T) @ jax.lax.stop_gradient(output)


def main(folder: pathlib.Path) -> None:
  """Answers until standard input ends."""
  print(f"neural-tangents {nt.__version__}, jax {jax.__version__}", flush=True)
  calls = {}
  for line in sys.stdin:
    name, method = line.split()
    if (name, method) not in calls:
      arrays = np.load(folder / f"{name}.npz")
      x, *params = (jnp.asarray(arrays[key]) for key in arrays.files)
      calls[name, method] = prepare(method, params, x)
      np.save(folder / f"{name}_{method}.npy", calls[name, method]())
    jax.block_until_ready(calls[name, method]())
    print("done", flush=True)


def prepare(
  method: str, params: list[jax.Array], x: jax.Array
) -> Callable[[], Any]:
  """A compiled kernel, on what it needs."""
  if method == "stax":
    layers = []
    for w in params[:-1]:
      layers += [stax.Dense(w.shape[1], W_std=2**0.5 if layers else 1.0)]
      layers += [stax.Relu()]
    layers.append(stax.Dense(1, W_std=2**0.5))
    kernel = jax.jit(lambda x: stax.serial(*layers)[2](x, None, "ntk"))
    return lambda: kernel(x)
  apply = softmax if method == "softmax" else network
  name = "JACOBIAN_CONTRACTION" if method == "softmax" else method
  kernel = jax.jit(
    nt.empirical_ntk_fn(
      apply,
      trace_axes=(),
      vmap_axes=0,
      implementation=nt.NtkImplementation[name],
    )
  )
  return lambda: kernel(x, None, params)


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
