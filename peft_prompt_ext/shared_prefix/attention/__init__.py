"""Attention over a packed sequence: four computations with one signature, and the selection among them."""
