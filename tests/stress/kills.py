"""Runs that are killed at random moments and resumed: `python -m tests.stress.faults --kills 500` calls this.

Small runs of train.py (12 steps, a checkpoint after each) and, one in four, of adapt.py (2 tasks of 2 splits) are
started again and again with --resume, each time in a new process, and killed (SIGKILL). One kill in ten falls anywhere
in a run; the others fall after its loop has begun, and a third of these is aimed at a save. The child notes in shared
memory what it is doing, so that we know where each kill fell.

Every run is resumed to its end and must be bit-identical to an uninterrupted one: what was trained, the log, the
scores, and the last checkpoint (which the child renames before the run removes it) with the optimiser's state and the
random state. No saved step and no finished task may be done again.
"""

import contextlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from plumbing.tables import aligned

RUN = dict(
    method="mhr", heads=4, dataset="strings", rank=1, skills=2, steps=12, batch_size=4, max_input=8, max_output=4,
    eval_examples=1, log_every=5, save_every="1", device="cpu",
)  # fmt: skip
FEW = dict(
    steps=3, eval_every=2, batch_size=4, shots=4, test_examples=2, tasks="sort+double,drop+swap", split=("0", "1"),
    device="cpu",
)  # fmt: skip
LOADING, STEPS, SAVING, SCORING = range(4)  # what a run is doing
PHASES = ("loading", "steps", "saves", "scoring, end")
LAST = ".last"  # suffix of the last checkpoint of a run, which is kept beside its folder


def small_backbone(folder: Path) -> str:
    """Save a smaller tiny backbone, one encoder and one decoder layer of random weights; returns its folder."""
    import torch
    from transformers import ByT5Tokenizer, T5ForConditionalGeneration

    from plumbing.backbones import tiny_from_scratch

    shape = tiny_from_scratch().config
    shape.d_model, shape.d_kv, shape.d_ff, shape.num_layers, shape.num_decoder_layers = 16, 4, 16, 1, 1
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(0)
        T5ForConditionalGeneration(shape).save_pretrained(folder)
        ByT5Tokenizer().save_pretrained(folder)
    return str(folder)


@contextlib.contextmanager
def quiet():
    """Drop what is printed within this context."""
    tqdm.set_lock(threading.RLock())  # its own is a system semaphore, which a killed process leaves behind
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


# --- In the child -----------------------------------------------------------------------------------------------------


def child(script: str, flags: dict, seen):
    """A run of train.py or adapt.py. seen: three numbers shared with the parent: what the run is doing, the last saved
    step, and whether a saved step was done again."""
    import adapt
    import train
    from plumbing import folders, run, tasks

    module = {"train": train, "adapt": adapt}[script]
    noted(module, "write_json", SAVING, seen)
    if script == "adapt":
        for name in ("evaluate_tasks", "all_scores"):
            noted(adapt, name, SCORING, seen, after=STEPS)
        noted(adapt, "save_trained", SAVING, seen)
        noted(tasks, "write_json", SAVING, seen)
        noted(adapt, "of_split", SCORING, seen, after=SCORING)
    else:
        noted(train, "train_steps", STEPS, seen, after=SCORING)
        noted(train, "save_run", SAVING, seen)
        run.save_checkpoint = counted(run.save_checkpoint, seen)
        noted(run, "save_checkpoint", SAVING, seen)
        train.remove_checkpoint = folders.remove_checkpoint = put_aside(folders.remove_checkpoint)
    with quiet():
        module.main(flags)


def noted(module, name: str, phase: int, seen, after: int | None = None):
    """While module.name() runs, seen[0] is `phase`; afterwards it is `after`, or what it was before."""
    real = getattr(module, name)

    def noting(*args, **kwargs):
        before, seen[0] = seen[0], phase
        try:
            return real(*args, **kwargs)
        finally:
            seen[0] = before if after is None else after

    setattr(module, name, noting)


def counted(save: Callable, seen) -> Callable:
    """`save_checkpoint`, but it notes the step, and whether that was saved before."""

    def counting(path, tensors, optimizer, progress, *args):
        seen[2] |= progress.step <= seen[1]
        save(path, tensors, optimizer, progress, *args)
        seen[1] = progress.step

    return counting


def put_aside(remove: Callable) -> Callable:
    """`remove_checkpoint`, but it renames the checkpoint."""
    from plumbing.folders import CHECKPOINT

    def renaming(folder: Path):
        with contextlib.suppress(FileNotFoundError):
            os.replace(folder / CHECKPOINT, folder.with_name(folder.name + LAST))
        remove(folder)

    return renaming


# --- Comparing --------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict:
    """{file: all of it that two equal runs share}: without what is measured, who made it, and the folder's name."""
    files, measured = {}, dict.fromkeys(("seconds", "peak_memory_gb", "examples_per_second", "output_dir"), 0)
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "provenance.json"):
        if path.suffix == ".jsonl":
            content = [json.loads(line) | {"seconds": 0} for line in path.read_text().splitlines()]
        elif path.suffix == ".json":
            content = json.loads(path.read_text()) | measured
        else:
            content = path.read_bytes()
        files[str(path.relative_to(folder))] = content
    last = folder.with_name(folder.name + LAST)
    return files | (checkpoint(last) if last.exists() else {})


def checkpoint(path: Path) -> dict:
    """{entry of a checkpoint: its type, shape and bytes}, and its JSON without the seconds, with `trained` as a set."""
    from inject import read_tensors

    tensors, metadata = read_tensors(path)
    entries = {f"checkpoint: {k}": (x.dtype, x.shape, x.numpy().tobytes()) for k, x in tensors.items()}
    state = json.loads(metadata["state"])
    return entries | {"checkpoint: state": state | {"seconds": 0, "trained": set(state["trained"])}}


def differences(folder: Path, reference: dict) -> list[str]:
    """The files and entries of a finished run that differ from a reference, the `contents` of another one."""
    ours = contents(folder)
    return [name for name in sorted(ours.keys() | reference.keys()) if ours.get(name) != reference.get(name)]


# --- Killing ----------------------------------------------------------------------------------------------------------


def half_files(folder: Path) -> int:
    """When the newest half-written file was last changed; 0 if there is none. Ours are NAME.tmp, those of safetensors
    .tmp and six letters."""
    return max((path.stat().st_mtime_ns for path in folder.rglob("*.tmp*")), default=0)


class Killer:
    """Starts runs in a folder, kills them and compares them.

    counts: {(script, a phase, "half files" or "runs"): number}.
    """

    def __init__(self, folder: Path, seed: int):
        os.environ["OMP_NUM_THREADS"] = "1"
        self.folder, self.chance, self.counts, self.done = folder, random.Random(seed), Counter(), 0
        self.context = multiprocessing.get_context("forkserver")  # children fork from a process that has the imports
        self.context.set_forkserver_preload(["train", "adapt"])
        pretraining = RUN | dict(backbone=small_backbone(folder / "backbone"))
        self.flags = {"train": pretraining, "adapt": FEW | dict(checkpoint=str(folder / "train"))}
        self.times, self.reference = {}, {}
        idle = self.context.Process(target=int)  # wait for the imports
        idle.start()
        idle.join()
        for script in ("train", "adapt"):
            self.times[script] = self.whole_run(script, folder / script)
            self.reference[script] = contents(folder / script)
        self.rest = {script: rest for script, (_, rest) in self.times.items()}

    def start(self, script: str, folder: Path, seen):
        flags = self.flags[script] | dict(output_dir=str(folder), resume=True)
        process = self.context.Process(target=child, args=(script, flags, seen))
        process.start()
        return process

    def whole_run(self, script: str, folder: Path) -> tuple[float, float]:
        """An uninterrupted run: (seconds until its loop begins, seconds from there to its end)."""
        seen, start = self.context.RawArray("i", 3), time.monotonic()
        process = self.start(script, folder, seen)
        self.wait_for(process, seen, (STEPS, SCORING))
        loop = time.monotonic()
        process.join()
        if process.exitcode:
            raise SystemExit(f"error: an uninterrupted run of {script}.py ended with {process.exitcode}: {folder}")
        return loop - start, time.monotonic() - loop

    def wait_for(self, process, seen, phases: tuple[int, ...]):
        """Wait until the run is in one of these phases, or over."""
        while seen[0] not in phases and process.is_alive():
            time.sleep(0.0005)

    def kill(self, script: str, folder: Path, seen, left: float) -> bool:
        """Start or resume a run, of which the share `left` is still to do, and kill it at a random moment. Returns
        whether it was still running."""
        left = max(0.3, left)  # after the last step there is still scoring
        seen[0], half = LOADING, half_files(folder)
        process, loop = self.start(script, folder, seen), None
        if self.chance.random() < 0.1:
            process.join(self.chance.uniform(0, self.times[script][0] + self.rest[script]))
        else:
            self.wait_for(process, seen, (STEPS, SAVING, SCORING))
            loop, a_save = time.monotonic(), self.chance.random() < 0.3
            process.join(self.chance.uniform(0, self.rest[script] * left * (0.5 if a_save else 1)))
            if a_save:
                self.wait_for(process, seen, (SAVING,))
                time.sleep(self.chance.uniform(0, 0.005))
        alive, now = process.is_alive(), time.monotonic()
        process.kill()
        process.join()
        if process.exitcode not in (0, -signal.SIGKILL):
            raise SystemExit(f"error: after {self.done} kills the run {folder} ended with {process.exitcode}")
        if not alive or process.exitcode == 0:
            if loop:  # the machine may be faster now, or slower
                self.rest[script] = (self.rest[script] + (now - loop) / left) / 2
            return False
        self.counts[script, PHASES[seen[0]]] += 1
        self.counts[script, "half files"] += half_files(folder) > half
        return True

    def one_run(self, script: str, number: int, wanted: int, bar: tqdm):
        """Kill a run until it is over or `wanted` kills are done; then let it finish, and compare it."""
        folder, seen, stamps = self.folder / f"{script}-{number}", self.context.RawArray("i", 3), {}
        while self.done < wanted:
            done = len(stamps) / 4 if script == "adapt" else seen[1] / RUN["steps"]
            if not self.kill(script, folder, seen, 1 - done):
                break
            for path in folder.glob("*/*.json"):  # adapt.py: the tasks that are done
                stamps.setdefault(path, path.stat().st_mtime_ns)
            self.done += 1
            bar.update()
            if bar.disable and self.done % 25 == 0:
                print(f"{self.done} kills; finished runs, all equal: {number}", flush=True)
        process = self.start(script, folder, seen)  # if it was over, there is nothing to do
        process.join()
        odd = [f"exit code {process.exitcode}"] if process.exitcode else differences(folder, self.reference[script])
        odd += ["a saved step was done again"] * seen[2]
        odd += [f"{path} was made again" for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp]
        if odd:
            raise SystemExit(f"error: after {self.done} kills {folder} differs from an uninterrupted run: {odd[0]}")
        self.counts[script, "runs"] += 1
        shutil.rmtree(folder)
        folder.with_name(folder.name + LAST).unlink(missing_ok=True)


def kills(wanted: int, seed: int) -> str:
    """Kill runs until `wanted` kills are done; returns the table. Ends the program, and leaves the folder, if a run
    differs from an uninterrupted one."""
    folder = Path(tempfile.mkdtemp())
    killer = Killer(folder, seed)
    with tqdm(total=wanted, desc="kill", unit="kill", disable=None) as bar:
        number = 0
        while killer.done < wanted:
            killer.one_run("train" if number % 4 else "adapt", number, wanted, bar)
            number += 1
    shutil.rmtree(folder)
    if wanted >= 100 and not killer.counts["train", PHASES[SAVING]]:
        raise SystemExit(f"error: none of {wanted} kills fell in a save of train.py: they prove too little")
    lines = [("killed in", *PHASES, "in all", "half files left", "runs, all equal")]
    for script in ("train", "adapt"):
        fell = [killer.counts[script, phase] for phase in PHASES]
        numbers = [*fell, sum(fell), killer.counts[script, "half files"], killer.counts[script, "runs"]]
        lines.append((f"{script}.py", *map(str, numbers)))
    seconds = ", ".join(f"{script}.py {a:.1f} s to its loop, {b:.1f} s on" for script, (a, b) in killer.times.items())
    return aligned(lines, left=1) + f"\n{wanted} kills; an uninterrupted run: {seconds}"
