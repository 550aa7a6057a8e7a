"""Runs that are killed, stopped, starved and lied to, and what became of them."""
