"""Every pair of blocks in docs/drop-in.md, run: the same gradient and the same value, or the stated difference.

"before" calls a peer. Its formula is written out below from its equation, so that the pairs run everywhere; where the peer
is installed and runs on a CPU, `test_formula_is_the_peers` checks that formula against the peer itself.
"""

from __future__ import annotations

import ast
import importlib.util
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import losses

PAGE = Path(__file__).resolve().parent.parent / "docs" / "drop-in.md"
B, L, V, N, C, H = 2, 5, 23, 6, 10, 8


# ---------------------------------------------------------------- the peers' formulas
def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def log_probs(student: Tensor, teacher: Tensor, temperature: float = 1.0, dim: int = -1) -> tuple[Tensor, Tensor]:
    return (student / temperature).log_softmax(dim), (teacher / temperature).log_softmax(dim)


def kept_mean(rows: Tensor, labels: Tensor) -> Tensor:
    keep = (labels != -100).reshape(rows.shape)
    return torch.where(keep, rows, 0.0).sum() / keep.sum()


def jsd_rows(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """beta KL(p || m) + (1-beta) KL(q || m), m = beta p + (1-beta) q."""
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def hinton(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_q, log_p = log_probs(student, teacher, temperature)
    return temperature**2 * kl(log_p, log_q).sum() / student.shape[0]


def mdistiller_dkd(
    student: Tensor, teacher: Tensor, target: Tensor, alpha: float, beta: float, temperature: float
) -> Tensor:
    """Target and rest as two classes; the rest again by pushing the target's logit down by 1000."""
    hot = F.one_hot(target, student.shape[1]).bool()
    q, p = (student / temperature).softmax(1), (teacher / temperature).softmax(1)
    q2 = torch.stack((q[hot], (q * ~hot).sum(1)), 1)
    p2 = torch.stack((p[hot], (p * ~hot).sum(1)), 1)
    rest_q = (student / temperature - 1000.0 * hot).log_softmax(1)
    rest_p = (teacher / temperature - 1000.0 * hot).log_softmax(1)
    n = student.shape[0]
    return temperature**2 * (alpha * kl(p2.log(), q2.log()).sum() + beta * kl(rest_p, rest_q).sum()) / n


class DistillKL:
    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return hinton(student, teacher, self.temperature)


class TorchdistillKD:
    def __init__(self, s_path: str, s_io: str, t_path: str, t_io: str, temperature: float, alpha: float) -> None:
        self.paths, self.temperature, self.alpha = (s_path, s_io, t_path, t_io), temperature, alpha

    def __call__(self, student_io: dict, teacher_io: dict, targets: Tensor) -> Tensor:
        s_path, s_io, t_path, t_io = self.paths
        student, teacher = student_io[s_path][s_io], teacher_io[t_path][t_io]
        return self.alpha * F.cross_entropy(student, targets) + (1 - self.alpha) * hinton(
            student, teacher, self.temperature
        )


class KLDivergence:
    """MMRazor: softmax over axis 1, the sum of everything divided by the batch, times tau^2."""

    def __init__(self, tau: float, loss_weight: float = 1.0) -> None:
        self.tau, self.loss_weight = tau, loss_weight

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        log_q, log_p = log_probs(student, teacher, self.tau, dim=1)
        return self.loss_weight * self.tau**2 * (log_p.exp() * (log_p - log_q)).sum() / student.shape[0]


class LogitsDistillationLoss:
    """Model-Optimizer: the mean of F.kl_div over every element, times T^2."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        log_q, log_p = log_probs(student, teacher, self.temperature)
        return self.temperature**2 * (log_p.exp() * (log_p - log_q)).mean()


def generalized_jsd_loss(student, teacher, labels=None, beta=0.5, temperature=1.0) -> Tensor:
    log_q, log_p = log_probs(student, teacher, temperature)
    rows = kl(log_p, log_q) if beta == 0 else kl(log_q, log_p) if beta == 1 else jsd_rows(log_q, log_p, beta)
    return rows.sum() / student.shape[0] if labels is None else kept_mean(rows, labels)


def chunked_divergence_loss(hidden, teacher_hidden, weight, teacher_weight, mask, beta, temperature=1.0):
    log_q, log_p = log_probs(hidden @ weight.T, teacher_hidden @ teacher_weight.T, temperature)
    rows = jsd_rows(log_q, log_p, beta)
    entropy = -(log_q.exp() * log_q).sum(-1)
    return (rows * mask).sum() / mask.sum(), (entropy * mask).sum().detach(), mask.sum()


class ForwardKLLoss:
    """torchtune: the cross term - sum p log q."""

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        log_q, log_p = log_probs(student, teacher)
        return kept_mean(-(log_p.exp() * log_q).sum(-1), labels)


class ReverseKLLoss:
    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        log_q, log_p = log_probs(student, teacher)
        return kept_mean(kl(log_q, log_p), labels)


class SymmetricKLLoss:
    def __init__(self, sym_kd_ratio: float = 0.5) -> None:
        self.ratio = sym_kd_ratio

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        forward, reverse = ForwardKLLoss()(student, teacher, labels), ReverseKLLoss()(student, teacher, labels)
        return self.ratio * forward + (1 - self.ratio) * reverse


class ForwardKLWithChunkedOutputLoss:
    """The cross term again, over lists of chunks of logits."""

    def __init__(self, num_output_chunks: int) -> None:
        self.chunks = num_output_chunks

    def __call__(self, student: list[Tensor], teacher: list[Tensor], labels: Tensor) -> Tensor:
        assert len(student) == len(teacher) == self.chunks
        return ForwardKLLoss()(torch.cat(student), torch.cat(teacher), labels)


class LigerKLDIVLoss:
    def __init__(self, reduction: str) -> None:
        assert reduction == "batchmean"

    def __call__(self, log_q: Tensor, p: Tensor) -> Tensor:
        return kl(p.log(), log_q).sum() / log_q.shape[0]


class LigerJSD:
    def __init__(self, beta: float = 0.5) -> None:
        self.beta = beta

    def __call__(self, log_q: Tensor, log_p: Tensor, labels: Tensor) -> Tensor:
        return kept_mean(jsd_rows(log_q, log_p, self.beta), labels)


class LigerTVDLoss:
    def __call__(self, q: Tensor, p: Tensor, labels: Tensor) -> Tensor:
        return kept_mean(0.5 * (q - p).abs().sum(-1), labels)


class LigerFusedLinearJSDLoss:
    """CE at temperature 1 and the JSD of the softened logits, both over the kept tokens, no T^2."""

    def __init__(self, weight_hard_loss, weight_soft_loss, beta, temperature, compiled=False) -> None:
        self.hard, self.soft, self.beta, self.temperature = weight_hard_loss, weight_soft_loss, beta, temperature

    def __call__(self, hidden, weight, teacher_hidden, teacher_weight, labels) -> Tensor:
        student, teacher = hidden @ weight.T, teacher_hidden @ teacher_weight.T
        soft = kept_mean(jsd_rows(*log_probs(student, teacher, self.temperature), self.beta), labels)
        return self.hard * F.cross_entropy(student, labels) + self.soft * soft


def skewed_forward_kl(student: Tensor, teacher: Tensor, batch: dict, lam: float = 0.1) -> Tensor:
    """distillm: - sum p log(lam p + (1-lam) q)."""
    q, p = student.softmax(-1), teacher.softmax(-1)
    return kept_mean(-(p * (lam * p + (1 - lam) * q).log()).sum(-1), batch["label"])


def js_distance(student: Tensor, teacher: Tensor, batch: dict, lam: float = 0.9) -> Tensor:
    """distillm: the mixture holds lam of the student, and lam weighs the student's side."""
    log_q, log_p = log_probs(student, teacher)
    log_m = (lam * log_q.exp() + (1 - lam) * log_p.exp()).log()
    return kept_mean(lam * kl(log_q, log_m) + (1 - lam) * kl(log_p, log_m), batch["label"])


PEERS = {
    "mdistiller": SimpleNamespace(kd_loss=hinton, dkd_loss=mdistiller_dkd),
    "DistillKL": DistillKL,
    "KDLoss": TorchdistillKD,
    "KLDivergence": KLDivergence,
    "LogitsDistillationLoss": LogitsDistillationLoss,
    "GKDTrainer": SimpleNamespace(generalized_jsd_loss=generalized_jsd_loss),
    "_chunked_divergence_loss": chunked_divergence_loss,
    "ForwardKLLoss": ForwardKLLoss,
    "ReverseKLLoss": ReverseKLLoss,
    "SymmetricKLLoss": SymmetricKLLoss,
    "ForwardKLWithChunkedOutputLoss": ForwardKLWithChunkedOutputLoss,
    "LigerKLDIVLoss": LigerKLDIVLoss,
    "LigerJSD": LigerJSD,
    "LigerTVDLoss": LigerTVDLoss,
    "LigerFusedLinearJSDLoss": LigerFusedLinearJSDLoss,
    "skewed_forward_kl": skewed_forward_kl,
    "js_distance": js_distance,
}
# Sections whose value differs by this share of the teacher's mean entropy, as their text says.
WITHOUT_ENTROPY = {
    "torchtune: ForwardKLLoss": 1.0,
    "torchtune: SymmetricKLLoss": 0.7,
    "torchtune: ForwardKLWithChunkedOutputLoss": 1.0,
    "distillm: skewed_forward_kl": 1.0,
}


# ---------------------------------------------------------------- the page
def sections() -> dict[str, tuple[str, str, str]]:
    """Heading -> (part of the page, before, after)."""
    found = {}
    for part in re.split(r"^## ", PAGE.read_text(), flags=re.M)[1:]:
        for section in re.split(r"^### ", part, flags=re.M)[1:]:
            blocks = {
                kind: code for kind, code in re.findall(r"```python (before|after)\n(.*?)```", section, flags=re.S)
            }
            assert set(blocks) == {"before", "after"}, f"a section without its two blocks: {section[:60]!r}"
            found[section.partition("\n")[0].strip()] = (
                part.partition("\n")[0].strip(),
                blocks["before"],
                blocks["after"],
            )
    return found


SECTIONS = sections()


def inputs(part: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The names that the page's blocks use, in float64, and the leaves among them."""
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 2

    rows, classes = ((N,), C) if part == "Vision" else ((B, L), V)
    labels = torch.randint(classes, rows, generator=generator)
    if part != "Vision":
        labels[0, 1] = labels[1, 3] = labels[1, 4] = -100
    names = {
        "student": draw(*rows, classes), "teacher": draw(*rows, classes), "labels": labels,
        "student_map": draw(2, C, 3, 4), "teacher_map": draw(2, C, 3, 4),
        "hidden": draw(B * L, H), "weight": draw(V, H), "teacher_hidden": draw(B * L, H), "teacher_weight": draw(V, H),
    }  # fmt: skip
    leaves = [names[name].requires_grad_() for name in ("student", "student_map", "hidden", "weight")]
    return names, leaves


class FakeModel:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def __call__(self, **inputs: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits)


def run(code: str, part: str, scope: dict, num_items: int | None = None) -> tuple[Tensor, list[Tensor | None]]:
    names, leaves = inputs(part)
    space = {"torch": torch, "F": F, "Trainer": object, **names, **scope}
    exec(compile(code, str(PAGE), "exec"), space)
    loss = space.get("loss")
    if "DistillationTrainer" in space:
        trainer = space["DistillationTrainer"]()
        trainer.teacher = FakeModel(names["teacher"])
        loss, _ = trainer.compute_loss(FakeModel(names["student"]), {"labels": names["labels"]}, True, num_items)
    return loss, torch.autograd.grad(loss, leaves, allow_unused=True)


def losses_scope() -> dict[str, Callable]:
    return {name: getattr(losses, name) for name in losses.__all__}


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")  # torch says of its own call what the page says
@pytest.mark.parametrize(
    ("heading", "num_items"), [*((heading, None) for heading in SECTIONS), ("HF Trainer: compute_loss", 40)]
)
def test_before_and_after(heading, num_items):
    part, before, after = SECTIONS[heading]
    want, want_grads = run(before, part, PEERS, num_items)
    got, got_grads = run(after, part, losses_scope(), num_items)
    if heading in WITHOUT_ENTROPY:
        names, _ = inputs(part)
        teacher = names["teacher_hidden"] @ names["teacher_weight"].T if "hidden" in before else names["teacher"]
        log_p = teacher.log_softmax(-1)
        entropy = kept_mean(-(log_p.exp() * log_p).sum(-1), names["labels"])
        want = want - WITHOUT_ENTROPY[heading] * entropy
    assert want.item() > 1e-3
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert any(grad is not None and grad.abs().max() > 1e-4 for grad in want_grads)
    for grad, wanted in zip(got_grads, want_grads):
        assert (grad is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-12)


def test_the_table_and_the_sections_name_the_same_peers():
    table = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    assert len(table) >= 19
    for name in PEERS:
        word = "kd_loss" if name == "mdistiller" else "generalized_jsd_loss" if name == "GKDTrainer" else name
        assert any(word in row for row in table), f"{name} has a section but no row in the table"


# ---------------------------------------------------------------- the peers themselves, where they are installed
def installed_function(package: str, file: str, name: str, **scope) -> Callable:
    """One function or class of an installed package, read from its file: the package's import may ask for far more."""
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    if path is None or not path.exists():
        pytest.skip(f"{package} is not installed, or has no {file}")
    tree = ast.parse(path.read_text())
    wanted = [
        node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name
    ]
    if not wanted:
        pytest.skip(f"this version of {package} has no {name}")
    wanted[0].decorator_list = []
    space = {"torch": torch, "F": F, "nn": torch.nn, "math": math, **scope}
    exec(compile(ast.Module(wanted[:1], []), str(path), "exec"), space)
    return space[name]


def check_formula(peer: Callable[..., Tensor], ours: Callable[..., Tensor], part: str, *names: str) -> None:
    values, leaves = inputs(part)
    arguments = [values[name] for name in names]
    used = [leaf for leaf in leaves if any(leaf is argument for argument in arguments)]
    got, want = ours(*arguments), peer(*arguments)
    torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-5, atol=1e-7)  # some peers compute in float32 inside
    for a, b in zip(torch.autograd.grad(got, used), torch.autograd.grad(want, used)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_formula_is_trls(beta):
    peer = installed_function("trl", "experimental/gkd/gkd_trainer.py", "generalized_jsd_loss")
    options = {"beta": beta, "temperature": 2.0}
    check_formula(
        lambda s, t, y: peer(s, t, labels=y, **options), lambda s, t, y: generalized_jsd_loss(s, t, y, **options),
        "Language models", "student", "teacher", "labels",
    )  # fmt: skip
    check_formula(
        lambda s, t: peer(s, t, **options),
        lambda s, t: generalized_jsd_loss(s, t, **options),
        "Language models",
        "student",
        "teacher",
    )


@pytest.mark.filterwarnings("ignore")  # the peer's imports
def test_formula_is_that_of_trls_distillation_trainer():
    module = pytest.importorskip("trl.trainer.distillation_trainer", exc_type=ImportError)

    def call(loss) -> Callable[..., Tensor]:
        return lambda h, th, w, tw, y: loss(
            h.unflatten(0, y.shape), th.unflatten(0, y.shape), w, tw, y != -100, 0.3, temperature=2.0
        )[0]

    names = ("hidden", "teacher_hidden", "weight", "teacher_weight", "labels")
    check_formula(call(module._chunked_divergence_loss), call(chunked_divergence_loss), "Language models", *names)


@pytest.mark.parametrize(("name", "ours"), [("ForwardKLLoss", ForwardKLLoss), ("ReverseKLLoss", ReverseKLLoss)])
def test_formula_is_torchtunes(name, ours):
    peer = installed_function("torchtune", "modules/loss/kd_losses.py", name)()
    check_formula(peer, ours(), "Language models", "student", "teacher", "labels")


def test_formula_is_torchtunes_symmetric():
    parts = {
        name: installed_function("torchtune", "modules/loss/kd_losses.py", name)
        for name in ("ForwardKLLoss", "ReverseKLLoss")
    }
    peer = installed_function("torchtune", "modules/loss/kd_losses.py", "SymmetricKLLoss", **parts)(0.7)
    check_formula(peer, SymmetricKLLoss(0.7), "Language models", "student", "teacher", "labels")


@pytest.mark.filterwarnings("ignore")  # the peer's imports
def test_formula_is_torchdistills():
    module = pytest.importorskip("torchdistill.losses.mid_level", exc_type=ImportError)
    options = ("fc", "output", "fc", "output")

    def call(loss) -> Callable[..., Tensor]:
        return lambda s, t, y: loss({"fc": {"output": s}}, {"fc": {"output": t}}, y)

    peer, ours = (
        module.KDLoss(*options, temperature=4.0, alpha=0.3),
        TorchdistillKD(*options, temperature=4.0, alpha=0.3),
    )
    check_formula(call(peer), call(ours), "Vision", "student", "teacher", "labels")


@pytest.mark.filterwarnings("ignore")  # the peer's imports
def test_formula_is_ligers():
    module = pytest.importorskip("liger_kernel.chunked_loss", exc_type=ImportError)
    options = {"weight_hard_loss": 0.4, "weight_soft_loss": 0.6, "beta": 0.5, "temperature": 2.0, "compiled": False}
    peer, ours = module.LigerFusedLinearJSDLoss(**options), LigerFusedLinearJSDLoss(**options)
    check_formula(
        lambda h, w, th, tw, y: peer(h, w, th, tw, y.flatten()), lambda h, w, th, tw, y: ours(h, w, th, tw, y.flatten()),
        "Language models", "hidden", "weight", "teacher_hidden", "teacher_weight", "labels",
    )  # fmt: skip
