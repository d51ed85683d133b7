# Sourced by quickstart.sh and test.sh, from the root of the checkout: the virtual environment.
# shellcheck shell=bash

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0

say() {
    printf '== %s\n' "$*" >&2
}

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Print the first Python that is new enough; PYTHON names another one.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "Python 3.11 or newer is needed and was not found; on Debian or Ubuntu:" \
        "apt install python3.11 python3.11-venv, or set PYTHON"
}

make_venv() {
    local python
    python="$(find_python)"
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        die "$python has no venv module; on Debian or Ubuntu:" \
            "apt install $("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    fi
    say "creating .venv with $python"
    "$python" -m venv --clear .venv
}

# ensure_environment [EXTRA]: .venv holds what pyproject.toml asks for, with that extra.
# A stamp remembers what was installed, so a second run installs nothing.
ensure_environment() {
    local extra="${1:-}" stamp wanted
    if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        make_venv
    fi
    stamp=".venv/.motley-installed${extra:+-$extra}"
    wanted="$(.venv/bin/python -c '
import hashlib, pathlib, sys
text = pathlib.Path("pyproject.toml").read_bytes() + sys.version.encode() + str(pathlib.Path.cwd()).encode()
print(hashlib.sha256(text).hexdigest())')"
    if [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]]; then
        say "environment is up to date (.venv)"
        return
    fi
    .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip --upgrade
    say "installing; the first time this takes minutes"
    # torch first and by itself: it is most of the download, and MOTLEY_TORCH_INDEX may name an
    # index with builds for this machine only (CPU, or one CUDA version).
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        ${MOTLEY_TORCH_INDEX:+--index-url "$MOTLEY_TORCH_INDEX"} "torch>=2.11,<2.14"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extra:+[$extra]}"
    printf '%s\n' "$wanted" >"$stamp"
}
