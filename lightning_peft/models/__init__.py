"""Ready LightningModules for command-line runs and for Python: causal LM, text classification, text embedding."""
