"""Tangent kernels in closed form, and what they predict of training."""

from jaxattn.ntk.flow import linearized_loss as linearized_loss
from jaxattn.ntk.infinite import mlp_ntk as mlp_ntk
from jaxattn.ntk.infinite import relu_covariance as relu_covariance
from jaxattn.ntk.prefix import tied_prefix_jacobian as tied_prefix_jacobian
from jaxattn.ntk.prefix import tied_prefix_ntk as tied_prefix_ntk
from jaxattn.ntk.prefix import tied_prefix_output as tied_prefix_output

__all__ = [
  "linearized_loss",
  "mlp_ntk",
  "relu_covariance",
  "tied_prefix_jacobian",
  "tied_prefix_ntk",
  "tied_prefix_output",
]
