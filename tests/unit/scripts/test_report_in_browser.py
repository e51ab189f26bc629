"""The pages of scripts/report.py, looked at in Chromium, which is installed where root and apt-get can do it."""

import io
import json
import math

import pytest
from PIL import Image

from scripts import report
from tests.browser import PACKAGES, PROGRAMS, Browser
from tests.packages import install
from tests.unit.scripts.report_runs import make_event, make_record, write_run

STEPS = range(1, 101)
COLORS = ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    reason = install(PROGRAMS, PACKAGES)
    if reason:
        pytest.skip(reason)
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def open_page(browser, *runs):
    """Make a page, open it, and check what goes for each: it asks for nothing but itself, and has no error."""
    page = runs[0].parent / "report.html"
    assert report.main([*map(str, runs), "--out", str(page)]) == 0
    browser.open(page)
    asked = [event["request"]["url"] for event in browser.find_events("Network.requestWillBeSent")]
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    assert browser.find_events("Runtime.exceptionThrown") == []
    assert browser.find_events("Log.entryAdded") == []
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than its window"


def point_at_step(browser, panel, step):
    """Put the mouse on a picture, at a step. Return what stands under all visible ones, by title."""
    place = browser.evaluate(
        f"""(() => {{
          const plot = [...document.querySelectorAll("#panel-{panel} .plot")].find((p) => p.offsetParent);
          plot.scrollIntoView({{block: "center"}});
          const {{box, x}} = JSON.parse(plot.dataset.plot), svg = plot.querySelector("svg");
          const frame = svg.getBoundingClientRect(), scale = frame.width / svg.viewBox.baseVal.width;
          const share = ({step} - x[0]) / (x[1] - x[0]);
          return [frame.left + scale * (box[0] + share * (box[1] - box[0])), frame.top + frame.height / 2];
        }})()"""
    )
    browser.point_at(*place)
    return browser.evaluate(
        "Object.fromEntries([...document.querySelectorAll('figure')].map("
        "(f) => [f.id.replace('panel-', ''), f.querySelector('.readout').innerText]))"
    )


def find_numbers(readout):
    return [
        float(word.replace(",", "")) for word in readout.split() if word.replace(",", "").replace(".", "").isdigit()
    ]


def get_picture(browser, panel):
    """Return the pixels of one panel, as they are on the screen."""
    picture = Image.open(io.BytesIO(browser.take_picture())).convert("RGB")
    box = browser.evaluate(
        f"(r => [r.left, r.top + scrollY, r.right, r.bottom + scrollY])(document.querySelector('#panel-{panel}').getBoundingClientRect())"
    )
    return picture.crop([round(side) for side in box])


def count_pixels(picture, color):
    colors = picture.getcolors(maxcolors=1 << 24)
    return sum(count for count, found in colors if all(abs(a - b) < 24 for a, b in zip(found, color, strict=True)))


def test_one_run_shows_curves_values_and_views(browser, tmp_path):
    lines = [make_record(step, **{"experts/layers.1/max_over_mean": 1.5}) for step in STEPS]
    open_page(browser, write_run(tmp_path / "alone", lines, status="complete"))
    assert browser.evaluate("document.querySelector('.badge').innerText") == "complete"
    assert browser.evaluate("document.querySelector('.remarks') === null")
    for panel in ("loss", "grad_norm", "mfu", "data_wait", "max_over_mean_layers_0"):
        assert len(get_picture(browser, panel).getcolors(maxcolors=1 << 24)) > 10, f"{panel} is blank"
    assert count_pixels(get_picture(browser, "loss"), COLORS[0]) > 300

    readouts = point_at_step(browser, "mfu", 30)
    assert find_numbers(readouts["loss"]) == [30, pytest.approx(2 + 6 * math.exp(-1.5), abs=1e-3)]
    assert find_numbers(readouts["memory"]) == [30, 100, 90]
    assert browser.evaluate("document.querySelectorAll('.cross').length") == len(readouts)

    browser.click("#view-2")
    readouts = point_at_step(browser, "loss", 95)
    assert find_numbers(readouts["loss"]) == [95, pytest.approx(2 + 6 * math.exp(-95 / 20), abs=1e-3)]
    assert json.loads(
        browser.evaluate("[...document.querySelectorAll('.plot')].find(p => p.offsetParent).dataset.plot")
    )["x"] == [90, 100]


def test_several_runs_are_told_apart_and_can_be_hidden(browser, tmp_path):
    first = write_run(tmp_path / "first", [make_record(step) for step in range(1, 31)], status="complete")
    skip = make_event("skip", 20, skipped=1)
    lines = [*(make_record(step, loss=3.0, grad_norm=50.0 if step == 20 else 1.0) for step in range(1, 25)), skip]
    other = write_run(tmp_path / "other", lines, settings=["--optimizer.lr", "1e-2"], status="preempted")
    open_page(browser, first, other)
    pixels = [count_pixels(get_picture(browser, "loss"), color) for color in COLORS]
    assert min(pixels) > 300
    readouts = point_at_step(browser, "loss", 20)
    assert find_numbers(readouts["loss"])[1:] == [pytest.approx(2 + 6 * math.exp(-1), abs=1e-3), 3]
    # On a logarithmic axis.
    assert find_numbers(readouts["grad_norm"])[1:] == [1, pytest.approx(50, rel=1e-3)]
    assert "optimizer.lr 0.0008 0.01" in " ".join(browser.evaluate("document.body.innerText").split())

    # The other had ended by then.
    assert len(find_numbers(point_at_step(browser, "loss", 28)["loss"])) == 2

    browser.click("#show-1")
    assert len(find_numbers(point_at_step(browser, "loss", 20)["loss"])) == 2
    browser.click("h1")
    assert count_pixels(get_picture(browser, "loss"), COLORS[1]) < pixels[1] / 4


def test_run_that_goes_on_is_shown_up_to_its_last_whole_line(browser, tmp_path):
    folder = write_run(tmp_path / "live", [make_record(step) for step in range(1, 6)], tail='{"step": 6, "loss": 2')
    open_page(browser, folder)
    assert browser.evaluate("document.querySelector('.badge').innerText") == "going on"
    assert "step 5 of 10,000 was logged last" in browser.evaluate("document.querySelector('.state').innerText")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('.5, "time": 1}\n' + "".join(json.dumps(make_record(step)) + "\n" for step in (7, 8)))
    open_page(browser, folder)
    assert "step 8 of 10,000" in browser.evaluate("document.querySelector('.state').innerText")
    assert find_numbers(point_at_step(browser, "loss", 6)["loss"]) == [6, 2.5]
