"""Two processes do what one does. Each run is a real one, started by torch's or accelerate's launcher."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from plumbing import processes
from plumbing.errors import UserError
from inject import _contexts, task_ids
from plumbing.folders import CHECKPOINT

ROOT = Path(__file__).parents[1]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
FLAGS = dict(
    method="mhr", dataset="strings", steps=20, batch_size=15, eval_examples=2, log_every=5, micro_batch=3,
)  # fmt: skip
IN_DOUBLE = """
import sys
sys.path.insert(0, {root!r})
import train
start = train.starting_point
def in_double(*args):  # in float32 Adam makes steps of the full size out of gradients that are rounding alone
    model, tokenizer = start(*args)
    return model.double(), tokenizer
train.starting_point = in_double
train.main(dict({flags!r}, output_dir=sys.argv[1], resume="resume" in sys.argv, save_every="1"))
"""


def launch(arguments: list) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DEEPSPEED"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "mixed precision bf16"),
    ],
)
def test_what_accelerate_would_do_and_this_does_not_is_refused(monkeypatch, name, value, says):
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


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder of two trainings, by one process and by two; a share of 7 or 8 examples is cut into parts of 3."""
    folder = tmp_path_factory.mktemp("parallel")
    script = folder / "child.py"
    script.write_text(IN_DOUBLE.format(root=str(ROOT), flags=FLAGS))
    launch([script, folder / "one"])
    launch([*TORCHRUN, script, folder / "two"])
    return folder


def read(path: Path):
    return json.loads(path.read_text())


def test_training_is_the_same(runs):
    one, two = (load_file(runs / name / "adapter.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-5, atol=1e-5)
    assert {path.name for path in (runs / "two").iterdir()} == {path.name for path in (runs / "one").iterdir()}
    logs = [[json.loads(line) for line in (runs / n / "log.jsonl").read_text().splitlines()] for n in ("one", "two")]
    assert [a["step"] for a in logs[1]] == [5, 10, 15, 20]
    assert [a["loss"] for a in logs[1]] == pytest.approx([a["loss"] for a in logs[0]], rel=1e-6)
    assert [a["norm"] for a in logs[1]] == pytest.approx([a["norm"] for a in logs[0]], rel=1e-5)
    results = [read(runs / name / "result.json") for name in ("one", "two")]
    assert results[0]["tasks"] == results[1]["tasks"] and list(results[0]["tasks"]) == list(results[1]["tasks"])


def test_two_processes_go_on(runs):
    """Killed after the first checkpoint, both of them; resumed by two, the run equals that of one process."""
    folder, environment = runs / "cut", os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *TORCHRUN, str(runs / "child.py"), str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (folder / CHECKPOINT).exists():
        time.sleep(0.01)
    for one in (*(agent := psutil.Process(process.pid)).children(recursive=True), agent):
        one.kill()
    process.wait()
    assert not (folder / "result.json").exists()
    said = launch([*TORCHRUN, runs / "child.py", folder, "resume"])
    assert "going on after step" in said
    one, cut = (load_file(runs / name / "adapter.safetensors") for name in ("one", "cut"))
    for key in one:
        torch.testing.assert_close(cut[key], one[key], rtol=1e-5, atol=1e-5)
    logs = [[json.loads(line) for line in (runs / n / "log.jsonl").read_text().splitlines()] for n in ("one", "cut")]
    assert [a["step"] for a in logs[1]] == [5, 10, 15, 20]
    assert [a["loss"] for a in logs[1]] == pytest.approx([a["loss"] for a in logs[0]], rel=1e-6)


def test_adaptation_shares_the_tasks(runs):
    """Three tasks by two processes, started by accelerate: scores, files and their order are those of one."""
    options = "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    accelerate = ["-m", "accelerate.commands.launch", *options.split()]
    script = ["train.py", "--method", "lora", "--steps", "2", "--batch-size", "8", "--eval-examples", "0"]
    said = launch([*accelerate, *script, "--output-dir", runs / "run"])
    assert said.count("saved in") == 1  # one process talks
    flags = ["adapt.py", "--checkpoint", runs / "run", "--steps", 4, "--eval-every", 2, "--test-examples", 5]
    flags += ["--tasks", "sort+double,drop+swap,double+upper"]
    launch([*flags, "--output-dir", runs / "one-all"])
    launch([*accelerate, *flags, "--output-dir", runs / "two-all"])
    one, two = (read(runs / name / "result.json") for name in ("one-all", "two-all"))
    assert one["splits"] == two["splits"] and list(one["tasks"]) == list(two["tasks"])
    for name in one["tasks"]:
        a, b = (load_file(runs / run / f"0/{name}.safetensors") for run in ("one-all", "two-all"))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_part_draws_the_noise_of_the_whole():
    whole, part = [5, 2, 2, 9], [9, 2]
    with task_ids(part, among=whole):
        tasks, rows, largest, _ = _contexts[-1]
    assert tasks.tolist() == [2, 5, 9] and tasks[rows].tolist() == part and largest == 9
    for wrong in ([3], [10], [2, 3]):
        with pytest.raises(ValueError, match="not all among"), task_ids(wrong, among=whole):
            pass
    with pytest.raises(ValueError, match="negative"), task_ids([2], among=[2, -1]):
        pass


def test_alone_nothing_happens():
    p = torch.nn.Parameter(torch.ones(2))
    assert processes.add_up([p], 3.5, 0) == (3.5, False) and p.grad is None
    assert processes.share([1, 2, 3]) == [1, 2, 3] and processes.first() and processes.together({"a": 1}) == {"a": 1}
    processes.join("cpu")
    processes.wait()
    assert not torch.distributed.is_initialized()
