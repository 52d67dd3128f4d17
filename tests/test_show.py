"""tools.show: a line a task, the worst and best examples, and whatever a model may have written."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plumbing.errors import UserError
from plumbing.flags import explicit_flags
from plumbing.tables import columns
from tools import show


def example(output="x", score=0.0, task="a", split="", references=("x",), text="in", **more) -> dict:
    """One line of a predictions file."""
    return dict(split=split, task=task, input=text, references=list(references), output=output, score=score, **more)


def chosen(output: str, score=0.0, scores=(-0.5, -1.5), label=0, **more) -> dict:
    return example(output, score, choices=["yes", "no"], choice_scores=list(scores), label=label, **more)


def written(path: Path, examples: list, head: str = "") -> str:
    """Write a predictions file; returns its name."""
    path.write_text(head + "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in examples), encoding="utf-8")
    return str(path)


def printed(capsys, *argv: str) -> str:
    """What the command prints."""
    show.main(explicit_flags(show.Config, {}, list(argv)))
    return capsys.readouterr().out.removesuffix("\n")


def blocks(text: str) -> list[str]:
    """The printed examples, after the line of the task."""
    return text.split("\n\n")[1:]


# --- A line a task ----------------------------------------------------------------------------------------------------


def test_a_line_a_task_by_hand(tmp_path, capsys):
    """Tasks in the order of the file; an output of white space is empty; the output that is frequent is shown."""
    good = [example(f"word {k}", 50.0 * (k % 3), "good") for k in range(6)]
    collapsed = [example("the", 0.0, "collapsed", split) for split in "0012"]
    blank = [example(output, 0.0, "blank") for output in ("", " \n", "", "aaaa")]
    lines = printed(capsys, written(tmp_path / "p", [good[0], *collapsed, *good[1:], *blank])).splitlines()
    assert [re.split("  +", line) for line in lines] == [
        ["task", "examples", "score", "empty", "characters", "most frequent output"],
        ["good", "6", "50.0", "0 %", "6.0"],  # 1 of 6 is below a fifth
        ["collapsed", "4", "0.0", "0 %", "3.0", "100 %", "the"],
        ["blank", "4", "0.0", "75 %", "1.5", "50 %", "(empty)"],
    ]


@pytest.mark.parametrize("same, shown", [(1, ""), (2, "40 %  x")])
def test_above_a_fifth_is_frequent(tmp_path, capsys, same, shown):
    """Exactly 20 % is not."""
    outputs = ["x"] * same + [f"other {k}" for k in range(5 - same)]
    (_, line) = printed(capsys, written(tmp_path / "p", [example(output) for output in outputs])).splitlines()
    assert line.endswith(shown) and ("x" in line) == bool(shown)


def test_a_long_frequent_output_is_shortened(tmp_path, capsys):
    file = written(tmp_path / "p", [example("\u732b word\n" * 200, task="t" * 30)])
    lines = printed(capsys, file).splitlines()
    assert len(lines) == 2 and lines[1].endswith("...") and 90 < columns(lines[1]) <= 100


def test_a_split_alone(tmp_path, capsys):
    file = written(tmp_path / "p", [example(score=100.0, split="0"), example("y", split="1"), example("z", split="1")])
    assert printed(capsys, file).splitlines()[1].split()[1:3] == ["3", "33.3"]
    assert printed(capsys, file, "--split", "1").splitlines()[1].split()[1:3] == ["2", "0.0"]
    assert "split 1: score" in printed(capsys, file, "--split", "1", "--task", "a")
    with pytest.raises(UserError, match=r"^--split 2 is none of .*p: choose from 0, 1$"):
        printed(capsys, file, "--split", "2")
    with pytest.raises(UserError, match="^--split 2 is none of .*q: leave it out$"):
        printed(capsys, written(tmp_path / "q", [example()]), "--split", "2")


# --- Single examples --------------------------------------------------------------------------------------------------


def test_worst_and_best_by_hand(tmp_path, capsys):
    """By score, then by place in the file; the best one first; of another task nothing."""
    examples = [example(f"out {k}", s, split="0") for k, s in enumerate((50.0, 0.0, 100.0, 12.5, 0.0))]
    file = written(tmp_path / "p", [*examples, example("other", -5.0, "b")])
    shown = blocks(printed(capsys, file, "--task", "a", "--worst", "3", "--best", "2"))
    heads = [f"{rank} of a, split 0: score {s}" for rank, s in zip(["worst"] * 3 + ["best"] * 2, SCORES, strict=True)]
    assert [block.splitlines()[0] for block in shown] == heads
    assert [re.search("out .", block)[0] for block in shown] == ["out 1", "out 4", "out 3", "out 2", "out 0"]
    assert shown[0].splitlines()[1:] == ["  input        in", "  reference    x", "  output       out 1"]
    assert len(blocks(printed(capsys, file, "--task", "a"))) == 2  # one of each
    assert len(blocks(printed(capsys, file, "--task", "a", "--worst", "0"))) == 1
    assert blocks(printed(capsys, file, "--task", "a", "--worst", "0", "--best", "0")) == []
    assert len(blocks(printed(capsys, file, "--task", "a", "--worst", "4", "--best", "4"))) == 5  # none twice


SCORES = (0.0, 0.0, 12.5, 100.0, 50.0)


def test_choices_are_shown_with_their_scores(tmp_path, capsys):
    """The right one and the chosen one are marked; a model that has broken down has no log-probabilities."""
    file = written(tmp_path / "p", [chosen("no", scores=(float("nan"), -1)), chosen("yes", 100.0)])
    worst, best = blocks(printed(capsys, file, "--task", "a"))
    assert worst.splitlines()[-2:] == ["  right              nan  yes", "  chosen          -1.000  no"]
    assert best.splitlines()[-2:] == ["  right, chosen   -0.500  yes", "  choice          -1.500  no"]


def test_a_long_input_is_cut_in_the_middle(tmp_path, capsys):
    """Its beginning and end stay, and the number says exactly how much is missing."""
    words = " ".join(f"word{k}" for k in range(1000))
    (block,) = blocks(printed(capsys, written(tmp_path / "p", [example(text=words)]), "--task", "a", "--best", "0"))
    lines = [line[15:] for line in block.splitlines()[1:-2]]
    (cut,) = (k for k, line in enumerate(lines) if "left out" in line)
    assert (cut, len(lines)) == (4, 9)
    missing = int(re.search(r"\[\.\.\. ([\d,]+) characters left out", lines[cut])[1].replace(",", ""))
    begin, end = " ".join(lines[:cut]), " ".join(lines[cut + 1 :])
    assert begin.startswith("word0 word1") and end.endswith("word998 word999")
    assert words.startswith(begin) and words.endswith(end) and 0 <= len(words) - len(begin) - len(end) - missing <= 2
    assert len(begin) > 3 * 60 and len(end) > 3 * 60  # as much as fits


def test_nothing_is_left_out_of_what_just_does_not_fit():
    """Nine words of 40 letters: their halves, cut within a word, are more than the whole."""
    words = " ".join(9 * ["w" * 40])
    lines = show.as_text(example(text=words), "worst").split("\n")[1:-2]
    assert [line[15:] for line in lines] == words.split()


@given(st.text(st.characters(exclude_categories=()), max_size=900), st.sampled_from([1, 2, 40]))
@settings(max_examples=80, deadline=None)
def test_no_text_breaks_the_terminal(text, times):
    """Whatever a text holds: at most 80 columns, some ten lines, and nothing that moves a cursor."""
    shown = show.as_text(example(text * times, references=[text], text=text * times), "worst")
    for line in shown.split("\n"):
        assert line.isprintable() and columns(line) <= 80
    assert shown.count("\n") <= 3 * 12
    assert all(f"  {label}" in shown for label in ("input", "reference", "output"))


@pytest.mark.parametrize(
    "text, line",
    [
        ("a\nb\r\tc", r"a\nb\r\tc"), (r"a\nb", r"a\\nb"), ("\x1b[31mred", r"\x1b[31mred"), ("", "(empty)"),
        ("   ", "(only spaces)"), ("\u202eabc", r"\u202eabc"), ("\u732b", "\u732b"), ("\ud800", r"\ud800"),
        ("x\u2028y", r"x\u2028y"), ("\x9b2J", r"\x9b2J"),
    ],
)  # fmt: skip
def test_invisible_characters_are_visible(text, line):
    assert f"  output       {line}" in show.as_text(example(text), "worst").split("\n")


# --- Files ------------------------------------------------------------------------------------------------------------


def test_a_run_folder_and_a_file_of_evaluate(tmp_path, capsys):
    """The header of evaluate.py's file is no example; "checkpoint" further down is no header."""
    written(tmp_path / "predictions.jsonl", [example(score=25.0)])
    head = '{"checkpoint": "runs/x", "split": ""}\n'
    file = written(tmp_path / "scores.predictions.jsonl", [example(score=25.0)], head)
    assert printed(capsys, str(tmp_path)) == printed(capsys, file)
    twice = written(tmp_path / "twice", [example()], head + head)
    with pytest.raises(UserError, match=r"twice:2 is no scored example"):
        printed(capsys, twice)


BROKEN = [
    b"", b"{", b"[]", b"5", b"null", b'"checkpoint"', b"\xff\xfe", b"[" * 100_000, b'{"task": 1}',
    *(json.dumps({k: v for k, v in example().items() if k != name}).encode() for name in example()),
    *(json.dumps(example() | change).encode() for change in (
        dict(task=1), dict(input=None), dict(output=["x"]), dict(references="x"), dict(references=[1]),
        dict(references=None), dict(split=0), dict(score="1"), dict(score=True), dict(score=None),
        dict(score=float("nan")), dict(score=float("inf")), dict(score=10**400), dict(choices=None),
        dict(choices=["yes"]), dict(choices="yes", choice_scores=[1, 2, 3], label=0),
    )),
    *(json.dumps(chosen("no") | change).encode() for change in (
        dict(choices=["yes"]), dict(choice_scores=[-1.0]), dict(choice_scores=["a", "b"]), dict(label=2),
        dict(label=-1), dict(label=None), dict(label=[]), dict(choice_scores=[10**400, 1]), dict(choices=[1, 2]),
        dict(choice_scores={"yes": 1.0, "no": 1.0}),
    )),
]  # fmt: skip


@pytest.mark.parametrize("line", BROKEN, ids=lambda line: f"{line!r:.40}")
def test_a_damaged_line_is_refused_by_its_number(tmp_path, capsys, line):
    """In one sentence, also for one task alone."""
    good = json.dumps(example()).encode()
    (tmp_path / "p").write_bytes(b"\n".join((good, good, line, good, b"")))
    for more in ([], ["--task", "a"]):
        with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path))}/p:3 is no scored example") as refused:
            printed(capsys, str(tmp_path / "p"), *more)
        assert "\n" not in str(refused.value)


def test_missing_and_empty_files(tmp_path, capsys):
    (tmp_path / "empty").touch()
    for name, says in (
        ("typo", "^.*/typo does not exist: give a run folder"),
        ("", "^.* holds no predictions.jsonl .*: evaluate.py --checkpoint .* --save X.json writes"),
        ("empty", "^.*/empty holds no examples: score the run by evaluate.py"),
    ):
        with pytest.raises(UserError, match=says):
            printed(capsys, str(tmp_path / name))


def test_an_unknown_task_is_answered_with_near_names(tmp_path, capsys):
    names = ("sort+swap", "sort+shift", "reverse", "task137_detoxifying", "drop", "rotate+upper", "double")
    file = written(tmp_path / "p", [example(task=name) for name in names])
    for typed, says in (
        ("sort+swpa", r"do you mean sort\+swap( or [\w+]+)*\?"), ("detox", r"do you mean task137_detoxifying\?"),
        ("zzz", r"choose from sort\+swap, sort\+shift, reverse, task137_detoxifying, drop"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"^--task {re.escape(typed)} is no task of .*p: {says}$"):
            printed(capsys, file, "--task", typed)


def test_flags_without_a_task_and_out_of_range(tmp_path, capsys):
    file = written(tmp_path / "p", [example()])
    with pytest.raises(UserError, match="^--best needs --task: "):
        printed(capsys, file, "--best", "2")
    with pytest.raises(UserError, match="^--worst must not be negative or huge, not -1"):
        printed(capsys, file, "--task", "a", "--worst", "-1")
    for argv, named in (([], "RUN_OR_FILE"), ([file, file], "unrecognized arguments")):
        with pytest.raises(SystemExit) as end:
            explicit_flags(show.Config, {}, argv)
        assert end.value.code == 2 and named in capsys.readouterr().err


def run_python(*argv: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *argv], capture_output=True, cwd=Path(show.__file__).parents[1], **options)


def test_the_command_loads_no_torch_and_prints_to_any_terminal(tmp_path):
    """As a user runs it, in a terminal that knows ASCII only, and into a pipe that is closed."""
    file = written(tmp_path / "p", [example("\u732b")] * 3000)
    command = ("-X", "importtime", "-m", "tools.show", file)
    done = run_python(*command, env={"PYTHONIOENCODING": "ascii", "PATH": ""})
    assert done.returncode == 0 and rb"100 %  \u732b" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.decode().splitlines()}
    assert "plumbing.tables" in imported and not imported & {"torch", "transformers", "datasets", "numpy"}
    with open(tmp_path / "gone", "wb") as closed:
        shell = f'"{sys.executable}" -m tools.show "{file}" --task a --worst 3000 | head -c 1'
        root = Path(show.__file__).parents[1]
        assert subprocess.run(shell, shell=True, stdout=closed, stderr=subprocess.PIPE, cwd=root).stderr == b""


@pytest.mark.parametrize("tool", ["show", "compare"])
def test_help_answers_before_the_slow_imports(tool):
    done = run_python("-X", "importtime", "-m", f"tools.{tool}", "--help")
    assert done.returncode == 0 and b"--format" in done.stdout or b"--worst" in done.stdout
    assert b" torch\n" not in done.stderr
