"""`windtunnel report`: one page from any run, search, sweep, study or validation, or from several side by side."""

from __future__ import annotations

from pathlib import Path

from studies.pages.report import write_page


def run(folders: list[Path], output: Path | None) -> Path:
    """Write the page and print its path."""
    path = write_page(folders, output)
    print(f"report: {path}")
    return path
