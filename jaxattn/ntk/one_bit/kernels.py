r"""Kernels of a layer of signs: expectations over :math:`q \in \{-1, 1\}^d`.

Every sign vector is visited where d is small, or random ones are drawn.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks
from jaxattn.numerics._dtypes import accumulator
from jaxattn.numerics._sizes import largest_divisor

_MAX_EXACT_DIM = 20
_SAMPLES = 2**16
# Fewer batches than this say too little about their scatter.
_MIN_BATCHES = 32
# Numbers in the largest array of a batch, 16 MiB of float32.
_BATCH_SIZE = 1 << 22

_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class SignKernel(NamedTuple):
  """An expectation over sign vectors.

  Attributes:
    kernel: (n1, n2).
    standard_error: (n1, n2), of the Monte Carlo mean; zeros if it is exact.
  """

  kernel: jax.Array
  standard_error: jax.Array


def ste_kernel(
  x1: jax.Array,
  x2: jax.Array | None = None,
  *,
  method: str = "exact",
  num_samples: int | None = None,
  rng: jax.Array | None = None,
) -> SignKernel:
  r"""Gram matrix of straight-through gradients of an infinitely wide network.

  .. math:: K(x, x') = x \cdot x'\; P_q[q \cdot x > 0,\ q \cdot x' > 0]

  For dense inputs it tends to the kernel of Gaussian weights as d grows. It is
  not what predicts training: the output does not follow the straight-through
  gradient; see :func:`secant_kernel`.

  Args:
    x1: (n1, d), floating.
    x2: (n2, d); None = ``x1``.
    method: ``"exact"``, all 2^d sign vectors, or ``"mc"``, random ones.
    num_samples: of ``"mc"``: how many, at least 32; None = 65536. A number with
      many divisors is quicker than a prime.
    rng: PRNG key, required by ``"mc"``.

  Returns:
    A :class:`SignKernel`.

  Raises:
    ValueError: if shapes or dtypes do not fit, the method is unknown, d > 20
      for ``"exact"``, or ``rng`` or ``num_samples`` does not fit the method.

  Cost:
    O(S (n1 + n2) d + S n1 n2) for S sign vectors.

  Source:
    arXiv 2411.01663, the kernel of its section 4, for weights that are signs.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.ntk import ste_kernel
    >>> x = jnp.array([[0.8, 0.6], [0.6, -0.8]])
    >>> print(ste_kernel(x).kernel)
    [[0.5 0. ]
     [0.  0.5]]
  """
  return _expectation(
    "ste_kernel", _ste_batch, x1, x2, method, num_samples, rng
  )


def secant_kernel(
  x1: jax.Array,
  x2: jax.Array | None = None,
  *,
  method: str = "exact",
  num_samples: int | None = None,
  rng: jax.Array | None = None,
) -> SignKernel:
  r"""How the output at x moves if signs flip where gradients at x' point.

  .. math::

    K(x, x') = \sum_k x'_k\, E_q\big[ D_k(x; q)\, 1\{q \cdot x' > 0\} \big],
    \qquad
    D_k(x; q) = \tfrac12 \big[ \mathrm{relu}(q \cdot x)|_{q_k = 1}
      - \mathrm{relu}(q \cdot x)|_{q_k = -1} \big].

  A flip is a step of finite size, so that the slope of ReLU is that of a
  secant, between 0 and 1: the kernel is not symmetric, and smaller than
  :func:`ste_kernel` on the diagonal, to which it tends as d grows. Times
  :func:`effective_rate` it predicts training.

  Args:
    x1: (n1, d), floating: where the output is.
    x2: (n2, d), where the gradient is taken; None = ``x1``.
    method: ``"exact"``, all 2^d sign vectors, or ``"mc"``, random ones.
    num_samples: of ``"mc"``: how many, at least 32; None = 65536. A number with
      many divisors is quicker than a prime.
    rng: PRNG key, required by ``"mc"``.

  Returns:
    A :class:`SignKernel`.

  Raises:
    ValueError: as :func:`ste_kernel`.

  Cost:
    O(S n1 n2 d) for S sign vectors.

  Source:
    this project.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxattn.ntk import secant_kernel
    >>> x = jnp.array([[0.8, 0.6], [0.6, -0.8]])
    >>> print(secant_kernel(x).kernel.round(3))
    [[ 0.34 -0.09]
     [-0.09  0.34]]
  """
  return _expectation(
    "secant_kernel", _secant_batch, x1, x2, method, num_samples, rng
  )


def _expectation(
  name: str,
  batch_fn: Callable[..., jax.Array],
  x1: jax.Array,
  x2: jax.Array | None,
  method: str,
  num_samples: int | None,
  rng: jax.Array | None,
) -> SignKernel:
  x1 = jnp.asarray(x1)
  x2 = x1 if x2 is None else jnp.asarray(x2)
  _checks.check_one_dtype(x1=x1, x2=x2)
  _checks.check_rank("x1", x1, 2)
  _checks.check_shape("x2", x2, (None, x1.shape[1]), "(n2, d)")
  _checks.check_choice("method", method, ("exact", "mc"))
  dim = x1.shape[1]
  if method == "exact":
    if dim > _MAX_EXACT_DIM:
      raise ValueError(
        f"{name}: exact enumeration needs dim <= {_MAX_EXACT_DIM}, got {dim}; "
        "use method='mc'"
      )
    for option, value in (("rng", rng), ("num_samples", num_samples)):
      if value is not None:
        raise ValueError(f"{option} must be None with method='exact'")
    num = 2**dim
  else:
    if rng is None:
      raise ValueError("rng is required when method='mc'")
    num = _SAMPLES if num_samples is None else num_samples
    _checks.check_integer("num_samples", num, _MIN_BATCHES, None)
  widest = max(1, _BATCH_SIZE // max(1, x1.size + len(x2)))
  if method == "mc":
    widest = min(widest, num // _MIN_BATCHES)
  return _average(
    x1, x2, rng, fn=batch_fn, batch=largest_divisor(num, widest), num=num
  )


@functools.partial(jax.jit, static_argnames=("fn", "batch", "num"))
def _average(
  x1: jax.Array,
  x2: jax.Array,
  rng: jax.Array | None,
  *,
  fn: Callable[..., jax.Array],
  batch: int,
  num: int,
) -> SignKernel:
  """Mean over batches of sign vectors, and its error from their scatter."""
  given, dtype = x1.dtype, accumulator(x1.dtype)
  x1, x2 = x1.astype(dtype), x2.astype(dtype)
  num_batches = num // batch

  def signs(i: jax.Array) -> jax.Array:
    shape = (batch, x1.shape[1])
    if rng is not None:
      return jax.random.rademacher(jax.random.fold_in(rng, i), shape, dtype)
    index = (i * batch + jnp.arange(batch))[:, None]
    bits = (index >> jnp.arange(shape[1])[None]) & 1
    return (1 - 2 * bits).astype(dtype)

  # Squares of what is left by the first batch: those of means would cancel.
  zeros = jnp.zeros((2, len(x1), len(x2)), dtype)
  first = zeros[0] if rng is None else fn(signs(jnp.int32(0)), x1, x2)

  def step(sums: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
    off = fn(signs(i), x1, x2) - first
    return sums + jnp.stack([off, off**2]), None

  sums, _ = lax.scan(step, zeros, jnp.arange(num_batches))
  mean, square = sums / num_batches
  if rng is None:
    error = zeros[0]
  else:
    variance = jnp.maximum(square - mean**2, 0) / (num_batches - 1)
    error = jnp.sqrt(variance)
  return SignKernel((first + mean).astype(given), error.astype(given))


def _is_on(q: jax.Array, x: jax.Array) -> jax.Array:
  """(s, n) whether q . x > 0, as 0 or 1; sums that round to 0 are 0."""
  rounding = jnp.finfo(x.dtype).eps * jnp.abs(x).sum(1)
  return (_einsum("sd,nd->sn", q, x) > rounding[None]).astype(q.dtype)


def _ste_batch(q: jax.Array, x1: jax.Array, x2: jax.Array) -> jax.Array:
  on1, on2 = (_is_on(q, x) for x in (x1, x2))
  both = _einsum("si,sj->ij", on1, on2) / len(q)
  return both * _einsum("id,jd->ij", x1, x2)


def _secant_batch(q: jax.Array, x1: jax.Array, x2: jax.Array) -> jax.Array:
  z = _einsum("sd,nd->sn", q, x1)[..., None]
  # With q_k set to 1, and to -1.
  up = z + (1 - q)[:, None] * x1[None]
  down = z - (1 + q)[:, None] * x1[None]
  change = (jax.nn.relu(up) - jax.nn.relu(down)) / 2
  moved = _einsum("sik,sj->ikj", change, _is_on(q, x2)) / len(q)
  return _einsum("ikj,jk->ij", moved, x2)
