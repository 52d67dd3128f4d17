"""What runs and readers survive: kills at random moments, and mutated files and command lines.

    python -m tests.stress.faults --kills 500            runs, cut off that often by SIGKILL: see tests/stress/kills.py
    python -m tests.stress.faults --mutations 100000     files of the benchmarks (`strings` reads none), of runs, of
                                                        backbones, PEFT's and the authors' files, command lines

Mutations: a good file (or command line) gets one to four random changes, then it is read. Each must be read, or refused
by one sentence (a UserError, RunError or OSError), within 20 seconds; anything else is bad. So is

  * what is read from a file with a digest (adapter, checkpoint), if it is not what was written;
  * another number of examples than the changed file of a benchmark has lines (instances, for superni). "rows": one
    letter becomes another, or a quote, NUL, CR, ... comes into a line: then there must be as many as before;
  * a model or an optimiser that is changed by a file that is refused;
  * a file that a reader changed, left behind or removed.

A digest would catch every change to an adapter or a checkpoint, so for "signed ..." the tensors or the text beside them
are changed, and the file is signed anew.

The reading is done in a process of its own, which is killed and replaced if it does not answer. What is bad is told in
--keep, a file for each number, and the exit code is 1. --first NUMBER goes on from there; with --mutations 1 it does
that one again.
"""

import argparse
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from plumbing.errors import exit_on_user_error
from tests.stress.kills import kills, quiet

ROOT = Path(__file__).resolve().parents[2]
LIMIT, START = 20, 300  # seconds that a reader, and the start of its process, may take
MEMORY = 12 << 30  # bytes of address space that a reader may take


# --- The process that reads, and the one that watches it --------------------------------------------------------------


def work(connection, folder: Path, seed: int, first: int, last: int):
    """Do the mutations first .. last - 1. Sends the names of the targets, then for each mutation its target's name and
    (outcome, what was said)."""
    os.environ |= {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # it would describe every backbone that does not fit
    sys.path.insert(0, str(ROOT))
    from plumbing.errors import RunError, UserError
    from tests.stress.targets import targets  # here: what is imported reads the environment

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that watches
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    root = folder / "a" / "b"  # what is written to ../../x is seen
    root.mkdir(parents=True)
    os.chdir(root)
    every = targets(root)
    connection.send(list(every))
    weights = [share for share, _ in every.values()]
    for number in range(first, last):
        chance = random.Random(f"{seed} {number}")  # a mutation is the same whatever comes before
        name = chance.choices(list(every), weights)[0]
        connection.send(name)
        with quiet():
            try:
                every[name][1](chance)
                outcome, said = "read", ""
            except (UserError, RunError, OSError) as error:  # for which `config.exit_on_user_error` has one line
                outcome, said = "refused", str(error)
            except Exception as error:  # what is counted here
                outcome, said = type(error).__name__, str(error)
        connection.send((outcome, said))


def outcomes(folder: Path, seed: int, first: int, last: int) -> Iterator[tuple[int, str, str, str, float]]:
    """(number, target, outcome, what was said, seconds) of each mutation. A process that hangs is killed, and another
    one takes its place; the first thing yielded are the names of the targets, as target of number -1."""
    context, number, known = multiprocessing.get_context("spawn"), first, False
    while number < last:
        ours, theirs = context.Pipe()
        place = Path(tempfile.mkdtemp(dir=folder))
        process = context.Process(target=work, args=(theirs, place, seed, number, last), daemon=True)
        process.start()
        theirs.close()
        name = ""
        try:
            if not ours.poll(START):
                raise SystemExit(f"error: the process that reads has not begun after {START} seconds")
            names = ours.recv()
            if not known:
                yield -1, names, "", "", 0.0
                known = True
            while number < last:
                name, begin = "", time.monotonic()
                name = ours.recv()
                outcome, said = ours.recv() if ours.poll(LIMIT) else ("hang", f"no answer in {LIMIT} seconds")
                yield number, name, outcome, said, time.monotonic() - begin
                number += 1
                if outcome == "hang":
                    break
        except EOFError:  # it has died
            process.join()
            if not name:
                raise SystemExit(f"error: the process that reads ended with {process.exitcode}") from None
            yield number, name, "died", f"exit code {process.exitcode}", time.monotonic() - begin
            number += 1
        finally:
            process.kill()
            process.join()
            shutil.rmtree(place, ignore_errors=True)


def mutations(wanted: int, seed: int, keep: Path, first: int = 0) -> str:
    """Mutate and read `wanted` times, from number `first` on; the table for the results. What is bad is kept."""
    from plumbing.tables import aligned

    counts, spent, names, done, bad = Counter(), Counter(), [], 0, 0
    with tempfile.TemporaryDirectory() as folder, tqdm(total=wanted, desc="mutate", unit="file", disable=None) as bar:
        try:
            for number, name, outcome, said, seconds in outcomes(Path(folder), seed, first, first + wanted):
                if number < 0:
                    names = name
                    continue
                counts[name, outcome] += 1
                spent[name] += seconds
                done += 1
                bar.update()
                if outcome not in ("read", "refused"):
                    bad += 1
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{number}.txt").write_text(f"{name}: {outcome}: {said}\n")
                if bar.disable and done % max(100, wanted // 50) == 0:
                    print(f"{done:,} of {wanted:,} mutations, {bad} bad, {sum(spent.values()):.0f} s", flush=True)
        except KeyboardInterrupt:
            print(f"stopped: --first {first + done} goes on from here", flush=True)
    kinds = ["read", "refused", *sorted({o for _, o in counts} - {"read", "refused"})]
    lines = [("", *kinds, "ms each")]
    for name in names:
        each = 1000 * spent[name] / max(1, sum(counts[name, o] for o in kinds))
        lines.append((name, *(f"{counts[name, o]:,}" for o in kinds), f"{each:.0f}"))
    lines.append(("in all", *(f"{sum(counts[name, o] for name in names):,}" for o in kinds), ""))
    return aligned(lines, left=1) + f"\n{done:,} mutations, {bad} bad"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--mutations", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation")
    parser.add_argument("--keep", type=Path, default=Path("runs/faults"), help="where what is bad is described")
    args = parser.parse_args()
    if negative := [name for name in ("kills", "mutations", "first") if getattr(args, name) < 0]:
        parser.error(f"--{negative[0]} must not be negative")
    if not args.kills and not args.mutations:
        parser.error("give --kills NUMBER, --mutations NUMBER or both")
    if args.mutations:
        try:  # before hours of work
            args.keep.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--keep {args.keep} cannot be made: {error.strerror}")
    if args.kills:
        print(kills(args.kills, args.seed), flush=True)
    if args.mutations:
        table = mutations(args.mutations, args.seed, args.keep, args.first)
        print(table)
        sys.exit(not table.endswith(" 0 bad"))


if __name__ == "__main__":
    exit_on_user_error(main)
