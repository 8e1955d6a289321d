"""GDN1 and the factorised prior: equations written out, gradients, tables, bytes. Numbers of CompressAI: test_vectors.py."""

import copy
import math

import pytest
import torch

from kdfast.nn import GDN1, EntropyBottleneck, lower_bound

F64 = torch.float64


def prior(channels=3, seed=0, **options):
    """A prior that has learned something: no parameter at its first value, so that channels differ and factors matter."""
    torch.manual_seed(seed)
    module = EntropyBottleneck(channels, **options)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name != "quantiles":
                p.add_(0.3 * torch.randn_like(p))
        module.quantiles.add_(torch.rand_like(module.quantiles))
    return module


def latent(*shape, scale=3.0, seed=1, dtype=torch.float32):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---------------------------------------------------------------- GDN
@pytest.mark.parametrize("inverse", [False, True])
def test_gdn_is_its_equation(inverse):
    module = GDN1(3, inverse=inverse).double()
    with torch.no_grad():
        module.beta.copy_(torch.tensor([0.5, -1.0, 2.0]))  # -1 is below its bound
        module.gamma.copy_(torch.tensor([[1.0, 0.2, 0.3], [0.4, 1.1, -0.5], [0.0, 0.6, 0.9]]))
    x = latent(2, 3, 2, 4, dtype=F64)
    beta = module.beta.clamp_min(math.sqrt(1e-6 + 2**-36)) ** 2 - 2**-36
    gamma = module.gamma.clamp_min(2**-18) ** 2 - 2**-36
    n = beta[None, :, None, None] + torch.einsum("ij,bjhw->bihw", gamma, x.abs())
    torch.testing.assert_close(module(x), x * n if inverse else x / n)
    assert beta[1].item() == pytest.approx(1e-6) and gamma[1, 2] == 0


def test_gdn_starts_at_its_values_and_the_inverse_undoes_small_signals():
    module = GDN1(2).double()
    torch.testing.assert_close(module._value(module.beta, 1e-6), torch.ones(2, dtype=F64))
    torch.testing.assert_close(module._value(module.gamma, 0.0), 0.1 * torch.eye(2, dtype=F64), atol=1e-8, rtol=1e-6)
    x = torch.ones(1, 2, 1, 1, dtype=F64)
    torch.testing.assert_close(module(x), x / 1.1, atol=1e-7, rtol=1e-6)


def test_gdn_and_bound_gradients():
    module = GDN1(2).double()
    torch.autograd.gradcheck(module, latent(2, 2, 2, 3, dtype=F64).requires_grad_())
    x = torch.tensor([0.5, -0.5, -0.5, 0.0], requires_grad=True)
    grad = torch.autograd.grad(lower_bound(x, 0.0), x, torch.tensor([2.0, 2.0, -2.0, 2.0]))[0]
    assert grad.tolist() == [2.0, 0.0, -2.0, 2.0]
    with pytest.raises(ValueError, match=r"x: expected \[B, 2, H, W\], got \(2, 3, 1, 1\)"):
        GDN1(2)(torch.zeros(2, 3, 1, 1))


# ---------------------------------------------------------------- the distribution
def test_logits_are_the_chain_written_out():
    module = prior(2).double()
    v = latent(2, 1, 5, dtype=F64)
    t = v
    for i in range(5):
        t = torch.log1p(getattr(module, f"matrix{i}").exp()) @ t + getattr(module, f"bias{i}")
        if i < 4:
            t = t + torch.tanh(getattr(module, f"factor{i}")) * torch.tanh(t)
    torch.testing.assert_close(module.logits(v), t)
    assert bool((module.logits(torch.linspace(-30, 30, 200, dtype=F64).expand(2, 1, -1)).diff() > 0).all())


def test_likelihoods_sum_to_one_and_keep_their_digits_in_both_tails():
    module = prior(2).double()
    grid = torch.arange(-400, 401, dtype=F64).expand(1, 2, -1)
    p = module.likelihood(grid)
    torch.testing.assert_close(p.sum(-1), torch.ones(1, 2, dtype=F64), atol=1e-6, rtol=0)
    lo, up = (module.logits(grid[0].unsqueeze(1) + side) for side in (-0.5, 0.5))
    torch.testing.assert_close(p[0], (up.sigmoid() - lo.sigmoid())[:, 0].clamp_min(1e-9), atol=1e-15, rtol=1e-6)
    right = module._mass(torch.full((2, 1, 1), 60.0, dtype=F64))  # here 1 - sigmoid has lost its digits
    want = torch.sigmoid(-module.logits(torch.full((2, 1, 1), 59.5, dtype=F64))) - torch.sigmoid(
        -module.logits(torch.full((2, 1, 1), 60.5, dtype=F64))
    )
    torch.testing.assert_close(right, want)
    assert bool((right > 0).all())


def test_a_long_latent_is_read_in_parts(monkeypatch):
    module, y = prior(2).double(), latent(3, 2, 5, 5, dtype=F64).requires_grad_()
    leaves = (y, module.matrix0, module.factor2, module.bias4)
    want = module.likelihood(y)
    grads = torch.autograd.grad(want.log().sum(), leaves)
    monkeypatch.setattr("kdfast.nn.compression.CHUNK", 7)
    got = module.likelihood(y)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got.log().sum(), leaves), grads)


def test_a_symmetric_prior_has_its_mass_in_the_middle():
    """lo + up is exactly 0 there, where a sign of 0 would give probability 0."""
    module = EntropyBottleneck(1)
    with torch.no_grad():
        for i in range(5):
            getattr(module, f"bias{i}").zero_()
    p = module.likelihood(torch.zeros(1, 1, 1))
    assert p.item() > 0.02


def test_training_adds_noise_and_evaluation_rounds_around_the_median():
    module, y = prior(2), latent(4, 2, 3)
    noise = torch.rand_like(y) - 0.5
    y_hat, p = module(y, noise)
    torch.testing.assert_close(y_hat, y + noise)
    torch.testing.assert_close(p, module.likelihood(y_hat))
    drawn = module(y)[0] - y
    assert bool((drawn.abs() <= 0.5 + 1e-6).all()) and drawn.std() > 0.1
    module.eval()
    m = module.quantiles[:, 0, 1].detach()[None, :, None]
    torch.testing.assert_close(module(y)[0], torch.round(y - m) + m)
    torch.testing.assert_close(module.quantize(y, use_medians=False), torch.round(y))
    half = EntropyBottleneck(1).eval()
    assert half(torch.tensor([[[0.5, 1.5, -2.5]]]))[0].tolist() == [[[0.0, 2.0, -2.0]]]  # to even


def test_the_rate_teaches_everything_but_the_quantiles_and_the_aux_loss_only_them():
    module, y = prior(2), latent(4, 2, 3).requires_grad_()
    module(y)[1].log().sum().backward()
    assert module.quantiles.grad is None and y.grad.abs().max() > 0
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in module.named_parameters() if n != "quantiles")
    module.zero_grad()
    module.aux_loss().backward()
    assert [n for n, p in module.named_parameters() if p.grad is not None and p.grad.any()] == ["quantiles"]


def test_solved_quantiles_are_where_the_aux_loss_ends():
    module = prior(3)
    assert module.aux_loss() > 1
    module.solve_quantiles()
    assert module.aux_loss() < 1e-3
    assert bool((module.quantiles.diff() > 0).all())


# ---------------------------------------------------------------- tables and bytes
def test_tables_are_the_distribution():
    module = prior(3)
    module.solve_quantiles()
    module.update()
    assert module.updated and not prior(3).updated
    for c in range(3):
        left, m, right = module.quantiles[c, 0].tolist()
        minima, maxima = math.ceil(m - left), math.ceil(right - m)
        assert module.offset[c] == -minima and module.cdf_length[c] == minima + maxima + 3
        edges = module.quantized_cdf[c, : int(module.cdf_length[c])]
        assert edges[0] == 0 and edges[-1] == 65536 and bool((edges.diff() > 0).all())
        at = m + torch.arange(-minima, maxima + 1, dtype=torch.float32)
        p = module._mass(at.expand(3, 1, -1))[c, 0]
        torch.testing.assert_close(edges.diff()[:-1] / 65536, p.detach(), atol=40 / 65536, rtol=0)
    assert len(set(module.cdf_length.tolist())) > 1  # each channel its own


def test_bytes_come_back_as_the_rounded_latent_even_far_outside():
    module = prior(3).eval()
    module.solve_quantiles()
    module.update()
    y = latent(4, 3, 5, 6)
    y[0, 0, 0, 0], y[1, 2, 1, 1], y[2, 1, 0, 3] = 1e6, -3e7, 1e30
    strings = module.compress(y)
    assert torch.equal(module.decompress(strings, (5, 6)), module.quantize(y))
    narrow = copy.deepcopy(module).bfloat16()  # integers above 256 come back as well
    far = torch.full((1, 3, 5, 6), 1000003.0)
    assert torch.equal(narrow.decompress(narrow.compress(far), (5, 6)), narrow.quantize(far))
    one = module.compress(y[3:])
    assert one == strings[3:] and module.decompress([], (5, 6)).shape == (0, 3, 5, 6)
    flat = latent(2, 3)  # no positions beside the channels
    assert torch.equal(module.decompress(module.compress(flat), ()), module.quantize(flat))
    with pytest.raises(ValueError, match="the stream does not hold"):
        module.decompress(strings, (5, 5))


def test_coded_length_is_the_rate():
    module = prior(3).eval()
    module.solve_quantiles()
    module.update()
    y = latent(8, 3, 20, 20)
    bits = -module.likelihood(module.quantize(y)).log2().flatten(1).sum(1)
    coded = torch.tensor([8.0 * len(s) for s in module.compress(y)])
    assert bool((coded <= 1.02 * bits + 64).all()) and bool((coded >= 0.98 * bits).all())


def test_tables_are_stored_with_the_weights():
    module = prior(3, seed=5)
    module.solve_quantiles()
    module.update()
    other = EntropyBottleneck(3)
    other.load_state_dict(module.state_dict())
    y = latent(2, 3, 4)
    assert other.updated and other.compress(y) == module.compress(y)


def test_bad_input():
    module = prior(3)
    for y, message in ((latent(2, 2, 4), r"expected \[B, 3, ...\], got \(2, 2, 4\)"), (latent(3), "expected")):
        with pytest.raises(ValueError, match="y: " + message):
            module(y)
    with pytest.raises(ValueError, match=r"update: the tables are not made yet; call update\(\)"):
        module.compress(latent(2, 3, 4))
    with pytest.raises(ValueError, match="update: the tables are not made yet"):
        module.decompress([b""], (4,))
    module.update()
    with pytest.raises(ValueError, match="y: expected finite values"):
        module.compress(torch.full((1, 3, 2), math.nan))
    for tail in (1e7, math.inf, math.nan):
        with torch.no_grad():
            module.quantiles[0, 0, 2] = tail
        with pytest.raises(ValueError, match="quantiles: expected tails that leave a table of at most 65536 symbols"):
            module.update()
    for options in ({"init_scale": 0.0}, {"tail_mass": 0.0}, {"likelihood_bound": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            EntropyBottleneck(2, **options)
