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

from compacter_jax.compilation import hashable
from compacter_jax.compositions import routing
from compacter_jax.decode.beams import beam_search
from compacter_jax.decode.sampling import one_by_one
from compacter_jax.decode.settings import NO_TOKEN, Settings, Step
from compacter_jax.inject.adapted import Adapted


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
    forced_bos_token_id: int | tuple[()] | Array | None = None,
    forced_eos_token_id: int | tuple[()] | None = None,
    adapter_ids: Any = None,
    mix: Any = None,
) -> Array:
    """Generates text: greedy search, beam search for `num_beams > 1`, or sampling.

    Greedy and beam search return the same tokens as `generate` of transformers' PyTorch models;
    sampling draws from the same distribution. The generation is one compiled program: the encoder
    runs once, the weights of adapters are built once, and the loop ends when every row has ended.
    New shapes or settings need another compilation, new values do not. Logits are processed in
    float32, in any dtype of the model.

    Args:
      model: an encoder-decoder with logits, such as `T5` or `Seq2Seq` with
        `head="conditional_generation"`, or `Adapted` around one.
      params: parameters of the model.
      input_ids: `[batch, length]` integers, the tokens of the encoder; for `SpeechToText` its
        features, `[batch, frames, features]`.
      attention_mask: `[batch, length]` integers or booleans, zero at padding. None masks the tokens
        equal to `pad_token_id`, unless that token also ends sequences, as in transformers.
      max_new_tokens: largest number of generated tokens, without the start token.
      min_new_tokens: smallest number of generated tokens before a sequence may end.
      num_beams: number of hypotheses per row; 1 is greedy search, or sampling.
      length_penalty: exponent of beam search. The score of a hypothesis is its log probability
        divided by `length ** length_penalty`, so positive values favour long ones.
      early_stopping: rule that ends a row in beam search. True ends it at `num_beams` finished
        hypotheses; False, when the running ones do not beat them at their present length; "never",
        when they cannot beat them at any length.
      do_sample: True to draw each token, False to take the most probable one.
      temperature: divisor of the logits in sampling, applied before `top_k` and `top_p`, in this
        order.
      top_k: number of most probable tokens that sampling keeps, with all that equal the last of
        them. None keeps all tokens (the default of transformers is 50).
      top_p: probability that sampling keeps: the fewest most probable tokens whose probabilities
        add up to it.
      key: key of `jax.random`, for sampling alone; the same key gives the same tokens.
      num_return_sequences: number of results per row: samples, or the best beams in their order.
      eos_token_id: one or several tokens that end a sequence; with () no sequence ends early. None
        takes the token of the model's config, for this argument and the next four.
      pad_token_id: token after the end of a sequence; without one, the first of `eos_token_id`.
      decoder_start_token_id: start token of every sequence.
      forced_bos_token_id: token that follows the start token, such as the target language of
        M2M-100, NLLB-200 and mBART-50; () forces none. An array `[batch]` of integers forces a
        token of its own in each row; it is not checked against the vocabulary.
      forced_eos_token_id: token at the largest length, where a sequence has not ended before; ()
        forces none.
      adapter_ids: adapter of each row, as in a call of a model with a bank of adapters.
      mix: weights of the adapters, as in a call of a model with a bank of adapters.

    Returns:
      `[batch * num_return_sequences, width]` int32, the start token first. Inside a
      transformation (`jit`, `pmap`, …) the width is `1 + max_new_tokens`; otherwise the result ends
      with its longest sequence, as in transformers. `pad_token_id` follows the end of a sequence.
      In beam search with a `pad_token_id` of 0, the first of `eos_token_id` follows, as in
      transformers. A transformation cannot raise an error; there a row has the token -1 wherever
      its logits are NaN, for instance if an id is not in the vocabulary.

    Raises:
      ValueError: if `model` cannot generate; if the prompt is empty, is not `[batch, length]`, or
        has an id that the vocabulary does not have; if a setting is out of range, or has no effect
        beside the others; if a key is missing or not needed; if no start token is known; or if
        logits are NaN.

    References:
      Vaswani et al., Attention Is All You Need, 2017, arXiv:1706.03762 (decoding); Holtzman et
      al., The Curious Case of Neural Text Degeneration, ICLR 2020, arXiv:1904.09751 (top-p).
    """
    config = _config(model)
    by_row = isinstance(forced_bos_token_id, Array | np.ndarray) and forced_bos_token_id.ndim > 0
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
        first=_forced(config, "forced_bos_token_id", forced_bos_token_id),
        last=_forced(config, "forced_eos_token_id", forced_eos_token_id),
        never=getattr(config, "never_generated", ()),
    )
    settings.check(getattr(config, "target_vocab_size", config.vocab_size))
    _check_key(key, do_sample)
    if attention_mask is not None:
        attention_mask = jnp.asarray(attention_mask)
    # Checked before the conversion, in which a large integer would overflow.
    given = input_ids if hasattr(input_ids, "ndim") else np.asarray(input_ids)
    _backbone(model).check_source_inputs(given, attention_mask)
    input_ids = jnp.asarray(given)
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
    first = _first_tokens(forced_bos_token_id, input_ids.shape[0]) if by_row else None
    ids, width = _generate(
        hashable(model), settings, params, input_ids, attention_mask, key, chosen, first
    )
    if isinstance(width, jax.core.Tracer):
        return ids
    # The slice is taken on the host: an array sliced on the device compiles once per width.
    tokens = np.asarray(ids)[:, : int(width)]
    if (broken := np.argwhere(tokens == NO_TOKEN)).size:
        raise ValueError(
            f"the logits of row {broken[0, 0] // num_return_sequences} are NaN, so there is no "
            "token to choose; look for NaN in params and mix"
        )
    return jax.device_put(tokens, ids.sharding)


def _backbone(model: nn.Module) -> Any:
    return model.backbone if isinstance(model, Adapted) else model


def _config(model: nn.Module) -> Any:
    """Returns the config of a module that can generate."""
    backbone = _backbone(model)
    name = type(backbone).__name__
    if not hasattr(backbone, "start_cache"):
        raise ValueError(
            f"{name} cannot generate: it has no decoder; use T5, Seq2Seq or SpeechToText with "
            'head="conditional_generation"'
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
    """Returns three fields of `Settings`, from the arguments or else from the config."""
    eos = config.eos_token_id if eos is None else eos
    ends = () if eos is None else tuple(int(token) for token in np.ravel(eos))
    pad = config.pad_token_id if pad is None else pad
    start = config.decoder_start_token_id if start is None else start
    if start is None:
        raise ValueError(
            "the model's config has no decoder_start_token_id; pass one (T5 starts with its "
            "pad_token_id, 0; mBART with the token of the target language)"
        )
    return {"start": start, "pad": ends[0] if pad is None and ends else pad, "eos": ends}


def _forced(config: Any, name: str, given: int | tuple[()] | Array | None) -> int | None:
    """Returns a token forced in all rows, of the argument or else of the config; None for none."""
    if given is None:
        return getattr(config, name, None)
    return None if isinstance(given, tuple) or np.ndim(given) else int(given)


def _first_tokens(tokens: Any, rows: int) -> Array:
    """Returns the token `[rows]` that is forced in each row."""
    if np.shape(tokens) != (rows,) or not jnp.issubdtype(jnp.result_type(tokens), jnp.integer):
        raise ValueError(
            f"forced_bos_token_id has shape {np.shape(tokens)} and dtype "
            f"{jnp.result_type(tokens)}; for a token of each row it must be integers of shape "
            f"[batch], ({rows},)"
        )
    return jnp.asarray(tokens)


def _check_key(key: Array | None, do_sample: bool) -> None:
    if do_sample and key is None:
        raise ValueError("do_sample=True needs a key; pass key=jax.random.key(0)")
    if key is not None and not do_sample:
        raise ValueError("key is used only for sampling; set do_sample=True, or leave key out")


@functools.partial(jax.jit, static_argnames=("model", "settings"))
def _generate(
    model: nn.Module,
    settings: Settings,
    params: Any,
    input_ids: Array,
    attention_mask: Array | None,
    key: Array | None,
    chosen: dict[str, Any],
    first: Array | None,
) -> tuple[Array, Array]:
    """Returns ids `[rows, 1 + max_new_tokens]`, and the width to which transformers cuts them."""
    if attention_mask is None:
        # As in transformers, a padding token that also ends sequences is not masked.
        pad = None if settings.pad in settings.eos else settings.pad
        attention_mask = _backbone(model).default_mask(input_ids, pad)
    step, cache = _start(model, settings, params, input_ids, attention_mask, chosen)
    rows = input_ids.shape[0]
    if first is not None:
        step = _forcing(step, jnp.repeat(first, _copies(settings)))
    if settings.num_beams > 1:
        return beam_search(step, cache, rows, settings)
    return one_by_one(step, cache.changing, rows * settings.num_return_sequences, settings, key)


def _forcing(step: Step, first: Array) -> Step:
    """Returns a decoding step after which only the token `[rows]` of each row can come first."""

    def forced(tokens: Array, cache: Any, index: Array) -> tuple[Array, Any]:
        logits, cache = step(tokens, cache, index)
        others = jnp.arange(logits.shape[-1]) != first[:, None]
        only = jnp.where(others, -jnp.inf, jnp.zeros_like(logits))
        return jnp.where(index == 0, only, logits), cache

    return forced


def _copies(settings: Settings) -> int:
    """Returns the number of adjacent copies of each row: beams or samples."""
    return settings.num_beams if settings.num_beams > 1 else settings.num_return_sequences


def _start(
    model: nn.Module,
    settings: Settings,
    params: Any,
    input_ids: Array,
    attention_mask: Array,
    chosen: dict[str, Any],
) -> tuple[Step, Any]:
    """Runs the encoder; returns a decoding step and its first cache.

    Both are for `num_beams` or `num_return_sequences` adjacent copies of each row.
    """
    if isinstance(model, Adapted):
        # The weights are built outside of the loop; inside, PHM weights would be built at every
        # token.
        model, params = model.precomputed(params)

    def apply(method: str, *args: Any, **kwargs: Any) -> Any:
        return model.apply({"params": params}, *args, method=method, **kwargs)

    states = apply("encode", input_ids, attention_mask, **chosen)
    cache = apply("start_cache", states, settings.max_new_tokens, **chosen)
    copies = _copies(settings)
    # The copies are made after the cross-attention's keys and values are computed. They share these
    # unless a method puts others before them, which may differ by row.
    parts = model.method.inserted() if isinstance(model, Adapted) else ()
    cache = cache.repeated(copies, share_source=not any(part.adds_tokens for part in parts))
    mask = jnp.repeat(attention_mask, copies, axis=0)
    rows = input_ids.shape[0]

    def repeat(choice: Array) -> Array:
        # Weights that all rows share, `[size]` or `[1, sites, size]`, have no axis of rows.
        of_rows = choice.shape[0] == rows and choice.ndim + ("adapter_ids" in chosen) > 1
        return jnp.repeat(choice, copies, axis=0) if of_rows else choice

    chosen = jax.tree.map(repeat, chosen)

    def step(tokens: Array, changing: Any, index: Array) -> tuple[Array, Any]:
        # The state of the loop has nothing that never changes, such as the cross-attention's keys.
        now = cache.with_changing(changing)
        logits, now = apply(
            "decode", tokens[:, None], attention_mask=mask, cache=now, index=index, **chosen
        )
        return logits[:, 0].astype(jnp.float32), now.changing

    return step, cache
