"""Exchanges ModernBERT's adapters with PEFT, which has one module `Wqkv` for three of our sites."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj
from tests.helpers import quick_jit, quick_key, random_tree
from tests.modernbert_models import inputs_of, small_backbone, tiny, torch_model, torch_output

CONFIG = tiny()
INPUTS = inputs_of(CONFIG, 3, 11)
TOLERANCE = {"rtol": 0, "atol": 2e-5}


@functools.cache
def backbone_with(head):
    return small_backbone(CONFIG, head)


def logits_of(model, params):
    run = quick_jit(lambda params: model.apply({"params": params}, *INPUTS))
    output = run(params)
    return np.asarray(getattr(output, "last_hidden_state", output))


@pytest.fixture(scope="module")
def peft():
    pytest.importorskip("torch")
    return pytest.importorskip("peft")


def trained(peft, backbone, config):
    """Returns a PEFT model with random values for all trained parameters."""
    import torch

    torch.manual_seed(0)
    model = peft.get_peft_model(torch_model(backbone), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def peft_output(model):
    import torch

    with torch.no_grad():
        return np.asarray(torch_output(model, *INPUTS))


FOLDERS = {
    "LoRA on the fused matrix": (
        "sequence_classification",
        "Lora",
        {"r": 3, "lora_alpha": 5, "target_modules": ["Wqkv"], "task_type": "SEQ_CLS"},
    ),
    "LoRA everywhere, norms and the head's layers too": (
        "token_classification",
        "Lora",
        {
            "r": 2,
            "use_rslora": True,
            "target_modules": ["Wqkv", "attn.Wo", "Wi", "mlp.Wo"],
            "layers_to_transform": [1],
            "modules_to_save": ["final_norm", "head.dense"],
            "task_type": "TOKEN_CLS",
        },
    ),
    "LoRA of a span": (
        "question_answering",
        "Lora",
        {"target_modules": ["Wi"], "modules_to_save": ["classifier"], "task_type": "QUESTION_ANS"},
    ),
    "LoRA of masked words": (
        "masked_lm",
        "Lora",
        {"target_modules": ["Wqkv", "mlp.Wo"], "task_type": "FEATURE_EXTRACTION"},
    ),
    "IA3": (
        None,
        "IA3",
        {
            "target_modules": ["Wqkv", "mlp.Wo"],
            "feedforward_modules": ["mlp.Wo"],
            "task_type": "FEATURE_EXTRACTION",
        },
    ),
    "prompts": (
        "sequence_classification",
        "PromptTuning",
        {"num_virtual_tokens": 3, "task_type": "SEQ_CLS"},
    ),
}


@pytest.mark.parametrize(("head", "kind", "fields"), FOLDERS.values(), ids=FOLDERS)
def test_logits_are_those_of_peft_and_stay_so_when_written(tmp_path, peft, head, kind, fields):
    """A folder of PEFT gives its logits to 2e-5, and written back its logits bit for bit."""
    backbone = backbone_with(head)
    theirs = trained(peft, backbone, getattr(peft, f"{kind}Config")(**fields))
    theirs.save_pretrained(tmp_path / "theirs")
    expected = peft_output(theirs)
    plain = peft_output(torch_model(backbone))
    assert np.abs(plain - expected).max() > 0.02
    model, params = cj.import_peft(tmp_path / "theirs", backbone)
    if "modules_to_save" not in fields:  # of which we train the whole group
        labels = cj.label_params(params, model.method)
        in_peft = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
        assert cj.count(params, labels).trained == in_peft
    np.testing.assert_allclose(logits_of(model, params), expected, **TOLERANCE)
    cj.export_peft(tmp_path / "ours", model, params)
    read = peft.PeftModel.from_pretrained(torch_model(backbone), tmp_path / "ours").eval()
    np.testing.assert_array_equal(peft_output(read), expected)


def adapted(method, head="sequence_classification"):
    """Returns a model on the backbone of `head`, and random parameters of its adapters."""
    backbone = backbone_with(head)
    model = cj.Adapted(backbone.module, method)
    params = cj.init_adapters(model, backbone, quick_key(0))
    kept = flatten_dict(backbone.params, sep="/")
    drawn = flatten_dict(random_tree(params, 4), sep="/")
    return model, unflatten_dict(
        {path: kept.get(path, leaf) for path, leaf in drawn.items()}, sep="/"
    )


OURS = {
    "query and value": cj.LoRAConfig(rank=2, lora_alpha=3.0),
    "all three, beside others": cj.LoRAConfig(
        sites=("value", "key", "query", "intermediate"), rank=2, use_rslora=True
    ),
    "one, and the fused one": cj.LoRAConfig(sites=("query", "query_key_value"), rank=1),
    "one layer": cj.LoRAConfig(sites=("key",), leave_out=(0,), rank=3),
    "factors": cj.IA3Config(),
}


@pytest.mark.parametrize("method", OURS.values(), ids=OURS)
def test_adapters_at_single_projections_are_written_for_the_fused_matrix(tmp_path, peft, method):
    """PEFT computes our logits to 2e-5, and so does what we read back."""
    model, params = adapted(method)
    expected = logits_of(model, params)
    cj.export_peft(tmp_path, model, params)
    backbone = backbone_with("sequence_classification")
    read = peft.PeftModel.from_pretrained(torch_model(backbone), tmp_path).eval()
    np.testing.assert_allclose(peft_output(read), expected, **TOLERANCE)
    again = cj.import_peft(tmp_path, backbone)
    np.testing.assert_allclose(logits_of(*again), expected, **TOLERANCE)
    assert np.abs(expected - logits_of(backbone.module, backbone.params)).max() > 0.02


def test_factors_of_the_input_of_a_single_projection_are_refused(tmp_path):
    """PEFT scales the input of queries, keys and values alike, so one alone is an error."""
    model, params = adapted(cj.IA3Config(sites=("value",), input_sites=("query",)))
    with pytest.raises(ValueError, match=r"the input of layers/0/attn/Wqkv/query, but PEFT has"):
        cj.export_peft(tmp_path, model, params)


def test_adapterhub_is_refused_by_name(tmp_path):
    """Exporting to AdapterHub says which types of models it has."""
    model, params = adapted(cj.preset("pfeiffer-feed-forward", reduction_factor=2))
    with pytest.raises(ValueError, match=r"not supported for a ModernBert; use .*bert"):
        cj.export_adapterhub(tmp_path, model, params)


def test_peft_takes_only_the_pooling_of_the_configuration(tmp_path):
    """A classifier of another pooling than the configuration's is refused."""
    backbone = small_backbone(CONFIG, pooling="mean")
    model = cj.Adapted(backbone.module, cj.LoRAConfig(sites=("query_key_value",)))
    params = cj.init_adapters(model, backbone, quick_key(0))
    with pytest.raises(ValueError, match=r"PEFT reads what classifier_pooling='cls' in config.js"):
        cj.export_peft(tmp_path, model, params)


@pytest.mark.parametrize(
    "method",
    [
        cj.LoRAConfig(rank=2),
        cj.LoRAConfig(sites=("query", "query_key_value", "intermediate"), rank=2),
        cj.IA3Config(sites=("query_key_value",)),
    ],
    ids=lambda method: f"{method.kind} at {' and '.join(method.sites)}",
)
def test_a_merged_adapter_is_right_in_the_fused_matrix(method):
    """PyTorch computes the adapted logits from the merged backbone to 2e-5."""
    pytest.importorskip("torch")
    model, params = adapted(method)
    merged = cj.merge_adapter(model, params)
    backbone = backbone_with("sequence_classification")
    made = type(backbone)(module=backbone.module, params=merged)
    assert {leaf.dtype for leaf in flatten_dict(merged).values()} == {jnp.dtype("float32")}
    np.testing.assert_allclose(
        peft_output(torch_model(made)), logits_of(model, params), **TOLERANCE
    )
