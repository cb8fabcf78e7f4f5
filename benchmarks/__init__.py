"""Measurements: what a method costs and what it gives, beside full fine-tuning and peers, with committed results."""
