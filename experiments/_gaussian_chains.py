r"""Laws of samplers on N(0, v I): all steps are linear, so all is closed form.

On the path of :func:`jaxattn.sampling.ou` the score at t is -x / V_t with
:math:`V_t = e^{-2t} v + 1 - e^{-2t}`. A sampler that starts from N(0, I) then
ends at some N(0, q I), whose total variation from N(0, v I) is a difference of
two chi-squared probabilities, in any dimension.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(8)


def total_variation(q: float, v: float, d: int) -> float:
  """Of N(0, q I) and N(0, v I) in d dimensions."""
  if q == v:
    return 0.0
  # Where the densities are equal: at this squared radius.
  squared = d * np.log(q / v) / (1 / v - 1 / q)
  inside = stats.chi2(d).cdf(np.array([squared / v, squared / q]))
  return float(abs(inside[0] - inside[1]))


def ddpm(v: float, t_max: float, num_steps: int) -> float:
  """The q of "ddpm" with equal steps from ``t_max`` to 0."""
  h, scales = _predictor(v, t_max, num_steps)
  q = 1.0
  for exponential in scales:
    # x' = e^h x + 2 (e^h - 1) s + noise, twice the part of the score of "ei".
    q = (2 * exponential - np.exp(h)) ** 2 * q + np.expm1(2 * h)
  return q


def ei(v: float, t_max: float, num_steps: int) -> float:
  """The q of "ei" with equal steps from ``t_max`` to 0."""
  return float(np.prod(_predictor(v, t_max, num_steps)[1]) ** 2)


def dpom(
  v: float, t_max: float, blocks: int, every: int, step_size: float
) -> float:
  """The q of "dpom", with as many steps of a corrector as of the predictor."""

  def correct(q: float, target: float) -> float:
    for _ in range(every):
      q = (1 - step_size / target) ** 2 * q + 2 * step_size
    return q

  return _corrected(v, t_max, blocks, every, correct)


def dpum(
  v: float,
  t_max: float,
  blocks: int,
  every: int,
  step_size: float,
  friction: float,
) -> float:
  """The q of "dpum", with as many steps of a corrector as of the predictor."""
  keep = np.exp(-friction * step_size)
  drift = (1 - keep) / friction
  pull = (step_size - drift) / friction
  var_x = step_size - 2 * drift + (1 - keep**2) / (2 * friction)
  cov = (1 - keep) ** 2 / friction
  noise = np.array([[1 - keep**2, cov], [cov, 2 / friction * var_x]])

  def correct(q: float, target: float) -> float:
    step = np.array([[keep, -drift / target], [drift, 1 - pull / target]])
    # Of velocity, which is fresh, and position.
    law = np.diag([1.0, q])
    for _ in range(every):
      law = step @ law @ step.T + noise
    return law[1, 1]

  return _corrected(v, t_max, blocks, every, correct)


def path_kl(v: float, t_max: float, num_steps: int) -> float:
  r"""KL divergence of paths of "ddpm", in one dimension, start not counted.

  .. math:: \int E (s(t_n, y_n) - s(t, y_t))^2 dt, \qquad
    E y_n y_t = e^{-(t_n - t)} V_t
  """
  ts = np.linspace(t_max, 0, num_steps + 1)
  start, h = ts[:-1, None], ts[:-1, None] - ts[1:, None]
  t = start - h * (_NODES + 1) / 2
  first, then = _variance(v, start), _variance(v, t)
  error = 1 / first + 1 / then - 2 * np.exp(-(start - t)) / first
  return float((error * _WEIGHTS * h / 2).sum())


def _corrected(
  v: float,
  t_max: float,
  blocks: int,
  every: int,
  correct: Callable[[float, float], float],
) -> float:
  num_steps = blocks * every
  _, scales = _predictor(v, t_max, num_steps)
  q = 1.0
  for block in range(blocks):
    q *= np.prod(scales[block * every : (block + 1) * every]) ** 2
    q = correct(q, _variance(v, t_max * (1 - (block + 1) / blocks)))
  return float(q)


def _predictor(
  v: float, t_max: float, num_steps: int
) -> tuple[float, np.ndarray]:
  """h, and what each step of "ei" multiplies by."""
  h = t_max / num_steps
  starts = np.linspace(t_max, 0, num_steps + 1)[:-1]
  return h, np.exp(h) - np.expm1(h) / _variance(v, starts)


def _variance(v: float, t: Any) -> Any:
  return np.exp(-2 * t) * v - np.expm1(-2 * t)
