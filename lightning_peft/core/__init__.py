"""What every method shares: scopes, block structure, plans, the trainable set, the clock and the ledger.

Nothing here imports Lightning; everything works on a plain :class:`torch.nn.Module` and plain optimizers.
"""
