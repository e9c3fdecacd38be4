"""Backbones can be told apart in every chart: by colours, also to the colour-blind and in grey prints, by markers."""

from itertools import combinations

import numpy as np
import pytest

from backbones import BACKBONES
from bench.analysis import looks

# Machado, Oliveira and Fernandes 2009, "A Physiologically-based Model for Simulation of Color Vision Deficiency", table
# 1, at full severity: linear RGB as it is seen.
SIGHTS = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
WHITE = [0.95047, 1.0, 1.08883]


def lab(colour: str, sight: str = "normal") -> np.ndarray:
    """CIELAB of "#rrggbb", in which a distance of 2.3 is just noticed."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.asarray(SIGHTS[sight]) @ linear, 0, 1)
    t = np.asarray(TO_XYZ) @ seen / WHITE
    x, y, z = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_the_simulated_sights_confuse_what_is_known_to_be_confused():
    assert lab("#ffffff") == pytest.approx([100, 0, 0], abs=0.01)
    apart = {sight: np.linalg.norm(lab("#c00000", sight) - lab("#606000", sight)) for sight in SIGHTS}  # red and olive
    assert apart["normal"] > 60 > 2 * apart["deuteranopia"]
    for sight in SIGHTS:
        assert lab("#808080", sight) == pytest.approx(lab("#808080"), abs=0.1)  # greys stay as they are


@pytest.mark.parametrize("sight", SIGHTS)
def test_named_backbones_are_far_apart_in_every_sight(sight):
    for a, b in combinations(looks.LOOKS, 2):
        colours = [lab(looks.LOOKS[name][0], sight) for name in (a, b)]
        assert np.linalg.norm(np.subtract(*colours)) > 30, f"{a} and {b}"


def test_named_backbones_differ_in_lightness_and_show_on_white_and_on_black():
    lightness = sorted(lab(colour)[0] for colour, _ in looks.LOOKS.values())
    assert min(np.diff(lightness)) > 5
    assert lightness[0] > 30
    assert lightness[-1] < 75


def test_a_new_backbone_takes_the_next_look_and_shifts_nobody():
    assert {*looks.LOOKS} == {"cnn", "convnext", "vit", "mamba", "bimamba", "hybrid"} == {*BACKBONES}
    more = looks.looks_for(["new", *BACKBONES, "newer"])
    assert {name: more[name] for name in looks.LOOKS} == looks.LOOKS
    assert (more["new"], more["newer"]) == looks.FURTHER[:2]
    every = [*looks.LOOKS.values(), *looks.FURTHER]
    for kind in zip(*every, strict=True):
        assert len({*kind}) == len(every)
    many = [f"new{i}" for i in range(len(looks.FURTHER) + 1)]
    assert looks.looks_for(many)[many[-1]] == looks.FURTHER[0]


def test_an_axis_does_not_blow_up_a_small_difference():
    axes = looks.new_figure(2).subplots()
    axes.plot([1000.0, 1000.6], [-0.4, -0.4001])
    looks.least_span(axes)
    for low, high in (axes.get_xlim(), axes.get_ylim()):
        assert high - low == pytest.approx(looks.SPAN * max(abs(low), abs(high)), rel=0.05)
    assert axes.get_xlim() == pytest.approx((975, 1026), abs=1)
    wide = looks.new_figure(2).subplots()
    wide.plot([0, 1], [1.0, 2.0])
    before = wide.get_xlim(), wide.get_ylim()
    looks.least_span(wide)
    assert (wide.get_xlim(), wide.get_ylim()) == before
    logarithmic = looks.new_figure(2).subplots()
    logarithmic.set(xscale="log", xlim=(1.0, 1.001))
    looks.least_span(logarithmic)
    assert logarithmic.get_xlim() == (1.0, 1.001)
