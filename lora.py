"""LoRA: a low-rank update beside a frozen linear layer, y + scale * (x @ A) @ B for the layer's output y.

Paper: Hu et al. 2021 [1]; MHR paper [2] section 2.1, equation "LoRA":  y = W0 x + alpha * A B^T x.

Two things live here, and the same two in `ia3.py`; last, `AddLowRank`, the sum above in a faster form:

* `LoRA`        what an ADAPTER is: the shapes and initial values of its parameters, and one pure function that
                applies them to one linear layer. It holds no tensors, so `poly.py` and `mhr.py` can stack,
                mix and apply the parameters of many adapters with it.
* `LoRALinear`  one frozen linear layer with ONE adapter: the method "lora", one adapter for all tasks, and
                what is left of Poly and MHR once their skills are averaged (mu).

Shape key, the same in every file:
    b examples, l sequence length, i in_features, o out_features, r rank,
    t tasks, s skills in the inventory, h heads;  d = i/h, e = o/h.

Orientation: x is a row vector, so A is (i, r), B is (r, o) and the update is (x A) B. Hu et al. and PEFT's LoRA
store both transposed: (r, i) and (o, r).

Names: the two routing papers swap Hu et al.'s letters, which the authors' code and this file keep:

    here: (x A) B                     MHR [2]: A B^T x     Polytropon eq. 4: A B x
    A (i, r), at the input, random    B                    B^T
    B (r, o), at the output, zero     A^T                  A^T ("A matrices ... initialised to zero")

Deviations:
* Init of A: uniform within +-1/sqrt(3 i), as in the MHR authors' code. PEFT's Poly takes +-sqrt(h/i), which is
  sqrt(3 h) times wider and depends on the number of heads. B is zero everywhere.
* The update is scaled by alpha / r, alpha = 1, as in [2]'s 2022 version ("alpha = 1/|r|") and the authors' code; its
  2023 version calls the scale tunable, and Polytropon's eq. 4 has none. At CrossFit's r = 16 our update is 1/16 of
  eq. 4's; to Adam that is a learning rate of B divided by 16 (except for its epsilon, clipping and decay).

Not here: dropout, and merging as a hidden side effect of .eval(); `merged` returns a new layer instead.

[1] https://arxiv.org/abs/2106.09685   [2] https://arxiv.org/abs/2211.03831 (2022: https://arxiv.org/abs/2211.03831v1)
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling


@dataclass(frozen=True)
class LoRA:
    """The low-rank adapter: which parameters it has and how they change one linear layer.

    rank: r. alpha: the update is multiplied by alpha / r.
    feature_axis: for each parameter, the axis that MHR (section 3) cuts into heads: A along i, B along o.
    """

    rank: int = 1
    alpha: float = 1.0

    feature_axis = {"A": 0, "B": 1}

    def __post_init__(self):
        if not hasattr(self.rank, "__index__") or self.rank < 1:
            raise ValueError(f"rank must be an integer of at least 1, not {self.rank!r}")

    def init(self, linear: nn.Linear) -> dict[str, Tensor]:
        """Fresh float32 parameters of one adapter: A (i, r) uniform within +-1/sqrt(3 i), B (r, o) zero.

        With B = 0 the update is exactly zero, so an adapted model starts as its backbone.
        """
        i, o, device = linear.in_features, linear.out_features, linear.weight.device
        bound = (3 * i) ** -0.5
        A = torch.empty(i, self.rank, dtype=torch.float32, device=device).uniform_(-bound, bound)
        B = torch.zeros(self.rank, o, dtype=torch.float32, device=device)
        return {"A": A, "B": B}

    def apply(self, linear: nn.Linear, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """y = x W0^T + bias + (alpha / r) (x A) B.

        x (b, l, i). Either one adapter for all rows, A (i, r) and B (r, o), or one per example,
        A (b, i, r) and B (b, r, o). Returns (b, l, o).
        The adapter is cast to the layer's dtype, so float32 adapters sit on a bfloat16 backbone.
        """
        if A.dim() == 2:  # all rows are those of one long example
            y = self.apply(linear, x.reshape(1, -1, x.shape[-1]), A[None], B[None])
            return y.view(*x.shape[:-1], y.shape[-1])
        y = linear(x)  # then y + (alpha / r) * (x @ A) @ B:
        overwrite = type(linear) is nn.Linear and not (is_compiling() or linear._forward_hooks or y._is_view())
        return AddLowRank.apply(y, *(p.to(y.dtype) for p in (x, A, B)), self.alpha / self.rank, overwrite)

    def merge(self, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor):
        """The weight (o, i), a new tensor, and bias (o,) that do the same: W0 + (alpha / r) (A B)^T."""
        delta = (self.alpha / self.rank) * (A @ B).T  # float32: a bfloat16 weight is rounded once, at the end
        return (weight + delta).to(weight.dtype), bias


class LoRALinear(nn.Module):
    """A frozen linear layer with one LoRA. Takes and returns what the linear layer does, (b, l, i) -> (b, l, o).

    linear: the layer to adapt; it is kept, not copied. adapter: the `LoRA`.
    params: its A and B; None draws fresh ones.
    """

    def __init__(self, linear: nn.Linear, adapter: LoRA = LoRA(), params: dict[str, Tensor] | None = None):
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


# --- The same, faster ------------------------------------------------------------------------------------------------


class AddLowRank(torch.autograd.Function):
    """y + scale (x A) B for y (b, l, o), x (b, l, i), A (b, i, r), B (b, r, o).

    Autograd finds the same gradients from the expression itself. Written down by hand they need fewer passes over
    tensors as large as y, which are most of what a LoRA of low rank costs; and each product has its thin matrix, of r
    rows, on the left, the faster order for a batch of matrices on a CPU. overwrite: y is nobody else's, add to it in
    place. Second derivatives are an error: for those write `y + scale * (x @ A @ B)`.
    """

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, overwrite: bool) -> Tensor:
        """y + scale (x A) B, (b, l, o)."""
        low = torch.bmm(A.mT, x.mT)  # (b, r, l)
        ctx.save_for_backward(x, A, B, low)
        ctx.scale = scale
        if overwrite:
            ctx.mark_dirty(y)
        return (y.baddbmm_ if overwrite else y.baddbmm)(low.mT, B, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        """With G = grad: G for y, scale G B^T A^T for x, scale x^T G B^T for A, scale (x A)^T G for B."""
        x, A, B, low = ctx.saved_tensors
        scaled = dict(beta=0, alpha=ctx.scale)  # beta 0: the first argument only gives the shape
        by_low = torch.baddbmm(low, B, grad.mT, **scaled)  # (b, r, l)
        by_x = torch.bmm(by_low.mT, A.mT) if ctx.needs_input_grad[1] else None
        return grad, by_x, torch.bmm(by_low, x).mT, torch.baddbmm(B, low, grad, **scaled), None, None
