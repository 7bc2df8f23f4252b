"""launch/corrupt.py: files of the right bytes whatever the order, the processes and the interruptions."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from lorasc_ds.corrupt import main
from lorasc_ds.corrupting import middle, rgb_file, seed_of
from lorasc_ds.corruptions import NAMES, corrupt
from lorasc_ds.tasks.robustness import corrupted_images

ROOT = Path(__file__).parents[1]
FEW = ["--corruptions=contrast,shot_noise,motion_blur", "--severities=5,2", "--workers=1"]  # in this process

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two classes; parts of photographs, 48 x 40."""
    photographs = load_sample_images().images
    for number, place in enumerate(("cat/1.JPEG", "cat/2.png", "dog/a b.jpg", "dog/more/é.jpg")):
        path = tmp_path / "source" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photographs[number % 2][100:140, 60 * number : 60 * number + 48]).save(path)
    (tmp_path / "source" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "source" / "cat" / "._1.jpg").write_text("no image")
    return tmp_path / "source"


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def start(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return start


def contents(out: Path) -> dict[str, bytes]:
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def manifest(out: Path) -> dict:
    return json.loads((out / "manifest.json").read_text())


def test_what_is_written_and_where(source: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "out"
    code, said, _ = command(source, out, *FEW, "--size=0", "--format=png", "--seed=3")
    assert code == 0
    images = {
        "cat/1.JPEG": "cat/1.JPEG.png",
        "cat/2.png": "cat/2.png",
        "dog/a b.jpg": "dog/a b.jpg.png",
        "dog/more/é.jpg": "dog/more/é.jpg.png",
    }
    expected = {}
    for name, written in images.items():
        pixels = np.asarray(Image.open(source / name).convert("RGB"))
        for corruption in ("shot_noise", "motion_blur", "contrast"):
            for severity in (2, 5):
                seed = seed_of(3, corruption, severity, name)
                expected[f"{corruption}/{severity}/{written}"] = corrupt(
                    pixels, corruption, severity, seed, parameters="cifar"
                )
    assert set(contents(out)) == set(expected)
    assert all(np.array_equal(np.asarray(Image.open(out / name)), pixels) for name, pixels in expected.items())
    record = manifest(out)
    assert record["complete"]
    assert record["counts"] == {"classes": 2, "images": 4, "readable": 4, "copies": 24}
    assert record["parameters"]["cifar"] == {
        "shot_noise": {"2": 250, "5": 50},
        "motion_blur": {"2": [6, 1.5], "5": [9, 2.5]},
        "contrast": {"2": 0.5, "5": 0.15},
    }
    assert record["versions"][0]["pillow"]
    assert len(record["not_comparable"]) == 3  # size, parameters, format
    assert all(f"not comparable  {line}\n" in said for line in record["not_comparable"])


def test_seeds_are_of_the_image_and_its_corruption() -> None:
    seeds = {
        seed_of(*key)
        for key in [
            (0, "fog", 1, "a/b"),
            (1, "fog", 1, "a/b"),
            (0, "snow", 1, "a/b"),
            (0, "fog", 2, "a/b"),
            (0, "fog", 1, "a/c"),
        ]
    }
    assert len(seeds) == 5
    assert seed_of(0, "fog", 1, "a/b") == int.from_bytes(bytes.fromhex("0ecaebbd12572051"), "little")  # sha256sum


def test_the_geometry_of_imagenet_c() -> None:
    """torchvision's Resize(256) and CenterCrop(224)."""
    image = Image.fromarray(load_sample_images().images[0])  # 640 x 427
    resized = image.resize((383, 256), Image.Resampling.BILINEAR)
    assert np.array_equal(
        middle(image, 224, "china"), resized.crop((80, 16, 304, 240))
    )  # (383 - 224) / 2 is 79.5: to even
    upright = image.transpose(Image.Transpose.ROTATE_90)
    assert np.array_equal(
        middle(upright, 224, "china"), upright.resize((256, 383), Image.Resampling.BILINEAR).crop((16, 80, 240, 304))
    )
    assert middle(image, 0, "china") is image
    assert middle(image.crop((0, 0, 20, 30)), 224, "china").size == (224, 224)


def test_jpeg_of_quality_85(source: Path, tmp_path: Path, command: Command) -> None:
    assert (
        command(source, tmp_path / "out", "--corruptions=contrast", "--severities=1", "--workers=1", "--limit=1")[0]
        == 0
    )
    assert set(contents(tmp_path / "out")) == {"contrast/1/cat/1.JPEG", "contrast/1/dog/a b.jpg"}
    pixels = corrupt(np.asarray(middle(rgb_file(source / "cat/1.JPEG"), 224, "cat")), "contrast", 1, 0)
    Image.fromarray(pixels).save(tmp_path / "expected.jpg", quality=85, optimize=True)
    assert (tmp_path / "out/contrast/1/cat/1.JPEG").read_bytes() == (tmp_path / "expected.jpg").read_bytes()
    assert manifest(tmp_path / "out")["not_comparable"] == []


def test_processes_and_order_do_not_matter(source: Path, tmp_path: Path, command: Command) -> None:
    assert command(source, tmp_path / "one", *FEW, "--size=0")[0] == 0
    assert command(source, tmp_path / "two", *FEW[:2], "--workers=2", "--size=0")[0] == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert (
        command(
            source,
            tmp_path / "part",
            "--corruptions=shot_noise",
            "--severities=5",
            "--workers=1",
            "--size=0",
            "--limit=1",
        )[0]
        == 0
    )
    part = contents(tmp_path / "part")
    assert len(part) == 2
    assert part.items() <= contents(tmp_path / "one").items()


def test_what_is_finished_is_not_made_again(
    source: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, arguments = tmp_path / "out", [*FEW, "--size=0"]
    whole = tmp_path / "whole"
    assert command(source, whole, *arguments)[0] == 0
    made: list[str] = []

    def interrupted(image: np.ndarray, name: str, *rest: object) -> np.ndarray:
        made.append(name)
        if len(made) == 9:
            raise KeyboardInterrupt
        return corrupt(image, name, *rest)

    monkeypatch.setattr("lorasc_ds.corrupting.corrupt", interrupted)
    code, _, said = command(source, out, *arguments)
    assert (code, said) == (130, "stopped by Ctrl-C; the same command goes on from here\n")
    assert len(contents(out)) == 8
    assert not manifest(out)["complete"]
    assert any("did not finish, so that copies are missing" in note for note in notes_of(out))
    code, said, _ = command(source, out, *arguments)
    assert code == 0
    assert "16 copies made" in said
    assert len(made) == 9 + 16
    assert contents(out) == contents(whole)
    assert manifest(out) == manifest(whole)
    assert not any("did not finish" in note for note in notes_of(out))


def test_what_cannot_be_read_is_named_and_counted(source: Path, tmp_path: Path, command: Command) -> None:
    whole = (source / "cat/1.JPEG").read_bytes()
    (source / "cat/cut.jpg").write_bytes(whole[:-100])
    (source / "dog/text.png").write_text("no image")
    (source / "dog/program.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (source / "dog/lost.jpg").symlink_to(source / "dog/nowhere.jpg")
    (source / "dog/bomb.ppm").write_bytes(b"P6 10000 9000 255\n")
    (source / "dog/larger.ppm").write_bytes(b"P6 30000 30000 255\n")
    Image.new("L", (1, 20_000)).save(source / "dog/thread.png")
    code, said, _ = command(source, tmp_path / "out", "--corruptions=contrast", "--severities=1", "--workers=1")
    assert code == 0
    bad = {
        "cat/cut.jpg": "runcated",
        "dog/text.png": "not an image",
        "dog/program.jpg": "not an image",
        "dog/lost.jpg": "No such file",
        "dog/bomb.ppm": "more than 89,478,485 pixels, a decompression bomb",
        "dog/larger.ppm": "decompression bomb",
        "dog/thread.png": "too far from a square",
    }
    found = manifest(tmp_path / "out")["unreadable"]
    assert set(found) == set(bad)
    for name, why in bad.items():
        assert why in found[name]
        assert f"unreadable      {name!r}: {found[name]}\n" in said
    assert "warning: 7 of 11 images cannot be read and were left out" in said
    for path in list(source.rglob("*.*")):
        path.write_text("no image") if path.is_file() else None
    code, _, said = command(source, tmp_path / "none", "--workers=1")
    assert code == 2
    assert said.count("\n") == 1
    assert "none of its 11 images can be read" in said


def notes_of(out: Path) -> tuple[str, ...]:
    """What one is told who scores the folder."""
    return corrupted_images(data_dir=str(out), class_names=None, templates="simple", head="auto").notes


def test_made_up_frost_is_called_so(source: Path, tmp_path: Path, command: Command) -> None:
    arguments = ["--corruptions=frost,contrast", "--severities=1", "--workers=1", "--limit=1"]
    _, said, _ = command(source, tmp_path / "made_up", *arguments)
    label = "frost: made-up ice in place of photographs, not comparable with ImageNet-C's frost"
    assert label in said
    assert any(line.startswith(label) for line in manifest(tmp_path / "made_up")["not_comparable"])
    notes = notes_of(tmp_path / "made_up")
    assert len(notes) == 1
    assert notes[0].startswith(f"corrupted_images: not comparable with ImageNet-C: {label}")
    (tmp_path / "ice").mkdir()
    Image.new("RGB", (300, 300), (50, 60, 70)).save(tmp_path / "ice/1.png")
    _, said, _ = command(source, tmp_path / "textures", *arguments, "--frost_dir", tmp_path / "ice", "--format=png")
    assert "made-up" not in said
    assert "made-up" not in (tmp_path / "textures/manifest.json").read_text()
    expected = np.minimum(np.add(middle(rgb_file(source / "cat/1.JPEG"), 224, "cat"), [20.0, 24.0, 28.0]), 255)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "textures/frost/1/cat/1.JPEG.png")), expected)


def test_another_folder_is_not_written_into(source: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "out"
    assert command(source, out, *FEW, "--size=0", "--limit=1")[0] == 0
    before = contents(out)
    for flag, key in (
        ("--seed=1", "seed 0, not 1"),
        ("--limit=2", "limit 1, not 2"),
        ("--format=png", "format 'jpeg', not 'png'"),
        ("--size=32", "parameters 'auto', not 'cifar'"),
    ):
        code, _, said = command(source, out, *FEW, "--size=0", "--limit=1", flag)
        assert code == 2
        assert said.count("\n") == 1
        assert f"OUT {out} was made with {key}" in said
    assert contents(out) == before
    (source / "cat" / "0.png").write_bytes((source / "cat/2.png").read_bytes())
    assert "was made with images_sha256" in command(source, out, *FEW, "--size=0", "--limit=1")[2]


def occupied(source: Path) -> list[object]:
    (source.parent / "occupied").mkdir()
    (source.parent / "occupied" / "thesis.tex").write_text("")
    return [source, source.parent / "occupied"]


def foreign(source: Path) -> list[object]:
    (source.parent / "foreign").mkdir()
    (source.parent / "foreign" / "manifest.json").write_text("[1]")
    return [source, source.parent / "foreign"]


def linked(source: Path, to: str, kind: str) -> list[object]:
    target = source.parent / to
    target.mkdir(exist_ok=True)
    Image.new("RGB", (9, 9)).save(target / "x.png")
    (source / "dog" / "link.png").symlink_to(target / "x.png" if kind == "file" else target)
    return [source, source.parent / "out"]


def bare(source: Path) -> list[object]:
    (source.parent / "bare").mkdir()
    return [source.parent / "bare", source.parent / "out"]


def hollow(source: Path) -> list[object]:
    (source / "empty").mkdir()
    return [source, source.parent / "out"]


def frostless(source: Path) -> list[object]:
    (source.parent / "textures").mkdir()
    return [source, source.parent / "out", "--frost_dir", source.parent / "textures"]


def broken_frost(source: Path) -> list[object]:
    arguments = frostless(source)
    (source.parent / "textures" / "x.png").write_text("")
    return arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            lambda s: [s, s.parent / "out", "--corruptions=fogg"],
            "--corruptions fogg: 'fogg' is not one of gaussian_noise",
        ),
        (lambda s: [s, s.parent / "out", "--corruptions=,"], "--corruptions is empty"),
        (lambda s: [s, s.parent / "out", "--severities=0"], "--severities 0: '0' is not one of 1, 2, 3, 4, 5"),
        (lambda s: [s, s.parent / "out", "--size=-1"], "--size is -1: a number from 0 on"),
        (lambda s: [s, s.parent / "out", "--workers=0"], "--workers is 0: a number from 1 on"),
        (lambda s: [s, s.parent / "out", "--seeds=1"], "unknown argument --seeds=1; did you mean --seed?"),
        (lambda s: [s, s.parent / "out", "--corruptions=fog", "--frost_dir=x"], "--frost_dir x is for frost"),
        (lambda s: [s], "the following arguments are required: OUT"),
        (lambda s: [s / "cat" / "2.png", s.parent / "out"], "is not a folder"),
        (lambda s: [s, s / "cat"], "hold one another"),
        (lambda s: [s, s.parent], "hold one another"),
        (bare, "holds no folder: one for every class is needed"),
        (hollow, "folder 'empty' holds no image"),
        (occupied, "holds something else"),
        (foreign, "manifest.json is not of this command"),
        (lambda s: linked(s, "elsewhere", "file"), "is a link to a folder or out of"),
        (lambda s: linked(s, "source/cat", "folder"), "is a link to a folder or out of"),
        (frostless, "has 0 images: 1 to 64 are needed"),
        (broken_frost, "x.png' cannot be read (not an image"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    arguments: Callable[[Path], list[object]], message: str, source: Path, command: Command
) -> None:
    code, _, said = command(*arguments(source))
    assert code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert message in said
    assert not (source.parent / "out").exists()


def test_links_within_the_source_are_followed(source: Path, tmp_path: Path, command: Command) -> None:
    (source / "dog" / "same.png").symlink_to(Path("..") / "cat" / "2.png")
    assert (
        command(source, tmp_path / "out", "--corruptions=contrast", "--severities=1", "--workers=1", "--size=0")[0] == 0
    )
    assert (tmp_path / "out/contrast/1/dog/same.png.jpg").is_file()


def test_help_needs_no_numpy_and_the_work_no_torch(source: Path, tmp_path: Path) -> None:
    program = f"""
import runpy, sys
def launch(*arguments):
    sys.argv = ["corrupt.py", *arguments]
    try:
        runpy.run_path({str(ROOT / "launch/corrupt.py")!r}, run_name="__main__")
    except SystemExit as end:
        return end.code
assert launch("--help") == 0 and "numpy" not in sys.modules
assert launch({str(source)!r}, {str(tmp_path / "out")!r}, "--workers=1", "--size=0", "--limit=1") == 0
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / "out" / name / "5" / "dog").is_dir() for name in NAMES)
