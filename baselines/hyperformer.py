"""HyperFormer (Karimi Mahabadi et al. 2021, https://aclanthology.org/2021.acl-long.47), as in Polytropon section 2.5.

A hyper-network maps a task's embedding to its adapter. Here, as in the Polytropon authors' code: a task's embedding (e)
-> linear -> ReLU -> linear (h) -> a linear layer without bias whose output is the adapter's parameters. Polytropon
notes the relation: the last layer's weights are an inventory Phi of h "skills", and what enters it are the task's
weights over them. So here it is a router for a `PolyLinear`. It differs from `poly.PolyRouter`: the weights are dense,
of both signs, unbounded and not divided by their sum, and tasks share the map from embeddings to weights.

Adapters are LoRA, as in Polytropon's comparison, which sets "the embedding size e and hidden size h to an identical
value". Here e = h = s: the last layer has the size of s skills, and the two layers before it add 2 (e^2 + e)
parameters per router. (Appendix A.2 counts 4l(2he + 2e)e, where h is the model's width. Its 0.78 % per dimension, as
per skill, follows if the e in brackets is the rank, 16.) With LoRA's zero B the adapted model starts as its backbone.

With --granularity linear each linear layer has its own network and task embeddings, as under Poly its own Z, and as in
the Polytropon authors' code. HyperFormer itself embeds a task once, and its HyperFormer++ shares the network over all
layers. Deviation: A's rows start as LoRA's (`lora.py`), in that code uniform within 1/sqrt(e).

    PolyLinear(linear, LoRA(rank=1), HyperRouter(tasks=64, skills=8))
"""

import torch
from torch import Tensor, nn

from poly import PolyRouter, rows_of


class HyperRouter(PolyRouter):
    """Task embeddings Z (t, e) and the network (e -> e -> h) before the layer that is the inventory, with e = h = s.

    tasks: t. skills: s. Raises ValueError for sizes below 1.
    """

    def __init__(self, tasks: int, skills: int):
        super().__init__(tasks, skills)
        self.hidden, self.last = (nn.Linear(skills, skills, dtype=torch.float32) for _ in range(2))

    def __repr__(self) -> str:
        return f"HyperRouter(tasks={self.tasks}, skills={self.skills})"

    def fresh(self, tasks: int) -> Tensor:
        """Embeddings (tasks, e) of new tasks, normally distributed."""
        return torch.randn(tasks, self.skills, dtype=torch.float32)

    def forward(self, tasks: Tensor, sample: bool | None = None) -> Tensor:
        """Task ids (u,) to weights (u, s) of both signs. sample: there is no noise.

        Raises IndexError for an id outside 0 .. t-1.
        """
        return self.last(torch.relu(self.hidden(rows_of(self.Z, tasks))))
