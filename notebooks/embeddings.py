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
# # Sentence embeddings: a domain whose words mean something else
#
# A help desk calls its systems by the names of animals: `Heron` sends the invoices, `Otter` signs
# people in. Staff write "Heron is down again", customers write "I was charged twice". A sentence
# encoder that was trained on everything thinks of birds. We adapt all-MiniLM-L6-v2 to the desk with
# Compacter++, from pairs of sentences, and look at nearest neighbours before and after.

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
from demo import SMALL, bert, encode, style
from transformers import AutoTokenizer

import compacter_jax as cj

style()
LENGTH, STEPS = 24, 2 if SMALL else 120

# %% [markdown]
# ## The domain
#
# Eight systems, six complaints of customers about each, and eight ways in which staff write about a
# system. Of each, the last two are kept for the test: no sentence of the test is trained on.

# %%
COMPLAINTS = {
    "Heron": (
        "I was charged twice for one order.",
        "The bill shows the wrong tax.",
        "My invoice never arrived.",
        "The amount on the receipt is too high.",
        "Why do I owe money that I have already paid?",
        "The bill names a company that is not mine.",
    ),
    "Otter": (
        "My password is not accepted.",
        "I cannot get into my account.",
        "The code for logging in does not come.",
        "I am locked out after three attempts.",
        "It asks me to log in again every minute.",
        "My user name is unknown, it says.",
    ),
    "Marten": (
        "Looking for a product finds nothing.",
        "The results have nothing to do with my question.",
        "Sorting the hits by price does not work.",
        "I typed the exact title and it was not found.",
        "The list of matches stays empty.",
        "It only finds things that you no longer sell.",
    ),
    "Plover": (
        "I get no messages about my order.",
        "Your mails land in the spam folder.",
        "The newsletter comes four times a day.",
        "I unsubscribed, but mails keep coming.",
        "The confirmation went to my old address.",
        "Nobody told me that the parcel was late.",
    ),
    "Badger": (
        "The copy of my photos is from last year.",
        "A file that I deleted cannot be restored.",
        "Last night's copy did not finish.",
        "I lost a week of work and want it back.",
        "An earlier version of the document is missing.",
        "Restoring my folder stops half way.",
    ),
    "Teal": (
        "The route leads through a closed street.",
        "My position is shown in the wrong town.",
        "The way to the shop is three times too long.",
        "Streets are missing on the plan.",
        "It sent me to the wrong side of the river.",
        "The distance to the nearest branch is wrong.",
    ),
    "Stoat": (
        "My wages came a week late.",
        "The overtime of May is missing.",
        "My holiday pay is wrong.",
        "The pension contribution was taken twice.",
        "The bonus is not on my pay slip.",
        "I still get the salary of my old job.",
    ),
    "Curlew": (
        "Only half of the page comes out on paper.",
        "The colours on paper are pale.",
        "It prints blank sheets.",
        "The machine says that the toner is empty, and it is not.",
        "The paper jams on every second sheet.",
        "My document waits in the queue and is never printed.",
    ),
}
TICKETS = (
    "{} is down again.",
    "Please restart {}.",
    "Who is on call for {}?",
    "{} got slow after the update.",
    "We need more memory for {}.",
    "Nothing in the log of {} explains it.",
    "Can somebody look at {} today?",
    "{} fails for some customers.",
)
names = list(COMPLAINTS)
held_out = [
    (system, ticket.format(name), complaint)
    for system, name in enumerate(names)
    for ticket, complaint in zip(TICKETS[-2:], COMPLAINTS[name][-2:], strict=True)
]
systems, questions, answers = (list(column) for column in zip(*held_out, strict=True))
print(f"{len(questions)} questions; the first: {questions[0]!r} belongs to {answers[0]!r}")

# %% [markdown]
# ## The encoder as it is
#
# A checkpoint of sentence-transformers says in its folder how hidden states become an embedding:
# here the mean of the tokens, divided by its norm. `read_sentence_embedding` reads it. The backbone
# needs no head.

# %%
tokenizer = AutoTokenizer.from_pretrained(bert(), trust_remote_code=False)
backbone = cj.load_backbone(bert(), head=None, dropout_rate=0.0)
embedding = cj.read_sentence_embedding(bert())
print(embedding)

method = cj.preset("compacter++-short")
model = cj.Adapted(backbone.module, method)
params = cj.init_adapters(model, backbone, jax.random.key(0))
labels = cj.label_params(params, method)
trained, frozen = cj.partition(params, labels)
count = cj.count(params, labels)
print(f"trained: {count.trained:,} of {count.total:,} numbers, {count.trained / count.total:.3%}")


def embed(params, ids, mask):
    states = model.apply({"params": params}, ids, mask).last_hidden_state
    return embedding(states, mask)


@jax.jit
def embedded(trained, frozen, ids, mask):
    return embed(cj.merge(trained, frozen), ids, mask)


def vectors(trained, texts):
    return np.asarray(embedded(trained, frozen, *tokens(texts)))


def tokens(texts):
    encoded = encode(tokenizer, texts, LENGTH)
    return encoded["input_ids"], encoded["attention_mask"]


def cosines(trained):
    return vectors(trained, questions) @ vectors(trained, answers).T


# %% [markdown]
# An answer is right if it is about the system that the question names. By chance one question in
# eight has a right nearest neighbour.


# %%
def right(similarity):
    return np.mean(np.array(systems)[similarity.argmax(1)] == systems)


def neighbours(similarity):
    for row in range(0, len(questions), 4):
        nearest = similarity[row].argmax()
        mark = "+" if systems[nearest] == systems[row] else "-"
        print(f"{mark} {questions[row]:34} {similarity[row, nearest]:.2f}  {answers[nearest]}")


before = cosines(trained)
neighbours(before)
print(f"nearest neighbour about the right system: {right(before):.0%}")

# %% [markdown]
# ## Adapt it
#
# The loss of multiple negatives takes, for each question, all other answers of the batch as wrong
# ones. So a batch has one pair of each system: another answer about the same system would not be
# wrong. Everything else is an ordinary optax loop over 17,176 numbers.

# %%
schedule = optax.warmup_cosine_decay_schedule(0, 3e-3, max(STEPS // 10, 1), STEPS)
tx = cj.optimizer(optax.adamw(schedule), labels)
opt_state = tx.init(trained)


@jax.jit
def step(trained, frozen, opt_state, question, answer):
    def loss_of(trained):
        params = cj.merge(trained, frozen)
        pairs = embed(params, *question), embed(params, *answer)
        return cj.multiple_negatives_ranking_loss(*pairs, scale=20.0).mean()

    loss, gradient = jax.value_and_grad(loss_of)(trained)
    updates, opt_state = tx.update(gradient, opt_state, trained)
    return optax.apply_updates(trained, updates), opt_state, loss


rng, losses, first = np.random.default_rng(0), [], trained
for _ in range(STEPS):
    batch = [
        (rng.choice(TICKETS[:-2]).format(name), rng.choice(COMPLAINTS[name][:-2])) for name in names
    ]
    question, answer = (tokens(list(texts)) for texts in zip(*batch, strict=True))
    trained, opt_state, loss = step(trained, frozen, opt_state, question, answer)
    losses.append(float(loss))
print(f"loss of the first step {losses[0]:.2f}, of the last ten {np.mean(losses[-10:]):.2f}")

# %% [markdown]
# ## Nearest neighbours after

# %%
after = cosines(trained)
neighbours(after)
print(f"nearest neighbour about the right system: {right(after):.0%}, before {right(before):.0%}")

# %%
fig, axes = plt.subplots(1, 2, sharey=True, figsize=(7, 3.6), layout="constrained")
for axis, similarity, title in zip(axes, (before, after), ("before", "after"), strict=True):
    image = axis.imshow(similarity, vmin=-0.2, vmax=1, cmap="Blues")
    ticks = np.arange(0.5, 16, 2)
    axis.set_xticks(ticks, names, rotation=60)
    axis.set_yticks(ticks, names)
    axis.set_title(f"{title}: {right(similarity):.0%} right")
    axis.set_xlabel("complaint about")
axes[0].set_ylabel("ticket names")
fig.colorbar(image, ax=axes, label="cosine", shrink=0.8)
plt.show()

# %% [markdown]
# The adapter has learned eight names; the rest of the encoder is as it was. What it has kept of its
# general knowledge can be seen in sentences that have nothing to do with the desk:

# %%
general = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "The stock market fell."]
for state, title in ((first, "before"), (trained, "after")):
    cat, kitten, market = vectors(state, general)
    print(f"{title:6}  cat and kitten {cat @ kitten:.2f}, cat and market {cat @ market:.2f}")

# %% [markdown]
# The command line does the same from a file with the columns `anchor` and `positive`, scores
# retrieval, and writes embeddings; a method that can be merged, such as LoRA, becomes a folder that
# sentence-transformers loads. [Embeddings](../docs/embeddings.md) has the commands.
