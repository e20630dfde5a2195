"""Training through the bundle's own config: continuing exactly, clipping, real scans; tiny sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_list import ROOT
from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow
from torch import nn
from training_runs import Training, assert_same, interrupt, part, tiny_training, trainer_of

from common.training import EpochSetter, GradientClipper, SequenceForward

BUNDLE = ROOT / "bundles" / "recorr"
TINY = tiny_training(BUNDLE)


@pytest.fixture
def training(workflow: Callable[..., ConfigWorkflow], tmp_path: Path) -> Training:
    def build(output: str = "out", **changes: Any) -> ConfigWorkflow:
        return workflow(BUNDLE, ["train"], "train", **{**TINY, "output_dir": str(tmp_path / output), **changes})

    return build


class TestResume:
    def test_continues_exactly(self, training: Training, tmp_path: Path) -> None:
        training("straight").run()
        # struck in the third epoch, when weights, optimiser and random numbers have moved on from what was saved
        interrupt(training("broken"), iteration=5)
        saved = torch.load(tmp_path / "broken" / "last.pt", weights_only=True)
        assert saved["trainer"]["iteration"] == 4
        torch.manual_seed(12345)  # another process would have other random numbers
        np.random.seed(5)
        resumed = training("broken", resume=True)
        resumed.run()
        assert trainer_of(resumed).state.iteration == 6

        straight, broken = (
            torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("straight", "broken")
        )
        assert_same(straight, broken)
        assert not all(
            torch.equal(value, saved["network"][key]) for key, value in straight["network"].items()
        )  # the third epoch did something
        assert straight["best"][0] is not None
        best = [torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("straight", "broken")]
        assert_same(*best)

    def test_keeps_the_best_figure(self, training: Training, tmp_path: Path) -> None:
        """A resumed run must not take its first validation for the best one."""
        interrupt(training(), iteration=5)
        path = tmp_path / "out" / "last.pt"
        state = torch.load(path, weights_only=True)
        state["best"] = [-1.0, 1]  # nothing beats this endpoint error
        torch.save(state, path)
        before = (tmp_path / "out" / "model.pt").read_bytes()
        training(resume=True).run()
        assert torch.load(path, weights_only=True)["best"] == [-1.0, 1]
        assert (tmp_path / "out" / "model.pt").read_bytes() == before

    def test_a_finished_training_stays_as_it_is(self, training: Training, tmp_path: Path) -> None:
        training(max_epochs=1).run()
        before = torch.load(tmp_path / "out" / "last.pt", weights_only=True)
        assert list((tmp_path / "out").glob("events.out.tfevents.*"))
        again = training(max_epochs=1, resume=True)
        again.run()
        assert_same(torch.load(tmp_path / "out" / "last.pt", weights_only=True), before)

    def test_of_another_length_is_refused_where_the_learning_rate_was_planned(
        self, training: Training, tmp_path: Path
    ) -> None:
        training(max_epochs=1).run()
        before = (tmp_path / "out" / "last.pt").read_bytes()
        with pytest.raises(SystemExit) as caught:
            training(max_epochs=2, resume=True).run()
        assert "planned for 1 epochs: resume with --max_epochs 1, or start anew" in str(caught.value.code)
        assert (tmp_path / "out" / "last.pt").read_bytes() == before

    def test_without_a_checkpoint(self, training: Training, tmp_path: Path) -> None:
        with pytest.raises(SystemExit) as caught:
            training(resume=True).run()
        assert caught.value.code == f"error: there is nothing to resume: {tmp_path / 'out' / 'last.pt'} does not exist"

    @pytest.mark.parametrize("damage", ["truncated", "text", "empty", "weights alone", "a list", "another network"])
    def test_a_damaged_checkpoint(self, training: Training, tmp_path: Path, damage: str) -> None:
        path = tmp_path / "out" / "last.pt"
        path.parent.mkdir()
        weights = BUNDLE / "models" / "model.pt"
        if damage == "truncated":
            path.write_bytes(weights.read_bytes()[:100_000])
        elif damage == "text":
            path.write_text("epoch 7\n")
        elif damage == "empty":
            path.touch()
        elif damage == "weights alone":
            path.write_bytes(weights.read_bytes())
        elif damage == "a list":
            torch.save([1, 2, 3], path)
        else:
            torch.save({"network": nn.Linear(2, 2).state_dict()}, path)
        with pytest.raises(SystemExit) as caught:
            training(resume=True).run()
        message = str(caught.value.code)
        assert message.startswith(f"error: the checkpoint {path} does not fit this training or is damaged")
        assert "\n" not in message

    @pytest.mark.slow
    def test_in_a_process_of_its_own(self, training: Training, tmp_path: Path) -> None:
        training("straight").run()
        interrupt(training("broken"), iteration=5)
        command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "bundles/recorr/configs/train.json"]
        changes = {**TINY, "output_dir": tmp_path / "broken", "resume": True}
        for key, value in changes.items():
            command += [f"--{key}", str(value)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        straight, broken = (
            torch.load(tmp_path / name / "last.pt", weights_only=True)["network"] for name in ("straight", "broken")
        )
        for key, value in straight.items():
            torch.testing.assert_close(broken[key], value, atol=1e-6, rtol=1e-4)


class TestRun:
    def test_learns(self, training: Training, tmp_path: Path) -> None:
        """Two epochs of one and the same pair bring the loss down."""
        losses: list[float] = []
        run = training(max_epochs=4, learning_rate=2e-3)
        data = part(run, "train#dataset")
        data.set_epoch = lambda epoch: None
        trainer_of(run).add_event_handler(
            Events.ITERATION_COMPLETED, lambda engine: losses.append(float(engine.state.output["loss"].detach()))
        )
        run.run()
        assert len(losses) == 8
        assert losses[-2] < losses[0]
        assert losses[-1] < losses[1]

    def test_initial_weights_are_used(self, training: Training, tmp_path: Path) -> None:
        weights = BUNDLE / "models" / "model.pt"
        run = training(max_epochs=1, initial_weights=str(weights), learning_rate=1e-12)
        run.run()
        expected = torch.load(weights, weights_only=True)
        state = torch.load(tmp_path / "out" / "last.pt", weights_only=True)["network"]
        assert state.keys() == expected.keys()
        for key, value in state.items():
            if "num_batches" not in key and "running" not in key:
                torch.testing.assert_close(value, expected[key], atol=1e-9, rtol=0)

    def test_missing_initial_weights(self, training: Training, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match=r"^error: the weights .*none\.pt do not exist$"):
            training(initial_weights=str(tmp_path / "none.pt")).run()

    def test_the_output_folder_is_checked_before_training(
        self, training: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """While MONAI builds the handlers, which write there; the config's hook prints what ended the program."""
        (tmp_path / "file").write_text("")
        with pytest.raises(RuntimeError) as caught:
            training("file/out").run()
        sys.excepthook(caught.type, caught.value, caught.tb)
        assert capsys.readouterr().err == (
            f"error: {tmp_path}/file/out cannot be used for results: {tmp_path}/file is a file\n"
        )

    def test_supervision_that_pairs_cannot_give(self, training: Training, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match=r"^error: training .*'fixed_keypoints' is missing$"):
            training(landmark_weight=1.0).run()
        assert not (tmp_path / "out" / "model.pt").exists()

    def test_on_labelled_scans(self, training: Training, tmp_path: Path) -> None:
        folder = decathlon(tmp_path / "data")
        run = training(dataset_dir=str(folder), validation=2, label_weight=1.0, labels=[1, 2], max_epochs=1)
        before = {key: value.clone() for key, value in part(run, "network").state_dict().items()}
        dices: list[float] = []
        evaluator = part(run, "validate#evaluator")
        evaluator.add_event_handler(
            Events.EPOCH_COMPLETED, lambda engine: dices.append(float(engine.state.metrics["dice"]))
        )
        losses: list[float] = []
        trainer_of(run).add_event_handler(
            Events.ITERATION_COMPLETED, lambda engine: losses.append(float(engine.state.output["loss"].detach()))
        )
        run.run()
        assert len(losses) == 2 and all(np.isfinite(losses))
        assert len(dices) == 1 and 0.2 < dices[0] < 1
        state = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
        assert any(not torch.equal(value, before[key]) for key, value in state.items())


def decathlon(folder: Path) -> Path:
    """Five labelled scans: two balls at slightly different places; shapes and spacings differ."""
    entries = []
    for n in range(5):
        entry = {"image": f"./imagesTr/scan_{n}.nii.gz", "label": f"./labelsTr/scan_{n}.nii.gz"}
        shape, spacing = (24 + n, 26, 22), np.array([1.0, 1.2, 1.1 + 0.1 * n])
        x = (np.moveaxis(np.indices(shape), 0, -1) - (np.array(shape) - 1) / 2) * spacing
        label = np.zeros(shape, np.uint8)
        label[np.linalg.norm(x - [n % 3 - 5, 0, 0], axis=-1) < 6] = 1
        label[np.linalg.norm(x - [6, n % 2, 1], axis=-1) < 5] = 2
        image = 100 * label + 10 * np.random.default_rng(n).random(shape)
        affine = np.diag([*spacing, 1.0])
        for key, array in (("image", image.astype(np.float32)), ("label", label)):
            (folder / entry[key]).parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, affine), folder / entry[key])
        entries.append(entry)
    (folder / "dataset.json").write_text(json.dumps({"name": "balls", "training": entries}))
    return folder


class TestGradientClipper:
    @pytest.mark.parametrize(("gradient", "expected"), [([3.0, 4.0], 2.0), ([0.3, 0.4], 0.5)])
    def test_limits_the_norm_and_keeps_the_direction(self, gradient: list[float], expected: float) -> None:
        network = nn.Linear(2, 1, bias=False)
        network.weight.grad = torch.tensor([gradient])
        GradientClipper(network, max_norm=2.0)(SimpleNamespace(amp=False, scaler=None))
        assert float(network.weight.grad.norm()) == pytest.approx(expected, rel=1e-4)
        assert float(network.weight.grad[0, 0] / network.weight.grad[0, 1]) == pytest.approx(0.75)

    def test_unscales_before_it_clips(self) -> None:
        network = nn.Linear(2, 1, bias=False)
        network.weight.grad = torch.tensor([[300.0, 400.0]])  # the loss scaled by 1000

        class Scaler:
            def unscale_(self, optimizer: Any) -> None:
                assert network.weight.grad is not None
                network.weight.grad /= 1000

        GradientClipper(network, max_norm=2.0)(SimpleNamespace(amp=True, scaler=Scaler(), optimizer=None))
        assert float(network.weight.grad.norm()) == pytest.approx(0.5)

    def test_acts_between_backward_and_step(self, training: Training) -> None:
        norms: list[float] = []
        run = training(max_epochs=1, max_gradient_norm=1e-3)
        network = part(run, "network")
        optimizer = part(run, "optimizer")

        def record(*_: Any) -> None:
            norms.append(float(torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm()))

        optimizer.register_step_pre_hook(record)
        run.run()
        assert norms == pytest.approx([1e-3, 1e-3], rel=1e-3)


def test_epoch_setter_tells_the_coming_epoch() -> None:
    told: list[int] = []
    setter = EpochSetter(SimpleNamespace(set_epoch=told.append))  # type: ignore[arg-type]
    engine = Engine(lambda e, batch: None)
    setter.attach(engine)
    engine.run([0, 1], max_epochs=3)
    assert told == [1, 1, 2, 3]  # before the first batch is fetched, then at each epoch


def test_sequence_forward_gives_training_all_fields_and_validation_the_last() -> None:
    class Network(nn.Module):
        def forward_sequence(self, image: torch.Tensor) -> list[torch.Tensor]:
            return [image, image + 1]

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image + 1

    wrapped = SequenceForward(Network())
    image = torch.zeros(1)
    assert [float(field) for field in wrapped(image)] == [0.0, 1.0]
    assert float(wrapped.eval()(image)) == 1.0
