#!/usr/bin/env bash
# Start Ray on this host with the resources of its role; `ray up` calls it on every host.
#
#   start-host.sh robot      the head: beside the robot; offers `robot`
#   start-host.sh system2    a worker: has the GPU; offers `s2_gpu`. The head is in RAY_HEAD_IP.
#
# What a role needs is checked before Ray starts, so that a host that cannot do its work
# offers none, and says why in one line. OPENHELIX_WITHOUT_GPU=1 lets a host offer `s2_gpu`
# that has no GPU: for trials with a System 2 that runs on the CPU.
set -euo pipefail

role=${1:-}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
ray=$here/.venv/bin/ray
keys=${OPENHELIX_KEYS:-$HOME/.openhelix/keys}
metrics_port=9140 # of Ray itself; the project's own begin at 9108, the status page is at 9120

refuse() {
  echo "openhelix: $(hostname) refuses to be a $role host: $1" >&2
  exit 1
}

case $role in robot | system2) ;; *) refuse "expected robot or system2" ;; esac
[ -x "$ray" ] || refuse "no $ray; run \`make setup\` in $here"
token=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
[ -s "$token" ] || refuse "no Ray token in $token; make one with \`ray get-auth-token --generate\`"
[ -s "$keys/server.public" ] || refuse "no CURVE keys in $keys; make some with \`openhelix keys\`"
compgen -G "$keys/*.secret" >/dev/null || refuse "no .secret in $keys; \`openhelix keys --robot NAME\` makes one"
# What rsync or a loose umask may have let others read.
chmod 700 "$keys" && chmod 600 "$token" "$keys"/*.secret

# The mode is stated rather than guessed from the token's presence: without it Ray would
# start open to everybody when the token is missing.
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
# The head calls workers that went away until they answer, for a year rather than 15 minutes:
# Ray never again calls a host on which that failed once.
export AUTOSCALER_NODE_START_WAIT_S=31536000
ulimit -c 0 # a core dump holds keys
# Shares, not limits: a host with few cores still takes every process of its role.
cpus=$(nproc)
[ "$cpus" -ge 4 ] || cpus=4

start() {
  "$ray" stop
  "$ray" start "$@" --num-cpus="$cpus" --metrics-export-port=$metrics_port
}

if [ "$role" = robot ]; then
  options=(--head --port=6379 --dashboard-host=127.0.0.1 --resources='{"robot": 1}'
    --autoscaling-config="$HOME/ray_bootstrap_config.yaml")
else
  [ -s "$keys/server.secret" ] || refuse "no server.secret in $keys, with which System 2 shows who it is"
  if [ "${OPENHELIX_WITHOUT_GPU:-0}" = 1 ]; then
    gpus=0
  else
    gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
    [ "$gpus" -gt 0 ] || refuse "no GPU: nvidia-smi shows none (install the driver, or take the host out of worker_ips)"
  fi
  options=(--address="${RAY_HEAD_IP:?}:6379" --num-gpus="$gpus" --resources='{"s2_gpu": 1}')
fi
# Ray gives a start half a minute, which a host that has just booted may need for itself.
start "${options[@]}" || { sleep 5 && start "${options[@]}"; } || { sleep 15 && start "${options[@]}"; }
