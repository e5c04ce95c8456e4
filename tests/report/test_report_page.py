"""The page of `p828 report` in headless Chromium: opened, a finding clicked, zoomed, on a phone, in the dark, live."""

import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from report_in_browser import ReportPage
from reported_runs import STEPS, step_record, write_run
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from headless import chromium, needs_chromium
from p828.report.buckets import BUCKETS
from p828.report.page import page
from p828.report.run import ReportedRun
from p828.report.watch import ReportServer

PHONE = {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}

pytestmark = [
    needs_chromium,
    pytest.mark.xdist_group("report"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with chromium(tmp_path_factory.mktemp("browser")) as driver:
        yield driver


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture(scope="module")
def address(run: Path) -> str:
    path = run.parent / "report.html"
    path.write_text("".join(page([ReportedRun(run, with_rules=False)])), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def shown(browser: webdriver.Chrome, address: str) -> Iterator[ReportPage]:
    """Opened anew. At the end nothing has been loaded from elsewhere, and the console has no complaint."""
    report = ReportPage(browser)
    report.open(address)
    yield report
    assert report.run("return performance.getEntriesByType('resource').length") == 0
    assert report.complaints() == []


def test_a_finding_leads_to_its_steps(shown: ReportPage) -> None:
    assert shown.text("#findings h2") == "1 finding"
    assert "<img src=x onerror=alert(1)></script>" in shown.text(".finding")
    assert shown.text("#sample-texts") == "Once upon </script><b>"
    shown.click(".finding button")
    low, high = shown.shown_range("loss")
    assert low == STEPS / 2 - 0.02 * (STEPS - 1)
    assert high == STEPS / 2 + 0.06 * (STEPS - 1)


def test_a_zoom_shows_every_step(shown: ReportPage) -> None:
    """The overview has two numbers for each of 1,000 buckets; the zoomed chart has the records' numbers."""
    shown.drag("loss", 0, 40)
    low, high = shown.shown_range("loss")
    assert 0 < high - low < STEPS / 5
    columns = shown.run("return page.charts[0].plot.data.slice(0, 2).map((column) => [...column])")
    points = {step: loss for step, loss in zip(*columns, strict=True) if loss is not None}
    assert [step for step in points if low <= step <= high] == list(range(math.ceil(low), math.floor(high) + 1))
    assert all(math.isclose(loss, step_record(step)["loss"], rel_tol=1e-6) for step, loss in points.items())
    shown.click("#whole")
    assert shown.shown_range("grad_norm") == (1, STEPS)


def test_other_axes_show_the_same_steps(shown: ReportPage) -> None:
    shown.click(".finding button")
    low, high = shown.shown_range("loss")
    shown.run("axis.value = 'tokens'; axis.dispatchEvent(new Event('change'))")
    shown.wait()
    assert shown.shown_range("loss") == pytest.approx((low * 100, high * 100))


def test_csv_has_the_records_numbers(shown: ReportPage) -> None:
    shown.click(".finding button")
    text = shown.browser.execute_async_script(
        "const done = arguments[0]; linesOf([page.focus], ['loss'], page).then((pieces) => done(pieces.join('')))"
    )
    head, *lines = text.splitlines()
    low, high = shown.shown_range("loss")
    assert head == "run,step,tokens,hours,loss"
    assert [int(line.split(",")[1]) for line in lines] == list(range(math.ceil(low), math.floor(high) + 1))
    _, step, tokens, _, loss = lines[0].split(",")
    assert int(tokens) == 100 * int(step)
    assert float(loss) == pytest.approx(step_record(int(step))["loss"], rel=1e-6)


def test_csv_has_the_validation_losses(shown: ReportPage) -> None:
    shown.run("save = (name, pieces) => { window.saved = pieces.join('') }")
    for button in ("#chart-loss .csv", "#csv"):
        shown.run("window.saved = null")
        shown.click(button)
        shown.wait("window.saved")
        head, *lines = shown.run("return window.saved").splitlines()
        assert head.endswith(",validation_loss")
        assert [line.rpartition(",")[2] for line in lines] == [""] * (STEPS - 1) + ["2.5"]


def test_the_heat_map_tells_an_experts_load(shown: ReportPage) -> None:
    """Four fifths down is expert 2 of 4 of layer 1, whose load is even; a sixteenth down expert 0 of layer 0."""
    told = []
    for part in (0.81, 0.0625):
        shown.point_at("#heat-map", 0.5, part)
        told.append(shown.text("#heat-map-text").partition(", ")[2])
    assert told == ["layer 1, expert 2: 1.00 of an even share", "layer 0, expert 0: 0.500 of an even share"]


def test_keys_go_through_the_heat_map(shown: ReportPage) -> None:
    """Loads of layer 0 are 10, 30, 0 and 40, of layer 1 even; the ring is where the pointer finds the same cell."""
    shown.run("document.getElementById('layer').focus()")
    shown.press(Keys.TAB)
    assert shown.run("return document.activeElement.id") == "heat-map"
    told, pointed = [shown.text("#heat-map-text")], []
    for keys in (Keys.DOWN * 3, Keys.DOWN, Keys.PAGE_UP, Keys.HOME, Keys.RIGHT + Keys.DOWN * 2, Keys.UP * 9 + Keys.END):
        shown.press(*keys)
        told.append(shown.text("#heat-map-text"))
        assert shown.run("return getComputedStyle(document.getElementById('heat-map-cell')).visibility") == "visible"
        shown.point_at("#heat-map-cell", 0.5, 0.5)
        pointed.append(shown.text("#heat-map-text"))
    assert [text.partition(", ")[2].removesuffix(" of an even share") for text in told] == [
        "layer 0, expert 0: 0.500", "layer 0, expert 3: 2.00", "layer 1, expert 0: 1.00", "layer 0, expert 0: 0.500",
        "layer 0, expert 0: 0.500", "layer 0, expert 2: 0.00", "layer 0, expert 0: 0.500",
    ]  # fmt: skip
    assert told[0].startswith("steps 5970 to 6000")
    assert [text.partition(",")[0] for text in told[4:]] == ["steps 10 to 40", "steps 50 to 80", "steps 5970 to 6000"]
    assert pointed == told[1:]


def test_keys_stay_in_what_the_heat_map_shows(shown: ReportPage) -> None:
    shown.run("page.zoom([1000, 2000])")
    shown.run("layer.value = '1'; layer.dispatchEvent(new Event('change'))")
    shown.run("document.getElementById('heat-map').focus()")
    told = []
    for keys in (Keys.END + Keys.RIGHT, Keys.HOME + Keys.LEFT + Keys.PAGE_UP + Keys.UP):
        shown.press(*keys)
        told.append(shown.text("#heat-map-text"))
    assert [text.partition(":")[0] for text in told] == [
        "steps 1970 to 2000, layer 1, expert 0", "steps 970 to 1000, layer 1, expert 0",
    ]  # fmt: skip
    shown.click("#whole")
    assert shown.text("#heat-map-text") == told[-1]
    assert shown.run("return document.getElementById('heat-map-text').role") == "status"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_down_only(shown: ReportPage, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    shown.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    shown.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        shown.browser.refresh()
        shown.wait()
        assert shown.run("return document.documentElement.scrollWidth") == PHONE["width"]
        light = shown.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert light == (scheme == "light")
    finally:
        shown.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        shown.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_runs_of_other_lengths_are_overlaid(browser: webdriver.Chrome, run: Path, tmp_path: Path) -> None:
    """A long run, a short one whose name is HTML, and one of a long name and no step; the long run is hidden then."""
    short, empty = write_run(tmp_path / "<b>short", steps=30), tmp_path / f"{'long_' * 20}empty"
    empty.mkdir()
    (empty / "config.toml").write_text("[train]\nsteps = 7\n")
    path = tmp_path / "report.html"
    runs = [ReportedRun(one, with_rules=False) for one in (run, short, empty)]
    path.write_text("".join(page(runs)), encoding="utf-8")
    report = ReportPage(browser)
    report.open(path.as_uri())
    assert report.text("#runs li:nth-child(2) strong") == "<b>short"
    assert report.text("#runs li:nth-child(3)").endswith("_empty empty, step 0 of 7")
    assert report.run("return document.documentElement.scrollWidth <= innerWidth")
    assert [number.text for number in report.all(".finding .number")] == ["1", "2"]
    assert report.shown_range("loss") == (1, STEPS)
    swatches = report.swatches("loss")
    assert {"first: training", "first: validation", "<b>short: training", "<b>short: validation"} < swatches.keys()
    assert len({*swatches.values()}) == len(swatches), "each curve has its own"
    report.run("const of = document.getElementById('focus'); of.value = '1'; of.dispatchEvent(new Event('change'))")
    report.wait()
    assert report.text("#loads h2") == "Load of each expert: <b>short"
    report.click("#runs input")
    assert report.shown_range("loss") == (1, 30)
    assert report.complaints() == []


def test_steps_of_a_source_of_any_name_are_fetched(browser: webdriver.Chrome, tmp_path: Path) -> None:
    run, count = write_run(tmp_path / "mixed", steps=0), 2 * BUCKETS + 1
    lines = (json.dumps({**step_record(step), "source_tokens": {"50%/a?b#c": step}}) for step in range(1, count + 1))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with ReportServer([ReportedRun(run, with_rules=False)], port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            report = ReportPage(browser)
            report.open(server.url)
            report.run("page.range = [50, 60]; page.charts.find((one) => one.about.id === 'sources').draw()")
            script = "page.charts.find((one) => one.about.id === 'sources').plot.data[1].includes(55)"
            report.wait(script)
            assert report.complaints() == []
        finally:
            server.shutdown()
            thread.join()


def test_a_watched_run_grows_and_its_new_findings_are_shown(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """Step 21 has a token id that the model has no row for."""
    run = write_run(tmp_path / "live", steps=20, config="[train]\nsteps = 6000\n\n[model]\nvocab_size = 1024\n")
    with ReportServer([ReportedRun(run)], port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            report = ReportPage(browser)
            report.open(server.url)
            assert report.run("return page.focus.count") == 20
            assert "token_out_of_vocabulary" not in report.text("#findings")
            report.click("#chart-loss .u-series:nth-child(2) th")
            report.click("#about summary")
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({**step_record(21), "max_token": 5000}) + "\n")
            report.wait("page.focus.count === 21")
            assert "step 21 has the token id 5000" in report.text("#findings")
            assert report.run("return document.activeElement.textContent").endswith(" settings")
            assert report.run("return document.querySelector('#about details').open")
            assert report.run("return page.charts[0].plot.series.map(({ show }) => show)")[:3] == [True, False, True]
            assert report.complaints() == []
        finally:
            server.shutdown()
            thread.join()
