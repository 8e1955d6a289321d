"""KD with data pruning on digits: is a random part with a teacher as good as a chosen one, and how much teacher does which part need?

900 images, a fifth of their labels random; teacher 64-256-256-10 on all of them, student 64-32-10 on 5, 10, 20, 50 or 100 % of them, 300
Adam steps for each (equal steps, not epochs). Selectors: random; the highest EL2N (three trainings of 5 epochs); the most forgotten
(30 epochs). alpha in 0, 0.25, 0.5, 0.75, 1, chosen for each selector and share on the clean validation split by the mean over seeds;
all of them are in the results. The claims to look at: KD above no KD; random with KD not below the others with KD at up to 20 %;
the best alpha does not grow with the share. Also the ridge simulation of the paper's argument.
"""

from __future__ import annotations

import itertools
import json
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kdfast
from benchmarks.experiments._common import seed_rows, write
from kdfast.data import models
from kdfast.data.digits import narrow_mlp
from kdfast.data.pruning import ForgettingTracker, el2n, select
from kdfast.data.relabelled_digits import relabelled_digits_task, relabelled_splits
from kdfast.experiment import commit, threads
from kdfast.methods.kd_data_pruning import pruned_kd_loss, ridge_student
from kdfast.metrics import accuracy, mean_and_error, sentence, summary

BATCH, LR = 64, 2e-3
SHARES, ALPHAS, SELECTORS = (0.05, 0.1, 0.2, 0.5, 1.0), (0.0, 0.25, 0.5, 0.75, 1.0), ("random", "el2n", "forgetting")
Rows = tuple[Tensor, Tensor]


def run(
    out: Path, *, seeds: int = 10, steps: int | None = None, work: Path | None = None, shares: Sequence[float] = SHARES,
    alphas: Sequence[float] = ALPHAS,
) -> dict[str, Any]:  # fmt: skip
    """Seeds that `work` holds are read, the others trained; returns and writes the results with their sentences."""
    steps = steps or relabelled_digits_task().steps
    settings = {"steps": steps, "shares": list(shares), "alphas": list(alphas), "batch": BATCH, "lr": LR}
    if out.exists() and (stored := json.loads(out.read_text()))["settings"] == settings and stored["n"] >= seeds:
        return stored
    key = "-".join([str(steps), *("_".join(f"{value:g}" for value in values) for values in (shares, alphas))])
    with threads(1):  # the networks are small: a second thread only waits
        rows = seed_rows("kd_data_pruning", seeds, key, lambda seed: one_seed(seed, steps, shares, alphas), work)
    results = {
        "settings": settings, "n": seeds, "teacher": [row["teacher"] for row in rows],
        "scores": {key: {part: [row["scores"][key][part] for row in rows] for part in ("val", "test")} for key in rows[0]["scores"]},
        "ridge": ridge_simulation(), "seconds": [row["seconds"] for row in rows],
        "peak_rss_mb": max(row["peak_rss_mb"] for row in rows),
        "versions": {"kdfast": kdfast.__version__, "torch": torch.__version__}, "commit": commit(),
    }  # fmt: skip
    return write(out, results | said(results, shares, alphas))


def said(results: dict[str, Any], shares: Sequence[float], alphas: Sequence[float]) -> dict[str, Any]:
    """{"best": {selector: {share: alpha}}, "sentences"}: alpha by the mean validation accuracy, figures of the test split."""
    scores, best, lines = results["scores"], {}, []
    for selector in SELECTORS:
        best[selector] = {
            f"{share:g}": max(alphas, key=lambda alpha: sum(scores[key_of(selector, share, alpha)]["val"]))
            for share in shares
        }
    lines.append("best alpha on validation: " + "; ".join(f"{name} {chosen}" for name, chosen in best.items()))

    def test(selector: str, share: float, alpha: float | None = None) -> list[float]:
        return scores[key_of(selector, share, best[selector][f"{share:g}"] if alpha is None else alpha)]["test"]

    for share in shares:
        for selector in SELECTORS:
            name = f"{100 * share:g} % {selector} with KD"
            lines.append(sentence(name, test(selector, share), "without", test(selector, share, 0.0)))
        lines += [
            sentence(f"{100 * share:g} % random with KD", test("random", share), f"{other} with KD", test(other, share))
            for other in SELECTORS[1:]
        ]
    order = [best["random"][f"{share:g}"] for share in shares]
    falls = all(a >= b for a, b in itertools.pairwise(order))
    lines.append(
        f"the best alpha of random parts {'does not grow' if falls else 'grows somewhere'} with the share kept: {order}"
    )
    lines.append(f"teacher: {mean_and_error(results['teacher'])} (test accuracy in %, n = {len(results['teacher'])})")
    ridge = results["ridge"]
    bias = ", ".join(f"{n} samples {value:.3f}" for n, value in ridge["bias"].items())
    lines.append(f"ridge: squared bias at alpha = 1 by the teacher's data: {bias}")
    lines.append(f"ridge: total error {ridge['error']['1']:.3f} at alpha = 1, {ridge['error']['0']:.3f} at alpha = 0")
    table = {
        f"{selector} {share}, alpha {alpha}": summary(test(selector, float(share)))
        for selector, found in best.items()
        for share, alpha in found.items()
    }
    return {"best": best, "summary": table, "sentences": lines}


def key_of(selector: str, share: float, alpha: float) -> str:
    return f"{selector} {share:g} {alpha:g}"


def one_seed(seed: int, steps: int, shares: Sequence[float], alphas: Sequence[float]) -> dict[str, Any]:
    start = time.perf_counter()
    splits: dict[str, Rows] = {name: rows[:][:2] for name, rows in relabelled_splits(seed).items()}  # type: ignore[misc]
    train = splits["student"]
    teacher = fit(models(relabelled_digits_task(), seed)[1], train, seed, steps)
    scores = {"el2n": el2n_scores(train, seed), "forgetting": forgetting_scores(train, seed)}
    found: dict[str, dict[str, float]] = {}
    for share in shares:
        for selector in SELECTORS:
            if selector == "random":
                index = select(n=len(train[1]), keep=share, generator=torch.Generator().manual_seed(seed))
            else:
                index = select(scores[selector], keep=share, mode="hard")
            for alpha in alphas:
                if share == 1 and selector != "random":  # the same part
                    found[key_of(selector, share, alpha)] = found[key_of("random", share, alpha)]
                    continue
                student = fit(fresh(seed), (train[0][index], train[1][index]), seed, steps, teacher, alpha)
                found[key_of(selector, share, alpha)] = {part: right(student, splits[part]) for part in ("val", "test")}
    return {
        "teacher": right(teacher, splits["test"]), "scores": found, "seconds": time.perf_counter() - start,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }  # fmt: skip


def fresh(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return narrow_mlp(32)


def fit(
    model: nn.Module, data: Rows, seed: int, steps: int, teacher: nn.Module | None = None, alpha: float = 0.0
) -> nn.Module:
    """`steps` batches drawn with the seed, epoch after epoch; without a teacher alpha is 0."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    targets = (
        torch.zeros(len(labels), 10) if teacher is None else logits_of(teacher, images)
    )  # no augmentation: stored once
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < min(BATCH, len(labels)):
            order = torch.cat((order, torch.randperm(len(labels), generator=generator)))
        index, order = order[:BATCH], order[BATCH:]
        optimizer.zero_grad()
        pruned_kd_loss(model(images[index]), targets[index], labels[index], alpha=alpha).loss.backward()
        optimizer.step()
    return model


def el2n_scores(data: Rows, seed: int, trainings: int = 3, epochs: int = 5) -> Tensor:
    steps = epochs * len(data[1]) // BATCH
    logits = [
        logits_of(fit(fresh(1000 * r + seed), data, 1000 * r + seed, steps), data[0]) for r in range(1, trainings + 1)
    ]
    return el2n(torch.stack(logits), data[1])


def forgetting_scores(data: Rows, seed: int, epochs: int = 30) -> Tensor:
    images, labels = data
    model, tracker, every = fresh(seed), ForgettingTracker(len(labels)), torch.arange(len(labels))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    for _ in range(epochs):
        for index in torch.randperm(len(labels), generator=generator).split(BATCH):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[index]), labels[index]).backward()
            optimizer.step()
        tracker.update(every, logits_of(model, images).argmax(-1) == labels)
    return tracker.scores()


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


def right(model: nn.Module, rows: Rows) -> float:
    return accuracy(logits_of(model, rows[0]).argmax(-1), rows[1])


def ridge_simulation(trials: int = 400) -> dict[str, dict[str, float]]:
    """D = 20, 200 samples, 40 kept, lam 1, noise 2: {"bias": squared bias at alpha = 1 by the teacher's samples, "error": by alpha}."""
    generator = torch.Generator().manual_seed(0)
    draw = {"generator": generator, "dtype": torch.float64}
    x, truth, keep = torch.randn(20, 200, **draw), torch.randn(20, **draw), torch.arange(40)
    students: dict[tuple[int, float], list[Tensor]] = {}
    for _ in range(trials):
        y = x.T @ truth + 2 * torch.randn(200, **draw)
        for samples, alpha in ((40, 1.0), (120, 1.0), (200, 1.0), (200, 0.0)):
            weights = ridge_student(x[:, :samples], y[:samples], keep, 1.0, alpha)[1]
            students.setdefault((samples, alpha), []).append(weights)
    means = {case: torch.stack(found) for case, found in students.items()}
    bias = {str(n): float((means[n, 1.0].mean(0) - truth).square().sum()) for n in (40, 120, 200)}
    error = {f"{alpha:g}": float((means[200, alpha] - truth).square().sum(1).mean()) for alpha in (1.0, 0.0)}
    return {"bias": bias, "error": error}
