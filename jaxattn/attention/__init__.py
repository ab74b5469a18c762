"""Attention functions: exact, sparse and, later, almost linear."""

from jaxattn.attention import streaming as streaming
from jaxattn.attention._hopfield import CapacityBound as CapacityBound
from jaxattn.attention._hopfield import HopfieldInfo as HopfieldInfo
from jaxattn.attention._hopfield import HopfieldPlan as HopfieldPlan
from jaxattn.attention._hopfield import HopfieldState as HopfieldState
from jaxattn.attention._hopfield import (
  RetrievalErrorBound as RetrievalErrorBound,
)
from jaxattn.attention._hopfield import (
  capacity_lower_bound as capacity_lower_bound,
)
from jaxattn.attention._hopfield import hopfield_add as hopfield_add
from jaxattn.attention._hopfield import hopfield_energy as hopfield_energy
from jaxattn.attention._hopfield import hopfield_forget as hopfield_forget
from jaxattn.attention._hopfield import hopfield_plan as hopfield_plan
from jaxattn.attention._hopfield import hopfield_retrieve as hopfield_retrieve
from jaxattn.attention._hopfield import hopfield_store as hopfield_store
from jaxattn.attention._hopfield import hopfield_update as hopfield_update
from jaxattn.attention._hopfield import pattern_separation as pattern_separation
from jaxattn.attention._hopfield import (
  retrieval_error_bound as retrieval_error_bound,
)
from jaxattn.attention._prefix import NTKAttentionInfo as NTKAttentionInfo
from jaxattn.attention._prefix import PrefixState as PrefixState
from jaxattn.attention._prefix import fit_prefix_state as fit_prefix_state
from jaxattn.attention._prefix import ntk_attention as ntk_attention
from jaxattn.attention._prefix import prefix_attention as prefix_attention
from jaxattn.attention._prefix import (
  prefix_state_downdate as prefix_state_downdate,
)
from jaxattn.attention._prefix import prefix_state_init as prefix_state_init
from jaxattn.attention._prefix import prefix_state_update as prefix_state_update
from jaxattn.attention.layer_gradients import LayerGradients as LayerGradients
from jaxattn.attention.layer_gradients import (
  attention_layer_gradients as attention_layer_gradients,
)
from jaxattn.attention.layer_gradients import (
  attention_layer_gradients_lowrank as attention_layer_gradients_lowrank,
)
from jaxattn.attention.layer_gradients import (
  multilayer_gradients as multilayer_gradients,
)
from jaxattn.attention.linear import linear_attention as linear_attention
from jaxattn.attention.losses import attention_loss as attention_loss
from jaxattn.attention.losses import (
  attention_loss_gradient as attention_loss_gradient,
)
from jaxattn.attention.polynomial import (
  polynomial_attention as polynomial_attention,
)
from jaxattn.attention.radius import logit_radius as logit_radius
from jaxattn.attention.radius import (
  tensor_logit_radius as tensor_logit_radius,
)
from jaxattn.attention.relu import relu_attention as relu_attention
from jaxattn.attention.scores import SparsityProfile as SparsityProfile
from jaxattn.attention.scores import adaptive_budget as adaptive_budget
from jaxattn.attention.scores import fit_budget_law as fit_budget_law
from jaxattn.attention.scores import gaussian_budget as gaussian_budget
from jaxattn.attention.scores import (
  gaussian_count_above as gaussian_count_above,
)
from jaxattn.attention.scores import gaussian_exponent as gaussian_exponent
from jaxattn.attention.scores import gaussian_topk_mass as gaussian_topk_mass
from jaxattn.attention.scores import row_sigma as row_sigma
from jaxattn.attention.scores import sparsity_profile as sparsity_profile
from jaxattn.attention.streaming import MomentInfo as MomentInfo
from jaxattn.attention.streaming import MomentState as MomentState
from jaxattn.attention.streaming import ThreeSketchState as ThreeSketchState
from jaxattn.attention.streaming import moment_decay as moment_decay
from jaxattn.attention.streaming import moment_downdate as moment_downdate
from jaxattn.attention.streaming import moment_init as moment_init
from jaxattn.attention.streaming import moment_merge as moment_merge
from jaxattn.attention.streaming import moment_query as moment_query
from jaxattn.attention.streaming import moment_update as moment_update
from jaxattn.attention.streaming import state_bytes as state_bytes
from jaxattn.attention.streaming import (
  three_sketch_decode as three_sketch_decode,
)
from jaxattn.attention.streaming import (
  three_sketch_finalize as three_sketch_finalize,
)
from jaxattn.attention.streaming import three_sketch_init as three_sketch_init
from jaxattn.attention.streaming import three_sketch_merge as three_sketch_merge
from jaxattn.attention.streaming import (
  three_sketch_update_key as three_sketch_update_key,
)
from jaxattn.attention.streaming import (
  three_sketch_update_query as three_sketch_update_query,
)
from jaxattn.attention.streaming import (
  three_sketch_update_value as three_sketch_update_value,
)
from jaxattn.attention.tensor import (
  polynomial_order_attention as polynomial_order_attention,
)
from jaxattn.attention.tensor import (
  polynomial_tensor_attention as polynomial_tensor_attention,
)
from jaxattn.attention.tensor import tensor_attention as tensor_attention
from jaxattn.attention.tensor import tensor_moment_query as tensor_moment_query
from jaxattn.attention.tensor_losses import (
  tensor_attention_loss as tensor_attention_loss,
)
from jaxattn.attention.tensor_losses import (
  tensor_attention_loss_gradient as tensor_attention_loss_gradient,
)
from jaxattn.attention.topk import TopKInfo as TopKInfo
from jaxattn.attention.topk import topk_attention as topk_attention
from jaxattn.features.rotary import rope as rope
from jaxattn.softmax.exact import softmax_attention as softmax_attention
from pallas_kernels.flash_attention import BlockSizes as BlockSizes

__all__ = [
  "BlockSizes",
  "CapacityBound",
  "HopfieldInfo",
  "HopfieldPlan",
  "HopfieldState",
  "LayerGradients",
  "MomentInfo",
  "MomentState",
  "NTKAttentionInfo",
  "PrefixState",
  "RetrievalErrorBound",
  "SparsityProfile",
  "ThreeSketchState",
  "TopKInfo",
  "adaptive_budget",
  "attention_layer_gradients",
  "attention_layer_gradients_lowrank",
  "attention_loss",
  "attention_loss_gradient",
  "capacity_lower_bound",
  "fit_budget_law",
  "fit_prefix_state",
  "gaussian_budget",
  "gaussian_count_above",
  "gaussian_exponent",
  "gaussian_topk_mass",
  "hopfield_add",
  "hopfield_energy",
  "hopfield_forget",
  "hopfield_plan",
  "hopfield_retrieve",
  "hopfield_store",
  "hopfield_update",
  "linear_attention",
  "logit_radius",
  "moment_decay",
  "moment_downdate",
  "moment_init",
  "moment_merge",
  "moment_query",
  "moment_update",
  "multilayer_gradients",
  "ntk_attention",
  "pattern_separation",
  "polynomial_attention",
  "polynomial_order_attention",
  "polynomial_tensor_attention",
  "prefix_attention",
  "prefix_state_downdate",
  "prefix_state_init",
  "prefix_state_update",
  "relu_attention",
  "retrieval_error_bound",
  "rope",
  "row_sigma",
  "softmax_attention",
  "sparsity_profile",
  "state_bytes",
  "streaming",
  "tensor_attention",
  "tensor_attention_loss",
  "tensor_attention_loss_gradient",
  "tensor_logit_radius",
  "tensor_moment_query",
  "three_sketch_decode",
  "three_sketch_finalize",
  "three_sketch_init",
  "three_sketch_merge",
  "three_sketch_update_key",
  "three_sketch_update_query",
  "three_sketch_update_value",
  "topk_attention",
]
