"""Runs `fit`, `evaluate` and `predict` with compositions that are written as expressions."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import compacter_jax as cj
from compacter_jax.compositions.base import parallel_names
from tests.helpers import weights_of
from tests.train.cli.test_cli import BAD, GOOD, fit_flags, refusal, write_splits
from tests.train.cli.test_cli_t5 import t5_flags
from tests.train.inference.test_banked import read_jsonl, three_labels, write_jsonl
from train.__main__ import main
from train.cli import compositions, method_flags

STEPS = {"epochs": 1, "backbone-dropout": 0}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_splits(tmp_path_factory.mktemp("files"), {"train": 60, "validation": 20})


@pytest.fixture(scope="module")
def saved(tiny_backbone, files, tmp_path_factory):
    """Trains `a` and `b` on one task, and `three` on a task with three labels."""
    folder = tmp_path_factory.mktemp("saved")
    three = three_labels(tmp_path_factory.mktemp("three"))
    for seed, (name, examples) in enumerate({"a": files, "b": files, "three": three}.items()):
        flags = fit_flags(tiny_backbone, examples, folder / name, seed=seed, **STEPS)
        assert main(["fit", *flags]) == 0
    return folder


@pytest.fixture(scope="module")
def language(tiny_backbone, tmp_path_factory):
    """Saves an adapter with the head of a language model, as after training on text."""
    folder = tmp_path_factory.mktemp("language") / "english"
    backbone = cj.load_backbone(tiny_backbone, head="masked_lm")
    method = cj.preset("pfeiffer-feed-forward", reduction_factor=4)
    model = cj.Adapted(backbone.module, method)
    params = cj.init_adapters(model, backbone, jax.random.key(5))
    noise = np.random.default_rng(0)
    trained, frozen = cj.partition(params, cj.label_params(params, method))
    moved = jax.tree.map(lambda x: x + 0.3 * noise.standard_normal(x.shape, np.float32), trained)
    cj.save_adapter(folder, model, cj.merge(moved, frozen))
    return folder


def fit(backbone, files, output, method, **flags):
    given = fit_flags(backbone, files, output, **{**STEPS, **flags}, method=method)
    assert main(["fit", *(given if "compacter++" in method else without_factor(given))]) == 0
    return output


def without_factor(flags):
    """Removes the flag of bottlenecks, which other methods do not have."""
    at = flags.index("--reduction-factor")
    return flags[:at] + flags[at + 2 :]


def stored(folder):
    """Returns the leaves in the file of an adapter."""
    import safetensors.numpy

    return safetensors.numpy.load_file(weights_of(Path(folder)))


def of_member(leaves, name):
    """Returns path -> array of the adapters of one member."""
    return {
        path.replace(f"/adapter/{name}/", "/adapter/"): leaf
        for path, leaf in leaves.items()
        if f"/adapter/{name}/" in path and "/replaced/" not in path
    }


# --- reading -------------------------------------------------------------------------------------


def test_an_expression_is_what_the_library_composes(saved):
    text = f"stack( low={saved}/a , parallel(x=compacter++, y= average(0.25*lora, 0.75 * houlsby)))"
    expression = compositions.parse(text)
    assert list(expression.leaves()) == ["low", "1/x", "1/y/0", "1/y/1"]
    assert expression.presets() == ["compacter++", "lora", "houlsby"]
    options = method_flags.MethodOptions(train_layer_norms=False, rank=2)
    made = compositions.composed(expression, options, None)
    low = cj.preset("compacter++", reduction_factor=2)
    norms = {"train_layer_norms": False}
    average = cj.Average(
        cj.preset("lora", rank=2, **norms),
        cj.preset("houlsby", **norms),
        weights=(0.25, 0.75),
    )
    beside = cj.Parallel(cj.preset("compacter++", **norms), average, names=("x", "y"))
    assert made == cj.Stack(low, beside, names=("low", "1"), frozen=("low",))
    assert parallel_names(made) == ("x", "y")
    both = compositions.parse(f"average({saved}/a,{saved}/b)")
    chosen = compositions.composed(both, method_flags.MethodOptions(), "1")
    assert chosen.frozen == ("0",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stack(", "a name is missing before 'the end'"),
        ("stack()", "a name is missing before ')'"),
        ("stack(lora", "')' is missing before 'the end'"),
        ("stack(lora) lora", "'lora' comes after its end"),
        ("stack(lora,,ia3)", "a name is missing before ','"),
        ("pile(lora)", "'pile' is not one of stack, parallel, average, average_maps"),
        ("bank(lora)", "'bank' is not one of"),
        ("stack(0.5*lora)", "only average and average_maps take weights, not stack"),
        ("average(0.5*lora,ia3)", "give weights to all members of average, or to none"),
        ("average(half*lora,0.5*ia3)", "'half' is not a number"),
        ("stack(nowhere)", "'nowhere' is neither the folder of an adapter nor one of the presets"),
        ("(lora)", "a name is missing before '('"),
    ],
)
def test_what_cannot_be_read(text, message):
    with pytest.raises(ValueError, match="is not a valid composition") as error:
        compositions.parse(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("method", "flags", "message"),
    [
        ("stack({a})", {}, "all members of the composition are saved adapters"),
        ("stack({a},lora)", {"train-members": "x"}, "--train-members names 'x'; the members are"),
        ("lora", {"train-members": "x"}, "--method lora is not a composition"),
        ("stack({a},lora)", {"train-members": "0"}, "leaves out the preset '1'"),
        ("stack({a},lora)", {"task": "movie,tweet"}, "tasks cannot share a composition"),
        ("stack({a},lora)", {"phm-dim": "2"}, "--phm-dim applies to new members of a composition"),
        (
            "stack(ia3,lora)",
            {},
            "no default learning rate (ia3 0.01, lora 0.003); give --learning-rate",
        ),
        ("stack(full)", {}, "'full' cannot be a member of 'stack'"),
    ],
)
def test_compositions_that_are_refused(
    method, flags, message, saved, files, tiny_backbone, tmp_path, capsys
):
    method = method.format(a=saved / "a")
    flags = {"output-dir": tmp_path / "out", "backbone": tiny_backbone, "method": method, **flags}
    flags["max-length"] = 40
    if "task" not in flags:
        flags |= {f"{split}-file": path for split, path in files.items()}
    given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    assert message in refusal(capsys, "fit", *given)
    assert not (tmp_path / "out").exists()


# --- training ------------------------------------------------------------------------------------


def test_a_task_adapter_is_trained_on_top_of_a_frozen_one(
    language, files, tiny_backbone, tmp_path, capsys
):
    method = f"stack(language={language}, task=compacter++)"
    output = fit(tiny_backbone, files, tmp_path / "out", method)
    leaves, frozen = stored(output / "adapter"), stored(language)
    kept = of_member(leaves, "language")
    assert kept
    for path, leaf in kept.items():
        np.testing.assert_array_equal(leaf, frozen[path])
    # The member has its own head, not that of a language model.
    assert not any(path.startswith("cls/") for path in leaves)
    task = of_member(leaves, "task")
    assert max(np.abs(leaf).max() for path, leaf in task.items() if "/up/" in path) > 1e-3
    result = json.loads((output / "metrics.json").read_text())
    backbone = cj.load_backbone(tiny_backbone, head="sequence_classification", num_labels=2)
    alone = cj.init_adapters(
        cj.Adapted(backbone.module, cj.preset("compacter++", reduction_factor=2)),
        backbone,
        jax.random.key(0),
    )
    # The same number as for the new member alone.
    method = cj.preset("compacter++", reduction_factor=2)
    assert result["trained_parameters"] == cj.count(alone, cj.label_params(alone, method)).trained
    # The command gives the predictions that the library computes with both adapters.
    model, params = cj.load_adapter(output / "adapter", backbone)
    source = write_jsonl(tmp_path / "in.jsonl", [{"sentence": " ".join(GOOD)}])
    target = tmp_path / "out.jsonl"
    flags = ["--adapter", output / "adapter", "--input", source, "--output", target]
    assert main(["predict", *map(str, flags), "--logits"]) == 0
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(tiny_backbone)(" ".join(GOOD), return_tensors="np")
    of_language = cj.load_adapter(language, cj.load_backbone(tiny_backbone, head="masked_lm"))
    by_hand = cj.set_member(model, params, "language", of_language)
    logits = model.apply({"params": by_hand}, tokens["input_ids"])
    np.testing.assert_allclose(read_jsonl(target)[0]["logits"], logits[0], atol=1e-5)


def test_members_beside_each_other_learn_as_each_does_alone(
    saved, files, tiny_backbone, rows, tmp_path
):
    both = fit(
        tiny_backbone,
        files,
        tmp_path / "both",
        f"parallel(a={saved}/a,b={saved}/b)",
        **{"train-members": "a,b", "clip-norm": 0},
    )
    together = json.loads((both / "metrics.json").read_text())["history"][-1]
    losses = []
    for name in ("a", "b"):
        alone = fit(
            tiny_backbone,
            files,
            tmp_path / name,
            f"stack({saved}/{name})",
            **{"train-members": "0", "clip-norm": 0},
        )
        record = json.loads((alone / "metrics.json").read_text())["history"][-1]
        losses.append(record["validation_loss"])
        # Apart from its epsilon, Adam ignores that the mean of two losses has half the gradient.
        assert together[f"{name}/loss"] == pytest.approx(record["validation_loss"], rel=2e-3)
        before, after = stored(saved / name / "adapter"), of_member(stored(both / "adapter"), name)
        assert any(np.abs(after[path] - before[path]).max() > 1e-3 for path in after)
    assert together["validation_loss"] == pytest.approx(np.mean(losses), rel=2e-3)
    # Each member of the saved composition predicts what it predicts alone.
    found = predicted(both / "adapter", rows, tmp_path)
    backbone = cj.load_backbone(tiny_backbone, head="sequence_classification", num_labels=2)
    composed = cj.load_adapter(both / "adapter", backbone)
    settings = cj.read_adapter_config(both / "adapter")
    needed = ("backbone", "max_length", "kind", "label_names", "dtype")
    for name in ("a", "b"):
        member = tmp_path / f"member-{name}"
        of_task = {key: settings[key] for key in needed}
        cj.save_adapter(member, *cj.get_member(*composed, name), metadata=of_task)
        wanted = predicted(member, rows, tmp_path)
        own = logits_of(found, f"logits_{name}")
        np.testing.assert_allclose(own, logits_of(wanted), atol=1e-5)
        labels = [row["prediction"] for row in wanted]
        assert [row[f"prediction_{name}"] for row in found] == labels


@pytest.mark.parametrize("kind", ["average", pytest.param("average_maps", marks=pytest.mark.slow)])
def test_one_of_two_saved_adapters_is_trained_on(kind, saved, files, tiny_backbone, tmp_path):
    output = fit(
        tiny_backbone,
        files,
        tmp_path / "out",
        f"{kind}(0.25*{saved}/a,0.75*{saved}/b)",
        **{"train-members": "1"},
    )
    leaves = stored(output / "adapter")
    for name, run, moves in (("0", "a", False), ("1", "b", True)):
        before = stored(saved / run / "adapter")
        now = of_member(leaves, name)
        assert now
        moved = max(np.abs(leaf - before[path]).max() for path, leaf in now.items())
        assert (moved > 1e-3) == moves
        assert moves or moved == 0
    # A saved composition can be a member of another composition.
    again = fit(tiny_backbone, files, tmp_path / "again", f"stack({output}, lora)")
    inner = of_member(stored(again / "adapter"), "0/1")
    assert inner
    for path, leaf in inner.items():
        np.testing.assert_array_equal(leaf, of_member(leaves, "1")[path])


def test_a_composition_on_a_t5(tiny_t5, tmp_path, capsys):
    files = write_splits(tmp_path, {"train": 24, "validation": 12})
    flags = {"epochs": 1, "learning-rate": 1e-2}
    runs = {}
    for name, method in {
        "first": "houlsby",
        "second": f"stack({tmp_path}/first,lora)",
        "third": f"average({tmp_path}/first,lora)",
    }.items():
        runs[name] = tmp_path / name
        given = t5_flags(tiny_t5, files, runs[name], **flags, method=method)
        given = given if name == "first" else without_factor(given)
        assert main(["fit", *given]) == 0, name
    before = stored(runs["first"] / "adapter")
    for name in ("second", "third"):
        kept = of_member(stored(runs[name] / "adapter"), "0")
        assert kept
        for path, leaf in kept.items():
            np.testing.assert_array_equal(leaf, before[path])
    capsys.readouterr()
    given = t5_flags(tiny_t5, files, tmp_path / "none", **flags, method="parallel(lora,ia3)")
    message = refusal(capsys, "fit", *without_factor(given))
    assert "parallel adapters need an encoder" in message


def test_two_seeds_of_a_composition_at_once(saved, files, tiny_backbone, tmp_path):
    method = f"stack({saved}/a,lora)"
    alone = fit(tiny_backbone, files, tmp_path / "alone", method, seed=1)
    both = fit(tiny_backbone, files, tmp_path / "both", method, seeds="0,1")
    wanted, found = stored(alone / "adapter"), stored(both / "seed-1" / "adapter")
    assert wanted.keys() == found.keys()
    for path, leaf in wanted.items():
        # Adam divides by values near zero at first, which magnifies rounding errors.
        np.testing.assert_allclose(found[path], leaf, atol=1e-4, err_msg=path)


# --- use -----------------------------------------------------------------------------------------


def predicted(adapter, rows, folder, *more):
    source, target = write_jsonl(folder / "in.jsonl", rows), folder / "out.jsonl"
    flags = ["--adapter", adapter, "--input", source, "--output", target, "--logits", *more]
    assert main(["predict", *map(str, flags)]) == 0
    return read_jsonl(target)


@pytest.fixture
def rows():
    generator = np.random.default_rng(3)
    lengths = generator.integers(1, 25, 37)
    return [{"sentence": " ".join(generator.choice(BAD + GOOD, length))} for length in lengths]


def logits_of(found, name="logits"):
    return np.array([row[name] for row in found])


def test_adapters_beside_each_other_predict_what_each_does(saved, rows, tmp_path, capsys):
    """Each parallel adapter predicts what it predicts alone, also with its own labels."""
    together = predicted(f"parallel(x={saved}/a,y={saved}/three/adapter)", rows, tmp_path)
    for name, run in {"x": "a", "y": "three"}.items():
        alone = predicted(saved / run / "adapter", rows, tmp_path)
        own = logits_of(together, f"logits_{name}")
        np.testing.assert_allclose(own, logits_of(alone), atol=1e-5)
        for one, two in zip(together, alone, strict=True):
            assert one[f"prediction_{name}"] == two["prediction"]
            assert one[f"probability_{name}"] == pytest.approx(two["probability"], abs=1e-5)
    assert set(together[0]) == {
        "sentence",
        *(f"{column}_{name}" for name in "xy" for column in (
            "prediction", "label_id", "probability", "logits"
        )),
    }  # fmt: skip
    capsys.readouterr()
    message = refusal(
        capsys, "evaluate", "--adapter", f"parallel({saved}/a,{saved}/three)", "--task", "movie"
    )
    assert "have different labels" in message


def test_an_average_with_all_the_weight_on_one_is_that_one(saved, rows, tmp_path):
    alone = {run: logits_of(predicted(saved / run / "adapter", rows, tmp_path)) for run in "ab"}
    found = {}
    for kind in ("average", "average_maps"):
        for weights in ((1, 0), (0, 1), (0.5, 0.5)):
            text = f"{kind}({weights[0]}*{saved}/a,{weights[1]}*{saved}/b)"
            found[kind, weights] = logits_of(predicted(text, rows, tmp_path))
        np.testing.assert_allclose(found[kind, (1, 0)], alone["a"], atol=1e-5)
        np.testing.assert_allclose(found[kind, (0, 1)], alone["b"], atol=1e-5)
        assert np.abs(found[kind, (0.5, 0.5)] - alone["a"]).max() > 1e-3


def test_an_average_is_evaluated(saved, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scores = {}
    for name, adapter in {
        "a": saved / "a" / "adapter",
        "all of a": f"average(1*{saved}/a,0*{saved}/b)",
    }.items():
        flags = ["--adapter", adapter, "--validation-file", files["validation"], "--task", "own"]
        flags += ["--split", "validation", "--output", tmp_path / f"{name}.json"]
        assert main(["evaluate", *map(str, flags)]) == 0
        scores[name] = json.loads((tmp_path / f"{name}.json").read_text())["metrics"]
    assert scores["a"] == pytest.approx(scores["all of a"], abs=1e-5)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("average({a},lora)", "'lora' is a preset, which is not trained"),
        ("average({a},{three})", "must share their label_names"),
        ("stack({a},{b})", "set train_layer_norms=False in all but one"),
    ],
)
def test_saved_adapters_that_do_not_compose(adapter, message, saved, rows, tmp_path, capsys):
    adapter = adapter.format(a=saved / "a", b=saved / "b", three=saved / "three")
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    flags = ["--adapter", adapter, "--input", source, "--output", tmp_path / "out.jsonl"]
    assert message in refusal(capsys, "predict", *flags)
    assert not (tmp_path / "out.jsonl").exists()


def test_what_a_composition_trains_is_counted(saved, tiny_backbone, capsys):
    def groups(method, *flags):
        command = ["params", "--backbone", tiny_backbone, "--json", "--method", method, *flags]
        assert main([str(part) for part in [*command, "--reduction-factor", "2"]]) == 0
        record = json.loads(capsys.readouterr().out)
        return record["trained"], {name: each["trained"] for name, each in record["groups"].items()}

    dense, new = groups("pfeiffer-feed-forward")[1], groups("compacter++")[0]
    assert groups("stack(pfeiffer-feed-forward,compacter++)")[0] == dense["adapters"] + new
    average = f"average(old={saved / 'a'},new=compacter++)"
    assert groups(average)[0] == new
    assert groups(average, "--train-members", "old,new")[0] == 2 * new
    command = ["params", "--backbone", tiny_backbone, "--method", "lora", "--train-members", "old"]
    assert "--method lora is not a composition" in refusal(capsys, *command)
