"""What runs and readers survive: kills at random moments, and mutated files and command lines.

    python -m experiments.faults --kills 500            a training run, cut off that often by SIGKILL
    python -m experiments.faults --mutations 100000     files of all benchmarks and of runs, the authors' files,
                                                        command lines

Kills: runs of 12 steps that save after each are started again and again with --resume, and killed at a random moment.
Every run that gets to its end is compared, to the bit, with one that was never killed.

Mutations: a good file (or command line) gets one to four random changes, then it is read. Each must be read, or refused
by one sentence (a UserError), within 20 seconds. Anything else is counted and kept in --keep, and the exit code is 1.
What is refused must leave the model and the optimiser as they were. A digest would catch every change to an adapter or
a checkpoint, so for "signed ..." the tensors or the text beside them are changed, and the file is signed anew. "rows":
one letter of a data file becomes another; what is read must have as many examples as before.
"""

import argparse
import contextlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "assets" / "samples"
RUN = dict(
    method="mhr", dataset="strings", rank=1, skills=2, steps=12, batch_size=4, max_input=8, max_output=4,
    eval_examples=1, log_every=5, save_every="1",
)  # fmt: skip
WORDS = [  # what breaks programs
    b"", b"0", b"-1", b"1e999", b"NaN", b"null", b"true", b"[]", b"{}", b'"', b"\\", b"\0", b"\n", b"\r\n", b"\t", b",",
    b"../../x", b"/etc/passwd", b"9" * 40, b"\xff\xfe", b"\xed\xa0\x80", "\u2028".encode(), "é".encode(), b"A" * 5000,
    b"[" * 2000,
]  # fmt: skip
ODD = [None, -1, 1e308, 10**30, "", "x", "../../x", [], {}, [1], True, 0, 0.5, {"a": 1}]  # and programs that read JSON


# --- Kills ------------------------------------------------------------------------------------------------------------


def kills(wanted: int, seed: int) -> str:
    """Kill runs until `wanted` kills are done; the sentence for the results. Ends the program if a run differs."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")  # each child is forked from a process that has imported all
    context.set_forkserver_preload(["train"])
    import train

    chance, done, finished = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as folder, tqdm(total=wanted, desc="kill", unit="kill", disable=None) as bar:
        length = 0.0
        while done < wanted:
            now = Path(folder) / str(finished)
            flags = RUN | dict(output_dir=str(now), resume=True)
            process, begin = context.Process(target=quietly, args=(train.main, flags)), time.monotonic()
            process.start()
            process.join(chance.uniform(0, 1.2 * length) if length else None)  # the first run is the one not killed
            if process.is_alive():
                process.kill()
                process.join()
                done += 1
                bar.update()
            elif process.exitcode or bits(now) != bits(Path(folder) / "0"):
                raise SystemExit(f"after {done} kills run {finished} ended with {process.exitcode} or differs: {now}")
            else:
                length = min(length or math.inf, time.monotonic() - begin)  # the first one waits for imports
                finished += 1
    return f"{done} kills over {finished} finished runs of {length:.1f} s, all equal to the one that nobody killed"


def bits(folder: Path) -> tuple:
    """What two equal runs have in common: the bytes of what was trained, the log and the scores without seconds."""
    log = [json.loads(line) | {"seconds": 0} for line in (folder / "log.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text()) | {"seconds": 0}
    return sorted(p.name for p in folder.iterdir()), (folder / "adapter.safetensors").read_bytes(), log, result


def quietly(main: Callable, flags: dict):
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a killed process leaves behind
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(flags)


# --- Mutations --------------------------------------------------------------------------------------------------------


def mutated(content: bytes, chance: random.Random) -> bytes:
    """One to four changes: bits, words, cuts, repeats, swapped lines."""
    for _ in range(chance.randint(1, 4)):
        a, b = sorted(chance.randrange(len(content) + 1) for _ in range(2))
        kind = chance.randrange(7)
        if kind == 0 and content:
            content = content[: a % len(content)] + bytes([chance.randrange(256)]) + content[a % len(content) + 1 :]
        elif kind == 1:
            content = content[:a] + chance.choice(WORDS) + content[a:]
        elif kind == 2:
            content = content[:a] + chance.choice(WORDS) + content[b:]
        elif kind == 3:
            content = content[:a]
        elif kind == 4:
            content = content[:a] + content[b:]
        elif kind == 5:
            content = content[:b] + content[a:]
        else:
            lines = content.split(b"\n")
            chance.shuffle(lines)
            content = b"\n".join(lines)
    return content


def mutated_word(content: bytes, chance: random.Random) -> bytes:
    """A JSON file with one value replaced, so that it stays JSON more often than by `mutated`."""
    try:
        found = json.loads(content)
        key = chance.choice(list(found))
        return json.dumps(found | {key: chance.choice(ODD)}).encode()
    except (ValueError, TypeError, IndexError):
        return mutated(content, chance)


def one_letter(content: bytes, chance: random.Random) -> bytes:
    """One ASCII letter becomes another one."""
    k = chance.choice([found.start() for found in re.finditer(rb"[A-Za-z]", content)])
    return content[:k] + bytes([chance.choice(b"abcdefghijklmnopqrstuvwxyz")]) + content[k + 1 :]


def odd_tensors(tensors: dict, chance: random.Random) -> dict:
    """One to three tensors are missing, renamed, of another type or shape, not finite, huge, or another one's."""
    import torch

    found, types = (
        dict(tensors),
        (torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.float8_e5m2),
    )
    for _ in range(chance.randint(1, 3)):
        name, kind = chance.choice(list(found)), chance.randrange(6)
        x = found.pop(name)
        if kind == 0:
            continue
        if kind == 1:
            name = chance.choice(["a", "optimizer.9.step", "optimizer.a", f"{name}.x"])
        elif kind == 2:
            x = x.to(chance.choice(types))
        elif kind == 3:
            x = chance.choice([x.flatten(), x[None], x.flatten()[:1], x.flatten()[:0]])
        elif kind == 4:
            x = torch.full(x.shape, chance.choice([math.nan, math.inf, 1e38, -1.0])).to(x.dtype)
        else:
            x = chance.choice(list(tensors.values()))
        found[name] = x.clone()
    return found


class Files:
    """Copies of files in a folder, of which one at a time is changed while something reads them."""

    def __init__(self, files: list[Path], read: Callable, change: Callable | None = None):
        self.files, self.read, self.change = [(path, path.read_bytes()) for path in files], read, change

    def __call__(self, chance: random.Random) -> bytes:
        path, content = chance.choice(self.files)
        change = mutated_word if path.suffix == ".json" and chance.random() < 0.5 else mutated
        new = (self.change or change)(content, chance)
        path.write_bytes(new)
        try:
            self.read()
        finally:
            path.write_bytes(content)
        return new


def signed(path: Path, load: Callable) -> Callable:
    """The tensors of a file of `inject.write_tensors`, or the text beside them, are changed and signed anew."""
    from inject import read_tensors, write_tensors

    content, (tensors, texts) = path.read_bytes(), read_tensors(str(path))
    del texts["sha256"]

    def one(chance: random.Random) -> bytes:
        if chance.random() < 0.7:
            write_tensors(odd_tensors(tensors, chance), str(path), **texts)
        else:
            name = chance.choice(list(texts))
            text = mutated_word(texts[name].encode(), chance).decode("utf-8", "replace")
            write_tensors(tensors, str(path), **texts | {name: text})
        new = path.read_bytes()
        try:
            load()
        finally:
            path.write_bytes(content)
        load()  # back from what was read
        return new

    return one


def as_many(read: Callable) -> Callable:
    """`read`, which counts examples: it must find as many as it finds now."""
    whole = read()

    def again():
        if (found := read()) != whole:
            raise AssertionError(f"{found} examples are read without a word, there are {whole}")

    return again


def targets(folder: Path) -> dict[str, tuple[float, Callable]]:
    """{name: (share of the mutations, function of a random.Random that mutates and reads)}"""
    import data

    for name in ("crossfit", "superni", "t0"):
        shutil.copytree(SAMPLES / name, folder / name)
    partition = json.loads((folder / "crossfit" / "random.json").read_text())
    few = {part: names[:2] for part, names in partition.items() if isinstance(names, list)}
    (folder / "crossfit" / "random.json").write_text(json.dumps(few))  # two tasks of each kind are enough to read

    def reader(name: str, split: str) -> Callable:
        def read() -> int:
            found = data.load(name, str(folder / name), split, ("train", "dev", "test"))
            parts = [p for task in found.train + found.dev + found.test for p in (task.train, task.dev, task.test)]
            return sum(1 for part in parts for k in range(len(part)) if part[k])

        return read

    crossfit = [p for t in sum(few.values(), []) for p in (folder / "crossfit" / t).glob("*_100_*.tsv")]
    superni, t0 = folder / "superni", [p for p in (folder / "t0").rglob("*") if p.suffix in (".jsonl", ".parquet")]
    sources = {  # split, share, files of examples, lists of tasks
        "crossfit": ("100", 0.1, crossfit, [folder / "crossfit" / "random.json"]),
        "superni": ("13", 0.05, list(superni.rglob("*.json")), list(superni.rglob("*.txt"))),
        "t0": ("42", 0.05, t0, []),
    }
    every = {}
    for name, (split, share, files, lists) in sources.items():
        read, texts = reader(name, split), [path for path in files if path.suffix != ".parquet"]
        every[name] = (share, Files([*files, *lists], read))
        every[f"{name} rows"] = (0.03, Files(texts, as_many(read), one_letter))
    return every | run_targets(folder / "run") | {"command line": (0.16, command_lines(folder / "run"))}


def run_targets(run: Path) -> dict[str, tuple[float, Callable]]:
    """The files of a run: adapter, checkpoint, config, and what evaluate.py --compare reads."""
    import torch

    import evaluate
    import export
    import resume
    import train
    from backbone import load_adapter_file
    from config import check_ranges, read_config

    flags = RUN | dict(backbone="tiny", output_dir=str(run))
    quietly(train.main, flags)
    model, _ = train.starting_point(train.make_config(**flags), [None] * 64, [])
    optimizer = train.make_optimizer(model, train.make_config(**flags))
    load_adapter_file(model, run / "adapter.safetensors")
    for p in resume.run_tensors(model).values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    resume.save_checkpoint(run / resume.CHECKPOINT, model, optimizer, resume.Progress(1))
    adapter, checkpoint, config = (run / n for n in ("adapter.safetensors", resume.CHECKPOINT, "config.json"))
    load_adapter = unchanged(lambda: load_adapter_file(model, adapter), model, optimizer)
    load_checkpoint = unchanged(lambda: resume.load_checkpoint(checkpoint, model, optimizer), model, optimizer)
    task = json.loads((run / "tasks.json").read_text())["tasks"][0]
    one = export.Config(checkpoint=str(run), task=task)
    return {
        "adapter": (0.05, Files([adapter], load_adapter)),
        "signed adapter": (0.1, signed(adapter, load_adapter)),
        "checkpoint": (0.05, Files([checkpoint], load_checkpoint)),
        "signed checkpoint": (0.1, signed(checkpoint, load_checkpoint)),
        "config.json": (0.1, Files([config], lambda: check_ranges(read_config(train.Config, config)))),
        "tasks.json": (0.02, Files([run / "tasks.json"], lambda: export.one_adapter(one))),
        "--compare": (0.1, Files([config, run / "result.json"], lambda: evaluate.compare((str(run),)))),
        "authors' file": (0.1, authors_file(model, run.with_name("authors"))),
    }


def unchanged(read: Callable, model, optimizer) -> Callable:
    """`read` a file; where that fails, model and optimiser must be as before."""
    import torch

    from resume import run_tensors

    def everything() -> dict:
        states = optimizer.state_dict()["state"].items()
        both = run_tensors(model) | {f"{k} {n}": x for k, own in states for n, x in own.items()}
        return {name: x.detach().clone() for name, x in both.items()}

    def run_it():
        before = everything()
        try:
            read()
        except Exception as error:
            now = everything()
            if now.keys() != before.keys() or not all(torch.equal(x, before[name]) for name, x in now.items()):
                raise AssertionError("it was refused, but something has changed") from error
            raise

    return run_it


def authors_file(model, folder: Path) -> Callable:
    """A checkpoint of the MHR authors' code with one entry replaced, or its bytes changed, which `export.py` imports.
    What it refuses must leave nothing behind."""
    import torch

    import export
    from config import UserError
    from inject import adapted_layers

    folder.mkdir()
    path, out = folder / "a.pt", folder / "run"
    blocks = {name: export.to_blocks(layer) for name, layer in adapted_layers(model).items()}
    state = {f"model.{n}.{export.AUTHORS[key]}": p.detach() for n, found in blocks.items() for key, p in found.items()}
    h, s, _, r = next(iter(blocks.values()))["A"].shape
    hyper = dict(model="tiny", dataset="t0", n_skills=s, n_splits=h, lora_rank=r, lora_alpha=1.0, lora_warmup=False)

    def one(chance: random.Random) -> bytes:
        parts, odd = {"state_dict": dict(state), "hyper_parameters": dict(hyper)}, chance.random() < 0.5
        if odd:
            part = parts[chance.choice(list(parts))]
            tensors = [torch.empty(0), torch.ones(1), torch.full((h, s, 16, r), math.nan), torch.ones(2, 2).bool()]
            part[chance.choice(list(part))] = chance.choice([*ODD, *tensors])
        buffer = io.BytesIO()
        torch.save(parts, buffer, _use_new_zipfile_serialization=chance.random() < 0.5)
        path.write_bytes(buffer.getvalue() if odd else mutated(buffer.getvalue(), chance))
        try:
            export.main(dict(checkpoint=str(path), output_dir=str(out), format="run"))
        except UserError as error:
            if out.exists():
                raise AssertionError("it was refused, but there is a run") from error
            raise
        finally:
            shutil.rmtree(out, ignore_errors=True)
        return path.read_bytes()

    return one


def command_lines(run: Path) -> Callable:
    """Flags of a script with changed names and values, read as the script does before it begins to work."""
    import adapt
    import config
    import evaluate
    import export
    import train

    train_line = "--method mhr --heads 8 --dataset strings --lr 0.01 --steps 5 --seed 1 --layers light --save-every 5"
    good = {  # script: its flags, and what it makes of them
        train: (train_line, lambda **flags: config.check_ranges(train.make_config(**flags))),
        adapt: (f"--checkpoint {run} --variant z --split 1 2 --tasks dev --steps 5 --shots 4 --lr 0.01 --resume",
                lambda **flags: config.check_ranges(adapt.make_config(**flags))),
        evaluate: ("--checkpoint runs/x --split 13 --beams 2 --zero-shot --test-examples 3",
                   lambda **flags: config.check_ranges(evaluate.Config(**flags))),
        export: (f"--checkpoint {run} --format peft --task mu --output-dir {run}/new",
                 lambda **flags: export.check(export.Config(**flags))),
    }  # fmt: skip

    def one(chance: random.Random) -> bytes:
        module = chance.choice(list(good))
        line, make = good[module]
        words = mutated(line.encode(), chance).decode("utf-8", "replace").replace("\0", "").split(" ")
        recipes = {train: config.PRETRAINING, adapt: config.FEW_SHOT}.get(module, {})
        try:
            make(**config.explicit_flags(module.Config, recipes, words))
        except SystemExit as stop:
            if stop.code not in (0, 2):
                raise AssertionError(f"exit code {stop.code}") from None
            raise config.UserError("refused by the parser") from None
        except OSError as error:  # for which `config.exit_on_user_error` has a sentence
            raise config.UserError(error.strerror) from None
        return " ".join(words).encode()

    return one


class Hang(BaseException):
    """A read that took too long."""


def mutations(wanted: int, seed: int, keep: Path) -> str:
    """Mutate and read `wanted` times; the table for the results. What is neither read nor refused is kept."""
    from config import UserError
    from evaluate import aligned

    def ring(*_):
        raise Hang

    signal.signal(signal.SIGALRM, ring)
    chance, counts, bad = random.Random(seed), Counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        every = targets(Path(folder))
        weights = [share for share, _ in every.values()]
        for number in tqdm(range(wanted), desc="mutate", unit="file", disable=None):
            name = chance.choices(list(every), weights)[0]
            one = random.Random(f"{seed} {number}")
            signal.alarm(20)
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    every[name][1](one)
                outcome = "read"
            except UserError as error:
                outcome = "refused" if "\n" not in str(error) else "refused in several lines"
            except (Exception, Hang) as error:
                outcome = type(error).__name__
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{number}.txt").write_text(f"{name}: {outcome}: {error}\n")
            signal.alarm(0)
            counts[name, outcome] += 1
            bad += outcome not in ("read", "refused")
    outcomes = ["read", "refused", *sorted({o for _, o in counts} - {"read", "refused"})]
    lines = [("", *outcomes), *((name, *(f"{counts[name, o]:,}" for o in outcomes)) for name in every)]
    return aligned(lines, left=1) + f"\n{wanted:,} mutations, {bad} neither read nor refused in one sentence"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--mutations", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("runs/faults"), help="where what went wrong is described")
    args = parser.parse_args()
    if args.kills:
        print(kills(args.kills, args.seed))
    if args.mutations:
        table = mutations(args.mutations, args.seed, args.keep)
        print(table)
        sys.exit(not table.endswith(" 0 neither read nor refused in one sentence"))


if __name__ == "__main__":
    main()
