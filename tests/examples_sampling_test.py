"""Examples in the docstrings of samplers and of data print what they say."""

import pytest

from tests._public import names_with_example, run_example

_ROOMS = ("jaxattn.sampling.", "jaxattn.data.")
_NAMES = [n for n in names_with_example() if n.startswith(_ROOMS)]


@pytest.mark.parametrize("name", _NAMES)
def test_example_prints_what_it_says(name):
  if name == "jaxattn.data.load_series":
    pytest.importorskip("statsmodels", reason="its series is of statsmodels")
  run_example(name)
