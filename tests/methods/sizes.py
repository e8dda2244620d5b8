"""Computes the sizes of backbones and the numbers of parameters by the formulas of the papers."""

import types


def encoder_sizes(config, num_labels, **method):
    """Returns the sizes of a BERT, RoBERTa, ELECTRA or DistilBERT with a classifier."""
    of_distilbert = config.model_type == "distilbert"
    d, layers = config.hidden_size, config.num_hidden_layers
    f = config.hidden_dim if of_distilbert else config.intermediate_size
    e = (config.embedding_size or d) if config.model_type == "electra" else d
    projects = e != d
    has_pooler = config.model_type == "bert"
    # Where there is no pooler, the classifier has a layer of its size.
    head = d * num_labels + num_labels + (0 if has_pooler else d * d + d)
    embedded = config.vocab_size + config.max_position_embeddings + config.type_vocab_size
    return types.SimpleNamespace(
        d=d,
        e=e,
        f=f,
        inner=d,
        sublayers=layers,
        self_attentions=layers,
        kept=layers - 1,
        stacks=1,
        query_value=layers * 2 * 2 * d,
        key_value=layers * 2 * d,
        units=layers * f,
        prefix_sites=1,
        norms=2 * e + 4 * d * layers,
        head=head,
        # The biases of the norm and the projection of the embeddings; of four projections, two
        # linear layers and two norms in each layer; and of the pooler.
        biases=e + d * projects + layers * (7 * d + f) + d * has_pooler,
        everything=embedded * e
        + 2 * e
        + (e * d + d) * projects
        + layers * (4 * (d * d + d) + (d * f + f) + (f * d + d) + 4 * d)
        + (d * d + d) * has_pooler
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
        e=d,
        f=f,
        inner=d,
        sublayers=layers,
        self_attentions=layers,
        kept=layers - 1,
        stacks=1,
        query_value=layers * 2 * 2 * d,
        key_value=layers * 2 * d,
        units=layers * f,
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
        e=d,
        f=f,
        inner=inner,
        sublayers=blocks,
        self_attentions=blocks,
        kept=blocks - sum(dropped),
        stacks=2,
        query_value=attentions * 2 * (d + inner),
        key_value=attentions * 2 * inner,
        units=blocks * f,
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
        e=d,
        f=f,
        inner=d,
        sublayers=blocks,
        self_attentions=blocks,
        kept=blocks - sum(dropped),
        stacks=2,
        query_value=attentions * 2 * 2 * d,
        key_value=attentions * 2 * d,
        units=blocks * f,
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


def speech_sizes(config, dropped=(1, 1), **method):
    """Returns the sizes of a speech model: an M2M-100 with convolutions in the encoder's front."""
    sizes = m2m_sizes(config.transformer, dropped, **method)
    d, c = config.d_model, config.conv_channels
    first, second = config.conv_kernel_sizes
    sizes.biases += c + 2 * d
    sizes.everything += first * config.feature_size * c + second * (c // 2) * 2 * d + c + 2 * d
    return sizes


def compressed_sizes(config, dropped=(1, 1), **method):
    """Returns the sizes of an M2M-100 with a compressed decoder."""
    d, f, wide = config.d_model, config.encoder_ffn_dim, config.decoder_value_dim
    encoder, decoder = config.encoder_layers, config.decoder_layers
    norms = 2 * encoder + decoder + 2
    biases = encoder * (5 * d + f) + decoder * (4 * d + 3 * wide) + norms * d
    return types.SimpleNamespace(
        d=d,
        e=d,
        sublayers=encoder + decoder,
        self_attentions=encoder,
        kept=encoder + decoder - sum(dropped),
        stacks=2,
        # Keys and values have a projection for the source and one for the target.
        query_value=encoder * 4 * d + decoder * (2 * d + 2 * (d + wide)),
        key_value=encoder * 2 * d + decoder * 2 * (d + wide),
        # Prefixes join keys and values of both.
        prefixed=encoder * 2 * d + decoder * (d + wide),
        units=encoder * f + decoder * wide,
        prefix_sites=2,
        norms=2 * norms * d,
        head=0,
        biases=biases,
        everything=config.vocab_size * d
        + encoder * (4 * d * d + 2 * d * f)
        + decoder * (3 * d * d + 4 * d * wide)
        + norms * d
        + biases,
        **method,
    )


def bottleneck(s):
    return s.d * s.r + s.r + s.r * s.d + s.d


def invertible(s):
    half, inner = s.d // 2, s.d // 4
    return 2 * (half * inner + inner + inner * half + half)


def compacter(s, adapters):
    # `left`, `right` and bias of each projection, and one rule.
    return s.n**3 + adapters * ((s.d + s.r + s.r) + (s.r + s.d + s.d))


def prefix(s):
    shared = s.prefix * s.d + s.d * s.b + s.b
    prefixed = getattr(s, "prefixed", s.key_value)
    return s.prefix_sites * shared + (s.b + 1) * prefixed


TINY_METHOD = {"r": 6, "n": 3, "prompt": 3, "dimension": 30, "k": 2, "prefix": 2, "b": 5}


def sizes_of(config, backbone):
    if backbone in ("bert", "roberta", "electra", "distilbert"):
        return encoder_sizes(config, 3, **TINY_METHOD)
    if backbone == "modernbert":
        return modernbert_sizes(config, 3, **TINY_METHOD)
    of_line = {"m2m": m2m_sizes, "compressed": compressed_sizes, "speech": speech_sizes}
    if backbone in of_line:
        return of_line[backbone](config, **TINY_METHOD)
    return t5_sizes(config, **TINY_METHOD)
