"""Two processes with two devices each train like one process with four devices, or with one."""

import functools

import jax
import numpy as np
import pytest

from benchmarks import devices
from train.cli.options import HostOptions
from train.compute import distributed


@pytest.fixture(scope="module")
def hosts_results():
    return devices.launch(devices.Arrangement(processes=2, devices=2))


@functools.cache
def alone(dropout, number):
    return devices.train(dropout, jax.devices()[:number])


@pytest.mark.parametrize(("dropout", "number"), [(0.0, 1), (0.0, 4), (0.1, 4)])
def test_two_hosts_give_the_losses_of_one(hosts_results, dropout, number):
    expected = alone(dropout, number)
    for result in hosts_results:
        for name in ("losses", "gradient_norms"):
            np.testing.assert_allclose(
                result[str(dropout)][name], expected[name], rtol=0, atol=devices.LIMIT
            )


def test_hosts_build_their_own_rows_alone(hosts_results):
    first, second = (result["0.0"]["examples"] for result in hosts_results)
    assert len(first) == 12  # from batches of 8, 8 and 4 examples
    assert sorted(first + second) == list(range(20))


def test_hosts_evaluate_alone(hosts_results):
    for result in hosts_results:
        np.testing.assert_allclose(result["0.0"]["logits"], alone(0.0, 1)["logits"], rtol=1e-6)


def test_one_process_joins_nobody():
    distributed.start(HostOptions())
    assert (distributed.index(), distributed.number(), distributed.is_first()) == (0, 1, True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_processes": 2}, "--coordinator-address, --process-id must be given, too"),
        ({"coordinator_address": "a:1", "num_processes": 0, "process_id": 0}, "num_processes=0"),
        ({"distributed": True, "num_processes": 2, "process_id": 2}, "process_id=2 must be from 0"),
    ],
)
def test_flags_that_do_not_go_together(flags, message):
    with pytest.raises(ValueError, match=message):
        distributed.start(HostOptions(**flags))
