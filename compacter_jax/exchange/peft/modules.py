"""The modules of a backbone by PEFT's names, and the ones that settings select."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compacter_jax.messages import about, listing, quote
from compacter_jax.params import group_of
from compacter_jax.paths import ADAPTER, fused_parts
from compacter_jax.patterns import compiled

# Type of a task -> ends of the names of its head, which PEFT saves and reads beside the adapter.
# Since 0.11 PEFT also writes them into `modules_to_save`, which was null before.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


# The sites of linear layers, with one name for each layer.
_LINEAR_SITES = (
    *("query", "key", "value", "query_key_value", "output_projection", "intermediate"),
    "feed_forward",
)


# Group of the backbone's parameters that may be trained beside a method -> field of the method.
TRAINED_BESIDE = {
    "head": "train_head",
    "pooler": "train_pooler",
    "layer norms": "train_layer_norms",
}


# Limits above those of any adapter.
_MOST_NAMES, LARGEST_SIZE = 10_000, 2**20


# Type of a field of adapter_config.json that holds names, a regular expression, or null.
NAMES = str | list[str] | None


def _list_of_names(settings: Mapping[str, Any], key: str) -> list[str]:
    """Returns a list of strings, empty for None; raises ValueError for one that is too long."""
    names: list[str] = settings.get(key) or []
    if len(names) > _MOST_NAMES:
        raise ValueError(f"{key} has {len(names):,} names; at most {_MOST_NAMES:,} are supported")
    return names


def names_or_pattern(settings: Mapping[str, Any], key: str) -> list[str] | str:
    """Returns a list of names or a regular expression; raises ValueError if it is neither."""
    value = settings.get(key)
    if not isinstance(value, str):
        return _list_of_names(settings, key)
    with about(f"{key}={quote(value, 100)}"):
        compiled(value)
    return value


def module_names(names: Mapping[str, str]) -> set[str]:
    """Returns PyTorch's names of all modules with parameters, or with submodules that have some."""
    modules: set[str] = set()
    for name in names.values():
        parts = name.split(".")[:-1]
        modules |= {".".join(parts[:i]) for i in range(1, len(parts) + 1)}
    return modules


def _linear_layers(names: Mapping[str, str]) -> dict[str, str]:
    """Returns name of a linear layer's module -> its path, or that of the module that fuses it."""
    layers = {}
    for path, name in names.items():
        host, _, leaf = path.rpartition("/")
        if leaf == "kernel":
            parent = host.rpartition("/")[0]
            layers[name.removesuffix(".weight")] = parent if fused_parts(parent) else host
    return layers


def module_of(host: str, names: Mapping[str, str]) -> str:
    """Returns PEFT's name of a linear layer; raises ValueError for another host."""
    layer = "/".join([host, *fused_parts(host)[:1]])
    if f"{layer}/kernel" not in names:
        raise ValueError(
            f"{host} is not a linear layer, and PEFT applies this method only to linear layers"
        )
    return names[f"{layer}/kernel"].removesuffix(".weight")


def adapted_modules(params: Mapping[str, Any], leaf: str, names: Mapping[str, str]) -> set[str]:
    """Returns PEFT's names of the modules whose adapters have a leaf."""
    end = f"/{ADAPTER}/{leaf}"
    hosts = [path.removesuffix(end) for path in params if path.endswith(end)]
    return {module_of(host, names) for host in hosts}


def found_modules(wanted: list[str] | str, modules: Iterable[str]) -> set[str]:
    """Returns the modules that PEFT finds by a regular expression or by ends of their names."""
    if isinstance(wanted, str):
        pattern = compiled(wanted)
        return {name for name in modules if pattern.fullmatch(name)}
    return {name for name in modules if any(f".{name}".endswith(f".{end}") for end in wanted)}


def is_feed_forward(wanted: list[str] | str, module: str) -> bool:
    """Returns True if IA3 scales the input of a module; an end may start within a name's part."""
    if isinstance(wanted, str):
        return compiled(wanted).fullmatch(module) is not None
    return module.endswith(tuple(wanted))


def target_modules(path: Path, settings: Mapping[str, Any], names: Mapping[str, str]) -> set[str]:
    """Returns the paths of the linear layers that `target_modules` selects."""
    wanted = names_or_pattern(settings, "target_modules")
    if not wanted or str(wanted).lower() == "all-linear":
        raise ValueError(
            f"target_modules={quote(settings.get('target_modules'))} in {path} does not name the "
            "modules; PEFT writes their names when it saves an adapter"
        )
    modules = module_names(names)
    found = found_modules(wanted, modules)
    found -= found_modules(names_or_pattern(settings, "exclude_modules"), modules)
    # Only for this task does PEFT add the head before it looks for targets.
    heads = _HEADS["SEQ_CLS"] if settings.get("task_type") == "SEQ_CLS" else ()
    for saved in (*_list_of_names(settings, "modules_to_save"), *heads):
        found -= {name for name in found if f".{saved}." in f".{name}."}
    in_layers = _layer_filter(path, settings, wanted)
    found = {name for name in found if name in wanted or in_layers(name)}
    linear = _linear_layers(names)
    if not found or not found <= linear.keys():
        listed = listing(sorted(found - linear.keys()), most=3) or "nothing"
        raise ValueError(
            f"target_modules={quote(wanted)} in {path} matches {listed}, but must match linear "
            "layers"
        )
    return {linear[name] for name in found}


def _layer_filter(
    path: Path, settings: Mapping[str, Any], wanted: list[str] | str
) -> Callable[[str], bool]:
    """Returns a predicate on names: True for modules in a layer of `layers_to_transform`.

    Without that setting, the predicate is always True. The layer is the first number in a name;
    PEFT before 0.20 took the last one for a T5. Such a folder has tensors for other modules, and
    the check of the tensors raises an error.
    """
    indices = settings.get("layers_to_transform")
    if indices is None or indices == []:
        return lambda name: True
    indices = indices if isinstance(indices, list) else [indices]
    if isinstance(wanted, str):
        raise ValueError(
            f"layers_to_transform={quote(indices)} in {path} must be indices of layers, with a "
            "list of "
            "names as target_modules"
        )
    patterns = names_or_pattern(settings, "layers_pattern")
    patterns = [patterns] if isinstance(patterns, str) else patterns
    ahead = [rf"(?:.*?\.)?{re.escape(pattern)}" for pattern in patterns] or [r".*?\.[^.]*"]

    def in_layers(name: str) -> bool:
        matches = (re.match(rf"{start}\.(\d+)\.", name) for start in ahead)
        first = next((match for match in matches if match), None)
        return first is not None and int(first[1]) in indices

    return in_layers


def saved_modules(
    path: Path,
    settings: Mapping[str, Any],
    names: Mapping[str, str],
    is_stored: Callable[[str], bool],
) -> set[str]:
    """Returns the paths of the backbone's parameters that a folder has beside its adapter.

    These are the modules that `modules_to_save` names, and the head of the task if it is stored.
    """
    ends = tuple(_list_of_names(settings, "modules_to_save"))
    saved = _under(ends, names)
    not_allowed = sorted(place for place in saved if group_of(place) not in TRAINED_BESIDE)
    if not_allowed:
        raise ValueError(
            f"modules_to_save={quote(list(ends))} in {path} has {listing(not_allowed, 3)}; only a "
            "head, a pooler and layer norms can be saved with an adapter"
        )
    head = _under(_HEADS.get(settings.get("task_type") or "", ()), names)
    return saved | head if any(map(is_stored, head)) else saved


def _under(ends: tuple[str, ...], names: Mapping[str, str]) -> set[str]:
    """Returns the paths of the parameters in modules whose names end in one of `ends`."""
    whole = {module for module in module_names(names) if module.endswith(ends)}
    return {place for place, name in names.items() if _within(name, whole)}


def _within(name: str, modules: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:i]) in modules for i in range(1, len(parts)))


def modules_to_save(saved: Iterable[str], names: Mapping[str, str]) -> list[str]:
    """Returns the shortest names by which PEFT finds exactly the modules of `saved`."""
    wanted = {_saved_module(place, names[place]) for place in saved}
    modules = module_names(names)

    def fits(ends: list[str]) -> bool:
        return {module for module in modules if module.endswith(tuple(ends))} == wanted

    return shortest([wanted], fits)[0]


def _saved_module(place: str, name: str) -> str:
    """Returns the module that PEFT saves with a parameter; of a head with several layers, the head.

    PEFT itself names the whole head of a task, and would save a layer within it twice.
    """
    return name.partition(".")[0] if group_of(place) == "head" else name.rpartition(".")[0]


def shortest(groups: Sequence[set[str]], fits: Callable[..., bool]) -> list[list[str]]:
    """Returns the ends of each group's names, of the fewest parts that satisfy `fits`."""
    longest = max((name.count(".") + 1 for group in groups for name in group), default=1)
    for parts in range(1, longest):
        ends = [sorted({".".join(n.split(".")[-parts:]) for n in group}) for group in groups]
        if fits(*ends):
            return ends
    return [sorted(group) for group in groups]


def place_sites(
    module: Any, names: Mapping[str, str], groups: Sequence[set[str]]
) -> tuple[list[tuple[str, ...]], tuple[int, ...], dict[str, str] | None]:
    """Returns sites that match `groups` of hosts, none of which has another's.

    Returns:
      Names of sites for each group, the layers to leave out, and None. If the groups are not whole
      sites of the backbone: names, no layers, and the table of these sites.
    """
    hosts: dict[str, dict[str, int]] = {}
    for site in _LINEAR_SITES:
        if site not in module.sites:
            continue
        matches = (
            re.fullmatch(module.sites[site], path) for path in _linear_layers(names).values()
        )
        hosts[site] = {match[0]: int(match["layer"]) for match in matches if match}
    chosen = [tuple(site for site in hosts if hosts[site].keys() & group) for group in groups]
    layer_of = {path: n for sites in chosen for site in sites for path, n in hosts[site].items()}
    kept = {layer_of.get(path) for group in groups for path in group}
    whole = [{p for site in sites for p in hosts[site] if layer_of[p] in kept} for sites in chosen]
    if whole == list(groups):
        return chosen, tuple(sorted(set(layer_of.values()) - kept)), None
    tables = [
        site_table(group, suffix) for group, suffix in zip(groups, ("", "/input"), strict=False)
    ]
    return (
        [tuple(table) for table in tables],
        (),
        {k: v for table in tables for k, v in table.items()},
    )


def site_table(hosts: Iterable[str], suffix: str) -> dict[str, str]:
    """Returns site name -> pattern; a site is the hosts that differ only in their layer's index."""
    layers: dict[tuple[str, ...], list[str]] = {}
    for path in hosts:
        before, *rest = re.split(r"/(\d+)/", path, maxsplit=1)
        layers.setdefault((before, *rest[1:]), []).extend(rest[:1])
    table = {}
    for ends, indices in sorted(layers.items()):
        name = "/".join(ends)
        if indices:
            listed = "|".join(sorted(indices, key=int))
            table[name + suffix] = f"/(?P<layer>{listed})/".join(map(re.escape, ends))
        else:  # a pattern must have the group, even if it matches nothing
            table[name + suffix] = re.escape(name) + r"(?P<layer>\d+)?"
    return table
