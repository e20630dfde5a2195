"""What MONAI Label 0.8.5 does with a bundle, done without it (spec: its tasks/infer/bundle.py, tasks/train/bundle.py).

It reads one config and no overlay, overwrites `bundle_root` and `device` (by a string), never runs `initialize`, and
calls transforms, inferer and network itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_list import tiny_network
from monai.bundle import ConfigParser
from monai.transforms import SaveImaged


def served(bundle: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> ConfigParser:
    monkeypatch.syspath_prepend(str(bundle))
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / f"{name}.json"))
    parser.config.update({"bundle_root": str(bundle), "device": "cpu"})
    if "affine" in parser.config:
        parser.config["affine"] = "moments"  # the quick one
    return parser


def infer(parser: ConfigParser, bundle: Path, request: dict[str, Any]) -> dict[str, Any]:
    """`BasicInferTask.__call__` and `BundleInferTask`, reduced to what touches the bundle."""
    for key in parser.config.get("displayable_configs", {}):
        parser["displayable_configs"][key] = request[key]
    data: dict[str, Any] = dict(request)
    for transform in parser.get_parsed_content("preprocessing").transforms:
        data = transform(data)
    network = parser.get_parsed_content("network_def")
    network.load_state_dict(torch.load(bundle / "models" / "model.pt", weights_only=True), strict=False)
    network.eval()
    with torch.no_grad():
        outputs = parser.get_parsed_content("inferer")(data["image"][None].to("cpu"), network)
    data["pred"] = outputs[0]
    for transform in parser.get_parsed_content("postprocessing").transforms:
        if not isinstance(transform, SaveImaged):
            data = transform(data)
    return data


def request_of(parser: ConfigParser, **params: str) -> dict[str, Any]:
    """A client sends every displayable setting, most of them as they are."""
    return {**parser.config.get("displayable_configs", {}), **params}


@pytest.mark.parametrize("with_label", [False, True])
def test_infers(
    bundle: Path, scans: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, with_label: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    parser = served(bundle, "inference", monkeypatch)
    params = {"image": str(scans["fixed"]), "moving": str(scans["moving"])}
    if with_label:
        params["moving_label"] = str(scans["moving_label"])
    data = infer(parser, bundle, request_of(parser, **params))

    fixed = nib.load(scans["fixed"])
    pred = data["pred"]
    assert tuple(pred.shape) == (1, *fixed.shape)
    # `Restored` would resize and place the result by these two; both must say: leave it as it is.
    meta = data["image_meta_dict"]
    assert tuple(meta["spatial_shape"]) == fixed.shape
    np.testing.assert_allclose(meta["original_affine"], fixed.affine, atol=1e-4)
    truth = nib.load(scans["fixed_label"]).get_fdata() > 0
    shown = pred[0].numpy() > (0.5 if with_label else 45)
    assert 2 * (shown & truth).sum() / (shown.sum() + truth.sum()) > 0.8  # the right way round, not mirrored
    if with_label:
        assert set(np.unique(pred.numpy())) == {0, 1}
    assert list(tmp_path.iterdir()) == []  # a server's results go to the client only


def test_moving_scan_beside_the_fixed_one_or_uploaded(
    bundle: Path, scans: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = served(bundle, "inference", monkeypatch)
    first = parser.get_parsed_content("preprocessing").transforms[0]
    for params in ({"moving": "moving.nii.gz"}, {"label": str(scans["moving"])}):
        found = first(request_of(parser, image=str(scans["fixed"]), **params))
        assert Path(found["moving"]) == scans["moving"]


def test_training_config_takes_the_overrides(
    bundle: Path, scans: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parser = served(bundle, "train", monkeypatch)
    handlers = parser["train#handlers"]
    assert isinstance(handlers, list) and all(isinstance(item.get("_target_"), str) for item in handlers)
    for key in ("network", "train#trainer#max_epochs", "validate#dataset#data", "run"):
        assert key in parser
    handlers.insert(
        0,
        {
            "_target_": "CheckpointLoader",
            "load_path": str(bundle / "models" / "model.pt"),
            "load_dict": {"model": "$@network"},
            "strict": False,
        },
    )
    listed = [
        {"image": str(scans[name]), "label": str(scans[f"{name}_label"])} for name in ("fixed", "moving", "moving")
    ]
    parser.update(
        {
            "train#handlers": handlers,
            "train#dataset#data": listed[:2],
            "validate#dataset#data": listed[2:],  # one scan: a fifth of three to seven
            "train#trainer#max_epochs": 2,  # more than the config's own, which its schedule must bear
            "max_epochs": 1,
            "epoch_length": 1,
            "shape": [32, 32, 32],
            "output_dir": str(tmp_path),
            **tiny_network(bundle),
        }
    )
    parser.parse(reset=True)
    parser.get_parsed_content("run")
    assert (tmp_path / "model.pt").is_file() and (tmp_path / "last.pt").is_file()
    assert torch.load(tmp_path / "last.pt", weights_only=True)["trainer"]["epoch_length"] == 1


def test_validation_without_scans_of_its_own(
    bundle: Path, scans: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A validation split of 0 gives an empty list."""
    parser = served(bundle, "train", monkeypatch)
    parser.update({"validate#dataset#data": [], "validation_length": 1, "shape": [32, 32, 32]})
    assert len(parser.get_parsed_content("validate#dataset")) == 1
