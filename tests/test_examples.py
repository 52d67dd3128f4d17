"""examples/: own_model.py prints its story; hf_trainer.py trains at two rates, resumes and saves little; and what makes
a Trainer of transformers work as it is, `inject.accept_task_ids`."""

import ast
import copy
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import transformers

from examples import hf_trainer
from inject import accept_task_ids, adapter_parameters, merge, read_tensors, routers, task_ids, unmerge
from tests.helpers import IDS, NAMES, adapted, difference, gradients, inputs, logits

ROOT = Path(__file__).resolve().parents[1]


def test_your_own_model():
    """Losses are small, four tasks in a batch give four answers, and the model merged for a task gives that task's."""
    done = subprocess.run([sys.executable, "-m", "examples.own_model"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    three, new = re.findall(r"loss after \d+ steps: ([\d.]+)", done.stdout)
    assert float(three) < 0.1 and float(new) < 0.5
    answers = re.search(r"^head, under tasks 0 to 3: (.*)$", done.stdout, re.M)[1].split()
    assert answers[:3] == ["daeh", "HEAD", "adeh"]
    assert answers[3][:2] == "DA"  # both: neither skill alone begins so
    assert re.search(r"^head, merged for task 3: +(.*)$", done.stdout, re.M)[1] == answers[3]


@pytest.mark.parametrize("name, most", [("own_model", 50), ("hf_trainer", 55)])
def test_the_examples_are_short(name, most):
    """Lines of code: neither blank, nor a comment, nor of a docstring."""
    source = (ROOT / "examples" / f"{name}.py").read_text()
    texts = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Expr) and type(n.value) is ast.Constant]
    of_texts = {number for node in texts for number in range(node.lineno, node.end_lineno + 1)}
    lines = [line.strip() for number, line in enumerate(source.splitlines(), 1) if number not in of_texts]
    assert sum(line != "" and not line.startswith("#") for line in lines) <= most


# --- The Trainer of transformers --------------------------------------------------------------------------------------


class Interrupted(transformers.TrainerCallback):
    """Ctrl-C in step 6."""

    def on_step_begin(self, args, state, control, **more):
        if state.global_step == 5:
            raise KeyboardInterrupt


class Rates(transformers.TrainerCallback):
    """Notes the learning rates of each step."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, optimizer=None, **more):
        self.seen.append([group["lr"] for group in optimizer.param_groups])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(an uninterrupted run of 8 steps, with a checkpoint every 2; its folder; its adapters before; its rates)."""
    folder = tmp_path_factory.mktemp("whole")
    trainer, rates = hf_trainer.make_trainer(str(folder), steps=8), Rates()
    before = {name: p.detach().clone() for name, p in adapter_parameters(trainer.model).items()}
    trainer.add_callback(rates)
    trainer.train()
    return trainer, folder, before, rates.seen


def test_a_resumed_trainer_ends_as_an_uninterrupted_one(whole, tmp_path):
    """To the bit, by a new process's steps: another model, another optimiser, the checkpoint after step 4."""
    trainer = hf_trainer.make_trainer(str(tmp_path), steps=8)
    trainer.add_callback(Interrupted())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    resumed = hf_trainer.make_trainer(str(tmp_path), steps=8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 8
    got, cut = adapter_parameters(resumed.model), adapter_parameters(trainer.model)
    for name, p in adapter_parameters(whole[0].model).items():
        assert torch.equal(got[name], p), name
        assert not torch.equal(cut[name], p), name  # three steps did change something


def test_the_script_resumes_by_itself(tmp_path, capsys):
    """Started anew after its last step it trains nothing, and says the same."""
    for _ in range(2):
        hf_trainer.main(str(tmp_path), steps=4)
    first, second = re.findall(r"^loss on new words: ([\d.]+)$", capsys.readouterr().out, re.M)
    assert first == second
    hf_trainer.main(str(tmp_path), steps=8)  # more steps: it goes on
    assert re.findall(r"^loss on new words: ([\d.]+)$", capsys.readouterr().out, re.M) != [first]
    assert (tmp_path / "checkpoint-8").is_dir()


def test_a_checkpoint_holds_adapters_alone(whole):
    trainer, folder, _, _ = whole
    last = folder / "checkpoint-8"
    assert not list(last.glob("model*")) and not list(last.glob("pytorch_model*"))
    saved = read_tensors(str(last / "adapter.safetensors"))[0]
    own = adapter_parameters(trainer.model)
    assert saved.keys() == own.keys() and all(torch.equal(saved[name], p) for name, p in own.items())
    numbers = sum(p.numel() for p in own.values())
    assert (last / "adapter.safetensors").stat().st_size < 4 * numbers + 50_000


def test_both_rates_are_used(whole):
    """Ten times as high for Z, at every step of the schedule; and Adam's first steps are about as large as the rate.

    Z has no gradient in step 1, where B is zero: 1e-1 * 7/8 in step 2, times 0.74 for Adam's averages.
    """
    _, folder, before, seen = whole
    assert len(seen) == 8 and all(fast == pytest.approx(10 * slow) for slow, fast in seen)
    after = read_tensors(str(folder / "checkpoint-2" / "adapter.safetensors"))[0]
    moved = {name: (after[name] - p).abs().max().item() for name, p in before.items()}
    assert max(x for name, x in moved.items() if name.endswith(".Z")) == pytest.approx(0.065, rel=0.02)
    assert max(x for name, x in moved.items() if name.endswith(".B")) < 0.02


def test_a_trainer_evaluates_and_takes_its_best_model(whole):
    trainer, folder, _, _ = whole
    loss = trainer.evaluate()["eval_loss"]
    batch = trainer.data_collator([dict(row) for row in trainer.eval_dataset])
    with torch.no_grad(), task_ids(batch.pop("task_ids")):
        assert trainer.model.eval()(**batch).loss.item() == pytest.approx(loss, rel=1e-4)
    last = copy.deepcopy(adapter_parameters(trainer.model))
    trainer.state.best_model_checkpoint = str(folder / "checkpoint-2")
    trainer._load_best_model()
    assert any(not torch.equal(p, last[name]) for name, p in adapter_parameters(trainer.model).items())
    trainer._load_from_checkpoint(str(folder / "checkpoint-8"))


def test_generation_in_evaluation(tmp_path):
    """Seq2SeqTrainer hands all columns to `generate`: each example is generated under its own task."""
    model, batch = adapted("t5", "mhr", "lora"), inputs("t5")
    with task_ids(IDS):
        expected = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=5)
    accept_task_ids(model)
    rows = [{name: x[k] for name, x in batch.items()} | {"task_ids": IDS[k]} for k in range(4)]
    settings = transformers.Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), predict_with_generate=True, remove_unused_columns=False, use_cpu=True, report_to=[],
        disable_tqdm=True,
    )  # fmt: skip
    made = transformers.Seq2SeqTrainer(model=model, args=settings).predict(rows, max_new_tokens=5).predictions
    assert torch.equal(torch.as_tensor(made)[:, :6], expected)  # it pads to a length of its own


# --- accept_task_ids --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_task_ids_in_the_call_are_those_of_a_context(name):
    """Logits, generation with beams, and gradients also under checkpointing, backward outside; of a copy, too."""
    plain, batch, ids = adapted(name, "mhr", "lora"), inputs(name), torch.tensor(IDS)
    model = copy.deepcopy(plain)
    accept_task_ids(model)
    model = copy.deepcopy(model)
    assert type(model).__name__ == type(plain).__name__ and isinstance(model, type(plain))
    expected = logits(plain, batch, IDS)
    assert torch.equal(model(**batch, task_ids=ids).logits, expected)
    assert torch.equal(logits(model, batch, IDS), expected)  # the context still counts
    assert not torch.equal(model(**batch, task_ids=IDS[::-1]).logits, expected)
    with task_ids([2] * 4):
        assert torch.equal(model(**batch, task_ids=ids).logits, expected)  # the inner one
    options = dict(attention_mask=batch["attention_mask"], num_beams=2, num_return_sequences=2, max_new_tokens=4)
    with task_ids(IDS):
        texts = plain.generate(batch["input_ids"], **options)
    assert torch.equal(model.generate(batch["input_ids"], **options, task_ids=ids), texts)

    expected = gradients(plain, batch, IDS)
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for router in routers(model):
        router.eval()  # no noise
    model(**batch, task_ids=ids, use_cache=False).loss.backward()
    for key, g in expected.items():
        assert difference(model.get_parameter(key).grad, g) < 1e-5, key


def test_wrong_and_missing_ids_in_the_call():
    """The sentences are those of the context, and nothing is left of a call that failed."""
    model, batch = adapted("llama", "poly", "lora"), inputs("llama")
    accept_task_ids(model)
    for wrong in (["boolq"] * 4, 3, [0.0] * 4, [[0], [1], [2], [3]], []):
        with pytest.raises(ValueError, match="task ids must be a flat list of integers, one for each example, not "):
            model(**batch, task_ids=wrong)
    with pytest.raises(ValueError, match="3 task ids for a batch of 4 rows"):
        model(**batch, task_ids=[0, 1, 2])
    with pytest.raises(IndexError, match="task id 9 is out of range"):
        model(**batch, task_ids=[0, 1, 2, 9])
    for call in (lambda: model(**batch), lambda: model.generate(batch["input_ids"])):
        with pytest.raises(RuntimeError, match="with task_ids"):
            call()


def test_interrupted_calls_leave_no_ids():
    """Ctrl-C is no Exception: a hook that is always called would miss it."""
    model, batch = adapted("llama", "poly", "lora"), inputs("llama")
    accept_task_ids(model)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**batch, task_ids=IDS)
    hook.remove()
    with pytest.raises(RuntimeError, match="with task_ids"):
        model(**batch)


def test_threads_have_ids_of_their_own():
    model, batch = adapted("llama", "poly", "lora"), inputs("llama")
    several = [[k] * 4 for k in range(4)]
    expected = [logits(model, batch, ids) for ids in several]
    accept_task_ids(model)
    got, barrier = {}, threading.Barrier(4)

    @torch.no_grad()
    def serve(k: int):
        barrier.wait()
        got[k] = [model(**batch, task_ids=several[k]).logits for _ in range(5)]

    threads = [threading.Thread(target=serve, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(y, expected[k]) for k in range(4) for y in got[k])


def test_a_compiled_or_merged_model_that_takes_ids(tmp_path):
    model, batch = adapted("llama", "mhr", "lora"), inputs("llama")
    several = (IDS, [1] * 4, [0, 3, 0, 2])
    expected = [logits(model, batch, ids) for ids in several]
    accept_task_ids(model)
    with torch.no_grad():
        graph = torch.compile(model, backend="eager")
        for ids, want in zip(several, expected, strict=True):
            torch.testing.assert_close(graph(**batch, task_ids=torch.tensor(ids)).logits, want)
        layers = merge(model, 1)
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        torch.testing.assert_close(again(**batch).logits, expected[1])
        unmerge(model, layers)
        assert torch.equal(model(**batch, task_ids=IDS).logits, expected[0])
