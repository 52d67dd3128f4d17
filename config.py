"""Flags, recipes, run folders and errors: what `train.py`, `adapt.py` and `evaluate.py` share before torch is loaded.

This file is here because a script must read its flags before it imports torch and transformers, which takes seconds:
`python train.py --help` answers at once, and a misspelt flag is refused at once.

Each script has one dataclass `Config`, whose fields are its flags. The defaults that a benchmark decides come from
`RECIPES`; a flag given by hand wins over both.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import signal
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

# Methods by how an adapter comes to a task.
ONE_ADAPTER = ("lora", "ia3", "shared", "mu")  # methods without a router: one adapter for all tasks
GIVEN = ("private", "expert", "adapter-soup")  # routed by a given table, which also says how many skills there are
LEARNED = ("poly", "mhr", "hyperformer", "task-moe")  # routed by a Z that is trained
ROUTED = (*GIVEN, "random", *LEARNED)
METHODS = ("full", *ONE_ADAPTER, *ROUTED)
VARIANTS = {"all": METHODS, "z": LEARNED, "mu": ROUTED, "lora": ("full",)}  # what `adapt.py` can train, and after which

# A run's defaults: what its data set says, then what its (data set, method) says. Sources (benchmarks/README.md): the
# MHR authors' configuration files (t0: after T-Few), Polytropon's appendix A.2; "strings" is ours, its rates for each
# method those that a search on dev compositions found (results/methods.md; some variants and sizes have others, which
# `experiments/methods.py` gives as flags). Warm-up is a share of the steps, here 1,500 of SuperNI's 25,000.
# Full fine-tuning holds its weights in fp32: in bfloat16 most updates at such rates round to nothing.
PRETRAINING = {
    "strings": dict(
        backbone="tiny", rank=4, skills=4, routing="gumbel", steps=1500, epochs=0, batch_size=64, optimizer="adamw",
        lr=5e-3, lr_z=1e-1, weight_decay=0.0, warmup=0.06, clip=1.0, max_input=64, max_output=32, precision="fp32",
        eval_examples=20,
    ),
    "strings-single": dict(
        backbone="scratch", rank=2, skills=8, routing="gumbel", steps=6000, epochs=0, batch_size=64, optimizer="adamw",
        lr=1e-3, lr_z=5e-2, weight_decay=0.0, warmup=0.06, clip=1.0, max_input=64, max_output=32, precision="fp32",
        eval_examples=100,
    ),
    "t0": dict(
        backbone="google/t5-xl-lm-adapt", rank=1, skills=8, routing="sigmoid", steps=100_000, epochs=0,
        batch_size=16, optimizer="adafactor", lr=1e-3, lr_z=1e-1, weight_decay=0.0, warmup=0.06, clip=1.0,
        max_input=256, max_output=256, precision="bf16", eval_examples=0,
    ),
    "superni": dict(
        backbone="google/t5-xl-lm-adapt", layers="light", rank=1, skills=8, routing="sigmoid", steps=25_000, epochs=0,
        batch_size=8, optimizer="adamw", lr=1e-3, lr_z=1e-1, weight_decay=0.01, warmup=0.06, clip=0.1, max_input=1024,
        max_output=128, precision="bf16", eval_examples=0,
    ),
    "crossfit": dict(
        split="100", backbone="facebook/bart-large", layers="self-attention", rank=16, skills=8, routing="gumbel",
        steps=0, epochs=30, batch_size=32, optimizer="adamw", lr=1e-3, lr_z=1e-2, weight_decay=0.0, warmup=0.06,
        clip=1.0, max_input=512, max_output=64, precision="fp32", eval_examples=0,
    ),
    ("strings", "full"): dict(lr=3.3e-4),
    **{("strings", m): dict(lr=1.5e-2) for m in ("expert", "task-moe", "poly", "mhr")},
    **{("strings", m): dict(lr=1.7e-3) for m in ("hyperformer", "adapter-soup")},
    ("strings", "ia3"): dict(lr=4.5e-2),
    ("t0", "full"): dict(lr=1e-4, precision="fp32"),
    ("superni", "full"): dict(lr=5e-5, precision="fp32"),
    ("crossfit", "full"): dict(lr=3e-5),
}  # fmt: skip
FEW_SHOT = {
    "strings": dict(
        shots=32, split=("0",), steps=100, batch_size=32, optimizer="adamw", lr=3e-3, lr_z=5e-1, weight_decay=0.0,
        warmup=0.06, clip=1.0, choice_losses=False, keep="loss", eval_every=10, patience=5,
    ),
    "t0": dict(
        shots=0, split=("42", "1024", "0"), steps=1000, batch_size=8, optimizer="adafactor", lr=3e-3, lr_z=1e-1,
        weight_decay=0.0, warmup=0.06, clip=1.0, choice_losses=True, keep="score", eval_every=200, patience=5,
    ),
    "superni": dict(
        shots=0, split=("13", "42", "58"), steps=1000, batch_size=8, optimizer="adamw", lr=1e-3, lr_z=1e-1,
        weight_decay=0.01, warmup=0.06, clip=0.1, choice_losses=False, keep="loss", eval_every=100, patience=3,
    ),
    "crossfit": dict(
        shots=0, split=("100", "13", "21", "42", "87"), steps=1000, batch_size=8, optimizer="adamw", lr=1e-3,
        lr_z=1e-2, weight_decay=0.01, warmup=0.1, clip=1.0, choice_losses=False, keep="loss", eval_every=100,
        patience=3,
    ),
    ("strings", "full"): dict(lr=1.1e-4),
    **{("strings", m): dict(lr=2.7e-2) for m in ("lora", "shared", "ia3")},
    **{("strings", m): dict(lr=9e-3) for m in ("private", "adapter-soup")},
    ("t0", "full"): dict(lr=1e-4),
    ("superni", "full"): dict(lr=5e-5),
    ("crossfit", "full"): dict(lr=3e-5),
}  # fmt: skip


class UserError(Exception):
    """Something that the user can mend: one sentence that names the flag, file and line, or layer, and what to do."""


class RunError(Exception):
    """A run that failed though its settings are right: one sentence that says what happened and what to try."""


# --- Flags ------------------------------------------------------------------------------------------------------------


def flag(default, help: str, choices: tuple = ()):
    """A field of a script's Config: its default, its help text and, where they are few, its allowed values."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def recipe(recipes: dict, dataset: str, method: str) -> dict:
    """The defaults of a data set, changed by those of (data set, method)."""
    return recipes.get(dataset, {}) | recipes.get((dataset, method), {})


def explicit_flags(Config: type, recipes: dict, argv: list[str] | None = None) -> dict:
    """The flags given on the command line, by field name; misuse ends the program with one sentence and code 2.

    Standard output or error that was closed before the start (2>&-) becomes the null device: else a file that the run
    opens would get its number, and what libraries print there. Of several processes (`parallel.py`) only the first one
    talks from here on. argv None: the command line of this process, which from here on also ends quietly when it is
    stopped, until `exit_on_user_error` says how.
    """
    if argv is None:
        for number in (signal.SIGINT, signal.SIGTERM, *hang_ups()):
            if signal.getsignal(number) != signal.SIG_IGN:  # as Ctrl-C is for a shell's background jobs
                signal.signal(number, _end)
    for name in ("stdout", "stderr"):
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")
        sys.stderr.isatty = lambda: False  # errors yes, progress bars no
    parser = _Parser(description=(Config.__doc__ or "").strip(), allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for field in dataclasses.fields(Config):
        having = {key: r[field.name] for key, r in recipes.items() if field.name in r}
        by_dataset = [f"{value} ({key})" for key, value in having.items() if isinstance(key, str)]
        by_dataset += ["some methods have their own"] if len(by_dataset) < len(having) else []
        default = ", ".join(by_dataset) or (field.default if field.default != "" else "none")
        options = dict(help=f"{field.metadata['help']} [default: {default}]".replace("%", "%%"))
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif field.type is tuple:
            options["nargs"] = "+"
        else:
            options["type"] = field.type
        if field.metadata["choices"]:
            options["choices"] = field.metadata["choices"]
        parser.add_argument("--" + field.name.replace("_", "-"), **options)
    flags = vars(parser.parse_args(argv))
    for name, value in flags.items():
        if re.search("[\ud800-\udfff]", " ".join(value) if isinstance(value, list) else str(value)):  # bytes of no text
            parser.error(f"argument --{name.replace('_', '-')}: it is not UTF-8")
    return flags


def _end(number: int, frame):
    """End the process at once: an exception would be swallowed or dressed up by the imports that it comes upon."""
    os._exit(128 + number)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help lists all flags)\n")


ABOVE_ZERO = (
    "rank skills heads density top_k batch_size lr lr_z clip max_input max_output log_every eval_every eval_batch "
    "patience soup beams training_tasks"
).split()
NOT_NEGATIVE = (
    "memory keep_every steps epochs micro_batch weight_decay warmup eval_examples test_examples shots seed".split()
)


USED_BY = {  # flags of some methods only
    "heads": ("mhr",), "routing": ("poly", "mhr"), "skills": ROUTED, "granularity": (*LEARNED, "random"),
    "lr_z": LEARNED, "top_k": ("task-moe",), "random_by": ("random",), "encoder": ("adapter-soup",),
    "soup": ("adapter-soup",),
}  # fmt: skip
OF_ADAPTER = {"rank": "lora", "density": "sft"}
OF_DATASET = {
    "split": ("strings", "strings-single", "crossfit"),
    "instructions": ("strings",),
    "partition": ("crossfit",),
}
NOT_OF_VARIANT = {"z": ("lr", "weight_decay"), "mu": ("lr_z", "soup"), "lora": ("lr_z",)}


def unused(cfg, flags: dict, variant: str = "") -> list[str]:
    """The flags that were given and change nothing in training with the settings cfg (a `train.Config`), or, where a
    variant is given, in adapting what was trained so."""
    names = [name for name in flags if cfg.method not in USED_BY.get(name, METHODS)]
    names += [name for name in flags if cfg.adapter != OF_ADAPTER.get(name, cfg.adapter)]
    names += [name for name in flags if not variant and cfg.dataset not in OF_DATASET.get(name, (cfg.dataset,))]
    names += [name for name in flags if name in NOT_OF_VARIANT.get(variant, ())]
    return [f"--{name.replace('_', '-')}" for name in dict.fromkeys(names)]


def check_ranges(cfg):
    """Raise UserError for a number outside its range (or not a number), naming its flag."""
    for name, value in dataclasses.asdict(cfg).items():
        flag = f"--{name.replace('_', '-')}"
        if name == "skills" and cfg.method in GIVEN:
            continue  # 0, until the tasks say how many
        if name in ABOVE_ZERO and not 0 < value < math.inf:
            raise UserError(f"{flag} must be above 0, not {value}")
        if name in NOT_NEGATIVE and not 0 <= value < 2**63:
            raise UserError(f"{flag} must not be negative or huge, not {value}")
        if type(value) is int and name != "seed" and value >= 2**31:
            raise UserError(f"{flag} must be below 2^31, not {value}")
        if name == "warmup" and value > 1:
            raise UserError(f"{flag} is a share of the steps and must not be above 1, not {value}")


def describe(cfg) -> str:
    """All settings of a run as they are, one line, for its start."""
    return "  ".join(f"{k}={v}" for k, v in dataclasses.asdict(cfg).items() if v != "")


def exit_on_user_error(main, *args):
    """Run a script's main. What goes wrong becomes one line on standard error and an exit code: 2 for what the user can
    mend (UserError), 1 for a run that failed (RunError, or the disk), 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP
    (unless it is ignored, as under nohup)."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for number in hang_ups():
        signal.signal(number, _hang_up)
    try:
        if signal.getsignal(signal.SIGINT) is _end:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        main(*args)
    except UserError as error:
        _fail(str(error), 2)
    except RunError as error:
        _fail(str(error), 1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error} (what was saved before is whole)", 1)
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(text: str, code: int):
    """End the program with one line, also where a file name in it has line ends."""
    print(f"error: {' '.join(text.splitlines())}", file=sys.stderr)
    sys.exit(code)


def hang_ups() -> list[int]:
    """SIGHUP, which tells that the terminal was closed; [] where it is ignored (nohup) or there is none (Windows)."""
    number = getattr(signal, "SIGHUP", None)
    return [number] if number and signal.getsignal(number) != signal.SIG_IGN else []


def _hang_up(*_):
    tell("\nthe terminal was closed")
    sys.exit(129)


def tell(text: str):
    """Print a line. Where nothing can be printed any more, all that comes later goes to the null device."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = sys.stderr = open(os.devnull, "w")


# --- Run folders ------------------------------------------------------------------------------------------------------


BEFORE_A_RUN = {".lock", "tasks.json", "tasks.json.tmp", "config.json.tmp"}  # what is there before its config.json


def refuse_used(path: str):
    """Raise UserError if a folder already holds a run or anything else: nothing is ever overwritten."""
    folder = Path(path)
    if (folder / "config.json").exists():
        raise UserError(f"--output-dir {path} already holds a run: choose another folder or delete this one")
    if folder.is_dir() and (there := sorted({p.name for p in folder.iterdir()} - BEFORE_A_RUN)):
        raise UserError(f"--output-dir {path} is not empty, it holds {there[0]}: choose another folder")


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
def whole_file(path: Path):
    """Write a file under the name that this yields: it is then synced to the disk and renamed, so that readers see the
    old file or the whole new one, also after a power cut. Raises OSError if it cannot be written; the old one stays."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_names(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, f"cannot be written: {error.strerror or error}", str(path)) from None


def sync_names(folder: Path):
    """Have the names of a folder's files on the disk: else a power cut may undo a renaming, but not what came after."""
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


def read_json(path: Path, **kinds: type) -> dict:
    """Read a JSON object from a file. kinds: entries that it must have, and their types. Raises UserError if the file
    is missing, broken, or has other entries."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
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
    """Whether a value from a JSON file is of a type; 1 may stand for 1.0, and true is no number."""
    return type(value) is kind or (kind is float and type(value) is int)


def check_numbers(path: Path, *entries: dict):
    """Raise UserError unless each of these, from a JSON file, is {name: number}, with at least one: scores, counts or
    times of a run. None of those is NaN or infinite, or reaches 10^15 (JSON also has numbers too large for a float)."""
    for entry in entries:
        if not isinstance(entry, dict) or not entry:
            raise UserError(f"{path}: there is {entry!r:.60} in place of named numbers: it was changed by hand")
        for name, value in entry.items():
            if not _is(value, float) or not abs(value) < 1e15:
                raise UserError(f"{path}: {name!r} is {value!r:.60}, no number of a run: it was changed by hand")


MADE_BY = {"variant": "adapt.py", "adapter": "train.py", "slots": "experiments/babyai.py"}  # by a field of each


def read_config(Config: type, path: Path):
    """Rebuild a script's Config from a run's config.json. Raises UserError if its fields, their types or values are
    none that the Config's flags can have; numbers are for `check_ranges`."""
    content, fields = read_json(path), {field.name: field for field in dataclasses.fields(Config)}
    if odd := fields.keys() ^ content.keys():
        made, wanted = ([script for name, script in MADE_BY.items() if name in have] for have in (content, fields))
        why = f"it is a run of {made[0]}, not of {wanted[0]}" if made != wanted and made else "it is of another version"
        raise UserError(f"{path}: field {sorted(odd)[0]!r} is missing or unknown: {why}")
    for name, field in fields.items():
        several, choices = field.type is tuple, field.metadata["choices"]
        values = content[name] if several else [content[name]]
        typed = isinstance(values, list) and all(_is(value, str if several else field.type) for value in values)
        if not typed or field.default and not values:  # none at all only where that is the default
            kind = "list of texts" if several else field.type.__name__
            raise UserError(f"{path}: field {name!r} is {content[name]!r:.60}, no {kind}: it was changed by hand")
        if choices and (odd := [value for value in values if value not in choices]):
            raise UserError(f"{path}: field {name!r} is {odd[0]!r:.60}, which is none of {', '.join(choices)}")
        content[name] = tuple(values) if several else values[0]
    return Config(**content)


MAY_CHANGE = (  # when a run goes on: where it is, and what changes no more than rounding
    "resume", "save_every", "keep_every", "output_dir", "device", "data_dir", "micro_batch", "checkpointing",
    "eval_batch", "deterministic",
)  # fmt: skip


def resumed(Config: type, path: Path, flags: dict):
    """The Config of a run that was cut off, from its config.json. Raises UserError if a flag contradicts it."""
    saved = read_config(Config, path)
    flags = {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
    for name, value in flags.items():
        if name not in MAY_CHANGE and value != getattr(saved, name):
            given = f"--{name.replace('_', '-')} {value}"
            raise UserError(f"{given} does not fit the run in {path.parent}, whose is {getattr(saved, name)}")
    return dataclasses.replace(saved, **{name: value for name, value in flags.items() if name in MAY_CHANGE})
