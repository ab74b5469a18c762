"""WordPiece on a small vocabulary made here, against a regular expression."""

import re

import hypothesis
import pytest
from hypothesis import strategies as st

from jaxattn.models import _wordpiece

_PIECES = ("a", "ab", "abc", "b", "cc", "##a", "##b", "##bc", "##c", "##cab")
_SPECIAL = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102}
_VOCABULARY = _SPECIAL | {piece: 200 + i for i, piece in enumerate(_PIECES)}

_few = hypothesis.settings(derandomize=True, max_examples=100, deadline=None)


def _split_by_regex(word):
  """Longest match from the left, by alternatives sorted by length."""
  pieces = sorted(_PIECES, key=len, reverse=True)
  inner = "|".join(p[2:] for p in pieces if p.startswith("##"))
  first = "|".join(p for p in pieces if not p.startswith("##"))
  # Atomic groups and possessive repeats never go back on a match.
  found = re.fullmatch(f"(?>({first}))(?>{inner})*+", word)
  if not found:
    return ["[UNK]"]
  rest = re.findall(inner, word[found.end(1) :])
  return [found[1], *("##" + p for p in rest)]


@_few
@hypothesis.given(st.text("abc", min_size=1, max_size=12))
def test_pieces_are_the_longest_from_the_left(word):
  assert _wordpiece.split_pieces(word, _VOCABULARY) == _split_by_regex(word)


@_few
@hypothesis.given(st.text("ab", min_size=1, max_size=100))
def test_pieces_joined_are_the_word(word):
  # "a" and "b" are pieces everywhere, so no such word is unknown.
  pieces = _wordpiece.split_pieces(word, _VOCABULARY)
  assert all(piece.startswith("##") for piece in pieces[1:])
  assert pieces[0] + "".join(piece[2:] for piece in pieces[1:]) == word


def test_too_long_words_are_unknown():
  assert len(_wordpiece.split_pieces("a" * 100, _VOCABULARY)) == 100
  assert _wordpiece.split_pieces("a" * 101, _VOCABULARY) == ["[UNK]"]


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("", []),
    (" \t\r\n  ", []),
    ("The CAT\tsits\n", ["the", "cat", "sits"]),
    ("don't stop-now...", ["don", "'", "t", "stop", "-", "now", *"..."]),
    ("$1^2 ~ `x`|<y>", [*"$1^2~`x`|<y>"]),
    ("Café naïve ÅNGSTRÖM", ["cafe", "naive", "angstrom"]),
    ("e\u0301te\u0301", ["ete"]),  # Accents that are characters of their own.
    ("\u0130stanbul \u212a", ["istanbul", "k"]),  # Dotted I, Kelvin sign.
    ("nul\x00l bel\x07l zero\u200bwidth \ufffd", ["null", "bell", "zerowidth"]),
    ("a\u00a0b\u3000c\u2028d", ["a", "b", "c", "d"]),  # Unicode spaces.
    ("\u65e5\u672c\u8a9etext", ["\u65e5", "\u672c", "\u8a9e", "text"]),
    (
      "\u00abquoted\u00bb\u2014so",
      ["\u00ab", "quoted", "\u00bb", "\u2014", "so"],
    ),
    ("[MASK]", ["[", "mask", "]"]),
  ],
)
def test_words(text, words):
  assert list(_wordpiece.split_words(text)) == words


@_few
@hypothesis.given(st.text(max_size=40))
def test_words_are_clean_and_splitting_them_again_changes_nothing(text):
  words = list(_wordpiece.split_words(text))
  assert all(word and not any(c.isspace() for c in word) for word in words)
  assert list(_wordpiece.split_words(" ".join(words))) == words


def test_encode_keeps_the_closing_token():
  def encode(max_len):
    return _wordpiece.encode("ab abc? b", _VOCABULARY, max_len)

  ab, abc, b = (_VOCABULARY[piece] for piece in ("ab", "abc", "b"))
  assert encode(9) == [101, ab, abc, 100, b, 102]
  assert encode(6) == [101, ab, abc, 100, b, 102]
  assert encode(5) == [101, ab, abc, 100, 102]
  assert encode(2) == [101, 102]


def test_vocabularies_are_checked(tmp_path):
  path = tmp_path / "vocab.txt"
  lines = [f"x{i}" for i in range(103)]
  for token, i in _SPECIAL.items():
    lines[i] = token
  path.write_text("\n".join(lines) + "\n")
  vocabulary = _wordpiece.read_vocabulary(path)
  assert len(vocabulary) == 103
  assert vocabulary["x7"] == 7
  path.write_text("\n".join(lines[1:]))
  with pytest.raises(ValueError, match=r"\[PAD\] must have id 0, got None"):
    _wordpiece.read_vocabulary(path)
  path.write_bytes(b"\xff\xfe")
  with pytest.raises(ValueError, match="is no vocabulary: 'utf-8' codec"):
    _wordpiece.read_vocabulary(path)
  with pytest.raises(FileNotFoundError, match="absent"):
    _wordpiece.read_vocabulary(tmp_path / "absent")
