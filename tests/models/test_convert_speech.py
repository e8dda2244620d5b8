"""Reads and writes Hugging Face checkpoints of speech models."""

import json
import math

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import compacter_jax as cj
from compacter_jax.models.loading import module_from_name
from compacter_jax.models.speech_to_text.checkpoint import (
    speech_from_hugging_face,
    speech_to_hugging_face,
)
from tests.helpers import assert_equal_trees
from tests.speech_models import (
    speech_backbone,
    tiny_speech,
    torch_speech_config,
    torch_speech_model,
)

WITH_LOGITS = "Speech2TextForConditionalGeneration"


@pytest.mark.contract
@pytest.mark.parametrize(
    ("changes", "head"),
    [
        ({}, "conditional_generation"),
        ({"tie_word_embeddings": False}, "conditional_generation"),
        ({"mask_between_convolutions": True, "conv_kernel_sizes": (3, 5, 7)}, None),
    ],
)
def test_checkpoints_there_and_back_bit_for_bit(changes, head, tmp_path):
    """Each library reads what the other one wrote, and every weight keeps its bits."""
    ours = speech_backbone(tiny_speech(**changes), head)
    theirs = torch_speech_model(ours)
    theirs.save_pretrained(tmp_path / "theirs")
    read = cj.load_backbone(tmp_path / "theirs")
    assert read.module == ours.module
    assert read.new_parameters == ()
    assert_equal_trees(read.params, ours.params)

    cj.save_backbone(tmp_path / "ours", read.module, read.params, read.config)
    again = type(theirs).from_pretrained(tmp_path / "ours")
    expected = theirs.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for key, tensor in again.state_dict().items():
        assert tensor.numpy().tobytes() == expected[key].numpy().tobytes(), key
    assert cj.load_backbone(tmp_path / "ours").module == ours.module
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    assert_equal_trees(speech_from_hugging_face(stored), jax.device_get(ours.params))


def written(folder, config, tensors, **settings):
    """Writes a folder like that of save_pretrained."""
    folder.mkdir(exist_ok=True)
    described = json.loads(torch_speech_config(config).to_json_string(use_diff=False)) | settings
    (folder / "config.json").write_text(json.dumps(described))
    save_file(
        {n: np.ascontiguousarray(t) for n, t in tensors.items()}, folder / "model.safetensors"
    )
    return folder


def test_leftovers_and_copies(tmp_path):
    """Old checkpoints have sinusoids, versions and a copy of the embeddings in the head."""
    ours = speech_backbone(tiny_speech())
    tensors = speech_to_hugging_face(ours.params)
    embedding = tensors["model.decoder.embed_tokens.weight"]
    table = np.ones((9, 24), np.float32)
    tensors |= {f"model.{s}.embed_positions.weights": table for s in ("encoder", "decoder")}
    tensors |= {"lm_head.weight": embedding, "model.encoder.version": np.ones(1, np.float32)}
    settings = {"architectures": [WITH_LOGITS]}
    folder = written(tmp_path / "all", ours.module.config, tensors, **settings)
    assert_equal_trees(cj.load_backbone(folder).params, ours.params)
    states = cj.load_backbone(folder, head=None)
    assert states.module.head is None
    assert_equal_trees(states.params, ours.params)
    other = tensors | {"lm_head.weight": embedding + 1}
    folder = written(tmp_path / "other", ours.module.config, other, **settings)
    with pytest.raises(ValueError, match=r"lm_head/kernel in .* differs from decoder_embed_to"):
        cj.load_backbone(folder)


BAD = {
    "kernels that do not fit": (
        {"conv_kernel_sizes": [5, 3]},
        r"of another shape: encoder_conv/conv_layers/1/kernel \(checkpoint \(5, 6, 48\), module",
    ),
    "even kernels": ({"conv_kernel_sizes": [4, 5]}, r"conv_kernel_sizes=\[4, 5\] must be odd num"),
    "no list": ({"conv_kernel_sizes": "5"}, "conv_kernel_sizes='5' must be"),
    "more kernels": (
        {"conv_kernel_sizes": [5, 5, 5]},
        "is not a configuration of 'speech_to_text'",
    ),
    "channels": (
        {"input_channels": 2},
        r"encoder_conv/conv_layers/0/kernel \(checkpoint \(5, 7, 12\), module \(5, 14, 12\)\)",
    ),
    "a mask that is none": (
        {"mask_between_convolutions": "no"},
        "mask_between_convolutions='no' m",
    ),
    "layers": ({"encoder_layers": 3}, "encoder_layers=3, but there are weights of 2 layers"),
    "compressed": (
        {"decoder_layer": "compressed"},
        "decoder_layer='compressed', but only the enco",
    ),
}


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD)
def test_a_checkpoint_that_does_not_fit(settings, message, tmp_path):
    """Convolutions, channels and layers that are not the model's are refused by name."""
    ours = speech_backbone(tiny_speech())
    tensors = speech_to_hugging_face(ours.params)
    folder = written(tmp_path, tiny_speech(), tensors, architectures=[WITH_LOGITS], **settings)
    with pytest.raises(ValueError, match=message):
        cj.load_backbone(folder)


def test_names_labels_and_related_types(tmp_path):
    """A strange tensor, labels, and types that resemble this one are refused."""
    with pytest.raises(ValueError, match=r"'encoder.x' is not one of these encoder-decoders"):
        speech_from_hugging_face({"model.encoder.x": np.ones(2)})
    with pytest.raises(ValueError, match="num_labels=2 was given, but this encoder-decoder has no"):
        module_from_name("facebook/s2t-small-librispeech-asr", num_labels=2)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "whisper"}))
    with pytest.raises(ValueError, match=r"'whisper' \(it resembles 'speech_to_text', but its lay"):
        cj.load_backbone(tmp_path)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("s2t-small-librispeech-asr", 29_536_256),
        ("s2t-medium-librispeech-asr", 71_207_936),
        ("s2t-large-librispeech-asr", 267_834_368),
        ("s2t-small-mustc-en-de-st", 31_072_256),
        ("s2t-medium-mustc-multilingual-st", 76_327_936),
    ],
)
def test_the_published_sizes(name, count):
    """The numbers of parameters are the published 30, 71, 268, 31 and 76.3 million."""
    module = module_from_name(f"facebook/{name}")
    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.dummy_inputs())["params"]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count
