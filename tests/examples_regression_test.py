"""Examples in the docstrings of regression problems print what they say."""

import pytest

from tests._public import names_with_example, run_example

_ELSEWHERE = (
  "jaxattn.regression.gradient_leakage.",
  "jaxattn.regression.reweighted_icl.",
)
_NAMES = [
  n
  for n in names_with_example()
  if n.startswith("jaxattn.regression.") and not n.startswith(_ELSEWHERE)
]


@pytest.mark.parametrize("name", _NAMES)
def test_example_prints_what_it_says(name):
  run_example(name)
