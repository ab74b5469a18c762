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
from jaxattn.attention.streaming.three_sketch import (
  ThreeSketchState as ThreeSketchState,
)
from jaxattn.attention.streaming.three_sketch import (
  three_sketch_decode as three_sketch_decode,
)
from jaxattn.attention.streaming.three_sketch import (
  three_sketch_finalize as three_sketch_finalize,
)
from jaxattn.attention.streaming.three_sketch import (
  three_sketch_init as three_sketch_init,
)
from jaxattn.attention.streaming.three_sketch import (
  three_sketch_merge as three_sketch_merge,
)
from jaxattn.attention.streaming.three_sketch import (
  three_sketch_update_key as three_sketch_update_key,
)
from jaxattn.attention.streaming.three_sketch import (
  three_sketch_update_query as three_sketch_update_query,
)
from jaxattn.attention.streaming.three_sketch import (
  three_sketch_update_value as three_sketch_update_value,
)

__all__ = [
  "MomentInfo",
  "MomentState",
  "ThreeSketchState",
  "moment_decay",
  "moment_downdate",
  "moment_init",
  "moment_merge",
  "moment_query",
  "moment_update",
  "state_bytes",
  "stream",
  "three_sketch_decode",
  "three_sketch_finalize",
  "three_sketch_init",
  "three_sketch_merge",
  "three_sketch_update_key",
  "three_sketch_update_query",
  "three_sketch_update_value",
]
