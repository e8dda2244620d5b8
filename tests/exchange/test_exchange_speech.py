"""Exchanges adapters of speech models with PEFT, and refuses those of AdapterHub by name."""

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj
from tests.helpers import adapted_shapes, random_tree
from tests.speech_models import speech_backbone, speech_inputs, tiny_speech, torch_speech_model

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

# The sum of float32 roundings in some hundred operations on values of order one.
TOLERANCE = 2e-5
FOLDERS = {
    "LoRA": ("Lora", {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj", "fc1"]}),
    "IA3": ("IA3", {"target_modules": ["k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]}),
}


def torch_logits(model, inputs):
    features, mask, ids = map(torch.tensor, inputs)
    with torch.no_grad():
        return model(
            input_features=features, attention_mask=mask, decoder_input_ids=ids
        ).logits.numpy()


def randomise(model):
    """Draws values for what is trained, large enough for every parameter to matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(("kind", "fields"), FOLDERS.values(), ids=FOLDERS)
def test_peft_reads_what_we_write_and_we_what_it_writes(kind, fields, tmp_path):
    """A folder of PEFT computes the same logits here, and PEFT reads the one written again.

    It has no type of a task, since the models of PEFT for text to text are called with tokens.
    """
    ours = speech_backbone(tiny_speech(), seed=8)
    inputs = speech_inputs(ours.module.config, 3)
    config = getattr(peft, f"{kind}Config")(**fields)
    theirs = peft.get_peft_model(torch_speech_model(ours), config).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = torch_logits(theirs, inputs)
    model, params = cj.import_peft(tmp_path / "theirs", ours)
    logits = model.apply({"params": params}, *inputs)
    bound = TOLERANCE * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(logits, expected, rtol=0, atol=bound)

    cj.export_peft(tmp_path / "ours", model, params)
    read = peft.PeftModel.from_pretrained(torch_speech_model(ours), tmp_path / "ours").eval()
    np.testing.assert_array_equal(torch_logits(read, inputs), expected)


def test_adapterhub_has_no_speech_models(tmp_path):
    """No class of AdapterHub is a speech model, and bottlenecks are none of PEFT's adapters."""
    ours = speech_backbone(tiny_speech())
    model = cj.Adapted(ours.module, cj.preset("st"))
    drawn = flatten_dict(random_tree(adapted_shapes(model), seed=3))
    params = unflatten_dict({**drawn, **flatten_dict(ours.params)})
    with pytest.raises(ValueError, match="adapters of AdapterHub are not supported for a SpeechTo"):
        cj.export_adapterhub(tmp_path, model, params)
    with pytest.raises(ValueError, match="PEFT"):
        cj.export_peft(tmp_path, model, params)
