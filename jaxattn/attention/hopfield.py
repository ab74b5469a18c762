r"""Modern Hopfield networks: associative memory by softmax, dense and low-rank.

Patterns :math:`\xi_\mu`, the rows of :math:`\Xi` (M, d), are minima, or near
to them, of

.. math::

  E(x) = -\beta^{-1} \log \sum_\mu e^{\beta \xi_\mu \cdot x} + \tfrac12 |x|^2
    + \beta^{-1} \log M + \tfrac12 \max_\mu |\xi_\mu|^2,

and :math:`T(x) = \Xi^\top \mathrm{softmax}(\beta \Xi x)`, attention with the
patterns for keys and values, never increases it. If all logits
:math:`\beta x \cdot \xi` are small, Taylor features
:math:`\phi(x) \cdot \phi(\xi) \approx e^{\beta x \cdot \xi}` store the patterns
once, in :math:`Z = \sum_\mu \phi(\xi_\mu) v_\mu^\top` and
:math:`k = \sum_\mu \phi(\xi_\mu)`, and a query costs the same for any M:
:math:`\tilde T(x) = Z^\top \phi(x) / k^\top \phi(x)`. Sources: Ramsauer et al.,
arXiv 2008.02217, for energy, update and capacity; arXiv 2402.04520 for when the
low-rank path can pay; the rule for its degree is this project's.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks
from jaxattn.attention.radius import logit_radius
from jaxattn.features import (
  degree_for,
  feature_count,
  feature_moments,
  taylor_error_bound,
  taylor_features,
)
from jaxattn.numerics import fixed_point, lambertw
from jaxattn.numerics._dtypes import accumulator
from jaxattn.softmax import softmax_attention

# Numbers that exist at a time where rows are worked on in parts: more of them
# leave the cache, and take five times as long.
_PART = 1 << 20
_METHODS = ("dense", "lowrank")
_BACKWARDS = ("unrolled", "implicit")


class HopfieldState(NamedTuple):
  r"""Patterns folded into sums of Taylor features.

  Sums over patterns: those of two sets with the same ``mean`` and ``beta`` add
  up. The degree g is read from the shapes, :math:`r = \binom{d + g}{g}`.

  Source: arXiv 2402.04520; this project.

  Attributes:
    z: (r, Hv) sum of products of features and values.
    k: (r,) sum of features; its first entry is the number of patterns.
    mean: (d,) what was subtracted from every pattern, which multiplies all
      weights of a query by one factor and makes logits smaller.
    beta: () inverse temperature, which the features hold.
    radius: () bound on the norm of the patterns less ``mean``.
  """

  z: jax.Array
  k: jax.Array
  mean: jax.Array
  beta: jax.Array
  radius: jax.Array


class HopfieldInfo(NamedTuple):
  """How retrieval ended, for each query.

  Attributes:
    num_steps: (...,) int32, updates until the query stood still.
    energy: (...,) of what was retrieved; low-rank where the updates were.
    residual: (...,) largest change of an entry in the last update.
  """

  num_steps: jax.Array
  energy: jax.Array
  residual: jax.Array


class HopfieldPlan(NamedTuple):
  """What a retrieval will cost, on the host; see :func:`hopfield_plan`.

  Attributes:
    method: "lowrank" if that takes fewer flops, else "dense".
    degree: least even degree that meets the error, or None if none up to 100
      does.
    rank: r, its number of features; None without a degree.
    flops_dense: of all updates.
    flops_lowrank: of storing and of all updates; infinite without a degree.
    bound: on the error of an entry of one update by that degree, in units of
      the largest entry of a value; infinite without a degree.
  """

  method: str
  degree: int | None
  rank: int | None
  flops_dense: float
  flops_lowrank: float
  bound: float


class RetrievalErrorBound(NamedTuple):
  r"""Two bounds on :math:`|T(x) - \xi_\mu|`, the first the smaller.

  Attributes:
    weight: (...,) :math:`2 m (1 - p_\mu)`, by the weight of the pattern.
    gap: (...,) :math:`2 m (M - 1) e^{-\beta g}`, by how much more similar x is
      to the pattern than to any other.
  """

  weight: jax.Array
  gap: jax.Array


class CapacityBound(NamedTuple):
  """How many random patterns can be stored; see :func:`capacity_lower_bound`.

  Attributes:
    c: () the base of the exponential.
    n: () number of patterns; says nothing unless ``ok``.
    ok: () whether the theorem applies.
  """

  c: jax.Array
  n: jax.Array
  ok: jax.Array


# --- dense ---


def hopfield_energy(
  x: jax.Array, patterns: jax.Array, beta: float | jax.Array
) -> jax.Array:
  r"""Energy of states of the network, between 0 and twice the largest norm^2.

  .. math:: E(x) = -\beta^{-1} \log \tfrac1M \sum_\mu e^{\beta \xi_\mu \cdot x}
    + \tfrac12 |x|^2 + \tfrac12 \max_\mu |\xi_\mu|^2

  Its gradient is :math:`x - T(x)`. The bounds hold for x in the ball of the
  patterns, :math:`|x| \le \max_\mu |\xi_\mu|`.

  Args:
    x: (..., d), floating.
    patterns: (M, d), of the same dtype.
    beta: inverse temperature, > 0; may be traced.

  Returns:
    (...,) of the dtype of ``x``.

  Raises:
    ValueError: if shapes or dtypes do not fit or ``beta`` is not positive.

  Cost:
    2 M d flops a state; no more than some 2^20 similarities at a time.

  Source:
    arXiv 2008.02217, equation 2.

  Example:
    >>> import jax.numpy as jnp
    >>> patterns = 3 * jnp.eye(4)
    >>> x = jnp.stack([patterns[0], patterns.mean(0)])
    >>> stored, mean = hopfield_energy(x, patterns, 1.0)
    >>> print(f"{stored:.2f} {mean:.2f}")
    1.39 3.38
  """
  x, patterns = _check(x, patterns, beta)
  return _energy(x, patterns, beta)


def hopfield_update(
  x: jax.Array,
  patterns: jax.Array,
  beta: float | jax.Array,
  values: jax.Array | None = None,
) -> jax.Array:
  r"""One step of retrieval: attention to the patterns.

  .. math:: T(x) = V^\top \mathrm{softmax}(\beta\, \Xi x)

  For large ``beta`` this is the pattern of the largest inner product with x,
  for small ``beta`` the mean of all. The energy never increases if the values
  are the patterns.

  Args:
    x: (..., d), floating.
    patterns: (M, d), of the same dtype.
    beta: inverse temperature, > 0; may be traced.
    values: (M, Hv), of the same dtype; None = the patterns.

  Returns:
    (..., Hv) of the dtype of ``x``.

  Raises:
    ValueError: if shapes or dtypes do not fit or ``beta`` is not positive, for
      instance "query dim 32 != pattern dim 64".

  Cost:
    2 M (d + Hv) flops a query, and no array of all similarities: that of
    :func:`jaxattn.attention.softmax_attention`.

  Source:
    arXiv 2008.02217, equation 3.

  Example:
    >>> import jax.numpy as jnp
    >>> patterns = 3 * jnp.eye(4)
    >>> noisy = patterns[0] + jnp.array([-1.0, 0.5, 0.0, 0.0])
    >>> print(hopfield_update(noisy, patterns, 2.0).round(2))
    [3. 0. 0. 0.]
  """
  x, patterns = _check(x, patterns, beta)
  if values is not None:
    values = jnp.asarray(values)
    _check_values(values, patterns)
  return _update(x, patterns, beta, patterns if values is None else values)


@overload
def hopfield_retrieve(
  x: jax.Array,
  patterns: jax.Array | None,
  beta: float | jax.Array,
  *,
  max_steps: int = ...,
  tol: float | jax.Array = ...,
  method: str = ...,
  state: HopfieldState | None = ...,
  backward: str = ...,
  return_info: Literal[False] = ...,
) -> jax.Array: ...


@overload
def hopfield_retrieve(
  x: jax.Array,
  patterns: jax.Array | None,
  beta: float | jax.Array,
  *,
  max_steps: int = ...,
  tol: float | jax.Array = ...,
  method: str = ...,
  state: HopfieldState | None = ...,
  backward: str = ...,
  return_info: Literal[True],
) -> tuple[jax.Array, HopfieldInfo]: ...


def hopfield_retrieve(
  x: jax.Array,
  patterns: jax.Array | None,
  beta: float | jax.Array,
  *,
  max_steps: int = 32,
  tol: float | jax.Array = 1e-5,
  method: str = "dense",
  state: HopfieldState | None = None,
  backward: str = "unrolled",
  return_info: bool = False,
) -> jax.Array | tuple[jax.Array, HopfieldInfo]:
  r"""Iterates the update until each query stands still.

  A query whose entries change by no more than ``tol`` is done, whatever the
  others do, and once all are no more updates are computed.

  Args:
    x: (..., d) noisy or partial patterns, floating.
    patterns: (M, d), of the same dtype. With a state they may be None, unless
      the energy is asked for, which holds their largest norm.
    beta: inverse temperature, > 0; may be traced.
    max_steps: at most so many updates, at least 1.
    tol: >= 0; may be traced.
    method: ``"dense"``, or ``"lowrank"``, updates by ``state``.
    state: of :func:`hopfield_store`, with the same ``beta``. If it was stored
      with values, ask for one step: the next would start from a value.
    backward: ``"unrolled"`` differentiates the updates as they were taken, in
      reverse mode; ``"implicit"`` the fixed point by the implicit function
      theorem, which keeps nothing of the way and has no gradient in ``x``; it
      is right where the iteration has converged.
    return_info: also return a :class:`HopfieldInfo`.

  Returns:
    (..., d) of the dtype of ``x``, with the info if asked for.

  Raises:
    ValueError: if shapes, dtypes or options do not fit; outside of ``jit`` also
      if the features cannot promise any accuracy for these logits, as "low-rank
      retrieval invalid: kernel error bound 3.1 >= 1; reduce beta or use
      method='dense'".

  Cost:
    4 M d flops a query and update, or 2 r (d + 2) low-rank. The unrolled
    gradient keeps each step, the implicit one solves a system of size d for
    each query.

  Source:
    arXiv 2008.02217, theorem 1, for convergence; arXiv 2402.04520 for the
    low-rank path.

  Example:
    >>> import jax
    >>> patterns = jax.random.normal(jax.random.key(0), (50, 64))
    >>> noise = 0.5 * jax.random.normal(jax.random.key(1), (50, 64))
    >>> got, info = hopfield_retrieve(
    ...   patterns + noise, patterns, 1.0, return_info=True
    ... )
    >>> bool(abs(got - patterns).max() < 1e-3), int(info.num_steps.max())
    (True, 2)
  """
  x = jnp.asarray(x)
  patterns = None if patterns is None else jnp.asarray(patterns)
  _checks.check_choice("method", method, _METHODS)
  _checks.check_choice("backward", backward, _BACKWARDS)
  _checks.check_choice("return_info", return_info, (False, True))
  _checks.check_integer("max_steps", max_steps, 1, None)
  _checks.check_scalar("tol", tol)
  _checks.check_nonnegative("tol", tol)
  if method == "dense":
    if state is not None:
      raise ValueError("state must be None with method='dense'")
    if patterns is None:
      raise ValueError("patterns must be (M, d) with method='dense', got None")
    x, patterns = _check(x, patterns, beta)
  else:
    one_update = max_steps == 1 and backward == "unrolled" and not return_info
    state = _check_lowrank(x, patterns, beta, state, one_update)
    if patterns is None and return_info:
      raise ValueError(
        "patterns are required with return_info=True, got None: the energy "
        "holds their largest norm"
      )
    _check_promise(x, patterns, beta, state, max_steps)
  out, info = _retrieve(
    x,
    patterns,
    beta,
    tol,
    state,
    max_steps=max_steps,
    implicit=backward == "implicit",
    return_info=return_info,
  )
  return (out, info) if return_info else out


def iterate_queries(
  step: Callable[[jax.Array], jax.Array],
  x: jax.Array,
  *,
  tol: float | jax.Array,
  max_steps: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Updates queries, the last axis of ``x``, until each stands still.

  Args:
    step: from (..., d) to the same, query by query.
    x: (..., d), floating.
    tol: a query of which no entry changes by more is done.
    max_steps: at most so many steps.

  Returns:
    The queries, with number of steps (...,) int32 and last residual (...,).
  """

  def move(carry: Any) -> Any:
    x, residual, num_steps = carry
    going = ~(residual <= tol)
    new = step(x)
    change = jnp.abs(new - x).max(-1)
    return (
      jnp.where(going[..., None], new, x),
      jnp.where(going, lax.stop_gradient(change), residual),
      num_steps + going.astype(jnp.int32),
    )

  def one(carry: Any, _: None) -> tuple[Any, None]:
    # Steps that nobody needs are skipped; a loop of unknown length would have
    # no gradient.
    all_done = (carry[1] <= tol).all()
    return lax.cond(all_done, lambda c: c, move, carry), None

  residual = jnp.full_like(lax.stop_gradient(x[..., 0]), jnp.inf)
  num_steps = jnp.zeros_like(residual, jnp.int32)
  (x, residual, num_steps), _ = lax.scan(
    one, (x, residual, num_steps), length=max_steps
  )
  return x, num_steps, residual


# --- low-rank ---


def hopfield_store(
  patterns: jax.Array,
  beta: float | jax.Array,
  *,
  degree: int,
  values: jax.Array | None = None,
  allow_odd: bool = False,
  chunk_size: int | None = None,
) -> HopfieldState:
  r"""Stores patterns once, for retrieval whose time does not depend on M.

  .. math:: Z = \sum_\mu \phi(\xi_\mu - \bar\xi) v_\mu^\top, \qquad
    k = \sum_\mu \phi(\xi_\mu - \bar\xi)

  The weights :math:`\phi(x) \cdot \phi(\xi)` are the Taylor polynomial of
  :math:`e^{\beta x \cdot \xi}`: what error to expect, and which degree, says
  :func:`hopfield_plan`. With float32 a degree of 6 or more loses digits where
  logits are large: at -A the sum of terms as large as e^A is e^-A.

  Args:
    patterns: (M, d), floating.
    beta: inverse temperature, > 0; may be traced.
    degree: g, even and at least 0; see ``allow_odd``.
    values: (M, Hv), of the dtype of the patterns; None = the patterns.
    allow_odd: permit odd degrees, whose weights can be negative.
    chunk_size: patterns at a time; None = 1024. Memory and speed only.

  Returns:
    The state, of the accumulation dtype.

  Raises:
    ValueError: if shapes, dtypes or options do not fit, or there would be more
      than 2^22 features.

  Cost:
    2 M r (Hv + 2) flops, r (Hv + 1) numbers.

  Source:
    arXiv 2402.04520, section 4; this project for the shift by the mean.

  Example:
    >>> import jax
    >>> patterns = jax.random.normal(jax.random.key(0), (500, 4))
    >>> state = hopfield_store(patterns, 0.05, degree=4)
    >>> dense = hopfield_update(patterns[:3], patterns, 0.05)
    >>> got = hopfield_retrieve(
    ...   patterns[:3], None, 0.05, max_steps=1, method="lowrank", state=state
    ... )
    >>> bool(abs(got - dense).max() < 1e-4)
    True
  """
  patterns = jnp.asarray(patterns)
  _check_patterns(patterns)
  _check_beta(beta)
  _checks.check_integer("degree", degree, 0, None)
  _checks.check_choice("allow_odd", allow_odd, (False, True))
  if degree % 2 and not allow_odd:
    raise ValueError(
      f"degree must be even unless allow_odd=True, got {degree}: weights of an "
      "odd degree change sign"
    )
  if values is not None:
    values = jnp.asarray(values)
    _check_values(values, patterns)
  dtype = accumulator(patterns.dtype)
  return _store(
    patterns,
    patterns if values is None else values,
    jnp.asarray(beta, dtype),
    degree=degree,
    chunk_size=chunk_size,
  )


def hopfield_add(
  state: HopfieldState, pattern: jax.Array, value: jax.Array | None = None
) -> HopfieldState:
  """Stores one pattern more, or several.

  The shift stays what it was, which is exact, if not the one that makes logits
  smallest.

  Args:
    state: of :func:`hopfield_store`.
    pattern: (d,), or (n, d) for several; floating.
    value: (Hv,) or (n, Hv) if the state was stored with values, else None.

  Returns:
    The new state.

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Cost:
    2 r (Hv + 2) flops a pattern.

  Source:
    this project.

  Example:
    >>> import jax
    >>> patterns = jax.random.normal(jax.random.key(0), (500, 4))
    >>> state = hopfield_store(patterns, 0.1, degree=2)
    >>> more = hopfield_add(state, patterns[0])
    >>> print(state.k[0], more.k[0])
    500.0 501.0
  """
  return _changed(state, pattern, value, 1)


def hopfield_forget(
  state: HopfieldState, pattern: jax.Array, value: jax.Array | None = None
) -> HopfieldState:
  """Takes a stored pattern away, or several, up to rounding.

  Args:
    state: of :func:`hopfield_store`.
    pattern: (d,), or (n, d) for several; as it was stored.
    value: (Hv,) or (n, Hv) as it was stored with the pattern, else None.

  Returns:
    The new state; its ``radius`` stays what it was.

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Cost:
    2 r (Hv + 2) flops a pattern.

  Source:
    this project.

  Example:
    >>> import jax
    >>> patterns = jax.random.normal(jax.random.key(0), (500, 4))
    >>> state = hopfield_store(patterns, 0.1, degree=2)
    >>> less = hopfield_forget(state, patterns[:100])
    >>> print(less.k[0])
    400.0
  """
  return _changed(state, pattern, value, -1)


def hopfield_plan(
  radius: float,
  dim: int,
  num_patterns: int,
  num_queries: int,
  *,
  eps: float = 1e-3,
  num_steps: int = 1,
) -> HopfieldPlan:
  r"""Says beforehand whether the low-rank path pays, and with which degree.

  With all logits in [-A, A] and Taylor features of degree g each weight is off
  by a factor within :math:`1 \pm \varepsilon`, and each entry of an update by

  .. math:: |\tilde T(x) - T(x)| \le
    \frac{2 \varepsilon}{1 - \varepsilon} \max |v|, \qquad
    \varepsilon = \frac{e^{2A} A^{g+1}}{(g+1)!}.

  The rank :math:`\binom{d + g}{g}` grows fast: the fast path is for small d or
  small logits, and the flops say how small.

  Args:
    radius: A > 0, bound on :math:`|\beta x \cdot (\xi - \bar\xi)|`:
      :func:`jaxattn.attention.logit_radius` with ``center_keys=True`` measures
      it. A static number.
    dim: d.
    num_patterns: M.
    num_queries: L.
    eps: error of an entry of one update that is asked for, in units of the
      largest entry of a value.
    num_steps: updates of each query.

  Returns:
    The plan, on the host.

  Raises:
    ValueError: if an argument is out of range, as "eps must be positive and
      finite, got 0.0".

  Cost:
    Microseconds.

  Source:
    arXiv 2402.04520, theorem 4.1, for the existence of a degree; the search for
    it is this project's.

  Example:
    >>> plan = hopfield_plan(0.25, 8, 10_000, 10_000)
    >>> plan.method, plan.degree, plan.rank
    ('lowrank', 4, 495)
    >>> hopfield_plan(4.0, 8, 10_000, 10_000).method
    'dense'
  """
  for name, size in (
    ("dim", dim),
    ("num_patterns", num_patterns),
    ("num_queries", num_queries),
    ("num_steps", num_steps),
  ):
    _checks.check_integer(name, size, 1, None)
  for name, number in (("radius", radius), ("eps", eps)):
    _checks.check_scalar(name, number)
    if not 0 < number < math.inf:
      raise ValueError(f"{name} must be positive and finite, got {number}")
  updates = num_queries * num_steps
  flops_dense = 4.0 * num_patterns * updates * dim
  # Then 2 eps' / (1 - eps') <= eps.
  degree = _degree(eps / (2 + eps), radius)
  if degree is None:
    return HopfieldPlan("dense", None, None, flops_dense, math.inf, math.inf)
  rank = feature_count(dim, degree)
  # Two products a feature, and those with the d + 1 columns of the state.
  flops_lowrank = 2.0 * (num_patterns + updates) * rank * (dim + 2)
  error = taylor_error_bound(radius, degree)
  return HopfieldPlan(
    "lowrank" if flops_lowrank < flops_dense else "dense",
    degree,
    rank,
    flops_dense,
    flops_lowrank,
    2 * error / (1 - error),
  )


# --- theory ---


def pattern_separation(patterns: jax.Array) -> jax.Array:
  r"""How much more similar each pattern is to itself than to any other.

  .. math:: \Delta_\mu = \xi_\mu \cdot \xi_\mu
    - \max_{\nu \ne \mu} \xi_\mu \cdot \xi_\nu

  With N patterns of norm at most m, a pattern is stored, and retrieved from
  nearby, if :math:`\Delta_\mu \ge \frac{2}{\beta N} + \frac1\beta \ln(2 (N - 1)
  N \beta m^2)`.

  Args:
    patterns: (M, d), floating.

  Returns:
    (M,) of the dtype of ``patterns``; infinite for a pattern alone.

  Raises:
    ValueError: if shape or dtype do not fit.

  Cost:
    2 M^2 d flops; no more than some 2^20 similarities at a time.

  Source:
    arXiv 2008.02217, equation 4 and theorem 5.

  Example:
    >>> import jax.numpy as jnp
    >>> print(pattern_separation(jnp.array([[2.0, 0.0], [1.0, 1.0]])))
    [2. 0.]
  """
  patterns = jnp.asarray(patterns)
  _check_patterns(patterns)
  return _separation(patterns)


def retrieval_error_bound(
  x: jax.Array,
  patterns: jax.Array,
  mu: int | jax.Array,
  beta: float | jax.Array,
) -> RetrievalErrorBound:
  r"""Bounds the distance of one dense update from a pattern.

  .. math:: |T(x) - \xi_\mu| \le 2 m (1 - p_\mu)
    \le 2 m (M - 1) e^{-\beta (\xi_\mu \cdot x
      - \max_{\nu \ne \mu} \xi_\nu \cdot x)}

  with :math:`p = \mathrm{softmax}(\beta \Xi x)` and m the largest norm.

  Args:
    x: (..., d), floating.
    patterns: (M, d), of the same dtype.
    mu: index of the pattern: one, or (...,) of them; negative ones count from
      the end.
    beta: inverse temperature, > 0; may be traced.

  Returns:
    Both bounds, each (...,) of the dtype of ``x``.

  Raises:
    ValueError: if shapes or dtypes do not fit, ``beta`` is not positive, or
      ``mu`` is no index.

  Cost:
    2 M d flops a query; no more than some 2^20 similarities at a time.

  Source:
    arXiv 2008.02217, theorem 4; the first bound is this project's.

  Example:
    >>> import jax.numpy as jnp
    >>> patterns = 2 * jnp.eye(3)
    >>> bound = retrieval_error_bound(patterns[0], patterns, 0, 1.0)
    >>> print(f"{bound.weight:.3f} {bound.gap:.3f}")
    0.141 0.147
  """
  x, patterns = _check(x, patterns, beta)
  mu = jnp.asarray(mu)
  if not jnp.issubdtype(mu.dtype, jnp.integer):
    raise ValueError(f"mu must be integers, got dtype {mu.dtype}")
  if mu.ndim:
    _checks.check_shape("mu", mu, x.shape[:-1], "that of x without d")
  _checks.check_range("mu", mu, -len(patterns), len(patterns) - 1)
  return _error_bound(x, patterns, mu, beta)


def capacity_lower_bound(
  beta: float | jax.Array,
  norm_scale: float | jax.Array,
  dim: int,
  delta: float | jax.Array,
) -> CapacityBound:
  r"""Number of random patterns that can be stored: exponential in d.

  For patterns uniform on the sphere of radius :math:`K \sqrt{d - 1}`, with

  .. math::

    a = \frac{2}{d - 1} (1 + \ln(2 \beta K^2 p (d - 1))), \quad
    b = \frac{2 K^2 \beta}{5}, \quad c = \frac{b}{W_0(e^{a + \ln b})},

  if :math:`c \ge (2 / \sqrt p)^{4 / (d - 1)}` then with probability 1 - p at
  least :math:`N = \sqrt p\, c^{(d - 1) / 4}` of them can be.

  Args:
    beta: inverse temperature, > 0; a number or an array, may be traced.
    norm_scale: K > 0.
    dim: d >= 2.
    delta: p in (0, 1), probability of failure.

  Returns:
    c, N and whether the condition holds, in JAX's default floating dtype.

  Raises:
    ValueError: if an argument is out of range.

  Cost:
    O(1).

  Source:
    arXiv 2008.02217, theorem 3.

  Example:
    >>> bound = capacity_lower_bound(1.0, 3.0, 20, 0.001)
    >>> print(f"{bound.c:.4f} {bound.n:.2f} {bound.ok}")
    3.1546 7.41 True
  """
  _checks.check_positive("beta", beta)
  _checks.check_positive("norm_scale", norm_scale)
  _checks.check_integer("dim", dim, 2, None)
  _checks.check_range("delta", delta, 0, 1, closed=False)
  beta, scale, p = (jnp.asarray(x, float) for x in (beta, norm_scale, delta))
  power = 4 / (dim - 1)
  b = 2 * scale**2 * beta / 5
  a = power / 2 * (1 + jnp.log(2 * beta * scale**2 * p * (dim - 1)))
  c = b / lambertw(b * jnp.exp(a))
  n = jnp.sqrt(p) * c ** (1 / power)
  return CapacityBound(c, n, c >= (2 / jnp.sqrt(p)) ** power)


# --- checks ---


def _check(x: Any, patterns: Any, beta: Any) -> tuple[jax.Array, jax.Array]:
  x, patterns = jnp.asarray(x), jnp.asarray(patterns)
  _check_patterns(patterns)
  _checks.check_one_dtype(x=x, patterns=patterns)
  _check_dim(x, patterns.shape[1])
  _check_beta(beta)
  return x, patterns


def _check_patterns(patterns: jax.Array) -> None:
  if patterns.ndim != 2:
    raise ValueError(f"patterns must be (M, d), got shape {patterns.shape}")
  _checks.check_floating("patterns", patterns)
  if not patterns.size:
    raise ValueError(f"patterns must not be empty, got shape {patterns.shape}")


def _check_dim(x: jax.Array, dim: int) -> None:
  if x.ndim == 0:
    raise ValueError("x must have shape (..., d), got a scalar")
  if x.shape[-1] != dim:
    raise ValueError(f"query dim {x.shape[-1]} != pattern dim {dim}")
  if not x.size:
    raise ValueError(f"x must not be empty, got shape {x.shape}")


def _check_beta(beta: Any) -> None:
  _checks.check_scalar("beta", beta)
  _checks.check_positive("beta", beta)


def _check_values(values: jax.Array, patterns: jax.Array) -> None:
  _checks.check_one_dtype(patterns=patterns, values=values)
  _checks.check_shape("values", values, (len(patterns), None), "(M, Hv)")


def _check_state(state: Any) -> HopfieldState:
  state = HopfieldState(*map(jnp.asarray, state))
  _checks.check_rank("state.z", state.z, 2)
  _checks.check_shape("state.k", state.k, state.z.shape[:1], "(r,)")
  _checks.check_rank("state.mean", state.mean, 1)
  _degree_of(state)
  return state


def _degree_of(state: HopfieldState) -> int:
  """The degree, from the number of features."""
  rank, dim = len(state.k), len(state.mean)
  degree = 0
  while feature_count(dim, degree) < rank:
    degree += 1
  if feature_count(dim, degree) != rank:
    raise ValueError(
      f"state.k must have C({dim} + g, g) features, got {rank} of them"
    )
  return degree


def _check_lowrank(
  x: jax.Array,
  patterns: jax.Array | None,
  beta: Any,
  state: Any,
  one_update: bool,
) -> HopfieldState:
  if state is None:
    raise ValueError(
      "state is required with method='lowrank': hopfield_store makes one"
    )
  state = _check_state(state)
  _checks.check_floating("x", x)
  _check_dim(x, len(state.mean))
  _check_beta(beta)
  if patterns is not None:
    _check_patterns(patterns)
    _checks.check_one_dtype(x=x, patterns=patterns)
    _checks.check_shape("patterns", patterns, (None, x.shape[-1]), "(M, d)")
  if state.z.shape[1] != x.shape[-1] and not one_update:
    raise ValueError(
      "max_steps must be 1, unrolled and without info, for a state whose "
      f"values have size {state.z.shape[1]} and its patterns {x.shape[-1]}"
    )
  return state


def _check_promise(
  x: jax.Array,
  patterns: jax.Array | None,
  beta: Any,
  state: HopfieldState,
  max_steps: int,
) -> None:
  """Raises if values are known and no accuracy can be promised for them."""
  if not all(map(_checks.is_concrete, (x, beta, *state))):
    return
  stored, beta = float(state.beta), float(beta)
  if abs(stored - beta) > 1e-6 * stored:
    raise ValueError(f"beta must be that of the state, {stored:g}, got {beta}")
  wide = x.astype(state.mean.dtype)
  longest = float(jnp.linalg.norm(wide, axis=-1).max())
  if max_steps > 1:
    # Later queries lie between the patterns.
    between = float(jnp.linalg.norm(state.mean) + state.radius)
    longest = max(longest, between)
  largest = beta * longest * float(state.radius)
  degree = _degree_of(state)
  bound = _kernel_error(largest, degree)
  if bound >= 1 and patterns is not None and _checks.is_concrete(patterns):
    # That was by norms. Measured logits may be much smaller.
    key = patterns.astype(wide.dtype) - state.mean[None]
    queries = [wide.reshape(-1, 1, len(state.mean))]
    if max_steps > 1:
      queries.append(patterns.astype(wide.dtype)[:, None])
    largest = max(
      float(logit_radius(q, key[:, None], scale=beta)) for q in queries
    )
    bound = _kernel_error(largest, degree)
  if bound >= 1:
    raise ValueError(
      f"low-rank retrieval invalid: kernel error bound {bound:.2g} >= 1; "
      "reduce beta or use method='dense'"
    )


def _kernel_error(largest: float, degree: int) -> float:
  return taylor_error_bound(largest, degree) if largest > 0 else 0.0


def _degree(eps: float, radius: float) -> int | None:
  """Least even degree of a relative error below ``eps``, if there is one."""
  try:
    return degree_for(eps, radius, kind="taylor_bound")
  except ValueError:
    # The arguments are fine: no degree that can be computed with will do.
    return None


# --- what runs ---


def _by_rows(fn: Callable[..., Any], width: int, *arrays: jax.Array) -> Any:
  """Maps a function of rows over (L, ...) arrays, some rows at a time.

  ``width`` numbers exist for each row; they are computed again for gradients.
  """
  rows = max(1, _PART // width)
  if len(arrays[0]) <= rows:
    return jax.vmap(fn)(*arrays)
  one = jax.checkpoint(fn)
  return lax.map(lambda x: one(*x), arrays, batch_size=rows)


def _flat(x: jax.Array) -> jax.Array:
  return x.reshape(-1, x.shape[-1])


def _log_mean_exp(logits: jax.Array) -> jax.Array:
  """Over the last axis; with all its digits where logits are close to 0."""
  peak = lax.stop_gradient(logits.max(-1, keepdims=True))
  return jnp.log1p(jnp.expm1(logits - peak).mean(-1)) + peak[..., 0]


@jax.jit
def _energy(x: jax.Array, patterns: jax.Array, beta: Any) -> jax.Array:
  dtype = accumulator(x.dtype)
  wide, keys = x.astype(dtype), patterns.astype(dtype)
  beta = jnp.asarray(beta, dtype)

  def one(x: jax.Array) -> jax.Array:
    return (x * x).sum() / 2 - _log_mean_exp(beta * (keys @ x)) / beta

  rows = _by_rows(one, len(keys), _flat(wide))
  out = rows.reshape(x.shape[:-1]) + _half_largest_square(keys)
  return out.astype(x.dtype)


def _half_largest_square(patterns: jax.Array) -> jax.Array:
  return (patterns * patterns).sum(-1).max() / 2


@jax.jit
def _update(
  x: jax.Array, patterns: jax.Array, beta: Any, values: jax.Array
) -> jax.Array:
  # Wide: a traced scale multiplies the queries in the dtype that they have.
  dtype = accumulator(x.dtype)
  rows = (y.astype(dtype)[:, None] for y in (_flat(x), patterns, values))
  out = softmax_attention(*rows, scale=beta).astype(x.dtype)
  return out[:, 0].reshape(*x.shape[:-1], -1)


@functools.partial(
  jax.jit, static_argnames=("max_steps", "implicit", "return_info")
)
def _retrieve(
  x: jax.Array,
  patterns: jax.Array | None,
  beta: Any,
  tol: Any,
  state: HopfieldState | None,
  *,
  max_steps: int,
  implicit: bool,
  return_info: bool,
) -> tuple[jax.Array, HopfieldInfo | None]:
  dtype = accumulator(x.dtype) if state is None else state.z.dtype
  wide, tol = _flat(x).astype(dtype), jnp.asarray(tol, dtype)
  keys = None if patterns is None else patterns.astype(dtype)
  params: Any = (keys, jnp.asarray(beta, dtype)) if state is None else state
  step = _dense_step if state is None else _lowrank_step
  if max_steps == 1 and not return_info and not implicit:
    # The one case in which values need not be patterns.
    out = step(params, wide)
    return out.reshape(*x.shape[:-1], -1).astype(x.dtype), None
  if implicit:
    fixed, wide = lax.stop_gradient((params, wide))
    row = _dense_row if state is None else _lowrank_row
  else:
    fixed, row = params, None
  out, num_steps, residual = iterate_queries(
    functools.partial(step, fixed), wide, tol=tol, max_steps=max_steps
  )
  if row is not None:
    out = _with_implicit_gradient(row, params, lax.stop_gradient(out))
  info = None
  if return_info:
    assert keys is not None
    if state is None:
      energy = _energy(out, keys, beta)
    else:
      energy = _lowrank_energy(out, keys, state)
    numbers = num_steps, energy.astype(x.dtype), residual.astype(x.dtype)
    info = HopfieldInfo(*(y.reshape(x.shape[:-1]) for y in numbers))
  return out.reshape(x.shape).astype(x.dtype), info


def _with_implicit_gradient(
  row: Callable[[Any, jax.Array], jax.Array], params: Any, x: jax.Array
) -> jax.Array:
  """One update more of (L, d) fixed points, differentiated as such."""
  largest = max(leaf.size for leaf in jax.tree.leaves(params))

  def one(x: jax.Array) -> jax.Array:
    return fixed_point(row, params, x, tol=math.inf, max_steps=1)

  # The gradient holds a Jacobian of what a row is made from.
  return _by_rows(one, largest * x.shape[1], x)


def _dense_step(params: Any, x: jax.Array) -> jax.Array:
  patterns, beta = params
  return _update(x, patterns, beta, patterns)


def _dense_row(params: Any, x: jax.Array) -> jax.Array:
  """The same for one query, with derivatives of any kind."""
  patterns, beta = params
  return jax.nn.softmax(beta * (patterns @ x)) @ patterns


def _lowrank_step(state: HopfieldState, x: jax.Array) -> jax.Array:
  row = functools.partial(_lowrank_row, state)
  return _by_rows(row, len(state.k), x)


def _lowrank_row(state: HopfieldState, x: jax.Array) -> jax.Array:
  features = _features(state, x)
  return features @ state.z / (features @ state.k)


def _features(state: HopfieldState, x: jax.Array) -> jax.Array:
  return taylor_features(x, _degree_of(state), scale=state.beta)


def _lowrank_energy(
  x: jax.Array, patterns: jax.Array, state: HopfieldState
) -> jax.Array:
  def one(x: jax.Array) -> jax.Array:
    # The first feature is 1, and its sum their number.
    log = jnp.log(_features(state, x) @ state.k / state.k[0]) / state.beta
    return (x * x).sum() / 2 - log - x @ state.mean

  rows = _by_rows(one, len(state.k), x)
  return rows + _half_largest_square(patterns)


@functools.partial(jax.jit, static_argnames=("degree", "chunk_size"))
def _store(
  patterns: jax.Array,
  values: jax.Array,
  beta: jax.Array,
  *,
  degree: int,
  chunk_size: int | None,
) -> HopfieldState:
  keys = patterns.astype(beta.dtype)
  mean = keys.mean(0)
  keys = keys - mean[None]
  sums = _sums(keys, values.astype(beta.dtype), beta, degree, chunk_size)
  radius = jnp.linalg.norm(keys, axis=1).max()
  return HopfieldState(sums[:, :-1], sums[:, -1], mean, beta, radius)


def _sums(
  keys: jax.Array,
  values: jax.Array,
  beta: jax.Array,
  degree: int,
  chunk_size: int | None = None,
) -> jax.Array:
  """(r, Hv + 1), of patterns (M, d) that are shifted."""

  def feature_fn(x: jax.Array) -> jax.Array:
    return taylor_features(x, degree, scale=beta)

  pairs = keys[:, None], values[:, None]
  return feature_moments(feature_fn, *pairs, chunk_size=chunk_size)[0]


def _changed(
  state: HopfieldState, pattern: Any, value: Any, sign: int
) -> HopfieldState:
  state, pattern = _check_state(state), jnp.asarray(pattern)
  dim, value_dim = len(state.mean), state.z.shape[1]
  _checks.check_rank("pattern", pattern, (1, 2))
  _checks.check_floating("pattern", pattern)
  shape = *((None,) * (pattern.ndim - 1)), dim
  _checks.check_shape("pattern", pattern, shape, "(d,) or (n, d)")
  if value is None:
    if value_dim != dim:
      raise ValueError(
        f"value is required: the state holds values of size {value_dim}"
      )
    value = pattern
  value = jnp.asarray(value)
  _checks.check_floating("value", value)
  shape = *pattern.shape[:-1], value_dim
  _checks.check_shape("value", value, shape, "one for each pattern")
  return _change(state, jnp.atleast_2d(pattern), jnp.atleast_2d(value), sign)


@functools.partial(jax.jit, static_argnums=3)
def _change(
  state: HopfieldState, patterns: jax.Array, values: jax.Array, sign: int
) -> HopfieldState:
  dtype = state.z.dtype
  keys = patterns.astype(dtype) - state.mean[None]
  degree = _degree_of(state)
  sums = sign * _sums(keys, values.astype(dtype), state.beta, degree)
  radius = state.radius
  if sign > 0:
    radius = jnp.maximum(radius, jnp.linalg.norm(keys, axis=1).max())
  return state._replace(
    z=state.z + sums[:, :-1], k=state.k + sums[:, -1], radius=radius
  )


@jax.jit
def _separation(patterns: jax.Array) -> jax.Array:
  wide = patterns.astype(accumulator(patterns.dtype))

  def one(x: jax.Array, mu: jax.Array) -> jax.Array:
    similar = wide @ x
    own = jnp.arange(len(wide)) == mu
    return similar[mu] - jnp.where(own, -jnp.inf, similar).max()

  gaps = _by_rows(one, len(wide), wide, jnp.arange(len(wide)))
  return gaps.astype(patterns.dtype)


@jax.jit
def _error_bound(
  x: jax.Array, patterns: jax.Array, mu: jax.Array, beta: Any
) -> RetrievalErrorBound:
  dtype = accumulator(x.dtype)
  keys = patterns.astype(dtype)
  beta, num = jnp.asarray(beta, dtype), len(keys)
  factor = 2 * jnp.sqrt(2 * _half_largest_square(keys))
  mu = jnp.broadcast_to(mu % num, x.shape[:-1]).reshape(-1)

  def one(x: jax.Array, mu: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = beta * (keys @ x)
    own = jnp.arange(num) == mu
    # The sum of the others: 1 - p would be rounded to 0.
    weight = jnp.where(own, 0, jax.nn.softmax(logits)).sum()
    gap = logits[mu] - jnp.where(own, -jnp.inf, logits).max()
    return factor * weight, factor * (num - 1) * jnp.exp(-gap)

  bounds = _by_rows(one, num, _flat(x).astype(dtype), mu)
  return RetrievalErrorBound(
    *(b.reshape(x.shape[:-1]).astype(x.dtype) for b in bounds)
  )
