"""A prompt of prose that asks for its own words once more: what drafts that are looked up in the prompt are made for.

A chat gives Python's own language reference, cut off somewhere, and asks for it word for word.  The answers before the
last one are that text.  A model of 135 million parameters goes on copying where it has seen a text copied; asked for it
once, it sums it up.
"""

from __future__ import annotations

from typing import Any

from kvruntime.eval.text import load_text

REQUEST, AGAIN = "Repeat the following text word for word.\n\n", "Once more."
COPIES = 3
"""How often the text is wanted or given before the answer that is timed."""
PLACE = "TEXT-TO-BE-REPEATED"


def name() -> str:
    """What a row says of the prompt; the text is another one under another version of Python."""
    text = load_text()
    return f"{text.name} {text.sha256[:12]}, to be repeated word for word"


def tokens(tokenizer: Any, num_tokens: int) -> list[int]:
    """Exactly ``num_tokens`` of the chat, by the tokenizer's template where it has one, else its turns one below the
    other.  What is left of them once the text has equal parts of it begins the answer.

    Raises ``ValueError`` where the requests alone take more, and for a template that leaves turns out.
    """
    before, *between = (_ids(tokenizer, part, not at) for at, part in enumerate(_parts(tokenizer)))
    if len(between) != COPIES:
        raise ValueError(f"a chat template shows {len(between)} of {COPIES} texts: allowed are those that show all")
    taken = len(before) + sum(map(len, between))
    length, rest = divmod(num_tokens - taken, COPIES)
    if length < 1:
        raise ValueError(f"a prompt of {num_tokens} tokens that asks for a text again: allowed are {taken + COPIES} on")
    text = _ids(tokenizer, load_text().content[: 16 * num_tokens], False)
    out = list(before)
    for part in between:
        out += text[:length] + part
    return out + text[:rest]


def _parts(tokenizer: Any) -> list[str]:
    """What stands before, between and behind the texts."""
    turns = [REQUEST + PLACE, *[PLACE, AGAIN] * (COPIES - 1)]
    if getattr(tokenizer, "chat_template", None) is None:
        chat = "\n\n".join(turns) + "\n\n"
    else:
        messages = [{"role": ("user", "assistant")[at % 2], "content": turn} for at, turn in enumerate(turns)]
        chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return chat.split(PLACE)


def _ids(tokenizer: Any, text: str, begins: bool) -> list[int]:
    """``begins``: with what the tokenizer puts before a text, where no template does."""
    special = begins and getattr(tokenizer, "chat_template", None) is None
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])
