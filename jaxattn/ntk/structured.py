r"""Tangent kernels from the dense layers of a model, without a gradient.

The derivative of an output by the weights of a dense map is an outer product.
A model that tells the inputs of its maps, and takes perturbations of their
outputs (*taps*), gives both factors, and inner products of outer products are
products of inner products. Source: Novak et al., arXiv 2206.08720, section 3.3.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks
from jaxattn.ntk import _blocks

_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class DenseTap(NamedTuple):
  r"""One dense map of a model, as :func:`structured_ntk` wants to see it.

  Attributes:
    inputs: (n, ..., d_in), what its weights multiply: of
      :math:`z = c\, W h + \beta b` this is :math:`c\, h`, with
      :math:`\beta` as one more entry if there is a bias. Axes between the first
      and the last are places that share the weights (positions of a sequence,
      passes of a loop).
    outputs: (n, ..., d_out), z with its tap added.
  """

  inputs: jax.Array
  outputs: jax.Array


ApplyWithTaps = Callable[..., tuple[jax.Array, tuple[DenseTap, ...]]]


def structured_ntk(
  apply_with_taps: ApplyWithTaps,
  params: Any,
  x1: Any,
  x2: Any = None,
  *,
  chunk_size: int | None = None,
) -> jax.Array:
  r"""Tangent kernel of a model that is built of dense layers.

  The derivative by the weights of :math:`z = c\, W h` is the outer product of
  :math:`\delta_a = \partial f_a / \partial z` and :math:`c\, h`, so the layer
  adds

  .. math:: H[i, a, j, b] \mathrel{+}= \sum_{t, t'}
    (c\, h_{it} \cdot c\, h_{jt'})\, (\delta_{iat} \cdot \delta_{jbt'})

  over the places t that share W. Gradients are only formed where there are so
  many places that this is less work. Parameters outside of the layers that
  ``apply_with_taps`` lists count as frozen.

  Args:
    apply_with_taps: ``(params, x, taps=None) -> (y, layers)``: y (n, O), and a
      tuple with one :class:`DenseTap` for each trained dense map. ``taps`` is a
      tuple of arrays like their outputs, each to be added to its z. Hashed as
      in :func:`empirical_ntk`. :func:`jaxattn.models.mlp_with_taps` is one.
    params: its parameters.
    x1: (n1, ...) data, or a pytree of such arrays.
    x2: (n2, ...) data; None = ``x1``.
    chunk_size: examples visited at a time; memory only. None = as many as hold
      256 MiB of h and delta.

  Returns:
    (n1, O, n2, O).

  Raises:
    ValueError: if ``apply_with_taps`` does not take taps or does not return
      what it should, ``x1`` and ``x2`` differ beyond their first axis, or
      ``chunk_size`` < 1.

  Cost:
    n1 n2 O^2 times the sum of all widths in time; n O times it in memory.

  Source:
    arXiv 2206.08720, section 3.3, for dense layers.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.ntk import DenseTap, structured_ntk
    >>> def linear(params, x, taps=None):
    ...   z = x @ params + (0 if taps is None else taps[0])
    ...   return z, (DenseTap(x, z),)
    >>> kernel = structured_ntk(linear, jnp.ones((2, 3)), jnp.eye(2))
    >>> print(kernel[:, 0, :, 0])
    [[1. 0.]
     [0. 1.]]
  """
  x1, x2 = _blocks.check_data(x1, x2)
  out, layers = _check_taps(apply_with_taps, params, x1)
  if chunk_size is None:
    n, num_outputs = out.shape
    floats = sum(
      (tap.inputs.size + num_outputs * tap.outputs.size) // n for tap in layers
    )
    chunk_size = _blocks.largest_chunk(floats * out.dtype.itemsize)
  _checks.check_integer("chunk_size", chunk_size, 1, None)
  return _structured_ntk(apply_with_taps, params, x1, x2, chunk_size)


def _check_taps(
  apply_with_taps: ApplyWithTaps, params: Any, x: Any
) -> tuple[jax.ShapeDtypeStruct, tuple[DenseTap, ...]]:
  wanted = (
    "apply_with_taps must be (params, x, taps=None) -> (y, tuple of DenseTap)"
  )
  other = "; models without taps are for empirical_ntk"
  if "taps" not in inspect.signature(apply_with_taps).parameters:
    raise ValueError(f"{wanted}, got one that takes no taps{other}")
  result = jax.eval_shape(apply_with_taps, params, x)
  is_pair = isinstance(result, tuple) and len(result) == 2
  layers = result[1] if is_pair else ()
  if (
    not isinstance(layers, tuple)
    or not layers
    or not all(isinstance(tap, DenseTap) for tap in layers)
  ):
    raise ValueError(
      f"{wanted}, got {jax.tree.map(jnp.shape, result)} back{other}"
    )
  out = _blocks.check_output(lambda *_: result[0], params, x)
  for tap in layers:
    _checks.check_shape(
      "inputs of a DenseTap",
      tap.inputs,
      (*tap.outputs.shape[:-1], None),
      "outputs but for the last axis",
    )
  return out, layers


@functools.partial(jax.jit, static_argnums=(0, 4))
def _structured_ntk(
  apply_with_taps: ApplyWithTaps, params: Any, x1: Any, x2: Any, chunk_size: int
) -> jax.Array:
  def of_blocks(x1: Any, x2: Any) -> jax.Array:
    layers1 = _layers(apply_with_taps, params, x1)
    layers2 = layers1 if x2 is x1 else _layers(apply_with_taps, params, x2)
    terms = [_layer_ntk(*a, *b) for a, b in zip(layers1, layers2)]
    return functools.reduce(jnp.add, terms)

  return _blocks.blocked_gram(of_blocks, x1, x2, chunk_size=chunk_size)


def _layers(
  apply_with_taps: ApplyWithTaps, params: Any, x: Any
) -> list[tuple[jax.Array, jax.Array]]:
  """Of each layer the inputs (n, T, d_in) and derivatives (n, O, T, d_out)."""

  def of_one(taps: Any, x: Any) -> tuple[jax.Array, Any]:
    x = jax.tree.map(lambda y: y[None], x)
    taps = [tap[None] for tap in taps]
    y, layers = apply_with_taps(params, x, tuple(taps))
    return y[0], [tap.inputs[0] for tap in layers]

  _, layers = jax.eval_shape(apply_with_taps, params, x)
  zeros = [
    jnp.zeros(tap.outputs.shape[1:], tap.outputs.dtype) for tap in layers
  ]
  derivatives = jax.vmap(jax.jacrev(of_one, has_aux=True), in_axes=(None, 0))
  deltas, inputs = derivatives(zeros, x)

  def flat(y: jax.Array, lead: int) -> jax.Array:
    places = math.prod(y.shape[lead:-1])
    return y.reshape(*y.shape[:lead], places, y.shape[-1])

  return [(flat(h, 1), flat(d, 2)) for h, d in zip(inputs, deltas)]


def _layer_ntk(
  h1: jax.Array, delta1: jax.Array, h2: jax.Array, delta2: jax.Array
) -> jax.Array:
  (_, places, d_in), d_out = h1.shape, delta1.shape[-1]
  if places == 1:
    inner = _einsum("itp,jtp->ij", h1, h2)
    return inner[:, None, :, None] * _einsum("iatq,jbtq->iajb", delta1, delta2)
  if places**2 * (d_in + d_out) > d_in * d_out:
    gradient1 = _einsum("iatq,itp->iapq", delta1, h1)
    gradient2 = _einsum("iatq,itp->iapq", delta2, h2)
    return _einsum("iapq,jbpq->iajb", gradient1, gradient2)

  def add(total: jax.Array, place: Any) -> tuple[jax.Array, None]:
    h, delta = place
    inner = _einsum("itp,jp->itj", h1, h)
    outer = _einsum("iatq,jbq->iatjb", delta1, delta)
    return total + _einsum("itj,iatjb->iajb", inner, outer), None

  shape = (*delta1.shape[:2], *delta2.shape[:2])
  each = jnp.moveaxis(h2, 1, 0), jnp.moveaxis(delta2, 2, 0)
  return lax.scan(add, jnp.zeros(shape, delta1.dtype), each)[0]
