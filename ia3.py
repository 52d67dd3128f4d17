"""(IA)^3: multiply activations by a learned vector.

Paper: Liu et al. 2022 [1] section 3.3; MHR paper [2] section 2.1, equation "IA3":
    h^{k,v} = l^{k,v} * (W0^{k,v} x)          keys and values: the OUTPUT of a linear layer is scaled
    h^f     = (l^f * gamma(W1^f x)) W2^f      feed-forward: the INPUT of the second layer is scaled

Unlike `lora.py`: one vector per layer instead of two thin matrices. The rest of the file is the same, in the same
order.

Shape key, the same in every file:
    b examples, l sequence length, i in_features, o out_features, r rank,
    t tasks, s skills in the inventory, h heads;  d = i/h, e = o/h.

Deviations:
* We store v = l - 1, which starts at zero, where the paper stores l, which starts at one. The same function wherever
  mixing weights sum to one: sum_j w_j (1 + v_j) = 1 + sum_j w_j v_j. But the mixture of fresh skills is now exactly 1
  (a sum of rounded weights is not), and weight decay pulls towards the backbone, not towards zero. Where they do not
  sum to one (HyperFormer; straight-through and random with no skill on) we have 1 + sum_j w_j v_j, so never a layer
  that is scaled to zero because no skill is on.
* The authors scale the output of T5's `wi_1`. Scaling the input of `wo` is the same product, since the input is
  gamma(wi_0 x) * (wi_1 x), and is also right for feed-forward layers without a gate (BART, T5 1.0).

[1] https://arxiv.org/abs/2205.05638   [2] https://arxiv.org/abs/2211.03831
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class IA3:
    """The scaling adapter: which parameter it has and how it changes one linear layer.

    side: "out" scales the layer's output (keys, values), "in" its input (second feed-forward layer).
    feature_axis: for each parameter, the axis that MHR (section 3) cuts into heads.
    """

    side: str = "out"

    feature_axis = {"v": 0}

    def __post_init__(self):
        if self.side not in ("in", "out"):
            raise ValueError(f'side must be "in" or "out", not {self.side!r}')

    def init(self, linear: nn.Linear) -> dict[str, Tensor]:
        """Fresh float32 parameter of one adapter: v, zero, (o,) for side "out" and (i,) for side "in"."""
        size = linear.out_features if self.side == "out" else linear.in_features
        return {"v": torch.zeros(size, dtype=torch.float32, device=linear.weight.device)}

    def apply(self, linear: nn.Linear, x: Tensor, v: Tensor) -> Tensor:
        """y = (1 + v) * (x W0^T + bias), or y = ((1 + v) * x) W0^T + bias for side "in".

        x (b, l, i). Either one adapter for all rows, v (o,), or one per example, v (b, o); (i,) and (b, i) for
        side "in". Returns (b, l, o).
        """
        scale = (1 + v).unsqueeze(-2)  # (1, o) or (b, 1, o): the same for every position of an example
        if self.side == "in":
            return linear(x * scale.to(x.dtype))
        y = linear(x)
        return y * scale.to(y.dtype)

    def merge(self, weight: Tensor, bias: Tensor | None, v: Tensor):
        """The weight (o, i), a new tensor, and bias (o,) that do the same."""
        scale = 1 + v  # float32: a bfloat16 weight is rounded once, at the end
        if self.side == "in":
            return (weight * scale).to(weight.dtype), bias
        bias = None if bias is None else (bias * scale).to(bias.dtype)
        return (weight * scale[:, None]).to(weight.dtype), bias


class IA3Linear(nn.Module):
    """A frozen linear layer with one (IA)^3. Takes and returns what the linear layer does, (b, l, i) -> (b, l, o).

    linear: the layer to adapt; it is kept, not copied. adapter: the `IA3`.
    params: its v; None starts afresh.
    """

    def __init__(self, linear: nn.Linear, adapter: IA3 = IA3(), params: dict[str, Tensor] | None = None):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.adapter = adapter
        self.params = nn.ParameterDict(adapter.init(linear) if params is None else params)

    # T5 reads `self.wo.weight` inside its own forward: an adapted layer still answers like a linear one.
    weight = property(lambda self: self.linear.weight)
    bias = property(lambda self: self.linear.bias)
    in_features = property(lambda self: self.linear.in_features)
    out_features = property(lambda self: self.linear.out_features)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_features} -> {self.out_features}, {self.adapter})"

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter.apply(self.linear, x, **self.params)

    @torch.no_grad()
    def merged(self, task: int = 0) -> nn.Linear:
        """A plain linear layer equal to this one (`task` is ignored: there is one adapter for all)."""
        weight, bias = self.adapter.merge(self.linear.weight, self.linear.bias, **self.params)
        plain = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)
        return plain
