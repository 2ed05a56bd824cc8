"""The measured init_script of a dstack guest: what its containers may reach, and how long it lives.

It is part of every app-compose, so that the compose hash says that a CVM enforces it. dstack (0.5.5 and
newer) sources it with bash before dockerd starts, as often as the guest boots. A local VMM enforces the same
itself and runs it not; `INIT_SCRIPT` is how it knows that it was asked for nothing else.
"""

from __future__ import annotations

INIT_SCRIPT = r"""# What this guest's containers may reach, and how long it lives.
# A bash of its own: in one that sources this, "set -e" may be without effect.
bash -euo pipefail /dev/fd/3 3<<'PLATFORM' || { echo "platform: no firewall, no boot" >&2; exit 1; }
config=/dstack/.host-shared/.user-config

# The hard lifetime counts from this boot, whatever becomes of the validator.
lifetime=$(jq -er '.hard_lifetime_s | numbers | select(. >= 1 and . <= 31536000) | floor' "$config")
systemd-run --quiet --unit=platform-hard-lifetime --on-active="${lifetime}s" \
  --timer-property=AccuracySec=1s systemctl --force poweroff

# dockerd puts its jump to DOCKER-USER before all of its own rules, and leaves what is in it as it is.
tables=(iptables)
if [ -e /proc/net/if_inet6 ]; then tables+=(ip6tables); fi
uplink=
while read -r interface destination _; do
  if [ "$destination" = 00000000 ]; then uplink=$interface; fi
done < /proc/net/route
for table in "${tables[@]}"; do
  "$table" -w -P FORWARD DROP
  "$table" -w -N DOCKER-USER 2>/dev/null || "$table" -w -F DOCKER-USER
  "$table" -w -A DOCKER-USER -m conntrack --ctstate ESTABLISHED,RELATED -j RETURN
  # What comes in to a published port, and the answers to it.
  "$table" -w -A DOCKER-USER -m conntrack --ctstate DNAT ${uplink:+-i "$uplink"} -j RETURN
done

# The validator and its egress proxy, by address: a name would need DNS, which carries data out.
urls=$(jq -er '.validator_base_url, (.proxy_url // empty) | strings' "$config")
while read -r url; do
  case $url in
    http://*) port=80 ;;
    https://*) port=443 ;;
    *) echo "platform: expected an http or https URL" >&2; continue ;;
  esac
  place=${url#*://}
  place=${place%%[/?#]*}
  place=${place##*@}
  if [[ $place =~ ^([0-9]{1,3}(\.[0-9]{1,3}){3})(:([0-9]{1,5}))?$ ]]; then
    iptables -w -A DOCKER-USER -p tcp -d "${BASH_REMATCH[1]}" --dport "${BASH_REMATCH[4]:-$port}" -j RETURN
  elif [[ $place =~ ^\[([0-9a-fA-F:]{2,39})\](:([0-9]{1,5}))?$ ]] && [ "${#tables[@]}" = 2 ]; then
    ip6tables -w -A DOCKER-USER -p tcp -d "${BASH_REMATCH[1]}" --dport "${BASH_REMATCH[3]:-$port}" -j RETURN
  else
    echo "platform: ${place//[^a-zA-Z0-9.:-]/?}: expected an address: containers will not reach it" >&2
  fi
done <<< "$urls"

for table in "${tables[@]}"; do
  "$table" -w -A DOCKER-USER -j DROP
  "$table" -w -C FORWARD -j DOCKER-USER 2>/dev/null || "$table" -w -I FORWARD -j DOCKER-USER
  # The guest itself serves its uplink, and no container.
  "$table" -w -N PLATFORM-INPUT 2>/dev/null || "$table" -w -F PLATFORM-INPUT
  "$table" -w -A PLATFORM-INPUT -i lo -j RETURN
  if [ -n "$uplink" ]; then "$table" -w -A PLATFORM-INPUT -i "$uplink" -j RETURN; fi
  "$table" -w -A PLATFORM-INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j RETURN
  if [ "$table" = ip6tables ]; then
    # Neighbours are found by these (RFC 4861), or nothing is routed.
    ip6tables -w -A PLATFORM-INPUT -p icmpv6 --icmpv6-type neighbour-solicitation -j RETURN
    ip6tables -w -A PLATFORM-INPUT -p icmpv6 --icmpv6-type neighbour-advertisement -j RETURN
  fi
  "$table" -w -A PLATFORM-INPUT -j DROP
  "$table" -w -C INPUT -j PLATFORM-INPUT 2>/dev/null || "$table" -w -I INPUT -j PLATFORM-INPUT
done
PLATFORM
"""
"""Bash, run as root; needs jq, iptables and systemd, which dstack's images have."""
