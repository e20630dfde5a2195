import math
from itertools import product

import monai.metrics
import numpy as np
import pytest
import torch

from common.metrics import (
    dice_macro,
    dice_micro,
    dice_per_label,
    hd95,
    hd95_per_label,
    surface_distance_percentile,
)
from common.metrics.overlap import _surfel_areas

SHAPE = (9, 11, 14)
GRID = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"))


def _ellipsoid(centre, radii):
    return (((GRID - np.reshape(centre, (3, 1, 1, 1))) / np.reshape(radii, (3, 1, 1, 1))) ** 2).sum(axis=0) <= 1


def _random_labels(shape=SHAPE, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 5, shape), generator.integers(0, 5, shape)


def test_dice_per_label_by_hand():
    fixed, warped = _random_labels()
    expected = {
        k: 2 * ((fixed == k) & (warped == k)).sum() / ((fixed == k).sum() + (warped == k).sum()) for k in (1, 3)
    }
    assert dice_per_label(fixed, warped, [1, 3]) == pytest.approx(expected)
    assert dice_macro(fixed, warped, [1, 3]) == pytest.approx(np.mean(list(expected.values())))


@pytest.mark.parametrize("shape", [SHAPE, (5, 4, 17)])
def test_dice_equals_monai(shape):
    fixed, warped = _random_labels(shape)
    oracle = monai.metrics.DiceMetric(num_classes=5, include_background=False, reduction="mean")
    oracle(torch.from_numpy(warped)[None, None], torch.from_numpy(fixed)[None, None])
    assert dice_macro(torch.from_numpy(fixed)[None, None], warped) == pytest.approx(oracle.aggregate().item(), abs=1e-6)


def test_dice_micro_weighs_by_volume():
    fixed, warped = np.zeros((2, *SHAPE), dtype=np.uint8)
    fixed[:5] = warped[:5] = 1
    fixed[8, 0, 0] = 7
    warped[8, 0, 1] = 7
    large = 5 * 11 * 14
    assert dice_macro(fixed, warped) == pytest.approx(0.5)
    assert dice_micro(fixed, warped) == pytest.approx(2 * large / (2 * large + 2))
    assert dice_micro(fixed, warped, [7]) == 0
    assert math.isnan(dice_micro(fixed, warped, [3]))


def test_missing_labels():
    fixed, warped, moving = np.zeros((3, *SHAPE), dtype=np.int16)
    fixed[2:4, 2:4, 2:4] = 1
    fixed[6:8, 6:8, 6:8] = 2
    warped[2:4, 2:4, 2:4] = 1
    warped[0, 0, 0] = 3
    moving[...] = 1
    scores = dice_per_label(fixed, warped)
    assert scores[1] == 1
    assert scores[2] == 0
    assert math.isnan(scores[3])
    assert dice_macro(fixed, warped) == pytest.approx(0.5)
    assert dice_macro(fixed, warped, moving=moving) == 1  # label 2 is not in the moving image, so nobody's fault
    assert math.isnan(dice_macro(fixed, warped, [3]))
    distances = hd95_per_label(fixed, warped)
    assert distances[1] == 0
    assert distances[2] == math.inf
    assert math.isnan(distances[3])
    assert hd95(fixed, warped) == math.inf
    assert hd95(fixed, warped, moving=moving) == 0
    assert all(type(v) is float for v in (*scores.values(), *distances.values()))


def test_label_maps_that_cannot_be():
    fixed, warped = _random_labels()
    with pytest.raises(ValueError, match="different shapes"):
        dice_macro(fixed, warped[1:])
    with pytest.raises(ValueError, match="not integers"):
        dice_macro(fixed, warped + 0.5)
    with pytest.raises(ValueError, match="negative"):
        hd95(fixed, warped - 9)
    with pytest.raises(ValueError, match="one volume"):
        dice_macro(np.stack([fixed, fixed]), np.stack([warped, warped]))
    assert dice_macro(fixed, warped.astype(np.float64)) == dice_macro(fixed, warped)


# Printed by compute_robust_hausdorff(compute_surface_distances(a, b, (1, 1, 1)), p) of surface-distance 0.1 (DeepMind).
REFERENCE = {
    "ellipsoids": {50: 1.0, 80: 1.4142135623730951, 95: 2.0, 100: 3.0},
    "at the border": {50: 8.18535277187245, 80: 9.848857801796104, 95: 10.816653826391969, 100: 12.206555615733702},
    "a distant speck": {50: 0.0, 80: 0.0, 95: 0.0, 100: 5.830951894845301},
    "comb": {50: 1.0, 80: 2.0, 95: 3.0, 100: 3.605551275463989},
}
MASKS = {
    "ellipsoids": (_ellipsoid((4, 5, 6), (3, 4, 5)), _ellipsoid((4.5, 6, 8), (3.2, 3, 5.5))),
    "at the border": (_ellipsoid((0, 0, 0), (5, 6, 7)), _ellipsoid((8, 10, 13), (6, 5, 7))),
    "a distant speck": (
        _ellipsoid((4, 5, 6), (3, 4, 5)),
        _ellipsoid((4, 5, 6), (3, 4, 5)) | _ellipsoid((0, 0, 13), (0.5, 0.5, 0.5)),
    ),
    "comb": (
        (GRID[0] > 2) & (GRID[1] > 3) & (GRID[2] < 9),
        (GRID[0] > 3) & (GRID[1] > 1) & (GRID[2] < 12) & ((GRID[2] + GRID[1]) % 3 > 0),
    ),
}


@pytest.mark.parametrize("name", REFERENCE)
@pytest.mark.parametrize("percentile", [50, 80, 95, 100])
def test_surface_distances_equal_the_reference_package(name, percentile):
    a, b = MASKS[name]
    assert surface_distance_percentile(a, b, percentile) == pytest.approx(REFERENCE[name][percentile], abs=1e-12)
    assert surface_distance_percentile(b, a, percentile) == pytest.approx(REFERENCE[name][percentile], abs=1e-12)


def test_hd95_selects_labels():
    fixed, warped = np.zeros((2, *SHAPE), dtype=np.uint8)
    fixed[MASKS["ellipsoids"][0]], warped[MASKS["ellipsoids"][1]] = 4, 4
    assert hd95_per_label(fixed, warped) == {4: 2.0}
    fixed[0, 0, 0] = warped[0, 0, 0] = 9
    assert hd95(fixed, warped) == 1.0


def test_distance_of_shifted_boxes():
    fixed, warped = np.zeros((2, *SHAPE), dtype=np.uint8)
    fixed[2:6, 2:6, 2:6] = 1
    warped[2:6, 2:6, 5:9] = 1
    assert hd95(fixed, warped) == 3.0
    assert math.isnan(surface_distance_percentile(fixed == 2, warped == 2))


def test_surfel_table():
    """Sum and values of surface-distance's own table for unit spacing, and its symmetries."""
    areas = _surfel_areas()
    assert areas.sum() == pytest.approx(241.34313970553745, abs=1e-10)
    values = sorted({round(float(a), 4) for a in areas})
    assert values == [0.0, 0.2165, 0.433, 0.6495, 0.7071, 0.866, 0.9236, 1.0, 1.1495, 1.299, 1.366, 1.4142, 1.5731]
    corners = list(product((0, 1), repeat=3))
    for code in range(256):
        assert areas[code] == pytest.approx(areas[255 - code])
        inside = {c for bit, c in enumerate(corners) if code >> bit & 1}
        mirrored = {(1 - k, i, j) for i, j, k in inside}  # a rotation and a reflection
        assert areas[sum(1 << corners.index(c) for c in mirrored)] == pytest.approx(areas[code])


def test_area_of_a_box():
    """Faces flat, edges and corners cut: 6 faces of (n-1)^2, 12 edges of (n-1) / sqrt(2), 8 corner triangles."""
    from common.metrics.overlap import _surfels

    n = 5
    _, areas = _surfels(np.ones((n, n, n), dtype=bool))
    expected = 6 * (n - 1) ** 2 + 12 * (n - 1) / math.sqrt(2) + 8 * math.sqrt(3) / 8
    assert areas.sum() == pytest.approx(expected)
