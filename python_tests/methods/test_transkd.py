"""transkd: the fusion and its gates, hcl by hand, the embeddings' modules, the total, the method by name. Vectors: test_vectors.py."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdfast import methods
from kdfast.losses import channel_wise_kd_loss
from kdfast.methods.transkd import (
    CrossSelectiveFusion,
    EmbeddingAssistant,
    GlobalLocalMixer,
    SelectiveFusion,
    TransKD,
    embedding_errors,
    hierarchical_context_loss,
    nearest_labels,
    patch_embedding_loss,
    transkd_loss,
)
from kdfast.nn import OverlapPatchEmbedding

F64 = torch.float64
STUDENT, TEACHER = (4, 6, 8), (6, 8, 10)
PATCHES = ((3, 2), (3, 2), (3, 2))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def pyramid(widths, seed=0, batch=2, size=16):
    sizes = [size >> i for i in range(len(widths))]
    maps = [random(batch, c, s, s, seed=seed + i) for i, (c, s) in enumerate(zip(widths, sizes))]
    tokens = [random(batch, s * s, c, seed=seed + 10 + i) for i, (c, s) in enumerate(zip(widths, sizes))]
    return maps, tokens


def stage(gate_norm="batch", **options):
    torch.manual_seed(0)
    return SelectiveFusion(3, 5, 64, gate_norm=gate_norm, **options).double()


# ---------------------------------------------------------------- CSF
@pytest.mark.parametrize("gate_norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("batch", [1, 3])
def test_gates_add_up_to_one_and_mix_two_branches(gate_norm, batch):
    module = stage(gate_norm)
    both = random(batch, 64, 4, 4)
    gates = module.gates(both)
    assert gates.shape == (2, batch, 64, 1, 1) and (gates > 0).all() and gates.std() > 1e-3
    torch.testing.assert_close(gates.sum(0), torch.ones(batch, 64, 1, 1, dtype=F64))
    maps, above = random(batch, 3, 4, 4), random(batch, 64, 2, 2, seed=1)
    out, r = module(maps, above)
    a, b = module.reduce(maps), above.repeat_interleave(2, 2).repeat_interleave(2, 3)
    g = module.gates(a + b)
    torch.testing.assert_close(r, g[0] * a + g[1] * b)
    torch.testing.assert_close(out, module.expand(r))


def test_the_gate_written_out():
    module = stage("layer")
    both = random(3, 64, 4, 4)
    v = module.gate[0](both.mean((2, 3), keepdim=True)).flatten(1)
    v = F.layer_norm(v, (32,)).relu()  # L = max(64 / 16, 32)
    heads = [v @ head.weight.flatten(1).T + head.bias for head in module.heads]
    want = torch.stack(heads).softmax(0)[..., None, None]
    torch.testing.assert_close(module.gates(both), want)


def test_a_batch_of_one_takes_its_own_layer_as_the_code_has_it():
    module = stage("batch")
    both = random(2, 64, 4, 4)
    single, several = module.gates(both[:1]), module.gates(both)[:, :1]
    assert not torch.allclose(single, several)
    module.eval()  # in evaluation too, where batch norm could
    torch.testing.assert_close(module.gates(both[:1]), single)
    for gate_norm in ("layer", "none"):
        module = stage(gate_norm)
        torch.testing.assert_close(module.gates(both[:1]), module.gates(both)[:, :1])


def test_the_source_of_nearest_is_rounded_down():
    module = stage()
    above = random(2, 64, 2, 3)
    module.reduce = nn.Identity()
    r = module(torch.zeros(2, 64, 5, 7, dtype=F64), above)[1]
    rows, columns = [p * 2 // 5 for p in range(5)], [p * 3 // 7 for p in range(7)]
    b = above[:, :, rows][:, :, :, columns]
    torch.testing.assert_close(r, module.gates(b)[1] * b)


def test_fusion_goes_downward_and_reaches_every_stage():
    torch.manual_seed(0)
    fusion = CrossSelectiveFusion(STUDENT, TEACHER, 16).double()
    maps = [one.requires_grad_() for one in pyramid(STUDENT)[0]]
    outs = fusion(maps)
    assert [tuple(out.shape) for out in outs] == [(2, c, s, s) for c, s in zip(TEACHER, (16, 8, 4))]
    # Of a mean behind batch norm the gradient is zero: squares.
    grads = torch.autograd.grad((outs[0] * random(*outs[0].shape, seed=5)).sum(), maps, retain_graph=True)
    assert all(grad.any() for grad in grads)
    grads = torch.autograd.grad((outs[2] * random(*outs[2].shape, seed=5)).sum(), maps, allow_unused=True)
    assert grads[0] is None and grads[1] is None and grads[2].any()
    assert not hasattr(fusion.stages[2], "heads")  # the deepest has nothing to choose from
    torch.manual_seed(0)
    weight = SelectiveFusion(300, 5, 64).reduce[0].weight  # kaiming uniform with a = 1: bound sqrt(6 / (2 fan in))
    assert 0.98 * (3 / 300) ** 0.5 < weight.abs().max() <= (3 / 300) ** 0.5


# ---------------------------------------------------------------- hcl
def plain_hcl(s, t, levels=(4, 2, 1)):
    total, weight, weights = F.mse_loss(s, t), 1.0, 1.0
    for level in levels:
        if level >= s.shape[2]:
            continue
        weight /= 2
        total = total + weight * F.mse_loss(F.adaptive_avg_pool2d(s, level), F.adaptive_avg_pool2d(t, level))
        weights += weight
    return total / weights


@pytest.mark.parametrize("size", [(8, 16), (6, 6), (7, 5), (4, 4), (2, 8), (1, 3), (8, 3), (12, 6)])
@pytest.mark.parametrize("levels", [(4, 2, 1), (2, 1), (4, 3, 1), (3,), ()])
def test_hcl_is_the_pooled_squares_of_both(size, levels):
    s, t = random(2, 3, *size).requires_grad_(), random(2, 3, *size, seed=1)
    got, want = hierarchical_context_loss([s], [t], levels=levels), plain_hcl(s, t, levels)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, s), torch.autograd.grad(want, s))


def test_hcl_by_hand():
    s = torch.tensor([[1.0, 3.0], [5.0, 7.0]], dtype=F64).reshape(1, 1, 2, 2)
    # squares 1, 9, 25, 49: mean 21; the mean 4 squared, half: (21 + 8) / 1.5
    torch.testing.assert_close(hierarchical_context_loss([s], [torch.zeros_like(s)]), torch.tensor(29 / 1.5, dtype=F64))
    maps, other = pyramid(STUDENT)[0], pyramid(STUDENT, seed=3)[0]
    want = sum(plain_hcl(a, b) for a, b in zip(maps, other))
    torch.testing.assert_close(hierarchical_context_loss(maps, other), want)


def test_hcl_is_zero_only_for_equal_maps():
    maps = pyramid(STUDENT)[0]
    assert hierarchical_context_loss(maps, [one.clone() for one in maps]) == 0
    for i in range(3):
        other = [one.clone() for one in maps]
        other[i][0, 0, 0, 0] += 1e-3
        assert hierarchical_context_loss(maps, other) > 0
    shifted = maps[0].clone()
    shifted[:, :, 0, 0] += 1
    shifted[:, :, 0, 1] -= 1  # inside one bin of every level: only the level without pooling sees it
    torch.testing.assert_close(hierarchical_context_loss([maps[0]], [shifted]), F.mse_loss(maps[0], shifted) / 1.875)


def test_the_teacher_gets_no_gradient_and_low_precision_is_summed_in_float32():
    s, t = random(2, 3, 4, 4).requires_grad_(), random(2, 3, 4, 4, seed=1).requires_grad_()
    for loss in (hierarchical_context_loss([s], [t]), embedding_errors([s], [t]).sum()):
        assert torch.autograd.grad(loss, t, allow_unused=True) == (None,)
    low = hierarchical_context_loss([s.bfloat16()], [t.bfloat16()])
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), hierarchical_context_loss([s], [t]), rtol=0.02, atol=0)


# ---------------------------------------------------------------- embeddings
def test_embeddings_weighted():
    s, t = pyramid(STUDENT)[1], pyramid(STUDENT, seed=4)[1]
    errors = embedding_errors(s, t)
    torch.testing.assert_close(errors, torch.stack([F.mse_loss(a, b) for a, b in zip(s, t)]))
    got = patch_embedding_loss(s, t, weights=(0.1, 0.5, 1.0))
    torch.testing.assert_close(got, 0.1 * errors[0] + 0.5 * errors[1] + errors[2])


def test_mixer_is_attention_plus_gated_convolution():
    torch.manual_seed(0)
    mixer = GlobalLocalMixer(8, 2).double()
    assert mixer.weights.tolist() == [1.0, 1.0]  # not what the memory held
    assert mixer.qkv.bias is None and mixer.output.bias is not None
    x = random(2, 5, 8)
    q, k, v = (x @ part.T for part in mixer.qkv.weight.chunk(3))
    heads = [
        torch.softmax(q[..., h] @ k[..., h].mT / 2, -1) @ v[..., h]  # (8 / 2)^(1/2) = 2
        for h in (slice(0, 4), slice(4, 8))
    ]
    attended = mixer.output(torch.cat(heads, -1))
    a, b = (conv(x.mT).mT for conv in (mixer.value, mixer.gate))
    mixer.weights.data.copy_(torch.tensor([0.7, -0.4]))
    want = 0.7 * attended - 0.4 * a / (1 + torch.exp(-b))
    torch.testing.assert_close(mixer(x), want)
    mixer.add = True
    torch.testing.assert_close(mixer(x), want + x)
    mixer.weights.data[1] = float("nan")
    with pytest.raises(ValueError, match="weights: expected numbers for w_att and w_conv, got"):
        mixer(x)


def test_assistants_start_at_their_stage_and_add_an_embedding_of_the_teachers_width():
    torch.manual_seed(0)
    modules = TransKD(STUDENT, TEACHER, variant="ea", mid_channels=8, image_channels=1, patches=PATCHES).double()
    wanted = torch.tensor([[0.1, 0.5], [0.2, 0.6], [0.3, 0.7]])
    torch.testing.assert_close(torch.stack([one.weights.detach() for one in modules.align]), wanted.double())
    maps, tokens = pyramid(STUDENT)
    image = random(2, 1, 32, 32)
    _, aligned = modules(maps, tokens, image)
    assert [one.shape for one in aligned] == [(2, n, c) for n, c in zip((256, 64, 16), TEACHER)]
    one = modules.align[1]
    extra = F.layer_norm(one.embed.project(maps[0]).flatten(2).mT, (8,))
    torch.testing.assert_close(aligned[1], wanted[1, 0] * one.linear(tokens[1]) + wanted[1, 1] * extra)
    assert one.embed.project.stride == (2, 2) and OverlapPatchEmbedding(3, 4, kernel=7, stride=4)(
        torch.zeros(1, 3, 64, 128)
    )[1] == (16, 32)
    with pytest.raises(ValueError, match="patches: expected 64 tokens from the assistant as the student has, got 16"):
        EmbeddingAssistant(6, 6, 8).double()(tokens[1], maps[1])


def test_variants_change_what_they_should():
    maps, tokens = pyramid(STUDENT)
    image = random(2, 1, 32, 32)
    made = {}
    for variant in ("base", "gl", "ea", "none"):
        torch.manual_seed(0)
        modules = TransKD(
            STUDENT, TEACHER, variant=variant, mid_channels=8, num_heads=2, image_channels=1, patches=PATCHES
        )
        made[variant] = modules.double()(maps, tokens, image)
        torch.testing.assert_close(made[variant][0], made["base"][0])  # the fusion is the same
    assert made["none"][1] == []
    torch.testing.assert_close(made["gl"][1][:2], made["base"][1][:2])
    assert not torch.allclose(made["gl"][1][2], made["base"][1][2])  # of the last stage alone
    torch.manual_seed(0)
    projected = TransKD(STUDENT, TEACHER, fusion="projected", variant="none").double()
    torch.testing.assert_close(projected(maps, tokens)[0][1], projected.fusion.stages[1](maps[1]))


# ---------------------------------------------------------------- total
def total(seed=0, **options):
    student, labels = random(2, 4, 8, 8, seed=seed).requires_grad_(), torch.arange(2 * 16 * 16).view(2, 16, 16) % 4
    maps, tokens = pyramid(STUDENT), pyramid(STUDENT, seed=7)
    pairs = (maps[0], tokens[0]), (maps[1], tokens[1])
    return student, labels, pairs, transkd_loss(student, labels, *pairs, embedding_weights=(0.1, 0.5, 1.0), **options)


def test_total_is_the_sum_of_its_terms():
    student, labels, (maps, tokens), (loss, parts) = total(feature_weight=3.0)
    small = labels[:, ::2, ::2]
    ce = F.cross_entropy(student, small)
    feature, embedding = hierarchical_context_loss(*maps), patch_embedding_loss(*tokens, weights=(0.1, 0.5, 1.0))
    torch.testing.assert_close(loss, ce + 3 * feature + embedding)
    torch.testing.assert_close((parts["ce"], parts["feature"], parts["embedding"]), (ce.detach(), feature, embedding))
    assert not any(part.requires_grad for part in parts.values())
    loss, parts = transkd_loss(student, labels, maps, feature_loss="cwd", temperature=2.0)
    want = ce + sum(channel_wise_kd_loss(s, t, temperature=2.0) for s, t in zip(*maps))
    torch.testing.assert_close(loss, want)
    assert "embedding" not in parts


def test_labels_are_resized_by_nearest():
    labels = torch.arange(2 * 7 * 9).view(2, 7, 9)
    got = nearest_labels(labels, (3, 4))
    want = F.interpolate(labels[:, None].double(), size=(3, 4), mode="nearest")[:, 0].long()
    assert torch.equal(got, want) and torch.equal(nearest_labels(labels, (7, 9)), labels)


def test_class_weights_are_those_of_torch_and_an_ignored_class_counts_nowhere():
    student, labels, (maps, _), _ = total()
    weights = torch.tensor([0.5, 2.0, 1.0, 0.0], dtype=F64)
    labels = labels.clone()
    labels[0] = 255
    got = transkd_loss(student, labels, maps, feature_weight=0.0, class_weights=weights).loss
    want = F.cross_entropy(student, nearest_labels(labels, (8, 8)), weight=weights, ignore_index=255)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(want, student))
    large = torch.zeros(2, 4, 256, 256, dtype=torch.float16)  # the sum of the rows' weights is beyond float16
    classes = torch.randint(3, (2, 256, 256), generator=torch.Generator().manual_seed(0))
    got = transkd_loss(large, classes, maps, feature_weight=0.0, class_weights=weights).loss
    torch.testing.assert_close(got.double(), torch.tensor(4.0, dtype=F64).log())
    for nothing in (torch.full_like(labels, 255), torch.full_like(labels, 3)):
        loss = transkd_loss(student, nothing, maps, feature_weight=0.0, class_weights=weights).loss
        assert loss == 0 and not torch.autograd.grad(loss, student)[0].any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hierarchical_context_loss([random(2, 3, 4, 4)], []), "teacher: expected 1 stages, got 0"),
        (lambda: hierarchical_context_loss([random(2, 3, 4, 4)], [random(2, 3, 4, 2)]), r"teacher\[0\]: expected shape \(2, 3, 4, 4\)"),
        (lambda: hierarchical_context_loss([random(2, 3, 4, 4)], [random(2, 3, 4, 4)], levels=(0,)), "levels: expected an int >= 1"),
        (lambda: embedding_errors([random(2, 4, 3)], [random(2, 5, 3)]), r"teacher\[0\]: expected shape \(2, 4, 3\)"),
        (lambda: patch_embedding_loss([random(2, 4, 3)], [random(2, 4, 3)]), "embedding weights: expected one for each of 1 stages, got 4"),
        (lambda: patch_embedding_loss([random(2, 4, 3)], [random(2, 4, 3)], weights=(-1.0,)), "embedding weights: expected a finite number"),
        (lambda: CrossSelectiveFusion((4, 8), (4,)), "teacher_channels: expected one for each stage"),
        (lambda: CrossSelectiveFusion((4, 8), (4, 8))([random(2, 4, 4, 4)]), "maps: expected 2 stages, got 1"),
        (lambda: TransKD((4, 8), (4, 8)).double()(pyramid((4, 8))[0], []), "embeddings: expected 2 stages, got 0"),
        (lambda: TransKD((4, 8), (4, 8), variant="ea"), "patches: expected"),
        (lambda: TransKD((4, 8), (4, 8), variant="ea", patches=PATCHES[:2]).double()(*pyramid((4, 8))), "image: expected the images"),
        (lambda: TransKD((4, 8), (4, 8), variant="best"), "variant: expected one of"),
        (lambda: GlobalLocalMixer(8, 3), "num_heads: expected a divisor of the 8 channels, got 3"),
        (lambda: stage("instance"), "gate_norm: expected one of"),
        (lambda: total(feature_weight=-1.0), "feature_weight: expected a finite number"),
        (lambda: total(feature_loss="kl"), "feature_loss: expected one of"),
        (lambda: total(class_weights=torch.ones(3)), r"class_weights: expected \[4\]"),
    ],
)  # fmt: skip
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------- by name
def by_name(variant="base", **options):
    pytest.importorskip("sklearn")
    from kdfast.data import load_task, models
    from kdfast.experiment import bind

    task = load_task("canvas_stages")
    torch.manual_seed(0)
    method = methods.load("transkd")(task.widths, **bind(task, "transkd", {"variant": variant, **options}))
    return task, method, *models(task, 0)


@pytest.mark.parametrize("variant", ["base", "gl", "ea", "none"])
def test_one_batch_reaches_student_and_modules(variant):
    task, method, student, teacher = by_name(variant)
    images, labels = task.splits(0)["student"][:4]
    pyramids = [net.encoder(images) for net in (student, teacher)]
    context = methods.Context(
        student(images), None, labels, (images, labels), student_features={"pyramid": student.encoder(images)},
        teacher_features={"pyramid": pyramids[1]},
    )  # fmt: skip
    loss, parts = method(context)
    assert ("embedding" in parts) == (variant != "none") and loss > parts["ce"]
    loss.backward()
    unused = [name for name, p in method.named_parameters() if p.grad is None]
    assert all("gate_single" in name for name in unused)
    assert all(p.grad is None for p in teacher.parameters())
    assert student.encoder.patches[0].project.weight.grad.any()


def test_the_best_epoch_is_kept_and_inference_is_the_student_alone(tmp_path):
    pytest.importorskip("accelerate")
    task, *_ = by_name()
    from kdfast.experiment import Arm, distiller_of

    task = dataclasses.replace(task, batch_size=8)
    splits = task.splits(0)
    found = {}
    for keep in ("best", "last"):
        run = distiller_of(task, Arm("transkd", "transkd", {"keep": keep, "mid_channels": 8}), 0)
        scores, original = [], run.method.after_epoch

        def after_epoch(setup, scores=scores, original=original):
            original(setup)
            scores.append({name: value.clone() for name, value in setup.student.state_dict().items()})

        run.method.after_epoch = after_epoch
        torch.manual_seed(0)
        val = task.eval_loader(splits["val"])
        run.fit(task.train_loader(splits["student"], 3), 3, eval_loader=val)
        model = run.deploy(val)
        assert type(model) is type(run.student) and len(model.state_dict()) == len(run.student.state_dict())
        history = [row["eval_mIoU"] for row in run.history.rows if "eval_mIoU" in row]
        found[keep] = model, scores, history
    (model, states, history), (last, *_) = found["best"], found["last"]
    best = history.index(max(history))
    assert all(torch.equal(value, states[best][name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, states[-1][name]) for name, value in last.state_dict().items())


def test_experiment_runs_and_resumes(tmp_path):
    pytest.importorskip("sklearn")
    from benchmarks.experiments import transkd

    task, *_ = by_name()
    out = tmp_path / "results" / "transkd.json"
    results = transkd.run(
        out, seeds=1, steps=2, task=dataclasses.replace(task, teacher_steps=2), work=tmp_path / "work"
    )
    assert list(results["arms"]) == ["teacher", *(arm.name for arm in transkd.ARMS)]
    assert len(results["sentences"]) == len(transkd.CLAIMS)
    assert transkd.run(out, seeds=1, work=tmp_path / "elsewhere") == json.loads(out.read_text())
