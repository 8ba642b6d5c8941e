#!/usr/bin/env bash
# Serve a model folder with SGLang, the way that RL needs it; stays in the foreground, stops what it started.
#
#   launch/sglang.sh runs/m1/hf 30000
#   launch/sglang.sh runs/m1/hf 30000 --enable-return-routed-experts   # router replay; further flags are SGLang's
#   PLATFORM=cuda LOG=server.log launch/sglang.sh /models/M1 30000 --tp-size 8 --context-length 131072
#
# PLATFORM is cpu (tests) or cuda, SGLANG_VENV the environment (make sglang-env), LOG a file for the server's output,
# HOST the address to listen on, READY_SECONDS how long a start may take (900), RESTARTS how often a server that died is
# started again (0); the run gives it the current weights. SGLANG_API_KEY and SGLANG_ADMIN_KEY, if set, are asked of
# clients: the first for answers, the second for weights, pauses and aborts. They do not show in `ps`, but SGLang writes
# both to its log and into GET /server_info, for whoever holds either: against accidents, not enemies.
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '4,6s/^# *//p' "$0" >&2
    exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
model=$1 port=$2
shift 2
[[ ${RESTARTS:-0} =~ ^[0-9]+$ ]] || { echo "RESTARTS=$RESTARTS: write how often, 0 or more" >&2 && exit 2; }
python=${SGLANG_VENV:-$root/.venv-sglang}/bin/python
[ -x "$python" ] || { echo "launch/sglang.sh: no $python; make sglang-env sets it up" >&2; exit 2; }

flags=(
    --model-path "$model" --host "${HOST:-127.0.0.1}" --port "$port"
    --skip-tokenizer-init          # ids in, ids out: nothing is tokenised twice. Stop by ids, not by strings
    --incremental-streaming-output # else every event of a stream repeats the whole answer
    --enable-fp32-lm-head          # section 3.2 of the report: the gap between trainer and engine was the head's
    --mamba-ssm-dtype float32      # states of lightning layers
    --watchdog-timeout 3600        # a slower forward pass, or update in place, kills the server: leave room for it
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
        --sleep-on-idle                                   # else an idle server takes a core from the trainer
        --chunked-prefill-size 256                        # longer prompts go in pieces
        --max-running-requests 16 --max-total-tokens 16384 --max-mamba-cache-size 64 # by default, all memory
    )
    ;;
cuda) # not run: no GPU was at hand
    # Products of float32 tensors, which the states of lightning layers are made of, keep their digits: TF32 by itself
    # has ten bits, three of its products nearly all of float32's.
    export TRITON_F32_DEFAULT="${TRITON_F32_DEFAULT:-tf32x3}"
    flags+=(
        --dtype bfloat16 # without it, float16 where config.json names float32 or nothing
        --chunked-prefill-size 8192 --max-running-requests 256
    )
    ;;
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

for key in SGLANG_API_KEY SGLANG_ADMIN_KEY; do
    # As clients read them: without what is around them, and of what a header can hold.
    read -r value <<<"${!key:-}" || true
    if [[ $value == -* || $value =~ [^[:graph:]] ]]; then
        echo "launch/sglang.sh: $key begins with -, which SGLang takes for a flag, or has a space in it" >&2
        exit 2
    fi
    printf -v "$key" %s "$value"
done
umask 077 # for the log and the keys
if [ -n "${LOG:-}" ]; then
    : >>"$LOG"
    if [ -f "$LOG" ]; then chmod 600 "$LOG"; fi # one that was there already may be open to all
    exec 4>>"$LOG"
else
    exec 4>&2
fi

pid='' private=''
end() { # the server and all of its processes, its group: nobody else is in it
    if [ -n "$pid" ] && kill -0 -- "-$pid" 2>/dev/null; then
        # It ends its requests and its children; those that it left behind end by themselves.
        kill -TERM "$pid" 2>/dev/null || kill -TERM -- "-$pid" 2>/dev/null || true
        for _ in $(seq 40); do
            kill -0 -- "-$pid" 2>/dev/null || break
            sleep 0.25
        done
        kill -KILL -- "-$pid" 2>/dev/null || true
    fi
}
# shellcheck disable=SC2329 # the trap calls it
stop() {
    trap '' INT TERM
    end
    [ -z "$private" ] || rm -rf "$private"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

quoted() { echo "'${1//\'/\'\'}'"; } # as YAML has it

start() {
    local keys=()
    if [ -n "${SGLANG_API_KEY:-}${SGLANG_ADMIN_KEY:-}" ]; then
        private=$(mktemp -d)
        {
            [ -z "${SGLANG_API_KEY:-}" ] || echo "api-key: $(quoted "$SGLANG_API_KEY")"
            [ -z "${SGLANG_ADMIN_KEY:-}" ] || echo "admin-api-key: $(quoted "$SGLANG_ADMIN_KEY")"
        } >"$private/keys.yaml"
        keys=(--config "$private/keys.yaml")
    fi
    # A session of its own, so that its processes are one group: pid is the number of both. Should this script be killed
    # with SIGKILL, the group lives on; `kill -TERM pid` as printed below ends it.
    env -u SGLANG_API_KEY -u SGLANG_ADMIN_KEY setsid "$python" -m sglang.launch_server "${keys[@]}" "$@" \
        >&4 2>&1 </dev/null 4>&- &
    pid=$!
}

get() ( # the status of GET $1; 000 where nobody answers
    status=000
    if exec 3<>"/dev/tcp/$host/$port" && printf 'GET %s HTTP/1.0\r\n\r\n' "$1" >&3; then
        read -r -t 30 _ status _ <&3 || true
    fi
    echo "$status"
) 2>/dev/null

ready() { # /ready is 200 as soon as requests are taken. Further nodes of one server take none, and have /health alone
    case $(get /ready) in
    200) true ;;
    404) [ "$(get /health)" = 200 ] ;;
    *) false ;;
    esac
}

left=${RESTARTS:-0} first=yes
while true; do
    start "${flags[@]}" "$@"
    deadline=$((SECONDS + ${READY_SECONDS:-900})) why='' code=0
    until [ -n "$why" ] || ready; do
        sleep 0.5
        if ! kill -0 "$pid" 2>/dev/null; then
            why='the server ended while it started'
        elif [ $SECONDS -ge $deadline ]; then
            why="not ready after ${READY_SECONDS:-900} s"
        fi
    done
    [ -z "$private" ] || rm -rf "$private"
    if [ -z "$why" ]; then
        echo "ready: http://$host:$port serves $model, pid $pid"
        wait "$pid" || code=$?
        if [ "$code" = 0 ]; then exit 0; fi
        why="the server ended with code $code"
    else
        code=1
        if [ -n "$first" ]; then left=0; fi # it never was there: a mistake to mend
    fi
    if [ "$left" = 0 ]; then
        echo "$why; see ${LOG:-above}" >&2
        exit "$code"
    fi
    first='' left=$((left - 1))
    echo "$why; starting it again, $left further times at the most" >&2
    end # what is left of its processes
    sleep 2 # in which a GPU's memory becomes free
done
