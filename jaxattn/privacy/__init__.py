"""Differential privacy: calibrated noise, private gradients, their cost.

``epsilon`` and ``delta`` are those of (epsilon, delta)-differential privacy
everywhere. Noise in floating point is not private to the last bit: for a
release that must be, take a library with discrete noise.
"""

from jaxattn.privacy.gradients import DPGradientState as DPGradientState
from jaxattn.privacy.gradients import dp_gradient as dp_gradient
from jaxattn.privacy.gradients import perturbed_sgd_bound as perturbed_sgd_bound
from jaxattn.privacy.mechanisms import gaussian_epsilon as gaussian_epsilon
from jaxattn.privacy.mechanisms import gaussian_sigma as gaussian_sigma

__all__ = [
  "DPGradientState",
  "dp_gradient",
  "gaussian_epsilon",
  "gaussian_sigma",
  "perturbed_sgd_bound",
]
