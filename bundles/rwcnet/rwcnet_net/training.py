"""Training RWCNet stage by stage: when which stage is trained, and what it sees and answers for."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ignite.engine import Events
from monai.data import MetaTensor
from monai.inferers import Inferer
from torch import Tensor, nn

from common.errors import InputError
from common.io import atomic_path
from common.layers.patches import Box, PatchGrid
from common.layers.warp import warp
from common.losses import MatchingLoss
from common.options import as_flag
from common.precision import bfloat16_region
from common.training import RegistrationObjective, prepare_training_batch
from common.transforms import SwapPaird
from rwcnet_net.cache import PriorCache
from rwcnet_net.network import RWCNet, StagePatch, StageState

__all__ = ["StageBatch", "StageInferer", "StageObjective", "StageRates", "StageSchedule", "StageSetter"]


class StageSchedule:
    """Divides the epochs of a training among the stages, and goes from one to the next.

    Because the stage follows from the epoch, one trainer runs them all, and continuing exactly, within a stage or
    between two, needs nothing beyond what any training saves. Writes `stage_K.pt` at the end of each stage.

    Args:
        network: what is trained.
        max_epochs: of all stages together; the last stages get none where they are fewer than the stages.
        shares: of the stages in the epochs; the paper's 30,000, 45,000 and 60,000 steps are (2, 3, 4).
        stage: train this one only, counted from 1.
        warm_start: a stage without trained weights starts from those of the stage before.
        output_dir: folder of `stage_K.pt`.

    Raises:
        InputError: when there is no such stage, or none of the epochs is its own.
    """

    def __init__(
        self,
        network: RWCNet,
        *,
        max_epochs: int,
        shares: Sequence[float] = (2, 3, 4),
        stage: int | None = None,
        warm_start: bool = True,
        output_dir: str | os.PathLike[str],
    ) -> None:
        count = len(network.stages)
        if len(shares) != count or min(shares) <= 0:
            raise InputError(f"stage_shares must be {count} positive numbers, one for each stage, got {list(shares)}")
        if stage is not None and stage not in range(1, count + 1):
            raise InputError(f"there is no stage {stage}: the network has stages 1 to {count}")
        if warm_start and any(finer > coarse for coarse, finer in pairwise(network.radii)):
            raise InputError(
                f"a stage of a larger window cannot start from the stage before, radii {list(network.radii)}: "
                "use --warm_start False"
            )
        if max_epochs < (stage or 1):
            raise InputError(f"max_epochs {max_epochs} leaves no epoch for stage {stage or 1}")
        self.network = network
        self.warm_start = warm_start
        self.output_dir = Path(output_dir)
        self.ends: list[int] = []  # number of the last epoch of each stage
        for i in range(count):
            end = round(max_epochs * sum(shares[: i + 1]) / sum(shares))
            first = self.ends[-1] + 1 if self.ends else 1
            left_to_others = max(max_epochs - (count - 1 - i), first)
            self.ends.append(min(max(end, first), left_to_others, max_epochs))
        self.start_epoch = self.ends[stage - 2] if stage is not None and stage > 1 else 0
        self.last_epoch = self.ends[stage - 1] if stage is not None else max_epochs
        self.initial_weights = str(self._weights_after(stage - 2)) if stage is not None and stage > 1 else None

    def stage_of(self, epoch: int) -> int:
        """Index of the stage that is trained in an epoch, epochs counted from 1."""
        return sum(epoch > end for end in self.ends[:-1])

    def attach(self, engine: Any) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, lambda e: self._begin(e.state.epoch))
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._end)

    def _begin(self, epoch: int) -> None:
        stage = self.stage_of(epoch)
        first = stage > 0 and epoch == self.ends[stage - 1] + 1
        if self.warm_start and first and int(self.network.trained_stages) <= stage:
            self.network.copy_stage(stage - 1, stage)
        self.network.train_stage(stage)

    def _end(self, engine: Any) -> None:
        epoch = engine.state.epoch
        if epoch in self.ends:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            with atomic_path(self._weights_after(self.stage_of(epoch))) as temporary:
                state = self.network.state_dict()
                torch.save({name: value.detach().cpu() for name, value in state.items()}, temporary)
        if epoch >= self.last_epoch:
            engine.terminate()

    def _weights_after(self, stage: int) -> Path:
        return self.output_dir / f"stage_{stage + 1}.pt"


class StageSetter:
    """The handler that puts a schedule to work, and with it the cache of the frozen stages.

    Args:
        schedule: the stages' epochs.
        cache: None to run the frozen stages for each pair anew.
    """

    def __init__(self, schedule: StageSchedule, *, cache: PriorCache | None = None) -> None:
        self.schedule = schedule
        self.cache = cache

    def attach(self, engine: Any) -> None:
        """Attach to a trainer."""
        self.schedule.attach(engine)
        if self.cache is not None:
            self.cache.attach(engine)


class StageRates:
    """Factor of the learning rate by step, for `LambdaLR`: one cycle for each stage, or constant.

    Args:
        schedule: the stages.
        epoch_length: steps of an epoch.
        policy: "one_cycle": up within 5 % of a stage, down to 1 % by a half cosine; "constant", as published.
    """

    def __init__(self, schedule: StageSchedule, *, epoch_length: int, policy: str = "one_cycle") -> None:
        if policy not in ("one_cycle", "constant"):
            raise InputError(f"the learning rate's policy is one_cycle or constant, got {policy!r}")
        # Plain values: LambdaLR saves them and reads them back.
        self.policy = policy
        self.first_step = schedule.start_epoch * epoch_length
        self.bounds = [0, *(end * epoch_length for end in schedule.ends)]

    def __call__(self, step: int) -> float:
        if self.policy == "constant":
            return 1.0
        position = self.first_step + step
        stage = min(sum(position >= bound for bound in self.bounds[1:]), len(self.bounds) - 2)
        start, stop = self.bounds[stage : stage + 2]
        share = min((position - start) / max(stop - start, 1), 1.0)
        if share < 0.05:
            return 0.05 + 0.95 * share / 0.05
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (share - 0.05) / 0.95))


class StageBatch:
    """A trainer's `prepare_batch`: what the stage in training sees of a pair, and what it is measured against.

    The stages before it are run without gradient, or their result is taken from the cache; then one patch is cut.
    Published: the loss compares patches of the warped image, which is cut at the patch's border and sampled twice.
    Here it is taken of the whole field, prior and stage composed, on the whole moving image.

    Args:
        network: what is trained.
        labels: values for the soft Dice loss.
        spacing: mm of the full-resolution grid, where the pair does not say it itself; 1 mm when None.
        swap: probability that fixed and moving scan change places, in the first stage (where the exact field of a
            generated pair is not at hand, which belongs to one direction only).
        cache: of the stages before.
        bfloat16: of the stages before, see `common.inference.SequenceInferer`.
    """

    def __init__(
        self,
        network: RWCNet,
        *,
        labels: Sequence[int] = (),
        spacing: float | Sequence[float] | None = None,
        swap: float = 0.5,
        cache: PriorCache | None = None,
        bfloat16: bool = False,
    ) -> None:
        self.network = network
        self.labels = list(labels)
        self.spacing = [1.0 if spacing is None else spacing] * 3 if not isinstance(spacing, Sequence) else list(spacing)
        self.swap = swap
        self.cache = cache
        self.bfloat16 = as_flag(bfloat16, "bfloat16")

    def __call__(
        self, batch: Mapping[str, Any], device: str | torch.device | None = None, non_blocking: bool = False, **_: Any
    ) -> tuple[StagePatch, dict[str, Any]]:
        """A collated pair -> the patch for `StageInferer`, and its counterpart for `RegistrationObjective`."""
        _, pair = prepare_training_batch(batch, device, non_blocking)
        pair = {key: value.as_tensor() if isinstance(value, MetaTensor) else value for key, value in pair.items()}
        image = pair["image"]
        stage = self.network.stage_in_training
        if stage is None:
            raise ValueError("no stage is in training: call train_stage first")
        # PyTorch's generator decides, whose state is saved with the training.
        if stage == 0 and "ddf" not in pair and float(torch.rand(())) < self.swap:
            image = image.flip(1)
            pair = {str(key): value for key, value in SwapPaird(prob=1.0)(pair).items()}
        with torch.no_grad():
            prior = self._prior(stage, image, pair)
            view = self.network.view(image, stage, prior)
            box = _random_box(self.network.patch_grid(stage, view.fixed.shape[2:]))
            target = self._target(stage, pair, box)
        patch = view.cut(box)
        target |= {"fixed": patch.fixed, "moving": view.moving, "warped": patch.moving, "stage": stage}
        if "ddf" in target:
            target["residual"] = _residual(target["ddf"], view.prior, box)
        return patch, target

    def _prior(self, stage: int, image: Tensor, pair: Mapping[str, Any]) -> StageState | None:
        if stage == 0:
            return None
        if self.cache is None:
            return self._estimate(image, stage)
        if image.shape[0] != 1:
            raise InputError(f"the cache takes one pair at a time, got a batch of {image.shape[0]}: use --batch_size 1")
        return self.cache.get(int(pair["pair_index"]), image, lambda: self._estimate(image, stage))

    def _estimate(self, image: Tensor, stage: int) -> StageState:
        with bfloat16_region(image, self.bfloat16):  # without gradients, small volumes are harmless
            state = self.network.estimate(image, stage)
        return StageState(ddf=state.ddf, hidden=state.hidden.float())

    def _target(self, stage: int, pair: Mapping[str, Any], box: Box) -> dict[str, Any]:
        """What belongs to the fixed image in the box; what belongs to the moving one as a whole."""
        scale = self.network.scales[stage]
        spacing = pair["spacing"].view(-1, 3)[0].tolist() if "spacing" in pair else self.spacing
        target: dict[str, Any] = {"spacing": [scale * s for s in spacing]}
        if "ddf" in pair:
            exact = self.network.to_stage(pair["ddf"], stage) / scale
            target["ddf"] = exact[(..., *box)] + _origin(box, exact)
            target["mask"] = self.network.to_stage(pair["mask"].float(), stage)[(..., *box)]
        if self.labels and "fixed_label" in pair and "moving_label" in pair:
            shares = [self._shares(pair[f"{role}_label"], scale) for role in ("fixed", "moving")]
            target |= {"fixed_one_hot": shares[0][(..., *box)], "moving_one_hot": shares[1]}
        if "fixed_keypoints" in pair and "moving_keypoints" in pair:
            fixed, moving = (self._stage_points(pair[f"{role}_keypoints"], scale) for role in ("fixed", "moving"))
            fixed = fixed - fixed.new_tensor([side.start for side in box])
            last = fixed.new_tensor([side.stop - side.start - 1 for side in box])
            outside = ((fixed < 0) | (fixed > last)).any(dim=-1, keepdim=True)
            target |= {"fixed_keypoints": fixed.masked_fill(outside, math.nan), "moving_keypoints": moving}
        return target

    def _shares(self, label: Tensor, scale: int) -> Tensor:
        """(B, 1, D, H, W) -> (B, labels, D/scale, ...): how much of each voxel has the label."""
        one_hot = torch.cat([label == value for value in self.labels], dim=1).float()
        return F.avg_pool3d(one_hot, scale) if scale > 1 else one_hot

    def _stage_points(self, points: Tensor, scale: int) -> Tensor:
        """Voxels of the full resolution -> of the stage's."""
        return points / scale if self.network.mode == "nearest" else (points + 0.5) / scale - 0.5


class StageObjective(RegistrationObjective):
    """A registration's objective, and the matching of the features of the stage in training.

    Args:
        network: what is trained.
        matching_weight: of `MatchingLoss`, for pairs with an exact field; 0 leaves it out.
        **options: see `RegistrationObjective`.
    """

    def __init__(self, *, network: RWCNet, matching_weight: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.matching_weight = matching_weight
        self._subnetworks = list(network.stages)  # in a list, they do not become this module's own
        self.matching = nn.ModuleList(MatchingLoss(radius=radius) for radius in network.radii)

    def forward(self, estimates: Tensor | Sequence[Tensor], pair: Mapping[str, Any]) -> Tensor:
        """Loss of a stage's estimates for a target of `StageBatch`."""
        loss = super().forward(estimates, pair)
        if self.matching_weight and "residual" in pair:
            features = self._subnetworks[pair["stage"]].encode(pair["fixed"], pair["warped"])
            matching = self.matching[pair["stage"]].to(loss.device)
            loss = loss + self.matching_weight * matching(*features, pair["residual"], pair["mask"])
        return loss


class StageInferer(Inferer):
    """Runs the stage in training on its patch.

    Args:
        sequence: return the field after every recurrent step, or after the last one only, as published.
        bfloat16: see `common.inference.SequenceInferer`.
        features_only: leave the recurrent steps out, most of the work, for a training in which the feature encoder
            alone learns, by `MatchingLoss`; the field is then the prior's.
    """

    def __init__(self, *, sequence: bool = True, bfloat16: bool = False, features_only: bool = False) -> None:
        super().__init__()
        self.sequence = sequence
        self.bfloat16 = as_flag(bfloat16, "bfloat16")
        self.features_only = as_flag(features_only, "features_only")

    def __call__(self, inputs: StagePatch, network: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
        """The whole field, prior and stage composed, from the patch's voxels into the stage's moving image.

        Displacements are counted from the patch's first voxel, so they include where the patch lies: (B, 3, d, h, w).
        """
        if self.features_only:
            fields = [inputs.fixed.new_zeros((inputs.fixed.shape[0], 3, *inputs.fixed.shape[2:]))]
        else:
            with _bfloat16_region(inputs.fixed, self.bfloat16):
                fields, _ = network.refine(inputs)
        origin = _origin(inputs.box, fields[0])
        totals = []
        for field in fields if self.sequence else fields[-1:]:
            placed = field + origin
            if inputs.prior is not None:
                placed = placed + warp(inputs.prior, placed, padding_mode="border")
            totals.append(placed)
        return totals


def _bfloat16_region(patch: Tensor, enabled: bool) -> AbstractContextManager[Any]:
    """Not where the motion encoder's kernels are longer than the patch, see `common.precision.float32_below`."""
    return bfloat16_region(patch, enabled and min(patch.shape[2:]) >= 7)


def _origin(box: Box, like: Tensor) -> Tensor:
    return like.new_tensor([side.start for side in box]).view(1, 3, 1, 1, 1)


def _residual(placed: Tensor, prior: Tensor | None, box: Box) -> Tensor:
    """What is left for the stage: r in `total(p) = r(p) + prior(p + r(p))`, by fixed-point iteration.

    Args:
        placed: (B, 3, d, h, w), the total, counted from the patch's first voxel.
        prior: (B, 3, D, H, W).
        box: the patch.
    """
    origin = _origin(box, placed)
    residual = total = placed - origin
    if prior is not None:
        residual = total - warp(prior, origin.expand_as(total), padding_mode="border")
        for _ in range(5):
            residual = total - warp(prior, residual + origin, padding_mode="border")
    return residual


def _random_box(grid: PatchGrid) -> Box:
    """A patch of the grid's size anywhere in the volume."""
    sides = []
    for n, size in zip(grid.shape, grid.size, strict=True):
        start = int(torch.randint((n - size) // grid.multiple + 1, ())) * grid.multiple
        sides.append(slice(start, start + size))
    return sides[0], sides[1], sides[2]
