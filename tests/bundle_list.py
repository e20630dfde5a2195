"""The bundles that the gates hold: folders bundles/*/ with configs/metadata.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUNDLES = sorted(path.parent.parent for path in ROOT.glob("bundles/*/configs/metadata.json"))

_TINY_NETWORKS: dict[str, dict[str, Any]] = {
    "adregnet": {},
    "recorr": {"network_def#iterations": [1, 1, 1, 1]},
    "rwcnet": {"network_def#steps": [1, 1, 1]},
}


def tiny_network(bundle: Path) -> dict[str, Any]:
    """Overrides of a bundle's configs that keep its weights' shapes and cost the least; a bundle may have none."""
    return dict(_TINY_NETWORKS.get(bundle.name, {}))
