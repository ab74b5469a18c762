r"""Forecasts of a series from windows of its past.

:func:`jaxattn.data.windows` makes the windows: (n, L, C) of what was and
(n, H, C) of what followed. All forecasters here also take (n, L), and treat
channels alike and apart: one set of weights, no channel sees another.

The linear ones are hard to beat and have closed forms: with the last value
taken off, next-step prediction is least squares on :math:`x_{<d} - x_d`, and
N-Linear (arXiv 2205.13504) that for H steps.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxattn import _checks
from jaxattn.attention import softmax_attention
from jaxattn.features import rope
from jaxattn.numerics import ridge_solve

__all__ = [
  "AttentionForecaster",
  "nlinear_fit",
  "nlinear_predict",
  "persistence",
  "residual_linear_apply",
  "residual_linear_fit",
  "seasonal_naive",
]

_KINDS = ("plain", "position_bias", "rope", "differential")
_FIRST_MIX = 0.5


def residual_linear_apply(v: jax.Array, x: jax.Array) -> jax.Array:
  r"""The residual linear network :math:`\langle v, x_{<d} - x_d \rangle + x_d`.

  Args:
    v: (d - 1,). The source has d of them, but the last meets a 0.
    x: (n, d), the last lag last.

  Returns:
    (n,).

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Cost:
    O(n d).

  Source:
    arXiv 2412.06061, section 6.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.models import residual_linear_apply
    >>> v = jnp.array([0.0, -1.0])  # the last step once more
    >>> print(residual_linear_apply(v, jnp.array([[1.0, 4.0, 6.0]])))
    [8.]
  """
  x, v = jnp.asarray(x), jnp.asarray(v)
  _check_lags(x)
  _checks.check_shape("v", v, (x.shape[1] - 1,), "(d - 1,)")
  _checks.check_floating("v", v)
  return (x[:, :-1] - x[:, -1:]) @ v + x[:, -1]


def residual_linear_fit(
  x: jax.Array, y: jax.Array, *, ridge: float | jax.Array = 0.0
) -> jax.Array:
  r"""Least squares of :func:`residual_linear_apply`.

  Args:
    x: (n, d).
    y: (n,), what came next.
    ridge: lambda of :math:`\frac12 \lambda \|v\|^2` beside one half of the sum
      of squares; 0 by a QR factorization.

  Returns:
    v, (d - 1,).

  Raises:
    ValueError: if shapes or dtypes do not fit, or ``ridge`` is negative.

  Cost:
    O(n d^2).

  Source:
    arXiv 2412.06061, section 6, with d - 1 unknowns: of d none is the best.

  Example:
    >>> import jax
    >>> from jaxattn.models import residual_linear_fit
    >>> x = jax.random.normal(jax.random.key(0), (50, 3))
    >>> print(abs(residual_linear_fit(x, 2 * x[:, -1] - x[:, 1])).round(3))
    [0. 1.]
  """
  x, y = jnp.asarray(x), jnp.asarray(y)
  _check_lags(x)
  _checks.check_shape("y", y, (len(x),), "(n,)")
  _checks.check_floating("y", y)
  return ridge_solve(x[:, :-1] - x[:, -1:], y - x[:, -1], ridge)


def nlinear_fit(
  windows_x: jax.Array,
  windows_y: jax.Array,
  *,
  ridge: float | jax.Array = 1e-3,
) -> jax.Array:
  r"""N-Linear in closed form.

  .. math:: W = (X^\top X + \lambda n I)^{-1} X^\top Y,

  X and Y the windows less the last value of each history. The last column of X
  is 0, and so is the last row of W.

  Args:
    windows_x: (n, L) or (n, L, C), at least 2 steps.
    windows_y: (n, H) or (n, H, C).
    ridge: lambda, at least 0; of 0 the problem is solved by QR.

  Returns:
    W, (L, H); n counts the channels of all windows.

  Raises:
    ValueError: if shapes or dtypes do not fit, or ``ridge`` is negative.

  Cost:
    O(n L (L + H)) time, O(n (L + H)) memory.

  Source:
    arXiv 2205.13504, which trains it by gradients.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.models import nlinear_fit, nlinear_predict
    >>> t = jnp.arange(60.0)
    >>> x = jnp.sin(t[:, None] + jnp.arange(7.0)[None])  # rows are windows
    >>> w = nlinear_fit(x[:, :5], x[:, 5:], ridge=1e-6)
    >>> error = nlinear_predict(w, x[:, :5]) - x[:, 5:]
    >>> w.shape, bool(abs(error).max() < 1e-2)
    ((5, 2), True)
  """
  x, y = jnp.asarray(windows_x), jnp.asarray(windows_y)
  _check_windows("windows_x", x)
  _checks.check_rank("windows_y", y, x.ndim)
  shape = (len(x), None, *x.shape[2:])
  _checks.check_shape("windows_y", y, shape, "(n, H) or (n, H, C)")
  _checks.check_floating("windows_y", y)
  if x.shape[1] < 2:
    raise ValueError(f"windows_x must hold 2 steps or more, got {x.shape[1]}")
  _checks.check_scalar("ridge", ridge)
  _checks.check_nonnegative("ridge", ridge)
  x, y = _rows(x), _rows(y)
  last = x[:, -1:]
  w = ridge_solve(x[:, :-1] - last, y - last, ridge * len(x))
  return jnp.concatenate([w, jnp.zeros_like(w[:1])])


def nlinear_predict(w: jax.Array, x: jax.Array) -> jax.Array:
  r"""Forecasts :math:`x_L + (x - x_L) W`.

  Args:
    w: (L, H).
    x: (n, L) or (n, L, C).

  Returns:
    (n, H) or (n, H, C).

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Cost:
    O(n L H).

  Source:
    arXiv 2205.13504.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.models import nlinear_predict
    >>> print(nlinear_predict(jnp.zeros((3, 2)), jnp.array([[1.0, 2.0, 5.0]])))
    [[5. 5.]]
  """
  x, w = jnp.asarray(x), jnp.asarray(w)
  _check_windows("x", x)
  _checks.check_shape("w", w, (x.shape[1], None), "(L, H)")
  _checks.check_floating("w", w)
  rows = _rows(x)
  return _unrows(rows[:, -1:] + (rows - rows[:, -1:]) @ w, x)


def persistence(x: jax.Array, horizon: int) -> jax.Array:
  """Forecasts that nothing changes.

  Args:
    x: (n, L) or (n, L, C).
    horizon: H, steps to forecast.

  Returns:
    (n, H) or (n, H, C), the last value H times.

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Cost:
    O(n H).

  Source:
    standard.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.models import persistence
    >>> print(persistence(jnp.array([[1.0, 2.0]]), 3))
    [[2. 2. 2.]]
  """
  return seasonal_naive(x, horizon, period=1)


def seasonal_naive(x: jax.Array, horizon: int, *, period: int) -> jax.Array:
  """Forecasts what was one period before.

  Args:
    x: (n, L) or (n, L, C).
    horizon: H, steps to forecast.
    period: steps of a season, at most L. The last one is repeated as often as
      the horizon asks for.

  Returns:
    (n, H) or (n, H, C).

  Raises:
    ValueError: if shapes, dtypes or the period do not fit.

  Cost:
    O(n H).

  Source:
    standard.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.models import seasonal_naive
    >>> print(seasonal_naive(jnp.array([[1.0, 2.0, 3.0]]), 3, period=2))
    [[2. 3. 2.]]
  """
  x = jnp.asarray(x)
  _check_windows("x", x)
  _checks.check_integer("horizon", horizon, 1, None)
  _checks.check_integer("period", period, 1, x.shape[1])
  return x[:, x.shape[1] - period + jnp.arange(horizon) % period]


class AttentionForecaster(nn.Module):
  r"""A small transformer that forecasts from patches of the past.

  Histories are cut into patches, each a token. A layer is
  :math:`z + \mathrm{attention}(\mathrm{norm}(z))`, followed by the same with a
  network of one hidden layer (GELU); the last token's output is mapped to the
  horizon. Called on (n, L) or (n, L, C) floating inputs it returns (n, H) or
  (n, H, C), from one channel at a time.

  Attention is of one of four kinds:

  * ``"plain"``: without positions: all tokens before the last could be
    exchanged;
  * ``"position_bias"``: a trained bias (num_heads, tokens, tokens) on the
    logits, 0 at first;
  * ``"rope"``: queries and keys are turned by their position;
  * ``"differential"``: a softmax less a trained multiple of another one's; no
    positions.

  Attributes:
    horizon: H, steps to forecast.
    kind: one of the above.
    residual: take the last value off the history, and add it to the forecast.
    patch_size: steps of a token; divides L.
    num_heads: heads of each layer.
    head_dim: size of a head, even for ``"rope"``; tokens are num_heads *
      head_dim long.
    num_layers: layers.
    mlp: hidden units of the network of each layer.

  Raises:
    ValueError: when called, if a field or the input does not fit.

  Cost:
    O(T (T + num_heads head_dim) num_heads head_dim) a layer and history of T
    tokens.

  Source:
    this project; the variants are those that arXiv 2412.06061 asks about.

  Example:
    >>> import jax
    >>> from jaxattn.models import AttentionForecaster
    >>> x = jax.random.normal(jax.random.key(0), (3, 48, 2))
    >>> model = AttentionForecaster(horizon=12, patch_size=8)
    >>> params = model.init(jax.random.key(1), x)
    >>> model.apply(params, x).shape
    (3, 12, 2)
  """

  horizon: int
  kind: str = "position_bias"
  residual: bool = True
  patch_size: int = 1
  num_heads: int = 4
  head_dim: int = 8
  num_layers: int = 2
  mlp: int = 64

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Forecasts (n, H) or (n, H, C) from (n, L) or (n, L, C)."""
    self._check(x)
    rows = _rows(x)
    last = rows[:, -1:] if self.residual else jnp.zeros_like(rows[:, -1:])
    tokens = (rows - last).reshape(len(rows), -1, self.patch_size)
    z = nn.Dense(self.num_heads * self.head_dim, name="embed")(tokens)
    for i in range(self.num_layers):
      layer = _Layer(
        self.kind, self.num_heads, self.head_dim, self.mlp, name=f"layer_{i}"
      )
      z = layer(z)
    z = nn.LayerNorm(name="norm")(z[:, -1])
    return _unrows(last + nn.Dense(self.horizon, name="head")(z), x)

  def _check(self, x: jax.Array) -> None:
    _check_windows("x", x)
    _checks.check_choice("kind", self.kind, _KINDS)
    _checks.check_choice("residual", self.residual, (False, True))
    sizes = (
      "horizon",
      "patch_size",
      "num_heads",
      "head_dim",
      "num_layers",
      "mlp",
    )
    for name in sizes:
      _checks.check_integer(name, getattr(self, name), 1, None)
    if x.shape[1] % self.patch_size:
      raise ValueError(
        f"patch_size must divide the {x.shape[1]} steps of x, got "
        f"{self.patch_size}"
      )


class _Layer(nn.Module):
  """Attention, and a network of one hidden layer, each with norm and skip."""

  kind: str
  num_heads: int
  head_dim: int
  mlp: int

  @nn.compact
  def __call__(self, z: jax.Array) -> jax.Array:
    y = self._attend(nn.LayerNorm(name="attention_norm")(z))
    z = z + nn.DenseGeneral(z.shape[-1], axis=(-2, -1), name="out")(y)
    y = nn.LayerNorm(name="mlp_norm")(z)
    y = nn.gelu(nn.Dense(self.mlp, name="mlp_in")(y))
    return z + nn.Dense(z.shape[-1], name="mlp_out")(y)

  def _attend(self, z: jax.Array) -> jax.Array:
    query, key, value = (self._heads(z, n) for n in ("query", "key", "value"))
    length, bias = z.shape[1], None
    if self.kind == "rope":
      at = jnp.arange(length)
      query, key = rope(query, at), rope(key, at)
    elif self.kind == "position_bias":
      shape = self.num_heads, length, length
      bias = self.param("bias", nn.initializers.zeros, shape)[None]
      bias = bias.astype(query.dtype)
    out = softmax_attention(query, key, value, bias)
    if self.kind != "differential":
      return out
    second = (
      self._heads(z, "second_query"),
      self._heads(z, "second_key"),
      value,
    )
    mix = self.param(
      "mix", nn.initializers.constant(_FIRST_MIX), (self.num_heads,)
    )
    return out - mix[None, None, :, None] * softmax_attention(*second)

  def _heads(self, z: jax.Array, name: str) -> jax.Array:
    return nn.DenseGeneral((self.num_heads, self.head_dim), name=name)(z)


def _check_lags(x: jax.Array) -> None:
  _checks.check_rank("x", x, 2)
  _checks.check_floating("x", x)
  if x.shape[1] < 2:
    raise ValueError(f"x must hold 2 lags or more, got {x.shape[1]}")


def _check_windows(name: str, x: jax.Array) -> None:
  _checks.check_rank(name, x, (2, 3))
  _checks.check_floating(name, x)
  if 0 in x.shape:
    raise ValueError(f"{name} must not be empty, got shape {x.shape}")


def _rows(x: jax.Array) -> jax.Array:
  """(n, L, C) as (n C, L); (n, L) as it is."""
  return x if x.ndim == 2 else jnp.moveaxis(x, 1, 2).reshape(-1, x.shape[1])


def _unrows(y: jax.Array, x: jax.Array) -> jax.Array:
  """(n C, H) as (n, H, C), for windows ``x``; (n, H) as it is."""
  if x.ndim == 2:
    return y
  return jnp.moveaxis(y.reshape(len(x), x.shape[2], -1), 1, 2)
