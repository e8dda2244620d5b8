import re
from pathlib import Path

import pytest

from compacter_jax.catalogue import preset
from train.__main__ import main
from train.cli.config_files import expand_config
from train.compare.options import CompareOptions
from train.estimate import plan
from train.estimate.options import PlanOptions
from train.objectives.learning_rates import TEXT_TO_TEXT

FOLDER = Path(plan.__file__).parents[1] / "configs"
BASES = sorted(FOLDER.glob("*_base.toml"))
RUNS = sorted(set(FOLDER.glob("*glue_*.toml")) - set(BASES))
TASKS = {
    "glue": ["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte"],
    "superglue": ["boolq", "cb", "copa", "multirc", "record", "wic"],
}


@pytest.fixture(scope="module")
def narrow_t5(tmp_path_factory):
    """Writes a T5-base with two layers per stack and a small vocabulary; every method fits it."""
    path = tmp_path_factory.mktemp("narrow") / "config.json"
    path.write_text(
        '{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 768, '
        '"d_ff": 3072, "num_layers": 2, "num_heads": 12, "vocab_size": 128, '
        '"decoder_start_token_id": 0}'
    )
    return str(path)


def parsed(path, *flags, options_class=PlanOptions):
    import tyro

    arguments = ["--config", str(path), *flags]
    return tyro.cli(options_class, args=expand_config(arguments, options_class))


def test_there_is_a_run_for_every_method_of_the_paper_and_task_group():
    methods = {parsed(path).method for path in RUNS}
    assert len(methods) == 12
    assert len(RUNS) == 2 * len(methods)
    for path in RUNS:
        group, _, name = path.stem.partition("_")
        method = parsed(path).method
        assert name == method.replace("++", "_pp").replace("-", "_")
        assert parsed(path).task.split(",") == TASKS[group]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_run_has_a_plan(path, narrow_t5):
    whole = parsed(path)
    assert whole.backbone == "t5-base"
    preset(whole.method)
    assert whole.learning_rate == TEXT_TO_TEXT[whole.method]
    names = whole.task.split(",")
    # The step is then the same for all tasks of both groups, and is traced once per method.
    changes = ["--backbone", narrow_t5, "--max-length", "128", "--max-target-length", "8"]
    if whole.method == "adapterdrop":
        changes += ["--leave-out", "0"]  # it has fewer than five layers to leave out
    plans = [plan.plan_of(parsed(path, "--task", name, *changes)) for name in names]
    assert [one.task for one in plans] == names
    assert all(one.steps == one.epochs * -(-one.train_examples // 100) for one in plans)
    assert all(one.cost.trained > 0 for one in plans)


@pytest.mark.parametrize("group", TASKS)
def test_small_data_sets_take_more_epochs_and_all_take_500_steps_of_warm_up(group):
    path = FOLDER / f"{group}_compacter.toml"
    small = {"mrpc", "cola", "stsb", "rte", "boolq", "cb", "copa", "wic"}  # section 5 of the paper
    for task in TASKS[group]:
        options = parsed(path, "--task", task)
        assert options.epochs == (20 if task in small else 3)
        examples = plan.train_examples(options, text_to_text=True)
        steps = options.epochs * -(-examples // options.batch_size)
        if task in ("cb", "copa"):
            assert steps < 100
        else:
            assert round(options.warmup_fraction * steps) == pytest.approx(500, rel=0.005)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_the_heading_says_how_to_run_it_and_what_the_paper_has(path):
    heading = path.read_text(encoding="utf-8").partition("\n\n")[0]
    commands = re.findall(r"#   python -m train (\w+) --config (\S+)", heading)
    name = f"train/configs/{path.name}"
    assert commands == [("plan", name), ("compare", name), ("fit", name)]
    assert "arXiv:2106.04647" in heading
    assert re.search(r"# Paper: (average \d\d\.\d\d|table 2)", heading)


def test_compare_takes_a_run_and_its_tasks_one_by_one(monkeypatch, tmp_path):
    import train.compare.runs

    seen = []
    monkeypatch.setattr(train.compare.runs, "compare", seen.extend)
    path = FOLDER / "superglue_compacter_pp.toml"
    flags = ["--config", str(path), "--output-dir", str(tmp_path), "--task", "boolq,record"]
    assert main(["compare", *flags, "--max-length", "64"]) == 0
    assert [(one.task, one.epochs, one.methods) for one in seen] == [
        ("boolq", 20, "compacter++"),
        ("record", 3, "compacter++"),
    ]
    assert {one.max_length for one in seen} == {64}  # the command line wins


def test_a_base_is_merged_key_by_key(tmp_path):
    base, path = tmp_path / "base.toml", tmp_path / "run.toml"
    base.write_text(
        'backbone = "t5-base"\nepochs = 3\nseed = 1\n'
        "[tasks.rte]\nepochs = 20\nbatch_size = 8\n[tasks.cb]\nepochs = 9\n"
    )
    path.write_text('base = "base.toml"\nepochs = 5\n[tasks.rte]\nepochs = 30\n')
    options = parsed(path, "--task", "rte")
    assert (options.epochs, options.batch_size, options.seed) == (30, 8, 1)
    assert parsed(path, "--task", "rte", "--epochs", "2").epochs == 2
    assert parsed(path, "--task=cb").epochs == 9
    assert parsed(path, "--task", "mnli").epochs == 5
    assert parsed(path, "--task", "rte,cb").epochs == 5  # a mixture is no single task


def test_what_a_configuration_cannot_say(tmp_path, capsys):
    for name, text in {
        "a": 'base = "b.toml"',
        "b": 'base = "a.toml"',
        "key": "learning_rat = 1",
        "table": "[tasks.rte]\nepoch = 1\n",
        "tasks": 'tasks = "rte"',
        "fit_only": "max_steps = 5",
    }.items():
        (tmp_path / f"{name}.toml").write_text(text)
    for name, message in {
        "a": "is the base of",
        "key": "unknown key 'learning_rat'",
        "table": "unknown key 'epoch'",
        "tasks": "tasks must be tables such as [tasks.rte]",
        "missing": "missing.toml",
    }.items():
        path = tmp_path / f"{name}.toml"
        assert main(["plan", "--config", str(path), "--task", "rte", "--backbone", "x"]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown key 'max_steps'"):
        parsed(tmp_path / "fit_only.toml", options_class=CompareOptions)
