"""What the tests share: tiny random models, adapters in them under which tasks really differ, and files of runs."""

import copy
import hashlib
import json
import zlib
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.path import Path as Outline
from matplotlib.text import Text
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BartConfig, BartForConditionalGeneration, ByT5Tokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM,
    T5Config, T5ForConditionalGeneration,
)  # fmt: skip

import train
from benchmarks.metrics import METRICS
from inject import adapter_parameters, freeze, inject, task_ids
from layers import named_layers
from methods import SINGLE as ONE_LAYER
from methods import make_adapter, make_router, routed_layer
from plumbing.backbones import tiny_from_scratch
from recipes import ONE_ADAPTER
from tools import figures

NAMES = ("t5", "bart", "llama", "gpt2")
VOCAB, WIDTH = 100, 32
TASKS, SKILLS, HEADS, RANK = 5, 3, 4, 4
IDS = [3, 0, 4, 1]  # the tasks of a batch of four: all different, out of order, and task 2 is absent

# (method, adapter); random-by-task is `--method random --random-by task`. All of them on T5, some on the others.
SINGLE = (("lora", "lora"), ("ia3", "ia3"), ("shared", "sft"))  # one adapter for all tasks
POLY_MHR = tuple((method, adapter) for method in ("poly", "mhr") for adapter in ("lora", "ia3", "sft"))
GIVEN = tuple((method, "lora") for method in ("private", "adapter-soup", "expert", "random-by-task", "random"))
LEARNED = (*POLY_MHR, ("hyperformer", "lora"), ("task-moe", "lora"))  # with a Z that is trained
ROUTED = (*LEARNED, *GIVEN)
ELSEWHERE = {*SINGLE, *POLY_MHR, ("random", "lora")}  # random: the one router that is asked for each example
QUICK = {  # (model, method, adapter) of a quick run: each kind of router and adapter on T5, some pairs on the others
    *(("t5", *kind) for kind in (*SINGLE, *LEARNED, ("private", "lora"), ("expert", "lora"), ("random", "lora"))),
    ("bart", "lora", "lora"), ("bart", "poly", "ia3"), ("bart", "mhr", "sft"),
    ("llama", "shared", "sft"), ("llama", "mhr", "lora"), ("llama", "poly", "sft"),
    ("gpt2", "ia3", "ia3"), ("gpt2", "poly", "lora"), ("gpt2", "mhr", "ia3"), ("gpt2", "random", "lora"),
}  # fmt: skip
TABLES = {  # of the TASKS tasks
    "private": torch.eye(TASKS),
    "adapter-soup": torch.eye(TASKS),
    "expert": torch.tensor([[1.0, 1, 0], [0, 1, 0], [0, 1, 1], [1, 1, 1], [0, 0, 1]]),
}


def grid(kinds) -> list[tuple[str, str, str]]:
    """(name, method, adapter) for each model and those of the kinds that are tried on it."""
    return [(name, *kind) for name in NAMES for kind in kinds if name == "t5" or kind in ELSEWHERE]


def sweep(names: str, cases, quick):
    """Parametrize a test over all cases; those for which quick(*case) is false are marked slow."""
    marks = lambda case: () if quick(*case) else pytest.mark.slow  # noqa: E731
    return pytest.mark.parametrize(names, [pytest.param(*case, marks=marks(case)) for case in cases])


def small_config(name: str):
    """Two layers of width 32 without dropout. Where a family allows it inner widths differ, so that i is not o."""
    if name == "t5":  # v1.1: a gated feed-forward layer, and an lm_head of its own
        return T5Config(
            vocab_size=VOCAB, d_model=WIDTH, d_kv=12, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
            decoder_start_token_id=0,
        )  # fmt: skip
    if name == "bart":
        return BartConfig(
            vocab_size=VOCAB, d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, dropout=0.0,
            attention_dropout=0.0, activation_dropout=0.0, bos_token_id=0, pad_token_id=1, eos_token_id=2,
            decoder_start_token_id=2, forced_eos_token_id=None,
        )  # fmt: skip
    if name == "llama":
        return LlamaConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, attention_dropout=0.0, pad_token_id=0, bos_token_id=1,
            eos_token_id=2,
        )  # fmt: skip
    return GPT2Config(
        vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


CLASSES = {
    "t5": T5ForConditionalGeneration,
    "bart": BartForConditionalGeneration,
    "llama": LlamaForCausalLM,
    "gpt2": GPT2LMHeadModel,
}


@cache
def _backbone(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = CLASSES[name](small_config(name))
    with torch.no_grad():  # the initial values of a real model are so small that every input gives the same output
        for parameter, p in model.named_parameters():
            p.normal_(0, 0.25) if p.dim() > 1 else p.add_(0.1 * torch.randn_like(p))
            if name == "t5" and parameter.endswith(".q.weight"):
                p.mul_(model.config.d_kv**-0.5)  # T5 does not divide its attention scores
    return model.eval()


def backbone(name: str, seed: int = 0) -> nn.Module:
    """A fresh model in evaluation mode; the same name and seed give the same weights."""
    return copy.deepcopy(_backbone(name, seed))


def layers_of(adapter: str, name: str) -> str:
    """The pattern of the layers that an adapter changes by default."""
    return named_layers("ia3" if adapter == "ia3" else "lora", name)


def layer_maker(method, adapter, tasks=TASKS, router=None, **settings):
    """make_layer for `inject`, as `methods.add_adapters` has it. router: one for all layers; None: one for each.

    settings: of `train.Config`. With other `tasks` than TASKS there is no table yet, as before a file is loaded.
    """
    table = TABLES.get(method)
    small = dict(rank=RANK, skills=SKILLS if table is None else table.shape[1], heads=HEADS, density=0.2)
    by = dict(method="random", random_by="task") if method == "random-by-task" else dict(method=method)
    cfg = train.Config(**by | dict(adapter=adapter) | small | settings)

    def make_layer(name: str, linear: nn.Linear) -> nn.Module:
        spec = make_adapter(cfg, name)
        if method in ONE_ADAPTER:
            return ONE_LAYER[adapter](linear, spec)
        own = router or make_router(cfg, tasks, table if tasks == TASKS else None)
        return routed_layer(method, adapter)(linear, spec, own)

    return make_layer


def adapted(name: str, method: str, adapter: str, seed: int = 0, fresh: bool = False, layers=None, **settings):
    """A frozen backbone with adapters, in evaluation mode. fresh: as they start; else with values that matter.

    seed: of the adapters; the backbone is always the same one.
    """
    model = backbone(name)
    freeze(model)
    torch.manual_seed(seed)
    inject(model, layer_maker(method, adapter, **settings), layers or layers_of(adapter, name))
    if not fresh:
        randomise(model)
    return model.eval()


@torch.no_grad()
def randomise(model: nn.Module):
    """Skills far from zero, and logits so far apart that tasks choose different skills. What is given stays."""
    spread = {"A": 0.2, "B": 0.6, "v": 0.6, "value": 0.3, "Z": 3.0, "weight": 0.05, "bias": 0.05}
    for name, p in adapter_parameters(model).items():
        if p.requires_grad:
            leaf = name.rsplit(".", 1)[1]
            p.normal_(0.5 if leaf == "bias" else 0.0, spread[leaf])  # HyperFormer's hidden units are on, about 1/2 each


def inputs(name: str, b: int = 4, length: int = 7, seed: int = 1) -> dict[str, torch.Tensor]:
    """A batch without padding: input_ids, attention_mask and labels."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(3, VOCAB, (b, length), generator=g)
    labels = torch.randint(3, VOCAB, (b, length - 2), generator=g) if name in ("t5", "bart") else x
    return {"input_ids": x, "attention_mask": torch.ones_like(x), "labels": labels}


def row(batch: dict[str, torch.Tensor], k: int) -> dict[str, torch.Tensor]:
    """Example k of a batch, as a batch of one."""
    return {name: value[k : k + 1] for name, value in batch.items()}


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, torch.Tensor], ids) -> torch.Tensor:
    """The model's logits for a batch whose examples belong to tasks ids."""
    with task_ids(ids):
        return model(**batch).logits


def gradients(model: nn.Module, batch: dict[str, torch.Tensor], ids, inside: bool = True) -> dict[str, torch.Tensor]:
    """The gradient of the loss for every trainable parameter. inside: take it within the context, not after it."""
    model.zero_grad()
    with task_ids(ids):
        loss = model(**batch, use_cache=False).loss
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def difference(x: torch.Tensor, y: torch.Tensor) -> float:
    """The largest difference, relative to the largest value of y."""
    return ((x - y).abs().max() / y.abs().max()).item()


# --- Runs -------------------------------------------------------------------------------------------------------------


def small_backbone(folder: Path, layers: int = 1, shift: float = 0.0) -> str:
    """The tiny backbone at an eighth of its width, with this many encoder and decoder layers, saved as a folder.

    shift: added to its embeddings; another shift is another backbone.
    """
    shape = tiny_from_scratch().config
    shape.d_model, shape.d_kv, shape.d_ff, shape.num_layers, shape.num_decoder_layers = 16, 4, 32, layers, layers
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(shape)
    with torch.no_grad():
        model.shared.weight += shift
    return save_as_backbone(model, folder)


def save_as_backbone(model: nn.Module, folder: Path) -> str:
    """Save a model with a tokenizer whose tokens are bytes; returns its name for --backbone."""
    model.save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return str(folder)


def fingerprint(predictions, references) -> float:
    """A score of 0 to 100 that changes whenever a prediction or a reference changes."""
    return zlib.crc32(repr((predictions, references)).encode()) % 10_000 / 100


@contextmanager
def fingerprints_as_metrics():
    """Every metric is `fingerprint`, so that scores are equal only if all predictions are. Yields the MonkeyPatch."""
    with pytest.MonkeyPatch.context() as patch:
        for metric in METRICS:
            patch.setitem(METRICS, metric, fingerprint)
        yield patch


def read(path: Path):
    """The content of a JSON file."""
    return json.loads(path.read_text())


def lines_of(path: Path) -> list[dict]:
    """The lines of a log."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def change_json(path: Path, **changes):
    """Change entries of a JSON file."""
    path.write_text(json.dumps(read(path) | changes))


def run_folder(path: Path, config: dict, **result) -> str:
    """A folder with this config.json, and a result.json if there are entries for it; returns its name."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    if result:
        (path / "result.json").write_text(json.dumps({"seconds": 12.4, "parameters": {"adapters": 1000}} | result))
    return str(path)


def contents(folder: Path) -> dict[str, str]:
    """A hash of every file under a folder, by its path there."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def same_tensors(a: Path, b: Path) -> bool:
    """Whether two safetensors files hold the same tensors, to the bit."""
    one, other = load_file(a), load_file(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- Runs -------------------------------------------------------------------------------------------------------------


class PowerCut(BaseException):
    """Ends a run at a chosen call, past all that handles exceptions."""


def log_lines(folder: Path) -> list[dict]:
    """The log of a run without the seconds, which no two runs share."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in log]


def same_run(folder: Path, reference: Path):
    """Two finished runs are the same: files, bits of what was trained, log, scored examples, result but for what is
    measured."""
    names, expected = ({str(p.relative_to(f)) for p in f.rglob("*")} for f in (folder, reference))
    assert names == expected
    for path in reference.rglob("*.safetensors"):
        assert (folder / path.relative_to(reference)).read_bytes() == path.read_bytes(), path
    assert log_lines(folder) == log_lines(reference)
    measured = dict.fromkeys(("seconds", "peak_memory_gb", "examples_per_second"), 0)
    results = [json.loads((f / "result.json").read_text()) | measured for f in (folder, reference)]
    assert results[0] == results[1]
    for path in reference.glob("*predictions.jsonl"):
        assert (folder / path.name).read_bytes() == path.read_bytes(), path


# --- Figures ----------------------------------------------------------------------------------------------------------


def drawn(monkeypatch, draw):
    """The figure that a function of tools/figures.py would save, laid out."""
    saved = []
    with monkeypatch.context() as patched:
        patched.setattr(figures, "save", lambda figure, stem: saved.append(figure))
        draw()
    saved[0].draw_without_rendering()
    return saved[0]


def numbers_of(axis) -> list:
    """The texts at an axis that are in view."""
    low, high = sorted(axis.get_view_interval())
    shown = [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [text for text in shown if text.get_text() and text.get_visible()]


def texts_of(figure) -> list:
    """All texts of a laid out figure that can be seen."""
    texts = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for ax in figure.axes:
        texts += [*ax.texts, ax.title, ax.xaxis.label, ax.yaxis.label, *numbers_of(ax.xaxis), *numbers_of(ax.yaxis)]
    return [text for text in texts if text.get_text().strip() and text.get_visible()]


def bars_of(ax) -> list[np.ndarray]:
    """The error bars that are drawn in a panel, in pixels: (2, 2), their ends."""
    bars = [collection for container in ax.containers for collection in container[2]]
    return [bar.get_transform().transform(ends) for bar in bars for ends in bar.get_segments()]


def boxes_of(texts: list) -> list:
    return [Text.get_window_extent(text) for text in texts]  # of an annotation: without its line


def check_legible(figure):
    """No text is cut off, tiny, or over another one; none in a panel lies on an error bar; bars are explained."""
    texts = texts_of(figure)
    boxes, frame = boxes_of(texts), figure.bbox
    for k, (text, box) in enumerate(zip(texts, boxes, strict=True)):
        where = text.get_text()
        assert text.get_fontsize() >= 7, where
        assert frame.padded(1).containsx(box.x0) and frame.padded(1).containsx(box.x1), where
        assert frame.padded(1).containsy(box.y0) and frame.padded(1).containsy(box.y1), where
        covered = [texts[j].get_text() for j in range(k) if box.padded(-1).overlaps(boxes[j].padded(-1))]
        assert not covered, (where, covered)
    for ax in figure.axes:
        for text, box in zip(ax.texts, boxes_of(ax.texts), strict=True):
            assert not any(Outline(bar).intersects_bbox(box) for bar in bars_of(ax)), text.get_text()
    if any(bars_of(ax) for ax in figure.axes):
        assert any(word in text.get_text() for text in figure.texts for word in ("deviation", "interval"))
