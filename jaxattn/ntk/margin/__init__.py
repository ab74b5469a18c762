"""Networks that add modulo p: margins, Fourier circuits, what was learned.

``init``, ``apply`` and ``normalize`` are used through this package, as
``margin.apply``.
"""

from jaxattn.ntk.margin.design import fourier_network as fourier_network
from jaxattn.ntk.margin.design import is_exact_design as is_exact_design
from jaxattn.ntk.margin.design import max_margin as max_margin
from jaxattn.ntk.margin.network import PolyNet as PolyNet
from jaxattn.ntk.margin.network import apply as apply
from jaxattn.ntk.margin.network import group_norm as group_norm
from jaxattn.ntk.margin.network import init as init
from jaxattn.ntk.margin.network import modular_inputs as modular_inputs
from jaxattn.ntk.margin.network import modular_labels as modular_labels
from jaxattn.ntk.margin.network import normalize as normalize
from jaxattn.ntk.margin.report import FourierReport as FourierReport
from jaxattn.ntk.margin.report import Margin as Margin
from jaxattn.ntk.margin.report import evaluate_margin as evaluate_margin
from jaxattn.ntk.margin.report import expected_margin as expected_margin
from jaxattn.ntk.margin.report import fourier_report as fourier_report

__all__ = [
  "FourierReport",
  "Margin",
  "PolyNet",
  "apply",
  "evaluate_margin",
  "expected_margin",
  "fourier_network",
  "fourier_report",
  "group_norm",
  "init",
  "is_exact_design",
  "max_margin",
  "modular_inputs",
  "modular_labels",
  "normalize",
]
