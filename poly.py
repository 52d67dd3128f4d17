"""Polytropon (Poly): every task mixes its own adapter from a shared inventory of skills.

Paper: Ponti et al. 2023 [1] sections 2.1-2.3; Caccia et al. 2022/2023 [2] section 3.1 (2022 version), equation "Poly".

Unlike `lora.py`: a layer holds s adapters (the skills) instead of one, and a router that gives each task its weights
over them, w_j for skill j:

    z^     a relaxed Bernoulli sample of each logit of the task's row of Z       [1] eq. 2   `relaxed_bernoulli`
    w_j  = z^_j / sum_j' z^_j'                                                   [1] eq. 3   `PolyRouter`
    Phi  = sum_j w_j Phi_j                                                       [1] eq. 3   `PolyLinear.mix`
           with LoRA:  A = sum_j w_j A_j  and  B = sum_j w_j B_j                 [2] "Poly"
    y    = the layer adapted by Phi                                              [2] "Poly"  `PolyLinear.forward`

The PARAMETERS are averaged, then applied. Averaging the outputs of the skills is another function: with LoRA,
(sum_j w_j A_j)(sum_j w_j B_j) is not sum_j w_j A_j B_j. Any adapter works (`lora.LoRA`, `ia3.IA3`): the layer sees
named tensors and one pure function.

Shape key, the same in every file:
    b examples, l sequence length, i in_features, o out_features, r rank,
    t tasks, s skills in the inventory, h heads;  d = i/h, e = o/h;  u distinct tasks in a batch (u <= b),
    n weights over skills to mix by: one an example, or one for a batch of one task.

    router = PolyRouter(tasks=64, skills=8)
    layer = PolyLinear(linear, LoRA(rank=1), router)          # one router per layer, or one shared by several
    y = layer(x, torch.tensor([3, 3, 0, 7]))                  # x (4, l, i): the task of each example

Deviations:
* [1] read literally (section 2.4, eq. 4: Phi = flatten(A B)) averages LoRA's products, sum_j w_j A_j B_j. A and B
  averaged apart are equation "Poly" of [2] and the authors' code; the mixture of LoRAs of rank r has rank r.
* A new task's row of Z starts within +-1e-3 (`fresh`), every skill half on. [1] appendix A.2 starts it as "a vector of
  0.5", the same if these are probabilities (logits would give 0.62, as even a mixture); [2]: "randomly".
* One relaxed Bernoulli sample per entry of `tasks`, and `inject.task_ids` passes each distinct task once: so one per
  task, layer and forward pass, as eq. 2 is indexed (i = task, j = skill). The authors' code and PEFT draw one per
  example, so two examples of a task in one batch get different adapters.
* The sum S over the skills gets EPS = 1e-12 added, as in the authors' code, so zeros give weights of zero, not NaN. The
  weights then sum to S / (S + EPS): 1 within 1e-6 while a logit is above -13.8 (without noise), 1/2 where S is EPS.
* PEFT and the authors' code accept a negative task id and use the last task's row. Here it is an error.

The dual-speed learning rate ([1] section 2.3) is two parameter groups of the optimiser: see `train.py`.

[1] https://arxiv.org/abs/2202.13914   [2] https://arxiv.org/abs/2211.03831 (2022: https://arxiv.org/abs/2211.03831v1)
"""

import torch
from torch import Tensor, nn

EPS = 1e-12  # added to the sum over the skills, so that zeros can be normalised
INIT = 1e-3  # logits start uniform within +-INIT: every skill half on, ties broken at random


def relaxed_bernoulli(z: Tensor, temperature: float = 1.0) -> Tensor:
    """A differentiable sample of Bernoulli(sigmoid(z)), between 0 and 1 ([1] eq. 2). Any shape, same shape.

    The paper's log[ sigmoid(z) u / ((1 - sigmoid(z)) (1 - u)) ] is z + logit(u), which is finite for every finite z.
    u stays 1e-6 away from 0 and 1, so that logits of +-infinity give 1 and 0, never NaN (z in float32 or wider).
    """
    return torch.sigmoid((z + torch.logit(torch.rand_like(z), eps=1e-6)) / temperature)


def soft_partition(z: Tensor, routing: str, sample: bool) -> Tensor:
    """Logits (..., s) to weights (..., s) of the skills: non-negative, and their sum is 1 (up to EPS).

    routing "gumbel":            training adds noise: a relaxed Bernoulli sample; evaluation takes sigmoid(z).
    routing "sigmoid":           sigmoid(z) always: no noise (the MHR authors' configuration for T0).
    routing "straight-through":  0 or 1 in the forward pass (the relaxed sample, in evaluation sigmoid(z), rounded),
                                 the gradient of the value before rounding in the backward pass. If no skill is on,
                                 all weights are zero and the layer is its backbone. (The authors' code rounds
                                 without noise.)
    sample: whether "gumbel" and "straight-through" draw noise; pass `module.training`.
    Logits in half precision are taken in float32 and their weights rounded once: float16 knows no EPS.
    """
    kind, z = z.dtype, z.to(torch.promote_types(z.dtype, torch.float32))
    noisy = sample and routing != "sigmoid"
    on = relaxed_bernoulli(z) if noisy else torch.sigmoid(z)  # how much each skill is on
    if routing == "straight-through":
        on = on + ((on > 0.5).to(on.dtype) - on).detach()  # the value of the second term, the gradient of the first
        on = on / on.sum(-1, keepdim=True).clamp(min=1)  # the count of active skills, or 1 if there is none
    else:
        on = on / (on.sum(-1, keepdim=True) + EPS)
    return on.to(kind)


def rows_of(Z: Tensor, tasks: Tensor, axis: int = 0) -> Tensor:
    """The rows of the tasks (u,) in Z, whose axis of tasks is `axis`: (t, ...) to (u, ...).

    Raises IndexError for an id outside 0 .. t-1. Z[tasks] would take -1 for the last task; `index_select` does not, and
    stalls no accelerator (there it is an assertion on the device; `inject.task_ids` has checked the ids by then).
    """
    try:
        return Z.index_select(axis, tasks)
    except IndexError:
        raise IndexError(f"task ids must be in 0 .. {Z.shape[axis] - 1}, got {tasks.tolist()}") from None


class PolyRouter(nn.Module):
    """The task-skill allocation Z (t, s), learned as logits ([1] section 2.1).

    tasks: t. skills: s. routing: see `soft_partition`.
    Raises ValueError for sizes that are no integers of at least 1, or an unknown routing.
    """

    per_example = False  # whether the layer asks for weights for each example, not for each distinct task

    def __init__(self, tasks: int, skills: int, routing: str = "gumbel"):
        super().__init__()
        sizes = (tasks, skills)
        if not all(hasattr(size, "__index__") and size >= 1 for size in sizes):
            raise ValueError(f"the sizes of a router must be integers of at least 1, not {sizes}")
        if routing not in ("gumbel", "sigmoid", "straight-through"):
            raise ValueError(f"unknown routing {routing!r}: choose gumbel, sigmoid or straight-through")
        self.skills, self.routing = skills, routing
        self.Z = nn.Parameter(self.fresh(tasks))

    def fresh(self, tasks: int) -> Tensor:
        """Float32 logits (tasks, s) for new tasks, uniform within +-1e-3."""
        return torch.empty(tasks, self.skills, dtype=torch.float32).uniform_(-INIT, INIT)

    @property
    def tasks(self) -> int:
        return self.Z.shape[0]

    def forward(self, tasks: Tensor, sample: bool | None = None, Z: Tensor | None = None) -> Tensor:
        """Task ids (u,) to weights over skills (u, s). sample: draw noise; None: in training mode only.

        Z: the logits (k, t, s) of k routers like this one, stacked, for weights (k, u, s); None: its own.
        Raises IndexError for an id outside 0 .. t-1.
        """
        rows = rows_of(self.Z, tasks) if Z is None else rows_of(Z, tasks, axis=1)
        return soft_partition(rows, self.routing, self.training if sample is None else sample)

    def extra_repr(self) -> str:
        settings = {"tasks": self.tasks} | {k: v for k, v in vars(self).items() if k[0] != "_" and k != "training"}
        return ", ".join(v if isinstance(v, str) else f"{k}={v}" for k, v in settings.items())

    @torch.no_grad()
    def add_tasks(self, count: int, keep: bool = True):
        """Give Z `count` fresh rows: after the old ones, which stay bit for bit, or (keep=False) in their place."""
        fresh = self.fresh(count).to(self.Z)
        self.Z = nn.Parameter(torch.cat([self.Z, fresh]) if keep else fresh, requires_grad=self.Z.requires_grad)


class PolyLinear(nn.Module):
    """A frozen linear layer, an inventory of s adapters, and a router that mixes them for each task.

    linear: the layer to adapt; it is kept, not copied. adapter: a `LoRA`, an `IA3`, or anything with their
    `init`, `apply`, `merge` and `feature_axis`. router: the same object may serve several layers, which then share
    their allocation (coarser granularity).
    """

    def __init__(self, linear: nn.Linear, adapter, router: nn.Module):
        super().__init__()
        if hasattr(router, "heads"):
            raise TypeError(f"{type(router).__name__} has heads: give PolyLinear a PolyRouter, or take MHRLinear")
        self.linear = linear.requires_grad_(False)
        self.adapter = adapter
        self.router = router
        skills = [adapter.init(linear) for _ in range(router.skills)]  # independent draws: skills start different
        stacked = {name: torch.stack([p[name] for p in skills]) for name in skills[0]}
        self.inventory = nn.ParameterDict(
            {name: nn.Parameter(p, requires_grad=p.is_floating_point()) for name, p in stacked.items()}  # SFT's places
        )

    # T5 reads `self.wo.weight` inside its own forward: an adapted layer still answers like a linear one.
    weight = property(lambda self: self.linear.weight)
    bias = property(lambda self: self.linear.bias)
    in_features = property(lambda self: self.linear.in_features)
    out_features = property(lambda self: self.linear.out_features)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_features} -> {self.out_features}, {self.adapter}, {self.router})"

    def mix(self, w: Tensor, inventory=None) -> dict[str, Tensor]:
        """Weights (n, s) to n adapters: {name: (n, ...)}, the sum over the skills j of w_j Phi_j.

        inventory: that of k layers like this one, stacked, {name: (k, s, ...)}, for weights (k, n, s) and adapters
        {name: (k, n, ...)}; None: its own.
        """
        mixed, axis = {}, w.dim() - 1  # the first axis of Phi_j, behind s
        for name, p in (inventory or self.inventory).items():
            flat = torch.einsum("...ns,...sp->...np", w.to(p.dtype), p.flatten(axis))
            mixed[name] = flat.unflatten(-1, p.shape[axis:])
        return mixed

    def adapters(self, tasks: Tensor, rows: Tensor | None = None) -> dict[str, Tensor]:
        """Each example's adapter, {name: (n, ...)}; if there is one task in all, its adapter, {name: (1, ...)}.

        tasks (u,): the distinct task ids. rows (n,): for each example which of `tasks` is its own; None means that
        tasks already has one id per example. The router runs once per distinct task: the examples of a task share its
        weights, noise included. Mixing runs once per example, because each needs its own copy of the mixture.
        """
        if rows is not None and self.router.per_example:
            tasks, rows = tasks[rows], None
        w = self.router(tasks)
        return self.mix(w if rows is None or len(w) == 1 else w.index_select(0, rows))

    def forward(self, x: Tensor, tasks: Tensor, rows: Tensor | None = None, params=None) -> Tensor:
        """x (b, l, i) or (b, i) -> (b, l, o) or (b, o), each example adapted for its own task.

        tasks, rows: see `adapters`. params: what `adapters` gave for them, precomputed, optional. Their number n may be
        smaller than b if it divides b: beam search, several returned sequences and the scoring of several choices
        repeat each example b/n times in a row, and are read as one longer sequence. The repeat is read off the shapes
        at every call and kept nowhere. Raises ValueError if n does not divide b, or there are no rows.
        """
        n = len(tasks) if rows is None else len(rows)
        if n == 0 or x.shape[0] == 0 or x.shape[0] % n:
            raise ValueError(f"{n} task ids for a batch of {x.shape[0]} rows: expected one per example")
        params = self.adapters(tasks, rows) if params is None else params
        if all(len(p) == 1 for p in params.values()):  # one adapter for all: plain matmuls
            return self.adapter.apply(self.linear, x, **{name: p.squeeze(0) for name, p in params.items()})
        y = self.adapter.apply(self.linear, x.reshape(n, -1, x.shape[-1]), **params)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    @torch.no_grad()
    def merged(self, task: int) -> nn.Linear:
        """A plain linear layer equal to this one, in evaluation mode, for one task."""
        w = self.router(torch.tensor([task], device=self.router.Z.device), sample=False)
        params = {name: p[0] for name, p in self.mix(w).items()}
        weight, bias = self.adapter.merge(self.linear.weight, self.linear.bias, **params)
        plain = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)
        return plain

    @torch.no_grad()
    def average_skills(self) -> dict[str, Tensor]:
        """mu ([2] section 3; 2022: section 3.2, "Poly-mu"): ONE adapter, the mean of the inventory. {name: (...)}.

        Routing is dropped: train the result as a `LoRALinear`, `IA3Linear` or `SFTLinear`. The authors' code instead
        continues to train all s skills under uniform weights, s times as many parameters as the papers count.
        """
        return {name: p.mean(0) for name, p in self.inventory.items()}
