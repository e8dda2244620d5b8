# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Speech: one recording in eight languages
#
# A person says two English digits, such as *four two*, and a model writes the number's name in
# German, Spanish, French, Italian, Dutch, Portuguese, Romanian and Russian: *zweiundvierzig*,
# *cuarenta y dos*, *quarante-deux*. First one small Transformer learns all languages. Then it is
# frozen, and each language gets an adapter of its own (Le et al.,
# [arXiv:2106.01463](https://arxiv.org/abs/2106.01463)). The eight adapters are members of one bank:
# one call writes a recording in all languages.
#
# The 80 recordings beside this notebook are of the Free Spoken Digit Dataset (Zohar Jackson et al.,
# [doi:10.5281/zenodo.1342401](https://doi.org/10.5281/zenodo.1342401), CC BY-SA 4.0): the digits of
# one speaker. So this shows how it works, and not how well: [speech](../docs/speech.md) has the
# commands for real data.

# %%
# In Colab this gets the package and the data; anywhere else it does nothing.
import os
import subprocess
import sys

OWNER = ""  # the account on GitHub where you found this notebook
if "google.colab" in sys.modules and not os.path.exists("demo.py"):
    assert OWNER, "give OWNER above: the account on GitHub where you found this notebook"
    REPOSITORY = f"https://github.com/{OWNER}/compacter_jax"
    subprocess.run(["git", "clone", "-q", REPOSITORY, "compacter_jax"], check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-qe", "compacter_jax[train]"], check=True
    )
    sys.path.insert(0, os.path.abspath("compacter_jax"))
    os.chdir("compacter_jax/notebooks")

# %%
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pyarrow.parquet as pq
from demo import BLUE, ORANGE, SMALL, style
from IPython.display import Audio, display
from scipy.signal import resample_poly
from transformers import Speech2TextFeatureExtractor

import compacter_jax as cj
from train.speech.spec_augment import SpecAugment

style()
FRAMES, LENGTH, BATCH = 160, 24, 32
FIRST_STEPS, SECOND_STEPS = (3, 2) if SMALL else (1200, 300)

# %% [markdown]
# ## Hear a number
#
# An utterance is two recordings with a short pause between them. Takes 0 and 1 of every digit are
# kept for the test, and so are nine of the numbers from 10 to 99, whose digits all occur elsewhere:
# the test has numbers that the model has never heard, in recordings that it has never heard.

# %%
folder = Path("spoken_digits")
recordings = {
    (row["digit"], row["take"]): np.frombuffer(row["pcm16"], "<i2") / 2**15
    for row in pq.read_table(folder / "digits.parquet").to_pylist()
}
NAMES = json.loads((folder / "numbers.json").read_text(encoding="utf-8"))
LANGUAGES = tuple(NAMES)
RATE = 8000
TAKES = sorted({take for _, take in recordings})
UNHEARD = [10 * first + 7 * first % 10 for first in range(1, 10)]
HEARD = [number for number in range(10, 100) if number not in UNHEARD]


def utterance(number, takes):
    pause = np.zeros(RATE // 20)
    first, second = (recordings[int(d), t] for d, t in zip(str(number), takes, strict=True))
    return np.concatenate([first, pause, second])


example = utterance(42, (0, 1))
display(Audio(example, rate=RATE))

# %% [markdown]
# ## See its features
#
# The model reads 80 log-mel energies of 25 milliseconds, every 10 milliseconds: the extractor of
# transformers, on its path for NumPy. `mask_between_convolutions` below makes a row independent of
# the padding behind it.

# %%
extractor = Speech2TextFeatureExtractor()


def features_of(samples):
    wide = resample_poly(samples, 2, 1).astype(np.float32)  # to 16 kHz
    return extractor(wide, sampling_rate=16000, return_tensors="np")["input_features"][0]


figure, axis = plt.subplots(figsize=(6.5, 2.6), layout="constrained")
image = axis.imshow(features_of(example).T, origin="lower", aspect="auto", cmap="Blues")
axis.set_xlabel("frame, 10 ms each")
axis.set_ylabel("mel band")
axis.set_title("Features of an utterance, four two")
figure.colorbar(image, ax=axis, label="standard deviations")
plt.show()

# %% [markdown]
# ## Batches
#
# The model writes letters. A target begins with the token of its language and ends with 2; a row of
# a batch is an utterance, a language, and the name of the number in that language.

# %%
letters = sorted({letter for names in NAMES.values() for name in names for letter in name})
TOKENS = ["<s>", "<pad>", "</s>", *(f"<{language}>" for language in LANGUAGES), *letters]
NUMBER = {token: number for number, token in enumerate(TOKENS)}
TAGS = jnp.array([NUMBER[f"<{language}>"] for language in LANGUAGES])


def decode(ids):
    first = 3 + len(LANGUAGES)
    return ["".join(TOKENS[i] for i in row if i >= first) for row in np.asarray(ids)]


def padded(arrays):
    values = np.zeros((len(arrays), FRAMES, 80), np.float32)
    mask = np.zeros((len(arrays), FRAMES), np.int32)
    for i, array in enumerate(arrays):
        values[i, : len(array)], mask[i, : len(array)] = array[:FRAMES], 1
    return values, mask


def pool_of(numbers, takes):
    """Utterances of numbers, each with several pairs of takes, and their features."""
    pairs = [(number, (a, b)) for number in numbers for a in takes for b in takes]
    return [number for number, _ in pairs], [features_of(utterance(*pair)) for pair in pairs]


train_numbers, train_features = pool_of(HEARD, TAKES[2:4] if SMALL else TAKES[2:])
test_numbers, test_features = pool_of(UNHEARD, TAKES[:2])
print(f"{len(train_numbers):,} utterances to train on, {len(test_numbers)} of unheard numbers")


def batch_of(rng):
    rows = rng.integers(0, len(train_numbers), BATCH)
    languages = rng.integers(0, len(LANGUAGES), BATCH)
    targets = np.ones((BATCH, LENGTH), np.int32)
    for row, language, target in zip(rows, languages, targets, strict=True):
        name = NAMES[LANGUAGES[language]][train_numbers[row]]
        ids = [int(TAGS[language]), *(NUMBER[letter] for letter in name), 2]
        target[: len(ids)] = ids
    values, mask = padded([train_features[row] for row in rows])
    return {
        "input_features": values,
        "attention_mask": mask,
        "targets": targets,
        "adapter_ids": languages.astype(np.int32),
    }


# %% [markdown]
# ## The first stage: one model for all languages
#
# `cj.SpeechToText` is transformers' Speech2Text: convolutions that shorten the features, and the
# Transformer of M2M-100. It is trained as a whole, on mixed batches of all languages. SpecAugment
# hides other stretches of time and bands of frequency in every step, for the recordings are few.


# %%
def loss_of(model, params, batch, **routed):
    targets = batch["targets"]
    shifted = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=2)
    inputs = batch["input_features"], batch["attention_mask"], shifted
    logits = model.apply({"params": params}, *inputs, **routed)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    counts = (targets != 1).at[:, 0].set(False)  # the language is given, not written
    return jnp.sum(losses * counts) / jnp.sum(counts)


def fit(model, params, learning_rate, steps, *, routed):
    labels = cj.label_params(params, model.method)
    trained, frozen = cj.partition(params, labels)
    schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, steps // 10, steps)
    tx = cj.optimizer(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)), labels)

    @jax.jit
    def step(trained, frozen, opt_state, batch, key):
        hidden = SpecAugment()(batch["input_features"], batch["attention_mask"], key)
        batch = {**batch, "input_features": hidden}
        members = {"adapter_ids": batch["adapter_ids"]} if routed else {}

        def loss(trained):
            return loss_of(model, cj.merge(trained, frozen), batch, **members)

        value, gradient = jax.value_and_grad(loss)(trained)
        updates, opt_state = tx.update(gradient, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state, value

    opt_state, values, rng = tx.init(trained), [], np.random.default_rng(1)
    for key in jax.random.split(jax.random.key(2), steps):
        trained, opt_state, value = step(trained, frozen, opt_state, batch_of(rng), key)
        values.append(float(value))
    return cj.merge(trained, frozen), values


config = cj.SpeechToTextConfig(
    vocab_size=len(TOKENS),
    d_model=64,
    encoder_layers=2,
    decoder_layers=1,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=128,
    decoder_ffn_dim=128,
    conv_channels=64,
    mask_between_convolutions=True,
    pad_token_id=1,
    decoder_start_token_id=2,
    eos_token_id=2,
)
module = cj.SpeechToText(config)
params = jax.jit(module.init)(jax.random.key(0), *module.dummy_inputs())["params"]
params, first_losses = fit(
    cj.Adapted(module, cj.preset("full")), params, 2e-3, FIRST_STEPS, routed=False
)
backbone = cj.Backbone(module, params, config, "numbers")
print(f"loss per letter: {first_losses[0]:.2f}, of the last ten {np.mean(first_losses[-10:]):.2f}")

# %% [markdown]
# ## The second stage: a bank with a member for each language
#
# The preset `st` puts a bottleneck with a norm of its own behind every feed-forward network. From
# the command line this is `fit --method st --adapters per_target`.

# %%
one = cj.Adapted(module, cj.preset("st", reduction_factor=4))
starts = [(one, cj.init_adapters(one, backbone, jax.random.key(i))) for i in range(len(LANGUAGES))]
model, bank = cj.stack_adapters(starts, backbone)
count = cj.count(bank, cj.label_params(bank, model.method))
print(f"trained: {count.trained // len(LANGUAGES):,} numbers for each language")
bank, second_losses = fit(model, bank, 2e-3, SECOND_STEPS, routed=True)


# %%
def write(features, *, adapted):
    """Every utterance in every language: one call with a row for each pair."""
    count = len(LANGUAGES)
    values, mask = (np.repeat(array, count, axis=0) for array in padded(features))
    rows = jnp.tile(jnp.arange(count), len(features))
    routed = {"adapter_ids": rows} if adapted else {}
    made = cj.generate(
        *((model, bank) if adapted else (module, params)),
        values,
        mask,
        max_new_tokens=LENGTH,
        eos_token_id=2,
        forced_bos_token_id=TAGS[rows],
        **routed,
    )
    return np.array(decode(made)).reshape(len(features), count)


expected = np.array(
    [[NAMES[language][number] for language in LANGUAGES] for number in test_numbers]
)
shares = {
    title: np.mean(write(test_features, adapted=adapted) == expected, axis=0)
    for title, adapted in (("the shared model", False), ("with its member", True))
}
for title, values in shares.items():
    print(f"{title}: {np.mean(values):.0%} of the names of unheard numbers are right")

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
axes[0].plot(first_losses, color=BLUE, label="the whole model")
place = np.arange(len(second_losses)) + len(first_losses)
axes[0].plot(place, second_losses, color=ORANGE, label="members")
axes[0].set(xlabel="step", ylabel="loss per letter", yscale="log", title="Training")
axes[0].legend()
rows, width = np.arange(len(LANGUAGES)), 0.4
for shift, (title, values), colour in zip((-0.5, 0.5), shares.items(), (BLUE, ORANGE), strict=True):
    axes[1].bar(rows + shift * width, 100 * values, width, color=colour, label=title)
axes[1].set_xticks(rows, LANGUAGES)
axes[1].set(ylabel="% right", title=f"{len(test_numbers)} utterances of unheard numbers")
figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower right", ncols=2)
plt.show()

# %% [markdown]
# ## One recording, eight members, one call

# %%
(written,) = write([features_of(example)], adapted=True)
for language, name in zip(LANGUAGES, written, strict=True):
    right = NAMES[language][42]
    print(f"{language}  {name:24}", "" if name == right else f"should be {right}")

# %% [markdown]
# How the members compare with full fine-tuning, with one adapter for all, and with a start from a
# recogniser is what `python -m benchmarks.speech` measures on all recordings.
