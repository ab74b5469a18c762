r"""Two-layer networks with a softmax over the neurons, and their kernels.

For inputs :math:`\|x\| \le 1`, hidden weights :math:`w_r` that are trained and
signs :math:`a_r \in \{-1, 1\}^o` that stay, r < m, the network is

.. math:: F(x) = \sum_r \phi_r(x)\, a_r, \qquad
  \phi_r = m\, \mathrm{softmax}(W x)_r

or, for comparison, :math:`\phi_r = e^{w_r \cdot x}` or
:math:`\mathrm{relu}(w_r \cdot x)`. Then :math:`\partial F_l / \partial w_r =
C_{lr}\, x` with

.. math:: C_{lr} = \phi_r\, (a_{rl} - \bar a_l), \qquad
  \bar a_l = \tfrac1m \sum_r \phi_r a_{rl}

for softmax, :math:`\phi_r a_{rl}` for exp, :math:`1[w_r \cdot x > 0]\, a_{rl}`
for ReLU, and the kernel

.. math:: H[i, l, j, k] = \tfrac1m\, x_i \cdot x_j
  \sum_r C_{ilr} C_{jkr}

has a limit as m grows. Gradient flow on the loss has the kernel m H; steps are
therefore of size learning_rate / m. Source: arXiv 2405.03251 for the model; the
closed forms are this project's.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxattn import _checks
from jaxattn.ntk import _blocks
from jaxattn.ntk.infinite import relu_covariance
from jaxattn.numerics._dtypes import accumulator

__all__ = [
  "TwoLayer",
  "TwoLayerHistory",
  "apply",
  "init",
  "limit_kernel",
  "ntk",
  "perturb",
  "perturbation_bound",
  "perturbation_profile",
  "train_two_layer",
]

ACTIVATIONS = ("softmax", "exp", "relu")
# Of which H has a gradient.
_SMOOTH = ("softmax", "exp")
KINDS = ("random", "common", "outward", "adversarial")
_ASCENT_STEPS = 200
_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


class TwoLayer(NamedTuple):
  """A two-layer network.

  Attributes:
    hidden: (m, d), trained.
    output: (m, o), signs that stay.
  """

  hidden: jax.Array
  output: jax.Array


class TwoLayerHistory(NamedTuple):
  """What training saw.

  How far neurons moved and the kernel changed by the end is what
  :func:`jaxattn.ntk.lazy_metrics` says of the two networks.

  Attributes:
    losses: (num_steps + 1,), halves of sums of squares, before each step and
      after the last.
  """

  losses: jax.Array


def init(
  rng: jax.Array,
  width: int,
  dim: int,
  num_outputs: int,
  *,
  sigma: float = 1.0,
  paired: bool = True,
  dtype: Any = jnp.float32,
) -> TwoLayer:
  """Draws a network.

  Args:
    rng: key.
    width: m; even if ``paired``.
    dim: d.
    num_outputs: o.
    sigma: standard deviation of hidden weights.
    paired: neurons come in pairs of equal weights and opposite signs, so that
      outputs are 0.
    dtype: of both arrays.

  Returns:
    The network as a :class:`TwoLayer`.

  Raises:
    ValueError: if a size is not a positive integer, ``width`` is odd though
      ``paired``, or ``sigma`` is not a positive number.

  Cost:
    O(m (d + o)).

  Source:
    arXiv 2405.03251, its initialization.

  Example:
    >>> import jax
    >>> from jaxattn.ntk import softmax
    >>> params = softmax.init(jax.random.key(0), 64, 3, 2)
    >>> x = jax.numpy.ones((1, 3)) / 2
    >>> bool(abs(softmax.apply(params, x)).max() < 1e-3)
    True
  """
  for name, size in (
    ("width", width),
    ("dim", dim),
    ("num_outputs", num_outputs),
  ):
    _checks.check_integer(name, size, 1, None)
  _checks.check_scalar("sigma", sigma)
  _checks.check_positive("sigma", sigma)
  if paired and width % 2:
    raise ValueError(f"width must be even when paired=True, got {width}")
  rng_hidden, rng_output = jax.random.split(rng)
  half = width // 2 if paired else width
  hidden = sigma * jax.random.normal(rng_hidden, (half, dim), dtype)
  output = jax.random.rademacher(rng_output, (half, num_outputs), dtype)
  if paired:
    hidden = jnp.repeat(hidden, 2, axis=0)
    output = jnp.stack((output, -output), 1).reshape(width, num_outputs)
  return TwoLayer(hidden, output)


def apply(
  params: TwoLayer,
  x: jax.Array,
  *,
  activation: str = "softmax",
  output_scale: str | float | jax.Array = "m",
) -> jax.Array:
  r"""Outputs of a network.

  .. math:: f(x) = \frac{\text{scale}}{m} \sum_r \phi_r(x)\, a_r

  Args:
    params: a network.
    x: (n, d), of norm at most 1.
    activation: ``"softmax"``, ``"exp"`` or ``"relu"``.
    output_scale: ``"m"`` (the paper's, F), ``"sqrt_m"`` (of which H is the
      tangent kernel), or a number.

  Returns:
    (n, o).

  Raises:
    ValueError: if shapes or dtypes do not fit, or an option is unknown.

  Cost:
    O(n m (d + o)).

  Source:
    arXiv 2405.03251.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.ntk import softmax
    >>> params = softmax.TwoLayer(jnp.zeros((4, 2)), jnp.ones((4, 1)))
    >>> print(softmax.apply(params, jnp.ones((1, 2))))
    [[4.]]
  """
  x = _check(params, x)
  _checks.check_choice("activation", activation, ACTIVATIONS)
  m = len(params.hidden)
  scale = output_scale
  if isinstance(scale, str):
    _checks.check_choice("output_scale", scale, ("m", "sqrt_m"))
    scale = m if scale == "m" else m**0.5
  _checks.check_scalar("output_scale", scale)
  scale = jnp.asarray(scale, accumulator(x.dtype)) / m
  return _apply(params, x, scale, activation)


def ntk(
  params: TwoLayer,
  x1: jax.Array,
  x2: jax.Array | None = None,
  *,
  activation: str = "softmax",
  chunk_size: int | None = None,
) -> jax.Array:
  """The tangent kernel H of a network, in closed form.

  Args:
    params: a network.
    x1: (n1, d).
    x2: (n2, d); None = ``x1``.
    activation: ``"softmax"``, ``"exp"`` or ``"relu"``.
    chunk_size: rows of ``x1`` and of ``x2`` whose C are held at a time; None =
      all.

  Returns:
    (n1, o, n2, o): of ``output_scale="sqrt_m"``, 1 / m of that of F.

  Raises:
    ValueError: if shapes or dtypes do not fit, ``activation`` is unknown, or
      ``chunk_size`` < 1.

  Cost:
    O(n1 n2 o^2 m) time, one product; O((n1 + n2) o m + n1 n2 o^2) memory, of
    which C takes O(chunk_size o m). C of a chunk is computed again for each
    chunk that it meets.

  Source:
    this project; arXiv 2405.03251 defines the kernel.

  Example:
    >>> import jax
    >>> from jaxattn.ntk import softmax
    >>> params = softmax.init(jax.random.key(0), 64, 3, 2)
    >>> softmax.ntk(params, jax.numpy.ones((5, 3)) / 2).shape
    (5, 2, 5, 2)
  """
  x1 = _check(params, x1, "x1")
  if x2 is not None:
    x2 = _check(params, x2, "x2")
  _checks.check_choice("activation", activation, ACTIVATIONS)
  if chunk_size is not None:
    _checks.check_integer("chunk_size", chunk_size, 1, None)
  return _ntk(params, x1, x2, activation, chunk_size)


def limit_kernel(
  x1: jax.Array,
  x2: jax.Array | None = None,
  *,
  activation: str = "softmax",
  sigma: float | jax.Array = 1.0,
) -> jax.Array:
  r"""The kernel of infinite width, the same for each output.

  .. math::

    x \cdot x'\; e^{\sigma^2 x \cdot x'}, \qquad
    x \cdot x'\; e^{\sigma^2 \|x + x'\|^2 / 2}, \qquad
    x \cdot x'\; \frac{\pi - \arccos \rho}{2 \pi}

  for softmax, exp and ReLU. The second is :math:`D H D` of the first, with
  :math:`D = \mathrm{diag}(e^{\sigma^2 \|x\|^2 / 2})`: a softmax equilibrates.

  Args:
    x1: (n1, d), floating.
    x2: (n2, d); None = ``x1``.
    activation: ``"softmax"``, ``"exp"`` or ``"relu"``.
    sigma: standard deviation of hidden weights.

  Returns:
    (n1, n2); H is its Kronecker product with the identity of outputs.

  Raises:
    ValueError: if shapes or dtypes do not fit, there are no data,
      ``activation`` is unknown, or ``sigma`` is not positive.

  Cost:
    O(n1 n2 d).

  Source:
    this project.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.ntk import limit_kernel
    >>> kernel = limit_kernel(jnp.eye(2))
    >>> print(f"{kernel[0, 0]:.3f} {kernel[0, 1]:.3f}")
    2.718 0.000
  """
  x1 = jnp.asarray(x1)
  _checks.check_rank("x1", x1, 2)
  _checks.check_floating("x1", x1)
  _check_data("x1", x1)
  if x2 is not None:
    x2 = jnp.asarray(x2)
    _checks.check_shape("x2", x2, (None, x1.shape[1]), "(n2, d)")
    _checks.check_one_dtype(x1=x1, x2=x2)
    _check_data("x2", x2)
  _checks.check_choice("activation", activation, ACTIVATIONS)
  _checks.check_scalar("sigma", sigma)
  _checks.check_positive("sigma", sigma)
  return _limit_kernel(x1, x2, sigma, activation)


def train_two_layer(
  params: TwoLayer,
  x: jax.Array,
  y: jax.Array,
  *,
  activation: str = "softmax",
  learning_rate: float | jax.Array | None = None,
  num_steps: int,
  optimizer: optax.GradientTransformation | None = None,
) -> tuple[TwoLayer, TwoLayerHistory]:
  r"""Trains the hidden weights on half the sum of squares of F - y.

  .. math:: W \leftarrow W - \frac{\eta}{m} \nabla_W L, \qquad
    \nabla_{w_r} L = \sum_{i, l} (F - y)_{il}\, C_{ilr}\, x_i

  As long as H stays what it was, outputs are those of
  :func:`jaxattn.ntk.descent_train` at the same rate.

  Args:
    params: a network.
    x: (n, d), of norm at most 1.
    y: (n, o).
    activation: ``"softmax"``, ``"exp"`` or ``"relu"``.
    learning_rate: eta, in units of H: below 2 / lambda_max(H).
    num_steps: steps.
    optimizer: instead of descent at a ``learning_rate``; it gets the gradient
      as it is. Hashed: the same object does not compile again.

  Returns:
    The trained network, and a :class:`TwoLayerHistory`.

  Raises:
    ValueError: if shapes or dtypes do not fit, ``activation`` is unknown, or
      not one of ``learning_rate`` and ``optimizer`` is given.

  Cost:
    O(n m (d + o)) a step.

  Source:
    arXiv 2405.03251, its training.

  Example:
    >>> import jax
    >>> from jaxattn.ntk import softmax, train_two_layer
    >>> params = softmax.init(jax.random.key(0), 256, 3, 1)
    >>> x, y = jax.numpy.eye(3), jax.numpy.ones((3, 1))
    >>> _, history = train_two_layer(
    ...   params, x, y, learning_rate=0.2, num_steps=9
    ... )
    >>> bool(history.losses[-1] < 0.01 * history.losses[0])
    True
  """
  x = _check(params, x)
  y = jnp.asarray(y)
  _checks.check_shape("y", y, (len(x), params.output.shape[1]), "(n, o)")
  _checks.check_choice("activation", activation, ACTIVATIONS)
  _checks.check_integer("num_steps", num_steps, 0, None)
  if (learning_rate is None) == (optimizer is None):
    raise ValueError("give one of learning_rate and optimizer")
  if learning_rate is not None:
    _checks.check_scalar("learning_rate", learning_rate)
    _checks.check_positive("learning_rate", learning_rate)
  hidden, losses = _train(
    params,
    x,
    y.astype(x.dtype),
    learning_rate,
    activation,
    num_steps,
    optimizer,
  )
  return TwoLayer(hidden, params.output), TwoLayerHistory(losses)


def perturbation_bound(
  params: TwoLayer, x: jax.Array, radius: float | jax.Array
) -> jax.Array:
  r"""How far H of a softmax network can move, for every network.

  If no weight :math:`w_r` moves by more than R, then, with e = exp(2 R X), X
  the largest of the norms :math:`\|x_i\|` and A that of :math:`|a_{rl}|`,

  .. math:: \|H' - H\|_F \le 2 A^2 (e - 1)(2 + e)(1 + e)\, o\,
    \big\| (x_i \cdot x_j\; \tfrac1m \phi_i \cdot \phi_j)_{ij} \big\|_F :

  no :math:`w_r \cdot x_i` moves by more than R X, so no :math:`\phi_{ir}` by a
  factor beyond e.

  Args:
    params: a network before it moves.
    x: (n, d), of any norm.
    radius: R.

  Returns:
    (), the bound. A ReLU network has none: its C jumps.

  Raises:
    ValueError: if shapes or dtypes do not fit, or ``radius`` is negative.

  Cost:
    O(n^2 m).

  Source:
    this project.

  Example:
    >>> import jax
    >>> from jaxattn.ntk import perturbation_bound, softmax
    >>> params = softmax.init(jax.random.key(0), 64, 3, 1)
    >>> print(perturbation_bound(params, jax.numpy.eye(3), 0.0))
    0.0
  """
  x = _check(params, x)
  _checks.check_scalar("radius", radius)
  _checks.check_nonnegative("radius", radius)
  dtype = x.dtype
  params, x = _widened((params, x))
  phi = _features(params.hidden, x, "softmax")
  moments = _matmul(phi, phi.T) / len(params.hidden)
  size = jnp.linalg.norm(moments * _matmul(x, x.T))
  reach = jnp.asarray(radius, x.dtype) * jnp.linalg.norm(x, axis=1).max()
  growth = jnp.expm1(2 * reach)
  signs = jnp.square(jnp.abs(params.output).max()) * params.output.shape[1]
  factor = 2 * growth * (3 + growth) * (2 + growth)
  return (factor * signs * size).astype(dtype)


def perturb(
  rng: jax.Array,
  params: TwoLayer,
  radius: float | jax.Array,
  *,
  kind: str = "random",
  x: jax.Array | None = None,
  activation: str | None = None,
) -> TwoLayer:
  """Moves each hidden weight by a distance of at most ``radius``.

  Args:
    rng: key; ``"outward"`` does not use it.
    params: a network.
    radius: distance.
    kind: ``"random"``: a direction of its own for each weight; ``"common"``:
      one direction for all, which no softmax sees; ``"outward"``: away from 0;
      ``"adversarial"``: 200 steps of ascent on the change of H.
    x: (n, d), the inputs of H, of ``"adversarial"`` only.
    activation: that of H, of ``"adversarial"`` only: ``"softmax"``, which None
      stands for, or ``"exp"``. The H of a ReLU network has a gradient of 0
      almost everywhere, on which nothing can ascend.

  Returns:
    The moved network.

  Raises:
    ValueError: if shapes or dtypes do not fit, ``kind`` or ``activation`` is
      unknown, ``radius`` is negative, ``x`` or ``activation`` comes with
      another kind, ``"adversarial"`` comes without ``x``, or with ReLU.

  Cost:
    O(m d); ``"adversarial"`` 200 gradients of H.

  Source:
    this project.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxattn.ntk import softmax
    >>> params = softmax.init(jax.random.key(0), 64, 3, 1)
    >>> moved = softmax.perturb(jax.random.key(1), params, 0.5)
    >>> step = jnp.linalg.norm(moved.hidden - params.hidden, axis=1)
    >>> print(step.min().round(4), step.max().round(4))
    0.5 0.5
  """
  _check_params(params)
  _checks.check_choice("kind", kind, KINDS)
  _checks.check_scalar("radius", radius)
  _checks.check_nonnegative("radius", radius)
  if (kind == "adversarial") != (x is not None):
    raise ValueError(
      "x must be given with kind='adversarial', and only with it"
    )
  if x is None and activation is not None:
    raise ValueError(
      f"activation must be None with kind={kind!r}, got {activation!r}"
    )
  activation = "softmax" if activation is None else activation
  if x is not None:
    x = _check(params, x)
    _checks.check_choice("activation", activation, _SMOOTH)
  return _perturb(rng, params, radius, x, kind, activation)


def perturbation_profile(
  rng: jax.Array,
  params: TwoLayer,
  x: jax.Array,
  radii: jax.Array,
  *,
  kinds: tuple[str, ...] = ("random", "common", "outward"),
  activations: tuple[str, ...] = ACTIVATIONS,
) -> jax.Array:
  """Relative change of H by activation, kind of perturbation and radius.

  Args:
    rng: key, of which all radii share the directions.
    params: a network.
    x: (n, d).
    radii: (R,).
    kinds: as in :func:`perturb`.
    activations: as in :func:`ntk`; without ``"relu"`` if ``"adversarial"`` is
      among the kinds.

  Returns:
    (activations, kinds, R), Frobenius norms of changes over those of H.

  Raises:
    ValueError: if shapes or dtypes do not fit, a name is unknown, or
      ``"adversarial"`` meets ``"relu"``.

  Cost:
    A kernel for each entry; ``"adversarial"`` 200 gradients of it.

  Source:
    this project.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxattn.ntk import perturbation_profile, softmax
    >>> params = softmax.init(jax.random.key(0), 64, 3, 1)
    >>> change = perturbation_profile(
    ...   jax.random.key(1), params, jnp.eye(3), jnp.array([0.0, 1.0])
    ... )
    >>> change.shape, bool(change[0, 1, 1] < 1e-4)
    ((3, 3, 2), True)
  """
  x = _check(params, x)
  radii = jnp.asarray(radii)
  _checks.check_rank("radii", radii, 1)
  _checks.check_nonnegative("radii", radii)
  for name, given, known in (
    ("kinds", kinds, KINDS),
    ("activations", activations, ACTIVATIONS),
  ):
    for value in given:
      _checks.check_choice(name, value, known)
  if "adversarial" in kinds and "relu" in activations:
    raise ValueError(
      "activations must not hold 'relu' with 'adversarial' among kinds: the "
      "gradient of its kernel is 0 almost everywhere"
    )
  return _profile(rng, params, x, radii, tuple(kinds), tuple(activations))


# --- checks ---


def _check_params(params: TwoLayer) -> None:
  _checks.check_rank("hidden", params.hidden, 2)
  _checks.check_shape(
    "output", params.output, (len(params.hidden), None), "(m, o)"
  )
  _checks.check_one_dtype(hidden=params.hidden, output=params.output)


def _check(params: TwoLayer, x: jax.Array, name: str = "x") -> jax.Array:
  _check_params(params)
  x = jnp.asarray(x)
  _checks.check_shape(name, x, (None, params.hidden.shape[1]), "(n, d)")
  _checks.check_one_dtype(**{"hidden": params.hidden, name: x})
  _check_data(name, x)
  return x


def _check_data(name: str, x: jax.Array) -> None:
  if not len(x):
    raise ValueError(f"{name} must not be empty, got shape {x.shape}")


# --- formulas ---


def _features(hidden: jax.Array, x: jax.Array, activation: str) -> jax.Array:
  """Phi, (n, m)."""
  logits = _matmul(x, hidden.T)
  if activation == "relu":
    return jnp.maximum(logits, 0)
  if activation == "softmax":
    # m softmax: its entries are of size 1, which 1 / m of a few bits is not.
    logits = jax.nn.log_softmax(logits) + jnp.log(len(hidden)).astype(x.dtype)
  return jnp.exp(logits)


def _coefficients(params: TwoLayer, x: jax.Array, activation: str) -> jax.Array:
  """C, (n, o, m)."""
  phi = _features(params.hidden, x, activation)
  if activation == "relu":
    phi = (phi > 0).astype(phi.dtype)
  signs = params.output.T[None]
  if activation == "softmax":
    mean = _matmul(phi, params.output) / len(params.hidden)
    signs = signs - mean[:, :, None]
  return phi[:, None] * signs


def _widened(tree: Any) -> Any:
  return jax.tree.map(lambda x: x.astype(accumulator(x.dtype)), tree)


@functools.partial(jax.jit, static_argnums=3)
def _apply(
  params: TwoLayer, x: jax.Array, scale: jax.Array, activation: str
) -> jax.Array:
  dtype = x.dtype
  params, x = _widened((params, x))
  phi = _features(params.hidden, x, activation)
  return (scale * _matmul(phi, params.output)).astype(dtype)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _ntk(
  params: TwoLayer,
  x1: jax.Array,
  x2: jax.Array | None,
  activation: str,
  chunk_size: int | None = None,
) -> jax.Array:
  dtype, (m, o) = x1.dtype, params.output.shape
  params, x1, x2 = _widened((params, x1, x2))

  def block(x1: jax.Array, x2: jax.Array) -> jax.Array:
    c1 = _coefficients(params, x1, activation).reshape(-1, m)
    same = x1 is x2
    c2 = c1 if same else _coefficients(params, x2, activation).reshape(-1, m)
    inner = _matmul(c1, c2.T).reshape(len(x1), o, len(x2), o)
    return _matmul(x1, x2.T)[:, None, :, None] * inner / m

  if chunk_size is None:
    return block(x1, x1 if x2 is None else x2).astype(dtype)
  gram = _blocks.blocked_gram(block, x1, x2, chunk_size=chunk_size)
  return gram.astype(dtype)


@functools.partial(jax.jit, static_argnums=3)
def _limit_kernel(
  x1: jax.Array, x2: jax.Array | None, sigma: jax.Array, activation: str
) -> jax.Array:
  dtype = x1.dtype
  x1 = x1.astype(accumulator(dtype))
  x2 = x1 if x2 is None else x2.astype(x1.dtype)
  gram = _matmul(x1, x2.T)
  square1, square2 = jnp.square(x1).sum(1)[:, None], jnp.square(x2).sum(1)[None]
  variance = jnp.square(jnp.asarray(sigma, x1.dtype))
  if activation == "relu":
    # The deviation of weights does not matter to a sign.
    factor = relu_covariance(gram, square1, square2)[1] / 2
  else:
    exponent = gram
    if activation == "exp":
      exponent = gram + (square1 + square2) / 2
    factor = jnp.exp(variance * exponent)
  return (gram * factor).astype(dtype)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _train(
  params: TwoLayer,
  x: jax.Array,
  y: jax.Array,
  learning_rate: jax.Array | None,
  activation: str,
  num_steps: int,
  optimizer: optax.GradientTransformation | None,
) -> tuple[jax.Array, jax.Array]:
  m = len(params.hidden)
  if optimizer is None:
    rate = jnp.asarray(learning_rate, x.dtype) / m

    def update(gradient: jax.Array, state: Any, hidden: jax.Array) -> Any:
      return hidden - rate * gradient, state

    state = ()
  else:
    state = optimizer.init(params.hidden)

    def update(gradient: jax.Array, state: Any, hidden: jax.Array) -> Any:
      updates, state = optimizer.update(gradient, state, hidden)
      return optax.apply_updates(hidden, updates), state

  def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
    hidden, state = carry
    loss, gradient = _value_and_grad(hidden, params.output, x, y, activation)
    return update(gradient, state, hidden), loss

  (hidden, _), losses = lax.scan(step, (params.hidden, state), length=num_steps)
  last = _value_and_grad(hidden, params.output, x, y, activation)[0]
  return hidden, jnp.append(losses, last)


def _value_and_grad(
  hidden: jax.Array,
  output: jax.Array,
  x: jax.Array,
  y: jax.Array,
  activation: str,
) -> tuple[jax.Array, jax.Array]:
  # Neurons first: both products read weights as they lie.
  logits, factor = _matmul(hidden, x.T), jnp.ones_like(y.T[:1])
  if activation == "relu":
    phi, slope = jnp.maximum(logits, 0), (logits > 0).astype(x.dtype)
  elif activation == "exp":
    phi = slope = jnp.exp(logits)
  else:
    # m softmax is factor phi, of numbers of size 1.
    phi = slope = jnp.exp(logits - logits.max(0, keepdims=True))
    factor = len(hidden) / phi.sum(0, keepdims=True)
  out = factor * _matmul(output.T, phi)
  error = out - y.T
  pull = factor * error
  # A product over a single output would not fuse with what comes after it.
  pulled = output * pull if len(out) == 1 else _matmul(output, pull)
  if activation == "softmax":
    pulled = pulled - (pull * out).sum(0, keepdims=True) / len(hidden)
  return jnp.square(error).sum() / 2, _matmul(slope * pulled, x)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _perturb(
  rng: jax.Array,
  params: TwoLayer,
  radius: jax.Array,
  x: jax.Array | None,
  kind: str,
  activation: str,
) -> TwoLayer:
  dtype = params.hidden.dtype
  wide, x = _widened((params, x))
  hidden = wide.hidden
  radius = jnp.asarray(radius, hidden.dtype)
  if kind == "outward":
    shift = radius * _unit(hidden)
  else:
    rows = (1, hidden.shape[1]) if kind == "common" else hidden.shape
    shift = radius * _unit(jax.random.normal(rng, rows, hidden.dtype))
  if kind == "adversarial":
    assert x is not None
    shift = _ascend(wide, x, shift, radius, activation)
  return params._replace(hidden=(hidden + shift).astype(dtype))


def _ascend(
  params: TwoLayer,
  x: jax.Array,
  shift: jax.Array,
  radius: jax.Array,
  activation: str,
) -> jax.Array:
  """Projected ascent on the change of H, each weight within its ball."""
  before = _ntk(params, x, None, activation)

  def change(shift: jax.Array) -> jax.Array:
    moved = params._replace(hidden=params.hidden + shift)
    return jnp.square(_ntk(moved, x, None, activation) - before).sum()

  def step(shift: jax.Array, _: None) -> tuple[jax.Array, None]:
    moved = shift + radius / 10 * _unit(jax.grad(change)(shift))
    norm = jnp.linalg.norm(moved, axis=1, keepdims=True)
    return jnp.where(norm > radius, radius * _unit(moved), moved), None

  return lax.scan(step, shift, length=_ASCENT_STEPS)[0]


@functools.partial(jax.jit, static_argnums=(4, 5))
def _profile(
  rng: jax.Array,
  params: TwoLayer,
  x: jax.Array,
  radii: jax.Array,
  kinds: tuple[str, ...],
  activations: tuple[str, ...],
) -> jax.Array:
  dtype = x.dtype
  params, x = _widened((params, x))

  def one(activation: str, kind: str) -> jax.Array:
    before = _ntk(params, x, None, activation)
    inputs = x if kind == "adversarial" else None

    def change(radius: jax.Array) -> jax.Array:
      moved = _perturb(rng, params, radius, inputs, kind, activation)
      after = _ntk(moved, x, None, activation)
      return jnp.linalg.norm(after - before) / jnp.linalg.norm(before)

    return jax.vmap(change)(radii)

  found = [jnp.stack([one(a, k) for k in kinds]) for a in activations]
  return jnp.stack(found).astype(dtype)


def _unit(x: jax.Array) -> jax.Array:
  """Rows of length 1; those of 0 stay."""
  norm = jnp.linalg.norm(x, axis=1, keepdims=True)
  return x / jnp.where(norm > 0, norm, 1)
