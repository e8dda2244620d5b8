"""How often each task of a mixture gives a batch."""

import numpy as np
import pytest

from train.mixture import Mixture, parse


@pytest.mark.parametrize(
    ("text", "sizes", "expected"),
    [
        ("temperature=1", [100, 300], [0.25, 0.75]),
        ("temperature=2", [100, 400], [1 / 3, 2 / 3]),
        ("limit=100", [50, 1000, 100], [0.2, 0.4, 0.4]),
        ("temperature=2,limit=900", [100, 100_000], [0.25, 0.75]),
        (" limit=1 , temperature=7 ", [3, 9], [0.5, 0.5]),
        ("temperature=10", [392_702, 2_490], [0.623886, 0.376114]),
    ],
)
def test_rates(text, sizes, expected):
    np.testing.assert_allclose(parse(text).rates(sizes), expected, atol=5e-6)


def test_order_has_the_rates_and_depends_on_its_arguments_alone():
    mixture = Mixture(temperature=2)
    order = mixture.order([100, 400, 900], 6000, seed=3, epoch=1)
    # Rates 1/6, 2/6, 3/6: four standard deviations of 6,000 draws are below 160.
    np.testing.assert_allclose(np.bincount(order), [1000, 2000, 3000], atol=160)
    again = mixture.order([100, 400, 900], 6000, seed=3, epoch=1)
    np.testing.assert_array_equal(order, again)
    for other in ({"seed": 4, "epoch": 1}, {"seed": 3, "epoch": 2}):
        assert (mixture.order([100, 400, 900], 6000, **other) != order).any()
    np.testing.assert_array_equal(mixture.order([7], 3, seed=0, epoch=0), [0, 0, 0])


@pytest.mark.parametrize(
    "text", ["", "10", "temperature", "temperature=hot", "temperature=2,temperature=3", "scale=2"]
)
def test_what_is_no_mixture(text):
    with pytest.raises(ValueError, match="must be temperature=NUMBER, limit=NUMBER"):
        parse(text)


def test_numbers_out_of_range():
    with pytest.raises(ValueError, match=r"temperature=0.5 of --mixture must be at least 1"):
        parse("temperature=0.5")
    with pytest.raises(ValueError, match="limit=0 of --mixture must be at least 1"):
        parse("limit=0")
