"""How long the report of a long run takes: to make, in processor seconds, and to open and zoom in headless Chromium.

    python benchmarks/long_report.py [--steps 500000]

The run is made up, with the keys of a run of two layers of four experts. Chromium and chromedriver must be installed.
"""

import argparse
import json
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from p828.health.of_run import findings_of
from p828.report.page import page
from p828.report.run import ReportedRun

T = TypeVar("T")
PARTS = ("embedding", "attention", "sinks", "router", "routed_experts", "shared_experts", "norms", "head")
TOKENS = 2**19  # a step
DRAWN = "return document.body?.dataset.drawn === 'yes'"


def records(steps: int) -> Iterator[dict[str, Any]]:
    draw = random.Random(0)
    for step in range(1, steps + 1):
        loss = 2 + 8 * math.exp(-step / 20_000) + draw.gauss(0, 0.08)
        seconds = draw.gauss(0.4, 0.01)
        record = {
            "kind": "step", "step": step, "tokens": step * TOKENS, "epoch": 0, "documents": step * 500,
            "cut_documents": step * 100, "targets": TOKENS, "max_token": 49_000, "rows": f"{step:08x}", "loss": loss,
            "grad_norm": abs(draw.gauss(0.4, 0.1)), "perplexity": math.exp(loss), "lr": 3e-4 * (1 - step / steps),
            "tokens_per_second": TOKENS / seconds, "mfu": 0.4 * 0.4 / seconds, "memory_bytes": 40 * 10**9,
            "seconds": seconds, "data_seconds": abs(draw.gauss(1e-3, 1e-4)), "host_seconds": draw.gauss(0.01, 1e-3),
            "balance": [draw.uniform(0.9, 1), draw.uniform(0.9, 1)], "min_share": [0.5, 0.6], "max_share": [1.5, 1.4],
            "starved": [0, 0],
        }  # fmt: skip
        if step % 10 == 0:
            record["load"] = [[draw.randint(500, 1500) for _ in range(4)] for _ in range(2)]
            record |= {"router_entropy": [0.8, 0.9], "bias_max": [0.1, 0.2]}
            for key in ("grad_norms", "update_ratios"):
                record[key] = {part: draw.uniform(0.1, 0.2) for part in PARTS}
        yield record
        if step % 5000 == 0:
            yield {"kind": "eval", "step": step, "loss": loss + 0.05}


def write_run(path: Path, steps: int) -> Path:
    path.mkdir()
    (path / "config.toml").write_text(f"[train]\nsteps = {steps}\n")
    with (path / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(record, separators=(",", ":")) + "\n" for record in records(steps))
    print(f"records of {steps:,} steps: {(path / 'metrics.jsonl').stat().st_size / 1e6:.0f} MB", flush=True)
    return path


def timed(what: str, work: Callable[[], T], clock: Callable[[], float] = time.process_time) -> T:
    began = clock()
    found = work()
    print(f"{what:<60} {clock() - began:6.2f} s", flush=True)
    return found


def look_at(path: Path) -> None:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1300,900"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))

    def drawn() -> None:
        WebDriverWait(browser, 120, poll_frequency=0.02).until(lambda browser: browser.execute_script(DRAWN))

    def opened() -> None:
        browser.get(path.as_uri())
        drawn()

    def zoomed() -> None:
        over = browser.find_element(By.CSS_SELECTOR, "#chart-loss .u-over")
        ActionChains(browser, duration=0).move_to_element(over).click_and_hold().move_by_offset(
            40, 0
        ).release().perform()
        drawn()

    try:
        for what, act in (("open the page", opened), ("zoom in, the first time", zoomed), ("and again", zoomed)):
            timed(what, act, time.perf_counter)
    finally:
        browser.quit()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=500_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        path = write_run(Path(place) / "long", given.steps)
        timed("find what p828 doctor finds", lambda: findings_of(path))
        timed("read the records, without the rules", lambda: ReportedRun(path, with_rules=False))
        run = timed("read the records, and have the rules look", lambda: ReportedRun(path))
        text = timed("make the page", lambda: "".join(page([run])))
        out = Path(place) / "report.html"
        out.write_text(text, encoding="utf-8")
        print(f"the page: {len(text) / 1e6:.1f} MB", flush=True)
        look_at(out)


if __name__ == "__main__":
    main()
