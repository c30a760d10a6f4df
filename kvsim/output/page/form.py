"""The form of ``kvsim serve``: its fields as a query string has them, the question that they ask, and its HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from kvsim import catalog
from kvsim.engines import ENGINES
from kvsim.hardware import Hardware, given
from kvsim.methods.defaults import DEFAULT_SPECS, EXAMPLES
from kvsim.models.load import load_model
from kvsim.models.model import Model
from kvsim.output.page.question import TABS, Question, question_price
from kvsim.specs import (
    card_and_count,
    choose_methods,
    parse_card,
    parse_reserve,
    parse_seconds,
    parse_serving,
    parse_size,
)

BITS = ("", "16", "8", "4")
MAX_METHODS = 8
MAX_CARDS = 8
MAX_LENGTH = 400
"""Characters of a field, and of an error."""
MAX_TOKENS = 1 << 30
MAX_BATCH = 1 << 20
Place = tuple[Hardware, int | None]


@dataclass(frozen=True)
class FormFields:
    """The form's fields, as text."""

    tab: str = "plan"
    model: str = "llama-3.1-8b"
    gpus: str = "h100-sxm"
    users: str = "64"
    input_len: str = "2k"
    output_len: str = "512"
    slo_tpot: str = "50ms"
    slo_ttft: str = "3s"
    gpu: str = "h100-sxm"
    cards: str = "1"
    ctx: str = "32k"
    batch: str = "8"
    method: tuple[str, ...] = DEFAULT_SPECS["page"]
    more: str = ""
    weight_bits: str = ""
    engine: str = "ideal"
    reserve: str = ""
    price: str = ""

    @classmethod
    def from_query(cls, pairs: Sequence[tuple[str, str]], default: FormFields) -> tuple[FormFields, str]:
        """The fields of a query string, and what is wrong with it (empty: nothing); without what is wrong, the others
        stand.  Fields that it lacks are ``default``'s."""
        known = cls.__dataclass_fields__
        fields, methods, wrong = dict(vars(default)), [], []
        seen: set[str] = set()
        for name, text in pairs:
            value = text.strip()
            if name not in known:
                wrong.append(f"unknown parameter {name[:40]!r}: allowed are {', '.join(known)}")
            elif name == "tab" and value not in TABS:
                wrong.append(f"tab {value[:40]!r}: allowed are {', '.join(TABS)}")
            elif len(value) > MAX_LENGTH and value != fields[name]:
                wrong.append(f"{name} of {len(value):,} characters: allowed are up to {MAX_LENGTH}")
            elif name == "method":
                methods.append(value)
            elif name in seen:
                wrong.append(f"{name} is given twice: {fields[name]!r} and {value!r}")
            else:
                fields[name] = value
            seen.add(name)
        if seen & {"method", "more"}:  # the form always sends "more": no method was ticked
            fields["method"] = tuple(methods)
        return cls(**fields), wrong[0] if wrong else ""

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The query string's pairs."""
        out = []
        for name, value in vars(self).items():
            out += [(name, each) for each in value] if isinstance(value, tuple) else [(name, value)]
        return out

    def question(self, own: dict[str, Model]) -> Question:
        """The question asked.  Raises ``ValueError`` or ``LookupError`` for a field that means nothing."""
        model = own.get(self.model) or _catalogued(self.model)
        card, count = self._place()
        specs = [*self.method, *_words(self.more)]
        if not specs:
            raise ValueError("choose a method")
        if len(specs) > MAX_METHODS:
            raise ValueError(f"{len(specs)} methods: allowed are up to {MAX_METHODS}")
        parse_serving(self.engine, card)
        bits = _number(self.weight_bits, "weight bits", 64)
        price = _number(self.price, "price", 1e6)
        plan_cards = tuple(map(parse_card, _words(self.gpus.replace(",", " "))))
        if len(plan_cards) > MAX_CARDS:
            raise ValueError(f"{len(plan_cards)} cards to choose from: allowed are up to {MAX_CARDS}")
        return Question(
            model,
            card,
            tuple(choose_methods(specs, {}, None)[0]),
            _size(self.ctx, "context", MAX_TOKENS),
            _size(self.batch, "batch", MAX_BATCH),
            count,
            bits,
            self.engine,
            parse_reserve(self.reserve) if self.reserve else None,
            question_price(card, count) if price is None else given(card.id, price),
            tuple(specs),
            self.model,
            _size(self.users, "users", MAX_BATCH) if self.users else None,
            _size(self.input_len, "prompt", MAX_TOKENS) if self.input_len else None,
            _size(self.output_len, "answer", MAX_TOKENS) if self.output_len else None,
            parse_seconds(self.slo_tpot, "time a token") if self.slo_tpot else None,
            parse_seconds(self.slo_ttft, "time to the first token") if self.slo_ttft else None,
            () if plan_cards == ((card, None),) else plan_cards,
            self.tab,
        )

    def _place(self) -> tuple[Hardware, int]:
        counted = card_and_count(self.gpu)[1] is not None
        card, count = parse_card(self.gpu if counted or not self.cards else f"{self.gpu}:{self.cards}")
        if counted and self.cards not in ("", "1", str(count)):
            raise ValueError(f"gpu {self.gpu!r} and cards {self.cards!r}: give the number of cards once")
        return card, count or 1


def _catalogued(name: str) -> Model:
    if catalog.find("models", name) is None:
        raise LookupError(catalog.unknown("models", "model", name, "kvsim models"))
    return load_model(name)


def _words(text: str) -> list[str]:
    """What stands between spaces or semicolons (options of methods have the commas)."""
    return text.replace(";", " ").split()


def _size(text: str, what: str, most: int) -> int:
    size = parse_size(text, what)
    if size > most:
        raise ValueError(f"{what} {size:,}: allowed are up to {most:,}")
    return size


def _number(text: str, what: str, most: float) -> float | None:
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number <= most:
        raise ValueError(f"{what} {text!r}: allowed are numbers above 0 to {most:g}")
    return number


PLACE = ("gpu", "cards")
LOAD = ("ctx", "batch")
SHOWN: dict[str, tuple[str, ...]] = {
    "plan": ("gpus", "users", "input_len", "output_len", "slo_tpot", "slo_ttft"),
    "deployment": (*PLACE, *LOAD),
    "breakeven": (*PLACE, *LOAD),
    "cache": LOAD,
}
"""Tab -> the fields that it asks for, beside the model and the methods; the others are kept unseen."""
MORE = ("weight_bits", "engine", "reserve", "price")
"""Fields under *More*, but for the tab that needs none of them."""


def form(asked: FormFields, own: Sequence[str]) -> str:
    """The form with what was asked; fields of other tabs are hidden in it."""
    fields = _fields(asked, own)
    shown = SHOWN[asked.tab]
    more = () if asked.tab == "cache" else MORE
    hidden = [name for name in fields if name not in ("model", *shown, *more)]
    checks = "".join(
        f'<label><input type="checkbox" name="method" value="{escape(spec)}"{" checked" * (spec in asked.method)}>'
        f"{escape(spec)}</label>"
        for spec in dict.fromkeys((*asked.method, *DEFAULT_SPECS["page offers"]))
    )
    typed = any(getattr(asked, name) != getattr(FormFields, name) for name in more)
    advanced = "".join(fields[name] for name in more)
    return (
        '<details class="question" open><summary>Change the question</summary>'
        '<form method="get" action="/" aria-label="What to weigh">'
        f'<input type="hidden" name="tab" value="{escape(asked.tab)}">'
        + "".join(_hidden(name, getattr(asked, name)) for name in hidden)
        + fields["model"]
        + "".join(fields[name] for name in shown)
        + '<fieldset class="wide"><legend>Methods; the others are compared with the first</legend>'
        + f'<div class="checks">{checks}</div></fieldset>'
        + _typed("more", "More methods", asked.more, "text", " ".join(EXAMPLES))
        + (f'<details class="wide more"{" open" * typed}><summary>Weights, engine, price</summary>' if more else "")
        + (f'<div class="fields">{advanced}</div></details>' if more else "")
        + '<button class="wide">Weigh</button></form></details>'
    )


def _fields(asked: FormFields, own: Sequence[str]) -> dict[str, str]:
    """Every field but the methods, as it looks where it is asked for."""
    models = [*own, *(row["id"] for row in catalog.rows("models"))]
    names = [row["id"] for row in catalog.rows("hardware")]
    weights = [(bits, f"{bits} bits" if bits else "as the config says") for bits in BITS]
    return {
        "model": _listed("model", "Model", asked.model, models),
        "gpus": _typed("gpus", "Cards to choose from", asked.gpus, "text", "h100-sxm h200-sxm 8xmi300x"),
        "users": _typed("users", "Users at once", asked.users, "numeric", "the batch"),
        "input_len": _typed("input_len", "Prompt, tokens", asked.input_len, "text", "the context"),
        "output_len": _typed("output_len", "Answer, tokens", asked.output_len, "text", "512"),
        "slo_tpot": _typed("slo_tpot", "A token within", asked.slo_tpot, "text", "no limit"),
        "slo_ttft": _typed("slo_ttft", "First token within", asked.slo_ttft, "text", "no limit"),
        "gpu": _listed("gpu", "Card", asked.gpu, names),
        "cards": _typed("cards", "Cards that share it", asked.cards, "numeric"),
        "ctx": _typed("ctx", "Context, tokens", asked.ctx),
        "batch": _typed("batch", "Batch, sequences", asked.batch),
        "weight_bits": _chosen("weight_bits", "Weights", asked.weight_bits, weights),
        "engine": _chosen("engine", "Engine", asked.engine, [(name, name) for name in ENGINES]),
        "reserve": _typed("reserve", "Memory held back", asked.reserve, "text", "10%, or the engine's"),
        "price": _typed("price", "Dollars a card-hour", asked.price, "decimal", "list price"),
    }


def _hidden(name: str, value: str) -> str:
    return f'<input type="hidden" name="{name}" value="{escape(value)}">'


def _typed(name: str, label: str, value: str, mode: str = "text", hint: str = "", more: str = "") -> str:
    wide = " long" if name in ("model", "more", "gpus") else ""
    return (
        f'<label class="field{wide}">{escape(label)}<input name="{name}" value="{escape(value)}" inputmode="{mode}" '
        f'placeholder="{escape(hint)}" autocomplete="off" spellcheck="false"{more}></label>'
    )


def _listed(name: str, label: str, value: str, names: Sequence[str]) -> str:
    options = "".join(f'<option value="{escape(each)}">' for each in names)
    return _typed(name, label, value, more=f' list="{name}s"') + f'<datalist id="{name}s">{options}</datalist>'


def _chosen(name: str, label: str, value: str, options: Sequence[tuple[str, str]]) -> str:
    more = [] if value in dict(options) else [(value, value)]
    items = "".join(
        f'<option value="{escape(each)}"{" selected" * (each == value)}>{escape(text)}</option>'
        for each, text in (*options, *more)
    )
    return f'<label class="field">{escape(label)}<select name="{name}">{items}</select></label>'
