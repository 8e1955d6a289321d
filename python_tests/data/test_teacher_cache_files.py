"""The folder of a cache: killed and resumed to the same bytes, written by two processes, and what is said of each kind of damage."""

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from data import cache_run
from lm import llama, tokenizer
from safetensors.torch import save_file

from kdfast.data import text
from kdfast.data.teacher_cache import CacheError, TeacherCache, cache_teacher, store

SHARDS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module")
def whole(folder):
    """An uninterrupted run of one process."""
    cache_run.run(folder / "whole")
    assert len(list((folder / "whole").glob("shard-*.safetensors"))) == SHARDS
    return folder / "whole"


@pytest.fixture(scope="module")
def others(folder, whole):
    """The other processes' runs, all at once: kills at every point, and two ranks that finish what one process began."""
    begin_of_a_run(folder / "two", shards=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "ACCELERATE_USE_CPU": "1"}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", cache_run.__file__, str(folder), port], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=240,
    )  # fmt: skip
    told = json.loads((folder / "ended.json").read_text()) if ended.returncode == 0 else {}
    assert told.get("ranks") == [0, 0], ended.stdout
    return told


def begin_of_a_run(out, shards):
    """A run that stops by itself after so many shards."""
    written = []

    def stop(*arguments):
        if len(written) == shards:
            raise KeyboardInterrupt
        written.append(original(*arguments))

    original, store._write_shard = store._write_shard, stop
    try:
        with pytest.raises(KeyboardInterrupt):
            cache_run.run(out)
    finally:
        store._write_shard = original


def bytes_of(out):
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.mark.parametrize("when", cache_run.KILLS)
def test_a_killed_run_goes_on_to_the_same_bytes(when, folder, whole, others):
    out = folder / when
    assert os.WTERMSIG(others[when]) == signal.SIGKILL
    left = set(bytes_of(out))
    computed = []
    original = store._write_shard
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_write_shard", lambda *a: computed.append(a[3]) or original(*a))
        cache_run.run(out)
    # killed at shard 2 of 0 to 4: what has its line is not computed again, the rest once
    todo = {"begun": [0, 1, 2, 3, 4], "line": [3, 4], "end": [], "sealed": []}.get(when, [2, 3, 4])
    assert computed == todo, (when, sorted(left))
    assert bytes_of(out) == bytes_of(whole)
    names = {"manifest.json", "vocabulary.json", *(f"shard-{i:05}.safetensors" for i in range(SHARDS))}
    assert set(bytes_of(out)) == names and (left != names)


def test_two_processes_finish_what_one_began_and_every_byte_is_the_same(folder, whole, others):
    made = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert made == [[2, 4], [3]]  # 0 and 1 were there
    assert bytes_of(folder / "two") == bytes_of(whole)


def test_a_finished_cache_is_not_made_again(whole, monkeypatch):
    monkeypatch.setattr(store, "_write_shard", None)
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    assert len(cache_run.run(whole)) == 40
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir()} == before


def test_a_run_with_other_settings_needs_another_folder(tmp_path):
    begin_of_a_run(tmp_path / "a", shards=1)
    rows = cache_run.rows()
    changed = [
        {**rows[0], "input_ids": rows[0]["input_ids"].flip(0), "labels": rows[0]["input_ids"].flip(0)},
        *rows[1:],
    ]
    for model, data, options, message in (
        (
            llama(),
            rows,
            {"top_k": 3},
            "holds a cache with top_k 12, this run has 3; a run goes on with the same settings",
        ),
        (llama(), rows, {"temperature": 2.0}, "temperature 1.0, this run has 2.0"),
        (llama(), rows, {"log_probs": "float16"}, "log_probs 'uint8', this run has 'float16'"),
        (llama(), rows, {"tokenizer": tokenizer(280)}, "with tokenizer '.* id 280 is no token and '.*; 20 ids in all"),
        (
            llama(),
            rows,
            {"tokenizer": added("<new>")},
            r"tokenizer '.*\(here and there id 300 is '<new>' and no token\); a",
        ),
        (llama(), rows, {"tokenizer": None}, "with tokenizer '.*', this run has None; a run"),
        (llama(seed=1), rows, {}, r"with model\.weights '"),
        (llama().bfloat16(), rows, {}, r"model\.weights|model\.dtype"),
        (llama(), changed, {}, "with data '"),
        (llama(), rows[:39], {}, "with data '"),
    ):
        with pytest.raises(CacheError, match=message):
            cache_teacher(model, data, tmp_path / "a", **{"tokenizer": tokenizer(), **cache_run.OPTIONS, **options})
    with pytest.raises(CacheError, match="unfinished, 1 of 5 shards are written; the same command goes on with it"):
        TeacherCache(tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="out: expected a folder"):
        cache_run.run(tmp_path / "file")


def test_no_room_is_said_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(CacheError, match=r"out: .* needs up to [\d,]+ bytes more, and 1,000 are free there"):
        cache_run.run(tmp_path / "a")
    assert not (tmp_path / "a").exists()


# ---------------------------------------------------------------- damage
@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def shard(out, number):
    return out / f"shard-{number:05}.safetensors"


def test_an_edited_byte_is_found_in_its_shard_alone(copy, whole):
    content = bytearray(shard(copy, 2).read_bytes())
    content[-100] ^= 1
    shard(copy, 2).write_bytes(content)
    cache = TeacherCache(copy)
    assert torch.equal(cache[15]["teacher_ids"], TeacherCache(whole)[15]["teacher_ids"])
    for read in (lambda: cache[16], lambda: cache[23], cache.verify):
        with pytest.raises(
            CacheError, match=r"shard-00002\.safetensors: edited or damaged, in rows 16 to 23; sha256 [0-9a-f]{12}, the"
        ):
            read()
    assert TeacherCache(copy, verify=False)[16]["row_id"] == 16
    content[9] ^= 0xFF
    shard(copy, 2).write_bytes(content)
    with pytest.raises(CacheError, match=r"shard-00002\.safetensors: edited or damaged, it is no safetensors file"):
        cache.verify()


def test_sizes_and_missing_files_are_seen_when_it_is_opened(copy):
    content = shard(copy, 1).read_bytes()
    for change, message in (
        (content[:-1], f"truncated, it has {len(content) - 1:,} bytes and the manifest says {len(content):,}"),
        (content + b"x", "edited, it has"),
        (b"", "truncated, it has 0 bytes"),
    ):
        shard(copy, 1).write_bytes(change)
        with pytest.raises(CacheError, match=rf"shard-00001\.safetensors: {message}"):
            TeacherCache(copy)
    shard(copy, 1).unlink()
    with pytest.raises(CacheError, match=r"shard-00001\.safetensors: missing, the manifest lists it with rows 8 to 15"):
        TeacherCache(copy)


def test_foreign_shards_are_told_from_edited_ones(copy, tmp_path):
    other = cache_teacher(
        llama(seed=1), cache_run.rows(), tmp_path / "other", tokenizer=tokenizer(), **cache_run.OPTIONS
    )
    cache = TeacherCache(copy)
    for source, message in (
        (
            shard(other.shards.folder, 0),
            f"a foreign file, a shard of the cache {other.manifest['id']} and not of {cache.manifest['id']}",
        ),
        (shard(copy, 3), "shard 3 in the place of shard 0"),
    ):
        shutil.copy(source, shard(copy, 0))
        with pytest.raises(CacheError, match=message):
            cache.verify()
    save_file({"tokens": torch.zeros(3)}, shard(copy, 0))
    with pytest.raises(CacheError, match="a foreign file, not written by kdfast"):
        cache.verify()


def test_manifests(copy, tmp_path):
    path = copy / "manifest.json"
    good = path.read_text()
    manifest = json.loads(good)
    for content, message in (
        (good[:-20], "truncated or edited, it is no JSON"),
        ('{"weight_map": {}}', "a foreign file, it is not the manifest of a kdfast teacher cache"),
        ("[1]", "a foreign file"),
        (json.dumps(manifest | {"version": 2}), "format version 2, and kdfast .* reads version 1"),
        (
            good.replace('"temperature": 1.0', '"temperature": 2.0'),
            "edited, its content is not what its sha256 was made of",
        ),
        (good.replace(manifest["shards"][3]["sha256"], "0" * 64), "edited, its content"),
    ):
        assert content != good
        path.write_text(content)
        with pytest.raises(CacheError, match=message):
            TeacherCache(copy)
    path.unlink()
    for place in (copy, tmp_path / "nothing", tmp_path):
        with pytest.raises(CacheError, match=r"manifest\.json: no such file, so .* is no teacher cache"):
            TeacherCache(place)


def test_the_manifest_says_what_is_inside(whole):
    manifest = json.loads((whole / "manifest.json").read_text())
    cache = TeacherCache(whole, tokenizer=tokenizer(), temperature=1.0, top_k=12, vocab_size=300)
    settings, totals = manifest["settings"], manifest["totals"]
    assert manifest["version"] == 1 and settings["tokenizer"] == text.tokenizer_fingerprint(tokenizer())
    assert (settings["vocab_size"], settings["temperature"], settings["top_k"], settings["log_probs"]) == (
        300,
        1.0,
        12,
        "uint8",
    )
    assert settings["model"]["dtype"] == "torch.float32" and len(settings["model"]["weights"]) == 32
    assert {"model", "revision", "data", "pad_id"} == set(manifest["about"]) and manifest["rows"] == 40
    spans = [(line["first_row"], line["rows"]) for line in manifest["shards"]]
    assert spans == [(0, 8), (8, 8), (16, 8), (24, 8), (32, 8)]
    rows = cache_run.rows()
    assert totals["tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert totals["lists"] == sum(int((row["labels"][1:] != -100).sum()) for row in rows) < totals["tokens"] - 40
    mass = sum(
        float((1 - cache[i]["teacher_tail"])[cache[i]["teacher_ids"][:, 0] >= 0].double().sum()) for i in range(40)
    )
    assert totals["kept_mass_sum"] == pytest.approx(mass, rel=1e-6) and cache.kept_mass == manifest[
        "kept_mass"
    ] == pytest.approx(mass / totals["lists"])
    assert 0.2 < cache.kept_mass < 0.9


def test_what_the_caller_expects_is_checked(whole, copy):
    for expected, message in (
        ({"temperature": 2.0}, "temperature: .* was made with 1.0, expected 2.0"),
        ({"top_k": 64}, "top_k: .* was made with 12, expected 64"),
        ({"vocab_size": 299}, "vocab_size: .* was made with 300, expected 299"),
        (
            {"tokenizer": tokenizer(280)},
            r"tokenizer: .* id is another token here than there \(id 280 is no token and '.*; 20 ids in all\), so the lists",
        ),
    ):
        with pytest.raises(CacheError, match=message):
            TeacherCache(whole, **expected)


# ---------------------------------------------------------------- tokens added to a tokenizer
def added(*tokens, size=300):
    from copy import deepcopy

    changed = deepcopy(tokenizer(size))
    changed.add_tokens(list(tokens))
    return changed


def test_a_token_added_after_caching_is_named_and_does_no_harm(whole, caplog):
    """No row and no list holds it: id 300 of a cache of 300 classes."""
    assert TeacherCache(whole).manifest["totals"]["max_id"] == 299
    cache = TeacherCache(whole, tokenizer=added("<new>"))
    assert len(cache) == 40
    (record,) = caplog.records
    assert "id 300 is '<new>' and no token" in record.message and str(whole) in record.message
    caplog.clear()
    TeacherCache(whole, tokenizer=tokenizer())
    assert not caplog.records


def test_ids_that_the_cache_holds_mean_the_same_string(whole, tmp_path, caplog):
    one = tokenizer().get_vocab()
    swapped = one | {"<eos>": 1, "<pad>": 0}
    with pytest.raises(CacheError, match=r"\(id 0 is '<pad>' and '<eos>'; id 1 is '<eos>' and '<pad>'\)"):
        TeacherCache(whole, tokenizer=swapped)
    # the cache's tokenizer has <old> as 300: in no row, in the rows, and another token in its place
    rows = cache_run.rows()[:8]
    used = [*rows[:7], {"input_ids": torch.tensor([5, 300, 6]), "labels": torch.tensor([-100, -100, 6])}]
    for data, name in ((rows, "unused"), (used, "used")):
        options = {**cache_run.OPTIONS, "vocab_size": 300, "tokenizer": added("<old>")}
        cache_teacher(llama(304), data, tmp_path / name, **options)
    for mine, words in ((tokenizer(), "no token"), (added("<new>"), "'<new>'")):
        caplog.clear()
        TeacherCache(tmp_path / "unused", tokenizer=mine)
        assert f"id 300 is {words} and '<old>'" in caplog.text
        with pytest.raises(CacheError, match=rf"\(id 300 is {words} and '<old>'\), so the lists mean nothing to it"):
            TeacherCache(tmp_path / "used", tokenizer=mine)
    # a padded head's class in a list: to this student a token
    cache_teacher(
        llama(304), rows, tmp_path / "padded", **{**cache_run.OPTIONS, "top_k": 304, "tokenizer": tokenizer()}
    )
    with pytest.raises(CacheError, match=r"id 300 is '<new>' and no token"):
        TeacherCache(tmp_path / "padded", tokenizer=added("<new>"))


def test_the_vocabulary_of_a_cache_is_checked(copy):
    path, other = copy / "vocabulary.json", added("<new>")
    good = path.read_text()
    for content, message in ((good[:-9], "truncated or edited, it is no JSON"), ('{"a": 0}', "edited or foreign")):
        path.write_text(content)
        with pytest.raises(CacheError, match=rf"vocabulary\.json: {message}"):
            TeacherCache(copy, tokenizer=other)
    path.unlink()
    with pytest.raises(CacheError, match=r"vocabulary\.json: missing, so it is not known which ids"):
        TeacherCache(copy, tokenizer=other)
    TeacherCache(copy, tokenizer=tokenizer())


# ---------------------------------------------------------------- reading
def test_a_row_is_read_without_reading_any_other(whole, copy):
    """Constant time: of one shard, and there slices of the row's own length, wherever it stands."""
    cache = TeacherCache(copy)
    cache.verify()
    cache.shards.check_contents = False
    for number in (0, 1, 2, 4):
        shard(copy, number).unlink()
    read = []

    class Recorder:
        def __init__(self, file):
            self.keys = file.keys
            self.get_slice = lambda name: Slice(file.get_slice(name))

    class Slice:
        def __init__(self, inner):
            self.inner = inner

        def __getitem__(self, at):
            read.append(at.stop - at.start)
            return self.inner[at]

    cache[24]
    cache.shards._open[3] = Recorder(cache.shards._open[3])
    for row in (24, 31, 28):
        read.clear()
        item = cache[row]
        length, listed = len(item["input_ids"]), int((item["teacher_ids"][:, 0] >= 0).sum())
        assert sorted(read) == sorted([2, 2, length, length, *[listed] * 5])
        want = TeacherCache(whole)[row]
        assert all(torch.equal(torch.as_tensor(item[name]), torch.as_tensor(want[name])) for name in want)
    for row in (-1, 40):
        with pytest.raises(IndexError, match=f"row: expected an id from 0 to 39, got {row}"):
            cache[row]


def test_batches_check_what_they_stand_for(whole):
    cache, rows = TeacherCache(whole), cache_run.rows()
    ids = [3, 20]
    theirs = text.collate_rows([rows[i] for i in ids], pad_id=9, length=60)["input_ids"]
    batch = cache.rows(torch.tensor(ids), theirs)
    assert batch["teacher_ids"].shape == (2, 60, 12) and batch["labels"].shape == (2, 60)
    assert torch.equal(batch["input_ids"][:, :3], theirs[:, :3]) and batch["row_id"].tolist() == ids
    for change, message in (
        (theirs.flip(0), r"row 3 has token \d+ at place 0 in the cache, \d+ here: other data, another order"),
        (theirs.roll(5, 1), "or padding on the left"),
        (theirs[:, :20], "row 3 has 45 tokens in the cache, 20 here"),
        (theirs[:1], "expected 2 rows, one for each id, got 1"),
        (theirs.index_fill(1, torch.tensor([59]), 4), "row 3 has 45 tokens in the cache, more than that here"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.rows(ids, change)


def test_workers_and_pickled_copies_open_the_files_themselves(whole, monkeypatch):
    cache = TeacherCache(whole)
    want = cache[5]
    again = pickle.loads(pickle.dumps(cache))
    assert again.shards._open == {} and torch.equal(again[5]["teacher_ids"], want["teacher_ids"])
    loader = torch.utils.data.DataLoader(cache, 8, collate_fn=cache.collate, num_workers=1)
    assert torch.cat([batch["row_id"] for batch in loader]).tolist() == list(range(40))


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a pickle was read")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, forbidden)
    cache = cache_run.run(tmp_path)
    cache.verify()
    assert cache.rows([0, 39])["row_id"].tolist() == [0, 39]
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
