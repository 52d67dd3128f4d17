"""Nothing is wrong without a word: in other people's models, wrappers, types, tokenizers and files.

Each test is of a kind of situation that was reported of software for this job. Families of models: test_families.py.
"""

import codecs
import contextlib
import copy
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import train
from benchmarks import choices
from benchmarks.crossfit import read_tsv
from benchmarks.superni import _official_rows
from data import Example, collate, encode_inputs, encode_outputs, tokens
from ia3 import IA3, IA3Linear
from inject import (
    adapted_layers, adapter_parameters, add_tasks, check, fingerprint, freeze, inject, load_adapters, merge, merged,
    save_adapters, task_ids, unmerge, unwrapped,
)  # fmt: skip
from layers import sharing_key
from lora import LoRA, LoRALinear
from methods import probe
from mhr import MHRLinear, MHRRouter
from plumbing.backbones import refuse_unfit, tiny_from_scratch
from plumbing.errors import UserError
from plumbing.folders import read_json
from poly import PolyLinear, PolyRouter
from scoring import generate
from sft import SFT, SFTLinear
from tests.helpers import (
    IDS, NAMES, VOCAB, adapted, backbone, change_json, gradients, inputs, layer_maker, layers_of, logits,
    save_as_backbone, small_config,
)  # fmt: skip

ROOT = Path(__file__).parents[1]
WORDS = "the cat sat on the mat yes no maybe true false question answer great movie terrible film"


def poly(name: str, linear: nn.Module) -> PolyLinear:
    """A routed layer for three tasks."""
    return PolyLinear(linear, LoRA(2), PolyRouter(3, 2))


def routed(model: nn.Module, pattern) -> nn.Module:
    """The model with routed layers whose tasks differ."""
    freeze(model.eval())
    inject(model, poly, pattern)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in adapter_parameters(model).items():
            p.normal_(0, 3.0 if name.endswith("Z") else 0.3)
    return model


# --- Which row belongs to which task ----------------------------------------------------------------------------------


class Odd(nn.Module):
    """A model (b, l, 8) whose inner layer sees other rows than the model."""

    def __init__(self, rows):
        super().__init__()
        self.first, self.inner, self.rows = nn.Linear(8, 8), nn.Linear(8, 8), rows

    def forward(self, x):
        return self.rows(self.inner, self.first(x))


ODD = {
    "tokens first": (lambda inner, x: inner(x.transpose(0, 1)).transpose(0, 1), "the tokens as its first axis"),
    "stacked": (lambda inner, x: inner(torch.cat([x, x])).chunk(2)[1], "6 rows for 3 examples"),
    "a table": (lambda inner, x: x + inner(x[:1] * 0), "1 rows for 3 examples"),
    "a subset": (lambda inner, x: x + inner(x.flatten(0, 1)[:6]).mean(), "6 rows for 3 examples"),
    "the batch's size by chance": (lambda inner, x: x + inner(x.flatten(0, 1)[3:6]).mean(), "MIXED"),
    "all tokens, the first ones first": (lambda inner, x: x + inner(x.transpose(0, 1).flatten(0, 1)).mean(), "MIXED"),
}
MIXED = "rows that are not those of the examples"


@pytest.mark.parametrize("rows, says", ODD.values(), ids=ODD)
def test_a_layer_that_sees_other_rows_is_refused_by_name(rows, says):
    """In a mixed batch, and by the probe; in a batch of one task any row has that task."""
    model, x = routed(Odd(rows), ["first", "inner"]), torch.randn(3, 7, 8)
    if says != "MIXED":  # which the number of rows does not show
        says_now = "^layer inner was called with . rows, its model with 3: "
        with task_ids([0, 1, 0]), pytest.raises(ValueError, match=says_now):
            model(x)
    with pytest.raises(ValueError, match=f"^layer inner is called with {says.replace('MIXED', MIXED)}: leave it out$"):
        check(model, lambda: model(x))
    with task_ids([1, 1, 1]):
        together = model(x)
    with task_ids([1]):
        assert torch.allclose(model(x), together, atol=1e-6)


def test_a_layer_that_is_called_by_keyword():
    model, x = routed(Odd(lambda inner, x: inner(input=x)), ["first", "inner"]), torch.randn(3, 7, 8)
    check(model, lambda: model(x))
    with task_ids([0, 1, 2]):
        assert model(x).shape == x.shape


def test_flattened_tokens_are_known():
    """OPT flattens its batch before the feed-forward layers: all tokens, in their order, are no other rows."""
    model = routed(Odd(lambda inner, x: inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])), ["first", "inner"])
    x = torch.randn(3, 7, 8)
    check(model, lambda: model(x))
    with task_ids([0, 2, 1]):
        mixed = model(x)
    for k, task in enumerate((0, 2, 1)):
        with task_ids([task]):
            assert torch.allclose(model(x[k : k + 1])[0], mixed[k], atol=1e-5)


@pytest.mark.parametrize("ids, rows", [([0, 1], 3), ([0, 1, 2], 4), ([0, 0], 3), ([0, 1, 2], 2)])
def test_rows_that_are_no_multiple_of_the_ids_are_refused(ids, rows):
    model = routed(Odd(lambda inner, x: inner(x)), ["first", "inner"])
    with task_ids(ids), pytest.raises(ValueError, match=f"^{len(ids)} task ids for a batch of {rows} rows"):
        model(torch.randn(rows, 7, 8))


def test_a_table_of_positions_is_called_too():
    """DeBERTa: queries and keys also read the table of relative positions."""
    config = transformers.DebertaV2Config(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8,
        share_att_key=True,
    )  # fmt: skip
    model, x = routed(transformers.DebertaV2Model(config), r".*(query|key|value)_proj"), torch.randint(5, 90, (2, 8))
    with task_ids([0, 1]), pytest.raises(ValueError, match="_proj was called with 1 rows, its model with 2"):
        model(input_ids=x)
    with task_ids([1, 1]):
        assert model(input_ids=x).last_hidden_state.shape == (2, 8, 32)


# --- An adapter that is never used ------------------------------------------------------------------------------------


class Bypassed(nn.Module):
    """A model that calls a layer in one mode alone, or in none."""

    def __init__(self, modes):
        super().__init__()
        self.first, self.second, self.modes = nn.Linear(8, 8), nn.Linear(8, 8), modes

    def forward(self, x):
        called = self.training in self.modes
        return self.second(self.first(x)) if called else self.first(x) @ self.second.weight.T


@pytest.mark.parametrize("modes, says", [((), "training"), ((True,), "evaluation"), ((False,), "training")])
@pytest.mark.parametrize("make", [poly, lambda name, linear: LoRALinear(linear)], ids=["routed", "one adapter"])
def test_the_probe_finds_a_layer_that_is_never_called(make, modes, says):
    """In training or in evaluation; it leaves modes and random states as they were."""
    model = Bypassed(modes).eval()
    freeze(model)
    inject(model, make, r"first|second")
    model.first.train()
    before, state = [m.training for m in model.modules()], torch.get_rng_state()
    with pytest.raises(ValueError, match=f"^layer second is never called in {says}: its adapter would do nothing"):
        check(model, lambda: model(torch.randn(3, 7, 8)))
    assert [m.training for m in model.modules()] == before and torch.equal(torch.get_rng_state(), state)
    assert all(len(layer._forward_pre_hooks) < 2 for layer in adapted_layers(model).values())
    whole = Bypassed((True, False))
    inject(whole, make, r"first|second")
    check(whole, lambda: whole(torch.randn(3, 7, 8)))


class Unread(nn.Module):
    """A model that calls a layer, and computes with its weight instead."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        self.second(x)
        return nn.functional.linear(self.first(x), self.second.weight)


class Dropped(Bypassed):
    """A model that leaves a layer out of half of its steps of training."""

    def forward(self, x):
        return self.first(x) if self.training and torch.rand(()) < 0.5 else self.second(self.first(x))


def test_the_probe_finds_an_output_that_nobody_reads():
    model = Unread()
    freeze(model)
    inject(model, poly, "first|second")
    with pytest.raises(ValueError, match="^layer second is called, but its output is not used: leave it out$"):
        check(model, lambda: model(torch.randn(3, 7, 8)))
    dropped = Dropped(())
    freeze(dropped)
    inject(dropped, poly, "first|second")
    for seed in range(20):
        torch.manual_seed(seed)
        check(dropped, lambda: dropped(torch.randn(3, 7, 8)))


def test_a_layer_outside_its_models_call_has_a_row_for_each_id():
    model, x = routed(Odd(lambda inner, x: inner(x)), ["first", "inner"]), torch.randn(4, 2, 8)
    with task_ids([0, 1]), pytest.raises(ValueError, match="^2 task ids for 4 rows of a layer that is called outside"):
        model.inner(x)
    with task_ids([0, 1, 1, 0]):
        assert torch.equal(model.inner(x), model.inner(input=x)) and torch.equal(model.inner(x), model.inner(x=x))
    with task_ids([1]):
        assert model.inner(x).shape == x.shape


def test_inputs_in_a_dict_and_behind_a_mask():
    class Named(Odd):
        def forward(self, mask, batch):
            return super().forward(batch["x"])

    model = routed(Named(lambda inner, x: inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])), ["first", "inner"])
    x, mask = torch.randn(3, 7, 8), torch.ones(8, 8)
    with task_ids([0, 2, 1]):
        mixed = model(mask, {"x": x})
    with task_ids([2]):
        assert torch.allclose(model(mask, {"x": x[1:2]})[0], mixed[1], atol=1e-5)


def test_a_generator_that_yields_within_a_context_is_an_error():
    """Two of them, stepped in turn, would run with each other's ids."""

    def stream(ids):
        with task_ids(ids):
            yield
            yield

    one, two = stream([0]), stream([1])
    next(one), next(two)
    for generator in (one, two):
        with pytest.raises(RuntimeError, match="left in another order than entered: do not yield within one"):
            list(generator)
        with pytest.raises(RuntimeError, match="without task ids"):  # and none are left behind
            adapted("llama", "poly", "lora")(**inputs("llama"))


def twice() -> nn.Module:
    """A model that holds one layer under two names."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.append(model[0])
    return model


def bloom() -> nn.Module:
    config = transformers.BloomConfig(
        vocab_size=64, hidden_size=32, n_layer=1, n_head=4, slow_but_exact=True, pretraining_tp=2
    )
    return transformers.BloomForCausalLM(config)


UNUSED = {
    "attention": (lambda: nn.MultiheadAttention(8, 2), "out_proj", "nn.MultiheadAttention reads its weight"),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1), r".*\.linear1",
        r"nn.TransformerEncoder reads its weight in evaluation: torch.backends.mha.set_fastpath_enabled\(False\), or",
    ),
    "twice": (twice, "0", "it is also 2, where it would stay as it is: leave it out"),
    "bloom": (bloom, r".*\.dense", "BLOOM reads its weight with slow_but_exact: set that to False, or"),
}  # fmt: skip


@pytest.mark.parametrize("make, pattern, says", UNUSED.values(), ids=UNUSED)
def test_layers_that_are_known_not_to_be_called_are_refused(make, pattern, says):
    model = make()
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=f"^layer .* cannot be adapted, {says}"):
        inject(model, poly, pattern)
    assert dict(model.named_modules()) == modules


def test_an_encoder_without_its_fast_path_is_adapted(monkeypatch):
    """Training and evaluation then agree, for the layers are called in both."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model = UNUSED["encoder"][0]()
        for layer in model.layers:
            for part in (layer.dropout, layer.dropout1, layer.dropout2, layer.self_attn):
                part.p = part.dropout = 0.0
        routed(model, r".*\.linear[12]")
        with torch.no_grad(), task_ids([0, 1, 0]):
            x = torch.randn(3, 7, 8)
            for router in (layer.router for layer in adapted_layers(model).values()):
                router.routing = "sigmoid"
            assert torch.allclose(model.train()(x), model.eval()(x), atol=1e-5)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


# --- Devices and types ------------------------------------------------------------------------------------------------


def test_an_offloaded_backbone_is_refused():
    """accelerate keeps its weights on the meta device: adapters would be made there, of no values."""
    accelerate = pytest.importorskip("accelerate")
    model = backbone("llama")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(
        ValueError, match="cannot be adapted, accelerate has offloaded its weight: load the model whole"
    ):
        inject(model, layer_maker("poly", "lora"), layers_of("lora", "llama"))


@pytest.mark.parametrize("dtype, close", [(torch.bfloat16, 0.4), (torch.float16, 0.1)])
@pytest.mark.parametrize(
    "method, adapter", [("poly", "lora"), ("mhr", "ia3"), ("hyperformer", "lora"), ("poly", "sft"), ("shared", "sft"),
                        ("mhr", "sft"), ("lora", "lora"), ("ia3", "ia3")],
)  # fmt: skip
def test_autocast(method, adapter, dtype, close):
    """Gradients of a float32 model under autocast are near those without."""
    model, batch = adapted("t5", method, adapter), inputs("t5")
    expected = gradients(model, batch, IDS)
    model.zero_grad()
    with task_ids(IDS):
        with torch.autocast("cpu", dtype):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    flat = lambda of: torch.cat([of[name].flatten() for name in expected])  # noqa: E731
    assert (flat(got) - flat(expected)).norm() < close * flat(expected).norm()


@pytest.mark.parametrize(
    "make",
    [
        lambda linear: LoRALinear(linear), lambda linear: IA3Linear(linear, IA3("out")),
        lambda linear: SFTLinear(linear, SFT(0.5)), lambda linear: PolyLinear(linear, LoRA(), PolyRouter(2, 2)),
        lambda linear: MHRLinear(linear, LoRA(), MHRRouter(2, 2, 2)),
    ],
)  # fmt: skip
def test_a_layer_freezes_what_it_wraps(make):
    """Also where nobody called `freeze`."""
    layer = make(nn.Linear(4, 4))
    assert not any(p.requires_grad for p in layer.linear.parameters())
    assert any(p.requires_grad for p in layer.parameters())


def test_why_a_float16_backbone_is_not_known_again(tmp_path):
    path = str(tmp_path / "adapter.safetensors")
    model = adapted("llama", "poly", "lora")
    save_adapters(model, path)
    half = backbone("llama").half()
    inject(half, layer_maker("poly", "lora"), layers_of("lora", "llama"))
    with pytest.raises(ValueError, match=r"another backbone.*a float16 one, as here.* float32, then .half\(\)"):
        load_adapters(half, path)
    other = backbone("llama", seed=1)
    inject(other, layer_maker("poly", "lora"), layers_of("lora", "llama"))
    with pytest.raises(ValueError, match="trained on another backbone: load the model that it was trained on$"):
        load_adapters(other, path)


# --- Wrappers, and other ways to save ---------------------------------------------------------------------------------


def in_module(model: nn.Module) -> nn.Module:
    """As DistributedDataParallel holds it."""
    wrapper = nn.Module()
    wrapper.module = model
    return wrapper


@pytest.mark.parametrize("wrap", [torch.compile, in_module, lambda model: in_module(torch.compile(model))])
def test_a_wrapped_model_is_saved_loaded_merged_and_injected_as_itself(wrap, tmp_path):
    path, plain = str(tmp_path / "adapter.safetensors"), str(tmp_path / "plain.safetensors")
    model = adapted("llama", "poly", "lora")
    save_adapters(model, plain)
    save_adapters(wrap(model), path)
    one, two = load_file(path), load_file(plain)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert unwrapped(wrap(model)) is model and fingerprint(wrap(model)) == fingerprint(model)
    fresh = adapted("llama", "poly", "lora", seed=4, fresh=True)
    load_adapters(wrap(fresh), path)
    batch = inputs("llama")
    assert torch.equal(logits(fresh, batch, IDS), logits(model, batch, IDS))
    bare = backbone("llama")
    names = inject(wrap(bare), layer_maker("poly", "lora"), layers_of("lora", "llama"))
    assert list(adapted_layers(bare)) == names
    merge(wrap(fresh), 1)
    assert not adapted_layers(fresh)


@pytest.mark.parametrize("name, granularity", [("llama", "linear"), ("llama", "model"), ("t5", "block")])
@pytest.mark.parametrize("more", [{}, dict(gradient_checkpointing=True)], ids=["", "checkpointing"])
def test_the_trainer_of_transformers(name, granularity, more, tmp_path):
    """It trains with task ids in `compute_loss`, backward outside of it, saves routers that are shared, and reloads."""

    class Routed(transformers.Trainer):
        def compute_loss(self, model, batch, return_outputs=False, **more):
            with task_ids(batch.pop("task")):
                output = model(**batch, use_cache=False)
            return (output.loss, output) if return_outputs else output.loss

    def made(seed: int):
        torch.manual_seed(seed)
        model, shared = backbone(name), {}

        def layer(full: str, linear: nn.Module):
            return PolyLinear(linear, LoRA(4), shared.setdefault(sharing_key(full, granularity), PolyRouter(5, 3)))

        freeze(model)
        inject(model, layer, layers_of("lora", name))
        return model

    batch = inputs(name, b=16)
    rows = [{key: x[k] for key, x in batch.items()} | {"task": torch.tensor(k % 4)} for k in range(16)]
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, save_steps=2, per_device_train_batch_size=4, report_to=[],
        remove_unused_columns=False, use_cpu=True, disable_tqdm=True, logging_strategy="no", learning_rate=1e-2, **more,
    )  # fmt: skip
    model = made(0)
    before = copy.deepcopy(model)
    Routed(model=model, args=settings, train_dataset=rows).train()
    for adapter, p in adapter_parameters(model).items():
        assert not torch.equal(p, adapter_parameters(before)[adapter])
    again = made(1)
    Routed(model=again, args=settings)._load_from_checkpoint(str(tmp_path / "checkpoint-4"))
    expected = logits(model.eval(), inputs(name), IDS)
    assert torch.equal(logits(again.eval(), inputs(name), IDS), expected)


def test_a_list_of_names_as_in_peft():
    """A name, or its last parts; a dot in it is a dot."""
    model = backbone("llama")
    names = inject(model, layer_maker("poly", "lora"), ["q_proj", "1.mlp.up_proj"])
    assert names == [
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no layer's name matches"):
        inject(backbone("llama"), layer_maker("poly", "lora"), ["proj"])
    with pytest.raises(ValueError, match="^this model has no layer wi_0: give the names that it has, or a pattern"):
        inject(backbone("llama"), layer_maker("poly", "lora"), ["q_proj", "wi_0"])


class NoGradient(nn.Module):
    """Features that are computed without gradients, and a layer that is trained on them."""

    def __init__(self):
        super().__init__()
        self.features, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        with torch.no_grad():
            x = torch.tanh(self.features(x))
        return self.last(x)


def test_a_layer_that_is_called_without_gradients_is_found():
    """Its adapter would never learn; one that is frozen need not."""
    model = NoGradient()
    freeze(model)
    inject(model, poly, ["features", "last"])
    with pytest.raises(ValueError, match="^layer features is called without gradients: its adapter would never learn"):
        check(model, lambda: model(torch.randn(3, 7, 8)))
    freeze(model.features)
    check(model, lambda: model(torch.randn(3, 7, 8)))


def test_a_model_in_distributed_data_parallel_gets_no_new_parameters():
    """It would not sum their gradients."""
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    for change in (lambda: inject(wrapped, poly, ["q_proj"]), lambda: add_tasks(wrapped, 1)):
        with pytest.raises(ValueError, match="^DistributedDataParallel would not see new parameters: do this before"):
            change()


def test_a_merged_model_is_not_merged_for_another_task():
    """It would go on serving the first."""
    model = adapted("llama", "poly", "lora")
    with merged(model, 0), pytest.raises(ValueError, match="^this model is merged for a task already: unmerge it"):
        with merged(model, 1):
            pass
    with merged(model, 1):
        pass
    layers = merge(model, 0)
    with pytest.raises(ValueError, match="^this model is merged for a task already"):
        with merged(model, 0):
            pass
    unmerge(model, layers)
    with merged(model, 0):
        pass
    with merged(backbone("llama"), 0):
        pass


def test_other_patterns():
    """A compiled one works; what names no layer, or nothing at all, is one sentence."""
    names = inject(backbone("llama"), layer_maker("poly", "lora"), re.compile(r".*\.q_proj"))
    assert len(names) == 2
    for wrong in ([], [re.compile("q")], [b"q_proj"]):
        with pytest.raises(ValueError, match="^give a pattern, or a list of names of layers, not "):
            inject(backbone("llama"), layer_maker("poly", "lora"), wrong)
    with pytest.raises(ValueError, match=r"^the model itself is of type Linear \(torch\), only linear layers"):
        inject(nn.Linear(4, 4), poly, ".*")


def test_a_model_that_peft_has_adapted():
    """Its layers are called Linear too: the message says whose."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(backbone("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(
        ValueError, match=r"^layer .*\.q_proj is of type Linear \(peft\), only linear layers can be adapted"
    ):
        inject(model, layer_maker("poly", "lora"), ["q_proj"])


@pytest.mark.parametrize("wrap", [torch.compile, checkpoint_wrapper])
@pytest.mark.parametrize("part", ["model.layers.1", "model.layers.1.self_attn.q_proj"], ids=["block", "layer"])
def test_a_model_with_a_wrapped_part_is_the_same_model(part, wrap, tmp_path):
    path, model = str(tmp_path / "adapter.safetensors"), adapted("llama", "poly", "lora")
    other = adapted("llama", "poly", "lora", seed=4, fresh=True)
    other.set_submodule(part, wrap(other.get_submodule(part)))
    assert fingerprint(other) == fingerprint(model)
    save_adapters(model, path)
    load_adapters(other, path)
    save_adapters(other, path)
    load_adapters(model, path)


def test_a_pattern_of_everything_says_what_it_names():
    with pytest.raises(
        ValueError, match=r"^the model itself is of type Llama.*, only linear layers can be adapted: '\.\*'$"
    ):
        inject(backbone("llama"), layer_maker("poly", "lora"), ".*")


# --- Tokenizers and settings of the backbone --------------------------------------------------------------------------


def byte_level(**special: str):
    """A byte-level BPE tokenizer, as GPT-2's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(dict.fromkeys(special.values())), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator([WORDS] * 5, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def like_llama_2():
    """A tokenizer that puts a space before whatever it is given, as sentencepiece does."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    made.train_from_iterator([WORDS] * 25, trainer)
    made.pre_tokenizer = None
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("make", [like_llama_2, lambda: byte_level(eos_token="<|end|>", unk_token="<|end|>")])
@pytest.mark.parametrize("output", ["yes", " yes", "no maybe", "\nfilm"])
def test_an_output_has_the_tokens_of_running_text(make, output):
    tokenizer, example = make(), Example("the cat question answer", ("yes",))
    got = encode_inputs([example], tokenizer, 40)[0] + encode_outputs([output], tokenizer, False, 20)[0]
    text = example.input + (output if output[0].isspace() else f" {output}")
    assert got == [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    cut = encode_outputs(["no maybe no maybe no maybe"], tokenizer, False, 3)[0]
    assert len(cut) == 3 and cut[-1] == tokenizer.eos_token_id


def test_a_tokenizer_that_cuts_on_the_left():
    """Texts that are too long keep their beginning all the same, and the end token of an encoder-decoder model."""
    tokenizer = transformers.ByT5Tokenizer(truncation_side="left")
    batch = collate([Example("abcdef", ("x",))], ["uvwxyz"], tokenizer, True, 4, 3)
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == "abc"
    assert tokenizer.decode(batch["labels"][0], skip_special_tokens=True) == "uv"
    assert batch["input_ids"][0, -1] == batch["labels"][0, -1] == tokenizer.eos_token_id


def test_tokens_that_are_added_later():
    """A text that was tokenised before is tokenised anew."""
    tokenizer = byte_level(eos_token="<|end|>", unk_token="<|end|>")
    before = tokens(tokenizer, text="zebra")
    tokenizer.add_tokens(["zebra"])
    assert tokens(tokenizer, text="zebra") == [len(tokenizer) - 1] != before


def test_generation_ends_at_the_token_that_training_taught():
    """Not at the one of the model's own generation settings; and these change nothing else."""
    model, tokenizer = tiny_from_scratch().eval(), transformers.ByT5Tokenizer()
    examples, lengths = [Example("ab", ("c",)), Example("abc", ("c",))], (16, 8)
    expected = generate(model, tokenizer, examples, *lengths)
    odd = dict(
        eos_token_id=50, guidance_scale=3.0, suppress_tokens=list(range(3, 60)), bad_words_ids=[[60], [61]],
        num_return_sequences=2, do_sample=True, repetition_penalty=5.0, min_new_tokens=8, forced_eos_token_id=90,
        begin_suppress_tokens=[70], num_beams=2, encoder_no_repeat_ngram_size=1, length_penalty=-3.0,
    )  # fmt: skip
    before = model.generation_config.update(**odd) or model.generation_config.to_dict()
    assert generate(model, tokenizer, examples, *lengths) == expected
    assert model.generation_config.to_dict() == before
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.eos_token_id] = model.decoder.final_layer_norm.weight.sign()
    ids = []
    model.generate = lambda **given: ids.append(type(model).generate(model, **given)) or ids[-1]
    generate(model, tokenizer, examples, *lengths)
    assert ids[0].shape[1] <= 9


def folder_of(tmp_path: Path, model: nn.Module, tokenizer) -> str:
    """A model and a tokenizer as a folder for --backbone."""
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def refused(folder: str, run: Path, **flags) -> str:
    """The sentence with which train.py refuses a backbone."""
    flags = dict(method="poly", dataset="strings", steps=1, device="cpu", max_input=16, max_output=8) | flags
    with pytest.raises(UserError) as error:
        train.main(flags | dict(backbone=folder, output_dir=str(run)))
    assert "\n" not in str(error.value) and not (run / "config.json").exists()
    return str(error.value)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(WORDS.split())]
    tokenizer = transformers.BertTokenizer(vocab={word: k for k, word in enumerate(words)})
    config = small_config("gpt2")
    folder = folder_of(tmp_path / "model", transformers.GPT2LMHeadModel(config), tokenizer)
    assert "its tokenizer has no end token, so no output would end" in refused(folder, tmp_path / "run")


def test_more_tokens_than_the_model_has_are_refused(tmp_path):
    """On a GPU their ids would be an assertion on the device."""
    folder = save_as_backbone(backbone("llama"), tmp_path / "model")
    said = refused(folder, tmp_path / "run")
    assert said.endswith("its tokenizer has 384 tokens, its model 100: they do not fit")


def test_a_model_that_is_not_causal_is_refused(tmp_path):
    """BERT with a tokenizer that has an end token: every token sees those after it."""
    config = transformers.BertConfig(
        vocab_size=384, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    torch.manual_seed(0)
    folder = save_as_backbone(transformers.BertLMHeadModel(config), tmp_path / "model")
    said = refused(folder, tmp_path / "run", layers="all-linear")
    assert said.endswith("is no language model: a token sees those after it")


@pytest.mark.parametrize(
    "name, flags, says",
    [
        ("gpt2", dict(max_input=60, max_output=5), "64 positions, fewer than --max-input 60 and --max-output 5: give"),
        ("bart", dict(max_input=65, max_output=5), "64 positions, fewer than --max-input 65: give less"),
        ("bart", dict(max_input=5, max_output=65), "64 positions, fewer than --max-output 65: give less"),
    ],
)
def test_more_tokens_than_positions_are_refused(monkeypatch, name, flags, says):
    """On a GPU they would be an assertion on the device. Relative and rotary positions have no table."""
    tokenizer = transformers.ByT5Tokenizer()
    monkeypatch.setattr(transformers.ByT5Tokenizer, "__len__", lambda self: VOCAB)
    cfg = train.Config(backbone="x", **flags)
    with pytest.raises(UserError, match=f"^--backbone x has {says}"):
        refuse_unfit(backbone(name), tokenizer, cfg)
    fits = train.Config(backbone="x", max_input=32, max_output=32)
    for other in NAMES:
        refuse_unfit(backbone(other), tokenizer, fits)
        if other in ("t5", "llama"):
            refuse_unfit(backbone(other), tokenizer, cfg)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["mhr", "random"])
def test_the_probe_passes_what_is_right(monkeypatch, name, method):
    """And leaves random state, modes and hooks as they were."""
    monkeypatch.setattr(transformers.ByT5Tokenizer, "__len__", lambda self: VOCAB)
    model = adapted(name, method, "lora").train()
    state = torch.get_rng_state()
    probe(model, transformers.ByT5Tokenizer(), train.Config(backbone=name, max_input=16, max_output=8))
    assert torch.equal(torch.get_rng_state(), state) and all(m.training for m in model.modules())


def test_the_probe_passes_a_model_that_drops_layers():
    """M2M-100 leaves blocks out at random in training, also by default."""
    config = transformers.M2M100Config(
        vocab_size=384, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_layerdrop=0.3, decoder_layerdrop=0.3,
    )  # fmt: skip
    model = routed(transformers.M2M100ForConditionalGeneration(config), r".*fc1").train()
    for seed in range(10):
        torch.manual_seed(seed)
        probe(model, transformers.ByT5Tokenizer(), train.Config(backbone="x", max_input=16, max_output=8))


# --- Choices without a cache of keys ----------------------------------------------------------------------------------


def causal(kind: str, **settings) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, vocab_size=384, **settings)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
CAUSAL = {
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4), "bloom": dict(hidden_size=32, n_layer=2, n_head=4),
    "mpt": dict(d_model=32, n_layers=2, n_heads=4), "gemma2": SMALL | dict(head_dim=8, sliding_window=8),
    "mistral": SMALL | dict(sliding_window=8), "mamba": dict(hidden_size=32, num_hidden_layers=2, state_size=4),
    "rwkv": dict(hidden_size=32, num_hidden_layers=2),
}  # fmt: skip


@pytest.mark.parametrize("kind", CAUSAL)
def test_choices_are_scored_as_whole_texts_whatever_the_cache_is(kind):
    """Keys and values, sliding windows, states: each choice's tokens have the probabilities of a full forward pass."""
    model, tokenizer = causal(kind, **CAUSAL[kind]), transformers.ByT5Tokenizer()
    examples = [Example("the cat sat", ("yes",), ("yes", "no"), 0), Example("film", ("no",), ("no", "maybe", "x"), 0)]
    with torch.no_grad():
        log_p, _ = choices.choice_log_probs(model, tokenizer, examples, 64, 16)
    for k, example in enumerate(examples):
        for c, choice in enumerate(example.choices):
            source, target = (encode([one], tokenizer) for encode, one in ((of_input, example), (of_output, choice)))
            with torch.no_grad():
                whole = model(torch.tensor([source + target]), use_cache=False).logits.log_softmax(-1)
            for j, token in enumerate(target):
                assert log_p[k, c, j].item() == pytest.approx(whole[0, len(source) - 1 + j, token].item(), abs=1e-4)


def of_input(examples, tokenizer):
    return encode_inputs(examples, tokenizer, 64)[0]


def of_output(outputs, tokenizer):
    return encode_outputs(outputs, tokenizer, False, 16)[0]


def test_t_fews_loss_of_a_routed_state_space_model():
    """Each example is there once for each choice: its task goes with it."""
    model = routed(causal("mamba", **CAUSAL["mamba"]), r".*in_proj")
    examples = [Example("the cat", ("yes",), ("yes", "no"), 0), Example("film", ("no",), ("no", "maybe"), 0)]
    tokenizer = transformers.ByT5Tokenizer()
    with torch.no_grad():
        with task_ids([0, 1]):
            both, _ = choices.choice_log_probs(model, tokenizer, examples, 64, 16)
        for k, example in enumerate(examples):
            with task_ids([k]):
                one, mask = choices.choice_log_probs(model, tokenizer, [example], 64, 16)
            assert torch.allclose(both[k][: one.shape[1], : one.shape[2]][mask[0]], one[0][mask[0]], atol=1e-4)


# --- Files ------------------------------------------------------------------------------------------------------------


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_bytes(codecs.BOM_UTF8 + b"good film\tpositive\r\nbad\tnegative\n")
    assert read_tsv(path, "t") == [Example(" [t] good film", (" positive",)), Example(" [t] bad", (" negative",))]
    (tmp_path / "x.json").write_bytes(codecs.BOM_UTF8 + b'{"a": 1}')
    assert read_json(tmp_path / "x.json", a=int) == {"a": 1}


@pytest.mark.parametrize("content", [b"a\tx\rb\ty\n", b"a\tx\rb\ty\r", b"a\tx\n\rb\tx\ry\tz\n"])
def test_a_lone_carriage_return_merges_no_rows(tmp_path, content):
    path = tmp_path / "t.tsv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"t\.tsv:\d: (a carriage return in an output may hide|the file ends within)"):
        read_tsv(path, "t")


def test_a_task_in_another_language(tmp_path):
    """Its file says so, or all its outputs have no letter that Rouge-L reads."""
    task = dict(Definition=["d"], Categories=["c"], Instances=[dict(id="1", input="x", output=["\u732b\u5750"])])
    path = tmp_path / "task.json"
    path.write_text("{}")
    change_json(path, **task, Output_language=["Chinese"])
    assert [row["metric"] for row in _official_rows(path)] == ["Rouge-L-xlingual"]
    change_json(path, Output_language=["English"])
    with pytest.raises(UserError, match=r"task\.json: Rouge-L reads the letters a-z .*\"Output_language\""):
        list(_official_rows(path))
    change_json(path, Instances=[dict(id="1", input="x", output=["cat"]), dict(id="2", input="x", output=["\u732b"])])
    assert [row["metric"] for row in _official_rows(path)] == ["Rouge-L"] * 2


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="a shell of POSIX")
def test_ctrl_c_ends_a_loop_of_a_shell(tmp_path):
    """The shell, which gets the signal too, goes on with its loop unless its command died of it."""
    run = f"{sys.executable} train.py --method lora --dataset strings --backbone scratch --steps 100000 --device cpu"
    loop = f"for s in 0 1 2; do echo run $s; {run} --log-every 1 --output-dir {tmp_path}/$s; done; echo after"
    shell = subprocess.Popen(["bash", "-c", loop], cwd=ROOT, stdout=-1, stderr=-1, text=True, start_new_session=True)
    log = tmp_path / "0" / "log.jsonl"
    for _ in range(600):
        time.sleep(0.1)
        if log.exists() and log.stat().st_size:
            break
    os.killpg(shell.pid, signal.SIGINT)  # as a terminal does: the whole group
    try:
        out, _ = shell.communicate(timeout=30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
    assert "run 0" in out and "stopped after step" in out and "run 1" not in out and "after\n" not in out
    assert shell.returncode == -signal.SIGINT and (tmp_path / "0" / "checkpoint.safetensors").exists()
