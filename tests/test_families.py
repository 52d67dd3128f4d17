"""Families of models, in tiny random ones. Those with named layers do what T5, BART, Llama and GPT-2 do; in others a
mixed batch is each example alone, or is refused."""

import re
from functools import partial

import pytest
import torch
import transformers
from torch import nn

import train
from inject import adapted_layers, adapter_parameters, check, load_adapters, merged, routers, save_adapters, task_ids
from layers import FAMILIES, LAYER_SETS, all_linear, named_layers, pattern_of
from methods import add_adapters, use_checkpointing
from plumbing.errors import UserError
from plumbing.large import blocks_of
from tests.helpers import difference, gradients, logits, randomise, row

WIDE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
LIKE_LLAMA = WIDE | dict(num_key_value_heads=2, max_position_embeddings=64)
HEAD = LIKE_LLAMA | dict(head_dim=8)
EYE = dict(
    image_size=16, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
)
T5 = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
SETTINGS = {  # config.model_type: settings of a tiny model
    "t5": T5, "mt5": T5, "umt5": T5,
    "bart": dict(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
    ),
    "llama": LIKE_LLAMA, "mistral": LIKE_LLAMA, "qwen2": LIKE_LLAMA, "qwen3": HEAD, "gemma": HEAD, "gemma2": HEAD,
    "gemma3_text": HEAD, "gemma3": dict(text_config=HEAD, vision_config=EYE, mm_tokens_per_image=4),
    "phi3": LIKE_LLAMA | dict(pad_token_id=0), "smollm3": LIKE_LLAMA | dict(pad_token_id=0),
    "olmo": LIKE_LLAMA, "olmo2": LIKE_LLAMA,
    "gpt2": dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "opt": dict(
        vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16,
        max_position_embeddings=64,
    ),
    "gpt_neox": WIDE, "bloom": dict(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    "falcon": {k: v for k, v in WIDE.items() if k != "intermediate_size"} | dict(ffn_hidden_size=64),
}  # fmt: skip
TYPES = sum(FAMILIES.values(), ())
IDS = [3, 0, 3]
families = pytest.mark.parametrize("kind", TYPES)


def tiny(kind: str) -> nn.Module:
    """A random model in evaluation mode, without dropout, whose weights are large enough to matter."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SETTINGS[kind])
    for name in list(vars(config)):
        if "dropout" in name or name.endswith("pdrop"):
            setattr(config, name, 0.0)
    seq2seq = config.is_encoder_decoder
    auto = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    model = auto.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.15)
    return model.eval()


def adapted(kind: str, **settings) -> nn.Module:
    """With MHR, 2 heads, on the default layers, and adapters that matter."""
    model = tiny(kind)
    torch.manual_seed(1)
    cfg = train.Config(**dict(method="mhr", heads=2, skills=3, rank=2) | settings)
    add_adapters(model, cfg, tasks=5)
    randomise(model)
    return model.eval()


def batch_for(model: nn.Module) -> dict[str, torch.Tensor]:
    """Three examples of seven tokens."""
    x = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(2))
    return {"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x}


def test_each_family_is_tried():
    assert SETTINGS.keys() == set(TYPES) and all(named.keys() == FAMILIES.keys() for named in LAYER_SETS.values())


@families
def test_a_mixed_batch_is_each_example_alone(kind):
    """Outputs and gradients, the latter also with checkpointing; tasks differ."""
    model = adapted(kind)
    batch = batch_for(model)
    alone = torch.cat([logits(model, row(batch, k), [task]) for k, task in enumerate(IDS)])
    assert difference(logits(model, batch, IDS), alone) < 1e-5
    assert difference(logits(model, batch, [0, 0, 3]), alone) > 1e-3
    torch.manual_seed(3)  # of the noise
    whole = gradients(model.train(), batch, IDS)
    assert all(g.abs().max() > 0 for g in whole.values())  # no layer is passed by
    use_checkpointing(model)
    torch.manual_seed(3)
    saving = gradients(model, batch, IDS, inside=False)
    assert max(difference(saving[name], g) for name, g in whole.items()) < 1e-4


@families
def test_the_training_loss_is_the_models_own(kind):
    """Loss and gradients of rows of several lengths; a decoder-only model has no logits before the first output."""
    model = adapted(kind)
    batch = batch_for(model)
    for k, (start, end) in enumerate([(3, 7), (2, 4), (4, 6)]):  # of the output
        batch["attention_mask"][k, end:] = 0
        batch["labels"] = batch["labels"].clone()
        batch["labels"][k, end:] = -100
        if not model.config.is_encoder_decoder:
            batch["labels"][k, :start] = -100
    short = train.only_labelled(model, batch)
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    losses, grads = [], []
    token_loss = partial(train.token_loss, model)
    for loss_of in (lambda: model(**batch).loss, lambda: token_loss(batch), lambda: token_loss(short)):
        with task_ids(IDS):
            losses.append(loss_of())
        grads.append(torch.autograd.grad(losses[-1], list(adapter_parameters(model).values())))
    assert seen == ([7] * 3 if model.config.is_encoder_decoder else [7, 7, 5])
    for loss, own in zip(losses[1:], grads[1:], strict=True):
        torch.testing.assert_close(loss, losses[0])
        for a, b in zip(own, grads[0], strict=True):
            assert difference(a, b) < 1e-5


@families
def test_beams_are_those_of_each_example_alone(kind):
    model = adapted(kind)
    batch = {name: x for name, x in batch_for(model).items() if name != "labels"}
    options = dict(max_new_tokens=5, min_new_tokens=5, num_beams=3, do_sample=False, pad_token_id=0)
    with torch.no_grad(), task_ids(IDS, keep=True):
        together = model.generate(**batch, **options)
    for k, task in enumerate(IDS):
        with torch.no_grad(), task_ids([task], keep=True):
            assert torch.equal(together[k : k + 1], model.generate(**row(batch, k), **options))


@families
def test_merged_saved_and_loaded_it_is_the_same(kind, tmp_path):
    model, other = adapted(kind), adapted(kind)
    batch, path = batch_for(model), str(tmp_path / "adapter.safetensors")
    expected = logits(model, batch, [3] * 3)
    with merged(model, 3), torch.no_grad():
        assert difference(model(**batch).logits, expected) < 1e-5
    save_adapters(model, path)
    for p in adapter_parameters(other).values():
        p.data.zero_()
    load_adapters(other, path)
    assert torch.equal(logits(other, batch, [3] * 3), expected)


@families
def test_which_layers_are_adapted(kind):
    """LoRA: all linears inside blocks (BART: self-attention). Each named set is a part of them; none is an image's."""
    model = tiny(kind)
    names = {name for name, _ in model.named_modules()}
    matched = {named: {n for n in names if re.fullmatch(named_layers(named, kind), n)} for named in LAYER_SETS}
    linears = {n for n in names if re.fullmatch(all_linear(model), n)}
    text = {name for name in linears if "vision" not in name}
    assert "lm_head" in names and not {name for name in linears if "head" in name}
    assert matched["lora"] == {name for name in text if kind != "bart" or ".self_attn." in name}
    for named in LAYER_SETS:
        assert matched[named] and matched[named] <= text
        assert (matched[named] < text) or named == "lora"
    assert matched["self-attention"] <= matched["attention"]


@pytest.mark.parametrize("granularity, number", [("layer", 4), ("block", 2), ("model", 1)])
@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in ("t5", "mt5", "umt5", "bart")])
def test_layers_share_routers(kind, granularity, number):
    """Of two blocks with attention and feed-forward each."""
    assert len(routers(adapted(kind, granularity=granularity))) == number


@families
def test_blocks_are_found(kind):
    """What --shard splits: each adapted layer is in exactly one of them, and no block inside another."""
    model = adapted(kind)
    blocks = blocks_of(model)
    for name in adapted_layers(model):
        assert len([block for block in blocks if name.startswith(f"{block}.")]) == 1
    assert not [name for name in blocks if any(name.startswith(f"{other}.") for other in blocks)]


def test_all_linear_for_an_unknown_model():
    config = transformers.PhiConfig(**WIDE, resid_pdrop=0.0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="no layers of a model of type 'phi' are named here .*known: bart, bloom, .*"):
        add_adapters(model, train.Config(method="poly"), tasks=2)
    with pytest.raises(ValueError, match=r"give --layers all-linear, or a pattern .* '\.\*\\\.\(q_proj\|v_proj\)'"):
        pattern_of("lora", model)
    add_adapters(model, train.Config(method="poly", layers="all-linear"), tasks=2)
    assert len(adapted_layers(model)) == 2 * 6 and "lm_head" not in adapted_layers(model)
    with pytest.raises(ValueError, match="no linear layer in a numbered block"):
        all_linear(nn.Sequential(nn.Linear(2, 2)))


# --- Models whose layers have no names here ---------------------------------------------------------------------------

PLAIN = dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
BART = SETTINGS["bart"]
ELSEWHERE = {  # config.model_type: settings of a tiny model, all of whose linears are adapted
    "phi": WIDE, "gptj": PLAIN | dict(rotary_dim=4), "codegen": PLAIN | dict(rotary_dim=4), "gpt_bigcode": PLAIN,
    "openai-gpt": PLAIN, "mpt": dict(vocab_size=64, d_model=32, n_layers=2, n_heads=4), "granite": LIKE_LLAMA,
    "gpt_neo": dict(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
    ),
    "mixtral": LIKE_LLAMA | dict(num_local_experts=4), "cohere": LIKE_LLAMA | dict(pad_token_id=0),
    "stablelm": LIKE_LLAMA, "starcoder2": LIKE_LLAMA, "nemotron": LIKE_LLAMA,
    "xglm": dict(
        vocab_size=64, d_model=32, ffn_dim=64, num_layers=2, attention_heads=4, max_position_embeddings=64
    ),
    "biogpt": WIDE | dict(max_position_embeddings=64), "rwkv": dict(vocab_size=64, hidden_size=32, num_hidden_layers=2),
    "ctrl": PLAIN | dict(dff=64), "roberta": WIDE | dict(is_decoder=True, max_position_embeddings=66),
    "marian": BART | dict(decoder_start_token_id=0, pad_token_id=0), "pegasus": BART, "mbart": BART, "m2m_100": BART,
    "blenderbot": BART, "longt5": T5, "bigbird_pegasus": BART | dict(attention_type="original_full"),
    "switch_transformers": T5 | dict(num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1),
    "xlnet": dict(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=64),
    "led": {name: value for name, value in BART.items() if name != "max_position_embeddings"} | dict(
        max_encoder_position_embeddings=64, max_decoder_position_embeddings=64, attention_window=4
    ),
    "mamba": dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4),
    "jamba": LIKE_LLAMA | dict(num_experts=2, mamba_d_state=4, use_mamba_kernels=False, pad_token_id=0),
}  # fmt: skip
REFUSED = {  # those in which not every row's task is known, or a layer is not called: when, and what is said
    "led": ("check", "layer .*longformer_self_attn.key_global is never called in training"),
    "switch_transformers": ("check", "layer .*expert_0.* is (called with .* rows for 3 examples|never called)"),
    "xlnet": ("check", "layer .*ff.layer_1 is called with the tokens as its first axis: leave it out"),
    "mamba": ("inject", "layer .*x_proj cannot be adapted, MambaMixer reads its weight: leave it out"),
    "jamba": ("inject", "layer .*x_proj cannot be adapted, JambaMambaMixer reads its weight: leave it out"),
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_all_linears_of_other_models(kind, monkeypatch):
    """A mixed batch is each example alone, or one sentence names the layer in which it would not be."""
    monkeypatch.setitem(SETTINGS, kind, ELSEWHERE[kind])
    when, says = REFUSED.get(kind, ("", ""))
    if when == "inject":
        with pytest.raises(UserError, match=says):
            adapted(kind, method="poly", layers="all-linear")
        return
    model = adapted(kind, method="poly", layers="all-linear")
    batch = {name: x for name, x in batch_for(model).items() if name != "labels"}
    batch |= {"decoder_input_ids": batch["input_ids"]} if model.config.is_encoder_decoder else {}
    if when == "check":
        with pytest.raises(ValueError, match=says):
            check(model, lambda: model(**batch, use_cache=False))
        with pytest.raises(ValueError, match="layer .* was called with .* rows, its model with 3"):
            logits(model, batch, IDS)
        return
    check(model, lambda: model(**batch, use_cache=False))
    alone = torch.cat([logits(model, row(batch, k), [task]) for k, task in enumerate(IDS)])
    assert difference(logits(model, batch, IDS), alone) < 1e-5
    assert difference(logits(model, batch, [0, 0, 3]), alone) > 1e-3
