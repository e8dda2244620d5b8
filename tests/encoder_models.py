"""Small encoders of each family, and transformers' PyTorch models with the same weights."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import WORDS

import compacter_jax as cj
from compacter_jax.models.families import FAMILIES, family_of_module
from tests.helpers import backbone_of, mean_square, quick_jit

SIZES = {
    "vocab_size": 23,
    "hidden_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 14,
    "max_position_embeddings": 15,
    "hidden_act": "gelu",
    "pad_token_id": 1,
}
ROBERTA = SIZES | {"type_vocab_size": 1, "layer_norm_eps": 1e-5}
CONFIGS = {
    "roberta": cj.BertConfig(model_type="roberta", **(ROBERTA | {"hidden_act": "silu"})),
    "xlm-roberta": cj.BertConfig(model_type="xlm-roberta", **(ROBERTA | {"type_vocab_size": 2})),
    "electra": cj.BertConfig(model_type="electra", embedding_size=8, **SIZES),
    "distilbert": cj.DistilBertConfig(
        vocab_size=23,
        dim=12,
        n_layers=1,
        n_heads=3,
        hidden_dim=14,
        max_position_embeddings=15,
        activation="gelu_new",
        pad_token_id=1,
    ),
    "camembert": cj.BertConfig(model_type="camembert", **(ROBERTA | {"pad_token_id": 3})),
}
# One of each set of modules: the others have the same ones under another name.
SETS = ("roberta", "electra", "distilbert")
_OF_DISTILBERT = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
}
HEADS = (
    None,
    "sequence_classification",
    "token_classification",
    "masked_lm",
    "question_answering",
)


def module_of(name, head=None, **changes):
    """Returns the module of a configuration, with other values of its fields, by BERT's names."""
    if name == "distilbert":
        changes = {_OF_DISTILBERT.get(field, field): value for field, value in changes.items()}
    config = dataclasses.replace(CONFIGS[name], **changes)
    return FAMILIES[name].module_class(config, head=head, num_labels=3)


def small_encoder(name, head=None, seed=0, **changes):
    """Returns a module with random parameters, of which every one has an effect."""
    return backbone_of(module_of(name, head, **changes), seed)


def inputs_of(config, seed, length=11):
    """Returns ids, mask and token types: padding on the left, on the right, and none.

    There are token types where the family has several. One more padding token is not masked.
    """
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, config.vocab_size, (3, length))
    mask = np.ones_like(ids)
    mask[1, :2], mask[2, length - 3 :] = 0, 0
    ids[mask == 0] = ids[0, 3] = config.pad_token_id
    types = rng.integers(0, config.type_vocab_size, ids.shape) if has_types(config) else None
    return [ids, mask] if types is None else [ids, mask, types]


def has_types(config):
    """Returns True if a model tells token types apart."""
    return config.type_vocab_size > 1


def torch_config(module):
    """Returns the configuration of transformers."""
    transformers = pytest.importorskip("transformers")
    name = class_of(module, None).removesuffix("Model")
    fields = dataclasses.asdict(module.config)
    fields.pop("model_type", None)
    if fields.get("embedding_size") is None:
        fields.pop("embedding_size", None)
    labels = 2 if module.head == "question_answering" else module.num_labels
    cls = getattr(transformers, f"{name}Config")
    return cls(**fields, num_labels=labels, attn_implementation="eager")


def class_of(module, head):
    """Returns the name of transformers' class."""
    architectures = family_of_module(module).architectures
    return next(name for name, own in architectures.items() if own == head)


def torch_model(backbone):
    """Returns transformers' PyTorch model with the weights of a backbone."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    module = backbone.module
    model = getattr(transformers, class_of(module, module.head))(torch_config(module)).eval()
    tensors = family_of_module(module).to_hugging_face(backbone.params, module.head)
    missing, unexpected = model.load_state_dict(
        {name: torch.tensor(np.asarray(tensor)) for name, tensor in tensors.items()}, strict=False
    )
    assert unexpected == []
    tied = module.head == "masked_lm" and module.config.tie_word_embeddings
    kernels = ("lm_head.decoder", "generator_lm_head", "vocab_projector")
    copies = [f"{name}.weight" for name in kernels if tied]
    assert set(missing) <= {"lm_head.decoder.bias", *copies}
    return model


def torch_outputs(model, inputs):
    """Returns the logits, or the states and what the pooler makes of them, as PyTorch tensors."""
    import torch

    names = ("input_ids", "attention_mask", "token_type_ids")
    output = model(**{n: torch.tensor(a) for n, a in zip(names, inputs, strict=False)})
    if hasattr(output, "start_logits"):
        return [torch.stack([output.start_logits, output.end_logits], -1)]
    if hasattr(output, "logits"):
        return [output.logits]
    pooled = getattr(output, "pooler_output", None)
    return [output.last_hidden_state] + ([] if pooled is None else [pooled])


def loss_and_gradient(module, params, *inputs):
    """Returns `output, gradient` of the mean square."""

    def loss(params):
        output = module.apply({"params": params}, *inputs)
        return mean_square(jax.tree.leaves(output)), output

    (_, output), gradient = quick_jit(jax.value_and_grad(loss, has_aux=True))(params)
    return output, gradient


def check_against_torch(backbone, inputs, tolerance, *, exact=False):
    """Checks outputs and all gradients against PyTorch, relative to the largest entry of each."""
    module, params = backbone.module, backbone.params
    model = torch_model(backbone)
    theirs = torch_outputs(model.double() if exact else model, inputs)
    mean_square(theirs).backward()
    output, gradient = loss_and_gradient(module, params, *inputs)
    ours = jax.tree.leaves(output)
    assert len(ours) == len(theirs)
    for y, expected in zip(ours, theirs, strict=True):
        states = expected.detach().numpy()
        assert y.dtype == states.dtype
        np.testing.assert_allclose(y, states, atol=tolerance * np.abs(states).max(), rtol=0)
    named = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    gradient = family_of_module(module).to_hugging_face(gradient, module.head)
    assert gradient.keys() >= named.keys()
    largest = max(np.abs(leaf).max() for leaf in named.values())
    for name, leaf in gradient.items():
        if name not in named:
            np.testing.assert_array_equal(leaf, 0, err_msg=name)
            continue
        scale = np.abs(named[name]).max()
        if "key.bias" in name or "k_lin.bias" in name:  # the softmax ignores it
            scale = largest
        np.testing.assert_allclose(leaf, named[name], atol=tolerance * scale, rtol=0, err_msg=name)


def in_float64(backbone):
    """Casts a backbone to float64."""
    backbone.module = backbone.module.clone(param_dtype=jnp.float64)
    backbone.params = jax.tree.map(lambda x: np.asarray(x, np.float64), backbone.params)
    return backbone


def write_encoder(folder, name, **changes):
    """Writes a random encoder without a head as a checkpoint, with a tokenizer of `WORDS`.

    Pairs have the token type 1 in the second sentence, which RoBERTa and DistilBERT must not see.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    backbone = small_encoder(name, max_position_embeddings=66, **changes)
    module = backbone.module
    cj.save_backbone(folder, module, backbone.params, torch_config(module))
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *WORDS]
    tokenizer = Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(tokens)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"unk": "<unk>", "cls": "<s>", "sep": "</s>", "pad": "<pad>", "mask": "<mask>"}
    settings = {f"{kind}_token": token for kind, token in special.items()}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
