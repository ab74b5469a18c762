r"""Hit and run: a step goes along a random line to anywhere in the body.

The line through x in the direction u stays inside for t between two ends,

.. math::

  t \in \Big( \max_{a_i^\top u < 0} \frac{s_i}{a_i^\top u},\;
    \min_{a_i^\top u > 0} \frac{s_i}{a_i^\top u} \Big), \qquad s = b - A x,

and in a spectrahedron, with :math:`\lambda` the eigenvalues of :math:`L^{-1}
(\sum_i u_i A_i) L^{-\top}` and :math:`S(x) = L L^\top`, for :math:`1 + t
\lambda > 0`. The next point is uniform between them, and accepted with the
probability :math:`\min(1, \pi(z) / \pi(x))`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxattn import _checks
from jaxattn.sampling.chains import SamplingAlgorithm
from jaxattn.sampling.dikin import barriers, bodies
from jaxattn.sampling.dikin.bodies import Polytope, Spectrahedron

__all__ = [
  "HitAndRunInfo",
  "HitAndRunState",
  "coordinate_hit_and_run",
  "hit_and_run",
]


class HitAndRunState(NamedTuple):
  """Where a chain is.

  Attributes:
    position: (d,).
    logdensity: (), -inf outside of the body.
  """

  position: jax.Array
  logdensity: jax.Array


class HitAndRunInfo(NamedTuple):
  """What happened in a step.

  Attributes:
    acceptance_rate: (), min(1, ratio of the densities).
    is_accepted: (), whether the chain moved.
    length: (), of the chord, in units of the direction.
  """

  acceptance_rate: jax.Array
  is_accepted: jax.Array
  length: jax.Array


def hit_and_run(
  logdensity_fn: bodies.LogDensity | None, body: Polytope | Spectrahedron
) -> SamplingAlgorithm:
  r"""Hit and run along directions that are uniform on the sphere.

  From a warm start it mixes in about :math:`d^2 (R / r)^2` steps, for a body
  between balls of radius r and R: round it first, see :func:`round_polytope`.

  Args:
    logdensity_fn: x -> log density up to a constant, a scalar; None = uniform.
    body: a bounded :class:`Polytope` or :class:`Spectrahedron`.

  Returns:
    The algorithm; it has no step size, and ``step`` takes none.

  Raises:
    ValueError: if the body is no body, or unbounded. ``init`` raises "position
      violates constraint 3 by 0.2".

  Cost:
    A step O(n d); in a spectrahedron O(n^3 + d n^2).

  Source:
    Lovasz and Vempala, Hit-and-run from a corner, SIAM J. Comput. 35 (2006).

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import Polytope, hit_and_run
    >>> box = Polytope(jnp.concatenate([jnp.eye(2), -jnp.eye(2)]), jnp.ones(4))
    >>> walk = hit_and_run(None, box)
    >>> state, info = walk.step(jax.random.key(0), walk.init(jnp.zeros(2)))
    >>> bool(info.is_accepted), bool(jnp.abs(state.position).max() < 1)
    (True, True)
  """

  def direction(rng: jax.Array, d: int, dtype: Any) -> jax.Array:
    normal = jax.random.normal(rng, (d,), dtype)
    return normal / jnp.linalg.norm(normal)

  return _algorithm(logdensity_fn, body, direction)


def coordinate_hit_and_run(
  logdensity_fn: bodies.LogDensity | None, body: Polytope | Spectrahedron
) -> SamplingAlgorithm:
  """Hit and run along coordinates that are drawn uniformly.

  Args:
    logdensity_fn: x -> log density up to a constant, a scalar; None = uniform.
    body: a bounded :class:`Polytope` or :class:`Spectrahedron`.

  Returns:
    The algorithm, as of :func:`hit_and_run`.

  Raises:
    ValueError: as :func:`hit_and_run`.

  Cost:
    As :func:`hit_and_run`.

  Source:
    Smith, Efficient Monte Carlo procedures, Operations Research 32 (1984).

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import Polytope, coordinate_hit_and_run
    >>> box = Polytope(jnp.concatenate([jnp.eye(2), -jnp.eye(2)]), jnp.ones(4))
    >>> walk = coordinate_hit_and_run(None, box)
    >>> _, info = walk.step(jax.random.key(0), walk.init(jnp.zeros(2)))
    >>> print(info.length)
    2.0
  """

  def direction(rng: jax.Array, d: int, dtype: Any) -> jax.Array:
    return jax.nn.one_hot(jax.random.randint(rng, (), 0, d), d, dtype=dtype)

  return _algorithm(logdensity_fn, body, direction)


def _algorithm(
  logdensity_fn: bodies.LogDensity | None,
  body: Polytope | Spectrahedron,
  direction: Callable[[jax.Array, int, Any], jax.Array],
) -> SamplingAlgorithm:
  body = bodies.check_body(body)
  bodies.check_bounded(body)
  d, dtype = bodies.dim(body), jax.tree.leaves(body)[0].dtype

  def init(position: Any, rng: jax.Array | None = None) -> HitAndRunState:
    # A start needs no coins; loops of other libraries hand them over anyway.
    del rng
    position = jnp.asarray(position)
    _checks.check_shape("position", position, (d,), "(d,)")
    position = position.astype(dtype)
    bodies.check_inside(body, position)
    logdensity = bodies.logdensity(logdensity_fn, position)
    inside = barriers.is_inside(body, position)
    return HitAndRunState(position, jnp.where(inside, logdensity, -jnp.inf))

  def step(
    rng: jax.Array, state: HitAndRunState, step_size: None = None
  ) -> tuple[HitAndRunState, HitAndRunInfo]:
    if step_size is not None:
      raise ValueError(f"step_size must be None, got {step_size}")
    rng_line, rng_point, rng_accept = jax.random.split(rng, 3)
    u = direction(rng_line, d, dtype)
    low, high = _ends(body, state.position, u)
    t = low + (high - low) * jax.random.uniform(rng_point, (), dtype)
    z = state.position + t * u
    # By rounding an end may be outside, and is not taken.
    inside = barriers.is_inside(body, z)
    z = jnp.where(inside, z, state.position)
    logdensity = bodies.logdensity(logdensity_fn, z)
    log_ratio = jnp.where(inside, logdensity - state.logdensity, -jnp.inf)
    log_u = jnp.log(jax.random.uniform(rng_accept, (), dtype))
    accepted = log_u < log_ratio
    new = HitAndRunState(z, logdensity)
    state = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, state)
    rate = jnp.exp(jnp.minimum(log_ratio, 0))
    return state, HitAndRunInfo(rate, accepted, high - low)

  return SamplingAlgorithm(init, step)


def _ends(
  body: Polytope | Spectrahedron, x: jax.Array, u: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The interval of t for which x + t u is inside."""
  if isinstance(body, Polytope):
    rate = (body.a @ u) / (body.b - body.a @ x)
  else:
    factor = jnp.linalg.cholesky(bodies.slack_matrix(body, x))
    turned = bodies.whiten(jnp.tensordot(u, body.mats, 1)[None], factor)[0]
    rate = -jnp.linalg.eigvalsh(turned)
  # 1 - t rate > 0 for all of them.
  return 1 / jnp.minimum(rate.min(), 0), 1 / jnp.maximum(rate.max(), 0)
