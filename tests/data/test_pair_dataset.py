"""Pairing of a flat list of scans."""

from __future__ import annotations

from typing import Any

import pytest
from monai.transforms import Compose, Lambdad
from torch.utils.data import DataLoader

from common.data.pairs import PairDataset
from common.errors import InputError

SCANS = [{"image": f"i{n}", "label": f"l{n}"} for n in range(5)]
NLST = [{"image": f"{p}{t}", "keypoints": f"k{p}{t}", "mask": f"m{p}{t}", "group": p} for p in "abc" for t in "01"]


def names(dataset: PairDataset) -> list[tuple[str, str]]:
    return [(pair["fixed"], pair["moving"]) for pair in (dataset[i] for i in range(len(dataset)))]


def test_neighbours_are_the_published_pairs() -> None:
    dataset = PairDataset(SCANS, pairing="neighbours")
    assert names(dataset) == [("i0", "i1"), ("i1", "i2"), ("i2", "i3"), ("i3", "i4"), ("i4", "i0")]
    assert dataset[4] == {"fixed": "i4", "moving": "i0", "fixed_label": "l4", "moving_label": "l0"}
    assert names(PairDataset(NLST, pairing="neighbours")) == [
        (f"{p}{t}", f"{p}{u}") for p in "abc" for t, u in ((0, 1), (1, 0))
    ]


def test_all_ordered_pairs() -> None:
    assert sorted(names(PairDataset(SCANS, pairing="all"))) == sorted(
        (f"i{a}", f"i{b}") for a in range(5) for b in range(5) if a != b
    )
    assert len(PairDataset(NLST, pairing="all")) == 6


def test_random_pairs_depend_on_seed_and_epoch_only() -> None:
    first, second = PairDataset(SCANS, seed=3), PairDataset(SCANS, seed=3)
    [second[i] for i in range(4)]  # what was asked before does not matter
    assert names(first) == names(second)
    epochs = []
    for epoch in range(4):
        first.set_epoch(epoch)
        pairs = names(first)
        assert sorted(fixed for fixed, _ in pairs) == [f"i{n}" for n in range(5)]  # each scan once as fixed
        assert all(fixed != moving for fixed, moving in pairs)
        epochs.append(tuple(pairs))
    assert len(set(epochs)) == 4
    first.set_epoch(0)
    assert names(first) == list(epochs[0])
    assert names(PairDataset(SCANS, seed=4)) != list(epochs[0])


def test_random_pairs_reach_every_pair() -> None:
    dataset = PairDataset(SCANS, length=3)
    seen = set()
    for epoch in range(60):
        dataset.set_epoch(epoch)
        seen.update(names(dataset))
    assert len(seen) == 20


def test_random_pairs_stay_within_the_patient() -> None:
    dataset = PairDataset(NLST, length=50)
    assert len(dataset) == 50
    assert all(fixed[0] == moving[0] and fixed != moving for fixed, moving in names(dataset))
    pair = dataset[0]
    assert pair["fixed_keypoints"] == f"k{pair['fixed']}"
    assert pair["moving_mask"] == f"m{pair['moving']}"


def test_given_pairs_pass() -> None:
    given = [{"fixed": "a", "moving": "b", "moving_label": "l", "id": "x"}]
    dataset = PairDataset(given, pairing="given")
    pair = dataset[0]
    assert pair == given[0]
    pair["fixed"] = "changed by a transform"
    assert dataset[0]["fixed"] == "a"


def test_a_sequence_with_an_end() -> None:
    dataset = PairDataset(SCANS, pairing="neighbours", length=7)
    assert dataset[5] == dataset[0]
    assert dataset[-1] == dataset[6]
    assert len([dataset[i] for i in range(7)]) == 7
    with pytest.raises(IndexError, match="pair 7 of 7"):
        dataset[7]


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_data_loader(workers: int) -> None:
    transform = Compose([Lambdad(["fixed", "moving"], _number)])
    dataset = PairDataset(SCANS, transform, seed=1)
    # persistent workers hold their own copy of the dataset, and the epoch must reach them
    loader = DataLoader(dataset, batch_size=2, num_workers=workers, persistent_workers=workers > 0)
    epochs = []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        expected = [(pair["fixed"], pair["moving"]) for pair in (dataset[i] for i in range(5))]
        loaded = [
            pair for batch in loader for pair in zip(batch["fixed"].tolist(), batch["moving"].tolist(), strict=True)
        ]
        assert loaded == expected
        epochs.append(loaded)
    assert epochs[0] != epochs[1]


def _number(name: str) -> int:
    return int(name[1:])


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([], {}, "at least 2 scans, and the list has 0"),
        (SCANS[:1], {}, "at least 2 scans, and the list has 1"),
        ([{"label": "x"}, *SCANS], {}, "item 1 of the scans has no 'image'"),
        ([{"fixed": "a", "moving": "b"}] * 2, {}, "pairing='given'"),
        ([{"image": "a"}, *SCANS], {}, "'label' is given for 5 of 6 scans"),
        ([{"image": "a", "keypoints": "k"}] * 2, {}, "within one patient"),
        (NLST[:3], {}, "the group 'b' has a single scan"),
        ([], {"pairing": "given"}, "empty"),
        (SCANS, {"pairing": "given"}, "no 'fixed'; to pair single scans"),
        ([{"fixed": "a"}], {"pairing": "given"}, "no 'moving'"),
    ],
)
def test_unusable_lists(data: list[dict[str, Any]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PairDataset(data, **options)


def test_unusable_options() -> None:
    with pytest.raises(ValueError, match="pairing is one of"):
        PairDataset(SCANS, pairing="twins")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one pair"):
        PairDataset(SCANS, length=0)


def test_a_short_epoch_of_given_pairs_goes_on_where_the_last_one_ended() -> None:
    pairs = [{"fixed": f"f{i}", "moving": f"m{i}"} for i in range(5)]
    dataset = PairDataset(pairs, pairing="given", length=2)
    seen = []
    for epoch in range(5):
        dataset.set_epoch(epoch)
        seen += [dataset[i]["fixed"] for i in range(2)]
    assert seen == [f"f{i % 5}" for i in range(10)]
