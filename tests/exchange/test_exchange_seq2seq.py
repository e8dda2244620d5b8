"""Exchanges adapters of BART's line with AdapterHub and PEFT: each library reads the other's."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj
from tests.helpers import adapted_shapes, random_tree
from tests.seq2seq_models import CONFIGS, inputs_of, small_backbone, tiny, torch_config, torch_model

adapters = pytest.importorskip("adapters")
peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

# The sum of float32 roundings in some hundred operations on values of order one.
TOLERANCE = 2e-5
SMALL = {"reduction_factor": 2, "phm_dim": 3}
# AdapterHub's prefixes have as many heads in the decoder as in the encoder.
HEADS = {"encoder_attention_heads": 3, "decoder_attention_heads": 3}
GELU = {"activation_function": "gelu", "encoder_layers": 2, **HEADS}


@functools.cache
def backbone(model_type):
    """Returns a backbone whose logits have no bias, as in AdapterHub's model classes."""
    ours = small_backbone(tiny(model_type, **GELU), seed=7)
    ours.params["final_logits_bias"] = {"bias": jnp.zeros(23)}
    return ours


def logits(model, params, inputs):
    return np.asarray(model.apply({"params": params}, *map(jnp.asarray, inputs)))


def torch_logits(model, inputs):
    names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
    with torch.no_grad():
        return model(**{n: torch.tensor(a) for n, a in zip(names, inputs, strict=True)}).logits


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


def random_params(model, ours):
    """Returns the backbone's parameters with random ones of the method beside them."""
    drawn = flatten_dict(random_tree(adapted_shapes(model), seed=3))
    return unflatten_dict({**drawn, **flatten_dict(ours.params)})


# --- AdapterHub ---------------------------------------------------------------------------------


def hub_model(model_type):
    """Returns AdapterHub's model with our weights and the tied head."""
    cls = {"bart": adapters.BartAdapterModel, "mbart": adapters.MBartAdapterModel}[model_type]
    model = cls(torch_config(backbone(model_type).module.config)).eval()
    state = torch_model(backbone(model_type)).state_dict()
    names = set(model.state_dict())
    tensors = {name: tensor for name, tensor in state.items() if name in names}
    assert len(tensors) > 40
    model.load_state_dict(tensors, strict=False)
    return model


def with_head(model, name):
    model.add_seq2seq_lm_head(name)
    model.tie_weights()
    return model.eval()


def bottleneck(**settings):
    fields = {"mh_adapter": True, "output_adapter": True, "non_linearity": "relu"}
    return adapters.BnConfig(**(fields | {"reduction_factor": 2} | settings))


HUB = {
    "compacter": lambda: adapters.CompacterConfig(**SMALL),
    "double_seq_bn, layers left out": lambda: adapters.DoubleSeqBnConfig(leave_out=[0, 2]),
    "par_bn": adapters.ParBnConfig,
    "LoRA": lambda: adapters.LoRAConfig(
        r=2, alpha=1, intermediate_lora=True, output_lora=True, attn_matrices=["q", "k", "v"]
    ),
    "IA3": adapters.IA3Config,
    "prefix tuning": lambda: adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=5),
    "after cross-attention": lambda: bottleneck(cross_adapter=True, original_ln_before=True),
}
OF_BART = {
    "skip from the sum": lambda: bottleneck(original_ln_before=True, residual_before_ln="post_add"),
}
ON_MBART = ("par_bn", "prefix tuning", "after cross-attention")
CASES = [("bart", name) for name in (*HUB, *OF_BART)] + [("mbart", name) for name in ON_MBART]


@pytest.mark.filterwarnings("ignore:`past_key_value` is deprecated")
@pytest.mark.parametrize(("model_type", "name"), CASES)
def test_adapterhub_reads_what_we_write_and_we_what_it_writes(model_type, name, tmp_path):
    """An adapter of AdapterHub computes the same logits here, and after it was exported again."""
    ours = backbone(model_type)
    inputs = inputs_of(ours.module.config, 3)
    model = hub_model(model_type)
    model.add_adapter("a", config=(HUB | OF_BART)[name]())
    model.set_active_adapters("a")
    model.train_adapter("a")
    randomise(model)
    model.save_adapter(str(tmp_path / "saved"), "a")
    expected = torch_logits(with_head(model, "a"), inputs)
    adapted, params = cj.import_adapterhub(tmp_path / "saved", ours)
    assert_equal_logits(logits(adapted, params, inputs), expected)

    cj.export_adapterhub(tmp_path / "exported", adapted, params, name="b")
    again = hub_model(model_type)
    again.load_adapter(str(tmp_path / "exported"), use_safetensors=True, set_active=True)
    assert_equal_logits(torch_logits(with_head(again, "b"), inputs), expected)


def test_a_bottleneck_at_a_projection_is_exported(tmp_path):
    """Bottlenecks after projections are written where sub-layers join the residual."""
    ours = backbone("bart")
    sites = ("attention", "cross_attention", "feed_forward")
    model = cj.Adapted(ours.module, cj.BottleneckConfig(sites=sites, reduction_factor=2))
    params = random_params(model, ours)
    cj.export_adapterhub(tmp_path, model, params, name="b")
    inputs = inputs_of(ours.module.config, 4)
    theirs = hub_model("bart")
    theirs.load_adapter(str(tmp_path), use_safetensors=True, set_active=True)
    theirs = with_head(theirs, "b")
    assert_equal_logits(torch_logits(theirs, inputs), logits(model, params, inputs))


def test_the_head_of_a_bart_has_a_bias(tmp_path):
    """A folder of transformers' own class has the tied head and the bias of the logits."""
    ours = for_peft("bart")
    model = torch_model(ours)
    adapters.init(model)
    model.add_adapter("a", config=HUB["LoRA"]())
    model.set_active_adapters("a")
    model.train_adapter("a")
    randomise(model)
    model.save_adapter(str(tmp_path), "a")
    stored = {p.name for p in tmp_path.iterdir()}
    assert "head_config.json" in stored
    inputs = inputs_of(ours.module.config, 3)
    adapted, params = cj.import_adapterhub(tmp_path, ours)
    assert_equal_logits(logits(adapted, params, inputs), torch_logits(model.eval(), inputs))


def test_what_adapterhub_lacks_is_refused(tmp_path):
    """M2M-100 and Marian are in no class of AdapterHub, and it has no adapters at embeddings."""
    for name in ("m2m_100", "marian"):
        ours = small_backbone(CONFIGS[name])
        with pytest.raises(ValueError, match=f"a Seq2Seq of model_type='{name}'; use .* bart, mb"):
            cj.export_adapterhub(tmp_path, cj.Adapted(ours.module, cj.preset("lora")), ours.params)
    ours = backbone("bart")
    method = cj.BottleneckConfig(sites=("encoder_embedding",), reduction_factor=2)
    model = cj.Adapted(ours.module, method)
    params = random_params(model, ours)
    with pytest.raises(ValueError, match=r"AdapterHub cannot place .* it has no place at encoder"):
        cj.export_adapterhub(tmp_path / "exported", model, params)


# --- PEFT ---------------------------------------------------------------------------------------

LORA = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj", "fc1"]}
PEFT = {
    "LoRA, m2m_100": ("m2m_100", "Lora", LORA),
    "LoRA of one layer, bart": ("bart", "Lora", LORA | {"layers_to_transform": [0]}),
    "LoRA and norms, mbart": (
        "mbart",
        "Lora",
        {"target_modules": ["out_proj"], "modules_to_save": ["final_layer_norm"]},
    ),
    "LoRA, unshared marian": ("unshared marian", "Lora", LORA),
    "IA3, m2m_100": (
        "m2m_100",
        "IA3",
        {"target_modules": ["k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]},
    ),
    "prompts, bart": ("bart", "PromptTuning", {"num_virtual_tokens": 3}),
}


@functools.cache
def for_peft(name):
    return small_backbone(CONFIGS[name], seed=8)


@pytest.mark.parametrize(("name", "kind", "fields"), PEFT.values(), ids=PEFT)
def test_peft_reads_what_we_write_and_we_what_it_writes(name, kind, fields, tmp_path):
    """A folder of PEFT computes the same logits here, and PEFT reads the one written again."""
    ours = for_peft(name)
    inputs = inputs_of(ours.module.config, 3)
    config = getattr(peft, f"{kind}Config")(task_type="SEQ_2_SEQ_LM", **fields)
    theirs = peft.get_peft_model(torch_model(ours), config).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = torch_logits(theirs, inputs)
    model, params = cj.import_peft(tmp_path / "theirs", ours)
    assert_equal_logits(logits(model, params, inputs), expected)

    cj.export_peft(tmp_path / "ours", model, params)
    read = peft.PeftModel.from_pretrained(torch_model(ours), tmp_path / "ours").eval()
    np.testing.assert_array_equal(torch_logits(read, inputs), expected)


def test_prompts_of_a_marian_with_scaled_embeddings_are_refused(tmp_path):
    """PEFT leaves the scaling of Marian's embeddings out where there are prompts."""
    ours = for_peft("unshared marian")
    model = cj.Adapted(ours.module, cj.PromptTuningConfig(prompt_length=2))
    params = random_params(model, ours)
    with pytest.raises(ValueError, match="PEFT does not scale the embeddings of a Marian beside"):
        cj.export_peft(tmp_path, model, params)
