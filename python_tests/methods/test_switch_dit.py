"""Switch-DiT: the mixture against a loop, the matching against SciPy, the prior's invariants, the model and its training step."""

import math

import pytest
import torch
from torch import nn

from kdfast.methods import Context, load
from kdfast.methods.switch_dit import (
    SwitchDiT,
    TimestepMoE,
    assignment_table,
    diffusion_prior_loss,
    diffusion_prior_table,
    jensen_shannon,
    match_columns,
    match_prior,
    matching_cost,
    timestep_moe_mask,
)  # fmt: skip
from kdfast.nn.diffusion import DiffusionSchedule, guided
from kdfast.nn.dit import patchify, unpatchify

DOUBLE = torch.float64


def mask_by_loop(x, probs, weight, bias, k):
    rows = []
    for sample, p in zip(x, probs):
        m = torch.ones_like(sample)
        for e in sorted(range(len(p)), key=lambda e: (-p[e].item(), e))[:k]:
            if p[e] > 0:
                m = m + p[e] * (sample @ weight[e] + bias[e])
        rows.append(m)
    return torch.stack(rows)


@pytest.mark.parametrize("experts, k", [(3, 2), (4, 1), (2, 2), (1, 1)])
def test_mask_equals_a_loop(experts, k):
    torch.manual_seed(0)
    x = torch.randn(5, 3, 4, dtype=DOUBLE, requires_grad=True)
    logits = torch.randn(5, experts, dtype=DOUBLE, requires_grad=True)
    weight = torch.randn(experts, 4, 4, dtype=DOUBLE, requires_grad=True)
    bias = torch.randn(experts, 4, dtype=DOUBLE, requires_grad=True)
    got = timestep_moe_mask(x, logits.softmax(-1), weight, bias, k)
    want = mask_by_loop(x, logits.softmax(-1), weight, bias, k)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad((y * cotangent).sum(), (x, logits, weight, bias)) for y in (got, want))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        assert experts == 1 or b.abs().max() > 0


def test_exact_zeros_are_not_run_and_ties_go_to_the_lower_id():
    probs = torch.tensor([[1.0, 0.0, 0.0]], dtype=DOUBLE, requires_grad=True)
    weight, bias = torch.ones(3, 2, 2, dtype=DOUBLE), torch.ones(3, 2, dtype=DOUBLE)
    mask = timestep_moe_mask(torch.ones(1, 1, 2, dtype=DOUBLE), probs, weight, bias, 2)
    mask.sum().backward()
    assert mask.tolist() == [[[4.0, 4.0]]] and probs.grad.tolist() == [[6.0, 0.0, 0.0]]
    assert assignment_table(probs, 2).tolist() == [[1.0, 1.0, 0.0]]


def test_prior_table():
    table = diffusion_prior_table(12, depth=2, num_experts=3, top_k=2)
    assert table.shape == (12, 6) and (table.sum(1) == 4).all()
    assert table[0].tolist() == [1, 1, 1, 1, 0, 0] and table[-1].tolist() == [0, 0, 1, 1, 1, 1]
    shared = (table[0] * table).sum(1)
    assert (shared[1:] <= shared[:-1]).all()  # fewer and fewer experts in common with t = 0


@pytest.mark.parametrize("n", [1, 2, 7, 30])
@pytest.mark.parametrize("integers", [True, False])
def test_matching_is_optimal(n, integers):
    from scipy.optimize import linear_sum_assignment

    generator = torch.Generator().manual_seed(n)
    for _ in range(5):
        cost = (
            torch.randint(6, (n, n), generator=generator).double()
            if integers
            else torch.randn(n, n, generator=generator)
        )
        pi = match_columns(cost)
        rows, columns = linear_sum_assignment(cost)
        assert sorted(pi.tolist()) == list(range(n))
        assert cost[torch.arange(n), pi].sum().item() == pytest.approx(float(cost[rows, columns].sum()), abs=1e-6)
        assert torch.equal(pi, match_columns(cost))


def test_matching_cost_counts_differences():
    q, u = torch.randint(2, (9, 4)).float(), torch.randint(2, (9, 4)).float()
    want = (q[:, :, None] - u[:, None, :]).abs().sum(0)
    torch.testing.assert_close(matching_cost(q, u).float(), want)


def test_matching_undoes_a_permutation():
    prior = diffusion_prior_table(20, depth=2, num_experts=3, top_k=2)
    permutation = torch.tensor([3, 0, 5, 1, 4, 2])
    pi = match_columns(matching_cost(prior[:, permutation], prior))
    assert torch.equal(prior[:, pi], prior[:, permutation])


def test_jensen_shannon_of_equal_and_of_disjoint_rows():
    even = torch.full((3, 4), 0.25, dtype=DOUBLE)
    assert jensen_shannon(even, even).abs().max() < 1e-12
    far = jensen_shannon(torch.eye(2, dtype=DOUBLE)[:1], torch.eye(2, dtype=DOUBLE)[1:]).item()
    assert far == pytest.approx(math.log(2), abs=1e-4)


def test_shuffling_only_changes_the_choice_among_optima():
    torch.manual_seed(0)
    probs = torch.randn(2, 15, 3).softmax(-1)
    prior = diffusion_prior_table(15, 2, 3, 2)
    cost = matching_cost(assignment_table(probs, 2).movedim(0, 1).flatten(1), prior)
    rows = torch.arange(6)
    plain = cost[rows, match_prior(probs, prior, 2)].sum()
    for seed in range(5):
        pi = match_prior(probs, prior, 2, generator=torch.Generator().manual_seed(seed))
        assert cost[rows, pi].sum() == plain


def tiny(**options):
    torch.manual_seed(0)
    sizes = dict(image=8, channels=1, patch=2, width=16, depth=2, heads=2, classes=10, num_timesteps=20)
    return SwitchDiT(**(sizes | options))


def test_untrained_blocks_are_the_identity_and_the_prediction_is_zero():
    model = tiny()
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([0, 3, 3, 19])
    out = model(x, t, torch.tensor([1, 2, -1, 9]))
    assert out.prediction.shape == x.shape and (out.prediction == 0).all()
    assert out.gate_probs.shape == (2, 20, 3)
    torch.testing.assert_close(out.gate_probs.sum(-1), torch.ones(2, 20))
    mask, _, _ = model.experts[0](torch.randn(4, 5, 16), model.table(), t)
    assert (mask == 1).all()


def test_a_masked_out_token_skips_the_block():
    """x <- block(x m) + (1 - m) x: with m = 0 the block sees zeros and x goes around it."""
    model = tiny(depth=1, num_experts=1, top_k=1).eval()
    with torch.no_grad():
        model.experts[0].bias.fill_(-1.0)  # p = 1, so m = 1 - 1 = 0
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(2, 1, 8, 8)
    model(x, torch.tensor([1, 2]))
    assert (seen[0] == 0).all()
    torch.testing.assert_close(seen[1], model.embed(patchify(x, 2)) + model.positions)


def test_eval_equals_training_without_class_dropout():
    model = tiny(class_dropout=0.0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, t, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 3, 3, 19]), torch.tensor([1, 2, 3, 9])
    train = model(x, t, y)
    evaluated = model.eval()(x, t, y)
    torch.testing.assert_close(train.prediction, evaluated.prediction)
    assert evaluated.gate_probs is None and train.prediction.abs().max() > 0
    paths = model.expert_paths()
    assert paths.shape == (20, 2, 2)
    assert torch.equal(paths[:, 0].long(), train.gate_probs[0].topk(2).indices)


def test_patches_round_trip():
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(unpatchify(patchify(x, 2), 2), x)
    with pytest.raises(ValueError, match="square grid"):
        unpatchify(torch.randn(1, 3, 4), 2)


@pytest.mark.parametrize("options", [dict(), dict(min_snr=5.0), dict(learned_variance=True), dict(reuse_columns=5)])
def test_a_few_steps_lower_the_loss(options):
    torch.manual_seed(0)
    learned = options.get("learned_variance", False)
    model = tiny(learned_variance=learned)
    method = load("switch_dit")(num_timesteps=20, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    batch = {"images": torch.randn(32, 1, 8, 8).sign(), "classes": torch.randint(10, (32,))}
    losses, priors = [], []
    for step in range(60):
        ready = method.prepare(batch)
        context = Context(model(ready["x"], ready["timesteps"], ready["classes"]), batch=ready, step=step)
        loss, parts = method(context)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(parts["diffusion"].item())
        priors.append(parts["prior"].item())
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])
    assert sum(priors[-10:]) < 0.9 * sum(priors[:10])


def test_plain_dit_has_no_prior_loss():
    model, method = tiny(num_experts=0), load("switch_dit")(num_timesteps=20)
    ready = method.prepare({"images": torch.randn(3, 1, 8, 8)})
    assert set(method(Context(model(ready["x"], ready["timesteps"]), batch=ready)).parts) == {"diffusion"}


def test_schedule_and_sampler():
    for name in ("linear", "cosine"):
        schedule = DiffusionSchedule(100, name)
        assert schedule.alpha_bar[0] > 0.99 and schedule.alpha_bar[-1] < 0.05
        x0, noise = torch.randn(6, 1, 4, 4), torch.randn(6, 1, 4, 4)
        t = torch.tensor([0, 1, 20, 50, 80, 95])
        torch.testing.assert_close(
            schedule.predict_start(schedule.add_noise(x0, t, noise), t, noise), x0, rtol=1e-2, atol=2e-3
        )
    # the exact noise of a one-point data set leads back to the point
    target = torch.full((2, 1, 4, 4), 0.5)

    def exact(x, t):
        bar = schedule.alpha_bar[t].view(-1, 1, 1, 1)
        return (x - bar.sqrt() * target) / (1 - bar).sqrt()

    sample = schedule.sample(exact, (2, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sample, target, rtol=1e-3, atol=1e-3)


def test_guidance_touches_the_noise_channels_only():
    def predict(x, t, classes):
        return torch.full((1, 2, 1, 1), 1.0 if classes is None else 3.0)

    out = guided(predict, torch.tensor([4]), 2.0, channels=1)(torch.zeros(1, 1, 1, 1), torch.tensor([0]))
    assert out.flatten().tolist() == [5.0, 3.0]


def test_variance_bound_is_zero_for_the_true_posterior():
    schedule = DiffusionSchedule(50)
    x0, noise, t = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.tensor([5, 20, 40])
    x_t = schedule.add_noise(x0, t, noise)
    exact = torch.cat((noise, torch.full_like(noise, -1.0)), 1)  # the noise itself, and log v_t
    loss = schedule.loss(exact, x_t, t, noise, learned_variance=True)
    assert loss.abs().max() < 1e-4
    wider = torch.cat((noise, torch.full_like(noise, 1.0)), 1).requires_grad_()
    (grad,) = torch.autograd.grad(schedule.loss(wider, x_t, t, noise, learned_variance=True).sum(), wider)
    assert (grad[:, 1] != 0).all() and (grad[:, 0] == 0).all()  # the mean is detached


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: TimestepMoE(8, 3, 0), "top_k: expected"),
        (lambda: TimestepMoE(8, 3, 4), "top_k: expected"),
        (lambda: TimestepMoE(8)(torch.randn(2, 8), torch.randn(5, 8), torch.tensor([0, 1])), r"x: expected \[B, L, H\]"),
        (lambda: TimestepMoE(8)(torch.randn(1, 2, 8), torch.randn(5, 8), torch.tensor([5])), r"timesteps: expected values in \[0, 5\)"),
        (lambda: TimestepMoE(8)(torch.randn(1, 2, 8), torch.randn(5, 8), torch.tensor([0.5])), "timesteps: expected integers"),
        (lambda: TimestepMoE(8)(torch.randn(1, 2, 8), torch.randn(5, 6), torch.tensor([0])), "table: expected width 8"),
        (lambda: diffusion_prior_table(1, 2, 3, 2), "num_timesteps: expected an int >= 2"),
        (lambda: diffusion_prior_loss(torch.rand(2, 5, 3), torch.tensor([0]), torch.ones(5, 5), 2), "gate_probs, prior: expected"),
        (lambda: diffusion_prior_loss(torch.rand(2, 5, 3), torch.tensor([0]), torch.zeros(5, 6), 2), "prior: expected a one in every row"),
        (lambda: match_columns(torch.ones(2, 3)), "cost: expected a finite square"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
