"""What the frozen stages say about a pair, kept on disk: the same as computing it, whatever happened to the files."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from rwcnet_net import RWCNet
from rwcnet_net.cache import PriorCache
from rwcnet_net.network import StageState
from small_rwcnet import lively, noise, small, smooth_noise
from torch import Tensor

from common.errors import OutputError

pytestmark = pytest.mark.usefixtures("shallow_encoders")

SHAPE = (16, 16, 24)
PAIRS = 3


class Disk(NamedTuple):
    total: int
    used: int
    free: int


class MustComputeError(Exception):
    """In place of computing, where an entry should do or is known not to."""


@cache
def images() -> list[Tensor]:
    """(1, 2, D, H, W) each."""
    return [smooth_noise(2, SHAPE, 5, seed) for seed in range(PAIRS)]


class Cached:
    """A cache and the network it serves; counts what is computed."""

    def __init__(self, folder: Path, network: RWCNet, stage: int = 1) -> None:
        self.network = network
        network.train_stage(stage)
        self.stage = stage
        self.cache = PriorCache(folder, network=network, dataset=[{"image": image[0]} for image in images()])  # type: ignore[arg-type]
        self.computed = 0
        self.cache.begin(stage)

    def compute(self, image: Tensor) -> StageState:
        self.computed += 1
        with torch.no_grad():
            return self.network.estimate(image, self.stage)

    def get(self, index: int = 0, image: Tensor | None = None) -> StageState:
        image = images()[index] if image is None else image
        return self.cache.get(index, image, lambda: self.compute(image))

    def peek(self, index: int = 0) -> StageState:
        """Raises `MustComputeError` where the entry does not count."""

        def refuse() -> StageState:
            raise MustComputeError

        return self.cache.get(index, images()[index], refuse)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def cached(folder: Path) -> Cached:
    return Cached(folder, lively(patches=(1, 1, 1)))


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def assert_equal(first: StageState, second: StageState) -> None:
    assert torch.equal(first.ddf, second.ddf) and torch.equal(first.hidden, second.hidden)
    assert first.ddf.dtype == second.ddf.dtype == first.hidden.dtype == second.hidden.dtype == torch.float32


class TestGet:
    @pytest.mark.parametrize("stage", [1, 2])
    def test_equals_computing(self, folder: Path, stage: int) -> None:
        cached = Cached(folder, lively(patches=(1, 1, 1)), stage)
        for index, image in enumerate(images()):
            expected = cached.compute(image)
            assert_equal(cached.get(index), expected)  # made
            assert_equal(cached.get(index), expected)  # read
        assert cached.computed == 2 * PAIRS
        assert len(entries(folder)) == PAIRS

    def test_is_read_by_another_process(self, cached: Cached, folder: Path) -> None:
        expected = cached.get()
        again = Cached(folder, lively(patches=(1, 1, 1)))
        assert_equal(again.get(), expected)
        assert again.computed == 0

    def test_stages_have_entries_of_their_own(self, cached: Cached, folder: Path) -> None:
        first = cached.get()
        second = Cached(folder, cached.network, 2)
        assert second.get().ddf.shape[2:] == (8, 8, 12)
        assert second.computed == 1
        assert_equal(Cached(folder, cached.network, 1).peek(), first)

    def test_what_is_read_can_be_changed_in_place(self, cached: Cached) -> None:
        expected = cached.get()
        cached.get().ddf.add_(1)
        assert_equal(cached.get(), expected)


class TestWhatCounts:
    """An entry is for one image, one set of weights, and one way to compute it."""

    def changed(self, cached: Cached, folder: Path, network: RWCNet) -> bool:
        cached.get()
        again = Cached(folder, network, cached.stage)
        result = again.get()
        assert_equal(result, again.compute(images()[0]))
        assert_equal(again.peek(), result)  # replaced
        return again.computed == 2

    def test_the_image(self, cached: Cached) -> None:
        cached.get()
        other = images()[0].clone()
        other[0, 1, 3, 4, 5] += 1e-6
        assert_equal(cached.get(0, other), cached.compute(other))
        assert cached.computed == 3
        with pytest.raises(MustComputeError):  # the entry is now the other image's
            cached.peek()

    def test_the_same_again(self, cached: Cached, folder: Path) -> None:
        assert not self.changed(cached, folder, lively(patches=(1, 1, 1)))

    def test_the_weights_of_the_stages_before(self, cached: Cached, folder: Path) -> None:
        other = lively(patches=(1, 1, 1))
        with torch.no_grad():
            next(other.stages[0].parameters())[0, 0, 0, 0, 0] += 1e-6
        assert self.changed(cached, folder, other)

    def test_not_the_weights_of_the_stage_in_training(self, cached: Cached, folder: Path) -> None:
        other = lively(patches=(1, 1, 1))
        with torch.no_grad():
            for parameter in other.stages[1].parameters():
                parameter.add_(0.1)
        assert not self.changed(cached, folder, other)

    @pytest.mark.parametrize(
        ("options", "stage"),
        [
            ({"steps": (2, 1, 1)}, 1),
            ({"steps": (1, 2, 1)}, 2),
            ({"diffeomorphic": True}, 1),
            ({"patches": (1, 2, 1)}, 2),
            ({"patches": (1, 2, 1), "overlap": 4}, 2),
        ],
        ids=str,
    )
    def test_how_it_is_computed(self, folder: Path, options: dict[str, Any], stage: int) -> None:
        base = {"patches": (1, 2, 1)} if "overlap" in options else {"patches": (1, 1, 1)}
        cached = Cached(folder, lively(0.5, **base), stage)
        assert self.changed(cached, folder, lively(0.5, **{**base, **options}))

    def test_not_the_steps_of_later_stages(self, cached: Cached, folder: Path) -> None:
        assert not self.changed(cached, folder, lively(patches=(1, 1, 1), steps=(1, 3, 2)))


class TestDamage:
    @pytest.mark.parametrize("damage", ["empty", "truncated", "half", "text", "bit", "other arrays", "folder of zeros"])
    def test_is_made_again_and_replaced(self, cached: Cached, folder: Path, damage: str) -> None:
        expected = cached.get()
        (path,) = entries(folder)
        content = bytearray(path.read_bytes())
        if damage == "bit":
            content[len(content) // 2] ^= 16
        elif damage == "other arrays":
            with path.open("wb") as file:
                np.savez(file, ddf=np.zeros(3), hidden=np.zeros(3))
            content = bytearray(path.read_bytes())
        replacement = {
            "empty": b"",
            "truncated": content[:-1],
            "half": content[: len(content) // 2],
            "text": b"no archive\n",
            "folder of zeros": bytes(len(content)),
        }
        path.write_bytes(replacement.get(damage, content))
        assert_equal(cached.get(), expected)
        assert cached.computed == 2
        assert_equal(cached.peek(), expected)
        assert [entry.name for entry in entries(folder)] == [path.name]

    @pytest.mark.parametrize("bit", [1, 3])
    def test_a_flipped_bit_anywhere(self, folder: Path, bit: int) -> None:
        """Most of all in what describes the content: never anything but the entry or a new one."""
        cached = Cached(folder, lively(patches=(1, 1, 1)), 2)
        expected = cached.get()
        (path,) = entries(folder)
        content = path.read_bytes()
        payloads = []
        for tensor in (expected.ddf, expected.hidden):
            start = content.find(tensor.numpy().tobytes())
            payloads.append((start, start + 4 * tensor.numel()))
        described = [n for n in range(len(content)) if not any(a + 2 <= n < b - 2 for a, b in payloads)]
        within = [n for a, b in payloads for n in range(a, b, 997)]
        made_again, wrong = 0, []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy's, on headers it half understands
            for position in described + within:
                damaged = bytearray(content)
                damaged[position] ^= 1 << bit
                path.write_bytes(damaged)
                try:
                    assert_equal(cached.peek(), expected)
                except MustComputeError:
                    made_again += 1
                except Exception as error:
                    wrong.append(f"byte {position}: {type(error).__name__} {str(error)[:60]}")
        assert not wrong, f"{len(wrong)} of {len(described) + len(within)}, {wrong[:5]}"
        assert made_again > 0.5 * len(described + within)

    def test_a_full_disk(
        self, cached: Cached, folder: Path, small_disk: Callable[[], AbstractContextManager[None]]
    ) -> None:
        with small_disk(), pytest.raises(OutputError, match=r"stage_2_pair_00000\.bin cannot be written"):
            cached.get()
        assert entries(folder) == []
        cached.get()
        before = entries(folder)[0].read_bytes()
        other = 1 - images()[0]
        with small_disk(), pytest.raises(OutputError):
            cached.get(0, other)
        assert [path.read_bytes() for path in entries(folder)] == [before]

    def test_nothing_is_left_of_what_was_interrupted(self, cached: Cached, folder: Path) -> None:
        def strike() -> StageState:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            cached.cache.get(0, images()[0], strike)
        assert entries(folder) == []


class TestDiskSpace:
    @pytest.fixture
    def free(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
        def tell(number: int) -> None:
            monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(2**50, 2**50 - number, number))

        return tell

    @pytest.mark.parametrize("stage", [1, 2])
    def test_the_need_is_what_is_written(self, folder: Path, stage: int, free: Callable[[int], None]) -> None:
        network = lively(patches=(1, 1, 1))
        cached = Cached(folder, network, stage)
        for index in range(PAIRS):
            cached.get(index)
        written = sum(path.stat().st_size for path in entries(folder))
        empty = folder.with_name("empty")
        free(int(1.01 * written) + PAIRS * 8192)
        Cached(empty, network, stage)
        free(written - 1)
        with pytest.raises(OutputError):
            Cached(empty, network, stage)

    def test_too_little_is_said_before_anything_is_computed(
        self, folder: Path, free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        network = small(patches=(1, 1, 1))
        network.train_stage(1)

        def never(*_: Any, **__: Any) -> Any:
            raise MustComputeError

        monkeypatch.setattr(network, "refine", never)
        # Nothing of this size is made: of a data set only the size of its first pair is asked for.
        data: Any = [{"image": torch.empty(2, 160, 224, 192, device="meta")}] * 394
        free(int(1.5 * 2**30))
        with pytest.raises(OutputError) as caught:
            PriorCache(folder, network=network, dataset=data).begin(1)
        # 394 * 4 bytes * (3 + 8 channels) * 40 * 56 * 48 voxels
        assert str(caught.value) == (
            f"{folder} is too small for the cache of stage 2: 394 pairs need 1.74 GiB and 1.50 GiB are free; "
            "train without --cache_dir"
        )

    def test_is_announced(self, folder: Path, free: Callable[[int], None], capsys: pytest.CaptureFixture[str]) -> None:
        cached = Cached(folder, lively(patches=(1, 1, 1)))
        cached.get(1)
        capsys.readouterr()
        free(3 * 2**30)
        Cached(folder, cached.network)
        assert capsys.readouterr().out == (
            f"prior fields and hidden states for stage 2: 2 of 3 pairs to be written to {folder}, 0.00 GiB; "
            "3.00 GiB are free\n"
        )

    def test_the_first_stage_needs_none(
        self, folder: Path, free: Callable[[int], None], capsys: pytest.CaptureFixture[str]
    ) -> None:
        free(0)
        Cached(folder, small(), 0)
        assert capsys.readouterr().out == ""
        assert not folder.exists()

    def test_a_folder_that_cannot_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match=f"^{tmp_path}/file/cache cannot be used for results: .*file is a file$"):
            Cached(tmp_path / "file" / "cache", small())


def test_a_batch_has_the_image_on_any_device(cached: Cached) -> None:
    """The state comes back to where the image is."""
    state = cached.get()
    assert state.ddf.device == images()[0].device == cached.get().ddf.device


def test_unwritten_images_make_no_difference(cached: Cached) -> None:
    """A view that is not contiguous is the same image."""
    cached.get()
    image = images()[0]
    strided = torch.stack([image, noise(*image.shape)], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    cached.get(0, strided)
    assert cached.computed == 1
