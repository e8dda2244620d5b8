"""Small models of the BART line, and transformers' PyTorch models with the same weights."""

import dataclasses
import importlib.metadata

import numpy as np
import pytest

from compacter_jax.models.seq2seq.checkpoint import seq2seq_to_hugging_face
from compacter_jax.models.seq2seq.config import DERIVED, Seq2SeqConfig
from compacter_jax.models.seq2seq.model import Seq2Seq
from tests.helpers import backbone_of

PREFIXES = {"m2m_100": "M2M100", "mbart": "MBart", "bart": "Bart", "marian": "Marian"}
PAD = {"m2m_100": 1, "mbart": 1, "bart": 1, "marian": 22}


def tiny(model_type, **changes):
    """Returns a configuration with other sizes in the encoder than in the decoder."""
    start = PAD[model_type] if model_type == "marian" else 2
    sizes = {
        "vocab_size": 23,
        "max_position_embeddings": 19,
        "d_model": 24,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 14,
        "decoder_layers": 1,
        "decoder_attention_heads": 3,
        "decoder_ffn_dim": 10,
        "pad_token_id": PAD[model_type],
        "eos_token_id": 0 if model_type == "marian" else 2,
        "decoder_start_token_id": start,
    }
    return Seq2SeqConfig(model_type=model_type, **(sizes | changes))


UNSHARED = {
    "share_encoder_decoder_embeddings": False,
    "decoder_vocab_size": 31,
    "activation_function": "swish",
}
CONFIGS = {
    "m2m_100": tiny("m2m_100"),
    "mbart": tiny("mbart", activation_function="gelu"),
    "bart": tiny("bart", activation_function="gelu", scale_embedding=False),
    "marian": tiny("marian", activation_function="swish"),
    "unshared marian": tiny("marian", **UNSHARED),
}


def small_backbone(config, head="conditional_generation", seed=0, **attributes):
    """Returns a module with random parameters, of which every one has an effect."""
    return backbone_of(Seq2Seq(config, head=head, **attributes), seed)


def inputs_of(config, seed, lengths=(9, 7)):
    """Returns ids and masks of both stacks: padding on the left, on the right, and none."""
    rng = np.random.default_rng(seed)
    inputs = []
    for length, size in zip(lengths, (config.vocab_size, config.target_vocab_size), strict=True):
        ids = rng.integers(0, size, (3, length))
        mask = np.ones_like(ids)
        mask[1, :2], mask[2, length - 3 :] = 0, 0
        # One more padding token, which is not masked: positions of M2M-100 pass over it, too.
        ids[mask == 0] = ids[0, 3] = config.pad_token_id
        inputs += [ids, mask]
    if not importlib.metadata.version("transformers").startswith("4."):
        inputs[3][:, :2] = 1  # it treats a query that attends to nothing in another way
    return inputs


def torch_config(config):
    """Returns the configuration of transformers."""
    transformers = pytest.importorskip("transformers")
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in DERIVED}
    del fields["model_type"]
    if config.decoder_vocab_size is None:
        del fields["decoder_vocab_size"]
    cls = getattr(transformers, f"{PREFIXES[config.model_type]}Config")
    return cls(**fields, attn_implementation="eager")


def torch_model(backbone):
    """Returns transformers' PyTorch model with the weights of a backbone."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    module = backbone.module
    ending = "MTModel" if module.config.model_type == "marian" else "ForConditionalGeneration"
    name = PREFIXES[module.config.model_type] + ("Model" if module.head is None else ending)
    model = getattr(transformers, name)(torch_config(module.config)).eval()
    if module.config.target_vocab_size != module.config.vocab_size:
        # transformers makes embeddings of the encoder's size, and resizes them afterwards.
        model.resize_decoder_token_embeddings(module.config.target_vocab_size)
    tensors = seq2seq_to_hugging_face(backbone.params, module.head)
    missing, unexpected = model.load_state_dict(
        {name: torch.tensor(np.asarray(tensor)) for name, tensor in tensors.items()}, strict=False
    )
    assert unexpected == []
    known = ("embed_tokens.weight", "lm_head.weight", "embed_positions.weight")
    assert all(name.endswith(known) for name in missing)
    return model


def torch_outputs(model, inputs):
    """Returns the logits, or the states of decoder and encoder, as PyTorch tensors."""
    import torch

    names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
    output = model(**{n: torch.tensor(a) for n, a in zip(names, inputs, strict=True)})
    if hasattr(output, "logits"):
        return [output.logits]
    return [output.last_hidden_state, output.encoder_last_hidden_state]
