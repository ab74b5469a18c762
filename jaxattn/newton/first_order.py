r"""First-order methods, for problems whose Hessian is out of reach.

.. math:: x_{k+1} = \Pi\big( y_k - \eta\, \nabla f(y_k) \big)

with a projection :math:`\Pi`; y is x itself for gradient descent, and x moved
on by its momentum for Nesterov's method (FISTA).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial

from jaxattn import _checks

__all__ = ["FirstOrderLog", "FirstOrderResult", "fista", "gradient_descent"]

_ARMIJO = 1e-4
_MAX_HALVINGS = 60


class FirstOrderLog(NamedTuple):
  """What happened, step by step.

  Attributes:
    loss: (num_steps,), where the gradient was taken.
    grad_norm: (num_steps,), length of the step over its size: the norm of the
      gradient, but for what a projection takes away.
    step_size: (num_steps,); 0 = no step lowered the loss.
  """

  loss: jax.Array
  grad_norm: jax.Array
  step_size: jax.Array


class FirstOrderResult(NamedTuple):
  """The end of :func:`fista` and :func:`gradient_descent`.

  Attributes:
    x: the last point, shaped as the start.
    loss: (), there.
    grad: the gradient there, shaped as x.
    log: a :class:`FirstOrderLog`.
  """

  x: jax.Array
  loss: jax.Array
  grad: jax.Array
  log: FirstOrderLog


def fista(
  value_and_grad: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
  x0: jax.Array,
  *,
  step_size: float | jax.Array,
  num_steps: int,
  momentum: bool = True,
  projection: Callable[[jax.Array], jax.Array] | None = None,
) -> FirstOrderResult:
  r"""Projected gradient descent with Nesterov's momentum.

  .. math::

    x_{k+1} = \Pi\big( y_k - \eta\, \nabla f(y_k) \big), \qquad
    y_{k+1} = x_{k+1} + \frac{t_k - 1}{t_{k+1}} (x_{k+1} - x_k), \\
    t_{k+1} = \tfrac12 \big( 1 + \sqrt{1 + 4 t_k^2} \big), \quad t_0 = 1

  For a convex f whose gradient is L-Lipschitz and :math:`\eta \le 1 / L`,
  :math:`f(x_k) - f^* \le 2 \|x_0 - x^*\|^2 / (\eta (k + 1)^2)`. Losses may rise
  on the way.

  Args:
    value_and_grad: x -> (loss, gradient). It is compiled once for one object:
      bind data with ``jax.tree_util.Partial``, which compiles once for all data
      of the same shapes.
    x0: the start, floating, of any shape.
    step_size: eta, positive.
    num_steps: of them, all of which are taken.
    momentum: False = plain projected gradient descent, :math:`y = x`.
    projection: onto a convex set, x -> x; None = none.

  Returns:
    A :class:`FirstOrderResult`.

  Raises:
    ValueError: if ``x0`` is not floating, ``step_size`` not positive, or
      ``num_steps`` < 1.

  Cost:
    num_steps + 1 gradients.

  Source:
    Beck and Teboulle, SIAM J. Imaging Sciences 2 (2009).

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn import newton
    >>> f = jax.value_and_grad(lambda x: ((x - 3) ** 2).sum())
    >>> found = newton.fista(
    ...   f, jnp.zeros(2), step_size=0.5, num_steps=5,
    ...   projection=lambda x: jnp.clip(x, 0, 2)
    ... )
    >>> print(found.x)
    [2. 2.]
  """
  x0 = _checked(x0, step_size, num_steps)
  _checks.check_choice("momentum", momentum, (False, True))
  step_size = jnp.asarray(step_size, x0.dtype)
  calls = _as_pytree(value_and_grad), _as_pytree(projection or _identity)
  return _fista(*calls, x0, step_size, num_steps, momentum)


def gradient_descent(
  value_and_grad: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
  x0: jax.Array,
  *,
  step_size: float | jax.Array,
  num_steps: int,
  backtracking: bool = False,
  projection: Callable[[jax.Array], jax.Array] | None = None,
) -> FirstOrderResult:
  r"""Projected gradient descent, with a line search if asked for.

  With ``backtracking`` a step is halved until

  .. math:: f(x_{k+1}) \le f(x_k) - \frac{10^{-4}}{\eta} \|x_{k+1} - x_k\|^2

  and the next one starts from twice its size: no loss in the log is above the
  one before, but for rounding. Points where the loss is infinite or NaN are
  never entered: that is how a domain is respected.

  Args:
    value_and_grad: x -> (loss, gradient), as for :func:`fista`.
    x0: the start, floating, of any shape.
    step_size: eta, positive; with ``backtracking`` the first one tried.
    num_steps: of them, all of which are taken.
    backtracking: whether to search.
    projection: onto a convex set, x -> x; None = none.

  Returns:
    A :class:`FirstOrderResult`.

  Raises:
    ValueError: if ``x0`` is not floating, ``step_size`` not positive, or
      ``num_steps`` < 1.

  Cost:
    num_steps + 1 gradients; with ``backtracking`` one for each halving more,
    about two a step.

  Source:
    standard; Armijo's condition, for projected steps as Bertsekas states it.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn import newton
    >>> f = jax.value_and_grad(lambda x: x[0] - jnp.log(x[0]))
    >>> found = newton.gradient_descent(
    ...   f, jnp.array([0.1]), step_size=1.0, num_steps=30, backtracking=True
    ... )
    >>> print(found.x.round(2))
    [1.]
  """
  x0 = _checked(x0, step_size, num_steps)
  _checks.check_choice("backtracking", backtracking, (False, True))
  step_size = jnp.asarray(step_size, x0.dtype)
  calls = _as_pytree(value_and_grad), _as_pytree(projection or _identity)
  if backtracking:
    return _descent(*calls, x0, step_size, num_steps)
  return _fista(*calls, x0, step_size, num_steps, False)


def _checked(x0: Any, step_size: Any, num_steps: int) -> jax.Array:
  x0 = jnp.asarray(x0)
  _checks.check_floating("x0", x0)
  _checks.check_positive("step_size", step_size)
  _checks.check_integer("num_steps", num_steps, 1, None)
  return x0


def _as_pytree(call: Callable[..., Any]) -> Partial:
  # A Partial of a Partial would not equal the next one.
  return call if isinstance(call, Partial) else Partial(call)


def _identity(x: jax.Array) -> jax.Array:
  return x


@functools.partial(jax.jit, static_argnums=(4, 5))
def _fista(
  value_and_grad: Partial,
  projection: Partial,
  x0: jax.Array,
  step_size: jax.Array,
  num_steps: int,
  momentum: bool,
) -> FirstOrderResult:
  def one(carry: tuple[jax.Array, ...], _: None) -> Any:
    x, y, t = carry
    loss, grad = value_and_grad(y)
    new = projection(y - step_size * grad)
    norm = jnp.linalg.norm((y - new).reshape(-1)) / step_size
    next_t = (1 + jnp.sqrt(1 + 4 * t**2)) / 2
    pull = (t - 1) / next_t if momentum else jnp.zeros_like(t)
    log = FirstOrderLog(loss.astype(x.dtype), norm, step_size)
    return (new, new + pull * (new - x), next_t), log

  start = x0, x0, jnp.ones((), x0.dtype)
  (x, _, _), log = lax.scan(one, start, length=num_steps)
  loss, grad = value_and_grad(x)
  return FirstOrderResult(x, loss, grad, log)


@functools.partial(jax.jit, static_argnums=4)
def _descent(
  value_and_grad: Partial,
  projection: Partial,
  x0: jax.Array,
  step_size: jax.Array,
  num_steps: int,
) -> FirstOrderResult:
  def one(carry: tuple[jax.Array, ...], _: None) -> Any:
    x, loss, grad, start = carry
    rounding = 2 * jnp.finfo(loss.dtype).eps * jnp.abs(loss)

    def attempt(size: jax.Array) -> tuple[jax.Array, ...]:
      new = projection(x - size * grad)
      new_loss, new_grad = value_and_grad(new)
      fall = _ARMIJO / size * ((new - x) ** 2).sum() - rounding
      # A step that is lost in rounding lowers nothing, nor do shorter ones.
      moved = (new != x).any()
      passed = moved & (new_loss <= loss - fall)
      return new, new_loss, new_grad, size, moved, passed

    def again(carry: tuple[Any, jax.Array]) -> jax.Array:
      (*_, moved, passed), num = carry
      return moved & ~passed & (num < _MAX_HALVINGS)

    def halve(carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
      tried, num = carry
      return attempt(tried[3] / 2), num + 1

    first = attempt(start), jnp.zeros((), jnp.int32)
    new, *values, size, _, passed = lax.while_loop(again, halve, first)[0]
    # Of a search that failed the first step says most: the last may be 0.
    side = jnp.where(passed, (x - new) / size, (x - first[0][0]) / start)
    norm = jnp.linalg.norm(side.reshape(-1))
    taken = jnp.where(passed, size, 0)
    log = FirstOrderLog(loss, norm, taken)
    state = jax.tree.map(
      lambda y, z: jnp.where(passed, y, z), (new, *values), (x, loss, grad)
    )
    return (*state, jnp.where(passed, 2 * size, start)), log

  start = x0, *value_and_grad(x0), step_size
  (x, loss, grad, _), log = lax.scan(one, start, length=num_steps)
  return FirstOrderResult(x, loss, grad, log)
