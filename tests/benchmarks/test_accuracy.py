"""The accuracy table on a tiny generated pair, and its judge; the peers' own work only where it is slow-marked."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from benchmarks import _judge, _peers, accuracy, uncertainty
from benchmarks._accuracy_pairs import GENERATED_SEED
from benchmarks._voxelmorph import VoxelMorphNetwork
from common.data.synthetic import SyntheticPairs
from common.geometry.spaces import Grid, array_to_itk, ddf_to_displacement
from common.io import write_image, write_landmarks, write_transform

_TINY = ["--data", "generated", "--generated", "1", "--generated_shape", "24", "26", "28", "--threads", "1"]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The peers' program without the start of a process; names of the methods that ran."""
    ran = []

    def run(command: Sequence[str], *, log: Path, threads: int) -> dict[str, Any]:
        assert list(command[1:3]) == ["-m", "benchmarks._peers"]
        ran.append(command[3])
        _peers.main(command[3:])
        return {"exit_code": 0, "peak_mib": 123.0}

    monkeypatch.setattr(accuracy, "run_process", run)
    return ran


def _rows(folder: Path, method: str) -> list[dict[str, str]]:
    with open(folder / f"tables/generated__{method}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_table_of_a_generated_pair(
    tmp_path: Path, in_this_process: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*_TINY, "--methods", "zero,affine", "--output_dir", str(tmp_path)]
    accuracy.main(options)
    text = capsys.readouterr().out
    for name in ("zero displacement", "affine (ours)", "Dice", "HD95 vox", "EPE mm", "folding %", "peak MiB"):
        assert name in text
    (zero,), (affine,) = _rows(tmp_path, "zero"), _rows(tmp_path, "affine")
    exact = SyntheticPairs(length=1, shape=(24, 26, 28), seed=GENERATED_SEED, fixed_epoch=True)[0]
    length = exact["ddf"].norm(dim=0)[exact["mask"][0] > 0].mean()
    assert float(zero["epe_mm"]) == pytest.approx(float(length), rel=1e-3)  # 1 mm voxels
    for row in (zero, affine):
        assert float(row["sdlogj"]) < 1e-4 and float(row["folding_percent"]) == 0
    assert affine["peak_mib"] == "123.0" and zero["peak_mib"] == ""

    accuracy.main(options)  # what is there is not done again
    assert in_this_process == ["affine"]
    accuracy.main([*options, "--plot"])
    pictures = capsys.readouterr().out.strip().splitlines()[-1:]
    assert all(Path(path).stat().st_size > 1000 for path in pictures)


def test_failed_pair_is_told_and_kept(
    tmp_path: Path, in_this_process: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> dict[str, Any]:
        raise RuntimeError("no luck")

    monkeypatch.setitem(_peers._METHODS, "affine", fail)
    accuracy.main([*_TINY, "--methods", "affine", "--output_dir", str(tmp_path)])
    assert "no luck" in capsys.readouterr().out
    assert _rows(tmp_path, "affine")[0]["problem"] == "RuntimeError: no luck"


def test_judge_agrees_with_the_truth(tmp_path: Path, oblique_affine: np.ndarray) -> None:
    """The exact field, written as a bundle and as a peer writes it, on an oblique grid: no error in either."""
    grid = Grid((22, 24, 20), oblique_affine)
    item = SyntheticPairs(length=1, shape=grid.shape, seed=3)[0]
    displacement = ddf_to_displacement(item["ddf"], grid)
    pair = {"id": "a", "truth": str(tmp_path / "truth.npz")}
    np.savez(pair["truth"], displacement=displacement, mask=item["mask"][0].numpy() > 0)
    for index, role in enumerate(("moving", "fixed")):
        pair[role], pair[f"{role}_label"] = (str(tmp_path / f"{role}{kind}.nii.gz") for kind in ("", "_label"))
        write_image(array_to_itk(item["image"][index].numpy(), grid), pair[role])
        write_image(array_to_itk(item[f"{role}_label"][0].numpy().astype(np.int16), grid), pair[f"{role}_label"])
    voxels = np.argwhere(item["mask"][0].numpy() > 0)[::50]
    points = grid.to_physical(voxels)
    pair["fixed_landmarks"], pair["moving_landmarks"] = (str(tmp_path / f"{role}.txt") for role in "fm")
    write_landmarks(pair["fixed_landmarks"], points)
    write_landmarks(pair["moving_landmarks"], points + displacement[tuple(voxels.T)])

    bundle, peer, affine = tmp_path / "bundle", tmp_path / "peer", tmp_path / "affine"
    for folder in (bundle, peer, affine):
        folder.mkdir()
    write_transform(bundle / "transform.h5", displacement=displacement, grid=grid)
    settings = {"fixed_to_moving_affine_lps": np.eye(4).tolist(), "network_grid_shape": list(grid.shape)}
    seconds = {"reading": 100.0, "affine": 1.0, "network": 2.0}
    (bundle / "metrics.json").write_text(json.dumps({"settings": settings, "seconds": seconds}))
    # An affine stage, and a deformable one before it that makes up for it
    shift = np.array([2.0, -1.0, 3.0])
    matrix = np.eye(4)
    matrix[:3, 3] = shift
    np.savetxt(affine / _peers.MATRIX, matrix)
    (affine / _peers.FIGURES).write_text('{"seconds": 1.0}')
    (peer / _peers.FIGURES).write_text('{"seconds": 2.0, "note": "word"}')
    field = (displacement - shift).astype(np.float32)[:, :, :, None]
    nib.save(nib.Nifti1Image(field, np.diag([-1.0, -1.0, 1.0, 1.0]) @ oblique_affine), peer / _peers.DISPLACEMENT)

    told = [_judge.judge_bundle(pair, bundle), _judge.judge_peer(pair, peer, affine)]
    for figures in told:
        assert figures["epe_mm"] < 1e-3 and figures["tre_mm"] < 1e-3
        assert figures["seconds"] == 3.0
        assert figures["dice"] > 0.99
    assert told[0]["sdlogj"] == pytest.approx(told[1]["sdlogj"], abs=1e-4)
    assert _judge.judge_zero(pair)["epe_mm"] > 1
    assert "nmi" not in told[0]
    assert _judge.judge_zero({**pair, "id": "t1_to_t2"})["nmi"] > 1


def test_launcher_measures_a_process(tmp_path: Path) -> None:
    def peak(mib: int) -> float:
        program = f"import sys; data = bytearray({mib} * 2**20); sys.exit(3)"
        done = accuracy.run_process([sys.executable, "-S", "-c", program], log=tmp_path / "a.log", threads=1)
        assert done["exit_code"] == 3
        return done["peak_mib"]

    # Small whatever this process has taken
    assert peak(1) < 50
    assert peak(100) - peak(1) == pytest.approx(99, abs=10)


def test_settings_of_the_peers() -> None:
    settings, note = _peers.convexadam_settings("brain_oasis", (160, 192, 144))
    assert (settings["grid_sp"], settings["disp_hw"], settings["lambda_weight"], note) == (6, 4, 1.25, "")
    settings, note = _peers.convexadam_settings("lung_ct", (115, 157, 129))
    assert (settings["grid_sp"], settings["disp_hw"], settings["lambda_weight"], note) == (4, 6, 0.65, "")
    settings, note = _peers.convexadam_settings("hippocampus_00", (35, 51, 35))
    assert settings["grid_sp"] == 4 and "small" in note
    assert _peers.syn_settings("t1_to_t2")["syn_metric"] == "mattes"
    assert _peers.syn_settings("brain_oasis")["syn_metric"] == "CC"


def test_instance_optimization_without_a_network(tmp_path: Path) -> None:
    arguments = [*_TINY, "--methods", "steps", "--instance_optimization", "5", "--output_dir", str(tmp_path)]
    accuracy.main(arguments)
    (row,) = _rows(tmp_path, "steps")
    assert not row["problem"]
    assert float(row["sdlogj"]) > 1e-3  # of the affine stage alone it is 0


def test_some_pairs_only(tmp_path: Path) -> None:
    arguments = [*_TINY, "--methods", "zero", "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="there are no results"):
        accuracy.main([*arguments, "--pairs", "brain,lung"])
    accuracy.main([*arguments, "--pairs", "brain,generated_24"])
    assert len(_rows(tmp_path, "zero")) == 1


def test_options_of_a_bundle(tmp_path: Path) -> None:
    weights = tmp_path / "w.pt"
    torch.save({}, weights)
    arguments = ["--weights", f"recorr={weights}", "--hippocampus_weights", f"recorr={weights}", "--methods", "recorr"]
    arguments += ["--affine", "moments", "--hippocampus_options", "recorr.spacing=2.0", "rwcnet.spacing=3.0"]
    alone, refined = accuracy.find_methods(accuracy.build_parser().parse_args(arguments))
    assert (alone.name, refined.name) == ("recorr", "recorr+io")
    assert alone.options_for("real") == {"report": False, "uncertainty": False, "instance_optimization": 0}
    assert refined.options_for("real")["instance_optimization"] == 40
    assert refined.options_for("hippocampus")["affine"] == "moments"
    assert refined.options_for("hippocampus")["spacing"] == 2.0  # over the 1.0 of the training


def test_the_overlay_of_the_hippocampus_weights_is_used() -> None:
    for name, margin in (("rwcnet", 0), ("adregnet", 8)):
        alone, refined = accuracy.find_methods(accuracy.build_parser().parse_args(["--methods", name]))
        for method, steps in ((alone, 0), (refined, 40)):
            options = method.options_for("hippocampus")
            assert (options["margin"], options["instance_optimization"]) == (margin, steps)
            assert "weights" not in options


def test_voxelmorph_has_the_interface_of_the_bundles() -> None:
    network = VoxelMorphNetwork()
    image = torch.rand(1, 2, *[network.stride] * 3)
    (field,) = network.forward_sequence(image)
    assert field.shape == (1, 3, *image.shape[2:])


class _Shifting(torch.nn.Module):
    """A network whose answer depends on the copy that it sees."""

    stride = 4

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward_sequence(self, image: torch.Tensor) -> list[torch.Tensor]:
        return [torch.cat([image[:, :1]] * 3, dim=1), torch.cat([image[:, 1:]] * 3, dim=1)]


def test_uncertainty_against_the_error() -> None:
    pair = SyntheticPairs(length=1, shape=(20, 18, 22), seed=1)[0]
    found = uncertainty.correlations(_Shifting(), pair)
    names = ["error", "level 1", "level 2", uncertainty.FIELD, uncertainty.GRADIENT, uncertainty.WORST]
    assert list(found) == names
    assert all(-1 <= found[name] <= 1 for name in names[1:-1])
    exact = uncertainty.rank_correlation(np.arange(9.0), np.arange(9.0) ** 3)
    assert exact == pytest.approx(1)
    assert np.isnan(uncertainty.rank_correlation(np.zeros(3), np.arange(3.0)))
