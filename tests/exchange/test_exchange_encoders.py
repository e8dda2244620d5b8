"""Exchanges adapters of RoBERTa, ELECTRA and DistilBERT with AdapterHub and PEFT, both ways."""

import copy
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj
from compacter_jax.exchange.adapterhub.heads import read_adapterhub_head
from tests.encoder_models import CONFIGS, inputs_of, small_encoder, torch_config, torch_model
from tests.helpers import adapted_shapes, random_tree

adapters = pytest.importorskip("adapters")
peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

# The sum of float32 roundings in some hundred operations on values of order one.
TOLERANCE = 2e-5
SMALL = {"reduction_factor": 2, "phm_dim": 3}
CLASSIFIES = "sequence_classification"


@functools.cache
def backbone(name, head=CLASSIFIES):
    return small_encoder(name, head, seed=7, num_hidden_layers=2)


def logits(model, params, inputs):
    return np.asarray(model.apply({"params": params}, *map(jnp.asarray, inputs)))


def torch_logits(model, inputs):
    names = ("input_ids", "attention_mask", "token_type_ids")
    with torch.no_grad():
        return model(**{n: torch.tensor(a) for n, a in zip(names, inputs, strict=False)}).logits


def assert_equal_logits(actual, expected):
    expected = np.asarray(expected)
    bound = TOLERANCE * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=bound)


def randomise(model, seed=0):
    """Draws values for what is trained, large enough for every parameter to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                one = parameter.dim() == 1 and name.endswith((".weight", "scaling"))
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + one)


# --- AdapterHub ---------------------------------------------------------------------------------


def bottleneck(**settings):
    fields = {"mh_adapter": True, "output_adapter": True, "non_linearity": "relu"}
    return adapters.BnConfig(**(fields | {"reduction_factor": 2} | settings))


HUB = {
    "compacter": lambda: adapters.CompacterConfig(**SMALL),
    "double_seq_bn, a layer left out": lambda: adapters.DoubleSeqBnConfig(leave_out=[0]),
    "par_bn": adapters.ParBnConfig,
    "LoRA": lambda: adapters.LoRAConfig(
        r=2, alpha=1, intermediate_lora=True, output_lora=True, attn_matrices=["q", "k", "v"]
    ),
    "IA3": adapters.IA3Config,
    "prefix tuning": lambda: adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=5),
    "skip from the sum": lambda: bottleneck(original_ln_before=True, residual_before_ln="post_add"),
}
ON_BERTS = ("compacter", "LoRA", "prefix tuning")
CASES = [("distilbert", method) for method in HUB]
CASES += [(name, method) for name in ("roberta", "electra") for method in ON_BERTS]
CASES += [("xlm-roberta", "par_bn")]


def hub_model(name, head=CLASSIFIES):
    """Returns transformers' own class with our weights, into which `adapters` puts adapters."""
    model = torch_model(backbone(name, head))
    adapters.init(model)
    return model.eval()


@pytest.mark.parametrize(("name", "method"), CASES)
def test_adapterhub_reads_what_we_write_and_we_what_it_writes(name, method, tmp_path):
    """An adapter with its head computes the same here, and after it was exported again."""
    ours, inputs = backbone(name), inputs_of(CONFIGS[name], 3)
    model = hub_model(name)
    model.add_adapter("a", config=HUB[method]())
    model.set_active_adapters("a")
    model.train_adapter("a")
    randomise(model)
    model.save_adapter(str(tmp_path / "saved"), "a")
    expected = torch_logits(model.eval(), inputs)
    adapted, params = cj.import_adapterhub(tmp_path / "saved", ours)
    assert_equal_logits(logits(adapted, params, inputs), expected)

    cj.export_adapterhub(tmp_path / "exported", adapted, params, name="b")
    again = hub_model(name)
    again.load_adapter(str(tmp_path / "exported"), use_safetensors=True, set_active=True)
    assert_equal_logits(torch_logits(again.eval(), inputs), expected)


# Family, head of AdapterHub's own classes, its settings, and our head.
FLEX = {
    "roberta": ("roberta", "classification", {"num_labels": 3}, CLASSIFIES),
    "electra": (
        "electra",
        "classification",
        {"num_labels": 3, "activation_function": "gelu"},
        CLASSIFIES,
    ),
    "distilbert": (
        "distilbert",
        "classification",
        {"num_labels": 3, "activation_function": "relu"},
        CLASSIFIES,
    ),
    "tags": ("distilbert", "tagging", {"num_labels": 3}, "token_classification"),
    "words": ("roberta", "masked_lm", {}, "masked_lm"),
    "words of an electra": ("electra", "masked_lm", {}, "masked_lm"),
}
CLASSES = {
    "roberta": adapters.RobertaAdapterModel,
    "electra": adapters.ElectraAdapterModel,
    "distilbert": adapters.DistilBertAdapterModel,
}


@pytest.mark.parametrize(("name", "kind", "settings", "head"), FLEX.values(), ids=FLEX)
def test_heads_of_adapterhubs_own_classes(name, kind, settings, head, tmp_path):
    """A flexible head is read as the head of transformers' class that computes the same."""
    # AdapterHub computes the gelu of its heads for words exactly, too.
    ours, inputs = backbone(name, head), inputs_of(CONFIGS[name], 5)
    model = CLASSES[name](torch_config(ours.module)).eval()
    state = torch_model(ours).state_dict()
    names = set(model.state_dict())
    model.load_state_dict({n: t for n, t in state.items() if n in names}, strict=False)
    model.add_adapter("a", config=HUB["LoRA"]())
    getattr(model, f"add_{kind}_head")("a", **settings)
    model.set_active_adapters("a")
    model.train_adapter("a")
    randomise(model)
    if kind == "masked_lm":
        model.tie_weights()
    model.save_adapter(str(tmp_path), "a")
    wanted = {"head": head} | ({"num_labels": 3} if "num_labels" in settings else {})
    assert read_adapterhub_head(tmp_path) == wanted
    expected = torch_logits(model.eval(), inputs)
    if kind == "masked_lm":  # the table of words is tied to the head, which was drawn again
        top = "embeddings/word_embeddings/embedding"
        table = model.get_input_embeddings().weight.detach().numpy()
        flat = flatten_dict(ours.params, sep="/") | {top: jnp.asarray(table)}
        ours.params = unflatten_dict(flat, sep="/")
    adapted, params = cj.import_adapterhub(tmp_path, ours)
    assert_equal_logits(logits(adapted, params, inputs), expected)


def test_a_head_that_the_family_lacks_is_refused(tmp_path):
    """AdapterHub's default head has a tanh, and DistilBERT's classifier a relu."""
    ours = backbone("distilbert")
    model = adapters.DistilBertAdapterModel(torch_config(ours.module))
    model.add_adapter("a", config=HUB["LoRA"]())
    model.add_classification_head("a", num_labels=3)
    model.save_adapter(str(tmp_path), "a")
    with pytest.raises(ValueError, match="has no counterpart here: head_type='classification' ne"):
        cj.import_adapterhub(tmp_path, ours)


def test_what_adapterhub_lacks_is_refused(tmp_path):
    """CamemBERT is in no class of AdapterHub, and an adapter fits its own family alone."""
    ours = small_encoder("camembert")
    with pytest.raises(ValueError, match=r"a Bert of model_type='camembert'; use .*distilbert, t5"):
        cj.export_adapterhub(tmp_path, cj.Adapted(ours.module, cj.preset("lora")), ours.params)
    ours = backbone("roberta")
    model = cj.Adapted(ours.module, cj.preset("lora", rank=2, train_pooler=True))
    drawn = flatten_dict(random_tree(adapted_shapes(model), seed=3))
    params = unflatten_dict({**drawn, **flatten_dict(ours.params)})
    cj.export_adapterhub(tmp_path, model, params)
    with pytest.raises(ValueError, match="has model_type='roberta', but the backbone is a Bert"):
        cj.import_adapterhub(tmp_path, backbone("electra"))


# --- PEFT ---------------------------------------------------------------------------------------

TASKS = {CLASSIFIES: "SEQ_CLS", "token_classification": "TOKEN_CLS"}
PEFT = {
    "LoRA, roberta": ("roberta", CLASSIFIES, "Lora", {"r": 2, "target_modules": ["value"]}),
    "LoRA and norms, electra": (
        "electra",
        "token_classification",
        "Lora",
        {"r": 2, "target_modules": ["attention.output.dense"], "modules_to_save": ["LayerNorm"]},
    ),
    "LoRA of one layer, distilbert": (
        "distilbert",
        CLASSIFIES,
        "Lora",
        {"r": 2, "target_modules": ["q_lin", "lin1"], "layers_to_transform": [1]},
    ),
    "LoRA, camembert": ("camembert", CLASSIFIES, "Lora", {"r": 2, "target_modules": ["key"]}),
    "IA3, xlm-roberta": (
        "xlm-roberta",
        "token_classification",
        "IA3",
        {"target_modules": ["key", "output.dense"], "feedforward_modules": ["output.dense"]},
    ),
    "IA3, distilbert": (
        "distilbert",
        "token_classification",
        "IA3",
        {"target_modules": ["k_lin", "lin2"], "feedforward_modules": ["lin2"]},
    ),
    "prompts, roberta": ("roberta", CLASSIFIES, "PromptTuning", {"num_virtual_tokens": 2}),
    "prompts, distilbert": (
        "distilbert",
        CLASSIFIES,
        "PromptTuning",
        {"num_virtual_tokens": 2, "token_dim": 12, "num_attention_heads": 3},
    ),
    # PEFT's default width is that of the hidden states.
    "prompts, electra": (
        "electra",
        CLASSIFIES,
        "PromptTuning",
        {"num_virtual_tokens": 2, "token_dim": 8},
    ),
}


def peft_inputs(name, kind):
    """Returns inputs; beside prompts, PEFT counts padding among the positions of a RoBERTa."""
    ids, mask, *types = inputs_of(CONFIGS[name], 3)
    if name == "roberta" and kind == "PromptTuning":
        mask[1], ids[:2] = 1, np.where(ids[:2] == 1, 9, ids[:2])
    return [ids, mask, *types]


@pytest.mark.parametrize(("name", "head", "kind", "fields"), PEFT.values(), ids=PEFT)
def test_peft_reads_what_we_write_and_we_what_it_writes(name, head, kind, fields, tmp_path):
    """A folder of PEFT computes the same logits here, and PEFT reads the one written again."""
    ours, inputs = backbone(name, head), peft_inputs(name, kind)
    config = getattr(peft, f"{kind}Config")(task_type=TASKS[head], **fields)
    theirs = peft.get_peft_model(torch_model(ours), config).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = torch_logits(theirs, inputs)
    model, params = cj.import_peft(tmp_path / "theirs", ours)
    assert_equal_logits(logits(model, params, inputs), expected)

    cj.export_peft(tmp_path / "ours", model, params)
    read = peft.PeftModel.from_pretrained(torch_model(ours), tmp_path / "ours").eval()
    np.testing.assert_array_equal(torch_logits(read, inputs), expected)


# --- the pooling "cls" --------------------------------------------------------------------------


def pooled(name, pooling):
    """Returns a backbone with a pooling, an adapted model of it, and its parameters."""
    ours = copy.copy(backbone(name))
    ours.module = ours.module.clone(pooling=pooling)
    model = cj.Adapted(ours.module, cj.preset("lora", rank=2))
    drawn = flatten_dict(random_tree(adapted_shapes(model), seed=3))
    return ours, model, unflatten_dict({**drawn, **flatten_dict(ours.params)})


@pytest.mark.parametrize("name", ["roberta", "xlm-roberta", "electra", "distilbert", "camembert"])
def test_cls_is_first_where_there_is_no_pooler(name, tmp_path):
    """Both libraries read the classifier of a backbone with "cls" as it is, and so do we."""
    ours, model, params = pooled(name, "cls")
    inputs = inputs_of(CONFIGS[name], 3)
    expected = logits(model, params, inputs)
    cj.export_peft(tmp_path / "peft", model, params)
    theirs = peft.PeftModel.from_pretrained(torch_model(backbone(name)), tmp_path / "peft").eval()
    assert_equal_logits(torch_logits(theirs, inputs), expected)
    assert_equal_logits(logits(*cj.import_peft(tmp_path / "peft", ours), inputs), expected)
    if name == "camembert":  # AdapterHub has none
        return
    cj.export_adapterhub(tmp_path / "hub", model, params, name="a")
    hub = hub_model(name)
    hub.load_adapter(str(tmp_path / "hub"), use_safetensors=True, set_active=True)
    assert_equal_logits(torch_logits(hub.eval(), inputs), expected)
    assert_equal_logits(logits(*cj.import_adapterhub(tmp_path / "hub", ours), inputs), expected)


@pytest.mark.parametrize("library", ["adapterhub", "peft"])
def test_the_mean_is_refused_where_there_is_no_pooler(library, tmp_path):
    """With the mean of the tokens the other library would compute something else."""
    _, model, params = pooled("roberta", "mean")
    with pytest.raises(ValueError, match=r"reads? the first token.*the backbone has pooling='mean"):
        getattr(cj, f"export_{library}")(tmp_path, model, params)
