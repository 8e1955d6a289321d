"""Features of a vision model on the disk: the same numbers within the stored type, by row, resumable, and refused where they lie."""

import json
import shutil

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")

from kdfast.data.teacher_cache import CacheError, FeatureCache, TeacherCache, cache_features, store


class Net(nn.Module):
    """Convolutions, then tokens: a feature map, a hidden state in a tuple, logits."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.mix = nn.GRU(4, 6, batch_first=True)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.mix(tokens)[0].mean(1))


LAYERS = {"map": "stem", "tokens": "mix"}


@pytest.fixture
def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().train()


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(3, 5, 5, generator=generator), i % 5) for i in range(21)]


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8), ("float32", 1e-6)])
def test_features_are_those_of_the_model(dtype, error, net, data, tmp_path):
    told = []
    cache = cache_features(
        net, data, tmp_path, layers=LAYERS, output="logits", dtype=dtype, batch_size=4, rows_per_shard=8, on_start=told.append,
        on_progress=lambda *done: told.append(done),
    )  # fmt: skip
    assert net.training and len(cache) == 21 and told[0] == 21 * (4 * 25 + 25 * 6 + 5) * (2 if "16" in dtype else 4)
    assert told[1:] == [(done, 21) for done in (0, 4, 8, 12, 16, 20, 21)]
    net.eval()
    ids = [20, 3, 8]
    got = cache.rows(ids)
    with torch.no_grad():
        x = torch.stack([data[i][0] for i in ids])
        want = {"map": net.stem(x), "tokens": net.mix(net.stem(x).flatten(2).transpose(1, 2))[0], "logits": net(x)}
    assert set(got) == set(want)
    for name, value in want.items():
        assert got[name].dtype == getattr(torch, dtype) and got[name].shape == value.shape
        assert ((got[name].float() - value).abs() <= error * value.abs() + 1e-6).all(), name
    assert torch.equal(cache[3]["map"], got["map"][1])


def test_a_stopped_run_goes_on_to_the_same_bytes(net, data, tmp_path, monkeypatch):
    run = lambda name: cache_features(net, data, tmp_path / name, layers=LAYERS, batch_size=4, rows_per_shard=4)  # noqa: E731
    run("whole")
    written, original = [], store._write_shard

    def stop(*arguments):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(original(*arguments))

    monkeypatch.setattr(store, "_write_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    assert net.training
    monkeypatch.setattr(store, "_write_shard", original)
    run("parts")
    whole, parts = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "parts")
    )
    assert whole == parts and len(whole) == 7


def test_inputs_by_name(tmp_path):
    class Named(nn.Linear):
        def forward(self, pixel_values):
            return {"loss": None, "hidden": super().forward(pixel_values)}

    net = Named(3, 2)
    data = [{"pixel_values": torch.full((3,), float(i)), "labels": 1} for i in range(5)]
    cache = cache_features(net, data, tmp_path, layers={}, output="hidden", dtype="float32")
    want = nn.functional.linear(torch.stack([row["pixel_values"] for row in data]), net.weight, net.bias)
    torch.testing.assert_close(cache.rows(range(5))["hidden"], want)


def test_what_is_wrong_is_said(net, data, tmp_path):
    run = lambda model=net, rows=data, name="a", **options: cache_features(  # noqa: E731
        model, rows, tmp_path / name, **{"layers": LAYERS, "batch_size": 4, "rows_per_shard": 8, **options}
    )
    for options, message in (
        ({"layers": {}}, "layers: expected at least one submodule"),
        ({"output": "map"}, "output: expected another name than the layers', got 'map'"),
        ({"layers": {"map": "sten"}}, "has no submodule 'sten'; near names: stem"),
        ({"dtype": "int8"}, "dtype: expected one of float16"),
        ({"rows": []}, "data: expected at least one row, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**options)

    class Augmented(list):
        def __getitem__(self, row):
            return torch.rand(3, 5, 5)

    with pytest.raises(
        ValueError, match="row 0 is another one when it is read again; a cache needs data without augmentation"
    ):
        run(rows=Augmented(data))
    with pytest.raises(ValueError, match="inputs of one shape, got features of several in rows 16 to 20"):
        run(rows=[*data[:20], (torch.randn(3, 4, 4), 0)], name="shapes")
    with torch.no_grad():
        net.stem[1].bias += 1e5
    with pytest.raises(
        ValueError, match=r"layers\['map'\]: NaN or infinity in rows 0 to 0, or more than 65504: dtype='bfloat16'"
    ):
        run()
    run(dtype="bfloat16")
    with torch.no_grad():
        net.stem[1].bias += 1
    for options, message in (({}, "with model '"), ({"dtype": "float32"}, "holds a cache with")):
        with pytest.raises(CacheError, match=message):
            run(**{"dtype": "bfloat16", **options})

    with pytest.raises(CacheError, match=r"layers: .* holds map, tokens, and not logits"):
        FeatureCache(tmp_path / "a", layers=["map", "logits"])
    with pytest.raises(CacheError, match="a cache of features, expected one of top-k lists"):
        TeacherCache(tmp_path / "a")
    shard = tmp_path / "a" / "shard-00001.safetensors"
    shutil.copy(tmp_path / "a" / "shard-00000.safetensors", shard)
    cache = FeatureCache(tmp_path / "a")
    assert torch.isfinite(cache[0]["map"]).all()
    with pytest.raises(CacheError, match="shard 0 in the place of shard 1"):
        cache[8]
    with pytest.raises(CacheError, match="shard 0 in the place of shard 1"):
        cache.verify()
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["settings"]["shapes"] == {
        "map": [4, 5, 5],
        "tokens": [25, 6],
    }
