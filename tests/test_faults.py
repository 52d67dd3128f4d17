"""What goes wrong around a run: clocks, folders, disks and terminals. One sentence or no difference at all."""

import contextlib
import errno
import fcntl
import io
import json
import os
import pty
import re
import resource
import shutil
import signal
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
import config
import resume
import train
from experiments import faults, longrun

ROOT = Path(__file__).resolve().parents[1]
STEPS = 6
FLAGS = dict(
    method="poly", dataset="strings", rank=1, skills=2, steps=STEPS, batch_size=4, max_input=8, max_output=4,
    eval_examples=0, log_every=2, save_every="1", seed=3, device="cpu",
)  # fmt: skip
FEW = dict(steps=2, eval_every=1, batch_size=4, shots=4, test_examples=1, tasks="sort+double")


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """A run around which nothing goes wrong."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    train.main(FLAGS | dict(output_dir=str(folder)))
    return folder


def same(folder: Path, reference: Path):
    """Two finished runs have the same files, the same bits of what was trained, and the same log but for seconds."""
    assert {p.name for p in folder.iterdir()} == {p.name for p in reference.iterdir()}
    assert (folder / "adapter.safetensors").read_bytes() == (reference / "adapter.safetensors").read_bytes()
    logs = [[json.loads(line) | {"seconds": 0} for line in open(f / "log.jsonl")] for f in (folder, reference)]
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == [2, 4, 6]


def failed(capsys, main, flags: dict) -> tuple[int, str]:
    """The exit code and the one sentence of a program that fails."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        config.exit_on_user_error(main, flags)
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


def test_a_clock_that_goes_backwards(monkeypatch, reference, tmp_path):
    """Every look at the clock finds it an hour earlier: the bar gets to its end, the log counts seconds upwards, and
    the run is the same."""
    clock, terminal = [2e9], Terminal()

    def earlier() -> float:
        clock[0] -= 3600
        return clock[0]

    monkeypatch.setattr(time, "time", earlier)
    monkeypatch.setattr(tqdm.std, "time", earlier)  # tqdm's own name for it
    monkeypatch.setattr(sys, "stderr", terminal)
    train.main(FLAGS | dict(output_dir=str(tmp_path / "run")))
    same(tmp_path / "run", reference)
    seconds = [json.loads(line)["seconds"] for line in open(tmp_path / "run" / "log.jsonl")]
    assert seconds == sorted(seconds) and seconds[0] >= 0
    assert clock[0] < 2e9 - 3600 and f"{STEPS}/{STEPS}" in terminal.getvalue()


@pytest.mark.parametrize("minutes, saves", [(0.1, [6]), (0.4, [3, 6])])
def test_minutes_between_checkpoints_are_not_those_of_the_wall_clock(monkeypatch, tmp_path, minutes, saves):
    """--save-every 1m goes by the time since the start (here so many minutes a step), not by a clock that is set."""
    wall, since_start, done, real = [0.0], [0.0], [], train.save_checkpoint

    def step():
        wall[0] -= 1e6
        since_start[0] += 60 * minutes

    monkeypatch.setattr(train, "refuse_nonfinite", after(1, train, "refuse_nonfinite", step))
    monkeypatch.setattr(resume, "time", SimpleNamespace(monotonic=lambda: since_start[0], time=lambda: wall[0]))
    monkeypatch.setattr(train, "save_checkpoint", lambda *args: (done.append(args[3].step), real(*args)))
    train.main(FLAGS | dict(output_dir=str(tmp_path / "run"), save_every="1m"))
    assert done == saves


# --- Folders and disks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["save_checkpoint", "write_line", "write_json"])
def test_the_folder_is_removed_while_the_run_is_at_work(monkeypatch, capsys, tmp_path, name):
    """By hand, before a checkpoint, a line of the log or the result: one sentence and exit code 1; neither
    the folder nor anything else is there afterwards."""
    folder, count = tmp_path / "run", 3 if name == "write_json" else 1  # the third one is result.json
    monkeypatch.setattr(train, name, after(count, train, name, lambda: shutil.rmtree(folder, ignore_errors=True)))
    code, said = failed(capsys, train.main, FLAGS | dict(output_dir=str(folder)))
    assert (
        code == 1 and said == f"error: {folder} was removed while the run was at work: nothing is left, begin it again"
    )
    assert not list(tmp_path.iterdir())


def test_the_folder_of_an_adaptation_is_removed(monkeypatch, capsys, reference, tmp_path):
    folder = tmp_path / "few"
    monkeypatch.setattr(adapt, "save_task", after(1, adapt, "save_task", lambda: shutil.rmtree(folder)))
    code, said = failed(capsys, adapt.main, FEW | dict(checkpoint=str(reference), output_dir=str(folder)))
    assert code == 1 and f"{folder} was removed" in said and not list(tmp_path.iterdir())


def test_the_folder_becomes_read_only(monkeypatch, capsys, reference, tmp_path):
    """While the run is at work: one sentence that names the file, exit code 1, the checkpoint before is whole, and the
    run goes on from it."""
    folder, now = tmp_path / "run", FLAGS | dict(output_dir=str(tmp_path / "run"))

    def refuse():
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", after(6, os, "replace", refuse))  # config, tasks, log; checkpoints 1 and 2
        code, said = failed(capsys, train.main, now)
    assert code == 1 and said.startswith(
        f"error: {folder / resume.CHECKPOINT}: cannot be written: Read-only file system"
    )
    assert not list(folder.glob("*.tmp"))
    train.main(now | dict(resume=True))
    same(folder, reference)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_the_folder_is_read_only_from_the_start(monkeypatch, capsys, tmp_path, number):
    """Nothing can be made in it: one sentence and exit code 2, before anything is loaded."""
    real = os.open

    def refuse(path, *args, **kwargs):
        if str(path).startswith(str(tmp_path)):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    code, said = failed(capsys, train.main, FLAGS | dict(output_dir=str(tmp_path)))
    assert code == 2 and said == f"error: --output-dir {tmp_path} cannot be made or written: {os.strerror(number)}"
    assert not list(tmp_path.iterdir())


def test_a_file_stands_where_the_folder_should_be(capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        code, said = failed(capsys, train.main, FLAGS | dict(output_dir=str(folder)))
        assert code == 2 and f"--output-dir {folder} cannot be made or written" in said
    assert (tmp_path / "file").read_text() == "mine"


@contextlib.contextmanager
def files_up_to(size: int):
    """The system's own limit (ulimit -f, in bytes): what writes more gets EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_limit_on_the_size_of_files(monkeypatch, capsys, reference, tmp_path):
    """A checkpoint that is too large: one sentence, exit code 1, the one before stays, and the run goes on later."""
    folder, now = tmp_path / "run", FLAGS | dict(output_dir=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(train, "refuse_nonfinite", after(4, train, "refuse_nonfinite", lambda: sys.exit(1)))
        pytest.raises(SystemExit, train.main, now)
    before = (folder / resume.CHECKPOINT).read_bytes()
    with files_up_to(len(before) // 2):
        code, said = failed(capsys, train.main, now | dict(resume=True))
    assert code == 1 and said.startswith(f"error: {folder / resume.CHECKPOINT}: cannot be written: ")
    assert "File too large" in said and (folder / resume.CHECKPOINT).read_bytes() == before
    assert not list(folder.glob("*.tmp"))
    train.main(now | dict(resume=True))
    same(folder, reference)


# --- Terminals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns, vanishes", [(0, False), (3, False), (10, True)])
def test_a_narrow_terminal_and_one_that_vanishes(monkeypatch, reference, tmp_path, columns, vanishes):
    """A real terminal of so many columns, which may be closed before the first line of the log: the run is the same."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    if vanishes:
        monkeypatch.setattr(train, "write_line", after(1, train, "write_line", lambda: close(ours)))
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = open(theirs, "w")
    monkeypatch.setattr(sys, "stderr", terminal)
    train.main(FLAGS | dict(output_dir=str(tmp_path / "run")))
    same(tmp_path / "run", reference)
    shown = "" if vanishes else os.read(ours, 10**6).decode()
    assert vanishes or "train poly" in shown or columns  # 0 columns: a terminal that does not say how many
    with contextlib.suppress(OSError):  # what the one that is gone did not take
        terminal.close()
    close(ours)


def close(number: int):
    with contextlib.suppress(OSError):
        os.close(number)


def test_standard_output_and_error_are_closed(reference, tmp_path):
    """`train.py >&- 2>&-`, as a badly made service starts it: the run is the same. Without the null device in their
    place tqdm fails, and what a library prints would go into the files of the run, which got their numbers."""
    words = [f"--{key.replace('_', '-')}={value}" for key, value in FLAGS.items()]
    command = [sys.executable, str(ROOT / "train.py"), *words, f"--output-dir={tmp_path / 'run'}"]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command], env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0
    same(tmp_path / "run", reference)


def test_only_the_first_process_shows_progress(monkeypatch):
    """Of several processes the others draw no bar on the terminal that they share, but may tell an error."""
    fake = io.StringIO()
    fake.isatty = lambda: True
    for rank, hidden in (("0", False), ("1", True)):
        with monkeypatch.context() as patch:
            patch.setenv("RANK", rank)
            patch.setattr(sys, "stdout", io.StringIO())
            patch.setattr(sys, "stderr", fake)
            config.explicit_flags(train.Config, {}, [])
            assert tqdm.tqdm([], disable=None).disable is (True if hidden else None)
            print("an error", file=sys.stderr)
    assert fake.getvalue().count("an error") == 2


# --- --deterministic --------------------------------------------------------------------------------------------------


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_algorithms(deterministic, reference, tmp_path):
    """torch and cuBLAS are told before CUDA starts; on a CPU nothing changes, not a bit."""
    train.main(FLAGS | dict(output_dir=str(tmp_path / "run"), deterministic=True))
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and not torch.cuda.is_initialized()
    same(tmp_path / "run", reference)
    torch.use_deterministic_algorithms(False)
    few = FEW | dict(checkpoint=str(reference), output_dir=str(tmp_path / "few"), deterministic=True)
    adapt.main(few)
    assert torch.are_deterministic_algorithms_enabled()


def test_an_operation_that_cannot_be_deterministic(deterministic, monkeypatch, capsys, tmp_path):
    """put_ is one on a CPU too: one sentence that names it."""
    monkeypatch.setattr(train, "batch_loss", lambda *args: torch.zeros(3).put_(torch.tensor([0]), torch.ones(1)))
    flags = FLAGS | dict(output_dir=str(tmp_path / "run"), deterministic=True)
    code, said = failed(capsys, train.main, flags)
    assert (code, said) == (1, "error: --deterministic: put_ cannot be so, leave the flag out")


# --- Many mutated files, long runs ------------------------------------------------------------------------------------


def test_some_mutated_inputs(monkeypatch, tmp_path):
    """Files of all benchmarks and of runs, the authors' files, command lines: read, or refused in one sentence."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    before = signal.getsignal(signal.SIGALRM)
    table = faults.mutations(120, 1, tmp_path / "bad")
    signal.signal(signal.SIGALRM, before)
    assert table.endswith("120 mutations, 0 neither read nor refused in one sentence"), table
    assert all(re.search(rf"^{name} .*[1-9]", table, re.M) for name in ("t0", "superni", "crossfit", "authors' file"))


def test_a_long_run_is_looked_at(tmp_path):
    """After every so many steps of a real run: memory, open files, the log so far."""
    rows = longrun.sampled(FLAGS | dict(output_dir=str(tmp_path / "run")), 2)
    assert [row[0] for row in rows] == [2, 4, 6] and all(row[1] > 10**7 and row[2] > 3 for row in rows)
    assert rows[0][3] == 0 < rows[1][3] < rows[2][3] < (tmp_path / "run" / "log.jsonl").stat().st_size


def test_what_is_said_of_a_long_run():
    """Growth counts from a tenth of the steps on; a gigabyte more, or one more file, is no flat run."""
    flat = [(k * 100, 10**8 + (k > 1) * 10**8 + k * 300_000, 8, k * 230, 0.0) for k in range(1, 21)]
    text, good = longrun.verdict(flat, 20)
    assert good and text == (
        "steps 200 to 2,000: memory +5.4 MB (allowed 20), open files +0, log 2,300 bytes per 1,000 steps: flat"
    )
    assert not longrun.verdict(flat[:-1] + [(2000, flat[0][1] + 10**9, 8, 4600, 0.0)], 20)[1]
    assert not longrun.verdict(flat[:-1] + [(2000, flat[-1][1], 9, 4600, 0.0)], 20)[1]
