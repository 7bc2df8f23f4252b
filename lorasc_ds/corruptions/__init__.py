"""ImageNet-C's 15 corruptions at five severities, for images of any size (Hendrycks & Dietterich 2019).

Made anew from the published parameters with NumPy, SciPy and Pillow, so that chance comes from a seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lorasc_ds.corruption_parameters import CIFAR, ELASTIC_SIDE, IMAGENET, NAMES, SEVERITIES, Parameters, is_small
from lorasc_ds.corruptions import blur, digital, noise, weather
from lorasc_ds.corruptions.levels import to_bytes

__all__ = ["NAMES", "SEVERITIES", "corrupt"]

PLAIN = {
    function.__name__: function
    for function in (
        noise.gaussian_noise,
        noise.shot_noise,
        noise.impulse_noise,
        blur.defocus_blur,
        blur.glass_blur,
        blur.motion_blur,
        blur.zoom_blur,
        weather.snow,
        weather.fog,
        digital.brightness,
        digital.contrast,
        digital.pixelate,
        digital.jpeg_compression,
    )
}


def corrupt(
    image: NDArray[np.uint8],
    name: str,
    severity: int,
    seed: int,
    frost: Sequence[NDArray[np.uint8]] = (),
    parameters: Parameters = "auto",
) -> NDArray[np.uint8]:
    """A corrupted copy of an RGB image, (h, w, 3).

    Args:
        name: one of `NAMES`.
        severity: 1 to 5.
        seed: of all chance in it; the same bytes with the same versions of NumPy, SciPy and Pillow.
        frost: textures (h, w, 3) that `frost` lays over the image; none: made-up ice, not comparable with ImageNet-C's.
        parameters: ImageNet-C's, CIFAR-10-C's for small images, or those made for the size nearer to the image's.
    """
    rng = np.random.default_rng(seed)
    side = min(image.shape[:2])
    small = is_small(side, parameters)
    settings = (CIFAR if small else IMAGENET)[name][severity - 1]
    if name == "frost":
        return to_bytes(weather.frost(image, settings, rng, frost, small))
    if name == "elastic_transform":
        unit = side if small else side * ELASTIC_SIDE
        return to_bytes(digital.elastic_transform(image, settings, rng, unit))
    return to_bytes(PLAIN[name](image, settings, rng))
