"""ScaleKD: projector by definition, windows, both views against the DCT, what is trained, TPP, layouts. Vectors: test_vectors.py."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdfast import methods
from kdfast.methods.scalekd import (
    ConvProjector,
    CrossAttention,
    CrossAttentionProjector,
    cut_windows,
    remove_dc,
    scalekd_loss,
    soft_target_ce,
    unit_view,
    view_loss,
    view_weights,
)

F64 = torch.float64


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# ---------------------------------------------------------------- the projector
def test_projector_by_definition():
    torch.manual_seed(0)
    cap = CrossAttentionProjector(3, 8, (2, 3), (4, 5), 2, softmax_scale=5.0).double()
    maps = random(4, 3, 4, 5)
    k = torch.relu(cap.student[1](cap.student[0](maps))) + cap.positions
    tokens = torch.stack([k[:, :, i, j] for i in range(4) for j in range(5)], 1)  # h-major
    q = torch.relu(cap.query @ cap.query_map[0].weight.T + cap.query_map[0].bias)
    a = cap.attention
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        products = a.q(q)[:, h] @ a.k(tokens)[..., h].mT * 5 / math.sqrt(4)
        heads.append(products.softmax(-1) @ a.v(tokens)[..., h])
    n = F.layer_norm(a.proj(torch.cat(heads, -1)), (8,), cap.norm.weight, cap.norm.bias)
    want = n + cap.ffn[2](torch.relu(cap.ffn[0](n)))  # the residual is the normalised one
    got = cap(maps)
    torch.testing.assert_close(got, want)
    assert got.shape == (4, 6, 8)
    got.sum().backward()
    assert all(p.grad is not None for p in cap.parameters())


def test_positions_are_small_and_a_passed_query_goes_first():
    torch.manual_seed(0)
    cap = CrossAttentionProjector(3, 8, (2, 2), (20, 20), 2).double().eval()
    assert 0.015 < cap.positions.std() < 0.025 and cap.query.std() > 0.5
    maps, query = random(2, 3, 20, 20), random(2, 4, 8, seed=1)
    without = CrossAttentionProjector(3, 8, (2, 2), (20, 20), 2, own_query=False).double().eval()
    without.load_state_dict({n: v for n, v in cap.state_dict().items() if n != "query"})
    torch.testing.assert_close(cap(maps, query), without(maps, query))
    torch.testing.assert_close(cap(maps), without(maps, cap.query.expand(2, 4, 8)))
    assert not torch.allclose(cap(maps), cap(maps, query))
    with pytest.raises(ValueError, match="query: this projector has none of its own"):
        without(maps)


def test_windows_by_hand():
    tokens = torch.arange(16.0).reshape(1, 16, 1)
    cut = cut_windows(tokens, (2, 2))
    assert cut.squeeze(-1).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert cut_windows(tokens, (4, 1)).squeeze(-1).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]  # fmt: skip
    torch.manual_seed(0)
    module = CrossAttention(3, 4, num_heads=2, windows=(2, 1)).double()
    keys, query = random(2, 16, 3), random(2, 4, 4, seed=1)
    out = module(keys, query)
    plain = CrossAttention(3, 4, num_heads=2).double()
    plain.load_state_dict(module.state_dict())
    want = torch.cat([plain(keys[:, :8], query[:, :2]), plain(keys[:, 8:], query[:, 2:])], 1)  # the halves by rows
    torch.testing.assert_close(out, want)


def test_outputs_of_windows_stay_in_their_order_unless_asked():
    torch.manual_seed(0)
    options = {"num_heads": 2, "windows": (1, 2)}
    released = CrossAttention(3, 4, **options).double()
    restored = CrossAttention(3, 4, **options, restore_order=True).double()
    restored.load_state_dict(released.state_dict())
    keys, query = random(2, 16, 3), random(2, 16, 4, seed=1)
    order = cut_windows(torch.arange(16).reshape(1, 16, 1), (1, 2)).flatten()
    a, b = released(keys, query), restored(keys, query)
    torch.testing.assert_close(b[:, order], a)
    assert not torch.allclose(a, b)
    # a query at one place decides the output at that place
    other = query.clone()
    other[:, 6] += 1
    changed = (restored(keys, other) - b).abs().sum((0, 2)) > 1e-9
    assert changed.nonzero().flatten().tolist() == [6]


# ---------------------------------------------------------------- the views
def dct_without_constant(x):
    """IDCT(mask(DCT-II(x))) over the last two axes, the coefficient (0, 0) masked; literal, by matrices."""
    for axis, size in ((-2, x.shape[-2]), (-1, x.shape[-1])):
        k, n = torch.arange(size, dtype=F64).unsqueeze(1), torch.arange(size, dtype=F64)
        basis = torch.cos(math.pi * k * (2 * n + 1) / (2 * size)) * math.sqrt(2 / size)
        basis[0] /= math.sqrt(2)
        x = (x.movedim(axis, -1) @ basis.T).movedim(-1, axis)
    x = x.clone()
    x[..., 0, 0] = 0
    for axis, size in ((-2, x.shape[-2]), (-1, x.shape[-1])):
        k, n = torch.arange(size, dtype=F64).unsqueeze(1), torch.arange(size, dtype=F64)
        basis = torch.cos(math.pi * k * (2 * n + 1) / (2 * size)) * math.sqrt(2 / size)
        basis[0] /= math.sqrt(2)
        x = (x.movedim(axis, -1) @ basis).movedim(-1, axis)
    return x


@pytest.mark.parametrize("size", ((3, 4), (5, 5)))
def test_removing_the_mean_is_masking_the_dct(size):
    maps = random(2, 3, *size)
    tokens = maps.flatten(2).mT
    torch.testing.assert_close(remove_dc(tokens).mT.unflatten(-1, size), dct_without_constant(maps))
    target = random(2, 3, *size, seed=1)
    want = [F.normalize(dct_without_constant(x), dim=1) for x in (maps, target)]
    torch.testing.assert_close(view_loss(tokens, target, view="alternating"), F.mse_loss(*want, reduction="sum") / 2)


def test_views_are_two_minus_two_cosines_and_only_the_alternating_one_ignores_a_constant():
    y, f = random(3, 6, 5).requires_grad_(), random(3, 5, 2, 3, seed=1).requires_grad_()
    cosines = F.cosine_similarity(y, f.flatten(2).mT, dim=-1)
    torch.testing.assert_close(view_loss(y, f), 2 * (1 - cosines).sum() / 3)
    alternating = view_loss(y, f, view="alternating")
    shift = 10 * random(1, 1, 5, seed=2)
    torch.testing.assert_close(view_loss(y + shift, f, view="alternating"), alternating)
    torch.testing.assert_close(view_loss(y, f + shift.mT.unsqueeze(-1), view="alternating"), alternating)
    assert not torch.allclose(view_loss(y + shift, f), view_loss(y, f))
    alternating.backward()
    assert y.grad is not None and f.grad is None
    torch.testing.assert_close(y.grad.sum(1), torch.zeros(3, 5, dtype=F64), atol=1e-12, rtol=0)


def test_gradients_of_the_views():
    f = random(2, 3, 2, 2, seed=1)
    for view in ("direct", "alternating"):
        assert torch.autograd.gradcheck(
            lambda y, view=view: view_loss(y, f, view=view), random(2, 4, 3).requires_grad_()
        )


@pytest.mark.parametrize("dtype", (F64, torch.float32, torch.bfloat16))
def test_a_view_that_is_constant_over_space_is_exactly_zero(dtype):
    """Its mean in floating point is not always its value, and what is left would be divided by 1e-12."""
    tokens = (torch.full((2, 49, 3), 0.1, dtype=dtype) * torch.tensor([1.0, -7.3, 1e4], dtype=dtype)).float()
    assert remove_dc(tokens).count_nonzero() == 0 and unit_view(tokens, "alternating").count_nonzero() == 0
    target = random(2, 3, 7, 7).float()
    assert view_loss(tokens, target, view="alternating") == pytest.approx(49, rel=1e-6)  # |0 - unit|^2 at each place


# ---------------------------------------------------------------- the logit term and the total
def test_logit_term_is_a_cross_entropy_and_survives_extreme_logits():
    s, t = random(4, 5).requires_grad_(), random(4, 5, seed=1)
    for temperature in (1.0, 3.0):
        want = -(t / temperature).softmax(-1) * (s / temperature).log_softmax(-1)
        got = soft_target_ce(s, t, temperature=temperature)
        torch.testing.assert_close(got, temperature**2 * want.sum() / 4)
        torch.testing.assert_close(*[torch.autograd.grad(x, s)[0] for x in (got, temperature**2 * want.sum() / 4)])
    far = torch.tensor([[1000.0, 0.0, -1000.0]], dtype=F64)
    assert soft_target_ce(far, far.flip(1)) == 2000


def test_total():
    s, t, labels = random(4, 5).requires_grad_(), random(4, 5, seed=1), torch.tensor([0, 4, -100, 2])
    names = ("direct_3", "alternating_3", "direct_4", "alternating_4")
    tokens = {name: random(4, 6, 3, seed=i + 2) for i, name in enumerate(names)}
    f = random(4, 3, 2, 3, seed=9)
    loss, parts = scalekd_loss(
        s, t, labels, tokens, f, alpha_direct=(0.1, 0.2), alpha_alternating=(0.3, 0.4), alpha_kd=0.25, temperature=2.0
    )
    want = 0.75 * F.cross_entropy(s, labels) + 0.25 * soft_target_ce(s, t, temperature=2.0)
    for name, weight in zip(names, (0.1, 0.3, 0.2, 0.4)):
        want = want + weight * view_loss(tokens[name], f, view=name[:-2])
    torch.testing.assert_close(loss, want)
    assert set(parts) == {"task", "kd", *names} and not any(part.requires_grad for part in parts.values())
    torch.testing.assert_close(parts["alternating_4"], view_loss(tokens["alternating_4"], f, view="alternating"))
    # a term of weight 0 is not computed
    assert set(scalekd_loss(s, t, labels, tokens, f, alpha_kd=1.0, alpha_alternating=0.0).parts) == {"kd", *names[::2]}
    assert set(scalekd_loss(s, t, labels, {}, f, alpha_kd=0.0).parts) == {"task"}
    assert view_weights(0.08, (0.06, 0)) == {
        "direct_3": 0.08,
        "direct_4": 0.08,
        "alternating_3": 0.06,
        "alternating_4": 0,
    }


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: view_loss(random(2, 5, 3), random(2, 3, 2, 3)), r"tokens: expected \[B, H W, D\] of teacher_map"),
        (lambda: view_loss(random(0, 6, 3), random(0, 3, 2, 3)), "B > 0"),
        (lambda: view_loss(random(2, 1, 3), random(2, 3, 1, 1), view="alternating"), "more than one position"),
        (lambda: view_loss(random(2, 6, 3) * math.nan, random(2, 3, 2, 3)), "tokens: expected finite values"),
        (lambda: view_loss(random(2, 6, 3), random(2, 3, 2, 3) / 0), "teacher_map: expected finite values"),
        (lambda: view_loss(random(2, 6, 3), random(2, 3, 2, 3), view="low"), "view: expected one of direct, alternating"),
        (lambda: CrossAttention(3, 8, num_heads=3), "num_heads: expected a divisor of the teacher's width 8, got 3"),
        (lambda: CrossAttention(3, 8, num_heads=2, softmax_scale=0.0), "softmax_scale: expected a finite number"),
        (lambda: CrossAttention(3, 8, num_heads=2, windows=(0, 1)), "windows: expected an int >= 1"),
        (lambda: cut_windows(random(1, 12, 3), (2, 2)), "windows: expected a square grid of tokens .* got 12 tokens"),
        (lambda: cut_windows(random(1, 9, 3), (2, 1), "query"), "windows: expected a square grid of query"),
        (lambda: CrossAttentionProjector(3, 8, (2, 2), (4, 4), 2)(torch.zeros(2, 3, 4, 5)), r"maps: expected \[B, 3, 4, 4\]"),
        (lambda: CrossAttentionProjector(3, 8, (2, 2), (4, 4), 2)(torch.zeros(0, 3, 4, 4)), "B > 0"),
        (lambda: CrossAttentionProjector(3, 8, (2, 2), (4, 4), 2)(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 8)), "query: expected .2, 4, 8. for a grid of 2 x 2"),
        (lambda: soft_target_ce(random(2, 3), random(2, 3), temperature=0.0), "temperature: expected a finite number"),
        (lambda: soft_target_ce(random(0, 3), random(0, 3)), "student: expected logits"),
        (lambda: scalekd_loss(random(2, 3), random(2, 3), torch.tensor([0, 1]), {}, random(2, 3, 2, 3), alpha_kd=1.5), "alpha_kd: expected a finite number in .0, 1."),
        (lambda: scalekd_loss(random(2, 3), random(2, 3), torch.tensor([0, 1]), {"direct": 0}, random(2, 3, 2, 3)), "tokens: expected some of direct_3"),
        (lambda: view_weights((0.1, 0.2, 0.3), 0.0), "alpha_direct: expected a number or one for each"),
        (lambda: view_weights(-1.0, 0.0), "alpha_direct: expected a finite number"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------- by name
WIDTHS = {"stage3": (3, 4), "stage4": (5, 6)}
GRIDS = {"student_grids": ((4, 4), (3, 2)), "teacher_grids": ((4, 2), (2, 1)), "num_heads": (2, 3)}


class Merge(nn.Module):
    """Stage 4 of a teacher on maps: 2x2 neighbours averaged, dropout that must stay off, another width."""

    def __init__(self):
        super().__init__()
        self.conv, self.drop = nn.Conv2d(4, 6, 1), nn.Dropout(0.5)

    def forward(self, maps):
        return self.drop(self.conv(F.avg_pool2d(maps, 2)).tanh())


class Teacher(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"stage4": Merge()})


def example(**options):
    torch.manual_seed(0)
    method, teacher = methods.load("scalekd")(WIDTHS, teacher_stage=("body.stage4",), **GRIDS | options), Teacher()
    method.attach(teacher)
    context = methods.Context(
        torch.randn(2, 3, requires_grad=True), torch.randn(2, 3), torch.tensor([0, 2]),
        student_features={"stage3": torch.randn(2, 3, 4, 4, requires_grad=True), "stage4": torch.randn(2, 5, 3, 2, requires_grad=True)},
        teacher_features={"stage3": torch.randn(2, 4, 4, 2), "stage4": torch.randn(2, 6, 2, 1)},
    )  # fmt: skip
    return method, teacher, context


def test_the_whole_by_hand():
    method, teacher, context = example(alpha_kd=0.25)
    loss, parts = method(context)
    stage4, target = teacher.body["stage4"].eval(), context.teacher_features["stage4"]
    want = 0.75 * parts["task"] + 0.25 * parts["kd"]
    for view, weight in (("direct", 0.08), ("alternating", 0.06)):
        tokens = method.projectors[f"{view}_3"](context.student_features["stage3"])
        through = stage4(tokens.mT.unflatten(-1, (4, 2))).flatten(2).mT  # against the teacher's stage 4, not 3
        fourth = method.projectors[f"{view}_4"](context.student_features["stage4"], through)
        want = want + weight * (view_loss(through, target, view=view) + view_loss(fourth, target, view=view))
    torch.testing.assert_close(loss, want)
    assert set(method.projectors) == {"direct_3", "direct_4", "alternating_3", "alternating_4"}
    assert [p.query is None for p in method.projectors.values()] == [False, True, False, True]


def test_the_gradient_passes_through_the_teachers_stage_and_leaves_it_alone():
    method, teacher, context = example(alpha_direct=(0.0, 1.0), alpha_alternating=0.0, alpha_kd=0.0)
    teacher.train()  # somebody's loop; a dropout that is on would change the loss from call to call
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    loss = method(context).loss
    torch.testing.assert_close(method(context).loss, loss)
    loss.backward()
    assert context.student_features["stage3"].grad.abs().sum() > 0  # by the query alone: stage 3 has no loss here
    assert context.student_features["stage4"].grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_what_is_left_out_has_no_parameters():
    def names(**options):
        return sorted(example(**options)[0].projectors)

    assert names(alpha_alternating=0.0) == ["direct_3", "direct_4"]
    assert names(alpha_alternating=(0.06, 0.0)) == ["alternating_3", "direct_3", "direct_4"]
    assert names(alpha_direct=(0.0, 0.08), alpha_alternating=0.0) == ["direct_3", "direct_4"]  # stage 3 gives the query
    method, _, context = example(tpp=False)
    assert (
        sorted(method.projectors) == ["alternating_4", "direct_4"] and method.projectors["direct_4"].query is not None
    )
    method.stages = ()
    assert set(method(context).parts) == {"task", "kd", "direct_4", "alternating_4"}  # and no stage of the teacher
    method, _, context = example(alpha_direct=0.0, alpha_alternating=0.0)
    assert not list(method.parameters()) and set(method(context).parts) == {"task", "kd"}


def test_plain_projectors():
    method, _, context = example(projector="conv")
    maps = context.student_features["stage4"]
    plain = method.projectors["direct_4"]
    assert isinstance(plain, ConvProjector)
    torch.testing.assert_close(plain(maps)[:, 0], plain.conv(maps[:, :, :2]).mean((2, 3)))
    assert method(context).loss.isfinite()


@pytest.mark.parametrize("layout", ("grid", "tokens"))
def test_layouts_of_the_teacher(layout):
    """The same teacher with its stage and its feature in another layout, sequences with a class token in front."""
    method, teacher, context = example()
    want = method(context).loss

    class Other(Merge):
        def forward(self, x):
            out = super().forward(x.movedim(-1, 1) if layout == "grid" else x.mT.unflatten(-1, (4, 2)))
            return out.movedim(1, -1) if layout == "grid" else out.flatten(2).mT

    other = Teacher()
    other.body["stage4"] = Other()
    other.load_state_dict(teacher.state_dict())
    again = methods.load("scalekd")(
        WIDTHS, teacher_stage=("body.stage4",), layout=layout, class_tokens=(1, 1), **GRIDS
    )  # fmt: skip
    again.load_state_dict(method.state_dict())
    again.attach(other)

    def with_class_token(maps):
        tokens = maps.flatten(2).mT
        return torch.cat((torch.full_like(tokens[:, :1], 9.0), tokens), 1)

    f = context.teacher_features["stage4"]
    context.teacher_features = {"stage4": f.movedim(1, -1) if layout == "grid" else with_class_token(f)}
    context.student_features["stage3"] = with_class_token(context.student_features["stage3"])
    torch.testing.assert_close(again(context).loss, want)


def test_a_plain_vit_has_its_last_blocks_after_the_stage_four_projections_too():
    torch.manual_seed(0)
    teacher = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), "norm": nn.LayerNorm(6)})
    widths = {"stage3": (3, 6), "stage4": (5, 6)}
    method = methods.load("scalekd")(
        widths, teacher_stage=("blocks.0", "blocks.1"), last_stage=("blocks.2", "norm"), layout="tokens", alpha_alternating=0.0,
        alpha_kd=0.0, student_grids=((4, 4), (3, 2)), teacher_grids=((2, 2), (2, 2)), num_heads=(2, 3),
    )  # fmt: skip
    method.attach(teacher)
    _, _, context = example()
    target = torch.randn(2, 4, 6)
    context.teacher_features = {"stage4": target}
    blocks = teacher["blocks"]
    through = blocks[1](blocks[0](method.projectors["direct_3"](context.student_features["stage3"])))
    fourth = method.projectors["direct_4"](context.student_features["stage4"], through)
    fourth = teacher["norm"](blocks[2](fourth))
    want = F.cross_entropy(context.student, context.labels)
    want = want + 0.08 * (view_loss(through, target.mT.unflatten(-1, (2, 2))) + view_loss(fourth, target.mT.unflatten(-1, (2, 2))))  # fmt: skip
    torch.testing.assert_close(method(context).loss, want)


def test_what_by_name_refuses():
    method, _, context = example()
    context.teacher_features["stage4"] = torch.randn(2, 6, 3, 1)
    with pytest.raises(
        ValueError, match="teacher_grids: expected the grid of the teacher's stage 4, 3 tokens, got 2 x 1"
    ):
        method(context)
    method, _, context = example()
    method.stages = ()
    with pytest.raises(ValueError, match=r"in your own loop call method.attach\(teacher\)"):
        method(context)
    with pytest.raises(ValueError, match="teacher_stage: Teacher has no submodule 'stage4'"):
        methods.load("scalekd")(WIDTHS, **GRIDS).attach(Teacher())
    for change in (
        {"alpha_kd": 2.0},
        {"temperature": 0.0},
        {"projector": "mlp"},
        {"layout": "nchw"},
        {"num_heads": (3, 3)},
    ):
        with pytest.raises(ValueError, match=next(iter(change))):
            methods.load("scalekd")(WIDTHS, **GRIDS | change)


# ---------------------------------------------------------------- the experiment
def test_the_experiment_runs_and_says_what_the_numbers_say(tmp_path):
    import dataclasses

    pytest.importorskip("accelerate")
    pytest.importorskip("sklearn")
    from benchmarks.experiments import scalekd
    from kdfast.data import load_task

    task = dataclasses.replace(load_task("digit_patches"), teacher_steps=2, batch_size=8)
    out = tmp_path / "scalekd.json"
    results = scalekd.run(out, seeds=1, steps=2, task=task, work=tmp_path / "work")
    assert list(results["arms"]) == ["teacher", *(arm.name for arm in scalekd.ARMS)] and len(results["sentences"]) == 9
    assert scalekd.run(out, seeds=1, work=tmp_path / "elsewhere") == json.loads(out.read_text())
    assert "not above the whole" in scalekd.above("x", [0.5, 0.6], [0.5, 0.7])
    assert ": above the whole" in scalekd.above("x", [0.6, 0.71], [0.5, 0.6])
