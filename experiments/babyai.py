r"""Routing beyond language: one agent for eight levels of BabyAI (Polytropon [1] section 3, appendices A.1 and B).

    pip install minigrid==3.2.0
    python -m experiments.babyai --method skilled --width 32 --frames 2000000
    python -m experiments.babyai --resume --output-dir runs/babyai-skilled-0          (--frames may grow)
    python -m experiments.babyai --plot runs/babyai-*       the paper's figure 2, and a table at equal episodes

The agent's parameters depend on the level l: theta_l = theta_0 + sum_j w_lj Phi_j ([1] eq. 3). theta_0 and Phi are
both trained. A skill Phi_j changes a tenth of the entries, drawn at random (`sft.py`). Each layer has its own router
(`poly.py`, `mhr.py`, `baselines/fixed.py`). A batch is divided by level; each part runs with its level's parameters.

    skilled       a Z over 9 skills, learned at a higher rate than the rest (dual-speed)
    single-speed  the same at one learning rate         dense   the same with skills of all entries ("- sparsity")
    mhr           the same with a Z for each of --heads blocks of a tensor's rows (not in the paper)
    expert        the table of appendix B               shared  one skill for all levels
    private       an agent for each level: theta_0 is zero and stays so, Phi is dense; no parameter is shared

What [1] leaves open, and what was chosen:
* Success is counted during training: actions are sampled, and so is Z where it is learned (not in shared, expert and
  private). [1] averages over a window of 100, without saying of what. Over 100 episodes, > 0.99 means 100 of 100, which
  most agents that succeed in 94 % of their episodes also reach within 20,000. So 1,000 episodes are reported too. A
  success at the last allowed step counts, with minigrid's reward of 0.1; in [1] it would not (n < n_max).
* "final" is the success of the finished agent in 500 more episodes a level, without noise of Z, actions sampled.
  Training never draws their seeds, and they are the same for all runs.
* Each slot (an environment) draws its next level uniformly at each reset. So levels have equal numbers of episodes, not
  of frames: an unsolved maze takes 576 frames, another level 64 or 128.
* PPO is that of BabyAI 1.1 [2], whose setup [1] follows: rewards times 20, lambda 0.99, 64 slots of 40 frames an
  update, 4 epochs of 2 batches, gradients through 20 frames, clipping 0.2 (of the value too), entropy 0.01, gradient
  norm at most 0.5 (over all levels together, also under private). After a time-out no reward is expected.
* theta_0 and Phi have one learning rate, and a step moves theta_l by both: under dense up to twice as far as under
  private, which has no theta_0. Private at `--lr 2e-4` beside dense at 1e-4 is the control for this.
* The noise of Z (eq. 2) is drawn once an update and used for acting and learning, so that PPO's ratios begin at one.
* The learning rate of Z is 1e-2: A.1 gives none; A.2, for language, gives 1e-2 to 1e-1.
* Private follows section 3.3, "disjoint parameters for each task"; a shared theta_0 would contradict that.
* Table 2 has eight skills, the text nine. `expert` has those of the eight that its levels need: with few levels fewer
  than `skilled`, which in [1] has as many.
* [2] normalises by batch. That would mix levels, and acting would differ from learning: here GroupNorm, by example.
* Kaiming uniform has torch's default bound 1 / sqrt(fan-in), 1 for look-up tables. A skill's vectors begin at 0, except
  under private, whose skills are whole agents.
* mhr: a layer has one Z for all heads unless --heads divides the rows of each of its tensors; with 8 heads these are
  the look-up tables and the last layers.

One process steps all slots; `share_of_time` in result.json is the shares of environments, acting and learning.
results/babyai.md shows all methods, half a million frames at [1]'s learning rate and three quarters of a million at
twice that rate, two runs side by side on two cores. This loop makes these runs; started again, it resumes them:

    for seed in 0 1; do for method in skilled shared expert private mhr single-speed dense; do
      echo --frames 500000 --seed $seed --method $method
      echo --frames 750000 --seed $seed --method $method --lr 2e-4 --output-dir runs/fast/babyai-$method-$seed
    done; done | OMP_NUM_THREADS=1 xargs -P 2 -L 1 \
      python -m experiments.babyai --resume --width 32 --levels GoToObj GoToRedBallGrey GoToRedBall

Shape key: t frames in time, n slots, m rows of frames, s skills, k entries of a skill.

[1] https://arxiv.org/abs/2202.13914   [2] Hui et al. 2020, https://arxiv.org/abs/2007.12770
"""

from dataclasses import dataclass

from plumbing.errors import RunError, UserError, exit_on_user_error
from plumbing.flags import as_flag, check_ranges, describe, explicit_flags, flag, one_job
from plumbing.folders import (
    CHECKPOINT, check_numbers, locked_folder, read_config, read_json, refuse_used, resumed_config, whole_file,
    write_config, write_json,
)  # fmt: skip

LEVELS = {  # table 2 of [1], its numbers: room, distracting boxes, distractors, go to, put, pick up, location, maze
    "GoToObj": (1,), "GoToRedBallGrey": (1, 2), "GoToRedBall": (1, 2, 3), "GoToLocal": (1, 2, 3, 4),
    "PutNextLocal": (1, 2, 3, 5), "PickupLoc": (1, 2, 3, 6, 7), "GoToObjMaze": (1, 8), "GoTo": (1, 2, 3, 4, 8),
}  # fmt: skip
METHODS = ("skilled", "single-speed", "dense", "mhr", "expert", "shared", "private")
USED_BY = {  # flags of some methods only
    "heads": ("mhr",), "skills": ("skilled", "single-speed", "dense", "mhr"), "lr_z": ("skilled", "dense", "mhr"),
    "density": ("skilled", "single-speed", "mhr", "expert", "shared"),
}  # fmt: skip
PAPER = {  # table 3 of [1]: episodes to success > 0.99 on eight levels
    "private": "> 6,000,000", "shared": "3,544,294", "expert": "4,608,019", "skilled": "2,218,226",
    "dense": "1,853,060",
}  # fmt: skip
WORDS = (  # all words of minigrid's instructions in these levels; 0 is no word
    "go to pick up put next the a object in front of you behind on your left right box ball key door "
    "red green blue purple yellow grey"
).split()
MINIGRID = "3.2.0"  # other versions may draw other episodes
LENGTH = 9  # words of the longest instruction: "put the red ball next to the blue key"
LONGEST = 576  # steps that an episode may take, in the level that allows most
ACTIONS = 7
TILE = (11, 6, 3)  # kinds, colours and states of a tile


@dataclass
class Config:
    """Train one agent on several levels of BabyAI by PPO, or plot runs.

    examples:
      python -m experiments.babyai --method skilled --width 32 --levels GoToObj GoToRedBall --frames 500000
      python -m experiments.babyai --plot runs/babyai-*
    """

    method: str = flag("skilled", "who uses which skill", METHODS, group="what to learn, and on what")
    levels: tuple = flag(tuple(LEVELS), "levels to train on", tuple(LEVELS))
    frames: int = flag(10_000_000, "frames of all levels together; with --resume may be more than before")
    skills: int = flag(9, "skills s (expert, shared, private: set by their tables)", group="agent and routing")
    heads: int = flag(8, "mhr: blocks that a tensor's rows are divided into")
    density: float = flag(0.1, "share of a tensor's entries that a skill may change (dense, private: 1)")
    width: int = flag(128, "channels of the image part; the paper's 128 is slow on a CPU")
    lr: float = flag(1e-4, "learning rate of theta_0 and Phi", group="optimisation")
    lr_z: float = flag(1e-2, "learning rate of Z (single-speed: --lr)")
    slots: int = flag(64, "environments side by side")
    rollout: int = flag(40, "frames of each environment in an update")
    recurrence: int = flag(20, "frames that gradients go back through")
    batch_size: int = flag(1280, "frames of an optimiser step")
    seed: int = flag(0, "seed of initial values, levels, actions and noise", group="the run")
    output_dir: str = flag("", "run folder; none: runs/babyai-METHOD-SEED", metavar="DIR")
    save_every: str = flag("10m", "checkpoint interval: 5 is 5 updates, 10m is 10 minutes", metavar="UPDATES|MINUTESm")
    resume: bool = flag(False, "resume the run in --output-dir, or start it if it is not there")
    plot: tuple = flag((), "run folders to plot", metavar="DIR", group="to plot instead of training")
    figure: str = flag("babyai", "path of figure and table, without .png, .svg, .md", metavar="PATH")


if __name__ == "__main__":  # read the flags before the slow imports: --help and mistakes answer at once
    FLAGS = explicit_flags(Config, {})

import dataclasses
import json
import math
import os
import time
from contextlib import redirect_stdout, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import relu
from tqdm import tqdm

from baselines.fixed import FixedRouter
from experiments.methods import NAVIGATION, ROOT
from inject import read_tensors, write_tensors
from mhr import MHRRouter
from plumbing.backbones import advice_on_memory
from plumbing.checkpoint import Progress
from plumbing.run import Run
from plumbing.tables import aligned, mean_std_text
from poly import PolyRouter
from sft import SFT, dense
from tools import figures

GAMMA, LAMBDA, EPOCHS, CLIP, ENTROPY, VALUE, NORM, REWARD = 0.99, 0.99, 4, 0.2, 0.01, 0.5, 0.5, 20.0
TRIALS = 500  # episodes of each level that score the finished agent
WINDOWS = (100, 1000)  # episodes that a success rate is the mean of
UNSEEN = 2**31  # seeds of training's episodes are below, those of trials begin here
LARGEST, MOST_SLOTS, MOST_FRAMES = 10**8, 10**4, 10**6  # parameters of all skills; slots; frames of an update

# --- Environments -----------------------------------------------------------------------------------------------------


def need_minigrid():
    """Raise UserError unless minigrid is installed, in the version of all runs."""
    try:
        installed = version("minigrid")
    except PackageNotFoundError:
        installed = "none"
    if installed != MINIGRID:
        needed = f"needs BabyAI's levels of minigrid {MINIGRID}, here is {installed}"
        raise UserError(f"experiments.babyai {needed}: pip install minigrid=={MINIGRID}")


def make_env(level: str, max_steps: int | None = None):
    """A level of minigrid, without gymnasium's checks. max_steps: of an episode; None: the level's own."""
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    import gymnasium
    import minigrid  # noqa: F401  it registers the levels

    return gymnasium.make(f"BabyAI-{level}-v0", disable_env_checker=True, max_steps=max_steps).unwrapped


def reset(env, seed: int) -> tuple[Tensor, Tensor]:
    """Begin the episode of a seed. -> image (7, 7, 3), words (LENGTH,)."""
    with redirect_stdout(None):  # minigrid prints the grids that it rejects
        shown, _ = env.reset(seed=seed)
    return torch.from_numpy(shown["image"]), encode(shown["mission"])


def encode(mission: str) -> Tensor:
    """An instruction to (LENGTH,) numbers of words, zeros at its end."""
    numbers = [1 + WORDS.index(word) for word in mission.split()]
    return torch.tensor(numbers + [0] * (LENGTH - len(numbers)), dtype=torch.uint8)


class Slots:
    """n environments in one process, and what they show: image (n, 7, 7, 3), words (n, LENGTH), level (n,).

    The run's seed, the slot and the number of its episode determine the episode's level and seed. So a checkpoint holds
    for each slot (`tensors`) that number and the episode's actions so far; `restore` takes them again.
    """

    def __init__(self, levels: tuple[str, ...], count: int, seed: int):
        self.levels, self.seed, self.envs = levels, seed, {}
        self.image = torch.zeros(count, 7, 7, 3, dtype=torch.uint8)
        self.words = torch.zeros(count, LENGTH, dtype=torch.uint8)
        self.level = torch.zeros(count, dtype=torch.int64)
        self.episode = torch.zeros(count, dtype=torch.int64)
        self.length = torch.zeros(count, dtype=torch.int64)  # of the episode so far
        self.actions = torch.zeros(count, LONGEST, dtype=torch.uint8)  # of the episode: the first `length`
        self.tensors = {"episode": self.episode, "length": self.length, "actions": self.actions}
        self.restore()

    def restore(self):
        """Bring every environment to where `tensors` says it is."""
        for n, length in enumerate(self.length.tolist()):
            self.begin(n)
            for action in self.actions[n, :length].tolist():
                self._act(n, action)

    def begin(self, n: int):
        """Begin a slot's episode, in a level drawn uniformly."""
        draw = np.random.default_rng((self.seed, n, int(self.episode[n])))
        level, seed = int(draw.integers(len(self.levels))), int(draw.integers(UNSEEN))
        if (n, level) not in self.envs:
            self.envs[n, level] = make_env(self.levels[level])
        self.image[n], self.words[n] = reset(self.envs[n, level], seed)
        self.level[n] = level

    def _act(self, n: int, action: int) -> tuple[float, bool]:
        shown, reward, terminated, truncated, _ = self.envs[n, int(self.level[n])].step(action)
        self.image[n] = torch.from_numpy(shown["image"])
        return reward, terminated or truncated

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
        """actions (n,) -> rewards (n,), ends (n,), and (level, success) of each episode that ended; success is 1 or 0.

        The reward is [1]'s: 1 - 0.9 steps / max_steps at success, 0 at any other step. Where an episode ended, the next
        one begins.
        """
        self.actions[torch.arange(len(actions)), self.length] = actions.to(torch.uint8)
        self.length += 1
        ended, reward, end = [], torch.zeros(len(actions)), torch.zeros(len(actions), dtype=torch.bool)
        for n, action in enumerate(actions.tolist()):
            reward[n], end[n] = self._act(n, action)
            if end[n]:
                ended.append((int(self.level[n]), int(reward[n] > 0)))
                self.episode[n] += 1
                self.length[n] = 0
                self.begin(n)
        return reward, end, ended


# --- The agent --------------------------------------------------------------------------------------------------------


class FiLM(nn.Module):
    """Two convolutions, scaled and shifted by the instruction, with a residual connection around them."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm, self.norm_out = nn.GroupNorm(1, width), nn.GroupNorm(1, width)
        self.scale, self.shift = nn.Linear(128, width), nn.Linear(128, width)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        y = self.second(relu(self.norm(self.first(x))))
        return x + relu(self.norm_out(y * self.scale(text)[..., None, None] + self.shift(text)[..., None, None]))


class See(nn.Module):
    """Image and instruction to features: BOW_ENDPOOL_RES of [2], appendix A.1 of [1]."""

    def __init__(self, width: int):
        super().__init__()
        self.tiles, self.words = nn.EmbeddingBag(sum(TILE), width, mode="sum"), nn.Embedding(len(WORDS) + 1, 128)
        self.read = nn.GRUCell(128, 128)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for _ in range(2))
        self.films = nn.ModuleList(FiLM(width) for _ in range(2))

    def forward(self, image: Tensor, words: Tensor) -> Tensor:
        """image (m, 7, 7, 3), words (m, LENGTH) -> (m, width). Each distinct instruction is read once."""
        distinct, which = words.unique(dim=0, return_inverse=True)
        text = torch.zeros(len(distinct), 128)
        for word in distinct[:, (distinct > 0).any(0)].long().T:  # as far as the longest of them
            text = torch.where(word[:, None] > 0, self.read(self.words(word), text), text)
        offset = torch.tensor([0, TILE[0], TILE[0] + TILE[1]])
        x = self.tiles((image.long() + offset).flatten(0, 2))  # a tile is the sum of its kind, colour and state
        x = x.view(len(image), 7, 7, -1).permute(0, 3, 1, 2).contiguous()
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = relu(norm(conv(x)))
        for film in self.films:
            x = film(x, text[which])
        return x.flatten(2).max(-1).values  # max-pooling of size 7: the whole view


class Decide(nn.Module):
    """Actor and critic: (m, 128) -> (m, ACTIONS + 1), logits of the actions and the value."""

    def __init__(self):
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, ACTIONS))
        self.critic = nn.Sequential(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat([self.actor(hidden), self.critic(hidden)], -1)


def fresh_agent(width: int) -> nn.ModuleDict:
    """The three parts of an agent for one level; matrices and tables are Kaiming uniform."""
    agent = nn.ModuleDict({"see": See(width), "remember": nn.LSTMCell(width, 128), "decide": Decide()})
    for module in agent.modules():
        for p in module.parameters(recurse=False):
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                nn.init.uniform_(p, -1, 1)  # it multiplies a one-hot vector: the fan-in is one
            elif p.dim() > 1:
                nn.init.kaiming_uniform_(p, a=math.sqrt(5))
    return agent


def agent_size(width: int) -> int:
    """How many parameters `fresh_agent` has."""
    return 54 * width**2 + 1066 * width + 186_376


class RoutedAgent(nn.Module):
    """theta_0, and for each of its parameters s skills, mixed for each level ([1] eq. 3).

    router_of(rows): the router of a layer whose parameters have so many rows. density: of the skills. base: if False,
    theta_0 stays zero, and every skill begins as a whole agent.
    """

    def __init__(self, width: int, router_of, density: float, base: bool = True):
        super().__init__()
        self.base, self.sft = fresh_agent(width), SFT(density)
        layers = {name: m for name, m in self.base.named_modules() if list(m.parameters(recurse=False))}
        rows = [[len(p) for p in layer.parameters(recurse=False)] for layer in layers.values()]
        self.routers = nn.ModuleList(router_of(r) for r in rows)
        self.names = [  # (its layer's number, its name) of each parameter
            (k, f"{a}.{b}") for k, a in enumerate(layers) for b, _ in layers[a].named_parameters(recurse=False)
        ]
        self.tasks, own = self.routers[0].tasks, dict(self.base.named_parameters())
        fresh = [dict(fresh_agent(width).named_parameters()) for _ in range(self.routers[0].skills)]
        self.values, self.places = nn.ParameterList(), []
        for _, name in self.names:
            places = torch.stack([self.sft.init(as_linear(own[name]))["place"] for _ in fresh])
            values = [f[name].detach().flatten()[place] for f, place in zip(fresh, places, strict=True)]
            begins = own[name].dim() > 1 or not base  # with a fresh agent's values, else with zeros
            self.values.append(torch.stack(values) * begins)
            self.register_buffer(f"place{len(self.places)}", places)
            self.places.append(places)
        if not base:
            for p in self.base.parameters():
                nn.init.zeros_(p.requires_grad_(False))

    def mixed(self, noise: int | None) -> list[dict[str, dict[str, Tensor]]]:
        """For each level, the parameters of each part of the agent. noise: seed of the routers' noise; None: none."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(noise or 0)
            weights = [router(torch.arange(self.tasks), sample=noise is not None) for router in self.routers]
        levels = [{part: {} for part in self.base} for _ in range(self.tasks)]
        own = dict(self.base.named_parameters())
        for (k, name), value, place in zip(self.names, self.values, self.places, strict=True):
            theta, (part, rest) = own[name], name.split(".", 1)
            linear, w = as_linear(theta), weights[k]
            if self.sft.density == 1 and w.dim() == 2:  # every skill has all entries in their order: D is their sum
                D = w @ value
            else:
                phi = self.sft.mix(linear, w if w.dim() == 3 else w[:, None], value, place)
                size = (linear.out_features, linear.in_features)
                D = [dense(v, phi["place"][0], size) for v in phi["value"]]
            for level, d in zip(levels, D, strict=True):
                level[part][rest] = theta + d.view_as(theta)
        return levels

    def forward(self, levels, image, words, level, first, memory) -> tuple[Tensor, Tensor, Tensor]:
        """Run t frames of n slots, each frame with its level's parameters (levels: from `mixed`).

        image (t, n, 7, 7, 3), words (t, n, LENGTH), level (t, n), first (t, n): whether an episode begins here; memory
        (n, 256): the LSTM's before. -> logits (t, n, ACTIONS), values (t, n), memory (n, 256) after.
        """

        def part(name: str):
            return lambda number, *rows: functional_call(self.base[name], levels[number][name], rows)

        def remember(number: int, x: Tensor, memory: Tensor) -> Tensor:
            return torch.cat(part("remember")(number, x, memory.chunk(2, -1)), -1)

        x = by_level(part("see"), level.flatten(), image.flatten(0, 1), words.flatten(0, 1)).unflatten(0, level.shape)
        hidden = []
        for t in range(len(level)):
            memory = by_level(remember, level[t], x[t], memory * ~first[t][:, None])
            hidden.append(memory[:, :128])
        out = by_level(part("decide"), level.flatten(), torch.cat(hidden)).unflatten(0, level.shape)
        return out[..., :ACTIONS], out[..., ACTIONS], memory


def as_linear(p: Tensor) -> SimpleNamespace:
    """What `SFT` asks of a linear layer, for a tensor of any shape: its first axis is o, the others are i."""
    return SimpleNamespace(out_features=len(p), in_features=p[0].numel(), weight=p)


def by_level(part, level: Tensor, *inputs: Tensor) -> Tensor:
    """part(number, *rows) of the rows of each level, in the order of the inputs. level (m,): the number of each row."""
    present = level.unique().tolist()
    rows = [(level == number).nonzero()[:, 0] for number in present]
    outputs = [part(number, *(x[r] for x in inputs)) for number, r in zip(present, rows, strict=True)]
    return torch.cat(outputs)[torch.cat(rows).argsort()]


def needed_skills(cfg: Config) -> list[int]:
    """The skills of table 2 that the levels need."""
    return sorted({s for name in cfg.levels for s in LEVELS[name]})


def build(cfg: Config) -> RoutedAgent:
    """The agent with the method's routers."""
    torch.manual_seed(cfg.seed)
    tasks, needed = len(cfg.levels), needed_skills(cfg)
    tables = {
        "shared": torch.ones(tasks, 1),
        "private": torch.eye(tasks),
        "expert": torch.tensor([[float(s in LEVELS[name]) for s in needed] for name in cfg.levels]),
    }

    def router_of(rows: list[int]) -> nn.Module:
        if cfg.method in tables:
            return FixedRouter(tables[cfg.method])
        if cfg.method == "mhr" and all(r % cfg.heads == 0 for r in rows):
            return MHRRouter(tasks, cfg.skills, cfg.heads)
        return PolyRouter(tasks, cfg.skills)

    density = 1.0 if cfg.method in ("dense", "private") else cfg.density
    return RoutedAgent(cfg.width, router_of, density, base=cfg.method != "private")


# --- PPO --------------------------------------------------------------------------------------------------------------


def policy(logits: Tensor) -> torch.distributions.Categorical:
    """Probabilities of actions. Raises RunError if the logits (..., ACTIONS) are not finite."""
    if not logits.isfinite().all():
        raise RunError("the agent's outputs are no longer finite: try a lower --lr in a new folder")
    return torch.distributions.Categorical(logits=logits)


def gae(reward: Tensor, value: Tensor, end: Tensor, last: Tensor) -> Tensor:
    """Advantages (t, n): A_t = delta_t + gamma lambda A_t+1, delta_t = r_t + gamma V_t+1 - V_t, cut where episodes end.

    reward, value, end (t, n): of each frame; end: whether the episode ends with it. last (n,): the value after the
    rollout.
    """
    advantage, after, going = torch.zeros_like(value), torch.zeros_like(last), (~end).float()
    for t in reversed(range(len(value))):
        following = last if t + 1 == len(value) else value[t + 1]
        after = reward[t] + GAMMA * following * going[t] - value[t] + GAMMA * LAMBDA * going[t] * after
        advantage[t] = after
    return advantage


def roll_out(agent: RoutedAgent, slots: Slots, memory: Tensor, first: Tensor, frames: int, noise: int):
    """Act for some frames in all slots; memory (n, 256) and first (n,) are changed in place.

    -> what each frame saw and gave (t, n, ...), by name; the episodes that ended; seconds of the environments.
    """
    record = {"image": slots.image, "words": slots.words, "level": slots.level, "first": first, "memory": memory}
    seen = {name: torch.zeros(frames, *x.shape, dtype=x.dtype) for name, x in record.items()}
    seen |= {name: torch.zeros(frames, len(first)) for name in ("log_prob", "value", "reward")}
    seen |= {"action": torch.zeros_like(seen["level"]), "end": torch.zeros_like(seen["first"])}
    ended, seconds = [], 0.0
    with torch.inference_mode():
        levels = agent.mixed(noise)
        for t in range(frames + 1):
            now = [x[None] for x in (slots.image, slots.words, slots.level, first)]
            logits, value, after = agent(levels, *now, memory)
            if t == frames:
                break
            for name, x in record.items():
                seen[name][t] = x
            chosen = policy(logits[0])
            seen["action"][t], seen["value"][t] = action, _ = chosen.sample(), value[0]
            seen["log_prob"][t] = chosen.log_prob(action)
            start = time.perf_counter()
            seen["reward"][t], seen["end"][t], over = slots.step(action)
            seconds += time.perf_counter() - start
            ended += over
            memory.copy_(after), first.copy_(seen["end"][t])
    seen["advantage"] = gae(REWARD * seen["reward"], seen["value"], seen["end"], value[0].clone())
    return seen, ended, seconds


def loss_of(agent: RoutedAgent, batch: dict[str, Tensor], noise: int) -> tuple[Tensor, dict[str, float]]:
    """PPO's loss of a batch of frames (t, n, ...), with gradients through t frames, and figures for the log."""
    levels = agent.mixed(noise)
    names = ("image", "words", "level", "first")
    logits, value, _ = agent(levels, *(batch[name] for name in names), batch["memory"][0])
    chosen = policy(logits)
    ratio = (chosen.log_prob(batch["action"]) - batch["log_prob"]).exp()
    gain = torch.min(ratio * batch["advantage"], ratio.clamp(1 - CLIP, 1 + CLIP) * batch["advantage"]).mean()
    goal = batch["value"] + batch["advantage"]
    near = batch["value"] + (value - batch["value"]).clamp(-CLIP, CLIP)
    error, entropy = torch.max((value - goal) ** 2, (near - goal) ** 2).mean(), chosen.entropy().mean()
    return VALUE * error - gain - ENTROPY * entropy, {"value_error": error.item(), "entropy": entropy.item()}


def sequences(seen: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """A rollout (t, n, ...) divided into sequences: (length, t / length * n, ...), by name."""
    return {name: x.unflatten(0, (-1, length)).transpose(0, 1).flatten(1, 2) for name, x in seen.items()}


def learn(agent: RoutedAgent, optimizer, seen: dict[str, Tensor], cfg: Config, noise: int) -> dict[str, float]:
    """EPOCHS passes over a rollout, in batches of sequences of cfg.recurrence frames. -> mean figures for the log.

    A sequence begins with the memory that acting had there. Raises RunError if gradients are not finite.
    """
    all_sequences = sequences(seen, cfg.recurrence)
    steps, trainable = [], [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(EPOCHS):
        for some in torch.randperm(all_sequences["level"].shape[1]).split(cfg.batch_size // cfg.recurrence):
            loss, more = loss_of(agent, {name: x[:, some] for name, x in all_sequences.items()}, noise)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(trainable, NORM).item()
            if not math.isfinite(norm):
                raise RunError(f"the gradients' norm is {norm}: try a lower --lr in a new folder")
            optimizer.step()
            steps.append({"loss": loss.item(), "norm": norm, **more})
    return {name: round(sum(step[name] for step in steps) / len(steps), 5) for name in steps[0]}


# --- The run ----------------------------------------------------------------------------------------------------------


def make_optimizer(agent: RoutedAgent, cfg: Config) -> torch.optim.Adam:
    """Adam at cfg.lr, for Z at cfg.lr_z ([1] section 2.3, dual speed)."""
    z = [router.Z for router in agent.routers if router.Z.requires_grad]
    rest = [p for p in agent.parameters() if p.requires_grad and all(p is not q for q in z)]
    fast = cfg.lr if cfg.method == "single-speed" else cfg.lr_z
    groups = [{"params": rest, "lr": cfg.lr}, {"params": z, "lr": fast}]
    return torch.optim.Adam([group for group in groups if group["params"]], eps=1e-5, fused=True)


def train(cfg: Config) -> dict:
    """Train as cfg says and write the run folder; returns the content of result.json."""
    check(cfg)
    need_minigrid()
    folder = Path(cfg.output_dir)
    advice = "fewer --slots or a smaller --width in a new folder, or a machine that has more"
    with locked_folder(folder, "python -m experiments.babyai"), advice_on_memory(advice):
        if not (cfg.resume and (folder / "config.json").exists()):
            refuse_used(cfg.output_dir)
        elif (folder / "result.json").exists():
            result = read_json(folder / "result.json", frames=int)
            if result["frames"] >= cfg.frames:
                print(f"{folder} is finished: nothing to resume, unless with more --frames")
                return result
            if not (folder / CHECKPOINT).exists():
                raise UserError(f"{folder} is finished and its {CHECKPOINT} is gone: start again in another folder")
        print(describe(cfg, dataclasses.asdict(Config())))
        return train_in(folder, cfg)


def train_in(folder: Path, cfg: Config) -> dict:
    """`train` in a folder that this process has locked. `plumbing/run.py` resumes, logs, saves, stops on a signal."""
    agent, slots = build(cfg), Slots(cfg.levels, cfg.slots, cfg.seed)
    memory, first = torch.zeros(cfg.slots, 256), torch.ones(cfg.slots, dtype=torch.bool)
    optimizer, frames = make_optimizer(agent, cfg), cfg.slots * cfg.rollout  # of an update
    run, episodes = begin(folder, cfg, agent, optimizer, slots, memory=memory, first=first)
    with run:
        for update in run.steps(-(-cfg.frames // frames), f"train {cfg.method}", counts="frame", each=frames):
            acting, noise = chance(cfg.seed, update)
            torch.manual_seed(acting)
            times = [time.perf_counter()]
            seen, ended, env = roll_out(agent, slots, memory, first, cfg.rollout, noise)  # 1  act
            times.append(time.perf_counter())
            means = learn(agent, optimizer, seen, cfg, noise)  # 2  learn
            times.append(time.perf_counter())
            seconds = {"env": env, "act": times[1] - times[0] - env, "learn": times[2] - times[1]}
            episodes += ended
            shown = f"{folder}: success {recent_success(cfg, episodes)}"
            run.record(**means, shown=shown, frames=update * frames, **seconds, episodes=ended)  # 3  record
    return finish(cfg, folder, agent, run.now, np.array(episodes).reshape(-1, 2))


def begin(folder: Path, cfg: Config, agent, optimizer, slots: Slots, **state: Tensor) -> tuple[Run, list]:
    """The run, resumed or new, and its episodes so far; writes config.json. state: what else the loop changes.

    Raises UserError, with no line of the log lost, if checkpoint or log are damaged or do not belong to this run.
    """
    checkpoint, log = folder / CHECKPOINT, folder / "log.jsonl"
    lines, tensors = lines_of(log), agent.state_dict() | slots.tensors | state
    limits = {f"place{k}": agent.base.get_parameter(name).numel() for k, (_, name) in enumerate(agent.names)}
    limits |= {"episode": 2**62, "length": LONGEST, "actions": ACTIONS}
    if cfg.resume:
        refuse_odd_numbers(checkpoint, tensors, limits)
    beside = dict(save_every=cfg.save_every, resume=cfg.resume, made_with={"--rollout": cfg.rollout}, unit="update")
    run = Run(folder, tensors, optimizer, **beside)
    if len(lines) < run.now.step:
        raise UserError(f"{log} has not all episodes of {checkpoint}: start again in another folder")
    if run.now.step:
        slots.restore()
    write_config(folder, cfg)
    (folder / "result.json").unlink(missing_ok=True)  # of fewer --frames
    return run, outcomes(lines[: run.now.step]).tolist()


def refuse_odd_numbers(checkpoint: Path, tensors: dict[str, Tensor], limits: dict[str, int]):
    """Raise UserError unless these numbers of a checkpoint are from 0 to below their limits. `Run` checks all else."""
    with suppress(ValueError):  # there is no file, or it is damaged
        saved, _ = read_tensors(str(checkpoint))
        for name, limit in limits.items():
            x = saved.get(f"model.{name}", tensors[name])
            if x.dtype == tensors[name].dtype and ((x < 0) | (x >= limit)).any():
                raise UserError(f"{checkpoint}: {name} has numbers that no run has: delete it to start the run again")


def chance(seed: int, update: int) -> list[int]:
    """All chance of an update: a seed of actions and batches, and one of the routers' noise."""
    return np.random.SeedSequence((seed, update)).generate_state(2).tolist()


def recent_success(cfg: Config, episodes: list) -> str:
    """Success of each level's last 100 episodes, in per cent, in the order of --levels."""
    recent = np.array(episodes[-5000:]).reshape(-1, 2)
    rates = [recent[recent[:, 0] == k, 1][-100:] for k in range(len(cfg.levels))]
    return " ".join(f"{100 * rate.mean():.0f}" if len(rate) else "-" for rate in rates)


def finish(cfg: Config, folder: Path, agent: RoutedAgent, done: Progress, episodes: np.ndarray) -> dict:
    """Write what a finished run leaves beside its checkpoint: agent.safetensors and result.json, which this returns."""
    write_tensors(agent.state_dict(), str(folder / "agent.safetensors"))
    z = sum(router.Z.numel() for router in agent.routers if router.Z.requires_grad)
    base, skills = (sum(p.numel() for p in part if p.requires_grad) for part in (agent.base.parameters(), agent.values))
    frames = done.step * cfg.slots * cfg.rollout
    result = {"update": done.step, "frames": frames, "seconds": round(done.seconds, 1)}
    result |= speed(lines_of(folder / "log.jsonl"))
    result |= {"parameters": {"theta_0": base, "skills": skills, "routing": z}}
    result |= {"levels": report(cfg, episodes, score(agent, cfg))}
    write_json(folder / "result.json", result)
    for name, level in result["levels"].items():
        print(f"{name:16} " + "  ".join(f"{key} {value}" for key, value in level.items()))
    print(f"{result['frames_per_second']} frames per second, {result['share_of_time']}; saved in {folder}")
    return result


def score(agent: RoutedAgent, cfg: Config) -> dict[str, float]:
    """Success in TRIALS episodes of each level that training never saw, without noise of Z, actions sampled; "all" is
    their mean."""
    level = torch.arange(len(cfg.levels)).repeat_interleave(TRIALS)
    envs = [make_env(cfg.levels[k]) for k in level]
    image, words = map(torch.stack, zip(*(reset(env, UNSEEN + k % TRIALS) for k, env in enumerate(envs)), strict=True))
    memory, success = torch.zeros(len(level), 256), torch.zeros(len(level))
    going, first = torch.arange(len(level)), torch.zeros(len(level), dtype=torch.bool)
    torch.manual_seed(cfg.seed)
    with torch.inference_mode(), tqdm(total=len(level), desc="trials", unit="episode", disable=None) as bar:
        levels = agent.mixed(None)
        while len(going):
            now = [x[going][None] for x in (image, words, level, first)]
            logits, _, memory[going] = agent(levels, *now, memory[going])
            ended = []
            for k, action in zip(going, policy(logits[0]).sample(), strict=True):
                shown, reward, terminated, truncated, _ = envs[k].step(action.item())
                image[k], success[k] = torch.from_numpy(shown["image"]), float(reward > 0)
                ended.append(terminated or truncated)
            going = going[~torch.tensor(ended)]
            bar.update(sum(ended))
    by_name = {name: success[level == k] for k, name in enumerate(cfg.levels)} | {"all": success}
    return {name: round(own.mean().item(), 3) for name, own in by_name.items()}


def report(cfg: Config, episodes: np.ndarray, final: dict[str, float]) -> dict[str, dict]:
    """`summary` of each level's episodes and of all together, with their `score` (final)."""
    success = success_by_level(episodes, cfg.levels)
    return {name: summary(own) | {"final": final[name]} for name, own in success.items()}


# --- Logs and what they say -------------------------------------------------------------------------------------------


def moving(success: np.ndarray, window: int) -> np.ndarray:
    """Mean of each `window` successes in a row, one for each episode from the window-th on; [] if there are fewer."""
    total = np.concatenate([[0], success.cumsum()])
    return (total[window:] - total[:-window]) / window


def reached(success: np.ndarray, window: int) -> int | None:
    """Episodes until the mean over a window of them was above 0.99; None: never."""
    above = np.flatnonzero(moving(success, window) > 0.99)
    return int(above[0]) + window if len(above) else None


def summary(success: np.ndarray) -> dict:
    """Episodes, success of the last 1,000 of them, and for each window the episodes until > 0.99 (None: never)."""
    last = round(float(success[-WINDOWS[-1] :].mean()), 3) if len(success) else 0.0
    to = {f"> 0.99 of {window}": reached(success, window) for window in WINDOWS}
    return {"episodes": len(success), "success": last, **to}


def lines_of(log: Path) -> list[dict]:
    """The lines of a log, one an update, without an incomplete last one. Raises UserError for a damaged or missing
    line."""
    lines = []
    for number, text in enumerate(log.read_bytes().split(b"\n")[:-1] if log.exists() else [], 1):
        try:
            lines.append(undamaged(json.loads(text), number))
        except (ValueError, KeyError, TypeError, RecursionError):
            why = f"is damaged, or not the line of update {number}, and the run's episodes are not known without it"
            raise UserError(f"{log}:{number} {why}: leave the run out, or start it again in another folder") from None
    return lines


def undamaged(line: dict, update: int) -> dict:
    """The line of an update, also of an earlier version. Raises ValueError, KeyError or TypeError unless it has all
    entries that are read."""
    numbers = [line[name] for name in ("frames", "env", "act", "learn")]
    positive = all(type(n) in (int, float) and 0 < n < 1e15 for n in numbers)
    known = all(k in range(len(LEVELS)) and success in (0, 1) for k, success in line["episodes"])
    if not (positive and known and line["update"] == update):
        raise ValueError
    return line


def outcomes(lines: list[dict]) -> np.ndarray:
    """All episodes of a log, in order: rows (number of the level, success)."""
    return np.array([pair for line in lines for pair in line["episodes"]], dtype=int).reshape(-1, 2)


def success_by_level(episodes: np.ndarray, levels: tuple[str, ...]) -> dict[str, np.ndarray]:
    """{level: success of its episodes in order, "all": of all episodes}. episodes: from `outcomes`."""
    return {level: episodes[episodes[:, 0] == k, 1] for k, level in enumerate(levels)} | {"all": episodes[:, 1]}


def speed(lines: list[dict]) -> dict:
    """Frames per second of a log, and the shares of environments, acting and learning in its time."""
    spent = {part: sum(line[part] for line in lines) for part in ("env", "act", "learn")}
    total = sum(spent.values())
    shares = {part: round(seconds / total, 3) for part, seconds in spent.items()}
    return {"frames_per_second": round(lines[-1]["frames"] / total), "share_of_time": shares}


# --- Figure and table -------------------------------------------------------------------------------------------------

SAME = ("method", "levels", "seed", "frames", "output_dir", "save_every", "resume", "plot", "figure")  # in `names_of`
NOTE = f"""Success, in %, mean +- standard deviation over seeds, is of training, at the largest number of episodes that
all runs have ("at"): over all episodes so far, and over the last 1,000, or all of fewer. Actions are sampled, and so is
Z, but under shared, expert and private. "> 0.99 of 100": episodes until all of 100 were successes; "of 1,000": until
991 of 1,000 were; a figure a seed, - is not within the run, which may have more episodes than "at". "final": finished
agents, each after its own frames, on {TRIALS} episodes a level that training never saw, the same for all runs, without
noise of Z; - if a seed is not finished. "frames": of a run, one after another if they differ. "frames/s": one run's,
also if others ran beside it. "env", "act", "learn": shares of the time of environments, acting and learning. "paper":
Polytropon's table 3, episodes to > 0.99 on all of its eight levels. In the figure, success is the mean of 100 episodes
as in the paper, of 1,000 where all runs have 10,000 of each level; it begins too high: the first episodes to end are
those that succeed.
"""


def names_of(configs: list[Config]) -> list[str]:
    """The name of each run: its method, and the settings that differ among the runs and are not the default. Seeds
    share a name."""
    differing = [
        field.name
        for field in dataclasses.fields(Config)
        if field.name not in SAME and len({getattr(cfg, field.name) for cfg in configs}) > 1
    ]

    def name_of(cfg: Config) -> str:
        own = [name for name in differing if cfg.method in USED_BY.get(name, METHODS)]
        changed = {name: getattr(cfg, name) for name in own if getattr(cfg, name) != getattr(Config(), name)}
        return " ".join([cfg.method, *(f"{name}={value}" for name, value in changed.items())])

    return [name_of(cfg) for cfg in configs]


def alike(configs: list[Config]) -> str:
    """The settings that are the same in all runs, in one line."""
    fields = [field.name for field in dataclasses.fields(Config) if field.name not in SAME]
    same = {name: values.pop() for name in fields if len(values := {getattr(cfg, name) for cfg in configs}) == 1}
    return " ".join(["all:", *(f"{name}={value}" for name, value in same.items())])


def read_run(folder: Path, levels: tuple[str, ...]) -> SimpleNamespace:
    """A run, finished or not: success (`success_by_level`), frames, speed, and result (None if it is not finished).

    Raises UserError if its log has no line yet, or a file is damaged.
    """
    lines = lines_of(folder / "log.jsonl")
    if not lines:
        raise UserError(f"--plot {folder}: there is no update in its log yet; leave it out, or wait")
    success, path = success_by_level(outcomes(lines), levels), folder / "result.json"
    result = read_json(path, levels=dict, parameters=dict) if path.exists() else None
    if result:
        try:
            final = {name: result["levels"][name]["final"] for name in success}
        except (KeyError, TypeError):
            raise UserError(f"{path}: a level is missing or has no 'final': it was changed by hand") from None
        check_numbers(path, final, result["parameters"])
    return SimpleNamespace(success=success, frames=lines[-1]["frames"], speed=speed(lines), result=result)


def plot(folders: tuple[str, ...], figure: str):
    """Write FIGURE.png and FIGURE.svg: success by episodes, of each level and of all, as the mean over 1,000 episodes,
    or 100 in short runs. Write FIGURE.md: tables at equal episodes and of the runs.

    Raises UserError if a folder holds no run, the runs are of different levels, or two differ in nothing.
    """
    configs, runs = [read_config(Config, Path(folder) / "config.json") for folder in folders], {}
    levels, named = configs[0].levels, zip(folders, configs, names_of(configs), strict=True)
    for folder, cfg, name in sorted(named, key=lambda run: METHODS.index(run[1].method)):
        if cfg.levels != levels:
            raise UserError(f"--plot {folder}: its levels are not those of {folders[0]}; plot them apart")
        if cfg.seed in runs.setdefault(name, {}):
            raise UserError(f"--plot {folder}: another of the folders is {name} of seed {cfg.seed} too; leave one out")
        runs[name][cfg.seed] = read_run(Path(folder), levels)
    seeds = {name: list(own.values()) for name, own in runs.items()}
    fewest = min(len(run.success[level]) for own in seeds.values() for run in own for level in levels)
    window = WINDOWS[1] if fewest >= 10 * WINDOWS[1] else WINDOWS[0]
    panels = {
        level: {name: [moving(run.success[level], window) for run in own] for name, own in seeds.items()}
        for level in (*levels, "all")
    }
    figures.by_episodes(panels, figure, window)
    text = f"{at_equal_episodes(seeds, levels)}\n\n{of_runs(seeds)}\n\n{alike(configs)}"
    back = NAVIGATION if Path(figure).resolve().parent == ROOT / "results" else ""
    with whole_file(Path(f"{figure}.md")) as temporary:
        temporary.write_text(
            f"{back}# BabyAI: success at equal episodes\n\n{NOTE}\n"
            + "".join(f"    {line}\n" for line in text.splitlines())
        )
    print(f"{text}\n\n{NOTE}\n{figure}.png, {figure}.svg, {figure}.md")


def at_equal_episodes(runs: dict[str, list[SimpleNamespace]], levels: tuple[str, ...]) -> str:
    """A table with a row for each level and name. runs: {name: the `read_run` of each seed}."""
    window = WINDOWS[-1]
    rows = [("level", "run", *(f"> 0.99 of {w:,}" for w in WINDOWS), "at", "so far", f"last {window:,}", "final")]
    for level in (*levels, "all"):
        shared = min(len(run.success[level]) for own in runs.values() for run in own)
        for name, own in runs.items():
            to = [[reached(run.success[level], w) for run in own] for w in WINDOWS]
            cells = [" / ".join(f"{n:,}" if n else "-" for n in seeds) for seeds in to]
            so_far = [100 * run.success[level][:shared].mean() for run in own] if shared else []
            last = [100 * run.success[level][max(0, shared - window) : shared].mean() for run in own] if shared else []
            final = [100 * run.result["levels"][level]["final"] for run in own] if all(r.result for r in own) else []
            rows.append((level, name, *cells, f"{shared:,}", *(mean_std_text(x) or "-" for x in (so_far, last, final))))
    return aligned(rows)


def of_runs(runs: dict[str, list[SimpleNamespace]]) -> str:
    """A table with a row for each name: seeds, trained parameters, frames; frames per second and shares of time, as
    means over seeds; the paper's episodes."""
    rows = [("run", "seeds", "parameters", "frames", "frames/s", "env %", "act %", "learn %", "paper")]
    for name, own in runs.items():
        counts = [sum(run.result["parameters"].values()) for run in own if run.result]
        frames = " / ".join(f"{n:,}" for n in sorted({run.frames for run in own}))
        rate = np.mean([run.speed["frames_per_second"] for run in own])
        shares = [np.mean([100 * run.speed["share_of_time"][part] for run in own]) for part in ("env", "act", "learn")]
        cells = [f"{counts[0]:,}" if counts else "-", frames, *(f"{mean:,.0f}" for mean in (rate, *shares))]
        rows.append((name, str(len(own)), *cells, PAPER.get(name.split()[0], "-")))
    return aligned(rows, left=1)


# --- Settings ---------------------------------------------------------------------------------------------------------


def check(cfg: Config):
    """Raise UserError for settings that are out of range or do not fit together, naming the flag."""
    check_ranges(cfg)
    for name in ("frames", "width", "slots", "rollout", "recurrence"):
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name} must be above 0, not {getattr(cfg, name)}")
    if cfg.density > 1:
        raise UserError(f"--density is a share and must not be above 1, not {cfg.density}")
    if cfg.rollout % cfg.recurrence or cfg.batch_size % cfg.recurrence:
        raise UserError(f"--recurrence {cfg.recurrence} must divide --rollout and --batch-size")
    if cfg.method == "mhr" and (cfg.width % cfg.heads or 128 % cfg.heads):
        raise UserError(f"--heads {cfg.heads} must divide --width {cfg.width} and 128")
    refuse_endless(cfg)
    if len(set(cfg.levels)) < len(cfg.levels):
        raise UserError(f"--levels names a level twice: {' '.join(cfg.levels)}")


def refuse_endless(cfg: Config):
    """Raise UserError for settings that would fill any memory: the system may kill a process without an error."""
    if cfg.slots > MOST_SLOTS or cfg.slots * cfg.rollout > MOST_FRAMES:
        most = f"more than {MOST_SLOTS:,} slots or {MOST_FRAMES:,} frames an update: choose fewer"
        raise UserError(f"--slots {cfg.slots}, --rollout {cfg.rollout} are {most}")
    given = cfg.method in USED_BY["skills"]
    table = {"shared": 1, "private": len(cfg.levels), "expert": len(needed_skills(cfg))}
    skills = table.get(cfg.method, cfg.skills)
    if (count := skills * agent_size(cfg.width)) > LARGEST:
        which = f"--skills {skills}, --width {cfg.width}" if given else f"--width {cfg.width} with {skills} skills"
        raise UserError(f"{which} are {count:,} parameters, more than {LARGEST:,}: choose a smaller one")


def main(flags: dict):
    cfg = Config(**{name: tuple(v) if isinstance(v, list) else v for name, v in flags.items()})
    one_job(cfg, flags, {"plot": ("figure",)})
    if cfg.plot:
        return plot(cfg.plot, cfg.figure)
    cfg.output_dir = cfg.output_dir or f"runs/babyai-{cfg.method}-{cfg.seed}"
    fixed = {name: value for name, value in flags.items() if name not in ("frames", "figure")}
    if saved := resumed_config(Config, fixed | {"output_dir": cfg.output_dir}):
        frames = flags.get("frames", saved.frames)  # no schedule depends on them
        if frames < saved.frames:
            least = f"less than the run in {cfg.output_dir} has, {saved.frames}"
            raise UserError(f"--frames {frames} is {least}: give more")
        cfg = dataclasses.replace(saved, frames=frames)
    if ignored := [as_flag(name) for name in flags if cfg.method not in USED_BY.get(name, METHODS)]:
        print(f"ignored with --method {cfg.method}: {', '.join(ignored)}")
    if "figure" in flags:
        print("ignored without --plot: --figure")
    return train(cfg)


if __name__ == "__main__":
    exit_on_user_error(main, FLAGS)
