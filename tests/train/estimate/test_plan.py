import json

import pytest

import compacter_jax as cj
from compacter_jax.models.loading import module_from_name
from tests.speech_models import tiny_speech, torch_speech_config
from train.__main__ import main
from train.cli.method_flags import MethodOptions
from train.estimate import plan
from train.estimate.options import PlanOptions

MRPC = {"task": "mrpc", "batch_size": 100, "epochs": 20}


def options(backbone, **changes):
    """Returns options for a tiny backbone, for which the default bottleneck would be too narrow."""
    method = MethodOptions(reduction_factor=2)
    return PlanOptions(backbone=str(backbone), **{**MRPC, "method_options": method, **changes})


def test_steps_and_programs(tiny_t5):
    one = plan.plan_of(options(tiny_t5, max_length=128))
    assert (one.train_examples, one.epochs, one.steps) == (3_668, 20, 20 * 37)
    assert one.input_lengths == (16, 32, 48, 64, 96, 128)
    assert one.target_lengths == (4, 8)  # labels are short, whatever max_target_length is
    assert one.programs == 12
    assert one.total_flops == 740 * one.cost.flops
    assert one.seconds is None
    assert plan.plan_of(options(tiny_t5, max_steps=7)).steps == 7


@pytest.mark.parametrize(
    ("changes", "examples"),
    [
        ({"task": "mnli"}, 392_702),
        ({"task": "mnli", "split_protocol": "paper"}, 392_702),  # it has two validation splits
        ({"task": "qnli", "split_protocol": "paper"}, 103_743),
        ({"task": "rte", "split_protocol": "paper"}, 2_490),
        ({"task": "multirc", "split_protocol": "paper"}, 27_243),
        ({"task": "qnli", "train_size": 1_000}, 1_000),
        ({"task": "rte", "train_size": 10_000}, 2_490),
        ({"task": "movie"}, 7_431),
        ({"task": "mine", "train_size": 500}, 500),
    ],
)
def test_training_examples(tiny_t5, changes, examples):
    assert plan.train_examples(options(tiny_t5, **changes), text_to_text=True) == examples


def test_an_encoder_reads_one_choice_at_a_time(tiny_backbone):
    copa = options(tiny_backbone, task="copa")
    assert plan.train_examples(copa, text_to_text=False) == 2 * 400


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [
        ({}, 2 * 32),
        ({"decoder_layer": "compressed", "decoder_value_dim": 40}, 32 + 40),
        ({"decoder_layer": "compressed"}, 32 + 48),
    ],
)
def test_bytes_of_the_cache(changes, numbers, tmp_path):
    """Generation keeps 2 d numbers a layer and position, d + F with a compressed decoder."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "d_model": 32, "decoder_layers": 3, "encoder_layers": 1}
    sizes |= {
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "decoder_ffn_dim": 48,
        "decoder_attention_heads": 4,
        "encoder_attention_heads": 4,
    }
    config = transformers.M2M100Config(
        **sizes, **changes, architectures=["M2M100ForConditionalGeneration"]
    )
    config.save_pretrained(tmp_path)
    lengths = {"max_length": 24, "max_target_length": 16, "task": "mine", "train_size": 100}
    one = plan.plan_of(options(tmp_path, **lengths, batch_size=10))
    assert one.cost.cache_bytes == 3 * 10 * (24 + 16) * numbers * 4
    assert "keys and values in generation take" in "\n".join(
        plan._workload_lines(one.workload, [one])
    )


@pytest.mark.contract
def test_plan_of_an_encoder(tiny_backbone):
    one = plan.plan_of(options(tiny_backbone, task="mnli", max_length=64))
    assert one.target_lengths == ()
    assert one.programs == len(one.input_lengths) == 4
    module = module_from_name(tiny_backbone).clone(head="sequence_classification", num_labels=3)
    assert one.cost.trained == 3 * 24 + 3 + trained_without_head(module)
    assert one.cost.adapter_bytes == one.cost.memory.trained == 4 * one.cost.trained
    assert one.cost.cache_bytes == 0


def trained_without_head(module):
    import jax

    model = cj.Adapted(module, cj.preset("compacter++", reduction_factor=2))
    shapes = jax.eval_shape(model.init, jax.random.key(0), *module.dummy_inputs())["params"]
    count = cj.count(shapes, cj.label_params(shapes, model.method))
    return count.trained - count.groups["head"][0]


def test_what_saves_memory_and_what_costs_operations(tiny_t5, tmp_path):
    config = json.loads((tiny_t5 / "config.json").read_text())
    deep = tmp_path / "config.json"
    deep.write_text(json.dumps({**config, "num_layers": 4, "num_decoder_layers": 1}))

    def cost(**changes):
        return plan.plan_of(options(deep, max_length=256, **changes)).cost

    plain = cost()
    assert cost(remat="full").flops == plain.flops  # recomputation does not count as model FLOPs
    assert cost(remat="full").memory.activations < plain.memory.activations
    assert cost(dtype="bfloat16").memory.activations < plain.memory.activations
    assert cost(accumulation_steps=4).flops == pytest.approx(plain.flops, rel=0.01)
    assert cost(accumulation_steps=4).memory.activations < 0.5 * plain.memory.activations
    assert cost(devices=4).flops == pytest.approx(plain.flops / 4, rel=0.01)
    assert cost(method="full", method_options=MethodOptions()).flops > plain.flops


def test_frozen_weights_in_fewer_bits_and_over_a_mesh(tiny_t5):
    def frozen(**changes):
        return plan.plan_of(options(tiny_t5, **changes)).cost.memory.frozen

    whole = frozen()
    assert frozen(backbone_dtype="bfloat16") < 0.6 * whole
    assert frozen(backbone_dtype="int8") < 0.5 * whole
    assert frozen(mesh="data=1,model=1") == whole
    # Every device has all norms and biases.
    assert whole / 4 < frozen(mesh="data=2,model=2") < whole / 3
    divided = plan.plan_of(options(tiny_t5, mesh="data=2,model=2"))
    halved = plan.plan_of(options(tiny_t5, devices=2))
    assert divided.workload.rows == halved.workload.rows == 50
    assert divided.cost.flops == halved.cost.flops // 2


def test_time_from_a_peak(tiny_t5):
    given = plan.plan_of(options(tiny_t5, peak_flops=1e9, utilisation=0.5))
    assert given.seconds == pytest.approx(given.total_flops / 0.5e9)
    known = plan.plan_of(options(tiny_t5, device_kind="TPU v4", utilisation=1.0))
    assert known.seconds == pytest.approx(known.total_flops / 275e12)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "mine"], "the number of training examples of 'mine' is not known"),
        (
            ["--task", "record", "--backbone", "bert-base-uncased"],
            "training examples of 'record' is not known",
        ),
        (["--device-kind", "abacus"], "the peak FLOP/s of 'abacus' in float32 are not known"),
        (["--devices", "3"], "batch_size=32 must be a multiple of 3"),
        (["--utilisation", "1.5"], "utilisation=1.5 must be above 0, at most 1"),
        (["--backbone", "t5-huge"], "'t5-huge' is neither a config.json here nor a published size"),
        (["--directions", "en-de"], "plan reads no data, and does not know the directions"),
    ],
)
def test_refusals(tiny_t5, capsys, flags, message):
    shared = ["--backbone", str(tiny_t5), "--task", "movie", "--reduction-factor", "2"]
    assert main(["plan", *shared, *flags]) == 2
    assert message in capsys.readouterr().err


def test_the_command_prints_every_task(tiny_t5, tmp_path, capsys):
    config = tmp_path / "two.toml"
    config.write_text(
        'task = "mrpc, wmt16-ro-en"\nepochs = 1\nreduction_factor = 2\n[tasks.mrpc]\nepochs = 20\n'
    )
    flags = ["--config", str(config), "--backbone", str(tiny_t5), "--peak-flops", "1e12"]
    assert main(["plan", *flags]) == 0
    printed = capsys.readouterr().out
    table = {line.split()[0]: line.split()[1:4] for line in printed.splitlines()[3:5]}
    assert table == {"mrpc": ["3,668", "20", "2,300"], "wmt16-ro-en": ["610,320", "1", "19,073"]}
    assert "targets to 4, 8 tokens" in printed
    assert "targets to 4, 8, 12, 16, 24, 32, 48, 64 tokens" in printed
    assert "40% of 1e+12 FLOP/s" in printed
    assert main(["plan", *flags, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["task"], second["task"]) == ("mrpc", "wmt16-ro-en")
    assert (first["steps"], second["steps"]) == (2_300, 19_073)
    parts = first["cost"]["memory"]
    assert parts.pop("total") == sum(parts.values())


@pytest.mark.slow
def test_t5_11b_is_planned_without_its_weights():
    one = plan.plan_of(PlanOptions(backbone="t5-11b", dtype="bfloat16", **MRPC))
    assert one.cost.total > 11e9
    assert one.cost.memory.frozen > 4 * 11e9


def test_a_speech_model_reads_frames(tmp_path, capsys):
    """The longest input has that many frames, of which a quarter is left as keys and values."""
    config = torch_speech_config(tiny_speech())
    config.architectures = ["Speech2TextForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    lengths = {"max_length": 41, "max_target_length": 16, "task": "mine", "train_size": 100}
    one = plan.plan_of(options(tmp_path, method="st", **lengths, batch_size=10))
    assert one.cost.cache_bytes == 10 * (11 + 16) * 2 * 24 * 4
    batch = plan.batch_of(one.workload, 10)
    assert batch["input_features"].shape == (10, 41, 7)
    assert batch["input_features"].dtype == "float32"
    assert batch["attention_mask"].shape == (10, 41)
    assert "input_ids" not in batch
    long = {**lengths, "max_length": 150}
    plan.plan([options(tmp_path, method="st", **long, batch_size=10)])
    assert (
        "padded to 64, 128, 150 frames, targets to 4, 8, 12, 16 tokens:" in capsys.readouterr().out
    )
