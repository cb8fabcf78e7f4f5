"""Injected adapters: every method of Hugging Face ``peft`` on any LightningModule."""
