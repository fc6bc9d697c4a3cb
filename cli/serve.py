"""`windtunnel serve`: an OpenAI-compatible server over this machine's engine, or over simulated replicas."""

from __future__ import annotations

import csv
import gc
import json
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

from rich.console import Console

from cli.bench import only_group, source_of_times
from cli.engine import engine_spec
from cli.output import default_folder, print_summary
from engine.documents import given_path
from engine.errors import InputError
from engine.executors.start import need, start
from engine.replica_spec import ReplicaSpec
from engine.results.metrics import memory_and_steady_use, prefix_use, replica_use, summarize, tbt_percentiles
from engine.results.recorder import Recorder
from engine.results.run_folder import keep_incomplete, run_folder, write_config, write_summary
from engine.results.tables import Columns
from engine.runtime.driver import Driver
from engine.runtime.executor import WorkerError, freeze_start_up
from engine.runtime.serve import warm_up
from engine.server.app import Server
from engine.server.live import Backend, LiveEngine
from engine.server.requests import Limits
from engine.server.run import HttpServer
from engine.server.text import BytesRule, TextCodec, load_tokenizer
from engine.workload.workload import make_workload
from simulator.cluster import Deployment
from simulator.live import LiveCluster
from windtunnel.plugins import load_plugin
from windtunnel.run_config import resolved
from windtunnel.settings import BenchConfig

LENGTHS = 1 << 14  # drawn output lengths, taken in turn
TRACE = "trace.csv"  # of what was served, in the run's folder


def run(
    config: BenchConfig,
    *,
    simulated: bool,
    time_scale: float,
    address: tuple[str, int],
    names: Sequence[str],
    api_key: str | None,
    max_queue: int,
    output_dir: Path | None,
    as_json: bool,
) -> dict[str, Any] | None:
    """Serve until SIGTERM or Ctrl-C, write the run's folder, and print and return its summary; None of no request."""
    for package in ("fastapi", "uvicorn", "uvloop", "httptools", "prometheus_client"):
        need(package, "serve")
    for plugin in config.plugin:
        load_plugin(plugin)
    if time_scale != 1 and not simulated:
        raise InputError(f"--time-scale {time_scale} needs --simulate: an engine takes the time it takes")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    made = _Simulated(config, time_scale) if simulated else _Engine(config)
    slos = config.slos()
    target = output_dir or default_folder(made.kinds[0], "served", "serve-")
    with _noted_if_nothing_served(console):
        with run_folder(target) as folder:
            recorder = Recorder(folder, tbt_percentiles(slos), exact_gaps=False, predicted=simulated)
            backend, http, server = made.backend(recorder), None, None
            try:
                limits = Limits(
                    models=tuple(names) or (made.model,),
                    max_model_len=min(kind.scheduler.max_model_len or 0 for kind in made.kinds),
                    simulated=simulated,
                    draw_length=_draw_length(config, made.kinds) if simulated else None,
                )
                server = Server(backend, made.codec, limits, max_queue=max_queue, api_key=api_key)
                http = HttpServer(server.app(), *address)
                made.on_failure(http.stop)
                host, port = http.address
                url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
                started = time.perf_counter()
                freeze_start_up()
                http.run(lambda: _say(console, url, limits, made, time_scale))
            finally:
                gc.unfreeze()
                made.close()
                recorder.close()
            requests = recorder.requests()
            if requests:
                summary = summarize(requests, recorder.gaps, slos, server.num_requests - server.num_aborted, 0)
                served_s = time.perf_counter() - started
                summary |= made.summary(recorder, summary["duration"], served_s)
                summary["workload"] = "served requests"
                summary["trace_failures"] = 0
                summary["workload_notes"] = _notes(server, made.codec, time_scale)
                summary["version"] = version("windtunnel")
                _write_trace(folder / TRACE, requests)
                write_config(folder, _config(config, made.kinds, len(requests["arrived_s"]), target))
                write_summary(folder, summary)
            if backend.error is not None:
                kept = f". What was finished is in {keep_incomplete(folder, target)}" if requests else ""
                raise WorkerError(f"{backend.error}{kept}")
            if not requests:
                raise _NothingServedError
            from studies.pages.run import write_report

            write_report(folder)
        print_summary(summary, made.copies, target, console)
        if as_json:
            print(json.dumps({**summary, "output_dir": str(target)}, allow_nan=False))
        return summary
    return None


class _NothingServedError(Exception):
    """No request was finished, so there is no run to write."""


@contextmanager
def _noted_if_nothing_served(console: Console) -> Iterator[None]:
    try:
        yield
    except _NothingServedError:
        console.print("no request was finished: no folder is written")


class _Simulated:
    """Simulated replicas behind a router."""

    def __init__(self, config: BenchConfig, time_scale: float) -> None:
        groups = config.groups()
        self.deployments = [Deployment.of(group.replica_spec(), group.predictor) for group in groups]
        self.kinds = [each.replica for each in self.deployments]
        self.copies = [group.count for group in groups]
        self.model = groups[0].model
        folder = config.tokenizer or given_path(self.model)
        self.codec: TextCodec = load_tokenizer(folder) or BytesRule()
        if config.tokenizer is not None and isinstance(self.codec, BytesRule):
            raise InputError(f"tokenizer {config.tokenizer} has no tokenizer.json: give a model's folder")
        self._config, self._time_scale = config, time_scale

    def backend(self, recorder: Recorder) -> Backend:
        pairs = zip(self.deployments, self.copies, strict=True)
        every = [deployment for deployment, count in pairs for _ in range(count)]
        self._cluster = LiveCluster(
            every,
            recorder,
            router=self._config.router,
            seed=self._config.seed,
            token=self.codec.filler,
            time_scale=self._time_scale,
        )
        return self._cluster

    def on_failure(self, stop: Callable[[], None]) -> None:
        self._cluster.on_failure = stop

    def close(self) -> None:
        self._cluster.close()

    def summary(self, recorder: Recorder, duration: float, served_s: float) -> dict[str, Any]:
        pairs = zip(self.deployments, self.copies, strict=True)
        described = [deployment.describe() for deployment, count in pairs for _ in range(count)]
        drivers = [replica.driver for replica in self._cluster.replicas]
        parts = zip(described, drivers, strict=True)
        replicas = [_use(kind, driver, duration, recorder, index) for index, (kind, driver) in enumerate(parts)]
        return {
            "router": self._config.router,
            "replicas": replicas,
            **prefix_use(replicas),
            **memory_and_steady_use(replicas),
            "simulator": {
                "batches": recorder.num_batches,
                "loop_seconds": served_s,
                "startup_seconds": 0.0,
                "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            },
        }

    def words(self) -> str:
        pairs = zip(self.deployments, self.copies, strict=True)
        kinds = [f"{count} x {each.device.name} ({each.predictor.description})" for each, count in pairs]
        return f"simulated: {'; '.join(kinds)}"


class _Engine:
    """One replica of this machine's engine."""

    def __init__(self, config: BenchConfig) -> None:
        group = only_group(config)
        replica = group.replica_spec()
        self._spec = engine_spec(replica, group.model, config, config.seed)
        codec = load_tokenizer(config.tokenizer or self._spec.folder)
        if codec is None:
            raise InputError(f"{group.model} has no tokenizer, which a server needs: give its folder by --tokenizer")
        codec.vocab_size = replica.model.vocab_size
        self.codec: TextCodec = codec
        self.model, self.copies = group.model, [1]
        self._seed = config.seed
        self._executor = start(self._spec, config.executor)
        self.kinds = [replica.with_blocks(self._executor.num_blocks)]
        self._live: LiveEngine | None = None

    def backend(self, recorder: Recorder) -> Backend:
        (replica,), executor = self.kinds, self._executor
        warm_up(replica.new_scheduler(), executor, replica.model.vocab_size, None)
        self._driver = Driver(replica.new_scheduler(), executor, recorder, seed=self._seed)
        self._live = LiveEngine(self._driver)
        return self._live

    def on_failure(self, stop: Callable[[], None]) -> None:
        assert self._live is not None
        self._live.on_failure = stop

    def close(self) -> None:
        if self._live is not None:
            self._live.close()
        self._executor.close()

    def summary(self, recorder: Recorder, duration: float, served_s: float) -> dict[str, Any]:
        (replica,), executor = self.kinds, self._executor
        described = replica.describe(source_of_times(executor, self._spec))
        replicas = [_use(described, self._driver, duration, recorder, 0)]
        return {
            "router": "none",
            "replicas": replicas,
            **prefix_use(replicas),
            **memory_and_steady_use(replicas),
            "engine": {
                "batches": recorder.num_batches,
                "hardware": executor.hardware,
                "attention_backend": executor.attention_backend,
                "num_gpu_blocks": executor.num_blocks,
                "async_scheduling": replica.async_scheduling,
                "dtype": self._spec.dtype,
                "load_format": "dummy" if self._spec.folder is None else "safetensors",
            },
        }

    def words(self) -> str:
        return f"on {self._executor.hardware}"


def _use(described: dict[str, Any], driver: Driver, duration: float, recorder: Recorder, index: int) -> dict[str, Any]:
    peak = recorder.peak_kv_blocks.get(index, 0)
    return {**described, **replica_use(driver.scheduler, driver.busy_s, driver.occupied_s, duration, peak, ())}


def _draw_length(config: BenchConfig, kinds: Sequence[ReplicaSpec]) -> Callable[[int | None, bool], int]:
    """Return how many tokens a simulated model makes: the request's, or drawn from the workload where that is open.

    With a workload of the user's own a request's max_tokens is the most there may be, unless it ignores the end.
    """
    asked = config.workload is not None or config.trace is not None or config.random_output_len is not None
    longest = min(kind.scheduler.max_model_len or 0 for kind in kinds)
    values = {"num_prompts": None if config.trace is not None else LENGTHS, "turns": None, "turn_input_len": None}
    values |= {} if config.trace is not None else {"tokenizer": None}
    spec = config.model_copy(update=values).workload_spec(longest, burst=True)
    lengths = cycle(make_workload(spec).output_tokens.tolist())

    def draw(given: int | None, ignore_eos: bool) -> int:
        if given is not None and (ignore_eos or not asked):
            return given
        drawn: int = next(lengths)
        return drawn if given is None else min(given, drawn)

    return draw


def _say(console: Console, url: str, limits: Limits, made: _Simulated | _Engine, time_scale: float) -> None:
    """Say that it serves, and what a user should know."""
    console.print(f"serving {', '.join(limits.models)} at {url}/v1 ({made.words()})")
    for note in [note for kind in made.kinds for note in kind.notes()]:
        console.print(f"note: {note}", style="yellow")
    if made.codec.description:
        console.print(f"note: {made.codec.description}", style="yellow")
    if time_scale != 1:
        console.print(f"note: a real second is {time_scale:g} simulated ones", style="yellow")


def _notes(server: Server, codec: TextCodec, time_scale: float) -> list[str]:
    notes = [codec.description] if codec.description else []
    if server.num_aborted:
        notes.append(f"{server.num_aborted:,} requests whose client went away are left out")
    if time_scale != 1:
        notes.append(f"times are simulated seconds, {time_scale:g} in a real one")
    return notes


def _config(config: BenchConfig, kinds: list[ReplicaSpec], count: int, target: Path) -> dict[str, Any]:
    """Return the run's settings with what was served as their workload, so that they can be simulated."""
    lengths = {
        name: BenchConfig.model_fields[name].get_default()
        for name in ("workload", "columns", "tokenizer", "random_input_len", "random_output_len", "random_range_ratio",
                     "system_prompt_len", "turns", "turn_input_len", "think_time", "max_concurrency", "ramp_up",
                     "client_overhead_ms", "input_len", "output_len", "zipf_alpha", "clip_tokens", "request_rate",
                     "arrival", "arrival_cv", "rate_scale")
    }  # fmt: skip
    served = config.model_copy(update={**lengths, "trace": target.absolute() / TRACE})
    return resolved(served, kinds, count)


def _write_trace(path: Path, requests: Columns) -> None:
    """Write what was served as a trace, from its first arrival on."""
    order = requests["arrived_s"].argsort(kind="stable")
    columns = [requests[name][order] for name in ("prompt_tokens", "output_tokens", "arrived_s")]
    columns[2] = columns[2] - columns[2][0]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("num_prefill_tokens", "num_decode_tokens", "arrived_at"))
        writer.writerows(zip(*(column.tolist() for column in columns), strict=True))
