"""Figures as files, in shades of grey: the same bytes at every call."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any


def saved(figure: Any, kind: str) -> bytes:
    """A matplotlib figure as `png` or `svg`; text in an SVG stays text."""
    from matplotlib import rc_context  # here, since it takes a second and is needed here only
    from PIL import Image

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "lorasc", "svg.fonttype": "none"}):
        figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    if kind == "svg":
        return buffer.getvalue()
    small = io.BytesIO()
    Image.open(buffer).convert("L").quantize(16).save(small, "PNG", optimize=True)
    return small.getvalue()


def files_of(figures: Mapping[str, Any]) -> dict[str, bytes]:
    """File name -> content: each as PNG and as SVG."""
    return {f"{name}.{kind}": saved(figure, kind) for name, figure in figures.items() for kind in ("png", "svg")}
