"""The label that losses ignore."""

IGNORE_INDEX = -100  # the default of torch.nn.CrossEntropyLoss
