"""The label of a token without one."""

IGNORE_INDEX = -100  # torch.nn.CrossEntropyLoss, and so every model of transformers, skips it
