#!/usr/bin/env bash
# Run a training entry point on this machine, in one process or several: where it runs is said here, what it does by the
# config.
#
#   launch/local.sh train_rl configs/rl_tiny_cpu.py runs/rl_tiny
#   launch/local.sh train_rl configs/rl_tiny_cpu.py:smoke runs/smoke --config.seed=1
#   PROCESSES=4 launch/local.sh train_rl configs/rl_tiny_cpu.py runs/rl_tiny
#   PROCESSES=4 launch/local.sh --dry_run train_rl configs/rl_tiny_cpu.py runs/rl_tiny
#
# ENTRY CONFIG WORKDIR [flags]. Environment: PLATFORM (cpu, cuda, tpu), PROCESSES, PORT of the first of them (any free
# one), RESTARTS (how often a job that lost a process, or exited with 75, is started again from its last checkpoint; 0),
# VENV. Several processes write WORKDIR/hosts/logs/N.log; the first one's output is shown too.
set -euo pipefail
cd "$(dirname "$0")/.."

dry=''
if [ "${1:-}" = --dry_run ]; then
    dry=yes
    shift
fi
if [ $# -lt 3 ]; then
    sed -n '5,8s/^# *//p' "$0" >&2
    exit 2
fi
entry=$1 config=$2 workdir=$3
shift 3
python=${VENV:-.venv}/bin/python processes=${PROCESSES:-1} restarts=${RESTARTS:-0}
case $processes in
'' | *[!0-9]* | 0) echo "PROCESSES=$processes: write how many, 1 or more" >&2 && exit 2 ;;
esac
command=("$python" -m "experiments.$entry" --config="$config" --workdir="$workdir" "$@")
export JAX_PLATFORMS=${PLATFORM:-cpu}

if [ "$processes" = 1 ]; then
    if [ -n "$dry" ]; then
        echo "JAX_PLATFORMS=$JAX_PLATFORMS ${command[*]@Q}"
        exit 0
    fi
    # exec: signals reach the run itself, which saves and exits 75 on SIGTERM.
    exec "${command[@]}"
fi

logs=$workdir/hosts/logs
if [ -n "$dry" ]; then
    for ((i = 0; i < processes; i++)); do
        echo "JAX_PLATFORMS=$JAX_PLATFORMS JAX_COORDINATOR_ADDRESS=127.0.0.1:${PORT:-FREE}" \
            "M1JAX_PROCESSES=$processes M1JAX_PROCESS=$i ${command[*]@Q} >$logs/$i.log"
    done
    exit 0
fi

mkdir -p "$logs"
set -m # each process in a group of its own: Ctrl-C comes to this script alone, which passes it on once
pids=() asked=''
signal() { # to our own processes only
    asked=yes
    for pid in "${pids[@]}"; do kill "-$1" "$pid" 2>/dev/null || true; done
}
trap 'signal INT' INT
trap 'signal TERM' TERM

while true; do
    port=${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
    export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port M1JAX_PROCESSES=$processes
    pids=()
    for ((i = 0; i < processes; i++)); do
        if [ "$JAX_PLATFORMS" = cuda ]; then export JAX_LOCAL_DEVICE_IDS=$i; fi # a GPU each
        if [ "$i" = 0 ]; then
            M1JAX_PROCESS=$i "${command[@]}" > >(tee -i -a "$logs/$i.log") 2>&1 &
        else
            M1JAX_PROCESS=$i "${command[@]}" >>"$logs/$i.log" 2>&1 &
        fi
        pids+=($!)
    done

    # Each process ends by itself when it loses another. What a user has to mend says more than that others were lost.
    code=0
    for i in "${!pids[@]}"; do
        status=0
        while kill -0 "${pids[$i]}" 2>/dev/null; do # a signal to this script ends a wait, not the process
            wait "${pids[$i]}" && status=0 || status=$?
        done
        wait "${pids[$i]}" 2>/dev/null && status=0 || status=$?
        if [ "$status" != 0 ]; then
            why=''
            if [ "$status" = 134 ]; then why=' (aborted by JAX: the first process, which all need, is gone)'; fi
            echo "process $i ended with code $status$why, see $logs/$i.log" >&2
            case $status in
            1 | 2) code=$status ;;
            75) if [ "$code" != 1 ] && [ "$code" != 2 ]; then code=75; fi ;;
            *) if [ "$code" = 0 ]; then code=$status; fi ;;
            esac
        fi
    done
    if [ "$code" = 0 ] || [ -n "$asked" ] || [ "$restarts" -le 0 ]; then
        exit "$code"
    fi
    # 2 is a mistake of the user's and 1 a number that is not finite: to start again would end the same.
    if [ "$code" = 1 ] || [ "$code" = 2 ]; then
        exit "$code"
    fi
    restarts=$((restarts - 1))
    echo "starting all $processes processes again from the last checkpoint, $restarts further times at the most" >&2
done
