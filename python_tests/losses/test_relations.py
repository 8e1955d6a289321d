"""Token losses: what they are of the ops, reductions, shapes, who gets a gradient, twins, errors."""

import pickle

import pytest
import torch

from kdfast.losses import (
    TokenContextLoss,
    TokenContrastLoss,
    TokenGraphLoss,
    token_context_loss,
    token_contrast_loss,
    token_graph_loss,
)
from kdfast.ops import pairwise_infonce, relation_mse, token_graph_kl

F64 = torch.float64
LOSSES = [
    (token_graph_loss, TokenGraphLoss, {"k": 3}),
    (token_contrast_loss, TokenContrastLoss, {"tau": 0.2}),
    (token_context_loss, TokenContextLoss, {}),
]
IDS = ["graph", "contrast", "context"]


def tokens(seed=0, shape=(2, 5, 4), dtype=F64):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g, dtype=F64).to(dtype).requires_grad_() for _ in range(2))


def test_graph_loss_is_the_mean_row_of_one_graph_over_all_images():
    s, t = tokens()
    rows = token_graph_kl(s.reshape(10, 4), t.reshape(10, 4), k=3, normalize=True)
    torch.testing.assert_close(token_graph_loss(s, t, k=3), rows.mean())
    torch.testing.assert_close(token_graph_loss(s, t, k=3, reduction="none"), rows.reshape(2, 5))
    edges = torch.tensor([[0, 1, 9], [1, 2, 0]])
    want = token_graph_kl(s.reshape(10, 4), t.reshape(10, 4), edges=edges).sum()
    torch.testing.assert_close(token_graph_loss(s, t, k=None, edges=edges, normalize=False, reduction="sum"), want)


def test_normalize_is_the_default_because_raw_distances_underflow():
    s, t = (100 * x for x in tokens())
    assert token_graph_loss(s, t, k=3, normalize=False) == 0
    assert token_graph_loss(s, t, k=3) > 1e-6
    torch.testing.assert_close(token_graph_loss(s, t, k=3), token_graph_loss(s / 7, t, k=3))


def test_contrast_loss_is_infonce_of_flattened_tokens():
    s, t = tokens()
    rows = pairwise_infonce(s.reshape(10, 4), t.reshape(10, 4), tau=0.2)
    torch.testing.assert_close(token_contrast_loss(s, t, tau=0.2), rows.mean())
    assert token_contrast_loss(s[:1, :1], t[:1, :1]) == 0


def test_context_loss_is_a_mean_over_pairs():
    s, t = tokens()
    torch.testing.assert_close(token_context_loss(s, t), relation_mse(s, t).sum() / (2 * 5 * 5))
    torch.testing.assert_close(token_context_loss(s, t, reduction="none"), relation_mse(s, t) / 5)
    torch.testing.assert_close(token_context_loss(s, t, reduction="sum"), relation_mse(s, t).sum())
    off = relation_mse(s, t, diagonal=False).sum() / (2 * 5 * 4)
    torch.testing.assert_close(token_context_loss(s, t, diagonal=False), off)


def test_context_loss_of_cosines_is_the_region_term_of_mgd():
    s, t = tokens()
    a, b = (torch.nn.functional.normalize(x, dim=-1) for x in (s, t))
    want = (a @ a.mT - b @ b.mT).square().mean()
    torch.testing.assert_close(token_context_loss(s, t, relation="gram", similarity="cosine"), want)


def test_context_mask_counts_kept_pairs():
    s, t = tokens()
    mask = torch.tensor([[True, True, False, True, False], [False] * 5])
    alone = token_context_loss(s[:1, [0, 1, 3]], t[:1, [0, 1, 3]])
    torch.testing.assert_close(token_context_loss(s, t, mask=mask), alone)
    rows = token_context_loss(s, t, mask=mask, reduction="none")
    torch.testing.assert_close(rows.sum() / 3, alone)
    nothing = token_context_loss(s, t, mask=torch.zeros_like(mask))
    nothing.backward()
    assert nothing == 0 and bool((s.grad == 0).all())
    assert token_context_loss(s, t, mask=mask & (torch.arange(5) == 0), diagonal=False) == 0  # one token, no pair


@pytest.mark.parametrize("function, twin, options", LOSSES, ids=IDS)
def test_reductions_and_weight(function, twin, options):
    s, t = tokens()
    rows = function(s, t, reduction="none", **options)
    assert rows.shape == (2, 5)
    torch.testing.assert_close(function(s, t, **options), rows.mean())
    if function is not token_context_loss:
        torch.testing.assert_close(function(s, t, reduction="sum", **options), rows.sum())
        weight = torch.linspace(0, 2, 10, dtype=F64).reshape(2, 5)
        torch.testing.assert_close(function(s, t, weight=weight, **options), (rows * weight).mean())


@pytest.mark.parametrize("function, twin, options", LOSSES, ids=IDS)
def test_teacher_is_detached_unless_asked(function, twin, options):
    s, t = tokens()
    function(s, t, **options).backward()
    assert t.grad is None and s.grad.abs().max() > 0
    alone = s.grad.clone()
    s.grad = None
    function(s, t, teacher_grad=True, **options).backward()
    torch.testing.assert_close(s.grad, alone)
    assert t.grad.abs().max() > 0


@pytest.mark.parametrize("function, twin, options", LOSSES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(function, twin, options, dtype):
    s, t = tokens(dtype=dtype)
    loss = function(s, t, **options)
    assert loss.dtype == torch.float32
    loss.backward()
    assert s.grad.dtype == dtype and bool(s.grad.isfinite().all())
    torch.testing.assert_close(loss.double(), function(s.double(), t.double(), **options), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("function, twin, options", LOSSES, ids=IDS)
def test_twin(function, twin, options):
    s, t = tokens()
    module = pickle.loads(pickle.dumps(twin(reduction="sum", **options)))
    torch.testing.assert_close(module(s, t), function(s, t, reduction="sum", **options))
    torch.testing.assert_close(module(s, t, reduction="mean"), function(s, t, **options))
    with pytest.raises(TypeError, match="unknown option kk"):
        twin(kk=3)


@pytest.mark.parametrize("function, twin, options", LOSSES, ids=IDS)
def test_bad_input(function, twin, options):
    s, t = tokens()
    with pytest.raises(ValueError, match="teacher: expected the tokens of student"):
        function(s, t[:, :4], **options)
    with pytest.raises(ValueError, match="reduction: expected one of mean, sum, none"):
        function(s, t, reduction="batchmean", **options)
    with pytest.raises(ValueError, match="backend"):
        function(s, t, backend="tpu", **options)
    with pytest.raises(TypeError, match="student: expected a Tensor"):
        function([1.0], t, **options)


def test_k_out_of_range_names_both_numbers():
    s, t = tokens()
    with pytest.raises(ValueError, match="k: expected 1 to 9 neighbours among 10 tokens, got 10"):
        token_graph_loss(s, t, k=10)
