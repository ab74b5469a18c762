"""Writes ``notebooks/colab_tpu.ipynb`` from ``docs/colab_tpu.md``.

Colab opens notebooks from GitHub, but no Markdown: the pair is committed, and a
test holds the two together. ``python docs/pair_notebook.py`` after each change.
"""

import pathlib

import nbformat
from myst_nb.core.read import read_myst_markdown_notebook

_ROOT = pathlib.Path(__file__).parents[1]
SOURCE = _ROOT / "docs" / "colab_tpu.md"
TARGET = _ROOT / "notebooks" / "colab_tpu.ipynb"


def render() -> str:
  """The notebook, without outputs; the same each time."""
  text = SOURCE.read_text(encoding="utf-8")
  notebook = read_myst_markdown_notebook(text)
  for i, cell in enumerate(notebook.cells):
    cell["id"] = f"cell-{i}"
  return nbformat.writes(notebook) + "\n"


if __name__ == "__main__":
  TARGET.write_text(render(), encoding="utf-8")
