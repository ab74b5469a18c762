"""Tangent kernels of prefixes: of any length, in the limit, and trained."""

from jaxattn.ntk._prefix.context import PrefixContext as PrefixContext
from jaxattn.ntk._prefix.finite import prefix_ntk as prefix_ntk
from jaxattn.ntk._prefix.finite import prefix_output as prefix_output
from jaxattn.ntk._prefix.length import RequiredLength as RequiredLength
from jaxattn.ntk._prefix.length import required_length as required_length
from jaxattn.ntk._prefix.limit import prefix_limit_kernel as prefix_limit_kernel
from jaxattn.ntk._prefix.limit import (
  tied_prefix_limit_kernel as tied_prefix_limit_kernel,
)
from jaxattn.ntk._prefix.tied import tied_prefix_init as tied_prefix_init
from jaxattn.ntk._prefix.tied import (
  tied_prefix_jacobian as tied_prefix_jacobian,
)
from jaxattn.ntk._prefix.tied import tied_prefix_ntk as tied_prefix_ntk
from jaxattn.ntk._prefix.tied import tied_prefix_output as tied_prefix_output
from jaxattn.ntk._prefix.training import PrefixHistory as PrefixHistory
from jaxattn.ntk._prefix.training import train_prefix as train_prefix

__all__ = [
  "PrefixContext",
  "PrefixHistory",
  "RequiredLength",
  "prefix_limit_kernel",
  "prefix_ntk",
  "prefix_output",
  "required_length",
  "tied_prefix_init",
  "tied_prefix_jacobian",
  "tied_prefix_limit_kernel",
  "tied_prefix_ntk",
  "tied_prefix_output",
  "train_prefix",
]
