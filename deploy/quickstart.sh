#!/usr/bin/env bash
# Serve the shipped checkpoint on three paced devices of this machine, ask it something, show what
# it cost, and take everything down again.
#
#   deploy/quickstart.sh           all of the above
#   deploy/quickstart.sh --keep    leave it running; prints how to reach and how to stop it
#
# PYTHON and MOTLEY_TORCH_INDEX choose the interpreter and where torch comes from.
set -euo pipefail
cd "$(dirname "$0")/.."
source deploy/environment.sh

START_DEADLINE_S=300
PROMPT=$'def fibonacci(n):\n'

keep=0
case "${1:-}" in
    '') ;;
    --keep) keep=1 ;;
    *) die "unknown argument $1; usage: deploy/quickstart.sh [--keep]" ;;
esac

ensure_environment
# It meets no deployment and no cluster of yours.
unset MOTLEY_TARGET MOTLEY_TOKEN MOTLEY_URL MOTLEY_TLS_CERT RAY_ADDRESS

# A folder of its own, so that two runs (or a run beside your own deployment) do not meet.
work="$(mktemp -d "${TMPDIR:-/tmp}/motley-quickstart.XXXXXX")"
log="$work/up.log"
run_id="quickstart-$$-$RANDOM"
up_pid=''
export MOTLEY_HOME="$work"

motley() {
    .venv/bin/python -m cluster "$@"
}

# Processes of this run: all of them inherit the marker that only `up` was given.
leftovers() {
    local file
    for file in /proc/[0-9]*/environ; do
        if grep -qsz "^MOTLEY_RUN_ID=$run_id$" "$file"; then
            file="${file#/proc/}"
            printf '%s\n' "${file%/environ}"
        fi
    done
}

# Wait until nothing of this run is left; end what stays and report it.
verify_gone() {
    local deadline=$((SECONDS + 20)) left
    [[ -d /proc/self ]] || return 0
    while left="$(leftovers)"; [[ -n "$left" ]]; do
        if ((SECONDS > deadline)); then
            # shellcheck disable=SC2086  # one argument a process
            ps -o pid=,args= -p "$(paste -sd, <<<"$left")" >&2 || true
            # shellcheck disable=SC2086
            kill -KILL $left 2>/dev/null || true
            return 1
        fi
        sleep 0.2
    done
}

# Ask the deployment to stop; after a minute, insist.
stop_up() {
    local deadline=$((SECONDS + 60))
    kill -TERM "$up_pid" 2>/dev/null || true
    while kill -0 "$up_pid" 2>/dev/null && ((SECONDS < deadline)); do
        sleep 0.2
    done
    kill -KILL "$up_pid" 2>/dev/null || true
    wait "$up_pid" 2>/dev/null || true
}

clean_up() {
    local code=$?
    trap - EXIT INT TERM
    if [[ -n "$up_pid" ]]; then
        if ((code != 0)); then
            printf '\n-- the last lines of %s\n' "$log" >&2
            tail -n 40 "$log" >&2 || true
        fi
        stop_up
        verify_gone || printf 'error: processes were left running and had to be killed\n' >&2
    fi
    rm -rf "$work"
    exit "$code"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say "the plan for the embedded default (deploy/configs/embedded.yaml)"
motley plan

say "starting (log: $log)"
MOTLEY_RUN_ID="$run_id" .venv/bin/python -m cluster up --http-port 0 --grpc-port 0 \
    >"$log" 2>&1 &
up_pid=$!
deadline=$((SECONDS + START_DEADLINE_S))
until motley status --json >"$work/before.json" 2>"$work/status.log"; do
    kill -0 "$up_pid" 2>/dev/null || die "the deployment ended before it was ready"
    ((SECONDS < deadline)) ||
        die "not ready after $START_DEADLINE_S s: $(<"$work/status.log")"
    sleep 0.5
done

say "asking for the continuation of: $PROMPT"
motley generate "$PROMPT" --max-tokens 96 --temperature 0 2>"$work/generate.log" ||
    die "$(<"$work/generate.log")"
cat "$work/generate.log"

say "what each stage did for it"
motley status --json >"$work/after.json"
.venv/bin/python - "$work" <<'PYTHON'
import json
import pathlib
import re
import sys

work = pathlib.Path(sys.argv[1])
before, after = (
    {stage["index"]: stage for stage in json.loads((work / name).read_text())["stages"]}
    for name in ("before.json", "after.json")
)
tokens = int(re.search(r"(\d+) tokens in", (work / "generate.log").read_text()).group(1))
for index, stage in after.items():
    busy_s = stage["busy_s"] - before[index]["busy_s"]
    late_s = stage["late_s"] - before[index]["late_s"]
    steps = stage["steps"] - before[index]["steps"]
    rate = f"{tokens / busy_s:8.1f}" if busy_s > 0 else "       -"
    print(
        f"stage {index} on {stage['device']:8} layers [{stage['first_layer']}, "
        f"{stage['end_layer']}): {rate} tokens per second of busy time "
        f"({steps} steps, {busy_s:.2f} s busy, {late_s:.2f} s late)"
    )
PYTHON

if ((keep)); then
    trap - EXIT INT TERM
    disown "$up_pid"
    .venv/bin/python - "$work" <<'PYTHON'
import json
import pathlib
import sys

[file] = pathlib.Path(sys.argv[1]).glob("run/*.json")
state = json.loads(file.read_text())
print(f"""
left running:
  export MOTLEY_HOME={sys.argv[1]}
  OpenAI HTTP  {state['http_url']}/v1
  gRPC         {state['grpc_target']}
  token        {state['token']}
  log          {sys.argv[1]}/up.log
try:   .venv/bin/python -m cluster chat
stop:  .venv/bin/python -m cluster down""")
PYTHON
    exit 0
fi

say "stopping"
motley down
wait "$up_pid" 2>/dev/null || true
up_pid=''
verify_gone || die "processes were left running and had to be killed"
say "done; nothing is left running"
