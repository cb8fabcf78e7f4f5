"""Methods that train whole tensors, chosen anew on a schedule or once."""
