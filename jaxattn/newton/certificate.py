r"""How far around a minimum the theory promises that Newton's method converges.

With l the least eigenvalue of the Hessian at a minimum, and M its Lipschitz
constant nearby, theory asks for a start within :math:`0.1\,l / M`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxattn import _checks
from jaxattn.newton.curvature import curvature_dense
from jaxattn.newton.problem import Problem

# The share of l / M that proofs of this line ask for.
_SHARE = 0.1


class LocalCertificate(NamedTuple):
  """What :func:`local_certificate` measured.

  Attributes:
    least_eigenvalue: (), l, of the Hessian at the point.
    lipschitz: (), M, the largest change of the Hessian over distance that was
      seen: a lower bound on the true one.
    radius: (), 0.1 l / M; at most 0 if the Hessian is not positive definite.
  """

  least_eigenvalue: jax.Array
  lipschitz: jax.Array
  radius: jax.Array


def local_certificate(
  rng: jax.Array,
  problem: Problem,
  x: jax.Array,
  data: Any,
  *,
  radius: float,
  num_pairs: int = 64,
) -> LocalCertificate:
  r"""Measures the radius of convergence that theory promises around a minimum.

  .. math:: l = \lambda_{\min} H(x), \qquad
    \hat M = \max_{y, z} \frac{\|H(y) - H(z)\|_2}{\|y - z\|}

  over random pairs in a ball. Starts from much farther away converge as a rule:
  report it beside a measured radius, and never refuse a start because of it.

  Args:
    rng: PRNG key.
    problem: with an exact curvature.
    x: (p,), a minimum.
    data: what the problem's functions take.
    radius: of the ball around x in which pairs are drawn.
    num_pairs: of them.

  Returns:
    A :class:`LocalCertificate`.

  Raises:
    ValueError: if ``x`` is no floating vector, ``radius`` is not positive, or
      the problem has no exact curvature.

  Cost:
    2 num_pairs Hessians, (p, p) each, one after the other.

  Source:
    arXiv 2303.15725 and its successors ask for M r <= 0.1 l.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn import newton
    >>> problem = newton.least_squares_problem(lambda x, y: x**2 - y)
    >>> found = newton.local_certificate(
    ...   jax.random.key(0), problem, jnp.array([2.0]), jnp.array([4.0]),
    ...   radius=0.1
    ... )
    >>> print(found.least_eigenvalue)
    16.0
  """
  x = jnp.asarray(x)
  _checks.check_rank("x", x, 1)
  _checks.check_floating("x", x)
  _checks.check_positive("radius", radius)
  _checks.check_integer("num_pairs", num_pairs, 1, None)
  if problem.curvature is None:
    raise ValueError("curvature='newton' is not provided by this problem")
  hessian = problem.curvature
  p = len(x)

  def dense(x: jax.Array) -> jax.Array:
    return curvature_dense(hessian(x, data), dim=p, dtype=x.dtype)

  def change(rng: jax.Array) -> jax.Array:
    rng_side, rng_size = jax.random.split(rng)
    side = jax.random.normal(rng_side, (2, p), x.dtype)
    side /= jnp.linalg.norm(side, axis=1, keepdims=True)
    # Uniform in the ball.
    size = radius * jax.random.uniform(rng_size, (2, 1), x.dtype) ** (1 / p)
    y, z = x[None] + size * side
    difference = dense(y) - dense(z)
    return jnp.linalg.norm(difference, 2) / jnp.linalg.norm(y - z)

  lipschitz = jax.lax.map(change, jax.random.split(rng, num_pairs)).max()
  least = jnp.linalg.eigvalsh(dense(x))[0]
  return LocalCertificate(least, lipschitz, _SHARE * least / lipschitz)
