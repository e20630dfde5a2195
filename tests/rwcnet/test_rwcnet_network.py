"""RWCNet as a whole: the published sizes, its options, what goes in and comes out, its weights."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rwcnet_net import RWCNet
from small_rwcnet import VARIANTS, Stub, count, cut, lively, noise, small, smooth_noise
from torch import Tensor

from common.layers.correlation import correlation_offsets

SHAPE = (16, 24, 16)  # of `image`


class TestPublishedSizes:
    def test_whole_network(self) -> None:
        network = RWCNet()
        assert count(network) == 9_293_312
        assert network.stride == 4
        assert network.steps == (12, 12, 4)

    def test_published_patches(self) -> None:
        network = RWCNet(variant="published", overlap=0)
        for full, stages in (
            ((160, 224, 192), [((40, 56, 48), 1, (40, 56, 48)), ((80, 112, 96), 8, (40, 56, 48))]),
            ((224, 192, 224), [((56, 48, 56), 1, (56, 48, 56)), ((112, 96, 112), 8, (56, 48, 56))]),
        ):
            for stage, (shape, tiles, size) in enumerate([*stages, (full, 8, tuple(n // 2 for n in full))]):
                assert tuple(n // network.scales[stage] for n in full) == shape
                grid = network.patch_grid(stage, shape)
                assert (len(grid.boxes), grid.size) == (tiles, size)


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"variant": "public"}, "paper or published, not 'public'"),
            ({"features": "edges"}, "intensity or mind, not 'edges'"),
            ({"scales": (4, 2)}, "each stage has a scale"),
            ({"radii": (1, 1)}, "each stage has a scale"),
            ({"patches": (1, 2, 2, 2)}, "each stage has a scale"),
            ({"scales": (), "steps": (), "radii": (), "patches": ()}, "each stage has a scale"),
            ({"scales": (1, 2, 4)}, r"from coarse to fine, got \[1, 2, 4\]"),
            ({"scales": (4, 4, 1)}, "from coarse to fine"),
            ({"scales": (4, 3, 1)}, "from coarse to fine"),
            ({"steps": (1, 0, 1)}, r"positive, got \[4, 2, 1\] and \[1, 0, 1\]"),
            ({"scales": (2, 1, 0)}, "positive"),
        ],
    )
    def test_impossible_options_are_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            small(**options)


@pytest.mark.usefixtures("shallow_encoders")
class TestForward:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_is_the_last_of_the_sequence(self, variant: Any, image: Tensor) -> None:
        network = lively(variant=variant)
        with torch.no_grad():
            sequence = network.forward_sequence(image)
            assert torch.equal(network(image), sequence[-1])
        assert [tuple(field.shape) for field in sequence] == [(1, 3, *SHAPE)] * 3
        assert all(field.dtype == torch.float32 and torch.isfinite(field).all() for field in sequence)
        assert all(float((a - b).abs().max()) > 0.05 for a, b in pairwise(sequence))

    def test_sizes_that_no_patch_divides(self) -> None:
        network = lively(overlap=4)
        with torch.no_grad():
            field = network(noise(1, 2, 36, 52, 36))
        assert field.shape == (1, 3, 36, 52, 36)
        assert torch.isfinite(field).all()

    @pytest.mark.parametrize("shape", [(18, 16, 16), (16, 16, 21), (2, 16, 16)])
    def test_sizes_off_the_stride_are_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="stride 4") as caught:
            small()(torch.zeros(1, 2, *shape))
        assert str(shape) in str(caught.value)

    @pytest.mark.parametrize("shape", [(1, 1, 16, 16, 16), (1, 3, 16, 16, 16), (2, 16, 16, 16)])
    def test_other_inputs_are_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="B, 2, D, H, W"):
            small()(torch.zeros(shape))

    def test_an_estimate_needs_a_stage(self, image: Tensor) -> None:
        with pytest.raises(ValueError, match="at least one stage"):
            small().estimate(image, 0)

    def test_members_of_a_batch_do_not_meet(self) -> None:
        network = lively(patches=(1, 1, 1))
        pairs = torch.cat([smooth_noise(2, SHAPE, 4, seed) for seed in (0, 1)])
        with torch.no_grad():
            together = network(pairs)
            alone = torch.cat([network(pair[None]) for pair in pairs])
        torch.testing.assert_close(together, alone, atol=2e-4, rtol=1e-4)
        assert (together[0] - together[1]).abs().max() > 0.1

    def test_moving_is_channel_0(self, image: Tensor) -> None:
        network = small()
        stub = Stub(network, lambda patch: torch.zeros(1, 3, *patch.fixed.shape[2:]))
        network(image)
        last = stub.of_stage(2)[0]
        torch.testing.assert_close(last.moving, cut(image[:, :1], last.box), atol=1e-6, rtol=0)
        torch.testing.assert_close(last.fixed, cut(image[:, 1:], last.box), atol=1e-6, rtol=0)


@pytest.mark.usefixtures("shallow_encoders")
class TestWeights:
    def test_the_number_of_steps_is_free(self, image: Tensor) -> None:
        few = lively(patches=(1, 1, 1))
        many = small(steps=(3, 2, 4), patches=(1, 1, 1)).eval()
        many.load_state_dict(few.state_dict(), strict=True)
        with torch.no_grad():
            assert not torch.allclose(many(image), few(image), atol=1e-2)

    def test_number_of_trained_stages_travels_along(self, image: Tensor) -> None:
        source = lively(patches=(1, 1, 1))
        for trained in (1, 2, 3):
            source.train_stage(trained - 1)
            target = small(seed=5, patches=(1, 1, 1)).eval()
            assert target.stages_in_use == 3
            target.load_state_dict(source.state_dict(), strict=True)
            assert target.stages_in_use == trained
            with torch.no_grad():
                state = target.estimate(image, trained)
                assert len(target.forward_sequence(image)) == trained
                scale = (4, 2, 1)[trained - 1]
                assert state.ddf.shape[2:] == tuple(n // scale for n in SHAPE)
                upsampled = F.interpolate(state.ddf, size=SHAPE, mode="trilinear") * scale
                torch.testing.assert_close(target(image), upsampled)

    def test_weights_of_fewer_stages(self, image: Tensor) -> None:
        """Fill the first stages, and no other runs; weights that lack what they claim to have are refused."""
        source = lively(scales=(1,), steps=(1,), radii=(1,), patches=(1,))
        source.train_stage(0)
        target = small(seed=5, patches=(1, 1, 1)).eval()
        untouched = {name: value.clone() for name, value in target.stages[1].state_dict().items()}
        target.load_state_dict(source.state_dict())
        assert target.stages_in_use == 1
        for name, value in source.stages[0].state_dict().items():
            assert torch.equal(value, target.stages[0].state_dict()[name])
        assert all(torch.equal(value, target.stages[1].state_dict()[name]) for name, value in untouched.items())
        with pytest.raises(RuntimeError, match=r"Missing key.*stages\.1"):
            target.load_state_dict({**source.state_dict(), "trained_stages": torch.tensor(2)})

    def test_training_a_stage_again_forgets_no_other(self) -> None:
        network = small()
        assert (network.stages_in_use, network.stage_in_training) == (3, None)  # none has any training: all
        for stage, in_use in ((0, 1), (1, 2), (0, 2), (2, 3), (1, 3)):
            network.train_stage(stage)
            assert (network.stages_in_use, network.stage_in_training) == (in_use, stage)

    def test_a_stage_copied(self, image: Tensor) -> None:
        """A narrower window takes the weights of the offsets that it has."""
        network = small(radii=(2, 2, 1))
        network.copy_stage(0, 1)
        network.copy_stage(1, 2)
        first, second, third = (stage.state_dict() for stage in network.stages)
        name = "update_block.motion_encoder.correlation.0.weight"
        assert all(torch.equal(value, second[key]) for key, value in first.items())
        assert all(torch.equal(value, third[key]) for key, value in first.items() if key != name)
        wide, narrow = (correlation_offsets(radius, "whd") for radius in (2, 1))
        for channel, offset in enumerate(narrow):
            assert torch.equal(third[name][:, channel], first[name][:, wide.index(offset)])
        with torch.no_grad():  # copied, not shared
            next(network.stages[0].parameters()).add_(1)
        assert not torch.equal(next(network.stages[0].parameters()), next(network.stages[1].parameters()))
        with pytest.raises(ValueError, match=r"3\^3 voxels do not fill one of 5\^3"):
            network.copy_stage(2, 0)

    @pytest.mark.parametrize("stage", [0, 1, 2])
    def test_only_one_stage_is_trained(self, stage: int) -> None:
        network = small(dropout=0.5).train()
        network.train_stage((stage + 1) % 3)
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        network.train_stage(stage)
        for index, subnetwork in enumerate(network.stages):
            assert all(parameter.requires_grad is (index == stage) for parameter in subnetwork.parameters())
            # Adam moves what has a gradient, be it 0
            assert all((parameter.grad is not None) is (index == stage) for parameter in subnetwork.parameters())

    @pytest.mark.parametrize("stage", [0, 1, 2])
    def test_dropout_is_for_the_stage_in_training(self, stage: int, image: Tensor) -> None:
        network = lively(dropout=0.5)
        network.train_stage(stage)

        def twice_the_same(index: int) -> bool:
            shape = (8, 8, 8)
            results = []
            with torch.no_grad():
                for _ in range(2):
                    sequence, _ = network.stages[index](cut_to(shape, image), cut_to(shape, image**2), steps=1)
                    results.append(sequence[-1])
            return torch.equal(*results)

        assert all(twice_the_same(index) for index in range(3))  # as it is for use
        network.train()
        assert [twice_the_same(index) for index in range(3)] == [index != stage for index in range(3)]
        network.eval()
        assert all(twice_the_same(index) for index in range(3))
        network.train()
        assert not twice_the_same(stage)

    def test_no_dropout(self, image: Tensor) -> None:
        network = lively(dropout=0.0, patches=(1, 1, 1)).train()
        with torch.no_grad():
            assert torch.equal(network(image), network(image))


def cut_to(shape: tuple[int, ...], image: Tensor) -> Tensor:
    return image[(slice(None), slice(0, 1), *(slice(0, n) for n in shape))]
