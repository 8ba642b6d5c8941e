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
# VENV. One process writes here; several write WORKDIR/hosts/logs/N.log, and the first one's output is shown too.
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
python=${VENV:-.venv}/bin/python platform=${PLATFORM:-cpu} processes=${PROCESSES:-1} restarts=${RESTARTS:-0}
[[ $processes =~ ^[1-9][0-9]*$ ]] || { echo "PROCESSES=$processes: write how many, 1 or more" >&2 && exit 2; }
[[ $restarts =~ ^(0|[1-9][0-9]*)$ ]] || { echo "RESTARTS=$restarts: write how often, 0 or more" >&2 && exit 2; }
command=("$python" -m "experiments.$entry" --config="$config" --workdir="$workdir" "$@")
logs=$workdir/hosts/logs

line() { # process $1 of this job as a line of shell: it is printed, or it is run
    local variables=("JAX_PLATFORMS=$platform") log=$logs/$1.log output=''
    if [ "$processes" -gt 1 ]; then
        variables+=("JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "M1JAX_PROCESSES=$processes" "M1JAX_PROCESS=$1")
        if [ "$platform" = cuda ]; then variables+=("JAX_LOCAL_DEVICE_IDS=$1"); fi # a GPU each
        if [ "$1" = 0 ]; then output=" > >(tee -i -a ${log@Q}) 2>&1"; else output=" >>${log@Q} 2>&1"; fi
    fi
    echo "env ${variables[*]@Q} ${command[*]@Q}$output"
}

if [ -n "$dry" ]; then
    port=${PORT:-FREE} # a free one is looked for at each start
    for ((i = 0; i < processes; i++)); do line "$i"; done
    exit 0
fi
if [ "$processes" = 1 ] && [ "$restarts" = 0 ]; then
    eval "exec $(line 0)" # signals reach the run itself, which saves and exits with 75 on SIGTERM
fi

all=''
if [ "$processes" -gt 1 ]; then mkdir -p "$logs" && all="all $processes processes "; fi
set -m # each process in a group of its own: Ctrl-C comes to this script alone, which passes it on once
pids=() up='' asked='' late=''
signal() { # NAME CODE: to all processes once, to our own only; while they are being started, as soon as all are
    asked=$2
    if [ -z "$up" ]; then
        late=$1
    else
        for pid in "${pids[@]}"; do kill "-$1" "$pid" 2>/dev/null || true; done
    fi
}
trap 'signal HUP 129' HUP
trap 'signal INT 130' INT
trap 'signal TERM 75' TERM

while true; do
    port=${PORT:-$("$python" -c 'import socket as s; a = s.create_server(("127.0.0.1", 0)); print(a.getsockname()[1])')}
    if [ -n "$asked" ]; then exit "$asked"; fi # before there was anything to pass it on to
    pids=()
    for ((i = 0; i < processes; i++)); do
        eval "$(line "$i") &"
        pids+=($!)
    done
    up=yes
    if [ -n "$late" ]; then signal "$late" "$asked"; fi

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
            if [ "$processes" -gt 1 ]; then echo "process $i ended with code $status$why, see $logs/$i.log" >&2; fi
            case $status in
            1 | 2) code=$status ;;
            75) if [ "$code" != 1 ] && [ "$code" != 2 ]; then code=75; fi ;;
            *) if [ "$code" = 0 ]; then code=$status; fi ;;
            esac
        fi
    done
    up='' # a signal from here on is for the next start
    # 2 is a mistake of the user's and 1 a number that is not finite: to start again would end the same.
    if [ "$code" -le 2 ] || [ -n "$asked" ] || [ "$restarts" = 0 ]; then
        exit "$code"
    fi
    restarts=$((restarts - 1))
    echo "starting ${all}again from the last checkpoint, $restarts further times at the most" >&2
done
