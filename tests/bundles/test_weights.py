"""The weights that a bundle ships: small enough, described, and those of its network."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_list import BUNDLES
from monai.bundle import ConfigParser

WEIGHTS = [path for bundle in BUNDLES for path in sorted((bundle / "models").glob("*.pt"))]


def described(path: Path) -> dict[str, Any]:
    metadata = json.loads((path.parents[1] / "configs" / "metadata.json").read_text())
    return metadata["weights"][path.name]


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: f"{path.parents[1].name}-{path.stem}")
def test_metadata_describe_this_file(path: Path) -> None:
    """A change of the weights without one of their description is seen."""
    description = described(path)
    assert description["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert {"data", "recipe", "device", "hours", "license"} <= description.keys()
    assert path.stat().st_size < 25e6


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: f"{path.parents[1].name}-{path.stem}")
def test_are_those_of_the_network(path: Path) -> None:
    configs = path.parents[1] / "configs"
    parser = ConfigParser()
    parser.read_config(configs / "inference.json")
    network = parser.get_parsed_content("network_def")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
    assert all(bool(parameter.isfinite().all()) for parameter in network.parameters())


def test_the_hippocampus_overlay_sets_options_of_inference(bundle: Path) -> None:
    """Those of the training, and the weights."""
    inference, training, overlay = (
        json.loads((bundle / "configs" / f"{name}.json").read_text())
        for name in ("inference", "hippocampus", "hippocampus_inference")
    )
    assert {key.split("#")[0] for key in overlay} <= set(inference)
    network = {key for key in training if key.startswith("network_def")}
    assert {key: overlay[key] for key in network | {"spacing", "modality"}} == {
        key: training[key] for key in network | {"spacing", "modality"}
    }
    parser = ConfigParser()
    parser.read_config([bundle / "configs" / f"{name}.json" for name in ("inference", "hippocampus_inference")])
    parser["bundle_root"] = str(bundle)
    assert Path(parser.get_parsed_content("weights")) == bundle / "models" / "hippocampus.pt"


def test_no_description_without_a_file() -> None:
    for bundle in BUNDLES:
        metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
        assert sorted(metadata["weights"]) == sorted(path.name for path in (bundle / "models").glob("*.pt"))
