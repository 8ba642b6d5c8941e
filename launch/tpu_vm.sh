#!/usr/bin/env bash
# Run a training entry point on all hosts of a TPU slice that was made as TPU VMs.
#
#   launch/tpu_vm.sh my-v5p us-east5-a train_rl configs/rl_m1.py gs-mount/runs/rl
#   launch/tpu_vm.sh --dry_run my-v5p us-east5-a train_rl configs/rl_m1.py gs-mount/runs/rl
#   launch/tpu_vm.sh --stop my-v5p us-east5-a
#
# NAME ZONE ENTRY CONFIG WORKDIR [flags]. Every host has this checkout in FOLDER (m1jax, below the home folder) with its
# environment in VENV (.venv there), and WORKDIR on a folder that all of them mount. RESTARTS (100) is how often a job
# that exits with 75 is started again. --stop sends SIGTERM to what this script started there: it saves and exits.
set -euo pipefail

dry='' stop=''
case "${1:-}" in
--dry_run) dry=yes && shift ;;
--stop) stop=yes && shift ;;
esac
if { [ -n "$stop" ] && [ $# != 2 ]; } || { [ -z "$stop" ] && [ $# -lt 5 ]; }; then
    sed -n '4,6s/^# *//p' "$0" >&2
    exit 2
fi
name=$1 zone=$2 pid_file=.m1jax-$1.pid
shift 2
everywhere=(gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all)
# The pid is believed only while it is that of an entry point of ours.
end="pid=\$(cat $pid_file 2>/dev/null) && grep -q experiments /proc/\$pid/cmdline 2>/dev/null && kill -TERM \$pid || true"
if [ -n "$stop" ]; then
    exec "${everywhere[@]}" --command="$end"
fi

entry=$1 config=$2 workdir=$3
shift 3
command=("${VENV:-.venv}/bin/python" -m "experiments.$entry" --config="$config" --workdir="$workdir" "$@")
start="cd ${FOLDER:-m1jax} && mkdir -p ${workdir@Q}/hosts/logs && echo \$\$ >~/$pid_file &&
export M1JAX_PROCESSES=auto JAX_PLATFORMS=tpu && exec ${command[*]@Q} >>${workdir@Q}/hosts/logs/\$(hostname).log 2>&1"
if [ -n "$dry" ]; then
    echo "${everywhere[*]@Q} --command=${start@Q}"
    exit 0
fi
trap '"${everywhere[@]}" --command="$end"' INT TERM
restarts=${RESTARTS:-100}
while true; do
    code=0
    "${everywhere[@]}" --command="bash -c ${start@Q}" || code=$?
    if [ "$code" != 75 ] || [ "$restarts" -le 0 ]; then
        exit "$code"
    fi
    restarts=$((restarts - 1))
    echo "starting again from the last checkpoint, $restarts further times at the most" >&2
done
