"""Rules of the house: packages import in one direction, nothing imports in a circle, and torch stays where it belongs.

Imports are read from the source, those inside functions and under TYPE_CHECKING included.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ("engine", "profiler", "simulator", "studies", "windtunnel", "cli")  # each may import those before it
PACKAGES = [package for package in ORDER if (ROOT / package).is_dir()]
HEAVY = {  # what takes seconds to import or is not always installed, and where alone it may be imported
    "torch": ("engine/worker/", "profiler/"),
    "safetensors": ("engine/worker/",),
    "flash_attn": ("engine/worker/attention/",),
    "flashinfer": ("engine/worker/attention/",),
    "transformers": ("engine/server/text.py", "engine/workload/traces.py"),
    "fastapi": ("engine/server/",),
    "uvicorn": ("engine/server/",),
    "prometheus_client": ("engine/server/",),
    "aiohttp": ("engine/loadgen/",),
    "ray": ("engine/executors/ray_executor.py", "studies/jobs/pool.py"),
}
TIMING = {  # the half of the profiler that runs kernels, which torch is for
    "profiler.collectives",
    "profiler.in_situ",
    "profiler.profile",
    "profiler.timer",
    "profiler.timing",
    "profiler.workbench",
}


def name_of(path: Path) -> str:
    """Return the name that a source file is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imported(tree: ast.AST, modules: Mapping[str, Path]) -> Iterator[str]:
    """Yield what is imported anywhere in a source: our modules by their whole name, others by what is written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name the whole module"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in modules else str(node.module)


@cache
def imports() -> dict[str, set[str]]:
    """Return for each of our modules what it imports."""
    return {
        name: set(imported(ast.parse(path.read_text(encoding="utf-8")), SOURCES)) - {name}
        for name, path in SOURCES.items()
    }


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the groups of nodes that reach each other (strongly connected components of more than one)."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        found, left = set[str](), [start]
        while left:
            for each in graph.get(left.pop(), set()) - found:
                found.add(each)
                left.append(each)
        reached[start] = found
    groups = {frozenset(b for b in reached[a] if a in reached.get(b, ())) for a in graph if a in reached[a]}
    return sorted(sorted(group) for group in groups)


def room(name: str) -> str:
    """Return the folder that a module is in below its package; a module in no such folder is its own."""
    parts = name.split(".")
    return ".".join(parts[:2]) if len(parts) > 1 else name


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"f"}, "f": set()}) == [["a", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    code = "if TYPE_CHECKING:\n    from engine.specs import catalog\ndef f():\n    import x.y"
    assert {"engine.specs.catalog", "x.y"} <= set(imported(ast.parse(code), SOURCES))
    assert len(SOURCES) > 150 and sum(len(found & set(SOURCES)) for found in imports().values()) > 500


def test_no_module_imports_in_a_circle() -> None:
    assert circles({name: found & set(SOURCES) for name, found in imports().items()}) == []


def test_no_folder_imports_in_a_circle() -> None:
    folders: dict[str, set[str]] = {}
    for name, found in imports().items():
        folders.setdefault(room(name), set()).update({room(each) for each in found & set(SOURCES)} - {room(name)})
    assert circles(folders) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_in_one_direction(package: str) -> None:
    allowed = set(ORDER[: ORDER.index(package) + 1])
    for name, found in imports().items():
        if name.split(".")[0] == package:
            assert {each.split(".")[0] for each in found} & {*ORDER} <= allowed, name


@pytest.mark.parametrize("package", HEAVY)
def test_heavy_packages_are_imported_where_they_are_needed_alone(package: str) -> None:
    users = [
        str(SOURCES[name].relative_to(ROOT))
        for name, found in imports().items()
        if package in {each.split(".")[0] for each in found}
    ]
    assert [user for user in users if not user.startswith(HEAVY[package])] == []
    assert users  # else it is not needed at all


def test_importing_any_module_outside_the_worker_imports_no_torch() -> None:
    names = [
        name
        for name in SOURCES
        if not name.startswith("engine.worker") and name not in TIMING and not name.endswith("__main__")
    ]
    names.remove("engine.executors.in_process")  # the ranks' work in this process
    names.remove("engine.executors.ray_executor")  # needs ray
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules and 'ray' not in sys.modules, name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_package_has_sources() -> None:
    assert {name.split(".")[0] for name in SOURCES} == set(PACKAGES) >= {"engine", "profiler", "simulator", "studies"}
