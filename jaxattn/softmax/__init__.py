"""Exact attention, the online softmax under it, and prefixes."""

from jaxattn.softmax.cache import Prefix as Prefix
from jaxattn.softmax.cache import prefix_init as prefix_init
from jaxattn.softmax.exact import softmax_attention as softmax_attention
from jaxattn.softmax.jacobian import (
  softmax_jacobian_matvec as softmax_jacobian_matvec,
)
from jaxattn.softmax.jacobian import (
  softmax_jacobian_matvec_jvp as softmax_jacobian_matvec_jvp,
)
from jaxattn.softmax.online import OnlineSoftmax as OnlineSoftmax
from jaxattn.softmax.online import (
  online_softmax_finalize as online_softmax_finalize,
)
from jaxattn.softmax.online import online_softmax_init as online_softmax_init
from jaxattn.softmax.online import online_softmax_merge as online_softmax_merge
from jaxattn.softmax.online import (
  online_softmax_update as online_softmax_update,
)
from pallas_kernels.flash_attention import BlockSizes as BlockSizes

__all__ = [
  "BlockSizes",
  "OnlineSoftmax",
  "Prefix",
  "online_softmax_finalize",
  "online_softmax_init",
  "online_softmax_merge",
  "online_softmax_update",
  "prefix_init",
  "softmax_attention",
  "softmax_jacobian_matvec",
  "softmax_jacobian_matvec_jvp",
]
