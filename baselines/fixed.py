"""Fixed routings: Shared, Private and Expert (Polytropon section 2.5), Random (MHR section 5.2 and its first version).

Routers for a `poly.PolyLinear` without trained parameters: the skills are trained, who uses which is fixed. Not in
poly.py, so that poly.py and mhr.py differ in the head axis alone.

    PolyLinear(linear, LoRA(rank=1), FixedRouter(torch.eye(64)))

Shape key, as in poly.py: b examples, t tasks, s skills, u distinct tasks in a batch.
"""

import torch
from torch import Tensor, nn

from poly import rows_of


class FixedRouter(nn.Module):
    """A fixed allocation, as in the baselines of Polytropon section 2.5.

    table (t, s): how much each task uses each skill, 0 or more, no row all 0. `torch.ones(t, 1)` is Shared,
    `torch.eye(t)` Private, a known task-skill table Expert, and a random half of the skills per task the Random of
    MHR's first version. Z is a parameter without gradient, so that it is saved with the adapters.
    Raises ValueError for another shape, negative entries or a row of zeros.
    """

    per_example = False

    def __init__(self, table: Tensor):
        super().__init__()
        if not isinstance(table, Tensor):
            raise TypeError(f"give FixedRouter a tensor, torch.tensor(table), not a {type(table).__name__}")
        good = table.is_meta or bool((table >= 0).all()) and bool((table.sum(-1) > 0).all())  # meta: has no values
        if table.dim() != 2 or not good:
            raise ValueError("a table (tasks, skills) needs entries of 0 or more, and in each row one above 0")
        self.skills = table.shape[1]
        self.Z = nn.Parameter(table.detach().float().clone(), requires_grad=False)  # a copy

    tasks = property(lambda self: self.Z.shape[0])

    def forward(self, tasks: Tensor, sample: bool | None = None, Z: Tensor | None = None) -> Tensor:
        """Task ids (u,) to weights (u, s): the rows of the table divided by their sums. sample: there is no noise.

        Z: the tables (k, t, s) of k routers, stacked. Raises IndexError for an id outside 0 .. t-1. Both as in
        `PolyRouter.forward`.
        """
        rows = rows_of(self.Z, tasks) if Z is None else rows_of(Z, tasks, axis=1)
        return rows / rows.sum(-1, keepdim=True)

    def extra_repr(self) -> str:
        return f"tasks={self.tasks}, skills={self.skills}"

    @torch.no_grad()
    def add_tasks(self, count: int, keep: bool = True):
        """Give the table `count` rows of ones, after the old or in their place: a new task uses all skills alike."""
        fresh = torch.ones(count, self.skills).to(self.Z)
        self.Z = nn.Parameter(torch.cat([self.Z, fresh]) if keep else fresh, requires_grad=False)


def labels(method: str, task) -> tuple[str, ...]:
    """The names of the skills that a task (a `data.Task`) uses under a method with a fixed table.

    expert: the operations that it is composed of (strings), or its group: CrossFit's four task types as in Polytropon
    section 4.2, SuperNI's category, T0's data set; none if neither is known. private, adapter-soup: its own name.
    """
    names = (task.skills or (task.group,)) if method == "expert" else (task.name,)
    return tuple(name for name in names if name)


def skill_names(method: str, tasks) -> list[str]:
    """The skills of the training tasks: one for each name, in order of appearance."""
    return list(dict.fromkeys(name for task in tasks for name in labels(method, task)))


def given_table(method: str, tasks, names: list[str]) -> Tensor:
    """The table (t, s) of these tasks over the skills `names`: 1 where a task has the name, else 0.

    A task with none of the names uses all skills alike, a row of ones: under private any new task, under expert the
    held-out data sets of T0 and categories of SuperNI, which no training task has.
    """
    own = [labels(method, task) for task in tasks]
    table = torch.tensor([[float(name in row) for name in names] for row in own])
    return torch.where(table.sum(-1, keepdim=True) > 0, table, torch.ones_like(table))


def half_of_skills(tasks: int, skills: int) -> Tensor:
    """Random per task (MHR's first version, section 4.1): a table (t, s), half of the skills (rounded up) per task."""
    return (torch.rand(tasks, skills).argsort(-1) < (skills + 1) // 2).float()


class RandomRouter(FixedRouter):
    """Random routing per example (MHR section 5.2): in training each example draws its skills, whatever its task.

    In evaluation all skills have the same weight, which gives the average that Random-mu starts from. The paper says
    "randomly assign a binary module allocation to each data point". Our choices: each skill has probability 1/2, the
    weights are divided by their number, and each layer draws for itself.
    """

    per_example = True

    def __init__(self, tasks: int, skills: int):
        super().__init__(torch.ones(tasks, skills))

    def forward(self, tasks: Tensor, sample: bool | None = None, Z: Tensor | None = None) -> Tensor:
        """Task ids (b,), one per example, to weights (b, s). sample: draw; None: in training mode only. Z: as above."""
        weights = super().forward(tasks, Z=Z)
        if not (self.training if sample is None else sample):
            return weights
        on = (torch.rand_like(weights) < 0.5).to(weights.dtype)
        return on / on.sum(-1, keepdim=True).clamp(min=1)  # none on: the example sees the backbone alone
