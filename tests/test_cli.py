"""The command line, run in this process on tiny models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft
from lightning_peft import LISA
from lightning_peft.cli import main
from lightning_peft.cli.methods import method_card, method_classes
from lightning_peft.cli.run import PeftCLI, before_after_table
from lightning_peft.errors import ConfigError
from lightning_peft.report.console import render


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class TinyStack(LightningModule):
    """Four residual blocks and a head.

    Args:
        width: Features.
        dropout_probability: In ``[0, 1]``.
        fail: Raise this package's error when training starts.
    """

    def __init__(self, width: int = 8, dropout_probability: float = 0.5, fail: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(4))
        self.dropout = nn.Dropout(dropout_probability)
        self.head = nn.Linear(width, 1)
        self.fail = fail

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(x))

    def on_train_start(self) -> None:
        if self.fail:
            raise ConfigError("the cheese is off")

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("val/loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("test/loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def predict_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class NoTestStack(TinyStack):
    test_step = LightningModule.test_step


class NeedyStack(TinyStack):
    """A stack that must be told something.

    Args:
        num_classes: No default.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()


class TinyPoints(LightningDataModule):
    """Random points; the training order is drawn from the global generator.

    Args:
        num_points: How many.
    """

    def __init__(self, num_points: int = 32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(num_points, 8, generator=generator)
        self.points = TensorDataset(x, x.sum(1, keepdim=True))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.points, batch_size=8, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.points, batch_size=8)

    test_dataloader = predict_dataloader = val_dataloader


BASE = """\
model:
  class_path: TinyStack
  init_args:
    width: 8
data:
  class_path: TinyPoints
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 6
  num_sanity_val_steps: 0
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
"""
LISA_OVERLAY = "trainer:\n  callbacks+:\n    - class_path: LISA\n      init_args: {num_layers: 1, period_steps: 2}\n"
TABLE_OVERLAY = "trainer:\n  callbacks+:\n    - TrainableTable\n"

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*dataloader' does not have many workers:UserWarning",
    "ignore:You are trying to `self.log.*:UserWarning",
)


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with overlays, made the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(f"{BASE}  default_root_dir: {tmp_path}\n")
    Path("lisa.yaml").write_text(LISA_OVERLAY)
    Path("table.yaml").write_text(TABLE_OVERLAY)
    return tmp_path


@pytest.fixture
def fit_cli(base: Path, monkeypatch: pytest.MonkeyPatch) -> list[PeftCLI]:
    """Collects the command-line objects that ran."""
    clis: list[PeftCLI] = []
    monkeypatch.setattr(PeftCLI, "after_instantiate_classes", lambda cli: clis.append(cli))
    return clis


def log_dir(folder: Path, version: int = 0) -> Path:
    return folder / "lightning_logs" / f"version_{version}"


def mistakes(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Run a command line that must be refused; return what it says, checked to be short."""
    assert main(list(args)) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "Traceback" not in output.err
    assert "usage:" not in output.err
    assert len(output.err.splitlines()) <= 8
    return output.err


def printed_config(capsys: pytest.CaptureFixture[str], *args: str) -> dict:
    assert main([*args, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


# ---------------------------------------------------------------- overlays


def test_overlays_compose(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = printed_config(
        capsys, "fit", "--config", "base.yaml", "--config", "lisa.yaml", "--config", "table.yaml",
        "--trainer.callbacks+=LISA", "--trainer.callbacks.num_layers=3", "--trainer.callbacks+", "TrainingLedger",
    )  # fmt: skip
    callbacks = config["trainer"]["callbacks"]
    assert [c["class_path"].rpartition(".")[2] for c in callbacks] == [
        "LISA",
        "TrainableTable",
        "LISA",
        "TrainingLedger",
    ]
    assert [callbacks[i]["init_args"]["num_layers"] for i in (0, 2)] == [1, 3]
    assert config["seed_everything"] == 42


def test_replacing_callbacks_is_not_silent(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("trainer:\n  callbacks:\n    - TrainableTable\n")
    args = ["fit", "--config", "base.yaml", "--config", "mine.yaml", "--config=lisa.yaml", "--trainer.logger=false"]
    Path("one_step.yaml").write_text("trainer: {max_steps: 1, enable_checkpointing: false}\n")
    assert main([*args, "-c", "one_step.yaml"]) == 0
    assert "note:" not in capsys.readouterr().err
    assert main([*args, "-c", "one_step.yaml", "-c", "mine.yaml"]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert len(notes) == 1
    assert "mine.yaml replaces that of lisa.yaml" in notes[0]


def test_print_config_round_trips(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overlays = ["--config", "base.yaml", "--config", "lisa.yaml", "--config", "table.yaml", "--method", "LISA"]
    first = printed_config(capsys, "fit", *overlays)
    Path("whole.yaml").write_text(yaml.safe_dump(first))
    assert printed_config(capsys, "fit", "--config", "whole.yaml") == first


def test_short_names_of_model_data_and_lightning(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = printed_config(
        capsys, "fit", "--model", "TinyStack", "--model.width", "4", "--data", "TinyPoints",
        "--trainer.callbacks+=ModelCheckpoint", "--trainer.logger", "CSVLogger",
    )  # fmt: skip
    assert config["model"]["init_args"]["width"] == 4
    assert config["trainer"]["callbacks"][0]["class_path"] == "lightning.pytorch.callbacks.ModelCheckpoint"
    assert config["trainer"]["logger"]["class_path"] == "lightning.pytorch.loggers.CSVLogger"


def test_every_public_class_resolves_by_its_short_name(capsys: pytest.CaptureFixture[str]) -> None:
    flags = {LightningModule: "--model.help", LightningDataModule: "--data.help"}
    for name in lightning_peft._PUBLIC:
        value = getattr(lightning_peft, name)
        if not (isinstance(value, type) and issubclass(value, (LightningModule, LightningDataModule))):
            continue
        flag = next(flags[kind] for kind in flags if issubclass(value, kind))
        assert main(["fit", f"{flag}={name}"]) == 0
        assert name in capsys.readouterr().out


def test_method_is_replaced_and_removed(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yaml").write_text("method:\n  class_path: LISA\n  init_args: {num_layers: 1, seed: 5}\n")
    args = ["fit", "--config", "base.yaml", "--config", "recipe.yaml"]
    method = printed_config(capsys, *args, "--method", "HFT", "--method.fraction", "0.25")["method"]
    assert method["class_path"].rpartition(".")[2] == "HFT"
    assert method["init_args"]["fraction"] == 0.25
    assert method["init_args"]["seed"] == 5  # what both methods have is kept
    assert printed_config(capsys, *args, "--method", "null")["method"] is None
    assert printed_config(capsys, *args, "--method.num_layers", "3")["method"]["init_args"]["num_layers"] == 3


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["fti"], ["'fti'", "'fit'"]),
        (["--config", "base.yaml", "fit"], ["lightning-peft fit --config"]),
        (["methods", "LISSA"], ["'LISSA'", "'LISA'"]),
        (["fit", "--trainer.max_stepz=5"], ["--trainer.max_stepz", "'--trainer.max_steps'"]),
        (["fit", "--max_steps=5"], ["--max_steps", "'--trainer.max_steps'"]),
        (["fit", "--modle", "TinyStack"], ["--modle", "'--model'"]),
        (["fit", "stray"], ["'stray'"]),
        (["fit", "--model", "TinyStac"], ["--model", "'TinyStac'", "'TinyStack'"]),
        (["fit", "--model", "TinyStack", "--model.widht=3"], ["--model.widht", "TinyStack", "'width'"]),
        (["fit", "--model", "TinyStack", "--model.width=wide"], ["--model.width", "int", "'wide'"]),
        (["fit", "--model", f"{__name__}.TinyStak"], [__name__, "'TinyStack'"]),
        (["fit", "--model", "nowhere.TinyStack"], ["nowhere", f"{__name__}.TinyStack"]),
        (["fit", "--model", "LISA"], ["'LISA'", "LightningModule"]),
        (["fit", "--data", "TinyPoint"], ["--data", "'TinyPoints'"]),
        (["fit", "--method", "LISSA"], ["--method", "'LISA'"]),
        (["fit", "--method", "LISA", "--method.num_layer=1"], ["--method.num_layer", "LISA", "'num_layers'"]),
        (["fit", "--method.num_layers=1"], ["--method.num_layers", "--method=NAME"]),
        (["fit", "--trainer.callbacks+=LISAA"], ["--trainer.callbacks+", "'LISAA'", "'LISA'"]),
        (
            ["fit", "--trainer.callbacks+=LISA", "--trainer.callbacks.period_step=3"],
            ["--trainer.callbacks.period_step", "LISA", "'period_steps'"],
        ),
        (["fit", "--trainer.callbacks.period_steps=3"], ["--trainer.callbacks+=NAME"]),
        (["fit", "--trainer.max_steps", "many"], ["--trainer.max_steps", "int", "'many'"]),
        (["fit", "--trainer.enable_progress_bar=perhaps"], ["bool", "'perhaps'"]),
        (["fit", "--config", "bass.yaml"], ["'bass.yaml'", "'base.yaml'"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_mistake_on_the_command_line(
    base: Path, capsys: pytest.CaptureFixture[str], args: list[str], expected: list[str]
) -> None:
    if args[0] == "fit" and not any(arg.startswith("--model") or arg == "--config" for arg in args):
        args = [*args[:1], "--config", "base.yaml", *args[1:]]
    message = mistakes(capsys, *args)
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trainr:\n  max_steps: 3\n", ["bad.yaml:1:", "'trainr'", "'trainer'"]),
        ("max_steps: 3\n", ["bad.yaml:1:", "'trainer.max_steps'"]),
        ("trainer:\n  max_steps: 3\n  max_epoch: 3\n", ["bad.yaml:3:", "'max_epoch'", "'max_epochs'"]),
        ("trainer:\n  max_steps: many\n", ["bad.yaml:2:", "trainer.max_steps", "int", "'many'"]),
        ("trainer:\n  limit_train_batches: [1]\n", ["bad.yaml:2:", "trainer.limit_train_batches", "a list"]),
        ("model:\n  class_path: TinyStac\n", ["bad.yaml:2:", "'TinyStac'", "'TinyStack'"]),
        ("model: TinyStac\n", ["bad.yaml:1:", "'TinyStac'", "'TinyStack'"]),
        ("model:\n  class_pth: TinyStack\n", ["bad.yaml:2:", "'class_pth'", "'class_path'"]),
        ("model:\n  class_path: TinyStack\n  width: 3\n", ["bad.yaml:3:", "'width'", "init_args"]),
        (
            "model:\n  class_path: TinyStack\n  init_args:\n    dropout_prob: 0.1\n",
            ["bad.yaml:4:", "TinyStack", "'dropout_prob'", "'dropout_probability'"],
        ),
        (
            "trainer:\n  callbacks+:\n    - class_path: LISA\n      init_args:\n        num_layer: 2\n",
            ["bad.yaml:5:", "LISA", "'num_layer'", "'num_layers'"],
        ),
        (
            "trainer:\n  callbacks:\n    - class_path: TrainableTable\n    - class_path: TrainingLegder\n",
            ["bad.yaml:4:", "'TrainingLegder'", "'TrainingLedger'"],
        ),
        (
            "trainer:\n  callbacks+:\n    - class_path: LISA\n      init_args: {num_layers: few}\n",
            ["bad.yaml:4:", "num_layers", "int", "'few'"],
        ),
        ("trainer:\n  max_steps: [3\n", ["bad.yaml:3:", "not valid YAML"]),
        ("- trainer\n", ["bad.yaml:1:", "mapping"]),
    ],
)  # fmt: skip
def test_mistake_in_a_file(base: Path, capsys: pytest.CaptureFixture[str], text: str, expected: list[str]) -> None:
    Path("bad.yaml").write_text(text)
    message = mistakes(capsys, "fit", "--config", "base.yaml", "--config", "bad.yaml")
    for part in expected:
        assert part in message


CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_what_is_right_is_not_called_a_mistake(config: Path, capsys: pytest.CaptureFixture[str], base: Path) -> None:
    method_and_table = ["--trainer.callbacks+=LISA", "--trainer.callbacks.num_layers=1", "--trainer.callbacks+=Timer"]
    model = ["--model", "TinyStack", "--model.width", "4", "--optimizer", "SGD", "--optimizer.lr=1e-2"]
    message = mistakes(
        capsys, "fit", "--config", str(config), *model, *method_and_table, "--trainer.limit_val_batches", "0.5",
        "--trainer.logger", "false", "--trainer.max_stepz=1",
    )  # fmt: skip
    assert message.count("error:") == 1
    assert "max_stepz" in message


def test_all_mistakes_are_reported_together(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text("trainer:\n  max_stepz: 3\nmodel:\n  class_path: TinyStac\n")
    message = mistakes(capsys, "fit", "--config", "base.yaml", "--config", "bad.yaml", "--trainer.devicez=2")
    assert [part in message for part in ("bad.yaml:2:", "bad.yaml:4:", "--trainer.devicez")] == [True] * 3


def test_missing_model_is_named(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--model must be given" in mistakes(capsys, "fit", "--trainer.max_steps=1")


def test_missing_argument_is_named(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = mistakes(capsys, "fit", "--model", "NeedyStack", "--data", "TinyPoints")
    assert message.startswith("error: --model.num_classes must be given.\n")


def test_mistyped_strategy_is_short(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "base.yaml", "--trainer.strategy=dpd"]) == 1
    error = capsys.readouterr().err
    assert "'ddp'" in error.splitlines()[-1]
    assert "Traceback" not in error


def test_package_error_is_short_unless_debugging(
    base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["fit", "--config", "base.yaml", "--model.fail=true", "--trainer.logger=false"]
    assert main(args) == 1
    assert capsys.readouterr().err.strip().endswith("error: the cheese is off")
    with pytest.raises(ConfigError, match="the cheese is off"):
        main([*args, "--debug"])
    monkeypatch.setenv("LIGHTNING_PEFT_DEBUG", "1")
    with pytest.raises(ConfigError, match="the cheese is off"):
        main(args)


@pytest.mark.parametrize("where", ["method", "trainer.callbacks"])
def test_wrong_argument_value_of_a_method_is_short(base: Path, capsys: pytest.CaptureFixture[str], where: str) -> None:
    plus = "+" if where == "trainer.callbacks" else ""
    assert main(["fit", "--config", "base.yaml", f"--{where}{plus}=LISA", f"--{where}.num_layers=0"]) == 1
    error = capsys.readouterr().err
    assert "num_layers" in error
    assert "Traceback" not in error


# ---------------------------------------------------------------- runs


def test_fit_writes_what_it_promises(fit_cli: list[PeftCLI], base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    args = ["fit", "--config", "base.yaml", "--config", "lisa.yaml", "--config", "table.yaml"]
    args += ["--trainer.callbacks+=TrainingLedger", "--trainer.logger=CSVLogger", "--evaluate_before_after=true"]
    assert main([*args, f"--trainer.logger.save_dir={base}"]) == 0
    output = capsys.readouterr().out
    logs = log_dir(base)
    saved = yaml.safe_load((logs / "config.yaml").read_text())
    assert saved["trainer"]["callbacks"][0]["init_args"]["num_layers"] == 1
    values = json.loads((logs / "before_after.json").read_text())["test/loss"]
    assert values["change"] == pytest.approx(values["after"] - values["before"])
    assert values["before"] != values["after"]
    assert f"{values['before']:.4f}" in output
    assert f"{values['after']:.4f}" in output
    for name in ("training_ledger.png", "training_ledger.csv", "metrics.csv"):
        assert (logs / name).stat().st_size > 0
    checkpoint = next(line for line in output.splitlines() if line.startswith("Checkpoint: ")).split(": ", 1)[1]
    assert Path(checkpoint).is_file()
    assert isinstance(fit_cli[0].trainer.callbacks[0], LISA)
    assert fit_cli[0].trainer.global_step == 6


def test_without_a_log_no_configuration_is_written(base: Path) -> None:
    Path("config.yaml").write_text("mine")
    args = ["fit", "--config", "base.yaml", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    assert main([*args, "--trainer.max_steps=1"]) == 0
    assert Path("config.yaml").read_text() == "mine"


def test_method_comes_first(fit_cli: list[PeftCLI]) -> None:
    args = ["fit", "--config", "base.yaml", "--config", "table.yaml", "--method", "LISA", "--method.num_layers=1"]
    assert main([*args, "--trainer.max_steps=1", "--trainer.logger=false"]) == 0
    assert isinstance(fit_cli[0].trainer.callbacks[0], LISA)


def test_evaluating_before_does_not_change_training(fit_cli: list[PeftCLI]) -> None:
    args = ["fit", "--config", "base.yaml", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    assert main(args) == 0
    assert main([*args, "--evaluate_before_after=true"]) == 0
    assert main([*args, "--seed_everything=7"]) == 0
    plain, evaluated, other = ([p.detach() for p in cli.model.parameters()] for cli in fit_cli)
    assert all(torch.equal(a, b) for a, b in zip(plain, evaluated, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def test_evaluate_before_after_needs_a_test_step(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["fit", "--config", "base.yaml", "--model", "NoTestStack", "--evaluate_before_after=true"]
    assert main([*args, "--trainer.logger=false"]) == 1
    assert "NoTestStack has no test_step" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_other_commands_run_on_the_same_configuration(base: Path, command: str) -> None:
    Path("recipe.yaml").write_text("method: LISA\nevaluate_before_after: true\n")
    args = [command, "--config", "base.yaml", "--config", "recipe.yaml", "--config", "table.yaml"]
    assert main([*args, "--trainer.logger=false"]) == 0


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_fit_resumes_from_its_checkpoint(fit_cli: list[PeftCLI], base: Path) -> None:
    args = ["fit", "--config", "base.yaml", "--config", "lisa.yaml", "--trainer.logger=false"]
    assert main([*args, "--trainer.max_steps=4"]) == 0
    assert len(fit_cli[0].trainer.callbacks[0].history) == 2
    checkpoint = next((base / "checkpoints").glob("*.ckpt"))
    assert main([*args, f"--ckpt_path={checkpoint}", "--trainer.max_steps=8"]) == 0
    assert fit_cli[1].trainer.global_step == 8
    assert len(fit_cli[1].trainer.callbacks[0].history) == 4


def test_before_after_table_has_only_shared_metrics() -> None:
    text = render(
        before_after_table({"a": 0.25, "test/num_x": 5.0, "gone": 1.0}, {"a": 0.5, "test/num_x": 5.0, "new": 2.0})
    )
    assert "0.2500" in text
    assert "+0.2500" in text
    assert "gone" not in text
    assert "num_x" not in text
    assert "new" not in text


# ---------------------------------------------------------------- methods and help


def test_methods_lists_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"LISA", "HFT"} <= set(method_classes())
    assert main(["methods"]) == 0
    output = capsys.readouterr().out
    for name in method_classes():
        assert name in output


def test_methods_shows_one_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "lisa"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("LISA(")
    assert "period_steps" in output
    assert "Paper" in output


def test_every_method_has_a_card() -> None:
    for name, method in method_classes().items():
        card = method_card(name, method)
        assert card.summary, name
        assert "Paper" in card.sections, name


def test_card_is_cut_at_sections() -> None:
    class Demo:
        """Trains ``half``.

        Costs little: half
        of it.

        Paper:
            A. Author,
            2024.
        """

    card = method_card("Demo", Demo)
    assert (card.summary, card.about) == ("Trains `half`.", "Costs little: half\nof it.")
    assert card.sections == {"Paper": "A. Author,\n2024."}


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from lightning_peft.cli import main; code = main(['--help']);"
        "heavy = [m for m in ('torch', 'lightning', 'transformers', 'jsonargparse') if m in sys.modules];"
        "print(heavy); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "fit" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert lightning_peft.__version__ in capsys.readouterr().out
