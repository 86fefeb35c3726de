"""Decoding with a prompt: `generate`, decoding loops, the prompt in a cache, unsupported modes."""
