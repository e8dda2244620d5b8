"""Small speech models, and transformers' PyTorch models with the same weights."""

import dataclasses

import numpy as np
import pytest

from compacter_jax.models.speech_to_text.checkpoint import speech_to_hugging_face
from compacter_jax.models.speech_to_text.config import SpeechToTextConfig
from compacter_jax.models.speech_to_text.model import SpeechToText
from tests.helpers import backbone_of

FRAMES = (29, 18, 23)  # of the rows of `speech_inputs`


def tiny_speech(**changes):
    """Returns a configuration with other sizes in the encoder than in the decoder."""
    sizes = {
        "vocab_size": 23,
        "d_model": 24,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 14,
        "decoder_layers": 1,
        "decoder_attention_heads": 3,
        "decoder_ffn_dim": 10,
        "conv_channels": 12,
        "input_feat_per_channel": 7,
    }
    return SpeechToTextConfig(**(sizes | changes))


def speech_backbone(config, head="conditional_generation", seed=0):
    """Returns a module with random parameters, of which every one has an effect."""
    return backbone_of(SpeechToText(config, head=head), seed)


def speech_inputs(config, seed, length=7, frames=FRAMES, dtype=np.float32):
    """Returns features, their mask, and ids; rows have different lengths, and noise as padding."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(len(frames), max(frames), config.feature_size)).astype(dtype)
    mask = (np.arange(max(frames)) < np.array(frames)[:, None]).astype(np.int32)
    ids = rng.integers(2, config.vocab_size, (len(frames), length))
    ids[1, 3] = config.pad_token_id
    return features, mask, ids


def torch_speech_config(config):
    """Returns the configuration of transformers."""
    transformers = pytest.importorskip("transformers")
    fields = dataclasses.asdict(config)
    del fields["model_type"]
    fields["num_conv_layers"] = len(config.conv_kernel_sizes)
    return transformers.Speech2TextConfig(**fields, attn_implementation="eager")


def torch_speech_model(backbone):
    """Returns transformers' PyTorch model with the weights of a backbone."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    module = backbone.module
    name = "Speech2TextModel" if module.head is None else "Speech2TextForConditionalGeneration"
    model = getattr(transformers, name)(torch_speech_config(module.config)).eval()
    tensors = speech_to_hugging_face(backbone.params, module.head)
    missing, unexpected = model.load_state_dict(
        {name: torch.tensor(np.asarray(tensor)) for name, tensor in tensors.items()}, strict=False
    )
    assert unexpected == []
    assert set(missing) <= {"lm_head.weight"}
    return model


def torch_speech_outputs(model, inputs):
    """Returns the logits, or the states of decoder and encoder, as PyTorch tensors."""
    import torch

    features, mask, ids = (torch.tensor(array) for array in inputs)
    output = model(features, attention_mask=mask, decoder_input_ids=ids)
    if hasattr(output, "logits"):
        return [output.logits]
    return [output.last_hidden_state, output.encoder_last_hidden_state]
