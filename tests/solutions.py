"""Answers to `exercises.md`, short and close to the equations. `test_exercises.py` checks them where it is given no
file of a learner's, so its checks are known to let right answers pass."""

import torch
from torch import Tensor, nn

from inject import task_ids


def lora(x: Tensor, linear: nn.Linear, A: Tensor, B: Tensor, alpha: float = 1.0) -> Tensor:
    """Step 1. MHR 2022 section 2.1, equation "LoRA"; with A (b, i, r) and B (b, r, o) also one adapter per example."""
    return linear(x) + alpha / A.shape[-1] * (x @ A @ B)


def merge(linear: nn.Linear, A: Tensor, B: Tensor, alpha: float = 1.0) -> Tensor:
    """Step 2. The weight (o, i) of a plain linear layer that does the same."""
    return linear.weight + alpha / A.shape[-1] * (A @ B).T


def by_parameters(x: Tensor, A: Tensor, B: Tensor, w: Tensor) -> Tensor:
    """Step 3. The update of the mixed adapter, x (sum w A) (sum w B): MHR 2022 equation "Poly"."""
    return x @ torch.einsum("s,sir->ir", w, A) @ torch.einsum("s,sro->ro", w, B)


def by_outputs(x: Tensor, A: Tensor, B: Tensor, w: Tensor) -> Tensor:
    """Step 3. The mixed updates of all adapters, sum w (x A B)."""
    return sum(w_j * (x @ A_j @ B_j) for w_j, A_j, B_j in zip(w, A, B, strict=True))


def relaxed_bernoulli(z: Tensor, u: Tensor, temperature: float = 1.0) -> Tensor:
    """Step 4. Polytropon eq. 2: log[sigmoid(z) u / ((1 - sigmoid(z)) (1 - u))] is z + logit(u)."""
    return torch.sigmoid((z + torch.logit(u)) / temperature)


def weights(Z: Tensor, tasks: Tensor, u: Tensor | None = None) -> Tensor:
    """Step 5. Polytropon eq. 3, the fraction. 1e-12, as in `poly.py`: a row without active skills gives zeros."""
    if tasks.min() < 0 or tasks.max() >= len(Z):
        raise IndexError(f"task ids must be in 0 .. {len(Z) - 1}, got {tasks.tolist()}")
    on = torch.sigmoid(Z[tasks]) if u is None else relaxed_bernoulli(Z[tasks], u)
    return on / (on.sum(-1, keepdim=True) + 1e-12)


def poly_loop(x: Tensor, linear: nn.Linear, A: Tensor, B: Tensor, w: Tensor) -> Tensor:
    """Step 6. Example by example, skill by skill."""
    rows = []
    for x_k, w_k in zip(x, w, strict=True):
        mixed = [sum(w_ks * p for w_ks, p in zip(w_k, skills, strict=True)) for skills in (A, B)]
        rows.append(lora(x_k, linear, *mixed))
    return torch.stack(rows)


def poly(x: Tensor, linear: nn.Linear, A: Tensor, B: Tensor, w: Tensor) -> Tensor:
    """Step 6. The same at once: a batch of adapters for a batch of examples."""
    return lora(x, linear, torch.einsum("bs,sir->bir", w, A), torch.einsum("bs,sro->bro", w, B))


def poly_late(x: Tensor, linear: nn.Linear, A: Tensor, B: Tensor, w: Tensor) -> Tensor:
    """Step 7. x A = sum_j w_j (x A_j), then the same on the side of B: two sums, one after the other."""
    low = torch.einsum("blsr,bs->blr", torch.einsum("bli,sir->blsr", x, A), w)
    weighted = torch.einsum("blr,bs->blsr", low, w)
    return linear(x) + torch.einsum("blsr,sro->blo", weighted, B) / A.shape[-1]


def mix_heads(A: Tensor, B: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Step 8. MHR 2022 equation "Poly-S": cut along i and o, mix block by block, concatenate."""
    heads = w.shape[1]
    if A.shape[1] % heads or B.shape[2] % heads:
        raise ValueError(f"{heads} heads do not divide {A.shape[1]} inputs and {B.shape[2]} outputs")
    mixed_A = torch.einsum("bhs,shdr->bhdr", w, A.unflatten(1, (heads, -1)))
    mixed_B = torch.einsum("bhs,srhe->brhe", w, B.unflatten(2, (heads, -1)))
    return mixed_A.flatten(1, 2), mixed_B.flatten(2, 3)


def to_train(variant: str, A: Tensor, B: Tensor, Z: Tensor) -> dict[str, Tensor]:
    """Step 9. What is trained for one new task: "z" (MHR-z, its row of Z) or "mu" (MHR-mu, the averaged skills)."""
    row = torch.empty_like(Z[:1]).uniform_(-1e-3, 1e-3)
    new = {"Z": row} if variant == "z" else {"A": A.mean(0), "B": B.mean(0)}
    return {name: p.detach().requires_grad_() for name, p in new.items()}


class HeadRouter(nn.Module):
    """Step 10. Z (t, h, s); task ids (u,) to weights (u, h, s), with noise in training mode."""

    def __init__(self, tasks: int, skills: int, heads: int):
        super().__init__()
        self.tasks, self.skills = tasks, skills
        self.Z = nn.Parameter(torch.empty(tasks, heads, skills).uniform_(-1e-3, 1e-3))

    def forward(self, tasks: Tensor) -> Tensor:
        return weights(self.Z, tasks, torch.rand_like(self.Z[tasks]) if self.training else None)


class HeadLinear(nn.Module):
    """Step 10. A frozen linear layer, s LoRAs and a router."""

    def __init__(self, linear: nn.Linear, router: nn.Module, rank: int):
        super().__init__()
        s, i, o = router.skills, linear.in_features, linear.out_features
        self.linear, self.router = linear, router
        self.A = nn.Parameter(torch.empty(s, i, rank).uniform_(-((3 * i) ** -0.5), (3 * i) ** -0.5))
        self.B = nn.Parameter(torch.zeros(s, rank, o))

    weight = property(lambda self: self.linear.weight)  # T5 reads `wo.weight`

    def forward(self, x: Tensor, tasks: Tensor, rows: Tensor) -> Tensor:
        """rows (n,): which of the distinct `tasks` is each example's. b may be a multiple of n: beams are repeats."""
        A, B = mix_heads(self.A, self.B, self.router(tasks)[rows])
        y = lora(x.reshape(len(rows), -1, x.shape[-1]), self.linear, A, B)
        return y.reshape(*x.shape[:-1], -1)


def train(model: nn.Module, batch: dict, ids: list, steps: int, lr: float, lr_z: float) -> list[float]:
    """Step 10. The losses of `steps` steps of Adam, Z at its own learning rate (Polytropon section 2.3)."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    Z = [p for name, p in named if name.endswith(".Z")]
    rest = [p for name, p in named if not name.endswith(".Z")]
    optimiser = torch.optim.Adam([{"params": rest, "lr": lr}, {"params": Z, "lr": lr_z}])
    losses = []
    for _ in range(steps):
        with task_ids(ids):
            loss = model(**batch).loss
            loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses
