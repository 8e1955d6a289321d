"""Prototype modules: the expanded aggregation against the literal one, attention, zero tokens, gradients, wrong arguments."""

import pytest
import torch
import torch.nn.functional as F

import kdfast
from kdfast.nn import PrototypeAugment, PrototypeLearner, prototype_attention, soft_vlad

F64 = torch.float64


def tensors(b=2, n=5, d=4, k=3):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(shape, generator=generator, dtype=F64, requires_grad=True) for shape in ((b, n, d), (k, d), (k, d))
    )


def literal(tokens, prototypes, assign):
    """The release's form with its [B, K, D, N] table."""
    x = tokens / tokens.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    s = (x @ assign.T).softmax(-1)
    residual = x.mT.unsqueeze(1) - prototypes.unsqueeze(0).unsqueeze(-1)  # [B, K, D, N]
    v = (residual * s.mT.unsqueeze(2)).sum(-1)
    v = v / v.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    v = v.flatten(1)
    return v / v.norm(dim=-1, keepdim=True).clamp_min(1e-12), s


def test_expanded_aggregation_is_the_literal_one():
    tokens, prototypes, assign = tensors()
    (got, s), (want, s2) = soft_vlad(tokens, prototypes, assign), literal(tokens, prototypes, assign)
    torch.testing.assert_close([got, s], [want, s2])
    weight = torch.randn_like(want)
    leaves = (tokens, prototypes, assign)
    torch.testing.assert_close(
        torch.autograd.grad((got * weight).sum(), leaves), torch.autograd.grad((want * weight).sum(), leaves)
    )
    torch.testing.assert_close(got.norm(dim=1), torch.ones(2, dtype=F64))
    biased = soft_vlad(tokens, prototypes, assign, torch.tensor([5.0, 0.0, 0.0], dtype=F64))[1]
    assert (biased[..., 0] > s[..., 0]).all()


def test_zero_tokens_are_legal():
    _, prototypes, assign = tensors()
    tokens = torch.zeros(1, 3, 4, dtype=F64, requires_grad=True)
    v, s = soft_vlad(tokens, prototypes, assign)
    v.sum().backward()
    torch.testing.assert_close(s, torch.full((1, 3, 3), 1 / 3, dtype=F64))
    assert v.isfinite().all() and tokens.grad.isfinite().all()


def test_attention_is_over_prototypes_and_unscaled():
    tokens, prototypes, _ = tensors()
    r, a = prototype_attention(tokens, prototypes)
    torch.testing.assert_close(a.sum(1), torch.ones(2, 5, dtype=F64))
    torch.testing.assert_close(
        r, F.scaled_dot_product_attention(tokens, prototypes.expand(2, 3, 4), prototypes.expand(2, 3, 4), scale=1.0)
    )
    assert a.shape == (2, 3, 5)


def test_learner_gives_every_token_the_same_descriptor():
    torch.manual_seed(0)
    module = PrototypeLearner(4, 3, 2).double()
    layers = [torch.randn(2, 5, 4, dtype=F64) for _ in range(2)]
    out, descriptor, assignment = module(layers)
    t = torch.relu(module.cat(torch.cat(layers, -1)))
    vlad, s = soft_vlad(t, module.prototypes, module.assign.weight)
    torch.testing.assert_close([descriptor, assignment], [module.fc(vlad), s])
    want = torch.relu(module.fuse2(torch.relu(module.fuse1(torch.cat((t[:, 3], descriptor), -1)))))
    torch.testing.assert_close(out[:, 3], want)
    assert module.assign.bias is None and module.fc.bias is not None and (module.prototypes >= 0).all()
    assert PrototypeLearner(4, 3, bias=True).fuse2.bias is not None


def test_augment_adds_and_rectifies_twice():
    torch.manual_seed(0)
    module, (tokens, prototypes, _) = PrototypeAugment(4).double(), tensors()
    out, alignment = module(tokens, prototypes)
    e, p = module.encode(tokens), module.encode(prototypes)
    r, a = prototype_attention(e, p)
    inner = torch.relu(module.aug2(torch.relu(module.aug1(torch.cat((e, r), -1)))))
    torch.testing.assert_close([out, alignment], [torch.relu(inner + tokens), a])
    assert (inner >= 0).all() and (out[tokens < -inner] == 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PrototypeLearner(4, 0), "num_prototypes: expected an int >= 1"),
        (lambda: PrototypeLearner(4, 3)([torch.zeros(1, 2, 4)]), "teacher_tokens: expected 3 layers, got 1"),
        (
            lambda: PrototypeLearner(4, 3, 2)([torch.zeros(1, 2, 4), torch.zeros(1, 3, 4)]),
            "teacher_tokens: expected as many tokens in every layer",
        ),
        (
            lambda: PrototypeLearner(4, 3, 1)([torch.zeros(1, 2, 5)]),
            r"teacher_tokens\[0\]: expected tokens \[B, N, 4\]",
        ),
        (lambda: PrototypeLearner(4, 3, 1)([torch.zeros(1, 0, 4)]), "at least one"),
        (lambda: PrototypeAugment(4)(torch.zeros(2, 4), torch.zeros(3, 4)), r"tokens: expected tokens \[B, N, 4\]"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_values_that_are_not_finite_raise_under_debug():
    with kdfast.debug(), pytest.raises(ValueError, match="tokens: expected finite values"):
        PrototypeAugment(2)(torch.full((1, 1, 2), float("nan")), torch.zeros(3, 2))
