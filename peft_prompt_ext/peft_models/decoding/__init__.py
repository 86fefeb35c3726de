"""Decoding behind a prompt: `generate`, a loop of one's own, which prompt a cache holds, and what is refused."""
