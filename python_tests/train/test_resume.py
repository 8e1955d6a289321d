"""Exact resume: a process killed by kill -9 inside an epoch, taken up again, ends at the same bits."""

import json
import math
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train import toy

from kdfast.train import checkpoint


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Final state by number of workers."""
    states = {}

    def final(workers):
        if workers not in states:
            run = toy.distiller(tmp_path_factory.mktemp("whole"))
            run.fit(toy.loader(workers), 3)
            states[workers] = run
        return states[workers]

    return final


def assert_same_bits(got, want):
    got, want = got.net.state_dict(), want.net.state_dict()
    assert got.keys() == want.keys() and len(got) > 8
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize(("moment", "at", "workers"), [("step", 8, 0), ("write", 8, 0), ("step", 8, 2)])
def test_bits_after_kill_9_and_resume(moment, at, workers, tmp_path, uninterrupted):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", str(Path(toy.__file__)), str(tmp_path), moment, str(workers)]
    killed = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = toy.distiller(tmp_path)
    assert resumed.resume()
    assert (resumed.step, resumed.epoch, resumed.batch) == (at, 1, 4)  # in the middle of the second epoch
    resumed.fit(toy.loader(workers), 3)
    want = uninterrupted(workers)
    assert_same_bits(resumed, want)
    times = {"ms_per_step"}
    strip = [[{k: v for k, v in row.items() if k not in times} for row in run.history.rows] for run in (resumed, want)]
    assert strip[0] == strip[1]


def test_a_different_state_gives_other_bits(tmp_path, uninterrupted):
    # The comparison above can fail: noise, dropout and momentum all reach the weights.
    other = toy.distiller(tmp_path, seed=1)
    other.fit(toy.loader(), 3)
    assert not torch.equal(other.student[0].weight, uninterrupted(0).student[0].weight)


def test_a_finished_run_is_loaded_not_repeated(tmp_path):
    first = toy.distiller(tmp_path)
    first.fit(toy.loader(), 2)
    again = toy.distiller(tmp_path)
    again.fit(None or toy.loader(), 2, resume=True)
    assert again.step == first.step
    assert_same_bits(again, first)


def test_bits_after_a_resume_between_two_epochs(tmp_path):
    """The loader draws a number when an epoch begins: dropout and noise must come after it, as in the uninterrupted run."""
    options = {"scheduler": None, "accumulate": 1}
    whole = toy.distiller(tmp_path / "whole", **options)
    whole.fit(toy.loader(), 3)
    toy.distiller(tmp_path / "parts", **options).fit(toy.loader(), 2)
    resumed = toy.distiller(tmp_path / "parts", **options)
    resumed.fit(toy.loader(), 3, resume=True)
    assert_same_bits(resumed, whole)


def test_resume_without_a_checkpoint_starts_fresh(tmp_path):
    run = toy.distiller(tmp_path)
    assert run.resume() is False and run.step == 0


def test_files_are_json_and_safetensors_only_and_nothing_is_unpickled(tmp_path, monkeypatch):
    toy.distiller(tmp_path).fit(toy.loader(), 1)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".csv", ".png"} and len(files) > 5

    def forbidden(*args, **kwargs):
        raise AssertionError("a pickle was read")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, forbidden)
    assert toy.distiller(tmp_path).resume()


def test_only_the_newest_checkpoint_is_kept(tmp_path):
    toy.distiller(tmp_path).fit(toy.loader(), 2)
    (folder,) = (tmp_path / "checkpoint").iterdir()
    assert folder.name == "step-0000000012-epoch-000002"
    assert json.loads((folder / "state.json").read_text())["position"] == [2, 0, 12]


def test_persistent_workers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="persistent_workers carry random state"):
        toy.distiller(tmp_path).fit(toy.loader(1, persistent_workers=True), 1)


def test_pack_keeps_every_bit_and_type(tmp_path):
    tied = torch.randn(3)
    value = {
        "floats": [0.1, 1 / 3, math.inf, -0.0], "pair": (1, "x", None, True), 3: {"nested": torch.arange(4, dtype=torch.int8)},
        "tied": [tied, tied], "bf16": torch.ones(2, dtype=torch.bfloat16), "scalar": torch.tensor(2.5), "empty": torch.empty(0),
        "__tuple__": 1, "view": torch.arange(6.0).view(2, 3).T,
    }  # fmt: skip
    checkpoint.write(tmp_path, "value", value)
    back = checkpoint.read(tmp_path, "value")
    assert len(load_file(tmp_path / "value.safetensors")) == 6  # the tied tensor once
    assert back["floats"] == value["floats"] and math.copysign(1, back["floats"][3]) == -1
    assert back["pair"] == value["pair"] and isinstance(back["pair"], tuple) and back["__tuple__"] == 1
    for got, want in [
        (back[3]["nested"], value[3]["nested"]),
        *((back[k], value[k]) for k in ("bf16", "scalar", "empty", "view")),
    ]:
        assert got.dtype == want.dtype and torch.equal(got, want)
    with pytest.raises(TypeError, match=r"state\['bad'\]\[0\] is a function; expected tensors"):
        checkpoint.pack({"bad": [print if False else assert_same_bits]}, {})


def test_rng_state_round_trip(tmp_path):
    import random

    import numpy as np

    checkpoint.write(tmp_path, "rng", checkpoint.rng_state())
    draw = lambda: (random.random(), np.random.rand(), np.random.standard_normal(), float(torch.rand(())))  # noqa: E731
    first = draw()
    draw()
    checkpoint.set_rng_state(checkpoint.read(tmp_path, "rng"))
    assert draw() == first
