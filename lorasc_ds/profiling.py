"""`--profile`: a trace of a few steps and of one boundary, by torch's profiler; and the ranges that it names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from torch.autograd import profiler
from torch.profiler import profile, record_function

from lorasc_ds.algorithm.plan import Expert

STEPS = 3  # on each side of the boundary


@contextmanager
def span(name: str) -> Iterator[None]:
    """A named range of the trace that is being made, this one or a user's own; it costs a microsecond where none is."""
    if not profiler._is_profiler_enabled:
        yield
        return
    with record_function(name):
        yield


class Profile:
    """Traces the last `STEPS` steps of the first expert that it meets, its boundary, and as many steps after it.

    An evaluation that falls between them is in the trace, whole.

    Args:
        file: what is written, in the format of Chrome's traces; None: nothing is traced.
        say: tells a line.
    """

    def __init__(self, file: Path | None, say: Callable[[str], None]) -> None:
        self.file = file
        self.say = say
        self.profiler: profile | None = None
        self.steps = (0, 0)

    def __enter__(self) -> Profile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()

    def before(self, step: int, expert: Expert) -> None:
        """Step `step` of `expert`, counted from 0 over the run, comes next."""
        if self.profiler is not None and step >= self.steps[1]:
            self.finish()
        elif self.profiler is None and self.file is not None and step >= expert.stop - STEPS:
            self.steps = (step, expert.stop + STEPS)
            self.profiler = profile(acc_events=True)
            self.profiler.start()

    def finish(self) -> None:
        """Write the trace, if one is being made. There is one of a run."""
        if self.profiler is None or self.file is None:
            return
        self.profiler.stop()
        self.file.parent.mkdir(exist_ok=True)
        self.profiler.export_chrome_trace(str(self.file))
        self.say(
            f"profile   from step {self.steps[0] + 1} on, in {self.file}; open it in https://ui.perfetto.dev, or with"
            f" torch-tb-profiler installed: tensorboard --logdir {self.file.parent}"
        )
        self.profiler = self.file = None
