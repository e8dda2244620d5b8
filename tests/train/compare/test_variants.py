"""The methods of a comparison: variants of presets, their names, and the folders they name."""

import json

import pytest

from tests.train.cli.test_cli import refusal
from train.cli.method_flags import variant
from train.compare.options import CompareOptions
from train.compare.plan import points


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    """A folder with `DIR`, which is as much of a BERT as a plan reads."""
    (tmp_path / "DIR").mkdir()
    (tmp_path / "DIR" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("lora", {}),
        ("lora:rank=1:use_rslora=True", {"rank": 1, "use_rslora": True}),
        ("lora:sites=query+key:leave_out=0+1", {"sites": ("query", "key"), "leave_out": (0, 1)}),
        ("houlsby:residual_before_ln=True", {"residual_before_ln": True}),
        ("houlsby:residual_before_ln=post_add", {"residual_before_ln": "post_add"}),
        ("compacter:phm_init_range=1e-2:w_init_up=zeros", {"phm_init_range": 0.01}),
    ],
)
def test_a_variant_has_values_of_the_types_of_its_fields(text, values):
    name, found = variant(text)
    assert name == text.partition(":")[0]
    assert {key: found[key] for key in values} == values
    assert {key: type(found[key]) for key in values} == {k: type(v) for k, v in values.items()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"methods": "lora:rank=-1"}, "rank=-1 must be at least 1"),
        ({"methods": "lora:rank="}, "'rank=' in 'lora:rank=' must have a value INT"),
        ({"methods": "lora:"}, "must be FIELD=VALUE, such as rank=1"),
        ({"methods": "lora:sites="}, "must have a value STR [...]"),
        ({"methods": "lora:sites=query+"}, "must have a value STR [...]"),
        ({"methods": "lora:rnk=1"}, "no method has this field (did you mean 'rank'?)"),
        ({"methods": "lora:rank=1:rank=2"}, "gives rank a second time; give it once"),
        ({"methods": "lora:train_head=yes"}, "must have a value {True,False}"),
        ({"methods": "houlsby:residual_before_ln=x"}, "must have a value {True,False,post_add}"),
        ({"methods": "compacter:w_init_up=x"}, "must have a value {same,zeros}"),
        ({"methods": "mam:dropout=0.1"}, "'dropout' is a field of 2 of the parts"),
        # One folder each, which would be two names of one thing.
        ({"methods": "lora:rank=1,lora:rank=01"}, "'lora:rank=01' and 'lora:rank=1' are the same"),
        ({"methods": "lora:rank=1,lora", "rank": 1}, "'lora' and 'lora:rank=1' are the same"),
        (
            {"methods": "lora:rank=1:lora_alpha=2,lora:lora_alpha=2:rank=1"},
            "are the same method; name it once",
        ),
        # Folders outside the comparison's own.
        ({"methods": "lora:sites=../../x"}, "names a folder; write its values with letters"),
        ({"methods": "compacter:non_linearity=../../x"}, "names a folder; write its values"),
        ({"methods": "lora:rank= 1"}, "names a folder; write its values with letters"),
        ({"task": "../../x"}, "--task '../../x' names a folder of the comparison"),
        ({"task": ".."}, "--task '..' names a folder of the comparison"),
        ({"task": "movie,a\\b"}, "names a folder of the comparison"),
        ({"train-size": "10,10"}, "--train-size '10,10' must be different numbers"),
        ({"methods": "stack(lora,ia3)"}, "must be presets or variants of them; fit trains comp"),
    ],
)
def test_what_is_refused(flags, message, tmp_path, capsys):
    values = {"backbone": "DIR", "output-dir": tmp_path / "out", **flags}
    given = [part for key, value in values.items() for part in (f"--{key}", value)]
    assert message in refusal(capsys, "compare", *given)
    assert not (tmp_path / "out").exists()


def test_a_method_that_trains_nothing_of_a_t5(tmp_path, capsys):
    (tmp_path / "DIR" / "config.json").write_text(json.dumps({"model_type": "t5"}))
    given = ["--backbone", "DIR", "--output-dir", tmp_path / "out", "--methods", "lora,head-only"]
    error = refusal(capsys, "compare", *given)
    assert "'head-only' trains nothing of DIR, which has no head of the task" in error
    assert not (tmp_path / "out").exists()
    methods = "head-only:train_layer_norms=True,full,bitfit"
    options = CompareOptions(backbone="DIR", output_dir=tmp_path, methods=methods)
    assert [point.method for point in points([options])] == methods.split(",")


def test_presets_that_differ_in_the_name_are_different_methods(tmp_path):
    """Each has a learning rate of its own."""
    names = ["compacter++", "compacter:sites=feed_forward", "lora:rank=8", "lora:rank=4"]
    options = CompareOptions(backbone="DIR", output_dir=tmp_path, methods=",".join(names))
    assert [point.method for point in points([options])] == names
