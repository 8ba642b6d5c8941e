#!/usr/bin/env bash
# Run a training entry point on all hosts of a TPU slice that was made as TPU VMs.
#
#   launch/tpu_vm.sh my-v5p us-east5-a train_rl configs/rl_m1.py /mnt/shared/runs/rl
#   launch/tpu_vm.sh --dry_run my-v5p us-east5-a train_rl configs/rl_m1.py /mnt/shared/runs/rl
#   launch/tpu_vm.sh --stop my-v5p us-east5-a
#   SERVERS="http://gpu-0:30000 http://gpu-1:30000" \
#       launch/tpu_vm.sh my-v5p us-east5-a train_rl configs/rl_m1_sglang.py /mnt/shared/runs/rl
#
# NAME ZONE ENTRY CONFIG WORKDIR [flags]. Every host has this checkout in FOLDER (m1jax, below the home folder) with its
# environment in VENV (.venv there), and WORKDIR on a folder that all of them mount (NFS; a mounted bucket is too slow
# in showing what another host wrote). SERVERS are rollout servers that launch/sglang.sh started elsewhere: every host
# waits until all of them are healthy, HEALTH seconds (1800) at the most. RESTARTS (100) is how often a job that exits
# with 75, or loses a host or the connection to it, is started again. A slice runs one job: what an earlier start left
# on it is asked to save, and has GRACE seconds (300) to do so. --stop sends SIGTERM to what this script started there:
# it saves and exits.
set -euo pipefail

dry='' stop=''
case "${1:-}" in
--dry_run) dry=yes && shift ;;
--stop) stop=yes && shift ;;
esac
if { [ -n "$stop" ] && [ $# != 2 ]; } || { [ -z "$stop" ] && [ $# -lt 5 ]; }; then
    sed -n '4,8s/^# *//p' "$0" >&2
    exit 2
fi
name=$1 zone=$2 pid_file=.m1jax-$1.pid
shift 2
everywhere=(gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all)
# A pid is believed only while it is that of an entry point of ours, or of the shell that is about to become one.
ours="grep -qs experiments /proc/\$pid/cmdline"
end="touch ~/$pid_file.stop; pid=\$(cat ~/$pid_file 2>/dev/null) && $ours && kill -TERM \$pid || true"
if [ -n "$stop" ]; then
    exec "${everywhere[@]}" --command="$end"
fi

entry=$1 config=$2 workdir=$3
shift 3
restarts=${RESTARTS:-100} grace=${GRACE:-300} health=${HEALTH:-1800}
for number in "$restarts" "$grace" "$health"; do
    [[ $number =~ ^[0-9]+$ ]] || { echo "RESTARTS, GRACE, HEALTH: $number is not a number" >&2 && exit 2; }
done
command=("${VENV:-.venv}/bin/python" -m "experiments.$entry" --config="$config" --workdir="$workdir" "$@")
gate=''
if [ -n "${SERVERS:-}" ]; then
    read -r -a urls <<<"$SERVERS"
    command+=("--config.servers.urls=($(printf "'%s'," "${urls[@]}"))")
    gate="SECONDS=0
for url in ${urls[*]@Q}; do
  until curl -fsS -o /dev/null --max-time 10 \$url/health; do
    if [ \$SECONDS -ge $health ]; then echo \"the rollout server \$url is not healthy\" >&2; exit 2; fi; sleep 5
  done
done"
fi
# Of each host: the shell in ( ) waits for what an earlier start left there when the connection was lost, then for the
# servers, and becomes the trainer, all under the one pid that --stop asks for. Whoever was asked to stop, or has to
# give way to a later start, ends with 143, which does not ask to be started again.
leave="if [ -e ~/$pid_file.stop ] || [ \"\$(cat ~/$pid_file)\" != \$mine ]; then exit 143; fi"
start="cd ${FOLDER:-m1jax} && mkdir -p ${workdir@Q}/hosts/logs || exit 2
(
  trap '' TERM
  mine=\$BASHPID pid=\$(cat ~/$pid_file 2>/dev/null)
  echo \$mine >~/$pid_file
  if [ -n \"\$pid\" ] && $ours; then
    kill -TERM \$pid
    for ((i = 0; i < $grace; i++)); do $ours || break; sleep 1; done
    ! $ours || kill -KILL \$pid
  fi
  trap - TERM
  $leave
  $gate
  export M1JAX_PROCESSES=auto JAX_PLATFORMS=tpu
  exec ${command[*]@Q} >>${workdir@Q}/hosts/logs/\$(hostname).log 2>&1
) & mine=\$!
wait \$mine; code=\$?
$leave
exit \$code"
forget=("${everywhere[@]}" --command="rm -f ~/$pid_file.stop") # once, so that a --stop between two starts is seen
step=("${everywhere[@]}" --command="bash -c ${start@Q}")
if [ -n "$dry" ]; then
    echo "${forget[*]@Q}"
    echo "${step[*]@Q}"
    exit 0
fi
"${forget[@]}"
asked=''
trap 'asked=yes; "${everywhere[@]}" --command="$end" || true' INT TERM
while true; do
    code=0
    "${step[@]}" &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        wait "$pid" || true # a signal to this script ends a wait, not the step
    done
    wait "$pid" || code=$?
    # 1 and 2 would end the same again, and 143 was asked for. All else is a host that was lost, or asks for it (75).
    if [ "$code" -le 2 ] || [ "$code" = 143 ] || [ -n "$asked" ] || [ "$restarts" = 0 ]; then
        exit "$code"
    fi
    restarts=$((restarts - 1))
    echo "starting again from the last checkpoint, $restarts further times at the most" >&2
done
