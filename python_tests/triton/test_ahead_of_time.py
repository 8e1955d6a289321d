"""Every Triton kernel compiled for sm_80, sm_90, sm_100 and gfx942, and what it uses against the committed table."""

from __future__ import annotations

import pytest
from triton_mode import only

only("ahead")

import triton  # noqa: E402

from tools import triton_table  # noqa: E402

TABLE = triton_table.load()
# Those that move a model's logits or iterate; the others hold up to 8 bytes of a stack on some target.
HOT = (
    "divergence_kernel", "log_sums_kernel", "selective_kernel",
    "candidates_kernel", "rank_kernel", "edge_gradient_kernel", "cost_kernel", "cost_gradient_kernel", "contrast_kernel", "relation_kernel",
    "solve_kernel", "reverse_kernel", "half_step_kernel", "reverse_step_kernel", "gradient_kernel", "soften_kernel", "soften_backward_kernel",
    "softmin_kernel", "softmin_gradient_kernel",
)  # fmt: skip


def test_the_table_has_every_case_and_the_page_is_made_from_it():
    assert list(TABLE["cases"]) == list(triton_table.CASES)
    assert triton_table.PAGE.read_text() == triton_table.page(TABLE), "run `make triton-table`"


@pytest.mark.parametrize("target", triton_table.TARGETS)
@pytest.mark.parametrize("case", triton_table.CASES)
def test_compiles_and_spills_no_more_than_before(case, target):
    now, before = triton_table.uses(case, target), TABLE["cases"][case][target]
    assert [use["kernel"] for use in now] == [use["kernel"] for use in before], "run `make triton-table`"
    for new, old in zip(now, before):
        assert new["spilled"] <= old["spilled"], f"{new} spills more than {old}"
        if triton.__version__ == TABLE["triton"]:  # another version allocates otherwise
            for key in ("registers", "shared"):
                assert new[key] <= old[key], f"{new}, before {old}: `make triton-table`?"
    if target == "sm_90":
        assert not any(use["spilled"] for use in now if use["kernel"] in HOT), (
            "a kernel of every step must not spill on sm_90"
        )
