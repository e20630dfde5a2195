"""What generated pairs look like: the one place of the generator's numbers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SyntheticRecipe"]


@dataclass(frozen=True, kw_only=True)
class SyntheticRecipe:
    """What generated pairs look like. A (low, high) is the range of a uniform draw, made anew for each pair.

    Attributes:
        labels: number of shape classes.
        shape_scales: voxels between the control points of the noise that the shapes are cut from.
        coarse_share: of pairs whose shapes are cut from the largest of these scales alone: large areas without edges.
        background: probability that the shapes end at a random body outline, beyond which there is background.
        tubes: largest number of systems of thin tubes (vessels) that run through the shapes; they are label
            `labels + 1`.
        tube_radius: of them, in voxels, about.
        label_maps: folder of NIfTI label maps of people, to paint in place of random shapes.
        label_map_share: of pairs that are painted label maps.
        label_map_spacing: voxels of the map between the voxels of a pair.
        between_share: of epochs (all but the first) whose painted label maps are of two people: of one contrast,
            without an exact field, `labels` random structures with their label, 1 to `labels`.
        same_contrast: probability that both images have the same intensities per shape.
        softness: standard deviation in voxels of the blur between shapes, common to both images.
        ct: probability that both images look like CT: air, fat, soft tissue in a narrow band, bone; one scale of
            intensities; noise with a grain.
        texture: amplitude of the texture inside the shapes, common to both images.
        bias: amplitude of the smooth multiplicative field of each image (log scale).
        noise: standard deviation of each image's noise.
        rician: probability that this noise is that of a magnitude image, as in MR.
        blur: standard deviation in voxels of each image's blur.
        gamma: exponent range of each image, on log scale.
        artefacts: probability, for each image, of a ghost, of uneven slices or of stripes.
        missing: probability, for each image, that its field of view ends early at one side.
        missing_part: how much of the axis is then blank.
        motion: factor of all of the following but the slide, so that pairs that are all but aligned are seen as well.
        field_scales: voxels between the control points of the velocity field.
        field_strength: standard deviation of the velocity at each scale, as a fraction of that scale.
        sliding: probability that the inside of a cylinder of random outline slides along its axis.
        slip: by how many voxels.
        rotation: largest rotation about each axis, degrees.
        scaling: largest relative change of size along each axis.
        shear: largest shear.
        translation: largest shift along each axis, as a fraction of the axis.
    """

    labels: int = 16
    shape_scales: tuple[float, ...] = (6.0, 12.0, 24.0)
    coarse_share: float = 0.0
    background: float = 0.75
    tubes: int = 0
    tube_radius: tuple[float, float] = (0.8, 2.5)
    label_maps: str | None = None
    label_map_share: float = 0.3
    label_map_spacing: tuple[float, float] = (1.0, 2.5)
    between_share: float = 0.0
    same_contrast: float = 0.6
    softness: tuple[float, float] = (0.0, 0.0)
    ct: float = 0.0
    texture: tuple[float, float] = (0.0, 0.12)
    bias: tuple[float, float] = (0.0, 0.3)
    noise: tuple[float, float] = (0.0, 0.05)
    rician: float = 0.0
    blur: tuple[float, float] = (0.0, 0.8)
    gamma: tuple[float, float] = (-0.3, 0.3)
    artefacts: float = 0.0
    missing: float = 0.0
    missing_part: tuple[float, float] = (0.05, 0.3)
    motion: tuple[float, float] = (1.0, 1.0)
    field_scales: tuple[float, ...] = (8.0, 16.0, 32.0)
    field_strength: tuple[float, float] = (0.02, 0.2)
    sliding: float = 0.0
    slip: tuple[float, float] = (1.0, 8.0)
    rotation: float = 8.0
    scaling: float = 0.08
    shear: float = 0.05
    translation: float = 0.04
