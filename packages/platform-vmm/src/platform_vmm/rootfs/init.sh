#!/bin/busybox sh
# PID 1 of the initrd: loads what the devices need, puts a writable layer in memory over the read-only root
# disk, and becomes the guest's init. Told on the kernel's command line:
#   platform.overlay=BYTES   how much may be written over the root (default: a quarter of the memory)
#   platform.root=DEVICE     the root disk (default /dev/vda)
b=/bin/busybox
fail() {
  echo "platform-guest: $*"
  $b poweroff -f
}
$b mount -t devtmpfs dev /dev
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
while read -r module; do
  $b insmod "/modules/$module.ko" || fail "module $module cannot be loaded"
done </modules/order
overlay=25% disk=/dev/vda
for word in $($b cat /proc/cmdline); do
  case "$word" in
  platform.overlay=*) overlay="${word#*=}" ;;
  platform.root=*) disk="${word#*=}" ;;
  esac
done
tries=0
until [ -b "$disk" ]; do
  tries=$((tries + 1))
  [ "$tries" -gt 300 ] && fail "there is no root disk $disk"
  $b sleep 0.1
done
$b mount -t squashfs -o ro "$disk" /lower || fail "the root disk cannot be mounted"
$b mount -t tmpfs -o "mode=755,size=$overlay" overlay /upper || fail "no room of $overlay for what is written"
$b mkdir /upper/files /upper/work
$b mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work overlay /root ||
  fail "the writable layer cannot be mounted"
init=/usr/lib/platform-guest/init
[ -x "/root$init" ] || fail "the image has no $init"
# The guest's init mounts these as it wants them; the console stays open.
$b umount -l /dev /proc /sys
exec $b switch_root /root "$init"
