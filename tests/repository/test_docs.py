"""Tests the documentation: examples run, every public name is documented, and links are valid."""

import doctest
import importlib
import pkgutil
import re
import runpy
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import compacter_jax as cj
from compacter_jax import catalogue
from tests.pages import ROOT, cells, code_blocks, rows_of_tables
from train.__main__ import _parsed
from train.estimate import params as estimate_params
from train.estimate.options import ParamsOptions

PAGES = sorted((ROOT / "docs").rglob("*.md"))
MODULES = ["compacter_jax"] + [
    module.name for module in pkgutil.walk_packages(cj.__path__, "compacter_jax.")
]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings(name):
    assert doctest.testmod(importlib.import_module(name), optionflags=FLAGS).failed == 0


WITH_EXAMPLES = [page for page in PAGES if ">>> " in page.read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.stem)
def test_examples_of_pages(page):
    failed, tried = doctest.testfile(str(page), module_relative=False, optionflags=FLAGS)
    assert tried > 0
    assert failed == 0


def test_every_public_name_has_its_place():
    text = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/api").glob("*.md"))
    documented = set(
        re.findall(r"auto(?:function|class):: compacter_jax\.(\w+)$", text, re.MULTILINE)
    )
    assert documented == set(cj.__all__), "docs/api has one entry for each name in __all__"


COMMAND_PAGES = [page for page in [*PAGES, ROOT / "README.md"] if code_blocks(page)]


@pytest.mark.parametrize("page", COMMAND_PAGES, ids=lambda page: page.stem)
def test_commands_parse(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    # The page on extending adds this preset; test_extending.py does so, and runs the command.
    monkeypatch.setitem(catalogue.PRESETS, "scale-shift", catalogue.PRESETS["ia3"])
    for block in code_blocks(page):
        for line in block.replace("\\\n", " ").splitlines():
            if found := re.match(r"(?:\$ )?python -m train (.*)", line):
                name, *arguments = shlex.split(found[1], comments=True)
                _parsed(name, arguments)


def slug(heading):
    """Returns the anchor of a heading on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


LINKED = [*PAGES, *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG"))]
LINKED += sorted((ROOT / "notebooks").glob("*.py"))


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.name} links to {target}"


# Files that the page on extending creates, and placeholders.
NOT_THERE = r"compacter_jax[./]methods[./]scale_shift(\.py)?|notebooks/NAME\.py"


TEXTS = [page for page in LINKED if page.suffix == ".md"] + [ROOT / "benchmarks/NOTES.md"]


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.stem)
def test_files_and_modules_of_the_text_are_there(page):
    text = page.read_text(encoding="utf-8")
    files = re.findall(
        r"(?<![\w/.])(?:compacter_jax|train|tests|benchmarks|docs|notebooks)/[\w./]+\w", text
    )
    dotted = re.findall(r"(?<![\w/.])(?:compacter_jax|train|tests|benchmarks)(?:\.[a-z]\w*)+", text)
    names = [name for name in dotted if not re.search(r"\.(csv|parquet)$", name)]
    missing = {path for path in files if not any(ROOT.glob(f"{path}*"))}  # a `.*` may follow
    missing |= {name for name in names if not is_there(name)}
    assert not {name for name in missing if not re.fullmatch(NOT_THERE, name)}


def is_there(name):
    """Returns True if a dotted name is a module or an attribute in one."""
    try:
        return bool(pkgutil.resolve_name(name))
    except (ImportError, AttributeError):
        return False


def python(page, number, **replaced):
    """Returns a Python block of a page, with sizes of a real backbone replaced by small ones."""
    code = code_blocks(ROOT / "docs" / page, "python")[number]
    for written, here in replaced.items():
        assert written in code
        code = code.replace(written, here)
    return code


def test_training_on_the_first_page(tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = {"path/or/hub-id": str(tiny_backbone), "factor=16": "factor=2"}
    before, after = python("index.md", 0, **here).split("# ... and after training:\n")
    names = {}
    exec(before, names)
    input_ids = jnp.array([[2, 10, 11, 3], [2, 15, 16, 3]])
    batch = (input_ids, jnp.ones_like(input_ids), jnp.array([1, 0]))
    losses = []
    for _ in range(8):
        names["trained"], names["opt_state"], loss = names["step"](
            names["trained"], names["frozen"], names["opt_state"], *batch
        )
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    trained = names["trained"]
    exec(after, names)
    np.testing.assert_array_equal(names["params"]["phm_rule"], trained["phm_rule"])


def test_many_adapters_on_the_first_page(tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    backbone = cj.load_backbone(tiny_backbone, head="sequence_classification", num_labels=2)
    saved = {}
    for seed, folder in enumerate(("my-adapter", "another-adapter", "a-third-adapter")):
        model = cj.Adapted(backbone.module, cj.preset("compacter++", reduction_factor=2))
        saved[folder] = model, cj.init_adapters(model, backbone, jax.random.key(seed))
        cj.save_adapter(folder, *saved[folder])
    input_ids = jnp.array([[2, 10, 11, 3], [2, 15, 16, 3], [2, 12, 3, 0]])
    mask = input_ids != 0
    names = {"cj": cj, "jax": jax, "backbone": backbone}
    names |= {"input_ids": input_ids, "attention_mask": mask}
    exec(python("index.md", 1, **{"capacity=1000": "capacity=5"}), names)
    for row, folder in enumerate(("a-third-adapter", "my-adapter", "another-adapter")):
        model, params = saved[folder]
        alone = model.apply({"params": params}, input_ids[row : row + 1], mask[row : row + 1])
        np.testing.assert_allclose(names["logits"][row], alone[0], atol=1e-6)
    assert names["serve"]._cache_size() == 1


def test_generation_of_t5(tiny_t5):
    names = {"cj": cj, "jax": jax, "input_ids": jnp.array([[5, 9, 1], [7, 1, 0]])}
    names["attention_mask"] = names["input_ids"] != 0
    here = {"path/or/hub-id-of-a-T5": str(tiny_t5), "factor=16": "factor=2"}
    exec(python("t5.md", 0, **here), names)
    ids = names["ids"]
    assert ids.shape[0] == 2
    assert 2 <= ids.shape[1] <= 33
    np.testing.assert_array_equal(ids[:, 0], 0)


def test_adapters_of_other_libraries(tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    backbone = cj.load_backbone(tiny_backbone, head="sequence_classification", num_labels=2)
    model = cj.Adapted(backbone.module, cj.preset("lora", rank=2))
    params = cj.init_adapters(model, backbone, jax.random.key(0))
    cj.export_adapterhub("from-adapters", model, params)
    cj.export_peft("from-peft", model, params)
    names = {"cj": cj, "backbone": backbone}
    exec(python("methods.md", 0), names)
    left = "encoder/layer/1/attention/self/query/adapter/left"
    imported, own = (flatten_dict(tree, sep="/") for tree in (names["params"], params))
    np.testing.assert_array_equal(imported[left], own[left])
    for folder in ("adapters", "peft"):
        written, read = (tmp_path / f"{way}-{folder}" for way in ("for", "from"))
        assert sorted(f.name for f in written.iterdir()) == sorted(f.name for f in read.iterdir())


def value_of(formula, **sizes):
    """Returns the number that a formula of a page stands for, such as `24 (2db + b + d)`."""
    text = re.sub(r" \([^()]*[a-z]{3}[^()]*\)", "", formula)  # words
    text = text.replace(",", "").replace("·", "*").replace("³", "**3")
    return eval(re.sub(r"(?<=[\da-z)]) ?(?=[a-z(])", "*", text), {}, sizes)


def test_formulas_are_read_as_they_are_written():
    sizes = {"d": 5, "b": 3, "n": 2, "r": 7}
    assert value_of("24 (2db / n + b + d)", **sizes) == 24 * (2 * 5 * 3 / 2 + 3 + 5)
    assert value_of("2r(d + b) + 96 n³", **sizes) == 2 * 7 * (5 + 3) + 96 * 8
    assert value_of("22 · 12 d + 1,100 (norms, logits)", **sizes) == 22 * 12 * 5 + 1100


def counted_backbone(name, **options):
    """Returns the backbone as the command `params` counts it."""
    return estimate_params.counted_backbones(ParamsOptions(backbone_config=name, **options))[0]


def check_row(row, name, backbone, method):
    """Checks every cell of a method in the table of counts."""
    (counted,) = estimate_params.counts(method, [backbone])
    part = 100 * counted.trained / backbone.total
    assert row[4:] == [f"{counted.trained:,}", "100 %" if part == 100 else f"{part:.3f} %"]
    if name == "full":  # the backbone itself
        return
    sizes = {"d": 768, "b": 24, **{size: int(n) for size, n in re.findall(r"(\w) = (\d+)", row[0])}}
    for group, cell in zip(("adapters", "rule", "layer norms"), row[1:4], strict=True):
        formula, _, number = cell.partition(" = ")
        value = value_of(formula or "0", **sizes)
        assert value == counted.groups.get(group, (0, 0))[0], (row[0], group)
        assert not number or value == value_of(number), (row[0], group)


def test_the_table_of_presets():
    text = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"<!-- presets -->\n\n(.*?)\n\n<!-- end of presets -->", text, re.DOTALL)
    assert table.splitlines() == catalogue.table_of_presets()
    names = [cells(line)[0] for line in table.splitlines()[2:]]
    assert names == [f"`{name}`" for name in cj.presets()]


@pytest.mark.slow
def test_counts_are_those_of_params():
    # The vocabulary is that of the tokenizer.
    backbone = counted_backbone("t5-base", vocab_size=32_100)
    found = []
    for row in rows_of_tables(ROOT / "docs/methods.md"):
        if len(row) < 6 or row[0] == "preset" or row[0].startswith("---"):
            continue
        for name in re.findall(r"`([^`]+)`", row[0]):
            is_other = "n = 12" in row[0] and name != "phm"  # `phm` has n = 12 itself
            check_row(row, name, backbone, cj.preset(name, **({"phm_dim": 12} if is_other else {})))
            found.append((name, is_other))
    others = [("compacter", True), ("compacter++", True)]
    assert sorted(found) == sorted([*((name, False) for name in cj.presets()), *others])


def test_the_head_is_counted_as_documented():
    text = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    formula, of_t5 = re.search(r"of k labels (.+?), of T5, which has none, (\d+)\.", text).groups()
    backbones = [counted_backbone("bert-base-uncased", num_labels=3), counted_backbone("t5-small")]
    heads = [
        estimate_params.counts(cj.preset("lora"), [each])[0].groups.get("head")
        for each in backbones
    ]
    assert heads[0][0] == value_of(formula, d=768, k=3)
    assert (heads[1] or (0, 0))[0] == int(of_t5)


def test_sites_of_the_table():
    named = set()
    for row in rows_of_tables(ROOT / "docs/methods.md"):
        if len(row) == 3:
            named |= set(re.findall(r"`([^`]+)`", row[0])) - {"sites"}
    assert named == {*cj.Bert.sites, *cj.ModernBert.sites, *cj.T5.sites}


def test_picture_of_sites(tmp_path, monkeypatch):
    """The picture can be drawn, and names only existing sites."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("sys.argv", ["sites.py", str(tmp_path / "sites.png")])
    runpy.run_path(str(ROOT / "docs/pictures/sites.py"), run_name="__main__")
    assert (tmp_path / "sites.png").stat().st_size > 10_000
