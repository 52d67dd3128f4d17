"""Backbones in 4 bits, and settings that exclude them or --shard. Split over processes: tests/test_parallel.py."""

import importlib.util
import json
import shutil

import pytest
import torch
import transformers

import train
from benchmarks.choices import choose
from data import Example, Item
from inject import (
    adapted_layers, adapter_parameters, fingerprint, load_adapters, merge, save_adapters, task_ids,
)  # fmt: skip
from methods import build_model, probe, use_checkpointing
from plumbing import large
from plumbing.backbones import load_backbone
from plumbing.errors import UserError
from plumbing.large import refuse_what_does_not_fit
from scoring import generate, predict
from tests.helpers import change_json, difference, randomise, save_as_backbone, small_config
from tools import estimate_memory, export
from tools.count_parameters import meta_backbone

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes, an optional package, is not installed"
)
WIDTH, IDS = 128, [1, 0, 1]
EXAMPLES = [Example(text, ("ab",), ("ab", "c", "aba"), 0) for text in ("one two", "three", "four five six")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A T5, a Llama and a GPT-2 wide enough for 4 bits (64 values share a scale), saved in float32."""
    folder, made = tmp_path_factory.mktemp("backbones"), {}
    for kind in ("t5", "llama", "gpt2"):
        config = small_config(kind)
        config.vocab_size = 384
        if kind == "gpt2":
            config.n_embd, config.n_positions = WIDTH, 256
        elif kind == "t5":
            config.d_model, config.d_ff, config.d_kv = WIDTH, 2 * WIDTH, 32
        else:
            config.hidden_size, config.intermediate_size = WIDTH, 2 * WIDTH
            config.max_position_embeddings, config.head_dim = 256, 32
        torch.manual_seed(0)
        made[kind] = save_as_backbone(model_of(config), folder / kind)
    return made


def model_of(config) -> torch.nn.Module:
    """A random model of this config."""
    seq2seq = config.is_encoder_decoder
    auto = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    return auto.from_config(config)


def built(folder: str, precision: str, **settings):
    """(model, tokenizer) of MHR with 2 heads, in evaluation mode, with adapters that matter."""
    cfg = train.Config(
        **dict(method="mhr", heads=2, skills=3, backbone=folder, precision=precision, device="cpu") | settings
    )
    torch.manual_seed(1)
    model, tokenizer = build_model(cfg, tasks=2)
    torch.manual_seed(2)
    randomise(model)
    return model.eval(), tokenizer


# --- 4 bits -----------------------------------------------------------------------------------------------------------

kinds = pytest.mark.parametrize("kind", ["t5", "llama"])


@needs_bitsandbytes
@kinds
def test_a_backbone_in_4_bits_trains(folders, kind):
    """A mixed batch is each example alone; gradients too, also with checkpointing; adapters are float32, and near
    those of the whole backbone: 4 bits round it."""
    (model, tokenizer), (whole, _) = built(folders[kind], "nf4"), built(folders[kind], "fp32")
    packed = [layer.linear.weight for layer in adapted_layers(model).values()]
    assert sum(w.dtype == torch.uint8 for w in packed) >= len(packed) - 4  # T5's two wo of each coder stay whole
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}

    def loss_of(m, texts, ids):
        with task_ids(ids):
            items = [Item(task, Example(text, ("ab",)), "ab") for text, task in zip(texts, ids, strict=True)]
            return train.batch_loss(m, tokenizer, items, 64, 16)

    texts = [example.input for example in EXAMPLES]
    one_by_one = sum(loss_of(model, [text], [task]) for text, task in zip(texts, IDS, strict=True)) / len(texts)
    together = loss_of(model, texts, IDS)
    assert together.item() == pytest.approx(one_by_one.item(), rel=1e-5)
    assert 1e-7 < abs(together.item() / loss_of(whole, texts, IDS).item() - 1) < 0.05
    together.backward()
    plain = {name: p.grad.clone() for name, p in adapter_parameters(model).items()}
    model.zero_grad()
    use_checkpointing(model.train())
    for router in {id(r): r for r in (layer.router for layer in adapted_layers(model).values())}.values():
        router.eval()  # without noise, as above
    loss_of(model, texts, IDS).backward()
    for name, p in adapter_parameters(model).items():
        assert plain[name].abs().max() > 0 and difference(p.grad, plain[name]) < 1e-4


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["t5", "llama", "gpt2"])
def test_gradients_in_4_bits_are_the_same_after_an_evaluation(folders, kind):
    """Some CPUs turn a weight into a form for evaluation that has no gradient: never here, biases or not."""
    model, tokenizer = built(folders[kind], "nf4")
    items = [Item(task, example, "ab") for task, example in zip(IDS, EXAMPLES, strict=True)]

    def gradients():
        model.zero_grad()
        with task_ids(IDS):
            train.batch_loss(model, tokenizer, items, 64, 16).backward()
        return [p.grad.clone() for p in adapter_parameters(model).values()]

    before = gradients()
    probe(model, tokenizer, train.Config(backbone=kind, max_input=64, max_output=16))
    predict(model, tokenizer, EXAMPLES, IDS, (64, 8), 4)
    assert all(torch.equal(g, expected) for g, expected in zip(gradients(), before, strict=True))


@needs_bitsandbytes
def test_a_model_without_layers_for_4_bits_is_refused(tmp_path):
    """Falcon's linear layers are of a class of their own, which transformers leaves as they are."""
    config = transformers.FalconConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=384)
    folder = save_as_backbone(model_of(config), tmp_path / "falcon")
    with pytest.raises(UserError, match="transformers holds none of its layers in 4 bits: use --precision bf16"):
        load_backbone(folder, "cpu", "nf4")


@needs_bitsandbytes
@kinds
def test_it_generates_and_chooses(folders, kind):
    """Greedily, with beams, by choices; one task at a time or mixed; it is never merged meanwhile."""
    model, tokenizer = built(folders[kind], "nf4")
    for beams in (1, 3):
        with torch.no_grad(), task_ids(IDS, keep=True):
            mixed = generate(model, tokenizer, EXAMPLES, 64, 8, beams)
        for k, task in enumerate(IDS):
            assert predict(model, tokenizer, [EXAMPLES[k]], [task], (64, 8), 1, beams) == [(mixed[k], [])]
    with torch.no_grad(), task_ids(IDS, keep=True):
        chosen, _ = choose(model, tokenizer, EXAMPLES, 64, 8)
    for k, task in enumerate(IDS):
        by_choice = predict(model, tokenizer, [EXAMPLES[k]], [task], (64, 8), 1, by_choice=True)
        assert [text for text, _ in by_choice] == [EXAMPLES[k].choices[chosen[k]]]


@needs_bitsandbytes
@kinds
def test_its_adapters_fit_the_backbone_in_every_precision(folders, kind, tmp_path):
    """The fingerprint is that of the checkpoint: what was trained on nf4 loads in fp32 and bf16, and the other way."""
    path = str(tmp_path / "adapter.safetensors")
    models = {precision: built(folders[kind], precision)[0] for precision in ("nf4", "fp32", "bf16")}
    assert len({fingerprint(model) for model in models.values()}) == 1
    for source in ("nf4", "fp32"):
        save_adapters(models[source], path)
        for model in models.values():
            for p in adapter_parameters(model).values():
                p.data.zero_()
            load_adapters(model, path)


@needs_bitsandbytes
@pytest.mark.parametrize("said", ["bfloat16", "float16"])
def test_the_type_of_the_files_counts_not_that_of_the_config(folders, said, tmp_path):
    """A float32 file whose config.json names another type: not rounded, and known again."""
    folder = tmp_path / "model"
    shutil.copytree(folders["llama"], folder)
    whole = load_backbone(str(folder), "cpu")[0]
    for key in ("dtype", "torch_dtype"):
        change_json(folder / "config.json", **{key: said})
    as_filed = load_backbone(str(folder), "cpu", "auto")[0]
    assert all(torch.equal(a, b) for a, b in zip(as_filed.parameters(), whole.parameters(), strict=True))
    assert len({fingerprint(m) for m in (whole, as_filed, load_backbone(str(folder), "cpu", "nf4")[0])}) == 1


@needs_bitsandbytes
def test_merging_into_4_bits_is_refused_with_the_way_out(folders):
    model, _ = built(folders["llama"], "nf4")
    with pytest.raises(ValueError, match="^layer .*: nothing can be merged into a weight .*: export the LoRA"):
        merge(model, 0)


@needs_bitsandbytes
@pytest.mark.slow
def test_a_run_in_4_bits_trains_adapts_and_is_exported(folders, tmp_path):
    """The commands of a user, from training to PEFT's files."""
    import adapt
    import evaluate

    flags = dict(backbone=folders["t5"], precision="nf4", steps=2, batch_size=4, max_input=32, max_output=8, heads=2)
    folder = tmp_path / "run"
    train.main(flags | dict(method="mhr", dataset="strings", device="cpu", output_dir=str(folder)))
    assert json.loads((folder / "config.json").read_text())["precision"] == "nf4"
    few = dict(tasks="sort+double", shots=2, test_examples=2, steps=2, output_dir=str(tmp_path / "few"))
    adapt.main(few | dict(checkpoint=str(folder), device="cpu"))
    evaluate.main(dict(checkpoint=str(tmp_path / "few"), device="cpu"))
    task = json.loads((folder / "tasks.json").read_text())["tasks"][0]
    out = str(tmp_path / "peft")
    export.main(dict(checkpoint=str(folder), format="peft", task=task, output_dir=out))
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()
    export.main(dict(checkpoint=str(folder), format="merged", task=task, output_dir=str(tmp_path / "merged")))
    load_backbone(str(tmp_path / "merged"), "cpu")  # the backbone as its files are, not in 4 bits, and the adapter


@needs_bitsandbytes
@kinds
def test_the_estimate_in_4_bits_is_what_is_held(folders, kind):
    """Weights and their scales; a layer's tables of codes and the model's tiny vectors are not counted."""
    model, _ = load_backbone(folders[kind], "cpu", "nf4")
    held = 0
    for p in model.parameters():
        state = getattr(p, "quant_state", None)
        held += p.numel() * (1 if state else 2)  # what stays whole is float32 here, bfloat16 on a GPU
        if state:
            held += state.absmax.numel() * state.absmax.element_size() + 4 * state.state2.absmax.numel()
    computed, passing = estimate_memory.backbone_otherwise(load_backbone(folders[kind], "cpu")[0], "nf4")
    assert computed == pytest.approx(held, rel=0.01)
    assert passing == 2 * 2 * WIDTH * WIDTH


def test_the_estimate_of_a_split_backbone(folders):
    model = meta_backbone(folders["llama"])
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    rest = sum(p.numel() for p in model.parameters()) - 2 * block
    for n in (2, 4):
        held, passing = estimate_memory.backbone_otherwise(model, f"{n} processes")
        assert (held, passing) == (2 * rest + 2 * 2 * block // n, 2 * 2 * block)


# --- What is refused --------------------------------------------------------------------------------------------------

REFUSED = [
    (dict(precision="nf4", method="full"), "--precision nf4 is for a frozen backbone, which --method full trains"),
    (dict(shard=True, method="full"), "--shard is for a frozen backbone, which --method full trains"),
    (dict(precision="nf4", shard=True), "--shard does not split 4-bit weights: leave it out, or use --precision bf16"),
    (dict(precision="nf4", compile=True), "--precision nf4 does not go with --compile: leave one of them out"),
    (dict(shard=True, compile=True), "--shard does not go with --compile: leave one of them out"),
    (dict(precision="nf4", adapter="sft"), "--adapter sft changes single weights, .*: use --precision bf16"),
    (dict(precision="nf4", backbone="scratch"), "--backbone scratch has no files to load in 4 bits"),
]


@pytest.mark.parametrize("settings, says", REFUSED)
def test_what_does_not_fit_is_refused(monkeypatch, settings, says):
    monkeypatch.setattr(large.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(UserError, match=f"^{says}"):
        refuse_what_does_not_fit(train.Config(**settings))


def test_without_bitsandbytes_the_error_names_it(monkeypatch):
    monkeypatch.setattr(large.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="^--precision nf4 needs another package: pip install bitsandbytes, or use"):
        refuse_what_does_not_fit(train.Config(precision="nf4"))


def test_a_run_in_4_bits_opens_without_bitsandbytes(monkeypatch, capsys):
    monkeypatch.setattr(large.importlib.util, "find_spec", lambda name: None)
    assert large.precision_here("nf4") == "bf16" and "loaded whole" in capsys.readouterr().out
    assert [large.precision_here(kind) for kind in ("fp32", "bf16")] == ["fp32", "bf16"]


def test_one_process_cannot_split(tmp_path):
    with pytest.raises(UserError, match="^--shard splits the backbone over processes: torchrun --nproc-per-node 2 "):
        train.main(dict(shard=True, device="cpu", output_dir=str(tmp_path / "run")))
