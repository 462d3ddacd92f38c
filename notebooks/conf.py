"""The site: `make docs` builds it from the pages and notebooks of this folder.

The sources are those of the repository where they lie, so that a link works here, in a
checkout and on a forge.
"""

import re
from typing import Any

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

import jaxlosses

project = "jaxlosses"
author = copyright = "The jaxlosses authors"
version = release = jaxlosses.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
html_theme = "furo"
html_title = "jaxlosses"
html_static_path = ["site/site.css"]
html_css_files = ["site.css"]
html_favicon = "site/icon.svg"
html_extra_path = ["site/index.html"]
html_copy_source = False
html_show_sourcelink = False
root_doc = "notebooks/index"
include_patterns = [
    "notebooks/*.md",
    "notebooks/*.ipynb",
    "notebooks/generated/*",
    "benchmarks/NOTES.md",
    "benchmarks/results/*.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]

# `make notebooks` executes them; a page shows what was printed then.
nb_execution_mode = "off"
# In the source files progress bars are one line each, after `coalesce-streams`.
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autosummary_generate = True
# A docstring says the shapes and dtypes of an argument in words.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_custom_sections = ["Values", "Differentiation", ("Source", "notes_style")]
napoleon_use_param = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_use_rtype = False
default_role = "code"
# The full tables, to which the page of measurements links.
suppress_warnings = ["toc.not_included"]

PUBLIC = re.compile(r"`(?:jl\.)?((?:testing\.)?[a-z]\w+|Stats|Rows)`")


def mend_docstring(
    app: Sphinx, what: str, name: str, owner: Any, options: Any, lines: list[str]
) -> None:
    """Make a docstring that reads well in a terminal into one that Sphinx reads.

    An indented block is code, names of public functions are links, and the names of
    several arguments have no backticks.
    """
    text, above = [], ""
    for line in lines:
        indent = len(line) - len(line.lstrip())
        deeper = indent > len(above) - len(above.lstrip())
        if line.strip() and text and not text[-1].strip() and deeper:
            text += [" " * (indent - 4) + "::", ""]
        if line.strip():
            above = line
        if match := re.match(r"( +`\w+`(?:, `\w+`)*:)(.*)", line):
            line = match[1].replace("`", "") + match[2]
        text.append(line if ">>>" in line else PUBLIC.sub(_link, line))
    lines[:] = text


def _link(match: re.Match[str]) -> str:
    module, _, name = match[1].rpartition(".")
    owner = jaxlosses.testing if module == "testing" else jaxlosses
    if name.startswith("_") or not callable(getattr(owner, name, None)):
        return match[0]
    role = "class" if name[0].isupper() else "func"
    return f":{role}:`~jaxlosses.{match[1]}`"


# Formulas as MathML, which browsers draw themselves: no script, no network.


def inline_math(self: Any, node: Any) -> None:
    self.body.append(tex2mathml(node.astext(), as_block=False))
    raise SkipNode


def display_math(self: Any, node: Any) -> None:
    self.body.append(self.starttag(node, "div", CLASS="math"))
    self.body.append(tex2mathml(node.astext(), as_block=True))
    self.body.append("</div>")
    raise SkipNode


html_math_renderer = "mathml"


def setup(app: Sphinx) -> None:
    # Before napoleon, which comes at 500, has changed the sections.
    app.connect("autodoc-process-docstring", mend_docstring, priority=400)
    app.add_html_math_renderer("mathml", (inline_math, None), (display_math, None))
