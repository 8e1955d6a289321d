"""The train extra is optional: without it only the message for its absence is tested."""

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("rich")
