"""Signs with gradients that pass straight through."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks

_BACKWARD = ("identity", "clip")
_SCALES = ("none", "absmean", "std")


def sign_ste(w: jax.Array, *, backward: str = "identity") -> jax.Array:
  r"""Signs, with a gradient that passes straight through.

  Exactly +1 and -1 in every dtype; sign_ste(0) = 1, and NaN stays NaN. Reverse
  mode only.

  Args:
    w: floating, of any shape.
    backward: derivative that is claimed: 1 (``"identity"``), or 1 where
      \|w\| <= 1 and 0 elsewhere (``"clip"``).

  Returns:
    Signs, of the shape and dtype of ``w``.

  Raises:
    ValueError: if ``w`` is not floating or ``backward`` is unknown.

  Cost:
    O(1) an entry.

  Source:
    arXiv 1308.3432 (straight-through estimators).

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.ntk import sign_ste
    >>> w = jnp.array([-2.0, 0.0, 0.5])
    >>> print(sign_ste(w), jax.grad(lambda w: sign_ste(w).sum())(w))
    [-1.  1.  1.] [1. 1. 1.]
  """
  w = jnp.asarray(w)
  _checks.check_floating("w", w)
  _checks.check_choice("backward", backward, _BACKWARD)
  return _sign(w, backward == "clip")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sign(w: jax.Array, clip: bool) -> jax.Array:
  # What is no number stays none.
  return jnp.where(w >= 0, 1, jnp.where(w < 0, -1, w)).astype(w.dtype)


def _sign_forward(w: jax.Array, clip: bool) -> tuple[jax.Array, Any]:
  return _sign(w, clip), jnp.abs(w) <= 1 if clip else None


def _sign_backward(clip: bool, inside: Any, grad: jax.Array) -> tuple:
  return (jnp.where(inside, grad, 0) if clip else grad,)


_sign.defvjp(_sign_forward, _sign_backward)


def quantize_rows(
  w: jax.Array, *, center: bool = False, scale: str = "none"
) -> tuple[jax.Array, jax.Array, jax.Array]:
  r"""Signs of rows, as layers of 1-bit language models have them.

  Gradients pass to ``w`` through the signs alone, as by :func:`sign_ste`; scale
  and shift count as constants. For a user's own layers: the network of this
  package has plain signs.

  Args:
    w: (m, d), floating.
    center: whether the mean of a row is taken off first.
    scale: ``"none"`` (1), ``"absmean"``, the mean of \|w\| of a row before
      its mean is taken off, or ``"std"``, its standard deviation.

  Returns:
    Signs (m, d), scales (m,) and shifts (m,); scale times signs stands for the
    row less its shift.

  Raises:
    ValueError: if ``w`` is not a floating matrix or ``scale`` is unknown.

  Cost:
    O(m d).

  Source:
    arXiv 2310.11453, section 2.1 (its scale is one for all rows).

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.ntk import quantize_rows
    >>> q, size, shift = quantize_rows(
    ...   jnp.array([[1.0, 2.0, 6.0]]), center=True, scale="absmean"
    ... )
    >>> print(q, size, shift)
    [[-1. -1.  1.]] [3.] [3.]
  """
  w = jnp.asarray(w)
  _checks.check_floating("w", w)
  _checks.check_rank("w", w, 2)
  _checks.check_choice("scale", scale, _SCALES)
  fixed = lax.stop_gradient(w)
  shift = fixed.mean(1) if center else jnp.zeros_like(fixed[:, 0])
  sizes = {
    "none": jnp.ones_like(shift),
    "absmean": jnp.abs(fixed).mean(1),
    "std": fixed.std(1),
  }
  return sign_ste(w - shift[:, None]), sizes[scale], shift
