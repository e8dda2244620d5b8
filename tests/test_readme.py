"""The Python examples of the README run as they stand, on small backbones."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

import compacter_jax as cj

README = Path(__file__).parents[1] / "README.md"


def example(number):
    examples = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 4
    return examples[number]


def small_example(number, path, backbone):
    """Code of the README, with `path` and the sizes replaced by those of a small backbone."""
    code = example(number)
    for written, here in ((path, str(backbone)), ("factor=16", "factor=2")):
        assert written in code
        code = code.replace(written, here)
    return code


def test_generation(tiny_t5):
    names = {"cj": cj, "jax": jax, "input_ids": jnp.array([[5, 9, 1], [7, 1, 0]])}
    names["attention_mask"] = names["input_ids"] != 0
    exec(small_example(1, "path/or/hub-id-of-a-T5", tiny_t5), names)
    ids = names["ids"]
    assert ids.shape[0] == 2
    assert 2 <= ids.shape[1] <= 33
    np.testing.assert_array_equal(ids[:, 0], 0)


def test_training(tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = small_example(0, "path/or/hub-id", tiny_backbone)
    before, after = code.split("# ... and after training:\n")
    names = {}
    exec(before, names)
    input_ids = jnp.array([[2, 10, 11, 3], [2, 15, 16, 3]])
    batch = (input_ids, jnp.ones_like(input_ids), jnp.array([1, 0]))
    losses = []
    for _ in range(8):
        names["trained"], names["opt_state"], loss = names["step"](
            names["trained"], names["opt_state"], *batch
        )
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    trained = names["trained"]
    exec(after, names)
    rule = names["params"]["phm_rule"]
    np.testing.assert_array_equal(rule, trained["phm_rule"])
    assert sorted(path.name for path in (tmp_path / "my-adapter").iterdir()) == [
        "adapter.safetensors",
        "adapter_config.json",
    ]


def test_many_adapters_on_one_backbone(tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    backbone = cj.load_backbone(tiny_backbone, head="sequence_classification", num_labels=2)
    saved = {}
    for seed, folder in enumerate(("my-adapter", "another-adapter", "a-third-adapter")):
        model = cj.Adapted(backbone.module, cj.preset("compacter++", reduction_factor=2))
        saved[folder] = model, cj.init_adapters(model, backbone, jax.random.key(seed))
        cj.save_adapter(folder, *saved[folder])
    input_ids = jnp.array([[2, 10, 11, 3], [2, 15, 16, 3], [2, 12, 3, 0]])
    mask = input_ids != 0
    names = {"cj": cj, "jax": jax, "jnp": jnp, "backbone": backbone}
    names |= {"input_ids": input_ids, "attention_mask": mask}
    exec(example(2).replace("capacity=1000", "capacity=5"), names)
    for row, folder in enumerate(("a-third-adapter", "my-adapter", "another-adapter")):
        model, params = saved[folder]
        alone = model.apply({"params": params}, input_ids[row : row + 1], mask[row : row + 1])
        np.testing.assert_allclose(names["logits"][row], alone[0], atol=1e-6)
    assert names["serve"]._cache_size() == 1


def test_adapters_of_other_libraries(tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    backbone = cj.load_backbone(tiny_backbone, head="sequence_classification", num_labels=2)
    model = cj.Adapted(backbone.module, cj.preset("lora", rank=2))
    params = cj.init_adapters(model, backbone, jax.random.key(0))
    cj.export_adapterhub("from-adapters", model, params)
    cj.export_peft("from-peft", model, params)
    names = {"cj": cj, "backbone": backbone}
    exec(example(3), names)
    left = "encoder/layer/1/attention/self/query/adapter/left"
    imported, own = (flatten_dict(tree, sep="/") for tree in (names["params"], params))
    np.testing.assert_array_equal(imported[left], own[left])
    for folder in ("adapters", "peft"):
        written, read = (tmp_path / f"{way}-{folder}" for way in ("for", "from"))
        assert sorted(f.name for f in written.iterdir()) == sorted(f.name for f in read.iterdir())
