"""Two nodes of two processes each, both on this machine: what torchrun does on a cluster."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_peft import consolidate_checkpoint
from tests.models.tiny_models import LLAMA, save_tokenizer
from tests.strategies import multi_node_probe as probe

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore::UserWarning")]


def launch_nodes(script: Path, *arguments: str, num_nodes: int = 2, num_processes: int = 2, timeout: int = 500) -> None:
    """Start one torchrun per node and fail with the output of all if one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={num_nodes}"]
    command += [f"--nproc-per-node={num_processes}", "--master-addr=127.0.0.1", f"--master-port={port}"]
    nodes = [
        subprocess.Popen(
            [*command, f"--node-rank={rank}", str(script), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num_nodes)
    ]
    try:
        outputs = [node.communicate(timeout=timeout)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert all(node.returncode == 0 for node in nodes), "\n".join(output[-8000:] for output in outputs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    out = tmp_path_factory.mktemp("nodes")
    torch.manual_seed(2)
    values = {key: value for key, value in LLAMA.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(LLAMA["model_type"], **values))
    model.save_pretrained(out / "llama")
    save_tokenizer(out / "llama")
    records = [{"prompt": f"a b {'c ' * (i % 3)}", "response": "d e"} for i in range(40)]
    (out / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    return out


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    launch_nodes(Path(probe.__file__), str(folder))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(4)]


@pytest.mark.parametrize("name", ["sharded everywhere", "sharded within a node"])
def test_lisa_over_two_nodes(name: str, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    single = probe.fit(tmp_path, "auto")
    assert len({tuple(names) for _, names in single["history"]}) > 1
    for rank in ranks:
        assert rank[name]["history"] == single["history"]
        assert len(rank[name]["gradients"]) == len(single["gradients"]) == 4
        torch.testing.assert_close(rank[name]["gradients"], single["gradients"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(rank[name]["weights"], single["weights"], rtol=1e-5, atol=1e-5)


def test_resume_in_the_middle_of_the_schedule(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        expected, resumed = rank["sharded everywhere"], rank["resumed"]
        assert resumed["history"] == expected["history"]
        assert len(expected["weights"]) > 10
        assert all(torch.equal(w, resumed["weights"][name]) for name, w in expected["weights"].items())


def test_recipe(ranks: list[dict[str, Any]], folder: Path) -> None:
    assert [rank["recipe"] for rank in ranks] == [rank["recipe, hybrid"] for rank in ranks] == [0] * 4
    last = folder / "run" / "last.ckpt"
    assert len(list(last.glob("*.distcp"))) == 4
    checkpoint = consolidate_checkpoint(last, weights_only=False)
    assert checkpoint["global_step"] == 3
    assert checkpoint["lightning_peft"]["methods"][0]["method"].startswith("LISA")
    assert checkpoint["lightning_peft/partial_state"]["trainable"]
    pretrained = load_file(folder / "llama" / "model.safetensors")
    weights = {key.removeprefix("model."): value for key, value in checkpoint["state_dict"].items()}
    assert pretrained.keys() <= weights.keys()
    assert not all(torch.equal(weights[key], value) for key, value in pretrained.items())
