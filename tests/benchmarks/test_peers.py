"""Tests of the benchmark against other libraries: both sides do the same work; its report."""

import contextlib
import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import contest, jax_worker, peers, turns

torch_worker = pytest.importorskip("benchmarks.torch_worker", exc_type=ImportError)
pytest.importorskip("adapters")
pytest.importorskip("peft")

pytestmark = [
    # `adapters` calls the blocks of T5 in the way of transformers before 4.57.
    pytest.mark.filterwarnings("ignore:`past_key_value` is deprecated"),
    # PyTorch's own, while it imports what ModernBERT of transformers 4 compiles.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning"),
]

BERT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,
}
MODERNBERT = {
    **BERT,
    "pad_token_id": 0,
    "local_attention": 4,
    "classifier_pooling": "mean",
}
T5 = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 2}
ROBERTA = BERT | {"model_type": "roberta", "type_vocab_size": 1, "pad_token_id": 1}
SIZES = {
    "roberta": contest.Size("tiny-roberta", "roberta", ROBERTA, rows=3, length=6),
    "bert": contest.Size("tiny-bert", "bert", BERT, rows=3, length=6),
    "modernbert": contest.Size("tiny-modernbert", "modernbert", MODERNBERT, rows=3, length=6),
    "t5": contest.Size("tiny-t5", "t5", T5, rows=3, length=6, target_length=4),
}
NARROW = {"reduction_factor": 8}
CHANGES = dict.fromkeys(("houlsby", "compacter", "compacter++"), NARROW)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder with both backbones."""
    root = tmp_path_factory.mktemp("peers")
    for name, size in SIZES.items():
        jax_worker.write_backbone(dataclasses.asdict(size), str(root / name))
    return root


@pytest.fixture(scope="module")
def task_of(folder):
    """Returns a function of family, method and work that returns our task and the peer's."""

    def make(family, method, work, **fields):
        ours, theirs = (folder / f"{family}-{method}-{side}" for side in ("ours", "peer"))
        task = contest.Task(SIZES[family], method, work, str(folder / family), None, **fields)
        if method == "full":
            return task, task
        if not ours.exists():
            names = (str(folder / family), method, CHANGES.get(method, {}), str(ours), str(theirs))
            jax_worker.write_adapter(*names)
        return tuple(dataclasses.replace(task, adapter=str(side)) for side in (ours, theirs))

    return make


def outcome(worker, task, runs=3):
    """Returns the values of the first runs of one side."""
    work = worker.prepare(dataclasses.asdict(task))
    values = []
    for _ in range(runs):
        result = work.run()
        work.wait(result)
        values.append(work.value(result))
    return {"platform": work.platform, "trained": work.trained, "values": values}


@pytest.mark.parametrize(
    ("family", "method", "work"),
    [
        ("bert", "compacter", "step"),
        ("bert", "lora", "step"),
        ("roberta", "compacter++", "step"),
        ("bert", "houlsby", "forward"),
        ("modernbert", "lora", "step"),
        ("t5", "compacter++", "step"),
        ("t5", "full", "step"),
        ("t5", "lora", "generate"),
    ],
)
def test_both_sides_do_the_same(family, method, work, task_of):
    task, of_peer = task_of(family, method, work, shortest=0.5)
    runs = 1 if work == "generate" else 3
    ours, peer = outcome(jax_worker, task, runs), outcome(torch_worker, of_peer, runs)
    peers.check_same(task, ours, peer, "the peer")
    assert ours["trained"] == peer["trained"] > 0
    if work == "step":
        assert abs(ours["values"][2] - ours["values"][0]) > 1e-3  # the loss goes down
    if work == "generate":
        assert np.shape(ours["values"][0]) == (3, 1 + contest.GENERATED)


def test_a_peer_with_another_adapter_is_refused(task_of, tmp_path):
    task, of_peer = task_of("bert", "compacter++", "forward")
    ours = outcome(jax_worker, task, 1)
    peers.check_same(task, ours, outcome(torch_worker, of_peer, 1), "adapters")
    other = tmp_path / "other"
    names = (of_peer.folder, "compacter++", {**NARROW, "phm_dim": 2}, str(tmp_path / "a"))
    jax_worker.write_adapter(*names, str(other))
    wrong = outcome(torch_worker, dataclasses.replace(of_peer, adapter=str(other)), 1)
    with pytest.raises(ValueError, match=r"compacter_jax trains \d+ and adapters \d+; they must"):
        peers.check_same(task, ours, wrong, "adapters")
    with pytest.raises(ValueError, match=r"loss of the logits is \S+ in compacter_jax and \S+ in"):
        peers.check_same(task, ours, {**wrong, "trained": ours["trained"]}, "adapters")


def made_up(values, **changes):
    return {"platform": "cpu", "trained": 7, "values": values, **changes}


@pytest.mark.parametrize(
    ("work", "ours", "peer", "message"),
    [
        ("step", made_up([1.0, 0.9]), made_up([1.0, 0.9], platform="gpu"), "runs on cpu and"),
        ("step", made_up([1.0, 0.9]), made_up([1.0005, 0.9]), "loss after 0 updates is 1 in"),
        ("step", made_up([1.0, 0.9]), made_up([1.0, 0.902]), "loss after 1 updates is 0.9 in"),
        ("step", made_up([float("nan")]), made_up([float("nan")]), "loss after 0 updates is nan"),
        ("generate", made_up([[[0, 1, 2]]]), made_up([[[0, 1, 3]]]), "66.7% are equal; at least 9"),
        ("generate", made_up([[[0, 1, 2]]]), made_up([[[0, 1]]]), r"generates \(1, 3\) tokens and"),
    ],
)
def test_what_differs_is_refused(work, ours, peer, message):
    task = contest.Task(SIZES["t5"], "full", work, "", None)
    with pytest.raises(ValueError, match=message):
        peers.check_same(task, ours, peer, "the peer")


@pytest.mark.slow
def test_the_report_of_processes_that_take_turns(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(contest, "SIZES", {"tiny-t5": SIZES["t5"]})
    narrow = functools.partial(peers.Settings, method_changes=CHANGES)
    monkeypatch.setattr(peers, "Settings", narrow)
    file, figure = tmp_path / "peers.json", tmp_path / "peers.png"
    arguments = ["--case", "tiny-t5/compacter++/step", "--repeats", "2", "--rows", "2"]
    peers.main([*arguments, "--json", str(file), "--plot", str(figure)])
    (case,) = json.loads(file.read_text())["cases"]
    ours, adapters = case["sides"]["compacter_jax"], case["sides"]["adapters"]
    assert case["size"]["rows"] == 2
    assert ours["trained"] == adapters["trained"]
    np.testing.assert_allclose(ours["values"], adapters["values"], rtol=1e-4)
    ratios = np.divide(ours["seconds"], adapters["seconds"])
    assert len(ratios) == 2
    assert case["ratios"]["adapters"]["seconds"]["median"] == pytest.approx(np.median(ratios))
    assert case["ratios"]["adapters"]["memory"] == ours["peak"] / adapters["peak"]
    assert ours["peak"] >= ours["resident_before"] > 0
    assert "tiny-t5/compacter++/step, adapters" in capsys.readouterr().out
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_what_is_on_disk_is_not_written_again(monkeypatch, tmp_path):
    asked = []

    class Writer:
        def ask(self, action, **arguments):
            asked.append(action)
            if action == "write_adapter":
                Path(arguments["ours"]).mkdir()
            return {"platform": "cpu"}

    @contextlib.contextmanager
    def worker(name, settings):
        asked.append("start")
        yield Writer()

    monkeypatch.setattr(peers, "_worker", worker)
    inputs, settings = peers.Inputs(tmp_path), peers.Settings()
    for method in ("lora", "lora", "full", "houlsby"):
        backbone, adapters, platform = inputs.written(SIZES["t5"], method, settings)
        assert (backbone, platform) == (tmp_path / "tiny-t5", "cpu")
        assert (adapters == (None, None)) == (method == "full")
    once = ["start", "write_backbone", "write_adapter"]
    assert asked == [*once, "start", "write_adapter"]


def test_unknown_cases_are_refused():
    with pytest.raises(SystemExit, match=r"error: no case is called 't5'; .* sizes minilm, bert-b"):
        peers.main(["--case", "t5"])
    names = {"/".join((size.name, *rest)) for size, *rest in contest.choose(["t5-*/l*/*"])}
    expected = {f"{size}/lora/{work}" for size in ("t5-small", "t5-base") for work in contest.WORKS}
    assert names == expected - {"t5-base/lora/generate"}


def test_batches_have_the_padding_asked_for():
    batch = contest.batch_of(contest.Size("", "t5", {}, 3, 8, 2), 50, shortest=0.5)
    assert batch["attention_mask"].sum(1).tolist() == [4, 6, 8]
    assert ((batch["input_ids"] > 1) == batch["attention_mask"]).all()
    assert batch["decoder_input_ids"].tolist() == [[0, row[0]] for row in batch["labels"]]


def test_turns_change_who_begins():
    order = []
    runs = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    assert turns.alternate(runs, 3) == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}
    assert "".join(order) == "abcbcacab"


def test_a_turn_times_all_runs_but_the_first(monkeypatch):
    """The clocks are set by hand: some systems share out processor time by guess."""
    clock = {"wall": 5.0, "processor": 3.0, "kernel": 1.0}
    done = []

    def run():
        slow = 1 if done else 10  # as after a wait
        for name, seconds in (("wall", 2.0), ("processor", 1.5), ("kernel", 0.25)):
            clock[name] += slow * seconds
        done.append(len(done))
        return done[-1]

    monkeypatch.setattr(turns.time, "perf_counter", lambda: clock["wall"])
    monkeypatch.setattr(turns.time, "process_time", lambda: clock["processor"])
    monkeypatch.setattr(turns.os, "times", lambda: SimpleNamespace(system=clock["kernel"]))
    work = turns.Work(run, lambda result: result, float, 1, "cpu", lambda: None)
    timed = turns._run(work, times=4, untimed=1)
    assert done == [0, 1, 2, 3, 4]
    assert timed == {"seconds": 2.0, "cpu_seconds": 1.5, "kernel_seconds": 0.25, "value": 4.0}


def test_a_turn_asks_for_a_run_that_is_not_timed():
    asked = []

    class Worker:
        name = "ours"

        def ask(self, action, **given):
            asked.append((action, given))
            return {}

    turns.take_turns([Worker()], repeats=2, times=3)
    assert asked == [("run", {"times": 3, "untimed": 1})] * 2


@pytest.mark.parametrize("in_process", [True, False])
def test_a_worker_that_fails_says_why(in_process):
    settings = peers.Settings(in_process=in_process)
    with peers._worker(peers.OURS, settings) as worker:
        assert isinstance(worker, turns.InProcess if in_process else turns.Worker)
        message = "compacter_jax failed at 'prepare': KeyError: 'size'"
        with pytest.raises(turns.WorkerError, match=message):
            worker.ask("prepare", task={})
        message = "compacter_jax failed at 'run': AttributeError"
        with pytest.raises(turns.WorkerError, match=message):
            worker.ask("run", times=1)


def test_a_rehearsal_starts_processes_for_cases_with_a_peer_alone(monkeypatch):
    class StartedError(Exception):
        """A process would have been started."""

    def start(*arguments, **keywords):
        raise StartedError

    monkeypatch.setattr(peers, "Worker", start)
    settings = peers.Settings(
        repeats=2, in_process=True, beside=False, method_changes=CHANGES, dtypes=("float32",)
    )
    (case,) = peers.measure([(SIZES["t5"], "compacter++", "forward")], settings)
    assert list(case["sides"]) == [peers.OURS]
    assert len(case["sides"][peers.OURS]["seconds"]) == 2
    with pytest.raises(StartedError):
        list(
            peers.measure(
                [(SIZES["t5"], "compacter++", "forward")],
                dataclasses.replace(settings, beside=True),
            )
        )


def test_a_worker_that_ends_leaves_what_it_wrote():
    worker = turns.Worker("nobody", "benchmarks.nobody")
    message = "(?s)nobody ended with code 1 at 'run'.*No module named benchmarks.nobody"
    with worker, pytest.raises(turns.WorkerError, match=message):
        worker.ask("run", times=1)
