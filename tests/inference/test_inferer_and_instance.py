"""Padding, the choice of the network grid, and instance optimisation."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from known_pair import OBLIQUE
from torch import Tensor

import common.inference.inferer as module
from common.errors import InputError
from common.geometry.fields import jacobian_determinant
from common.geometry.spaces import Grid
from common.inference import PaddedInferer, SequenceInferer, choose_network_grid, optimize_instance
from common.inference.instance import have_one_contrast
from common.layers.warp import warp
from common.losses import GradientLoss


def smooth(shape: tuple[int, ...], channels: int, scale: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, channels, *(max(2, n // scale + 1) for n in shape), generator=generator)
    return F.interpolate(coarse, size=shape, mode="trilinear", align_corners=True)


class Recorder:
    """A network whose field is its input, moving, fixed, moving."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.inputs: Tensor = torch.zeros(0)

    def __call__(self, image: Tensor) -> Tensor:
        self.shapes.append(tuple(image.shape[2:]))
        self.inputs = image
        return torch.cat([image, image[:, :1]], 1)


class TestPaddedInferer:
    @pytest.mark.parametrize("shape", [(33, 47, 31), (5, 64, 40), (17, 1, 48)])
    def test_pads_to_the_stride_and_crops_back(self, shape: tuple[int, int, int]) -> None:
        image, network = torch.rand(1, 2, *shape), Recorder()
        ddf = PaddedInferer(multiple=16)(image, network)
        assert network.shapes == [tuple(max(32, -(-n // 16) * 16) for n in shape)]
        assert torch.equal(ddf, torch.cat([image, image[:, :1]], 1))  # no voxel moved

    def test_repeats_the_border_on_both_sides(self) -> None:
        image, network = torch.rand(1, 2, 32, 32, 29), Recorder()
        PaddedInferer(multiple=16)(image, network)
        before, after = network.inputs[..., 0], network.inputs[..., -1]
        assert torch.equal(before, image[..., 0]) and torch.equal(after, image[..., -1])
        assert torch.equal(network.inputs[..., 1:30], image)  # one before, two after

    def test_leaves_multiples_alone(self) -> None:
        image = torch.rand(1, 2, 32, 48, 64)
        network = Recorder()
        ddf = PaddedInferer(multiple=16)(image, network)
        assert network.inputs is image
        assert torch.equal(ddf, network(image))

    def test_needs_no_more_than_the_minimum_says(self) -> None:
        network = Recorder()
        PaddedInferer(multiple=8, minimum=8)(torch.rand(1, 2, 9, 3, 8), network)
        assert network.shapes == [(16, 8, 8)]

    def test_half_precision_is_for_gpus(self) -> None:
        def network(image: Tensor) -> Tensor:
            assert not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda")
            return image[:, [0, 1, 0]].half()

        ddf = PaddedInferer(multiple=16, amp=True)(torch.rand(1, 2, 32, 32, 32), network)
        assert ddf.dtype == torch.float32

    def test_sequences_come_from_the_networks_other_method(self) -> None:
        class Network:
            def forward_sequence(self, image: Tensor) -> list[Tensor]:
                return [image, image + 1]

        assert float(SequenceInferer()(torch.zeros(1), Network())[1]) == 1.0


class TestCoarsePasses:
    """With a network that finds a shift along the first axis of two ramps, but no more than two voxels of it."""

    SHAPE = (80, 72, 66)

    @staticmethod
    def near_sighted(image: Tensor) -> Tensor:
        moving, fixed = image[:, :1], image[:, 1:]
        slope = fixed.diff(dim=2).median()
        shift = ((fixed - moving).median() / slope).clamp(-2, 2)
        field = torch.zeros(1, 3, *image.shape[2:])
        field[:, 0] = shift
        return field

    def ramps(self, shift: float) -> Tensor:
        ramp = torch.arange(float(self.SHAPE[0])).view(-1, 1, 1).expand(self.SHAPE)
        return torch.stack([ramp, ramp + shift])[None]

    @pytest.mark.parametrize(
        ("shift", "passes", "found"), [(1.5, 0, 1.5), (1.5, 1, 1.5), (5, 0, 2), (5, 1, 5), (-5, 1, -5)]
    )
    def test_carry_the_reach_further(self, shift: float, passes: int, found: float) -> None:
        ddf = PaddedInferer(multiple=16, coarse_passes=passes)(self.ramps(shift), self.near_sighted)
        inner = ddf[0, :, 12:-12]
        torch.testing.assert_close(inner[0], torch.full_like(inner[0], found), atol=0.05, rtol=0)
        assert float(inner[1:].abs().max()) < 1e-4

    def test_coarsest_first_and_none_that_is_too_small(self) -> None:
        network = Recorder()
        image = torch.rand(1, 2, 160, 128, 70)
        PaddedInferer(multiple=1, coarse_passes=3)(image, network)
        assert network.shapes == [(80, 64, 35), (160, 128, 70)]  # a quarter of 70 voxels would be 18

    @pytest.mark.parametrize("passes", [-1, 0.5, True, "auto"])
    def test_are_a_number(self, passes: Any) -> None:
        with pytest.raises(InputError, match=r"^coarse_passes must be a whole number, 0 or more, got"):
            PaddedInferer(multiple=1, coarse_passes=passes)


def covers(network: Grid, fixed: Grid) -> bool:
    faces = np.stack(np.meshgrid(*[[-0.5, n - 0.5] for n in fixed.shape], indexing="ij"), -1).reshape(-1, 3)
    voxels = network.to_voxels(fixed.to_physical(faces))
    return bool((voxels >= -0.5 - 1e-5).all() and (voxels <= np.array(network.shape) - 0.5 + 1e-5).all())


choose = partial(choose_network_grid, bytes_per_voxel=1000.0)


class TestChooseNetworkGrid:
    @pytest.fixture(autouse=True)
    def _memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_free_bytes", lambda device: 8e9)

    def test_as_fine_as_the_fixed_image(self) -> None:
        fixed = Grid((120, 100, 110), OBLIQUE.affine)
        grid = choose(fixed)
        np.testing.assert_allclose(grid.spacing, (2.0 * 2.4 * 3.2) ** (1 / 3))
        np.testing.assert_allclose(grid.direction, fixed.direction, atol=1e-9)
        assert covers(grid, fixed)

    def test_finer_where_there_are_few_voxels(self) -> None:
        native = (2.0 * 2.4 * 3.2) ** (1 / 3)
        np.testing.assert_allclose(choose(OBLIQUE).spacing, native / 2)  # and no finer than that
        shortest = 36 * 2.4  # mm, of 88, 86.4 and 89.6
        some = choose(OBLIQUE, min_size=50)
        np.testing.assert_allclose(some.spacing, shortest / 50)
        assert min(some.shape) == 50 and covers(some, OBLIQUE)
        np.testing.assert_allclose(choose(OBLIQUE, min_size=30).spacing, native)

    def test_given_spacing(self) -> None:
        grid = choose(OBLIQUE, spacing=1.5)
        np.testing.assert_allclose(grid.spacing, 1.5)
        assert covers(grid, OBLIQUE)
        assert grid.shape == (59, 58, 60)  # 88 x 86.4 x 89.6 mm

    def test_no_more_voxels_than_allowed(self) -> None:
        grid = choose(OBLIQUE, max_voxels=10_000)
        assert 9_000 < np.prod(grid.shape) < 12_000  # the counts are rounded up
        assert covers(grid, OBLIQUE)
        assert np.ptp(grid.spacing) < 1e-9

    def test_half_of_the_memory(self) -> None:
        grid = choose_network_grid(OBLIQUE, bytes_per_voxel=400_000.0)  # 10,000 voxels
        assert 9_000 < np.prod(grid.shape) < 12_000

    def test_a_spacing_beyond_the_memory_is_refused(self) -> None:
        assert choose(OBLIQUE, spacing=0.5, max_voxels=100).shape == (176, 173, 180)  # the limit is ours
        with pytest.raises(InputError, match=r"0\.2 mm needs about 79\.\d GiB .*7\.5 GiB are free; .*larger spacing"):
            choose(OBLIQUE, spacing=0.2)

    @pytest.mark.parametrize("spacing", [0, -1.0, "fine", float("nan")])
    def test_impossible_spacing_is_refused(self, spacing: Any) -> None:
        with pytest.raises(InputError, match="positive number of mm"):
            choose(OBLIQUE, spacing=spacing)


class TestOptimizeInstance:
    SHAPE = (36, 32, 34)

    def pair(self, *, inverted: bool = False) -> tuple[Tensor, Tensor]:
        """Image (2, D, H, W) and the exact field (3, D, H, W), up to 3 voxels."""
        moving = smooth(self.SHAPE, 1, 4, 0)
        ddf = 6 * smooth(self.SHAPE, 3, 12, 1) - 3
        fixed = warp(moving, ddf)
        return torch.cat([moving, 1 - fixed if inverted else fixed], 1)[0], ddf[0]

    @staticmethod
    def error(ddf: Tensor, exact: Tensor) -> float:
        inner = (slice(None), *(slice(4, -4),) * 3)
        return float((ddf - exact)[inner].norm(dim=0).mean())

    @pytest.mark.parametrize(
        ("similarity", "inverted"), [("auto", False), ("auto", True), ("mind", False), ("mind", True), ("ncc", False)]
    )
    def test_recovers_a_deformation(self, similarity: Any, inverted: bool) -> None:
        image, exact = self.pair(inverted=inverted)
        start = torch.zeros_like(exact)
        refined = optimize_instance(image, start, iterations=40, similarity=similarity)
        assert not refined.requires_grad
        assert self.error(refined, exact) < 0.6 * self.error(start, exact)
        assert float(jacobian_determinant(refined[None]).min()) > 0

    def test_tells_one_contrast_from_two(self) -> None:
        for inverted in (False, True):
            image, exact = self.pair(inverted=inverted)
            assert have_one_contrast(image, exact) is not inverted

    def test_correlation_joins_for_one_contrast_only(self) -> None:
        for inverted in (False, True):
            image, exact = self.pair(inverted=inverted)
            auto, mind = (optimize_instance(image, 0 * exact, iterations=10, similarity=s) for s in ("auto", "mind"))
            assert torch.equal(auto, mind) is inverted

    def test_images_smaller_than_the_window(self) -> None:
        image, start = torch.rand(2, 24, 20, 4), torch.zeros(3, 24, 20, 4)
        assert optimize_instance(image, start, iterations=4).isfinite().all()

    def test_improves_a_start(self) -> None:
        image, exact = self.pair()
        start = exact + 1.0
        refined = optimize_instance(image, start, iterations=30)
        assert self.error(refined, exact) < 0.6 * self.error(start, exact)

    def test_keeps_an_exact_start(self) -> None:
        image, exact = self.pair()
        assert self.error(optimize_instance(image, exact, iterations=20), exact) < 0.7

    def test_no_iterations_change_nothing(self) -> None:
        image, exact = self.pair()
        assert torch.equal(optimize_instance(image, exact, iterations=0), exact)

    def test_smoothness_smooths(self) -> None:
        image, exact = self.pair()
        rough, even = (
            float(GradientLoss("l2")(optimize_instance(image, 0 * exact, iterations=15, smoothness=s)[None]))
            for s in (0.1, 20.0)
        )
        assert even < 0.5 * rough

    def test_works_under_no_grad(self) -> None:
        """MONAI's evaluator calls its postprocessing so."""
        image, exact = self.pair()
        with torch.no_grad():
            refined = optimize_instance(image, 0 * exact, iterations=5)
        assert refined.abs().max() > 0.1

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"iterations": -1}, "negative, got -1"),
            ({"similarity": "mi"}, "'mi' is unknown"),
            ({"learning_rate": -1}, "positive number, got -1"),
            ({"learning_rate": "2"}, "positive number, got '2'"),
        ],
    )
    def test_impossible_options_are_refused(self, options: dict[str, Any], message: str) -> None:
        image, exact = self.pair()
        with pytest.raises(InputError, match=message):
            optimize_instance(image, exact, **{"iterations": 1, **options})
