"""MST-Distill: the three losses written out, what reaches the gate, dense logits, routing on sub-batches, stages, schedules, experiment."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdfast import methods
from kdfast.methods.mst_distill import (
    GateNet,
    MSTNetworks,
    balance_loss,
    kl,
    mst_loss,
    mutual_stage_loss,
    route,
    routed_kd,
    weights_at,
)

F64 = torch.float64


def example(rows=7, classes=5, experts=4, shape=()):
    generator = torch.Generator().manual_seed(0)
    s = torch.randn(rows, classes, *shape, generator=generator, dtype=F64).requires_grad_()
    z = 2 * torch.randn(experts, rows, classes, *shape, generator=generator, dtype=F64)
    gate = torch.randn(rows, experts, generator=generator, dtype=F64).requires_grad_()
    return s, z, gate, torch.randint(classes, (rows, *shape), generator=generator)


def plain_kl(a, b, temperature=4.0):
    rows = F.kl_div((a / temperature).log_softmax(1), (b / temperature).softmax(1), reduction="none").sum(1)
    return temperature**2 * rows.flatten(1).mean(1) if rows.dim() > 1 else temperature**2 * rows


@pytest.mark.parametrize("shape", [(), (3, 2)])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("gate_gradient", ["none", "weighted"])
def test_stage_three_is_the_written_out_sum(shape, top_k, gate_gradient):
    s, z, gate, y = example(shape=shape)
    options = {"w_task": 0.5, "w_kl": 2.0, "w_balance": 3.0}
    loss, parts = mst_loss(s, z, gate, y, top_k=top_k, gate_gradient=gate_gradient, **options)
    p = gate.softmax(1)
    chosen = p.argsort(1, descending=True)[:, :top_k]
    assert torch.equal(route(gate, top_k), chosen)
    kd = 0.0
    for b in range(7):
        w = p[b, chosen[b]]
        w = w / w.sum() if gate_gradient == "weighted" else torch.full((top_k,), 1 / top_k, dtype=F64)
        for j in range(top_k):
            kd = kd + w[j] * plain_kl(s[b : b + 1], z[chosen[b, j], b : b + 1])[0] / 7
    mean = p.mean(0)
    balance = ((1 / 4) * ((1 / 4) / mean).log()).sum() / 4
    want = 0.5 * F.cross_entropy(s, y) + 2 * kd + 3 * balance
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, (s, gate)), torch.autograd.grad(want, (s, gate)))
    assert sum(parts[f"num_teacher_{e}"] for e in range(4)) == 7 * top_k
    torch.testing.assert_close([parts["kd"], parts["balance"]], [kd.detach(), balance.detach()])


def test_the_published_gate_gets_nothing_from_the_distillation():
    s, z, gate, y = example()
    loss = mst_loss(s, z, gate, y, w_balance=0.0, w_task=0.0).loss
    (grad,) = torch.autograd.grad(loss, gate, allow_unused=True)
    assert grad is None or not grad.any()


def test_chosen_teachers_alone_give_the_same():
    s, z, gate, y = example()
    index = route(gate, 2)
    chosen = torch.stack([torch.stack([z[index[b, j], b] for b in range(7)]) for j in range(2)])
    for gradient in ("none", "weighted"):
        whole = mst_loss(s, z, gate, y, top_k=2, gate_gradient=gradient)
        some = mst_loss(s, chosen, gate, y, top_k=2, index=index, gate_gradient=gradient)
        torch.testing.assert_close(some.loss, whole.loss)
    torch.testing.assert_close(routed_kd(s, chosen), mst_loss(s, z, gate, y, top_k=2).parts["kd"], check_dtype=True)


def test_balance_terms():
    _, _, gate, _ = example()
    p = gate.softmax(1)
    use = p.sum(0)
    torch.testing.assert_close(balance_loss(p, "cv"), use.std() / use.mean())
    torch.testing.assert_close(balance_loss(p, "kl", batchmean_quirk=False), 4 * balance_loss(p, "kl"))
    assert balance_loss(p, None) == 0
    certain = torch.tensor([[1.0, 0.0]])
    with pytest.warns(UserWarning, match="probability 0 everywhere"):
        assert balance_loss(certain, "kl").isfinite()  # a probability of 0 is clamped


def test_ties_go_to_the_lower_id():
    assert route(torch.zeros(2, 4), 3).tolist() == [[0, 1, 2]] * 2


def test_ignored_pixels_leave_the_labels_but_not_the_distillation():
    s, z, gate, y = example(shape=(3, 2))
    y[:, 0] = -100
    got = mst_loss(s, z, gate, y)
    torch.testing.assert_close(got.parts["task"], F.cross_entropy(s, y).detach())
    assert got.parts["kd"] == mst_loss(s, z, gate, y.clamp_min(0)).parts["kd"]


def test_stage_one_sends_every_term_both_ways():
    s, z, _, y = example(experts=2)
    nets = [s, *(t.clone().requires_grad_() for t in z)]
    loss, _ = mutual_stage_loss(nets, y)
    want = sum(F.cross_entropy(n, y) for n in nets)
    want = want + sum(plain_kl(a, b).mean() for a in nets for b in nets if a is not b)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, nets), torch.autograd.grad(want, nets))


def test_schedule_of_the_weights():
    halves = [round(weights_at(e)[0], 6) for e in (0, 1, 30, 31, 60, 61, 90, 91)]
    assert halves == [1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.0625]
    w_kl, w_lb, seen = 1.0, 1.0, []
    for epoch in range(100):
        seen.append((w_kl, w_lb))
        w_lb *= 0.9 if epoch % 10 == 0 else 1.0
        w_kl *= 0.5 if epoch % 30 == 0 else 1.0
    for epoch, pair in enumerate(seen):
        assert weights_at(epoch) == pytest.approx(pair)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 0}, "top_k: expected 1 to 4 teachers, got 0"),
        ({"top_k": 5}, "top_k: expected 1 to 4 teachers, got 5"),
        ({"temperature": 0.0}, "temperature: expected a finite number in"),
        ({"teachers": []}, "teachers: expected at least one"),
        ({"teachers": torch.zeros(4, 7, 6)}, r"teachers: expected \(4, 7, 5\), got \(4, 7, 6\)"),
        ({"gate": torch.zeros(6, 4)}, r"gate_logits: expected \[B, E\] with B = 7"),
        ({"gate": torch.full((7, 4), float("nan"))}, "NaN"),
        ({"y": torch.full((7,), 5)}, r"labels: expected integers in \[0, 5\)"),
        ({"balance": "max"}, "balance: expected one of kl, cv"),
        ({"gate_gradient": "all"}, "gate_gradient: expected one of none, weighted"),
    ],
    ids=str,
)
def test_bad_input(change, message):
    s, z, gate, y = example()
    given = {"teachers": z, "gate": gate, "y": y} | change
    with pytest.raises(ValueError, match=message):
        mst_loss(s, given.pop("teachers"), given.pop("gate"), given.pop("y"), **given)


def test_dense_gate():
    torch.manual_seed(0)
    gate, s = GateNet(3, 4, dense=True), torch.randn(2, 3, 5, 4)
    maps = torch.relu(gate.conv_depthwise(torch.relu(gate.conv_point(s))))
    assert maps.shape == (2, 6, 3, 2)
    torch.testing.assert_close(gate(s), gate.fc(maps.mean((2, 3))))


# ---------------------------------------------------------------- networks and stages
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def networks(**options):
    torch.manual_seed(0)
    return MSTNetworks(Net(), Net(), Net(), 3, [("first", 12), ("second", 12)], **options).train()


def test_each_variant_has_one_mask_or_as_released_all_before_it():
    net, x = networks(), torch.randn(5, 6)
    teacher, masks = net.teachers[1], net.masks
    h = torch.relu(teacher.first(x))
    want = teacher.head(torch.relu(masks[3].apply_to(teacher.second(h))))
    torch.testing.assert_close(net.variant(3, x), want)
    both = copy.deepcopy(net)
    both.cumulative = True
    h = torch.relu(masks[2].apply_to(teacher.first(x)))
    torch.testing.assert_close(both.variant(3, x), teacher.head(torch.relu(masks[3].apply_to(teacher.second(h)))))
    torch.testing.assert_close(both.variant(2, x), net.variant(2, x))  # the other teacher's masks are not on this one


def moved(module):
    return {name.split(".")[0] for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}


def test_who_learns_in_which_stage_and_only_routed_samples_run():
    x, y = torch.randn(8, 6), torch.arange(8) % 3
    method = methods.load("mst_distill")(stage1_steps=1, stage2_steps=1, epochs=2)
    for step, learners in ((0, {"student", "teachers"}), (1, {"masks"}), (2, {"student", "gate"})):
        net = networks()
        method._set(net, step)
        out = net(x)
        loss, _parts = method(methods.Context(out, labels=y, step=step, total_steps=4))
        loss.backward()
        assert moved(net) == learners, step
        assert out.stage == step + 1 and loss.isfinite()
    variants = torch.stack([net.variant(e, x) for e in range(4)]).detach()
    torch.testing.assert_close(out.teachers[0], variants[out.ids[:, 0], torch.arange(8)])
    want = mst_loss(out.students, variants, out.gate, y)
    torch.testing.assert_close(loss, want.loss)
    seen = []
    handles = [teacher.register_forward_pre_hook(lambda m, a: seen.append(len(a[0]))) for teacher in net.teachers]
    net(x)
    assert sum(seen) == 8  # each sample runs through one variant
    for handle in handles:
        handle.remove()
    assert torch.equal(net.eval()(x), net.student(x))


def test_masks_learn_to_imitate_the_student():
    net, x = networks(), torch.randn(8, 6)
    method = methods.load("mst_distill")(stage1_steps=0, stage2_steps=5)
    method._set(net, 0)
    got = method(methods.Context(net(x), labels=torch.zeros(8, dtype=torch.long))).loss
    want = sum(kl(net.variant(e, x), net.student(x).detach()) for e in range(4))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("source", ["average", "multimodal", "cross", "none"])
def test_baselines(source):
    net, x, y = networks(source=source), torch.randn(8, 6), torch.arange(8) % 3
    method = methods.load("mst_distill")(stage1_steps=0, stage2_steps=0, epochs=1)
    method._set(net, 0)
    got = method(methods.Context(net(x), labels=y, total_steps=10)).loss
    with torch.no_grad():
        target = {
            "average": torch.stack([net.variant(e, x) for e in range(4)]).mean(0), "multimodal": net.teachers[0](x),
            "cross": net.teachers[1](x), "none": None,
        }[source]  # fmt: skip
    want = F.cross_entropy(net.student(x), y) + (0 if target is None else plain_kl(net.student(x), target).mean())
    torch.testing.assert_close(got, want)


def test_a_resume_knows_its_stage(tmp_path):
    pytest.importorskip("accelerate")
    from torch.utils.data import DataLoader

    from kdfast.data import NamedRows
    from kdfast.data.task import as_read
    from kdfast.train import Distiller

    data = NamedRows(images=torch.randn(16, 6, generator=torch.Generator().manual_seed(0)), labels=torch.arange(16) % 3)

    def run(out, epochs, resume):
        method = methods.load("mst_distill")(stage1_steps=3, stage2_steps=4, epochs=3)
        job = Distiller(networks(), None, method, out=out, progress=False, log_every=1)
        job.fit(DataLoader(data, 4, shuffle=True, collate_fn=as_read), epochs, resume=resume)
        return job

    whole = run(tmp_path / "whole", 3, False)
    names = [next(name for name in ("mutual", "masks", "kd") if name in row) for row in whole.history.rows]
    assert names == ["mutual"] * 3 + ["masks"] * 4 + ["kd"] * 5
    run(tmp_path / "parts", 1, False)  # ends inside stage 2
    again = run(tmp_path / "parts", 3, True)
    assert again.student.stage == 3 and again.deploy() is again.student.student
    # the schedule of stage 3 counts its own steps, so the whole run is known to both
    for name, value in whole.student.state_dict().items():
        torch.testing.assert_close(value, again.student.state_dict()[name])


def test_experiment_runs_and_resumes(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("accelerate")
    import dataclasses

    from benchmarks.experiments import mst_distill
    from kdfast.data import load_task

    task = load_task("two_view_digits")
    task = dataclasses.replace(task, sizes={**task.sizes, "stage1_steps": 2, "stage2_steps": 1})
    out = tmp_path / "mst.json"
    results = mst_distill.run(out, seeds=1, steps=5, task=task, work=tmp_path / "work")
    assert list(results["arms"]) == ["alone", "multimodal", "cross", "average", "weighted", "mst"]
    assert len(results["sentences"]) == len(mst_distill.CLAIMS) + 5
    shares = [results["arms"]["mst"]["measures"][f"share of variant {e}"][0] for e in range(4)]
    assert sum(shares) == pytest.approx(1)
    assert mst_distill.run(out, seeds=1, work=tmp_path / "none") == json.loads(out.read_text())
