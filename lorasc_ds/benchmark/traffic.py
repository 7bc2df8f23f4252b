"""What processes tell each other, counted where torch hands it to a process group."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    """Bytes that collectives called inside are about, by operation: of an all-gather what comes out, of others what
    goes in. DDP and DeepSpeed are counted alike, since both reach torch's process groups."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.bytes.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "barrier" not in func.__name__:
            sizes = [sum(t.nbytes for t in tree_leaves(one) if isinstance(t, Tensor)) for one in args]
            self.bytes[func.__name__.split(".")[0]] += max(sizes, default=0)
        return func(*args, **(kwargs or {}))
