"""Examples in the docstrings of models print what they say."""

import pytest

from tests._public import names_with_example, run_example

_NAMES = [n for n in names_with_example() if n.startswith("jaxattn.models.")]


@pytest.mark.parametrize("name", _NAMES)
def test_example_prints_what_it_says(name):
  run_example(name)
