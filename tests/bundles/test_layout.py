"""Files, metadata and configs of each bundle, read as text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from bundle_list import BUNDLES, ROOT
from monai.bundle import verify_metadata

SCHEMA_URL = "https://project-monai.github.io/schema/meta_schema_20240725.json"

TENSOR = {
    "type": "object",
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
    "properties": {
        "num_channels": {"type": "integer"},
        "spatial_shape": {"type": "array", "items": {"type": ["string", "integer"]}},
        "value_range": {"type": "array", "items": {"type": "number"}},
        "is_patch_data": {"type": "boolean"},
        "channel_def": {"type": "object"},
    },
}
ARGUMENT = {"anyOf": [{"type": "number"}, {"type": "string"}, {"type": "boolean"}, TENSOR]}
IO = {
    "type": "object",
    "required": ["inputs", "outputs"],
    "properties": {
        key: {"type": "object", "additionalProperties": ARGUMENT}
        for key in ("inputs", "outputs", "post_processed_outputs")
    },
}
SCHEMA = {
    "type": "object",
    "required": [
        "schema",
        "version",
        "monai_version",
        "pytorch_version",
        "numpy_version",
        "required_packages_version",
        "task",
        "description",
        "authors",
        "copyright",
        "network_data_format",
    ],
    "properties": {
        **{
            key: {"type": "object"}
            for key in ("changelog", "supported_apps", "eval_metrics", "required_packages_version")
        },
        **{
            key: {"type": "string"}
            for key in ("data_source", "data_type", "image_classes", "label_classes", "pred_classes", "intended_use")
        },
        "references": {"type": "array", "items": {"type": "string"}},
    },
    "patternProperties": {"^[_a-zA-Z0-9]+_data_format$": IO},
}
"""What the official schema demands, so that the gate needs no network."""


def metadata_of(bundle: Path) -> dict:
    return json.loads((bundle / "configs" / "metadata.json").read_text())


def texts_of(bundle: Path) -> list[Path]:
    return [path for path in bundle.rglob("*") if path.suffix in (".json", ".conf", ".md", ".txt", ".py")]


def test_there_are_bundles() -> None:
    assert BUNDLES


@pytest.mark.parametrize(
    "name",
    [
        "LICENSE",
        "configs/metadata.json",
        "configs/train.json",
        "configs/evaluate.json",
        "configs/inference.json",
        "configs/logging.conf",
        "docs/README.md",
        "docs/data_license.txt",
        "models/model.pt",
    ],
)
def test_files_of_a_bundle(bundle: Path, name: str) -> None:
    assert (bundle / name).is_file()


def test_network_package_is_the_bundles_own() -> None:
    """Several bundles load in one process, so no two may share a package, nor take a common name."""
    names = [path.parent.name for bundle in BUNDLES for path in bundle.glob("*/__init__.py")]
    assert names and len(set(names)) == len(names)
    assert not {"scripts", "common", "networks"} & set(names)


def test_metadata_passes_monai(bundle: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    verify_metadata(meta_file=str(bundle / "configs" / "metadata.json"), filepath=str(schema))


def test_metadata_of_the_collection(bundle: Path) -> None:
    metadata = metadata_of(bundle)
    assert metadata["schema"] == SCHEMA_URL
    assert metadata["version"] in metadata["changelog"]
    assert metadata["supported_apps"] == {"monai-label": "0.8.5"}
    image = metadata["network_data_format"]["inputs"]["image"]
    pred = metadata["network_data_format"]["outputs"]["pred"]
    assert image["channel_def"] == {"0": "moving", "1": "fixed"} and image["num_channels"] == 2
    assert len(pred["channel_def"]) == pred["num_channels"] == 3


def test_versions_are_those_the_tests_run_with(bundle: Path) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    pins = {_plain(name): version.split(";")[0].split("+")[0].strip() for name, version in pins.items()}
    metadata = metadata_of(bundle)
    claimed = metadata["required_packages_version"] | {
        "monai": metadata["monai_version"],
        "torch": metadata["pytorch_version"],
        "numpy": metadata["numpy_version"],
    }
    assert {_plain(name): version for name, version in claimed.items()}.items() <= pins.items()
    assert "common" not in claimed


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def test_configs_are_plain_json(bundle: Path) -> None:
    for path in (bundle / "configs").glob("*.json"):
        content = json.loads(path.read_text(), object_pairs_hook=_no_duplicates)
        assert not [key for key in content if key.startswith("_")], path  # `_meta_` is MONAI's own
        assert path.read_text().endswith("}\n")


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    assert len(dict(pairs)) == len(pairs), [key for key, _ in pairs]
    return dict(pairs)


def test_no_paths_of_a_machine(bundle: Path) -> None:
    for path in texts_of(bundle):
        found = re.findall(
            r"""(?<![\w.@:/*])(?:/(?:home|root|work|tmp|mnt|Users|data)/|[A-Z]:\\)\S*""", path.read_text()
        )
        assert not found, (path, found)
