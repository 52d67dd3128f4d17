"""What `faults.py` mutates, and what reads it.

A target is a function of a random.Random. It changes a file, or a command line, has it read, and puts the file back. It
raises what the reader raises, or AssertionError if the reader accepts something else than the file holds, or writes
anything.
"""

import contextlib
import io
import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import save_file

import adapt
import benchmarks
import evaluate
import inject
import train
from benchmarks.tables import datasets
from inject import adapted_layers, digest, read_tensors, write_tensors
from methods import load_adapter_file, load_run, names_of_skills, starting_point
from plumbing.backbones import advice_on_memory, load_backbone
from plumbing.checkpoint import Progress, load_checkpoint, marks_of_model, run_tensors, save_checkpoint
from plumbing.errors import RunError, UserError
from plumbing.flags import check_ranges, explicit_flags
from plumbing.folders import CHECKPOINT
from plumbing.run import truncate_log
from plumbing.tasks import TaskRun
from recipes import FEW_SHOT, PRETRAINING
from scoring import of_split
from tests.stress.kills import RUN, quiet, small_backbone
from tools import analyze, export, figures, layouts
from tools.compare import compare

SAMPLES = Path(__file__).resolve().parents[2] / "assets" / "samples"
WORDS = [  # what breaks programs
    b"", b"0", b"-1", b"1e999", b"NaN", b"null", b"true", b"[]", b"{}", b'"', b"\\", b"\0", b"\n", b"\r\n", b"\t", b",",
    b"../../x", b"/etc/passwd", b"9" * 40, b"\xff\xfe", b"\xed\xa0\x80", "\u2028".encode(), "é".encode(), b"A" * 5000,
    b"[" * 2000,
]  # fmt: skip
ODD = [None, -1, 1e308, 10**30, 10**400, "", "x", "../../x", [], {}, [1], True, 0, 0.5, math.nan, {"a": 1}]
IN_A_LINE = [b'"', b"'", b"\\", b"\r", b"\0", b"\v", b"\f", b"\x1c", *(c.encode() for c in "\x85\u2028\u2029\ufeff")]


# --- Changes ----------------------------------------------------------------------------------------------------------


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
    """A JSON file with one value replaced, at any depth: it stays JSON more often than under `mutated`."""
    try:
        place = whole = json.loads(content)
        key = chance.choice(list(place))
        while isinstance(place[key], dict) and place[key] and chance.random() < 0.7:
            place = place[key]
            key = chance.choice(list(place))
        place[key] = chance.choice(ODD)
        return json.dumps(whole).encode()
    except (ValueError, TypeError, IndexError):
        return mutated(content, chance)


def in_a_line(content: bytes, chance: random.Random) -> bytes:
    """One ASCII letter becomes another one, or comes after a character that some programs take for the end of a line or
    a text."""
    k = chance.choice([letter.start() for letter in re.finditer(rb"[A-Za-z]", content)])
    if chance.random() < 0.5:
        return content[:k] + bytes([chance.choice(b"abcdefghijklmnopqrstuvwxyz")]) + content[k + 1 :]
    return content[:k] + chance.choice(IN_A_LINE) + content[k:]


def in_the_header(content: bytes, chance: random.Random) -> bytes:
    """A mutated safetensors file; half of the time only its header changes, which is what a reader must understand."""
    end = 8 + int.from_bytes(content[:8], "little")
    if chance.random() < 0.5:
        return mutated(content, chance)
    if chance.random() < 0.5:
        return mutated(content[:end], chance) + content[end:]
    k = chance.randrange(8, end)  # a digit, so that it is still JSON
    header = re.sub(rb"\d", lambda digit: bytes([chance.choice(b"0123456789")]), content[k:end], count=1)
    return content[:k] + header + content[end:]


def odd_tensors(tensors: dict, chance: random.Random) -> dict:
    """One to three tensors go missing, or get another name, type, shape, values that are not finite or huge, or those
    of another tensor."""
    types = (torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.float8_e5m2)
    odd = dict(tensors)
    for _ in range(min(len(tensors), chance.randint(1, 3))):
        name, kind = chance.choice(list(odd)), chance.randrange(6)
        x = odd.pop(name)
        if kind == 0 and odd:
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
        odd[name] = x.clone()
    return odd


# --- Reading what was changed -----------------------------------------------------------------------------------------


def listing(folder: Path) -> dict[str, tuple]:
    """{file or folder: what changes when it is written}"""
    entries = {}
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            entries |= {entry.path: ()} | listing(Path(entry.path))
        else:
            now = entry.stat(follow_symlinks=False)
            entries[entry.path] = now.st_size, now.st_mtime_ns, now.st_ino
    return entries


@contextlib.contextmanager
def replaced(path: Path, new: bytes, root: Path) -> Iterator[None]:
    """Within this context a file has another content. AssertionError if it, or anything below root, is written."""
    content = path.read_bytes()
    path.write_bytes(new)
    before = listing(root)
    try:
        yield
    finally:
        after, now = listing(root), path.read_bytes() if path.exists() else None
        path.write_bytes(content)
        if now != new or after != before:
            odd = sorted(str(p) for p in after.keys() | before.keys() if after.get(p) != before.get(p))
            raise AssertionError(f"a reader has written: {', '.join(odd[:3]) or path}")


def files(root: Path, paths: list[Path], read: Callable, change: Callable | None = None, expected=None) -> Callable:
    """A target: change one of these files, call read(). expected(path, old, new): what read() must return, if it does
    not refuse the file; None: anything."""

    def one(chance: random.Random):
        path = chance.choice(paths)
        by_default = mutated_word if path.suffix == ".json" and chance.random() < 0.5 else mutated
        old = path.read_bytes()
        new = (change or by_default)(old, chance)
        with replaced(path, new, root):
            result = read()
            wanted = expected(path, old, new) if expected else None
            if wanted is not None and result != wanted:
                raise AssertionError(f"{path} is accepted as {result}, and not {wanted}")

    return one


def signed(root: Path, path: Path, load: Callable, own: Callable) -> Callable:
    """A target: change the tensors of a file of `inject.write_tensors`, or the text beside them, and sign it again.
    own(): what load() has read, {name in the file: tensor}; it must be what the file holds."""
    tensors, texts = read_tensors(str(path))
    texts.pop("sha256")
    other = path.with_name("changed")

    def one(chance: random.Random):
        new, now = tensors, dict(texts)
        if chance.random() < 0.7 or not texts:
            new = odd_tensors(tensors, chance)
        else:
            name = chance.choice(list(texts))
            now[name] = mutated_word(texts[name].encode(), chance).decode("utf-8", "replace")
        write_tensors(new, str(other), **now)
        content = other.read_bytes()
        other.unlink()
        with replaced(path, content, root):
            load()
            if digest(own()) != digest({name: x for name, x in new.items() if name != "random"}):
                raise AssertionError("what was read is not what the file holds")
        load()  # what it held before

    return one


def unchanged(read: Callable, state: Callable) -> Callable:
    """`read`, but AssertionError if it fails and the tensors of state() have changed."""

    def reading():
        before = digest(state())
        try:
            return read()
        except Exception as error:
            if digest(state()) != before:
                raise AssertionError("it was refused, but something has changed") from error
            raise

    return reading


# --- What is read -----------------------------------------------------------------------------------------------------


def targets(root: Path) -> dict[str, tuple[float, Callable]]:
    """{name: (share of the mutations, target)}. root: an empty folder."""
    flags = RUN | dict(backbone=small_backbone(root / "backbone"), output_dir=str(root / "run"))
    with quiet():
        train.main(flags)
    both = data_targets(root) | tensor_targets(root, flags) | run_targets(root, root / "run") | import_targets(root)
    return both | {"command lines": (0.12, command_lines(root / "run"))}


def examples_in(path: Path, content: bytes) -> int:
    """How many examples a benchmark makes of a whole file, counted in another way than its reader does."""
    if path.suffix == ".json":
        return len(json.loads(content)["Instances"])
    if re.search("few_shot/|super_glue_(copa|rte)", str(path)):
        return 0  # held-out tasks of t0: as many rows as before, or refused
    lines = content.count(b"\n") + (content[-1:] != b"\n")
    return lines * (2 if path.name == "validation.jsonl" else 1)  # of t0: both dev and test


def data_targets(root: Path) -> dict[str, tuple[float, Callable]]:
    """The files of the benchmarks' samples; the whole benchmark is read."""
    for name in ("crossfit", "superni", "t0"):
        shutil.copytree(SAMPLES / name, root / name)
    partition = json.loads((root / "crossfit" / "random.json").read_text())
    few = {part: names[:2] for part, names in partition.items() if isinstance(names, list)}
    (root / "crossfit" / "random.json").write_text(json.dumps(few))  # two tasks of each kind are enough to read

    def reader(name: str, split: str) -> Callable:
        number = 0

        def read() -> int:
            nonlocal number
            number += 1
            if number % 50 == 0:  # `datasets` would keep a table for each reading
                shutil.rmtree(datasets.config.HF_DATASETS_CACHE, ignore_errors=True)
            every = benchmarks.load(name, str(root / name), split, ("train", "dev", "test"))
            parts = [p for task in every.train + every.dev + every.test for p in (task.train, task.dev, task.test)]
            return sum(1 for part in parts for k in range(len(part)) if part[k])

        return read

    superni, t0 = root / "superni", root / "t0"
    crossfit = [p for name in few["train"] + few["dev"] + few["test"] for p in (root / "crossfit" / name).glob("*.tsv")]
    crossfit = [p for p in crossfit if p.parent.name in few["train"] or "_100_" in p.name]
    crossfit = [p for p in crossfit if "_100_" in p.name or not p.name.endswith("_test.tsv")]  # those that are read
    shots = [p for p in t0.rglob("*.jsonl") if p.parent.name != "32_shot" or p.name == "42_seed.jsonl"]
    sources = {  # split, shares of both targets, files of examples, lists of tasks
        "crossfit": ("100", (0.08, 0.04), crossfit, [root / "crossfit" / "random.json"]),
        "superni": ("13", (0.05, 0.03), list(superni.rglob("*.json")), list(superni.rglob("*.txt"))),
        "t0": ("42", (0.05, 0.03), shots, []),
    }
    every = {}
    for name, (split, shares, paths, lists) in sources.items():
        read = reader(name, split)
        whole = read()

        def as_many(path, old, new, whole=whole, lists=lists):
            return None if path in lists else whole - examples_in(path, old) + examples_in(path, new)

        every[name] = (shares[0], files(root, [*paths, *lists], read, expected=as_many))
        every[f"{name} rows"] = (shares[1], files(root, paths, read, in_a_line, lambda *_, whole=whole: whole))
    return every


def tensor_targets(root: Path, flags: dict) -> dict[str, tuple[float, Callable]]:
    """Files with a digest: adapter, checkpoint, AdapterSoup's embeddings."""
    run = root / "run"
    cfg = train.make_config(**flags)
    tasks = benchmarks.load_for(cfg, cfg.split, ("train",)).train
    model, _ = starting_point(cfg, tasks, [])
    optimizer, changed = train.make_optimizer(model, cfg), run_tensors(model)
    adapter, checkpoint = run / "adapter.safetensors", run / CHECKPOINT
    load_adapter_file(model, adapter)
    for p in changed.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    save_checkpoint(checkpoint, changed, optimizer, Progress(1))

    def adapters() -> dict:
        return {name: p.detach() for name, p in inject.adapter_parameters(model).items()}

    def all_of_it() -> dict:
        states = optimizer.state_dict()["state"].items()
        flat = {f"optimizer.{k}.{n}": x for k, own in states for n, x in own.items()}
        return {f"model.{n}": p.detach() for n, p in changed.items()} | flat

    load_adapter = unchanged(lambda: load_adapter_file(model, adapter), all_of_it)
    read_checkpoint = unchanged(lambda: load_checkpoint(checkpoint, changed, optimizer), all_of_it)

    def digest_of(load: Callable, own: Callable) -> Callable:
        return lambda: (str(load()), inject.digest(own()))

    soup_cfg = train.make_config(**{k: v for k, v in flags.items() if k != "skills"} | dict(method="adapter-soup"))
    soup, _ = starting_point(soup_cfg, tasks[:5], names_of_skills(soup_cfg, tasks[:5]))
    embeddings = root / "soup" / "embeddings.safetensors"
    embeddings.parent.mkdir()
    inject.write_tensors({"embeddings": torch.randn(5, 16)}, str(embeddings))
    begin = lambda: adapt.begin_with_soup(soup, soup_cfg, adapt.Config(checkpoint=str(embeddings.parent)))  # noqa: E731
    every = {}
    for name, share, path, load, own in (
        ("adapter", 0.07, adapter, load_adapter, adapters),
        ("checkpoint", 0.07, checkpoint, read_checkpoint, all_of_it),
    ):
        read = digest_of(load, own)
        whole = read()
        every[name] = (share, files(root, [path], read, in_the_header, lambda *_, whole=whole: whole))
        every[f"signed {name}"] = (share, signed(root, path, load, own))
    in_the_file = lambda: inject.read_tensors(str(embeddings))[0]  # noqa: E731
    return every | {
        "embeddings": (0.02, files(root, [embeddings], begin, in_the_header)),
        "signed embeddings": (0.02, signed(root, embeddings, begin, in_the_file)),
    }


def run_targets(root: Path, run: Path) -> dict[str, tuple[float, Callable]]:
    """The other files of runs of train.py and adapt.py, and the backbone."""
    flags = dict(steps=2, eval_every=1, batch_size=4, shots=4, test_examples=1, split=("0", "1"), checkpoint=str(run))
    few = adapt.Config(**flags, tasks="sort+double,drop+swap", output_dir=str(root / "few"), device="cpu")
    with quiet():
        adapt.adapt(few)
    base = adapt.base_config(few)
    model, _ = load_run(run, base)
    marks, tasks = marks_of_model(model), adapt.tasks_to_adapt(base, "0", few)

    def start():
        """As train.py --resume and adapt.py start."""
        check_ranges(train.make_config(output_dir=str(run), resume=True))
        with advice_on_memory("less"):
            load_run(run, train.run_config(str(run), device="cpu"))

    def resume() -> bool:
        """As adapt.py --resume does if all tasks of a split are done."""
        done = TaskRun(root / "few", marks)
        if list(done.tasks(tasks, "0", "")):
            raise AssertionError("a finished task would be done again")
        scores = of_split(done.results(), tasks)
        return all(math.isfinite(scores[what][task.name]) for what in ("before", "tasks") for task in tasks)

    def truncate():
        """`truncate_log` after step 5, on a copy."""
        content, copy = (run / "log.jsonl").read_bytes(), run / "copy.jsonl"
        copy.write_bytes(content)
        try:
            truncate_log(copy, lambda line: line["step"] <= 5)
            kept = [line + b"\n" for line in content.split(b"\n")[:-1] if json.loads(line)["step"] <= 5]
            return copy.read_bytes() == b"".join(kept)
        except Exception as error:
            if copy.read_bytes() != content:
                raise AssertionError("it was refused, but something has changed") from error
            raise
        finally:
            copy.unlink()

    def backbone() -> int:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            size = sum(p.numel() for p in load_backbone(str(other), "cpu")[0].parameters())
        return whole if "weights are not used" in printed.getvalue() else size  # a smaller model, with a warning

    def draw():
        """`tools.analyze --compare`; the figures are drawn, but not written."""
        with patch.object(figures, "save", lambda figure, stem: figure.draw_without_rendering()):
            analyze.compare(analyze.Config(compare=(str(run), str(few_folder)), output_dir=str(root)))

    other = root / "other-backbone"
    shutil.copytree(root / "backbone", other)
    whole, few_folder, true = 0, root / "few", lambda *_: True
    whole = backbone()
    compared = [folder / name for folder in (run, few_folder) for name in ("config.json", "result.json")]
    measured = run / "analysis" / "analysis.json"
    measured.parent.mkdir()
    measured.write_text(json.dumps({"over_steps": [{"step": k, "alignment": 0.1 * k} for k in (3, 6)]}))
    drawn = [run / "log.jsonl", measured, run / "result.json", few_folder / "result.json"]
    task = json.loads((run / "tasks.json").read_text())["tasks"][0]
    one = export.Config(checkpoint=str(run), task=task)
    return {
        "config.json": (0.08, files(root, [run / "config.json"], start)),
        "tasks.json": (0.02, files(root, [run / "tasks.json"], lambda: export.open_run(one) and None)),
        "TASK.json": (0.05, files(root, sorted((few_folder / "0").glob("*.json")), resume, expected=true)),
        "log.jsonl": (0.04, files(root, [run / "log.jsonl"], truncate, expected=true)),
        "--compare": (0.08, files(root, compared, lambda: compare((str(run), str(few_folder))))),
        "analyze --compare": (0.03, files(root, drawn, draw)),
        "backbone": (0.03, files(root, sorted(other.iterdir()), backbone, expected=lambda *_: whole)),
    }


def import_targets(root: Path) -> dict[str, tuple[float, Callable]]:
    """What `tools.export` imports: a folder of PEFT's Poly, and a checkpoint of the authors' code. It must make a whole
    run, or refuse and leave nothing behind."""
    run, peft, path, out = root / "run", root / "peft", root / "authors.pt", root / "new"
    model, _ = load_run(run, train.run_config(str(run), device="cpu"))
    blocks = {name: layouts.to_blocks(layer) for name, layer in adapted_layers(model).items()}
    state = {f"model.{n}.{layouts.AUTHORS[key]}": p.detach() for n, block in blocks.items() for key, p in block.items()}
    h, s, _, r = next(iter(blocks.values()))["A"].shape
    hyper = dict(model=str(root / "backbone"), dataset="t0", n_skills=s, n_splits=h, lora_rank=r, lora_alpha=1.0)
    peft.mkdir()
    (peft / "adapter_config.json").write_text(
        json.dumps({"peft_type": "POLY", "base_model_name_or_path": str(root / "backbone"), "r": r})
    )
    named = {f"base_model.model.{n}.{layouts.PEFT_POLY[k]}": p for n, block in blocks.items() for k, p in block.items()}
    save_file({name: p.detach().clone().contiguous() for name, p in named.items()}, peft / "adapter_model.safetensors")
    shutil.copy(run / "config.json", peft / "run.json")
    shutil.copy(run / "tasks.json", peft / "tasks.json")

    def imported(source: Path) -> list[str]:
        try:
            export.main(dict(checkpoint=str(source), output_dir=str(out), format="run", dataset="strings"))
            return sorted(p.name for p in out.iterdir())
        except (UserError, RunError) as error:
            if list(root.glob("new*")):
                raise AssertionError("it was refused, but there is a run") from error
            raise
        finally:
            shutil.rmtree(out, ignore_errors=True)

    def authors(content: bytes, chance: random.Random) -> bytes:
        """One entry replaced, or the bytes changed."""
        parts, odd = {"state_dict": dict(state), "hyper_parameters": dict(hyper)}, chance.random() < 0.5
        if odd:
            part = parts[chance.choice(list(parts))]
            tensors = [torch.empty(0), torch.ones(1), torch.full((h, s, 16, r), math.nan), torch.ones(2, 2).bool()]
            part[chance.choice(list(part))] = chance.choice([*ODD, *tensors])
        buffer = io.BytesIO()
        torch.save(parts, buffer, _use_new_zipfile_serialization=chance.random() < 0.5)
        return buffer.getvalue() if odd else mutated(buffer.getvalue(), chance)

    torch.save({"state_dict": state, "hyper_parameters": hyper}, path)
    whole = imported(peft)
    if imported(path) != whole:
        raise AssertionError("PEFT's folder and the authors' file make different runs")
    as_whole = lambda *_: whole  # noqa: E731
    return {
        "PEFT's Poly": (0.05, files(root, sorted(peft.iterdir()), lambda: imported(peft), expected=as_whole)),
        "authors' file": (0.06, files(root, [path], lambda: imported(path), authors, as_whole)),
    }


def command_lines(run: Path) -> Callable:
    """A target: the flags of a script with changed names and values, read as the script does before it starts."""
    train_line = "--method mhr --heads 8 --dataset strings --lr 0.01 --steps 5 --seed 1 --layers light --save-every 5"
    good = {  # script: its flags, and what reads them
        train: (train_line, lambda **flags: check_ranges(train.make_config(**flags))),
        adapt: (f"--checkpoint {run} --variant z --split 1 2 --tasks dev --steps 5 --shots 4 --lr 0.01 --resume",
                lambda **flags: check_ranges(adapt.make_config(**flags))),
        evaluate: ("--checkpoint runs/x --split 13 --beams 2 --zero-shot --test-examples 3",
                   lambda **flags: check_ranges(evaluate.Config(**flags))),
        export: (f"--checkpoint {run} --format peft --task mu --output-dir {run}/new",
                 lambda **flags: export.check(export.Config(**flags))),
    }  # fmt: skip

    def one(chance: random.Random):
        module = chance.choice(list(good))
        line, make = good[module]
        words = mutated(line.encode(), chance).decode("utf-8", "replace").replace("\0", "").split(" ")
        recipes = {train: PRETRAINING, adapt: FEW_SHOT}.get(module, {})
        before = listing(run.parent)
        try:
            make(**explicit_flags(module.Config, recipes, words))
        except SystemExit as stop:
            if stop.code not in (0, 2):
                raise AssertionError(f"exit code {stop.code}") from None
            raise UserError("refused by the parser") from None
        except OSError as error:  # for which `errors.exit_on_user_error` has a sentence
            raise UserError(error.strerror) from None
        finally:
            if listing(run.parent) != before:
                raise AssertionError("something was written")

    return one
