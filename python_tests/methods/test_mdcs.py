"""MDCS: the written-out loss, priors of any size, who teaches, the ramp over the epochs, the experts, state, by name."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from kdfast import methods
from kdfast.methods.mdcs import (
    CosineClassifier,
    MultiExpert,
    consistency_loss,
    consistency_weight,
    mdcs_loss,
    prior_offsets,
    small_experts,
)

F64 = torch.float64
COUNTS = torch.tensor([500, 60, 12, 4])


def example(rows=12, classes=4, experts=3, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(experts, 2 * rows, classes, generator=generator, dtype=F64)
    labels = torch.randint(classes, (rows,), generator=generator)
    return logits.requires_grad_(), labels


@pytest.mark.parametrize("on", ["adjusted", "raw"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_total_is_the_written_out_formula(on, temperature):
    v, y = example()
    options = {"class_counts": COUNTS, "epoch": 7, "consistency_on": on, "temperature": temperature}
    loss, parts = mdcs_loss(v, y, **options)
    diversity, consistency = 0.0, 0.0
    for m, power in enumerate((-0.5, 1.0, 2.5)):
        u = v[m] + (COUNTS.double() ** power + 1e-9).log()
        diversity = diversity + F.cross_entropy(u, torch.cat((y, y)))
        z = (u if on == "adjusted" else v[m]) / temperature
        p, q = z[:12].softmax(-1).detach(), z[12:].log_softmax(-1)
        keep = p.argmax(-1) == y
        assert parts[f"num_confident_{m}"] == keep.sum() and 0 < keep.sum() < 12
        consistency = consistency + temperature**2 * (p * (p.log() - q)).sum(-1)[keep].mean()
    want = diversity + 0.6 * 7 / 20 * consistency
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, v), torch.autograd.grad(want, v))
    torch.testing.assert_close([parts["diversity"], parts["consistency"]], [diversity.detach(), consistency.detach()])
    torch.testing.assert_close(mdcs_loss(list(v), y, **options).loss, want)  # a list of experts


def test_only_strong_views_learn_from_the_consistency_and_only_where_the_weak_view_is_right():
    v, y = example()
    loss, count = consistency_loss(v, y)
    (grad,) = torch.autograd.grad(loss, v)
    right = v[:, :12].argmax(-1) == y
    assert torch.equal(count, right.sum(1)) and not grad[:, :12].any()
    assert torch.equal(grad[:, 12:].abs().sum(-1) > 0, right)
    p, q = v[:, :12].softmax(-1), v[:, 12:].softmax(-1)
    torch.testing.assert_close(grad[:, 12:][right], ((q - p) / count.view(-1, 1, 1))[right])


def test_no_confident_row_gives_exact_zero():
    v, _ = example(rows=3)
    wrong = v[0, :3].argmin(-1)
    loss, count = consistency_loss(v[:1], wrong)
    assert count.tolist() == [0] and loss.item() == 0 and not torch.autograd.grad(loss, v)[0].any()
    tied = torch.zeros(1, 2, 3, dtype=F64)  # the first class wins a tie
    assert consistency_loss(tied, torch.tensor([0]))[1].tolist() == [1]
    assert consistency_loss(tied, torch.tensor([1]))[1].tolist() == [0]


def test_offsets_of_large_counts_and_small_eps():
    n = torch.tensor([10**6, 84, 3, 1])
    got = prior_offsets(n, (-0.5, 1.0, 2.5, 0.0))
    want = torch.stack([(n.double() ** a + 1e-9).log() for a in (-0.5, 1.0, 2.5, 0.0)])
    torch.testing.assert_close(got, want, rtol=1e-14, atol=2e-16)  # 1 + 1e-9 is rounded in the written-out form
    assert prior_offsets(torch.tensor([10**9]), [40.0]).item() == pytest.approx(40 * 9 * math.log(10))  # n^a overflows
    half = mdcs_loss(
        torch.zeros(1, 2, 4, dtype=torch.bfloat16), torch.tensor([3]), class_counts=n, epoch=1, powers=[2.5]
    )
    assert half.loss.dtype == torch.float32 and half.loss.item() == pytest.approx(2.5 * math.log(10**6), abs=1e-3)


def test_ramp():
    assert [consistency_weight(e) for e in (0, 1, 10, 20, 400)] == pytest.approx([0, 0.03, 0.3, 0.6, 0.6])
    v, y = example()
    totals = [mdcs_loss(v, y, class_counts=COUNTS, epoch=e).loss for e in (0, 5, 10)]
    torch.testing.assert_close(totals[2] - totals[1], totals[1] - totals[0])
    assert totals[1] > totals[0] == mdcs_loss(v, y, class_counts=COUNTS, epoch=9, kd_weight=0.0).loss


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(3, 5, 4)}, r"expert_logits: expected \[M, 2B, C\]"),
        ({"v": torch.zeros(3, 6, 4)}, "labels: expected shape"),
        ({"v": torch.zeros(3, 4, 4, dtype=torch.long)}, "expert_logits: expected float16"),
        ({"class_counts": COUNTS[:3]}, "class_counts: expected 4 counts"),
        ({"class_counts": COUNTS - 4}, "class_counts: expected counts > 0"),
        ({"labels": torch.tensor([0, 4])}, r"labels: expected integers in \[0, 4\), got 4 at row 1"),
        ({"labels": torch.tensor([0, -100])}, r"labels: expected integers in \[0, 4\)"),
        ({"powers": (1.0, 2.0)}, "powers: expected one for each of 3 experts, got 2"),
        ({"ramp_epochs": 0}, "ramp_epochs: expected a finite number in"),
        ({"epoch": -1}, "epoch: expected a finite number"),
        ({"consistency_on": "both"}, "consistency_on: expected one of adjusted, raw"),
    ],
    ids=str,
)
def test_bad_input(change, message):
    given = {"v": torch.zeros(3, 4, 4), "labels": torch.tensor([0, 1]), "class_counts": COUNTS, "epoch": 1} | change
    with pytest.raises((ValueError, TypeError), match=message):
        mdcs_loss(given.pop("v"), given.pop("labels"), **given)


# ---------------------------------------------------------------- the experts, by name
def test_cosine_classifier_sees_directions_only():
    torch.manual_seed(0)
    layer, x = CosineClassifier(5, 3), torch.randn(4, 5)
    want = 30 * F.cosine_similarity(x.unsqueeze(1), layer.weight, dim=-1)
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(layer(7 * x), want)


def test_experts_share_the_stem_and_are_averaged_in_evaluation():
    torch.manual_seed(0)
    model, x = small_experts(1, 10, 3), torch.randn(4, 1, 8, 8)
    assert isinstance(model, MultiExpert) and not torch.equal(model.experts[0][0].weight, model.experts[1][0].weight)
    logits = model(x)
    assert logits.shape == (3, 4, 10)
    torch.testing.assert_close(model.eval()(x), logits.mean(0))


def test_by_name_counts_the_classes_and_follows_the_epochs():
    method = methods.load("mdcs")(epochs=40)
    v, y = example()
    labels = torch.tensor([0, 0, 1, 2, 3, 3, 3])
    contexts = [methods.Context(torch.zeros(2, 4), labels=part) for part in labels.split(2)]
    method.start(methods.Setup(torch.nn.Identity(), None, lambda split: iter(contexts)))
    assert method.class_counts.tolist() == [2, 1, 1, 3]
    for step, epoch in ((0, 1), (24, 1), (25, 2), (999, 40)):
        got = method(methods.Context(v, labels=y, step=step, total_steps=1000)).loss
        assert got == mdcs_loss(v, y, class_counts=method.class_counts, epoch=epoch).loss
    again = methods.load("mdcs")(epochs=40)
    again.load_state_dict(method.state_dict())
    assert torch.equal(again.class_counts, method.class_counts)
    again.start(methods.Setup(torch.nn.Identity(), None, lambda split: iter(()), step=1))  # nothing is counted again


def test_a_class_without_an_image_is_refused_before_training():
    method = methods.load("mdcs")()
    contexts = [methods.Context(torch.zeros(2, 3), labels=torch.tensor([0, 1]))]
    with pytest.raises(ValueError, match="class_counts: expected counts > 0 of every class"):
        method.start(methods.Setup(torch.nn.Identity(), None, lambda split: iter(contexts)))


# ---------------------------------------------------------------- the experiment
def test_experiment_runs_resumes_and_scores_each_expert(tmp_path):
    pytest.importorskip("sklearn")
    from benchmarks.experiments import mdcs

    out = tmp_path / "results" / "mdcs.json"
    results = mdcs.run(out, seeds=2, steps=4, work=tmp_path / "work")
    assert list(results["arms"]) == ["ce", "adjusted", "diversity", "mdcs"] and len(results["sentences"]) == 8
    measures = results["arms"]["mdcs"]["measures"]
    assert set(measures) == {"few"} | {f"{c}_{m}" for c in ("rare", "frequent") for m in range(3)}
    assert len(measures["few"]) == 2 and set(results["arms"]["ce"]["measures"]) == {"few", "rare_0", "frequent_0"}
    assert mdcs.run(out, seeds=2, work=tmp_path / "elsewhere") == json.loads(out.read_text())
