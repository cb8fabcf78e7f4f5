"""Methods: each answers what trains now. One paper, one file."""
