#!/usr/bin/env bash
# Debian packages beyond Python's; calling it again changes nothing.
# usage: deploy/install-debian.sh WHAT [WHAT ...]
#   hosts        every host of `ray up` (SSH server, rsync, network tools)
#   prometheus   Prometheus and promtool
#   browser      Chromium, for tests of the status page and for pictures
#   tests        all that tests use: hosts, prometheus, browser
set -euo pipefail

[ $# -gt 0 ] || { echo "install-debian.sh: say what: hosts, prometheus, browser, tests" >&2; exit 2; }
packages=()
for what in "$@"; do
  case "$what" in
    hosts) packages+=(openssh-server openssh-client rsync iproute2 util-linux) ;;
    prometheus) packages+=(prometheus) ;;
    browser) packages+=(chromium) ;;
    tests) packages+=(openssh-server openssh-client rsync iproute2 util-linux prometheus chromium zsh fish) ;;
    *)
      echo "install-debian.sh: '$what': unknown; valid: hosts, prometheus, browser, tests" >&2
      exit 2
      ;;
  esac
done

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
