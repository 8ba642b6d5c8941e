#!/usr/bin/env bash
# An SGLang server and the trainer that samples from it, together on this machine; ends the server when training ends.
#
#   launch/local_sglang.sh configs/rl_tiny_sglang.py runs/rl_sglang runs/sft
#   PORT=30001 launch/local_sglang.sh configs/rl_tiny_sglang.py runs/rl_sglang runs/sft --config.rollout.staleness=1
#
# CONFIG WORKDIR INIT_FROM: the run, and the run folder or checkpoint that it starts from, which the server is started
# with as well. The server's output goes to WORKDIR.server.log. Environment: PLATFORM (cpu, cuda) and SGLANG_VENV as in
# launch/sglang.sh, SERVER_FLAGS for further flags of it, VENV and TRAINER_PLATFORM for the trainer.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ $# -lt 3 ]; then
    sed -n '4,5s/^# *//p' "$0" >&2
    exit 2
fi
config=$1 workdir=$2 init_from=$3 port=${PORT:-30000}
shift 3
python=${VENV:-.venv}/bin/python
export JAX_PLATFORMS=${TRAINER_PLATFORM:-cpu}

served=$workdir.served
if [ ! -d "$served" ]; then
    "$python" -m experiments.convert_weights --from="$init_from" --to="$served"
    echo "$init_from" >"$served.from"
elif [ "$(cat "$served.from" 2>/dev/null)" != "$init_from" ]; then
    echo "$served is not an export of $init_from; delete it, or give another WORKDIR" >&2
    exit 2
fi

set -m # each in a group of its own: Ctrl-C comes to this script alone, which passes it on once
server='' trainer=''
# shellcheck disable=SC2329 # the trap calls it
stop() {
    trap '' INT TERM
    for pid in $trainer $server; do kill -TERM "$pid" 2>/dev/null || true; done
    for pid in $trainer $server; do wait "$pid" 2>/dev/null || true; done
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

read -r -a flags <<<"${SERVER_FLAGS:-}"
HOST=127.0.0.1 LOG=$workdir.server.log launch/sglang.sh "$served" "$port" "${flags[@]}" &
server=$!
sleep 2 # where its port is taken it has said so by now, and the trainer must not ask whoever has it
if ! kill -0 "$server" 2>/dev/null; then
    exit 2
fi

# The trainer waits for the server by itself. A signal to this script goes on to it: it saves, its exit code is ours.
"$python" -m experiments.train_rl --config="$config" --workdir="$workdir" --init_from="$init_from" \
    --config.servers.urls="http://127.0.0.1:$port" "$@" &
trainer=$!
trap 'kill -INT "$trainer"' INT
trap 'kill -TERM "$trainer"' TERM
told=''
while kill -0 "$trainer" 2>/dev/null; do
    wait -n "$trainer" "$server" || true # a signal ends the wait, not the trainer
    if [ -z "$told" ] && kill -0 "$trainer" 2>/dev/null && ! kill -0 "$server" 2>/dev/null; then
        echo "the server ended, see $workdir.server.log; the trainer waits for config.servers.patience_s" >&2
        told=yes server=$trainer # nothing else is left to wait for
    fi
done
code=0
wait "$trainer" || code=$?
trainer=''
exit "$code"
