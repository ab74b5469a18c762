"""English text that ships with Python, and batches of its bytes."""

from collections.abc import Callable

import jax
import numpy as np

from jaxattn import _checks


def load_text() -> str:
  """Returns Python's own documentation as one ASCII text.

  These are the help topics of ``pydoc``, half a million characters with about
  94 distinct ones, joined by newlines in the order of their names; the few
  characters outside ASCII are left out. The text is always there and depends
  on nothing but the minor version of Python.

  Returns:
    The text; a byte of its ASCII encoding is a character.

  Raises:
    ImportError: if this Python was installed without ``pydoc_data``.

  Cost:
    Some megabytes and milliseconds.

  Source:
    the Python documentation, as ``pydoc_data.topics`` holds it.

  Example:
    >>> from jaxattn.data import load_text
    >>> text = load_text()
    >>> "assert" in text, text.isascii()
    (True, True)
  """
  # Not part of every Python distribution, so not imported with the package.
  from pydoc_data.topics import topics

  text = "\n".join(topics[name] for name in sorted(topics))
  return text.encode("ascii", errors="ignore").decode("ascii")


def byte_batches(
  rng: jax.Array, text: str, *, batch_size: int, length: int
) -> Callable[[int], np.ndarray]:
  """Cuts random windows out of a text, for training a model of bytes.

  The windows start anywhere, uniformly and with replacement. A batch depends
  on ``rng`` and its cursor alone: a run that stopped goes on exactly by asking
  for the cursor that comes next, and nothing else has to be saved. Drawing
  happens on the host.

  Args:
    rng: PRNG key.
    text: what to cut windows from, encoded in UTF-8.
    batch_size: windows in a batch.
    length: bytes that a model sees; a window holds one more.

  Returns:
    A function from a cursor (0, 1, 2, ...) to a (batch_size, length + 1) int32
    array of byte values: inputs are ``batch[:, :-1]`` and targets
    ``batch[:, 1:]``.

  Raises:
    ValueError: if ``rng`` is no single PRNG key, a size is not positive, or the
      text has fewer than ``length + 1`` bytes. The function returned raises
      ValueError for a negative cursor.

  Cost:
    O(batch_size * length) a batch; one copy of the text.

  Source:
    this project.

  Example:
    >>> import jax
    >>> from jaxattn.data import byte_batches, load_text
    >>> batch_at = byte_batches(
    ...   jax.random.key(0), load_text(), batch_size=2, length=8
    ... )
    >>> batch_at(0).shape, bool((batch_at(7) == batch_at(7)).all())
    ((2, 9), True)
  """
  words = _key_words(rng)
  _checks.check_integer("batch_size", batch_size, 1, None)
  _checks.check_integer("length", length, 1, None)
  data = np.frombuffer(text.encode(), np.uint8)
  if len(data) <= length:
    raise ValueError(
      f"text must have at least length + 1 = {length + 1} bytes, got "
      f"{len(data)}"
    )
  offsets = np.arange(length + 1)

  def batch_at(cursor: int) -> np.ndarray:
    _checks.check_integer("cursor", cursor, 0, None)
    generator = np.random.default_rng([*words, cursor])
    starts = generator.integers(len(data) - length, size=batch_size)
    return data[starts[:, None] + offsets[None, :]].astype(np.int32)

  return batch_at


def _key_words(rng: jax.Array) -> list[int]:
  try:
    words = jax.random.key_data(rng)
  except TypeError as error:
    raise ValueError(f"rng must be a PRNG key, got {rng!r}") from error
  _checks.check_rank("key data of rng", words, 1)
  # Read once, explicitly: batches are then drawn without touching a device.
  return [int(word) for word in jax.device_get(words)]
