"""What a user waits for before anything happens: `--help` and a refusal need no torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import ROOT

REFUSED = {  # by every command, before anything is loaded
    "train": ["--training.epochs=many"],
    "show_data": ["--adapter.rnk=3"],
    "evaluate": ["model", "--output_dir=out", "--tasks=poems"],
    "export": ["run", "--output_dir=out", "--as=merge"],
    "corrupt": ["images", "out", "--severities=6"],
    "inspect_ledger": ["no_such_run"],
    "rollback": ["no_such_run", "--expert=1"],
    "compact": ["no_such_run"],
    "benchmark": ["--output_dir=out", "--rows=C99"],
    "study": ["no_such_study.yaml"],
}
PROGRAM = """
import contextlib, io, json, runpy, sys, time
endings, began = [], time.perf_counter()
for name, arguments in json.loads(sys.argv[1]):
    sys.argv = [name, *arguments]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            runpy.run_path(f"launch/{name}.py", run_name="__main__")
        except SystemExit as end:
            endings.append([end.code, said.getvalue()])
between = time.perf_counter()
heavy = sorted({"torch", "transformers", "numpy", "sklearn"} & set(sys.modules))
import torch
print(json.dumps([endings, heavy, between - began, time.perf_counter() - between]))
"""


def test_help_and_refusals_are_said_at_once() -> None:
    """All commands in one process, which imports torch after them: the reference on any machine, however busy."""
    assert set(REFUSED) == {path.stem for path in (ROOT / "launch").glob("*.py")}
    calls = [(name, arguments) for name in REFUSED for arguments in (["--help"], REFUSED[name])]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(calls)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    endings, heavy, seconds, import_of_torch = json.loads(done.stdout)
    assert heavy == []
    for (name, arguments), (code, said) in zip(calls, endings, strict=True):
        helped = arguments == ["--help"]
        assert code == (0 if helped else 2), f"{name} {arguments}: {said}"
        assert said.startswith("usage: " if helped else "error: "), f"{name} {arguments}: {said}"
        assert helped or said.count("\n") == 1
    assert seconds < import_of_torch, "all commands took longer than one import of torch"


def test_a_bug_is_shown_whole_and_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from lorasc_ds.algorithm.ledger import LedgerError
    from lorasc_ds.command import ending
    from lorasc_ds.errors import DivergedError, PeerError, PreemptedError

    def raising(error: BaseException) -> int:
        def work() -> None:
            raise error

        return ending(work)

    cases = {
        LedgerError("damaged"): (4, "error: damaged\n"),
        DivergedError("too far"): (3, "error: too far\n"),
        PreemptedError("left"): (75, "left\n"),
        PeerError("rank 1: gone", 2, told=True): (2, ""),
        PeerError("rank 1: gone", 2, told=False): (2, "error: rank 1: gone\n"),
        KeyboardInterrupt(): (130, "stopped by Ctrl-C\n"),
    }
    for error, (code, said) in cases.items():
        assert (raising(error), capsys.readouterr().err) == (code, said)
    assert raising(ValueError("a bug")) == 1
    assert "Traceback" in capsys.readouterr().err
