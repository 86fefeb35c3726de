"""Prompts as new tokens of a plain checkpoint of transformers, which answers without PEFT and without this package."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .._choices import check_choice
from .._files import write_json, write_whole
from .adapters import Prompt, read_prompts
from .head import check_untied, find_low_row, grow, untie, write_low_rows, write_vectors
from .pages import client_page, client_strings
from .proof import NEW_TOKENS, TOLERANCES, Answer, ask, check_same, check_tolerance, find_margin
from .texts import FIT_TOKENS, OWN, TEST_TOKENS, TOKENS_PER_SIZE, check_lengths, fill, random_batches, read_texts
from .tokens import Added, add_prompts, add_to_chat, added_by, check_markers


DTYPES = ("auto", "float32", "bfloat16", "float16")


def export_checkpoint(
    adapters: Sequence[str],
    output_dir: str | Path,
    *,
    base_model: str | None = None,
    texts: str | Path | None = None,
    dtype: str = "auto",
) -> dict[str, Any]:
    """Write a checkpoint in which each prompt is tokens, and prove that it answers as PEFT does.

    Args:
        adapters: Adapter folders or Hub ids of one base model, or "NAME=FOLDER".
        output_dir: The folder to write; it must not exist.
        base_model: The base model, in place of the one that the adapters name.
        texts: File with a text a line to prove the export on; see `texts.fill`. By default the export's own.
        dtype: Of the checkpoint: "auto" (that of the runs, else the base model's), "float32", "bfloat16" or "float16".

    Returns:
        The report, which is also written as `export.json`.

    Raises:
        ValueError: Something cannot be exported, or the proof fails; nothing was written then.
    """
    from transformers import AutoConfig, AutoTokenizer

    folder = Path(output_dir)
    check_choice("dtype", dtype, DTYPES)
    if folder.exists():
        raise ValueError(f"{folder} exists already: choose another --output_dir, or remove it.")
    lines = read_texts(texts) if texts is not None else list(OWN)
    prompts = read_prompts(adapters, base_model)
    first = prompts[0]
    try:
        config = AutoConfig.from_pretrained(first.base_model, revision=first.revision)
        tokenizer: Any = AutoTokenizer.from_pretrained(first.base_model, revision=first.revision)
    except OSError as error:
        raise ValueError(f"{first.base_model} has no model that transformers can read: {error}") from error
    _check_base(config, len(tokenizer), prompts)
    check_markers(tokenizer, prompts)
    work = _Work(prompts, lines, tokenizer, _choose_dtype(dtype, config, prompts))
    for prompt in prompts:
        check_lengths(config, prompt, work.encoded[prompt.name], NEW_TOKENS)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        report = work.run(partial)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def _choose_dtype(dtype: str, config: Any, prompts: Sequence[Prompt]) -> torch.dtype:
    """Choose the dtype of the checkpoint: by default that of the runs, else the base model's."""
    runs = {str((prompt.settings or {}).get("dtype", "auto")) for prompt in prompts} - {"auto"}
    if dtype == "auto" and len(runs) > 1:
        raise ValueError(f"The prompts were trained in {' and '.join(sorted(runs))}: choose one, --dtype.")
    if dtype == "auto" and not runs:
        return getattr(config, "dtype", None) or torch.float32
    return getattr(torch, runs.pop() if dtype == "auto" else dtype)


def _check_base(config: Any, words: int, prompts: Sequence[Prompt]) -> None:
    """Raise ValueError if a base model, of which only the config is read, cannot take the prompts."""
    name = prompts[0].base_model
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{name} is a quantised checkpoint, and a prompt becomes rows of full weights: give the model that it was "
            "made from, --base_model FULL."
        )
    check_untied(config)
    if words > config.get_text_config().vocab_size:
        raise ValueError(
            f"The tokenizer of {name} has {words} tokens, and its embedding {config.get_text_config().vocab_size} "
            "rows: tokens without a trained row could be answered. Resize the model and train it, or choose another."
        )
    for prompt in prompts:
        if prompt.vectors.shape[1] != config.hidden_size:
            raise ValueError(
                f"{prompt.folder} has vectors of {prompt.vectors.shape[1]} values, and {name} has embeddings of "
                f"{config.hidden_size}: give the base model that it was trained on, --base_model."
            )


class _Work:
    """One export, from the checked adapters to the finished folder."""

    def __init__(self, prompts: list[Prompt], lines: list[str], tokenizer: Any, dtype: torch.dtype) -> None:
        self.prompts, self.tokenizer, self.dtype = prompts, tokenizer, dtype
        self.words = len(tokenizer)
        self.families = {prompt.name: _family_of(prompt) for prompt in prompts}
        for name, family in self.families.items():
            if family is not None and not family.task.label_words:
                raise ValueError(
                    f"{name!r} was trained for {family.task.name}, whose answers to choose from differ by row, and "
                    "an export cannot prove their scores: serve the adapter with PEFT."
                )
        self.texts = {prompt.name: fill(lines, self.families[prompt.name]) for prompt in prompts}
        self.encoded = {name: [tokenizer(text)["input_ids"] for text in texts] for name, texts in self.texts.items()}

    def run(self, partial: Path) -> dict[str, Any]:
        """Write the folder. Returns the report."""
        wanted = self._ask_peft()
        report, ids = self._write(partial)
        report |= self._prove(partial, wanted, ids)
        write_json(partial / "export.json", report, ensure_ascii=False)
        return report

    def _load_base(self) -> Any:
        from ..quantization import load_frozen_backbone

        model: Any = load_frozen_backbone(
            self.prompts[0].base_model, dtype=self.dtype, revision=self.prompts[0].revision
        )
        return _place(model)

    def _ask_peft(self) -> dict[str, list[Answer]]:
        """What PEFT's model answers with each prompt."""
        from peft import PeftModel

        answers = {}
        for prompt in self.prompts:
            answers[prompt.name] = ask(
                PeftModel.from_pretrained(self._load_base(), prompt.folder).eval(),
                self.encoded[prompt.name],
                self.families[prompt.name],
            )
        return answers

    def _write(self, partial: Path) -> tuple[dict[str, Any], dict[str, list[int]]]:
        """Write the checkpoint, its tokenizer and what a client reads."""
        added = added_by(self.tokenizer)
        ids = add_prompts(self.tokenizer, self.prompts)
        in_chat = add_to_chat(self.tokenizer, self.prompts)
        model = self._load_base()
        before = model.get_input_embeddings().num_embeddings
        new = [token for tokens in ids.values() for token in tokens]
        tied = untie(model)
        grow(model, max(new) + 1)
        rounding = {p.name: write_vectors(model, ids[p.name], p.vectors) for p in self.prompts}
        fit_tokens = max(FIT_TOKENS, TOKENS_PER_SIZE * model.config.hidden_size)
        fit = self._random_batches(ids, fit_tokens, seed=0) + self._text_batches(ids)
        low = find_low_row(model, fit, self._random_batches(ids, TEST_TOKENS, seed=1))
        write_low_rows(model, new, low)
        generation = model.generation_config
        generation.suppress_tokens = [*(generation.suppress_tokens or []), *new]
        if not generation.do_sample:  # published configs have such options, with which no changed one can be saved
            for option in ("temperature", "top_k", "top_p", "min_p", "typical_p"):
                setattr(generation, option, getattr(type(generation)(), option))
        model.save_pretrained(partial)
        self.tokenizer.save_pretrained(partial)
        self._write_pages(partial, added, ids, in_chat)
        report = {
            "format": "checkpoint",
            "base_model": self.prompts[0].base_model,
            "base_model_revision": self.prompts[0].revision,
            "dtype": str(model.dtype).removeprefix("torch."),
            "rows_before": before,
            "rows": model.get_input_embeddings().num_embeddings,
            "head_was_tied": tied,
            "added_by_the_tokenizer_before": {"in_front": added.in_front, "behind": added.behind},
            "rounding_of_vectors": rounding,
            "least_projection": low.least,
        }
        return report, ids

    def _write_pages(self, partial: Path, added: Added, ids: Mapping[str, list[int]], in_chat: bool) -> None:
        strings = client_strings(self.prompts, self.families, added, ids, in_chat)
        write_json(partial / "prompts.json", strings, ensure_ascii=False)
        write_whole(partial / "README.md", client_page(self.prompts[0].base_model, strings))

    def _random_batches(self, ids: dict[str, list[int]], tokens: int, seed: int) -> list[torch.Tensor]:
        return random_batches(self.prompts, ids, self.words, tokens, seed)

    def _rows(self, prompt: Prompt, ids: Mapping[str, list[int]]) -> list[list[int]]:
        """The texts of a prompt with its tokens where PEFT has its vectors."""
        soft, is_prefix = ids[prompt.name], prompt.position == "prefix"
        return [[*soft, *text] if is_prefix else [*text, *soft] for text in self.encoded[prompt.name]]

    def _text_batches(self, ids: Mapping[str, list[int]]) -> list[torch.Tensor]:
        return [torch.tensor([row]) for prompt in self.prompts for row in self._rows(prompt, ids)]

    def _prove(self, partial: Path, wanted: dict[str, list[Answer]], ids: dict[str, list[int]]) -> dict[str, Any]:
        """Load the folder, and compare what it answers to what a client sends. Returns the figures."""
        import peft
        import transformers
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from .. import __version__

        self._check_tokens(AutoTokenizer.from_pretrained(partial), partial, ids)
        model = _place(AutoModelForCausalLM.from_pretrained(partial))
        proofs, behind = {}, []
        for prompt in self.prompts:
            rows, family = self._rows(prompt, ids), self.families[prompt.name]
            found = ask(model, rows, family)
            difference = check_same(prompt, self.texts[prompt.name], wanted[prompt.name], found)
            check_tolerance(prompt, difference, model.dtype)
            behind += [torch.tensor([[*row, *answer.tokens]]) for row, answer in zip(rows, found, strict=True)]
            proofs[prompt.name] = {
                "texts": len(rows),
                "greedy_tokens": sum(len(answer.tokens) for answer in found),
                "label_words": len(found[0].label_scores),
                "largest_difference_of_log_probabilities": difference,
            }
        new = [token for tokens in ids.values() for token in tokens]
        batches = behind + self._random_batches(ids, TEST_TOKENS, seed=2)
        return {
            "tolerance": TOLERANCES[model.dtype],
            "prompts": proofs,
            "new_tokens_below_all_others_by": find_margin(model, batches, new),
            "positions_of_that": sum(batch.numel() for batch in batches),
            "versions": {
                "peft_prompt_ext": __version__,
                "peft": peft.__version__,
                "transformers": transformers.__version__,
                "torch": torch.__version__,
            },
        }

    def _check_tokens(self, tokenizer: Any, partial: Path, ids: Mapping[str, list[int]]) -> None:
        """Raise ValueError if what a client sends does not become the tokens that the prompt was trained with."""
        strings = json.loads((partial / "prompts.json").read_text(encoding="utf-8"))["prompts"]
        for prompt in self.prompts:
            around = strings[prompt.name]
            for text, row in zip(self.texts[prompt.name], self._rows(prompt, ids), strict=True):
                found = tokenizer(around["in_front"] + text + around["behind"])["input_ids"]
                if found != row:
                    raise ValueError(
                        f"With the marker of {prompt.name!r} the tokenizer makes {found} of {text[:60]!r}; trained "
                        f"were {row}. Nothing was written. This tokenizer treats a text behind another token "
                        "differently: serve the adapter with PEFT."
                    )


def _place(model: Any) -> Any:
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _family_of(prompt: Prompt) -> Any:
    """How the task of a prompt is asked; None if no run of this package trained it."""
    if prompt.settings is None:
        return None
    from ..training.predictor import saved_family

    return saved_family(
        {**prompt.settings, "model_name_or_path": prompt.base_model, "model_revision": prompt.revision}
    )
