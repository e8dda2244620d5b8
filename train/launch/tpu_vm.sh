#!/usr/bin/env bash
# Trains on a slice of TPUs: the same command on every worker, which find each other.
#
#   train/launch/tpu_vm.sh --name my-slice --zone us-central2-b [--project my-project] \
#     [--create v4-32 [--version tpu-ubuntu2204-base] [--spot]] [--attempts 20] [--dry-run] \
#     -- --config train/configs/glue_compacter_pp.toml --task mnli --output-dir /mnt/shared/mnli
#
# What follows `--` are flags of `fit`. The output folder must be one that all workers see, NFS or a
# bucket mounted with gcsfuse: there they write the checkpoints together.
#
# A worker that is told to stop (SIGTERM) writes a checkpoint first; should it be killed, the last
# checkpoint is what counts. Run again, this script goes on there: `fit` gets `--resume`, which
# starts a new run where there is none. With --create it makes the slice where it does not exist,
# and makes it anew where it was preempted; it tries --attempts times.
#
# Wants gcloud, set up (https://cloud.google.com/tpu/docs/jax-pods), and is to be run in a checkout.
set -euo pipefail

name='' zone='' create='' version='tpu-ubuntu2204-base' attempts=1 dry_run=false
location=() spot=()

usage() {
  sed -n '2,/^set /{/^#/!d; s/^# \{0,1\}//; p;}' "$0"
}

fail() {
  echo "error: $*" >&2
  exit 2
}

# Runs a command, or prints it so that it can be copied.
run() {
  if "$dry_run"; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

while (($#)); do
  case "$1" in
    --name | --zone | --project | --create | --version | --attempts)
      (($# > 1)) || fail "$1 needs a value"
      case "$1" in
        --name) name=$2 ;;
        --zone) zone=$2 ;;
        --project) location+=("--project=$2") ;;
        --create) create=$2 ;;
        --version) version=$2 ;;
        --attempts) attempts=$2 ;;
      esac
      shift 2
      ;;
    --spot) spot=(--spot); shift ;;
    --dry-run) dry_run=true; shift ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown option $1; give the flags of fit after --" ;;
  esac
done
[[ -n $name && -n $zone ]] || fail 'give --name and --zone of the slice'
[[ $attempts =~ ^[1-9][0-9]*$ ]] || fail "--attempts $attempts must be a whole number of at least 1"
(($#)) || fail 'give the flags of fit after --'
location+=("--zone=$zone")
tpu=(gcloud compute tpus tpu-vm)

on_all() {
  run "${tpu[@]}" ssh "$name" "${location[@]}" --worker=all --command="$1"
}

state() {
  "${tpu[@]}" describe "$name" "${location[@]}" '--format=value(state)' 2>/dev/null || echo MISSING
}

make_slice() {
  local found=MISSING
  "$dry_run" || found=$(state)
  case $found in
    READY) return ;;
    PREEMPTED | TERMINATED)
      run "${tpu[@]}" delete "$name" "${location[@]}" --quiet || return
      ;;
  esac
  run "${tpu[@]}" create "$name" "${location[@]}" "--accelerator-type=$create" \
    "--version=$version" "${spot[@]}"
}

# All of the checkout that git knows, and an environment beside it; a second time it is quick.
install() {
  run git archive --format=tar.gz "--output=$archive" HEAD || return
  run "${tpu[@]}" scp "$archive" "$name:checkout.tar.gz" "${location[@]}" --worker=all || return
  on_all 'mkdir -p compacter_jax && tar -xzf checkout.tar.gz -C compacter_jax &&
cd compacter_jax && { [ -x .venv/bin/python ] || python3 -m venv .venv; } &&
.venv/bin/python -m pip install -q -e ".[train,tpu]"'
}

train() {
  local flags
  flags=$(printf '%q ' "$@")
  on_all "cd compacter_jax && .venv/bin/python -m train fit --distributed --resume $flags"
}

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
# What is called in a condition goes on after a command that fails, so each says `|| return`.
for ((attempt = 1; attempt <= attempts; attempt++)); do
  if { [[ -z $create ]] || make_slice; } && install && train "$@"; then
    exit 0
  fi
  echo "attempt $attempt of $attempts failed" >&2
  "$dry_run" || sleep 60
done
exit 1
