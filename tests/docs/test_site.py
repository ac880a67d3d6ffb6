"""The pages that `make docs` builds: each page is in the sidebar, each public name in the reference, none fetches."""

import ast
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

import query_experts
import query_experts.convert
import query_experts.data

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "dev" / "pages"
FETCHED = {("script", "src"), ("img", "src"), ("link", "href"), ("object", "data"), ("iframe", "src")}


def test_the_sidebar_lists_each_page_of_the_folder():
    listed = re.findall(r"^docs/(\w+)$", (SOURCE / "conf.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "docs").glob("*.md"))


def public_names():
    """The names of the packages' `__all__`, and those that tests/test_public_names.py imports from files."""
    for package in (query_experts, query_experts.convert, query_experts.data):
        yield from (f"{package.__name__}.{name}" for name in package.__all__)
    tree = ast.parse((ROOT / "tests" / "test_public_names.py").read_text(encoding="utf-8"))
    statements = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    for statement in (text for text in statements if isinstance(text, str)):
        for module, names in re.findall(r"^from (query_experts\.\w+) import ([\w, ]+)$", statement):
            yield from (f"{module}.{name}" for name in names.split(", "))


def test_the_reference_has_each_public_name_once():
    text = (SOURCE / "reference.rst").read_text(encoding="utf-8")
    documented = re.findall(r"^\.\. auto\w+:: ([\w.]+)$", text, re.MULTILINE)
    assert sorted(documented) == sorted(set(public_names()))


class Links(HTMLParser):
    """What a page links to, what it fetches, and the names of its places."""

    def __init__(self, path):
        super().__init__()
        self.links, self.fetched, self.places = [], [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.places.add(value)
            elif (tag, name) in FETCHED:
                self.fetched.append(value)
            elif (tag, name) == ("a", "href"):
                self.links.append(value)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The built pages: path -> links."""
    sphinx = pytest.importorskip("sphinx.cmd.build", reason="Sphinx isn't installed; the extra docs has it")
    for name in ("furo", "myst_parser", "trl"):
        pytest.importorskip(name, reason=f"{name} isn't installed; the extra docs has it")
    built, doctrees = tmp_path_factory.mktemp("pages"), tmp_path_factory.mktemp("doctrees")
    options = ["--fail-on-warning", "--keep-going", "--quiet", "--conf-dir", str(SOURCE), "--doctree-dir"]
    assert sphinx.build_main([*options, str(doctrees), str(ROOT), str(built)]) == 0
    return {path: Links(path) for path in built.rglob("*.html")}


@pytest.mark.full
def test_the_built_pages_fetch_nothing_and_lead_only_to_places_that_exist(pages):
    (index,) = (path for path in pages if path.name == "index.html")
    assert {"README.html", "docs/layer.html", "dev/pages/reference.html"} <= {
        path.relative_to(index.parent).as_posix() for path in pages
    }
    for path, page in pages.items():
        for link in page.fetched + [link for link in page.links if not link.startswith("http")]:
            name, _, place = link.partition("#")
            target = (path.parent / unquote(name.split("?")[0])).resolve() if name else path
            assert target.is_file(), (path.name, link)
            assert not place or target not in pages or place in pages[target].places, (path.name, link)
        assert not [link for link in page.fetched if "//" in link], path.name
    for path in index.parent.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", path.read_text(encoding="utf-8")), path.name


@pytest.mark.full
def test_the_reference_shows_arguments_and_not_private_ones(pages):
    (path,) = (path for path in pages if path.name == "reference.html")
    text = re.sub(r"<[^>]*>", "", path.read_text(encoding="utf-8"))
    assert "num_query_experts" in text
    assert "_config" not in text
