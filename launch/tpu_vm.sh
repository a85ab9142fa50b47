#!/usr/bin/env bash
# Runs one command on every host of a Cloud TPU slice; JAX finds out by itself which host is which.
#
#   ZONE=us-central2-b launch/tpu_vm.sh my-tpu "lmx train configs/llama.py --run-dir runs/a --checkpoint.directory gs://bucket/a"
#
# The working directory is copied to each host and installed there first; leave that out with SETUP="". Checkpoints must
# lie in a bucket: the hosts share no disk. Several slices: create them with --node-count, and run this for each.
set -euo pipefail

if [ $# -ne 2 ] || [ -z "${ZONE:-}" ]; then
    echo "usage: ZONE=zone [PROJECT=project] $0 TPU_NAME COMMAND" >&2
    exit 2
fi
name=$1
command=$2
setup=${SETUP-pip install --quiet "./lmx[tpu,gcs]"}
flags=(--zone "$ZONE" --worker all)
if [ -n "${PROJECT:-}" ]; then
    flags+=(--project "$PROJECT")
fi
if [ -n "$setup" ]; then
    archive=$(mktemp --suffix .tar.gz)
    trap 'rm -f "$archive"' EXIT
    git archive --format tar.gz --prefix lmx/ --output "$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$name:lmx.tar.gz" "${flags[@]}"
    gcloud compute tpus tpu-vm ssh "$name" "${flags[@]}" --command "tar -xzf lmx.tar.gz && $setup"
fi
# 75 means: interrupted or fallen, with a checkpoint to go on from; the same command goes on with it.
gcloud compute tpus tpu-vm ssh "$name" "${flags[@]}" --command "cd lmx && $command"
