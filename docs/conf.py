"""Configuration of Sphinx for `make docs`.

The root of the repository is the source directory, so that links between README, docs, recipes and benchmarks are the
same here and on a Git host.
"""

import sys
from pathlib import Path

import tomllib

sys.path.insert(0, str(Path(__file__).parent))

import make_reference
import notebook_page

import slop_hf

project = "slop-hf"
author = "The slop-hf authors"
copyright = author
release = slop_hf.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/**.md",
    "recipes/**.md",
    "benchmarks/README.md",
]
exclude_patterns = [".*", "build", "dist", "runs", "site"]  # folders that need not be searched

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4  # those of GitHub

smartquotes = False  # or the dashes of options would become one

default_role = "code"  # docstrings have code in single backticks, as in Markdown
add_module_names = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True

html_theme = "furo"
html_title = f"slop-hf {release}"
html_copy_source = False
_pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
if _address := _pyproject["tool"]["hatch"]["metadata"]["hooks"]["custom"]["repository"]:
    html_theme_options = {"source_repository": _address, "source_branch": "main", "source_directory": ""}
templates_path = ["_templates"]
html_additional_pages = {"index": "redirect.html"}


def setup(app):
    """Fill the reference pages and those of notebooks when Sphinx reads them."""
    app.connect("source-read", fill_source)


def fill_source(app, page, source):
    """Replace the markers in the text of a page; Sphinx passes it as a list of one."""
    source[0] = notebook_page.fill_page(make_reference.fill_page(source[0]))
