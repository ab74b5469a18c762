r"""Networks of the largest margin for addition modulo p, in closed form.

For odd p the largest margin of parameters of norm 1 is

.. math::

  \gamma^* = \frac{2\, k!}{(2 k + 2)^{(k + 1) / 2} (p - 1) p^{(k - 1) / 2}},

and neurons that attain it are cosines of one frequency :math:`\zeta`, with
phases :math:`\theta_j` that add up:

.. math::

  u_j[a] = \beta \cos(\theta_j + 2 \pi \zeta a / p), \qquad
  w[c] = \beta \cos\big(\textstyle\sum_j \theta_j + 2 \pi \zeta c / p\big).

The mean over phases of :math:`(\sum_j \cos(\theta_j + x_j))^k \cos(\sum_j
\theta_j + z)` is :math:`k!\, 2^{-k} \cos(\sum_j x_j - z)`, and the sum over
frequencies of :math:`\cos(2 \pi \zeta t / p)` is (p - 1) / 2 if p divides t and
-1/2 if not. Finitely many phases do for the mean if the harmonics of which the
product is made vanish over them, which integers decide: phases are :math:`2 \pi
s / n`, and the sum of :math:`\omega^r` with multiplicities :math:`c_r`, for a
primitive n-th root of unity, is 0 if and only if :math:`\sum_r c_r x^r
\prod_{q | n} (1 - x^{n / q})` is 0 modulo :math:`x^n - 1`, q prime: the product
is 0 at all n-th roots of unity but the primitive ones.

Source: arXiv 2402.09469, section 4 and appendix, for the margin and the design
``"paper"``; the others are this project's.
"""

import itertools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxattn import _checks
from jaxattn.ntk.margin.network import PolyNet, check_problem

_KINDS = ("lattice", "grid3", "paper")
# Harmonics that are compared at a time.
_BLOCK = 256


def max_margin(modulus: int, num_terms: int) -> float:
  r"""The largest margin of a network of norm 1.

  Args:
    modulus: p, odd.
    num_terms: k, at least 2.

  Returns:
    :math:`\gamma^*`, for any number of neurons; it is attained from (p - 1)
    3^(k-1) on, if not before.

  Raises:
    ValueError: if the modulus is even or below 3, or k below 2.

  Cost:
    O(k).

  Source:
    arXiv 2402.09469, theorem 4.1.

  Example:
    >>> from jaxattn.ntk import max_margin
    >>> print(f"{max_margin(7, 3) * 16 * 7 * 6:.6f}")
    3.000000
  """
  check_problem(modulus, num_terms)
  p, k = modulus, num_terms
  # As a square root of integers: exact until the last step but one.
  below = (2 * k + 2) ** (k + 1) * p ** (k - 1)
  return 2 * math.factorial(k) / ((p - 1) * math.sqrt(below))


def fourier_network(
  modulus: int,
  num_terms: int,
  *,
  kind: str = "lattice",
  phases: tuple[ArrayLike, int] | None = None,
  dtype: Any = jnp.float32,
) -> PolyNet:
  r"""A network of norm 1 whose margin is the largest there is.

  Every input and every wrong label is on the margin: f[y] is p - 1 times as
  large as each f[c], and of the other sign. For each frequency 1, ..., (p - 1)
  / 2, in this order, there is a neuron of each phase of the design:

  * ``"lattice"``: :math:`2 \pi t g / n` for t < n = 2 3^(k-1) and g = (1, 3,
    ..., 3^(k-2), 4 3^(k-2)), in all (p - 1) 3^(k-1) neurons;
  * ``"grid3"``: all multiples of a third of a turn, (p - 1) 3^k / 2 neurons;
  * ``"paper"``: all multiples of a quarter turn, one of each two that differ by
    half a turn in every term, (p - 1) 4^(k-1) neurons.

  Args:
    modulus: p, odd.
    num_terms: k, at least 2.
    kind: which design; beside phases it must be left out.
    phases: another design, the (s, n) of :func:`is_exact_design`.
    dtype: of the parameters, which are computed in float64.

  Returns:
    The parameters.

  Raises:
    ValueError: if the modulus is even or below 3, k below 2, the kind unknown
      or given beside phases, or the phases are no exact design.

  Cost:
    O(m k p), on the host.

  Source:
    arXiv 2402.09469, section 4, for ``"paper"``; this project for the others.

  Example:
    >>> from jaxattn.ntk import evaluate_margin, fourier_network, max_margin
    >>> net = fourier_network(7, 3)
    >>> found = evaluate_margin(net)
    >>> len(net.outer), f"{found.minimum / max_margin(7, 3):.4f}"
    (54, '1.0000')
  """
  check_problem(modulus, num_terms)
  _checks.check_choice("kind", kind, _KINDS)
  if phases is None:
    steps, n = _design(kind, num_terms)
  elif kind != _KINDS[0]:
    raise ValueError(f"kind must be left out beside phases, got {kind!r}")
  else:
    steps, n = _check_phases(*phases, num_terms)
    harmonic = _first_harmonic(steps, n)
    if harmonic is not None:
      raise ValueError(
        f"phases are not an exact design for num_terms={num_terms}: harmonic "
        f"{harmonic} does not vanish"
      )
  p, k = modulus, num_terms
  angles = 2 * np.pi * (steps % n) / n
  count = len(steps) * (p - 1) // 2
  size = count ** (-1 / (k + 1)) * math.sqrt(2 / ((k + 1) * p))
  # Reduced first: cosines of large numbers lose digits.
  turns = np.outer(np.arange(1, (p + 1) // 2), np.arange(p)) % p
  waves = 2 * np.pi * turns / p
  inner = np.cos(angles[None, :, :, None] + waves[:, None, None, :])
  outer = np.cos(angles.sum(1)[None, :, None] + waves[:, None, :])
  return PolyNet(
    jnp.asarray(size * inner.reshape(count, k, p), dtype),
    jnp.asarray(size * outer.reshape(count, p), dtype),
  )


def is_exact_design(phases: ArrayLike, n: int, num_terms: int) -> bool:
  r"""Says whether the mean over these phases is that over all.

  That is, whether :math:`\sum_{\theta \in Q} e^{i (h + 1) \cdot \theta} = 0`
  for all integers :math:`h \ne (-1, \ldots, -1)` with :math:`\|h\|_1 \le k` of
  the parity of k: all that the k-th power of k cosines contains.

  Args:
    phases: (Q, k) integers s; the phases are 2 pi s / n.
    n: into how many a turn is divided, at least 1.
    num_terms: k, at least 2.

  Returns:
    Whether they are.

  Raises:
    ValueError: if shapes or dtypes do not fit, n is below 1 or k below 2.

  Cost:
    O(Q k N) on the host, for N points with :math:`\|h\|_1 \le k`, below 6^k.

  Source:
    this project.

  Example:
    >>> from jaxattn.ntk import is_exact_design
    >>> lattice = [(t, 4 * t) for t in range(6)]
    >>> is_exact_design(lattice, 6, 2), is_exact_design([(0, 0), (1, 1)], 2, 2)
    (True, False)
  """
  _checks.check_integer("num_terms", num_terms, 2, None)
  return _first_harmonic(*_check_phases(phases, n, num_terms)) is None


def _check_phases(
  phases: ArrayLike, n: int, num_terms: int
) -> tuple[np.ndarray, int]:
  steps = np.asarray(phases)
  _checks.check_shape("phases", steps, (None, num_terms), "(Q, k)")
  if not len(steps) or not np.issubdtype(steps.dtype, np.integer):
    raise ValueError(
      "phases must be one or more rows of integers, got shape "
      f"{steps.shape} of {steps.dtype}"
    )
  _checks.check_integer("n", n, 1, None)
  return steps.astype(np.int64) % n, n


def _design(kind: str, k: int) -> tuple[np.ndarray, int]:
  """(Q, k) integers s and the n of phases 2 pi s / n."""
  if kind == "grid3":
    return np.array(list(itertools.product(range(3), repeat=k))), 3
  if kind == "paper":
    steps = itertools.product(range(2), *[range(4)] * (k - 1))
    return np.array(list(steps)), 4
  n = 2 * 3 ** (k - 1)
  generator = [3**j for j in range(k - 1)] + [4 * 3 ** (k - 2)]
  return np.outer(np.arange(n), generator) % n, n


def _first_harmonic(steps: np.ndarray, n: int) -> tuple[int, ...] | None:
  """A harmonic that should vanish over the phases, and does not."""
  harmonics = _harmonics(steps.shape[1])
  for start in range(0, len(harmonics), _BLOCK):
    block = harmonics[start : start + _BLOCK]
    residues = block @ steps.T % n
    residues += n * np.arange(len(block))[:, None]
    counts = np.bincount(residues.ravel(), minlength=n * len(block))
    bad = ~_vanishes(counts.reshape(len(block), n))
    if bad.any():
      return tuple(int(h) for h in block[bad.argmax()])
  return None


def _harmonics(k: int) -> np.ndarray:
  """(N, k): h + 1 for all h of the sum, the simplest first."""
  # With each h what is left of k: all (2 k + 1)^k of the cube would be many.
  rows: list[tuple[tuple[int, ...], int]] = [((), k)]
  for _ in range(k):
    rows = [
      ((*h, x), left - abs(x))
      for h, left in rows
      for x in range(-left, left + 1)
    ]
  found = [tuple(x + 1 for x in h) for h, left in rows if left % 2 == 0]
  found.remove((0,) * k)
  return np.array(sorted(found, key=lambda h: (sum(map(abs, h)), -h[0], h)))


def _vanishes(counts: np.ndarray) -> np.ndarray:
  """Whether sum_r counts[..., r] omega^r = 0, exactly; see the module."""
  n = counts.shape[-1]
  rest, q = n, 2
  while rest > 1:
    if rest % q == 0:
      counts = counts - np.roll(counts, n // q, axis=-1)
      while rest % q == 0:
        rest //= q
    q += 1
  return np.abs(counts).max(-1) == 0
