"""Milliseconds that the report's filters take over 2,000 pairs of answers, in headless Chromium.

    python perf/report_filter.py [CHROMIUM]

Needs playwright. From the input event until the browser has laid out the new page; best and worst
of five of each filter, in one run.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))

from abliterator.report import render_report
from tests.report.builds import build

PAIRS = 2000
WORDS = "the answer of a model to a request, as long as answers are " * 16  # about 1,000 characters
FILTERS = {
    "search": ("#f-search", "input", ["prompt 13", "answer 7", "nothing like it", "r", ""]),
    "verdict change": ("#f-change", "change", ["changed", "same", "", "changed", ""]),
    "class": ("#f-b", "change", ["refused", "complied", "", "refused", ""]),
}
MEASURE = """([selector, event, value]) => {
  const input = document.querySelector(selector);
  input.value = value;
  const start = performance.now();
  input.dispatchEvent(new Event(event));
  document.body.getBoundingClientRect();  // lays the page out
  return performance.now() - start;
}"""


def main() -> None:
    """Prints a line for each filter."""
    chromium = sys.argv[1] if sys.argv[1:] else shutil.which("chromium")
    report = render_report([build(n=PAIRS, text=WORDS)])
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as started:
        path = Path(folder) / "report.html"
        path.write_text(report, encoding="utf-8")
        browser = started.chromium.launch(executable_path=chromium)
        page = browser.new_page()
        page.goto(path.as_uri())
        print(f"{PAIRS} pairs, {len(report) / 1e6:.1f} MB")
        for name, (selector, event, values) in FILTERS.items():
            times = [page.evaluate(MEASURE, [selector, event, value]) for value in values]
            print(f"{name:15} {min(times):6.1f} to {max(times):6.1f} ms")
        browser.close()


if __name__ == "__main__":
    main()
