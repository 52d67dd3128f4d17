"""experiments/commands.py: each command once; in the end, in time or by a failure, all that runs is stopped."""

import contextlib
import json
import math
import signal
import subprocess
import sys
import threading
import time

import pytest

from experiments import commands
from plumbing.errors import UserError
from plumbing.folders import append_line, read_lines


def pretend(monkeypatch, code: int, out: str, err: str = "", begins=lambda: None):
    """Scripts end at once, with this code and output."""

    class Process(contextlib.nullcontext):
        returncode = code

        def communicate(self, timeout=None):
            return out, err

    def start(command, **options):
        begins()
        process = Process()
        process.enter_result = process
        return process

    monkeypatch.setattr(commands.subprocess, "Popen", start)


SLOW = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(sys.argv[1] + ".saved").touch(), sys.exit(143)))
pathlib.Path(sys.argv[1] + ".began").touch()
time.sleep(60)
"""


@pytest.fixture
def slow(tmp_path):
    """A script that takes a minute, and saves what it has when it is stopped; it touches X.began and X.saved."""
    (tmp_path / "slow.py").write_text(SLOW)
    return lambda name, until=math.inf: commands.run(
        str(tmp_path / "slow.py"), [str(tmp_path / name)], tmp_path / f"{name}.json", until
    )


def test_a_script_is_stopped_when_the_time_is_over(slow, tmp_path):
    """It saves what it has; none is begun after that."""
    until = time.monotonic() + 2
    with pytest.raises(commands.OutOfTime):
        slow("a", until)
    assert (tmp_path / "a.saved").exists() and time.monotonic() < until + 20
    with pytest.raises(commands.OutOfTime):
        slow("b", until)
    assert not (tmp_path / "b.began").exists() and not (tmp_path / "commit").exists()


def test_a_resumed_run_names_the_commits_of_all_its_starts(tmp_path):
    """A run that was begun at one commit and ended at another is of both; any other result is of its own commit."""
    starts = [{"commit": "aaa"}, {"commit": "bbb"}, {"commit": "aaa"}]
    (tmp_path / "provenance.json").write_text(json.dumps({"starts": starts}))
    for name in ("result.json", "analysis.json"):
        (tmp_path / name).write_text("{}")
    assert commands.run("train.py", [], tmp_path / "result.json") == {"commit": "aaa, bbb"}
    assert commands.run("tools.analyze", [], tmp_path / "analysis.json") == {"commit": "unknown"}
    (tmp_path / "commit").write_text("ccc")
    assert commands.run("tools.analyze", [], tmp_path / "analysis.json") == {"commit": "ccc"}


def test_a_gpu_that_is_not_there_is_refused():
    commands.refuse_absent_gpu("cpu")
    with pytest.raises(UserError, match="^--device cuda: torch sees no CUDA GPU here"):
        commands.refuse_absent_gpu("cuda")


def test_a_script_that_does_not_stop_is_killed(tmp_path, monkeypatch):
    (tmp_path / "deaf.py").write_text(
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)"
    )
    monkeypatch.setattr(commands, "GRACE", 0.2)
    start = time.monotonic()
    with pytest.raises(commands.OutOfTime):
        commands.run(str(tmp_path / "deaf.py"), [], tmp_path / "result.json", start + 1)
    assert time.monotonic() < start + 20


def test_a_failure_stops_what_runs_and_is_what_is_told(slow, tmp_path):
    """Also if others are stopped by it, or run out of time: nothing waits for a minute, and nothing more is begun."""

    def work(name: str):
        if name == "bad":
            while not (tmp_path / "a.began").exists():
                time.sleep(0.05)
            raise commands.Failed("out of memory")
        return slow(name)

    start = time.monotonic()
    with pytest.raises(commands.Failed, match="out of memory"):
        commands.side_by_side(work, ["a", "bad", "b", "c"], 2)
    assert (tmp_path / "a.saved").exists() and time.monotonic() < start + 30
    assert not (tmp_path / "c.began").exists()
    assert commands.side_by_side(str.upper, "ab", 2) == ["A", "B"]  # and the next call works


def test_a_failure_comes_before_the_end_of_time():
    """Whichever is first in order."""
    failed = threading.Event()

    def work(k: int):
        if k == 0:
            failed.wait()
            raise commands.OutOfTime
        failed.set()
        raise commands.Failed("bad")

    with pytest.raises(commands.Failed, match="bad"):
        commands.side_by_side(work, range(2), 2)


def test_a_signal_to_the_program_stops_its_scripts(tmp_path):
    """SIGTERM, as of `timeout` or a queue: the scripts save and end, and none is begun."""
    (tmp_path / "slow.py").write_text(SLOW)
    program = f"""
import pathlib
from experiments.commands import run, side_by_side
from plumbing.errors import exit_on_user_error
place = {str(tmp_path)!r}
one = lambda name: run(place + "/slow.py", [f"{{place}}/{{name}}"], pathlib.Path(place, name + ".json"))
exit_on_user_error(lambda: side_by_side(one, "abcd", 2))
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=commands.ROOT) as process:
        while not all((tmp_path / f"{name}.began").exists() for name in "ab"):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    assert all((tmp_path / f"{name}.saved").exists() for name in "ab")
    assert not (tmp_path / "c.began").exists() and not (tmp_path / "d.began").exists()


def test_a_line_is_appended_whole(tmp_path):
    """After the rest of a line that a killed process left, which is cut off."""
    path = tmp_path / "raw.jsonl"
    for k in range(2):
        append_line(path, {"key": k})
    with open(path, "ab") as file:
        file.write(b'{"key": 2, "va')
    append_line(path, {"key": "ü"})
    assert read_lines(path) == [{"key": 0}, {"key": 1}, {"key": "ü"}]


def test_what_was_made_is_not_made_again(monkeypatch, tmp_path):
    """A script runs if its file does not exist. The commit of the tree is written beside the file; it is missing if
    this program was killed before."""
    calls = []

    def write():
        calls.append(1)
        (tmp_path / "result.json").write_text(json.dumps({"mean": 3.0}))

    pretend(monkeypatch, 0, "done\n", begins=write)
    monkeypatch.setattr(commands, "commit", lambda: "abc")
    for _ in range(2):
        assert commands.run("train.py", ["--seed", "0"], tmp_path / "result.json") == {"mean": 3.0, "commit": "abc"}
    assert len(calls) == 1
    assert (tmp_path / "commit").read_text() == "abc"
    (tmp_path / "commit").unlink()
    assert commands.run("train.py", [], tmp_path / "result.json")["commit"] == "unknown" and len(calls) == 1


def test_a_script_that_fails_ends_all_with_its_words(monkeypatch, tmp_path):
    monkeypatch.setattr(commands, "commit", lambda: "abc")
    pretend(monkeypatch, 2, "", "error: --x is wrong\n")
    with pytest.raises(SystemExit, match="--x is wrong"):
        commands.run("train.py", [], tmp_path / "result.json")
