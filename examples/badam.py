"""BAdam: train all blocks of a bfloat16 model, with gradients and Adam's state for one of them at a time.

    python examples/badam.py                                    a tiny random Llama that learns to count
    python examples/badam.py --model HuggingFaceTB/SmolLM2-135M --text my.txt --lr 1e-5 --period-steps 50

Prints what the optimizer holds beside what mixed-precision Adam would, and writes the model as a Hugging Face folder.
"""

import argparse

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lightning_peft import BAdam


class LanguageModel(pl.LightningModule):
    def __init__(self, model, lr):
        super().__init__()
        self.model = model
        self.lr = lr

    def training_step(self, batch, batch_idx):
        loss = self.model(input_ids=batch[0], labels=batch[0]).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        matrices = [p for p in self.parameters() if p.ndim > 1]
        vectors = [p for p in self.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.lr)


class Held(pl.Callback):
    """The most that the optimizer's state took."""

    def __init__(self):
        self.bytes = 0

    def on_train_batch_end(self, trainer, *args):
        states = trainer.optimizers[0].state.values()
        self.bytes = max(self.bytes, sum(v.nbytes for state in states for v in state.values()))


def tiny_model_and_data(length):
    """A random model, and sequences that count up from a random start."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    starts = torch.randint(0, 32, (256, 1))
    return LlamaForCausalLM(config), (starts + torch.arange(length)) % 32


def given_model_and_data(name, path, length):
    tokenizer = AutoTokenizer.from_pretrained(name)
    with open(path, encoding="utf-8") as file:
        ids = torch.tensor(tokenizer(file.read())["input_ids"])
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    return model, ids[: len(ids) // length * length].view(-1, length)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face id or folder; default a tiny random model")
    parser.add_argument("--text", help="text file to train on, with --model")
    parser.add_argument("--length", type=int, default=16, help="tokens per sequence")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--order", default="random", choices=["random", "ascending", "descending"])
    parser.add_argument("--period-steps", type=int, default=10, help="optimizer steps on each block")
    parser.add_argument("--output", default="finetuned", help="folder to write the model to")
    args = parser.parse_args()
    if (args.model is None) != (args.text is None):
        parser.error("--model and --text belong together")

    pl.seed_everything(0)
    if args.model is None:
        model, ids = tiny_model_and_data(args.length)
    else:
        model, ids = given_model_and_data(args.model, args.text, args.length)
    held = Held()
    trainer = pl.Trainer(
        max_steps=args.steps,
        devices=1,
        precision="bf16-true",  # weights in bfloat16; the active block's float32 masters are BAdam's business
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        log_every_n_steps=10,
        callbacks=[BAdam(order=args.order, period_steps=args.period_steps, scope=["blocks", "head"]), held],
    )
    trainer.fit(LanguageModel(model, args.lr), DataLoader(TensorDataset(ids), batch_size=16, shuffle=True))

    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"loss: {trainer.callback_metrics['loss']:.3f}")
    print(f"optimizer state: at most {held.bytes} bytes; Adam on everything: {8 * num_parameters} bytes")
    model.save_pretrained(args.output)


if __name__ == "__main__":
    main()
