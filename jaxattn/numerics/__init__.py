"""Numerical helpers that several rooms share."""

from jaxattn.numerics.bits import pack_bits as pack_bits
from jaxattn.numerics.bits import pack_signs as pack_signs
from jaxattn.numerics.bits import unpack_bits as unpack_bits
from jaxattn.numerics.bits import unpack_signs as unpack_signs
from jaxattn.numerics.fixed_point import FixedPointResult as FixedPointResult
from jaxattn.numerics.fixed_point import fixed_point as fixed_point
from jaxattn.numerics.fixed_point import (
  fixed_point_iteration as fixed_point_iteration,
)
from jaxattn.numerics.linalg import KernelRidge as KernelRidge
from jaxattn.numerics.linalg import kernel_ridge_fit as kernel_ridge_fit
from jaxattn.numerics.linalg import kernel_ridge_predict as kernel_ridge_predict
from jaxattn.numerics.linalg import loo_residuals as loo_residuals
from jaxattn.numerics.linalg import power_iteration as power_iteration
from jaxattn.numerics.linalg import ridge_solve as ridge_solve
from jaxattn.numerics.linalg import spectral_bounds as spectral_bounds
from jaxattn.numerics.select import topk_indices as topk_indices
from jaxattn.numerics.select import topk_merge as topk_merge
from jaxattn.numerics.special import lambertw as lambertw
from jaxattn.numerics.summation import compensated_add as compensated_add

__all__ = [
  "FixedPointResult",
  "KernelRidge",
  "compensated_add",
  "fixed_point",
  "fixed_point_iteration",
  "kernel_ridge_fit",
  "kernel_ridge_predict",
  "lambertw",
  "loo_residuals",
  "pack_bits",
  "pack_signs",
  "power_iteration",
  "ridge_solve",
  "spectral_bounds",
  "topk_indices",
  "topk_merge",
  "unpack_bits",
  "unpack_signs",
]
