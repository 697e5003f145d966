"""The page in a real browser: what it shows first, whom it asks, and whether all can read it."""

import shutil

import pytest
from PIL import Image, ImageStat

playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt install chromium"),
]

QUIET = [
    "--no-sandbox",  # containers run tests as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SCREENS = {"phone": (390, 844), "desk": (1440, 900)}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=QUIET, timeout=60_000)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, text, tmp_path):
    """Opens the page and keeps what it says and asks for."""
    file = tmp_path / "report.html"
    file.write_text(text)
    contexts = []

    def open_page(screen, scheme):
        width, height = SCREENS[screen]
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        contexts.append(context)
        page = context.new_page()
        page.said, page.asked = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", SCREENS)
def test_page_on_a_screen(opened, screen, scheme, tmp_path):
    page = opened(screen, scheme)
    picture = tmp_path / f"{screen}-{scheme}.png"
    page.screenshot(path=picture, full_page=True)
    assert page.said == []
    assert [url for url in page.asked if not url.startswith(("file:", "data:"))] == []
    with Image.open(picture) as image:
        assert image.width == SCREENS[screen][0]
        brightness = ImageStat.Stat(image.convert("L")).median[0]
    assert brightness < 60 if scheme == "dark" else brightness > 200
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    found = axe.Axe().run(page).response["violations"]
    assert [(each["id"], each["impact"], each["nodes"][0]["html"]) for each in found] == []


@pytest.mark.parametrize("screen", SCREENS)
def test_the_first_screen_answers_for_every_budget(opened, screen, summary):
    page = opened(screen, "light")
    cards = page.locator("article")
    assert cards.count() == len(summary["budgets"])
    for card in cards.all():
        words = card.inner_text()
        assert all(word in words for word in ("smaller", "faster", "top-1"))
        box = card.bounding_box()
        assert box["y"] + box["height"] <= SCREENS[screen][1]


def test_keyboard_reaches_what_can_be_opened_or_scrolled(opened):
    page = opened("phone", "light")
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.tagName"))
    assert {"A", "DIV", "SUMMARY"} <= reached


def test_on_paper_everything_is_open_and_light(opened):
    page = opened("desk", "dark")
    shown = "[...document.querySelectorAll('pre')].filter(each => each.checkVisibility()).length"
    assert page.evaluate(shown) == 0
    page.emulate_media(media="print")
    page.wait_for_function(f"{shown} === 2", timeout=20_000)  # a frame or two later
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(255, 255, 255)"
