"""ImageNet-C's corruptions: the published parameters, and what each does against direct computation."""

from __future__ import annotations

import colorsys
import io
import math
from functools import lru_cache

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import correlate, gaussian_filter, map_coordinates, zoom
from sklearn.datasets import load_sample_images

from lorasc_ds.corruption_parameters import CIFAR, ELASTIC_SIDE, IMAGENET, is_small
from lorasc_ds.corruptions import NAMES, SEVERITIES, corrupt
from lorasc_ds.corruptions.blur import disk, moved, scattered, zoomed
from lorasc_ds.corruptions.digital import affine, smooth_noise
from lorasc_ds.corruptions.ice import ice
from lorasc_ds.corruptions.weather import GREY, plasma

WITHOUT_CHANCE = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}

PUBLISHED_IMAGENET = {  # make_imagenet_c.py of Hendrycks and Dietterich; elastic as it stands there, times 244 pixels
    "gaussian_noise": [0.08, 0.12, 0.18, 0.26, 0.38],
    "shot_noise": [60, 25, 12, 5, 3],
    "impulse_noise": [0.03, 0.06, 0.09, 0.17, 0.27],
    "defocus_blur": [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)],
    "glass_blur": [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)],
    "motion_blur": [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)],
    "zoom_blur": [(12, 1.11), (16, 1.15), (11, 1.2), (13, 1.24), (11, 1.3)],  # how many zooms, and the last
    "snow": [
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ],
    "frost": [(1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)],
    "fog": [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)],
    "brightness": [0.1, 0.2, 0.3, 0.4, 0.5],
    "contrast": [0.4, 0.3, 0.2, 0.1, 0.05],
    "elastic_transform": [
        (488, 170.8, 24.4),
        (488, 19.52, 48.8),
        (12.2, 2.44, 4.88),
        (17.08, 2.44, 4.88),
        (29.28, 2.44, 4.88),
    ],
    "pixelate": [0.6, 0.5, 0.4, 0.3, 0.25],
    "jpeg_compression": [25, 18, 15, 10, 7],
}
PUBLISHED_CIFAR = {  # make_cifar_c.py; elastic times 32 pixels
    "gaussian_noise": [0.04, 0.06, 0.08, 0.09, 0.10],
    "shot_noise": [500, 250, 100, 75, 50],
    "impulse_noise": [0.01, 0.02, 0.03, 0.05, 0.07],
    "defocus_blur": [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
    "glass_blur": [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)],
    "motion_blur": [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
    "zoom_blur": [(7, 1.06), (12, 1.11), (16, 1.15), (21, 1.2), (26, 1.25)],
    "snow": [
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ],
    "frost": [(1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)],
    "fog": [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)],
    "brightness": [0.05, 0.1, 0.15, 0.2, 0.3],
    "contrast": [0.75, 0.5, 0.4, 0.3, 0.15],
    "elastic_transform": [(0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, 0.96, 0.96)],
    "pixelate": [0.95, 0.9, 0.85, 0.75, 0.65],
    "jpeg_compression": [80, 65, 58, 50, 40],
}


@lru_cache
def photograph(number: int, side: int = 224) -> NDArray[np.uint8]:
    image = Image.fromarray(load_sample_images().images[number]).crop((107, 0, 534, 427))
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))


def flat(value: int, side: int = 224) -> NDArray[np.uint8]:
    return np.full((side, side, 3), value, np.uint8)


@pytest.mark.parametrize(
    ("table", "published", "side"), [(IMAGENET, PUBLISHED_IMAGENET, 224 * ELASTIC_SIDE), (CIFAR, PUBLISHED_CIFAR, 32)]
)
def test_parameters_are_the_published_ones(table: dict, published: dict, side: float) -> None:
    found = {name: list(values) for name, values in table.items()}
    zooms = [np.arange(1, *setting) for setting in found["zoom_blur"]]
    found["zoom_blur"] = [(len(factors), round(float(factors[-1]), 6)) for factors in zooms]
    found["elastic_transform"] = [tuple(round(side * one, 6) for one in row) for row in found["elastic_transform"]]
    assert found == published
    assert list(table) == list(NAMES) == list(published)


def test_which_parameters_an_image_gets_is_by_its_shorter_side() -> None:
    assert is_small(84, "auto")
    assert not is_small(85, "auto")  # 84.7 is the geometric mean of 32 and 224
    for height, width, used in ((84, 90, "cifar"), (90, 84, "cifar"), (85, 85, "imagenet")):
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        for name in ("contrast", "elastic_transform"):
            assert np.array_equal(corrupt(image, name, 3, 0), corrupt(image, name, 3, 0, parameters=used))
            assert not np.array_equal(
                corrupt(image, name, 3, 0, parameters="cifar"), corrupt(image, name, 3, 0, parameters="imagenet")
            )


@pytest.mark.parametrize("name", NAMES)
def test_the_change_grows_with_severity(name: str) -> None:
    """Mean squared. Published severities are not ordered by it where chance decides (fog, frost) or several parameters
    change against each other (glass, snow): there the last is above the first. In elastic_transform 1 and 2 are wide
    bends, 3 to 5 small waves of growing strength: another kind of change, smaller as numbers go."""
    for number in (0, 1):
        image = photograph(number)
        changes = [np.mean((corrupt(image, name, severity, 0) - image.astype(float)) ** 2) for severity in SEVERITIES]
        match name:
            case "fog" | "frost" | "glass_blur" | "snow":
                assert changes[4] > changes[0] > 0
            case "elastic_transform":
                assert min(changes[:2]) > max(changes[2:]) > min(changes[2:]) > 0
            case _:
                assert 0 < changes[0] < changes[1] < changes[2] < changes[3] < changes[4]


@pytest.mark.parametrize("severity", SEVERITIES)
def test_gaussian_noise_is_normal(severity: int) -> None:
    noisy = corrupt(flat(128), "gaussian_noise", severity, 0)
    deviation = IMAGENET["gaussian_noise"][severity - 1] * 255
    for bound in (10, 60, 120):  # whole numbers: what is cut off does not matter
        expected = 0.5 * math.erfc(bound / deviation / math.sqrt(2))
        assert np.mean(noisy >= 128 + bound) == pytest.approx(expected, abs=4e-3)
        assert np.mean(noisy < 128 - bound) == pytest.approx(expected, abs=4e-3)
    if severity == 1:
        assert noisy.std() == pytest.approx(deviation, rel=0.01)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_shot_noise_counts_photons(severity: int) -> None:
    photons, value = IMAGENET["shot_noise"][severity - 1], 51
    counts = np.ceil(corrupt(flat(value), "shot_noise", severity, 0) * (photons / 255))
    mean = photons * value / 255
    assert counts.mean() == pytest.approx(mean, rel=0.03)  # a little light is cut off above white
    for count in range(min(photons, 20)):
        expected = math.exp(-mean) * mean**count / math.factorial(count)
        assert np.mean(counts == count) == pytest.approx(expected, abs=5e-3)
    if severity == 1:
        assert counts.var() == pytest.approx(mean, rel=0.02)  # Poisson's variance is its mean


@pytest.mark.parametrize("severity", SEVERITIES)
def test_impulse_noise_hits_its_share_of_the_values(severity: int) -> None:
    noisy = corrupt(flat(100), "impulse_noise", severity, 0)
    share = IMAGENET["impulse_noise"][severity - 1]
    assert set(np.unique(noisy)) == {0, 100, 255}
    assert np.mean(noisy == 0) == pytest.approx(share / 2, abs=2e-3)
    assert np.mean(noisy == 255) == pytest.approx(share / 2, abs=2e-3)
    assert np.mean((noisy != 100).all(axis=2)) == pytest.approx(share**3, abs=2e-3)  # channels by themselves


def test_the_kernel_of_defocus_is_a_disk() -> None:
    for radius, edge in IMAGENET["defocus_blur"] + CIFAR["defocus_blur"]:
        kernel = disk(radius, edge)
        reach = len(kernel) // 2
        y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
        beyond = radius + 3 * math.sqrt(2)
        assert kernel[x**2 + y**2 > beyond**2].max(initial=0) < 1e-9
        assert np.allclose(kernel, kernel.T, atol=1e-15)
        touches = radius in (8, 10)  # its grid's border: there the published one has these sums
        assert kernel.sum() == pytest.approx({8: 1.0129755, 10: 1.0107858}[radius] if touches else 1, abs=1e-6)
    y, x = np.mgrid[-8:9, -8:9]
    assert np.allclose(disk(3, 0.1), (x**2 + y**2 <= 9) / 29, atol=1e-12)  # 29 whole points lie in a circle of 3


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_defocus_is_a_convolution_that_mirrors_the_edge(severity: int) -> None:
    image = photograph(0, 90)
    expected = correlate(image.astype(float), disk(*IMAGENET["defocus_blur"][severity - 1])[..., None], mode="mirror")
    found = corrupt(image, "defocus_blur", severity, 0)
    assert np.array_equal(found, np.clip(expected + 1e-6, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("reach", [1, 2, 4])
def test_glass_shuffles_as_the_published_loop(reach: int) -> None:
    height, width = 24, 31
    found = scattered(height, width, reach, np.random.default_rng(5))
    pixels = np.arange(height * width).reshape(height, width, 1).repeat(3, 2)
    offsets = np.random.default_rng(5).integers(-reach, reach, size=(2, height - 2 * reach, width - 2 * reach))
    for i, h in enumerate(range(height - reach, reach, -1)):
        for j, w in enumerate(range(width - reach, reach, -1)):
            y, x = h + offsets[0, i, j], w + offsets[1, i, j]
            pixels[h, w], pixels[y, x] = pixels[y, x], pixels[h, w]  # meant as a swap; of views it is a copy
    assert np.array_equal(found, pixels[..., 0].ravel())
    assert len(np.unique(found)) < height * width  # so some pixels are lost


@pytest.mark.parametrize(("angle", "x", "y"), [(0, 1, 0), (45, 1, 1), (-45, 1, -1), (-90, 0, -1)])
def test_motion_makes_a_line_of_a_point(angle: float, x: int, y: int) -> None:
    radius, sigma = 5, 3.0
    image = np.zeros((41, 41))
    image[20, 20] = 1
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    line = np.zeros_like(image)
    along = np.ceil(steps * (math.sqrt(0.5) if x and y else 1) - 0.5).astype(int)
    back = -np.ceil(-steps * math.sqrt(0.5) - 0.5).astype(int) if y < 0 < x else along  # halves are rounded down
    np.add.at(line, (20 - y * back, 20 - x * along), weights / weights.sum())
    assert np.allclose(moved(image, radius, sigma, angle), line)


def test_motion_blur_is_at_most_45_degrees_from_level_and_keeps_the_light() -> None:
    image = np.zeros((99, 99, 3), np.uint8)
    image[49, 49] = 255
    angles = set()
    for seed in range(20):
        rows, columns = np.nonzero(corrupt(image, "motion_blur", 1, seed, parameters="imagenet")[..., 0])
        assert np.ptp(columns) >= np.ptp(rows)
        assert columns.max() == 49  # to one side
        angles.add((int(rows.min()), int(rows.max())))
    assert len(angles) > 5
    assert np.array_equal(corrupt(flat(77), "motion_blur", 5, 0), flat(77))


@pytest.mark.parametrize("factor", [1.0, 1.03, 1.11, 1.3, 2.5, 4.5])
def test_zoom_is_scipys(factor: float) -> None:
    image = photograph(1, 64).astype(float)
    part = math.ceil(64 / factor)
    start = (64 - part) // 2
    whole = zoom(image[start : start + part, start : start + part], (factor, factor, 1), order=1)
    trim = (len(whole) - 64) // 2
    assert np.allclose(zoomed(image, factor), whole[trim : trim + 64, trim : trim + 64])


def test_zoom_blur_is_the_mean_of_zooms() -> None:
    image = photograph(1, 96)
    expected = (image + sum(zoomed(image.astype(float), 1 + 0.02 * i) for i in range(11))) / 12
    assert np.array_equal(corrupt(image, "zoom_blur", 3, 0), (expected + 1e-6).astype(np.uint8))
    for severity in SEVERITIES:
        assert np.array_equal(corrupt(flat(200), "zoom_blur", severity, 0), flat(200))


def test_snow_falls_twice_the_second_time_turned_round() -> None:
    dark = corrupt(flat(0), "snow", 2, 0)
    assert np.array_equal(dark, np.rot90(dark, 2))
    assert dark.min() == math.floor(0.3 * 127.5)  # what black whitens to, where no flake is
    assert len(np.unique(dark)) > 30
    assert (corrupt(flat(255), "snow", 1, 0) == 255).all()


def test_frost_lays_a_texture_over_the_image() -> None:
    image = photograph(0, 100)
    texture = np.random.default_rng(1).integers(0, 256, (120, 130, 3), np.uint8)
    found = corrupt(image, "frost", 3, 7, [texture])
    places = [
        (top, left)
        for top in range(21)
        for left in range(31)
        if np.array_equal(
            found,
            np.clip(0.7 * image + 0.7 * texture[top : top + 100, left : left + 100] + 1e-6, 0, 255).astype(np.uint8),
        )
    ]
    assert len(places) == 1
    small = np.full((10, 300, 3), 90, np.uint8)  # has to be enlarged
    assert np.array_equal(corrupt(flat(100, 100), "frost", 1, 0, [small]), flat(136, 100))
    slope = np.arange(200, dtype=np.uint8).repeat(3).reshape(1, 200, 3).repeat(200, 0)
    for parameters, step in (("imagenet", 1), ("cifar", 5)):  # CIFAR-10-C's textures are a fifth as large
        row = (
            corrupt(flat(0, 20), "frost", 5, 0, [slope], parameters)[10, :, 0]
            / {"imagenet": 0.75, "cifar": 0.45}[parameters]
        )
        assert np.polyfit(np.arange(20), row, 1)[0] == pytest.approx(step, rel=0.1)
    colours = [flat(10, 60), flat(200, 60)]
    assert {int(corrupt(flat(0, 32), "frost", 1, seed, colours).max()) for seed in range(9)} == {2, 40}


def test_made_up_ice_is_as_bright_as_photographs_of_frost() -> None:
    """Those of ImageNet-C have means of 90 to 205 and deviations of 18 to 43."""
    layers = [ice(100, 140, np.random.default_rng(seed)) @ GREY for seed in range(3)]
    assert all(layer.shape == (100, 140) and 90 < layer.mean() < 205 and 18 < layer.std() < 43 for layer in layers)
    assert np.corrcoef(layers[0].ravel(), layers[1].ravel())[0, 1] < 0.5


@pytest.mark.parametrize("decay", [1.4, 3])
def test_plasma_is_diamond_square(decay: float) -> None:
    side = 8
    rng, heights = np.random.default_rng(3), np.zeros((side, side))
    amplitude, step = 1.0, side
    while step > 1:
        half, known = step // 2, heights.copy()
        for rows, columns, neighbours in (
            (half, half, [(-1, -1), (-1, 1), (1, -1), (1, 1)]),
            (0, half, [(0, -1), (0, 1), (-1, 0), (1, 0)]),
            (half, 0, [(0, -1), (0, 1), (-1, 0), (1, 0)]),
        ):
            known = heights.copy()
            for y in range(rows, side, step):
                for x in range(columns, side, step):
                    around = [known[(y + half * dy) % side, (x + half * dx) % side] for dy, dx in neighbours]
                    heights[y, x] = np.mean(around) + amplitude * rng.uniform(-1, 1)
        amplitude, step = amplitude / decay**2, half
    expected = (heights - heights.min()) / (heights.max() - heights.min())
    assert np.allclose(plasma(side, decay, np.random.default_rng(3)), expected)


def test_fog_is_haze_under_the_brightest_value() -> None:
    image = photograph(1)
    haze = plasma(256, 1.7, np.random.default_rng(4))[:224, :224, None]
    top = image.max() / 255
    expected = (image / 255 + 2.5 * haze) * top / (top + 2.5)
    assert np.array_equal(corrupt(image, "fog", 3, 4), (255 * expected + 1e-6).astype(np.uint8))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_brightness_is_the_value_of_hsv(severity: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    image[0, 0], image[0, 1] = 0, (0, 0, 9)
    found = corrupt(image, "brightness", severity, 0, parameters="imagenet")
    for pixel, brighter in zip(image.reshape(-1, 3) / 255, found.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        expected = colorsys.hsv_to_rgb(hue, saturation, min(1, value + 0.1 * severity))
        assert brighter.tolist() == [math.floor(255 * one + 1e-6) for one in expected]


@pytest.mark.parametrize("severity", SEVERITIES)
def test_contrast_pixelate_and_jpeg_against_their_definitions(severity: int) -> None:
    image = photograph(0)
    kept = IMAGENET["contrast"][severity - 1]
    mean = image.reshape(-1, 3).mean(axis=0)
    assert np.array_equal(corrupt(image, "contrast", severity, 0), np.floor(mean + kept * (image - mean) + 1e-6))
    side = [134, 112, 89, 67, 56][severity - 1]
    blocks = Image.fromarray(image).resize((side, side), Image.Resampling.BOX).resize((224, 224), Image.Resampling.BOX)
    assert np.array_equal(corrupt(image, "pixelate", severity, 0), np.asarray(blocks))
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=[25, 18, 15, 10, 7][severity - 1])
    assert np.array_equal(corrupt(image, "jpeg_compression", severity, 0), np.asarray(Image.open(file)))


def test_elastic_transform_is_an_affine_map_and_smooth_shifts() -> None:
    for sigma in (0.0, 0.96, 6.4, 40.0):
        expected = gaussian_filter(np.random.default_rng(2).uniform(-1, 1, (30, 40)), sigma, mode="reflect", truncate=3)
        assert np.allclose(smooth_noise(30, 40, sigma, np.random.default_rng(2)), expected)
    here, there = np.array([[9.0, 9.5], [9.0, 1.0], [1.5, 1.0]]), np.array([[8, 8], [8, 2], [2, 2]])
    x, y = affine(here, there, here[:, 0], here[:, 1])
    assert np.allclose(np.stack([x, y], 1), there)
    for severity in SEVERITIES:
        assert np.array_equal(corrupt(flat(31), "elastic_transform", severity, 0), flat(31))
    point = np.zeros((32, 32, 3), np.uint8)
    point[16, 16] = 255
    rows, columns = np.nonzero(corrupt(point, "elastic_transform", 1, 0)[..., 0])  # the affine map alone
    assert 0 < np.ptp(rows) + np.ptp(columns) < 6
    assert abs(rows.mean() - 16) < 4
    assert abs(columns.mean() - 16) < 4


@pytest.mark.parametrize(("severity", "side", "unit"), [(2, 96, 96 * 244 / 224), (5, 96, 96 * 244 / 224), (3, 32, 32)])
def test_elastic_transform_step_by_step(severity: int, side: int, unit: float) -> None:
    """As the published code: corners of a square, moved by chance, give the map; SciPy's filter the shifts."""
    image, rng = photograph(1, side), np.random.default_rng(9)
    strength, sigma, reach = (
        unit * one for one in (CIFAR if side == 32 else IMAGENET)["elastic_transform"][severity - 1]
    )
    middle, arm = side // 2, side // 3
    before = np.array([[middle + arm, middle + arm], [middle + arm, middle - arm], [middle - arm, middle - arm]], float)
    after = before + rng.uniform(-reach, reach, (3, 2))
    forward = np.vstack([before.T, np.ones(3)])
    forward = np.vstack([after.T, np.ones(3)]) @ np.linalg.inv(forward)  # takes `before` to `after`, x y 1
    shifts = [
        strength * gaussian_filter(rng.uniform(-1, 1, (side, side)), sigma, mode="reflect", truncate=3) for _ in "xy"
    ]
    y, x = np.mgrid[:side, :side].astype(float)
    source = np.linalg.inv(forward) @ np.stack([x.ravel(), y.ravel(), np.ones(side * side)])
    for channel in range(3):
        bent = map_coordinates(image[..., channel].astype(float), source[1::-1], order=1, mode="mirror").reshape(
            side, side
        )
        expected = map_coordinates(bent, [y + shifts[1], x + shifts[0]], order=1, mode="reflect")
        found = corrupt(image, "elastic_transform", severity, 9)[..., channel]
        assert np.abs(found - (expected - 0.5)).max() < 0.501  # cut down to whole numbers


@pytest.mark.parametrize("name", NAMES)
def test_chance_comes_from_the_seed_alone(name: str) -> None:
    image = photograph(0, 96)
    before = np.random.get_state()[1:3]
    first = corrupt(image, name, 3, 1)
    after = np.random.get_state()[1:3]
    assert np.array_equal(before[0], after[0])
    assert before[1] == after[1]
    np.random.uniform()
    assert np.array_equal(first, corrupt(image, name, 3, 1))
    assert np.array_equal(first, corrupt(image, name, 3, 2)) == (name in WITHOUT_CHANCE)


@pytest.mark.parametrize("name", NAMES)
def test_grey_stays_grey_but_for_noise_ice_and_jpeg(name: str) -> None:
    image = photograph(0, 96)[..., :1].repeat(3, 2)
    found = corrupt(image, name, 4, 0)
    grey = bool((found == found[..., :1]).all())
    assert grey == (name not in {"gaussian_noise", "shot_noise", "impulse_noise", "frost"})


@pytest.mark.parametrize(("height", "width"), [(8, 8), (28, 28), (1, 1), (3, 2), (5, 90)])
def test_every_size_is_taken(height: int, width: int) -> None:
    images = [
        np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8),
        np.zeros((height, width, 3), np.uint8),
    ]
    for name in NAMES:
        for severity in (1, 5):
            for image in images:
                before = image.copy()
                found = corrupt(image, name, severity, 0)
                assert found.shape == image.shape
                assert found.dtype == np.uint8
                assert np.array_equal(image, before)


def test_digits_of_8_pixels_are_still_seen() -> None:
    """A nearest mean of clean digits names most corrupted ones."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    means = np.stack([digits.images[digits.target == digit].mean(axis=0) for digit in range(10)]) * 15.9
    centred = means - means.mean(axis=(1, 2), keepdims=True)
    centred /= np.linalg.norm(centred, axis=(1, 2), keepdims=True)
    images = (digits.images[:40] * 15.9).astype(np.uint8)[..., None].repeat(3, 3)
    for name in set(NAMES) - {"frost"}:  # slow to draw
        found = np.stack([corrupt(image, name, 3, seed).mean(axis=2) for seed, image in enumerate(images)])
        right = np.argmax(np.einsum("nhw,chw->nc", found, centred), axis=1) == digits.target[:40]
        assert right.mean() >= 0.5, name
