"""Tests the readers of files: limits, types of weights, patterns; and concurrent saving."""

import json
import re
import threading
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj
from compacter_jax import (
    adapter_files,
    checkpoint,
    files,
    leftovers,
    limits,
    messages,
    patterns,
    weights,
)
from compacter_jax.models.loading import module_from_config, module_from_name, read_config
from tests.helpers import ONE_LAYER, adapted_shapes, backbone_of, random_tree, weights_of
from train.cli.config_files import expand_config
from train.data.tokens import load_tokenizer
from train.fit.options import FitOptions

RECORDED = Path(__file__).parent / "recorded"
LORA = cj.preset("lora", rank=2)


@pytest.fixture(scope="module")
def backbone():
    return backbone_of(cj.Bert(ONE_LAYER, head="sequence_classification"))


@pytest.fixture(scope="module")
def adapters(backbone):
    """Returns a model and two sets of parameters for it."""
    model = cj.Adapted(backbone.module, LORA)
    own = flatten_dict(backbone.params, sep="/")
    shapes = adapted_shapes(model)
    return model, [
        unflatten_dict({**flatten_dict(random_tree(shapes, seed), sep="/"), **own}, sep="/")
        for seed in (1, 2)
    ]


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def refused(read, *args):
    """Returns the message of the error, which must be one short line."""
    with pytest.raises((ValueError, OSError)) as caught:
        read(*args)
    message = str(caught.value)
    assert len(message) <= messages.LONGEST
    assert "\n" not in message
    return message


# --- adapters of before, and saving -------------------------------------------------------------


def test_an_adapter_that_an_earlier_release_saved_is_read(tmp_path):
    """Its weights have no hash in their name, and its configuration does not name them."""
    folder = RECORDED / "adapter"
    assert "weights" not in cj.read_adapter_config(folder)
    backbone = cj.load_backbone(RECORDED / "backbone", head="sequence_classification", num_labels=2)
    model, params = cj.load_adapter(folder, backbone)
    stored = safetensors.numpy.load_file(folder / "adapter.safetensors")
    found = flatten_dict(params, sep="/")
    assert stored.keys() <= found.keys()
    for path, leaf in stored.items():
        np.testing.assert_array_equal(found[path], leaf)
    # Saved again in its own folder, the adapter replaces the earlier files.
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    cj.save_adapter(tmp_path, model, params)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        weights_of(tmp_path).name,
        "adapter_config.json",
    ]
    assert weights_of(tmp_path).name != "adapter.safetensors"


def test_threads_save_to_one_folder(tmp_path, adapters, backbone):
    model, both = adapters
    failed = []

    def save(params):
        try:
            for _ in range(4):
                cj.save_adapter(tmp_path, model, params)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=save, args=(both[i % 2],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(list(tmp_path.iterdir())) == 2
    cj.load_adapter(tmp_path, backbone)


def test_a_reader_beside_a_writer_gets_one_adapter_or_the_other(tmp_path, adapters):
    model, both = adapters
    for i, params in enumerate(both):
        cj.save_adapter(tmp_path / str(i), model, params)
    wanted = [adapter_files.read_saved(tmp_path / str(i)).tensors for i in range(2)]
    cj.save_adapter(tmp_path / "own", model, both[0])
    finished = threading.Event()

    def write():
        for i in range(60):
            cj.save_adapter(tmp_path / "own", model, both[(i + 1) % 2])
        finished.set()

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    while not finished.is_set() or reads < 10:
        tensors = adapter_files.read_saved(tmp_path / "own").tensors
        same = [
            all(np.array_equal(leaf, each[path]) for path, leaf in tensors.items())
            for each in wanted
        ]
        assert sum(same) == 1
        reads += 1
    writer.join()


def test_only_weights_that_the_configuration_named_are_removed(tmp_path, adapters):
    model, both = adapters
    folder = tmp_path / "adapter"
    cj.save_adapter(folder, model, both[0])
    others = {folder / "adapter-0123456789abcdef.safetensors", folder / "notes.txt"}
    others.add(tmp_path / "adapter.safetensors")
    for path in others:
        path.write_bytes(b"mine")
    before = weights_of_config(folder)
    cj.save_adapter(folder, model, both[1])
    assert not before.exists()
    # A configuration that names another file is refused, and that file is not removed.
    for name in ("../adapter.safetensors", "notes.txt", "adapter-0123456789ABCDEF.safetensors", 5):
        edit(folder / "adapter_config.json", weights=name)
        assert "weights=" in refused(cj.read_adapter_config, folder)
        cj.save_adapter(folder, model, both[0])
    assert all(path.read_bytes() == b"mine" for path in others)


def test_what_could_not_be_read_again_is_not_saved(tmp_path, adapters):
    model, (params, _) = adapters
    deep = []
    for _ in range(files.DEEPEST_JSON + 1):
        deep = [deep]
    for value, message in (
        (float("nan"), "NaN"),
        ("\ud800", "surrogate"),
        (deep, "more than 64 deep"),
    ):
        metadata = {"note": value}
        with pytest.raises(ValueError, match=f"metadata .*{message}"):
            cj.save_adapter(tmp_path / "new", model, params, metadata=metadata)
    assert not (tmp_path / "new").exists()


def test_the_weights_of_another_library_are_not_removed(tmp_path, adapters):
    model, (params, _) = adapters
    (tmp_path / "adapter_config.json").write_text(
        '{"config": {}, "model_type": "bert", "name": "a"}'
    )
    (tmp_path / "adapter.safetensors").write_bytes(b"mine")
    cj.save_adapter(tmp_path, model, params)
    assert (tmp_path / "adapter.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize("renames", [1, 2, 3], ids=["log", "weights", "configuration"])
@pytest.mark.parametrize("is_done", [False, True], ids=["before", "after"])
def test_weights_that_killed_saves_left_are_removed_by_the_next(
    tmp_path, monkeypatch, adapters, backbone, renames, is_done
):
    model, both = adapters
    cj.save_adapter(tmp_path, model, both[0])
    # Files of others: one is in no log, and the name of the other is not allowed in a log.
    mine = {tmp_path / "adapter-0123456789abcdef.safetensors", tmp_path / "adapter.safetensors"}
    for path in mine:
        path.write_bytes(b"mine")
    for number in range(4):
        bias = both[1]["classifier"]["bias"] + number
        killed = {**both[1], "classifier": {**both[1]["classifier"], "bias": bias}}
        save_and_die(monkeypatch, renames, is_done, tmp_path, model, killed)
        cj.load_adapter(tmp_path, backbone)
        # In addition to the files in use, at most one complete or partial file of weights remains.
        assert len(list(tmp_path.glob("*.safetensors*"))) <= len(mine) + 2
    cj.save_adapter(tmp_path, model, both[1])
    cj.load_adapter(tmp_path, backbone)
    assert set(tmp_path.glob("*.safetensors*")) == {*mine, weights_of_config(tmp_path)}
    assert not (tmp_path / leftovers.LOG_NAME).exists()
    assert all(path.read_bytes() == b"mine" for path in mine)


def save_and_die(monkeypatch, renames, is_done, *arguments):
    """Saves like a process that is killed at a rename: all later operations are skipped."""
    replace, unlink, count = Path.replace, Path.unlink, [0]

    def replace_or_die(path, target):
        count[0] += 1
        if count[0] < renames or is_done:
            replace(path, target)
        if count[0] >= renames:
            raise KeyboardInterrupt

    def unlink_or_die(path, missing_ok=False):
        if count[0] >= renames:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace_or_die)
        patch.setattr(Path, "unlink", unlink_or_die)
        with pytest.raises(KeyboardInterrupt):
            cj.save_adapter(*arguments)


def test_a_log_of_somebody_else_removes_nothing_of_his(tmp_path, adapters):
    model, both = adapters
    outside, own = tmp_path / "adapter-00000000000000aa.safetensors", tmp_path / "own"
    cj.save_adapter(own, model, both[0])
    kept = [own / "notes.txt", own / "adapter.safetensors", own / "adapter-A.safetensors", outside]
    for path in kept:
        path.write_bytes(b"mine")
    for log in (
        {"weights": [*(path.name for path in kept), "../" + outside.name, str(outside)]},
        {"weights": "notes.txt"},
        {"other": 5},
    ):
        (own / leftovers.LOG_NAME).write_text(json.dumps(log))
        cj.save_adapter(own, model, both[1])
        assert all(path.read_bytes() == b"mine" for path in kept)
        assert not (own / leftovers.LOG_NAME).exists()


def test_without_a_lock_nothing_is_logged_or_tidied(tmp_path, monkeypatch, adapters):
    """Weights in the log could belong to another process that is saving at this moment."""
    model, both = adapters
    cj.save_adapter(tmp_path, model, both[0])
    other = tmp_path / "adapter-00000000000000aa.safetensors"
    other.write_bytes(b"another process wrote them")
    log = tmp_path / leftovers.LOG_NAME
    log.write_text(json.dumps({"weights": [other.name]}))
    with monkeypatch.context() as patch:
        patch.setattr(files, "fcntl", None)
        cj.save_adapter(tmp_path, model, both[1])
    assert other.exists()
    assert log.exists()
    cj.save_adapter(tmp_path, model, both[1])
    assert not other.exists()
    assert not log.exists()


def weights_of_config(folder):
    return folder / cj.read_adapter_config(folder)["weights"]


def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    inside, most = [], []

    def hold():
        with files.hold_folder(tmp_path):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=hold) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 5


# --- types and values of weights ----------------------------------------------------------------


def resaved(folder, change):
    """Changes the tensors of an adapter, and updates their hash."""
    path = weights_of(folder)
    tensors = {name: change(leaf) for name, leaf in safetensors.numpy.load_file(path).items()}
    data = safetensors.numpy.save(tensors)
    path.write_bytes(data)
    edit(folder / "adapter_config.json", weights_sha256=checkpoint.hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64])
def test_other_floating_types_become_the_models(tmp_path, adapters, backbone, dtype):
    model, (params, _) = adapters
    cj.save_adapter(tmp_path, model, params)
    resaved(tmp_path, lambda leaf: leaf.astype(dtype))
    _, loaded = cj.load_adapter(tmp_path, backbone)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.float32)}
    scale, kernel = params["classifier"]["kernel"], loaded["classifier"]["kernel"]
    np.testing.assert_array_equal(kernel, np.asarray(scale).astype(dtype).astype(np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda leaf: (100 * leaf).astype(np.int32), "has dtype I32; weights must be floating"),
        (lambda leaf: leaf > 0, "has dtype BOOL"),
        (lambda leaf: np.full_like(leaf, np.nan), "numbers that are NaN or infinite"),
        (lambda leaf: np.full_like(leaf, -np.inf), "numbers that are NaN or infinite"),
        # A number that only float64 can represent.
        (
            lambda leaf: np.full(leaf.shape, 1e300),
            "too large for float32, which holds 3.40",
        ),
    ],
)
def test_what_is_no_weight_is_refused_by_name(tmp_path, adapters, backbone, change, message):
    model, (params, _) = adapters
    cj.save_adapter(tmp_path, model, params)
    resaved(tmp_path, change)
    with pytest.raises(ValueError, match=rf"(classifier|encoder)/.*{message}"):
        cj.load_adapter(tmp_path, backbone)


def test_weights_of_a_backbone_are_finite(tmp_path):
    for path in (RECORDED / "backbone").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    tensors["pooler.dense.bias"][1] = np.nan
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    assert "pooler.dense.bias" in refused(cj.load_backbone, tmp_path)


# --- limits, before anything is built -----------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 20_000}, "num_hidden_layers=20000 is too large"),
        ({"num_hidden_layers": 400}, "num_hidden_layers=400, but there are weights of 1 layers"),
        ({"hidden_size": 10**12}, "hidden_size=1000000000000 is too large"),
        ({"hidden_size": "8"}, "hidden_size='8' must be a whole number"),
        ({"num_attention_heads": True}, "num_attention_heads=True must be a whole number"),
        ({"layer_norm_eps": None}, "layer_norm_eps=None must be a number"),
        ({"hidden_act": ["gelu"]}, r"hidden_act=\['gelu'\] must be text"),
        ({"num_labels": 10**9}, "num_labels=1000000000 is too large"),
        ({"architectures": "BertModel"}, "architectures='BertModel' must be a list"),
        ({"id2label": ["a", "b"]}, "id2label=.* must be an object"),
        ({"model_type": {}}, "model_type={}; supported"),
    ],
)
def test_a_configuration_is_checked_before_its_module_is_made(tmp_path, changes, message):
    for path in (RECORDED / "backbone").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    edit(tmp_path / "config.json", **changes)
    start = time.process_time()
    with pytest.raises(ValueError, match=rf"config\.json.*{message}"):
        cj.load_backbone(tmp_path)
    assert time.process_time() - start < 5


def test_other_names_of_a_field_are_checked_too():
    """The T5 configuration of transformers also calls `d_model` hidden_size."""
    import transformers

    config = transformers.T5Config()
    config.hidden_size = "512"
    assert "d_model='512' must be a whole number" in refused(module_from_config, config)
    config = transformers.BertConfig(num_hidden_layers=10**6)
    assert "num_hidden_layers=1000000 is too large" in refused(module_from_config, config)


def test_a_new_head_is_no_larger_than_a_backbone_can_be():
    def load(num_labels):
        return cj.load_backbone(
            RECORDED / "backbone", head="token_classification", num_labels=num_labels
        )

    assert "is the number of labels meant?" in refused(load, 10**9)


def test_labels_are_those_of_the_head_that_is_there(tmp_path, adapters, backbone):
    model, (params, _) = adapters
    cj.save_adapter(tmp_path, model, params)
    for labels, message in (
        (10**9, "classifier/bias of the adapter has shape"),
        ("3", "must be a whole"),
        (0, "1"),
    ):
        edit(tmp_path / "adapter_config.json", num_labels=labels)
        assert message in refused(cj.stack_adapters, [tmp_path], backbone).replace("kernel", "bias")
    edit(tmp_path / "adapter_config.json", num_labels=2)
    message = refused(lambda: cj.stack_adapters([tmp_path], backbone, capacity=10**9))
    assert "GiB" in message


def test_sizes_of_methods_are_numbers_that_arrays_can_have(backbone):
    assert "too large" in refused(lambda: cj.preset("lora", rank=2**63))
    assert "too large" in refused(lambda: cj.preset("prompt-tuning-random", prompt_length=10**400))
    model = cj.Adapted(backbone.module, cj.preset("lora", rank=2**31 - 1))
    message = refused(cj.init_adapters, model, backbone, jax.random.key(0))
    assert "the adapters would take" in message


def test_memory_is_checked_without_taking_any():
    small = {"a": jax.ShapeDtypeStruct((10, 10), jnp.float32)}
    limits.check_memory("they", small, "use less")
    large = small | {"b/c": jax.ShapeDtypeStruct((2**40, 2**10), jnp.bfloat16)}
    with pytest.raises(ValueError, match=r"would take .*largest array is b/c .*; use less"):
        limits.check_memory("they", large, "use less")


def test_members_are_no_more_than_tensors():
    members = cj.Stack(*[LORA] * 50)
    with pytest.raises(ValueError, match="has 50 members, but 3 tensors are stored"):
        adapter_files.check_count(members, dict.fromkeys("abc"))


# --- patterns -----------------------------------------------------------------------------------

PATH = "encoder/layer/0/attention/self/query" * 2


@pytest.mark.parametrize("pattern", [r"((\w|\w\w|/)*)*[!?]", r"(.|..|...)*\d\d\d"])
def test_a_slow_pattern_is_given_up(monkeypatch, pattern):
    monkeypatch.setattr(patterns, "MOST_SECONDS", 0.05)
    message = refused(patterns.Pattern(pattern).fullmatch, PATH)
    assert "takes too long to match" in message


@pytest.mark.parametrize("pattern", [r"((\w|\.|/)+)+!", "(a|a)*b", ".*.*.*.*.*.*.*.*!"])
def test_patterns_that_are_slow_with_re_are_not(pattern):
    start = time.process_time()
    assert patterns.compiled(pattern).fullmatch(PATH) is None
    assert time.process_time() - start < 2


@pytest.mark.parametrize("pattern", ["(", "[", "(?R)", r"\p{L}", "(" * 5000, "a" * 10**5, "*"])
def test_what_only_looks_like_a_pattern_is_refused(pattern):
    assert "regular expression" in refused(patterns.compiled, pattern)


@pytest.mark.parametrize("pattern", [r"((\w|\w\w|/)*)*[!?]", r"(.|..|...)*\d\d\d", "(", 5])
def test_rules_have_the_limits_of_other_patterns(monkeypatch, pattern):
    monkeypatch.setattr(patterns, "MOST_SECONDS", 0.05)
    patterns.compiled.cache_clear()
    params = {"classifier": {"kernel": 0.0}, PATH: {"kernel": 0.0}}
    message = refused(cj.label_params, params, cj.preset("full"), [(pattern, "train")])
    assert message.startswith("rules: ")
    assert re.search("takes too long to match|is not a (valid )?regular expression", message)


def test_a_pattern_matches_as_res_do():
    match = patterns.compiled(r"(.*/)?layer/(?P<layer>\d+)(/\w+)*").fullmatch("e/layer/12/x")
    assert match["layer"] == "12"
    assert patterns.compiled("a").fullmatch("ab") is None


def test_a_pattern_is_matched_once_with_a_path(monkeypatch):
    """Up to a limit on the number of paths, and whether it matches or not."""
    monkeypatch.setattr(patterns, "_MOST_FOUND", 2)
    pattern, asked = patterns.Pattern(r"layer/(?P<layer>\d+)"), []
    whole = pattern._compiled.fullmatch
    pattern._compiled = types.SimpleNamespace(
        fullmatch=lambda text, timeout: asked.append(text) or whole(text, timeout=timeout)
    )
    for _ in range(2):
        found = [pattern.fullmatch(text) for text in ("layer/3", "other", "layer/4")]
        assert [match and match["layer"] for match in found] == ["3", None, "4"]
    assert asked == ["layer/3", "other", "layer/4", "layer/4"]


# --- JSON and messages --------------------------------------------------------------------------


def test_brackets_within_brackets_have_a_limit():
    deep = files.DEEPEST_JSON
    assert files.parse_json("[" * deep + "]" * deep, "x")
    assert "more than 64 deep" in refused(
        files.parse_json, '{"a":' * (deep + 1) + "1" + "}" * (deep + 1), "x"
    )


def tokenizer_of(place):
    return load_tokenizer(place, vocab_size=9, max_position_embeddings=None, max_length=8)


@pytest.mark.parametrize("name", ["a" * 10**5, "a/" * 2000 + "a", "a" * 300 + "/b", "a\0b"])
def test_names_that_no_file_has_are_not_repeated(tmp_path, name):
    for read in (files.read_json, weights.read_tensors):
        refused(read, tmp_path / name)
    for read in (cj.load_backbone, read_config, tokenizer_of, module_from_name):
        for place in (str(tmp_path / name), name, f"~nobody-of-this-name/{name}"):
            refused(read, place)
    (tmp_path / "c.toml").write_text(f"base = {json.dumps(name)}", "utf-8")
    refused(expand_config, ["--config", str(tmp_path / "c.toml")], FitOptions)


def test_a_name_with_a_null_character_is_told_with_its_file(tmp_path):
    config = tmp_path / "c.toml"
    config.write_text(r'base = "\u0000"', "utf-8")
    message = refused(expand_config, ["--config", str(config)], FitOptions)
    assert message.startswith(f"{config}: base='\\x00': ")
    assert message.endswith("is not a valid file name: embedded null byte")
    index = {"weight_map": {"a": "b\0c"}}
    (tmp_path / "config.json").write_bytes((RECORDED / "backbone/config.json").read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "index.json" in refused(cj.load_backbone, tmp_path)


def test_an_error_says_what_it_is_about():
    def fail(text):
        with messages.about("a/b.json"):
            raise ValueError(text)

    assert refused(fail, "rank=0") == "a/b.json: rank=0"
    assert refused(fail, "rank=0 in a/b.json") == "rank=0 in a/b.json"
    assert refused(fail, "x" * 10**5).startswith("a/b.json: xxx")


def test_fields_of_a_site_are_checked(tmp_path, adapters, backbone):
    model, (params, _) = adapters
    cj.save_adapter(tmp_path, model, params)
    for site, message in (
        ({"host": 5}, "host=5 must be text"),
        ({"host": "x", "role": "nonsense"}, "role='nonsense' must be one of"),
        ({"host": "x", "length_axis": "1"}, "length_axis='1' must be a whole number"),
        ({"host": "x" * 10**5, "hots": 1}, "hots"),
    ):
        edit(tmp_path / "adapter_config.json", sites={"query": site, "value": site})
        assert message in refused(cj.load_adapter, tmp_path, backbone)


def test_a_tree_of_long_names_gives_a_short_message():
    shapes = {"x" * 10**4 + str(i): types.SimpleNamespace(shape=(i,)) for i in range(100)}
    message = refused(adapter_files.check_leaves, Path("d"), shapes, {})
    assert "98 more" in message
