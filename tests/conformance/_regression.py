"""The family of regression problems: one instance of each."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import newton
from jaxattn.regression import softmax_resnet, two_layer


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
    indefinite: whether some Hessian of ``make`` has a negative eigenvalue.
  """

  name: str
  problem: newton.Problem
  make: Callable[[int], tuple[Any, jax.Array]]
  planted: Callable[[], tuple[Any, jax.Array]]
  leaf: str
  mu0: float = 1e-2
  indefinite: bool = True


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


MEMBERS = (
  _softmax_resnet(0.0),
  _softmax_resnet(1.0),
  _two_layer("softmax_relu"),
  _two_layer("relu_softmax"),
)
