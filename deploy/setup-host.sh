#!/usr/bin/env bash
# Install the locked packages on this host; `ray up` calls it on every host.
#
#   setup-host.sh cpu|gpu    which lock: requirements/cpu.lock or gpu.lock
#
# A second call does no work. A .venv that was made from the other lock is made anew: the two
# provide the same packages under different names and must never be mixed.
set -euo pipefail

lock=${1:-}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case $lock in
cpu) gpu= ;;
gpu) gpu=1 ;;
*)
  echo "setup-host.sh: expected cpu or gpu, got '$lock'" >&2
  exit 2
  ;;
esac

cd "$here"
if [ -e .venv/.lock-kind ] && [ "$(cat .venv/.lock-kind)" != "$lock" ]; then
  rm -rf .venv
fi
# uv finds or fetches Python 3.11 itself; make asks for one on PATH otherwise.
if command -v uv >/dev/null && ! command -v "${PYTHON:-python3.11}" >/dev/null; then
  uv python install -q 3.11
  PYTHON=$(uv python find 3.11)
  export PYTHON
fi
make setup GPU="$gpu"
echo "$lock" >.venv/.lock-kind
