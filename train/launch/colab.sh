#!/usr/bin/env bash
# Trains in a Colab notebook, on its GPU or TPU; goes on where a session ended.
#
# In a cell, with the output on Drive, which outlives the session:
#
#   from google.colab import drive
#   drive.mount("/content/drive")
#   !git clone REPOSITORY compacter_jax
#   !bash compacter_jax/train/launch/colab.sh --backbone t5-base --task mrpc --method compacter++ \
#       --output-dir /content/drive/MyDrive/mrpc --log tensorboard
#
# The arguments are flags of `fit`; --dry-run prints what would be run. The same cell in a new
# session takes up the last checkpoint. In another cell, curves while it trains:
#
#   %load_ext tensorboard
#   %tensorboard --logdir /content/drive/MyDrive/mrpc/tensorboard
#
# Colab's own JAX, which fits its GPU or TPU, is kept if it is as new as pyproject.toml asks.
set -euo pipefail

dry_run=false flags=()
for argument; do
  if [[ $argument == --dry-run ]]; then
    dry_run=true
  else
    flags+=("$argument")
  fi
done
if ((${#flags[@]} == 0)); then
  echo 'error: give the flags of fit' >&2
  exit 2
fi

# Runs a command, or prints it.
run() {
  if "$dry_run"; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
run "$python" -m pip install -q -e '.[train]'
run "$python" -c 'import jax; print(jax.devices())'
# Drive is slow: a checkpoint now and then is enough.
run "$python" -m train fit --resume --checkpoint-steps 1000 "${flags[@]}"
