"""What the tests of the stages share."""

from __future__ import annotations

from functools import partial

import pytest
import rwcnet_net.subnetwork


@pytest.fixture
def shallow_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two levels fewer, a twentieth of the weights: for tests of what is around the sub-networks."""
    shallow = partial(rwcnet_net.subnetwork.SegResNet, blocks_down=(1, 1), blocks_up=(1,))
    monkeypatch.setattr(rwcnet_net.subnetwork, "SegResNet", shallow)
