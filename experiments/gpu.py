"""What one CUDA GPU does with this code: is it right, and what does routing cost there?

    python -m experiments.gpu                          checks and times in at most 8 minutes, into results/gpu.md
    python -m experiments.gpu --only training recipe   some of the items
    python -m experiments.gpu --render                 the page again, from the numbers in results/gpu.json
    python -m experiments.gpu --device cpu             all of it at a tiny size; prints the page, --output keeps it

Every item (`gpu_items.py`) runs in a process of its own and is written down when it is done: one that fails, or Ctrl-C,
costs no other. They come in the order of importance, and what does not fit into --minutes is left out. All start at
once: on four cores one item after another is timed, while on the other cores graphs are compiled, which takes minutes.
(With fewer than eight cores they start one after another.) The exit code is 1 if an item failed or was wrong.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from experiments.methods import NAVIGATION
from plumbing.errors import UserError, exit_on_user_error
from plumbing.tables import aligned

ROOT = Path(__file__).resolve().parents[1]
FRONT, ENOUGH = 4, 8  # cores for what is timed; cores from which on others compile meanwhile


class Item(NamedTuple):
    seconds: int  # how long it may take on a GPU when its turn has come
    function: str  # in `gpu_items.py`
    options: dict = {}
    beside: bool = False  # its turn comes when it is ready, after minutes of compiling, and not before


ITEMS = {
    "machine": Item(30, "machine"),
    "correctness": Item(60, "correctness"),
    "deterministic": Item(80, "deterministic"),
    "training": Item(90, "training"),
    "recipe": Item(50, "recipe_step"),
    "strings": Item(15, "strings"),
    "compiled floor": Item(15, "compiled", dict(name="floor", whole=False), True),
    "compiled LoRA": Item(15, "compiled", dict(name="LoRA", whole=False), True),
    "compiled MHR": Item(15, "compiled", dict(name="MHR, 8 heads", whole=False), True),
    "command": Item(55, "command"),
    "adaptation": Item(30, "adaptation"),
    "generation": Item(40, "generation"),
    "computed": Item(15, "computed", {}, True),
    "compiled strings": Item(15, "strings", dict(compile=True), True),
    "compiled runs": Item(15, "deterministic", dict(compile=True), True),
    "whole floor": Item(20, "compiled", dict(name="floor", whole=True), True),
    "whole MHR": Item(20, "compiled", dict(name="MHR, 8 heads", whole=True), True),
    "whole LoRA": Item(20, "compiled", dict(name="LoRA", whole=True), True),
}


# --- Processes --------------------------------------------------------------------------------------------------------


class Child:
    """An item in a process of its own, on some of the cores."""

    def __init__(self, name: str, device: str, folder: Path, cores: set[int]):
        self.path, self.start = folder / f"{name.replace(' ', '-')}.json", time.monotonic()
        self.ready, self.log = self.path.with_suffix(".ready"), open(self.path.with_suffix(".log"), "w+")
        caches = dict(TORCHINDUCTOR_CACHE_DIR=f"{folder}/inductor", TRITON_CACHE_DIR=f"{folder}/triton")
        environment = os.environ | caches | dict(TORCHINDUCTOR_COMPILE_THREADS="4", HF_HUB_OFFLINE="1")
        if device == "cpu":
            environment |= dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")  # threads that wait spin
        item = ITEMS[name]
        command = [sys.executable, "-m", "experiments.gpu_items", item.function, device, self.path]
        self.process = subprocess.Popen(
            [*command, json.dumps(item.options)], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=self.log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        if cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self.process.pid, cores)

    def ended(self) -> bool:
        return self.process.poll() is not None

    def wait(self, until: float, ready: bool = False):
        """Wait until it has ended, or (ready) is ready for its turn, but not beyond a time."""
        while not (self.ended() or ready and self.ready.exists()) and time.monotonic() < until:
            time.sleep(0.02)

    def turn(self, seconds: float, until: float) -> dict:
        """Give it its turn, with so many seconds left, and return its record."""
        with suppress(OSError):  # it has ended
            self.process.stdin.write(f"{seconds}\n".encode())
            self.process.stdin.flush()
        self.wait(until)
        in_time, code = self.ended(), self.process.poll()
        self.end()
        record = json.loads(self.path.read_text()) if self.path.exists() else {}
        if not in_time:
            record |= {"state": "failed", "why": f"it was stopped after {time.monotonic() - self.start:.0f} s"}
        elif code or not record:
            record |= {"state": "failed", "why": f"its process ended with code {code}"}
        if record["state"] == "failed":
            self.log.seek(0)
            record["log"] = self.log.read()[-3000:]
        return record

    def end(self):
        """End it and all that it started."""
        with suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def play(names: list[str], device: str, minutes: float, note):
    """Run items; note(name, record) after each one. What does not fit into the minutes is left out."""
    end, pending, children = time.monotonic() + 60 * minutes, list(names), {}
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    together = device == "cuda" and len(cores) >= ENOUGH
    front, back = (set(cores[:FRONT]), set(cores[FRONT:])) if together else (set(), set())
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        start = lambda name: Child(name, device, Path(folder), back if ITEMS[name].beside else front)  # noqa: E731
        try:
            children = {name: start(name) for name in names} if together else {}
            while pending:
                left = end - time.monotonic()
                for name in [name for name in pending if ITEMS[name].seconds > left]:
                    note(name, left_out(name, left, children.get(name)))
                    pending.remove(name)
                if not (name := next_of(pending, children)):
                    time.sleep(0.05)
                    continue
                began = time.monotonic()
                child = children[name] = children.get(name) or start(name)
                patient = device == "cpu" or ITEMS[name].beside and not together  # it still has to compile
                until = end if patient else min(end, began + 2 * ITEMS[name].seconds)
                child.wait(until, ready=True)
                record = child.turn(end - time.monotonic(), until)
                pending.remove(name)
                note(name, record | {"took": time.monotonic() - began})
        finally:
            for child in children.values():
                child.end()


def next_of(pending: list[str], children: dict[str, Child]) -> str | None:
    """The item whose turn it is: the first one that does not prepare for its turn, or is ready for it."""
    for name in pending:
        child = children.get(name)
        if child is None or not ITEMS[name].beside or child.ended() or child.ready.exists():
            return name
    return None


def left_out(name: str, left: float, child: Child | None) -> dict:
    """The record of an item that does not fit into the time that is left."""
    why = f"it may take {ITEMS[name].seconds} s, and {max(0, left):.0f} s were left"
    if child:
        child.end()
        why = f"not ready after {time.monotonic() - child.start:.0f} s" if ITEMS[name].beside else why
    return {"state": "left out", "why": why}


# --- Numbers ----------------------------------------------------------------------------------------------------------


def results(raw: dict) -> dict[str, dict]:
    """{item: its result} of those that have one, also if they failed afterwards."""
    return {name: record["result"] for name, record in raw["items"].items() if "result" in record}


def ms(done: dict, item: str, name: str = "") -> float | None:
    """The median of an item's times, or of one of its contestants'; None if it was not measured."""
    seconds = done.get(item, {}).get("seconds", {})
    seconds = seconds.get(name) if name else seconds
    return 1000 * statistics.median(seconds) if seconds else None


def share(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def targets(done: dict) -> list[tuple[str, float | None, str, float, tuple[str, str]]]:
    """(what, value or None, <= or >=, limit, (item, contestant) whose profile shows why it is missed)."""
    graphs = "whole" if {"whole floor", "whole MHR"} <= done.keys() else "compiled"
    layers = done.get(f"{graphs} MHR", {}).get("layers", "?")
    within = f"{layers} + {layers} layers compiled"
    mhr, eager = ms(done, f"{graphs} MHR"), ms(done, "training", "MHR, 8 heads")
    busy = done.get(f"{graphs} MHR", {}).get("profile", {}).get("busy")
    poly = ms(done, "training", "PEFT Poly") if graphs == "whole" else None
    step, recipe = ("training", "MHR, 8 heads"), ("recipe", "MHR, 8 heads")
    return [
        ("MHR, 8 heads, beside LoRA", share(eager, ms(done, "training", "LoRA")), "<=", 1.15, step),
        (f"MHR beside the floor, {within}", share(mhr, ms(done, f"{graphs} floor")), "<=", 1.25, (f"{graphs} MHR", "")),
        ("PEFT's Poly beside MHR compiled, all layers", share(poly, mhr), ">=", 12, (f"{graphs} MHR", "")),
        (f"% of MHR's step in which the GPU is busy, {within}", busy and 100 * share(busy, mhr), ">=", 85,
         (f"{graphs} MHR", "")),
        ("T0's recipe on T5-XL beside the floor", share(ms(done, *recipe), ms(done, "recipe", "floor")), "<=", 1.3,
         recipe),
        ("ms of a step of `strings`", ms(done, "strings"), "<=", 8, ("strings", "")),
        ("ms of a step of `strings`, compiled", ms(done, "compiled strings"), "<=", 8, ("compiled strings", "")),
    ]  # fmt: skip


def met(value: float | None, sign: str, limit: float) -> str:
    if value is None:
        return "not measured"
    return "met" if (value <= limit if sign == "<=" else value >= limit) else "missed"


# --- The page ---------------------------------------------------------------------------------------------------------


def page(raw: dict) -> str:
    """gpu.md from the raw numbers."""
    done, on_gpu = results(raw), raw["device"] == "cuda"
    parts = [f"# On a GPU\n\n    {raw['command']}", prose(ABOUT if on_gpu else TINY + ABOUT)]
    if on_gpu:
        parts.append(f"## Targets\n\n{verdicts(done)}")
    for title, items, text_of in SECTIONS:
        if items & done.keys():
            parts.append(f"## {title}\n\n{text_of(done)}")
    if missing := [(name, r["state"], r["why"]) for name, r in raw["items"].items() if r["state"] != "done"]:
        parts.append("## Not done\n\n" + "\n".join(f"- {name}, {state}: {why}" for name, state, why in missing))
    missed = [(what, where) for what, *numbers, where in targets(done) if on_gpu and met(*numbers) == "missed"]
    for where in dict.fromkeys(where for _, where in missed):
        names = "; ".join(what for what, at in missed if at == where)
        parts.append(f"## Why a target is missed: {names}\n\n{why_missed(done, *where)}")
    about = done.get("machine", {}).get("line", "an unknown machine")
    return "\n\n".join([*parts, prose(f"{about}; {raw['seconds']:.0f} s in all.")]) + "\n"


def verdicts(done: dict) -> str:
    lines = [("", "", "", "target", "")]
    for what, value, sign, limit, _ in targets(done):
        lines.append((what, number(value), sign, f"{limit:g}", met(value, sign, limit)))
    return table(lines)


def prose(text: str) -> str:
    return textwrap.fill(text, 120, break_on_hyphens=False, break_long_words=False)


def table(lines: list[tuple[str, ...]]) -> str:
    return textwrap.indent(aligned(lines, left=1), "    ")


def number(value: float | None) -> str:
    """Three digits or more; nothing for what was not measured."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


COSTS = ("ms", "/ floor", "GPU busy, ms", "%", "kernels")


def costs(mine: float | None, floor: float | None, profile: dict) -> tuple[str, ...]:
    """The cells of COSTS."""
    busy = profile.get("busy")
    numbers = (mine, share(mine, floor), busy, busy and 100 * share(busy, mine), profile.get("kernels"))
    return tuple(map(number, numbers))


def contest(done: dict, item: str) -> str:
    """The table of an item whose times are of several contestants, and what was not measured."""
    result, computed = done[item], done.get("computed", {}).get(item, {})
    peaks = result.get("peak", {})
    lines = [("", *COSTS, "peak MB", "computed MB")]
    for name in result["seconds"]:
        cells = costs(ms(done, item, name), ms(done, item, "floor"), result.get("profile", {}).get(name, {}))
        lines.append((name, *cells, number(peaks.get(name)), number(computed.get(name))))
    return "\n\n".join([table(lines), *(f"{name} is missing: {why}." for name, why in result.get("lost", {}).items())])


def compiled(done: dict) -> str:
    lines = [("", "layers", *COSTS, "peak MB", "seconds to compile")]
    for kind in ("compiled", "whole"):
        for name in ("floor", "LoRA", "MHR"):
            if result := done.get(f"{kind} {name}"):
                cells = costs(ms(done, f"{kind} {name}"), ms(done, f"{kind} floor"), result.get("profile", {}))
                layers = f"{result['layers']} + {result['layers']}"
                lines.append((name, layers, *cells, number(result.get("peak")), number(result["compiling"])))
    return table(lines)


def strings(done: dict) -> str:
    lines = [("", *COSTS, "seconds before the first of them")]
    for item in ("strings", "compiled strings"):
        if item in done:
            cells = costs(ms(done, item), None, done[item].get("profile", {}))
            lines.append((item, *cells, number(done[item].get("before"))))
    return table(lines)


def correctness(done: dict) -> str:
    lines = [("", "tasks", "float64: outputs", "gradients", "float32: outputs", "gradients", "bf16: loss", "gradients")]
    for line in done["correctness"]["lines"]:
        numbers = (*line["float64"], *line["float32"], *line.get("bf16", ()))
        cells = [f"{x:.1e}" for x in numbers] + [""] * (6 - len(numbers))
        lines.append((f"{line['adapter']}, {line['model']}", str(line["tasks"]), *cells))
    told = (f"{what}: {'yes' if yes else 'NO'}" for what, yes in done["correctness"]["injection"].items())
    meaning = (
        "The largest difference to the CPU in float64, relative to the largest value (both models normalise in "
        "float32); of bfloat16 to float32, all gradients together."
    )
    injected = f"Adapters put in before the model moves to the device, and after: {', '.join(told)}."
    return f"{prose(meaning)}\n\n{table(lines)}\n\n{prose(injected)}"


def bits(done: dict) -> str:
    lines = [("", "again", "killed and resumed")]
    for item in ("deterministic", "compiled runs"):
        if item in done:
            lines.append((item, *("same bits" if yes else "other bits" for yes in done[item]["same"].values())))
    return table(lines)


def generation(done: dict) -> str:
    equal, other = (done["generation"][key] for key in ("equal", "other"))
    same = f"Mixtures that are kept give {'the same' if equal else 'OTHER'} tokens"
    return f"{contest(done, 'generation')}\n\n{same}; the bare backbone gives {'others' if other else 'the same'}."


def command(done: dict) -> str:
    run = done["command"]
    return prose(
        f"`python train.py --method mhr --heads 8 --dataset t0 --data-dir assets/samples/t0 --backbone FOLDER --steps "
        f"{run['steps']}`, FOLDER a random model as wide as T5-XL with {run['layers']} + {run['layers']} layers: loss "
        f"{run['loss']:.2f}, {run['seconds']:.1f} s of training, {run['in all']:.0f} s in all."
    )


def why_missed(done: dict, item: str, name: str) -> str:
    """What there was most of in a step: kernels by their time, and torch's operators by their number."""
    profile = done[item].get("profile", {})
    profile = profile.get(name, {}) if name else profile
    if "top" not in profile:
        return f"There is no profile: {profile.get('why', 'it was not made')}."
    kernels = [("kernel", "ms", "number")]
    kernels += [(re.sub(r"\s+", " ", what)[:90], f"{time:.2f}", f"{count:.0f}") for what, time, count in profile["top"]]
    operators = [("operator", "number"), *((what[:90], f"{count:.0f}") for what, count in profile["operators"])]
    return f"{table(kernels)}\n\n{table(operators)}"


TINY = """\
On a CPU and with tiny models: this shows that everything runs, no more. Kernels are operations that torch dispatches,
without views. """
ABOUT = """\
Steps of T5 v1.1 with random weights, without dropout, in bfloat16: large, 16 examples of 256 and 64 tokens; for one
task, 8 examples; XL, 8 examples. LoRA of rank 1 on all linear layers, 8 skills, 313 tasks, of which a batch has as many
as examples. A step is forward, as in `train.py`, backward and fused AdamW (T0's recipe: clipping and Adafactor). The
floor is the frozen backbone with the gradient of its activations; of generation, the bare backbone. Times are medians
by the clock. GPU busy: in which a kernel or a copy ran, by torch's profiler, in two further steps; it is compared with
the time by the clock. Peak: what a contestant adds to the memory in use. Contestants of a table are timed in turn, but
compiled ones one after another; meanwhile other cores compile, if there are eight or more."""
SECTIONS = [  # (title, its items, what makes its text)
    ("A training step of T5-large, mixed tasks", {"training"}, lambda done: contest(done, "training")),
    ("Compiled", {f"{kind} {name}" for kind in ("compiled", "whole") for name in ("floor", "LoRA", "MHR")}, compiled),
    ("T0's recipe on T5-XL", {"recipe"}, lambda done: contest(done, "recipe")),
    ("A training step of T5-large, one task", {"adaptation"}, lambda done: contest(done, "adaptation")),
    ("Generation", {"generation"}, generation),
    ("`strings`", {"strings", "compiled strings"}, strings),
    ("The README's command for T0", {"command"}, command),
    ("The same bits", {"deterministic", "compiled runs"}, bits),
    ("Beside the CPU", {"correctness"}, correctness),
]


# --- The command ------------------------------------------------------------------------------------------------------


def chosen(words: list[str]) -> list[str]:
    """The items that --only names, by their names or first words; all if there are none. UserError for another word."""
    for word in words:
        if not any(word in (name, name.split()[0]) for name in ITEMS):
            raise UserError(
                f"--only {word} is no item: choose from {', '.join(dict.fromkeys(n.split()[0] for n in ITEMS))}"
            )
    return [name for name in ITEMS if not words or name == "machine" or {name, name.split()[0]} & set(words)]


def save(raw: dict, folder: Path):
    """Write both files, each whole or not at all; the numbers first."""
    folder.mkdir(parents=True, exist_ok=True)
    back = NAVIGATION if folder.resolve() == ROOT / "results" else ""
    for name, text_of in (("gpu.json", lambda: json.dumps(raw, indent=1) + "\n"), ("gpu.md", lambda: back + page(raw))):
        (folder / f"{name}.tmp").write_text(text_of())
        os.replace(folder / f"{name}.tmp", folder / name)


def run(args, folder: Path | None) -> dict:
    """Run the items; returns the raw numbers. They are saved after each item."""
    command = f"python -m experiments.gpu {' '.join(sys.argv[1:])}".strip()
    raw, start = {"command": command, "device": args.device, "seconds": 0.0, "items": {}}, time.monotonic()

    def note(name: str, record: dict):
        raw["items"][name], raw["seconds"] = record, time.monotonic() - start
        why = f": {record['why']}" if "why" in record else ""
        print(f"{raw['seconds']:5.0f} s  {name}, {record['state']}{why}", flush=True)
        if folder:
            try:
                save(raw, folder)
            except Exception as error:  # a page that cannot be made costs no numbers
                print(f"{folder} cannot be written: {error!r}", flush=True)

    play(chosen(args.only), args.device, args.minutes, note)
    return raw


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="+", default=[], metavar="ITEM", help=", ".join(ITEMS))
    parser.add_argument("--minutes", type=float, default=8, help="in all; what does not fit is left out")
    parser.add_argument(
        "--output", metavar="DIR", help="where gpu.json and gpu.md go; none: results/, on a CPU nowhere"
    )
    parser.add_argument("--render", action="store_true", help="make gpu.md again from gpu.json")
    args = parser.parse_args()
    folder = Path(args.output) if args.output else None if args.device == "cpu" else ROOT / "results"
    if args.render:
        source = folder or ROOT / "results"
        save(json.loads((source / "gpu.json").read_text()), source)
        return
    chosen(args.only)
    if args.device == "cuda":
        import torch  # here: it takes seconds

        if not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no CUDA GPU here; --device cpu runs all of it at a tiny size")
    raw = run(args, folder)
    print(f"\n{page(raw)}" if folder is None else f"{folder / 'gpu.md'} and {folder / 'gpu.json'} are written")
    if any(record["state"] in ("failed", "wrong") for record in raw["items"].values()):
        sys.exit(1)


if __name__ == "__main__":
    exit_on_user_error(main)
