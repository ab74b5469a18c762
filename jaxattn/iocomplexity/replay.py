"""What a cache with another policy would have moved for the same computation.

A schedule says itself what it loads and frees. The same order of touches can be
given to a cache that decides alone: one that knows the future and evicts what
is read last of all (Belady), or what was touched least recently.
"""

import heapq

import numpy as np

from jaxattn import _checks
from jaxattn.iocomplexity._cache import Trace
from jaxattn.iocomplexity.counts import IOCount

_NEVER = np.iinfo(np.int64).max


def replay(
  trace: Trace, *, cache_words: int, policy: str = "belady"
) -> IOCount:
  """Counts the words that a trace moves under an automatic policy.

  Reading a word that is not there costs one; writing it costs nothing then, and
  one when it is evicted, unless nothing reads it before it is written again. A
  word of the outputs is written once more at the end, if it was not.

  Args:
    trace: from ``simulate(..., trace=True)``.
    cache_words: M.
    policy: "belady" evicts the word whose next read is farthest away, "lru" the
      one that was touched least recently.

  Returns:
    An :class:`IOCount` without blocks.

  Raises:
    ValueError: if M is no positive integer or there is no such policy.

  Cost:
    O(n log n) for n touches, in Python: a million take seconds.

  Source:
    Belady, IBM Systems Journal 5 (1966), and arXiv 2410.09397 for the model.

  Example:
    >>> import numpy as np
    >>> from jaxattn.iocomplexity import simulate
    >>> x = np.ones((6, 2))
    >>> arrays = {"query": x, "key": x, "value": x}
    >>> out, count = simulate("fwd_small", arrays, cache_words=21, trace=True)
    >>> replay(out["trace"], cache_words=21).total <= count.total
    True
  """
  _checks.check_integer("cache_words", cache_words, 1, None)
  _checks.check_choice("policy", policy, ("belady", "lru"))
  address, is_write = trace.address.tolist(), trace.is_write.tolist()
  upcoming = _next_reads(trace).tolist()
  outputs = set(trace.outputs.tolist())
  last_write = {a: t for t, a in enumerate(address) if is_write[t]}
  # Of each word that is held: when it is read next, and whether slow memory
  # has another value.
  held: dict[int, tuple[int, bool]] = {}
  queue: list[tuple[int, int]] = []
  priority: dict[int, int] = {}
  reads = writes = peak = 0
  for t, (word, writing) in enumerate(zip(address, is_write)):
    if word not in held:
      reads += not writing
      if len(held) == cache_words:
        victim = _evict(held, queue, priority)
        later, dirty = held.pop(victim)
        final = victim in outputs and last_write[victim] < t
        writes += dirty and (later != _NEVER or final)
    dirty = writing or held.get(word, (0, False))[1]
    held[word] = upcoming[t], dirty
    peak = max(peak, len(held))
    priority[word] = -upcoming[t] if policy == "belady" else t
    heapq.heappush(queue, (priority[word], word))
  writes += sum(dirty and word in outputs for word, (_, dirty) in held.items())
  return IOCount(reads, writes, (), peak)


def _next_reads(trace: Trace) -> np.ndarray:
  """When each touched word is read next, unless it is written before."""
  upcoming = np.full(len(trace.address), _NEVER)
  seen: dict[int, int] = {}
  touches = zip(trace.address.tolist(), trace.is_write.tolist())
  for t, (word, writing) in reversed(list(enumerate(touches))):
    upcoming[t] = seen.get(word, _NEVER)
    seen[word] = _NEVER if writing else t
  return upcoming


def _evict(
  held: dict[int, tuple[int, bool]],
  queue: list[tuple[int, int]],
  priority: dict[int, int],
) -> int:
  """The held word of least priority; entries of the past are dropped."""
  while True:
    rank, word = heapq.heappop(queue)
    if word in held and priority[word] == rank:
      return word
