"""Training that ends when validation gets no better: after which epoch, what it leaves, how it resumes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.metrics import Metric
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import LrScheduleHandler, ValidationHandler
from torch import nn
from torch.utils.data import DataLoader
from training_runs import assert_same

from common.training import TrainingRun


class Figures(Metric):
    """In a metric's place: the epochs' figures, decided before."""

    def __init__(self, figures: list[float]) -> None:
        super().__init__()
        self.figures = figures

    def reset(self) -> None: ...

    def update(self, output: Any) -> None: ...

    def compute(self) -> float:
        return 0.0

    def iteration_completed(self, engine: Engine) -> None: ...

    def completed(self, engine: Engine, name: str) -> None:
        engine.state.metrics[name] = self.figures[engine.state.epoch - 1]


class TestPatience:
    """The smallest of these figures comes in epoch 3, the next smaller one in epoch 8."""

    FIGURES = (5.0, 6.0, 4.0, 4.5, 4.0, 4.2, 4.1, 3.0, 3.5, 3.5)

    @pytest.fixture
    def training_run(self, tmp_path: Path) -> Callable[..., TrainingRun]:
        """A line through noise, two iterations an epoch."""

        def build(output: str = "out", *, interval: int = 1, max_epochs: int = 10, **options: Any) -> TrainingRun:
            torch.manual_seed(0)
            network = nn.Linear(1, 1)
            pairs = [{"image": torch.rand(1), "label": torch.rand(1)} for _ in range(2)]
            optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
            evaluator = SupervisedEvaluator(
                device="cpu",
                val_data_loader=DataLoader(pairs),
                network=network,
                key_val_metric={"figure": Figures(list(self.FIGURES))},
                metric_cmp_fn=lambda current, best: current < best,
            )
            trainer = SupervisedTrainer(
                device="cpu",
                max_epochs=max_epochs,
                train_data_loader=DataLoader(pairs, shuffle=True),
                network=network,
                optimizer=optimizer,
                loss_function=nn.MSELoss(),
                train_handlers=[
                    LrScheduleHandler(scheduler, print_lr=False),
                    ValidationHandler(interval=interval, validator=evaluator),
                ],
            )
            parts = {"trainer": trainer, "evaluator": evaluator, "network": network, "optimizer": optimizer}
            return TrainingRun(**parts, lr_scheduler=scheduler, output_dir=tmp_path / output, **options)

        return build

    @pytest.mark.parametrize(
        ("patience", "interval", "epochs", "best"),
        [
            (None, 1, 10, 8),
            (1, 1, 2, 1),
            (2, 1, 5, 3),  # as good as the best one is no better
            (4, 1, 7, 3),
            (5, 1, 10, 8),
            (3, 3, 6, 3),  # validated every third epoch: 4, 4.2 and 3.5
            (6, 3, 10, 9),
        ],
    )
    def test_ends_after_so_many_epochs_without_a_better_figure(
        self,
        training_run: Callable[..., TrainingRun],
        tmp_path: Path,
        patience: int | None,
        interval: int,
        epochs: int,
        best: int,
    ) -> None:
        run = training_run(patience=patience, interval=interval)
        run.run()
        assert run.trainer.state.epoch == epochs
        assert run.trainer.state.iteration == 2 * epochs
        assert run.evaluator.state.best_metric_epoch == best
        saved = torch.load(tmp_path / "out" / "last.pt", weights_only=True)
        assert saved["trainer"]["iteration"] == 2 * epochs
        assert saved["best"] == [self.FIGURES[best - 1], best]

    def test_an_early_end_is_an_end(self, training_run: Callable[..., TrainingRun], tmp_path: Path) -> None:
        training_run(patience=2).run()
        files = [tmp_path / "out" / name for name in ("last.pt", "model.pt")]
        before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
        again = training_run(patience=2, resume=True)
        again.run()
        assert again.trainer.state.epoch == 5
        assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in files] == before

    def test_more_patience_goes_on(self, training_run: Callable[..., TrainingRun], tmp_path: Path) -> None:
        """As if it had been there from the start."""
        training_run("straight", patience=5).run()
        training_run("later", patience=2).run()
        training_run("later", patience=5, resume=True).run()
        assert_same(*(torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("straight", "later")))

    @pytest.mark.parametrize("struck", [3, 7, 9, 13])
    def test_a_resumed_training_counts_on(
        self, training_run: Callable[..., TrainingRun], tmp_path: Path, struck: int
    ) -> None:
        """Struck before the best epoch, after it, and in the last one."""
        straight = training_run("straight", patience=4)
        straight.run()

        def strike(engine: Any) -> None:
            raise KeyboardInterrupt

        broken = training_run("broken", patience=4)
        broken.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=struck), strike)
        with pytest.raises(KeyboardInterrupt):
            broken.run()
        torch.manual_seed(12345)
        resumed = training_run("broken", patience=4, resume=True)
        resumed.run()
        assert resumed.trainer.state.epoch == straight.trainer.state.epoch == 7
        for name in ("last.pt", "model.pt"):
            assert_same(*(torch.load(tmp_path / n / name, weights_only=True) for n in ("straight", "broken")))
