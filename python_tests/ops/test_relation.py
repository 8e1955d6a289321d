"""Token relations: closed forms, the float64 reference over every option, masks, blocks, gradients, errors."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from modes import MODES, _quiet, check_mode
from tolerances import check_against_reference

from kdfast import _core
from kdfast.ops import relation_kl, relation_kl_reference, relation_mse, relation_mse_reference

F64 = torch.float64
# Without the compiled core the reference stands in for both: the hand-made numbers still say something.
core = pytest.mark.skipif(_core.core is None, reason="needs the compiled core")
BACKEND = "cpu" if _core.core is not None else "reference"


def tokens(b=2, n=5, ds=3, dt=4, dtype=F64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(b, n, d, generator=g, dtype=F64).to(dtype).requires_grad_() for d in (ds, dt))


def mask(b=2, n=5):
    keep = torch.ones(b, n, dtype=torch.bool)
    keep[0, 1] = keep[1, 3] = keep[1, 4] = False
    return keep


# ---------------------------------------------------------------- known values
def test_gram_by_hand():
    s = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=F64)  # Gram matrix 1 0 0 4
    t = torch.tensor([[1.0], [1.0]], dtype=F64)  # Gram matrix 1 1 1 1
    for options, want in (
        ({}, [1, 10]),
        ({"diagonal": False}, [1, 1]),
        ({"similarity": "cosine"}, [1, 1]),
        ({"scale": 0.5}, [0.25, 2.5]),
    ):
        assert relation_mse(s, t, relation="gram", **options).tolist() == pytest.approx(want, rel=1e-15)


def test_softmax_relation_is_attention_with_itself():
    s, t = tokens()
    a, b = ((x @ x.mT / math.sqrt(x.shape[-1])).softmax(-1) for x in (s, t))
    torch.testing.assert_close(relation_mse(s, t), (a - b).square().sum(-1), rtol=1e-12, atol=1e-14)


def test_kl_relation_is_kl_of_cosine_softmax():
    s, t = tokens()
    log_q, log_p = ((F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).mT / 0.2).log_softmax(-1) for x in (s, t))
    want = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(relation_kl(s, t, similarity="cosine", temperature=0.2), want, rtol=1e-10, atol=1e-12)


def test_rotated_tokens_have_the_same_relations():
    s, _ = tokens()
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=F64, generator=torch.Generator().manual_seed(9)))[0]
    for function in (relation_mse, relation_kl):
        assert function(s, s @ rotation).abs().max().item() < 1e-14
        assert function(s, 2 * s @ rotation).abs().max().item() > 1e-3


# ---------------------------------------------------------------- fused against the reference, all options
CASES = [
    *[
        (relation_mse, relation_mse_reference, BACKEND, dict(relation=r, similarity=s, scale=c))
        for r, s, c in itertools.product(("softmax", "gram"), ("dot", "cosine"), (None, 0.7))
    ],
    *[
        (relation_kl, relation_kl_reference, BACKEND, dict(kind=k, beta=0.3, temperature=1.5, similarity=s))
        for k, s in itertools.product(("forward_kl", "reverse_kl", "js", "tvd"), ("dot", "cosine"))
    ],
]
IDS = [f"{case[0].__name__}-{'-'.join(str(v) for v in case[3].values())}" for case in CASES]


@pytest.mark.parametrize("masked, diagonal", [(False, True), (True, True), (True, False), (False, False)])
@pytest.mark.parametrize("function, reference, backend, options", CASES, ids=IDS)
def test_equals_the_reference(function, reference, backend, options, masked, diagonal):
    options = options | {"diagonal": diagonal, "mask": mask() if masked else None}
    up = torch.randn(2, 5, dtype=F64, generator=torch.Generator().manual_seed(1))
    results = []
    for call in (lambda s, t: function(s, t, backend=backend, **options), lambda s, t: reference(s, t, **options)):
        s, t = tokens()
        rows = call(s, t)
        (rows * up).sum().backward()
        results.append((rows, s.grad, t.grad))
    assert results[1][0].detach().abs().max().item() > 1e-3
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("function, reference, backend, options", CASES[::3], ids=IDS[::3])
def test_weighted_sum_stores_the_gradient(function, reference, backend, options, masked):
    """Upstream 3, two backwards, and a second loss on the same tokens: the stored gradient is never changed."""
    keep = mask() if masked else None
    weight = torch.rand(2, 5, dtype=F64, generator=torch.Generator().manual_seed(2))
    s, t = tokens()
    loss = function(s, t, backend=backend, mask=keep, row_weight=weight, **options)
    want = (reference(s, t, mask=keep, **options) * weight).sum()
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-12)
    wanted = torch.autograd.grad(3 * want, (s, t))
    (3 * loss).backward(retain_graph=True)
    torch.testing.assert_close((s.grad, t.grad), wanted, rtol=1e-9, atol=1e-12)
    (3 * loss).backward()
    torch.testing.assert_close((s.grad, t.grad), tuple(2 * g for g in wanted), rtol=1e-9, atol=1e-12)


@core
@pytest.mark.parametrize("relation", ["softmax", "gram"])
def test_row_blocks_of_a_large_set(relation, monkeypatch):
    s, t = tokens()
    up = torch.rand(2, 5, dtype=F64)
    options = dict(relation=relation, diagonal=False, mask=mask())
    want = torch.autograd.grad((relation_mse(s, t, **options) * up).sum(), (s, t))
    cut = [(0, 1, 0, 2), (0, 1, 2, 5), (1, 2, 0, 1), (1, 2, 1, 4), (1, 2, 4, 5)]
    monkeypatch.setattr("kdfast.ops.relation_blocks._blocks", lambda *_: cut)
    got = torch.autograd.grad((relation_mse(s, t, **options) * up).sum(), (s, t))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_blocks_cover_every_row_once():
    from kdfast.ops.relation_blocks import BLOCK_BYTES, _blocks

    for sets, n in ((256, 196), (3, 5000), (1, 1)):
        seen = torch.zeros(sets, n, dtype=torch.int32)
        for b0, b1, r0, r1 in _blocks(sets, n, 4):
            seen[b0:b1, r0:r1] += 1
            assert (b1 - b0) * (r1 - r0) * n * 4 <= BLOCK_BYTES
        assert bool((seen == 1).all())


@pytest.mark.parametrize("function, reference, backend, options", CASES[::2], ids=IDS[::2])
def test_gradcheck(function, reference, backend, options):
    s, t = tokens(1, 4, 3, 2)
    call = lambda s, t: function(s, t, backend=backend, diagonal=False, **options)  # noqa: E731
    assert torch.autograd.gradcheck(call, (s, t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "function, reference", [(relation_mse, relation_mse_reference), (relation_kl, relation_kl_reference)]
)
def test_error_budget(function, reference, dtype):
    inputs = tuple(tokens(3, 33, 16, 24, dtype, seed=7))
    # The scores are sums of 16 and 24 products in two orders; their rounding, up to 1e-6 of a score, is what is left.
    check_against_reference(
        function, reference, inputs, floor=(2e-6, 1e-6), gradient_floor=None if dtype != torch.float32 else (2e-6, 1e-6)
    )


# ---------------------------------------------------------------- masks, NaN, edges
@pytest.mark.parametrize("function", [relation_mse, relation_kl])
def test_masked_tokens_are_not_read(function):
    s, t = tokens()
    want = function(s, t, mask=mask())
    with torch.no_grad():
        s[0, 1] = math.nan
        t[1, 4] = math.inf
    got = function(s, t, mask=mask())
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert got[0, 1] == 0 and got[0, 0] > 0
    got.sum().backward()
    assert bool(s.grad.isfinite().all()) and bool((s.grad[0, 1] == 0).all())


@pytest.mark.parametrize("function", [relation_mse, relation_kl])
def test_no_kept_token_and_a_lone_token_give_exact_zero(function):
    s, t = tokens()
    rows = function(s, t, mask=torch.zeros(2, 5, dtype=torch.bool))
    assert bool((rows == 0).all())
    rows.sum().backward()
    assert bool((s.grad == 0).all())
    one = torch.randn(1, 1, 3, dtype=F64)
    assert function(one, 2 * one).tolist() == [[0]]
    assert function(one, 2 * one, diagonal=False).tolist() == [[0]]


def test_nan_token_propagates_in_the_mse():
    s, t = tokens()
    with torch.no_grad():
        s[1, 2, 0] = math.nan
    rows = relation_mse(s, t)
    assert bool(rows[0].isfinite().all()) and bool(rows[1].isnan().all())


def test_unbatched_tokens_and_strides():
    s, t = tokens()
    want = relation_mse(s, t)
    torch.testing.assert_close(relation_mse(s[1], t[1]), want[1], rtol=1e-13, atol=0)
    wide = torch.randn(2, 5, 8, dtype=F64)
    torch.testing.assert_close(
        relation_mse(wide[..., ::2], t), relation_mse(wide[..., ::2].contiguous(), t), rtol=0, atol=0
    )


@core
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "function",
    [
        relation_mse,
        lambda s, t, w: relation_mse(s, t, relation="gram", similarity="cosine", row_weight=w),
        relation_kl,
    ],
    ids=["mse", "weighted_gram", "kl"],
)
def test_modes(mode, function):
    weight = (torch.arange(10.0).reshape(2, 5),) if function not in (relation_mse, relation_kl) else ()
    check_mode(mode, function, (*tokens(), *weight))


def test_inductor():
    s, t = tokens(dtype=torch.float32)
    loss = lambda s, t: relation_mse(s, t).sum() + relation_mse(s, t, row_weight=torch.ones(2, 5))  # noqa: E731
    want = torch.autograd.grad(loss(s, t), (s, t))
    with _quiet():
        got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(s, t), (s, t))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(teacher=torch.randn(2, 4, 3)), r"teacher: expected the \[..., N\] of student"),
        (dict(teacher=torch.randn(2, 5, 0)), "expected width >= 1, got 3 and 0"),
        (dict(similarity="l2"), "similarity: expected one of"),
        (dict(mask=torch.ones(2, 4, dtype=torch.bool)), "mask: expected shape"),
        (dict(row_weight=torch.ones(2)), "row_weight: expected shape"),
        (dict(relation="cosine"), "relation: expected one of softmax, gram"),
    ],
)
def test_bad_input(change, message):
    arguments = {"student": torch.randn(2, 5, 3), "teacher": torch.randn(2, 5, 4)} | change
    with pytest.raises(ValueError, match=message):
        relation_mse(**arguments)


def test_bad_kind_and_mask_dtype():
    with pytest.raises(ValueError, match="kind: expected one of forward_kl"):
        relation_kl(torch.randn(3, 2), torch.randn(3, 2), kind="dkd")
    with pytest.raises(TypeError, match="mask: expected bool"):
        relation_mse(torch.randn(3, 2), torch.randn(3, 2), mask=torch.ones(3))


def test_a_strided_mask_is_read_by_its_strides():
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 4, generator=g) for _ in range(2))
    mask = torch.tensor([[1, 0, 1, 1, 1, 0, 0, 1], [1, 1, 0, 1, 1, 1, 0, 0]], dtype=torch.bool)[:, :5]
    assert not mask.is_contiguous()
    for kept in (mask, mask[:1].expand(2, 5)):
        got = relation_mse(student, teacher, mask=kept)
        torch.testing.assert_close(got, relation_mse(student, teacher, mask=kept, backend="reference"))
