r"""Networks of two layers whose hidden weights are signs.

With latent weights W (m, d), fixed output signs a and :math:`q = \mathrm{sign}
(W)`, where sign(0) = 1,

.. math:: f(x) = \frac{\kappa}{\sqrt m} \sum_r a_r\, \mathrm{relu}(q_r \cdot x),

trained by gradient descent on :math:`\tfrac12 \sum_i (f(x_i) - y_i)^2` (of
neurons in pairs; otherwise of f less its value at the start) with
the straight-through gradient, :math:`\partial q / \partial W := I`. Its twin of
full precision has w in place of q. The kernel that predicts training is neither
the twin's nor that of straight-through gradients: a latent step of size
:math:`\delta` flips a sign with probability :math:`|\delta| / \sqrt{2 \pi}`,
and a flip changes the output by a secant, so that to leading order in the width

.. math:: f_{t+1} = f_t - \eta\, c\, K_{\mathrm{sec}} (f_t - y),
  \qquad c = \sqrt{2 / \pi},

up to fluctuations of one run of size :math:`m^{-1/4}`, and up to weights that
late in training flip back and forth around 0 (averages over a few steps remove
what they do). At a fixed dimension that limit is not the twin's: the gap
between them has a floor in the width. Source: arXiv 2411.01663 for the network
and the claim; the effective kernel and its rate are this project's.
"""

from jaxattn.ntk.one_bit.kernels import SignKernel as SignKernel
from jaxattn.ntk.one_bit.kernels import secant_kernel as secant_kernel
from jaxattn.ntk.one_bit.kernels import ste_kernel as ste_kernel
from jaxattn.ntk.one_bit.network import OneBit as OneBit
from jaxattn.ntk.one_bit.network import apply as apply
from jaxattn.ntk.one_bit.network import init as init
from jaxattn.ntk.one_bit.network import packed_apply as packed_apply
from jaxattn.ntk.one_bit.quantize import quantize_rows as quantize_rows
from jaxattn.ntk.one_bit.quantize import sign_ste as sign_ste
from jaxattn.ntk.one_bit.table import ScalingTable as ScalingTable
from jaxattn.ntk.one_bit.table import scaling_table as scaling_table
from jaxattn.ntk.one_bit.training import OneBitHistory as OneBitHistory
from jaxattn.ntk.one_bit.training import effective_rate as effective_rate
from jaxattn.ntk.one_bit.training import (
  generalization_difference as generalization_difference,
)
from jaxattn.ntk.one_bit.training import train_one_bit as train_one_bit

__all__ = [
  "OneBit",
  "OneBitHistory",
  "ScalingTable",
  "SignKernel",
  "apply",
  "effective_rate",
  "generalization_difference",
  "init",
  "packed_apply",
  "quantize_rows",
  "scaling_table",
  "secant_kernel",
  "sign_ste",
  "ste_kernel",
  "train_one_bit",
]
