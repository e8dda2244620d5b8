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
# # Quickstart: a BERT, 17,946 trained numbers, a saved adapter
#
# We take a pre-trained BERT, put Compacter++ layers into it, train the layers on film reviews, look
# at the learned weights, predict, and save an adapter of some 80 kB. The backbone is
# all-MiniLM-L6-v2 (22.7 million parameters), so a laptop is enough; nothing depends on the size of
# the backbone.

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
from demo import BLUE, ORANGE, SMALL, batches, bert, encode, movie, style
from flax.traverse_util import flatten_dict
from transformers import AutoTokenizer

import compacter_jax as cj

style()
LENGTH, BATCH = 32, 16
EXAMPLES, STEPS = (64, 4) if SMALL else (4000, 250)

# %% [markdown]
# ## Load and adapt
#
# `load_backbone` reads the Hugging Face checkpoint without PyTorch. The checkpoint has no
# classification head, so the head is new: `backbone.new_parameters` lists the new parameters.
# `Adapted` has the backbone's parameters under the same names, and each adapter under its host as
# `…/adapter/…`.

# %%
backbone = cj.load_backbone(bert(), head="sequence_classification", num_labels=2, dropout_rate=0.0)
tokenizer = AutoTokenizer.from_pretrained(bert(), trust_remote_code=False)
method = cj.preset("compacter++")
model = cj.Adapted(backbone.module, method)
params = cj.init_adapters(model, backbone, jax.random.key(0))
print("new:", *backbone.new_parameters)

# %% [markdown]
# ## What is trained
#
# Every leaf gets a label, `"train"` or `"freeze"`; `partition` splits the tree by this label.

# %%
labels = cj.label_params(params, method)
trained, frozen = cj.partition(params, labels)
count = cj.count(params, labels)
for group, (of_group, total) in count.groups.items():
    print(f"{group:12} {of_group:>8,} of {total:>12,}")
print(f"{'sum':12} {count.trained:>8,} of {count.total:>12,}: {count.trained / count.total:.3%}")

# %% [markdown]
# One layer's adapter, and the one rule that all six share:

# %%
for path, leaf in flatten_dict(params, sep="/").items():
    if path == "phm_rule" or path.startswith("encoder/layer/0/output/dense/adapter"):
        print(f"{leaf.shape!s:12} {path}")

# %% [markdown]
# ## Train
#
# The loop is an ordinary optax loop. The gradient is taken with respect to `trained` alone: no
# gradient of a frozen weight is ever computed, and the optimizer keeps two numbers for each of
# 17,946 parameters instead of 22.7 million. The step takes the frozen half as an argument: a weight
# that a compiled function finds outside its arguments becomes a constant of the program, which then
# holds a copy of the backbone.

# %%
sentences, targets = movie("train", EXAMPLES)
data = encode(tokenizer, sentences, LENGTH) | {"labels": targets}
tx = cj.optimizer(
    optax.adamw(optax.warmup_cosine_decay_schedule(0, 3e-3, STEPS // 10, STEPS)), labels
)
opt_state = tx.init(trained)


def logits_of(trained, frozen, batch):
    params = cj.merge(trained, frozen)
    return model.apply({"params": params}, batch["input_ids"], batch["attention_mask"])


@jax.jit
def step(trained, frozen, opt_state, batch):
    def loss_of(trained):
        logits = logits_of(trained, frozen, batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

    loss, gradient = jax.value_and_grad(loss_of)(trained)
    updates, opt_state = tx.update(gradient, opt_state, trained)
    return optax.apply_updates(trained, updates), opt_state, loss


predict = jax.jit(lambda *given: jax.nn.softmax(logits_of(*given)))


def accuracy(trained, sentences, targets):
    encoded = encode(tokenizer, sentences, LENGTH)
    right = []
    for start in range(0, len(targets), 64):
        rows = {name: array[start : start + 64] for name, array in encoded.items()}
        rows = {name: np.resize(array, (64, LENGTH)) for name, array in rows.items()}
        chosen = np.argmax(predict(trained, frozen, rows), -1)[: len(targets[start : start + 64])]
        right += list(chosen == targets[start : start + 64])
    return np.mean(right)


test = movie("test", 64 if SMALL else None)
before = accuracy(trained, *test)
losses = []
for batch in batches(data, BATCH, STEPS):
    trained, opt_state, loss = step(trained, frozen, opt_state, batch)
    losses.append(float(loss))
after = accuracy(trained, *test)
print(f"test accuracy: {before:.3f} before, {after:.3f} after {STEPS} steps of {BATCH} sentences")

# %%
smooth = np.convolve(losses, np.ones(9) / 9, "valid") if len(losses) > 9 else losses
fig, axis = plt.subplots()
axis.plot(losses, color=BLUE, alpha=0.3, linewidth=1)
axis.plot(np.arange(len(smooth)) + (len(losses) - len(smooth)) / 2, smooth, color=BLUE)
axis.axhline(np.log(2), color=ORANGE, linestyle="--", linewidth=1)
axis.annotate(
    "guessing",
    (len(losses) - 1, np.log(2)),
    (0, 4),
    ha="right",
    color=ORANGE,
    textcoords="offset points",
)
axis.set(xlabel="step", ylabel="training loss", title="Compacter++ on film reviews")
plt.show()

# %% [markdown]
# ## Look inside
#
# A projection has no matrix of its own. Its weight is a sum of Kronecker products of the shared
# rule, `[4, 4, 4]`, with four products of two vectors: here 396 numbers make a matrix of 4,608.

# %%
params = cj.merge(trained, frozen)
down = params["encoder"]["layer"]["0"]["output"]["dense"]["adapter"]["down"]
weight = cj.kronecker_sum(params["phm_rule"], (down["left"], down["right"]))
own = down["left"].size + down["right"].size
print(f"left {down['left'].shape} and right {down['right'].shape}: {own} numbers")
print(f"weight {weight.shape}: {weight.size:,} numbers")

# %%
fig, (left, right) = plt.subplots(2, 1, figsize=(7, 3.4), height_ratios=(1.6, 1))
limit = float(jnp.abs(weight).max())
image = left.imshow(weight.T, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
left.set(title="weight of layer 0's down projection", xlabel="hidden state", ylabel="bottleneck")
left.set_yticks(range(0, weight.shape[1], 3))
left.grid(False)
fig.colorbar(image, ax=left)
rule = jnp.concatenate(list(params["phm_rule"]), axis=1)
limit = float(jnp.abs(rule).max())
image = right.imshow(rule, cmap="RdBu_r", vmin=-limit, vmax=limit)
right.set(title="the rule, four 4 x 4 matrices that all layers share", xticks=[], yticks=[])
right.grid(False)
for edge in (3.5, 7.5, 11.5):
    right.axvline(edge, color="black", linewidth=1)
fig.colorbar(image, ax=right)
plt.show()

# %% [markdown]
# ## Predict

# %%
ours = [
    "A quiet film, and a wonderful one.",
    "Two hours that I will never get back.",
    "The plot is thin, but the actors make up for it.",
]
found = predict(trained, frozen, encode(tokenizer, ours, LENGTH))
for sentence, p in zip(ours, found, strict=True):
    print(f"{p[1]:5.0%} positive   {sentence}")

# %% [markdown]
# ## Save and reload
#
# `save_adapter` saves the parameters that training changed, and a hash of the backbone.
# `load_adapter` refuses any other backbone.

# %%
import tempfile
from pathlib import Path

folder = Path(tempfile.mkdtemp()) / "movie-adapter"
cj.save_adapter(folder, model, params, metadata={"label_names": ["negative", "positive"]})
for file in sorted(folder.iterdir()):
    print(f"{file.stat().st_size / 1e3:8.1f} kB  {file.name}")

again, reloaded = cj.load_adapter(folder, backbone)
rows = encode(tokenizer, ours, LENGTH)
same = [m.apply({"params": p}, **rows) for m, p in ((model, params), (again, reloaded))]
assert jnp.array_equal(*same)
print("reloaded: equal logits, to the bit")

# %% [markdown]
# The command line does the same, with an evaluation after each epoch, checkpoints and a report:
#
# ```
# python -m train fit --backbone DIR --task movie --method compacter++ --output-dir runs/movie
# ```
#
# Next: [functional_layers](functional_layers.ipynb) for the mathematics,
# [low_resource](low_resource.ipynb) for Compacter++ beside full fine-tuning,
# [adapterhub_interop](adapterhub_interop.ipynb) if you come from AdapterHub.
