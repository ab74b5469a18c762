"""Sphinx configuration; ``make docs`` builds the pages without warnings."""

import os
import pathlib
import shutil
import sys

_DOCS = pathlib.Path(__file__).parent
# The notebook's numbers are those of a CPU, on whatever machine it is built;
# what it compiles is kept where the tests keep theirs.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", str(_DOCS.parent / ".cache" / "jax")
)
# Pages of names that are no longer public would fail the build.
shutil.rmtree(_DOCS / "api" / "generated", ignore_errors=True)
sys.path[:0] = [str(_DOCS.parent), str(_DOCS / "_ext")]

import public_api  # noqa: E402

import jaxattn  # noqa: E402

project = "jaxattn"
author = "The jaxattn authors"
copyright = f"2026, {author}"
version = release = jaxattn.__version__

extensions = [
  "sphinx.ext.autodoc",
  "sphinx.ext.autosummary",
  "sphinx.ext.mathjax",
  "sphinx.ext.napoleon",
  "myst_nb",
  "ledger_summary",
  "public_api",
]
exclude_patterns = ["_build", "jupyter_execute"]
templates_path = ["_templates"]

# Every reference to a name of ours must lead somewhere; other projects' names
# are shown without a link, so that the pages build without a network.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!jaxattn\b).*")]

# A package's page lists what its __all__ says, a name that moved in from
# another package included, and each name gets a page of its own.
autosummary_ignore_module_all = False
autosummary_imported_members = True
autosummary_context = {
  "aliases": public_api.aliases(),
  "background": public_api.background(),
}
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 72
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Cost", "Source"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_show_tb = True
nb_execution_timeout = 300
nb_merge_streams = True

html_theme = "sphinx_book_theme"
html_title = f"jaxattn {release}"
html_static_path = ["_static"]
html_theme_options = {
  # A page's sidebar opens its own branch alone: with all names in it, the
  # sidebars take nine tenths of the build.
  "collapse_navbar": True,
  "navbar_persistent": [],
  "show_toc_level": 2,
  "use_download_button": False,
  "use_fullscreen_button": False,
}
