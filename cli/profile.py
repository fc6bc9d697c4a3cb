"""`windtunnel profile`: measure this machine's operators, collectives and iterations for given models."""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TextColumn

from cli.engine import engine_device
from cli.output import ProgressBar
from engine.errors import InputError
from engine.executors.start import need
from engine.replica_spec import dtype_on
from engine.results.folders import owned
from engine.specs import catalog
from engine.specs.checks import short
from engine.specs.device_folder import PROFILE_FILE
from engine.specs.scheduler import MOST_BLOCK, MOST_SEQUENCES
from profiler.points import Limits
from profiler.session import duration

MOST_TOKENS = 1 << 24  # of a batch, or a request

DEFAULTS = {
    "cuda": Limits(max_tokens=8192, max_requests=256, max_length=32768, kv_tokens=1 << 20),
    "cpu": Limits(max_tokens=512, max_requests=32, max_length=1024, kv_tokens=1 << 14),
}


def run(
    device: str,
    models: str,
    tensor_parallel_sizes: str,
    budget: str,
    output_dir: Path,
    *,
    dtype: str,
    attention_backend: str | None,
    block_size: int,
    max_num_batched_tokens: int | None,
    max_num_seqs: int | None,
    max_model_len: int | None,
) -> None:
    """Measure into `output_dir`, or resume the profile in it, and print the next command."""
    known = engine_device(device)
    dtype = dtype_on(known, dtype)
    names = [name.strip() for name in models.split(",") if name.strip()]
    if not names:
        raise InputError("no model given: add --models NAME,NAME")
    specs = tuple(catalog.model(name).in_dtype(dtype) for name in names)
    usual = DEFAULTS[known.runs_on]
    for flag, value, most in (
        ("max-num-batched-tokens", max_num_batched_tokens, MOST_TOKENS),
        ("max-num-seqs", max_num_seqs, MOST_SEQUENCES),
        ("max-model-len", max_model_len, MOST_TOKENS),
        ("block-size", block_size, MOST_BLOCK),
    ):
        if value is not None and not 1 <= value <= most:
            raise InputError(f"--{flag} {short(value)}: give a whole number from 1 to {most:,}")
    length = max_model_len or min(usual.max_length, *(spec.max_position_embeddings for spec in specs))
    limits = Limits(
        max_tokens=max_num_batched_tokens or min(usual.max_tokens, length),
        max_requests=max_num_seqs or usual.max_requests,
        max_length=length,
        kv_tokens=max(usual.kv_tokens, length),
    )
    sizes = tuple(_positive(text, "--tensor-parallel-sizes") for text in tensor_parallel_sizes.split(","))
    seconds = duration(budget)
    need("torch", "engine")
    with owned(output_dir, ours=(PROFILE_FILE,)):
        from profiler.profile import ProfileSpec, device_here, run_profile  # imports torch

        spec = ProfileSpec(
            device=device_here(known.runs_on) if device == "auto" else known,
            models=specs,
            tensor_parallel_sizes=sizes,
            dtype=dtype,
            limits=limits,
            budget_s=seconds,
            block_size=block_size,
            attention_backend=attention_backend,
        )
        console = Console(highlight=False, soft_wrap=True)
        shown = TextColumn("{task.fields[samples]} samples, {task.fields[left]} s left")
        bar = ProgressBar(TextColumn("{task.description}"), BarColumn(), shown)
        with bar as progress:
            task = progress.add_task("starting", total=seconds, samples=0, left=f"{seconds:.0f}")

            def on_progress(part: str, samples: int, left: float) -> None:
                text = f"{max(0.0, left):.0f}"
                progress.update(task, description=part, completed=seconds - left, samples=samples, left=text)

            session = run_profile(spec, output_dir, on_progress)
    made = session.provenance
    console.print(
        f"{len(session.samples):,} measurements in {session.spent_s:,.0f} s on {made['hardware']} "
        f"({made['software']}, {made['dtype']}, {made['attention_backend']} attention)"
    )
    if session.left and not session.failures:
        console.print(f"the budget is spent with {session.left:,} points left: rerun with a larger --budget to resume")
    elif not session.failures:
        console.print("every point within --max-num-seqs, --max-num-batched-tokens and --max-model-len is measured")
    if failed := [sample for sample in session.samples if "failed" in sample]:
        console.print(f"{len(failed):,} points could not be measured; the first: {failed[0]['failed']}")
    for failure in session.failures:
        console.print(f"not measured: {failure}")
    console.print(f"next: windtunnel calibrate fit --source profile:{output_dir} --output-dir {output_dir}/calibration")
    console.print(f"profile: {output_dir}")


def _positive(text: str, flag: str) -> int:
    if re.fullmatch(r"\s*[1-9][0-9]{0,4}\s*", text) is None:
        raise InputError(f"{flag} {short(text)}: give whole numbers such as 1,2,4")
    return int(text)
