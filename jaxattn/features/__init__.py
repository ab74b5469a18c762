"""Feature maps of kernels: polynomial, positive, sketched; their moments."""

from jaxattn.features.coefficients import (
  attention_error_bound as attention_error_bound,
)
from jaxattn.features.coefficients import degree_for as degree_for
from jaxattn.features.coefficients import (
  polynomial_coefficients as polynomial_coefficients,
)
from jaxattn.features.coefficients import polynomial_error as polynomial_error
from jaxattn.features.coefficients import (
  taylor_error_bound as taylor_error_bound,
)
from jaxattn.features.maps import FeatureMap as FeatureMap
from jaxattn.features.maps import apply_feature_map as apply_feature_map
from jaxattn.features.maps import favor_map as favor_map
from jaxattn.features.maps import sketched_map as sketched_map
from jaxattn.features.maps import taylor_map as taylor_map
from jaxattn.features.moments import feature_moments as feature_moments
from jaxattn.features.moments import moment_attention as moment_attention
from jaxattn.features.monomials import feature_count as feature_count
from jaxattn.features.monomials import monomial_features as monomial_features
from jaxattn.features.monomials import monomial_weights as monomial_weights
from jaxattn.features.monomials import taylor_features as taylor_features
from jaxattn.features.monomials import taylor_norm_bound as taylor_norm_bound
from jaxattn.features.rotary import rope as rope
from jaxattn.features.rotary import rope_angles as rope_angles

__all__ = [
  "FeatureMap",
  "apply_feature_map",
  "attention_error_bound",
  "degree_for",
  "favor_map",
  "feature_count",
  "feature_moments",
  "moment_attention",
  "monomial_features",
  "monomial_weights",
  "polynomial_coefficients",
  "polynomial_error",
  "rope",
  "rope_angles",
  "sketched_map",
  "taylor_error_bound",
  "taylor_features",
  "taylor_map",
  "taylor_norm_bound",
]
