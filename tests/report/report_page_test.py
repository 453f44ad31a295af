"""The report page in a browser: it draws, reacts, and sends no request.

Chromium is Debian's (`apt-get install chromium`). On a machine without it these tests
are skipped; in CI, where `CI` is set, they fail.
"""

import os
import pathlib

import pytest
from playwright.sync_api import sync_playwright

CHROMIUM = pathlib.Path("/usr/bin/chromium")
ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
    *("--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
PHONE = {"width": 360, "height": 740}

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not CHROMIUM.exists() and not os.environ.get("CI"),
        reason=f"needs {CHROMIUM}: apt-get install chromium",
    ),
]


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=ARGUMENTS
        )
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, pages):
    """Open a page; afterwards check that it logged nothing and requested nothing."""
    contexts, logged, requested = [], [], []

    def open_page(name="one", **options):
        context = browser.new_context(offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: logged.append(message.text))
        page.on("pageerror", lambda error: logged.append(str(error)))
        page.on("request", lambda request: requested.append(request.url))
        page.goto(pathlib.Path(pages[name]).as_uri())
        wait_until(
            page,
            "[...document.querySelectorAll('.figure')]"
            ".every((node) => node.querySelector('svg .trace, svg .hm'))",
        )
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert logged == []
    assert {url.split(":")[0] for url in requested} <= {"file", "data"}
    assert len([url for url in requested if url.startswith("file:")]) == len(contexts)


def wait_until(page, expression):
    """Wait until an expression is true; Playwright's function needs `eval`."""
    for _ in range(200):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"not true within 10 s: {expression}")


def overflow(page):
    return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


@pytest.mark.parametrize("name", ["one", "both"])
def test_every_figure_is_drawn(opened, name):
    page = opened(name)
    sizes = page.evaluate(
        """[...document.querySelectorAll(".figure")].map((node) => {
          const drawn = node.querySelectorAll(".trace, .hm image, .point");
          const box = node.querySelector("svg").getBoundingClientRect();
          return [drawn.length, box.width, box.height];
        })"""
    )
    assert len(sizes) > 15
    assert all(
        count > 0 and width > 200 and height > 80 for count, width, height in sizes
    )
    films = page.locator(".frames img")
    loaded = films.evaluate_all("all => all.map((i) => i.complete && i.naturalWidth)")
    assert len(loaded) > 20 and all(loaded)


def test_hover_shows_values(opened):
    page = opened()
    figure = page.locator("#training .figure").first
    figure.scroll_into_view_if_needed()
    box = figure.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    wait_until(
        page, "document.querySelector('#training .hoverlayer').textContent.length > 0"
    )


def test_hover_over_surprise_shows_the_frame(opened):
    page = opened()
    pair = page.locator(".pair").first
    pair.scroll_into_view_if_needed()
    frame = "node => Number(getComputedStyle(node).getPropertyValue('--frame'))"
    film = pair.locator(".frames").first
    box = pair.locator(".figure .nsewdrag").bounding_box()
    seen = set()
    for share in (0.6, 0.75, 0.95):
        page.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
        page.wait_for_timeout(200)
        seen.add(film.evaluate(frame))
    assert len(seen) == 3
    assert pair.locator("output").inner_text() == f"{int(max(seen)) + 1} of 12"


def test_films_play_and_follow_the_keyboard(opened):
    page = opened(reduced_motion="reduce")
    player = page.locator("#features .player")
    position = "node => node.querySelector('input').value"
    assert player.evaluate(position) == "0"
    page.wait_for_timeout(400)
    assert player.evaluate(position) == "0"  # as the system requests
    player.locator("input").focus()
    page.keyboard.press("ArrowRight")
    assert player.evaluate(position) == "1"
    clip, tokens = player.locator(".frames").nth(0), player.locator(".frames").nth(1)
    frame = "node => node.style.getPropertyValue('--frame')"
    assert (clip.evaluate(frame), tokens.evaluate(frame)) == ("1", "0")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    wait_until(page, "document.querySelector('#features .player input').value > 3")
    assert player.locator("button").inner_text() == "Pause"


def test_dark_mode_changes_page_and_figures(opened):
    page = opened(color_scheme="light")
    colours = """() => [
      getComputedStyle(document.body).backgroundColor,
      document.querySelector("#training .figure .js-line").style.stroke,
      document.querySelector("#training .figure .xtick text").style.fill,
    ]"""
    light = page.evaluate(colours)
    page.emulate_media(color_scheme="dark")
    wait_until(
        page,
        "document.querySelector('#training .figure .js-line').style.stroke"
        f" != {light[1]!r}",
    )
    dark = page.evaluate(colours)
    assert all(a != b for a, b in zip(light, dark, strict=True))


@pytest.mark.parametrize("name", ["one", "both"])
def test_phone_needs_no_sideways_scrolling(opened, name):
    page = opened(name, viewport=PHONE, has_touch=True, is_mobile=True)
    assert overflow(page) <= 0
    wide = page.evaluate(
        """[...document.querySelectorAll("main *")].filter((node) =>
          !node.closest(".scroll, .frames, .figure") &&
          node.getBoundingClientRect().right > innerWidth + 1).length"""
    )
    assert wide == 0


def test_two_runs_share_figures(opened, run):
    page = opened("both")
    loss = page.locator("#training .figure").first
    assert loss.locator(".trace .js-line").count() == 2
    assert loss.locator(".legendtext").all_text_contents() == [run.name, "other"]
