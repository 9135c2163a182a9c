#!/usr/bin/env bash
# Build docker/Dockerfile without a Docker engine, and use what it gives: as its user, on a read-only
# root, under the health check, with a key, an image and a SIGTERM.
#
#   sudo apt-get install buildah debootstrap curl jq
#   sudo docker/check_image.sh [IMAGE.jpg]
#
# The base image is made by debootstrap and committed under the name that the Dockerfile asks for, so
# that no registry is needed. FETCH_MOUNTS may name files (`a:b`, comma-separated) that pip and apt need
# on this machine alone: certificates, a mirror's configuration. They do not get into the image; where
# one of its packages writes, none may be (not /etc/ssl/certs, which ca-certificates makes).
set -euo pipefail
cd "$(dirname "$0")/.."
picture=${1:-}
fetch_mounts=${FETCH_MOUNTS:-}
work=$(mktemp -d)
port=8129
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=${STORAGE_DRIVER:-vfs}
base=docker.io/library/debian:bookworm-slim
container=""
served=""
cleanup() {
    [ -z "$served" ] || kill "$served" 2> /dev/null || true
    for mounted in tmp proc mnt .; do
        if mountpoint -q "$work/image/$mounted"; then umount -l "$work/image/$mounted" || true; fi
    done
    [ -z "$container" ] || buildah rm "$container" > /dev/null || true
    rm -rf --one-file-system "$work"
}
trap cleanup EXIT
say() { printf '== %s\n' "$*"; }

if ! buildah inspect "$base" > /dev/null 2>&1; then
    say "the base image, by debootstrap"
    debootstrap --variant=minbase bookworm "$work/root" http://deb.debian.org/debian > "$work/debootstrap.log"
    made=$(buildah from scratch)
    buildah copy --quiet "$made" "$work/root" / > /dev/null
    buildah config --cmd bash "$made"
    buildah commit --quiet "$made" "$base" > /dev/null
    buildah rm "$made" > /dev/null
    rm -rf "$work/root"
fi

say "the image, from docker/Dockerfile"
mounts=()
for pair in ${fetch_mounts//,/ }; do mounts+=(--volume "$pair:ro"); done
buildah bud --quiet --layers --pull-never --target cpu "${mounts[@]}" -f docker/Dockerfile -t mmtl:cpu . > /dev/null
container=$(buildah from --pull-never mmtl:cpu)
root=$(buildah mount "$container")

say "what is in it"
[ "$(buildah inspect --format '{{.OCIv1.Config.User}}' "$container")" = 10001:10001 ]
for absent in gcc cc make pip pip3 curl git; do
    ! chroot "$root" sh -c "PATH=/opt/mmtl/bin:\$PATH; command -v $absent" || { echo "$absent is in the image"; exit 1; }
done
[ -z "$(ls -A "$root/var/lib/apt/lists" 2> /dev/null)" ]
# Of Python's own venv: neither `make audit` nor `make sbom` knows of them.
for absent in pip pkg_resources setuptools; do
    ! ls -d "$root"/opt/mmtl/lib/python3*/site-packages/"$absent" 2> /dev/null || { echo "$absent is in the image"; exit 1; }
done
writable=$(chroot --userspec=10001:10001 "$root" find / -xdev -type f -writable -not -path '/proc/*' 2> /dev/null || true)
[ -z "$writable" ] || { echo "its user may write $writable"; exit 1; }
# Else no identity provider could be asked by HTTPS.
chroot --userspec=10001:10001 "$root" python3 -c \
    "import ssl, sys; sys.exit(not ssl.create_default_context().get_ca_certs())"
du -sh "$root" | cut -f1

say "without keys it refuses to let others in"
if buildah run "$container" -- mmtl serve 2> "$work/refused"; then exit 1; fi
head -1 "$work/refused"

say "served as its user, on a read-only root"
mkdir "$work/secrets"
key=$(buildah run --user 0 --volume "$work/secrets:/secrets" --env MMTL_KEYS=/secrets/keys.json \
    "$container" -- mmtl keys create check --scope predict --scope metrics --scope admin)
chmod -R a+rX "$work"
# chroot isolation cannot make the root read-only; a bind mount of it can.
mkdir "$work/image"
mount --bind "$root" "$work/image"
mount -o remount,ro,bind "$work/image"
mount --bind "$work/secrets" "$work/image/mnt"
# As in any container: what the CPU can do, and so which engine it gets, stands in /proc. /tmp is that
# of docker-compose.yml.
mount --bind /proc "$work/image/proc"
mount -t tmpfs -o size=256m,mode=1777,noexec,nosuid,nodev tmpfs "$work/image/tmp"
settings=(PATH=/opt/mmtl/bin:/usr/bin:/bin MMTL_HOST=127.0.0.1 MMTL_PORT=$port MMTL_KEYS=/mnt/keys.json)
chroot --userspec=10001:10001 "$work/image" env -i "${settings[@]}" mmtl serve 2> "$work/log" &
served=$!
check=$(buildah inspect --format '{{index .Docker.config.Healthcheck.Test 3}}' "$container" 2> /dev/null) ||
    check=$(sed -n 's/.*"-c", "\(.*\)"\]/\1/p' docker/Dockerfile)
healthy=no
for _ in $(seq 100); do
    if chroot --userspec=10001:10001 "$work/image" env -i PATH=/opt/mmtl/bin:/usr/bin MMTL_PORT=$port python3 -c "$check" 2> /dev/null; then
        healthy=yes
        break
    fi
    sleep 0.1
done
[ $healthy = yes ] || { cat "$work/log"; exit 1; }
grep -q "^Uid:.10001" "/proc/$served/status"
if [ -n "$picture" ]; then
    curl --fail --silent -H "Authorization: Bearer $key" -F "files=@$picture" \
        "http://127.0.0.1:$port/predict" | jq -c '.model, .results[0].prediction.melanoma'
fi
curl --fail --silent -H "Authorization: Bearer $key" "http://127.0.0.1:$port/metrics" | grep ^mmtl_model_info
curl --fail --silent -H "Authorization: Bearer $key" -X POST "http://127.0.0.1:$port/admin/reload" | jq -c .
kill -TERM $served
wait $served
served=""
if grep -E "passed over|weights not shared" "$work/log"; then exit 1; fi
say "ended with 0 on SIGTERM: all is well"
