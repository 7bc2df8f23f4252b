"""The published parameters of the 15 corruptions, by severity 1 to 5 (Hendrycks & Dietterich 2019).

`IMAGENET` made ImageNet-C, of images of 224 x 224; `CIFAR` made CIFAR-10-C, of 32 x 32. Lengths are in pixels.
"""

from __future__ import annotations

from typing import Any, Literal

Parameters = Literal["auto", "imagenet", "cifar"]

IMAGENET: dict[str, tuple[Any, ...]] = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),  # standard deviation, of a range of 1
    "shot_noise": (60, 25, 12, 5, 3),  # photons of a white pixel
    "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),  # share of the values that are replaced
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),  # radius, blur of the disk's edge
    "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),  # sigma, reach, rounds
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),  # radius, sigma
    "zoom_blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),  # factors from 1 to, step
    "snow": (  # mean and deviation of the flakes, zoom, threshold, radius and sigma of their motion, share kept
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    "frost": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),  # weights of image and texture
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),  # thickness, decay of the fractal
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),  # added to the value of HSV
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),  # share of the distance from the mean that is kept
    "elastic_transform": (  # as shares of the side: strength and sigma of the shifts, reach of the affine map
        (2, 0.7, 0.1),
        (2, 0.08, 0.2),
        (0.05, 0.01, 0.02),
        (0.07, 0.01, 0.02),
        (0.12, 0.01, 0.02),
    ),
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),  # share of the side that is kept
    "jpeg_compression": (25, 18, 15, 10, 7),  # quality
}

CIFAR: dict[str, tuple[Any, ...]] = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "shot_noise": (500, 250, 100, 75, 50),
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "zoom_blur": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "elastic_transform": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
    "jpeg_compression": (80, 65, 58, 50, 40),
}

NAMES = tuple(IMAGENET)
SEVERITIES = (1, 2, 3, 4, 5)
ELASTIC_SIDE = 244 / 224  # ImageNet-C was made with this slip of the pen
SMALL = 85  # the geometric mean of 32 and 224: which published size an image is nearer to


def is_small(side: int, parameters: Parameters) -> bool:
    """Whether an image is corrupted as CIFAR-10-C's; `side`: its shorter one, in pixels."""
    return side < SMALL if parameters == "auto" else parameters == "cifar"
