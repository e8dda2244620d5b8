"""Command `merge`: a backbone with an adapter's update in its weights."""

from __future__ import annotations

import copy

import compacter_jax as cj
from train.cli import compositions
from train.exchange.convert import check_new, load_ours
from train.exchange.options import MergeOptions
from train.folders import new_folder
from train.inference import adapter, saved
from train.objectives.embedding import EmbeddingSettings


def merge(options: MergeOptions) -> None:
    """Runs the command `merge`; an adapter of embeddings gives a folder of sentence-transformers.

    Raises:
      FileNotFoundError, ValueError: as `load_adapter` and `merge_adapter`; nothing is written then.
    """
    check_new(options.to)
    folder = compositions.folder_of(options.adapter)
    settings = cj.read_adapter_config(folder)
    backbone, model, params = load_ours(folder, options.backbone)
    merged = cj.merge_adapter(model, params)
    tokenizer = adapter.load_tokenizer(backbone.name, backbone, settings.get("max_length", 3))
    embedding = None
    if settings.get("kind") == "embedding":
        embedding = EmbeddingSettings(**saved.settings_of(folder)["embedding"]).embedding
    config = copy.deepcopy(backbone.config)
    if names := settings.get("label_names"):
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
    with new_folder(options.to) as temporary:
        cj.save_backbone(temporary, model.merged_module(), merged, config)
        tokenizer.save_pretrained(temporary)
        if embedding is not None:
            width = backbone.module.config.hidden_size
            cj.write_sentence_embedding(temporary, embedding, width, settings["max_length"])
    print(f"the backbone with the merged {model.method.kind} adapter was written to {options.to}")
