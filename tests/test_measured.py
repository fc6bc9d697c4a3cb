"""Measured results of other servers beside their predictions: what a simulation "measured" is predicted exactly."""

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

import windtunnel
from cli.main import run
from engine.errors import InputError
from studies.measured.readers import _device, read
from studies.measured.sources import sources
from windtunnel.measured import job_of, predict_points, validate_measured

DEVICE = {"model": "mistralai/Mistral-7B-v0.1", "device": "a100_sxm"}
TRUTH = Path(__file__).parents[2] / "shared" / "data" / "truth"


def silicon_row(users: int, ttft_ms: float = 100.0, tpot_ms: float = 10.0, **other: Any) -> dict[str, Any]:
    return {
        "id": f"c{users}", "model_path": DEVICE["model"], "system": "a100_sxm", "backend": "vllm",
        "backend_version": "0.12.0", "precision": "bf16", "isl": 256, "osl": 32, "concurrency": float(users),
        "tp_size": 1.0, "silicon_ttft_ms": ttft_ms, "silicon_tpot_ms": tpot_ms, **other,
    }  # fmt: skip


def silicon(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "silicon.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def simulated(users: int, **settings: Any) -> dict[str, Any]:
    """What our simulator says of such a row, asked for by hand."""
    return windtunnel.simulate(
        **DEVICE, engine="vllm@0.12", workload="fixed", input_len=256, output_len=32, max_concurrency=users,
        num_prompts=10 * users, request_rate=float("inf"), max_num_batched_tokens=256 + users, **settings,
    ).summary  # fmt: skip


def test_a_row_is_the_closed_loop_that_it_describes(tmp_path: Path) -> None:
    ours = simulated(4)
    path = silicon(tmp_path, silicon_row(4, ours["mean_ttft_ms"] / 1.1, ours["mean_tpot_ms"] / 0.8))
    found = validate_measured(path, {})
    assert found["points"] == found["predicted"] == 1
    assert found["ttft"] == pytest.approx({"mape": 0.1, "bias": 0.1})
    assert found["tpot"] == pytest.approx({"mape": 0.2, "bias": -0.2})
    assert found["throughput"] is None
    assert any("token budget" in text for text in found["assumed"])


def test_settings_that_are_given_win_over_the_file_and_its_source(tmp_path: Path) -> None:
    ours = simulated(4, max_num_seqs=2)
    path = silicon(tmp_path, silicon_row(4, ours["mean_ttft_ms"], ours["mean_tpot_ms"]))
    assert validate_measured(path, {"max_num_seqs": "2"})["ttft"]["mape"] == pytest.approx(0)
    assert validate_measured(path, {})["ttft"]["mape"] > 0.3


def test_rows_that_cannot_be_run_are_named_and_the_others_are(tmp_path: Path) -> None:
    rows = (silicon_row(2), silicon_row(3, backend="trtllm"), silicon_row(4, model_path="nobody/knows"),
            silicon_row(5, tp_size=64), silicon_row(6, silicon_ttft_ms=-1.0))  # fmt: skip
    found = validate_measured(silicon(tmp_path, *rows), {})
    assert (found["points"], found["predicted"]) == (5, 1)
    reasons = {row["id"]: row["why"] for row in found["refused"]}
    assert set(reasons) == {"c3", "c4", "c5", "c6"}
    assert "trtllm" in reasons["c3"] and "nobody/knows" in reasons["c4"] and "-1" in reasons["c6"]


def test_points_that_wait_for_kv_blocks_are_a_group_of_their_own(tmp_path: Path) -> None:
    path = silicon(tmp_path, silicon_row(2), silicon_row(32))
    found = validate_measured(path, {"num_gpu_blocks_override": 80})
    assert [(record["id"], record["kv_limited"]) for record in found["records"]] == [("c2", False), ("c32", True)]
    counts = {group["group"]: group["count"] for group in found["groups"]}
    assert counts == {"not KV-limited": 1, "KV-limited": 1, "Mistral-7B-v0.1 a100_sxm bfloat16 TP1-PP1": 1}


def requests_file(folder: Path, rows: int = 60, **changed: Any) -> Path:
    """An open loop as our simulator serves it, each of 20 prompts three times."""
    trace = pd.DataFrame({
        "at": [0.05 * i for i in range(rows)], "in": [200 + i % 20 for i in range(rows)],
        "out": [8 + i % 3 for i in range(rows)], "which": [i % 20 for i in range(rows)],
    })  # fmt: skip
    trace.to_csv(folder / "trace.csv", index=False)
    made = windtunnel.simulate(
        **DEVICE, engine="vllm@0.15", trace=folder / "trace.csv",
        columns="prompt=in,output=out,time=at,prompt_id=which",
    ).requests.sort_values("request_id")  # fmt: skip
    frame = pd.DataFrame({
        "arrived_at_s": trace["at"], "input_tokens": trace["in"], "output_tokens": trace["out"],
        "prompt_id": trace["which"], "ttft_s": made["first_token_s"].to_numpy() - made["arrived_s"].to_numpy(),
        "e2e_s": made["last_token_s"].to_numpy() - made["arrived_s"].to_numpy(),
    })  # fmt: skip
    for column, (row, value) in changed.items():
        frame.loc[row, column] = value
    frame.to_csv(folder / "requests.csv", index=False)
    return folder / "requests.csv"


def test_a_file_with_a_line_a_request_is_replayed_with_its_shared_prompts(tmp_path: Path) -> None:
    path = requests_file(tmp_path)
    found = validate_measured(path, {**DEVICE}, warmup_requests=20)
    for measure in ("ttft", "tpot", "e2e"):
        assert found[measure]["mape"] == pytest.approx(0, abs=1e-6)
    assert found["per_request"] == pytest.approx({"ttft": 0, "e2e": 0}, abs=1e-6)
    assert found["cold"] == pytest.approx({"ttft": 0, "e2e": 0}, abs=1e-6)
    cold = validate_measured(path, {**DEVICE, "enable_prefix_caching": False}, warmup_requests=20)
    assert cold["ttft"]["bias"] > 0.05


def test_prompts_of_one_id_and_other_lengths_share_nothing_and_this_is_said(tmp_path: Path) -> None:
    path = requests_file(tmp_path, input_tokens=(25, 300))
    found = validate_measured(path, {**DEVICE}, warmup_requests=20)
    assert any("1 of 60 requests have prompt ids that contradict lengths" in text for text in found["assumed"])


def test_a_result_of_vllms_benchmark_is_read(tmp_path: Path) -> None:
    ours = simulated(4)
    keys = ("mean_ttft_ms", "mean_tpot_ms", "mean_e2el_ms", "output_throughput", "completed", "total_input_tokens",
            "total_output_tokens")  # fmt: skip
    result = {key: ours[key] for key in keys} | {"max_concurrency": 4, "request_rate": "inf"}
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    given = {**DEVICE, "engine": "vllm@0.12", "max_num_batched_tokens": 260}
    found = validate_measured(path, given)
    for measure in ("ttft", "tpot", "e2e", "throughput"):
        assert found[measure]["mape"] == pytest.approx(0, abs=1e-9)


def test_a_folder_of_results_is_read_whole(tmp_path: Path) -> None:
    silicon(tmp_path, silicon_row(2))
    (tmp_path / "b.csv").write_text((tmp_path / "silicon.csv").read_text().replace("c2,", "d2,"))
    assert [point.id for file in read(tmp_path, {}) for point in file.points] == ["d2", "c2"]


def test_the_command_prints_one_line_of_json_and_leaves_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = silicon(tmp_path, silicon_row(2))
    assert run(["validate", "--against", str(path), "--json", "--output-dir", str(tmp_path / "out")]) == (0, "")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found) == {"points", "predicted", "tpot", "ttft", "e2e", "throughput", "groups"}
    kept = json.loads((tmp_path / "out" / "validation.json").read_text())
    assert kept["records"][0]["predicted"]["ttft"] > 0
    assert "c2" in (tmp_path / "out" / "validation.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.csv"], "nowhere.csv does not exist"),
        (["silicon.csv", "--request-rate", "3"], "--request-rate 3 has no meaning with --against"),
        (["silicon.csv", "--client", "nobody"], "unknown client 'nobody'"),
        (["silicon.csv", "--source", "nobody"], "unknown source 'nobody'"),
        (["other.csv"], "which no known format has"),
        (["empty.csv"], "empty.csv"),
        (["requests.csv"], "does not say which model was measured: give --model"),
        (["result.json"], "is no result of vLLM's benchmark"),
        (["silicon.csv", "--load", "0.5"], "--load 0.5 has no meaning with --against"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    silicon(tmp_path, silicon_row(2))
    Path("other.csv").write_text("a,b\n1,2\n")
    Path("empty.csv").write_text("")
    Path("requests.csv").write_text("arrived_at_s,input_tokens,output_tokens,ttft_s,e2e_s\n0,1,1,1,1\n")
    Path("result.json").write_text("[1]")
    code, error = run(["validate", "--against", *arguments])
    assert code == 2 and words in error and "\n" not in error


def test_an_offline_batch_takes_as_long_as_its_last_request(tmp_path: Path) -> None:
    """Half of the prompts wait for blocks: their mean is no measure of the call that returns with the last one."""
    path = tmp_path / "offline.csv"
    head = "Hardware,Num of Hardware,Framework,Model,Input Output Length,Batch Size,Latency,Throughput"
    path.write_text(f"{head}\nNvidia A100 GPU,1,vLLM,meta-llama/Llama-2-7b-hf,64,8,10,0\n")
    (file,) = read(path, {"num_gpu_blocks_override": 36})  # of 16 tokens: four requests of 128
    (point,) = file.points
    assert point.settings["device"] == "a100_sxm_40gb"
    (found,) = predict_points([job_of(point)])
    assert found is not None and found["kv_limited"]
    times = found["predicted"]
    assert times["e2e"] == pytest.approx(8 * 64 / times["throughput"], rel=1e-3)


def test_columns_may_be_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("t,i,o,first,all\n0,100,5,0.05,0.2\n1,100,5,0.05,0.2\n")
    with pytest.raises(InputError, match="no known format"):
        read(path, DEVICE)
    (file,) = read(path, DEVICE, columns="time=t,prompt=i,output=o,ttft=first,e2e=all")
    assert file.points[0].measured == pytest.approx({"ttft": 0.05, "e2e": 0.2, "tpot": 0.0375})


def test_sources_say_what_they_assume() -> None:
    assert all(each.assumed and each.engine for each in sources().values())


@pytest.mark.skipif(not TRUTH.is_dir(), reason="the public measurements are not here")
def test_the_public_files_are_recognised() -> None:
    given = {"model": "codellama/CodeLlama-34b-Instruct-hf", "device": "h100"}
    files = {file.name: file for file in read(TRUTH, given)}
    counts = {file.format: len(file.points) for file in files.values()}
    assert counts["silicon"] == 120 and counts["offline"] == 120 and counts["aggregates"] == 4
    assert files["aiconfigurator_silicon.csv"].sources == ["aiconfigurator", "inferencemax"]


def test_constants_of_a_server_are_found_again_and_predict_other_loads(tmp_path: Path) -> None:
    hidden = {"iteration_s": 2e-3, "sequence_s": 6e-5, "transit_s": 0.012}
    preset = tmp_path / "true.yaml"
    preset.write_text(yaml.safe_dump({"base": "vllm@0.12", "host": {**hidden, "layer_s": 0.0, "source": "a test"}}))
    rows = []
    for users in (1, 2, 4, 8, 32):
        ours = windtunnel.simulate(
            **DEVICE, engine=preset, workload="fixed", input_len=256, output_len=32, max_concurrency=users,
            num_prompts=10 * users, request_rate=float("inf"), max_num_batched_tokens=256 + users,
        ).summary  # fmt: skip
        rows.append(silicon_row(users, ours["mean_ttft_ms"], ours["mean_tpot_ms"]))
    low = silicon(tmp_path, *rows[:4])
    output = tmp_path / "mine.yaml"
    arguments = ["calibrate", "adjust", str(low), "--output", str(output)]
    assert run(arguments) == (0, "")
    assert run(arguments)[0] == 2  # the file is there
    found = yaml.safe_load(output.read_text())["host"]
    for name, value in hidden.items():
        assert found[name] == pytest.approx(value, rel=1.2 * found["margins"][name]), name
    assert all(0.9 < factor < 1.1 for factor in found["factors"].values())  # the operators are as measured
    high = silicon(tmp_path, rows[4])
    before, after = (validate_measured(high, given) for given in ({}, {"engine": str(output)}))
    assert after["tpot"]["mape"] < 0.04 and after["tpot"]["mape"] < before["tpot"]["mape"] / 3
    assert after["ttft"]["mape"] < 0.02 < before["ttft"]["mape"]


def test_a_fit_of_more_constants_than_figures_is_refused(tmp_path: Path) -> None:
    path = str(silicon(tmp_path, silicon_row(2)))
    three = ["--fit", "iteration_s,sequence_s,transit_s"]
    code, error = run(["calibrate", "adjust", path, *three, "--output", "mine.yaml"])
    assert code == 2 and "2 measured figures of 1 points can't fit 3 constants" in error
    code, error = run(["calibrate", "adjust", path, "--fit", "nosuch", "--output", "mine.yaml"])
    assert code == 2 and "unknown constant 'nosuch'" in error
    assert run(["calibrate", "adjust", path, "--output", str(tmp_path / "one.yaml")]) == (0, "")  # of what one can say


def test_a_constant_without_effect_is_said_to_be_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = silicon(tmp_path, silicon_row(2), silicon_row(4))
    arguments = ["calibrate", "adjust", str(path), "--engine", "vllm@0.15", "--fit", "iteration_s"]
    assert run([*arguments, "--output", str(tmp_path / "mine.yaml")]) == (0, "")  # hidden behind the GPU
    assert "of no effect on these points" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "arrived_at_s,input_tokens,output_tokens,ttft_s,e2e_s\n0,1,1,abc,1\n", "ttft_s 'abc'"),
        ("a.json", {"request_rate": "fast"}, "request_rate 'fast'"),
        ("a.json", {"max_concurrency": "8"}, "max_concurrency '8'"),
        ("a.json", {"mean_ttft_ms": "sixty"}, "mean_ttft_ms 'sixty'"),
        ("a.csv", "Hardware,Num of Hardware,Framework,Model,Input Output Length,Batch Size,Latency\n"
         "A100,1,vLLM,m,128,1,abc\n", "Latency nan"),
    ],
)  # fmt: skip
def test_odd_values_are_named(name: str, text: Any, words: str, tmp_path: Path) -> None:
    result = {"mean_ttft_ms": 50.0, "mean_tpot_ms": 9.0, "completed": 4, "output_throughput": 9.0,
              "total_input_tokens": 40, "total_output_tokens": 40}  # fmt: skip
    (tmp_path / name).write_text(json.dumps(result | text) if isinstance(text, dict) else text)
    with pytest.raises(InputError, match=re.escape(words)):
        validate_measured(tmp_path / name, dict(DEVICE))


def test_what_was_assumed_of_other_points_is_not_said(tmp_path: Path) -> None:
    path = silicon(tmp_path, silicon_row(2), silicon_row(4, measured="2025-10-29"))
    assert any("InferenceMAX" in text for text in validate_measured(path, {})["assumed"])
    assert not any("InferenceMAX" in text for text in validate_measured(path, {}, only="c2")["assumed"])


def test_what_is_assumed_is_listed_with_what_another_value_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = silicon(tmp_path, silicon_row(4), silicon_row(8))
    found = {each["instead"]: each for each in validate_measured(path, {}, effects=True)["effects"]}
    assert found["a token budget of 8,192"]["points"] == 1 and not found["a token budget of 8,192"]["spread"]
    left_out = found["the first wave left out"]
    assert -0.5 < left_out["ttft"] < 0  # the first wave waits for itself
    (spread,) = (each for each in found.values() if each["spread"])
    assert 0 < spread["ttft"] < 1 and spread["points"] == 1
    known = validate_measured(path, {"max_num_batched_tokens": "512"}, effects=True)["effects"]
    assert not any("budget" in each["instead"] for each in known)  # what was asked for is not assumed
    assert run(["validate", "--against", str(path)]) == (0, "")
    assert "had it been the first wave left out: TPOT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("hardware", "device"),
    [("A100-80GB", "a100"), ("NVIDIA A100-SXM4-80GB", "a100_sxm"), ("NVIDIA A100 80GB PCIe", "a100_pcie"),
     ("H100", "h100"), ("NVIDIA H100 80GB HBM3", "h100"), ("Nobody X9", "nobody_x9")],
)  # fmt: skip
def test_cards_are_known_by_the_names_that_tables_give_them(hardware: str, device: str) -> None:
    assert _device(hardware) == device


def test_an_a100_of_the_recorded_aggregates_is_an_sxm_card_and_that_is_said(tmp_path: Path) -> None:
    row = {"exp_id": 1, "model": DEVICE["model"], "hardware": "A100-80GB", "tp": 1, "workload": "general",
           "max_num_batched_tokens": 2048, "stage_index": 0, "e2e_mean_ms": 900.0, "itl_mean_ms": 9.0,
           "ttft_mean_ms": 40.0, "request_rate_per_s": 2, "stage_seconds": 10, "input_tokens_about": 200,
           "output_tokens_about": 20}  # fmt: skip
    path = tmp_path / "aggregates.csv"
    pd.DataFrame([row]).to_csv(path, index=False)
    (file,) = read(path, {})
    assert file.points[0].settings["device"] == "a100_sxm" and "A100-80GB is a100_sxm" in file.every_assumption
