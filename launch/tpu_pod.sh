#!/usr/bin/env bash
# A run on a Cloud TPU slice of any size, from a checkout of this repository.
#
#   export NAME=clip ZONE=europe-west4-b TYPE=v5litepod-64 WORKDIR=gs://BUCKET/runs/b16
#   launch/tpu_pod.sh create
#   launch/tpu_pod.sh install
#   launch/tpu_pod.sh run --config=configs/laion400m_b16.py    # again, to resume
#   launch/tpu_pod.sh stop                                     # from elsewhere: saves, ends with 130
#   launch/tpu_pod.sh delete
#
# `run` stays as long as the run does: start it where the connection lasts (tmux on a small VM).
set -euo pipefail

: "${NAME:?name of the TPU}" "${ZONE:?its zone}"
VERSION=${VERSION:-v2-alpha-tpuv5-lite} # software of the VMs; another for other TPUs

tpu() {
    gcloud compute tpus tpu-vm "$@" --zone="$ZONE"
}

on_all_workers() {
    tpu ssh "$NAME" --worker=all --command="$1"
}

case "${1:-}" in
create)
    tpu create "$NAME" --accelerator-type="${TYPE:?as v5litepod-64}" --version="$VERSION" --spot
    ;;
install)
    # What git has, without what was built here.
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    git archive --format=tar.gz --output="$folder/clip_jax.tar.gz" HEAD
    tpu scp "$folder/clip_jax.tar.gz" "$NAME":clip_jax.tar.gz --worker=all
    on_all_workers "mkdir -p clip_jax && tar -xzf clip_jax.tar.gz -C clip_jax && cd clip_jax &&
        python3 -m venv .venv && .venv/bin/pip install --quiet -e '.[tpu,gcs,fast]'"
    ;;
run)
    shift
    arguments=$(printf ' %q' "$@")
    on_all_workers "cd clip_jax && exec .venv/bin/clip-jax train --distributed \
        --workdir=${WORKDIR:?a bucket, as gs://BUCKET/runs/b16}$arguments"
    ;;
stop)
    on_all_workers "pkill -TERM -f '[c]lip-jax train'"
    ;;
delete)
    tpu delete "$NAME" --quiet
    ;;
*)
    echo "usage: $0 create|install|run|stop|delete" >&2
    exit 2
    ;;
esac
