"""`windtunnel report` as a user meets it: the page's path as the last line, or one line of what is wrong and code 2."""

from pathlib import Path

import pytest
from command_line import windtunnel


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, a and b."""
    place = tmp_path_factory.mktemp("runs")
    for name, scheduler in (("a", "sarathi"), ("b", "vllm")):
        done = windtunnel("simulate", "--model", "microsoft/phi-2", "--device", "a100", "--num-prompts", "30",
                          "--request-rate", "4", "--scheduler", scheduler, "--output-dir", name, cwd=place)  # fmt: skip
        assert done.returncode == 0, done.stderr
    return place


def test_one_run_and_two(runs: Path) -> None:
    before = (runs / "a" / "report.html").read_bytes()
    (runs / "a" / "report.html").unlink()
    done = windtunnel("report", "a", cwd=runs)
    assert (done.returncode, done.stdout, done.stderr) == (0, "report: a/report.html\n", "")
    assert (runs / "a" / "report.html").read_bytes() == before
    done = windtunnel("report", "a", "b", "--output", "both.html", cwd=runs)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"report: {runs / 'both.html'}\n", "")
    html = (runs / "both.html").read_text("utf-8")
    assert "default-src 'none'" in html and html.count("class='csv'") == html.count("class='figure'") == 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a", "none"], "there is no folder none"),
        (["a", "--output", "b/report.html"], "b/report.html exists: give another --output"),
        (["a", "b", "--output", "none/x.html"], "there is no folder none to write x.html to"),
        (["."], "no folder of a run"),
        ([], "Missing argument"),
    ],
)
def test_bad_input_is_one_line(runs: Path, arguments: list[str], said: str) -> None:
    done = windtunnel("report", *arguments, cwd=runs)
    assert done.returncode == 2 and done.stdout == ""
    assert said in done.stderr and done.stderr.count("\n") == 1
