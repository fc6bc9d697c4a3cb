"""The commands of Windtunnel: `windtunnel simulate --model Mistral-7B-v0.1 --device a100 --request-rate 1`.

Each command reads its settings and calls the module that does the work, imported only then.
"""

from __future__ import annotations

import errno
import inspect
import sys
from collections.abc import Callable
from copy import copy
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic import BaseModel

from engine.errors import InputError, one_line
from engine.results.folders import FREE, FULL
from engine.results.run_folder import InterruptedRunError
from engine.runtime.executor import WorkerError
from windtunnel.messages import in_flags
from windtunnel.names import nearest
from windtunnel.plugins import PluginError, blamed
from windtunnel.settings import (
    TOLERANCE,
    BenchConfig,
    FileConfig,
    GenerateConfig,
    LoadConfig,
    RunConfig,
    from_flags,
    load_file,
)
from windtunnel.settings import load as _load_config

_UsageError: Any = typer.BadParameter.__mro__[1]  # typer has its own copy of click in some versions, click's in others

app = typer.Typer(
    help="The wind tunnel for LLM serving: how a model on given GPUs behaves under a load.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


# options that several commands have
_Config = Annotated[Path | None, typer.Option(help="YAML file with any of these settings; flags override it.")]
_RunFolder = Annotated[Path | None, typer.Option(help="New folder for the results. Default: runs/ and the time.")]
_SummaryJson = Annotated[bool, typer.Option("--json", help="Print the summary as JSON on the last line.")]


@app.callback(invoke_without_command=True)
def _root(shown: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if shown:
        print(version("windtunnel"))


_ENDPOINT, _TIMEOUT_S = "completions", 300.0  # of a server that is measured, by default


def _check_no_server(
    needed: str, endpoint: str, timeout: float, ignore_eos: bool, served_model_name: str | None = None
) -> None:
    """Raise InputError for what was asked of a server where none is measured: `needed` would say which."""
    for flag, value, given in (
        ("--endpoint", endpoint, endpoint != _ENDPOINT),
        ("--timeout", timeout, timeout != _TIMEOUT_S),
        ("--ignore-eos", "", ignore_eos),
        ("--served-model-name", served_model_name, served_model_name is not None),
    ):
        if given:
            raise InputError(f"{flag}{' ' * bool(value)}{value} needs {needed}")


def _with_settings(kind: type[BaseModel], command: Callable[..., None]) -> Callable[..., None]:
    """Return `command` with a flag for each setting of a kind, passed to it (None: not given) as the dict `flags`."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "flags"]
    fields = {name: field for name, field in kind.model_fields.items() if field.json_schema_extra}
    settings = []
    for name, field in fields.items():
        default = field.get_default(call_default_factory=True)
        shown = "" if default in (None, "", []) else f" (default: {str(default).lower()})"
        extra = field.json_schema_extra
        option = typer.Option(
            f"--{name.replace('_', '-')}",
            help=f"{field.description}{shown}",
            metavar=_type_name(field.annotation),
            rich_help_panel=str(extra["panel"]) if isinstance(extra, dict) else None,
        )
        # text, which the settings read: their errors name the value
        text: Any = list[str] | None if get_origin(field.annotation) is list else str | None
        flag = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[text, option])
        settings.append(flag)

    def wrapped(**arguments: Any) -> None:
        flags = {name: arguments.pop(name) for name in fields}
        command(
            flags={name: value or None if isinstance(value, list) else value for name, value in flags.items()},
            **arguments,
        )

    wrapped.__doc__ = command.__doc__
    wrapped.__name__ = command.__name__
    wrapped.__signature__ = inspect.Signature([*settings, *own])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in (*settings, *own)}
    return wrapped


def _type_name(annotation: Any) -> str:
    """Return the name of a setting's type in the help."""
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)] or [annotation]
    names = {int: "INTEGER", float: "NUMBER", Path: "FILE"}
    return "TEXT" if len(kinds) > 1 else names.get(kinds[0], "TEXT")


@app.command()
@partial(_with_settings, RunConfig)
def simulate(
    *,
    flags: dict[str, Any],
    config: _Config = None,
    output_dir: _RunFolder = None,
    json_: _SummaryJson = False,
    chrome_trace: Annotated[bool, typer.Option("--chrome-trace", help="Also write trace.json for Perfetto.")] = False,
    operator_times: Annotated[
        bool,
        typer.Option("--operator-times", help="Also work out the run's time by kind of operator (a second or two)."),
    ] = False,
) -> None:
    """Simulate a deployment under a load and write a report."""
    from cli.clock import STARTED
    from cli.simulate import run

    run(
        _load_config(config, flags, FileConfig),
        output_dir,
        as_json=json_,
        chrome_trace=chrome_trace,
        operator_times=operator_times,
        started=STARTED,
    )


def _simulated_alone(flags: dict[str, Any]) -> None:
    """Raise InputError for a flag that only simulated runs heed."""
    if flags.get("uncertainty") is not None:
        raise InputError(
            f"--uncertainty {flags['uncertainty']} draws errors of predicted times: use it with simulate and search"
        )


@app.command()
@partial(_with_settings, BenchConfig)
def bench(
    *,
    flags: dict[str, Any],
    config: _Config = None,
    output_dir: _RunFolder = None,
    json_: _SummaryJson = False,
    chrome_trace: Annotated[bool, typer.Option("--chrome-trace", help="Also write trace.json for Perfetto.")] = False,
    url: Annotated[
        str | None,
        typer.Option(help="URL of an OpenAI-compatible server to measure in place of this machine's engine."),
    ] = None,
    endpoint: Annotated[str, typer.Option(help="With --url: endpoint of the server, completions or chat.")] = _ENDPOINT,
    timeout: Annotated[
        float, typer.Option(help="With --url: seconds without a byte after which a request failed.")
    ] = _TIMEOUT_S,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="With --url: ask for whole outputs, past the end-of-text token.")
    ] = False,
    save_result: Annotated[
        Path | None, typer.Option(help="With --url: JSON file to write, in the form of vLLM's benchmark results.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="WINDTUNNEL_API_KEY", help="With --url: the server's key. Default: none.")
    ] = None,
) -> None:
    """Serve a workload on this machine's engine, or send it to a server, in real time and write a report."""
    _simulated_alone(flags)
    if url is not None:
        from cli.bench_url import run as run_on_server

        LoadConfig.check(flags)
        if save_result is not None:
            from engine.results.files import check_output

            check_output(save_result, "--save-result")
        load = _load_config(config, flags, LoadConfig)
        server = {"url": url, "flag": "--url", "endpoint": endpoint, "timeout": timeout, "api_key": api_key,
                  "ignore_eos": ignore_eos}  # fmt: skip
        run_on_server(load, server, output_dir, save_result, as_json=json_)
        return
    if save_result is not None:
        raise InputError(f"--save-result {save_result} needs --url")
    _check_no_server("--url", endpoint, timeout, ignore_eos)
    from cli.bench import run

    run(_load_config(config, flags, BenchConfig), output_dir, as_json=json_, chrome_trace=chrome_trace)


@app.command()
@partial(_with_settings, BenchConfig)
def serve(
    *,
    flags: dict[str, Any],
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Serve simulated replicas in place of this machine's engine.")
    ] = False,
    time_scale: Annotated[
        float, typer.Option(help="Simulated seconds that pass in a real one, with --simulate.")
    ] = 1.0,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0: a free one.")] = 8000,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Name of the model in the API; repeatable. Default: --model.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="WINDTUNNEL_API_KEY", help="Key that clients have to bring. Default: none.")
    ] = None,
    max_queue: Annotated[
        int, typer.Option(help="Number of requests that may wait; more are turned away with status 503.")
    ] = 4096,
    config: _Config = None,
    output_dir: _RunFolder = None,
    json_: _SummaryJson = False,
) -> None:
    """Serve an OpenAI-compatible API, from this machine's engine or from simulated replicas, until SIGTERM."""
    _simulated_alone(flags)
    from cli.serve import run

    run(
        _load_config(config, flags, BenchConfig),
        simulated=simulate,
        time_scale=time_scale,
        address=(host, port),
        names=served_model_name or [],
        api_key=api_key,
        max_queue=max_queue,
        output_dir=output_dir,
        as_json=json_,
    )


@app.command()
@partial(_with_settings, BenchConfig)
def validate(
    *,
    flags: dict[str, Any],
    output_dir: Annotated[
        Path | None, typer.Option(help="New folder for the results. May be left out with --against.")
    ] = None,
    load: Annotated[
        str | None,
        typer.Option(
            "--load", help="Loads as shares of the capacity, such as 0.5,0.85,0.95, in place of --request-rate."
        ),
    ] = None,
    config: _Config = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="What to hold the simulator against, in place of this machine's engine: the URL of a server, or a "
            "file or folder of measured results (vLLM's benchmark "
            "JSON, a run's folder, AIConfigurator's or LLM-Inference-Bench's CSV, a CSV with a line a request)."
        ),
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="With a file: only the points whose id or load matches this regular expression.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(help="With a file: what the file does not say, by name or a YAML file. Default: by its columns."),
    ] = None,
    client: Annotated[
        str | None, typer.Option(help="With a file: who sent the requests: aiperf, inferencemax or vllm-bench.")
    ] = None,
    warmup_requests: Annotated[
        int | None,
        typer.Option(help="With a file: first requests to leave out. Default: 200 where there is a cache to warm."),
    ] = None,
    endpoint: Annotated[str, typer.Option(help="With a URL: endpoint of the server, completions or chat.")] = _ENDPOINT,
    timeout: Annotated[
        float, typer.Option(help="With a URL: seconds without a byte after which a request failed.")
    ] = _TIMEOUT_S,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="With a URL: ask for whole outputs, past the end-of-text token.")
    ] = False,
    served_model_name: Annotated[
        str | None, typer.Option(help="With a URL: the model's name at the server. Default: its first.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="WINDTUNNEL_API_KEY", help="With a URL: the server's key. Default: none.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the results as JSON on the last line.")] = False,
) -> None:
    """Run a workload on this machine's engine, or on a server, and in the simulator, and report the differences."""
    url = against is not None and against.startswith(("http://", "https://"))
    if not url:
        _check_no_server("--against with a URL", endpoint, timeout, ignore_eos, served_model_name)
    for flag, value in (("only", only), ("source", source), ("client", client), ("warmup-requests", warmup_requests)):
        if value is not None and (against is None or url):
            raise InputError(f"--{flag} {value} needs --against with a file of measured results")
    if against is not None and not url:
        from cli.validate_measured import run as run_measured

        given = load_file(config, FileConfig)
        given |= {name: value for name, value in flags.items() if value is not None}
        columns = given.pop("columns", None)
        uncertainty = from_flags(RunConfig, {"uncertainty": given.pop("uncertainty", None)}).uncertainty
        if load is not None:
            raise InputError(f"--load {load} has no meaning with --against: the load is the measured one")
        run_measured(
            Path(against), given, output_dir, only=only, source=source, client=client, columns=columns,
            warmup_requests=warmup_requests, uncertainty=uncertainty, as_json=json_,
        )  # fmt: skip
        return
    _simulated_alone(flags)
    if output_dir is None:
        raise InputError("no --output-dir: name a new folder for the results")
    settings = _load_config(config, flags, BenchConfig)
    if url:
        from cli.validate_url import run as run_against

        server = {"url": against, "flag": "--against", "endpoint": endpoint, "timeout": timeout, "api_key": api_key,
                  "ignore_eos": ignore_eos}  # fmt: skip
        run_against(settings, server, load, served_model_name, output_dir, as_json=json_)
        return
    from cli.validate import run

    run(settings, load, output_dir, as_json=json_)


@app.command()
@partial(_with_settings, BenchConfig)
def search(
    *,
    flags: dict[str, Any],
    output_dir: Annotated[Path, typer.Option(help="Folder for the results; an interrupted search in it resumes.")],
    config: _Config = None,
    sweep: Annotated[
        Path | None, typer.Option(help="YAML file of settings, with the varied ones under `sweep`.")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Precision of the capacity, as a share of it.")] = TOLERANCE,
    gpu_price: Annotated[
        str | None,
        typer.Option(help="Price in dollars per GPU-hour, to report requests per dollar: 2.5, or a100=2,h100=4."),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            help="Workloads to find each capacity for, for ranges without errors of the predicted times; "
            "1: no ranges. Default: 4 draws of seeds and errors, or as many as --uncertainty says."
        ),
    ] = None,
    curve: Annotated[
        bool, typer.Option(help="Also simulate loads beyond each capacity, for the page's latency against load.")
    ] = True,
    keep_runs: Annotated[
        bool, typer.Option("--keep-runs", help="Keep every trial's tables in a sweep, not only settings and summary.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Number of processes, for a sweep's points and for draws. Default: one per core.")
    ] = None,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster to distribute a sweep over.")] = None,
    confirm: Annotated[
        bool, typer.Option("--confirm", help="Also run the predicted capacity on this machine's engine.")
    ] = False,
    top_k: Annotated[int, typer.Option(min=1, help="Number of sweep points to confirm, the best per GPU first.")] = 1,
    json_: Annotated[bool, typer.Option("--json", help="Print the results as JSON on the last line.")] = False,
) -> None:
    """Find the highest request rate at which every SLO holds."""
    from cli.search import run

    code = run(
        config,
        flags,
        output_dir,
        sweep=sweep,
        tolerance=tolerance,
        seeds=seeds,
        curve=curve,
        keep_runs=keep_runs,
        gpu_price=gpu_price,
        workers=workers,
        ray_address=ray,
        confirm_top=top_k if confirm else 0,
        as_json=json_,
    )
    raise typer.Exit(code)


@app.command()
@partial(_with_settings, RunConfig)
def plan(
    *,
    flags: dict[str, Any],
    devices: Annotated[
        str | None, typer.Option(help="Devices to choose from, separated by commas: h100_sxm,a100_sxm,l40s.")
    ] = None,
    gpu_price: Annotated[
        str | None, typer.Option(help="Price in dollars per GPU-hour: 2.5, or h100_sxm=2.5,a100_sxm=1.5.")
    ] = None,
    config: _Config = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Folder for the results. Default: in runs/, by the settings: the same command resumes."),
    ] = None,
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="Size every point, also those that bounds dismiss.")
    ] = False,
    workers: Annotated[int | None, typer.Option(help="Number of processes. Default: one per core.")] = None,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster to distribute the plan over.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the plan as JSON on the last line.")] = False,
) -> None:
    """Find the cheapest fleet that meets the SLOs at a request rate, and its price.

    Layouts, engines, --quantization, --max-num-batched-tokens and --max-num-seqs may be lists, separated by commas.
    """
    from cli.plan import run

    code = run(
        config,
        flags,
        devices=devices,
        gpu_price=gpu_price,
        workers=workers,
        ray_address=ray,
        exhaustive=exhaustive,
        output_dir=output_dir,
        as_json=json_,
    )
    raise typer.Exit(code)


@app.command()
@partial(_with_settings, GenerateConfig)
def generate(
    *,
    flags: dict[str, Any],
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt text; repeatable.")] = None,
    prompt_token_ids: Annotated[
        list[str] | None, typer.Option(help="Prompt as token ids, such as 1,2,3; repeatable.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Continue past the end-of-text token.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the token ids of prompts and outputs as JSON.")] = False,
) -> None:
    """Generate from prompts on this machine's engine."""
    from cli.generate import run

    run(from_flags(GenerateConfig, flags), prompt or [], prompt_token_ids or [], ignore_eos=ignore_eos, as_json=json_)


@app.command()
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Folders of runs, searches, sweeps, validations or of one study."),
    ],
    output: Annotated[
        Path | None, typer.Option(help="HTML file to write. Default: in the folder; comparison.html for several.")
    ] = None,
    standalone: Annotated[
        bool, typer.Option("--standalone", help="Put the plot library into the page, to send it as one file.")
    ] = False,
) -> None:
    """Write one offline page about a run, search, sweep, study or validation, or about several side by side."""
    from cli.report import run

    run(folders, output, standalone)


@app.command()
def profile(
    *,
    models: Annotated[
        str, typer.Option(help="Models, separated by commas: known names or folders with a config.json.")
    ],
    output_dir: Annotated[
        Path, typer.Option(help="Folder for the measurements; an interrupted profile in it resumes.")
    ],
    device: Annotated[
        str, typer.Option(help="This machine's device: cpu, a known name, a YAML file, or auto.")
    ] = "auto",
    tensor_parallel_sizes: Annotated[
        str, typer.Option(help="Tensor parallel sizes to profile, separated by commas.")
    ] = "1",
    budget: Annotated[str, typer.Option(help="Time to spend, such as 90s, 8m or 1h.")] = "8m",
    dtype: Annotated[str, typer.Option(help="Data type: auto, bfloat16, float16 or float32.")] = "auto",
    attention_backend: Annotated[
        str | None, typer.Option(help="Attention backend. Default: the best one installed.")
    ] = None,
    block_size: Annotated[int, typer.Option(help="Number of tokens in a KV block.")] = 16,
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(
            help="Largest batch to profile (tokens). Default: 8192, on a CPU 512, or --max-model-len if lower."
        ),
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(help="Largest batch to profile (requests). Default: 256, on a CPU 32.")
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            help="Longest request to profile (tokens). Default: 32768, on a CPU 1024, or the model's if lower."
        ),
    ] = None,
) -> None:
    """Measure the engine's operators, collectives and iterations on this machine for given models."""
    from cli.profile import run

    run(
        device,
        models,
        tensor_parallel_sizes,
        budget,
        output_dir,
        dtype=dtype,
        attention_backend=attention_backend,
        block_size=block_size,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
    )


@app.command()
def selfcheck(
    *,
    output_dir: Annotated[Path, typer.Option(help="New or empty folder for the results.")],
    device: Annotated[str, typer.Option(help="Device to check: cuda or cpu.")] = "cuda",
    budget: Annotated[str, typer.Option(help="Time to spend, such as 400s or 9m.")] = "9m",
) -> None:
    """Profile, validate, benchmark and test this machine within a time budget, each step in its own process."""
    from studies.selfcheck import main

    raise typer.Exit(main(["--device", device, "--budget", budget, "--output-dir", str(output_dir)]))


@app.command()
def engines(
    name: Annotated[str | None, typer.Argument(help="An engine preset or a YAML file. Default: all that ship.")] = None,
    device: Annotated[str, typer.Option(help="Device whose limits to show.")] = "h100",
    usage: Annotated[str, typer.Option(help="Limits to show: server or offline.")] = "server",
    model: Annotated[
        str | None, typer.Option(help="Model of which to show a replica's settings and KV blocks.")
    ] = None,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="Number of GPUs of that replica.")] = 1,
) -> None:
    """List the engine presets: what each decides, and where its numbers come from."""
    from cli.engines import show

    show(name, device, usage, model, tensor_parallel_size)


calibrate = typer.Typer(help="Fit a device's calibration to measurements, show it, evaluate it.", no_args_is_help=True)
app.add_typer(calibrate, name="calibrate")

_Device = Annotated[str, typer.Option(help="Known device, or the folder of a calibration.")]


_Software = Annotated[
    list[str] | None,
    typer.Option(
        help="Engine and version whose measurements to take, such as vllm@0.14, and nccl@2.27; repeatable. Needed "
        "where tables hold several."
    ),
]
_Dtype = Annotated[str | None, typer.Option(help="Only matrix products of this dtype: bfloat16, fp8, fp8_block.")]
_KvDtype = Annotated[str | None, typer.Option(help="Only attention over a KV cache of this dtype: bfloat16, fp8.")]
_Window = Annotated[int, typer.Option(help="Attention's sliding window whose measurements to take; 0: none.")]


@calibrate.command("fit")
def _fit(
    source: Annotated[
        list[str],
        typer.Option(
            help="Measurements: profile:DIR, vidur:DIR or aiconfigurator:DIR; repeatable. Each kind of operator "
            "comes from the first source that has it."
        ),
    ],
    device: Annotated[str | None, typer.Option(help="Known device. Default: that of the profile.")] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write, which can then be given as --device. Default: that of the profile, else the "
            "device's in calibration_data."
        ),
    ] = None,
    software: _Software = None,
    dtype: _Dtype = None,
    kv_cache_dtype: _KvDtype = None,
    window: _Window = 0,
) -> None:
    """Fit a calibration to a profile or to public tables, and write it."""
    from cli.calibrate import fit, selection

    fit(device, source, output_dir, selection(software, dtype, kv_cache_dtype, window))


@calibrate.command("show")
def _show(
    device: _Device,
    software: Annotated[
        str | None, typer.Option(help="Engine and version, such as vllm@0.14. Default: the latest measured.")
    ] = None,
) -> None:
    """Print a device's calibration: its sources, ranges and held-out errors."""
    from cli.calibrate import show

    show(device, software)


@calibrate.command("evaluate")
def _evaluate(
    device: _Device,
    test: Annotated[list[str], typer.Option(help="Tables to predict: DIR or KIND:DIR; repeatable.")],
    train: Annotated[
        list[str] | None, typer.Option(help="Tables to fit to; repeatable. Default: the calibration that ships.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the errors as JSON, as the last line.")] = False,
    software: _Software = None,
    dtype: _Dtype = None,
    kv_cache_dtype: _KvDtype = None,
    window: _Window = 0,
) -> None:
    """Print the errors on tables that a calibration was not fitted to, and how many its intervals cover."""
    from cli.calibrate import evaluate, selection

    evaluate(device, train or [], test, json_, selection(software, dtype, kv_cache_dtype, window))


@calibrate.command("truth")
def _truth(
    output: Annotated[Path, typer.Option(help="Markdown file to write; its record is beside it (.json).")],
    public: Annotated[
        Path | None,
        typer.Option(help="Folder of the public measurements, to predict all sets anew. Default: from the record."),
    ] = None,
) -> None:
    """Write the page of predictions beside public measurements of servers."""
    from engine.results.files import check_output
    from windtunnel.truth import write_truth

    check_output(output)
    write_truth(output, public, lambda name: print(name, file=sys.stderr))


@calibrate.command("adjust")
@partial(_with_settings, RunConfig)
def calibrate_adjust(
    *,
    results: Annotated[
        Path, typer.Argument(help="Measured results of your server, as `validate --against` reads them.")
    ],
    flags: dict[str, Any],
    output: Annotated[Path, typer.Option(help="New YAML file for the preset, which --engine takes.")],
    fit: Annotated[
        str | None,
        typer.Option(
            help="Constants and kinds of operators to fit, such as iteration_s,gemm. Default: the host's, every kind."
        ),
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Fit to the points whose id or load matches this regular expression alone.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with settings of the replica; flags override it.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="What the file leaves open, by name or a YAML file.")] = None,
    client: Annotated[
        str | None, typer.Option(help="Who sent the requests: aiperf, inferencemax or vllm-bench.")
    ] = None,
    warmup_requests: Annotated[int | None, typer.Option(help="First requests to leave out.")] = None,
) -> None:
    """Fit an engine's host constants to benchmark results of your own server and write them as a preset."""
    from cli.adjust import run

    given = load_file(config, FileConfig) | {name: value for name, value in flags.items() if value is not None}
    columns = given.pop("columns", None)
    free = tuple(fit.split(",")) if fit else ()
    run(
        results, given, output, free=free, only=only, source=source, client=client, columns=columns,
        warmup_requests=warmup_requests,
    )  # fmt: skip


@calibrate.command("report")
def _report(
    device: _Device,
    output: Annotated[Path, typer.Option(help="HTML file to write.")],
    source: Annotated[list[str] | None, typer.Option(help="Tables to draw beside the predictions; repeatable.")] = None,
) -> None:
    """Write a page about a device's calibration: held-out errors, measured and predicted."""
    from cli.calibrate import read
    from engine.results.files import check_output
    from engine.specs import catalog
    from simulator.predictor.calibration import load_of
    from studies.pages.calibration import write_calibration_report

    check_output(output)
    known = catalog.device(device)
    frames = [read(text, known) for text in source or []]
    print(f"report: {write_calibration_report(load_of(known), known, frames, output)}")


@calibrate.command("accuracy")
def _accuracy(
    output: Annotated[Path | None, typer.Option(help="Markdown file to write. Default: print.")] = None,
) -> None:
    """Print or write the held-out errors of the calibrations that ship."""
    from engine.results.files import check_output
    from studies.calibration.accuracy import write_accuracy

    if output is not None:
        check_output(output)
    write_accuracy(output)


study = typer.Typer(help="Simulate published experiments and compare with the published numbers.", no_args_is_help=True)
app.add_typer(study, name="study")


@study.command("list")
def _study_list() -> None:
    """List the studies."""
    from cli.study import show

    show()


@study.command("run")
def _study_run(
    name: Annotated[str, typer.Argument(help="Name of a study, from `windtunnel study list`, or all.")],
    model: Annotated[
        str | None, typer.Option(help="Run only the models whose name contains this. Default: all.")
    ] = None,
    host_overhead: Annotated[
        str | None,
        typer.Option(
            help="Host overhead. Default: sarathi_osdi24 (as published), cuda_graphs, and beside them "
            "sarathi_osdi24_fig2 and two placebos."
        ),
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(help="Requests per run. Default: the study's.")] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Draws of the requests, seeds from 0; tables show medians. Default: 3.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Number of processes. Default: one per core.")] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Folder for the results; an interrupted study in it resumes. Default: runs/studies/NAME."),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(help="JSON file to keep the results in; the page of all that it has is written beside it."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the results as JSON on the last line.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the results as Markdown, as in docs/studies.md.")
    ] = False,
    confirm: Annotated[
        bool, typer.Option("--confirm", help="Confirm on an engine (not implemented for studies).")
    ] = False,
) -> None:
    """Simulate a published experiment and write a page that compares it with the published numbers."""
    from cli.study import run_study

    run_study(
        name,
        model,
        host_overhead,
        num_prompts,
        seeds,
        workers,
        output_dir,
        record,
        as_json=json_,
        as_markdown=markdown,
        confirm=confirm,
    )


_SWITCHES = frozenset(
    f"--{name.replace('_', '-')}"
    for name, field in {**BenchConfig.model_fields, **GenerateConfig.model_fields}.items()
    if bool in (field.annotation, *get_args(field.annotation))
)


def _one_each(arguments: list[str]) -> list[str]:
    """Return the arguments with one value for each flag that takes one.

    Several folders may follow a flag (`--train A B` is `--train A --train B`), and a setting that is true or false may
    stand alone, as in vLLM: `--enable-prefix-caching` and `--no-enable-prefix-caching`.
    """
    result: list[str] = []
    flag = None
    for word, following in zip(arguments, [*arguments[1:], "--"], strict=True):
        if word in _SWITCHES and following.startswith("--"):
            result += [word, "true"]
            flag = None
            continue
        if word.startswith("--no-") and (switch := f"--{word.removeprefix('--no-')}") in _SWITCHES:
            result += [switch, "false"]
            flag = None
            continue
        if word.startswith("-"):
            flag = word if word in ("--train", "--test", "--source") else None
        elif flag is not None and result[-1] != flag:
            result.append(flag)
        result.append(word)
    return result


def _app_of(arguments: list[str]) -> typer.Typer:
    """Return the application with the command asked for alone: to build all takes a tenth of a short run's start-up."""
    name = arguments[0] if arguments else ""
    one = copy(app)
    one.registered_commands = [c for c in app.registered_commands if c.callback and c.callback.__name__ == name]
    one.registered_groups = [group for group in app.registered_groups if group.name == name]
    return one if one.registered_commands or one.registered_groups else app


def run(arguments: list[str] | None = None) -> tuple[int, str]:
    """Run the command line and return its exit code and error message: 2 is bad input, 1 the machine's fault."""
    try:
        given = _one_each(sys.argv[1:] if arguments is None else arguments)
        code = _app_of(given)(given, standalone_mode=False) or 0
    except typer.Abort as error:  # typer's word for Ctrl-C, here and there
        raise KeyboardInterrupt from error
    except SystemExit as error:  # of a plugin: our own commands raise typer.Exit
        if blamed(error) is None:
            raise
        return _explained(error)
    except Exception as error:
        return _explained(error)
    if code == 130:
        raise KeyboardInterrupt
    return code, ""


def _explained(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the message of an error; raise it again if it is a defect of Windtunnel."""
    plugin = error if isinstance(error, PluginError) else blamed(error)
    if plugin is not None:
        print(plugin.frames, file=sys.stderr, end="")
        return plugin.code, in_flags(str(plugin))
    if isinstance(error, InputError):
        return 2, one_line(in_flags(str(error)))
    if isinstance(error, _UsageError):
        return 2, one_line(_usage(error))
    if isinstance(error, WorkerError):
        return 1, str(error)
    if isinstance(error, InterruptedRunError):
        return 130, str(error)
    if isinstance(error, MemoryError):
        return 1, f"out of memory{f' ({error})' if str(error) else ''}: lower --num-prompts"
    if isinstance(error, OSError) and error.errno in FULL:
        return 2, f"can't write{f' to {error.filename}' if error.filename else ''}: {error.strerror}: {FREE}"
    if isinstance(error, OSError):
        code = 2 if error.errno == errno.ENAMETOOLONG else 1  # that was given, and the world has nothing to do with it
        return code, one_line(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    raise error


def _usage(error: Any) -> str:
    """Return the message of a wrong command line, with the flag that an unknown one likely stands for."""
    context = error.ctx
    command = context.command_path if context is not None else "windtunnel"
    message = error.format_message()
    if context is not None and (flag := getattr(error, "option_name", None)) is not None:
        known = {name.lstrip("-"): name for parameter in context.command.params for name in parameter.opts}
        found = nearest(flag.lstrip("-"), known)
        message = f"unknown flag {flag}" + (f": did you mean {known[found]}?" if found is not None else "")
    return f"{message} (see {command} --help)" if message else ""  # no words: the help was printed
