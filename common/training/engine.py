"""What MONAI's trainer and evaluator need to train registration networks and to continue exactly."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from torch import Tensor, nn
from torch.utils.data import Dataset

from common.errors import InputError, find_registration_error
from common.inference.weights import load_weights
from common.io import atomic_path, check_output_dir
from common.memory import keep_freed_pages
from common.options import as_flag

__all__ = ["EpochSetter", "GradientClipper", "TrainingRun", "prepare_training_batch"]


def prepare_training_batch(
    batch: Mapping[str, Any], device: str | torch.device | None = None, non_blocking: bool = False, **kwargs: Any
) -> tuple[Tensor, dict[str, Any]]:
    """The network's input and, as the target, the whole pair on the device."""
    pair = {
        key: value.to(device=device, non_blocking=non_blocking) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }
    return pair["image"], pair


class EpochSetter:
    """Tells a data set which epoch begins, so that every epoch has pairs of its own and a resumed one the same."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        # The first data iterator of a run is made between these two events.
        engine.add_event_handler(Events.STARTED, lambda e: self._set(e.state.epoch + 1))
        engine.add_event_handler(Events.EPOCH_STARTED, lambda e: self._set(e.state.epoch))

    def _set(self, epoch: int) -> None:
        set_epoch = getattr(self.dataset, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)


class GradientClipper:
    """Limits the norm of the gradient before each step.

    Args:
        network: whose gradients.
        max_norm: the limit.
    """

    def __init__(self, network: nn.Module, *, max_norm: float) -> None:
        self.network = network
        self.max_norm = max_norm

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        if engine.amp and engine.scaler is not None:
            engine.scaler.unscale_(engine.optimizer)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.max_norm)


class TrainingRun:
    """Starts or continues a training; problems end the program with one sentence.

    Writes `last.pt`, everything that continuing exactly needs, after each epoch, and `model.pt`, the plain weights,
    after each epoch whose key figure is the best so far. MONAI's `CheckpointSaver` does neither the random generators'
    and the best figure's state nor a fixed name for the last file.

    Args:
        trainer: a MONAI trainer.
        evaluator: its validator, with a key metric.
        network: what is trained.
        optimizer: its optimizer.
        lr_scheduler: its schedule.
        output_dir: where the two files go.
        resume: continue from `last.pt`.
        initial_weights: path of a state dict to start from, when not resuming.
        start_epoch: number of epochs that count as done, when not resuming.
        end_epoch: the last epoch, where a handler ends the training before the trainer's own last one: a resumed
            training that has got there stays as it is.
        patience: epochs without a better key figure after which the training ends; None for no early end. (The state
            of MONAI's `EarlyStopHandler` cannot be restored; this needs none beside the best epoch.)
    """

    def __init__(
        self,
        *,
        trainer: Any,
        evaluator: Any,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: Any,
        output_dir: str | os.PathLike[str],
        resume: bool = False,
        initial_weights: str | None = None,
        start_epoch: int = 0,
        end_epoch: int | None = None,
        patience: int | None = None,
    ) -> None:
        self.trainer = trainer
        self.evaluator = evaluator
        self.network = network
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.last_path = Path(output_dir) / "last.pt"
        self.best_path = Path(output_dir) / "model.pt"
        self.resume = as_flag(resume, "resume")
        self.initial_weights = initial_weights
        self.start_epoch = start_epoch
        self.end_epoch = end_epoch
        self.patience = patience
        # All after the handlers of the config: an epoch is saved once it is validated.
        evaluator.add_event_handler(Events.EPOCH_COMPLETED, self._save_best)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._save_last)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._stop_early)
        trainer.add_event_handler(Events.STARTED, self._restore_scaler)
        self._scaler_state: dict[str, Any] = {}

    def run(self) -> None:
        """Train.

        Raises:
            SystemExit: with the sentence that tells what went wrong.
        """
        keep_freed_pages()
        try:
            check_output_dir(self.last_path.parent)
            if self.resume:
                self._load()
            else:
                if self.initial_weights:
                    load_weights(self.network, self.initial_weights)
                if self.start_epoch:
                    length, max_epochs = len(self.trainer.data_loader), self.trainer.state.max_epochs
                    position = {"epoch": self.start_epoch, "epoch_length": length, "max_epochs": max_epochs}
                    self.trainer.load_state_dict(position)
            done = self.trainer.state.epoch >= (self.end_epoch or self.trainer.state.max_epochs)
            if not done and not self._patience_is_over():
                self.trainer.run()
        except Exception as error:
            cause = find_registration_error(error)
            if cause is None:
                raise
            raise SystemExit(f"error: {cause}") from None

    def _stop_early(self, engine: Any) -> None:
        if self._patience_is_over():
            engine.logger.info(f"no better epoch since {self.evaluator.state.best_metric_epoch}: the training ends")
            engine.terminate()

    def _patience_is_over(self) -> bool:
        best_epoch = self.evaluator.state.best_metric_epoch
        if self.patience is None or best_epoch < 1:  # not validated yet
            return False
        return bool(self.trainer.state.epoch - best_epoch >= self.patience)

    def _save_last(self, engine: Any) -> None:
        if idist.get_rank() > 0:  # on several GPUs all have the same
            return
        scaler = getattr(engine, "scaler", None)
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "trainer": dict(engine.state_dict()),
            "scaler": scaler.state_dict() if scaler is not None else {},
            "random": random_state(),
            "best": [self.evaluator.state.best_metric, self.evaluator.state.best_metric_epoch],
        }
        self.last_path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.last_path) as temporary:
            torch.save(state, temporary)

    def _save_best(self, engine: Any) -> None:
        if engine.state.best_metric_epoch != engine.state.epoch or idist.get_rank() > 0:
            return
        self.best_path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.best_path) as temporary:
            torch.save({name: value.detach().cpu() for name, value in self.network.state_dict().items()}, temporary)

    def _load(self) -> None:
        if not self.last_path.is_file():
            raise InputError(f"there is nothing to resume: {self.last_path} does not exist")
        try:
            state = torch.load(self.last_path, map_location="cpu", weights_only=True)
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            planned = _plan(self.lr_scheduler.state_dict())
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])
            max_epochs = self.trainer.state.max_epochs
            self.trainer.load_state_dict(state["trainer"])
            self.trainer.state.max_epochs = max_epochs
            set_random_state(state["random"])
            self._scaler_state = state["scaler"]
            best, best_epoch = state["best"]
            planned_epochs = state["trainer"]["max_epochs"]
        except Exception as error:  # bytes that are no pickle make the unpickler raise anything
            raise InputError(f"the checkpoint {self.last_path} does not fit this training or is damaged") from error
        if _plan(state["lr_scheduler"]) != planned and self.trainer.state.epoch < max_epochs:
            raise InputError(
                f"the learning rate in {self.last_path} is planned for {planned_epochs} epochs: resume with "
                f"--max_epochs {planned_epochs}, or start anew from its weights with --initial_weights"
            )
        self.evaluator.state.best_metric = best
        self.evaluator.state.best_metric_epoch = best_epoch

    def _restore_scaler(self, engine: Any) -> None:
        # The trainer makes a new loss scaler when its run begins, after the checkpoint was loaded.
        if self._scaler_state and getattr(engine, "scaler", None) is not None:
            engine.scaler.load_state_dict(self._scaler_state)


def _plan(scheduler: Mapping[str, Any]) -> list[Any]:
    """What of a scheduler's state depends on the length of the training."""
    lambdas = scheduler.get("lr_lambdas", [])
    return [scheduler.get("total_steps"), *((values or {}).get("bounds") for values in lambdas)]


def random_state() -> dict[str, Any]:
    """State of all random generators, of tensors and plain values only, so that `weights_only=True` reads it."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put all random generators back into the state of `random_state`."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
