"""What goes wrong around a run: clocks, folders, disks, terminals. It ends in one sentence, or makes no difference."""

import contextlib
import errno
import fcntl
import io
import json
import os
import pty
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tqdm

import adapt
import inject
import plumbing.run
import plumbing.tasks
import train
from plumbing.backbones import load_backbone
from plumbing.checkpoint import Progress
from plumbing.errors import RunError, UserError, exit_on_user_error
from plumbing.flags import explicit_flags
from plumbing.folders import CHECKPOINT
from tests.helpers import log_lines, same_run
from tests.stress import faults, kills, longrun, scale, targets

ROOT = Path(__file__).resolve().parents[1]
STEPS = 6
FLAGS = dict(
    method="poly", dataset="strings", rank=1, skills=2, steps=STEPS, batch_size=4, max_input=8, max_output=4,
    eval_examples=0, log_every=2, save_every="1", seed=3, device="cpu",
)  # fmt: skip
FEW = dict(steps=2, eval_every=1, batch_size=4, shots=4, test_examples=1, tasks="sort+double")


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> dict:
    return FLAGS | dict(backbone=kills.small_backbone(tmp_path_factory.mktemp("backbone")))


@pytest.fixture(scope="module")
def reference(flags, tmp_path_factory) -> Path:
    """A run around which nothing goes wrong."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    train.main(flags | dict(output_dir=str(folder)))
    assert [line["step"] for line in log_lines(folder)] == [2, 4, 6]
    return folder


def failed(capsys, main, flags: dict) -> tuple[int, str]:
    """The exit code and the one sentence of a program that fails."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        exit_on_user_error(main, flags)
    said = [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if "Loading weights" not in line and line]
    assert len(said) == 1 and said[0].startswith("error: ")
    return stopped.value.code, said[0]


def after(count: int, module, name: str, what):
    """A stand-in for module.name: from the count-th call on, what() comes first."""
    real, calls = getattr(module, name), []

    def stand_in(*args, **kwargs):
        calls.append(args)
        if len(calls) >= count:
            what()
        return real(*args, **kwargs)

    return stand_in


# --- Clocks -----------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_clock_that_goes_backwards(monkeypatch, flags, reference, tmp_path):
    """By an hour each time it is read: the bar gets to its end, the log's seconds rise, the run is the same."""
    clock, terminal = [2e9], Terminal()

    def earlier() -> float:
        clock[0] -= 3600
        return clock[0]

    monkeypatch.setattr(time, "time", earlier)
    monkeypatch.setattr(tqdm.std, "time", earlier)  # tqdm's own name for it
    monkeypatch.setattr(sys, "stderr", terminal)
    train.main(flags | dict(output_dir=str(tmp_path / "run")))
    same_run(tmp_path / "run", reference)
    seconds = [json.loads(line)["seconds"] for line in open(tmp_path / "run" / "log.jsonl")]
    assert seconds == sorted(seconds) and seconds[0] >= 0
    assert clock[0] < 2e9 - 3600 and f"{STEPS}/{STEPS}" in terminal.getvalue()


@pytest.mark.parametrize("minutes, saves", [(0.1, [6]), (0.4, [3, 6])])
def test_minutes_between_checkpoints_are_not_those_of_the_wall_clock(monkeypatch, flags, tmp_path, minutes, saves):
    """--save-every 1m counts the time since the start, here so many minutes a step, whatever the clock is set to."""
    wall, since_start, saved, real = [0.0], [0.0], [], plumbing.run.save_checkpoint

    def step():
        wall[0] -= 1e6
        since_start[0] += 60 * minutes

    monkeypatch.setattr(train, "refuse_nonfinite", after(1, train, "refuse_nonfinite", step))
    monkeypatch.setattr(plumbing.run, "time", SimpleNamespace(monotonic=lambda: since_start[0], time=lambda: wall[0]))
    monkeypatch.setattr(plumbing.run, "save_checkpoint", lambda *args: (saved.append(args[3].step), real(*args)))
    train.main(flags | dict(output_dir=str(tmp_path / "run"), save_every="1m"))
    assert saved == saves


# --- Folders and disks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module, name, count",
    [(plumbing.run, "save_checkpoint", 1), (plumbing.run.Log, "write", 1), (train, "write_json", 2)],
)
def test_the_folder_is_removed_during_a_run(monkeypatch, capsys, flags, tmp_path, module, name, count):
    """By hand, before a checkpoint, a line of the log or the result: one sentence and exit code 1; the folder does not
    come back, and nothing else is left."""
    folder = tmp_path / "run"
    monkeypatch.setattr(module, name, after(count, module, name, lambda: shutil.rmtree(folder, ignore_errors=True)))
    code, said = failed(capsys, train.main, flags | dict(output_dir=str(folder)))
    assert code == 1 and said == f"error: {folder} was removed during the run: nothing is left, start it again"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module, name", [(adapt, "save_trained"), (plumbing.tasks, "write_json")])
def test_the_folder_of_an_adaptation_is_removed(monkeypatch, capsys, reference, tmp_path, module, name):
    folder = tmp_path / "few"
    monkeypatch.setattr(module, name, after(1, module, name, lambda: shutil.rmtree(folder)))
    code, said = failed(capsys, adapt.main, FEW | dict(checkpoint=str(reference), output_dir=str(folder)))
    assert code == 1 and f"{folder} was removed" in said and not list(tmp_path.iterdir())


def test_the_folder_becomes_read_only(monkeypatch, capsys, flags, reference, tmp_path):
    """During the run: one sentence that names the file, exit code 1; the last checkpoint is whole, and the run resumes
    from it."""
    folder, now = tmp_path / "run", flags | dict(output_dir=str(tmp_path / "run"))

    def refuse():
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", after(6, os, "replace", refuse))  # tasks, config, three checkpoints
        code, said = failed(capsys, train.main, now)
    assert code == 1 and said.startswith(f"error: {folder / CHECKPOINT}: cannot be written: Read-only file system")
    assert not list(folder.glob("*.tmp"))
    train.main(now | dict(resume=True))
    same_run(folder, reference)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_the_folder_is_read_only_from_the_start(monkeypatch, capsys, flags, tmp_path, number):
    """One sentence and exit code 2, before anything is loaded."""
    real = os.open

    def refuse(path, *args, **kwargs):
        if str(path).startswith(str(tmp_path)):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    code, said = failed(capsys, train.main, flags | dict(output_dir=str(tmp_path)))
    assert code == 2 and said == f"error: --output-dir {tmp_path} cannot be made or written: {os.strerror(number)}"
    assert not list(tmp_path.iterdir())


def test_a_file_stands_where_the_folder_should_be(capsys, flags, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        code, said = failed(capsys, train.main, flags | dict(output_dir=str(folder)))
        assert code == 2 and f"--output-dir {folder} cannot be made or written" in said
    assert (tmp_path / "file").read_text() == "mine"


@contextlib.contextmanager
def files_up_to(size: int):
    """The system's limit on the size of a file, in bytes (ulimit -f): writing more fails with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_limit_on_the_size_of_files(monkeypatch, capsys, flags, reference, tmp_path):
    """A checkpoint that is too large: one sentence, exit code 1; the last one stays, and the run resumes without the
    limit."""
    folder, now = tmp_path / "run", flags | dict(output_dir=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(train, "refuse_nonfinite", after(4, train, "refuse_nonfinite", lambda: sys.exit(1)))
        pytest.raises(SystemExit, train.main, now)
    before = (folder / CHECKPOINT).read_bytes()
    with files_up_to(len(before) // 2):
        code, said = failed(capsys, train.main, now | dict(resume=True))
    assert code == 1 and said.startswith(f"error: {folder / CHECKPOINT}: cannot be written: ")
    assert "File too large" in said and (folder / CHECKPOINT).read_bytes() == before
    assert not list(folder.glob("*.tmp"))
    train.main(now | dict(resume=True))
    same_run(folder, reference)


# --- Terminals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns, vanishes", [(0, False), (3, False), (10, True)])
def test_a_narrow_terminal_and_one_that_vanishes(monkeypatch, flags, reference, tmp_path, columns, vanishes):
    """A real terminal of so many columns, perhaps closed before the first line of the log: the run is the same."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    if vanishes:
        monkeypatch.setattr(plumbing.run.Log, "write", after(1, plumbing.run.Log, "write", lambda: close(ours)))
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = open(theirs, "w")
    monkeypatch.setattr(sys, "stderr", terminal)
    train.main(flags | dict(output_dir=str(tmp_path / "run")))
    same_run(tmp_path / "run", reference)
    shown = "" if vanishes else os.read(ours, 10**6).decode()
    assert vanishes or "train poly" in shown or columns  # 0 columns: a terminal that does not say how many
    with contextlib.suppress(OSError):  # what the one that is gone did not take
        terminal.close()
    close(ours)


def close(number: int):
    with contextlib.suppress(OSError):
        os.close(number)


def test_standard_output_and_error_are_missing(monkeypatch, flags, reference, tmp_path):
    """Python starts so with closed ones: the null device stands in for them, and the run is the same."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    explicit_flags(train.Config, {}, [])
    print("nothing sees this", file=sys.stderr)
    train.main(flags | dict(output_dir=str(tmp_path / "run")))
    same_run(tmp_path / "run", reference)


@pytest.mark.slow
def test_standard_output_and_error_are_closed(flags, reference, tmp_path):
    """`train.py >&- 2>&-`, as a badly made service starts it: the run is the same. Without the null device tqdm fails,
    and what a library prints goes into a file of the run that got descriptor 1 or 2."""
    words = [f"--{key.replace('_', '-')}={value}" for key, value in flags.items()]
    command = [sys.executable, str(ROOT / "train.py"), *words, f"--output-dir={tmp_path / 'run'}"]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command])
    assert done.returncode == 0
    same_run(tmp_path / "run", reference)


def test_only_the_first_process_shows_progress(monkeypatch):
    """The other processes draw no bar on the shared terminal; their errors are printed."""
    fake = io.StringIO()
    fake.isatty = lambda: True
    for rank, hidden in (("0", False), ("1", True)):
        with monkeypatch.context() as patch:
            patch.setenv("RANK", rank)
            patch.setattr(sys, "stdout", io.StringIO())
            patch.setattr(sys, "stderr", fake)
            explicit_flags(train.Config, {}, [])
            assert tqdm.tqdm([], disable=None).disable is (True if hidden else None)
            print("an error", file=sys.stderr)
    assert fake.getvalue().count("an error") == 2


# --- --deterministic --------------------------------------------------------------------------------------------------


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_algorithms(deterministic, flags, reference, tmp_path):
    """torch and cuBLAS are set before CUDA starts; on a CPU not a bit changes."""
    train.main(flags | dict(output_dir=str(tmp_path / "run"), deterministic=True))
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and not torch.cuda.is_initialized()
    same_run(tmp_path / "run", reference)
    torch.use_deterministic_algorithms(False)
    adapt.main(FEW | dict(checkpoint=str(reference), output_dir=str(tmp_path / "few"), deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()


def test_an_operation_that_cannot_be_deterministic(deterministic, monkeypatch, capsys, flags, tmp_path):
    """put_ is one on a CPU too: one sentence that names it."""
    monkeypatch.setattr(
        train, "token_loss", lambda *args, **options: torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    )
    flags = flags | dict(output_dir=str(tmp_path / "run"), deterministic=True)
    code, said = failed(capsys, train.main, flags)
    assert (code, said) == (1, "error: --deterministic: put_ has no deterministic form, leave the flag out")


# --- Kills ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [2, pytest.param(25, marks=pytest.mark.slow)])
def test_a_few_kills(wanted):
    """Runs of adapt.py and train.py, killed and resumed to their end, equal uninterrupted ones."""
    head, train_line, adapt_line, last = kills.kills(wanted, 0).splitlines()
    assert last.startswith(f"{wanted} kills; an uninterrupted run: train.py ")
    fell = [[int(n) for n in line.split()[1:]] for line in (train_line, adapt_line)]
    assert all(sum(row[:4]) == row[4] for row in fell) and sum(row[4] for row in fell) == wanted
    assert fell[1][6] > 0 and head.endswith("runs, all equal")


def test_what_makes_two_runs_different(tmp_path):
    """A value of the optimiser, the log or a score; not the seconds, the folder's name or the order of a set."""

    def make(name: str, step=1.0, loss=2.0, score=3.0, trained=(0, 1)) -> Path:
        folder, seconds = tmp_path / name, len(name)
        folder.mkdir()
        (folder / "log.jsonl").write_text(json.dumps({"loss": loss, "seconds": seconds}) + "\n")
        (folder / "result.json").write_text(json.dumps({"mean": score, "seconds": seconds}))
        (folder / "config.json").write_text(json.dumps({"output_dir": name}))
        state = json.dumps({"seconds": seconds, "trained": trained})
        inject.write_tensors({"optimizer.0.step": torch.tensor(step)}, str(tmp_path / (name + kills.LAST)), state=state)
        return folder

    reference = kills.contents(make("a"))
    assert len(reference) == 5 and kills.differences(make("bb", trained=(1, 0)), reference) == []
    assert kills.differences(make("c", step=1.5), reference) == ["checkpoint: optimizer.0.step"]
    assert kills.differences(make("d", loss=2.5), reference) == ["log.jsonl"]
    assert kills.differences(make("e", score=3.5), reference) == ["result.json"]
    (tmp_path / f"a{kills.LAST}").unlink()
    assert kills.differences(tmp_path / "a", reference) == ["checkpoint: optimizer.0.step", "checkpoint: state"]


def test_a_step_that_is_saved_again_is_noticed():
    seen = [0, 3, 0]
    save = kills.counted(lambda *args: None, seen)
    save("path", "model", "optimizer", Progress(4), {})
    assert seen == [0, 4, 0]
    save("path", "model", "optimizer", Progress(4), {})
    assert seen == [0, 4, 1]


def test_files_left_half_written_are_counted(tmp_path):
    """Ours and safetensors' own, also in folders of splits; whole files are not. The newest one counts."""
    (tmp_path / "0").mkdir()
    assert kills.half_files(tmp_path) == 0
    for seconds, name in enumerate(("log.jsonl.tmp", ".tmpAb12cd", "0/.tmpzzzzzz", "0/a.json.tmp", "a.json"), 1):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (seconds, seconds))
        assert kills.half_files(tmp_path) == min(seconds, 4) * 10**9, name


# --- Many mutated files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [120, pytest.param(600, marks=pytest.mark.slow)])
def test_some_mutated_inputs(monkeypatch, tmp_path, wanted):
    """Files of all benchmarks and of runs, the authors' files, command lines: each is accepted, or refused in one
    sentence. What `datasets` makes of them stays out of the user's cache."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    table = faults.mutations(wanted, 1, tmp_path / "bad")
    assert table.endswith(f"\n{wanted:,} mutations, 0 bad"), table
    names = ("t0", "superni rows", "crossfit", "checkpoint", "TASK.json", "PEFT's Poly", "authors' file")
    assert all(re.search(rf"^{name} .*[1-9]", table, re.M) for name in names), table
    assert not (tmp_path / "home" / "datasets").exists()


def test_what_watches_a_reader(monkeypatch, tmp_path):
    """A reader that hangs, dies or raises what it should not is counted, described and replaced. Each mutation is done
    once; a number stands for the same one in another process."""

    def refuse(text):
        raise UserError(text)

    kinds = {
        "fine": lambda chance: None, "refuses": lambda chance: refuse("no"),
        "raises": lambda chance: [][0], "dies": lambda chance: os._exit(3), "hangs": lambda chance: time.sleep(60),
    }  # fmt: skip
    monkeypatch.setattr(targets, "targets", lambda root: {name: (1, one) for name, one in kinds.items()})
    monkeypatch.setattr(faults, "LIMIT", 1)
    fork = faults.multiprocessing.get_context("fork")  # a child with these targets
    monkeypatch.setattr(faults.multiprocessing, "get_context", lambda name: fork)
    outcomes = {n: (name, outcome) for n, name, outcome, *_ in faults.outcomes(tmp_path, 0, 0, 14) if n >= 0}
    wanted = dict(fine="read", refuses="refused", raises="IndexError", dies="died", hangs="hang")
    assert sorted(outcomes) == list(range(14)) and set(outcomes.values()) == set(wanted.items())
    bad = next(n for n, (name, _) in outcomes.items() if name == "dies")
    table = faults.mutations(1, 0, tmp_path / "bad", bad)
    assert table.endswith("\n1 mutations, 1 bad") and re.search(r"^dies +0 +0 +1 ", table, re.M)
    assert (tmp_path / "bad" / f"{bad}.txt").read_text() == "dies: died: exit code 3\n"


def test_what_a_reader_writes_is_noticed(tmp_path):
    """A new, a changed or a missing file, also beside the one that is read; that one is put back."""
    (tmp_path / "a").write_text("mine")
    (tmp_path / "b").write_text("other")
    for write in (
        lambda: (tmp_path / "new").write_text(""), lambda: (tmp_path / "b").write_text("other"),
        lambda: (tmp_path / "a").write_text("x"), lambda: (tmp_path / "a").unlink(), lambda: (tmp_path / "b").unlink(),
    ):  # fmt: skip
        with pytest.raises(AssertionError, match="a reader has written"):
            with targets.replaced(tmp_path / "a", b"changed", tmp_path):
                write()
        assert (tmp_path / "a").read_text() == "mine"
    with targets.replaced(tmp_path / "a", b"changed", tmp_path):
        assert (tmp_path / "a").read_text() == "changed"


def test_what_is_read_is_compared(tmp_path):
    """Another number of examples than the file has, or other tensors than it holds."""
    path, chance = tmp_path / "a.tsv", random.Random(0)
    path.write_text("x\ty\n" * 5)
    lines = lambda path, old, new: targets.examples_in(path, new)  # noqa: E731
    for read, right in ((lambda: len(path.read_bytes().splitlines()), True), (lambda: 5, False)):
        one = targets.files(tmp_path, [path], read, lambda old, chance: old + b"x\ty\n", lines)
        with contextlib.nullcontext() if right else pytest.raises(AssertionError, match="is accepted as 5, and not 6"):
            one(chance)
    inject.write_tensors({"a": torch.ones(2)}, str(tmp_path / "t"))
    one = targets.signed(tmp_path, tmp_path / "t", lambda: None, lambda: {"a": torch.ones(2)})
    with pytest.raises(AssertionError, match="what was read is not what the file holds"):
        one(chance)


def test_examples_are_counted_without_the_readers(tmp_path):
    for name, content, count in (
        ("a_16_100_train.tsv", b"x\ty\nx\ty\n", 2), ("a_16_100_train.tsv", b"x\ty\nx\t", 2), ("task1.json",
        b'{"Instances": [1, 2, 3]}', 3), ("p3/ag_news_classify/validation.jsonl", b"{}\n{}\n", 4),
        ("p3/ag_news_classify/train.jsonl", b"{}\n", 1), ("few_shot/copa/32_shot/42_seed.jsonl", b"{}\n", 0),
        ("p3/super_glue_rte_should_assume/validation.jsonl", b"{}\n", 0),
    ):  # fmt: skip
        assert targets.examples_in(tmp_path / name, content) == count, name


def test_what_comes_into_a_line_ends_none():
    """Letters, quotes, NUL, CR, U+2028: other bytes, but the same number of lines."""
    content, chance = b"a b\tc\nd\te\n", random.Random(0)
    changed = [targets.in_a_line(content, chance) for _ in range(200)]
    assert {new.count(b"\n") for new in changed} == {2} and {new.count(b"\t") for new in changed} == {2}
    assert all(any(odd in new for new in changed) for odd in (b"\r", b"\0", b'"', "\u2028".encode()))


@pytest.mark.parametrize(
    "file, name", [("config.json", "num_layers"), ("config.json", "num_decoder_layers"),
                   ("tokenizer_config.json", "extra_ids")],
)  # fmt: skip
def test_a_backbone_of_endless_layers_or_tokens(tmp_path, file, name):
    """One sentence, before any of them is made."""
    folder = Path(kills.small_backbone(tmp_path / "backbone"))
    settings = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(settings | {name: 20_000}))
    with pytest.raises(UserError, match=f"cannot be loaded: its {name} is more than 10,000"):
        load_backbone(str(folder), "cpu")


# --- Long runs --------------------------------------------------------------------------------------------------------


GROWS = """
import json, sys, time
sys.argv[2:] and sys.exit("no more")
log, kept, files = open(sys.argv[1], "w"), [], []
for step in range(1, 9):
    kept.append(b"x" * 2**22)
    files.append(open(sys.argv[0]))
    print(json.dumps({"step": step, "loss": 1.0}), file=log, flush=True)
    time.sleep(0.2)
"""


def test_a_process_is_watched(capsys, tmp_path):
    """From outside, here one that takes 4 MB more and opens a file at each step: rows for every other step."""
    script, log = tmp_path / "script.py", tmp_path / "log.jsonl"
    script.write_text(GROWS)
    rows = longrun.watched([sys.executable, str(script), str(log)], log, 2)
    steps = [row[0] for row in rows]
    assert len(rows) >= 3 and steps[-1] == 8 and len({step // 2 for step in steps}) == len(steps)
    assert all(row[3] * 8 == log.stat().st_size * row[0] for row in rows)
    for (_, memory, files, *_), (_, more, opened, *_) in zip(rows, rows[1:], strict=False):
        assert more - memory > 0.9 * 2**22 and opened > files
    assert not longrun.verdict(rows, 500, 1)[1] and f"step {steps[0]}  " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="^error: .*script.py .* ended with 1: no more$"):
        longrun.watched([sys.executable, str(script), str(log), "fail"], log, 2)


@pytest.mark.slow
def test_a_long_run_is_watched(monkeypatch, capsys):
    """Both runs, as short as may be: rows of memory, open files and log; the limit of --allowed decides."""
    line = "--steps 80 --log-every 5 --allowed 1e6"
    monkeypatch.setattr(sys, "argv", ["longrun", *line.split()])
    monkeypatch.setenv("HF_DATASETS_CACHE", "")
    with pytest.raises(SystemExit) as ended:
        longrun.main()
    said = capsys.readouterr().out
    assert not ended.value.code and said.count(": flat\n") == 2
    for dataset, steps in (("strings", range(5, 81, 5)), ("t0", range(5, 21, 5))):
        table = said.split(f"\n{dataset} ")[1].split("\nsteps ")[0].splitlines()[1:]
        assert [int(row.split()[0]) for row in table] == list(steps)
        assert all(float(row.split()[1]) > 100 and int(row.split()[2]) > 3 for row in table)


def test_what_is_said_of_a_long_run():
    """A kilobyte a step, one more open file or a long line of the log is growth; pools that fill up in the first half,
    or a single jump, are not."""

    def rows(grows=lambda step: 0, files=lambda step: 8, line=100):
        steps = range(1000, 20_001, 1000)
        return [(s, 10**8 + grows(s), files(s), s // 50 * line, 0.0) for s in steps]

    text, good = longrun.verdict(rows(lambda s: 10**8 * (s >= 5000) + 100 * s), 500, 50)
    assert good and text == (
        "steps 10,000 to 20,000: memory +100 bytes a step (allowed 500), in all +1.0 MB, open files +0; "
        "log 2.0 bytes a step, 100 a line (allowed 200): flat"
    )
    assert longrun.verdict(rows(lambda s: 2_000_000 * (s > 12_000)), 500, 50)[1]
    for wrong in (rows(lambda s: 1024 * s), rows(files=lambda s: 8 + (s > 15_000)), rows(line=300)):
        text, good = longrun.verdict(wrong, 500, 50)
        assert not good and text.endswith("IT GROWS")


# --- Flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module, line, named",
    [
        (faults, "", "give --kills NUMBER, --mutations NUMBER or both"), (faults, "--first 3", "give --kills"),
        (faults, "--mutations -5", "--mutations must not be negative"), (faults, "--kills -1", "--kills must not be"),
        (faults, "--mutations 1 --first -1", "--first must"), (faults, "--mutations 1 --bad-dir FILE", "--bad-dir"),
        (longrun, "--steps 0", "--steps must be"), (longrun, "--steps -1", "--steps must be"),
        (longrun, "--every -1", "--every"), (longrun, "--every 2000", "--every"), (longrun, "--log-every 0", "--log"),
        (longrun, "--allowed nan", "--allowed"), (longrun, "--allowed -1", "--allowed"),
        (longrun, "--log-every 20000", "--log-every"), (longrun, "--steps 3000000000", "--steps must be"),
        (scale, "--rows 0", "--rows must be at least 10"), (scale, "--rows 10 -1", "--rows must be"),
        (scale, "--rows 9", "--rows must be"), (scale, "--rows 3000000000", "--rows must be"),
    ],
)  # fmt: skip
def test_flags_that_cannot_be(monkeypatch, capsys, tmp_path, module, line, named):
    """One sentence that names the flag, exit code 2, and no work."""
    (tmp_path / "FILE").write_text("mine")
    monkeypatch.chdir(tmp_path)
    for work in ("kills", "mutations", "measure", "run"):
        monkeypatch.setattr(module, work, None, raising=False)
    monkeypatch.setattr(sys, "argv", [module.__name__, *line.split()])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    said = capsys.readouterr().err.split("error: ")
    assert stopped.value.code == 2 and len(said) == 2 and named in said[1]
    assert (tmp_path / "FILE").read_text() == "mine"


def test_rows_that_cannot_be_read(monkeypatch):
    """The error of the process that reads becomes a RunError."""
    monkeypatch.setattr(scale, "write_rows", lambda folder, rows: None)
    failed = SimpleNamespace(returncode=1, stdout="", stderr="error: the disk is full\n")
    monkeypatch.setattr(scale.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(RunError, match="reading 10 rows failed: error: the disk is full"):
        scale.measure((10,))
