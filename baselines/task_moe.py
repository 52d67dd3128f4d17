"""Task-MoE (Kudugunta et al. 2021, https://arxiv.org/abs/2110.03742), as Polytropon section 2.5 compares with it.

A mixture of experts that routes by task: each task has a logit for every expert (here: skill), a softmax over them,
and uses its k best. Two things differ from `poly.PolyRouter`: the skills of a task compete (a softmax instead of one
sigmoid each), and every task uses the same number of them. Polytropon blames the latter's rich-gets-richer dynamics.

Experts are LoRA modules, not feed-forward networks, as in Polytropon's comparison: put the router in a `PolyLinear`.

    PolyLinear(linear, LoRA(rank=1), TaskMoERouter(tasks=64, skills=8, k=2))
"""

import torch
from torch import Tensor, nn

from baselines.fixed import check_ids


class TaskMoERouter(nn.Module):
    """Softmax over skills, the k best kept and normalised again: logits Z (t, s).

    tasks: t. skills: s. k: skills that a task uses; the paper's comparison does not state it, Kudugunta et al. use 2
    at most. Raises ValueError unless 1 <= k <= s and t >= 1.
    """

    per_example = False

    def __init__(self, tasks: int, skills: int, k: int = 2):
        super().__init__()
        if tasks < 1 or not 1 <= k <= skills:
            raise ValueError(f"a router needs at least 1 task and 1 <= k <= skills, not {tasks}, {k} and {skills}")
        self.skills, self.k = skills, k
        self.Z = nn.Parameter(self.fresh(tasks))

    def fresh(self, tasks: int) -> Tensor:
        """Logits (tasks, s) for new tasks, uniform within +-1e-3, as `poly.PolyRouter`."""
        return torch.empty(tasks, self.skills).uniform_(-1e-3, 1e-3)

    tasks = property(lambda self: self.Z.shape[0])

    def forward(self, tasks: Tensor, sample: bool | None = None) -> Tensor:
        """Task ids (u,) to weights (u, s), k of them above 0, each row summing to 1. sample: there is no noise.

        The gradient reaches the kept logits only. Raises IndexError for an id outside 0 .. t-1.
        """
        check_ids(tasks, self.tasks)
        logits = self.Z[tasks]
        best = logits.topk(self.k, dim=-1).indices
        kept = torch.full_like(logits, -torch.inf).scatter(-1, best, logits.gather(-1, best))
        return kept.softmax(-1)  # of the k best: the same as a softmax over all, cut and divided by its sum

    @torch.no_grad()
    def add_tasks(self, count: int, keep: bool = True):
        """Give Z `count` fresh rows: after the old ones, which stay bit for bit, or (keep=False) in their place."""
        fresh = self.fresh(count).to(self.Z)
        self.Z = nn.Parameter(torch.cat([self.Z, fresh]) if keep else fresh, requires_grad=self.Z.requires_grad)
