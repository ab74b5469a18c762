"""Tangent kernels in closed form, and what they predict of training."""

from jaxattn.ntk._prefix import PrefixContext as PrefixContext
from jaxattn.ntk._prefix import PrefixHistory as PrefixHistory
from jaxattn.ntk._prefix import RequiredLength as RequiredLength
from jaxattn.ntk._prefix import prefix_limit_kernel as prefix_limit_kernel
from jaxattn.ntk._prefix import prefix_ntk as prefix_ntk
from jaxattn.ntk._prefix import prefix_output as prefix_output
from jaxattn.ntk._prefix import required_length as required_length
from jaxattn.ntk._prefix import tied_prefix_init as tied_prefix_init
from jaxattn.ntk._prefix import tied_prefix_jacobian as tied_prefix_jacobian
from jaxattn.ntk._prefix import (
  tied_prefix_limit_kernel as tied_prefix_limit_kernel,
)
from jaxattn.ntk._prefix import tied_prefix_ntk as tied_prefix_ntk
from jaxattn.ntk._prefix import tied_prefix_output as tied_prefix_output
from jaxattn.ntk._prefix import train_prefix as train_prefix
from jaxattn.ntk.flow import linearized_loss as linearized_loss
from jaxattn.ntk.infinite import mlp_ntk as mlp_ntk
from jaxattn.ntk.infinite import relu_covariance as relu_covariance

__all__ = [
  "PrefixContext",
  "PrefixHistory",
  "RequiredLength",
  "linearized_loss",
  "mlp_ntk",
  "prefix_limit_kernel",
  "prefix_ntk",
  "prefix_output",
  "relu_covariance",
  "required_length",
  "tied_prefix_init",
  "tied_prefix_jacobian",
  "tied_prefix_limit_kernel",
  "tied_prefix_ntk",
  "tied_prefix_output",
  "train_prefix",
]
