"""Scaling laws: sweeps over widths, and the statistics that decide claims."""

from jaxattn.scaling.power_law import JointPowerLaw as JointPowerLaw
from jaxattn.scaling.power_law import PowerLaw as PowerLaw
from jaxattn.scaling.power_law import Slope as Slope
from jaxattn.scaling.power_law import fit_joint_power_law as fit_joint_power_law
from jaxattn.scaling.power_law import fit_power_law as fit_power_law
from jaxattn.scaling.power_law import fit_slope as fit_slope
from jaxattn.scaling.power_law import lower_envelope as lower_envelope
from jaxattn.scaling.sweep import SweepResult as SweepResult
from jaxattn.scaling.sweep import sweep as sweep

__all__ = [
  "JointPowerLaw",
  "PowerLaw",
  "Slope",
  "SweepResult",
  "fit_joint_power_law",
  "fit_power_law",
  "fit_slope",
  "lower_envelope",
  "sweep",
]
