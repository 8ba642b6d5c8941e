#!/usr/bin/env bash
# Serve a model folder with SGLang, the way that RL needs it; stays in the foreground, stops what it started.
#
#   launch/sglang.sh runs/m1/hf 30000
#   launch/sglang.sh runs/m1/hf 30000 --enable-return-routed-experts   # router replay; further flags are SGLang's
#   PLATFORM=cuda LOG=server.log launch/sglang.sh /models/M1 30000 --tp-size 8 --context-length 131072
#
# PLATFORM is cpu (tests) or cuda, SGLANG_VENV the environment (make sglang-env), LOG a file for the server's output,
# HOST the address to listen on, READY_SECONDS how long a start may take. SGLANG_API_KEY and SGLANG_ADMIN_KEY, if set,
# are asked of clients: the first for answers, the second for weights, pauses and aborts. They do not show in `ps`, but
# SGLang writes both to its log and into GET /server_info, for whoever holds either: against accidents, not enemies.
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '4,6s/^# *//p' "$0" >&2
    exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
model=$1 port=$2
shift 2
python=${SGLANG_VENV:-$root/.venv-sglang}/bin/python
[ -x "$python" ] || { echo "launch/sglang.sh: no $python; make sglang-env sets it up" >&2; exit 2; }

flags=(
    --model-path "$model" --host "${HOST:-127.0.0.1}" --port "$port"
    --skip-tokenizer-init          # ids in, ids out: nothing is tokenised twice. Stop by ids, not by strings
    --incremental-streaming-output # else every event of a stream repeats the whole answer
    --enable-fp32-lm-head          # section 3.2 of the report: the gap between trainer and engine was the head's
    --mamba-ssm-dtype float32      # states of lightning layers
    --watchdog-timeout 1800        # a slower forward pass kills the server: leave room for a long first prompt
)
export HF_HUB_OFFLINE=1 SGLANG_EXTERNAL_MODEL_PACKAGE=m1jax.serving.models
case ${PLATFORM:-cpu} in
cpu)
    # One thread: two of them fight over the cores that the trainer uses, and a token of a small model takes 100 times
    # as long. Stand-ins take the place of packages that need a GPU.
    export PYTHONPATH="$root/m1jax/serving/cpu${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    export SGLANG_USE_CPU_ENGINE=1 CUDA_VISIBLE_DEVICES=
    flags+=(
        --device cpu --dtype float32 --attention-backend torch_native
        --disable-overlap-schedule --skip-server-warmup   # neither is for CPUs
        --chunked-prefill-size 256                        # longer prompts go in pieces
        --max-running-requests 16 --max-total-tokens 16384 --max-mamba-cache-size 64 # by default, all memory
    )
    ;;
cuda) flags+=(--chunked-prefill-size 8192 --max-running-requests 256) ;; # not run: no GPU was at hand
*) echo "PLATFORM: $PLATFORM must be cpu or cuda" >&2 && exit 2 ;;
esac

host=${HOST:-127.0.0.1}
if [ "$host" = 0.0.0.0 ]; then
    host=127.0.0.1 # listens on all addresses, this one too
fi
if (exec 3<>"/dev/tcp/$host/$port") 2>/dev/null; then
    echo "launch/sglang.sh: something listens on port $port of $host already; give another PORT" >&2
    exit 2
fi

pid='' private=''
stop() {
    trap '' INT TERM
    if [ -n "$pid" ] && kill -0 -- "-$pid" 2>/dev/null; then
        kill -TERM "$pid" 2>/dev/null || true # it ends its requests and its children
        for _ in $(seq 40); do
            kill -0 -- "-$pid" 2>/dev/null || break
            sleep 0.25
        done
        kill -KILL -- "-$pid" 2>/dev/null || true # whoever of its group is left: nobody else is in it
    fi
    [ -z "$private" ] || rm -rf "$private"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

umask 077 # for the log and the keys
if [ -n "${SGLANG_API_KEY:-}${SGLANG_ADMIN_KEY:-}" ]; then
    private=$(mktemp -d)
    printf '%s: "%s"\n' ${SGLANG_API_KEY:+api-key "$SGLANG_API_KEY"} \
        ${SGLANG_ADMIN_KEY:+admin-api-key "$SGLANG_ADMIN_KEY"} >"$private/keys.yaml"
    flags+=(--config "$private/keys.yaml")
    unset SGLANG_API_KEY SGLANG_ADMIN_KEY
fi

# A session of its own, so that its processes are one group: pid is the number of both. Should this script be killed
# with SIGKILL, the group lives on; `kill -TERM pid` as printed below ends it.
setsid "$python" -m sglang.launch_server "${flags[@]}" "$@" >"${LOG:-/dev/stderr}" 2>&1 </dev/null &
pid=$!

ready() ( # GET /ready is 200 as soon as the server takes requests
    exec 3<>"/dev/tcp/$host/$port" && printf 'GET /ready HTTP/1.0\r\n\r\n' >&3
    read -r -t 5 line <&3 && [[ $line == *" 200 "* ]]
) 2>/dev/null
deadline=$((SECONDS + ${READY_SECONDS:-900}))
until ready; do
    kill -0 "$pid" 2>/dev/null || { echo "the server ended while it started; see ${LOG:-above}" >&2 && exit 1; }
    [ $SECONDS -lt $deadline ] || { echo "not ready after ${READY_SECONDS:-900} s; see ${LOG:-above}" >&2 && exit 1; }
    sleep 0.5
done
echo "ready: http://$host:$port serves $model, pid $pid"
wait "$pid"
