#!/usr/bin/env bash
# Submit a training entry point to Slurm: one process for each GPU, and nodes with rollout servers beside them where the
# run samples from some. Where it runs is said here, what it does by the config.
#
#   NODES=8 launch/slurm.sh train_rl configs/rl_qwen2_5_32b_cispo.py /shared/runs/rl --init_from=/shared/qwen
#   NODES=8 SERVERS=4 MODEL=/shared/Qwen2.5-32B SERVER_FLAGS="--tp-size 8 --context-length 32768" launch/slurm.sh \
#       train_rl configs/rl_qwen2_5_32b_sglang.py /shared/runs/rl --init_from=/shared/qwen
#   NODES=8 launch/slurm.sh --dry_run train_rl configs/rl_qwen2_5_32b_cispo.py /shared/runs/rl --init_from=/shared/qwen
#
# ENTRY CONFIG WORKDIR [flags]; WORKDIR and this checkout lie where all nodes see them. Environment: NODES of the
# trainer, GPUS of a node (8), TIME (24:00:00), GRACE seconds between SIGTERM and the end (300), RESTARTS (100), VENV,
# SBATCH_FLAGS (partition, account), and for rollout servers SERVERS (nodes, a server on each), MODEL (folder they start
# with), SERVER_FLAGS, SERVER_PORT (30000), HEALTH seconds to wait for them (1800). One that dies is started again.
# A job that exits with 75 (all servers lost; SIGTERM: TIME is over, or by `scancel --batch --signal=TERM JOB`), or
# that loses a host, is requeued and goes on from its last checkpoint.
set -euo pipefail

dry='' job=''
case "${1:-}" in
--dry_run) dry=yes && shift ;;
--job) job=yes && shift ;; # Slurm runs a copy of this file on the first node
esac
if [ -n "$job" ]; then cd "$SLURM_SUBMIT_DIR"; else cd "$(dirname "$0")/.."; fi
if [ $# -lt 3 ]; then
    sed -n '5,8s/^# *//p' "$0" >&2
    exit 2
fi
entry=$1 config=$2 workdir=$3
shift 3
nodes=${NODES:?say on how many nodes, NODES=8} gpus=${GPUS:-8} servers=${SERVERS:-0} port=${SERVER_PORT:-30000}
if [ "$servers" != 0 ]; then
    : "${MODEL:?say what the servers serve, MODEL=folder}"
fi
[[ ${RESTARTS:-100} =~ ^[0-9]+$ ]] || { echo "RESTARTS=$RESTARTS: write how often, 0 or more" >&2 && exit 2; }
logs=$workdir/hosts/logs

# The steps of the job, which are printed, or run. Trainers on the first nodes, servers on the last.
if [ -n "$job" ]; then
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
else
    mapfile -t hosts < <(seq -f NODE%g "$((nodes + servers))") # which, Slurm says when the job starts
fi
list() { (IFS=, && echo "$*"); }
read -r -a server_flags <<<"${SERVER_FLAGS:-}"
serving=(env PLATFORM=cuda HOST=0.0.0.0 READY_SECONDS="${HEALTH:-1800}" RESTARTS="${RESTARTS:-100}"
    srun --job-name=servers --nodelist="$(list "${hosts[@]:nodes}")"
    --nodes="$servers" --ntasks="$servers" --ntasks-per-node=1 --gpus-per-task="$gpus"
    --open-mode=append --output="$logs/server-%n.log" launch/sglang.sh "${MODEL:-}" "$port" "${server_flags[@]}")
training=(env M1JAX_PROCESSES=auto JAX_PLATFORMS=cuda srun --job-name=trainer
    --nodelist="$(list "${hosts[@]:0:nodes}")" --nodes="$nodes" --ntasks=$((nodes * gpus)) --ntasks-per-node="$gpus"
    --gpu-bind=none --open-mode=append --output="$logs/%t.log" "${VENV:-.venv}/bin/python" -m "experiments.$entry"
    --config="$config" --workdir="$workdir" "$@")
if [ "$servers" != 0 ]; then
    urls=()
    for host in "${hosts[@]:nodes}"; do urls+=("'http://$host:$port'"); done
    training+=("--config.servers.urls=($(list "${urls[@]}"),)")
fi

if [ -z "$job" ]; then
    read -r -a more <<<"${SBATCH_FLAGS:-}"
    # B: SIGTERM comes to the script below alone, GRACE seconds before the job's time is over.
    submit=(sbatch --job-name="m1jax-$(basename "$workdir")" --nodes=$((nodes + servers)) --exclusive
        --gpus-per-node="$gpus" --ntasks-per-node="$gpus" --time="${TIME:-24:00:00}" --signal="B:TERM@${GRACE:-300}"
        --requeue --open-mode=append --output="$logs/job.log" "${more[@]}"
        launch/slurm.sh --job "$entry" "$config" "$workdir" "$@")
    if [ -n "$dry" ]; then
        echo "${submit[*]@Q}"
        if [ "$servers" != 0 ]; then echo "${serving[*]@Q}"; fi
        echo "${training[*]@Q}"
        exit 0
    fi
    mkdir -p "$logs"
    exec "${submit[@]}"
fi

finish() { # 1 and 2 would end the same again. All else is a host that was lost, or asks for it (75).
    if [ "$1" -gt 2 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "${RESTARTS:-100}" ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$1"
}
trap 'finish 75' TERM # while there is no trainer yet

if [ "$servers" != 0 ]; then
    "${serving[@]}" &
    server=$!
    trap 'kill "$server" 2>/dev/null || true' EXIT
    for host in "${hosts[@]:nodes}"; do
        until curl -fsS -o /dev/null --max-time 10 "http://$host:$port/health"; do
            if [ "$SECONDS" -gt "${HEALTH:-1800}" ] || ! kill -0 "$server" 2>/dev/null; then
                echo "the rollout server on $host is not healthy, see $logs" >&2
                exit 2
            fi
            sleep 5
        done
    done
fi

# To the trainer's step, through Slurm: srun makes a SIGKILL of SIGTERM. Not to the servers, which a save may wait for.
# shellcheck disable=SC2329 # the trap calls it
save() {
    local step
    while kill -0 "$trainer" 2>/dev/null; do
        step=$(squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format='%i %j' |
            awk '$2 == "trainer" {print $1}') || true
        if [ -n "$step" ] && scancel --signal=TERM "$step"; then return 0; fi
        sleep 1 # Slurm does not know the step yet
    done
}
"${training[@]}" &
trainer=$!
trap save TERM
while kill -0 "$trainer" 2>/dev/null; do
    wait "$trainer" || true # a signal to this script ends a wait, not the step
done
code=0
wait "$trainer" || code=$?
if [ "$code" = 134 ]; then echo "aborted by JAX: the first process, which all need, is gone, see $logs/0.log" >&2; fi
finish "$code"
