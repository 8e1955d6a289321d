"""Heads split over 2 and 4 processes (gloo) give what one process with whole heads gives: loss, parts, every gradient."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parallel import vocab


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one_process(world, tmp_path):
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(Path(vocab.__file__)), str(tmp_path)], env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0] * world, "\n".join(outputs)
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(world)]
    for name, (source, options) in vocab.cases().items():
        want = vocab.run(source, options)
        assert want["loss"].abs().max() > 1e-2
        compare(name, [rank["results"][name] for rank in ranks], want, source, rtol=1e-9, atol=1e-11)
    # bf16 logits are rounded by products of other shapes: a neighbouring number now and then, 2^-8 of it
    want = vocab.run("hidden", {"kind": "js"}, dtype=torch.bfloat16)
    compare("bf16", [rank["results"]["bf16"] for rank in ranks], want, "hidden", rtol=2e-2, atol=2e-2)
    alone = vocab.by_default_chunks(0, 1, None)
    for rank in ranks:
        torch.testing.assert_close(rank["by default"], alone, rtol=1e-9, atol=1e-11)
        assert "process_group: expected heads split alike" in rank["error"]
        assert rank["error of a weight"].startswith("weight: expected one without a gradient with a process_group")


def compare(name, ranks, want, source, rtol, atol):
    whole = {"loss", "kd", "ce", "grad 0"} | ({"grad 3"} if source == "hidden" else set())  # the same on every rank
    for key, value in want.items():
        got = [rank[key] for rank in ranks]

        def told(text: str, key: str = key) -> str:
            return f"{name}, {key}: {text}"

        if key in whole:
            for rank in got:
                torch.testing.assert_close(rank, value, rtol=rtol, atol=atol, msg=told)
                assert torch.equal(rank, got[0])
        else:
            joined = torch.cat(got, 1 if source == "logits" and key == "grad 3" else 0)
            torch.testing.assert_close(joined, value, rtol=rtol, atol=atol, msg=told)
            assert value.dtype == joined.dtype
