r"""Gradients of attention layers in closed form, exact and almost linear.

One layer is :math:`\mathrm{Attn}(X) = f X W_V` with :math:`f` the softmax rows
of :math:`s\, X W X^\top` and :math:`W = W_Q W_K^\top`. From the gradient
:math:`G` of a loss in the layer's output, with :math:`h = X W_V`,
:math:`q = G h^\top` and
:math:`p = f \circ q - \mathrm{diag}((f \circ q) 1) f`,

.. math::

  \frac{dL}{dX} = s (p X W^\top + p^\top X W) + f^\top G W_V^\top, \qquad
  \frac{dL}{dW} = s X^\top p X, \qquad
  \frac{dL}{dW_V} = X^\top f^\top G.

The products :math:`s\,pX`, :math:`s\,p^\top X W` and :math:`f^\top G` are what
attention's own backward pass gives for queries :math:`X W`, keys :math:`X` and
values :math:`h`: tiled and exact, or with f of low rank in linear time. No
(T, T) matrix is formed in either. Source: arXiv 2408.13233, section 4.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxattn import _checks
from jaxattn.attention.polynomial import polynomial_attention
from jaxattn.features.coefficients import static_positive
from jaxattn.softmax.exact import softmax_attention


class LayerGradients(NamedTuple):
  """Gradients of a loss in one attention layer's input and weights.

  Source: arXiv 2408.13233.

  Attributes:
    dx: (B, T, D) in the input, all heads added up.
    dw: in the product of query and key weights, of its shape. With separate
      weights dW_Q = dW W_K and dW_K = dW^T W_Q.
    dw_v: in the value weights, of their shape.
  """

  dx: jax.Array
  dw: jax.Array
  dw_v: jax.Array


class _Polynomial(NamedTuple):
  """Options of a softmax matrix of low rank."""

  degree: int
  radius: float
  coefficients: str
  sigma: float | None


class _Softmax(NamedTuple):
  """What f is: hashable, so that equal calls are compiled once."""

  is_causal: bool
  polynomial: _Polynomial | None = None

  def attend(
    self, query: jax.Array, key: jax.Array, value: jax.Array, *, scale: Any
  ) -> jax.Array:
    """The product of f and ``value``, whose gradient is the closed form."""
    if self.polynomial is None:
      return softmax_attention(
        query, key, value, scale=scale, is_causal=self.is_causal
      )
    return polynomial_attention(
      query,
      key,
      value,
      scale=scale,
      is_causal=self.is_causal,
      backward="closed_form",
      # Neighbors, too, get the weights of the polynomial.
      local="polynomial",
      # The radius is one of the logits as they are.
      center_keys=False,
      **self.polynomial._asdict(),
    )


def attention_layer_gradients(
  x: jax.Array,
  w: jax.Array,
  w_v: jax.Array,
  g: jax.Array,
  *,
  scale: float | jax.Array | None = None,
  is_causal: bool = False,
) -> LayerGradients:
  r"""Exact gradients of an attention layer from those of its output.

  The layer is softmax(scale x w x^T) x w_v by rows. With the weights of N heads
  ``g`` holds a slice for each head: the gradient after the output projection
  times that projection's transpose. These gradients have reverse-mode
  derivatives; forward mode is not offered.

  Args:
    x: (B, T, D) input of the layer, or (T, D); floating.
    w: (D, D), the product of query and key weights, or (N, D, D) of N heads.
    w_v: (D, Dv), or (N, D, Dv).
    g: (B, T, Dv) gradient in the layer's output, or (B, T, N, Dv).
    scale: factor on the logits; None = 1 / sqrt(D). The source has 1 / D. May
      be traced.
    is_causal: row t sees rows 0 to t.

  Returns:
    A :class:`LayerGradients` of the dtype of ``x``. A residual connection adds
    its own term to ``dx``.

  Raises:
    ValueError: if shapes or dtypes do not fit, for instance "g must have shape
      (2, 16, 4), got (2, 16, 5)".

  Cost:
    O(T^2 (D + Dv)) time and O(T (D + Dv)) memory a head.

  Source:
    arXiv 2408.13233, section 4; with a mask and heads, its appendix.

  Example:
    >>> import jax
    >>> x, g = jax.random.normal(jax.random.key(0), (2, 1, 16, 4))
    >>> w, w_v = jax.random.normal(jax.random.key(1), (2, 4, 4))
    >>> dx, dw, dw_v = attention_layer_gradients(x, w, w_v, g)
    >>> dx.shape, dw.shape, dw_v.shape
    ((1, 16, 4), (4, 4), (4, 4))
  """
  _check(x, w, w_v, g, scale, is_causal)
  return _gradients(x, w, w_v, g, scale, softmax=_Softmax(is_causal))


def attention_layer_gradients_lowrank(
  x: jax.Array,
  w: jax.Array,
  w_v: jax.Array,
  g: jax.Array,
  *,
  degree: int,
  radius: float,
  coefficients: str = "minimax",
  sigma: float | None = None,
  scale: float | jax.Array | None = None,
  is_causal: bool = False,
) -> LayerGradients:
  r"""The same gradients with a softmax matrix of low rank, in linear time.

  The polynomial's softmax matrix takes the place of f in the exact formula, so
  that the relative error is that of the polynomial itself; the gradient of the
  approximated layer, which differentiates the polynomial, is off by one degree
  more and costs D times less. With a causal mask, too, every weight is the
  polynomial's, those of the nearest neighbors included. Forward mode is not
  offered.

  Args:
    x: (B, T, D) input of the layer, or (T, D); floating.
    w: (D, D), the product of query and key weights, or (N, D, D) of N heads.
    w_v: (D, Dv), or (N, D, Dv).
    g: (B, T, Dv) gradient in the layer's output, or (B, T, N, Dv).
    degree: even degree of the polynomial.
    radius: bound on the absolute logits, a static number.
    coefficients: scheme of the polynomial, as in ``polynomial_attention``.
    sigma: spread of the logits, for the scheme ``"gaussian"``; static.
    scale: factor on the logits; None = 1 / sqrt(D). The source has 1 / D. May
      be traced.
    is_causal: row t sees rows 0 to t.

  Returns:
    A :class:`LayerGradients` of the dtype of ``x``.

  Raises:
    ValueError: if shapes, dtypes or options do not fit.

  Cost:
    O(T m D Dv) time a head for m = C(D + degree, degree) features, O(T D + m D
    Dv) memory.

  Source:
    arXiv 2408.13233, theorem 1.5 and section 5.

  Example:
    >>> import jax
    >>> x, g = jax.random.normal(jax.random.key(0), (2, 1, 64, 4))
    >>> w, w_v = jax.random.normal(jax.random.key(1), (2, 4, 4)) / 8
    >>> exact = attention_layer_gradients(x, w, w_v, g)
    >>> fast = attention_layer_gradients_lowrank(
    ...   x, w, w_v, g, degree=6, radius=2.0
    ... )
    >>> bool(abs(exact.dx - fast.dx).max() < 1e-3 * abs(exact.dx).max())
    True
  """
  _check(x, w, w_v, g, scale, is_causal)
  _checks.check_integer("degree", degree, 0, None)
  # Numbers that a compilation can be found again by, also out of arrays.
  polynomial = _Polynomial(
    int(degree),
    static_positive("radius", radius),
    coefficients,
    None if sigma is None else static_positive("sigma", sigma),
  )
  softmax = _Softmax(is_causal, polynomial)
  return _gradients(x, w, w_v, g, scale, softmax=softmax)


def multilayer_gradients(
  params: Sequence[Any],
  x: jax.Array,
  loss_fn: Callable[[jax.Array], jax.Array],
  layer_fns: Sequence[Callable[[Any, jax.Array], jax.Array]],
) -> tuple[tuple[Any, ...], jax.Array]:
  r"""Gradients of a loss in all layers' parameters and in the input.

  From the last layer to the first, the gradient in a layer's output gives those
  in its parameters and in its input; only the inputs of the layers are kept,
  and each layer is computed again. The numbers are those of ``jax.grad``: each
  layer's pass is linear in the length of the sequence if its attention's is.

  This is the paper's loop, for reference. Under ``jit`` a compiler may see that
  a layer is computed twice and keep what is inside it instead, as ``jax.grad``
  does; to save memory there, scan over checkpointed layers, as
  :class:`jaxattn.models.Transformer` does with ``remat``.

  Args:
    params: of each layer, a pytree.
    x: input of the first layer.
    loss_fn: from the output of the last layer to a scalar.
    layer_fns: of each layer, ``(params, x) -> x``.

  Returns:
    The gradients in ``params``, a tuple with an entry for each layer, and the
    gradient in ``x``.

  Raises:
    ValueError: if there is no layer, if ``params`` and ``layer_fns`` differ in
      length, or if the loss is not a scalar.

  Cost:
    Outside ``jit`` two forward passes and one backward pass of each layer, and
    memory of the layers' inputs and of one layer's pass. Under ``jit`` time and
    memory may be those of ``jax.grad``: one forward pass, all of it kept.

  Source:
    arXiv 2408.13233, algorithm 1.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> layers = (lambda p, x: p * x, lambda p, x: x + p)
    >>> grads, dx = multilayer_gradients(
    ...   (2.0, 1.0), jnp.array([3.0]), jnp.sum, layers
    ... )
    >>> print(grads[0], grads[1], dx)
    3.0 1.0 [2.]
  """
  if not layer_fns:
    raise ValueError("layer_fns must hold at least one layer, got none")
  if len(params) != len(layer_fns):
    raise ValueError(
      f"params must hold one entry for each of {len(layer_fns)} layers, got "
      f"{len(params)}"
    )
  inputs = [x]
  for p, layer in zip(params, layer_fns, strict=True):
    inputs.append(layer(p, inputs[-1]))
  loss, vjp = jax.vjp(loss_fn, inputs.pop())
  if jnp.shape(loss) != ():
    raise ValueError(
      f"loss_fn must return a scalar, got shape {jnp.shape(loss)}"
    )
  (g,) = vjp(jnp.ones_like(loss))
  grads = []
  for p, layer in zip(reversed(params), reversed(layer_fns), strict=True):
    _, vjp = jax.vjp(layer, p, inputs.pop())
    grad, g = vjp(g)
    grads.append(grad)
  return tuple(reversed(grads)), g


def _check(
  x: jax.Array,
  w: jax.Array,
  w_v: jax.Array,
  g: jax.Array,
  scale: float | jax.Array | None,
  is_causal: bool,
) -> None:
  """Raises unless a layer's arrays and options fit."""
  _checks.check_one_dtype(x=x, w=w, w_v=w_v, g=g)
  _checks.check_rank("x", x, (2, 3))
  _checks.check_rank("w", w, (2, 3))
  _checks.check_choice("is_causal", is_causal, (False, True))
  dim, heads = x.shape[-1], w.shape[:-2]
  _checks.check_shape("w", w, (*heads, dim, dim))
  _checks.check_shape("w_v", w_v, (*heads, dim, None))
  _checks.check_shape("g", g, (*x.shape[:-1], *heads, w_v.shape[-1]))
  if scale is not None:
    _checks.check_scalar("scale", scale)


@functools.partial(jax.jit, static_argnames="softmax")
def _gradients(
  x: jax.Array,
  w: jax.Array,
  w_v: jax.Array,
  g: jax.Array,
  scale: float | jax.Array | None,
  *,
  softmax: _Softmax,
) -> LayerGradients:
  operands = (x, w, w_v)
  if w.ndim == 2:  # One head.
    w, w_v, g = w[None], w_v[None], g[..., None, :]
  query = jnp.einsum("...td,nde->...tne", x, w)
  key = jnp.broadcast_to(x[..., None, :], query.shape)
  value = jnp.einsum("...td,ndv->...tnv", x, w_v)
  attend = functools.partial(softmax.attend, scale=scale)
  _, vjp = jax.vjp(attend, query, key, value)
  # s p X, s p^T X W and f^T G of each head.
  px, ptxw, ftg = vjp(g)
  dx = (
    jnp.einsum("...tne,nde->...td", px, w)
    + ptxw.sum(-2)
    + jnp.einsum("...tnv,ndv->...td", ftg, w_v)
  )
  dw = jnp.einsum("...td,...tne->nde", x, px)
  dw_v = jnp.einsum("...td,...tnv->ndv", x, ftg)
  gradients = (dx, dw, dw_v)
  return LayerGradients(
    *(d.reshape(p.shape) for d, p in zip(gradients, operands, strict=True))
  )
