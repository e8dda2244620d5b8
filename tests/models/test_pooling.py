"""Compares pooling with NumPy and sentence-transformers; tests its setting in files."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import compacter_jax as cj
from compacter_jax.adapter_files import CONFIG_NAME, read_adapter_config
from compacter_jax.models.families import FAMILIES, pooling_attributes
from compacter_jax.models.loading import known_pooling, module_from_config, pooling_of
from compacter_jax.models.pooling import POOLINGS, mean_of_tokens
from train.cli.options import Pooling
from train.objectives import with_classifier

IDS = np.array([[2, 7, 9, 11, 3, 0], [2, 8, 3, 0, 0, 0], [2, 5, 6, 7, 8, 3]])
MASK = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
LABELS = 3


def saying(folder, place, **fields):
    """Copies a checkpoint and adds the pooling file of sentence-transformers."""
    shutil.copytree(folder, place)
    (place / "1_Pooling").mkdir()
    (place / "1_Pooling/config.json").write_text(json.dumps(fields))
    return place


@pytest.fixture
def mean_backbone(tiny_backbone, tmp_path):
    fields = {"word_embedding_dimension": 24, "pooling_mode_cls_token": False}
    return saying(tiny_backbone, tmp_path / "mean", **fields, pooling_mode_mean_tokens=True)


def classifier(folder, pooling, **kwargs):
    return cj.load_backbone(
        folder, head="sequence_classification", num_labels=LABELS, pooling=pooling, **kwargs
    )


def states_of(folder):
    backbone = cj.load_backbone(folder, head=None)
    output = backbone.module.apply({"params": backbone.params}, IDS, MASK)
    return np.asarray(output.last_hidden_state, np.float64)


def logits_of(backbone, ids=IDS, mask=MASK):
    return np.asarray(backbone.module.apply({"params": backbone.params}, ids, mask), np.float64)


def read(backbone, pooled):
    """Returns the logits of the classifier for pooled states."""
    head = backbone.params["classifier"]
    return pooled @ np.asarray(head["kernel"], np.float64) + np.asarray(head["bias"], np.float64)


def numpy_mean(states):
    return np.stack([row[mask == 1].mean(0) for row, mask in zip(states, MASK, strict=True)])


def test_mean_and_first_token_equal_numpy(tiny_backbone):
    states = states_of(tiny_backbone)
    mean, cls = (classifier(tiny_backbone, pooling) for pooling in ("mean", "cls"))
    np.testing.assert_allclose(logits_of(mean), read(mean, numpy_mean(states)), atol=2e-6)
    np.testing.assert_allclose(logits_of(cls), read(cls, states[:, 0]), atol=2e-6)
    for backbone in (mean, cls):
        assert "pooler" not in backbone.params
        assert sorted(backbone.new_parameters) == ["classifier/bias", "classifier/kernel"]


def test_without_a_mask_all_tokens_count(tiny_backbone):
    mean = classifier(tiny_backbone, "mean")
    np.testing.assert_allclose(
        logits_of(mean, mask=None), logits_of(mean, mask=np.ones_like(IDS)), atol=2e-6
    )


def test_mean_is_that_of_sentence_transformers(tiny_backbone):
    """Applies `Pooling.forward` of sentence-transformers to the hidden states of transformers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel.from_pretrained(tiny_backbone).eval()
    ids, mask = torch.tensor(IDS), torch.tensor(MASK)
    with torch.no_grad():
        embeddings = model(ids, mask).last_hidden_state
        expanded = mask.unsqueeze(-1).expand(embeddings.size()).to(embeddings.dtype)
        total = torch.clamp(expanded.sum(1), min=1e-9)
        pooled = {"mean": (embeddings * expanded).sum(1) / total, "cls": embeddings[:, 0]}
    for pooling, wanted in pooled.items():
        backbone = classifier(tiny_backbone, pooling)
        expected = read(backbone, wanted.numpy().astype(np.float64))
        np.testing.assert_allclose(logits_of(backbone), expected, atol=1e-5)


def test_padding_cannot_be_seen(tiny_backbone):
    mean = classifier(tiny_backbone, "mean")
    other = np.where(MASK == 0, 12, IDS)
    np.testing.assert_allclose(logits_of(mean, other), logits_of(mean), atol=2e-6)
    alone = logits_of(mean, IDS[1:2, :3], MASK[1:2, :3])
    np.testing.assert_allclose(alone, logits_of(mean)[1:2], atol=2e-6)


def test_masks_of_any_kind(tiny_backbone):
    mean = classifier(tiny_backbone, "mean")
    for mask in (MASK.astype(bool), 7 * MASK, jnp.asarray(MASK, jnp.int8)):
        np.testing.assert_allclose(logits_of(mean, mask=mask), logits_of(mean), atol=1e-6)


def test_rows_of_padding_are_refused(tiny_backbone):
    mask = np.array(MASK)
    mask[1] = 0
    mean, cls = (classifier(tiny_backbone, pooling) for pooling in ("mean", "cls"))
    with pytest.raises(ValueError, match=r"nothing but padding in row 1, .* pooling='mean' takes"):
        logits_of(mean, mask=mask)
    assert np.isfinite(logits_of(cls, mask=mask)).all()
    traced = jax.jit(mean.module.apply)({"params": mean.params}, IDS, mask)
    assert np.isnan(np.asarray(traced)).any(-1).tolist() == [False, True, False]


def test_bfloat16_sums_in_float32(tiny_backbone):
    """The mean of equal states is the state itself, which sums or counts in bfloat16 would miss."""
    count, value = 259, 1.984375
    states = jnp.full((1, count, 24), value, jnp.bfloat16)
    total, length = jnp.bfloat16(count * value), jnp.bfloat16(count)  # 512 and 260
    for wrong in (float(total) / count, count * value / float(length)):
        assert float(jnp.bfloat16(wrong)) != value
    for mask in (None, jnp.ones((1, count), jnp.int32)):
        mean = mean_of_tokens(states, mask)
        assert mean.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(mean, np.float32), value)
    near = classifier(tiny_backbone, "mean", dtype=jnp.bfloat16)
    logits = near.module.apply({"params": near.params}, IDS, MASK)
    assert logits.dtype == jnp.bfloat16
    exact = logits_of(classifier(tiny_backbone, "mean"))
    np.testing.assert_allclose(np.asarray(logits, np.float64), exact, atol=0.05)


def test_only_the_mean_needs_all_tokens_of_the_last_layer(tiny_backbone):
    """Unless the mean is read, the last layer computes only the first token."""

    def products(pooling):
        module = classifier(tiny_backbone, pooling).module
        shapes = jax.eval_shape(module.init, jax.random.key(0), IDS, MASK)
        return str(jax.make_jaxpr(module.apply)(shapes, IDS, MASK)).count("f32[3,6,40]")

    assert products("cls") == products("first") < products("mean")


def test_the_head_learns_what_the_mean_says(tiny_backbone):
    """The classifier has the gradient of a linear layer on NumPy's means."""
    mean = classifier(tiny_backbone, "mean")
    states = numpy_mean(states_of(tiny_backbone))

    def loss(params):
        return (mean.module.apply({"params": params}, IDS, MASK)[:, 0]).sum()

    gradient = jax.grad(loss)(mean.params)["classifier"]["kernel"]
    np.testing.assert_allclose(gradient[:, 0], states.sum(0), atol=1e-5)
    np.testing.assert_array_equal(gradient[:, 1:], 0)


# --- defaults -----------------------------------------------------------------------------------


def test_the_default_is_the_checkpoints(tiny_backbone, mean_backbone):
    assert classifier(tiny_backbone, None).module.pooling == "first"
    assert classifier(mean_backbone, None).module.pooling == "mean"
    assert classifier(mean_backbone, "first").module.pooling == "first"
    assert pooling_of(tiny_backbone) is known_pooling("bert-base-uncased") is None
    assert pooling_of(mean_backbone) == pooling_of(mean_backbone / "config.json") == "mean"
    for head in (None, "token_classification", "masked_lm", "question_answering"):
        assert cj.load_backbone(mean_backbone, head=head).module.pooling == "first"


@pytest.mark.parametrize(
    ("fields", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True, "include_prompt": True}, "mean"),
        ({"pooling_mode": "mean", "embedding_dimension": 24}, "mean"),
        ({"pooling_mode": ["cls"]}, "cls"),
    ],
)
def test_files_of_sentence_transformers(tiny_backbone, tmp_path, fields, pooling):
    folder = saying(tiny_backbone, tmp_path / "saying", **fields)
    assert classifier(folder, None).module.pooling == pooling


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pooling_mode_max_tokens": True}, "says pooling_mode_max_tokens, which is not supported"),
        (
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            "sets pooling_mode_cls_token, pooling_mode_mean_tokens; supported are",
        ),
        ({"pooling_mode_mean_tokens": False}, "sets no field pooling_mode_…"),
        ({"pooling_mode": "lasttoken"}, "says pooling_mode='lasttoken', which is not supported"),
        ({"pooling_mode": 3}, "says pooling_mode=3, which is not supported"),
    ],
)
def test_other_poolings_are_refused_by_name(tiny_backbone, tmp_path, fields, message):
    folder = saying(tiny_backbone, tmp_path / "saying", **fields)
    with pytest.raises(ValueError, match=rf"1_Pooling/config\.json {message}") as error:
        classifier(folder, None)
    assert "choose with pooling='first', 'mean' or 'cls'" in str(error.value)
    assert classifier(folder, "first").module.pooling == "first"
    assert cj.load_backbone(folder).module.head is None


def test_heads_that_do_not_pool(tiny_backbone, tiny_t5):
    with pytest.raises(
        ValueError, match=r"pooling='mean' is for head='sequence_classification', n"
    ):
        cj.Bert(cj.BertConfig(), head="token_classification", pooling="mean")
    with pytest.raises(ValueError, match=r"unknown pooling 'max'; use one of \('first', 'mean', "):
        cj.Bert(cj.BertConfig(), head="sequence_classification", pooling="max")
    with pytest.raises(
        ValueError, match=r"pooling='mean' was given, but head='masked_lm' of a 'be"
    ):
        cj.load_backbone(tiny_backbone, head="masked_lm", pooling="mean")
    with pytest.raises(ValueError, match=r"head='conditional_generation' of a 't5' does not pool"):
        cj.load_backbone(tiny_t5, pooling="first")


def test_a_family_without_poolings_has_the_first_alone(tiny_backbone, monkeypatch):
    head, first = "sequence_classification", cj.Bert(cj.BertConfig(), pooling="first")
    for model_type, family in FAMILIES.items():
        alone = dataclasses.replace(family, pooled_heads=())
        assert pooling_attributes(alone, head, "first", model_type) == {}
        with pytest.raises(ValueError, match=f"of a {model_type} does not pool"):
            pooling_attributes(alone, head, "mean", model_type)
    assert with_classifier(first, 3, "mean").pooling == "mean"
    assert with_classifier(first, 3).num_labels == 3
    without = dataclasses.replace(FAMILIES["bert"], pooled_heads=())
    monkeypatch.setitem(FAMILIES, "bert", without)
    assert classifier(tiny_backbone, "first").module.pooling == "first"
    assert with_classifier(first, 3).head == head
    for make in (classifier, lambda folder, pooling: with_classifier(first, 3, pooling)):
        with pytest.raises(ValueError, match=r"pooling='mean' was given.*does not pool"):
            make(tiny_backbone, "mean")


def test_the_command_line_has_the_same_choices():
    assert Pooling.__args__ == POOLINGS


# --- adapters and backbones on disk -------------------------------------------------------------


def adapted(backbone, method=None, seed=0):
    method = method or cj.preset("compacter++", reduction_factor=3)
    model = cj.Adapted(backbone.module, method)
    params = cj.init_adapters(model, backbone, jax.random.key(seed))
    shift = jax.random.key(seed + 100)
    labels = cj.label_params(params, method)
    params = jax.tree.map(
        lambda leaf, label: leaf + 0.3 * jax.random.normal(shift, leaf.shape) * (label == "train"),
        params,
        labels,
    )
    return model, params


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", ["compacter++", "full", "bitfit", "lora"])
def test_every_method_trains_saves_and_loads(tiny_backbone, tmp_path, pooling, name):
    changes = {"train_pooler": True} if name in ("compacter++", "full") else {}
    changes |= {"reduction_factor": 3} if name == "compacter++" else {}
    backbone = classifier(tiny_backbone, pooling)
    model, params = adapted(backbone, cj.preset(name, **changes))
    cj.save_adapter(tmp_path, model, params)
    assert read_adapter_config(tmp_path)["pooling"] == pooling
    again, loaded = cj.load_adapter(tmp_path, backbone)
    for path, leaf in flatten_dict(loaded, sep="/").items():
        np.testing.assert_array_equal(leaf, flatten_dict(params, sep="/")[path])
    trained = flatten_dict(cj.label_params(loaded, again.method), sep="/")
    assert ("pooler/dense/kernel" in trained) == (pooling == "first")


def test_adapters_are_read_with_their_pooling_alone(tiny_backbone, tmp_path):
    for pooling, other in (("mean", "first"), ("first", "cls")):
        model, params = adapted(classifier(tiny_backbone, pooling))
        cj.save_adapter(tmp_path / pooling, model, params)
        message = (
            f"saved with pooling='{pooling}', but the backbone has pooling='{other}'; load the"
        )
        with pytest.raises(ValueError, match=message):
            cj.load_adapter(tmp_path / pooling, classifier(tiny_backbone, other))


def test_adapters_of_before_read_the_first_token(tiny_backbone, mean_backbone, tmp_path):
    model, params = adapted(classifier(tiny_backbone, "first"))
    cj.save_adapter(tmp_path / "old", model, params)
    path = tmp_path / "old" / CONFIG_NAME
    settings = json.loads(path.read_text())
    del settings["pooling"]
    path.write_text(json.dumps(settings))
    again, loaded = cj.load_adapter(tmp_path / "old", classifier(mean_backbone, "first"))
    np.testing.assert_array_equal(
        again.apply({"params": loaded}, IDS, MASK), model.apply({"params": params}, IDS, MASK)
    )
    with pytest.raises(
        ValueError, match="saved with pooling='first', but the backbone has pooling='me"
    ):
        cj.load_adapter(tmp_path / "old", classifier(mean_backbone, None))


def test_other_heads_say_nothing_of_pooling(tiny_backbone, tmp_path):
    model, params = adapted(cj.load_backbone(tiny_backbone, head="token_classification"))
    cj.save_adapter(tmp_path, model, params)
    assert "pooling" not in read_adapter_config(tmp_path)
    path = tmp_path / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "pooling": "max"}))
    with pytest.raises(ValueError, match="pooling='max' must be"):
        read_adapter_config(tmp_path)


def test_a_bank_pools_every_row(tiny_backbone, tmp_path):
    backbone = classifier(tiny_backbone, "mean")
    members = [adapted(backbone, seed=seed) for seed in (0, 1)]
    for seed, (model, params) in enumerate(members):
        cj.save_adapter(tmp_path / str(seed), model, params)
    bank, stacked = cj.stack_adapters([tmp_path / "0", tmp_path / "1"], backbone)
    ids = np.array([1, 0, 1])
    routed = bank.apply({"params": stacked}, IDS, MASK, adapter_ids=ids)
    alone = [np.asarray(model.apply({"params": p}, IDS, MASK)) for model, p in members]
    wanted = np.stack([alone[member][row] for row, member in enumerate(ids)])
    np.testing.assert_allclose(routed, wanted, atol=5e-6)
    other = adapted(classifier(tiny_backbone, "cls"))
    with pytest.raises(ValueError, match="pooling: 'cls', not 'mean'"):
        cj.stack_adapters([members[0], other], backbone)
    with pytest.raises(ValueError, match="pooling: 'cls', not 'mean'"):
        cj.set_member(bank, stacked, 0, other)


def test_backbones_keep_their_pooling(tiny_backbone, tmp_path):
    mean = classifier(tiny_backbone, "mean")
    cj.save_backbone(tmp_path / "mean", mean.module, mean.params, mean.config)
    again = cj.load_backbone(tmp_path / "mean")
    assert again.module == mean.module
    assert again.new_parameters == ()
    np.testing.assert_array_equal(logits_of(again), logits_of(mean))
    first = classifier(tiny_backbone, "first")
    with pytest.raises(
        ValueError, match=r"1_Pooling/config\.json says how a head is to be read, an"
    ):
        cj.save_backbone(tmp_path / "mean", first.module, first.params, first.config)
    cj.save_backbone(tmp_path / "first", first.module, first.params, first.config)
    assert not (tmp_path / "first/1_Pooling").exists()


def test_heads_of_other_libraries_read_the_first_token(tiny_backbone, tmp_path):
    mean, first = (classifier(tiny_backbone, pooling) for pooling in ("mean", "first"))
    for library, method in (("adapterhub", "lora"), ("peft", "lora")):
        export, load = getattr(cj, f"export_{library}"), getattr(cj, f"import_{library}")
        with pytest.raises(ValueError, match=r"the backbone has pooling='mean'; .*pooling='first'"):
            export(tmp_path / "mean", *adapted(mean, cj.preset(method)))
        assert not (tmp_path / "mean").exists()
        export(tmp_path / library, *adapted(first, cj.preset(method)))
        with pytest.raises(ValueError, match=r"the backbone has pooling='mean'; .*pooling='first'"):
            load(tmp_path / library, mean)
        # A BERT has a pooler, so that its first token alone is not what the others read.
        with pytest.raises(ValueError, match=r"the backbone has pooling='cls'; .*pooling='first'"):
            export(tmp_path / "cls", *adapted(classifier(tiny_backbone, "cls"), cj.preset(method)))
    # An exported adapter without its head does not depend on the pooling.
    model, params = adapted(mean, cj.preset("lora"))
    cj.export_adapterhub(tmp_path / "alone", model, params, with_head=False)
    again, loaded = cj.import_adapterhub(tmp_path / "alone", mean, with_head=False)
    assert again.backbone.pooling == "mean"
    assert loaded["classifier"] is mean.params["classifier"] or np.array_equal(
        loaded["classifier"]["kernel"], mean.params["classifier"]["kernel"]
    )


def test_configurations_alone(tiny_backbone):
    config = classifier(tiny_backbone, None).config
    module = module_from_config(config, head="sequence_classification", pooling="mean")
    assert module.pooling == "mean"
