"""Precision and extremes: half-precision layers and routers, logits and noise at their limits, sizes at their limits.

How precision is handled: the frozen linear layer has the backbone's type; adapters and Z stay float32. Weights over
skills and mixtures of skills are computed in float32, the mixture is rounded once when it meets the activations.
"""

import copy
import math

import pytest
import torch
from torch import nn

import train
from baselines.hyperformer import HyperRouter
from ia3 import IA3, IA3Linear
from inject import adapter_parameters, task_ids
from lora import LoRA, LoRALinear
from methods import add_adapters, routed_layer
from mhr import MHRRouter
from plumbing.backbones import tiny_from_scratch
from poly import PolyRouter
from sft import SFT, SFTLinear, dense
from tests.test_poly_mhr import batch, each_file, each_routing, gradients, naive, trained

ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # the largest relative error of rounding to each type
INF = math.inf
each_half = pytest.mark.parametrize("dtype", ROUNDING)


# --- Layers in half precision -----------------------------------------------------------------------------------------


def half_layer(kind: str, adapter, dtype) -> nn.Module:
    """An adapted layer on a half-precision linear one, 32 to 48, with random parameters."""
    torch.manual_seed(0)
    linear = nn.Linear(32, 48).to(dtype)
    if kind == "one":
        layer = {LoRA: LoRALinear, IA3: IA3Linear, SFT: SFTLinear}[type(adapter)](linear, adapter)
    elif kind == "poly":
        layer = routed_layer(kind, "sft" if type(adapter) is SFT else "")(linear, adapter, PolyRouter(5, 3))
    else:
        layer = routed_layer(kind, "sft" if type(adapter) is SFT else "")(linear, adapter, MHRRouter(5, 3, heads=4))
    for name, p in layer.named_parameters():
        if not name.startswith("linear.") and p.is_floating_point():
            nn.init.normal_(p)
    return layer.eval()


def error_bound(layer, x, params: dict, u: float):
    """The largest error of each output to first order in u, the error of one rounding, in float64.

    LoRA rounds W0 x, A, B, x A and the result: u (|W0 x| + 3 S + |W0 x| + S) where S = alpha / r |x| |A| |B|.
    (IA)^3 rounds 1 + v and the scaled side, and the result of the linear layer: 3 u |y| on the output side, on the
    input side 2 u |(1 + v) x| |W0| + u |y|. SFT rounds W0 x, D, x D and the result: u (2 |W0 x| + 3 |x| |D|).
    """
    x, W, adapter = x.double(), layer.linear.weight.double(), layer.adapter
    y0 = torch.nn.functional.linear(x, W, layer.linear.bias.double())
    if isinstance(adapter, SFT):
        values = torch.atleast_2d(params["value"]).double()
        places = torch.atleast_2d(params["place"]).expand_as(values)  # in a mixture the same for all
        D = torch.stack([dense(value, place, W.shape) for value, place in zip(values, places, strict=True)])
        return u * (2 * y0.abs() + 3 * x.abs() @ D.abs().mT)
    params = {name: p.double() for name, p in params.items()}
    if isinstance(adapter, LoRA):
        low_rank = adapter.alpha / adapter.rank * (x.abs() @ params["A"].abs() @ params["B"].abs())
        return u * (2 * y0.abs() + 4 * low_rank)
    scale = (1 + params["v"]).unsqueeze(-2)
    if adapter.side == "out":
        return 3 * u * (scale * y0).abs()
    y = torch.nn.functional.linear(x * scale, W, layer.linear.bias.double())
    return 2 * u * ((x * scale).abs() @ W.T.abs()) + u * y.abs()


ADAPTERS = {"lora1": LoRA(1), "lora4": LoRA(4), "out": IA3("out"), "in": IA3("in"), "sft": SFT(0.3)}


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("kind", ["one", "poly", "mhr"])
@each_half
def test_half_precision_is_within_its_roundings(kind, adapter, dtype):
    """Outputs differ from exact ones by no more than the roundings of half precision, for a mixed batch and for one of
    one task; adapters and routers stay float32."""
    layer, x = half_layer(kind, adapter, dtype), torch.randn(6, 7, 32).to(dtype)
    exact = copy.deepcopy(layer).double()
    trained = [p for name, p in layer.named_parameters() if not name.startswith("linear.")]
    assert all(p.dtype == torch.float32 for p in trained if p.is_floating_point())
    for ids in ([0, 4, 2, 2, 1, 0], [3] * 6) if kind != "one" else ([],):
        args = (torch.tensor(ids),) if ids else ()
        params = layer.adapters(*args) if ids else dict(layer.params)
        assert all(p.dtype == torch.float32 for p in params.values() if p.is_floating_point())
        y, want = layer(x, *args), exact(x.double(), *args)
        assert y.dtype == dtype
        share = (y.double() - want).abs() / error_bound(layer, x, params, ROUNDING[dtype])
        assert 0.1 < share.max() < 1.02  # a bound ten times too large would say nothing


@pytest.mark.parametrize("adapter", ["lora", "ia3", "sft"])
def test_a_whole_model_in_bf16(adapter):
    """The tiny backbone under MHR: a mixed batch's loss within 1 % of fp32's, the gradients of adapters and Z in fp32
    and within 10 % of their norm."""
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = tiny_from_scratch().to(dtype).eval()
        cfg = train.Config(method="mhr", heads=4, skills=3, rank=2, adapter=adapter)
        add_adapters(model, cfg, tasks=4)
        for p in adapter_parameters(model).values():
            if p.is_floating_point():
                nn.init.normal_(p, std=0.02)
        x = torch.randint(3, 200, (4, 9))
        with task_ids([0, 1, 2, 3]):
            loss = model(input_ids=x, labels=x).loss
        loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad.dtype == torch.float32 for p in trained)
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in trained])))
    (loss, grad), (half_loss, half_grad) = results
    assert 0 < abs(half_loss - loss) < 0.01 * loss and (half_grad - grad).norm() < 0.1 * grad.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("adapter", [LoRA(2), IA3(), SFT(0.2)], ids=["lora", "ia3", "sft"])
@pytest.mark.parametrize("kind", ["one", "poly", "mhr"])
def test_the_default_type_is_not_that_of_adapters(kind, adapter, dtype):
    """Under torch.set_default_dtype(bfloat16), as models are loaded, adapters and Z are float32, new rows of Z too."""
    torch.set_default_dtype(dtype)
    try:
        router = HyperRouter(4, 3)
        router.add_tasks(1)
        layer = half_layer(kind, adapter, dtype)
        tasks = [] if kind == "one" else [torch.tensor([0, 1, 1])]
        if tasks:
            layer.router.add_tasks(1)
        y = layer(torch.randn(3, 5, 32), *tasks)
    finally:
        torch.set_default_dtype(torch.float32)
    own = [p.dtype for name, p in layer.named_parameters() if not name.startswith("linear.") and p.is_floating_point()]
    assert set(own) == {torch.float32} and y.dtype == dtype and y.isfinite().all()
    assert {p.dtype for p in router.parameters()} == {torch.float32}


@each_half
@pytest.mark.parametrize("adapter", [LoRA(2), IA3(), SFT(0.2)], ids=["lora", "ia3", "sft"])
@pytest.mark.parametrize("kind", ["poly", "mhr"])
def test_z_may_have_another_type_than_the_skills(kind, adapter, dtype):
    """`model.half()` with Z kept in float32, or the other way: the mixture has the type of the skills."""
    layer, tasks, x = half_layer(kind, adapter, torch.float32), torch.tensor([0, 1, 4]), torch.randn(3, 5, 32)
    want = layer(x, tasks)
    layer.router.to(dtype)
    assert {p.dtype for p in layer.adapters(tasks).values() if p.is_floating_point()} == {torch.float32}
    torch.testing.assert_close(layer(x, tasks), want, rtol=0.1, atol=0.1 * want.abs().max().item())
    layer.router.float(), layer.inventory.to(dtype)
    assert {p.dtype for p in layer.adapters(tasks).values() if p.is_floating_point()} == {dtype}
    torch.testing.assert_close(layer(x, tasks), want, rtol=0.1, atol=0.1 * want.abs().max().item())


# --- Weights over skills ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [True, False])
@each_half
@each_routing
@each_file
def test_half_precision_routers_are_float32_ones_rounded(module, routing, sample, dtype):
    """Rows of nothing but the lowest or the highest logits too: finite, not negative, sum 1 or 0, finite gradients.
    Catches EPS = 0 in float16 (0 / 0 = NaN), and the end of float16's noise, where u near 1 is 1."""
    low, high = torch.finfo(dtype).min, torch.finfo(dtype).max
    rows = [[-INF] * 3, [INF] * 3, [low] * 3, [high] * 3, [-30.0] * 3, [INF, -INF, 0.0], [0.3, -0.5, 2.0]]
    z = torch.tensor(rows * 40, dtype=dtype, requires_grad=True)
    torch.manual_seed(0)
    w = module.soft_partition(z, routing, sample)
    torch.manual_seed(0)
    assert torch.equal(w, module.soft_partition(z.float(), routing, sample).to(dtype))
    (w * torch.arange(3)).sum().backward()
    assert w.dtype == z.grad.dtype == dtype and w.isfinite().all() and z.grad.isfinite().all() and (w >= 0).all()
    total = w.float().sum(-1).unflatten(0, (40, -1))
    assert total[:, [0, 2]].eq(0).all()
    whole = [1, 3, 5, 6] if routing != "straight-through" else [1, 3, 5]  # rows that may not be empty
    assert ((total[:, whole] - 1).abs() <= 3 * ROUNDING[dtype]).all()


@each_half
@pytest.mark.parametrize("heads", [None, 2])
def test_a_half_precision_copy_of_a_whole_layer_works(heads, dtype):
    """`model.half()` after injection: the layer answers in that type, also for a row of Z that is all -infinity."""
    layer = trained(LoRA(2), heads).to(dtype)
    nn.init.constant_(layer.router.Z[0], -INF)
    x = batch(3, dtype=dtype)
    y = layer(x, torch.tensor([0, 1, 2]))
    assert y.dtype == dtype and y.isfinite().all() and torch.equal(y[0], layer.linear(x)[0])
    assert all(g.isfinite().all() for g in gradients(y, x, layer))


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@each_file
def test_relaxed_bernoulli_at_the_ends_of_logits_and_noise(module, temperature, monkeypatch):
    """No NaN in samples or gradients, samples in [0, 1] that grow with logit and noise: for logits to +-infinity, and u
    from 0 over the smallest floats to the largest one below 1, which are all that torch.rand can return."""
    u = torch.tensor([0.0, 2.0**-149, 2.0**-126, 2.0**-24, 0.5, 1 - 2.0**-24])
    z = torch.tensor([-INF, -1e30, -100.0, 0.0, 100.0, 1e30, INF])[:, None].repeat(1, len(u)).requires_grad_()
    monkeypatch.setattr(torch, "rand_like", lambda z: u.expand_as(z))
    sample = module.relaxed_bernoulli(z, temperature)
    sample.sum().backward()
    assert ((sample >= 0) & (sample <= 1)).all() and z.grad.isfinite().all()
    assert (sample.diff(dim=0) >= 0).all() and (sample.diff(dim=1) >= 0).all()
    assert sample[[0, 1]].eq(0).all() and sample[[-1, -2]].eq(1).all() and sample[3, 4] == 0.5


@each_file
def test_what_eps_changes(module):
    """EPS is 1e-12. A row's weights sum to S / (S + EPS): 1 within 1e-6 while a logit is above -13.8, 1/2 at S = EPS;
    straight-through divides by a count and has none."""
    assert module.EPS == 1e-12
    for z, total in ((-13.8, 1.0), (math.log(1e-12), 0.5), (-100.0, 0.0)):
        row = torch.tensor([[z] + [-INF] * 3], dtype=torch.float64)
        exact = torch.sigmoid(row).sum()
        w = module.soft_partition(row, "sigmoid", False).sum()
        torch.testing.assert_close(w, exact / (exact + 1e-12), rtol=1e-12, atol=0)
        assert abs(w - total) < 1e-6
        assert abs(module.soft_partition(row.float(), "sigmoid", False).sum() - w) < 1e-6
    assert module.soft_partition(torch.tensor([1.0, 2.0, 3.0, -1.0]), "straight-through", False).sum() == 1


# --- Sizes at their limits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [None, 8])  # 8: one head per feature, of both sides
@pytest.mark.parametrize("rank", [1, 20])  # 20: above the number of features, so of full rank
@pytest.mark.parametrize("tasks, skills", [(1, 1), (1, 3), (4, 1), (4, 3)])
def test_largest_ranks_and_smallest_numbers(heads, rank, tasks, skills):
    """A layer of 8 features with one skill, one task, one head per feature, rank 20, and all of it at once: outputs and
    gradients are those of the naive loops, in training too."""
    layer, x = trained(LoRA(rank), heads, 8, 8, tasks, skills), batch(3)
    ids = torch.arange(3) % tasks
    torch.manual_seed(1)
    weights = layer.router(ids)
    expected = naive(layer, x, list(weights))
    torch.manual_seed(1)
    y = layer(x, ids)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients(y, x, layer), gradients(expected, x, layer), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("heads", [None, 8])
def test_one_skill_is_that_adapter(heads):
    """With one skill its weight is 1 whatever Z and the noise, so the layer is the LoRA, and Z learns nothing."""
    layer, x = trained(LoRA(2), heads, 8, 8, skills=1), batch(3)
    one = LoRALinear(layer.linear, LoRA(2), {name: nn.Parameter(p[0]) for name, p in layer.inventory.items()})
    y = layer(x, torch.tensor([0, 1, 4]))
    torch.testing.assert_close(y, one(x), rtol=1e-9, atol=1e-9)
    assert gradients(y, x, layer)[1].abs().max() < 1e-9


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("ids", [[], [0], [0, 1]])
def test_an_empty_batch_is_refused(heads, ids):
    """One sentence, not a failed reshape."""
    with pytest.raises(ValueError, match=f"{len(ids)} task ids for a batch of 0 rows"):
        trained(LoRA(2), heads)(torch.zeros(0, 3, 8, dtype=torch.float64), torch.tensor(ids, dtype=torch.long))
