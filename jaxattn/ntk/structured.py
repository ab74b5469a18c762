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
from jaxattn.numerics._dtypes import accumulator


class DenseTap(NamedTuple):
  r"""One dense map of a model, as :func:`structured_ntk` wants to see it.

  Attributes:
    inputs: (n, ..., d_in), what its weights multiply: of
      :math:`z = c\, W h + \beta b` this is :math:`c\, h`, with
      :math:`\beta` as one more entry if there is a bias. Axes between the first
      and the last are places that share the weights (positions of a sequence,
      passes of a loop). Or integers (n, ...), which row of a table is looked up
      there: z is then that row.
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
      Weights that are used twice are one tap, both uses stacked along an axis
      of places: as two taps they would count as two layers.
    params: its parameters.
    x1: (n1, ...) data, or a pytree of such arrays.
    x2: (n2, ...) data; None = ``x1``.
    chunk_size: most examples visited at a time; memory only. None = as many as
      hold 512 MiB of h, delta and gradients.

  Returns:
    (n1, O, n2, O).

  Raises:
    ValueError: if ``apply_with_taps`` does not take taps or does not return
      what it should, ``x1`` and ``x2`` differ beyond their first axis, or
      ``chunk_size`` < 1.

  Cost:
    With c = min(n, chunk_size), T places and sizes d_in and d_out: n1 n2 O^2
    times the sum of T^2 (d_in + d_out) over the layers in time, of d_in d_out
    where that is less; 2 c O times the sum of T (d_in + d_out) in memory, and
    of d_in d_out for these layers.

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
  if chunk_size is not None:
    _checks.check_integer("chunk_size", chunk_size, 1, None)
  return _structured_ntk(apply_with_taps, params, x1, x2, chunk_size)


# --- checks, where the program is traced: once ---


def _check_taps(
  apply_with_taps: ApplyWithTaps, params: Any, x: Any
) -> tuple[jax.ShapeDtypeStruct, tuple[DenseTap, ...]]:
  wanted = (
    "apply_with_taps must be (params, x, taps=None) -> (y, tuple of DenseTap)"
  )
  other = "; models without taps are for empirical_ntk"
  taps = inspect.signature(apply_with_taps).parameters.get("taps")
  if taps is None:
    raise ValueError(f"{wanted}, got one that takes no taps{other}")
  if taps.default is inspect.Parameter.empty:
    raise ValueError(f"{wanted}, got one whose taps have no default")
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
    places = tap.outputs.shape[:-1]
    _checks.check_shape(
      "inputs of a DenseTap",
      tap.inputs,
      places if _is_table(tap.inputs) else (*places, None),
      "outputs but for the last axis",
    )
  return out, layers


def _is_table(inputs: Any) -> bool:
  return jnp.issubdtype(inputs.dtype, jnp.integer)


# --- programs ---

# Of one layer: inputs (n, T, d_in), or rows of a table (n, T), and derivatives
# (n, O, T, d_out); or None and gradients (n, O, d_in d_out).
_Layer = tuple[jax.Array | None, jax.Array]


@functools.partial(jax.jit, static_argnums=(0, 4))
def _structured_ntk(
  apply_with_taps: ApplyWithTaps,
  params: Any,
  x1: Any,
  x2: Any,
  chunk_size: int | None,
) -> jax.Array:
  x1, x2 = _blocks.check_data(x1, x2)
  out, taps = _check_taps(apply_with_taps, params, x1)

  def prepare(x: Any) -> list[_Layer]:
    return [_prepared(*layer) for layer in _layers(apply_with_taps, params, x)]

  def of_blocks(layers1: list[_Layer], layers2: list[_Layer]) -> jax.Array:
    terms = [_layer_ntk(*a, *b) for a, b in zip(layers1, layers2)]
    return functools.reduce(jnp.add, terms).astype(out.dtype)

  if chunk_size is None:
    nbytes = sum(_nbytes(tap, out.shape[1]) for tap in taps)
    chunk_size = _blocks.largest_chunk(nbytes)
  return _blocks.gram_of(prepare, of_blocks, x1, x2, chunk_size)


def _layers(
  apply_with_taps: ApplyWithTaps, params: Any, x: Any
) -> list[tuple[jax.Array, jax.Array]]:
  """Of each layer its inputs and derivatives, with one axis of places."""

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

  def flat(h: jax.Array, delta: jax.Array) -> tuple[jax.Array, jax.Array]:
    places = math.prod(delta.shape[2:-1])
    last = () if _is_table(h) else h.shape[-1:]
    return (
      h.reshape(len(h), places, *last),
      delta.reshape(*delta.shape[:2], places, delta.shape[-1]),
    )

  return [flat(*layer) for layer in zip(inputs, deltas)]


def _prepared(h: jax.Array, delta: jax.Array) -> _Layer:
  n, num_outputs, places, d_out = delta.shape
  if _is_table(h) or not _forms_gradients(places, h.shape[-1], d_out):
    return h, delta
  gradients = jnp.einsum(
    "iatq,itp->iapq",
    delta,
    h,
    precision=lax.Precision.HIGHEST,
    preferred_element_type=accumulator(delta.dtype),
  )
  return None, gradients.reshape(n, num_outputs, -1)


def _forms_gradients(places: int, d_in: int, d_out: int) -> bool:
  """Whether they are less work than pairs of places."""
  return places > 1 and places**2 * (d_in + d_out) > d_in * d_out


def _nbytes(tap: DenseTap, num_outputs: int) -> int:
  """What an example takes of memory in one layer."""
  *places, d_out = tap.outputs.shape[1:]
  places = math.prod(places)
  floats = num_outputs * places * d_out
  if not _is_table(tap.inputs):
    d_in = tap.inputs.shape[-1]
    floats += places * d_in
    if _forms_gradients(places, d_in, d_out):
      floats += num_outputs * d_in * d_out
  return floats * tap.outputs.dtype.itemsize


def _layer_ntk(
  h1: jax.Array | None,
  delta1: jax.Array,
  h2: jax.Array | None,
  delta2: jax.Array,
) -> jax.Array:
  shape = (*delta1.shape[:2], *delta2.shape[:2])
  if h1 is None or h2 is None:  # gradients
    return _blocks.inner_products(delta1, delta2, 2).reshape(shape)

  def of_places(
    h1: jax.Array, delta1: jax.Array, h2: jax.Array, delta2: jax.Array
  ) -> jax.Array:
    if _is_table(h1):
      inner = (h1[:, None] == h2[None]).astype(accumulator(delta1.dtype))
    else:
      inner = _blocks.inner_products(h1, h2, 1)
    outer = _blocks.inner_products(delta1, delta2, 2).reshape(shape)
    return inner[:, None, :, None] * outer

  if h1.shape[1] == 1:
    return of_places(h1[:, 0], delta1, h2[:, 0], delta2)
  # One pair of places at a time: nothing larger than the result.
  places1, places2 = (
    (jnp.moveaxis(h, 1, 0), jnp.moveaxis(delta, 2, 0))
    for h, delta in ((h1, delta1), (h2, delta2))
  )

  def add_row(total: jax.Array, place1: Any) -> tuple[jax.Array, None]:
    def add(total: jax.Array, place2: Any) -> tuple[jax.Array, None]:
      return total + of_places(*place1, *place2), None

    return lax.scan(add, total, places2)[0], None

  zeros = jnp.zeros(shape, accumulator(delta1.dtype))
  return lax.scan(add_row, zeros, places1)[0]
