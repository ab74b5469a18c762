r"""What a network for addition modulo p has learned: margin and spectra.

With :math:`\hat u[\zeta] = \sum_a u[a] e^{-2 \pi i \zeta a / p}`, a neuron of a
network of the largest margin has all of its power at one frequency, the same in
all its vectors, and phases that add up to that of w.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxattn import _checks
from jaxattn.ntk.margin.network import (
  PolyNet,
  check_network,
  digits,
  norms,
  outputs,
)
from jaxattn.numerics._dtypes import accumulator

_CHUNK = 4096
_MOST_UNASKED = 2**28
# Neurons below this share of the largest norm are dead.
_ACTIVE = 0.05


class Margin(NamedTuple):
  """Margins g(a) = f[y] - max over c != y of f[c], over all inputs.

  Attributes:
    minimum: () the margin of the network.
    maximum: () the largest of any input.
    accuracy: () share of inputs with g(a) > 0, in float32 or more.
  """

  minimum: jax.Array
  maximum: jax.Array
  accuracy: jax.Array


class FourierReport(NamedTuple):
  """Spectra of m neurons.

  Attributes:
    power_share: (m, k + 1) share of the power of u_1, ..., u_k and w that is at
      the strongest frequency of each; the constant counts, but is none.
    frequency: (m,) the strongest frequency of all u_j together, 1 to
      (p - 1) / 2.
    alignment: (m,) cosine of the difference, at this frequency, between the sum
      of the phases of u_j and the phase of w.
    active: (m,) whether the neuron's norm is above 0.05 of the largest. Others
      died in training: leave them out of all statistics.
    coverage: () how many frequencies some active neuron has.
  """

  power_share: jax.Array
  frequency: jax.Array
  alignment: jax.Array
  active: jax.Array
  coverage: jax.Array


def evaluate_margin(
  params: PolyNet, *, chunk_size: int | None = None
) -> Margin:
  """The margin over all p^k inputs, one by one.

  It is that of the parameters as they are: :func:`normalize` them first, to
  compare with :func:`max_margin`.

  Args:
    params: m neurons.
    chunk_size: inputs at a time; None = 4096.

  Returns:
    A :class:`Margin`.

  Raises:
    ValueError: if shapes or dtypes do not fit, or there are more than 2^28
      inputs and no chunk_size says that this is meant, or more than 2^31.

  Cost:
    O(p^k m (k + p)) time, O(chunk_size (m + p)) memory.

  Source:
    arXiv 2402.09469, section 3.

  Example:
    >>> from jaxattn.ntk import evaluate_margin, fourier_network
    >>> print(evaluate_margin(fourier_network(5, 2)).accuracy)
    1.0
  """
  params = check_network(params)
  _, k, p = params.inner.shape
  if chunk_size is None:
    if p**k > _MOST_UNASKED:
      raise ValueError(
        f"chunk_size is required for more than 2**28 inputs, got {p}**{k} = "
        f"{p**k}"
      )
    chunk_size = _CHUNK
  _checks.check_integer("chunk_size", chunk_size, 1, None)
  chunk_size = min(chunk_size, p**k)
  # Of the last chunk, too, numbers must fit into 32 bits.
  if p**k + chunk_size > 2**31:
    raise ValueError(f"there must be less than 2**31 inputs, got {p}**{k}")
  return _evaluate(params, chunk_size)


def expected_margin(params: PolyNet) -> jax.Array:
  r"""Mean over inputs of f[y] less the mean over c != y of f[c], by neuron.

  .. math::

    \frac{2\, k!}{(p - 1) p^k} \sum_{\zeta = 1}^{(p - 1) / 2} \mathrm{Re} \Big[
    \prod_j \hat u_j[\zeta]\, \overline{\hat w[\zeta]} \Big]

  The margin of the network is at most the sum of these, and each of them at
  most :func:`max_margin` times the (k + 1)-th power of the neuron's norm.

  Args:
    params: m neurons.

  Returns:
    (m,).

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Cost:
    O(m k p log p).

  Source:
    arXiv 2402.09469, appendix; the formula by spectra is this project's.

  Example:
    >>> from jaxattn.ntk import expected_margin, fourier_network, max_margin
    >>> values = expected_margin(fourier_network(5, 2))
    >>> print(f"{values.sum() / max_margin(5, 2):.4f}")
    1.0000
  """
  params = check_network(params)
  return _expected(params)


def fourier_report(params: PolyNet) -> FourierReport:
  """Spectra of all neurons.

  Args:
    params: m neurons.

  Returns:
    A :class:`FourierReport`.

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Cost:
    O(m k p log p).

  Source:
    arXiv 2402.09469, section 5.

  Example:
    >>> from jaxattn.ntk import fourier_network, fourier_report
    >>> report = fourier_report(fourier_network(7, 2))
    >>> print(report.coverage, report.frequency)
    3 [1 1 1 1 1 1 2 2 2 2 2 2 3 3 3 3 3 3]
  """
  params = check_network(params)
  return _report(params)


@functools.partial(jax.jit, static_argnums=1)
def _evaluate(params: PolyNet, chunk_size: int) -> Margin:
  _, k, p = params.inner.shape
  count = p**k
  num_chunks = -(-count // chunk_size)

  def chunk(start: jax.Array) -> tuple[jax.Array, ...]:
    number = start + jnp.arange(chunk_size, dtype=jnp.int32)
    is_new = number < count
    # The last input stands in for those that there are not.
    inputs = digits(jnp.minimum(number, count - 1), p, k)
    g = _margins(outputs(params, inputs), inputs.sum(1) % p)
    return g.min(), g.max(), ((g > 0) & is_new).sum()

  starts = chunk_size * jnp.arange(num_chunks, dtype=jnp.int32)
  low, high, right = lax.map(chunk, starts)
  dtype = params.outer.dtype
  # A sum of integers is exact, and a share near 1 needs all digits.
  share = right.sum().astype(low.dtype) / count
  return Margin(low.min().astype(dtype), high.max().astype(dtype), share)


def _margins(out: jax.Array, labels: jax.Array) -> jax.Array:
  own = jnp.arange(out.shape[1])[None] == labels[:, None]
  best = jnp.where(own, -jnp.inf, out).max(1)
  return jnp.where(own, out, 0).sum(1) - best


@jax.jit
def _expected(params: PolyNet) -> jax.Array:
  _, k, p = params.inner.shape
  u, w = _spectra(params)
  total = (u.prod(1) * w.conj())[:, 1:].real.sum(1)
  scale = 2 * math.factorial(k) / ((p - 1) * p**k)
  return (scale * total).astype(params.outer.dtype)


@jax.jit
def _report(params: PolyNet) -> FourierReport:
  p = params.outer.shape[1]
  u, w = _spectra(params)
  powers = jnp.square(jnp.abs(jnp.concatenate([u, w[:, None]], 1)))
  # Of a real vector frequencies but 0 come in pairs.
  total = powers[..., 0] + 2 * powers[..., 1:].sum(-1)
  share = 2 * powers[..., 1:].max(-1) / jnp.where(total > 0, total, 1)
  frequency = 1 + powers[:, :-1, 1:].sum(1).argmax(1).astype(jnp.int32)
  # Unit vectors: products of small numbers would vanish.
  at = jnp.take_along_axis(
    jnp.concatenate([u, w[:, None].conj()], 1), frequency[:, None, None], 2
  )[..., 0]
  size = jnp.abs(at)
  unit = at / jnp.where(size > 0, size, 1)
  squares = norms(params)
  active = squares > _ACTIVE**2 * squares.max()
  seen = jnp.zeros(p, bool).at[frequency].max(active)
  dtype = params.outer.dtype
  return FourierReport(
    power_share=share.astype(dtype),
    frequency=frequency,
    alignment=unit.prod(1).real.astype(dtype),
    active=active,
    coverage=seen.sum().astype(jnp.int32),
  )


def _spectra(params: PolyNet) -> tuple[jax.Array, jax.Array]:
  dtype = accumulator(params.inner.dtype)
  u, w = (jnp.fft.rfft(x.astype(dtype)) for x in params)
  return u, w
