"""Measures of a task-skill allocation: those of Polytropon section 4.3, and how well it recovers a known table.

Functions of arrays. Shape key, as in poly.py: t tasks, s skills, h heads. An allocation is p (t, s), or (t, h, s): the
probability that a task uses a skill (in a head).
"""

import statistics
from collections.abc import Iterable

import numpy as np
import torch
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform
from scipy.special import entr
from scipy.stats import rankdata
from torch import nn

from baselines.fixed import FixedRouter
from inject import adapted_layers
from mhr import MHRRouter
from poly import PolyRouter

# --- Allocations, and measures of one ---------------------------------------------------------------------------------


def allocations(model: nn.Module) -> dict[str, np.ndarray]:
    """Each router's allocation, float64: {name of the first layer that it serves: (t, s), or (t, h, s) for mhr}.

    poly, mhr: sigmoid(Z), the probabilities of Polytropon equation 2, before a row is divided by its sum. Fixed table
    (expert, private, adapter-soup, random by task): the table. Other methods have no probability of a skill and give
    {}: one adapter for all; task-moe, whose weights compete for a sum of 1; hyperformer, whose weights are unbounded;
    random by example.
    """
    first = {}
    for name, layer in adapted_layers(model).items():
        if hasattr(layer, "router"):
            first.setdefault(layer.router, name)  # a router that several layers share counts once
    by_router = {}
    for router, name in first.items():
        Z = router.Z.detach().double().cpu()
        if type(router) in (PolyRouter, MHRRouter):
            by_router[name] = torch.sigmoid(Z).numpy()
        elif type(router) is FixedRouter:
            by_router[name] = Z.numpy()
    return by_router


def discreteness(p: np.ndarray) -> float:
    """1 - the mean of H(p) / log 2 over all cells, H the entropy of a Bernoulli variable (Polytropon equation 5).

    0 if all cells are 1/2, 1 if all are 0 or 1. So says the paper's text; its formula lacks the "1 -".
    """
    entropy = entr(p) + entr(1 - p)
    return float(np.clip(1 - entropy.mean() / np.log(2), 0, 1))


def sparsity(p: np.ndarray) -> float:
    """The share of cells above 1/2 (Polytropon equation 6): 1 if every task uses every skill, so less is sparser."""
    return float((p > 0.5).mean())


def usage(p: np.ndarray) -> float | None:
    """H(u) / log s, where u is the sum of p over tasks, divided by its total (Polytropon equation 7).

    1 if all skills are used equally, 0 if only one is, or none. With heads: the mean over heads, since a head that
    always takes the same skill is not balanced, even if another head always takes another. None for a single skill.
    """
    s = p.shape[-1]
    if s == 1:
        return None
    columns = p.sum(0)  # (s,) or (h, s)
    total = columns.sum(-1, keepdims=True)
    share = columns / np.where(total > 0, total, 1)
    return float(np.clip(entr(share).sum(-1).mean() / np.log(s), 0, 1))


MEASURES = {"discreteness": discreteness, "sparsity": sparsity, "usage": usage}


def measure(allocations: dict[str, np.ndarray]) -> dict[str, dict]:
    """{"layers": {router: {measure: value}}, "mean": {measure: mean over routers}}, None where undefined."""
    layers = {name: {m: f(p) for m, f in MEASURES.items()} for name, p in allocations.items()}
    return {"layers": layers, "mean": mean_of(layers.values())}


def mean_of(rows: Iterable[dict[str, float | None]]) -> dict[str, float | None]:
    """The mean of each measure over routers where it is defined; None where it is not."""
    defined = {m: [row[m] for row in rows if row[m] is not None] for m in MEASURES}
    return {m: statistics.fmean(values) if values else None for m, values in defined.items()}


# --- Tasks compared ---------------------------------------------------------------------------------------------------


def flat(allocations: dict[str, np.ndarray]) -> np.ndarray:
    """All allocations of each task in one row: (t, n), n the skills of all routers and heads."""
    return np.concatenate([p.reshape(len(p), -1) for p in allocations.values()], axis=1)


def task_similarity(allocations: dict[str, np.ndarray]) -> np.ndarray:
    """(t, t): the cosine of two tasks' probabilities over all routers, heads and skills, from 0 to 1.

    1 on the diagonal. A task that uses no skill has 0 with every other.
    """
    rows = flat(allocations)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(norms > 0, norms, 1)
    similarity = np.clip(rows @ rows.T, 0, 1)
    np.fill_diagonal(similarity, 1)
    return similarity


def hierarchy(similarity: np.ndarray) -> np.ndarray:
    """The tree of tasks, a scipy linkage (t - 1, 4): average linkage of 1 - similarity, similar tasks side by side."""
    distance = squareform(1 - similarity, checks=False)
    return linkage(distance, "average", optimal_ordering=True)


def overlap(table: np.ndarray) -> np.ndarray:
    """Jaccard index (t, t) of a table (t, s) of 0 and 1: skills that two tasks share, divided by those that either has.

    0 where neither has any.
    """
    on = (np.asarray(table) > 0).astype(float)
    both, sizes = on @ on.T, on.sum(1)
    return both / np.maximum(sizes[:, None] + sizes[None] - both, 1)


def recovery(similarity: np.ndarray, table: np.ndarray, draws: int = 1000, seed: int = 0) -> dict[str, float | str]:
    """How much of a true task-skill table (t, s') is in the similarity (t, t) that a model learned for the tasks.

    correlation        Spearman's, over all pairs of different tasks, between similarity and `overlap` of the table: two
                       tasks should be similar if they share skills. Learned skills need not match true ones, and may be
                       fewer or more
    chance, chance_95  mean and 95 % point of the correlation if the tasks' names are permuted (Mantel's test)
    p                  share of permutations that reach the correlation, which counts as one of them
    low, high          95 % percentile interval of a bootstrap over tasks; a task drawn twice makes no pair with itself,
                       which would be similar whatever was learned
    Only {"undefined": why} if similarity or overlap is the same for all pairs: there is then no order to compare.
    Raises ValueError for fewer than three tasks, or a table of another number of tasks.
    """
    t = len(table)
    if t < 3 or similarity.shape != (t, t):
        raise ValueError(f"recovery needs three or more tasks, not {t}, and their similarity, not {similarity.shape}")
    truth, rng = overlap(table), np.random.default_rng(seed)
    a, b = np.triu_indices(t, 1)
    if constant(similarity[a, b]):
        return {"undefined": "all pairs of tasks are equally similar"}
    if constant(truth[a, b]):
        return {"undefined": "in the true table all pairs are equally similar"}
    observed = spearman(similarity[a, b], truth[a, b])
    orders = [rng.permutation(t) for _ in range(draws)]
    chance = np.array([spearman(similarity[o[a], o[b]], truth[a, b]) for o in orders])
    again = []
    for drawn in rng.integers(t, size=(draws, t)):
        i, j = drawn[a], drawn[b]
        different = i != j
        again.append(spearman(similarity[i, j][different], truth[i, j][different]))
    low, high = np.nanpercentile(again, [2.5, 97.5])
    p = (1 + (chance >= observed - 1e-12).sum()) / (1 + draws)
    values = dict(correlation=observed, low=low, high=high, chance=chance.mean(), chance_95=np.percentile(chance, 95))
    return {name: float(value) for name, value in (values | {"p": p}).items()}


def constant(values: np.ndarray) -> bool:
    """Whether all values are the same but for rounding."""
    return len(values) == 0 or bool(np.ptp(values) < 1e-6)


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation of two vectors; NaN where it is undefined: one of them is constant or empty."""
    if constant(x) or constant(y):
        return np.nan
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])
