"""IXI_data on disk as TransMorph's page hands it out: pickles of a T1 and its FreeSurfer labels, here generated."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np

# Names and numbers from FreeSurferColorLUT.txt; those of the 17 structures, some that are evaluated by none, and one
# that the preparation does not know.
LEFT_RIGHT = {
    "thalamus": (10, 49),
    "cerebellum_cortex": (8, 47),
    "cerebral_white_matter": (2, 41),
    "cerebellum_white_matter": (7, 46),
    "putamen": (12, 51),
    "ventral_dc": (28, 60),
    "pallidum": (13, 52),
    "caudate": (11, 50),
    "lateral_ventricle": (4, 43),
    "hippocampus": (17, 53),
    "amygdala": (18, 54),
    "cerebral_cortex": (3, 42),
    "choroid_plexus": (31, 63),
}
SINGLE = {"brain_stem": (16,), "third_ventricle": (14,), "fourth_ventricle": (15,), "csf": (24,)}
OTHERS = (5, 44, 77, 251, 29)  # inferior lateral ventricles, hypointensities, corpus callosum; 29 is undetermined

PEOPLE = {"Train": (0, 2, 10), "Val": (3, 4), "Test": (5,)}


def make_ixi(folder: Path, *, shape: tuple[int, int, int] = (30, 32, 28), seed: int = 0) -> Path:
    """Every person is one anatomy under a smooth deformation of its own.

    Returns:
        IXI_data.
    """
    generator = np.random.default_rng(seed)
    root = folder / "IXI_data"
    numbers = [n for group in (LEFT_RIGHT | SINGLE).values() for n in group] + list(OTHERS)
    size = np.array(shape).reshape(3, 1)
    seeds = size * (0.5 + 0.36 * generator.uniform(-1, 1, (3, len(numbers))))
    brightness = generator.uniform(0.2, 0.9, len(numbers))
    for section, people in {"": (-1,), **PEOPLE}.items():
        for person in people:
            p = np.indices(shape).reshape(3, -1).astype(np.float64)
            wave = generator.uniform(0.6, 1.4, (3, 3)) * np.pi / size.T
            x = p + 1.5 * np.sin(wave @ p + generator.uniform(0, 6, (3, 1)))
            inside = ((x / size - 0.5) ** 2).sum(0) < 0.42**2
            nearest = ((x[:, None] - seeds[:, :, None]) ** 2).sum(0).argmin(0)
            image = np.where(inside, brightness[nearest], 0).reshape(shape).astype(np.float32)
            label = np.where(inside, np.array(numbers)[nearest], 0).reshape(shape).astype(np.int16)
            path = root / section / ("atlas.pkl" if person < 0 else f"subject_{person}.pkl")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pickle.dumps((image, label)))
    return root
