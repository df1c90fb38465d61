"""The page of 1,000 prompts and 10 candidates: its size, and how long it takes to open."""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine, write_result

from divergent_tokens.report.page import page
from divergent_tokens.report.records import read_source

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import browser
import page_records

REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n-prompts", type=int, default=1000)
    parser.add_argument("--n-candidates", type=int, default=10)
    parser.add_argument("--n-tokens", type=int, default=128)
    parser.add_argument("--examples", type=int, default=100)
    options = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as folder:
        record = page_records.write(
            Path(folder) / "comparison.json", page_records.comparison(**options)
        )
        start = time.perf_counter()
        text = page([read_source(record)])
        made = time.perf_counter() - start
        record_bytes = record.stat().st_size
        path = Path(folder) / "page.html"
        path.write_text(text, encoding="utf-8")
        with browser.running() as started:
            opened = [
                _seconds(started, path) | {"cpu": _cpu_seconds(started, path)}
                for _ in range(REPEATS)
            ]
            version = started.version
    result = {
        **options,
        "record_bytes": record_bytes,
        "page_bytes": len(text.encode()),
        "seconds_to_make": made,
        "browser": f"Chromium {version}, headless",
        "load_average": _load(),
        "seconds_to_open": statistics.median(one["load"] for one in opened),
        "cpu_seconds_to_open": statistics.median(one["cpu"] for one in opened),
        "seconds_to_draw_a_figure": statistics.median(one["figure"] for one in opened),
        "seconds_to_filter": statistics.median(one["filter"] for one in opened),
        "opened": opened,
    }
    print({name: value for name, value in result.items() if name != "opened"})
    print(f"on {machine()['device']}; written to", write_result("page", result))


def _load() -> float:
    """Processes that wanted a core in the last minute: other work slows a browser down."""
    return os.getloadavg()[0]


def _seconds(started: Any, path: Path) -> dict[str, float]:
    """From asking for the page until it has loaded, until a figure is drawn, and of one filter."""
    with browser.opened(started, path) as found:
        load = found.page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
        found.page.locator("#figure-survival").scroll_into_view_if_needed()
        found.page.wait_for_selector("#figure-survival[data-drawn]")
        figure = found.page.evaluate(
            "(async () => { const start = performance.now(); await draw('survival');"
            "return performance.now() - start; })()"
        )
        sort = found.page.evaluate(
            "(() => { const start = performance.now(); controls.elements.sort.value = 'kl';"
            "controls.dispatchEvent(new Event('change')); return performance.now() - start; })()"
        )
        assert found.said == []
    return {"load": load / 1000, "figure": figure / 1000, "filter": sort / 1000}


def _cpu_seconds(started: Any, path: Path) -> float:
    """Of the page's process until it has loaded: what it costs whatever else the machine does."""
    page = started.new_page()
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(path.as_uri())
    found = session.send("Performance.getMetrics")["metrics"]
    page.close()
    return next(one["value"] for one in found if one["name"] == "ProcessTime")


if __name__ == "__main__":
    main()
