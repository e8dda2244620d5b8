"""Runs the worked examples of docs/extending.md exactly as the page has them."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import weights_of
from tests.pages import ROOT, code_blocks
from train.__main__ import main

PATH = ROOT / "docs/extending.md"
PAGE = PATH.read_text(encoding="utf-8")

# Run in a copy of the repository with the edits of the page. Its arguments are the folder of a
# backbone, the folder of PAWS, and the tests that the page runs; the tests come first: fields,
# start, gradients, a step, merging, files and counts.
USES = """
import contextlib, io, json, sys
from pathlib import Path

import pytest

assert pytest.main([*sys.argv[3:], "-p", "no:cacheprovider"]) == 0

import flax.linen as nn, jax, jax.numpy as jnp, numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj
from tests.helpers import random_tree
from train import tasks
from train.__main__ import main
from train.objectives import learning_rates

backbone = cj.load_backbone(sys.argv[1], head="sequence_classification", num_labels=2)
model = cj.Adapted(backbone.module, cj.ScaleShiftConfig())
assert model.method == cj.preset("scale-shift")
params = flatten_dict(cj.init_adapters(model, backbone, jax.random.key(0)), sep="/")
drawn = random_tree({path: leaf for path, leaf in params.items() if "/adapter/" in path})
params = unflatten_dict(params | flatten_dict(drawn, sep="/"), sep="/")
ids = jnp.array([[2, 10, 11, 3], [2, 15, 16, 3]])


def logits(model, params, **options):
    return np.asarray(model.apply({"params": params}, ids, **options))


adapted, plain = logits(model, params), logits(backbone.module, backbone.params)
assert np.abs(adapted - plain).max() > 1e-3
merged = logits(backbone.module, cj.merge_adapter(model, params))
np.testing.assert_allclose(merged, adapted, atol=1e-5)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.DenseGeneral((2, 3), name="heads")(x).sum(-2), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        return scan(name="layers")(x, None)[0]


x = jnp.array([[1.0, -2.0, 3.0]])
method = cj.ScaleShiftConfig(sites=("query",))
heads = cj.Adapted(Scanned(), method, sites={"query": r"layers/heads(?P<layer>\\d+)?"})
drawn = random_tree(jax.eval_shape(heads.init, jax.random.key(0), x)["params"])
merged = Scanned().apply({"params": cj.merge_adapter(heads, drawn, x)}, x)
np.testing.assert_allclose(merged, heads.apply({"params": drawn}, x), rtol=1e-5)
many, bank = cj.stack_adapters([(model, params)] * 2, backbone)
routed = logits(many, bank, adapter_ids=jnp.array([1, -1]))
np.testing.assert_allclose(routed, [adapted[0], plain[1]], atol=1e-5)

for rates in (learning_rates.CLASSIFIER, learning_rates.TEXT_TO_TEXT):
    assert rates["scale-shift"] == 3e-3
task = tasks.load_task("paws", data_dir=Path(sys.argv[2]))
printed = io.StringIO()
with contextlib.redirect_stdout(printed):
    main(["params", "--backbone-config", "t5-small", "--method", "scale-shift", "--json"])
print(json.dumps({
    "trained": json.loads(printed.getvalue())["trained"],
    "labels": task.label_names,
    "rows": {name: len(rows) for name, rows in task.splits.items()},
    "first": task.benchmark.for_encoder(task.splits["train"])["sentence2"][0],
}))
"""


def blocks(kind):
    return code_blocks(PATH, kind)


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("git") is None, reason="the page gives its edits to git apply, and git is missing"
)
def test_edits_of_the_page_add_a_method_and_a_task(tiny_backbone, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    from datasets import ClassLabel, Dataset, Features, Value

    copy = tmp_path / "copy"
    for folder in ("compacter_jax", "train", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "sentiment", "recorded")
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", copy)
    (path,) = re.findall(r"^The file `(\S+)` has two classes", PAGE, re.MULTILINE)
    (copy / path).write_text(blocks("python")[0], encoding="utf-8")
    for edit in blocks("diff"):
        # Other changes next to the context of a hunk must not prevent its application.
        command = ["git", "apply", "--recount", "--unidiff-zero", "-"]
        subprocess.run(command, cwd=copy, input=edit, text=True, check=True)
    text = Value("string")
    features = {"id": Value("int32"), "sentence1": text, "sentence2": text}
    features["label"] = ClassLabel(names=["0", "1"])
    folder = tmp_path / "paws/labeled_final"
    folder.mkdir(parents=True)
    for split, size in {"train": 4, "validation": 3, "test": 2}.items():
        rows = [
            {"id": i, "sentence1": f"film {i}", "sentence2": f"plot {i}", "label": i % 2}
            for i in range(size)
        ]
        made = Dataset.from_list(rows, features=Features(features))
        table = made.with_format("arrow")[:]
        table = table.replace_schema_metadata(made.features.arrow_schema.metadata)
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    (tests,) = re.findall(r"^\$ python -m pytest (.*)$", PAGE, re.MULTILINE)
    folders = [str(tiny_backbone), str(tmp_path / "paws")]
    uses = [sys.executable, "-c", USES, *folders, *shlex.split(tests)]
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    del environment["XLA_FLAGS"]  # the tests' own configuration sets it
    done = subprocess.run(
        uses, cwd=copy, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    (printed,) = re.findall(r"prints ([\d,]+) trained numbers", PAGE)
    assert f"{said['trained']:,}" == printed
    assert said["labels"] == ["0", "1"]
    assert said["rows"] == {"train": 4, "validation": 3, "test": 2}
    assert said["first"] == "plot 0"


@pytest.mark.contract
def test_a_module_of_somebody_else(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, theirs, ours, named, others = blocks("python")
    names = {"__name__": "example"}
    exec(theirs, names)
    exec(ours, names)
    groups = {"rule": (64, 64), "adapters": (4 * (72 + 72 + 8 + 64), 4 * (72 + 72 + 8 + 64))}
    assert f"'adapters': {groups['adapters']}" in capsys.readouterr().out
    jax, cj, model = names["jax"], names["cj"], names["model"]
    trained, frozen = cj.partition(names["params"], cj.label_params(names["params"], model.method))
    ids = names["module"].dummy_inputs()

    def loss(trained):
        return (model.apply({"params": cj.merge(trained, frozen)}, *ids) ** 2).sum()

    slopes = jax.grad(loss)(trained)["block_3"]["down"]["adapter"]["up"]["bias"]
    assert np.abs(slopes).max() > 0
    rules = re.findall(r'rules=\[\((r"[^"]*"),\s+"train"\)\]', PAGE)
    labels = cj.label_params(names["params"], model.method, rules=[(eval(rules[0]), "train")])
    assert labels["block_0"]["norm"] == {"scale": "train", "bias": "train"}
    exec(named, names)
    labels = names["labels"]
    assert labels["block_3"]["norm"] == {"scale": "train", "bias": "train"}
    assert labels["classifier"]["kernel"] == "train"
    assert labels["block_3"]["down"]["kernel"] == "freeze"
    exec(others, names)
    assert capsys.readouterr().out.endswith("(4, 8)\n(2, 8, 5)\n")
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(names["slopes"]))


@pytest.mark.slow
def test_files_of_ones_own(tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (rows,) = [block for block in blocks("") if block.startswith("sentence,")]
    for name in ("train", "validation"):
        Path(f"{name}.csv").write_text(rows, encoding="utf-8")
    (command,) = [block for block in blocks("") if "--train-file" in block]
    arguments = command.replace("DIR", str(tiny_backbone)).split()[3:]
    assert main([*arguments, "--reduction-factor", "2", "--epochs", "1", "--max-length", "64"]) == 0
    assert weights_of(Path("runs/own/adapter")).is_file()
