"""Bundles share the machinery around their networks: their configs are the same but for what is listed here."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundle_list import BUNDLES

Config = dict[str, Any]

MAY_DIFFER = {
    "inference": [
        r"network_def::.+",
        r"instance_optimization",
        r"uncertainty",
        r"preprocessing::transforms::\d+::bytes_per_voxel",
        r"postprocessing::transforms::\d+::settings::(iterations|steps|windows)",
    ],
    "evaluate": [],
    "hippocampus_inference": [r"network_def#.+", r"margin", r"instance_optimization"],
}
"""Keys, from the top, whose value is the bundle's own; its name may differ wherever it stands."""


def leaves(value: Any, key: str = "") -> dict[str, Any]:
    """Each value that holds no others, by its keys from the top."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = {k: v for name, child in children for k, v in leaves(child, f"{key}::{name}" if key else f"{name}").items()}
    return found or {key: value}


def differences(kind: str, first: Config, second: Config) -> set[str]:
    """Keys that only one of the two has, or that mean another thing, but for those that may."""
    one, other = leaves(first), leaves(second)
    differ = {key for key in one.keys() | other.keys() if key not in one or key not in other or one[key] != other[key]}
    return {key for key in differ if not any(re.fullmatch(pattern, key) for pattern in MAY_DIFFER[kind])}


def config_of(bundle: Path, kind: str) -> Config:
    """With a placeholder for the bundle's name."""
    return json.loads((bundle / "configs" / f"{kind}.json").read_text().replace(bundle.name, "BUNDLE"))


@pytest.mark.parametrize("kind", MAY_DIFFER)
def test_bundles_differ_in_nothing_else(bundle: Path, kind: str) -> None:
    assert differences(kind, config_of(BUNDLES[0], kind), config_of(bundle, kind)) == set()


def another_network(config: Config) -> None:
    config["network_def"] = {"_target_": "BUNDLE_net.Other", "steps": [12, 12, 4]}
    config["instance_optimization"] = 0
    config["preprocessing"]["transforms"][3]["bytes_per_voxel"] = 1
    settings = config["postprocessing"]["transforms"][3]["settings"]
    settings.pop("iterations", settings.pop("windows", None))
    settings["steps"] = "@network_def::steps"


def another_default(config: Config) -> None:
    config["affine"] = f"not {config['affine']}"


def an_option_more(config: Config) -> None:
    config["colour"] = None


def an_option_less(config: Config) -> None:
    del config["learn2reg"]


def another_order(config: Config) -> None:
    config["postprocessing"]["transforms"].reverse()


def a_transform_less(config: Config) -> None:
    config["preprocessing"]["transforms"].pop(0)


def another_setting_recorded(config: Config) -> None:
    config["postprocessing"]["transforms"][3]["settings"]["device"] = "cpu"


def a_fixed_multiple(config: Config) -> None:
    config["inferer"]["multiple"] = 16


def another_run(config: Config) -> None:
    config["run"].append("$print()")


@pytest.mark.parametrize(
    ("kind", "change", "shown"),
    [
        ("inference", another_network, False),
        ("inference", another_default, True),
        ("inference", an_option_more, True),
        ("inference", an_option_less, True),
        ("inference", another_order, True),
        ("inference", a_transform_less, True),
        ("inference", another_setting_recorded, True),
        ("inference", a_fixed_multiple, True),
        ("inference", another_run, True),
        ("evaluate", an_option_more, True),
        ("evaluate", another_run, True),
    ],
)
def test_what_may_not_differ_is_found(bundle: Path, kind: str, change: Callable[[Config], None], shown: bool) -> None:
    """The comparison can fail."""
    changed = copy.deepcopy(config_of(bundle, kind))
    change(changed)
    assert bool(differences(kind, config_of(bundle, kind), changed)) is shown


def test_names_are_no_difference(bundle: Path, tmp_path: Path) -> None:
    """A copy under another name is the same; one that forgot the name somewhere is not."""
    renamed = tmp_path / "another" / "configs"
    renamed.mkdir(parents=True)
    text = (bundle / "configs" / "inference.json").read_text()
    (renamed / "inference.json").write_text(text.replace(bundle.name, "another"))
    assert differences("inference", config_of(bundle, "inference"), config_of(renamed.parent, "inference")) == set()
    (renamed / "inference.json").write_text(text)
    assert "bundle_root" in differences(
        "inference", config_of(bundle, "inference"), config_of(renamed.parent, "inference")
    )
