"""A folder of images under corruptions: what lies in the source, the manifest, and the processes that do the work."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any

from PIL import features

from lorasc_ds.algorithm.files import write_atomically
from lorasc_ds.corrupt_options import IMAGENET_SIZE, CorruptOptions
from lorasc_ds.corrupting import Outcome, Recipe, make_copies, rgb_file
from lorasc_ds.corruption_parameters import CIFAR, IMAGENET, is_small
from lorasc_ds.errors import ConfigError, DataError
from lorasc_ds.images import Unreadable
from lorasc_ds.tasks.images import SUFFIXES
from lorasc_ds.tasks.robustness import MANIFEST

MAX_TEXTURES = 64  # every process holds them all
NAMED = 10  # images that are named on the screen; the manifest has them all
SECONDS = 10  # between two lines of progress
MADE_UP_FROST = (
    "frost: made-up ice in place of photographs, not comparable with ImageNet-C's frost; nor is a mean or mCE with it"
)


def write(options: CorruptOptions) -> None:
    """Corrupt the images of a folder, or go on with it, and say on the screen what comes of it.

    Raises:
        ConfigError: a folder, or what lies in OUT, does not fit.
        DataError: the source has no image, one lies outside of it, or none can be read.
    """
    source, out = options.source.resolve(), options.out.resolve()
    if not source.is_dir():
        raise ConfigError(f"SOURCE {options.source} is not a folder: give one with a folder of images for every class")
    if out.is_relative_to(source) or source.is_relative_to(out):
        raise ConfigError(
            f"OUT {options.out} and SOURCE {options.source} hold one another: give OUT a place of its own"
        )
    names = list(images_of(source, options.limit))
    recipe = Recipe(
        source=source,
        out=out,
        corruptions=options.corruptions,
        severities=options.severities,
        parameters=set_of(options),
        frost=frost_textures(options.frost_dir),
        size=options.size,
        format=options.format,
        seed=options.seed,
    )
    manifest = opened(recipe, names, options)
    copies = len(recipe.corruptions) * len(recipe.severities)
    print(f"{len(names):,} images, {copies} corrupted copies of each: {options.out}")
    for line in manifest["not_comparable"]:
        print(f"not comparable  {line}")
    unreadable = corrupt_all(recipe, names, options.workers)
    for name, why in islice(unreadable.items(), NAMED):
        print(f"unreadable      {name!r}: {why}")
    if len(unreadable) == len(names):
        raise DataError(f"SOURCE {options.source}: none of its {len(names):,} images can be read")
    if unreadable:
        print(f"warning: {len(unreadable):,} of {len(names):,} images cannot be read and were left out: see {MANIFEST}")
    readable = len(names) - len(unreadable)
    manifest["counts"] |= {"readable": readable, "copies": readable * copies}
    store(out, manifest | {"complete": True, "unreadable": unreadable})


def images_of(source: Path, limit: int | None) -> Iterator[str]:
    """The images of every class folder and the folders in it, relative to the source, hidden ones left out; sorted.

    Raises:
        DataError: there is no class folder, one has no image, or a link leads out of the source.
    """
    classes = 0
    for entry in entries(source, source):
        if entry.is_dir():
            classes += 1
            found = list(islice(images_below(Path(entry.path), source), limit))
            if not found:
                raise DataError(
                    f"SOURCE {source}: folder {entry.name!r} holds no image ({', '.join(SUFFIXES)}): put some there, or"
                    " remove it"
                )
            yield from found
    if not classes:
        raise DataError(f"SOURCE {source} holds no folder: one for every class is needed, with its images")


def images_below(folder: Path, source: Path) -> Iterator[str]:
    for entry in entries(folder, source):
        if entry.is_dir():
            yield from images_below(Path(entry.path), source)
        elif entry.name.lower().endswith(SUFFIXES):
            yield Path(entry.path).relative_to(source).as_posix()


def entries(folder: Path, source: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            inside = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"SOURCE {folder}: {error.strerror}; make it readable, or remove it") from error
    for entry in inside:
        if entry.is_symlink() and (entry.is_dir() or not Path(entry.path).resolve().is_relative_to(source)):
            raise DataError(
                f"SOURCE: {entry.path!r} is a link to a folder or out of {str(source)!r}: copy there what it leads to"
            )
    return inside


def frost_textures(folder: Path | None) -> tuple[Path, ...]:
    """
    Raises:
        ConfigError: the folder has no image, too many, or one that cannot be read.
    """
    if folder is None:
        return ()
    if not folder.is_dir():
        raise ConfigError(f"--frost_dir {folder} is not a folder: give one with images of frost")
    paths = tuple(sorted(path.resolve() for path in folder.iterdir() if path.name.lower().endswith(SUFFIXES)))
    if not 0 < len(paths) <= MAX_TEXTURES:
        raise ConfigError(f"--frost_dir {folder} has {len(paths)} images: 1 to {MAX_TEXTURES} are needed")
    for path in paths:
        try:
            rgb_file(path)
        except Unreadable as error:
            raise ConfigError(f"--frost_dir: {str(path)!r} cannot be read ({error.why}): remove it") from error
    return paths


def set_of(options: CorruptOptions) -> Any:
    """The parameters of `auto`, where all images get one size."""
    if options.parameters == "auto" and options.size:
        return "cifar" if is_small(options.size, "auto") else "imagenet"
    return options.parameters


def settings_of(recipe: Recipe, names: list[str], limit: int | None) -> dict[str, Any]:
    """All that the bytes of the copies depend on, but for versions and the content of the source."""
    return {
        "corruptions": list(recipe.corruptions),
        "severities": list(recipe.severities),
        "parameters": recipe.parameters,
        "size": recipe.size,
        "format": recipe.format,
        "seed": recipe.seed,
        "limit": limit,
        "frost": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in recipe.frost}
        or ("made-up ice" if "frost" in recipe.corruptions else None),
        "images_sha256": hashlib.sha256(os.fsencode("\n".join(names))).hexdigest(),  # of their names
    }


def versions() -> dict[str, str | None]:
    packages = {name: importlib.metadata.version(name) for name in ("numpy", "scipy", "pillow")}
    return {"python": platform.python_version(), **packages, "libjpeg_turbo": features.version("libjpeg_turbo")}


def opened(recipe: Recipe, names: list[str], options: CorruptOptions) -> dict[str, Any]:
    """The manifest of a folder that is new, or that was left by the same settings; written before any copy.

    Raises:
        ConfigError: something else lies there.
    """
    settings, path = settings_of(recipe, names, options.limit), recipe.out / MANIFEST
    before: list[Any] = []
    if path.is_file():
        try:
            found = json.loads(path.read_bytes())
            there, before = found["settings"], found["versions"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"OUT {options.out}: {MANIFEST} is not of this command: give another folder") from error
        changed = [key for key in settings if settings[key] != there.get(key)]
        if changed:
            key = changed[0]
            raise ConfigError(
                f"OUT {options.out} was made with {key} {there.get(key)!r}, not {settings[key]!r}: give another folder,"
                " or the settings of its manifest"
            )
    elif recipe.out.exists() and (not recipe.out.is_dir() or any(recipe.out.iterdir())):
        raise ConfigError(f"OUT {options.out} holds something else: give a folder that is empty or does not exist yet")
    manifest = {
        "complete": False,
        "settings": settings,
        "source": str(options.source),
        "parameters": tables(recipe),
        "not_comparable": list(differences(recipe, options)),
        "versions": before if versions() in before else [*before, versions()],
        "counts": {"classes": len({name.split("/")[0] for name in names}), "images": len(names)},
    }
    store(recipe.out, manifest)
    return manifest


def store(out: Path, manifest: dict[str, Any]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    except OSError as error:
        raise ConfigError(f"OUT {out} cannot be written: {error.strerror}") from error


def tables(recipe: Recipe) -> dict[str, Any]:
    """The published parameters that were used, by set, corruption and severity."""
    sets = {"imagenet": IMAGENET, "cifar": CIFAR}
    corruptions = recipe.corruptions
    used = sets if recipe.parameters == "auto" else {recipe.parameters: sets[recipe.parameters]}
    return {
        name: {one: {str(severity): table[one][severity - 1] for severity in recipe.severities} for one in corruptions}
        for name, table in used.items()
    }


def differences(recipe: Recipe, options: CorruptOptions) -> Iterator[str]:
    """What a number measured on the folder cannot be compared for with ImageNet-C's."""
    if "frost" in recipe.corruptions and not recipe.frost:
        yield MADE_UP_FROST
    if recipe.frost:
        yield f"frost: textures of {options.frost_dir}; comparable only where they are ImageNet-C's photographs"
    if recipe.size != IMAGENET_SIZE:
        kept = f"{recipe.size} x {recipe.size} pixels" if recipe.size else "every image has its own size"
        yield f"size: {kept}, ImageNet-C's have {IMAGENET_SIZE} x {IMAGENET_SIZE}"
    if recipe.parameters != "imagenet":
        small = "CIFAR-10-C's parameters" if recipe.parameters == "cifar" else "small images get CIFAR-10-C's"
        yield f"parameters: {small}"
    if recipe.format != "jpeg":
        yield f"format: {recipe.format}, ImageNet-C's are JPEG of quality 85"


def corrupt_all(recipe: Recipe, names: list[str], workers: int) -> dict[str, str]:
    """Make all copies that are missing. Returns why an image is unreadable, by its name."""
    unreadable: dict[str, str] = {}
    made, begun = 0, time.monotonic()
    told = begun
    try:
        with ExitStack() as stack:
            for done, outcome in enumerate(outcomes(recipe, names, workers, stack), 1):
                made += outcome.made
                if outcome.unreadable:
                    unreadable[outcome.name] = outcome.unreadable
                now = time.monotonic()
                if now - told > SECONDS:
                    told, left = now, (now - begun) / done * (len(names) - done) / 60
                    print(f"{done:,} of {len(names):,} images, about {left:,.0f} minutes left", flush=True)
    except BrokenProcessPool as error:
        raise ConfigError(
            f"--workers {workers}: a process was killed, as where memory is short: give fewer; what was made is kept"
        ) from error
    seconds = time.monotonic() - begun
    print(f"{made:,} copies made in {seconds:,.0f} s, {made / max(seconds, 1e-3):,.0f} a second")
    return unreadable


def outcomes(recipe: Recipe, names: list[str], workers: int, stack: ExitStack) -> Iterator[Outcome]:
    """Of every image, in order. One worker is this process."""
    work = partial(make_copies, recipe)
    workers = min(workers, len(names))
    if workers == 1:
        return map(work, names)
    context = multiprocessing.get_context("spawn")
    pool = stack.enter_context(ProcessPoolExecutor(workers, context, initializer=become_worker))
    stack.callback(pool.shutdown, cancel_futures=True)
    copies = len(recipe.corruptions) * len(recipe.severities)
    return pool.map(work, names, chunksize=max(1, min(64 // copies, len(names) // (4 * workers))))


def become_worker() -> None:
    """Ctrl-C is for the first process; when that is gone, however it ended, so is this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    Thread(target=follow, daemon=True).start()
