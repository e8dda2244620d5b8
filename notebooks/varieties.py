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
# # Language varieties: four language adapters, and the weights of a Faroese sentence
#
# A tagger learns on Bokmål. Below it lies an adapter for each of four languages, trained on plain
# text: Bokmål, Danish, Swedish, Icelandic. Faroese has none. So its sentences go through a mixture
# of the four, and the weights of the mixture are those that make the tags of the sentence most
# certain: [EMEA](https://arxiv.org/abs/2109.04877). Everything here is small, sentences that a
# handful of words make, and an English encoder; [the page](../docs/varieties.md) has the commands
# for real text.

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

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from demo import BLUE, SMALL, bert, style
from transformers import AutoTokenizer

import compacter_jax as cj

style()
LENGTH, ROWS = 20, 8
HEAD_STEPS, LANGUAGE_STEPS, TASK_STEPS = (2, 2, 2) if SMALL else (40, 20, 40)

# %% [markdown]
# ## Text
#
# The same sentences in four languages: "the dog sees a small bird in the forest", and "in the
# forest she sees a small bird".

# %%
LANGUAGES = ("nb", "da", "sv", "is")
NOUNS = [
    "hunden hunden hunden hundurinn",
    "katten katten katten kötturinn",
    "gutten drengen pojken strákurinn",
    "kvinnen kvinden kvinnan konan",
    "mannen manden mannen maðurinn",
    "jenta pigen flickan stelpan",
]
PRONOUNS = ["hun hun hon hún", "han han han hann"]
VERBS = ["ser ser ser sér", "finner finder hittar finnur", "kjøper køber köper kaupir"]
OBJECTS = [
    ("en liten fugl", "en lille fugl", "en liten fågel", "lítinn fugl"),
    ("en rød båt", "en rød båd", "en röd båt", "rauðan bát"),
    ("en gammel hest", "en gammel hest", "en gammal häst", "gamlan hest"),
    ("en stor fisk", "en stor fisk", "en stor fisk", "stóran fisk"),
    ("en ny stol", "en ny stol", "en ny stol", "nýjan stól"),
]
PLACES = [
    ("i skogen", "i skoven", "i skogen", "í skóginum"),
    ("ved elven", "ved elven", "vid älven", "við ána"),
    ("i byen", "i byen", "i staden", "í bænum"),
]
TAGS = ("ADJ", "ADP", "DET", "NOUN", "PRON", "VERB")


def sentences(language):
    """All sentences of a language, with the tags that they have in Bokmål."""
    at = LANGUAGES.index(language)
    subjects = [(words.split()[at], "NOUN") for words in NOUNS]
    subjects += [(words.split()[at], "PRON") for words in PRONOUNS]
    found = []
    for (subject, tag), verb, thing, place in itertools.product(subjects, VERBS, OBJECTS, PLACES):
        parts = [subject, verb.split()[at], thing[at], place[at]]
        kinds = [tag, "VERB", "DET ADJ NOUN", "ADP NOUN"]
        for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
            words = " ".join(parts[i] for i in order).split()
            found.append((words, " ".join(kinds[i] for i in order).split()))
    return found


texts = {language: [words for words, _ in sentences(language)] for language in LANGUAGES}
print(f"{len(texts['nb'])} sentences a language; the 8th:")
for language in LANGUAGES:
    print(f"  {language}  {' '.join(texts[language][7])}")

# %% [markdown]
# Masked words need an input with masks and the words behind them; tags need, for each word, its
# first token.

# %%
tokenizer = AutoTokenizer.from_pretrained(bert(), trust_remote_code=False)


def encoded(rows):
    """Ids and mask `[rows, LENGTH]`, and the word whose first token a token is, or -1."""
    found = tokenizer(
        rows, is_split_into_words=True, padding="max_length", truncation=True, max_length=LENGTH
    )
    first = np.full((len(rows), LENGTH), -1)
    for row in range(len(rows)):
        before = None
        for place, word in enumerate(found.word_ids(row)):
            if word is not None and word != before:
                first[row, place] = word
            before = word
    return np.array(found["input_ids"]), np.array(found["attention_mask"]), first


def masked(rows, rng):
    ids, mask, _ = encoded(rows)
    special = np.isin(ids, tokenizer.all_special_ids)
    chosen = (rng.random(ids.shape) < 0.25) & ~special
    return np.where(chosen, tokenizer.mask_token_id, ids), mask, np.where(chosen, ids, -1)


def tagged(rows):
    ids, mask, first = encoded([words for words, _ in rows])
    labels = np.full(ids.shape, -1)
    for row, (_, tags) in enumerate(rows):
        there = first[row] >= 0
        labels[row, there] = [TAGS.index(tags[word]) for word in first[row, there]]
    return ids, mask, labels


# %% [markdown]
# ## One loop for all that is trained
#
# The head for masked words first, alone; then an adapter for each language; then the tagger, on top
# of the adapter of Bokmål. The gradient exists for the trained half only.


# %%
def learner(model, labels, rate):
    """A function that trains what `labels` say on batches of ids, masks and right answers."""
    tx = cj.optimizer(optax.adam(rate), labels)

    @jax.jit
    def step(trained, frozen, state, ids, mask, right):
        def loss_of(trained):
            logits = model.apply({"params": cj.merge(trained, frozen)}, ids, mask)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, right.clip(0))
            return (losses * (right >= 0)).sum() / jnp.maximum((right >= 0).sum(), 1)

        loss, gradient = jax.value_and_grad(loss_of)(trained)
        updates, state = tx.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, loss

    def learn(params, batches):
        trained, frozen = cj.partition(params, labels)
        state, losses = tx.init(trained), []
        for batch in batches:
            trained, state, loss = step(trained, frozen, state, *batch)
            losses.append(float(loss))
        return cj.merge(trained, frozen), f"loss {losses[0]:.2f} -> {losses[-1]:.2f}"

    return learn


def drawn(rows, make, steps, seed):
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        yield make([rows[i] for i in rng.choice(len(rows), ROWS, replace=False)])


def of_text(rows, steps, seed):
    rng = np.random.default_rng(seed)
    return drawn(rows, lambda each: masked(each, rng), steps, seed)


backbone = cj.load_backbone(bert(), head="masked_lm", dropout_rate=0.0)
nothing = cj.Adapted(backbone.module, cj.preset("head-only"), groups={"head": "cls"})
params = cj.init_adapters(nothing, backbone, jax.random.key(0))
labels = cj.label_params(params, nothing.method, groups=nothing.groups)
everything = [words for language in LANGUAGES for words in texts[language]]
learn = learner(nothing, labels, 1e-3)
params, told = learn(params, of_text(everything, HEAD_STEPS, 0))
print(f"head: {told}")
backbone = cj.Backbone(backbone.module, params, backbone.config, backbone.name)

# %%
language_method = cj.preset("mad-x")
model = cj.Adapted(backbone.module, language_method)
params = cj.init_adapters(model, backbone, jax.random.key(0))
labels = cj.label_params(params, language_method)
count = cj.count(params, labels)
print(f"an adapter: {count.trained:,} numbers, {count.trained / count.total:.1%}")
learn = learner(model, labels, 1e-3)
languages = {}
for seed, language in enumerate(LANGUAGES):
    learned, told = learn(params, of_text(texts[language], LANGUAGE_STEPS, seed))
    languages[language] = model, learned
    print(f"{language}: {told}")

# %% [markdown]
# ## The task
#
# `cj.Stack` puts the tagger's adapter on top of that of Bokmål, which is frozen. The head belongs to
# the task.

# %%
encoder = cj.load_backbone(
    bert(), head="token_classification", num_labels=len(TAGS), dropout_rate=0.0
)
task_method = cj.preset("pfeiffer-feed-forward")
stack = cj.Stack(language_method, task_method, names=("language", "task"), frozen=("language",))
model = cj.Adapted(encoder.module, stack)
params = cj.init_adapters(model, encoder, jax.random.key(9))
params = cj.set_member(model, params, "language", languages["nb"])
labels = cj.label_params(params, stack)
batches = drawn(sentences("nb"), tagged, TASK_STEPS, 1)
params, told = learner(model, labels, 2e-3)(params, batches)
print(f"tags: {told}")
task = cj.get_member(model, params, "task")

# %% [markdown]
# ## A Faroese sentence
#
# Now a bank of the four languages takes the place of the one. A call takes the weights of its
# members: `mix`, `[rows, sites, members]`, where the sites are the modules at which adapters act.

# %%
bank = cj.Bank(language_method, size=len(LANGUAGES))
mixed = cj.Adapted(encoder.module, cj.Stack(bank, task_method, names=("language", "task")))
params = cj.init_adapters(mixed, encoder, jax.random.key(0))
for place, language in enumerate(LANGUAGES):
    params = cj.set_member(mixed, params, f"language/{place}", languages[language])
params = cj.set_member(mixed, params, "task", task)
sites = cj.mixing_sites(params)

FAROESE = ("maðurin keypir ein gamlan hest í býnum", "NOUN VERB DET ADJ NOUN ADP NOUN")
words, right = (text.split() for text in FAROESE)
ids, mask, first = encoded([words])


def logits_of(params, mix, ids, mask, first):
    return mixed.apply({"params": params}, ids[None], mask[None], mix=mix[None])[0]


apply = jax.jit(lambda params, mix: mixed.apply({"params": params}, ids, mask, mix=mix))
found = cj.minimize_entropy(
    jax.tree_util.Partial(logits_of, params),
    len(LANGUAGES),
    ids,
    mask,
    first,
    steps=10,
    learning_rate=10.0,
    mask=first >= 0,
    sites=len(sites),
)
equal = np.full((1, len(sites), len(LANGUAGES)), 1 / len(LANGUAGES), np.float32)
before = apply(params, equal)[0, first[0] >= 0]
after = found.logits[0, first[0] >= 0]
print(f"{'':10} {'right':6} {'equal weights':14} after ten steps")
for word, tag, *logits in zip(words, right, before, after, strict=True):
    chances = [np.asarray(jax.nn.softmax(each)) for each in logits]
    told = [f"{TAGS[each.argmax()]:5} {each.max():.2f}" for each in chances]
    print(f"{word:10} {tag:6} {told[0]:14} {told[1]}")
for name, logits in (("equal weights", before), ("after ten steps", after)):
    tags = [TAGS[each] for each in np.argmax(logits, -1)]
    print(f"{name}: {np.mean(np.array(tags) == right):.0%} of the words right")

# %% [markdown]
# The entropy of the tags falls, and each layer finds its own weights. The head is a site of the task
# alone, so its weights do not matter and stay equal; it is left out of the picture.

# %%
own = [i for i, site in enumerate(sites) if site != "classifier"]
fig, axes = plt.subplots(1, 2, figsize=(7, 3.2), width_ratios=(1, 1.4), layout="constrained")
axes[0].plot(found.entropies[0], "o-", color=BLUE)
axes[0].set(xlabel="steps", ylabel="mean entropy of a word (nats)", ylim=0)
weights = np.asarray(found.weights[0])[own]
image = axes[1].imshow(weights, cmap="Blues", vmin=0, vmax=max(0.5, weights.max()), aspect="auto")
names = [sites[i].replace("encoder/layer/", "layer ").replace("/output", "") for i in own]
axes[1].set_yticks(range(len(own)), names)
axes[1].set_xticks(range(len(LANGUAGES)), LANGUAGES)
axes[1].grid(visible=False)
fig.colorbar(image, ax=axes[1], label="weight")
plt.show()
print(f"entropy {found.entropies[0, 0]:.3f} before, {found.entropies[0, -1]:.3f} after ten steps")

# %% [markdown]
# A lower entropy is no promise of a better tag: a sentence can become certain of what is wrong.
# Averaged over many sentences of a variety the difference is a fraction of a point to a few points,
# which takes an experiment to see: `python -m benchmarks.varieties`.
