"""What is trained when: the stages' epochs, their learning rates, and what stays frozen."""

from __future__ import annotations

import random
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from rwcnet_net import RWCNet
from rwcnet_net.training import StageRates, StageSchedule
from small_rwcnet import small
from torch import Tensor

from common.errors import InputError

pytestmark = pytest.mark.usefixtures("shallow_encoders")


@pytest.fixture
def three_stages() -> RWCNet:
    return small()


def schedule(network: RWCNet, **options: Any) -> StageSchedule:
    return StageSchedule(network, **{"max_epochs": 9, "output_dir": "unused", **options})


class TestSchedule:
    @pytest.mark.parametrize(
        ("max_epochs", "ends"), [(9, [2, 5, 9]), (18, [4, 10, 18]), (3, [1, 2, 3]), (30, [7, 17, 30])]
    )
    def test_shares(self, three_stages: RWCNet, max_epochs: int, ends: list[int]) -> None:
        """The paper's 2, 3 and 4 of 9."""
        plan = schedule(three_stages, max_epochs=max_epochs)
        assert plan.ends == ends
        stages = [plan.stage_of(epoch) for epoch in range(1, max_epochs + 1)]
        assert [stages.count(stage) for stage in range(3)] == [ends[0], ends[1] - ends[0], ends[2] - ends[1]]
        assert stages == sorted(stages)
        assert (plan.start_epoch, plan.last_epoch, plan.initial_weights) == (0, max_epochs, None)

    def test_every_stage_has_an_epoch_and_every_epoch_a_stage(self, three_stages: RWCNet) -> None:
        draw = random.Random(0)
        shares = [(2, 3, 4), (4, 1, 4), (100, 1, 1), (1, 1, 100), (1, 100, 1), (5, 0.001, 5)]
        shares += [tuple(draw.randint(1, 20) for _ in range(3)) for _ in range(40)]
        for max_epochs, share in product(range(3, 20), shares):
            plan = schedule(three_stages, max_epochs=max_epochs, shares=share)
            stages = [plan.stage_of(epoch) for epoch in range(1, max_epochs + 1)]
            assert stages == sorted(stages)
            counts = [stages.count(stage) for stage in range(3)]
            assert min(counts) >= 1, (max_epochs, share, counts)
            assert sum(counts) == max_epochs
            ends = [sum(counts[: stage + 1]) for stage in range(3)]
            assert plan.ends == ends

    @pytest.mark.parametrize(("max_epochs", "stages"), [(1, [0]), (2, [0, 1])])
    def test_fewer_epochs_than_stages(self, three_stages: RWCNet, max_epochs: int, stages: list[int]) -> None:
        """The last stages get none."""
        plan = schedule(three_stages, max_epochs=max_epochs)
        assert [plan.stage_of(epoch) for epoch in range(1, max_epochs + 1)] == stages
        rates = StageRates(plan, epoch_length=10)
        values = [rates(step) for step in range(10 * max_epochs + 1)]  # LambdaLR asks once more after the last step
        assert values[::10][:-1] == pytest.approx([0.05] * max_epochs)
        assert all(0 < value <= 1 for value in values)

    @pytest.mark.parametrize(("stage", "start", "last"), [(1, 0, 4), (2, 4, 10), (3, 10, 18)])
    def test_a_single_stage(self, three_stages: RWCNet, stage: int, start: int, last: int) -> None:
        """Its epochs are those that it has in the whole; it goes on from the weights of the stage before."""
        plan = schedule(three_stages, max_epochs=18, stage=stage, output_dir="runs/there")
        assert (plan.start_epoch, plan.last_epoch) == (start, last)
        before = str(Path("runs/there") / f"stage_{stage - 1}.pt")
        assert plan.initial_weights == (None if stage == 1 else before)
        assert {plan.stage_of(epoch) for epoch in range(start + 1, last + 1)} == {stage - 1}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"shares": (1, 2)}, r"^stage_shares must be 3 positive numbers, one for each stage, got \[1, 2\]$"),
            ({"shares": (1, 0, 2)}, r"^stage_shares must be 3 positive numbers.* got \[1, 0, 2\]$"),
            ({"stage": 4}, "^there is no stage 4: the network has stages 1 to 3$"),
            ({"stage": 0}, "^there is no stage 0: the network has stages 1 to 3$"),
            ({"max_epochs": 0}, "^max_epochs 0 leaves no epoch for stage 1$"),
            ({"max_epochs": 2, "stage": 3}, "^max_epochs 2 leaves no epoch for stage 3$"),
        ],
    )
    def test_impossible_plans(self, three_stages: RWCNet, options: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            schedule(three_stages, **options)

    def test_a_larger_window_cannot_start_from_a_smaller_one(self) -> None:
        growing = small(radii=(1, 2, 2))
        with pytest.raises(
            InputError, match=r"^a stage of a larger window .* radii \[1, 2, 2\]: use --warm_start False$"
        ):
            schedule(growing)
        assert schedule(growing, warm_start=False).ends


class TestRates:
    LENGTH = 50

    def rates(self, network: RWCNet, policy: str = "one_cycle", **options: Any) -> StageRates:
        return StageRates(schedule(network, **options), epoch_length=self.LENGTH, policy=policy)

    def test_each_stage_has_a_cycle_of_its_own(self, three_stages: RWCNet) -> None:
        factor = self.rates(three_stages)
        for start, stop in pairwise([0, 100, 250, 450]):
            values = [factor(step) for step in range(start, stop)]
            assert values[0] == pytest.approx(0.05)
            assert max(values) == pytest.approx(1.0, abs=0.01)
            assert values[-1] == pytest.approx(0.01, abs=2e-3)
            peak = values.index(max(values))
            assert peak == pytest.approx(0.05 * (stop - start), abs=1)
            assert all(a < b for a, b in pairwise(values[: peak + 1]))
            assert all(a > b for a, b in pairwise(values[peak:]))
        # LambdaLR asks once more after the last step
        assert factor(450) == pytest.approx(0.01)

    def test_a_single_stage_runs_its_cycle(self, three_stages: RWCNet) -> None:
        whole, third = self.rates(three_stages), self.rates(three_stages, stage=3)
        assert [third(step) for step in range(200)] == [whole(250 + step) for step in range(200)]

    def test_constant(self, three_stages: RWCNet) -> None:
        factor = self.rates(three_stages, policy="constant")
        assert {factor(step) for step in range(451)} == {1.0}

    def test_unknown_policy(self, three_stages: RWCNet) -> None:
        with pytest.raises(InputError, match=r"^the learning rate's policy is one_cycle or constant, got 'cosine'$"):
            self.rates(three_stages, policy="cosine")

    def test_survives_being_saved(self, three_stages: RWCNet, tmp_path: Path) -> None:
        """Also where another plan was built before it was read back."""

        def scheduler(rates: StageRates) -> Any:
            parameter = torch.nn.Parameter(torch.zeros(1))
            return torch.optim.lr_scheduler.LambdaLR(torch.optim.Adam([parameter], lr=0.2), rates)

        def follow(one: Any, steps: int) -> list[float]:
            values = []
            for _ in range(steps):
                one.optimizer.step()
                one.step()
                values += one.get_last_lr()
            return values

        first = scheduler(self.rates(three_stages, stage=2))
        follow(first, 30)
        torch.save([first.state_dict(), first.optimizer.state_dict()], tmp_path / "state.pt")
        second = scheduler(self.rates(three_stages))
        state, optimizer = torch.load(tmp_path / "state.pt", weights_only=True)
        second.load_state_dict(state)
        second.optimizer.load_state_dict(optimizer)
        expected = follow(first, 300)
        assert follow(second, 300) == expected
        assert len(set(expected)) > 100


class TestFreezing:
    def test_momentum_does_not_move_a_frozen_stage(self, three_stages: RWCNet) -> None:
        network = three_stages
        optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
        frozen: dict[str, Tensor] = {}
        for stage in range(3):
            network.train_stage(stage)
            before = {name: value.clone() for name, value in network.state_dict().items()}
            for _ in range(2):
                optimizer.zero_grad()
                sum((p - 3).square().sum() for p in network.parameters() if p.requires_grad).backward()  # type: ignore[union-attr]
                optimizer.step()
            for name, value in network.named_parameters():
                assert torch.equal(value, before[name]) is not name.startswith(f"stages.{stage}."), name
            frozen |= {n: p.detach().clone() for n, p in network.named_parameters() if n.startswith(f"stages.{stage}.")}
        for name, parameter in network.named_parameters():
            assert torch.equal(parameter, frozen[name]), name
            assert optimizer.state[parameter]["exp_avg"].any(), name  # which would have moved it
