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
.venv/bin/python -m pytest -m "not gpu" --durations=25 "$@"
