"""Regression problems of attention theory, and the inversions built on them.

``prepare``, ``predict``, ``loss``, ``value_and_grad``, ``curvature``,
``gauss_newton``, ``hvp``, ``problem`` and ``attack`` have the same names in all
modules: use them through theirs, as ``softmax_resnet.loss``.
"""

from jaxattn.regression import attention as attention
from jaxattn.regression import attention_inversion as attention_inversion
from jaxattn.regression import gradient_leakage as gradient_leakage
from jaxattn.regression import leverage_inversion as leverage_inversion
from jaxattn.regression import softmax_resnet as softmax_resnet
from jaxattn.regression import two_layer as two_layer
from jaxattn.regression.attention import AttentionFit as AttentionFit
from jaxattn.regression.attention import (
  AttentionRegressionData as AttentionRegressionData,
)
from jaxattn.regression.attention import factor_qk as factor_qk
from jaxattn.regression.attention import fit_attention as fit_attention
from jaxattn.regression.attention import hessian_blocks as hessian_blocks
from jaxattn.regression.attention import optimal_values as optimal_values
from jaxattn.regression.attention import (
  to_dot_product_attention as to_dot_product_attention,
)
from jaxattn.regression.attention_inversion import (
  AttentionInversionData as AttentionInversionData,
)
from jaxattn.regression.attention_inversion import (
  AttentionInversionResult as AttentionInversionResult,
)
from jaxattn.regression.attention_inversion import (
  congruence_solve as congruence_solve,
)
from jaxattn.regression.attention_inversion import (
  identifiability_report as identifiability_report,
)
from jaxattn.regression.attention_inversion import (
  invert_attention as invert_attention,
)
from jaxattn.regression.attention_inversion import (
  invert_closed_form as invert_closed_form,
)
from jaxattn.regression.attention_inversion import (
  invert_subspace as invert_subspace,
)
from jaxattn.regression.gradient_leakage import AttackConfig as AttackConfig
from jaxattn.regression.gradient_leakage import AttackResult as AttackResult
from jaxattn.regression.gradient_leakage import (
  GradientLeakageData as GradientLeakageData,
)
from jaxattn.regression.gradient_leakage import LeakReport as LeakReport
from jaxattn.regression.gradient_leakage import SpanResult as SpanResult
from jaxattn.regression.gradient_leakage import april_attack as april_attack
from jaxattn.regression.gradient_leakage import (
  gradient_matching_loss as gradient_matching_loss,
)
from jaxattn.regression.gradient_leakage import (
  label_from_bias as label_from_bias,
)
from jaxattn.regression.gradient_leakage import leak_report as leak_report
from jaxattn.regression.gradient_leakage import span_attack as span_attack
from jaxattn.regression.leverage_inversion import (
  LeverageInversionData as LeverageInversionData,
)
from jaxattn.regression.leverage_inversion import (
  LeverageInversionResult as LeverageInversionResult,
)
from jaxattn.regression.leverage_inversion import (
  barrier_matrix as barrier_matrix,
)
from jaxattn.regression.leverage_inversion import (
  invert_leverage as invert_leverage,
)
from jaxattn.regression.leverage_inversion import leverage as leverage
from jaxattn.regression.leverage_inversion import (
  leverage_jacobian as leverage_jacobian,
)
from jaxattn.regression.reweighted_icl import BaselineResult as BaselineResult
from jaxattn.regression.reweighted_icl import BilevelResult as BilevelResult
from jaxattn.regression.reweighted_icl import Prompt as Prompt
from jaxattn.regression.reweighted_icl import ReweightResult as ReweightResult
from jaxattn.regression.reweighted_icl import hypergradient as hypergradient
from jaxattn.regression.reweighted_icl import icl_baseline as icl_baseline
from jaxattn.regression.reweighted_icl import laricl as laricl
from jaxattn.regression.reweighted_icl import laricl_bilevel as laricl_bilevel
from jaxattn.regression.reweighted_icl import rank_examples as rank_examples
from jaxattn.regression.reweighted_icl import ricl as ricl
from jaxattn.regression.reweighted_icl import ricl_bilevel as ricl_bilevel
from jaxattn.regression.reweighted_icl import validation_loss as validation_loss
from jaxattn.regression.reweighted_icl import (
  weighted_predict as weighted_predict,
)
from jaxattn.regression.softmax_resnet import (
  SoftmaxResnetData as SoftmaxResnetData,
)
from jaxattn.regression.softmax_resnet import (
  fit_softmax_resnet as fit_softmax_resnet,
)
from jaxattn.regression.softmax_resnet import log_alpha as log_alpha
from jaxattn.regression.tokens import decode_tokens as decode_tokens
from jaxattn.regression.tokens import match_tokens as match_tokens
from jaxattn.regression.tokens import (
  reconstruction_metrics as reconstruction_metrics,
)
from jaxattn.regression.two_layer import TwoLayerData as TwoLayerData
from jaxattn.regression.two_layer import active_set as active_set
from jaxattn.regression.two_layer import fit_two_layer as fit_two_layer
from jaxattn.regression.two_layer import kink_margin as kink_margin

__all__ = [
  "AttackConfig",
  "AttackResult",
  "AttentionFit",
  "AttentionInversionData",
  "AttentionInversionResult",
  "AttentionRegressionData",
  "BaselineResult",
  "BilevelResult",
  "GradientLeakageData",
  "LeakReport",
  "LeverageInversionData",
  "LeverageInversionResult",
  "Prompt",
  "ReweightResult",
  "SoftmaxResnetData",
  "SpanResult",
  "TwoLayerData",
  "active_set",
  "april_attack",
  "attention",
  "attention_inversion",
  "barrier_matrix",
  "congruence_solve",
  "decode_tokens",
  "factor_qk",
  "fit_attention",
  "fit_softmax_resnet",
  "fit_two_layer",
  "gradient_leakage",
  "gradient_matching_loss",
  "hessian_blocks",
  "hypergradient",
  "icl_baseline",
  "identifiability_report",
  "invert_attention",
  "invert_closed_form",
  "invert_leverage",
  "invert_subspace",
  "kink_margin",
  "label_from_bias",
  "laricl",
  "laricl_bilevel",
  "leak_report",
  "leverage",
  "leverage_inversion",
  "leverage_jacobian",
  "log_alpha",
  "match_tokens",
  "optimal_values",
  "rank_examples",
  "reconstruction_metrics",
  "ricl",
  "ricl_bilevel",
  "softmax_resnet",
  "span_attack",
  "to_dot_product_attention",
  "two_layer",
  "validation_loss",
  "weighted_predict",
]
