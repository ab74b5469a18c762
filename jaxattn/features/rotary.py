r"""Rotary position embedding: positions as rotations of queries and keys.

With :math:`\theta_h = b^{-2h/H}` position t turns the pair h of a vector by the
angle :math:`t \theta_h`; call that map :math:`R_t`. Then
:math:`\langle R_t q, R_s k \rangle = q^\top R_{s-t} k` depends on s - t only.
Source: arXiv 2411.07602 for the definition in attention, after RoFormer
(arXiv 2104.09864).

That property is lost at long context if the angle is a float32 product: at
t = 10^6 such an angle is off by 0.03. Here angles are *turns in fixed point*:
:math:`t \theta_h / 2 \pi` is multiplied out in integers, where whole turns
overflow and vanish, so that they are exact to the last bit of the result.
"""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxattn import _checks
from jaxattn.numerics._dtypes import accumulator

# 50 digits: more than 64 bits of the turn below depend on.
_TAU = Fraction("6.2831853071795864769252867665590057683943387987502")


def rope_angles(
  positions: jax.Array, head_dim: int, *, base: float = 10000.0
) -> jax.Array:
  r"""Angles of rotary position embedding, reduced to one turn.

  .. math:: t\, b^{-2h/H} \bmod 2\pi \in [-\pi, \pi), \qquad 0 \le h < H/2

  Args:
    positions: integers of any shape, negative ones too; at most 32 bits count
      while x64 is off.
    head_dim: H, even.
    base: b > 1, a static number.

  Returns:
    (..., H / 2) angles, float32, or float64 under x64; off by the rounding of
    the result alone, however large the position.

  Raises:
    ValueError: if ``positions`` are no integers, ``head_dim`` is odd or
      ``base`` not above 1.

  Cost:
    A few integer products an angle.

  Source:
    arXiv 2104.09864, section 3.2; the reduction in fixed point is this
    project's.

  Example:
    >>> import jax.numpy as jnp
    >>> angles = rope_angles(jnp.array([0, 1, 10]), 4, base=100.0)
    >>> print(np.asarray(angles, float).round(3))  # the last: 10 - 4 pi
    [[ 0.     0.   ]
     [ 1.     0.1  ]
     [-2.566  1.   ]]
  """
  positions = jnp.asarray(positions)
  if not jnp.issubdtype(positions.dtype, jnp.integer):
    raise ValueError(f"positions must be integers, got {positions.dtype}")
  _check_options(head_dim, base)
  return _angles(positions, head_dim, float(base))


def rope(
  x: jax.Array,
  positions: jax.Array,
  *,
  base: float = 10000.0,
  interleaved: bool = True,
) -> jax.Array:
  r"""Rotates queries or keys by their positions.

  .. math::

    (x_{2h}, x_{2h+1}) \mapsto (x_{2h} \cos t\theta_h - x_{2h+1} \sin t\theta_h,
    \; x_{2h} \sin t\theta_h + x_{2h+1} \cos t\theta_h)

  Differentiable in ``x``. Scores of rotated vectors depend on the difference
  of positions only, to rounding, at any context length.

  Args:
    x: (B, T, N, H), or (T, N, H) without a batch; floating, H even.
    positions: (T,), or (B, T), integers.
    base: b > 1 of the angles t b^(-2h/H), a static number.
    interleaved: pairs are neighbors, as above. False pairs h with h + H / 2.
      The two are different maps: weights trained for one need a permutation of
      columns for the other.

  Returns:
    The shape and dtype of ``x``; computed in float32 for 16-bit inputs.

  Raises:
    ValueError: if shapes or dtypes do not fit, H is odd, or ``base`` is not
      above 1.

  Cost:
    Two products an entry and a cosine and a sine for each pair of a position;
    memory of ``x``.

  Source:
    arXiv 2104.09864, equation 34; arXiv 2411.07602, definition 3.6.

  Example:
    >>> import jax.numpy as jnp
    >>> x = jnp.ones((3, 1, 2))
    >>> print(np.asarray(rope(x, jnp.arange(3))[:, 0], float).round(3))
    [[ 1.     1.   ]
     [-0.301  1.382]
     [-1.325  0.493]]
  """
  x, positions = jnp.asarray(x), jnp.asarray(positions)
  _checks.check_rank("x", x, (3, 4))
  _checks.check_floating("x", x)
  _checks.check_choice("interleaved", interleaved, (False, True))
  if positions.ndim != x.ndim - 2:
    _checks.check_shape("positions", positions, x.shape[-3:-2], "(T,)")
  else:
    _checks.check_shape("positions", positions, x.shape[:-2], "(B, T)")
  angles = rope_angles(positions, x.shape[-1], base=base)
  if angles.ndim < x.ndim - 1:
    angles = angles[None]
  return _rotate(x, angles, interleaved)


def _check_options(head_dim: int, base: float) -> None:
  _checks.check_integer("head_dim", head_dim, 2, None)
  if head_dim % 2:
    raise ValueError(f"head_dim must be even, got {head_dim}")
  _checks.check_scalar("base", base)
  if not _checks.is_concrete(base) or not 1 < float(base) < math.inf:
    raise ValueError(f"base must be a static finite number > 1, got {base}")


@functools.partial(jax.jit, static_argnums=2)
def _rotate(x: jax.Array, angles: jax.Array, interleaved: bool) -> jax.Array:
  dtype = accumulator(x.dtype)
  axis, pairs = (-1, (-1, 2)) if interleaved else (-2, (2, -1))
  # The barrier keeps them from being computed again for each head.
  cos, sin = lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))
  cos, sin = (
    jnp.stack(y, axis).reshape(*angles.shape[:-1], 1, x.shape[-1])
    for y in ((cos, cos), (-sin, sin))
  )
  y = x.astype(dtype)
  other = jnp.flip(y.reshape(*x.shape[:-1], *pairs), axis).reshape(x.shape)
  return (y * cos.astype(dtype) + other * sin.astype(dtype)).astype(x.dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _angles(positions: jax.Array, head_dim: int, base: float) -> jax.Array:
  turns = _turns_per_position(head_dim, base)
  if jnp.result_type(float) == jnp.float64:  # x64 is on
    phase = positions[..., None].astype(jnp.uint64) * _row(turns, positions)
    signed, bits = lax.bitcast_convert_type(phase, jnp.int64), 64
    angles = signed.astype(jnp.float64)
  else:
    phase = _phase_of_32_bits(positions.astype(jnp.int32)[..., None], turns)
    signed, bits = lax.bitcast_convert_type(phase, jnp.int32), 32
    angles = signed.astype(jnp.float32)
  return angles * (2 * math.pi / 2.0**bits)


def _phase_of_32_bits(positions: jax.Array, turns: np.ndarray) -> jax.Array:
  """Upper half of positions * turns mod 2^64, in words of 32 bits."""
  high = _row((turns >> np.uint64(32)).astype(np.uint32), positions[..., 0])
  low = turns.astype(np.uint32)
  b1, b0 = (_row(w, positions[..., 0]) for w in (low >> 16, low & 0xFFFF))
  p = lax.bitcast_convert_type(positions, jnp.uint32)
  a1, a0 = p >> 16, p & 0xFFFF
  middle = a1 * b0 + (a0 * b0 >> 16)
  carried = (a0 * b1 + (middle & 0xFFFF)) >> 16
  product_high = a1 * b1 + (middle >> 16) + carried
  # As an unsigned word a negative position is too large by 2^32.
  excess = jnp.where(positions < 0, (b1 << 16) | b0, jnp.uint32(0))
  return p * high + product_high - excess


def _row(x: np.ndarray, like: jax.Array) -> jax.Array:
  return jnp.asarray(x).reshape((1,) * like.ndim + x.shape)


@functools.lru_cache(maxsize=64)
def _turns_per_position(head_dim: int, base: float) -> np.ndarray:
  """(H / 2,) uint64: by how much of a turn, times 2^64, one position turns."""
  theta = base ** (-np.arange(0, head_dim, 2) / head_dim)
  turns = [round(Fraction(float(t)) / _TAU * 2**64) for t in theta]
  return np.array(turns, np.uint64)
