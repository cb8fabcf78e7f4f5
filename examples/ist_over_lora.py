"""IST over LoRA: adapters in every layer of a Hugging Face model, a quarter of which trains in each step.

    python examples/ist_over_lora.py                                    a tiny random Llama that learns to count
    python examples/ist_over_lora.py --model HuggingFaceTB/SmolLM2-135M --text my.txt

Prints the importance that each layer ended with. The adapters alone are written to ``--output``.
"""

import argparse

import lightning.pytorch as pl
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lightning_peft import IST


class LoRACausalLM(pl.LightningModule):
    def __init__(self, model, rank=8, lr=1e-2):
        super().__init__()
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        self.model = inject_adapter_in_model(config, model)  # freezes the base, leaves the adapters trainable
        self.lr = lr

    def training_step(self, batch, batch_idx):
        loss = self.model(input_ids=batch[0], labels=batch[0]).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def tiny_model_and_data(length):
    """A random model, and sequences that count up from a random start."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        initializer_range=0.2,  # large enough that a frozen head can say something
    )
    starts = torch.randint(0, 32, (256, 1))
    return LlamaForCausalLM(config), (starts + torch.arange(length)) % 32


def given_model_and_data(name, path, length):
    tokenizer = AutoTokenizer.from_pretrained(name)
    with open(path, encoding="utf-8") as file:
        ids = torch.tensor(tokenizer(file.read())["input_ids"])
    return AutoModelForCausalLM.from_pretrained(name), ids[: len(ids) // length * length].view(-1, length)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face id or folder; default a tiny random model")
    parser.add_argument("--text", help="text file to train on, with --model")
    parser.add_argument("--length", type=int, default=16, help="tokens per sequence")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--fraction", type=float, default=0.25, help="of the layers that train in a step")
    parser.add_argument("--output", default="adapters.safetensors")
    args = parser.parse_args()
    if (args.model is None) != (args.text is None):
        parser.error("--model and --text belong together")

    pl.seed_everything(0)
    if args.model is None:
        model, ids = tiny_model_and_data(args.length)
    else:
        model, ids = given_model_and_data(args.model, args.text, args.length)
    module = LoRACausalLM(model, lr=args.lr)
    ist = IST(fraction=args.fraction, scope="adapters")  # scores every 10 steps, draws in each
    trainer = pl.Trainer(
        max_steps=args.steps, devices=1, logger=False, enable_checkpointing=False, log_every_n_steps=10, callbacks=[ist]
    )
    trainer.fit(module, DataLoader(TensorDataset(ids), batch_size=16, shuffle=True))

    print(f"loss: {trainer.callback_metrics['loss']:.3f}")
    for layer, importance in ist.describe()["importance"].items():
        print(f"{layer}: {importance:+.3f}")
    save_file(get_peft_model_state_dict(module.model, adapter_name="default"), args.output)


if __name__ == "__main__":
    main()
