"""Samplers: walks in convex bodies, flows, diffusions, mixtures, measures."""

from jaxattn.sampling import dikin as dikin
from jaxattn.sampling.chains import SamplingAlgorithm as SamplingAlgorithm
from jaxattn.sampling.chains import sample_chains as sample_chains
from jaxattn.sampling.diagnostics import (
  effective_sample_size as effective_sample_size,
)
from jaxattn.sampling.diagnostics import (
  potential_scale_reduction as potential_scale_reduction,
)
from jaxattn.sampling.dikin.barriers import LeverageSample as LeverageSample
from jaxattn.sampling.dikin.barriers import TensorSRHT as TensorSRHT
from jaxattn.sampling.dikin.barriers import barrier_hessian as barrier_hessian
from jaxattn.sampling.dikin.bodies import Affine as Affine
from jaxattn.sampling.dikin.bodies import Polytope as Polytope
from jaxattn.sampling.dikin.bodies import Spectrahedron as Spectrahedron
from jaxattn.sampling.dikin.bodies import analytic_center as analytic_center
from jaxattn.sampling.dikin.bodies import chebyshev_center as chebyshev_center
from jaxattn.sampling.dikin.bodies import full_dim_polytope as full_dim_polytope
from jaxattn.sampling.dikin.bodies import round_polytope as round_polytope
from jaxattn.sampling.dikin.walk import DikinInfo as DikinInfo
from jaxattn.sampling.dikin.walk import DikinState as DikinState
from jaxattn.sampling.dikin.walk import dikin_walk as dikin_walk
from jaxattn.sampling.dikin.weights import john_weights as john_weights
from jaxattn.sampling.dikin.weights import lewis_weights as lewis_weights
from jaxattn.sampling.flow import CFMInfo as CFMInfo
from jaxattn.sampling.flow import FlowLossInfo as FlowLossInfo
from jaxattn.sampling.flow import GDView as GDView
from jaxattn.sampling.flow import cfm_loss as cfm_loss
from jaxattn.sampling.flow import empirical_velocity as empirical_velocity
from jaxattn.sampling.flow import flow_loss as flow_loss
from jaxattn.sampling.flow import gaussian_cfm_floor as gaussian_cfm_floor
from jaxattn.sampling.flow import gaussian_velocity as gaussian_velocity
from jaxattn.sampling.flow import gd_view as gd_view
from jaxattn.sampling.flow import polynomial_basis as polynomial_basis
from jaxattn.sampling.flow import (
  polynomial_regularizer as polynomial_regularizer,
)
from jaxattn.sampling.hit_and_run import HitAndRunInfo as HitAndRunInfo
from jaxattn.sampling.hit_and_run import HitAndRunState as HitAndRunState
from jaxattn.sampling.hit_and_run import (
  coordinate_hit_and_run as coordinate_hit_and_run,
)
from jaxattn.sampling.hit_and_run import hit_and_run as hit_and_run
from jaxattn.sampling.metrics import TVKL as TVKL
from jaxattn.sampling.metrics import crps as crps
from jaxattn.sampling.metrics import energy_distance as energy_distance
from jaxattn.sampling.metrics import energy_score as energy_score
from jaxattn.sampling.metrics import gaussian_w2 as gaussian_w2
from jaxattn.sampling.metrics import memorization_ratio as memorization_ratio
from jaxattn.sampling.metrics import pinball as pinball
from jaxattn.sampling.metrics import pit_histogram as pit_histogram
from jaxattn.sampling.metrics import sliced_w2 as sliced_w2
from jaxattn.sampling.metrics import tv_kl_1d as tv_kl_1d
from jaxattn.sampling.mixture_bounds import ddpm_kl_bound as ddpm_kl_bound
from jaxattn.sampling.mixture_bounds import dpom_steps as dpom_steps
from jaxattn.sampling.mixture_bounds import dpum_steps as dpum_steps
from jaxattn.sampling.mixture_bounds import (
  gmm_init_kl_bound as gmm_init_kl_bound,
)
from jaxattn.sampling.mixture_bounds import (
  gmm_score_lipschitz_bound as gmm_score_lipschitz_bound,
)
from jaxattn.sampling.mixture_bounds import (
  gmm_second_moment as gmm_second_moment,
)
from jaxattn.sampling.mixture_bounds import perturbed_score as perturbed_score
from jaxattn.sampling.mixture_bounds import (
  score_from_denoiser as score_from_denoiser,
)
from jaxattn.sampling.mixture_diffusion import GMM as GMM
from jaxattn.sampling.mixture_diffusion import gmm_denoise as gmm_denoise
from jaxattn.sampling.mixture_diffusion import gmm_init as gmm_init
from jaxattn.sampling.mixture_diffusion import gmm_logpdf as gmm_logpdf
from jaxattn.sampling.mixture_diffusion import (
  gmm_responsibilities as gmm_responsibilities,
)
from jaxattn.sampling.mixture_diffusion import gmm_sample as gmm_sample
from jaxattn.sampling.mixture_diffusion import gmm_score as gmm_score
from jaxattn.sampling.mixture_diffusion import (
  gmm_score_jacobian as gmm_score_jacobian,
)
from jaxattn.sampling.mixture_diffusion import gmm_velocity as gmm_velocity
from jaxattn.sampling.schedules import Schedule as Schedule
from jaxattn.sampling.schedules import ou as ou
from jaxattn.sampling.schedules import path_sample as path_sample
from jaxattn.sampling.schedules import straight as straight
from jaxattn.sampling.schedules import time_grid as time_grid
from jaxattn.sampling.solvers import Corrector as Corrector
from jaxattn.sampling.solvers import integrate as integrate
from jaxattn.sampling.solvers import sample_diffusion as sample_diffusion
from jaxattn.sampling.solvers import sample_flow as sample_flow

__all__ = [
  "GMM",
  "TVKL",
  "Affine",
  "CFMInfo",
  "Corrector",
  "DikinInfo",
  "DikinState",
  "FlowLossInfo",
  "GDView",
  "HitAndRunInfo",
  "HitAndRunState",
  "LeverageSample",
  "Polytope",
  "SamplingAlgorithm",
  "Schedule",
  "Spectrahedron",
  "TensorSRHT",
  "analytic_center",
  "barrier_hessian",
  "cfm_loss",
  "chebyshev_center",
  "coordinate_hit_and_run",
  "crps",
  "ddpm_kl_bound",
  "dikin",
  "dikin_walk",
  "dpom_steps",
  "dpum_steps",
  "effective_sample_size",
  "empirical_velocity",
  "energy_distance",
  "energy_score",
  "flow_loss",
  "full_dim_polytope",
  "gaussian_cfm_floor",
  "gaussian_velocity",
  "gaussian_w2",
  "gd_view",
  "gmm_denoise",
  "gmm_init",
  "gmm_init_kl_bound",
  "gmm_logpdf",
  "gmm_responsibilities",
  "gmm_sample",
  "gmm_score",
  "gmm_score_jacobian",
  "gmm_score_lipschitz_bound",
  "gmm_second_moment",
  "gmm_velocity",
  "hit_and_run",
  "integrate",
  "john_weights",
  "lewis_weights",
  "memorization_ratio",
  "ou",
  "path_sample",
  "perturbed_score",
  "pinball",
  "pit_histogram",
  "polynomial_basis",
  "polynomial_regularizer",
  "potential_scale_reduction",
  "round_polytope",
  "sample_chains",
  "sample_diffusion",
  "sample_flow",
  "score_from_denoiser",
  "sliced_w2",
  "straight",
  "time_grid",
  "tv_kl_1d",
]
