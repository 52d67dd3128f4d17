"""The project's commands, run side by side from a program: each once, and stopped early if need be; raw files."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from plumbing.errors import UserError
from plumbing.machine import commit

ROOT = Path(__file__).resolve().parents[1]
GRACE = 60  # seconds that a command has to save what it has
stopping = threading.Event()  # nothing is begun any more, and what runs is stopped


class OutOfTime(Exception):
    """The time that was given is over."""


class Failed(SystemExit):
    """A command failed; the text says which, and its last words."""


def run(script: str, flags: list[str], result: Path, until: float = math.inf) -> dict:
    """Run a script (train.py) or command (tools.analyze) unless the JSON file `result` that it writes exists.

    until: of time.monotonic(); a command that is not done then is stopped, and saves what it has. Returns the file's
    content and "commit" (`made_by`). Raises OutOfTime, or Failed.
    """
    if not result.exists():
        entry, code = [script] if script.endswith(".py") else ["-m", script], commit()
        command = [sys.executable, *entry, *flags]
        status, out, err = finish(command, until)
        if status == -signal.SIGINT:  # Ctrl-C in a terminal reaches all
            raise KeyboardInterrupt
        if status:
            raise Failed(f"{' '.join(command)}\nended with code {status}:\n{err[-2000:]}")
        (result.parent / "commit").write_text(code)
        print(f"{result.parent.name}: {out.splitlines()[-1]}", flush=True)
    return json.loads(result.read_text()) | {"commit": made_by(result)}


def made_by(result: Path) -> str:
    """The commit that made a result; of a training run those of all its starts: "a0b1c2d, e3f4a5b"."""
    starts, last = result.parent / "provenance.json", result.parent / "commit"
    if result.name == "result.json" and starts.exists():
        return ", ".join(dict.fromkeys(start["commit"] for start in json.loads(starts.read_text())["starts"]))
    return last.read_text() if last.exists() else "unknown"  # if this program was killed while the script ran


def refuse_absent_gpu(device: str):
    """Raise UserError for cuda where torch sees no GPU."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA GPU here, leave it out")


def raw_lines(path: Path, key: Callable[[dict], Hashable]) -> dict[Hashable, dict]:
    """{key(line): line} of a file with a JSON object a line; {} if there is none.

    key raises ValueError, KeyError, TypeError or UserError for a line that is damaged. Raises UserError for the file.
    """
    lines = {}
    whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # without the rest of a killed process
    for number, text in enumerate(whole, 1):
        try:
            line = json.loads(text)
            lines[key(line)] = line
        except (ValueError, KeyError, TypeError, RecursionError, UserError):
            raise UserError(f"{path}:{number} is damaged: delete this line, its value is then made again") from None
    return lines


def finish(command: list[str], until: float) -> tuple[int, str, str]:
    """Run a command, with one thread, to its end: (exit status, output, errors). Raises OutOfTime."""
    over = lambda: stopping.is_set() or time.monotonic() >= until  # noqa: E731
    if over():
        raise OutOfTime
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes) as process:
        while not over():
            try:
                out, err = process.communicate(timeout=0.5)
                return process.returncode, out, err
            except subprocess.TimeoutExpired:
                pass
        process.terminate()  # scripts save what they have; a shell may have made them deaf to Ctrl-C
        try:
            process.communicate(timeout=GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
    raise OutOfTime


def side_by_side(function: Callable, items: Iterable, jobs: int) -> list:
    """function(item) of each item, `jobs` at a time in threads; their results, in order.

    A failure, Ctrl-C or SIGTERM stops all that runs, and is raised; of several failures one that is not OutOfTime.
    """
    try:
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                if not all(future.done() for future in futures):
                    stopping.set()
                    pool.shutdown(wait=False, cancel_futures=True)
    finally:
        stopping.clear()  # all have ended
    errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
    if errors:
        raise next((error for error in errors if not isinstance(error, OutOfTime)), errors[0])
    return [future.result() for future in futures]
