"""Operations that have kernels: what to run, at which sizes, against what."""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxattn.attention import (
  PrefixState,
  ntk_attention,
  polynomial_attention,
  relu_attention,
  softmax_attention,
  tensor_attention,
)
from jaxattn.features import apply_feature_map
from pallas_kernels import flash_attention as flash
from pallas_kernels import ntk_attention as ntk
from pallas_kernels import polynomial_attention as polynomial
from pallas_kernels import relu_attention as relu
from pallas_kernels import small_cache_attention as small_cache
from pallas_kernels import tensor_attention as tensor
from pallas_kernels.polynomial_attention.operands import multinomial_weights

Shapes = tuple[tuple[int, ...], ...]


def _shapes(length: int, heads: int, dim: int) -> Shapes:
  """Queries, keys and values; two heads of queries share one of keys."""
  keys = 1, length, heads // 2, dim
  return (1, length, heads, dim), keys, keys


def _tensor_shapes(length: int, firsts: int, heads: int, dim: int) -> Shapes:
  """Queries, first and second keys, and their values; few first ones."""
  first, second = ((1, s, heads // 2, dim) for s in (firsts, length))
  return (1, length, heads, dim), first, second, first, second


def _ntk_shapes(length: int, heads: int, dim: int) -> Shapes:
  """Queries, keys and values; a state of as many features as numbers."""
  return *_shapes(length, heads, dim), (heads // 2, dim, dim), (heads // 2, dim)


class Operation(NamedTuple):
  """One operation that has kernels.

  Attributes:
    name: as its folder in ``pallas_kernels``.
    fn: ``fn(*operands, implementation=...)``, of "xla", "pallas" and
      "pallas_interpret"; a function of operands that are normal.
    reference: ``reference(*operands)``, the dense formula.
    shapes: of the operands where kernels are compiled; no multiple of a block.
    tiny: the same where they are interpreted; still more than one block.
    is_exact: whether it is causal softmax attention, which has more peers.
  """

  name: str
  fn: Callable[..., Any]
  reference: Callable[..., Any]
  shapes: Shapes = _shapes(4000, 8, 128)
  tiny: Shapes = _shapes(1100, 2, 8)
  is_exact: bool = False


def peers(operation: Operation) -> dict[str, Callable[..., Any]]:
  """What may compute the same on this platform; calls fail if it cannot."""
  xla = functools.partial(operation.fn, implementation="xla")
  found: dict[str, Callable[..., Any]] = {"xla": xla}
  if operation.is_exact and jax.default_backend() == "gpu":
    found["cudnn"] = functools.partial(
      jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"
    )
  if operation.is_exact and importlib.util.find_spec("tokamax"):
    found["tokamax"] = _tokamax
  return found


def _tokamax(*operands: jax.Array) -> Any:
  tokamax = importlib.import_module("tokamax")
  return tokamax.dot_product_attention(*operands, is_causal=True)


def _small_cache(*operands: jax.Array, implementation: str) -> Any:
  if implementation == "xla":
    return softmax_attention(*operands, is_causal=True, implementation="xla")
  if implementation == "pallas" and jax.default_backend() != "tpu":
    raise NotImplementedError("the kernel cannot run here: it needs a TPU")
  names = {"pallas": "mosaic_tpu", "pallas_interpret": "interpret"}
  return small_cache.small_cache_attention(
    *operands, is_causal=True, implementation=names[implementation]
  )


def _ntk(
  query: jax.Array, key: jax.Array, value: jax.Array, z: jax.Array,
  log_k: jax.Array, *, implementation: str,
) -> Any:  # fmt: skip
  return ntk_attention(
    query,
    key,
    value,
    PrefixState(z, jnp.exp(log_k)),
    is_causal=True,
    implementation=implementation,
  )


def _ntk_reference(
  query: jax.Array, key: jax.Array, value: jax.Array, z: jax.Array,
  log_k: jax.Array,
) -> Any:  # fmt: skip
  scale = query.shape[-1] ** -0.5
  return ntk.ntk_attention(
    query,
    key,
    value,
    apply_feature_map("elu", query, scale=scale),
    z,
    jnp.exp(log_k),
    is_causal=True,
    implementation="reference",
  )


def _polynomial_reference(*operands: jax.Array) -> Any:
  coefficients = 1.0, 1.0, 0.5
  return polynomial.polynomial_attention(
    *operands,
    degree=2,
    weights=multinomial_weights(operands[1].shape[-1], coefficients),
    is_causal=True,
    local="polynomial",
    implementation="reference",
  )


_softmax_reference = functools.partial(
  flash.flash_attention, is_causal=True, implementation="reference"
)

# Products of three normal numbers have large outliers, and the kernel rounds
# two factors to 16 bits: of logits much above 1 little would be left.
_TENSOR_SCALE = 0.1

OPERATIONS = (
  Operation(
    "flash_attention",
    functools.partial(softmax_attention, is_causal=True),
    _softmax_reference,
    is_exact=True,
  ),
  Operation(
    "polynomial_attention",
    functools.partial(
      polynomial_attention,
      degree=2,
      radius=1.0,
      coefficients="taylor",
      is_causal=True,
      local="polynomial",
    ),
    _polynomial_reference,
    shapes=_shapes(4000, 8, 32),
  ),
  Operation(
    "ntk_attention",
    _ntk,
    _ntk_reference,
    shapes=_ntk_shapes(4000, 8, 128),
    tiny=_ntk_shapes(1100, 2, 8),
  ),
  Operation(
    "relu_attention",
    functools.partial(relu_attention, alpha=2, is_causal=True),
    functools.partial(
      relu.relu_attention, alpha=2, is_causal=True, implementation="reference"
    ),
  ),
  Operation(
    "tensor_attention",
    functools.partial(tensor_attention, scale=_TENSOR_SCALE),
    functools.partial(
      tensor.tensor_attention, scale=_TENSOR_SCALE, implementation="reference"
    ),
    shapes=_tensor_shapes(1000, 100, 2, 64),
    tiny=_tensor_shapes(520, 10, 2, 8),
  ),
  Operation(
    "small_cache_attention", _small_cache, _softmax_reference, is_exact=True
  ),
)
