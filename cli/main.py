"""The doors of Windtunnel: `windtunnel simulate --model Mistral-7B-v0.1 --device a100 --request-rate 1`.

Thin: each command reads its settings and calls the module that does the work, importing it only then.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic import BaseModel

from engine.errors import InputError
from engine.results.run_folder import InterruptedRunError
from engine.runtime.executor import WorkerError
from windtunnel.messages import in_flags
from windtunnel.names import nearest
from windtunnel.plugins import PluginError, blamed
from windtunnel.settings import TOLERANCE, BenchConfig, FileConfig, GenerateConfig, RunConfig, from_flags
from windtunnel.settings import load as _load_config

_UsageError: Any = typer.BadParameter.__mro__[1]  # typer has its own copy of click in some versions, click's in others

app = typer.Typer(
    help="The wind tunnel for LLM serving: how a model on given GPUs behaves under a load.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(shown: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if shown:
        print(version("windtunnel"))


def _with_settings(kind: type[BaseModel], command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` a flag for each setting of a kind; it gets them (None: not given) as the dict `flags`."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "flags"]
    fields = {name: field for name, field in kind.model_fields.items() if field.json_schema_extra}
    settings = []
    for name, field in fields.items():
        default = field.get_default(call_default_factory=True)
        shown = "" if default in (None, "", []) else f" (default: {default})"
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
    """What to call a setting's type in the help."""
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)] or [annotation]
    names = {int: "INTEGER", float: "NUMBER", Path: "FILE"}
    return "TEXT" if len(kinds) > 1 else names.get(kinds[0], "TEXT")


@app.command()
@partial(_with_settings, RunConfig)
def simulate(
    *,
    flags: dict[str, Any],
    config: Annotated[Path | None, typer.Option(help="YAML file with any of these settings; flags win.")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Folder for the results; must not exist.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the summary as JSON, as the last line.")] = False,
    chrome_trace: Annotated[bool, typer.Option("--chrome-trace", help="Also write trace.json for Perfetto.")] = False,
) -> None:
    """Simulate a deployment under a load and write a report."""
    from cli.clock import STARTED
    from cli.simulate import run

    run(_load_config(config, flags, FileConfig), output_dir, as_json=json_, chrome_trace=chrome_trace, started=STARTED)


@app.command()
@partial(_with_settings, BenchConfig)
def bench(
    *,
    flags: dict[str, Any],
    config: Annotated[Path | None, typer.Option(help="YAML file with any of these settings; flags win.")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Folder for the results; must not exist.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the summary as JSON, as the last line.")] = False,
    chrome_trace: Annotated[bool, typer.Option("--chrome-trace", help="Also write trace.json for Perfetto.")] = False,
) -> None:
    """Serve a workload on the engine of this machine, in real time, and write a report."""
    from cli.bench import run

    run(_load_config(config, flags, BenchConfig), output_dir, as_json=json_, chrome_trace=chrome_trace)


@app.command()
@partial(_with_settings, BenchConfig)
def validate(
    *,
    flags: dict[str, Any],
    output_dir: Annotated[Path, typer.Option(help="Folder for the results; must not exist.")],
    load: Annotated[
        str | None, typer.Option("--load", help="Shares of the capacity, such as 0.5,0.85,0.95, instead of a rate.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with any of these settings; flags win.")] = None,
    against: Annotated[
        str | None, typer.Option(help="URL of an OpenAI-compatible server to validate instead (not there yet).")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the results as JSON, as the last line.")] = False,
) -> None:
    """Run a workload on this machine's engine and in the simulator, and say how far apart they are, and why."""
    from cli.validate import run

    settings = _load_config(config, flags, BenchConfig)
    run(settings, load, against, output_dir, as_json=json_)


@app.command()
@partial(_with_settings, BenchConfig)
def search(
    *,
    flags: dict[str, Any],
    output_dir: Annotated[Path, typer.Option(help="Folder for the results; a search that was begun goes on.")],
    config: Annotated[Path | None, typer.Option(help="YAML file with any of these settings; flags win.")] = None,
    sweep: Annotated[Path | None, typer.Option(help="YAML file of settings, and under `sweep` what varies.")] = None,
    tolerance: Annotated[float, typer.Option(help="How finely to search: a share of the capacity.")] = TOLERANCE,
    gpu_price: Annotated[
        str | None, typer.Option(help="Dollars per GPU-hour, for requests per dollar: 2.5, or a100=2,h100=4.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes of a sweep; default: one a core.")] = None,
    ray: Annotated[str | None, typer.Option(help="Spread a sweep over the Ray cluster at this address.")] = None,
    confirm: Annotated[
        bool, typer.Option("--confirm", help="Run the predicted capacity on this node's engine.")
    ] = False,
    top_k: Annotated[int, typer.Option(min=1, help="Points of a sweep to confirm, the best per GPU first.")] = 1,
    json_: Annotated[bool, typer.Option("--json", help="Print the results as JSON, as the last line.")] = False,
) -> None:
    """Find the highest request rate at which every SLO holds."""
    from cli.search import run

    code = run(
        config,
        flags,
        output_dir,
        sweep=sweep,
        tolerance=tolerance,
        gpu_price=gpu_price,
        workers=workers,
        ray_address=ray,
        confirm_top=top_k if confirm else 0,
        as_json=json_,
    )
    raise typer.Exit(code)


@app.command()
@partial(_with_settings, GenerateConfig)
def generate(
    *,
    flags: dict[str, Any],
    prompt: Annotated[list[str] | None, typer.Option(help="Text to go on from; may be given several times.")] = None,
    prompt_token_ids: Annotated[
        list[str] | None, typer.Option(help="Token ids such as 1,2,3 to go on from; may be given several times.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end-of-text token.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print prompts' and generated token ids as JSON.")] = False,
) -> None:
    """Go on from some prompts with the engine of this machine."""
    from cli.generate import run

    run(from_flags(GenerateConfig, flags), prompt or [], prompt_token_ids or [], ignore_eos=ignore_eos, as_json=json_)


@app.command()
def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Folders of runs, searches, sweeps, a study, validations.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="HTML file to write. Default: in the folder; of several, comparison.html.")
    ] = None,
) -> None:
    """Make one offline page of a run, search, sweep, study or validation, or of several side by side."""
    from cli.report import run

    run(folders, output)


@app.command()
def profile(
    *,
    models: Annotated[str, typer.Option(help="Known models or folders with a config.json, with commas between.")],
    output_dir: Annotated[Path, typer.Option(help="Folder for the measurements; one that was begun goes on.")],
    device: Annotated[str, typer.Option(help="This machine's device: cpu, a name, a YAML file, or auto.")] = "auto",
    tensor_parallel_sizes: Annotated[str, typer.Option(help="Ranks that share a layer, with commas between.")] = "1",
    budget: Annotated[str, typer.Option(help="Time to spend: 90s, 8m, 1h.")] = "8m",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    attention_backend: Annotated[str | None, typer.Option(help="Default: the best that is installed.")] = None,
    block_size: Annotated[int, typer.Option(help="Tokens in a KV block.")] = 16,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Largest batch (tokens).")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Most requests in a batch.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest request (tokens).")] = None,
) -> None:
    """Measure this machine: the engine's operators, collectives and iterations for some models."""
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
    output_dir: Annotated[Path, typer.Option(help="Folder for the results; must be empty.")],
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    budget: Annotated[str, typer.Option(help="Time to spend, such as 400s or 9m.")] = "9m",
) -> None:
    """Profile, validate and test this machine within a budget of time, each step on its own."""
    from studies.selfcheck import main

    raise typer.Exit(main(["--device", device, "--budget", budget, "--output-dir", str(output_dir)]))


@app.command()
def engines(
    device: Annotated[str, typer.Option(help="Device whose limits to show.")] = "h100",
) -> None:
    """List the engine presets: what each decides, and where its numbers come from."""
    from cli.engines import show

    show(device)


calibrate = typer.Typer(help="Learn a device's calibration from measurements, show it, try it.", no_args_is_help=True)
app.add_typer(calibrate, name="calibrate")

_Device = Annotated[str, typer.Option(help="A known device, or a calibration's folder.")]


@calibrate.command("fit")
def _fit(
    source: Annotated[
        list[str],
        typer.Option(help="profile:DIR, vidur:DIR or aiconfigurator:DIR; the first that has a kind gives it."),
    ],
    device: Annotated[str | None, typer.Option(help="A known device; a profile says by itself what it is of.")] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder; default: a profile's own, else the device's in calibration_data.")
    ] = None,
) -> None:
    """Learn a calibration from a profile or from public tables, and write it."""
    from cli.calibrate import fit

    fit(device, source, output_dir)


@calibrate.command("show")
def _show(device: _Device) -> None:
    """What is known of a device, from where, and how well it predicts."""
    from cli.calibrate import show

    show(device)


@calibrate.command("evaluate")
def _evaluate(
    device: _Device,
    test: Annotated[list[str], typer.Option(help="Tables to predict: DIR, or KIND:DIR.")],
    train: Annotated[
        list[str] | None, typer.Option(help="Tables to learn from; by default what ships is tried.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the errors as JSON, as the last line.")] = False,
) -> None:
    """Errors on tables that a calibration was not fitted to."""
    from cli.calibrate import evaluate

    evaluate(device, train or [], test, json_)


@calibrate.command("report")
def _report(
    device: _Device,
    output: Annotated[Path, typer.Option(help="HTML file to write.")],
    source: Annotated[list[str] | None, typer.Option(help="Tables to draw beside the predictions.")] = None,
) -> None:
    """Write a page about a device's calibration: held-out errors, measured and predicted."""
    from cli.calibrate import read
    from engine.specs import catalog
    from studies.pages.calibration import report

    known = catalog.device(device)
    print(f"report: {report(device, [read(text, known) for text in source or []], output)}")


@calibrate.command("accuracy")
def _accuracy(
    output: Annotated[Path | None, typer.Option(help="Markdown file; by default it is printed.")] = None,
) -> None:
    """Print or write how well the calibrations that ship predict data that was held out."""
    from studies.calibration.accuracy import write_accuracy

    write_accuracy(output)


study = typer.Typer(help="Published experiments, simulated, beside what was published.", no_args_is_help=True)
app.add_typer(study, name="study")


@study.command("list")
def _study_list() -> None:
    """The studies there are."""
    from cli.study import show

    show()


@study.command("run")
def _study_run(
    name: Annotated[str, typer.Argument(help="A study of `windtunnel study list`.")],
    model: Annotated[str | None, typer.Option(help="Only the models that have this in their name.")] = None,
    host_overhead: Annotated[
        str | None, typer.Option(help="Default: sarathi_osdi24, as published, and cuda_graphs, a modern engine.")
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(help="Requests a run; default: the study's own.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; default: one for each core.")] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Folder for the results; one that was begun goes on. Default: runs/studies/NAME."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the results as JSON, as the last line.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the study's section of docs/studies.md.")] = False,
    confirm: Annotated[bool, typer.Option("--confirm", help="Confirm on an engine (not there for studies).")] = False,
) -> None:
    """Run a published experiment in the simulator and write a page: published numbers beside ours."""
    from cli.study import run_study

    run_study(
        name,
        model,
        host_overhead,
        num_prompts,
        workers,
        output_dir,
        as_json=json_,
        as_markdown=markdown,
        confirm=confirm,
    )


def _one_each(arguments: list[str]) -> list[str]:
    """`--train A B --test C` as `--train A --train B --test C`: several folders may follow one flag."""
    result: list[str] = []
    flag = None
    for word in arguments:
        if word.startswith("-"):
            flag = word if word in ("--train", "--test", "--source") else None
        elif flag is not None and result[-1] != flag:
            result.append(flag)
        result.append(word)
    return result


def run(arguments: list[str] | None = None) -> tuple[int, str]:
    """Run the command line and return its exit code and error message: 2 is bad input, 1 the machine's fault."""
    try:
        code = app(_one_each(sys.argv[1:] if arguments is None else arguments), standalone_mode=False) or 0
    except typer.Abort as error:  # typer's word for Ctrl-C, here and there
        raise KeyboardInterrupt from error
    except Exception as error:
        return _explained(error)
    if code == 130:
        raise KeyboardInterrupt
    return code, ""


def _explained(error: Exception) -> tuple[int, str]:
    """Return the exit code and the message of an error; raise it again if it is a defect of Windtunnel."""
    plugin = error if isinstance(error, PluginError) else blamed(error)
    if plugin is not None:
        print(plugin.frames, file=sys.stderr, end="")
        return plugin.code, in_flags(str(plugin))
    if isinstance(error, InputError):
        return 2, in_flags(str(error))
    if isinstance(error, _UsageError):
        return 2, _usage(error)
    if isinstance(error, WorkerError):
        return 1, str(error)
    if isinstance(error, InterruptedRunError):
        return 130, str(error)
    if isinstance(error, MemoryError):
        return 1, f"out of memory{f' ({error})' if str(error) else ''}: lower --num-prompts"
    if isinstance(error, OSError):
        return 1, f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
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
