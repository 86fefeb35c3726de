"""The soft prompt: PEFT's PromptEmbedding, filled by an initialisation scheme."""

from __future__ import annotations

from typing import Any

import peft
import torch

from .config import PromptTuningExtConfig
from .inits import InitContext, get_scheme
from .sizes import token_dim


class PromptEmbedding(peft.PromptEmbedding):
    """
    Encodes virtual tokens as prompt embeddings; stock configs get stock behaviour.

    Args:
        config ([`PromptTuningExtConfig`] or [`~peft.PromptTuningConfig`]): The configuration of the prompt embedding.
        word_embeddings (`torch.nn.Module`): The word embeddings of the base model.

    Raises:
        ValueError: There are no word embeddings, or `token_dim` is not their width; the scheme does not work with this
            model or tokenizer, or did not return finite numbers of shape [P, H].

    Input Shape: (`batch_size`, `total_virtual_tokens`)

    Output Shape: (`batch_size`, `total_virtual_tokens`, `token_dim`)
    """

    def __init__(self, config: peft.PromptTuningConfig, word_embeddings: torch.nn.Module | None) -> None:
        if config.inference_mode:
            _check_width(config, word_embeddings)
        if not isinstance(config, PromptTuningExtConfig):
            super().__init__(config, word_embeddings)
            return
        if word_embeddings is None:
            raise ValueError(
                "The base model has no word embeddings: none of its parameters has config.vocab_size rows. Prompt "
                "tuning needs a transformers model with word embeddings."
            )
        config.token_dim = token_dim(config, word_embeddings)
        # PEFT's __init__ would draw from the global random state and run its own schemes
        super(peft.PromptEmbedding, self).__init__()
        if config.inference_mode:
            prompt = torch.zeros(config.num_virtual_tokens, config.token_dim)  # replaced by the saved prompt
        else:
            prompt = initialize_prompt(config, word_embeddings)
        self.embedding = torch.nn.Embedding.from_pretrained(
            prompt.repeat(config.num_transformer_submodules or 1, 1), freeze=False
        )


def _check_width(config: peft.PromptTuningConfig, word_embeddings: Any) -> None:
    """Raise ValueError if a saved prompt is not as wide as the word embeddings."""
    width = getattr(word_embeddings, "embedding_dim", config.token_dim)
    if config.token_dim != width:
        raise ValueError(
            f"The prompt was trained for word embeddings of width {config.token_dim} "
            f"({config.base_model_name_or_path!r}); this base model has {width}. Load the prompt with the base model "
            "that it was trained on."
        )


def initialize_prompt(config: PromptTuningExtConfig, word_embeddings: torch.nn.Module) -> torch.Tensor:
    """Run the config's scheme, check the result, and store the scheme's record in the config.

    Returns:
        [P, H], float32, on the CPU.

    Raises:
        ValueError: See [`PromptEmbedding`].
    """
    config.check_init()  # a config from a file has not been checked
    generator = torch.Generator().manual_seed(config.prompt_tuning_init_seed)
    ctx = InitContext(config=config, word_embeddings=word_embeddings, generator=generator)
    prompt = get_scheme(config.prompt_tuning_init).function(ctx, **(config.prompt_tuning_init_kwargs or {}))
    wanted = (config.num_virtual_tokens, config.token_dim)
    if tuple(prompt.shape) != wanted:
        raise ValueError(
            f"prompt_tuning_init={config.prompt_tuning_init!r} returned a prompt of shape {tuple(prompt.shape)}; "
            f"the model needs [P, H] = {wanted}: one vector for each virtual token, as wide as a word embedding."
        )
    if not torch.isfinite(prompt).all():
        raise ValueError(f"prompt_tuning_init={config.prompt_tuning_init!r} returned NaN or infinite numbers.")
    config.init_record = ctx.record
    return prompt.detach().to(device="cpu", dtype=torch.float32).clone()
