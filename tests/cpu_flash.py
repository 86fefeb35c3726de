"""FlashAttention over sequences of several lengths by the CPU's kernels, which take one length at a time."""

import torch


def flash_forward(query, key, value, part, scaling):
    out, lse = torch.empty_like(query), query.new_empty(query.shape[1], len(query), dtype=torch.float32)
    if query.dtype == torch.float64:
        lse = lse.double()
    for queries, keys in sequences(part):
        parts = heads(query[queries]), *(heads(grouped(x[keys], query)) for x in (key, value))
        result = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*parts, 0.0, part.causal, scale=scaling)
        out[queries], lse[:, queries] = result[0][0].transpose(0, 1), result[1][0]
    return out, lse, None


def flash_backward(grad, query, key, value, out, lse, part, state, scaling):
    wide = [grouped(x, query) for x in (key, value)]
    grads = [torch.zeros_like(x) for x in (query, *wide)]
    for queries, keys in sequences(part):
        tensors = [heads(x) for x in (grad[queries], query[queries], *(x[keys] for x in wide), out[queries])]
        results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *tensors, lse[None, :, queries].contiguous(), 0.0, part.causal, scale=scaling
        )
        for whole, result, place in zip(grads, results, (queries, keys, keys), strict=True):
            whole[place] = result[0].transpose(0, 1)
    narrow = [x.unflatten(1, (key.shape[1], -1)).sum(2) for x in grads[1:]]
    return grads[0], *narrow


def sequences(part):
    """Places of the queries and keys of each sequence that has both."""
    for start, end, first, behind in zip(*(x.tolist() for x in _bounds(part)), strict=True):
        if start < end and first < behind:
            yield slice(start, end), slice(first, behind)


def _bounds(part):
    assert part.queries.diff().max() <= part.longest_query
    assert part.keys.diff().max() <= part.longest_key
    return part.queries[:-1], part.queries[1:], part.keys[:-1], part.keys[1:]


def heads(x):
    return x.transpose(0, 1)[None]


def grouped(x, query):
    return x.repeat_interleave(query.shape[1] // x.shape[1], 1)
