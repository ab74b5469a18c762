r"""Attention with a prefix, and the prefix folded into one small state.

A prefix adds m pairs of key and value that every query sees. With a feature map
:math:`\phi(q) \cdot \phi(k) \approx e^{s\, q \cdot k}` its share of numerator
and denominator needs two arrays whose size does not depend on m,

.. math::

  Z = \sum_r \phi(k_r) v_r^\top, \qquad k = \sum_r \phi(k_r), \qquad
  o(q) = \frac{\sum_j e^{s_j} v_j + Z^\top \phi(q)}
  {\sum_j e^{s_j} + k^\top \phi(q)},

the sums over j over the context that the query sees. Source: arXiv 2406.14036.
"""

from jaxattn.attention._prefix.exact import prefix_attention as prefix_attention
from jaxattn.attention._prefix.fit import fit_prefix_state as fit_prefix_state
from jaxattn.attention._prefix.ntk import NTKAttentionInfo as NTKAttentionInfo
from jaxattn.attention._prefix.ntk import ntk_attention as ntk_attention
from jaxattn.attention._prefix.state import PrefixState as PrefixState
from jaxattn.attention._prefix.state import (
  prefix_state_downdate as prefix_state_downdate,
)
from jaxattn.attention._prefix.state import (
  prefix_state_init as prefix_state_init,
)
from jaxattn.attention._prefix.state import (
  prefix_state_update as prefix_state_update,
)

__all__ = [
  "NTKAttentionInfo",
  "PrefixState",
  "fit_prefix_state",
  "ntk_attention",
  "prefix_attention",
  "prefix_state_downdate",
  "prefix_state_init",
  "prefix_state_update",
]
