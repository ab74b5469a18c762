"""Exact attention to pairs: kernels, or the blocks in XLA in their place.

A ``custom_vjp`` an order of differentiation; output and log-sum-exp are what
the forward pass keeps for the backward pass, whichever implementation it is.
"""

import functools
from typing import Any, NamedTuple

import jax

from jaxattn import _checks, _compat
from jaxattn._dispatch import Branch, dispatch
from jaxattn.attention import _tensor_blocks
from pallas_kernels.tensor_attention import mosaic_tpu
from pallas_kernels.tensor_attention.operands import (
  Gradients,
  Operands,
  Options,
)

_IMPLEMENTATIONS = (None, "xla", "pallas", "pallas_interpret")


class _Call(NamedTuple):
  """Static facts of one call.

  Attributes:
    implementation: as asked for.
    options: of the attention.
    on_mesh: whether operands lie on a mesh with explicit axes.
  """

  implementation: str | None
  options: Options
  on_mesh: bool


def attend(
  implementation: str | None, options: Options, x: Operands
) -> jax.Array:
  """Output (B, T, N, Hv) by the implementation that is asked for."""
  _checks.check_choice("implementation", implementation, _IMPLEMENTATIONS)
  call = _Call(implementation, options, _compat.has_explicit_axes(x.query))
  run = functools.partial(_attend, call)
  return _compat.over_explicit_axes(run, x.query)(x)


@functools.partial(jax.jit, static_argnums=0)
def _attend(call: _Call, x: Operands) -> jax.Array:
  return _attention(call, x)[0].astype(x.query.dtype)


def _forward_pass(call: _Call, x: Operands) -> tuple[jax.Array, jax.Array]:
  return _dispatch(call, "forward", x)


_attention: Any = jax.custom_vjp(_forward_pass, nondiff_argnums=(0,))


def _attention_fwd(call: _Call, x: Operands) -> Any:
  out, lse = _attention(call, x)
  return (out, lse), (x, out, lse)


def _attention_bwd(call: _Call, residuals: Any, bars: Any) -> tuple[Operands]:
  x, out, lse = residuals
  # The log-sum-exp goes to _gradients alone, which does not differentiate by
  # it: its cotangent is zero.
  bars = _gradients(call, x, out, lse, bars[0])
  return (Operands(*_sum_like(bars, x)),)


_attention.defvjp(_attention_fwd, _attention_bwd)


def _backward_pass(call: _Call, x: Operands, *rest: jax.Array) -> Gradients:
  return _dispatch(call, "backward", x, *rest)


_gradients: Any = jax.custom_vjp(_backward_pass, nondiff_argnums=(0,))


def _gradients_fwd(
  call: _Call, x: Operands, out: jax.Array, lse: jax.Array, out_bar: jax.Array
) -> Any:
  return _gradients(call, x, out, lse, out_bar), (x, out_bar)


def _gradients_bwd(call: _Call, residuals: Any, bars: Gradients) -> Any:
  # Kernels have no derivatives: those of higher order are JAX's, of gradients
  # as a function of the operands.
  x, out_bar = residuals

  def attend(*floats: jax.Array) -> jax.Array:
    return _tensor_blocks.forward(Operands(*floats, *x[5:]), call.options)[0]

  def gradients(floats: Any, out_bar: jax.Array) -> Any:
    return jax.vjp(attend, *floats)[1](out_bar)

  _, vjp = jax.vjp(gradients, x[:5], out_bar)
  floats_bar, out_bar_bar = vjp(tuple(bars))
  x_bar = Operands(*_sum_like(floats_bar, x))
  return x_bar, None, None, _compat.sum_like(out_bar_bar, out_bar)


_gradients.defvjp(_gradients_fwd, _gradients_bwd)


def _sum_like(bars: Any, x: Operands) -> list[jax.Array]:
  """Cotangents as ``shard_map`` wants them."""
  return [_compat.sum_like(*pair) for pair in zip(bars, x[:5], strict=True)]


def _dispatch(call: _Call, name: str, *args: Any) -> Any:
  """Runs a pass of the implementation that is asked for."""

  def branch(module: Any, **kwargs: Any) -> Any:
    def run(x: Operands, *rest: jax.Array) -> Any:
      return getattr(module, name)(x, call.options, *rest, **kwargs)

    return run

  reason = mosaic_tpu.supports(args[0], call.options)
  if call.on_mesh:
    reason = "a mesh with explicit axes needs jax.shard_map around the call"
  branches = {
    "xla": Branch(branch(_tensor_blocks)),
    "pallas": (Branch(branch(mosaic_tpu), "tpu", reason),),
    "pallas_interpret": Branch(branch(mosaic_tpu, interpret=True)),
  }
  return dispatch(call.implementation, branches, *args)
