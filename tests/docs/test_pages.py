"""Pages are short, lead to files that exist, and use the field's words."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
OTHERS = ("CHANGELOG.md", "CONTRIBUTING.md", "dev/LOG.md", "examples/README.md")
PAGES = [README, *(ROOT / name for name in OTHERS), *DOCS]
FORBIDDEN = re.compile("wake|woke|waking|asleep|sleeping|starved", re.IGNORECASE)
ON_DISK = re.compile(r"woken_experts|woken-cpu|all-awake|[\"`]woken[\"`]")  # keys and names of committed results


def links_of(page):
    return [part.split(")")[0] for part in page.read_text(encoding="utf-8").split("](")[1:]]


def anchors_of(page):
    """The names that GitHub gives to headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_links_to_exists(page):
    local = [link for link in links_of(page) if not link.startswith("http")]
    assert local or page.name in ("CHANGELOG.md", "CONTRIBUTING.md")
    for link in local:
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def test_the_readme_leads_to_every_page():
    found, seen = [README], set()
    while found:
        page = found.pop().resolve()
        if page not in seen and page.suffix == ".md":
            seen.add(page)
            found += [page.parent / link.split("#")[0] for link in links_of(page) if not link.startswith(("http", "#"))]
    assert set(DOCS) <= seen


def test_the_readme_has_nine_hundred_words_at_most():
    text = README.read_text(encoding="utf-8")
    assert sum(len(line.split()) for line in text.splitlines() if not line.startswith("|")) <= 900


def test_the_first_forty_lines_of_the_readme_show_the_picture_the_two_commands_and_the_table():
    first = README.read_text(encoding="utf-8").splitlines()[:40]
    for start in ("![", "    make compare", "    make test", "<!-- table: ", "| `gqe` |"):
        assert sum(line.startswith(start) for line in first) == 1, start


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_a_page_has_a_thousand_words_at_most_outside_tables_and_code(page):
    text = re.sub(r"^```.*?^```$|<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert sum(len(line.split()) for line in text.splitlines() if not line.startswith(("|", "    "))) <= 1000


def test_no_file_uses_a_forbidden_word():
    """Routers select, and heads are active. Names in committed result files are the only exceptions."""
    folders = ("src", "tests", "benchmarks", "docs", "examples")
    files = {path for folder in folders for path in (ROOT / folder).rglob("*")}
    text = (".py", ".md", ".yaml", ".j2", ".svg", ".ini", ".ipynb")
    files = {path for path in files if path.suffix in text} - {Path(__file__).resolve()}
    found = []
    for path in sorted({*files, *PAGES}):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if FORBIDDEN.search(ON_DISK.sub("", line)):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert not found, "\n".join(found)
