"""RWCNet: recurrence with correlation network for deformable 3D registration.

V. Sivan, T. Vujovic, R. K. Ranabhat, A. Wong, S. McLachlin, M. Hardisty: "Recurrence With Correlation Network for
Medical Image Registration", arXiv 2302.02283; the preprint of 2026, doi 10.20944/preprints202601.2324.v1, is what the
comments call the paper. "Published" is the behaviour of the authors' code (github.com/vigsivan/RWCNet).

From 1/4 over 1/2 to the full resolution, each stage has a recurrent sub-network of its own. A stage warps the moving
image by the field of the stage before, cuts both images into patches where the whole would not fit the memory, lets
the sub-network align each patch, and composes the result with the field it started from. The hidden state goes on to
the next stage. Stages are trained one after the other, the earlier ones frozen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.geometry.fields import compose
from common.layers.contract import check_pair
from common.layers.patches import Box, PatchGrid
from common.layers.warp import warp
from rwcnet_net.subnetwork import Features, SubNetwork, Variant

__all__ = ["RWCNet", "StagePatch", "StageState", "StageView"]


@dataclass(frozen=True, kw_only=True)
class StageState:
    """What a stage hands on.

    Attributes:
        ddf: (B, 3, D, H, W), the whole field so far, in voxels of the stage's resolution.
        hidden: (B, hidden, D, H, W), the sub-network's last hidden state.
    """

    ddf: Tensor
    hidden: Tensor


@dataclass(frozen=True, kw_only=True)
class StagePatch:
    """What a sub-network sees of one patch.

    Attributes:
        stage: index of the stage.
        fixed, moving: (B, 1, d, h, w); the moving image warped by the prior field.
        hidden: (B, hidden, d, h, w) of the prior stage, or None in the first.
        prior: (B, 3, D, H, W), the prior field of the whole stage, or None in the first.
        box: where the patch lies.
    """

    stage: int
    fixed: Tensor
    moving: Tensor
    hidden: Tensor | None
    prior: Tensor | None
    box: Box


class StageView:
    """A pair as one stage sees it, as a whole: images at its resolution, the moving one warped by the prior field.

    Args:
        stage: index of the stage.
        fixed, moving: (B, 1, D, H, W) at the stage's resolution.
        prior: state of the stage before.
        ratio: between the resolution of that one and this one.
        mode: of the upsampling, "trilinear" or "nearest".
    """

    def __init__(
        self, *, stage: int, fixed: Tensor, moving: Tensor, prior: StageState | None, ratio: int, mode: str
    ) -> None:
        self.stage = stage
        self.fixed = fixed
        self.moving = moving
        self._coarse_hidden = None if prior is None else prior.hidden
        self._ratio = ratio
        self._mode = mode
        self.prior = None if prior is None else _upsample(prior.ddf, ratio, mode) * ratio
        # As a whole and then cut, so that what enters a patch from outside is really there.
        self.warped = moving if self.prior is None else warp(moving, self.prior, padding_mode="zeros")

    def cut(self, box: Box) -> StagePatch:
        """One patch."""
        return StagePatch(
            stage=self.stage,
            fixed=self.fixed[(..., *box)],
            moving=self.warped[(..., *box)],
            hidden=self._hidden(box),
            prior=self.prior,
            box=box,
        )

    def _hidden(self, box: Box) -> Tensor | None:
        """The prior hidden state in the box: upsampled here, as 64 full-resolution channels need 8 times the memory."""
        if self._coarse_hidden is None:
            return None
        margin = 1  # coarse voxels beside the box that its trilinear values depend on
        outer, inner = [], []
        for side, n in zip(box, self._coarse_hidden.shape[2:], strict=True):
            low = max(side.start // self._ratio - margin, 0)
            outer.append(slice(low, min(side.stop // self._ratio + margin, n)))
            inner.append(slice(side.start - low * self._ratio, side.stop - low * self._ratio))
        return _upsample(self._coarse_hidden[(..., *outer)], self._ratio, self._mode)[(..., *inner)]


class RWCNet(nn.Module):
    """Recurrence with correlation network, coarse to fine. 9,293,312 parameters in the "paper" variant.

    Published variant: 2,932,400 a sub-network with radius 3 and 2,930,656 with 2, which is 3,098,844 and 3,097,100 less
    two layers that the public code makes and never uses.

    Args:
        variant: "paper" or "published", see `SubNetwork`. "published" also resamples images, fields and hidden states
            by nearest neighbour between the stages; "paper" averages images and interpolates the others.
        scales: resolution of each stage, as the factor by which it is coarser than the image.
        steps: recurrent steps of each stage. More or fewer of them need no other weights.
        radii: of each stage's correlation window.
        patches: number of patches of each stage along each axis.
        overlap: voxels that neighbouring patches share; their results are blended there. 0 is the published tiling.
        correlation, features, hidden_channels, dropout, detach, diffeomorphic: see `SubNetwork`.
    """

    def __init__(
        self,
        *,
        variant: Variant = "paper",
        scales: Sequence[int] = (4, 2, 1),
        steps: Sequence[int] = (12, 12, 4),
        radii: Sequence[int] = (3, 3, 2),
        patches: Sequence[int | Sequence[int]] = (1, 2, 2),
        overlap: int = 8,
        correlation: bool = True,
        features: Features = "intensity",
        hidden_channels: int = 64,
        dropout: float = 0.5,
        detach: bool = False,
        diffeomorphic: bool = False,
    ) -> None:
        super().__init__()
        _check_options(scales, steps, radii, patches)
        self.variant = variant
        self.scales = tuple(scales)
        self.steps = tuple(steps)
        self.radii = tuple(radii)
        self.patches = [(n, n, n) if isinstance(n, int) else tuple(n) for n in patches]
        self.overlap = overlap
        self.diffeomorphic = diffeomorphic
        self.mode = "nearest" if variant == "published" else "trilinear"
        self.stages = nn.ModuleList(
            SubNetwork(
                radius=radius,
                variant=variant,
                correlation=correlation,
                features=features,
                hidden_channels=hidden_channels,
                dropout=dropout,
                detach=detach,
                diffeomorphic=diffeomorphic,
            )
            for radius in radii
        )
        # Travels with the weights: those of a training that is not through yet register with the stages they have.
        self.register_buffer("trained_stages", torch.tensor(0))
        self.stage_in_training: int | None = None

    @property
    def stride(self) -> int:
        """Sizes must be multiples of this."""
        return self.scales[0]

    @property
    def stages_in_use(self) -> int:
        """Number of stages that `forward` runs: those with trained weights, or all where none has any yet."""
        return int(self.trained_stages) or len(self.stages)

    def forward(self, image: Tensor) -> Tensor:
        """Register a pair.

        Args:
            image: (B, 2, D, H, W), channel 0 moving, channel 1 fixed, intensities in [0, 1].

        Returns:
            (B, 3, D, H, W): ddf in voxels, pull-back, on the fixed grid.

        Raises:
            ValueError: when a size is not a multiple of 4.
        """
        state = self.estimate(image, self.stages_in_use)
        return self._at_full_resolution(state.ddf, self.stages_in_use - 1)

    def forward_sequence(self, image: Tensor) -> list[Tensor]:
        """The field after each stage, coarse to fine, at full resolution; the last is `forward`'s.

        Args:
            image: as for `forward`.

        Returns:
            one field (B, 3, D, H, W) a stage, in voxels.
        """
        sequence, state = [], None
        for stage in range(self.stages_in_use):
            state = self._run_stage(stage, image, state)
            sequence.append(self._at_full_resolution(state.ddf, stage))
        return sequence

    def estimate(self, image: Tensor, stages: int) -> StageState:
        """The state after the first `stages` stages."""
        state = None
        for stage in range(stages):
            state = self._run_stage(stage, image, state)
        if state is None:
            raise ValueError("an estimate needs at least one stage")
        return state

    def train_stage(self, stage: int) -> None:
        """Make one stage trainable and freeze the others.

        Args:
            stage: its index.
        """
        self.stage_in_training = stage
        self.trained_stages.clamp_(min=stage + 1)
        for index, subnetwork in enumerate(self.stages):
            subnetwork.requires_grad_(index == stage)
            if index != stage:
                subnetwork.zero_grad(set_to_none=True)  # Adam moves what has a gradient, be it 0
        self.train(self.training)

    def copy_stage(self, source: int, target: int) -> None:
        """Give a stage the weights of another; of a larger window's weights it takes the inner part.

        Args:
            source, target: indices of the stages.
        """
        copied = dict(self.stages[source].state_dict())
        inner, outer = (2 * self.radii[stage] + 1 for stage in (target, source))
        name = "update_block.motion_encoder.correlation.0.weight"
        if inner != outer and self.stages[source].correlation is not None:
            if inner > outer:
                raise ValueError(f"weights for a window of {outer}^3 voxels do not fill one of {inner}^3")
            margin = slice((outer - inner) // 2, (outer + inner) // 2)
            window = copied[name].unflatten(1, (outer, outer, outer))[:, margin, margin, margin]
            copied[name] = window.flatten(1, 3)
        self.stages[target].load_state_dict(copied)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module; of a network with fewer stages, the first stages' weights. `trained_stages` then says that
        the others have none, so that they do not run before they are trained."""
        trained = int(state_dict.get("trained_stages", 0))
        if strict and 0 < trained < len(self.stages):
            missing = self.state_dict()
            state_dict = {**{name: missing[name] for name in missing if _stage_of(name) >= trained}, **state_dict}
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def train(self, mode: bool = True) -> RWCNet:
        """A frozen stage stays as it is used: without dropout."""
        super().train(mode)
        for subnetwork in self.stages:
            if not next(subnetwork.parameters()).requires_grad:
                subnetwork.eval()
        return self

    def view(self, image: Tensor, stage: int, prior: StageState | None) -> StageView:
        """A pair (B, 2, D, H, W) as a stage sees it."""
        check_pair(image, network="RWCNet", stride=self.stride)
        moving, fixed = torch.split(self.to_stage(image, stage), 1, dim=1)
        ratio = self.scales[stage - 1] // self.scales[stage] if prior is not None else 1
        return StageView(stage=stage, fixed=fixed, moving=moving, prior=prior, ratio=ratio, mode=self.mode)

    def to_stage(self, volume: Tensor, stage: int) -> Tensor:
        """(B, C, D, H, W) at full resolution -> at a stage's resolution."""
        scale = self.scales[stage]
        if self.mode == "nearest":
            return volume[..., ::scale, ::scale, ::scale]
        return F.avg_pool3d(volume, scale) if scale > 1 else volume

    def patch_grid(self, stage: int, shape: Sequence[int]) -> PatchGrid:
        """How a stage's volume (D, H, W) is cut."""
        # Patches start on voxels of the stage before, whose hidden state they continue.
        multiple = self.scales[stage - 1] // self.scales[stage] if stage else 1
        return PatchGrid(shape, patches=self.patches[stage], overlap=self.overlap, multiple=multiple)

    def refine(self, patch: StagePatch) -> tuple[list[Tensor], Tensor]:
        """Align one patch.

        Returns:
            the stage's own field (B, 3, d, h, w) after each recurrent step, prior not included, and the hidden state.
        """
        return self.stages[patch.stage](patch.fixed, patch.moving, steps=self.steps[patch.stage], hidden=patch.hidden)

    def _run_stage(self, stage: int, image: Tensor, prior: StageState | None) -> StageState:
        view = self.view(image, stage, prior)
        grid = self.patch_grid(stage, view.fixed.shape[2:])
        fields, hiddens = [], []
        for box in grid.boxes:
            sequence, hidden = self.refine(view.cut(box))
            fields.append(sequence[-1])
            hiddens.append(hidden)
        ddf = grid.join(fields)
        if view.prior is not None:
            ddf = compose(view.prior, ddf)
        last = stage + 1 == len(self.scales)
        return StageState(ddf=ddf, hidden=hiddens[0] if last else grid.join(hiddens))

    def _at_full_resolution(self, ddf: Tensor, stage: int) -> Tensor:
        scale = self.scales[stage]
        return _upsample(ddf, scale, self.mode) * scale


def _stage_of(name: str) -> int:
    """Index of the stage that an entry of the state dict belongs to, -1 for none."""
    return int(name.split(".")[1]) if name.startswith("stages.") else -1


def _upsample(volume: Tensor, ratio: int, mode: str) -> Tensor:
    """By voxel centres (not corners), as averaging blocks of voxels makes the coarse grids; displacements then grow by
    `ratio` exactly."""
    if ratio == 1:
        return volume
    return F.interpolate(volume, scale_factor=ratio, mode=mode)


def _check_options(
    scales: Sequence[int], steps: Sequence[int], radii: Sequence[int], patches: Sequence[int | Sequence[int]]
) -> None:
    if not scales or not len(scales) == len(steps) == len(radii) == len(patches):
        raise ValueError(
            f"each stage has a scale, steps, a radius and patches, got {list(scales)}, {list(steps)}, {list(radii)} "
            f"and {list(patches)}"
        )
    if min(scales) < 1 or min(steps) < 1:
        raise ValueError(f"scales and steps must be positive, got {list(scales)} and {list(steps)}")
    if any(coarse <= fine or coarse % fine for coarse, fine in pairwise(scales)):
        raise ValueError(f"each scale must be a multiple of the next, from coarse to fine, got {list(scales)}")
