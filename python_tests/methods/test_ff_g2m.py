"""FF-G2M: both terms by loops over the edges, gradients by the paper's formulas, weights of edges, the procedure. Vectors: test_vectors.py."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F

from kdfast import methods
from kdfast.methods import ff_g2m
from kdfast.methods.ff_g2m import (
    EdgeTargets,
    add_loops,
    edge_weights,
    ff_g2m_loss,
    high_frequency_kd,
    high_frequency_term,
    low_frequency_kd,
    prepare_edges,
    prepare_high,
    prepare_low,
    remove_loops,
)

F64 = torch.float64
# directed, one edge twice, node 4 alone
EDGES = torch.tensor([[0, 0, 1, 2, 3, 3, 1, 5], [1, 2, 0, 3, 2, 2, 5, 0]])


def logits(n=6, c=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    s, t = (2 * torch.randn(n, c, generator=generator, dtype=F64) for _ in range(2))
    return s.requires_grad_(), t


def low_by_loop(s, t, edges, weights, tau=1.0):
    total = 0.0
    for (i, j), w in zip(edges.T.tolist(), weights):
        q = (t[j] / tau).softmax(-1)
        total = total + w * (q * (q.log() - (s[i] / tau).log_softmax(-1))).sum()
    return total


def high_by_loop(s, t, edges, weights, tau):
    total = 0.0
    for (i, j), w in zip(edges.T.tolist(), weights):
        p, q = (((x[i] - x[j]).abs() / tau).log_softmax(-1) for x in (s, t))
        total = total + w * (q.exp() * (q - p)).sum()
    return total


def weights_by_loop(edges, normalise):
    i = edges[0].tolist()
    if normalise == "edge":
        return [1 / len(i)] * len(i)
    return [1 / (len(set(i)) * i.count(a)) for a in i]


# ---------------------------------------------------------------- the terms
@pytest.mark.parametrize("normalise", ("edge", "node"))
@pytest.mark.parametrize("tau", (1.0, 2.5))
def test_terms_by_a_loop_over_the_edges(normalise, tau):
    s, t = logits()
    loops = add_loops(EDGES, 6)
    for got, want in (
        (low_frequency_kd(s, t, loops, tau_low=tau, normalise=normalise), low_by_loop(s, t, loops, weights_by_loop(loops, normalise), tau)),
        (low_frequency_kd(s, t, EDGES, tau_low=tau, normalise=normalise), low_by_loop(s, t, EDGES, weights_by_loop(EDGES, normalise), tau)),
        (high_frequency_kd(s, t, EDGES, tau=tau, normalise=normalise), high_by_loop(s, t, EDGES, weights_by_loop(EDGES, normalise), tau)),
    ):  # fmt: skip
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*[torch.autograd.grad(x, s)[0] for x in (got, want)])
    torch.testing.assert_close(edge_weights(EDGES, 6, normalise), torch.tensor(weights_by_loop(EDGES, normalise), dtype=F64))  # fmt: skip


def test_gradients_are_those_of_the_paper():
    s, t = logits()
    loops, tau = add_loops(EDGES, 6), 1.5
    want = torch.zeros_like(s)
    for i, j in loops.T.tolist():
        want[i] += (s[i].softmax(-1) - t[j].softmax(-1)).detach() / loops.shape[1]
    torch.testing.assert_close(torch.autograd.grad(low_frequency_kd(s, t, loops), s)[0], want.detach())
    tied = s.detach().clone()
    tied[1] = tied[0]  # sign(0) = 0: nothing moves along an edge between equal logits
    tied.requires_grad_()
    want = torch.zeros_like(s)
    for i, j in EDGES.T.tolist():
        ds, dt = ((x[i] - x[j]).abs() / tau for x in (tied, t))
        g = (ds.softmax(-1) - dt.softmax(-1)) * (tied[i] - tied[j]).sign() / (tau * EDGES.shape[1])
        want[i] += g
        want[j] -= g
    torch.testing.assert_close(torch.autograd.grad(high_frequency_kd(tied, t, EDGES, tau=tau), tied)[0], want.detach())


def test_a_neighbours_prediction_counts_at_the_first_end():
    s, t = logits(2)
    one = torch.tensor([[0], [1]])
    want = F.kl_div(s[:1].log_softmax(-1), t[1:].softmax(-1), reduction="batchmean")
    torch.testing.assert_close(low_frequency_kd(s, t, one), want)
    targets = prepare_low(t, one)
    assert targets.weight.tolist() == [1, 0] and targets.spread == 0
    assert torch.autograd.grad(low_frequency_kd(s, t, one), s)[0][1].count_nonzero() == 0


def test_the_constant_part_is_what_no_student_reaches():
    _, t = logits()
    loops = add_loops(EDGES, 6)
    targets = prepare_low(t, loops)
    best = targets.log_mean.clone().requires_grad_()
    loss = low_frequency_kd(best, t, loops)
    torch.testing.assert_close(loss, targets.spread)
    assert targets.spread > 0.1
    assert torch.autograd.grad(loss, best)[0].abs().max() < 1e-12


def test_preparation_in_parts_is_the_same(monkeypatch):
    _, t = logits()
    whole = prepare_low(t, EDGES)
    monkeypatch.setattr(ff_g2m, "CHUNK", 3)
    torch.testing.assert_close(prepare_low(t, EDGES), whole)


def test_pairs_are_run_over_once():
    _, t = logits()
    both = torch.cat((EDGES, EDGES.flip(0)), 1)
    targets = prepare_high(t, both)
    assert sorted(targets.pairs.T.tolist()) == [[0, 1], [0, 2], [0, 5], [1, 5], [2, 3]]
    assert (targets.pairs[0] < targets.pairs[1]).all()
    torch.testing.assert_close(targets.weight.sum(), torch.ones((), dtype=F64))
    assert targets.weight.max() == 6 / 16  # (2, 3) once and (3, 2) twice, each both ways


def test_loops_differ_in_nothing():
    s, t = logits()
    loops = add_loops(EDGES, 6)
    assert torch.equal(remove_loops(loops), EDGES) and loops.shape == (2, 14)
    assert torch.equal(add_loops(loops, 6), loops)  # never two loops
    with pytest.warns(UserWarning, match=r"loops \(i, i\) differ in nothing"):
        got = high_frequency_kd(s, t, loops)
    torch.testing.assert_close(got, high_frequency_kd(s, t, EDGES))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_narrow_logits_and_extreme_ones(dtype):
    s, t = logits()
    narrow = [x.detach().to(dtype) for x in (s, t)]
    wide = [x.double() for x in narrow]
    for term, edges in ((low_frequency_kd, add_loops(EDGES, 6)), (high_frequency_kd, EDGES)):
        got = term(*narrow, edges)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), term(*wide, edges), rtol=1e-5, atol=1e-6)
        assert term(1e4 * wide[0], 1e4 * wide[1], edges).isfinite()
        assert term(wide[0], 1e4 * wide[1], edges) >= 0


# ---------------------------------------------------------------- the total
def test_total_its_forms_and_labels():
    s, t = logits()
    labels, labelled = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([1, 4, 4])
    low, high = low_frequency_kd(s, t, add_loops(EDGES, 6)), high_frequency_kd(s, t, EDGES, tau=1.2)
    nll = F.cross_entropy(s[labelled], labels[labelled])
    zero = torch.zeros((), dtype=F64)
    node = F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean")
    for form, (a, b) in {"full": (low, high), "low": (low, zero), "high": (zero, high), "node": (node, zero)}.items():
        loss, parts = ff_g2m_loss(s, prepare_edges(t, EDGES, form=form), labels, labelled, tau=1.2, lam=0.3)
        torch.testing.assert_close(loss, 0.3 * nll + 0.7 * (a + b))
        want = {"label_nll": nll, "low_frequency": a, "high_frequency": b}
        torch.testing.assert_close(parts, {name: part.detach() for name, part in want.items()})
    masked = torch.tensor([-100, 1, -100, -100, 0, -100])
    targets = prepare_edges(t, EDGES)
    torch.testing.assert_close(
        ff_g2m_loss(s, targets, masked).loss, ff_g2m_loss(s, targets, labels, torch.tensor([1, 4])).loss
    )
    torch.testing.assert_close(ff_g2m_loss(s, targets, labels, labelled, lam=1.0).loss, nll)
    only = torch.arange(6).expand(2, -1)  # loops alone
    skipped = prepare_edges(t, only, no_edges="skip")
    assert skipped.high is None
    torch.testing.assert_close(ff_g2m_loss(s, skipped, labels, labelled, lam=0.0).loss, node)


def test_bad_input():
    s, t = logits()
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    targets = prepare_edges(t, EDGES)
    none = EDGES[:, :0]
    for call, message in (
        (lambda: high_frequency_kd(s, t, EDGES, tau=0.0), "tau: expected a finite number"),
        (lambda: low_frequency_kd(s, t, EDGES, tau_low=-1.0), "tau_low: expected a finite number"),
        (lambda: ff_g2m_loss(s, targets, labels, lam=1.1), "lam: expected a finite number"),
        (lambda: low_frequency_kd(s, t, EDGES + 1), r"edge_index: expected node numbers in \[0, 6\), got 1 to 6"),
        (lambda: high_frequency_kd(s, t, EDGES - 1), r"edge_index: expected node numbers in \[0, 6\), got -1 to 4"),
        (lambda: prepare_edges(t, EDGES[0]), r"edge_index: expected \[2, M\]"),
        (lambda: prepare_edges(t, none), "at least one edge between two nodes for the high-frequency term"),
        (lambda: prepare_low(t, none), "at least one edge for the low-frequency term"),
        (lambda: ff_g2m_loss(s, targets, labels, labels[:0]), "labelled: expected at least one labelled node"),
        (lambda: ff_g2m_loss(s, targets, labels * 0 - 100), "labelled: expected at least one labelled node"),
        (lambda: high_frequency_term(s[:2], prepare_high(t, EDGES)), r"student: expected the teacher's logits' shape \(6, 4\)"),
        (lambda: high_frequency_term(s[:, :3], prepare_high(t, EDGES)), r"student: expected .* shape \(6, 4\), got \(6, 3\)"),
        (lambda: low_frequency_kd(s, t[:, :3], EDGES), r"teacher: expected the student's shape \(6, 4\), got \(6, 3\)"),
        (lambda: ff_g2m_loss(s[:, :3], targets, labels % 3), "teacher: expected the student's shape"),
        (lambda: high_frequency_kd(s[:, :1], t[:, :1], EDGES), "student: expected logits .* of at least two classes"),
        (lambda: low_frequency_kd(s * math.nan, t, EDGES), "student: expected finite logits"),
        (lambda: high_frequency_kd(s * math.nan, t, EDGES), "expected finite logits"),
        (lambda: low_frequency_kd(s, t * math.nan, EDGES), "teacher: expected finite logits"),
        (lambda: high_frequency_kd(s, t - math.inf, EDGES), "teacher: expected finite logits, whose differences"),
        (lambda: edge_weights(EDGES, 6, "graph"), "normalise: expected one of edge, node"),
        (lambda: prepare_edges(t, EDGES, form="mid"), "form: expected one of full, low, high, node"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="edge_index: expected an int64 or int32 Tensor"):
        prepare_edges(t, EDGES.double())


# ---------------------------------------------------------------- by name
def run_of(tmp_path=None, labels=None, **options):
    pytest.importorskip("accelerate")
    from torch.utils.data import DataLoader

    from kdfast.data.digit_nodes import WholeGraph
    from kdfast.nn.graph import GCN, NodeMLP
    from kdfast.train import Distiller

    torch.manual_seed(0)
    student, teacher = NodeMLP(5, 3, hidden=8), GCN(5, 3, hidden=8)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(6, 5, generator=generator)
    labels = torch.tensor([0, 1, 2, 2, 1, 0]) if labels is None else labels
    graph = WholeGraph(features, EDGES, labels, torch.tensor([True, True, True, False, False, False]))
    loader = DataLoader(graph, 1, collate_fn=lambda batch: batch)
    run = Distiller(student, teacher, "ff_g2m", options=options, out=tmp_path, progress=False)
    return run, loader, features


def test_the_teacher_is_asked_once_and_the_student_learns(tmp_path):
    run, loader, features = run_of(tmp_path)
    calls = []
    run.teacher.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=r"in your own loop call method.prepare_targets\(logits, edges\)"):
        run.loss(next(iter(loader)))
    run.fit(loader, 4)
    assert calls == [1]
    t = run.teacher(features, EDGES).detach()
    run.student.eval()
    got = run.loss(next(iter(loader)))
    want = ff_g2m_loss(run.student(features), prepare_edges(t, EDGES), torch.tensor([0, 1, 2, -100, -100, -100]))
    torch.testing.assert_close(got.loss, want.loss)
    with torch.no_grad():  # inference needs no edges
        torch.testing.assert_close(run.student(features, EDGES), run.student(features))


def test_without_labels_it_refuses_to_start():
    run, loader, _ = run_of(labels=torch.full((6,), -100))
    with pytest.raises(ValueError, match="labels: expected at least one labelled node"):
        run.fit(loader, 1)


def test_options_are_checked_at_once():
    for change in ({"tau": 0.0}, {"tau_low": 0.0}, {"lam": -0.1}, {"form": "x"}, {"normalise": "x"}, {"no_edges": "x"}):
        with pytest.raises(ValueError, match=next(iter(change))):
            methods.load("ff_g2m")(**change)
    assert EdgeTargets(None, None).low is None


# ---------------------------------------------------------------- the experiment
def test_the_experiment_runs_and_says_what_the_numbers_say(tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip("sklearn")
    from benchmarks.experiments import ff_g2m as experiment
    from kdfast.data import load_task

    tasks = [dataclasses.replace(load_task(name), teacher_steps=10) for name in experiment.DATA]
    out = tmp_path / "ff_g2m.json"
    results = experiment.run(out, seeds=1, steps=10, tasks=tasks, work=tmp_path / "work")
    assert list(results["data"]) == list(experiment.DATA) and len(results["sentences"]) == 16
    for found in results["data"].values():
        assert list(found["arms"]) == ["teacher", *(arm.name for arm in experiment.ARMS)]
        assert found["arms"]["teacher"]["test"][0] > 0.5
        for arm in experiment.ARMS:
            assert 0 < found["arms"][arm.name]["measures"]["cosine along edges"][0] < 1
    assert experiment.run(out, seeds=1, tasks=tasks, work=tmp_path / "elsewhere") == json.loads(out.read_text())
