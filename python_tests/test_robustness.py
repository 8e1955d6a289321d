"""Threads and processes: a forked child does not hang, several Python threads may call, the thread count changes no bit."""

import os
import signal
import threading
import time

import pytest
import torch

import kdfast
from kdfast.losses import dkd_loss, kd_loss, sinkhorn_kd_loss
from kdfast.ops import divergence, pairwise_cost


def logits(rows=1037, classes=517, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, classes, generator=generator)
    return student, torch.randn(rows, classes, generator=generator)


def value_and_gradient(function, student, teacher):
    leaf = student.detach().requires_grad_()
    value = function(leaf, teacher)
    upstream = torch.linspace(0.5, 2.0, max(value.numel(), 1)).reshape(value.shape)
    (gradient,) = torch.autograd.grad(value, leaf, upstream)
    return value.detach(), gradient


CALLS = {
    "rows": lambda s, t: divergence(s, t, kind="js", beta=0.3),
    "reduced": lambda s, t: kd_loss(s, t, temperature=2.0, mask=torch.arange(len(s)) % 3 != 0),
    "dkd": lambda s, t: dkd_loss(s, t, torch.arange(len(s)) % s.shape[1]),
    "strided": lambda s, t: divergence(s.T, t.T, kind="reverse_kl", dim=0),
    "pairwise": lambda s, t: pairwise_cost(s[:301], t[:203], p=1),
    "sinkhorn": lambda s, t: sinkhorn_kd_loss(s[:61], t[:61], reduction="none"),
}


@pytest.fixture
def thread_count():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("call", CALLS)
def test_the_number_of_threads_changes_no_bit(call, thread_count):
    student, teacher = logits()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(value_and_gradient(CALLS[call], student, teacher))
    assert results[0][1].abs().sum() > 0
    for value, gradient in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("call", CALLS)
def test_four_python_threads_get_equal_bits(call):
    student, teacher = logits()
    want = value_and_gradient(CALLS[call], student, teacher)
    start, wrong = threading.Barrier(4), []

    def work():
        start.wait()
        for _ in range(3):
            got = value_and_gradient(CALLS[call], student, teacher)
            if not all(torch.equal(g, w) for g, w in zip(got, want)):
                wrong.append(got)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a call hangs"
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.skipif(
    not kdfast.backend_info()["compiled"], reason="the reference is torch alone, which hangs after a fork"
)
# DeprecationWarning: Python 3.12 warns of forking a process with threads; that is the point here.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_computes_serially_and_does_not_hang():
    """torch's thread pool does not survive a fork: a child that waited for its workers would wait for ever."""
    student, teacher = logits()
    want = divergence(student, teacher, kind="js", backend="cpu")  # starts the pool
    pid = os.fork()
    if pid == 0:  # nothing of pytest may run in the child
        code = 3
        try:
            pool = kdfast.backend_info()["cpu"]["pool"]
            got = torch.ops.kdfast.divergence_rows(
                student, teacher, None, None, "js", 0.5, 0.0, 1.0, student.shape[1], 1
            )[0]
            code = 0 if pool == "serial" and got.numpy().tobytes() == want.numpy().tobytes() else 1
        finally:
            os._exit(code)
    deadline = time.monotonic() + 60
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            pytest.fail("the forked child hangs")
        time.sleep(0.02)
    assert os.waitstatus_to_exitcode(status) == 0
    assert kdfast.backend_info()["cpu"]["pool"] != "serial", "the parent keeps its pool"
