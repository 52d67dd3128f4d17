"""Models: load a backbone, put a method's adapters in, load a finished run.

`cfg` below is a `train.Config`: its fields backbone, device, precision, method, adapter, layers, rank, skills, heads
and routing say all that a model depends on.
"""

import dataclasses
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, ByT5Tokenizer, T5Config,
    T5ForConditionalGeneration,
)  # fmt: skip

from config import UserError
from data import reach_hub
from ia3 import IA3, IA3Linear
from inject import IA3_INPUT_SIDE, LAYER_SETS, adapted_layers, freeze, inject, load_adapters, named_layers
from lora import LoRA, LoRALinear
from mhr import MHRLinear, MHRRouter
from poly import PolyLinear, PolyRouter

TINY = Path(__file__).parent / "assets" / "tiny"
SINGLE = {"lora": LoRALinear, "ia3": IA3Linear}  # a layer with one adapter, by --adapter


def load_backbone(name: str, device: str, precision: str = "fp32"):
    """A model and its tokenizer: "tiny", "scratch", a hub name, or a folder with a model or one GGUF file.

    precision: fp32 or bf16, in which the weights are held. Raises UserError if there is no such model, or CUDA is asked
    for and absent.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA GPU here, use --device cpu")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if name == "scratch":
        return tiny_from_scratch().to(device, dtype), ByT5Tokenizer()
    source = str(TINY) if name == "tiny" else name
    if not Path(source).is_dir():
        reach_hub()
    gguf = sorted(Path(source).glob("*.gguf")) if Path(source).is_dir() else []
    options = {"gguf_file": gguf[0].name} if gguf and not (Path(source) / "config.json").exists() else {}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = auto.from_pretrained(source, dtype=dtype, **options)
        return model.to(device), AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--backbone {name} cannot be loaded: {reason} (--backbone tiny is bundled)") from None


def tiny_from_scratch() -> T5ForConditionalGeneration:
    """The tiny byte-level T5 v1.1 with random weights: 3 + 3 layers, d_model 128, d_ff 256, 4 heads of 32."""
    config = T5Config(
        vocab_size=384, d_model=128, d_kv=32, d_ff=256, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu",
        relative_attention_max_distance=32, dropout_rate=0.0, tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)  # whatever the run's seed: an adapter trained on it must meet the same one when loaded
        return T5ForConditionalGeneration(config)


def build_model(cfg, tasks: int):
    """Load the backbone and put the method's adapters in: (model, tokenizer). tasks: rows of Z.

    Raises UserError if the settings do not fit the backbone; the sentence names the layer.
    """
    model, tokenizer = load_backbone(cfg.backbone, cfg.device, cfg.precision)
    if cfg.method == "full":
        return model, tokenizer
    freeze(model)

    def make_layer(name: str, linear: nn.Module) -> nn.Module:
        """The adapted layer that takes the place of `linear`, for `inject`."""
        side = "in" if name.endswith(IA3_INPUT_SIDE) else "out"
        spec = IA3(side) if cfg.adapter == "ia3" else LoRA(cfg.rank)
        if cfg.method == "poly":  # one router per layer: the papers' finest granularity
            return PolyLinear(linear, spec, PolyRouter(tasks, cfg.skills, cfg.routing))
        if cfg.method == "mhr":
            return MHRLinear(linear, spec, MHRRouter(tasks, cfg.skills, cfg.heads, cfg.routing))
        return SINGLE[cfg.adapter](linear, spec)

    try:
        named = cfg.layers in LAYER_SETS or not cfg.layers
        layers = named_layers(cfg.layers or cfg.adapter, model.config.model_type) if named else cfg.layers
        inject(model, make_layer, layers)
    except ValueError as error:
        layers = f" --layers {cfg.layers}" if cfg.layers else ""
        raise UserError(f"--method {cfg.method} --backbone {cfg.backbone}{layers}: {error}") from None
    return model.to(cfg.device), tokenizer


def load_run(folder: Path, cfg):
    """A pre-trained run as it was saved: (model, tokenizer). cfg: its Config.

    Raises UserError if the run has not finished, or its file does not fit the backbone.
    """
    saved = folder / ("backbone" if cfg.method == "full" else "adapter.safetensors")
    if not saved.exists():
        raise UserError(f"{folder} has no {saved.name}: its training has not finished")
    if cfg.method == "full":
        return build_model(dataclasses.replace(cfg, backbone=str(saved)), tasks=1)
    model, tokenizer = build_model(cfg, tasks=1)  # routers then take the file's number of tasks
    load_adapter_file(model, saved)
    return model, tokenizer


def load_adapter_file(model: nn.Module, path: Path):
    """`inject.load_adapters`, with a UserError where the file does not fit."""
    try:
        load_adapters(model, str(path))
    except ValueError as error:
        raise UserError(str(error)) from None


def average_skills(model: nn.Module, adapter: str):
    """mu: replace every routed layer by one with a single adapter, the average of its skills. Routing is gone."""
    for name, layer in adapted_layers(model).items():
        if hasattr(layer, "router"):
            model.set_submodule(name, SINGLE[adapter](layer.linear, layer.adapter, layer.average_skills()))
