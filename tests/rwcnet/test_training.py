"""Training the stages through the bundle's own config: continuing exactly, stage by stage, cached; tiny sizes."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from rwcnet_net import RWCNet
from small_rwcnet import noise
from stage_runs import record
from torch import Tensor
from training_runs import Training, assert_same, interrupt, part, trainer_of

Weights = dict[str, Tensor]


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def of_stage(weights: Weights, stage: int) -> Weights:
    return {name: value for name, value in weights.items() if name.startswith(f"stages.{stage}.")}


def same(first: Weights, second: Weights) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.usefixtures("shallow_encoders")
class TestStages:
    def test_run_one_after_the_other(self, training: Training, tmp_path: Path) -> None:
        run = training()
        rows = record(run)
        start = {name: value.clone() for name, value in part(run, "network").state_dict().items()}
        rates: list[float] = []
        optimizer = part(run, "optimizer")
        optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
        run.run()
        assert [row[:2] for row in rows] == [(1, 1), (1, 1), (2, 2), (2, 2), (3, 3), (3, 3)]
        assert all(np.isfinite(row[2]) for row in rows)
        # two steps a stage: at its beginning, and half way down
        assert rates == pytest.approx([5e-5, rates[1]] * 3)
        assert rates[1] > 5e-4

        stages = [load(tmp_path / "out" / f"stage_{n}.pt") for n in (1, 2, 3)]
        for stage in range(3):
            earlier = [start, *stages]
            for n in range(4):  # a stage's weights change in its own epoch alone, bit for bit
                assert same(of_stage(earlier[n], stage), of_stage(stages[2], stage)) is (n > stage)
        assert [int(weights["trained_stages"]) for weights in stages] == [1, 2, 3]
        last = load(tmp_path / "out" / "last.pt")
        assert_same(dict(last["network"]), dict(stages[2]))
        # the frozen stages have a momentum that would have moved them
        moments = last["optimizer"]["state"]
        assert len(moments) == len(list(part(run, "network").parameters()))
        assert sum(bool(state["exp_avg"].any()) for state in moments.values()) > 0.8 * len(moments)
        assert int(load(tmp_path / "out" / "model.pt")["trained_stages"]) == last["best"][1]

    def test_weights_of_any_stage_can_be_used(self, training: Training, tmp_path: Path) -> None:
        interrupt(training(), iteration=3)
        network = RWCNet(steps=(1, 1, 1), radii=(1, 1, 1), hidden_channels=8, overlap=2)
        for name in ("stage_1.pt", "model.pt"):
            network.load_state_dict(load(tmp_path / "out" / name), strict=True)
            assert network.stages_in_use == 1
        with torch.no_grad():
            assert network.eval()(noise(1, 2, 16, 16, 16)).shape == (1, 3, 16, 16, 16)


@pytest.mark.usefixtures("shallow_encoders")
class TestResume:
    def test_continues_exactly(self, training: Training, tmp_path: Path) -> None:
        """Struck in the middle of the second stage: epochs 2 and 3 of 4 are its."""
        plan = {"stage_shares": [1, 2, 1], "max_epochs": 4}
        training("straight", **plan).run()
        interrupt(training("broken", **plan), iteration=5)
        saved = load(tmp_path / "broken" / "last.pt")
        assert saved["trainer"]["iteration"] == 4
        assert int(saved["network"]["trained_stages"]) == 2
        torch.manual_seed(12345)  # another process would have other random numbers
        np.random.seed(5)
        resumed = training("broken", resume=True, **plan)
        rows = record(resumed)
        resumed.run()
        assert [row[:2] for row in rows] == [(3, 2), (3, 2), (4, 3), (4, 3)]
        for name in ("last.pt", "model.pt", "stage_1.pt", "stage_2.pt", "stage_3.pt"):
            assert_same(*(load(tmp_path / folder / name) for folder in ("straight", "broken")))

    @pytest.mark.slow
    def test_continues_exactly_between_stages(self, training: Training, tmp_path: Path) -> None:
        training("straight").run()
        interrupt(training("broken"), iteration=3)
        assert int(load(tmp_path / "broken" / "last.pt")["network"]["trained_stages"]) == 1
        torch.manual_seed(12345)
        interrupt(training("broken", resume=True), iteration=5)
        torch.manual_seed(54321)
        training("broken", resume=True).run()
        for name in ("last.pt", "model.pt", "stage_1.pt", "stage_2.pt", "stage_3.pt"):
            assert_same(*(load(tmp_path / folder / name) for folder in ("straight", "broken")))

    @pytest.mark.parametrize("stage", [None, 1])
    def test_a_finished_training_stays_as_it_is(self, training: Training, tmp_path: Path, stage: int | None) -> None:
        training(stage=stage, epoch_length=1).run()
        before = {path.name: load(path) for path in (tmp_path / "out").glob("*.pt")}
        again = training(stage=stage, epoch_length=1, resume=True)
        rows = record(again)
        again.run()
        assert rows == []
        for path in (tmp_path / "out").glob("*.pt"):
            assert_same(load(path), before[path.name], path.name)


@pytest.mark.usefixtures("shallow_encoders")
class TestSingleStages:
    def test_each_goes_on_from_the_one_before(self, training: Training, tmp_path: Path) -> None:
        weights: list[Weights] = []
        for stage in (1, 2, 3):
            run = training(stage=stage, epoch_length=1)
            rows = record(run)
            starts: list[Weights] = []
            network = part(run, "network")
            trainer_of(run).add_event_handler(
                Events.STARTED,
                lambda _, s=starts, n=network: s.append({k: v.clone() for k, v in n.state_dict().items()}),
            )
            run.run()
            assert [row[:2] for row in rows] == [(stage, stage)]
            weights.append(load(tmp_path / "out" / f"stage_{stage}.pt"))
            if stage > 1:
                assert_same(starts[0], dict(weights[stage - 2]))
            for other in range(3):
                unchanged = same(of_stage(weights[-1], other), of_stage(starts[0], other))
                assert unchanged is (other != stage - 1)
            last = load(tmp_path / "out" / "last.pt")
            assert last["trainer"]["iteration"] == stage
            assert_same(dict(last["network"]), dict(weights[-1]))
        assert [int(w["trained_stages"]) for w in weights] == [1, 2, 3]
        training("whole", epoch_length=1).run()
        assert_same(dict(load(tmp_path / "whole" / "stage_1.pt")), dict(weights[0]))

    @pytest.mark.slow
    def test_continues_exactly(self, training: Training, tmp_path: Path) -> None:
        """A single stage, struck in its second epoch."""
        plan = {"stage_shares": [1, 2, 1], "max_epochs": 4}
        training("straight", stage=1, **plan).run()
        shutil.copytree(tmp_path / "straight", tmp_path / "broken")
        training("straight", stage=2, **plan).run()
        interrupt(training("broken", stage=2, **plan), iteration=5)
        torch.manual_seed(12345)
        training("broken", stage=2, resume=True, **plan).run()
        for name in ("last.pt", "model.pt", "stage_1.pt", "stage_2.pt"):
            assert_same(*(load(tmp_path / folder / name) for folder in ("straight", "broken")))

    def test_without_the_stage_before(self, training: Training, tmp_path: Path) -> None:
        with pytest.raises(SystemExit) as caught:
            training(stage=2).run()
        assert caught.value.code == f"error: the weights {tmp_path / 'out' / 'stage_1.pt'} do not exist"
        assert not list((tmp_path / "out").glob("*.pt"))

    def test_weights_of_the_stage_before_from_elsewhere(self, training: Training, tmp_path: Path) -> None:
        training("first", stage=1, epoch_length=1).run()
        weights = tmp_path / "first" / "stage_1.pt"
        training("second", stage=2, epoch_length=1, initial_weights=str(weights)).run()
        first, second = load(weights), load(tmp_path / "second" / "stage_2.pt")
        assert same(of_stage(first, 0), of_stage(second, 0))
        assert same(of_stage(first, 2), of_stage(second, 2))

    def test_no_such_stage(self, training: Training, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(RuntimeError) as caught:
            training(stage=4).run()
        sys.excepthook(caught.type, caught.value, caught.tb)
        assert capsys.readouterr().err == "error: there is no stage 4: the network has stages 1 to 3\n"


@pytest.mark.usefixtures("shallow_encoders")
class TestFewEpochs:
    """The last stages get none; what there is can be used."""

    @pytest.mark.parametrize("max_epochs", [1, 2])
    def test_train_the_first_stages(self, training: Training, tmp_path: Path, max_epochs: int) -> None:
        run = training(max_epochs=max_epochs)
        rows = record(run)
        run.run()
        assert [row[:2] for row in rows] == [(n, n) for n in range(1, max_epochs + 1) for _ in range(2)]
        written = {path.name for path in (tmp_path / "out").glob("stage_*.pt")}
        assert written == {f"stage_{n}.pt" for n in range(1, max_epochs + 1)}
        assert int(load(tmp_path / "out" / "last.pt")["network"]["trained_stages"]) == max_epochs


@pytest.mark.usefixtures("shallow_encoders")
class TestInitialWeights:
    def test_are_used(self, training: Training, tmp_path: Path) -> None:
        torch.manual_seed(7)
        network = RWCNet(steps=(1, 1, 1), radii=(1, 1, 1), hidden_channels=8)
        network.train_stage(2)  # so all three count as trained, and none is started from the one before
        torch.save(network.state_dict(), tmp_path / "weights.pt")
        run = training(epoch_length=1, learning_rate=1e-12, initial_weights=str(tmp_path / "weights.pt"))
        run.run()
        result = load(tmp_path / "out" / "stage_3.pt")
        for name, value in network.state_dict().items():
            torch.testing.assert_close(result[name], value, atol=1e-9, rtol=0)

    @pytest.mark.parametrize("warm", [True, False])
    def test_of_one_stage_start_the_next(self, training: Training, tmp_path: Path, warm: bool) -> None:
        options = {"network_def#radii": [2, 2, 1], "learning_rate": 1e-12, "warm_start": warm}
        run = training(epoch_length=1, **options)
        first, second, third = part(run, "network").stages
        run.run()
        near = {"atol": 1e-9, "rtol": 0.0}
        same = {n for n, value in second.state_dict().items() if torch.allclose(value, first.state_dict()[n], **near)}
        drawn = {name for name in second.state_dict() if "gru" in name or "conv_init" in name or "convInit" in name}
        assert len(drawn) >= 8
        assert same == set(second.state_dict()) if warm else not same & drawn
        last, inner = (stage.update_block.motion_encoder.correlation[0].weight for stage in (third, second))
        inner = inner.unflatten(1, (5, 5, 5))[:, 1:-1, 1:-1, 1:-1].flatten(1, 3)
        assert torch.allclose(last, inner, **near) is warm

    def test_of_a_single_stage_start_all(self, training: Training, tmp_path: Path) -> None:
        """`single_stage.json` trains at the pair's own resolution; its features first, then the recurrent steps."""
        tiny = {"epoch_length": 2, "max_epochs": 1, "network_def#radii": [1], "network_def#steps": [1]}
        features = training("features", overlay="single_stage", features_only=True, **tiny)
        start = {name: value.clone() for name, value in part(features, "network").state_dict().items()}
        features.run()
        weights = load(tmp_path / "features" / "model.pt")
        moved = {name for name, value in start.items() if not torch.equal(value, weights[name])}
        assert moved
        assert all("feature_encoder" in name or name == "trained_stages" for name in moved)

        path = str(tmp_path / "features" / "model.pt")
        training("single", overlay="single_stage", initial_weights=path, **tiny).run()
        weights = load(tmp_path / "single" / "model.pt")
        options = {"initial_weights": str(tmp_path / "single" / "model.pt"), "learning_rate": 1e-12}
        whole = training(epoch_length=1, **options)
        whole.run()
        result = load(tmp_path / "out" / "stage_3.pt")
        for stage in range(3):
            for name, value in of_stage(weights, 0).items():
                same_place = name.replace("stages.0.", f"stages.{stage}.")
                torch.testing.assert_close(result[same_place], value, atol=1e-9, rtol=0)

    def test_missing(self, training: Training, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match=r"^error: the weights .*none\.pt do not exist$"):
            training(initial_weights=str(tmp_path / "none.pt")).run()


@pytest.mark.usefixtures("shallow_encoders")
class TestCache:
    @pytest.mark.slow
    def test_is_filled_once_and_continues_exactly(self, training: Training, tmp_path: Path) -> None:
        """Stage 2 has two epochs of the same pairs; the second one reads what the first one wrote."""
        plan = {"stage_shares": [1, 2, 1], "max_epochs": 4}
        straight = training("straight", cache_dir=str(tmp_path / "first"), **plan)
        network = part(straight, "network")
        estimated: list[int] = []
        estimate = network.estimate

        def counted(image: Tensor, stages: int) -> Any:
            if network.training:
                estimated.append(stages)
            return estimate(image, stages)

        network.estimate = counted
        straight.run()
        assert estimated == [1, 1, 2, 2]
        names = [f"stage_{stage}_pair_0000{pair}.bin" for stage in (2, 3) for pair in (0, 1)]
        assert sorted(path.name for path in (tmp_path / "first").iterdir()) == names

        interrupt(training("broken", cache_dir=str(tmp_path / "second"), **plan), iteration=5)
        (tmp_path / "second" / names[0]).write_bytes(b"damaged")
        torch.manual_seed(12345)
        training("broken", cache_dir=str(tmp_path / "second"), resume=True, **plan).run()
        for name in ("last.pt", "model.pt", "stage_1.pt", "stage_2.pt", "stage_3.pt"):
            assert_same(*(load(tmp_path / folder / name) for folder in ("straight", "broken")))
        assert sorted(path.name for path in (tmp_path / "second").iterdir()) == names

    def test_too_small_a_disk(self, training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run = training(cache_dir=str(tmp_path / "cache"), epoch_length=1)
        rows = record(run)
        real = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(
            shutil, "disk_usage", lambda path: real._replace(free=100) if "cache" in str(path) else real
        )
        with pytest.raises(SystemExit) as caught:
            run.run()
        message = str(caught.value.code)
        assert message.startswith(f"error: {tmp_path / 'cache'} is too small for the cache of stage 2: 1 pairs need ")
        assert "\n" not in message
        assert [row[1] for row in rows] == [1]  # the first stage needs none, and is saved
        assert (tmp_path / "out" / "stage_1.pt").is_file()

    def test_takes_one_pair_at_a_time(self, training: Training, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match=r"^error: the cache takes one pair at a time, .* use --batch_size 1$"):
            training(cache_dir=str(tmp_path / "cache"), batch_size=2, epoch_length=1).run()
