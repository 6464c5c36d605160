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
    shown = [rollout(s, level=i, ratio=r, reward=1.0) for s in (1, 6) for i, r in ((1, 0.5), (2, 1.0))]
    unguided = {"level": 0, "ratio": 0.0, "prefix": "", "prefix_tokens": 0}
    shown += [rollout(s, **unguided, own="I do not know.", reward=s / 10) for s in (1, 6)]
    shown += [rollout(9, **unguided, own="It is 7.", prompt="Another question", reward=1.0)]
    accuracies = [(0, 0.2), (12, 0.35)]
    one = write_run(tmp / "one", rows, rollouts=shown, accuracies=accuracies)
    two = write_run(tmp / "two", rows[:9], rollouts=shown[:2], accuracies=accuracies, overrides=["optim.lr=0.5"])
    attack = [rollout(1, prompt=HOSTILE, prefix=HOSTILE, own=HOSTILE, answer=HOSTILE)]
    hostile = write_run(tmp / "hostile", rows, rollouts=attack)
    ups = [{"own_reward": 0.2, "entropy": 1.0}, {"own_reward": 0.8, "entropy": 2.0}]
    seeds = [
        write_run(
            tmp / f"s{seed}",
            [full_row(s % 9 + 1) | ups[seed] | {"step": s} for s in range(1, 60)],
            overrides=[f"seed={seed}"],
        )
        for seed in (0, 1)
    ]
    return {
        "one": write_report(one),
        "both": write_comparison([one, two], tmp / "both.html"),
        "hostile": write_report(hostile),
        "seeds": write_comparison(seeds, tmp / "seeds.html"),
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


TEXTS = (".prefix", ".own", ".prompt", ".tile dt", ".tile small", "figcaption small", ".right", ".part", "nav a")


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


def shown(page):
    """Step of each group that is to be seen, in their order."""
    return [int(g.get_attribute("data-step")) for g in page.query_selector_all(".group") if g.is_visible()]


def test_groups_can_be_searched_filtered_and_sorted(open_page):
    page = open_page("both")
    assert shown(page) == [1, 6, 9, 1]
    page.select_option("[data-filter=run]", "one")
    assert shown(page) == [1, 6, 9]
    page.select_option("[data-filter=outcome]", "all right")
    assert shown(page) == [9]
    page.select_option("[data-filter=outcome]", "")
    page.select_option("[data-filter=levels]", "prefix 50%")
    assert shown(page) == [1, 6]
    assert page.inner_text("#count") == "2 of 4 prompts"
    page.select_option("[data-filter=levels]", "")
    page.fill("#search", "ANOTHER quest")
    assert shown(page) == [9]
    page.fill("#search", "")
    page.select_option("#sort", "-own")
    assert shown(page) == [9, 6, 1]
    page.select_option("#sort", "-gain")
    assert shown(page) == [1, 6, 9]  # what was not guided comes last
    page.select_option("#sort", "-step")
    assert shown(page) == [9, 6, 1]


def test_micro_groups_of_a_prompt_stand_side_by_side(open_page):
    page = open_page("one")
    first = page.query_selector(".group")
    boxes = [level.bounding_box() for level in first.query_selector_all(".level")]
    assert len(boxes) == 3
    assert len({round(box["y"]) for box in boxes}) == 1
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    assert len(first.query_selector_all(".prompt")) == 1


DRAWN = """title => document.querySelector(`.plot[aria-label="${title}"]`).data.map(
    t => ({x: [...t.x], y: [...t.y], name: t.name, fill: t.fill ?? ''}))"""
AXIS = """title => { const {xaxis, yaxis} = document.querySelector(`.plot[aria-label="${title}"]`).layout;
                     return [xaxis.title.text, yaxis.type] }"""


def test_the_controls_smooth_rescale_and_change_the_x_axis(open_page):
    page = open_page("one")
    assert len(page.evaluate(DRAWN, "Reward of all rollouts, expert text too")) == 1  # 12 steps are shown as they are
    page.select_option("#x", "time")
    (line,) = page.evaluate(DRAWN, "Entropy")
    assert line["x"] == pytest.approx([13 * step / 3600 for step in range(1, 13)])
    (accuracy,) = page.evaluate(DRAWN, "Held-out accuracy")
    assert accuracy["x"] == pytest.approx([0, 13 * 12 / 3600])
    assert page.evaluate(AXIS, "Entropy")[0] == "hours"
    assert page.evaluate(AXIS, "Time of a step by part")[0] == "step"  # bars stay by step
    page.check("#log")
    assert page.evaluate(AXIS, "Entropy")[1] == "log"
    assert page.evaluate(AXIS, "Own reward")[1] != "log"  # a share
    page.fill("#smooth", "0.5")
    raw, average = page.evaluate(DRAWN, "Reward of all rollouts, expert text too")
    # Weights 1/2 and 1 of the first two values.
    assert average["y"][:2] == pytest.approx([raw["y"][0], (raw["y"][0] / 2 + raw["y"][1]) / 1.5])


def test_seeds_are_one_line_with_a_band_or_a_line_each(open_page):
    page = open_page("seeds")
    high, low, mean = page.evaluate(DRAWN, "Own reward")
    assert (mean["name"], low["fill"]) == ("s0 and 1 more of its kind", "tonexty")
    assert [line["y"][-1] for line in (high, low, mean)] == pytest.approx([0.8, 0.2, 0.5])
    page.uncheck("#seeds")
    assert {line["name"] for line in page.evaluate(DRAWN, "Own reward")} == {"s0", "s1"}
    page.click(".chip >> text=s1")
    assert {line["name"] for line in page.evaluate(DRAWN, "Own reward")} == {"s0"}
    assert not page.query_selector("figure[data-run=s1]").is_visible()


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
