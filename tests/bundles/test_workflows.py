"""Each bundle through MONAI's own checks, and its configs built and run."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bundle_list import tiny_network
from monai.bundle import ConfigParser, ConfigWorkflow, verify_net_in_out

TINY = {
    "device": "cpu",
    "shape": [32, 32, 32],
    "epoch_length": 1,
    "validation_length": 1,
    "max_epochs": 1,
}

Workflow = Callable[..., ConfigWorkflow]


@pytest.fixture(autouse=True)
def _repository_root_is_cwd(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.chdir(request.config.rootpath)


@pytest.mark.parametrize(("names", "kind"), [(["train"], "train"), (["train", "evaluate"], "train")])
def test_properties_of_training(bundle: Path, workflow: Workflow, tmp_path: Path, names: list[str], kind: str) -> None:
    changes = TINY | tiny_network(bundle) | {"output_dir": str(tmp_path / "out")}
    assert workflow(bundle, names, kind, **changes).check_properties() == []


def test_properties_of_inference(bundle: Path, workflow: Workflow, tmp_path: Path, scans: dict[str, Path]) -> None:
    files = {key: str(scans[key]) for key in ("fixed", "moving")}
    checked = workflow(bundle, ["inference"], "infer", **files, device="cpu", output_dir=str(tmp_path / "out"))
    assert checked.check_properties() == []


def test_bad_input_is_one_sentence(bundle: Path, workflow: Workflow, tmp_path: Path, scans: dict[str, Path]) -> None:
    text, out = tmp_path / "text.nii.gz", tmp_path / "out"
    text.write_text("not an image\n")
    files = {"fixed": str(scans["fixed"]), "moving": str(text), "output_dir": str(out)}
    run = workflow(bundle, ["inference"], "infer", **files, device="cpu").run
    with pytest.raises(SystemExit, match=r"^error: .*text\.nii\.gz.*$"):
        run()
    assert not out.exists()


def test_network_against_metadata(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(bundle))
    configs = bundle / "configs"
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(configs / "metadata.json"),
        config_file=str(configs / "inference.json"),
        device="cpu",
        n=2,
    )


def test_training_and_inference_mean_the_same_network(bundle: Path, workflow: Workflow) -> None:
    sizes = []
    for name, kind in (("train", "train"), ("inference", "infer")):
        network = workflow(bundle, [name], kind, device="cpu").network_def
        sizes.append({key: value.shape for key, value in network.state_dict().items()})
    state = torch.load(bundle / "models" / "model.pt", map_location="cpu", weights_only=True)
    assert sizes[0] == sizes[1] == {key: value.shape for key, value in state.items()}


def test_output_has_the_size_of_the_input(bundle: Path, workflow: Workflow) -> None:
    network = workflow(bundle, ["inference"], "infer", device="cpu").network_def.eval()
    with torch.no_grad():
        ddf = network(torch.rand(1, 2, 32, 48, 32))
    assert ddf.shape == (1, 3, 32, 48, 32) and ddf.dtype == torch.float32


def test_evaluation_of_the_shipped_weights(
    bundle: Path, workflow: Workflow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = TINY | {"validation_length": 2}
    workflow(bundle, ["train", "evaluate"], "train", **tiny, output_dir=str(tmp_path)).run()
    with open(tmp_path / "evaluation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    before = sum(float(row["endpoint_error_zero_displacement"]) for row in rows)
    assert sum(float(row["endpoint_error"]) for row in rows) < before  # weights that do nothing are not shipped
    printed = capsys.readouterr().out
    assert "endpoint_error" in printed and "no displacement" in printed


def test_evaluation_of_scans(bundle: Path, workflow: Workflow, tmp_path: Path, scans: dict[str, Path]) -> None:
    (tmp_path / "scans.csv").write_text(
        "image,label\n" + 2 * f"{scans['fixed']},{scans['fixed_label']}\n{scans['moving']},{scans['moving_label']}\n"
    )
    data = {"dataset_dir": str(tmp_path), "datalist": "scans.csv", "validation": 2, "output_dir": str(tmp_path)}
    workflow(bundle, ["train", "evaluate"], "train", **(TINY | tiny_network(bundle) | data)).run()
    with open(tmp_path / "evaluation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["fixed"]).name for row in rows] == ["fixed.nii.gz", "moving.nii.gz"]
    assert {"dice", "hd95", "ncc"} <= set(rows[0]) and "endpoint_error" not in rows[0]


def test_evaluation_without_weights_is_one_sentence(bundle: Path, workflow: Workflow, tmp_path: Path) -> None:
    changes = TINY | tiny_network(bundle) | {"weights": str(tmp_path / "no.pt"), "output_dir": str(tmp_path / "out")}
    run = workflow(bundle, ["train", "evaluate"], "train", **changes).run
    with pytest.raises(SystemExit, match=r"error: the weights .*no\.pt do not exist"):
        run()
    assert not (tmp_path / "out").exists()


def test_evaluation_of_an_unknown_figure_is_one_sentence(bundle: Path, workflow: Workflow, tmp_path: Path) -> None:
    changes = TINY | tiny_network(bundle) | {"figures": ["beauty"], "output_dir": str(tmp_path)}
    run = workflow(bundle, ["train", "evaluate"], "train", **changes).run
    with pytest.raises(SystemExit, match=r"error: a validation figure is one of .*, got 'beauty'"):
        run()


def test_several_gpus_change_what_they_must(bundle: Path) -> None:
    configs = bundle / "configs"
    if not (configs / "multi_gpu_train.json").is_file():
        pytest.skip("the bundle has no multi_gpu_train.json")
    alone = ConfigParser.load_config_files([str(configs / "train.json")])
    several = ConfigParser.load_config_files([str(configs / name) for name in ("train.json", "multi_gpu_train.json")])
    changed = {key for key, value in _flat(several).items() if _flat(alone).get(key) != value}
    expected = (
        "imports::",
        "backend",
        "device",
        "network",
        "train::sampler",
        "train::dataloader::sampler",
        "train::inferer",
        "train::trainer::train_handlers",
        "validate::evaluator::val_handlers",
        "training::network",
        "initialize",
        "finalize",
    )
    assert not {key for key in changed if not key.startswith(expected)}
    assert {"device", "network::_target_", "train::dataloader::sampler"} <= changed


def _flat(value: object, key: str = "") -> dict[str, object]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    inner = {k: v for name, child in children for k, v in _flat(child, f"{key}::{name}" if key else str(name)).items()}
    return inner or {key: value}
