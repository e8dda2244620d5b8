"""Backbones with methods in float64 NumPy: each layer applies the adapter under its own path."""

import math
import re
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from compacter_jax.methods.bottleneck import BottleneckConfig
from compacter_jax.methods.invertible import InvertibleConfig
from compacter_jax.methods.lora import LoRAConfig
from compacter_jax.methods.prefix_tuning import PrefixTuningConfig
from compacter_jax.models.encoder import Encoder
from compacter_jax.models.modernbert.config import LOCAL
from compacter_jax.models.modernbert.model import ModernBert
from compacter_jax.models.seq2seq.model import Seq2Seq
from compacter_jax.models.speech_to_text.model import SpeechToText
from compacter_jax.models.t5.layers import relative_position_bucket
from tests.helpers import ACTIVATIONS, adapter_update

# A bias on scores that excludes a key completely.
HIDDEN = -1e30


class _Names(NamedTuple):
    """The names in the layers of an encoder; after a sub-layer: linear layer, norm and place."""

    stack: str
    attention: str
    projections: tuple
    after_attention: tuple
    inner: str
    after_inner: tuple


_BERT = _Names(
    "encoder/layer",
    "attention/self",
    ("query", "key", "value"),
    ("attention/output/dense", "attention/output/LayerNorm", "attention/output"),
    "intermediate/dense",
    ("output/dense", "output/LayerNorm", "output"),
)
_DISTILBERT = _Names(
    "transformer/layer",
    "attention",
    ("q_lin", "k_lin", "v_lin"),
    ("attention/out_lin", "sa_layer_norm", "attention_residual"),
    "ffn/lin1",
    ("ffn/lin2", "output_layer_norm", "output_residual"),
)
# `model_type` -> both layers of the classifier, and the activation between them.
_CLASSIFIERS = {
    "bert": ("pooler/dense", "classifier", "tanh"),
    "roberta": ("classifier/dense", "classifier/out_proj", "tanh"),
    "electra": ("classifier/dense", "classifier/out_proj", "gelu"),
    "distilbert": ("pre_classifier", "classifier", "relu"),
}


def _is_distilbert(config):
    return config.model_type == "distilbert"


def softmax(scores):
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def pad_left(x, count):
    """Pads the last axis with `count` zeros on the left."""
    return np.pad(x, ((0, 0),) * (x.ndim - 1) + ((count, 0),))


class Reference:
    """A model with a method, by the equations of the papers, and the `params` of an `Adapted`.

    The names of the parameters alone determine where the method acts.
    """

    def __init__(self, module, method, params):
        self.module, self.parts = module, method.inserted()
        self.config = module.layers if isinstance(module, SpeechToText) else module.config
        self.params = {path: np.float64(v) for path, v in flatten_dict(params, sep="/").items()}

    def __call__(self, *inputs):
        """Returns the logits for the inputs of the module, including all masks."""
        if isinstance(self.module, Seq2Seq):
            return self._seq2seq(*inputs)
        if isinstance(self.module, SpeechToText):
            return self._speech(*inputs)
        if isinstance(self.module, ModernBert):
            return self._modernbert(*inputs)
        return (self._encoder if isinstance(self.module, Encoder) else self._t5)(*inputs)

    # --- what a method does -------------------------------------------------------------------

    def _part(self, kind):
        return next(part for part in self.parts if isinstance(part, kind))

    def _own(self, host, name):
        return self.params.get(f"{host}/adapter/{name}".removeprefix("/"))

    def _update(self, host, x):
        """Returns the update of the bottleneck under `host`, or 0 if there is none."""
        if self._own(host, "down/bias") is None:
            return 0.0
        own = {
            path.removeprefix(f"{host}/"): leaf
            for path, leaf in self.params.items()
            if path.startswith((f"{host}/adapter/", "phm_"))
        }
        return adapter_update(self._bottleneck(host), own, x)

    def _bottleneck(self, host):
        """Returns the part of the method whose bottleneck is under `host`."""
        table = self.module.sites
        hosts = {name: getattr(site, "host", site) for name, site in table.items()}
        parts = [part for part in self.parts if isinstance(part, BottleneckConfig)]
        return next(
            part
            for part in parts
            if any(re.fullmatch(hosts[name], host) for name in part.sites if name in hosts)
        )

    def _behind_embeddings(self, host, x):
        """Returns adapted embeddings: by a bottleneck, or by an additive coupling of two halves."""
        if self._own(host, "f/up/bias") is None:
            return x + self._update(host, x)
        first, second = np.split(x, 2, axis=-1)
        first = first + self._half(host, "f", second)
        return np.concatenate([first, second + self._half(host, "g", first)], axis=-1)

    def _half(self, host, name, x):
        layers = [
            [self._own(host, f"{name}/{layer}/{leaf}") for leaf in ("kernel", "bias")]
            for layer in ("down", "up")
        ]
        (down, first), (up, last) = layers
        activation = ACTIVATIONS[self._part(InvertibleConfig).non_linearity]
        return activation(x @ down + first) @ up + last

    def _adapt_output(self, host, y):
        if (scale := self._own(host, "scale")) is not None:
            y = y * scale
        if (bias := self._own(host, "bias")) is not None:
            y = y + bias
        return y + self._update(host, y)

    def _dense(self, host, x):
        if (scale := self._own(host, "input_scale")) is not None:
            x = x * scale
        y = x @ self.params[f"{host}/kernel"] + self.params.get(f"{host}/bias", 0.0)
        if (left := self._own(host, "left")) is not None:
            lora = self._part(LoRAConfig)
            root = math.sqrt(lora.rank) if lora.use_rslora else lora.rank
            y = y + lora.lora_alpha / root * (x @ left @ self._own(host, "right"))
        return self._adapt_output(host, y)

    def _join(self, host, residual, output, add):
        """Returns the end of a sub-layer, with adapters that read the residual as in AdapterHub."""
        if self._own(host, "down/bias") is None:
            return add(residual, output)
        config = self._bottleneck(host)
        x = add(residual, output) if config.original_ln_before else output
        from_output = config.residual_before_ln or not config.original_ln_before
        skip = output if from_output else x
        if config.residual_before_ln == "post_add":
            skip = residual + output
        out = skip + self._update(host, residual if config.parallel else x)
        return add(residual, out) if config.original_ln_after else out

    def _prefix(self, host, site):
        """Returns keys and values, `[prefix, inner]` each, or None."""
        if (key := self._own(host, "key")) is not None:
            return key, self._own(host, "value")
        if f"prefix_{site}_embedding" not in self.params:
            return None
        embedding, first, bias = (
            self.params[f"prefix_{site}_{name}"] for name in ("embedding", "kernel", "bias")
        )
        activation = ACTIVATIONS[self._part(PrefixTuningConfig).non_linearity]
        hidden = activation(embedding @ first + bias)

        def projected(prefix):
            return hidden @ self._own(host, f"{prefix}kernel") + self._own(host, f"{prefix}bias")

        if self._own(host, "kernel") is None:  # keys and values of different widths
            return projected("key_"), projected("value_")
        return np.split(projected(""), 2, axis=1)

    def _attend(self, host, site, heads, query, key, value, bias):
        """Returns `[batch, queries, inner]` from projections `[batch, length, inner]`."""
        if (prefix := self._prefix(host, site)) is not None:
            key, value = (
                np.concatenate([np.broadcast_to(own, (len(x), *own.shape)), x], 1)
                for own, x in zip(prefix, (key, value), strict=True)
            )
            # The scores of prefixes get no bias, unless `bias` already covers them.
            bias = pad_left(bias, key.shape[1] - bias.shape[-1])

        def split(x):
            return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)

        query, key, value = map(split, (query, key, value))
        y = softmax(query @ key.swapaxes(-1, -2) + bias) @ value
        return y.transpose(0, 2, 1, 3).reshape(len(y), y.shape[2], -1)

    def _prompted(self, host, x, mask):
        """Returns embeddings and mask with the prompt in front, and the length of the prompt."""
        if (prompt := self._own(host, "prompt")) is None:
            return x, mask, 0
        before = np.broadcast_to(prompt, (len(x), *prompt.shape))
        ones = np.ones((len(x), len(prompt)))
        return np.concatenate([before, x], 1), np.concatenate([ones, mask], 1), len(prompt)

    # --- BERT ---------------------------------------------------------------------------------

    def _layer_norm(self, path, x):
        epsilon = getattr(self.config, "layer_norm_eps", 1e-5)
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
        normal = centred / deviation * self.params[f"{path}/scale"]
        return self._adapt_output(path, normal + self.params.get(f"{path}/bias", 0.0))

    def _encoder(self, ids, mask, token_types=None, positions=None):
        config = self.config
        kind, names = config.model_type, _DISTILBERT if _is_distilbert(config) else _BERT
        table = {
            path.split("/")[1].removesuffix("_embeddings"): leaf
            for path, leaf in self.params.items()
            if path.startswith("embeddings/") and path.endswith("_embeddings/embedding")
        }
        x, mask, count = self._prompted("embeddings/word_embeddings", table["word"][ids], mask)
        x = x + table["position"][self._positions(ids, positions, count)]
        if "token_type" in table:
            types = np.zeros(ids.shape, int) if token_types is None else token_types
            x = x + table["token_type"][pad_left(types, count)]
        x = self._layer_norm("embeddings/LayerNorm", x)
        if "embeddings_project/kernel" in self.params:
            x = self._dense("embeddings_project", x)
        x = self._behind_embeddings("embeddings", x)
        bias = np.where(mask == 0, HIDDEN, 0.0)[:, None, None, :]
        heads = config.num_attention_heads
        activation = config.activation if _is_distilbert(config) else config.hidden_act
        for i in range(config.num_hidden_layers):
            layer = f"{names.stack}/{i}"
            host = f"{layer}/{names.attention}"
            query, key, value = (self._dense(f"{host}/{p}", x) for p in names.projections)
            query = query / math.sqrt(config.hidden_size // heads)
            y = self._attend(host, "encoder_key_value", heads, query, key, value, bias)
            x = self._bert_residual(layer, names.after_attention, y, x)
            inner = ACTIVATIONS[activation](self._dense(f"{layer}/{names.inner}", x))
            x = self._bert_residual(layer, names.after_inner, inner, x)
        hidden, last, act = _CLASSIFIERS[kind]
        return self._dense(last, ACTIVATIONS[act](self._dense(hidden, x[:, 0])))

    def _positions(self, ids, positions, count):
        """Returns the positions of the prompts and of the tokens; RoBERTa passes over padding."""
        if positions is None and self.config.model_type == "roberta":
            pad = self.config.pad_token_id
            numbers = (ids != pad).cumsum(1) + count
            tokens, first = np.where(ids == pad, pad, pad + numbers), pad + 1
        else:
            tokens = np.arange(ids.shape[1])[None] if positions is None else positions
            tokens, first = tokens + count, 0
        prompts = first + np.arange(count)[None].repeat(len(tokens), 0)
        return np.concatenate([prompts, tokens], 1)

    def _bert_residual(self, layer, names, x, residual):
        dense, norm, host = (f"{layer}/{name}" for name in names)

        def add(residual, output):
            return self._layer_norm(norm, output + residual)

        return self._join(host, residual, self._dense(dense, x), add)

    # --- ModernBERT ---------------------------------------------------------------------------

    def _modernbert(self, ids, mask):
        config, table = self.config, self.params["embeddings/tok_embeddings/embedding"]
        x, mask, _ = self._prompted("embeddings/tok_embeddings", table[ids], mask)
        x = self._layer_norm("embeddings/norm", x)
        x = self._behind_embeddings("embeddings", x)
        places = np.arange(x.shape[1])
        far = np.abs(places[:, None] - places) > config.local_attention // 2
        activation = ACTIVATIONS[config.hidden_activation]
        for i, kind in enumerate(config.kinds):
            layer = f"layers/{i}"
            hidden = (mask == 0)[:, None, None, :] | (far & (kind == LOCAL))
            normal = self._layer_norm(f"{layer}/attn_norm", x) if i else x
            y = self._modernbert_attention(f"{layer}/attn", normal, kind, hidden)
            x = self._join(f"{layer}/attn_residual", x, y, np.add)
            normal = self._layer_norm(f"{layer}/mlp_norm", x)
            inner, gate = np.split(self._dense(f"{layer}/mlp/Wi", normal), 2, axis=-1)
            y = self._dense(f"{layer}/mlp/Wo", activation(inner) * gate)
            y = y + self._update(f"{layer}/mlp", normal)
            x = self._join(f"{layer}/mlp_residual", x, y, np.add)
        pooled = self._dense("head/dense", self._layer_norm("final_norm", x)[:, 0])
        pooled = self._layer_norm("head/norm", ACTIVATIONS[config.classifier_activation](pooled))
        return self._dense("classifier", pooled)

    def _modernbert_attention(self, host, x, kind, hidden):
        config, heads = self.config, self.config.num_attention_heads
        base = config.local_rope_theta if kind == LOCAL else config.global_rope_theta
        size = config.hidden_size // heads
        angles = np.arange(x.shape[1])[:, None] * base ** (-2 * np.arange(size // 2) / size)
        turns = np.exp(1j * angles)[:, None]

        def turned(y):
            first, second = np.split(y.reshape(*y.shape[:2], heads, size), 2, axis=-1)
            both = (first + 1j * second) * turns
            return np.concatenate([both.real, both.imag], axis=-1).reshape(y.shape)

        query, key, value = (self._dense(f"{host}/Wqkv/{p}", x) for p in ("query", "key", "value"))
        bias = np.where(hidden, HIDDEN, 0.0)
        query, key = turned(query) / math.sqrt(size), turned(key)
        y = self._attend(host, "encoder_key_value", heads, query, key, value, bias)
        return self._dense(f"{host}/Wo", y) + self._update(host, x)

    # --- T5 -----------------------------------------------------------------------------------

    def _rms_norm(self, path, x):
        mean_square = (x**2).mean(-1, keepdims=True)
        normal = x / np.sqrt(mean_square + self.config.layer_norm_epsilon)
        return self._adapt_output(path, normal * self.params[f"{path}/scale"])

    def _t5(self, ids, mask, decoder_ids):
        table = self.params["shared/embedding"]
        x, mask, _ = self._prompted("", table[ids], mask)
        padding = np.where(mask == 0, HIDDEN, 0.0)[:, None, None, :]
        states = self._t5_stack("encoder", x, padding)
        later = np.triu(np.full((decoder_ids.shape[1],) * 2, HIDDEN), 1)
        x = self._t5_stack("decoder", table[decoder_ids], later, states, padding)
        if self.config.tie_word_embeddings:
            y = x * self.config.d_model**-0.5 @ table.T
        else:
            y = x @ self.params["lm_head/kernel"]
        return self._adapt_output("", y)

    def _t5_stack(self, stack, x, mask, states=None, padding=None):
        config = self.config
        decoding = stack == "decoder"
        x = self._behind_embeddings(stack, x)
        shift = self._shift(stack)
        relative = np.arange(shift + x.shape[1]) - np.arange(x.shape[1])[:, None]
        buckets = relative_position_bucket(
            relative,
            bidirectional=not decoding,
            num_buckets=config.relative_attention_num_buckets,
            max_distance=config.relative_attention_max_distance,
        )
        table = f"{stack}/block/0/layer/0/SelfAttention/relative_attention_bias/embedding"
        bias = self.params[table][np.asarray(buckets)].transpose(2, 0, 1) + pad_left(mask, shift)
        for i in range(config.num_decoder_layers if decoding else config.num_layers):
            block = f"{stack}/block/{i}/layer"
            x = self._t5_attention(f"{block}/0", f"{stack}_key_value", x, None, bias)
            if decoding:
                x = self._t5_attention(f"{block}/1", "cross_key_value", x, states, padding)
            x = self._t5_feed_forward(f"{block}/{2 if decoding else 1}", x)
        return self._rms_norm(f"{stack}/final_layer_norm", x)

    def _shift(self, stack):
        """Returns the shift of the key positions in a stack."""
        prefix = self._prefix(f"{stack}/block/0/layer/0/SelfAttention", f"{stack}_key_value")
        if prefix is None or not self._part(PrefixTuningConfig).shift_positions:
            return 0
        return len(prefix[0])

    def _t5_attention(self, layer, site, x, states, bias):
        host = f"{layer}/{'SelfAttention' if states is None else 'EncDecAttention'}"
        normal = self._rms_norm(f"{layer}/layer_norm", x)
        source = normal if states is None else states
        projected = [
            self._dense(f"{host}/{p}", s)
            for p, s in zip("qkv", (normal, source, source), strict=True)
        ]
        y = self._dense(
            f"{host}/o", self._attend(host, site, self.config.num_heads, *projected, bias)
        )
        return self._join(layer, x, y + self._update(host, normal), np.add)

    def _t5_feed_forward(self, layer, x):
        host = f"{layer}/DenseReluDense"
        normal = self._rms_norm(f"{layer}/layer_norm", x)
        name = self.config.feed_forward_proj.removeprefix("gated-")
        activation = ACTIVATIONS["gelu_new" if name == "gelu" else name]
        if self.config.is_gated:
            y = activation(self._dense(f"{host}/wi_0", normal)) * self._dense(
                f"{host}/wi_1", normal
            )
        else:
            y = activation(self._dense(f"{host}/wi", normal))
        return self._join(
            layer, x, self._dense(f"{host}/wo", y) + self._update(host, normal), np.add
        )

    # --- the BART line ------------------------------------------------------------------------

    def _seq2seq(self, ids, mask, decoder_ids):
        config = self.config
        table = self.params["shared/embedding"]
        scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        x, mask, count = self._prompted("", scale * table[ids], mask)
        present = pad_left(ids != config.pad_token_id, count) | (np.arange(x.shape[1]) < count)
        x = self._embedded("encoder", x, present)
        return self._translated(x, mask, self.params["shared/embedding"], decoder_ids)

    def _speech(self, features, mask, decoder_ids):
        """Runs the convolutions, each over rows with zeros at padding, and the Transformer."""
        config, counts, x = self.module.config, mask.sum(1), np.float64(features)
        for i, size in enumerate(config.conv_kernel_sizes):
            x = np.where((np.arange(x.shape[1]) < counts[:, None])[..., None], x, 0)
            kernel = self.params[f"encoder_conv/conv_layers/{i}/kernel"]
            half, length = size // 2, (x.shape[1] - 1) // 2 + 1
            padded = np.pad(x, ((0, 0), (half, half + 1), (0, 0)))
            y = sum(padded[:, k : k + 2 * length : 2][:, :length] @ kernel[k] for k in range(size))
            y = y + self.params[f"encoder_conv/conv_layers/{i}/bias"]
            signal, gate = np.split(y, 2, -1)
            x, counts = signal / (1 + np.exp(-gate)), (counts - 1) // 2 + 1
        present = np.arange(x.shape[1]) < counts[:, None]
        scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        x = self._embedded("encoder", scale * x, present)
        return self._translated(
            x, present, self.params["decoder_embed_tokens/embedding"], decoder_ids
        )

    def _translated(self, x, mask, table, decoder_ids):
        """Returns the logits for embedded sources."""
        config = self.config
        scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        padding = np.where(mask == 0, HIDDEN, 0.0)[:, None, None, :]
        states = self._seq2seq_stack("encoder", x, padding)
        x = scale * table[decoder_ids]
        x = self._embedded("decoder", x, decoder_ids != config.pad_token_id)
        later = np.triu(np.full((decoder_ids.shape[1],) * 2, HIDDEN), 1)
        x = self._seq2seq_stack("decoder", x, later, states, padding)
        y = x @ (table.T if config.tie_word_embeddings else self.params["lm_head/kernel"])
        return y + self.params.get("final_logits_bias/bias", 0.0)

    def _embedded(self, stack, x, present):
        """Returns what the first layer reads; `present` are the tokens that are not padding."""
        config, (_, length, width) = self.config, x.shape
        if config.positions == "learned":
            x = x + self.params[f"{stack}/embed_positions/embedding"][2 : 2 + length]
        else:
            assert config.positions == "m2m_100"
            half = width // 2
            step = math.log(10_000) / (half - 1)
            places = config.pad_token_id + present.cumsum(1)
            angles = places[..., None] * np.exp(-step * np.arange(half))
            both = np.concatenate([np.sin(angles), np.cos(angles)], -1)
            x = x + np.where(present[..., None], both, 0)
        if config.normalize_embedding:
            x = self._layer_norm(f"{stack}/layernorm_embedding", x)
        return self._behind_embeddings(stack, x)

    def _seq2seq_stack(self, stack, x, mask, states=None, padding=None):
        config = self.config
        heads = getattr(config, f"{stack}_attention_heads")
        activation = ACTIVATIONS[config.activation_function]
        for i in range(getattr(config, f"{stack}_layers")):
            layer = f"{stack}/layers/{i}"
            if states is not None and config.decoder_layer == "compressed":
                x = self._compressed_layer(layer, x, mask, states, padding)
                continue
            attentions = [("self_attn", f"{stack}_key_value", None, mask)]
            if states is not None:
                attentions.append(("encoder_attn", "cross_key_value", states, padding))
            for name, site, source, bias in attentions:

                def attend(x, host=f"{layer}/{name}", site=site, source=source, bias=bias):
                    sources = (x, *(2 * [x if source is None else source]))
                    query, key, value = (
                        self._dense(f"{host}/{p}_proj", s)
                        for p, s in zip("qkv", sources, strict=True)
                    )
                    query = query / math.sqrt(config.d_model // heads)
                    y = self._attend(host, site, heads, query, key, value, bias)
                    return self._dense(f"{host}/out_proj", y) + self._update(host, x)

                x = self._seq2seq_sublayer(
                    f"{layer}/{name}", f"{layer}/{name}_layer_norm", x, attend
                )

            def feed_forward(x, layer=layer):
                inner = activation(self._dense(f"{layer}/fc1", x))
                return self._dense(f"{layer}/fc2", inner) + self._update(layer, x)

            norm = f"{layer}/final_layer_norm"
            x = self._seq2seq_sublayer(f"{layer}/feed_forward", norm, x, feed_forward)
        return self._layer_norm(f"{stack}/layer_norm", x) if config.last_norms else x

    def _compressed_layer(self, layer, x, mask, states, padding):
        config, host = self.config, f"{layer}/encoder_attn"
        heads = config.decoder_attention_heads
        shape = (len(x), 1, x.shape[1])
        bias = np.concatenate(
            [np.broadcast_to(part, (*shape, part.shape[-1])) for part in (padding, mask)], -1
        )

        def update(y):
            query = self._dense(f"{host}/q_proj", y) / math.sqrt(config.d_model // heads)
            key, value = (
                np.concatenate(
                    [self._dense(f"{host}/encoder_{p}", states), self._dense(f"{host}/{p}", y)], 1
                )
                for p in ("k_proj", "v_proj")
            )
            context = self._attend(host, "decoder_key_value", heads, query, key, value, bias)
            inner = context + self._dense(f"{host}/r_proj", y)
            u = ACTIVATIONS[config.activation_function](inner)
            return self._dense(f"{host}/out_proj", u) + self._update(layer, y)

        return self._seq2seq_sublayer(f"{layer}/feed_forward", f"{host}_layer_norm", x, update)

    def _seq2seq_sublayer(self, name, norm, x, run):
        if self.config.normalize_before:
            return self._join(f"{name}_residual", x, run(self._layer_norm(norm, x)), np.add)

        def add(residual, output):
            return self._layer_norm(norm, residual + output)

        return self._join(f"{name}_residual", x, run(x), add)
