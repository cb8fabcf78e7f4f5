"""A run that was started by two processes, went on with one, and was ended by two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import world_size_probe
from tests.distributed.launch import launch
from tests.distributed.world_size_probe import FORMS, ROW_NAMES

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("world_size")
    sizes = {"start": 2, "middle": 1, "end": 2}
    for stage, size in sizes.items():
        launch(Path(world_size_probe.__file__), str(out), stage, num_processes=size)
    return {
        stage: [torch.load(out / f"{stage}{rank}.pt", weights_only=True) for rank in range(size)]
        for stage, size in sizes.items()
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("row", ROW_NAMES)
def test_two_one_two_processes_continue_one_run(row: str, form: str, stages: dict[str, Any]) -> None:
    key = f"{row}/{form}"
    whole_run = stages["start"][0][key]  # saves after 4 steps and goes on to the end
    assert whole_run["steps"] == 12
    assert stages["middle"][0][key]["steps"] == 8
    for rank in stages["end"]:
        assert rank[key]["steps"] == 12
        assert rank[key]["histories"] == whole_run["histories"]
        for name, value in rank[key]["weights"].items():
            # sums over one and over two processes differ in rounding; Adam makes more of it
            torch.testing.assert_close(value, whole_run["weights"][name], rtol=1e-4, atol=1e-4, msg=f"{name}: ".__add__)
    for name, value in stages["end"][0][key]["weights"].items():
        assert torch.equal(value, stages["end"][1][key]["weights"][name])
