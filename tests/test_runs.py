"""What a researcher sees of a run: its data, its settings, its scored examples, its validation loss, what made it."""

import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from tqdm import tqdm

import adapt
import data
import evaluate
import train
from benchmarks import metrics
from data import Benchmark, Example, Item, Task
from methods import load_run
from plumbing import backbones, checkpoint, machine, tasks
from plumbing.errors import UserError
from plumbing.flags import describe, in_use
from plumbing.folders import read_lines
from plumbing.large import refuse_what_does_not_fit
from plumbing.tables import columns, counted, shortened
from recipes import PRETRAINING, recipe
from scoring import line_of
from tests.helpers import contents, log_lines, lines_of, read, same_run, same_tensors, small_backbone

SMALL = dict(method="mhr", heads=4, skills=2, rank=2, steps=6, batch_size=8, max_input=16, max_output=8, device="cpu")
SMALL |= dict(dataset="strings", eval_examples=2, log_every=2)
FEW = dict(tasks="dev", steps=2, eval_every=1, test_examples=3, device="cpu")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    return SMALL | dict(backbone=small_backbone(tmp_path_factory.mktemp("backbone") / "small"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, flags):
    folder = tmp_path_factory.mktemp("runs") / "mhr"
    train.main(flags | dict(output_dir=str(folder)))
    return folder


@pytest.fixture(scope="module")
def adapted(run):
    adapt.main(FEW | dict(checkpoint=str(run)))
    return Path(f"{run}-all")


# --- Settings and data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["strings", "t0", "superni", "crossfit"])
@pytest.mark.parametrize("method", ["mhr", "lora", "task-moe", "private"])
def test_the_table_of_settings_has_every_setting_that_has_an_effect(dataset, method):
    cfg = train.make_config(dataset=dataset, method=method, seed=3, batch_size=7, layers="q|" + "k" * 90)
    usual = in_use(cfg, dataclasses.asdict(train.Config()) | recipe(PRETRAINING, dataset, method))
    text = describe(cfg, usual)
    own = text.split("what to learn")[0]
    assert "batch_size 7" in own and "seed 3" in own and f"method {method}" in own and "skills" not in own
    shown = ("heads" in text, "top_k" in text, "lr_z" in text)
    assert shown == (method == "mhr", method == "task-moe", method in ("mhr", "task-moe"))
    lines = [line for line in text.splitlines() if "k" * 90 not in line]
    assert max(map(len, lines)) <= 80 and len(lines) < 16
    assert "resume" not in text and "dry_run" not in text


def test_what_is_the_recipes_is_not_in_the_second_row():
    cfg = train.make_config(dataset="strings", method="poly")
    usual = dataclasses.asdict(train.Config()) | recipe(PRETRAINING, "strings", "poly")
    assert "not the recipe's" not in describe(cfg, usual)


def tokenizer(text="", text_target="", truncation=False, max_length=0, **_):
    ids = [2] * len(text or text_target) + [1]
    return types.SimpleNamespace(input_ids=ids[:max_length] if truncation else ids)


def test_the_preview_shows_texts_and_lengths():
    """Tokens are characters here, and the end token: 3 of 4 outputs are longer than 4, no input is longer than 99."""
    examples = [Example("a\tb" * 20, ("x" * n,)) for n in (1, 4, 5, 6)]
    text = data.preview([Task("a-task-of-a-very-long-name", "exact", examples, [], [])], tokenizer, True, 99, 4)
    lines = text.splitlines()
    assert len(lines) == 6 and max(map(len, lines)) <= 80 and "\\t" in lines[0] and "\t" not in text
    assert lines[4].split() == "inputs (4 drawn) median 61 tokens, longest 61, cut at 99: 0.0%".split()
    assert lines[5].split() == "outputs (4 drawn) median 6 tokens, longest 7, cut at 4: 75.0%".split()


@pytest.mark.parametrize("columns", [50, 120])
def test_the_preview_of_a_dry_run_shows_texts_in_full(monkeypatch, columns):
    """Whatever is between the first and the last word, with the template's line breaks, in the terminal's width."""
    monkeypatch.setenv("COLUMNS", str(columns))
    text = "Task:\n\n" + "word " * 60 + "end.\nOutput:\n"
    task = Task("a", "exact", [Example(text, ("an answer " * 9,))], [], [])
    *lines, _, _ = data.preview([task], tokenizer, True, 99, 99, whole=True).splitlines()
    assert max(map(len, lines)) <= columns and [line[:21].strip() for line in lines if line[:21].strip()] == ["a", "->"]
    shown = [line[21:] for line in lines]
    assert shown[:2] == ["Task:\\n", "\\n"] and "Output:\\n" in shown and " ".join(shown).count("answer") == 9
    assert " ".join(shown).split() == text.replace("\n", "\\n ").split() + ["an", "answer"] * 9
    long = " ".join(data.in_full("start " + "x " * 2000 + "end", 59))
    assert long.startswith("start x") and long.endswith("x end") and "\u2026" in long and 500 < len(long) <= 620


def test_looking_at_the_data_leaves_the_random_state(run):
    before = torch.get_rng_state()
    many = [Example(str(k), (str(k), "other")) for k in range(1000)]
    first, again = (data.drawn([Task("a", "exact", many, [], [])], 256) for _ in range(2))
    assert first == again and len(first) == 256 and torch.equal(before, torch.get_rng_state())


def test_short_texts():
    assert [counted(n, "task") for n in (0, 1, 1234)] == ["0 tasks", "1 task", "1,234 tasks"]
    assert shortened("a\nb\x1b", 9) == "a\\nb\\x1b" and shortened("abcdefghij", 7) == "abcd…ij"
    assert all(len(shortened("x" * n, 26)) == min(n, 26) for n in range(60))
    assert 24 <= columns(shortened("漢字" * 40, 26)) <= 26 and "…" in shortened("漢字" * 40, 26)


def test_scripts_show_the_data_first(run, flags, capsys):
    folder = run.parent / "shown"
    train.main(flags | dict(output_dir=str(folder), steps=1, eval_examples=0))
    adapt.main(FEW | dict(checkpoint=str(run), output_dir=str(folder) + "-all", steps=1))
    evaluate.main(dict(checkpoint=str(folder), test_examples=1, device="cpu"))
    assert capsys.readouterr().out.count("\ninputs (") == 3


# --- Dry runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [False, True])
def test_a_dry_run_says_what_a_step_takes_and_leaves_nothing(run, flags, tmp_path, capsys, there, monkeypatch):
    """Also where the folder already holds a run, which is left as it is."""
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    folder = run if there else tmp_path / "new"
    found = train.main(flags | dict(output_dir=str(folder), dry_run=True, steps=1000, keep_every=1, eval_every=1))
    said = capsys.readouterr().out
    assert found["seconds_per_step"] > 0 and found["peak_memory_gb"] > 0.1
    assert "dry run: " in said and "1,000 steps would take " in said and "inputs (" in said
    monkeypatch.setattr(data, "preview", lambda *a, whole=False, **_: f"whole {whole}")
    assert folder.exists() == there and before == {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    few = adapt.main(FEW | dict(checkpoint=str(run), output_dir=str(tmp_path / "few"), dry_run=True))
    assert few["seconds_per_step"] > 0 and not (tmp_path / "few").exists()
    train.main(flags | dict(output_dir=str(folder), dry_run=True, steps=1000))
    assert capsys.readouterr().out.count("whole True") == 2


def test_a_dry_run_does_not_count_the_time_of_compiling(flags, tmp_path, monkeypatch, capsys):
    """That is in the first step, and is said."""

    def graph_of(loss_of, *_):
        waits = iter([3.0])
        return lambda tensors: time.sleep(next(waits, 0.0)) or loss_of(tensors)

    monkeypatch.setattr(train, "graph_of", graph_of)
    monkeypatch.setattr(train, "refuse_what_cannot_compile", lambda cfg: None)
    found = train.main(flags | dict(output_dir=str(tmp_path / "x"), dry_run=True, compile=True))
    assert found["seconds_per_step"] < 1
    (said,) = re.findall(r"without the (\d+) s that compiling took", capsys.readouterr().out)
    assert 3 <= int(said) <= 6


# --- Scored examples --------------------------------------------------------------------------------------------------


def test_predictions_of_training_tasks_give_the_scores(run):
    lines, result = lines_of(run / "predictions.jsonl"), read(run / "result.json")
    assert list(dict.fromkeys(line["task"] for line in lines)) == list(result["tasks"]) and len(lines) == 2 * 64
    for name, score in result["tasks"].items():
        assert score == pytest.approx(sum(line["score"] for line in lines if line["task"] == name) / 2)
    assert set(result["metrics"].values()) == {"exact"} and {line["split"] for line in lines} == {""}


def test_predictions_of_an_adaptation_give_the_scores(adapted):
    result = read(adapted / "result.json")
    for file, key in (("predictions.jsonl", "tasks"), ("before.predictions.jsonl", "before")):
        lines = lines_of(adapted / file)
        assert len(lines) == 3 * len(result["tasks"]) and {line["split"] for line in lines} == {"0"}
        for name, score in result[key].items():
            own = [line for line in lines if line["task"] == name]
            assert score == pytest.approx(sum(line["score"] for line in own) / 3)
            assert all((line["score"] == 100) == (line["output"] in line["references"]) for line in own)


def test_a_line_has_the_choices_and_their_scores():
    example = Example("q", ("b",), ("a", "b"), 1)
    line = line_of(Task("t", "Rank-ACC", [], [], []), example, "b", [-2.0, -1.23456])
    assert line == {
        "task": "t", "input": "q", "references": ["b"], "output": "b", "score": 100.0, "choices": ["a", "b"],
        "label": 1, "choice_scores": [-2.0, -1.2346],
    }  # fmt: skip


def test_one_example_has_a_score_of_its_own():
    """The mean of these is the task's score; under a correlation an example is right or wrong."""
    texts = ["the cat", "a dog", "cats"]
    examples = [Example("", (t,)) for t in ("cat", "dog sits", "cats")]
    for metric in ("EM", "QA-F1", "Rouge-L", "exact", "ACC", "SuperNI-EM"):
        ones = [metrics.score_one(metric, t, e) for t, e in zip(texts, examples, strict=True)]
        assert sum(ones) / 3 == pytest.approx(metrics.score(metric, texts, examples))
    assert [metrics.score_one("Pearson-Correlation", t, Example("", ("1.0",))) for t in ("1.0 ", "2")] == [100, 0]


def test_an_interrupted_adaptation_has_the_same_predictions(run, adapted, tmp_path, monkeypatch):
    """Killed after some tasks, in the middle of a task's examples: resumed equals uninterrupted."""
    folder, original, done = tmp_path / "cut", tasks.TaskRun.record, []

    def record(self, lines, **result):
        done.append(1)
        if len(done) == 3:
            for when, log in self.examples.items():
                log.write({"split": self.split, **lines[when][0]})
            raise KeyboardInterrupt
        original(self, lines, **result)

    monkeypatch.setattr(tasks.TaskRun, "record", record)
    with pytest.raises(KeyboardInterrupt):
        adapt.main(FEW | dict(checkpoint=str(run), output_dir=str(folder)))
    assert len(lines_of(folder / "predictions.jsonl")) == len(lines_of(folder / "before.predictions.jsonl")) == 7
    adapt.main(FEW | dict(checkpoint=str(run), output_dir=str(folder), resume=True))
    same_run(folder, adapted)


@pytest.mark.parametrize("kind", ["trained", "adapted", "zero-shot"])
@pytest.mark.parametrize("share", [0.02, 0.4, 0.97])
def test_an_evaluation_goes_on_where_it_was_cut_off(run, adapted, tmp_path, kind, share, monkeypatch):
    folder = adapted if kind == "adapted" else run
    how = dict(checkpoint=str(folder), zero_shot=kind == "zero-shot", test_examples=2, device="cpu")
    evaluate.main(how | dict(save=str(tmp_path / "whole.json")))
    content = (tmp_path / "whole.predictions.jsonl").read_bytes()
    (tmp_path / "cut.predictions.jsonl").write_bytes(content[: int(len(content) * share)])
    scored, original = [], evaluate.all_scores
    monkeypatch.setattr(evaluate, "all_scores", lambda *a, **k: scored.extend(a[2]) or original(*a, **k))
    evaluate.main(how | dict(save=str(tmp_path / "cut.json")))
    assert (tmp_path / "cut.predictions.jsonl").read_bytes() == content
    assert (tmp_path / "cut.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    done = [line["done"] for line in lines_of(tmp_path / "whole.predictions.jsonl") if "done" in line]
    assert len(scored) < len(done) or share == 0.02


def test_every_evaluation_saves_its_examples(run, flags, tmp_path, monkeypatch, capsys):
    """In the run folder, each under a name of its own; one that was cut off goes on; --overwrite knows them."""
    shutil.copytree(run, folder := tmp_path / "run")
    one, zero = dict(checkpoint=str(folder), test_examples=1, device="cpu"), dict(zero_shot=True)
    expected = evaluate.evaluate(evaluate.Config(**one))
    evaluate.main(one | zero)
    evaluate.main(one | dict(constant=True))  # no model, so nothing but the scores of --save
    said = capsys.readouterr().out
    assert f"saved in {folder / 'evaluation.json'}\n" in said and f"saved in {folder / 'zero-shot.json'}\n" in said
    new = {p.name for p in folder.iterdir()} - {p.name for p in run.iterdir()}
    assert new == {f"{name}.{end}" for name in ("evaluation", "zero-shot") for end in ("json", "predictions.jsonl")}
    assert read(folder / "evaluation.json")["tasks"].keys() == expected.keys()
    lines = lines_of(folder / "evaluation.predictions.jsonl")
    assert sum(line["score"] for line in lines if "score" in line) == pytest.approx(sum(expected.values()))

    before, first = contents(folder), (folder / "evaluation.predictions.jsonl").read_bytes()
    cut = folder / "evaluation-2.predictions.jsonl"
    cut.write_bytes(first[: len(first) // 2])
    evaluate.main(one | dict(test_examples=2))  # not the settings of the one that was cut off: a third
    assert cut.read_bytes() == first[: len(first) // 2] and (folder / "evaluation-3.json").exists()
    assert evaluate.evaluate(evaluate.Config(**one | dict(checkpoint=f"{folder}/"))) == expected
    assert f"of {cut} not scored again" in capsys.readouterr().out and cut.read_bytes() == first
    assert before.items() <= contents(folder).items()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # before a task is done: nothing is left
        patch.setattr(evaluate, "all_scores", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        evaluate.main(one | dict(test_examples=3))
    assert not list(folder.glob("*-4*")) and not list(folder.glob("*.lock"))
    train.main(flags | dict(output_dir=str(folder), overwrite=True, steps=1))
    assert not list(folder.glob("evaluation*"))


def test_the_examples_before_an_adaptation_and_after_it(run, tmp_path):
    """Those before are what the pre-trained run writes; those after what evaluate.py finds with the saved adapters."""
    few = FEW | dict(checkpoint=str(run), output_dir=str(tmp_path / "few"), steps=40, lr=0.1, batch_size=32)
    adapt.main(few)
    evaluate.main(dict(checkpoint=str(tmp_path / "few"), device="cpu"))
    names = ("evaluation.predictions.jsonl", "predictions.jsonl", "before.predictions.jsonl")
    scored, after, before = ([x["output"] for x in lines_of(tmp_path / "few" / n) if "output" in x] for n in names)
    assert scored == after != before and len(after) == len(before) == 24


def test_an_evaluation_in_a_folder_of_others_is_refused(run, monkeypatch):
    """It cannot be saved there: said before the run is loaded."""

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(evaluate.tempfile, "NamedTemporaryFile", refuse)
    monkeypatch.setattr(evaluate, "load_run", None)
    with pytest.raises(
        UserError, match="^--save .*/evaluation.json cannot be written: Permission denied; give another"
    ):
        evaluate.main(dict(checkpoint=str(run), device="cpu"))


def test_an_evaluation_with_other_settings_is_refused(run, tmp_path):
    how = dict(checkpoint=str(run), test_examples=1, device="cpu", save=str(tmp_path / "a.json"))
    evaluate.main(how)
    (tmp_path / "a.json").unlink()
    with pytest.raises(UserError, match=r"a.predictions.jsonl is of another run or other settings: .* delete it"):
        evaluate.main(how | dict(test_examples=2))
    (tmp_path / "a.predictions.jsonl").write_text("{}\n{,\n")
    with pytest.raises(UserError, match=r"a.predictions.jsonl:2 is no JSON"):
        evaluate.main(how)


def test_an_evaluation_of_other_data_or_a_changed_file_is_refused(run, tmp_path, monkeypatch):
    how = dict(checkpoint=str(run), zero_shot=True, test_examples=1, device="cpu", save=str(tmp_path / "a.v1.json"))
    evaluate.main(how)
    (tmp_path / "a.v1.json").unlink()
    path = tmp_path / "a.v1.predictions.jsonl"
    with monkeypatch.context() as patch, pytest.raises(UserError, match="was made with another data set than there is"):
        patch.setattr(evaluate, "marks_of_tasks", lambda tasks: "other")
        evaluate.main(how)
    with FileLock(f"{path}.lock"), pytest.raises(UserError, match="another process writes .*a.v1.predictions.jsonl"):
        evaluate.main(how)
    head = path.read_text().splitlines()[0]
    for line in ('{"a": 1}', "[1]", '{"split": "0", "done": "x"}'):
        path.write_text(f"{head}\n{line}\n")
        with pytest.raises(UserError, match="a.v1.predictions.jsonl was changed by hand"):
            evaluate.main(how)


def test_lines_of_a_killed_process(tmp_path):
    (tmp_path / "x").write_text('{"a": 1}\n{"b"')
    assert read_lines(tmp_path / "x") == [{"a": 1}]


# --- Following a run --------------------------------------------------------------------------------------------------


def test_looking_at_unseen_examples_changes_no_bit(run, flags, tmp_path):
    """The losses are those of the model at that step, on examples that training never sees."""
    train.main(flags | dict(output_dir=str(tmp_path / "looked"), eval_every=3, keep_every=3))
    assert same_tensors(run / "adapter.safetensors", tmp_path / "looked" / "adapter.safetensors")
    log = log_lines(tmp_path / "looked")
    assert {line["step"]: "valid_loss" in line for line in log} == {2: False, 3: True, 4: False, 6: True}
    cfg = train.run_config(str(run))
    model, tokens = load_run(run, cfg)
    items = data.drawn(
        [dataclasses.replace(t, train=t.test) for t in train.benchmarks.load_for(cfg, "0", ("train",)).train], 256
    )
    model.train()
    loss = train.mean_loss(model, tokens, items, (16, 8), 8)
    assert loss == pytest.approx(log[-1]["valid_loss"], rel=1e-6) and model.training
    assert len(items) == 256 and all(isinstance(item, Item) for item in items)


def test_nothing_unseen_to_look_at_is_said(flags, tmp_path, monkeypatch):
    tasks = [dataclasses.replace(task, test=[]) for task in train.benchmarks.load_for(train.Config(), "0", ()).train]
    monkeypatch.setattr(train.benchmarks, "load_for", lambda *_: Benchmark(tasks, [], []))
    with pytest.raises(UserError, match="--eval-every 2: no training task has unseen examples"):
        train.main(flags | dict(output_dir=str(tmp_path / "x"), eval_every=2, eval_examples=0))


def test_the_bar_shows_the_loss_from_the_first_step(flags, tmp_path, monkeypatch):
    shown, original = [], tqdm.set_postfix_str
    monkeypatch.setattr(tqdm, "set_postfix_str", lambda self, s, **k: shown.append(s) or original(self, s, **k))
    train.main(flags | dict(output_dir=str(tmp_path / "x"), eval_every=2, eval_examples=0))
    log = log_lines(tmp_path / "x")
    assert len(shown) >= 6 and shown[0].startswith("loss ") and shown[-1].endswith(f"valid {log[-1]['valid_loss']:.3f}")


def test_the_bar_of_steps_keeps_its_numbers_at_80_columns(flags, tmp_path, monkeypatch):
    written = io.StringIO()
    made = lambda *a, **k: tqdm(*a, **k | dict(disable=False, file=written, ncols=80, mininterval=0))  # noqa: E731
    monkeypatch.setitem(train.Run.steps.__globals__, "tqdm", made)
    monkeypatch.setattr(train, "mean_loss", lambda *_: 12.3456)
    train.main(flags | dict(output_dir=str(tmp_path / "x"), steps=120, eval_every=60, eval_examples=0, batch_size=1))
    lines = [line.rstrip() for line in written.getvalue().split("\r")]
    assert max(map(len, lines)) <= 80 and lines[-1].endswith(", valid 12.346]") and "120/120" in lines[-1]


def test_the_bar_of_tasks_keeps_name_and_scores_at_80_columns(monkeypatch):
    written, name = io.StringIO(), "super_glue_a_very_long_name_of_a_template_that_ends"
    monkeypatch.setattr(tasks, "tqdm", lambda *a, **k: tqdm(*a, **k | dict(disable=False, file=written, ncols=80)))
    monkeypatch.setattr(
        tasks, "read_json", lambda *a, **k: dict(before=12.5, metrics={"EM": 100.0}, seconds=1.0, made_with={})
    )
    monkeypatch.setattr(tasks, "marks_of_tasks", lambda tasks: "")
    monkeypatch.setattr(tasks, "refuse_other", lambda *a: None)
    folder = Path(__file__).parent / "nowhere"
    run = types.SimpleNamespace(folder=folder, in_step=1, made_with={}, seconds=0.0, paces=[])
    monkeypatch.setattr(Path, "mkdir", lambda *a, **k: None)
    monkeypatch.setattr(Path, "exists", lambda self: True)
    assert list(tasks.TaskRun.tasks(run, [types.SimpleNamespace(name=name)] * 3, "42", "adapt all, split 42")) == []
    lines = written.getvalue().split("\r")
    assert max(map(len, map(str.rstrip, lines))) <= 80
    assert "12.5 -> 100.0" in lines[-1] and "super_glue" in lines[-1] and "ends" in lines[-1] and "3/3" in lines[-1]


def test_tensorboard_is_named_where_it_is_missing(flags, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="--tensorboard needs a package: pip install tensorboard"):
        train.main(flags | dict(output_dir=str(tmp_path / "x"), tensorboard=True))


def test_tensorboard_gets_the_numbers_of_the_log(run, flags, tmp_path, monkeypatch):
    """torch's writer, replaced at its edge."""
    got = []

    class SummaryWriter:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, tag, value, step):
            got.append((Path(self.folder).parent.name, tag, value, step))

        def close(self):
            got.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    train.main(flags | dict(output_dir=str(tmp_path / "x"), tensorboard=True, eval_examples=0))
    losses = [(step, value) for name, tag, value, step in got[:-1] if tag == "loss"]
    assert (
        losses == [(line["step"], line["loss"]) for line in lines_of(tmp_path / "x" / "log.jsonl")]
        and got[-1] == "closed"
    )
    got.clear()
    adapt.main(FEW | dict(checkpoint=str(run), output_dir=str(tmp_path / "y"), tensorboard=True))
    first = read(tmp_path / "y" / "result.json")["tasks"]
    assert {tag for _, tag, *_ in got[:-1]} == {f"0/{task}/{key}" for task in first for key in ("loss", "dev_loss")}


# --- What made a run --------------------------------------------------------------------------------------------------


def test_each_start_is_on_record(run, flags, tmp_path, monkeypatch):
    folder = tmp_path / "x"
    monkeypatch.setattr(sys, "argv", ["train.py", "--layers", "q|k"])
    monkeypatch.setattr(train.Run, "record", stop := lambda *a, **k: sys.exit(143))
    with pytest.raises(SystemExit):
        train.main(flags | dict(output_dir=str(folder)))
    monkeypatch.undo()
    train.main(flags | dict(output_dir=str(folder), resume=True))
    starts = read(folder / "provenance.json")["starts"]
    assert len(starts) == 2 and starts[0]["command"] == "python train.py --layers 'q|k'"
    assert (
        starts[0]["packages"]["torch"] == torch.__version__ and starts[0]["cores"] >= 1 and starts[0]["processes"] == 1
    )
    assert starts[0]["commit"] == machine.commit() and stop
    result = read(folder / "result.json")
    least, most = (6 * 8 / max(1e-3, result["seconds"] + off) for off in (0.05, -0.05))  # seconds are rounded
    assert least - 0.1 <= result["examples_per_second"] <= most + 0.1
    assert 0.1 < result["peak_memory_gb"] < 20


def test_an_adaptation_says_its_examples_per_second(run, adapted, tmp_path, monkeypatch):
    """In the loop, without scoring. A task that an earlier version has finished lacks it, and does not count."""
    assert read(adapted / "result.json")["examples_per_second"] > 0
    loop = adapt.adapt_task
    monkeypatch.setattr(adapt, "adapt_task", lambda *a: time.sleep(1) or loop(*a))
    score, few = adapt.evaluate_tasks, FEW | dict(checkpoint=str(run), output_dir=str(tmp_path / "x"), batch_size=8)
    monkeypatch.setattr(adapt, "evaluate_tasks", lambda *a, **k: time.sleep(1) or score(*a, **k))
    name = next(iter(read(adapted / "result.json")["tasks"]))
    assert 8 < adapt.main(few | dict(tasks=name))["examples_per_second"] <= 16  # 2 steps of 8 in 1 to 2 seconds
    (tmp_path / "x" / "result.json").unlink()
    done = read(path := tmp_path / "x" / "0" / f"{name}.json")
    path.write_text(json.dumps({key: value for key, value in done.items() if key != "examples_per_second"}))
    assert adapt.main(few | dict(tasks=name, resume=True))["examples_per_second"] == 0.0


def test_the_commit_of_a_tree(tmp_path, monkeypatch):
    """New values in results/, which are added while runs are made, do not make the tree dirty."""
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit() == "unknown"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    (tmp_path / "results").mkdir()
    for name in ("file", "results/claims.jsonl"):
        (tmp_path / name).write_text("1")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    clean = machine.commit()
    (tmp_path / "results" / "claims.jsonl").write_text("2")
    assert machine.commit() == clean
    (tmp_path / "file").write_text("2")
    assert len(clean) >= 7 and machine.commit() == f"{clean}-dirty"
    monkeypatch.setenv("PATH", "")
    assert machine.commit() == "unknown"


# --- Replacing a run, other devices -----------------------------------------------------------------------------------


def test_overwrite_replaces_a_run(run, flags, tmp_path):
    folder = tmp_path / "x"
    train.main(flags | dict(output_dir=str(folder), steps=2, keep_every=1))
    with pytest.raises(UserError, match="already holds a run: choose another folder, or give --overwrite"):
        train.main(flags | dict(output_dir=str(folder)))
    train.main(flags | dict(output_dir=str(folder), overwrite=True))
    same_run(folder, run)
    assert "overwrite" not in read(folder / "config.json")
    few = dict(checkpoint=str(run), output_dir=str(tmp_path / "few"))
    adapt.main(FEW | few)
    adapt.main(FEW | few | dict(overwrite=True, steps=1))
    assert read(tmp_path / "few" / "config.json")["steps"] == 1


def test_overwrite_removes_nothing_but_a_run(run, adapted, flags, tmp_path):
    """Also not what lies in a folder of it; nor a run of another script; and what is refused stays whole."""
    few = tmp_path / "few"
    for folder, name, main, more in (
        (tmp_path / "x", "thesis.tex", train.main, flags), (tmp_path / "y", "analysis-of-mine.json", train.main, flags),
        (few, "0/notes.txt", adapt.main, FEW | dict(checkpoint=str(run))),
    ):  # fmt: skip
        shutil.copytree(adapted if folder == few else run, folder)
        (folder / name).write_text("years of work")
        before = contents(folder)
        with pytest.raises(UserError, match=f"--overwrite: .* holds {Path(name).name}, which no run writes: choose"):
            main(more | dict(output_dir=str(folder), overwrite=True))
        assert contents(folder) == before
    with pytest.raises(UserError, match="holds a run of train.py: choose another --output-dir"):
        adapt.main(FEW | dict(checkpoint=str(run), output_dir=str(tmp_path / "x"), overwrite=True))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("")
    with pytest.raises(UserError, match="is not empty, it holds notes"):
        train.main(flags | dict(output_dir=str(tmp_path / "other"), overwrite=True))
    with pytest.raises(UserError, match="--resume goes on with a run and --overwrite replaces it: give one of them"):
        train.main(flags | dict(output_dir=str(tmp_path / "x"), overwrite=True, resume=True))


def test_overwrite_keeps_the_old_run_until_the_new_one_can_begin(run, flags, tmp_path):
    shutil.copytree(run, folder := tmp_path / "x")
    before, wrong = contents(folder), dict(output_dir=str(folder), overwrite=True)
    for main, more in (
        (train.main, flags | dict(backbone=str(tmp_path))), (train.main, flags | dict(layers="nothing")),
        (train.main, dict(from_run=str(folder), steps=1)),
    ):  # fmt: skip
        with pytest.raises(UserError):
            main(more | wrong)
        assert contents(folder) == before
    with pytest.raises(UserError, match="is the run that this one starts from: choose another --output-dir"):
        adapt.main(FEW | dict(checkpoint=str(folder)) | wrong)
    assert contents(folder) == before


def test_apple_gpus_are_refused_where_there_are_none(flags, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--device mps: torch sees no GPU of Apple's here, use --device cpu"):
        train.main(flags | dict(output_dir=str(tmp_path / "x"), device="mps"))
    for more in (dict(shard=True), dict(precision="nf4"), dict(compile=True), dict(micro_batch=2)):
        with pytest.raises(UserError, match="does not work with --device mps: leave one of them out"):
            refuse_what_does_not_fit(train.Config(device="mps", **more))
    assert train.make_config(dataset="t0", device="mps").precision == "fp32"


def test_a_checkpoint_has_the_random_state_of_apple_gpus(tmp_path, monkeypatch):
    """torch.mps, replaced at its edge."""
    state = torch.arange(4, dtype=torch.uint8)
    fake = types.SimpleNamespace(
        is_available=lambda: True, get_rng_state=lambda: state, set_rng_state=lambda s: got.append(s)
    )
    got, p = [], torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p])
    monkeypatch.setattr(torch, "mps", fake)
    monkeypatch.setattr(checkpoint, "_fits", lambda *a: True)
    path = tmp_path / "c.safetensors"
    checkpoint.save_checkpoint(path, {"p": p}, optimizer, checkpoint.Progress(step=1, loss=1.0))
    checkpoint.load_checkpoint(path, {"p": p}, optimizer)
    assert len(got) == 1 and torch.equal(got[0], state)
    fake.is_available = lambda: False
    assert checkpoint.load_checkpoint(path, {"p": p}, optimizer).step == 1 and len(got) == 1
    assert backbones.pick_device("mps") == "mps"
