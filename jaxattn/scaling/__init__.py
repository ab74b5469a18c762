"""Scaling laws: slopes of sweeps and the statistics that decide claims."""

from jaxattn.scaling.power_law import Slope as Slope
from jaxattn.scaling.power_law import fit_slope as fit_slope

__all__ = ["Slope", "fit_slope"]
