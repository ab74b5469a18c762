r"""Plain multi-layer networks, as tangent kernels and optimizers need them.

With hidden widths :math:`m_1, ..., m_L`, input size d and a constant c of the
activation :math:`\phi` (2 for ``"relu"`` and ``"gelu"``, 1 for ``"tanh"``),

.. math::

  z_1 = W_1 x / \sqrt d + b_1, \qquad
  z_{l+1} = \sqrt{c / m_l}\; W_{l+1}\, \phi(z_l) + b_{l+1}, \qquad
  f = z_{L+1}

with W of variance 1 (``parametrization="ntk"``), or the same function with the
factors inside of W (``"standard"``): equal at the start, but gradients by W
differ by the factors.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks
from jaxattn.ntk import DenseTap

_ACTIVATIONS = {
  "relu": (nn.relu, 2.0),
  "gelu": (nn.gelu, 2.0),
  "tanh": (jnp.tanh, 1.0),
}
_PARAMETRIZATIONS = ("ntk", "standard")


class MLP(nn.Module):
  r"""A network of dense layers, called on (n, d) inputs.

  Parameters are ``layer_0``, ``layer_1``, ... with a ``kernel`` (in, out) and
  perhaps a ``bias`` (out,) that starts at 0.

  Attributes:
    widths: sizes of the layers; the last is the number of outputs.
    activation: ``"relu"``, ``"gelu"`` or ``"tanh"``, between layers.
    parametrization: ``"ntk"`` or ``"standard"``, see the module. With ``"ntk"``
      and ``"relu"``, without biases, the kernel of infinite width is
      :func:`jaxattn.ntk.mlp_ntk`.
    use_bias: whether layers have a bias.

  Raises:
    ValueError: when called, if a field or the input does not fit.

  Cost:
    The sum of products of neighboring sizes, a datum.

  Source:
    arXiv 1806.07572, section 3, for the parametrization.

  Example:
    >>> import jax
    >>> from jaxattn.models import MLP
    >>> model, x = MLP((512, 3)), jax.numpy.ones((4, 8))
    >>> params = model.init(jax.random.key(0), x)
    >>> model.apply(params, x).shape
    (4, 3)
  """

  widths: tuple[int, ...]
  activation: str = "relu"
  parametrization: str = "ntk"
  use_bias: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (n, d) inputs to (n, widths[-1]) outputs."""
    _checks.check_rank("x", x, 2)
    _checks.check_floating("x", x)
    if not self.widths:
      raise ValueError("widths must hold at least one size, got ()")
    for width in self.widths:
      _checks.check_integer("widths", width, 1, None)
    sizes = (x.shape[1], *self.widths)
    params = {
      f"layer_{i}": _Layer(
        *sizes[i : i + 2],
        std=1.0 if self.parametrization == "ntk" else self._scale(i, sizes[i]),
        use_bias=self.use_bias,
        name=f"layer_{i}",
      )()
      for i in range(len(self.widths))
    }
    return mlp_with_taps(
      {"params": params},
      x,
      activation=self.activation,
      parametrization=self.parametrization,
    )[0]

  def _scale(self, layer: int, size: int) -> float:
    _check(self.activation, self.parametrization)
    return _scale(layer, size, self.activation)


def mlp_with_taps(
  params: dict,
  x: jax.Array,
  taps: tuple[jax.Array, ...] | None = None,
  *,
  activation: str = "relu",
  parametrization: str = "ntk",
) -> tuple[jax.Array, tuple[DenseTap, ...]]:
  """The network of :class:`MLP` as :func:`jaxattn.ntk.structured_ntk` asks.

  Args:
    params: parameters of an :class:`MLP`.
    x: (n, d) inputs.
    taps: None, or for each layer an array like its outputs, (n, width), which
      is added to them.
    activation: that of the module. Other than the default: through
      ``functools.partial``, one object for all calls.
    parametrization: that of the module.

  Returns:
    The outputs (n, O), and for each layer a ``DenseTap`` of what its kernel
    multiplies, with factors and a 1 for the bias, and of what comes out.

  Raises:
    ValueError: if a name is unknown or shapes do not fit.

  Cost:
    As the module.

  Source:
    this project.

  Example:
    >>> import jax
    >>> from jaxattn.models import MLP, mlp_with_taps
    >>> from jaxattn.ntk import structured_ntk
    >>> x = jax.random.normal(jax.random.key(0), (4, 8))
    >>> params = MLP((512, 3)).init(jax.random.key(1), x)
    >>> structured_ntk(mlp_with_taps, params, x).shape
    (4, 3, 4, 3)
  """
  _check(activation, parametrization)
  weights = params["params"]
  if taps is not None and len(taps) != len(weights):
    raise ValueError(
      f"taps must be one array a layer, {len(weights)}, got {len(taps)}"
    )
  layers: list[DenseTap] = []
  for i in range(len(weights)):
    kernel = weights[f"layer_{i}"]["kernel"]
    _checks.check_shape("x", x, (None, kernel.shape[0]), "(n, d)")
    if parametrization == "ntk":
      x = x * _scale(i, kernel.shape[0], activation)
    if "bias" in weights[f"layer_{i}"]:
      x = jnp.concatenate((x, jnp.ones_like(x[:, :1])), 1)
      bias = weights[f"layer_{i}"]["bias"]
      kernel = jnp.concatenate((kernel, bias[None]))
    z = jnp.matmul(x, kernel, precision=lax.Precision.HIGHEST)
    if taps is not None:
      _checks.check_shape(f"taps[{i}]", taps[i], z.shape, "(n, width)")
      z = z + taps[i]
    layers.append(DenseTap(x, z))
    x = _ACTIVATIONS[activation][0](z)
  return layers[-1].outputs, tuple(layers)


class _Layer(nn.Module):
  """Parameters of one layer."""

  fan_in: int
  fan_out: int
  std: float
  use_bias: bool

  @nn.compact
  def __call__(self) -> dict[str, jax.Array]:
    normal, zeros = nn.initializers.normal(self.std), nn.initializers.zeros
    shape, dtype = (self.fan_in, self.fan_out), jnp.float32
    weights = {"kernel": self.param("kernel", normal, shape, dtype)}
    if self.use_bias:
      weights["bias"] = self.param("bias", zeros, shape[1:], dtype)
    return weights


def _check(activation: str, parametrization: str) -> None:
  _checks.check_choice("activation", activation, tuple(_ACTIVATIONS))
  _checks.check_choice("parametrization", parametrization, _PARAMETRIZATIONS)


def _scale(layer: int, size: int, activation: str) -> float:
  gain = _ACTIVATIONS[activation][1] if layer else 1.0
  return (gain / size) ** 0.5
