"""One config file means one replica, whichever command reads it."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from cli.engine import engine_device
from cli.main import run
from cli.search_point import confirm_point
from engine.replica_spec import ReplicaSpec
from engine.runtime.engine_spec import EngineSpec
from engine.specs import HostOverhead, catalog
from simulator.cluster import Deployment
from studies.validation.run import Validation
from windtunnel.settings import BenchConfig, FileConfig, GenerateConfig, from_flags, load

CONFIG = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
          "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 300, "max_position_embeddings": 256,
          "rms_norm_eps": 1e-5}  # fmt: skip
HOST = HostOverhead(name="measured_h100", iteration_s=1e-3, sequence_s=1e-6, layer_s=0.0, source="a test")
LOAD = {"workload": "fixed", "input_len": 20, "output_len": 5, "request_rate": 5.0, "num_prompts": 20,
        "slo": ["p99_tbt<=10"], "load_format": "dummy"}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu", "max_num_seqs": 8, "max_num_batched_tokens": 64},
    "cpu with blocks": {"device": "cpu", "num_gpu_blocks_override": 60, "async_scheduling": True},
    "gpu": {"device": "h100", "scheduler": "vllm", "network": "pcie", "tensor_parallel_size": 2, "dtype": "float16"},
    "stages": {"device": "a100_sxm", "pipeline_parallel_size": 2, "host_overhead": "eager"},
    "measured": {"device": "measured", "predictor": "roofline", "scheduler": "orca", "gpu_memory_utilization": 0.5},
}
RESOLVED = {  # of each: dtype, host overhead, asynchronous, KV blocks, policy, ranks, network
    "cpu": ("float32", "eager_cpu", False, None, "sarathi", 1, "shared_memory"),
    "cpu with blocks": ("float32", "eager_cpu", True, 60, "sarathi", 1, "shared_memory"),
    "gpu": ("float16", "cuda_graphs", False, None, "vllm", 2, "pcie"),
    "stages": ("bfloat16", "eager", False, None, "sarathi", 2, "nvswitch_a100"),
    "measured": ("float16", "measured_h100", False, None, "orca", 1, "nvswitch_h100"),
}
BLOCKS = 50  # that the engine finds out


class SeenError(Exception):
    """A command has come to its seam."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, and a device that was profiled in float16 with its host's overhead."""
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "measured"):
        (tmp_path / name).mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(CONFIG))
    device = {key: value for key, value in asdict(catalog.device("h100")).items() if key != "calibration"}
    (tmp_path / "measured" / "device.json").write_text(json.dumps(device))
    profile = {"identity": {"dtype": "float16", "models": [], "shapes": []}, "provenance": {"device_spec": {}}}
    (tmp_path / "measured" / "profile.json").write_text(json.dumps(profile))
    record = {"held_out": "batch size", "held_out_error": 0.1, "launch": "not measured", "iterations": 9}
    (tmp_path / "measured" / "host.json").write_text(json.dumps({"device": "h100", "overhead": asdict(HOST), **record}))
    return tmp_path


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What each command has resolved, noted where it would begin to run."""
    found: dict[str, Any] = {"specs": []}

    def executor(spec: EngineSpec, name: str | None) -> SimpleNamespace:
        found["specs"].append(spec)
        blocks = spec.num_blocks or BLOCKS
        return SimpleNamespace(num_blocks=blocks, hardware="x", attention_backend="sdpa", close=lambda: None)

    def simulate(workload: object, deployments: list[Deployment], **settings: Any) -> None:
        found["simulate"] = [each.replica for each in deployments]
        raise SeenError

    def simulated_trial(workload: object, deployments: list[Deployment], *settings: Any) -> None:
        found["search"] = [each.replica for each in deployments]
        raise SeenError

    def serve(workload: object, replica: ReplicaSpec, executor: object, folder: Path, **settings: Any) -> None:
        found["served"], found["config"] = replica, None
        if (folder / "config.yaml").exists():
            found["config"] = yaml.safe_load((folder / "config.yaml").read_text())
        raise SeenError

    def validate(self: Validation, *arguments: Any) -> None:
        found["validate"] = self.deployment.replica
        raise SeenError

    monkeypatch.setattr("windtunnel.simulation.simulate", simulate)
    monkeypatch.setattr("windtunnel.capacity.simulated_trial", simulated_trial)
    for name in ("cli.bench", "cli.search_point", "cli.validate", "cli.generate"):
        monkeypatch.setattr(f"{name}.start", executor)
    monkeypatch.setattr("cli.bench.serve", serve)
    monkeypatch.setattr("cli.search_point.serve", serve)
    monkeypatch.setattr("cli.search_point.check_machine", lambda replica, executor: None)
    monkeypatch.setattr(Validation, "run", validate)
    return found


def written(case: str) -> Path:
    path = Path("run.yaml")
    path.write_text(yaml.safe_dump({"model": "tiny", **LOAD, **CASES[case]}))
    return path


def come_to_the_seam(*arguments: str) -> None:
    with pytest.raises(SeenError):
        print(run(list(arguments)))


@pytest.mark.parametrize("case", CASES)
def test_a_config_is_one_replica_for_every_command(case: str, place: Path, seen: dict[str, Any]) -> None:
    config = str(written(case))
    (group,) = load(Path(config), {}, FileConfig).groups()
    replica = group.replica_spec()
    assert RESOLVED[case] == (
        replica.model.dtype, replica.engine.host.name, replica.async_scheduling, replica.num_gpu_blocks_override,
        replica.scheduler.policy, replica.parallel.world_size, replica.network.name,
    )  # fmt: skip
    assert replica.gpu_memory_utilization == CASES[case].get("gpu_memory_utilization", 0.9)
    found = replica.with_blocks(replica.num_gpu_blocks_override or BLOCKS)  # once the engine knows
    come_to_the_seam("simulate", "--config", config, "--output-dir", "a")
    come_to_the_seam("search", "--config", config, "--output-dir", "b")
    assert seen["simulate"] == seen["search"] == [replica]
    come_to_the_seam("bench", "--config", config, "--output-dir", "c")
    assert seen["served"] == found
    come_to_the_seam("validate", "--config", config, "--output-dir", "d")
    assert seen["validate"].with_blocks(found.num_kv_blocks()) == found
    with pytest.raises(SeenError):
        confirm_point({"config": config, "flags": {}, "folder": str(place / "e"), "name": "e", "predicted": 5.0})
    assert seen["served"] == replica
    assert len(seen["specs"]) == 3
    assert set(seen["specs"]) == {EngineSpec.of(replica, folder=None)}


@pytest.mark.parametrize("case", CASES)
def test_the_config_that_a_measured_run_leaves_is_the_replica_that_ran(
    case: str, place: Path, seen: dict[str, Any]
) -> None:
    come_to_the_seam("bench", "--config", str(written(case)), "--output-dir", "measured-run")
    served, left = seen["served"], seen["config"]
    assert {"dtype", "async_scheduling", "host_overhead", "num_gpu_blocks_override", "max_model_len"} <= set(left)
    assert "auto" not in (left["dtype"], left["host_overhead"])
    Path("again.yaml").write_text(yaml.safe_dump(left))
    come_to_the_seam("simulate", "--config", "again.yaml", "--output-dir", "simulated")
    assert seen["simulate"] == [served]
    come_to_the_seam("bench", "--config", "again.yaml", "--output-dir", "again")
    assert (seen["served"], seen["config"]) == (served, left)


@pytest.mark.usefixtures("place")
def test_a_cpus_run_is_simulated_as_it_ran(seen: dict[str, Any]) -> None:
    come_to_the_seam("bench", "--config", str(written("cpu")), "--output-dir", "measured-run")
    Path("again.yaml").write_text(yaml.safe_dump(seen["config"]))
    come_to_the_seam("simulate", "--config", "again.yaml", "--output-dir", "simulated")
    (replica,) = seen["simulate"]
    (spec,) = seen["specs"]
    assert replica.model.dtype == spec.dtype == "float32"
    assert replica.num_kv_blocks() == BLOCKS
    assert replica.async_scheduling is seen["served"].async_scheduling is False
    assert replica.engine.host == seen["served"].engine.host == catalog.host_overhead("eager_cpu")


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("case", CASES)
def test_a_measured_run_simulates_nothing(case: str, seen: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Deployment) -> None:
        raise AssertionError("a deployment was made")

    monkeypatch.setattr(Deployment, "__post_init__", refuse)
    come_to_the_seam("bench", "--config", str(written(case)), "--output-dir", "out")
    with pytest.raises(AssertionError, match="a deployment was made"):  # it would have been noticed
        run(["simulate", "--config", "run.yaml", "--output-dir", "simulated"])


@pytest.mark.usefixtures("place", "seen")
def test_prompts_are_continued_by_the_same_replica() -> None:
    flags = {"model": "tiny", "device": "cpu", "max_num_seqs": 8, "load_format": "dummy"}
    (group,) = load(None, flags, BenchConfig).groups()
    settings = from_flags(GenerateConfig, flags)
    assert settings.replica_spec(engine_device("cpu")) == group.replica_spec()


@pytest.mark.usefixtures("place")
def test_groups_of_replicas_are_written_as_they_were_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "model": "tiny",
        "device": "cpu",
        **LOAD,
        "num_gpu_blocks_override": 60,
        "replicas": [{"count": 2}, {"device": "h100"}],
    }
    del settings["load_format"]
    Path("run.yaml").write_text(yaml.safe_dump(settings))
    assert run(["simulate", "--config", "run.yaml", "--output-dir", "out"]) == (0, "")
    left = yaml.safe_load(Path("out/config.yaml").read_text())
    assert [(group["dtype"], group["host_overhead"]) for group in left["replicas"]] == [
        ("float32", "eager_cpu"), ("bfloat16", "cuda_graphs"),
    ]  # fmt: skip
    before, after = (load(Path(name), {}, FileConfig).groups() for name in ("run.yaml", "out/config.yaml"))
    assert [group.replica_spec() for group in before] == [group.replica_spec() for group in after]
