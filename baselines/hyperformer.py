"""HyperFormer (Karimi Mahabadi et al. 2021, https://aclanthology.org/2021.acl-long.47), as in Polytropon section 2.5.

A hyper-network makes a task's adapter from an embedding of the task: embedding (e), one hidden layer with a ReLU (h),
and a linear layer whose output is the adapter's parameters. Polytropon points at the kinship: the last layer's weights
are an inventory Phi of h "skills", and the hidden activations are the task's weights over them. So here it is a router
for a `PolyLinear`, and differs from `poly.PolyRouter` in this: the weights are dense, unbounded above and not divided
by their sum, and tasks share what maps an embedding to them.

Adapters are LoRA, as in Polytropon's comparison, which sets e = h = 8, the number of skills, so that the trained sizes
match. The last layer has no bias: with LoRA's zero B the adapted model starts as its backbone.

    PolyLinear(linear, LoRA(rank=1), HyperRouter(tasks=64, skills=8))
"""

import torch
from torch import Tensor, nn

from baselines.fixed import check_ids


class HyperRouter(nn.Module):
    """Task embeddings Z (t, e) and the hyper-network's hidden layer (e -> h), with e = h = s.

    tasks: t. skills: s. Raises ValueError for sizes below 1.
    """

    per_example = False

    def __init__(self, tasks: int, skills: int):
        super().__init__()
        if tasks < 1 or skills < 1:
            raise ValueError(f"a router needs at least 1 task and 1 dimension, not {tasks} and {skills}")
        self.skills = skills
        self.Z = nn.Parameter(self.fresh(tasks))
        self.hidden = nn.Linear(skills, skills)

    def fresh(self, tasks: int) -> Tensor:
        """Embeddings (tasks, e) of new tasks, normally distributed."""
        return torch.randn(tasks, self.skills)

    tasks = property(lambda self: self.Z.shape[0])

    def forward(self, tasks: Tensor, sample: bool | None = None) -> Tensor:
        """Task ids (u,) to weights (u, s) of 0 or more. sample: there is no noise.

        Raises IndexError for an id outside 0 .. t-1.
        """
        check_ids(tasks, self.tasks)
        return torch.relu(self.hidden(self.Z[tasks]))

    @torch.no_grad()
    def add_tasks(self, count: int, keep: bool = True):
        """Give Z `count` fresh rows: after the old ones, which stay bit for bit, or (keep=False) in their place."""
        fresh = self.fresh(count).to(self.Z)
        self.Z = nn.Parameter(torch.cat([self.Z, fresh]) if keep else fresh, requires_grad=self.Z.requires_grad)
