"""Command `params`: the parameters that a method, or each of all methods, trains on a backbone."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import optax
from flax.traverse_util import unflatten_dict
from tqdm import tqdm

import compacter_jax as cj
from compacter_jax.compilation import initial_shapes
from compacter_jax.messages import reason_of
from compacter_jax.methods.base import MethodConfig
from compacter_jax.models.families import family_of_module
from compacter_jax.models.loading import module_from_config, module_from_name, read_config
from compacter_jax.params import Count, group_of
from train import report
from train.cli.method_flags import ALL, method_of, options_of
from train.compute import memory, mesh
from train.estimate.options import ParamsOptions
from train.objectives import head_arguments, with_classifier

# Nominal memory of common devices in bytes; the actual memory is slightly larger.
_DEVICES = {"a chip of a TPU v4 (v4-8: 4 of them)": 32 * 10**9, "a GPU with 80 GB": 80 * 10**9}


@dataclasses.dataclass(frozen=True)
class Counted:
    """A backbone with one vocabulary size.

    Attributes:
      module: the backbone.
      shapes: `/`-joined path -> shape of the parameters.
    """

    module: Any
    shapes: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        """Number of entries of the embedding."""
        return self.module.config.vocab_size

    @property
    def total(self) -> int:
        """Number of parameters of the backbone without a new head."""
        return sum(leaf.size for path, leaf in self.shapes.items() if group_of(path) != "head")


@dataclasses.dataclass(frozen=True)
class DeviceBytes:
    """Memory of one device of a mesh in bytes, without activations.

    Attributes:
      frozen: the device's part of the frozen weights.
      trained: the trained parameters, replicated on every device.
      gradients: the gradients of the trained parameters.
      optimizer: the moments of AdamW.
    """

    frozen: int
    trained: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Sum of all fields."""
        return self.frozen + self.trained + self.gradients + self.optimizer


def params(options: ParamsOptions) -> None:
    """Runs the command `params`.

    Raises:
      ValueError: unless exactly one of backbone and configuration is given, and is valid; if a mesh
        is given with all methods, or is invalid; or, for a single method, as
        `compacter_jax.Adapted`, and for a composition as `train.cli.compositions.composed`.
    """
    options.check_members()
    if options.mesh is not None and options.method == ALL:
        raise ValueError("--mesh works with one method; give its name instead of all")
    backbones = counted_backbones(options)
    if options.method == ALL:
        _print_all(options, backbones)
    else:
        _print_one(options, backbones)


def counted_backbones(options: ParamsOptions) -> list[Counted]:
    """Returns the backbone with each vocabulary to count with, its own or the given one first."""
    given = [x for x in (options.backbone, options.backbone_config) if x is not None]
    if len(given) != 1:
        raise ValueError("params needs either --backbone or --backbone-config; give one of them")
    (name,) = given
    if options.backbone is not None:
        head = head_arguments(name, options.num_labels, pooling=options.pooling)
        module = module_from_config(read_config(name), **head)
    else:
        module = module_from_name(name)
        if not family_of_module(module).writes_text:
            module = with_classifier(module, options.num_labels, options.pooling)
    sizes = [options.vocab_size or module.config.vocab_size]
    tokens = family_of_module(module).tokens
    if options.vocab_size is None and sizes[0] in tokens:
        sizes.append(tokens[sizes[0]])
    return [_with_vocabulary(module, size) for size in sizes]


def counts(method: MethodConfig, backbones: list[Counted]) -> list[Count]:
    """Returns the parameter counts of `method` on backbones that differ only in vocabulary."""
    first = backbones[0]
    shapes = initial_shapes(cj.Adapted(first.module, method))
    found = [shapes]
    added = {path: leaf for path, leaf in shapes.items() if path not in first.shapes}
    for other in backbones[1:]:
        # Tracing takes a second, and few methods have parameters per token.
        if any(first.vocab_size in leaf.shape for leaf in added.values()):
            found.append(initial_shapes(cj.Adapted(other.module, method)))
        else:
            found.append({**other.shapes, **added})
    trees = [unflatten_dict(flat, sep="/") for flat in found]
    return [cj.count(tree, cj.label_params(tree, method)) for tree in trees]


def device_bytes(
    module: Any, method: MethodConfig, sizes: dict[str, int], backbone_dtype: str
) -> DeviceBytes:
    """Computes the memory of training `method` on each device, from shapes.

    Args:
      module: the backbone.
      method: the method.
      sizes: the mesh, as `train.compute.mesh.parse` returns it.
      backbone_dtype: the dtype in which frozen weights are stored.
    """
    shapes = unflatten_dict(initial_shapes(cj.Adapted(module, method)), sep="/")
    labels = cj.label_params(shapes, method)
    trained, frozen = cj.partition(shapes, labels)
    frozen = jax.eval_shape(lambda half: cj.cast_frozen(half, backbone_dtype), frozen)
    moments = jax.eval_shape(cj.optimizer(optax.adamw(1e-3), labels).init, trained)
    size = memory.size(trained)
    return DeviceBytes(mesh.bytes_of_part(frozen, sizes), size, size, memory.size(moments))


def _with_vocabulary(module: Any, size: int) -> Counted:
    if size < 1:
        raise ValueError(f"vocab_size={size} must be at least 1")
    module = module.clone(config=dataclasses.replace(module.config, vocab_size=size))
    return Counted(module, initial_shapes(module))


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
    method = options.method_config()
    found = counts(method, backbones)
    sums = [_sums(*pair) for pair in zip(found, backbones, strict=True)]
    held = None
    if options.mesh is not None:
        sizes = mesh.parse(options.mesh)
        held = device_bytes(backbones[0].module, method, sizes, options.backbone_dtype)
    if options.json:
        groups = {name: {"trained": t, "total": n} for name, (t, n) in found[0].groups.items()}
        record = {**sums[0], "other_vocabularies": sums[1:], "groups": groups}
        if held is not None:
            record["bytes_per_device"] = {**dataclasses.asdict(held), "total": held.total}
        print(json.dumps(record, indent=2))
        return
    for count, backbone in zip(found, backbones, strict=True):
        part = f"{_percent(count.trained, backbone.total)} of it"
        if backbone is backbones[0]:
            print(f"backbone alone: {backbone.total:,}; trained: {part}")
        else:
            alone = f"with a vocabulary of {backbone.vocab_size:,}: {backbone.total:,}"
            print(f"{alone}; trained: {count.trained:,}, {part}")
    print("the percentages below are of all parameters: the backbone, the adapters and the head")
    print(report.parameter_table(found[0], method))
    if held is not None:
        print("\n".join(_device_table(held, options)))


def _device_table(held: DeviceBytes, options: ParamsOptions) -> list[str]:
    """Returns lines with the memory per device by kind, and the share of its capacity."""
    rows = {
        f"not trained, in {options.backbone_dtype}": held.frozen,
        "trained, in float32": held.trained,
        "their gradients": held.gradients,
        "their moments, of AdamW": held.optimizer,
        "together": held.total,
    }
    lines = [
        "",
        "memory of each device, without activations, if the backbone is divided as "
        f"{options.mesh}:",
    ]
    lines += [f"  {name.ljust(25)} {size / 1e9:9.3f} GB" for name, size in rows.items()]
    parts = [f"{held.total / size:.1%} of {name}" for name, size in _DEVICES.items()]
    return [*lines, f"that is {' and '.join(parts)}; a GB is 10^9 bytes"]


def _print_all(options: ParamsOptions, backbones: list[Counted]) -> None:
    """Prints each row as soon as it is computed, since all take a while; JSON at the end."""
    if options.json:
        names = tqdm(cj.presets(), unit="method", leave=False, disable=None)
        records = [_record(name, _line(name, options, backbones), backbones) for name in names]
        print(json.dumps(records, indent=2))
        return
    first = max(map(len, cj.presets()))
    header = ["method".ljust(first)]
    for backbone in backbones:
        header += ["trained".rjust(11), f"of {backbone.total:,}".rjust(14)]
    print("  ".join(header), "-" * len("  ".join(header)), sep="\n", flush=True)
    for name in cj.presets():
        cells = _cells(_line(name, options, backbones), backbones, header[2::2])
        print("  ".join([name.ljust(first), *cells]), flush=True)
    if len(backbones) > 1:
        sizes = " and ".join(f"{backbone.vocab_size:,}" for backbone in backbones)
        print(f"the counts are for vocabularies of {sizes} tokens, in this order")


def _line(name: str, options: ParamsOptions, backbones: list[Counted]) -> list[Count] | str:
    """Returns the counts of a preset, or the reason why it cannot be applied."""
    try:
        method = method_of(name, options_of(name, options.method_options))
        return counts(method, backbones)
    except ValueError as error:
        return reason_of(error)


def _cells(line: list[Count] | str, backbones: list[Counted], headings: list[str]) -> list[str]:
    """Returns the cells of a row: for each backbone, trained parameters and percentage."""
    if isinstance(line, str):
        return [line]
    cells = []
    for count, backbone, heading in zip(line, backbones, headings, strict=True):
        part = _percent(count.trained, backbone.total)
        cells += [f"{count.trained:,}".rjust(11), part.rjust(len(heading))]
    return cells


def _record(name: str, line: list[Count] | str, backbones: list[Counted]) -> dict[str, Any]:
    if isinstance(line, str):
        return {"method": name, "error": line}
    sums = [_sums(*pair) for pair in zip(line, backbones, strict=True)]
    return {"method": name, **sums[0], "other_vocabularies": sums[1:]}
