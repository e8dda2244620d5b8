"""Compares compositions with those of AdapterHub's `adapters`, with the same weights."""

import numpy as np
import pytest

pytest.importorskip("adapters")
from adapters import DoubleSeqBnConfig, LoRAConfig, SeqBnConfig
from adapters import composition as theirs

from compacter_jax.banks import set_member
from compacter_jax.compositions.average import Average
from compacter_jax.compositions.parallel import Parallel
from compacter_jax.compositions.stack import Stack
from compacter_jax.exchange.adapterhub import import_adapterhub
from compacter_jax.inject.adapted import Adapted
from compacter_jax.inject.initial import init_adapters
from tests.exchange.test_adapterhub import (
    BACKBONES,
    CLASSES,
    assert_equal_logits,
    hub_logits,
    hub_model,
    phm,
    randomise,
)
from tests.helpers import IDS, MASK, quick_key
from tests.hosts import run


def seq_bn():
    return SeqBnConfig(reduction_factor=3)


def their_average(*members):
    # adapters 1.3 divides the weighted sum by the number of members.
    return theirs.Average(*members, weights=[2 * 0.3, 2 * 0.7], normalize_weights=False)


def our_average(*methods, names):
    return Average(*methods, names=names, weights=(0.3, 0.7))


CASES = {
    "stack": (theirs.Stack, Stack, (seq_bn, phm)),
    "stack of placements": (theirs.Stack, Stack, (DoubleSeqBnConfig, seq_bn)),
    "average": (their_average, our_average, (seq_bn, seq_bn)),
    "average of LoRA": (their_average, our_average, (LoRAConfig, LoRAConfig)),
    "parallel": (theirs.Parallel, Parallel, (phm, phm)),
}


@pytest.mark.parametrize("name", CASES)
def test_equal_logits(name, tmp_path):
    their_kind, our_kind, configs = CASES[name]
    backbone = BACKBONES["bert"]
    hub = hub_model(backbone, CLASSES["bert"])
    sources = {}
    for seed, (member, config) in enumerate(zip("ab", configs, strict=True)):
        hub.add_adapter(member, config=config())
        randomise(hub, seed, names=f".{member}.")
        hub.save_adapter(tmp_path / member, member)
        sources[member] = import_adapterhub(tmp_path / member, backbone)
    hub.set_active_adapters(their_kind("a", "b"))
    expected = hub_logits(hub.eval(), [IDS, MASK])
    methods = [model.method for model, _ in sources.values()]
    model = Adapted(backbone.module, our_kind(*methods, names=("a", "b")))
    params = init_adapters(model, backbone, quick_key(0))
    for member, source in sources.items():
        params = set_member(model, params, member, source)
    actual = run(model, params, IDS, MASK)
    assert_equal_logits(np.concatenate(actual) if our_kind is Parallel else actual, expected)
