r"""The soft-threshold Dikin walk.

To draw from :math:`\pi \propto e^{-f}` on a convex body K, with H the Hessian
of a barrier of K,

.. math::

  \Phi(x) = \alpha^{-1} H(x) + \eta^{-1} I, \qquad
  z \sim N(x, \Phi(x)^{-1}),

and z is accepted with the probability :math:`\min(1, \tau)` of Metropolis and
Hastings,

.. math::

  \log \tau = f(x) - f(z) + \tfrac12 \log \frac{\det \Phi(z)}{\det \Phi(x)}
    - \tfrac12 \|z - x\|^2_{\Phi(z)} + \tfrac12 \|z - x\|^2_{\Phi(x)} .

Here :math:`\alpha = r^2 / d` with r the step size (for the kind ``"vaidya"``
:math:`r^2 / \sqrt{n d}`), and :math:`\eta^{-1} = d \min(L^2, \beta)` if f is
L-Lipschitz or its gradient is :math:`\beta`-Lipschitz. Sources: arXiv
2206.06554, 2410.05700.

The metric may only depend on x and on coins that each step draws anew: then the
law is exact, however rough the weights or the sketch behind H are.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy import linalg

from jaxattn import _checks
from jaxattn.sampling.chains import SamplingAlgorithm
from jaxattn.sampling.dikin import barriers, bodies
from jaxattn.sampling.dikin.barriers import LeverageSample, TensorSRHT
from jaxattn.sampling.dikin.bodies import Polytope, Spectrahedron

__all__ = ["DikinInfo", "DikinState", "build_kernel", "dikin_walk", "init"]


class DikinState(NamedTuple):
  """Where a chain is.

  Attributes:
    position: (d,), x.
    logdensity: (), -f(x); -inf outside of the body.
    chol: (d, d), lower, the Cholesky factor of the metric at x for a step size
      of 1; (0, 0) for a sketched walk, which draws the metric in each step.
  """

  position: jax.Array
  logdensity: jax.Array
  chol: jax.Array


class DikinInfo(NamedTuple):
  """What happened in a step.

  Attributes:
    acceptance_rate: (), min(1, tau); of a lazy walk before the coin is tossed.
    is_accepted: (), whether the chain moved.
    is_inside: (), whether the proposal was in the body.
    log_ratio: (), log tau; -inf for a proposal outside.
  """

  acceptance_rate: jax.Array
  is_accepted: jax.Array
  is_inside: jax.Array
  log_ratio: jax.Array


class _Options(NamedTuple):
  """What a walk is, but for the body, the density and the step size."""

  kind: str
  num_iters: int
  lipschitz: float | None
  smoothness: float | None
  lazy: bool
  sketch: LeverageSample | TensorSRHT | None
  coins: str

  def threshold(self, d: int) -> float:
    """1 / eta."""
    square = None if self.lipschitz is None else self.lipschitz**2
    bounds = [b for b in (square, self.smoothness) if b is not None]
    return d * min(bounds, default=0.0)


def dikin_walk(
  logdensity_fn: bodies.LogDensity | None,
  body: Polytope | Spectrahedron,
  *,
  kind: str = "log",
  step_size: float = 1.0,
  num_iters: int = 4,
  lipschitz: float | None = None,
  smoothness: float | None = None,
  lazy: bool = False,
  sketch: LeverageSample | TensorSRHT | None = None,
  coins: str = "fresh",
  allow_unbounded: bool = False,
) -> SamplingAlgorithm:
  r"""A walk in a convex body that needs no rounding of it.

  From a w-warm start it mixes in about :math:`(\nu d + d L^2 R^2) \log(w /
  \delta)` steps, with :math:`\nu = n` for the logarithmic barrier,
  :math:`\sqrt{n d}` for Vaidya's and about d for those of John and of Lee and
  Sidford; R the radius of the body. Linear maps of the body change nothing, if
  there is no soft threshold.

  The bound is for step sizes far below those that are useful: adapt them, by
  ``num_warmup`` of :func:`sample_chains`. In a spectrahedron this is a must:
  there :math:`\|H^{-1/2} \nabla \log\det H\|^2` may be 2 d (n + 1), not the
  O(d) that the theorem asks for, and a safe scaling is :math:`r^2 \sim 1 / n`.

  Args:
    logdensity_fn: concave x -> log density up to a constant, a scalar; None =
      uniform. Evaluated inside of the body only.
    body: a :class:`Polytope` or a :class:`Spectrahedron`.
    kind: of the barrier, see :func:`barrier_hessian`.
    step_size: r, where a call of ``step`` gives none.
    num_iters: steps for the weights of ``"john"`` and ``"lee_sidford"``; the
      law is exact for any number.
    lipschitz: L, a bound on the gradient of the log density.
    smoothness: beta, a bound on its Hessian. Without either there is no soft
      threshold, :math:`\eta^{-1} = 0`.
    lazy: stays with probability one half, as proofs need it.
    sketch: None = the exact H; :class:`LeverageSample` of the rows of a
      polytope, or :class:`TensorSRHT` of a spectrahedron.
    coins: of the sketch: ``"fresh"`` ones for x and for z, or ``"common"``
      ones, so that part of the noise cancels.
    allow_unbounded: takes a body that is unbounded, or not known to be bounded;
      the caller answers for the density.

  Returns:
    The algorithm. ``init(position)`` takes an interior point, (d,), to the
    dtype of the body.

  Raises:
    ValueError: if an option is out of its range or does not fit another, or the
      body is unbounded. ``init`` raises "position violates constraint 3 by
      0.2".

  Cost:
    A step O(n d^2 + d^3), times 3 for ``"vaidya"`` and 2 ``num_iters`` + 1 for
    ``"john"`` and ``"lee_sidford"``; in a spectrahedron O(d n^3 + d^2 n^2).
    Twice that for a sketched walk, but O(s d n^2) instead of the second term
    with :class:`TensorSRHT`. Memory n d^2, shared by all chains; if that is
    over 2e8, n d a chain.

  Source:
    arXiv:2410.05700, algorithm 1; with sketches algorithms 2 and 3.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import Polytope, dikin_walk
    >>> box = Polytope(jnp.concatenate([jnp.eye(2), -jnp.eye(2)]), jnp.ones(4))
    >>> walk = dikin_walk(lambda x: -3.0 * x[0], box, kind="vaidya")
    >>> state, info = walk.step(jax.random.key(1), walk.init(jnp.zeros(2)))
    >>> bool(jnp.abs(state.position).max() < 1)
    True
  """
  body = bodies.check_body(body)
  options = _options(
    kind, num_iters, lipschitz, smoothness, lazy, sketch, coins
  )
  _check_fit(options, body, logdensity_fn)
  _check_step_size(step_size)
  if not allow_unbounded:
    bodies.check_bounded(body)
  elif logdensity_fn is None:
    raise ValueError("allow_unbounded=True needs a logdensity_fn")
  prepared = barriers.prepare(body)

  def start(position: Any, rng: jax.Array | None = None) -> DikinState:
    # A start needs no coins; loops of other libraries hand them over anyway.
    del rng
    return _init(position, logdensity_fn, prepared, options)

  own = step_size

  def step(
    rng: jax.Array, state: DikinState, step_size: Any = None
  ) -> tuple[DikinState, DikinInfo]:
    size = own if step_size is None else step_size
    _check_step_size(size)
    return _step(rng, state, logdensity_fn, prepared, size, options)

  return SamplingAlgorithm(start, step, float(own))


def init(
  position: jax.Array,
  logdensity_fn: bodies.LogDensity | None,
  body: Polytope | Spectrahedron,
  *,
  kind: str = "log",
  num_iters: int = 4,
  lipschitz: float | None = None,
  smoothness: float | None = None,
  sketch: LeverageSample | TensorSRHT | None = None,
) -> DikinState:
  """The state of a chain at a point; options as of :func:`dikin_walk`.

  Args:
    position: (d,), an interior point; taken to the dtype of the body.
    logdensity_fn: None = uniform.
    body: a :class:`Polytope` or a :class:`Spectrahedron`.
    kind: of the barrier.
    num_iters: steps for the weights.
    lipschitz: L.
    smoothness: beta.
    sketch: None = the exact metric.

  Returns:
    The state.

  Raises:
    ValueError: if an option does not fit, or a concrete position is not inside:
      "position violates constraint 3 by 0.2".

  Cost:
    One metric.

  Source:
    arXiv:2410.05700, algorithm 1.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import Polytope, dikin
    >>> box = Polytope(jnp.array([[1.0], [-1.0]]), jnp.ones(2))
    >>> print(dikin.init(jnp.zeros(1), None, box).chol.round(3))
    [[1.414]]
  """
  body = bodies.check_body(body)
  options = _options(
    kind, num_iters, lipschitz, smoothness, False, sketch, "fresh"
  )
  _check_fit(options, body, logdensity_fn)
  return _init(position, logdensity_fn, barriers.prepare(body), options)


def build_kernel(
  *,
  kind: str = "log",
  num_iters: int = 4,
  lipschitz: float | None = None,
  smoothness: float | None = None,
  lazy: bool = False,
  sketch: LeverageSample | TensorSRHT | None = None,
  coins: str = "fresh",
) -> Callable[..., tuple[DikinState, DikinInfo]]:
  """The walk with the body and the density as arguments.

  For bodies that are traced: whether they are bounded is not looked at.

  Args:
    kind: of the barrier; these options are those of :func:`dikin_walk`.
    num_iters: steps for the weights.
    lipschitz: L.
    smoothness: beta.
    lazy: stays with probability one half.
    sketch: None = the exact metric.
    coins: of the sketch.

  Returns:
    ``kernel(rng, state, logdensity_fn, body, step_size) -> (state, info)``; the
    state from :func:`init` with the same options.

  Raises:
    ValueError: if an option is out of its range; the kernel, if one does not
      fit the body.

  Cost:
    As :func:`dikin_walk`; the kernel prepares the body in each call.

  Source:
    arXiv:2410.05700, algorithm 1.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.sampling import Polytope, dikin
    >>> box = Polytope(jnp.array([[1.0], [-1.0]]), jnp.ones(2))
    >>> state = dikin.init(jnp.zeros(1), None, box)
    >>> kernel = dikin.build_kernel()
    >>> state, info = kernel(jax.random.key(0), state, None, box, 0.5)
    >>> bool(info.is_inside)
    True
  """
  options = _options(
    kind, num_iters, lipschitz, smoothness, lazy, sketch, coins
  )

  def kernel(
    rng: jax.Array,
    state: DikinState,
    logdensity_fn: bodies.LogDensity | None,
    body: Polytope | Spectrahedron,
    step_size: Any,
  ) -> tuple[DikinState, DikinInfo]:
    body = bodies.check_body(body)
    _check_fit(options, body, logdensity_fn)
    _check_step_size(step_size)
    prepared = barriers.prepare(body)
    return _step(rng, state, logdensity_fn, prepared, step_size, options)

  return kernel


# --- the walk ---


def _init(
  position: Any,
  logdensity_fn: bodies.LogDensity | None,
  prepared: barriers.Prepared,
  options: _Options,
) -> DikinState:
  body = prepared.body
  d, dtype = bodies.dim(body), jax.tree.leaves(body)[0].dtype
  position = jnp.asarray(position)
  _checks.check_shape("position", position, (d,), "(d,)")
  position = position.astype(dtype)
  bodies.check_inside(body, position)
  if options.sketch is None:
    inside, metric = _unit_metric(prepared, position, options, None)
    chol = jnp.linalg.cholesky(metric)
  else:
    inside, chol = barriers.is_inside(body, position), jnp.zeros((0, 0), dtype)
  logdensity = bodies.logdensity(logdensity_fn, position)
  return DikinState(position, jnp.where(inside, logdensity, -jnp.inf), chol)


def _step(
  rng: jax.Array,
  state: DikinState,
  logdensity_fn: bodies.LogDensity | None,
  prepared: barriers.Prepared,
  step_size: Any,
  options: _Options,
) -> tuple[DikinState, DikinInfo]:
  x, dtype = state.position, state.position.dtype
  rng_normal, rng_accept, rng_lazy, rng_x, rng_z = jax.random.split(rng, 5)
  if options.coins == "common":
    rng_z = rng_x
  at_x = state.chol
  if options.sketch is not None:
    at_x = jnp.linalg.cholesky(_unit_metric(prepared, x, options, rng_x)[1])
  threshold = options.threshold(len(x))
  at_x = _rescale(at_x, step_size, threshold)
  normal = jax.random.normal(rng_normal, x.shape, dtype)
  # Of the transpose: a solution with L has the covariance (L^T L)^-1.
  move = linalg.solve_triangular(at_x, normal, trans="T", lower=True)
  z = x + move
  inside, metric = _unit_metric(prepared, z, options, rng_z)
  unit = jnp.linalg.cholesky(metric)
  at_z = _rescale(unit, step_size, threshold)
  # Outside nothing is evaluated; the value is not used.
  logdensity = bodies.logdensity(logdensity_fn, jnp.where(inside, z, x))
  log_ratio = logdensity - state.logdensity + _log_det(at_z) - _log_det(at_x)
  # The move itself, not z - x, which in float32 has lost its digits.
  log_ratio += _half_squares(normal) - _half_squares(move @ at_z)
  log_ratio = jnp.where(inside & ~jnp.isnan(log_ratio), log_ratio, -jnp.inf)
  accepted = jnp.log(jax.random.uniform(rng_accept, (), dtype)) < log_ratio
  if options.lazy:
    accepted &= jax.random.bernoulli(rng_lazy)
  chol = unit if options.sketch is None else state.chol
  proposal = DikinState(z, logdensity, chol)
  state = jax.tree.map(
    lambda new, old: jnp.where(accepted, new, old), proposal, state
  )
  rate = jnp.exp(jnp.minimum(log_ratio, 0))
  return state, DikinInfo(rate, accepted, inside, log_ratio)


def _unit_metric(
  prepared: barriers.Prepared,
  x: jax.Array,
  options: _Options,
  rng: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Whether x is inside, and the metric there for a step size of 1."""
  inside, hessian = barriers.hessian_at(
    prepared, x, options.kind, options.num_iters, options.sketch, rng
  )
  d = len(x)
  inverse_alpha = float(d)
  if options.kind == "vaidya":
    assert prepared.rows is not None
    inverse_alpha = math.sqrt(len(prepared.rows.a) * d)
  eye = jnp.eye(d, dtype=x.dtype)
  return inside, inverse_alpha * hessian + options.threshold(d) * eye


def _rescale(chol: jax.Array, step_size: Any, threshold: float) -> jax.Array:
  """The factor for another step size: only H is divided by its square."""
  if isinstance(step_size, float) and step_size == 1.0:
    return chol
  if threshold == 0:
    return chol / step_size
  eye = jnp.eye(len(chol), dtype=chol.dtype)
  metric = chol @ chol.T + (step_size**2 - 1) * threshold * eye
  return jnp.linalg.cholesky(metric) / step_size


def _half_squares(x: jax.Array) -> jax.Array:
  return x @ x / 2


def _log_det(chol: jax.Array) -> jax.Array:
  """Half of that of the metric."""
  return jnp.log(chol.diagonal()).sum()


# --- checks ---


def _options(
  kind: str,
  num_iters: int,
  lipschitz: float | None,
  smoothness: float | None,
  lazy: bool,
  sketch: LeverageSample | TensorSRHT | None,
  coins: str,
) -> _Options:
  _checks.check_choice("kind", kind, barriers.KINDS)
  _checks.check_integer("num_iters", num_iters, 1, None)
  for name, bound in (("lipschitz", lipschitz), ("smoothness", smoothness)):
    if bound is not None and not 0 <= bound < math.inf:
      raise ValueError(f"{name} must be non-negative and finite, got {bound}")
  _checks.check_choice("coins", coins, ("fresh", "common"))
  if sketch is None and coins != "fresh":
    raise ValueError(f"coins={coins!r} needs a sketch")
  if sketch is not None:
    if not isinstance(sketch, (LeverageSample, TensorSRHT)):
      raise ValueError(
        f"sketch must be None, a LeverageSample or a TensorSRHT, got {sketch!r}"
      )
    _checks.check_integer("num_rows", sketch.num_rows, 1, None)
  return _Options(kind, num_iters, lipschitz, smoothness, lazy, sketch, coins)


def _check_fit(
  options: _Options,
  body: Polytope | Spectrahedron,
  logdensity_fn: bodies.LogDensity | None,
) -> None:
  barriers.check_kind(body, options.kind)
  barriers.check_sketch(body, options.sketch)
  for name in ("lipschitz", "smoothness"):
    if logdensity_fn is None and getattr(options, name) is not None:
      raise ValueError(f"{name} is of a logdensity_fn, and there is none")


def _check_step_size(step_size: Any) -> None:
  _checks.check_scalar("step_size", step_size)
  _checks.check_positive("step_size", step_size)
