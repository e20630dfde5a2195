"""Files in and out: images, labels, landmarks, transforms, displacement fields and the visual report."""

from common.io.atomic import StagedOutput, atomic_path, check_output_dir
from common.io.images import read_image, read_label, read_mask, write_image
from common.io.landmarks import read_landmark_pair, read_landmarks, write_landmarks
from common.io.report import write_report
from common.io.transforms import (
    build_transform,
    read_transform,
    resample_image,
    transform_points,
    transform_to_displacement,
    write_displacement,
    write_learn2reg,
    write_scalar_maps,
    write_transform,
)

__all__ = [
    "StagedOutput",
    "atomic_path",
    "build_transform",
    "check_output_dir",
    "read_image",
    "read_label",
    "read_landmark_pair",
    "read_landmarks",
    "read_mask",
    "read_transform",
    "resample_image",
    "transform_points",
    "transform_to_displacement",
    "write_displacement",
    "write_image",
    "write_landmarks",
    "write_learn2reg",
    "write_report",
    "write_scalar_maps",
    "write_transform",
]
