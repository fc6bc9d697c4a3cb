"""Engine presets: vLLM's own rules by device, what overrides them, graph padding and a host that is hidden."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cli.main import run
from engine.engine_preset import names, preset, vllm_graph_sizes
from engine.errors import InputError
from engine.replica_spec import resolve
from engine.scheduling.request import BatchShape
from engine.specs import HostOverhead, ParallelSpec, SchedulerSpec, catalog
from engine.specs.memory import kv_bytes_per_block
from simulator.cluster import Deployment

GIB = 1 << 30
MODEL = "meta-llama/Meta-Llama-3-8B"
VLLM = [name for name in names() if name.startswith("vllm@") and name != "vllm@0.4"]  # of the V1 engine


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("device", ["a100", "h100", "l4"])
def test_every_preset_resolves_and_says_where_it_is_from(name: str, device: str) -> None:
    replica = resolve(MODEL, device, engine=name)
    assert replica.engine.name == name and replica.engine.overrides == ()
    assert len(replica.engine.source) > 10 and len(replica.engine.host.source) > 10
    assert replica.describe("a test")["engine"] == name


@pytest.mark.parametrize(
    ("engine", "device", "usage", "tokens", "sequences"),
    [  # engine/arg_utils.py of vLLM: by memory, with A100s of any size in the last row
        ("vllm@0.15", "h100", "server", 8192, 1024),
        ("vllm@0.15", "h200", "offline", 16384, 1024),
        ("vllm@0.15", "a100", "server", 2048, 256),
        ("vllm@0.12", "a100_sxm", "offline", 8192, 256),
        ("vllm@0.33", "a40", "server", 2048, 256),
    ],
)
def test_limits_are_vllms_by_device(engine: str, device: str, usage: str, tokens: int, sequences: int) -> None:
    scheduler = resolve(MODEL, device, engine=engine, usage=usage).scheduler
    assert (scheduler.max_num_batched_tokens, scheduler.max_num_seqs) == (tokens, sequences)


def test_a_large_device_has_more_in_new_versions_alone() -> None:
    large = replace(catalog.device("h200"), name="b200", memory_bytes=180 * GIB)
    assert preset("vllm@0.33", large).scheduler["max_num_batched_tokens"] == 16384
    assert preset("vllm@0.15", large).scheduler["max_num_batched_tokens"] == 8192


def test_graphs_of_limits_and_of_large_devices_are_those_of_the_version() -> None:
    odd = {"max_num_seqs": 100, "max_num_batched_tokens": 150}
    sizes = {
        v: resolve(MODEL, "h100", engine=f"vllm@{v}", scheduler=odd).engine.host.graph_sizes for v in ("0.15", "0.33")
    }
    assert sizes["0.15"] == (1, 2, 4, *range(8, 151, 8)) and set(sizes["0.33"]) - set(sizes["0.15"]) == {100, 150}
    full = {v: resolve(MODEL, "h100", engine=f"vllm@{v}", scheduler=odd).engine.host.graph_decodes for v in sizes}
    assert full == {"0.15": 96, "0.33": 100}  # the largest that a batch of decodes alone is padded to
    blackwell = replace(catalog.device("h200"), name="b200", memory_bytes=179 * GIB)
    largest = [resolve(MODEL, blackwell, engine=f"vllm@{v}").engine.host.graph_sizes[-1] for v in sizes]
    assert largest == [512, 1024]
    small = replace(catalog.device("h200"), name="gb10", memory_bytes=119 * GIB)
    assert preset("vllm@0.33", small).scheduler["max_num_seqs"] == 256
    assert preset("vllm@0.15", small).scheduler["max_num_seqs"] == 1024


def test_the_newest_version_keeps_memory_for_its_graphs() -> None:
    new = resolve(MODEL, "h100", engine="vllm@0.33")
    plain = replace(new, engine=replace(new.engine, reserve_bytes=0))
    lost = plain.num_kv_blocks() - new.num_kv_blocks()
    assert (
        new.engine.reserve_bytes == int(0.44 * GIB)
        and resolve(MODEL, "h100", engine="vllm@0.15").engine.reserve_bytes == 0
    )
    block = kv_bytes_per_block(new.model, new.parallel, 0, 16)
    assert lost == pytest.approx(new.engine.reserve_bytes / block, abs=1)


def test_engines_shows_what_a_preset_is_for_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["engines", "vllm@latest", "--usage", "offline", "--model", MODEL, "--tensor-parallel-size", "2"]) == (
        0,
        "",
    )
    shown = " ".join(capsys.readouterr().out.split())
    replica = resolve(MODEL, "h100", engine="vllm", usage="offline", parallel=ParallelSpec(tensor_parallel_size=2))
    for words in ("vllm@0.33: vLLM 0.33", "max_num_batched_tokens 16384", f"num_gpu_blocks {replica.num_kv_blocks()},",
                  "full for decodes, piecewise for other batches; batches of 51 sizes up to 512 tokens",
                  "0.44 GiB of each GPU kept"):  # fmt: skip
        assert words in shown
    assert "vllm@0.15" not in shown
    (tmp_path / "own.yaml").write_text("base: vllm@0.15\ngraphs: {mode: piecewise, largest: 64}\nreserve_gib: 1\n")
    assert run(["engines", str(tmp_path / "own.yaml")]) == (0, "")
    shown = " ".join(capsys.readouterr().out.split())
    assert "piecewise; batches of sizes up to 64 tokens are padded to the next; 1.00 GiB of each GPU" in shown
    assert run(["engines", "vllm@0.15", "--usage", "both"])[1].startswith("unknown usage 'both'")


def test_versions_differ_in_what_vllm_changed() -> None:
    old, new = (resolve(MODEL, "h100", engine=f"vllm@{version}") for version in ("0.12", "0.33"))
    assert (old.async_scheduling, new.async_scheduling) == (False, True)
    assert (old.gpu_memory_utilization, new.gpu_memory_utilization) == (0.9, 0.92)
    assert (old.scheduler.scheduler_reserve_full_isl, new.scheduler.scheduler_reserve_full_isl) == (False, True)
    assert all(replica.scheduler.enable_prefix_caching for replica in (old, new))
    assert resolve(MODEL, "h100", engine="vllm@0.12.0") == old
    assert resolve(MODEL, "h100", engine="vllm@latest") == new == resolve(MODEL, "h100", engine="vllm")
    assert new.new_scheduler(101).kv_cache.num_blocks == 100  # block 0 of vLLM's is never handed out


def test_settings_of_ones_own_take_the_place_of_the_presets() -> None:
    scheduler = {"max_num_seqs": 64, "enable_prefix_caching": False}
    replica = resolve(MODEL, "h100", engine="vllm@0.15", scheduler=scheduler, async_scheduling=False)
    assert (replica.scheduler.max_num_seqs, replica.scheduler.max_num_batched_tokens) == (64, 8192)
    assert set(replica.engine.overrides) == {"max_num_seqs", "enable_prefix_caching", "async_scheduling"}
    again = resolve(MODEL, "h100", engine="vllm@0.15", scheduler={"max_num_seqs": 1024})
    assert again.engine.overrides == ()  # what it would be anyway


def test_a_file_of_ones_own_goes_on_from_a_base(tmp_path: Path) -> None:
    path = tmp_path / "my-server.yaml"
    path.write_text("base: vllm@0.15\nscheduler: {max_num_seqs: 77}\nhost: {iteration_s: 0.002, source: my bench}\n")
    replica = resolve(MODEL, "h100", engine=str(path))
    assert (replica.engine.name, replica.scheduler.policy, replica.scheduler.max_num_seqs) == ("my-server", "vllm", 77)
    assert replica.engine.host.iteration_s == 0.002 and replica.engine.host.hidden


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hots: {}", "unknown key in .*'hots': did you mean 'host'"),
        ("scheduler: {max_seqs: 3}", "scheduler 'max_seqs': did you mean 'max_num_seqs'"),
        ("graphs: {mode: half}", "unknown graphs mode .*'half'"),
        ("graphs: {most: 5}", "unknown key in .*graphs 'most'"),
        ("graphs: {largest: true}", "graphs largest True: give a number of tokens"),
        ("reserve_gib: -1", "reserve_gib -1: give a number of GiB"),
        ("- 5", "holds no mapping"),
        ("a: [", "is not YAML"),
        ("base: vllm@0.15\nlimits: 5", "limits 5: give a list of tiers"),
        ("base: vllm@0.15\nlimits: [{sever: [8192, 4]}]", r"give each tier server: \[TOKENS, SEQUENCES\]"),
        (
            "base: vllm@0.15\nlimits: [{least_memory_gib: 999, server: [9, 4], offline: [9, 4]}]",
            "no limits of the engine",
        ),
        ("base: vllm@0.15\nscheduler: {vllm_version: 0.77}", r"unknown vLLM version '0\.77'"),
        ("base: vllm@0.15\nscheduler: {enable_prefix_caching: on please}", "give true or false"),
        ("base: vllm@0.15\nasync_scheduling: 3", "async_scheduling 3: give true or false"),
        ("base: vllm@0.15\ngpu_memory_utilization: lots", "'lots': give a share"),
        ("base: vllm@0.15\ngraph_sizes: nope", "unknown graph_sizes"),
        ("base: vllm@0.15\nhost: [1]", "give a name of --host-overhead or a mapping"),
        ("base: mine.yaml", "give an engine that ships"),
        ("source: me\nhost: {iteration_s: 0.1, source: me}", "lacks sequence_s"),
        ("base: vlm@0.15", "unknown engine 'vlm@0.15': did you mean 'vllm@0.15'"),
    ],
)
def test_a_broken_file_is_one_clear_error(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        resolve(MODEL, "h100", engine=str(path))


def test_a_version_may_be_a_number(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: vllm@0.33\nscheduler: {vllm_version: 0.15}\n")
    assert resolve(MODEL, "h100", engine=str(path)).scheduler.vllm_version == "0.15"


def test_limits_fit_what_was_asked_for() -> None:
    """vLLM: no more tokens than the sequences can have, no more sequences than tokens; what is asked for stays."""
    few = resolve(MODEL, "h100", engine="vllm@0.15", scheduler={"max_num_seqs": 2, "max_model_len": 1024})
    assert (few.scheduler.max_num_batched_tokens, few.scheduler.max_num_seqs) == (2048, 2)
    short = resolve(MODEL, "h100", engine="vllm@0.15", scheduler={"max_num_batched_tokens": 512})
    assert (short.scheduler.max_num_batched_tokens, short.scheduler.max_num_seqs) == (512, 512)


def test_pipeline_stages_are_scheduled_in_turn() -> None:
    parallel = ParallelSpec(pipeline_parallel_size=2)
    assert not resolve(MODEL, "h100", engine="vllm@0.15", parallel=parallel).async_scheduling


def test_unknown_names_are_said() -> None:
    with pytest.raises(InputError, match=r"no preset of vllm 0\.16: the one before it is vllm@0\.15"):
        resolve(MODEL, "h100", engine="vllm@0.16")
    with pytest.raises(InputError, match="unknown usage 'batch'"):
        resolve(MODEL, "h100", engine="vllm@0.15", usage="batch")


def decodes(count: int) -> BatchShape:
    return BatchShape(count, count, 500 * count, (), count, count)


@pytest.mark.parametrize("predictor", ["roofline", "learned"])
def test_a_batch_is_padded_to_the_next_graph(predictor: str) -> None:
    """33 decodes cost what 40 do but for attention and sampling, which are of 33; 513 have no graph."""
    scheduler = SchedulerSpec(max_num_batched_tokens=2048, max_num_seqs=256)
    assert vllm_graph_sizes(scheduler)[:6] == (1, 2, 4, 8, 16, 24) and vllm_graph_sizes(scheduler)[-1] == 512
    padded = resolve(MODEL, "a100", engine="vllm@0.15")
    plain = replace(padded, engine=replace(padded.engine, host=replace(padded.engine.host, graph_sizes=())))
    with_graphs, without = (Deployment.of(replica, predictor).predictor for replica in (padded, plain))

    def tokens_alone(predictor_: object, tokens: int) -> float:  # a chunk of that many tokens, nothing sampled
        return predictor_.stage_time(BatchShape(tokens, 0, 0, ((tokens, 0),), 0, 0), 0)  # type: ignore[attr-defined, no-any-return]

    assert with_graphs.stage_time(decodes(40), 0) == without.stage_time(decodes(40), 0)
    assert without.stage_time(decodes(33), 0) <= with_graphs.stage_time(decodes(33), 0)
    assert with_graphs.stage_time(decodes(33), 0) <= with_graphs.stage_time(decodes(40), 0)
    extra = without.stage_time(decodes(40), 0) - with_graphs.stage_time(decodes(33), 0)
    whole = without.stage_time(decodes(40), 0) - without.stage_time(decodes(33), 0)
    assert extra <= whole
    for tokens in (513, 700):
        assert tokens_alone(with_graphs, tokens) == tokens_alone(without, tokens)


@pytest.mark.parametrize("predictor", ["roofline", "learned"])
def test_a_hidden_host_is_a_floor_and_an_open_one_is_added(predictor: str) -> None:
    base = resolve(MODEL, "a100", engine="vllm@0.15")

    def time(**changes: object) -> float:
        host = HostOverhead(name="x", source="a test", layer_s=0.0, **changes)  # type: ignore[arg-type]
        replica = replace(base, engine=replace(base.engine, host=host))
        return Deployment.of(replica, predictor).predictor.stage_time(decodes(8), 0)

    gpu = time(iteration_s=0.0, sequence_s=0.0)
    assert time(iteration_s=1e-3, sequence_s=1e-5) == pytest.approx(gpu + 1.08e-3)
    assert time(iteration_s=1e-3, sequence_s=1e-5, hidden=True) == pytest.approx(gpu)
    assert time(iteration_s=1e-3, sequence_s=1e-5, hidden=True, exposed_s=2e-4) == pytest.approx(gpu + 2e-4)
    for graph_decodes in (0, 8):  # a graph spares the launches of layers, not the host's other work
        host_bound = time(iteration_s=1.0, sequence_s=1e-3, hidden=True, graph_decodes=graph_decodes)
        assert host_bound == pytest.approx(1.008)


def test_piecewise_graphs_are_launched_layer_by_layer_and_full_ones_of_decodes_at_once(tmp_path: Path) -> None:
    """It shows where the GPU's work is shorter: in a small model."""
    file = tmp_path / "piecewise.yaml"
    file.write_text("base: vllm@0.15\ngraphs: {mode: piecewise, largest: 512, with_limits: true}\n")

    def time(model: str, engine: str, shape: BatchShape) -> float:
        return Deployment.of(resolve(model, "h100", engine=engine)).predictor.stage_time(shape, 0)

    small, prompt = "Qwen/Qwen2.5-1.5B", BatchShape(24, 8, 4000, ((16, 0),), 9, 8)  # a short prompt beside decodes
    assert time(small, "vllm@0.15", decodes(8)) < time(small, str(file), decodes(8)) == pytest.approx(28 * 0.12e-3)
    assert time(small, str(file), prompt) == time(small, "vllm@0.15", prompt)
    assert time(MODEL, "vllm@0.15", decodes(8)) == time(MODEL, str(file), decodes(8))


def test_the_shipped_files_hold_nothing_else() -> None:
    for name in names():
        data = json.loads(
            (Path(__file__).parents[1] / "calibration_data" / "engines" / f"{name}.json").read_text("utf-8")
        )
        assert data["source"] and data["description"]
        if isinstance(data.get("host"), dict):
            assert "estimate" in data["host"]["source"] or "fitted" in data["host"]["source"]
    assert len(VLLM) == 3
