"""Pages in headless Chromium, where there is one: every figure is drawn, and nothing is said on the console."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from test_plan import small_plan
from test_studies_compare import entry, load, make_run, make_search, make_sweep, spread
from test_studies_validation import made_up_load, made_up_results

from studies.pages.report import write_page
from studies.pages.study import write_page as write_study
from studies.pages.validation import validation_page
from studies.published import library

RECORD = Path(__file__).parents[1] / "docs" / "studies.json"

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files",
         "--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom"]  # fmt: skip
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")

# in the page of all pages: what each of them shows, as JSON in the title. The table of the one called sorted is sorted
SCRIPT = """
addEventListener("load", () => {
  const frames = [...document.querySelectorAll("iframe")];
  document.title = JSON.stringify(Object.fromEntries(frames.map(frame => {
    const page = frame.contentDocument, drawn = page.querySelectorAll(".js-plotly-plot .main-svg").length;
    let column = null;
    if (frame.id === "sorted") {
      const head = [...page.querySelectorAll(".sort")].find(each => each.textContent === "TBT, P99");
      head.click(); head.click();
      const rows = [...head.closest("table").tBodies[0].rows];
      column = rows.map(row => row.cells[head.closest("th").cellIndex].textContent);
    }
    const wide = page.documentElement.scrollWidth > frame.clientWidth;
    return [frame.id, {figures: drawn / 3, wide, column, text: page.querySelector("main p").textContent}];
  })));
});
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of a run, two runs, a search, a sweep, a plan, a study, a validation; without its library; to be sorted."""
    place = tmp_path_factory.mktemp("pages")
    make_run(place / "one")
    make_run(place / "two", policy="vllm", stages=2)
    make_search(place / "search", "sarathi")
    slow, fast = [load(1.0, 25, 20), load(2.0, 50, 40)], [load(2.5, 10, 20), load(5.0, 20, 40), load(6.25, 200, 50)]
    points = [
        entry(f"{device},{budget}", qps, gpus, settings={"device": device, "max_num_batched_tokens": budget},
              device=device, loads=loads, **spread(0.9 * qps, qps, 1.2 * qps))
        for budget in (512, 2048) for device, qps, gpus, loads in (("a100", 2.0, 1, slow), ("h100", 5.0, 2, fast))
    ]  # fmt: skip
    made = {
        "run": write_page([place / "one"]),
        "runs": write_page([place / "one", place / "two"], place / "both.html"),
        "search": write_page([place / "search"]),
        "sweep": write_page([make_sweep(place / "sweep", *points)]),
        "plan": small_plan(place / "plan")[0] / "report.html",
        "study": write_study(
            "scheduler_ablation",
            library.load("scheduler_ablation"),
            json.loads(RECORD.read_text("utf-8"))["scheduler_ablation"]["records"],
            place / "s" / "study.html",
        ),
        "validation": validation_page(made_up_results(made_up_load(0.5, 0.05))).write(place / "v" / "validation.html"),
    }
    html = made["sweep"].read_text(encoding="utf-8")
    values = iter(["1.2&nbsp;s", "45&nbsp;ms", "-", "900&nbsp;µs"])
    html = re.sub(r"<td class='best'>50\xa0ms</td>", lambda found: f"<td>{next(values)}</td>", html)
    (place / "lonely").mkdir()
    made["sorted"] = place / "lonely" / "sorted.html"  # its table alone: figures take a second to draw
    made["sorted"].write_text(html, encoding="utf-8")
    made["lonely"] = Path(shutil.copyfile(made["run"], place / "lonely" / "lonely.html"))
    return made


@pytest.fixture(scope="module")
def seen(pages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a browser shows of each page as wide as a phone, and what was said on the console."""
    place = tmp_path_factory.mktemp("browser")
    frames = "".join(
        f"<iframe id={name} src={path.as_uri()} width=390 height=900></iframe>" for name, path in pages.items()
    )
    (place / "all.html").write_text(f"<html><script>{SCRIPT}</script>{frames}</html>", encoding="utf-8")
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={place / 'profile'}", (place / "all.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    (title,) = re.findall(r"<title>(.*)</title>", done.stdout)
    said = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return {**json.loads(unescape(title)), "said": said}


def test_pages_are_drawn_without_a_word_on_the_console(pages: dict[str, Path], seen: dict[str, Any]) -> None:
    for name in ("run", "runs", "search", "sweep", "plan", "study", "validation"):
        figures = pages[name].read_text(encoding="utf-8").count("class='figure'")
        assert seen[name]["figures"] == figures >= 2, name
        assert not seen[name]["wide"], name  # nothing sticks out of a phone's screen
    assert not [line for line in seen["said"] if "ERR_FILE_NOT_FOUND" not in line]


def test_a_page_without_its_plot_library_says_so(seen: dict[str, Any]) -> None:
    assert seen["lonely"]["figures"] == 0
    assert "The figures are missing" in seen["lonely"]["text"] and "--standalone" in seen["lonely"]["text"]


def test_a_click_on_a_head_sorts_a_table(seen: dict[str, Any]) -> None:
    values = [value.replace("\xa0", " ") for value in seen["sorted"]["column"]]
    assert values == ["900 µs", "45 ms", "1.2 s", "-"]
