#!/usr/bin/env bash
# Everything that must hold: format, lint, layers, types, and all tests that need no GPU.
# Arguments go to pytest: deploy/test.sh tests/unit -x
set -euo pipefail
cd "$(dirname "$0")/.."
source deploy/environment.sh

ensure_environment test
# The tests choose their own folder and never meet a deployment of yours.
unset MOTLEY_HOME MOTLEY_TARGET MOTLEY_TOKEN MOTLEY_URL MOTLEY_TLS_CERT RAY_ADDRESS

say "format"
.venv/bin/ruff format --check .
say "lint"
.venv/bin/ruff check .
say "layers"
.venv/bin/lint-imports
say "types"
.venv/bin/mypy
say "tests"
if [[ $# -gt 0 ]]; then
    exec .venv/bin/python -m pytest -m "not gpu" "$@"
fi
failed=0
# Those of one process share the cores; those that start Ray would miss their deadlines.
.venv/bin/python -m pytest -m "not gpu" --durations=15 -n 2 tests/engine tests/unit || failed=1
.venv/bin/python -m pytest -m "not gpu" --durations=25 tests/hosts tests/local_ray tests/system ||
    failed=1
exit "$failed"
