"""The label that losses leave out."""

IGNORE_INDEX = -100  # of torch.nn.CrossEntropyLoss, and so of every model of transformers
