"""Cases of a parametrized test."""

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A case that the default suite leaves out."""
    return pytest.param(*values, marks=pytest.mark.slow)
