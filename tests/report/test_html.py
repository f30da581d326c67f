"""The report as one page: its content, that it is self-contained, and its layout in a browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from browser import CHROMIUM, browser_page
from report_runs import OTHER_ORDER, SCRATCH, write_evaluations, write_sources

from slop_hf.report import write_report

EVIL = "<script>alert(1)</script>\"'&{{7}}"
VOID = {"meta", "link", "img", "br"}
TASKS = {"hellaswag": 0.4, "lambada_openai": 0.5, "arc_easy": 0.55, "piqa": 0.66}


class Outline(HTMLParser):
    """The elements of a page, and the texts of some; fails if they are not nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in self.open:
            self.texts[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def full_runs(make_run):
    """Three runs with everything that a report can show."""
    runs = []
    for name, schedule in (("slop", None), ("hidden-first", OTHER_ORDER), ("a-name/" + "x" * 60, SCRATCH)):
        run = make_run(name, *([schedule] if schedule else []))
        runs.append(write_sources(write_evaluations(run, TASKS, num_fewshot=0), {"web": 0.75, "code": 0.25}))
    return runs


def test_page_needs_nothing_but_itself(full_runs, text_only):
    text = (write_report(full_runs) / "report.html").read_text()
    page = Outline(text)
    references = [
        value
        for _, attributes in page.elements
        for name in ("src", "href", "srcset", "data")
        if (value := attributes.get(name))
    ]
    assert references and all(value.startswith(("data:", "#")) for value in references)
    without_pictures = re.sub(r"base64,[A-Za-z0-9+/=]*", "", text)
    assert not page.all("script") and not re.search(r"url\(|@import|https?:|//", without_pictures)
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in page.all("img"))
    assert len(page.all("img")) == 3
    targets = {attributes.get("id") for _, attributes in page.elements}
    assert all(link["href"][1:] in targets for link in page.all("a"))


def test_page_is_titled_and_in_order(full_runs, text_only):
    page = Outline((write_report(full_runs) / "report.html").read_text())
    assert page.texts["h1"] == page.texts["title"] == ["Comparison of 3 runs"]
    assert page.texts["h2"] == ["slop", "hidden-first", "x" * 60, "Columns"]
    assert page.texts["h3"][:5] == [
        "Lineage", "Results per stage", "Held-out loss by source", "Tokens by source", "Loading the model",
    ]  # fmt: skip
    assert page.all("html") == [{"lang": "en"}]
    assert "width=device-width" in str(page.all("meta"))
    assert len(page.all("table")) == 2 + 4 * 3
    assert all(heading["scope"] in ("row", "col") for heading in page.all("th"))


def test_names_are_escaped(make_run, text_only):
    run = write_evaluations(make_run("evil"), {EVIL: 0.5})
    evil = run.path.rename(run.path.with_name(EVIL.replace("/", "∕")))
    text = (write_report(evil) / "report.html").read_text()
    page = Outline(text)
    assert page.texts["h1"] == page.texts["title"] == [evil.name]
    assert not page.all("script") and EVIL in "".join(page.texts["tbody"])
    assert {name for _, attributes in page.elements for name in attributes} <= {
        "lang", "charset", "name", "content", "http-equiv", "rel", "href", "id", "class", "role", "aria-label",
        "tabindex", "scope", "src", "alt",
    }  # fmt: skip


def test_unfinished_run_is_marked_on_the_page(make_run, text_only):
    text = (write_report(make_run(stages=2)) / "report.html").read_text()
    assert "<strong>grown is unfinished</strong>: 2 of 4 stages" in text and "<nav" not in text


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_page_in_a_browser(full_runs, tmp_path):
    file = write_report(full_runs, tmp_path / "report") / "report.html"
    (tmp_path / "profile").mkdir()
    with browser_page(tmp_path / "profile") as page:
        for width in (1200, 360):
            for dark in (False, True):
                page.open(file, width, dark=dark)
                assert page.value("innerWidth") == width
                assert page.value("document.documentElement.scrollWidth") <= width
                # Only boxes that scroll may hold something wider than the window.
                assert page.value(STICKING_OUT) == []
                assert (
                    page.value("[...document.images].map(image => image.complete && image.naturalWidth > 400)")
                    == [True] * 3
                )
                assert all(size >= 12 for size in page.value(TEXT_SIZES))
                assert page.value(CONTRAST) >= 4.5
                assert {url.partition(":")[0] for url in page.requests} <= {"file", "data"}
                assert [url for url in page.requests if url.startswith("file:")] == [file.resolve().as_uri()]
                assert page.messages == []
        page.screenshot(tmp_path / "narrow.png")


STICKING_OUT = """
[...document.body.querySelectorAll('*')]
  .filter(element => !element.closest('.scroll, pre') && element.getBoundingClientRect().right > innerWidth + 0.5)
  .map(element => element.outerHTML.slice(0, 80))
"""

TEXT_SIZES = "[...document.body.querySelectorAll('*')].map(element => parseFloat(getComputedStyle(element).fontSize))"

# Contrast of the faintest text with the background, by the formula of WCAG 2.
CONTRAST = """
(() => {
  const light = colour => {
    const [r, g, b] = colour.match(/[0-9.]+/g).slice(0, 3).map(part => part / 255)
      .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = light(getComputedStyle(document.body).backgroundColor);
  const ratios = [...document.querySelectorAll('p, a, th, td, dd, figcaption')].map(element => {
    const ink = light(getComputedStyle(element).color);
    return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
  });
  return Math.min(...ratios);
})()
"""
