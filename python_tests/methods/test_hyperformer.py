"""HyperFormer: the smoothed loss, the interaction, the encoder's masks, the whole model and its training step."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdfast.data.statements import MASK, PAD, SPECIALS
from kdfast.methods import Context, load
from kdfast.methods.hyperformer import (
    COMBINATIONS,
    FeedForward,
    FuseNet,
    HyperFormer,
    PairInteraction,
    chequer_permutation,
    combine_pair,
    hyperformer_loss,
    label_smoothing_cross_entropy,
)  # fmt: skip

DOUBLE = torch.float64


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_smoothed_loss_equals_the_dense_target(smoothing):
    z = torch.randn(5, 7, dtype=DOUBLE, requires_grad=True)
    target = torch.randint(7, (5,))
    dense = torch.full((5, 7), smoothing / 6, dtype=DOUBLE).scatter(1, target.unsqueeze(1), 1 - smoothing)
    want = -(dense * z.log_softmax(-1)).sum(1)
    got = label_smoothing_cross_entropy(z, target, smoothing, reduction="none")
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(label_smoothing_cross_entropy(z, target, smoothing), want.mean())
    assert torch.autograd.gradcheck(lambda z: label_smoothing_cross_entropy(z, target, smoothing), z)
    if smoothing == 0:
        torch.testing.assert_close(got, F.cross_entropy(z, target, reduction="none"))


def test_chequer_permutation_alternates():
    p = chequer_permutation(8, 2, 3, count=2, generator=torch.Generator().manual_seed(0))
    assert p.shape == (2, 12)
    second = (p >= 8).int()
    assert second[0].tolist() == [0, 1, 0, 1, 1, 0, 1, 0, 0, 1, 0, 1]  # rows of 2 pairs, swapped in odd rows
    assert torch.equal(second[1], 1 - second[0])
    assert all(len(set(row.tolist())) == 12 for row in p)


def test_several_permutations_share_the_filters():
    torch.manual_seed(0)
    pair = (
        PairInteraction(
            8, kernel_width=2, kernel_height=3, channels=3, kernel_size=3, permutations=2, dropouts=(0, 0, 0)
        )
        .double()
        .eval()
    )
    assert pair.conv_filt.shape == (3, 1, 3, 3) and pair.fc2.in_features == 12 * 3 * 2
    a, b = torch.randn(4, 8, dtype=DOUBLE), torch.randn(4, 8, dtype=DOUBLE)
    first, second = pair(a, b)
    grids = torch.cat((a, b), -1)[:, pair.permutation].view(4, 2, 4, 3) / (1 + 1e-5) ** 0.5
    maps = [F.conv2d(F.pad(grids[:, r : r + 1], (1, 1, 1, 1), mode="circular"), pair.conv_filt) for r in range(2)]
    hidden = torch.relu(torch.cat(maps, 1) / (1 + 1e-5) ** 0.5).flatten(1)
    want = pair.fc2(hidden) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(torch.cat((first, second), 1), want)
    assert "permutation" in pair.state_dict()  # the authors' code loses it on reload


def test_fuse_stays_between_its_inputs():
    fuse = FuseNet(5)
    p, q = torch.randn(3, 5), torch.randn(3, 5)
    g = torch.sigmoid(F.linear(p + q, fuse.linear.weight) + 2 * fuse.linear.bias)
    torch.testing.assert_close(fuse(p, q), g * p + (1 - g) * q)


def test_pairs():
    r, e = torch.randn(2, 4), torch.randn(2, 4)
    torch.testing.assert_close(combine_pair(r, e, "dismult"), r * e)
    torch.testing.assert_close(combine_pair(r, e, "sum"), r + e)
    product = torch.complex(r[:, :2], r[:, 2:]) * torch.complex(e[:, :2], e[:, 2:])
    torch.testing.assert_close(combine_pair(r, e, "complex"), torch.cat((product.real, product.imag), 1))
    phase = torch.pi * r / 0.02
    torch.testing.assert_close(combine_pair(r, e, "rotate"), e * torch.cat((phase[:, :2].cos(), phase[:, 2:].sin()), 1))


def tiny(**options):
    torch.manual_seed(0)
    sizes = dict(width=16, layers=2, heads=2, num_experts=4, top_k=2, d_hidden=8)
    small = dict(kernel_width=3, kernel_height=4, channels=2, kernel_size=3)
    return HyperFormer(20, 3, **(sizes | dict(interaction=small) | options))


def batch_of(rows=6, padded=1, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def entities(*shape):
        return torch.randint(SPECIALS, SPECIALS + 20, shape, generator=generator)

    def relations(*shape):
        return torch.randint(SPECIALS + 20, SPECIALS + 26, shape, generator=generator)

    def statement(*shape, pairs):
        parts = [entities(*shape, 1), relations(*shape, 1), torch.full((*shape, 1), MASK)]
        for _ in range(pairs):
            parts += [relations(*shape, 1), entities(*shape, 1)]
        return torch.cat(parts, -1)

    ids = torch.cat((statement(rows, pairs=1), torch.full((rows, 2 * padded), PAD)), -1)
    qualifiers = torch.stack((relations(rows, 2), entities(rows, 2), torch.full((rows, 2), MASK)), -1)
    return {"ids": ids, "neighbours": statement(rows, 3, pairs=2), "qualifiers": qualifiers, "labels": entities(rows)}


def outputs(model, batch):
    return model(batch["ids"], batch["neighbours"], batch["qualifiers"])


@pytest.mark.parametrize("qualifiers", COMBINATIONS)
def test_shapes_and_gradients_of_every_pass(qualifiers):
    model, batch = tiny(qualifiers=qualifiers), batch_of()
    logits = outputs(model, batch)
    vocabulary = SPECIALS + 20 + 2 * 3
    shapes = {"pass1": (6, vocabulary), "pass2": (6, vocabulary), "neighbours": (6, 3, vocabulary)}
    if qualifiers == "encoder":
        shapes["qualifiers"] = (6, 2, vocabulary)
    assert {name: tuple(t.shape) for name, t in logits.items()} == shapes
    loss, parts = hyperformer_loss(logits, batch["labels"], batch["ids"][:, 0], batch["ids"][:, 1])
    weights = {"pass1": 1.0, "pass2": 1.0, "neighbours": 0.5, "qualifiers": 0.25}
    torch.testing.assert_close(loss.detach(), sum(weights[n] * p for n, p in parts.items()))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_pass_one_alone_for_validation():
    model, batch = tiny().eval(), batch_of()
    alone = model(batch["ids"])
    assert set(alone) == {"pass1"}
    torch.testing.assert_close(alone["pass1"], outputs(model, batch)["pass1"])


def test_padding_is_masked_in_pass_one_only():
    short, long = batch_of(padded=0), batch_of(padded=2)
    model = tiny().eval()
    a, b = outputs(model, short), outputs(model, long)
    torch.testing.assert_close(a["pass1"], b["pass1"])
    assert (a["pass2"] - b["pass2"]).abs().max() > 1e-6
    model.mask_padding = True
    torch.testing.assert_close(outputs(model, short)["pass2"], outputs(model, long)["pass2"])


def test_no_position_matters_but_the_mask():
    """Without positional encoding, swapping two qualifier pairs changes nothing in pass 1."""
    model, batch = tiny().eval(), batch_of()
    ids = torch.cat((batch["ids"][:, :5], batch["ids"][:, 3:5].flip(0)), 1)
    swapped = ids[:, [0, 1, 2, 5, 6, 3, 4]]
    torch.testing.assert_close(model(ids)["pass1"], model(swapped)["pass1"])


def test_second_pass_uses_neighbours_and_qualifiers():
    model, batch = tiny().eval(), batch_of()
    other = batch_of(seed=1)
    base = outputs(model, batch)["pass2"]
    for name in ("neighbours", "qualifiers"):
        assert (outputs(model, batch | {name: other[name]})["pass2"] - base).abs().max() > 1e-7


def test_equal_active_width():
    moe, dense = FeedForward(16, 8, 4, 2), FeedForward(16, 8, 0, 2)
    assert dense.moe[0].out_features == 16 and moe.moe.w1.shape == (4, 8, 16)
    x = torch.randn(3, 5, 16)
    assert moe(x).shape == dense(x).shape == x.shape
    logits = FeedForward(16, 8, 4, 2, combine="logits")
    assert logits.moe.route_options["score"] == "logits"


def test_training_step():
    torch.manual_seed(0)
    model, batch, method = tiny(embedding_dropout=0.1), batch_of(rows=12), load("hyperformer")(smoothing=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss, parts = method(Context(outputs(model, batch), labels=batch["labels"], batch=batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert set(parts) == {"pass1", "pass2", "neighbours"} and losses[-1] < 0.7 * losses[0]
    scores = model.eval()(batch["ids"])["pass1"]
    first = batch["ids"][:, :2].unique(dim=0, return_inverse=True)[1]
    alone = [i for i in range(12) if (first == first[i]).sum() == 1]
    assert (scores.argmax(1) == batch["labels"])[alone].float().mean() > 0.3  # chance: 1 in 33


def test_state_dict_round_trip_keeps_the_permutation():
    model = tiny().eval()
    other = tiny(
        interaction=dict(kernel_width=3, kernel_height=4, channels=2, kernel_size=3, permutation=torch.arange(24)[None])
    ).eval()
    batch = batch_of()
    assert not torch.equal(outputs(model, batch)["pass2"], outputs(other, batch)["pass2"])
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(outputs(model, batch)["pass2"], outputs(other, batch)["pass2"])


def test_initialisation_is_the_authors():
    table = HyperFormer(50, 2, width=400, layers=1, num_experts=2, d_hidden=4).table
    assert table.abs().max() <= 0.02 and table.std().item() == pytest.approx(0.04 / 12**0.5, rel=0.05)
    assert isinstance(tiny().norm, nn.LayerNorm)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: label_smoothing_cross_entropy(torch.randn(2, 3), torch.tensor([0, 1]), 1.0), r"smoothing: expected a number in \[0, 1\)"),
        (lambda: label_smoothing_cross_entropy(torch.randn(2, 1), torch.tensor([0, 0])), "V >= 2"),
        (lambda: HyperFormer(5, 2, width=15, heads=2), "width: expected a multiple of heads"),
        (lambda: PairInteraction(8, kernel_width=3, kernel_height=3), "expected a product of at most 8"),
        (lambda: PairInteraction(16, kernel_width=2, kernel_height=2, kernel_size=4), "kernel_size: expected an odd"),
        (lambda: tiny(top_k=5), "top_k: expected at most num_experts"),
        (lambda: tiny(qualifiers="mean"), "qualifiers: expected one of"),
        (lambda: tiny()(batch_of()["ids"][:, :2]), "ids: expected integers"),
        (lambda: tiny()(batch_of()["ids"].flip(1)), "ids: expected MASK"),
        (lambda: tiny()(batch_of()["ids"] * 0 + 99), r"ids: expected tokens in \[0, 33\)"),
        (lambda: outputs(tiny(), batch_of() | {"neighbours": torch.zeros(6, 0, 7, dtype=torch.long)}), "M >= 1"),
        (lambda: outputs(tiny(), batch_of(rows=1)), "at least 2 rows in training"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
