#!/usr/bin/env bash
# Debian packages that some tests and `ray up` need; calling it again changes nothing.
# Tests that miss one of them are skipped and say so.
set -euo pipefail

# Two hosts on one machine: tests/integration/test_two_hosts.py; and every host of `ray up`.
packages=(openssh-server openssh-client rsync iproute2 util-linux)
# Prometheus and promtool: tests/deploy and tests/integration/test_prometheus.py.
packages+=(prometheus)
# The status page in a browser: tests/integration/test_status.py.
packages+=(chromium)

missing=()
for name in "${packages[@]}"; do
  dpkg-query -W -f='${db:Status-Status}' "$name" 2>/dev/null | grep -qx installed || missing+=("$name")
done
[ ${#missing[@]} -gt 0 ] || exit 0
sudo=; [ "$(id -u)" = 0 ] || sudo=sudo
$sudo apt-get update -q
DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -q --no-install-recommends "${missing[@]}"
# Debian starts the server, with its own configuration, at the port that ours would take.
if [[ " ${missing[*]} " == *" prometheus "* ]] && [ -d /run/systemd/system ]; then
  $sudo systemctl disable --now prometheus
fi
