"""The names of each family's parameters, compared with the parameters of its modules."""

import dataclasses
import functools
import inspect

import jax
import pytest
from flax.traverse_util import flatten_dict

from compacter_jax.models.families import FAMILIES
from compacter_jax.models.names import NAMES
from compacter_jax.paths import FROZEN_HEAD, group_of, has_labels, own_names
from train.compute import mesh

# One of each set of modules, since some `model_type` share theirs.
SETS = ("bert", "roberta", "electra", "distilbert", "t5", "m2m_100", "speech_to_text")
HEADS = [(model_type, head) for model_type in SETS for head in FAMILIES[model_type].heads]


def config_of(model_type):
    cls = FAMILIES[model_type].config_class
    named = "model_type" in {field.name for field in dataclasses.fields(cls)}
    return cls(model_type=model_type) if named else cls()


def module_of(model_type, head):
    return FAMILIES[model_type].module_class(config_of(model_type), head=head)


@functools.cache
def shapes_of(model_type, head):
    module = module_of(model_type, head)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.dummy_inputs())["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(shapes, sep="/").items()}


def test_every_family_has_its_row_and_every_row_a_family():
    rows = {family.module_class.__name__: family.names for family in FAMILIES.values()}
    assert rows == NAMES
    for family in FAMILIES.values():
        assert family.module_class.word_embeddings == family.names.embeddings


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_other_modules_ask_a_backbone(model_type):
    family = FAMILIES[model_type]
    parameters = inspect.signature(family.module_class.__call__).parameters
    assert tuple(parameters)[1 : 1 + len(family.inputs)] == family.inputs
    config = config_of(model_type)
    assert config.vocab_size > 0
    assert config.hidden_size > 0
    assert family.writes_text or 0 < family.max_tokens(config) == config.max_positions
    assert not family.ties or isinstance(config.tie_word_embeddings, bool)


@pytest.mark.parametrize(("model_type", "head"), HEADS)
def test_the_names_are_those_of_the_modules(model_type, head):
    shapes, family = shapes_of(model_type, head), FAMILIES[model_type]
    names, config = family.names, config_of(model_type)
    assert [path for path in shapes if not names.has(path)] == []
    assert shapes[names.embeddings][0] == config.vocab_size
    assert own_names(list(shapes)) is names
    tops = {path.partition("/")[0] for path in shapes}
    task_heads = {top for top in tops if group_of(f"{top}/kernel") == "head"}
    assert task_heads <= {*family.optional}  # a checkpoint for another task lacks them
    labelled = {path for path in shapes if has_labels(path)}
    if labelled and head != "question_answering":  # whose two columns some call a classifier's
        wider = module_of(model_type, head).clone(num_labels=7)
        shape = jax.eval_shape(wider.init, jax.random.key(0), *wider.dummy_inputs())["params"]
        changed = flatten_dict(shape, sep="/")
        assert {path for path in shapes if changed[path].shape != shapes[path]} == labelled


@pytest.mark.parametrize(("model_type", "head"), HEADS)
def test_norms_are_found_unless_they_are_of_the_pre_training(model_type, head):
    family = FAMILIES[model_type]
    for path in shapes_of(model_type, head):
        if path.endswith("/scale"):
            wanted = "backbone" if FROZEN_HEAD.fullmatch(path) else "layer norms"
            if path.startswith(family.names.poolers or "\0"):
                wanted = "pooler"
            assert group_of(path) == wanted, path


@pytest.mark.parametrize(("model_type", "head"), HEADS)
def test_a_mesh_divides_every_kernel_of_a_layer_and_the_vocabulary(model_type, head):
    family = FAMILIES[model_type]
    sizes, names = {"data": 2, "model": 2}, family.names
    for path, shape in shapes_of(model_type, head).items():
        axes = {axis for axis in mesh.spec_of(path, shape, sizes) if axis is not None}
        in_layers = any(path.startswith(f"{prefix}/") for prefix in family.depths.values())
        if path == names.embeddings:
            assert mesh.MODEL in axes, path
        elif in_layers and path.endswith("/kernel"):
            assert axes == {mesh.DATA, mesh.MODEL}, path


@pytest.mark.parametrize("model_type", SETS)
def test_other_names_are_of_no_family(model_type):
    paths, family = list(shapes_of(model_type, None)), FAMILIES[model_type]
    added = ["classifier/task/kernel", "phm_rule", f"{paths[-1].rpartition('/')[0]}/adapter/bias"]
    assert own_names([*paths, *added]) is family.names
    assert own_names([*paths, "encoder/strange/kernel"]) is None
    assert own_names([path for path in paths if path != family.names.embeddings]) is None
