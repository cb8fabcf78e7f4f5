from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import BatchSampler, SequentialSampler

from lightning_peft.data.loader import EpochSampler, ResumableDataLoader, epoch_order
from lightning_peft.errors import ConfigError, ResumeMismatch
from tests.data.resume_probe import Checkpoints, fit

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler:UserWarning"),
]


def ids(loader: ResumableDataLoader) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


def resume_everywhere(tmp_path: Path, options: dict[str, Any], **kwargs: Any) -> Counter[str]:
    """Resume from a checkpoint of every hook; return how many checkpoints of each hook gave the right batches."""
    checkpoints = Checkpoints(tmp_path)
    whole = fit(options, checkpoints=checkpoints, **kwargs)
    right: Counter[str] = Counter()
    for hook, done, path in checkpoints.points:
        if hook == "epoch_start" and done and "max_epochs" in options:
            continue  # Lightning 2.6 itself leaves out an epoch when the checkpoint is from this hook
        assert fit(options, ckpt_path=path, **kwargs) == whole[done:], (hook, done)
        right[hook] += 1
    return right


@pytest.mark.parametrize("length", [{"max_epochs": 3}, {"max_steps": 9, "max_epochs": -1}], ids=["epochs", "steps"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"limit_train_batches": 3},
        {"val_check_interval": 2},
        {"limit_val_batches": 0},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_resume_gives_the_rest_of_the_batches(tmp_path: Path, length: dict[str, Any], options: dict[str, Any]) -> None:
    right = resume_everywhere(tmp_path, {**length, **options})
    assert right["batch_end"] >= 9
    assert right["before_forward"] == right["before_step"] == right["batch_end"]
    assert right["epoch_end"] >= 3
    assert right["validation_end"] >= (0 if "limit_val_batches" in options else 2)


@pytest.mark.parametrize("length", [{"max_epochs": 2}, {"max_steps": 6, "max_epochs": -1}], ids=["epochs", "steps"])
def test_resume_when_the_schedule_counts_the_steps_first(tmp_path: Path, length: dict[str, Any]) -> None:
    """Lightning sets the loader up before it has read the checkpoint, and then never loads the loader's state."""
    assert resume_everywhere(tmp_path, length, count_steps=True)["batch_end"] >= 6


def test_resume_with_prefetching_workers(tmp_path: Path) -> None:
    options = {"max_epochs": 2, "limit_val_batches": 0}
    assert resume_everywhere(tmp_path, options, num_workers=2)["batch_end"] == 8


def test_a_resumed_run_can_be_resumed_again(tmp_path: Path) -> None:
    options = {"max_steps": 11, "max_epochs": -1, "limit_val_batches": 0}
    (tmp_path / "second").mkdir()
    first, second = Checkpoints(tmp_path), Checkpoints(tmp_path / "second")
    whole = fit(options, checkpoints=first)
    done, path = next((done, path) for hook, done, path in first.points if hook == "epoch_end")
    fit(options, checkpoints=second, ckpt_path=path)
    assert len(second.points) > 20
    for hook, more, again in second.points:
        if hook != "epoch_start":
            assert fit(options, ckpt_path=again) == whole[done + more :], (hook, done + more)


@pytest.mark.distributed
def test_ddp_with_two_processes(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("resume_probe.py")), str(tmp_path)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for rank in ranks:
        hooks = Counter(hook for hook, _, _ in rank["resumed"])
        assert hooks == {"before_step": 6, "batch_end": 6, "epoch_end": 2}
        for hook, done, rest in rank["resumed"]:
            assert rest == rank["whole"][done:], (hook, done)
    # 13 samples on two ranks are 7 each, one of them twice: three batches of 3, 3, 1 in each of two epochs
    assert [len(batch) for batch in ranks[0]["whole"]] == [3, 3, 1, 3, 3, 1]
    for epoch in (0, 1):
        seen = Counter(
            sample for rank in ranks for batch in rank["whole"][3 * epoch : 3 * epoch + 3] for sample in batch
        )
        assert set(seen) == set(range(13))
        assert sum(seen.values()) == 14


def test_order_is_a_function_of_seed_and_epoch_only() -> None:
    orders = {(seed, epoch): tuple(epoch_order(20, epoch, seed)) for seed in range(6) for epoch in range(6)}
    assert len(set(orders.values())) == 36
    assert all(sorted(order) == list(range(20)) for order in orders.values())
    torch.manual_seed(1234)
    assert {key: tuple(epoch_order(20, key[1], key[0])) for key in orders} == orders


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_global_generator_is_left_alone(num_workers: int) -> None:
    before = torch.get_rng_state()
    loader = ResumableDataLoader(range(5), batch_size=2, num_workers=num_workers)
    ids(loader)
    loader.load_state_dict(loader.state_dict())
    assert torch.equal(torch.get_rng_state(), before)


def test_prefetched_batches_do_not_count() -> None:
    loader = ResumableDataLoader(range(40), batch_size=2, num_workers=2, prefetch_factor=4)
    batches = iter(loader)
    assert loader.state_dict()["batches"] == 0
    next(batches)
    next(batches)
    assert loader.state_dict()["batches"] == 2


class Noise(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.rand(1)


def test_workers_are_seeded_by_seed_and_epoch() -> None:
    def noise(seed: int, epoch: int) -> list[float]:
        loader = ResumableDataLoader(Noise(), batch_size=4, seed=seed, num_workers=1)
        loader.set_epoch(epoch)
        return [value for batch in loader for value in batch.flatten().tolist()]

    torch.manual_seed(1)
    first = noise(0, 0)
    torch.manual_seed(2)
    assert noise(0, 0) == first
    assert noise(0, 1) != first
    assert noise(1, 0) != first


def test_epochs_without_lightning() -> None:
    loader = ResumableDataLoader(range(7), batch_size=3, seed=2)
    epochs = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        epochs.append(ids(loader))
    assert [[sample for batch in batches for sample in batch] for batches in epochs] == [
        epoch_order(7, epoch, 2) for epoch in range(3)
    ]
    loader.set_epoch(1)
    assert next(iter(loader)).tolist() == epochs[1][0]
    other = ResumableDataLoader(range(7), batch_size=3, seed=2)
    other.load_state_dict(loader.state_dict())
    assert ids(other) == epochs[1][1:]
    other.set_epoch(2)
    assert ids(other) == epochs[2]


@pytest.mark.parametrize("num_samples", [1, 6, 7, 8])
@pytest.mark.parametrize("num_replicas", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_shards_have_equal_lengths_and_cover_the_data(num_samples: int, num_replicas: int, drop_last: bool) -> None:
    samplers = [
        EpochSampler(torch.arange(num_samples), drop_last=drop_last, num_replicas=num_replicas, rank=rank)  # pyright: ignore[reportArgumentType]
        for rank in range(num_replicas)
    ]
    shards = [list(sampler) for sampler in samplers]
    assert {len(shard) for shard in shards} == {len(sampler) for sampler in samplers}
    assert len({len(shard) for shard in shards}) == 1
    seen = Counter(sample for shard in shards for sample in shard)
    if drop_last:
        assert max(seen.values(), default=1) == 1
        assert num_samples - sum(seen.values()) < num_replicas
    else:
        assert set(seen) == set(range(num_samples))
        assert sum(seen.values()) - num_samples < num_replicas


def test_without_shuffling_the_order_is_the_dataset() -> None:
    assert ids(ResumableDataLoader(range(5), batch_size=2, shuffle=False)) == [[0, 1], [2, 3], [4]]
    assert ids(ResumableDataLoader(range(5), batch_size=2, shuffle=False, drop_last=True)) == [[0, 1], [2, 3]]


def test_a_batch_sampler_of_ones_own_keeps_the_position() -> None:
    def loader() -> ResumableDataLoader:
        sampler = BatchSampler(SequentialSampler(range(9)), batch_size=2, drop_last=False)
        return ResumableDataLoader(range(9), batch_sampler=sampler)

    first = loader()
    batches = iter(first)
    next(batches)
    next(batches)
    again = loader()
    again.load_state_dict(first.state_dict())
    assert ids(again) == [[4, 5], [6, 7], [8]]
    assert ids(again) == [[0, 1], [2, 3], [4, 5], [6, 7], [8]]


def test_another_order_is_refused() -> None:
    state = ResumableDataLoader(range(5), batch_size=2, seed=3).state_dict()
    with pytest.raises(ResumeMismatch, match=r"seed was 3 and is 4.*num_samples was 5 and is 6"):
        ResumableDataLoader(range(6), batch_size=2, seed=4).load_state_dict(state)
    with pytest.raises(ResumeMismatch, match="batch_size was 2 and is 1"):
        ResumableDataLoader(range(5), seed=3).load_state_dict(state)


def test_no_length_or_nothing_in_it() -> None:
    with pytest.raises(ConfigError, match="a dataset with a length, and generator has none"):
        ResumableDataLoader(i for i in range(3))
    with pytest.raises(ConfigError, match="empty"):
        ResumableDataLoader([])


@pytest.mark.filterwarnings("ignore:You requested to overfit:UserWarning")
def test_lightning_can_take_the_loader_apart() -> None:
    """``overfit_batches`` and ``predict`` build the loader anew with another sampler."""
    options = {"max_epochs": 2, "overfit_batches": 2, "limit_val_batches": 0}
    assert fit(options) == [[0, 1, 2], [3, 4, 5]] * 2

    class Predict(pl.LightningModule):
        def predict_step(self, batch: torch.Tensor, batch_idx: int) -> list[int]:
            return batch.tolist()

    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    loader = ResumableDataLoader(range(5), batch_size=2, shuffle=False, drop_last=True)
    assert trainer.predict(Predict(), loader) == [[0, 1], [2, 3], [4]]


def test_another_number_of_processes_goes_on_in_the_same_global_batches() -> None:
    def loaders(num_processes: int) -> list[ResumableDataLoader]:
        found = []
        for rank in range(num_processes):
            loader = ResumableDataLoader(torch.arange(24), batch_size=4 // num_processes, seed=3)
            loader.sampler._num_replicas, loader.sampler._rank = num_processes, rank
            found.append(loader)
        return found

    def global_batches(parts: list[ResumableDataLoader]) -> list[list[int]]:
        return [sorted(itertools.chain(*batches)) for batches in zip(*map(ids, parts), strict=True)]

    whole = global_batches(loaders(2))
    first = loaders(2)
    for loader in first:
        batches = iter(loader)
        next(batches), next(batches)
    for num_processes in (1, 4):
        resumed = loaders(num_processes)
        for loader in resumed:
            loader.load_state_dict(first[0].state_dict())
        assert global_batches(resumed) == whole[2:]
    with pytest.raises(ResumeMismatch, match=r"num_replicas was 2 and is 3.*as many samples in all"):
        loaders(3)[0].load_state_dict(first[0].state_dict())
