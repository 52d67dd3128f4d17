"""A run beside its loop: where it begins, its bar, its log, its checkpoints, its signals.

    with Run(folder, tensors, optimizer, save_every="10m", log_every=50, resume=True) as run:
        for step in run.steps(1000, "train"):
            ...                                  # the loop does what the paper says
            run.record(loss, norm)               # and the run does the rest

`Log` is the part that a loop over tasks shares (`tasks.py`, for `adapt.py`).
"""

import dataclasses
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from tqdm import tqdm

from plumbing import processes
from plumbing.backbones import advice_on_memory, make_deterministic, pick_device
from plumbing.checkpoint import LOWER_RATE, Progress, load_checkpoint, save_checkpoint
from plumbing.errors import RunError, UserError, hang_ups, tell
from plumbing.flags import INTERVAL, check_ranges, describe
from plumbing.folders import CHECKPOINT, locked_folder, result_if_done, truncate_log


def run_in_folder(work: Callable, cfg, script: str, advice: str, usual: dict) -> dict:
    """Call work(folder, cfg) in the locked run folder; returns its result, or that of a finished run on --resume.

    script: "train.py", to say how to resume. advice: what to try if memory runs out. usual: the recipe's settings, for
    `flags.describe`. With --dry-run the folder is a temporary one. Raises UserError for settings out of range, or a
    folder that is in use or not empty.
    """
    check_ranges(cfg)
    if cfg.deterministic:
        make_deterministic()
    processes.join(pick_device(cfg.device))
    if cfg.tensorboard:
        summary_writer()  # now, not after the data are read
    print(describe(cfg, usual))
    if cfg.dry_run:
        with TemporaryDirectory() as empty, advice_on_memory(advice, then=""):
            return work(Path(empty), dataclasses.replace(cfg, resume=False))
    folder, source = Path(cfg.output_dir), getattr(cfg, "from_run", "") or getattr(cfg, "checkpoint", "")
    if cfg.overwrite and source and folder.resolve() == Path(source).resolve():
        raise UserError(f"--overwrite: {folder} is the run that this one starts from: choose another --output-dir")
    with locked_folder(folder, f"python {script}"), advice_on_memory(advice):
        if done := result_if_done(folder, cfg.resume, script if cfg.overwrite else ""):
            return done
        return work(folder, cfg)


class Log:
    """A log of a run folder, one JSON object a line, open within this context.

    stays(line): whether to keep a line of an interrupted run; the run writes the others again. everyone: all processes
    append their lines, not the first one alone. board: write the numbers of each line for TensorBoard too.
    """

    def __init__(
        self, folder: Path, stays: Callable[[dict], bool], everyone=False, name="log.jsonl", board: bool = False
    ):
        self.path = folder / name if everyone or processes.first() else Path(os.devnull)
        self.board = summary_writer()(str(folder / "tensorboard")) if board and self.path != Path(os.devnull) else None
        processes.wait()  # until all have read what `stays` depends on
        if processes.first():
            truncate_log(self.path, stays)
        processes.wait()

    def __enter__(self):
        self.file = open(self.path, "ab", buffering=0)  # a line is one write: processes append to one file
        return self

    def __exit__(self, *error):
        self.file.close()
        if self.board:
            self.board.close()

    def write(self, line: dict):
        """Append a line; its numbers also go to TensorBoard, under the split and the task if it names them."""
        self.file.write(f"{json.dumps(line, ensure_ascii=False)}\n".encode())
        for name, value in line.items() if self.board else ():
            if isinstance(value, float):
                tag = "/".join([line[key] for key in ("split", "task") if line.get(key)] + [name])
                self.board.add_scalar(tag, value, line["step"])

    def flush_to_disk(self):
        """fsync the log, so that no checkpoint outlives its log lines."""
        os.fsync(self.file.fileno())


def summary_writer() -> type:
    """torch's writer for TensorBoard. Raises UserError if its package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package: pip install tensorboard, or leave the flag out") from None
    return SummaryWriter


class Every:
    """--save-every: "200" is every 200 steps, "10m" every 10 minutes (`flags.check_ranges` has checked it)."""

    def __init__(self, text: str):
        match = re.fullmatch(INTERVAL, text)
        self.count, self.minutes, self.last = int(match[1]), bool(match[2]), time.monotonic()

    def due(self, step: int) -> bool:
        """Whether to save after this step."""
        if not self.minutes:
            return step % self.count == 0
        if time.monotonic() - self.last < 60 * self.count:
            return False
        self.last = time.monotonic()
        return True


class Signals:
    """Within this context Ctrl-C, SIGTERM and SIGHUP (the terminal is closed) only set `caught`, the signal's number.

    The loop then ends after its step. An ignored SIGHUP (nohup) stays ignored. A second Ctrl-C acts at once; a second
    SIGTERM does not, for launchers repeat one that the process has already received.
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


class Run(Log):
    """A training run within this context: `Log`, and checkpoints, the bar, signals, the sum over processes.

    tensors: all that the loop changes, by name. made_with: {"backbone": hash, ...}; --resume refuses a run
    if one of these has changed. unit: what a step is called in the log. look: called every look_every steps (0: never),
    it gives the validation loss. board: see `Log`. Raises UserError if the run cannot be resumed.
    """

    def __init__(
        self, folder: Path, tensors: dict[str, Tensor], optimizer, *, save_every: str, log_every: int = 1,
        resume: bool = False, made_with: dict | None = None, unit: str = "step", look: Callable | None = None,
        look_every: int = 0, board: bool = False,
    ):  # fmt: skip
        self.look, self.look_every, self.seen = look, look_every, ""
        self.checkpoint, self.tensors, self.optimizer = folder / CHECKPOINT, tensors, optimizer
        self.every, self.log_every, self.made_with, self.unit = Every(save_every), log_every, made_with, unit
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.signals, self.stop, self.now = Signals(), 0, Progress()
        if resume and self.checkpoint.exists():
            self.now = load_checkpoint(self.checkpoint, tensors, optimizer, made_with)
            print(f"resuming after {unit} {self.now.step:,}")
        super().__init__(folder, lambda line: line[unit] <= self.now.step, board=board)

    def __enter__(self):
        super().__enter__()
        self.signals.__enter__()
        return self

    def __exit__(self, *error):
        self.signals.__exit__()
        super().__exit__()

    def steps(self, total: int, title: str, counts: str = "step", each: int = 1) -> Iterator[int]:
        """The numbers, from 1, of the steps left to do, with a bar. counts: the bar's unit; each: units per step."""
        begin, self.total = self.now.step, total
        self.start = time.monotonic() - self.now.seconds
        form = (
            "{desc} {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"  # 80 columns
        )
        options = dict(unit=counts, unit_scale=each > 1, disable=None, bar_format=form)
        with tqdm(total=total * each, desc=title, initial=begin * each, **options) as self.bar:
            for step in range(begin + 1, total + 1):
                yield step
                self.bar.update(each)

    def sum_over_processes(self, loss: Tensor) -> Tensor:
        """Sum gradients and loss over all processes; returns the loss. With one process nothing changes."""
        loss, self.stop = processes.sum_gradients(self.parameters, loss, self.signals.caught)
        return loss

    def values(self, *scalars: Tensor) -> list[float]:
        """Scalars as numbers: the one place in a step that waits for the device."""
        *numbers, self.stop = torch.stack([x.to(scalars[0].dtype) for x in (*scalars, self.stop)]).tolist()
        return numbers

    def record(self, loss: float, norm: float, shown: str = "", **more):
        """End a step: note its loss, log every log_every steps, save when due, stop if a signal asked for it.

        shown: text for people, instead of the loss. more: further entries of the log line. Raises SystemExit to stop,
        RunError or OSError as `save_checkpoint`.
        """
        step = self.now.step + 1
        stop = self.stop if processes.several() else self.signals.caught  # in one process the signal itself, newer
        self.now = self.now.after(step, loss, time.monotonic() - self.start)
        if looked := self.look_every and step % self.look_every == 0:
            more["valid_loss"] = self.look()
            self.seen = f", valid {more['valid_loss']:.3f}"
        self.bar.set_postfix_str(shown or f"loss {loss:.3f}{self.seen}", refresh=False)
        if step % self.log_every == 0 or step == self.total or looked:
            self._log(norm, shown, more)
        if (self.every.due(step) or stop or step == self.total) and processes.first():
            self.flush_to_disk()
            save_checkpoint(self.checkpoint, self.tensors, self.optimizer, self.now, self.made_with)
        if stop:
            print(f"stopped after {self.unit} {step}")
            processes.wait()  # until it is saved: launchers kill the others when one exits
            sys.exit(128 + (self.signals.caught or signal.SIGTERM))

    def _log(self, norm: float, shown: str, more: dict):
        """Write a line of log.jsonl and show progress: at the bar, or without a terminal in about ten lines a run."""
        self.now = now = self.now.logged()
        rate, seconds = self.optimizer.param_groups[0]["lr"], round(now.seconds, 3)
        self.write({self.unit: now.step, "loss": now.loss, "norm": norm, "lr": rate, "seconds": seconds, **more})
        plain_every = max(self.log_every, self.total // 10 // self.log_every * self.log_every)
        if self.bar.disable and (now.step % plain_every == 0 or now.step == self.total):
            text = shown or f"loss {now.loss:.4f}{self.seen}"
            print(f"{self.unit} {now.step}/{self.total}  {text}  {now.seconds:.0f} s", flush=True)


def refuse_nonfinite(loss: float, norm: float, step: int, batch: list, tasks: list):
    """Raise RunError if the loss or the gradient norm is not finite, before the step changes anything.

    batch: its `data.Item`s. The message names each example by its task and its number, from 0, among the task's
    training examples; to find that, these are read from the first one on.
    """
    if not (math.isfinite(loss) and math.isfinite(norm)):
        examples = ", ".join(f"{tasks[i.task].name}[{tasks[i.task].train.index(i.example)}]" for i in batch)
        raise RunError(
            f"step {step}, training examples {examples}: the loss is {loss}, the gradient norm {norm}; nothing of this "
            f"step was kept. {LOWER_RATE}"
        )
