"""LoRASC (arXiv 2407.01491): cascades of LoRA experts, averaged, merged and started again.

`Cascade` brings it to a training loop of one's own, `CascadeCallback` to `transformers.Trainer` and TRL's trainers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorasc_ds.callback import CascadeCallback
    from lorasc_ds.plugin import Cascade

__all__ = ["Cascade", "CascadeCallback"]


def __getattr__(name: str) -> Any:
    """Imported when asked for: `--help` does not wait for them."""
    if name == "Cascade":
        from lorasc_ds.plugin import Cascade

        return Cascade
    if name == "CascadeCallback":
        from lorasc_ds.callback import CascadeCallback

        return CascadeCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
