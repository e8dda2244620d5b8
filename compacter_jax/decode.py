"""Text generation with a key/value cache: greedy, sampling and beam search."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from compacter_jax.compositions import routing
from compacter_jax.inject.adapted import Adapted
from compacter_jax.nn.dense import check_ids
from compacter_jax.trees import hashable

# One decoding step: tokens [rows], self-attention cache, position -> logits [rows, vocab], cache.
Step = Callable[[Array, Any, Array], tuple[Array, Any]]

# What transformers adds to the score of a hypothesis that must not be chosen.
_EXCLUDED = -1e9
# The token of logits that are NaN, which no vocabulary has.
_NO_TOKEN = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Settings:
    """All of `generate`'s arguments that are compiled in; hashed, so equal ones compile once."""

    max_new_tokens: int
    min_new_tokens: int
    num_beams: int
    num_return_sequences: int
    length_penalty: float
    early_stopping: bool | str
    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float
    start: int
    pad: int | None
    eos: tuple[int, ...]

    def check(self, vocab_size: int) -> None:
        """ValueError for a value out of range, or one that would have no effect."""
        self._check_lengths()
        for name, token in (
            ("decoder_start_token_id", self.start),
            ("pad_token_id", self.pad),
            *(("eos_token_id", token) for token in self.eos),
        ):
            if token is not None and not 0 <= token < vocab_size:
                hint = "; () never ends a sequence early" if name == "eos_token_id" else ""
                raise ValueError(
                    f"{name}={token} is not in the vocabulary; use 0 to {vocab_size - 1}{hint}"
                )
        if self.num_beams < 1 or self.num_beams > vocab_size:
            raise ValueError(
                f"num_beams={self.num_beams} is out of range; use 1 (no beam search) to the size "
                f"of the vocabulary, {vocab_size}"
            )
        self._check_beams()
        self._check_sampling()
        self._check_copies()

    def _check_lengths(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} is too few; use 1 or more")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} is out of range; use 0 to "
                f"max_new_tokens={self.max_new_tokens}"
            )

    def _check_beams(self) -> None:
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(
                f'early_stopping={self.early_stopping!r} is unknown; use True, False or "never"'
            )
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty={self.length_penalty} is not finite; use 1.0")
        if self.num_beams > 1:
            return
        for name, neutral in (("length_penalty", 1.0), ("early_stopping", False)):
            if getattr(self, name) != neutral:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} acts in beam search alone; set num_beams to "
                    "2 or more, or leave it out"
                )

    def _check_sampling(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature} is not positive; use do_sample=False for the "
                "limit at 0, which is greedy search"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} keeps no token; use 1 or more, or None for all")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is out of range; use 0 < top_p <= 1, 1 for all")
        if self.do_sample:
            if self.num_beams > 1:
                raise ValueError(
                    f"num_beams={self.num_beams} with do_sample=True is not offered; choose beam "
                    "search or sampling"
                )
            return
        for name, neutral in (("temperature", 1.0), ("top_k", None), ("top_p", 1.0)):
            if getattr(self, name) != neutral:
                raise ValueError(
                    f"{name}={getattr(self, name)} acts in sampling alone; set do_sample=True, or "
                    "leave it out"
                )

    def _check_copies(self) -> None:
        copies = self.num_return_sequences
        if copies < 1 or (not self.do_sample and copies > self.num_beams):
            raise ValueError(
                f"num_return_sequences={copies} is out of range; use 1 to "
                f"num_beams={self.num_beams}, or sample with do_sample=True"
            )


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
    settings = _Settings(
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
    if (broken := np.argwhere(tokens == _NO_TOKEN)).size:
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
    settings: _Settings,
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
        return _beam_search(step, cache, rows, settings)
    return _one_by_one(step, cache, rows * settings.num_return_sequences, settings, key)


def _default_mask(input_ids: Array, settings: _Settings) -> Array:
    if settings.pad is None or settings.pad in settings.eos:
        return jnp.ones_like(input_ids)
    return input_ids != settings.pad


def _start(
    model: nn.Module,
    settings: _Settings,
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


def _one_by_one(
    step: Step, cache: Any, rows: int, settings: _Settings, key: Array | None
) -> tuple[Array, Array]:
    """Greedy search, or sampling where there is a key."""
    ids = jnp.full((rows, 1 + settings.max_new_tokens), settings.pad or 0, jnp.int32)
    ids = ids.at[:, 0].set(settings.start)

    def unfinished(state: Any) -> Array:
        index, _, finished, _ = state
        return (index < settings.max_new_tokens) & ~finished.all()

    def extend(state: Any) -> Any:
        index, ids, finished, cache = state
        logits, cache = step(ids[:, index], cache, index)
        logits = _forbid_end(logits, index, settings)
        if key is None:
            tokens = _most_probable(logits)
        else:
            logits = _cut(logits, settings)
            drawn = jax.random.categorical(jax.random.fold_in(key, index), logits)
            tokens = jnp.where(jnp.isnan(logits.max(-1)), _NO_TOKEN, drawn)
        tokens = jnp.where(finished, ids[:, index + 1], tokens)  # padding, once finished
        ids = ids.at[:, index + 1].set(tokens.astype(jnp.int32))
        return index + 1, ids, finished | _is_end(tokens, settings), cache

    state = (jnp.int32(0), ids, jnp.zeros(rows, bool), cache)
    index, ids, _, _ = lax.while_loop(unfinished, extend, state)
    return ids, 1 + index


def _most_probable(logits: Array) -> Array:
    """`[rows, vocab] -> [rows]`, the first of equals, `_NO_TOKEN` where there is a NaN.

    As `argmax`, in two reductions that XLA vectorizes on a CPU, where it does not that of pairs;
    and of the transpose, which is how `tied_logits` has computed them.
    """
    columns = logits.T
    index = lax.broadcasted_iota(jnp.int32, columns.shape, 0)
    largest = columns.max(0)
    first = jnp.where(columns < largest, columns.shape[0], index).min(0)
    return jnp.where(jnp.isnan(largest), _NO_TOKEN, first)


def _is_end(tokens: Array, settings: _Settings) -> Array:
    return (tokens[..., None] == jnp.asarray(settings.eos, jnp.int32)).any(-1)


def _forbid_end(scores: Array, index: Array, settings: _Settings) -> Array:
    """`[rows, vocab]` with -inf at the ends of sequences before `min_new_tokens`."""
    if settings.min_new_tokens == 0:
        return scores
    ends = _is_end(jnp.arange(scores.shape[-1]), settings)
    return jnp.where(ends & (index < settings.min_new_tokens), -jnp.inf, scores)


def _cut(logits: Array, settings: _Settings) -> Array:
    """`[rows, vocab]` after temperature, top-k and top-p, in transformers' order; -inf is cut."""
    logits = logits / settings.temperature
    if settings.top_k is not None:
        best, _ = lax.top_k(logits, min(settings.top_k, logits.shape[-1]))
        logits = jnp.where(logits < best[:, -1:], -jnp.inf, logits)
    if settings.top_p < 1:
        order = logits.argsort(-1)
        ascending = jnp.take_along_axis(logits, order, -1)
        below = jax.nn.softmax(ascending, -1).cumsum(-1) <= 1 - settings.top_p
        below = below.at[:, -1].set(False)  # never the most probable token
        # argsort of a permutation is its inverse
        cut = jnp.take_along_axis(below, order.argsort(-1), -1)
        logits = jnp.where(cut, -jnp.inf, logits)
    return logits


class _Beams(NamedTuple):
    """The state of a beam search; `n` is `num_beams`, hypotheses are sorted by their scores."""

    done: Array  # [] int32, tokens generated
    running: Array  # [batch, n, width] int32
    running_scores: Array  # [batch, n] float32, log probabilities
    ended: Array  # [batch, n, width] int32
    ended_scores: Array  # [batch, n] float32, with the length penalty
    lengths: Array  # [batch, n] int32, tokens generated in each of `ended`
    is_ended: Array  # [batch, n] bool, whether that place of `ended` is filled
    improvable: Array  # [batch, 1] bool, whether a running hypothesis may enter `ended`
    stuck: Array  # [] bool, whether nothing is left to extend
    cache: Any  # self-attention's, rows of `running` flattened


class _Candidates(NamedTuple):
    """Extensions of the running hypotheses, the best first; `m` is twice `num_beams` or more."""

    ids: Array  # [batch, m, width] int32
    scores: Array  # [batch, m] float32
    parents: Array  # [batch, m] int32, which running hypothesis each extends
    ends: Array  # [batch, m] bool


def _beam_search(step: Step, cache: Any, rows: int, settings: _Settings) -> tuple[Array, Array]:
    """Beam search, kept score for score as transformers keeps it, so that the tokens agree."""

    def unfinished(beams: _Beams) -> Array:
        go_on = beams.improvable.any() & ~beams.stuck
        return go_on & ~beams.is_ended.all() if settings.early_stopping is True else go_on

    def extend(beams: _Beams) -> _Beams:
        tokens = beams.running[:, :, beams.done].reshape(-1)
        logits, cache = step(tokens, beams.cache, beams.done)
        candidates = _candidates(beams, logits, settings)
        beams = _collect_ended(beams, candidates, settings)
        beams = _keep_running(beams._replace(cache=cache), candidates)
        return _look_ahead(beams, settings)

    beams = lax.while_loop(unfinished, extend, _first_beams(cache, rows, settings))
    copies = settings.num_return_sequences
    ids = jnp.where(jnp.isnan(beams.ended_scores)[..., None], _NO_TOKEN, beams.ended)
    ids = ids[:, :copies].reshape(rows * copies, -1)
    return ids, 1 + beams.lengths[:, :copies].max(initial=0)


def _first_beams(cache: Any, rows: int, settings: _Settings) -> _Beams:
    shape = (rows, settings.num_beams)
    # Transformers takes a pad token of 0 for none.
    fill = settings.pad or (settings.eos[0] if settings.eos else 0)
    ids = jnp.full((*shape, 1 + settings.max_new_tokens), fill, jnp.int32)
    ids = ids.at[..., 0].set(settings.start)
    # All hypotheses begin alike: only the first is to be extended.
    scores = jnp.zeros(shape, jnp.float32).at[:, 1:].set(_EXCLUDED)
    return _Beams(
        done=jnp.int32(0),
        running=ids,
        running_scores=scores,
        ended=ids,
        ended_scores=jnp.full(shape, _EXCLUDED, jnp.float32),
        lengths=jnp.zeros(shape, jnp.int32),
        is_ended=jnp.zeros(shape, bool),
        improvable=jnp.ones((rows, 1), bool),
        stuck=jnp.asarray(False),
        cache=cache,
    )


def _candidates(beams: _Beams, logits: Array, settings: _Settings) -> _Candidates:
    """The best extensions: so many that `num_beams` remain if all others end."""
    rows, n, _ = beams.running.shape
    vocab_size = logits.shape[-1]
    scores = _forbid_end(jax.nn.log_softmax(logits), beams.done, settings)
    scores = scores.reshape(rows, n, vocab_size) + beams.running_scores[..., None]
    scores, flat = lax.top_k(
        scores.reshape(rows, n * vocab_size), max(2, 1 + len(settings.eos)) * n
    )
    parents, tokens = flat // vocab_size, flat % vocab_size
    ids = _take(beams.running, parents).at[:, :, beams.done + 1].set(tokens)
    ends = _is_end(tokens, settings) | (beams.done + 1 == settings.max_new_tokens)
    return _Candidates(ids, scores, parents, ends)


def _collect_ended(beams: _Beams, candidates: _Candidates, settings: _Settings) -> _Beams:
    """The best of the hypotheses that had ended and those that just did."""
    n = settings.num_beams
    # The rest are a reserve to go on with, not results.
    just_ended = candidates.ends & (jnp.arange(candidates.ends.shape[1]) < n)
    length = beams.done + 1
    scores = candidates.scores / _penalty(length, settings)
    if settings.early_stopping is True:
        scores += beams.is_ended.all(-1, keepdims=True) * _EXCLUDED
    scores += ~beams.improvable * _EXCLUDED
    scores += ~just_ended * _EXCLUDED
    scores, best = lax.top_k(jnp.concatenate([beams.ended_scores, scores], 1), n)

    def merge(old: Array, new: Array) -> Array:
        return _take(jnp.concatenate([old, new], 1), best)

    return beams._replace(
        ended=merge(beams.ended, candidates.ids),
        ended_scores=scores,
        lengths=merge(beams.lengths, jnp.full_like(candidates.parents, length)),
        is_ended=merge(beams.is_ended, just_ended),
    )


def _keep_running(beams: _Beams, candidates: _Candidates) -> _Beams:
    """The best hypotheses that go on, each with the cache of the one that it extends."""
    rows, n, _ = beams.running.shape
    scores, best = lax.top_k(candidates.scores + candidates.ends * _EXCLUDED, n)
    parents = (_take(candidates.parents, best) + n * jnp.arange(rows)[:, None]).reshape(-1)
    return beams._replace(
        done=beams.done + 1,
        running=_take(candidates.ids, best),
        running_scores=scores,
        stuck=candidates.ends.all(),
        cache=jax.tree.map(lambda leaf: leaf.take(parents, 0, mode="clip"), beams.cache),
    )


def _look_ahead(beams: _Beams, settings: _Settings) -> _Beams:
    """Whether the best running hypothesis of each row could still beat its worst ended one."""
    length = beams.done
    if settings.early_stopping == "never" and settings.length_penalty > 0:
        length = jnp.int32(settings.max_new_tokens)
    best = beams.running_scores[:, :1] / _penalty(length, settings)
    worst = jnp.where(
        beams.is_ended, beams.ended_scores.min(-1, keepdims=True), jnp.float32(_EXCLUDED)
    )
    could = (best > worst).any(-1, keepdims=True)
    return beams._replace(improvable=beams.improvable & could)


def _penalty(length: Array, settings: _Settings) -> Array:
    """`length ** length_penalty`, rounded once, as Python's numbers are."""
    table = np.arange(1, settings.max_new_tokens + 1) ** np.float64(settings.length_penalty)
    return jnp.asarray(table, jnp.float32)[length - 1]


def _take(array: Array, indices: Array) -> Array:
    """`[batch, n, …]`, `[batch, m]` -> `[batch, m, …]`, hypotheses of each row by their places."""
    indices = indices.reshape(indices.shape + (1,) * (array.ndim - 2))
    return jnp.take_along_axis(array, indices, 1, mode="clip")
