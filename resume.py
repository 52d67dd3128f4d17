"""Runs that may be cut off at any moment: checkpoints, signals, and the lock of a run folder.

    python train.py --resume --output-dir runs/NAME           go on with a run that was cut off

A checkpoint holds all that the rest of a run depends on: what is trained, the optimiser's state, the state of the
random numbers, the losses not yet logged, and the step, from which data order and learning rates follow. So a run that
is gone on with is the run that was never cut off, to the bit: in one process on the same CPU. Several processes are in
one state of the random numbers again (`parallel.py` says when they part ways), and on CUDA sums of gradients differ in
their last bits from run to run anyhow, but under `backbone.make_deterministic`.

It is one safetensors file, written under another name, synced to the disk and renamed over the one before: whenever the
process dies, there is a whole checkpoint or none, never half of one.
"""

import json
import math
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm import tqdm

import parallel
from config import RunError, UserError, read_json, refuse_used, whole_file
from inject import adapter_parameters, read_tensors, write_tensors

CHECKPOINT = "checkpoint.safetensors"  # in the run folder, until the run is done
LOCK = ".lock"  # in the run folder, while a process is at work there

# --- Checkpoints ------------------------------------------------------------------------------------------------------


class Progress(NamedTuple):
    """How far a run is: its last whole step, the seconds that it took, the losses since the last line of its log, and
    the loss in that line."""

    step: int = 0
    seconds: float = 0.0
    recent: tuple[float, ...] = ()
    loss: float = math.nan

    def after(self, step: int, loss: float, seconds: float) -> "Progress":
        return Progress(step, seconds, (*self.recent, loss), self.loss)

    def logged(self) -> "Progress":
        """The line's loss is the mean of the recent ones."""
        return Progress(self.step, self.seconds, (), sum(self.recent) / len(self.recent))


def run_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a run changes or has drawn, by name: adapters and routers, and whatever else is trained."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad} | adapter_parameters(model)


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress):
    """Write a checkpoint in the place of the one before. Raises OSError if that fails; the one before is then whole."""
    tensors = {f"model.{name}": p.detach().contiguous() for name, p in run_tensors(model).items()}
    numbers = {}
    for k, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            (tensors if isinstance(value, Tensor) else numbers)[f"optimizer.{k}.{name}"] = value
    tensors["random"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    write_tensors(tensors, path, state=json.dumps({**progress._asdict(), "numbers": numbers}))


@torch.no_grad()
def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Put a run back where `save_checkpoint` found it. The model and the optimiser must be made as they were then.

    Raises UserError, with the model unchanged, if the file is damaged or of another run.
    """
    try:
        saved, metadata = read_tensors(path)
        state = json.loads(metadata["state"])
        numbers, progress = state.pop("numbers"), Progress(**state | {"recent": tuple(state["recent"])})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no whole checkpoint ({error}): delete it to begin the run again") from None
    own = {f"model.{name}": p for name, p in run_tensors(model).items()}
    kinds = [{n: (p.shape, p.dtype) for n, p in d.items() if n.startswith("model.")} for d in (own, saved)]
    if kinds[0] != kinds[1]:
        raise UserError(f"{path} is of a run with other settings: delete it to begin the run again")
    state = _by_parameter(saved | numbers)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for k, entries in state.items():  # once more: load_state_dict rounds them to the parameter's type
        own_state = optimizer.state[parameters[k]]
        own_state |= {n: v.to(parameters[k].device) if isinstance(v, Tensor) else v for n, v in entries.items()}
    for name, p in own.items():
        p.copy_(saved[name])
    torch.set_rng_state(saved["random"])
    if "random.cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["random.cuda"])
    return progress


def _by_parameter(flat: dict) -> dict[int, dict]:
    """{"optimizer.K.NAME": value} to {K: {NAME: value}}."""
    state = {}
    for key, value in flat.items():
        if key.startswith("optimizer."):
            _, k, name = key.split(".")
            state.setdefault(int(k), {})[name] = value
    return state


def cut_log(path: Path, keep: Callable[[dict], bool]):
    """Drop the lines of a log that say what the run will do again, and a last line that is not whole."""
    if path.exists():
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
        with whole_file(path) as temporary:
            temporary.write_text("".join(line for line in whole if keep(json.loads(line))))


def write_line(log, bar: tqdm, now: Progress, norm: float, lr: float, every: int):
    """A line of log.jsonl, and for people: beside the bar, or without a terminal some ten plain lines a run."""
    line = {"step": now.step, "loss": now.loss, "norm": norm, "lr": lr, "seconds": round(now.seconds, 1)}
    log.write(json.dumps(line) + "\n")
    log.flush()
    bar.set_postfix(loss=f"{now.loss:.3f}")
    plain_every = max(every, bar.total // 10 // every * every)
    if bar.disable and (now.step % plain_every == 0 or now.step == bar.total):
        print(f"step {now.step}/{bar.total}  loss {now.loss:.4f}  {now.seconds:.0f} s", flush=True)


def tidy(folder: Path):
    """Remove what a finished run needs no more: checkpoint, and files that a killed process left half written."""
    for path in (folder / CHECKPOINT, *folder.rglob("*.tmp")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


class Every:
    """--save-every: "200" is every 200 steps, "10m" every 10 minutes. Raises UserError for anything else."""

    def __init__(self, text: str):
        found = re.fullmatch(r"([1-9]\d{0,8})(m?)", text)
        if not found:
            raise UserError(f"--save-every {text} is neither a number of steps, as 200, nor of minutes, as 10m")
        self.count, self.minutes, self.last = int(found[1]), bool(found[2]), time.monotonic()

    def due(self, step: int) -> bool:
        """Whether to save after this step."""
        if not self.minutes:
            return step % self.count == 0
        if time.monotonic() - self.last < 60 * self.count:
            return False
        self.last = time.monotonic()
        return True


# --- Signals and the lock ---------------------------------------------------------------------------------------------


class Signals:
    """Within this context Ctrl-C and SIGTERM are noted, for the loop to end after its step: `caught` is the number.

    A second Ctrl-C is obeyed at once. (A second SIGTERM is not: launchers pass on what the process has had already.)
    """

    def __init__(self):
        self.caught, self.before = 0, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # the only one that gets signals
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame):
        if self.caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.caught:
            print("\nstopping after this step (Ctrl-C: at once)", flush=True)
        self.caught = number


@contextmanager
def hold(folder: Path):
    """Make a run's folder and hold it while in this context, or until the process ends, however it ends. Of several
    processes the first one holds it. A folder in which no run was begun is removed again.

    Raises UserError if another process holds it, or it cannot be made; RunError if it was removed meanwhile.
    """
    if not parallel.first():
        parallel.wait()
        yield
        return
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder / LOCK)
        held.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process is at work in {folder}: wait, or choose another --output-dir") from None
    except OSError as error:
        raise UserError(f"--output-dir {folder} cannot be made or written: {error.strerror}") from None
    parallel.wait()
    try:
        yield
    except OSError:
        if folder.is_dir():
            raise
        raise RunError(f"{folder} was removed while the run was at work: nothing is left, begin it again") from None
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink()
            if new and not (folder / "config.json").exists():
                folder.rmdir()
        held.release()


def finished(folder: Path, resume: bool) -> dict | None:
    """The result of a run that --resume finds finished; None if there is something to do. Raises UserError if the
    folder holds a run and --resume was not given."""
    if resume and (folder / "result.json").exists():
        print(f"{folder} is finished: nothing to go on with")
        tidy(folder)
        return read_json(folder / "result.json")
    if parallel.first() and not resume:
        refuse_used(str(folder))
    return None


# --- Runs that fail ---------------------------------------------------------------------------------------------------


def refuse_nonfinite(loss: float, norm: float, where: str):
    """Raise RunError if the loss or the gradients' norm is not a finite number, before anything is changed by it."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise RunError(
            f"{where}: the loss is {loss}, the norm of its gradients {norm}; nothing of it was kept. Try a lower --lr "
            "or --precision fp32 in a new folder: to go on from the checkpoint would be the same again"
        )


@contextmanager
def advice_on_memory(advice: str):
    """Turn running out of memory into a RunError that says what to try; also what --deterministic does not allow."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if "does not have a deterministic implementation" in str(error):
            raise RunError(f"--deterministic: {str(error).split()[0]} cannot be so, leave the flag out") from None
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
            raise RunError(f"there is not enough memory: try {advice}, with --resume to go on") from None
        raise
