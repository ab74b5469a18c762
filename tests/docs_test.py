"""Links lead somewhere, and what is public or was measured has a page."""

import pathlib
import re
import runpy

import jaxattn

_ROOT = pathlib.Path(__file__).parents[1]
_DOCS = _ROOT / "docs"
_PAGES = [*_ROOT.glob("*.md"), *_DOCS.glob("*.md"), *_DOCS.glob("*/*.md")]
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")
# GitHub shows a README image of a few hundred KB slowly.
_MAX_FIGURE_BYTES = 200 * 1024


def test_links_between_files_resolve():
  dead = [
    f"{page.relative_to(_ROOT)}: {target}"
    for page in _PAGES
    for target in _LINK.findall(page.read_text(encoding="utf-8"))
    if not (page.parent / target).exists()
  ]
  assert dead == []


def test_api_index_lists_every_package():
  text = (_DOCS / "api" / "index.md").read_text(encoding="utf-8")
  listed = re.findall(r"^ +jaxattn\.(\w+)$", text, re.MULTILINE)
  assert sorted(listed) == sorted(set(jaxattn.__all__) - {"__version__"})


def test_every_experiment_has_a_page():
  systems = {p.stem for p in (_ROOT / "experiments").glob("[!_]*.py")}
  systems &= {p.stem for p in (_ROOT / "configs").glob("[!_]*.py")}
  pages = {p.stem for p in (_DOCS / "systems").glob("*.md")}
  assert {s.replace("_", "-") for s in systems} <= pages


def test_the_notebook_of_colab_is_the_page():
  pair = runpy.run_path(str(_DOCS / "pair_notebook.py"))
  committed = pair["TARGET"].read_text(encoding="utf-8")
  assert committed == pair["render"](), "run python docs/pair_notebook.py"


def test_figures_are_small():
  sizes = {p.name: p.stat().st_size for p in _DOCS.glob("_static/*.png")}
  assert sizes
  assert {n for n, size in sizes.items() if size > _MAX_FIGURE_BYTES} == set()
