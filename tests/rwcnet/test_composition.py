"""What RWCNet makes of its stages' fields and hidden states: composed exactly, cut and joined without seams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rwcnet_net.network import StageState
from small_rwcnet import VARIANTS, Stub, cut, noise, positions, small, smooth_noise, whole
from torch import Tensor

from common.geometry.fields import compose

SHAPE = (16, 24, 16)


class Affine:
    """A field that is an affine function of the place: what trilinear interpolation and averaging keep exactly."""

    def __init__(self, seed: int, scale: float = 0.06) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.matrix = scale * (2 * torch.rand(3, 3, generator=generator) - 1)
        self.shift = 2 * torch.rand(3, generator=generator) - 1

    def __call__(self, points: Tensor) -> Tensor:
        """(1, 3, D, H, W) -> the same."""
        return torch.einsum("xc,bcijk->bxijk", self.matrix, points) + self.shift.view(1, 3, 1, 1, 1)


def at_next_stage(field: Any, ratio: int = 2) -> Any:
    """The same field as a function of the voxels of a finer stage: centres, not corners, lie over one another."""
    return lambda points: ratio * field((points - (ratio - 1) / 2) / ratio)


def composed(prior: Any, own: Any) -> Any:
    return lambda points: own(points) + prior(points + own(points))


class TestComposition:
    """Stand-ins for the sub-networks return known fields; what the network makes of them can be worked out."""

    @pytest.mark.parametrize("overlap", [0, 4])
    @pytest.mark.parametrize("stages", [2, 3])
    def test_fields_are_composed_exactly(self, stages: int, overlap: int) -> None:
        shape = (32, 40, 36)
        own = [Affine(seed) for seed in range(3)]
        network = small(patches=(1, 2, (2, 3, 1)), overlap=overlap)
        network.train_stage(stages - 1)
        Stub(network, lambda patch: cut(own[patch.stage](positions(patch_shape(patch))), patch.box))

        def patch_shape(patch: Any) -> list[int]:
            return [n // network.scales[patch.stage] for n in shape]

        expected = composed(at_next_stage(own[0]), own[1])
        expected = composed(at_next_stage(expected), own[2]) if stages == 3 else at_next_stage(expected)
        inner = (..., *(slice(10, -10),) * 3)  # beyond the border the field is repeated
        exact = expected(positions(shape))
        torch.testing.assert_close(network(noise(1, 2, *shape))[inner], exact[inner], atol=2e-4, rtol=0)
        # the test tells composing from adding, and from composing in the other order
        summed = at_next_stage(at_next_stage(own[0]))(positions(shape)) + at_next_stage(own[1])(positions(shape))
        summed = summed + own[2](positions(shape)) if stages == 3 else summed
        assert (summed - exact)[inner].abs().max() > 0.03

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_displacements_grow_with_the_resolution(self, variant: Any) -> None:
        shifts = [torch.tensor(v).view(1, 3, 1, 1, 1) for v in ((1.0, 0.0, -0.5), (0.0, 2.0, 0.25), (0.125, 1.0, 3.0))]
        network = small(variant=variant)
        Stub(network, lambda patch: shifts[patch.stage].expand(1, 3, *patch.fixed.shape[2:]))
        expected = [4 * shifts[0], 4 * shifts[0] + 2 * shifts[1], 4 * shifts[0] + 2 * shifts[1] + shifts[2]]
        for field, exact in zip(network.forward_sequence(noise(1, 2, *SHAPE)), expected, strict=True):
            torch.testing.assert_close(field, exact.expand_as(field), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("overlap", [0, 2])
    def test_the_moving_image_is_warped_as_a_whole_and_then_cut(self, variant: Any, overlap: int) -> None:
        shape, shift = (16, 16, 24), (1.0, -1.0, 2.0)
        image = noise(1, 2, *shape)
        network = small(variant=variant, scales=(2, 1), steps=(1, 1), radii=(1, 1), patches=(1, 2), overlap=overlap)
        constant = torch.tensor(shift).view(1, 3, 1, 1, 1)
        stub = Stub(network, lambda patch: constant.expand(1, 3, *patch.fixed.shape[2:]) * (patch.stage == 0))
        network(image)
        moving, fixed = image[:, :1], image[:, 1:]
        expected = torch.zeros_like(moving)  # moving(p + (2, -2, 4)), and nothing beyond the border
        expected[..., :-2, 2:, :-4] = moving[..., 2:, :-2, 4:]
        patches = stub.of_stage(1)
        assert len(patches) == 8
        for patch in patches:
            torch.testing.assert_close(patch.moving, cut(expected, patch.box), atol=1e-5, rtol=0)
            assert torch.equal(patch.fixed, cut(fixed, patch.box))
        # what lies two voxels beyond a patch's end has come in
        first = patches[0]
        size = first.box[0].stop
        torch.testing.assert_close(
            first.moving[..., size - 1, 2:, :4], moving[..., size + 1, : first.moving.shape[3] - 2, 4:8]
        )

    def test_what_a_stage_sees_is_averaged_or_picked(self) -> None:
        image = noise(1, 2, *SHAPE)
        for variant, expected in (("paper", F.avg_pool3d(image, 4)), ("published", image[..., ::4, ::4, ::4])):
            network = small(variant=variant)
            stub = Stub(network, lambda patch: torch.zeros(1, 3, *patch.fixed.shape[2:]))
            network(image)
            seen = stub.of_stage(0)[0]
            assert torch.equal(torch.cat([seen.moving, seen.fixed], 1), expected)
            assert seen.hidden is None and seen.prior is None

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("overlap", [0, 3])
    @pytest.mark.parametrize(
        ("scales", "patches"), [((2, 1), ((2, 1, 2), 3)), ((4, 1), (1, (2, 3, 2))), ((4, 2, 1), (1, 2, (4, 2, 1)))]
    )
    def test_hidden_states_are_those_of_the_whole(
        self, scales: tuple[int, ...], patches: Any, overlap: int, variant: Any
    ) -> None:
        """Upsampled within the patch alone, yet equal to the upsampled whole, cut."""
        shape, stages = (24, 16, 32), len(scales)
        network = small(
            variant=variant, scales=scales, steps=(1,) * stages, radii=(1,) * stages, patches=patches, overlap=overlap
        )
        hiddens = [noise(1, 8, *(n // scale for n in shape), seed=s) for s, scale in enumerate(scales)]
        stub = Stub(network, lambda patch: torch.zeros(1, 3, *patch.fixed.shape[2:]), whole(hiddens))
        network(noise(1, 2, *shape))
        mode = "nearest" if variant == "published" else "trilinear"
        for stage in range(1, stages):
            expected = F.interpolate(hiddens[stage - 1], size=hiddens[stage].shape[2:], mode=mode)
            for patch in stub.of_stage(stage):
                assert patch.hidden is not None
                torch.testing.assert_close(patch.hidden, cut(expected, patch.box), atol=1e-6, rtol=0)

    @pytest.mark.parametrize("overlap", [0, 2, 8])
    def test_no_seams_in_a_smooth_field(self, overlap: int) -> None:
        """Made patch by patch from where the patch lies, in two stages, it is the field of the whole."""
        shape = (24, 28, 32)
        fields = [4 * (smooth_noise(3, [n // s for n in shape], 12, s) - 0.5) for s in (4, 2, 1)]
        network, single = small(patches=(1, 2, 3), overlap=overlap), small(patches=(1, 1, 1))
        image = noise(1, 2, *shape)
        for one in (network, single):
            Stub(one, whole(fields))
        torch.testing.assert_close(network(image), single(image), atol=1e-5, rtol=0)
        # the comparison sees a seam: a patch at another place shows
        Stub(network, lambda patch: whole(fields)(patch) + 0.1 * (patch.box[0].start > 0))
        assert (network(image) - single(image)).abs().max() > 0.05

    def test_the_last_state_of_a_stage_is_the_whole_one(self) -> None:
        """`estimate` hands on composed fields and joined hidden states, also of a stage in patches."""
        shape = (16, 16, 16)
        fields = [smooth_noise(3, [n // s for n in shape], 8, s) for s in (4, 2, 1)]
        hiddens = [noise(1, 8, *(n // s for n in shape), seed=s) for s in (4, 2, 1)]
        network = small(overlap=0)
        Stub(network, whole(fields), whole(hiddens))
        state = network.estimate(noise(1, 2, *shape), 2)
        assert isinstance(state, StageState)
        assert torch.equal(state.hidden, hiddens[1])
        prior = 2 * F.interpolate(fields[0], scale_factor=2, mode="trilinear")
        torch.testing.assert_close(state.ddf, compose(prior, fields[1]), atol=1e-5, rtol=0)
