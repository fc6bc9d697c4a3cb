#!/usr/bin/env bash
# Installs in .venv all that the tests need, and runs them and the checks of style and types.
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONDONTWRITEBYTECODE  # where it is set, every process of a test would compile every module again
python3 -m venv .venv
.venv/bin/pip install -q --no-compile -c constraints.txt uv  # unpacks on all cores: half of pip's time
if wheels=$(.venv/bin/pip config list | sed -n "s/.*find-links='\(.*\)'/\1/p" | head -n 1) && [ -n "$wheels" ]; then
    export UV_FIND_LINKS="${UV_FIND_LINKS-${wheels// /,}}"  # it reads none of pip's settings
fi
.venv/bin/uv pip install -q --python .venv -c constraints.txt -e '.[dev]'
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy -n 2
.venv/bin/pytest -n 3 --dist loadfile --no-loadscope-reorder
