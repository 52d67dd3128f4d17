"""Adafactor in stacks: what transformers' class computes, in as many operations for 400 layers as for one.

transformers.Adafactor steps one parameter after another, with two dozen small GPU kernels each. Adapters are many small
parameters of few shapes: here those of one shape are stacked for the arithmetic, k of them as a tensor (k, ...).

All that Adafactor keeps or limits by parameter stays so: moments, step count, RMS, clipping. The parameters and their
state are no part of a stack: they are separate tensors, changed in place, and named, shaped and typed as transformers'.
So either class loads the other's state_dict. The numbers are transformers' too, but for the order of sums on a GPU.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import Adafactor

LIMIT = 2**24  # elements of a stack: 64 MB, at most five such at once; their kernels run for longer than a launch takes
HALF = {torch.bfloat16, torch.float16}


class StackedAdafactor(Adafactor):
    """Adafactor with given learning rates: without relative steps and first moments.

    groups: [{"params": [...], "lr": 1e-3, "weight_decay": 0.0}, ...]. scale_parameter: multiply each parameter's rate
    by its RMS, or by 1e-3 if that is larger.
    """

    def __init__(self, groups: list[dict], scale_parameter: bool = False):
        super().__init__(groups, scale_parameter=scale_parameter, relative_step=False)

    @torch.no_grad()
    def step(self):
        """Step all parameters that have a gradient. Nothing here waits for the device.

        Raises ValueError if a loaded state has other settings, RuntimeError for a sparse gradient.
        """
        for group in self.param_groups:
            if group["relative_step"] or group["beta1"] is not None:
                raise ValueError("StackedAdafactor has no relative_step or beta1: use Adafactor")
            for params in self._alike(group["params"]):
                self._apply(params, self._update(params, group), group)

    def _alike(self, params: list[Tensor]) -> Iterator[list[Tensor]]:
        """The parameters that have a gradient, in lists to be stacked; counts their step.

        Those of a list have one shape, type, device and step count, and at most LIMIT elements; a larger one is alone.
        """
        alike = {}
        for p in params:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError("Adafactor does not support sparse gradients")
            state = self.state[p]
            if not state:
                state.update(first_state(p))
            state["step"] += 1
            alike.setdefault((p.shape, p.dtype, p.device, state["step"]), []).append(p)
        for same in alike.values():
            size = max(1, LIMIT // max(1, same[0].numel()))
            yield from (same[k : k + size] for k in range(0, len(same), size))

    def _update(self, params: list[Tensor], group: dict) -> Tensor:
        """What to subtract from k parameters: (k, ...), each clipped for itself. Moves their moments."""
        states, (k, n) = [self.state[p] for p in params], (len(params), params[0].numel())
        beta2 = 1 - states[0]["step"] ** group["decay_rate"]
        grad = stacked([p.grad for p in params])
        square = grad.square().add_(group["eps"][0])
        if params[0].dim() > 1:  # factored, over the last two axes
            rows = moved(states, "exp_avg_sq_row", square.mean(-1), beta2)
            columns = moved(states, "exp_avg_sq_col", square.mean(-2), beta2)
            update = self._approx_sq_grad(rows, columns)
        else:
            update = moved(states, "exp_avg_sq", square, beta2).rsqrt()
        update.mul_(grad)
        norm = torch.linalg.vector_norm(update.reshape(k, n), dim=1)  # (k,)
        excess = (norm / (n**0.5 * group["clip_threshold"])).clamp_(min=1.0)
        return update.div_(excess.view(k, *[1] * params[0].dim())).mul_(group["lr"])

    def _apply(self, params: list[Tensor], update: Tensor, group: dict):
        """Decay k parameters and subtract the update (k, ...). Their state gets the RMS from before."""
        decay, one = group["weight_decay"] * group["lr"], [1] * params[0].dim()
        half = params[0].dtype in HALF
        exact = stacked(params).unbind() if half else params
        rms = torch._foreach_div(torch._foreach_norm(exact), params[0].numel() ** 0.5)
        for p, value in zip(params, rms, strict=True):
            self.state[p]["RMS"] = value
        if group["scale_parameter"]:
            size = torch.stack(rms).clamp_(min=group["eps"][1])  # (k,)
            update.mul_(size.view(-1, *one))
            if decay:
                torch._foreach_mul_(exact, (1 - decay * size).unbind())
        elif decay:
            torch._foreach_add_(exact, exact, alpha=-decay)
        torch._foreach_sub_(exact, update.unbind())
        if half:
            torch._foreach_copy_(params, exact)


def first_state(p: Tensor) -> dict:
    """The state of a parameter before its first step, under transformers' names."""
    shapes = {"exp_avg_sq": p.shape}
    if p.dim() > 1:
        shapes = {"exp_avg_sq_row": p.shape[:-1], "exp_avg_sq_col": p.shape[:-2] + p.shape[-1:]}
    return {"step": 0} | {name: p.new_zeros(shape) for name, shape in shapes.items()}


def stacked(tensors: list[Tensor]) -> Tensor:
    """(k, ...) of k tensors, half precision in fp32. To read only: of a single fp32 tensor it is a view."""
    stack = torch.stack(tensors) if len(tensors) > 1 else tensors[0].unsqueeze(0)
    return stack.float() if stack.dtype in HALF else stack


def moved(states: list[dict], name: str, now: Tensor, beta: float) -> Tensor:
    """Move a moment of k parameters towards its value now (k, ...), in place; returns their stack (k, ...)."""
    for state in states:
        state[name] = state[name].to(now)  # a first or a loaded one has its parameter's type, which may be bf16
    moments = [state[name] for state in states]
    torch._foreach_mul_(moments, beta)
    torch._foreach_add_(moments, now.unbind(), alpha=1 - beta)
    return stacked(moments)
