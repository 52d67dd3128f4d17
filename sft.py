"""Sparse fine-tuning (SFT; Ansell et al. 2022 [1]), the other adapter of Polytropon ([2] section 2.4).

Shape key, the same in every file: b examples, l length, i input features, o output features, s skills, h heads, n
weights over skills to mix by; k is the number of entries of the weight that an adapter may change, density * o * i.

    y = x (W0 + D)^T + bias        D (o, i) is zero but at k places, drawn at random once and kept

The places are drawn at random, as Polytropon does: [1] selects them in a phase of its own, which was found to help
little. What is trained and saved is the k values and, as integers that never train, their places. Memory is
proportional to k, also between the forward and the backward pass (`Times`): a dense D exists for one example at a time,
inside either pass. (Under Poly and MHR every example has a mixture of its own: there it is proportional to b s k.)

Under Poly and MHR every skill has places of its own (a mask M (s, o i)), so mixing cannot add up values that stand side
by side: the skills' values are scaled by their weights and put one after the other, places repeated or not, and D is
the sum (`SFTSkills`). MHR cuts D along o into heads.

[1] https://aclanthology.org/2022.acl-long.125   [2] https://arxiv.org/abs/2202.13914
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


def dense(value: Tensor, place: Tensor, size: tuple[int, int]) -> Tensor:
    """D (o, i) of a size (o, i): zero, and at each place the sum of the values (k,) that name it."""
    D = torch.zeros(size[0] * size[1], dtype=value.dtype, device=value.device)
    return D.scatter_add(0, place, value).view(size)


class Times(torch.autograd.Function):
    """x D^T for one adapter: x (l, i), value (k,), place (k,) -> (l, o). Keeps x, value and place, not D."""

    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor, place: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, value, place)
        ctx.size = size
        return x @ dense(value, place, size).to(x.dtype).T

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, value, place = ctx.saved_tensors
        by_value = (grad.T @ x).flatten()[place].to(value.dtype)  # the entries of D's gradient that there are
        return grad @ dense(value, place, ctx.size).to(x.dtype), by_value, None, None


@dataclass(frozen=True)
class SFT:
    """The sparse adapter: which parameters it has and how they change one linear layer.

    density: k / (o i), the share of the weight's entries that may change. Raises ValueError outside (0, 1].
    """

    density: float = 0.1

    feature_axis = {}  # no parameter has the layer's features along an axis: see `SFTSkills`

    def __post_init__(self):
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be above 0 and at most 1, not {self.density}")

    def init(self, linear: nn.Linear) -> dict[str, Tensor]:
        """Fresh parameters of one adapter: values (k,), float32 zeros, and their places (k,), int64, ascending.

        A place is a number o' * i + i' below o * i; all are different. With zero values the layer is its backbone.
        """
        size, device = linear.in_features * linear.out_features, linear.weight.device
        place = torch.randperm(size, device=device)[: max(1, round(self.density * size))].sort().values
        return {"value": torch.zeros(len(place), dtype=torch.float32, device=device), "place": place}

    def apply(self, linear: nn.Linear, x: Tensor, value: Tensor, place: Tensor) -> Tensor:
        """y = x (W0 + D)^T + bias for x (b, l, i) -> (b, l, o).

        Either one adapter for all rows, values and places (k,), or one per example, (b, k); places may be (1, k).
        """
        size, y = (linear.out_features, linear.in_features), linear(x)
        x = x.to(y.dtype)  # which autocast has lowered
        if value.dim() == 1:
            return y + Times.apply(x.flatten(0, -2), value, place, size).view_as(y)
        place = place.expand(len(value), -1)
        return y + torch.stack([Times.apply(*one, size) for one in zip(x, value, place, strict=True)])

    def mix(self, linear: nn.Linear, w: Tensor, value: Tensor, place: Tensor) -> dict[str, Tensor]:
        """Skills to one adapter per task: values and places (s, k), weights w (n, h, s) -> values (n, s k), places
        (1, s k), the same for all. Any axes may stand before these.

        Each value is scaled by the weight that its skill has in the head of its place: the row of D divided into h.
        """
        value, place = value.unsqueeze(-3), place.unsqueeze(-3)  # (1, s, k)
        head = place // linear.in_features // (linear.out_features // w.shape[-2])
        scaled = w.mT.to(value.dtype).gather(-1, head.expand(*w.shape[:-2], *head.shape[-2:])) * value  # (n, s, k)
        return {"value": scaled.flatten(-2), "place": place.flatten(-2)}

    def merge(self, weight: Tensor, bias: Tensor | None, value: Tensor, place: Tensor):
        """The weight (o, i), a new tensor, and bias (o,) that do the same: W0 + D."""
        D = dense(value, place, tuple(weight.shape))
        return (weight + D).to(weight.dtype), bias  # float32: bfloat16 is rounded once, at the end


class SFTLinear(nn.Module):
    """A frozen linear layer with one SFT. Takes and returns what the linear layer does, (b, l, i) -> (b, l, o).

    linear: the layer to adapt; it is kept, not copied. adapter: the `SFT`.
    params: its values and places; None draws fresh ones. Places that repeat are put together.
    """

    def __init__(self, linear: nn.Linear, adapter: SFT = SFT(), params: dict[str, Tensor] | None = None):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.adapter = adapter
        params = adapter.init(linear) if params is None else _together(**params)
        self.params = nn.ParameterDict(
            {name: nn.Parameter(p, requires_grad=p.is_floating_point()) for name, p in params.items()}
        )

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


def _together(value: Tensor, place: Tensor) -> dict[str, Tensor]:
    """The same D with each place once, in ascending order."""
    distinct, back = place.unique(return_inverse=True)
    return {"value": torch.zeros(len(distinct)).to(value).index_add(0, back, value), "place": distinct}


class SFTSkills:
    """The mix of skills that are SFTs, for a layer of Poly or MHR: `class SFTPolyLinear(SFTSkills, PolyLinear)`."""

    def mix(self, w: Tensor, inventory=None) -> dict[str, Tensor]:
        """Weights (n, s) or (n, h, s) to n adapters, by `SFT.mix`. inventory: as in `PolyLinear.mix`."""
        w = w if self.router.Z.dim() == 3 else w.unsqueeze(-2)  # Poly has one head
        return self.adapter.mix(self.linear, w, **(inventory or self.inventory))

    @torch.no_grad()
    def average_skills(self) -> dict[str, Tensor]:
        """mu: ONE adapter, with the places of all skills."""
        even = torch.full_like(self.router.Z[:1], 1 / self.router.skills)
        return {name: p[0] for name, p in self.mix(even).items()}
