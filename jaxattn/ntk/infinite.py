r"""Kernels of ReLU networks whose width is infinite, in closed form.

For centered Gaussian :math:`(u, v)` of variances :math:`q_1, q_2` and
covariance :math:`s`, with :math:`\rho = s / \sqrt{q_1 q_2}`,

.. math::

  2\, E[\mathrm{relu}(u)\, \mathrm{relu}(v)] = \sqrt{q_1 q_2}\; \kappa_1(\rho),
  \qquad
  \kappa_1 = \frac{\rho (\pi - \arccos \rho) + \sqrt{1 - \rho^2}}{\pi}, \\
  2\, P[u > 0, v > 0] = \kappa_0(\rho) = \frac{\pi - \arccos \rho}{\pi}
  = \kappa_1'(\rho).

A layer maps covariances by the first and multiplies tangent kernels by the
second. Source: Cho and Saul 2009; Jacot et al., arXiv 1806.07572.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks
from jaxattn.numerics._dtypes import accumulator

_TRAINABLE = ("all", "hidden")
# Of 1 - rho^2, in units of rounding: what is below is taken for 0. Inputs that
# coincide come out there, and the angle, its square root, would show it.
_EQUAL = 16
# Of the polynomial arccos(x) / sqrt(1 - x) on [0, 1], the highest power first.
_ARCCOS = (
  -0.0012624911,
  0.0066700901,
  -0.0170881256,
  0.0308918810,
  -0.0501743046,
  0.0889789874,
  -0.2145988016,
  1.5707963050,
)


def relu_covariance(
  cov: jax.Array, var1: jax.Array, var2: jax.Array
) -> tuple[jax.Array, jax.Array]:
  r"""One layer of ReLU: the covariance after it and that of its derivative.

  .. math:: s \mapsto \sqrt{q_1 q_2}\; \kappa_1(s / \sqrt{q_1 q_2}), \qquad
    \kappa_0(s / \sqrt{q_1 q_2})

  The factor 2 of both (see the module) keeps variances: :math:`q \mapsto q`.
  Where a variance is 0 the results are 0 and 1/2. Derivatives are finite
  everywhere: that of the first is its limit where :math:`|\rho| = 1`, and
  that of :math:`\kappa_0`, which has none there, is 0.

  Args:
    cov: s, floating, of any shape.
    var1: q_1 >= 0, broadcastable with the others; (n1, 1) for an (n1, n2)
      ``cov``.
    var2: q_2 >= 0, the same; (1, n2).

  Returns:
    :math:`2 E[\mathrm{relu}(u) \mathrm{relu}(v)]` and :math:`2 P[u, v > 0]`,
    both of the common shape.

  Raises:
    ValueError: if shapes do not broadcast, dtypes differ or are not floating,
      or a concrete variance is negative.

  Cost:
    O(1) an entry.

  Source:
    Cho and Saul, Kernel methods for deep learning, 2009, orders 1 and 0.

  Example:
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from jaxattn.ntk import relu_covariance
    >>> cov, one = jnp.array([1.0, 0.0, -0.5]), jnp.ones(3)
    >>> after, dot = map(np.asarray, relu_covariance(cov, one, one))
    >>> print(after.round(3), dot.round(3))
    [1.    0.318 0.109] [1.    0.5   0.333]
  """
  cov, var1, var2 = map(jnp.asarray, (cov, var1, var2))
  _checks.check_one_dtype(cov=cov, var1=var1, var2=var2)
  _checks.check_nonnegative("var1", var1)
  _checks.check_nonnegative("var2", var2)
  try:
    shape = jnp.broadcast_shapes(cov.shape, var1.shape, var2.shape)
  except ValueError:
    raise ValueError(
      "cov, var1 and var2 must be broadcastable to one shape, got "
      f"{cov.shape}, {var1.shape} and {var2.shape}"
    ) from None
  return _relu_covariance(
    *(jnp.broadcast_to(x, shape) for x in (cov, var1, var2))
  )


def mlp_ntk(
  x1: jax.Array,
  x2: jax.Array | None = None,
  *,
  depth: int,
  weight_scale: float | jax.Array = 2.0,
  trainable: str = "all",
) -> tuple[jax.Array, jax.Array]:
  r"""Covariance and tangent kernel of an infinitely wide ReLU network.

  The network of L = ``depth`` hidden layers of widths m has weights of variance
  1 and no biases:

  .. math::

    z_1 = W_1 x / \sqrt d, \qquad
    z_{l+1} = \sqrt{c / m_l}\; W_{l+1}\, \mathrm{relu}(z_l), \qquad
    f = z_{L+1}.

  With :math:`\Sigma_1 = \Theta_1 = x \cdot x' / d`, in the limit

  .. math::

    \Sigma_{l+1} = \tfrac c2 \sqrt{q q'}\, \kappa_1(\rho_l), \qquad
    \Theta_{l+1} = \Sigma_{l+1} + \tfrac c2\, \kappa_0(\rho_l)\, \Theta_l .

  ``MLP(parametrization="ntk")`` of :mod:`jaxattn.models` is this network.

  Args:
    x1: (n1, d), floating.
    x2: (n2, d); None = ``x1``.
    depth: hidden layers; 0 is a linear model.
    weight_scale: c, positive; 2 keeps the size of activations.
    trainable: ``"all"``, or ``"hidden"`` for an output layer that stays as it
      was drawn: the last :math:`\Sigma` is then missing from the kernel.

  Returns:
    nngp :math:`\Sigma_{L+1}` and ntk :math:`\Theta_{L+1}`, each (n1, n2), for
    each output alike. A row of zeros gives zeros.

  Raises:
    ValueError: if shapes or dtypes do not fit, ``depth`` is negative,
      ``weight_scale`` is not a positive number, or ``trainable`` is none of the
      two; ``"hidden"`` needs a hidden layer.

  Cost:
    O(n1 n2 (d + depth)) time, O(n1 n2) memory.

  Source:
    arXiv 1806.07572, theorem 1; arXiv 1904.11955, section 3.

  Example:
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from jaxattn.ntk import mlp_ntk
    >>> nngp, ntk = mlp_ntk(jnp.array([[1.0, 1.0], [1.0, -1.0]]), depth=1)
    >>> print(np.asarray(ntk).round(3))
    [[2.    0.318]
     [0.318 2.   ]]
  """
  x1 = jnp.asarray(x1)
  _checks.check_rank("x1", x1, 2)
  _checks.check_floating("x1", x1)
  if x2 is not None:
    x2 = jnp.asarray(x2)
    _checks.check_shape("x2", x2, (None, x1.shape[1]), "(n2, d)")
    _checks.check_one_dtype(x1=x1, x2=x2)
  _checks.check_integer("depth", depth, 0, None)
  _checks.check_scalar("weight_scale", weight_scale)
  _checks.check_positive("weight_scale", weight_scale)
  _checks.check_choice("trainable", trainable, _TRAINABLE)
  if trainable == "hidden" and not depth:
    raise ValueError("trainable='hidden' needs depth >= 1, got 0")
  return _mlp_ntk(x1, x2, weight_scale, depth, trainable)


@jax.jit
def _relu_covariance(
  cov: jax.Array, var1: jax.Array, var2: jax.Array
) -> tuple[jax.Array, jax.Array]:
  wide = accumulator(cov.dtype)
  args = [x.astype(wide) for x in (cov, var1, var2)]
  dot = 1 - _angle(*args).angle / jnp.pi
  return _covariance(*args).astype(cov.dtype), dot.astype(cov.dtype)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _mlp_ntk(
  x1: jax.Array,
  x2: jax.Array | None,
  weight_scale: jax.Array,
  depth: int,
  trainable: str,
) -> tuple[jax.Array, jax.Array]:
  dtype, d = x1.dtype, x1.shape[1]
  x1, is_gram = x1.astype(accumulator(dtype)), x2 is None
  x2 = x1 if x2 is None else x2.astype(x1.dtype)
  half = jnp.asarray(weight_scale, x1.dtype) / 2
  var1, var2 = (jnp.square(x).sum(1) / d for x in (x1, x2))
  cov = jnp.matmul(x1, x2.T, precision=lax.Precision.HIGHEST) / d
  if is_gram:
    # A correlation of 1 that is rounded costs the angle half its digits.
    cov = jnp.fill_diagonal(cov, var1, inplace=False)
  ntk = cov
  for layer in range(depth):
    cov, dot = relu_covariance(cov, var1[:, None], var2[None])
    cov, var1, var2 = half * cov, half * var1, half * var2
    ntk = half * dot * ntk
    if layer < depth - 1 or trainable == "all":
      ntk += cov
  return cov.astype(dtype), ntk.astype(dtype)


class _Pair(NamedTuple):
  """An angle, its cosine and sine, and the product of the deviations."""

  angle: jax.Array
  cosine: jax.Array
  sine: jax.Array
  size: jax.Array


def _angle(cov: jax.Array, var1: jax.Array, var2: jax.Array) -> _Pair:
  """Both `where` of each pair are needed.

  The first alone leaves a NaN in the derivative, 0 times infinity.
  """
  positive = (var1 > 0) & (var2 > 0)
  # The root of the product is exact where variances are equal, but products
  # leave the range of float32 at 1e19.
  product = var1 * var2
  in_range = (product >= jnp.finfo(product.dtype).tiny) & (product < jnp.inf)
  root1, root2 = (jnp.sqrt(jnp.where(positive, v, 1)) for v in (var1, var2))
  size = jnp.where(
    in_range,
    jnp.sqrt(jnp.where(in_range, product, 1)),
    jnp.where(positive, root1 * root2, 0),
  )
  rho = jnp.where(positive, cov / jnp.where(positive, size, 1), 0)
  rho = jnp.clip(rho, -1, 1)
  square = (1 - rho) * (1 + rho)
  apart = square > _EQUAL * jnp.finfo(square.dtype).eps
  sine = jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1)), 0)
  cosine = jnp.where(apart, rho, jnp.sign(rho))
  if rho.dtype == jnp.float32:
    angle = _arccos32(cosine, apart)
  else:
    angle = jnp.arctan2(sine, cosine)
  return _Pair(angle, cosine, sine, size)


def _arccos32(x: jax.Array, apart: jax.Array) -> jax.Array:
  """To 2e-8, seven times as fast as arctan2; pi or 0 where not apart from it.

  Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 4.4.46.
  """
  size = jnp.abs(x)
  value = jnp.zeros_like(x)
  for coefficient in _ARCCOS:
    value = value * size + coefficient
  acute = jnp.where(apart, value * jnp.sqrt(jnp.where(apart, 1 - size, 1)), 0)
  return jnp.where(x < 0, jnp.pi - acute, acute)


@jax.custom_jvp
def _covariance(cov: jax.Array, var1: jax.Array, var2: jax.Array) -> jax.Array:
  angle, cosine, sine, size = _angle(cov, var1, var2)
  # Exactly `size` where the angle is 0: variances then stay equal to the
  # diagonal of covariances, layer after layer.
  return size * (cosine * (1 - angle / jnp.pi) + sine / jnp.pi)


@_covariance.defjvp
def _covariance_jvp(
  primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
  """Terms that diverge where the angle is 0, and cancel, are left out."""
  cov, var1, var2 = primals
  angle, _, sine, size = _angle(*primals)
  by_cov = 1 - angle / jnp.pi
  by_var1, by_var2 = (
    jnp.where(var > 0, sine * size / jnp.where(var > 0, var, 1), 0)
    / (2 * jnp.pi)
    for var in (var1, var2)
  )
  tangent = by_cov * tangents[0] + by_var1 * tangents[1] + by_var2 * tangents[2]
  return _covariance(cov, var1, var2), tangent
