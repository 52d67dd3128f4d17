"""Run folders: files that are whole or absent, config.json, the lock, and what may be done in a folder."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import contextmanager, suppress
from itertools import zip_longest
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from plumbing import processes
from plumbing.errors import RunError, UserError, tell
from plumbing.flags import refuse_change
from recipes import ROUTED

CHECKPOINT = "checkpoint.safetensors"  # in the run folder, until the run is finished
LOCK = ".lock"  # in the run folder, while a process works there

# --- Files that are whole or absent -----------------------------------------------------------------------------------


@contextmanager
def whole_file(path: Path):
    """Write a file under the temporary name that this yields, then fsync and rename it.

    Readers see the old file or the whole new one, even after a power cut. Raises OSError if it cannot be written; the
    old file stays.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, f"cannot be written: {error.strerror or error}", str(path)) from None


@contextmanager
def whole_folder(folder: Path):
    """`whole_file` for a folder, with all below it: write under the name that this yields; an older folder of that name
    is replaced.

    Raises OSError if it cannot be written; after that, or any other error, the older folder stays.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_dir():
                sync_folder(path)
                continue
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        sync_folder(folder.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, (OSError, SafetensorError)):  # SafetensorError: how safetensors reports a full disk
            raise
        number, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or str(error)
        raise OSError(number, f"cannot be written: {reason}", str(folder)) from None


def sync_folder(folder: Path):
    """fsync the directory, so that renames survive a power cut."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def write_json(path: Path, content: dict):
    """Write a JSON file, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_lines(path: Path, lines: list[dict]):
    """Write a file of JSON lines, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_lines(path: Path) -> list[dict]:
    """The objects of a file of JSON lines; a last line without its end, of a killed process, is left out. Raises
    UserError for a damaged line."""
    lines, content = [], path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(content, 1):
        try:
            lines.append(json.loads(line))
        except (ValueError, RecursionError):
            raise UserError(f"{path}:{number} is no JSON: delete this line, or the file") from None
    return lines


def append_line(path: Path, line: dict):
    """Add a line to a file of JSON lines, on disk when this returns; an incomplete last line is cut off first."""
    with open(path, "ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(f"{json.dumps(line, ensure_ascii=False)}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def truncate_log(path: Path, stays: Callable[[dict], bool]):
    """Drop the lines of a log that the resumed run will write again, and a last line that is incomplete.

    Raises UserError for any other damaged line.
    """
    if not path.exists():
        return
    content, lines = path.read_bytes(), []
    *whole, _ = content.split(b"\n")
    for number, line in enumerate(whole, 1):
        try:
            if stays(json.loads(line)):
                lines.append(line + b"\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path}:{number} is damaged: delete this line to resume") from None
    if (left := b"".join(lines)) != content:
        with whole_file(path) as temporary:
            temporary.write_bytes(left)


def read_json(path: Path, **kinds: type) -> dict:
    """Read a JSON object from a file. kinds: the type of each entry that it must have.

    Raises UserError if the file is missing, damaged, or lacks such an entry.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno} is not valid JSON: {error.msg}") from None
    except (RecursionError, ValueError) as error:  # nested too deep; a number of too many digits
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: give a file that was not changed by hand")
    for name, kind in kinds.items():
        if not _is(content.get(name), kind):
            raise UserError(f"{path}: {name!r} is missing or no {kind.__name__}: it was changed by hand")
    return content


def _is(value, kind: type) -> bool:
    """Whether a value from a JSON file has a type; 1 may stand for 1.0, and true is no number."""
    return type(value) is kind or (kind is float and type(value) is int)


def check_numbers(path: Path, *entries: dict):
    """Raise UserError unless each entry, from a JSON file, is a non-empty {name: number}: scores, counts or times.

    A number of a run is finite and below 10^15 (JSON also has integers too large for a float).
    """
    for entry in entries:
        if not isinstance(entry, dict) or not entry:
            raise UserError(f"{path}: there is {entry!r:.60} in place of named numbers: it was changed by hand")
        for name, value in entry.items():
            if not _is(value, float) or not abs(value) < 1e15:
                raise UserError(f"{path}: {name!r} is {value!r:.60}, no number of a run: it was changed by hand")


# --- config.json ------------------------------------------------------------------------------------------------------

MADE_BY = {"variant": "adapt.py", "adapter": "train.py", "slots": "experiments/babyai.py"}  # by a field of each
OF_A_COMMAND = {  # fields of a command, not of a run: never saved
    "resume": False, "plot": [], "figure": "babyai", "overwrite": False, "dry_run": False, "tensorboard": False,
}  # fmt: skip

RENAMED = {"keep": "best_by"}  # fields that earlier versions saved under another name


def script_of(folder: Path) -> str:
    """Which script made a run folder: train.py, adapt.py or experiments/babyai.py; "" for none of these."""
    return _script(read_json(folder / "config.json"))


def _script(content: dict) -> str:
    return next((script for field, script in MADE_BY.items() if field in content), "")


def write_config(folder: Path, cfg):
    """Save a script's Config as config.json, all that is needed to rebuild the run."""
    saved = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in OF_A_COMMAND}
    write_json(folder / "config.json", saved)


def read_config(Config: type, path: Path):
    """Rebuild a script's Config from a run's config.json, also from that of an earlier version.

    A field that the file lacks gets its default. `resume`, `plot` and `figure`, which earlier versions saved, are
    ignored at their defaults. Raises UserError for any other field, type or value that the Config cannot have;
    `check_ranges` is for numbers.
    """
    fields = {field.name: field for field in dataclasses.fields(Config)}
    now = lambda name: RENAMED[name] if RENAMED.get(name) in fields else name  # noqa: E731
    content = {now(name): value for name, value in read_json(path).items()}
    if (script := _script(content)) != (wanted := _script(fields)):
        made = f"a run of {script}, not of {wanted}" if script else "the config of no run"
        raise UserError(f"{path}: it is {made}")
    values = {}
    for name, value in content.items():
        if name in OF_A_COMMAND and value == OF_A_COMMAND[name]:
            continue
        if name not in fields or name in OF_A_COMMAND:
            raise UserError(f"{path}: field {name!r} is unknown: it is of another version, or was changed by hand")
        values[name] = _value(fields[name], value, path)
    return Config(**values)


def _value(field: dataclasses.Field, value, path: Path):
    """A field's value from a JSON file; UserError if the field cannot have it."""
    several, choices = field.type is tuple, field.metadata["choices"]
    values = value if several else [value]
    typed = isinstance(values, list) and all(_is(v, str if several else field.type) for v in values)
    if not typed or field.default and not values:  # an empty list only where that is the default
        kind = "list of texts" if several else field.type.__name__
        raise UserError(f"{path}: field {field.name!r} is {value!r:.60}, no {kind}: it was changed by hand")
    if choices and (odd := [v for v in values if v not in choices]):
        raise UserError(f"{path}: field {field.name!r} is {odd[0]!r:.60}, which is none of {', '.join(choices)}")
    return tuple(values) if several else value


MAY_CHANGE = (  # on --resume: where the run is, what is seen of it, and what changes no more than rounding
    "resume", "save_every", "keep_every", "output_dir", "device", "data_dir", "micro_batch", "checkpointing",
    "eval_batch", "deterministic", "shard", "dry_run", "tensorboard", "log_every",
)  # fmt: skip
MAY_CHANGE_IN = {"train.py": ("eval_every",)}  # there it looks alone; in adapt.py it decides when a task stops


def resumed_config(Config: type, flags: dict):
    """The Config of the run that --resume finds in --output-dir, or None. Raises UserError if a flag contradicts it."""
    if flags.get("resume") and flags.get("overwrite"):
        raise UserError("--resume goes on with a run and --overwrite replaces it: give one of them")
    path = Path(flags.get("output_dir", "")) / "config.json"
    if not flags.get("resume") or not flags.get("output_dir") or not path.exists():
        return None
    saved = read_config(Config, path)
    flags = {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
    may = MAY_CHANGE + MAY_CHANGE_IN.get(_script(vars(saved)), ())
    refuse_change(saved, {k: v for k, v in flags.items() if k not in may}, f"the run in {path.parent}")
    return dataclasses.replace(saved, **{name: value for name, value in flags.items() if name in may})


FIXED_BY_RUN = (
    "dataset", "backbone", "adapter", "layers", "rank", "density", "skills", "heads", "granularity", "top_k", "encoder",
    "random_by", "instructions", "partition",
)  # fmt: skip


def continued_config(Config: type, flags: dict):
    """The Config of a run of train.py that continues --from-run: its settings, changed by the flags that may change."""
    source, base = flags["from_run"], read_config(Config, Path(flags["from_run"]) / "config.json")
    if "steps" not in flags:
        raise UserError("--from-run needs --steps: how many to train on")
    refuse_change(base, {name: flags[name] for name in FIXED_BY_RUN if name in flags}, f"--from-run {source}")
    method = flags.get("method", base.method)
    if method != base.method and not (method == "mu" and base.method in ROUTED):
        what = f"--method {method} cannot continue a run of method {base.method}"
        raise UserError(f"{what}: mu continues a routed method")
    here = {"output_dir": "", "device": "auto", "resume": False}  # not those of the other run
    return dataclasses.replace(base, **here | flags | {"method": method, "epochs": 0})


# --- What may be done in a folder -------------------------------------------------------------------------------------

OF_A_RUN = {  # what the scripts write to a run folder: pattern of a name; for a folder, of the names in it
    r"((config|tasks|result|provenance)\.json|(log|(before\.)?predictions)\.jsonl)(\.tmp)?": "",
    r"(evaluation|zero-shot)(-\d+)?\.(json|predictions\.jsonl)(\.tmp|\.lock)?": "",
    r"(adapter(-\d+)?|checkpoint|embeddings)\.safetensors(\.tmp)?": "",
    r"backbone(-\d+)?": r"(config|generation_config|tokenizer\w*|special_tokens_map|added_tokens|vocab)\.json"
    r"|model.*\.safetensors(\.index\.json)?|spiece\.model|merges\.txt|chat_template\.jinja",
    r"analysis(-some-tasks)?(-\d+)?": r"[\w-]+\.(json|png|svg)",
    r"tensorboard": r"events\..*",
}
BEFORE_A_RUN = {LOCK, "tasks.json", "tasks.json.tmp", "config.json.tmp"}  # may be there before its config.json


def refuse_used(path: str):
    """Raise UserError if a folder already holds a run or anything else: nothing is ever overwritten."""
    folder = Path(path)
    if (folder / "config.json").exists():
        raise UserError(f"--output-dir {path} already holds a run: choose another folder, or give --overwrite")
    if folder.is_dir() and (there := sorted({p.name for p in folder.iterdir()} - BEFORE_A_RUN)):
        raise UserError(f"--output-dir {path} is not empty, it holds {there[0]}: choose another folder")


def refuse_what_is_no_run(folder: Path, script: str):
    """--overwrite: raise UserError unless a folder holds a run of a script ("train.py"), and nothing else."""
    made_by = script_of(folder) if (folder / "config.json").exists() else ""
    if made_by != script:
        what = f"a run of {made_by}" if made_by else "no run"
        raise UserError(f"--overwrite: {folder} holds {what}: choose another --output-dir")
    splits = read_json(folder / "config.json").get("split") if script == "adapt.py" else []
    inside = {re.escape(split): r".+\.(json|safetensors)" for split in splits if isinstance(split, str)} | OF_A_RUN
    for path in sorted(folder.rglob("*")):
        top, *below = path.relative_to(folder).parts
        allowed = next((names for pattern, names in inside.items() if re.fullmatch(pattern, top)), None)
        known = allowed is not None and (not below or re.fullmatch(allowed, path.name))
        if top != LOCK and (path.is_symlink() or not known):
            raise UserError(
                f"--overwrite: {folder} holds {path.name}, which no run writes: choose another --output-dir"
            )


def remove_run(folder: Path):
    """Remove the run in a folder that `refuse_what_is_no_run` has checked; config.json, the mark of a run, last."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def new_run_folder(path: str) -> Path:
    """Make a run's folder. Raises UserError if it already holds a run."""
    refuse_used(path)
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {folder} cannot be made: {error.strerror}") from None
    return folder


@contextmanager
def locked_folder(folder: Path, command: str):
    """Make a run's folder and lock it within this context, or until the process ends, however it ends.

    Of several processes the first one locks it. A folder without a run is removed again; a run that a signal stops
    says how to resume it, by the same command ("python train.py"). Raises UserError if another process holds the lock
    or the folder cannot be made, RunError if the folder was removed meanwhile.
    """
    if not processes.first():
        processes.wait()
        yield
        return
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process is at work in {folder}: wait, or choose another --output-dir") from None
    except OSError as error:
        raise UserError(f"--output-dir {folder} cannot be made or written: {error.strerror}") from None
    processes.wait()
    try:
        yield
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, SIGTERM, SIGHUP
        if (folder / "config.json").exists():
            tell(f"\nto resume: {command} --resume --output-dir {folder}")
        raise
    except OSError:
        if folder.is_dir():
            raise
        raise RunError(f"{folder} was removed during the run: nothing is left, start it again") from None
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink()
            if new and not (folder / "config.json").exists():
                folder.rmdir()
        lock.release()


def result_if_done(folder: Path, resume: bool, overwrite: str = "") -> dict | None:
    """The result of a run that --resume finds finished; None if there is something to do.

    overwrite: the script whose run may be there, to be replaced (`remove_run`) once all of the new one is known to be
    right. Raises UserError if the folder holds a run and neither was given, or if it holds something else.
    """
    if overwrite and (folder / "config.json").exists():
        refuse_what_is_no_run(folder, overwrite)
        return None
    resumable = resume and (folder / "config.json").exists()
    if resumable and (folder / "result.json").exists():
        print(f"{folder} is finished: nothing to resume")
        remove_checkpoint(folder)
        return read_json(folder / "result.json")
    if processes.first() and not resumable:
        refuse_used(str(folder))
    return None


def remove_checkpoint(folder: Path):
    """Remove what a finished run no longer needs: its checkpoint, and half-written files of a killed process."""
    (folder / CHECKPOINT).unlink(missing_ok=True)
    for path in list(folder.rglob("*.tmp*")):
        if path.is_dir() and path.suffix == ".tmp":
            shutil.rmtree(path)
        elif re.fullmatch(r".+\.(safetensors|jsonl?)\.tmp|\.tmp\w{6}", path.name):  # ours; safetensors' own
            path.unlink()


def mark_of_run(folder: Path) -> str:
    """A hash of what a run ended with, its result.json; "" if it has not ended."""
    path = folder / "result.json"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else ""


def read_skills(folder: Path, count: int) -> list[str]:
    """The names of a run's skills. Raises UserError unless there are as many as its settings say."""
    names = read_json(path := folder / "tasks.json", skills=list)["skills"]
    if len(names) != count:
        raise UserError(f"{path} names {len(names)} skills, the run has {count}: it was changed by hand")
    return names


def refuse_other(path: Path, saved, now: dict[str, str]):
    """Raise UserError if a file was made with something else than is there now. saved, now: {"backbone": hash, ...}."""
    for what, mark in now.items():
        if not isinstance(saved, dict) or saved.get(what) != mark:
            advice = "put that one back, or delete the file to make it again"
            raise UserError(f"{path} was made with another {what} than there is now: {advice}")


def refuse_other_tasks(folder: Path, method: str, tasks: list):
    """Raise UserError unless these are the training tasks (`data.Task`) of the run in a folder, in its order.

    Under a routed method row t of Z is task t. A run that `tools/export.py` imported calls its tasks 0, 1, 2, ...: only
    their number is compared.
    """
    if method not in ROUTED:
        return
    made, names = read_json(folder / "tasks.json", tasks=list)["tasks"], [task.name for task in tasks]
    if made == [str(t) for t in range(len(made))]:
        names = [str(t) for t in range(len(names))]
    for t, (then, now) in enumerate(zip_longest(made, names)):
        if then != now:
            there = f"{folder}: its training task {t} is {then!r:.60}, that of the data {now!r:.60}"
            raise UserError(f"{there}: give the --data-dir that it was trained on")
