"""SparseMoE: equal to the dense mixture, usable in a model, its options and its losses."""

import copy
import pickle

import pytest
import torch
from torch import nn

from kdfast.losses import importance_load_loss, load_balancing_loss, router_z_loss
from kdfast.nn import SparseMoE, moe_losses
from kdfast.ops import dense_weights, noisy_logits, route_topk

DOUBLE = torch.float64


def layer_of(**options):
    torch.manual_seed(0)
    return SparseMoE(6, 10, num_experts=5, **options).double()


def dense_forward(layer, x, ids_kept=None):
    """Every expert on every row, weighted by the dense weights."""
    routing = route_topk(layer.gate(x), layer.top_k, **layer.route_options)
    if ids_kept is not None:
        routing = routing._replace(ids=torch.where(ids_kept, routing.ids, -1))
    act = nn.functional.silu if layer.activation == "silu" else torch.relu
    y = torch.zeros_like(x)
    for e in range(layer.num_experts):
        hidden = act(x @ layer.w1[e].T + layer.b1[e])
        if layer.w3 is not None:
            hidden = hidden * (x @ layer.w3[e].T)
        y = y + dense_weights(routing)[:, e : e + 1] * (hidden @ layer.w2[e].T + layer.b2[e])
    return y


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(score="softmax"),
        dict(score="sigmoid", normalise=1.0, route_scale=2.5, activation="silu", gated=True),
        dict(top_k=5),
    ],
)
def test_equals_the_dense_mixture_with_gradients(options):
    layer = layer_of(**options)
    x = torch.randn(11, 6, dtype=DOUBLE, requires_grad=True)
    inputs = [x, *(p for name, p in layer.named_parameters())]
    got, want = layer(x), dense_forward(layer, x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad((got * cotangent).sum(), inputs), torch.autograd.grad((want * cotangent).sum(), inputs)
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        assert b.abs().max() > 0


def test_any_leading_shape_and_mask():
    layer = layer_of()
    x = torch.randn(2, 3, 6, dtype=DOUBLE)
    torch.testing.assert_close(layer(x).reshape(6, 6), layer(x.reshape(6, 6)))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    y = layer(x, mask=mask)
    torch.testing.assert_close(y[mask], layer(x[mask]))
    assert (y[~mask] == 0).all()
    assert layer(x[:0]).shape == (0, 3, 6)


@pytest.mark.parametrize("priority", ["token", "choice"])
def test_capacity_drops(priority):
    layer = layer_of(capacity_factor=0.5, priority=priority)  # C = ceil(0.5 * 2 * 20 / 5) = 4
    x = torch.randn(20, 6, dtype=DOUBLE)
    ids = route_topk(layer.gate(x), 2).ids.long()
    seen, kept = [0] * 5, torch.zeros(20, 2, dtype=torch.bool)
    slots = [(n, j) for n in range(20) for j in range(2)]
    for n, j in slots if priority == "token" else sorted(slots, key=lambda s: (s[1], s[0])):
        kept[n, j] = seen[ids[n, j]] < 4
        seen[ids[n, j]] += 1
    assert (~kept).sum() > 0
    torch.testing.assert_close(layer(x), dense_forward(layer, x, kept), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gated", [False, True])
def test_shared_experts_see_every_row(gated):
    layer = layer_of(num_shared=2, gated=gated, balance=None)
    x = torch.randn(4, 6, dtype=DOUBLE)
    hidden = torch.relu(layer.shared_in(x)) * (layer.shared_gate(x) if gated else 1)
    assert layer.shared_in.out_features == 20
    torch.testing.assert_close(layer(x), dense_forward(layer, x) + layer.shared_out(hidden))
    assert (layer(x, mask=torch.zeros(4, dtype=torch.bool)) == layer.shared_out(hidden)).all()


def test_losses_of_a_model():
    torch.manual_seed(0)
    model = nn.Sequential(
        SparseMoE(6, 8, 5, balance_weight=0.5, z_weight=0.1), nn.ReLU(), SparseMoE(6, 8, 5, balance_weight=0.5)
    ).double()
    x = torch.randn(12, 6, dtype=DOUBLE)
    model(x)
    loss, parts = moe_losses(model)
    first = model[0].gate(x)
    second = model[2].gate(torch.relu(model[0](x)))
    balance = [load_balancing_loss(route_topk(z, 2)) for z in (first, second)]
    torch.testing.assert_close(loss, 0.5 * (balance[0] + balance[1]) + 0.1 * router_z_loss(first))
    torch.testing.assert_close(parts["balance"], torch.stack(balance).mean())
    loss.backward()
    assert all(layer.gate.weight.grad.abs().sum() > 0 for layer in (model[0], model[2]))
    model.eval()(x)
    assert moe_losses(model).loss.item() == 0.0 and moe_losses(nn.Linear(2, 2)).loss.item() == 0.0


def test_copies_and_pickles_after_a_forward_pass():
    layer = layer_of()
    x = torch.randn(4, 6, dtype=DOUBLE)
    y = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.aux_loss is None and torch.equal(twin(x), y)
    assert set(layer.state_dict()) == {"gate.weight", "gate.bias", "w1", "b1", "w2", "b2"}


def test_noise():
    layer = layer_of(noise="normal", balance="importance_load", balance_weight=1.0)
    nn.init.normal_(layer.noise_gate.weight)
    x = torch.randn(9, 6, dtype=DOUBLE)
    draws = torch.randn(9, 5, dtype=DOUBLE)
    with pytest.raises(ValueError, match="generator"):
        layer(x)
    layer(x, noise=draws)
    z = layer.gate(x)
    noisy, std = noisy_logits(z, layer.noise_gate(x), noise=draws)
    want = importance_load_loss(route_topk(noisy, 2), logits=z, noisy_logits=noisy, std=std)
    torch.testing.assert_close(layer.aux_loss, want)
    torch.testing.assert_close(layer.eval()(x), dense_forward(layer, x))
    for kind in ("jitter", "second_choice"):
        noisy_layer = layer_of(noise=kind, jitter_amount=0.5)
        runs = [noisy_layer(x, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2, 3, 4)]
        assert torch.equal(runs[0], runs[1]) and any(not torch.equal(runs[0], r) for r in runs[2:])


def test_selection_bias_moves_towards_balance():
    layer = layer_of(selection_bias=True, balance=None, score="sigmoid", normalise=1.0)
    x = torch.randn(200, 6, dtype=DOUBLE)
    with torch.no_grad():
        layer.gate.bias[0] = 3.0  # everybody wants expert 0
    spread = []
    for _ in range(400):
        layer(x)
        spread.append(int(layer.load.max() - layer.load.min()))
        load = layer.load.double()
        before = layer.selection_bias.clone()
        layer.update_selection_bias(gamma=0.01)
        torch.testing.assert_close(layer.selection_bias - before, 0.01 * torch.sign(load.mean() - load))
    assert max(spread[-10:]) < 0.2 * spread[0]
    assert "selection_bias" in layer.state_dict() and (layer.load == 0).all()
    with pytest.raises(ValueError, match="selection_bias"):
        layer_of().update_selection_bias()


def test_dropout_only_in_training():
    layer = layer_of(dropout=0.5)
    x = torch.randn(6, 6, dtype=DOUBLE)
    assert not torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer.eval()(x), dense_forward(layer, x))


def test_autocast_runs_experts_in_bf16_and_the_router_in_float32():
    torch.manual_seed(0)
    layer = SparseMoE(16, 32, 8)
    x = torch.randn(20, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and layer.w1.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.02)


def test_skip_zero():
    layer = layer_of(score="softmax", skip_zero=True)
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.bias.copy_(torch.tensor([0.0, -5000.0, -5000.0, -5000.0, -5000.0]))
        layer.w1[1] = torch.nan  # selected with weight exactly 0: must not be run
    assert torch.isfinite(layer(torch.randn(3, 6, dtype=DOUBLE))).all()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(top_k=6), "top_k: expected at most num_experts"),
        (dict(top_k=0), "top_k: expected an int >= 1"),
        (dict(activation="tanh"), "activation: expected one of"),
        (dict(capacity_factor=-1.0), "capacity_factor: expected"),
        (dict(balance="loads"), "balance: expected one of"),
        (dict(noise="gauss"), "noise: expected one of"),
        (dict(noise="second_choice", top_k=3), "needs top_k=2"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SparseMoE(6, 10, 5, **options)
    with pytest.raises(ValueError, match="x: expected 6 features"):
        layer_of()(torch.randn(3, 5, dtype=DOUBLE))
