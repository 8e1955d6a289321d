"""The train extra is optional: without it there is nothing to test here."""

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("rich")


@pytest.fixture(autouse=True)
def one_thread():
    """The models are tiny: on a busy machine threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
