"""Two processes over gloo do what one process does: same batches, same denominators, same weights."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train import ddp

from kdfast.train import checkpoint


def test_two_processes_equal_one(tmp_path):
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "ACCELERATE_USE_CPU": "1",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        base | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for rank in (0, 1)
    ]  # fmt: skip
    command = [sys.executable, "-W", "ignore", str(Path(ddp.__file__))]
    started = [
        subprocess.Popen(
            [*command, str(tmp_path / name)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for name, env in (("two", ranks[0]), ("two", ranks[1]), ("one", base))
    ]
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], "\n".join(outputs)

    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    assert len(one["losses"]) == 6 and 0.2 < one["accuracy"] <= 1
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-12)
    assert two["accuracy"] == one["accuracy"]  # over the 42 rows, each once
    weights = [load_file(tmp_path / name / "student.safetensors") for name in ("one", "two")]
    for key, want in weights[0].items():
        torch.testing.assert_close(weights[1][key], want, rtol=1e-10, atol=1e-12)
    # Every rank's random state is in the checkpoint.
    folder = checkpoint.latest(tmp_path / "two" / "checkpoint")
    assert folder is not None and {"rank-0.json", "rank-1.json", "state.json"} <= {
        path.name for path in folder.iterdir()
    }
