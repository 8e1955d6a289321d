"""General knowledge transfer: who teaches by each rule, the loss row by row, top-k, several teachers, MCL, state, transfer, by name."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdfast import methods
from kdfast.methods.general_knowledge_transfer import (
    STRATEGIES,
    Teachers,
    complementary_knowledge,
    contrastive_transfer_loss,
    data_partition_loss,
    flip_masks,
    knowledge_gain_loss,
    select_teacher,
    teacher_mask,
)

F64 = torch.float64


def example(rows=40, classes=5, teachers=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, classes) if teachers is None else (teachers, rows, classes)
    s, z = (2 * torch.randn(rows, classes, generator=generator, dtype=F64) for _ in range(2))
    t = 2 * torch.randn(shape, generator=generator, dtype=F64)
    return s.requires_grad_(), t, z, torch.randint(classes, (rows,), generator=generator)


def by_hand(s, t, z, y, strategy, temperature):
    """Row by row, as the published loop does it."""
    targets, mask = [], []
    for i in range(len(s)):
        p_t, p_0 = t[i].softmax(0), z[i].softmax(0)
        positive = t[i].argmax() == y[i] and s[i].argmax() != y[i]
        negative = t[i].argmax() != y[i] and s[i].argmax() == y[i]
        m = {
            "most_confident": p_t[y[i]] > p_0[y[i]], "most_confident_unsupervised": p_t.max() > p_0.max(),
            "flip_student": positive, "flip_teacher": not negative, "flip_average": positive, "self": False, "none": True,
        }[strategy]  # fmt: skip
        mask.append(bool(m))
        target = t[i] if m else z[i]
        if strategy == "flip_average" and not positive and not negative:
            target = (t[i] + s[i].detach()) / 2
        targets.append(target)
    p = (torch.stack(targets) / temperature).softmax(1)
    kl = temperature**2 * (p * (p.log() - (s / temperature).log_softmax(1))).sum(1).mean()
    return kl, torch.tensor(mask)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_rule_against_a_loop(strategy):
    s, t, z, y = example()
    want, mask = by_hand(s, t, z, y, strategy, 2.0)
    loss, parts = data_partition_loss(s, t, z, y, strategy=strategy, temperature=2.0)
    assert torch.equal(teacher_mask(s, t, z, y, strategy=strategy), mask)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, s), torch.autograd.grad(want, s))
    assert parts["teacher_share"].item() == pytest.approx(mask.double().mean().item())
    if strategy not in ("self", "none"):
        assert 0 < mask.sum() < len(mask)


def test_no_rule_has_the_same_target_as_another():
    s, t, z, y = example()
    losses = [data_partition_loss(s, t, z, y, strategy=strategy).loss.item() for strategy in STRATEGIES]
    assert all(abs(a - b) > 1e-6 for a, b in itertools.combinations(losses, 2))


def test_flips_and_ties():
    student = torch.tensor([[2.0, 1.0], [1.0, 2.0], [0.0, 0.0], [0.0, 1.0]])
    teacher = torch.tensor([[1.0, 2.0], [2.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    flips = flip_masks(student, teacher, torch.tensor([1, 1, 0, 0]))
    assert [rows.tolist() for rows in flips] == [
        [True, False, False, False], [False, True, False, False], [False, False, True, True],
    ]  # fmt: skip
    same = torch.tensor([[1.0, 3.0]])
    for strategy in ("most_confident", "most_confident_unsupervised"):
        assert not teacher_mask(same, same, same, torch.tensor([1]), strategy=strategy)  # a tie keeps the student
    assert select_teacher(torch.stack((same, same + 1)), same - 1).tolist() == [-1]
    extreme = torch.tensor([[1000.0, -1000.0]])
    loss = data_partition_loss(extreme, -extreme, extreme, torch.tensor([1])).loss
    assert loss.isfinite() and loss == pytest.approx(2000.0)


def test_lambda_mixes_in_the_labels_and_the_released_double_softmax():
    s, t, z, y = example()
    kl = data_partition_loss(s, t, z, y, strategy="none").loss
    plain = data_partition_loss(s, t, z, y, strategy="none", ce_weight=0.32)
    torch.testing.assert_close(plain.loss, 0.68 * kl + 0.32 * F.cross_entropy(s, y))
    torch.testing.assert_close([plain.parts["kd"], plain.parts["ce"]], [kl.detach(), F.cross_entropy(s, y).detach()])
    legacy = data_partition_loss(s, t, z, y, strategy="none", ce_weight=0.5, double_softmax=True).loss
    torch.testing.assert_close(legacy, 0.5 * kl + 0.5 * F.cross_entropy(s.softmax(1), y))


def test_top_k_restricts_the_divergence_but_not_the_selection():
    s, t, z, y = example()
    for strategy in ("most_confident", "flip_average"):
        index = t.topk(2, 1).indices
        full = teacher_mask(s, t, z, y, strategy=strategy)
        target = torch.where(full.unsqueeze(1), t, z)
        if strategy == "flip_average":
            target = torch.where(flip_masks(s, t, y).neutral.unsqueeze(1), (t + s.detach()) / 2, target)
        p = target.gather(1, index).softmax(1)
        want = (p * (p.log() - s.gather(1, index).log_softmax(1))).sum(1).mean()
        loss, parts = data_partition_loss(s, t, z, y, strategy=strategy, top_k=2)
        torch.testing.assert_close(loss, want)
        assert parts["teacher_share"].item() == pytest.approx(full.double().mean().item())
        torch.testing.assert_close(
            data_partition_loss(s, t, z, y, strategy=strategy, top_k=5).loss,
            data_partition_loss(s, t, z, y, strategy=strategy).loss,
        )


def test_rows_are_kept_by_flip_and_an_empty_selection_is_zero():
    s, t, z, y = example()
    flips = flip_masks(s, t, y)
    keep = flips.positive | flips.neutral
    got = data_partition_loss(s, t, z, y, strategy="none", keep_flips=("positive", "neutral")).loss
    torch.testing.assert_close(got, F.kl_div(s[keep].log_softmax(1), t[keep].softmax(1), reduction="batchmean"))
    right = flips.neutral | flips.negative
    rows = right.nonzero().flatten()
    nothing = data_partition_loss(s[rows], t[rows], z[rows], y[rows], strategy="none", keep_flips=("positive",)).loss
    assert nothing == 0 and not torch.autograd.grad(nothing, s)[0].any()
    assert data_partition_loss(s, t, z, y, strategy="none", keep_flips=()).loss == 0


@pytest.mark.parametrize("supervised", [True, False])
def test_several_teachers_against_a_loop(supervised):
    s, t, z, y = example(teachers=3)
    strategy = "most_confident" if supervised else "most_confident_unsupervised"
    labels = y if supervised else None
    targets, chosen = [], []
    for i in range(len(s)):
        rows = [z[i], *t[:, i]]
        confidence = [row.softmax(0)[y[i]] if supervised else row.softmax(0).max() for row in rows]
        best = max(range(4), key=lambda j: (confidence[j].item(), -j))
        targets.append(rows[best])
        chosen.append(best - 1)
    assert select_teacher(t, z, labels).tolist() == chosen and set(chosen) == {-1, 0, 1, 2}
    want = F.kl_div(s.log_softmax(1), torch.stack(targets).softmax(1), reduction="batchmean")
    for several in (t, list(t)):
        loss, parts = data_partition_loss(s, several, z, labels, strategy=strategy)
        torch.testing.assert_close(loss, want)
    assert parts["teacher_share"].item() == pytest.approx(sum(c >= 0 for c in chosen) / 40)
    one = data_partition_loss(s, t[:1], z, labels, strategy=strategy).loss
    torch.testing.assert_close(one, data_partition_loss(s, t[0], z, labels, strategy=strategy).loss)


def test_contrastive_baseline():
    generator = torch.Generator().manual_seed(0)
    s = torch.randn(6, 4, generator=generator, dtype=F64, requires_grad=True)
    t = torch.randn(6, 9, generator=generator, dtype=F64)
    log_s, log_t = (F.cosine_similarity(x.unsqueeze(1), x.unsqueeze(0), dim=-1).log_softmax(1) for x in (s, t))
    want = (log_t.exp() * (log_t - log_s)).sum()
    loss = contrastive_transfer_loss(s, t)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, s), torch.autograd.grad(want, s))


def test_metrics():
    y = torch.tensor([0, 1, 2, 3])
    before, after = torch.tensor([0, 0, 0, 3]), torch.tensor([1, 1, 2, 3])
    assert knowledge_gain_loss(before, after, y) == (0.5, 0.25)
    assert complementary_knowledge(before, torch.tensor([0, 1, 0, 0]), y) == 0.25


def given(**change):
    s, t, z, y = example(rows=4, classes=3)
    return {"student": s, "teacher": t, "frozen": z, "labels": y} | change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": torch.zeros(4, 2)}, r"teacher: expected the shape of student \(4, 3\)"),
        ({"frozen": torch.zeros(3, 3)}, "frozen: expected the shape of student"),
        ({"teacher": []}, "teacher: expected at least one teacher"),
        ({"teacher": torch.zeros(0, 4, 3)}, "teacher: expected at least one teacher"),
        ({"labels": None}, "labels: needed with strategy='most_confident'"),
        ({"labels": None, "strategy": "flip_teacher"}, "labels: needed"),
        ({"labels": None, "strategy": "none", "ce_weight": 0.5}, "labels: needed"),
        ({"labels": None, "strategy": "none", "keep_flips": ("positive",)}, "labels: needed"),
        ({"labels": torch.tensor([0, 1, 2, 3])}, r"labels: expected integers in \[0, 3\), got 0 to 3"),
        ({"labels": torch.tensor([0, 1, 2, -100])}, "labels: expected integers"),
        ({"student": torch.zeros(0, 3), "teacher": torch.zeros(0, 3), "frozen": torch.zeros(0, 3)}, "at least one row"),
        ({"temperature": 0.0}, "temperature: expected a finite number in"),
        ({"top_k": 0}, "top_k: expected 1 to 3, got 0"),
        ({"top_k": 4}, "top_k: expected 1 to 3, got 4"),
        ({"ce_weight": 1.5}, "ce_weight: expected a finite number in"),
        ({"strategy": "best"}, "strategy: expected one of most_confident"),
        ({"keep_flips": ("right",)}, "keep_flips: expected one of positive"),
        ({"teacher": torch.zeros(2, 4, 3), "strategy": "flip_student"}, "several teachers are for the most_confident rules"),
        ({"teacher": torch.zeros(2, 4, 3), "top_k": 2}, "several teachers are for the most_confident rules"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input(change, message):
    arguments = given(**change)
    tensors = [arguments.pop(name) for name in ("student", "teacher", "frozen", "labels")]
    with pytest.raises(ValueError, match=message):
        data_partition_loss(*tensors, **arguments)


# ---------------------------------------------------------------- by name
def networks():
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3)) for width in (5, 7)]


def loader(rows=16):
    from torch.utils.data import DataLoader, TensorDataset

    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(rows, 6, generator=generator), torch.arange(rows) % 3), 4, shuffle=True)


def run(student, teacher, out=None, epochs=1, resume=False, **options):
    pytest.importorskip("accelerate")
    from kdfast.train import Distiller

    job = Distiller(student, teacher, "general_knowledge_transfer", options=options, out=out, progress=False)
    job.fit(loader(), epochs, resume=resume)
    return job


def test_the_frozen_copy_is_the_student_before_the_first_step_and_is_resumed(tmp_path):
    student, teacher = networks()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    job = run(student, teacher, tmp_path)
    frozen = job.method.frozen
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    assert not torch.equal(student[0].weight, before["0.weight"])  # it did learn
    assert not any(p.requires_grad for p in frozen.parameters()) and not frozen.training
    assert frozen[0].weight.data_ptr() != student[0].weight.data_ptr()
    again = run(networks()[0], teacher, tmp_path, epochs=2, resume=True)
    assert all(torch.equal(value, before[name]) for name, value in again.method.frozen.state_dict().items())
    assert again.step == 8 and again.deploy() is again.student


def test_a_student_loaded_after_construction_is_the_one_that_is_frozen():
    pytest.importorskip("accelerate")
    from kdfast.train import Distiller

    student, teacher = networks()
    job = Distiller(student, teacher, "general_knowledge_transfer", progress=False)
    with torch.no_grad():
        student[0].weight.fill_(0.5)
    job.fit(loader(), 1)
    assert (job.method.frozen[0].weight == 0.5).all()


def test_interpolated_weights_are_the_result():
    student, teacher = networks()
    job = run(student, teacher, strategy="none", ce_weight=0.32, mcl=True, tau=0.75, every=2)
    model = job.deploy()
    assert torch.equal(model[0].weight, job.method.slow[0].weight) and model[0].weight.requires_grad
    torch.manual_seed(0)
    fast, teacher = networks()
    pytest.importorskip("accelerate")
    from kdfast.train import Distiller

    slow, weights = [fast[0].weight.detach().clone()], []
    plain = Distiller(
        fast, teacher, "general_knowledge_transfer", options={"strategy": "none", "ce_weight": 0.32}, progress=False
    )
    plain.method.after_step = lambda student, teacher, step: weights.append(student[0].weight.detach().clone())
    plain.fit(loader(), 1)
    for step in (2, 4):
        slow.append(0.75 * slow[-1] + 0.25 * weights[step - 1])
    torch.testing.assert_close(job.method.slow[0].weight, slow[-1])
    assert torch.equal(job.student[0].weight, weights[-1])  # the fast weights go on


def test_by_name_is_the_loss_with_the_frozen_copy():
    student, teacher = networks()
    method = methods.load("general_knowledge_transfer")(temperature=2.0)
    assert method.starts_trained and method.adapt(student) is student
    x, y = torch.randn(8, 6), torch.arange(8) % 3
    with torch.no_grad():
        z = student(x)
        student[0].weight.add_(0.3)
    got = method(methods.Context(student(x), teacher(x).detach(), y, (x, y))).loss
    torch.testing.assert_close(got, data_partition_loss(student(x), teacher(x), z, y, temperature=2.0).loss)


@pytest.mark.parametrize("mode", ["parallel", "sequential", "soup"])
def test_transfer_from_several_teachers(mode):
    pytest.importorskip("accelerate")
    from kdfast.train import transfer

    student, first = networks()
    second = networks()[1].requires_grad_(False)
    with torch.no_grad():
        second[2].bias.add_(torch.tensor([0.0, 5.0, 0.0]))
    start = student[0].weight.detach().clone()
    seen = []

    def score(model):
        seen.append(model)
        return 1.0 if model is first else 0.0

    model = transfer(student, [first, second], loader(), 1, mode=mode, order="asc", score=score)
    assert not torch.equal(model[0].weight, start)
    assert (model is student) == (mode != "soup")
    if mode == "sequential":
        assert seen == [first, second]
    if mode == "soup":
        assert torch.equal(student[0].weight, start)
        alone = [transfer(networks()[0], [teacher], loader(), 1) for teacher in (first, second)]
        torch.testing.assert_close(model[0].weight, (alone[0][0].weight + alone[1][0].weight) / 2)


def test_averaged_student_goes_on_to_the_next_teacher():
    pytest.importorskip("accelerate")
    from kdfast.train import transfer

    student, first = networks()
    second = networks()[1]
    with torch.no_grad():
        second[2].bias.add_(torch.tensor([0.0, 5.0, 0.0]))
    options = {"mcl": True, "tau": 0.5}
    model = transfer(student, [first, second], loader(), 1, mode="sequential", options=options)
    after_first = transfer(networks()[0], [first], loader(), 1, options=options)
    want = transfer(after_first, [second], loader(), 1, options=options)
    torch.testing.assert_close(model[0].weight, want[0].weight)


def test_transfer_refuses_what_it_cannot_do():
    pytest.importorskip("accelerate")
    from kdfast.train import transfer

    student, teacher = networks()
    for options, message in (
        ({"mode": "both"}, "mode: expected one of parallel"),
        ({"order": "random"}, "order: expected one of given"),
        ({"order": "desc"}, "score: expected a function"),
    ):
        with pytest.raises(ValueError, match=message):
            transfer(student, [teacher], loader(), 1, **options)
    with pytest.raises(ValueError, match="teachers: expected at least one"):
        transfer(student, [], loader(), 1)
    with pytest.raises(ValueError, match="models: expected at least one"):
        Teachers([])


def test_experiment_starts_from_the_trained_student_and_resumes(tmp_path):
    pytest.importorskip("sklearn")
    from safetensors.torch import load_file

    from benchmarks.experiments import general_knowledge_transfer as experiment

    out = tmp_path / "gkt.json"
    tasks = [experiment.pair("weaker")]
    results = experiment.run(out, seeds=1, steps=4, tasks=tasks, work=tmp_path / "work")
    (found,) = results["data"].values()
    assert list(found["arms"]) == ["teacher", "ce", *experiment.TRANSFERS] and len(results["sentences"]) == 7
    weights = {
        name: load_file(tmp_path / "work" / "weaker_teacher" / "runs" / f"{name}-0.safetensors")["hidden.0.weight"]
        for name in ("ce", "kl", "xe_kl_mcl")
    }
    assert 0 < (weights["kl"] - weights["ce"]).abs().max() < 0.05  # four steps from there
    assert (weights["xe_kl_mcl"] - weights["ce"]).abs().max() < (weights["kl"] - weights["ce"]).abs().max()
    assert experiment.run(out, seeds=1, tasks=tasks, work=tmp_path / "none") == json.loads(out.read_text())


def test_cosine_transform_is_orthonormal():
    pytest.importorskip("sklearn")
    from benchmarks.experiments.general_knowledge_transfer import Cosines

    table = Cosines().table
    torch.testing.assert_close(table @ table.T, torch.eye(8), atol=1e-6, rtol=0)
    assert Cosines()(torch.ones(1, 1, 8, 8))[0, 0, 0, 0] == pytest.approx(8.0)
