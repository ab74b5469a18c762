"""What does the Newton method save in recovering tokens from attention?

Sixteen starts near the truth, weights and outputs observed, float64, to a
relative error of 1e-6: ours, with the Hessian of Gauss-Newton, against scipy's
trust-region least squares with JAX's Jacobian, one start after the other,
against 5000 steps of Adam on all starts at once, which do not get there, and
against ours with the whole Hessian. Products with the Hessian, and the whole
of it, against ``jax.jvp`` of ``jax.grad`` and ``jax.hessian``.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app
from scipy import optimize

from benchmarks import _race
from jaxattn import newton
from jaxattn.regression import attention_inversion

_STARTS, _RADIUS, _ERROR = 16, 0.3, 1e-6
_SPEED_BAR, _PRODUCT_BAR, _HESSIAN_BAR = 5.0, 1 / 1.1, 1.3
_ADAM_STEPS, _ADAM_RATE = 5000, 0.02


def main(argv: list[str]) -> None:
  """Runs all races and rewrites the section of RESULTS.md."""
  del argv
  jax.config.update("jax_enable_x64", True)
  rows = [*recoveries(8, 4), *derivatives(32, 8)]
  _race.publish("attention_inversion", "Inversion of attention", rows)


def planted(n: int, d: int) -> tuple[np.ndarray, Any]:
  """Tokens, and what a random layer makes of them."""
  rng = np.random.default_rng(0)
  truth = rng.normal(size=(n, d))
  w, v = (jnp.asarray(rng.normal(size=(d, d))) * x for x in (2 / d, 1.0))
  weights, output = attention_inversion.predict(jnp.asarray(truth), w, v)
  data = attention_inversion.prepare(w, v, weights=weights, output=output)
  return truth, data


def recoveries(
  n: int, d: int, *, adam_steps: int = _ADAM_STEPS, rounds: int = 5
) -> list[_race.Row]:
  """From starts near the truth to a relative error of 1e-6."""
  truth, data = planted(n, d)
  target = truth.reshape(-1)
  noise = np.random.default_rng(1).normal(size=(_STARTS, n * d))
  starts = jnp.asarray(target + _RADIUS * noise)
  contestants = {
    "ours": functools.partial(_newton, starts, data, "gauss_newton"),
    "whole": functools.partial(_newton, starts, data, "newton"),
    "scipy": functools.partial(_scipy, np.asarray(starts), data),
    "adam": functools.partial(_adam, starts, data, adam_steps),
  }
  for name, run in contestants.items():
    gaps = np.linalg.norm(np.asarray(run()) - target, axis=1)
    errors = gaps / np.linalg.norm(target)
    print(f"{name}: {(errors < _ERROR).sum()} of {_STARTS}, {errors.max():.1e}")
  seconds = _race.race(contestants, rounds=rounds)
  what = f"n = {n}, d = {d}, {_STARTS} starts"
  return [
    _race.ratio(
      f"{what}: scipy least_squares / ours",
      seconds,
      "ours",
      "scipy",
      _SPEED_BAR,
    ),
    _race.ratio(
      f"{what}: {adam_steps} steps of Adam / ours",
      seconds,
      "ours",
      "adam",
      _SPEED_BAR,
    ),
    _race.ratio(
      f"{what}: with the whole Hessian / ours", seconds, "ours", "whole"
    ),
  ]


def derivatives(n: int, d: int, *, rounds: int = 9) -> list[_race.Row]:
  """Products with the Hessian in closed form or by JAX, and all of it."""
  truth, data = planted(n, d)
  rng = np.random.default_rng(1)
  x = jnp.asarray(truth.reshape(-1) + 0.1 * rng.normal(size=n * d))
  v = jnp.asarray(rng.normal(size=n * d))
  loss = attention_inversion.loss

  @jax.jit
  def ours(x: jax.Array, v: jax.Array, data: Any) -> jax.Array:
    return attention_inversion.hvp(x, v, data)

  @jax.jit
  def theirs(x: jax.Array, v: jax.Array, data: Any) -> jax.Array:
    return jax.jvp(lambda z: jax.grad(loss)(z, data), (x,), (v,))[1]

  @jax.jit
  def ours_dense(x: jax.Array, data: Any) -> jax.Array:
    h = attention_inversion.curvature(x, data)
    return newton.curvature_dense(h, dim=len(x))

  theirs_dense = jax.jit(jax.hessian(loss))
  products = {
    "ours": functools.partial(_often, ours, x, v, data),
    "jvp": functools.partial(_often, theirs, x, v, data),
  }
  dense = {
    "ours": functools.partial(_often, ours_dense, x, data),
    "hessian": functools.partial(_often, theirs_dense, x, data),
  }
  what = f"n = {n}, d = {d}"
  return [
    _race.ratio(
      f"{what}: jvp of grad / product with the Hessian",
      _race.race(products, rounds=rounds),
      "ours",
      "jvp",
      _PRODUCT_BAR,
    ),
    _race.ratio(
      f"{what}: jax.hessian / Hessian",
      _race.race(dense, rounds=rounds),
      "ours",
      "hessian",
      _HESSIAN_BAR,
    ),
  ]


def _often(run: Any, *args: Any) -> jax.Array:
  """Twenty calls: one takes less than a clock tells."""
  for _ in range(19):
    jax.block_until_ready(run(*args))
  return run(*args)


@functools.partial(jax.jit, static_argnums=2)
def _newton(starts: jax.Array, data: Any, curvature: str) -> jax.Array:
  config = newton.NewtonConfig(max_steps=150, rtol=1e-7, curvature=curvature)

  def one(x: jax.Array) -> jax.Array:
    problem = attention_inversion.problem()
    return newton.minimize(problem, x, data, config=config).x

  return jax.vmap(one)(starts)


def _residual(x: jax.Array, data: Any) -> jax.Array:
  got = attention_inversion.predict(
    x.reshape(-1, data.w.shape[-1]), data.w, data.v
  )
  pairs = zip(got, (data.weights, data.output), strict=True)
  return jnp.concatenate([(y - z).ravel() for y, z in pairs])


_jit_residual = jax.jit(_residual)
_jit_jacobian = jax.jit(jax.jacobian(_residual))


def _scipy(starts: np.ndarray, data: Any) -> np.ndarray:
  def jacobian(x: np.ndarray) -> Any:
    return np.asarray(_jit_jacobian(x, data))

  def one(x0: np.ndarray) -> np.ndarray:
    return optimize.least_squares(
      lambda x: np.asarray(_jit_residual(x, data)),
      x0,
      jac=jacobian,  # pyright: ignore[reportArgumentType]
      method="trf",
    ).x

  return np.stack([one(x0) for x0 in starts])


@functools.partial(jax.jit, static_argnums=2)
def _adam(starts: jax.Array, data: Any, num_steps: int) -> jax.Array:
  optimizer = optax.adam(_ADAM_RATE)

  def one(x: jax.Array) -> jax.Array:
    def body(carry: Any, _: None) -> tuple[Any, None]:
      x, state = carry
      grad = attention_inversion.value_and_grad(x, data)[1]
      updates, state = optimizer.update(grad, state)
      return (x + updates, state), None

    start = (x, optimizer.init(x))
    return jax.lax.scan(body, start, length=num_steps)[0][0]

  return jax.vmap(one)(starts)


if __name__ == "__main__":
  app.run(main)
