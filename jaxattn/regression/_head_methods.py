"""Ways to fit one head of attention other than plain Newton's method.

With the best Y for each X there is one unknown less, and the Hessian of what is
left is a Schur complement. With a sample of the queries a Hessian costs less.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy import linalg

from jaxattn import _checks, newton
from jaxattn.newton._loop import FLAT, RUNNING, STUCK, iterate
from jaxattn.newton.minimize import result_of
from jaxattn.regression._head_calculus import (
  AttentionRegressionData,
  Pulled,
  assemble,
  blocks,
  blocks_and_rows,
  check_dense,
  gradient,
  join,
  loss,
  loss_of,
  means,
  product,
  shapes,
  split,
  take_queries,
  value_and_grad,
)
from jaxattn.sketch.rows import row_sample

# Queries drawn for each entry of X, steps that are exact whatever comes, probes
# of the leverage, and the uniform share of probabilities.
_QUERIES_PER_ENTRY, _FIRST_EXACT, _PROBES, _UNIFORM = 16, 2, 16, 0.1


class Sampled(NamedTuple):
  """Data of a step with a sampled Hessian."""

  data: AttentionRegressionData
  prob: jax.Array
  rng: jax.Array


class Formed(NamedTuple):
  """Data of a step whose Hessian is there already."""

  data: AttentionRegressionData
  matrix: jax.Array


# --- with the best Y for each X ---


def solve_values(z: jax.Array, data: AttentionRegressionData) -> jax.Array:
  """The best Y, of least norm where there are several."""
  # Singular values of Z itself: its square would lose half of the digits.
  q, r = jnp.linalg.qr(z)
  u, sizes, wt = jnp.linalg.svd(r, full_matrices=False)
  kept = sizes > jnp.finfo(z.dtype).eps * max(z.shape) * sizes.max()
  gain = sizes / jnp.where(kept, sizes**2 + data.ridge_y, 1)
  # NaN stays NaN: nothing is kept of it, and its loss must not be finite.
  gain = jnp.where(kept | jnp.isnan(sizes), gain, 0)
  return wt.T @ (gain[:, None] * (u.T @ (q.T @ data.b)))


class _Reduced(NamedTuple):
  """A point X with the best Y for it."""

  x: jax.Array
  y: jax.Array
  z: jax.Array  # S A3


def _reduced(x: jax.Array, data: AttentionRegressionData) -> _Reduced:
  shape = shapes(data)[0]
  _checks.check_shape("x", x, (shape[0] * shape[1],), "(d1 d2,)")
  matrix = x.reshape(shape)
  z = means(matrix, data)
  return _Reduced(matrix, solve_values(z, data), z)


def reduced_loss(x: jax.Array, data: AttentionRegressionData) -> jax.Array:
  matrix, y, z = _reduced(x, data)
  return loss_of(z @ y - data.b, matrix, y, data)


def reduced_value_and_grad(
  x: jax.Array, data: AttentionRegressionData
) -> tuple[jax.Array, jax.Array]:
  matrix, y, _ = _reduced(x, data)
  r, grad, _ = gradient(matrix, y, data)
  return loss_of(r, matrix, y, data), grad.reshape(-1)


def _solve_gram(
  z: jax.Array, data: AttentionRegressionData, b: jax.Array
) -> jax.Array:
  """(Z^T Z + ridge_y I)^-1 b, of (d3, ...); a pseudoinverse if singular."""
  gram = z.T @ z
  eye = jnp.eye(len(gram), dtype=gram.dtype)
  values, vectors = jnp.linalg.eigh(gram + data.ridge_y * eye)
  kept = values > jnp.finfo(gram.dtype).eps * len(gram) * values[-1]
  gain = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
  flat = vectors @ (gain[:, None] * (vectors.T @ b.reshape(len(gram), -1)))
  return flat.reshape(b.shape)


def reduced_dense(
  x: jax.Array, data: AttentionRegressionData, *, schur: bool, exact: bool
) -> newton.DenseCurvature:
  check_dense(data)
  matrix, y, z = _reduced(x, data)
  h_xx, h_xy, _ = blocks(matrix, y, data, exact=exact)
  if schur:
    d3, dv = y.shape
    right = _solve_gram(z, data, h_xy.T.reshape(d3, dv, -1))
    h_xx -= h_xy @ right.reshape(d3 * dv, -1)
  return newton.DenseCurvature(h_xx)


def reduced_operator(
  x: jax.Array, data: AttentionRegressionData, *, schur: bool, exact: bool
) -> newton.OperatorCurvature:
  matvec = functools.partial(_reduced_product, schur=schur, exact=exact)
  return newton.OperatorCurvature(
    jax.tree_util.Partial(matvec, _reduced(x, data), data)
  )


def _reduced_product(
  at: _Reduced,
  data: AttentionRegressionData,
  v: jax.Array,
  *,
  schur: bool,
  exact: bool,
) -> jax.Array:
  num = len(v)
  times_hessian = functools.partial(product, at.x, at.y, data, exact=exact)
  along = times_hessian(join(v, jnp.zeros_like(at.y)))
  if not schur:
    return along[:num]
  # How Y follows X.
  dy = -_solve_gram(at.z, data, along[num:].reshape(at.y.shape))
  return times_hessian(join(v, dy))[:num]


# --- with a sample of the queries ---


@functools.lru_cache(maxsize=64)
def _sampled_problem(num_rows: int) -> newton.Problem:
  """Joint, with the Hessian of a weighted sample of queries."""

  def sampled(x: jax.Array, given: Sampled, *, exact: bool) -> Any:
    data, prob, rng = given
    rows, weight = row_sample(rng, prob, num_rows)
    some = take_queries(data, lambda z: z[rows])
    found = blocks(*split(x, data), some, weight, exact=exact)
    return newton.DenseCurvature(assemble(found))

  return newton.Problem(
    lambda x, given: loss(x, given.data),
    lambda x, given: value_and_grad(x, given.data),
    functools.partial(sampled, exact=True),
    functools.partial(sampled, exact=False),
  )


# Joint, where somebody else has formed the Hessian.
_FORMED = newton.Problem(
  lambda x, given: loss(x, given.data),
  lambda x, given: value_and_grad(x, given.data),
  lambda x, given: newton.DenseCurvature(given.matrix),
  lambda x, given: newton.DenseCurvature(given.matrix),
)


def leverage(
  rng: jax.Array,
  matrix: jax.Array,
  rows: Pulled,
  data: AttentionRegressionData,
) -> jax.Array:
  r"""Probabilities of queries, by what they add to the Gauss-Newton matrix.

  The trace of :math:`H^{-1/2} J_j^\top J_j H^{-1/2}` is estimated from random
  directions :math:`u \sim N(0, H^{-1})`, as the mean of :math:`\|J_j u\|^2`.
  """
  factor = jnp.linalg.cholesky(matrix)
  draw = jax.random.normal(rng, (len(matrix), _PROBES), matrix.dtype)
  directions = linalg.solve_triangular(factor.T, draw).T
  dx, dy = jax.vmap(lambda v: split(v, data))(directions)
  # W_j^T Xdot^T a_j + Ydot^T z_j: nothing here is of n1 n2 numbers.
  change = jnp.einsum("jp,kpa,jai->jki", data.a1, dx, rows.w)
  change += jnp.einsum("jm,kmi->jki", rows.z, dy)
  score = (change**2).sum((1, 2))
  total, n = score.sum(), len(score)
  prob = (1 - _UNIFORM) * score / total + _UNIFORM / n
  return jnp.where(jnp.isfinite(total) & (total > 0), prob, 1 / n)


def minimize_sampled(
  rng: jax.Array,
  problem: newton.Problem,
  x0: jax.Array,
  data: AttentionRegressionData,
  config: newton.NewtonConfig,
) -> newton.NewtonResult:
  """Newton steps from fresh samples; an exact one after each bad one."""
  n, shape = len(data.a1), shapes(data)[0]
  num_rows = config.num_rows or _QUERIES_PER_ENTRY * shape[0] * shape[1]
  plain = config._replace(sketch=None, num_rows=None, refresh=0)
  if num_rows >= n:
    # All of them cost as much as a sample of as many, and say more.
    return _count_rows(newton.minimize(problem, x0, data, config=plain), n)
  exact = functools.partial(_exact_step, data, config, plain)
  sampled = functools.partial(_sampled_step, data, num_rows, plain)

  def one(state: newton.NewtonState, prob: jax.Array, bad: jax.Array) -> Any:
    # Once one was within rounding, only exact ones tell whether that is all.
    due = bad | (state.num_steps < _FIRST_EXACT) | (state.num_flat > 0)
    if config.refresh:
      due |= state.num_steps % config.refresh == 0
    key = jax.random.fold_in(rng, state.num_steps)
    (state, prob, info), flat = lax.cond(due, exact, sampled, state, prob, key)
    bad = flat | (info.step_size == 0) | (info.ratio < 0.25)
    bad |= jnp.linalg.norm(state.grad) > 0.8 * info.grad_norm
    return (state, prob, bad), info

  prob = jnp.full((n,), 1 / n, x0.dtype)
  state = newton.init(problem, x0, data, config=plain)
  start = state, prob, jnp.zeros((), bool)
  return result_of(*iterate(one, start, config.max_steps))


def _count_rows(found: newton.NewtonResult, n: int) -> newton.NewtonResult:
  """Says in the log that each step had all queries."""
  steps = jnp.arange(len(found.log.num_rows)) < found.num_steps
  return found._replace(
    log=found.log._replace(num_rows=jnp.where(steps, n, -1).astype(jnp.int32))
  )


def _exact_step(
  data: AttentionRegressionData,
  config: newton.NewtonConfig,
  plain: newton.NewtonConfig,
  state: newton.NewtonState,
  prob: jax.Array,
  key: jax.Array,
) -> Any:
  """With all queries, whose Hessian says how to draw them from now on."""
  found, rows = blocks_and_rows(
    *split(state.x, data), data, exact=config.curvature == "newton"
  )
  matrix = assemble(found)
  state, info = newton.step(_FORMED, state, Formed(data, matrix), config=plain)
  if config.sketch != "uniform":
    shifted = matrix + info.shift * jnp.eye(len(matrix), dtype=matrix.dtype)
    prob = leverage(key, shifted, rows, data)
  info = info._replace(num_rows=jnp.array(len(data.a1), jnp.int32))
  return (state, prob, info), jnp.zeros((), bool)


def _sampled_step(
  data: AttentionRegressionData,
  num_rows: int,
  plain: newton.NewtonConfig,
  state: newton.NewtonState,
  prob: jax.Array,
  key: jax.Array,
) -> Any:
  """With some queries, and whether it promised next to nothing."""
  new, info = newton.step(
    _sampled_problem(num_rows), state, Sampled(data, prob, key), config=plain
  )
  flat = new.num_flat > 0
  # Of a sample that says little: an exact step decides whether it is the end.
  ended = (new.reason == FLAT) | (new.reason == STUCK)
  new = new._replace(
    num_flat=jnp.where(flat, state.num_flat, 0),
    reason=jnp.where(ended, RUNNING, new.reason),
  )
  info = info._replace(num_rows=jnp.array(num_rows, jnp.int32))
  return (new, prob, info), flat
