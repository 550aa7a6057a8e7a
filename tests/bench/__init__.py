"""Measurements. They report ratios within one run, because machines differ and are noisy."""
