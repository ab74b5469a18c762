"""Data that needs no download: numpy in, arrays out."""

from jaxattn.data.graphs import from_networkx as from_networkx
from jaxattn.data.graphs import load_g2_molecules as load_g2_molecules
from jaxattn.data.graphs import load_tu as load_tu
from jaxattn.data.graphs import pad_graphs as pad_graphs
from jaxattn.data.icl import ICLTask as ICLTask
from jaxattn.data.icl import corrupt_prompt as corrupt_prompt
from jaxattn.data.icl import sample_icl_task as sample_icl_task
from jaxattn.data.modular import modular_split as modular_split
from jaxattn.data.polytopes import birkhoff_polytope as birkhoff_polytope
from jaxattn.data.polytopes import elliptope as elliptope
from jaxattn.data.polytopes import load_flux_polytope as load_flux_polytope
from jaxattn.data.residual_ssm import ResidualSSM as ResidualSSM
from jaxattn.data.residual_ssm import (
  conditional_moments as conditional_moments,
)
from jaxattn.data.residual_ssm import (
  inconsistency_probability as inconsistency_probability,
)
from jaxattn.data.residual_ssm import permutation_floor as permutation_floor
from jaxattn.data.residual_ssm import (
  residual_linear_risk as residual_linear_risk,
)
from jaxattn.data.residual_ssm import residual_ssm as residual_ssm
from jaxattn.data.residual_ssm import (
  sample_residual_ssm as sample_residual_ssm,
)
from jaxattn.data.residual_ssm import (
  sample_sign_inconsistent as sample_sign_inconsistent,
)
from jaxattn.data.separation import separation_dataset as separation_dataset
from jaxattn.data.sequences import match3_batch as match3_batch
from jaxattn.data.sequences import recall_batch as recall_batch
from jaxattn.data.sequences import (
  single_location_batch as single_location_batch,
)
from jaxattn.data.series import SeriesData as SeriesData
from jaxattn.data.series import load_series as load_series
from jaxattn.data.series import (
  sign_inconsistency_rate as sign_inconsistency_rate,
)
from jaxattn.data.series import split_series as split_series
from jaxattn.data.series import standardize as standardize
from jaxattn.data.series import windows as windows
from jaxattn.data.tables import load_breast_cancer as load_breast_cancer
from jaxattn.data.tables import load_digits as load_digits
from jaxattn.data.tables import load_image_patches as load_image_patches
from jaxattn.data.text import byte_batches as byte_batches
from jaxattn.data.text import load_text as load_text

__all__ = [
  "ICLTask",
  "ResidualSSM",
  "SeriesData",
  "birkhoff_polytope",
  "byte_batches",
  "conditional_moments",
  "corrupt_prompt",
  "elliptope",
  "from_networkx",
  "inconsistency_probability",
  "load_breast_cancer",
  "load_digits",
  "load_flux_polytope",
  "load_g2_molecules",
  "load_image_patches",
  "load_series",
  "load_text",
  "load_tu",
  "match3_batch",
  "modular_split",
  "pad_graphs",
  "permutation_floor",
  "recall_batch",
  "residual_linear_risk",
  "residual_ssm",
  "sample_icl_task",
  "sample_residual_ssm",
  "sample_sign_inconsistent",
  "separation_dataset",
  "sign_inconsistency_rate",
  "single_location_batch",
  "split_series",
  "standardize",
  "windows",
]
