"""Runs that may be cut off at any moment: checkpoints, signals, and the lock of a run folder.

    python train.py --resume --output-dir runs/NAME           go on with a run that was cut off

A checkpoint holds all that the rest of a run depends on: what is trained, the optimiser's state, the state of the
random numbers, the losses not yet logged, and the step, from which data order and learning rates follow. So a run that
is gone on with is the run that was never cut off, to the bit: in one process on the same CPU. Several processes are in
one state of the random numbers again (`parallel.py` says when they part ways), and on CUDA sums of gradients differ in
their last bits from run to run anyhow, but under `backbone.make_deterministic`.

It is one safetensors file, written under another name, synced to the disk and renamed over the one before: whenever the
process dies, there is a whole checkpoint or none, never half of one. The log is synced first. A run does not go on if
the backbone or the tasks are no longer those that it was made with.
"""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm import tqdm

import parallel
from config import ROUTED, RunError, UserError, hang_ups, read_json, refuse_used, tell, whole_file
from inject import adapter_parameters, digest, fingerprint, read_tensors, write_tensors

CHECKPOINT = "checkpoint.safetensors"  # in the run folder, until the run is done
LOCK = ".lock"  # in the run folder, while a process is at work there
LOWER_RATE = (
    "Try a lower --lr or --precision fp32 in a new folder: to go on from the checkpoint would be the same again"
)

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


def marks_of_tasks(tasks: list) -> str:
    """A short hash of tasks (`data.Task`): names, and of each part its size and its first and last example."""
    found = hashlib.sha256()
    for task in tasks:
        for part in (task.train, task.dev, task.test):
            found.update(repr((task.name, len(part), *(part[k] for k in (0, -1) if len(part)))).encode())
    return found.hexdigest()[:16]


def marks_of_model(model: nn.Module) -> dict[str, str]:
    """A pre-trained model's backbone and adapters as short hashes, for `refuse_other`."""
    return {"backbone": fingerprint(model), "checkpoint": digest(adapter_parameters(model))[:16]}


def refuse_other(path: Path, saved, now: dict[str, str]):
    """Raise UserError if what a file was made with (saved: {"backbone": hash, ...}) is not what is there now."""
    for what, mark in now.items():
        if not isinstance(saved, dict) or saved.get(what) != mark:
            advice = "put that one back, or delete the file to make it again"
            raise UserError(f"{path} was made with another {what} than there is now: {advice}")


def refuse_other_tasks(folder: Path, method: str, tasks: list):
    """Raise UserError unless the training tasks (`data.Task`) are those of the run in a folder, in its order: under a
    routed method row t of Z is task t. Of a run that `export.py` took from elsewhere, which calls them 0, 1, 2, ...,
    only the number can be compared."""
    if method not in ROUTED:
        return
    made, names = read_json(folder / "tasks.json", tasks=list)["tasks"], [task.name for task in tasks]
    if made == [str(t) for t in range(len(made))]:
        names = [str(t) for t in range(len(names))]
    for t, (then, now) in enumerate(zip_longest(made, names)):
        if then != now:
            there = f"{folder}: its training task {t} is {then!r:.60}, that of the data {now!r:.60}"
            raise UserError(f"{there}: give the --data-dir that it was trained on")


def sync(log):
    """Have all that was written to an open file on the disk: what is saved after it is then never there without it."""
    log.flush()
    os.fsync(log.fileno())


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, made_with=None):
    """Write a checkpoint in the place of the one before. Raises OSError if that fails, RunError if a value is no longer
    finite; the one before is then whole.

    made_with: {"backbone": hash, ...}, for `load_checkpoint` to compare.
    """
    tensors = {f"model.{name}": p.detach().contiguous() for name, p in run_tensors(model).items()}
    numbers, states = {}, optimizer.state_dict()["state"]
    for k, state in states.items():
        for name, value in state.items():
            (tensors if isinstance(value, Tensor) else numbers)[f"optimizer.{k}.{name}"] = value
    if broken := [name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]:
        raise RunError(f"{broken[0]} is not finite after step {progress.step}: nothing of it was saved. {LOWER_RATE}")
    tensors["random"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    state = {**progress._asdict(), "numbers": numbers, "trained": list(states), "made_with": made_with}
    write_tensors(tensors, path, state=json.dumps(state))


@torch.no_grad()
def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, made_with=None) -> Progress:
    """Put a run back where `save_checkpoint` found it. The model and the optimiser must be made as they were then.

    made_with: as `save_checkpoint` was given it; None: whatever it was. Raises UserError, with nothing changed, if the
    file is damaged, of another run, or made with something else.
    """
    try:
        tensors, metadata = read_tensors(path)
        state = json.loads(metadata["state"])
        saved, trained, progress = tensors | state["numbers"], set(state["trained"]), _progress(state)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is no whole checkpoint ({error}): delete it to begin the run again") from None
    refuse_other(path, state.get("made_with"), made_with or {})
    if not torch.cuda.is_available():
        saved.pop("random.cuda", None)  # of a run that goes on without its GPU
    own = {f"model.{name}": p for name, p in run_tensors(model).items()}
    check_tensors(path, saved, own | flat_state(optimizer, trained) | {"random": None})
    state = by_parameter(saved)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for k, entries in state.items():  # once more: load_state_dict rounds them to the parameter's type
        own_state = optimizer.state[parameters[k]]
        own_state |= {n: v.to(parameters[k].device) if isinstance(v, Tensor) else v for n, v in entries.items()}
    for name, p in own.items():
        p.copy_(saved[name])
    torch.set_rng_state(saved["random"])
    if "random.cuda" in saved:
        torch.cuda.set_rng_state(saved["random.cuda"])
    return progress


def check_tensors(path: Path, saved: dict, expected: dict):
    """Raise UserError unless the names of a checkpoint are the expected ones, and each value fits."""
    for name in sorted(saved.keys() | expected.keys()):
        if name not in saved or not _fits(name, saved[name], expected.get(name)):
            found = "missing, unknown, of another shape or type, or not finite"
            advice = "delete it to begin the run again"
            raise UserError(f"{path}: {name} is {found}, so it is of a run with other settings: {advice}")


def _progress(state: dict) -> Progress:
    """The Progress that a checkpoint's JSON holds. Raises ValueError, TypeError or OverflowError if it holds none."""
    now = Progress(*(state[name] for name in Progress._fields))._replace(recent=tuple(state["recent"]))
    if type(now.step) is not int or not 0 < now.step < 2**31:
        raise ValueError(f"its step is {str(now.step)[:40]}")
    if not all(math.isfinite(x) for x in (now.seconds, *now.recent)) or not isinstance(now.loss, float):  # loss: or NaN
        raise ValueError("its seconds or losses are no numbers")
    return now


def flat_state(optimizer: torch.optim.Optimizer, trained: set) -> dict:
    """{"optimizer.K.NAME": value} of the parameters with these numbers, as the first step makes it: a step of the same
    optimiser on parameters without memory ("meta")."""
    groups = []
    for group in optimizer.param_groups:
        params = [torch.empty_like(p, device="meta", requires_grad=True) for p in group["params"]]
        for p in params:
            p.grad = torch.empty_like(p)
        groups.append(group | {"params": params, "fused": False})
    twin = type(optimizer)(groups)
    twin.step()
    state = {k: own for k, own in twin.state_dict()["state"].items() if k in trained}
    return {f"optimizer.{k}.{name}": value for k, own in state.items() for name, value in own.items()}


def _fits(name: str, value, like) -> bool:
    """Whether a value from a checkpoint can take the place of `like`: its type and shape, and it is finite. A state of
    random numbers: whether a generator takes it."""
    if name in ("random", "random.cuda"):
        try:
            torch.Generator("cuda" if name == "random.cuda" else "cpu").set_state(value)
        except (RuntimeError, TypeError):
            return False
        return True
    if not isinstance(like, Tensor) or not isinstance(value, Tensor):
        return like is not None and type(value) is type(like)
    if (value.shape, value.dtype) != (like.shape, like.dtype):
        return False
    return not value.is_floating_point() or bool(value.isfinite().all())


def by_parameter(flat: dict) -> dict[int, dict]:
    """{"optimizer.K.NAME": value} to {K: {NAME: value}}."""
    state = {}
    for key, value in flat.items():
        if key.startswith("optimizer."):
            _, k, name = key.split(".")
            state.setdefault(int(k), {})[name] = value
    return state


def cut_log(path: Path, keep: Callable[[dict], bool]):
    """Drop the lines of a log that say what the run will do again, and a last line that is not whole.

    Raises UserError for any other line that is damaged.
    """
    if not path.exists():
        return
    *whole, _ = path.read_bytes().split(b"\n")
    kept = []
    for number, line in enumerate(whole, 1):
        try:
            if keep(json.loads(line)):
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path}:{number} is damaged: delete this line to go on") from None
    with whole_file(path) as temporary:
        temporary.write_bytes(b"".join(kept))


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
    (folder / CHECKPOINT).unlink(missing_ok=True)
    for path in list(folder.rglob("*.tmp*")):
        if path.is_dir() and path.suffix == ".tmp":
            shutil.rmtree(path)
        elif re.fullmatch(r".+\.(safetensors|jsonl?)\.tmp|\.tmp\w{6}", path.name):  # ours; safetensors' own
            path.unlink()


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
    """Within this context Ctrl-C, SIGTERM and SIGHUP (the terminal is closed) are noted, for the loop to end after its
    step: `caught` is the number. SIGHUP that is ignored (nohup) stays so.

    A second Ctrl-C is obeyed at once. (A second SIGTERM is not: launchers pass on what the process has had already.)
    """

    def __init__(self):
        self.caught, self.before = 0, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # the only one that gets signals
            for number in (signal.SIGINT, signal.SIGTERM, *hang_ups()):
                self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame):
        if self.caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.caught:
            tell("\nstopping after this step (Ctrl-C: at once)")
        self.caught = number


@contextmanager
def hold(folder: Path, command: str):
    """Make a run's folder and hold it while in this context, or until the process ends, however it ends. Of several
    processes the first one holds it. A folder in which no run was begun is removed again; one whose run is stopped by a
    signal says how to go on with it, by the same command ("python train.py").

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
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, SIGTERM, SIGHUP
        if (folder / "config.json").exists():
            tell(f"\nto go on: {command} --resume --output-dir {folder}")
        raise
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
    folder holds a run and --resume was not given, or something that is no run."""
    begun = resume and (folder / "config.json").exists()
    if begun and (folder / "result.json").exists():
        print(f"{folder} is finished: nothing to go on with")
        tidy(folder)
        return read_json(folder / "result.json")
    if parallel.first() and not begun:
        refuse_used(str(folder))
    return None


# --- Runs that fail ---------------------------------------------------------------------------------------------------


def refuse_nonfinite(loss: float, norm: float, step: int, batch: list, tasks: list):
    """Raise RunError if the loss or the gradients' norm is not a finite number, before anything is changed by it.

    batch: its `data.Item`s. The message names each example by its task and its place, from 0, among the training
    examples of the task; to find that, these are read from the first one on.
    """
    if not (math.isfinite(loss) and math.isfinite(norm)):
        examples = ", ".join(f"{tasks[i.task].name}[{tasks[i.task].train.index(i.example)}]" for i in batch)
        raise RunError(
            f"step {step}, training examples {examples}: the loss is {loss}, the norm of its gradients {norm}; nothing "
            f"of it was kept. {LOWER_RATE}"
        )


NO_MEMORY = (  # in a RuntimeError of torch: two on a CPU, then on CUDA outside torch's own allocator
    "can't allocate memory|Storage size calculation overflowed|CUDA error: out of memory|_STATUS_ALLOC_FAILED"
)


def out_of_memory(error: Exception) -> bool:
    """Whether this is what running out of memory looks like."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(re.search(NO_MEMORY, str(error)))


@contextmanager
def advice_on_memory(advice: str, then: str = ", with --resume to go on"):
    """Turn running out of memory into a RunError that says what to try (advice) and what comes after it (then); also
    what --deterministic does not allow."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if "does not have a deterministic implementation" in str(error):
            raise RunError(f"--deterministic: {str(error).split()[0]} cannot be so, leave the flag out") from None
        if out_of_memory(error):
            raise RunError(f"there is not enough memory: try {advice}{then}") from None
        raise
