"""The page in a browser, where Chromium and Playwright are installed."""

from __future__ import annotations

import pytest

from abliterator.report import render_report
from tests.report.builds import HOSTILE, browser, build, written

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(browser() is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=browser())
        yield opened
        opened.close()


@pytest.fixture
def open_page(chromium, tmp_path):
    """Opens a report with the network off; afterwards no error was on its console."""
    errors, contexts = [], []

    def open_report(*builds, **options):
        contexts.append(chromium.new_context(offline=True, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(written(tmp_path, render_report(builds)))
        return page

    yield open_report
    for context in contexts:
        context.close()
    assert errors == []


def shown(page) -> list[str]:
    return page.locator("#pairs .pair h3 > span").all_text_contents()


def test_hostile_text_is_shown_as_text(open_page):
    page = open_page(build(text=HOSTILE))
    assert page.title() != "owned"
    assert shown(page)[0] == f"prompt 0 {HOSTILE}"
    page.fill("#f-search", "<img src=x")
    assert len(shown(page)) == 8
    assert page.locator("#pairs img, #pairs script").count() == 0
    assert page.locator("#pairs mark").count() > 0


def test_filters(open_page):
    page = open_page(build(n=40))
    assert page.text_content("#count") == "40 of 40 pairs"
    page.select_option("#f-change", "same")
    assert page.text_content("#count") == "10 of 40 pairs"
    page.click("#f-clear")
    page.click('[data-cell="refused complied"]')
    assert page.text_content("#count") == "30 of 40 pairs"
    page.fill("#f-search", "prompt 13")
    assert shown(page) == ["prompt 13 plain"]
    page.click("#f-clear")
    page.check("#f-rules")
    assert page.text_content("#count") == "1 of 40 pairs"
    page.click("#f-clear")
    page.click("#more")
    assert len(shown(page)) == 40


def test_the_refusals_that_remain_of_a_group_are_shown(open_page):
    page = open_page(build(n=40))
    page.select_option("#f-group", "category plain: knitting")
    assert page.text_content("#count") == "20 of 40 pairs"
    page.click("#f-clear")
    page.locator("details.groups summary").click()
    page.click('[data-show-group="category plain: knitting"]')
    assert page.input_value("#f-b") == "refused"
    assert page.text_content("#count") == "0 of 40 pairs"  # odd ones comply
    page.select_option("#f-b", "")
    assert shown(page)[0] == "prompt 1 plain"
    heads = page.locator("#pairs .pair h3 > small").all_text_contents()
    assert heads[0] == "target 2, category plain: knitting"


def test_the_keyboard_alone_is_enough(open_page):
    page = open_page(build(n=40))
    page.keyboard.press("/")
    page.keyboard.type("prompt 3")
    assert len(shown(page)) == 13  # 3, 13, 23, and 30 to 39
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the button that clears
    assert len(shown(page)) == 30
    page.evaluate("document.activeElement.blur()")
    for _ in range(3):
        page.keyboard.press("j")
    page.keyboard.press("k")
    assert "prompt 1 " in page.evaluate("document.activeElement.textContent")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_chart_is_drawn_and_nothing_is_wider_than_the_screen(open_page, width, scheme):
    viewport = {"width": width, "height": 800}
    page = open_page(build(), viewport=viewport, color_scheme=scheme)
    for chart in page.locator("[data-chart]").all():
        chart.scroll_into_view_if_needed()
        chart.locator("svg").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator(".theme span").nth(1 if scheme == "dark" else 2).click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before


def test_hovering_says_the_numbers(open_page):
    page = open_page(build(), color_scheme="dark")
    place = page.locator('[data-chart="cosines"]')
    place.scroll_into_view_if_needed()
    place.locator("svg").hover(position={"x": 150, "y": 120})
    assert "cosine" in place.locator('[aria-label="tip"]').text_content()
    background = "svg => getComputedStyle(svg).getPropertyValue('--plot-background')"
    assert place.locator("svg").evaluate(background) != "white"  # the plotting library's own


def test_the_record_is_downloaded_as_it_is(open_page):
    page = open_page(build(text=HOSTILE))
    with page.expect_download() as download:
        page.click("[data-download]")
    assert download.value.path().read_text("utf-8") == build(text=HOSTILE).record_text


def test_two_columns_of_two_builds(open_page):
    page = open_page(build("one"), build("two"))
    page.select_option("#column-a", "0")
    page.select_option("#column-b", "3")
    heads = page.locator("#comparison thead th").all_text_contents()
    assert heads == ["Measure", "one plain, base", "two plain, edited", "B − A", "n"]
    assert page.locator("#comparison tbody tr").count() > 5
    assert page.text_content("#count") == "8 of 8 pairs"
