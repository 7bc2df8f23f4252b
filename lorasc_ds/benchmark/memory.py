"""How much memory tensors, or a process, hold."""

from __future__ import annotations

import gc
import re
import threading
import weakref
from pathlib import Path
from typing import Any

from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def live_bytes() -> int:
    """Of all tensors on the CPU that Python knows; a compiler's stand-ins hold none."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if issubclass(type(one), Tensor) and not isinstance(one, FakeTensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor.device.type == "cpu")


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        known = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        for one in tree_leaves(outputs):
            if isinstance(one, Tensor):
                storage = one.untyped_storage()
                if storage._cdata not in self.live and storage._cdata not in known:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return outputs


class PeakResident:
    """The most anonymous memory this process held inside, above what it held before; files mapped are not counted."""

    def __enter__(self) -> PeakResident:
        self.before, self.peak, self.left = self.held(), 0, threading.Event()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        return self

    def watch(self) -> None:
        while not self.left.wait(0.002):
            self.peak = max(self.peak, self.held() - self.before)

    def held(self) -> int:
        (line,) = re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(line) * 1024

    def __exit__(self, *_: object) -> None:
        self.left.set()
        self.watcher.join()
