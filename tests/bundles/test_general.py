"""general.json: the grown generator's recipe, and training on people's label maps with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_list import BUNDLES, tiny_network
from monai.bundle import ConfigWorkflow

from common.data import SyntheticPairs

Load = Callable[..., ConfigWorkflow]


def recipe(bundle: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((bundle / "configs" / "general.json").read_text())["recipe"]
    return found


def test_bundles_have_one_recipe(bundle: Path) -> None:
    assert recipe(bundle) == recipe(BUNDLES[0])
    SyntheticPairs(length=1, shape=(16, 16, 16), recipe=recipe(bundle))  # refuses a name that it does not know


@pytest.fixture
def people(tmp_path: Path) -> str:
    """Two people: a box in a box, of other sizes."""
    for person in range(2):
        label = np.zeros((40, 44, 48), dtype=np.int16)
        label[4 : 32 + 4 * person, 6:38, 6:42] = 500
        label[10 : 24 + 4 * person, 14:30, 12:36] = 2
        nib.save(nib.Nifti1Image(label, np.eye(4)), tmp_path / f"person_{person}.nii.gz")
    return str(tmp_path)


def test_trains_within_one_person_and_between_two(workflow: Load, bundle: Path, people: str, tmp_path: Path) -> None:
    changes = {
        "bundle_root": str(bundle),
        "device": "cpu",
        "recipe#label_maps": people,
        "recipe#label_map_share": 1.0,
        "recipe#between_share": 0.5,
        "labels": [1, 2],
        "label_weight": 1.0,
        "shape": [32, 32, 32],
        "epoch_length": 1,
        "max_epochs": 3 if bundle.name == "rwcnet" else 2,  # one a stage; every second one is between people
        "validation_length": 1,
        "output_dir": str(tmp_path / "out"),
        **tiny_network(bundle),
    }
    run = workflow(bundle, ["train", "general"], "train", **changes)
    dataset = run.parser.get_parsed_content("train#dataset")
    with_field = []
    for epoch in (1, 2):
        dataset.set_epoch(epoch)
        with_field.append("ddf" in dataset[0])
    assert with_field == [True, False]
    run.run()
    state = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert all(bool(value.isfinite().all()) for value in state.values())
