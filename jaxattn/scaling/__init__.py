"""Scaling laws: sweeps over widths, and the statistics that decide claims."""

from jaxattn.scaling.power_law import Slope as Slope
from jaxattn.scaling.power_law import fit_slope as fit_slope
from jaxattn.scaling.sweep import SweepResult as SweepResult
from jaxattn.scaling.sweep import sweep as sweep

__all__ = ["Slope", "SweepResult", "fit_slope", "sweep"]
