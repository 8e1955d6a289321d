"""Graph networks by their definitions on dense matrices: GCN, GraphSAGE, GAT, APPNP; the MLP leaves the edges alone."""

import pytest
import torch
import torch.nn.functional as F

from kdfast.nn.graph import APPNP, GAT, GCN, GraphSAGE, NodeMLP, edge_softmax, gather_neighbours, symmetric_weights

F64 = torch.float64
EDGES = torch.tensor([[0, 1, 1, 2, 3, 0], [1, 0, 2, 1, 0, 3]])  # a path 3 - 0 - 1 - 2, node 4 alone


def dense():
    a = torch.zeros(5, 5, dtype=F64)
    a[EDGES[0], EDGES[1]] = 1
    return a + torch.eye(5, dtype=F64)


def features():
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=F64)


def make(kind, **options):
    torch.manual_seed(0)
    return kind(3, 4, hidden=6, **options).double().eval()


def test_gcn():
    net, a, x = make(GCN), dense(), features()
    degree = a.sum(1)
    mean = a / (degree.unsqueeze(1) * degree).sqrt()
    first, second = net.layers
    h = torch.relu(mean @ x @ first.weight.T + first.bias)
    torch.testing.assert_close(net(x, EDGES), mean @ h @ second.weight.T + second.bias)


def test_graphsage_is_a_mean_with_itself():
    net, a, x = make(GraphSAGE, num_layers=3), dense(), features()
    mean, h = a / a.sum(1, keepdim=True), x
    for i, layer in enumerate(net.layers):
        h = layer(mean @ h)
        h = torch.relu(h) if i < 2 else h
    torch.testing.assert_close(net(x, EDGES), h)


def test_appnp():
    net, a, x = make(APPNP, k=3, alpha=0.2), dense(), features()
    degree = a.sum(1)
    mean = a / (degree.unsqueeze(1) * degree).sqrt()
    h = z = net.layers[1](torch.relu(net.layers[0](x)))
    for _ in range(3):
        z = 0.8 * mean @ z + 0.2 * h
    torch.testing.assert_close(net(x, EDGES), z)
    assert torch.equal(make(APPNP, k=0)(x, EDGES), h)


def test_gat():
    net, a, x = make(GAT, heads=2), dense(), features()
    h = x
    for layer, last in zip(net.layers, (False, True)):
        wh = layer.linear(h).unflatten(-1, (layer.heads, -1))
        scores = (wh * layer.own).sum(-1).unsqueeze(1) + (wh * layer.other).sum(-1).unsqueeze(0)  # [i, j, heads]
        scores = F.leaky_relu(scores, 0.2).masked_fill(a.unsqueeze(-1) == 0, -torch.inf)
        h = torch.einsum("ijh,jhd->ihd", scores.softmax(1), wh) + layer.bias
        h = h.squeeze(1) if last else torch.relu(h).flatten(1)
    torch.testing.assert_close(net(x, EDGES), h)
    with pytest.raises(ValueError, match="heads: expected a divisor of the hidden width 6, got 4"):
        GAT(3, 4, hidden=6, heads=4)


def test_softmax_over_the_edges_of_a_node():
    scores = torch.tensor([1.0, 2.0, 3.0, 400.0, 5.0, 6.0], dtype=F64, requires_grad=True)
    got = edge_softmax(scores, EDGES, 5)
    torch.testing.assert_close(got[[1, 2]], scores[[1, 2]].softmax(0))
    torch.testing.assert_close(got[[0, 5]], scores[[0, 5]].softmax(0))
    assert got[3] == 1 and torch.autograd.gradcheck(lambda s: edge_softmax(s, EDGES, 5), scores)


def test_dropout_is_on_while_training():
    x = features()
    for kind in (GCN, GraphSAGE, GAT, APPNP, NodeMLP):
        torch.manual_seed(0)
        net = kind(3, 4, hidden=8).double().train()
        assert not torch.equal(net(x, EDGES), net(x, EDGES))
        net.eval()
        assert net(x, EDGES).shape == (5, 4) and torch.equal(net(x, EDGES), net(x, EDGES))


def test_messages_go_from_the_second_end_to_the_first():
    h = torch.eye(3)
    one = torch.tensor([[0], [2]])
    assert gather_neighbours(h, one, torch.tensor([2.0])).tolist() == [[0, 0, 2], [0, 0, 0], [0, 0, 0]]
    assert symmetric_weights(EDGES, 5)[2] == pytest.approx(1 / 2**0.5)  # 1 has two edges, 2 has one
    mlp = make(NodeMLP)
    assert torch.equal(mlp(features()), mlp(features(), EDGES))
    assert len(make(NodeMLP, num_layers=1).layers) == 1
