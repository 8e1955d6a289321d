"""MIX-KD: the written-out loss, its gradient through the deviation, three forms of labels, constant rows, by name, experiment."""

import json
import warnings

import pytest
import torch
import torch.nn.functional as F

import kdfast
from kdfast import methods
from kdfast.data.mixing import soft_labels
from kdfast.methods.mix_kd import mix_kd_loss, row_deviation, std_scaled

F64 = torch.float64


def example(rows=5, classes=6):
    generator = torch.Generator().manual_seed(0)
    s, t = (3 * torch.randn(rows, classes, generator=generator, dtype=F64) for _ in range(2))
    a, b = (torch.randint(classes, (rows,), generator=generator) for _ in range(2))
    lam = torch.rand(rows, generator=generator, dtype=F64)
    return s.requires_grad_(), t, (a, b, lam)


def test_loss_and_gradient_are_the_written_out_ones():
    s, t, (a, b, lam) = example()
    soft = soft_labels(a, b, lam, 6)
    loss, parts = mix_kd_loss(s, t, soft, ce_weight=0.3, kd_weight=0.7)
    sd = s.std(1, keepdim=True)
    x, z = s / sd, t / t.std(1, keepdim=True)
    ce = -(soft * x.log_softmax(1)).sum(1).mean()
    kd = (z.softmax(1) * (z.log_softmax(1) - x.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close([loss, parts["ce"], parts["kd"]], [0.3 * ce + 0.7 * kd, ce.detach(), kd.detach()])
    (grad,) = torch.autograd.grad(loss, s)
    with torch.no_grad():
        g = (0.3 * (x.softmax(1) - soft) + 0.7 * (x.softmax(1) - z.softmax(1))) / 5
        inner = (g * s).sum(1, keepdim=True)
        want = (g - (s - s.mean(1, keepdim=True)) * inner / (5 * sd**2)) / sd
    torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("temperature", [None, 4.0])
def test_pairs_are_soft_labels_and_integers_are_hard_ones(temperature):
    s, t, (a, b, lam) = example()
    dense = mix_kd_loss(s, t, soft_labels(a, b, lam, 6), temperature=temperature).loss
    pairs = mix_kd_loss(s, t, (a, b, lam), temperature=temperature).loss
    torch.testing.assert_close(pairs, dense)
    torch.testing.assert_close(torch.autograd.grad(pairs, s), torch.autograd.grad(dense, s))
    hard = mix_kd_loss(s, t, a, temperature=temperature).loss
    torch.testing.assert_close(hard, mix_kd_loss(s, t, F.one_hot(a, 6).double(), temperature=temperature).loss)


def test_a_fixed_temperature_is_plain_kd_on_mixed_images():
    s, t, (a, b, lam) = example()
    got = mix_kd_loss(s, t, (a, b, lam), temperature=4.0, ce_weight=0.2, kd_weight=0.5)
    ce = F.cross_entropy(s, soft_labels(a, b, lam, 6))
    kd = 16 * F.kl_div((s / 4).log_softmax(1), (t / 4).softmax(1), reduction="batchmean")
    torch.testing.assert_close(got.loss, 0.2 * ce + 0.5 * kd)


def test_scale_and_offset_of_a_row_do_not_matter():
    s, t, labels = example()
    want = mix_kd_loss(s, t, labels).loss
    torch.testing.assert_close(mix_kd_loss(50 * s - 7, 0.01 * t + 3, labels).loss, want)
    far = mix_kd_loss(s.detach().float() + 1e4, t.float(), labels).loss
    assert abs(far.item() - want.item()) < 3e-3  # 1e4 costs float32 four of its seven digits


def test_a_constant_row_is_clamped_without_gradient_and_raises_under_debug():
    s, t, labels = example()
    with torch.no_grad():
        s[1] = 2.0
        t[2] = -1.0
    loss, _ = mix_kd_loss(s, t, labels)
    (grad,) = torch.autograd.grad(loss, s)
    assert loss.isfinite() and grad.isfinite().all() and not grad[1].any() and grad[2].any()
    torch.testing.assert_close(std_scaled(s.detach())[1], torch.zeros(6, dtype=F64))
    assert mix_kd_loss(s, t, labels, eps=0.0).loss.isnan()  # as the released code
    with kdfast.debug(), pytest.raises(ValueError, match="logits: row 1 is constant"):
        mix_kd_loss(s, t, labels)


def test_soft_labels_that_are_none_warn_under_debug():
    s, t, (a, b, lam) = example()
    soft = soft_labels(a, b, lam, 6)
    with kdfast.debug():
        mix_kd_loss(s, t, soft)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            mix_kd_loss(s, t, 2 * soft)
    assert [str(w.message) for w in seen] == ["labels: expected soft labels >= 0 that add up to 1 in each row"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"s": torch.zeros(5, 1), "t": torch.zeros(5, 1)}, "C >= 2"),
        ({"t": torch.zeros(5, 7)}, "student, teacher: expected"),
        ({"labels": torch.zeros(5, 7)}, r"labels: expected soft labels \(5, 6\)"),
        ({"labels": torch.full((5,), 6)}, r"labels: expected integers in \[0, 6\), got 6 at row 0"),
        ({"labels": torch.full((5,), -100)}, r"labels: expected integers in \[0, 6\)"),
        ({"ce_weight": -0.1}, "ce_weight: expected a finite number in"),
        ({"kd_weight": -0.1}, "kd_weight: expected a finite number in"),
        ({"temperature": 0.0}, "temperature: expected a finite number in"),
        ({"eps": -1.0}, "eps: expected a finite number in"),
    ],
    ids=str,
)
def test_bad_input(change, message):
    s, t, (a, _, _) = example()
    given = {"s": s, "t": t, "labels": a} | change
    with pytest.raises(ValueError, match=message):
        mix_kd_loss(given.pop("s"), given.pop("t"), given.pop("labels"), **given)


def test_half_precision_is_computed_in_float32():
    s, t, labels = example()
    loss, _ = mix_kd_loss(s.detach().bfloat16(), t.bfloat16(), labels)
    want = mix_kd_loss(s.detach().bfloat16().double(), t.bfloat16().double(), labels).loss
    assert loss.dtype == torch.float64 or loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, atol=1e-6, rtol=1e-6)


# ---------------------------------------------------------------- by name
def test_by_name_mixes_the_batch_and_takes_its_labels():
    method = methods.load("mix_kd")(unmixed_fraction=0.5)
    torch.manual_seed(0)
    images, labels = torch.rand(8, 1, 2, 2), torch.arange(8) % 3
    batch = method.prepare((images, labels))
    assert len(batch) == 4 and (batch[3] == 1).sum() == 4
    pure = batch[3] == 1
    assert all(any(torch.equal(row, image) for image in images) for row in batch[0][pure])
    s, t = torch.randn(8, 3), torch.randn(8, 3)
    got = method(methods.Context(s, t, batch[1], batch))
    torch.testing.assert_close(got.loss, mix_kd_loss(s, t, tuple(batch[1:])).loss)
    plain = methods.load("mix_kd")(mixup=False, temperature=4.0)
    assert plain.prepare((images, labels))[0] is images
    torch.testing.assert_close(
        plain(methods.Context(s, t, labels, (images, labels))).loss, mix_kd_loss(s, t, labels, temperature=4.0).loss
    )
    with pytest.raises(TypeError, match="batch: expected"):
        method.prepare({"images": images, "labels": labels})


def test_the_teachers_mean_deviation_is_found_and_saved():
    method = methods.load("mix_kd")(temperature="teacher", mixup=False)
    t = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    contexts = [methods.Context(None, part) for part in t.split(2)]
    method.start(methods.Setup(torch.nn.Identity(), None, lambda split: iter(contexts)))
    assert float(method.mean_deviation) == pytest.approx(t.std(1).mean().item(), rel=1e-6)
    again = methods.load("mix_kd")(temperature="teacher", mixup=False)
    again.load_state_dict(method.state_dict())
    again.start(methods.Setup(torch.nn.Identity(), None, lambda split: iter(()), step=1))
    s, labels = torch.randn(9, 4), torch.arange(9) % 4
    got = again(methods.Context(s, t, labels, (None, labels))).loss
    torch.testing.assert_close(got, mix_kd_loss(s, t, labels, temperature=float(t.std(1).double().mean())).loss)
    assert row_deviation(t).shape == (9, 1)


@pytest.mark.parametrize("options", [{"temperature": "student"}, {"beta": 0.0}, {"sampling": "x"}, {"kd_weight": -1.0}])
def test_wrong_options_are_refused_at_once(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        methods.load("mix_kd")(**options)


def test_experiment_runs_and_resumes(tmp_path):
    pytest.importorskip("sklearn")
    from benchmarks.experiments import mix_kd

    out = tmp_path / "mix_kd.json"
    results = mix_kd.run(out, seeds=1, steps=5, work=tmp_path / "work")
    assert len(results["arms"]) == 15 and len(results["sentences"]) == len(mix_kd.CLAIMS) + 2
    assert {"ECE of s", "ECE of s/sd(s)"} == set(results["arms"]["full_sd"]["measures"])
    assert mix_kd.run(out, seeds=1, work=tmp_path / "none") == json.loads(out.read_text())
