"""Other examples in docstrings print what they say, too."""

import pytest

from tests._public import names_with_example, run_example

_ELSEWHERE = (
  "jaxattn.attention.",
  "jaxattn.regression.",
  "jaxattn.sampling.",
  "jaxattn.data.",
  "jaxattn.models.",
)
_NAMES = [n for n in names_with_example() if not n.startswith(_ELSEWHERE)]


@pytest.mark.parametrize("name", _NAMES)
def test_example_prints_what_it_says(name):
  run_example(name)
