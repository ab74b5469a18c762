r"""A transformer that is the velocity of a flow, given a history.

Tokens are patches of the history and of the noisy future :math:`x_t`. Time
enters through the norms: from an embedding e of t each layer takes shifts
:math:`\beta`, scales :math:`\gamma` and gates g,

.. math::

  z \leftarrow z + g_1 \operatorname{attention}(
    \operatorname{norm}(z) (1 + \gamma_1) + \beta_1), \qquad
  z \leftarrow z + g_2 \operatorname{mlp}(
    \operatorname{norm}(z) (1 + \gamma_2) + \beta_2).

All of these, and the output, are 0 at first: each layer is then the identity,
and the velocity exactly 0. Source: arXiv 2212.09748.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxattn import _checks
from jaxattn.attention import softmax_attention
from jaxattn.numerics._dtypes import accumulator

__all__ = ["DiT", "HistoryCache", "encode_history"]

_MODES = ("joint", "cross")
_MLP_RATIO = 4
_NORM_EPS = 1e-6
# Times are multiplied by this, and the longest period over the shortest is the
# second.
_TIME_SCALE, _PERIODS = 1000.0, 10_000.0

_zeros = nn.initializers.zeros


class HistoryCache(NamedTuple):
  """Keys and values of a history, from :func:`encode_history`.

  Attributes:
    key: (num_layers, B, L / patch, num_heads, width / num_heads).
    value: the same.
  """

  key: jax.Array
  value: jax.Array


class DiT(nn.Module):
  """A diffusion transformer: the velocity of a forecast's flow.

  Called on x (B, T, C), t of shape () or (B,), and the history (B, L, C) it
  returns (B, T, C), in the dtype of x. With ``history_mode="joint"`` one
  sequence of both goes through all layers. With ``"cross"`` the history goes
  through them alone, not knowing t or x, and the future attends to what each
  layer has of it: as in the decoding of language, its keys and values are
  computed once for all steps and samples. :func:`encode_history` returns them,
  and they are taken in place of the history.

  Attributes:
    horizon: T, steps to forecast.
    history: L, steps of the past.
    channels: C.
    width: size of a token, even.
    num_layers: layers.
    num_heads: heads of each layer; divides ``width``.
    patch: P, steps of a token; divides T and L.
    history_mode: "joint" or "cross".
    dtype: of activations; None = that of x. With ``jnp.bfloat16`` the time,
      norms and the softmax stay in float32.

  Raises:
    ValueError: when called, if a field or an input does not fit.

  Cost:
    O(width^2 (L + T) / P) a layer and row, and attention between as many
    tokens; "cross" with a cache O(width^2 T / P), attention to all tokens.

  Source:
    arXiv 2212.09748.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.models import DiT
    >>> model = DiT(horizon=8, history=16)
    >>> x, history = jnp.ones((2, 8, 1)), jnp.ones((2, 16, 1))
    >>> params = model.init(jax.random.key(0), x, 0.5, history)
    >>> v = model.apply(params, x, 0.5, history)
    >>> v.shape, float(abs(v).max())
    ((2, 8, 1), 0.0)
  """

  horizon: int
  history: int
  channels: int = 1
  width: int = 64
  num_layers: int = 3
  num_heads: int = 4
  patch: int = 4
  history_mode: str = "joint"
  dtype: Any = None

  def setup(self) -> None:
    """Makes the layers; their parameters do not depend on the mode."""
    _check_model(self)
    tokens = self.history // self.patch, self.horizon // self.patch
    normal = nn.initializers.normal(0.02)
    self.embed = [_dense(self, self.width) for _ in range(2)]
    self.positions = [
      self.param(f"position_{i}", normal, (n, self.width))
      for i, n in enumerate(tokens)
    ]
    self.segments = self.param("segments", normal, (2, self.width))
    self.time = [nn.Dense(self.width, dtype=jnp.float32) for _ in range(2)]
    self.blocks = [
      _Block(self.width, self.num_heads, self.dtype)
      for _ in range(self.num_layers)
    ]
    self.modulation = _dense(self, 2 * self.width, kernel_init=_zeros)
    size = self.patch * self.channels
    self.head = _dense(self, size, kernel_init=_zeros)

  def __call__(
    self,
    x: jax.Array,
    t: float | jax.Array,
    history: jax.Array | HistoryCache,
  ) -> jax.Array:
    """The velocity, (B, T, C)."""
    x, t = jnp.asarray(x), jnp.asarray(t)
    check_velocity_inputs(self, x, t)
    e = nn.silu(self._embed_time(t, len(x)))
    z = self._tokens(x, 1)
    if isinstance(history, HistoryCache):
      keys, values = self._check_cache(history, len(x))
    elif self.history_mode == "cross":
      keys, values = self.encode(history)
    else:
      check_history(self, history, len(x))
      z = jnp.concatenate([self._tokens(history, 0).astype(z.dtype), z], 1)
      keys = values = (None,) * self.num_layers
    for block, key, value in zip(self.blocks, keys, values, strict=True):
      z = block(z, e, key, value)
    shift, scale = jnp.split(self.modulation(e)[:, None], 2, axis=-1)
    z = z[:, -(self.horizon // self.patch) :]
    v = self.head(_norm(z) * (1 + scale) + shift)
    return v.reshape(x.shape).astype(x.dtype)

  def encode(self, history: jax.Array) -> HistoryCache:
    """What layers have of a history; :func:`encode_history`."""
    check_history(self, history, len(history))
    z, cache = self._tokens(history, 0), []
    for block in self.blocks:
      z, key, value = block.encode(z)
      cache.append((key, value))
    keys, values = zip(*cache, strict=True)
    return HistoryCache(jnp.stack(keys), jnp.stack(values))

  def _tokens(self, x: jax.Array, segment: int) -> jax.Array:
    dtype = self.dtype or x.dtype
    patches = x.astype(dtype).reshape(len(x), -1, self.patch * self.channels)
    place = self.positions[segment] + self.segments[segment][None]
    return self.embed[segment](patches) + place[None].astype(dtype)

  def _embed_time(self, t: jax.Array, num: int) -> jax.Array:
    t = jnp.broadcast_to(t, (num,))
    e = self.time[0](sinusoid(t, self.width))
    return self.time[1](nn.silu(e))

  def _check_cache(self, cache: HistoryCache, num: int) -> HistoryCache:
    if self.history_mode != "cross":
      raise ValueError(
        "history must be an array in mode 'joint', got a HistoryCache: layers "
        "see the future there"
      )
    n = self.history // self.patch
    size = self.width // self.num_heads
    shape = (self.num_layers, num, n, self.num_heads, size)
    for name, x in cache._asdict().items():
      _checks.check_shape(f"history.{name}", x, shape)
    return cache


def encode_history(
  params: Any, history: jax.Array, *, model: DiT
) -> HistoryCache:
  """Keys and values of a history, once for all steps and samples.

  Args:
    params: of the model, as ``model.init`` returns them.
    history: (B, L, C), floating.
    model: a :class:`DiT` with ``history_mode="cross"``.

  Returns:
    A :class:`HistoryCache`, which the model takes in place of ``history``.

  Raises:
    ValueError: if shapes or dtypes do not fit, or the mode is another one.

  Cost:
    The layers, on L / patch tokens a row.

  Source:
    this project.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.models import DiT, encode_history
    >>> model = DiT(horizon=8, history=16, history_mode="cross")
    >>> x, history = jnp.ones((2, 8, 1)), jnp.ones((2, 16, 1))
    >>> params = model.init(jax.random.key(0), x, 0.5, history)
    >>> cache = encode_history(params, history, model=model)
    >>> cache.key.shape, model.apply(params, x, 0.5, cache).shape
    ((3, 2, 4, 4, 16), (2, 8, 1))
  """
  if model.history_mode != "cross":
    raise ValueError(
      "model.history_mode must be 'cross', got "
      f"{model.history_mode!r}: layers see the future there"
    )
  # flax's annotation is that of a pair.
  cache: Any = model.apply(params, jnp.asarray(history), method="encode")
  return cache


# --- inside ---


def sinusoid(t: jax.Array, size: int) -> jax.Array:
  """(B, size) sines and cosines of 1000 t, in float32: t itself needs it."""
  half = jnp.arange(size // 2, dtype=jnp.float32)
  rate = _TIME_SCALE * _PERIODS ** (-half / (size // 2))
  angle = t.astype(jnp.float32)[:, None] * rate[None]
  return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)


def check_velocity_inputs(model: Any, x: jax.Array, t: jax.Array) -> None:
  """Of any model with horizon, history and channels."""
  _checks.check_rank("x", x, 3)
  _checks.check_floating("x", x)
  shape = (len(x), model.horizon, model.channels)
  _checks.check_shape("x", x, shape, "(B, horizon, channels)")
  _checks.check_floating("t", t)
  if t.ndim:
    _checks.check_shape("t", t, (len(x),), "(B,)")
  _checks.check_range("t", t, 0, 1)


def check_history(model: Any, history: Any, num: int) -> None:
  """Of any model with horizon, history and channels."""
  _checks.check_rank("history", history, 3)
  _checks.check_floating("history", history)
  shape = (num, model.history, model.channels)
  _checks.check_shape("history", history, shape, "(B, history, channels)")


def _check_model(model: DiT) -> None:
  for name in (
    "horizon",
    "history",
    "channels",
    "width",
    "num_layers",
    "num_heads",
    "patch",
  ):
    _checks.check_integer(name, getattr(model, name), 1, None)
  _checks.check_choice("history_mode", model.history_mode, _MODES)
  if model.history % model.patch or model.horizon % model.patch:
    raise ValueError(
      f"patch must divide history={model.history} and horizon={model.horizon},"
      f" got {model.patch}"
    )
  if model.width % model.num_heads:
    raise ValueError(
      f"num_heads must divide width={model.width}, got {model.num_heads}"
    )
  if model.width % 2:
    raise ValueError(f"width must be even, got {model.width}")


def _dense(module: Any, size: int, **options: Any) -> nn.Dense:
  return nn.Dense(size, dtype=module.dtype, **options)


def _norm(x: jax.Array) -> jax.Array:
  """To mean 0 and variance 1, in float32 or wider."""
  wide = x.astype(accumulator(x.dtype))
  wide = wide - wide.mean(-1, keepdims=True)
  variance = (wide**2).mean(-1, keepdims=True)
  return (wide * jax.lax.rsqrt(variance + _NORM_EPS)).astype(x.dtype)


class _Block(nn.Module):
  """Attention and a network of one hidden layer, modulated by time."""

  width: int
  num_heads: int
  dtype: Any

  def setup(self) -> None:
    self.modulation = _dense(self, 6 * self.width, kernel_init=_zeros)
    self.qkv = _dense(self, 3 * self.width)
    self.out = _dense(self, self.width)
    self.mlp = _dense(self, _MLP_RATIO * self.width), _dense(self, self.width)

  def __call__(
    self,
    z: jax.Array,
    e: jax.Array,
    key: jax.Array | None,
    value: jax.Array | None,
  ) -> jax.Array:
    parts = jnp.split(self.modulation(e)[:, None], 6, axis=-1)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
    query, *own = self._heads(_norm(z) * (1 + scale) + shift)
    if key is not None and value is not None:
      # The history first, as in one sequence of both.
      pairs = zip((key, value), own, strict=True)
      own = [jnp.concatenate([a.astype(b.dtype), b], 1) for a, b in pairs]
    z = z + gate * self._attend(query, *own)
    return z + mlp_gate * self._mlp(_norm(z) * (1 + mlp_scale) + mlp_shift)

  def encode(self, z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same without time; also the keys and values."""
    query, key, value = self._heads(_norm(z))
    z = z + self._attend(query, key, value)
    return z + self._mlp(_norm(z)), key, value

  def _heads(self, z: jax.Array) -> list[jax.Array]:
    shape = (*z.shape[:2], 3 * self.num_heads, self.width // self.num_heads)
    return jnp.split(self.qkv(z).reshape(shape), 3, axis=2)

  def _attend(
    self, query: jax.Array, key: jax.Array, value: jax.Array
  ) -> jax.Array:
    out = softmax_attention(query, key, value)
    return self.out(out.reshape(*out.shape[:2], self.width))

  def _mlp(self, z: jax.Array) -> jax.Array:
    return self.mlp[1](nn.gelu(self.mlp[0](z)))
