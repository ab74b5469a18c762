"""Attention by prefix sums of monomials: kernels, or the scans in their place.

A ``custom_vjp`` an order of differentiation; what the forward pass keeps for
the backward pass is common to all implementations.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxattn import _compat
from jaxattn._dispatch import Branch, dispatch
from jaxattn.features import _chunks, _scan
from jaxattn.features._chunks import Spec
from pallas_kernels.polynomial_attention import mosaic_gpu, mosaic_tpu
from pallas_kernels.polynomial_attention.operands import Operands, Options

Arrays = tuple[jax.Array, ...]


class Call(NamedTuple):
  """Static facts of one call.

  Attributes:
    implementation: as users name it.
    spec: of the kernel, a polynomial; without a sketch, and with the gradient
      of what is computed.
    on_mesh: whether the operands lie on a mesh with explicit axes.
  """

  implementation: str | None
  spec: Spec
  on_mesh: bool


def attend(
  call: Call, query: jax.Array, key: jax.Array, value: jax.Array
) -> jax.Array:
  """As ``_scan.attend``, by the implementation that is asked for."""

  def attend_pairs(*operands: jax.Array) -> jax.Array:
    return _attention(call, *operands)[0]

  return _scan.over_pairs(attend_pairs, query, key, value, call.spec)


def _forward_pass(call: Call, *operands: jax.Array) -> Any:
  def over_groups(*operands: jax.Array) -> Any:
    return _over_groups(_scan.forward, call.spec, operands)

  def adapt(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def run(*operands: jax.Array) -> Any:
      return kernel(Operands(*operands), _options(call, operands))

    return run

  branches = _branches(call, operands, over_groups, "forward", adapt)
  return dispatch(call.implementation, branches, *operands)


_attention: Any = jax.custom_vjp(_forward_pass, nondiff_argnums=(0,))


def _attention_fwd(call: Call, *operands: jax.Array) -> Any:
  results = _attention(call, *operands)
  return results, (operands, results)


def _attention_bwd(call: Call, residuals: Any, bars: Any) -> Arrays:
  operands, results = residuals
  # But for the output, results go to _gradients alone, which does not
  # differentiate by them: their cotangents are zero.
  bars = _gradients(call, operands, results, bars[0])
  return tuple(map(_compat.sum_like, bars, operands))


_attention.defvjp(_attention_fwd, _attention_bwd)


def _backward_pass(
  call: Call, operands: Arrays, results: Any, out_bar: jax.Array
) -> Arrays:
  def over_groups(*arrays: Any) -> Arrays:
    return _over_groups(_scan.backward, call.spec, arrays)

  def adapt(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arrays: Any) -> Arrays:
      *operands, out, denominator, total, out_bar = arrays
      sums_bar = _scan.divide_bwd(out_bar, out, denominator, call.spec)
      options = _options(call, operands)
      return tuple(kernel(Operands(*operands), options, total, sums_bar))

    return run

  branches = _branches(call, operands, over_groups, "backward", adapt)
  return dispatch(call.implementation, branches, *operands, *results, out_bar)


_gradients: Any = jax.custom_vjp(_backward_pass, nondiff_argnums=(0,))


def _gradients_fwd(
  call: Call, operands: Arrays, results: Any, out_bar: jax.Array
) -> Any:
  bars = _gradients(call, operands, results, out_bar)
  return bars, (operands, out_bar)


def _gradients_bwd(call: Call, residuals: Any, bars: Any) -> Any:
  # Kernels have no derivatives: those of higher order are JAX's, of gradients
  # as a function of the operands.
  operands, out_bar = residuals
  scans = functools.partial(_scan.attend_pairs, spec=call.spec)

  def gradients(operands: Arrays, out_bar: jax.Array) -> Any:
    return jax.vjp(scans, *operands)[1](out_bar)

  operands_bar, out_bar_bar = jax.vjp(gradients, operands, out_bar)[1](bars)
  operands_bar = tuple(map(_compat.sum_like, operands_bar, operands))
  return operands_bar, None, _compat.sum_like(out_bar_bar, out_bar)


_gradients.defvjp(_gradients_fwd, _gradients_bwd)


def _over_groups(pass_: Any, spec: Spec, arrays: Any) -> Any:
  num_features = spec.num_features(arrays[1].shape[1])
  run = functools.partial(_unpacked, pass_, spec)
  return _scan.over_groups(run, arrays, num_features, spec)


def _unpacked(pass_: Any, spec: Spec, arrays: Any) -> Any:
  return pass_(*arrays, spec)


def _branches(
  call: Call, operands: Any, xla: Any, name: str, adapt: Any
) -> dict[str, Any]:
  """Implementations of a pass, named as users name them."""
  x, options = Operands(*operands), _options(call, operands)

  def branch(platform: str, kernels: Any) -> Branch:
    reason = kernels.supports(x, options)
    if call.on_mesh:
      reason = "a mesh with explicit axes needs jax.shard_map around the call"
    return Branch(adapt(getattr(kernels, name)), platform, reason)

  interpret = functools.partial(getattr(mosaic_tpu, name), interpret=True)
  mapped = "JAX's interpreter writes no part of what varies in a jax.shard_map"
  alone = None if not _compat.varying_axes(*operands) else mapped
  return {
    "xla": Branch(xla),
    "pallas": (branch("tpu", mosaic_tpu), branch("cuda", mosaic_gpu)),
    "pallas_interpret": Branch(adapt(interpret), unsupported=alone),
  }


def _options(call: Call, operands: Any) -> Options:
  spec, dim = call.spec, operands[1].shape[1]
  assert spec.coefficients is not None
  return Options(
    _chunks.static_weights(dim, spec.coefficients),
    len(spec.coefficients) - 1,
    spec.is_causal,
    spec.radius if spec.exact_local else None,
    spec.chunk_size,
    spec.precision,
  )
