"""experiments/babyai.py: reinforcement learning with a routed agent. Needs minigrid, which nothing else does."""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from experiments import babyai
from experiments.babyai import LEVELS, Config, Slots
from inject import read_tensors, write_tensors
from plumbing.errors import RunError, UserError
from plumbing.flags import explicit_flags
from plumbing.folders import CHECKPOINT, write_json
from tests.helpers import check_legible, drawn

try:
    babyai.need_minigrid()
except UserError as reason:
    pytest.skip(str(reason), allow_module_level=True)

EPOCHS = babyai.EPOCHS  # which `little` changes
EASY = ("GoToObj", "GoToRedBallGrey", "PickupLoc")
TINY = dict(levels=EASY, width=8, slots=4, rollout=8, recurrence=4, batch_size=16, skills=2, heads=4, frames=64, seed=3)


@pytest.fixture(autouse=True)
def little(monkeypatch):
    """Tiny runs pass once over a rollout, and are scored on two short episodes a level."""
    monkeypatch.setattr(babyai, "EPOCHS", 1)
    monkeypatch.setattr(babyai, "TRIALS", 2)


@pytest.fixture
def short(monkeypatch):
    """Episodes of at most 3 steps, so that 8 frames have many ends."""
    monkeypatch.setattr(babyai, "make_env", functools.partial(babyai.make_env, max_steps=3))


def tiny(**changes) -> Config:
    return Config(**TINY | changes)


def fresh(cfg: Config) -> tuple:
    """Agent, slots, memory and first, as a run begins."""
    memory, first = torch.zeros(cfg.slots, 256), torch.ones(cfg.slots, dtype=torch.bool)
    return babyai.build(cfg), Slots(cfg.levels, cfg.slots, cfg.seed), memory, first


def rolled_out(cfg: Config, noise: int = 5):
    """(agent, what a rollout saw)."""
    agent, *state = fresh(cfg)
    return agent, babyai.roll_out(agent, *state, cfg.rollout, noise)[0]


# --- Environments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allowed", [64, 2])
def test_a_known_best_episode_gets_the_papers_reward(allowed, monkeypatch):
    """Two steps ahead of the object, two steps forward: 0, then 1 - 0.9 * 2 / n_max, of GoToObj's 64 or of 2, the last
    that is allowed; and the slot begins anew."""
    if allowed != 64:
        monkeypatch.setattr(babyai, "make_env", functools.partial(babyai.make_env, max_steps=allowed))
    slots = Slots(("GoToObj",), 2, seed=0)
    env = slots.envs[0, 0]
    (x, y), (obj,) = env.instrs.desc.obj_poss[0], env.instrs.desc.obj_set
    env.grid.set(x, y, None)
    env.grid.set(4, 1, obj)
    env.instrs.desc.obj_poss, env.agent_pos, env.agent_dir = [(4, 1)], (1, 1), 0
    turn, forward = 0, 2
    reward, end, ended = slots.step(torch.tensor([forward, turn]))
    assert reward.tolist() == [0, 0] and not end.any() and ended == []
    reward, end, ended = slots.step(torch.tensor([forward, turn]))
    assert reward.tolist() == [pytest.approx(1 - 0.9 * 2 / allowed), 0] and end.tolist() == [True, allowed == 2]
    assert ended[0] == (0, 1) and slots.episode[0] == 1 and slots.length[0] == 0
    if allowed == 64:
        assert ended[1:] == [] and slots.episode[1] == 0
        assert slots.length[1] == 2 and slots.actions[1, :2].tolist() == [turn, turn]


def test_time_out_is_an_end_without_success():
    """Turning in place for the 64 steps that GoToObj allows: reward 0, no success."""
    slots = Slots(("GoToObj",), 1, seed=0)
    env = slots.envs[0, 0]
    env.instrs.desc.obj_poss = []  # nowhere: turning may not find it
    results = [slots.step(torch.tensor([0])) for _ in range(64)]
    assert [len(ended) for *_, ended in results] == [0] * 63 + [1]
    assert results[-1][2] == [(0, 0)] and sum(float(reward) for reward, *_ in results) == 0


def test_words_cover_the_instructions_of_all_levels():
    """Every word is known, LENGTH holds the longest instruction, and LONGEST the actions of any episode."""
    longest = 0
    for level in LEVELS:
        env = babyai.make_env(level)
        for seed in range(20):
            mission = env.reset(seed=seed)[0]["mission"]
            numbers = [number for number in babyai.encode(mission).tolist() if number]
            assert [babyai.WORDS[number - 1] for number in numbers] == mission.split()
        assert env.max_steps == {"PutNextLocal": 128, "GoToObjMaze": 576, "GoTo": 576}.get(level, 64)
        longest = max(longest, env.max_steps)
    assert longest == babyai.LONGEST
    assert len(babyai.encode("put the red ball next to the blue key")) == babyai.LENGTH


def test_the_three_levels_of_our_runs_need_no_instruction():
    """GoToObj has one object, and the two others always ask for a red ball."""
    objects = []
    for seed in range(30):
        env = babyai.make_env("GoToObj")
        env.reset(seed=seed)
        objects.append(sum(cell is not None and cell.type != "wall" for cell in env.grid.grid))
    assert set(objects) == {1}
    for level in ("GoToRedBallGrey", "GoToRedBall"):
        missions = {babyai.make_env(level).reset(seed=seed)[0]["mission"] for seed in range(30)}
        assert missions <= {"go to the red ball", "go to a red ball"}


def test_levels_are_drawn_uniformly(monkeypatch):
    """At each reset every level is equally likely, and slots draw independently."""
    shown = {"mission": "go to the red ball", "image": np.zeros((7, 7, 3), np.uint8)}

    class Stub:
        def reset(self, seed):
            return shown, {}

    monkeypatch.setattr(babyai, "make_env", lambda level: Stub())
    slots, drawn = Slots(tuple(LEVELS), 8, seed=1), []
    for episode in range(200):
        slots.episode[:] = episode
        for n in range(8):
            slots.begin(n)
        drawn.append(slots.level.clone())
    drawn = torch.stack(drawn)
    assert all(150 < count < 250 for count in drawn.flatten().bincount(minlength=8).tolist())
    assert not torch.equal(drawn[:, 0], drawn[:, 1])


def test_slots_are_restored_as_they_were():
    """Slots with the same `tensors` show and do the same after `restore`."""
    one, chance = Slots(EASY, 3, seed=2), torch.Generator().manual_seed(0)
    for _ in range(70):
        one.step(torch.randint(7, (3,), generator=chance))
    two = Slots(EASY, 3, seed=2)
    for name, x in two.tensors.items():
        x.copy_(one.tensors[name])
    two.restore()
    for _ in range(70):
        action = torch.randint(7, (3,), generator=chance)
        for a, b in zip(one.step(action), two.step(action), strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        assert torch.equal(one.image, two.image) and torch.equal(one.words, two.words)


@pytest.mark.parametrize("installed", [None, "3.1.0"])
def test_missing_or_other_minigrid_is_one_sentence(installed, monkeypatch, tmp_path):
    """Without minigrid, or with another version, the run says what to install, and leaves no folder."""

    def version(name):
        assert name == "minigrid"
        if not installed:
            raise babyai.PackageNotFoundError
        return installed

    monkeypatch.setattr(babyai, "version", version)
    with pytest.raises(UserError, match=f"3.2.0, here is {installed or 'none'}: pip install minigrid==3.2.0$"):
        babyai.train(tiny(output_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_rollouts_follow_the_slots_over_ends(short):
    """What a rollout of many ends recorded is what fresh slots show and give for the same actions; `first` is the end
    of the frame before; slots change their level."""
    cfg = tiny()
    _, seen = rolled_out(cfg)
    slots = Slots(cfg.levels, cfg.slots, cfg.seed)
    assert seen["first"][0].all() and torch.equal(seen["first"][1:], seen["end"][:-1])
    assert seen["end"].sum(0).min() >= 2 and (seen["level"] != seen["level"][0]).any()
    for t in range(cfg.rollout):
        for name in ("image", "words", "level"):
            assert torch.equal(getattr(slots, name), seen[name][t]), (name, t)
        reward, end, _ = slots.step(seen["action"][t])
        assert torch.equal(reward, seen["reward"][t]) and torch.equal(end, seen["end"][t])


def test_memory_is_reset_at_every_end(short):
    """Acting remembers within an episode and nothing before it: each frame's value follows from the memory recorded
    there, or from none at an episode's first frame. An end takes no value from the next episode."""
    agent, seen = rolled_out(tiny(), noise=9)
    levels, within = agent.mixed(9), ~seen["first"]
    assert within.any() and seen["memory"][1:].abs().sum(-1).gt(0).all()
    for t in range(len(within)):
        rows = [seen[name][t][None] for name in ("image", "words", "level")]
        _, value, _ = agent(levels, *rows, torch.zeros(1, 4, dtype=torch.bool), seen["memory"][t] * within[t][:, None])
        torch.testing.assert_close(value[0], seen["value"][t], atol=1e-5, rtol=0)
    alone = 20 * seen["reward"] - seen["value"]
    torch.testing.assert_close(seen["advantage"][seen["end"]], alone[seen["end"]])
    assert not torch.allclose(seen["advantage"][~seen["end"]], alone[~seen["end"]])


def test_a_rollout_that_is_cut_counts_what_the_agent_expects_after_it():
    """The last advantage of a slot that is not at an end: 20 r + 0.99 V - v, V the value of what it shows then."""
    cfg = tiny()
    agent, slots, memory, first = fresh(cfg)
    seen, *_ = babyai.roll_out(agent, slots, memory, first, cfg.rollout, 5)
    _, value, _ = agent(agent.mixed(5), *(x[None] for x in (slots.image, slots.words, slots.level, first)), memory)
    assert not first.any() and value.abs().min() > 1e-3
    expected = 20 * seen["reward"][-1] + 0.99 * value[0] - seen["value"][-1]
    torch.testing.assert_close(seen["advantage"][-1], expected, atol=1e-5, rtol=0)


def test_rewards_count_twenty_times(short, monkeypatch):
    """What learning is told of a reward of 1 at an end: 20, less the value that was expected."""
    step = Slots.step

    def rewarded(slots, actions):
        _, end, over = step(slots, actions)
        return end.float(), end, over

    monkeypatch.setattr(Slots, "step", rewarded)
    _, seen = rolled_out(tiny())
    assert seen["end"].any()
    torch.testing.assert_close(seen["advantage"][seen["end"]], 20 - seen["value"][seen["end"]])


# --- The agent and its routing ----------------------------------------------------------------------------------------


def test_expert_table_is_the_papers():
    """Table 2: skills by level and levels by skill, and the routers of `expert` are made of it; skills that no level
    needs are left out."""
    assert [len(skills) for skills in LEVELS.values()] == [1, 2, 3, 4, 4, 5, 2, 5]
    assert [sum(s in skills for skills in LEVELS.values()) for s in range(1, 9)] == [8, 6, 5, 2, 1, 1, 1, 2]
    for router in babyai.build(tiny(method="expert", levels=tuple(LEVELS))).routers:
        assert [tuple((row.nonzero()[:, 0] + 1).tolist()) for row in router.Z] == list(LEVELS.values())
    for router in babyai.build(tiny(method="expert")).routers:  # skills 1; 1, 2; 1, 2, 3, 6, 7
        assert router.Z.tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("method", ["skilled", "mhr", "expert", "private", "dense"])
def test_grouped_by_level_equals_each_environment_alone(method):
    """Outputs and gradients are those of every row alone, with theta_0 + sum_j w_j Phi_j written out."""
    cfg = tiny(method=method)
    agent, seen = rolled_out(cfg)
    names = ("image", "words", "level", "first")
    inputs, memory = [seen[name][:3] for name in names], seen["memory"][0]
    logits, value, after = agent(agent.mixed(7), *inputs, memory)
    weigh = torch.linspace(-1, 1, logits.numel() + value.numel() + after.numel())
    fast = torch.cat([x.flatten() for x in (logits, value, after)])
    trained = [p for p in agent.parameters() if p.requires_grad]
    gradients = torch.autograd.grad((fast * weigh).sum(), trained)

    written = [by_part(agent, level) for level in range(len(EASY))]
    rows = [alone(agent.base, written, [x[:, n] for x in inputs], memory[n]) for n in range(cfg.slots)]
    logits, value = (torch.stack([row[k] for row in rows], 1) for k in (0, 1))
    slow = torch.cat([logits.flatten(), value.flatten(), torch.stack([row[2] for row in rows]).flatten()])
    assert len(inputs[2].unique()) > 1
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    for a, b in zip(gradients, torch.autograd.grad((slow * weigh).sum(), trained), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def by_part(agent, level: int) -> dict[str, dict]:
    """A level's parameters for the noise of seed 7, by part of the agent and name."""
    torch.manual_seed(7)
    weights = [router(torch.arange(agent.tasks))[level] for router in agent.routers]
    own = {name: written_out(agent, k, name, weights[layer]) for k, (layer, name) in enumerate(agent.names)}
    return {part: {n[len(part) + 1 :]: p for n, p in own.items() if n.startswith(part + ".")} for part in agent.base}


def alone(parts, written: list, inputs: list, memory) -> tuple:
    """One environment by itself: logits (t, 7), values (t,), memory (256,)."""
    outputs = []
    for image, words, level, first in zip(*inputs, strict=True):
        own = written[level]
        memory = torch.zeros(256) if first else memory
        x = functional_call(parts["see"], own["see"], (image[None], words[None]))
        hidden, cell = functional_call(parts["remember"], own["remember"], (x, memory[None].chunk(2, -1)))
        memory = torch.cat([hidden, cell], -1)[0]
        outputs.append(functional_call(parts["decide"], own["decide"], (hidden,))[0])
    out = torch.stack(outputs)
    return out[:, :7], out[:, 7], memory


def written_out(agent, k: int, name: str, weights: torch.Tensor) -> torch.Tensor:
    """A level's parameter by eq. 3, entry by entry of each skill."""
    theta = agent.base.get_parameter(name)
    flat = theta.flatten()
    for s in range(len(agent.values[k])):
        w = weights[s] if weights.dim() == 1 else weights[:, s].repeat_interleave(theta.numel() // len(weights))
        phi = torch.zeros(theta.numel()).index_put((agent.places[k][s],), agent.values[k][s])
        flat = flat + w * phi
    return flat.view_as(theta)


@pytest.mark.parametrize("method", babyai.METHODS)
def test_noise_is_only_where_z_is_learned(method):
    """Acting and learning draw Z's noise where Z is learned; shared, expert and private have none. Without noise the
    agent is that of the sigmoids."""
    agent = babyai.build(tiny(method=method))
    same = [torch.equal(*(agent.mixed(n)[1]["decide"]["actor.0.weight"] for n in pair)) for pair in ((1, 2), (1, None))]
    assert same == [method in ("shared", "expert", "private")] * 2
    one, two = (agent.mixed(None)[1]["decide"]["actor.0.weight"] for _ in range(2))
    assert torch.equal(one, two)
    if method in ("skilled", "dense"):
        k = [name for _, name in agent.names].index("decide.actor.0.weight")
        on = torch.sigmoid(agent.routers[agent.names[k][0]].Z[1])
        phi = torch.zeros(2, one.numel()).scatter(1, agent.places[k], agent.values[k].detach())
        theta = agent.base.get_parameter("decide.actor.0.weight") + ((on / on.sum()) @ phi).view_as(one)
        torch.testing.assert_close(one, theta)


def test_mhr_keeps_one_z_where_heads_do_not_divide():
    """Of 8 heads look-up tables and last layers have one Z, all other layers one a head."""
    agent = babyai.build(tiny(method="mhr", heads=8))
    one = {name.rpartition(".")[0] for k, name in agent.names if agent.routers[k].Z.dim() == 2}
    assert one == {"see.tiles", "see.words", "decide.actor.2", "decide.critic.2"}


def test_film_is_a_residual_told_by_the_instruction():
    """x + relu(norm(scale * conv(relu(norm(conv(x)))) + shift)) written out, scale and shift of each channel from the
    instruction; so other words give other features."""
    film, x, text = babyai.FiLM(4), torch.randn(3, 4, 7, 7), torch.randn(3, 128)
    y, scale, shift = film.second(film.norm(film.first(x)).clamp(min=0)), film.scale(text), film.shift(text)
    y = torch.stack([y[m, c] * scale[m, c] + shift[m, c] for m in range(3) for c in range(4)]).view_as(y)
    y = (y - y.mean((1, 2, 3), keepdim=True)) / y.std((1, 2, 3), keepdim=True, correction=0)
    torch.testing.assert_close(film(x, text), x + y.clamp(min=0), atol=1e-4, rtol=1e-4)
    see, image = babyai.fresh_agent(8)["see"], torch.ones(2, 7, 7, 3, dtype=torch.uint8)
    for colour in ("red", "blue"):
        words = torch.stack([babyai.encode(f"go to the {one} ball") for one in ("red", colour)])
        assert torch.allclose(*see(image, words)) == (colour == "red")


def test_absent_levels_get_no_gradient():
    """A batch of levels 0 and 2 leaves row 1 of every Z without gradient, and gives the others one."""
    agent, seen = rolled_out(tiny(method="skilled"))
    seen["level"] = torch.where(seen["level"] == 1, 2, seen["level"])
    seen["level"][:, 0] = 0
    babyai.loss_of(agent, seen, 5)[0].backward()
    rows = torch.stack([router.Z.grad.abs().sum(-1) for router in agent.routers])
    assert (rows[:, 1] == 0).all() and (rows.sum(0)[[0, 2]] > 0).all()


def test_private_levels_share_no_parameter():
    """Under `private` a level's agent is its own skill, whole; theta_0 is zero and does not train."""
    agent, seen = rolled_out(tiny(method="private"))
    assert all((p == 0).all() and not p.requires_grad for p in agent.base.parameters())
    for k, (_, name) in enumerate(agent.names):
        part, rest = name.split(".", 1)
        assert torch.equal(agent.mixed(0)[1][part][rest].flatten(), agent.values[k][1]), name
        assert (agent.values[k] != 0).any() or ".norm" in name
    seen["level"][:] = 2
    babyai.loss_of(agent, seen, 5)[0].backward()
    assert all((values.grad[:2] == 0).all() for values in agent.values)
    assert sum(values.grad[2].abs().sum() for values in agent.values) > 0


@pytest.mark.parametrize(("method", "density"), [("skilled", 0.1), ("dense", 1.0), ("shared", 0.1)])
def test_skills_have_the_density_and_theta_0_is_trained(method, density):
    """Each skill changes a tenth of the entries of every parameter, or all; Kaiming uniform's bound holds for both."""
    agent = babyai.build(tiny(method=method))
    for k, (_, name) in enumerate(agent.names):
        theta, values = agent.base.get_parameter(name), agent.values[k]
        assert theta.requires_grad and values.shape[1] == max(1, round(density * theta.numel()))
        assert all(len(set(place.tolist())) == len(place) for place in agent.places[k])
        if theta.dim() == 1:
            assert (values == 0).all()
        else:
            bound = 1.0 if "words" in name or "tiles" in name else theta[0].numel() ** -0.5
            assert 0.8 * bound < theta.abs().max() <= bound and values.abs().max() <= bound


def test_an_episodes_begin_forgets_what_was_before():
    """Outputs from a reset on do not depend on images and memory before it; without the reset they do."""
    agent, seen = rolled_out(tiny())
    levels, level = agent.mixed(0), torch.zeros(4, 1, dtype=torch.int64)
    image, words = seen["image"][:4, :1], seen["words"][:4, :1]
    other = torch.cat([1 - image[:2].clamp(max=1), image[2:]])
    for reset in (True, False):
        first = torch.tensor([False, False, reset, False])[:, None]
        a = agent(levels, image, words, level, first, torch.zeros(1, 256))
        b = agent(levels, other, words, level, first, torch.ones(1, 256))
        assert torch.equal(a[0][2:], b[0][2:]) == torch.equal(a[2], b[2]) == reset


# --- PPO --------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 3), st.integers(0, 10**6))
def test_gae_equals_its_sum(frames, count, seed):
    """A_t = sum_k (gamma lambda)^k delta_t+k up to the episode's end, summed term by term."""
    chance = torch.Generator().manual_seed(seed)
    reward, value = (torch.randn(frames, count, generator=chance) for _ in range(2))
    end, last = torch.rand(frames, count, generator=chance) < 0.3, torch.randn(count, generator=chance)
    advantage = babyai.gae(reward, value, end, last)
    for n in range(count):
        for t in range(frames):
            expected = 0.0
            for k in range(t, frames):
                after = 0.0 if end[k, n] else (value[k + 1, n] if k + 1 < frames else last[n])
                delta = reward[k, n] + 0.99 * after - value[k, n]
                expected += (0.99 * 0.99) ** (k - t) * delta
                if end[k, n]:
                    break
            assert advantage[t, n].item() == pytest.approx(float(expected), abs=1e-4)


def test_settings_are_those_that_the_docstring_says():
    """Those of PPO, with two batches a rollout, and of the skills."""
    cfg, constants = Config(), (babyai.GAMMA, babyai.LAMBDA, babyai.REWARD, babyai.CLIP, babyai.ENTROPY, babyai.NORM)
    assert constants == (0.99, 0.99, 20, 0.2, 0.01, 0.5) and EPOCHS == 4
    assert (cfg.slots, cfg.rollout, cfg.recurrence, cfg.slots * cfg.rollout / cfg.batch_size) == (64, 40, 20, 2)
    assert (cfg.lr, cfg.lr_z, cfg.skills, cfg.density, cfg.width) == (1e-4, 1e-2, 9, 0.1, 128)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6))
def test_loss_equals_ppo_written_out(seed):
    """Loss and gradients frame by frame, for chances and values that have moved by more than the clip and by less."""
    chance = torch.Generator().manual_seed(seed)
    logits, value = torch.randn(3, 4, 7, generator=chance), torch.randn(3, 4, generator=chance)
    moved, advantage, old = (torch.randn(3, 4, generator=chance) * size for size in (0.4, 1, 0.4))
    action = torch.randint(7, (3, 4), generator=chance)
    log_prob = logits.log_softmax(-1).gather(-1, action[..., None])[..., 0]
    batch = dict(action=action, log_prob=log_prob - moved, value=value - old, advantage=advantage, memory=[None])
    inputs = dict.fromkeys(("image", "words", "level", "first"))

    class Stub:
        def mixed(self, noise):
            assert noise == 5

        def __call__(self, *_):
            return logits, value, None

    logits.requires_grad_(), value.requires_grad_()
    loss, _ = babyai.loss_of(Stub(), batch | inputs, 5)
    terms = []
    for at in np.ndindex(3, 4):
        p = logits[at].softmax(-1)
        ratio, gain = p[action[at]] / batch["log_prob"][at].exp(), advantage[at]
        if gain * ratio > gain * (1 + 0.2 * gain.sign()):  # it pays to have moved further than the clip: no gradient
            ratio = 1 + 0.2 * gain.sign()
        before, goal = batch["value"][at], batch["value"][at] + gain
        near = min(max(value[at], before - 0.2), before + 0.2)
        terms.append(0.5 * max((value[at] - goal) ** 2, (near - goal) ** 2) - gain * ratio + 0.01 * (p * p.log()).sum())
    slow = sum(terms) / 12
    torch.testing.assert_close(loss, slow, atol=1e-5, rtol=1e-4)
    for a, b in zip(*(torch.autograd.grad(x, (logits, value)) for x in (loss, slow)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_each_epoch_learns_from_all_frames_once(monkeypatch):
    """A rollout of 32 frames in batches of 16, three times: 6 steps, in each epoch every frame; clipped gradients."""
    cfg, batches, norms, clip = tiny(), [], [], torch.nn.utils.clip_grad_norm_
    agent, seen = rolled_out(cfg)
    real, numbered = babyai.loss_of, seen | {"number": torch.arange(32).view(8, 4)}
    numbered["advantage"] = 100 * seen["advantage"]  # so that there is something to clip

    def loss_of(agent, batch, noise):
        batches.append(batch["number"].flatten().tolist())
        return real(agent, batch, noise)

    def clipped(parameters, most):
        norm = clip(parameters, most)
        norms.append(torch.cat([p.grad.flatten() for p in agent.parameters() if p.grad is not None]).norm().item())
        return norm

    monkeypatch.setattr(babyai, "EPOCHS", 3)
    monkeypatch.setattr(babyai, "loss_of", loss_of)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    babyai.learn(agent, babyai.make_optimizer(agent, cfg), numbered, cfg, 5)
    assert len(batches) == 6 and all(sorted(batches[k] + batches[k + 1]) == list(range(32)) for k in (0, 2, 4))
    assert batches[0] not in batches[2:] and all(norm < 0.501 for norm in norms) and max(norms) > 0.49


def test_ratios_begin_at_one(short):
    """Learning draws the noise of acting again: in the sequences that it cuts from a fresh rollout of many ends (some
    begin with an episode, some within one) it finds the recorded chances and values. Without the resets, or with other
    noise, the chances would differ."""
    agent, seen = rolled_out(tiny(), noise=11)
    cut = babyai.sequences(seen, 4)
    assert cut["level"].shape == (4, 8) and cut["first"][1:].any() and len(cut["first"][0].unique()) == 2
    for first in (cut["first"], torch.zeros_like(cut["first"])):
        rows = [cut[name] for name in ("image", "words", "level")]
        logits, value, _ = agent(agent.mixed(11), *rows, first, cut["memory"][0])
        log_prob = torch.distributions.Categorical(logits=logits).log_prob(cut["action"])
        reset = first is cut["first"]
        assert torch.allclose(log_prob, cut["log_prob"], atol=1e-5) == reset
        assert torch.allclose(value, cut["value"], atol=1e-5) == reset
    logits, *_ = agent(agent.mixed(12), *rows, cut["first"], cut["memory"][0])
    other = torch.distributions.Categorical(logits=logits).log_prob(cut["action"])
    assert not torch.allclose(other, cut["log_prob"], atol=1e-5)
    loss, figure = babyai.loss_of(agent, cut | {"advantage": torch.ones(4, 8)}, 11)  # ratios and value errors of 1
    torch.testing.assert_close(loss, torch.tensor(0.5 - 1 - 0.01 * figure["entropy"]), atol=1e-4, rtol=0)


def test_learning_draws_the_noise_of_acting(monkeypatch, tmp_path, short):
    """In each update of a run both are given the same seed of Z's noise, another one in each."""
    acted, learned, roll_out, learn = [], [], babyai.roll_out, babyai.learn
    monkeypatch.setattr(babyai, "roll_out", lambda *args: acted.append(args[-1]) or roll_out(*args))
    monkeypatch.setattr(babyai, "learn", lambda *args: learned.append(args[-1]) or learn(*args))
    babyai.train(tiny(output_dir=str(tmp_path)))
    assert acted == learned == [babyai.chance(3, update)[1] for update in (1, 2)]


def test_chance_of_updates():
    """Every update of every seed has its own two numbers, also for the largest seed that is allowed."""
    drawn = [n for seed in (0, 1, 10**14, 2**63 - 1) for u in range(1, 300) for n in babyai.chance(seed, u)]
    assert len(set(drawn)) == len(drawn) and babyai.chance(0, 1_000_003) != babyai.chance(1, 0)


def test_gradients_that_are_not_finite_end_the_run():
    """A RunError in one sentence, before any parameter is changed."""
    cfg = tiny(method="shared")
    agent, seen = rolled_out(cfg)
    seen["advantage"][0] = float("nan")
    before = {name: x.clone() for name, x in agent.state_dict().items()}
    with pytest.raises(RunError, match="try a lower --lr"):
        babyai.learn(agent, babyai.make_optimizer(agent, cfg), seen, dataclasses.replace(cfg, batch_size=64), 5)
    assert all(torch.equal(x, before[name]) for name, x in agent.state_dict().items())


def test_rates_of_z():
    """Every Z has a learning rate of its own, and nothing else has it, but for `single-speed`; a given table does not
    train, all else does."""
    for method in babyai.METHODS:
        cfg = tiny(method=method)
        agent = babyai.build(cfg)
        groups = babyai.make_optimizer(agent, cfg).param_groups
        rates = {p: g["lr"] for g in groups for p in g["params"]}
        assert all(g["eps"] == 1e-5 for g in groups)  # [2]'s
        z = {router.Z for router in agent.routers}
        own = 1e-4 if method == "single-speed" else 1e-2
        expected = {p: 1e-4 for p in agent.parameters() if p not in z} | dict.fromkeys(z, own)
        assert all(p.requires_grad == (method not in ("shared", "expert", "private")) for p in z)
        assert rates == {p: rate for p, rate in expected.items() if p.requires_grad}, method


@pytest.mark.parametrize(("method", "times"), [("dense", 2), ("expert", 1.1), ("skilled", 1.1), ("private", 1)])
def test_one_step_of_everything_moves_dense_twice_as_far_as_private(method, times):
    """All trained parameters but Z go one step up: theta_l moves by those of theta_0 and of its skills, whose weights
    sum to one, and which have a tenth of the entries but for dense and private."""
    agent = babyai.build(tiny(method=method))
    before = all_parameters(agent)
    with torch.no_grad():
        for p in (*agent.base.parameters(), *agent.values):
            p.add_(float(p.requires_grad))
    assert (all_parameters(agent) - before).mean().item() == pytest.approx(times, rel=0.02)


def all_parameters(agent) -> torch.Tensor:
    """Of all levels, without noise."""
    with torch.no_grad():
        return torch.cat([p.flatten() for level in agent.mixed(None) for part in level.values() for p in part.values()])


# --- Runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", babyai.METHODS)
def test_two_updates_of_every_method(method, tmp_path, short):
    """A run of two updates ends with its files and figures, and has trained."""
    cfg = tiny(method=method, output_dir=str(tmp_path / "run"))
    before = babyai.build(cfg).state_dict()
    result = babyai.train(cfg)
    assert (result["update"], result["frames"]) == (2, 64) and set(result["levels"]) == {*EASY, "all"}
    assert sum(result["share_of_time"].values()) == pytest.approx(1, abs=0.01)
    files = {path.name for path in Path(cfg.output_dir).iterdir()}
    assert files == {"config.json", "log.jsonl", "result.json", "agent.safetensors", CHECKPOINT}
    assert not {"resume", "plot", "figure"} & json.loads(Path(f"{cfg.output_dir}/config.json").read_text()).keys()
    for number, line in enumerate(babyai.lines_of(Path(f"{cfg.output_dir}/log.jsonl")), 1):
        assert (line["update"], line["frames"]) == (number, 32 * number)
        assert line.keys() == {*"update frames env act learn episodes loss norm lr value_error entropy seconds".split()}
    assert all(0 <= level["final"] <= 1 for level in result["levels"].values())
    after, _ = read_tensors(f"{cfg.output_dir}/agent.safetensors")
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert any(name.startswith("values") for name in changed) and not any("place" in name for name in changed)
    assert any(name.startswith("base") for name in changed) == (method != "private")
    assert any(name.startswith("routers") for name in changed) == (result["parameters"]["routing"] > 0)


def test_resumed_equals_uninterrupted(monkeypatch, tmp_path, short):
    """SIGTERM after the second of three updates, in mid-episode and after many ends: --resume ends with the same bits
    and episodes."""
    flags = TINY | dict(frames=96, save_every="1")
    babyai.main(flags | dict(output_dir=str(tmp_path / "whole")))
    real, calls = babyai.learn, []

    def learn(*args):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    cut = flags | dict(output_dir=str(tmp_path / "cut"), resume=True)
    monkeypatch.setattr(babyai, "learn", learn)
    with pytest.raises(SystemExit) as stopped:
        babyai.main(cut)
    assert stopped.value.code == 143 and not (tmp_path / "cut" / "result.json").exists()
    saved, _ = read_tensors(str(tmp_path / "cut" / CHECKPOINT))
    assert (saved["model.length"] > 0).any() and saved["model.episode"].min() >= 4
    babyai.main(cut)
    assert_same_run(tmp_path / "whole", tmp_path / "cut", updates=3)


def assert_same_run(one: Path, two: Path, updates: int):
    """Two folders hold the same agent, to the bit, the same log but for times, and the same success."""
    assert (one / "agent.safetensors").read_bytes() == (two / "agent.safetensors").read_bytes()
    timing = ("seconds", "env", "act", "learn")
    logs = [
        [{k: v for k, v in line.items() if k not in timing} for line in babyai.lines_of(folder / "log.jsonl")]
        for folder in (one, two)
    ]
    assert len(logs[0]) == updates and logs[0] == logs[1]
    results = [json.loads((folder / "result.json").read_text())["levels"] for folder in (one, two)]
    assert results[0] == results[1]


def test_frames_may_grow(short, tmp_path, capsys):
    """A finished run resumed with more --frames equals one that had them from the start. Fewer frames are refused; with
    as many there is nothing to do; without its checkpoint the run stays as it is."""
    flags = TINY | dict(save_every="100", resume=True)
    babyai.main(flags | dict(frames=64, output_dir=str(tmp_path / "whole")))
    grown = flags | dict(output_dir=str(tmp_path / "grown"))
    babyai.main(grown | dict(frames=32))
    with pytest.raises(UserError, match="--frames 16 is less than the run in"):
        babyai.main(grown | dict(frames=16))
    babyai.main(grown | dict(frames=64))
    assert_same_run(tmp_path / "whole", tmp_path / "grown", updates=2)
    assert json.loads((tmp_path / "grown" / "config.json").read_text())["frames"] == 64
    capsys.readouterr()
    babyai.main(grown | dict(frames=64))
    assert "is finished" in capsys.readouterr().out
    (tmp_path / "grown" / CHECKPOINT).unlink()
    with pytest.raises(UserError, match="its checkpoint.safetensors is gone"):
        babyai.main(grown | dict(frames=96))
    assert (tmp_path / "grown" / "result.json").exists()


def test_the_loop_at_the_top_makes_every_run_of_the_page():
    """Each method, two seeds, two rates, each in its own folder; `echo` takes the place of the script."""
    loop = babyai.__doc__.split("it resumes them:\n")[1].split("\nShape key")[0]
    loop = loop.replace("python -m experiments.babyai", "echo")
    printed = subprocess.run(["bash", "-c", loop], capture_output=True, text=True, check=True).stdout
    runs = [explicit_flags(Config, {}, line.split()) for line in printed.splitlines()]
    assert all((run["width"], len(run["levels"]), run["resume"]) == (32, 3, True) for run in runs)
    settings = sorted((run["method"], run["seed"], run.get("lr", 1e-4), run["frames"]) for run in runs)
    budgets = ((1e-4, 500_000), (2e-4, 750_000))
    assert settings == sorted((m, seed, *budget) for m in babyai.METHODS for seed in (0, 1) for budget in budgets)
    folders = [run["output_dir"] for run in runs if "output_dir" in run]
    assert len(set(folders)) == 14 and all("lr" in run for run in runs if "output_dir" in run)


def test_a_moved_folder_is_resumed_where_it_is(short, tmp_path, monkeypatch, capsys):
    """--resume without --output-dir finds the default folder and stays in it, whatever its config.json says."""
    monkeypatch.chdir(tmp_path)
    babyai.main(TINY | dict(frames=32, output_dir="first"))
    Path("runs").mkdir()
    Path("first").rename("runs/babyai-skilled-3")
    babyai.main({"seed": 3, "frames": 64, "resume": True, "figure": "x"})
    assert not Path("first").exists() and "ignored without --plot: --figure" in capsys.readouterr().out
    config, result = (
        json.loads(Path(f"runs/babyai-skilled-3/{name}.json").read_text()) for name in ("config", "result")
    )
    assert config["output_dir"] == "runs/babyai-skilled-3" and result["frames"] == 64


def test_trials_are_the_same_unseen_episodes(monkeypatch):
    """`score`: each level's success over episodes of fixed seeds that no training episode has, without noise, as
    counted one environment at a time by what the agent is shown; it remembers; environments that ended act no more."""
    monkeypatch.setattr(babyai, "TRIALS", 12)
    real, seeds, noises, acted = babyai.reset, [], [], []
    monkeypatch.setattr(babyai, "reset", lambda env, seed: seeds.append(seed) or real(env, seed))

    def choose(image, words, level):  # left, right or forward
        return int(image.long().sum() + words.long().sum() + level) % 3

    class Stub:
        def mixed(self, noise):
            noises.append(noise)

        def __call__(self, levels, image, words, level, first, memory):
            assert (memory == len(acted)).all() and not first.any()
            acted.append(len(image[0]))
            actions = torch.tensor([choose(*row) for row in zip(image[0], words[0], level[0], strict=True)])
            return 1e6 * torch.eye(7)[actions][None], torch.zeros(level.shape), memory + 1

    scores = babyai.score(Stub(), tiny())
    assert noises == [None] and seeds == [2**31 + k for _ in EASY for k in range(12)]
    steps = 0
    for number, level in enumerate(EASY):
        env, successes = babyai.make_env(level), []
        for k in range(12):
            image, words = real(env, 2**31 + k)
            over = False
            while not over:
                shown, reward, terminated, truncated, _ = env.step(choose(image, words, number))
                image, over, steps = torch.from_numpy(shown["image"]), terminated or truncated, steps + 1
            successes.append(reward > 0)
        assert scores[level] == pytest.approx(np.mean(successes), abs=1e-3)
    assert steps == sum(acted) and 0 < scores["all"] < 1
    assert scores["all"] == pytest.approx(np.mean([scores[level] for level in EASY]), abs=1e-3)
    seeds.clear()
    Slots(EASY, 50, seed=0)
    assert max(seeds) < 2**31


def test_trials_sample_their_actions(monkeypatch):
    """If all seven actions are equally likely, another seed takes other actions, the same seed the same."""
    monkeypatch.setattr(babyai, "TRIALS", 12)
    shown, taken = {"mission": "go to the red ball", "image": np.zeros((7, 7, 3), np.uint8)}, []

    class Env:  # of one step
        def reset(self, seed):
            return shown, {}

        def step(self, action):
            taken.append(action)
            return shown, 0, True, False, {}

    class Agent:
        def mixed(self, noise):
            pass

        def __call__(self, levels, image, words, level, first, memory):
            return torch.zeros(*level.shape, 7), torch.zeros(level.shape), memory

    monkeypatch.setattr(babyai, "make_env", lambda level: Env())
    for seed in (3, 4, 3):
        babyai.score(Agent(), tiny(seed=seed))
    one, two, again = taken[:36], taken[36:72], taken[72:]
    assert one == again != two and len(set(one)) > 3


def test_little_memory_is_one_sentence(monkeypatch, tmp_path):
    """Out of memory: a RunError that says which flags are to be smaller."""

    def roll_out(*args):
        raise MemoryError

    monkeypatch.setattr(babyai, "roll_out", roll_out)
    with pytest.raises(RunError, match="fewer --slots"):
        babyai.train(tiny(output_dir=str(tmp_path)))


def test_large_seeds_run(tmp_path, short):
    """The largest seed that is allowed runs like any other."""
    assert babyai.train(tiny(seed=2**63 - 1, frames=32, output_dir=str(tmp_path)))["update"] == 1


def test_ignored_flags_are_named(capsys, monkeypatch):
    """A flag that the method, --plot or training does not use is named, and no other."""
    monkeypatch.setattr(babyai, "train", lambda cfg: None)
    monkeypatch.setattr(babyai, "plot", lambda folders, figure: None)
    babyai.main({"method": "dense", "density": 0.5, "skills": 3, "lr_z": 1.0})
    assert capsys.readouterr().out == "ignored with --method dense: --density\n"
    babyai.main({"method": "expert", "density": 0.5, "skills": 3, "lr_z": 1.0})
    assert capsys.readouterr().out == "ignored with --method expert: --skills, --lr-z\n"
    babyai.main({"method": "skilled", "figure": "x"})
    assert capsys.readouterr().out == "ignored without --plot: --figure\n"
    babyai.main({"plot": ["x"], "figure": "x", "frames": 9, "save_every": "1"})
    assert capsys.readouterr().out == "ignored with --plot: --frames, --save-every\n"
    babyai.main({"method": "skilled", "density": 0.5, "skills": 3, "lr_z": 1.0})
    assert capsys.readouterr().out == ""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of two updates, of episodes of at most 3 steps."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(babyai, "EPOCHS", 1)
        patch.setattr(babyai, "TRIALS", 1)
        patch.setattr(babyai, "make_env", functools.partial(babyai.make_env, max_steps=3))
        babyai.train(tiny(output_dir=str(folder)))
    return folder


@pytest.fixture
def run_folder(finished, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@functools.cache
def fresh_once(**changes) -> tuple:
    """`fresh`, once for all runs that are refused: each must leave it as it is."""
    return fresh(tiny(seed=4, **changes))


def refuse_to_begin(folder: Path, why: str, **changes):
    """`begin` of a run with other initial values raises UserError; these, the optimiser and the folder stay as they
    were."""
    cfg = tiny(seed=4, resume=True, **changes)
    agent, slots, memory, first = fresh_once(**changes)
    optimizer = babyai.make_optimizer(agent, cfg)

    def everything():
        states = optimizer.state_dict()["state"].items()
        live = {f"{k}.{name}": x for k, own in states for name, x in own.items()} | agent.state_dict() | slots.tensors
        return {name: x.clone() for name, x in live.items()} | {"memory": memory.clone(), "first": first.clone()}

    before, files = everything(), contents(folder)
    with pytest.raises(UserError, match=why):
        babyai.begin(folder, cfg, agent, optimizer, slots, memory=memory, first=first)
    after = everything()
    assert after.keys() == before.keys() and all(torch.equal(x, before[name]) for name, x in after.items())
    assert contents(folder) == files


def without(name: str):
    return lambda tensors, state: tensors.pop(name)


def put(name: str, make):
    def change(tensors, state):
        tensors[name] = make(tensors[name])

    return change


@pytest.mark.parametrize(
    "change",
    [
        without("model.episode"), without("model.length"), without("model.actions"), without("model.memory"),
        without("model.first"), without("optimizer.3.exp_avg"), without("model.values.2"), without("random"),
        put("model.memory", lambda x: x[:2]), put("model.values.2", lambda x: x / 0),
        put("optimizer.0.exp_avg", lambda x: x * float("nan")), put("model.actions", lambda x: x + 7),
        put("model.actions", lambda x: x[0]), put("model.actions", lambda x: x.to(torch.complex64)),
        put("model.length", lambda x: x + babyai.LONGEST), put("model.length", lambda x: x - 4),
        put("model.episode", lambda x: x - 10**6), put("model.first", lambda x: x.float()),
        put("model.place0", lambda x: x + 10**6),
        lambda tensors, state: tensors.update({"optimizer.999.step": torch.ones(1)}),
        lambda tensors, state: state.pop("step"), lambda tensors, state: state.update(step="2"),
        lambda tensors, state: state.update(seconds=float("nan")), lambda tensors, state: state.clear(),
    ],
)  # fmt: skip
def test_a_changed_checkpoint_is_refused_whole(change, short, run_folder):
    """Signed anew, but with entries missing, of another shape, out of range or not finite: one sentence, nothing has
    changed."""
    path = run_folder / CHECKPOINT
    tensors, metadata = read_tensors(str(path))
    state = json.loads(metadata["state"])
    change(tensors, state)
    write_tensors(tensors, str(path), state=json.dumps(state))
    refuse_to_begin(run_folder, f"{path}.*: delete it to start")


def test_a_damaged_checkpoint_is_refused(short, run_folder):
    """A truncated file, one without JSON beside its tensors, and one of another --slots or --rollout: one sentence."""
    path, whole = run_folder / CHECKPOINT, (run_folder / CHECKPOINT).read_bytes()
    refuse_to_begin(run_folder, "delete it to start", slots=8)
    refuse_to_begin(run_folder, "another --rollout than there is now", rollout=4)
    path.write_bytes(whole[:-1])
    refuse_to_begin(run_folder, "delete it to start")
    write_tensors({"a": torch.ones(1)}, str(path))
    refuse_to_begin(run_folder, "delete it to start")


def test_what_is_not_finite_replaces_no_checkpoint(short, run_folder):
    """A parameter or memory that an update made infinite: a RunError, and the checkpoint before stays as it is."""
    cfg = tiny(resume=True, save_every="1")
    agent, slots, memory, first = fresh(cfg)
    before = (run_folder / CHECKPOINT).read_bytes()
    optimizer = babyai.make_optimizer(agent, cfg)
    run, _ = babyai.begin(run_folder, cfg, agent, optimizer, slots, memory=memory, first=first)
    assert run.now.step == 2 and not (run_folder / "result.json").exists()
    for name, x in (("values.0", agent.values[0].data), ("memory", memory)):
        saved = x.clone()
        x.view(-1)[0] = float("inf")
        with pytest.raises(RunError, match=f"model.{name} is not finite after step 3.*a lower --lr"), run:
            for _ in run.steps(3, "train"):
                run.record(1.0, 1.0)
        x.copy_(saved)
        run.now = run.now._replace(step=2)
        assert (run_folder / CHECKPOINT).read_bytes() == before and not list(run_folder.glob("*.tmp"))


def test_a_rate_that_is_far_too_high_is_one_sentence(tmp_path, short):
    """Parameters become infinite within an update: a RunError that says what to try, and no checkpoint."""
    with pytest.raises(RunError, match="finite.* lower --lr"):
        babyai.train(tiny(lr=1e38, output_dir=str(tmp_path), save_every="1"))
    assert not (tmp_path / CHECKPOINT).exists()


@pytest.mark.parametrize("damage", ["first", "last", "all", "episodes"])
def test_no_run_is_resumed_without_its_episodes(damage, short, run_folder):
    """A log that has lost a line, or all, or the episodes of a line: one sentence, and nothing has changed."""
    log = run_folder / "log.jsonl"
    first, last = log.read_text().splitlines()
    broken = json.dumps(json.loads(last) | {"episodes": [[0]]})
    left = {"first": [last], "last": [first], "all": [], "episodes": [first, broken]}[damage]
    log.write_text("".join(f"{line}\n" for line in left))
    if damage == "all":
        log.unlink()
    before = contents(run_folder)
    with pytest.raises(UserError, match=f"{log}.*again in another folder"):
        babyai.main(TINY | dict(frames=128, resume=True, output_dir=str(run_folder)))
    assert contents(run_folder) == before


@pytest.mark.parametrize("width", [1, 8, 33])
def test_the_size_of_an_agent_is_known_beforehand(width):
    """So that what fits no machine is refused before any of it is made."""
    assert babyai.agent_size(width) == sum(p.numel() for p in babyai.fresh_agent(width).parameters())


def test_success_is_averaged_over_windows():
    """`summary`: the first episode at which of 100 in a row more than 0.99, that is all, are successes, and of 1,000 in
    a row 991."""
    assert babyai.moving(np.array([0, 1, 1]), 2).tolist() == [0.5, 1.0]
    assert babyai.moving(np.array([1]), 2).tolist() == []
    late, none = babyai.summary(np.array([0] * 10 + [1] * 100 + [0] * 9 + [1] * 991)), {"> 0.99 of 100": None}
    assert late == {"episodes": 1110, "success": 0.991, "> 0.99 of 100": 110, "> 0.99 of 1000": 1010}
    assert babyai.summary(np.array([1] * 99 + [0]))["> 0.99 of 100"] is None
    none |= {"> 0.99 of 1000": None}
    assert babyai.summary(np.array([], dtype=int)) == {"episodes": 0, "success": 0.0} | none


def test_an_agent_of_94_percent_reaches_100_of_100():
    """Why a second window stands beside the paper's: of agents that succeed in 94 % of episodes most have 100 successes
    in a row within 20,000, none has 991 of 1,000."""
    luck = np.random.default_rng(0).random((200, 20_000)) < 0.94
    assert sum(babyai.reached(own.astype(int), 100) is not None for own in luck) > 150
    assert all(babyai.reached(own.astype(int), 1000) is None for own in luck)


def written_run(folder: Path, episodes: list, final: float | None = None, **changes) -> str:
    """A run folder as an earlier version made it, its episodes in two lines of a log; finished if it has a final
    success."""
    folder.mkdir()
    cfg = tiny(**changes)
    write_json(folder / "config.json", dataclasses.asdict(cfg))
    times = {"env": 1.0, "act": 0.5, "learn": 2.5}
    lines = [
        times | {"update": k, "frames": 4000 * k, "episodes": own}
        for k, own in ((1, episodes[:50]), (2, episodes[50:]))
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if final is not None:
        levels = {level: {"final": final} for level in (*cfg.levels, "all")}
        write_json(folder / "result.json", {"levels": levels, "parameters": {"theta_0": 900, "skills": 100}})
    return str(folder)


def test_plot_writes_figure_and_table(tmp_path, capsys, monkeypatch):
    """--plot writes a PNG, an SVG, and a table that it also prints. An incomplete last line is left out. Other levels,
    the same run twice and a run that has not begun are refused by name."""
    two = [[k % 2, 1] for k in range(250)]
    runs = [written_run(tmp_path / "a", two), written_run(tmp_path / "b", two, method="shared")]
    with open(tmp_path / "a" / "log.jsonl", "a") as log:
        log.write('{"update": 3, "epi')
    babyai.main({"plot": runs, "figure": str(tmp_path / "figure")})
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG" and "<svg" in (tmp_path / "figure.svg").read_text()
    printed, written = capsys.readouterr().out, (tmp_path / "figure.md").read_text()
    assert written.startswith("# ")
    with monkeypatch.context() as here:  # a page in results/ leads back to the index
        here.setattr(babyai, "ROOT", tmp_path)
        (tmp_path / "results").mkdir()
        babyai.plot(tuple(runs), str(tmp_path / "results" / "figure"))
    assert (
        tmp_path / "results" / "figure.md"
    ).read_text() == f"[README](../README.md) · [results](README.md)\n\n{written}"
    rows = [line for line in printed.splitlines() if line.startswith((*EASY, "level  ", "all  "))]
    rows += [line for line in printed.splitlines() if line.startswith(("run  ", "skilled  ", "shared  "))]
    assert len(rows) == 1 + 4 * 2 + 1 + 2 and all(f"    {row}\n" in written for row in rows)
    other = written_run(tmp_path / "c", two, levels=("GoTo",))
    empty = written_run(tmp_path / "d", two, seed=5)
    (tmp_path / "d" / "log.jsonl").write_text("")
    for second, why in ((other, "its levels are not those"), (runs[0], "leave one out"), (empty, "no update")):
        with pytest.raises(UserError, match=f"--plot {second}: .*{why}"):
            babyai.main({"plot": [runs[0], second]})


@pytest.mark.parametrize(
    "line",
    [
        "{", "[]", "null", '{"update": 3}', "[" * 3000, "\xff", '{"update": 3, "frames": 4000, "episodes": [[0, 1]]}',
        *(json.dumps(dict(update=3, frames=12000, env=1, act=1, learn=1, episodes=[[0, 1]]) | odd) for odd in (
            {"update": 2}, {"update": 4},
            {"frames": "x"}, {"frames": 10**400}, {"env": None}, {"env": 0}, {"learn": float("nan")}, {"act": True},
            {"episodes": 1}, {"episodes": [[0]]}, {"episodes": [[0, 1, 0, 1]]}, {"episodes": [["0", "1"]]},
            {"episodes": [[8, 1]]}, {"episodes": [[0, 0.5]]},
        )),
    ],
)  # fmt: skip
def test_plot_refuses_a_damaged_line_of_a_log(line, tmp_path):
    """One sentence that names file and line; no figure."""
    log = Path(written_run(tmp_path / "a", [[0, 1]] * 60)) / "log.jsonl"
    log.write_bytes(log.read_bytes() + line.encode("latin-1") + b"\n")
    with pytest.raises(UserError, match=f"{log}:3 is damaged, or not the line of update 3.*: leave the run out"):
        babyai.main({"plot": [str(tmp_path / "a")], "figure": str(tmp_path / "figure")})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "odd",
    [{"levels": {}}, {"levels": {"all": 1}}, {"parameters": {}}, {"parameters": {"theta_0": "x"}}, {"levels": []}],
)
def test_plot_refuses_a_damaged_result(odd, tmp_path):
    """One sentence that names the file; no figure."""
    path = Path(written_run(tmp_path / "a", [[0, 1]] * 60, final=0.5)) / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | odd))
    with pytest.raises(UserError, match=f"{path}: .*by hand"):
        babyai.main({"plot": [str(tmp_path / "a")], "figure": str(tmp_path / "figure")})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_table_compares_at_equal_episodes(tmp_path, capsys, monkeypatch):
    """Episodes to > 0.99 of each seed; success up to the last episode that all runs of the level have; final success of
    finished runs; frames, their speed, and where time went; the paper's figure."""
    monkeypatch.setattr(babyai.figures, "by_episodes", lambda *args, **kwargs: None)
    good, less = [[0, 1]] * 120 + [[0, 0]] * 180, [[0, 1]] * 60 + [[0, 0]] * 60
    one = written_run(tmp_path / "one", good, final=0.5, seed=0, levels=tuple(LEVELS))
    two = written_run(tmp_path / "two", less, final=1.0, seed=1, levels=tuple(LEVELS))
    bad = written_run(tmp_path / "bad", [[0, 0]] * 200, method="shared", levels=tuple(LEVELS), width=16)
    babyai.main({"plot": [bad, one, two], "figure": str(tmp_path / "figure")})
    rows = [re.split(r" {2,}", line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["level", "run", "> 0.99 of 100", "> 0.99 of 1,000", "at", "so far", "last 1,000", "final"]
    percent = "75.0 +- 35.4"
    assert rows[1] == ["GoToObj", "skilled width=8", "100 / -", "- / -", "120", percent, percent, "75.0 +- 35.4"]
    assert rows[2] == ["GoToObj", "shared width=16", "-", "-", "120", "0.0", "0.0", "-"]
    assert rows[3] == ["GoToRedBallGrey", "skilled width=8", "- / -", "- / -", "0", "-", "-", "75.0 +- 35.4"]
    at = next(k for k, row in enumerate(rows) if row[:2] == ["run", "seeds"])
    assert rows[at][2:] == ["parameters", "frames", "frames/s", "env %", "act %", "learn %", "paper"]
    assert rows[at + 1] == ["skilled width=8", "2", "1,000", "8,000", "1,000", "25", "12", "62", "2,218,226"]
    assert rows[at + 2] == ["shared width=16", "1", "-", "8,000", "1,000", "25", "12", "62", "3,544,294"]


@pytest.mark.parametrize(("episodes", "window"), [(99, 3), (100, 10)])
def test_the_figure_has_the_papers_window_but_in_long_runs(episodes, window, tmp_path, monkeypatch):
    """The larger of WINDOWS where all runs have ten times as many episodes of each level; else the paper's."""
    drawn = []
    monkeypatch.setattr(babyai, "WINDOWS", (3, 10))
    monkeypatch.setattr(babyai.figures, "by_episodes", lambda panels, stem, window: drawn.append((panels, window)))
    long = written_run(tmp_path / "long", [[0, 1]] * 500, levels=("GoTo",))
    short = written_run(tmp_path / "short", [[0, k % 2] for k in range(episodes)], levels=("GoTo",), seed=1)
    babyai.main({"plot": [long, short], "figure": str(tmp_path / "figure")})
    ((panels, chosen),) = drawn
    assert chosen == window and panels.keys() == {"GoTo", "all"}
    ((one, two),) = panels["GoTo"].values()
    assert (one == 1).all() and len(one) == 501 - window and two[0] == sum(k % 2 for k in range(window)) / window


def test_the_figures_lines_are_means_and_its_bands_the_seeds(monkeypatch):
    """A row for each level, a column for each method. From the window-th episode on, as far as all seeds go: the mean,
    from the lowest to the highest, before the means of the others in grey. It says so."""
    two, other = [np.linspace(0, 1, 50), np.linspace(1, 0.5, 80)], [np.linspace(0, 0.5, 60)] * 2
    of = {"skilled": two, "shared": other}
    draw = lambda: babyai.figures.by_episodes({"GoTo": of, "all": of}, "unused", 100)  # noqa: E731
    figure = drawn(monkeypatch, draw)
    check_legible(figure)
    axes = figure.axes
    assert [ax.get_title() for ax in axes] == ["skilled", "shared", "", ""]
    assert [ax.get_ylabel() for ax in axes] == ["GoTo", "", "all", ""]
    for ax in axes[::2]:
        (solved, grey, line), (band,) = ax.lines, ax.collections
        assert list(solved.get_ydata()) == [0.99, 0.99]
        at = np.arange(50)
        assert line.get_xdata().tolist() == (at + 100).tolist()
        np.testing.assert_allclose(line.get_ydata(), (two[0] + two[1][:50]) / 2)
        np.testing.assert_allclose(grey.get_ydata(), other[0])
        corners = {(x, round(y, 6)) for x, y in band.get_paths()[0].vertices}
        assert {(k + 100, round(s[k], 6)) for k in at for s in two} <= corners
    (says,) = [text.get_text() for text in figure.texts if "band" in text.get_text()]
    assert "mean over 2 seeds" in says and "lowest to the highest" in says and "Grey" in says


def test_frames_that_differ_and_settings_that_are_alike_are_said(tmp_path, capsys, monkeypatch):
    """Seeds of unlike frames show both; what all runs share stands below the tables."""
    monkeypatch.setattr(babyai.figures, "by_episodes", lambda *args, **kwargs: None)
    one, two = (written_run(tmp_path / str(k), [[0, 1]] * 120, seed=k, lr=2e-4) for k in (0, 1))
    log = Path(two) / "log.jsonl"
    log.write_text(log.read_text().replace("8000", "9000"))
    babyai.main({"plot": [one, two], "figure": str(tmp_path / "figure")})
    out = capsys.readouterr().out
    assert re.search(r"^skilled +2 +- +8,000 / 9,000 ", out, re.M)
    assert re.search(r"^all: skills=2 heads=4 density=0.1 width=8 lr=0.0002 lr_z=0.01 .*batch_size=16$", out, re.M)
    babyai.main(
        {"plot": [one, written_run(tmp_path / "2", [[0, 1]] * 120, lr=1e-4)], "figure": str(tmp_path / "figure")}
    )
    assert " lr=" not in re.search(r"^all: .*", capsys.readouterr().out, re.M).group()


def test_names_say_in_what_runs_differ():
    """Seeds and frames share a name; a setting that differs, also from its default, is named where a method uses it."""
    runs = [tiny(), tiny(seed=1, frames=999), tiny(lr_z=0.1), tiny(method="shared", lr_z=0.1), tiny(method="mhr")]
    names = ["skilled", "skilled", "skilled lr_z=0.1", "shared", "mhr"]
    runs, names = [*runs, tiny(method="mhr", heads=8)], [*names[:-1], "mhr heads=4", "mhr"]
    assert babyai.names_of(runs) == names and babyai.names_of(runs[:2]) == ["skilled"] * 2


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"rollout": 10}, "--recurrence 4"), ({"frames": 0}, "--frames"), ({"density": 2.0}, "--density"),
        ({"method": "mhr", "heads": 3}, "--heads 3"), ({"levels": ("GoTo", "GoTo")}, "--levels"),
        ({"save_every": "x"}, "--save-every"), ({"lr": -1.0}, "--lr"), ({"seed": 2**63}, "--seed"),
        ({"skills": 2**31 - 1}, "--skills"), ({"slots": 2**31 - 1}, "--slots"), ({"width": 2**31 - 1}, "--width"),
        ({"method": "shared", "width": 2**31 - 1}, "--width"), ({"method": "expert", "width": 600}, "with 5 skills"),
        ({"rollout": 2**31 - 4}, "--rollout"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused_by_name(flags, named, tmp_path):
    """One sentence that names the flag; nothing is written."""
    with pytest.raises(UserError, match=named):
        babyai.train(tiny(output_dir=str(tmp_path / "run"), **flags))
    assert not (tmp_path / "run").exists()
