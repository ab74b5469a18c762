r"""Modern Hopfield networks: associative memory by softmax, dense and low-rank.

Patterns :math:`\xi_\mu`, the rows of :math:`\Xi` (M, d), are minima, or near
to them, of

.. math::

  E(x) = -\beta^{-1} \log \sum_\mu e^{\beta \xi_\mu \cdot x} + \tfrac12 |x|^2
    + \beta^{-1} \log M + \tfrac12 \max_\mu |\xi_\mu|^2,

and :math:`T(x) = \Xi^\top \mathrm{softmax}(\beta \Xi x)`, attention with the
patterns for keys and values, never increases it. If all logits
:math:`\beta x \cdot \xi` are small, Taylor features
:math:`\phi(x) \cdot \phi(\xi) \approx e^{\beta x \cdot \xi}` store the patterns
once, in :math:`Z = \sum_\mu \phi(\xi_\mu) v_\mu^\top` and
:math:`k = \sum_\mu \phi(\xi_\mu)`, and a query costs the same for any M:
:math:`\tilde T(x) = Z^\top \phi(x) / k^\top \phi(x)`. Sources: Ramsauer et al.,
arXiv 2008.02217, for energy, update and capacity; arXiv 2402.04520 for when the
low-rank path can pay; the rule for its degree is this project's.
"""

from jaxattn.attention._hopfield.bounds import CapacityBound as CapacityBound
from jaxattn.attention._hopfield.bounds import (
  RetrievalErrorBound as RetrievalErrorBound,
)
from jaxattn.attention._hopfield.bounds import (
  capacity_lower_bound as capacity_lower_bound,
)
from jaxattn.attention._hopfield.bounds import (
  pattern_separation as pattern_separation,
)
from jaxattn.attention._hopfield.bounds import (
  retrieval_error_bound as retrieval_error_bound,
)
from jaxattn.attention._hopfield.dense import hopfield_energy as hopfield_energy
from jaxattn.attention._hopfield.dense import hopfield_update as hopfield_update
from jaxattn.attention._hopfield.plan import HopfieldPlan as HopfieldPlan
from jaxattn.attention._hopfield.plan import hopfield_plan as hopfield_plan
from jaxattn.attention._hopfield.retrieve import HopfieldInfo as HopfieldInfo
from jaxattn.attention._hopfield.retrieve import (
  hopfield_retrieve as hopfield_retrieve,
)
from jaxattn.attention._hopfield.retrieve import (
  iterate_queries as iterate_queries,
)
from jaxattn.attention._hopfield.state import HopfieldState as HopfieldState
from jaxattn.attention._hopfield.state import hopfield_add as hopfield_add
from jaxattn.attention._hopfield.state import hopfield_forget as hopfield_forget
from jaxattn.attention._hopfield.state import hopfield_store as hopfield_store

__all__ = [
  "CapacityBound",
  "HopfieldInfo",
  "HopfieldPlan",
  "HopfieldState",
  "RetrievalErrorBound",
  "capacity_lower_bound",
  "hopfield_add",
  "hopfield_energy",
  "hopfield_forget",
  "hopfield_plan",
  "hopfield_retrieve",
  "hopfield_store",
  "hopfield_update",
  "iterate_queries",
  "pattern_separation",
  "retrieval_error_bound",
]
