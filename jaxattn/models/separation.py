r"""A fixed network that softmax attention makes separate what linear cannot.

On a matrix A of n tokens with row sums :math:`\rho_i`
(:func:`jaxattn.data.separation_dataset`) and the weights
:math:`Q K^\top = X = 1_{d \times d}`, :math:`V = Y = I` of arXiv 2310.11685 the
scores are :math:`S_{ij} = \rho_i \rho_j`, without any scale, and

.. math::

  F(A) = \sum_i \sum_l \phi_\tau(\langle c_i, w_l \rangle), \qquad
  c = f(S) A, \qquad \tau = (c + 0.1) L, \quad L = \sqrt{\ln n},

with :math:`\phi_\tau(z) = \max(z - \tau, 0)`, m neurons of random signs w, and
f the softmax of rows or, for linear attention, :math:`S_{ij} / \sum_j S_{ij}`.
A matrix is put in the second set if :math:`F > 0`.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from scipy import optimize, special

from jaxattn import _checks
from jaxattn.numerics._dtypes import accumulator

_ATTENTIONS = ("softmax", "linear")
# In units of L: an excess below this many roundings is a tie, and ties are
# common, because sums of signs are integers.
_TIE = 1024


class _Call(NamedTuple):
  """One evaluation; ``keys`` (B, n, d), ``queries`` (B, t, d)."""

  keys: jax.Array
  queries: jax.Array
  values: jax.Array
  signs: jax.Array
  tau: jax.Array


def separation_network(
  a: jax.Array,
  signs: jax.Array,
  *,
  b: float | jax.Array,
  attention: str = "softmax",
  query: jax.Array | None = None,
  x: jax.Array | None = None,
  y: jax.Array | None = None,
  margin: float | jax.Array = 0.1,
) -> jax.Array:
  r"""Evaluates the two-layer network on top of softmax or linear attention.

  Without ``x`` the scores are products of row sums, and what a query gets
  depends on its row sum alone. The data sets have two different row sums, so
  two rows of attention are all that there is: linear time instead of quadratic.
  A matrix whose rows have more than two sums gives NaN. With ``x`` all scores
  are computed.

  Args:
    a: (B, n, d) matrices.
    signs: (m, d) signs of the neurons, 1 or -1.
    b: of the data set, in [0.1, 0.9]: c = 1 - b is in the threshold.
    attention: "softmax" or "linear". A row of linear attention whose scores sum
      to 0 is 0.
    query: (B, t, d) matrices whose rows ask, for cross-attention; None = ``a``.
    x: (d, d), query times key weights; None = all ones, evaluated fast.
    y: (d, d), value weights; None = identity.
    margin: the threshold is (c + margin) L.

  Returns:
    F, (B,) of the dtype of ``a``; exactly 0 where no neuron is above its
    threshold by more than rounding. 16-bit matrices are evaluated in float32.

  Raises:
    ValueError: if shapes do not fit, ``attention`` is unknown or ``b`` is out
      of range.

  Cost:
    O(B (n d + m d)) without ``x``; O(B (n^2 d + n m d)) time and O(B n^2)
    memory with it.

  Source:
    arXiv 2310.11685, as reconstructed from abstract and introduction; the fast
    evaluation is this project's.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.models import separation_network
    >>> a = jnp.array([[[0.7, 0.2, 0.0, 0.8], [0.0, 0.0, 0.2, 0.8]]])
    >>> signs = jnp.ones((1, 4))
    >>> bool(separation_network(a, signs, b=0.2)[0] > 0)
    True
  """
  _checks.check_choice("attention", attention, _ATTENTIONS)
  _checks.check_rank("a", a, 3)
  _checks.check_floating("a", a)
  batch, length, dim = a.shape
  _checks.check_integer("length", length, 2, None)
  _checks.check_shape("signs", signs, (None, dim), "(m, d)")
  _checks.check_integer("num_neurons", signs.shape[0], 1, None)
  if query is not None:
    _checks.check_shape("query", query, (batch, None, dim), "(B, t, d)")
  for name, matrix in (("x", x), ("y", y)):
    if matrix is not None:
      _checks.check_shape(name, matrix, (dim, dim), "(d, d)")
  _check_b(b)
  return _network(a, signs, query, x, y, b, margin, attention=attention)


def separation_weight(
  length: int,
  amplitude: float | jax.Array,
  *,
  query_amplitude: float | jax.Array | None = None,
) -> jax.Array:
  r"""Softmax weight of the special token in its own row, in closed form.

  :math:`1 / (1 + (n - 1) n^{-a (1 + a')})` with a' the amplitude of the row
  that asks. It tends to 1 with n if :math:`a (1 + a') > 1`, else to 0: for the
  special token itself that is a above 0.618, the golden ratio's conjugate.

  Args:
    length: n, tokens.
    amplitude: a >= 0 of the special token; any shape.
    query_amplitude: a'; None = a, the special token asks. 0 for all other rows
      and for cross-attention.

  Returns:
    The weight, of the shape of ``amplitude``.

  Raises:
    ValueError: if ``length`` is below 2 or an amplitude is negative.

  Cost:
    O(1) an entry.

  Source:
    this project, from the data model of arXiv 2310.11685.

  Example:
    >>> from jaxattn.models import separation_weight
    >>> print(f"{separation_weight(980, 0.7):.4f}")
    0.7875
  """
  _checks.check_integer("length", length, 2, None)
  _checks.check_nonnegative("amplitude", amplitude)
  asks = amplitude if query_amplitude is None else query_amplitude
  _checks.check_nonnegative("query_amplitude", asks)
  amplitude, asks = jnp.asarray(amplitude), jnp.asarray(asks)
  # Of the odds n^{a (1 + a')} / (n - 1), the logarithm: n^2.9 may be large.
  log_odds = amplitude * (1 + asks) * math.log(length) - math.log(length - 1)
  return jax.nn.sigmoid(log_odds)


def separation_transition(
  length: int,
  b: float,
  *,
  margin: float = 0.1,
  query_amplitude: float | None = None,
) -> float:
  """Amplitude from which on softmax attention separates, predicted.

  The a at which weight(a) (a + b) = margin: there the best neuron of the
  special token's row reaches its threshold. A neuron also gains a little from
  the mean of the other tokens, so the transition measured with many neurons
  comes slightly earlier.

  Args:
    length: n, tokens.
    b: of the data set, in [0.1, 0.9].
    margin: of the threshold, in (0, b + 1).
    query_amplitude: as in :func:`separation_weight`; 0 = cross-attention.

  Returns:
    The amplitude.

  Raises:
    ValueError: if an argument is out of its range, or nothing in [0, 4] is a
      solution.

  Cost:
    Microseconds on the host.

  Source:
    this project, from the data model of arXiv 2310.11685.

  Example:
    >>> from jaxattn.models import separation_transition
    >>> print(f"{separation_transition(1000, 0.2):.3f}")
    0.496
  """
  _checks.check_integer("length", length, 2, None)
  _check_b(b)
  _checks.check_range("margin", margin, 0, b + 1, closed=False)

  def excess(a: float) -> float:
    asks = a if query_amplitude is None else query_amplitude
    log_odds = a * (1 + asks) * math.log(length) - math.log(length - 1)
    return (a + b) / (1 + math.exp(-log_odds)) - margin

  if excess(0) >= 0 or excess(4) <= 0:
    raise ValueError(
      f"margin must be crossed by an amplitude in (0, 4), got {margin} for "
      f"length={length}, b={b}"
    )
  return float(optimize.brentq(excess, 0, 4))  # pyright: ignore


def separation_false_positive(dim: int, b: float, num_neurons: int) -> float:
  """Probability that tokens without a special one pass the network's threshold.

  Rows of attention are then the mean of all tokens, and F > 0 iff a neuron has
  a plus on the last coordinate and signs of mean above 0.1 / b on the d - 2
  before. Linear attention has this row on both data sets.

  Args:
    dim: d >= 4, size of a token.
    b: of the data set, in [0.1, 0.9].
    num_neurons: m, neurons.

  Returns:
    The probability.

  Raises:
    ValueError: if an argument is out of its range.

  Cost:
    Microseconds on the host.

  Source:
    this project, from the data model of arXiv 2310.11685.

  Example:
    >>> from jaxattn.models import separation_false_positive
    >>> print(f"{separation_false_positive(51, 0.2, 92):.3f}")
    0.011
  """
  _checks.check_integer("dim", dim, 4, None)
  _check_b(b)
  _checks.check_integer("num_neurons", num_neurons, 1, None)
  # Strictly more pluses than this; 60.000000000000007 is a tie at 60.
  pluses = math.floor((dim - 2) * (0.5 + 0.05 / b) + 1e-9)
  one = 0.5 * special.bdtrc(pluses, dim - 2, 0.5)
  return float(-math.expm1(num_neurons * math.log1p(-one)))


def _check_b(b: Any) -> None:
  _checks.check_scalar("b", b)
  _checks.check_range("b", b, 0.1, 0.9)


@functools.partial(jax.jit, static_argnames="attention")
def _network(
  a: jax.Array,
  signs: jax.Array,
  query: jax.Array | None,
  x: jax.Array | None,
  y: jax.Array | None,
  b: Any,
  margin: Any,
  *,
  attention: str,
) -> jax.Array:
  # In 16 bit a tie would be as wide as the threshold.
  out_dtype, dtype = a.dtype, accumulator(a.dtype)
  a = a.astype(dtype)
  size = math.sqrt(math.log(a.shape[1]))
  b, margin = (jnp.asarray(z, dtype) for z in (b, margin))
  call = _Call(
    keys=a,
    queries=a if query is None else query.astype(dtype),
    values=a if y is None else jnp.einsum("bnd,de->bne", a, y.astype(dtype)),
    signs=signs.astype(dtype),
    tau=(1 - b + margin) * size,
  )
  tie = _TIE * float(jnp.finfo(dtype).eps) * size
  if x is None:
    out = _two_rows(call, attention, tie)
  else:
    out = _dense(call, x.astype(dtype), attention, tie)
  return out.astype(out_dtype)


def _dense(call: _Call, x: jax.Array, attention: str, tie: float) -> jax.Array:
  scores = jnp.einsum("btd,de,bne->btn", call.queries, x, call.keys)
  return _neurons(call, _normalize(scores, attention), tie).sum(-1)


def _two_rows(call: _Call, attention: str, tie: float) -> jax.Array:
  """F from the rows of least and greatest row sum, and how many there are."""
  rho, asks = call.keys.sum(-1), call.queries.sum(-1)
  both = jnp.stack((asks.min(-1), asks.max(-1)), -1)
  weights = _normalize(both[..., None] * rho[:, None, :], attention)
  f = _neurons(call, weights, tie)
  gaps = jnp.abs(asks[:, None, :] - both[..., None])
  is_high = gaps[:, 1] < gaps[:, 0]
  num_high = is_high.sum(-1).astype(f.dtype)
  total = num_high * f[:, 1] + (asks.shape[1] - num_high) * f[:, 0]
  return jnp.where(gaps.min(1).max(-1) <= tie, total, jnp.nan)


def _normalize(scores: jax.Array, attention: str) -> jax.Array:
  if attention == "softmax":
    return jax.nn.softmax(scores, -1)
  total = scores.sum(-1, keepdims=True)
  return jnp.where(total == 0, 0, scores / jnp.where(total == 0, 1, total))


def _neurons(call: _Call, weights: jax.Array, tie: float) -> jax.Array:
  """(B, t) sums over neurons from weights (B, t, n)."""
  highest = lax.Precision.HIGHEST
  c = jnp.einsum("btn,bnd->btd", weights, call.values, precision=highest)
  z = jnp.einsum("btd,md->btm", c, call.signs, precision=highest)
  excess = z - call.tau
  return jnp.where(excess > tie, excess, 0).sum(-1)
