"""Methods that train dense parts of a weight, input columns or output rows, one paper per file."""
