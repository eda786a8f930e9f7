#!/usr/bin/env bash
# The four calls that have to work word for word, on a controller started by `make run` (on a free port, with a database of its
# own), each with its answer. Ends with 1 at the first answer that is not as it should be.
#
#     make acceptance
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export NO_PROXY=localhost no_proxy=localhost

folder=$(mktemp -d)
server=
finish() {
    trap - EXIT INT TERM
    if [ -n "$server" ]; then
        kill "$server" 2>/dev/null || true
        wait "$server" 2>/dev/null || true
    fi
    rm -rf "$folder"
}
trap finish EXIT
trap 'exit 130' INT TERM

say() { printf '\n\033[1m$ %s\033[0m\n' "$*" | if [ -t 1 ]; then cat; else sed 's/\x1b\[[0-9]*m//g'; fi; }

value() { # value JSON NAME...: what stands there, as JSON
    "$python" -c 'import json, sys
value = json.loads(sys.argv[1])
for name in sys.argv[2:]: value = value[name]
print(json.dumps(value))' "$@"
}

expect() { # expect JSON EXPECTED NAME...
    local answer=$1 expected=$2 found
    shift 2
    found=$(value "$answer" "$@") || { echo "FAILED: no $* in the answer" >&2; exit 1; }
    [ "$found" = "$expected" ] || { echo "FAILED: $* is $found, not $expected" >&2; exit 1; }
    echo "  ok: $* is $expected"
}

port=$("$python" -c 'import socket
with socket.create_server(("127.0.0.1", 0)) as probe: print(probe.getsockname()[1])')
say make run ARGS="--port $port --db $folder/deploybot.db"
make --no-print-directory run PYTHON="$python" ARGS="--port $port --db $folder/deploybot.db" >"$folder/log" 2>&1 </dev/null &
server=$!
# --retry waits for the server to listen; a server that ended never will.
health=$(curl --silent --show-error --fail --retry 100 --retry-delay 1 --retry-connrefused --max-time 60 "localhost:$port/health" 2>"$folder/curl") || {
    echo "FAILED: the controller did not start:" >&2
    cat "$folder/log" "$folder/curl" >&2
    exit 1
}
echo "$health"
expect "$health" '"ok"' status

say "curl -X POST localhost:$port/v1/agents/register -H 'Content-Type: application/json' -d '{\"hostname\":\"test-host\",\"capabilities\":{}}'"
answer=$(curl -sS -X POST localhost:$port/v1/agents/register -H 'Content-Type: application/json' -d '{"hostname":"test-host","capabilities":{}}')
echo "$answer"
expect "$answer" '"test-host"' hostname
expect "$answer" '{}' capabilities
expect "$answer" '"online"' status
id=$(value "$answer" id | tr -d '"')

say "curl -X POST localhost:$port/v1/agents/$id/heartbeat -H 'Content-Type: application/json' -d '{\"status\":\"online\"}'"
answer=$(curl -sS -X POST localhost:$port/v1/agents/$id/heartbeat -H 'Content-Type: application/json' -d '{"status":"online"}')
echo "$answer"
expect "$answer" true acknowledged
expect "$answer" null job
expect "$answer" '[]' cancel

say "curl -X POST localhost:$port/v1/jobs -H 'Content-Type: application/json' -d '{\"repo\":\"myorg/app\",\"ref\":\"main\",\"host\":\"test-host\"}'"
answer=$(curl -sS -X POST localhost:$port/v1/jobs -H 'Content-Type: application/json' -d '{"repo":"myorg/app","ref":"main","host":"test-host"}')
echo "$answer"
expect "$answer" true created
expect "$answer" '"pending"' job status
expect "$answer" '"myorg/app"' job repo
expect "$answer" '"main"' job ref
expect "$answer" '"test-host"' job host
job_id=$(value "$answer" job id | tr -d '"')

say "curl localhost:$port/v1/jobs/$job_id"
answer=$(curl -sS localhost:$port/v1/jobs/$job_id)
echo "$answer"
expect "$answer" "\"$job_id\"" job id
expect "$answer" '"pending"' job status

printf '\nAll four calls answer as they should.\n'
