"""A prompted model beside its base model."""

import copy

import pytest
import torch

from tests.helpers import prompt_of, prompted
from tests.peft_models.decoding import POSITIONS_OF, WORDS


@pytest.fixture
def pair(build_model):
    """A model whose prompt has the embeddings of words, and a base model that reads the words themselves."""

    def build(architecture="llama", words=WORDS, **changes):
        sizes = {POSITIONS_OF.get(architecture, "max_position_embeddings"): 127, **changes}
        base = build_model(architecture, **sizes)
        torch.manual_seed(1)
        for parameter in base.parameters():
            if parameter.dim() > 1:  # so that tokens vary
                torch.nn.init.normal_(parameter, std=0.3)
        model = prompted(copy.deepcopy(base), "CAUSAL_LM", num_virtual_tokens=len(words)).eval()
        prompt_of(model).data = base.get_input_embeddings()(words).detach().clone()
        return model, base

    return build
