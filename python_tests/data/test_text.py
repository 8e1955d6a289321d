"""Rows of token ids from every kind of text: same rows from each, nothing lost in packing, labels and ids as said."""

import ast
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("transformers")

import datasets
from lm import TEXTS, tokenizer

from kdfast.data import text


@pytest.fixture(scope="module", autouse=True)
def cache_folder(tmp_path_factory):
    """What `datasets` stores of a run goes with it."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


def as_lists(rows):
    return [row["input_ids"].tolist() for row in (rows[i] for i in range(len(rows)))]


def test_every_source_gives_the_same_rows(tmp_path):
    want = as_lists(text.token_rows(TEXTS, tokenizer(), max_length=64))
    table = datasets.Dataset.from_dict({"text": TEXTS})
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, document in enumerate(TEXTS):
        (folder / f"{i:03}.txt").write_text(document)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in TEXTS))
    table.to_parquet(tmp_path / "b.parquet")
    table.save_to_disk(tmp_path / "saved")
    for source in (folder, tmp_path / "a.jsonl", str(tmp_path / "b.parquet"), tmp_path / "saved", table):
        assert as_lists(text.token_rows(source, tokenizer(), max_length=64)) == want, source
    assert len(want) == len(TEXTS) and max(map(len, want)) == 64 and min(map(len, want)) < 64
    eos = tokenizer().eos_token_id
    for row, document in zip(want, TEXTS):
        whole = [*tokenizer()(document)["input_ids"], eos]
        assert row == whole[:64]


def test_packing_keeps_every_token_and_no_label_crosses_documents():
    rows = text.token_rows(TEXTS, tokenizer(), max_length=32, packing=True)
    stream = torch.cat([rows[i]["input_ids"] for i in range(len(rows))])
    labels = torch.cat([rows[i]["labels"] for i in range(len(rows))])
    eos = tokenizer().eos_token_id
    whole = [[*tokenizer()(document)["input_ids"], eos] for document in TEXTS]
    assert stream.tolist() == [token for row in whole for token in row]
    assert [rows.lengths.max(), set(rows.lengths[:-1])] == [32, {32}]
    first = torch.zeros(len(stream), dtype=torch.bool)
    first[torch.tensor([0, *map(len, whole[:-1])]).cumsum(0)] = True
    assert first.sum() == len(TEXTS) and torch.equal(labels == -100, first)
    assert torch.equal(labels[~first], stream[~first])


def test_an_empty_document_shifts_no_label():
    documents = ["alpha beta gamma", "", "delta epsilon", "", "zeta"]
    lengths = [row["length"] for row in text.token_rows(documents, tokenizer(), max_length=64).table]
    rows = text.token_rows(documents, tokenizer(), max_length=8, packing=True)
    labels = [label for i in range(len(rows)) for label in rows[i]["labels"].tolist()]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    assert [i for i, label in enumerate(labels) if label == -100] == starts and len(labels) == sum(lengths)


def test_rows_carry_their_id_and_pad_on_the_right():
    rows = text.token_rows(TEXTS, tokenizer(), max_length=64)
    short, long = int(rows.lengths.argmin()), int(rows.lengths.argmax())
    batch = text.collate_rows([rows[short], rows[long]], pad_id=7)
    assert batch["row_id"].tolist() == [short, long] and batch["input_ids"].shape == (2, rows.lengths[long])
    used = rows.lengths[short]
    assert torch.equal(batch["input_ids"][0, :used], rows[short]["input_ids"])
    assert (batch["input_ids"][0, used:] == 7).all() and (batch["labels"][0, used:] == -100).all()
    assert batch["attention_mask"].sum(1).tolist() == [rows.lengths[short], rows.lengths[long]]


def test_token_ids_are_taken_as_they_are():
    table = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7, 8], [9, 3]], "labels": [[-100, -100, 7, 8], [9, 3]]})
    rows = text.token_rows(table, None, max_length=3)
    assert as_lists(rows) == [[5, 6, 7], [9, 3]] and rows[0]["labels"].tolist() == [-100, -100, 7]
    packed = text.token_rows(table, None, max_length=4, packing=True)
    assert as_lists(packed) == [[5, 6, 7, 8], [9, 3]] and packed[1]["labels"].tolist() == [-100, 3]


def test_padding_in_a_table_is_no_text():
    """On either side, in rows made with padding="max_length"."""
    rows, pads = [[5, 6, 7, 8], [9, 3]], [[5, 6, 7, 8, 1, 1], [1, 1, 1, 1, 9, 3]]
    columns = {"input_ids": pads, "attention_mask": [[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]}
    for more, labels in (
        ({}, rows),
        ({"labels": [[-100, 6, 7, 8, -100, -100], [-100] * 5 + [3]]}, [[-100, 6, 7, 8], [-100, 3]]),
    ):
        found = text.token_rows(datasets.Dataset.from_dict(columns | more), None, max_length=6)
        assert as_lists(found) == rows and [found[i]["labels"].tolist() for i in (0, 1)] == labels


@pytest.mark.parametrize("labels", [[[6, 7, 8, -100]], [[5, 6]]], ids=["shifted", "short"])
def test_labels_in_a_table_are_its_tokens(labels):
    table = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7, 8]], "labels": labels})
    with pytest.raises(
        ValueError, match=r"data: expected labels that are the input_ids or -100, not shifted, got input_ids \[5, 6"
    ):
        text.token_rows(table, None)


def test_other_names_are_ids_on_the_hub(monkeypatch):
    asked = []
    table = datasets.Dataset.from_dict({"content": TEXTS[:2]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: asked.append((names, options)) or table)
    rows = text.token_rows("some/corpus", tokenizer(), column="content", split="test[:2]", config="en", revision="abc")
    assert asked == [(("some/corpus", "en"), {"split": "test[:2]", "revision": "abc"})] and len(rows) == 2


def test_limit_and_a_bare_tokenizer():
    bare = tokenizer().backend_tokenizer
    rows = text.token_rows(TEXTS, bare, limit=3)
    assert as_lists(rows) == tokenizer()(TEXTS[:3])["input_ids"]  # it knows no end-of-text token


def test_fingerprint_is_of_the_meaning_of_ids(tmp_path):
    ours = text.tokenizer_fingerprint(tokenizer())
    tokenizer().save_pretrained(tmp_path)
    for same in (
        text.load_tokenizer(tmp_path),
        text.load_tokenizer(tmp_path / "tokenizer.json"),
        tokenizer().get_vocab(),
    ):
        assert text.tokenizer_fingerprint(same) == ours
    vocabulary = dict(tokenizer().get_vocab())
    a, b = list(vocabulary)[:2]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    assert text.tokenizer_fingerprint(vocabulary) != ours and text.tokenizer_fingerprint(None) is None


def test_differing_tokens_are_named():
    ours, theirs = {"a": 0, "b": 1, "c": 2}, {"a": 0, "c": 1, "d": 4}
    differing = text.differing_tokens(ours, theirs)
    assert differing == {1: ("b", "c"), 2: ("c", None), 4: (None, "d")} and text.differing_tokens(ours, ours) == {}
    assert text.name_tokens(differing) == "id 1 is 'b' and 'c'; id 2 is 'c' and no token; id 4 is no token and 'd'"
    many = text.differing_tokens(ours | {"e": 7}, theirs)
    assert text.name_tokens(many) == text.name_tokens(differing) + "; 4 ids in all"


def test_what_is_wrong_is_said(tmp_path, monkeypatch):
    (tmp_path / "image.png").write_bytes(b"")
    for data, message in (
        (tmp_path / "none.jsonl", "data: no file or folder"),
        ("./none", "data: no file or folder"),
        (tmp_path, "expected .parquet, .jsonl, .json, .txt or a folder of them"),
    ):
        with pytest.raises(ValueError, match=message):
            text.token_rows(data, tokenizer())
    with pytest.raises(TypeError, match="got a list of something else"):
        text.token_rows([1, 2], tokenizer())
    with pytest.raises(ValueError, match="column: expected one of text, got 'content'"):
        text.token_rows(TEXTS, tokenizer(), column="content")
    with pytest.raises(ValueError, match="max_length: expected an int >= 2"):
        text.token_rows(TEXTS, tokenizer(), max_length=1)
    with pytest.raises(TypeError, match="tokenizer: expected one of transformers or tokenizers"):
        text.encode(object(), ["a"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"comes with the 'hf' extra .*pip install 'kdfast\[hf\]'"):
        text.token_rows(TEXTS, tokenizer())


def test_no_package_of_an_extra_is_imported_before_it_is_needed():
    folder = Path(text.__file__).parent
    for path in (folder / "text.py", *(folder / "teacher_cache").glob("*.py"), folder.parent / "nn" / "causal_lm.py"):
        imports = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        roots = {
            name.split(".")[0] for node in imports for name in [getattr(node, "module", None) or node.names[0].name]
        }
        assert roots <= {*sys.stdlib_module_names, "torch", "numpy", "kdfast"} and len(imports) > 2, path
