"""Tests masked words: the noise, the loss, and the way from a head to language adapters."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from transformers import AutoTokenizer

import compacter_jax as cj
from compacter_jax.models.bert.checkpoint import bert_to_hugging_face
from tests.conftest import WORDS
from tests.train.cli.test_cli import refusal
from train.__main__ import main
from train.data import batching
from train.data.tokens import IGNORED
from train.objectives.masked_words import MaskedWords


def text_of(rows, seed=0):
    generator = np.random.default_rng(seed)
    weights = 1 / np.arange(1, len(WORDS) + 1) ** 2
    words = generator.choice(WORDS, (rows, 9), p=weights / weights.sum())
    return "\n".join(map(" ".join, words))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text_of(500), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def objective(tiny_backbone):
    backbone = cj.load_backbone(tiny_backbone, head="masked_lm")
    model = cj.Adapted(backbone.module, cj.preset("lora"))
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_backbone))
    return MaskedWords(model, tokenizer, 32), backbone


def test_the_noise_is_that_of_bert(objective, text):
    """15 % are chosen: of them 80 % are masked, 10 % random, 10 % as they were."""
    made, _ = objective
    tokenizer, segments = made.tokenizer, made.read(text)
    assert max(map(len, (segments[i] for i in range(len(segments))))) == 30
    noisy = made.noised(segments, seed=3, epoch=0)
    labels, ids = noisy.words.tags, noisy.input_ids
    starts, ends = noisy.offsets[:-1], noisy.offsets[1:] - 1
    assert set(ids[starts]) == {tokenizer.cls_token_id}
    assert set(ids[ends]) == {tokenizer.sep_token_id}
    chosen = labels != IGNORED
    assert not chosen[starts].any()
    assert not chosen[ends].any()
    plain = np.delete(np.where(chosen, labels, ids), np.concatenate([starts, ends]))
    np.testing.assert_array_equal(plain, segments.tokens)
    counts = np.add.reduceat(chosen, starts)
    wanted = [
        max(1, round(0.15 * (end - start - 1))) for start, end in zip(starts, ends, strict=True)
    ]
    np.testing.assert_array_equal(counts, wanted)
    np.testing.assert_array_equal(noisy.words.lengths, wanted)
    total = chosen.sum()
    masked = (ids[chosen] == tokenizer.mask_token_id).sum()
    kept = (ids[chosen] == labels[chosen]).sum()
    for count, part in ((masked, 0.8), (kept, 0.1 + 0.1 / len(WORDS)), (total - masked, 0.2)):
        assert abs(count / total - part) < 4 * math.sqrt(part * (1 - part) / total)
    again, other = (made.noised(segments, seed=3, epoch=epoch) for epoch in (0, 1))
    np.testing.assert_array_equal(again.input_ids, ids)
    assert (other.input_ids != ids).mean() > 0.1


def test_loss_and_accuracy_are_those_of_pytorch(objective, text, tiny_backbone):
    """The scores equal transformers' loss over the chosen tokens, to 1e-5."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    made, backbone = objective
    encoded = made.encode(text)
    params = cj.init_adapters(made.model, backbone, jax.random.key(0))
    config = transformers.AutoConfig.from_pretrained(str(tiny_backbone))
    model = transformers.BertForMaskedLM(config).eval()
    tensors = {
        name: torch.tensor(np.array(t)) for name, t in bert_to_hugging_face(backbone.params).items()
    }
    model.load_state_dict(tensors, strict=False)
    sums, right, outputs = 0.0, 0, {"loss": [], "correct": []}
    for batch in batching.batches(encoded, 64, shuffle=False):
        found = made.outputs(params, {name: jnp.asarray(value) for name, value in batch.items()})
        real = batch["indices"] >= 0
        for name, values in outputs.items():
            values.append(np.asarray(found[name])[real])
        with torch.no_grad():
            logits = model(
                *(torch.tensor(batch[name]) for name in ("input_ids", "attention_mask"))
            ).logits
        labels = torch.tensor(batch["labels"]).long()
        sums += float(
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
            )
        )
        right += int((logits.argmax(-1) == labels).sum())
    scores = made.scores({n: np.concatenate(v) for n, v in outputs.items()}, encoded)
    chosen = encoded.words.lengths.sum()
    assert scores["loss"] == pytest.approx(sums / chosen, rel=1e-5)
    assert scores["token_accuracy"] == pytest.approx(right / chosen)


def test_from_text_to_a_language_adapter(tiny_backbone, text, tmp_path, capsys):
    """A head is trained alone, written with the backbone, and frozen under a language adapter."""
    flags = ["--task", "masked_lm", "--train-file", str(text), "--max-length", "16"]
    flags += ["--max-steps", "30", "--batch-size", "16", "--learning-rate", "1e-2"]
    bare = [*flags, "--backbone", str(tiny_backbone)]
    told = refusal(capsys, "fit", *bare, "--method", "mad-x", "--output-dir", tmp_path / "no")
    assert "has no head for masked words" in told
    assert (
        main(["fit", *bare, "--method", "head-only", "--output-dir", str(tmp_path / "head")]) == 0
    )
    assert "are held out for validation" in capsys.readouterr().out
    backbone = tmp_path / "head" / "backbone"
    before, after = (
        safetensors.numpy.load_file(folder / "model.safetensors")
        for folder in (tiny_backbone, backbone)
    )
    assert {name.split(".")[0] for name in after.keys() - before.keys() if "cls" in name} == {"cls"}
    embeddings = "embeddings.word_embeddings.weight"
    names = [next(n for n in each if n.endswith(embeddings)) for each in (before, after)]
    np.testing.assert_array_equal(before[names[0]], after[names[1]])

    run = tmp_path / "language"
    fitted = [*flags, "--backbone", str(backbone), "--method", "mad-x", "--output-dir", str(run)]
    assert main(["fit", *fitted]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["validation"]["loss"] < 0.9 * math.log(len(WORDS))
    model, _ = cj.load_adapter(run / "adapter", cj.load_backbone(backbone, head="masked_lm"))
    assert "vocabulary" in model.sites_of(model.method.parts[1])
    evaluated = ["evaluate", "--adapter", str(run)]  # the adapter knows its task
    assert main([*evaluated, "--test-file", str(text), "--output", str(tmp_path / "m.json")]) == 0
    scores = json.loads((tmp_path / "m.json").read_text())
    assert scores["metrics"]["loss"] < 0.9 * math.log(len(WORDS))
    capsys.readouterr()
    assert "cannot predict" in refusal(
        capsys, "predict", "--adapter", run, "--input", text, "--output", tmp_path / "o.csv"
    )
    rows = tmp_path / "rows.csv"
    rows.write_text("sentence,label\n" + "".join(f"the film,{i % 2}\n" for i in range(8)))
    classify = ["--train-file", str(rows), "--validation-file", str(rows), "--max-steps", "1"]
    classify += ["--backbone", str(backbone), "--method", f"stack(language={run},task=lora)"]
    assert (
        main(["fit", *classify, "--max-length", "16", "--output-dir", str(tmp_path / "task")]) == 0
    )


def test_bad_settings(objective):
    made, _ = objective
    for change, told in (
        ({"noise_density": 1.0}, "noise_density=1.0 must be above 0 and below 1"),
        ({"max_length": 3}, "max_length=3 leaves no room"),
    ):
        with pytest.raises(ValueError, match=told):
            type(made)(
                **{"model": made.model, "tokenizer": made.tokenizer, "max_length": 8} | change
            )
