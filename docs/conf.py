"""The documentation site: `make docs` builds it in build/docs, and a warning is an error."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "figures")]
# notebooks run in a process of their own
os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("OMP_NUM_THREADS", "1")

_project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = "tnadapt"
author = _project["authors"][0]["name"]
copyright = author
release = _project["version"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["figures"]

html_theme = "furo"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"tnadapt {release}"
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
pygments_style = "default"
pygments_dark_style = "github-dark"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# written by a program, with the headings of its parts two levels down
suppress_warnings = ["myst.header"]


#: stands for a colon while napoleon reads
_COLON = "\0"


def _plain_text(app: Any, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text with code in backticks: what else reStructuredText would read as markup is escaped."""
    parts = re.split(r"(`+[^`]+`+)", "\n".join(lines))
    for k, part in enumerate(parts):
        if k % 2 == 0:
            parts[k] = re.sub(r"(?<!\\)[*|]", r"\\\g<0>", part)
        elif not part.startswith("``"):
            # code that a letter follows, as in "several `nn.Linear`s", ends in an escaped space
            glued = parts[k + 1][:1].isalnum()
            parts[k] = f"`{part}`" + ("\\ " if glued else "")
    lines[:] = "".join(parts).split("\n")
    if what in ("property", "attribute"):
        # napoleon takes what stands before a colon in the first line for a type
        lines[:1] = [line.replace(":", _COLON) for line in lines[:1]]


def _colons_again(app: Any, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines[:] = [line.replace(_COLON, ":") for line in lines]


def _inline_math(self: Any, node: Any) -> None:
    self.body.append(convert(node.astext()))
    raise SkipNode


def _displayed_math(self: Any, node: Any) -> None:
    self.body.append(f'<div class="math-display">{convert(node.astext(), display="block")}</div>')
    raise SkipNode


def setup(app: Any) -> None:
    # browsers draw MathML themselves, so that a page with formulas needs neither a script nor a network
    app.add_html_math_renderer("mathml", (_inline_math, None), (_displayed_math, None))
    # before napoleon, which reads the sections of the docstring
    app.connect("autodoc-process-docstring", _plain_text, priority=100)
    app.connect("autodoc-process-docstring", _colons_again, priority=900)
