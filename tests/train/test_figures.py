"""The look of all figures, and that a figure belongs to who drew it."""

import numpy as np
from matplotlib import image
from matplotlib import pyplot as plt

from train import figures


def test_a_figure_is_its_caller_s_alone(tmp_path):
    """A figure that is never saved is no open figure of `pyplot`; a saved one is a picture."""
    before = plt.get_fignums()
    figure, panels = figures.new_figure((4, 2), 1, 2, squeeze=False)
    assert panels.shape == (1, 2)
    assert not panels[0, 0].spines["top"].get_visible()
    assert plt.rcParams["axes.spines.top"]
    assert plt.get_fignums() == before
    panels[0, 1].plot([0, 1], [0, 1], color=figures.BLUE)
    figures.save(figure, tmp_path / "drawn.png")
    pixels = image.imread(tmp_path / "drawn.png")
    assert pixels.shape[:2] == (240, 480)
    blue = [int(figures.BLUE[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    assert np.isclose(pixels[..., :3], blue, atol=0.01).all(-1).any()
