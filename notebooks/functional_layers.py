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
# # PHM layers as functions
#
# The layers of Compacter are two pure functions and a thin module around them. This notebook goes
# from `jnp.kron` to a layer of your own: first the sum of Kronecker products, then the product of
# the sum with a vector, then `grad`, `vmap` and `jit`, then a linen module. At the end a rule is
# learned from data, and the learned rule turns out to be the multiplication of quaternions.

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
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from demo import BLUE, SMALL, style

import compacter_jax as cj

style()
STEPS = 50 if SMALL else 3000

# %% [markdown]
# ## A weight made of small matrices
#
# $W = \sum_i A_i \otimes B_i$: `rule` stacks the small left factors, `blocks` the right ones.

# %%
n, p, q = 4, 6, 3
keys = jax.random.split(jax.random.key(0), 5)
rule = jax.random.normal(keys[0], (n, n, n))
blocks = jax.random.normal(keys[1], (n, p, q))

by_hand = sum(jnp.kron(rule[i], blocks[i]) for i in range(n))
weight = cj.kronecker_sum(rule, blocks)
assert jnp.allclose(weight, by_hand, atol=1e-5)
print(f"{rule.shape} and {blocks.shape} -> {weight.shape}")

# %% [markdown]
# Compacter's blocks are products of two vectors, $B_i = l_i r_i$, given as a pair:

# %%
left = jax.random.normal(keys[2], (n, p, 1))
right = jax.random.normal(keys[3], (n, 1, q))
low_rank = cj.kronecker_sum(rule, (left, right))
assert jnp.allclose(low_rank, cj.kronecker_sum(rule, left @ right), atol=1e-5)


def numbers(d, b, n):
    return {"dense": d * b, "PHM": d * b // n + n**3, "Compacter": d + b + n**3}


for name, size in numbers(768, 24, 4).items():
    print(f"{name:10} {size:>7,} numbers make a weight [768, 24]")

# %% [markdown]
# ## Multiply without the weight
#
# `kronecker_sum_matmul` computes `x @ kronecker_sum(rule, blocks)`, and chooses by the shapes
# whether to build `W`: for many rows the function builds `W` once; for few rows `x` goes through
# the small factors. The jaxprs show the choice.

# %%
rule4 = jax.random.normal(keys[0], (4, 4, 4))
factors = (jax.random.normal(keys[2], (4, 192, 1)), jax.random.normal(keys[3], (4, 1, 6)))
for rows in (1, 4096):
    x = jax.random.normal(keys[4], (rows, 768))
    jaxpr = jax.make_jaxpr(cj.kronecker_sum_matmul)(x, rule4, factors)
    shapes = [variable.aval.shape for eqn in jaxpr.eqns for variable in eqn.outvars]
    print(f"{rows:>5} rows: {'W is built' if (768, 24) in shapes else 'W is never made'}")
    y = cj.kronecker_sum_matmul(x, rule4, factors)
    assert jnp.allclose(y, x @ cj.kronecker_sum(rule4, factors), rtol=1e-4, atol=1e-3)

# %% [markdown]
# ## grad, vmap, jit
#
# `grad`, `vmap` and `jit` work without additions, because the layers are functions of arrays. Two
# examples: the gradient for each example by itself, and eight adapters with one rule at once:

# %%
x = jax.random.normal(keys[4], (32, n * p))


@jax.jit
def loss(rule, blocks, x):
    return jnp.mean(cj.kronecker_sum_matmul(x, rule, blocks) ** 2)


of_each = jax.vmap(jax.grad(loss), in_axes=(None, None, 0))(rule, (left, right), x)
assert jnp.allclose(of_each.mean(0), jax.grad(loss)(rule, (left, right), x), atol=1e-4)
print("gradient of the rule, for each of 32 examples:", of_each.shape)

eight = jax.random.normal(keys[1], (8, n, p, q))
outputs = jax.vmap(cj.kronecker_sum_matmul, in_axes=(None, None, 0))(x, rule, eight)
print("outputs of eight adapters that share a rule:", outputs.shape)

# %% [markdown]
# ## In a module of your own
#
# `PHMLinear` has a rule of its own, unless you pass one in: the owner of a shared rule passes the
# rule to each layer. Here a network owns the rule, and its three layers own only their blocks and
# biases.


# %%
class Network(nn.Module):
    """Three PHM layers and one rule."""

    phm_dim: int = 4

    @nn.compact
    def __call__(self, x):
        shape = (self.phm_dim,) * 3
        rule = self.param("phm_rule", nn.initializers.normal(0.5), shape)
        for i in range(3):
            x = cj.PHMLinear(16, phm_dim=self.phm_dim, name=f"layer_{i}")(nn.tanh(x), rule)
        return x


network = Network()
shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 16)))["params"]
for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
    print(f"{leaf.shape!s:10} {jax.tree_util.keystr(path, simple=True, separator='/')}")

# %% [markdown]
# ## Learn a rule
#
# With a fixed rule, a sum of Kronecker products can be a multiplication of quaternions: four signed
# permutations, one for each of 1, i, j, k (Zhang et al.,
# [arXiv:2102.08597](https://arxiv.org/abs/2102.08597)). Can this rule be learned from data? Three
# unknown layers multiply vectors of quaternions; we see inputs and outputs, and learn one rule and
# three sets of blocks.

# %%
HAMILTON = np.zeros((4, 4, 4), np.float32)  # unit, input component, output component
for unit, i, j, sign in (
    *((0, k, k, 1) for k in range(4)),
    *((1, 0, 1, 1), (1, 1, 0, -1), (1, 2, 3, -1), (1, 3, 2, 1)),
    *((2, 0, 2, 1), (2, 2, 0, -1), (2, 3, 1, -1), (2, 1, 3, 1)),
    *((3, 0, 3, 1), (3, 3, 0, -1), (3, 1, 2, -1), (3, 2, 1, 1)),
):
    HAMILTON[unit, i, j] = sign

rng = np.random.default_rng(0)
true_blocks = jnp.float32(rng.standard_normal((3, 4, 2, 2)))
of_layers = jax.vmap(cj.kronecker_sum, in_axes=(None, 0))
targets = of_layers(jnp.asarray(HAMILTON), true_blocks)  # [3, 8, 8]


def distance(learned, x):
    rule, blocks = learned
    return jnp.mean((x @ (of_layers(rule, blocks) - targets)) ** 2)


learned = (
    jax.random.normal(keys[0], (4, 4, 4)) * 0.5,
    jax.random.normal(keys[1], (3, 4, 2, 2)) * 0.5,
)
tx = optax.adam(optax.cosine_decay_schedule(2e-2, STEPS))


@jax.jit
def learn(learned, key):
    def step(carry, key):
        learned, state = carry
        x = jax.random.normal(key, (64, 8))
        value, gradient = jax.value_and_grad(distance)(learned, x)
        updates, state = tx.update(gradient, state)
        return (optax.apply_updates(learned, updates), state), value

    keys = jax.random.split(key, STEPS)
    (learned, _), values = jax.lax.scan(step, (learned, tx.init(learned)), keys)
    return learned, values


learned, values = learn(learned, jax.random.key(1))
print(f"mean squared error {values[0]:.1f} at first, {values[-1]:.1e} after {STEPS} steps")

# %% [markdown]
# Training finds the weights. The learned rule looks nothing like the rule that made the data, and
# need not: mixing the $A_i$ by any invertible matrix, and the $B_i$ by its inverse, changes no
# weight. The data determines only the space that the $A_i$ span. This space is the quaternions'
# own: every matrix of the quaternions is a mixture of the learned matrices. In the basis of the
# quaternions the learned rule is the known one.

# %%
spanned = learned[0].reshape(4, 16)
mixture, *_ = jnp.linalg.lstsq(spanned.T, HAMILTON.reshape(4, 16).T)
mixed = (mixture.T @ spanned).reshape(4, 4, 4)

fig, axes = plt.subplots(3, 4, figsize=(6.4, 5))
rows = (("made the data", HAMILTON), ("learned", learned[0]), ("learned,\nmixed", mixed))
for axis_row, (name, matrices) in zip(axes, rows, strict=True):
    limit = float(jnp.abs(jnp.asarray(matrices)).max())
    for axis, matrix in zip(axis_row, matrices, strict=True):
        axis.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
    axis_row[0].set_ylabel(name)
for axis, unit in zip(axes[0], "1ijk", strict=True):
    axis.set_title(unit)
plt.show()
print(f"largest difference of the mixed rule: {jnp.abs(mixed - HAMILTON).max():.1e}")

# %%
fig, axes = plt.subplots(1, 3, figsize=(7, 2.6), width_ratios=(1, 1, 1.25))
limit = float(jnp.abs(targets).max())
pairs = (("unknown weight", targets[0]), ("learned", of_layers(*learned)[0]))
for axis, (title, matrix) in zip(axes, pairs, strict=False):
    axis.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit)
    axis.set(title=title, xticks=[], yticks=[])
    axis.grid(False)
axes[2].semilogy(values, color=BLUE)
axes[2].set(title="squared error", xlabel="step")
plt.show()

# %% [markdown]
# Compacter in a transformer works in the same way: all adapters share one rule, learned with them.
# See [quickstart](quickstart.ipynb).
