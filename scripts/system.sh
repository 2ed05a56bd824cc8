#!/usr/bin/env bash
# Installs the system packages that a make target needs, or says exactly what is missing.
set -euo pipefail
declare -A program=([bubblewrap]=bwrap [nftables]=nft [git]=git [iptables]=iptables [iproute2]=ip [jq]=jq [qemu-system-x86]=qemu-system-x86_64 [squashfs-tools]=mksquashfs [skopeo]=skopeo [nodejs]=node [libseccomp2]=libseccomp.so.2 [postgresql]=psql [chromium]=chromium)
export PATH="$PATH:/usr/sbin:/sbin"
is_here() {
  case "$1" in
    *.so.*) ldconfig -p | grep -F "$1 " >/dev/null ;;
    *) command -v "$1" >/dev/null ;;
  esac
}
missing=()
for package in "$@"; do
  is_here "${program[$package]}" || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0
if ! command -v apt-get >/dev/null; then
  echo "error: this needs ${missing[*]} and apt is not here: install them with your package manager, then run make again" >&2
  exit 2
fi
if [ "$(id -u)" -ne 0 ]; then
  echo "error: this needs ${missing[*]}: run 'sudo apt-get install ${missing[*]}', then run make again" >&2
  exit 2
fi
echo "system: installing ${missing[*]} with apt"
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
