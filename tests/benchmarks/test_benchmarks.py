"""Every benchmark runs at a tiny size and prints its tables; no timing is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import _measure, command, correlation, recorr_forward, sampling
from common.geometry.spaces import itk_to_array
from common.io import read_image

_ONCE = ["--repeats", "1"]


@pytest.fixture
def no_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the tables after the first their measuring processes."""
    for module in (correlation, sampling, recorr_forward):
        monkeypatch.setattr(module, "peak_mib", lambda *_, **__: 1.0)
    monkeypatch.setattr(recorr_forward, "in_child", lambda *_: (1.0, 0.5, 0.25))


def _allocate(mib: int) -> object:
    return lambda: np.ones(mib * 2**17)


def test_interleave_calls_in_turn() -> None:
    order: list[str] = []
    times = _measure.interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2, warmup=1)
    assert "".join(order) == "ababab"
    assert times["a"].seconds >= 0 and times["b"].cpu_seconds >= 0


def test_peak_is_what_the_call_takes() -> None:
    assert _measure.peak_mib(_allocate, 64) == pytest.approx(64, abs=8)


def test_child_sends_its_result_back() -> None:
    assert _measure.in_child(divmod, 7, 2) == (3, 1)
    with pytest.raises(RuntimeError, match="died"):
        _measure.in_child(divmod, 7, 0)


def test_table_aligns_columns(capsys: pytest.CaptureFixture[str]) -> None:
    _measure.print_table("title", ["name", "value"], [["a", 0.12345], ["bcdefg", None], ["h", 1234.5]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == ["title", "name    value", "------  -----", "a       0.123", "bcdefg      -", "h        1234"]


def test_correlation(capsys: pytest.CaptureFixture[str]) -> None:
    correlation.main(["--shape", "4", "5", "6", "--channels", "4", "--radius", "1", *_ONCE])
    text = capsys.readouterr().out
    assert "4x5x6, 4 channels, radius 1" in text
    for name in (*correlation.WAYS, "limits:", "of the copy limit"):
        assert name in text


def test_correlation_tries_the_view_where_it_fits(capsys: pytest.CaptureFixture[str], no_children: None) -> None:
    options = ["--shape", "16", "16", "16", "--channels", "2", "--radius", "1", "--unfold_mib", "0.2", *_ONCE]
    correlation.main(options)
    large, small = capsys.readouterr().out.split("8x8x8, 2 channels")
    assert "strided view" not in large
    assert "strided view" in small


def test_sampling(capsys: pytest.CaptureFixture[str], no_children: None) -> None:
    sampling.main(["--shape", "8", "10", "12", "--channels", "1", "2", *_ONCE])
    text = capsys.readouterr().out
    assert "forward, 8x10x12, 1 channel\n" in text
    assert "forward, 8x10x12, 2 channels\n" in text
    assert "forward and backward, 8x10x12, 1 channel\n" in text


def test_recorr_forward(capsys: pytest.CaptureFixture[str], no_children: None) -> None:
    recorr_forward.main(["--shape", "32", "32", "48", *_ONCE])
    text = capsys.readouterr().out
    for memory_format in ("contiguous", "channels_last_3d"):
        assert f"by level, 32x32x48, {memory_format}" in text
    assert "bytes per voxel" in text
    assert "pages returned" in text


def test_cost_of_a_pass() -> None:
    wall, user, system = recorr_forward.pass_cost((32, 32, 32), "contiguous", False, torch.get_num_threads())
    assert wall > 0 and user + system > 0


def test_operations_are_the_published_ones() -> None:
    gmac = recorr_forward.multiply_adds((160, 192, 224))
    assert sum(gmac.values()) == pytest.approx(383.62, abs=0.01)


def test_generated_pair(tmp_path: Path) -> None:
    paths = command.create_pair(tmp_path, (16, 18, 20))
    fixed, moving = (itk_to_array(read_image(path)) for path in paths)
    assert fixed.shape == moving.shape == (16, 18, 20)
    assert np.abs(fixed - moving).max() > 100


def test_split_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    steps = dict.fromkeys((*command._STEPS, "total"), 1.0)
    metrics = {"settings": {"network_grid_shape": [64, 64, 64]}, "peak_memory_mib": {"process": 100.0}}
    command.print_split([{"seconds": {**steps, "affine": 3.0, "total": 12.0}, "metrics": metrics}])
    text = capsys.readouterr().out
    assert "network grid 64x64x64" in text
    assert "400 bytes per voxel" in text
    assert "3.00 times as long as the network: more than it should" in text


@pytest.mark.slow
def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--shape", "32", "40", "48", *_ONCE])
    text = capsys.readouterr().out
    for name in ("start-up", "reading", "affine", "network", "writing", "torch", "itk.Image", "import SimpleITK"):
        assert name in text


def test_command_says_why_a_run_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.sys, "executable", "false")
    with pytest.raises(SystemExit, match="the command failed"):
        command.run_command(tmp_path / "a", tmp_path / "b", tmp_path / "out", 1, [])


def test_metrics_without_a_step_give_no_figure_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps({"seconds": {"reading": 0.0}}))
    monkeypatch.setattr(command.sys, "executable", "true")
    seconds = command.run_command(tmp_path / "a", tmp_path / "b", tmp_path, 1, [])["seconds"]
    assert seconds["start-up"] == seconds["total"] >= 0
    assert np.isnan(seconds["affine"])
