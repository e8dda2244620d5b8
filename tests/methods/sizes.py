"""Computes the sizes of backbones and the numbers of parameters by the formulas of the papers."""

import types


def bert_sizes(config, num_labels, **method):
    d, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head = d * num_labels + num_labels
    embedded = config.vocab_size + config.max_position_embeddings + config.type_vocab_size
    return types.SimpleNamespace(
        d=d,
        f=f,
        inner=d,
        sublayers=layers,
        kept=layers - 1,
        stacks=1,
        attentions=layers,
        prefix_sites=1,
        norms=2 * d * (2 * layers + 1),
        head=head,
        # The biases of the norm of the embeddings; of four projections, two linear layers and two
        # norms in each layer; and of the pooler.
        biases=d + layers * (7 * d + f) + d,
        everything=embedded * d
        + 2 * d
        + layers * (4 * (d * d + d) + (d * f + f) + (f * d + d) + 4 * d)
        + (d * d + d)
        + head,
        **method,
    )


def modernbert_sizes(config, num_labels, **method):
    """Returns the sizes of a ModernBERT without biases, whose first layer has one norm."""
    d, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head = d * num_labels + num_labels
    norms = 2 * layers + 1
    return types.SimpleNamespace(
        d=d,
        f=f,
        inner=d,
        sublayers=layers,
        kept=layers - 1,
        stacks=1,
        attentions=layers,
        prefix_sites=1,
        norms=norms * d,
        head=head,
        # New biases of all linear layers, and of the norms in the layers.
        biases=layers * (5 * d + 2 * f) + (2 * layers - 1) * d,
        everything=config.vocab_size * d
        + layers * (4 * d * d + 3 * d * f)
        + norms * d
        + (d * d + d)
        + head,
        **method,
    )


def t5_sizes(config, dropped=(1, 1), **method):
    """Returns the sizes of a T5; AdapterDrop omits adapters in `dropped` layers of each stack."""
    d, f, inner = config.d_model, config.d_ff, config.num_heads * config.d_kv
    encoder, decoder, words = config.num_layers, config.num_decoder_layers, config.vocab_size
    blocks, attentions = encoder + decoder, encoder + 2 * decoder
    norms = 2 * encoder + 3 * decoder + 2
    into = 2 if config.is_gated else 1  # projections to the inner width
    return types.SimpleNamespace(
        d=d,
        f=f,
        inner=inner,
        sublayers=blocks,
        kept=blocks - sum(dropped),
        stacks=2,
        attentions=attentions,
        prefix_sites=3,
        norms=norms * d,
        head=0,
        # The biases of all linear layers, of all norms but the last two, and of the logits.
        biases=attentions * (3 * inner + d) + blocks * (into * f + d) + (norms - 2) * d + words,
        everything=words * d * (1 if config.tie_word_embeddings else 2)
        + 2 * config.relative_attention_num_buckets * config.num_heads
        + attentions * 4 * d * inner
        + blocks * (into + 1) * d * f
        + norms * d,
        **method,
    )


def m2m_sizes(config, dropped=(1, 1), **method):
    """Returns the sizes of an M2M-100; AdapterDrop omits adapters in `dropped` layers."""
    d, f = config.d_model, config.encoder_ffn_dim
    assert config.decoder_ffn_dim == f
    encoder, decoder = config.encoder_layers, config.decoder_layers
    blocks, attentions = encoder + decoder, encoder + 2 * decoder
    norms = 2 * encoder + 3 * decoder + 2
    biases = attentions * 4 * d + blocks * (f + d) + norms * d
    return types.SimpleNamespace(
        d=d,
        f=f,
        inner=d,
        sublayers=blocks,
        kept=blocks - sum(dropped),
        stacks=2,
        attentions=attentions,
        prefix_sites=3,
        norms=2 * norms * d,
        head=0,
        biases=biases,
        everything=config.vocab_size * d
        + attentions * 4 * d * d
        + blocks * 2 * d * f
        + norms * d
        + biases,
        **method,
    )


def bottleneck(s):
    return s.d * s.r + s.r + s.r * s.d + s.d


def compacter(s, adapters):
    # `left`, `right` and bias of each projection, and one rule.
    return s.n**3 + adapters * ((s.d + s.r + s.r) + (s.r + s.d + s.d))


def prefix(s):
    shared = s.prefix * s.d + s.d * s.b + s.b
    return s.prefix_sites * shared + s.attentions * (s.b * 2 * s.inner + 2 * s.inner)


TINY_METHOD = {"r": 6, "n": 3, "prompt": 3, "dimension": 30, "k": 2, "prefix": 2, "b": 5}


def sizes_of(config, backbone):
    if backbone == "bert":
        return bert_sizes(config, 3, **TINY_METHOD)
    if backbone == "modernbert":
        return modernbert_sizes(config, 3, **TINY_METHOD)
    if backbone == "m2m":
        return m2m_sizes(config, **TINY_METHOD)
    return t5_sizes(config, **TINY_METHOD)
