"""Two processes compute what one computes, up to rounding."""

import importlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data import Item
from inject import _ids, task_ids
from plumbing import processes
from plumbing.ahead import parts_of
from plumbing.backbones import load_backbone
from plumbing.errors import UserError, exit_on_user_error
from plumbing.flags import explicit_flags
from plumbing.folders import CHECKPOINT
from plumbing.large import blocks_of
from tests import helpers
from tests.stress.kills import small_backbone

ROOT = Path(__file__).parents[1]
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
ACCELERATE = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no".split()
FLAGS = dict(
    method="mhr", heads=4, skills=2, dataset="strings", steps=6, batch_size=15, micro_batch=3, max_output=16, lr=0.1,
    lr_z=1000.0, log_every=2, save_every="1",
)  # fmt: skip
FEW = dict(steps=4, eval_every=2, shots=4, test_examples=5, tasks="sort+double,drop+swap,double+upper")


# --- Settings that are refused, and one process -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DEEPSPEED"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "mixed precision bf16"),
    ],
)
def test_what_only_accelerate_can_do_is_refused(monkeypatch, name, value, says):
    """It is never silently left out; what the launcher sets by default passes."""
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^accelerate is set to {says}"):
        processes.join("cpu")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv(name, raising=False)
    processes.join("cpu")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="^process 2 of this machine has no GPU: start 2 processes, or --device cpu$"):
        processes.join("cuda")


def test_alone_nothing_happens():
    p = torch.nn.Parameter(torch.ones(2))
    assert processes.sum_gradients([p], torch.tensor(3.5), 0) == (3.5, 0) and p.grad is None
    assert processes.share([1, 2, 3]) == [1, 2, 3] and processes.first() and processes.together({"a": 1}) == {"a": 1}
    processes.join("cpu")
    processes.wait()
    assert not torch.distributed.is_initialized()


def test_a_part_draws_the_noise_of_the_whole():
    whole, part = [5, 2, 2, 9], [9, 2]
    with task_ids(part, among=whole):
        now = _ids.get()
    assert now.tasks.tolist() == [2, 5, 9] and now.tasks[now.rows].tolist() == part and now.largest == 9
    assert now.batch == len(whole) and now.kept is None
    for wrong in ([3], [10], [2, 3]):
        with pytest.raises(ValueError, match="not all among"), task_ids(wrong, among=whole):
            pass
    with pytest.raises(ValueError, match="negative"), task_ids([2], among=[2, -1]):
        pass


# --- Two processes ----------------------------------------------------------------------------------------------------


def script(name: str, words: list[str], environment: dict, printed: Path, exact: bool, pause: float):
    """train.py or adapt.py with this command line, as a launcher starts it, but with scores that tell tasks apart, for
    after so few steps no output is right. exact: see `make_exact`. pause: seconds before each step."""
    os.environ |= environment
    sys.stdout = open(printed, "a")
    module, scoring = importlib.import_module(name), importlib.import_module("scoring")
    scoring.score = lambda metric, outputs, examples: float(sum(f"{outputs} {examples}".encode()))
    if exact:
        make_exact(module, pause, exact != "single")
    exit_on_user_error(module.main, explicit_flags(module.Config, {}, words))


def make_exact(train, pause: float, double: bool):
    """Change train.py so that two processes and one differ by 1e-16, and not by parts of a step.

    Gradients that are summed over two shares differ from those of the whole batch by rounding, in float32 1e-7 of
    their size. AdamW enlarges that: it divides each gradient by its own size plus 1e-8. A gradient of about 1e-8, like
    that of a logit of Z whose skills are still alike, then moves the logit by a visible part of --lr-z. So the
    optimiser here is linear in the gradient: SGD, with momentum as the state to resume. Unlike AdamW it also shows a
    wrong factor in the sum. And all is in double precision, also what the loss and T5 compute by `.float()`, unless it
    is to be seen what that leaves in float32.

    Outputs get different lengths, so that shares have different weights.
    """
    start, optimizer_of, rates, whole = train.starting_point, train.make_optimizer, train.set_rates, train.data.batches

    def starting_point(*args):
        model, tokenizer = start(*args)
        return model.double() if double else model, tokenizer

    def make_optimizer(*args):
        groups = [{"params": group["params"], "lr": group["lr"]} for group in optimizer_of(*args).param_groups]
        return torch.optim.SGD(groups, momentum=0.9)

    def set_rates(*args):
        time.sleep(pause)
        rates(*args)

    def batches(*args, **options):
        for batch in whole(*args, **options):
            yield [item._replace(output=item.output[: 1 + k % 6]) for k, item in enumerate(batch)]

    torch.Tensor.float = torch.Tensor.double if double else torch.Tensor.float
    train.data.batches = batches
    train.starting_point, train.make_optimizer, train.set_rates = starting_point, make_optimizer, set_rates


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(name, size, folder, **flags): that many processes of a script, forked from one with all imports."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["train", "adapt"])

    def start(name: str, size: int, folder: Path, exact: bool = False, pause: float = 0.0, **flags) -> list:
        words = [f"--{flag.replace('_', '-')}={value}" for flag, value in flags.items() if value is not True]
        words += [f"--{flag}" for flag, value in flags.items() if value is True] + [f"--output-dir={folder}"]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        shared = dict(WORLD_SIZE=str(size), MASTER_ADDR="localhost", MASTER_PORT=str(port)) if size > 1 else {}
        children = []
        for rank in range(size):
            environment = shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {})
            what = (name, words, environment, folder.with_suffix(".txt"), exact, pause)
            children.append(context.Process(target=script, args=what))
            children[-1].start()
        return children

    return start


def end(children: list):
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * len(children)


def kill_at_a_checkpoint(children: list, folder: Path):
    """Kill the processes of a run as soon as it has saved a checkpoint."""
    while children[0].is_alive() and not (folder / CHECKPOINT).exists():
        time.sleep(0.01)
    for child in children:
        child.kill()
        child.join()
    assert not (folder / "result.json").exists()


def read(path: Path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory) -> Path:
    """The folder of two trainings, by one process and by two; a share of 7 or 8 examples is cut into parts of 3."""
    folder = tmp_path_factory.mktemp("parallel")
    flags = FLAGS | dict(backbone=small_backbone(folder / "backbone"), eval_examples=2)
    one, two = (start("train", size, folder / name, exact=True, **flags) for name, size in (("one", 1), ("two", 2)))
    end(one + two)
    return folder


def same_training(runs: Path, name: str):
    """Runs "one" and `name` have the same adapters, which have been trained, and the same log."""
    one, two = (load_file(runs / run / "adapter.safetensors") for run in ("one", name))
    assert one.keys() == two.keys() and {tensor.dtype for tensor in one.values()} == {torch.float64}
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-9, atol=1e-12)
    for leaf in ("inventory.B", "router.Z"):  # at first 0, and 0.001 at most
        assert max(tensor.abs().max() for key, tensor in one.items() if key.endswith(leaf)) > 0.01
    logs = [[json.loads(line) for line in (runs / run / "log.jsonl").read_text().splitlines()] for run in ("one", name)]
    assert [line["step"] for line in logs[1]] == [2, 4, 6]
    for what in ("loss", "norm"):
        assert [line[what] for line in logs[1]] == pytest.approx([line[what] for line in logs[0]], rel=1e-9)


def test_training_is_the_same(runs):
    same_training(runs, "two")
    one, two = (read(runs / name / "result.json")["tasks"] for name in ("one", "two"))
    assert one == two and list(one) == list(two) and len(set(one.values())) > 30
    assert {path.name for path in (runs / "two").iterdir()} == {path.name for path in (runs / "one").iterdir()}
    assert (runs / "two.txt").read_text().count("saved in") == 1  # one process prints


def test_two_processes_resume(start, runs):
    """Killed after the first checkpoint, both of them; resumed by two, the run equals that of one process."""
    folder, flags = runs / "cut", FLAGS | dict(backbone=str(runs / "backbone"), eval_examples=0)
    children = start("train", 2, folder, exact=True, pause=0.2, **flags)
    kill_at_a_checkpoint(children, folder)
    end(start("train", 2, folder, exact=True, resume=True, **flags))
    assert "resuming after step" in (runs / "cut.txt").read_text()
    same_training(runs, "cut")


def test_adaptation_shares_the_tasks(start, runs):
    """Three tasks by two processes: scores, files and their order are those of one."""
    base = dict(method="lora", backbone=str(runs / "backbone"), steps=2, batch_size=8, max_input=8, max_output=4)
    end(start("train", 2, runs / "base", eval_examples=0, **base))
    one, two = (start("adapt", n, runs / f"{n}-all", checkpoint=runs / "base", **FEW) for n in (1, 2))
    end(one + two)
    same_adaptation(runs / "1-all", runs / "2-all")
    assert len(set(read(runs / "2-all" / "result.json")["tasks"].values())) == 3


def same_adaptation(folder: Path, other: Path):
    one, two = read(folder / "result.json"), read(other / "result.json")
    assert one["splits"] == two["splits"] and list(one["tasks"]) == list(two["tasks"]) == FEW["tasks"].split(",")
    for name in one["tasks"]:
        tensors, others = (load_file(run / "0" / f"{name}.safetensors") for run in (folder, other))
        assert all(torch.equal(tensors[key], others[key]) for key in tensors)


# --- A backbone that is split over the processes ----------------------------------------------------------------------

SPLIT = """
import json, sys, torch
import train
from benchmarks.choices import choose
from data import Example, Item
from inject import adapter_parameters, fingerprint, merge, routers, task_ids
from methods import build_model, use_checkpointing
from plumbing import processes
from scoring import generate
from tests.helpers import randomise

folder, backbone, precision, adapter = sys.argv[1:]
processes.join("cpu")
settings = dict(method="mhr", heads=2, skills=2, backbone=backbone, device="cpu", precision=precision, adapter=adapter)
examples = [Example(text, ("ab",), ("ab", "c", "aba"), 0) for text in ("one two", "three", "four five six")]
items = [Item(k % 2, example, "ab") for k, example in enumerate(examples)]


def work(shard):
    torch.manual_seed(0)
    model, tokenizer = build_model(train.Config(**settings, shard=shard), tasks=2)
    torch.manual_seed(1)
    randomise(model)
    model.eval()
    found = {"fingerprint": fingerprint(model), "gradients": []}
    with torch.no_grad(), task_ids([0, 1, 0], keep=True):  # the encoder alone comes first
        found["text"] = [generate(model, tokenizer, examples, 32, 8, beams) for beams in (1, 3)]
        found["chosen"], _ = choose(model, tokenizer, examples, 32, 8)
    for checkpointing in (False, True):
        if checkpointing:
            use_checkpointing(model.train())
            for router in routers(model):
                router.eval()
        with task_ids([0, 1, 0]):
            loss = train.batch_loss(model, tokenizer, items, 32, 8)
        loss.backward()
        found["gradients"] += [p.grad.clone() for p in adapter_parameters(model).values() if p.requires_grad]
        model.zero_grad()
    added = adapter_parameters(model)
    held = [getattr(p, "to_local", lambda: p)() for name, p in model.named_parameters() if name not in added]
    found["bytes"] = sum(p.numel() * p.element_size() for p in held)
    try:
        merge(model, 0)
    except ValueError as error:
        found["merged"] = str(error)
    return found


def near(x, y):
    return (x - y).abs().max() <= (1e-5 if precision == "fp32" else 0.05) * y.abs().max()


whole, split = work(False), work(True)
result = {key: split[key] == whole[key] for key in ("text", "chosen", "fingerprint")}
result["gradients"] = all(map(bool, map(near, split["gradients"], whole["gradients"])))
with open(f"{folder}/{processes.rank()}.json", "w") as file:
    json.dump(result | {"share": split["bytes"] / whole["bytes"], "merged": split["merged"]}, file)
"""


@pytest.mark.parametrize(
    "precision, adapter",
    [("fp32", "lora"), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("bf16", "lora"), ("fp32", "ia3"), ("fp32", "sft"),
    ))],
)  # fmt: skip
def test_a_split_backbone_is_the_whole_one(tmp_path, precision, adapter):
    """Generation, beams, choices, gradients with and without checkpointing; each process holds half of the blocks."""
    (tmp_path / "split.py").write_text(SPLIT)
    backbone = helpers.small_backbone(tmp_path / "backbone", layers=2)
    launch([*TORCHRUN, tmp_path / "split.py", tmp_path, backbone, precision, adapter])
    model = load_backbone(backbone, "cpu")[0]
    blocks = sum(p.numel() for block in blocks_of(model).values() for p in block.parameters())
    whole = sum(p.numel() for p in model.parameters())
    for rank in ("0", "1"):
        found = read(tmp_path / f"{rank}.json")
        assert re.match(r"layer encoder\..*: nothing can be merged", found.pop("merged"))
        assert found.pop("share") == pytest.approx(1 - blocks / 2 / whole, rel=0.01)
        assert all(found.values()), found


@pytest.mark.slow
def test_a_split_gpt2_is_the_whole_one(tmp_path):
    """Its weights are transposed views; and it is causal."""
    config = helpers.small_config("gpt2")
    config.vocab_size = 384
    torch.manual_seed(0)
    backbone = helpers.save_as_backbone(helpers.CLASSES["gpt2"](config), tmp_path / "backbone")
    (tmp_path / "split.py").write_text(SPLIT)
    launch([*TORCHRUN, tmp_path / "split.py", tmp_path, backbone, "fp32", "lora"])
    for rank in ("0", "1"):
        found = read(tmp_path / f"{rank}.json")
        assert found["gradients"] and found["text"] and found["chosen"] and found["fingerprint"]


def test_training_split_is_training_whole(start, runs):
    """Shares of 7 and 8 examples in parts of 3; scores as well."""
    flags = FLAGS | dict(backbone=str(runs / "backbone"), eval_examples=2, shard=True)
    end(start("train", 2, runs / "split", exact=True, **flags))
    same_training(runs, "split")
    one, two = (read(runs / name / "result.json")["tasks"] for name in ("one", "split"))
    assert one == two and list(one) == list(two)


def test_splitting_changes_nothing_but_rounding(start, runs):
    """In float32, 20 steps: each of two processes holds half of the backbone, or one holds it whole."""
    flags = FLAGS | dict(backbone=str(runs / "backbone"), eval_examples=0, steps=20, save_every="100", lr_z=10.0)
    end(start("train", 1, runs / "float-one", exact="single", **flags))
    end(start("train", 2, runs / "float-split", exact="single", shard=True, **flags))
    one, two = (load_file(runs / name / "adapter.safetensors") for name in ("float-one", "float-split"))
    assert one.keys() == two.keys() and {tensor.dtype for tensor in one.values()} == {torch.float32}
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5
    assert max(tensor.abs().max() for name, tensor in one.items() if name.endswith("B")) > 0.01


def test_a_split_run_resumes(start, runs):
    folder, flags = runs / "split-cut", FLAGS | dict(backbone=str(runs / "backbone"), eval_examples=0, shard=True)
    children = start("train", 2, folder, exact=True, pause=0.2, **flags)
    kill_at_a_checkpoint(children, folder)
    end(start("train", 2, folder, exact=True, resume=True, **flags))
    same_training(runs, "split-cut")


def test_parts_in_step(runs):
    """Every process gets as many parts as the one with most examples; the further ones have no weight."""
    batch = [Item(k, f"{k}", "") for k in range(3)]
    shares = [batch[rank::4] for rank in range(4)]
    each = [parts_of(share, 0, list, batch=batch, in_step=4) for share in shares]
    assert [[part.share for part in parts] for parts in each] == [[1 / 3], [1 / 3], [1 / 3], [0.0]]
    shares = [batch[rank::2] for rank in range(2)]
    each = [parts_of(share, 1, list, batch=batch, in_step=2) for share in shares]
    assert [[part.share for part in parts] for parts in each] == [[1 / 3, 1 / 3], [1 / 3, 0.0]]
    assert each[1][1].tensors == batch[:1] and each[1][1] is not each[1][0]


def test_a_split_run_is_adapted_and_scored(start, runs):
    """All processes adapt to the same task together, or one process does with the whole backbone; so with scoring."""
    base = dict(method="lora", backbone=str(runs / "backbone"), steps=2, batch_size=8, max_input=8, max_output=4)
    end(start("train", 2, runs / "split-base", eval_examples=0, shard=True, **base))
    one, two = (start("adapt", n, runs / f"split-{n}", checkpoint=runs / "split-base", **FEW) for n in (1, 2))
    end(one + two)
    one, two = (read(runs / f"split-{n}" / "result.json") for n in (1, 2))
    assert list(one["tasks"]) == list(two["tasks"]) == FEW["tasks"].split(",")
    assert (runs / "split-2.txt").read_text().count("saved in") == 1
    for name in one["tasks"]:
        assert two["splits"]["0"]["before"][name] == one["splits"]["0"]["before"][name]
        tensors, others = (load_file(runs / f"split-{n}" / "0" / f"{name}.safetensors") for n in (1, 2))
        for key in tensors:
            torch.testing.assert_close(others[key], tensors[key], rtol=1e-3, atol=1e-4)


# --- The launchers ----------------------------------------------------------------------------------------------------

MEET = """
import sys, torch
from plumbing import processes
processes.join("cpu")
rank, p = processes.rank(), torch.nn.Parameter(torch.zeros(2))
p.grad = torch.ones(2) if processes.first() else None
loss, stop = processes.sum_gradients([p], torch.tensor(1.5), rank)
together = processes.together({rank: "here"})
with open(f"{sys.argv[1]}/{rank}", "w") as file:
    print(processes.share([5, 6, 7]), p.grad.tolist(), loss.item(), bool(stop), together, file=file)
"""


def launch(arguments: list) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("launcher", [TORCHRUN, pytest.param(ACCELERATE, marks=pytest.mark.slow)])
def test_launched_processes_meet(tmp_path, launcher):
    (tmp_path / "meet.py").write_text(MEET)
    launch([*launcher, tmp_path / "meet.py", tmp_path])
    for rank, share in (("0", "[5, 7]"), ("1", "[6]")):
        assert (tmp_path / rank).read_text() == f"{share} [1.0, 1.0] 3.0 True {{0: 'here', 1: 'here'}}\n"


@pytest.mark.slow
def test_a_dry_run_of_two_processes(runs, tmp_path):
    flags = "--method mhr --heads 4 --steps 9 --batch-size 8 --max-input 8 --max-output 4 --dry-run".split()
    said = launch([*TORCHRUN, "train.py", *flags, "--backbone", runs / "backbone", "--output-dir", tmp_path / "x"])
    assert said.count("dry run: ") == 1 and not (tmp_path / "x").exists()


@pytest.mark.slow
def test_the_scripts_under_accelerate(runs):
    """Both as they are, in float32, with AdamW; the tasks are adapted to by two processes."""
    flags = "--method lora --steps 2 --batch-size 8 --max-input 8 --max-output 4 --eval-examples 0".split()
    said = launch([*ACCELERATE, "train.py", *flags, "--backbone", runs / "backbone", "--output-dir", runs / "run"])
    assert said.count("saved in") == 1
    few = [word for flag, value in FEW.items() for word in (f"--{flag.replace('_', '-')}", value)]
    said = launch([*ACCELERATE, "adapt.py", "--checkpoint", runs / "run", *few, "--output-dir", runs / "run-all"])
    assert (
        said.count("saved in") == 1 and said.count("split 0     before") == 2
    )  # the first process has two of three tasks
    assert list(read(runs / "run-all" / "result.json")["tasks"]) == FEW["tasks"].split(",")
