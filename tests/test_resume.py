"""Runs that are cut off: killed, stopped, out of disk or memory. What goes on is what was never cut off, to the bit."""

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
from methods import starting_point
from plumbing.backbones import advice_on_memory
from plumbing.checkpoint import Progress, load_checkpoint, marks_of_tasks, run_tensors, save_checkpoint
from plumbing.errors import exit_on_user_error
from plumbing.flags import explicit_flags
from plumbing.folders import CHECKPOINT, locked_folder
from plumbing.run import Every, Signals, truncate_log, write_line
import data
import inject

import train
from plumbing.backbones import tiny_from_scratch
from plumbing.errors import RunError, UserError

STEPS = 12
FLAGS = dict(
    method="mhr", heads=4, dataset="strings", rank=1, skills=2, steps=STEPS, batch_size=4, max_input=8, max_output=4,
    eval_examples=1, log_every=5, save_every="1", seed=3,
)  # fmt: skip
FEW = dict(steps=3, eval_every=2, batch_size=4, shots=4, test_examples=2, tasks="sort+double,drop+swap,double+upper")


class PowerCut(BaseException):
    """Ends a run at a chosen call, past all that handles exceptions."""


def lines(folder: Path) -> list[dict]:
    """The log without the seconds, which no two runs share."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in log]


def same(folder: Path, reference: Path):
    """Two finished runs are the same: files, bits of what was trained, log, result but for the seconds."""
    names = [{str(p.relative_to(f)) for p in f.rglob("*")} for f in (folder, reference)]
    assert names[0] == names[1]
    for path in reference.rglob("*.safetensors"):
        assert (folder / path.relative_to(reference)).read_bytes() == path.read_bytes(), path
    assert lines(folder) == lines(reference)
    results = [json.loads((f / "result.json").read_text()) | {"seconds": 0} for f in (folder, reference)]
    assert results[0] == results[1]


def cut_at(monkeypatch, step: int):
    """A power cut within a step of training."""
    real, calls = train.backward_in_parts, []

    def cut(*args):
        calls.append(args)
        if len(calls) == step:
            raise PowerCut
        return real(*args)

    monkeypatch.setattr(train, "backward_in_parts", cut)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> str:
    """A smaller tiny backbone: one layer of each kind."""
    from transformers import ByT5Tokenizer, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("backbone")
    shape = tiny_from_scratch().config
    shape.d_model, shape.d_kv, shape.d_ff, shape.num_layers, shape.num_decoder_layers = 16, 4, 16, 1, 1
    torch.manual_seed(0)
    T5ForConditionalGeneration(shape).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def flags(backbone) -> dict:
    return FLAGS | dict(backbone=backbone)


@pytest.fixture(scope="module")
def reference(flags, tmp_path_factory) -> Path:
    """A run that was never cut off."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    train.main(flags | dict(output_dir=str(folder)))
    return folder


# --- Killed -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def child():
    """start(function, *args): a real process, forked from one that has imported everything and computed nothing."""
    before, os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS"), "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])

    def start(function, *args) -> multiprocessing.Process:
        process = context.Process(target=function, args=args)
        process.start()
        return process

    yield start
    os.environ.pop("OMP_NUM_THREADS")
    if before is not None:
        os.environ["OMP_NUM_THREADS"] = before


def test_killed_at_fifty_random_moments(child, flags, reference, tmp_path):
    """SIGKILL, wherever it falls: while loading, training, saving or scoring."""
    chance, kills, runs, length = random.Random(0), 0, 0, None
    while kills < 50:
        folder = tmp_path / str(runs)
        now = flags | dict(output_dir=str(folder), resume=True)
        process, begin = child(train.main, now), time.monotonic()
        process.join(length and chance.uniform(0, 1.2 * length))
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
            continue
        assert process.exitcode == 0
        length = length or time.monotonic() - begin  # of the first run, which nobody kills
        same(folder, reference)
        runs += 1
    child(train.main, now).join()
    same(folder, reference)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_stopped_by_a_signal(child, flags, reference, tmp_path, number, code):
    """SIGTERM, Ctrl-C and SIGHUP end the step, save, and end with their exit codes; the run then goes on."""
    folder = tmp_path / "run"
    now = flags | dict(output_dir=str(folder), save_every="100000")
    process = child(slowly, now)
    while not (log := folder / "log.jsonl").exists() or not log.stat().st_size:  # it is at step 5 or later
        time.sleep(0.001)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == code
    step = load_checkpoint(folder / CHECKPOINT, *made(flags)).step
    assert 5 <= step < STEPS and not (folder / "result.json").exists()
    train.main(flags | dict(output_dir=str(folder), resume=True, save_every="100000"))
    same_but_config = json.loads((folder / "result.json").read_text())["tasks"]
    assert same_but_config == json.loads((reference / "result.json").read_text())["tasks"]
    assert (folder / "adapter.safetensors").read_bytes() == (reference / "adapter.safetensors").read_bytes()


def slowly(flags: dict):
    """`train.main` as a script, a tenth of a second a step, so that a signal meets it in its steps."""
    real = train.set_rates
    train.set_rates = lambda optimizer, rates, factor: (time.sleep(0.1), real(optimizer, rates, factor))
    exit_on_user_error(train.main, flags)


def made(flags: dict):
    """A model and an optimiser as a run makes them."""
    cfg = train.make_config(**flags)
    model, _ = starting_point(cfg, train.load_tasks(cfg, cfg.split, ("train",)).train, [])
    return model, train.make_optimizer(model, cfg)


@pytest.mark.parametrize(
    "call, count", [*((call, n) for call in ("fsync", "replace") for n in (1, 2, 3, 6, 14, 15)), ("unlink", 1)]
)
def test_power_cut_within_a_save(monkeypatch, flags, reference, tmp_path, call, count):
    """Cut off at the count-th sync, renaming or removal of a file: config, tasks, log, checkpoints, adapter, result."""
    real, calls, folder = getattr(os, call), [], tmp_path / "run"

    def cut(*args):
        calls.append(args)
        if len(calls) == count:
            raise PowerCut
        return real(*args)

    monkeypatch.setattr(os, call, cut)
    with pytest.raises(PowerCut):
        train.main(flags | dict(output_dir=str(folder)))
    monkeypatch.undo()
    train.main(flags | dict(output_dir=str(folder), resume=True))
    same(folder, reference)


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
def test_every_kind_of_run_goes_on(monkeypatch, flags, tmp_path, extra):
    """Cut off after step 7 with a checkpoint of step 6, whatever is trained and however."""
    now = {k: v for k, v in (flags | dict(save_every="3", batch_size=64) | extra).items() if v is not None}
    if extra.get("epochs"):  # few steps: an epoch of this batch
        now["batch_size"] = 4096
    train.main(now | dict(output_dir=str(tmp_path / "whole")))
    folder = str(tmp_path / "cut")
    cut_at(monkeypatch, 8)
    with pytest.raises(PowerCut):
        train.main(now | dict(output_dir=folder))
    monkeypatch.undo()
    torch.manual_seed(99)  # the state of this process must not matter
    train.main(now | dict(output_dir=folder, resume=True))
    same(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("variant", ["all", "z", "mu"])
def test_adaptation_goes_on_with_the_next_task(monkeypatch, reference, tmp_path, variant):
    """Cut off in the second of three tasks: the first is not done again, and all is as if nothing had happened."""
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
    same(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("method", ["mu", "mhr"])
def test_a_run_that_went_on_from_another_goes_on(monkeypatch, reference, tmp_path, method):
    now = dict(from_run=str(reference), method=method, steps=6, save_every="2")
    train.main(now | dict(output_dir=str(tmp_path / "whole")))
    cut_at(monkeypatch, 6)
    with pytest.raises(PowerCut):
        train.main(now | dict(output_dir=str(tmp_path / "cut")))
    monkeypatch.undo()
    train.main(now | dict(output_dir=str(tmp_path / "cut"), resume=True))
    same(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(
    "script, what, begun",
    [
        ("train", "starting_point", False), ("train", "train_steps", True), ("train", "evaluate_tasks", True),
        ("adapt", "load_run", False), ("adapt", "evaluate_tasks", True), ("adapt", "adapt_task", True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stop, code", [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])
def test_a_stopped_run_says_how_to_go_on(
    monkeypatch, capsys, flags, reference, tmp_path, script, what, begun, stop, code
):
    """Wherever it is stopped: loading, training, scoring. There is nothing to go on with before it has begun."""

    def interrupt(*args, **more):
        raise stop

    monkeypatch.setattr({"train": train, "adapt": adapt}[script], what, interrupt)
    now = flags if script == "train" else FEW | dict(checkpoint=str(reference))
    main = {"train": train.main, "adapt": adapt.main}[script]
    with pytest.raises(SystemExit) as stopped:
        exit_on_user_error(main, now | dict(output_dir=str(tmp_path / "cut")))
    assert stopped.value.code == code and (tmp_path / "cut").exists() == begun
    command = f"python {script}.py --resume --output-dir {tmp_path / 'cut'}"
    assert (command in capsys.readouterr().out) == begun
    if begun:
        monkeypatch.undo()
        assert main(dict(output_dir=str(tmp_path / "cut"), resume=True))["tasks"]


@pytest.mark.parametrize("step", [3, STEPS])
def test_the_last_checkpoint_is_that_of_a_run_never_cut_off(monkeypatch, flags, tmp_path, step):
    """The optimiser's state and the random numbers too, not only what the finished run keeps."""
    monkeypatch.setattr(train, "tidy", lambda folder: None)
    train.main(flags | dict(output_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        cut_at(patch, step)
        with pytest.raises(PowerCut):
            train.main(flags | dict(output_dir=str(tmp_path / "cut"), save_every="2"))
    train.main(dict(output_dir=str(tmp_path / "cut"), resume=True))
    found, states = zip(*(inject.read_tensors(tmp_path / f / CHECKPOINT) for f in ("cut", "whole")), strict=True)
    assert found[0].keys() == found[1].keys() and any(name.startswith("optimizer.") for name in found[0])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    cut, whole = (json.loads(state["state"]) | {"seconds": 0} for state in states)
    assert cut | {"trained": sorted(cut["trained"])} == whole | {"trained": sorted(whole["trained"])}


# --- What --resume refuses, and what it does not need -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["result.json", "log.jsonl", "adapter.safetensors", "notes.tmp", "other/x"])
@pytest.mark.parametrize("go_on", [False, True])
def test_a_folder_with_something_else_is_left_alone(flags, reference, tmp_path, name, go_on):
    """Nothing in it is read, changed or removed, whether --resume is given or not."""
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    for main, more in ((train.main, flags), (adapt.main, FEW | dict(checkpoint=str(reference)))):
        with pytest.raises(UserError, match=f"--output-dir .*mine is not empty, it holds {name.split('/')[0]}"):
            main(more | dict(output_dir=str(tmp_path / "mine"), resume=go_on))
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
    """Loss and gradients may be finite and the step that they make not: what is saved is looked at."""
    model, optimizer = made(flags)
    path = tmp_path / CHECKPOINT
    save_checkpoint(path, model, optimizer, Progress(1, 1.0, (0.5,)))
    before = path.read_bytes()
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad)[0] = math.inf
    with pytest.raises(RunError, match="is not finite after step 2: nothing of it was saved. Try a lower --lr"):
        save_checkpoint(path, model, optimizer, Progress(2, 1.0, (0.5,)))
    assert path.read_bytes() == before


def test_begins_what_is_not_there_and_leaves_what_is_done(capsys, flags, reference, tmp_path):
    train.main(flags | dict(output_dir=str(tmp_path / "run"), resume=True))
    same(tmp_path / "run", reference)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").iterdir()}
    found = train.main(dict(output_dir=str(tmp_path / "run"), resume=True))
    assert "is finished" in capsys.readouterr().out and found["steps"] == STEPS
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").iterdir()}


@pytest.fixture
def cut_off(flags, tmp_path, monkeypatch) -> Path:
    """A run with a checkpoint of step 3."""
    folder = tmp_path / "cut"
    cut_at(monkeypatch, 4)
    with pytest.raises(PowerCut):
        train.main(flags | dict(output_dir=str(folder)))
    monkeypatch.undo()
    return folder


def test_settings_cannot_change(cut_off, flags):
    for name, value in (("lr", 0.5), ("heads", 2), ("steps", 20), ("seed", 4)):
        with pytest.raises(UserError, match=f"--{name} {value} does not fit the run in .*cut"):
            train.main(flags | {name: value, "output_dir": str(cut_off), "resume": True})
    with pytest.raises(UserError, match="already holds a run"):
        train.main(flags | dict(output_dir=str(cut_off)))


def test_what_changes_rounding_alone_may_change(cut_off, reference):
    """As the advice on memory says: in smaller parts, or with checkpointing, the run goes on."""
    train.main(dict(output_dir=str(cut_off), resume=True, micro_batch=2, checkpointing=True))
    ours, whole = (load_file(run / "adapter.safetensors") for run in (cut_off, reference))
    for name in whole:
        torch.testing.assert_close(ours[name], whole[name], rtol=1e-3, atol=1e-3)


def test_flags_as_they_come_from_the_command_line(reference, tmp_path):
    """The very command with --resume added goes on: --split comes as a list and is saved as one."""
    line = (
        f"--checkpoint {reference} --split 1 2 --output-dir {tmp_path / 'few'} --tasks sort+double --steps 2 --shots 4"
    )
    found = [adapt.main(explicit_flags(adapt.Config, {}, f"{line} --resume".split())) for _ in range(2)]
    assert found[0] == found[1] and list(found[0]["splits"]) == ["1", "2"]


@pytest.mark.parametrize(
    "wrong", [dict(save_every="10s"), dict(heads=3), dict(lr=-1.0), dict(data_dir="no", dataset="t0")]
)
def test_a_mistake_leaves_no_folder(flags, tmp_path, wrong):
    with pytest.raises(UserError):
        train.main(flags | wrong | dict(output_dir=str(tmp_path / "run")))
    assert not list(tmp_path.iterdir())


def test_damaged_checkpoints_are_refused(cut_off, reference, flags):
    path = cut_off / CHECKPOINT
    whole = path.read_bytes()
    damaged = {
        "empty": b"", "cut": whole[: len(whole) // 2], "a pickle": b"\x80\x04}q\x00.",
        "an adapter": (reference / "adapter.safetensors").read_bytes(),
        "a flipped bit": bytes([*whole[:-1], whole[-1] ^ 1]),
    }  # fmt: skip
    for content in damaged.values():
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"checkpoint.safetensors is no whole checkpoint .*delete it"):
            train.main(dict(output_dir=str(cut_off), resume=True))
        assert path.read_bytes() == content
    path.unlink()  # as the message says
    train.main(dict(output_dir=str(cut_off), resume=True))
    same(cut_off, reference)


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
    """Signed, but with missing, unknown or impossible entries: one sentence; model, optimiser and random numbers are as
    before. The one that nobody changed is then loaded."""
    path, (model, own) = tmp_path / CHECKPOINT, made(flags | dict(optimizer=optimizer))
    monkeypatch.setattr(os, "fsync", lambda number: None)  # it would be most of the time
    for p in run_tensors(model).values():
        p.grad = torch.ones_like(p)
    own.step()
    save_checkpoint(path, model, own, Progress(1, 1.0, (2.0,)))
    tensors, metadata = inject.read_tensors(path)
    texts = {
        "no JSON": "{", "nested too deep": NEST, "no object": "5", "an empty list": "[]", "too many digits": "9" * 5000,
    }  # fmt: skip
    before, random = everything(model, own), torch.get_rng_state()
    for name, spoil in (SPOILT | texts).items():
        odd, state = {n: x.clone() for n, x in tensors.items()}, json.loads(metadata["state"])
        if callable(spoil):
            spoil(odd, state)
        inject.write_tensors(odd, path, state=json.dumps(state) if callable(spoil) else spoil)
        with pytest.raises(UserError, match="delete it to begin the run again") as refused:
            load_checkpoint(path, model, own)
        assert "\n" not in str(refused.value), name
        assert everything(model, own) == before and torch.equal(torch.get_rng_state(), random), name
    inject.write_tensors(tensors, path, state=metadata["state"])
    whole = path.read_bytes()
    path.write_bytes(re.sub(rb"(step\W+)1", rb"\g<1>8", whole, count=1))  # the JSON is under the digest too
    assert path.read_bytes() != whole
    with pytest.raises(UserError, match="is damaged: its content is not what was saved"):
        load_checkpoint(path, model, own)
    path.write_bytes(whole)
    assert load_checkpoint(path, model, own)[:3] == (1, 1.0, (2.0,))
    assert everything(model, own) == before


def everything(model, optimizer) -> dict:
    """What a run changes, as plain numbers: adapters, routers and the optimiser's state."""
    states = {f"{k} {n}": v for k, own in optimizer.state_dict()["state"].items() for n, v in own.items()}
    both = run_tensors(model) | states
    return {name: v.tolist() if isinstance(v, torch.Tensor) else v for name, v in both.items()}


@pytest.mark.parametrize("method", ["mhr", "full"])
def test_another_backbone_or_data_set_is_refused(monkeypatch, flags, backbone, tmp_path, method):
    """--resume after the files of the backbone, or the examples, were replaced: one sentence, and the run goes on when
    they are back."""
    mine, now = tmp_path / "backbone", flags | dict(method=method, output_dir=str(tmp_path / "cut"), steps=4)
    shutil.copytree(backbone, mine)
    cut_at(monkeypatch, 4)
    with pytest.raises(PowerCut):
        train.main(now | dict(backbone=str(mine)))
    monkeypatch.undo()
    go_on = dict(output_dir=str(tmp_path / "cut"), resume=True)
    weights, file = load_file(mine / "model.safetensors"), mine / "model.safetensors"
    whole, name = file.read_bytes(), next(n for n in weights if n.endswith("wo.weight"))
    save_file(weights | {name: weights[name] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="checkpoint.safetensors was made with another backbone than there is now"):
        train.main(go_on)
    file.write_bytes(whole)
    with monkeypatch.context() as patch:
        patch.setattr(train, "load_tasks", lambda *args: one_example_less(*args))
        with pytest.raises(UserError, match="checkpoint.safetensors was made with another data set than there is now"):
            train.main(go_on)
    assert train.main(go_on)["steps"] == 4


def one_example_less(cfg, split, parts, real=train.load_tasks):
    found = real(cfg, split, parts)
    less = dataclasses.replace(found.train[0], train=found.train[0].train[:-1])
    return dataclasses.replace(found, train=[less, *found.train[1:]])


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
    """`adapt.py --resume` after the checkpoint was trained anew: what is saved of the old one is not mixed with it."""
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
    tensors, metadata = inject.read_tensors(run / "adapter.safetensors")
    inject.write_tensors(
        {n: x + 1 for n, x in tensors.items()}, run / "adapter.safetensors", backbone=metadata["backbone"]
    )
    with pytest.raises(UserError, match=r"sort\+double.json was made with another checkpoint than there is now"):
        adapt.main(dict(output_dir=now["output_dir"], resume=True))


@pytest.mark.parametrize("main", [train.main, adapt.main])
def test_the_log_is_on_the_disk_before_what_follows_it(monkeypatch, flags, reference, tmp_path, main):
    """Whenever a checkpoint, or a task's scores, get their name, all lines of the log are synced."""
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
    """A line in the middle is named; the last one, if it is not whole, is dropped with those that come again."""
    log, good = tmp_path / "log.jsonl", [b'{"step": %d}' % k for k in range(1, 5)]
    log.write_bytes(b"\n".join([good[0], damaged, good[1], b""]))
    before = log.read_bytes()
    with pytest.raises(UserError, match=r"log.jsonl:2 is damaged: delete this line") as refused:
        truncate_log(log, lambda line: line["step"] <= 2)
    assert "\n" not in str(refused.value) and log.read_bytes() == before
    log.write_bytes(b"\n".join([*good, damaged]))
    truncate_log(log, lambda line: line["step"] <= 2)
    assert log.read_bytes() == good[0] + b"\n" + good[1] + b"\n"


def test_a_second_run_in_the_same_folder_is_refused(cut_off, reference):
    with locked_folder(cut_off, "python train.py"):
        for main, extra in ((train.main, {}), (adapt.main, dict(checkpoint=str(reference)))):
            with pytest.raises(UserError, match="another process is at work in .*cut"):
                main(extra | dict(output_dir=str(cut_off), resume=not extra))
    train.main(dict(output_dir=str(cut_off), resume=True))


@pytest.mark.parametrize("text", ["", "0", "-5", "10s", "1.5m", "m", "10m ", "9" * 12])
def test_save_every_is_steps_or_minutes(text):
    with pytest.raises(UserError, match="--save-every"):
        Every(text)


def test_when_to_save(monkeypatch):
    assert [step for step in range(1, 10) if Every("3").due(step)] == [3, 6, 9]
    clock = [0.0]
    monkeypatch.setattr(resume.time, "monotonic", lambda: clock[0])
    every, saved = Every("2m"), []
    for step in range(10):
        clock[0] += 50
        saved += [step] * every.due(step)
    assert saved == [2, 5, 8]  # after 150, 300, 450 seconds


# --- Runs that fail ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: no space")])
def test_full_disk(monkeypatch, capsys, cut_off, reference, error):
    """One sentence and exit code 1; the checkpoint before is whole, and the run goes on when there is space."""

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise error

    before = (cut_off / CHECKPOINT).read_bytes()
    monkeypatch.setattr(inject, "save_file", full)
    with pytest.raises(SystemExit) as failed:
        exit_on_user_error(train.main, dict(output_dir=str(cut_off), resume=True))
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert failed.value.code == 1 and said.startswith(f"error: {cut_off / CHECKPOINT}: cannot be written: ")
    assert (cut_off / CHECKPOINT).read_bytes() == before and not list(cut_off.glob("*.tmp"))
    monkeypatch.undo()
    train.main(dict(output_dir=str(cut_off), resume=True))
    same(cut_off, reference)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_loss_stops_the_run(monkeypatch, cut_off, reference, value):
    """Before it changes anything: the last good checkpoint stays, and the message names the step and each example."""
    real, calls = train.token_loss, []

    def broken(model, batch):
        calls.append(batch)
        return real(model, batch) * (value if len(calls) == 3 else 1)

    monkeypatch.setattr(train, "token_loss", broken)
    with pytest.raises(RunError, match=r"step 6, training examples .*: the loss is (nan|inf)") as failed:
        train.main(dict(output_dir=str(cut_off), resume=True))
    tasks = train.load_tasks(train.Config(), "0", ("train",)).train
    batch = next(data.batches(tasks, FLAGS["batch_size"], FLAGS["seed"], start=5))
    by_name = {task.name: task.train for task in tasks}
    named = [by_name[name][int(k)] for name, k in re.findall(r"([\w+]+)\[(\d+)\]", str(failed.value))]
    assert named == [item.example for item in batch]
    monkeypatch.undo()
    train.main(dict(output_dir=str(cut_off), resume=True))
    same(cut_off, reference)


class Steep(torch.autograd.Function):
    """The same number, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.inf


def test_nonfinite_gradients_stop_the_run(monkeypatch, cut_off, reference):
    """The loss is finite, its gradient is not: nothing is changed by it either."""
    real, calls = train.token_loss, []

    def broken(model, batch):
        calls.append(batch)
        return Steep.apply(real(model, batch)) if len(calls) == 3 else real(model, batch)

    monkeypatch.setattr(train, "token_loss", broken)
    with pytest.raises(RunError, match=r"step 6, .*: the loss is \d+\.\d+, the norm of its gradients (nan|inf)"):
        train.main(dict(output_dir=str(cut_off), resume=True))
    monkeypatch.undo()
    train.main(dict(output_dir=str(cut_off), resume=True))
    same(cut_off, reference)


def test_nonfinite_gradients_end_one_task_not_all(monkeypatch, capsys, reference, tmp_path):
    """From the second step on, on one of two tasks: it keeps its best values, which are finite, the other goes on."""
    real, calls = train.batch_loss, []

    def broken(model, tokenizer, items, *args, **kwargs):
        loss = real(model, tokenizer, items, *args, **kwargs)
        calls.append(loss.requires_grad)
        return Steep.apply(loss) if sum(calls) == 2 else loss

    monkeypatch.setattr(train, "batch_loss", broken)
    few = FEW | dict(checkpoint=str(reference), tasks="drop+swap,double+upper", output_dir=str(tmp_path / "few"))
    stops = adapt.main(few)["splits"]["0"]["stops"]
    assert "drop+swap: loss or gradients are not finite in step 2" in capsys.readouterr().out
    assert {name: stop["stopped"] for name, stop in stops.items()} == {"drop+swap": 2, "double+upper": 3}
    saved = load_file(tmp_path / "few" / "0" / "drop+swap.safetensors")
    assert all(x.isfinite().all() for x in saved.values() if x.is_floating_point())


def test_nonfinite_loss_ends_one_task_not_all(monkeypatch, capsys, reference, tmp_path):
    """Of three tasks the second one breaks: it keeps its best values, here those before training."""
    real = train.backward_in_parts

    def broken(loss_of, items, *args):
        loss = real(loss_of, items, *args)
        return math.nan if items[0].example.input == second else loss

    few = FEW | dict(checkpoint=str(reference), shots=1, batch_size=1)
    base = train.load_tasks(train.Config(), "0", ("test",)).test
    task = adapt.few_shot(next(t for t in base if t.name == "drop+swap"), adapt.make_config(**few))
    second = task.train[0].input
    monkeypatch.setattr(train, "backward_in_parts", broken)
    stops = adapt.main(few | dict(output_dir=str(tmp_path / "few")))["splits"]["0"]["stops"]
    assert "drop+swap: loss or gradients are not finite in step 1" in capsys.readouterr().out
    assert {name: stop["stopped"] for name, stop in stops.items()} == {
        "sort+double": 3,
        "drop+swap": 1,
        "double+upper": 3,
    }
    assert stops["drop+swap"]["best_step"] == 0


@pytest.mark.parametrize("keep", ["loss", "score"])
def test_training_steps_are_in_training_mode(monkeypatch, reference, tmp_path, keep):
    """Also after a look at the dev examples, which are scored in evaluation mode, without noise."""
    real, modes = adapt.train.batch_loss, []

    def watched(model, *args, **kwargs):
        modes.append((torch.is_grad_enabled(), model.training))
        return real(model, *args, **kwargs)

    monkeypatch.setattr(train, "batch_loss", watched)
    adapt.main(FEW | dict(checkpoint=str(reference), keep=keep, eval_every=1, output_dir=str(tmp_path / "few")))
    assert {mode for grad, mode in modes if grad} == {True} and {mode for grad, mode in modes if not grad} <= {False}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("[..] can't allocate memory: 9")])
def test_out_of_memory_is_one_sentence_with_advice(monkeypatch, flags, reference, tmp_path, error):
    """Wherever it happens: in a step, in the optimiser's first one, in scoring."""

    def full(*args, **kwargs):
        raise error

    for module, name in ((train, "batch_loss"), (torch.optim.AdamW, "step"), (train, "evaluate_tasks")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(RunError, match="not enough memory: try a smaller --micro-batch .*--checkpointing"):
                train.main(flags | dict(output_dir=str(tmp_path / name)))
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
import sys, time; sys.path.insert(0, ROOT); import config
def main():
    try: print("ready", flush=True); time.sleep(60)
    finally: print("how to go on", file=sys.stdout, flush=True)
config.exit_on_user_error(main)
"""


def test_the_terminal_is_closed(tmp_path):
    """A real one, at whose other end nobody is any more: what is printed then is no error, and the exit code is 129."""
    child, ours = pty.fork()
    if not child:
        program = HUNG_UP.replace("ROOT", repr(str(Path(config.__file__).parent)))
        os.execv(sys.executable, [sys.executable, "-c", program])
    assert b"ready" in os.read(ours, 100)
    os.close(ours)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 129


@pytest.mark.parametrize("steps, lines", [(1500, 10), (1234, 13), (40, 1), (60, 2)])
def test_plain_lines_are_some_ten_a_run(capsys, tmp_path, steps, lines):
    with open(tmp_path / "log", "w") as log:
        bar = resume.tqdm(range(1, steps + 1), disable=True)
        for step in range(1, steps + 1):
            if step % 50 == 0 or step == steps:
                write_line(log, bar, Progress(step, 1.0, (), 2.0), 1.0, 0.1, 50)
    assert len(capsys.readouterr().out.splitlines()) == lines
