"""The table of what trains: counts checked by hand, and against a real run."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import LISA, TrainableTable
from lightning_peft.report.console import format_bytes, format_count, render
from lightning_peft.report.table import trainable_rows, trainable_table

pytestmark = pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers:UserWarning")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)  # 8
        self.linear = nn.Linear(4, 4)  # 20

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(self.norm(x))


class TinyLM(LightningModule):
    """Embedding 40, three blocks of 20 + norm 8, norm 8, head 40 (tied if asked)."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 10, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x = self.embed(batch[0])
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(self.norm(x)), batch[0])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.arange(10)), batch_size=5)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def by_part(*args: object, **kwargs: object) -> dict:
    return {row.part: row for row in trainable_rows(*args, **kwargs)}  # pyright: ignore[reportArgumentType]


def trainer(*callbacks: object, **kwargs: object) -> Trainer:
    settings = {"max_steps": 3, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings |= {"enable_model_summary": False, "accelerator": "cpu", "devices": 1} | kwargs
    return Trainer(callbacks=list(callbacks), **settings)  # pyright: ignore[reportArgumentType]


def test_parts_are_counted_once() -> None:
    rows = by_part(TinyLM())
    assert {part: row.all_count for part, row in rows.items()} == {
        "embeddings": 40,
        "norms": 32,
        "blocks": 60,
        "head": 40,
        "total": 172,
    }
    assert rows["total"].all_bytes == 4 * 172
    assert rows["total"].optimizer_count == 0


def test_tied_weights_count_once() -> None:
    rows = by_part(TinyLM(tied=True))
    assert rows["embeddings = head"].all_count == 40
    assert rows["total"].all_count == 132
    assert "head" not in rows


def test_can_now_and_optimizer_differ() -> None:
    model = TinyLM()
    model.requires_grad_(False)
    model.blocks[0].linear.requires_grad_(True)
    optimizer = torch.optim.SGD([*model.blocks.parameters()], lr=0.1)
    rows = by_part(model, [optimizer], can_train={"blocks.1.linear.weight", "head.weight"})
    assert rows["blocks"].now_count == 20
    assert rows["blocks"].can_count == 36
    assert rows["blocks"].optimizer_count == 60
    assert rows["norms"].optimizer_count == 24
    assert (rows["head"].can_count, rows["head"].now_count) == (40, 0)
    assert rows["total"].state_bytes == 0


def test_state_bytes_are_those_of_the_tensors_that_exist() -> None:
    model = TinyLM()
    optimizer = torch.optim.Adam(model.parameters())
    model.blocks[1].linear.weight.grad = torch.ones(4, 4)
    optimizer.step()
    rows = by_part(model, [optimizer])
    assert rows["blocks"].state_bytes == 2 * 4 * 16 + 4  # two moments and a step counter, all float32
    assert rows["total"].state_bytes == rows["blocks"].state_bytes


def test_bytes_follow_the_dtype() -> None:
    assert by_part(TinyLM().to(torch.bfloat16))["total"].all_bytes == 2 * 172


def test_model_without_blocks_is_listed_by_top_level_module() -> None:
    assert set(by_part(BoringModel())) == {"layer", "total"}


def test_model_without_parameters() -> None:
    assert [row.all_count for row in trainable_rows(nn.ReLU())] == [0]
    assert render(trainable_table(nn.ReLU()))


def test_rendered_table_shows_the_numbers() -> None:
    text = render(trainable_table(TinyLM(), [torch.optim.SGD(TinyLM().parameters())]))
    total = next(line for line in text.splitlines() if "total" in line)
    assert "172" in total
    assert "688 B" in total
    assert "100.0 % of the parameters train now" in text


@pytest.mark.parametrize(
    ("number", "text"), [(7, "7"), (2500, "2.50 k"), (22_713_216, "22.71 M"), (8_030_261_248, "8.03 B")]
)
def test_counts_are_short(number: int, text: str) -> None:
    assert format_count(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(7, "7 B"), (1536, "1.5 KiB"), (90_852_864, "86.6 MiB"), (2**31, "2.0 GiB")]
)
def test_sizes_are_short(number: int, text: str) -> None:
    assert format_bytes(number) == text


def test_callback_prints_what_the_method_gates(capsys: pytest.CaptureFixture[str]) -> None:
    # The table comes before the method on purpose: it must still show what the first draw switched on.
    lisa = LISA(num_layers=1, period_steps=2, always=("head",))
    trainer(TrainableTable(at_end=True), lisa).fit(TinyLM())
    start, end = capsys.readouterr().out.split("What trains, after 3 optimizer steps")
    blocks = next(line.split() for line in start.splitlines() if line.split()[:1] == ["blocks"])
    assert blocks == ["blocks", "60", "60", "240", "B", "20", "80", "B", "60", "240", "B", "-"]
    head = next(line.split() for line in end.splitlines() if line.split()[:1] == ["head"])
    assert head[-2:] == ["324", "B"]  # Adam's two moments of 40 floats and its step counter
    embeddings = next(line.split() for line in start.splitlines() if line.split()[:1] == ["embeddings"])
    assert embeddings[2:5] == ["-", "-", "40"]  # cannot train, does not train, is in the optimizer


def test_callback_prints_once_and_without_methods(capsys: pytest.CaptureFixture[str]) -> None:
    trainer(TrainableTable(), max_steps=-1, max_epochs=3).fit(TinyLM())
    output = capsys.readouterr().out
    assert output.count("What trains") == 1
    assert "100.0 % of the parameters train now" in output
