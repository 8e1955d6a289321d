"""The compiled core: that it is there when it must be, which instruction set it runs, what an installation without it does."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdfast

EXPECTED = os.environ.get("KDFAST_EXPECT_CORE")  # 1: must be there, 0: must not, a folder: must come from there
INFO = kdfast.backend_info()
needs_core = pytest.mark.skipif(not INFO["compiled"], reason="no compiled core")
PACKAGE = str(Path(kdfast.__file__).parents[1])


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, with the same kdfast as this one."""
    base = {k: v for k, v in os.environ.items() if not k.startswith("KDFAST")}
    return subprocess.run(
        [sys.executable, "-P", "-c", code],  # -P: not the kdfast of the current folder
        env=base | {"PYTHONPATH": PACKAGE} | environment,
        text=True,
        capture_output=True,
        timeout=300,
    )


@pytest.mark.skipif(EXPECTED is None, reason="KDFAST_EXPECT_CORE is set by make test and CI")
def test_the_core_is_what_this_run_expects():
    """A build that failed silently leaves every other test green on the reference path."""
    found = importlib.util.find_spec("kdfast._C")
    if EXPECTED == "0":
        assert found is None
        assert not INFO["compiled"]
    else:
        assert INFO["compiled"], INFO["cpu"]["reason"]
        if EXPECTED != "1":
            assert Path(found.origin).is_relative_to(EXPECTED)


@needs_core
def test_the_forced_instruction_set_is_used():
    forced, cpu = os.environ.get("KDFAST_CPU_ISA"), INFO["cpu"]
    assert cpu["isas"][0] == "baseline"
    assert cpu["isa"] == (forced or cpu["isas"][-1])


@needs_core
@pytest.mark.parametrize("isa", INFO["cpu"].get("isas", []))
def test_every_instruction_set_gives_the_same_loss(isa):
    code = """
import torch, kdfast
g = torch.Generator().manual_seed(0)
s, t = torch.randn(33, 1001, generator=g), torch.randn(33, 1001, generator=g)
print(kdfast.backend_info()["cpu"]["isa"], kdfast.losses.kd_loss(s, t, temperature=1.0).item())
"""
    name, value = run(code, KDFAST_CPU_ISA=isa).stdout.split()
    assert name == isa
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(33, 1001, generator=generator) for _ in range(2))
    want = kdfast.losses.kd_loss(s.double(), t.double(), temperature=1.0, backend="reference").item()
    assert float(value) == pytest.approx(want, rel=1e-6)


@needs_core
def test_unknown_instruction_set_names_the_choices():
    done = run("import kdfast", KDFAST_CPU_ISA="avx9000")
    assert done.returncode != 0
    expected = (
        f"ValueError: KDFAST_CPU_ISA: expected one of {', '.join(INFO['cpu']['isas'])} on this machine, got 'avx9000'"
    )
    assert expected in done.stderr


WITHOUT = """
import sys, warnings
{block}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import kdfast
    import kdfast.losses, kdfast.ops, kdfast.methods
ours = [w for w in caught if str(w.message).startswith("kdfast")]
import torch
s = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
loss = kdfast.losses.kd_loss(s, -s.detach(), temperature=1.0)
loss.backward()
info = kdfast.backend_info()
print(len(ours), info["compiled"], info["triton"]["available"], round(loss.item(), 4), bool(s.grad.abs().sum() > 0))
print(ours[0].message if ours else "")
"""


def test_import_without_core_warns_once_and_works():
    done = run(WITHOUT.format(block="sys.modules['kdfast._C'] = None"))
    assert done.returncode == 0, done.stderr
    first, message = done.stdout.splitlines()[:2]
    assert first.split() == ["1", "False", str(INFO["triton"]["available"]), "1.1504", "True"]  # Triton needs no core
    assert "the slower reference path is used" in message


def test_import_without_triton_gives_no_warning():
    done = run(WITHOUT.format(block="sys.modules['triton'] = None"))
    assert done.returncode == 0, done.stderr
    warnings_count, compiled, triton, *_ = done.stdout.split()
    assert triton == "False"
    assert (warnings_count, compiled) == (("0", "True") if INFO["compiled"] else ("1", "False"))


@needs_core
def test_reference_can_be_forced():
    code = """
import torch, kdfast
s, t = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
loss = kdfast.losses.kd_loss(s, t)
(g,) = torch.autograd.grad(loss, s, create_graph=True)  # only the reference has a second derivative
(g**2).sum().backward()
print(s.grad.abs().sum().item() > 0, kdfast.backend_info()["forced_backend"])
try:
    kdfast.losses.kd_loss(s, t, backend="cpu").backward(create_graph=True)  # an explicit backend wins
except RuntimeError as error:
    print(error)
"""
    done = run(code, KDFAST_BACKEND="reference")
    assert done.stdout.startswith("True reference\nkdfast: the fused backends have no second derivative"), done.stderr


def test_unknown_forced_backend_names_the_choices():
    code = "import torch, kdfast; kdfast.losses.kd_loss(torch.zeros(1, 2), torch.zeros(1, 2))"
    done = run(code, KDFAST_BACKEND="gpu")
    assert "ValueError: KDFAST_BACKEND: expected one of cuda, triton, cpu, reference, got 'gpu'" in done.stderr


def test_explicit_backend_raises_with_every_reason():
    s, t = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"backend: expected one of cuda, triton, cpu, reference or None, got 'gpu'"):
        kdfast.losses.kd_loss(s, t, backend="gpu")
    with pytest.raises(ValueError) as raised:
        kdfast.losses.kd_loss(s, t, backend="triton")
    text = str(raised.value)
    assert re.match(r"divergence: backend='triton' cannot run these inputs: \S", text)
    assert "(2, 3) torch.float32 on cpu; (2, 3) torch.float64 on cpu" in text
    assert "cpu: " in text
    assert "reference" in text


@needs_core
def test_a_reason_of_the_cpu_backend_is_given_in_words():
    temperature = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"backend='cpu' cannot run these inputs: a gradient for temperature"):
        kdfast.ops.divergence(torch.zeros(2, 3), torch.zeros(2, 3), temperature=temperature, backend="cpu")
    rows = kdfast.ops.divergence(torch.ones(2, 3), torch.arange(6.0).reshape(2, 3), temperature=temperature)
    (gradient,) = torch.autograd.grad(rows.sum(), temperature)
    assert bool((gradient != 0).all())
