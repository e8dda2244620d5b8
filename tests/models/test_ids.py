"""Ids outside the vocabulary raise an error if they are known, and give NaN if they are traced."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from compacter_jax import Adapted, generate, preset
from compacter_jax.decode import beams, sampling
from compacter_jax.decode import settings as decode_settings
from compacter_jax.models.bert.model import Bert
from compacter_jax.models.t5.model import T5
from compacter_jax.nn.attention import DecoderCache
from compacter_jax.nn.dense import Embed
from compacter_jax.nn.inputs import check_ids
from compacter_jax.nn.quantize import quantize
from tests.helpers import IDS, ONE_LAYER, TINY_T5, backbone_of, quick_jit, quick_key
from train.compute import step as compute_step

BERT = Bert(ONE_LAYER)
ONE_BLOCK = dataclasses.replace(TINY_T5, num_layers=1)
PROMPT = np.array([[3, 5, 1], [2, 18, 1]])


@pytest.fixture(scope="module")
def t5():
    return backbone_of(T5(ONE_BLOCK))


def changed(ids, value, place=(1, 2)):
    ids = np.array(ids)
    ids[place] = value
    return ids


# --- where they are known -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ids", "message"),
    [
        ("input_ids", changed(IDS, 17), r"contains 17 at \(1, 2\); use 0 to vocab_size - 1 = 16"),
        ("input_ids", jnp.asarray(changed(IDS, -1)), r"input_ids contains -1 at \(1, 2\)"),
        ("input_ids", changed(IDS, 2**32 + 3), r"contains 4294967299 at"),
        ("token_type_ids", changed(0 * IDS, 2), r"contains 2 at .*type_vocab_size - 1 = 1"),
        (
            "position_ids",
            np.array([[0, 1, 2, 8, 9]]),
            "contains 9 at .*position_embeddings - 1 = 8",
        ),
        ("position_ids", np.arange(-1, 4)[None], r"position_ids contains -1 at \(0, 0\)"),
    ],
)
def test_bert_refuses_ids(name, ids, message):
    with pytest.raises(ValueError, match=message):
        BERT.apply({}, **{"input_ids": IDS, name: ids})


@pytest.mark.parametrize("head", ["conditional_generation", None, "encoder"])
def test_t5_refuses_ids_of_the_encoder(head):
    module = T5(TINY_T5, head=head)
    more = () if head == "encoder" else (None, PROMPT)
    with pytest.raises(ValueError, match=r"^input_ids contains 19 at .*vocab_size - 1 = 18"):
        module.apply({}, changed(PROMPT, 19), *more)
    with pytest.raises(ValueError, match=r"^input_ids contains -2 at"):
        module.apply({}, changed(PROMPT, -2), method="encode")


def test_t5_refuses_labels_as_inputs_of_its_decoder():
    states = jnp.zeros((2, 3, TINY_T5.d_model))
    with pytest.raises(
        ValueError, match=r"^decoder_input_ids contains -100 at .*give pad_token_id"
    ):
        T5(TINY_T5).apply({}, changed(PROMPT, -100), states, method="decode")


@pytest.mark.parametrize("index", [5, -1])
def test_t5_refuses_a_token_for_which_its_cache_has_no_room(index):
    room = jnp.zeros((1, TINY_T5.num_heads, 5, TINY_T5.d_kv))
    cache = DecoderCache(((room, room),), ((room, room),))
    with pytest.raises(ValueError, match=f"index is {index}; use 0 to max_length of start_cache"):
        T5(TINY_T5).apply({}, PROMPT[:1, :1], cache=cache, index=index, method="decode")


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("ids", [changed(PROMPT, 19), jnp.asarray(changed(PROMPT, -100))])
def test_generate_refuses_a_prompt(ids, num_beams):
    with pytest.raises(ValueError, match=r"input_ids contains (19|-100) at \(1, 2\)"):
        generate(T5(TINY_T5), {}, ids, max_new_tokens=2, num_beams=num_beams)


def test_adapters_are_no_way_around_it():
    model = Adapted(BERT, preset("prompt-tuning-random", prompt_length=2))
    with pytest.raises(ValueError, match=r"input_ids contains -3 at \(1, 4\)"):
        model.apply({}, changed(IDS, -3))


def test_every_id_of_a_table_is_taken():
    check_ids("ids", np.array([0, 16], np.uint8), 17, "vocab_size")
    check_ids("ids", np.zeros((0, 3), int), 17, "vocab_size")


# --- where they are traced ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.uint8])
@pytest.mark.parametrize("is_quantized", [False, True])
def test_a_row_that_a_table_does_not_have_is_nan(dtype, is_quantized):
    table = np.random.default_rng(0).standard_normal((100, 4)).astype(np.float32)
    ids = np.array([0, 99, 100, 127, 3, -1, -100][: 5 if dtype == np.uint8 else 7], dtype)
    stored = quantize(table, 1) if is_quantized else table
    rows = quick_jit(Embed(100, 4).apply)({"params": {"embedding": stored}}, ids)
    expected = np.full((len(ids), 4), np.nan, np.float32)
    known = (ids >= 0) & (ids < 100)
    expected[known] = (stored.dequantized() if is_quantized else table)[ids[known]]
    np.testing.assert_array_equal(rows, expected)


def test_the_row_of_a_batch_is_nan_alone():
    params = backbone_of(BERT).params
    run = quick_jit(lambda *inputs: BERT.apply({"params": params}, *inputs).last_hidden_state)
    mask, types_of = np.ones_like(IDS), np.zeros_like(IDS)
    positions = np.broadcast_to(np.arange(5), IDS.shape)
    mask[:, 3:] = 0  # an invalid id is wrong even if the mask hides it
    expected = run(IDS, mask, types_of, positions)
    assert np.isfinite(expected).all()
    for inputs in (
        (changed(IDS, -100, (1, 4)), mask, types_of, positions),
        (IDS, mask, changed(types_of, -1), positions),
        (IDS, mask, types_of, changed(positions, 9)),
    ):
        states = run(*inputs)
        np.testing.assert_array_equal(states[0], expected[0])
        assert np.isnan(states[1]).all()


def test_logits_of_labels_given_to_a_decoder_are_nan(t5):
    run = quick_jit(lambda ids, labels: t5.module.apply({"params": t5.params}, ids, None, labels))
    labels = np.array([[0, 4, 5], [0, 7, -100]])
    logits = run(PROMPT, labels)
    assert np.isfinite(logits[0]).all()
    assert np.isnan(logits[1]).all()
    logits = run(changed(PROMPT, 19, (0, 0)), labels)
    assert np.isnan(logits).all()


def test_a_cache_without_room_gives_nan(t5):
    width = (2, ONE_BLOCK.num_heads, 4, ONE_BLOCK.d_kv)
    room = (jnp.ones(width), jnp.ones(width))

    @quick_jit
    def run(index):
        return t5.module.apply(
            {"params": t5.params},
            PROMPT[:, :1],
            cache=DecoderCache((room,), (room,)),
            index=index,
            method="decode",
        )[0]

    assert np.isfinite(run(3)).all()
    assert np.isnan(run(4)).all()
    assert np.isnan(run(-1)).all()


@pytest.mark.parametrize("search", ["greedy", "sampling", "beams"])
def test_a_row_whose_logits_are_nan_has_no_tokens(search):
    num_beams = 2 if search == "beams" else 1
    settings = dict.fromkeys(field.name for field in dataclasses.fields(decode_settings.Settings))
    settings |= {"max_new_tokens": 3, "min_new_tokens": 0, "num_beams": num_beams, "start": 0}
    settings |= {"num_return_sequences": num_beams, "length_penalty": 1.0, "early_stopping": False}
    settings |= {"temperature": 1.0, "top_p": 0.9, "eos": (1,), "never": ()}
    settings = decode_settings.Settings(**settings)
    logits = np.random.default_rng(0).standard_normal((2 * num_beams, 5)).astype(np.float32)
    logits[num_beams:] = np.nan

    @quick_jit
    def run(logits):
        step = lambda tokens, cache, index: (logits, cache)  # noqa: E731
        if search == "beams":
            return beams.beam_search(step, DecoderCache((), ()), 2, settings)
        return sampling.one_by_one(
            step, (), 2, settings, quick_key(0) if search == "sampling" else None
        )

    tokens, _ = run(logits)
    assert ((tokens[:num_beams] >= 0) & (tokens[:num_beams] < 5)).all()
    assert (tokens[num_beams:, 1:] == -1).all()


def test_generate_by_itself_refuses_logits_that_are_nan(monkeypatch):
    tokens = jnp.array([[0, 2], [0, 3], [0, -1], [0, 4]])
    monkeypatch.setattr(
        "compacter_jax.decode.generate._generate", lambda *_: (tokens, jnp.int32(2))
    )
    with pytest.raises(ValueError, match="the logits of row 1 are NaN"):
        generate(T5(TINY_T5), {}, PROMPT, max_new_tokens=1, num_beams=2, num_return_sequences=2)


def test_the_loss_of_a_label_that_does_not_exist_is_nan():
    logits, labels = jnp.zeros((4, 3)), jnp.array([2, 3, -1, -100])
    losses = compute_step.loss_function("classification")(logits, labels)
    np.testing.assert_array_equal(np.isnan(losses), [False, True, True, True])
    # Only -100 is ignored, not other negative labels.
    likelihoods = compute_step.token_log_likelihoods(logits, labels)
    np.testing.assert_array_equal(np.isnan(likelihoods), [False, True, True, False])
    assert likelihoods[3] == 0
