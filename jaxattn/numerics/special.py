r"""Special functions that JAX does not have.

Lambert's W solves :math:`w e^w = x`. It has two real branches: W_0 on
:math:`[-1/e, \infty)` with values from -1 up, and W_{-1} on :math:`[-1/e, 0)`
with values from -1 down.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxattn import _checks

_HALLEY_STEPS = 8
# Below this the expansion around -1/e starts closer than that around 0-.
_NEAR_BRANCH_POINT = -0.25


def lambertw(x: Any, branch: int = 0) -> jax.Array:
  r"""Lambert's W function on the reals: solves w e^w = x.

  Halley's method on :math:`w - x e^{-w}`, which does not overflow,

  .. math:: w \leftarrow w - \frac{r}{(w + 1) - \frac{(w + 2) r}{2 (w + 1)}},
    \qquad r = w - x e^{-w},

  from the expansion at the nearest singularity. Differentiable by
  :math:`W' = e^{-W} / (1 + W)`.

  Args:
    x: floating, any shape, or a number.
    branch: 0, W >= -1, or -1, W <= -1.

  Returns:
    W(x) of the shape and dtype of ``x``, to a few units of rounding, except
    that next to -1/e an error of one unit in x is that of its square root in
    W. NaN outside of [-1/e, inf), for branch -1 outside of [-1/e, 0).

  Raises:
    ValueError: if ``branch`` is another one or ``x`` not floating.

  Cost:
    Eight steps, each with one exponential.

  Source:
    Corless et al., On the Lambert W function, 1996, section 5.

  Example:
    >>> print(f"{lambertw(1.0):.4f} {lambertw(-0.2, -1):.4f}")
    0.5671 -2.5426
  """
  _checks.check_choice("branch", branch, (0, -1))
  x = jnp.asarray(x)
  _checks.check_floating("x", x)
  return _lambertw(x, branch)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
@functools.partial(jax.jit, static_argnums=1)
def _lambertw(x: jax.Array, branch: int) -> jax.Array:
  eps = float(jnp.finfo(x.dtype).eps)
  above = math.e * x + 1
  # The closest float to -1/e may lie on either side of it.
  inside = above >= -4 * eps
  inside &= (x < 0) if branch else (x < jnp.inf)
  p = jnp.sqrt(2 * jnp.maximum(above, 0))
  series = _series(-p if branch else p)
  if branch:
    far = _logarithmic(-jnp.where(inside, x, -0.1))
    w = jnp.where(x < _NEAR_BRANCH_POINT, series, far)
  else:
    log = jnp.log1p(jnp.where(inside & (x > 0), x, 0))
    far = log * (1 - jnp.log1p(log) / (2 + log))
    w = jnp.where(x < 0, series, far)
  y = jnp.where(inside, x, 0)

  def step(_: Any, w: jax.Array) -> jax.Array:
    # In two factors: e^-w alone overflows where x is tiny and W large.
    half = jnp.exp(-w / 2)
    r = w - half * (y * half)
    slope = w + 1
    safe = jnp.where(slope == 0, 1, slope)
    divisor = safe - (w + 2) * r / (2 * safe)
    return jnp.where((slope == 0) | (divisor == 0), w, w - r / divisor)

  w = jax.lax.fori_loop(0, _HALLEY_STEPS, step, w)
  if branch:
    return jnp.where(inside, w, jnp.nan)
  return jnp.where(inside, w, jnp.where(x == jnp.inf, x, jnp.nan))


@_lambertw.defjvp
def _lambertw_jvp(
  branch: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
  w = _lambertw(primals[0], branch)
  return w, tangents[0] * jnp.exp(-w) / (1 + w)


def _series(p: jax.Array) -> jax.Array:
  """Around -1/e, in p = sqrt(2 (e x + 1)), of either sign."""
  return -1 + p * (1 + p * (-1 / 3 + p * (11 / 72 - p * 43 / 540)))


def _logarithmic(x: jax.Array) -> jax.Array:
  """W_{-1}(-x) for small x > 0."""
  first = jnp.log(x)
  second = jnp.log(-first)
  return first - second + second / first
