"""The page as a reader opens it: in Chromium, from a file, offline. `apt-get install chromium`."""

from __future__ import annotations

import io
import os
import shutil
from itertools import product

import numpy as np
import pytest
from report_runs import HOSTILE, full_row, rollout, write_run

from trapo.report.write import write_comparison, write_report

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = next(filter(None, (shutil.which(n) for n in ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")
SCREENSHOTS = os.environ.get("TRAPO_SCREENSHOTS")  # a folder to keep them in, to look at


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        # --no-sandbox: CI is root in a container, where Chromium's sandbox does not start.
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Report pages: of one run, of two, and of one whose every text is an attack."""
    tmp = tmp_path_factory.mktemp("reports")
    rows = [full_row(step) for step in range(1, 13)]
    shown = [rollout(s, ratio=r, reward=float(r > 0)) for s in (1, 6) for r in (0.5, 1.0)]
    shown += [rollout(s, ratio=0.0, prefix="", prefix_tokens=0, own="I do not know.", reward=0.0) for s in (1, 6)]
    accuracies = [(0, 0.2), (12, 0.35)]
    one = write_run(tmp / "one", rows, rollouts=shown, accuracies=accuracies)
    two = write_run(tmp / "two", rows[:9], rollouts=shown[:2], accuracies=accuracies, overrides=["optim.lr=0.5"])
    attack = [rollout(1, prompt=HOSTILE, prefix=HOSTILE, own=HOSTILE, answer=HOSTILE)]
    hostile = write_run(tmp / "hostile", rows, rollouts=attack)
    return {
        "one": write_report(one),
        "both": write_comparison([one, two], tmp / "both.html"),
        "hostile": write_report(hostile),
    }


@pytest.fixture
def open_page(browser, pages):
    """Opens a page and waits for its figures; at the end of the test nothing may have gone wrong in it."""
    troubles, contexts = [], []

    def open_(name, width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: troubles.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        own = pages[name].resolve().as_uri()
        page.on("request", lambda r: None if r.url == own or r.url.startswith("blob:null") else troubles.append(r.url))
        page.goto(own)
        page.wait_for_selector("html[data-drawn]", state="attached", timeout=60_000)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert troubles == []


def pixels(element, **options):
    """A screenshot of a page or an element as [H, W, 3]."""
    from matplotlib.image import imread

    return (imread(io.BytesIO(element.screenshot(**options)))[:, :, :3] * 255).round().astype(int)


def channels(css):
    """`rgb(1, 2, 3)` as [1, 2, 3]."""
    return [int(part) for part in css[css.index("(") + 1 : css.index(")")].split(",")[:3]]


# Each with each of the others; all three at once in the slow suite.
PAGES = [("one", 1280, "light"), ("one", 420, "dark"), ("both", 1280, "dark"), ("both", 420, "light")]
PAGES += [
    pytest.param(*page, marks=pytest.mark.slow)
    for page in product(("one", "both"), (1280, 420), ("light", "dark"))
    if page not in PAGES
]


@pytest.mark.parametrize(("name", "width", "scheme"), PAGES)
def test_every_figure_is_drawn_and_nothing_sticks_out(name, width, scheme, open_page):
    page = open_page(name, width, scheme)
    if SCREENSHOTS:
        page.screenshot(path=f"{SCREENSHOTS}/{name}-{width}-{scheme}.png", full_page=True)
    plots = page.query_selector_all(".plot")
    assert len(plots) >= 15
    background = np.array(channels(plots[0].evaluate("e => getComputedStyle(e.closest('figure')).backgroundColor")))
    assert (background.mean() > 128) == (scheme == "light")
    whole = pixels(page, full_page=True)
    for plot in plots:
        box = {side: round(value) for side, value in plot.bounding_box().items()}
        image = whole[box["y"] : box["y"] + box["height"], box["x"] : box["x"] + box["width"]]
        title = plot.get_attribute("aria-label")
        assert (image == background).all(axis=2).mean() > 0.05, f"{title}: not on the page's background"
        colourful = (image.max(axis=2) - image.min(axis=2)) > 60  # text and grid are grey, what is drawn is not
        assert colourful.sum() > 100, f"{title}: blank"
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_prefix_and_own_tokens_have_two_colours(open_page):
    for scheme in ("light", "dark"):
        page = open_page("one", scheme=scheme)
        response = page.query_selector(".response:has(.prefix):has(.own)")
        image = pixels(response)
        colours = [
            channels(response.query_selector(part).evaluate("e => getComputedStyle(e).backgroundColor"))
            for part in (".prefix", ".own")
        ]
        assert np.abs(np.subtract(*colours)).max() > 25
        for colour in colours:
            assert (image == colour).all(axis=2).sum() > 500


TEXTS = (".prefix", ".own", ".prompt", ".tile dt", ".tile small", "figcaption small", ".right", ".wrong", "nav a")


def test_text_has_enough_contrast(open_page):
    """WCAG 2 AA: 4.5 : 1."""

    def luminance(css):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(channels(css)) / 255]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for scheme in ("light", "dark"):
        page = open_page("one", scheme=scheme)
        for selector in TEXTS:
            text, background = page.eval_on_selector(
                selector,
                """e => { let ground = e, style = getComputedStyle;
                          while (style(ground).backgroundColor === 'rgba(0, 0, 0, 0)') ground = ground.parentElement;
                          return [style(e).color, style(ground).backgroundColor] }""",
            )
            dark, light = sorted(luminance(c) for c in (text, background))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{selector} in {scheme}"


def test_rollouts_can_be_filtered(open_page):
    page = open_page("both")

    def shown():
        return [c.query_selector(".facts").inner_text() for c in page.query_selector_all(".rollout") if c.is_visible()]

    assert len(shown()) == 8
    page.select_option("[data-filter=run]", "one")
    page.select_option("[data-filter=level]", "prefix 50%")
    assert len(shown()) == 2
    page.select_option("[data-filter=step]", "6")
    assert len(shown()) == 1
    assert "step 6" in shown()[0]


def test_the_button_switches_colours_of_page_and_figures(open_page):
    page = open_page("one")

    def ground():
        return page.eval_on_selector(".plot .bg", "e => getComputedStyle(e).fill")

    before = ground()
    page.click("#theme")
    page.wait_for_function("old => getComputedStyle(document.querySelector('.plot .bg')).fill !== old", arg=before)
    assert sum(channels(ground())) < 200 < sum(channels(before))


def test_hostile_text_is_shown_and_not_run(open_page):
    page = open_page("hostile")
    assert page.evaluate("window.hacked") is None
    assert page.query_selector("main img") is None
    for part in (".prompt", ".response .prefix", ".response .own"):
        assert page.inner_text(part) == HOSTILE


def test_the_page_runs_no_script_and_loads_nothing_that_was_not_its_own(pages, browser, tmp_path):
    """The second wall, if escaping ever failed: a page with the attack put into it unescaped."""
    page_file = tmp_path / "broken.html"
    page_file.write_text(pages["one"].read_text().replace("<main>", "<main><script>window.hacked = true</script>"
                         "<img src='http://127.0.0.1:9/x' onerror='window.hacked = true'>"))  # fmt: skip
    page = browser.new_page()
    page.goto(page_file.as_uri())
    page.wait_for_selector("html[data-drawn]", state="attached", timeout=60_000)
    assert page.evaluate("window.hacked") is None
    page.close()
