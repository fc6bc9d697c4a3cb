#!/usr/bin/env bash
# Installs in .venv all that the tests need, and runs them and the checks of style and types.
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONDONTWRITEBYTECODE  # where it is set, every process of a test would compile every module again
python3 -m venv .venv
.venv/bin/pip install -q --no-compile -c constraints.txt uv  # it unpacks on all cores
settings=$(.venv/bin/pip config list)  # uv reads none of pip's
while read -r name variable; do
    value=$(sed -nE "/^(:env:|global|install)\.$name='/{s/^[^']*'(.*)'$/\1/p;q;}" <<< "$settings")
    value=${value//\\n/ }
    if [ -n "$value" ] && [ -z "${!variable-}" ]; then
        export "$variable=$(tr -s ' ' ',' <<< "${value# }")"
    fi
done <<< 'find-links UV_FIND_LINKS
index-url UV_DEFAULT_INDEX
no-index UV_NO_INDEX
cert SSL_CERT_FILE'
.venv/bin/uv pip install -q --python .venv -c constraints.txt -e '.[dev]'
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy -n 2
.venv/bin/pytest -n 3 --dist loadfile --no-loadscope-reorder
