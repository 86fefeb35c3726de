"""Texts, masks and decoding loops shared by the tests of decoding."""

import pytest
import torch


P, TEXT, NEW = 5, 7, 6
WORDS = torch.tensor([11, 12, 13, 14, 15])
OPTIONS = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
# gemma and mistral have windows of 16 tokens, bloom has ALiBi, opt counts positions in its mask
ARCHITECTURES = ["llama", "gpt2", "gemma3_text", "mistral", "bloom", "opt"]
architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
# the base model gets a cache too; transformers 5.24 names it `cache` and accepts the old name
old_name = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
POSITIONS_OF = {"gpt2": "n_positions", "bloom": "seq_length"}
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * TEXT, [0, 1, 1, 1, 1, 1, 1]])
MASKS = {
    "left": LEFT,
    "right": LEFT.flip(1),
    "holes": torch.tensor([[0, 1, 0, 1, 1, 0, 1], [1] * TEXT, [1, 1, 0, 0, 1, 1, 1]]),
}


def text(rows=2, tokens=TEXT, seed=3):
    return torch.randint(20, 300, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def with_words(ids):
    return torch.cat([WORDS.expand(len(ids), -1), ids], dim=1)


def new_tokens(model, ids, **options):
    return model.generate(ids, **{**OPTIONS, **options})[:, ids.shape[1] :].tolist()


def alone(model, ids, mask):
    """The new tokens of each row without its pads."""
    return [new_tokens(model, row[real.bool()][None])[0] for row, real in zip(ids, mask, strict=True)]


def loop(model, ids, cache=None, mask=None, steps=NEW, **options):
    """Decode greedily in a loop: the new tokens [B, steps] and the cache."""
    taken = []
    with torch.no_grad():
        for _ in range(steps):
            out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **options)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            taken.append(ids)
    return torch.cat(taken, dim=1).tolist(), cache
