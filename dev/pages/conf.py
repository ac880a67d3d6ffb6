"""Sphinx builds the pages with these settings, offline and for reading offline: `make docs`.

The pages are the Markdown files of the repository, as GitHub shows them. So the source folder is the repository, the
front page is README.md, and what GitHub has no use for is added here: the sidebar and a page `index.html`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "src"))

from query_experts_command import __version__  # noqa: E402

SIDEBAR = """

```{toctree}
:hidden:
:caption: Guide

docs/quickstart
docs/layer
docs/model
docs/training
docs/distributed
docs/planning
docs/comparing
docs/converting
docs/evaluating
docs/scaling
docs/results
docs/integrations
examples/README
docs/serving
docs/performance
docs/benchmarks
```

```{toctree}
:hidden:
:caption: Reference

dev/pages/reference
```

```{toctree}
:hidden:
:caption: Project

CONTRIBUTING
CHANGELOG
dev/LOG
```
"""

project = "query-experts"
author = "The query-experts authors"
version = release = __version__

root_doc = "README"
include_patterns = [
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "examples/*.md", "dev/LOG.md", "dev/pages/*.rst",
]  # fmt: skip
exclude_patterns = [".*", "build", "dist", "runs", "**/__pycache__"]  # folders not to search
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3

default_role = "literal"  # docstrings have single backticks
highlight_language = "text"  # commands; Python is marked as such
autodoc_member_order = "bysource"
autodoc_default_options = {"show-inheritance": True}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"query-experts {release}"
html_copy_source = html_show_copyright = False
html_additional_pages = {"index": "index.html"}
html_show_search_summary = False  # would be fetched, which browsers refuse where a page is a file
pygments_dark_style = "github-dark"
templates_path = ["templates"]


def add_sidebar(app: Any, page: str, source: list[str]) -> None:
    if page == root_doc:
        source[0] += SIDEBAR


def unlink_folders(app: Any, document: nodes.document) -> None:
    """Leaves only the text of a link to a folder, which GitHub lists and Sphinx can't."""
    folder = (ROOT / app.env.docname).parent
    for link in list(document.findall(pending_xref)):
        if link["reftype"] == "myst" and (folder / link["reftarget"]).is_dir():
            link.replace_self(link.children)


def hide_private_arguments(
    app: Any, kind: str, name: str, documented: Any, options: Any, arguments: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    return (re.sub(r", _\w+: [^,)]*", "", arguments), returns) if arguments else None


def setup(app: Any) -> None:
    app.connect("source-read", add_sidebar)
    app.connect("doctree-read", unlink_folders)
    app.connect("autodoc-process-signature", hide_private_arguments)
