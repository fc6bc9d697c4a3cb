"""Tell a benchmark's results from a trace: both are JSON files about requests."""

from __future__ import annotations

from pathlib import Path

from engine.documents import check_table, parse_json
from engine.errors import InputError

_RESULTS = frozenset({"request_throughput", "total_output_tokens", "mean_ttft_ms", "ttfts", "itls"})
_MOST_BYTES = 1 << 28  # of a file that is read whole


def check_no_result(path: Path) -> None:
    """Raise InputError if the file of a trace holds a benchmark's results (vLLM's, or a run's summary.json)."""
    try:
        check_table(path)
        with path.open(encoding="utf-8-sig") as file:
            first = file.readline()
            if not first.lstrip().startswith("{"):
                return
            whole = path.stat().st_size <= _MOST_BYTES
            found = _object(first) or (_object(first + file.read()) if whole else None)
    except (OSError, UnicodeDecodeError):
        return  # whoever reads the trace reports that
    if found is not None and len(_RESULTS & set(found)) >= 2:
        raise InputError(
            f"trace {path} holds the results of a benchmark (vLLM's JSON, or a summary.json), not the requests of a "
            "trace: give the trace that was replayed"
        )


def _object(text: str) -> dict[str, object] | None:
    try:
        found = parse_json(text, "", "", constants=True)
    except InputError:  # whoever reads the trace reports that
        return None
    return found if isinstance(found, dict) else None
