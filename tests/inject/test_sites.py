"""Tests at which sites methods can act; tables of sites for third-party modules."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import compacter_jax as cj
from tests.helpers import (
    IDS,
    TINY_BERT,
    TINY_T5,
    adapted_shapes,
    backbone_of,
    quick_key,
    random_tree,
)

BERT = cj.Bert(TINY_BERT)
T5 = cj.T5(TINY_T5)
ENCODER = cj.T5(TINY_T5, head="encoder")
HALF = {"reduction_factor": 2}
PREFIX = {"prefix_length": 2, "bottleneck_size": 5}


def all_of(*parts):
    return cj.CombinedConfig(parts=parts)


def bottleneck(*sites, **overrides):
    return cj.BottleneckConfig(sites=sites, **HALF, **overrides)


# --- what is refused ----------------------------------------------------------------------------

ACTS_AT_OUTPUT = "acts at sites of the roles output$"
REFUSED = {
    # Roles.
    "LoRA of an embedding": (
        BERT,
        cj.LoRAConfig(sites=("embedding",)),
        r"method 'lora' cannot act at site 'embedding', whose role is 'embedding'; it "
        + ACTS_AT_OUTPUT,
    ),
    "LoRA of a norm": (T5, cj.LoRAConfig(sites=("norm",)), "site 'norm', whose role is 'bias'"),
    "LoRA of the logits": (
        T5,
        cj.LoRAConfig(sites=("logits",)),
        "role is 'bias'; it " + ACTS_AT_OUTPUT,
    ),
    "IA3 of attention": (
        BERT,
        cj.IA3Config(sites=("encoder_key_value",)),
        "role is 'attend'; it acts",
    ),
    "IA3 of inputs at a residual": (
        BERT,
        cj.IA3Config(input_sites=("residual_feed_forward",)),
        "method 'ia3' cannot act at site 'residual_feed_forward', whose role is 'join'",
    ),
    "prefixes of a query": (
        BERT,
        cj.PrefixTuningConfig(sites=("query",)),
        "method 'prefix_tuning' cannot act at site 'query', whose role is 'output'; it acts at "
        "sites of the roles attend",
    ),
    "a prompt at an attention": (
        T5,
        cj.PromptTuningConfig(sites=("cross_key_value",)),
        "method 'prompt_tuning' cannot act at site 'cross_key_value', .* of the roles embedding",
    ),
    "a bottleneck at an attention": (
        T5,
        bottleneck("encoder_key_value"),
        "cannot act at site 'encoder_key_value', .* of the roles output, parallel, join",
    ),
    # Parallel bottlenecks, and bottlenecks after the residual.
    "parallel after": (
        BERT,
        bottleneck("feed_forward", parallel=True),
        "sees only the output of the sub-layer; for parallel adapters use 'parallel_feed_forward'",
    ),
    "serial beside, T5": (
        T5,
        bottleneck("parallel_attention"),
        "site 'parallel_attention' is for parallel adapters; set parallel=True",
    ),
    "serial beside, BERT": (
        BERT,
        bottleneck("parallel_attention"),
        "site 'parallel_attention' is for parallel adapters; set parallel=True",
    ),
    "a residual after": (
        T5,
        bottleneck("attention", original_ln_before=True),
        "original_ln_after and residual_before_ln need the residual; use 'residual_attention'",
    ),
    "a residual beside": (
        T5,
        bottleneck("parallel_feed_forward", parallel=True, original_ln_after=False),
        "need the residual; use 'residual_feed_forward' in place of site 'parallel_feed_forward'",
    ),
    # Names.
    "unknown": (
        BERT,
        cj.LoRAConfig(sites=("queries",)),
        "unknown site 'queries'; Bert has attention,",
    ),
    "cross-attention of BERT": (
        BERT,
        bottleneck("cross_attention"),
        "unknown site 'cross_attention'",
    ),
    "cross-attention of an encoder": (
        ENCODER,
        bottleneck("cross_attention"),
        "unknown site 'cross_attention'; T5 has attention, feed_forward, parallel_attention, par",
    ),
    "prefixes of a decoder that is not there": (
        ENCODER,
        cj.PrefixTuningConfig(sites=("decoder_key_value", "cross_key_value"), **PREFIX),
        "unknown site 'decoder_key_value'; T5 has",
    ),
    "a mistyped prefix": (
        T5,
        cj.PrefixTuningConfig(sites=("encoder_key_value", "cros_key_value"), **PREFIX),
        "unknown site 'cros_key_value'",
    ),
    "mistyped BitFit": (BERT, cj.BitFitConfig(sites=("lineer",)), "unknown site 'lineer'"),
    "logits of an encoder": (
        ENCODER,
        cj.LoRAConfig(sites=("logits",)),
        "unknown site 'logits'; T5 has attention",
    ),
    # Two layers in one module.
    "one projection by two names": (
        BERT,
        cj.LoRAConfig(sites=("attention", "output_projection")),
        "sites 'attention' and 'output_projection' have the same host, "
        "encoder/layer/0/attention/output/den",
    ),
    "two methods at one site": (
        T5,
        all_of(cj.LoRAConfig(), cj.IA3Config()),
        "sites 'value' and 'value' have the same host, encoder/block/0/layer/0/SelfAttention/v",
    ),
    "two ends of a sub-layer": (
        BERT,
        bottleneck("residual_attention", "parallel_attention", parallel=True),
        "have the same host, encoder/layer/0/attention/output;",
    ),
    "two methods of one module": (
        T5,
        all_of(
            cj.PrefixTuningConfig(**PREFIX),
            cj.preset("parallel", sites=("parallel_attention",)),
        ),
        "sites 'encoder_key_value' and 'parallel_attention' have the same host, "
        "encoder/block/0/layer/0/SelfA",
    ),
    "a prompt and biases of the model itself": (
        T5,
        all_of(cj.PromptTuningConfig(prompt_length=2), cj.BitFitConfig()),
        "sites 'embedding' and 'logits' have the same host, the model itself; name only one of "
        "them",
    ),
    # Layers.
    "a layer too many": (
        BERT,
        cj.LoRAConfig(leave_out=(1, 2)),
        r"leave_out has \[2\], but site 'query' has layers 0 to 1",
    ),
    "a layer that one stack alone has": (
        T5,
        cj.PrefixTuningConfig(leave_out=(1,), **PREFIX),
        r"leave_out has \[1\], but site 'decoder_key_value' has layers 0 to 0",
    ),
    "no layer left, LoRA": (
        BERT,
        cj.LoRAConfig(leave_out=(0, 1)),
        "leaves no layer of site 'query'",
    ),
    "no layer left, IA3": (
        BERT,
        cj.IA3Config(leave_out=(0, 1)),
        "leaves no layer of site 'key' to",
    ),
    "no layer left, prefixes": (
        BERT,
        cj.PrefixTuningConfig(leave_out=(0, 1), **PREFIX),
        "leave_out leaves no layer of site 'encoder_key_value' to adapt",
    ),
    "no layer left, BitFit": (
        T5,
        cj.BitFitConfig(leave_out=(0, 1)),
        "leave_out leaves no layer of site 'linear' to adapt",
    ),
    "no layer left, beside": (
        T5,
        cj.preset("parallel", leave_out=(0, 1)),
        "leave_out leaves no layer of site 'parallel_feed_forward' to adapt",
    ),
    "AdapterDrop of more layers than there are": (
        T5,
        cj.preset("adapterdrop", **HALF),
        r"leave_out has \[2, 3, 4\], but site 'attention' has layers 0 to 1",
    ),
    "BitFit without some of BERT's biases": (
        BERT,
        cj.BitFitConfig(leave_out=(0,)),
        "Bert has biases of its own, and BitFit trains all of them; leave_out applies only to new "
        "biases",
    ),
    # Prompts.
    "no room for a token": (
        BERT,
        cj.PromptTuningConfig(prompt_length=9),
        "prompt_length=9 and 1 tokens together exceed .* max_position_embeddings=9; truncate to 0 "
        "to",
    ),
    "a prompt of another call": (
        nn.Dense(3),
        cj.PromptTuningConfig(),
        "Dense has no table of sites; pass sites=",
    ),
}


@pytest.mark.parametrize(("module", "method", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(module, method, message):
    with pytest.raises(ValueError, match=message):
        adapted_shapes(cj.Adapted(module, method))


def test_a_prompt_and_a_text_too_long_for_the_positions():
    model = cj.Adapted(BERT, cj.PromptTuningConfig(prompt_length=5))
    params = adapted_shapes(model)
    call = lambda ids: jax.eval_shape(model.apply, {"params": params}, ids)  # noqa: E731
    assert call(IDS[:, :4]).last_hidden_state.shape == (2, 4, TINY_BERT.hidden_size)
    with pytest.raises(ValueError, match="prompt_length=5 and 5 tokens together exceed"):
        call(IDS)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ((), "prompt_init='vocabulary' needs prompt_token_ids, such as the most common tokens"),
        ((3, 17), "prompt_token_ids contains 17, but the vocabulary has 17 tokens"),
    ],
)
def test_prompts_of_tokens_that_are_not_there(ids, message):
    method = cj.PromptTuningConfig(prompt_init="vocabulary", prompt_length=2, prompt_token_ids=ids)
    with pytest.raises(ValueError, match=message):
        cj.init_adapters(cj.Adapted(BERT, method), backbone_of(BERT), quick_key(0))


@pytest.mark.parametrize("module", [BERT, T5], ids=["bert", "t5"])
@pytest.mark.parametrize(("length", "rows"), [(2, [16, 3]), (5, [16, 3, 0, 16, 3])])
def test_prompts_of_tokens_repeat_them(module, length, rows):
    method = cj.PromptTuningConfig(
        prompt_init="vocabulary", prompt_length=length, prompt_token_ids=(16, 3, 0)
    )
    backbone = backbone_of(module)
    flat = flatten_dict(
        cj.init_adapters(cj.Adapted(module, method), backbone, quick_key(0)), sep="/"
    )
    (prompt,) = (leaf for path, leaf in flat.items() if path.endswith("adapter/prompt"))
    np.testing.assert_array_equal(prompt, flat[module.word_embeddings][np.array(rows)])


def test_what_a_combination_trains_and_leaves_out():
    """Sites that a backbone lacks are skipped; each part leaves out its own layers."""
    method = all_of(
        cj.PrefixTuningConfig(**PREFIX, leave_out=(0,)),
        cj.LoRAConfig(leave_out=(1,)),
        cj.BitFitConfig(),
    )
    shapes = adapted_shapes(cj.Adapted(BERT, method))
    hosts = {
        path.split("/adapter/")[0] for path in flatten_dict(shapes, sep="/") if "adapter" in path
    }
    assert hosts == {
        "encoder/layer/1/attention/self",
        "encoder/layer/0/attention/self/query",
        "encoder/layer/0/attention/self/value",
    }
    labels = flatten_dict(cj.label_params(shapes, method), sep="/")
    assert labels["encoder/layer/0/output/LayerNorm/bias"] == "train"
    assert labels["encoder/layer/0/output/LayerNorm/scale"] == "freeze"
    assert labels["prefix_encoder_key_value_kernel"] == "train"


def test_layers_left_out_of_new_biases():
    """The bias of the logits belongs to no layer, so it is never left out."""
    shapes = adapted_shapes(cj.Adapted(T5, cj.BitFitConfig(leave_out=(0,))))
    paths = [path for path in flatten_dict(shapes, sep="/") if path.endswith("adapter/bias")]
    assert "adapter/bias" in paths
    assert {path.split("/layer/")[0] for path in paths} == {"adapter/bias", "encoder/block/1"}


# --- other people's modules ---------------------------------------------------------------------


class Mixer(nn.Module):
    """A module that twice applies a linear layer to the running mean of the words."""

    sites = {  # noqa: RUF012
        "mix": r"mix_(?P<layer>\d+)",
        "words": cj.Site(host="words", role="embedding"),
        "heads": cj.Site(host="head", role="bias"),
    }

    @nn.compact
    def __call__(self, input_ids, attention_mask):
        x = nn.Embed(7, 4, name="words")(input_ids)
        for i in range(2):
            total = jnp.cumsum(x * attention_mask[..., None], 1)
            mean = total / jnp.cumsum(attention_mask, 1)[..., None]
            x = jnp.tanh(nn.Dense(4, use_bias=False, name=f"mix_{i}")(mean))
        return nn.Dense(3, name="head")(x[:, -1])

    def dummy_inputs(self):
        return jnp.zeros((1, 1), int), jnp.ones((1, 1), int)


MIXED_IDS = np.array([[1, 6, 0, 2], [3, 3, 5, 4]])
MIXED_MASK = np.array([[1, 1, 0, 1], [1, 1, 1, 1]])


def mixer(params, ids=MIXED_IDS, mask=MIXED_MASK):
    """Computes the model in float64 NumPy, with whatever parameters the layers have."""
    params = {path: np.float64(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    x = params["words/embedding"][ids]
    if (prompt := params.get("words/adapter/prompt")) is not None:
        x = np.concatenate([np.stack([prompt] * len(x)), x], 1)
        mask = np.pad(mask, ((0, 0), (len(prompt), 0)), constant_values=1)
    for i in range(2):
        mean = np.cumsum(x * mask[..., None], 1) / np.cumsum(mask, 1)[..., None]
        y = mean @ params[f"mix_{i}/kernel"]
        if (left := params.get(f"mix_{i}/adapter/left")) is not None:
            y = y + 1.5 * mean @ left @ params[f"mix_{i}/adapter/right"]
        x = np.tanh(y * params.get(f"mix_{i}/adapter/scale", 1.0))
    y = x[:, -1] @ params["head/kernel"] + params["head/bias"]
    return y + params.get("head/adapter/bias", 0.0)


MIXED = {
    "LoRA": (cj.LoRAConfig(sites=("mix",), rank=2, lora_alpha=3.0), 4),
    "LoRA of one layer": (cj.LoRAConfig(sites=("mix",), rank=2, lora_alpha=3.0, leave_out=(0,)), 2),
    "IA3": (cj.IA3Config(sites=("mix",), input_sites=()), 2),
    "prompt": (cj.PromptTuningConfig(sites=("words",), prompt_length=3), 1),
    "BitFit": (cj.BitFitConfig(sites=("heads",)), 1),
    "all": (
        all_of(
            cj.LoRAConfig(sites=("mix",), rank=2, lora_alpha=3.0),
            cj.PromptTuningConfig(sites=("words",), prompt_length=2),
        ),
        5,
    ),
}


@pytest.mark.parametrize(("method", "new"), MIXED.values(), ids=MIXED)
def test_a_module_with_a_table_of_its_own(method, new, tmp_path):
    backbone = backbone_of(Mixer())
    model = cj.Adapted(backbone.module, method)
    params = cj.init_adapters(model, backbone, quick_key(0))
    assert len(jax.tree.leaves(params)) == len(jax.tree.leaves(backbone.params)) + new
    random = random_tree(params, seed=1)
    logits = model.apply({"params": random}, MIXED_IDS, MIXED_MASK)
    np.testing.assert_allclose(logits, mixer(random), atol=1e-6)
    cj.save_adapter(tmp_path, model, params)
    loaded_model, loaded = cj.load_adapter(tmp_path, backbone)
    assert loaded_model == model
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_merging_into_such_a_module():
    backbone = backbone_of(Mixer())
    model = cj.Adapted(backbone.module, MIXED["LoRA"][0])
    params = random_tree(cj.init_adapters(model, backbone, quick_key(0)), seed=1)
    merged = cj.merge_adapter(model, params)
    assert jax.tree.structure(merged) == jax.tree.structure(backbone.params)
    np.testing.assert_allclose(mixer(merged), mixer(params), atol=1e-6)


def test_prompts_of_a_vocabulary_that_has_no_name():
    method = cj.PromptTuningConfig(
        sites=("words",), prompt_length=2, prompt_init="vocabulary", prompt_token_ids=(1,)
    )
    message = "needs Mixer to have a class attribute word_embeddings, the path of its embeddings"
    with pytest.raises(ValueError, match=message):
        cj.init_adapters(cj.Adapted(Mixer(), method), backbone_of(Mixer()), quick_key(0))


def test_a_prompt_wants_a_call_with_input_ids():
    class Words(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            return nn.Embed(7, 4, name="words")(tokens)

        def dummy_inputs(self):
            return (jnp.zeros((1, 1), int),)

    model = cj.Adapted(Words(), cj.PromptTuningConfig(sites=("words",)), Mixer.sites)
    with pytest.raises(
        ValueError, match="a backbone that is called with input_ids, but Words is not"
    ):
        adapted_shapes(model)
