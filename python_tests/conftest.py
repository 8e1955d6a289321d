"""What holds for every test: unwritten memory is NaN, and how many examples hypothesis tries.

HYPOTHESIS_PROFILE=nightly pytest python_tests/ops        1e5 examples per property instead of 200
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Some tests run the repository's benchmarks and experiments. At the end of the path: an installed kdfast goes first.
sys.path.append(str(Path(__file__).parents[1]))

COMMON = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors])
settings.register_profile("dev", max_examples=50, **COMMON)
# The same examples in every run: a red CI is a change of the code, and a local run repeats it.
settings.register_profile("ci", max_examples=200, derandomize=True, **COMMON)
settings.register_profile("nightly", max_examples=100_000, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


@pytest.fixture(autouse=True, scope="module")
def accelerate_starts_anew():
    """Its state is one for the process: the precision that a file's Trainer asked for would be refused to the next file's."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(True)


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    """Fills torch.empty with NaN (integers with their maximum), in Python and for the buffers handed to the core."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
