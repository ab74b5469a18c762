"""Dikin walks in polytopes and spectrahedra, and what they are made of."""

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
from jaxattn.sampling.dikin.walk import build_kernel as build_kernel
from jaxattn.sampling.dikin.walk import dikin_walk as dikin_walk
from jaxattn.sampling.dikin.walk import init as init
from jaxattn.sampling.dikin.weights import john_weights as john_weights
from jaxattn.sampling.dikin.weights import lewis_weights as lewis_weights

__all__ = [
  "Affine",
  "DikinInfo",
  "DikinState",
  "LeverageSample",
  "Polytope",
  "Spectrahedron",
  "TensorSRHT",
  "analytic_center",
  "barrier_hessian",
  "build_kernel",
  "chebyshev_center",
  "dikin_walk",
  "full_dim_polytope",
  "init",
  "john_weights",
  "lewis_weights",
  "round_polytope",
]
