"""A training: Adam on noisy least squares finds the weights."""

import os
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from experiments import harness

WEIGHTS = np.linspace(-1.0, 1.0, 8, dtype=np.float32)


def loss_fn(params, batch, rng):
  noise = 0.01 * jax.random.normal(rng, batch.shape[:1], jnp.float32)
  error = batch @ (params["w"] - WEIGHTS) + noise
  return jnp.mean(error**2), {"distance": jnp.linalg.norm(error)}


def run(
  config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]
) -> harness.Verdict:
  wd = harness.open_workdir(workdir, config)

  mesh = harness.device_mesh("data")
  sharded = jax.NamedSharding(mesh, jax.P("data"))
  replicated = jax.NamedSharding(mesh, jax.P())

  def batches(step):
    time.sleep(config.pause)
    rng = np.random.default_rng((config.seed, step))
    return jax.device_put(rng.standard_normal((16, 8), np.float32), sharded)

  start = wd.point("start", lambda: {"w": np.zeros(8, np.float32)})
  params = harness.train_loop(
    jax.random.key(config.seed + 1),
    loss_fn,
    jax.device_put(start, replicated),
    batches,
    optimizer=optax.adam(0.05),
    num_steps=config.num_steps,
    workdir=wd,
    log_every=5,
    checkpoint_every=10,
  )
  distance = float(np.linalg.norm(params["w"] - WEIGHTS))
  return harness.finish(
    wd,
    claim="Adam finds the weights of a least-squares problem.",
    source="a textbook",
    paper="0",
    checks=[harness.Check("distance", distance, 0.0, config.accepted)],
  )


if __name__ == "__main__":
  harness.main(run, "descent")
