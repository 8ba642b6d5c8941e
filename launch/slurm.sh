#!/usr/bin/env bash
# Submit a training entry point to Slurm: one process for each GPU, and nodes with rollout servers beside them where the
# run samples from some. Where it runs is said here, what it does by the config.
#
#   NODES=8 launch/slurm.sh train_rl configs/rl_qwen2_5_32b_cispo.py /shared/runs/rl
#   NODES=8 SERVERS=4 MODEL=/shared/qwen launch/slurm.sh train_rl configs/rl_qwen2_5_32b_sglang.py /shared/runs/rl
#   NODES=8 launch/slurm.sh --dry_run train_rl configs/rl_qwen2_5_32b_cispo.py /shared/runs/rl
#
# ENTRY CONFIG WORKDIR [flags]; WORKDIR and this checkout lie where all nodes see them. Environment: NODES of the
# trainer, GPUS of a node (8), TIME (24:00:00), GRACE seconds between SIGTERM and the end (300), RESTARTS (100), VENV,
# SBATCH_FLAGS (partition, account), and for rollout servers SERVERS (nodes, a server on each), MODEL (folder they start
# with), SERVER_FLAGS, SERVER_PORT (30000), HEALTH seconds to wait for them (1800).
# A job that exits with 75 (SIGTERM, all servers lost), or loses a host, is requeued and goes on from its last checkpoint.
set -euo pipefail

dry='' job=''
case "${1:-}" in
--dry_run) dry=yes && shift ;;
--job) job=yes && shift ;; # Slurm runs a copy of this file on the first node
esac
if [ -z "$job" ]; then
    cd "$(dirname "$0")/.."
fi
if [ $# -lt 3 ]; then
    sed -n '5,7s/^# *//p' "$0" >&2
    exit 2
fi
entry=$1 config=$2 workdir=$3
shift 3
nodes=${NODES:?say on how many nodes, NODES=8} gpus=${GPUS:-8} servers=${SERVERS:-0} port=${SERVER_PORT:-30000}
if [ "$servers" != 0 ]; then
    : "${MODEL:?say what the servers serve, MODEL=folder}"
fi
logs=$workdir/hosts/logs
trainers=(srun --nodes="$nodes" --ntasks=$((nodes * gpus)) --ntasks-per-node="$gpus" --gpu-bind=none
    --output="$logs/%t.log" "${VENV:-.venv}/bin/python" -m "experiments.$entry"
    --config="$config" --workdir="$workdir" "$@")
read -r -a server_flags <<<"${SERVER_FLAGS:-}"
serving=(srun --nodes="$servers" --ntasks="$servers" --ntasks-per-node=1 --gpus-per-task="$gpus"
    --output="$logs/server-%n.log" launch/sglang.sh "${MODEL:-}" "$port" "${server_flags[@]}")

if [ -z "$job" ]; then
    read -r -a more <<<"${SBATCH_FLAGS:-}"
    submit=(sbatch --job-name="m1jax-$(basename "$workdir")" --nodes=$((nodes + servers)) --exclusive
        --gpus-per-node="$gpus" --ntasks-per-node="$gpus" --time="${TIME:-24:00:00}" --signal="B:TERM@${GRACE:-300}" --requeue --open-mode=append
        --output="$logs/job.log" "${more[@]}" launch/slurm.sh --job "$entry" "$config" "$workdir" "$@")
    if [ -n "$dry" ]; then
        echo "${submit[*]@Q}"
        if [ "$servers" != 0 ]; then
            echo "on the last $servers nodes: PLATFORM=cuda HOST=0.0.0.0 ${serving[*]@Q}"
            echo "then, when all are healthy at port $port, with --config.servers.urls of them:"
        fi
        echo "on the first $nodes nodes: M1JAX_PROCESSES=auto JAX_PLATFORMS=cuda ${trainers[*]@Q}"
        exit 0
    fi
    mkdir -p "$logs"
    exec "${submit[@]}"
fi

cd "$SLURM_SUBMIT_DIR"
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
list() { (IFS=, && echo "$*"); }
step='' urls=()
if [ "$servers" != 0 ]; then
    PLATFORM=cuda HOST=0.0.0.0 "${serving[0]}" --nodelist="$(list "${hosts[@]:nodes}")" "${serving[@]:1}" &
    step=$!
    trap 'kill "$step" 2>/dev/null || true' EXIT
    for host in "${hosts[@]:nodes}"; do
        until curl -fsS -o /dev/null --max-time 10 "http://$host:$port/health"; do
            if [ "$SECONDS" -gt "${HEALTH:-1800}" ] || ! kill -0 "$step" 2>/dev/null; then
                echo "the rollout server on $host is not healthy, see $logs" >&2
                exit 2
            fi
            sleep 5
        done
        urls+=("'http://$host:$port'")
    done
    trainers+=("--config.servers.urls=($(list "${urls[@]}"),)")
fi
export M1JAX_PROCESSES=auto JAX_PLATFORMS=cuda
code=0
# SIGTERM comes to this script (B:), which passes it on to the trainer alone: without servers it could not finish a save.
"${trainers[0]}" --nodelist="$(list "${hosts[@]:0:nodes}")" "${trainers[@]:1}" &
trainer=$!
trap 'kill -TERM "$trainer" 2>/dev/null || true' TERM
while kill -0 "$trainer" 2>/dev/null; do
    wait "$trainer" || true # a signal to this script ends a wait, not the step
done
wait "$trainer" || code=$?
if [ "$code" = 134 ]; then echo "aborted by JAX: the first process, which all need, is gone, see $logs/0.log" >&2; fi
# 1 and 2 would end the same again. All else is a host that was lost, or asks for it (75).
if [ "$code" -gt 2 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "${RESTARTS:-100}" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
