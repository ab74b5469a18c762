"""The attention functions that the conformance suite runs over.

To add one: write a :class:`Member`. A public function of
``jaxattn.attention`` whose first parameters are query, key and value and that
is not listed fails the suite.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.attention import BlockSizes, softmax_attention
from jaxattn.attention.topk import topk_attention
from tests._dense import dense_attention

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
  """

  fn: Callable[..., Any]
  oracle: Callable[..., jax.Array]
  options: Callable[[int], Mapping[str, Any]]
  effects: Mapping[str, Any]
  neutral: Mapping[str, tuple[Any, Any]]

  def takes(self, name: str) -> bool:
    """Whether the function has a parameter of this name."""
    return name in inspect.signature(self.fn).parameters

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
      options["key_mask"] = seen[..., 0, 0, :]
    options = dict(self.options(key.shape[-3])) | options
    return self.fn(query, key, value, **options)

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


def _full(fill: Any, *shape: int) -> np.ndarray:
  return np.full(shape, fill)


_MASK = np.arange(T)[None, None, None] % 3 > 0
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
)

MEMBERS = {member.fn.__name__: member for member in _ALL}
