"""Text generation with a key/value cache: greedy, sampling and beam search."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from compacter_jax.compositions import routing
from compacter_jax.decode.beams import beam_search
from compacter_jax.decode.sampling import one_by_one
from compacter_jax.decode.settings import NO_TOKEN, Settings, Step
from compacter_jax.inject.adapted import Adapted
from compacter_jax.nn.inputs import check_ids
from compacter_jax.trees import hashable


def generate(
    model: nn.Module,
    params: Any,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    key: Array | None = None,
    num_return_sequences: int = 1,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    decoder_start_token_id: int | None = None,
    adapter_ids: Any = None,
    mix: Any = None,
) -> Array:
    """Generates text: greedy search, beam search for `num_beams > 1`, or sampling.

    Greedy and beam search return, token for token, what `generate` of transformers' PyTorch models
    returns; sampling draws from the same distribution. All is one compiled program: the
    encoder runs once, adapters' weights are built once, and the loop ends when every row has
    ended. It compiles anew for other shapes and other settings, never for other values. Logits are
    processed in float32 whatever the model computes in.

    Args:
      model: an encoder-decoder with logits, such as `T5` with `head="conditional_generation"`, or
        `Adapted` around one.
      params: its parameters.
      input_ids: `[batch, length]` integers, of the encoder.
      attention_mask: `[batch, length]` integers or booleans, zero at padding. None leaves out the
        tokens that are `pad_token_id`, unless that also ends sequences, as transformers does.
      max_new_tokens: the most tokens that are generated, the start token not counted.
      min_new_tokens: no sequence ends before so many.
      num_beams: hypotheses kept per row; 1 is greedy search, or sampling.
      length_penalty: of beam search; a hypothesis's score is its log probability divided by
        `length ** length_penalty`, so positive values favour long ones.
      early_stopping: of beam search; True ends a row at `num_beams` finished hypotheses, False
        when the running ones no longer beat them at their present length, "never" when they
        could not at any length.
      do_sample: draw each token instead of taking the most probable.
      temperature: of sampling; divides the logits, before the two cuts below, in this order.
      top_k: of sampling; keeps the so many most probable tokens and those equal to the last of
        them. None keeps all (where transformers has 50).
      top_p: of sampling; keeps the fewest most probable tokens whose probabilities add up to it.
      key: of `jax.random`, for sampling alone; the same key gives the same tokens.
      num_return_sequences: results per row: samples, or the best of the beams in their order.
      eos_token_id: one or several tokens that end a sequence; () has none end early. None takes
        that of the model's config, here and below.
      pad_token_id: follows the end of a sequence; without any, the first of `eos_token_id` does.
      decoder_start_token_id: begins every sequence.
      adapter_ids: of a model with a bank of adapters, as for a call of it.
      mix: likewise.

    Returns:
      `[batch * num_return_sequences, width]` int32, the start token first. Inside a
      transformation (`jit`, `pmap`, …) the width is `1 + max_new_tokens`; called by itself, the
      result ends with its longest sequence, as in transformers. What follows the end of a
      sequence is `pad_token_id`; in beam search, where that is 0, it is the first of
      `eos_token_id`, which is what transformers writes. Inside a transformation, where no error
      can be raised for a row with an id that the vocabulary does not have, its tokens are -1, and
      so are all others of logits that are NaN.

    Raises:
      ValueError: if `model` cannot generate, the prompt is empty or not `[batch, length]`, or has
        an id that the vocabulary does not have, a setting is out of range or has no effect beside
        the others, a key is missing or not needed, no start token is known, or logits are NaN.

    References:
      Vaswani et al., Attention Is All You Need, 2017, arXiv:1706.03762 (decoding); Holtzman et
      al., The Curious Case of Neural Text Degeneration, ICLR 2020, arXiv:1904.09751 (top-p).
    """
    config = _config(model)
    settings = Settings(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        num_beams=num_beams,
        num_return_sequences=num_return_sequences,
        length_penalty=float(length_penalty),
        early_stopping=early_stopping,
        do_sample=do_sample,
        temperature=float(temperature),
        top_k=top_k,
        top_p=float(top_p),
        **_special_tokens(config, eos_token_id, pad_token_id, decoder_start_token_id),
    )
    settings.check(config.vocab_size)
    _check_inputs(input_ids, key, do_sample)
    check_ids("input_ids", input_ids, config.vocab_size, "vocab_size")
    input_ids = jnp.asarray(input_ids)
    if attention_mask is not None:
        attention_mask = jnp.asarray(attention_mask)
    chosen = {"adapter_ids": adapter_ids, "mix": mix}
    chosen = {
        name: value if isinstance(value, Mapping) else jnp.asarray(value)
        for name, value in chosen.items()
        if value is not None
    }
    if isinstance(model, Adapted):
        routing.route(model.method, params, **{"adapter_ids": None, "mix": None, **chosen})
    elif chosen:
        raise ValueError(f"{' and '.join(chosen)} given, but the model has no bank of adapters")
    ids, width = _generate(
        hashable(model), settings, params, input_ids, attention_mask, key, chosen
    )
    if isinstance(width, jax.core.Tracer):
        return ids
    # On the host: an array sliced on the device compiles once per width.
    tokens = np.asarray(ids)[:, : int(width)]
    if (broken := np.argwhere(tokens == NO_TOKEN)).size:
        raise ValueError(
            f"the logits of row {broken[0, 0] // num_return_sequences} are NaN, so there is no "
            "token to choose; look for NaN in params and mix"
        )
    return jax.device_put(tokens, ids.sharding)


def _config(model: nn.Module) -> Any:
    """The config of a module that can generate."""
    backbone = model.backbone if isinstance(model, Adapted) else model
    name = type(backbone).__name__
    if not hasattr(backbone, "start_cache"):
        raise ValueError(
            f'{name} cannot generate: it has no decoder; use T5 with head="conditional_generation"'
        )
    head = getattr(backbone, "head", None)
    if head != "conditional_generation":
        raise ValueError(
            f"{name} with head={head!r} cannot generate: that needs the decoder and its logits; "
            'use head="conditional_generation", with a checkpoint that has a decoder'
        )
    return backbone.config


def _special_tokens(
    config: Any, eos: int | Sequence[int] | None, pad: int | None, start: int | None
) -> dict[str, Any]:
    """The three fields of `_Settings`, from the arguments or else from the config."""
    eos = config.eos_token_id if eos is None else eos
    ends = () if eos is None else tuple(int(token) for token in np.ravel(eos))
    pad = config.pad_token_id if pad is None else pad
    start = config.decoder_start_token_id if start is None else start
    if start is None:
        raise ValueError(
            "the model's config has no decoder_start_token_id; pass one (T5 starts with its "
            "pad_token_id, 0)"
        )
    return {"start": start, "pad": ends[0] if pad is None and ends else pad, "eos": ends}


def _check_inputs(input_ids: Any, key: Array | None, do_sample: bool) -> None:
    shape = np.shape(input_ids)
    if len(shape) != 2:
        raise ValueError(f"input_ids has shape {shape}; it must be [batch, length]")
    if shape[1] == 0:
        raise ValueError(
            f"input_ids has shape {shape}, a prompt of zero tokens; give it at least one, such "
            "as the token that ends a sequence"
        )
    if do_sample and key is None:
        raise ValueError("do_sample=True needs a key; pass key=jax.random.key(0)")
    if key is not None and not do_sample:
        raise ValueError("a key is for sampling alone; set do_sample=True, or leave it out")


@functools.partial(jax.jit, static_argnames=("model", "settings"))
def _generate(
    model: nn.Module,
    settings: Settings,
    params: Any,
    input_ids: Array,
    attention_mask: Array | None,
    key: Array | None,
    chosen: dict[str, Any],
) -> tuple[Array, Array]:
    """Ids `[rows, 1 + max_new_tokens]`, and the width transformers would cut them to."""
    if attention_mask is None:
        attention_mask = _default_mask(input_ids, settings)
    step, cache = _start(model, settings, params, input_ids, attention_mask, chosen)
    rows = input_ids.shape[0]
    if settings.num_beams > 1:
        return beam_search(step, cache, rows, settings)
    return one_by_one(step, cache, rows * settings.num_return_sequences, settings, key)


def _default_mask(input_ids: Array, settings: Settings) -> Array:
    if settings.pad is None or settings.pad in settings.eos:
        return jnp.ones_like(input_ids)
    return input_ids != settings.pad


def _start(
    model: nn.Module,
    settings: Settings,
    params: Any,
    input_ids: Array,
    attention_mask: Array,
    chosen: dict[str, Any],
) -> tuple[Step, Any]:
    """Runs the encoder; returns a decoding step and the self-attention cache it starts from.

    Both are for `num_beams` or `num_return_sequences` copies of each row, next to each other.
    """
    if isinstance(model, Adapted):
        # Here, outside the loop: inside it, PHM weights would be built at every token.
        model, params = model.precomputed(params)

    def apply(method: str, *args: Any, **kwargs: Any) -> Any:
        return model.apply({"params": params}, *args, method=method, **kwargs)

    states = apply("encode", input_ids, attention_mask, **chosen)
    cache = apply("start_cache", states, settings.max_new_tokens, **chosen)
    copies = settings.num_beams if settings.num_beams > 1 else settings.num_return_sequences
    # Copied after the cross-attention's keys and values are computed, not before.
    cache, mask = jax.tree.map(
        lambda leaf: jnp.repeat(leaf, copies, axis=0), (cache, attention_mask)
    )
    rows = input_ids.shape[0]

    def repeat(choice: Array) -> Array:
        # Weights that all rows share, `[size]` or `[1, sites, size]`, have no axis of rows.
        of_rows = choice.shape[0] == rows and choice.ndim + ("adapter_ids" in chosen) > 1
        return jnp.repeat(choice, copies, axis=0) if of_rows else choice

    chosen = jax.tree.map(repeat, chosen)

    def step(tokens: Array, self_attention: Any, index: Array) -> tuple[Array, Any]:
        # The cross-attention's part never changes, so it is no part of the loop's state.
        now = cache._replace(self_attention=self_attention)
        logits, now = apply(
            "decode", tokens[:, None], attention_mask=mask, cache=now, index=index, **chosen
        )
        return logits[:, 0].astype(jnp.float32), now.self_attention

    return step, cache.self_attention
