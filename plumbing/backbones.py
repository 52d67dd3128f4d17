"""Backbones: load one, or refuse it with a reason; save one; what a machine's device and memory allow."""

import math
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, ByT5Tokenizer, T5Config,
    T5ForConditionalGeneration,
)  # fmt: skip
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.logging import disable_progress_bar

from plumbing.errors import RunError, UserError
from plumbing.folders import whole_folder
from plumbing.large import in_four_bits

TINY = Path(__file__).resolve().parents[1] / "assets" / "tiny"

# --- The machine ------------------------------------------------------------------------------------------------------


def pick_device(device: str) -> str:
    """auto: cuda where torch sees a GPU, else cpu."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def make_deterministic():
    """--deterministic: two runs on one machine are bit-identical, also on CUDA. Call it before CUDA starts.

    By default CUDA adds some terms in any order: the gradient of a task's weights over its examples in a mixed batch,
    and the gradients of fused attention. This makes torch use slower algorithms with a fixed order, and cuBLAS a
    workspace for each stream. An operation without such an algorithm raises a RuntimeError, which `advice_on_memory`
    turns into one sentence.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it when it starts; torch demands it
    torch.use_deterministic_algorithms(True)


NO_MEMORY = (  # in a RuntimeError of torch: two on a CPU, then on CUDA outside torch's own allocator
    "can't allocate memory|Storage size calculation overflowed|CUDA error: out of memory|_STATUS_ALLOC_FAILED"
)


def out_of_memory(error: Exception) -> bool:
    """Whether this is what running out of memory looks like."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(re.search(NO_MEMORY, str(error)))


@contextmanager
def advice_on_memory(advice: str, then: str = ", and --resume"):
    """Turn running out of memory into a RunError that says what to try (advice) and what to do then.

    The same for an operation that --deterministic does not allow.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if "does not have a deterministic implementation" in str(error):
            operation = str(error).split()[0]
            raise RunError(f"--deterministic: {operation} has no deterministic form, leave the flag out") from None
        if out_of_memory(error):
            raise RunError(f"there is not enough memory: try {advice}{then}") from None
        raise


# --- Loading and saving -----------------------------------------------------------------------------------------------


def load_backbone(name: str, device: str, precision: str = "fp32", encoder: bool = False):
    """A model and its tokenizer: "tiny", "scratch", a hub name, or a folder with a model or one GGUF file.

    precision: fp32 or bf16, the type of the weights; nf4: `large.in_four_bits`; auto: the checkpoint's own type, with
    its files mapped into memory if they can be. encoder: any model that computes hidden states is accepted (for
    AdapterSoup), even without a language-model head. Raises UserError if there is no such model, if weights are missing
    or not finite, if it wants to run code of its own, or if there is no GPU for cuda; RunError if memory is too small.
    """
    for kind, there in (("cuda", torch.cuda), ("mps", torch.mps)):
        if device == kind and not there.is_available():
            what = "CUDA GPU" if kind == "cuda" else "GPU of Apple's"
            raise UserError(f"--device {kind}: torch sees no {what} here, use --device cpu")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(precision, "auto")
    if name == "scratch":
        return tiny_from_scratch().to(device, None if dtype == "auto" else dtype), ByT5Tokenizer()
    source = str(TINY) if name == "tiny" else name
    if name == "tiny" or not sys.stderr.isatty():
        disable_progress_bar()  # transformers' own
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
        if dtype == "auto":
            config.dtype = None  # the type is that of the files, whatever config.json says
            options["config"] = config
        model, info = loader.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
        if missing := sorted(info["missing_keys"]) if not encoder else []:  # an encoder may lack its head
            raise ValueError(f"its file has no {missing[0]}, which would be random")
        if broken := [name for name, p in model.named_parameters() if p.numel() and not all_finite(p)]:
            raise ValueError(f"its {broken[0]} has values that are not finite")
        refuse_integers(Path(source))
        if unused := sorted(info.get("unexpected_keys", ())) if not encoder else []:
            print(f"{name}: {len(unused)} of its weights are not used, as {unused[0]}: see that its config.json fits")
        if getattr(model, "hf_quantizer", None):  # of a GGUF file: its weights are plain now, also when saved again
            model.hf_quantizer.remove_quantization_config(model)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if precision == "nf4":
            model = in_four_bits(model, loader, source, device, **options)
        return model.to(device), tokenizer
    except Exception as error:  # a damaged file makes each loader fail in its own way
        flag = "encoder" if encoder else "--backbone"
        if out_of_memory(error):
            ways = "one that is smaller, --precision nf4, or several processes with --shard"
            raise RunError(f"there is not enough memory to load {flag} {name}: use {ways}") from None
        reason = reason_of(error)
        if "trust_remote_code" in str(error):
            reason = "it asks to run code of its own, which is never allowed here"
        raise UserError(f"{flag} {name} cannot be loaded: {reason} ({flag} tiny is bundled)") from None


def refuse_unfit(model: nn.Module, tokenizer, cfg):
    """Raise UserError for a backbone and tokenizer that cannot do what a `train.Config` asks, or not rightly."""
    where, encoder_decoder = f"--backbone {cfg.backbone}", model.config.is_encoder_decoder
    if tokenizer.eos_token_id is None:
        raise UserError(f"{where}: its tokenizer has no end token, so no output would end: use another backbone")
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(f"{where}: its tokenizer has {len(tokenizer):,} tokens, its model {rows:,}: they do not fit")
    if encoder_decoder and tokenizer.eos_token_id not in tokenizer(text_target="a").input_ids:
        raise UserError(f"{where}: its tokenizer does not write its end token, so no output would end: use another one")
    for name in ("decoder_start_token_id", "pad_token_id") if encoder_decoder else ():
        if getattr(model.config, name, None) is None:
            raise UserError(f"{where}: its config.json has no {name}, with which its outputs would begin: add it")
    for name, positions in tables_of_positions(model).items():
        both = f"--max-input {cfg.max_input} and --max-output {cfg.max_output}"
        flags, length = (both, cfg.max_input + cfg.max_output) if not encoder_decoder else (
            (f"--max-output {cfg.max_output}", cfg.max_output) if "decoder" in name
            else (f"--max-input {cfg.max_input}", cfg.max_input)
        )  # fmt: skip
        if length > positions:
            raise UserError(f"{where} has {positions:,} positions, fewer than {flags}: give less")


def tables_of_positions(model: nn.Module) -> dict[str, int]:
    """The tables of absolute positions in a model: {name: how many positions}."""
    tables = {}
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and (last == "wpe" or "position" in last) and "relative" not in last:
            first = getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
            tables[name] = module.num_embeddings - first
        if isinstance(positions := getattr(module, "embed_positions", None), torch.Tensor):  # GPT-J's, CodeGen's
            tables[f"{name}.embed_positions"] = len(positions)
    if most := getattr(model.config, "max_seq_len", 0):  # MPT's
        tables["max_seq_len"] = most
    return tables


@torch.no_grad()
def all_finite(p: torch.Tensor) -> bool:
    """Whether all values are finite; their extremes tell, and take no copy of a large weight."""
    return all(math.isfinite(extreme) for extreme in p.aminmax())


def reason_of(error: Exception) -> str:
    """The first line of a library's error, joined with the next one if it ends with a colon."""
    return (re.sub(r":\s+", ": ", str(error).strip()) or type(error).__name__).splitlines()[0]


def refuse_endless(settings: dict):
    """Raise ValueError for an impossible number of layers or extra tokens in a backbone's config.

    The loaders would create one after the other until memory is full.
    """
    for name, value in settings.items():
        if re.search("layers?$|^extra_ids$", name) and isinstance(value, int | float) and value > 10_000:
            raise ValueError(f"its {name} is more than 10,000")


def refuse_integers(folder: Path):
    """Raise ValueError for weights that a folder's files store as integers: without their scale they mean nothing."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                if name.endswith(".weight") and (kind := file.get_slice(name).get_dtype())[0] in "IU":
                    raise ValueError(f"its {name} is stored as {kind}, not as a float")


LARGE = {  # the recipes' backbones: parameters in billions
    "google/t5-xl-lm-adapt": 2.8, "google/t5-xxl-lm-adapt": 11.1, "bigscience/T0_3B": 2.8, "bigscience/T0": 11.1,
}  # fmt: skip


def warn_if_too_large(cfg):
    """Say what a backbone of billions of parameters needs, before minutes of loading it on a CPU."""
    if billions := LARGE.get(cfg.backbone) if cfg.device == "cpu" else None:
        size = {"fp32": 4, "bf16": 2, "nf4": 0.8}[cfg.precision]  # nf4: of T5, whose wo has 2 bytes
        print(
            f"{cfg.backbone} has {billions} billion parameters, {billions * size:.0f} GB in {cfg.precision}, and is "
            "meant for a GPU with at least twice that; there is none here. To try the program: --backbone tiny"
        )


def save_backbone(model: nn.Module, tokenizer, folder: Path):
    """Save a model as a Hugging Face folder, whole or not at all. Raises OSError if it cannot be written."""
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def tiny_from_scratch() -> T5ForConditionalGeneration:
    """The tiny byte-level T5 v1.1 with random weights: 3 + 3 layers, d_model 128, d_ff 256, 4 heads of 32."""
    config = T5Config(
        vocab_size=384, d_model=128, d_kv=32, d_ff=256, num_layers=3, num_heads=4, attn_implementation="eager",
        feed_forward_proj="gated-gelu_pytorch_tanh", relative_attention_max_distance=32, dropout_rate=0.0,
        tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)  # not the run's seed: an adapter must find the same backbone when it is loaded
        return T5ForConditionalGeneration(config)


def reach_hub():
    """Ask once, for at most 5 seconds, whether the hub answers; if not, use only the cache from now on.

    The libraries would ask again for every file, for 20 seconds and more.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # on any network error, fall back to the cache; the loaders then name what is missing
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:  # it has copied the setting
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
