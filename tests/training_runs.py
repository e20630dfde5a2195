"""Tiny trainings that bundles' configs describe: interrupting them, and comparing what they leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_list import tiny_network
from ignite.engine import Events
from monai.bundle import ConfigWorkflow

Training = Callable[..., ConfigWorkflow]


def tiny_training(bundle: Path) -> dict[str, Any]:
    """Overrides of a bundle's `train.json`: three epochs of two small pairs, on the CPU."""
    return {
        "bundle_root": str(bundle),
        "device": "cpu",
        "shape": [16, 16, 16],
        "epoch_length": 2,
        "validation_length": 1,
        "max_epochs": 3,
        "learning_rate": 1e-3,
        **tiny_network(bundle),
    }


def part(workflow: ConfigWorkflow, name: str) -> Any:
    """What the config built under this name."""
    return workflow.parser.get_parsed_content(name)


def trainer_of(workflow: ConfigWorkflow) -> Any:
    return part(workflow, "train#trainer")


def interrupt(workflow: ConfigWorkflow, iteration: int) -> None:
    """Ctrl-C after an iteration; a run then leaves what it had saved before."""

    def strike(engine: Any) -> None:
        raise KeyboardInterrupt

    trainer_of(workflow).add_event_handler(Events.ITERATION_COMPLETED(once=iteration), strike)
    with pytest.raises(KeyboardInterrupt):
        workflow.run()


def assert_same(first: Any, second: Any, where: str = "") -> None:
    """Bit for bit, whatever the nesting."""
    assert type(first) is type(second), where
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for n, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f"{where}[{n}]")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    else:
        assert first == second, where
