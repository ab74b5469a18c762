"""Checks every kernel on the machine at hand, and times it against its peers.

``python -m jaxattn.selfcheck [--only=flash_attention,...]`` prints a table in
Markdown, for an issue. It ends with status 0 if all is well, 1 if something is
wrong, and 2 if the call was.

Each kernel, forward and gradient, is held against the dense formula, which is
evaluated on the same machine in float32. Where the platform has kernels they
are compiled, at a size worth timing; elsewhere those for TPUs are interpreted
at a tiny one, which says nothing about speed. A kernel that fails is a row with
what it said.

A new kernel joins ``OPERATIONS``.
"""

from jaxattn.selfcheck.checks import DTYPES as DTYPES
from jaxattn.selfcheck.checks import Row as Row
from jaxattn.selfcheck.checks import how_kernels_run as how_kernels_run
from jaxattn.selfcheck.checks import is_wrong as is_wrong
from jaxattn.selfcheck.checks import selfcheck as selfcheck
from jaxattn.selfcheck.operations import OPERATIONS as OPERATIONS
from jaxattn.selfcheck.operations import Operation as Operation
from jaxattn.selfcheck.table import markdown as markdown

__all__ = [
  "DTYPES",
  "OPERATIONS",
  "Operation",
  "Row",
  "how_kernels_run",
  "is_wrong",
  "markdown",
  "selfcheck",
]
