"""Numerical helpers that several rooms share: selection of the largest."""

from jaxattn.numerics.select import topk_indices as topk_indices
from jaxattn.numerics.select import topk_merge as topk_merge

__all__ = ["topk_indices", "topk_merge"]
