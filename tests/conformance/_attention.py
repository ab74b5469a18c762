"""The attention functions that the conformance suite runs over.

To add one: write a :class:`Member`. A public function of
``jaxattn.attention`` whose first parameters are query, key and value and that
is not listed fails the suite.
"""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.attention import (
  BlockSizes,
  PrefixState,
  linear_attention,
  moment_init,
  moment_merge,
  moment_query,
  moment_update,
  ntk_attention,
  polynomial_attention,
  polynomial_tensor_attention,
  prefix_attention,
  relu_attention,
  softmax_attention,
  tensor_attention,
)
from jaxattn.attention.topk import topk_attention
from jaxattn.features import favor_map, polynomial_coefficients, taylor_map
from tests._dense import dense_attention, float64, softmax

# Batch 8: it is also sharded over 8 devices. Blocks and chunks of the members
# are chosen to leave remainders in 16 queries and keys.
B, T, N, K, H = 8, 16, 4, 2, 8


class Member(NamedTuple):
  """One function under the contract, and what the suite must know of it.

  Which of ``mask``, ``key_mask`` and ``is_causal`` it takes is read from its
  signature.

  Attributes:
    fn: the public function.
    oracle: ``oracle(query, key, value, *, seen, scale)``, a dense formula of
      what the function computes (not of what it approximates); run in float64,
      differentiated by JAX. ``seen`` is boolean and broadcastable to
      (..., N, T, S).
    options: what every call passes, given the number of keys.
    effects: a value for each parameter that must change the result.
    neutral: for each parameter that must not change the result, a value to
      pass, and one that must be refused.
    has_prefix: a query that sees no key attends to a prefix, and gives no 0.
    no_keys: without any key, S = 0, it attends to its prefix; others refuse.
    refuses: parameters that are there to say why they must be None.
    in_pairs: it attends to pairs of keys: each call passes the suite's keys and
      values as the first ones, and reversed along their last axis, which no
      dtype rounds, as the second ones.
    narrow_weights: its weights enter products in the dtype of the values, as
      matrix units take them: that is a second rounding for 16-bit inputs.
    adapted: ``fn`` is not public: it puts together functions whose signature
      differs by nature. Their options and refusals are tested with them.
    unmapped: it refuses to run inside a ``jax.shard_map``, as it must where
      JAX's interpreter cannot.
  """

  fn: Callable[..., Any]
  oracle: Callable[..., jax.Array]
  options: Callable[[int], Mapping[str, Any]]
  effects: Mapping[str, Any]
  neutral: Mapping[str, tuple[Any, Any]]
  has_prefix: bool = False
  no_keys: bool = False
  refuses: tuple[str, ...] = ()
  in_pairs: bool = False
  narrow_weights: bool = False
  adapted: bool = False
  unmapped: bool = False

  @property
  def num_arrays(self) -> int:
    """How many of the first parameters are query, keys and values."""
    return 5 if self.in_pairs else 3

  def words(self, message: str) -> str:
    """What this member says where another one says ``message``."""
    if not self.in_pairs:
      return message
    return re.sub(r"\b(key|value|key_mask)\b", r"\g<1>1", message)

  def can_be_causal(self, num_queries: int, num_keys: int) -> bool:
    """Whether it takes ``is_causal`` with these lengths."""
    return self.takes("is_causal") and (
      not self.in_pairs or num_queries == num_keys
    )

  def takes(self, name: str) -> bool:
    """Whether the function has a parameter of this name, and use for it."""
    parameters = inspect.signature(self.fn).parameters
    return name in parameters and name not in self.refuses

  def call(
    self, query: Any, key: Any, value: Any, seen: Any = None, **options: Any
  ) -> Any:
    """Calls the function; ``seen`` goes where its signature has room for it.

    Args:
      query: as the function takes it.
      key: as the function takes it.
      value: as the function takes it.
      seen: None or boolean of (B, N, T, S) or 1 each; see :meth:`hide`.
      **options: passed on; they win over ``self.options``.
    """
    if seen is not None and self.takes("mask"):
      options["mask"] = seen
    elif seen is not None:
      names = ("key_mask1", "key_mask2") if self.in_pairs else ("key_mask",)
      options |= dict.fromkeys(names, seen[..., 0, 0, :])
    options = dict(self.options(key.shape[-3])) | options
    arrays = (key, value)
    if self.in_pairs:
      arrays = (key, jnp.flip(key, -1), value, jnp.flip(value, -1))
    return self.fn(query, *arrays, **options)

  def hide(self, seen: np.ndarray) -> np.ndarray:
    """The part of a full mask (B, N, T, S) that the function can honour."""
    return seen if self.takes("mask") else seen[..., :1, :1, :]


def _softmax_oracle(
  query: jax.Array, key: jax.Array, value: jax.Array, **options: Any
) -> jax.Array:
  return dense_attention(query, key, value, **options)[0]


def _topk_oracle(
  query: jax.Array, key: jax.Array, value: jax.Array, **options: Any
) -> jax.Array:
  k = _topk_options(key.shape[-3])["k"]

  def largest(logits: jax.Array) -> jax.Array:
    return logits >= jnp.sort(logits, -1)[..., -k, None]

  return dense_attention(query, key, value, select=largest, **options)[0]


def _topk_options(num_keys: int) -> dict[str, int]:
  return {"k": min(7, num_keys), "chunk_size": 5}


def _linear_oracle(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  seen: Any,
  scale: float | None,
) -> jax.Array:
  root = 1 if scale is None else scale**0.5
  query, key = (jax.nn.elu(root * x) + 1 for x in (query, key))
  return _weighted_mean(_products(query, key), value, seen)


def _polynomial_oracle(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  seen: Any,
  scale: float | None,
) -> jax.Array:
  scale = query.shape[-1] ** -0.5 if scale is None else scale
  logits = scale * _products(query, key)
  powers = [c * logits**j for j, c in enumerate(polynomial_coefficients(2, 3))]
  return _weighted_mean(functools.reduce(jnp.add, powers), value, seen)


def _polynomial_options(num_keys: int) -> dict[str, Any]:
  del num_keys
  return {
    "degree": 2,
    "radius": 3.0,
    "center_keys": False,
    "local": "polynomial",
    "chunk_size": 5,
  }


def _relu_oracle(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  seen: Any,
  scale: float | None,
) -> jax.Array:
  scale = query.shape[-1] ** -0.5 if scale is None else scale
  options = _relu_options(key.shape[-3])
  excess = scale * _products(query, key) - options["threshold"]
  return _weighted_mean(jax.nn.relu(excess) ** options["alpha"], value, seen)


def _relu_options(num_keys: int) -> dict[str, Any]:
  del num_keys
  # Far enough down that some keys pass by much: a row of which all are close to
  # the threshold is known only to the rounding of that difference.
  return {"threshold": -3.0, "alpha": 2}


def _products(query: jax.Array, key: jax.Array) -> jax.Array:
  """(..., N, T, S) inner products."""
  key = jnp.repeat(key, query.shape[-2] // key.shape[-2], -2)
  return jnp.einsum("...tnh,...snh->...nts", query, key)


def _weighted_mean(
  weights: jax.Array, value: jax.Array, seen: Any
) -> jax.Array:
  """(..., T, N, Hv) from weights (..., N, T, S); 0 where there are none."""
  value = jnp.repeat(value, weights.shape[-3] // value.shape[-2], -2)
  weights = jnp.where(seen, weights, 0)
  total = weights.sum(-1, keepdims=True)
  weights = weights / jnp.where(total == 0, 1, total)
  return jnp.einsum("...nts,...snh->...tnh", weights, value)


def _prefix(num_keys: int, seed: int = 0) -> dict[str, np.ndarray]:
  """A prefix for each shape of the suite, told by its number of keys.

  All heads share it, so that heads may change places.
  """
  shapes = {T: (K, H, H - 2), 19: (1, 5, 7), 9: (2, 6, 6)}
  kv, *sizes = shapes.get(num_keys, (2, 5, 5))
  rng = np.random.default_rng(seed)
  key, value = (
    rng.standard_normal((5, 1, n)).astype("float32").repeat(kv, 1)
    for n in sizes
  )
  return {"prefix_key": key, "prefix_value": value}


def _prefix_oracle(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  seen: Any,
  scale: Any,
  log_kernel: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
  """Dense attention to prefix and context; another kernel on the prefix."""
  prefix = _prefix(key.shape[-3]).values()
  m, s = 5, key.shape[-3]
  key, value = (
    jnp.concatenate((np.broadcast_to(p, (*x.shape[:-3], *p.shape)), x), -3)
    for p, x in zip(prefix, (key, value), strict=True)
  )
  bias = None
  if log_kernel is not None:
    groups = query.shape[-2] // key.shape[-2]
    logits = query.shape[-1] ** -0.5 * jnp.einsum(
      "...tnh,...snh->...nts", query, jnp.repeat(key, groups, -2)
    )
    on_prefix = np.arange(m + s).reshape((1,) * (logits.ndim - 1) + (-1,)) < m
    bias = jnp.where(on_prefix, log_kernel(logits) - logits, 0)
  seen = jnp.broadcast_to(seen, (*jnp.shape(seen)[:-1], s))
  always = jnp.ones((*seen.shape[:-1], m), bool)
  seen = jnp.concatenate((always, seen), -1)
  return dense_attention(query, key, value, bias, seen=seen, scale=scale)[0]


def _quadratic(s: jax.Array) -> jax.Array:
  """Logarithm of the kernel of Taylor features of degree 2."""
  return jnp.log(1 + s + s * s / 2)


def _quadratic_state(num_keys: int, seed: int = 0) -> PrefixState:
  """State of the prefix under Taylor features of degree 2, by hand."""
  key, value = float64(*_prefix(num_keys, seed).values())
  x = key * key.shape[-1] ** -0.25
  phi = [np.ones_like(x[..., :1]), x]
  for v in range(x.shape[-1]):
    products = x[..., v : v + 1] * x[..., : v + 1]
    products[..., -1] /= np.sqrt(2)
    phi.append(products)
  phi = np.concatenate(phi, -1)
  z = np.einsum("mkr,mkv->krv", phi, value)
  return PrefixState(z, phi.sum(0))


def _tensor_oracle(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  seen: Any,
  scale: float | None,
  kernel: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
  """All logits of all pairs; another kernel than exp."""
  groups = query.shape[-2] // key.shape[-2]
  key, value = (jnp.repeat(x, groups, -2) for x in (key, value))
  scale = query.shape[-1] ** -0.5 if scale is None else scale
  logits = scale * jnp.einsum(
    "...tnh,...snh,...unh->...ntsu", query, key, key[..., ::-1]
  )
  both = jnp.broadcast_to(seen[..., None] & seen[..., None, :], logits.shape)
  rows = (*logits.shape[:-2], -1)
  if kernel is None:
    weights = softmax(logits.reshape(rows), both.reshape(rows))[0]
  else:
    weights = jnp.where(both, kernel(logits), 0).reshape(rows)
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
  weights = weights.reshape(logits.shape)
  return jnp.einsum(
    "...ntsu,...snh,...unh->...tnh", weights, value, value[..., ::-1]
  )


def _quadratic_minimax(s: jax.Array) -> jax.Array:
  a, b, c = polynomial_coefficients(2, 3.0)
  return a + b * s + c * s * s


def _full(fill: Any, *shape: int) -> np.ndarray:
  return np.full(shape, fill)


def streamed_moments(
  query: Any,
  key: Any,
  value: Any,
  *,
  scale: Any = None,
  key_mask: Any = None,
) -> Any:
  """Attention by a state that two parts of the keys are merged into."""
  if batched := query.ndim == 4:
    arrays = query, key, value
  else:
    arrays = tuple(x[None] for x in (query, key, value))
    key_mask = None if key_mask is None else key_mask[None]
  query, key, value = map(jnp.asarray, arrays)
  # Where eight devices that share the keys can be cut.
  (b, s, k, h), cut = key.shape, 8
  wide = query.dtype if query.dtype == jnp.float64 else jnp.float32
  empty = moment_init(b, k, h, value.shape[-1], degree=2, dtype=wide)
  state, *parts = (
    moment_update(
      empty,
      key[:, part],
      value[:, part],
      key_mask=None if key_mask is None else jnp.asarray(key_mask)[:, part],
    )
    for part in (slice(0, cut), slice(cut, s))
  )
  for part in parts:
    state = moment_merge(state, part)
  out = _ask(state, query, scale)
  return out if batched else out[0]


@jax.jit
def _ask(state: Any, query: Any, scale: Any) -> Any:
  # Under jit, where a state without a token gives 0 instead of an error.
  return moment_query(state, query, radius=3.0, scale=scale)


def _interpreted(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
  """``fn`` by its kernels; of its options, those that hide and scale logits."""

  def run(*arrays: Any, **more: Any) -> Any:
    return fn(*arrays, implementation="pallas_interpret", **options, **more)

  signature = inspect.signature(fn)
  kept = [
    parameter
    for name, parameter in signature.parameters.items()
    if parameter.default is parameter.empty
    or name in ("scale", "is_causal")
    or name.startswith(("mask", "key_mask"))
  ]
  kept = [p for p in kept if p.name not in options]
  # A mask of keys is instead of one of pairs, which is there to be refused.
  if "key_mask" in signature.parameters:
    kept = [p for p in kept if p.name != "mask"]
  run.__signature__ = signature.replace(parameters=kept)  # type: ignore
  run.__name__ = f"interpreted_{fn.__name__}"
  return run


def interpreted_ntk_attention(
  query: Any,
  key: Any,
  value: Any,
  *,
  scale: Any = None,
  is_causal: bool = False,
  mask: Any = None,
) -> Any:
  """NTK-Attention by its kernels, interpreted."""
  return ntk_attention(
    query,
    key,
    value,
    _quadratic_state(key.shape[-3]),
    feature_map=taylor_map(2),
    mask=mask,
    scale=scale,
    is_causal=is_causal,
    implementation="pallas_interpret",
  )


_MASK = np.arange(T)[None, None, None] % 3 > 0
_KEY_MASK = np.broadcast_to(np.arange(T) % 3 > 0, (B, T))
_PRECISION = ("highest", "nonsense")
_IMPLEMENTATION = ("xla", "nonsense")

_ALL = (
  Member(
    fn=softmax_attention,
    oracle=_softmax_oracle,
    options=lambda num_keys: {"block_sizes": BlockSizes(7, 5, 6, 4)},
    effects={
      "bias": np.linspace(0, 1, T, dtype=np.float32)[None, None, None],
      "mask": _MASK,
      "scale": 0.25,
      "is_causal": True,
      "query_seq_lengths": _full(T - 3, B),
      "key_value_seq_lengths": _full(T - 3, B),
      "local_window_size": (3, 2),
      "return_residual": True,
    },
    neutral={
      "block_sizes": (BlockSizes(4, 4, 4, 4), 128),
      "implementation": _IMPLEMENTATION,
      "precision": _PRECISION,
    },
  ),
  Member(
    fn=topk_attention,
    oracle=_topk_oracle,
    options=_topk_options,
    effects={
      "k": 3,
      "mask": _MASK,
      "scale": 0.25,
      "is_causal": True,
      "return_info": True,
    },
    neutral={
      "chunk_size": (None, 0),
      "implementation": _IMPLEMENTATION,
      "precision": _PRECISION,
    },
  ),
  Member(
    fn=linear_attention,
    oracle=_linear_oracle,
    options=lambda num_keys: {},
    effects={
      "feature_map": "relu",
      "normalize": False,
      "key_mask": _KEY_MASK,
      "min_denominator": 1e4,
      "scale": 0.25,
      "is_causal": True,
    },
    neutral={
      "mask": (None, _MASK),
      "bias": (None, np.float32(_MASK)),
      "implementation": _IMPLEMENTATION,
      "precision": _PRECISION,
    },
    refuses=("mask", "bias"),
  ),
  Member(
    fn=relu_attention,
    oracle=_relu_oracle,
    options=_relu_options,
    effects={
      "threshold": 0.5,
      "alpha": 1,
      "mask": _MASK,
      "scale": 0.25,
      "is_causal": True,
    },
    neutral={"implementation": _IMPLEMENTATION, "precision": _PRECISION},
  ),
  Member(
    fn=ntk_attention,
    oracle=functools.partial(_prefix_oracle, log_kernel=_quadratic),
    options=lambda num_keys: {
      "state": _quadratic_state(num_keys),
      "feature_map": taylor_map(2),
      "block_sizes": BlockSizes(7, 5, 6, 4),
    },
    effects={
      "state": _quadratic_state(T, seed=1),
      # As many features, and others.
      "feature_map": favor_map(jax.random.key(0), H, 45),
      "bias": np.linspace(0, 1, T, dtype=np.float32)[None, None, None],
      "mask": _MASK,
      "scale": 0.25,
      "is_causal": True,
      "return_info": True,
    },
    neutral={
      "allow_odd": (True, "yes"),
      "block_sizes": (BlockSizes(4, 4, 4, 4), 128),
      "implementation": _IMPLEMENTATION,
      "precision": _PRECISION,
    },
    has_prefix=True,
    no_keys=True,
  ),
  Member(
    fn=prefix_attention,
    oracle=_prefix_oracle,
    options=_prefix,
    effects={
      "prefix_key": _prefix(T, seed=1)["prefix_key"],
      "prefix_value": _prefix(T, seed=1)["prefix_value"],
      "prefix_bias": 1.0,
      "count_normalized": True,
      "mask": _MASK,
      "scale": 0.25,
      "is_causal": True,
    },
    neutral={
      "implementation": _IMPLEMENTATION,
      "precision": _PRECISION,
    },
    has_prefix=True,
  ),
  Member(
    fn=polynomial_attention,
    oracle=_polynomial_oracle,
    options=_polynomial_options,
    effects={
      "degree": 4,
      "radius": 1.0,
      "coefficients": "taylor",
      "scale": 0.25,
      "is_causal": True,
      "key_mask": np.broadcast_to(_MASK[:, 0, 0], (B, T)),
      "center_keys": True,
      "key_shift": _full(np.float32(0.5), K, H),
    },
    neutral={
      # Each needs another option beside it.
      "sigma": (None, 0.3),
      "mask": (None, _MASK),
      "bias": (None, np.float32(_MASK)),
      "sketch_dim": (None, 16),
      "rng": (None, np.zeros(2, np.uint32)),
      "allow_odd": (True, 1),
      "local": ("exact", "nonsense"),
      "backward": ("closed_form", "nonsense"),
      "chunk_size": (None, 0),
      "implementation": _IMPLEMENTATION,
      "precision": _PRECISION,
    },
    refuses=("mask", "bias"),
  ),
  Member(
    fn=tensor_attention,
    oracle=_tensor_oracle,
    options=lambda num_keys: {"chunk_size": 5},
    effects={
      "scale": 0.25,
      "is_causal": True,
      "key_mask1": _KEY_MASK,
      "key_mask2": _KEY_MASK,
    },
    neutral={
      "chunk_size": (None, 0),
      "implementation": _IMPLEMENTATION,
      "precision": _PRECISION,
    },
    in_pairs=True,
  ),
  Member(
    fn=polynomial_tensor_attention,
    oracle=functools.partial(_tensor_oracle, kernel=_quadratic_minimax),
    options=lambda num_keys: {"degree": 2, "radius": 3.0, "chunk_size": 5},
    effects={
      "degree": 4,
      "radius": 1.0,
      "coefficients": "taylor",
      "scale": 0.25,
      "is_causal": True,
      "key_mask1": _KEY_MASK,
      "key_mask2": _KEY_MASK,
    },
    neutral={
      "mask": (None, _MASK),
      "bias": (None, np.float32(_MASK)),
      "backward": ("closed_form", "nonsense"),
      "chunk_size": (None, 0),
      "implementation": _IMPLEMENTATION,
      "precision": _PRECISION,
    },
    refuses=("mask", "bias"),
    in_pairs=True,
  ),
  Member(
    fn=_interpreted(softmax_attention, block_sizes=BlockSizes(7, 5, 6, 4)),
    oracle=_softmax_oracle,
    options=lambda num_keys: {},
    effects={"mask": _MASK, "scale": 0.25, "is_causal": True},
    neutral={},
    narrow_weights=True,
    adapted=True,
  ),
  Member(
    fn=_interpreted(relu_attention, **_relu_options(0)),
    oracle=_relu_oracle,
    options=lambda num_keys: {},
    effects={"mask": _MASK, "scale": 0.25, "is_causal": True},
    neutral={},
    narrow_weights=True,
    adapted=True,
  ),
  Member(
    fn=interpreted_ntk_attention,
    oracle=functools.partial(_prefix_oracle, log_kernel=_quadratic),
    options=lambda num_keys: {},
    effects={"mask": _MASK, "scale": 0.25, "is_causal": True},
    neutral={},
    has_prefix=True,
    narrow_weights=True,
    adapted=True,
  ),
  Member(
    fn=_interpreted(polynomial_attention, **_polynomial_options(0)),
    oracle=_polynomial_oracle,
    options=lambda num_keys: {},
    effects={"scale": 0.25, "is_causal": True, "key_mask": _KEY_MASK},
    neutral={},
    adapted=True,
    unmapped=True,
  ),
  Member(
    fn=_interpreted(tensor_attention, chunk_size=7),
    oracle=_tensor_oracle,
    options=lambda num_keys: {},
    effects={
      "scale": 0.25,
      "is_causal": True,
      "key_mask1": _KEY_MASK,
      "key_mask2": _KEY_MASK,
    },
    neutral={},
    in_pairs=True,
    narrow_weights=True,
    adapted=True,
  ),
  Member(
    fn=streamed_moments,
    oracle=_polynomial_oracle,
    options=lambda num_keys: {},
    effects={"scale": 0.25, "key_mask": _KEY_MASK},
    neutral={},
    adapted=True,
  ),
)

MEMBERS = {member.fn.__name__: member for member in _ALL}
