#!/usr/bin/env bash
# Run a training entry point on this machine: where it runs is said here, what it does by the config.
#
#   launch/local.sh train_rl configs/rl_tiny_cpu.py runs/rl_tiny
#   launch/local.sh train_rl configs/rl_tiny_cpu.py:smoke runs/smoke --config.seed=1
#   PLATFORM=cuda launch/local.sh train_rl configs/rl_tiny_cpu.py runs/rl_tiny
set -euo pipefail
cd "$(dirname "$0")/.."

if [ $# -lt 3 ]; then
    sed -n '4,6s/^# *//p' "$0" >&2
    exit 2
fi
entry=$1 config=$2 workdir=$3
shift 3

export JAX_PLATFORMS=${PLATFORM:-cpu}

# exec: signals reach the run itself, which saves and exits 75 on SIGTERM.
exec "${VENV:-.venv}/bin/python" -m "experiments.$entry" --config="$config" --workdir="$workdir" "$@"
