"""Fine-tune a causal language model with LISA on your own prompts and responses.

    python examples/llm_finetune.py --model HuggingFaceTB/SmolLM2-135M --data my.jsonl

Each line of the file is an object such as {"prompt": "Capital of France?", "response": "Paris"}. The loss is on the
responses alone. The result is a Hugging Face folder.
"""

import argparse
from functools import partial

import lightning.pytorch as pl
import torch

from lightning_peft import LISA, CausalLM, PromptResponse, WarmupSchedule


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face id or folder")
    parser.add_argument("--data", required=True, help="JSONL with 'prompt' and 'response' in each line")
    parser.add_argument("--output", default="finetuned", help="folder to write the model to")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=1024, help="tokens per example")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="of the weights: bfloat16 halves the memory and rounds small updates away",
    )
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument(
        "--num-layers", type=int, default=2, help="blocks that train at a time: more learn and cost more"
    )
    parser.add_argument("--period-steps", type=int, default=20, help="optimizer steps between draws of the blocks")
    args = parser.parse_args()

    pl.seed_everything(0)
    on_gpu = torch.cuda.is_available()
    module = CausalLM(
        args.model,
        dtype=args.dtype,
        gradient_checkpointing=on_gpu,
        optimizer=partial(torch.optim.AdamW, lr=args.lr),
        lr_scheduler=partial(WarmupSchedule, decay="cosine", warmup_fraction=0.05),
    )
    data = PromptResponse(args.data, batch_size=args.batch_size, max_length=args.max_length)
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        devices=1,
        precision="bf16-true" if args.dtype == "bfloat16" else "bf16-mixed" if on_gpu else "32-true",
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        logger=False,
        enable_checkpointing=False,
        callbacks=[LISA(num_layers=args.num_layers, period_steps=args.period_steps)],
    )
    trainer.validate(module, data)
    trainer.fit(module, data)
    trainer.validate(module, data)
    module.save_pretrained(args.output)
    print(f"model and tokenizer: {args.output}")


if __name__ == "__main__":
    main()
