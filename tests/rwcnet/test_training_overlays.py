"""Training the stages with the config's overlays, and on scans, labels and key points from files; tiny sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from stage_runs import BUNDLE, record
from training_runs import Training, part, trainer_of

from common.losses import LocalNCC, MSELoss


@pytest.fixture
def plain(workflow: Callable[..., ConfigWorkflow], tmp_path: Path) -> Training:
    """A config as it is, nothing but the place of the results changed; all of it is built, nothing run."""

    def build(overlay: str | None) -> ConfigWorkflow:
        names = ["train", *([overlay] if overlay else [])]
        places = {"bundle_root": str(BUNDLE), "device": "cpu", "output_dir": str(tmp_path / "out")}
        run = workflow(BUNDLE, names, "train", **places)
        part(run, "training")
        return run

    return build


class TestOverlays:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "stages", "changes"),
        [
            ("ablation_no_correlation", 3, {"max_epochs": 3}),
            ("ablation_single_scale", 1, {"network_def#steps": [1], "network_def#radii": [1], "max_epochs": 1}),
            ("ablation_two_steps", 3, {"network_def#steps": [2, 2, 2], "max_epochs": 3}),
        ],
    )
    def test_ablations_train(
        self, training: Training, tmp_path: Path, name: str, stages: int, changes: dict[str, Any]
    ) -> None:
        run = training(overlay=name, epoch_length=1, **changes)
        rows = record(run)
        run.run()
        assert [row[1] for row in rows] == list(range(1, stages + 1))
        assert all(np.isfinite(row[2]) for row in rows)
        assert (tmp_path / "out" / f"stage_{stages}.pt").is_file()
        assert (tmp_path / "out" / "model.pt").is_file()

    def test_no_correlation(self, plain: Training) -> None:
        network = part(plain("ablation_no_correlation"), "network")
        assert [stage.correlation for stage in network.stages] == [None] * 3
        assert (network.scales, network.steps) == ((4, 2, 1), (12, 12, 4))

    def test_single_scale(self, plain: Training) -> None:
        run = plain("ablation_single_scale")
        network = part(run, "network")
        assert (network.scales, network.steps, network.stride) == ((4,), (12,), 4)
        assert network.stages[0].correlation.radius == 3
        assert part(run, "schedule").ends == [30]

    def test_two_steps(self, plain: Training) -> None:
        assert part(plain("ablation_two_steps"), "network").steps == (2, 2, 2)

    def test_hippocampus(self, plain: Training) -> None:
        run = plain("hippocampus")
        loss = part(run, "loss")
        assert isinstance(loss.similarity, MSELoss)
        assert (loss.similarity_weight, loss.smoothness_weight, loss.label_weight) == (10, 0.2, 1)
        assert loss.folding_weight == 200
        assert loss.soft_dice.labels == (1, 2)
        batch = part(run, "train#prepare_batch")
        assert (batch.labels, batch.spacing, batch.cache) == ([1, 2], [1.0, 1.0, 1.0], None)
        overlay = json.loads((BUNDLE / "configs" / "hippocampus.json").read_text())
        assert part(run, "network").steps == tuple(overlay["network_def#steps"])
        assert trainer_of(run).state.max_epochs == part(run, "schedule").ends[-1] == overlay["max_epochs"]
        assert all(n % 4 == 0 for n in run.parser["shape"])
        assert part(run, "val_metric") == "endpoint_error"  # without scans; with them the labels'

    @pytest.mark.parametrize(
        ("name", "shape", "steps"), [("oasis", [160, 224, 192], 135_000), ("nlst", [224, 192, 224], 135_000)]
    )
    def test_published_settings(self, plain: Training, name: str, shape: list[int], steps: int) -> None:
        run = plain(name)
        loss = part(run, "loss")
        assert isinstance(loss.similarity, MSELoss)
        assert (loss.similarity_weight, loss.smoothness_weight, loss.smoothness.penalty) == (10, 0.1, "l1")
        assert (loss.supervision, part(run, "train#inferer").sequence) == ("similarity", False)
        assert not part(run, "schedule").warm_start
        assert not any(stage.detach for stage in part(run, "network").stages)  # the last field answers for all steps
        assert run.parser["shape"] == shape
        assert run.parser["max_epochs"] * run.parser["epoch_length"] == pytest.approx(steps, rel=0.01)
        assert part(run, "lr_scheduler").lr_lambdas[0].policy == "constant"
        assert part(run, "optimizer").param_groups[0]["lr"] == 3e-4
        assert part(run, "network").steps == (12, 12, 4)
        if name == "oasis":
            assert loss.soft_dice.labels == tuple(range(1, 36))
            assert (loss.label_weight, loss.landmark_weight) == (1, 0)
        else:
            assert (loss.label_weight, loss.landmark_weight) == (0, 1)
            assert part(run, "train#prepare_batch").spacing == [1.5] * 3

    def test_by_default(self, plain: Training) -> None:
        run = plain(None)
        assert isinstance(part(run, "loss").similarity, LocalNCC)
        assert part(run, "train#inferer").sequence
        assert part(run, "schedule").warm_start
        assert all(stage.detach for stage in part(run, "network").stages)
        assert part(run, "loss").matching_weight == 0.5
        assert part(run, "train#prepare_batch").cache is None
        assert part(run, "schedule").ends == [7, 17, 30]


@pytest.mark.usefixtures("shallow_encoders")
class TestRealScans:
    @pytest.mark.slow
    @pytest.mark.parametrize("cache", [False, True])
    def test_with_labels(self, training: Training, tmp_path: Path, cache: bool) -> None:
        run = training(
            dataset_dir=str(two_balls(tmp_path / "data")),
            validation=2,
            labels=[1, 2],
            label_weight=1.0,
            spacing=2.0,
            cache_dir=str(tmp_path / "cache") if cache else None,
            shape=[20, 16, 16],
            **{"loss#similarity#window": 3},
        )
        rows = record(run)
        dices: list[float] = []
        part(run, "validate#evaluator").add_event_handler(
            Events.EPOCH_COMPLETED, lambda engine: dices.append(float(engine.state.metrics["dice"]))
        )
        run.run()
        assert [row[1] for row in rows] == [1, 1, 2, 2, 3, 3]
        assert all(np.isfinite(row[2]) for row in rows)
        assert len(dices) == 3 and all(0.2 < dice < 1 for dice in dices)
        assert len(list((tmp_path / "cache").glob("*.bin"))) == (4 if cache else 0)

    @pytest.mark.slow
    def test_with_key_points(self, training: Training, tmp_path: Path) -> None:
        """Two scans of a patient, whose key points correspond; the published settings for the lung."""
        folder = two_balls(tmp_path / "data")
        generator = np.random.default_rng(0)
        pairs = []
        for number in range(3):
            pair: dict[str, str] = {}
            for role, scan in (("fixed", number), ("moving", number + 1)):
                path = folder / f"points_{number}_{role}.csv"
                np.savetxt(path, generator.uniform(4, 18, (30, 3)), delimiter=",")
                pair |= {role: str(folder / "imagesTr" / f"scan_{scan}.nii.gz"), f"{role}_keypoints": str(path)}
            pairs.append(pair)
        run = training(
            landmark_weight=1.0,
            spacing=2.0,
            val_metric="tre_mm",
            **{
                "train#dataset#data": pairs[:2],
                "validate#dataset#data": pairs[2:],
                "loss#similarity": {"_target_": "common.losses.MSELoss"},
            },
        )
        rows = record(run)
        run.run()
        assert [row[1] for row in rows] == [1, 1, 2, 2, 3, 3]
        assert all(np.isfinite(row[2]) and row[2] > 1 for row in rows)


def two_balls(folder: Path) -> Path:
    """Four labelled scans, the balls a little elsewhere in each."""
    entries = []
    for n in range(4):
        entry = {"image": f"./imagesTr/scan_{n}.nii.gz", "label": f"./labelsTr/scan_{n}.nii.gz"}
        shape, spacing = (24 + n, 26, 22), np.array([1.5, 1.2, 1.3])
        x = (np.moveaxis(np.indices(shape), 0, -1) - (np.array(shape) - 1) / 2) * spacing
        label = np.zeros(shape, np.uint8)
        label[np.linalg.norm(x - [n % 3 - 6, 0, 0], axis=-1) < 7] = 1
        label[np.linalg.norm(x - [8, n % 2, 1], axis=-1) < 6] = 2
        image = 100 * label + 10 * np.random.default_rng(n).random(shape)
        for key, array in (("image", image.astype(np.float32)), ("label", label)):
            (folder / entry[key]).parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.diag([*spacing, 1.0])), folder / entry[key])
        entries.append(entry)
    (folder / "dataset.json").write_text(json.dumps({"name": "balls", "training": entries}))
    return folder
