"""Reads measured results as their tools write them; the format is recognised by its columns or keys.

    read(Path("silicon.csv"), {}, None, None)

Formats: AIConfigurator's silicon CSV (`silicon`), LLM-Inference-Bench's CSV (`offline`), a CSV with a line a request
(`requests`), a CSV with a line a run of an open loop (`aggregates`), the JSON of vLLM's benchmark (`vllm`), and the
folders of our own runs and of validations against a server (`run`). A folder of several is read whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from engine.documents import check_table, read_json, read_yaml
from engine.engine_preset import names as engine_names
from engine.errors import InputError
from engine.results.tables import Array
from engine.scheduling.content import Content, own
from engine.specs import catalog
from engine.specs.checks import MOST_NUMBER, MOST_SECONDS, short
from engine.workload.client import ClientSpec
from engine.workload.workload import Workload, WorkloadSpec, make_workload
from studies.measured.point import Measurements, Point
from studies.measured.sources import Source, client, source, source_for

Settings = Mapping[str, Any]

_COLUMNS = {  # by which a CSV's format is recognised
    "silicon": {"model_path", "system", "isl", "osl", "concurrency", "silicon_ttft_ms", "silicon_tpot_ms"},
    "offline": {"Hardware", "Num of Hardware", "Framework", "Model", "Input Output Length", "Batch Size", "Latency"},
    "aggregates": {"model", "hardware", "request_rate_per_s", "stage_seconds", "ttft_mean_ms", "itl_mean_ms",
                   "e2e_mean_ms", "input_tokens_about", "output_tokens_about"},
    "requests": {"arrived_at_s", "input_tokens", "output_tokens", "ttft_s", "e2e_s"},
}  # fmt: skip
_REQUEST_COLUMNS = {  # what --columns may name, and the columns that are looked for else
    "time": "arrived_at_s",
    "prompt": "input_tokens",
    "output": "output_tokens",
    "prompt_id": "prompt_id",
    "ttft": "ttft_s",
    "e2e": "e2e_s",
}
_SUMMARY_KEYS = {"ttft": "mean_ttft_ms", "tpot": "mean_tpot_ms", "e2e": "mean_e2el_ms",
                 "throughput": "output_throughput"}  # fmt: skip
_VLLM_KEYS = {"mean_ttft_ms", "mean_tpot_ms", "completed", "output_throughput"}
WARMUP_REQUESTS = 200  # of a run with a line a request and a cache to warm, where nothing else is asked for
_PRECISIONS = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "float16": "float16"}
_MOST_BYTES = 1 << 28
ROUNDING_S = 1e-3  # of times that a tool has printed
SERVER = "server"  # in the folder of a validation against a URL: what was measured of it


def read(
    path: Path,
    given: Settings,
    source_name: str | None = None,
    client_name: str | None = None,
    columns: str | None = None,
    warmup_requests: int | None = None,
) -> list[Measurements]:
    """Read a file, or all that a folder holds. Raises InputError for what is no such file, naming line and value.

    Args:
        given: settings that were asked for; they win over the file's.
        source_name: a source that ships or a YAML file, in place of the one that the format suggests.
        client_name: a client that ships, in place of the source's.
        columns: of a CSV with a line a request: `time=...,prompt=...,output=...,ttft=...,e2e=...[,prompt_id=...]`.
        warmup_requests: how many of the first requests of such a file are left out of the means.
    """
    if client_name is not None:
        client(client_name)  # raises InputError for an unknown one, also where the file needs none
    if warmup_requests is not None and warmup_requests < 0:
        raise InputError(f"--warmup-requests {warmup_requests}: give at least 0")
    chosen = None if source_name is None else (source_name, source(source_name))
    reader = _Reader(given, chosen, client_name, columns, warmup_requests)
    if not path.exists():
        raise InputError(f"{path} does not exist: give a URL (http://...), or a file or folder of measured results")
    if not path.is_dir() or _is_run(path):
        return [reader.read(path)]
    inside = sorted(each for each in path.iterdir() if each.suffix in (".csv", ".json") or _is_run(each))
    if not inside:
        raise InputError(f"{path} holds no measured results: give a folder of CSV or JSON files, or of runs")
    return [reader.read(each) for each in inside]


@dataclass(frozen=True)
class _Row:
    """A row of a table, by the name that errors call it, and the source that fills in what it leaves open."""

    path: Path
    name: str
    values: Settings
    source_name: str
    source: Source
    client_name: str | None
    given: Settings

    def point(self, settings: Settings, assumed: Sequence[str] = (), **rest: Any) -> Point:
        """Return its point: the settings that were asked for win, and what the source assumes comes first."""
        every = (*self.source.assumed, *assumed)
        return Point(id=self.name, settings={**settings, **self.given}, source=self.source_name, assumed=every, **rest)

    def __getitem__(self, key: str) -> str:
        return str(self.values[key])

    def card(self, key: str) -> tuple[str, list[str]]:
        """Return the device that a column names, and what had to be assumed where the name leaves open which card."""
        if self.source.device is not None:
            return self.source.device, []
        device = _device(self[key])
        card = self.source.cards.get(device)
        return (device, []) if card is None else (card, [f"{self[key]} is {card}"])

    def has(self, key: str) -> bool:
        """Return whether there is a value."""
        return _given(self.values.get(key))

    def number(self, key: str) -> float:
        """Return a number above 0."""
        try:
            value = float(self.values[key])
        except (TypeError, ValueError, KeyError):
            value = math.nan
        if not 0 < value <= MOST_NUMBER:
            raise self.wrong(key, "give a number above 0")
        return value

    def seconds(self, key: str) -> float:
        """Return seconds of a column of milliseconds."""
        value = self.number(key) / 1e3
        if value > MOST_SECONDS:
            raise self.wrong(key, f"give at most {MOST_SECONDS * 1e3:,.0f} ms")
        return value

    def whole(self, key: str) -> int:
        """Return a whole number of at least 1."""
        value = self.number(key)
        if value != int(value) or value > 10_000_000:
            raise self.wrong(key, "give a whole number of at least 1")
        return int(value)

    def wrong(self, key: str, fix: str) -> InputError:
        """Return an error that names a value."""
        return InputError(f"{self.path}: {key} {short(self.values.get(key))} of {self.name}: {fix}")


@dataclass(frozen=True)
class _Reader:
    given: Settings
    chosen: tuple[str, Source] | None
    client_name: str | None
    columns: str | None
    warmup_requests: int | None

    def read(self, path: Path) -> Measurements:
        """Read one file, or the folder of one run. Raises InputError for what its tool has not written so."""
        try:
            return self.run_folder(path) if path.is_dir() else self.file(path)
        except InputError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as err:
            why = f"{type(err).__name__}: {' '.join(str(err).split())[:200]}"
            raise InputError(f"{path} can't be read as measured results ({why}): is it as its tool wrote it?") from err

    def file(self, path: Path) -> Measurements:
        """Read one file."""
        if path.suffix == ".json":
            return self._vllm(path)
        try:
            check_table(path, _MOST_BYTES)
            frame = pd.read_csv(path, skipinitialspace=True)
        except InputError:
            raise
        except (OSError, ValueError, pd.errors.ParserError) as error:
            raise InputError(f"{path} can't be read as CSV: {' '.join(str(error).split())[:200]}") from None
        if not len(frame):
            raise InputError(f"{path} holds no rows: give a table with at least one")
        if self.columns is not None:
            return self._requests(path, frame)
        for form, needed in _COLUMNS.items():
            if needed <= set(frame.columns):
                return self._requests(path, frame) if form == "requests" else self._each_row(path, form, frame)
        raise InputError(
            f"{path} has the columns {', '.join(map(str, list(frame.columns)[:12]))}, which no known format has: for a "
            "table with a line a request give --columns time=...,prompt=...,output=...,ttft=...,e2e=..."
        )

    def run_folder(self, path: Path) -> Measurements:
        """Read a folder of our own `bench`, or what `validate --against URL` measured of the server."""
        import pyarrow.parquet as pq

        hint = "give a folder that bench or simulate has written"
        results = path / SERVER if (path / SERVER).is_dir() else path
        summary = read_json(results / "summary.json", hint)
        config = read_yaml(path / "config.yaml", hint)
        try:
            table = pq.read_table(results / "requests.parquet").to_pandas().sort_values("request_id")
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{path} is no run's folder: {' '.join(str(error).split())[:200]}") from None
        if not isinstance(config, dict) or not isinstance(summary, dict):
            raise InputError(f"{path} is no run's folder: its config.yaml or summary.json holds no mapping")
        said = (summary.get("server") or {}).get("num_replicas") or 1
        if (count := max(len(summary.get("replicas", [])), config.get("num_replicas") or 1, said)) > 1:
            raise InputError(f"{path} is a run of {count} replicas: only those of one can be predicted")
        self._check_unused(path)
        arrived = np.sort((table["arrived_s"] - table["arrived_s"].min()).to_numpy())
        users = config.get("max_concurrency")
        arrived = np.zeros(len(table)) if users else arrived
        prompts, outputs = (table[name].to_numpy(np.int64) for name in ("prompt_tokens", "output_tokens"))
        workload = Workload(path.name, arrived, prompts, outputs, 0, client=ClientSpec(max_concurrency=users))
        point = self._of_summary(path.name, summary, {**config, **self.given}, workload)
        return Measurements(name=path.name, format="run", points=[point])

    # -- formats ---------------------------------------------------------------------------------------------------

    def _each_row(self, path: Path, form: str, frame: pd.DataFrame) -> Measurements:
        """Read a table with a point a row; a row that can't be is refused, with the reason."""
        name_of, point = _ROWS[form]
        frame, notes = _averaged(frame) if form == "offline" else (frame, ())
        points: list[Point] = []
        refused: list[tuple[str, str]] = []
        for place, record in enumerate(frame.to_dict("records")):
            values = {str(key): value for key, value in record.items()}
            chosen = self._source(form, {key for key, value in values.items() if _given(value)})
            row = _Row(path, name_of(place, values), values, *chosen, self.client_name, self.given)
            try:
                points.append(point(row))
            except InputError as error:
                refused.append((row.name, str(error)))
        return Measurements(name=path.name, format=form, points=points, assumed=notes, refused=tuple(refused))

    def _requests(self, path: Path, frame: pd.DataFrame) -> Measurements:
        name, chosen = self._source("requests")
        columns = {**_REQUEST_COLUMNS, **_named(self.columns)}
        missing = [column for key, column in columns.items() if key != "prompt_id" and column not in frame]
        if missing:
            raise InputError(
                f"{path} lacks the column {missing[0]} (it has {', '.join(map(str, frame.columns))}): name those of "
                "such a table with --columns time=...,prompt=...,output=...,ttft=...,e2e=..."
            )
        for setting in ("model", "device"):
            if setting not in self.given:
                raise InputError(f"{path} does not say which {setting} was measured: give --{setting}")
        ids = [f"prompt_id={columns['prompt_id']}"] if columns["prompt_id"] in frame else []
        used = ",".join([*(f"{key}={columns[key]}" for key in ("prompt", "output", "time")), *ids])
        workload = make_workload(WorkloadSpec(trace=path, columns=used))
        times = pd.to_numeric(frame[columns["time"]], errors="coerce").to_numpy(float)
        rows = frame.iloc[np.argsort(times, kind="stable")]
        ttft, e2e = (pd.to_numeric(rows[columns[key]], errors="coerce").to_numpy(float) for key in ("ttft", "e2e"))
        for column, values in ((columns["ttft"], ttft), (columns["e2e"], e2e)):
            if not (fine := (values > 0) & (values <= MOST_SECONDS)).all():  # false for NaN
                row = int(np.argmin(fine))
                raise InputError(
                    f"{path}: {column} {rows[column].iloc[row]!r} of request {row}: give seconds above 0, at most "
                    f"{MOST_SECONDS:,.0f}"
                )
        if (wrong := ttft > e2e + ROUNDING_S).any():
            row = int(np.argmax(wrong))
            raise InputError(
                f"{path}: request {row} got its first token after {ttft[row]:g} s, its last after {e2e[row]:g} s: give "
                "times since its arrival"
            )
        settings = {**chosen.settings(str(self.given["device"])), **self.given}
        warmup = self.warmup_requests if self.warmup_requests is not None else chosen.warmup_requests
        if warmup is None:
            warmup = WARMUP_REQUESTS if ids and len(rows) > 2 * WARMUP_REQUESTS else 0
        if warmup >= len(rows):
            raise InputError(f"--warmup-requests {warmup}: {path} has {len(rows)} requests: give fewer")
        measured = {"ttft": float(ttft[warmup:].mean()), "e2e": float(e2e[warmup:].mean())}
        gaps = workload.output_tokens[warmup:] - 1
        if (several := gaps > 0).any():  # TPOT is of requests of two tokens and more
            measured["tpot"] = float(((e2e - ttft)[warmup:][several] / gaps[several]).mean())
        point = Point(
            id=path.stem, settings=settings, workload=workload, measured=measured, warmup_requests=warmup,
            load="open loop", per_request={"ttft": ttft, "e2e": e2e}, source=name, assumed=tuple(chosen.assumed),
        )  # fmt: skip
        notes = [note for note in workload.notes if not note.endswith("not used")]  # columns that a trace lacks
        return Measurements(name=path.name, format="requests", points=[point], assumed=tuple(notes))

    def _vllm(self, path: Path) -> Measurements:
        data = read_json(path, "give a result of vLLM's benchmark", _MOST_BYTES, constants=True)
        if not isinstance(data, dict) or not set(data) >= _VLLM_KEYS:
            raise InputError(f"{path} is no result of vLLM's benchmark: it lacks {', '.join(sorted(_VLLM_KEYS))}")
        settings = {**(self.chosen[1].settings("") if self.chosen else {}), "model": data.get("model_id")}
        settings = {name: value for name, value in {**settings, **self.given}.items() if value is not None}
        if "device" not in settings:
            raise InputError(f"{path} does not say which device was measured: give --device")
        self._check_unused(path)
        workload, assumed = _vllm_workload(path, data)
        if "engine" not in settings:
            assumed.append("the engine windtunnel (--engine says which one it was)")
        point = self._of_summary(path.stem, data, settings, workload)
        return Measurements(name=path.name, format="vllm", points=[point], assumed=tuple(assumed))

    # -- inside ----------------------------------------------------------------------------------------------------

    def _check_unused(self, path: Path) -> None:
        """Raise InputError for what was asked for and means nothing for a file that says how it was measured."""
        for flag, value in (("client", self.client_name), ("warmup-requests", self.warmup_requests)):
            if value is not None:
                raise InputError(f"--{flag} {value} has no meaning with {path}, which says how it was measured")

    def _source(self, form: str, has: set[str] | None = None) -> tuple[str, Source]:
        found = self.chosen or source_for(form, has or set())
        assert found is not None, f"no source ships for {form}"
        return found

    def _of_summary(self, name: str, summary: Settings, settings: Settings, workload: Workload) -> Point:
        measured = {}
        for measure, key in _SUMMARY_KEYS.items():
            if (value := summary.get(key)) is not None:
                if not _is_number(value):
                    raise InputError(f"{name}: {key} {value!r}: give a number")
                measured[measure] = float(value) / (1e3 if key.endswith("_ms") else 1.0)
        if not measured or not all(math.isfinite(value) and value > 0 for value in measured.values()):
            raise InputError(f"{name}: its figures {measured} are no times above 0: the run may have failed")
        if "e2e" not in measured and {"ttft", "tpot"} <= measured.keys():
            measured["e2e"] = measured["ttft"] + measured["tpot"] * (float(workload.output_tokens.mean()) - 1)
        load = f"{users} users" if (users := workload.client.max_concurrency) else "open loop"
        return Point(id=name, settings=settings, workload=workload, measured=measured, load=load)


def _is_run(path: Path) -> bool:
    return any((path / place / "summary.json").is_file() for place in (".", SERVER))


def _silicon(row: _Row) -> Point:
    if str(row.values.get("backend", "vllm")) != "vllm":
        raise InputError(f"backend {row['backend']}: vllm alone can be simulated")
    isl, osl, users = map(row.whole, ("isl", "osl", "concurrency"))
    device, assumed = row["system"], list[str]()
    settings = row.source.settings(device, isl, users)
    if row.has("backend_version"):
        settings["engine"], assumed = _engine(row["backend_version"])
    settings |= {"model": row["model_path"], "device": device, **_precision(row)}
    for key, what in (("tp_size", "tensor"), ("pp_size", "pipeline"), ("attention_dp_size", "data")):
        if row.has(key) and (ranks := row.whole(key)) > 1:
            settings[f"{what}_parallel_size"] = ranks
    if row.has("moe_ep_size") and row.whole("moe_ep_size") > 1:
        settings["enable_expert_parallel"] = True
    ttft, tpot = map(row.seconds, ("silicon_ttft_ms", "silicon_tpot_ms"))
    how = client(row.client_name or row.source.client)
    # a closed loop: requests all of the same lengths, or drawn from a share of them on
    prompts, outputs = (f"{max(1, round(how.shortest * nominal))}:{nominal}" for nominal in (isl, osl))
    spec = WorkloadSpec(
        lengths="uniform", input_len=prompts, output_len=outputs, num_prompts=how.requests_per_user * users,
        arrival="burst", max_concurrency=users, ramp_up_s=how.ramp_up_s,
    )  # fmt: skip
    return row.point(
        settings, assumed, workload=spec, measured={"ttft": ttft, "tpot": tpot, "e2e": ttft + tpot * (osl - 1)},
        warmup_requests=how.warmup_requests, statistic=how.statistic, output_tokens=osl, load=f"{users} users",
    )  # fmt: skip


def _averaged(frame: pd.DataFrame) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Return the means of points that stand more than once in a table of offline batches, and a note where some do."""
    keys = ["Hardware", "Num of Hardware", "Framework", "Model", "Input Output Length", "Batch Size"]
    repeated = len(frame) - len(frame[keys].drop_duplicates())
    frame = frame.assign(Latency=pd.to_numeric(frame["Latency"], errors="coerce"))
    frame = frame.groupby(keys, sort=False, dropna=False)["Latency"].mean().reset_index()
    return frame, (f"{repeated} points stand more than once: averaged",) if repeated else ()


def _offline_name(place: int, row: Settings) -> str:
    gpus = row["Num of Hardware"]
    ranks = f" TP{gpus:g}" if _is_number(gpus) else ""
    return f"{row['Model']}{ranks} {row['Input Output Length']} tokens x {row['Batch Size']}"


def _offline(row: _Row) -> Point:
    if row["Framework"].lower() != "vllm":
        raise InputError(f"framework {row['Framework']}: vllm alone can be simulated")
    length, batch, gpus = map(row.whole, ("Input Output Length", "Batch Size", "Num of Hardware"))
    latency = row.number("Latency")
    device, assumed = row.card("Hardware")
    own = {"model": row["Model"], "device": device, "tensor_parallel_size": gpus}
    spec = WorkloadSpec(lengths="fixed", input_len=length, output_len=length, num_prompts=batch, arrival="burst")
    measured = {"e2e": latency, "throughput": length * batch / latency}
    settings = {**row.source.settings(device), **own}
    latest = "max"  # the call that brings all prompts returns with the last request
    return row.point(settings, assumed, workload=spec, measured=measured, statistic=latest, load=f"batch {batch}")


def _aggregate(row: _Row) -> Point:
    rate, seconds = map(row.number, ("request_rate_per_s", "stage_seconds"))
    prompt, output = map(row.whole, ("input_tokens_about", "output_tokens_about"))
    device, assumed = row.card("hardware")
    settings = {**row.source.settings(device), "model": row["model"], "device": device}
    for key, setting in (("tp", "tensor_parallel_size"), ("max_num_batched_tokens", "max_num_batched_tokens")):
        if row.has(key):
            settings[setting] = row.whole(key)
    number = row.source.num_prompts_in_turn or 0
    later = row.values["stage_index"] if row.has("stage_index") else 0  # the stage before filled the cache
    if not _is_number(later):
        raise row.wrong("stage_index", "give a number from 0 on")
    # Poisson arrivals of prompts of one length, `number` different ones in turn (0: all different)
    count = max(2, round(rate * seconds))
    contents = [Content.of((1 + i % number, prompt), own(i)) for i in range(count)] if number else None
    lengths = np.full(count, prompt), np.full(count, output)
    columns = {"ttft": "ttft_mean_ms", "tpot": "itl_mean_ms", "e2e": "e2e_mean_ms"}
    return row.point(
        settings, assumed, workload=Workload("open loop", _poisson(rate, count), *lengths, 0, contents=contents),
        measured={name: row.seconds(key) for name, key in columns.items()},
        warmup_requests=number if later > 0 else 0, load=f"{rate:g} requests/s",
    )  # fmt: skip


_ROWS: dict[
    str, tuple[Callable[[int, Settings], str], Callable[[_Row], Point]]
] = {  # what errors call a row; its point
    "silicon": (lambda place, row: str(row.get("id") or f"row {place + 1}"), _silicon),
    "offline": (_offline_name, _offline),
    "aggregates": (
        lambda i, row: f"{row.get('exp_id', i)}-{row.get('stage_index', 0)} {row['model']} {row.get('workload', '')}",
        _aggregate,
    ),
}


def _poisson(rate: float, count: int) -> Array:
    return np.concatenate(([0.0], np.cumsum(np.random.default_rng(0).exponential(1 / rate, count - 1))))


def _vllm_workload(path: Path, data: Settings) -> tuple[Workload, list[str]]:
    """What a result of vLLM's benchmark says of the requests, and what it leaves to be assumed."""
    completed = data.get("completed")
    if not isinstance(completed, int) or isinstance(completed, bool) or not 1 <= completed <= 10_000_000:
        raise InputError(f"{path}: completed {completed!r}: give the result of a run that finished requests")
    assumed = []
    lengths = [data.get(key) for key in ("input_lens", "output_lens")]
    if all(isinstance(each, list) and len(each) >= completed for each in lengths):
        try:
            pairs = np.array(lengths, dtype=np.int64)
        except (ValueError, TypeError, OverflowError):
            raise InputError(f"{path}: input_lens and output_lens are no whole numbers of tokens") from None
        prompt, output = pairs[:, (pairs > 0).all(axis=0)]
    else:
        totals = [data.get(key) for key in ("total_input_tokens", "total_output_tokens")]
        if not all(isinstance(total, int | float) and total >= completed for total in totals):
            raise InputError(f"{path}: total_input_tokens and total_output_tokens {totals}: give counts of tokens")
        prompt, output = (np.full(completed, max(1, round(float(total or 0) / completed))) for total in totals)
        assumed.append("every request of the mean lengths (--save-detailed keeps each one's)")
    users, rate = data.get("max_concurrency"), data.get("request_rate")
    if users is not None and (not isinstance(users, int) or isinstance(users, bool)):
        raise InputError(f"{path}: max_concurrency {users!r}: give a whole number")
    if not (rate in (None, "inf") or _is_number(rate)):
        raise InputError(f"{path}: request_rate {rate!r}: give requests/s, or inf")
    arrived = np.zeros(len(prompt))
    if isinstance(rate, int | float) and 0 < rate < math.inf:
        arrived = _poisson(float(rate), len(prompt))
        assumed.append("Poisson arrivals, drawn anew")
    return Workload(path.stem, arrived, prompt, output, 0, client=ClientSpec(max_concurrency=users)), assumed


def _engine(version: str) -> tuple[str, list[str]]:
    """The preset of a vLLM version, and a note where it is the nearest one that ships."""
    known = [name for name in engine_names() if name.startswith("vllm@")]
    parts = version.split(".")
    wanted = f"vllm@{'.'.join(parts[:2])}"
    if wanted in known:
        return wanted, []
    try:
        number = int(parts[1])
    except (IndexError, ValueError):
        raise InputError(f"backend_version {version!r} is no version of vLLM such as 0.12.0") from None
    nearest = min(known, key=lambda name: abs(int(name.rpartition(".")[2]) - number))
    return nearest, [f"vLLM {version} behaves as {nearest.removeprefix('vllm@')}"]


def _precision(row: _Row) -> dict[str, str]:
    precision, gemm = str(row.values.get("precision") or "bf16").lower(), row.values.get("gemm_quant_mode")
    if precision in _PRECISIONS:
        return {"dtype": _PRECISIONS[precision]}
    return {"quantization": str(gemm) if _given(gemm) and gemm not in _PRECISIONS else precision}


def _device(hardware: str) -> str:
    """The device's name in the catalogue, from how a table spells it: the card, and its form where that is said."""
    words = [word for word in re.split(r"[^a-z0-9]+", hardware.lower()) if word and word not in ("nvidia", "gpu")]
    forms = [form for form in ("pcie", "sxm") if any(word.startswith(form) for word in words)]
    short = "_".join([*words[:1], *forms[:1]])
    whole = "_".join(words)
    return whole if catalog.is_name("device", whole) or not catalog.is_name("device", short) else short


def _named(columns: str | None) -> dict[str, str]:
    if columns is None:
        return {}
    for part in (parts := columns.split(",")):
        if "=" not in part or part.partition("=")[0] not in _REQUEST_COLUMNS:
            raise InputError(f"--columns {part!r}: give {'=..., '.join(_REQUEST_COLUMNS)}=...")
    return dict(part.split("=", 1) for part in parts)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _given(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value)) and value != ""
