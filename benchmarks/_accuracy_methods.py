"""The rows of the accuracy table: which methods there are, with which weights and options."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import _no_network
from benchmarks._peers import missing_package
from benchmarks._voxelmorph import INFERENCE, write_overlay
from common.inference import file_sha256

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: key, of files too.
        title: as the table shows it.
        configs: of a bundle's inference, later ones replacing entries of earlier ones; none for a peer.
        weights: of a bundle, by data set, and under "" for all others.
        options: of a bundle's inference, by data set, and under "" for all.
    """

    name: str
    title: str
    configs: tuple[Path, ...] = ()
    weights: Mapping[str, Path] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def weights_for(self, data_set: str) -> Path:
        return self.weights.get(data_set, self.weights[""])

    def options_for(self, data_set: str) -> dict[str, Any]:
        return {**self.options.get("", {}), **self.options.get(data_set, {})}


def find_methods(options: argparse.Namespace) -> list[Method]:
    """All rows that can be made, a line for each that cannot."""
    methods = [Method("zero", "zero displacement"), Method("affine", "affine (ours)")]
    for name, title in (("syn", "ANTs SyN"), ("convexadam", "ConvexAdam")):
        missing = missing_package(name)
        if missing:
            print(f"{title} is left out: the package {missing} is not installed (pip install -e '.[benchmarks]')")
        else:
            methods.append(Method(name, title))
    steps = options.instance_optimization
    if steps and _wanted("steps", options.methods):
        config = ROOT / "bundles/recorr/configs/inference.json"
        overlay = write_overlay(options.output_dir / "no_network.json", _no_network.INFERENCE)
        by_data = {"": {"report": False, "instance_optimization": steps}}
        weights = {"": _no_network.write_weights(options.output_dir / "no_network.pt")}
        methods.append(Method("steps", f"{steps} steps alone", (config, overlay), weights, by_data))
    general, special = _assignments(options.weights), _assignments(options.hippocampus_weights)
    for bundle in sorted(path.parent.parent for path in (ROOT / "bundles").glob("*/configs/metadata.json")):
        name = bundle.name
        weights = {"": Path(general.get(name, bundle / "models/model.pt"))}
        own = Path(special.get(name, bundle / "models/hippocampus.pt"))
        if own.is_file():
            weights["hippocampus"] = own
        elif name in special:
            raise SystemExit(f"error: the weights {own} do not exist")
        methods += _network_rows(name, (bundle / "configs/inference.json",), weights, options)
    if options.voxelmorph:
        config = ROOT / "bundles/recorr/configs/inference.json"
        overlay = write_overlay(options.output_dir / "voxelmorph.json", INFERENCE)
        weights = {"": options.voxelmorph}
        if "voxelmorph" in special:
            weights["hippocampus"] = Path(special["voxelmorph"])
        methods += _network_rows("voxelmorph", (config, overlay), weights, options)
    else:
        print("VoxelMorph is left out: give weights trained by benchmarks._voxelmorph as --voxelmorph")
    return [method for method in methods if _wanted(method.name, options.methods)]


def _network_rows(
    name: str, configs: tuple[Path, ...], weights: dict[str, Path], options: argparse.Namespace
) -> list[Method]:
    """A network alone and with instance optimisation, or nothing and a line that says why."""
    if not weights[""].is_file():
        if "hippocampus" not in weights:
            print(f"{name} is left out: there are no weights {weights['']}")
            return []
        print(f"{name} is left out but for the Hippocampus: there are no weights {weights['']}")
    count = options.instance_optimization
    # Four passes for an estimate of the uncertainty that no other method makes, and a picture: not of this comparison.
    plain = {"report": False, "uncertainty": False}
    used = {data_set or "all": path for data_set, path in weights.items() if path.is_file()}
    print(f"{name}: " + ", ".join(f"{key} {path} {file_sha256(path)[:8]}" for key, path in used.items()))
    hippocampus: dict[str, Any] = {}
    if "hippocampus" in weights:
        hippocampus |= _for_hippocampus(configs[0])
    for key, value in _assignments(options.affine, bare="").items():
        if key in ("", name):
            hippocampus["affine"] = value
    for key, value in _assignments(options.hippocampus_options).items():
        bundle, _, option = key.rpartition(".")
        if bundle in ("", name):
            hippocampus[option] = _parsed(value)
    rows = []
    for suffix, title, steps in (("", "", 0), ("+io", f" + {count} steps", count)):
        by_data = {"": {**plain, "instance_optimization": steps}, "hippocampus": hippocampus}
        rows.append(Method(name + suffix, name + title, configs, weights, by_data))
    return rows


def _for_hippocampus(config: Path) -> dict[str, Any]:
    """What the bundle's overlay for these weights sets, but for what makes a row: spacing, affine stage, margin."""
    overlay = config.with_name("hippocampus_inference.json")
    settings: dict[str, Any] = json.loads(overlay.read_text()) if overlay.is_file() else {}
    return {key: value for key, value in settings.items() if key not in ("weights", "instance_optimization")}


def _wanted(name: str, chosen: Sequence[str] | None) -> bool:
    return not chosen or name in chosen or name.removesuffix("+io") in chosen


def _assignments(values: Iterable[str], bare: str | None = None) -> dict[str, str]:
    """NAME=VALUE; a VALUE alone belongs to the name `bare`."""
    found = {}
    for value in values:
        name, equals, rest = value.partition("=")
        if not equals and bare is None:
            raise SystemExit(f"error: '{value}' is not of the form NAME=VALUE")
        found[name if equals else str(bare)] = rest if equals else value
    return found


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
