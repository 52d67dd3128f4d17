"""Adafactor in stacks equals transformers' Adafactor, parameter by parameter, whatever is stacked with what."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Adafactor

from plumbing import adafactor
from plumbing.adafactor import StackedAdafactor
from plumbing.checkpoint import Progress, load_checkpoint, save_checkpoint
from tools.estimate_memory import Peak

# Each number is the same operations on the same inputs, but for the order of sums, which a processor may choose: a few
# roundings, of 6e-8 in fp32. Where an update all but cancels a parameter, they are a share of the tensor's largest
# value. A bf16 parameter may then be rounded to its neighbour.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float64: 1e-14}
LAYER = {"A": (3, 16, 2), "B": (3, 2, 12), "Z": (7, 2, 3)}  # a LoRA layer with three skills, under MHR with two heads
SHAPES = [*LAYER.values(), (6, 5), (9,), (1, 4), (), (2, 3, 2, 4)]
CLASSES = [Adafactor, StackedAdafactor]
each_type = pytest.mark.parametrize("dtype", ROUNDING)
both_ways = pytest.mark.parametrize("first, second", [CLASSES, CLASSES[::-1]], ids=["to stacks", "from stacks"])


def parameters(shapes: list[tuple[int, ...]], dtype=torch.float32) -> list[torch.nn.Parameter]:
    """Normal random parameters, the same at each call."""
    draw = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in shapes]


def optimizer(cls, *groups: list, **settings):
    """An optimiser of lists of parameters: each has its own learning rate and weight decay, the first has no decay."""
    groups = [dict(params=ps, lr=0.03 / (j + 1), weight_decay=0.1 * j) | settings for j, ps in enumerate(groups)]
    scale = dict(scale_parameter=settings.get("scale_parameter", False))
    return cls(groups, **scale) if cls is StackedAdafactor else cls(groups, **scale, relative_step=False)


def give_gradients(params: list, step: int, absent: float = 0.0, spread: float = 3.0):
    """Normal random gradients of this step, each with a scale of its own; a share of them is absent."""
    draw = torch.Generator().manual_seed(1000 + step)
    for p in params:
        scale = 10 ** (spread * torch.randn((), generator=draw).item())
        grad = torch.randn(p.shape, generator=draw) * scale
        p.grad = None if torch.rand((), generator=draw) < absent else grad.to(p)


def steps(opt, first: int, last: int, **how):
    """The steps first .. last - 1 of an optimiser."""
    for step in range(first, last):
        give_gradients(parameters_of(opt), step, **how)
        opt.step()


def parameters_of(opt) -> list[torch.Tensor]:
    return [p for group in opt.param_groups for p in group["params"]]


def everything(opt) -> list:
    """All parameters and their states, the numbers as they are."""
    states = [sorted(opt.state.get(p, {}).items()) for p in parameters_of(opt)]
    return [p.detach() for p in parameters_of(opt)] + [value for state in states for _, value in state]


def assert_same(opt, other, exactly: bool = False):
    """Both have the same state, names and types included, and the same numbers: exactly, or up to rounding."""
    ours, theirs = opt.state_dict()["state"], other.state_dict()["state"]
    assert {k: own.keys() for k, own in ours.items()} == {k: own.keys() for k, own in theirs.items()}
    for value, expected in zip(everything(opt), everything(other), strict=True):
        assert type(value) is type(expected)
        if exactly or not isinstance(value, torch.Tensor):
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(expected))
        else:
            rtol = ROUNDING[value.dtype]
            atol = rtol * expected.abs().max().item() if expected.numel() else 0.0
            torch.testing.assert_close(value, expected, rtol=rtol, atol=atol)


# --- The same numbers -------------------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=8), min_size=1, max_size=3),
    st.sampled_from([*ROUNDING]),
    st.sampled_from([0.0, 0.4]),
    st.sampled_from([0.0, 3.0]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_equals_one_after_another(groups, dtype, absent, spread, scale):
    """Any shapes in any groups, gradients of any scale, some of them absent: so step counts differ within a shape.
    Rates are scaled by each parameter's RMS, or not."""
    own, one_by_one = (
        optimizer(cls, *(parameters(shapes, dtype) for shapes in groups), scale_parameter=scale)
        for cls in CLASSES[::-1]
    )
    for opt in (own, one_by_one):
        steps(opt, 0, 5, absent=absent, spread=spread)
    assert_same(own, one_by_one)


def test_types_are_not_stacked_with_others():
    """Of one shape: each parameter keeps its own, with moments in fp32 or float64."""
    own, one_by_one = (
        optimizer(cls, [p for dtype in ROUNDING for p in parameters([(6, 5)] * 2, dtype)]) for cls in CLASSES[::-1]
    )
    for opt in (own, one_by_one):
        steps(opt, 0, 3)
    assert_same(own, one_by_one)


def test_devices_are_not_stacked_with_others():
    params = [*parameters([(6, 5)] * 2), torch.nn.Parameter(torch.empty(6, 5, device="meta"))]
    opt = optimizer(StackedAdafactor, params)
    steps(opt, 0, 2)
    assert all(opt.state[p]["RMS"].device == opt.state[p]["exp_avg_sq_row"].device == p.device for p in params)


@pytest.mark.parametrize("clip, eps, decay_rate", [(0.5, (1e-30, 1e-3), -0.8), (1.0, (1e-4, 1e-3), -0.5)])
def test_other_settings_of_a_group(clip, eps, decay_rate):
    own, one_by_one = (
        optimizer(cls, parameters([(6, 5), (9,)] * 2), clip_threshold=clip, eps=eps, decay_rate=decay_rate)
        for cls in CLASSES[::-1]
    )
    for opt in (own, one_by_one):
        steps(opt, 0, 4)
    assert_same(own, one_by_one)


def test_one_stack_for_all_differs():
    """What would be wrong with Adafactor of the stacked tensor: it clips one parameter for the gradient of another."""
    shapes, whole = [(6, 5)] * 4, torch.nn.Parameter(torch.stack(parameters([(6, 5)] * 4)).detach())
    own, naive = optimizer(StackedAdafactor, parameters(shapes)), optimizer(Adafactor, [whole])
    for step in range(3):
        params = parameters_of(own)
        give_gradients(params, step)
        whole.grad = torch.stack([p.grad for p in params])
        own.step()
        naive.step()
    differences = [(p - q).abs().max().item() for p, q in zip(params, whole, strict=True)]
    assert max(differences) > 1e-3


@pytest.mark.parametrize("scale", [1e6, 1e-6, 0.0, math.inf, math.nan])
def test_a_gradient_touches_its_own_parameter_only(scale):
    """The first of four gradients changes its scale in step 2: the other three parameters are as if it had not."""
    runs = []
    for factor in (1.0, scale):
        opt = optimizer(StackedAdafactor, parameters([(6, 5)] * 4))
        for step in range(4):
            params = parameters_of(opt)
            give_gradients(params, step)
            params[0].grad.mul_(factor if step == 2 else 1.0)
            opt.step()
        runs.append(params)
    changed, *same = (not torch.equal(p, q) for p, q in zip(*runs, strict=True))
    assert changed and not any(same)


def test_without_gradients_nothing_changes():
    opt = optimizer(StackedAdafactor, parameters([(6, 5)] * 2))
    before = copy.deepcopy(everything(opt))
    opt.step()
    assert not opt.state and all(torch.equal(p, q) for p, q in zip(everything(opt), before, strict=True))


# --- What is refused --------------------------------------------------------------------------------------------------


def test_sparse_gradients_are_refused():
    opt = optimizer(StackedAdafactor, parameters([(6, 5)]))
    parameters_of(opt)[0].grad = torch.ones(6, 5).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step()
    assert not opt.state


@pytest.mark.parametrize("other", [dict(relative_step=True), dict(beta1=0.9)], ids=str)
def test_settings_that_only_transformers_has_are_refused(other):
    """As a state_dict may bring them: a step would silently do without."""
    params = parameters([(6, 5)])
    opt = optimizer(StackedAdafactor, params)
    opt.load_state_dict(optimizer(Adafactor, params, **other).state_dict())
    give_gradients(params, 0)
    with pytest.raises(ValueError, match="use Adafactor"):
        opt.step()


# --- States and checkpoints -------------------------------------------------------------------------------------------


def two_groups(cls, dtype=torch.float32):
    return optimizer(cls, parameters([*LAYER.values()] * 2, dtype), parameters([(9,), (), (6, 5)], dtype))


def take_over(opt, cls, tmp_path=None):
    """A fresh optimiser of this class that goes on where `opt` is: by its state_dict, or by a checkpoint file."""
    heir = two_groups(cls, parameters_of(opt)[0].dtype)
    old, new = ({f"{k}": p.detach() for k, p in enumerate(parameters_of(o))} for o in (opt, heir))
    if tmp_path:
        save_checkpoint(tmp_path / "checkpoint", old, opt, Progress(3))
        load_checkpoint(tmp_path / "checkpoint", new, heir)
    else:
        heir.load_state_dict(copy.deepcopy(opt.state_dict()))
        for name, p in new.items():
            p.copy_(old[name])
    return heir


@each_type
@both_ways
def test_a_state_dict_goes_on_in_the_other_class(first, second, dtype):
    """In bf16, torch rounds a loaded state: both classes go on from the rounded one, in fp32."""
    opt = two_groups(first, dtype)
    steps(opt, 0, 3, absent=0.3)
    stays, heir = (take_over(opt, cls) for cls in (first, second))
    assert_same(heir, stays, exactly=True)
    for each in (stays, heir):
        steps(each, 3, 6, absent=0.3)
    assert_same(heir, stays)


@each_type
@both_ways
def test_a_checkpoint_goes_on_in_the_other_class(tmp_path, first, second, dtype):
    opt = two_groups(first, dtype)
    steps(opt, 0, 3, absent=0.3)
    heir = take_over(opt, second, tmp_path)
    assert_same(heir, opt, exactly=True)
    for each in (opt, heir):
        steps(each, 3, 6, absent=0.3)
    assert_same(heir, opt)


@each_type
def test_resumed_equals_uninterrupted(tmp_path, dtype):
    """Bit for bit."""
    opt = two_groups(StackedAdafactor, dtype)
    steps(opt, 0, 3, absent=0.3)
    heir = take_over(opt, StackedAdafactor, tmp_path)
    for each in (opt, heir):
        steps(each, 3, 6, absent=0.3)
    assert_same(heir, opt, exactly=True)


# --- Operations and memory --------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts what torch computes in its context: neither views nor marks for a profiler."""

    FREE = {"view", "unbind", "unsqueeze", "_record_function_enter_new", "_record_function_exit"}
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ not in self.FREE
        return func(*args, **(kwargs or {}))


def operations(cls, layers: int, dtype=torch.float32) -> int:
    """Of a step that is not the first, of adapters of so many layers and of their routers."""
    shapes = [LAYER["A"], LAYER["B"]]
    opt = optimizer(cls, parameters([LAYER["Z"]] * layers, dtype), parameters(shapes * layers, dtype))
    steps(opt, 0, 1)
    with Operations() as counted:
        opt.step()
    return counted.count


@pytest.mark.parametrize("dtype, most", [(torch.float32, 26), (torch.bfloat16, 30)])
def test_operations_do_not_grow_with_the_layers(dtype, most):
    """Three shapes, so three stacks, for 30 layers and for 60. One after another, they do grow."""
    count = operations(StackedAdafactor, 30, dtype)
    assert count == operations(StackedAdafactor, 60, dtype) <= 3 * most
    assert operations(Adafactor, 30, dtype) > 20 * 3 * 30


@pytest.mark.parametrize("limit", [1, 60, 100, 2**24])
def test_the_limit_changes_nothing(monkeypatch, limit):
    """Of seven parameters with 30 elements: each alone, two or three at once, all at once."""
    whole, parts = (optimizer(StackedAdafactor, parameters([(6, 5)] * 7 + [(9,)] * 3)) for _ in range(2))
    steps(whole, 0, 4, absent=0.2)
    monkeypatch.setattr(adafactor, "LIMIT", limit)
    steps(parts, 0, 4, absent=0.2)
    assert_same(parts, whole)


def peak(cls, count: int, shape: tuple[int, ...], dtype=torch.float32) -> int:
    """Bytes that a step takes for a moment, for so many parameters of this shape."""
    opt = optimizer(cls, [], parameters([shape] * count, dtype))
    steps(opt, 0, 1)
    with Peak() as memory:
        opt.step()
    return memory.peak


@each_type
@pytest.mark.parametrize("shape", [(64, 64), (1, 4096), (4096,)])
def test_memory_is_that_of_five_stacks(monkeypatch, shape, dtype):
    """However many parameters there are (the axis of length 1, a rank, makes moments as large as the parameter)."""
    monkeypatch.setattr(adafactor, "LIMIT", 8 * 4096)
    assert peak(StackedAdafactor, 80, shape, dtype) < 5.1 * max(4, dtype.itemsize) * adafactor.LIMIT


@each_type
def test_a_large_parameter_takes_no_more_memory_than_before(monkeypatch, dtype):
    """One that shares no stack is not copied."""
    monkeypatch.setattr(adafactor, "LIMIT", 8 * 4096)
    assert peak(StackedAdafactor, 3, (256, 256), dtype) <= peak(Adafactor, 3, (256, 256), dtype)
