"""Small ModernBERTs with random weights, and transformers' PyTorch models with the same weights."""

import contextlib
import dataclasses
import warnings
from unittest import mock

import numpy as np
import pytest

from compacter_jax.models.encoder import HEADS
from compacter_jax.models.modernbert.checkpoint import modernbert_to_hugging_face
from compacter_jax.models.modernbert.config import ModernBertConfig
from compacter_jax.models.modernbert.model import ModernBert
from tests.helpers import backbone_of

ENDINGS = dict(
    zip(
        HEADS,
        (
            "Model",
            *("ForSequenceClassification", "ForTokenClassification", "ForMaskedLM"),
            "ForQuestionAnswering",
        ),
        strict=True,
    )
)


def tiny(**changes):
    """Returns a configuration with a window that is shorter than the inputs of `inputs_of`."""
    sizes = {
        "vocab_size": 19,
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 7,
        "max_position_embeddings": 16,
        "local_attention": 4,
        "global_attn_every_n_layers": 2,
        "pad_token_id": 3,
    }
    return ModernBertConfig(**(sizes | changes))


def random_config(seed, **changes):
    """Returns a configuration with random sizes, biases and layers."""
    rng = np.random.default_rng(seed)
    heads = int(rng.integers(1, 5))
    sizes = {
        "vocab_size": int(rng.integers(11, 40)),
        "hidden_size": heads * 2 * int(rng.integers(1, 5)),
        "num_hidden_layers": int(rng.integers(1, 4)),
        "num_attention_heads": heads,
        "intermediate_size": int(rng.integers(3, 20)),
        "max_position_embeddings": int(rng.integers(12, 20)),
        "local_attention": int(rng.integers(2, 9)),
        "global_attn_every_n_layers": int(rng.integers(1, 4)),
        "global_rope_theta": float(rng.integers(10, 1000)),
        "local_rope_theta": [20.0, 300.0, None][int(rng.integers(3))],
        "pad_token_id": [0, 3, None][int(rng.integers(3))],
        **{
            name: bool(rng.integers(2))
            for name in ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias")
        },
        "decoder_bias": bool(rng.integers(2)),
        "classifier_pooling": ["cls", "mean"][int(rng.integers(2))],
    }
    return ModernBertConfig(**(sizes | changes))


def small_backbone(config, head="sequence_classification", seed=0, **attributes):
    """Returns a module with random parameters, of which every one has an effect."""
    return backbone_of(ModernBert(config, head=head, **attributes), seed)


def inputs_of(config, seed, length=None):
    """Returns ids and a mask with padding on the left, on the right and none.

    The padding is shorter than half a window, so that every query has a key that it may attend to.
    """
    rng = np.random.default_rng(seed)
    length = length or int(rng.integers(10, config.max_position_embeddings + 1))
    ids = rng.integers(0, config.vocab_size, (3, length))
    mask = np.ones_like(ids)
    count = max(1, config.local_attention // 2)
    mask[1, :count], mask[2, length - count :] = 0, 0
    if config.pad_token_id is not None:
        ids[mask == 0] = config.pad_token_id
    return ids, mask


def modeling():
    """Returns transformers' module of PyTorch's models; importing it makes PyTorch itself warn."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.models.modernbert import modeling_modernbert
    return modeling_modernbert


def torch_config(module):
    """Returns the configuration of transformers."""
    transformers = pytest.importorskip("transformers")
    fields = dataclasses.asdict(module.config)
    if fields["layer_types"] is None:
        del fields["layer_types"]
    labels = 2 if module.head == "question_answering" else module.num_labels
    return transformers.ModernBertConfig(
        **fields, num_labels=labels, reference_compile=False, attn_implementation="eager"
    )


def torch_model(backbone):
    """Returns transformers' PyTorch model with the weights of a backbone."""
    torch = pytest.importorskip("torch")
    module = backbone.module
    cls = getattr(modeling(), f"ModernBert{ENDINGS[module.head]}")
    model = cls(torch_config(module)).eval()
    tensors = {
        name: torch.tensor(np.asarray(tensor))
        for name, tensor in modernbert_to_hugging_face(backbone.params).items()
    }
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert unexpected == []
    tied = module.head == "masked_lm" and module.config.tie_word_embeddings
    assert set(missing) == ({"decoder.weight"} if tied else set())
    return model


def torch_output(model, ids, mask):
    """Returns the logits or the hidden states as a PyTorch tensor."""
    import torch

    output = model(
        input_ids=torch.tensor(ids), attention_mask=None if mask is None else torch.tensor(mask)
    )
    if hasattr(output, "start_logits"):
        return torch.stack([output.start_logits, output.end_logits], -1)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


@contextlib.contextmanager
def in_float64(config):
    """Replaces the two parts of PyTorch's model that compute in float32 whatever its dtype.

    These are the rotary positions and the softmax of the attention. The angles are a formula of
    their own here, by equation 34 of arXiv:2104.09864.
    """
    torch = pytest.importorskip("torch")
    plain = torch.nn.functional.softmax

    def tables(rotary, x, position_ids):
        size = config.hidden_size // config.num_attention_heads
        exponents = torch.arange(size // 2, dtype=torch.float64) * (-2 / size)
        frequencies = torch.tensor(rotary.config.rope_theta, dtype=torch.float64) ** exponents
        angles = position_ids[..., None].double() * torch.cat([frequencies, frequencies])
        return angles.cos(), angles.sin()

    with (
        mock.patch.object(modeling().ModernBertRotaryEmbedding, "forward", tables),
        mock.patch.object(
            torch.nn.functional, "softmax", lambda x, dim, dtype=None: plain(x, dim=dim)
        ),
    ):
        yield
