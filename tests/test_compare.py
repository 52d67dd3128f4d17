"""tools.compare: which runs share a line, what stands in it, and the formats of its tables."""

import csv
import dataclasses
import math
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adapt
import train
from plumbing.errors import UserError
from plumbing.flags import explicit_flags
from plumbing.folders import mark_of_run
from plumbing.tables import aligned, columns, fitted, visible, wrapped
from recipes import FEW_SHOT
from tests.helpers import run_folder
from tools import compare as compare_command
from tools.compare import compare

TRAIN = dataclasses.asdict(train.make_config(method="mhr", dataset="strings", output_dir="x"))
ADAPT = dataclasses.asdict(adapt.Config(**FEW_SHOT["strings"], variant="z", output_dir="x"))
R = f"r={TRAIN['rank']}"  # the recipe's; no recipe has the 3 and 5 of DIFFERENT


def splits_of(*scores: float, before: float = 1.0) -> dict:
    """The part "splits" of a result.json: one task, with this score in each split."""
    return {str(k): {"before": {"a": before}, "tasks": {"a": score}} for k, score in enumerate(scores)}


def test_an_adaptation_whose_checkpoint_was_replaced_is_refused(tmp_path):
    """Its name would be that of the new one."""
    base = run_folder(tmp_path / "base", TRAIN, mean=1.0)
    made = dict(splits=splits_of(50.0), made_from=mark_of_run(Path(base)))
    run = run_folder(tmp_path / "z", ADAPT | {"checkpoint": base}, **made)
    assert len(body(compare((run,)))) == 1
    (Path(base) / "result.json").write_text('{"mean": 2.0}')
    with pytest.raises(UserError, match=r"z: its checkpoint .*base was replaced since: leave this run out"):
        compare((run,))


def test_compare_shows_the_deviation_over_splits(tmp_path):
    base = run_folder(tmp_path / "base", TRAIN)
    run = run_folder(
        tmp_path / "z", ADAPT | {"checkpoint": base, "split": ["0", "1", "2"]}, splits=splits_of(50.0, 60.0, 64.0)
    )
    (line,) = body(compare((run,)))
    assert re.split(r"  +", line)[2:] == ["3", "1.0 +- 0.0", "58.0 +- 7.2", "4"]


def test_compare_takes_the_seeds_of_continued_runs_together(tmp_path):
    base = [run_folder(tmp_path / f"b{k}", TRAIN | {"seed": k}) for k in (0, 1)]
    more = TRAIN | {"method": "mu", "steps": 7}
    runs = [run_folder(tmp_path / f"m{k}", more | {"from_run": base[k], "seed": k}, mean=40.0 + 20 * k) for k in (0, 1)]
    (line,) = body(compare(tuple(runs)))
    assert re.split(r"  +", line)[0] == f"mhr h=8 {R} -> 7 steps of mu {R}"
    assert "50.0 +- 14.1" in line


def body(table: str) -> list[str]:
    """The lines of a table below its header."""
    lines = table.split("\n")
    (head,) = (k for k, line in enumerate(lines) if re.match("(run|task) +metric", line))
    return lines[head + 1 :]


def test_compare_takes_seeds_together(tmp_path):
    folders = [
        run_folder(tmp_path / f"r{seed}", TRAIN | {"seed": seed, "output_dir": f"r{seed}"}, mean=value, seconds=value)
        for seed, value in enumerate((50.0, 60.0, 64.0))
    ]
    (line,) = body(compare(tuple(folders)))
    # mean 58, squared deviations 64 + 4 + 36 = 104, sample standard deviation sqrt(52) = 7.2
    assert line.split() == ["mhr", "h=8", R, "1,000", "3", "58.0", "+-", "7.2", "58"]


def test_compare_of_one_run_has_no_deviation(tmp_path):
    recipe = dataclasses.asdict(train.make_config(method="lora", dataset="strings", output_dir="x"))
    (line,) = body(compare((run_folder(tmp_path / "r", recipe, mean=51.26),)))
    assert line.split() == ["lora", R, "1,000", "1", "51.3", "12"]


def test_compare_of_adaptations_names_base_and_variant(tmp_path):
    base = [run_folder(tmp_path / f"b{k}", TRAIN | {"seed": k, "method": "poly"}, mean=1.0) for k in (0, 1)]
    folders = [
        run_folder(
            tmp_path / f"a{k}{split}",
            ADAPT | {"checkpoint": base[k], "seed": k, "split": (split,)},
            splits={split: {"before": {"a": 5.0 + k}, "tasks": {"a": 20.0, "b": 20.0 + 20 * k}}},
            parameters={"adapters": 0, "routing": 336},
        )  # fmt: skip
        for k in (0, 1)
        for split in ("0", "1")
    ]
    (line,) = body(compare(tuple(folders)))
    assert re.split(r"  +", line) == [f"poly {R} -> z", "336", "4", "5.5 +- 0.6", "25.0 +- 5.8", "12"]


DIFFERENT = [
    dict(method="poly"), dict(heads=4), dict(rank=3), dict(instructions=True), dict(adapter="ia3"), dict(skills=5),
    dict(routing="sigmoid"), dict(steps=200), dict(lr=1e-2), dict(backbone="other"),
]  # fmt: skip


@pytest.mark.parametrize("change", DIFFERENT, ids=lambda change: next(iter(change)))
def test_compare_keeps_different_runs_apart(tmp_path, change):
    """`compare` promises a line for each group of runs that differ in seed and split only."""
    one = run_folder(tmp_path / "one", TRAIN, mean=10.0)
    other = run_folder(tmp_path / "other", TRAIN | change | {"seed": 1}, mean=90.0)
    lines = body(compare((one, other)))
    assert len(lines) == 2 and "50.0" not in "".join(lines)


@pytest.mark.parametrize(
    "change", [dict(variant="mu"), dict(tasks="dev"), dict(shots=8), dict(steps=5), dict(lr_z=1.0)],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_compare_keeps_different_adaptations_apart(tmp_path, change):
    base = run_folder(tmp_path / "base", TRAIN)
    one = run_folder(tmp_path / "one", ADAPT | {"checkpoint": base}, splits=splits_of(10.0))
    other = run_folder(tmp_path / "other", ADAPT | change | {"checkpoint": base, "seed": 1}, splits=splits_of(90.0))
    lines = body(compare((one, other)))
    assert len(lines) == 2 and "50.0" not in "".join(lines)


def test_compare_is_aligned(tmp_path):
    base = run_folder(tmp_path / "base", TRAIN, mean=3.0, seconds=12345.0)
    lora = run_folder(
        tmp_path / "lora", TRAIN | {"method": "lora", "instructions": True}, mean=100.0,
        parameters={"adapters": 123_456_789, "routing": 0},
    )  # fmt: skip
    z = run_folder(tmp_path / "z", ADAPT | {"checkpoint": base}, splits=splits_of(7.0, before=33.3), seconds=1.0)
    title, *lines = compare((base, lora, z)).split("\n")
    assert title == "strings" and len(lines) == 4
    assert len({len(line) for line in lines}) == 1  # the last column is flush right
    cells = lambda end: [line[:end].split()[-1] for line in lines]  # noqa: E731
    assert cells(lines[0].index("trained") + len("trained")) == ["trained", "123,456,789", "1,000", "1,000"]
    assert cells(lines[0].index("score") + len("score")) == ["score", "100.0", "3.0", "7.0"]
    assert lines[3][: lines[0].index("before") + len("before")].endswith("  33.3")
    assert lines[1][: lines[0].index("before") + len("before")].endswith("  1  " + " " * len("before"))


def test_compare_without_scores(tmp_path):
    """--eval-examples 0: a run without a score is still a line."""
    (line,) = body(compare((run_folder(tmp_path / "r", TRAIN, loss=1.0),)))
    assert line.split() == ["mhr", "h=8", R, "1,000", "1", "12"]


def test_compare_names_unfinished_folders(tmp_path, capsys):
    done = run_folder(tmp_path / "done", TRAIN, mean=10.0)
    unfinished, empty = run_folder(tmp_path / "unfinished", TRAIN), tmp_path / "empty"
    empty.mkdir()
    for format in ("text", "csv"):  # not among the lines of a table
        assert len(compare((unfinished, done, str(empty)), format=format).splitlines()) == 3 - (format == "csv")
        assert capsys.readouterr().err == f"without result.json: {unfinished}, {empty}\n"


def test_compare_refuses_what_is_no_folder_or_has_nothing_to_show(tmp_path):
    """A mistyped name beside a finished run, and runs of which none has finished: refused, not an empty table."""
    done, unfinished = run_folder(tmp_path / "done", TRAIN, mean=10.0), run_folder(tmp_path / "unfinished", TRAIN)
    with pytest.raises(UserError, match="^.*/typo does not exist: give run folders$"):
        compare((done, str(tmp_path / "typo")))
    with pytest.raises(UserError, match="^give a finished run, none of these has finished: .*/unfinished$"):
        compare((unfinished,))


@pytest.mark.parametrize("file", ["config.json", "result.json"])
def test_compare_names_broken_files(tmp_path, file):
    folder = run_folder(tmp_path / "r", TRAIN, mean=10.0)
    (tmp_path / "r" / file).write_text('{"method": ')
    with pytest.raises(UserError, match=file):
        compare((folder,))


def test_compare_of_an_adaptation_whose_checkpoint_is_gone(tmp_path):
    folder = run_folder(tmp_path / "r", ADAPT | {"checkpoint": str(tmp_path / "gone")}, mean=10.0)
    with pytest.raises(UserError, match="gone"):
        compare((folder,))


HUGE = 10**400  # JSON knows no largest number


@pytest.mark.parametrize(
    "odd",
    [
        dict(seconds=None), dict(seconds=HUGE), dict(seconds=math.nan), dict(seconds="12"), dict(mean=math.inf),
        dict(mean=[50.0]), dict(parameters={}), dict(parameters=[1]), dict(parameters={"adapters": HUGE}),
        dict(parameters={"adapters": "1"}), dict(splits={}), dict(splits=None), dict(splits={"0": {}}),
        dict(splits={"0": []}), dict(splits={"0": {"before": {"a": 1.0}, "tasks": {}}}),
        dict(splits={"0": {"before": {"a": None}, "tasks": {"a": 1.0}}}),
        dict(splits={"0": {"before": {"a": 1.0, "b": 1e308, "c": 1e308}, "tasks": {"a": 1.0}}}),
        dict(splits={"0": {"before": 5, "tasks": 5}}), dict(metrics=["EM"]), dict(metrics={"a": 1}), dict(metrics="EM"),
        dict(tasks={"a": None}), dict(tasks=[]), dict(mean=1.0, tasks={}),
    ],
    ids=lambda odd: f"{odd!s:.60}",
)  # fmt: skip
def test_compare_names_a_result_that_is_none(tmp_path, odd):
    """Whatever a result.json holds in place of a run's numbers: one sentence that names the folder."""
    good = run_folder(tmp_path / "good", TRAIN, mean=10.0)
    bad = run_folder(tmp_path / "bad", ADAPT | {"checkpoint": good} if "splits" in odd else TRAIN, **odd)
    with pytest.raises(UserError, match=re.escape(bad)) as refused:
        compare((good, bad))
    assert "\n" not in str(refused.value)


def test_compare_of_a_run_that_continues_itself(tmp_path):
    folder = run_folder(tmp_path / "r", TRAIN | {"from_run": str(tmp_path / "r")}, mean=10.0)
    with pytest.raises(UserError, match=re.escape(folder)):
        compare((folder,))


# --- Metrics, data sets, settings -------------------------------------------------------------------------------------


def cells_of(line: str) -> list[str]:
    return re.split(r"  +", line.strip())


@pytest.mark.parametrize(
    "metrics, shown",
    [
        ({"a": "EM", "b": "EM"}, ["EM"]),
        ({"a": "EM", "b": "ACC", "c": "EM"}, ["mean of 2 metrics"]),
        ({}, []),
        (None, []),
    ],
    ids=str,
)
def test_compare_names_the_metric(tmp_path, metrics, shown):
    """Or how many there are; runs of earlier versions do not say."""
    said = {} if metrics is None else {"metrics": metrics}
    base = run_folder(tmp_path / "base", TRAIN, mean=10.0, **said)
    few = run_folder(tmp_path / "few", ADAPT | {"checkpoint": base}, splits=splits_of(20.0), **said)
    one, other = body(compare((base, few)))
    assert cells_of(one) == [f"mhr h=8 {R}", *shown, "1,000", "1", "10.0", "12"]
    assert cells_of(other) == [f"mhr h=8 {R} -> z", *shown, "1,000", "1", "1.0", "20.0", "12"]


def test_a_run_that_says_its_metric_and_one_that_does_not_share_a_line(tmp_path):
    old = run_folder(tmp_path / "old", TRAIN, mean=10.0)
    new = run_folder(tmp_path / "new", TRAIN | {"seed": 1}, mean=20.0, metrics={"a": "EM"})
    (line,) = body(compare((old, new)))
    assert cells_of(line)[1:5] == ["EM", "1,000", "2", "15.0 +- 7.1"]


def test_data_sets_have_tables_of_their_own(tmp_path):
    """Each under its name; scores of two data sets never share a line, settings of one are not said of the other."""
    gym = dataclasses.asdict(train.make_config(method="mhr", dataset="crossfit", data_dir="d", output_dir="x"))
    runs = [run_folder(tmp_path / f"{k}", c, mean=10.0 * k) for k, c in enumerate((TRAIN, gym, gym | {"seed": 1}))]
    one, other = compare(tuple(runs)).split("\n\n")
    assert one.splitlines()[0] == "crossfit" and other.splitlines()[0] == "strings"
    assert [line.split()[-4:-1] for line in body(one)] == [["15.0", "+-", "7.1"]]
    assert cells_of(body(other)[0])[-2] == "0.0"


def test_settings_that_all_runs_have_are_said_once(tmp_path):
    """Above the table. Settings of pre-training stand before the arrow, those of the adaptation after it."""
    small = TRAIN | {"steps": 20, "lr": 0.5}
    both = [small | {"method": m, "skills": 5 + (m == "mhr")} for m in ("mhr", "poly")]
    base = [run_folder(tmp_path / config["method"], config, mean=1.0) for config in both]
    few = [
        run_folder(tmp_path / f"z{k}", ADAPT | dict(checkpoint=c, steps=7, shots=8 + k), splits=splits_of(1.0))
        for k, c in enumerate(base)
    ]
    text = compare(tuple(few))
    assert text.splitlines()[1] == "all runs: lr=0.5 steps=20; adaptations: steps=7"
    names = [f"mhr h=8 {R} skills=6 -> z shots=8", f"poly {R} skills=5 -> z shots=9"]
    assert [cells_of(line)[0] for line in body(text)] == names
    whole = f"poly {R} skills=5 steps=20 lr=0.5 -> z shots=9 steps=7"
    (_, first), (_, row) = (line.split(",")[:2] for line in compare(tuple(few), format="csv").splitlines()[::2])
    assert first == "run" and row == whole
    alone = compare(tuple(few[1:]))  # says all, on two lines
    assert " ".join(cells_of(line)[0] for line in body(alone)) == whole and len(body(alone)) == 2
    assert compare((*base, *few)).splitlines()[1] == text.splitlines()[1]  # what has no adaptation does not count
    with_base = compare((few[1], run_folder(tmp_path / "mu", small | {"steps": 30}, mean=1.0)))
    assert with_base.splitlines()[1] == "all runs: lr=0.5"  # one adaptation: its settings stay


# --- By task ----------------------------------------------------------------------------------------------------------


def test_by_task_by_hand(tmp_path):
    """Means over seeds and splits; a task that a group lacks is blank, a group without scores has no column."""
    base = run_folder(
        tmp_path / "base", TRAIN, mean=55.0, tasks={"a": 50.0, "b": 60.0}, metrics={"a": "EM", "b": "ACC"}
    )
    again = run_folder(tmp_path / "again", TRAIN | {"seed": 1}, mean=75.0, tasks={"a": 70.0, "b": 80.0})
    few = run_folder(
        tmp_path / "few", ADAPT | {"checkpoint": base, "split": ["0", "1"]},
        splits={k: {"before": {"c": 0.0}, "tasks": {"c": v, "b": 1.0}} for k, v in (("0", 20.0), ("1", 23.0))},
    )  # fmt: skip
    silent = run_folder(tmp_path / "silent", TRAIN | {"lr": 9.0})
    (tmp_path / "silent" / "result.json").write_text('{"seconds": 1, "parameters": {"adapters": 1000}}')
    text = compare((base, again, few, silent), by_task=True)
    assert cells_of(text.splitlines()[1]) == ["task", "metric", f"mhr h=8 {R}", f"mhr h=8 {R} -> z"]
    assert [cells_of(line) for line in body(text)] == [
        ["a", "EM", "60.0 +- 14.1"], ["b", "ACC", "70.0 +- 14.1", "1.0 +- 0.0"], ["c", "21.5 +- 2.1"],
    ]  # fmt: skip
    a, b, c = body(text)
    assert a.index("60.0") == b.index("70.0") and b.rindex("1.0 ") + 4 == c.index("+-")  # each in its column
    rows = list(csv.DictReader(compare((base, again, few, silent), True, "csv").splitlines()))
    assert [(row["run"], row["task"], row["score_mean"], row["score_n"]) for row in rows] == [
        (f"mhr h=8 {R}", "a", "60.0", "2"), (f"mhr h=8 {R}", "b", "70.0", "2"),
        (f"mhr h=8 {R} -> z", "c", "21.5", "2"), (f"mhr h=8 {R} -> z", "b", "1.0", "2"),
    ]  # fmt: skip
    with pytest.raises(UserError, match="^--by-task: these runs scored no task"):
        compare((silent,), by_task=True)


def test_by_task_of_many_groups_goes_on_below(tmp_path):
    """Ten groups do not fit beside each other: no line is too long, each task has its name in each block."""
    tasks = {f"task{k}_of_a_long_name_as_superni_has": 10.0 * k for k in range(3)}
    runs = [run_folder(tmp_path / f"{k}", TRAIN | {"lr": 0.1 * k}, mean=1.0, tasks=tasks) for k in range(1, 11)]
    text = compare(tuple(runs), by_task=True)
    blocks = text.split("\n\n")
    assert len(blocks) > 1 and all(all(task in block for task in tasks) for block in blocks)
    assert max(map(len, text.splitlines())) <= 100 and text.count("20.0") == 10 == text.count("lr=")


# --- Formats ----------------------------------------------------------------------------------------------------------

ODD = {"backbone": "a_b|c&d%e$f#g{h}i~j^k\\l<m>*n`o[p]", "layers": r"(.*\.)?(q|v_proj)$"}


def odd_runs(root: Path) -> tuple[str, ...]:
    """Two seeds of a run whose settings hold what markdown and LaTeX treat as special, and one of another method."""
    odd = [run_folder(root / f"{k}", TRAIN | ODD | {"seed": k}, mean=50.0 + 10 * k, tasks={"a_b": 1.0}) for k in (0, 1)]
    return *odd, run_folder(root / "poly", TRAIN | {"method": "poly"}, mean=7.0, tasks={"a_b": 2.0})


def test_csv_has_raw_numbers(tmp_path):
    odd, poly = csv.DictReader(compare(odd_runs(tmp_path), format="csv").splitlines())
    assert odd["data_set"] == "strings" and all(f"{name}={value}" in odd["run"] for name, value in ODD.items())
    assert (odd["trained"], odd["runs"], odd["seconds"]) == ("1000", "2", "12.4")
    assert (odd["score_mean"], float(odd["score_std"]), odd["score_n"]) == ("55.0", pytest.approx(50**0.5), "2")
    assert (odd["before_mean"], odd["before_std"], odd["before_n"]) == ("", "", "0")
    assert (poly["score_mean"], poly["score_std"], poly["score_n"]) == ("7.0", "", "1")


@pytest.mark.parametrize("by_task", [False, True])
def test_markdown_and_latex_have_the_same_cells(tmp_path, by_task):
    """Read back as their own readers do: a line a row, special characters only where they are meant."""
    runs = odd_runs(tmp_path)
    title, _, table = compare(runs, by_task, "markdown").partition("\n\n")
    assert title == "### strings"
    head, rule, *rows = (re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines())
    assert rule == ["---"] * 2 + ["---:"] * (len(head) - 2)
    marked = [[re.sub(r"\\([^\w\s])|\\(_)", r"\1\2", cell).strip() for cell in row] for row in (head, *rows)]
    lines = compare(runs, by_task, "latex").splitlines()
    count = len(head)
    assert lines[:2] == [f"\\begin{{tabular}}{{ll{'r' * (count - 2)}}}", r"\toprule"]
    assert lines[2] == f"\\multicolumn{{{count}}}{{l}}{{strings}} \\\\"
    assert lines[-2:] == [
        r"\bottomrule",
        r"\end{tabular}",
    ]
    set_lines = [line.removesuffix(r" \\") for line in lines[4:-2] if line != r"\midrule"]
    assert [[read_latex(cell) for cell in re.split(" ?(?<!\\\\)& ?", line)] for line in set_lines] == marked
    assert any("55.0 ± 7.1" in row or "1.0 ± 0.0" in row for row in marked)
    words = " ".join(cell for row in marked for cell in row)
    assert all(f"{name}={value}" in words for name, value in ODD.items())


def read_latex(text: str) -> str:
    """What LaTeX sets for a text of escapes. AssertionError for a special character that is not escaped."""
    names = {"textbackslash": "\\", "textasciitilde": "~", "textasciicircum": "^", "textless": "<"}
    names |= {"textgreater": ">", "textbar": "|"}
    pieces = re.findall(r"\\([a-z]+)\{\}|\\([&%$#_{}])|(\$\\pm\$)|([^\\&%$#_{}~^<>|])|(.)", text)
    assert not any(bare for *_, bare in pieces), text
    return "".join(names.get(name, "") + escaped + ("±" if pm else "") + c for name, escaped, pm, c, _ in pieces)


# --- Tables as text ---------------------------------------------------------------------------------------------------

any_text = st.text(st.characters(exclude_categories=()), max_size=120)
label = st.lists(st.text("abc=_/\u732b", max_size=60), max_size=8).map(" ".join)


@given(
    st.lists(st.tuples(label, st.sampled_from(["EM", "mean of 2 metrics"])), min_size=1), st.lists(label, max_size=9)
)
@settings(max_examples=60, deadline=None)
def test_fitted_is_narrow_and_whole(firsts, headings):
    """Whatever the labels are, no line has more than 100 columns, and no character of a cell is lost."""
    numbers = [f"{k}.5 +- {k}.1" for k in range(len(headings))]
    lines = [("run", "metric", *headings), *((*first, *numbers) for first in firsts)]
    text = fitted(lines, left=2)
    assert max(map(columns, text.splitlines())) <= 100
    blocks = text.split("\n\n")
    assert all(text.count(number) == len(firsts) for number in numbers)
    characters = lambda *texts: Counter("".join("".join(t.split()) for t in texts))  # noqa: E731
    again = [cell for line in lines for cell in line[:2]] * (len(blocks) - 1)  # the first columns, beside each block
    assert characters(text) == characters(*(cell for line in lines for cell in line), *again)


def test_fitted_by_hand():
    """A long label breaks between settings, further lines are indented, headings stand just above their numbers."""
    lines = [("run", "metric", "a heading that is long"), ("poly r=4 backbone=some/where lr=0.5", "EM", "12.5")]
    assert fitted(lines, left=2, width=40, first=10).splitlines() == [
        "                             a heading",
        "run               metric  that is long",
        "poly r=4          EM              12.5",
        "  backbone=some/",
        "  where lr=0.5",
    ]


@given(any_text)
def test_visible_texts_are_printable(text):
    """Nothing in them moves the cursor, and each character can be told from the escape: the text comes back."""
    shown = visible(text.replace("\\", "\\\\"))
    assert shown.isprintable() and (text.isprintable() or shown != text)
    assert re.sub(ESCAPE, lambda m: m[0].encode().decode("unicode_escape"), shown) == text


ESCAPE = r"\\(?:[\\tnr]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})"


@given(st.text("ab \u732b\u0301=", max_size=90), st.integers(2, 30))
def test_wrapped_keeps_all_but_spaces(text, width):
    lines = wrapped(text, width)
    assert max(map(columns, lines)) <= width
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_wide_characters_are_aligned():
    assert columns("\u732b a\u0301") == 4
    lines = aligned([("\u732b", "1"), ("abc", "22")], left=1).splitlines()
    assert lines == ["\u732b    1", "abc  22"] and len({columns(line) for line in lines}) == 1


# --- The command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_the_table(tmp_path, capsys):
    """`python -m tools.compare RUN`; a flag is refused, and no run at all."""
    folder = run_folder(tmp_path / "r", TRAIN, mean=10.0)
    compare_command.main(explicit_flags(compare_command.Config, {}, [folder]))
    assert capsys.readouterr().out == f"{compare((folder,))}\n"
    argv = ["--format", "csv", "--by-task", scored := run_folder(tmp_path / "s", TRAIN, mean=1.0, tasks={"a": 1.0})]
    with pytest.raises(SystemExit):  # the flag before RUN reads no run
        explicit_flags(compare_command.Config, {}, argv[:-1])
    capsys.readouterr()
    compare_command.main(explicit_flags(compare_command.Config, {}, argv))
    assert capsys.readouterr().out == f"{compare((scored,), True, 'csv')}\n"
    for argv, named in (([folder, "--save", "x.json"], "--save"), ([], "RUN")):
        with pytest.raises(SystemExit) as end:
            explicit_flags(compare_command.Config, {}, argv)
        assert end.value.code == 2 and named in capsys.readouterr().err
