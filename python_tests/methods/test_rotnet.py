"""RotNet: the loss, schedules, networks and probes, the two stages and their state, by name, the experiment."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdfast import methods
from kdfast.data.rotations import rotate4
from kdfast.methods.rotnet import (
    PROBE_RATES,
    RotNet,
    network_in_network,
    probe_head,
    rate_at,
    rotation_prediction_loss,
    small_blocks,
)


def test_loss_is_the_mean_over_the_turns_of_every_image():
    logits = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    want = torch.stack(
        [F.cross_entropy(logits[4 * b + k : 4 * b + k + 1], torch.tensor([k])) for b in range(3) for k in range(4)]
    )
    torch.testing.assert_close(rotation_prediction_loss(logits), want.mean())
    other = logits.view(3, 4, 4).transpose(0, 1).flatten(0, 1)
    torch.testing.assert_close(rotation_prediction_loss(other, layout="rotation_major"), want.mean())
    assert rotation_prediction_loss(logits, labels=torch.zeros(12, dtype=torch.long)) != want.mean()
    assert rotation_prediction_loss(1e4 * logits).isfinite()


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(8, 3), None, r"logits: expected \[4 B, 4\]"),
        (torch.zeros(6, 4), None, r"logits: expected \[4 B, 4\]"),
        (torch.zeros(0, 4), None, "at least one image"),
        (torch.zeros(4, 4), torch.tensor([0, 1, 2, 4]), r"labels: expected integers in \[0, 4\), got 4 at row 3"),
        (torch.zeros(4, 4), torch.tensor([0, 1, 2, -100]), r"labels: expected integers in \[0, 4\)"),
        (torch.zeros(4, 4), torch.tensor([0, 1, 2]), "labels: expected shape"),
        (torch.zeros(4, 4, dtype=torch.long), None, "logits: expected float16"),
    ],
)  # fmt: skip
def test_bad_input(logits, labels, message):
    with pytest.raises((ValueError, TypeError), match=message):
        rotation_prediction_loss(logits, labels=labels)


def test_rates_of_both_stages():
    assert [rate_at(e) for e in (0, 59, 60, 119, 120, 159, 160, 199, 900)] == [0.1] * 2 + [0.02] * 2 + [0.004] * 2 + [
        0.0008
    ] * 3
    assert [rate_at(e, PROBE_RATES) for e in (34, 35, 70, 85)] == [0.1, 0.02, 0.004, 0.0008]


# ---------------------------------------------------------------- networks
def test_network_in_network_is_the_papers():
    blocks, widths = network_in_network(stages=4)
    x, shapes = torch.zeros(1, 3, 32, 32), []
    for block in blocks:
        x = block(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(96, 32, 32), (192, 16, 16), (192, 8, 8), (192, 8, 8)] and widths == [96, 192, 192, 192]
    kernels = [m.kernel_size[0] for m in nn.Sequential(*blocks).modules() if isinstance(m, nn.Conv2d)]
    assert kernels == [5, 1, 1, 5, 1, 1, 3, 1, 1, 3, 1, 1]
    model = RotNet(blocks, widths, 10)
    weight = model.blocks[0][0][0].weight
    assert weight.std().item() == pytest.approx((2 / (25 * 192)) ** 0.5, rel=0.05) and not model.turns[-1].bias.any()


@pytest.mark.parametrize("kind", ["linear", "mlp", "conv"])
def test_probes(kind):
    probe = probe_head(kind, 6, 5, width=7)
    assert probe(torch.randn(4, 6, 4, 4)).shape == (4, 5)
    if kind == "linear":
        maps = 3 + 5 * torch.randn(200, 6, 4, 4)
        standard = probe[:3](maps)
        torch.testing.assert_close(standard.mean(0), torch.zeros(24), atol=1e-5, rtol=0)
        torch.testing.assert_close(standard.var(0, correction=0), torch.ones(24), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="kind: expected one of"):
        probe_head("tree", 6, 5)


def small(**options):
    torch.manual_seed(0)
    return RotNet(*small_blocks(), 10, **options)


def test_the_probing_stage_freezes_the_blocks():
    model, x = small(), torch.rand(6, 1, 8, 8)
    assert model.train()(x).shape == (6, 4) and model.eval()(x).shape == (6, 10)
    model.train().probe_stage()
    assert model.training and not model.blocks[0].training and model.probe.training
    before = {name: value.clone() for name, value in model.blocks.state_dict().items()}
    logits = model(x)
    logits.square().mean().backward()
    assert logits.shape == (6, 10) and all(p.grad is None for p in model.blocks.parameters())
    assert model.probe[-1].weight.grad.any()
    assert all(torch.equal(value, before[name]) for name, value in model.blocks.state_dict().items())  # batch norm too
    model.train()  # as the training loop calls it each epoch
    assert not model.blocks[0].training
    tuned = small(freeze=False)
    tuned.train().probe_stage()
    tuned(x).square().mean().backward()
    assert tuned.blocks[0].training and tuned.blocks[0][0].weight.grad.any()


def test_the_probe_reads_the_block_before_its_pool():
    model, x = small(layer=1).eval(), torch.rand(2, 1, 8, 8)
    assert model.features(x, 1).shape == (2, 64, 8, 8) and model.features(x, 2).shape == (2, 64, 4, 4)
    torch.testing.assert_close(model(x), model.probe(model.features(x, 1)))
    assert small(layer=-1).layer == 2


# ---------------------------------------------------------------- by name
def loader(rows=24, batch=8):
    from torch.utils.data import DataLoader

    from kdfast.data import NamedRows
    from kdfast.data.task import as_read

    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(rows) % 10
    labels[::2] = -100
    data = NamedRows(images=torch.rand(rows, 1, 8, 8, generator=generator), labels=labels)
    return DataLoader(data, batch, shuffle=True, collate_fn=as_read)


def run(out, model, epochs, **options):
    pytest.importorskip("accelerate")
    from kdfast.train import Distiller

    distiller = Distiller(
        model, None, methods.load("rotnet")(pretext_steps=4), out=out, save_every=1, log_every=1, progress=False
    )
    distiller.fit(loader(), epochs, **options)
    return distiller


def test_by_name_turns_first_then_the_probe_and_a_resume_knows_its_stage(tmp_path):
    whole = run(tmp_path / "whole", small(), 3)
    rows = whole.history.rows
    assert [("rotation" in row, "ce" in row) for row in rows] == [(True, False)] * 4 + [(False, True)] * 5
    assert all(0 <= row["accuracy"] <= 1 for row in rows[:4]) and whole.student.probing
    run(tmp_path / "parts", small(), 1)
    second = run(tmp_path / "parts", small(), 2, resume=True)  # stopped inside the probing stage
    third = run(tmp_path / "parts", small(), 3, resume=True)
    assert second.method.done == 6 and third.method.done == 9 and third.student.probing
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, third.student.state_dict()[name]), name


def test_turned_batches_and_labelled_rows():
    method = methods.load("rotnet")(pretext_steps=1)
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([3, -100, 5, -100])
    batch = method.prepare({"images": images, "labels": labels})
    assert torch.equal(batch["images"], rotate4(images)[0]) and batch["labels"].tolist() == [0, 1, 2, 3] * 4
    logits = torch.randn(16, 4)
    got = method(methods.Context(logits, labels=batch["labels"], batch=batch))
    torch.testing.assert_close(got.loss, rotation_prediction_loss(logits))
    method.after_step(small(), None, 1)
    assert method.prepare({"images": images})["images"] is images
    logits = torch.randn(4, 10)
    got = method(methods.Context(logits, labels=labels))
    torch.testing.assert_close(got.loss, F.cross_entropy(logits[::2], labels[::2]))


def test_few_labels_of_each_class():
    pytest.importorskip("sklearn")
    from kdfast.data.digit_turns import turn_splits

    splits = turn_splits(0, per_class=7)
    labels = splits["student"].tensors["labels"]
    assert len(labels) == 1300 and labels[labels != -100].bincount().tolist() == [7] * 10
    assert len(splits["val"]) == 200 and len(splits["test"]) == 297


def test_experiment_runs_and_resumes(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("accelerate")
    from benchmarks.experiments import rotnet

    out, options = tmp_path / "rotnet.json", {"seeds": 1, "steps": 4, "probe_steps": 3, "counts": (5,)}
    results = rotnet.run(out, work=tmp_path / "work", **options)
    assert len(results["sentences"]) == 6 and set(results["accuracy"]) == set(rotnet.NETWORKS)
    assert rotnet.run(out, work=tmp_path / "none", **options) == json.loads(out.read_text())
    out.unlink()
    assert rotnet.run(out, work=tmp_path / "work", **options)["accuracy"] == results["accuracy"]
