"""Tests every benchmark from files in the hub's schema to scores, on an encoder and on a T5."""

import functools

import datasets
import hub_data
import jax
import numpy as np
import pytest

import compacter_jax as cj
from train import objectives, tasks
from train.compute import outputs as compute_outputs
from train.data import batching
from train.fit.options import FitOptions
from train.inference import adapter
from train.objectives import prompt_init
from train.objectives.span_extraction import ExtractiveQA
from train.objectives.text_to_text import TextToText
from train.tasks import benchmarks, text_format

NAMES = tuple(hub_data.FEATURES)
MEANS = {
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearman"),
    "cb": ("accuracy", "macro_f1"),
    "multirc": ("exact_match", "f1"),
    "record": ("exact_match", "f1"),
    "squad": ("exact_match", "f1"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes all benchmarks, each in the folder of its name."""
    root = tmp_path_factory.mktemp("hub")
    for name in NAMES:
        hub_data.write(root, name)
    return root


def options_of(backbone, folder, name, **changes):
    changes = {"max_length": 64, "eval_batch_size": 8, **changes}
    return FitOptions(
        backbone=str(backbone), task=name, data_dir=folder, output_dir=folder, **changes
    )


@functools.cache
def adapted(backbone, **head):
    """Returns the backbone, and the model without inserted adapters."""
    made = cj.load_backbone(backbone, **head)
    return made, cj.Adapted(made.module, cj.preset("full"))


def prepared(backbone, folder, name, **changes):
    """Returns the task, objective and parameters of a run before its start."""
    options = options_of(backbone, folder, name, **changes)
    task = tasks.load_task(name, data_dir=folder)
    objectives.check_options(task, options)
    head = objectives.head_arguments(backbone, task.num_labels, task.kind)
    made, model = adapted(backbone, **head)
    tokenizer = adapter.load_tokenizer(backbone, made, options.max_length)
    return task, objectives.for_task(task, options, model, tokenizer), made.params


def right_outputs(made, encoded):
    """Returns perfect outputs, which are derived from the examples themselves."""
    targets = encoded.targets
    if isinstance(made, ExtractiveQA):
        logits = np.zeros((len(encoded), made.max_length, 2), np.float32)
        # A window without the answer gets low logits.
        sure = np.where(targets[:, 0] > 0, 9.0, 0.1)
        for end in (0, 1):
            logits[np.arange(len(encoded)), targets[:, end], end] = sure
        return logits
    if isinstance(made, TextToText) and made.format.generates:
        texts = np.split(encoded.target_texts.ids, encoded.target_texts.offsets[1:-1])
        ids = np.zeros((len(encoded), 1 + max(map(len, texts))), np.int32)
        for row, tokens in zip(ids, texts, strict=True):
            row[1 : 1 + len(tokens)] = tokens
        return {"ids": ids, "loss": np.zeros(len(encoded))}
    if encoded.targets.dtype == np.float32:
        return targets[:, None]
    logits = np.eye(1 + targets.max(), dtype=np.float32)[targets]
    return {"scores": logits} if isinstance(made, TextToText) else logits


@pytest.mark.parametrize("family", ["bert", "t5"])
@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_is_scored(name, family, folder, tiny_backbone, tiny_t5):
    backbone = tiny_backbone if family == "bert" else tiny_t5
    if family == "bert" and name.startswith("wmt"):
        with pytest.raises(ValueError, match=f"task '{name}' .* needs an encoder-decoder such as"):
            prepared(backbone, folder, name)
        return
    # Short targets, since answers are generated token by token.
    changes = {} if family == "bert" else {"max_target_length": 20}
    task, made, params = prepared(backbone, folder, name, **changes)
    encoded = made.encode_all(task.splits)["validation"]
    # All lengths are in one batch, so only one program is compiled.
    (batch,) = batching.batches(encoded, len(encoded), shuffle=True, seed=0)
    outputs = jax.device_get(jax.jit(made.outputs)(params, batch))
    outputs = jax.tree.map(lambda leaf: leaf[np.argsort(batch["indices"])], outputs)
    scores = made.scores(outputs, encoded)
    assert np.isfinite(list(scores.values())).all()
    assert scores["loss"] > 0
    means = MEANS.get(name, (task.metric,))
    assert scores[task.metric] == pytest.approx(np.mean([scores[one] for one in means]))
    # The right answers get full scores, and the answers of other rows do not.
    right = right_outputs(made, encoded)
    full = 100 if name.startswith("wmt") else 1
    rounding = 0.02 if (name, family) == ("stsb", "t5") else 1e-6  # to multiples of 0.2
    assert made.scores(right, encoded)[task.metric] == pytest.approx(full, rel=rounding)
    wrong = jax.tree.map(lambda leaf: np.roll(leaf, 1, axis=0), right)
    assert made.scores(wrong, encoded)[task.metric] < 0.97 * full
    # Rows without labels get predictions as well.
    columns = {column: task.splits["validation"][column][:] for column in made.benchmark.columns}
    unlabelled = made.encode(columns)
    assert unlabelled.targets is None or name.startswith("wmt")
    predicted = made.predictions(
        jax.tree.map(lambda leaf: leaf[: len(unlabelled)], right), unlabelled
    )
    assert len(predicted) == 6


@pytest.mark.parametrize(
    ("name", "family", "max_length"),
    [("squad", "bert", 24), ("copa", "bert", 64), ("record", "t5", 64)],
)
def test_the_loss_of_a_split_is_that_of_its_batches(
    name, family, max_length, folder, tiny_backbone, tiny_t5
):
    """The loss is the same with rows padded to their own length, and with all in one batch."""
    backbone = tiny_backbone if family == "bert" else tiny_t5
    _, made, params = prepared(backbone, folder, name, max_length=max_length)
    encoded = made.encode_all({"train": hub_data.rows(name, 5)})["train"]
    compute = jax.jit(made.outputs)
    outputs = compute_outputs.split_outputs(
        lambda batch: jax.device_get(compute(params, batch)), encoded, 4, description=None
    )
    size = len(encoded)
    (batch,) = batching.batches(encoded, size, shuffle=True, seed=0)  # all lengths in one
    loss = jax.jit(lambda batch: made.loss(made.apply(params, batch, None), batch["labels"]))
    losses = loss(batch)
    expected = np.average(losses, weights=batch["weights"])
    assert made.scores(outputs, encoded)["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_official_splits(name, folder):
    task = tasks.load_task(name, data_dir=folder)
    assert task.name == name
    splits = ["train", "validation", *hub_data.VALIDATION.get(name, ())[1:]]
    splits += ["test"] if name in hub_data.OPEN_TEST else []
    sizes = {"train": 8, "test": 4}
    assert {split: len(rows) for split, rows in task.splits.items()} == {
        split: sizes.get(split, 6) for split in splits
    }
    label = hub_data.FEATURES[name].get("label")
    expected = tuple(label.names) if isinstance(label, datasets.ClassLabel) else ()
    assert task.label_names == expected
    assert task.metric == "_and_".join(MEANS.get(name, (task.metric,)))
    original = hub_data.rows(name, 6, seed=1)  # these rows were written second
    for column in task.benchmark.columns:
        assert task.splits["validation"][column][:] == original[column][:]


# --- how rows are put to a backbone -------------------------------------------------------------

PREMISE = {"premise": ["a film"], "hypothesis": ["it is fine"]}
PAIR = {"sentence1": ["a film"], "sentence2": ["it is fine"]}
RECORD = {
    "passage": ['"Good," he said.\n@highlight\nThe film was loved\n@highlight\nIt won'],
    "query": ["critics loved @placeholder, and @placeholder won"],
    "entities": [["the film", "Ann", "the film"]],
}
MULTIRC = {
    "paragraph": ["<b>Sent 1: </b>It was dull.<br><b>Sent 2: </b>We left."],
    "question": ["why?"],
    "answer": ["it was dull"],
}
WSC = {
    "text": ["Mark told Pete's sister, that he won."],
    "span1_text": ["Pete"],
    "span1_index": [2],
    "span2_text": ["he"],
    "span2_index": [5],
}


@pytest.mark.parametrize(
    ("name", "rows", "pair", "text"),
    [
        ("cola", {"sentence": ["a film"]}, ("a film",), "cola sentence: a film"),
        ("sst2", {"sentence": ["a film"]}, ("a film",), "sst2 sentence: a film"),
        (
            "mrpc",
            PAIR,
            ("a film", "it is fine"),
            "mrpc sentence1: a film sentence2: it is fine",
        ),
        (
            "qqp",
            {"question1": ["why"], "question2": ["how"]},
            ("why", "how"),
            "qqp question1: why question2: how",
        ),
        (
            "stsb",
            PAIR,
            ("a film", "it is fine"),
            "stsb sentence1: a film sentence2: it is fine",
        ),
        (
            "mnli",
            PREMISE,
            ("a film", "it is fine"),
            "mnli hypothesis: it is fine premise: a film",
        ),
        (
            "qnli",
            {"question": ["why"], "sentence": ["so"]},
            ("why", "so"),
            "qnli question: why sentence: so",
        ),
        ("rte", PAIR, ("a film", "it is fine"), "rte sentence1: a film sentence2: it is fine"),
        ("wnli", PAIR, ("a film", "it is fine"), "wnli sentence1: a film sentence2: it is fine"),
        (
            "boolq",
            {"question": ["is it"], "passage": ["It is"]},
            ("is it", "It is"),
            "boolq passage: It is question: is it",
        ),
        ("cb", PREMISE, ("a film", "it is fine"), "cb hypothesis: it is fine premise: a film"),
        (
            "multirc",
            MULTIRC,
            ("Sent 1: It was dull. Sent 2: We left.", "why? it was dull"),
            "multirc question: why? answer: it was dull paragraph: Sent 1: It was dull. "
            "Sent 2: We left.",
        ),
        (
            "wic",
            {**PAIR, "word": ["fine"]},
            ("fine: a film", "it is fine"),
            "wic pos: sentence1: a film sentence2: it is fine word: fine",
        ),
        (
            "wsc",
            WSC,
            ("Mark told *Pete*'s sister, that #he# won.",),
            "wsc text: Mark told *Pete*'s sister, that #he# won.",
        ),
    ],
)
def test_inputs_of_labelled_benchmarks(name, rows, pair, text):
    benchmark = benchmarks.find(name)
    columns = benchmark.for_encoder(rows)
    assert tuple(values[0] for values in columns.values()) == pair
    assert list(columns) == ["sentence", "sentence2"][: len(pair)]
    assert inputs_of(benchmark, rows) == [text]
    target = "score" if name == "stsb" else "label"
    labelled = {**rows, target: [1]}
    assert benchmark.for_encoder(labelled)[target] == [1]
    assert benchmark.for_decoder(labelled)[target] == [1]


def inputs_of(benchmark, rows):
    fmt = text_format.TextFormat(kind="text", prefix=benchmark.prefix)
    return fmt.inputs(benchmark.for_decoder(rows))


def test_inputs_of_copa():
    rows = {
        "premise": ["It rained.", "We left."],
        "choice1": ["It was wet.", "It was dull."],
        "choice2": ["It was dry.", "It was fine."],
        "question": ["effect", "cause"],
    }
    copa = benchmarks.find("copa")
    assert inputs_of(copa, rows)[0] == (
        "copa choice1: It was wet. choice2: It was dry. premise: It rained. question: effect"
    )
    first, second = "It rained. What was the effect?", "We left. What was the cause?"
    expected = {
        "sentence": [first, first, second, second],
        "sentence2": ["It was wet.", "It was dry.", "It was dull.", "It was fine."],
        "row": [0, 0, 1, 1],
    }
    assert copa.for_encoder(rows) == expected
    labels = copa.for_encoder({**rows, "label": [1, 0]})["label"]
    assert labels == [0, 1, 1, 0]


def test_inputs_of_record():
    record, passage = benchmarks.find("record"), '"Good," he said. The film was loved. It won'
    assert inputs_of(record, RECORD) == [
        "record query: critics loved @placeholder, and @placeholder won "
        f"entities: the film, Ann passage: {passage}"
    ]
    answered = {**RECORD, "answers": [["Ann", "Ann"]]}
    assert record.for_encoder(answered) == {
        "sentence": [passage, passage],
        "sentence2": [
            "critics loved the film, and the film won",
            "critics loved Ann, and Ann won",
        ],
        "row": [0, 0],
        "label": [0, 1],
    }
    # The question gets an example for each correct name.
    two = {name: values * 2 for name, values in RECORD.items()}
    two["answers"] = [["Ann"], ["the film", "Ann"]]
    columns = record.for_decoder(two)
    assert columns["target"] == ["Ann", "the film", "Ann"]
    assert columns["row"] == [0, 1, 1]
    assert len(set(columns["text"])) == 1
    with pytest.raises(ValueError, match="row 1 of record has no entities to choose from"):
        record.for_encoder({**RECORD, "entities": [[]]})


def test_inputs_of_squad_and_translation():
    rows = {
        "question": ["why"],
        "context": ["so it is"],
        "answers": [{"text": ["so", "so it"], "answer_start": [0, 0]}],
    }
    squad = benchmarks.find("squad")
    assert inputs_of(squad, rows) == ["question: why context: so it is"]
    assert squad.for_decoder(rows)["target"] == ["so"]
    pairs = {"translation": [{"en": "the film", "ro": "filmul"}]}
    for name, source, target in [
        ("wmt16-ro-en", "translate Romanian to English: filmul", "the film"),
        ("wmt16-en-ro", "translate English to Romanian: the film", "filmul"),
    ]:
        translation = benchmarks.find(name)
        assert inputs_of(translation, pairs) == [source]
        assert translation.for_decoder(pairs)["target"] == [target]
    sentences = {"sentence": ["the film"]}
    assert translation.named(sentences) is sentences
    assert inputs_of(translation, sentences) == ["translate English to Romanian: the film"]
    with pytest.raises(ValueError, match="row 1 of wmt16-en-ro has no text in 'en'"):
        translation.for_decoder({"translation": [{"ro": "filmul"}]})


@pytest.mark.parametrize(
    ("span", "index", "marked"),
    [
        ("the city councilmen", 0, "*The city councilmen* refused them"),
        ("them", 4, "The city councilmen refused *them*"),
        ("the citys councilmen", 0, "*The city councilmen* refused them"),  # spelled differently
    ],
)
def test_spans_are_marked_where_their_words_are(span, index, marked):
    wsc = benchmarks.find("wsc")
    rows = {"text": ["The city councilmen refused them"], "span1_text": [span]}
    rows |= {"span1_index": [index], "span2_text": ["refused"], "span2_index": ["3"]}
    assert wsc.for_encoder(rows)["sentence"] == [marked.replace("refused", "#refused#")]
    with pytest.raises(ValueError, match="there is no word 9 in the 5 words of 'The city counc"):
        wsc.for_encoder({**rows, "span2_index": [9]})


def test_questions_of_multirc_are_right_when_all_answers_are():
    rows = {name: values * 4 for name, values in MULTIRC.items()}
    rows |= {"question": ["why?", "why?", "who?", "who?"], "label": [1, 0, 1, 1]}
    multirc = benchmarks.find("multirc")
    assert multirc.scores([1, 0, 1, 0], rows) == {"exact_match": 0.5}
    assert multirc.scores([0, 1, 1, 1], rows) == {"exact_match": 0.5}
    assert multirc.scores([1, 0, 1, -1], rows) == {"exact_match": 0.5}  # a missing label is wrong
    assert multirc.metric == "exact_match_and_f1"
    values = multirc.with_mean({"f1": 0.8, "exact_match": 0.5})
    assert values["exact_match_and_f1"] == pytest.approx(0.65)


def test_prompts_start_from_the_inputs_of_a_benchmark(folder):
    task = tasks.load_task("mnli", data_dir=folder)
    rows = task.splits["train"]
    first = f"hypothesis: {rows['hypothesis'][0]} premise: {rows['premise'][0]}"
    texts = list(prompt_init.training_texts(task))
    assert texts[0] == first
    assert len(texts) == 8


def test_an_adapter_of_an_unknown_benchmark(tiny_backbone):
    _, model = adapted(tiny_backbone)
    settings = {"kind": "classification", "max_length": 8, "benchmark": {"name": "anli"}}
    with pytest.raises(
        ValueError, match="was trained on 'anli', which this version of the package does not have"
    ):
        objectives.from_settings(settings, model, None)


def test_labels_that_are_generated(folder, tiny_t5):
    changes = {"max_target_length": 20, "evaluate_by": "generation"}
    task, made, _ = prepared(tiny_t5, folder, "sst2", **changes)
    encoded = made.encode_all(task.splits)["validation"]
    right = right_outputs(made, encoded)
    scores = made.scores(right, encoded)
    assert (scores["accuracy"], scores["invalid"]) == (1, 0)
    right["ids"][1] = 0  # generated text that is no label
    scores = made.scores(right, encoded)
    assert (scores["accuracy"], scores["invalid"]) == (5 / 6, 1)


def test_columns_that_a_benchmark_cannot_read():
    pair = {"sentence": ["a"], "sentence2": ["b"], "label": [1]}
    named = benchmarks.find("mnli").named(pair)
    assert named == {"premise": ["a"], "hypothesis": ["b"], "label": [1]}
    for name, rows, missing in [
        (
            "mnli",
            {"sentence": ["a"]},
            "rows of mnli need premise, hypothesis, but have no 'premise'",
        ),
        ("wic", pair, "rows of wic need sentence1, sentence2, word, but have no 'sentence1'"),
        ("squad", {"question": ["a"]}, "rows of squad need question, context, but have no 'cont"),
    ]:
        with pytest.raises(ValueError, match=missing):
            benchmarks.find(name).named(rows)
