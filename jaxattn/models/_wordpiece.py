"""WordPiece tokenization of uncased BERT, without a tokenizer library.

Text is cleaned (control characters dropped, accents stripped after NFD,
lower-cased), split into words, single punctuation marks and single CJK
characters; each word is then cut greedily into the longest pieces that the
vocabulary holds, from left to right, pieces inside a word bearing ``##``.
Source: arXiv 1609.08144 section 4.1 (WordPiece), arXiv 1810.04805 (BERT).
"""

import os
import unicodedata
from collections.abc import Iterator, Mapping

_LONGEST_WORD = 100  # BERT's own limit; longer words become [UNK].
_SPECIAL = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102}
_DROPPED = ("Cc", "Cf", "Co", "Cs")  # Control, format, private, surrogate.

# The blocks that BERT's tokenizer treats as one word a character: the unified
# ideographs with their extensions, and the compatibility ideographs.
_IDEOGRAPHS = (
  (0x4E00, 0x9FFF),
  (0x3400, 0x4DBF),
  (0x20000, 0x2A6DF),
  (0x2A700, 0x2B73F),
  (0x2B740, 0x2B81F),
  (0x2B820, 0x2CEAF),
  (0xF900, 0xFAFF),
  (0x2F800, 0x2FA1F),
)


def read_vocabulary(path: str | os.PathLike[str]) -> dict[str, int]:
  """Reads a vocabulary file: one piece a line, its id the line number.

  Args:
    path: the file, in UTF-8.

  Returns:
    A dict from piece to id.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is not UTF-8, or the special tokens are not where uncased
      BERT has them.
  """
  with open(path, encoding="utf-8", newline="\n") as file:
    try:
      pieces = file.read().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
      raise ValueError(f"{path} is no vocabulary: {error}") from error
  vocabulary = {piece.rstrip("\r"): i for i, piece in enumerate(pieces)}
  for token, expected in _SPECIAL.items():
    if vocabulary.get(token) != expected:
      raise ValueError(
        f"{path} is no vocabulary of uncased BERT: {token} must have id "
        f"{expected}, got {vocabulary.get(token)}"
      )
  return vocabulary


def encode(text: str, vocabulary: Mapping[str, int], max_len: int) -> list[int]:
  """Returns ``[CLS] pieces [SEP]`` as at most ``max_len`` ids."""
  ids = [_SPECIAL["[CLS]"]]
  for word in split_words(text):
    ids += [vocabulary[piece] for piece in split_pieces(word, vocabulary)]
    if len(ids) >= max_len:
      break
  return [*ids[: max_len - 1], _SPECIAL["[SEP]"]]


def split_words(text: str) -> Iterator[str]:
  """Yields the cleaned words, punctuation marks and ideographs of ``text``."""
  # Cleaning comes first: a control character inside a word joins its halves.
  clean = "".join(_clean(c) for c in text)
  decomposed = unicodedata.normalize("NFD", clean)
  plain = "".join(c for c in decomposed if unicodedata.category(c) != "Mn")
  spaced = "".join(f" {c} " if _stands_alone(c) else c for c in plain.lower())
  yield from spaced.split()


def split_pieces(word: str, vocabulary: Mapping[str, int]) -> list[str]:
  """Cuts a word into longest matching pieces, or ``["[UNK]"]``.

  One position without a match makes the whole word unknown.
  """
  if len(word) > _LONGEST_WORD:
    return ["[UNK]"]
  pieces, begin = [], 0
  while begin < len(word):
    prefix = "##" if begin else ""
    for end in range(len(word), begin, -1):
      if prefix + word[begin:end] in vocabulary:
        break
    else:
      return ["[UNK]"]
    pieces.append(prefix + word[begin:end])
    begin = end
  return pieces


def _clean(c: str) -> str:
  if c in "\t\n\r":
    return " "
  # U+FFFD stands for bytes that were no text; unassigned code points (Cn) stay,
  # so that ids do not hang on the Unicode version.
  if c == "\ufffd" or unicodedata.category(c) in _DROPPED:
    return ""
  return " " if c.isspace() else c


def _stands_alone(c: str) -> bool:
  # BERT counts every ASCII symbol as punctuation, "$" and "^" too.
  if c.isascii():
    return c.isprintable() and not c.isalnum() and c != " "
  code = ord(c)
  ideograph = any(low <= code <= high for low, high in _IDEOGRAPHS)
  return ideograph or unicodedata.category(c)[0] == "P"
