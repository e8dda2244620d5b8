"""The public names, as `import compacter_jax as cj` has them."""

from compacter_jax.adapterhub import (
    export_adapterhub,
    import_adapterhub,
    read_adapterhub_head,
)
from compacter_jax.adapters import Bottleneck, PHMLinear
from compacter_jax.banks import get_member, set_member, stack_adapters, unstack
from compacter_jax.checkpoint import load_adapter, read_adapter_config, save_adapter, save_backbone
from compacter_jax.compose import minimize_entropy, mixing_sites
from compacter_jax.config import (
    Average,
    AverageMaps,
    Bank,
    BitFitConfig,
    BottleneckConfig,
    CombinedConfig,
    FullFineTuningConfig,
    IA3Config,
    IntrinsicConfig,
    LoRAConfig,
    LowRankBottleneckConfig,
    MethodConfig,
    Parallel,
    PHMBottleneckConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    Stack,
    preset,
    presets,
)
from compacter_jax.decode import generate
from compacter_jax.inject import Adapted, init_adapters, merge_adapter
from compacter_jax.models.bert import Bert, BertConfig
from compacter_jax.models.convert import Backbone, load_backbone
from compacter_jax.models.t5 import T5, T5Config
from compacter_jax.params import cast_frozen, count, label_params, merge, optimizer, partition
from compacter_jax.peft import export_peft, import_peft
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
    "FullFineTuningConfig",
    "IA3Config",
    "IntrinsicConfig",
    "LoRAConfig",
    "LowRankBottleneckConfig",
    "MethodConfig",
    "PHMBottleneckConfig",
    "PHMLinear",
    "Parallel",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "Site",
    "Stack",
    "T5Config",
    "cast_frozen",
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
    "merge",
    "merge_adapter",
    "minimize_entropy",
    "mixing_sites",
    "optimizer",
    "partition",
    "preset",
    "presets",
    "read_adapter_config",
    "read_adapterhub_head",
    "save_adapter",
    "save_backbone",
    "set_member",
    "stack_adapters",
    "unstack",
]
