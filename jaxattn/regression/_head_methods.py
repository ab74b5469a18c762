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
from jaxattn.regression._head_calculus import (
  AttentionRegressionData,
  Parts,
  assemble,
  blocks,
  check_dense,
  gradient,
  join,
  loss,
  loss_of,
  parts_of,
  product,
  shapes,
  split,
  tangent,
  value_and_grad,
  weights,
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


def _reduced_parts(x: jax.Array, data: AttentionRegressionData) -> Parts:
  shape = shapes(data)[0]
  _checks.check_shape("x", x, (shape[0] * shape[1],), "(d1 d2,)")
  matrix = x.reshape(shape)
  s = weights(matrix, data.a1, data.a2, data.bias)
  z = s @ data.a3
  y = solve_values(z, data)
  return Parts(matrix, y, s, z, z @ y - data.b)


def reduced_loss(x: jax.Array, data: AttentionRegressionData) -> jax.Array:
  return loss_of(_reduced_parts(x, data), data)


def reduced_value_and_grad(
  x: jax.Array, data: AttentionRegressionData
) -> tuple[jax.Array, jax.Array]:
  parts = _reduced_parts(x, data)
  return loss_of(parts, data), gradient(parts, data)[0].reshape(-1)


def _solve_gram(
  parts: Parts, data: AttentionRegressionData, b: jax.Array
) -> jax.Array:
  """(Z^T Z + ridge_y I)^-1 b, of (d3, ...); a pseudoinverse if singular."""
  gram = parts.z.T @ parts.z
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
  parts = _reduced_parts(x, data)
  h_xx, h_xy, _ = blocks(parts, data, None, exact=exact)
  if schur:
    d3, dv = parts.y.shape
    right = _solve_gram(parts, data, h_xy.T.reshape(d3, dv, -1))
    h_xx -= h_xy @ right.reshape(d3 * dv, -1)
  return newton.DenseCurvature(h_xx)


def reduced_operator(
  x: jax.Array, data: AttentionRegressionData, *, schur: bool, exact: bool
) -> newton.OperatorCurvature:
  matvec = functools.partial(_reduced_product, schur=schur, exact=exact)
  return newton.OperatorCurvature(
    jax.tree_util.Partial(matvec, _reduced_parts(x, data), data)
  )


def _reduced_product(
  parts: Parts,
  data: AttentionRegressionData,
  v: jax.Array,
  *,
  schur: bool,
  exact: bool,
) -> jax.Array:
  num = len(v)
  zeros = jnp.zeros(parts.y.size, v.dtype)
  along = product(parts, data, jnp.concatenate([v, zeros]), exact=exact)
  if not schur:
    return along[:num]
  # How Y follows X.
  dy = -_solve_gram(parts, data, along[num:].reshape(parts.y.shape))
  return product(parts, data, join(v, dy), exact=exact)[:num]


# --- with a sample of the queries ---


@functools.lru_cache(maxsize=64)
def _sampled_problem(num_rows: int) -> newton.Problem:
  """Joint, with the Hessian of a weighted sample of queries."""

  def sampled(x: jax.Array, given: Sampled, *, exact: bool) -> Any:
    data, prob, rng = given
    rows, weight = row_sample(rng, prob, num_rows)
    bias = None if data.bias is None else data.bias[rows]
    some = data._replace(a1=data.a1[rows], b=data.b[rows], bias=bias)
    parts = parts_of(*split(x, some), some)
    return newton.DenseCurvature(
      assemble(blocks(parts, some, weight, exact=exact))
    )

  return newton.Problem(
    lambda x, given: loss(x, given.data),
    lambda x, given: value_and_grad(x, given.data),
    functools.partial(sampled, exact=True),
    functools.partial(sampled, exact=False),
  )


def leverage(
  rng: jax.Array, x: jax.Array, data: AttentionRegressionData
) -> jax.Array:
  r"""Probabilities of queries, by what they add to the Gauss-Newton matrix.

  The trace of :math:`G^{-1/2} J_j^\top J_j G^{-1/2}` is estimated from random
  directions :math:`u \sim N(0, G^{-1})`, as the mean of :math:`\|J_j u\|^2`.
  """
  parts = parts_of(*split(x, data), data)
  matrix = assemble(blocks(parts, data, None, exact=False))
  shift = jnp.finfo(x.dtype).eps ** 0.5 * jnp.trace(matrix) / len(matrix)
  eye = jnp.eye(len(matrix), dtype=x.dtype)
  factor = jnp.linalg.cholesky(matrix + shift * eye)
  draw = jax.random.normal(rng, (len(x), _PROBES), x.dtype)
  directions = linalg.solve_triangular(factor.T, draw).T

  def change(v: jax.Array) -> jax.Array:
    return (tangent(parts, data, *split(v, data))[2] ** 2).sum(1)

  score = lax.map(change, directions).sum(0)
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
  num_rows = min(n, config.num_rows or _QUERIES_PER_ENTRY * shape[0] * shape[1])
  plain = config._replace(sketch=None, num_rows=None, refresh=0)

  def exact(state: Any, prob: jax.Array, key: jax.Array) -> Any:
    state, info = newton.step(problem, state, data, config=plain)
    if config.sketch != "uniform":
      prob = leverage(key, state.x, data)
    return state, prob, info._replace(num_rows=jnp.array(n, jnp.int32))

  def sampled(state: Any, prob: jax.Array, key: jax.Array) -> Any:
    given = Sampled(data, prob, key)
    solved = _sampled_problem(num_rows)
    state, info = newton.step(solved, state, given, config=plain)
    info = info._replace(num_rows=jnp.array(num_rows, jnp.int32))
    return state, prob, info

  def one(state: newton.NewtonState, prob: jax.Array, bad: jax.Array) -> Any:
    due = bad | (state.num_steps < _FIRST_EXACT)
    if config.refresh:
      due |= state.num_steps % config.refresh == 0
    key = jax.random.fold_in(rng, state.num_steps)
    state, prob, info = lax.cond(due, exact, sampled, state, prob, key)
    bad = (info.step_size == 0) | (info.ratio < 0.25)
    bad |= jnp.linalg.norm(state.grad) > 0.8 * info.grad_norm
    return (state, prob, bad), info

  def running(carry: Any) -> jax.Array:
    state = carry[0][0]
    return (state.reason < 0) & (state.num_steps < config.max_steps)

  def body(carry: Any) -> Any:
    now, log = carry
    new, info = one(*now)
    at = now[0].num_steps
    return new, jax.tree.map(lambda y, z: y.at[at].set(z), log, info)

  prob = jnp.full((n,), 1 / n, x0.dtype)
  state = newton.init(problem, x0, data, config=plain)
  start = state, prob, jnp.zeros((), bool)
  log = jax.tree.map(
    lambda s: jnp.full((config.max_steps,), _unused(s.dtype), s.dtype),
    jax.eval_shape(one, *start)[1],
  )
  (state, _, _), log = lax.while_loop(running, body, (start, log))
  return newton.NewtonResult(
    x=state.x,
    loss=state.loss,
    grad_norm=jnp.linalg.norm(state.grad),
    num_steps=state.num_steps,
    reason=jnp.maximum(state.reason, 0),
    log=log,
  )


def _unused(dtype: Any) -> float:
  return jnp.nan if jnp.issubdtype(dtype, jnp.floating) else -1
