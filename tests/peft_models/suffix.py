"""Batches of texts with answers, and what each row `[text | prompt | answer]` gives alone in plain transformers."""

import torch

from tests.helpers import prompt_of


MASKS = {
    "none": [[1] * 12, [1] * 12, [1] * 12],
    "right": [[1] * 9 + [0] * 3, [1] * 12, [1] * 2 + [0] * 10],
    "left": [[0] * 3 + [1] * 9, [1] * 12, [0] * 10 + [1] * 2],
    "holes": [
        [1, 1, 0, 0, 1, 0, 1, 1, 0, 1, 1, 0],
        [0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1],
        [0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0],
    ],
}
ANSWERS = (3, 5, 1)


def make_suffix_batch(kind="right", answers=ANSWERS, seed=1):
    """A padded batch whose last real tokens are labelled; one answer has five tokens, one text has one."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor(MASKS[kind])
    ids = torch.randint(3, 300, mask.shape, generator=generator).masked_fill(mask == 0, 2)
    labels = torch.full_like(ids, -100)
    for row, count in enumerate(answers):
        columns = mask[row].nonzero()[:, 0][mask[row].sum() - count :]
        labels[row, columns] = ids[row, columns]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def run_alone(base_model, prompts, batch):
    """Run each row alone without padding. Returns the loss, logits of each row, and its columns in natural order.

    A row's prompt is one of `prompts`, [P, H]. Columns are those of `[text | prompt | answer]` with pads in place.
    """
    total, count, logits, columns = 0.0, 0, [], []
    words = base_model.get_input_embeddings()
    for row, prompt in enumerate(prompts):
        real = batch["attention_mask"][row].nonzero()[:, 0]
        labels = batch["labels"][row, real]
        labelled = (labels != -100).nonzero()[:, 0]
        split = int(labelled[0]) if len(labelled) else len(real)
        start = int(real[split]) if len(labelled) else int(real[-1]) + 1
        text = words(batch["input_ids"][row, real])
        embeds = torch.cat([text[:split], prompt, text[split:]])[None]
        out = base_model(inputs_embeds=embeds, use_cache=False).logits[0]
        virtual = start + torch.arange(len(prompt))
        columns.append(torch.cat([real[:split], virtual, real[split:] + len(prompt)]))
        logits.append(out.detach())
        for place in labelled.tolist():
            total = total + torch.nn.functional.cross_entropy(out[place + len(prompt) - 1].float(), labels[place])
            count += 1
    return total / max(count, 1), logits, columns


def assert_equals_rows_alone(model, batch, names=None, atol=1e-4):
    """Loss and gradients within 1e-5, logits within 1e-4 of each row alone."""
    names = names or ["default"] * len(batch["input_ids"])
    prompts = {name: prompt_of(model, name) for name in dict.fromkeys(names)}
    for prompt in prompts.values():
        prompt.grad = None
    loss, logits, columns = run_alone(model.get_base_model(), [prompts[name] for name in names], batch)
    loss.backward()
    wanted = {name: prompt.grad.clone() for name, prompt in prompts.items()}
    for prompt in prompts.values():
        prompt.grad = None
    extra = {} if set(names) == {"default"} else {"adapter_names": names}
    out = model(**batch, **extra)
    out.loss.backward()
    assert abs(out.loss.item() - loss.item()) <= 1e-5 * abs(loss.item())
    for name, prompt in prompts.items():
        assert (prompt.grad - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name
    longest = max(len(prompt) for prompt in prompts.values())
    assert out.logits.shape[:2] == (len(names), longest + batch["input_ids"].shape[1])
    for got, want, where, name in zip(out.logits, logits, columns, names, strict=True):
        if len(prompts[name]) == longest:
            torch.testing.assert_close(got[where], want, rtol=0, atol=atol)
    return out
