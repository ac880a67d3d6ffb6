"""The pages of a comparison and of a ladder in Chromium: they fetch nothing, and are read on a phone, in the dark, on
paper and by keyboard. Contrast is that of WCAG 2: 4.5 for text, 3 for lines and for the mark of the focus."""

import itertools
import re
from pathlib import Path

import pytest

from ladder_helpers import ladder
from query_experts.study.ladder.fit import fit_ladder
from query_experts.study.ladder.page import write_page
from query_experts.study.report import write_report
from query_experts.study.results import parse_comparison

CHROMIUM = Path("/usr/bin/chromium")
DEMO = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "compare-demo.json"
GAPS = {"dense": 0.0, "static": 0.01, "half": -0.01, "frozen": 0.02, "gqe": -0.06, "hard": 0.0, "weighted": 0.01,
        "gqe-m4": 0.0, "gqe-m8": 0.01, "gqe-expert": -0.02}  # fmt: skip
PHONE, DESK, SHEET = ({"width": width, "height": 900} for width in (400, 1280, 718))  # A4 without margins: 718
SMALLEST = 11.5  # pixels

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is missing: apt-get install chromium"),
]

# text and strokes that are seen, each with its contrast to what lies behind it
SEEN = """
() => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const known = new Map();
  const rgba = (colour) => {
    if (!known.has(colour)) {
      context.clearRect(0, 0, 1, 1); context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
      const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
      known.set(colour, [r, g, b, a / 255]);
    }
    return known.get(colour);
  };
  const over = (top, alpha, bottom) => [0, 1, 2].map((i) => top[i] * alpha + bottom[i] * (1 - alpha));
  const behind = (element) => {
    if (!element) return rgba(getComputedStyle(document.documentElement).colorScheme === "dark" ? "#000" : "#fff");
    const own = rgba(getComputedStyle(element).backgroundColor);
    return own[3] === 1 ? own : over(own, own[3], behind(element.parentElement));
  };
  const luminance = (colour) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
    const value = colour[i] / 255;
    return sum + weight * (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  }, 0);
  const contrast = (element, colour, alpha) => {
    const bottom = behind(element), top = rgba(colour);
    const [low, high] = [luminance(over(top, top[3] * alpha, bottom)), luminance(bottom)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const hidden = (element) => !element.checkVisibility({ visibilityProperty: true });
  const found = { text: [], lines: [] };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode()); ) {
    const element = node.parentElement, style = getComputedStyle(element), svg = element.closest("svg");
    const unseen = "title, desc, script, style, noscript, option";
    if (!node.data.trim() || hidden(element) || element.closest(unseen)) continue;
    const matrix = svg ? element.getScreenCTM() : null;
    const scale = matrix ? Math.hypot(matrix.a, matrix.b) : 1;
    found.text.push({
      what: node.data.trim().slice(0, 40), size: parseFloat(style.fontSize) * scale,
      contrast: contrast(element, svg ? style.fill : style.color, 1),
    });
  }
  const grid = rgba(getComputedStyle(document.documentElement).getPropertyValue("--grid")).join();
  for (const element of document.querySelectorAll(".chart svg path, .chart svg use")) {
    const style = getComputedStyle(element);
    if (style.stroke === "none" || element.closest("defs") || rgba(style.stroke).join() === grid) continue;
    found.lines.push({
      what: `${style.stroke} in ${element.closest("svg").querySelector("title").textContent}`,
      contrast: contrast(element, style.stroke, style.strokeOpacity * style.opacity),
    });
  }
  window.contrastOf = contrast;
  return found;
}
"""
WIDER = """
() => [...document.querySelectorAll("body *")].filter((element) =>
  element.getBoundingClientRect().right > document.documentElement.clientWidth + 1
  && !element.parentElement.closest(".scroll, svg")).map((e) => `${e.tagName} ${e.className} ${e.id}`).slice(0, 5)
"""
FOCUSED = """
() => {
  const element = document.activeElement, style = getComputedStyle(element);
  return { what: element.outerHTML.slice(0, 80), body: element === document.body, style: style.outlineStyle,
           width: parseFloat(style.outlineWidth), contrast: contrastOf(element.parentElement, style.outlineColor, 1) };
}
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    write_report(parse_comparison(DEMO.read_text(encoding="utf-8")), folder / "comparison.html")
    results = ladder(GAPS, rungs={"d64": 3, "d96": 3, "d128": 3})
    write_page(results, fit_ladder(results), folder / "ladder.html", ["d192: 2 runs of gqe-m8."])
    return folder


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install playwright")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=["comparison", "ladder"])
def opened(request, browser, files):
    """Opens the page at a size; whatever it fetches or complains of fails the test."""
    requested, said, contexts = [], [], []

    def open_page(size, **options):
        contexts.append(browser.new_context(viewport=size, **options))
        contexts[-1].route("**/*", lambda route: route.continue_() if route.request.url == url else route.abort())
        page = contexts[-1].new_page()
        page.on("request", lambda request: requested.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(url)
        return page

    url = (files / f"{request.param}.html").as_uri()
    yield open_page
    for context in contexts:
        context.close()
    assert set(requested) == {url}
    assert not said


def lowest(things, least, key="contrast"):
    """The things whose number is too low, each kind once."""
    return sorted({(thing["what"], round(thing[key], 1)) for thing in things if thing[key] < least})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out_from_what_lies_behind_them(opened, scheme):
    seen = opened(DESK, color_scheme=scheme).evaluate(SEEN)
    assert len(seen["text"]) > 100
    assert len(seen["lines"]) > 50
    assert not lowest(seen["text"], 4.5)
    assert not lowest(seen["lines"], 3)


def test_on_a_phone_only_tables_and_charts_scroll_and_text_is_large_enough(opened):
    page = opened(PHONE, is_mobile=True, has_touch=True)
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert not page.evaluate(WIDER)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert not lowest(page.evaluate(SEEN)["text"], SMALLEST, "size")


def test_everything_that_scrolls_or_acts_is_reached_by_tab_and_marked(opened):
    page = opened(PHONE)
    page.evaluate(SEEN)
    acting = page.evaluate(
        """() => [...document.querySelectorAll("body *")].filter((element) => element.checkVisibility()
             && (element.matches("a[href], summary, select, input, button")
                 || element.scrollWidth > element.clientWidth + 1 && getComputedStyle(element).overflowX === "auto"))
             .map((element) => element.outerHTML.slice(0, 80))"""
    )
    reached = []
    while len(reached) < 200:
        page.keyboard.press("Tab")
        focused = page.evaluate(FOCUSED)
        if focused["body"]:
            break
        reached.append(focused)
    assert len(acting) > 5
    assert set(acting) <= {focused["what"] for focused in reached}
    for focused in reached:
        assert focused["style"] != "none", focused
        assert focused["width"] >= 2, focused
        assert focused["contrast"] >= 3, focused


def test_what_is_folded_opens_by_enter(opened):
    page = opened(DESK)
    folded = page.locator("summary")
    for position in range(folded.count()):
        folded.nth(position).focus()
        page.keyboard.press("Enter")
    assert page.locator("details[open]").count() == folded.count() > 0


def test_headings_are_in_order_and_what_is_no_text_has_a_name(opened):
    page = opened(DESK)
    levels = page.eval_on_selector_all("h1, h2, h3, h4", "found => found.map((each) => Number(each.tagName[1]))")
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    named = re.findall(r"^ *- '?(\w+)( \".+)?", page.locator("body").aria_snapshot(), re.MULTILINE)
    assert [role for role, _ in named].count("img") == page.locator("svg").count() > 3
    for role in ("img", "region", "table", "combobox", "checkbox"):
        assert (role, "") not in named


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_paper_the_page_is_dark_on_white_with_nothing_cut_off_or_folded(opened, scheme):
    page = opened(SHEET, color_scheme=scheme)
    page.emulate_media(media="print")
    assert not page.evaluate(WIDER)
    cut = "found => found.filter((each) => each.scrollWidth > each.clientWidth + 1).map((each) => each.ariaLabel)"
    assert not page.eval_on_selector_all(".scroll", cut)
    assert page.locator("details table").first.is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not lowest(page.evaluate(SEEN)["text"], 4.5)


def test_by_keyboard_a_reader_chooses_what_the_passage_shows(browser, files):
    page = browser.new_page()
    page.goto((files / "comparison.html").as_uri())
    before = page.locator("#passage-text").inner_html()
    page.locator("#pick-layer").focus()
    page.keyboard.press("ArrowDown")
    assert page.locator("#passage-text").inner_html() != before
    page.locator("#pick-numbers").focus()
    page.keyboard.press("Space")
    assert "numbered" in page.locator("#passage-text").get_attribute("class")
    page.close()
