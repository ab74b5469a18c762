"""Tangent kernels in closed form, and what they predict of training."""

from jaxattn.ntk import margin as margin
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
from jaxattn.ntk.margin import FourierReport as FourierReport
from jaxattn.ntk.margin import Margin as Margin
from jaxattn.ntk.margin import PolyNet as PolyNet
from jaxattn.ntk.margin import evaluate_margin as evaluate_margin
from jaxattn.ntk.margin import expected_margin as expected_margin
from jaxattn.ntk.margin import fourier_network as fourier_network
from jaxattn.ntk.margin import fourier_report as fourier_report
from jaxattn.ntk.margin import group_norm as group_norm
from jaxattn.ntk.margin import is_exact_design as is_exact_design
from jaxattn.ntk.margin import max_margin as max_margin
from jaxattn.ntk.margin import modular_inputs as modular_inputs
from jaxattn.ntk.margin import modular_labels as modular_labels

__all__ = [
  "FourierReport",
  "Margin",
  "PolyNet",
  "PrefixContext",
  "PrefixHistory",
  "RequiredLength",
  "evaluate_margin",
  "expected_margin",
  "fourier_network",
  "fourier_report",
  "group_norm",
  "is_exact_design",
  "linearized_loss",
  "margin",
  "max_margin",
  "mlp_ntk",
  "modular_inputs",
  "modular_labels",
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
