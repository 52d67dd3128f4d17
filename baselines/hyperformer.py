"""HyperFormer (Karimi Mahabadi et al. 2021, https://aclanthology.org/2021.acl-long.47), as in Polytropon section 2.5.

A hyper-network maps a task's embedding to its adapter: embedding (e), one hidden layer with a ReLU (h), and a linear
layer whose output is the adapter's parameters. Polytropon notes the relation: the last layer's weights are an inventory
Phi of h "skills", and the hidden activations are the task's weights over them. So here it is a router for a
`PolyLinear`. It differs from `poly.PolyRouter`: the weights are dense, unbounded above and not divided by their sum,
and tasks share the map from embeddings to weights.

Adapters are LoRA, as in Polytropon's comparison, which sets "the embedding size e and hidden size h to an identical
value". Here e = h = s: the last layer has the size of s skills, and the hidden layer adds e^2 + e parameters per
router. (Appendix A.2 counts 4l(2he + 2e)e, where h is the model's width. Its 0.78 % per dimension, as per skill,
follows if the e in brackets is the rank, 16.) The last layer has no bias: with LoRA's zero B the adapted model starts
as its backbone. If the ReLU turns off all units of a task in a layer, it has no adapter and no gradient there.
Initially this happens in about one of 2^h layers (with the 4 units of `strings`: one in 16).

Deviation: with --granularity linear each linear layer has its own hidden layer and task embeddings, as under Poly its
own Z. The original embeds a task once, and its HyperFormer++ shares the hyper-network over all layers.

    PolyLinear(linear, LoRA(rank=1), HyperRouter(tasks=64, skills=8))
"""

import torch
from torch import Tensor, nn

from poly import PolyRouter, rows_of


class HyperRouter(PolyRouter):
    """Task embeddings Z (t, e) and the hyper-network's hidden layer (e -> h), with e = h = s.

    tasks: t. skills: s. Raises ValueError for sizes below 1.
    """

    def __init__(self, tasks: int, skills: int):
        super().__init__(tasks, skills)
        self.hidden = nn.Linear(skills, skills)

    def fresh(self, tasks: int) -> Tensor:
        """Embeddings (tasks, e) of new tasks, normally distributed."""
        return torch.randn(tasks, self.skills)

    def forward(self, tasks: Tensor, sample: bool | None = None) -> Tensor:
        """Task ids (u,) to weights (u, s) of 0 or more. sample: there is no noise.

        Raises IndexError for an id outside 0 .. t-1.
        """
        return torch.relu(self.hidden(rows_of(self.Z, tasks)))
