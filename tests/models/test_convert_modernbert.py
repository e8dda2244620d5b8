"""Reads and writes checkpoints of ModernBERT, and compares them with transformers' own."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

import compacter_jax as cj
from compacter_jax.models.encoder import HEADS
from compacter_jax.models.modernbert.checkpoint import (
    modernbert_from_hugging_face,
    modernbert_to_hugging_face,
)
from compacter_jax.models.modernbert.config import GLOBAL, LOCAL
from compacter_jax.models.modernbert.model import ModernBert
from tests.modernbert_models import (
    ENDINGS,
    inputs_of,
    modeling,
    random_config,
    small_backbone,
    tiny,
    torch_config,
    torch_model,
    torch_output,
)


def tensors_in(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


@pytest.mark.contract
@pytest.mark.parametrize("head", HEADS)
def test_checkpoints_there_and_back_are_equal_bit_for_bit(tmp_path, head):
    """A checkpoint of transformers loads, computes the same and is written with the same bits."""
    torch = pytest.importorskip("torch")
    config = random_config(31, tie_word_embeddings=head == "masked_lm", pad_token_id=0)
    model = torch_model(small_backbone(config, head, seed=5))
    model.save_pretrained(tmp_path / "theirs")
    loaded = cj.load_backbone(tmp_path / "theirs")
    assert loaded.module.head == head
    assert loaded.new_parameters == ()
    inputs = inputs_of(config, 31)
    output = loaded.module.apply({"params": loaded.params}, *inputs)
    expected = torch_output(model, *inputs).detach().numpy()
    np.testing.assert_allclose(
        getattr(output, "last_hidden_state", output), expected, atol=2e-5, rtol=0
    )
    cj.save_backbone(tmp_path / "ours", loaded.module, loaded.params, loaded.config)
    theirs, ours = tensors_in(tmp_path / "theirs"), tensors_in(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)
    cls = getattr(modeling(), f"ModernBert{ENDINGS[head]}")
    again = cls.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    with torch.no_grad():
        np.testing.assert_array_equal(torch_output(again, *inputs).numpy(), expected)


def written(folder, config, head, **changes):
    """Writes a checkpoint with random weights and further fields of config.json."""
    backbone = small_backbone(config, head)
    settings = json.loads(torch_config(backbone.module).to_json_string(use_diff=False)) | changes
    settings |= {"architectures": [f"ModernBert{ENDINGS[head]}"]}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings), "utf-8")
    tensors = modernbert_to_hugging_face(backbone.params)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return backbone


@pytest.mark.contract
def test_both_forms_of_the_configuration_are_read(tmp_path):
    """`layer_types` and `rope_parameters` of transformers 5 take the place of the older fields."""
    rotary = {
        GLOBAL: {"rope_type": "default", "rope_theta": 77.0},
        LOCAL: {"rope_type": "default", "rope_theta": 55.0},
    }
    new = {"layer_types": [LOCAL, GLOBAL], "rope_parameters": rotary}
    written(tmp_path, tiny(), None, **new)
    config = cj.load_backbone(tmp_path).module.config
    assert config.kinds == (LOCAL, GLOBAL)
    assert [config.rotary_base(kind) for kind in config.kinds] == [55.0, 77.0]
    settings = json.loads((tmp_path / "config.json").read_text("utf-8"))
    for name in new:
        del settings[name]
    settings |= {"global_rope_theta": 33.0, "local_rope_theta": 22.0}
    settings |= {"global_attn_every_n_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(settings), "utf-8")
    config = cj.load_backbone(tmp_path).module.config
    assert config.kinds == (GLOBAL, GLOBAL)
    assert (config.global_rope_theta, config.local_rope_theta) == (33.0, 22.0)


def test_scaled_rotary_positions_are_refused(tmp_path):
    """The message names the field; a kind of positions that is not computed must not load."""
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10.0}
    written(tmp_path, tiny(), None, rope_parameters={GLOBAL: scaled, LOCAL: scaled})
    with pytest.raises(ValueError, match=r"only unscaled rotary positions|not a configuration"):
        cj.load_backbone(tmp_path)


def test_a_classifier_starts_from_the_head_of_the_pre_training(tmp_path):
    """The head's dense layer and norm are those of the checkpoint; the classifier is new."""
    made = written(tmp_path, tiny(), "masked_lm")
    loaded = cj.load_backbone(tmp_path, head="token_classification", num_labels=4)
    assert loaded.new_parameters == ("classifier/bias", "classifier/kernel")
    for path, leaf in flatten_dict(made.params["head"], sep="/").items():
        np.testing.assert_array_equal(flatten_dict(loaded.params["head"], sep="/")[path], leaf)
    assert "decoder" not in loaded.params


def test_a_chosen_pooling_is_written_for_both_readers(tmp_path):
    """config.json tells transformers, and 1_Pooling/config.json this library."""
    written(tmp_path / "one", tiny(), "sequence_classification")
    loaded = cj.load_backbone(tmp_path / "one", pooling="mean")
    cj.save_backbone(tmp_path / "two", loaded.module, loaded.params, loaded.config)
    settings = json.loads((tmp_path / "two" / "config.json").read_text("utf-8"))
    assert settings["classifier_pooling"] == "mean"
    again = cj.load_backbone(tmp_path / "two")
    assert again.module.pooling == "mean"
    assert again.module.config.classifier_pooling == "mean"
    inputs = inputs_of(tiny(), 1)
    one, two = (x.module.apply({"params": x.params}, *inputs) for x in (loaded, again))
    np.testing.assert_array_equal(one, two)
    assert cj.load_backbone(tmp_path / "one").module.pooling == "first"


def test_tensors_that_cannot_be_read_are_refused():
    """The message names the tensor."""
    with pytest.raises(ValueError, match=r"'model.layers.0.attn.Wqkv.weight' has shape \(7, 4\)"):
        modernbert_from_hugging_face({"model.layers.0.attn.Wqkv.weight": np.ones((7, 4))})
    with pytest.raises(ValueError, match=r"'model.layers.0.x' is not one of ModernBERT"):
        modernbert_from_hugging_face({"model.layers.0.x": np.ones(2)})
    with pytest.raises(ValueError, match=r"not parameters of ModernBERT: .*adapter"):
        modernbert_to_hugging_face({"layers": {"0": {"adapter": {"left": np.ones(2)}}}})


def test_the_initial_values_have_the_deviations_of_transformers():
    """Weights of the last layers of sub-layers are smaller, and none is beyond two deviations."""
    config = tiny(hidden_size=48, intermediate_size=40)
    module = ModernBert(config, head="masked_lm")
    params = module.init(jax.random.key(0), *module.dummy_inputs())["params"]
    layer = params["layers"]["1"]
    first, last = layer["mlp"]["Wi"]["kernel"], layer["mlp"]["Wo"]["kernel"]
    small = 0.02 / (2 * config.num_hidden_layers) ** 0.5
    # A normal distribution that is cut off at two deviations has 0.88 of the deviation.
    np.testing.assert_allclose([first.std(), last.std()], [0.88 * 0.02, 0.88 * small], rtol=0.1)
    assert np.abs(first).max() <= 2 * 0.02
    assert np.abs(last).max() <= 2 * small
