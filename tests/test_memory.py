"""The memory of a training step: what is computed without weights is what a real step takes."""

import json
import re
from pathlib import Path

import pytest
import torch

import evaluate
from methods import use_checkpointing
from tools import estimate_memory

import train
from methods import add_adapters
from plumbing.backbones import TINY
from plumbing.errors import UserError
from tools.count_parameters import meta_backbone
from inject import task_ids
from tests.helpers import small_config


def test_peak_is_what_lives_at_once():
    """Freed tensors count no more, views and what is changed in place count once, what was there before not at all."""
    before = torch.zeros(1000)
    with estimate_memory.Peak() as peak:
        a = torch.zeros(1000)  # 4,000 bytes
        a = a + before  # two such for a moment
        a.view(10, 100).add_(1)
        before.mul_(2)
        b = a[:10].clone()  # 40 bytes
    assert (peak.peak, peak.now) == (8000, 4040)
    del a, b
    assert peak.now == 0


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize(
    "settings", [dict(method="full"), dict(method="lora"), dict(method="mhr", heads=2, layers="attention")], ids=str
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fake_step_is_the_real_one(kind, settings, checkpointing, tmp_path):
    """Same model, same batch, with weights: the same bytes but for a percent (kernels differ in small buffers)."""
    small_config(kind).save_pretrained(tmp_path)
    size, lengths = 6, (24, 8)
    precision, dtype = ("fp32", torch.float32) if settings["method"] == "full" else ("bf16", torch.bfloat16)
    real = meta_backbone(str(tmp_path), "cpu", dtype)
    if settings["method"] != "full":
        add_adapters(real, train.Config(**settings), 50)
    if checkpointing:
        use_checkpointing(real)
    batch = estimate_memory.fake_batch(real.config.is_encoder_decoder, size, *lengths)
    batch["attention_mask"][0, -1] = 0  # a mask of ones alone is left out, which a fake one cannot be
    with task_ids(range(size)):
        step = estimate_memory.step_memory(real.train(), batch)
    found = estimate_memory.training_memory(str(tmp_path), size, lengths, 50, checkpointing, precision=precision, **settings)
    assert found["step"] == pytest.approx(step, rel=0.01)
    assert found["backbone"] + found["adapters"] == sum(p.numel() * p.element_size() for p in real.parameters())
    assert found["AdamW"] == 8 * sum(p.numel() for p in real.parameters() if p.requires_grad)


def test_checkpointing_saves_memory():
    plain, saving = (estimate_memory.training_memory(str(TINY), 8, (64, 64), 8, c, method="lora")["step"] for c in (False, True))
    assert saving < plain / 2


def test_command(capsys):
    evaluate.main(dict(memory=2, backbone=str(TINY), max_input=8, max_output=4))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:5] == ["GB", "backbone", "adapters", "AdamW", "step"]
    assert [line.split("  ")[0] for line in lines[1:]] == list(estimate_memory.SHOWN)
    assert all(cell == "0.0" for cell in lines[1].split()[1:])  # a small model


@pytest.mark.parametrize("size, lengths", [(2**31 - 1, (1, 1)), (1, (2**31 - 1, 1)), (100_000, (64, 64))])
def test_a_batch_that_fits_nowhere_is_refused(size, lengths):
    """At once, in a sentence with the flags that make it."""
    tokens = f"--memory {size} --max-input {lengths[0]} --max-output {lengths[1]} is a batch of {size * sum(lengths):,}"
    with pytest.raises(UserError, match=f"^{tokens} tokens, .*10,000,000"):
        estimate_memory.table(str(TINY), size, lengths, 8)


def test_the_largest_inputs_and_the_most_tasks():
    """A million tokens an example and 2^31 - 1 tasks have sizes and no content: they are computed, not made."""
    found = estimate_memory.training_memory(str(TINY), 10, (999_000, 1_000), 2**31 - 1, method="poly")
    assert found["step"] > found["backbone"] and found["adapters"] > 2**31


def test_a_backbone_that_takes_no_step(tmp_path):
    """A config without the token that outputs begin with: one sentence, where the count of parameters needs none."""
    settings = small_config("t5").to_dict()
    del settings["decoder_start_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=f"--backbone {tmp_path}: .*decoder_start_token_id") as refused:
        estimate_memory.table(str(tmp_path), 2, (8, 4), 8)
    assert "\n" not in str(refused.value)


def test_readme_has_what_is_computed(monkeypatch):
    """One line of the table for T5-XL, which README.md sums up."""
    monkeypatch.setattr(estimate_memory, "SHOWN", ["MHR, 64 heads"])
    head, line = estimate_memory.table("t5-xl", 16, (256, 256), 313)
    readme = (Path(__file__).parents[1] / "benchmarks" / "README.md").read_text()
    assert f"| {' | '.join(line)} |" in readme and f"| {' | '.join(head[:6])} | step with" in readme
    rows = [[float(x) for x in row.split("|")[2:-1]] for row in re.findall(r"^\|.* \|$", readme, re.M)[-5:]]
    low, high = min(row[-1] for row in rows), max(row[-1] for row in rows)
    without = [row[4] for row in rows]
    says = f"needs {low:.0f} to {high:.0f} GB with any of these adapters on T5-XL with `--checkpointing` "
    says += f"({min(without):.0f} to {max(without):.0f} without)"
    assert says in " ".join((Path(__file__).parents[1] / "README.md").read_text().split())
