"""The corpus: disjoint splits that depend on names alone, bounded sizes, a tokenizer that loses nothing."""

import pytest

from kdfast.data import stdlib_text as corpus


def test_splits_share_no_file_and_are_most_of_the_library():
    names = [name for name, _ in corpus.stdlib_files()]
    assert names == sorted(names) and "argparse.py" in names
    assert not any(part in name for name in names for part in ("site-packages", "/test/", "encodings/"))
    val = [name for name in names if corpus.split_of(name) == "val"]
    assert 0.01 < len(val) / len(names) < 0.12


def test_texts_are_bounded_and_the_same_again():
    small = corpus.stdlib_text("val", max_bytes=40_000)
    assert 20_000 < sum(len(text.encode()) for text in small) <= 40_000
    assert small == corpus.stdlib_text("val", max_bytes=40_000)
    train = corpus.stdlib_text("train", max_bytes=300_000)
    assert not set(small) & set(train)
    first = corpus.corpus_identity(small)
    assert first["documents"] == len(small) and first != corpus.corpus_identity(small[:-1])
    with pytest.raises(ValueError, match="split: expected one of train, val, got 'test'"):
        corpus.stdlib_text("test")
    with pytest.raises(ValueError, match="fits into 1 bytes"):
        corpus.stdlib_text("val", max_bytes=1)


def test_the_tokenizer_gives_back_every_byte():
    pytest.importorskip("transformers")
    tokenizer = corpus.train_tokenizer(corpus.stdlib_text("train", max_bytes=100_000), 400)
    assert len(tokenizer) == 400
    for text in (
        "def f(x):\n\treturn  x\r\n",
        "nüchtern 漢字 \x00 <|en d|>",
        corpus.stdlib_text("val", max_bytes=20_000)[0],
    ):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    again = corpus.train_tokenizer(corpus.stdlib_text("train", max_bytes=100_000), 400)
    assert again.get_vocab() == tokenizer.get_vocab()
    with pytest.raises(ValueError, match="vocab_size: expected at least the 256 bytes"):
        corpus.train_tokenizer(["a"], 100)
