"""Four emulated devices for every test, and a tiny backbone with its tokenizer on disk."""

import json
import os

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of what the tests do, and half as long without optimisation of the code made.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

WORDS = (
    *("a", "the", "film", "plot", "is", "was", "very", "not", "it", "we"),
    *("good", "fine", "great", "loved", "bad", "dull", "awful", "hated"),
)


def write_backbone(folder, *, seed, hidden_size=24, num_layers=2):
    """A random BERT in the files of a Hugging Face checkpoint, with a tokenizer of `WORDS`."""
    import jax
    import safetensors.numpy
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    from compacter_jax.models.bert import Bert, BertConfig
    from compacter_jax.models.convert import bert_to_hugging_face

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
    params = jax.device_get(init(jax.random.key(seed)))
    # Wider than an untrained BERT's, so that the hidden states depend on the words.
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
    """Folder of a random two-layer BERT of width 24."""
    return write_backbone(tmp_path_factory.mktemp("backbone") / "tiny", seed=0)
