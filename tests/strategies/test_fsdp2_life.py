"""FSDP2Strategy from an empty model to its checkpoints: two processes, one launch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launch import launch
from tests.strategies import fsdp2_probe as probe

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fsdp2_life")
    torch.manual_seed(21)
    model: Any = probe.llama()
    model.save_pretrained(out / "whole")
    model.save_pretrained(out / "parts", max_shard_size="2KB")
    model.model.save_pretrained(out / "body")
    gpt2: Any = probe.gpt2()
    gpt2.save_pretrained(out / "gpt2")
    shutil.copytree(out / "parts", out / "lacking")
    files = sorted((out / "lacking").glob("*.safetensors"))
    assert len(files) > 1
    files[0].unlink()
    return out


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    launch(Path(probe.__file__), "life", str(folder))
    return [torch.load(folder / f"life_rank{rank}.pt", weights_only=True) for rank in range(2)]


def assert_same_gradients(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> None:
    assert len(ours) == len(theirs) > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "make"), [("life", probe.Language), ("life of vectors", probe.Vectors)])
def test_a_life(name: str, make: Any, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    single = probe.life(tmp_path, lambda: "auto", make)
    for rank, found in enumerate(ranks):
        life = found[name]
        for fits in ("first", "second"):
            assert_same_gradients(life[fits]["gradients"], single[fits]["gradients"])
            torch.testing.assert_close(life[fits]["logged"], single[fits]["logged"], rtol=1e-5, atol=1e-5)
        assert life["first"]["weights"].keys() == single["first"]["weights"].keys()
        for moment in ("before", "after first", "after second"):
            for stage in ("validate", "test"):
                assert life[moment][stage][0] == pytest.approx(single[moment][stage][0], abs=1e-5)
            mine = _part(single[moment]["predict"], rank)
            torch.testing.assert_close(life[moment]["predict"], mine, rtol=1e-4, atol=1e-4)


def _part(predictions: torch.Tensor, rank: int) -> torch.Tensor:
    """What rank ``rank`` of two saw of the predictions of one process."""
    return predictions[rank::2]


@pytest.mark.parametrize("form", ["sharded", "full"])
def test_checkpoints(form: str, ranks: list[dict[str, Any]], folder: Path) -> None:
    for rank in ranks:
        expected, resumed = rank["checkpoints"][form], rank["checkpoints"][f"{form}/resumed"]
        for step in (2, 3):
            for key, grad in expected["gradients"][step].items():
                assert torch.equal(grad, resumed["gradients"][step - 2][key]), (step, key)
        assert resumed["weights"].keys() == expected["weights"].keys()
        assert all(torch.equal(w, resumed["weights"][key]) for key, w in expected["weights"].items())
        tested = rank["checkpoints"][f"{form}/tested"]
        assert tested == ranks[0]["checkpoints"]["sharded/tested"]


@pytest.mark.parametrize("form", ["sharded", "full"])
@pytest.mark.parametrize("name", ["manual", "compiled"])
def test_checkpoints_of_several_optimizers_and_compiled_models(
    form: str, name: str, ranks: list[dict[str, Any]]
) -> None:
    for rank in ranks:
        expected, resumed = rank["checkpoints"][f"{form}/{name}"], rank["checkpoints"][f"{form}/{name}/resumed"]
        assert len(expected["weights"]) == 19
        assert all(torch.equal(w, resumed["weights"][key]) for key, w in expected["weights"].items())


def reference(folder: Path, tmp_path: Path, kind: str = "whole") -> dict[str, Any]:
    """One process with the weights read by transformers."""
    from transformers import AutoModelForCausalLM

    make = lambda: probe.Language(lambda: AutoModelForCausalLM.from_pretrained(folder / kind).train())  # noqa: E731
    return probe.fit(tmp_path, "auto", make)


@pytest.mark.parametrize("name", ["folder", "shards", "meta device", "offloaded"])
def test_weights_of_a_model_without_memory(
    name: str, ranks: list[dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    single = reference(folder, tmp_path)
    for rank in ranks:
        found = rank["materialized"][name]
        assert_same_gradients(found["gradients"], single["gradients"])
        torch.testing.assert_close(found["weights"], single["weights"], rtol=1e-5, atol=1e-5)
        frequencies = found["buffers"]["model.model.rotary_emb.inv_freq"]
        torch.testing.assert_close(frequencies, torch.tensor([1.0]))


def test_tied_weights_of_a_model_without_memory(ranks: list[dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    single = reference(folder, tmp_path, "gpt2")
    for rank in ranks:
        assert_same_gradients(rank["materialized"]["tied"]["gradients"], single["gradients"])


@pytest.mark.parametrize(("name", "make"), [("tied", probe.gpt2), ("buffers", probe.llama)])
def test_weights_of_rank_0(name: str, make: Any, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    single = probe.fit(tmp_path, "auto", lambda: probe.OnRankZero(make))
    for rank in ranks:
        assert_same_gradients(rank["rank zero"][name]["gradients"], single["gradients"])


def test_what_no_file_holds_is_initialised(ranks: list[dict[str, Any]], folder: Path) -> None:
    from safetensors.torch import load_file

    saved = load_file(folder / "body" / "model.safetensors")
    start = ranks[0]["materialized"]["body"]["start"]
    assert len(start) == len(saved) + 1
    for name, value in saved.items():
        assert torch.equal(start[f"model.model.{name}"], value), name
    head = start["model.lm_head.weight"]
    assert 0.01 < head.std() < 0.04  # the architecture's initializer_range is 0.02
    assert torch.equal(head, ranks[1]["materialized"]["body"]["start"]["model.lm_head.weight"])


def test_drawn_weights(ranks: list[dict[str, Any]]) -> None:
    for name in ("drawn", "drawn vectors"):
        starts = [rank["materialized"][name]["start"] for rank in ranks]
        assert len(starts[0]) > 3
        for key, value in starts[0].items():
            assert torch.equal(value, starts[1][key])
            assert value.isfinite().all()
            assert value.std() > 0 or value.unique().item() in (0.0, 1.0)
    gpt2 = ranks[0]["materialized"]["drawn"]["start"]
    assert gpt2["model.transformer.h.0.attn.c_attn.weight"].std().item() == pytest.approx(0.02, rel=0.2)
    assert not torch.equal(gpt2["model.transformer.h.0.ln_1.weight"], gpt2["model.transformer.h.0.ln_1.bias"])
    linear = ranks[0]["materialized"]["drawn vectors"]["start"]["model.0.weight"]
    assert linear.abs().max() <= 5**-0.5  # the bound of torch's own initialisation


def test_ranks_that_drew_differently_take_rank_0s_weights(ranks: list[dict[str, Any]]) -> None:
    torch.manual_seed(5)
    expected = dict(probe.Vectors().named_parameters())
    for rank in ranks:
        assert rank["unlike"].keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(rank["unlike"][name], value), name


@pytest.mark.parametrize(("name", "quantised"), [("lora", False), ("qlora", True)])
def test_adapters(name: str, quantised: bool, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    single = probe.adapters(tmp_path, "auto", quantised)
    for rank in ranks:
        assert_same_gradients(rank[name]["gradients"], single["gradients"])
        assert all("lora_" in key for key in rank[name]["gradients"][0])
        assert len(rank[name]["gradients"][0]) == 12
        assert len(rank[name]["groups"]) == 4
    dtypes = {w.dtype for key, w in ranks[0][name]["weights"].items() if "q_proj.base_layer" in key}
    assert dtypes == {torch.uint8 if quantised else torch.float32}


def test_mistakes_are_said_on_every_rank_before_training(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["mistakes"]
        assert "of bfloat16 and float32 lie in one FSDP2 group (model.blocks.1)" in found["dtypes"]
        assert "2 processes cannot be laid out with tensor_parallel_size=3" in found["tensor"]
        assert "data_parallel_size=3" in found["data"]
        assert "num_replicas=3 does not divide the 2" in found["replicas"]
        assert "Did you mean 'LlamaDecoderLayer'" in found["blocks"]
        assert "Did you mean 'model.model.layers.*'?" in found["container"]
        assert "differently on rank 0 and rank 1: more.bias, more.weight" in found["different"]
        assert "neither a safetensors file nor a folder" in found["no folder"]
        assert "is not whole: model-00001-of-" in found["not whole"]
        assert found["other model"].startswith("BaseMismatch: The weights at")
        assert "Rank 1 has the model's weights and rank 0 has not" in found["rank 1 alone"]
        assert "differently on rank 0 and rank 1" in found["another on rank 0"]
        assert "Stack has no reset_parameters()" in found["no reset"]


def test_gradients_travel_once_per_step_and_only_those_of_what_trains(ranks: list[dict[str, Any]]) -> None:
    sent = ranks[0]["traffic"]
    numbers = {name: p.numel() for name, p in probe.Vectors().named_parameters()}
    assert len(sent["plain"]) == 5  # four blocks and the rest
    assert sent["accumulated"] == sent["plain"]
    assert sent["in shards"] == sent["plain"] * 4
    assert sum(sent["plain"]) >= sum(numbers.values())  # rows are filled up to a multiple of the ranks
    trains = sum(number for name, number in numbers.items() if "2." in name or "head" in name)
    assert len(sent["frozen below"]) == 2
    assert trains <= sum(sent["frozen below"]) < 1.5 * trains < sum(numbers.values())


def test_only_blocks_that_a_gradient_flows_through_are_computed_again(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["recomputed"] == {"all train": [2, 2, 2, 2], "frozen below": [1, 1, 2, 2]}
