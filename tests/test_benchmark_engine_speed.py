"""The engine's benchmark: its arithmetic, what it imports, and that it runs on a CPU."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "engine_speed.py"
ABSENT = ("pyarrow", "datasketches", "simpy", "plotly", "pydantic", "ray", "rich", "yaml", "pandas", "sklearn", "scipy")


@pytest.fixture(scope="module")
def speed() -> ModuleType:
    module = ModuleType("engine_speed")
    sys.modules["engine_speed"] = module  # where dataclasses look for their annotations
    exec(compile(SCRIPT.read_text(encoding="utf-8"), str(SCRIPT), "exec"), module.__dict__)
    return module


def test_the_floor_is_what_a_decode_reads(speed: ModuleType) -> None:
    from engine.specs.catalog import model

    llama = model("Meta-Llama-3-8B")
    matrices = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 128256 * 4096
    keys_and_values = 2 * 32 * 8 * 128
    assert speed.decode_bytes(llama, 64, 1000) == 2 * (matrices + 64 * 1000 * keys_and_values)


def test_a_prompts_flops_are_what_torch_counts(speed: ModuleType) -> None:
    """Of the matrices, and of attention half the square: torch counts all of it."""
    import transformers

    small, tokens = speed.SMALL, 96
    config = transformers.LlamaConfig(
        vocab_size=small.vocab_size,
        hidden_size=small.hidden_size,
        intermediate_size=small.intermediate_size,
        num_hidden_layers=small.num_layers,
        num_attention_heads=small.num_attention_heads,
        num_key_value_heads=small.num_key_value_heads,
        head_dim=small.head_dim,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(tokens)[None], logits_to_keep=1)
    square = 4 * tokens * tokens * small.q_size * small.num_layers
    triangle = 4 * (tokens * (tokens + 1) // 2) * small.q_size * small.num_layers
    assert speed.prompt_flops(small, tokens) == counter.get_total_flops() - square + triangle
    windowed = replace(small, sliding_window=10)
    assert speed.prompt_flops(small, 10) == speed.prompt_flops(windowed, 10)
    per_token = speed.prompt_flops(windowed, 31) - speed.prompt_flops(windowed, 30)
    assert per_token == speed.prompt_flops(windowed, 91) - speed.prompt_flops(windowed, 90)


def test_overlapping_work_counts_once(speed: ModuleType) -> None:
    assert speed.busy([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5), (6.0, 6.5)]) == 4.5


def test_targets_say_what_is_missed(speed: ModuleType) -> None:
    found = {
        "decode": [{"batch": 1, "share": 0.81}, {"batch": 64, "share": 0.79}, {"batch": 256, "share": 0.1}],
        "prefill": [{"tokens": 512, "share": 0.1}, {"tokens": 2048, "share": 0.7}],
        "busy": {"share": 0.949},
    }
    assert [line.split(":")[0] for line in speed.targets(found)] == ["met", "MISSED", "met", "MISSED"]


def test_it_runs_without_the_packages_that_a_gpu_machine_may_lack(tmp_path: Path) -> None:
    """A whole small run with those packages blocked: figures of each kind, all above 0."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "vocab_size": 64, "max_position_embeddings": 256, **sizes})
    )
    settings = [
        "--device",
        "cpu",
        "--model",
        "config.json",
        "--batches",
        "1,3",
        "--context",
        "8",
        "--prompts",
        "16,32",
        "--requests",
        "4,8,4",
    ]
    code = (
        f"import sys; sys.modules |= dict.fromkeys({ABSENT!r}); sys.argv = ['', *{settings!r}, '--json']; "
        "import runpy, engine.runtime.serve, engine.worker.rank_process; "
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [row["batch"] for row in found["decode"]] == [1, 3]
    assert [row["tokens"] for row in found["prefill"]] == [16, 32]
    positive = [*(row[key] for row in (*found["decode"], *found["prefill"]) for key in ("iteration_ms", "share"))]
    positive += [found[key] for key in ("copy_bytes_per_s", "matmul_flops", "engine_tokens_per_s")]
    positive.append(found["busy"]["share"])
    assert min(positive) > 0
    assert found["targets"] == []
    assert "transformers" not in done.stdout
