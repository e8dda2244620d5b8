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
# # Translation: an adapter for each direction
#
# One Transformer learns English to German and English to French at once. Then it is frozen, and
# each direction gets an adapter of its own, as in CIAT (Zhu et al.,
# [arXiv:2104.08154](https://arxiv.org/abs/2104.08154)). Both are members of one bank: a batch mixes
# the directions, and each row goes through its own member.
#
# The sentences come from a small grammar, so that the notebook needs no data. German puts the verb
# before its subject after a first word such as *heute*, French puts colours behind the noun, and
# both have genders: there is something to learn for each language, and not the same.

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
import itertools
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from demo import BLUE, ORANGE, SMALL, style
from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj

style()
DIRECTIONS = ("en-de", "en-fr")
LENGTH, BATCH = 14, 64
FIRST_STEPS, SECOND_STEPS = (3, 2) if SMALL else (200, 150)

# %% [markdown]
# ## A grammar in three languages
#
# A row of a table is a word in English, German and French; of people it has the adjective's French
# ending, too, and of things the gender that the colour behind them follows.

# %%
FIRST = [("today", "heute", "aujourd'hui"), ("now", "jetzt", "maintenant")]
FIRST += [("often", "oft", "souvent"), ("here", "hier", "ici")]
PEOPLE = [("farmer", "der Bauer", "le fermier"), ("baker", "der Bäcker", "le boulanger")]
PEOPLE += [("king", "der König", "le roi"), ("queen", "die Königin", "la reine")]
PEOPLE += [("singer", "die Sängerin", "la chanteuse"), ("nurse", "die Pflegerin", "la soignante")]
KINDS = [("tired", "müde", "fatigué"), ("careful", "vorsichtige", "prudent")]
KINDS += [("small", "kleine", "petit"), ("happy", "fröhliche", "content")]
VERBS = [("buys", "kauft", "achète"), ("sells", "verkauft", "vend"), ("finds", "findet", "trouve")]
VERBS += [("paints", "malt", "peint"), ("counts", "zählt", "compte"), ("sees", "sieht", "voit")]
NUMBERS = [("two", "zwei", "deux"), ("three", "drei", "trois"), ("four", "vier", "quatre")]
COLOURS = [("green", "grüne", "vert"), ("black", "schwarze", "noir"), ("blue", "blaue", "bleu")]
THINGS = [
    ("hats", "Hüte", "chapeaux"),
    ("boats", "Boote", "bateaux"),
    ("books", "Bücher", "livres"),
]
THINGS += [("apples", "Äpfel", "pommes"), ("chairs", "Stühle", "chaises")]
THINGS += [("boxes", "Kisten", "boîtes")]
FEMININE = {"la reine", "la chanteuse", "la soignante", "pommes", "chaises", "boîtes"}


def feminine(adjective, noun):
    return adjective + "e" if noun in FEMININE else adjective


def sentence(first, person, kind, verb, number, colour, thing):
    """The same sentence in three languages."""
    article, noun = person[1].split()
    french = feminine(kind[2], person[2]), feminine(colour[2], thing[2])
    # After its noun, except the small ones, whose adjective comes before.
    le, nom = person[2].split()
    subject = f"{le} {french[0]} {nom}" if kind[0] == "small" else f"{le} {nom} {french[0]}"
    return (
        f"{first[0]} the {kind[0]} {person[0]} {verb[0]} {number[0]} {colour[0]} {thing[0]}",
        f"{first[1]} {verb[1]} {article} {kind[1]} {noun} {number[1]} {colour[1]} {thing[1]}",
        f"{first[2]} {subject} {verb[2]} {number[2]} {thing[2]} {french[1]}s",
    )


SLOTS = (FIRST, PEOPLE, KINDS, VERBS, NUMBERS, COLOURS, THINGS)
everything = [sentence(*words) for words in itertools.product(*SLOTS)]
order = np.random.default_rng(0).permutation(len(everything))
train, test = [everything[i] for i in order[:3000]], [everything[i] for i in order[3000:3100]]
print(f"{len(everything):,} sentences, {len(train):,} to train on; for example:")
print("\n".join(train[0]))

# %% [markdown]
# ## Tokens
#
# A word is a token. As in M2M-100, padding is 1, a sentence ends with 2, and a token says which
# language is wanted; here it comes before the source.

# %%
words = sorted({word for row in everything for text in row for word in text.split()})
TOKENS = ["<s>", "<pad>", "</s>", "<de>", "<fr>", *words]
NUMBER = {token: number for number, token in enumerate(TOKENS)}


def encode(texts):
    ids = np.ones((len(texts), LENGTH), np.int32)
    for row, text in zip(ids, texts, strict=True):
        numbers = [NUMBER[word] for word in text.split()] + [2]
        row[: len(numbers)] = numbers
    return ids


def decode(ids):
    return [" ".join(TOKENS[i] for i in row if i > 4) for row in np.asarray(ids)]


def examples(rows, direction):
    """Sources with the token of the language, and targets."""
    language = DIRECTIONS[direction][-2:]
    column = 1 + direction
    return [f"<{language}> {row[0]}" for row in rows], [row[column] for row in rows]


def batch_of(rng):
    """Rows of both directions, mixed, and the number of each row's direction."""
    ids = rng.integers(0, len(DIRECTIONS), BATCH)
    chosen = [examples([train[rng.integers(len(train))]], direction) for direction in ids]
    sources, targets = (
        encode([text for texts in column for text in texts]) for column in zip(*chosen, strict=True)
    )
    return {"input_ids": sources, "targets": targets, "adapter_ids": ids.astype(np.int32)}


# %% [markdown]
# ## The first stage: one model for both directions
#
# `cj.Seq2Seq` is the encoder-decoder of M2M-100 and NLLB-200; here it is small and new, and trained
# as a whole, too briefly to be perfect. `fit` is an ordinary optax loop for any method: the labels
# decide what is trained.


# %%
def new_model(decoder_layer="standard"):
    sizes = {"attention_heads": 4, "ffn_dim": 128, "layers": 2, "layerdrop": 0.0}
    stacks = itertools.product(("encoder", "decoder"), sizes.items())
    config = cj.Seq2SeqConfig(
        vocab_size=len(TOKENS),
        d_model=64,
        **{f"{stack}_{name}": value for stack, (name, value) in stacks},
        decoder_layer=decoder_layer,
        decoder_start_token_id=2,
    )
    module = cj.Seq2Seq(config)
    params = jax.jit(module.init)(jax.random.key(0), *module.dummy_inputs())["params"]
    return cj.Backbone(module, params, config, decoder_layer)


def loss_of(model, params, batch, **routed):
    ids, targets = batch["input_ids"], batch["targets"]
    shifted = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=2)
    logits = model.apply({"params": params}, ids, (ids != 1).astype(int), shifted, **routed)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(losses * (targets != 1)) / jnp.sum(targets != 1)


def fit(model, params, learning_rate, steps, *, routed):
    labels = cj.label_params(params, model.method)
    trained, frozen = cj.partition(params, labels)
    schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, steps // 10, steps)
    tx = cj.optimizer(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)), labels)

    @jax.jit
    def step(trained, frozen, opt_state, batch):
        members = {"adapter_ids": batch["adapter_ids"]} if routed else {}

        def loss(trained):
            return loss_of(model, cj.merge(trained, frozen), batch, **members)

        value, gradient = jax.value_and_grad(loss)(trained)
        updates, opt_state = tx.update(gradient, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state, value

    opt_state, values, rng = tx.init(trained), [], np.random.default_rng(1)
    for _ in range(steps):
        trained, opt_state, value = step(trained, frozen, opt_state, batch_of(rng))
        values.append(float(value))
    return cj.merge(trained, frozen), values


def translate(model, params, sources, **routed):
    ids = encode(sources)
    made = cj.generate(
        model, params, ids, (ids != 1).astype(int), max_new_tokens=LENGTH, eos_token_id=2, **routed
    )
    return decode(made)


def share_right(model, params, direction, member=None):
    sources, targets = examples(test, direction)
    routed = {} if member is None else {"adapter_ids": jnp.full(len(test), member)}
    made = translate(model, params, sources, **routed)
    return np.mean([a == b for a, b in zip(made, targets, strict=True)])


backbone = new_model()
whole = cj.Adapted(backbone.module, cj.preset("full"))
params, first_losses = fit(whole, backbone.params, 3e-3, FIRST_STEPS, routed=False)
backbone = cj.Backbone(backbone.module, params, backbone.config, "translator")
before = [share_right(backbone.module, params, direction) for direction in range(2)]
for name, share in zip(DIRECTIONS, before, strict=True):
    print(f"{name}: {share:.0%} of {len(test)} new sentences are right in every word")

# %% [markdown]
# ## The second stage: a bank with a member for each direction
#
# A CIAT adapter starts as the identity (`up` is zero), so the second stage begins where the first
# ended. `stack_adapters` puts the two into one bank. The loop is the one above with `adapter_ids`:
# a batch has rows of both directions, one program is compiled, and the frozen model is in memory
# once. From the command line this is `fit --method ciat --adapters per_direction`.

# %%
one = cj.Adapted(backbone.module, cj.preset("ciat", reduction_factor=4))
starts = [(one, cj.init_adapters(one, backbone, jax.random.key(i))) for i in range(2)]
model, bank = cj.stack_adapters(starts, backbone)
count = cj.count(bank, cj.label_params(bank, model.method))
print(f"trained: {count.trained:,} numbers, {count.trained // 2:,} for each direction")

bank, second_losses = fit(model, bank, 3e-3, SECOND_STEPS, routed=True)
after = [share_right(model, bank, direction, member=direction) for direction in range(2)]
for name, *shares in zip(DIRECTIONS, before, after, strict=True):
    print(f"{name}: {shares[0]:.0%} right without its member, {shares[1]:.0%} with it")

# %%
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
axis.plot(first_losses, color=BLUE, label="the whole model")
axis.plot(
    np.arange(len(second_losses)) + len(first_losses), second_losses, color=ORANGE, label="members"
)
axis.set_xlabel("step")
axis.set_ylabel("loss per token")
axis.set_yscale("log")
axis.set_title("Two stages of training, mixed batches of both directions")
axis.legend()
plt.show()

# %% [markdown]
# ## A sentence with and without
#
# `-1` sends a row through the plain backbone. So one call translates a sentence without an adapter
# and with each member. The last two lines ask a member for the language that it was not trained
# for: nothing but the token before the source tells it so.

# %%
found = None
for direction in range(2):
    sources, targets = examples(test, direction)
    made = translate(backbone.module, params, sources)
    wrong = [i for i, (a, b) in enumerate(zip(made, targets, strict=True)) if a != b]
    found = found or (wrong and (test[wrong[0]], direction))
row, direction = found or (test[0], 0)
source = examples([row], direction)[0]
print("source        ", row[0])
print("reference     ", row[1 + direction])
for member in (-1, direction, 1 - direction):
    (made,) = translate(model, bank, source, adapter_ids=jnp.array([member]))
    print(f"{'no member' if member < 0 else 'member ' + DIRECTIONS[member]:14}", made)

# %% [markdown]
# ## What a member changes
#
# A member acts at the embeddings, and beside self-attention and feed-forward network of each layer.
# Without its part at one place (`up` set to zero there), how many sentences are still right?


# %%
def place_of(path):
    """Where a parameter of an adapter acts, or None for one of the backbone."""
    stack, *inner = path.split("/")
    if "adapter" not in inner:
        return None
    if inner[0] == "adapter":
        return "embeddings"
    return f"{stack}, {'attention' if 'self_attn' in inner else 'feed-forward'}"


def without(place):
    """The bank, with `up` set to zero at one place."""
    flat = flatten_dict(bank, sep="/")
    return unflatten_dict(
        {
            path: 0 * leaf if place_of(path) == place and "/up/" in path else leaf
            for path, leaf in flat.items()
        },
        sep="/",
    )


places = sorted({place for path in flatten_dict(bank, sep="/") if (place := place_of(path))})
left = {
    place: [share_right(model, without(place), d, member=d) for d in range(2)] for place in places
}
figure, axis = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
height = 0.38
for direction, colour in enumerate((BLUE, ORANGE)):
    shares = [100 * left[place][direction] for place in places]
    rows = np.arange(len(places)) + height * (direction - 0.5)
    axis.barh(rows, shares, height, color=colour, label=DIRECTIONS[direction])
    axis.axvline(100 * after[direction], color=colour, linestyle=":")
axis.set_yticks(range(len(places)), places)
axis.set_xlabel(f"% of {len(test)} sentences right (dotted: the whole member)")
axis.set_title("A member without its part at one place")
figure.legend(loc="outside right upper")
plt.show()

# %% [markdown]
# ## Another decoder
#
# A compressed decoder (Li et al., Compressed Attention Network) has one sub-layer in a layer where
# the standard one has three: one attention reads source and target at once, and its values are as
# wide as a feed-forward network. It is a field of the configuration; generation, methods and banks
# stay as they are. Its gain, fewer steps that wait for each other, and its price, wider values,
# depend on the machine: here are both decoders with random weights, in turns.


# %%
def seconds_of(module, params, ids, mask):
    start = time.perf_counter()
    made = cj.generate(module, params, ids, mask, max_new_tokens=LENGTH, eos_token_id=())
    jax.block_until_ready(made)
    return time.perf_counter() - start


decoders = [new_model(layer) for layer in ("standard", "compressed")]
for rows in (1, 32):
    ids = encode(examples(test[:rows], 0)[0])
    timed = np.array(
        [
            [seconds_of(one.module, one.params, ids, (ids != 1).astype(int)) for one in decoders]
            for _ in range(3 if SMALL else 12)
        ]
    )[2:]  # the first ones compile
    ratio = np.median(timed[:, 0] / timed[:, 1])
    print(f"{rows:2} sentences at once: the compressed decoder has {ratio:.2f} times the speed")

# %% [markdown]
# [Translation](../docs/translation.md) has the commands for real data, for M2M-100 and NLLB-200,
# and for a direction that is added later without touching the others; how fast the decoders are at
# other sizes is in the [numbers](../docs/numbers.md).
