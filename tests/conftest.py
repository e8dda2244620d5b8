"""Emulates four devices for every test, and writes tiny backbones with tokenizers to disk."""

import atexit
import gc
import importlib.metadata
import json
import math
import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time of the tests is compilation, and without optimisation it takes half as long.
# XLA's older code generators take half the time of its newer ones; later jaxlibs may lack the flag.
JAXLIB = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
QUICK = "--xla_backend_optimization_level=0" + (
    " --xla_cpu_use_fusion_emitters=false" if JAXLIB < (0, 11) else ""
)
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4 {QUICK}"
)
# A persistent compilation cache, shared by all processes: each program is compiled only once. It
# also holds single operations: reading one saves 60 ms, and creating a T5 takes about a hundred.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compacter_jax-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# For models this small, the threads of PyTorch and NumPy spend most of their time waiting.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Imports and traces create little garbage, but looking for it took a tenth of the time.
gc.set_threshold(100_000, 50, 100)

MOST_MEMORY = 2 * 2**30  # of one process, in bytes; above it, compiled programs are dropped

WORDS = (
    *("a", "the", "film", "plot", "is", "was", "very", "not", "it", "we"),
    *("good", "fine", "great", "loved", "bad", "dull", "awful", "hated"),
)


# The files that take longest start first, so that a short one ends last.
LONGEST = (
    *("surviving", "notebooks", "cli", "cli_t5", "grid", "compare", "methods", "mixture", "banked"),
    *("compositions", "distributed", "peers", "benchmarks", "readme"),
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    order = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(autouse=True, scope="module")
def forget_what_was_compiled():
    """Drops compiled programs, which would fill gigabytes in a process that runs many files."""
    yield
    if memory_in_use() > MOST_MEMORY:
        import jax

        jax.clear_caches()


def memory_in_use():
    """Returns the bytes in use by this process on Linux, and infinity on other systems."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return math.inf
    return pages * os.sysconf("SC_PAGE_SIZE")


def write_backbone(folder, *, seed, hidden_size=24, num_layers=2):
    """Writes a random BERT as a Hugging Face checkpoint, with a tokenizer of `WORDS`."""
    import jax
    import safetensors.numpy
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    from compacter_jax.models.bert.checkpoint import bert_to_hugging_face
    from compacter_jax.models.bert.config import BertConfig
    from compacter_jax.models.bert.model import Bert
    from tests.helpers import quick_key

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=64,
    )
    module = Bert(config)
    init = jax.jit(lambda key: module.init(key, *module.dummy_inputs())["params"])
    params = jax.device_get(init(quick_key(seed)))
    # Larger weights than those of an untrained BERT, so that the hidden states depend on the words.
    params = jax.tree.map(lambda leaf: 8 * leaf if leaf.ndim == 2 else leaf, params)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(bert_to_hugging_face(params), folder / "model.safetensors")
    settings = {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "vocab_size": config.vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "intermediate_size": 40,
        "max_position_embeddings": 64,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}
    settings = {f"{name}_token": token for name, token in special.items()}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory):
    """Returns the folder of a random two-layer BERT of width 24."""
    return write_backbone(tmp_path_factory.mktemp("backbone") / "tiny", seed=0)


def write_t5(folder, *, seed, architecture="T5ForConditionalGeneration", sentinels=20, **config):
    """Writes a random T5 as a Hugging Face checkpoint, with a Unigram tokenizer of `WORDS`."""
    import jax
    import safetensors.numpy
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    from compacter_jax.models.t5.checkpoint import t5_to_hugging_face
    from compacter_jax.models.t5.config import T5Config
    from compacter_jax.models.t5.model import T5
    from tests.helpers import quick_key

    words = (*WORDS, "movie", "sentence", "sentence1", "sentence2", "positive", "negative")
    pieces = [*(f"▁{word}" for word in words), *"▁0123456789:.-abcdefghijklmnopqrstuvwxyz"]
    extra = [f"<extra_id_{i}>" for i in reversed(range(sentinels))]
    vocabulary = ["<pad>", "</s>", "<unk>", *pieces, *extra]
    sizes = {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 1,
        "num_heads": 2,
        # The vocabulary is larger than that of the tokenizer, as in the published checkpoints.
        "vocab_size": -(-len(vocabulary) // 32) * 32,
        "feed_forward_proj": "relu",
        "tie_word_embeddings": True,
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        **config,
    }
    heads = {"T5ForConditionalGeneration": "conditional_generation", "T5EncoderModel": "encoder"}
    module = T5(T5Config(**sizes), head=heads.get(architecture))
    init = jax.jit(lambda key: module.init(key, *module.dummy_inputs())["params"])
    params = jax.device_get(init(quick_key(seed)))
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(t5_to_hugging_face(params), folder / "model.safetensors")
    settings = {"model_type": "t5", "architectures": [architecture], **sizes}
    (folder / "config.json").write_text(json.dumps(settings))
    scores = [0.0] * 3 + [-1.0 - (len(piece) == 1) for piece in pieces] + [0.0] * len(extra)
    tokenizer = Tokenizer(
        models.Unigram(list(zip(vocabulary, scores, strict=True)), unk_id=2, byte_fallback=False)
    )
    tokenizer.normalizer = normalizers.Replace("\u200b", "")  # a sentence may have no tokens
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", *extra])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": extra}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory):
    """Returns the folder of a random T5 of width 16 with one layer in encoder and decoder."""
    return write_t5(tmp_path_factory.mktemp("backbone") / "t5", seed=0)
