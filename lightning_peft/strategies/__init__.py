"""What a strategy needs when the trainable set changes under it."""
