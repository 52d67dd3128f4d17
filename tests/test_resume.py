"""Runs that are killed, stopped, out of disk or memory: a resumed run is bit-identical to an uninterrupted one."""

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import pty
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import adapt
import benchmarks
import data
import inject
import plumbing.run
import scoring
import train
from methods import starting_point
from plumbing.backbones import advice_on_memory
from plumbing.checkpoint import Progress, load_checkpoint, marks_of_tasks, run_tensors, save_checkpoint
from plumbing.errors import RunError, UserError, exit_on_user_error
from plumbing.flags import check_ranges, explicit_flags
from plumbing.folders import CHECKPOINT, locked_folder
from plumbing.run import Every, Run, Signals, truncate_log
from tests.helpers import PowerCut, log_lines, same_run
from tests.stress.kills import small_backbone

STEPS = 12
FLAGS = dict(
    method="mhr", heads=4, dataset="strings", rank=1, skills=2, steps=STEPS, batch_size=4, max_input=8, max_output=4,
    eval_examples=0, log_every=5, save_every="1", seed=3,
)  # fmt: skip
FEW = dict(steps=3, eval_every=2, batch_size=4, shots=4, test_examples=2, tasks="sort+double,drop+swap,double+upper")


@contextlib.contextmanager
def cut_in_step(step: int):
    """A power cut within this step of a training run that starts in this context."""
    calls = []

    def cut(*args):
        calls.append(args)
        if len(calls) == step:
            raise PowerCut
        return backward(*args)

    backward = train.backward_in_parts
    with pytest.MonkeyPatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(train, "backward_in_parts", cut)
        yield


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> str:
    return small_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def flags(backbone) -> dict:
    return FLAGS | dict(backbone=backbone)


@pytest.fixture(scope="module")
def reference(flags, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    train.main(flags | dict(output_dir=str(folder)))
    return folder


# --- Killed -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def child():
    """start(function, *args): a real process, forked from one that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "adapt"])

    def start(function, *args) -> multiprocessing.Process:
        process = context.Process(target=function, args=args)
        process.start()
        return process

    return start


@pytest.mark.parametrize("wanted", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments(child, flags, tmp_path, wanted):
    """SIGKILL, wherever it falls: while loading, training, saving or scoring. Nobody kills the first run."""
    chance, kills, runs, length = random.Random(0), 0, 0, None
    while kills < wanted:
        now = flags | dict(output_dir=str(tmp_path / str(runs)), eval_examples=1, resume=True)
        process, start = child(train.main, now), time.monotonic()
        process.join(length and chance.uniform(0, 1.2 * length))
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
            continue
        assert process.exitcode == 0
        length = length or time.monotonic() - start
        same_run(tmp_path / str(runs), tmp_path / "0")
        runs += 1
    child(train.main, now).join()
    same_run(Path(now["output_dir"]), tmp_path / "0")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_stopped_by_a_signal(child, flags, reference, tmp_path, number, code):
    """SIGTERM, Ctrl-C and SIGHUP end the run after its step: it saves, exits with their code, and can be resumed."""
    folder = tmp_path / "run"
    now = flags | dict(output_dir=str(folder), save_every="100000")
    process = child(slowly, now)
    while not (log := folder / "log.jsonl").exists() or not log.stat().st_size:  # it is at step 5 or later
        time.sleep(0.001)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == code
    model, optimizer = made(flags)
    step = load_checkpoint(folder / CHECKPOINT, run_tensors(model), optimizer).step
    assert 5 <= step < STEPS and not (folder / "result.json").exists()
    train.main(flags | dict(output_dir=str(folder), resume=True, save_every="100000"))
    same_run(folder, reference)


def slowly(flags: dict):
    """`train.main` as a script, a tenth of a second a step, so that a signal meets it in its steps."""
    real = train.set_rates
    train.set_rates = lambda optimizer, rates, factor: (time.sleep(0.1), real(optimizer, rates, factor))
    exit_on_user_error(train.main, flags)


def made(flags: dict):
    """A model and an optimiser as a run makes them."""
    cfg = train.make_config(**flags)
    model, _ = starting_point(cfg, benchmarks.load_for(cfg, cfg.split, ("train",)).train, [])
    return model, train.make_optimizer(model, cfg)


CUTS = [  # (system call, end of the file's name, which of those calls)
    ("replace", "config.json", 1), ("fsync", "log.jsonl", 3), ("fsync", f"{CHECKPOINT}.tmp", 1),
    ("replace", CHECKPOINT, 1), ("replace", CHECKPOINT, 12), ("replace", "adapter.safetensors", 1),
    ("replace", "result.json", 1), ("unlink", CHECKPOINT, 1),
]  # fmt: skip
MORE_CUTS = [
    ("fsync", "tasks.json.tmp", 1), ("replace", "tasks.json", 1), ("fsync", "config.json.tmp", 1),
    ("fsync", "log.jsonl", 1), ("fsync", "log.jsonl", 12), ("fsync", f"{CHECKPOINT}.tmp", 12), ("fsync", "run", 2),
    ("fsync", "run", 3), ("fsync", "adapter.safetensors.tmp", 1), ("fsync", "result.json.tmp", 1),
]  # fmt: skip


@pytest.mark.parametrize(
    "call, name, count", [*CUTS, *(pytest.param(*cut, marks=pytest.mark.slow) for cut in MORE_CUTS)]
)
def test_power_cut_within_a_save(monkeypatch, flags, reference, tmp_path, call, name, count):
    """Before a file or the run folder is synced, gets its name, or is removed, for the count-th time."""
    real, calls, folder = getattr(os, call), [], tmp_path / "run"

    def cut(*args):
        path = os.readlink(f"/proc/self/fd/{args[0]}") if call == "fsync" else str(args[-1])
        calls.extend([path] * path.endswith(f"/{name}"))
        if len(calls) == count:
            raise PowerCut
        return real(*args)

    monkeypatch.setattr(os, call, cut)
    with pytest.raises(PowerCut):
        train.main(flags | dict(output_dir=str(folder)))
    monkeypatch.undo()
    train.main(flags | dict(output_dir=str(folder), resume=True))
    same_run(folder, reference)


@pytest.mark.parametrize(
    "extra",
    [
        dict(method="full"), dict(method="lora", optimizer="adafactor"), dict(method="poly", adapter="sft"),
        dict(method="full", optimizer="adafactor", precision="bf16"),
        dict(method="random", random_by="task"), dict(method="hyperformer"), dict(method="adapter-soup", skills=None),
        dict(method="expert", skills=None), dict(micro_batch=2), dict(checkpointing=True), dict(steps=0, epochs=1),
    ],
    ids=str,
)  # fmt: skip
def test_every_kind_of_run_is_resumed(monkeypatch, flags, tmp_path, extra):
    """Cut in step 8, after a checkpoint of step 6, whatever is trained and however. Few tasks, of few examples."""
    monkeypatch.setattr(benchmarks, "load_for", few_examples)
    now = {k: v for k, v in (flags | dict(save_every="3") | extra).items() if v is not None}
    train.main(now | dict(output_dir=str(tmp_path / "whole")))
    with cut_in_step(8):
        train.main(now | dict(output_dir=str(tmp_path / "cut")))
    torch.manual_seed(99)  # the random state of this process must not matter
    train.main(now | dict(output_dir=str(tmp_path / "cut"), resume=True))
    same_run(tmp_path / "cut", tmp_path / "whole")


def few_examples(cfg, split, parts, load=benchmarks.load_for):
    """`benchmarks.load_for`, but six training tasks of eight examples."""
    whole = load(cfg, split, parts)
    return dataclasses.replace(whole, train=[dataclasses.replace(t, train=t.train[:8]) for t in whole.train[:6]])


@pytest.mark.parametrize("variant", ["all", *(pytest.param(name, marks=pytest.mark.slow) for name in ("z", "mu"))])
def test_adaptation_resumes_with_the_next_task(monkeypatch, reference, tmp_path, variant):
    """Cut in the second of three tasks: the first is not done again, and nothing differs."""
    now = FEW | dict(checkpoint=str(reference), variant=variant)
    adapt.main(now | dict(output_dir=str(tmp_path / "whole")))
    real, started = adapt.adapt_task, []

    def cut(model, tokenizer, task, *args):
        started.append(task.name)
        if len(started) == 2:
            real(model, tokenizer, task, *args)  # its lines are in the log, its scores are not there
            raise PowerCut
        return real(model, tokenizer, task, *args)

    monkeypatch.setattr(adapt, "adapt_task", cut)
    with pytest.raises(PowerCut):
        adapt.main(now | dict(output_dir=str(tmp_path / "cut")))
    adapt.main(dict(output_dir=str(tmp_path / "cut"), resume=True))
    assert started == ["sort+double", "drop+swap", "drop+swap", "double+upper"]
    same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("method", ["mu", "mhr"])
def test_a_run_that_continues_another_is_resumed(reference, tmp_path, method):
    now = dict(from_run=str(reference), method=method, steps=6, save_every="2")
    train.main(now | dict(output_dir=str(tmp_path / "whole")))
    with cut_in_step(6):
        train.main(now | dict(output_dir=str(tmp_path / "cut")))
    train.main(now | dict(output_dir=str(tmp_path / "cut"), resume=True))
    same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(
    "script, what, begun, stop, code",
    [
        (train, "starting_point", False, KeyboardInterrupt(), 130),
        (train, "train_steps", True, SystemExit(143), 143),
        (train, "save_run", True, KeyboardInterrupt(), 130),
        (train, "score_training_tasks", True, SystemExit(129), 129),
        (adapt, "load_run", False, SystemExit(143), 143),
        (adapt, "evaluate_tasks", True, KeyboardInterrupt(), 130),
        (adapt, "adapt_task", True, SystemExit(129), 129),
    ],
)
def test_a_stopped_run_says_how_to_resume(
    monkeypatch, capsys, flags, reference, tmp_path, script, what, begun, stop, code
):
    """Wherever it is stopped: loading, training, saving, scoring. Before it has begun there is nothing to resume."""

    def interrupt(*args, **more):
        raise stop

    monkeypatch.setattr(script, what, interrupt)
    now, folder = flags if script == train else FEW | dict(checkpoint=str(reference)), tmp_path / "cut"
    with pytest.raises(SystemExit) as stopped:
        exit_on_user_error(script.main, now | dict(output_dir=str(folder)))
    assert stopped.value.code == code and folder.exists() == begun
    command = f"to resume: python {script.__name__}.py --resume --output-dir {folder}"
    assert (command in capsys.readouterr().out) == begun
    if begun:
        monkeypatch.undo()
        assert script.main(dict(output_dir=str(folder), resume=True))["parameters"]


@pytest.mark.parametrize("step", [3, STEPS])
def test_the_last_checkpoint_is_that_of_an_uninterrupted_run(monkeypatch, flags, tmp_path, step):
    """The optimiser's state and the random state too, not only what the finished run keeps."""
    monkeypatch.setattr(train, "remove_checkpoint", lambda folder: None)
    train.main(flags | dict(output_dir=str(tmp_path / "whole")))
    with cut_in_step(step):
        train.main(flags | dict(output_dir=str(tmp_path / "cut"), save_every="2"))
    train.main(dict(output_dir=str(tmp_path / "cut"), resume=True))
    (cut, its_state), (whole, state) = (inject.read_tensors(tmp_path / f / CHECKPOINT) for f in ("cut", "whole"))
    assert cut.keys() == whole.keys() and any(name.startswith("optimizer.") for name in cut)
    assert all(torch.equal(cut[name], whole[name]) for name in cut)
    states = [json.loads(one["state"]) for one in (its_state, state)]
    states = [one | {"seconds": 0, "trained": sorted(one["trained"])} for one in states]
    assert states[0] == states[1]


# --- What --resume refuses, and what it does not need -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["result.json", "log.jsonl", "adapter.safetensors", "notes.tmp", "other/x"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_something_else_is_left_alone(flags, reference, tmp_path, name, resume):
    """Nothing in it is read, changed or removed, with --resume or without."""
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    for main, more in ((train.main, flags), (adapt.main, FEW | dict(checkpoint=str(reference)))):
        with pytest.raises(UserError, match=f"--output-dir .*mine is not empty, it holds {name.split('/')[0]}"):
            main(more | dict(output_dir=str(tmp_path / "mine"), resume=resume))
    assert [p for p in (tmp_path / "mine").rglob("*") if p.is_file()] == [path] and path.read_text() == "{}"


def test_what_others_put_into_a_run_folder_stays(flags, tmp_path):
    """A finished run removes its own half-written files only."""
    folder = tmp_path / "run"
    train.main(flags | dict(output_dir=str(folder), steps=1))
    own = ("adapter.safetensors.tmp", "result.json.tmp", "log.jsonl.tmp", ".tmpcW0G7L")  # the last one: safetensors'
    for name in ("notes.tmp", ".tmp", "my.tmp1", *own):
        (folder / name).write_text("")
    train.main(dict(output_dir=str(folder), resume=True))
    assert sorted(p.name for p in folder.glob("*.tmp*")) == [".tmp", "my.tmp1", "notes.tmp"]


def test_a_broken_update_does_not_replace_the_last_good_checkpoint(flags, tmp_path):
    """Loss and gradients may be finite and the values after the step not: what is saved is checked."""
    model, optimizer = made(flags)
    path, tensors = tmp_path / CHECKPOINT, run_tensors(model)
    save_checkpoint(path, tensors, optimizer, Progress(1, 1.0, (0.5,)))
    before = path.read_bytes()
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad)[0] = math.inf
    with pytest.raises(RunError, match="is not finite after step 2: nothing of it was saved. Try a lower --lr"):
        save_checkpoint(path, tensors, optimizer, Progress(2, 1.0, (0.5,)))
    assert path.read_bytes() == before


def test_resume_starts_what_is_not_there_and_leaves_what_is_done(capsys, flags, reference, tmp_path):
    train.main(flags | dict(output_dir=str(tmp_path / "run"), resume=True))
    same_run(tmp_path / "run", reference)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").iterdir()}
    result = train.main(dict(output_dir=str(tmp_path / "run"), resume=True))
    assert "is finished: nothing to resume" in capsys.readouterr().out and result["steps"] == STEPS
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").iterdir()}


@pytest.fixture
def cut_run(flags, tmp_path) -> Path:
    """A run with a checkpoint of step 3."""
    folder = tmp_path / "cut"
    with cut_in_step(4):
        train.main(flags | dict(output_dir=str(folder)))
    return folder


def test_settings_cannot_change(cut_run, flags):
    for name, value in (("lr", 0.5), ("heads", 2), ("steps", 20), ("seed", 4)):
        with pytest.raises(UserError, match=f"--{name} {value} does not fit the run in .*cut"):
            train.main(flags | {name: value, "output_dir": str(cut_run), "resume": True})
    with pytest.raises(UserError, match="already holds a run"):
        train.main(flags | dict(output_dir=str(cut_run)))


def test_what_changes_rounding_alone_may_change(cut_run, reference):
    """As the advice on memory says: the run can be resumed in smaller parts, and with gradient checkpointing."""
    train.main(dict(output_dir=str(cut_run), resume=True, micro_batch=2, checkpointing=True))
    ours, whole = (load_file(run / "adapter.safetensors") for run in (cut_run, reference))
    for name in whole:
        torch.testing.assert_close(ours[name], whole[name], rtol=1e-3, atol=1e-3)


def test_a_resumed_run_may_be_looked_at_more_often(cut_run, reference, tmp_path):
    """The same bits are trained. In adapt.py --eval-every decides when a task stops: there it is refused."""
    train.main(dict(output_dir=str(cut_run), resume=True, log_every=1, eval_every=2))
    assert [line["step"] for line in log_lines(cut_run) if "valid_loss" in line] == [4, 6, 8, 10, 12]
    assert [line["step"] for line in log_lines(cut_run)] == list(range(4, STEPS + 1))
    assert (cut_run / "adapter.safetensors").read_bytes() == (reference / "adapter.safetensors").read_bytes()
    few = FEW | dict(checkpoint=str(reference), output_dir=str(tmp_path / "few"))
    adapt.main(few)
    with pytest.raises(UserError, match="--eval-every 1 does not fit the run in .*few, whose is 2"):
        adapt.main(few | dict(resume=True, eval_every=1))


def test_the_same_command_with_resume(reference, tmp_path):
    """--split comes from the command line as a list, and from config.json as a tuple."""
    line = f"--checkpoint {reference} --output-dir {tmp_path / 'few'} --split 1 2 --tasks sort+double --steps 2"
    flags = explicit_flags(adapt.Config, {}, f"{line} --shots 4 --resume".split())
    results = [adapt.main(flags) for _ in range(2)]
    assert results[0] == results[1] and list(results[0]["splits"]) == ["1", "2"]


@pytest.mark.parametrize(
    "wrong", [dict(save_every="10s"), dict(heads=3), dict(lr=-1.0), dict(data_dir="no", dataset="t0")]
)
def test_a_mistake_leaves_no_folder(flags, tmp_path, wrong):
    with pytest.raises(UserError):
        train.main(flags | wrong | dict(output_dir=str(tmp_path / "run")))
    assert not list(tmp_path.iterdir())


def test_damaged_checkpoints_are_refused(cut_run, reference, flags):
    path = cut_run / CHECKPOINT
    whole = path.read_bytes()
    damaged = {
        "empty": b"", "cut": whole[: len(whole) // 2], "a pickle": b"\x80\x04}q\x00.",
        "an adapter": (reference / "adapter.safetensors").read_bytes(),
        "a flipped bit": bytes([*whole[:-1], whole[-1] ^ 1]),
    }  # fmt: skip
    for content in damaged.values():
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"checkpoint.safetensors is no whole checkpoint .*delete it"):
            train.main(dict(output_dir=str(cut_run), resume=True))
        assert path.read_bytes() == content
    path.unlink()  # as the message says
    train.main(dict(output_dir=str(cut_run), resume=True))
    same_run(cut_run, reference)


NAN = math.nan
NEST = "[" * 100_000 + "]" * 100_000
SPOILT = {  # functions that change the tensors and the state of a checkpoint, which is then signed again
    "no random state": lambda x, state: x.pop("random"),
    "a random state of floats": lambda x, state: x.update(random=x["random"].float()),
    "a random state of zeros": lambda x, state: x.update(random=torch.zeros_like(x["random"])),
    "a short random state": lambda x, state: x.update(random=x["random"][:9].clone()),
    "an unknown parameter": lambda x, state: x.update({"optimizer.99.step": torch.ones(())}),
    "an unknown name": lambda x, state: x.update({"optimizer.a.b": torch.ones(())}),
    "a name without parts": lambda x, state: x.update({"optimizer.": torch.ones(())}),
    "a missing weight": lambda x, state: x.pop(next(n for n in x if n.startswith("model."))),
    "a weight that is not finite": lambda x, state: next(p for n, p in x.items() if "inventory" in n)[0, 0].fill_(NAN),
    "a state that is not finite": lambda x, state: next(p for n, p in x.items() if "_sq" in n)[:1].fill_(math.inf),
    "a weight of another shape": lambda x, state: x.update({n: p[:1].clone() for n, p in x.items() if "router.Z" in n}),
    "a weight of another type": lambda x, state: x.update({n: p.double() for n, p in x.items() if n[:5] == "model"}),
    "half a state": lambda x, state: x.pop(next(n for n in x if "_sq" in n)),
    "no state of a parameter": lambda x, state: [x.pop(n) for n in list(x) if n.startswith("optimizer.1.")],
    "a state of another shape": lambda x, state: x.update({n: torch.cat([p, p]) for n, p in x.items() if "_sq" in n}),
    "a step in words": lambda x, state: state.update(step="x"),
    "no step": lambda x, state: state.pop("step"),
    "a step below 1": lambda x, state: state.update(step=0),
    "a huge step": lambda x, state: state.update(step=10**30),
    "losses in words": lambda x, state: state.update(recent=["x"]),
    "a loss that is not finite": lambda x, state: state.update(recent=[math.inf]),
    "seconds with too many digits": lambda x, state: state.update(seconds=10**400),
    "no numbers": lambda x, state: state.pop("numbers"),
    "numbers in a list": lambda x, state: state.update(numbers=[1]),
    "a number in the place of a tensor": lambda x, state: state["numbers"].update({n: 1.0 for n in x if "_sq" in n}),
    "a list of lists": lambda x, state: state.update(trained=[[1]]),
}  # fmt: skip


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_checkpoints_of_odd_content_change_nothing(monkeypatch, flags, tmp_path, optimizer):
    """Signed, but with missing, unknown or impossible entries: one sentence; model, optimiser and random state are as
    before. The one that nobody changed is then loaded."""
    path, (model, own) = tmp_path / CHECKPOINT, made(flags | dict(optimizer=optimizer))
    monkeypatch.setattr(os, "fsync", lambda number: None)  # it would be most of the time
    changed = run_tensors(model)
    for p in changed.values():
        p.grad = torch.ones_like(p)
    own.step()
    save_checkpoint(path, changed, own, Progress(1, 1.0, (2.0,)))
    tensors, metadata = inject.read_tensors(path)
    texts = {
        "no JSON": "{", "nested too deep": NEST, "no object": "5", "an empty list": "[]", "too many digits": "9" * 5000,
    }  # fmt: skip
    before, random = everything(changed, own), torch.get_rng_state()
    for name, spoil in (SPOILT | texts).items():
        odd, state = {n: x.clone() for n, x in tensors.items()}, json.loads(metadata["state"])
        if callable(spoil):
            spoil(odd, state)
        inject.write_tensors(odd, path, state=json.dumps(state) if callable(spoil) else spoil)
        with pytest.raises(UserError, match="delete it to start the run again") as refused:
            load_checkpoint(path, changed, own)
        assert "\n" not in str(refused.value), name
        assert everything(changed, own) == before and torch.equal(torch.get_rng_state(), random), name
    inject.write_tensors(tensors, path, state=metadata["state"])
    whole = path.read_bytes()
    path.write_bytes(re.sub(rb"(step\W+)1", rb"\g<1>8", whole, count=1))  # the JSON is under the digest too
    assert path.read_bytes() != whole
    with pytest.raises(UserError, match="is damaged: its content is not what was saved"):
        load_checkpoint(path, changed, own)
    path.write_bytes(whole)
    assert load_checkpoint(path, changed, own)[:3] == (1, 1.0, (2.0,))
    assert everything(changed, own) == before


def everything(changed: dict, optimizer) -> str:
    """A hash of what a run changes: adapters, routers and the optimiser's state."""
    states = {f"{k} {n}": v for k, own in optimizer.state_dict()["state"].items() for n, v in own.items()}
    return inject.digest({name: torch.as_tensor(v) for name, v in (changed | states).items()})


@pytest.mark.parametrize("method", ["mhr", "full"])
def test_another_backbone_or_data_set_is_refused(monkeypatch, flags, backbone, tmp_path, method):
    """--resume after the backbone's files, or the examples, were replaced: one sentence. With the old ones it works."""
    mine, now = tmp_path / "backbone", flags | dict(method=method, output_dir=str(tmp_path / "cut"), steps=4)
    shutil.copytree(backbone, mine)
    with cut_in_step(4):
        train.main(now | dict(backbone=str(mine)))
    again = dict(output_dir=str(tmp_path / "cut"), resume=True)
    weights, file = load_file(mine / "model.safetensors"), mine / "model.safetensors"
    whole, name = file.read_bytes(), next(n for n in weights if n.endswith("wo.weight"))
    save_file(weights | {name: weights[name] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="checkpoint.safetensors was made with another backbone than there is now"):
        train.main(again)
    file.write_bytes(whole)
    with monkeypatch.context() as patch:
        patch.setattr(benchmarks, "load_for", one_example_less)
        with pytest.raises(UserError, match="checkpoint.safetensors was made with another data set than there is now"):
            train.main(again)
    assert train.main(again)["steps"] == 4


def one_example_less(cfg, split, parts, load=benchmarks.load_for):
    whole = load(cfg, split, parts)
    less = dataclasses.replace(whole.train[0], train=whole.train[0].train[:-1])
    return dataclasses.replace(whole, train=[less, *whole.train[1:]])


def test_the_mark_of_tasks():
    """Another name, number of examples, first or last example makes another one; the same tasks make the same."""
    examples = [data.Example(letter, (letter,)) for letter in "abc"]
    task = data.Task("one", "exact", examples, examples, [])
    others = [
        dataclasses.replace(task, name="two"), dataclasses.replace(task, train=examples[:2]),
        dataclasses.replace(task, dev=examples[1:]), dataclasses.replace(task, test=examples),
        dataclasses.replace(task, train=[*examples[:2], data.Example("x", ("x",))]),
    ]  # fmt: skip
    marks = [marks_of_tasks(tasks) for tasks in ([task], [], [task, task], *([other] for other in others))]
    assert len(set(marks)) == 8 and marks_of_tasks([dataclasses.replace(task)]) == marks[0]


def test_a_task_from_another_pretraining_is_refused(monkeypatch, reference, tmp_path):
    """`adapt.py --resume` after --checkpoint was trained anew: results of both are never mixed."""
    run, now = tmp_path / "run", FEW | dict(output_dir=str(tmp_path / "few"), tasks="sort+double,drop+swap")
    shutil.copytree(reference, run)
    real = adapt.adapt_task

    def cut(model, tokenizer, task, *args):
        if task.name == "drop+swap":
            raise PowerCut
        return real(model, tokenizer, task, *args)

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(adapt, "adapt_task", cut)
        adapt.main(now | dict(checkpoint=str(run)))
    tensors, metadata = inject.read_tensors(path := run / "adapter.safetensors")
    inject.write_tensors({n: x + 1 for n, x in tensors.items()}, path, backbone=metadata["backbone"])
    with pytest.raises(UserError, match=r"sort\+double.json was made with another checkpoint than there is now"):
        adapt.main(dict(output_dir=now["output_dir"], resume=True))


@pytest.mark.parametrize("main", [train.main, adapt.main])
def test_the_log_is_on_the_disk_before_what_follows_it(monkeypatch, flags, reference, tmp_path, main):
    """No checkpoint and no task's scores outlive their log lines: those are synced first."""
    folder, synced, seen = tmp_path / "run", {}, []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(number):
        synced[os.readlink(f"/proc/self/fd/{number}")] = os.fstat(number).st_size
        fsync(number)

    def watched_replace(old, new):
        if Path(new).name in (CHECKPOINT, "sort+double.json", "drop+swap.json"):
            seen.append((synced.get(str(folder / "log.jsonl"), 0), (folder / "log.jsonl").stat().st_size))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    main(dict(output_dir=str(folder)) | (flags if main == train.main else FEW | dict(checkpoint=str(reference))))
    assert all(done == size for done, size in seen) and len({size for _, size in seen}) > 1


@pytest.mark.parametrize(
    "damaged",
    [b'{"step": 1', b'{"step": 1x}', b'\xff{"step": 1}', b'{"loss": 1}', b'{"step": "1"}', b"[1]", b"[" * 10**5 + b"}"],
)
def test_damaged_lines_of_a_log(tmp_path, damaged):
    """One in the middle is named; an incomplete last one is dropped, with those that will be written again."""
    log, good = tmp_path / "log.jsonl", [b'{"step": %d}' % k for k in range(1, 5)]
    log.write_bytes(b"\n".join([good[0], damaged, good[1], b""]))
    before = log.read_bytes()
    with pytest.raises(UserError, match=r"log.jsonl:2 is damaged: delete this line") as refused:
        truncate_log(log, lambda line: line["step"] <= 2)
    assert "\n" not in str(refused.value) and log.read_bytes() == before
    log.write_bytes(b"\n".join([*good, damaged]))
    truncate_log(log, lambda line: line["step"] <= 2)
    assert log.read_bytes() == good[0] + b"\n" + good[1] + b"\n"


def test_a_second_run_in_the_same_folder_is_refused(cut_run, reference):
    with locked_folder(cut_run, "python train.py"):
        for main, extra in ((train.main, {}), (adapt.main, dict(checkpoint=str(reference)))):
            with pytest.raises(UserError, match="another process is at work in .*cut"):
                main(extra | dict(output_dir=str(cut_run), resume=not extra))
    train.main(dict(output_dir=str(cut_run), resume=True))


@pytest.mark.parametrize("text", ["", "0", "-5", "10s", "1.5m", "m", "10m ", "9" * 12])
def test_save_every_is_steps_or_minutes(text):
    with pytest.raises(UserError, match="--save-every"):
        check_ranges(train.Config(save_every=text))


# --- Runs that fail ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: no space")])
def test_full_disk(monkeypatch, capsys, cut_run, reference, error):
    """One sentence and exit code 1; the last checkpoint stays whole, and the run resumes when there is space."""

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise error

    before = (cut_run / CHECKPOINT).read_bytes()
    monkeypatch.setattr(inject, "save_file", full)
    with pytest.raises(SystemExit) as failed:
        exit_on_user_error(train.main, dict(output_dir=str(cut_run), resume=True))
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert failed.value.code == 1 and said.startswith(f"error: {cut_run / CHECKPOINT}: cannot be written: ")
    assert (cut_run / CHECKPOINT).read_bytes() == before and not list(cut_run.glob("*.tmp"))
    monkeypatch.undo()
    train.main(dict(output_dir=str(cut_run), resume=True))
    same_run(cut_run, reference)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_loss_stops_the_run(monkeypatch, cut_run, reference, value):
    """Before it changes anything: the last good checkpoint stays, and the message names the step and each example."""
    real, calls = train.token_loss, []

    def broken(model, batch):
        calls.append(batch)
        return real(model, batch) * (value if len(calls) == 3 else 1)

    monkeypatch.setattr(train, "token_loss", broken)
    with pytest.raises(RunError, match=r"step 6, training examples .*: the loss is (nan|inf)") as failed:
        train.main(dict(output_dir=str(cut_run), resume=True))
    tasks = benchmarks.load_for(train.Config(), "0", ("train",)).train
    batch = next(data.batches(tasks, FLAGS["batch_size"], FLAGS["seed"], start=5))
    by_name = {task.name: task.train for task in tasks}
    named = [by_name[name][int(k)] for name, k in re.findall(r"([\w+]+)\[(\d+)\]", str(failed.value))]
    assert named == [item.example for item in batch]
    monkeypatch.undo()
    train.main(dict(output_dir=str(cut_run), resume=True))
    same_run(cut_run, reference)


class Steep(torch.autograd.Function):
    """The same number, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.inf


def test_nonfinite_gradients_stop_the_run(monkeypatch, cut_run, reference):
    """The loss is finite, its gradient is not: it changes nothing either."""
    real, calls = train.token_loss, []

    def broken(model, batch):
        calls.append(batch)
        return Steep.apply(real(model, batch)) if len(calls) == 3 else real(model, batch)

    monkeypatch.setattr(train, "token_loss", broken)
    with pytest.raises(RunError, match=r"step 6, .*: the loss is \d+\.\d+, the gradient norm (nan|inf)"):
        train.main(dict(output_dir=str(cut_run), resume=True))
    monkeypatch.undo()
    train.main(dict(output_dir=str(cut_run), resume=True))
    same_run(cut_run, reference)


def test_nonfinite_gradients_end_one_task_not_all(monkeypatch, capsys, reference, tmp_path):
    """In the second step of one of two tasks: that one keeps its best values, which are finite; the other is done."""
    real, calls = train.token_loss, []

    def broken(model, batch):
        loss = real(model, batch)
        calls.append(loss.requires_grad)
        return Steep.apply(loss) if sum(calls) == 2 else loss

    monkeypatch.setattr(train, "token_loss", broken)
    few = FEW | dict(checkpoint=str(reference), tasks="drop+swap,double+upper", output_dir=str(tmp_path / "few"))
    stops = adapt.main(few)["splits"]["0"]["stops"]
    assert "drop+swap: loss or gradients are not finite in step 2" in capsys.readouterr().out
    assert {name: stop["stopped"] for name, stop in stops.items()} == {"drop+swap": 2, "double+upper": 3}
    saved = load_file(tmp_path / "few" / "0" / "drop+swap.safetensors")
    assert all(x.isfinite().all() for x in saved.values() if x.is_floating_point())


def test_nonfinite_loss_ends_one_task_not_all(monkeypatch, capsys, reference, tmp_path):
    """Of three tasks the second one breaks: it keeps its best values, here those before training."""
    real, tensors_of, of_second = train.backward_in_parts, train.tensors_of, []

    def noted(model, tokenizer, items, *args, **lengths):
        tensors = tensors_of(model, tokenizer, items, *args, **lengths)
        of_second.extend([tensors["input_ids"]] if items[0].example.input == second else [])
        return tensors

    def broken(loss_of, parts, device):
        loss = real(loss_of, parts, device)
        return loss * math.nan if any(parts[0].tensors["input_ids"] is x for x in of_second) else loss

    few = FEW | dict(checkpoint=str(reference), shots=1, batch_size=1)
    tasks = adapt.tasks_to_adapt(train.run_config(str(reference)), "0", adapt.make_config(**few))
    second = next(task for task in tasks if task.name == "drop+swap").train[0].input
    monkeypatch.setattr(train, "tensors_of", noted)
    monkeypatch.setattr(train, "backward_in_parts", broken)
    stops = adapt.main(few | dict(output_dir=str(tmp_path / "few")))["splits"]["0"]["stops"]
    assert "drop+swap: loss or gradients are not finite in step 1" in capsys.readouterr().out
    assert [(name, stop["stopped"]) for name, stop in stops.items()] == [
        ("sort+double", 3), ("drop+swap", 1), ("double+upper", 3),
    ]  # fmt: skip
    assert stops["drop+swap"]["best_step"] == 0


@pytest.mark.parametrize("best_by", ["loss", "score"])
def test_training_steps_are_in_training_mode(monkeypatch, reference, tmp_path, best_by):
    """Also after a look at the dev examples, which are scored in evaluation mode, without noise."""
    real, modes = train.token_loss, []

    def watched(model, *args, **kwargs):
        modes.append((torch.is_grad_enabled(), model.training))
        return real(model, *args, **kwargs)

    monkeypatch.setattr(train, "token_loss", watched)
    adapt.main(FEW | dict(checkpoint=str(reference), best_by=best_by, eval_every=1, output_dir=str(tmp_path / "few")))
    assert {mode for grad, mode in modes if grad} == {True} and {mode for grad, mode in modes if not grad} <= {False}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("[..] can't allocate memory: 9")])
def test_out_of_memory_is_one_sentence_with_advice(monkeypatch, flags, reference, tmp_path, error):
    """Wherever it happens: in a forward pass, in the optimiser's first step, in scoring."""

    def full(*args, **kwargs):
        raise error

    for module, name in ((train, "token_loss"), (torch.optim.AdamW, "step"), (scoring, "predict")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(RunError, match="not enough memory: try a smaller --micro-batch .*--checkpointing"):
                train.main(flags | dict(output_dir=str(tmp_path / name), steps=1, eval_examples=1))
    monkeypatch.setattr(adapt, "all_scores", full)
    with pytest.raises(RunError, match="not enough memory: try .*--eval-batch"):
        adapt.main(FEW | dict(checkpoint=str(reference), output_dir=str(tmp_path / "few")))
    with pytest.raises(RunError, match="not enough memory"), advice_on_memory(""):
        torch.empty(2**31 - 1, 128, 2**31 - 1)  # the largest --rank and --skills: more bytes than an int64 counts
    with pytest.raises(RuntimeError, match="^another$"), advice_on_memory(""):
        raise RuntimeError("another")


def test_a_launcher_repeats_sigterm_a_person_ctrl_c():
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.caught == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_nohup_is_respected(monkeypatch):
    """SIGHUP that is ignored stays ignored, in the loop and around it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
        exit_on_user_error(lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert not signals.caught and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


HUNG_UP = """
import sys, time; sys.path.insert(0, ROOT); from plumbing.errors import exit_on_user_error
def main():
    try: print("ready", flush=True); time.sleep(60)
    finally: print("how to resume", file=sys.stdout, flush=True)
exit_on_user_error(main)
"""


def test_the_terminal_is_closed(tmp_path):
    """A real terminal whose other end is closed: printing to it is no error, and the exit code is 129."""
    child, ours = pty.fork()
    if not child:
        program = HUNG_UP.replace("ROOT", repr(str(Path(train.__file__).parent)))
        os.execv(sys.executable, [sys.executable, "-c", program])
    assert b"ready" in os.read(ours, 100)
    os.close(ours)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 129


# --- The run beside its loop ------------------------------------------------------------------------------------------


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.nn.Parameter(torch.ones(2))


def run_of(weight, folder: Path, **options) -> Run:
    """A run that trains one tensor. Without other options it saves after its last step only."""
    optimizer = torch.optim.SGD([weight], lr=0.1)
    return Run(folder, {"weight": weight}, optimizer, **dict(save_every="100000") | options)


@pytest.mark.parametrize("steps, lines", [(1500, 10), (1234, 13), (40, 1), (60, 2)])
def test_plain_lines_are_some_ten_a_run(capsys, weight, tmp_path, steps, lines):
    """Without a terminal; each with the step, the loss and the seconds."""
    with run_of(weight, tmp_path, log_every=50) as run:
        for _ in run.steps(steps, "train"):
            run.record(2.0, 1.0)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == lines and said[-1] == f"step {steps}/{steps}  loss 2.0000  0 s"


def test_lines_of_the_log(capsys, weight, tmp_path):
    """One every log_every steps and after the last step: the mean loss since the line before, and what else is told."""
    with run_of(weight, tmp_path, log_every=2, unit="update") as run:
        for step in run.steps(5, "train"):
            run.optimizer.param_groups[0]["lr"] = 0.5 * step
            run.record(float(step), 10.0 * step, f"return {step}", episodes=3 * step)
    assert log_lines(tmp_path) == [
        {"update": k, "loss": loss, "norm": 10.0 * k, "lr": 0.5 * k, "episodes": 3 * k}
        for k, loss in ((2, 1.5), (4, 3.5), (5, 5.0))
    ]
    assert run.now[0::2] == (5, ()) and run.now.loss == 5.0
    assert "update 5/5  return 5  0 s" in capsys.readouterr().out


def test_when_to_save(monkeypatch):
    assert [step for step in range(1, 10) if Every("3").due(step)] == [3, 6, 9]
    clock = [0.0]
    monkeypatch.setattr(plumbing.run.time, "monotonic", lambda: clock[0])
    every, saved = Every("2m"), []
    for step in range(10):
        clock[0] += 50
        saved += [step] * every.due(step)
    assert saved == [2, 5, 8]  # after 150, 300, 450 seconds


def test_a_run_saves_when_due_and_at_its_end(monkeypatch, weight, tmp_path):
    saved, save = [], plumbing.run.save_checkpoint

    def noted(path, tensors, optimizer, progress, made_with):
        save(path, tensors, optimizer, progress, made_with)
        saved.append((progress.step, progress.recent))

    monkeypatch.setattr(plumbing.run, "save_checkpoint", noted)
    with run_of(weight, tmp_path, save_every="3", log_every=2) as run:
        for step in run.steps(7, "train"):
            run.record(float(step), 1.0)
    assert saved == [(3, (3.0,)), (6, ()), (7, ())]  # with the losses that no line has yet


def test_a_resumed_run_drops_log_lines_after_its_checkpoint(weight, tmp_path):
    with pytest.raises(PowerCut), run_of(weight, tmp_path, save_every="3") as run:
        for step in run.steps(7, "train"):
            if step == 6:
                raise PowerCut
            run.record(float(step), 1.0)
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2, 3, 4, 5]
    with run_of(weight, tmp_path, resume=True) as run:
        assert [line["step"] for line in log_lines(tmp_path)] == [1, 2, 3]
        for _ in run.steps(7, "train"):
            run.record(9.0, 1.0)
    assert [line["loss"] for line in log_lines(tmp_path)] == [1.0, 2.0, 3.0, 9.0, 9.0, 9.0, 9.0]


def test_a_signal_stops_a_run_after_its_step(capsys, weight, tmp_path):
    """It saves, exits with the signal's code, and gives the handlers back; a second run resumes after that step."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped, run_of(weight, tmp_path) as run:
        for step in run.steps(9, "train"):
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            weight.data += 1
            run.record(1.0, 1.0)
    said = capsys.readouterr().out
    assert stopped.value.code == 143 and "stopping after this step" in said and "stopped after step 4" in said
    assert signal.getsignal(signal.SIGTERM) == before
    weight.data.zero_()
    with run_of(weight, tmp_path, resume=True) as run:
        assert list(run.steps(9, "train")) == [5, 6, 7, 8, 9] and weight.tolist() == [5, 5]
    assert "resuming after step 4" in capsys.readouterr().out
    with run_of(weight, tmp_path) as run:  # without resume it starts from the beginning
        assert list(run.steps(2, "train")) == [1, 2]
