"""Default learning rate of each preset, which `--learning-rate` overrides."""

from compacter_jax.catalogue import PRESETS

# For T5: the published rates.
TEXT_TO_TEXT = {name: row.learning_rate for name, row in PRESETS.items()}

# For a head on an encoder, as in the demo. The rates of `full` and the PHM methods were chosen on
# the demo backbone; docs/numbers.md has the measurements. Validation accuracies at these rates on
# 2,000 examples of `movie`, 3 epochs, one seed: `lora` 0.82 (0.79 at 1e-3), `bitfit` 0.80,
# `parallel` 0.80, `ia3` 0.79, `prefix-tuning` 0.77. After 1 epoch: `pfeiffer-feed-forward` 0.78
# (0.71 at 1e-3), `houlsby` 0.76 (0.72 at 1e-3), `scaled-parallel` 0.74 and `mam` 0.73 (both 0.50 at
# 1e-3), `low-rank` 0.72 (0.67 at 1e-2), and with 20 prompts `prompt-tuning-vocabulary` 0.65 (0.63
# at 3e-2) and `-random` 0.64. `intrinsic-said` learned nothing at 3e-2 and 3e-3, and begins to at
# 2e-4 (train loss 0.678 after one epoch). The other rates are guesses. A preset
# that is not in this table has its published rate.
CLASSIFIER = TEXT_TO_TEXT | {
    "full": 5e-5,
    "head-only": 3e-3,
    "houlsby": 3e-3,
    "pfeiffer-attention": 3e-3,
    "pfeiffer-feed-forward": 3e-3,
    "adapterdrop": 3e-3,
    "low-rank": 3e-3,
    "phm": 3e-3,
    "compacter": 3e-3,
    "compacter++": 3e-3,
    "bitfit": 3e-3,
    "prompt-tuning-random": 3e-2,
    "prompt-tuning-vocabulary": 1e-1,
    "intrinsic-said": 2e-4,
    "intrinsic": 2e-4,
    "lora": 3e-3,
    "ia3": 1e-2,
    "prefix-tuning": 1e-3,
    "parallel": 1e-3,
    "scaled-parallel": 3e-4,
    "mam": 3e-4,
    "ciat": 1e-3,
    "compacter-ciat": 3e-3,
    "serial-ciat": 1e-3,
    "mad-x": 1e-3,
    "st": 1e-3,
    "compacter-st": 3e-3,
}
