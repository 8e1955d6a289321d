"""Experts shared out over processes give the outputs, losses and gradients of the whole layer."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdfast.nn import SparseMoE, expert_parallel, expert_parameter_names

SCRIPT = Path(__file__).with_name("expert_ranks.py")


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_the_whole_layer(world):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(SCRIPT)], env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0] * world, "\n".join(outputs)


def test_without_a_process_group_it_says_so():
    layer = SparseMoE(4, 8, num_experts=4)
    with pytest.raises(ValueError, match="init_process_group"):
        expert_parallel(layer)
    assert expert_parameter_names(layer) == []
