"""The numbers of images under corruptions (protocols section 6.5; Hendrycks and Dietterich, arXiv 1903.12261)."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean as mean

ALEXNET = {  # corruption of ImageNet-C -> AlexNet's top-1 error under it, the mean of the five severities
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
SEVERITIES = (1, 2, 3, 4, 5)


def of_corruptions(by_group: Mapping[str, float]) -> dict[str, float]:
    """The mean over corruptions of the means over their severities, and both of these by name.

    Args:
        by_group: accuracy of every `corruption/severity`.

    Returns:
        `accuracy`, then `accuracy/CORRUPTION` and `accuracy/CORRUPTION/SEVERITY` for all there are.
    """
    severities: dict[str, list[float]] = {}
    for group, accuracy in by_group.items():
        severities.setdefault(group.split("/")[0], []).append(accuracy)
    means = {corruption: mean(found) for corruption, found in severities.items()}
    named = means | dict(by_group)
    return {"accuracy": mean(means.values())} | {f"accuracy/{name}": value for name, value in named.items()}


def of_imagenet_c(by_group: Mapping[str, float]) -> dict[str, float]:
    """`of_corruptions`, and `mce`: the mean over the 15 corruptions of the error, each as a share of AlexNet's.

    Without `mce` where a corruption at a severity has no accuracy, because none of its images could be read.
    """
    found = of_corruptions(by_group)
    if len(by_group) < len(ALEXNET) * len(SEVERITIES):
        return found
    errors = [(1 - found[f"accuracy/{corruption}"]) / error for corruption, error in ALEXNET.items()]
    return {"accuracy": found["accuracy"], "mce": mean(errors)} | found
