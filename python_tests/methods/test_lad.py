"""lad: the label channel, networks that take it, both losses, the two stages by name, the experiment. Vectors: test_vectors.py."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdfast import methods
from kdfast.losses import channel_wise_kd_loss
from kdfast.methods.lad import (
    LabelInput,
    dist_loss,
    encode_labels,
    fixed_codes,
    inflate_first_conv,
    lad_student_loss,
    lad_teacher_loss,
    pixel_kl,
    segmentation_ce,
    symmetric_channel_wise_kd,
)

F64 = torch.float64


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def example(seed=0):
    """Images [2, 3, 4, 5], labels of 3 classes with a few ignored."""
    labels = torch.randint(3, (2, 4, 5), generator=torch.Generator().manual_seed(seed))
    labels[0, 0] = -1
    return random(2, 3, 4, 5, seed=seed), labels


# ---------------------------------------------------------------- the label channel
def test_encoding_is_a_number_per_class_and_noise():
    images, labels = example()
    codes, noise = random(2, 4, seed=1), random(2, 1, 4, 5, seed=2)
    got = encode_labels(images, labels, 3, codes=codes, noise=noise, noise_std=0.03)
    assert got.shape == (2, 4, 4, 5) and torch.equal(got[:, :3], images)
    for b in range(2):
        for h in range(4):
            for w in range(5):
                y = int(labels[b, h, w])
                want = 100 * (codes[b, 3 if y == -1 else y] + 0.03 * noise[b, 0, h, w])
                torch.testing.assert_close(got[b, 3, h, w], want)


def test_fixed_codes_of_the_paper_and_of_any_number_of_classes():
    codes = fixed_codes(21)
    assert codes.shape == (22,) and codes[0] == pytest.approx(-1.1) and codes[11] == 0 and codes[-1] == pytest.approx(1)
    torch.testing.assert_close(fixed_codes(2), torch.tensor([-0.15, -0.05, 0.05]))
    images, labels = example()
    got = encode_labels(images, labels, 3, noise_std=0.0, scale=10.0)[:, 3]
    assert torch.equal(got, (10 * fixed_codes(3).double())[torch.where(labels < 0, 3, labels)])


def test_noise_is_drawn_anew_and_the_generator_decides_it():
    images, labels = example()
    drawn = [encode_labels(images, labels, 3, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    big = torch.zeros(1, 1, 200, 200, dtype=F64)
    noise = encode_labels(big, torch.zeros(1, 200, 200, dtype=torch.long), 3, codes=torch.zeros(4), noise_std=0.5)[:, 1]
    assert noise.std() == pytest.approx(50, rel=0.02) and abs(noise.mean()) < 1


def test_narrow_and_unsigned_labels_keep_their_ignored_pixels():
    images, labels = example()
    options = {"noise_std": 0.0, "ignore_index": 255}
    wide = torch.where(labels < 0, 255, labels)
    torch.testing.assert_close(
        encode_labels(images, wide.to(torch.uint8), 3, **options), encode_labels(images, wide, 3, **options)
    )


# ---------------------------------------------------------------- networks
def test_inflating_keeps_the_image_channels():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 64, 3, stride=2, padding=1), nn.ReLU()), nn.Conv2d(64, 4, 1))
    old = network[0][0]
    weight, bias, image = old.weight.clone(), old.bias.clone(), torch.randn(2, 3, 8, 8)
    want = network(image)
    assert inflate_first_conv(network, 1, std=0.1) is network
    new = network[0][0]
    assert new.weight.shape == (64, 4, 3, 3) and new.stride == (2, 2) and new.padding == (1, 1)
    assert torch.equal(new.weight[:, :3], weight) and torch.equal(new.bias, bias)
    assert new.weight[:, 3].std().item() == pytest.approx(0.1, rel=0.1) and new.weight.requires_grad
    torch.testing.assert_close(network(F.pad(image, (0, 0, 0, 0, 0, 1))), want)  # nothing comes from a channel of zeros
    assert inflate_first_conv(nn.Conv2d(3, 2, 1), 2).in_channels == 5
    torch.testing.assert_close(LabelInput(network, 3)(image), want)


def test_the_blind_read_zeros_whatever_comes():
    torch.manual_seed(0)
    network = nn.Conv2d(4, 5, 3, padding=1)
    image, channel = torch.randn(2, 3, 4, 4), torch.randn(2, 1, 4, 4)
    coded, zeros = torch.cat((image, channel), 1), torch.cat((image, torch.zeros_like(channel)), 1)
    student, teacher = LabelInput(network, 3, blind=True), LabelInput(network, 3)
    for x in (image, coded, zeros):
        torch.testing.assert_close(student(x), network(zeros))
    torch.testing.assert_close(teacher(coded), network(coded))
    torch.testing.assert_close(teacher(image), network(zeros))


def test_paths_have_batch_statistics_of_their_own():
    torch.manual_seed(0)
    network = LabelInput(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)), 1)
    x = torch.randn(4, 2, 2, 5, 5)
    a, b = network(x)
    torch.testing.assert_close(a, network(x[:, 0]))
    torch.testing.assert_close(b, network(x[:, 1]))
    for one in (a, b):
        torch.testing.assert_close(one.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)


# ---------------------------------------------------------------- losses
def test_segmentation_ce_resizes_to_the_labels_and_is_zero_without_any():
    z, (_, labels) = random(2, 3, 2, 3).requires_grad_(), example()
    up = F.interpolate(z, size=(4, 5), mode="bilinear", align_corners=True)
    torch.testing.assert_close(segmentation_ce(z, labels), F.cross_entropy(up, labels, ignore_index=-1))
    nothing = segmentation_ce(z, torch.full_like(labels, -1))
    assert nothing == 0 and not torch.autograd.grad(nothing, z)[0].any()


def cwd(a, b, temperature=4.0):
    q, p = ((x.flatten(2) / temperature).softmax(-1) for x in (a, b.detach()))
    return temperature**2 * (p * (p / q).log()).sum() / (a.shape[0] * a.shape[1])


def test_teacher_loss_written_out_and_both_paths_learn():
    (a, b), (_, labels) = (random(2, 3, 2, 3, seed=s).requires_grad_() for s in (0, 1)), example()
    aux = random(2, 3, 1, 2, seed=2)
    loss, parts = lad_teacher_loss([(a, aux), (b, None)], labels, temperature=2.0)
    task = segmentation_ce(a, labels) + segmentation_ce(b, labels) + 0.4 * segmentation_ce(aux, labels)
    consistency = cwd(a, b, 2.0) + cwd(b, a, 2.0)
    torch.testing.assert_close(loss, task + 5 * consistency)
    torch.testing.assert_close((parts["task"], parts["consistency"]), (task.detach(), consistency.detach()))
    got, want = (torch.autograd.grad(x, (a, b), retain_graph=True) for x in (loss, task + 5 * consistency))
    torch.testing.assert_close(got, want)
    alone = torch.autograd.grad(symmetric_channel_wise_kd(a, b, temperature=2.0), a)[0]
    torch.testing.assert_close(alone, torch.autograd.grad(cwd(a, b.detach(), 2.0), a)[0])  # not through the target
    one = lad_teacher_loss([(a, None)], labels)
    torch.testing.assert_close(one.loss, segmentation_ce(a, labels))
    assert set(one.parts) == {"task"}


@pytest.mark.parametrize("distance", ["cwd", "dist", "pixel"])
def test_student_loss_written_out(distance):
    s, t, (_, labels) = random(2, 3, 2, 3).requires_grad_(), random(2, 3, 2, 3, seed=1).requires_grad_(), example()
    aux = random(2, 3, 2, 3, seed=2).requires_grad_()
    loss, parts = lad_student_loss((s, aux), t, labels, distance=distance)
    kd = {"cwd": cwd(s, t), "dist": dist_loss(s, t), "pixel": pixel_kl(s, t)}[distance]
    torch.testing.assert_close(loss, segmentation_ce(s, labels) + 0.02 * segmentation_ce(aux, labels) + 3 * kd)
    torch.testing.assert_close(parts["kd"], kd.detach())
    grads = torch.autograd.grad(loss, (s, aux, t), allow_unused=True)
    assert grads[0].any() and grads[1].any() and grads[2] is None


def test_alternatives_by_hand():
    s, t = random(2, 3, 2, 3), random(2, 3, 2, 3, seed=1)
    q, p = (z.softmax(1).permute(0, 2, 3, 1).reshape(-1, 3) for z in (s, t))
    rows = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(q, p)])
    columns = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(q.T, p.T)])
    torch.testing.assert_close(dist_loss(s, t), 2 - rows.mean() - columns.mean(), rtol=1e-6, atol=0)
    assert dist_loss(torch.zeros_like(s), t) == 2 and dist_loss(t, t) < 1e-6
    q, p = ((z / 4).softmax(1) for z in (s, t))
    want = 16 * F.kl_div(q.log(), p, reduction="none").sum(1).mean()
    torch.testing.assert_close(pixel_kl(s, t, epsilon=0.0), want)
    torch.testing.assert_close(pixel_kl(s, t), want, rtol=1e-3, atol=0)
    assert pixel_kl(s, t) != want and pixel_kl(1e4 * s, t).isfinite()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: encode_labels(*example(), 2), r"labels: expected integers in \[0, 2\) or -1, got 2"),
        (lambda: encode_labels(*example(), 3, ignore_index=255), r"labels: expected integers in \[0, 3\) or 255, got -1"),
        (lambda: encode_labels(*example(), 3, codes=torch.zeros(3)), r"codes: expected \[4\] or \[2, 4\]"),
        (lambda: encode_labels(*example(), 3, codes=torch.zeros(3, 4)), "codes: expected"),
        (lambda: encode_labels(*example(), 3, noise_std=-0.1), "noise_std: expected a finite number"),
        (lambda: encode_labels(example()[0], example()[1][:, :2], 3), r"labels: expected shape \(2, 4, 5\)"),
        (lambda: LabelInput(nn.Conv2d(3, 4, 1)), "network: expected 4 input channels .* got 3; kdfast.methods.lad.inflate_first_conv adds one"),
        (lambda: LabelInput(nn.Linear(3, 4)), "module: expected a network with a Conv2d"),
        (lambda: LabelInput(nn.Conv2d(4, 4, 1))(torch.zeros(1, 2, 4, 4)), r"x: expected \[B, C, H, W\] of 3 channels, or one more"),
        (lambda: inflate_first_conv(nn.Conv2d(4, 4, 1, groups=2)), "expected a first Conv2d without groups"),
        (lambda: channel_wise_kd_loss(random(1, 2, 3, 3), random(1, 2, 3, 4)), "teacher: expected maps of shape"),
        (lambda: symmetric_channel_wise_kd(random(1, 2, 3, 3), random(1, 2, 3, 3), temperature=0.0), "temperature: expected"),
        (lambda: dist_loss(random(1, 2, 3, 3), random(1, 3, 3, 3)), "teacher: expected logits"),
        (lambda: lad_teacher_loss([], example()[1]), "paths: expected two pairs"),
        (lambda: lad_student_loss((random(2, 3, 4, 5), None), random(2, 3, 4, 5), example()[1], kd_weight=-1.0), "kd_weight: expected"),
        (lambda: methods.load("lad")(num_classes=3, stage="both"), "stage: expected one of student, teacher"),
        (lambda: methods.load("lad")(num_classes=3, paths=3), "paths: expected 1 or 2, got 3"),
        (lambda: methods.load("lad")(num_classes=3, codes="none"), "codes: expected one of"),
        (lambda: methods.load("lad")(num_classes=3, distance="kl"), "distance: expected one of"),
    ],
)  # fmt: skip
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------- by name
def network(channels=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 1))


def make(**options):
    method = methods.load("lad")(num_classes=3, image_channels=1, **options)
    student = method.adapt(network())
    torch.manual_seed(1)
    return method, student, (torch.randn(2, 1, 4, 5), example()[1])


def test_the_teacher_stage_sees_two_codes_of_the_same_images():
    method, student, batch = make(stage="teacher")
    assert not method.uses_teacher and method.options["aux_weight"] == 0.4 and method.coding["noise_std"] == 0.03
    x, labels = method.prepare(batch)
    assert x.shape == (2, 2, 2, 4, 5) and labels is batch[1]
    assert torch.equal(x[:, 0, :1], batch[0]) and torch.equal(x[:, 1, :1], batch[0])
    a, b = x[:, 0, 1], x[:, 1, 1]
    for one in (a, b):  # about one number for each class of an image, none like another image's
        for image in range(2):
            means = [one[image][labels[image] == c].mean() for c in range(3)]
            spread = max(one[image][labels[image] == c].std() for c in range(3))
            assert spread < 12 < max(means) - min(means)
    assert (a - b).abs().mean() > 20
    context = methods.Context(student(x), None, labels, (x, labels))
    loss, parts = method(context)
    want = lad_teacher_loss([(z, None) for z in student(x)], labels)
    torch.testing.assert_close(loss, want.loss)
    assert parts["consistency"] > 0
    method, student, batch = make(stage="teacher", paths=1, codes="fixed", noise_std=0.0)
    x, _ = method.prepare(batch)
    assert x.shape[1] == 1 and torch.equal(x[:, 0], encode_labels(*batch, 3, noise_std=0.0))
    assert set(method(methods.Context(student(x), None, labels)).parts) == {"task"}


def test_the_student_stage_codes_for_the_teacher_and_blinds_the_student():
    method, student, batch = make(noise_std=0.0)
    assert method.uses_teacher and method.options["aux_weight"] == 0.02 and student.blind
    x, labels = method.prepare(batch)
    torch.testing.assert_close(x, encode_labels(*batch, 3, noise_std=0.0))
    torch.testing.assert_close(student(x), student(batch[0]))
    teacher = torch.randn(2, 3, 4, 5)
    aux = torch.randn(2, 3, 2, 3)
    z = student(x)
    want = lad_student_loss((z, aux), teacher, labels)
    got = method(methods.Context((z, aux), (teacher, aux), labels, (x, labels)))
    torch.testing.assert_close(got.loss, want.loss)
    plain, student, batch = make(assistance=False)
    assert not isinstance(student, LabelInput) and plain.prepare(batch) is batch


def test_a_network_that_has_a_label_channel_keeps_it_and_another_is_refused():
    method = methods.load("lad")(num_classes=3, image_channels=1)
    ready = network(2)
    weight = ready[0].weight.clone()
    assert torch.equal(method.adapt(ready).network[0].weight, weight)
    with pytest.raises(ValueError, match="inflate_first_conv"):
        method.adapt(network(3))


def test_a_wrapped_network_is_blind_as_a_student_and_sees_as_a_teacher():
    for stage, blind in (("student", True), ("teacher", False)):
        method = methods.load("lad")(num_classes=3, image_channels=1, stage=stage)
        for before in (True, False):
            assert method.adapt(LabelInput(network(2), 1, blind=before)).blind is blind


def test_without_assistance_a_run_by_name_has_the_tasks_teacher():
    pytest.importorskip("sklearn")
    from kdfast.data import load_task
    from kdfast.experiment import arms_of

    task = load_task("canvas_cnns")
    assert [arm.name for arm in arms_of(task, "lad", {})][-2:] == ["lad teacher", "lad"]
    assert "lad teacher" not in [arm.name for arm in arms_of(task, "lad", {"assistance": False})]


def test_by_name_the_second_stage_is_taught_by_the_first(tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip("sklearn")
    from kdfast.data import load_task
    from kdfast.experiment import arms_of, run

    task = dataclasses.replace(load_task("canvas_cnns"), teacher_steps=2, eval_every=2)
    arms = arms_of(task, "lad", {})
    assert [arm.name for arm in arms] == ["ce", "kd", "lad teacher", "lad"] and arms[-1].teacher == arms[-2]
    seen = {}

    def measure(distiller, loaders):
        if getattr(distiller.method, "stage", None) == "student":
            images, labels = next(iter(loaders["val"]))
            coded = distiller.method.encode(images, labels)
            with torch.no_grad():
                seen["teacher"] = distiller.teacher, coded, distiller.teacher(coded)
        return {}

    results = run(task, "lad", seeds=1, out=tmp_path, steps=4, measure=measure)
    assert list(results["arms"]) == ["teacher", "ce", "kd", "lad teacher", "lad"]
    teacher, coded, want = seen["teacher"]
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "runs" / "lad teacher-0.safetensors")
    assert all(torch.equal(value, kept[name]) for name, value in teacher.state_dict().items())
    assert not teacher.training and not teacher.blind
    torch.testing.assert_close(teacher(coded), want)
    student = load_file(tmp_path / "student.safetensors")
    assert student["network.stem.0.weight"].shape[1] == 2


def test_the_best_teacher_is_the_best_with_its_labels():
    pytest.importorskip("accelerate")
    pytest.importorskip("sklearn")
    from kdfast.data import load_task
    from kdfast.experiment import Arm, distiller_of
    from kdfast.metrics import mean_iou

    task = load_task("canvas_cnns")
    run = distiller_of(task, Arm("t", "lad", {"stage": "teacher", "noise_std": 0.0}), 0)
    splits = task.splits(0)
    val = task.eval_loader(splits["val"])
    torch.manual_seed(0)
    run.fit(task.train_loader(splits["student"], 12), 1, eval_loader=val)
    images, labels = splits["val"].tensors
    model = run.deploy(val).eval()
    with torch.no_grad():
        predictions = model(run.method.encode(images, labels)).argmax(1)
    got = mean_iou(predictions, labels, num_classes=task.classes, ignore_index=task.ignore_index)
    assert run.method.best.score.item() == pytest.approx(got, abs=1e-6) and got > 0


def test_experiment_runs_and_resumes(tmp_path):
    pytest.importorskip("sklearn")
    from benchmarks.experiments import lad
    from kdfast.data import load_task

    task = dataclasses.replace(load_task("canvas_cnns"), teacher_steps=2)
    out = tmp_path / "results" / "lad.json"
    results = lad.run(out, seeds=1, steps=4, task=task, work=tmp_path / "work")
    assert list(results["arms"]) == ["teacher", *(arm.name for arm in lad.ARMS)]
    for name in ("label teacher", "one path"):
        assert set(results["arms"][name]["measures"]) == set(lad.CHANNELS)
    assert lad.run(out, seeds=1, work=tmp_path / "elsewhere") == json.loads(out.read_text())
