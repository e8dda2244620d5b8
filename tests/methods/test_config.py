"""Tests presets, invalid values, and the conversion to JSON and back."""

import dataclasses
import json

import pytest

from compacter_jax.catalogue import METHODS, from_dict, preset, presets, to_dict
from compacter_jax.compositions.base import Composition
from compacter_jax.methods.base import FullFineTuningConfig, InsertedConfig
from compacter_jax.methods.bottleneck import BottleneckConfig
from compacter_jax.methods.combined import CombinedConfig
from compacter_jax.methods.compacter import PHMBottleneckConfig
from compacter_jax.methods.lora import LoRAConfig
from tests.methods.rows import BOTH_SITES, CHANGED, ROWS


def test_presets_are_those_of_the_table():
    assert presets() == tuple(ROWS)
    assert {row.cls.kind for row in ROWS.values()} | {"invertible", "trained_sites"} == set(METHODS)
    assert {kind: cls.kind for kind, cls in METHODS.items()} == {kind: kind for kind in METHODS}


@pytest.mark.parametrize("name", ROWS)
def test_preset(name):
    cls, fields = ROWS[name].cls, ROWS[name].values
    method = preset(name)
    assert type(method) is cls
    assert {field: getattr(method, field) for field in fields} == fields
    assert method.train_layer_norms == fields.get("train_layer_norms", False)
    assert method.train_pooler == fields.get("train_pooler", False)
    assert method.train_head


def test_every_preset_is_in_the_docstring():
    rows = [line.split("`")[1] for line in preset.__doc__.splitlines() if "| `" in line]
    assert rows == list(ROWS)


def test_compacter_and_its_plus_plus_differ_in_sites_alone():
    assert preset("compacter++", sites=BOTH_SITES) == preset("compacter")


def test_the_short_variant_differs_in_initial_values_alone():
    changes = {"phm_c_init": "normal", "w_init_up": "same"}
    assert preset("compacter++-short", **changes) == preset("compacter++")


def test_overrides_replace_fields_and_leave_the_preset_alone():
    method = preset("compacter", reduction_factor=16, sites=["attention"], scaling=2)
    assert (method.reduction_factor, method.sites, method.scaling) == (16, ("attention",), 2.0)
    assert type(method.scaling) is float
    assert preset("compacter").reduction_factor == 32


@pytest.mark.parametrize("name", ROWS)
def test_methods_are_frozen_and_hashable(name):
    method = preset(name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.train_head = False
    assert hash(method) == hash(preset(name))
    assert {method: 1}[preset(name)] == 1
    assert method != preset(name, train_head=False)


@pytest.mark.parametrize("name", ROWS)
def test_round_trip_through_json(name):
    method = preset(name, train_head=False)
    values = json.loads(json.dumps(to_dict(method), allow_nan=False))
    assert from_dict(values) == method
    assert values["kind"] == method.kind
    assert values.keys() - {"kind"} == {field.name for field in dataclasses.fields(method)}


OF_ALL = {"train_layer_norms": True, "train_head": False, "train_pooler": True}
# `shift_positions` does not allow `leave_out`.
UNCHANGED = {"prefix_tuning": ["leave_out"], "invertible": ["coupling"]}


@pytest.mark.parametrize("kind", METHODS)
def test_round_trip_of_every_field_changed(kind):
    cls = METHODS[kind]
    method = cls(**OF_ALL | CHANGED[kind])
    default = to_dict(cls(parts=(LoRAConfig(),)) if kind == "combined" else cls())
    changed = to_dict(method)
    same = [name for name in default if default[name] == changed[name]]
    assert same == ["kind", *UNCHANGED.get(kind, [])]
    assert from_dict(json.loads(json.dumps(changed, allow_nan=False))) == method


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        (
            "compactr",
            {},
            r"unknown method preset 'compactr' \(did you mean 'compacter'\?\); use one of",
        ),
        ("x", {}, "unknown method preset 'x'; use one of full, head-only, houlsby, pfeiffer-att"),
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
        ("compacter", {"scaling": 10**400}, "scaling=inf must be finite"),
        (
            "compacter",
            {"residual_before_ln": "after"},
            "residual_before_ln='after' must be one of True, False, 'post_add'",
        ),
        ("compacter", {"residual_before_ln": 1}, "residual_before_ln=1 must be one of True, False"),
        (
            "compacter",
            {"residual_before_ln": "post_add"},
            "residual_before_ln='post_add' needs .* the residual; set original_ln_before=True",
        ),
        # Values.
        ("compacter", {"sites": ()}, "sites is empty; name at least one, 'feed_forward'"),
        ("compacter", {"sites": ("attention",) * 2}, "sites names 'attention' twice"),
        ("compacter", {"reduction_factor": 0}, "reduction_factor=0 must be at least 1"),
        ("compacter", {"leave_out": (-1,)}, "leave_out=-1 must be layer indices from 0 on"),
        ("compacter", {"w_init": "zeros"}, "unknown w_init='zeros'; use one of glorot-uniform, "),
        ("compacter", {"phm_c_init": "xavier"}, "phm_c_init='xavier'; use one of normal, uniform"),
        ("compacter", {"w_init_up": "normal"}, "w_init_up='normal' must be one of 'same', 'zeros'"),
        ("compacter", {"w_init_range": 0.0}, "w_init_range=0.0 must be above 0"),
        ("compacter", {"phm_init_range": -1.0}, "phm_init_range=-1.0 must be above 0"),
        ("compacter", {"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ("compacter", {"dropout": -0.1}, r"dropout=-0.1 must be in \[0, 1\)"),
        ("compacter", {"phm_dim": 0}, "phm_dim=0 must be at least 1"),
        ("compacter", {"phm_rank": 0}, "phm_rank=0 must be at least 1"),
        (
            "compacter",
            {"w_init": "lora"},
            "unknown w_init='lora'; use one of .*uniform, .*normal, n",
        ),
        ("low-rank", {"w_init": "lora"}, "w_init='lora'; use one of glorot-uniform, glorot-normal"),
        (
            "parallel",
            {"w_init": "zeros"},
            "use one of glorot-uniform, glorot-normal, normal, lora$",
        ),
        ("low-rank", {"rank": 0}, "rank=0 must be at least 1"),
        ("lora", {"rank": 0}, "rank=0 must be at least 1"),
        ("lora", {"rank": True}, "rank=True must be of type int"),
        ("lora", {"lora_alpha": "8"}, "lora_alpha='8' must be of type float"),
        ("lora", {"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ("lora", {"sites": ()}, "sites is empty; name at least one"),
        ("lora", {"reduction_factor": 2}, "method 'lora' has no field 'reduction_factor'"),
        ("ia3", {"sites": (), "input_sites": ()}, "sites is empty; name at least one"),
        ("ia3", {"input_sites": ("key",)}, "sites names 'key' twice; name each site once"),
        ("ia3", {"leave_out": (-2,)}, "leave_out=-2 must be layer indices from 0 on"),
        ("prefix-tuning", {"prefix_length": 0}, "prefix_length=0 must be at least 1"),
        ("prefix-tuning", {"bottleneck_size": 0}, "bottleneck_size=0 must be at least 1"),
        ("prefix-tuning", {"dropout": -0.5}, r"dropout=-0.5 must be in \[0, 1\)"),
        (
            "prefix-tuning",
            {"shift_positions": True, "leave_out": (1,)},
            r"shift_positions=True and leave_out=\(1,\) cannot be combined: all layers share one "
            r"position bias",
        ),
        ("prompt-tuning-random", {"prompt_length": 0}, "prompt_length=0 must be at least 1"),
        ("prompt-tuning-random", {"prompt_init_range": 0.0}, "prompt_init_range=0.0 must be above"),
        (
            "prompt-tuning-random",
            {"prompt_init": "words"},
            "unknown prompt_init='words'; use one of",
        ),
        (
            "prompt-tuning-vocabulary",
            {"prompt_token_ids": (3, -1)},
            "=-1 must be ids of tokens, from",
        ),
        (
            "prompt-tuning-vocabulary",
            {"prompt_token_ids": "3"},
            "prompt_token_ids='3' must be a list",
        ),
        ("bitfit", {"sites": ("norm", "norm")}, "sites names 'norm' twice"),
        ("intrinsic", {"dimension": 0}, "dimension=0 must be at least 1"),
        ("intrinsic", {"dimension": 2e4}, "dimension=20000.0 must be of type int"),
        ("intrinsic", {"projection_seed": -1}, "projection_seed=-1 must be from 0 to 2"),
        (
            "intrinsic",
            {"projection_seed": 2**31},
            "projection_seed=2147483648 is too large; use at most",
        ),
        ("mam", {"parts": ()}, "parts is empty; name at least one method"),
        (
            "mam",
            {"parts": (FullFineTuningConfig(),)},
            r"parts=Full.* must be of type InsertedConfig",
        ),
        ("mam", {"parts": LoRAConfig()}, "parts=LoRAConfig.* must be a list"),
        (
            "mam",
            {"sites": ("query",)},
            "'sites' is a field of 2 of the parts prefix_tuning, bottleneck; replace `parts`",
        ),
        ("mam", {"rank": 2}, "'rank' is a field of none of the parts prefix_tuning, bottleneck"),
        ("mam", {"prefix_length": 0}, "prefix_length=0 must be at least 1"),
        (
            "mam",
            {"parts": (PHMBottleneckConfig(), PHMBottleneckConfig(phm_dim=2))},
            "2 of the parts share a rule or blocks under the same names, but have other settings",
        ),
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
        ({}, "unknown kind of method None; use one of full, head_only, bottleneck, low_rank"),
        ({"kind": "compacter"}, "unknown kind of method 'compacter'"),
        ("full", "a method must be a mapping of its fields, not 'full'"),
        ({"kind": "lora", "rnak": 4}, r"no field 'rnak' \(did you mean 'rank'\?\)"),
        ({"kind": "combined", "parts": [{"kind": "full"}]}, "must be of type InsertedConfig"),
        ({"kind": "combined", "parts": [{"kind": "x"}]}, "unknown kind of method 'x'"),
        ({"kind": "combined", "parts": ["lora"]}, "must be a mapping of its fields, not 'lora'"),
        ({"kind": "combined", "parts": {"kind": "lora"}}, "parts=.* must be a list"),
        ({"kind": "combined"}, "parts is empty"),
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
        ("compacter", 31, {}, "reduction_factor=32 leaves no bottleneck at a width of 31; use"),
        ("houlsby", 31, {}, "use at most 31"),
    ],
)
def test_widths_that_do_not_fit(name, width, overrides, message):
    with pytest.raises(ValueError, match=message):
        preset(name, **overrides).bottleneck_width(width)


# --- what is made of methods --------------------------------------------------------------------


def test_parts():
    lora = preset("lora")
    assert lora.inserted() == (lora,)
    assert preset("mam").inserted() == preset("mam").parts
    assert preset("full").inserted() == preset("intrinsic").inserted() == ()


def test_overrides_of_a_part():
    method = preset("mam", prefix_length=5, scaling=2, train_head=False)
    prefix, parallel = preset("mam").parts
    expected = (prefix.replace(prefix_length=5), parallel.replace(scaling=2.0))
    assert method == CombinedConfig(parts=expected, train_head=False)
    # The fields of the new parts.
    method = method.replace(parts=(preset("lora"), preset("ia3")), rank=2)
    assert method.parts == (preset("lora", rank=2), preset("ia3"))


def test_sharing_parts_beside_one_that_does_not():
    own = preset("phm", sites=("attention",))
    assert CombinedConfig(parts=(preset("compacter++"), own)).parts[1] == own


@pytest.mark.parametrize(
    ("overrides", "scaling"),
    [({}, 1.0), ({"rank": 2, "lora_alpha": 3}, 1.5), ({"rank": 4, "use_rslora": True}, 4.0)],
)
def test_scaling_of_lora(overrides, scaling):
    assert preset("lora", **overrides).scaling == scaling


def test_all_sites():
    assert preset("ia3").all_sites() == ("key", "value", "feed_forward")
    assert preset("compacter").all_sites() == BOTH_SITES


def test_the_dense_twin_differs_in_its_projections_alone():
    method = PHMBottleneckConfig(**OF_ALL | CHANGED["phm_bottleneck"])
    twin = method.dense_equivalent()
    assert type(twin) is BottleneckConfig
    own, phm = to_dict(twin), to_dict(method)
    assert [name for name in own if own[name] != phm[name]] == ["kind"]


# --- answers that a class lacks -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "arguments"),
    [("act", (None, 0, 0)), ("merged", ({}, {}, None, "")), ("dense_equivalent", ())],
)
def test_an_answer_that_is_missing_is_named(answer, arguments):
    method = InsertedConfig(sites=("query",))
    with pytest.raises(NotImplementedError, match=rf"InsertedConfig does not define {answer}\(\)"):
        getattr(method, answer)(*arguments)


def test_a_composition_names_the_answer_that_it_lacks():
    composition = Composition(preset("lora"))
    with pytest.raises(NotImplementedError, match=r"Composition does not define combine\(\)"):
        composition.combine(None, 0, 0)
