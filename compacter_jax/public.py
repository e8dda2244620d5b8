"""The public names of `import compacter_jax as cj`."""

from compacter_jax.adapter_files import read_adapter_config
from compacter_jax.banks import get_member, set_member, stack_adapters, unstack
from compacter_jax.catalogue import preset, presets
from compacter_jax.checkpoint import load_adapter, save_adapter, save_backbone
from compacter_jax.compositions.average import Average, AverageMaps
from compacter_jax.compositions.bank import Bank
from compacter_jax.compositions.entropy import minimize_entropy
from compacter_jax.compositions.parallel import Parallel
from compacter_jax.compositions.routing import mixing_sites
from compacter_jax.compositions.stack import Stack
from compacter_jax.decode.generate import generate
from compacter_jax.embeddings import (
    cosine_similarity_loss,
    matryoshka_loss,
    multiple_negatives_ranking_loss,
    normalize,
    triplet_loss,
)
from compacter_jax.exchange.adapterhub import (
    export_adapterhub,
    import_adapterhub,
    read_adapterhub_head,
)
from compacter_jax.exchange.peft import export_peft, import_peft
from compacter_jax.inject.adapted import Adapted
from compacter_jax.inject.initial import init_adapters
from compacter_jax.inject.merging import merge_adapter
from compacter_jax.methods.base import FullFineTuningConfig, MethodConfig
from compacter_jax.methods.bitfit import BitFitConfig
from compacter_jax.methods.bottleneck import Bottleneck, BottleneckConfig, LowRankBottleneckConfig
from compacter_jax.methods.combined import CombinedConfig
from compacter_jax.methods.compacter import PHMBottleneckConfig
from compacter_jax.methods.head_only import HeadOnlyConfig
from compacter_jax.methods.ia3 import IA3Config
from compacter_jax.methods.intrinsic import IntrinsicConfig
from compacter_jax.methods.invertible import InvertibleConfig
from compacter_jax.methods.lora import LoRAConfig
from compacter_jax.methods.phm_linear import PHMLinear
from compacter_jax.methods.prefix_tuning import PrefixTuningConfig
from compacter_jax.methods.prompt_tuning import PromptTuningConfig
from compacter_jax.methods.trained_sites import TrainedSitesConfig
from compacter_jax.models.bert.config import BertConfig
from compacter_jax.models.bert.model import Bert
from compacter_jax.models.distilbert.config import DistilBertConfig
from compacter_jax.models.distilbert.model import DistilBert
from compacter_jax.models.loading import Backbone, load_backbone, read_sentence_embedding
from compacter_jax.models.modernbert.config import ModernBertConfig
from compacter_jax.models.modernbert.model import ModernBert
from compacter_jax.models.pooling import pool
from compacter_jax.models.sentences import (
    SentenceEmbedding,
    write_sentence_embedding,
)
from compacter_jax.models.seq2seq.compressed import CompressedAttention
from compacter_jax.models.seq2seq.config import Seq2SeqConfig
from compacter_jax.models.seq2seq.model import Seq2Seq
from compacter_jax.models.speech_to_text.config import SpeechToTextConfig
from compacter_jax.models.speech_to_text.model import SpeechToText
from compacter_jax.models.t5.config import T5Config
from compacter_jax.models.t5.model import T5
from compacter_jax.params import cast_frozen, count, label_params, merge, optimizer, partition
from compacter_jax.phm import kronecker_sum, kronecker_sum_matmul
from compacter_jax.sites import Site

__all__ = [
    "T5",
    "Adapted",
    "Average",
    "AverageMaps",
    "Backbone",
    "Bank",
    "Bert",
    "BertConfig",
    "BitFitConfig",
    "Bottleneck",
    "BottleneckConfig",
    "CombinedConfig",
    "CompressedAttention",
    "DistilBert",
    "DistilBertConfig",
    "FullFineTuningConfig",
    "HeadOnlyConfig",
    "IA3Config",
    "IntrinsicConfig",
    "InvertibleConfig",
    "LoRAConfig",
    "LowRankBottleneckConfig",
    "MethodConfig",
    "ModernBert",
    "ModernBertConfig",
    "PHMBottleneckConfig",
    "PHMLinear",
    "Parallel",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "SentenceEmbedding",
    "Seq2Seq",
    "Seq2SeqConfig",
    "Site",
    "SpeechToText",
    "SpeechToTextConfig",
    "Stack",
    "T5Config",
    "TrainedSitesConfig",
    "cast_frozen",
    "cosine_similarity_loss",
    "count",
    "export_adapterhub",
    "export_peft",
    "generate",
    "get_member",
    "import_adapterhub",
    "import_peft",
    "init_adapters",
    "kronecker_sum",
    "kronecker_sum_matmul",
    "label_params",
    "load_adapter",
    "load_backbone",
    "matryoshka_loss",
    "merge",
    "merge_adapter",
    "minimize_entropy",
    "mixing_sites",
    "multiple_negatives_ranking_loss",
    "normalize",
    "optimizer",
    "partition",
    "pool",
    "preset",
    "presets",
    "read_adapter_config",
    "read_adapterhub_head",
    "read_sentence_embedding",
    "save_adapter",
    "save_backbone",
    "set_member",
    "stack_adapters",
    "triplet_loss",
    "unstack",
    "write_sentence_embedding",
]
