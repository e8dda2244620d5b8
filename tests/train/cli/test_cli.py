"""Runs the command line end to end: fit, evaluate, predict, params, interruption and bad input."""

import contextlib
import csv
import io
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import tyro
from conftest import QUICK, WORDS, write_backbone

import compacter_jax as cj
from compacter_jax import presets
from tests.helpers import weights_of
from train.__main__ import main
from train.compute import compilation_cache
from train.fit import job
from train.fit.options import FitOptions
from train.inference import adapter as inference_adapter

ROOT = Path(__file__).parents[3]
GOOD, BAD = WORDS[10:14], WORDS[14:18]


def write_examples(path, rows, *, seed, score=False):
    """Writes sentences whose label says whether their words are positive."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, rows)
    columns = {
        "sentence": [
            " ".join(generator.choice(GOOD if label else BAD, generator.integers(2, 30)))
            for label in labels
        ],
        "label": labels,
    }
    if score:
        columns["score"] = columns.pop("label") * 2.0 - 1.0
    pq.write_table(pa.table(columns), path)
    return path


def write_splits(folder, sizes, *, score=False):
    """Returns split -> a file with the given number of examples, different for each split."""
    return {
        split: write_examples(folder / f"{split}.parquet", rows, seed=seed, score=score)
        for seed, (split, rows) in enumerate(sizes.items())
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_splits(
        tmp_path_factory.mktemp("files"), {"train": 120, "validation": 44, "test": 43}
    )


def fit_flags(folder, files, output, **flags):
    """Returns flags for inputs of one length, since these tests spend most time on compilation."""
    flags = {
        "output-dir": output,
        **{f"{split}-file": path for split, path in files.items()},
        "reduction-factor": 2,
        "max-length": 16,
        "batch-size": 8,
        "eval-batch-size": 16,
        "epochs": 2,
        "learning-rate": 3e-2,
        "backbone": folder,
        **flags,
    }
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def adapter_bytes(output):
    return {path.name: path.read_bytes() for path in (output / "adapter").iterdir()}


def refusal(capsys, *arguments):
    """Returns the one-line message of a command that must fail with exit code 2."""
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


# Inputs of several lengths; the longest are cut at a length that is no bucket boundary.
FITTED = {"epochs": 4, "max-length": 20}


@pytest.fixture(scope="module")
def run(tiny_backbone, files, tmp_path_factory):
    """Returns the folder and the output of a finished run on the four devices of the tests."""
    output, said = tmp_path_factory.mktemp("runs") / "run", (io.StringIO(), io.StringIO())
    compilation_cache.announce_compilation.cache_clear()  # as in a new process
    with contextlib.redirect_stdout(said[0]), contextlib.redirect_stderr(said[1]):
        assert main(["fit", *fit_flags(tiny_backbone, files, output, **FITTED)]) == 0
    return output, *(stream.getvalue() for stream in said)


@pytest.fixture(scope="module")
def fitted(run):
    """Returns the folder of the finished run."""
    return run[0]


def test_other_numbers_of_the_optimizer_compile_nothing(fitted, tiny_backbone, files, tmp_path):
    found = Counter()
    jax.monitoring.register_event_listener(lambda event, **_: found.update([event]))
    other = {"learning-rate": 1e-2, "warmup-fraction": 0.5, "clip-norm": 0.3, "max-steps": 37}
    flags = fit_flags(tiny_backbone, files, tmp_path / "run", **{**FITTED, **other})
    assert main(["fit", *flags]) == 0
    assert found["/jax/compilation_cache/cache_hits"] > 0
    assert found["/jax/compilation_cache/cache_misses"] == 0


@pytest.mark.contract
def test_fit_learns_and_writes_everything(fitted):
    result = json.loads((fitted / "metrics.json").read_text())
    assert result["test"]["accuracy"] >= 0.9
    assert result["best_epoch"] in range(1, 5)
    best = result["history"][result["best_epoch"] - 1]
    assert best["accuracy"] == max(record["accuracy"] for record in result["history"])
    assert result["validation"]["accuracy"] == best["accuracy"]
    for record in result["history"]:  # with so few steps, no average is taken
        assert np.mean(record["step_losses"]) == pytest.approx(record["train_loss"])
    # Bottleneck 12, n = 4: two layers of (24 + 12) + 12 + (12 + 24) + 24, and a rule of 64.
    assert result["trained_groups"]["adapters"] == 2 * (24 + 12 + 12 + 12 + 24 + 24)
    assert result["trained_groups"]["rule"] == 64
    size = sum(path.stat().st_size for path in (fitted / "adapter").iterdir())
    assert result["adapter_bytes"] == size
    assert (fitted / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert set(result["measured"]) == {"step_seconds", "seconds", "peak_memory_bytes"}
    assert 0 < result["measured"]["step_seconds"] < result["measured"]["seconds"]
    report = (fitted / "report.md").read_text()
    assert f"{result['test']['accuracy']:.4f}" in report
    assert not list(fitted.rglob("*.tmp"))
    settings = json.loads((fitted / "adapter" / "adapter_config.json").read_text())
    assert settings["label_names"] == ["0", "1"]
    assert settings["max_length"] == 20


@pytest.mark.contract
def test_evaluate_gives_the_metrics_of_fit(fitted, files, capsys, tmp_path):
    output = tmp_path / "metrics.json"
    flags = ["--adapter", fitted / "adapter", "--test-file", files["test"], "--output", output]
    assert main(["evaluate", *map(str, flags)]) == 0
    printed = capsys.readouterr()
    assert "test accuracy: " in printed.out
    assert printed.err == ""  # no message about a new head, since the adapter brings one
    written = json.loads(output.read_text())
    values, expected = written["metrics"], json.loads((fitted / "metrics.json").read_text())["test"]
    # One device here and four there, so the logits of a row may differ by rounding.
    assert values.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-6)
    assert values == expected
    assert written["examples"] == 43


def test_a_backbone_without_a_pooler_knows_its_adapter_again(
    tiny_backbone, files, tmp_path, capsys
):
    folder = shutil.copytree(tiny_backbone, tmp_path / "without")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    assert len(kept) == len(tensors) - 2
    safetensors.numpy.save_file(kept, folder / "model.safetensors")
    output = tmp_path / "run"
    # The seed differs from the one used when the adapter is loaded: the pooler is neither trained
    # nor saved.
    assert main(["fit", *fit_flags(folder, files, output, seed=3, **{"max-steps": 2})]) == 0
    assert "pooler/dense/kernel: drawn at random, and not trained" in capsys.readouterr().out
    expected = json.loads((output / "metrics.json").read_text())["test"]
    flags = ["--adapter", output, "--test-file", files["test"], "--output", tmp_path / "m.json"]
    assert main(["evaluate", *map(str, flags)]) == 0
    assert json.loads((tmp_path / "m.json").read_text())["metrics"]["loss"] == pytest.approx(
        expected["loss"], rel=1e-6
    )


@pytest.mark.slow
def test_a_backbone_of_int8_over_a_mesh(tiny_backbone, files, tmp_path):
    """Trains on four devices, each with a part of the weights, and evaluates on one."""
    flags = {"mesh": "data=2,model=2", "backbone-dtype": "int8", "remat": "dots"}
    run = tmp_path / "run"
    assert main(["fit", *fit_flags(tiny_backbone, files, run, **flags)]) == 0

    def loss(*more):
        output = tmp_path / "metrics.json"
        given = ["--adapter", run / "adapter", "--test-file", files["test"], "--output", output]
        assert main(["evaluate", *map(str, given), *more]) == 0
        return json.loads(output.read_text())["metrics"]["loss"]

    result = json.loads((run / "metrics.json").read_text())
    assert result["test"]["accuracy"] > 0.8
    assert loss() == pytest.approx(result["test"]["loss"], rel=1e-5)
    exact = loss("--backbone-dtype", "float32")
    assert exact == pytest.approx(result["test"]["loss"], rel=0.1)
    assert exact != pytest.approx(result["test"]["loss"], rel=1e-5)


FIT_AND_KEEP_LOGITS = """
import sys
import numpy as np
import tyro
from train.fit import job, run_folder, stopping, trainer
from train.fit.options import FitOptions
path, *flags = sys.argv[1:]
work = job.prepare(tyro.cli(FitOptions, args=flags))
run_folder.open_run(work.options)
with trainer.Trainer(work, stopping.Stopping()) as running:
    running.run()
    np.save(path, running.outputs(0, "test"))
"""


@pytest.mark.slow
def test_predict_in_a_new_process_gives_the_logits_of_the_run(tiny_backbone, files, tmp_path):
    flags = fit_flags(tiny_backbone, files, tmp_path / "run", epochs=1)
    one_device = {"XLA_FLAGS": QUICK, "PYTHONPATH": str(ROOT)}
    environment = {**os.environ, **one_device}
    command = [sys.executable, "-c", FIT_AND_KEEP_LOGITS, tmp_path / "logits.npy", *flags]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    command = [sys.executable, "-m", "train", "predict", "--logits"]
    command += ["--adapter", tmp_path / "run" / "adapter", "--eval-batch-size", "16"]
    command += ["--input", files["test"], "--output", tmp_path / "out.parquet"]
    subprocess.run(command, env=environment, check=True, capture_output=True, cwd=ROOT)
    table = pq.read_table(tmp_path / "out.parquet")
    logits = np.array(table["logits"].to_pylist(), np.float32)
    np.testing.assert_array_equal(logits, np.load(tmp_path / "logits.npy"))
    assert table["sentence"].to_pylist() == pq.read_table(files["test"])["sentence"].to_pylist()
    np.testing.assert_array_equal(table["label_id"], logits.argmax(-1))
    exponentials = np.exp(logits.astype(np.float64))
    np.testing.assert_allclose(
        table["probability"], exponentials.max(-1) / exponentials.sum(-1), rtol=1e-12
    )


@pytest.mark.contract
def test_predict_keeps_the_columns_of_a_csv(fitted, tmp_path):
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    good, bad = ", ".join([" ".join(GOOD)] * 2), " ".join(BAD * 2)
    source.write_text(f'id,sentence,note\n007,"{good}",NA\n8,{bad},\n')
    flags = ["--adapter", fitted / "adapter", "--input", source, "--output", target]
    assert main(["predict", *map(str, flags)]) == 0
    with target.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prediction"] for row in rows] == ["1", "0"]
    assert [(row["id"], row["note"]) for row in rows] == [("007", "NA"), ("8", "")]
    assert rows[0]["sentence"] == good
    assert all(0.5 <= float(row["probability"]) <= 1 for row in rows)


@pytest.mark.slow
def test_regression(tiny_backbone, tmp_path):
    paths = write_splits(tmp_path, {"train": 120, "validation": 40}, score=True)
    flags = fit_flags(tiny_backbone, paths, tmp_path / "run", epochs=4)
    assert main(["fit", *flags, "--regression"]) == 0
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert result["validation"]["pearson"] > 0.8
    assert "test" not in result


def test_params_prints_the_counts(tiny_backbone, capsys):
    flags = ["params", "--backbone", str(tiny_backbone), "--reduction-factor", "2"]
    assert main(flags) == 0
    table = capsys.readouterr().out
    assert main([*flags, "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["groups"]["adapters"] == {"trained": 216, "total": 216}
    assert counts["groups"]["pooler"]["trained"] == 0
    assert f"{counts['trained']:,}" in table.splitlines()[-1]
    assert counts["trained"] == 216 + 64 + 5 * 48 + 50


def test_params_of_all_methods(tiny_backbone, capsys):
    flags = ["params", "--method", "all", "--backbone", str(tiny_backbone)]
    flags += ["--reduction-factor", "2", "--dimension", "60", "--prefix-length", "3"]
    flags += ["--prompt-length", "5"]
    assert main([*flags, "--json"]) == 0
    records = {record["method"]: record for record in json.loads(capsys.readouterr().out)}
    assert tuple(records) == presets()
    assert records["compacter++"]["trained"] == 216 + 64 + 5 * 48 + 50  # as above
    assert records["intrinsic-said"]["trained"] == 60 + 50
    assert records["prompt-tuning-random"]["trained"] == 5 * 24 + 50
    # 23 word pieces, 64 positions, 2 token types, their norm; two layers; the pooler.
    layer = 4 * (24 * 24 + 24) + 2 * 24 * 40 + 40 + 24 + 2 * 48
    total = 24 * (23 + 64 + 2) + 48 + 2 * layer + 24 * 24 + 24
    assert {record.get("backbone_total", total) for record in records.values()} == {total}
    # AdapterDrop leaves out five layers, more than this backbone has.
    assert "leave_out has [2, 3, 4]" in records["adapterdrop"]["error"]
    # Overrides apply to the methods that have the field, such as the bottleneck of `mam`.
    adapters = 2 * (2 * 24 * 12 + 12 + 24)
    prefixes = 3 * 24 + 24 * 800 + 800 + 2 * (800 * 48 + 48)
    assert records["parallel"]["trained"] == adapters + 50
    assert records["mam"]["trained"] == adapters + prefixes + 50
    assert main([*flags, "--vocab-size", "1000"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + len(presets())
    assert f"of {total + 24 * (1000 - 23):,}" in table[0]
    (line,) = [line for line in table if line.startswith("full ")]
    assert f"{total + 24 * (1000 - 23) + 50:,}" in line


@pytest.mark.slow
def test_params_of_all_methods_are_the_paper_s(capsys):
    flags = ["params", "--method", "all", "--backbone-config", "t5-base"]
    assert main([*flags, "--json"]) == 0
    records = {record["method"]: record for record in json.loads(capsys.readouterr().out)}
    assert all(record["backbone_total"] == 222_903_552 for record in records.values())
    shrunk = {name: record["other_vocabularies"][0] for name, record in records.items()}
    assert all(record["vocab_size"] == 32_100 for record in shrunk.values())
    assert all(record["backbone_total"] == 222_882_048 for record in shrunk.values())
    expected = {
        "full": 222_882_048,
        "houlsby": 1_855_104,
        "pfeiffer-attention": 951_360,
        "adapterdrop": 1_101_984,
        "low-rank": 161_664,
        "phm": 398_976,
        "compacter": 161_728,
        "compacter++": 104_704,
        "bitfit": 280_932,
        "prompt-tuning-random": 76_800,
        "prompt-tuning-vocabulary": 76_800,
        "intrinsic-said": 20_000,
        "intrinsic": 20_000,
    }
    assert {name: shrunk[name]["trained"] for name in expected} == expected
    assert records["bitfit"]["trained"] == 280_932 + 28
    flags = ["params", "--backbone-config", "t5-base", "--phm-dim", "12", "--method"]
    for name, trained in (("compacter", 163_392), ("compacter++", 106_368)):
        assert main([*flags, name]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("backbone alone: 222,903,552; trained: 0.0")
        shrunk = f"with a vocabulary of 32,100: 222,882,048; trained: {trained:,}, 0.0"
        assert lines[1].startswith(shrunk)


@pytest.mark.contract
def test_methods_share_flags(capsys):
    assert main(["params", "--help"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert ", ".join(presets()[-3:]) in words
    assert "--dropout FLOAT dropout rate of the adapter's output, before it is added" in words
    assert "Of prefix_tuning: dropout rate of the keys and values." in words
    assert (
        "--sites STR [...] names of sites where the method acts, from the backbone's table" in words
    )
    assert (
        "--residual-before-ln {True,False,post_add} start of the adapter's skip connection" in words
    )
    assert "--parts" not in words
    # An error that concerns a single preset is reported as such.
    assert "no field 'rank'" in refusal(
        capsys, "params", "--method", "full", "--rank", "2", "--backbone-config", "t5-small"
    )


# A preset of each kind that other tests do not train -> flags that make it small. The differences
# between kinds are the same on a T5; `test_cli_t5.py` has the other kinds.
KINDS = {
    "low-rank": {"reduction-factor": 2},
    "bitfit": {},
    "prompt-tuning-vocabulary": {"prompt-length": 3},
    "prefix-tuning": {"prefix-length": 2, "bottleneck-size": 4},
}


def small_flags(folder, files, output, method, **flags):
    """Returns flags for a few steps on inputs of one length, since compilation takes most time."""
    flags |= {"output-dir": output, "backbone": folder, "method": method, "max-length": 16}
    flags |= {"batch-size": 8, "eval-batch-size": 16, "epochs": 1, "train-size": 16}
    flags |= {f"{split}-file": path for split, path in files.items()}
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def check_run(output, files, folder, capsys):
    """Checks that `evaluate` and `predict` reproduce the results of `fit`."""
    adapter = ["--adapter", str(output / "adapter")]
    flags = ["--test-file", str(files["test"]), "--output", str(folder / "metrics.json")]
    assert main(["evaluate", *adapter, *flags]) == 0
    expected = json.loads((output / "metrics.json").read_text())["test"]
    values = json.loads((folder / "metrics.json").read_text())["metrics"]
    assert values == pytest.approx(expected, rel=1e-5)
    source, target = files["test"], folder / "out.jsonl"
    assert main(["predict", *adapter, "--input", str(source), "--output", str(target)]) == 0
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    right = np.array([row["label_id"] for row in rows]) == pq.read_table(source)["label"].to_numpy()
    assert right.mean() == pytest.approx(expected["accuracy"])
    capsys.readouterr()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "flags"), KINDS.items(), ids=KINDS)
def test_every_kind_of_method(method, flags, tiny_backbone, files, tmp_path, capsys):
    flags = small_flags(tiny_backbone, files, tmp_path / "run", method, **flags)
    assert main(["fit", *flags]) == 0
    check_run(tmp_path / "run", files, tmp_path, capsys)


def method_in(folder, files, output, **flags):
    """Returns the method of a run that is prepared, but not started."""
    flags = {"prompt-length": 3, "method": "prompt-tuning-vocabulary", **flags}
    flags = fit_flags(folder, files, output, **flags)
    at = flags.index("--reduction-factor")
    return job.prepare(tyro.cli(FitOptions, args=flags[:at] + flags[at + 2 :])).method


def test_prompts_start_from_the_commonest_tokens(tiny_backbone, files, tmp_path):
    found = method_in(tiny_backbone, files, tmp_path).prompt_token_ids
    sentences = pq.read_table(files["train"])["sentence"].to_pylist()
    counts = Counter(" ".join(sentences).split())
    ids = {word: 5 + i for i, word in enumerate(WORDS)}
    order = sorted(counts, key=lambda word: (-counts[word], ids[word]))
    assert found == tuple(ids[word] for word in order[:3])
    flags = {"prompt-words": "awful good"}
    assert method_in(tiny_backbone, files, tmp_path, **flags).prompt_token_ids == (21, 15)


def saved_adapter(folder, backbone, method, **metadata):
    """Saves an adapter with random values on a classifier, like one from `fit`."""
    loaded = cj.load_backbone(backbone, head="sequence_classification", num_labels=2)
    model = cj.Adapted(loaded.module, method)
    params = cj.init_adapters(model, loaded, jax.random.key(0))
    trained, frozen = cj.partition(params, cj.label_params(params, method))
    generator = np.random.default_rng(0)
    trained = jax.tree.map(
        lambda leaf: leaf + np.float32(0.3 * generator.standard_normal(leaf.shape)), trained
    )
    settings = {"backbone": str(backbone), "dtype": "float32", "max_length": 16, "task": "own"}
    settings |= {"kind": "classification", "label_names": ["dull", "fine"]}
    cj.save_adapter(folder, model, cj.merge(trained, frozen), metadata=settings | metadata)


def logits_of(adapter, files, folder):
    """Returns the logits that `predict` writes, [rows, 2]."""
    flags = ["--adapter", adapter, "--input", files["test"], "--output", folder / "logits.jsonl"]
    assert main(["predict", *map(str, flags), "--logits"]) == 0
    rows = (folder / "logits.jsonl").read_text().splitlines()
    return np.array([json.loads(row)["logits"] for row in rows])


@pytest.mark.parametrize("library", ["adapterhub", "peft"])
def test_convert_there_and_back(library, tiny_backbone, files, tmp_path, capsys):
    saved_adapter(tmp_path / "ours", tiny_backbone, cj.preset("lora", rank=2))
    to = ["--to-format", library, "--to", tmp_path / "theirs"]
    command = ["convert", "--from", "compacter_jax", tmp_path / "ours", *to]
    assert main(list(map(str, command))) == 0
    assert "already" in refusal(capsys, *command)
    back = ["convert", "--from", library, tmp_path / "theirs", "--to", tmp_path / "back"]
    assert "needs --backbone, the backbone" in refusal(capsys, *back)
    back += ["--backbone", tiny_backbone, "--max-length", "16"]
    if library == "adapterhub":  # AdapterHub stores the label names
        assert "3 names, a, b, c, but the head has 2 labels" in refusal(
            capsys, *back, "--label-names", "a", "b", "c"
        )
    else:
        assert "names of the 2 labels are unknown" in refusal(capsys, *back)
        back += ["--label-names", "dull", "fine"]
    assert not (tmp_path / "back").exists()
    assert main(list(map(str, back))) == 0
    settings = cj.read_adapter_config(tmp_path / "back")
    assert settings["label_names"] == ["dull", "fine"]
    assert (settings["kind"], settings["max_length"]) == ("classification", 16)
    np.testing.assert_array_equal(
        logits_of(tmp_path / "back", files, tmp_path), logits_of(tmp_path / "ours", files, tmp_path)
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "back",
        "logits.jsonl",
        "ours",
        "theirs",
    ]


def test_what_cannot_be_converted(tiny_backbone, tmp_path, capsys):
    saved_adapter(tmp_path / "ours", tiny_backbone, cj.preset("bitfit"))
    ours = ["convert", "--from", "compacter_jax", tmp_path / "ours", "--to", tmp_path / "to"]
    assert "are the same; choose another --to-format" in refusal(capsys, *ours)
    assert "bitfit" in refusal(capsys, *ours, "--to-format", "peft")
    other = ["convert", "--from", "other", tmp_path / "ours", "--to", tmp_path / "to"]
    assert "names no format; use --from compacter_jax, adapterhub or peft" in refusal(
        capsys, *other
    )
    theirs = ["convert", "--from", "peft", tmp_path / "none", "--backbone", tiny_backbone]
    theirs += ["--to", tmp_path / "to"]
    assert "does not exist" in refusal(capsys, *theirs)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    (tmp_path / "none").mkdir()
    settings = {"peft_type": "LORA", "task_type": ["SEQ_CLS"], "target_modules": ["query"]}
    (tmp_path / "none" / "adapter_config.json").write_text(json.dumps(settings))
    assert "task_type=['SEQ_CLS'] must be text or null" in refusal(capsys, *theirs)


def converted_head(tiny_backbone, folder, to, **head):
    """Returns the command that reads an AdapterHub folder with `head` in its head_config.json."""
    if not folder.exists():
        saved_adapter(folder.with_name("ours"), tiny_backbone, cj.preset("lora", rank=2))
        back = ["convert", "--from", "compacter_jax", folder.with_name("ours"), "--to", folder]
        assert main([*map(str, back), "--to-format", "adapterhub"]) == 0
    path = folder / "head_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | head))
    given = ["--backbone", tiny_backbone, "--max-length", "16", "--to", to]
    return list(map(str, ["convert", "--from", "adapterhub", folder, *given]))


def test_labels_of_a_folder_that_are_none(tiny_backbone, tmp_path, capsys):
    folder, to = tmp_path / "theirs", tmp_path / "to"
    for labels in (["dull", "fine"], {"dull": 0, "fine": "1"}, {"dull": 0, "fine": 2}, 3):
        command = converted_head(tiny_backbone, folder, to, label2id=labels)
        error = refusal(capsys, *command)
        assert f"label2id={labels!r} in {folder / 'head_config.json'} must map names" in error
        assert "give --label-names" in error
    assert not to.exists()
    assert main([*command, "--label-names", "dull", "fine"]) == 0
    assert cj.read_adapter_config(to)["label_names"] == ["dull", "fine"]


def test_a_head_of_several_labels_at_once_is_not_for_predicting(
    tiny_backbone, files, tmp_path, capsys
):
    names = {"dull": 0, "fine": 1}
    config = {"head_type": "multilabel_classification", "layers": 1, "use_pooler": True}
    config |= {"num_labels": 2, "bias": True, "label2id": names}
    folder = tmp_path / "theirs"
    command = converted_head(tiny_backbone, folder, tmp_path / "to", config=config, name="adapter")
    path = folder / "model_head.safetensors"
    tensors = safetensors.numpy.load_file(path)
    renamed = {
        key.replace("classifier.", "heads.adapter.1."): tensor for key, tensor in tensors.items()
    }
    safetensors.numpy.save_file(renamed, path)
    assert main(command) == 0
    assert "multilabel classification" in capsys.readouterr().out
    settings = cj.read_adapter_config(tmp_path / "to")
    assert settings["backbone"] == str(tiny_backbone)
    assert settings.keys().isdisjoint({"kind", "label_names"})
    flags = ["--adapter", tmp_path / "to", "--input", files["test"]]
    error = refusal(capsys, "predict", *flags, "--output", tmp_path / "out.csv")
    assert "has no ['kind', 'label_names', 'max_length']" in error


def test_merge_writes_an_equal_backbone(tiny_backbone, files, tmp_path):
    saved_adapter(tmp_path / "ours", tiny_backbone, cj.preset("lora", rank=2))
    assert main(["merge", "--adapter", str(tmp_path / "ours"), "--to", str(tmp_path / "to")]) == 0
    merged = cj.load_backbone(tmp_path / "to")  # config.json names the head
    assert merged.module.head == "sequence_classification"
    assert merged.config.id2label == {0: "dull", 1: "fine"}
    assert merged.new_parameters == ()
    tokenizer = inference_adapter.load_tokenizer(str(tmp_path / "to"), merged, 16)
    sentences = pq.read_table(files["test"])["sentence"].to_pylist()
    encoded = tokenizer(sentences, padding=True, truncation=True, max_length=16)
    logits = merged.module.apply(
        {"params": merged.params},
        np.array(encoded["input_ids"]),
        np.array(encoded["attention_mask"]),
    )
    expected = logits_of(tmp_path / "ours", files, tmp_path)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_what_cannot_be_merged(tiny_backbone, tmp_path, capsys):
    method = cj.preset("houlsby", reduction_factor=2)
    saved_adapter(tmp_path / "ours", tiny_backbone, method)
    error = refusal(capsys, "merge", "--adapter", tmp_path / "ours", "--to", tmp_path / "to")
    assert "non-linearity" in error
    assert not (tmp_path / "to").exists()


@pytest.mark.slow
def test_a_config_file_gives_flags_and_the_command_line_wins(tiny_backbone, files, tmp_path):
    config = tmp_path / "run.toml"
    values = [f'{split}_file = "{path}"' for split, path in files.items()]
    values += ["epochs = 1", "learning_rate = 0.5", "sites = ['attention', 'feed_forward']"]
    values += ["batch_size = 8", "eval_batch_size = 16", "reduction_factor = 2", 'remat = "full"']
    config.write_text("\n".join(values))
    flags = ["--config", config, "--backbone", tiny_backbone, "--output-dir", tmp_path / "run"]
    flags += ["--learning-rate", "1e-3", "--max-length", "16", "--train-size", "16"]
    assert main(["fit", *map(str, flags)]) == 0
    run_settings = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run_settings["learning_rate"] == 1e-3
    assert run_settings["method_sites"] == ["attention", "feed_forward"]
    assert run_settings["remat"] == "full"
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["train_examples"] == 16


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(tiny_backbone, files, tmp_path, capsys):
    flags = fit_flags(tiny_backbone, files, tmp_path / "run", **{"learning-rate": 1e38})
    flags += ["--clip-norm", "0", "--warmup-fraction", "0", "--checkpoint-steps", "1"]
    assert main(["fit", *flags]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: step ")
    assert "smaller --learning-rate" in error
    kept = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    named = int(error.split()[2].rstrip(":"))
    assert f"the checkpoint of step {kept[-1]} is kept" in error
    assert kept[-1] < named


# --- bad input: one line, exit code 2, nothing written ------------------------------------------


def table(**columns):
    return lambda path: pq.write_table(pa.table(columns), path)


BAD_FILES = {
    "no_sentence": (table(text=["a"], label=[0]), "no column 'sentence'"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "foreign_label": (table(sentence=["a", "b"], label=["2", "0"]), "row 1: label '2'"),
    "long": (table(sentence=["x" * 1_000_000], label=["0"]), "1000000 characters"),
    "truncated": (lambda path: path.write_bytes(b"PAR1\0\0"), "parquet"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(name, tiny_backbone, files, tmp_path, capsys):
    write, message = BAD_FILES[name]
    path = tmp_path / "bad.parquet"
    write(path)
    output = tmp_path / "run"
    flags = fit_flags(tiny_backbone, {**files, "validation": path}, output)
    error = refusal(capsys, "fit", *flags)
    assert message in error
    assert str(path) in error
    assert not output.exists()


def test_missing_file_nan_score_and_invalid_utf8(tiny_backbone, files, tmp_path, capsys):
    output = tmp_path / "run"
    missing = {**files, "train": tmp_path / "none.csv"}
    assert "none.csv" in refusal(capsys, "fit", *fit_flags(tiny_backbone, missing, output))
    path = tmp_path / "scores.parquet"
    table(sentence=["a", "b"], score=[0.5, float("nan")])(path)
    scores = {"train": path, "validation": path}
    flags = [*fit_flags(tiny_backbone, scores, output), "--regression"]
    assert "row 2: score 'nan' is not a finite number" in refusal(capsys, "fit", *flags)
    path = tmp_path / "latin.csv"
    path.write_bytes("sentence,label\ncafé,0\n".encode("latin-1"))
    flags = fit_flags(tiny_backbone, {**files, "train": path}, output)
    assert "not UTF-8" in refusal(capsys, "fit", *flags)
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"method": "compactor"}, "unknown method preset 'compactor' (did you mean 'compacter'?)"),
        ({"phm-dim": 5}, "phm_dim=5 does not divide both the width 24"),
        ({"non-linearity": "gelo"}, "unknown activation 'gelo'"),
        ({"sites": "feedforward"}, "unknown site 'feedforward'"),
        ({"leave-out": 7}, "leave_out has [7]"),
        ({"max-length": 100}, "max_length=100 exceeds"),
        ({"max-evaluations": 0}, "max_evaluations=0 must be at least 1"),
        (
            {"prompt-words": "good"},
            "--prompt-words replaces --prompt-token-ids, and only works with",
        ),
        ({"batch-size": 6}, "batch_size=6 must be a multiple of 4"),
        ({"learning-rate": -1}, "learning_rate=-1.0 must be above 0"),
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"train-size": 1000}, "1000"),
        ({"backbone": "/nowhere"}, "/nowhere"),
        ({"config": "/nowhere.toml"}, "/nowhere.toml"),
    ],
)
def test_bad_flags(flags, message, tiny_backbone, files, tmp_path, capsys):
    output = tmp_path / "run"
    error = refusal(capsys, "fit", *fit_flags(tiny_backbone, files, output, **flags))
    assert message in error
    assert not output.exists()


def test_a_prompt_that_leaves_too_few_positions(tiny_backbone, files, tmp_path, capsys):
    output, flags = tmp_path / "run", {"method": "prompt-tuning-random", "prompt-length": 30}
    flags["max-length"] = 40
    given = fit_flags(tiny_backbone, files, output, **flags)
    at = given.index("--reduction-factor")
    error = refusal(capsys, "fit", *given[:at], *given[at + 2 :])
    assert "max_length=40 and prompt_length=30 together exceed the backbone's 64" in error
    assert "use a max_length of 34 or less" in error
    assert not output.exists()


def test_a_mesh_of_other_devices_leaves_the_folder_absent(tiny_backbone, files, tmp_path, capsys):
    output = tmp_path / "run"
    flags = fit_flags(tiny_backbone, files, output, mesh="data=8")
    assert main(["fit", *flags]) == 2
    printed = capsys.readouterr()
    assert "--mesh 'data=8' needs 8 devices, but a host has 4" in printed.err
    assert printed.out == ""
    assert not output.exists()


def test_the_folder_of_a_run_stands_for_its_adapter(fitted, files, tmp_path, capsys):
    flags = [f"--test-file={files['test']}", "--task=custom"]
    assert main(["evaluate", f"--adapter={fitted}", *flags]) == 0
    assert (fitted / "adapter/evaluation_custom_test.json").exists()
    predicted = tmp_path / "out.csv"
    flags = [f"--input={files['test']}", f"--output={predicted}"]
    assert main(["predict", f"--adapter={fitted}", *flags]) == 0
    assert predicted.exists()
    # The adapter can be read, but not converted.
    capsys.readouterr()
    ours, to = ["--from", "compacter_jax", fitted, "--to-format", "peft"], tmp_path / "new"
    assert "PEFT" in refusal(capsys, "convert", *ours, "--to", to)
    assert "merge" in refusal(capsys, "merge", "--adapter", fitted, "--to", to)


def test_a_task_that_is_not_given(fitted, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name, content in adapter_bytes(fitted).items():
        (adapter / name).write_bytes(content)
    path = adapter / "adapter_config.json"
    settings = json.loads(path.read_text("utf-8"))
    assert "no examples were given" in refusal(capsys, "evaluate", "--adapter", adapter)
    path.write_text(json.dumps({**settings, "task": "movie"}), "utf-8")
    error = refusal(capsys, "evaluate", "--adapter", adapter)
    assert f"the adapter in {adapter} was trained on movie; give --task movie" in error


def test_a_new_head_is_told_of_by_fit_alone(run, tiny_backbone):
    """Another test checks that `evaluate` says nothing about a new head."""
    _, printed, errors = run
    new = "does not have classifier/bias, classifier/kernel: new, and trained here"
    assert f"{tiny_backbone} {new}" in printed
    assert "initialised" not in errors


def test_compiling_is_announced_once_a_command(run, files, tmp_path, capsys):
    fitted, printed, _ = run
    check_announced(printed)
    commands = {
        "evaluate": [f"--test-file={files['test']}"],
        "predict": [f"--input={files['test']}", f"--output={tmp_path / 'out.csv'}"],
    }
    for name, flags in commands.items():
        compilation_cache.announce_compilation.cache_clear()  # as in a new process
        assert main([name, f"--adapter={fitted}", *flags]) == 0
        check_announced(capsys.readouterr().out)


def check_announced(printed):
    """Checks that compilation is announced once, before the first results."""
    lines = printed.splitlines()
    announced = "each new input length has to be compiled"
    (at,) = (i for i, line in enumerate(lines) if line.startswith(announced))
    assert "about 20 s" in lines[at]
    results = [i for i, x in enumerate(lines) if x.startswith(("epoch", "test", "43 rows"))]
    assert at < min(results)


def test_an_adapter_of_ours_is_told_apart(fitted, tiny_backbone, tmp_path, capsys):
    for library in ("peft", "adapterhub"):
        flags = ["--from", library, fitted / "adapter", "--backbone", tiny_backbone]
        error = refusal(capsys, "convert", *flags, "--to", tmp_path / "new")
        assert "holds an adapter of this package; use --from compacter_jax" in error
        assert not (tmp_path / "new").exists()


def test_an_adapter_s_expression_that_cannot_be_read(tmp_path, capsys):
    flags = ["--adapter", "average(nowhere)", "--input", __file__, "--output", tmp_path / "o.csv"]
    error = refusal(capsys, "evaluate", *flags[:2])
    assert (
        "--adapter 'average(nowhere)' is not a valid composition: 'nowhere' is not the folder"
        in error
    )
    assert "compacter" not in error
    assert "average(0.7*runs/a" in error


def test_unknown_flag_and_command(capsys):
    error = refusal(capsys, "fit", "--sed", "1")
    assert "Unrecognized options: --sed 1" in error
    assert "│" not in error
    assert "unknown command 'fti'" in refusal(capsys, "fti")


def test_unknown_key_in_a_config_file(tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_text("learning_rat = 1.0")
    assert "unknown key 'learning_rat'" in refusal(capsys, "fit", "--config", path)
    path.write_text("learning_rate = ")
    assert "not valid TOML" in refusal(capsys, "fit", "--config", path)


def test_output_directory_that_cannot_be_written(tiny_backbone, files, tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("not a folder")
    error = refusal(capsys, "fit", *fit_flags(tiny_backbone, files, path / "run"))
    assert str(path) in error
    assert path.read_text() == "not a folder"


def test_output_directory_that_holds_a_run(fitted, tiny_backbone, files, capsys):
    before = adapter_bytes(fitted)
    flags = fit_flags(tiny_backbone, files, fitted, **FITTED)
    assert "already holds a run" in refusal(capsys, "fit", *flags)
    other = fit_flags(tiny_backbone, files, fitted, **FITTED | {"epochs": 5})
    assert "epochs was 4, now 5" in refusal(capsys, "fit", *other, "--resume")
    assert "contradict" in refusal(capsys, "fit", *flags, "--resume", "--overwrite")
    assert adapter_bytes(fitted) == before


@pytest.mark.slow
def test_resuming_a_finished_run_changes_nothing(fitted, tiny_backbone, files):
    before = adapter_bytes(fitted)
    flags = fit_flags(tiny_backbone, files, fitted, **FITTED)
    assert main(["fit", *flags, "--resume"]) == 0
    assert adapter_bytes(fitted) == before


def test_adapters_that_do_not_fit(fitted, tiny_backbone, files, tmp_path, capsys):
    source, target = files["test"], tmp_path / "out.csv"

    def predict(adapter, *more):
        flags = ["--adapter", adapter, "--input", source, "--output", target, *more]
        error = refusal(capsys, "predict", *flags)
        assert not target.exists()
        return error

    copy = tmp_path / "adapter"
    copy.mkdir()
    for name, content in adapter_bytes(fitted).items():
        (copy / name).write_bytes(content)
    weights = weights_of(copy)
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "truncated" in predict(copy)
    weights.write_bytes((tiny_backbone / "model.safetensors").read_bytes())
    assert "is not the file" in predict(copy)
    other = write_backbone(tmp_path / "other", seed=1)
    assert "made for a backbone" in predict(fitted / "adapter", "--backbone", other)
    wider = write_backbone(tmp_path / "wider", seed=0, hidden_size=32)
    assert "does not fit" in predict(fitted / "adapter", "--backbone", wider)
    assert "does not exist" in predict(tmp_path / "none")


def test_a_truncated_backbone(tiny_backbone, files, tmp_path, capsys):
    backbone = write_backbone(tmp_path / "backbone", seed=0)
    weights = backbone / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    error = refusal(capsys, "fit", *fit_flags(backbone, files, tmp_path / "run"))
    assert "model.safetensors" in error
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_not_there(tmp_path, capsys):
    path = tmp_path / "missing.toml"
    told = refusal(capsys, "fit", "--config", path, "--output-dir", tmp_path)
    assert told == f"error: {path} does not exist"
