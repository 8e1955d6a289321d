"""When the CUDA kernels are chosen, and that what was chosen runs, also in the backward: no GPU needed to tell."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kdfast.cuda
import kdfast.triton
from kdfast.ops.divergence import divergence

op = importlib.import_module("kdfast.ops.divergence")  # kdfast.ops.divergence itself is the function


@pytest.fixture
def gpu(monkeypatch):
    """Tensors that say they lie on a GPU, which has every backend and takes rows of up to 100,000 classes."""
    monkeypatch.setattr(op, "cuda_reason", lambda name, *tensors: None)
    monkeypatch.setattr(op, "cuda_limit", lambda name, index, item: 100_000)
    monkeypatch.setattr(op, "triton_reason", lambda name, *tensors: None)
    with FakeTensorMode():
        yield


def chosen(student, teacher=None, kind="forward_kl", classes=None, backend=None, dim=-1):
    classes = student.shape[dim] if classes is None else classes
    return op._choose(
        student, student if teacher is None else teacher, 1.0, None, kind, classes, student.dim() + dim, backend
    )


def test_long_rows_are_cudas_and_short_ones_tritons(gpu):
    for classes, backend in ((8192, "triton"), (8193, "cuda"), (100_000, "cuda"), (100_001, "triton")):
        student = torch.empty(2, classes, dtype=torch.bfloat16, device="cuda")
        assert chosen(student) == backend
        assert chosen(student, backend="triton") == "triton"
    assert chosen(torch.empty(2, 10, device="cuda"), backend="cuda") == "cuda"


def test_what_the_kernels_cannot_take_goes_to_triton_and_is_named(gpu):
    student = torch.empty(2, 20_000, device="cuda")
    rows_first = torch.empty(2, 20_000, 3, device="cuda")
    cases = [
        (dict(kind="dkd"), "kind='dkd' is Triton's"),
        (dict(kind="binary"), "kind='binary' is Triton's"),
        (dict(teacher=student.bfloat16()), "got torch.float32 and torch.bfloat16"),
        (dict(student=student.double(), teacher=student.double()), "got torch.float64 and torch.float64"),
        (dict(student=rows_first, dim=-2), "do not lie side by side"),
        (dict(student=torch.empty(1, 100_001, device="cuda")), "100001 classes does not fit .* \\(100000 do\\)"),
    ]
    for options, why in cases:
        options = {"student": student} | options
        assert chosen(**options) == "triton"
        with pytest.raises(ValueError, match=why):
            chosen(**options, backend="cuda")


def test_a_build_or_machine_without_them_says_so():
    tensor = torch.zeros(2, 9000)
    with pytest.raises(ValueError, match="backend='cuda' cannot run these inputs: the tensors are on cpu"):
        divergence(tensor, tensor, backend="cuda")
    found = kdfast.backend_info()["cuda"]
    assert found["available"] == (found["reason"] is None)
    if not torch.cuda.is_available():
        assert not found["available"] and found["reason"]
        with FakeTensorMode():
            assert kdfast.cuda.reason("divergence", torch.empty(2, 9000, device="cuda")) == found["reason"]


def core(**more):
    info = {"built": True, "reason": None, "archs": "90", "runtime": "13.0", "driver": "13.0", "devices": 1}
    return SimpleNamespace(cuda_info=lambda: dict(info), **more)


def test_reasons_of_a_device(monkeypatch):
    devices = {
        0: {"capability": 90, "reason": None},
        1: {"capability": 80, "reason": None},
        2: {"capability": 120, "reason": "no code"},
    }
    monkeypatch.setattr(kdfast.cuda, "BUILT", True)
    monkeypatch.setattr(kdfast.cuda._core, "core", core(cuda_device=devices.__getitem__))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    kdfast.cuda._reason_of.cache_clear()
    reasons = [kdfast.cuda._device_reason(90, index) for index in devices]
    kdfast.cuda._reason_of.cache_clear()
    assert reasons == [None, "it needs compute capability 9.0, GPU 1 has 8.0", "no code"]
    assert kdfast.cuda.info() == {
        "available": True, "reason": None, "archs": "90", "runtime": "13.0", "driver": "13.0", "devices": 1,
        "ops": list(kdfast.cuda.OPS),
    }  # fmt: skip


def test_a_compiled_graph_takes_a_devices_limits_as_constants(monkeypatch):
    asked = []
    monkeypatch.setattr(
        kdfast.cuda._core, "core", core(cuda_divergence_most=lambda index, item: asked.append((index, item)) or 7)
    )
    kdfast.cuda._limit.cache_clear()

    @torch.compile(backend="eager", fullgraph=True)
    def function(x):
        return x * kdfast.cuda.limit("divergence_most", 0, 2)

    result = function(torch.ones(2))
    kdfast.cuda._limit.cache_clear()
    assert result.tolist() == [7.0, 7.0] and asked == [(0, 2)]


def test_the_chosen_kernels_run_forward_and_backward(monkeypatch):
    """`cuda` is the ops' last argument in the forward and in the backward, for "cuda" alone."""
    seen = []

    def note(name, inner):
        def noted(*args):
            cuda = len(args) == sizes[name]
            seen.append((name, cuda and args[-1]))
            return inner(*args[:-1] if cuda else args)

        monkeypatch.setattr(op, name, noted)

    ops = torch.ops.kdfast
    schemas = {
        "_rows_op": ops.divergence_rows,
        "_rows_backward_op": ops.divergence_rows_backward,
        "_sum_op": ops.divergence_sum,
    }
    sizes = {name: len(schema.default._schema.arguments) for name, schema in schemas.items()}
    for name in schemas:
        note(name, getattr(op, name))
    for backend in ("cuda", "triton"):
        monkeypatch.setattr(op, "choose", lambda *args, backend=backend: backend)
        seen.clear()
        student = torch.randn(3, 5, requires_grad=True)
        divergence(student, torch.randn(3, 5)).sum().backward()
        divergence(student, torch.randn(3, 5), row_weight=torch.ones(3)).backward()
        assert seen == [(name, backend == "cuda") for name in ("_rows_op", "_rows_backward_op", "_sum_op")]


def test_the_last_argument_of_an_op_picks_the_package(monkeypatch):
    registered = {}
    monkeypatch.setattr(
        kdfast.triton, "lib", SimpleNamespace(impl=lambda name, run, key: registered.update({name: run}))
    )
    called = []
    modules = {
        f"kdfast.{package}.divergence": SimpleNamespace(
            weighted_sum=lambda *args, package=package: called.append((package, args))
        )
        for package in ("cuda", "triton")
    }
    monkeypatch.setattr(kdfast.triton.importlib, "import_module", modules.__getitem__)
    kdfast.triton.register("divergence_sum", "divergence", "weighted_sum")
    run = registered["divergence_sum"]
    arguments = tuple(range(16))
    for extra in ((), (True,), (False,)):
        run(*arguments, *extra)
    assert called == [("triton", arguments), ("cuda", arguments), ("triton", arguments)]
