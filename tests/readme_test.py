"""Python examples of README and docs run, and print what the pages say."""

import os
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_PAGES = [_ROOT / "README.md", *sorted((_ROOT / "docs").glob("*.md"))]
# A block of Python, then perhaps a block of text: what it prints.
_BLOCK = re.compile(
  r"^```python\n(?P<code>.*?)^```$(?:\n\n^```text\n(?P<printed>.*?)^```$)?",
  re.MULTILINE | re.DOTALL,
)


class Example(NamedTuple):
  page: pathlib.Path
  line: int
  code: str
  printed: str | None


def _examples():
  for page in _PAGES:
    text = page.read_text(encoding="utf-8")
    for block in _BLOCK.finditer(text):
      line = text.count("\n", 0, block.start()) + 1
      yield Example(page, line, block["code"], block["printed"])


_EXAMPLES = list(_examples())


def _user_environment():
  """What a reader has: JAX's own defaults, not those of the tests."""
  kept = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("JAX", "XLA"))
  }
  return {
    **kept,
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(_ROOT / ".cache" / "jax"),
  }


@pytest.mark.parametrize(
  "example", _EXAMPLES, ids=lambda e: f"{e.page.name}-{e.line}"
)
def test_example_prints_what_the_page_says(example, tmp_path):
  done = subprocess.run(
    [sys.executable, "-W", "error", "-c", example.code],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    env=_user_environment(),
  )
  assert done.returncode == 0, done.stderr
  if example.printed is not None:
    assert done.stdout == example.printed


def test_readme_shows_the_output_of_its_example():
  examples = [e for e in _EXAMPLES if e.page.name == "README.md"]
  assert examples
  assert all(e.printed for e in examples)
