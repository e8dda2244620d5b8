"""Exchanges folders with PEFT: both sides compute the same logits, bad folders are refused."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from compacter_jax.catalogue import preset, presets
from compacter_jax.checkpoint import load_adapter, save_adapter
from compacter_jax.exchange.peft.folder import export_peft, import_peft
from compacter_jax.inject.adapted import Adapted
from compacter_jax.methods.ia3 import IA3Config
from compacter_jax.methods.lora import LoRAConfig
from compacter_jax.methods.prompt_tuning import PromptTuningConfig
from compacter_jax.models.bert.model import Bert
from compacter_jax.models.loading import load_backbone
from compacter_jax.models.t5.model import T5
from tests.helpers import ONE_LAYER, TINY_BERT, TINY_T5, adapted_shapes, backbone_of, random_tree
from tests.helpers import quick_jit as jit
from tests.hosts import SITES, Chain

# Logits are of order 1 to 10, and float32 rounds each of them by about 1e-6.
TOLERANCE = {"rtol": 0, "atol": 2e-5}

BERT = {
    "vocab_size": 23,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
    "num_labels": 3,
}
T5_SIZES = {
    "vocab_size": 23,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 20,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 6,
    "decoder_start_token_id": 0,
}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
MODELS = {
    "hidden states": ("Bert", "Model", BERT),
    "sequences": ("Bert", "ForSequenceClassification", BERT | {"num_hidden_layers": 1}),
    "tokens": ("Bert", "ForTokenClassification", BERT),
    "question": ("Bert", "ForQuestionAnswering", BERT | {"num_labels": 2}),
    "masked": ("Bert", "ForMaskedLM", BERT),
    "T5": ("T5", "ForConditionalGeneration", T5_SIZES | {"num_layers": 1}),
    "gated T5": ("T5", "ForConditionalGeneration", T5_SIZES | GATED),
}


@pytest.fixture(scope="module")
def oracles():
    """Returns PyTorch, transformers and PEFT, or skips the test if one is not installed."""
    return tuple(pytest.importorskip(name) for name in ("torch", "transformers", "peft"))


@pytest.fixture(scope="module")
def folder_of(oracles, tmp_path_factory):
    """Returns a function from a key of `MODELS` to the folder of that model with random weights."""
    torch, transformers, _ = oracles

    @functools.cache
    def write(name):
        family, kind, sizes = MODELS[name]
        torch.manual_seed(len(name))
        config = getattr(transformers, f"{family}Config")(**sizes)
        model = getattr(transformers, family + kind)(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        folder = tmp_path_factory.mktemp("backbone")
        model.save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="module")
def torch_model(oracles, folder_of):
    """Returns a function from a key of `MODELS` to the PyTorch model of transformers."""

    def load(name):
        family, kind, _ = MODELS[name]
        return getattr(oracles[1], family + kind).from_pretrained(folder_of(name)).eval()

    return load


@pytest.fixture(scope="module")
def backbone(folder_of):
    """Returns a function from a key of `MODELS` to the backbone."""
    return functools.cache(lambda name: load_backbone(folder_of(name)))


def inputs_of(name):
    """Returns arguments by name, with padding on the right, on the left, and none."""
    rng = np.random.default_rng(3)

    def tokens(length):
        mask = np.ones((3, length), np.int32)
        mask[0, length - 2 :] = 0
        mask[1, :2] = 0
        return rng.integers(1, 23, (3, length)), mask

    ids, mask = tokens(7)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name in ("T5", "gated T5"):
        ids, mask = tokens(5)
        return inputs | {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    if name == "question":  # PEFT does not pass token_type_ids on here
        return inputs
    return inputs | {"token_type_ids": rng.integers(0, 2, (3, 7))}


def outputs_of_torch(torch, model, name):
    with torch.no_grad():
        y = model(**{key: torch.tensor(array) for key, array in inputs_of(name).items()})
    if name == "question":
        return np.stack([y.start_logits, y.end_logits], axis=-1)
    return np.asarray(y.logits if hasattr(y, "logits") else y.last_hidden_state)


def outputs(model, params, name):
    y = jit(functools.partial(model.apply))({"params": params}, **inputs_of(name))
    return np.asarray(getattr(y, "last_hidden_state", y))


def without_prompts(y, config, name):
    """Returns PEFT's outputs without the positions of prompts, which our outputs do not have."""
    count = getattr(config, "num_virtual_tokens", 0)
    return y[:, count:] if name in ("tokens", "question") else y


def trained(torch, peft, model, config):
    """Returns a PEFT model with random values for all trained parameters."""
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


# The model, the class of PEFT's configuration, and its fields.
FOLDERS = {
    "LoRA, pooler too": (
        "sequences",
        "Lora",
        {
            "r": 3,
            "lora_alpha": 5,
            "target_modules": ["query", "value"],
            "lora_dropout": 0.1,
            "modules_to_save": ["pooler"],
        },
    ),
    "LoRA, rank-stabilised, layer norms too": (
        "tokens",
        "Lora",
        {
            "r": 3,
            "use_rslora": True,
            "target_modules": ["query", "output.dense"],
            "layers_to_transform": [1],
            "modules_to_save": ["LayerNorm"],
        },
    ),
    "LoRA, some modules and the pooler": (
        "hidden states",
        "Lora",
        {"target_modules": r".*\.0\..*\.dense|pooler\.dense", "exclude_modules": ".*interm.*"},
    ),
    "LoRA on the gate": (
        "gated T5",
        "Lora",
        {"target_modules": ["k", "wi_0"], "modules_to_save": ["layer_norm"]},
    ),
    "IA3": ("sequences", "IA3", {}),
    "IA3, inputs of one layer": (
        "tokens",
        "IA3",
        {"target_modules": ["query", "dense"], "feedforward_modules": r".*\.1\..*\.dense"},
    ),
    "IA3 on T5": ("T5", "IA3", {}),
    "prompts": ("sequences", "PromptTuning", {"num_virtual_tokens": 3}),
    "prompts, layer norms too": (
        "question",
        "PromptTuning",
        {"num_virtual_tokens": 2, "modules_to_save": ["LayerNorm"]},
    ),
    "prompts on T5": (
        "T5",
        "PromptTuning",
        {"num_virtual_tokens": 3, "modules_to_save": ["layer_norm"]},
    ),
}
TASKS = {
    "hidden states": "FEATURE_EXTRACTION",
    "sequences": "SEQ_CLS",
    "tokens": "TOKEN_CLS",
    "question": "QUESTION_ANS",
    "masked": "FEATURE_EXTRACTION",
    "T5": "SEQ_2_SEQ_LM",
    "gated T5": "SEQ_2_SEQ_LM",
}


@pytest.mark.parametrize(("name", "kind", "fields"), FOLDERS.values(), ids=FOLDERS)
def test_logits_are_those_of_peft_and_stay_so_when_written(
    tmp_path, oracles, torch_model, backbone, name, kind, fields
):
    torch, _, peft = oracles
    config = getattr(peft, f"{kind}Config")(task_type=TASKS[name], **fields)
    theirs = trained(torch, peft, torch_model(name), config)
    theirs.save_pretrained(tmp_path / "theirs")
    raw = outputs_of_torch(torch, theirs, name)
    expected = without_prompts(raw, config, name)
    plain = outputs_of_torch(torch, torch_model(name), name)
    assert np.abs(plain - expected).max() > 0.05

    model, params = import_peft(tmp_path / "theirs", backbone(name))
    np.testing.assert_allclose(outputs(model, params, name), expected, **TOLERANCE)

    export_peft(tmp_path / "ours", model, params)
    read = peft.PeftModel.from_pretrained(torch_model(name), tmp_path / "ours").eval()
    assert type(read) is type(theirs)
    np.testing.assert_array_equal(outputs_of_torch(torch, read, name), raw)


# Values of `target_modules` and related fields; PEFT decides which modules they select.
PLACES = {
    "an end within a name": ("sequences", "Lora", {"target_modules": ["ery", "key"]}),
    "ends of several parts": ("sequences", "Lora", {"target_modules": ["layer.0.output.dense"]}),
    "a whole name": ("hidden states", "Lora", {"target_modules": ["pooler.dense", "key"]}),
    "a whole name in spite of layers": (
        "hidden states",
        "Lora",
        {"target_modules": ["encoder.layer.0.output.dense", "key"], "layers_to_transform": 1},
    ),
    "dense without the pooler": (
        "sequences",
        "Lora",
        {"target_modules": ["dense"], "modules_to_save": ["pooler"]},
    ),
    "excluded by name": (
        "masked",
        "Lora",
        {"target_modules": ["dense"], "exclude_modules": ["attention.output.dense"]},
    ),
    "a pattern": ("tokens", "Lora", {"target_modules": r".*\.self\.(query|value)"}),
    "layers by the first number": (
        "gated T5",
        "Lora",
        {"target_modules": ["q", "wo"], "layers_to_transform": [1]},
    ),
    "layers by another number": (
        "gated T5",
        "Lora",
        {"target_modules": ["v"], "layers_to_transform": [1], "layers_pattern": ["layer"]},
    ),
    "layers by the first pattern that is there": (
        "gated T5",
        "Lora",
        {"target_modules": ["v"], "layers_to_transform": [0], "layers_pattern": ["no", "block"]},
    ),
    "cross-attention alone": ("gated T5", "Lora", {"target_modules": r".*EncDecAttention\.[qv]"}),
    "inputs by an end within a name": (
        "T5",
        "IA3",
        {"target_modules": ["v", "o", "wo"], "feedforward_modules": ["wo", "o"]},
    ),
    "no inputs": (
        "gated T5",
        "IA3",
        {"target_modules": ["k", "v", "wi_1"], "feedforward_modules": []},
    ),
    "inputs alone": (
        "sequences",
        "IA3",
        {"target_modules": ["dense"], "feedforward_modules": ["dense"]},
    ),
}
# PEFT's name of a parameter -> our name, and the conversion to ours.
PARAMETERS = {
    "lora_A.default.weight": ("left", np.transpose),
    "lora_B.default.weight": ("right", np.transpose),
    "ia3_l.default": ("scale", np.ravel),
    "ia3_l.default of inputs": ("input_scale", np.ravel),
}


@pytest.mark.parametrize(("name", "kind", "fields"), PLACES.values(), ids=PLACES)
def test_adapters_are_where_peft_puts_them(
    tmp_path, oracles, torch_model, backbone, name, kind, fields
):
    torch, _, peft = oracles
    config = getattr(peft, f"{kind}Config")(task_type=TASKS[name], **fields)
    theirs = trained(torch, peft, torch_model(name), config)
    theirs.save_pretrained(tmp_path)
    expected = {}
    for full_name, module in theirs.base_model.model.named_modules():
        if not hasattr(module, "base_layer"):
            continue
        host = full_name.removeprefix("bert.").replace(".", "/")
        for key, tensor in module.named_parameters():
            kind_of = key + " of inputs" * getattr(module, "is_feedforward", False)
            if kind_of in PARAMETERS:
                leaf, convert = PARAMETERS[kind_of]
                expected[f"{host}/adapter/{leaf}"] = convert(tensor.detach().numpy())
    _, params = import_peft(tmp_path, backbone(name))
    actual = {
        path: leaf for path, leaf in flatten_dict(params, sep="/").items() if "/adapter/" in path
    }
    assert expected
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(actual[path], leaf, err_msg=path)


# Folders as written by PEFT before 0.11, which did not store the name of the saved head.
OLD = {
    "sequences": ("sequences", "Lora", {"target_modules": ["query"]}),
    "sequences, no LoRA at the head": ("sequences", "Lora", {"target_modules": r".*(query|fier)"}),
    "sequences, IA3": ("sequences", "IA3", {}),
    "sequences, prompts": ("sequences", "PromptTuning", {"num_virtual_tokens": 2}),
    "tokens": ("tokens", "Lora", {"target_modules": ["value"]}),
    "tokens, prompts": ("tokens", "PromptTuning", {"num_virtual_tokens": 2}),
    "question": ("question", "IA3", {}),
    "question, layer norms named": (
        "question",
        "Lora",
        {"target_modules": ["key"], "modules_to_save": ["LayerNorm"]},
    ),
}


@pytest.mark.parametrize(("name", "kind", "fields"), OLD.values(), ids=OLD)
def test_a_head_that_is_not_named_is_read_as_peft_reads_it(
    tmp_path, oracles, torch_model, backbone, name, kind, fields
):
    torch, _, peft = oracles
    own = fields.get("modules_to_save")
    config = getattr(peft, f"{kind}Config")(task_type=TASKS[name], **fields)
    trained(torch, peft, torch_model(name), config).save_pretrained(tmp_path / "theirs")
    change(tmp_path / "theirs", modules_to_save=own)
    if own is None:  # PEFT 0.2 has no such key yet, later versions write null
        path = tmp_path / "theirs/adapter_config.json"
        settings = json.loads(path.read_text())
        assert settings.pop("modules_to_save") is None
        path.write_text(json.dumps(settings))

    read = peft.PeftModel.from_pretrained(torch_model(name), tmp_path / "theirs")
    expected = peft.get_peft_model_state_dict(read)
    model, params = import_peft(tmp_path / "theirs", backbone(name))
    assert model.method.train_head
    export_peft(tmp_path / "ours", model, params)
    actual = load_file(tmp_path / "ours/adapter_model.safetensors")
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        np.testing.assert_array_equal(actual[key], tensor.detach().numpy(), err_msg=key)


def test_a_pickled_folder_is_read(tmp_path, oracles, torch_model, backbone):
    torch, _, peft = oracles
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["key"])
    theirs = trained(torch, peft, torch_model("sequences"), config)
    theirs.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    theirs.save_pretrained(tmp_path / "safe")
    assert (tmp_path / "pickled" / "adapter_model.bin").is_file()
    pickled, safe = (import_peft(tmp_path / f, backbone("sequences")) for f in ("pickled", "safe"))
    assert pickled[0] == safe[0]
    assert_same(pickled[1], safe[1])


# --- without PEFT -------------------------------------------------------------------------------


def assert_same(actual, expected):
    actual, expected = flatten_dict(actual, sep="/"), flatten_dict(expected, sep="/")
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        assert actual[path].dtype == leaf.dtype, path
        np.testing.assert_array_equal(actual[path], leaf, err_msg=path)


def adapted(module, method, sites=None):
    """Returns a backbone, and a model adapted from it whose other parameters are random."""
    backbone = backbone_of(module)
    model = Adapted(module, method, sites)
    labels = {"train_pooler": "pooler", "train_layer_norms": "orm", "train_head": "classifier"}
    changed = [part for field, part in labels.items() if getattr(method, field)]
    own = flatten_dict(backbone.params, sep="/")
    params = flatten_dict(random_tree(adapted_shapes(model), 1), sep="/")
    kept = {path: leaf for path, leaf in own.items() if not any(part in path for part in changed)}
    return backbone, model, unflatten_dict(params | kept, sep="/")


SEQUENCES = Bert(TINY_BERT, head="sequence_classification", num_labels=3)
TEXT = T5(TINY_T5, head="conditional_generation")
HEADLESS = {"train_head": False}
MODELS_HERE = {
    "LoRA": (SEQUENCES, LoRAConfig(rank=3, lora_alpha=2.5, dropout=0.1, use_rslora=True), None),
    "LoRA, layer norms and pooler": (
        SEQUENCES,
        LoRAConfig(
            sites=("output_projection", "intermediate"),
            leave_out=(0,),
            train_layer_norms=True,
            train_pooler=True,
        ),
        None,
    ),
    "LoRA on hidden states": (Bert(TINY_BERT), LoRAConfig(sites=("key",), **HEADLESS), None),
    "LoRA of a masked language model": (
        Bert(TINY_BERT, head="masked_lm"),
        LoRAConfig(sites=("feed_forward",), **HEADLESS),
        None,
    ),
    "LoRA on T5": (TEXT, LoRAConfig(sites=("query", "value", "feed_forward"), **HEADLESS), None),
    "LoRA on T5, layer norms too": (
        TEXT,
        LoRAConfig(sites=("intermediate",), train_layer_norms=True, **HEADLESS),
        None,
    ),
    "LoRA where the caller says": (
        TEXT,
        LoRAConfig(sites=("decoder/block/layer/1/EncDecAttention/q",), **HEADLESS),
        {
            "decoder/block/layer/1/EncDecAttention/q": (
                "decoder/block/(?P<layer>0)/layer/1/EncDecAttention/q"
            )
        },
    ),
    "IA3": (SEQUENCES, IA3Config(), None),
    "IA3 on outputs and inputs": (
        SEQUENCES,
        IA3Config(sites=("value", "feed_forward"), input_sites=("query", "output_projection")),
        None,
    ),
    "IA3 on T5": (TEXT, IA3Config(**HEADLESS), None),
    "prompts": (SEQUENCES, PromptTuningConfig(prompt_length=3), None),
    "prompts on T5": (
        TEXT,
        PromptTuningConfig(prompt_length=3, train_layer_norms=True, **HEADLESS),
        None,
    ),
}


@pytest.mark.parametrize(("module", "method", "sites"), MODELS_HERE.values(), ids=MODELS_HERE)
def test_what_is_written_is_read_back(tmp_path, module, method, sites):
    backbone, model, params = adapted(module, method, sites)
    export_peft(tmp_path / "a" / "b", model, params, base_model_name="some/where")
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    read, read_params = import_peft(tmp_path / "a" / "b", backbone)
    assert read == model
    assert_same(read_params, params)
    settings = json.loads((tmp_path / "a" / "b" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "some/where"


def test_a_model_that_was_read_is_saved_and_loaded(tmp_path):
    module, method, sites = MODELS_HERE["LoRA where the caller says"]
    backbone, model, params = adapted(module, method, sites)
    export_peft(tmp_path / "peft", model, params)
    save_adapter(tmp_path / "own", *import_peft(tmp_path / "peft", backbone))
    loaded, loaded_params = load_adapter(tmp_path / "own", backbone)
    assert loaded == model
    assert_same(loaded_params, params)


def test_bfloat16_is_written_as_it_is_and_read_in_the_model_s_dtype(tmp_path):
    backbone, model, params = adapted(SEQUENCES, LoRAConfig())
    brain = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    export_peft(tmp_path, model, brain)
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {
        jnp.dtype(jnp.bfloat16)
    }
    read = flatten_dict(import_peft(tmp_path, backbone)[1], sep="/")
    for path, leaf in flatten_dict(params, sep="/").items():
        if "adapter" in path or "classifier" in path:
            assert read[path].dtype == jnp.float32
            np.testing.assert_array_equal(read[path], leaf.astype(jnp.bfloat16), err_msg=path)


OTHERS = sorted(
    name
    for name in presets()
    if not isinstance(preset(name), LoRAConfig | IA3Config | PromptTuningConfig)
)


@pytest.mark.parametrize("name", OTHERS)
def test_methods_that_peft_does_not_have_are_not_written(tmp_path, name):
    sizes = {"reduction_factor": 2} | ({"phm_dim": 3} if "phm_dim" in dir(preset(name)) else {})
    method = preset(name)
    if hasattr(method, "reduction_factor"):
        method = method.replace(**sizes)
    model = Adapted(SEQUENCES, method)
    with pytest.raises(ValueError, match=f"method '{method.kind}' cannot be exported to PEFT"):
        export_peft(tmp_path, model, {})
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_what_is_no_linear_layer_is_not_written(tmp_path):
    sites = {"norm": r"encoder/layer/(?P<layer>\d+)/output/LayerNorm"}
    _, model, params = adapted(SEQUENCES, IA3Config(sites=("norm",), input_sites=()), sites)
    with pytest.raises(ValueError, match="encoder/layer/0/output/LayerNorm is not a linear layer"):
        export_peft(tmp_path, model, params)


def test_a_backbone_of_another_library_is_not_written(tmp_path):
    model = Adapted(Chain(), LoRAConfig(sites=("feed_forward",)), SITES)
    params = random_tree(adapted_shapes(model))
    with pytest.raises(ValueError, match="Chain is a backbone that transformers has no names for"):
        export_peft(tmp_path, model, params)


# --- folders that do not fit --------------------------------------------------------------------


def change(folder, tensors=(), **settings):
    """Replaces settings, and tensors whose names have the given ends; None removes a tensor."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    path = folder / "adapter_model.safetensors"
    stored = load_file(path)
    for end, tensor in dict(tensors).items():
        name = next((name for name in stored if name.endswith(end)), end)
        stored.pop(name, None)
        if tensor is not None:
            stored[name] = tensor
    save_file(stored, path)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Writes a PEFT folder with LoRA for a one-layer BERT; returns it and the backbone."""
    backbone, model, params = adapted(ONE_BERT, LoRAConfig(rank=2))
    path = tmp_path_factory.mktemp("written")
    export_peft(path, model, params)
    return path, backbone


@pytest.fixture
def folder(written, tmp_path):
    """Returns a copy of the folder that the test may change, and the backbone."""
    return shutil.copytree(written[0], tmp_path / "folder"), written[1]


ONE_BERT = Bert(ONE_LAYER, head="sequence_classification", num_labels=3)
ZEROS = np.zeros((2, 2), np.float32)
PLAIN = {
    "peft_type": "PROMPT_TUNING",
    "task_type": "SEQ_CLS",
    "num_virtual_tokens": 2,
    **dict.fromkeys(("r", "lora_alpha", "lora_dropout", "target_modules", "bias", "use_rslora")),
}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"peft_type": "LOHA"},
            "peft_type='LOHA' in .* is not supported; supported: 'IA3', 'LORA'",
        ),
        ({"peft_type": None}, "peft_type=None in"),
        ({"peft_type": ["LORA"]}, r"peft_type=\['LORA'\] must be text or null"),
        (
            {"task_type": "TOKEN_CLS"},
            "does not fit head='sequence_classification', which has task_type='SEQ_CLS'",
        ),
        ({"use_dora": True, "lora_bias": True}, "not supported: use_dora=True, lora_bias=True"),
        ({"rank_pattern": {"query": 4}}, r"not supported: rank_pattern=\{'query': 4\}"),
        ({"alpha_pattern": {"query": 4}}, "not supported: alpha_pattern"),
        ({"bias": "lora_only"}, "not supported: bias='lora_only'"),
        ({"layer_replication": [[0, 1]]}, "not supported: layer_replication"),
        ({"of_the_future": 1}, "not supported: of_the_future=1"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' .* changes the backbone's"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"r": "2"}, "json: r='2' must be a whole number or null"),
        ({"lora_alpha": None}, "lora_alpha=None must be of type float"),
        ({"lora_dropout": 2}, r"dropout=2.0 must be in \[0, 1\)"),
        ({"target_modules": None}, "target_modules=None in .* does not name the modules"),
        ({"target_modules": "all-linear"}, "does not name the modules"),
        ({"target_modules": 3}, "target_modules=3 must be text or a list, each item text or null"),
        ({"target_modules": ["query", 3]}, "must be text or a list, each item text"),
        ({"target_modules": "("}, "is not a valid regular expression"),
        ({"target_modules": ["self"]}, r"matches bert\.encoder\.layer\.0\.attention\.self, but"),
        ({"target_modules": ["word_embeddings"]}, "but must match linear layers"),
        ({"target_modules": ["q"]}, "matches nothing"),
        ({"target_modules": ["query"], "layers_to_transform": [1]}, "matches nothing"),
        ({"layers_to_transform": [0.5]}, r"layers_to_transform=\[0.5\] must be a whole number"),
        ({"layers_to_transform": 0, "target_modules": ".*key"}, "with a list of names as target"),
        ({"modules_to_save": "classifier"}, "modules_to_save='classifier' must be a list"),
        (
            {"modules_to_save": ["embeddings"]},
            "embeddings/word_embeddings/embedding.*; only a head",
        ),
        ({"modules_to_save": ["classifier", "dense"]}, "only a head, a pooler and layer norms"),
        ({"target_modules": ["query"]}, "left over: .*value.lora_A.weight"),
        ({"target_modules": ["query", "value", "key"]}, "missing: .*key.lora_A.weight"),
        ({"modules_to_save": None, "task_type": None}, "left over: .*model.classifier.bias"),
        ({"modules_to_save": ["classifier", "pooler"]}, "missing: .*bert.pooler.dense.bias"),
        ({"r": 3}, r"query.lora_A.weight has shape \(2, 12\), not \(3, 12\)"),
        ({"peft_type": "IA3"}, "not supported: lora_alpha=8, r=2"),
        ({**PLAIN, "task_type": None}, "PEFT itself ignore the prompts; set it to 'SEQ_CLS'"),
        (
            {**PLAIN, "num_transformer_submodules": 2},
            "num_transformer_submodules=2 in .* must be 1",
        ),
        ({**PLAIN, "num_virtual_tokens": None}, "prompt_length=None must be of type int"),
        (PLAIN, "missing: .*prompt_embeddings"),
    ],
)
def test_settings_that_do_not_fit_are_refused(folder, settings, message):
    path, backbone = folder
    change(path, **settings)
    with pytest.raises(ValueError, match=message) as caught:
        import_peft(path, backbone)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"fan_in_fan_out": True, "init_lora_weights": "gaussian", "peft_version": "0.99"},
        {"of_the_future": None, "use_dora": False, "rank_pattern": {}, "loftq_config": {}},
        {"task_type": None, "modules_to_save": ["classifier", "score"]},
        {"modules_to_save": None},
        {"layers_to_transform": [], "layers_pattern": None, "exclude_modules": []},
        {"target_modules": r"bert\..*\.(query|value)", "exclude_modules": r".*\.output\..*"},
    ],
)
def test_settings_that_change_nothing_are_read(folder, settings):
    path, backbone = folder
    expected = import_peft(path, backbone)
    change(path, **settings)
    model, params = import_peft(path, backbone)
    assert model == expected[0]
    assert_same(params, expected[1])


def test_a_folder_without_a_head_leaves_the_backbone_s(folder):
    path, backbone = folder
    change(path, {"classifier.weight": None, "classifier.bias": None}, modules_to_save=None)
    model, params = import_peft(path, backbone)
    assert not model.method.train_head
    assert_same(params["classifier"], backbone.params["classifier"])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"query.lora_A.weight": None}, "missing: .*query.lora_A.weight.*; left over: none"),
        ({"base_model.model.stranger": ZEROS}, "left over: .*base_model.model.stranger"),
        ({"value.lora_B.weight": ZEROS}, r"value.lora_B.weight has shape \(2, 2\), not \(12, 2\)"),
        ({"classifier.weight": ZEROS}, r"classifier.weight has shape \(2, 2\), not \(3, 12\)"),
        (
            {"query.lora_A.weight": np.ones((2, 12), np.int8)},
            "query.lora_A.weight in .* has dtype I8; weights must be floating-point",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_listed(folder, tensors, message):
    path, backbone = folder
    change(path, tensors)
    with pytest.raises(ValueError, match=message):
        import_peft(path, backbone)


def test_missing_files_are_named(folder):
    path, backbone = folder
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"none of adapter_model\.safetensors, .*\.bin"):
        import_peft(path, backbone)
    (path / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json does not exist"):
        import_peft(path, backbone)


def test_ia3_must_say_which_modules_are_feed_forward(folder):
    path, backbone = folder
    settings = {"peft_type": "IA3", "target_modules": ["key"]}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"feedforward_modules in .* is missing"):
        import_peft(path, backbone)


@pytest.mark.parametrize("rows", [3, 6])
def test_prompts_of_a_decoder_are_left_out(tmp_path, rows):
    backbone, model, params = adapted(TEXT, PromptTuningConfig(prompt_length=3, **HEADLESS))
    export_peft(tmp_path, model, params)
    prompt = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    longer = {"prompt_embeddings": np.concatenate([prompt, prompt + 1])[:rows]}
    change(tmp_path, longer, num_transformer_submodules=rows // 3)
    assert_same(import_peft(tmp_path, backbone)[1], params)
    change(tmp_path, {"prompt_embeddings": prompt[:2]})
    with pytest.raises(ValueError, match=r"prompt_embeddings has shape \(2, 12\), not \(3, 12\)"):
        import_peft(tmp_path, backbone)
