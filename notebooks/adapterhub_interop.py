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
# # From AdapterHub and PEFT, and back
#
# Training of a PyTorch adapter can continue here, and an adapter trained here can go back to
# PyTorch: the same numbers in the same places, so the same logits. The table translates the calls
# of `adapters` and PEFT:
#
# | | `adapters`, PyTorch | `compacter_jax` |
# |---|---|---|
# | load | `BertForSequenceClassification.from_pretrained(D)`, `adapters.init(model)` | `backbone = cj.load_backbone(D, head="sequence_classification")` |
# | add | `model.add_adapter("a", config=CompacterPlusPlusConfig())` | `model = cj.Adapted(backbone.module, cj.preset("compacter++"))` |
# | freeze | `model.train_adapter("a")` | `trained, frozen = cj.partition(params, labels)` |
# | run | `model(input_ids, attention_mask)` | `model.apply({"params": params}, input_ids, attention_mask)` |
# | save | `model.save_adapter(folder, "a")` | `cj.save_adapter(folder, model, params)` |
# | load | `model.load_adapter(folder)` | `model, params = cj.load_adapter(folder, backbone)` |
# | merge (LoRA, IA3) | `model.merge_adapter("a")` | `params = cj.merge_adapter(model, params)` |
# | PEFT | `get_peft_model(model, LoraConfig(r=8))` | `cj.Adapted(backbone.module, cj.preset("lora", rank=8))` |

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
        [sys.executable, "-m", "pip", "install", "-qe", "compacter_jax[train,oracle]"], check=True
    )
    sys.path.insert(0, os.path.abspath("compacter_jax"))
    os.chdir("compacter_jax/notebooks")

# %%
import logging
import tempfile
from pathlib import Path

import adapters
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
import peft
import torch
import transformers
from demo import BLUE, SMALL, batches, bert, encode, movie, style

import compacter_jax as cj

style()
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
logging.getLogger("adapters").setLevel(logging.ERROR)
STEPS, BATCH, LENGTH = 2 if SMALL else 10, 16, 32
folder = Path(tempfile.mkdtemp())

tokenizer = transformers.AutoTokenizer.from_pretrained(bert(), trust_remote_code=False)
sentences, targets = movie("train", STEPS * BATCH)
data = encode(tokenizer, sentences, LENGTH) | {"labels": targets}
unseen = encode(tokenizer, movie("test", 32)[0], LENGTH)

# %% [markdown]
# ## Trained with AdapterHub
#
# Compacter++ on a BERT, a few steps, saved with its head.


# %%
def torch_classifier():
    torch.manual_seed(0)
    kind = transformers.BertForSequenceClassification
    return kind.from_pretrained(bert(), num_labels=2, trust_remote_code=False).eval()


def torch_logits(model):
    with torch.no_grad():
        return model(**{name: torch.tensor(a) for name, a in unseen.items()}).logits.numpy()


hub = torch_classifier()
adapters.init(hub)
hub.add_adapter("movie", config=adapters.CompacterPlusPlusConfig())
hub.train_adapter("movie")
optimizer = torch.optim.AdamW([p for p in hub.parameters() if p.requires_grad], lr=3e-3)
for batch in batches(data, BATCH, STEPS):
    loss = hub(**{name: torch.tensor(a, dtype=torch.long) for name, a in batch.items()}).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
hub.eval()
hub.save_adapter(str(folder / "hub"), "movie")
print(f"loss {loss:.3f};", *sorted(file.name for file in (folder / "hub").iterdir()))

# %% [markdown]
# ## Read here
#
# `import_adapterhub` also reads the place of the adapter: AdapterHub's Compacter++ on BERT works on
# a sum with the residual, before the norm. A site and two switches of the method describe this
# place.

# %%
backbone = cj.load_backbone(
    bert(), head="sequence_classification", num_labels=2, dropout_rate=0.0, pooling="first"
)
model, params = cj.import_adapterhub(folder / "hub", backbone)
apply = jax.jit(lambda params: model.apply({"params": params}, **unseen))
theirs, ours = torch_logits(hub), np.asarray(apply(params))
print("sites", model.method.sites, "- original_ln_before", model.method.original_ln_before)
print(f"largest difference of {ours.size} logits: {np.abs(ours - theirs).max():.1e}")
np.testing.assert_allclose(ours, theirs, atol=2e-5)

# %% [markdown]
# ## Trained on, and sent back
#
# Training continues in JAX with the same optimizer. AdapterHub's own `load_adapter` reads the
# exported folder.

# %%
labels = cj.label_params(params, model.method)
trained, frozen = cj.partition(params, labels)
tx = cj.optimizer(optax.adamw(3e-3), labels)


@jax.jit
def step(trained, frozen, opt_state, batch):
    def loss_of(trained):
        params = cj.merge(trained, frozen)
        logits = model.apply({"params": params}, batch["input_ids"], batch["attention_mask"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

    gradient = jax.grad(loss_of)(trained)
    updates, opt_state = tx.update(gradient, opt_state, trained)
    return optax.apply_updates(trained, updates), opt_state


opt_state = tx.init(trained)
for batch in batches(data, BATCH, STEPS, seed=1):
    trained, opt_state = step(trained, frozen, opt_state, batch)
params = cj.merge(trained, frozen)
cj.export_adapterhub(folder / "ours", model, params)

again = torch_classifier()
adapters.init(again)
again.load_adapter(str(folder / "ours"), use_safetensors=True, set_active=True)
returned = torch_logits(again.eval())
ours = np.asarray(apply(params))
print(
    f"moved by {np.abs(ours - theirs).max():.2f}, and the same there to "
    f"{np.abs(ours - returned).max():.1e}"
)
np.testing.assert_allclose(ours, returned, atol=2e-5)

# %% [markdown]
# ## PEFT
#
# The same steps with LoRA. Both libraries can merge the trained update into the weights of the
# backbone.

# %%
settings = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, init_lora_weights=False)
lora = peft.get_peft_model(torch_classifier(), settings).eval()
lora.save_pretrained(folder / "peft")
model_lora, params_lora = cj.import_peft(folder / "peft", backbone)
merged = cj.merge_adapter(model_lora, params_lora)

theirs_lora = torch_logits(lora)
ours_lora = np.asarray(model_lora.apply({"params": params_lora}, **unseen))
as_weights = np.asarray(backbone.module.apply({"params": merged}, **unseen))
print(f"as adapter: {np.abs(ours_lora - theirs_lora).max():.1e} apart")
print(f"as weights: {np.abs(as_weights - theirs_lora).max():.1e} apart")
np.testing.assert_allclose(ours_lora, theirs_lora, atol=1e-4)

# %%
fig, axes = plt.subplots(1, 3, figsize=(7, 2.7))
panels = (
    (
        "Compacter++, read",
        theirs,
        np.asarray(apply(cj.import_adapterhub(folder / "hub", backbone)[1])),
    ),
    ("trained on, sent back", returned, ours),
    ("LoRA of PEFT, read", theirs_lora, ours_lora),
)
for axis, (title, x, y) in zip(axes, panels, strict=True):
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    axis.plot(ends, ends, color="black", linewidth=0.6)
    axis.plot(x.ravel(), y.ravel(), "o", markersize=3.5, color=BLUE, alpha=0.7)
    axis.set(title=title, xlabel="PyTorch's logits")
axes[0].set_ylabel("logits here")
plt.show()

# %% [markdown]
# Two limits apply. For `BertModel`, `T5Model` and `T5ForConditionalGeneration`, `adapters` 1.3 does
# not save the rule that Compacter's layers share. Nobody can restore a folder without the rule;
# `import_adapterhub` refuses the folder and names the fix. And a setting without a counterpart is
# refused by name, before anything is written.
#
# On the command line: `python -m train convert --from adapterhub FOLDER --backbone DIR --to
# my-adapter`.
