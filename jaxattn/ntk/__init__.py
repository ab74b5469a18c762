"""Tangent kernels in closed form, and what they predict of training."""

from jaxattn.ntk import margin as margin
from jaxattn.ntk import one_bit as one_bit
from jaxattn.ntk import softmax as softmax
from jaxattn.ntk._blocks import blocked_gram as blocked_gram
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
from jaxattn.ntk.empirical import empirical_ntk as empirical_ntk
from jaxattn.ntk.empirical import ntk_vector_product as ntk_vector_product
from jaxattn.ntk.empirical import sketched_ntk as sketched_ntk
from jaxattn.ntk.flow import KernelFactor as KernelFactor
from jaxattn.ntk.flow import descent_recursion as descent_recursion
from jaxattn.ntk.flow import descent_test as descent_test
from jaxattn.ntk.flow import descent_train as descent_train
from jaxattn.ntk.flow import flow_test as flow_test
from jaxattn.ntk.flow import flow_train as flow_train
from jaxattn.ntk.flow import kernel_factor as kernel_factor
from jaxattn.ntk.flow import linearized_loss as linearized_loss
from jaxattn.ntk.graph import GraphBatch as GraphBatch
from jaxattn.ntk.graph import graph_gntk as graph_gntk
from jaxattn.ntk.graph import node_gntk as node_gntk
from jaxattn.ntk.graph import self_covariances as self_covariances
from jaxattn.ntk.infinite import mlp_ntk as mlp_ntk
from jaxattn.ntk.infinite import relu_covariance as relu_covariance
from jaxattn.ntk.lazy import LazyMetrics as LazyMetrics
from jaxattn.ntk.lazy import lazy_metrics as lazy_metrics
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
from jaxattn.ntk.one_bit import OneBit as OneBit
from jaxattn.ntk.one_bit import OneBitHistory as OneBitHistory
from jaxattn.ntk.one_bit import ScalingTable as ScalingTable
from jaxattn.ntk.one_bit import SignKernel as SignKernel
from jaxattn.ntk.one_bit import effective_rate as effective_rate
from jaxattn.ntk.one_bit import (
  generalization_difference as generalization_difference,
)
from jaxattn.ntk.one_bit import packed_apply as packed_apply
from jaxattn.ntk.one_bit import quantize_rows as quantize_rows
from jaxattn.ntk.one_bit import scaling_table as scaling_table
from jaxattn.ntk.one_bit import secant_kernel as secant_kernel
from jaxattn.ntk.one_bit import sign_ste as sign_ste
from jaxattn.ntk.one_bit import ste_kernel as ste_kernel
from jaxattn.ntk.one_bit import train_one_bit as train_one_bit
from jaxattn.ntk.score import ScoreKernel as ScoreKernel
from jaxattn.ntk.score import ScoreNetwork as ScoreNetwork
from jaxattn.ntk.score import fit_score_kernel as fit_score_kernel
from jaxattn.ntk.score import fit_score_network as fit_score_network
from jaxattn.ntk.score import score_features as score_features
from jaxattn.ntk.softmax import TwoLayer as TwoLayer
from jaxattn.ntk.softmax import TwoLayerHistory as TwoLayerHistory
from jaxattn.ntk.softmax import limit_kernel as limit_kernel
from jaxattn.ntk.softmax import perturbation_bound as perturbation_bound
from jaxattn.ntk.softmax import perturbation_profile as perturbation_profile
from jaxattn.ntk.softmax import train_two_layer as train_two_layer
from jaxattn.ntk.structured import DenseTap as DenseTap
from jaxattn.ntk.structured import structured_ntk as structured_ntk

__all__ = [
  "DenseTap",
  "FourierReport",
  "GraphBatch",
  "KernelFactor",
  "LazyMetrics",
  "Margin",
  "OneBit",
  "OneBitHistory",
  "PolyNet",
  "PrefixContext",
  "PrefixHistory",
  "RequiredLength",
  "ScalingTable",
  "ScoreKernel",
  "ScoreNetwork",
  "SignKernel",
  "TwoLayer",
  "TwoLayerHistory",
  "blocked_gram",
  "descent_recursion",
  "descent_test",
  "descent_train",
  "effective_rate",
  "empirical_ntk",
  "evaluate_margin",
  "expected_margin",
  "fit_score_kernel",
  "fit_score_network",
  "flow_test",
  "flow_train",
  "fourier_network",
  "fourier_report",
  "generalization_difference",
  "graph_gntk",
  "group_norm",
  "is_exact_design",
  "kernel_factor",
  "lazy_metrics",
  "limit_kernel",
  "linearized_loss",
  "margin",
  "max_margin",
  "mlp_ntk",
  "modular_inputs",
  "modular_labels",
  "node_gntk",
  "ntk_vector_product",
  "one_bit",
  "packed_apply",
  "perturbation_bound",
  "perturbation_profile",
  "prefix_limit_kernel",
  "prefix_ntk",
  "prefix_output",
  "quantize_rows",
  "relu_covariance",
  "required_length",
  "scaling_table",
  "score_features",
  "secant_kernel",
  "self_covariances",
  "sign_ste",
  "sketched_ntk",
  "softmax",
  "ste_kernel",
  "structured_ntk",
  "tied_prefix_init",
  "tied_prefix_jacobian",
  "tied_prefix_limit_kernel",
  "tied_prefix_ntk",
  "tied_prefix_output",
  "train_one_bit",
  "train_prefix",
  "train_two_layer",
]
