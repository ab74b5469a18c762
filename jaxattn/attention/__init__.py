"""Attention functions: exact, sparse and, later, almost linear."""

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
from jaxattn.attention.topk import TopKInfo as TopKInfo
from jaxattn.attention.topk import topk_attention as topk_attention
from jaxattn.softmax.exact import softmax_attention as softmax_attention
from pallas_kernels.flash_attention import BlockSizes as BlockSizes

__all__ = [
  "BlockSizes",
  "SparsityProfile",
  "TopKInfo",
  "adaptive_budget",
  "fit_budget_law",
  "gaussian_budget",
  "gaussian_count_above",
  "gaussian_exponent",
  "gaussian_topk_mass",
  "row_sigma",
  "softmax_attention",
  "sparsity_profile",
  "topk_attention",
]
