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
# # Eight devices: what is communicated
#
# Data parallelism communicates the gradient at every step. A method that trains few numbers
# communicates few: the gradient of a frozen weight does not exist. Here eight devices are emulated
# on a CPU; on a TPU v2-8 or v3-8, or on eight GPUs, the code is the same and the emulation is not
# switched on.

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
# Before JAX is imported: without an accelerator, eight emulated devices.
ACCELERATORS = ("/dev/accel0", "/dev/vfio", "/dev/nvidia0")
if not any(map(os.path.exists, ACCELERATORS)):
    os.environ["JAX_PLATFORMS"] = "cpu"
    kept = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    os.environ["XLA_FLAGS"] = " ".join([*kept, "--xla_force_host_platform_device_count=8"])

import math
import re

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from demo import BLUE, ORANGE, SMALL, style

import compacter_jax as cj

style()
DEVICES = jax.device_count()
print(DEVICES, "devices:", jax.devices()[0].device_kind)

# %% [markdown]
# ## One step
#
# `partition` returns the trained half; the gradient is taken with respect to this half, and `pmean`
# turns it into the gradient of the whole batch. With `axis_name=None` the same function is the step
# of one device.


# %%
def make_step(model, tx, axis_name=None):
    def step(trained, opt_state, frozen, batch):
        def loss_of(trained):
            params = cj.merge(trained, frozen)
            logits = model.apply({"params": params}, *batch["inputs"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
            return losses.mean()

        loss, gradient = jax.value_and_grad(loss_of)(trained)
        if axis_name is not None:
            loss, gradient = jax.lax.pmean((loss, gradient), axis_name)
        updates, opt_state = tx.update(gradient, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state, loss

    return step


# %% [markdown]
# ## Eight devices do what one does
#
# The model is a small BERT with random weights; a step has 32 sentences, four to a device or all on
# one. The frozen half is put on every device once, before training.

# %%
config = cj.BertConfig(
    vocab_size=100,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=16,
)
module = cj.Bert(config, head="sequence_classification", num_labels=2)
start = jax.jit(module.init)(jax.random.key(0), *module.dummy_inputs())["params"]
backbone = cj.Backbone(module, start, config, "small")
model = cj.Adapted(module, cj.preset("compacter++", reduction_factor=4))
params = cj.init_adapters(model, backbone, jax.random.key(1))
labels = cj.label_params(params, model.method)
trained, frozen = cj.partition(params, labels)
tx = cj.optimizer(optax.adamw(1e-2), labels)

ids = np.random.default_rng(0).integers(5, 100, (32, 12), np.int32)
batch = {"inputs": (ids, np.ones_like(ids)), "labels": (ids[:, 0] > 50).astype(np.int32)}


def run(step, trained, frozen, batch):
    opt_state, losses = tx.init(trained), []
    if batch["labels"].ndim == 2:  # the state, on every device
        opt_state = copies(opt_state)
        trained = copies(trained)
    for _ in range(5):
        trained, opt_state, loss = step(trained, opt_state, frozen, batch)
        losses.append(float(np.mean(loss)))
    return np.array(losses)


def copies(tree):
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * DEVICES), tree)


def divided(tree):
    return jax.tree.map(lambda a: a.reshape(DEVICES, -1, *a.shape[1:]), tree)


one = run(jax.jit(make_step(model, tx)), trained, frozen, batch)
step = jax.pmap(make_step(model, tx, "devices"), "devices")
several = run(step, trained, copies(frozen), divided(batch))
for name, losses in (("1 device", one), (f"{DEVICES} devices", several)):
    print(f"{name:10}", " ".join(f"{loss:.6f}" for loss in losses))
np.testing.assert_allclose(one, several, rtol=1e-5)

# %% [markdown]
# ## What travels, in bytes
#
# XLA's compiled program lists the all-reduces of the step, and the arrays that each all-reduce adds
# up. These arrays are the trained half and the loss, nothing else.

# %%
program = step.lower(copies(trained), copies(tx.init(trained)), copies(frozen), divided(batch))
text = program.compile().as_text()
reduced = 0
for line in text.splitlines():
    if found := re.search(r"= (.*?) all-reduce(-start)?\(", line):
        shapes = re.findall(r"f32\[([\d,]*)\]", found[1])
        reduced += sum(4 * math.prod(int(n) for n in shape.split(",") if n) for shape in shapes)
own = 4 * sum(leaf.size for leaf in jax.tree.leaves(trained))
print(f"trained: {own:,} bytes; in all-reduces: {reduced:,}, the loss included")
assert reduced == own + 4

# %% [markdown]
# ## T5-base
#
# A step of T5-base is only traced here, with shapes in place of weights, so none of its 892 MB is
# allocated. The operands of `psum` in the traced program are the arrays that the devices add up.

# %%
t5 = cj.T5(cj.T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12))


def primitives(jaxpr):
    """The equations of a program and of those in it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(value):
                yield from primitives(getattr(value, "jaxpr", value))


def is_program(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def bytes_of_step(name, **fields):
    model = cj.Adapted(t5, cj.preset(name, **fields))
    shapes = jax.eval_shape(model.init, jax.random.key(0), *t5.dummy_inputs())["params"]
    labels = cj.label_params(shapes, model.method)
    trained, frozen = cj.partition(shapes, labels)
    tx = cj.optimizer(optax.adamw(1e-3), labels)
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    batch = {"inputs": (ids, ids, ids), "labels": ids}
    state = jax.eval_shape(tx.init, trained)
    step = make_step(model, tx, "devices")
    traced = jax.make_jaxpr(step, axis_env=[("devices", 8)])(trained, state, frozen, batch)
    sums = [e for e in primitives(traced.jaxpr) if e.primitive.name.startswith("psum")]
    return sum(v.aval.size * v.aval.dtype.itemsize for e in sums for v in e.invars)


METHODS = ("full", "compacter++")
if not SMALL:
    METHODS = ("full", "houlsby", "lora", "compacter", "compacter++")
sizes = {name: bytes_of_step(name) for name in METHODS}
for name, size in sizes.items():
    print(f"{name:12} {size:>12,} bytes a step, {size / sizes['full']:.3%} of full fine-tuning")

# %%
fig, axis = plt.subplots(figsize=(7, 2.6))
colors = [BLUE if "compacter" in name else ORANGE for name in sizes]
bars = axis.barh(list(sizes), list(sizes.values()), color=colors, height=0.6)
axis.bar_label(bars, [f" {size / 1e6:,.2f} MB" for size in sizes.values()])
axis.set(
    xscale="log", xlim=(1e5, 1e10), xlabel="bytes that the devices add up in a step of T5-base"
)
axis.invert_yaxis()
axis.grid(axis="y", visible=False)
plt.show()

# %% [markdown]
# An all-reduce in a ring sends twice this amount, less one part in eight, over every link. The
# optimizer keeps two more numbers for each trained parameter, on every device, and none for the
# frozen ones.
#
# `python -m train fit` does this on all available devices, over several hosts too
# (`--distributed`), and divides a backbone that does not fit one device (`--mesh data=2,model=4`).
