r"""Attention over d scalars with one query: the model of asymmetric learning.

Of lags :math:`x_1 \ldots x_d` the last is the query, and m heads of size 1 see
all of them:

.. math::

  f(x) = \frac{1}{\sqrt m} \sum_{r=1}^m a_r
    \langle \mathrm{softmax}(x_d w_r x), x \rangle .

The a are signs and stay, the w are trained on :math:`L = \frac12 \sum_i
(f(x_i) - y_i)^2`, a sum. With S the softmax and V the variance of x under it,

.. math::

  \frac{\partial L}{\partial w_r} = \frac{a_r}{\sqrt m}
    \sum_i (f_i - y_i)\, x_{i,d} V_{i,r}, \qquad
  K_{ij} = \frac{x_{i,d} x_{j,d}}{m} \sum_r a_r^2 V_{i,r} V_{j,r} .

f does not see the order of :math:`x_1 \ldots x_{d-1}`, and
:func:`jaxattn.data.permutation_floor` bounds what it can learn. Kinds:

* ``"plain"``: the above;
* ``"residual"``: :math:`x_d` plus attention to :math:`x - x_d`;
* ``"position_bias"``: a trained (m, d) bias on the logits, 0 at first;
* ``"rope"``: key k is turned by its distance to the query, with heads padded
  to two dimensions: its logit is times :math:`\cos(d - k)`;
* ``"patch"``: tokens are patches of p lags, w and a are (m, p), and the logit
  of patch j is :math:`\langle x_{\mathrm{last}} \circ w_r, x_j \rangle`;
* ``"differential"``: the softmax of one weight less a trained multiple of that
  of a second.

One head of size 1 and one query are less than a transformer: nothing about
those follows. No (n, m, d) array is made: sums run over lags, so that memory is
O(n m). Source: arXiv 2412.06061; formulas are derived here.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks
from jaxattn.attention import softmax_attention
from jaxattn.features import rope_angles
from jaxattn.models._lag_softmax import softmax_mean, softmax_means
from jaxattn.numerics._dtypes import accumulator

__all__ = [
  "scalar_attention_apply",
  "scalar_attention_grad",
  "scalar_attention_init",
  "scalar_attention_ntk",
]

Params = dict[str, jax.Array]

# What each kind is made of.
_ENTRIES = {
  "plain": ("w", "a"),
  "residual": ("w", "a"),
  "position_bias": ("w", "a", "bias"),
  "rope": ("w", "a"),
  "patch": ("w", "a"),
  "differential": ("w", "a", "second", "mix"),
}
_FIRST_MIX = 0.5


def scalar_attention_init(
  rng: jax.Array,
  width: int,
  dim: int,
  *,
  kind: str = "plain",
  patch_size: int | None = None,
) -> Params:
  r"""Weights from N(0, 1) in pairs of opposite sign, so that f is 0 everywhere.

  .. math:: w = (\omega, \omega), \qquad a = (1, -1)

  The theory assumes f = 0 on the data at first, which independent draws do not
  give.

  Args:
    rng: PRNG key.
    width: m, heads; even.
    dim: d, lags, at least 2.
    kind: as above.
    patch_size: p of ``"patch"``, a divisor of d; None for all other kinds.

  Returns:
    ``{"w": (m,), "a": (m,)}``; of ``"patch"`` both are (m, p);
    ``"position_bias"`` adds ``"bias"`` (m, d), and ``"differential"``
    ``"second"`` and ``"mix"``, each (m,). f is exactly 0, except that of
    ``"residual"``, which is x_d.

  Raises:
    ValueError: if ``width`` is odd, the kind unknown, or a size does not fit.

  Cost:
    O(m), or O(m d) with a bias.

  Source:
    arXiv 2412.06061, section 4, for N(0, 1); pairs are standard.

  Example:
    >>> import jax
    >>> from jaxattn.models import scalar_attention_init
    >>> params = scalar_attention_init(jax.random.key(0), 4, 8)
    >>> print(params["a"])
    [ 1.  1. -1. -1.]
  """
  _checks.check_choice("kind", kind, tuple(_ENTRIES))
  _checks.check_integer("width", width, 2, None)
  if width % 2:
    raise ValueError(f"width must be even, for pairs of heads, got {width}")
  _checks.check_integer("dim", dim, 2, None)
  _check_patch_size(kind, patch_size, dim)
  shape = (width // 2, *(() if patch_size is None else (patch_size,)))
  rng_w, rng_second = jax.random.split(rng)
  half, one = jax.random.normal(rng_w, shape), jnp.ones(shape)
  params = {
    "w": jnp.concatenate([half, half]),
    "a": jnp.concatenate([one, -one]),
  }
  if kind == "position_bias":
    params["bias"] = jnp.zeros((width, dim))
  elif kind == "differential":
    second = jax.random.normal(rng_second, shape)
    params["second"] = jnp.concatenate([second, second])
    params["mix"] = jnp.full(width, _FIRST_MIX)
  return params


def scalar_attention_apply(
  params: Params, x: jax.Array, *, kind: str = "plain"
) -> jax.Array:
  """The model's output.

  Args:
    params: from :func:`scalar_attention_init` with the same kind.
    x: (n, d), the last lag last.
    kind: as above.

  Returns:
    (n,), in the dtype that ``x`` and ``w`` promote to. -f(x) is f(-x), exactly.

  Raises:
    ValueError: if the kind is unknown, or parameters or ``x`` do not fit it.

  Cost:
    O(n m d) time and O(n m) memory, for the gradient too; O(n m d) memory for
    that of ``"patch"``.

  Source:
    arXiv 2412.06061, definition 3.3; kinds other than the first are this
    project's reading of its remedies.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.models import scalar_attention_apply
    >>> params = {"w": jnp.array([0.0, 9.0]), "a": jnp.ones(2)}
    >>> y = scalar_attention_apply(params, jnp.array([[1.0, 2.0, 3.0]]))
    >>> print((y * 2**0.5).round(3))  # a mean, and the last
    [5.]
  """
  x = check_call(params, x, kind)
  return _apply(params, x, kind)


def scalar_attention_ntk(
  params: Params, x1: jax.Array, x2: jax.Array
) -> jax.Array:
  r"""Tangent kernel of the weights w, of ``"plain"`` and of ``"residual"``.

  .. math:: K_{ij} = \frac{x_{i,d} x_{j,d}}{m} \sum_r a_r^2 V_{i,r} V_{j,r}

  Args:
    params: w and a, (m,) each.
    x1: (n1, d).
    x2: (n2, d).

  Returns:
    (n1, n2). Its eigenvalues fall fast: judge ranks in float64.

  Raises:
    ValueError: if parameters or inputs do not fit.

  Cost:
    O((n1 + n2) m d + n1 n2 m) time, O((n1 + n2) m) memory.

  Source:
    arXiv 2412.06061, definition 4.1; the closed form is derived here.

  Example:
    >>> import jax
    >>> from jaxattn.models import scalar_attention_init, scalar_attention_ntk
    >>> params = scalar_attention_init(jax.random.key(0), 16, 4)
    >>> x = jax.random.normal(jax.random.key(1), (5, 4))
    >>> kernel = scalar_attention_ntk(params, x, x)
    >>> kernel.shape, bool((kernel == kernel.T).all())
    ((5, 5), True)
  """
  x1 = check_call(params, x1, "plain")
  x2 = check_call(params, x2, "plain", "x2")
  _checks.check_shape("x2", x2, (None, x1.shape[1]), "(n2, d), d of x1")
  return _ntk(params, x1, x2)


def scalar_attention_grad(
  params: Params, x: jax.Array, y: jax.Array
) -> jax.Array:
  r"""Gradient of the loss of ``"plain"`` in w, without backpropagation.

  Args:
    params: w and a, (m,) each.
    x: (n, d).
    y: (n,).

  Returns:
    (m,), of :math:`\frac12 \sum_i (f(x_i) - y_i)^2`.

  Raises:
    ValueError: if parameters or data do not fit.

  Cost:
    O(n m d) time, one exponential for each head, sample and lag; O(n m) memory.

  Source:
    arXiv 2412.06061, lemma of the gradient; the form with V is derived here.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.models import scalar_attention_grad, scalar_attention_init
    >>> params = scalar_attention_init(jax.random.key(0), 16, 4)
    >>> x = jax.random.normal(jax.random.key(1), (200, 4))
    >>> grad = scalar_attention_grad(params, x, x[:, -1])
    >>> bool((params["a"] * grad < 0).all())  # each w_r moves towards its a_r
    True
  """
  x = check_call(params, x, "plain")
  y = check_targets("y", y, x)
  return _grad(params, x, y)


# --- checks ---


def _check_patch_size(kind: str, patch_size: int | None, dim: int) -> None:
  if kind != "patch":
    if patch_size is not None:
      raise ValueError(
        f"patch_size must be None for kind={kind!r}, got {patch_size}"
      )
    return
  _checks.check_integer("patch_size", patch_size, 1, dim)
  assert patch_size is not None
  if dim % patch_size:
    raise ValueError(f"patch_size must divide dim={dim}, got {patch_size}")


def check_call(
  params: Params, x: jax.Array, kind: str, name: str = "x"
) -> jax.Array:
  """Checks a call of the model, and returns its input as an array."""
  _checks.check_choice("kind", kind, tuple(_ENTRIES))
  if set(params) != set(_ENTRIES[kind]):
    raise ValueError(
      f"params of kind={kind!r} must have the entries "
      f"{', '.join(_ENTRIES[kind])}, got {', '.join(sorted(params))}"
    )
  x = jnp.asarray(x)
  _checks.check_rank(name, x, 2)
  _checks.check_floating(name, x)
  d = x.shape[1]
  w = params["w"]
  _checks.check_rank("params['w']", w, 2 if kind == "patch" else 1)
  shapes = {"a": w.shape, "second": w.shape, "mix": w.shape}
  for entry in set(params) & set(shapes):
    _checks.check_shape(
      f"params[{entry!r}]", params[entry], shapes[entry], "as w"
    )
  if kind == "position_bias":
    length = params["bias"].shape[-1]
    _checks.check_shape("params['bias']", params["bias"], (len(w), None))
    _checks.check_shape(name, x, (None, length), "(n, d), d of the bias")
  if kind == "patch" and d % w.shape[1]:
    raise ValueError(
      f"{name} must have a multiple of patch_size={w.shape[1]} lags, got {d}"
    )
  return x


def check_targets(name: str, y: jax.Array, x: jax.Array) -> jax.Array:
  """Checks what came after ``x``, and returns it as an array."""
  y = jnp.asarray(y)
  _checks.check_shape(name, y, (len(x),), "(n,)")
  _checks.check_floating(name, y)
  return y


# --- the model ---


def widened(params: Params, *arrays: jax.Array) -> tuple[Any, Params, Any]:
  """The dtype of the result, and all in the one it is computed in."""
  dtype = jnp.result_type(params["w"], *arrays)
  wide = accumulator(dtype)
  cast = functools.partial(jnp.asarray, dtype=wide)
  return dtype, jax.tree.map(cast, params), [cast(x) for x in arrays]


@functools.partial(jax.jit, static_argnums=2)
def _apply(params: Params, x: jax.Array, kind: str) -> jax.Array:
  dtype, params, (x,) = widened(params, x)
  return _forward(params, x, kind).astype(dtype)


def _forward(params: Params, x: jax.Array, kind: str) -> jax.Array:
  a, width = params["a"], len(params["a"])
  if kind == "patch":
    heads = (_patched(params["w"], x) * a[None]).sum(2)
  else:
    heads = _attended(params, x, kind) * a[None]
  # Pairs of opposite sign first: at the start they cancel exactly.
  half = width // 2
  pairs = heads[:, :half] + heads[:, half : 2 * half]
  total = pairs.sum(1) + heads[:, 2 * half :].sum(1)
  out = total / math.sqrt(width)
  return out + x[:, -1] if kind == "residual" else out


def _attended(params: Params, x: jax.Array, kind: str) -> jax.Array:
  """What each head sees, (n, m): of x - x_d if residual, else of x."""
  last = x[:, -1:]
  # To logits as to means a shift of x does nothing, or just itself.
  z = x - last
  query = last * params["w"][None]
  if kind == "rope":
    lags = jnp.arange(x.shape[1])[::-1]
    turned = x * jnp.cos(rope_angles(lags, 2)).T.astype(x.dtype)
    return softmax_mean(query, turned, z, None) + last
  mean = softmax_mean(query, z, z, params.get("bias"))
  if kind == "residual":
    return mean
  if kind != "differential":
    return mean + last
  second = softmax_mean(last * params["second"][None], z, z, None) + last
  return mean + last - params["mix"][None] * second


def _patched(w: jax.Array, x: jax.Array) -> jax.Array:
  """What each head sees of patches, (n, m, p)."""
  tokens = x.reshape(len(x), -1, 1, w.shape[1])
  query = tokens[:, -1] * w[None]
  seen = softmax_attention(query[:, :, None], tokens, tokens, scale=1.0)
  return seen[:, :, 0]


def moments(
  params: Params, x: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """x_d (n,), mean of x - x_d and variance of x under the softmax, (n, m)."""
  last = x[:, -1]
  # Differences: nothing cancels where x is far from 0.
  z = x - last[:, None]
  query = last[:, None] * params["w"][None]
  (mean, square), _ = softmax_means(query, z, (z, z**2), None)
  return last, mean, jnp.maximum(square - mean**2, 0)


@jax.jit
def _ntk(params: Params, x1: jax.Array, x2: jax.Array) -> jax.Array:
  dtype, params, (x1, x2) = widened(params, x1, x2)
  product = product_of(slopes(params, x1), slopes(params, x2).T)
  return product.astype(dtype)


def slopes(params: Params, x: jax.Array) -> jax.Array:
  """Derivatives of f in w, (n, m)."""
  last, _, variance = moments(params, x)
  a = params["a"] / math.sqrt(len(params["a"]))
  return last[:, None] * variance * a[None]


product_of = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


@jax.jit
def _grad(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
  dtype, params, (x, y) = widened(params, x, y)
  last, mean, variance = moments(params, x)
  a = params["a"] / math.sqrt(len(params["a"]))
  error = product_of(mean, a) + last * a.sum() - y
  return (a * product_of(error * last, variance)).astype(dtype)
