#!/bin/bash
# Installs what havm needs to build and to be tested: Debian packages, and a small guest kernel
# under target/guest/kernel. Debian 12 (with backports) or 13, as root. Says nothing and touches
# nothing when all is there; starts no service.
set -euo pipefail

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=${CARGO_TARGET_DIR:-$top/target}
kernel=$target/guest/kernel
# Wanted in the guest (button and evdev: so that it obeys `virsh shutdown`). What they depend on is
# read from the modules themselves.
modules="virtio_pci virtio_blk virtio_net button evdev"

# From the distribution's main archive.
plain="busybox-static cpio iproute2 iputils-ping nftables pkg-config gcc libc6-dev xz-utils iperf3 fio nbdkit libnbd-bin util-linux"
# Must be recent: QEMU 8.2 and libvirt 10 at least. Debian 12 has them in its backports.
virt="qemu-system-x86 qemu-utils ipxe-qemu seabios libvirt-daemon libvirt-daemon-system libvirt-daemon-driver-qemu libvirt-clients libvirt-dev"
qemu_min=1:8.2
libvirt_min=10.0

die() { echo "deps: $*" >&2; exit 1; }
say() { echo "deps: $*"; }

# Prints the names among its arguments that are not installed.
missing() {
  local have
  have=$(dpkg-query -W -f '${binary:Package} ${db:Status-Status}\n' 2>/dev/null |
    sed -n 's/\(:[a-z0-9]*\)\{0,1\} installed$//p')
  local p
  for p in "$@"; do
    grep -qxF "$p" <<<"$have" || echo "$p"
  done
}

# True when package $1 is installed in version $2 or later.
at_least() {
  local v
  v=$(dpkg-query -W -f '${Version}' "$1" 2>/dev/null) || return 1
  [ -n "$v" ] && dpkg --compare-versions "$v" ge "$2"
}

kernel_there() { [ -s "$kernel/vmlinuz" ] && [ -s "$kernel/modules/order" ] && grep -qsxF "$modules" "$kernel/modules/wanted"; }

command -v cargo >/dev/null || [ -x "${CARGO_HOME:-${HOME:-/root}/.cargo}/bin/cargo" ] ||
  die "cargo is not there. Install Rust 1.88 or later (rustup, or your distribution's rustc and cargo) and run this again."

[ -r /etc/os-release ] || die "no /etc/os-release: this script knows Debian 12 and 13 only"
# shellcheck disable=SC1091
. /etc/os-release
[ "${ID:-}" = debian ] || die "this is ${ID:-unknown}: this script knows Debian 12 and 13 only. Install by hand: $plain $virt"
[ "$(dpkg --print-architecture)" = amd64 ] || die "havm captures x86-64 guests only; this is $(dpkg --print-architecture)"

need_plain=$(missing $plain)
need_virt=$(missing $virt)
at_least qemu-system-x86 $qemu_min || need_virt="$virt"
at_least libvirt-daemon $libvirt_min || need_virt="$virt"
if [ -z "$need_plain$need_virt" ] && kernel_there; then
  exit 0
fi
[ "$(id -u)" = 0 ] || die "missing: $need_plain $need_virt$(kernel_there || echo ' guest kernel'). Run this as root."

work=$(mktemp -d)
policy=/usr/sbin/policy-rc.d
policy_saved=
cleanup() {
  rm -rf "$work"
  [ "$policy_saved" = none ] && rm -f $policy
  [ "$policy_saved" = kept ] && mv -f "$policy.havm-kept" $policy
  return 0
}
trap cleanup EXIT
trap 'exit 130' INT TERM

export DEBIAN_FRONTEND=noninteractive
apt() { apt-get -q -y -o APT::Sandbox::User=root -o Dpkg::Options::=--force-confold "$@" </dev/null; }

updated=
update() {
  [ -z "$updated" ] || return 0
  updated=1
  say "apt-get update"
  # A foreign source that does not answer must not stop us: what is needed is asked for below.
  apt update >"$work/update.log" 2>&1 || { tail -n 5 "$work/update.log" >&2; say "some sources did not answer, going on"; }
}

# Adds the backports suite of this release, with the URI and the key that its sources name already.
add_backports() {
  local suite=$VERSION_CODENAME-backports
  if grep -qsE "^[^#]*\b$suite\b" /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; then
    return 0
  fi
  local uri= key= f line
  for f in /etc/apt/sources.list.d/*.sources; do
    [ -r "$f" ] || continue
    # The stanza whose suites hold the release itself, not its security or updates.
    line=$(awk -v RS= -v want="$VERSION_CODENAME" '
      { uri=""; key=""; ok=0
        n = split($0, l, "\n")
        for (i = 1; i <= n; i++) {
          m = split(l[i], w, /[ \t]+/)
          if (w[1] == "URIs:") uri = w[2]
          if (w[1] == "Signed-By:") key = w[2]
          if (w[1] == "Suites:") for (j = 2; j <= m; j++) if (w[j] == want) ok = 1
        }
        if (ok && uri != "") { print uri, key; exit } }' "$f")
    [ -z "$line" ] || { read -r uri key <<<"$line"; break; }
  done
  if [ -z "$uri" ]; then
    for f in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
      [ -r "$f" ] || continue
      line=$(awk -v want="$VERSION_CODENAME" '$1 == "deb" {
        key = ""; i = 2
        if ($2 ~ /^\[/) { for (; i <= NF; i++) { if ($i ~ /signed-by=/) { key = $i; sub(/.*signed-by=/, "", key); sub(/\]$/, "", key) }
                                                 if ($i ~ /\]$/) break }; i++ }
        if ($(i + 1) == want) { print $i, key; exit } }' "$f")
      [ -z "$line" ] || { read -r uri key <<<"$line"; break; }
    done
  fi
  [ -n "$uri" ] || die "no apt source names $VERSION_CODENAME, so its backports cannot be added. Add $suite by hand."
  say "adding $suite"
  {
    echo "Types: deb"
    echo "URIs: $uri"
    echo "Suites: $suite"
    echo "Components: main"
    [ -z "${key:-}" ] || echo "Signed-By: $key"
  } >/etc/apt/sources.list.d/havm-backports.sources
}

# While packages are installed, nothing may be started.
hold_services() {
  if [ -e $policy ]; then
    policy_saved=kept
    mv -f $policy $policy.havm-kept
  else
    policy_saved=none
  fi
  printf '#!/bin/sh\nexit 101\n' >$policy
  chmod 755 $policy
}

if [ -n "$need_plain$need_virt" ]; then
  suite=
  if [ "${VERSION_ID:-}" = 12 ] && [ -n "$need_virt" ]; then
    add_backports
    suite="-t $VERSION_CODENAME-backports"
  fi
  update
  hold_services
  if [ -n "$need_plain" ]; then
    say "installing" $need_plain
    apt install --no-install-recommends $need_plain >"$work/plain.log" 2>&1 || { tail -n 30 "$work/plain.log" >&2; die "apt-get install failed, see above"; }
  fi
  if [ -n "$need_virt" ]; then
    say "installing" $need_virt
    apt install --no-install-recommends $suite $need_virt >"$work/virt.log" 2>&1 || { tail -n 30 "$work/virt.log" >&2; die "apt-get install failed, see above"; }
  fi
  at_least qemu-system-x86 $qemu_min || die "QEMU is older than $qemu_min after the installation: is a newer one held back?"
  at_least libvirt-daemon $libvirt_min || die "libvirt is older than $libvirt_min after the installation: is a newer one held back?"
fi

# The guest kernel: unpacked, not installed.
get_kernel() {
  local meta=linux-image-cloud-amd64 image
  image=$(apt-cache depends --no-recommends --no-suggests $meta 2>/dev/null | awk '$1 == "Depends:" && $2 ~ /^linux-image-/ { print $2; exit }')
  if [ -z "$image" ]; then
    update
    image=$(apt-cache depends --no-recommends --no-suggests $meta 2>/dev/null | awk '$1 == "Depends:" && $2 ~ /^linux-image-/ { print $2; exit }')
  fi
  [ -n "$image" ] || die "apt does not know $meta: no guest kernel to be had"
  say "fetching guest kernel $image"
  if ! (cd "$work" && apt download "$image" >download.log 2>&1); then
    update
    (cd "$work" && apt download "$image" >download.log 2>&1) || { tail -n 5 "$work/download.log" >&2; die "apt-get download $image failed"; }
  fi
  dpkg -x "$work"/linux-image-*.deb "$work/x"

  local new=$kernel.new root dep m path deps
  rm -rf "$new"
  mkdir -p "$new/modules"
  cp "$work"/x/boot/vmlinuz-* "$new/vmlinuz"
  # /lib is a link to /usr/lib on newer releases; the package may use either.
  root=$(find "$work/x" -type d -path '*/lib/modules/*' -prune | head -n 1)
  [ -n "$root" ] || die "package $image holds no modules"
  # Adds a module after the ones that it needs. The package has no modules.dep (depmod makes it at
  # installation), so the dependencies are read from the module.
  add_module() {
    local name=$1 file deps d any=${1//_/[_-]}
    grep -qxF "$name.ko" "$new/modules/order" 2>/dev/null && return 0
    file=$(find "$root" -name "$any.ko" -o -name "$any.ko.xz" -o -name "$any.ko.zst" | head -n 1)
    [ -n "$file" ] || return 0 # built into the kernel
    case $file in
      *.xz) xz -dc "$file" >"$work/$name.ko" ;;
      *.zst) zstd -qdc "$file" >"$work/$name.ko" ;;
      *) cp "$file" "$work/$name.ko" ;;
    esac
    deps=$(tr '\0' '\n' <"$work/$name.ko" | sed -n 's/^depends=//p' | head -n 1 | tr ',' ' ')
    for d in $deps; do add_module "$d"; done
    cp "$work/$name.ko" "$new/modules/$name.ko"
    echo "$name.ko" >>"$new/modules/order"
  }
  : >"$new/modules/order"
  for m in $modules; do add_module "$m"; done
  echo "$modules" >"$new/modules/wanted"
  [ -s "$new/modules/order" ] || echo "# all built in" >"$new/modules/order"
  rm -rf "$kernel"
  mv "$new" "$kernel"
}
if ! kernel_there; then
  mkdir -p "$(dirname "$kernel")"
  get_kernel
fi
