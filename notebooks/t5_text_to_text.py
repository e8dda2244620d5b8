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
# # Text to text with a T5
#
# Every task is text: an input, and a target to write. We teach a T5 to turn film reviews round,
# *the plot was very dull* to *the plot was very bright*, by training only Compacter's parameters.
# Then the T5 writes with and without beam search.
#
# With a network, set `T5=google-t5/t5-small` (or any other T5, v1.1, Flan-T5 or mT5) in the
# environment. Without a network, this notebook makes a small T5 and first teaches it one task: to
# repeat a sentence of a language of 26 words.

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
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from demo import BLUE, ORANGE, SMALL, encode, opposite, reviews, style, t5

import compacter_jax as cj

style()
LENGTH, BATCH = 24, 64
STEPS = 3 if SMALL else 500

# %% [markdown]
# ## Fit any method
#
# Inputs go to the encoder. The decoder reads the target shifted one position to the right, behind
# the start token, and predicts each token of the target; padding does not count. The labels decide
# which parameters are trained, so the same function fine-tunes all of a T5 or only a few of its
# parameters.


# %%
def loss_of(model, params, batch):
    shifted = jnp.pad(batch["targets"][:, :-1], ((0, 0), (1, 0)))  # the start token is 0
    logits = model.apply({"params": params}, batch["input_ids"], batch["attention_mask"], shifted)
    counts = batch["targets"] != 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return jnp.sum(losses * counts) / jnp.sum(counts)


def fit(model, params, sources, targets, learning_rate, steps=STEPS):
    labels = cj.label_params(params, model.method)
    trained, frozen = cj.partition(params, labels)
    schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, steps // 10, steps)
    tx = cj.optimizer(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule)), labels)

    @jax.jit
    def step(trained, frozen, opt_state, batch):
        def loss(trained):
            return loss_of(model, cj.merge(trained, frozen), batch)

        value, gradient = jax.value_and_grad(loss)(trained)
        updates, opt_state = tx.update(gradient, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state, value

    data = encode(tokenizer, sources, LENGTH)
    data["targets"] = encode(tokenizer, targets, LENGTH)["input_ids"]
    opt_state, values, rng = tx.init(trained), [], np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.integers(0, len(sources), BATCH)
        batch = {name: array[rows] for name, array in data.items()}
        trained, opt_state, value = step(trained, frozen, opt_state, batch)
        values.append(float(value))
    return cj.merge(trained, frozen), values


def write(model, params, sources, **settings):
    inputs = encode(tokenizer, sources, LENGTH)
    ids = cj.generate(model, params, **inputs, max_new_tokens=16, **settings)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def share_right(model, params, sources, targets):
    return np.mean([a == b for a, b in zip(write(model, params, sources), targets, strict=True)])


# %% [markdown]
# ## A backbone

# %%
backbone, tokenizer, is_new = t5()
sentences, unseen = reviews(4000, seed=0), reviews(200, seed=1)
unseen = [sentence for sentence in unseen if sentence not in set(sentences)]
if is_new:
    plain = cj.Adapted(backbone.module, cj.preset("full"))
    params, _ = fit(plain, backbone.params, sentences, sentences, 3e-3)
    backbone = cj.Backbone(backbone.module, params, backbone.config, backbone.name)
    right = share_right(plain, params, unseen, unseen)
    print(f"repeats {right:.1%} of {len(unseen)} sentences that it has not seen")

# %% [markdown]
# ## Adapt it
#
# Compacter acts after attention and after feed-forward, in the encoder and the decoder, with one
# rule for both. The training set has 500 examples.

# %%
targets = [opposite(sentence) for sentence in unseen]
examples = sentences[:500]
# The small T5 is 64 wide; a published one can spare the factor.
factor = 4 if is_new else 32
model = cj.Adapted(backbone.module, cj.preset("compacter", reduction_factor=factor))
params = cj.init_adapters(model, backbone, jax.random.key(1))
count = cj.count(params, cj.label_params(params, model.method))
before = share_right(model, params, unseen, targets)
params, losses = fit(model, params, examples, [opposite(s) for s in examples], 1e-2)
after = share_right(model, params, unseen, targets)
print(f"{count.trained:,} of {count.total:,} parameters trained: {count.trained / count.total:.2%}")
print(f"turned round: {before:.1%} of the unseen sentences before, {after:.1%} after")

# %%
fig, axis = plt.subplots(figsize=(7, 2.6))
axis.semilogy(losses, color=BLUE)
axis.set(xlabel="step", ylabel="loss of a token", title="Compacter on a frozen T5")
plt.show()

# %% [markdown]
# ## Write
#
# `generate` is one compiled program with a key/value cache; greedy and beam search give PyTorch's
# tokens. The adapters' weights are built once, before the first token.

# %%
for sentence, greedy, beams in zip(
    unseen[:4],
    write(model, params, unseen[:4]),
    write(model, params, unseen[:4], num_beams=4),
    strict=True,
):
    print(f"{sentence}\n    greedy: {greedy}\n    beams:  {beams}")

# %% [markdown]
# ## Which part of it matters?
#
# Zeros in the up-projections leave out the adapters of one side: each of these adapters is then the
# identity.


# %%
def without(params, side):
    def zero(path, leaf):
        names = [key.key for key in path]
        return jnp.zeros_like(leaf) if names[0] == side and names[-2:-1] == ["up"] else leaf

    return jax.tree_util.tree_map_with_path(zero, params)


parts = {
    "both": params,
    "no encoder\nadapters": without(params, "encoder"),
    "no decoder\nadapters": without(params, "decoder"),
}
shares = [share_right(model, p, unseen, targets) for p in parts.values()]
fig, axis = plt.subplots(figsize=(5, 2.6))
bars = axis.bar(list(parts), shares, color=[BLUE, ORANGE, ORANGE], width=0.55)
axis.bar_label(bars, [f"{share:.0%}" for share in shares])
axis.set(ylim=(0, 1.1), ylabel="turned round")
axis.grid(axis="x", visible=False)
plt.show()

# %% [markdown]
# The command line does the same with a file that has the columns `sentence` and `target`:
#
# ```
# python -m train fit --backbone google-t5/t5-small --method compacter --train-file reviews.csv \
#     --validation-file more.csv --prefix "turn round" --output-dir runs/round
# python -m train predict --adapter runs/round/adapter --input new.csv --output turned.csv
# ```
