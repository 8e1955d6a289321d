"""Every op on a GPU, by every backend that has it: error budget in four dtypes, the same bits again, capture in a CUDA graph.

`benchmarks/gpu.sh test` runs it. Without a GPU the values are checked on the CPU's kernels, so that this file itself is tested.
"""

from __future__ import annotations

import os

import pytest
import torch
from tolerances import check_against_reference

from kdfast import losses, ops

GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = "cuda" if GPU else "cpu"
BACKENDS = ("triton", "cuda") if GPU else ("cpu",)
# Loss and gradient of one dtype: what the CPU kernels' own tests allow.
FLOORS = {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SIZES = {"small": 5, "large": 700}


def draw(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def labels(rows, classes):
    return torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(1))


def models(rows, classes, scale=3.0):
    student = draw(rows, classes, scale=scale)
    return student, student + draw(rows, classes, seed=1)


def labelled(n):
    return (*models(n, 1000), labels(n, 1000).to(torch.int64))


def pixels(n):
    height = max(n // 20, 2)
    a, b = (draw(1, 19, height, 20, seed=s, scale=2.0) for s in (0, 1))
    target = torch.randint(19, (1, height, 20), generator=torch.Generator().manual_seed(2))
    target[:, 0, :3] = 255
    return a, b, target


def routed(logits, backend):
    routing = ops.route_topk(logits, 2, score="softmax", normalise=1.0, backend=backend)
    return routing.weights, routing.mean_probs, routing.lse


def moved(x, logits, backend):
    routing = ops.route_topk(logits.detach(), 2, backend=backend)
    plan = ops.make_plan(routing.ids, logits.shape[1], backend=backend)
    return ops.combine(ops.dispatch(x, plan, backend=backend), logits[:, :2].contiguous(), plan, backend=backend)


# name -> (inputs of a size, the first of which are differentiated; call). float64 draws, rounded to the dtype under test.
OPS = {
    "divergence": (lambda n: models(n, 3000), lambda s, t, b: losses.divergence_loss(s, t, kind="js", backend=b)),
    "divergence_long": (lambda n: models(min(n, 30), 40_000), lambda s, t, b: losses.divergence_loss(s, t, kind="js", backend=b)),
    "divergence_long_rows": (lambda n: models(min(n, 30), 9001), lambda s, t, b: losses.divergence_loss(s, t, reduction="none", backend=b)),
    "divergence_rows": (lambda n: models(n, 100), lambda s, t, b: losses.divergence_loss(s, t, reduction="none", backend=b)),
    "one_pass": (labelled, lambda s, t, y, b: losses.distillation_loss(s, t, y, backend=b).loss),
    "selective": (pixels, lambda a, c, y, b: tuple(ops.selective_kl(a, c, y, backend=b))[:2]),
    "sinkhorn_cost": (lambda n: (draw(3, n // 4 + 3, n // 5 + 4).abs(),), lambda c, b: ops.sinkhorn_cost(c, backend=b)),
    "sinkhorn_small": (lambda n: (draw(n, 6, 5).abs(),), lambda c, b: ops.sinkhorn_cost(c, backend=b)),
    "sinkhorn_plan": (lambda n: (draw(2, 9, n // 5 + 4).abs(),), lambda c, b: ops.sinkhorn(c, backend=b).plan),
    "sinkhorn_kd": (lambda n: models(min(n, 64), n + 2), lambda s, t, b: losses.sinkhorn_kd_loss(s, t, backend=b)),
    "softmin": (lambda n: models(n, 70, 1.0), lambda x, y, b: ops.pairwise_softmin(x, y, epsilon=30.0, backend=b)),
    "sinkhorn_points": (
        lambda n: models(n, 70, 1.0), lambda x, y, b: ops.sinkhorn_cost_points(x, y, epsilon=30.0, n_iters=5, backend=b)
    ),
    "sinkhorn_divergence": (
        lambda n: models(n, 5, 1.0), lambda x, y, b: losses.sinkhorn_divergence(x, y, blur=1.0, diameter=8.0, backend=b)
    ),
    "token_graph": (lambda n: models(n + 20, 64, 1.0), lambda s, t, b: losses.token_graph_loss(s, t, k=3, backend=b)),
    "token_contrast": (lambda n: models(n, 48, 1.0), lambda s, t, b: losses.token_contrast_loss(s, t, backend=b)),
    "token_context": (lambda n: models(n, 48, 1.0), lambda s, t, b: losses.token_context_loss(s[None], t[None], backend=b)),
    "pairwise_cost": (lambda n: models(n, 70, 1.0), lambda s, t, b: ops.pairwise_cost(s, t, p=1, backend=b)),
    "route_topk": (lambda n: (draw(n, 64),), routed),
    "dispatch_combine": (lambda n: (draw(n, 40), draw(n, 16, seed=1)), moved),
}  # fmt: skip


def inputs_of(name, size, dtype, device="cpu"):
    tensors = [t.to(device, dtype) if t.is_floating_point() else t.to(device) for t in OPS[name][0](SIZES[size])]
    return [
        t.requires_grad_(t.is_floating_point() and (i == 0 or name == "dispatch_combine"))
        for i, t in enumerate(tensors)
    ]


def call(name, backend):
    """The op on DEVICE; skips where this backend gives a reason not to run it."""

    def function(*tensors):
        try:
            out = OPS[name][1](*(t.to(DEVICE) for t in tensors), backend)
        except ValueError as error:
            if f"backend={backend!r} cannot run" in str(error):
                pytest.skip(str(error)[:200])
            raise
        return tuple(o.cpu() for o in out) if isinstance(out, tuple) else out.cpu()

    return function


@pytest.mark.skipif(os.environ.get("KDFAST_EXPECT_GPU") != "1", reason="KDFAST_EXPECT_GPU is set by benchmarks/gpu.sh")
def test_this_machine_has_what_is_to_be_tested():
    import kdfast

    info = kdfast.backend_info()
    assert GPU and info["triton"]["available"] and info["cuda"]["available"], info


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOORS, ids=str)
def test_within_the_error_budget(name, backend, size, dtype):
    if size == "large" and not GPU:
        pytest.skip("the CPU's kernels have tests of their own")
    check_against_reference(
        call(name, backend), lambda *t: OPS[name][1](*t, "reference"), inputs_of(name, size, dtype),
        floor=(1e-5, 1e-6), gradient_floor=(FLOORS[dtype], 2e-5),
    )  # fmt: skip


def step_of(name, backend, tensors):
    """Outputs and the first input's gradient, as a function without arguments on tensors that stay where they are."""

    def step():
        out = OPS[name][1](*tensors, backend)
        outs = out if isinstance(out, tuple) else (out,)
        grad = torch.autograd.grad(sum(o.sum() * (i + 1.5) for i, o in enumerate(outs)), tensors[0])
        return *(o.detach() for o in outs), *grad

    return step


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
def test_the_same_bits_again(name, backend, size):
    if size == "large" and not GPU:
        pytest.skip("the CPU's kernels have tests of their own")
    tensors = inputs_of(name, size, torch.float32, DEVICE)
    call(name, backend)(*tensors)
    step = step_of(name, backend, tensors)
    first = step()
    for _ in range(100 if GPU else 3):
        assert all(torch.equal(a, b) for a, b in zip(first, step()))


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cuda_graph_captures_it(name, backend):
    """Capture fails on any host synchronisation; the replay must see new numbers in the same memory."""
    tensors = inputs_of(name, "large", torch.float32, DEVICE)
    call(name, backend)(*tensors)
    step, stream = step_of(name, backend, tensors), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        tensors[0].mul_(0.5)
    graph.replay()
    for got, want in zip(captured, step()):
        assert torch.equal(got, want) and want.abs().max() > 0


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_two_to_the_31_elements(backend):
    """Rows at the end of a tensor whose offsets do not fit int32: as the same rows alone."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GB")
    rows, classes = 16900, 131072
    student = torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16)
    teacher = student.roll(1, 0)
    got = ops.divergence(student, teacher, backend=backend)
    torch.testing.assert_close(got[-4:], ops.divergence(student[-4:].clone(), teacher[-4:].clone(), backend=backend))
