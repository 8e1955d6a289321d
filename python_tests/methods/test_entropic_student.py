"""entropic_student: losses written out, what each stage trains, bits that stay, bytes through the student. Vectors: test_vectors.py."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kdfast import methods
from kdfast.methods.entropic_student import (
    EntropicOutput,
    EntropicStudent,
    fine_tuning_loss,
    learning_rate_factor,
    light_encoder,
    rate_distortion_loss,
    rate_loss,
    wide_decoder,
)
from kdfast.nn import EntropyBottleneck

F64 = torch.float64


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def maps(seed):
    return [random(2, c, s, s, seed=seed + c).requires_grad_() for c, s in ((3, 4), (4, 2), (5, 1))]


# ---------------------------------------------------------------- the losses
@pytest.mark.parametrize("reduction", ["sum", "batchmean", "mean"])
def test_first_stage_written_out(reduction):
    s, t, p = maps(0), maps(10), torch.rand(2, 3, 4, 5, dtype=F64).add(0.01).requires_grad_()
    loss, parts = rate_distortion_loss(s, t, p, beta=0.3, reduction=reduction)
    bits = -p.log2().sum() / {"sum": 1, "batchmean": 2, "mean": 2 * 4 * 5}[reduction]
    squares = [(a - b.detach()) ** 2 for a, b in zip(s, t)]
    each = {"sum": lambda x: x.sum(), "batchmean": lambda x: x.sum() / 2, "mean": lambda x: x.mean()}[reduction]
    want = sum(map(each, squares)) + 0.3 * bits
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(
        torch.autograd.grad(loss, [*s, p], retain_graph=True), torch.autograd.grad(want, [*s, p])
    )
    assert torch.autograd.grad(loss, t, allow_unused=True) == (None,) * 3
    torch.testing.assert_close(parts["rate"], bits.detach())
    assert not parts["distortion"].requires_grad
    torch.testing.assert_close(rate_loss(p, reduction=reduction), bits)


def test_second_stage_written_out():
    s, t, y = random(4, 5).requires_grad_(), random(4, 5, seed=1).requires_grad_(), torch.tensor([0, 4, -100, 2])
    loss, parts = fine_tuning_loss(s, t, y, alpha=0.3, temperature=2.0)
    kl = F.kl_div(F.log_softmax(s / 2, -1), F.softmax(t / 2, -1), reduction="batchmean")  # the ignored row too
    torch.testing.assert_close(loss, 0.3 * F.cross_entropy(s, y) + 0.7 * 4 * kl)
    loss.backward()
    assert t.grad is None and parts.keys() == {"ce", "kd"}
    certain = torch.tensor([[0.0, -math.inf]] * 2)  # an infinite term of weight 0 is none
    assert fine_tuning_loss(certain, certain.flip(1), torch.zeros(2, dtype=torch.long), alpha=1.0).loss == 0


def test_rates():
    assert [learning_rate_factor(e, 20) for e in (0, 4, 5, 7, 8, 9, 10, 14, 15, 19, 20)] == [
        1, 1, 0.1, 0.1, 0.01, 0.01, 1, 1, 0.1, 0.1, 0.1
    ]  # fmt: skip
    assert [learning_rate_factor(s, 100, epochs=(10, 0)) for s in (0, 49, 50, 80, 99)] == [1, 1, 0.1, 0.01, 0.01]
    assert [learning_rate_factor(s, 100, epochs=(0, 10)) for s in (0, 49, 50, 99)] == [1, 1, 0.1, 0.1]


def test_bad_input():
    s, t, p = maps(0), maps(10), torch.rand(2, 3, 4, 5).add(0.01)
    for arguments, options, message in (
        ((s, t[:2], p), {}, "teacher_features: expected 3, one per depth of the student, got 2"),
        ((s, [t[0], t[2], t[2]], p), {}, r"expected \(2, 4, 2, 2\) as the student's at depth 2, got \(2, 5, 1, 1\)"),
        ((s, t, p * 0), {}, "likelihood: expected probabilities above 0"),
        ((s, t, p * math.nan), {}, "likelihood: expected probabilities above 0"),
        ((s, t, p[0, 0, 0]), {}, r"likelihood: expected \[B, C, ...\]"),
        ((s, t, p), {"beta": -1.0}, "beta: expected"),
        ((s, t, p), {"reduction": "none"}, "reduction: expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            rate_distortion_loss(*arguments, **options)
    z, y = random(2, 3), torch.tensor([0, 1])
    for options in ({"temperature": 0.0}, {"alpha": 1.5}, {"alpha": -0.1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            fine_tuning_loss(z, z, y, **options)
    for options in ({"beta": -1.0}, {"frozen_bn": "on"}, {"quantiles": "given"}, {"stage1_epochs": 0, "stage2_epochs": 0}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            methods.load("entropic_student")(WIDTHS, **options)


# ---------------------------------------------------------------- the student
class Net(nn.Sequential):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, 2, 1)
        self.stage1 = nn.Conv2d(4, 4, 3, 2, 1)
        self.stage2 = nn.Sequential(nn.Conv2d(4, 5, 3, 2, 1), nn.BatchNorm2d(5), nn.ReLU())
        self.stage3 = nn.Sequential(nn.Conv2d(5, 6, 3, 1, 1), nn.ReLU())
        self.stage4 = nn.Conv2d(6, 7, 3, 1, 1)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 3))


WIDTHS = {"stage1": (4, 4), "stage2": (5, 5), "stage3": (6, 6), "stage4": (7, 7)}
OPTIONS = {"in_channels": 1, "bottleneck_channels": 2, "quantiles": "solved"}


def distiller(out=None, student=None, **options):
    from kdfast.train import Distiller

    torch.manual_seed(0)
    teacher = Net()
    return Distiller(
        student or Net(), teacher, "entropic_student", options=OPTIONS | options, widths=WIDTHS, capture={n: n for n in WIDTHS},
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2), out=out, progress=False,
    )  # fmt: skip


def loader(rows=16):
    x = torch.randn(rows, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, torch.arange(rows) % 3), 8)


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before, after):
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


def student(**options):
    torch.manual_seed(0)
    return EntropicStudent.from_sequential(
        Net(), after="stage1", in_channels=1, bottleneck_channels=2, target_channels=4, **options
    )


def test_shapes_of_the_networks_of_the_paper():
    y = light_encoder(3, 24)(torch.zeros(1, 3, 64, 64))
    assert y.shape == (1, 24, 15, 15) and wide_decoder(24, 256)(y).shape == (1, 256, 16, 16)
    assert all(m.bias is None for m in [*light_encoder(3, 24), *wide_decoder(24, 8)] if isinstance(m, nn.Conv2d))


def test_in_training_the_first_stage_is_noisy_and_evaluation_is_what_the_bytes_give():
    net, x = student(), loader().dataset.tensors[0]
    out = net.train()(x)
    assert isinstance(out, EntropicOutput) and out.likelihood.shape == (16, 2, 3, 3) and out.aux > 0
    net.eval()
    before = net(x)
    net.begin_stage2(quantiles="solved")
    assert net.stage == 2
    strings, shape = net.compress(x)
    assert shape == (3, 3) and len(strings) == 16
    assert torch.equal(net.decompress(strings, shape), net(x))
    torch.testing.assert_close(net.bits(x), -net.entropy.likelihood(net.entropy.quantize(net.encoder(x))).log2().sum((1, 2, 3)))  # fmt: skip
    assert before.shape == (16, 3)
    assert net.train()(x).likelihood is None
    with pytest.raises(ValueError, match="update"):
        student().compress(x)
    with pytest.raises(ValueError, match=r"after: expected a child of an nn.Sequential, got 'layer1'; Net has stem"):
        EntropicStudent.from_sequential(Net())


def test_medians_in_the_second_stage_are_an_option():
    found = {}
    for use in (True, False):
        net = student(use_medians=use)
        with torch.no_grad():
            net.entropy.quantiles[:, 0, 1] = 0.4
        net.begin_stage2()
        x = loader().dataset.tensors[0]
        found[use] = net.eval()(x), net.train()(x).scores
    assert not torch.equal(found[True][1], found[False][1])
    assert torch.equal(found[True][0], found[False][0])  # inference rounds around the medians always


def test_frozen_batch_norm():
    x = loader().dataset.tensors[0]
    for mode, moves in (("eval", False), ("train", True)):
        net = student(frozen_bn=mode)
        before = state(net)
        net.train()(x)
        assert net.stage2[1].training is moves
        assert changed(before, state(net)) == ({"stage2"} if moves else set())
        net.begin_stage2()
        net.train()(x)
        assert net.stage2[1].training and not net.encoder.training  # the bits stay


def test_gradients_pass_through_the_frozen_stages():
    net = student().train()
    net(loader().dataset.tensors[0]).scores.sum().backward()
    reached = {name.split(".")[0] for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"encoder", "stage1"}
    net.zero_grad()
    net.begin_stage2()
    net(loader().dataset.tensors[0]).scores.sum().backward()
    reached = {name.split(".")[0] for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"stage1", "stage2", "stage3", "stage4", "head"}


# ---------------------------------------------------------------- by name
def test_by_name_each_stage_trains_its_own_and_the_bits_stay():
    pytest.importorskip("accelerate")
    run = distiller(stage1_epochs=2, stage2_epochs=1)
    x = loader().dataset.tensors[0]
    seen = {}
    original = run.method.after_step

    def after_step(net, teacher, step):
        original(net, teacher, step)
        seen[step] = net.stage, state(net)

    run.method.after_step = after_step
    net = run.student
    before = state(net)
    run.fit(loader(), 3)  # 2 steps each
    assert [stage for stage, _ in seen.values()] == [1, 1, 1, 2, 2, 2]
    assert changed(before, seen[1][1]) == {"encoder", "entropy", "stage1", "stage2", "stage3", "stage4", "head"}
    tail = {f"{n}.{k}": v for n in net.tail for k, v in run.teacher.get_submodule(n).state_dict().items()}
    for step in range(1, 5):  # the teacher's, through the whole first stage
        assert all(torch.equal(seen[step][1][name], value) for name, value in tail.items())
    assert changed(seen[1][1], seen[3][1]) == {"encoder", "entropy", "stage1"}
    later = {n: v for n, v in seen[4][1].items() if n in seen[6][1]}
    assert changed(later, seen[6][1]) == {"stage1", "stage2", "stage3", "stage4", "head"}
    other = student()
    other.load_state_dict(seen[4][1])
    assert other.stage == 2 and other.compress(x)[0] == run.deploy().compress(x)[0]


def test_by_name_the_losses_are_those_of_both_networks():
    pytest.importorskip("accelerate")
    run = distiller(beta=0.5, quantiles="learned")
    batch = loader().dataset.tensors
    run.step, run.total_steps = 0, 10
    torch.manual_seed(7)
    got = run.loss(batch)
    torch.manual_seed(7)
    net = run.student
    y_hat, p = net.entropy(net.encoder(batch[0]))
    pairs, t = [], run.teacher.stage1(run.teacher.stem(batch[0]))
    s = net.stage1(y_hat)
    pairs.append((s, t))
    for name in ("stage2", "stage3", "stage4"):
        s, t = net.get_submodule(name)(s), run.teacher.get_submodule(name)(t)
        pairs.append((s, t))
    want = sum((a - b).square().sum() for a, b in pairs) - 0.5 * p.log2().sum() + net.entropy.aux_loss()
    torch.testing.assert_close(got.loss, want)
    assert got.parts.keys() == {"distortion", "rate", "aux"}
    net.begin_stage2()
    second = run.loss(batch)
    assert second.parts.keys() == {"ce", "kd"}
    want = fine_tuning_loss(net(batch[0]).scores, run.teacher(batch[0]), batch[1])
    torch.testing.assert_close(second.loss, want.loss)


def test_by_name_the_stages_can_be_two_runs():
    pytest.importorskip("accelerate")
    first = distiller(stage2_epochs=0)
    first.fit(loader(), 1)
    assert first.student.stage == 2
    bits = state(first.student)
    second = distiller(student=first.student, stage1_epochs=0)
    assert second.student is first.student
    second.fit(loader(), 1)
    assert changed(bits, state(second.student)) == {"stage1", "stage2", "stage3", "stage4", "head"}
    with pytest.raises(ValueError, match="stage1_epochs: expected a student with its tables"):
        distiller(student=student(), stage1_epochs=0).fit(loader(), 1)
    with pytest.raises(ValueError, match="stage1_epochs: expected 0 for a student that has its tables"):
        distiller(student=first.student).fit(loader(), 1)


def test_by_name_a_run_resumes_in_its_stage(tmp_path):
    pytest.importorskip("accelerate")
    whole = distiller(stage1_epochs=1, stage2_epochs=2)
    whole.fit(loader(), 3)
    half = distiller(tmp_path, stage1_epochs=1, stage2_epochs=2)
    half.method.after_epoch = lambda setup: (_ for _ in ()).throw(KeyboardInterrupt) if setup.step == 4 else None
    with pytest.raises(KeyboardInterrupt):
        half.fit(loader(), 3)
    rest = distiller(tmp_path, stage1_epochs=1, stage2_epochs=2)
    rest.fit(loader(), 3, resume=True)
    want, got = state(whole.student), state(rest.student)
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)


# ---------------------------------------------------------------- the experiment
def test_experiment_runs_and_resumes(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("accelerate")
    from benchmarks.experiments import entropic_student as experiment

    out, options = tmp_path / "entropic.json", {"seeds": 1, "steps": 4, "betas": (0.1, 1.0), "input_betas": (0.1, 1.0)}
    results = experiment.run(out, work=tmp_path / "work", **options)
    assert results["n"] == 1 and results["sentences"] and results["summary"]
    assert experiment.run(out, work=tmp_path / "none", **options) == json.loads(out.read_text())


def test_an_entropy_bottleneck_of_an_own_student_is_taken():
    net = EntropicStudent(
        light_encoder(1, 2), EntropyBottleneck(2), wide_decoder(2, 4), {"head": nn.Sequential(nn.Flatten(), nn.LazyLinear(3))}
    )  # fmt: skip
    assert methods.load("entropic_student")(WIDTHS).adapt(net) is net
    assert net.eval()(torch.zeros(2, 1, 16, 16)).shape == (2, 3)
