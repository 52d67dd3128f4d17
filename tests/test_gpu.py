"""The command for a GPU: its checks and times, here at a tiny size on the CPU; its schedule; its page."""

import json
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from experiments import gpu
from experiments import gpu_items as items
from train import token_loss

ROOT = Path(__file__).resolve().parents[1]
SIZE, HERE = items.SIZES["cpu"], items.Here()


# --- Items ------------------------------------------------------------------------------------------------------------


def test_adapters_agree_with_the_cpu_in_float64():
    """On the CPU itself: float64 to the bit, float32 and bfloat16 nearly."""
    result = items.correctness(SIZE, "cpu", HERE)
    assert not result["wrong"] and all(result["injection"].values())
    assert {(line["model"], line["adapter"]) for line in result["lines"]} == {
        (model, adapter) for model in ("T5", "Llama") for adapter in items.ADAPTED
    }
    assert all(line["float64"] == [0, 0] and 0 < max(line["float32"]) < 1e-3 for line in result["lines"])
    assert all(0 < min(line["bf16"]) < 0.25 for line in result["lines"] if "bf16" in line)


def test_an_adapter_that_computes_something_else_is_found(monkeypatch):
    """Here as a GPU that rounds float32 as TF32 would."""
    right = items.answers

    def answers(model, ids):
        logits, loss, grads = right(model, ids)
        return logits.bfloat16().double() if model.dtype == torch.float32 else logits, loss, grads

    monkeypatch.setattr(items, "answers", answers)
    monkeypatch.setattr(items, "ADAPTED", {"MHR": ("mhr", "lora")})
    wrong = items.correctness(SIZE, "cpu", HERE)["wrong"]
    assert len(wrong) == 4 and all(re.match(r"MHR in (T5|Llama), [14] tasks, float32: \S+e-03", text) for text in wrong)


def test_contestants_learn_and_the_floor_computes_all_gradients():
    """Every contestant's adapters move; the floor's anchors get a gradient, and so does every block's input."""
    batch, ids = items.batch_of(SIZE, "cpu", 4), items.mixtures(4, SIZE["tasks"])
    for name in items.CONTESTANTS:
        if name == "floor":
            continue
        torch.manual_seed(0)
        model = items.contestant(name, SIZE["large"], "cpu", SIZE["tasks"])
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        step = items.step_of(name, model, batch, ids)
        step()
        after = dict(model.named_parameters())
        assert all(not torch.equal(after[n], p) for n, p in before.items() if "lora_B" in n or n.endswith(".B")), name
        assert all(p.grad is None for p in model.parameters())
    model, grads = items.contestant("floor", SIZE["large"], "cpu", 1), []
    for stack in (model.encoder, model.decoder):
        stack.block[0].register_full_backward_hook(lambda module, into, out: grads.append(into[0]))
    token_loss(model, batch).backward()
    assert len(grads) == 2 and all(g.abs().sum() > 0 for g in grads)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["encoder.anchor", "decoder.anchor"]


def test_the_floor_is_the_backbone():
    batch = items.batch_of(SIZE, "cpu", 4)
    losses = [token_loss(model, batch) for model in (
        items.backbone(SIZE["large"], "cpu"), items.contestant("floor", SIZE["large"], "cpu", 1)
    )]  # fmt: skip
    assert torch.equal(*losses)


def test_training_times_all_contestants_in_turn():
    result = items.training(SIZE, "cpu", HERE)
    assert list(result["seconds"]) == list(items.CONTESTANTS) and not result["lost"] and not result["wrong"]
    assert {len(times) for times in result["seconds"].values()} == {SIZE["rounds"]}
    kernels = {name: profile["kernels"] for name, profile in result["profile"].items()}
    assert kernels["floor"] < kernels["LoRA"] < kernels["MHR, 8 heads"] < kernels["PEFT Poly"] / 3


def test_a_contestant_that_cannot_be_made_costs_no_other(monkeypatch):
    """PEFT is absent, and one of ours is broken."""
    made = items.contestant

    def broken(name, *args):
        if name == "Poly":
            raise RuntimeError("CUDA out of memory:\nmore")
        return made(name, *args)

    monkeypatch.setattr(items, "contestant", broken)
    monkeypatch.setattr(items, "ABSENT", {"peft"})
    result = items.training(SIZE, "cpu", HERE)
    assert result["lost"]["Poly"].startswith("CUDA out of memory") and "not installed" in result["lost"]["PEFT Poly"]
    assert list(result["seconds"]) == ["floor", "LoRA", "MHR, 8 heads", "MHR, 64 heads"]
    text = gpu.contest({"training": result}, "training")
    assert "PEFT LoRA is missing: PEFT is not installed." in text and "MHR, 64 heads" in text


def test_a_loss_that_is_not_finite_is_wrong(monkeypatch):
    monkeypatch.setattr(items, "CONTESTANTS", ("LoRA",))
    monkeypatch.setattr(items.train, "token_loss", lambda model, batch: token_loss(model, batch) * float("nan"))
    result = items.training(SIZE, "cpu", HERE)
    assert items.finished(result)["state"] == "wrong" and items.finished(result)["why"] == "the loss of LoRA is nan"


def test_the_other_items_run():
    """Adaptation, T0's recipe, generation and the computed memory."""
    result = items.adaptation(SIZE, "cpu", HERE)
    assert list(result["seconds"]) == ["floor", "LoRA", "MHR, 8 heads"]
    result = items.recipe_step(SIZE, "cpu", HERE)
    assert list(result["seconds"]) == ["floor", "MHR, 8 heads", "with transformers' Adafactor"] and not result["wrong"]
    result = items.generation(SIZE, "cpu", HERE)
    assert result["equal"] and result["other"] and not result["wrong"]
    result = items.computed(SIZE, "cpu", HERE)
    assert result["training"]["MHR, 64 heads"] > result["training"]["LoRA"] > result["adaptation"]["LoRA"] > 0
    assert " cores of " in items.machine(SIZE, "cpu", HERE)["line"]


def test_strings_measures_the_steps_of_the_main_job():
    result = items.strings(SIZE, "cpu", HERE)
    assert len(result["seconds"]) == SIZE["strings"] - SIZE["warm"] - items.PROFILED - 1 and result["loss"] > 0
    assert items.train.Run is items.Run


@pytest.mark.slow
def test_the_readme_command_runs():
    result = items.command(SIZE, "cpu", HERE)
    assert result["steps"] == SIZE["steps"] and result["layers"] == 2 and not result["wrong"]


@pytest.mark.slow
def test_a_run_repeats_and_is_killed_and_resumed():
    result = items.deterministic(SIZE, "cpu", HERE)
    assert result["same"] == {"again": True, "killed and resumed": True}


@pytest.mark.slow
def test_graphs_run(monkeypatch):
    """One graph for all batches. Its code is not made here: on a GPU it is another (`test_graph.py` has a CPU's)."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    for name in ("floor", "MHR, 8 heads"):
        result = items.compiled(SIZE, "cpu", HERE, name, whole=False)
        assert result["graphs"] == 1 and len(result["seconds"]) == SIZE["rounds"] and not result["wrong"]


# --- The profile ------------------------------------------------------------------------------------------------------


def event(cat: str, name: str, ts: float, dur: float) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}


def test_time_in_which_the_gpu_was_busy_counts_once():
    """Two steps: kernels that overlap, a copy, an annotation that spans them, and operators of the CPU."""
    events = [
        event("kernel", "gemm", 0, 1000), event("kernel", "gemm", 500, 1000), event("kernel", "add", 600, 100),
        event("gpu_memcpy", "copy", 4000, 500), event("gpu_user_annotation", "step", 0, 5000),
        event("cpu_op", "aten::mm", 0, 10), event("cpu_op", "aten::mm", 20, 10), event("cpu_op", "aten::add", 40, 10),
        {"ph": "M", "name": "process_name"},
    ]  # fmt: skip
    assert items.summary(events, 2) == {
        "busy": 1.0, "kernels": 1.5, "top": [["gemm", 1.0, 1.0], ["copy", 0.25, 0.5], ["add", 0.05, 0.5]],
        "operators": [["aten::mm", 1.0], ["aten::add", 0.5]],
    }  # fmt: skip


def test_a_profiler_that_sees_no_gpu_says_so():
    """As where it has no permission. A real trace of the CPU can be read."""
    assert items.summary([event("cpu_op", "aten::mm", 0, 10)], 2) == {"why": "the profiler saw no kernels"}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.ones(3) + 1
    assert items.summary_of(profiler, 1) == {"why": "the profiler saw no kernels"}


# --- The schedule -----------------------------------------------------------------------------------------------------

STAND_IN = """
import json, os, pathlib, sys, time
name, device, path, options = sys.argv[1:]
path, options = pathlib.Path(path), json.loads(options)
time.sleep(options.get("preparing", 0))
if "ready" in options:
    path.with_suffix(".ready").touch()
    left = float(sys.stdin.readline())
print("a line of its log", flush=True)
if "keeps" in options:
    path.write_text(json.dumps({"state": "done", "result": options["keeps"]}))
time.sleep(options.get("takes", 0))
if "code" in options:
    os._exit(options["code"])
path.write_text(json.dumps({"state": "done", "result": {"cores": len(os.sched_getaffinity(0)), "at": time.time()}}))
"""


@pytest.fixture
def stand_ins(monkeypatch, tmp_path):
    """play(items): their records, in the order of their ends, when a small script stands in for `gpu_items.py`."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    start = subprocess.Popen

    def instead(command, **options):
        return start([command[0], str(script), *map(str, command[3:])], **options)

    monkeypatch.setattr(gpu.subprocess, "Popen", instead)

    def play(jobs: dict, device: str = "cpu", minutes: float = 1) -> dict:
        monkeypatch.setattr(gpu, "ITEMS", jobs)
        records = {}
        gpu.play(list(jobs), device, minutes, lambda name, record: records.update({name: record}))
        return records

    return play


def item(seconds: int = 1, beside: bool = False, **options) -> gpu.Item:
    return gpu.Item(seconds, "stand_in", options, beside)


def test_an_item_that_fails_costs_no_other(stand_ins):
    """It crashes, or crashes after its measurement, of which the result stays."""
    records = stand_ins({"a": item(code=7), "b": item(keeps={"ms": 5}, code=139), "c": item(ready=1)})
    assert [records[name]["state"] for name in "abc"] == ["failed", "failed", "done"]
    assert "code 7" in records["a"]["why"] and "a line of its log" in records["a"]["log"]
    assert records["b"]["result"] == {"ms": 5} and "result" not in records["a"]


def test_what_does_not_fit_into_the_time_is_left_out(stand_ins):
    """Two seconds: one item may take longer, the next one does not end in time, and the last one still fits not."""
    start = time.monotonic()
    records = stand_ins({"long": item(100), "stuck": item(1, takes=60), "late": item(1)}, minutes=2 / 60)
    assert [records[name]["state"] for name in ("long", "stuck", "late")] == ["left out", "failed", "left out"]
    assert (
        records["long"]["why"] == "it may take 100 s, and 2 s were left"
        and "stopped after 2 s" in records["stuck"]["why"]
    )
    assert time.monotonic() - start < 10


@pytest.fixture
def many_cores(monkeypatch):
    """As on a machine with a GPU and enough cores: items start together, and the first core is for what is timed."""
    monkeypatch.setattr(gpu, "ENOUGH", 1)
    monkeypatch.setattr(gpu, "FRONT", 1)


def test_items_that_compile_do_so_beside_the_others(stand_ins, many_cores):
    """What compiles is passed over until it is ready; all others keep their order, and nobody waits in vain."""
    jobs = {
        "a": item(2, takes=0.2), "graph": item(1, True, preparing=1, ready=1), "b": item(2, ready=1),
        "never": item(1, True, preparing=60, ready=1), "c": item(2, takes=0.2),
    }  # fmt: skip
    start = time.time()
    records = stand_ins(jobs, "cuda", minutes=4 / 60)
    assert list(records) == ["a", "b", "c", "graph", "never"]
    assert records["graph"]["result"]["at"] - start > 0.9 and records["a"]["result"]["cores"] == 1
    assert records["never"]["state"] == "left out" and "not ready after 3 s" in records["never"]["why"]


def test_an_item_that_hangs_is_stopped_so_that_others_have_their_turn(stand_ins, many_cores):
    records = stand_ins({"hangs": item(1, takes=60), "next": item(1)}, "cuda")
    assert records["hangs"]["state"] == "failed" and "stopped after 2 s" in records["hangs"]["why"]
    assert records["next"]["state"] == "done"


def test_every_item_is_a_function_and_fits():
    """Those that do not compile fit together into eight minutes, and each has a place on the page."""
    assert all(callable(getattr(items, item.function)) for item in gpu.ITEMS.values())
    assert sum(item.seconds for item in gpu.ITEMS.values() if not item.beside) <= 8 * 60
    shown = set.union(*(names for _, names, _ in gpu.SECTIONS)) | {"machine", "computed"}
    assert shown == gpu.ITEMS.keys()


# --- The command ------------------------------------------------------------------------------------------------------


def command(*words: str, **options) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "experiments.gpu", *words]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, **options)


def test_the_command_writes_numbers_and_page(tmp_path):
    """Without --output nothing is written. --render makes the page again."""
    before = sorted((ROOT / "results").iterdir())
    done = command("--device", "cpu", "--only", "machine", "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert re.findall(r"s  (\w+), (\w+)", done.stdout) == [("machine", "done")]
    raw, page = json.loads((tmp_path / "out/gpu.json").read_text()), (tmp_path / "out/gpu.md").read_text()
    assert raw["items"]["machine"]["result"]["line"] in " ".join(page.split()) and page == gpu.page(raw)
    assert "On a CPU and with tiny models" in page and "Targets" not in page
    (tmp_path / "out/gpu.md").unlink()
    assert command("--render", "--output", str(tmp_path / "out")).returncode == 0
    assert (tmp_path / "out/gpu.md").read_text() == page and sorted((ROOT / "results").iterdir()) == before


@pytest.mark.slow
def test_a_killed_run_keeps_what_it_had(tmp_path):
    """And ends what it started: those processes wait for their turn from one that is gone."""
    words = ["--device", "cpu", "--only", "adaptation", "training", "--output", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.gpu", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        assert "machine" in process.stdout.readline()
        time.sleep(1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    raw = json.loads((tmp_path / "gpu.json").read_text())
    assert raw["items"].keys() == {"machine"} and "experiments.gpu" in (tmp_path / "gpu.md").read_text()


def test_a_failed_item_is_exit_code_1(monkeypatch, tmp_path, capsys):
    """And it is on the page. A page that cannot be made costs no numbers."""

    def play(names, device, minutes, note):
        note("machine", {"state": "done", "result": {"line": "a machine"}, "took": 1})
        assert json.loads((tmp_path / "gpu.json").read_text())["items"].keys() == {"machine"}  # saved at once
        note("training", {"state": "failed", "why": "CUDA error: an illegal memory access"})
        note("strings", {"state": "wrong", "why": "the loss is nan", "result": {"seconds": "no list"}})

    monkeypatch.setattr(gpu, "play", play)
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1 and "training, failed: CUDA error" in capsys.readouterr().out
    assert "- training, failed: CUDA error: an illegal memory access" in (tmp_path / "gpu.md").read_text()
    assert json.loads((tmp_path / "gpu.json").read_text())["items"]["strings"]["why"] == "the loss is nan"


@pytest.mark.parametrize("words", [["--only", "nothing"], ["--device", "cuda"]])
def test_what_cannot_be_is_one_sentence(words):
    done = command(*words)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {' '.join(words)}") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_packages_that_only_some_items_need_may_be_absent():
    """Without datasets, rouge_score and PEFT: PEFT's contestants and the README's command are left out, no more."""
    code = """if True:
        import sys
        for name in ("datasets", "rouge_score", "peft"):
            sys.modules[name] = None
        import transformers
        from experiments import gpu_items as items
        from plumbing.errors import UserError
        result = items.training(items.SIZES["cpu"], "cpu", items.Here())
        assert set(result["lost"]) == {"PEFT LoRA", "PEFT Poly"}, result
        assert items.strings(items.SIZES["cpu"], "cpu", items.Here())["seconds"]
        assert "peft" not in items.machine(items.SIZES["cpu"], "cpu", items.Here())["line"]
        try:
            items.command(items.SIZES["cpu"], "cpu", items.Here())
        except UserError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "datasets and rouge_score must be installed" in done.stdout, done.stderr[-2000:]


# --- The page ---------------------------------------------------------------------------------------------------------

PROFILE = {
    "busy": 90.0,
    "kernels": 1000.0,
    "top": [["a  long\nkernel", 50.0, 10.0]],
    "operators": [["aten::mm", 432.0]],
}


def numbers(compiled_mhr: float = 0.1, strings: float = 0.007) -> dict:
    """Made-up numbers of a GPU: floor 100 ms, LoRA 200, MHR 220, PEFT's Poly 1,300."""
    times = {"floor": [0.1] * 3, "LoRA": [0.2] * 3, "MHR, 8 heads": [0.22] * 3, "PEFT Poly": [1.3] * 3}
    done = {
        "machine": {"line": "cuda, a GPU"},
        "training": {"seconds": times, "peak": {"LoRA": 2000.0}, "lost": {}, "profile": {"MHR, 8 heads": PROFILE}},
        "computed": {"training": {"LoRA": 1900.0}},
        "recipe": {"seconds": {"floor": [0.2], "MHR, 8 heads": [0.25]}, "lost": {}, "profile": {}},
        "strings": {"seconds": [strings] * 5, "before": 3.0, "profile": PROFILE},
    }
    for name, seconds in (("floor", 0.09), ("MHR", compiled_mhr)):
        done[f"whole {name}"] = {
            "seconds": [seconds] * 3, "layers": 24, "peak": 900.0, "compiling": 200.0, "profile": PROFILE,
        }  # fmt: skip
    records = {name: {"state": "done", "result": result} for name, result in done.items()}
    return {"command": "python -m experiments.gpu", "device": "cuda", "seconds": 400.0, "items": records}


def verdicts(raw: dict) -> list[tuple[str, str]]:
    """(value, verdict) of the targets on the page."""
    lines = gpu.page(raw).split("## Targets")[1].split("## ")[0].splitlines()
    found = [re.search(r"  +([\d.,]*) +[<>]= +\S+ +(met|missed|not measured)$", line) for line in lines]
    return [match.groups() for match in found if match]


def test_targets_are_met_or_missed():
    """By hand: 220/200, 100/90, 1300/100, 90/100, 250/200, 7 ms."""
    assert verdicts(numbers()) == [
        ("1.10", "met"), ("1.11", "met"), ("13.0", "met"), ("90.0", "met"), ("1.25", "met"), ("7.00", "met"),
        ("", "not measured"),
    ]  # fmt: skip
    assert "Why a target is missed" not in gpu.page(numbers())
    assert verdicts(numbers(compiled_mhr=0.12, strings=0.009)) == [
        ("1.10", "met"), ("1.33", "missed"), ("10.8", "missed"), ("75.0", "missed"), ("1.25", "met"),
        ("9.00", "missed"), ("", "not measured"),
    ]  # fmt: skip


def test_the_profile_shows_why_a_target_is_missed():
    page = gpu.page(numbers(compiled_mhr=0.12, strings=0.009))
    assert page.count("## Why a target is missed") == 2 and page.count("a long kernel") == 2  # a graph's three in one
    assert re.search(r"a long kernel +50.00 +10\n", page) and re.search(r"aten::mm +432\n", page)
    raw = numbers(strings=0.009)
    raw["items"]["strings"]["result"]["profile"] = {"why": "the profiler saw no kernels"}
    assert "There is no profile: the profiler saw no kernels." in gpu.page(raw)


def test_without_the_whole_graph_the_one_of_few_layers_counts():
    """But PEFT's Poly was measured with all layers, so that ratio was not."""
    raw = numbers()
    for name in ("floor", "MHR"):
        raw["items"][f"compiled {name}"] = raw["items"].pop(f"whole {name}")
        raw["items"][f"compiled {name}"]["result"]["layers"] = 6
    raw["items"]["whole MHR"] = {"state": "left out", "why": "not ready after 400 s"}
    assert [verdict for _, verdict in verdicts(raw)][1:4] == ["met", "not measured", "met"]
    page = gpu.page(raw)
    assert "6 + 6 layers compiled" in page and "- whole MHR, left out: not ready after 400 s" in page


def test_a_page_of_nothing():
    """Every item failed: nothing is measured, and the page says why."""
    raw = numbers()
    raw["items"] = {name: {"state": "failed", "why": f"no {name}"} for name in gpu.ITEMS}
    assert {verdict for _, verdict in verdicts(raw)} == {"not measured"}
    assert all(f"- {name}, failed: no {name}" in gpu.page(raw) for name in gpu.ITEMS)


def test_the_table_has_ratios_busy_shares_and_memory():
    lines = gpu.page(numbers()).splitlines()
    assert next(re.split("  +", line.strip()) for line in lines if line.startswith("    MHR, 8 heads   ")) == [
        "MHR, 8 heads", "220", "2.20", "90.0", "40.9", "1,000",
    ]  # fmt: skip
    assert any(re.fullmatch(r"    LoRA +200 +2.00 +2,000 +1,900", line) for line in lines)
    assert all(len(line) <= 140 for line in lines)


# --- On a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["correctness", "deterministic", "generation", "recipe"])
def test_on_a_gpu(gpu, tmp_path, name):
    """The item of the command, at its real size."""
    done = command("--only", name, "--output", str(tmp_path), env=gpu)
    raw = json.loads((tmp_path / "gpu.json").read_text())
    assert done.returncode == 0 and raw["items"][name]["state"] == "done", done.stdout


@pytest.mark.cuda
@pytest.mark.slow
def test_graphs_on_a_gpu(gpu, tmp_path):
    """One graph of few layers, and whether compiled runs repeat and resume."""
    names = ["compiled floor", "compiled MHR", "compiled runs", "compiled strings"]
    done = command("--only", *names, "--output", str(tmp_path), env=gpu)
    raw = json.loads((tmp_path / "gpu.json").read_text())
    assert done.returncode == 0 and all(raw["items"][name]["state"] == "done" for name in names), done.stdout
