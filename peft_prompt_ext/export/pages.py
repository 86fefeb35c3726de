"""What a client reads in an exported folder: prompts.json for programs, README.md for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .adapters import Prompt
from .tokens import CHAT_VARIABLE, Added


def client_strings(
    prompts: Sequence[Prompt], families: Mapping[str, Any], added: Added, ids: Mapping[str, list[int]], in_chat: bool
) -> dict[str, Any]:
    """Describe what a client sends, as it is written to prompts.json.

    Args:
        prompts: The prompts.
        families: How the task of each is asked; None without a task.
        added: What the base model's tokenizer adds to a text by itself, and the exported one does not.
        ids: The ids of each prompt's tokens.
        in_chat: Whether the chat template knows the prompts.

    Returns:
        `chat_template_variable` (None without a chat template) and `prompts`, by name: `in_front` and `behind` (the
        strings around a text), `marker`, `position`, `token_ids`; with a task also `task`, `template` (of the text,
        columns in braces), `label_words`, `label_names` and for a regression `values`.
    """
    described = {}
    for prompt in prompts:
        in_front, behind = prompt.around(added.in_front, added.behind)
        entry: dict[str, Any] = {
            "in_front": in_front,
            "behind": behind,
            "marker": prompt.marker,
            "position": prompt.position,
            "token_ids": ids[prompt.name],
        }
        if (family := families[prompt.name]) is not None:
            task = family.task
            entry |= {"task": task.name, "template": family.question}
            entry |= {"label_words": list(task.label_words), "label_names": list(task.names)}
            if task.is_regression:
                entry["values"] = list(task.values)
        described[prompt.name] = entry
    return {"chat_template_variable": CHAT_VARIABLE if in_chat else None, "prompts": described}


_PAGE = """# {base} with trained prompts

A plain checkpoint of transformers. Each prompt is tokens of it; neither PEFT nor another package is needed.

| prompt | position | virtual tokens | text | answers |
| --- | --- | --- | --- | --- |
{rows}

A client sends `in_front + text + behind` of `prompts.json`, where the text is the template with its columns filled in:

```python
import json
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")
prompt = json.load(open("prompts.json"))["prompts"][{name!r}]
text = {text!r}  # {columns}
inputs = tokenizer(prompt["in_front"] + text + prompt["behind"], return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=3, do_sample=False)[0], skip_special_tokens=True))
```

- {adds}
- {chat}
- The prompts' tokens are never answered: their logits are far below all others, and `generation_config.json`
  suppresses them. `export.json` has the figures, and how near the answers are to PEFT's.
- Remove the markers from texts of strangers: a text that holds a marker gets that prompt.
"""


def client_page(base_model: str, strings: Mapping[str, Any]) -> str:
    """Write the README of an exported folder.

    Args:
        base_model: Its name; of a folder the last part is shown.
        strings: What `client_strings` gives.
    """
    prompts, variable = strings["prompts"], strings["chat_template_variable"]
    name, first = next(iter(prompts.items()))
    rows = (
        f"| `{key}` | {entry['position']} | {len(entry['token_ids'])} | {_code(entry.get('template'))} | "
        f"{', '.join(map(_code, entry.get('label_words', [])))} |"
        for key, entry in prompts.items()
    )
    is_bare = all(entry["marker"] == entry["in_front"] + entry["behind"] for entry in prompts.values())
    return _PAGE.format(
        base=base_model.rstrip("/").rpartition("/")[2],
        rows="\n".join(rows),
        name=name,
        text=first.get("template", "A text."),
        columns="its columns filled in" if "template" in first else "what the prompt was trained on",
        adds="The tokenizer adds nothing to a text by itself, nor does the base model's."
        if is_bare
        else "The tokenizer adds nothing to a text by itself: what the base model's adds is in these strings.",
        chat=f"In a chat: `tokenizer.apply_chat_template(messages, {variable}={name!r})`."
        if variable
        else "There is no single chat template, so none inserts a prompt.",
    )


def _code(text: str | None) -> str:
    """A text as code in a cell of a table."""
    return "" if text is None else f"`{json.dumps(text, ensure_ascii=False).replace('|', chr(92) + '|')}`"
