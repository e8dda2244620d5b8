"""Exchanges folders with AdapterHub's `adapters`: each library reads the files of the other."""

import dataclasses
import functools
import json
import re
import shutil
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from compacter_jax.catalogue import preset
from compacter_jax.checkpoint import load_adapter, save_adapter
from compacter_jax.exchange.adapterhub import (
    export_adapterhub,
    import_adapterhub,
    read_adapterhub_head,
)
from compacter_jax.inject.adapted import Adapted
from compacter_jax.methods.bottleneck import BottleneckConfig
from compacter_jax.methods.combined import CombinedConfig
from compacter_jax.methods.invertible import InvertibleConfig
from compacter_jax.methods.lora import LoRAConfig
from compacter_jax.methods.prefix_tuning import PrefixTuningConfig
from compacter_jax.models.bert.checkpoint import bert_to_hugging_face
from compacter_jax.models.bert.model import Bert
from compacter_jax.models.t5.checkpoint import t5_to_hugging_face
from compacter_jax.models.t5.model import T5
from tests.helpers import (
    IDS,
    MASK,
    TINY_BERT,
    TINY_T5,
    WIDTH,
    adapted_shapes,
    backbone_of,
    random_tree,
    t5_inputs,
)

adapters = pytest.importorskip("adapters")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [
    # `adapters` calls the blocks of T5 in the way of transformers before 4.57.
    pytest.mark.filterwarnings("ignore:`past_key_value` is deprecated"),
]


# The sum of float32 roundings in some hundred operations on values of order one.
TOLERANCE = 2e-5
SMALL = {"reduction_factor": 2, "phm_dim": 3}

CLASSIFIER = Bert(TINY_BERT, head="sequence_classification", num_labels=3)
PLAIN_T5 = T5(TINY_T5)
GATED_T5 = T5(
    dataclasses.replace(TINY_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
)
BACKBONES = {
    "bert": backbone_of(CLASSIFIER, 1),
    "t5": backbone_of(PLAIN_T5, 2),
    "gated t5": backbone_of(GATED_T5, 3),
}


def hub_model(backbone, cls):
    """Returns the model of a class of AdapterHub or of transformers, with our weights."""
    module = backbone.module
    of_bert = isinstance(module, Bert)
    settings = dataclasses.asdict(module.config)
    settings.pop("embedding_size", None)  # of ELECTRA alone, so that BERT has no such field
    if getattr(module, "num_labels", None):
        settings["num_labels"] = module.num_labels
    config = (transformers.BertConfig if of_bert else transformers.T5Config)(**settings)
    own = cls.endswith("AdapterModel")
    model = getattr(adapters if own else transformers, cls)(config).eval()
    if not own:
        adapters.init(model)
    to_hugging_face = bert_to_hugging_face if of_bert else t5_to_hugging_face
    tensors = {name: torch.tensor(t) for name, t in to_hugging_face(backbone.params).items()}
    stem = "bert." if of_bert else "transformer."
    names = set(model.state_dict())
    for name in list(tensors):
        tensors.setdefault(stem + name, tensors[name])
        tensors.setdefault(name.removeprefix(stem), tensors[name])
    # A linear layer that is wrapped by adapters keeps its name.
    tensors = {name: t for name, t in tensors.items() if name in names}
    assert sum(t.numel() for t in tensors.values()) > 1000
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    return model


CLASSES = {
    "bert": "BertForSequenceClassification",
    "t5": "T5AdapterModel",
    "gated t5": "T5AdapterModel",
}


def randomise(model, seed, names=".a."):
    """Draws values large enough to matter for every parameter whose name contains `names`."""
    generator = torch.Generator().manual_seed(seed)
    seen = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if names in f".{name}":
                noise = torch.randn(parameter.shape, generator=generator)
                one = parameter.dim() == 1 and name.endswith((".weight", "scaling"))
                parameter.copy_(0.4 * noise + one)
                seen += 1
    assert seen


def add(model, config, seed=0):
    model.add_adapter("a", config=config)
    model.set_active_adapters("a")
    if isinstance(model, adapters.T5AdapterModel):
        model.add_seq2seq_lm_head("a")
        model.tie_weights()
    randomise(model, seed)
    return model.eval()


def inputs_of(backbone, seed=0):
    if isinstance(backbone.module, Bert):
        return [IDS, MASK]
    return t5_inputs(seed, backbone.module.config)


def hub_output(model, inputs):
    names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
    with torch.no_grad():
        return model(**{n: torch.tensor(a) for n, a in zip(names, inputs, strict=False)})


def hub_states(model, inputs):
    return hub_output(model, inputs).last_hidden_state.numpy()


def hub_logits(model, inputs):
    output = hub_output(model, inputs)
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], -1).numpy()
    return output.logits.numpy()


def logits(model, params, inputs):
    # Not jitted: the test before has compiled most of the operations already.
    return np.asarray(model.apply({"params": params}, *map(jnp.asarray, inputs)))


def assert_equal_logits(actual, expected):
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


def bottleneck(**settings):
    fields = {"mh_adapter": True, "output_adapter": True, "non_linearity": "relu"}
    return adapters.BnConfig(**(fields | {"reduction_factor": 2} | settings))


def phm(**settings):
    return adapters.CompacterConfig(**SMALL, **settings)


def lora(**settings):
    everywhere = {"intermediate_lora": True, "output_lora": True, "attn_matrices": ["q", "k", "v"]}
    return adapters.LoRAConfig(**(everywhere | {"r": 2, "alpha": 1} | settings))


def prefixes(**settings):
    return adapters.PrefixTuningConfig(**({"prefix_length": 3, "bottleneck_size": 5} | settings))


def union(*configs):
    return adapters.ConfigUnion(*configs)


EVERYWHERE = {
    "compacter": phm,
    "compacter++": lambda: adapters.CompacterPlusPlusConfig(**SMALL),
    "seq_bn": lambda: adapters.SeqBnConfig(reduction_factor=5.0),
    "double_seq_bn, layer left out": lambda: adapters.DoubleSeqBnConfig(leave_out=[0]),
    "par_bn": adapters.ParBnConfig,
    "skip after the norm": lambda: bottleneck(original_ln_before=True, residual_before_ln=False),
    "LoRA": lora,
    "IA3": adapters.IA3Config,
    "prefix tuning": prefixes,
    "MAM": lambda: adapters.MAMConfig(prefixes(flat=True), adapters.ParBnConfig()),
}
# The features that encoder and decoder share are tested on BERT.
OF_BERT = {
    "own rules": lambda: phm(shared_phm_rule=False),
    "own factorised rules": lambda: phm(shared_phm_rule=False, factorized_phm_rule=True),
    "shared factorised rule": lambda: phm(factorized_phm_rule=True, learn_phm=False),
    "PHM-Adapter": lambda: phm(shared_phm_rule=False, factorized_phm_W=False),
    "shared blocks, rank two": lambda: phm(shared_W_phm=True, phm_rank=2),
    "shared blocks, own rules, learned scaling": lambda: phm(
        shared_W_phm=True, shared_phm_rule=False, scaling="learned"
    ),
    "PHM without biases": lambda: phm(phm_bias=False, scaling="learned"),
    "no second norm": lambda: bottleneck(original_ln_before=True, original_ln_after=False),
    "no norm": lambda: bottleneck(original_ln_after=False, non_linearity="gelu"),
    "skip from the sum": lambda: bottleneck(original_ln_before=True, residual_before_ln="post_add"),
    # Without a norm of its own, the adapter ignores this setting.
    "skip added before no norm": lambda: bottleneck(adapter_residual_before_ln=True),
    "own norms, scaled": lambda: bottleneck(
        ln_before=True, ln_after=True, scaling=0.7, non_linearity="gelu_new"
    ),
    "channels scaled": lambda: bottleneck(scaling="channel", non_linearity="LeakyReLU"),
    "parallel, own norms, learned scaling": lambda: bottleneck(
        is_parallel=True, ln_before=True, ln_after=True, scaling="learned", mh_adapter=False
    ),
    "parallel without residual": lambda: bottleneck(
        is_parallel=True, original_ln_before=True, original_ln_after=False, residual_before_ln=False
    ),
    "parallel, skip from the sum": lambda: bottleneck(
        is_parallel=True, residual_before_ln="post_add"
    ),
    "IA3 everywhere, scaled": lambda: adapters.IA3Config(
        output_lora=True, attn_matrices=["q", "k", "v"], alpha=2
    ),
    "invertible": lambda: adapters.SeqBnInvConfig(
        reduction_factor=2, inv_adapter_reduction_factor=3
    ),
    "flat prefixes of one layer": lambda: prefixes(flat=True, leave_out=[0]),
    "prefixes of one layer": lambda: prefixes(leave_out=[1], non_linearity="ReLU"),
    "union": lambda: union(
        adapters.SeqBnConfig(reduction_factor=3, leave_out=[1]),
        adapters.DoubleSeqBnConfig(reduction_factor=2, output_adapter=False),
        lora(leave_out=[0], attn_matrices=["k"]),
        prefixes(),
    ),
}
# Layers 0 and 1 belong to the encoder, layer 2 to the decoder.
OF_T5 = {
    "after cross-attention": lambda: bottleneck(
        cross_adapter=True, original_ln_before=True, scaling=0.5
    ),
    "decoder left out": lambda: phm(leave_out=[2], cross_adapter=True),
    "LoRA, layer left out": lambda: lora(leave_out=[1]),
    "prefixes of the decoder": lambda: prefixes(leave_out=[0, 1]),
    "prefixes of self-attention": lambda: prefixes(flat=True, cross_prefix=False),
    "union": lambda: union(
        lora(leave_out=[0]), prefixes(encoder_prefix=False), adapters.SeqBnConfig()
    ),
}
CASES = [(family, name) for family in ("bert", "t5") for name in EVERYWHERE]
CASES += [("bert", name) for name in OF_BERT] + [("t5", name) for name in OF_T5]
CASES += [
    ("t5", name) for name in ("PHM-Adapter", "no second norm", "no norm", "own norms, scaled")
]
CASES += [
    ("gated t5", name)
    for name in (
        *("compacter", "compacter++", "PHM-Adapter", "double_seq_bn, layer left out", "par_bn"),
        *("LoRA", "IA3"),
    )
]


def config_of(family, name):
    own = OF_BERT if family == "bert" else OF_BERT | OF_T5
    return (EVERYWHERE | own)[name]()


@pytest.mark.parametrize(("family", "name"), CASES)
def test_import_and_export_give_equal_logits(family, name, tmp_path):
    backbone = BACKBONES[family]
    model = add(hub_model(backbone, CLASSES[family]), config_of(family, name))
    model.save_adapter(str(tmp_path / "saved"), "a")
    inputs = inputs_of(backbone)
    expected = hub_logits(model, inputs)
    adapted, params = import_adapterhub(tmp_path / "saved", backbone)
    assert_equal_logits(logits(adapted, params, inputs), expected)
    assert np.abs(bare_logits(family) - expected).max() > 0.01

    export_adapterhub(tmp_path / "exported", adapted, params, name="b")
    again = hub_model(backbone, CLASSES[family])
    assert_equal_logits(loaded_logits(again, tmp_path / "exported", inputs), expected)


@functools.cache
def bare_logits(family):
    backbone = BACKBONES[family]
    return logits(backbone.module, backbone.params, inputs_of(backbone))


_TIED = r"|(heads.*\.3|cls\.predictions\.decoder)\.weight"


def is_tied(model):
    return model.config.tie_word_embeddings


def loaded_logits(model, folder, inputs):
    """Returns the logits of AdapterHub's model with the only adapter in a folder."""
    info = {}
    name = model.load_adapter(str(folder), use_safetensors=True, set_active=True, loading_info=info)
    # Prefixes have one name for each layer that uses them; a tied weight is that of the embedding.
    known = re.compile(r"(.*\.)?prefix_tuning\..*" + (_TIED if is_tied(model) else ""))
    assert not [key for key in info["missing_keys"] if not known.fullmatch(key)]
    # This bias has two names, and AdapterHub knows only one of them.
    assert set(info["unexpected_keys"]) <= {"cls.predictions.bias"}
    if isinstance(model, adapters.T5AdapterModel) and not model.heads:
        model.add_seq2seq_lm_head(name)
        model.tie_weights()
    return hub_logits(model.eval(), inputs)


# --- methods of ours, exported ------------------------------------------------------------------

PLAIN = {"train_layer_norms": False}


def language_adapter(non_linearity):
    layers, behind = preset("mad-x").parts
    return CombinedConfig(parts=(layers, behind.replace(non_linearity=non_linearity)))


OURS = {
    "compacter": lambda: preset("compacter", **SMALL, **PLAIN),
    "houlsby, layer left out": lambda: preset(
        "houlsby", reduction_factor=2, leave_out=(1,), **PLAIN
    ),
    "pfeiffer-feed-forward": lambda: preset("pfeiffer-feed-forward", reduction_factor=3),
    "own norms, scaled": lambda: BottleneckConfig(
        reduction_factor=2, layer_norm_before=True, layer_norm_after=True, scaling=-0.6
    ),
    "after cross-attention": lambda: BottleneckConfig(
        sites=("cross_attention", "feed_forward"), reduction_factor=2, scaling=2.0
    ),
    "parallel": lambda: BottleneckConfig(
        sites=("parallel_attention", "residual_feed_forward"), parallel=True, reduction_factor=2
    ),
    "lora, stabilised": lambda: preset("lora", rank=3, use_rslora=True, lora_alpha=2.0),
    "ia3": lambda: preset("ia3"),
    "flat prefixes": lambda: preset(
        "prefix-tuning", prefix_length=2, flat=True, shift_positions=True
    ),
    "mam": lambda: preset("mam", prefix_length=2, bottleneck_size=5),
    "rules not learned": lambda: preset("phm", **SMALL, learn_phm=False, **PLAIN),
    "mad-x": lambda: language_adapter("gelu"),
    "skip from the sum": lambda: BottleneckConfig(
        sites=("residual_feed_forward",),
        reduction_factor=2,
        original_ln_before=True,
        residual_before_ln="post_add",
    ),
}
OURS_ON = {
    "bert": (
        "compacter",
        "houlsby, layer left out",
        "pfeiffer-feed-forward",
        "own norms, scaled",
        "parallel",
        "mam",
        "rules not learned",
        "mad-x",
    ),
    "t5": (
        *("compacter", "after cross-attention", "lora, stabilised", "flat prefixes"),
        "skip from the sum",
    ),
    "gated t5": ("ia3", "pfeiffer-feed-forward"),
}


@pytest.mark.parametrize(
    ("family", "name"), [(f, n) for f, names in OURS_ON.items() for n in names]
)
def test_export_of_a_method_of_ours(family, name, tmp_path):
    backbone = BACKBONES[family]
    adapted = Adapted(backbone.module, OURS[name]())
    own = flatten_dict(backbone.params, sep="/")
    shapes = flatten_dict(adapted_shapes(adapted), sep="/")
    new = random_tree({path: leaf for path, leaf in shapes.items() if path not in own}, 4)
    params = unflatten_dict({**own, **flatten_dict(new, sep="/")}, sep="/")
    inputs = inputs_of(backbone)
    expected = logits(adapted, params, inputs)
    assert np.abs(bare_logits(family) - expected).max() > 0.01
    export_adapterhub(tmp_path, adapted, params)
    model = hub_model(backbone, CLASSES[family])
    assert_equal_logits(loaded_logits(model, tmp_path, inputs), expected)
    again = import_adapterhub(tmp_path, backbone)
    assert_equal_logits(logits(*again, inputs), expected)


REFUSED_EXPORTS = {
    "full": (preset("full"), "trains the backbone itself"),
    "head-only": (preset("head-only"), "it adds no adapter"),
    "low-rank": (preset("low-rank", reduction_factor=2), "no low-rank projections"),
    "prompts": (preset("prompt-tuning-random", prompt_length=2), "prompt tuning only for BERT"),
    "bitfit": (preset("bitfit"), "no adapters made of biases"),
    "intrinsic": (preset("intrinsic", dimension=9), "merge_adapter"),
    "layer norms": (preset("compacter", **SMALL), "no place for trained layer norms"),
    "shared full blocks": (
        preset("compacter", **SMALL, **PLAIN, shared_W_phm=True, factorized_phm_W=False),
        "cannot create shared blocks that are not factorised",
    ),
    "pooler": (
        preset("lora", train_pooler=True),
        "no place for a trained pooler with head=None",
    ),
    "ia3 after the activation": (preset("ia3"), "scales before the activation"),
    "attention's last projection": (
        LoRAConfig(sites=("output_projection",)),
        "it has no place at encoder/layer/0/attention/output/dense",
    ),
    "two activations": (preset("mad-x"), "these have 'gelu' and 'relu'; train both with one"),
    "invertible alone": (InvertibleConfig(), "without a bottleneck of its own beside it"),
    "not inverted": (
        CombinedConfig(
            parts=(
                BottleneckConfig(reduction_factor=2, non_linearity="relu"),
                InvertibleConfig(sites=("encoder_embedding",)),
            )
        ),
        "cannot place method 'invertible' at encoder_embedding",
    ),
    "two of a kind": (
        CombinedConfig(parts=(LoRAConfig(sites=("query",)), LoRAConfig(sites=("key",)))),
        "two parts of the kind 'lora'",
    ),
}
REFUSED_T5_EXPORTS = {
    "parallel to the norm": (
        BottleneckConfig(sites=("parallel_attention",), parallel=True, reduction_factor=2),
        "no place at decoder/block/0/layer/0/SelfAttention, encoder",
    ),
    "invertible on a T5": (language_adapter("gelu"), "not supported for a t5"),
    "positions not shifted": (preset("prefix-tuning", prefix_length=2), "shift_positions=False"),
    "encoder's prefixes alone": (
        PrefixTuningConfig(
            sites=("encoder_key_value", "cross_key_value"), prefix_length=2, shift_positions=True
        ),
        "it would also act at decoder/block/0/layer/0/SelfAttention",
    ),
}


@pytest.mark.parametrize("name", [*REFUSED_EXPORTS, *REFUSED_T5_EXPORTS])
def test_what_cannot_be_exported_is_refused(name, tmp_path):
    method, message = (REFUSED_EXPORTS | REFUSED_T5_EXPORTS)[name]
    module = BACKBONES["bert" if name in REFUSED_EXPORTS else "t5"].module
    adapted = Adapted(Bert(TINY_BERT) if name == "pooler" else module, method)
    params = random_tree(adapted_shapes(adapted))
    with pytest.raises(ValueError, match=message):
        export_adapterhub(tmp_path / "new", adapted, params)
    assert not (tmp_path / "new").exists()


def test_export_refuses_a_bad_name_and_the_folder_of_another(tmp_path):
    adapted = Adapted(CLASSIFIER, preset("lora"))
    params = random_tree(adapted_shapes(adapted))
    with pytest.raises(ValueError, match=r"name='a\.b' must consist of letters"):
        export_adapterhub(tmp_path, adapted, params, name="a.b")
    (tmp_path / "pytorch_adapter.bin").touch()
    with pytest.raises(ValueError, match=r"has pytorch_adapter\.bin of another adapter"):
        export_adapterhub(tmp_path, adapted, params)
    (tmp_path / "pytorch_adapter.bin").unlink()
    export_adapterhub(tmp_path, adapted, params)
    with pytest.raises(ValueError, match=r"has head_config\.json, model_head\.saf.* of another"):
        export_adapterhub(tmp_path, adapted, params, with_head=False)


# --- heads --------------------------------------------------------------------------------------


def with_head(head, num_labels=2, **config):
    config = dataclasses.replace(TINY_BERT, **config)
    return backbone_of(Bert(config, head=head, num_labels=num_labels), 5)


HEADS = {
    "classifier": (
        "BertForSequenceClassification",
        with_head("sequence_classification", 3),
        None,
        "classifier",
    ),
    "tagger": (
        "BertForTokenClassification",
        with_head("token_classification", 4),
        None,
        "classifier",
    ),
    "questions": ("BertForQuestionAnswering", with_head("question_answering"), None, "qa_outputs"),
    "words": ("BertForMaskedLM", with_head("masked_lm"), None, "cls.predictions.transform"),
    "words, untied": (
        "BertForMaskedLM",
        with_head("masked_lm", tie_word_embeddings=False),
        None,
        "cls",
    ),
    "flexible classifier": (
        "BertAdapterModel",
        with_head("sequence_classification", 3),
        lambda model: model.add_classification_head("a", num_labels=3),
        "heads",
    ),
    "flexible classifier of the pooler": (
        "BertAdapterModel",
        with_head("sequence_classification", 1),
        lambda model: model.add_classification_head("a", num_labels=1, layers=1, use_pooler=True),
        "heads",
    ),
    "flexible classifier of several labels at once": (
        "BertAdapterModel",
        with_head("sequence_classification", 3),
        lambda model: model.add_classification_head("a", num_labels=3, multilabel=True),
        "heads",
    ),
    "flexible tagger": (
        "BertAdapterModel",
        with_head("token_classification", 4),
        lambda model: model.add_tagging_head("a", num_labels=4),
        "heads",
    ),
    "flexible questions": (
        "BertAdapterModel",
        with_head("question_answering"),
        lambda model: model.add_qa_head("a"),
        "heads",
    ),
    "flexible words": (
        "BertAdapterModel",
        with_head("masked_lm"),
        lambda model: model.add_masked_lm_head("a"),
        "heads.a.0",
    ),
    # `adapters` inverts in heads of its own, but not in BertForMaskedLM.
    "flexible words, invertible": (
        "BertAdapterModel",
        with_head("masked_lm"),
        lambda model: model.add_masked_lm_head("a"),
        "heads.a.0",
        lambda: adapters.SeqBnInvConfig(reduction_factor=2),
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(name, tmp_path):
    cls, backbone, add_head, own_names, *configs = HEADS[name]
    model = hub_model(backbone, cls)
    if add_head:
        add_head(model)
        model.tie_weights()
    (config,) = configs or [lambda: adapters.SeqBnConfig(reduction_factor=2)]
    add(model, config())
    randomise(model, 6, f".{own_names}.")
    model.save_adapter(str(tmp_path / "saved"), "a")
    module, inputs = backbone.module, inputs_of(backbone)
    expected = hub_logits(model, inputs)

    wanted = {"head": module.head}
    if module.head.endswith("classification"):
        wanted["num_labels"] = module.num_labels
    assert read_adapterhub_head(tmp_path / "saved") == wanted
    adapted, params = import_adapterhub(tmp_path / "saved", backbone)
    assert_equal_logits(logits(adapted, params, inputs), expected)
    own = import_adapterhub(tmp_path / "saved", backbone, with_head=False)[1]
    heads = [p for p in flatten_dict(own, sep="/") if p.startswith(("classifier", "qa_", "cls"))]
    for path in heads:
        flat, bare = (flatten_dict(tree, sep="/") for tree in (own, backbone.params))
        np.testing.assert_array_equal(flat[path], bare[path])

    export_adapterhub(tmp_path / "exported", adapted, params)
    for other in {cls, "BertAdapterModel"}:
        if name == "flexible classifier" or other == cls or not add_head:
            again = hub_model(backbone, other)
            assert_equal_logits(loaded_logits(again, tmp_path / "exported", inputs), expected)


@pytest.mark.parametrize("family", ["t5", "gated t5"])
def test_head_of_t5_for_conditional_generation(family, tmp_path):
    """`adapters` saves this head in the same file as the prefixes."""
    backbone = BACKBONES[family]
    model = add(hub_model(backbone, "T5ForConditionalGeneration"), prefixes())
    model.save_adapter(str(tmp_path / "saved"), "a")
    names = torch.load(tmp_path / "saved/pytorch_model_head.bin", weights_only=True)
    assert {name.partition(".")[0] for name in names} == {"lm_head", "prefix_tuning"}
    inputs = inputs_of(backbone)
    expected = hub_logits(model, inputs)
    adapted, params = import_adapterhub(tmp_path / "saved", backbone)
    assert_equal_logits(logits(adapted, params, inputs), expected)
    export_adapterhub(tmp_path / "exported", adapted, params)
    assert (tmp_path / "exported/model_head.safetensors").exists() == (family == "gated t5")
    again = hub_model(backbone, "T5ForConditionalGeneration")
    assert_equal_logits(loaded_logits(again, tmp_path / "exported", inputs), expected)


def test_head_of_its_own_on_an_untied_t5(tmp_path):
    backbone = BACKBONES["gated t5"]
    model = add(hub_model(backbone, "T5AdapterModel"), adapters.SeqBnConfig(reduction_factor=2))
    randomise(model, 7, ".heads.")
    model.save_adapter(str(tmp_path / "saved"), "a")
    inputs = inputs_of(backbone)
    expected = hub_logits(model, inputs)
    adapted, params = import_adapterhub(tmp_path / "saved", backbone)
    assert_equal_logits(logits(adapted, params, inputs), expected)
    assert np.abs(params["lm_head"]["kernel"] - backbone.params["lm_head"]["kernel"]).max() > 0.1
    export_adapterhub(tmp_path / "exported", adapted, params)
    for cls in ("T5AdapterModel", "T5ForConditionalGeneration"):
        again = hub_model(backbone, cls)
        assert_equal_logits(loaded_logits(again, tmp_path / "exported", inputs), expected)


@pytest.mark.parametrize(
    ("cls", "module"),
    [
        ("BertModel", Bert(TINY_BERT)),
        ("T5Model", T5(TINY_T5, head=None)),
        ("T5EncoderModel", T5(TINY_T5, head="encoder")),
    ],
)
def test_models_without_a_head(cls, module, tmp_path):
    backbone = backbone_of(module, 8)
    # The only decoder layer is left out; the encoder has no layer of this index.
    both = union(lora(leave_out=[2]), prefixes(leave_out=[2]))
    model = add(hub_model(backbone, cls), both)
    model.save_adapter(str(tmp_path / "saved"), "a")
    inputs = inputs_of(backbone)[: 2 if module.head == "encoder" else 4]
    adapted, params = import_adapterhub(tmp_path / "saved", backbone)
    export_adapterhub(tmp_path / "exported", adapted, params)
    again = hub_model(backbone, cls)
    again.load_adapter(str(tmp_path / "exported"), use_safetensors=True, set_active=True)
    output = adapted.apply({"params": params}, *map(jnp.asarray, inputs))
    states = getattr(output, "last_hidden_state", output)
    for hub in (model, again.eval()):
        assert_equal_logits(states, hub_states(hub, inputs))


# --- files and what is in them ------------------------------------------------------------------


def saved(folder, config, family="bert", cls=None, **settings):
    """Saves an adapter and returns its logits."""
    backbone = BACKBONES[family]
    model = add(hub_model(backbone, cls or CLASSES[family]), config)
    model.save_adapter(str(folder), "a", **settings)
    return model


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_safetensors_are_read_and_come_first(tmp_path):
    model = saved(tmp_path, phm(), use_safetensors=True)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    (tmp_path / "pytorch_adapter.bin").write_bytes(b"not read")
    backbone, inputs = BACKBONES["bert"], inputs_of(BACKBONES["bert"])
    adapted, params = import_adapterhub(tmp_path, backbone)
    assert_equal_logits(logits(adapted, params, inputs), hub_logits(model, inputs))


def test_bfloat16_is_written_as_float32(tmp_path):
    backbone = BACKBONES["bert"]
    saved(tmp_path / "saved", phm())
    adapted, params = import_adapterhub(tmp_path / "saved", backbone)
    halved = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    export_adapterhub(tmp_path / "exported", adapted, halved)
    _, again = import_adapterhub(tmp_path / "exported", backbone)
    again, halved = (flatten_dict(tree, sep="/") for tree in (again, halved))
    own = flatten_dict(backbone.params, sep="/")
    for path in (again.keys() - own.keys()) | {"classifier/kernel"}:
        np.testing.assert_array_equal(again[path], np.float32(halved[path]), err_msg=path)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_what_was_imported_is_saved_and_loaded(family, tmp_path):
    # Needs its own sites on T5, since AdapterHub numbers the layers of encoder and decoder
    # together.
    backbone = BACKBONES[family]
    saved(tmp_path / "hub", phm(leave_out=[1]), family)
    adapted, params = import_adapterhub(tmp_path / "hub", backbone)
    save_adapter(tmp_path / "ours", adapted, params)
    loaded, again = load_adapter(tmp_path / "ours", backbone)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert (loaded.method, loaded.sites) == (adapted.method, adapted.sites)


# Cases in which the file holds the shared parameters, and cases in which `adapters` omits them.
@pytest.mark.parametrize(
    ("family", "cls", "complete"),
    [
        ("t5", "T5AdapterModel", True),
        ("bert", "BertAdapterModel", True),
        ("bert", "BertForSequenceClassification", True),
        ("t5", "T5ForConditionalGeneration", False),
        ("t5", "T5Model", False),
        ("bert", "BertModel", False),
    ],
)
def test_shared_rule(family, cls, complete, tmp_path):
    backbone = BACKBONES[family]
    model = saved(tmp_path, adapters.CompacterPlusPlusConfig(**SMALL), family, cls)
    rule = next(value for name, value in model.named_parameters() if name.endswith("a.phm_rule"))
    if not complete:
        with pytest.raises(
            ValueError, match=r"has no shared_parameters\.a\.phm_rule, and cannot be"
        ):
            import_adapterhub(tmp_path, backbone)
        # Follows the instructions in the message.
        tensors = torch.load(tmp_path / "pytorch_adapter.bin", weights_only=True)
        for name, tensor in model.shared_parameters["a"].items():
            tensors[f"shared_parameters.a.{name}"] = tensor.detach()
        torch.save(tensors, tmp_path / "pytorch_adapter.bin")
    _, params = import_adapterhub(tmp_path, backbone)
    np.testing.assert_array_equal(params["phm_rule"], rule.detach())


@pytest.mark.parametrize("kind", ["task", "lang"])
def test_names_of_earlier_releases(kind, tmp_path):
    model = saved(tmp_path, bottleneck(), use_safetensors=True)
    path = tmp_path / "adapter.safetensors"
    tensors = {
        key.replace(
            ".adapters.",
            f".{'attention' if '.attention.' in key else 'layer'}_text_{kind}_adapters.",
        ): tensor
        for key, tensor in safetensors.numpy.load_file(path).items()
    }
    assert not any(".adapters." in key for key in tensors)
    safetensors.numpy.save_file(tensors, path)
    backbone, inputs = BACKBONES["bert"], inputs_of(BACKBONES["bert"])
    adapted, params = import_adapterhub(tmp_path, backbone)
    assert_equal_logits(logits(adapted, params, inputs), hub_logits(model, inputs))


def test_lora_of_earlier_releases_is_not_scaled(tmp_path):
    saved(tmp_path, adapters.LoRAConfig(r=2, alpha=8))
    scalings = {}
    for version in ("adapters.1.0.1", "adapters.1.1.0", "4.57.0"):
        edit(tmp_path / "adapter_config.json", lambda c, v=version: c.update(version=v))
        adapted, _ = import_adapterhub(tmp_path, BACKBONES["bert"])
        scalings[version] = adapted.method.scaling
    assert scalings == {"adapters.1.0.1": 1, "adapters.1.1.0": 4, "4.57.0": 4}


def test_gelu_of_the_first_releases_is_by_tanh(tmp_path):
    saved(tmp_path, bottleneck(non_linearity="gelu"))
    path = tmp_path / "adapter_config.json"
    assert import_adapterhub(tmp_path, BACKBONES["bert"])[0].method.non_linearity == "gelu"
    edit(path, lambda c: c.pop("version"))
    assert import_adapterhub(tmp_path, BACKBONES["bert"])[0].method.non_linearity == "gelu_new"
    edit(path, lambda c: c["config"].update(non_linearity="gelu_orig"))
    assert import_adapterhub(tmp_path, BACKBONES["bert"])[0].method.non_linearity == "gelu"


REFUSED = {
    "invertible, glow": (bottleneck(), {"inv_adapter": "glow"}, "inv_adapter='glow'"),
    "invertible, by no whole number": (
        bottleneck(),
        {"inv_adapter": "nice", "inv_adapter_reduction_factor": 1.5},
        "inv_adapter_reduction_factor=1.5 in .* must be a whole number",
    ),
    "gated": (bottleneck(), {"use_gating": True}, "use_gating=True"),
    "gated prefixes": (prefixes(), {"use_gating": True}, "use_gating=True"),
    "no sum to skip from": (
        bottleneck(),
        {"residual_before_ln": "post_add"},
        "residual_before_ln='post_add' with original_ln_before=False in .* itself fails there",
    ),
    "unknown skip": (
        bottleneck(),
        {"residual_before_ln": "before"},
        "residual_before_ln='before' in .* only True or False or 'post_add' is",
    ),
    "a number for a skip": (
        bottleneck(),
        {"residual_before_ln": 1},
        "residual_before_ln=1 in .* must be true or false",
    ),
    "dropped paths": (bottleneck(), {"stochastic_depth": 0.1}, "stochastic_depth=0.1"),
    "norm of the skip": (
        bottleneck(),
        {"adapter_residual_before_ln": True, "ln_after": True},
        "adapter_residual_before_ln=True",
    ),
    "factors by layer": (bottleneck(), {"reduction_factor": {"default": 2}}, "reduction_factor={"),
    "wider": (bottleneck(), {"reduction_factor": 0.5}, "no whole number gives"),
    "between": (bottleneck(), {"reduction_factor": 1.5}, "no whole number gives"),
    "huge": (bottleneck(), {"reduction_factor": 10**400}, "reduction_factor=1000.* be a number"),
    "huge, of LoRA": (lora(), {"alpha": 10**400}, "lora_alpha=inf must be finite"),
    "unknown scaling": (bottleneck(), {"scaling": "vector"}, "scaling='vector'"),
    "unknown activation": (bottleneck(), {"non_linearity": "gelo"}, "unknown activation 'gelo'"),
    "no activation": (bottleneck(), {"non_linearity": None}, "non_linearity=None"),
    "channels of PHM": (phm(), {"scaling": "channel"}, "not a sum of Kronecker products"),
    "scaling of shared blocks": (
        phm(),
        {"scaling": "learned", "shared_W_phm": True},
        "cannot be folded into weights that all adapters share",
    ),
    "shared full blocks": (
        phm(),
        {"shared_W_phm": True, "factorized_phm_W": False},
        "cannot create shared blocks",
    ),
    "PHM dropout": (phm(), {"phm_dropout": 0.1}, "unknown fields: phm_dropout"),
    "no PHM dimension": (phm(), {"phm_dim": 5}, "phm_dim=5 does not divide"),
    "no list": (lora(), {"attn_matrices": None}, "attn_matrices=None .* must be a list"),
    "a place of another type": (bottleneck(), {"mh_adapter": 1}, "mh_adapter=1 .* true or false"),
    "left out by name": (bottleneck(), {"leave_out": ["1"]}, r"leave_out=\['1'\]"),
    "all left out": (bottleneck(), {"leave_out": [0, 1]}, "places no adapter"),
    "nowhere": (bottleneck(), {"mh_adapter": False, "output_adapter": False}, "places no adapter"),
    "DoRA": (lora(), {"use_dora": True}, "use_dora=True"),
    "VeRA": (lora(), {"vera_d": 0.1}, "vera_d=0.1"),
    "half precision": (lora(), {"dtype": "float16"}, "dtype='float16'"),
    "unknown composition": (lora(), {"composition_mode": "max"}, "composition_mode='max'"),
    "IA3 of rank two": (adapters.IA3Config(), {"r": 2}, "r=2 and dropout=0.0"),
    "MTL-LoRA": (lora(), {"architecture": "mtl_lora"}, "architecture='mtl_lora'"),
    "ReFT": (lora(), {"architecture": "reft"}, "architecture='reft'"),
    "prompts": (lora(), {"architecture": "prompt_tuning"}, "architecture='prompt_tuning'"),
    "empty union": (lora(), {"architecture": "union", "configs": None}, "or a union of objects"),
    "nested union": (
        lora(),
        {"architecture": "union", "configs": [{"architecture": "union", "configs": []}]},
        "architecture='union'",
    ),
    "a mistyped flag": (
        bottleneck(),
        {"is_parallel": "no"},
        "is_parallel='no' .* must be true or false",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_configurations_without_a_counterpart_are_refused_by_name(name, tmp_path):
    # The config is refused before any tensor is read, so there is no file of tensors.
    _, changes, message = REFUSED[name]
    content = full_config(REFUSED[name][0])
    content["config"].update(changes)
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        import_adapterhub(tmp_path, BACKBONES["bert"])


def full_config(config):
    own = {"config": config.to_dict(), "model_type": "bert", "name": "a", "hidden_size": WIDTH}
    return own | {"version": "adapters.1.3.0"}


def test_mt5_is_t5(tmp_path):
    saved(tmp_path, lora(), "t5")
    edit(tmp_path / "adapter_config.json", lambda c: c.update(model_type="mt5"))
    import_adapterhub(tmp_path, BACKBONES["t5"])


def test_skips_from_a_sum_are_refused_on_t5(tmp_path):
    config = bottleneck(original_ln_before=True, residual_before_ln="post_add")
    content = full_config(config) | {"model_type": "t5"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    message = "residual_before_ln='post_add' on a T5 in .* itself fails there"
    with pytest.raises(ValueError, match=message):
        import_adapterhub(tmp_path, BACKBONES["t5"])


def test_prefixes_in_some_layers_of_t5_are_refused(tmp_path):
    content = full_config(prefixes(leave_out=[1])) | {"model_type": "t5"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="loses the relative position biases there"):
        import_adapterhub(tmp_path, BACKBONES["t5"])


def test_parts_of_t5_that_leave_out_different_layers_of_one_site_are_refused(tmp_path):
    both = union(bottleneck(leave_out=[0]), bottleneck(leave_out=[1, 2]))
    content = full_config(both) | {"model_type": "t5"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match="leaves out layers of only the encoder or only the decoder"
    ):
        import_adapterhub(tmp_path, BACKBONES["t5"])


def of_file(name):
    """Makes a change of the file `name` from a function that changes its tensors."""

    def decorate(change):
        def run(folder):
            tensors = dict(safetensors.numpy.load_file(folder / name))
            change(tensors)
            safetensors.numpy.save_file(tensors, folder / name)

        return run

    return decorate


UP = "bert.encoder.layer.1.output.adapters.a.adapter_up.weight"


@of_file("adapter.safetensors")
def unknown_tensor(tensors):
    tensors["bert.encoder.layer.1.output.adapters.b.adapter_up.weight"] = tensors[UP]


@of_file("adapter.safetensors")
def missing_tensor(tensors):
    del tensors[UP]


@of_file("adapter.safetensors")
def misshapen_tensor(tensors):
    tensors[UP] = np.ascontiguousarray(tensors[UP].T)


@of_file("adapter.safetensors")
def whole_numbers(tensors):
    tensors[UP] = tensors[UP].astype(np.int8)


@of_file("adapter.safetensors")
def copies_that_differ(tensors):
    tensors[UP.removeprefix("bert.")] = tensors[UP] + 1


@of_file("model_head.safetensors")
def unknown_tensor_of_the_head(tensors):
    tensors["classifier.more.weight"] = tensors["classifier.weight"]


@of_file("model_head.safetensors")
def missing_tensor_of_the_head(tensors):
    del tensors["classifier.bias"]


@of_file("model_head.safetensors")
def whole_numbers_of_the_head(tensors):
    tensors["classifier.weight"] = tensors["classifier.weight"].astype(np.int8)


def truncated(folder):
    path = folder / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def replaced(name, change):
    return lambda folder: edit(folder / name, change)


MALFORMED = {
    "unknown tensor": (
        unknown_tensor,
        "left over: encoder.layer.1.output.adapters.b.adapter_up",
    ),
    "missing tensor": (
        missing_tensor,
        "missing: encoder.layer.1.output.adapters.a.adapter_up.w",
    ),
    "misshapen tensor": (
        misshapen_tensor,
        r"adapter_up.weight has shape \(6, 12\), not \(12, 6\)",
    ),
    "whole numbers": (whole_numbers, "has dtype I8; weights must be floating-point"),
    "copies that differ": (copies_that_differ, "must be the same tensor, but differ"),
    "unknown of the head": (unknown_tensor_of_the_head, "left over: classifier/more/kernel"),
    "missing of the head": (missing_tensor_of_the_head, "missing: classifier/bias"),
    "whole numbers of the head": (
        whole_numbers_of_the_head,
        r"classifier\.weight in .*model_head.* has dtype I8; weights must be floating",
    ),
    "head without what it is": (
        lambda folder: (folder / "head_config.json").unlink(),
        r"model_head\.safetensors holds the weights of a head, but its configuration "
        r"head_config\.json is not in",
    ),
    "truncated": (truncated, "is truncated or not a safetensors file"),
    "no JSON": (
        lambda folder: (folder / "adapter_config.json").write_text("{"),
        "is not valid JSON",
    ),
    "no object": (
        replaced("adapter_config.json", lambda c: c.update(config=3)),
        "must be an object",
    ),
    "no name": (replaced("adapter_config.json", lambda c: c.pop("name")), "it has no name"),
    "a name of no kind": (
        replaced("adapter_config.json", lambda c: c.update(name=None)),
        "name=None must be text",
    ),
    "another family": (
        replaced("adapter_config.json", lambda c: c.update(model_type="gpt2")),
        "has model_type='gpt2', but the backbone is a Bert",
    ),
    "another width": (
        replaced("adapter_config.json", lambda c: c.update(hidden_size=13)),
        "has hidden_size=13, but the backbone has 12",
    ),
    "another adapter's name": (
        replaced("adapter_config.json", lambda c: c.update(name="b")),
        r"missing: encoder.*adapters\.b.*left over: encoder.*adapters\.a",
    ),
    "no field": (
        replaced("adapter_config.json", lambda c: c["config"].pop("reduction_factor")),
        "missing fields: reduction_factor",
    ),
    "of this library": (
        replaced("adapter_config.json", lambda c: c.update(format_version=1)),
        "use load_adapter",
    ),
    "PEFT's": (
        replaced("adapter_config.json", lambda c: c.update(peft_type="LORA")),
        "use import_peft",
    ),
    "head of another class": (
        replaced("head_config.json", lambda c: c.update(model_class="BertForMultipleChoice")),
        "the head of a 'BertForMultipleChoice' .* has no counterpart here",
    ),
    "head of no class": (
        replaced("head_config.json", lambda c: c.update(model_class=["x"])),
        r"head_config.json: model_class=\['x'\] must be text or null",
    ),
    "head of no number of labels": (
        replaced("head_config.json", lambda c: c.update(num_labels="3")),
        "num_labels='3' must be a whole number or null",
    ),
    "head of another number of labels": (
        replaced("head_config.json", lambda c: c.update(num_labels=4)),
        "has a head with head='sequence_classification', num_labels=4, but the backbone has .*=3",
    ),
    "another head": (
        replaced("head_config.json", lambda c: c.update(model_class="BertForQuestionAnswering")),
        "load the backbone with head='question_answering', or leave out",
    ),
    "head of unknown type": (
        replaced(
            "head_config.json", lambda c: c.update(config={"head_type": "dependency_parsing"})
        ),
        "head_type='dependency_parsing' is unknown",
    ),
    "head of two layers, relu": (
        replaced(
            "head_config.json",
            lambda c: c.update(
                config={"head_type": "tagging", "layers": 2, "activation_function": "relu"}
            ),
        ),
        "head_type='tagging' needs {'layers': 1}",
    ),
}


@pytest.fixture(scope="module")
def sound_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    saved(folder, bottleneck(), use_safetensors=True)
    import_adapterhub(folder, BACKBONES["bert"])
    return folder


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_folders_are_refused(name, sound_folder, tmp_path):
    change, message = MALFORMED[name]
    shutil.copytree(sound_folder, tmp_path / "copy")
    change(tmp_path / "copy")
    with pytest.raises(ValueError, match=message):
        import_adapterhub(tmp_path / "copy", BACKBONES["bert"])


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter.safetensors"])
def test_missing_files_are_named(name, sound_folder, tmp_path):
    shutil.copytree(sound_folder, tmp_path / "copy")
    (tmp_path / "copy" / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        import_adapterhub(tmp_path / "copy", BACKBONES["bert"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_fusion_config.json", "an AdapterFusion"),
        ("adapter_setup.json", "several adapters"),
    ],
)
def test_folders_of_compositions_are_refused(name, message, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=message):
        import_adapterhub(tmp_path, BACKBONES["bert"])


def test_folder_without_a_head(tmp_path):
    saved(tmp_path, bottleneck(), with_head=False)
    assert read_adapterhub_head(tmp_path) == {}
    _, params = import_adapterhub(tmp_path, BACKBONES["bert"])
    own = BACKBONES["bert"].params["classifier"]
    jax.tree.map(np.testing.assert_array_equal, params["classifier"], own)


def test_tied_head_must_be_the_embedding(tmp_path):
    saved(tmp_path, bottleneck(), "t5", "T5ForConditionalGeneration", use_safetensors=True)
    other = backbone_of(PLAIN_T5, 9)
    with pytest.raises(
        ValueError, match=r"lm_head/kernel in .* is tied to the backbone's shared/embed"
    ):
        import_adapterhub(tmp_path, other)
    import_adapterhub(tmp_path, other, with_head=False)


def test_masked_head_must_have_the_activation_of_the_backbone(tmp_path):
    cls, backbone, *_ = HEADS["flexible words"]
    model = hub_model(backbone, cls)
    model.add_masked_lm_head("a", activation_function="relu")
    add(model, bottleneck()).save_adapter(str(tmp_path), "a")
    with pytest.raises(ValueError, match=r"activation_function='relu', .* backbone has 'gelu'"):
        import_adapterhub(tmp_path, backbone)


def test_other_backbones_are_refused(tmp_path):
    saved(tmp_path, bottleneck())
    other = types.SimpleNamespace(module=nn.Dense(3), params={})
    with pytest.raises(ValueError, match="for a Dense; use a model of the types bert"):
        import_adapterhub(tmp_path, other)
    adapted = Adapted(other.module, preset("full"))
    with pytest.raises(ValueError, match="not supported for a Dense"):
        export_adapterhub(tmp_path, adapted, {})
