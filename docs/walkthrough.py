"""LoRA, Polytropon (Poly) and Multi-Head Routing (MHR): the whole algorithm, on a layer small enough to watch.

    python docs/walkthrough.py

[1] is Polytropon, https://arxiv.org/abs/2202.13914, section 2; [2] is MHR, https://arxiv.org/abs/2211.03831, section 3,
its equations, by name, in https://arxiv.org/abs/2211.03831v1 (2022). Shapes: b examples, i inputs, o outputs, r rank,
t tasks, s skills, h heads; no length l: a linear layer treats all positions alike. x is a row, A is (i, r), B (r, o).
"""

import sys

import torch

torch.manual_seed(0)
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)  # so that rounding does not show in what is printed


def show(name, axes, tensor, heads=1, axis=-1):
    """One line: name, axes and shape of a tensor, and its numbers, with a bar between heads."""
    blocks = [block.flatten().tolist() for block in tensor.chunk(heads, axis)]
    texts = [" ".join(f"{v:5.{0 if v == round(v) else 2}f}" for v in block) for block in blocks]
    print(f"  {name:15} {axes:4} {str(tuple(tensor.shape)):8} {' | '.join(texts)}")


print("\n1. LoRA: a small update beside a frozen matrix")
# A layer computes x W, and W is frozen. LoRA adds x A B, where A and B are thin: their rank r is small. Only they are
# trained ([2] equation "LoRA"; its scale is alpha / r with alpha = 1).


def lora(x, W, A, B):
    return x @ W + x @ A @ B / A.shape[-1]


x = torch.tensor([[1.0, 2, 0, -1]])
W = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]])
A = torch.tensor([[1.0, 0, 2, 0], [0, 1, 0, 2], [2, 1, -1, 0]])[:, :, None]  # three LoRAs: (s, i, r)
B = torch.tensor([[1.0, 0, 0, 1], [0, 2, 1, 0], [0, 1, -2, 3]])[:, None, :]  # (s, r, o)
show("x", "b i", x)
print(f"  {'W':15} i o  (4, 4)   {str(W.int().tolist()).replace(',', '')}")
show("x W", "b o", x @ W)
for j in range(3):
    show(f"A_{j + 1}", "i r", A[j])
    show(f"B_{j + 1}", "r o", B[j])
show("x A_1", "b r", x @ A[0])
show("x A_1 B_1", "b o", x @ A[0] @ B[0])
show("y", "b o", lora(x, W, A[0], B[0]))

print("\n2. Poly: a task mixes its LoRA from a few skills that all tasks share")
# A skill is a LoRA. Z has a row of logits for a task; a sigmoid of each says how much that skill is on; skills do not
# compete, so there is no softmax. In training z + logit(u), with u uniform, replaces z, which makes z_hat a relaxed
# Bernoulli variable; [1] eq. 2 writes it log[sigmoid(z) u / ((1 - sigmoid(z)) (1 - u))]. z_hat is divided by its sum
# ([1] eq. 3), and mixes the PARAMETERS of the skills, A and B apart ([2] equation "Poly").


def weights(Z, u=None):
    """Logits Z (..., s) to weights (..., s) that sum to 1. u: noise, like Z; None: evaluation."""
    z_hat = torch.sigmoid(Z if u is None else Z + torch.logit(u, eps=1e-6))
    return z_hat / z_hat.sum(-1, keepdim=True)


def mix(w, skills):
    """w (..., s), skills (s, rows, columns) to (..., rows, columns): the sum of w_j times skill j."""
    return sum(w[..., j, None, None] * skill for j, skill in enumerate(skills))


Z = torch.tensor([[2.0, -2, 0], [-2, 0, 2]])  # of one task; Poly uses the first row only
u = torch.tensor([[0.27, 0.5, 0.73], [0.5, 0.88, 0.5]])  # in training torch.rand
z_hat, w = torch.sigmoid(Z + torch.logit(u)), weights(Z, u)
rows = ("Z", Z), ("sigmoid(Z)", torch.sigmoid(Z)), ("noise u", u), ("z_hat", z_hat), ("w", w)
for name, tensor in rows:
    show(name, "s", tensor[0])
show("A = sum w_j A_j", "i r", mix(w[0], A))
show("B = sum w_j B_j", "r o", mix(w[0], B))

print("\n3. MHR: each block of the features is mixed by a head of its own")
# A is cut into h blocks of inputs, B into h blocks of outputs. Each block is mixed by the task's logits for its head,
# and the blocks are joined ([2] equation "Poly-S"): Poly for each block. The skills stay as large as they were.


def mix_heads(w, skills, axis):
    """w (..., h, s), skills (s, rows, columns) to (..., rows, columns). axis: that of the features."""
    blocks = skills.chunk(w.shape[-2], axis)
    return torch.cat([mix(w[..., k, :], block) for k, block in enumerate(blocks)], axis)


def routed(x, W, Z, A, B, u=None):
    """The layer: x (t, b, i), Z (t, h, s) to y (t, b, o). One head is Poly, one skill is LoRA."""
    w = weights(Z, u)
    return lora(x, W, mix_heads(w, A, -2), mix_heads(w, B, -1))


print(f"{'head 1':>39} {'head 2':>20}")
for name, tensor in rows:
    show(name, "h s", tensor, 2, 0)
for name, axes, skills, axis in ("A", "i r", A, -2), ("B", "r o", B, -1):
    for j in range(3):
        show(f"{name}_{j + 1}", axes, skills[j], 2, axis)
    show(name, axes, mix_heads(w, skills, axis), 2, axis)
show("x A", "b r", x @ mix_heads(w, A, -2))
show("x A B", "b o", x @ mix_heads(w, A, -2) @ mix_heads(w, B, -1), 2)
show("y = x W + x A B", "b o", routed(x, W, Z, A, B, u), 2)

print("\n4. Pre-training on 40 tasks that share skills, with two learning rates")
# We make tasks of which we know the answer: three true skills; each head of a task uses a set of these. With 7 sets and
# two heads there are 49 tasks: 40 to learn from, 9 new ones. They share blocks of skills, so MHR can be exactly right;
# Poly could if both heads of a task used the same set. Z's rate is ten times the skills' ([1] section 2.3).
W, true_A, true_B = torch.randn(16, 16) / 4, torch.randn(3, 16, 2) / 4, torch.randn(3, 2, 16)
sets = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)[1:]  # (7, s): all but the empty one
pairs = torch.cartesian_prod(torch.arange(7), torch.arange(7))[torch.randperm(49)]
old, new = torch.logit(sets[pairs]).split([40, 9])  # the true Z (t, h, s): infinite logits are bits


def fresh(tasks, heads, skills):
    """A within 1 / sqrt(3 i); B zero: the layer starts as the frozen one; Z: every skill half on."""
    A, Z = torch.rand(skills, 16, 2) * 2 - 1, torch.rand(tasks, heads, skills) * 2 - 1
    return A / 48**0.5, torch.zeros(skills, 2, 16), Z / 1000


def train(A, B, Z, truth, few=None, lr=0.02, lr_z=0.2, noise=True):
    """A, B, Z and losses divided by that of the frozen W alone. few: examples (t, b, i); None: new ones each step."""
    A, B, Z = (p.clone().requires_grad_() for p in (A, B, Z))
    optimizer = torch.optim.Adam([{"params": [A, B], "lr": lr}, {"params": [Z], "lr": lr_z}])
    losses, test = [], torch.randn(len(Z), 100, 16)
    for step in range(301):
        if step in (0, 25, 50, 100, 200, 300):
            y, target = routed(test, W, Z, A, B), routed(test, W, *truth)
            losses.append(((y - target).square().sum() / (test @ W - target).square().sum()).item())
        x = torch.randn(len(Z), 16, 16) if few is None else few
        y = routed(x, W, Z, A, B, torch.rand(Z.shape) if noise else None)
        (y - routed(x, W, *truth)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return A.detach(), B.detach(), Z.detach(), losses


def report(name, A, B, Z, losses, lr=0.02):
    """How many numbers were trained, and losses. A single skill has the weight 1: no Z is trained."""
    sizes = (A.numel() + B.numel()) * (lr > 0), Z.numel() * (len(A) > 1)
    print(f"  {name:15} {sizes[0]:7} {sizes[1]:5}  ", "".join(f"{v:7.3f}" for v in losses))


print("  trained:         skills     Z   loss: 0     25     50    100    200    300 steps")
world, runs = (old, true_A, true_B), {}
for name, heads, skills in ("LoRA", 1, 1), ("Poly", 1, 3), ("Poly, 6 skills", 1, 6), ("MHR", 2, 3):
    runs[name] = train(*fresh(40, heads, skills), world)
    report(name, *runs[name])

print("\n5. What Z learned: which task uses which skill")
# Learned skills come in any order, so beside each true one stands the learned one whose weights are nearest. Then three
# more starts, also with a slow Z, and without noise: noise and a fast Z bring sigmoid(Z) to 0 or 1. A discrete Z is not
# always the true one: with manual_seed(1) at the top of this file, MHR's loss stays above 0.2.
w, true_w = weights(runs["MHR"][2]), weights(old)
for k in range(2):
    distances = (w[:, k, :, None] - true_w[:, k, None]).abs().sum(0)  # (learned s, true s)
    w[:, k] = w[:, k, distances.argmin(0)]
for t in range(3):
    show(f"task {t}: true w", "h s", true_w[t], 2, 0)
    show("learned w", "h s", w[t], 2, 0)
print(f"  Largest difference, in all {len(old)} tasks: {(w - true_w).abs().max():.3f}")
print("  three more starts:   loss             sigmoid(Z) is off 0 or 1 by")
for name, options in ("as before", {}), ("slow Z", {"lr_z": 0.02}), ("no noise", {"noise": False}):
    again = [train(*fresh(40, 2, 3), world, **options) for _ in range(3)]
    bits = [(Z.sigmoid() - Z.sigmoid().round()).abs().mean() for _, _, Z, _ in again]
    print(f"  {name:12}", "".join(f"{v:8.3f}" for v in [losses[-1] for *_, losses in again] + bits))

print("\n6. A new task: z trains its row of Z, μ one LoRA")
# MHR-z trains a new row of Z alone ([2] section 3), MHR also the skills, MHR-μ one LoRA that starts as their average
# ([2] "Poly-μ"), LoRA that of section 4. z recombines skills: a few examples suffice, if the task is made of these.
A, B, _, _ = runs["MHR"]
mhr, mu = (A, B, fresh(1, 2, 3)[2]), (A.mean(0, True), B.mean(0, True), torch.zeros(1, 1, 1))
one = *runs["LoRA"][:2], torch.zeros(1, 1, 1)
task, other = (new[:1], true_A, true_B), (new[:1], torch.randn(3, 16, 2) / 4, torch.randn(3, 2, 16))
print("  trained:         skills     Z   loss: 4     64     64 examples (the last of other skills)")
for name, start, lr in ("MHR-z", mhr, 0), ("MHR", mhr, 0.02), ("MHR-μ", mu, 0.02), ("LoRA", one, 0.02):
    cases = (task, 4), (task, 64), (other, 64)
    ends = [train(*start, truth, torch.randn(1, b, 16), lr=lr)[3][-1] for truth, b in cases]
    report(name, *start, ends, lr)

print("\n7. The layers of this repository give the same outputs")
# From the same W, A, B, Z and noise, in other sizes.
sys.path.append(sys.path[0] + "/..")
from lora import LoRA
from mhr import MHRLinear, MHRRouter
from poly import PolyLinear, PolyRouter

linear, x = torch.nn.Linear(8, 12, bias=False), torch.randn(5, 7, 8)
A, B, tasks = torch.randn(3, 8, 2), torch.randn(3, 2, 12), torch.arange(5)
poly_layer = PolyLinear(linear, LoRA(rank=2), PolyRouter(tasks=5, skills=3))
mhr_layer = MHRLinear(linear, LoRA(rank=2), MHRRouter(tasks=5, skills=3, heads=4))
for layer, heads in (poly_layer, 1), (mhr_layer, 4):
    Z = torch.randn(5, heads, 3)
    layer.inventory = torch.nn.ParameterDict({"A": A, "B": B})
    layer.router.Z = torch.nn.Parameter(Z.view_as(layer.router.Z))
    torch.manual_seed(1)
    theirs = layer.train()(x, tasks)
    torch.manual_seed(1)
    ours = routed(x, linear.weight.T, Z, A, B, torch.rand(Z.shape))
    assert (theirs - ours).abs().max() < 1e-6, f"{type(layer).__name__} differs"
    print(f"  {type(layer).__name__}, heads: {heads}. The largest difference is below 1e-6.")
