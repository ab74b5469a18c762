r"""What the gradient of a transformer tells about its input.

A client of federated learning shares :math:`G = \nabla_\theta \ell(e, y)` of
private embeddings e (n, d). An attacker who knows the parameters looks for
embeddings with the same gradient,

.. math::

  \min_e \tfrac12 \|r(e)\|^2, \qquad
  r(e) = \frac{\nabla_\theta \ell(e, y) - G}{\|G\|}.

That is a nonlinear least-squares problem of which the optimum is known to be 0,
so that Gauss-Newton converges quadratically wherever the Jacobian of the
gradient in e has full rank; :func:`leak_report` tells beforehand whether it
has. The methods of the literature descend the same loss by L-BFGS or Adam.
Where tokens are discrete, or a block has no residual connection, linear algebra
is enough: :func:`span_attack`, :func:`april_attack`.

The loss is differentiated twice in reverse and once in forward mode: attention
with a backward pass of its own will not do. Second derivatives of a ReLU
network vanish: use GELU or the like, or expect little. Single precision stalls
where the Jacobian is ill-conditioned; double is what the methods are made for.

Source: arXiv 2311.13624 for the question and the conditions; arXiv 1906.08935
(DLG), 2103.06819 (TAG), 2003.14053 (cosine) for the descents.
"""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxattn import _checks, newton
from jaxattn.regression import _leakage_closed_form as closed_form
from jaxattn.regression._leakage_closed_form import SpanResult as SpanResult
from jaxattn.regression._leakage_closed_form import (
  april_attack as april_attack,
)
from jaxattn.regression._leakage_closed_form import (
  label_from_bias as label_from_bias,
)
from jaxattn.regression._leakage_closed_form import span_attack as span_attack

__all__ = [
  "AttackConfig",
  "AttackResult",
  "GradientLeakageData",
  "LeakReport",
  "SpanResult",
  "april_attack",
  "attack",
  "gradient_matching_loss",
  "label_from_bias",
  "leak_report",
  "problem",
  "span_attack",
]

# (params, embeddings, y) -> ().
LossFn = Callable[[Any, jax.Array, Any], jax.Array]

_KINDS = ("euclidean", "cosine", "tag")
_METHODS = ("gauss_newton", "dlg", "tag", "cosine")
_MAX_STEPS = {"gauss_newton": 60, "dlg": 2000, "tag": 1000, "cosine": 1000}
_LEARNING_RATES = {"tag": 0.05, "cosine": 0.1}
# Of TAG: share of the absolute values, steps of warm-up, largest gradient.
_TAG_SHARE, _TAG_WARMUP, _TAG_CLIP = 0.1, 50, 1.0
_MU0 = 0.1
# Beyond this many unknowns the Jacobian is not formed.
_DENSE = 512
_LEAST_NORM = 1e-12
# Pairs that L-BFGS remembers.
_HISTORY = 20
# Parameters of a block from its input to its output, where TAG weighs by depth.
_FORWARD = (
  *("pos", "w_q", "w_k", "w_v", "w_o"),
  *("w_1", "b_1", "w_2", "w_c", "b_c"),
)


class GradientLeakageData(NamedTuple):
  """What the attacker knows; data of :func:`problem`.

  Attributes:
    params: of the model, a pytree.
    leaked: the gradient, of the same structure.
    y: what the loss takes: a class, or probabilities.
  """

  params: Any
  leaked: Any
  y: Any


class AttackConfig(NamedTuple):
  """Static options of :func:`attack`.

  Attributes:
    max_steps: steps of each start; None = 60 of Gauss-Newton, 2000 of L-BFGS
      (``"dlg"``; one step is one line search), 1000 of Adam.
    learning_rate: of Adam; None = 0.05 for ``"tag"``, 0.1 for ``"cosine"``. The
      other methods have none.
    init_scale: standard deviation of the starts; that of the table of
      embeddings is a good one.
    bias_key: name of the bias of the logits, whose gradient tells the label
      where ``y`` is None.
  """

  max_steps: int | None = None
  learning_rate: float | None = None
  init_scale: float = 1.0
  bias_key: str = "b_c"


class AttackResult(NamedTuple):
  """The end of :func:`attack`.

  Attributes:
    embeddings: (n, d), of the start that matched best.
    label: (), the class that was given, read or found.
    losses: (num_starts,), where each start ended; infinite if it failed.
    num_steps: (num_starts,) that were taken.
    log: (num_starts, max_steps) losses before each step, NaN after the end.
  """

  embeddings: jax.Array
  label: jax.Array
  losses: jax.Array
  num_steps: jax.Array
  log: jax.Array


class LeakReport(NamedTuple):
  """What :func:`leak_report` finds.

  Attributes:
    equations: (), numbers in the gradient.
    unknowns: (), numbers in the embeddings.
    rank: (), of the Jacobian of the gradient in the embeddings.
    condition: (), its largest over its smallest singular value; infinite with
      fewer equations than unknowns.
    full_rank: (), whether the reconstruction is locally unique.
    pos_rank: (), of the gradient in positions; -1 if it is not seen.
    span_rank: (), of the gradients in queries, keys and values, beside each
      other; -1 if they are not seen.
  """

  equations: jax.Array
  unknowns: jax.Array
  rank: jax.Array
  condition: jax.Array
  full_rank: jax.Array
  pos_rank: jax.Array
  span_rank: jax.Array


@functools.lru_cache(maxsize=8)
def gradient_matching_loss(
  kind: str = "euclidean",
) -> Callable[[Any, Any], jax.Array]:
  r"""How far one gradient is from another.

  With leaves :math:`l = 0, \dots, L - 1`, :math:`r_l = (g_l - G_l) / \|G\|`:

  * ``"euclidean"``: :math:`\tfrac12 \sum_l \|r_l\|^2`;
  * ``"cosine"``: :math:`1 - \langle g, G \rangle / (\|g\| \|G\|)`;
  * ``"tag"``: :math:`\tfrac12 \sum_l \|r_l\|^2 + 0.1\, \omega_l \|r_l\|_1` with
    weights :math:`\omega_l = (L - l) / L`.

  Args:
    kind: one of these.

  Returns:
    (gradient, leaked) -> (), of two pytrees of one structure. Leaves of a dict
    that are called as in :class:`jaxattn.models.LeakageBlock` come first, from
    its input to its output; all others in the order of ``jax.tree.leaves``. The
    same call gives the same object.

  Raises:
    ValueError: if ``kind`` is none of them.

  Cost:
    O(size of the gradient).

  Source:
    arXiv 1906.08935, 2003.14053 and 2103.06819 in this order; the division by
    the norm of G is this project's, so that losses are relative.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.regression import gradient_matching_loss
    >>> g, leaked = {"w": jnp.array([3.0, 0])}, {"w": jnp.array([0.0, 4.0])}
    >>> print(gradient_matching_loss()(g, leaked))
    0.78125
    >>> print(gradient_matching_loss("cosine")(g, leaked))
    1.0
  """
  _checks.check_choice("kind", kind, _KINDS)

  def loss(gradient: Any, leaked: Any) -> jax.Array:
    if kind == "cosine":
      size = _norm(gradient) * _norm(leaked)
      return 1 - _dot(gradient, leaked) / size
    gaps = _leaves(_gaps(gradient, leaked))
    square = sum((r**2).sum() for r in gaps)
    if kind == "tag":
      share = [
        _TAG_SHARE * (len(gaps) - i) / len(gaps) for i in range(len(gaps))
      ]
      square += sum(w * jnp.abs(r).sum() for w, r in zip(share, gaps))
    return jnp.asarray(square) / 2

  return loss


def attack(
  rng: jax.Array,
  loss_fn: LossFn,
  params: Any,
  leaked: Any,
  *,
  shape: Sequence[int],
  y: Any = None,
  method: str = "gauss_newton",
  num_starts: int = 1,
  mask_leaves: Any = None,
  config: AttackConfig = AttackConfig(),
) -> AttackResult:
  """Reconstructs embeddings from the gradient of a loss in the parameters.

  Compiled once for a loss, a method, a configuration and shapes: pass the same
  function each time. Maps over gradients with ``jax.vmap``.

  Args:
    rng: PRNG key of the starts.
    loss_fn: (params, embeddings, y) -> (), hashable, such as the ``loss`` of a
      :class:`jaxattn.models.LeakageBlock`.
    params: its parameters, a pytree.
    leaked: the gradient, of the same structure.
    shape: of the embeddings: (n, d), or (B, n, d) if the loss takes a batch.
    y: what ``loss_fn`` takes: a class, or probabilities. None = one example,
      whose label is read by :func:`label_from_bias` if that gradient is seen;
      ``"dlg"`` searches for it instead.
    method: ``"gauss_newton"``, ``"dlg"`` (L-BFGS), ``"tag"`` (Adam with
      warm-up on the loss of that name) or ``"cosine"`` (Adam).
    num_starts: random starts, one after the other; the best is returned.
    mask_leaves: pytree of booleans like ``params``: True = the attacker sees
      this gradient; None = all.
    config: static options.

  Returns:
    An :class:`AttackResult`. A loss of 0 is the true input only if that is
    unique: see :func:`leak_report`. Without positions in the model it is unique
    up to the order of tokens. A loss that stays above 0 is a start that ended
    in a local minimum: take more.

  Raises:
    ValueError: if trees, shapes or options do not fit, or (where values are
      known) the gradient is not finite, or 0: "leaked gradient norm 0 is below
      1e-12". Fewer independent equations than unknowns only warn: up to 512
      unknowns the rank at a random start is counted, beyond that numbers.

  Cost:
    A step of Gauss-Newton: n d products of the Jacobian with a vector, and
    O(P (n d)^2 + (n d)^3) for P numbers in the gradient; with more than 512
    unknowns conjugate gradients instead, two products an iteration. A step of
    the others: one or, by a line search, a few gradients of the matching loss.

  Source:
    arXiv 2311.13624; methods as in this module's docstring, Gauss-Newton is
    this project's.

  Example:
    >>> import jax
    >>> from jaxattn.models import LeakageBlock
    >>> from jaxattn.regression import gradient_leakage
    >>> block = LeakageBlock(mlp=16, num_classes=4)
    >>> x = 0.5 * jax.random.normal(jax.random.key(0), (4, 8))
    >>> params = block.init(jax.random.key(1), x)["params"]
    >>> leaked = jax.grad(block.loss)(params, x, 2)
    >>> found = gradient_leakage.attack(
    ...   jax.random.key(2),
    ...   block.loss,
    ...   params,
    ...   leaked,
    ...   shape=(4, 8),
    ...   num_starts=4,
    ...   config=gradient_leakage.AttackConfig(init_scale=0.5),
    ... )
    >>> print(found.label, bool(abs(found.embeddings - x).max() < 1e-3))
    2 True
  """
  _checks.check_choice("method", method, _METHODS)
  _checks.check_integer("num_starts", num_starts, 1, None)
  _check_config(method, config)
  setup = _Setup(
    loss_fn, _shape(shape), _mask(params, mask_leaves), method, config
  )
  _check_leaked(params, leaked, setup)
  if y is None:
    _check_label_is_told(leaked, setup)
    bias = jnp.asarray(leaked[config.bias_key])
    told = jax.nn.one_hot(label_from_bias(bias), len(bias), dtype=bias.dtype)
    _warn_if_undetermined(rng, params, leaked, told, setup)
    y = None if method == "dlg" else told
  else:
    _warn_if_undetermined(rng, params, leaked, y, setup)
  return _attack(rng, params, leaked, y, setup=setup, num_starts=num_starts)


def problem(
  loss_fn: LossFn, shape: Sequence[int], *, mask_leaves: Any = None
) -> newton.Problem:
  r"""Gradient matching, for :func:`jaxattn.newton.minimize`.

  .. math:: \tfrac12 \|\nabla_\theta \ell(e, y) - G\|^2 / \|G\|^2

  What :func:`attack` does with ``method="gauss_newton"``, for loops, starts and
  solvers of one's own.

  Args:
    loss_fn: (params, embeddings, y) -> (), hashable.
    shape: of the embeddings, which are flat in the problem: (n, d), or
      (B, n, d).
    mask_leaves: as for :func:`attack`.

  Returns:
    A :class:`jaxattn.newton.Problem` of :class:`GradientLeakageData`; the same
    call gives the same object. Up to 512 unknowns its Gauss-Newton Hessian is a
    matrix, beyond that a product; the whole Hessian always is a product.

  Raises:
    ValueError: if ``shape`` is no shape, or the mask hides everything.

  Cost:
    O(1).

  Source:
    arXiv 2311.13624 for the question.

  Example:
    >>> import jax
    >>> from jaxattn import newton
    >>> from jaxattn.models import LeakageBlock
    >>> from jaxattn.regression import gradient_leakage
    >>> block = LeakageBlock(mlp=16, num_classes=4)
    >>> x = 0.5 * jax.random.normal(jax.random.key(0), (4, 8))
    >>> params = block.init(jax.random.key(1), x)["params"]
    >>> leaked = jax.grad(block.loss)(params, x, 2)
    >>> data = gradient_leakage.GradientLeakageData(params, leaked, 2)
    >>> found = newton.minimize(
    ...   gradient_leakage.problem(block.loss, x.shape),
    ...   (x + 0.1).reshape(-1),
    ...   data,
    ...   config=newton.NewtonConfig(curvature="gauss_newton"),
    ... )
    >>> bool(abs(found.x.reshape(4, 8) - x).max() < 1e-3)
    True
  """
  mask = None
  if mask_leaves is not None:
    mask = _checked_mask(mask_leaves)
  return _problem(loss_fn, _shape(shape), mask)


def leak_report(
  loss_fn: LossFn,
  params: Any,
  embeddings: jax.Array,
  y: Any,
  *,
  mask_leaves: Any = None,
) -> LeakReport:
  """Says whether a gradient determines the embeddings that it was taken at.

  Full rank of the Jacobian of the gradient in the embeddings means that no
  other embeddings nearby have the same gradient. The rank at random embeddings
  is the same almost surely: the report can be made before any training.

  Args:
    loss_fn: as for :func:`attack`.
    params: the parameters, a pytree.
    embeddings: (n, d), or (B, n, d).
    y: what ``loss_fn`` takes.
    mask_leaves: as for :func:`attack`.

  Returns:
    A :class:`LeakReport`. Ranks are numerical: singular values below 1e-10 of
    the largest, in single precision 1e-5, count as 0. Of ``w_q``, ``w_k``,
    ``w_v`` and ``pos`` it speaks if parameters are called so.

  Raises:
    ValueError: if the mask does not fit or hides everything.

  Cost:
    n d products of the Jacobian with a vector, and the singular values of an
    array (P, n d), for P numbers in the gradient.

  Source:
    derived here; arXiv 2311.13624 asks for such conditions.

  Example:
    >>> import jax
    >>> from jaxattn.models import LeakageBlock
    >>> from jaxattn.regression import leak_report
    >>> x = jax.random.normal(jax.random.key(0), (4, 8))
    >>> for pooling in ("mean", "cls"):
    ...   block = LeakageBlock(pooling=pooling, mlp=16)
    ...   params = block.init(jax.random.key(1), x)["params"]
    ...   print(leak_report(block.loss, params, x, 2).full_rank)
    True
    False
  """
  embeddings = jnp.asarray(embeddings)
  _checks.check_rank("embeddings", embeddings, (2, 3))
  _checks.check_floating("embeddings", embeddings)
  mask = _mask(params, mask_leaves)
  return _report(params, embeddings, y, loss_fn=loss_fn, mask=mask)


# --- the descents ---


class _Setup(NamedTuple):
  """What is static in an attack."""

  loss_fn: LossFn
  shape: tuple[int, ...]
  mask: tuple[bool, ...]
  method: str
  config: AttackConfig

  @property
  def max_steps(self) -> int:
    return self.config.max_steps or _MAX_STEPS[self.method]


class _End(NamedTuple):
  """Of one start."""

  x: jax.Array
  label: jax.Array
  loss: jax.Array
  num_steps: jax.Array
  log: jax.Array


@functools.partial(jax.jit, static_argnames=("setup", "num_starts"))
def _attack(
  rng: jax.Array,
  params: Any,
  leaked: Any,
  y: Any,
  *,
  setup: _Setup,
  num_starts: int,
) -> AttackResult:
  size = math.prod(setup.shape)
  dtype = jnp.result_type(*jax.tree.leaves(leaked))

  def one(rng: jax.Array) -> _End:
    draw = functools.partial(jax.random.normal, rng)
    if setup.method == "tag":
      draw = functools.partial(jax.random.truncated_normal, rng, -2.0, 2.0)
    x = setup.config.init_scale * draw((size,), dtype)
    if setup.method == "gauss_newton":
      data = GradientLeakageData(params, leaked, y)
      return _gauss_newton(x, data, setup)
    unknowns = {"x": x}
    if y is None:
      bias = leaked[setup.config.bias_key]
      label_rng = jax.random.fold_in(rng, 1)
      unknowns["logits"] = jax.random.normal(label_rng, bias.shape, bias.dtype)
    return _descend(unknowns, params, leaked, y, setup)

  ends = lax.map(one, jax.random.split(rng, num_starts))
  losses = jnp.where(jnp.isfinite(ends.loss), ends.loss, jnp.inf)
  best = losses.argmin()
  embeddings = ends.x[best].reshape(setup.shape)
  label = ends.label[best]
  return AttackResult(embeddings, label, losses, ends.num_steps, ends.log)


def _gauss_newton(
  x: jax.Array, data: GradientLeakageData, setup: _Setup
) -> _End:
  config = newton.NewtonConfig(
    max_steps=setup.max_steps,
    mu0=_MU0,
    curvature="gauss_newton",
    linear_solver="cholesky" if len(x) <= _DENSE else "cg",
  )
  solved = _problem(setup.loss_fn, setup.shape, setup.mask)
  found = newton.minimize(solved, x, data, config=config)
  label = _as_label(data.y)
  return _End(found.x, label, found.loss, found.num_steps, found.log.loss)


@functools.lru_cache(maxsize=64)
def _problem(
  loss_fn: LossFn, shape: tuple[int, ...], mask: tuple[bool, ...] | None
) -> newton.Problem:
  """Gradient matching; with its Jacobian formed if it is small."""

  def residual(x: jax.Array, data: GradientLeakageData) -> jax.Array:
    gradient = jax.grad(loss_fn)(data.params, x.reshape(shape), data.y)
    return _flat(_gaps(_seen(gradient, mask), _seen(data.leaked, mask)))

  def gauss_newton(
    x: jax.Array, data: GradientLeakageData
  ) -> newton.DenseCurvature:
    jacobian = jax.jacfwd(residual)(x, data)
    return newton.DenseCurvature(jacobian.T @ jacobian)

  matching = newton.least_squares_problem(residual)
  if math.prod(shape) > _DENSE:
    return matching
  return matching._replace(gauss_newton=gauss_newton)


def _descend(
  unknowns: dict[str, jax.Array],
  params: Any,
  leaked: Any,
  y: Any,
  setup: _Setup,
) -> _End:
  """L-BFGS or Adam; without a label this is one of the unknowns."""
  kind = "euclidean" if setup.method == "dlg" else setup.method
  matching = gradient_matching_loss(kind)
  target = _seen(leaked, setup.mask)

  def guess(unknowns: dict[str, jax.Array]) -> Any:
    return jax.nn.softmax(unknowns["logits"]) if y is None else y

  def objective(unknowns: dict[str, jax.Array]) -> jax.Array:
    embeddings = unknowns["x"].reshape(setup.shape)
    gradient = jax.grad(setup.loss_fn)(params, embeddings, guess(unknowns))
    return matching(_seen(gradient, setup.mask), target)

  best, loss, log = _minimize(objective, unknowns, setup)
  num_steps = jnp.full((), setup.max_steps, jnp.int32)
  return _End(best["x"], _as_label(guess(best)), loss, num_steps, log)


def _minimize(
  objective: Callable[[Any], jax.Array], unknowns: Any, setup: _Setup
) -> tuple[Any, jax.Array, jax.Array]:
  """The best unknowns that were seen, their loss, and all losses."""
  optimizer = optax.with_extra_args_support(_optimizer(setup))
  value_and_grad = jax.value_and_grad(objective)
  if setup.method == "dlg":
    # The line search knows value and gradient of where it ended.
    value_and_grad = optax.value_and_grad_from_state(objective)

  def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
    x, state, best, least = carry
    known = {"state": state} if setup.method == "dlg" else {}
    value, grad = value_and_grad(x, **known)
    value = jnp.asarray(value)
    updates, state = optimizer.update(
      grad, state, x, value=value, grad=grad, value_fn=objective
    )
    better = value < least
    best = jax.tree.map(lambda new, old: jnp.where(better, new, old), x, best)
    least = jnp.where(better, value, least)
    return (optax.apply_updates(x, updates), state, best, least), value

  infinite = jnp.full((), jnp.inf, unknowns["x"].dtype)
  carry = unknowns, optimizer.init(unknowns), unknowns, infinite
  (_, _, best, least), log = lax.scan(step, carry, length=setup.max_steps)
  return best, least, log


def _optimizer(setup: _Setup) -> optax.GradientTransformation:
  if setup.method == "dlg":
    return optax.lbfgs(memory_size=_HISTORY)
  rate = setup.config.learning_rate or _LEARNING_RATES[setup.method]
  if setup.method == "cosine":
    return optax.adam(rate)
  warmup = min(_TAG_WARMUP, setup.max_steps - 1)
  schedule = optax.warmup_constant_schedule(0.0, rate, warmup)
  return optax.chain(
    optax.clip_by_global_norm(_TAG_CLIP),
    optax.adam(
      optax.join_schedules(
        [schedule, optax.linear_schedule(rate, 0.0, setup.max_steps - warmup)],
        [warmup],
      )
    ),
  )


# --- the report ---


@functools.partial(jax.jit, static_argnames=("loss_fn", "mask"))
def _report(
  params: Any,
  embeddings: jax.Array,
  y: Any,
  *,
  loss_fn: LossFn,
  mask: tuple[bool, ...],
) -> LeakReport:
  jacobian, gradient = _jacobian(params, embeddings, y, loss_fn, mask)
  equations, unknowns = jacobian.shape
  values = jnp.linalg.svd(jacobian, compute_uv=False)
  rank = closed_form.numerical_rank(values)
  # With fewer equations than unknowns the rest of the values is 0.
  least = values[-1] if equations >= unknowns else jnp.zeros_like(values[-1])
  unseen = jnp.array(-1)
  named = _named(gradient, mask)
  keys = closed_form.ATTENTION_KEYS
  has_span = all(k in named for k in keys)
  return LeakReport(
    equations=jnp.array(equations),
    unknowns=jnp.array(unknowns),
    rank=rank,
    condition=values[0] / least,
    full_rank=rank == unknowns,
    pos_rank=_rank(named["pos"]) if "pos" in named else unseen,
    span_rank=_rank(closed_form.stack_columns(named, keys))
    if has_span
    else unseen,
  )


@functools.partial(jax.jit, static_argnames=("loss_fn", "mask"))
def _num_independent(
  params: Any,
  embeddings: jax.Array,
  y: Any,
  *,
  loss_fn: LossFn,
  mask: tuple[bool, ...],
) -> jax.Array:
  """The rank of the report, for half of its time where that is full.

  If J^T J less a multiple of the identity beyond all rounding is positive
  definite, no singular value is near 0. Otherwise singular values decide.
  """
  jacobian, _ = _jacobian(params, embeddings, y, loss_fn, mask)
  equations, unknowns = jacobian.shape
  gram = jacobian.T @ jacobian
  room = 4 * equations * float(jnp.finfo(gram.dtype).eps) * jnp.trace(gram)
  shifted = gram - room * jnp.eye(unknowns, dtype=gram.dtype)
  is_full = jnp.isfinite(jnp.linalg.cholesky(shifted)).all()
  return lax.cond(is_full, lambda: jnp.array(unknowns), lambda: _rank(jacobian))


def _jacobian(
  params: Any,
  embeddings: jax.Array,
  y: Any,
  loss_fn: LossFn,
  mask: tuple[bool, ...],
) -> tuple[jax.Array, Any]:
  """Of the gradient that is seen, in the embeddings; the whole gradient."""

  def seen(x: jax.Array) -> tuple[jax.Array, Any]:
    gradient = jax.grad(loss_fn)(params, x.reshape(embeddings.shape), y)
    return _flat(_seen(gradient, mask)), gradient

  return jax.jacfwd(seen, has_aux=True)(embeddings.reshape(-1))


def _rank(matrix: jax.Array) -> jax.Array:
  return closed_form.numerical_rank(jnp.linalg.svd(matrix, compute_uv=False))


def _named(gradient: Any, mask: tuple[bool, ...]) -> dict[str, jax.Array]:
  """The leaves that are seen, if the parameters are a flat dict."""
  if not isinstance(gradient, dict):
    return {}
  seen = jax.tree.unflatten(jax.tree.structure(gradient), mask)
  return {k: x for k, x in gradient.items() if seen[k] is True}


# --- trees ---


def _seen(tree: Any, mask: tuple[bool, ...] | None) -> list[jax.Array]:
  if mask is None:
    return _leaves(tree)
  seen = jax.tree.unflatten(jax.tree.structure(tree), mask)
  return [x for x, s in zip(_leaves(tree), _leaves(seen), strict=True) if s]


def _leaves(tree: Any) -> list[Any]:
  """Those of a block from its input to its output, then all others."""
  if not isinstance(tree, dict):
    return jax.tree.leaves(tree)
  known = [k for k in _FORWARD if k in tree]
  rest = {k: x for k, x in tree.items() if k not in known}
  return jax.tree.leaves([[tree[k] for k in known], rest])


def _gaps(gradient: Any, leaked: Any) -> Any:
  size = _norm(leaked)
  return jax.tree.map(lambda g, w: (g - w) / size, gradient, leaked)


def _dot(a: Any, b: Any) -> jax.Array:
  products = jax.tree.map(lambda x, y: (x * y).sum(), a, b)
  return jnp.asarray(sum(jax.tree.leaves(products)))


def _norm(tree: Any) -> jax.Array:
  return jnp.sqrt(_dot(tree, tree))


def _flat(leaves: Sequence[jax.Array]) -> jax.Array:
  return jnp.concatenate([x.reshape(-1) for x in leaves])


def _as_label(y: Any) -> jax.Array:
  """The class: y itself if it is one, otherwise the most probable."""
  y = jnp.asarray(y)
  return y if jnp.issubdtype(y.dtype, jnp.integer) else y.argmax(-1)


# --- checks ---


def _shape(shape: Sequence[int]) -> tuple[int, ...]:
  shape = tuple(shape)
  if len(shape) not in (2, 3):
    raise ValueError(f"shape must be (n, d) or (B, n, d), got {shape}")
  for size in shape:
    _checks.check_integer("shape", size, 1, None)
  return shape


def _mask(params: Any, mask_leaves: Any) -> tuple[bool, ...]:
  if mask_leaves is None:
    return (True,) * len(jax.tree.leaves(params))
  if jax.tree.structure(mask_leaves) != jax.tree.structure(params):
    raise ValueError(
      "mask_leaves must have the same tree structure as params, got "
      f"{jax.tree.structure(mask_leaves)}"
    )
  return _checked_mask(mask_leaves)


def _checked_mask(mask_leaves: Any) -> tuple[bool, ...]:
  mask = tuple(jax.tree.leaves(mask_leaves))
  for seen in mask:
    _checks.check_choice("mask_leaves", seen, (False, True))
  if not any(mask):
    raise ValueError("mask_leaves must leave a gradient to see, got all False")
  return mask


def _check_config(method: str, config: AttackConfig) -> None:
  if config.max_steps is not None:
    _checks.check_integer("max_steps", config.max_steps, 1, None)
  _checks.check_positive("init_scale", config.init_scale)
  if config.learning_rate is None:
    return
  _checks.check_positive("learning_rate", config.learning_rate)
  if method not in _LEARNING_RATES:
    raise ValueError(
      f"learning_rate must be None with method={method!r}, got "
      f"{config.learning_rate}"
    )


def _check_leaked(params: Any, leaked: Any, setup: _Setup) -> None:
  if jax.tree.structure(leaked) != jax.tree.structure(params):
    raise ValueError(
      "leaked must have the same tree structure as params, got "
      f"{jax.tree.structure(leaked)}"
    )
  for x, g in zip(jax.tree.leaves(params), jax.tree.leaves(leaked)):
    _checks.check_shape("leaked", g, jnp.shape(x), "that of params")
    _checks.check_floating("leaked", g)
  seen = _seen(leaked, setup.mask)
  if not all(map(_checks.is_concrete, seen)):
    return
  norm = float(_norm(seen))
  if not math.isfinite(norm):
    raise ValueError("leaked contains non-finite values")
  if norm < _LEAST_NORM:
    raise ValueError(
      f"leaked gradient norm {norm:.3g} is below {_LEAST_NORM:g}"
    )


def _warn_if_undetermined(
  rng: jax.Array, params: Any, leaked: Any, y: Any, setup: _Setup
) -> None:
  """Warns where other embeddings have the same gradient."""
  equations = sum(x.size for x in _seen(leaked, setup.mask))
  unknowns = math.prod(setup.shape)
  kind = "equations"
  is_known = all(map(_checks.is_concrete, jax.tree.leaves((rng, params, y))))
  if is_known and equations >= unknowns and unknowns <= _DENSE:
    dtype = jnp.result_type(*jax.tree.leaves(leaked))
    x = setup.config.init_scale * jax.random.normal(rng, setup.shape, dtype)
    rank = _num_independent(
      params, x, y, loss_fn=setup.loss_fn, mask=setup.mask
    )
    equations, kind = int(rank), "independent equations"
  if equations < unknowns:
    warnings.warn(
      f"under-determined: {unknowns} unknowns, {equations} {kind}", stacklevel=3
    )


def _check_label_is_told(leaked: Any, setup: _Setup) -> None:
  if len(setup.shape) == 3:
    raise ValueError("y is required for a batch: its gradients tell no label")
  key = setup.config.bias_key
  if not isinstance(leaked, dict) or key not in leaked:
    raise ValueError(
      f"y is required: leaked has no gradient {key!r} to read the label from"
    )
  if setup.method != "dlg" and key not in _named(leaked, setup.mask):
    raise ValueError(
      f"y is required: mask_leaves hides {key!r}, which tells the label"
    )
