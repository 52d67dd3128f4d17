"""Checkpoints: all that the rest of an interrupted run depends on, in one file.

A checkpoint holds the tensors that the loop changes, the optimiser's state, the random state, the losses not yet
logged, and the step, from which data order and learning rates follow. So a resumed run is bit-identical to an
uninterrupted one: in one process on the same CPU. Several processes resume with one common random state
(`processes.py` says when theirs diverge). On CUDA the last bits of gradient sums differ from run to run anyway, unless
`backbones.make_deterministic` was called.

It is a safetensors file, written under a temporary name, fsynced and renamed over the one before: whenever the process
dies, there is a whole checkpoint or none. A run is not resumed if its backbone or its tasks have changed.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from inject import adapter_parameters, digest, fingerprint, read_tensors, write_tensors
from plumbing.errors import RunError, UserError
from plumbing.folders import refuse_other

LOWER_RATE = "Try a lower --lr, or fp32 if --precision was bf16, in a new folder: resuming would fail in the same way"


class Progress(NamedTuple):
    """How far a run is: its last whole step, its seconds, the losses since the last log line, the loss in that line."""

    step: int = 0
    seconds: float = 0.0
    recent: tuple[float, ...] = ()
    loss: float = math.nan

    def after(self, step: int, loss: float, seconds: float) -> "Progress":
        return Progress(step, seconds, (*self.recent, loss), self.loss)

    def logged(self) -> "Progress":
        """A log line has been written; its loss is the mean of the recent ones."""
        return Progress(self.step, self.seconds, (), sum(self.recent) / len(self.recent))


def run_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a run changes or has drawn, by name: adapters and routers, and whatever else is trained."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad} | adapter_parameters(model)


def marks_of_tasks(tasks: list) -> str:
    """A short hash of tasks (`data.Task`): their names, and of each part its size, its first and its last example."""
    sha = hashlib.sha256()
    for task in tasks:
        for part in (task.train, task.dev, task.test):
            sha.update(repr((task.name, len(part), *(part[k] for k in (0, -1) if len(part)))).encode())
    return sha.hexdigest()[:16]


def marks_of_model(model: nn.Module) -> dict[str, str]:
    """A pre-trained model's backbone and adapters as short hashes, for `refuse_other`."""
    return {"backbone": fingerprint(model), "checkpoint": digest(adapter_parameters(model))[:16]}


def save_checkpoint(path: Path, changed: dict[str, Tensor], optimizer, progress: Progress, made_with=None):
    """Replace the last checkpoint by a new one.

    changed: every tensor that the loop changes, by name. made_with: {"backbone": hash, ...}, for `load_checkpoint` to
    compare. Raises RunError if a value is not finite, OSError if the file cannot be written; the last one then stays.
    """
    tensors = {f"model.{name}": p.detach().contiguous() for name, p in changed.items()}
    numbers, states = {}, optimizer.state_dict()["state"]
    for k, state in states.items():
        for name, value in state.items():
            (tensors if isinstance(value, Tensor) else numbers)[f"optimizer.{k}.{name}"] = value
    if broken := [name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]:
        raise RunError(f"{broken[0]} is not finite after step {progress.step}: nothing of it was saved. {LOWER_RATE}")
    tensors["random"] = torch.get_rng_state()
    tensors |= {name: device.get_rng_state() for name, device in _generators().items()}
    state = {**progress._asdict(), "numbers": numbers, "trained": list(states), "made_with": made_with}
    write_tensors(tensors, path, state=json.dumps(state))


@torch.no_grad()
def load_checkpoint(path: Path, changed: dict[str, Tensor], optimizer, made_with=None) -> Progress:
    """Restore what `save_checkpoint` saved, in place. Tensors and optimiser must be made as they were then.

    made_with: as given to `save_checkpoint`; None: do not compare. Raises UserError, with nothing changed, if the file
    is damaged, belongs to another run, or was made with something else.
    """
    try:
        tensors, metadata = read_tensors(path)
        state = json.loads(metadata["state"])
        saved, trained, progress = tensors | state["numbers"], set(state["trained"]), _progress(state)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is no whole checkpoint ({error}): delete it to start the run again") from None
    refuse_other(path, state.get("made_with"), made_with or {})
    generators = _generators()
    for name in {"random.cuda", "random.mps"} - generators.keys():
        saved.pop(name, None)  # the run is resumed without its GPU
    own = {f"model.{name}": p for name, p in changed.items()}
    check_tensors(path, saved, own | flat_state(optimizer, trained) | {"random": None})
    states = by_parameter(saved)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": states})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for k, entries in states.items():  # once more: load_state_dict rounds them to the parameter's type
        own_state = optimizer.state[parameters[k]]
        own_state |= {n: v.to(parameters[k].device) if isinstance(v, Tensor) else v for n, v in entries.items()}
    for name, p in own.items():
        p.copy_(saved[name])
    torch.set_rng_state(saved["random"])
    for name in saved.keys() & generators.keys():
        generators[name].set_rng_state(saved[name])
    return progress


def _generators() -> dict:
    """The modules with a random state of their own: {name in a checkpoint: torch.cuda or torch.mps}."""
    here = {"random.cuda": torch.cuda, "random.mps": torch.mps}
    return {name: module for name, module in here.items() if module.is_available()}


def check_tensors(path: Path, saved: dict, expected: dict):
    """Raise UserError unless a checkpoint has exactly the expected names, and each value fits."""
    for name in sorted(saved.keys() | expected.keys()):
        if name not in saved or not _fits(name, saved[name], expected.get(name)):
            wrong = "missing, unknown, of another shape or type, or not finite"
            advice = "delete it to start the run again"
            raise UserError(f"{path}: {name} is {wrong}, so it is of a run with other settings: {advice}")


def _progress(state: dict) -> Progress:
    """The Progress that a checkpoint's JSON holds. Raises ValueError, TypeError or OverflowError if it holds none."""
    now = Progress(*(state[name] for name in Progress._fields))._replace(recent=tuple(state["recent"]))
    if type(now.step) is not int or not 0 < now.step < 2**31:
        raise ValueError(f"its step is {str(now.step)[:40]}")
    if not all(math.isfinite(x) for x in (now.seconds, *now.recent)) or not isinstance(now.loss, float):  # loss: or NaN
        raise ValueError("its seconds or losses are no numbers")
    return now


def flat_state(optimizer: torch.optim.Optimizer, trained: set) -> dict:
    """{"optimizer.K.NAME": value} of the parameters with these numbers, as the first step makes it: a step of the same
    optimiser on parameters without memory ("meta")."""
    groups = []
    for group in optimizer.param_groups:
        params = [torch.empty_like(p, device="meta", requires_grad=True) for p in group["params"]]
        for p in params:
            p.grad = torch.empty_like(p)
        groups.append(group | {"params": params, "fused": False})
    twin = type(optimizer)(groups)
    twin.step()
    state = {k: own for k, own in twin.state_dict()["state"].items() if k in trained}
    return {f"optimizer.{k}.{name}": value for k, own in state.items() for name, value in own.items()}


def _fits(name: str, value, like) -> bool:
    """Whether a value from a checkpoint can take the place of `like`: its type and shape, and it is finite. A state of
    random numbers: whether a generator takes it."""
    if name in ("random", "random.cuda", "random.mps"):
        try:
            torch.Generator(name.partition(".")[2] or "cpu").set_state(value)
        except (RuntimeError, TypeError):
            return False
        return True
    if not isinstance(like, Tensor) or not isinstance(value, Tensor):
        return like is not None and type(value) is type(like)
    if (value.shape, value.dtype) != (like.shape, like.dtype):
        return False
    return not value.is_floating_point() or bool(value.isfinite().all())


def by_parameter(flat: dict) -> dict[int, dict]:
    """{"optimizer.K.NAME": value} to {K: {NAME: value}}."""
    state = {}
    for key, value in flat.items():
        if key.startswith("optimizer."):
            _, k, name = key.split(".")
            state.setdefault(int(k), {})[name] = value
    return state
