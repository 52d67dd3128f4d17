"""docs/peft.md: PEFT's Poly beside ours, line by line. Fails when a new PEFT makes a line of that page wrong."""

import copy
import importlib.util
import inspect
import re
import threading
from pathlib import Path

import datasets
import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, OPTConfig, OPTForCausalLM, T5ForConditionalGeneration, Trainer
from transformers import TrainingArguments as Arguments

from inject import (
    adapted_layers, adapter_parameters, add_tasks, freeze, inject, load_adapters, merge, routers, save_adapters,
    task_ids, unmerge,
)  # fmt: skip
from layers import sharing_key
from lora import LoRA
from mhr import MHRLinear, MHRRouter
from tests.helpers import (
    HEADS, IDS, RANK, SKILLS, TASKS, adapted, backbone, difference, inputs, logits, row, small_config,
)  # fmt: skip
from tools.layouts import from_blocks

peft = pytest.importorskip("peft")

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "peft.md").read_text()
ROWS = {cells[0]: cells[1:] for line in PAGE.splitlines() if len(cells := line.strip("| ").split(" | ")) > 1}
TARGETS = {"t5": ["q", "v", "wo"], "llama": ["q_proj", "v_proj", "down_proj"]}
KIND = {"t5": "SEQ_2_SEQ_LM", "llama": "CAUSAL_LM"}
SIZES = dict(r=RANK, n_tasks=TASKS, n_skills=SKILLS, n_splits=HEADS)
NEAR = 1e-5  # relative, of logits


def fails(line: str, error: type, match: str, call):
    """PEFT still fails at `call` with this error, as the line of the page says."""
    assert line in ROWS, f"docs/peft.md has no line {line!r}"
    try:
        call()
    except error as failure:
        assert re.search(match, str(failure)), f"PEFT fails in another way: {failure}: see the line {line!r}"
    else:
        pytest.fail(f"PEFT {peft.__version__} has mended it: change the line {line!r} of docs/peft.md")


def still(line: str, behaves: bool):
    """PEFT still behaves as the line of the page says."""
    assert line in ROWS, f"docs/peft.md has no line {line!r}"
    assert behaves, f"PEFT {peft.__version__} behaves otherwise: change the line {line!r} of docs/peft.md"


def poly(name: str = "t5", **settings):
    """PEFT's Poly in a small model, in evaluation mode, with values under which tasks differ."""
    model = backbone(name)
    torch.manual_seed(0)
    options = dict(target_modules=TARGETS[name], task_type=KIND[name])
    model = peft.get_peft_model(model, peft.PolyConfig(**SIZES | options | settings))
    randomise(model)
    return model.eval()


@torch.no_grad()
def randomise(model):
    for name, p in model.named_parameters():
        if "poly_" in name:
            p.normal_(0, 3.0 if "logits" in name else 0.3)


def ours(name: str = "t5", **settings):
    """MHR in the same layers of the same model."""
    return adapted(name, "mhr", "lora", layers=rf".*\.({'|'.join(TARGETS[name])})", **settings)


def theirs_as_ours(name: str = "t5"):
    """(PEFT's model, ours with its values)."""
    theirs, model = poly(name), ours(name)
    for layer, own in adapted_layers(model).items():
        its = theirs.get_base_model().get_submodule(layer)
        router = its.poly_router["default"]
        from_blocks(own, its.poly_lora_A["default"], its.poly_lora_B["default"], router.module_logits)
    return theirs, model


def tokens(name: str = "t5"):
    """A batch for `generate`."""
    return {key: value for key, value in inputs(name).items() if key != "labels"}


ids = torch.tensor(IDS)


# --- The same in both -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_a_batch_of_several_tasks(name):
    """Also each example alone, the gradients, and the same tokens from greedy decoding."""
    (theirs, model), batch = theirs_as_ours(name), inputs(name)
    y = theirs(**batch, task_ids=ids).logits
    alone = torch.cat([theirs(**row(batch, k), task_ids=ids[k : k + 1]).logits for k in range(4)])
    assert difference(y, alone) < NEAR and difference(y, logits(model, batch, IDS)) < NEAR
    y.square().mean().backward()
    with task_ids(IDS):
        model(**batch).logits.square().mean().backward()
    for layer, own in adapted_layers(model).items():
        theirs_z = theirs.get_base_model().get_submodule(layer).poly_router["default"].module_logits
        assert difference(theirs_z.grad, own.router.Z.grad.flatten(1)) < 1e-3
    how = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with torch.no_grad(), task_ids(IDS, keep=True):
        expected = model.generate(**tokens(name), **how)
    assert torch.equal(theirs.generate(**tokens(name), **how, task_ids=ids), expected)


def test_missing_and_unknown_ids():
    line, model = "ids that are missing or too large", poly()
    fails(line, ValueError, "task_ids should not be None", lambda: model(**inputs("t5")))
    fails(line, ValueError, "Only 5 tasks available", lambda: model(**inputs("t5"), task_ids=ids + 2))
    with pytest.raises(RuntimeError, match="without task ids"):
        ours()(**inputs("t5"))
    with pytest.raises(IndexError, match="task id 6 is out of range"):
        logits(ours(), inputs("t5"), ids + 2)


def test_noise():
    """None in evaluation. In training PEFT draws for each example, we for each task, or not at all."""
    batch = {name: value[:1].repeat(2, 1) for name, value in inputs("t5").items()}
    same = lambda y: difference(y[0], y[1]) < NEAR  # noqa: E731
    with torch.no_grad():
        two = lambda model, **kwargs: model(**batch, **kwargs).logits  # noqa: E731
        model = poly()
        still("evaluation", torch.equal(*(two(model, task_ids=ids[[1, 1]]) for _ in range(2))))
        still("noise in training", not same(two(model.train(), task_ids=ids[[1, 1]])))
        model = ours().train()
        with task_ids([0, 0]):
            assert same(two(model)) and difference(two(model), two(model)) > 1e-3
            assert torch.equal(*(two(model.eval()) for _ in range(2)))
        with task_ids([0, 0]):
            model = ours(routing="sigmoid").train()
            assert torch.equal(two(model), two(model))


def test_what_is_saved(tmp_path):
    from safetensors.torch import load_file

    poly().save_pretrained(tmp_path)
    still("what is saved", all("poly_" in name for name in load_file(tmp_path / "adapter_model.safetensors")))
    save_adapters(ours(), str(tmp_path / "ours.safetensors"))
    assert all(re.search("inventory|router", name) for name in load_file(tmp_path / "ours.safetensors"))


def test_ddp():
    """One process with torch's own wrapper: every parameter gets its gradient, twice. (Two processes were tried once:
    the gradients are those of the whole batch, in both.)"""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for model, given in ((poly(), {"task_ids": ids}), (ours(), {})):
            wrapped = nn.parallel.DistributedDataParallel(model.train())
            for _ in range(2):
                wrapped.zero_grad()
                with task_ids(IDS):
                    wrapped(**inputs("t5"), **given).loss.backward()
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    finally:
        torch.distributed.destroy_process_group()


def test_four_bits(tmp_path):
    """(Ours: tests/test_large.py.)"""
    pytest.importorskip("bitsandbytes")
    config = small_config("t5")
    config.d_model, config.d_kv, config.d_ff, config.num_layers = 128, 32, 128, 1
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    bits = BitsAndBytesConfig(load_in_4bit=True)
    model = T5ForConditionalGeneration.from_pretrained(tmp_path, quantization_config=bits, device_map={"": "cpu"})
    model = peft.get_peft_model(model, peft.PolyConfig(**SIZES, target_modules=["q", "v"], task_type=KIND["t5"]))
    layer = model.get_base_model().encoder.block[0].layer[0].SelfAttention.q
    model(**inputs("t5"), task_ids=ids).loss.backward()
    still(
        "a backbone in bitsandbytes' 4 bits",
        type(layer.base_layer).__name__ == "Linear4bit" and layer.poly_lora_B["default"].grad is not None,
    )


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_gradient_checkpointing():
    how = dict(gradient_checkpointing_kwargs={"use_reentrant": False})

    def backward(model, **given):
        model.train()
        model.gradient_checkpointing_enable(**how)
        model.enable_input_require_grads()
        with task_ids(IDS):
            model(**inputs("t5"), **given, use_cache=False).loss.backward()

    fails("gradient checkpointing", ValueError, "should not be None", lambda: backward(poly(), task_ids=ids))
    backward(ours())


@pytest.mark.parametrize(
    "line, how",
    [
        ("beam search", dict(num_beams=2)),
        ("several returned sequences", dict(num_return_sequences=2, do_sample=True)),
    ],
)
def test_beams(line, how):
    """Ids that are repeated by hand help a decoder-only model alone: an encoder runs once for each example."""
    twice, shapes = ids.repeat_interleave(2), "Expected size for first two dimensions"
    call = lambda model, name, given: model.generate(**tokens(name), **how, max_new_tokens=2, task_ids=given)  # noqa: E731
    theirs = {name: poly(name) for name in ("t5", "llama")}
    for name, given in (("t5", ids), ("t5", twice), ("llama", ids)):
        fails(line, RuntimeError, shapes, lambda name=name, given=given: call(theirs[name], name, given))
    still(line, len(call(theirs["llama"], "llama", twice)) in (4, 8))
    for name in theirs:
        with torch.no_grad(), task_ids(IDS, keep=True):
            ours(name).generate(**tokens(name), **how, max_new_tokens=2)


def test_choices_on_one_encoding():
    """Two outputs for each of four examples, whose inputs are encoded once."""
    theirs, model = poly(), ours()
    with torch.no_grad():
        states = torch.randn(4, 7, 32).repeat_interleave(2, 0)
        batch = dict(encoder_outputs=(states,), decoder_input_ids=torch.randint(3, 99, (8, 3)))
        line = "choices scored on one encoding"
        fails(line, RuntimeError, "Expected size", lambda: theirs(**batch, task_ids=ids))
        with task_ids(IDS):
            assert model(**batch).logits.shape[:2] == (8, 3)


def test_a_part_by_itself():
    line = "a part called by itself, as an encoder"
    x = inputs("t5")["input_ids"]
    fails(line, ValueError, "should not be None", lambda: poly().get_encoder()(input_ids=x))
    with task_ids(IDS):
        ours().get_encoder()(input_ids=x)


def test_merging():
    fails("merging", NotImplementedError, "", lambda: poly().merge_and_unload())
    fails("merging", NotImplementedError, "", lambda: poly().merge_adapter())
    model, batch = ours(), inputs("t5")
    y = logits(model, batch, [3] * 4)
    layers = merge(model, 3)
    assert difference(model(**batch).logits, y) < NEAR
    unmerge(model, layers)
    assert torch.equal(logits(model, batch, [3] * 4), y)


class Plain(nn.Module):
    """A network of no library, with one layer."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x)


def our_plain():
    model = Plain()
    freeze(model)
    inject(model, lambda _, linear: MHRLinear(linear, LoRA(2), MHRRouter(TASKS, SKILLS, HEADS)), ["fc"])
    return model


def test_a_plain_module():
    model, x = peft.get_peft_model(Plain(), peft.PolyConfig(**SIZES, target_modules=["fc"])), torch.randn(4, 3, 8)
    line = "a plain `nn.Module`"
    fails(line, TypeError, "unexpected keyword argument 'task_ids'", lambda: model(x, task_ids=ids))
    still(line, model.base_model(x, task_ids=ids).shape == x.shape)
    with task_ids(IDS):
        assert our_plain()(x).shape == x.shape


def test_inputs_of_two_axes():
    line, x = "a layer whose input has two axes, as OPT's feed-forward", torch.randn(4, 8)
    model = peft.get_peft_model(Plain(), peft.PolyConfig(**SIZES, target_modules=["fc"]))
    fails(line, RuntimeError, "must be a 3D tensor", lambda: model.base_model(x, task_ids=ids))
    with task_ids(IDS):
        assert our_plain()(x).shape == x.shape
    sizes = dict(vocab_size=100, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, max_position_embeddings=64)
    opt = OPTForCausalLM(OPTConfig(**sizes, num_hidden_layers=1, num_attention_heads=4))
    model = copy.deepcopy(opt)
    settings = peft.PolyConfig(**SIZES, target_modules=["fc1"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(opt, settings)
    fails(line, RuntimeError, "must be a 3D tensor", lambda: theirs(**tokens("llama"), task_ids=ids))
    inject(model, lambda _, linear: MHRLinear(linear, LoRA(2), MHRRouter(TASKS, SKILLS, HEADS)), ["fc1"])
    logits(model, tokens("llama"), IDS)


def test_conv1d():
    settings = peft.PolyConfig(**SIZES, target_modules=["c_attn"])
    line = "GPT-2's Conv1D"
    fails(line, TypeError, "is not supported", lambda: peft.get_peft_model(backbone("gpt2"), settings))
    logits(adapted("gpt2", "mhr", "lora"), inputs("gpt2"), IDS)


def test_heads_that_do_not_divide():
    theirs, line = poly(n_splits=5), "heads that do not divide a layer"
    fails(line, RuntimeError, "invalid for input of size", lambda: theirs(**inputs("t5"), task_ids=ids))
    with pytest.raises(ValueError, match="layer encoder.*5 heads do not divide 32"):
        ours(heads=5)


def test_new_tasks(tmp_path):
    line, theirs, model = "new tasks after training", poly(), ours()
    theirs.save_pretrained(tmp_path)
    larger, saved = poly(n_tasks=TASKS + 2), peft.load_peft_weights(str(tmp_path))
    fails(line, RuntimeError, "size mismatch", lambda: peft.set_peft_model_state_dict(larger, saved))
    known = {name for part in (theirs, theirs.base_model, peft.tuners.poly.model.PolyModel) for name in dir(part)}
    still(line, not [name for name in known if re.search("(add|resize|extend|new)_task", name)])
    y = logits(model, inputs("t5"), IDS)
    add_tasks(model, 2)
    assert torch.equal(logits(model, inputs("t5"), IDS), y)
    logits(model, inputs("t5"), [TASKS + 1] * 4)


# --- Silence ----------------------------------------------------------------------------------------------------------


def test_a_negative_id():
    theirs, batch = poly(), inputs("t5")
    with torch.no_grad():
        last, negative = (theirs(**batch, task_ids=torch.full((4,), k)).logits for k in (TASKS - 1, -1))
    still("a negative id", torch.equal(negative, last))
    with pytest.raises(ValueError, match="must not be negative"):
        logits(ours(), batch, [-1] * 4)


def in_two_threads(call, embedding: nn.Module):
    """call(k) for k = 0 in a thread and for k = 1 here, so that 1 begins while 0 is inside the model, and ends after
    it: (what 0 gave, what 1 gave)."""
    gave, inside, other = {}, threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: gave.update({0: call(0)}))

    def pause(*_):
        if threading.current_thread() is thread and not inside.is_set():
            inside.set()
            other.wait(5)
        elif threading.current_thread() is not thread and not other.is_set():
            other.set()
            thread.join(5)

    hook = embedding.register_forward_hook(pause)
    thread.start()
    inside.wait(5)
    gave[1] = call(1)
    thread.join()
    hook.remove()
    return gave[0], gave[1]


def test_two_threads():
    theirs, model, batch = poly(), ours(), inputs("t5")

    @torch.no_grad()
    def call(k):
        return theirs(**batch, task_ids=torch.tensor([k] * 4)).logits

    alone = call(0), call(1)
    gave = in_two_threads(call, theirs.get_base_model().encoder.embed_tokens)
    still("two threads", difference(gave[0], alone[1]) < NEAR < difference(gave[0], alone[0]))
    call_ours = lambda k: logits(model, batch, [k] * 4)  # noqa: E731
    alone = call_ours(0), call_ours(1)
    gave = in_two_threads(call_ours, model.encoder.embed_tokens)
    assert torch.equal(gave[0], alone[0]) and torch.equal(gave[1], alone[1])


@pytest.mark.parametrize("kind", ["poly", "ia3"])
def test_adapter_names_are_ignored(kind):
    """All rows have the active adapter's outputs, whatever their names say."""
    targets = dict(target_modules=["k", "wo"], task_type=KIND["t5"])
    settings = peft.PolyConfig(**SIZES, **targets) if kind == "poly" else peft.IA3Config(
        **targets, feedforward_modules=["wo"]
    )  # fmt: skip
    model, batch = peft.get_peft_model(backbone("t5"), settings, adapter_name="a"), inputs("t5")
    model.add_adapter("b", settings)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "poly_" in name or "ia3" in name:
                p.normal_(0 if kind == "poly" else 1, 0.5)
        given = {"task_ids": ids} if kind == "poly" else {}
        model.eval()
        mixed = model(**batch, **given, adapter_names=["b", "a", "b", "a"]).logits
        of_a = model(**batch, **given).logits
        model.set_adapter("b")
        of_b = model(**batch, **given).logits
    still("`adapter_names` for a batch", torch.equal(mixed, of_a) and difference(of_a, of_b) > 0.01)


def test_another_backbone(tmp_path):
    poly().save_pretrained(tmp_path)
    other = peft.PeftModel.from_pretrained(backbone("t5", seed=5), str(tmp_path))
    still("adapters of another backbone", isinstance(other, peft.PeftModel))
    model = ours()
    save_adapters(model, str(tmp_path / "ours.safetensors"))
    with torch.no_grad():
        model.shared.weight += 1
    with pytest.raises(ValueError, match="backbone"):
        load_adapters(model, str(tmp_path / "ours.safetensors"))


# --- By choice --------------------------------------------------------------------------------------------------------


def test_initial_values():
    layer = peft.tuners.poly.layer.Linear(nn.Linear(64, 64), "a", peft.PolyConfig(**SIZES | {"n_skills": 16}))
    still("the initial A", 0.98 * (HEADS / 64) ** 0.5 < layer.poly_lora_A["a"].abs().max() <= (HEADS / 64) ** 0.5)
    A = MHRLinear(nn.Linear(64, 64), LoRA(RANK), MHRRouter(TASKS, 16, HEADS)).inventory["A"]
    assert 0.98 * (3 * 64) ** -0.5 < A.abs().max() <= (3 * 64) ** -0.5


def test_granularity():
    fields = inspect.signature(peft.PolyConfig).parameters
    still("which layers share a router", not [name for name in fields if re.search("granul|share|router", name)])
    theirs = [m for m in poly().modules() if isinstance(m, peft.tuners.poly.PolyLayer)]
    still("which layers share a router", len({id(layer.poly_router["default"]) for layer in theirs}) == len(theirs))
    model, shared = backbone("t5"), {}

    def make_layer(name, linear):
        router = shared.setdefault(sharing_key(name, "block"), MHRRouter(TASKS, SKILLS, HEADS))
        return MHRLinear(linear, LoRA(2), router)

    inject(model, make_layer, TARGETS["t5"])
    assert len(routers(model)) == 4 < len(adapted_layers(model))


def test_what_a_skill_is():
    fields = inspect.signature(peft.PolyConfig).parameters
    still("what a skill is", fields["poly_type"].default == "poly" and "adapter_type" not in fields)
    with pytest.raises(ValueError, match="Unsupported poly_type"):
        poly(poly_type="ia3")
    for adapter in ("lora", "ia3", "sft"):
        logits(adapted("t5", "mhr", adapter), inputs("t5"), IDS)


def test_z_alone():
    """By names, as the page says; ours is in tests/test_inject.py."""
    theirs = poly()
    for name, p in theirs.named_parameters():
        p.requires_grad_("poly_router" in name)
    theirs(**inputs("t5"), task_ids=ids).loss.backward()
    moved = {name for name, p in theirs.named_parameters() if p.grad is not None}
    still("z, the routing alone", bool(moved) and all("module_logits" in name for name in moved))


def test_mu():
    known = set(dir(peft.tuners.poly.model.PolyModel)) | set(dir(peft.tuners.poly.PolyLayer))
    still("μ, the average of skills", not [name for name in known if re.search("average|mean|uniform", name)])
    layer = next(iter(adapted_layers(ours()).values()))
    assert torch.allclose(layer.average_skills()["A"], layer.inventory["A"].mean(0))


def float32_kept(model, **given) -> int:
    """Bytes of float32 tensors of three axes that a forward pass keeps for the backward pass."""
    kept = {}

    def pack(x):
        if x.dim() == 3 and x.dtype == torch.float32:
            kept[x.data_ptr()] = 4 * x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), task_ids(IDS):
        loss = model(**inputs("t5"), **given, use_cache=False).loss
    loss.backward()  # until then the addresses are not used again
    return sum(kept.values())


def test_bf16():
    settings = peft.PolyConfig(**SIZES, target_modules=TARGETS["t5"], task_type=KIND["t5"])
    theirs = peft.get_peft_model(backbone("t5").to(torch.bfloat16), settings).train()
    line = "adapters on a bf16 backbone"
    still(line, all(p.dtype == torch.float32 for name, p in theirs.named_parameters() if "poly_lora" in name))
    model = ours().to(torch.bfloat16).train()
    for p in adapter_parameters(model).values():
        p.data = p.data.float()
    still(line, float32_kept(theirs, task_ids=ids) > 2 * float32_kept(model))


def test_bench():
    """The table of training steps at the top of the page of measurements."""
    text = (ROOT / "results" / "bench.md").read_text()
    columns = "floor LoRA Peft-LoRA Poly MHR Peft-Poly".split()
    number, lines = r" +([\d.]+) \([\d.]+\)", 0
    for line in re.findall(rf"^ +b=\d+ l=\d+ r=\d+ h=\d+{number * 6}", text, re.M):
        ratio = dict(zip(columns, map(float, line), strict=True))
        assert ratio["MHR"] < ratio["Peft-Poly"]
        lines += 1
    assert lines >= 9


# --- What PEFT does better --------------------------------------------------------------------------------------------


def data_with_ids():
    columns = {name: value.tolist() for name, value in inputs("t5").items()}
    return datasets.Dataset.from_dict(columns | {"task_ids": IDS})


def arguments(folder, **settings):
    how = dict(max_steps=1, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True)
    return Arguments(str(folder), save_strategy="no", **how | settings)


def test_trainer(tmp_path):
    """The column is enough."""
    model = poly()
    before = {name: p.clone() for name, p in model.named_parameters()}
    Trainer(model, arguments(tmp_path, remove_unused_columns=False), train_dataset=data_with_ids()).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    still("Hugging Face's Trainer", moved == {name for name in before if "poly_" in name})


def test_trainer_drops_the_column(tmp_path):
    """By default, for the backbone has no such argument."""
    trainer = Trainer(poly(), arguments(tmp_path), train_dataset=data_with_ids())
    fails("Hugging Face's Trainer", ValueError, "should not be None", trainer.train)


class RoutedTrainer(Trainer):
    """The four lines."""

    def compute_loss(self, model, inputs, **kwargs):
        with task_ids(inputs.pop("task_ids")):
            return super().compute_loss(model, inputs, **kwargs)


def test_our_trainer(tmp_path):
    model = ours()
    before = {name: p.clone() for name, p in model.named_parameters()}
    RoutedTrainer(model, arguments(tmp_path, remove_unused_columns=False), train_dataset=data_with_ids()).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(adapter_parameters(model))


def test_named_adapters():
    """Poly: one is active. LoRA in a batch: tests/test_export.py. Ours refuses a second set."""
    model, batch = poly(), inputs("t5")
    y = model(**batch, task_ids=ids).logits
    model.add_adapter("b", model.peft_config["default"])
    model.set_adapter("b")
    other = model(**batch, task_ids=ids).logits
    model.set_adapter("default")
    again = model(**batch, task_ids=ids).logits
    still("several named adapters in a model", torch.equal(again, y) and difference(other, y) > 0.01)
    with pytest.raises(ValueError, match="already has adapters"):
        inject(ours(), lambda _, linear: linear, ["k"])


def test_switched_off():
    model, batch = poly(), inputs("t5")
    with model.disable_adapter(), torch.no_grad():
        y = model(**batch).logits
    still("adapters switched off for a while", difference(y, backbone("t5")(**batch).logits) < NEAR)


def test_a_head(tmp_path):
    model = poly(modules_to_save=["lm_head"])
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "poly_" not in name]
    still("training a head beside the adapters", bool(trained) and all("lm_head" in name for name in trained))
    model = ours()
    model.lm_head.weight.requires_grad_()
    save_adapters(model, str(tmp_path / "ours.safetensors"))
    head = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    load_adapters(model, str(tmp_path / "ours.safetensors"))
    assert torch.equal(model.lm_head.weight, head)


def test_what_peft_has():
    still("kinds of adapters", len(peft.PeftType) >= 24)
    kinds = "bnb gptq awq aqlm hqq eetq torchao".split()
    still("quantised backbones", all(importlib.util.find_spec(f"peft.tuners.lora.{kind}") for kind in kinds))
    still("the hub", callable(peft.PeftModel.push_to_hub) and callable(peft.PeftModel.from_pretrained))


# --- The page ---------------------------------------------------------------------------------------------------------


def test_the_page_names_its_tests():
    """Each line about PEFT names a test of this file, and each test here is named by a line."""
    lines = [line for line in PAGE.split("## The authors' code")[0].splitlines() if line.startswith("| ")]
    lines = [line for line in lines if not line.startswith("| |")]
    assert len(lines) == len({line.split(" | ")[0] for line in lines}) > 30
    named = [re.findall(r"`(test_\w+)`", line) for line in lines]
    assert all(named)
    here = {name for name in globals() if name.startswith("test_")}
    assert set(sum(named, [])) == here - {"test_the_page_names_its_tests", "test_nn_parameter_takes_no_dtype"}
    assert re.search(r"by running PEFT \d+\.\d+\.\d+\.", PAGE)


def test_nn_parameter_takes_no_dtype():
    """What can be checked of the page's lines about the authors' code without their code."""
    with pytest.raises(TypeError):
        nn.Parameter(torch.ones(2), dtype=torch.float32)
