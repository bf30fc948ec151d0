#!/usr/bin/env bash
# Builds the images for real, with no registry, trains in them, stops and resumes, and reports sizes and times.
#
#   apt-get install --no-install-recommends podman runc debootstrap
#   sudo scripts/container_test.sh
#
# Needs root, 40 GB in $SCRATCH (/var/tmp), a Debian mirror and a package index. Whatever was made is removed at the end;
# KEEP=1 keeps storage and downloads for the next call. Other settings: BASE_IMAGE (else one is made from Debian's
# packages), DEVICES="cuda cpu", BUILD_ENV (a file of exports for the build: another package index, a proxy).
set -euo pipefail
cd "$(dirname "$0")/.."

WORK=${SCRATCH:-/var/tmp}/clip_train_container # removed at the end
DEVICES=${DEVICES-cuda cpu}
BUILD_ENV=${BUILD_ENV:-/dev/null}
CERTIFICATES=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}
SUITE=${SUITE:-trixie}
MIRROR=${MIRROR:-http://deb.debian.org/debian}
USER_ID=12345 # known to no image
export TMPDIR=$WORK/tmp # for podman's cache mounts too

main() {
    check_tools
    trap clean_up EXIT
    mkdir -p "$TMPDIR" "$WORK/runs"
    chown "$USER_ID" "$WORK/runs"
    # Limits above the caller's own cannot be set without CAP_SYS_RESOURCE.
    limits=(--ulimit "nofile=$(ulimit -Hn):$(ulimit -Hn)" --ulimit nproc=16384:16384)
    copy_context
    [ -n "${BASE_IMAGE:-}" ] || make_base
    for device in $DEVICES; do
        timed "build $device" build "$device"
        size "$device"
        check_image "$device"
        echo "CHANGED_FOR = '$device'" >>"$WORK/context/clip_train/__init__.py"
        timed "build $device after a change of code" build "$device"
        sh_inside "$device" "python -c 'import clip_train as c; assert c.CHANGED_FOR == \"$device\"'"
        [ -n "${KEEP:-}" ] || forget "$device" # two at once would need twice the disk
    done
    check_refused
    echo "All passed."
    column -t -s $'\t' "$WORK/report"
}

check_tools() {
    [ "$(id -u)" = 0 ] || fail "run it as root"
    for tool in podman runc debootstrap; do
        command -v "$tool" >/dev/null || fail "$tool is missing: apt-get install $tool"
    done
}

clean_up() {
    engine rm --all --force --time 0 >/dev/null 2>&1 || true
    rm -rf "$WORK/runs" "$WORK/context" "$WORK/base" "$WORK/report" "$WORK/env"
    [ -n "${KEEP:-}" ] && return
    engine rmi --all --force >/dev/null 2>&1 || true
    umount --quiet "$WORK/storage/overlay" || true
    rm -rf "$WORK"
}

forget() {
    engine rmi --force "clip_train:$1" >/dev/null
    engine image prune --force >/dev/null
}

engine() { podman --root "$WORK/storage" --runroot "$WORK/runroot" --runtime runc "$@"; }

# The tree as it is, with two things in it that must not get into the image.
copy_context() {
    rm -rf "$WORK/context" "$WORK/report"
    mkdir -p "$WORK/context"
    git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
        [ ! -e "$file" ] || printf '%s\0' "$file"
    done | tar --create --null --files-from=- | tar --extract --directory "$WORK/context"
    mkdir -p "$WORK/context/runs" "$WORK/context/.venv"
    touch "$WORK/context/runs/keep_out" "$WORK/context/.venv/keep_out"
    {
        cat "$BUILD_ENV"
        echo "export SSL_CERT_FILE=/run/secrets/ca PIP_CERT=/run/secrets/ca"
    } >"$WORK/env"
}

# What python:slim is to others: Debian, Python, its headers and venv.
make_base() {
    BASE_IMAGE=localhost/clip_train_base:$SUITE
    engine image exists "$BASE_IMAGE" && return
    timed "base from Debian's packages" bootstrap
}

bootstrap() {
    rm -rf "$WORK/base"
    debootstrap --variant=minbase --include=python3-venv,python3-dev,ca-certificates "$SUITE" "$WORK/base" "$MIRROR"
    rm -rf "$WORK"/base/var/cache/apt/* "$WORK"/base/var/lib/apt/lists/*
    tar --create --directory "$WORK/base" . | engine import - "$BASE_IMAGE"
    rm -rf "$WORK/base"
}

build() {
    engine build "${limits[@]}" --layers --isolation chroot --network host --tag "clip_train:$1" \
        --secret id=env,src="$WORK/env" --secret id=ca,src="$CERTIFICATES" \
        --build-arg BASE_IMAGE="$BASE_IMAGE" --build-arg DEVICE="$1" "$WORK/context"
}

check_image() {
    device=$1
    local run="demo_$device" few=(batch_size=32 trainer.log_every=1 data.val.shards=null)

    [[ "$(inside "$device" --help)" == *"clip-train pretrains"* ]]
    timed "$device: 5 steps" inside "$device" "${few[@]}" max_steps=5 run_name="short_$device"
    grep --quiet '"complete": true' "$WORK/runs/short_$device/summary.json"

    step "$device: docker stop saves and ends with 75; resume=auto completes the run"
    start "$device" "${few[@]}" max_steps=60 run_name="$run"
    until [ "$(cat "$WORK/runs/$run/metrics.csv" 2>/dev/null | wc -l)" -gt 5 ]; do
        engine container exists running || fail "the run ended by itself"
        sleep 0.2
    done
    stop_expecting 75
    [ -n "$(ls -d "$WORK/runs/$run/checkpoints/"*.ckpt)" ] || fail "no checkpoint"
    grep --quiet '"stopped_by_signal": true' "$WORK/runs/$run/summary.json"
    inside "$device" "${few[@]}" max_steps=60 run_name="$run" resume=auto
    grep --quiet '"steps": 60' "$WORK/runs/$run/summary.json"

    step "$device: a signal before the first step ends it too"
    start "$device" "${few[@]}" max_steps=60 run_name="early_$device"
    stop_expecting 75 143 # 143 before Python runs

    step "$device: nothing private, no installer left; as user 1000 and without mounts too"
    sh_inside "$device" 'test -z "$(find / -xdev -name keep_out -o -xdev -name uv -type f 2>/dev/null)"'
    sh_inside "$device" '! python -m pip --version 2>/dev/null'
    engine run --rm "${limits[@]}" --network none "clip_train:$device" "${few[@]}" max_steps=1
    [ "$device" = cpu ] || check_compiler
}

# What Triton does at the first step on a GPU, short of loading it.
check_compiler() {
    step "cuda: the C compiler makes Triton's launcher"
    sh_inside cuda 'cd /opt/venv/lib/python3*/site-packages/triton/backends/nvidia
        python -c "from triton.runtime.build import compile_so_from_file as make
print(make(\"driver.c\", \"cuda_utils\", include_dirs=[\"include\"]))"'
}

check_refused() {
    step "an unknown DEVICE is refused"
    if build gpu >"$WORK/refused" 2>&1; then fail "DEVICE=gpu was built"; fi
    grep --quiet "DEVICE=gpu: there are cuda and cpu" "$WORK/refused"
}

# As on a cluster: no network, nothing to write to but the mount and /tmp, a user the image does not know.
confined() {
    engine run "${limits[@]}" --network none --read-only --tmpfs /tmp --user "$USER_ID" --shm-size 1g \
        --env OMP_NUM_THREADS=1 --volume "$WORK/runs:/work/runs" "$@"
}
inside() { confined --rm "clip_train:$1" "${@:2}"; }
sh_inside() { confined --rm --entrypoint sh "clip_train:$1" -euc "$2"; }
start() { confined --detach --name running "clip_train:$1" "${@:2}" >/dev/null; }

stop_expecting() {
    engine stop --time 120 running >/dev/null
    local code
    code=$(engine wait running)
    engine logs running | tail -n 3
    engine rm running >/dev/null
    [[ " $* " == *" $code "* ]] || fail "exit code $code instead of $*"
}

step() { echo "== $*"; }
fail() {
    echo "container_test: $*" >&2
    exit 1
}

timed() {
    step "$1"
    local began=$SECONDS
    "${@:2}"
    printf '%s\t%s s\n' "$1" $((SECONDS - began)) >>"$WORK/report"
}

size() {
    local bytes
    bytes=$(engine image inspect --format '{{.Size}}' "clip_train:$1")
    printf 'image %s\t%s MB\n' "$1" $((bytes / 1000000)) >>"$WORK/report"
}

main
