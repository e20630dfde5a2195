"""Tiny trainings of the stages, and a record of what they do."""

from __future__ import annotations

from typing import Any

from bundle_list import ROOT
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from training_runs import part, tiny_training, trainer_of

BUNDLE = ROOT / "bundles" / "rwcnet"
TINY = {
    **tiny_training(BUNDLE),
    "network_def#overlap": 2,
    "network_def#radii": [1, 1, 1],
    "network_def#hidden_channels": 8,
    "validate#inferer#minimum": 16,
}


def record(run: ConfigWorkflow) -> list[tuple[int, int, float]]:
    """Epoch, stage and loss of each iteration, filled by `run.run()`."""
    rows: list[tuple[int, int, float]] = []
    network = part(run, "network")

    def note(engine: Any) -> None:
        rows.append((engine.state.epoch, network.stage_in_training + 1, float(engine.state.output["loss"].detach())))

    trainer_of(run).add_event_handler(Events.ITERATION_COMPLETED, note)
    return rows
