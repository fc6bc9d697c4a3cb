"""A replica is resolved once: what is left open, where a default comes from, and a dtype for each kind of tensor."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from engine.engine_preset import preset
from engine.errors import InputError
from engine.replica_spec import SETTINGS, ReplicaSpec, resolve
from engine.runtime.engine_spec import EngineSpec
from engine.scheduling.policies import largest_batch
from engine.specs import HostOverhead, ParallelSpec, SchedulerSpec, catalog
from engine.specs.memory import activation_bytes, kv_bytes_per_block, num_kv_blocks, weight_bytes
from profiler.operators import Operator, inventory
from simulator.cluster import Deployment, deploy
from simulator.predictor.roofline import Roofline

MODEL = "microsoft/phi-2"
HOST = HostOverhead(name="measured_h100", iteration_s=1e-3, sequence_s=1e-6, layer_s=0.0, source="a test")


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """The folder of a device that was profiled in float16, with its host's overhead."""
    device = {key: value for key, value in asdict(catalog.device("h100")).items() if key != "calibration"}
    (tmp_path / "device.json").write_text(json.dumps(device))
    profile = {"identity": {"dtype": "float16", "models": [], "shapes": []}, "provenance": {"device_spec": {}}}
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    record = {"held_out": "batch size", "held_out_error": 0.1, "launch": "not measured", "iterations": 9}
    (tmp_path / "host.json").write_text(json.dumps({"device": "h100", "overhead": asdict(HOST), **record}))
    return tmp_path


def test_what_is_left_open_is_filled_in() -> None:
    replica = resolve(MODEL, "a100")
    assert (replica.model.dtype, replica.engine.name, replica.engine.host.name) == (
        "bfloat16", "windtunnel", "cuda_graphs",
    )  # fmt: skip
    assert replica.network.name == replica.device.network
    assert replica.async_scheduling is False and replica.num_gpu_blocks_override is None
    assert (replica.scheduler.max_num_batched_tokens, replica.scheduler.max_model_len) == (512, 2048)
    assert "estimate" in replica.engine.host.source
    on_cpu = resolve(MODEL, "cpu")
    assert (on_cpu.model.dtype, on_cpu.engine.host.name) == ("float32", "eager_cpu")
    assert on_cpu.engine.host.source.startswith("an estimate")


def test_a_measured_device_says_its_dtype_and_its_host(measured: Path) -> None:
    replica = resolve(MODEL, str(measured))
    assert (replica.model.dtype, replica.engine.host, replica.engine.host_overhead) == ("float16", HOST, "measured")
    assert resolve(MODEL, str(measured), host_overhead="measured") == replica
    assert resolve(MODEL, str(measured), dtype="bfloat16").model.dtype == "bfloat16"
    assert resolve(MODEL, str(measured), host_overhead="eager").engine.host.name == "eager"
    assert deploy(MODEL, str(measured), predictor="roofline").host == HOST  # the replica's, whoever predicts
    given = replace(catalog.model(MODEL), kv_cache_dtype="fp8_e4m3")
    assert resolve(given, str(measured)).model == given  # a spec is taken as it is


def test_a_host_that_nobody_measured_is_not_to_be_had() -> None:
    with pytest.raises(InputError, match=r"host_overhead 'measured': no calibration of l4"):
        resolve(MODEL, "l4", host_overhead="measured")
    with pytest.raises(InputError, match="unknown host overhead 'eagre'"):
        resolve(MODEL, "l4", host_overhead="eagre")


def test_a_broken_host_is_said(measured: Path) -> None:
    (measured / "host.json").write_text("{}")
    with pytest.raises(InputError, match=r"host\.json is no host overhead"):
        preset("windtunnel", catalog.device(str(measured)))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"host_overhead": "sarathi_osdi24", "async_scheduling": True, "dtype": "float16"},
        {"scheduler": SchedulerSpec(policy="orca", max_model_len=1024), "num_gpu_blocks_override": 99},
        {"engine": "vllm@0.15", "scheduler": {"max_num_seqs": 7}},
    ],
)
@pytest.mark.parametrize("device", ["a40", "cpu", "measured"])
def test_the_resolved_settings_give_the_same_replica(settings: dict, device: str, measured: Path) -> None:  # type: ignore[type-arg]
    device = str(measured) if device == "measured" else device
    replica = resolve(MODEL, device, **settings)
    found = replica.settings()
    again = {"policy": found.pop("scheduler"), **{name: found.pop(name) for name in SETTINGS}}
    assert resolve(MODEL, device, scheduler=again, **found) == replica
    assert deploy(MODEL, device, scheduler=again, predictor="roofline", **found) is not None
    assert Deployment.of(replica, "roofline").replica == replica


def test_the_blocks_are_the_override_or_what_the_memory_holds() -> None:
    replica = resolve(MODEL, "a100")
    held = num_kv_blocks(
        replica.model, replica.device, replica.parallel, replica.scheduler, 0.9, largest_batch(replica.scheduler)
    )
    assert replica.num_kv_blocks() == held == replica.new_scheduler().kv_cache.num_blocks
    assert replica.describe("a test")["num_gpu_blocks"] == held
    measured = replica.with_blocks(77)
    assert measured.num_kv_blocks() == measured.new_scheduler().kv_cache.num_blocks == 77
    assert replica.new_scheduler(5).kv_cache.num_blocks == 5
    big = resolve("Llama-2-70b-hf", "a40")  # an engine may still measure its memory; a simulation can't
    with pytest.raises(InputError, match="GiB of weights"):
        Deployment.of(big)
    assert Deployment.of(big.with_blocks(10)).num_kv_blocks == 10


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dtype": "int4"}, "unknown dtype 'int4'"),
        ({"dtype": "fp8_e4m3"}, "unknown dtype 'fp8_e4m3'"),
        ({"num_gpu_blocks_override": 0}, "num_gpu_blocks_override 0"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization=1.5"),
        ({"parallel": ParallelSpec(tensor_parallel_size=3)}, "tensor_parallel_size=3"),
        (
            {"async_scheduling": True, "parallel": ParallelSpec(pipeline_parallel_size=2)},
            "async_scheduling true is for one pipeline stage",
        ),
    ],
)
def test_what_can_not_be_is_said(settings: dict, said: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(InputError, match=said):
        resolve(MODEL, "a100", **settings)


# -- dtypes ------------------------------------------------------------------------------------------------------------

PHI = catalog.model(MODEL)
ONE = ParallelSpec()


def test_memory_takes_each_tensor_in_its_own_dtype() -> None:
    weights, cache, activations = (
        replace(PHI, **{name: "fp8_e4m3"}) for name in ("weight_dtype", "kv_cache_dtype", "activation_dtype")
    )
    for part, changed in (
        (lambda model: weight_bytes(model, ONE, 0), weights),
        (lambda model: kv_bytes_per_block(model, ONE, 0, 16), cache),
        (lambda model: model.kv_bytes_per_token, cache),
        (lambda model: activation_bytes(model, ONE, 1001, 1) - activation_bytes(model, ONE, 1, 1), activations),
    ):
        for each in (weights, cache, activations):
            assert part(each) * (2 if each is changed else 1) == part(PHI)
    assert PHI.in_dtype("float32").kv_bytes_per_token == 2 * PHI.kv_bytes_per_token
    assert replace(PHI, kv_cache_dtype="fp8_e5m2").dtype is None


def test_operators_move_each_tensor_in_its_own_dtype() -> None:
    model = catalog.model("Meta-Llama-3-8B")
    parallel = ParallelSpec(tensor_parallel_size=2, pipeline_parallel_size=2)

    def by_name(**dtypes: str) -> dict[str, Operator]:
        every = {op.name: op for op in inventory(replace(model, **dtypes), parallel, 0)}  # type: ignore[arg-type]
        return every | {part.name: part for op in every.values() for part in op.parts}

    plain = by_name()
    cache, activations = by_name(kv_cache_dtype="fp8_e4m3"), by_name(activation_dtype="float32")
    kv, q = 4 * 128, 16 * 128  # of a rank
    assert plain["kv_write"].bytes_per_row == 8 * kv
    assert cache["kv_write"].bytes_per_row == 2 * kv * 2 + 2 * kv * 1
    assert cache["rotary_kv_write"].bytes_per_row == (2 * q + 2 * kv) * 2 + 2 * kv
    assert activations["kv_write"].bytes_per_row == 2 * kv * 4 + 2 * kv * 2
    for name in ("send", "mlp_all_reduce", "mlp_activation"):
        assert cache[name] == plain[name]
        assert activations[name].bytes_per_row == 2 * plain[name].bytes_per_row
    assert by_name(weight_dtype="fp8_e4m3") == plain


def test_the_roofline_reads_each_tensor_in_its_own_dtype() -> None:
    replica = resolve(PHI, "h100")

    def times(**dtypes: str) -> tuple[float, float]:
        """Seconds of a decode that reads a long cache, and of the weights for one row."""
        model = replace(PHI, **dtypes)  # type: ignore[arg-type]
        (stage,) = Roofline(model, replica.device, replica.network, ONE, replica.engine.host).stages
        return stage.decode_per_kv_token, stage.rows_time("tokens", 1) - launches

    launches = 0.0
    model = replace(PHI, hidden_size=64, head_dim=2, intermediate_size=64, vocab_size=64)
    (stage,) = Roofline(model, replica.device, replica.network, ONE, replica.engine.host).stages
    launches = stage.rows_time("tokens", 1)  # of as many operators with next to no work
    kv, weights = times()
    assert times(kv_cache_dtype="fp8_e4m3")[0] == kv / 2
    assert times(weight_dtype="fp8_e4m3")[0] == kv
    assert times(weight_dtype="fp8_e4m3")[1] < 0.52 * weights
    assert times(activation_dtype="fp8_e4m3")[1] > 0.98 * weights


def test_the_engine_refuses_dtypes_that_differ() -> None:
    mixed = resolve(replace(PHI, kv_cache_dtype="fp8_e4m3"), "h100")
    with pytest.raises(InputError, match="KV cache in fp8_e4m3: the engine keeps all three in one of bfloat16"):
        EngineSpec.of(mixed, folder=None)
    whole = EngineSpec.of(resolve(PHI, "h100", num_gpu_blocks_override=9), folder=None, seed=3)
    assert (whole.dtype, whole.device, whole.num_blocks, whole.seed) == ("bfloat16", "cuda", 9, 3)
    assert (whole.max_batch_tokens, whole.max_model_len, whole.max_num_seqs) == (512, 2048, 128)


def test_a_replica_has_no_setting_that_is_left_open() -> None:
    with pytest.raises(TypeError, match="missing"):
        ReplicaSpec(model=PHI, device=catalog.device("a100"))  # type: ignore[call-arg]
