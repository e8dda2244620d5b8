"""Runs RoBERTa, ELECTRA and DistilBERT on the command line: labels, tags, answers, and merging."""

import json

import hub_data
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import WORDS

import compacter_jax as cj
from tests.encoder_models import write_encoder
from tests.train.cli.test_cli import BAD, GOOD, fit_flags, refusal
from train.__main__ import main
from train.cli.method_flags import MethodOptions
from train.estimate import plan
from train.estimate.options import PlanOptions

NAMES = ("roberta", "electra", "distilbert")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Returns family -> the folder of a small one."""
    place = tmp_path_factory.mktemp("encoders")
    return {name: write_encoder(place / name, name) for name in NAMES}


def write_pairs(folder):
    """Writes pairs whose label says whether the words of both sentences are positive."""
    files = {}
    for seed, (split, rows) in enumerate({"train": 64, "validation": 24, "test": 25}.items()):
        generator = np.random.default_rng(seed)
        labels = generator.integers(0, 2, rows)
        columns = {
            name: [" ".join(generator.choice(GOOD if label else BAD, 4)) for label in labels]
            for name in ("sentence", "sentence2")
        }
        files[split] = folder / f"{split}.parquet"
        pq.write_table(pa.table(columns | {"label": labels}), files[split])
    return files


def test_labels_of_pairs_on_a_roberta(folders, tmp_path):
    """Fit, evaluate, predict and merge agree on pairs, whose token types are left out."""
    files, adapter = write_pairs(tmp_path), tmp_path / "run" / "adapter"
    flags = fit_flags(folders["roberta"], files, tmp_path / "run", pooling="mean", epochs=12)
    del flags[(at := flags.index("--reduction-factor")) : at + 2]
    flags += ["--method", "lora", "--rank", "2"]
    assert main(["fit", *flags]) == 0
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert result["test"]["accuracy"] > 0.8
    merged = tmp_path / "merged"
    assert main(["merge", *_flags(adapter=adapter, to=merged)]) == 0
    backbone = cj.load_backbone(merged)
    assert (backbone.module.head, backbone.module.pooling) == ("sequence_classification", "mean")
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"sentence": "good film", "sentence2": "we loved it"}\n')
    assert main(["predict", *_flags(adapter=adapter, input=source, output=target)]) == 0
    (row,) = (json.loads(line) for line in target.read_text().splitlines())
    ids = [[0, *_ids("good film"), 2, *_ids("we loved it"), 2]]
    logits = np.asarray(backbone.module.apply({"params": backbone.params}, np.array(ids)))[0]
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert row["probability"] == pytest.approx(probabilities.max(), abs=1e-5)


def _ids(text):
    return [5 + WORDS.index(word) for word in text.split()]


def _flags(**values):
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def test_tags_on_a_distilbert(folders, tmp_path):
    """Words are tagged, and evaluate repeats the scores of fit."""
    generator, files = np.random.default_rng(0), {}
    for split in ("train", "validation", "test"):
        rows = [generator.choice([*GOOD, *BAD], 5).tolist() for _ in range(32)]
        tagged = [{"tokens": row, "tags": ["BG"[w in GOOD] for w in row]} for row in rows]
        files[split] = tmp_path / f"{split}.jsonl"
        files[split].write_text("".join(json.dumps(row) + "\n" for row in tagged))
    flags = fit_flags(folders["distilbert"], files, tmp_path / "run", epochs=20)
    flags += ["--phm-dim", "3"]
    assert main(["fit", *flags]) == 0
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert result["test"]["accuracy"] > 0.7
    adapter = tmp_path / "run" / "adapter"
    assert main(["evaluate", *_flags(adapter=adapter, **{"test-file": files["test"]})]) == 0
    again = json.loads((adapter / "evaluation_custom_test.json").read_text())["metrics"]
    assert again == pytest.approx(result["test"], rel=1e-5)


def test_answers_on_an_electra(folders, tmp_path):
    """Spans of a context are found by a model with a projection of its embeddings."""
    hub_data.write(tmp_path / "data", "squad")
    flags = {"backbone": folders["electra"], "task": "squad", "data-dir": tmp_path / "data"}
    flags |= {"epochs": 1, "batch-size": 8, "eval-batch-size": 8, "max-length": 32}
    flags |= {"output-dir": tmp_path / "run", "method": "bitfit"}
    assert main(["fit", *_flags(**flags)]) == 0
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert result["metric"] == "exact_match_and_f1"


@pytest.mark.parametrize("name", ["roberta-base", "google/electra-small-discriminator"])
def test_params_knows_the_published_sizes(name, capsys):
    """The command needs no weights."""
    assert main(["params", "--backbone-config", name, "--method", "compacter++"]) == 0
    assert "adapters" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["roberta", "distilbert"])
def test_a_plan_traces_the_step(name, folders):
    """A plan has the cost of a step of each family, whose inputs have no token types."""
    method = MethodOptions(reduction_factor=2, phm_dim=2)
    settings = {"task": "movie", "max_length": 16, "batch_size": 4, "method_options": method}
    one = plan.plan_of(PlanOptions(backbone=str(folders[name]), **settings))
    assert one.cost.flops > 0
    assert one.target_lengths == ()


def test_what_does_not_fit_a_roberta_is_refused(folders, tmp_path, capsys):
    """Lengths beyond the positions and tokenizers of other families are refused by name."""
    files = write_pairs(tmp_path)
    flags = fit_flags(folders["roberta"], files, tmp_path / "run", **{"max-length": 65})
    assert "max_length=65 exceeds the backbone's 64 positions" in refusal(capsys, "fit", *flags)
    for name, settings, message in (
        ("roberta", {"pad_token": "<unk>"}, "pads with token 3, but the backbone of model_type="),
        (
            "xlm-roberta",
            {"tokenizer_class": "RobertaTokenizerFast"},
            "is a RobertaTokenizer, but the backbone of model_type='xlm-roberta' reads tokens of",
        ),
    ):
        folder = write_encoder(tmp_path / name, name, vocab_size=31)
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        flags = fit_flags(folder, files, tmp_path / "run", **{"phm-dim": 3})
        assert message in refusal(capsys, "fit", *flags)
