"""Optimizer states under stock FSDP2 while parameters freeze and thaw: saved and resumed bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_peft import consolidate_checkpoint
from lightning_peft.errors import ConfigError
from tests.distributed.launch import launch
from tests.strategies import partial_state_probe as probe

pytestmark = pytest.mark.distributed
FORMS = ("sharded", "full")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("partial_state")


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[str, Any]:
    return probe.fit(folder, SingleDeviceStrategy("cpu"), probe.Save(folder / "single"))


@pytest.fixture(scope="module")
def ranks(folder: Path, single: dict[str, Any]) -> list[dict[str, Any]]:
    launch(Path(probe.__file__), "two", str(folder))
    return [torch.load(folder / f"two_rank{rank}.pt", weights_only=True) for rank in range(2)]


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any], **tolerance: float) -> None:
    """Weights, the set of parameters with state, every leaf of it and the groups' settings are the same."""
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    assert ours["states"].keys() == theirs["states"].keys()
    assert ours["groups"] == theirs["groups"]
    assert len(ours["weights"]) == 18
    for part in ("weights", "states"):
        torch.testing.assert_close(ours[part], theirs[part], **tolerance)


def test_two_ranks_train_as_one_process(ranks: list[dict[str, Any]], single: dict[str, Any]) -> None:
    assert len(single["states"]) == 18
    for rank in ranks:
        assert_equal(rank["plain"], single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("policy", ["keep", "drop"])
def test_resume_is_bit_exact(form: str, policy: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        expected = rank[f"{form}/{policy}"]
        assert len(expected["states"]) == (18 if policy == "keep" else 6)
        for position in probe.POSITIONS:
            assert_equal(rank[f"{form}/{policy}/{position}"], expected)


@pytest.mark.parametrize("form", FORMS)
def test_saving_changes_nothing(form: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:  # torch's own function steps an optimizer that has no state yet
        assert_equal(rank[f"{form}/keep"], rank["plain"])


@pytest.mark.parametrize("form", FORMS)
def test_state_of_frozen_parameters_comes_back_and_nothing_else(form: str, ranks: list[dict[str, Any]]) -> None:
    for policy, blocks in (("keep", {"0", "1", "2"}), ("drop", {"1"})):
        states = ranks[0][f"{form}/{policy}/5"]["loaded"]["states"]
        assert {name.split(".")[1] for name in states if name.startswith("blocks")} == blocks
        assert len(states) == 4 * len(blocks) + 2
    assert ranks[0][f"{form}/keep/0"]["loaded"]["states"] == {}


def test_flags_set_after_validation_hold(ranks: list[dict[str, Any]]) -> None:
    assert_equal(ranks[0]["validation"], ranks[0]["plain"])


def test_checkpoint_of_one_process_on_two(ranks: list[dict[str, Any]], single: dict[str, Any], folder: Path) -> None:
    # the optimizer's order is not the model's: going by the model's would mix the moments up
    saved = torch.load(folder / "single" / "5.ckpt", weights_only=True)
    order = [n for n, p in probe.Module().named_parameters() if p.ndim >= 2]
    order += [n for n, p in probe.Module().named_parameters() if p.ndim < 2]
    expected = {order[index]: leaves for index, leaves in saved["optimizer_states"][0]["state"].items()}
    assert len(expected) == 14
    for rank in ranks:
        torch.testing.assert_close(rank["from_one"]["loaded"]["states"], expected, rtol=0, atol=0)
        assert_equal(rank["from_one"], single, rtol=1e-5, atol=1e-5)


def test_full_checkpoint_of_two_ranks_in_one_process(
    ranks: list[dict[str, Any]], single: dict[str, Any], folder: Path
) -> None:
    resumed = probe.fit(folder, SingleDeviceStrategy("cpu"), ckpt=folder / "full" / "True" / "5.ckpt")
    assert_equal(resumed["loaded"], ranks[0]["full/keep/5"]["loaded"])
    assert_equal(resumed, single, rtol=1e-5, atol=1e-5)


def test_world_of_one(ranks: list[dict[str, Any]], single: dict[str, Any], folder: Path) -> None:
    launch(Path(probe.__file__), "one", str(folder), num_processes=1)
    results = torch.load(folder / "one_rank0.pt", weights_only=True)
    for form in FORMS:
        assert_equal(results[form]["loaded"], ranks[0][f"{form}/keep/5"]["loaded"])
        assert_equal(results[form], single, rtol=1e-5, atol=1e-5)


def test_optimizer_without_any_state(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["sgd"]["states"] == {}
    assert_equal(ranks[0]["sgd/5"], ranks[0]["sgd"])


@pytest.mark.parametrize("form", FORMS)
def test_state_that_is_laid_out_otherwise(form: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank[f"columns/{form}"]["states"]["blocks.0.linear.weight"]["sums"].shape == (probe.WIDTH,)
        assert_equal(rank[f"columns/{form}/5"], rank[f"columns/{form}"])
    assert_equal(ranks[0][f"columns/{form}"], ranks[1][f"columns/{form}"])


def test_state_of_one_rank_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["local"].startswith("UnsupportedStrategy: Local keeps 'seen'")


@pytest.mark.parametrize("policy", ["True", "False"])
def test_consolidated_checkpoint_equals_the_full_one(policy: str, ranks: list[dict[str, Any]], folder: Path) -> None:
    file = folder / f"consolidated_{policy}.ckpt"
    made = consolidate_checkpoint(folder / "sharded" / policy / "5.ckpt", file)
    full = torch.load(folder / "full" / policy / "5.ckpt", weights_only=True)
    torch.testing.assert_close(made["state_dict"], full["state_dict"], rtol=0, atol=0)
    assert made["state_dict"].keys() == probe.Module().state_dict().keys()
    optimizer = probe.Module().configure_optimizers()
    optimizer.load_state_dict(made["optimizer_states"][0])
    other = probe.Module().configure_optimizers()
    other.load_state_dict(full["optimizer_states"][0])
    left, right = optimizer.state_dict(), other.state_dict()
    assert len(left["state"]) == {"True": 14, "False": 6}[policy]
    torch.testing.assert_close(left["state"], right["state"], rtol=0, atol=0)
    assert left["param_groups"] == right["param_groups"]
    resumed = probe.fit(folder, SingleDeviceStrategy("cpu"), ckpt=file, keep=policy == "True")
    assert_equal(resumed["loaded"], ranks[0][f"full/{'keep' if policy == 'True' else 'drop'}/5"]["loaded"])


def test_consolidate_mistakes(folder: Path, ranks: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="whole already"):
        consolidate_checkpoint(folder / "full" / "True" / "5.ckpt")
    with pytest.raises(ConfigError, match=r"no folder with meta\.pt"):
        consolidate_checkpoint(folder / "nothing")
    with pytest.raises(ConfigError, match=r"__1_0\.distcp missing"):
        consolidate_checkpoint(folder / "broken.ckpt")
    with pytest.raises(ConfigError, match="name the file"):
        consolidate_checkpoint(folder / "sharded" / "True" / "5.ckpt", folder)


def test_mixed_precision_of_blocks_that_thaw_later(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert_equal(rank["mixed/5"], rank["mixed"])
    differences = [
        (a - b).abs().max().item()
        for a, b in zip(ranks[0]["mixed"]["weights"].values(), ranks[0]["plain"]["weights"].values(), strict=True)
    ]
    assert max(differences) > 0  # it was computed in bfloat16


@pytest.mark.parametrize("form", FORMS)
def test_only_what_trained_is_in_the_file(form: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        loaded = rank[f"delta/{form}/loaded"]
        at_save = rank[f"{form}/keep/5"]["loaded"]
        assert loaded["states"].keys() == at_save["states"].keys()
        torch.testing.assert_close(loaded["states"], at_save["states"], rtol=0, atol=0)
        for name, value in loaded["weights"].items():
            if name.endswith("linear.weight") or name.startswith("head."):  # the others start at the same constants
                saved = name.startswith(("blocks.1.", "head."))
                assert torch.equal(value, at_save["weights"][name]) == saved, name
        message = rank[f"delta/{form}/strict"]
        assert message.startswith("ResumeMismatch")
        assert "blocks.0.norm.weight" in message
        assert "strict_loading=False" in message


@pytest.mark.parametrize("form", FORMS)
def test_mistakes_are_said_on_every_rank(form: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "heads.weight, heads.bias (nearest there: head.weight)" in rank[f"renamed/{form}"]
        assert "not in the model: head.weight, head.bias" in rank[f"renamed/{form}"]
        assert rank[f"regrouped/{form}"].startswith("ResumeMismatch: The optimizer")
        assert rank[f"renamed/{form}/flags"] is rank[f"regrouped/{form}/flags"] is True
        assert "weights_only=False" in rank[f"weights_only/{form}/default"]
        assert rank[f"weights_only/{form}/off"] == "no error"


def test_broken_folders(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["nothing"].startswith("ConfigError: No checkpoint at")
        assert "rank(s) 0, 1 cannot see __1_0.distcp" in rank["missing_file"]
