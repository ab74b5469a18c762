"""The family of regression problems: one instance of each."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import flatten_util

from jaxattn import newton
from jaxattn.models import LeakageBlock
from jaxattn.regression import (
  attention,
  attention_inversion,
  gradient_leakage,
  leverage_inversion,
  softmax_resnet,
  two_layer,
)


@dataclasses.dataclass(frozen=True)
class Member:
  """A problem, and an instance of it.

  Attributes:
    name: of the module, and of the variant.
    problem: what the solver takes.
    make: seed -> data of random targets and an interior point (p,).
    planted: () -> data whose minimum is regular, and a start near it.
    mu0: damping with which a solver finds that minimum.
    leaf: field of the data that implicit gradients are tested in.
  """

  name: str
  problem: newton.Problem
  make: Callable[[int], tuple[Any, jax.Array]]
  planted: Callable[[], tuple[Any, jax.Array]]
  leaf: str
  mu0: float = 1e-2


def _softmax_resnet(residual_scale: float) -> Member:
  def make(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(20, 3)), np.eye(20)[0]
    data = softmax_resnet.prepare(a, b, residual_scale=residual_scale)
    return data, jnp.asarray(0.5 * rng.normal(size=3))

  def planted():
    rng = np.random.default_rng(1)
    a, x = rng.normal(size=(200, 4)) / 2, rng.normal(size=4)
    b = softmax_resnet.predict(x, a, residual_scale=residual_scale)
    b = b * (1 + 0.05 * rng.normal(size=200))
    data = softmax_resnet.prepare(a, b, w=5e-4, residual_scale=residual_scale)
    return data, jnp.asarray(x)

  return Member(
    f"softmax_resnet-{residual_scale}",
    softmax_resnet.problem(),
    make,
    planted,
    "b",
  )


def _two_layer(order: str) -> Member:
  rows, units = (30, 6) if order == "softmax_relu" else (6, 30)

  def make(seed):
    rng = np.random.default_rng(seed)
    a1, a2 = rng.normal(size=(rows, 4)), rng.normal(size=(units, rows))
    data = two_layer.prepare(a1, a2, rng.normal(size=units) / 4)
    return data, jnp.asarray(rng.normal(size=4))

  def planted():
    rng = np.random.default_rng(3)
    a1, a2 = rng.normal(size=(rows, 4)), rng.normal(size=(units, rows))
    x = rng.normal(size=4)
    b = two_layer.predict(x, a1, a2, order=order)
    b = b * (1 + 0.01 * rng.normal(size=units))
    return two_layer.prepare(a1, a2, b, w=0.1), jnp.asarray(x)

  return Member(
    f"two_layer-{order}",
    two_layer.problem(order=order),
    make,
    planted,
    "b",
    mu0=1.0,
  )


def _attention() -> Member:
  def instance(rng, n, noise, ridge):
    a1, a2, a3 = rng.normal(size=(3, n, 3))
    x, y = rng.normal(size=(3, 3)) / 2, rng.normal(size=(3, 2))
    b = attention.predict(x, y, a1, a2, a3) + noise * rng.normal(size=(n, 2))
    data = attention.prepare(a1, a2, a3, b, ridge_x=ridge, ridge_y=ridge)
    return data, np.concatenate([x.ravel(), y.ravel()])

  def make(seed):
    rng = np.random.default_rng(seed)
    data, x = instance(rng, 9, 1.0, 0.0)
    return data, jnp.asarray(x + 0.5 * rng.normal(size=x.shape))

  def planted():
    data, x = instance(np.random.default_rng(1), 48, 0.01, 1e-3)
    return data, jnp.asarray(x)

  return Member("attention", attention.problem(), make, planted, "b", mu0=1e-1)


def _leverage_inversion() -> Member:
  def instance(rng, shares):
    a, b = rng.normal(size=(20, 3)), -1 - rng.uniform(size=20)
    points = []
    for share in shares:
      side = rng.normal(size=3)
      speed = a @ side
      wall = (b[speed < 0] / speed[speed < 0]).min()
      points.append(share * wall * side)
    target, x = points
    sigma = leverage_inversion.leverage(jnp.asarray(target), a, b)
    return leverage_inversion.prepare(a, b, sigma), jnp.asarray(x)

  def planted():
    data, x = instance(np.random.default_rng(0), (0.6, 0.5))
    sigma = leverage_inversion.leverage(x, data.a, data.b)
    return data._replace(sigma=sigma), x

  return Member(
    "leverage_inversion",
    leverage_inversion.problem(),
    lambda seed: instance(np.random.default_rng(seed), (0.9, 0.8)),
    planted,
    "sigma",
  )


def _attention_inversion() -> Member:
  def instance(rng, share):
    tokens, w, v = rng.normal(size=(3, 4, 4))
    w = w / 2
    weights, output = attention_inversion.predict(tokens, w, v)
    data = attention_inversion.prepare(w, v, weights=weights, output=output)
    return data, jnp.asarray((tokens + share * rng.normal(size=(4, 4))).ravel())

  return Member(
    "attention_inversion",
    attention_inversion.problem(),
    lambda seed: instance(np.random.default_rng(seed), 1.0),
    lambda: instance(np.random.default_rng(0), 0.0),
    "output",
  )


def _gradient_leakage() -> Member:
  shape = 2, 3
  block = LeakageBlock(mlp=4, num_classes=3)
  drawn = block.init(jax.random.key(0), jnp.zeros(shape))["params"]
  theta, unravel = flatten_util.ravel_pytree(drawn)

  def loss(theta, embeddings, y):
    return block.loss(unravel(theta), embeddings, y)

  def instance(rng, share):
    x = rng.normal(size=shape)
    y = jax.nn.one_hot(1, 3)
    leaked = jax.grad(loss)(theta, jnp.asarray(x), y)
    data = gradient_leakage.GradientLeakageData(theta, leaked, y)
    return data, jnp.asarray((x + share * rng.normal(size=shape)).ravel())

  return Member(
    "gradient_leakage",
    gradient_leakage.problem(loss, shape),
    lambda seed: instance(np.random.default_rng(seed), 1.0),
    lambda: instance(np.random.default_rng(0), 0.0),
    "leaked",
  )


MEMBERS = (
  _attention(),
  _attention_inversion(),
  _gradient_leakage(),
  _leverage_inversion(),
  _softmax_resnet(0.0),
  _softmax_resnet(1.0),
  _two_layer("softmax_relu"),
  _two_layer("relu_softmax"),
)


@functools.cache
def minimum(member):
  """What Newton's method finds for the planted data, and these data."""
  data, start = member.planted()
  config = newton.NewtonConfig(mu0=member.mu0, rtol=1e-14, max_steps=100)
  return newton.minimize(member.problem, start, data, config=config), data
