"""The files that take longest come first, so that no worker is left alone with one at the end."""

from __future__ import annotations

import pytest

LONGEST = ("test_quickstart.py", "test_fsdp.py", "test_fsdp2.py", "test_multi_node.py", "test_ddp.py")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
