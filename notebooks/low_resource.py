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
# # Few examples: Compacter++ beside full fine-tuning
#
# How do 17,946 trained numbers compare with 22.6 million as the data grows? Both methods use the
# same backbone, head, batches, number of steps and test sentences; each method uses the learning
# rate that `train/objectives/learning_rates.py` gives for the method.
#
# This notebook takes some minutes on two cores. `python -m train compare` does the same with every
# method, more seeds and validation, and continues after an interruption; see the last cell.

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
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from demo import BLUE, GREY, ORANGE, SMALL, batches, bert, encode, movie, style
from transformers import AutoTokenizer

import compacter_jax as cj
from train.objectives.learning_rates import CLASSIFIER

style()
LENGTH, BATCH, STEPS = 24, 16, 2 if SMALL else 150
SIZES = (16, 32) if SMALL else (128, 512, 2048)
SEEDS = (0,)
TEST = 32 if SMALL else 512

# %%
tokenizer = AutoTokenizer.from_pretrained(bert(), trust_remote_code=False)
# The classifier reads the mean of the tokens, as this BERT was trained to be read; its folder says
# so. There is no pooler, so that both methods train the same head.
backbone = cj.load_backbone(bert(), head="sequence_classification", num_labels=2, dropout_rate=0.0)
sentences, targets = movie("train")
train = encode(tokenizer, sentences, LENGTH) | {"labels": targets}
sentences, targets = movie("test", TEST)
test = encode(tokenizer, sentences, LENGTH) | {"labels": targets}


# %% [markdown]
# One function makes the compiled step and the evaluation of a method. The methods differ only in a
# name.


# %%
def prepare(name):
    model = cj.Adapted(backbone.module, cj.preset(name))
    shapes = jax.eval_shape(lambda: cj.init_adapters(model, backbone, jax.random.key(0)))
    labels = cj.label_params(shapes, model.method)
    schedule = optax.warmup_cosine_decay_schedule(0, CLASSIFIER[name], STEPS // 10, STEPS)
    tx = cj.optimizer(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule)), labels)

    def logits_of(trained, frozen, batch):
        params = cj.merge(trained, frozen)
        return model.apply({"params": params}, batch["input_ids"], batch["attention_mask"])

    @jax.jit
    def step(trained, frozen, opt_state, batch):
        def loss_of(trained):
            logits = logits_of(trained, frozen, batch)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
            return losses.mean()

        gradient = jax.grad(loss_of)(trained)
        updates, opt_state = tx.update(gradient, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state

    @jax.jit
    def right(trained, frozen, batch):
        return logits_of(trained, frozen, batch).argmax(-1) == batch["labels"]

    def score(size, seed):
        params = cj.init_adapters(model, backbone, jax.random.key(seed))
        trained, frozen = cj.partition(params, labels)
        opt_state = tx.init(trained)
        chosen = np.random.default_rng(seed).permutation(len(train["labels"]))[:size]
        data = {key: array[chosen] for key, array in train.items()}
        for batch in batches(data, BATCH, STEPS, seed):
            trained, opt_state = step(trained, frozen, opt_state, batch)
        rows = [{k: a[i : i + 32] for k, a in test.items()} for i in range(0, TEST, 32)]
        return float(np.mean([right(trained, frozen, batch) for batch in rows]))

    return score, cj.count(shapes, labels).trained


# %%
METHODS = {"compacter++": BLUE, "full": ORANGE}
scores, trained = {}, {}
for name in METHODS:
    score, trained[name] = prepare(name)
    scores[name] = np.array([[score(size, seed) for seed in SEEDS] for size in SIZES])
    means = " ".join(
        f"{size}: {of:.3f}" for size, of in zip(SIZES, scores[name].mean(1), strict=True)
    )
    print(f"{name:12} {trained[name]:>10,} trained   {means}")

# %%
commoner = max(np.mean(test["labels"]), 1 - np.mean(test["labels"]))
fig, axis = plt.subplots()
for name, color in METHODS.items():
    axis.plot(SIZES, scores[name].mean(1), color=color, label=f"{name}, {trained[name]:,} trained")
    for of_seed in scores[name].T:
        axis.plot(SIZES, of_seed, "o", color=color, markersize=4, alpha=0.6)
axis.axhline(commoner, color=GREY, linestyle="--", linewidth=1)
axis.annotate(
    "commoner label",
    (SIZES[-1], commoner),
    (0, 4),
    ha="right",
    color=GREY,
    textcoords="offset points",
)
axis.set_xscale("log", base=2)
axis.set_xticks(SIZES, [str(size) for size in SIZES])
axis.set(xlabel="training examples", ylabel="test accuracy")
axis.set_title(
    f"film reviews, MiniLM, {STEPS} steps of {BATCH} sentences; 1 seed, a point is one run"
)
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# In the run shown here full fine-tuning is ahead by one to five points, with 1,257 times as many
# trained numbers. Read the difference with care: on this small test set one standard error is two
# points, one seed is not many, and both methods take the rates of a table. With rates chosen on
# validation data, three seeds and the whole test set the two [are on
# par](../docs/numbers.md#with-the-same-head) with 100 and with 500 examples. The number of steps is
# the same for all sizes, so training repeats a small set many times. For an answer of your own,
# increase sizes, seeds and steps:
#
# ```
# python -m train compare --backbone DIR --task movie --methods full,compacter++,head-only \
#     --train-size 100,500,1000,4000 --seeds 5 --steps 300 --tune-learning-rates 3 \
#     --output-dir runs/sizes
# ```
