"""`windtunnel bench --url URL`: send a workload to a server and measure it from outside."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from cli.output import print_summary, progress_bar
from engine.errors import InputError, unknown
from engine.executors.start import need
from engine.loadgen.client import Endpoint, ServerFacts
from engine.loadgen.generator import Generator, Measured
from engine.loadgen.prompts import APPROXIMATE, NO_WORDS, Prompts
from engine.results.files import write_json
from engine.results.metrics import summarize, tbt_percentiles
from engine.results.recorder import ITERATION_COLUMNS, Recorder
from engine.results.run_folder import kept_if_interrupted, run_folder, write_config, write_summary
from engine.results.slo import SLO
from engine.results.tables import Columns, to_arrow
from engine.runtime.executor import freeze_start_up
from engine.server.text import TextCodec, load_tokenizer
from engine.workload.workload import Workload, WorkloadSpec, make_workload
from windtunnel.plugins import load_plugin
from windtunnel.run_config import full_paths
from windtunnel.settings import LoadConfig

ENDPOINTS = ("completions", "chat")
RESULT_KEYS = (  # of a summary, that vLLM's result JSON has too
    "duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput",
    "request_goodput", "output_throughput", "total_token_throughput",
)  # fmt: skip


@dataclass(frozen=True)
class Load:
    """A load on a server, as far as it is known before it is sent."""

    facts: ServerFacts
    model: str
    workload: Workload
    spec: WorkloadSpec
    endpoint: Endpoint
    prompts: Prompts
    ignore_eos: bool
    tokenizer: Path | None

    async def send(self, recorder: Recorder, on_progress: Callable[[int], None]) -> Measured:
        """Send it and measure."""
        async with self.endpoint:
            more = {"ignore_eos": True} if self.ignore_eos else {}
            generator = Generator(
                self.endpoint, self.prompts, self.workload, self.model, more=more, on_progress=on_progress
            )
            return await generator.run(recorder)


def prepare(
    config: LoadConfig, server: Mapping[str, Any], *, model: str | None = None, longest: int | None = None
) -> Load:
    """Ask a server what it is and make the load. Raises InputError for what can't be.

    `server` has the url and the flag that gave it, the endpoint, the timeout (s), the api_key and ignore_eos. `model`
    is its name there; None takes the config's, else the server's first. Requests are no longer than `longest`; None:
    than the server takes.
    """
    need("aiohttp", "serve")
    if server["endpoint"] not in ENDPOINTS:
        raise unknown("endpoint", server["endpoint"], ENDPOINTS)
    chat = server["endpoint"] == "chat"
    endpoint = Endpoint(
        server["url"], api_key=server["api_key"], timeout_s=server["timeout"], chat=chat, flag=server["flag"]
    )

    async def ask() -> ServerFacts:
        async with endpoint:
            return await endpoint.facts()

    facts = asyncio.run(ask())
    name = model or facts.models[0]
    if name not in facts.models:
        raise unknown("model of the server", name, facts.models)
    codec: TextCodec | None = load_tokenizer(config.tokenizer)
    if config.tokenizer is not None and codec is None:
        raise InputError(f"tokenizer {config.tokenizer} has no tokenizer.json: give a model's folder")
    without = config if config.trace is not None else config.model_copy(update={"tokenizer": None})
    limit = longest or config.max_model_len or facts.max_model_len
    spec = without.workload_spec(limit)
    workload = make_workload(spec)
    prompts = Prompts(workload, config.seed, codec, chat=chat)
    return Load(facts, name, workload, spec, endpoint, prompts, server["ignore_eos"], config.tokenizer)


def run(
    config: LoadConfig, server: Mapping[str, Any], output_dir: Path | None, save_result: Path | None, *, as_json: bool
) -> dict[str, Any]:
    """Measure, write the run's folder, and print and return the summary."""
    for plugin in config.plugin:
        load_plugin(plugin)
    slos = config.slos()
    if save_result is not None and save_result.exists():
        raise InputError(f"{save_result} exists: give another --save-result")
    load = prepare(config, server, model=config.model or None)
    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    target = output_dir or _default_folder(load)
    with run_folder(target) as folder, kept_if_interrupted(folder, target, "summary.json"):
        recorder = Recorder(folder, tbt_percentiles(slos), predicted=False)
        with progress_bar("requests") as progress:
            task = progress.add_task("sending", total=len(load.workload))
            measured = measure(load, recorder, lambda ended: progress.update(task, completed=ended))
        summary = summary_of(load, measured, recorder, slos)
        write_config(folder, full_paths({**config.workload_settings(len(load.workload)), "model": load.model}))
        write_tables(folder, measured)
        write_summary(folder, summary)
        if save_result is not None:
            write_json(save_result, vllm_result(load, measured, summary, config))
        from studies.pages.run import write_report

        write_report(folder)
        if measured.interrupted:
            raise KeyboardInterrupt
    print_summary(summary, [1], target, console)
    if as_json:
        print(json.dumps({**summary, "output_dir": str(target)}, allow_nan=False))
    return summary


def measure(load: Load, recorder: Recorder, on_progress: Callable[[int], None]) -> Measured:
    """Send the load. Ctrl-C ends it, with what is finished by then. Raises InputError if nothing at all came back."""
    try:
        import uvloop

        runner: Any = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    except ImportError:
        runner = asyncio.Runner()
    found: list[Measured] = []

    async def send() -> None:
        found.append(await load.send(recorder, on_progress))

    freeze_start_up()
    with runner:
        runner.run(send())
    gc.unfreeze()
    recorder.close()
    measured = found[0]
    if not recorder.requests():
        if measured.interrupted:
            raise KeyboardInterrupt
        error, count = measured.errors.most_common(1)[0]
        raise InputError(f"no request to {load.facts.url} was answered: {count:,} times {error}")
    return measured


def summary_of(load: Load, measured: Measured, recorder: Recorder, slos: list[SLO]) -> dict[str, Any]:
    """Return the summary of a measured load, as of any run."""
    workload = load.workload
    summary = summarize(recorder.requests(), recorder.gaps, slos, measured.sent, workload.num_dropped, workload.client)
    summary["workload"] = workload.name
    summary["trace_failures"] = workload.num_failed
    approximate = [] if load.prompts.exact else [APPROXIMATE if load.tokenizer is None else NO_WORDS]
    summary["workload_notes"] = [*workload.notes, *approximate, *measured.notes()]
    summary["router"] = "none"
    summary["version"] = version("windtunnel")
    facts = {name: value for name, value in vars(load.facts).items() if value is not None}
    summary["server"] = {**facts, "models": list(load.facts.models), **measured.describe()}
    summary["replicas"] = [{"model": load.model, "device": load.facts.url, "predictor": "measured from outside",
                            "notes": []}]  # fmt: skip
    return summary


def write_tables(folder: Path, measured: Measured) -> None:
    """Write the server's gauges, and an `iterations.parquet` without rows: no batch is seen from outside."""
    import numpy as np
    import pyarrow.parquet as pq

    empty: Columns = {name: np.empty(0, dtype=kind) for name, kind in ITERATION_COLUMNS.items()}
    pq.write_table(to_arrow(empty), folder / "iterations.parquet")
    if measured.samples:
        pq.write_table(to_arrow(measured.gauges()), folder / "gauges.parquet")


def vllm_result(load: Load, measured: Measured, summary: Mapping[str, Any], config: LoadConfig) -> dict[str, Any]:
    """Return the results in the form of vLLM's serving benchmark (`vllm bench serve --save-result --save-detailed`)."""
    rate = load.spec.request_rate
    latencies = {name: value for name, value in summary.items() if name.endswith("_ms") and "steady" not in name}
    details = measured.details
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai-chat" if load.endpoint.chat else "openai",
        "backend": "openai-chat" if load.endpoint.chat else "openai",
        "label": None,
        "model_id": load.model,
        "tokenizer_id": str(config.tokenizer or load.model),
        "num_prompts": len(load.workload),
        "request_rate": "inf" if rate is None else rate,
        "burstiness": 1 / load.spec.arrival_cv**2 if load.spec.arrival == "gamma" else 1.0,
        "max_concurrency": load.workload.client.max_concurrency,
        **{name: summary[name] for name in RESULT_KEYS},
        **latencies,
        "input_lens": [each["input_len"] for each in details],
        "output_lens": [each["output_len"] for each in details],
        "ttfts": [each["ttft"] for each in details],
        "itls": [each["itl"] for each in details],
        "errors": list(measured.errors.elements()),
    }


def _default_folder(load: Load) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    return Path("runs") / f"{stamp}-bench-{load.model.rstrip('/').split('/')[-1]}-{load.workload.name}"
