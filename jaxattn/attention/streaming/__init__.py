"""Attention over a stream, in memory that does not grow with it.

``stream`` is used through this package, as ``streaming.stream``.
"""

from jaxattn.attention.streaming.driver import state_bytes as state_bytes
from jaxattn.attention.streaming.driver import stream as stream
from jaxattn.attention.streaming.moments import MomentInfo as MomentInfo
from jaxattn.attention.streaming.moments import MomentState as MomentState
from jaxattn.attention.streaming.moments import moment_decay as moment_decay
from jaxattn.attention.streaming.moments import (
  moment_downdate as moment_downdate,
)
from jaxattn.attention.streaming.moments import moment_init as moment_init
from jaxattn.attention.streaming.moments import moment_merge as moment_merge
from jaxattn.attention.streaming.moments import moment_query as moment_query
from jaxattn.attention.streaming.moments import moment_update as moment_update

__all__ = [
  "MomentInfo",
  "MomentState",
  "moment_decay",
  "moment_downdate",
  "moment_init",
  "moment_merge",
  "moment_query",
  "moment_update",
  "state_bytes",
  "stream",
]
