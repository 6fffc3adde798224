"""One line a set-up when only these tests are run."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.option.verbose += 1
