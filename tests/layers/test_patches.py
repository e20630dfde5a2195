"""Cutting a volume and joining it again, at the sizes that RWCNet publishes and at awkward ones."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from common.layers.patches import PatchGrid

PUBLISHED = [
    ((80, 112, 96), (40, 56, 48)),  # OASIS at 1/2
    ((160, 224, 192), (80, 112, 96)),  # OASIS
    ((112, 96, 112), (56, 48, 56)),  # NLST at 1/2
    ((224, 192, 224), (112, 96, 112)),  # NLST
]
AWKWARD = [
    {"shape": (37, 41, 29), "patches": (2, 2, 2), "overlap": 0},
    {"shape": (37, 41, 29), "patches": (2, 2, 2), "overlap": 8},
    {"shape": (37, 41, 29), "patches": (3, 1, 4), "overlap": 8},
    {"shape": (36, 52, 36), "patches": (2, 2, 2), "overlap": 0, "multiple": 2},
    {"shape": (36, 52, 36), "patches": (2, 2, 2), "overlap": 8, "multiple": 2},
    {"shape": (36, 52, 36), "patches": (3, 5, 2), "overlap": 3, "multiple": 2},
    {"shape": (8, 12, 4), "patches": (2, 3, 2), "overlap": 8, "multiple": 4},  # the overlap is the volume
    {"shape": (5, 4, 1), "patches": (9, 2, 3), "overlap": 0},  # more patches than voxels
    {"shape": (20, 9, 16), "patches": (6, 3, 4), "overlap": 6},  # three patches meet at one voxel
]


def rand(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def windows(grid: PatchGrid) -> list[Tensor]:
    """Weight of each patch, in its own voxels."""
    found = []
    for i, box in enumerate(grid.boxes):
        one = [torch.full((1, 1, *grid.size), float(i == j)) for j in range(len(grid.boxes))]
        found.append(grid.join(one)[(..., *box)][0, 0])
    return found


def largest_jump(volume: Tensor) -> float:
    """Between neighbouring voxels."""
    return max(float(volume.diff(dim=axis).abs().max()) for axis in (2, 3, 4))


class TestPublishedTiles:
    @pytest.mark.parametrize(("shape", "size"), PUBLISHED)
    def test_without_overlap_the_tiles_are_the_published_ones(
        self, shape: tuple[int, int, int], size: tuple[int, int, int]
    ) -> None:
        grid = PatchGrid(shape, patches=(2, 2, 2), overlap=0, multiple=2)
        assert grid.size == size
        # row-major: the last axis changes fastest
        corners = [tuple(n * i for n, i in zip(size, index, strict=True)) for index in product((0, 1), repeat=3)]
        assert [tuple(side.start for side in box) for box in grid.boxes] == corners
        assert all(tuple(side.stop - side.start for side in box) == size for box in grid.boxes)

    @pytest.mark.parametrize("overlap", [0, 8])
    @pytest.mark.parametrize("shape", [(160, 224, 192), (224, 192, 224)])
    def test_cut_and_join_is_the_identity(self, shape: tuple[int, int, int], overlap: int) -> None:
        volume = rand(1, 1, *shape)
        grid = PatchGrid(shape, patches=(2, 2, 2), overlap=overlap, multiple=2)
        joined = grid.join(grid.cut(volume))
        assert (joined - volume).abs().max() <= (0 if overlap == 0 else 1e-6)


@pytest.mark.parametrize("options", AWKWARD, ids=str)
class TestAnyGrid:
    def test_cut_and_join_is_the_identity(self, options: dict) -> None:
        volume = rand(2, 3, *options["shape"])
        grid = PatchGrid(**options)
        patches = grid.cut(volume)
        assert all(patch.shape == (2, 3, *grid.size) for patch in patches)
        torch.testing.assert_close(grid.join(patches), volume, atol=2e-6, rtol=0)

    def test_weights_add_up_to_one_and_are_positive(self, options: dict) -> None:
        grid = PatchGrid(**options)
        total = grid.join([torch.ones(1, 1, *grid.size) for _ in grid.boxes])
        torch.testing.assert_close(total, torch.ones(1, 1, *options["shape"]), atol=1e-6, rtol=0)
        assert all(float(window.min()) > 0 and float(window.max()) < 1 + 1e-6 for window in windows(grid))

    def test_starts_and_sizes_are_multiples(self, options: dict) -> None:
        multiple = options.get("multiple", 1)
        grid = PatchGrid(**options)
        for starts, size, n in zip(grid.starts, grid.size, options["shape"], strict=True):
            assert all(start % multiple == 0 for start in starts) and size % multiple == 0
            assert starts[0] == 0 and starts[-1] + size == n
            assert starts == sorted(set(starts))


class TestOverlap:
    @pytest.mark.parametrize("multiple", [1, 2, 4])
    @pytest.mark.parametrize("count", [2, 3, 4, 5])
    def test_neighbours_share_at_least_the_overlap(self, count: int, multiple: int) -> None:
        for n in range(multiple, 64, multiple):
            for overlap in range(10):
                grid = PatchGrid((n, 4, 4), patches=(count, 1, 1), overlap=overlap, multiple=multiple)
                size = grid.size[0]
                shared = [first + size - second for first, second in pairwise(grid.starts[0])]
                assert min(shared, default=n) >= min(overlap, n), (n, overlap, grid.starts[0], size)

    def test_no_larger_than_needed(self) -> None:
        assert PatchGrid((80, 112, 96), patches=(2, 2, 2), overlap=8, multiple=2).size == (44, 60, 52)
        assert PatchGrid((40, 40, 40), patches=(4, 1, 2), overlap=4).size == (13, 40, 22)

    @pytest.mark.parametrize("overlap", [0, 2, 8])
    def test_what_patches_disagree_on_is_spread(self, overlap: int) -> None:
        """Each patch is off by a constant of its own: a step at the border without overlap, a slope with it."""
        constants = torch.tensor([0.0, 1.0, 0.3, 0.8, 0.9, 0.1, 0.6, 0.2])
        shape = (24, 20, 28)
        grid = PatchGrid(shape, patches=(2, 2, 2), overlap=overlap, multiple=2)
        joined = grid.join([torch.full((1, 1, *grid.size), float(c)) for c in constants])
        table = constants.view(1, 1, 2, 2, 2)
        disagreement = largest_jump(table)
        assert joined[0, 0, 0, 0, 0] == 0.0 and float(joined[0, 0, -1, -1, -1]) == pytest.approx(0.2)
        if overlap == 0:
            assert largest_jump(joined) == pytest.approx(disagreement)
        else:
            assert largest_jump(joined) <= 1.01 * disagreement / overlap

    def test_a_patch_fades_in_from_its_first_voxel(self) -> None:
        """Half a step at both ends, so that the slope goes on evenly into the other patch."""
        grid = PatchGrid((12, 2, 2), patches=(2, 1, 1), overlap=4)
        joined = grid.join([torch.zeros(1, 1, *grid.size), torch.ones(1, 1, *grid.size)])
        expected = torch.tensor([0, 0, 0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1, 1, 1])
        torch.testing.assert_close(joined[0, 0, :, 0, 0], expected)


class TestJoin:
    def test_is_differentiable(self) -> None:
        grid = PatchGrid((12, 8, 8), patches=(2, 1, 1), overlap=4)
        patches = [torch.zeros(1, 1, *grid.size, requires_grad=True) for _ in grid.boxes]
        grid.join(patches).sum().backward()
        for patch, window in zip(patches, windows(grid), strict=True):
            assert patch.grad is not None
            torch.testing.assert_close(patch.grad[0, 0], window)

    def test_keeps_the_type(self) -> None:
        grid = PatchGrid((8, 8, 8), patches=(2, 1, 1), overlap=4)
        patches = [torch.ones(1, 1, *grid.size, dtype=torch.bfloat16) for _ in grid.boxes]
        assert grid.join(patches).dtype == torch.bfloat16

    def test_a_single_patch_is_handed_through(self) -> None:
        volume = rand(1, 2, 5, 6, 7)
        grid = PatchGrid((5, 6, 7), patches=(1, 1, 1), overlap=8)
        assert torch.equal(grid.join(grid.cut(volume)), volume)

    def test_cutting_copies_nothing(self) -> None:
        volume = rand(1, 2, 8, 8, 8)
        patches = PatchGrid((8, 8, 8), patches=(2, 2, 2)).cut(volume)
        assert all(patch.untyped_storage().data_ptr() == volume.untyped_storage().data_ptr() for patch in patches)


class TestErrors:
    @pytest.mark.parametrize(
        "options",
        [
            {"shape": (8, 8), "patches": (1, 1, 1)},
            {"shape": (8, 8, 8), "patches": (1, 1)},
            {"shape": (8, 8, 8), "patches": (1, 0, 1)},
            {"shape": (8, 0, 8), "patches": (1, 1, 1)},
            {"shape": (8, 8, 8), "patches": (1, 1, 1), "multiple": 0},
            {"shape": (8, 8, 8), "patches": (1, 1, 1), "overlap": -1},
        ],
    )
    def test_impossible_numbers(self, options: dict) -> None:
        with pytest.raises(ValueError, match="cannot cut"):
            PatchGrid(**options)

    def test_a_size_that_is_no_multiple(self) -> None:
        with pytest.raises(ValueError, match=r"\(8, 9, 8\).*multiples of 2"):
            PatchGrid((8, 9, 8), patches=(1, 1, 1), multiple=2)

    def test_another_volume(self) -> None:
        grid = PatchGrid((8, 8, 8), patches=(2, 1, 1))
        with pytest.raises(ValueError, match=r"\(1, 1, 8, 8, 9\).*\(8, 8, 8\)"):
            grid.cut(torch.zeros(1, 1, 8, 8, 9))
