"""Attention over a packed sequence: four implementations with one signature, and their selection."""
