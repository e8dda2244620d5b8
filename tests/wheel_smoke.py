"""Checks the built wheel and sdist, and uses the installed wheel; no test module.

python -I tests/wheel_smoke.py DIST, in an environment that holds the wheel and what it requires.
"""

import importlib.util
import sys
import tarfile
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp

import compacter_jax as cj

OUTSIDE = ("train", "tests", "notebooks", "benchmarks", "docs")
NOT_REQUIRED = ("torch", "datasets", "pytest", "train")


def check(holds: bool, message: str) -> None:
    if not holds:
        sys.exit(f"wheel_smoke: {message}")


def check_contents(names: list[str], wanted: tuple[str, ...], archive: str) -> None:
    for name in wanted:
        check(name in names, f"{archive} lacks {name}; it has {names}")
    alien = [name for name in names if name.split("/")[0] in OUTSIDE]
    check(not alien, f"{archive} should not have {alien}")


def check_archives(dist: Path) -> None:
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    stem = sdist.name.removesuffix(".tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    package = ("compacter_jax/__init__.py", "compacter_jax/py.typed")
    check_contents(names, (*package, f"{stem}.dist-info/licenses/LICENSE"), wheel.name)
    check(stem == f"compacter_jax-{cj.__version__}", f"{stem} is not of version {cj.__version__}")
    data = [n for n in names if "dist-info/" not in n and not n.endswith((".py", "/py.typed"))]
    check(not data, f"{wheel.name} should have modules alone, not {data}")
    extra = {name.split("/")[0] for name in names} - {"compacter_jax", f"{stem}.dist-info"}
    check(not extra, f"{wheel.name} should not have {extra}")
    with tarfile.open(sdist) as archive:
        names = [name.removeprefix(f"{stem}/") for name in archive.getnames()]
    files = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md")
    check_contents(names, (*package, *files), sdist.name)


def check_installed() -> None:
    check(Path(cj.__file__).is_relative_to(sys.prefix), f"imported {cj.__file__}, not the wheel")
    found = [name for name in NOT_REQUIRED if importlib.util.find_spec(name)]
    check(not found, f"the environment should not have {found}")


def check_forward() -> None:
    config = cj.BertConfig(
        vocab_size=11,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=8,
    )
    module = cj.Bert(config, head="sequence_classification", num_labels=2)
    ids, mask = jnp.ones((3, 5), jnp.int32), jnp.ones((3, 5), jnp.int32)
    params = module.init(jax.random.key(0), ids, mask)["params"]
    backbone = cj.Backbone(module=module, params=params, config=config, name="tiny")
    method = cj.preset("compacter++", reduction_factor=4)
    model = cj.Adapted(module, method)
    params = cj.init_adapters(model, backbone, jax.random.key(1))
    logits = model.apply({"params": params}, ids, mask)
    check(logits.shape == (3, 2), f"logits have the shape {logits.shape}, not (3, 2)")
    check(bool(jnp.isfinite(logits).all()), f"logits are not finite: {logits}")
    trained = cj.count(params, cj.label_params(params, method)).trained
    print(f"logits {logits.shape}, {trained} parameters to train, Python {sys.version.split()[0]}")
    print(f"JAX {jax.__version__}, compacter_jax {cj.__version__} from {Path(cj.__file__).parent}")


if __name__ == "__main__":
    check_archives(Path(sys.argv[1]))
    check_installed()
    check_forward()
