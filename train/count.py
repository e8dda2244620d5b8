"""The command `params`: what a method trains on a backbone, or what each of all methods does."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from tqdm import tqdm

import compacter_jax as cj
from compacter_jax.config import MethodConfig
from compacter_jax.models.convert import module_from_config, module_from_name, read_config
from compacter_jax.params import Count, group_of
from train import report
from train.objective import head_arguments
from train.options import ParamsOptions, method_of, options_of

ALL = "all"
# Entries of T5's embedding -> tokens there really are. arXiv:2106.04647 cuts the embedding to these
# before it counts.
_TOKENS = {32_128: 32_100}


@dataclasses.dataclass(frozen=True)
class Counted:
    """A backbone with a vocabulary of one size.

    Attributes:
      module: the backbone.
      shapes: `/`-joined path -> shape of its parameters.
    """

    module: Any
    shapes: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        """Entries of the embedding."""
        return self.module.config.vocab_size

    @property
    def total(self) -> int:
        """Parameters of the backbone, a new head aside."""
        return sum(leaf.size for path, leaf in self.shapes.items() if group_of(path) != "head")


def params(options: ParamsOptions) -> None:
    """Runs the command.

    Raises:
      ValueError: if not exactly one of backbone and configuration is given, or it is none; or, of
        one method, as `compacter_jax.Adapted`.
    """
    backbones = counted_backbones(options)
    if options.method == ALL:
        _print_all(options, backbones)
    else:
        _print_one(options, backbones)


def counted_backbones(options: ParamsOptions) -> list[Counted]:
    """The backbone with each of the vocabularies to count with, its own or the one given first."""
    given = [x for x in (options.backbone, options.backbone_config) if x is not None]
    if len(given) != 1:
        raise ValueError("params wants either --backbone or --backbone-config; give one of them")
    (name,) = given
    if options.backbone is not None:
        module = module_from_config(read_config(name), **head_arguments(name, options.num_labels))
    else:
        module = module_from_name(name)
        if isinstance(module, cj.Bert):
            module = module.clone(head="sequence_classification", num_labels=options.num_labels)
    sizes = [options.vocab_size or module.config.vocab_size]
    if options.vocab_size is None and isinstance(module, cj.T5) and sizes[0] in _TOKENS:
        sizes.append(_TOKENS[sizes[0]])
    return [_with_vocabulary(module, size) for size in sizes]


def counts(method: MethodConfig, backbones: list[Counted]) -> list[Count]:
    """What `method` trains on each of the backbones, which differ in their vocabulary alone."""
    first = backbones[0]
    shapes = adapted_shapes(first.module, method)
    found = [shapes]
    added = {path: leaf for path, leaf in shapes.items() if path not in first.shapes}
    for other in backbones[1:]:
        # Tracing takes a second, and hardly any method has parameters for each token.
        if any(first.vocab_size in leaf.shape for leaf in added.values()):
            found.append(adapted_shapes(other.module, method))
        else:
            found.append({**other.shapes, **added})
    trees = [unflatten_dict(flat, sep="/") for flat in found]
    return [cj.count(tree, cj.label_params(tree, method)) for tree in trees]


def _with_vocabulary(module: Any, size: int) -> Counted:
    if size < 1:
        raise ValueError(f"vocab_size={size} must be at least 1")
    module = module.clone(config=dataclasses.replace(module.config, vocab_size=size))
    return Counted(module, _shapes(module))


def adapted_shapes(module: Any, method: MethodConfig) -> dict[str, Any]:
    """`/`-joined path -> shape, of a backbone's parameters and what a method adds to them."""
    return _shapes(cj.Adapted(module, method), *module.dummy_inputs())


def _shapes(module: Any, *inputs: Any) -> dict[str, Any]:
    inputs = inputs or module.dummy_inputs()
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return flatten_dict(shapes, sep="/")


def _sums(count: Count, backbone: Counted) -> dict[str, int]:
    return {
        "trained": count.trained,
        "total": count.total,
        "backbone_total": backbone.total,
        "vocab_size": backbone.vocab_size,
    }


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.4f} %"


def _print_one(options: ParamsOptions, backbones: list[Counted]) -> None:
    method = method_of(options.method, options.method_options)
    found = counts(method, backbones)
    sums = [_sums(*pair) for pair in zip(found, backbones, strict=True)]
    if options.json:
        groups = {name: {"trained": t, "total": n} for name, (t, n) in found[0].groups.items()}
        print(json.dumps({**sums[0], "other_vocabularies": sums[1:], "groups": groups}, indent=2))
        return
    for count, backbone in zip(found, backbones, strict=True):
        part = f"{_percent(count.trained, backbone.total)} of it"
        if backbone is backbones[0]:
            print(f"backbone alone: {backbone.total:,}; trained: {part}")
        else:
            alone = f"with a vocabulary of {backbone.vocab_size:,}: {backbone.total:,}"
            print(f"{alone}; trained: {count.trained:,}, {part}")
    print(report.parameter_table(found[0], method))


def _print_all(options: ParamsOptions, backbones: list[Counted]) -> None:
    lines: dict[str, list[Count] | str] = {}
    for name in tqdm(cj.presets(), unit="method", leave=False, disable=None):
        try:
            method = method_of(name, options_of(name, options.method_options))
            lines[name] = counts(method, backbones)
        except ValueError as error:
            lines[name] = " ".join(str(error).split())
    if options.json:
        print(json.dumps([_record(*line, backbones) for line in lines.items()], indent=2))
    else:
        print("\n".join(_table(lines, backbones)))


def _record(name: str, line: list[Count] | str, backbones: list[Counted]) -> dict[str, Any]:
    if isinstance(line, str):
        return {"method": name, "error": line}
    sums = [_sums(*pair) for pair in zip(line, backbones, strict=True)]
    return {"method": name, **sums[0], "other_vocabularies": sums[1:]}


def _table(lines: dict[str, list[Count] | str], backbones: list[Counted]) -> list[str]:
    """One line for each method: what is trained, and its part of the backbone."""
    first = max(map(len, lines))
    header = ["method".ljust(first)]
    for backbone in backbones:
        header += ["trained".rjust(11), f"of {backbone.total:,}".rjust(14)]
    rows = ["  ".join(header), "-" * len("  ".join(header))]
    for name, line in lines.items():
        row = [name.ljust(first)]
        if isinstance(line, str):
            row.append(line)
        else:
            for count, backbone, width in zip(line, backbones, header[2::2], strict=True):
                part = _percent(count.trained, backbone.total)
                row += [f"{count.trained:,}".rjust(11), part.rjust(len(width))]
        rows.append("  ".join(row))
    if len(backbones) > 1:
        sizes = " and ".join(f"{backbone.vocab_size:,}" for backbone in backbones)
        rows.append(f"counted with vocabularies of {sizes}, in this order")
    return rows
