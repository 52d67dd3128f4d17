"""Models: load a backbone, put a method's adapters in, load a finished run.

`cfg` below is a `train.Config`: its fields backbone, device and precision, and those under "Adapter and routing", say
all that a model depends on.
"""

import dataclasses
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, ByT5Tokenizer, T5Config,
    T5ForConditionalGeneration,
)  # fmt: skip
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from baselines.fixed import FixedRouter, RandomRouter, half_of_skills
from baselines.hyperformer import HyperRouter
from baselines.task_moe import TaskMoERouter
from config import GIVEN, ONE_ADAPTER, RunError, UserError, sync_names
from data import reach_hub
from ia3 import IA3, IA3Linear
from inject import IA3_INPUT_SIDE, LAYER_SETS, adapted_layers, freeze, inject, load_adapters, named_layers, sharing_key
from lora import LoRA, LoRALinear
from mhr import MHRLinear, MHRRouter
from poly import PolyLinear, PolyRouter
from resume import out_of_memory
from sft import SFT, SFTLinear

TINY = Path(__file__).parent / "assets" / "tiny"
SINGLE = {"lora": LoRALinear, "ia3": IA3Linear, "sft": SFTLinear}  # a layer with one adapter, by --adapter


def pick_device(device: str) -> str:
    """auto: cuda where torch sees a GPU, else cpu."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def make_deterministic():
    """--deterministic: on CUDA too, two runs on one machine have the same bits. Call it before CUDA starts.

    Else some sums are taken in any order: the gradient of a task's weights over its examples in a mixed batch, and the
    gradients of fused attention. This makes torch take slower algorithms that have one order, and cuBLAS a workspace of
    its own for each stream. An operation without such an algorithm raises a RuntimeError, which
    `resume.advice_on_memory` turns into one sentence.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it when it starts; torch refuses to work without
    torch.use_deterministic_algorithms(True)


def load_backbone(name: str, device: str, precision: str = "fp32", encoder: bool = False):
    """A model and its tokenizer: "tiny", "scratch", a hub name, or a folder with a model or one GGUF file.

    precision: fp32 or bf16, in which the weights are held. encoder: any model that makes hidden states will do (for
    AdapterSoup); it may have no language-model head. Raises UserError if there is no such model, if its weights are not
    all there and finite, if it brings code of its own to run, or if CUDA is asked for and absent; RunError if it is
    larger than memory.
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
    options["trust_remote_code"] = False  # loading a file never runs code
    try:
        config = AutoConfig.from_pretrained(source, **options)
        refuse_endless(config.to_dict() | get_tokenizer_config(source))
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        loader = AutoModel if encoder else auto
        model, info = loader.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
        if missing := sorted(info["missing_keys"]) if not encoder else []:  # an encoder may lack its head
            raise ValueError(f"its file has no {missing[0]}, which would be random")
        if broken := [name for name, p in model.named_parameters() if not p.isfinite().all()]:
            raise ValueError(f"its {broken[0]} has values that are not finite")
        refuse_integers(Path(source))
        if unused := sorted(info.get("unexpected_keys", ())) if not encoder else []:
            print(f"{name}: {len(unused)} of its weights are not used, as {unused[0]}: see that its config.json fits")
        if getattr(model, "hf_quantizer", None):  # of a GGUF file: its weights are plain now, also when saved again
            model.hf_quantizer.remove_quantization_config(model)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        return model.to(device), tokenizer
    except Exception as error:  # a file can be broken in any way, and each loader then fails in its own
        flag = "--encoder" if encoder else "--backbone"
        if out_of_memory(error):
            raise RunError(f"there is not enough memory to load {flag} {name}: use one that is smaller") from None
        reason = reason_of(error)
        if "trust_remote_code" in str(error):
            reason = "it asks to run code of its own, which is never done here"
        raise UserError(f"{flag} {name} cannot be loaded: {reason} ({flag} tiny is bundled)") from None


def reason_of(error: Exception) -> str:
    """What a library's error says in its first line, and in the next where that ends with a colon."""
    return (re.sub(r":\s+", ": ", str(error).strip()) or type(error).__name__).splitlines()[0]


def refuse_endless(settings: dict):
    """Raise ValueError for a number of layers or extra tokens in a backbone's files that no model has: the loaders
    would make one after the other until memory is full."""
    for name, value in settings.items():
        if re.search("layers?$|^extra_ids$", name) and isinstance(value, int | float) and value > 10_000:
            raise ValueError(f"its {name} is more than 10,000")


def refuse_integers(folder: Path):
    """Raise ValueError for weights that a folder's files store as integers: read as they are they mean nothing."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                if name.endswith(".weight") and (kind := file.get_slice(name).get_dtype())[0] in "IU":
                    raise ValueError(f"its {name} is stored as {kind}, not as a float")


LARGE = {  # the recipes' backbones: parameters in billions
    "google/t5-xl-lm-adapt": 2.8, "google/t5-xxl-lm-adapt": 11.1, "bigscience/T0_3B": 2.8, "bigscience/T0": 11.1,
}  # fmt: skip


def warn_if_too_large(cfg):
    """Say at once, before minutes of loading, what a backbone of billions needs and what to use instead."""
    if billions := LARGE.get(cfg.backbone) if cfg.device == "cpu" else None:
        size = 2 if cfg.precision == "bf16" else 4
        print(
            f"{cfg.backbone} has {billions} billion parameters, {billions * size:.0f} GB in {cfg.precision}, and is "
            "meant for a GPU with at least twice that; here there is none. To try the program here: --backbone tiny"
        )


def save_backbone(model: nn.Module, tokenizer, folder: Path):
    """Save a whole model as a Hugging Face folder, under another name first: the folder is there whole or not at all.

    Raises OSError if it cannot be written.
    """
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


@contextmanager
def whole_folder(folder: Path):
    """Write a folder under the name that this yields: it is then synced to the disk and renamed, over an older one.

    Raises OSError if it cannot be written; the older one stays.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        sync_names(folder.parent)
    except (OSError, SafetensorError) as error:  # SafetensorError: how safetensors calls a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        number, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or str(error)
        raise OSError(number, f"cannot be written: {reason}", str(folder)) from None


def tiny_from_scratch() -> T5ForConditionalGeneration:
    """The tiny byte-level T5 v1.1 with random weights: 3 + 3 layers, d_model 128, d_ff 256, 4 heads of 32."""
    config = T5Config(
        vocab_size=384, d_model=128, d_kv=32, d_ff=256, num_layers=3, num_heads=4, attn_implementation="eager",
        feed_forward_proj="gated-gelu_pytorch_tanh", relative_attention_max_distance=32, dropout_rate=0.0,
        tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)  # whatever the run's seed: an adapter trained on it must meet the same one when loaded
        return T5ForConditionalGeneration(config)


def build_model(cfg, tasks: int, table: Tensor | None = None):
    """Load the backbone and put the method's adapters in: (model, tokenizer). tasks, table: see `make_router`.

    Raises UserError if the settings do not fit the backbone; the sentence names the layer.
    """
    model, tokenizer = load_backbone(cfg.backbone, cfg.device, cfg.precision)
    if cfg.method != "full":
        add_adapters(model, cfg, tasks, table)
    return model.to(cfg.device), tokenizer


def add_adapters(model: nn.Module, cfg, tasks: int, table: Tensor | None = None):
    """Freeze a backbone and put the method's adapters in. Raises UserError as `build_model`."""
    freeze(model)
    shared = {}  # layers of one key share one router: this is all that granularity is

    def make_layer(name: str, linear: nn.Module) -> nn.Module:
        """The adapted layer that takes the place of `linear`, for `inject`."""
        adapter = make_adapter(cfg, name)
        if cfg.method in ONE_ADAPTER:
            return SINGLE[cfg.adapter](linear, adapter)
        key = "model" if cfg.method in GIVEN else sharing_key(name, cfg.granularity)  # a given table is one for all
        if key not in shared:
            shared[key] = make_router(cfg, tasks, table)
        return (MHRLinear if cfg.method == "mhr" else PolyLinear)(linear, adapter, shared[key])

    try:
        named = cfg.layers in LAYER_SETS or not cfg.layers
        default = "ia3" if cfg.adapter == "ia3" else "lora"  # an SFT changes the layers that LoRA would
        layers = named_layers(cfg.layers or default, model.config.model_type) if named else cfg.layers
        inject(model, make_layer, layers)
    except ValueError as error:
        layers = f" --layers {cfg.layers}" if cfg.layers else ""
        raise UserError(f"--method {cfg.method} --backbone {cfg.backbone}{layers}: {error}") from None


def make_adapter(cfg, name: str):
    """The adapter (--adapter) of the layer of this name."""
    if cfg.adapter == "ia3":
        return IA3("in" if name.endswith(IA3_INPUT_SIDE) else "out")
    return SFT(cfg.density) if cfg.adapter == "sft" else LoRA(cfg.rank)


def make_router(cfg, tasks: int, table: Tensor | None = None) -> nn.Module:
    """A fresh router of a routed method for this many tasks. table (t, s): the allocation, where the method has it
    given; None: each task uses all skills alike, until a file is loaded. Raises ValueError for settings out of range.
    """
    if cfg.method == "poly":
        return PolyRouter(tasks, cfg.skills, cfg.routing)
    if cfg.method == "mhr":
        return MHRRouter(tasks, cfg.skills, cfg.heads, cfg.routing)
    if cfg.method == "task-moe":
        return TaskMoERouter(tasks, cfg.skills, cfg.top_k)
    if cfg.method == "hyperformer":
        return HyperRouter(tasks, cfg.skills)
    if cfg.method == "random" and cfg.random_by == "example":
        return RandomRouter(tasks, cfg.skills)
    if cfg.method == "random":
        return FixedRouter(half_of_skills(tasks, cfg.skills))
    return FixedRouter(torch.ones(tasks, cfg.skills) if table is None else table)


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


def collapse(model: nn.Module, adapter: str, params_of):
    """Replace every routed layer by one with the single adapter params_of(layer): {name: (...)}, or None for a fresh
    one. Routing is gone."""
    for name, layer in adapted_layers(model).items():
        if hasattr(layer, "router"):
            model.set_submodule(name, SINGLE[adapter](layer.linear, layer.adapter, params_of(layer)))


def average_skills(model: nn.Module, adapter: str):
    """mu: `collapse` to the average of each layer's skills."""
    collapse(model, adapter, lambda layer: layer.average_skills())
