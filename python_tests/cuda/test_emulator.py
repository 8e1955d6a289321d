"""The emulator that runs CUDA kernels on the CPU: what it must run, and what it must refuse."""

from __future__ import annotations

import ctypes

import pytest
import torch
from cuda_emulation import EMULATOR, build


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    library = ctypes.CDLL(str(build(tmp_path_factory.mktemp("emulator") / "self_test.so", EMULATOR / "self_test.cu")))
    for name in ("sums", "warps", "clusters", "grids", "wrong", "halves"):
        getattr(library, name).restype = ctypes.c_char_p
    yield library
    library.set_order(0)


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.mark.parametrize("order", [0, 1, 2])
def test_blocks_warps_and_shared_memory(kernels, order):
    kernels.set_order(order)
    x = torch.randint(100, (3, 64), dtype=torch.int32)
    out = torch.zeros(3, dtype=torch.int32)
    assert kernels.sums(pointer(x), pointer(out), 3, False) == b"no error"
    assert out.tolist() == x.sum(1).tolist()

    v = torch.tensor([i * 7 % 5 for i in range(32)], dtype=torch.int32)
    got = torch.zeros(176, dtype=torch.int32)
    assert kernels.warps(pointer(v), pointer(got)) == b"no error"
    same, above, most, before, reversed_, count = got.split([32, 32, 32, 32, 16, 32])
    assert [s & 0xFFFFFFFF for s in same.tolist()] == [
        sum(1 << j for j in range(32) if v[j] == v[i]) for i in range(32)
    ]
    assert above.eq((v > 2).sum()).all() and most.eq(4).all() and count.eq((v > 2).sum()).all()
    assert before.tolist() == (v.cumsum(0) - v).tolist()
    assert reversed_.tolist() == v[:16].flip(0).tolist()


def test_a_missing_barrier_shows_in_another_order(kernels):
    x, results = torch.ones(1, 64, dtype=torch.int32), []
    for order in (0, 1):
        kernels.set_order(order)
        out = torch.zeros(1, dtype=torch.int32)
        kernels.sums(pointer(x), pointer(out), 1, True)
        results.append(out.item())
    assert results[0] != results[1]


def test_clusters_read_each_other(kernels):
    out = torch.zeros(4, 32, dtype=torch.int32)
    assert kernels.clusters(pointer(out), False) == b"no error"
    assert out[:, 0].tolist() == [100, 0, 300, 200] and out[1].tolist() == list(range(32))
    message = kernels.clusters(pointer(out), True).decode()
    assert "block that has returned" in message or "deadlock" in message


def test_grid_barriers_need_a_cooperative_launch_that_is_resident(kernels):
    buffer, out = torch.full((512,), -1, dtype=torch.int32), torch.zeros(512, dtype=torch.int32)
    assert kernels.grids(pointer(buffer), pointer(out), 8) == b"no error"
    assert torch.equal(out, (torch.arange(512, dtype=torch.int32) ** 2).roll(-64))
    assert b"resident" in kernels.grids(pointer(buffer), pointer(out), 9)
    assert b"not cooperative" in kernels.wrong(4, 64, 0)


def test_what_never_meets_is_named(kernels):
    text = kernels.wrong(0, 64, 0).decode()
    assert text.startswith("deadlock: 32 threads wait at __syncthreads at line") and "32 have returned" in text
    text = kernels.wrong(1, 64, 0).decode()
    assert text.startswith("diverged: some threads are at __syncthreads at line") and "(block 0, thread" in text
    assert b"8 threads wait at __shfl_sync" in kernels.wrong(2, 32, 0)
    assert b"not in its own mask" in kernels.wrong(3, 32, 0)


def test_launches_beyond_the_device(kernels):
    assert b"shared memory" in kernels.wrong(9, 32, 50 << 10)
    assert b"invalid number" in kernels.wrong(9, 2048, 0)


def test_half_precision_rounds_as_torch(kernels):
    x = torch.cat(
        (
            torch.randn(400) * 10.0 ** torch.randint(-9, 6, (400,)),
            torch.tensor([0.0, 65504.0, 65519.0, 65520.0, 1e9, 2.0**-24, 2.0**-25]),
        )
    )
    out = torch.zeros(2, x.numel())
    assert kernels.halves(pointer(x), pointer(out), x.numel()) == b"no error"
    assert torch.equal(out[0], x.half().float()) and torch.equal(out[1], x.bfloat16().float())
