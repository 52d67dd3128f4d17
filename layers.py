"""Which layers of a backbone are adapted, and which of them share a router. Names alone, nothing is loaded.

    LORA_LAYERS["t5"]                    what LoRA adapts in a T5 by default: a pattern for `inject.inject`
    pattern_of("light", model)           the pattern of a named set in any known model; `all-linear` in all others
    sharing_key(name, "block")           layers with the same key share a router

A family is a group of models with the same module names (FAMILIES).
"""

import re

from torch import nn

FAMILIES = {  # family: the values of `model.config.model_type` that belong to it
    "t5": ("t5", "mt5", "umt5"),
    "bart": ("bart",),
    "llama": (
        "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text", "phi3", "smollm3", "olmo",
        "olmo2",
    ),
    "gpt2": ("gpt2",),
    "opt": ("opt",),
    "gpt_neox": ("gpt_neox", "bloom", "falcon"),
}  # fmt: skip
TEXT = r"(?!.*vision).*\."  # Gemma 3 has layers of the same names for images

# What LoRA adapts by default. T5: all linears of attention and feed-forward: MHR's 2.2M parameters are those of all
# seven, though its text says q, k, v, o of self-attention. BART: self-attention (Polytropon section 2.4, appendix A.2).
# The others: T5's choice. Phi-3 has one layer for queries, keys and values, and one for gate and up.
LORA_LAYERS = {
    "t5": r".*\.(SelfAttention|EncDecAttention|DenseReluDense)\.(q|k|v|o|wi|wi_0|wi_1|wo)",
    "bart": r".*\.self_attn\.(q|k|v|out)_proj",
    "llama": TEXT + r"(self_attn|mlp)\.(q|k|v|qkv|o|gate|up|gate_up|down)_proj",
    "gpt2": r".*\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)",
    "opt": r".*\.self_attn\.(q|k|v|out)_proj|.*\.fc[12]",
    "gpt_neox": r".*attention\.(query_key_value|dense)|.*\.mlp\.(dense_h_to_4h|dense_4h_to_h)",
}
# Which layers (IA)^3 scales: keys and values at their output, the second feed-forward layer at its input. Where
# queries, keys and values are one layer, it is scaled whole, as PEFT does.
IA3_LAYERS = {
    "t5": r".*\.(SelfAttention|EncDecAttention)\.(k|v)|.*\.DenseReluDense\.wo",
    "bart": r".*_attn\.(k|v)_proj|.*\.fc2",
    "llama": TEXT + r"(self_attn\.(k|v|qkv)_proj|mlp\.down_proj)",
    "gpt2": r".*\.attn\.c_attn|.*\.mlp\.c_proj",
    "opt": r".*_attn\.(k|v)_proj|.*\.fc2",
    "gpt_neox": r".*attention\.query_key_value|.*\.mlp\.dense_4h_to_h",
}
IA3_INPUT_SIDE = ("wo", "fc2", "down_proj", "mlp.c_proj", "dense_4h_to_h")  # whose input, not output, is scaled
# Other sets that the papers use, by name. "light": keys, values and one linear of the feed-forward layer (MHR table 6,
# "k|v|wi_1" in the authors' files). "attention": q, k, v and o of all attention. "self-attention": the same without
# cross-attention.
LIGHT_LAYERS = {
    "t5": r".*\.(SelfAttention|EncDecAttention)\.(k|v)|.*\.DenseReluDense\.(wi|wi_1)",
    "bart": r".*_attn\.(k|v)_proj|.*\.fc1",
    "llama": TEXT + r"(self_attn\.(k|v|qkv)_proj|mlp\.(up|gate_up)_proj)",
    "gpt2": r".*\.attn\.c_attn|.*\.mlp\.c_fc",
    "opt": r".*_attn\.(k|v)_proj|.*\.fc1",
    "gpt_neox": r".*attention\.query_key_value|.*\.mlp\.dense_h_to_4h",
}
ATTENTION_LAYERS = {
    "t5": r".*\.(SelfAttention|EncDecAttention)\.(q|k|v|o)",
    "bart": r".*_attn\.(q|k|v|out)_proj",
    "llama": TEXT + r"self_attn\.(q|k|v|qkv|o)_proj",
    "gpt2": r".*\.attn\.(c_attn|c_proj)",
    "opt": r".*\.self_attn\.(q|k|v|out)_proj",
    "gpt_neox": r".*attention\.(query_key_value|dense)",
}
SELF_ATTENTION_LAYERS = ATTENTION_LAYERS | {
    "t5": r".*\.SelfAttention\.(q|k|v|o)",
    "bart": r".*\.self_attn\.(q|k|v|out)_proj",
}
LAYER_SETS = {
    "lora": LORA_LAYERS,
    "ia3": IA3_LAYERS,
    "light": LIGHT_LAYERS,
    "attention": ATTENTION_LAYERS,
    "self-attention": SELF_ATTENTION_LAYERS,
}


def named_layers(name: str, model_type: str) -> str:
    """The pattern of a named set of layers (a key of LAYER_SETS) in a model of `model_type` (config.model_type).

    "lora" and "ia3" are what these adapters change by default. Raises ValueError for an unknown name or model type.
    """
    if name not in LAYER_SETS:
        raise ValueError(f"no set of layers is called {name!r}: choose {', '.join(LAYER_SETS)}")
    for family, members in FAMILIES.items():
        if model_type in members:
            return LAYER_SETS[name][family]
    known = ", ".join(sorted(sum(FAMILIES.values(), ())))
    raise ValueError(
        rf"no layers of a model of type {model_type!r} are named here (known: {known}): give --layers all-linear, or "
        r"a pattern of their names such as --layers '.*\.(q_proj|v_proj)'"
    )


def pattern_of(layers: str, model: nn.Module) -> str:
    """--layers as a pattern for `inject`: a named set, "all-linear", or the pattern that it is."""
    if layers == "all-linear":
        return all_linear(model)
    if layers not in LAYER_SETS:
        return layers
    return named_layers(layers, getattr(getattr(model, "config", None), "model_type", None))


def all_linear(model: nn.Module) -> str:
    """A pattern of every linear layer inside the numbered blocks of a model: never its head. ValueError: none."""
    names = [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and re.search(r"\.\d+\.", name)
    ]
    if not names:
        raise ValueError("--layers all-linear: this model has no linear layer in a numbered block")
    return "|".join(map(re.escape, names))


GRANULARITIES, BLOCKS = ("linear", "layer", "block", "coder", "model"), r"blocks-([1-9]\d{0,3})"


def sharing_key(name: str, granularity: str) -> str:
    """Layers of the same key share one router (MHR section 3, "Routing Granularity", and appendix A.2.1).

    linear: every linear layer its own. layer: an attention or feed-forward sub-layer. block: a Transformer block.
    blocks-N: N such blocks in a row (MHR's "for every block of layers"). coder: encoder or decoder (a decoder-only
    model has one). model: all. By module structure: a block is what is numbered first in the name, a sub-layer the
    module that the linear is in (BART's fc1 and fc2, which are in the block itself, are one).
    Raises ValueError for an unknown granularity, or a layer outside all blocks.
    """
    several = re.fullmatch(BLOCKS, granularity)
    if granularity not in GRANULARITIES and not several:
        raise ValueError(f"unknown granularity {granularity!r}: choose {', '.join(GRANULARITIES)} or blocks-N")
    parts = name.split(".")
    depth = next((k for k, part in enumerate(parts) if part.isdecimal()), None)
    if depth is None and granularity != "linear":
        raise ValueError(f"layer {name} is in no numbered block: use --granularity linear")
    if granularity == "linear":
        return name
    if granularity == "model":
        return "model"
    if granularity == "coder":
        return next((part for part in parts[:depth] if part in ("encoder", "decoder")), "model")
    if several:
        return ".".join([*parts[:depth], f"{int(parts[depth]) // int(several[1])}x{several[1]}"])
    block, around = ".".join(parts[: depth + 1]), ".".join(parts[:-1])
    return block if granularity == "block" else f"{block}.ff" if around == block else around
