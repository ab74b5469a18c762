"""The network of signs, its twin of full precision, and its packed form."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks
from jaxattn.ntk.one_bit.quantize import sign_ste
from jaxattn.numerics import unpack_signs

# Rows of packed weights that are unpacked at a time.
_ROWS = 1024

_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


class OneBit(NamedTuple):
  """Parameters of the network.

  Attributes:
    latent: (m, d) weights, whose signs the network has.
    output: (m,) of +1 and -1, never trained.
  """

  latent: jax.Array
  output: jax.Array


def init(
  rng: jax.Array,
  width: int,
  dim: int,
  *,
  paired: bool = True,
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> OneBit:
  """Draws standard normal latent weights and random output signs.

  Args:
    rng: PRNG key.
    width: m, number of hidden neurons.
    dim: d, size of an input.
    paired: whether neurons come in pairs of equal weights and opposite outputs,
      so that the network begins as 0.
    dtype: of both arrays.

  Returns:
    The parameters as :class:`OneBit`.

  Raises:
    ValueError: if sizes are not positive integers, or an odd width is to be
      paired.

  Cost:
    O(m d).

  Source:
    arXiv 2411.01663, section 3.

  Example:
    >>> import jax
    >>> from jaxattn.ntk import one_bit
    >>> params = one_bit.init(jax.random.key(0), 6, 4)
    >>> params.latent.shape, float(params.output.sum())
    ((6, 4), 0.0)
  """
  _checks.check_integer("width", width, 1, None)
  _checks.check_integer("dim", dim, 1, None)
  if paired and width % 2:
    raise ValueError(f"width must be even for paired neurons, got {width}")
  rng_w, rng_a = jax.random.split(rng)
  num = width // 2 if paired else width
  latent = jax.random.normal(rng_w, (num, dim), dtype)
  output = jax.random.rademacher(rng_a, (num,), dtype)
  if paired:
    latent = jnp.concatenate([latent, latent])
    output = jnp.concatenate([output, -output])
  return OneBit(latent, output)


def apply(
  params: OneBit,
  x: jax.Array,
  *,
  quantized: bool = True,
  kappa: float | jax.Array = 1.0,
) -> jax.Array:
  r"""Outputs of the network, or of its twin of full precision.

  .. math::

    f(x) = \frac{\kappa}{\sqrt m} \sum_r a_r\, \mathrm{relu}(q_r \cdot x)

  The derivative of signs is 0 almost everywhere; what differentiation finds
  here is the straight-through gradient, and ``empirical_ntk`` of it that of
  :func:`ste_kernel`, which is not how training moves: see
  :func:`secant_kernel`.

  Args:
    params: what :func:`init` or training returned.
    x: (n, d) inputs; theory has dense rows of norm 1.
    quantized: signs (whose gradient passes straight through), or the latent
      weights themselves.
    kappa: in (0, 1].

  Returns:
    (n,) outputs.

  Raises:
    ValueError: if shapes or dtypes do not fit, or ``kappa`` is not in (0, 1].

  Cost:
    O(n m d) time, O(n m) memory.

  Source:
    arXiv 2411.01663, section 3.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.ntk import one_bit
    >>> w = jnp.array([[0.1, -2.0], [3.0, 0.2], [1.0, 1.0], [0.0, 0.0]])
    >>> params = one_bit.OneBit(w, jnp.array([1.0, 1.0, -1.0, 1.0]))
    >>> print(one_bit.apply(params, jnp.array([[0.75, 0.5]])))
    [0.75]
  """
  x = jnp.asarray(x)
  check_params(params, x=x)
  check_kappa(kappa)
  return _apply(params, x, quantized, kappa)


def packed_apply(
  x: jax.Array,
  packed: jax.Array,
  a: jax.Array,
  *,
  kappa: float | jax.Array = 1.0,
) -> jax.Array:
  """Outputs of a network whose signs are packed, a few rows unpacked at a time.

  Weights take a 32nd of the memory of float32. On a CPU it is no quicker.

  Args:
    x: (n, d) inputs.
    packed: (m, ceil(d / 32)), what ``numerics.pack_signs`` makes of the latent
      weights.
    a: (m,) output signs.
    kappa: in (0, 1].

  Returns:
    (n,) what :func:`apply` returns.

  Raises:
    ValueError: if shapes or dtypes do not fit (the words must be those of d
      signs), or ``kappa`` is not in (0, 1].

  Cost:
    O(n m d) time; m d / 8 bytes, plus 4096 d for the 1024
    rows of float32 that are unpacked at a time.

  Source:
    this project.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxattn.ntk import one_bit
    >>> from jaxattn.numerics import pack_signs
    >>> params = one_bit.init(jax.random.key(0), 64, 40, paired=False)
    >>> x, words = jnp.eye(40)[:3], pack_signs(params.latent)
    >>> out = one_bit.packed_apply(x, words, params.output)
    >>> print(words.shape, bool(jnp.allclose(out, one_bit.apply(params, x))))
    (64, 2) True
  """
  x, packed, a = map(jnp.asarray, (x, packed, a))
  _checks.check_one_dtype(x=x, a=a)
  _checks.check_rank("x", x, 2)
  _checks.check_rank("a", a, 1)
  num_words = -(-x.shape[1] // 32)
  meaning = f"(m, words of {x.shape[1]} signs)"
  _checks.check_shape("packed", packed, (len(a), num_words), meaning)
  if not packed.size:
    raise ValueError(f"packed must not be empty, got shape {packed.shape}")
  if packed.dtype != jnp.uint32:
    raise ValueError(f"packed must have dtype uint32, got {packed.dtype}")
  check_kappa(kappa)
  return _packed_apply(x, packed, a, kappa)


# --- programs ---


@functools.partial(jax.jit, static_argnames="quantized")
def _apply(
  params: OneBit, x: jax.Array, quantized: bool, kappa: float | jax.Array
) -> jax.Array:
  w = sign_ste(params.latent) if quantized else params.latent
  scale = jnp.asarray(kappa, x.dtype) / math.sqrt(len(w))
  return scale * _matmul(jax.nn.relu(_matmul(x, w.T)), params.output)


@jax.jit
def _packed_apply(
  x: jax.Array, packed: jax.Array, a: jax.Array, kappa: float | jax.Array
) -> jax.Array:
  m, rows = len(a), min(_ROWS, len(a))
  scale = jnp.asarray(kappa, x.dtype) / math.sqrt(m)
  # Neurons that fill up the last block have no output.
  packed, a = (
    jnp.pad(z, [(0, -m % rows)] + [(0, 0)] * (z.ndim - 1)).reshape(
      -1, rows, *z.shape[1:]
    )
    for z in (packed, a)
  )

  def block(total: jax.Array, of_block: Any) -> tuple[jax.Array, None]:
    words, a = of_block
    signs = unpack_signs(words, x.shape[1], dtype=x.dtype)
    return total + _matmul(jax.nn.relu(_matmul(x, signs.T)), a), None

  return scale * lax.scan(block, jnp.zeros_like(x[:, 0]), (packed, a))[0]


# --- checks ---


def check_params(params: OneBit, **inputs: jax.Array) -> None:
  """Raises unless parameters and inputs fit each other."""
  latent, output = params
  _checks.check_one_dtype(latent=latent, output=output, **inputs)
  _checks.check_rank("latent", latent, 2)
  _checks.check_shape("output", output, latent.shape[:1], "(m,)")
  for name, x in inputs.items():
    _checks.check_shape(name, x, (None, latent.shape[1]), "(n, d)")
  if not latent.size:
    raise ValueError(f"latent must not be empty, got shape {latent.shape}")


def check_kappa(kappa: float | jax.Array) -> None:
  """Raises unless kappa is in (0, 1]."""
  _checks.check_scalar("kappa", kappa)
  if _checks.is_concrete(kappa) and not 0 < float(kappa) <= 1:
    raise ValueError(f"kappa must be in (0, 1], got {kappa}")
