"""The spread of mirrored answers by values known beforehand, and its way into the files of a registration."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from known_pair import Known
from matplotlib.image import imread
from monai.data import MetaTensor
from torch import Tensor

from common.geometry.spaces import Grid
from common.inference import PaddedInferer, Registration, TakeUncertaintyd, load_pair, mirrored_spread

SHAPE = (6, 9, 7)
MAPS = {"uncertainty.nii.gz", "uncertainty_levels.nii.gz"}


def pair(shape: Sequence[int] = SHAPE, batch: int = 2) -> Tensor:
    return torch.rand(batch, 2, *shape, generator=torch.Generator().manual_seed(0))


def gradient(image: Tensor) -> Tensor:
    """Central differences of the two images' difference: turns round with the axis that is mirrored."""
    difference = (image[:, :1] - image[:, 1:])[:, 0]
    return torch.stack([difference.roll(-1, axis) - difference.roll(1, axis) for axis in (1, 2, 3)], dim=1)


def constant(image: Tensor, *displacement: float) -> Tensor:
    return image.new_tensor(displacement).view(1, 3, 1, 1, 1).expand(image.shape[0], 3, *image.shape[2:])


class TestMirroredSpread:
    def test_nothing_where_mirrored_pairs_get_mirrored_answers(self) -> None:
        ddf, spread = mirrored_spread(lambda image: [2 * gradient(image), gradient(image)], pair())
        assert torch.equal(ddf, gradient(pair()))
        assert spread.shape == (2, 2, *SHAPE)
        assert not spread.any()

    def test_an_answer_that_never_turns_round(self) -> None:
        """Four answers, of which one has the other sign along each axis: sqrt(3 / 4) of the length."""
        ddf, spread = mirrored_spread(lambda x: [constant(x, 1, 2, -2), constant(x, 0, -4, 0)], pair())
        torch.testing.assert_close(ddf, constant(pair(), 0, -4, 0))
        torch.testing.assert_close(spread[:, 0], torch.full((2, *SHAPE), 3 * 0.75**0.5))
        torch.testing.assert_close(spread[:, 1], torch.full((2, *SHAPE), 4 * 0.75**0.5))

    def test_by_hand(self) -> None:
        """Any estimator; every copy mirrored, answered and mirrored back here."""
        weight = torch.randn(3, 2, 3, 3, 3, generator=torch.Generator().manual_seed(1))

        def estimate(image: Tensor) -> list[Tensor]:
            field = torch.nn.functional.conv3d(image, weight, padding=1)
            return [field, field**2, torch.sin(field)]

        ddf, spread = mirrored_spread(estimate, pair())
        answers = []
        for axis in (None, 0, 1, 2):
            copy = pair() if axis is None else pair().flip(axis + 2)
            answer = torch.stack(estimate(copy), 1)
            if axis is not None:
                answer = answer.flip(axis + 3)
                answer[:, :, axis] *= -1
            answers.append(answer.double())
        expected = torch.stack(answers).var(0, correction=0).sum(2).sqrt()
        torch.testing.assert_close(spread.double(), expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(ddf, estimate(pair())[-1])
        assert float(spread.std()) > 0.1

    def test_small_against_a_large_displacement(self) -> None:
        """A mean of squares less a square of the mean would have lost it."""

        def estimate(image: Tensor) -> list[Tensor]:
            axes = [torch.arange(float(n)) - (n - 1) / 2 for n in image.shape[2:]]
            place = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]
            return [100 * place + 0.01]

        _, spread = mirrored_spread(estimate, pair(batch=1))
        torch.testing.assert_close(spread, torch.full_like(spread, 0.015), atol=1e-4, rtol=0)

    def test_other_mirrors(self) -> None:
        """Both axes at once, an answer that knows only one of them."""

        def estimate(image: Tensor) -> list[Tensor]:
            return [gradient(image) * torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1, 1) + constant(image, 0, 0, 2)]

        assert not mirrored_spread(estimate, pair(), mirrors=[(), (2, 3), (3,)])[1].any()
        _, spread = mirrored_spread(estimate, pair(), mirrors=[(), (2, 4)])
        torch.testing.assert_close(spread, torch.full_like(spread, 2.0))

    def test_half_precision_answers_are_taken_in_float32(self) -> None:
        ddf, spread = mirrored_spread(lambda image: [constant(image, 0, 3, 0).half()], pair())
        assert ddf.dtype == spread.dtype == torch.float32

    def test_no_answer_at_all(self) -> None:
        with pytest.raises(ValueError, match="at least one answer"):
            mirrored_spread(lambda image: [gradient(image)], pair(), mirrors=[])


class Network:
    """Two fields, of which the second one never turns round and follows the image."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def forward_sequence(self, image: Tensor) -> list[Tensor]:
        self.shapes.append(tuple(image.shape))
        return [gradient(image), torch.cat([image, image[:, :1]], 1)]

    def __call__(self, image: Tensor) -> Tensor:
        return self.forward_sequence(image)[-1]


class TestPaddedInferer:
    @pytest.mark.parametrize("shape", [(33, 47, 31), (5, 48, 32), (32, 32, 32)])
    def test_pads_and_crops_the_maps_as_well(self, shape: tuple[int, int, int]) -> None:
        image, network = pair(shape, 1), Network()
        result = PaddedInferer(multiple=16, uncertainty=True)(image, network)
        assert result.shape == (1, 3 + 2, *shape)
        assert len(network.shapes) == 4
        assert set(network.shapes) == {(1, 2, *(max(32, -(-n // 16) * 16) for n in shape))}
        assert torch.equal(result[:, :3], PaddedInferer(multiple=16)(image, network))
        assert result[:, 4].min() > 0

    def test_maps_lie_where_the_field_does(self) -> None:
        """Nothing but one voxel is not 0; three voxels of padding before it and four after it move nothing."""
        image = torch.zeros(1, 2, 32, 32, 25)
        image[0, :, 5, 6, 20] = 1.0
        found = PaddedInferer(multiple=16, uncertainty=True)(image, Network())[0, 4]
        assert found.nonzero().tolist() == [[5, 6, 20]]
        assert float(found[5, 6, 20]) == pytest.approx(1.5)


class TestTakeUncertainty:
    GRID = Grid((4, 5, 6), np.diag([2.5, 2.5, 2.5, 1.0]))

    @pytest.mark.parametrize("batched", [True, False])
    @pytest.mark.parametrize("kind", [MetaTensor, torch.Tensor.clone])
    def test_parts_the_field_from_the_maps(self, batched: bool, kind: Callable[[Tensor], Tensor]) -> None:
        answer = torch.rand(3 + 2, 4, 5, 6)
        data = {"pred": kind(answer[None] if batched else answer), "network_grid": self.GRID, "other": 1}
        result = TakeUncertaintyd()(data)
        assert torch.equal(result["pred"], answer[:3])
        torch.testing.assert_close(result["uncertainty"], 2.5 * answer[3:])
        assert not isinstance(result["pred"], MetaTensor)
        assert result["other"] == 1 and data["pred"].shape[-4] == 5  # the item itself stays as it was

    def test_a_field_alone_stays_as_it_is(self) -> None:
        pred = torch.rand(1, 3, 4, 5, 6)
        result = TakeUncertaintyd()({"pred": pred, "network_grid": self.GRID})
        assert result["pred"] is pred
        assert "uncertainty" not in result


class TestRegistration:
    def test_maps_are_brought_to_the_fixed_grid(self, known: Known, tmp_path: Path) -> None:
        """What is linear in space stays so, level by level; beyond the network's last centres the border goes on."""
        scans = load_pair(known.write(tmp_path), modality="mr")
        network_grid = scans.fixed_grid.with_spacing(4.0)
        slopes = np.array([[0.02, -0.01, 0.03], [-0.01, 0.02, 0.01]])

        def linear(grid: Grid) -> np.ndarray:
            place = grid.to_physical(np.indices(grid.shape).reshape(3, -1).T) - [20.0, -30.0, 40.0]
            return (5 + slopes @ place.T).reshape(2, *grid.shape)

        uncertainty = torch.from_numpy(linear(network_grid)).float()
        still = torch.zeros(3, *network_grid.shape)
        options: dict[str, Any] = {"fixed_to_moving": np.eye(4), "ddf": still, "network_grid": network_grid}
        maps = Registration(scans, **options, uncertainty=uncertainty).uncertainty
        assert maps is not None and maps.shape == (2, *scans.fixed_grid.shape)
        inner = (slice(None), *(slice(3, -3),) * 3)
        np.testing.assert_allclose(maps[inner], linear(scans.fixed_grid)[inner], atol=1e-3)
        assert maps.min() >= float(uncertainty.min()) - 1e-4 and maps.max() <= float(uncertainty.max()) + 1e-4
        assert Registration(scans, **options).uncertainty is None


class TestCommand:
    def test_writes_maps_where_asked_for(self, known: Known, tmp_path: Path, register: Callable[..., None]) -> None:
        files = {key: path for key, path in known.write(tmp_path).items() if key in ("fixed", "moving")}
        options: dict[str, Any] = {**files, "instance_optimization": 0, "network_def#iterations": [1, 1, 1, 1]}
        for name, asked in (("with", True), ("without", False)):
            register(**options, output_dir=str(tmp_path / name), uncertainty=asked, report=asked)
        written = {name: {path.name for path in (tmp_path / name).iterdir()} for name in ("with", "without")}
        assert written["with"] - written["without"] == MAPS | {"report.png"}
        assert written["without"] < written["with"]

        fixed = sitk.ReadImage(files["fixed"])
        fine = sitk.ReadImage(str(tmp_path / "with" / "uncertainty.nii.gz"))
        assert fine.GetSize() == fixed.GetSize() and fine.GetNumberOfComponentsPerPixel() == 1
        for ours, theirs in (
            (fine.GetOrigin(), fixed.GetOrigin()),
            (fine.GetSpacing(), fixed.GetSpacing()),
            (fine.GetDirection(), fixed.GetDirection()),
        ):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
        values = sitk.GetArrayFromImage(fine).transpose(2, 1, 0)
        assert np.isfinite(values).all() and values.min() >= 0 and values.std() > 1e-3
        levels = nib.load(tmp_path / "with" / "uncertainty_levels.nii.gz")
        assert levels.shape == (*known.fixed_grid.shape, 5)  # a step at each of four levels, and the last convolution
        np.testing.assert_array_equal(levels.get_fdata(dtype=np.float32)[..., -1], values)
        np.testing.assert_allclose(levels.affine, nib.load(files["fixed"]).affine, atol=1e-4)

        metrics = {name: json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("with", "without")}
        figures = metrics["with"].pop("uncertainty_mm")
        assert figures["mean"] == pytest.approx(values.mean(), rel=1e-3)
        assert figures["max"] == pytest.approx(values.max(), rel=1e-3)
        assert "uncertainty_mm" not in metrics["without"]
        # the field is the one of the pair itself
        assert metrics["with"]["deformation"] == metrics["without"]["deformation"]
        assert metrics["with"]["similarity"] == metrics["without"]["similarity"]
        assert imread(tmp_path / "with" / "report.png").shape[1] > 2400  # three columns more than the usual 1800
