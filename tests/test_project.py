"""What commands import when they start, and that README, docs and CI tell the truth."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import engine

ROOT = Path(__file__).parents[1]


def test_the_engine_starts_without_heavy_packages() -> None:
    code = (
        "import sys, cli.main, cli.bench, cli.generate, cli.search, engine.runtime.serve; "
        "import engine.executors.multiprocess, engine.executors.start; "
        "print([name for name in ('torch', 'ray', 'plotly', 'transformers', 'safetensors') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_extras_name_packages_and_the_tests_bring_every_one_they_need() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert all(extras.values())
    for word in re.findall(r"windtunnel\[(.*?)\]", str(extras)):
        assert set(word.split(",")) <= set(extras)
    assert {"engine", "cluster", "test"} <= set(re.findall(r"\w+", extras["dev"][0]))
    assert [text for text in extras["dev"] if text.startswith("torch==")]  # one version for everybody who develops
    assert any(text.startswith("torch>=") for text in extras["engine"])


def test_the_simulator_imports_without_torch_ray_and_plotly() -> None:
    code = (
        "import sys, cli.main, cli.simulate, simulator.cluster, profiler.operators; "
        "print([name for name in ('torch', 'ray', 'plotly', 'pandas', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_checkout_is_what_is_tested() -> None:
    assert Path(engine.__file__).is_relative_to(ROOT)


def test_ci_runs_the_command_of_the_readme() -> None:
    command = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1]
    assert command == "bash tests/run.sh"
    assert command in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    lines = (ROOT / "tests" / "run.sh").read_text(encoding="utf-8").splitlines()
    assert {"ruff check .", "ruff format --check .", "mypy -n 2"} < {line.removeprefix(".venv/bin/") for line in lines}
    assert lines[-1].startswith(".venv/bin/pytest ")


def test_the_pages_name_flags_that_there_are() -> None:
    import typer

    from cli.main import app

    def options(command: Any) -> set[str]:
        inner = [options(each) for each in getattr(command, "commands", {}).values()]
        return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}.union(
            *inner
        )

    known = options(typer.main.get_command(app))
    # of scripts, and of vLLM's benchmark
    others = {"--help", "--full", "--name", "--memory-growth", "--save-result", "--save-detailed"}
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text("utf-8"))) <= known | others, page.name


def test_links_between_the_pages_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    links = [
        (page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
    ]
    assert links
    for page, link in links:
        assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_examples_of_the_extension_page_run(capsys: pytest.CaptureFixture[str]) -> None:
    from engine.results.metric_table import METRICS
    from engine.scheduling.policies import POLICIES
    from simulator.cluster import PREDICTORS
    from simulator.router import ROUTERS

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extend.md").read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 6
    namespace: dict[str, object] = {}
    try:
        for block in blocks:
            exec(compile(block, "docs/extend.md", "exec"), namespace)
        run = namespace["run"]
        assert run.summary["completed"] == 100  # type: ignore[attr-defined]
        assert {replica["scheduler"] for replica in run.summary["replicas"]} == {"shortest_first"}  # type: ignore[attr-defined]
        assert "two straight lines" in run.summary["replicas"][0]["predictor"]  # type: ignore[attr-defined]
    finally:
        for names in (POLICIES, ROUTERS, PREDICTORS, METRICS):
            for name in ("shortest_first", "fewest_waiting", "two_lines", "decode_time"):
                names.pop(name, None)  # type: ignore[attr-defined]
    assert {"p99_ttft<=2s", "p90_decode_time<=30s"} <= set(re.findall(r"\w+<=\w+", capsys.readouterr().out))


def test_the_example_of_the_engine_page_runs(tmp_path: Path) -> None:
    example, benchmark = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "engine.md").read_text("utf-8"), re.DOTALL)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", example],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    assert [len(answer["token_ids"]) for answer in answers] == [5, 5]
    for folder in ("measured", "simulated"):
        assert json.loads((tmp_path / folder / "summary.json").read_text("utf-8"))["completed"] == 40
    script = benchmark.split()[-1]
    assert (ROOT / script).is_file()


def test_the_files_of_the_settings_page_are_read(tmp_path: Path) -> None:
    from engine.specs.catalog import network
    from windtunnel.settings import FileConfig, load

    cluster, net = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "settings.md").read_text("utf-8"), re.DOTALL)
    (tmp_path / "run.yaml").write_text(cluster, encoding="utf-8")
    (tmp_path / "net.yaml").write_text(net, encoding="utf-8")
    groups = load(tmp_path / "run.yaml", {}, FileConfig).groups()
    assert [(group.count, group.device, group.scheduler) for group in groups] == [
        (2, "a100", None),
        (1, "h100", "vllm_v0"),
    ]
    assert network(str(tmp_path / "net.yaml")).node.bandwidth_bytes_per_s == 400e9


def test_the_help_names_what_there_is_to_choose_from() -> None:
    from engine.runtime.engine_spec import EXECUTORS, LOAD_FORMATS
    from engine.scheduling.policies import POLICIES
    from engine.specs import DTYPES
    from engine.specs.catalog import DEVICES, HOST_OVERHEADS, INTERNODES
    from engine.worker.attention import BACKENDS
    from engine.workload.lengths import builtin_names
    from simulator.cluster import PREDICTORS
    from simulator.router import ROUTERS
    from windtunnel.settings import BenchConfig, EngineSettings

    choices = {
        "scheduler": POLICIES,
        "router": ROUTERS,
        "device": DEVICES,
        "internode_network": INTERNODES,
        "host_overhead": HOST_OVERHEADS,
        "predictor": PREDICTORS,
        "workload": builtin_names(),
        "dtype": DTYPES,
        "executor": EXECUTORS,
        "load_format": LOAD_FORMATS,
        "attention_backend": BACKENDS,
    }
    settings_page = (ROOT / "docs" / "settings.md").read_text("utf-8")
    for setting, names in choices.items():
        for name in names:
            assert name in str(BenchConfig.model_fields[setting].description), f"--{setting} does not name {name}"
            assert setting not in EngineSettings.model_fields or f"`{name}`" in settings_page
    for setting in EngineSettings.model_fields:
        assert f"`--{setting.replace('_', '-')}" in settings_page


def test_the_device_of_the_extension_page_is_a_device(tmp_path: Path) -> None:
    from engine.specs.catalog import device

    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "extend.md").read_text("utf-8"), re.DOTALL)
    path = tmp_path / "my_gpu.yaml"
    path.write_text(block, encoding="utf-8")
    assert device(str(path)).peak_flops == 400e12
