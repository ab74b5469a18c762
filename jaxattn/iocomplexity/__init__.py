"""How many words attention moves between a cache and slow memory."""

from jaxattn.iocomplexity._cache import Cache as Cache
from jaxattn.iocomplexity._cache import Trace as Trace
from jaxattn.iocomplexity.blocks import block_sizes as block_sizes
from jaxattn.iocomplexity.bounds import compulsory_words as compulsory_words
from jaxattn.iocomplexity.bounds import io_lower_bound as io_lower_bound
from jaxattn.iocomplexity.counts import IOCount as IOCount
from jaxattn.iocomplexity.counts import best_algorithm as best_algorithm
from jaxattn.iocomplexity.counts import crossover as crossover
from jaxattn.iocomplexity.counts import io_count as io_count
from jaxattn.iocomplexity.counts import minimum_cache as minimum_cache
from jaxattn.iocomplexity.pebble import pebble_optimum as pebble_optimum
from jaxattn.iocomplexity.replay import replay as replay
from jaxattn.iocomplexity.simulator import simulate as simulate
from jaxattn.iocomplexity.traffic import blockspec_traffic as blockspec_traffic

__all__ = [
  "Cache",
  "IOCount",
  "Trace",
  "best_algorithm",
  "block_sizes",
  "blockspec_traffic",
  "compulsory_words",
  "crossover",
  "io_count",
  "io_lower_bound",
  "minimum_cache",
  "pebble_optimum",
  "replay",
  "simulate",
]
