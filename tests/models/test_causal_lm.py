from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import LambdaCallback

from lightning_peft import Adapter, CausalLM
from lightning_peft.errors import ConfigError
from lightning_peft.models.causal_lm import prompts_and_responses
from lightning_peft.models.optimizer import WarmupSchedule
from tests.models.tiny_models import ADAM, LLAMA, loader, padded

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")

ROWS = [[5, 6, 7, 8, 9, 1], [9, 8, 7, 1], [3, 4, 5, 6, 7, 8, 9, 10, 1]]
PROMPTS = [2, 1, 4]  # tokens of each row without a loss


def batch(rows: list[list[int]] = ROWS, prompts: list[int] = PROMPTS) -> dict[str, torch.Tensor]:
    labels = [[-100] * prompt + row[prompt:] for row, prompt in zip(rows, prompts, strict=True)]
    return {
        "input_ids": padded(rows),
        "attention_mask": padded([[1] * len(row) for row in rows]),
        "labels": padded(labels, -100),
    }


def slow_losses(module: CausalLM, rows: list[list[int]], prompts: list[int]) -> list[float]:
    """-log p of each token that carries a loss, one row at a time, without padding."""
    losses = []
    module.eval()
    for row, prompt in zip(rows, prompts, strict=True):
        with torch.no_grad():
            probabilities = torch.softmax(module(torch.tensor([row]))[0].double(), -1)
        losses += [-math.log(probabilities[t - 1, row[t]]) for t in range(max(prompt, 1), len(row))]
    return losses


def test_loss_and_perplexity_against_a_hand_computation(llama_folder, trainer) -> None:
    module = CausalLM(llama_folder)
    expected = slow_losses(module, ROWS, PROMPTS)
    assert len(expected) == 4 + 3 + 5
    # unequal batches: a mean of batch means would differ
    data = loader([batch(ROWS[:1], PROMPTS[:1]), batch(ROWS[1:], PROMPTS[1:])])
    (logged,) = trainer().validate(module, data, verbose=False)
    mean = sum(expected) / len(expected)
    assert set(logged) == {"val/loss", "val/perplexity", "val/token_accuracy"}
    assert logged["val/loss"] == pytest.approx(mean, rel=1e-5)
    assert logged["val/perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)


def test_training_loss_is_the_mean_over_tokens_and_falls(llama_folder, trainer) -> None:
    module = CausalLM(llama_folder, optimizer=ADAM)
    expected = slow_losses(module, ROWS, PROMPTS)
    module.train()
    seen = []
    watch = LambdaCallback(on_train_batch_end=lambda run, *_: seen.append(run.callback_metrics["train/loss"].item()))
    run = trainer(max_steps=30, callbacks=[watch])
    run.fit(module, loader([batch()] * 30))
    assert seen[0] == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert seen[-1] < 0.1 * seen[0]


def test_learnt_text_is_generated_and_measured(llama_folder, trainer, tmp_path) -> None:
    module = CausalLM(llama_folder, optimizer=ADAM, generate_max_new_tokens=8, predict_max_new_tokens=8)
    (before,) = trainer().test(module, loader([batch()]), verbose=False)
    assert before["test/exact_match"] == 0
    run = trainer(max_steps=60)
    run.fit(module, loader([batch()] * 60))
    (after,) = run.test(module, loader([batch(ROWS[:1], PROMPTS[:1]), batch(ROWS[1:], PROMPTS[1:])]), verbose=False)
    assert after["test/exact_match"] == 1
    assert after["test/token_f1"] == 1
    assert after["test/token_accuracy"] == 1
    assert module.model.training  # generation puts the mode back
    expected = ["w4 w5 w6", "w5 w4", "w4 w5 w6 w7"]
    assert trainer().predict(module, loader([batch()])) == [expected]
    assert module.complete(["w2 w3", "w0 w1 w2 w3"]) == [expected[0], expected[2]]

    path = tmp_path / "model.ckpt"
    run.save_checkpoint(path)
    again = CausalLM.load_from_checkpoint(path)
    for name, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert again.generate_max_new_tokens == 8


def test_generation_metrics_need_prompts(llama_folder, trainer) -> None:
    module = CausalLM(llama_folder, generate_max_new_tokens=2)
    with pytest.raises(ConfigError, match="no row has a prompt"):
        trainer().validate(module, loader([batch(prompts=[0, 0, 0])]), verbose=False)
    (logged,) = trainer().validate(module, loader([batch(prompts=[2, 0, 0])]), verbose=False)  # one row is enough
    assert logged["val/exact_match"] == 0
    with pytest.raises(ConfigError, match="needs prompts"):
        trainer().predict(module, loader([batch(prompts=[0, 0, 0])]))


def test_prompts_and_responses_with_padding_on_either_side_and_several_turns() -> None:
    ids = torch.tensor([[0, 5, 6, 7, 8], [5, 6, 7, 8, 0]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    labels = torch.tensor([[-100, -100, -100, 7, 8], [-100, 6, -100, 8, -100]])
    rows = prompts_and_responses({"input_ids": ids, "attention_mask": mask, "labels": labels})
    assert [(p.tolist(), r.tolist()) for p, r in rows] == [([5, 6], [7, 8]), ([5], [6])]
    rows = prompts_and_responses({"input_ids": ids, "attention_mask": mask})
    assert [(p.tolist(), r.tolist()) for p, r in rows] == [([5, 6, 7, 8], []), ([5, 6, 7, 8], [])]


def test_named_and_unnamed_sets(llama_folder, trainer) -> None:
    class Data(LightningDataModule):
        test_names: tuple[str, ...] = ("short", "long")

        def test_dataloader(self):
            return [loader([batch(ROWS[:2], PROMPTS[:2])]), loader([batch(ROWS[2:], PROMPTS[2:])])]

        def val_dataloader(self):
            return self.test_dataloader()

    module = CausalLM(llama_folder)
    logged = {k: v for part in trainer().test(module, datamodule=Data(), verbose=False) for k, v in part.items()}
    for name, rows in (("short", slice(0, 2)), ("long", slice(2, 3))):
        expected = slow_losses(module, ROWS[rows], PROMPTS[rows])
        assert logged[f"test/{name}/loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    logged = {k: v for part in trainer().validate(module, datamodule=Data(), verbose=False) for k, v in part.items()}
    assert {"val/set0/loss", "val/set1/loss"} < set(logged)
    Data.test_names = ("only one",)
    with pytest.raises(ConfigError, match=r"names 1 test sets \(only one\) but loads 2"):
        trainer().test(module, datamodule=Data(), verbose=False)


def test_schedule_takes_its_length_from_the_trainer(llama_folder, trainer) -> None:
    schedule = partial(WarmupSchedule, decay="linear", warmup_steps=1)
    module = CausalLM(llama_folder, optimizer=partial(torch.optim.SGD, lr=1.0), lr_scheduler=schedule)
    rates = []
    watch = LambdaCallback(on_train_batch_end=lambda run, *_: rates.append(run.optimizers[0].param_groups[0]["lr"]))
    trainer(max_epochs=1, accumulate_grad_batches=2, callbacks=[watch]).fit(module, loader([batch()] * 10))
    # 10 batches are 5 optimizer steps; the rate changes after each second batch
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0.0])
    with pytest.raises(ConfigError, match="max_steps"):
        trainer(max_epochs=-1).fit(module, loader([batch()]))


def test_plateau_schedule_watches_its_metric(llama_folder, trainer) -> None:
    from lightning.pytorch.cli import ReduceLROnPlateau

    module = CausalLM(llama_folder, lr_scheduler=partial(ReduceLROnPlateau, monitor="val/loss"))
    module.trainer = trainer(max_epochs=1)
    chosen = module.configure_optimizers()["lr_scheduler"]
    assert (chosen["monitor"], chosen["interval"]) == ("val/loss", "epoch")


def test_optimizer_holds_every_trainable_parameter_once() -> None:
    module = CausalLM(config={**LLAMA, "tie_word_embeddings": True})
    module.model.model.layers[0].requires_grad_(False)
    optimizer = module.configure_optimizers()
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in module.parameters() if p.requires_grad}
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert {n for n, p in module.named_parameters() if p.requires_grad and id(p) not in decayed} == {
        "model.model.layers.1.input_layernorm.weight",
        "model.model.layers.1.post_attention_layernorm.weight",
        "model.model.norm.weight",
    }


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_tokens_in_front_of_the_text_have_no_labels(method: str, llama_folder, trainer) -> None:
    module = CausalLM(llama_folder, optimizer=ADAM)
    adapter = Adapter(method, {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"})
    losses = []
    watch = LambdaCallback(on_train_batch_end=lambda run, *_: losses.append(run.callback_metrics["train/loss"].item()))
    trainer(max_steps=10, callbacks=[adapter, watch]).fit(module, loader([batch()] * 10))
    assert losses[-1] < losses[0]
    module.eval()
    with torch.no_grad():
        logits = adapter.handle(input_ids=torch.tensor(ROWS[:1])).logits[0]
    behind = logits[3:] if method == "prompt_tuning" else logits
    (row,), (prompt,) = ROWS[:1], PROMPTS[:1]
    log_p = torch.log_softmax(behind.double(), -1)
    expected = [-log_p[t - 1, row[t]].item() for t in range(prompt, len(row))]
    assert slow_losses(module, ROWS[:1], PROMPTS[:1]) == pytest.approx(expected, rel=1e-5)
    (logged,) = trainer(callbacks=[adapter]).validate(module, loader([batch(ROWS[:1], PROMPTS[:1])]), verbose=False)
    assert logged["val/loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-4)
