"""Presets, values that cannot work, and the way through JSON."""

import dataclasses
import json
import subprocess
import sys

import pytest

from compacter_jax.config import (
    METHODS,
    BottleneckConfig,
    FullFineTuningConfig,
    PHMBottleneckConfig,
    from_dict,
    preset,
    presets,
    to_dict,
)

BOTH_SITES = ("attention", "feed_forward")
# What the papers' comparison says of each preset; what is not named is the dataclass' default.
PRESETS = {
    "full": (FullFineTuningConfig, {"train_pooler": True}),
    "houlsby": (
        BottleneckConfig,
        {"sites": BOTH_SITES, "w_init": "normal", "w_init_range": 1e-2, "train_pooler": False},
    ),
    "phm": (
        PHMBottleneckConfig,
        {
            "sites": BOTH_SITES,
            "phm_dim": 12,
            "factorized_phm_W": False,
            "shared_phm_rule": False,
            "phm_init_range": 1e-2,
            "w_init": "glorot-uniform",
        },
    ),
    "compacter": (
        PHMBottleneckConfig,
        {
            "sites": BOTH_SITES,
            "phm_dim": 4,
            "phm_rank": 1,
            "factorized_phm_W": True,
            "shared_phm_rule": True,
            "factorized_phm_rule": False,
            "shared_W_phm": False,
            "learn_phm": True,
            "phm_c_init": "normal",
            "phm_init_range": 1e-4,
            "w_init": "glorot-uniform",
        },
    ),
    "compacter++": (PHMBottleneckConfig, {"sites": ("feed_forward",), "phm_dim": 4}),
}


def test_presets_are_those_of_the_table():
    assert presets() == tuple(PRESETS)
    assert {cls.kind for cls, _ in PRESETS.values()} == set(METHODS)


@pytest.mark.parametrize("name", PRESETS)
def test_preset(name):
    cls, fields = PRESETS[name]
    method = preset(name)
    assert type(method) is cls
    assert {field: getattr(method, field) for field in fields} == fields
    assert method.train_layer_norms
    assert method.train_head
    if isinstance(method, BottleneckConfig):
        assert (method.reduction_factor, method.non_linearity) == (32, "gelu_new")
        assert (method.scaling, method.dropout) == (1.0, 0.0)
        assert not method.layer_norm_before
        assert not method.layer_norm_after
        assert method.leave_out == ()


def test_compacter_and_its_plus_plus_differ_in_sites_alone():
    assert preset("compacter++", sites=BOTH_SITES) == preset("compacter")


def test_overrides_replace_fields_and_leave_the_preset_alone():
    method = preset("compacter", reduction_factor=16, sites=["attention"], scaling=2)
    assert (method.reduction_factor, method.sites, method.scaling) == (16, ("attention",), 2.0)
    assert type(method.scaling) is float
    assert preset("compacter").reduction_factor == 32


@pytest.mark.parametrize("name", PRESETS)
def test_methods_are_frozen_and_hashable(name):
    method = preset(name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.train_head = False
    assert hash(method) == hash(preset(name))
    assert {method: 1}[preset(name)] == 1
    assert method != preset(name, train_head=False)


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_through_json(name):
    method = preset(name, train_head=False)
    values = json.loads(json.dumps(to_dict(method), allow_nan=False))
    assert from_dict(values) == method
    assert values["kind"] == method.kind
    assert values.keys() - {"kind"} == {field.name for field in dataclasses.fields(method)}


def test_round_trip_of_every_field_changed():
    method = preset(
        "compacter",
        sites=("feed_forward",),
        leave_out=(0, 3),
        reduction_factor=8,
        non_linearity="relu",
        w_init="normal",
        w_init_range=0.5,
        scaling=-0.25,
        dropout=0.1,
        layer_norm_before=True,
        layer_norm_after=True,
        phm_dim=2,
        phm_rank=3,
        factorized_phm_W=False,
        shared_phm_rule=False,
        factorized_phm_rule=True,
        shared_W_phm=True,
        learn_phm=False,
        phm_c_init="uniform",
        phm_init_range=0.125,
        train_layer_norms=False,
        train_head=False,
        train_pooler=True,
    )
    default = to_dict(PHMBottleneckConfig(train_layer_norms=True))
    changed = to_dict(method)
    assert [key for key in default if default[key] == changed[key]] == ["kind"]
    assert from_dict(json.loads(json.dumps(changed))) == method


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("compactr", {}, r"unknown method preset 'compactr' \(did you mean 'compacter'\?\); known"),
        ("x", {}, "unknown method preset 'x'; known are full, houlsby, phm, compacter, compacter"),
        (
            "compacter",
            {"reduction_facto": 16},
            r"has no field 'reduction_facto' \(did you mean 'reduction_factor'\?\); its fields are",
        ),
        ("houlsby", {"phm_dim": 4}, "method 'bottleneck' has no field 'phm_dim'"),
        ("full", {"kind": "phm"}, "method 'full' has no field 'kind'"),
        # Types.
        ("compacter", {"sites": "attention"}, "sites='attention' must be a list"),
        ("compacter", {"sites": [1]}, "sites=1 must be of type str"),
        ("compacter", {"leave_out": ["1"]}, "leave_out='1' must be of type int"),
        ("compacter", {"leave_out": [True]}, "leave_out=True must be of type int"),
        ("compacter", {"leave_out": 3}, "leave_out=3 must be a list"),
        ("compacter", {"phm_dim": True}, "phm_dim=True must be of type int"),
        ("compacter", {"phm_dim": 4.0}, "phm_dim=4.0 must be of type int"),
        ("compacter", {"phm_dim": None}, "phm_dim=None must be of type int"),
        ("compacter", {"learn_phm": 1}, "learn_phm=1 must be of type bool"),
        ("compacter", {"scaling": True}, "scaling=True must be of type float"),
        ("compacter", {"scaling": "1"}, "scaling='1' must be of type float"),
        # Values.
        ("compacter", {"sites": ()}, "sites is empty; name at least one, 'feed_forward'"),
        ("compacter", {"sites": ("attention",) * 2}, "sites names 'attention' twice"),
        ("compacter", {"reduction_factor": 0}, "reduction_factor=0 must be at least 1"),
        ("compacter", {"leave_out": (-1,)}, "leave_out=-1 must be layer indices from 0 on"),
        ("compacter", {"w_init": "zeros"}, "unknown w_init='zeros'; use one of glorot-uniform, "),
        ("compacter", {"phm_c_init": "glorot"}, "phm_c_init='glorot'; use one of normal, uniform"),
        ("compacter", {"w_init_range": 0.0}, "w_init_range=0.0 must be above 0"),
        ("compacter", {"phm_init_range": -1.0}, "phm_init_range=-1.0 must be above 0"),
        ("compacter", {"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ("compacter", {"dropout": -0.1}, r"dropout=-0.1 must be in \[0, 1\)"),
        ("compacter", {"phm_dim": 0}, "phm_dim=0 must be at least 1"),
        ("compacter", {"phm_rank": 0}, "phm_rank=0 must be at least 1"),
    ],
)
def test_what_cannot_work_names_what_would(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        preset(name, **overrides)


@pytest.mark.parametrize("field", ["scaling", "dropout", "w_init_range", "phm_init_range"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_floats_must_be_finite(field, value):
    with pytest.raises(ValueError, match=rf"{field}={value} must be finite"):
        preset("compacter", **{field: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "unknown kind of method None; known are full, bottleneck, phm_bottleneck"),
        ({"kind": "lora"}, "unknown kind of method 'lora'"),
        ({"kind": ["full"]}, r"unknown kind of method \['full'\]"),
        ({"kind": "full", "phm_dim": 4}, "method 'full' has no field 'phm_dim'"),
        ({"kind": "phm_bottleneck", "phm_dim": 0}, "phm_dim=0 must be at least 1"),
    ],
)
def test_from_dict_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(values)


def test_from_dict_leaves_its_argument_alone():
    values = to_dict(preset("compacter"))
    before = dict(values)
    from_dict(values)
    assert values == before


@pytest.mark.parametrize(
    ("width", "overrides", "bottleneck"),
    [
        (768, {}, 24),
        (384, {}, 12),
        (768, {"reduction_factor": 16, "phm_dim": 12}, 48),
        (100, {"reduction_factor": 32, "phm_dim": 1}, 3),
        (8, {"reduction_factor": 1, "phm_dim": 8}, 8),
    ],
)
def test_bottleneck_width(width, overrides, bottleneck):
    assert preset("compacter", **overrides).bottleneck_width(width) == bottleneck


@pytest.mark.parametrize(
    ("name", "width", "overrides", "message"),
    [
        (
            "compacter",
            384,
            {"phm_dim": 5},
            r"phm_dim=5 does not divide both the width 384 and the bottleneck width 12 "
            r"\(384 // 32\); use 1, 2, 3, 4, 6 or 12",
        ),
        ("compacter", 768, {"phm_dim": 5}, "use 1, 2, 3, 4, 6, 8, 12 or 24"),
        # Divides the width but not the bottleneck, and the other way round.
        ("compacter", 96, {"phm_dim": 4}, r"bottleneck width 3 \(96 // 32\); use 1 or 3"),
        ("compacter", 98, {"phm_dim": 3}, r"bottleneck width 3 \(98 // 32\); use 1$"),
        ("compacter", 31, {}, "reduction_factor=32 leaves no bottleneck beside a width of 31; use"),
        ("houlsby", 31, {}, "use at most 31"),
    ],
)
def test_widths_that_do_not_fit(name, width, overrides, message):
    with pytest.raises(ValueError, match=message):
        preset(name, **overrides).bottleneck_width(width)


def test_the_module_needs_the_standard_library_alone():
    """Loaded by its path: importing it by name would import the package, and so JAX."""
    program = (
        "import importlib.util, sys\n"
        "before = set(sys.modules)\n"
        "spec = importlib.util.spec_from_file_location('config', sys.argv[1])\n"
        "config = sys.modules['config'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(config)\n"
        "config.preset('compacter')\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before} - {'config'}\n"
        "print(sorted(new - sys.stdlib_module_names))\n"
    )
    path = sys.modules[preset.__module__].__file__
    run = [sys.executable, "-c", program, path]
    assert subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip() == "[]"
