"""From the command line to a script's Config.

A script has one dataclass `Config`. Its fields are the settings of a run, and most of them are flags. Defaults that
depend on the benchmark come from `recipes.py`; a flag on the command line overrides both. Nothing here loads torch:
`python train.py --help` answers at once, and so does a misspelt flag.
"""

import argparse
import dataclasses
import math
import os
import re
import sys
import textwrap

from plumbing.errors import UserError, exit_quietly_on_signals
from recipes import FIXED_TABLE, LEARNED, METHODS, ROUTED

# --- Fields of a Config -----------------------------------------------------------------------------------------------


def flag(default, help: str, choices=(), metavar="", group="", required=False, positional=False):
    """A field of a script's Config that is also a flag.

    help, choices, metavar: as argparse has them. group: the title under which --help shows this flag and those after
    it. required: --help says so; the script checks it. positional: a word without a flag; type tuple: one or more.
    """
    about = dict(help=help, choices=choices, metavar=metavar, group=group, required=required, positional=positional)
    return dataclasses.field(default=default, metadata=about)


def setting(default, help: str, choices: tuple = ()):
    """A field without a flag: `recipes.py` may set it, else the default holds."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "group": "", "setting": True})


def as_flag(name: str) -> str:
    """The name of a field as the user types it: lr_z to --lr-z."""
    return f"--{name.replace('_', '-')}"


# --- Reading the command line -----------------------------------------------------------------------------------------


def explicit_flags(Config: type, recipes: dict, argv: list[str] | None = None, moved: dict | None = None) -> dict:
    """The flags on the command line, by field name; a mistake ends the program with one sentence and exit code 2.

    recipes: their values are shown as defaults. argv: None for the command line of this process, which from here until
    `exit_on_user_error` also exits quietly on a signal. moved: {former flag: what to use now}, for one sentence each.
    If standard output or error was closed before the start (2>&-), it becomes the null device: otherwise a new file
    could reuse descriptor 1 or 2. Of several processes (`processes.py`) only the first one prints.
    """
    if argv is None:
        exit_quietly_on_signals()
    for name in ("stdout", "stderr"):
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")
        sys.stderr.isatty = lambda: False  # errors yes, progress bars no
    parser = _parser(Config, recipes)
    recipe_only = "is a setting of the recipe, not a flag: set it for the benchmark in recipes.py"
    gone = (moved or {}) | {f.name: recipe_only for f in dataclasses.fields(Config) if f.metadata.get("setting")}
    for word in sys.argv[1:] if argv is None else argv:
        name = word.removeprefix("--").removeprefix("no-").partition("=")[0].replace("-", "_")
        if word.startswith("--") and name in gone:
            parser.error(f"{as_flag(name)} {gone[name]}")
    flags = vars(parser.parse_args(argv))
    for name, value in flags.items():
        if re.search("[\ud800-\udfff]", " ".join(value) if isinstance(value, list) else str(value)):
            parser.error(f"argument {as_flag(name)}: it is not valid UTF-8")
    return flags


class _Help(argparse.RawDescriptionHelpFormatter):
    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)  # names of flags stay whole


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help lists all flags)\n")


def _parser(Config: type, recipes: dict) -> _Parser:
    """The parser of a Config: its first docstring line at the top of --help, the rest of the docstring at the end."""
    about, _, examples = (Config.__doc__ or "").partition("\n")
    module = getattr(sys.modules["__main__"], "__spec__", None)  # of `python -m tools.analyze`
    parser = _Parser(
        prog=f"python -m {module.name}" if module else None, description=textwrap.fill(about.strip(), 80),
        epilog=textwrap.dedent(examples).strip(), allow_abbrev=False,
        argument_default=argparse.SUPPRESS, formatter_class=_Help,
    )  # fmt: skip
    group = parser
    for field in dataclasses.fields(Config):
        if field.metadata["group"]:
            group = parser.add_argument_group(field.metadata["group"])
        if field.metadata.get("positional"):
            several = dict(nargs="+") if field.type is tuple else {}
            group.add_argument(field.name, metavar=field.metadata["metavar"], help=field.metadata["help"], **several)
        elif not field.metadata.get("setting"):
            group.add_argument(as_flag(field.name), **_options(field, recipes))
    return parser


def _options(field: dataclasses.Field, recipes: dict) -> dict:
    """What argparse needs to know of one flag."""
    shown = lambda value: " ".join(value) if isinstance(value, tuple) else value  # noqa: E731
    having = {key: shown(r[field.name]) for key, r in recipes.items() if field.name in r}
    by_dataset = [f"{value} ({key})" for key, value in having.items() if isinstance(key, str)]
    own = shown(field.default) if field.default not in ("", ()) else "none"
    by_dataset += [f"else {own}"] if 0 < len(by_dataset) < sum(isinstance(key, str) for key in recipes) else []
    by_dataset += ["some methods have their own"] if any(not isinstance(key, str) for key in having) else []
    note = "[required]" if field.metadata["required"] else f"[default: {', '.join(by_dataset) or own}]"
    choices, says = field.metadata["choices"], field.metadata["help"]
    if many := len(",".join(choices)) > 50:  # more than a line of 80 columns has room for
        says += f": {', '.join(choices)}"
    options = dict(help=f"{says} {note}".replace("%", "%%"))
    if field.type is bool:
        return options | {"action": argparse.BooleanOptionalAction}
    if choices:
        options["choices"] = choices
    if not choices or many:
        options["metavar"] = field.metadata["metavar"] or {int: "N", float: "X"}.get(field.type, "NAME")
    return options | ({"nargs": "+"} if field.type is tuple else {"type": field.type})


# --- Checking what was given ------------------------------------------------------------------------------------------

ABOVE_ZERO = (
    "rank skills heads density top_k batch_size lr lr_z clip max_input max_output log_every eval_batch "
    "patience soup training_tasks window"
).split()
INTERVAL = r"([1-9]\d{0,8})(m?)"  # of --save-every
NOT_NEGATIVE = (
    "beams keep_every steps epochs micro_batch weight_decay warmup eval_examples eval_every test_examples shots seed "
    "worst best"
).split()


def check_ranges(cfg):
    """Raise UserError for a number outside its range (or not a number), naming its flag."""
    for field in dataclasses.fields(cfg):
        name, value = field.name, getattr(cfg, field.name)
        shown = name if field.metadata.get("setting") else as_flag(name)
        if name == "skills" and cfg.method in FIXED_TABLE:
            continue  # 0, until the tasks say how many
        if name in ABOVE_ZERO and not 0 < value < math.inf:
            raise UserError(f"{shown} must be above 0, not {value}")
        if name in NOT_NEGATIVE and not 0 <= value < 2**63:
            raise UserError(f"{shown} must not be negative or huge, not {value}")
        if type(value) is int and name != "seed" and value >= 2**31:
            raise UserError(f"{shown} must be below 2^31, not {value}")
        if name == "warmup" and value > 1:
            raise UserError(f"{shown} is a share of the steps and must not be above 1, not {value}")
        if name == "granularity" and not re.fullmatch(r"linear|layer|block|blocks-[1-9]\d{0,3}|coder|model", value):
            raise UserError(f"--granularity {value} is none of linear, layer, block, blocks-N, coder, model")
        if name == "save_every" and not re.fullmatch(INTERVAL, value):
            raise UserError(f"--save-every {value} is neither a number of steps, as 200, nor of minutes, as 10m")


def fit_to_method(cfg, flags: dict):
    """Set what the method of cfg (a `train.Config`) implies. Raises UserError for flags that it excludes."""
    if cfg.method == "mu":
        raise UserError("--method mu averages the skills of a finished run: give it by --from-run")
    if cfg.method in ("lora", "ia3"):
        if flags.get("adapter", cfg.method) != cfg.method:
            raise UserError(f"--adapter {cfg.adapter} does not fit --method {cfg.method}: leave --adapter out")
        cfg.adapter = cfg.method
    if cfg.method in FIXED_TABLE:
        if "skills" in flags:
            raise UserError(f"--skills does not fit --method {cfg.method}, whose tasks say how many: leave it out")
        cfg.skills = 0
    if cfg.method == "task-moe" and not 2 <= cfg.top_k <= cfg.skills:
        raise UserError(f"--method task-moe: top_k {cfg.top_k} must be at least 2 and at most --skills {cfg.skills}")
    if cfg.adapter == "ia3" and "layers" not in flags:
        cfg.layers = ""  # the recipes' layers are LoRA's


def refuse_change(saved, flags: dict, of: str):
    """Raise UserError if a flag differs from the same setting of a saved Config. of: whose it is, for the message."""
    for name, value in flags.items():
        if value != getattr(saved, name):
            raise UserError(f"{as_flag(name)} {value} does not fit {of}, whose is {getattr(saved, name)}")


def split_number(split: str, of: str) -> int:
    """--split as a whole number. of: the benchmark, for the message. Raises UserError for anything else.

    A second way to write a number, as 007, is refused too: it would name another folder for the same split.
    """
    if not re.fullmatch("0|[1-9][0-9]{0,17}", split):
        raise UserError(f"--split {split:.40} must be a whole number below 10^18 for {of}")
    return int(split)


NAMES_A_RUN = ("method", "dataset", "checkpoint", "variant", "output_dir", "device")  # in the first row of the table
OF_A_COMMAND = ("resume", "overwrite", "dry_run", "tensorboard")  # what to do now, no setting of a run


def describe(cfg, usual: dict) -> str:
    """The settings of a run as a table of 80 columns: what it is, what differs from the recipe, then the recipe's.

    usual: the recipe's values, without the settings that have no effect. What is empty, off or 0 by the recipe is left
    out; config.json has all.
    """
    rows, title = {"this run": [], "not the recipe's": []}, ""
    for field in (field for field in dataclasses.fields(cfg) if field.name not in OF_A_COMMAND):
        value, title = getattr(cfg, field.name), field.metadata["group"].partition(",")[0] or title
        shown = " ".join(value) if isinstance(value, tuple) else f"{value:,}" if type(value) is int else str(value)
        text = f"{field.name} {shown}".replace(" ", "\0")  # a name and its value stay together
        if field.name in NAMES_A_RUN:
            rows["this run"].append(text)
        elif field.name in usual and value != usual[field.name]:
            rows["not the recipe's"].append(text)
        elif field.name in usual and (value or field.name == "seed"):
            rows.setdefault(title, []).append(text)
    lines = []
    for title, texts in rows.items():
        wrapped = textwrap.wrap("  ".join(texts), 80 - 21, break_long_words=False, break_on_hyphens=False)
        lines += [f"{name:21}{line}" for name, line in zip([title, *[""] * len(wrapped)], wrapped, strict=False)]
    return "\n".join(lines).replace("\0", " ")


# --- Flags that have no effect ----------------------------------------------------------------------------------------

USED_BY = {  # flags of some methods only
    "heads": ("mhr",), "routing": ("poly", "mhr"), "skills": ROUTED, "granularity": (*LEARNED, "random"),
    "lr_z": LEARNED, "random_by": ("random",), "top_k": ("task-moe",), "encoder": ("adapter-soup",),
    "soup": ("adapter-soup",),
}  # fmt: skip
OF_ADAPTER = {"rank": "lora", "density": "sft"}
OF_DATASET = {
    "split": ("strings", "strings-single", "crossfit"),
    "instructions": ("strings",),
    "partition": ("crossfit",),
}
NOT_OF_VARIANT = {"z": ("lr",), "mu": ("lr_z",), "lora": ("lr_z",)}


def unused(cfg, flags: dict, variant: str = "") -> list[str]:
    """The flags in `flags` that have no effect on training with the settings cfg (a `train.Config`), or, if a variant
    is given, on adapting what was trained so."""
    names = [name for name in flags if cfg.method not in USED_BY.get(name, METHODS)]
    names += [name for name in flags if cfg.adapter != OF_ADAPTER.get(name, cfg.adapter)]
    names += [name for name in flags if not variant and cfg.dataset not in OF_DATASET.get(name, (cfg.dataset,))]
    names += [name for name in flags if name in NOT_OF_VARIANT.get(variant, ())]
    return [as_flag(name) for name in dict.fromkeys(names)]


def in_use(cfg, values: dict, variant: str = "") -> dict:
    """Of these settings those that have an effect: see `unused`."""
    idle = unused(cfg, values, variant) + ["--skills"] * (cfg.method in FIXED_TABLE)  # there the tasks say how many
    return {name: value for name, value in values.items() if as_flag(name) not in idle}


def one_job(cfg, flags: dict, uses: dict[str, tuple[str, ...]]):
    """Refuse two jobs at a time (UserError), and name the flags that have no effect on the one.

    uses: for each flag that asks for a job, its companion flags; companion flags do not count as a second job.
    """
    asked = [name for name in uses if getattr(cfg, name)]
    jobs = [name for name in asked if not any(name in uses[other] for other in asked)]
    if len(jobs) > 1:
        raise UserError(f"{as_flag(jobs[0])} and {as_flag(jobs[1])} are two jobs: give one of them")
    for job in jobs:
        if ignored := [as_flag(name) for name in flags if name not in (job, *uses[job])]:
            print(f"ignored with {as_flag(job)}: {', '.join(ignored)}")
