#!/usr/bin/env bash
# Tests the paper's claim on an encoder, on a GPU: the three comparisons of train/configs/claim_*.
#
#   train/launch/claim.sh --backbone DIR --output-dir runs/claim [--glue FOLDER] [--at-once 5] \
#     [--dry-run] [-- --dtype bfloat16]
#
# Each comparison has a folder in the output folder with report.md, results.json and figures. The
# same command goes on where an earlier one stopped. --glue is a folder with the tasks of GLUE in
# the hub's layout; without it they are left out. What follows `--` are flags of `compare` for all
# comparisons.
set -euo pipefail

python=${PYTHON:-python3}
backbone='' output='' glue='' at_once=5 dry_run=false

fail() {
  echo "error: $*" >&2
  exit 2
}

while (($#)); do
  case $1 in
    --backbone | --output-dir | --glue | --at-once)
      (($# > 1)) || fail "$1 needs a value"
      case $1 in
        --backbone) backbone=$2 ;;
        --output-dir) output=$2 ;;
        --glue) glue=$2 ;;
        --at-once) at_once=$2 ;;
      esac
      shift 2
      ;;
    --dry-run) dry_run=true && shift ;;
    --) shift && break ;;
    *) fail "unknown argument $1; flags of compare come after --" ;;
  esac
done
[[ -n $backbone ]] || fail 'give --backbone, a folder or an id of the hub'
[[ -n $output ]] || fail 'give --output-dir'

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
configs=$root/train/configs
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # so that any folder will do
failed=()

# compare NAME FOLDER FLAGS...: runs one comparison. Another follows even if some of its runs fail,
# which is exit code 1, but not after bad input or an interrupt.
compare() {
  local name=$1 folder=$output/$2 code=0
  shift 2
  local command=(
    "$python" -m train compare --config "$configs/claim_$name.toml" --backbone "$backbone"
    --output-dir "$folder" --at-once "$at_once" "$@"
  )
  printf '%q ' "${command[@]}"
  echo
  if ! $dry_run; then
    "${command[@]}" || code=$?
  fi
  ((code <= 1)) || exit "$code"
  ((code == 0)) || failed+=("$folder")
}

compare low_resource low_resource "$@"
compare smallest smallest "$@"
if [[ -n $glue ]]; then
  compare glue glue --data-dir "$glue" "$@"
  compare low_resource low_resource_sst2 --task sst2 --data-dir "$glue" --split-protocol paper "$@"
fi
if ((${#failed[@]})); then
  echo "error: not all runs of ${failed[*]} were finished; the same command tries them again" >&2
  exit 1
fi
