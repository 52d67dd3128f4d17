"""What runs and readers survive: kills at random moments, and mutated files and command lines.

    python -m tests.stress.faults --kills 500            runs, killed that often by SIGKILL: tests/stress/kills.py
    python -m tests.stress.faults --mutations 100000     files of benchmarks (`strings` reads none), runs, backbones,
                                                         PEFT and the authors' code, and command lines

A mutation makes one to four random changes to a good file or command line; then it is read. The reader must accept it,
or refuse it in one sentence (UserError, RunError or OSError), within 20 seconds. Anything else is bad. Also bad is

  * an adapter or a checkpoint that is accepted but is not what was written: these files have a digest;
  * a benchmark file that is accepted with another number of examples than it has lines (superni: instances). "rows": a
    letter becomes another one, or a quote, NUL, CR, ... comes into a line; the number of examples must not change;
  * a file that is refused, but has changed the model or the optimiser;
  * a reader that changes, removes or leaves behind a file.

The digest would catch every change to an adapter or a checkpoint. So "signed ..." changes the tensors, or the text
beside them, and signs the file again.

A separate process reads; if it hangs or dies, another one takes its place. --bad-dir gets a text file for each bad
mutation, named by its number, and the exit code is then 1. --first NUMBER continues from there; with --mutations 1 it
repeats that one.
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
from plumbing.tables import aligned
from tests.stress.kills import kills, quiet

LIMIT, START = 20, 300  # seconds that a reader, and the start of its process, may take
MEMORY = 12 << 30  # bytes of address space that a reader may take


# --- The process that reads, and the one that watches it --------------------------------------------------------------


def work(connection, folder: Path, seed: int, first: int, last: int):
    """Do the mutations first .. last - 1. Sends the names of the targets, then for each mutation the name of its target
    and (outcome, message)."""
    os.environ |= {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # it would describe every backbone that does not fit
    from plumbing.errors import RunError, UserError
    from tests.stress.targets import targets  # here: these imports read the environment

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that watches
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    root = folder / "a" / "b"  # so that writing to ../../x stays within the folder
    root.mkdir(parents=True)
    os.chdir(root)
    every = targets(root)
    connection.send(list(every))
    shares = [share for share, _ in every.values()]
    for number in range(first, last):
        chance = random.Random(f"{seed} {number}")  # a mutation does not depend on those before it
        name = chance.choices(list(every), shares)[0]
        connection.send(name)
        with quiet():
            try:
                every[name][1](chance)
                outcome, message = "read", ""
            except (UserError, RunError, OSError) as error:  # which `exit_on_user_error` turns into one line
                outcome, message = "refused", str(error)
            except Exception as error:  # the bad ones
                outcome, message = type(error).__name__, str(error)
        connection.send((outcome, message))


def outcomes(folder: Path, seed: int, first: int, last: int) -> Iterator[tuple[int, str, str, str, float]]:
    """(number, target, outcome, message, seconds) of each mutation. The first item is number -1, with the names of all
    targets. A process that hangs is killed, and another one takes its place."""
    context, number, named = multiprocessing.get_context("spawn"), first, False
    while number < last:
        ours, theirs = context.Pipe()
        place = Path(tempfile.mkdtemp(dir=folder))
        process = context.Process(target=work, args=(theirs, place, seed, number, last), daemon=True)
        process.start()
        theirs.close()
        name = ""
        try:
            if not ours.poll(START):
                raise SystemExit(f"error: the process that reads has not started after {START} seconds")
            names = ours.recv()
            if not named:
                yield -1, names, "", "", 0.0
                named = True
            while number < last:
                name, start = "", time.monotonic()
                name = ours.recv()
                outcome, message = ours.recv() if ours.poll(LIMIT) else ("hang", f"no answer in {LIMIT} seconds")
                yield number, name, outcome, message, time.monotonic() - start
                number += 1
                if outcome == "hang":
                    break
        except EOFError:  # it has died
            process.join()
            if not name:
                raise SystemExit(f"error: the process that reads ended with {process.exitcode}") from None
            yield number, name, "died", f"exit code {process.exitcode}", time.monotonic() - start
            number += 1
        finally:
            process.kill()
            process.join()
            shutil.rmtree(place, ignore_errors=True)


def mutations(wanted: int, seed: int, bad_dir: Path, first: int = 0) -> str:
    """Mutate and read `wanted` times, from number `first` on. Returns the table; bad_dir gets what is bad."""
    counts, spent, names, done, bad = Counter(), Counter(), [], 0, 0
    with tempfile.TemporaryDirectory() as folder, tqdm(total=wanted, desc="mutate", unit="file", disable=None) as bar:
        try:
            for number, name, outcome, message, seconds in outcomes(Path(folder), seed, first, first + wanted):
                if number < 0:
                    names = name
                    continue
                counts[name, outcome] += 1
                spent[name] += seconds
                done += 1
                bar.update()
                if outcome not in ("read", "refused"):
                    bad += 1
                    bad_dir.mkdir(parents=True, exist_ok=True)
                    (bad_dir / f"{number}.txt").write_text(f"{name}: {outcome}: {message}\n")
                if bar.disable and done % max(100, wanted // 50) == 0:
                    print(f"{done:,} of {wanted:,} mutations, {bad} bad, {sum(spent.values()):.0f} s", flush=True)
        except KeyboardInterrupt:
            print(f"stopped: --first {first + done} continues from here", flush=True)
    kinds = ["read", "refused", *sorted({o for _, o in counts} - {"read", "refused"})]
    lines = [("", *kinds, "ms each")]
    for name in names:
        each = 1000 * spent[name] / max(1, sum(counts[name, o] for o in kinds))
        lines.append((name, *(f"{counts[name, o]:,}" for o in kinds), f"{each:.0f}"))
    lines.append(("in all", *(f"{sum(counts[name, o] for name in names):,}" for o in kinds), ""))
    return aligned(lines, left=1) + f"\n{done:,} mutations, {bad} bad"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=0, help="how many", metavar="NUMBER")
    parser.add_argument("--mutations", type=int, default=0, help="how many", metavar="NUMBER")
    parser.add_argument("--seed", type=int, default=0, help="of both")
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation", metavar="NUMBER")
    parser.add_argument("--bad-dir", type=Path, default=Path("runs/faults"), help="for a file on each bad mutation")
    args = parser.parse_args()
    if negative := [name for name in ("kills", "mutations", "first") if getattr(args, name) < 0]:
        parser.error(f"--{negative[0]} must not be negative")
    if not args.kills and not args.mutations:
        parser.error("give --kills NUMBER, --mutations NUMBER or both")
    if args.mutations:
        try:  # before hours of work
            args.bad_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--bad-dir {args.bad_dir} cannot be made: {error.strerror}")
    if args.kills:
        print(kills(args.kills, args.seed), flush=True)
    if args.mutations:
        table = mutations(args.mutations, args.seed, args.bad_dir, args.first)
        print(table)
        sys.exit(not table.endswith(" 0 bad"))


if __name__ == "__main__":
    exit_on_user_error(main)
