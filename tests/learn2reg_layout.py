"""Small data sets on disk in the exact layout of Learn2Reg's OASIS and NLST, with a known displacement.

Every scan is one analytic anatomy seen through a smooth deformation of its own, `image(p) = anatomy(p + v(p))`, sampled
without any interpolation; so the map between two scans is known to rounding errors, `Layout.displacement`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

OASIS_TRAINING = (1, 2, 3, 4)
OASIS_VALIDATION = (395, 396, 397)
NLST_TRAINING = (1, 2, 3)
NLST_VALIDATION = (101, 102)

Deformation = Callable[[np.ndarray], np.ndarray]
"""(3, ...) voxels -> (3, ...) voxels"""


@dataclass
class Layout:
    """A data set on disk.

    Attributes:
        json: its description, TASK_dataset.json.
        shape: of every scan.
        deformations: v of each scan, by file name without folder and extension.
    """

    json: Path
    shape: tuple[int, int, int]
    deformations: dict[str, Deformation] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.json.parent

    def path(self, kind: str, name: str) -> Path:
        """File of a scan: `kind` is "images", "labels", "masks" or "keypoints"."""
        return self.folder / f"{kind}Tr" / f"{name}{'.csv' if kind == 'keypoints' else '.nii.gz'}"

    def partner(self, fixed: str, moving: str, points: np.ndarray) -> np.ndarray:
        """(3, ...) voxels of the moving scan that show what the fixed scan shows at `points` (3, ...)."""
        return _partner(self.deformations[fixed], self.deformations[moving], points)

    def displacement(self, fixed: str, moving: str) -> np.ndarray:
        """(3, D, H, W), voxels, pull-back: moving(p + displacement(p)) = fixed(p)."""
        p = np.indices(self.shape).astype(np.float64)
        return self.partner(fixed, moving, p) - p


def make_oasis(
    folder: Path,
    *,
    shape: tuple[int, int, int] = (32, 48, 32),
    labels: int = 35,
    affine: np.ndarray | None = None,
    amplitude: float = 1.5,
    seed: int = 0,
) -> Layout:
    """OASIS: one skull-stripped T1 a person, intensities in [0, 1], unpaired, labels 1 to 35.

    Args:
        folder: made when missing.
        shape: voxels of every scan.
        labels: number of structures.
        affine: (4, 4) of the files, RAS; 1 mm when None.
        amplitude: largest v along each axis, voxels.
        seed: of everything.
    """
    generator = np.random.default_rng(seed)
    layout = Layout(folder / "OASIS_dataset.json", shape)
    affine = np.eye(4) if affine is None else affine
    size = np.array(shape)
    # Structures: what is nearest to one of these places, inside an ellipsoid.
    seeds = size[:, None] * (0.5 + 0.36 * generator.uniform(-1, 1, (3, labels)))
    intensity = np.concatenate([[0.0], generator.uniform(0.25, 0.9, labels)])
    waves = _waves(generator, 6, 3.0)

    def structure(x: np.ndarray) -> np.ndarray:
        inside = ((x.reshape(3, -1) / size[:, None] - 0.5) ** 2).sum(0) < 0.42**2
        distance = ((x.reshape(3, 1, -1) - seeds[:, :, None]) ** 2).sum(0)
        return (inside * (distance.argmin(0) + 1)).reshape(x.shape[1:])

    names = {}
    for case in (*OASIS_TRAINING, *OASIS_VALIDATION, 451, 452):
        name = f"OASIS_{case:04d}_0000"
        names[case] = name
        layout.deformations[name] = _deformation(generator, shape, amplitude)
        p = np.indices(shape).astype(np.float64)
        x = p + layout.deformations[name](p)
        label = structure(x)
        if case == OASIS_VALIDATION[1]:
            label[label == labels] = 0  # one person lacks a structure: it counts in no figure of this person's pairs
        image = (intensity[label] + 0.08 * waves(x)) * (label > 0)
        test = case > OASIS_VALIDATION[-1]
        _save(folder, "images", name, np.clip(image, 0, 1).astype(np.float32), affine, test)
        if not test:
            _save(folder, "labels", name, label.astype(np.uint8), affine)
            _save(folder, "masks", name, (label > 0).astype(np.uint8), affine)
    training = [names[case] for case in (*OASIS_TRAINING, *OASIS_VALIDATION)]
    validation = [names[case] for case in OASIS_VALIDATION]
    _describe(
        layout,
        name="OASIS",
        pairings="unpaired",
        direction={"fixed": 0, "moving": 0},
        modality="MR",
        labels={str(n): "background" if n == 0 else f"structure {n}" for n in range(labels + 1)},
        # The masks are there and the json does not name them.
        training=[{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in training],
        test=[f"./imagesTs/{names[case]}.nii.gz" for case in (451, 452)],
        training_pairs=[],
        validation_pairs=list(pairwise(validation)),
        test_pairs=[(names[451], names[452])],
    )
    return layout


def make_nlst(
    folder: Path,
    *,
    shape: tuple[int, int, int] = (32, 32, 48),
    keypoints: int = 40,
    affine: np.ndarray | None = None,
    amplitude: float = 2.0,
    seed: int = 0,
) -> Layout:
    """NLST: two chest CTs a person, 0000 fixed and 0001 moving, lung masks, corresponding key points as CSV files.

    The json lists the key points as `.nii.gz`, the validation scans under "training" and the validation pairs under
    "training_paired_images", as the challenge's does.

    Args:
        folder: made when missing.
        shape: voxels of every scan.
        keypoints: pairs of points, in the fixed scan's lungs.
        affine: (4, 4) of the files, RAS; 1.5 mm when None.
        amplitude: largest v along each axis, voxels.
        seed: of everything.
    """
    generator = np.random.default_rng(seed)
    layout = Layout(folder / "NLST_dataset.json", shape)
    affine = np.diag([1.5, 1.5, 1.5, 1.0]) if affine is None else affine
    size = np.array(shape)[:, None]
    listed, pairs = [], []
    for case in (*NLST_TRAINING, *NLST_VALIDATION, 201):
        waves = _waves(generator, 8, 2.5)  # the vessels of this person
        test = case > NLST_VALIDATION[-1]
        names = [f"NLST_{case:04d}_{time:04d}" for time in (0, 1)]
        for name in names:
            layout.deformations[name] = _deformation(generator, shape, amplitude)
            p = np.indices(shape).astype(np.float64)
            x = p + layout.deformations[name](p)
            body, lungs = _chest(x, size)
            image = np.where(body, 40.0, -1000.0) + lungs * (-840.0 + 150.0 * waves(x)) + 20 * body * waves(x)
            _save(folder, "images", name, image.round().astype(np.int16), affine, test)
            if not test:
                _save(folder, "masks", name, lungs.astype(np.uint8), affine)
        if test:
            continue
        p = np.indices(shape).reshape(3, -1).astype(np.float64)
        inner = (p >= 3).all(0) & (p <= size - 4).all(0)
        inside = p[:, inner & _chest(p + layout.deformations[names[0]](p), size)[1]]
        fixed = inside[:, generator.integers(0, inside.shape[1], keypoints)] + generator.uniform(
            -0.5, 0.5, (3, keypoints)
        )
        moving = layout.partner(*names, fixed)
        for name, points in zip(names, (fixed, moving), strict=True):
            path = layout.path("keypoints", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savetxt(path, points.T, fmt="%.6f", delimiter=",")
            kinds = {"image": "images", "mask": "masks", "keypoints": "keypoints"}
            listed.append({key: f"./{kind}Tr/{name}.nii.gz" for key, kind in kinds.items()})
        pairs.append((names[0], names[1]))
    _describe(
        layout,
        name="NLST",
        pairings="paired",
        direction={"fixed": 0, "moving": 1},
        modality="CT",
        labels={},
        training=listed,
        test=[f"./imagesTs/NLST_0201_{time:04d}.nii.gz" for time in (0, 1)],
        training_pairs=pairs,
        validation_pairs=pairs[len(NLST_TRAINING) :],
        test_pairs=[("NLST_0201_0000", "NLST_0201_0001")],
    )
    return layout


def _chest(x: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inside the body, and inside the lungs."""
    unit = (x.reshape(3, -1) / size - 0.5).reshape(x.shape)
    body = (unit[0] / 0.46) ** 2 + (unit[1] / 0.42) ** 2 < 1
    lungs = np.zeros(x.shape[1:], dtype=bool)
    for side in (-0.2, 0.2):
        lungs |= ((unit[0] - side) / 0.16) ** 2 + (unit[1] / 0.28) ** 2 + (unit[2] / 0.38) ** 2 < 1
    return body, lungs


def _waves(generator: np.random.Generator, count: int, length: float) -> Callable[[np.ndarray], np.ndarray]:
    """A smooth texture in [-1, 1] of (3, ...) voxels; `length` is the shortest wave over 2 pi, voxels."""
    vectors = generator.uniform(-1, 1, (count, 3)) / length
    phases = generator.uniform(0, 2 * np.pi, count)

    def texture(x: np.ndarray) -> np.ndarray:
        return np.mean(
            [np.sin(np.tensordot(v, x, 1) + phase) for v, phase in zip(vectors, phases, strict=True)], axis=0
        )

    return texture


def _deformation(generator: np.random.Generator, shape: Sequence[int], amplitude: float) -> Deformation:
    """A sum of two waves along each axis, each longer than the volume, so that it does not fold."""
    scale = 1.0 / (2 * np.array(shape))
    frequency = 2 * np.pi * generator.uniform(0.6, 1.4, (3, 2, 3)) * generator.choice([-1, 1], (3, 2, 3)) * scale
    phases = generator.uniform(0, 2 * np.pi, (3, 2))
    weights = amplitude * generator.uniform(0.3, 0.5, (3, 2))

    def v(p: np.ndarray) -> np.ndarray:
        return np.stack(
            [
                sum(w * np.sin(np.tensordot(f, p, 1) + s) for f, s, w in zip(*parts, strict=True))
                for parts in zip(frequency, phases, weights, strict=True)
            ]
        )

    return v


def _partner(fixed: Deformation, moving: Deformation, p: np.ndarray) -> np.ndarray:
    """q with q + moving(q) = p + fixed(p), by fixed-point iteration."""
    x = p + fixed(p)
    q = x
    for _ in range(60):
        q = x - moving(q)
    return q


def _save(folder: Path, kind: str, name: str, array: np.ndarray, affine: np.ndarray, test: bool = False) -> None:
    path = folder / f"{kind}{'Ts' if test else 'Tr'}" / f"{name}.nii.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


def _describe(
    layout: Layout,
    *,
    name: str,
    pairings: str,
    direction: dict[str, int],
    modality: str,
    labels: dict[str, str],
    training: list[dict[str, str]],
    test: list[str],
    training_pairs: list[tuple[str, str]],
    validation_pairs: list[tuple[str, str]],
    test_pairs: list[tuple[str, str]],
) -> None:
    """The json, with the keys and in the order of the challenges' own."""

    def listed(pairs: list[tuple[str, str]], folder: str = "imagesTr") -> list[dict[str, str]]:
        return [{"fixed": f"./{folder}/{a}.nii.gz", "moving": f"./{folder}/{b}.nii.gz"} for a, b in pairs]

    content: dict[str, Any] = {
        "name": name,
        "release": "1.0",
        "description": f"generated in the layout of {name}",
        "licence": "none needed",
        "reference": "generated",
        "pairings": pairings,
        "provided_data": {"0": [key for key in ("image", "label", "keypoints", "mask") if key in training[0]]},
        "registration_direction": direction,
        "modality": {"0": modality},
        "img_shift": {"fixed": "0000", "moving": f"{direction['moving']:04d}"},
        "labels": {"0": labels},
        "tensorImageSize": {"0": "3D"},
        "tensorImageShape": {"0": list(layout.shape)},
        "numTraining": len(training),
        "numTest": len(test),
        "training": training,
        "test": test,
        "numPairedTraining": len(training_pairs),
        "training_paired_images": listed(training_pairs),
        "numPairedTest": 0,
        "test_paired_images": [],
        "numRegistration_val": len(validation_pairs),
        "registration_val": listed(validation_pairs),
        "numRegistration_test": len(test_pairs),
        "registration_test": listed(test_pairs, "imagesTs"),
    }
    layout.json.write_text(json.dumps(content, indent=4))
