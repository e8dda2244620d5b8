"""Tests the command `merge` on encoder-decoders."""

import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import compacter_jax as cj
from tests.helpers import adapted_shapes, assert_equal_trees, random_tree
from tests.seq2seq_models import small_backbone, tiny, torch_config
from tests.train.cli.test_cli import refusal
from train.__main__ import main

CONFIG = tiny("m2m_100", encoder_layers=2)  # its feed-forward networks have a relu


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """Returns the folder of an M2M-100 with a tokenizer of letters."""
    folder = tmp_path_factory.mktemp("backbone")
    ours = small_backbone(CONFIG)
    cj.save_backbone(folder, ours.module, ours.params, torch_config(CONFIG))
    words = ["<s>", "<pad>", "</s>", "<unk>", *map(chr, range(ord("a"), ord("a") + 19))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
    special = {f"{name}_token": word for name, word in names.items()}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def saved(folder, backbone, method):
    """Saves an adapter with random values; returns the model and its parameters."""
    loaded = cj.load_backbone(backbone)
    model = cj.Adapted(loaded.module, method)
    drawn = flatten_dict(random_tree(adapted_shapes(model), seed=1))
    params = unflatten_dict({**drawn, **flatten_dict(loaded.params)})
    metadata = {"backbone": str(backbone), "dtype": "float32", "max_length": 16}
    cj.save_adapter(folder, model, params, metadata=metadata)
    return model, params


def test_parallel_bottlenecks_become_a_wider_network(backbone, tmp_path):
    """Writes a plain backbone of wider networks with the weights of `merge_adapter`, to the bit."""
    model, params = saved(tmp_path / "adapter", backbone, cj.preset("parallel", reduction_factor=4))
    flags = ["merge", "--adapter", tmp_path / "adapter", "--to", tmp_path / "merged"]
    assert main(list(map(str, flags))) == 0
    merged = cj.load_backbone(tmp_path / "merged")
    assert merged.new_parameters == ()
    assert merged.module == model.merged_module()
    assert merged.module.config.encoder_ffn_dim == CONFIG.encoder_ffn_dim + 24 // 4
    assert merged.module.config.decoder_ffn_dim == CONFIG.decoder_ffn_dim + 24 // 4
    assert_equal_trees(merged.params, cj.merge_adapter(model, params))
    assert (tmp_path / "merged" / "tokenizer.json").exists()


def test_ciat_is_refused_by_name(backbone, tmp_path, capsys):
    """Says in one line which adapters of `ciat` cannot be merged, and writes nothing."""
    saved(tmp_path / "adapter", backbone, cj.preset("ciat"))
    told = refusal(capsys, "merge", "--adapter", tmp_path / "adapter", "--to", tmp_path / "merged")
    assert "cannot be merged" in told
    assert "at encoder_embedding, decoder_embedding as ciat has them" in told
    assert not (tmp_path / "merged").exists()
