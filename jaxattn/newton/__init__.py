"""Damped Newton methods for regression problems with structured Hessians."""

from jaxattn.newton.centers import analytic_center as analytic_center
from jaxattn.newton.certificate import LocalCertificate as LocalCertificate
from jaxattn.newton.certificate import local_certificate as local_certificate
from jaxattn.newton.curvature import Curvature as Curvature
from jaxattn.newton.curvature import DenseCurvature as DenseCurvature
from jaxattn.newton.curvature import Design as Design
from jaxattn.newton.curvature import OperatorCurvature as OperatorCurvature
from jaxattn.newton.curvature import StructuredCurvature as StructuredCurvature
from jaxattn.newton.curvature import curvature_dense as curvature_dense
from jaxattn.newton.curvature import curvature_matvec as curvature_matvec
from jaxattn.newton.curvature import curvature_sample as curvature_sample
from jaxattn.newton.curvature import design_matvec as design_matvec
from jaxattn.newton.curvature import design_rows as design_rows
from jaxattn.newton.curvature import design_vecmat as design_vecmat
from jaxattn.newton.curvature import weighted_gram as weighted_gram
from jaxattn.newton.first_order import FirstOrderLog as FirstOrderLog
from jaxattn.newton.first_order import FirstOrderResult as FirstOrderResult
from jaxattn.newton.first_order import fista as fista
from jaxattn.newton.first_order import gradient_descent as gradient_descent
from jaxattn.newton.implicit import implicit_solution as implicit_solution
from jaxattn.newton.minimize import NewtonConfig as NewtonConfig
from jaxattn.newton.minimize import NewtonInfo as NewtonInfo
from jaxattn.newton.minimize import NewtonResult as NewtonResult
from jaxattn.newton.minimize import NewtonState as NewtonState
from jaxattn.newton.minimize import init as init
from jaxattn.newton.minimize import minimize as minimize
from jaxattn.newton.minimize import step as step
from jaxattn.newton.problem import Problem as Problem
from jaxattn.newton.problem import (
  least_squares_problem as least_squares_problem,
)

__all__ = [
  "Curvature",
  "DenseCurvature",
  "Design",
  "FirstOrderLog",
  "FirstOrderResult",
  "LocalCertificate",
  "NewtonConfig",
  "NewtonInfo",
  "NewtonResult",
  "NewtonState",
  "OperatorCurvature",
  "Problem",
  "StructuredCurvature",
  "analytic_center",
  "curvature_dense",
  "curvature_matvec",
  "curvature_sample",
  "design_matvec",
  "design_rows",
  "design_vecmat",
  "fista",
  "gradient_descent",
  "implicit_solution",
  "init",
  "least_squares_problem",
  "local_certificate",
  "minimize",
  "step",
  "weighted_gram",
]
