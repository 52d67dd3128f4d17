"""The memory of a training step: what is computed without weights is what a real step takes."""

import json
from pathlib import Path

import pytest
import torch

import train
from inject import task_ids
from methods import add_adapters, use_checkpointing
from plumbing.backbones import TINY
from plumbing.errors import UserError
from tests.helpers import small_config
from tests.stress.kills import small_backbone
from tools import estimate_memory
from tools.count_parameters import meta_backbone

FULL, LORA, MHR = dict(method="full"), dict(method="lora"), dict(method="mhr", heads=2, layers="attention")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    """A T5 with one layer of each kind."""
    return small_backbone(tmp_path_factory.mktemp("backbone"))


def test_peak_is_what_lives_at_once():
    """Freed tensors count no more, views and tensors changed in place count once, earlier tensors not at all."""
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


@pytest.mark.parametrize(
    "kind, settings, checkpointing",
    [
        ("t5", FULL, False), ("t5", MHR, True), ("llama", LORA, False), ("llama", FULL, True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (
            ("t5", FULL, True), ("t5", LORA, False), ("t5", LORA, True), ("t5", MHR, False),
            ("llama", FULL, False), ("llama", LORA, True), ("llama", MHR, False), ("llama", MHR, True),
        )),
    ],
)  # fmt: skip
def test_a_fake_step_takes_what_a_real_one_takes(tmp_path, kind, settings, checkpointing):
    """Same model, same batch, with weights: the same bytes but for a percent (kernels differ in small buffers)."""
    small_config(kind).save_pretrained(tmp_path)
    size, lengths = 6, (24, 8)
    precision, dtype = ("fp32", torch.float32) if settings == FULL else ("bf16", torch.bfloat16)
    real = meta_backbone(str(tmp_path), "cpu", dtype)
    if settings != FULL:
        add_adapters(real, train.Config(**settings), 50)
    if checkpointing:
        use_checkpointing(real)
    batch = estimate_memory.fake_batch(real.config.is_encoder_decoder, size, *lengths)
    batch["attention_mask"][0, -1] = 0  # a mask of ones alone is left out, which a fake one cannot be
    with task_ids(range(size)):
        step = estimate_memory.step_memory(real.train(), batch)
    options = dict(precision=precision) | settings
    sizes = estimate_memory.training_memory(str(tmp_path), size, lengths, 50, checkpointing, **options)
    assert sizes["step"] == pytest.approx(step, rel=0.01)
    assert sizes["backbone"] + sizes["adapters"] == sum(p.numel() * p.element_size() for p in real.parameters())
    assert sizes["AdamW"] == 8 * sum(p.numel() for p in real.parameters() if p.requires_grad)


def test_checkpointing_saves_memory():
    """With three layers of each kind."""
    plain, saving = (
        estimate_memory.training_memory(str(TINY), 8, (64, 64), 8, checkpointing, method="lora")["step"]
        for checkpointing in (False, True)
    )
    assert saving < plain / 2


def test_the_command(monkeypatch, capsys, small):
    """A line for each method; 64 heads do not divide this small model."""
    monkeypatch.setattr(estimate_memory, "SHOWN", ("full", "MHR, 64 heads"))
    estimate_memory.main(dict(backbone=small, batch_size=2, max_input=8, max_output=4))
    head, full, mhr = capsys.readouterr().out.splitlines()
    assert head.split()[:5] == ["GB", "backbone", "adapters", "AdamW", "step"]
    assert full.split() == ["full", *["0.0"] * 7] and mhr.split() == ["MHR,", "64", "heads", *["-"] * 7]


@pytest.mark.parametrize("size, lengths", [(2**31 - 1, (1, 1)), (1, (2**31 - 1, 1)), (100_000, (64, 64))])
def test_a_batch_that_fits_nowhere_is_refused(small, size, lengths):
    """At once, in a sentence with the flags that make it."""
    flags = f"--batch-size {size} --max-input {lengths[0]} --max-output {lengths[1]}"
    with pytest.raises(UserError, match=f"^{flags} is a batch of {size * sum(lengths):,} tokens, .*10,000,000"):
        estimate_memory.table(small, size, lengths, 8)


def test_the_largest_inputs_and_the_most_tasks(small):
    """A million tokens an example and 2^31 - 1 tasks have a size but no content: nothing of that size is built."""
    sizes = estimate_memory.training_memory(small, 10, (999_000, 1_000), 2**31 - 1, method="poly")
    assert sizes["step"] > 2**31 and sizes["adapters"] > 2**31


def test_a_backbone_that_takes_no_step(tmp_path):
    """A config without the token that outputs begin with: one sentence. Counting its parameters needs no such token."""
    settings = small_config("t5").to_dict()
    del settings["decoder_start_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=f"--backbone {tmp_path}: .*decoder_start_token_id") as refused:
        estimate_memory.table(str(tmp_path), 2, (8, 4), 8)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_the_table_of_the_benchmarks_page(monkeypatch):
    """Its head and its line for LoRA, one of the fastest to compute."""
    monkeypatch.setattr(estimate_memory, "SHOWN", ("LoRA",))
    head, line = estimate_memory.table("t5-xl", 16, (256, 256), 313)
    page = (Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text()
    assert f"| {' | '.join(head[:6])} | step with `--checkpointing` | {head[7]} |" in page
    assert f"| {' | '.join(line)} |" in page
