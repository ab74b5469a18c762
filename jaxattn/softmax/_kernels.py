"""The kernels of exact attention as branches of the dispatcher."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxattn._dispatch import Branch
from jaxattn.softmax import _call
from pallas_kernels.flash_attention import mosaic_gpu, mosaic_tpu, operands

Branches = dict[str, Branch | Sequence[Branch]]


def forward(spec: _call.Spec, x: _call.Operands) -> Branches:
  """Kernels of the forward pass, named as users name them."""

  def adapt(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: _call.Operands) -> tuple[jax.Array, jax.Array]:
      out, lse = kernel(_flat(x), _options(spec))
      heads = x.query.shape[:4]
      return out.reshape(*heads, -1), lse.reshape(heads)

    return run

  return _branches(spec, x, "forward", adapt)


def backward(spec: _call.Spec, x: _call.Operands) -> Branches:
  """Kernels of the backward pass, named as users name them."""

  def adapt(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: _call.Operands, *residuals: jax.Array) -> _call.Gradients:
      flat = (_merge_heads(y) for y in residuals)
      bars = kernel(_flat(x), _options(spec), *flat)
      return _call.Gradients(
        bars.query.reshape(x.query.shape),
        bars.key,
        bars.value,
        None if x.bias is None else bars.bias.reshape(x.bias.shape),
      )

    return run

  return _branches(spec, x, "backward", adapt)


def _branches(
  spec: _call.Spec, x: _call.Operands, name: str, adapt: Callable[..., Any]
) -> Branches:
  call = _flat(x), _options(spec)
  platforms = (("tpu", mosaic_tpu), ("cuda", mosaic_gpu))
  interpret = functools.partial(getattr(mosaic_tpu, name), interpret=True)
  return {
    "pallas": tuple(
      Branch(adapt(getattr(kernels, name)), platform, kernels.supports(*call))
      for platform, kernels in platforms
    ),
    "pallas_interpret": Branch(adapt(interpret)),
  }


def _options(spec: _call.Spec) -> operands.Options:
  return operands.Options(
    spec.scale, *spec.band, spec.block_sizes, spec.precision
  )


def _flat(x: _call.Operands) -> operands.Operands:
  """The operands as kernels take them: query heads on one axis."""

  def scores(y: jax.Array | None) -> jax.Array | None:
    return None if y is None else y.reshape(y.shape[0], -1, *y.shape[3:])

  return operands.Operands(
    _merge_heads(x.query),
    x.key,
    x.value,
    scores(x.bias),
    scores(x.mask),
    query_lengths=x.query_lengths,
    key_lengths=x.key_lengths,
    offset=x.offset,
  )


def _merge_heads(y: jax.Array) -> jax.Array:
  """(B, T, K, G, ...) -> (B, T, N, ...)."""
  return y.reshape(*y.shape[:2], -1, *y.shape[4:])
