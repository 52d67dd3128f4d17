"""Export and import: what PEFT, plain Hugging Face code and the authors' layout compute is what the run computes."""

import copy
import dataclasses
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import adapt
import benchmarks
import evaluate
import train
from baselines.fixed import FixedRouter
from inject import adapted_layers, read_tensors, save_adapters, task_ids, write_tensors
from methods import average_skills, collapse, load_run
from plumbing.backbones import load_backbone
from plumbing.errors import RunError, UserError
from plumbing.flags import explicit_flags
from plumbing.folders import read_config, write_config, write_json
from recipes import FIXED_TABLE, ONE_ADAPTER
from tests.helpers import (
    GIVEN, HEADS, IDS, LEARNED, NAMES, QUICK, RANK, SINGLE, SKILLS, TABLES, TASKS, adapted, backbone, change_json,
    contents, difference, grid, inputs, layers_of, logits, randomise, read, same_tensors, save_as_backbone, sweep,
)  # fmt: skip
from tests.test_counts import XL
from tools import cards, export

peft = pytest.importorskip("peft")

NEAR = 1e-5  # relative, of logits
NAMES_OF_TASKS = ["ante", "b.c", "d e", "mu2", "ζ"]
IN_PEFT = [kind for kind in (*SINGLE, *LEARNED, *GIVEN) if kind[1] != "sft"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tiny random backbones as model folders, by name."""
    root = tmp_path_factory.mktemp("backbones")
    for name in NAMES:
        save_as_backbone(backbone(name), root / name)
    return root


def make_run(folders, folder, name, method, adapter, **settings):
    """A run folder as train.py leaves it, of a random adapted model; returns the model."""
    shared = {"router": FixedRouter(TABLES[method])} if method in FIXED_TABLE else {}  # one fixed table for all layers
    model = adapted(name, method, adapter, **shared, **settings)
    by = dict(method="random", random_by="task") if method == "random-by-task" else dict(method=method)
    skills = TASKS if method in ("private", "adapter-soup") else SKILLS
    sizes = dict(rank=RANK, skills=skills, heads=HEADS, density=0.2, backbone=str(folders / name), device="cpu")
    folder.mkdir()
    write_config(folder, train.Config(**by | sizes | dict(adapter=adapter) | settings))
    write_json(folder / "tasks.json", {"tasks": NAMES_OF_TASKS, "skills": []})
    save_adapters(model, str(folder / "adapter.safetensors"))
    return model


def run_export(folder, out, format="peft", **flags):
    export.main(dict(checkpoint=str(folder), output_dir=str(out), format=format) | flags)
    return out


def plain_logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


def auto(name):
    return AutoModelForSeq2SeqLM if name in ("t5", "bart") else AutoModelForCausalLM


def adapted_in_peft(model) -> set[str]:
    """The names of the layers that PEFT adapted."""
    kinds = (peft.tuners.lora.LoraLayer, peft.tuners.ia3.IA3Layer, peft.tuners.poly.PolyLayer)
    return {n.removeprefix("base_model.model.") for n, m in model.named_modules() if isinstance(m, kinds)}


# --- One task ---------------------------------------------------------------------------------------------------------


@sweep("name,method,adapter", grid(IN_PEFT), lambda *case: case in QUICK)
def test_one_task_in_peft(name, method, adapter, folders, tmp_path):
    """A PEFT folder gives the run's logits for every exported task, and adapts the run's layers and no others."""
    model, batch = make_run(folders, tmp_path / "run", name, method, adapter), inputs(name)
    tasks = [""] if method in ONE_ADAPTER else ["mu2", "mu"]
    for task in tasks:
        out = run_export(tmp_path / "run", tmp_path / f"out-{task}", task=task)
        theirs = peft.PeftModel.from_pretrained(backbone(name), str(out))
        assert adapted_in_peft(theirs) == adapted_layers(model).keys()
        assert not any(re.search("missing|unexpected", key) for key in load_file(out / "adapter_model.safetensors"))
        routed = copy.deepcopy(model)
        if task == "mu":
            average_skills(routed, adapter)
        ids = [NAMES_OF_TASKS.index(task)] * 4 if task in NAMES_OF_TASKS else [0] * 4
        ours = logits(routed, batch, ids)
        assert difference(plain_logits(theirs, batch), ours) < NEAR
        assert difference(plain_logits(backbone(name), batch), ours) > 0.01  # the adapter matters


@sweep("name,method,adapter", grid([*SINGLE, *LEARNED, ("random", "lora")]), lambda *case: case in QUICK)
def test_merged_model_is_plain(name, method, adapter, folders, tmp_path):
    """The merged folder loads with from_pretrained alone, with nothing left over, and is the routed model."""
    model, batch = make_run(folders, tmp_path / "run", name, method, adapter), inputs(name)
    single = method in ONE_ADAPTER
    out = run_export(tmp_path / "run", tmp_path / "out", "merged", task="" if single else "b.c")
    merged, info = auto(name).from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert type(merged) is type(backbone(name))
    assert difference(plain_logits(merged, batch), logits(model, batch, [1] * 4)) < NEAR
    assert (out / "tokenizer_config.json").exists()


@pytest.mark.parametrize("layers", [r".*\.decoder\..*self_attn\.q_proj", r".*encoder\.layers\.1\.fc1", r".*\.fc[12]"])
@pytest.mark.parametrize("adapter", ["lora", "ia3"])
def test_target_modules_are_exact(layers, adapter, folders, tmp_path):
    """Also layers that share their last names with others (BART's cross-attention, another block) are named exactly."""
    model = make_run(folders, tmp_path / "run", "bart", "poly", adapter, layers=layers)
    out = run_export(tmp_path / "run", tmp_path / "out", task="ante")
    theirs = peft.PeftModel.from_pretrained(backbone("bart"), str(out))
    assert adapted_in_peft(theirs) == adapted_layers(model).keys()
    assert difference(plain_logits(theirs, inputs("bart")), logits(model, inputs("bart"), [0] * 4)) < NEAR


def test_target_modules_are_short_and_the_same_every_time(folders, tmp_path):
    """What other programs read: last names where they suffice, sorted, for PEFT itself writes sets in any order."""
    make_run(folders, tmp_path / "run", "t5", "lora", "lora")
    make_run(folders, tmp_path / "gpt2", "gpt2", "ia3", "ia3")
    content = read(run_export(tmp_path / "run", tmp_path / "a") / "adapter_config.json")
    assert content["target_modules"] == ["k", "o", "q", "v", "wi_0", "wi_1", "wo"]
    assert (content["r"], content["lora_alpha"], content["fan_in_fan_out"]) == (RANK, 1, False)
    assert content["base_model_name_or_path"] == str(folders / "t5")
    content = read(run_export(tmp_path / "gpt2", tmp_path / "b") / "adapter_config.json")
    assert content["target_modules"] == ["c_attn", "mlp.c_proj"]
    assert (content["feedforward_modules"], content["fan_in_fan_out"]) == (["mlp.c_proj"], True)


# --- All tasks --------------------------------------------------------------------------------------------------------


def served(name, out, tasks):
    """PEFT's model with the adapters of these tasks of an export, under names without dots."""
    first, *others = tasks
    model = peft.PeftModel.from_pretrained(backbone(name), str(out / first), adapter_name=first.replace(".", "_"))
    for task in others:
        model.load_adapter(str(out / task), adapter_name=task.replace(".", "_"))
    return model.eval()


@pytest.mark.parametrize("name, method", [("llama", "mhr"), ("t5", "poly"), ("t5", "mhr"), ("gpt2", "poly")])
def test_tasks_served_in_one_batch(name, method, folders, tmp_path):
    """Three of the exported tasks in one model of PEFT, one batch: the logits, and the outputs of beam search, of ours
    under task ids."""
    model, batch = make_run(folders, tmp_path / "run", name, method, "lora"), inputs(name)
    out = run_export(tmp_path / "run", tmp_path / "out", task="all")
    tasks = ["b.c", "ante", "ζ", "b.c"]
    ids, names = [NAMES_OF_TASKS.index(task) for task in tasks], [task.replace(".", "_") for task in tasks]
    theirs = served(name, out, ["ante", "b.c", "ζ"])
    with torch.no_grad():
        y = theirs(**batch, adapter_names=names).logits
    ours = logits(model, batch, ids)
    assert difference(y, ours) < NEAR
    assert difference(y, logits(model, batch, ids[1:] + ids[:1])) > 0.01  # each row has its own task
    del batch["labels"]
    how = dict(max_new_tokens=4, min_new_tokens=4, num_beams=2, do_sample=False)
    with torch.no_grad(), task_ids(ids, keep=True):
        expected = model.generate(**batch, **how)
    assert torch.equal(theirs.generate(**batch, **how, adapter_names=names), expected)


@pytest.mark.parametrize("method, adapter", [("poly", "lora"), ("mhr", "lora"), ("poly", "ia3"), ("random", "lora")])
def test_every_task_has_a_folder(method, adapter, folders, tmp_path):
    """Each folder is what --task NAME writes, index.json says what they are, and they are as large for MHR as for Poly:
    r (i + o) numbers a layer."""
    model = make_run(folders, tmp_path / "run", "t5", method, adapter)
    out = run_export(tmp_path / "run", tmp_path / "out", task="all")
    assert sorted(path.name for path in out.iterdir()) == sorted([*NAMES_OF_TASKS, "README.md", "index.json"])
    rank = {"rank": RANK} if adapter == "lora" else {}
    assert read(out / "index.json") == rank | {
        "tasks": {task: task for task in NAMES_OF_TASKS}, "base_model": str(folders / "t5"), "method": method,
        "adapter": adapter, "checkpoint": str(tmp_path / "run"),
    }  # fmt: skip
    for task in NAMES_OF_TASKS[:2]:
        alone = run_export(tmp_path / "run", tmp_path / task, task=task)
        assert contents(alone) == contents(out / task)
    if adapter == "lora":
        size = sum(RANK * (layer.in_features + layer.out_features) for layer in adapted_layers(model).values())
        saved = load_file(out / "ante" / "adapter_model.safetensors")
        assert sum(p.numel() for p in saved.values()) == size
        assert f"{size:,} parameters" in (out / "ante" / "README.md").read_text()


def test_one_task_is_held_at_a_time(folders, tmp_path, monkeypatch):
    """What was mixed for a task is gone when the next one is mixed."""
    make_run(folders, tmp_path / "run", "t5", "mhr", "lora")
    write, before = export.write_peft, []

    def watched(model, params, *args):
        assert not [1 for reference in before if reference() is not None]
        before.extend(weakref.ref(p) for layer in params.values() for p in layer.values())
        write(model, params, *args)

    monkeypatch.setattr(export, "write_peft", watched)
    run_export(tmp_path / "run", tmp_path / "out", task="all")
    assert len(before) > 5 * 2 * len(NAMES_OF_TASKS)


def test_an_interrupted_export_leaves_no_file(folders, tmp_path, monkeypatch):
    """Ctrl-C at the third task: the folder is empty, and the same command then works."""
    make_run(folders, tmp_path / "run", "t5", "mhr", "lora")
    card, done = export.card_of_task, []

    def interrupted(source, task, *args):
        done.append(task)
        if len(done) == 3:
            raise KeyboardInterrupt
        return card(source, task, *args)

    monkeypatch.setattr(export, "card_of_task", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_export(tmp_path / "run", tmp_path / "out", task="all")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"] and not list((tmp_path / "out").iterdir())
    run_export(tmp_path / "run", tmp_path / "out", task="all")


@pytest.mark.parametrize(
    "name", ["..", "../x", "a/b", "", "a\0b", "a\nb", "index.json", "README.md", "ante", "x" * 300]
)
def test_names_that_no_folder_can_have(name, folders, tmp_path):
    """Nothing is written, above all not outside the output folder. (Too long a name the disk refuses.)"""
    make_run(folders, tmp_path / "run", "t5", "poly", "lora")
    write_json(tmp_path / "run" / "tasks.json", {"tasks": ["ante", "b", name, "c", "d"], "skills": []})
    before = contents(tmp_path)
    if len(name) > 255:
        with pytest.raises(OSError, match="cannot be written"):
            run_export(tmp_path / "run", tmp_path / "out", task="all")
    else:
        assert f"task {name!r} cannot have a folder" in refused(tmp_path / "run", tmp_path / "out", task="all")
    assert contents(tmp_path) == before and not list(tmp_path.glob("*.tmp"))


def test_a_damaged_task_leaves_nothing(folders, tmp_path):
    """The second task's file is damaged: also the first one's folder is gone. It can be exported alone."""
    make_run(folders, tmp_path / "run", "t5", "mhr", "lora")
    run = adapt.Config(checkpoint=str(tmp_path / "run"), variant="z", device="cpu")
    base, few = adapt.base_config(run), tmp_path / "few"
    model, _ = load_run(tmp_path / "run", base)
    adapt.prepare(model, base, run)
    (few / "0").mkdir(parents=True)
    for task in ("a", "b"):
        save_adapters(model, str(few / "0" / f"{task}.safetensors"))
    write_config(few, run)
    (few / "0" / "b.safetensors").write_bytes(b"12345678")
    assert "b.safetensors" in refused(few, tmp_path / "out", task="all")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few", "run"]
    run_export(few, tmp_path / "out", task="a")
    (few / "result.json").write_text("{")
    assert "result.json:1 is not valid JSON" in refused(few, tmp_path / "out-2", task="a")
    assert not list(tmp_path.glob("out-2*"))
    for path in (few / "0").iterdir():
        path.unlink()
    assert refused(few, tmp_path / "out-2", task="all") == f"{few} has no adapters yet"


# --- Model cards ------------------------------------------------------------------------------------------------------


def blocks_of(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.S)


def run_block(block: str, folder, monkeypatch, **scope) -> dict:
    """Run Python from a card or a page in a folder; returns its variables."""
    monkeypatch.chdir(folder)
    exec(block, scope)
    return scope


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_the_code_of_the_cards_runs(name, folders, tmp_path, monkeypatch, recwarn):
    """It loads the task, or all of them, as they are in the run, and asks the hub for none of these folders."""
    model, batch = make_run(folders, tmp_path / "run", name, "mhr", "lora"), inputs(name)
    out = run_export(tmp_path / "run", tmp_path / "out", task="all")
    (block,) = blocks_of((out / "b.c" / "README.md").read_text())
    scope = run_block(block, out / "b.c", monkeypatch)
    assert difference(plain_logits(scope["model"], batch), logits(model, batch, [1] * 4)) < NEAR
    assert scope["tokenizer"]("ab").input_ids
    (block,) = blocks_of((out / "README.md").read_text())
    two = {key: batch[key][:2] for key in ("input_ids", "attention_mask")}
    scope = run_block(block, out, monkeypatch, batch=two)
    names = [task.replace(".", "_") for task in NAMES_OF_TASKS]
    assert set(scope["model"].peft_config) == {"default", *names}
    with torch.no_grad():
        y = scope["model"](**batch, adapter_names=[names[k] for k in IDS]).logits
    assert difference(y, logits(model, batch, IDS)) < NEAR
    assert not [str(warning.message) for warning in recwarn if "remote file" in str(warning.message)]


def test_the_code_of_a_card_of_ia3(folders, tmp_path, monkeypatch):
    """PEFT ignores `adapter_names` under (IA)^3 (tests/test_peft.py), so the card sets one task for all rows."""
    model, batch = make_run(folders, tmp_path / "run", "t5", "poly", "ia3"), inputs("t5")
    out = run_export(tmp_path / "run", tmp_path / "out", task="all")
    (block,) = blocks_of((out / "README.md").read_text())
    scope = run_block(block, out, monkeypatch)
    assert difference(plain_logits(scope["model"], batch), logits(model, batch, [0] * 4)) < NEAR


def test_what_a_card_says(folders, tmp_path):
    """The hub's front matter; scores, settings and the commit of the run; nothing that the run does not say."""
    make_run(folders, tmp_path / "run", "t5", "mhr", "lora", lr_z=0.25)
    text = (run_export(tmp_path / "run", tmp_path / "plain", task="ante") / "README.md").read_text()
    assert "## Score" not in text and "| commit" not in text and "| routing | `gumbel` |" in text
    write_json(tmp_path / "run" / "result.json", {"tasks": {"ante": 87.54, "mu2": 3}, "mean": 45})
    write_json(tmp_path / "run" / "provenance.json", {"starts": [{"commit": "old"}, {"commit": "0ff1ce"}]})
    change_json(tmp_path / "run" / "config.json", eval_examples=20)
    text = (run_export(tmp_path / "run", tmp_path / "out", task="ante") / "README.md").read_text()
    assert "On 20 test examples: main metric 87.5." in text
    for row in ("| commit | `0ff1ce` |", "| lr_z | `0.25` |", f"| rank | `{RANK}` |", f"| heads | `{HEADS}` |"):
        assert row in text
    assert "[mhr](https://arxiv.org/abs/2211.03831) on 5 tasks of `strings`" in text
    assert (export.TINY.parents[1] / "CITATION.bib").read_text().strip() in text
    data = ModelCard(text).data
    assert (data.library_name, data.tags, data.base_model) == ("peft", ["mhr", "lora"], None)
    change_json(tmp_path / "run" / "result.json", tasks={"ante": "high"})
    assert "'main metric' is 'high', no number" in refused(tmp_path / "run", tmp_path / "odd", task="ante")


def test_a_card_of_a_backbone_of_the_hub(folders, tmp_path):
    """Its name is what the hub links to; a local folder's is asked for. A name of a task cannot break the card."""
    model = make_run(folders, tmp_path / "run", "t5", "poly", "ia3")
    source = cards.Source(tmp_path / "run", train.Config(method="poly", adapter="ia3", layers="a|b"))
    task = "a: `b`\n---\n# c"
    text = cards.card_of_task(source, task, "google/t5-xl-lm-adapt", model, 12)
    data = ModelCard(text).data
    assert (data.base_model, data.tags) == ("google/t5-xl-lm-adapt", ["poly", "ia3"])
    assert "# run: `` a: `b` --- # c ``\n" in text and "Before an upload" not in text
    assert "| rank" not in text and "| heads" not in text and r"| layers | `a\|b` |" in text
    assert "Before an upload" in cards.card_of_task(source, "a", "tiny", model, 12)
    assert not blocks_of(cards.card_of_task(source, "a", "scratch", model, 12))
    text = cards.card_of_task(source._replace(adapted=adapt.Config(variant="mu"), split="3"), "a", "tiny", model, 1)
    assert "skills are mixed already" in text
    alone = cards.Source(tmp_path / "run", train.Config(method="lora"))
    assert "skills" not in cards.card_of_task(alone, "", "tiny", model, 1)
    assert "| split |  | `3` |" in text and "| lr_z | `0.1` |  |" in text  # mu trains no Z


# --- docs/serving.md --------------------------------------------------------------------------------------------------

SERVING = (Path(__file__).resolve().parents[1] / "docs" / "serving.md").read_text()
TASKS_OF_PAGE = ["sort+reverse", "swap+rotate", "drop+rotate", "b.c", "ζ"]


@pytest.fixture(scope="module")
def page(folders, tmp_path_factory):
    """(folder in which the page's commands and code run, the model of its run)."""
    root = tmp_path_factory.mktemp("page")
    (root / "runs").mkdir()
    model = make_run(folders, root / "runs" / "strings-mhr-0", "t5", "mhr", "lora")
    write_json(root / "runs" / "strings-mhr-0" / "tasks.json", {"tasks": TASKS_OF_PAGE, "skills": []})
    return root, model


def test_the_page_on_serving_runs(page, monkeypatch):
    """Its code gives what our model gives: of PEFT, and of the routed model. So does the merged model."""
    root, model = page
    monkeypatch.chdir(root)
    batch = {name: value for name, value in inputs("t5").items() if name != "labels"}
    commands = re.findall(r"^    python -m tools.export (.*--checkpoint runs/strings-mhr-0 .*)$", SERVING, re.M)
    for words in commands:
        export.main(explicit_flags(export.Config, {}, words.split()))
    assert len(commands) == 2
    theirs, ours = blocks_of(SERVING)
    served = run_block(theirs, root, monkeypatch, batch=batch)
    ids = [TASKS_OF_PAGE.index(name) for name in served["names"]]
    assert ids == [1, 0, 1, 2] and f"task_ids({ids}, keep=True)" in ours
    routed = run_block(ours, root, monkeypatch, batch=batch)
    assert torch.equal(served["outputs"], routed["outputs"])
    y, labels = logits(model, inputs("t5"), ids), inputs("t5")
    with torch.no_grad():
        assert difference(served["model"](**labels, adapter_names=served["names"]).logits, y) < NEAR
    merged = AutoModelForSeq2SeqLM.from_pretrained(root / "exported" / "model")
    assert difference(plain_logits(merged, labels), logits(model, labels, [0] * 4)) < NEAR


def test_peft_applies_the_adapters_of_a_batch_one_after_another(folders, tmp_path):
    """As the page says: as many calls of a layer's A as there are distinct tasks."""
    make_run(folders, tmp_path / "run", "llama", "mhr", "lora")
    theirs = served("llama", run_export(tmp_path / "run", tmp_path / "out", task="all"), ["ante", "ζ", "b.c"])
    calls, layer = [], next(m for m in theirs.modules() if isinstance(m, peft.tuners.lora.LoraLayer))
    for adapter in layer.lora_A.values():
        adapter.register_forward_hook(lambda *_: calls.append(1))
    for names in (["ante"] * 4, ["ante", "ζ", "ante", "ζ"], ["b_c", "ζ", "ante", "ζ"]):
        calls.clear()
        theirs(**inputs("llama"), adapter_names=names)
        assert len(calls) == len(set(names))


def test_the_line_for_vllm_names_every_task(page, monkeypatch):
    """The shell's words, from a program of that name that prints them; vLLM itself is not installed."""
    root, _ = page
    out = run_export(root / "runs" / "strings-mhr-0", root / "exported" / "superni", task="all")
    (root / "bin").mkdir()
    (root / "bin" / "vllm").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (root / "bin" / "vllm").chmod(0o755)
    (line,) = re.findall(r"^    vllm .*\\\n.*$", SERVING, re.M)
    env = os.environ | {"PATH": f"{root / 'bin'}:{os.environ['PATH']}"}
    said = subprocess.run(["bash", "-c", line], cwd=root, env=env, capture_output=True, text=True, check=True).stdout
    words = said.splitlines()
    modules = dict(word.split("=", 1) for word in words[words.index("--lora-modules") + 1 :])
    assert modules == {task: str(out / task) for task in TASKS_OF_PAGE}


def test_the_costs_on_the_page():
    """Its table follows from the counts that tests/test_counts.py computes, its time is the benchmark's."""
    lora, poly, mhr = (XL[name] for name in ("LoRA", "Poly", "MHR, 64 heads"))
    rows = [(lora[2], 313 * lora[2])] + [(counts[3], counts[0] + counts[1]) for counts in (poly, mhr)]
    shown = re.findall(r"^\| (?:exported|routed).*?\| (.*) \| (.*) \| (.*) \|$", SERVING, re.M)
    assert shown == [(f"{new:,}", f"{every:,}", f"{4 * every / 1e6:,.0f} MB") for new, every in rows]
    for counts in (poly, mhr):  # "from 9 tasks on"
        assert counts[0] + 9 * counts[3] < 9 * lora[2] and counts[0] + 8 * counts[3] > 8 * lora[2]
    bench = (export.TINY.parents[1] / "results" / "bench.md").read_text()
    _, _, time, _ = re.search(r"b=16 .* h=8, mixed, greedy" + r" +([\d.]+) \([\d.]+\)" * 4, bench).groups()
    assert f"took {time} times the backbone's" in " ".join(SERVING.split())


# --- PEFT's Poly ------------------------------------------------------------------------------------------------------


def came_back(run, back):
    """The run that was exported is the one that was imported: tensors to the bit, tasks, settings but the folder."""
    assert same_tensors(run / "adapter.safetensors", back / "adapter.safetensors")
    assert (run / "tasks.json").read_text() == (back / "tasks.json").read_text()
    assert read(back / "config.json") == read(run / "config.json") | {"output_dir": str(back)}


@pytest.mark.parametrize(
    "name,method,routing",
    [
        ("t5", "poly", "gumbel"), ("t5", "mhr", "sigmoid"), ("bart", "mhr", "gumbel"), ("bart", "poly", "sigmoid"),
        ("llama", "mhr", "gumbel"),
    ],
)  # fmt: skip
def test_peft_poly_and_back(name, method, routing, folders, tmp_path):
    """PEFT's Poly gives the run's logits for a batch of different tasks; the way back is exact, to the settings."""
    model = make_run(folders, tmp_path / "run", name, method, "lora", routing=routing)
    out = run_export(tmp_path / "run", tmp_path / "poly", "peft-poly")
    theirs, batch = peft.PeftModel.from_pretrained(backbone(name), str(out)).eval(), inputs(name)
    assert adapted_in_peft(theirs) == adapted_layers(model).keys()
    with torch.no_grad():
        y = theirs(**batch, task_ids=torch.tensor(IDS)).logits
    assert difference(y, logits(model, batch, IDS)) < NEAR
    came_back(tmp_path / "run", run_export(out, tmp_path / "back", "run"))
    change_json(out / "run.json", layers=r".*\.0\..*[qv](_proj)?")
    assert "is of another run" in refused(out, tmp_path / "odd", format="run")


def test_an_export_of_an_earlier_version_comes_back(folders, tmp_path):
    """Its run.json has `resume`, a field that config.json has no more, and lacks fields that came later."""
    make_run(folders, tmp_path / "run", "t5", "poly", "lora")
    out = run_export(tmp_path / "run", tmp_path / "poly", "peft-poly")
    earlier = read(out / "run.json") | {"resume": False}
    del earlier["keep_every"]
    write_json(out / "run.json", earlier)
    came_back(tmp_path / "run", run_export(out, tmp_path / "back", "run"))
    change_json(out / "run.json", resume=True)
    assert "field 'resume' is unknown" in refused(out, tmp_path / "odd", format="run")


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("heads", [1, 4])
def test_poly_that_peft_saved(name, heads, folders, tmp_path):
    """A Poly of PEFT's own becomes a run with its function: the number of tasks, skills and heads from the file."""
    torch.manual_seed(0)
    targets = ["q", "wo"] if name == "t5" else r"model\.encoder\..*\.(fc1|self_attn\.v_proj)"
    settings = peft.PolyConfig(
        r=2, n_tasks=6, n_skills=3, n_splits=heads, target_modules=targets, task_type="SEQ_2_SEQ_LM"
    )
    theirs = peft.get_peft_model(backbone(name), settings)
    with torch.no_grad():
        for parameter, p in theirs.named_parameters():
            if "poly_" in parameter:
                p.normal_(0, 2.0 if "logits" in parameter else 0.4)
    theirs.eval().save_pretrained(tmp_path / "peft")
    run_export(tmp_path / "peft", tmp_path / "run", "run", backbone=str(folders / name), dataset="crossfit")
    base = read_config(train.Config, tmp_path / "run" / "config.json")
    assert (base.method, base.skills, base.rank) == ("poly" if heads == 1 else "mhr", 3, 2)
    assert (base.dataset, base.routing, base.batch_size) == ("crossfit", "gumbel", 32)
    model, _ = load_run(tmp_path / "run", base)
    assert adapted_layers(model).keys() == adapted_in_peft(theirs)
    batch = inputs(name)
    with torch.no_grad():
        y = theirs(**batch, task_ids=torch.tensor([5, 0, 4, 1])).logits
    assert difference(logits(model.eval(), batch, [5, 0, 4, 1]), y) < NEAR
    assert read(tmp_path / "run" / "tasks.json")["tasks"] == ["0", "1", "2", "3", "4", "5"]


# --- The authors' files -----------------------------------------------------------------------------------------------

HYPER = dict(
    model="?", dataset="t0", n_tasks=TASKS, n_skills=3, n_splits=4, lora_rank=2, lora_alpha=1.0, lora_warmup=False,
    model_modifier="poly", router_granularity="finegrained", router_selector=None, poly_average_correction=False,
    poly_use_shared_skill=False, module_logits_relaxed_bernoulli=False, module_logits_straight_through=False,
    module_logits_dropout=0.0, module_logits_l2_norm=False, trainable_param_names=".*lora_[ab].*|.*module_logits.*",
)  # fmt: skip


def authors_file(path, folders, name="t5", layers="", **hyper):
    """A Lightning checkpoint in the authors' layout, of random skills: (state_dict, hyper_parameters)."""
    hyper = HYPER | {"model": str(folders / name)} | hyper
    h, s, r = hyper["n_splits"], hyper["n_skills"], hyper["lora_rank"]
    state, g = {}, torch.Generator().manual_seed(0)
    for layer, module in backbone(name).named_modules():
        if re.fullmatch(layers or layers_of("lora", name), layer):
            o, i = module.weight.shape
            state[f"model.{layer}.lora_a"] = 0.3 * torch.randn(h, s, i // h, r, generator=g)
            state[f"model.{layer}.lora_b"] = 0.3 * torch.randn(h, s, r, o // h, generator=g)
            state[f"model.{layer}.selector.module_logits"] = 3 * torch.randn(TASKS, h * s, generator=g)
    content = {"state_dict": state, "hyper_parameters": hyper, "epoch": 3, "global_step": 100, "optimizer_states": []}
    torch.save(content | {"pytorch-lightning_version": "2.0.2"}, path)
    return state, hyper


def naive(name, state, hyper, task):
    """The backbone with the task's update added to each weight, in plain loops over heads and skills."""
    model = backbone(name)
    h, s, r = hyper["n_splits"], hyper["n_skills"], hyper["lora_rank"]
    for key in [key for key in state if key.endswith("lora_a")]:
        layer = key.removeprefix("model.").removesuffix(".lora_a")
        a, b = state[key], state[f"model.{layer}.lora_b"]
        z = torch.sigmoid(state[f"model.{layer}.selector.module_logits"][task])
        A, B = [], []
        for head in range(h):
            on = [z[head * s + skill] for skill in range(s)]
            on = [x.round() for x in on] if hyper["module_logits_straight_through"] else on
            w = [x / (sum(on) + 1e-12) for x in on]
            A.append(sum(w[skill] * a[head, skill] for skill in range(s)))
            B.append(sum(w[skill] * b[head, skill] for skill in range(s)))
        update = torch.cat(A, 0) @ torch.cat(B, 1) * (hyper["lora_alpha"] / r)
        with torch.no_grad():
            model.get_submodule(layer).weight.add_(update.T)
    return model


@pytest.mark.parametrize(
    "name,changed,routing",
    [
        ("t5", {}, "sigmoid"),
        ("t5", {"n_splits": 1, "module_logits_relaxed_bernoulli": True, "dataset": "ni"}, "gumbel"),
        ("t5", {"n_splits": 2, "lora_alpha": 2.0, "module_logits_straight_through": True}, "straight-through"),
        ("bart", {"dataset": "xfit", "lora_rank": 3}, "sigmoid"),
        ("llama", {"n_splits": 8, "lora_rank": 1}, "sigmoid"),
    ],
)
def test_authors_file_is_the_same_function(name, changed, routing, folders, tmp_path):
    """Every task of a file in the authors' layout gives the logits of a naive mixture of its tensors."""
    state, hyper = authors_file(tmp_path / "finish.pt", folders, name, **changed)
    run = run_export(tmp_path / "finish.pt", tmp_path / "run", "run")
    base = read_config(train.Config, run / "config.json")
    assert (base.routing, base.rank, base.skills) == (routing, hyper["lora_rank"], 3)
    assert (base.method, base.heads) == (("mhr", hyper["n_splits"]) if hyper["n_splits"] > 1 else ("poly", 8))
    assert base.dataset == {"t0": "t0", "ni": "superni", "xfit": "crossfit"}[hyper["dataset"]]
    model, _ = load_run(run, dataclasses.replace(base, precision="fp32"))
    batch = inputs(name)
    for task in range(TASKS):
        ours = logits(model.eval(), batch, [task] * 4)
        assert difference(ours, plain_logits(naive(name, state, hyper, task), batch)) < NEAR


def test_authors_file_on_another_backbone_and_data_set(folders, tmp_path):
    """--backbone and --dataset win over the file; light layers (k, v, wi_1) are found from the names alone."""
    light = r".*\.(SelfAttention|EncDecAttention)\.(k|v)|.*\.DenseReluDense\.wi_1"
    authors_file(tmp_path / "a.ckpt", folders, layers=light, model="nowhere/to-be-found", dataset="sordonia/flat")
    flags = dict(backbone=str(folders / "t5"), dataset="superni")
    run = run_export(tmp_path / "a.ckpt", tmp_path / "run", "run", **flags)
    base = read_config(train.Config, run / "config.json")
    assert base.layers == r"(.*\.)?(k|v|wi_1)" and base.clip == 0.1


def refused(folder, out, **flags) -> str:
    """The one sentence with which an export is refused. It leaves nothing behind."""
    with pytest.raises(UserError) as caught:
        run_export(folder, out, **flags)
    text = str(caught.value)
    assert "\n" not in text and not out.exists()
    return text


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ["HOSTILE"],)


def test_no_code_of_a_file_is_run(folders, tmp_path, monkeypatch):
    """A pickle that makes a folder when it is loaded is refused, and the folder is not made."""
    made = tmp_path / "made"
    monkeypatch.setenv("HOSTILE", str(made))
    for file in ("legacy.pt", "zip.pt"):
        content = {"state_dict": {}, "hyper_parameters": {"model": Hostile()}}
        torch.save(content, tmp_path / file, _use_new_zipfile_serialization=file == "zip.pt")
        assert "it asks for posix.mkdir" in refused(tmp_path / file, tmp_path / "out", format="run")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Hostile(), protocol=2))
    refused(tmp_path / "bare.pt", tmp_path / "out", format="run")
    assert not made.exists()
    torch.load(tmp_path / "zip.pt", weights_only=False)  # the file does what it is feared for
    assert made.exists()


@pytest.mark.parametrize(
    "changed,says",
    [
        ({"n_skills": 4, "n_splits": 3}, "n_splits and n_skills"),  # the layout of later versions: skills first
        ({"poly_average_correction": True}, "poly_average_correction is True"),
        ({"poly_granularity": "coarsegrained"}, "poly_granularity is coarsegrained"),
        ({"router_selector": "private"}, "router_selector is private"),
        ({"lora_warmup": True}, "lora_warmup is True"),
        ({"model": None}, "--backbone is missing"),
        ({"dataset": "flan"}, "--dataset is missing"),
        ({"model": "bart"}, "has no layer decoder.block.0.layer.0.SelfAttention.k"),
        ({"drop": "lora_b"}, "has no lora_b of 4 axes"),
        ({"rename": ("lora_a", "lora_c")}, "lora_c is no part of a Poly of LoRAs"),
        ({"drop": "hyper_parameters"}, "no state_dict and hyper_parameters"),
        ({"lora_alpha": 10**400}, "its lora_alpha is no scale"),
        ({"lora_alpha": float("nan")}, "its lora_alpha is no scale"),
        ({"shape": "k.lora_a"}, "A of layer encoder.block.0.layer.0.SelfAttention.k is (4, 3, 7, 2) and should be"),
    ],
)
def test_authors_files_that_do_not_fit(changed, says, folders, tmp_path):
    authors_file(tmp_path / "a.pt", folders)
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    drop, (old, new) = changed.pop("drop", None), changed.pop("rename", ("", ""))
    state = {key.replace(old, new): p for key, p in content["state_dict"].items() if not key.endswith(drop or "?")}
    if shape := changed.pop("shape", None):
        state = {key: p[:, :, 1:] if key.endswith(shape) else p for key, p in state.items()}
    if changed.get("model"):
        changed["model"] = str(folders / changed["model"])
    content |= {"state_dict": state, "hyper_parameters": content["hyper_parameters"] | changed}
    content.pop(drop, None)
    torch.save(content, tmp_path / "a.pt")
    assert says in refused(tmp_path / "a.pt", tmp_path / "out", format="run")


def test_damaged_files(folders, tmp_path):
    authors_file(tmp_path / "a.pt", folders)
    whole = (tmp_path / "a.pt").read_bytes()
    for k, part in enumerate((b"", b"not a pickle", whole[: len(whole) // 2], whole[:100])):
        (tmp_path / f"{k}.pt").write_bytes(part)
        assert "may be damaged" in refused(tmp_path / f"{k}.pt", tmp_path / "out", format="run")
    assert "does not exist" in refused(tmp_path / "none.pt", tmp_path / "out", format="run")
    (tmp_path / "peft").mkdir()
    assert "adapter_config.json" in refused(tmp_path / "peft", tmp_path / "out", format="run")
    write_json(tmp_path / "peft" / "adapter_config.json", {"peft_type": "LORA"})
    assert "PEFT's LORA" in refused(tmp_path / "peft", tmp_path / "out", format="run")
    write_json(tmp_path / "peft" / "adapter_config.json", {"peft_type": "POLY"})
    assert "adapter_model.safetensors cannot be read" in refused(tmp_path / "peft", tmp_path / "out", format="run")
    (tmp_path / "peft" / "adapter_model.safetensors").write_bytes(b"12345678")
    assert "adapter_model.safetensors cannot be read" in refused(tmp_path / "peft", tmp_path / "out", format="run")
    save_file({}, tmp_path / "peft" / "adapter_model.safetensors")
    assert "has no layers" in refused(tmp_path / "peft", tmp_path / "out", format="run")


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run,flags,says",
    [
        (("mhr", "lora"), {}, "--task is missing: choose from all, mu, ante, b.c"),
        (("mhr", "lora"), {"task": "c"}, "--task c is no task of"),
        (("mhr", "lora"), {"task": "ante", "split": "0"}, "--split 0 is for runs of adapt.py"),
        (("lora", "lora"), {"task": "ante"}, "one adapter for all tasks"),
        (("mhr", "sft"), {"task": "ante"}, "PEFT has no sparse fine-tuning, use --format merged"),
        (("mhr", "lora"), {"task": "ante", "backbone": "tiny"}, "--backbone does not fit --format peft"),
        (("mhr", "lora"), {"task": "ante", "format": "peft-poly"}, "--task does not fit --format peft-poly"),
        (("mhr", "lora"), {"task": "ante", "format": "run"}, "--task does not fit --format run"),
        (("mhr", "lora"), {"format": "run"}, "adapter_config.json"),
        (("mhr", "lora"), {"task": "all", "format": "merged"}, "--task all fits --format peft alone"),
        (("mhr", "lora"), {"task": "all", "format": "peft-poly"}, "--task does not fit --format peft-poly"),
        (("lora", "lora"), {"task": "all"}, "one adapter for all tasks, leave --task out"),
        (("mhr", "sft"), {"task": "all"}, "PEFT has no sparse fine-tuning"),
        (("mhr", "ia3"), {"format": "peft-poly"}, "PEFT's Poly has no --adapter ia3"),
        (("task-moe", "lora"), {"format": "peft-poly"}, "has no --method task-moe"),
        (("hyperformer", "lora"), {"format": "peft-poly"}, "has no --method hyperformer"),
        (("lora", "lora"), {"format": "peft-poly"}, "has no --method lora"),
    ],
)
def test_what_does_not_fit(run, flags, says, folders, tmp_path):
    make_run(folders, tmp_path / "run", "t5", *run)
    assert says in refused(tmp_path / "run", tmp_path / "out", **flags)


@pytest.mark.parametrize(
    "name,settings,says",
    [
        ("t5", {"granularity": "block"}, "has no --granularity block"),
        ("t5", {"routing": "straight-through"}, "has no --routing straight-through"),
        ("gpt2", {}, "has no Conv1D layers"),
    ],
)
def test_runs_that_pefts_poly_cannot_hold(name, settings, says, folders, tmp_path):
    make_run(folders, tmp_path / "run", name, "mhr", "lora")
    change_json(tmp_path / "run" / "config.json", **settings)
    assert says in refused(tmp_path / "run", tmp_path / "out", format="peft-poly")


@pytest.mark.parametrize(
    "names, says",
    [
        ([*"abcde", "mu2"], "names 6 tasks, its routers have another number of them"),
        (["mu2"], "names 1 tasks, its routers have another number of them"),
        ([1, "mu2", None], "1 is no name of a task"),
        ([["mu2"] * 99, "mu2"], "is no name of a task"),
    ],
    ids=str,
)
def test_names_of_tasks_that_are_none(names, says, folders, tmp_path):
    """More or fewer names than the routers have tasks, or what is no name: one sentence that names tasks.json."""
    make_run(folders, tmp_path / "run", "t5", "poly", "lora")
    write_json(tmp_path / "run" / "tasks.json", {"tasks": names, "skills": []})
    said = refused(tmp_path / "run", tmp_path / "out", task="mu2")
    assert f"{tmp_path / 'run' / 'tasks.json'}" in said and says in said and "\n" not in said


@pytest.mark.parametrize("format", ["merged", "peft", "all", "peft-poly", "run"])
def test_a_limit_on_the_size_of_files(format, folders, tmp_path):
    """As on a full disk: one error that names the folder, which stays empty, and the same command then works."""
    make_run(folders, tmp_path / "run", "t5", "poly", "lora")
    source, out = tmp_path / "run", tmp_path / "out"
    if format == "run":
        source = run_export(source, tmp_path / "poly", "peft-poly")
    flags = dict(format=format, task="" if format in ("peft-poly", "run") else "mu")
    flags = dict(task="all") if format == "all" else flags
    before, kept = resource.getrlimit(resource.RLIMIT_FSIZE), sorted(p.name for p in tmp_path.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, before[1]))
    try:
        with pytest.raises(OSError, match="cannot be written") as failed:
            run_export(source, out, **flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert failed.value.filename == str(out) and not list(out.iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*kept, "out"])
    assert list(run_export(source, out, **flags).iterdir())


def test_full_runs_and_missing_peft(folders, tmp_path, monkeypatch):
    make_run(folders, tmp_path / "run", "t5", "mhr", "lora")
    with pytest.raises(UserError, match="is not empty"):
        run_export(tmp_path / "run", tmp_path / "run", task="mu")
    with pytest.raises(UserError, match="--output-dir is missing"):
        export.main({"checkpoint": "a"})
    with pytest.raises(UserError, match="--checkpoint is missing"):
        export.main({})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        run_export(tmp_path / "run", tmp_path / "file", task="mu")
    monkeypatch.setitem(sys.modules, "peft", None)
    for flags in ({"task": "mu"}, {"format": "peft-poly"}):
        assert "need the package peft: pip install" in refused(tmp_path / "run", tmp_path / "out", **flags)
    monkeypatch.undo()
    write_config(tmp_path / "run", train.Config(method="full", device="cpu"))
    assert "is a plain model folder already" in refused(tmp_path / "run", tmp_path / "out", format="merged")


# --- From the command line --------------------------------------------------------------------------------------------

SMALL = dict(rank=2, batch_size=4, steps=1, max_input=16, max_output=8, eval_examples=0, device="cpu")
FEW = dict(steps=1, eval_every=1, shots=1, batch_size=4, test_examples=1, device="cpu")


def exports_are(expected, few, name, tmp_path):
    """Each split's task has the expected logits, as PEFT and merged. expected: {(split, task): logits}."""
    batch = inputs(name)
    assert difference(*list(expected.values())[:2]) > 0.01
    for k, ((split, task), y) in enumerate(expected.items()):
        out = run_export(few, tmp_path / f"peft-{k}", task=task, split=split)
        theirs = peft.AutoPeftModelForSeq2SeqLM.from_pretrained(str(out))
        assert difference(plain_logits(theirs, batch), y) < NEAR
        out = run_export(few, tmp_path / f"merged-{k}", "merged", task=task, split=split)
        assert difference(plain_logits(AutoModelForSeq2SeqLM.from_pretrained(out), batch), y) < NEAR


@sweep(
    "method,adapter,variant",
    [
        ("mhr", "lora", "all"), ("mhr", "lora", "mu"), ("poly", "ia3", "z"), ("random", "lora", "all"),
        ("adapter-soup", "lora", "all"), ("lora", "lora", "all"), ("full", "lora", "lora"),
    ],
    lambda *case: case[0] not in ("random", "lora"),
)  # fmt: skip
def test_tasks_of_an_adaptation_run(method, adapter, variant, folders, tmp_path):
    """Every split and task of an adaptation run is exported without its data, which are not there."""
    if method == "full":
        base = train.Config(method="full", rank=RANK, device="cpu", backbone="t5")
        shutil.copytree(folders / "t5", tmp_path / "run" / "backbone")
        write_config(tmp_path / "run", base)
    else:
        make_run(folders, tmp_path / "run", "t5", method, adapter)
    few = tmp_path / "few"
    run = adapt.Config(checkpoint=str(tmp_path / "run"), variant=variant, split=("0", "1"), device="cpu")
    base, expected = adapt.base_config(run), {}
    for split, task in (("0", "a.b"), ("1", "ζ c")):
        model, _ = load_run(tmp_path / "run", base)
        if method == "adapter-soup":  # its start needs the tasks' examples
            collapse(model, adapter, lambda layer: None)
        else:
            adapt.prepare(model, base, run)
        torch.manual_seed(len(expected))
        randomise(model)
        expected[split, task] = logits(model.eval(), inputs("t5"), [0] * 4)
        (few / split).mkdir(parents=True, exist_ok=True)
        save_adapters(model, str(few / split / f"{task}.safetensors"))
    write_config(few, run)
    exports_are(expected, few, "t5", tmp_path)
    out = run_export(few, tmp_path / "all", task="all", split="1")
    assert read(out / "index.json")["tasks"] == {"ζ c": "ζ c"} and read(out / "index.json")["variant"] == variant
    assert contents(out / "ζ c") == contents(tmp_path / "peft-1")
    out = tmp_path / "out"
    assert "--split is missing" in refused(few, out, task="a.b")
    assert "--split is missing" in refused(few, out, task="all")
    assert "--split 2: " in refused(few, out, task="a.b", split="2")
    assert "--task mu is no task" in refused(few, out, task="mu", split="0")
    assert refused(few, out, split="1").endswith("--task is missing: choose from all, ζ c")
    assert "is one of adapt.py" in refused(few, out, format="peft-poly")


def test_pretraining_and_adaptation(tmp_path):
    """Real runs on the bundled backbone: a task of adapt.py's, an imported run that goes on as the run that it was."""
    train.main(SMALL | dict(method="mhr", heads=4, dataset="strings", output_dir=str(tmp_path / "run")))
    poly = run_export(tmp_path / "run", tmp_path / "poly", "peft-poly")
    back = run_export(poly, tmp_path / "back", "run")
    task = benchmarks.load("strings").test[0].name
    results = []
    for run in (tmp_path / "run", back):
        results.append(adapt.main(FEW | dict(checkpoint=str(run), tasks=task, output_dir=f"{run}-few")))
        train.main(dict(from_run=str(run), method="mu", steps=1, output_dir=f"{run}-mu", device="cpu"))
    assert results[0]["splits"] == results[1]["splits"]
    few = tmp_path / "back-few"
    path = few / "0" / f"{task}.safetensors"
    saved, metadata = read_tensors(str(path))
    write_tensors({key: p + 0.1 * torch.randn_like(p) for key, p in saved.items()}, path, backbone=metadata["backbone"])
    (_, _, model, _, _), *_ = evaluate.load_adapted(read_config(adapt.Config, few / "config.json"), few)
    out = run_export(few, tmp_path / "peft", task=task)
    theirs, batch = peft.AutoPeftModelForSeq2SeqLM.from_pretrained(str(out)), inputs("t5")
    y = logits(model.eval(), batch, [0] * 4)
    assert difference(plain_logits(theirs, batch), y) < NEAR
    assert difference(plain_logits(load_backbone("tiny", "cpu")[0], batch), y) > 0.01


# --- Files that are not what they seem --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [5, {}, {"a": 1}, ["tiny"], True, "a\0b", None, ""], ids=repr)
def test_a_backbone_that_is_no_name(name, folders, tmp_path):
    """PEFT's Poly whose config names as its backbone what no backbone is called: one sentence, nothing is written."""
    make_run(folders, tmp_path / "run", "t5", "poly", "lora")
    poly = run_export(tmp_path / "run", tmp_path / "poly", "peft-poly")
    (poly / "run.json").unlink()
    change_json(poly / "adapter_config.json", base_model_name_or_path=name)
    said = refused(poly, tmp_path / "out", format="run", dataset="strings")
    assert "base_model_name_or_path" in said or "--backbone" in said


def test_an_export_without_memory_is_one_sentence(folders, tmp_path, monkeypatch):
    """What torch says on a CPU that is full; there is nothing to --resume, and no folder is left."""

    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    make_run(folders, tmp_path / "run", "t5", "poly", "lora")
    monkeypatch.setattr(export, "load_run", full)
    with pytest.raises(RunError, match="^there is not enough memory: try a machine that has more") as failed:
        run_export(tmp_path / "run", tmp_path / "out", task="mu")
    assert "--resume" not in str(failed.value) and not (tmp_path / "out").exists()


# --- The authors' LoRA and (IA)^3 -------------------------------------------------------------------------------------


def authors_one(path, folders, kind: str, turned: bool = False, **hyper):
    """A checkpoint of the authors' with one adapter for all tasks, in their layout: its state_dict."""
    hyper = HYPER | {"model": str(folders / "t5"), "model_modifier": kind} | hyper
    state, g = {}, torch.Generator().manual_seed(0)
    layers = r".*(SelfAttention|EncDecAttention|DenseReluDense)\.(k|v|wi_1)"
    for layer, module in backbone("t5").named_modules():
        if re.fullmatch(layers, layer):
            o, i = module.weight.shape
            if kind == "ia3":
                state[f"model.{layer}.multi_lora_b"] = 1 + 0.3 * torch.randn(o, generator=g)
                continue
            A, B = 0.3 * torch.randn(i, 2, generator=g), 0.3 * torch.randn(2, o, generator=g)
            state |= {f"model.{layer}.lora_a": A.T if turned else A, f"model.{layer}.lora_b": B.T if turned else B}
    torch.save({"state_dict": state, "hyper_parameters": hyper, "pytorch-lightning_version": "2.0.2"}, path)
    return state


@pytest.mark.parametrize("kind, turned, alpha", [("lora", False, 1.0), ("lora", True, 2.0), ("ia3", False, 1.0)])
def test_authors_file_with_one_adapter(tmp_path, folders, kind, turned, alpha):
    """The run computes what a naive reading of the file does; it can be adapted and exported like one of ours."""
    state = authors_one(tmp_path / "one.ckpt", folders, kind, turned, lora_alpha=alpha)
    run = tmp_path / "run"
    export.main(dict(checkpoint=str(tmp_path / "one.ckpt"), format="run", output_dir=str(run)))
    base = export.held_whole(train.run_config(str(run), device="cpu"))  # T0's recipe has bf16
    assert (base.method, base.adapter, base.dataset) == (kind, kind, "t0")
    model, _ = load_run(run, base)
    naive = backbone("t5")
    with torch.no_grad():
        for name, tensor in state.items():
            layer = naive.get_submodule(name.removeprefix("model.").rpartition(".")[0])
            if name.endswith("multi_lora_b"):
                layer.weight.mul_(tensor[:, None])
            elif name.endswith("lora_a"):
                A, B = tensor, state[name.replace("lora_a", "lora_b")]
                layer.weight.add_((B @ A if turned else (A @ B).T) * alpha / 2)
        batch = inputs("t5")
        assert (model.eval()(**batch).logits - naive(**batch).logits).abs().max() < 1e-4
    export.main(dict(checkpoint=str(run), format="merged", output_dir=str(tmp_path / "merged")))


def test_a_damaged_file_with_one_adapter(tmp_path, folders):
    state = authors_one(tmp_path / "one.ckpt", folders, "lora")
    content = torch.load(tmp_path / "one.ckpt", weights_only=True)
    first = next(iter(state))
    for name, change, says in (
        ("odd", {first.replace("lora_a", "lora_c"): torch.zeros(2)}, "lora_c is no part of its adapters"),
        ("axes", {first: torch.zeros(2)}, "has no lora_a of 2 axes"),
        ("shape", {first: torch.zeros(3, 2)}, r"A of layer .* and should be"),
        ("nan", {first: torch.full_like(state[first], torch.nan)}, "holds numbers that are not finite"),
    ):
        torch.save(content | {"state_dict": state | change}, tmp_path / "bad.ckpt")
        with pytest.raises(UserError, match=says):
            export.main(dict(checkpoint=str(tmp_path / "bad.ckpt"), format="run", output_dir=str(tmp_path / name)))
