"""Task-MoE (Kudugunta et al. 2021, https://arxiv.org/abs/2110.03742), as Polytropon section 2.5 compares with it.

A mixture of experts that routes by task: each task has a logit for every expert (here: skill), a softmax over them,
and uses the k best. It differs from `poly.PolyRouter` in two ways: the skills of a task compete (a softmax instead of a
sigmoid for each), and every task uses the same number of them. Polytropon blames the rich-gets-richer dynamics of the
latter.

Experts are LoRA modules, not feed-forward networks, as in Polytropon's comparison: put the router in a `PolyLinear`.

    PolyLinear(linear, LoRA(rank=1), TaskMoERouter(tasks=64, skills=8, k=2))
"""

import torch
from torch import Tensor

from poly import PolyRouter, rows_of


class TaskMoERouter(PolyRouter):
    """Softmax over the k best skills, with logits Z (t, s) as in `poly.PolyRouter`.

    tasks: t. skills: s. k: skills that a task uses; Polytropon does not state it, Kudugunta et al. use at most 2.
    Raises ValueError unless 2 <= k <= s and t >= 1: a single skill always has weight 1, and Z no gradient.
    """

    def __init__(self, tasks: int, skills: int, k: int = 2):
        if not 2 <= k <= skills:
            raise ValueError(f"a task uses k of s skills, 2 <= k <= s, not {k} of {skills}")
        super().__init__(tasks, skills)
        self.k = k

    def extra_repr(self) -> str:
        return f"tasks={self.tasks}, skills={self.skills}, k={self.k}"

    def forward(self, tasks: Tensor, sample: bool | None = None, Z: Tensor | None = None) -> Tensor:
        """Task ids (u,) to weights (u, s), at most k of them above 0, each row summing to 1. sample: there is no noise.

        Only the k best logits get a gradient. Logits of +-inf count as the largest finite number, so k equal ones share
        evenly. Z, and the error for an id outside 0 .. t-1: as in `PolyRouter.forward`.
        """
        most = torch.finfo(self.Z.dtype).max
        rows = rows_of(self.Z, tasks) if Z is None else rows_of(Z, tasks, axis=1)
        logits = rows.clamp(-most, most)
        best = logits.topk(self.k, dim=-1).indices
        kept = torch.full_like(logits, -torch.inf).scatter(-1, best, logits.gather(-1, best))
        return kept.softmax(-1)  # the same as a softmax over all, cut to the k best and divided by its sum
