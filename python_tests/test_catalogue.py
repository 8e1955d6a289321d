"""The catalogue is whole, and says "ready" of exactly what is here."""

import re
from pathlib import Path

import pytest

import kdfast
from kdfast import methods
from kdfast.catalogue import BASELINES, CATALOGUE, find

ROWS = (*BASELINES, *CATALOGUE)
OPS = {"divergence", "selective", "sinkhorn", "token_graph", "pairwise", "routing"}


def test_38_papers_once_each_in_order():
    assert [row.number for row in CATALOGUE] == list(range(1, 39))
    for values in ([row.slug for row in ROWS], [row.arxiv for row in ROWS], [row.title for row in ROWS]):
        assert len(set(values)) == len(values)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.slug)
def test_row_is_well_formed(row):
    assert re.fullmatch(r"[a-z][a-z0-9_]*", row.slug) and len(row.title) > 10
    year, month = re.fullmatch(r"(\d\d)(\d\d)\.\d{5}", row.arxiv).groups()
    assert 2000 + int(year) == row.year and 1 <= int(month) <= 12
    assert set(row.ops) <= OPS and row.needs and row.task and row.status in ("ready", "planned")


def test_ready_means_the_file_is_here():
    ready = {row.slug for row in ROWS if row.status == "ready"}
    files = set(methods.available())
    assert ready - files == set(), "ready in kdfast/catalogue.py without a file in kdfast/methods/"
    assert files - ready == set(), (
        'a file in kdfast/methods/ whose row in kdfast/catalogue.py does not say status="ready"'
    )


@pytest.mark.parametrize("slug", methods.available())
def test_ready_methods_name_their_paper_and_run_by_name(slug):
    text = (Path(kdfast.__file__).parent / "methods" / f"{slug}.py").read_text()
    assert find(slug).arxiv in text.split('"""')[1]
    assert callable(methods.load(slug))


def test_find_gives_near_names():
    assert find("sinkd").number == 16
    with pytest.raises(ValueError, match="method: there is no 'sinkdd'; did you mean sinkd"):
        find("sinkdd")
