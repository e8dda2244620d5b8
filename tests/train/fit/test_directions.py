"""Tests `fit`, `evaluate` and `predict` with an adapter for each translation direction."""

import json
import shutil
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file

import compacter_jax as cj
from tests.parallel_data import fit_flags, sentences, write_jsonl, write_model, write_tables
from tests.train.cli.test_cli import refusal
from tests.train.fit.test_surviving import fit_until
from train.__main__ import main
from train.fit.run_record import read_record

DIRECTIONS = ("en-de", "de-en", "en-fr")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return write_tables(tmp_path_factory.mktemp("tables"))


@pytest.fixture(scope="module")
def run(backbone, tables, tmp_path_factory):
    """Returns the folder of a run of three directions."""
    output = tmp_path_factory.mktemp("runs") / "run"
    assert main(["fit", *fit_flags(backbone, tables, output)]) == 0
    return output


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.*"))}


def weights(folder):
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def predicted(adapter, rows, folder):
    source, target = write_jsonl(folder / "in.jsonl", rows), folder / "out.jsonl"
    flags = ["--adapter", adapter, "--input", source, "--output", target]
    assert main(["predict", *map(str, flags)]) == 0
    return [json.loads(line)["prediction"] for line in target.read_text().splitlines()]


def rows_to_translate(directions, count=4):
    return [
        {"source": row[name[:2]], "source_language": name[:2], "target_language": name[3:]}
        for row in sentences(count, seed=5)
        for name in directions
    ]


def test_each_direction_has_a_folder_that_loads_alone(run, backbone):
    """The members differ, and each is an ordinary adapter with its direction in its settings."""
    loaded = cj.load_backbone(backbone)
    found = {}
    for name in DIRECTIONS:
        model, _ = cj.load_adapter(run / name / "adapter", loaded)
        assert model.method == cj.preset("ciat")
        settings = cj.read_adapter_config(run / name / "adapter")
        assert settings["translation"]["directions"] == [name]
        found[name] = weights(run / name / "adapter")
    assert not (run / "adapter").exists()
    first, second, _ = found.values()
    assert first.keys() == second.keys()
    assert all((first[path] != second[path]).any() for path in first)
    assert "fr-en/adapter" not in read_record(run).writes
    assert {f"{name}/adapter" for name in DIRECTIONS} < {*read_record(run).writes}


def test_rows_are_translated_by_the_member_of_their_direction(run, tmp_path):
    """`predict` on the folder gives each row what the member's folder alone gives it."""
    rows = rows_to_translate(DIRECTIONS)
    found = predicted(run, rows, tmp_path)
    for name in DIRECTIONS[:2]:
        own = [i for i, row in enumerate(rows) if row["target_language"] == name[3:]]
        alone = predicted(run / name, [rows[i] for i in own], tmp_path)
        assert [found[i] for i in own] == alone


def test_bleu_and_chrf_of_each_direction(run, tables, tmp_path):
    """The metrics of the folder are those of each member, and the means over directions."""
    results = {}
    for name in (None, "en-fr"):
        output = tmp_path / "metrics.json"
        folder = run if name is None else run / name
        flags = ["--adapter", folder, "--parallel-files", tables["validation"], "--output", output]
        flags += [] if name is None else ["--directions", name]
        assert main(["evaluate", *map(str, flags)]) == 0
        results[name] = json.loads(output.read_text())["metrics"]
    whole, alone = results.values()
    for metric in ("bleu", "chrf"):
        each = [whole[f"{metric}_{name}"] for name in DIRECTIONS]
        assert whole[metric] == pytest.approx(np.mean(each))
        assert whole[f"{metric}_en-fr"] == pytest.approx(alone[metric])


def test_a_direction_is_added_without_touching_the_others(run, backbone, tables, tmp_path, capsys):
    """The files of the others stay byte for byte, and rows of old and new ones are translated."""
    before = {name: contents(run / name) for name in DIRECTIONS}
    old = predicted(run, rows_to_translate(DIRECTIONS), tmp_path)
    flags = {"directions": "fr-de", "add_to": run}
    more = fit_flags(backbone, tables, tmp_path / "more", **flags)
    capsys.readouterr()
    assert main(["fit", *more]) == 0
    told = capsys.readouterr()
    assert f"adapter: {run / 'fr-de' / 'adapter'} (" in told.out + told.err
    try:
        assert {name: contents(run / name) for name in DIRECTIONS} == before
        assert (run / "fr-de" / "adapter" / "adapter_config.json").exists()
        rows = rows_to_translate((*DIRECTIONS, "fr-de"))
        found = predicted(run, rows, tmp_path)
        is_new = [row["source_language"] == "fr" for row in rows]
        assert [text for text, new in zip(found, is_new, strict=True) if not new] == old
        capsys.readouterr()
        again = fit_flags(backbone, tables, tmp_path / "again", **flags)
        assert "has an adapter fr-de already" in refusal(capsys, "fit", *again)
        flags |= {"directions": "de-fr", "method": "serial-ciat"}
        other = fit_flags(backbone, tables, tmp_path / "other", **flags)
        assert "must share their method" in refusal(capsys, "fit", *other)
        flags |= {"method": "ciat", "max_target_length": 9}
        other = fit_flags(backbone, tables, tmp_path / "other", **flags)
        said = "must share their max_target_length: de-en has"
        assert said in refusal(capsys, "fit", *other)
    finally:
        for path in sorted((run / "fr-de").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (run / "fr-de").rmdir()


def test_a_run_goes_on_where_it_was_stopped(run, backbone, tables, tmp_path, monkeypatch):
    """A run of several directions that is stopped and resumed ends with the same adapters."""
    output = tmp_path / "run"
    flags = fit_flags(backbone, tables, output)
    at = flags.index("--output-dir")
    flags = flags[:at] + flags[at + 2 :]
    assert fit_until(monkeypatch, "_dispatch", 5, signal.SIGTERM, flags, output) == 0
    assert not (output / "en-de").exists()
    assert fit_until(monkeypatch, "_dispatch", 10_000, signal.SIGTERM, flags, output) == 0
    for name in DIRECTIONS:
        wanted, found = (weights(folder / name / "adapter") for folder in (run, output))
        for path, leaf in wanted.items():
            np.testing.assert_array_equal(found[path], leaf, err_msg=f"{name}: {path}")


@pytest.mark.slow
def test_an_adapter_for_each_target(backbone, tables, tmp_path):
    """Directions into one language share an adapter, and temperatures draw small ones oftener."""
    output = tmp_path / "run"
    settings = {"adapters": "per_target", "directions": "all", "temperature": 5}
    assert main(["fit", *fit_flags(backbone, tables, output, **settings)]) == 0
    config = cj.read_adapter_config(output / "de" / "adapter")
    assert config["translation"]["directions"] == ["en-de", "fr-de"]
    rows = rows_to_translate(("en-de", "fr-de", "en-fr"), count=2)
    assert len(predicted(output, rows, tmp_path)) == len(rows)


@pytest.mark.slow
def test_the_first_stage_writes_a_backbone(backbone, tables, tmp_path):
    """Full fine-tuning on all directions leaves a folder that the second stage starts from."""
    output = tmp_path / "first"
    settings = {"method": "full", "adapters": "shared", "directions": "all"}
    only = {"train": tables["train"]}  # a part of which is held out
    assert main(["fit", *fit_flags(backbone, only, output, **settings)]) == 0
    made = cj.load_backbone(output / "backbone")
    assert made.module.config.model_type == "m2m_100"
    rows = rows_to_translate(("en-de", "fr-en"), count=2)
    assert len(predicted(output, rows, tmp_path)) == len(rows)


def test_members_that_write_at_different_lengths(run, tmp_path, capsys):
    """They are not loaded together, since one would silently write like the other."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    path = copy / "en-fr" / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text())
    source = write_jsonl(tmp_path / "in.jsonl", rows_to_translate(DIRECTIONS))
    flags = ["predict", "--adapter", copy, "--input", source, "--output", tmp_path / "out.jsonl"]
    for key, value in (("max_target_length", 7), ("num_beams", 3)):
        changed = {**settings, "translation": {**settings["translation"], key: value}}
        path.write_text(json.dumps(changed))
        said = refusal(capsys, *flags)
        assert f"must share their {key}" in said
        assert "en-fr" in said
    assert main(list(map(str, [*flags, "--num-beams", 2]))) == 0


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"directions": "en-es"}, "there is no column or language 'es' for 'en-es'"),
        ({"directions": "en"}, "'en' is no direction; write SOURCE-TARGET"),
        ({"directions": "en-de,en-de"}, "--directions has 'en-de' twice"),
        ({"directions": "en-en"}, "'en-en' has the same language twice"),
        ({"temperature": 0.5}, "temperature=0.5 must be at least 1"),
        ({"method": "full"}, "method 'full' cannot be a member of 'bank'"),
        ({"adapters": "shared", "add_to": "x"}, "--add-to needs --adapters per_direction"),
        ({"add_to": "nothing"}, "--add-to nothing has no folders of adapters"),
        ({"train_file": "x.jsonl"}, "--parallel-files and --train-file contradict each other"),
        ({"reduction_factor": 17}, "reduction_factor=17 leaves no bottleneck at a width of 16"),
        ({"train_size": 1}, " is left; give a larger --train-size"),
        ({"train_size": 1, "adapters": "shared"}, " is left; give a larger --train-size"),
        ({"task": "movie,product"}, "files are those of one task"),
        (
            {"method": "parallel", "sites": "encoder_embedding"},
            "parallel=True at site 'encoder_embedding': embeddings are no sub-layer",
        ),
    ],
)
def test_flags_that_cannot_be(flags, message, backbone, tables, tmp_path, capsys):
    """Each is refused in one line, before anything is written."""
    flags = fit_flags(backbone, tables, tmp_path / "run", **flags)
    assert message in refusal(capsys, "fit", *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rows", "directions", "message"),
    [
        ([{"en": "ba", "de": "sch"}, {"en": " ", "de": "sch"}], "en-de", "row 2: en is empty"),
        ([{"en": "ba", "de": ""}, {"en": "ba", "de": "sch"}], "en-de", "row 1: de is empty"),
        ([{"en": "ba", "de": 3}, {"en": "ba", "de": "sch"}], "en-de", "row 1: de is int, not text"),
        (
            [{"en": "ba", "de": "sch", "fr": None}, {"en": None, "de": "sch", "fr": "que"}],
            "en-de,en-fr",
            "no row has both 'en' and 'fr'",
        ),
        (
            [{"en": "ba", "xx": "sch"}, {"en": "ba", "xx": "sch"}],
            "en-xx",
            "no token for the language 'xx': neither <xx> nor __xx__ nor <lang:xx>",
        ),
    ],
)
def test_tables_that_cannot_be(rows, directions, message, backbone, tmp_path, capsys):
    """A row without text, a direction without a row and a language without a token are named."""
    table = {"train": write_jsonl(tmp_path / "train.jsonl", rows)}
    flags = fit_flags(backbone, table, tmp_path / "run", directions=directions)
    assert message in refusal(capsys, "fit", *flags)
    assert not (tmp_path / "run").exists()


PAIR = {"source": "ba", "target": "sch", "source_language": "en", "target_language": "de"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": ""}, "row 2: source is empty; remove or fill the row"),
        ({"target": None}, "row 2: target is missing (null); remove or fill the row"),
        ({"target_language": " "}, "row 2: target_language is empty"),
        ({"target_language": "de,fr"}, "row 2: target_language is 'de,fr'; the name of one"),
    ],
)
def test_pairs_that_cannot_be(change, message, backbone, tmp_path, capsys):
    """A row of a file of pairs without a source, a target or a language is named by its number."""
    file = write_jsonl(tmp_path / "train.jsonl", [PAIR, {**PAIR, **change}])
    flags = fit_flags(backbone, {}, tmp_path / "run", directions=None, train_file=file)
    flags = [*flags[1:], "--validation-file", str(file)]
    assert message in refusal(capsys, "fit", *flags)


def test_a_direction_that_the_folder_lacks(run, tables, tmp_path, capsys):
    """`predict` names the row, before it translates any; `evaluate` names the direction."""
    rows = [*rows_to_translate(("en-de",), count=1) * 1100, *rows_to_translate(("fr-en",), 1)]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    flags = ["--adapter", run, "--input", source, "--output", tmp_path / "out.jsonl"]
    assert refusal(capsys, "predict", *map(str, flags)) == (
        f"error: {source}, row 1101: there is no adapter for 'fr-en'; there are those of de-en, "
        "en-de, en-fr"
    )
    flags = ["--adapter", run, "--parallel-files", tables["validation"], "--directions", "fr-en"]
    assert "there is no adapter for 'fr-en'" in refusal(capsys, "evaluate", *flags)
    flags = ["--adapter", run, "--parallel-files", tables["validation"], "--directions", "en-es"]
    assert "there is no column or language 'es'" in refusal(capsys, "evaluate", *flags)


def test_rows_that_are_left_out_are_named(run, tmp_path, capsys):
    """`evaluate` says which directions of a file of pairs it has no adapters for."""
    file = write_jsonl(tmp_path / "pairs.jsonl", [PAIR, {**PAIR, "target_language": "fr"}])
    flags = ["--adapter", run / "en-de", "--test-file", file, "--output", tmp_path / "m.json"]
    assert main(["evaluate", *map(str, flags)]) == 0
    assert f"{file}: rows of the directions en-fr are left out" in capsys.readouterr().out
    assert main(["evaluate", *map(str, [*flags, "--directions", "en-de"])]) == 0
    assert "left out" not in capsys.readouterr().out


def test_flags_of_translation_alone(tiny_backbone, tmp_path, capsys):
    """Flags of directions are refused for other tasks."""
    flags = ["--backbone", tiny_backbone, "--task", "movie", "--output-dir", tmp_path / "run"]
    told = refusal(capsys, "fit", *flags, "--adapters", "per_direction")
    assert "--adapters per_direction is for translation between several languages" in told
    assert "--directions is for translation" in refusal(
        capsys, "fit", *flags, "--directions", "en-de"
    )
