"""Methods that train beside, or on, quantised weights: one paper, one file."""
