"""What a test process that must not import the plugin needs of the helpers."""

import torch


def batch_ids(task_type):
    """The ids of `helpers.make_batch`, and the decoder's for an encoder-decoder."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 300, (3, 7), generator=generator)
    return ids, {"decoder_input_ids": ids[:, :2].contiguous()} if task_type == "SEQ_2_SEQ_LM" else {}
