"""Tests `evaluate` and `predict` with a mix of language adapters below a task's adapter."""

import csv
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compacter_jax as cj
from tests.helpers import quick_key
from tests.train.cli.test_cli import fit_flags, refusal, write_splits
from tests.train.inference.test_tagging_commands import (
    LONG,
    NAMES,
    SEVEN,
    rows_of,
    sentences,
    write,
)
from train import figures
from train.__main__ import main
from train.cli import compositions
from train.inference import adapter as inference_adapter
from train.inference import mix_files, mixing
from train.inference.options import PredictOptions

LANGUAGES = ("nb", "da", "is")
EQUAL = (1 / 3, 1 / 3, 1 / 3)
IN, OUT = Path("in.jsonl"), Path("out.jsonl")


def save(folders, backbone, method, metadata=None, **head):
    """Saves adapters moved far from their initial values, by default with a language model's head.

    Args:
      folders: the folders, one for each adapter.
      backbone: the folder of the backbone.
      method: the method of all.
      metadata: what their files say beside the method.
      **head: the head of the backbone.
    """
    loaded = cj.load_backbone(backbone, **(head or {"head": "masked_lm"}))
    model = cj.Adapted(loaded.module, method)
    params = cj.init_adapters(model, loaded, quick_key(0))
    trained, frozen = cj.partition(params, cj.label_params(params, method))
    for seed, folder in enumerate(folders):
        noise = np.random.default_rng(seed)
        moved = jax.tree.map(
            lambda x, noise=noise: x + 0.3 * noise.standard_normal(x.shape, np.float32), trained
        )
        cj.save_adapter(folder, model, cj.merge(moved, frozen), metadata=metadata)


def save_classifiers(folders, backbone, kind, label_names):
    """Saves random classifiers of sentences, with what `predict` needs."""
    metadata = {"backbone": str(backbone), "task": "custom", "kind": kind}
    metadata |= {"label_names": label_names, "max_length": 16, "dtype": "float32"}
    head = {"head": "sequence_classification", "num_labels": len(label_names) or 1}
    method = cj.preset("compacter++", reduction_factor=2)
    save(folders, backbone, method, metadata, **head)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    return {
        "train": write(folder / "train.jsonl", sentences(40, 0)),
        "validation": write(folder / "validation.jsonl", sentences(10, 1)),
        "test": write(folder / "test.jsonl", [*sentences(9, 2), LONG]),
    }


@pytest.fixture(scope="module")
def saved(tiny_backbone, files, tmp_path_factory):
    """Saves three languages, one of another width, and a tagger on top of the first."""
    folder = tmp_path_factory.mktemp("stack")
    method = cj.preset("mad-x")
    wide = method.replace(parts=[part.replace(reduction_factor=1) for part in method.parts])
    save([folder / name for name in LANGUAGES], tiny_backbone, method)
    save([folder / "wide"], tiny_backbone, wide)
    method = f"stack(language={folder}/nb,task=compacter++)"
    flags = fit_flags(tiny_backbone, files, folder / "tags", epochs=2, method=method)
    assert main(["fit", *flags]) == 0
    return folder


def stack(saved, mixture=None):
    mixture = mixture or "mix(" + ",".join(f"{name}={saved}/{name}" for name in LANGUAGES) + ")"
    return f"stack(language={mixture},task={saved}/tags#task)"


def command(name, *flags):
    assert main([name, *map(str, flags)]) == 0


def refused(capsys, *arguments):
    """Returns the last line of a command that fails with exit code 2, behind its progress bar."""
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def evaluated(saved, files, output, *flags, mixture=None):
    given = ["--adapter", stack(saved, mixture), "--test-file", files["test"], "--output", output]
    command("evaluate", *given, *flags)
    return json.loads(output.read_text())


def test_a_mix_is_a_bank_with_names(saved):
    """An expression with a mix denotes a stack with a bank, whose places are numbers."""
    expression = compositions.parse(stack(saved), "--adapter")
    assert list(expression.leaves()) == [*(f"language/{name}" for name in LANGUAGES), "task"]
    assert list(expression.places().values()) == ["language/0", "language/1", "language/2", "task"]
    (node,) = expression.mixes()
    assert node.names == LANGUAGES


def test_given_weights_are_those_of_an_average_and_of_a_single_adapter(saved, files, tmp_path):
    """One-hot weights give the single adapter, and equal weights the average, to 1e-6."""
    output = tmp_path / "metrics.json"
    alone = ["--adapter", saved / "tags", "--test-file", files["test"], "--output", output]
    command("evaluate", *alone)
    single = json.loads(output.read_text())
    one_hot = evaluated(saved, files, output, "--mix", "1,0,0")
    average = "average(" + ",".join(f"{saved}/{name}" for name in LANGUAGES) + ")"
    averaged = evaluated(saved, files, output, mixture=average)
    equal = evaluated(saved, files, output, "--mix", "equal")
    for ours, theirs in ((one_hot, single), (equal, averaged)):
        assert ours["metrics"] == pytest.approx(theirs["metrics"], abs=1e-6)
    assert abs(single["metrics"]["loss"] - averaged["metrics"]["loss"]) > 1e-3
    assert equal["mix"] == "equal"


def test_evaluate_finds_weights_for_each_sentence(saved, files, tmp_path):
    """No steps are equal weights; ten steps lower the entropy, and all weights are written."""
    output, table = tmp_path / "metrics.json", tmp_path / "weights.csv"
    equal = evaluated(saved, files, output, "--mix", "equal")
    none = evaluated(saved, files, output, "--mix", "entropy", "--mix-steps", 0)
    assert none["metrics"] == pytest.approx(equal["metrics"], abs=1e-6)
    flags = ("--mix", "entropy", "--write-weights", table)
    found = evaluated(saved, files, output, *flags)
    assert found["entropy_after"] < found["entropy_before"]
    assert found["entropy_before"] == pytest.approx(none["entropy_before"], abs=1e-6)
    sites = list(found["mean_weights"])
    # The head is a site of the task alone.
    assert sites == ["embeddings", "encoder/layer/0/output", "encoder/layer/1/output"]
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 * len(sites)
    assert [row["site"] for row in rows[:3]] == sites
    assert [int(row["row"]) for row in rows[::3]] == list(range(1, 11))
    weights = np.array([[float(row[f"weight_{name}"]) for name in LANGUAGES] for row in rows])
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
    assert np.abs(weights - 1 / 3).max() > 0.05
    for at, site in enumerate(sites):
        mean = dict(zip(LANGUAGES, weights[at::3].mean(0), strict=True))
        assert found["mean_weights"][site] == pytest.approx(mean, abs=1e-5)
    after = np.mean([float(row["entropy_after"]) for row in rows])
    assert found["entropy_after"] == pytest.approx(after, abs=1e-5)
    assert table.with_suffix(".png").stat().st_size > 5_000


def test_several_files_share_a_file_of_weights(saved, files, tmp_path):
    """The column `file` says which file a row is of, and one site has the weights of all."""
    output, table = tmp_path / "metrics.json", tmp_path / "weights.jsonl"
    given = f"test={files['test']},new={files['validation']}"
    flags = ["--adapter", stack(saved), "--test-files", given, "--output", output]
    flags += ["--mix", "entropy", "--mix-sites", "one", "--write-weights", table]
    command("evaluate", *flags)
    found = json.loads(output.read_text())["files"]
    rows = rows_of(table)
    assert [(row["file"], row["row"]) for row in rows] == [
        *(("test", number) for number in range(1, 11)),
        *(("new", number) for number in range(1, 11)),
    ]
    assert {row["site"] for row in rows} == {mixing.ALL_SITES}
    assert list(found["new"]["mean_weights"]) == [mixing.ALL_SITES]


def test_predicted_tags_line_up_with_words(saved, files, tmp_path, capsys):
    """Words of one and of seven tokens, dropped ones and those beyond the limit keep their tags."""
    source, output = tmp_path / "new.conll", tmp_path / "new.jsonl"
    source.write_text("\n\n".join("\n".join(words) for words in (["film"], LONG, ["\u200b"])))
    table = tmp_path / "weights.parquet"
    flags = ["--adapter", stack(saved), "--input", source, "--output", output, "--mix", "entropy"]
    command("predict", *flags, "--write-weights", table)
    first, long, dropped = rows_of(output)
    assert first["prediction"][0] in NAMES
    assert long["tokens"] == LONG
    assert [tag in NAMES for tag in long["prediction"]] == [False, *[True] * 8, *[False] * 8]
    assert dropped["prediction"] == [None]
    assert "after 10 steps" in capsys.readouterr().out
    # A sentence without a word that counts has equal weights.
    import pyarrow.parquet as pq

    rows = [row for row in pq.read_table(table).to_pylist() if row["row"] == 3]
    assert {round(row["weight_nb"], 6) for row in rows} == {round(1 / 3, 6)}


@pytest.fixture(scope="module")
def mixer(saved, tiny_backbone):
    """Returns what finds the weights of rows, with a learning rate that makes them differ."""
    options = PredictOptions(
        adapter=Path(stack(saved)), input=IN, output=OUT, mix="entropy", mix_steps=3
    )
    return inference_adapter.load(options).mixer


def encoded(mixer, rows):
    return mixer.objective.encode({"tokens": rows})


def test_rows_do_not_see_each_other(mixer):
    """A batch finds, for each sentence, the weights that it finds alone, to 1e-5."""
    rows = sentences(6, 5, longest=7)
    together = mixer.compute(encoded(mixer, rows), 6).found
    for at, row in enumerate(rows):
        alone = mixer.compute(encoded(mixer, [row]), 6).found
        np.testing.assert_allclose(alone.weights[0], together.weights[at], atol=1e-5)
        np.testing.assert_allclose(alone.entropies[0], together.entropies[at], atol=1e-5)
    changed = [*rows[:3], ["bad"] * 6, *rows[4:]]
    others = mixer.compute(encoded(mixer, changed), 6).found
    same = [0, 1, 2, 4, 5]
    np.testing.assert_array_equal(others.weights[same], together.weights[same])
    assert np.abs(others.weights[3] - together.weights[3]).max() > 1e-3


def test_the_entropy_is_that_of_first_tokens(mixer):
    """The entropy before the first step is the mean over the words' first tokens, in float64."""
    rows = [[SEVEN, "good", "\u200b"], ["the"]]
    found = mixer.compute(encoded(mixer, rows), 2).found
    examples = encoded(mixer, rows)
    places = [[1, 8], [1]]
    for row, counted in enumerate(places):
        ids = examples.input_ids[slice(*examples.offsets[row : row + 2])]
        batch = {"input_ids": ids[None], "attention_mask": np.ones_like(ids)[None]}
        batch |= {"token_type_ids": np.zeros_like(ids)[None], "mix": jnp.float32(EQUAL)}
        logits = np.float64(mixer.labels.compute(mixer.params, batch)[0, counted])
        shifted = logits - logits.max(-1, keepdims=True)
        chances = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
        expected = -(chances * np.log(chances)).sum(-1).mean()
        assert found.entropies[row, 0] == pytest.approx(expected, abs=1e-5)


def test_all_positions_count_on_request(mixer):
    """`--mix-positions all` counts special tokens and padding as well."""
    options = PredictOptions(
        adapter=IN, input=IN, output=OUT, mix="entropy", mix_steps=3, mix_positions="all"
    )
    other = dataclasses.replace(mixer, options=options)
    rows = [["good", "film"]]
    words = mixer.compute(encoded(mixer, rows), 6).found
    everything = other.compute(encoded(mixer, rows), 6).found
    assert np.abs(words.entropies[0, 0] - everything.entropies[0, 0]) > 1e-4


def test_labels_of_rows_have_entropies_of_their_own(tiny_backbone, tmp_path):
    """A mix of whole classifiers predicts labels with weights that each row finds."""
    folders = [tmp_path / "a", tmp_path / "b"]
    save_classifiers(folders, tiny_backbone, "classification", ["bad", "good"])
    mixture = f"mix(a={tmp_path}/a,b={tmp_path}/b)"
    (source,) = write_splits(tmp_path, {"test": 8}).values()
    output = tmp_path / "out.jsonl"
    flags = ["--adapter", mixture, "--input", source, "--output", output]
    command("predict", *flags, "--mix", "1,0")
    one_hot = [row["prediction"] for row in rows_of(output)]
    command("predict", *flags[2:], "--adapter", tmp_path / "a")
    assert [row["prediction"] for row in rows_of(output)] == one_hot
    table = tmp_path / "weights.jsonl"
    command("predict", *flags, "--mix", "entropy", "--write-weights", table)
    assert all(0.5 <= row["probability"] <= 1 for row in rows_of(output))
    rows = rows_of(table)
    # The members have norms and heads of their own, which are mixed, too.
    assert {"classifier", "encoder/layer/0/output/dense"} < {row["site"] for row in rows}
    assert all(row["entropy_after"] <= row["entropy_before"] + 1e-6 for row in rows)


def test_bad_input_gives_one_line(saved, files, tmp_path, capsys, tiny_backbone):
    """Each message names the flag or the member, and the fix."""
    test = ("--test-file", files["test"], "--output", tmp_path / "metrics.json")

    def line(*flags, mixture=None):
        return refusal(capsys, "evaluate", "--adapter", stack(saved, mixture), *test, *flags)

    assert "--adapter has a mix of nb, da, is; give its weights by --mix" in line()
    assert "--mix 1,0 has 2 weights, but the mix has 3 members, nb, da, is" in line("--mix", "1,0")
    for given in ("most", "1,x,0", "nan,1,0", "1e39,1,0", "inf,0,0"):
        assert f"--mix '{given}' must be equal, entropy, or a number" in line("--mix", given)
    for steps in (-1, 10**10):
        told = line("--mix", "entropy", "--mix-steps", steps)
        assert f"mix_steps={steps} must be from 0 to 1,000,000" in told
    for rate in (0.0, float("nan"), 1e39):
        told = line("--mix", "entropy", "--mix-learning-rate", rate)
        assert f"mix_learning_rate={rate} must be above 0 and at most 1e+30" in told
    useless = line("--mix", "equal", "--mix-steps", "3")
    assert "--mix-steps is for --mix entropy, but --mix is equal; leave it out" in useless
    unequal = line("--mix", "equal", mixture=f"mix(nb={saved}/nb,wide={saved}/wide)")
    assert "the members of a mix must have one shape, but wide differs from nb" in unequal
    kinds = line("--mix", "equal", mixture=f"mix(nb={saved}/nb,task={saved}/tags#task)")
    assert "task differs from nb; kind: 'phm_bottleneck', not 'combined'" in kinds
    weighted = line("--mix", "equal", mixture=f"mix(0.5*{saved}/nb,0.5*{saved}/da)")
    assert "give the weights of a mix to --mix" in weighted
    nested = line("--mix", "equal", mixture=f"mix(stack({saved}/nb),{saved}/da)")
    assert "the members of mix are folders of adapters, not compositions" in nested
    several = line("--mix", "equal", mixture=f"mix(a={saved}/tags,b={saved}/tags)")
    assert "the members of a mix are single adapters, but a is a composition of lang" in several
    named = line("--mix", "equal", mixture=f"mix(a={saved}/nb,a={saved}/da)")
    assert "the members of mix need different names" in named
    two = line("--mix", "equal", mixture=f"stack(mix({saved}/nb),mix({saved}/da))")
    assert "--adapter has 2 mixes, but --mix gives the weights of one" in two
    other = line(mixture=f"{saved}/tags#head")
    assert "tags has no member 'head'; it has language, task" in other.replace("/adapter", "")
    none = line(mixture=f"{saved}/nb#task")
    assert "has no member 'task'; it is a single adapter" in none
    alone = refusal(capsys, "evaluate", "--adapter", saved / "tags", *test, "--mix", "equal")
    assert "--mix equal needs a mix(…) in --adapter" in alone
    weights = line("--mix", "entropy", "--write-weights", tmp_path / "weights.txt")
    assert "weights.txt" in weights
    same = ("--output", tmp_path / "out.jsonl", "--write-weights", tmp_path / "out.jsonl")
    flags = ("--adapter", stack(saved), "--input", files["test"], *same, "--mix", "entropy")
    assert "--output and --write-weights are both" in refusal(capsys, "predict", *flags)
    method = ("--method", f"mix({saved}/nb,{saved}/da)", "--output-dir", tmp_path / "run")
    fit = fit_flags(tiny_backbone, files, tmp_path / "run")
    assert "'mix' is not one of stack" in refusal(capsys, "fit", *fit, *method[:2])


def test_no_file_of_rows_is_overwritten(saved, files, tmp_path, capsys):
    """Files to write are apart from those that are read, and no folders, before adapters load."""
    source = write(tmp_path / "rows.jsonl", sentences(2, 4))
    before = source.read_bytes()
    mixed = ("--adapter", stack(saved), "--mix", "entropy")
    weights = ("--write-weights", source)
    new = ("--input", source, "--output", tmp_path / "out.jsonl")
    assert "--write-weights: " in refusal(capsys, "predict", *mixed, *new, *weights)
    several = ("--test-files", f"a={files['test']},b={source}")
    metrics = ("--output", tmp_path / "metrics.json")
    line = refusal(capsys, "evaluate", *mixed, *several, *metrics, *weights)
    assert line.endswith("rows.jsonl is an input file; use another name")
    for given in (("--test-file", source), several):
        line = refusal(capsys, "evaluate", *mixed, *given, "--output", source)
        assert line.endswith("rows.jsonl is an input file; use another name")
    assert source.read_bytes() == before
    (tmp_path / "drawn.png").mkdir()
    drawn = ("--write-weights", tmp_path / "drawn.csv")
    line = refusal(capsys, "predict", *mixed, *new, *drawn)
    assert "the figure of --write-weights: " in line
    assert line.endswith("drawn.png is a directory, not a file")
    (tmp_path / "metrics.md").mkdir()
    line = refusal(capsys, "evaluate", *mixed, *several, *metrics)
    assert "the report of --output: " in line


def test_all_test_files_are_looked_for_first(saved, files, tmp_path, capsys):
    """A file that is missing is told before the first one is evaluated."""
    given = f"test={files['test']},none={tmp_path}/none.conll"
    flags = ("--adapter", saved / "tags", "--test-files", given)
    assert "none.conll does not exist" in refusal(capsys, "evaluate", *flags)


def test_the_legend_of_weights_has_the_names_as_they_are(tmp_path, monkeypatch):
    """Names with an underscore in front or with dollar signs are drawn like others."""
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    names = ("_nb", "$\\da$", "is")
    mix_files.draw(np.full((2, 3), 1 / 3), names, ("a", "b"), tmp_path / "weights.png")
    (figure,) = drawn
    figure.draw_without_rendering()
    assert tuple(text.get_text() for text in figure.legends[0].get_texts()) == names


def test_scores_have_no_entropy(tiny_backbone, tmp_path, capsys):
    """`--mix entropy` is refused for a regression, whose output has no probabilities."""
    save_classifiers([tmp_path / "scores"], tiny_backbone, "regression", [])
    (source,) = write_splits(tmp_path, {"test": 4}).values()
    given = ("--adapter", f"mix({tmp_path}/scores,{tmp_path}/scores)", "--mix", "entropy")
    line = refused(capsys, "predict", *given, "--input", source, "--output", tmp_path / "out.jsonl")
    assert "--mix entropy needs probabilities of labels" in line
    assert "kind regression" in line
    assert not (tmp_path / "out.jsonl").exists()
