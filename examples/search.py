"""Search what to fine-tune: short fits from the same weights, then one run of what was found.

    python examples/search.py                 masks against two metrics: what is learned, and what is learned by heart
    python examples/search.py --tree          CoFiTune's tree over layers and modules, against the first metric

A tiny random Llama learns to count up from a start. One sequence in four is noise: remembering it is memorisation.
Prints the table of trials, and writes the choice as an overlay for `lightning-peft fit --config`.
"""

import argparse
from functools import partial

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft import CoFiTune, SubsetSearch

ALWAYS = ("embeddings", "head", "norms")  # the model is random; leave it out for a pretrained one


class LanguageModel(pl.LightningModule):
    def __init__(self, lr=1e-2):
        super().__init__()
        config = LlamaConfig(
            vocab_size=24, hidden_size=24, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4
        )
        self.model = LlamaForCausalLM(config)
        self.lr = lr

    def loss(self, ids):
        return self.model(input_ids=ids, labels=ids).loss

    def training_step(self, batch, batch_idx):
        return self.loss(batch[0])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch[0]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def counting(num_sequences, length=12):
    return (torch.randint(0, 24, (num_sequences, 1)) + torch.arange(length)) % 24


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", action="store_true", help="search CoFiTune's tree instead of masks")
    parser.add_argument("--trials", type=int, default=20, help="fits of the search over masks")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of each fit")
    parser.add_argument("--storage", help="such as sqlite:///search.db: a search that can be resumed")
    parser.add_argument("--output", default="found.yaml", help="overlay to write")
    args = parser.parse_args()

    pl.seed_everything(0)
    noise, unseen = torch.randint(0, 24, (16, 12)), torch.randint(0, 24, (16, 12))
    train = DataLoader(TensorDataset(torch.cat([counting(48), noise])), batch_size=16, shuffle=True)
    val = DataLoader(TensorDataset(counting(32)), batch_size=32)

    @torch.no_grad()
    def memorisation(trainer, module):
        """How much better noise is predicted that was trained on."""
        return {"memorised": module.loss(unseen) - module.loss(noise)}

    search = SubsetSearch(
        LanguageModel,
        {"train_dataloaders": train, "val_dataloaders": val},
        {"max_steps": args.steps, "accelerator": "cpu"},
        {"val_loss": "min"} if args.tree else {"val_loss": "min", "memorised": "min"},
        evaluate=memorisation,
    )
    if args.tree:
        found = search.tree(method=partial(CoFiTune, soft_mask="none", always=ALWAYS))
    else:
        rates = {"lr": (1e-3, 3e-2, "log")}
        found = search.bilevel(args.trials, hyperparameters=rates, always=ALWAYS, storage=args.storage)
    print(found)
    best = found.best()
    print(f"best: {best.label} {dict(best.hyperparameters)}")
    found.save(args.output, best)

    module = LanguageModel(**best.hyperparameters)
    trainer = pl.Trainer(
        max_steps=4 * args.steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        callbacks=[found.method(best)],
    )
    trainer.fit(module, train, val)
    (values,) = trainer.validate(module, val, verbose=False)
    print(f"trained on: {values['val_loss']:.3f}")


if __name__ == "__main__":
    main()
