"""What a user types, understood: sizes such as ``128k``, method specs such as ``kivi:nbits=2``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from math import isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kvsim import catalog
from kvsim.engines import ENGINES, Engine, EngineChoice, engine_fields, make_engine
from kvsim.hardware import Hardware, find_hardware
from kvsim.layout import Method
from kvsim.methods import METHODS, make_method
from kvsim.methods.defaults import COMPRESSED, DEFAULT_SPECS
from kvsim.methods.full import SHORT
from kvsim.whole_numbers import LARGEST

if TYPE_CHECKING:
    from kvsim.analysis.prefix_hits import Prompt
    from kvsim.analysis.request_lengths import Lengths
    from kvsim.latency.speculation import Speculation

SIZE = re.compile(r"(\d{1,15})([kKmM]?)")
COUNT = re.compile(r"([+-]?\d{1,15})([kKmM]?)")
HUMAN = re.compile(r"(\d+(?:\.\d+)?)([kKmMgG]?)")
HUMAN_FACTOR = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
FACTOR = {"": 1, "k": 1 << 10, "m": 1 << 20}
LONG = {short: dtype for dtype, short in SHORT.items()}

Value = int | str
Row = TypeVar("Row")


def brief(text: str) -> str:
    """What a user typed, quoted and cut: a wall of text says no more than its beginning."""
    return repr(text if len(text) <= 60 else f"{text[:50]}...")


def parse_size(text: str, what: str = "ctx") -> int:
    """``131072``, ``128k`` (1024s), ``1M`` -> a whole number from 1 to :data:`LARGEST`.  Raises ``ValueError``."""
    match = SIZE.fullmatch(text.strip())
    size = int(match[1]) * FACTOR[match[2].lower()] if match else 0
    if not 1 <= size <= LARGEST:
        raise ValueError(
            f"{what} {brief(text)}: allowed are whole numbers from 1 to {LARGEST:,}, such as 4096, 128k or 1M"
        )
    return size


def parse_tokens(text: str, what: str) -> int:
    """``131072``, ``128k`` (1024s), ``1M``, ``0`` or ``-1`` -> a whole number, whose least the command knows.

    Raises ``ValueError`` for another text and for a number beyond :data:`LARGEST`.
    """
    match = COUNT.fullmatch(text.strip())
    count = int(match[1]) * FACTOR[match[2].lower()] if match else LARGEST + 1
    if abs(count) > LARGEST:
        raise ValueError(
            f"{what} {brief(text)}: allowed are whole numbers up to {LARGEST:,}, such as 4096, 128k or 1M"
        )
    return count


def parse_human(text: str, what: str) -> int:
    """A number as vLLM's flags read it: ``32k`` is 32,000, ``32K`` 32,768, ``25.6k`` 25,600.  Raises ``ValueError``."""
    match = HUMAN.fullmatch(text.strip())
    number = match[1] if match else "0"
    factor = HUMAN_FACTOR[match[2]] if match else 1
    size = int(float(number) * factor) if len(number) < 16 else 0
    if not 1 <= size <= LARGEST or ("." in number and factor & 1023 == 0 and factor > 1):
        raise ValueError(
            f"{what} {brief(text)}: allowed are whole numbers from 1 to {LARGEST:,}, such as 4096, 32k (32,000), "
            "32K (32,768)"
        )
    return size


def parse_sizes(text: str, what: str = "ctx") -> list[int]:
    """Sizes with commas between them, ascending, each once."""
    return sorted({parse_size(part, what) for part in text.split(",")})


def parse_dtype(text: str) -> str:
    """``fp16`` or ``float16``, and so on -> ``float16``.  Raises ``ValueError``."""
    dtype = LONG.get(text.lower(), text.lower())
    if dtype not in SHORT:
        raise ValueError(f"dtype {brief(text)}: allowed are {', '.join((*SHORT, *LONG))}")
    return dtype


def parse_reserve(text: str) -> float:
    """``10%`` or ``0.1`` -> 0.1.  Raises ``ValueError``."""
    share = _share(text)
    if not 0 <= share < 1:
        raise ValueError(f"reserve {brief(text)}: allowed are 0% to below 100%, or 0 to below 1")
    return share


def _share(text: str) -> float:
    """A share; -1 of what is none."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return -1.0


def parse_value(text: str) -> Value:
    """A method option's value: a whole number (``-1``, ``4k``), else the text itself (``sequence``, ``bfloat16``).

    Raises ``ValueError`` for a number beyond :data:`LARGEST`.
    """
    match = re.fullmatch(r"(-?\d+)([kKmM]?)", text)
    if match is None:
        return text
    value = int(match[1]) * FACTOR[match[2].lower()] if len(match[1]) <= 16 else LARGEST + 1
    if abs(value) > LARGEST:
        raise ValueError(f"{brief(text)}: allowed are whole numbers up to {LARGEST:,}")
    return value


def fields(name: str) -> dict[str, bool]:
    """The options that a named method takes, and whether each holds another method."""
    return _fields(METHODS[name]) if name in METHODS else {}


@lru_cache(maxsize=256)
def _fields(factory: Callable[..., Method]) -> dict[str, bool]:
    parameters = inspect.signature(factory).parameters
    return {key: each.annotation in ("Method", Method) for key, each in parameters.items()}


MAX_DEPTH = 8
"""Methods inside one another."""


def parse_method(spec: str, shared: Mapping[str, Value], dtype: str | None = None, depth: int = 0) -> Method:
    """``name`` or ``name:field=value,field=value``; ``shared`` options apply where the method has the field.

    A field that holds a method takes a spec, in parentheses where it has options of its own:
    ``paged:block_size=16,inner=fp8``, ``evict:budget=2048,inner=(kivi:nbits=4,group_size=64)``.
    Raises ``LookupError`` for an unknown method, ``ValueError`` for an unknown field or a bad value.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"method {spec[:40]!r}: allowed are {MAX_DEPTH} methods inside one another")
    name, given = _head(spec)
    own = fields(name)
    options: dict[str, Any] = {key: value for key, value in shared.items() if key in own}
    if dtype is not None and "dtype" in own:
        options["dtype"] = dtype
    for item in given:
        field, equals, value = item.partition("=")
        field, value = field.strip().replace("-", "_"), value.strip()
        if not equals or (name in METHODS and field not in own):
            allowed = ", ".join(sorted(own)) or "none"
            raise ValueError(f"method {spec!r}: option {item!r} is not one of {allowed} (field=value)")
        if own.get(field):
            options[field] = parse_method(value, shared, dtype, depth + 1)
        else:
            options[field] = parse_dtype(value) if field == "dtype" else parse_value(value)
    return make_method(name, **options)


def method_spec(method: Method) -> str:
    """The spec that :func:`parse_method` reads as ``method``: its name and the options that are not the usual ones.

    Raises ``LookupError`` for a method that no name makes by its fields.
    """
    for name, make in METHODS.items():
        if isinstance(make, type) and make is not type(method):
            continue
        own = fields(name)
        if not all(hasattr(method, field) for field in own):
            continue
        given = {field: getattr(method, field) for field in own}
        if make(**given) != method:
            continue
        usual, options = make(), []
        for field, value in given.items():
            if value != getattr(usual, field):
                plain = int(value) if isinstance(value, bool) else value
                options.append(f"{field}=({method_spec(value)})" if own[field] else f"{field}={plain}")
        return f"{name}:{','.join(options)}" if options else name
    raise LookupError(f"{method.name}: no name makes it by its fields")


def parse_engine(spec: str, shared: Mapping[str, Any]) -> Engine:
    """As :func:`parse_engine_choice`, on no card in particular."""
    choice = parse_engine_choice(spec, shared)
    return make_engine(choice.name, **dict(choice.options))


def parse_engine_choice(spec: str, shared: Mapping[str, Any]) -> EngineChoice:
    """``name`` or ``name:field=value,...``; ``shared`` options apply where the engine has the field.

    Raises ``LookupError`` for an unknown engine, ``ValueError`` for an unknown field or a bad value.
    """
    name, given = _head(spec)
    own = engine_fields(name) if name in ENGINES else {}
    options = {key: value for key, value in shared.items() if key in own}
    for item in given:
        field, equals, text = item.partition("=")
        field = field.strip().replace("-", "_")
        if not equals or (name in ENGINES and field not in own):
            allowed = ", ".join(sorted(own)) or "none"
            raise ValueError(f"engine {spec!r}: option {item!r} is not one of {allowed} (field=value)")
        kind, text = own.get(field), text.strip()
        options[field] = text if kind == "str" else _number(spec, item, text, kind == "bool")
    return EngineChoice(name, tuple(options.items()))


def _number(spec: str, item: str, text: str, switch: bool = False) -> int | float:
    """A number, ``4k`` too; of a ``switch`` true or false (on, off, 1, 0).  Raises ``ValueError``."""
    if switch:
        known = {"true": True, "false": False, "on": True, "off": False, "1": True, "0": False}
        if text.lower() not in known:
            raise ValueError(f"engine {spec!r}: option {item!r}: allowed are true and false")
        return known[text.lower()]
    value = parse_value(text)
    try:
        number = value if isinstance(value, int) else float(value)
    except ValueError:
        number = nan
    if not isfinite(number):
        raise ValueError(f"engine {brief(spec)}: option {brief(item)} is not a number")
    return number


def _head(spec: str) -> tuple[str, list[str]]:
    """A spec's own name and its items, outer parentheses taken off."""
    text = spec.strip()
    if text.startswith("(") and text.endswith(")"):
        text = text[1:-1]
    name, _, given = text.partition(":")
    return name.strip().lower(), [item for item in _split(given, spec) if item.strip()]


def _split(text: str, spec: str) -> list[str]:
    """``text`` at the commas outside parentheses.  Raises ``ValueError`` where these do not pair."""
    items, depth = [""], 0
    for char in text:
        depth += (char == "(") - (char == ")")
        if depth < 0:
            break
        if char == "," and not depth:
            items.append("")
        else:
            items[-1] += char
    if depth:
        raise ValueError(f"method {spec!r}: its parentheses do not pair")
    return items


def names_within(spec: str, depth: int = 0) -> list[str]:
    """The method names of a spec, those inside it too."""
    name, given = _head(spec)
    out, own = [name], fields(name)
    for item in given:
        field, _, value = item.partition("=")
        if own.get(field.strip().replace("-", "_")) and depth <= MAX_DEPTH:
            out += names_within(value, depth + 1)
    return out


def choose_methods(specs: Sequence[str], shared: Mapping[str, Value], dtype: str | None) -> tuple[list[Method], bool]:
    """The methods asked for, each once, and whether they are merely the default ones.

    Without ``specs``: the uncompressed cache and those of :data:`kvsim.methods.defaults.DEFAULT_SPECS`, or the one that
    the ``shared`` options are of.
    Raises ``ValueError`` for a shared option that none of the methods takes.
    """
    chosen: Sequence[str] = specs
    if not specs:
        baseline = SHORT[dtype or "float16"]
        bits_given = any("nbits" in key for key in shared)
        chosen = [baseline, COMPRESSED] if bits_given else [baseline, *DEFAULT_SPECS["estimate"]]
    names = [name for spec in chosen for name in names_within(spec)]
    for key in shared:
        if all(name in METHODS and key not in fields(name) for name in names):
            raise ValueError(f"no method of {', '.join(names)} takes --{key.replace('_', '-')}")
    if dtype is not None and all(name in METHODS and "dtype" not in fields(name) for name in names) and specs:
        raise ValueError(f"no method of {', '.join(names)} takes --dtype: each names its own type")
    methods = [parse_method(spec, shared, dtype) for spec in chosen]
    return list(dict.fromkeys(methods)), not specs and not shared


def left_out(reasons: Mapping[str, str]) -> list[str]:
    """One note a reason: the methods (name -> reason) that it leaves out."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return [f"{', '.join(group)} left out: {reason}" for reason, group in names.items()]


def rows_of(
    methods: Iterable[Method], make: Callable[[Method], Iterable[Row]], whose: str, *, named: bool = False
) -> tuple[list[Row], list[str]]:
    """The rows of every method that can be, and notes that say which are left out and why.

    Raises the ``ValueError`` of a method that was ``named``, and one that begins with ``whose`` where none can be.
    """
    rows: list[Row] = []
    reasons: dict[str, str] = {}
    for method in methods:
        try:
            rows.extend(make(method))
        except ValueError as error:
            if named:
                raise
            reasons[method.name] = str(error)
    notes = left_out(reasons)
    if not rows:
        raise ValueError(f"{whose}: {'; '.join(notes)}")
    return rows, notes


LOGNORMAL = ("mean", "sigma", "output_mean", "output_sigma", "max")
"""Options of lognormal request lengths."""
SECONDS = re.compile(r"(\d+(?:\.\d+)?)\s*(us|ms|s|min)?")
UNIT = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
BARE = 10.0
"""A bare number from here on is more likely meant as milliseconds."""
MAX_RANKS = 1024


def parse_seconds(text: str, what: str) -> float:
    """``30ms``, ``2s``, ``1.5 min``; a bare number is seconds, below ``BARE``.  Raises ``ValueError``."""
    match = SECONDS.fullmatch(text.strip())
    if match and not match[2] and float(match[1]) >= BARE:
        raise ValueError(f"{what} {brief(text)}: seconds or milliseconds? write {text.strip()}s or {text.strip()}ms")
    seconds = float(match[1]) * UNIT[match[2] or "s"] if match else 0.0
    if not 0 < seconds < 1e6:
        raise ValueError(f"{what} {brief(text)}: allowed are times such as 30ms or 2s")
    return seconds


def parse_share(text: str, what: str) -> float:
    """``1%`` or ``0.01`` -> 0.01, from 0 to below 10.  Raises ``ValueError``."""
    share = _share(text)
    if not 0 <= share < 10:
        raise ValueError(f"{what} {brief(text)}: allowed are shares such as 1% or 0.01")
    return share


TIMES_CARD = re.compile(
    r"(?P<first>\d{1,4})\s*[x×*]\s*(?P<name>\D.*)|(?P<before>.*\S)\s*[x×*]\s*(?P<last>\d{1,4})", re.I
)


def card_and_count(text: str) -> tuple[str, str | None]:
    """``h100-sxm:2``, ``2xh100-sxm`` or ``h100-sxmx2`` -> the card's name and how many; a known name has no count."""
    name, colon, count = text.partition(":")
    if colon or catalog.find("hardware", text) is not None:
        return name, count if colon else None
    found = TIMES_CARD.fullmatch(text.strip())
    if found is None:
        return text, None
    return (found["name"], found["first"]) if found["name"] else (found["before"], found["last"])


def parse_card(text: str) -> tuple[Hardware, int | None]:
    """``h100-sxm``, ``h100-sxm:2``, ``2xh100`` or ``h100x2``: a card, and how many share the model.

    Raises ``LookupError`` for an unknown card, ``ValueError`` for a count that is none.
    """
    name, count = card_and_count(text)
    if count is None:
        glued = re.fullmatch(r"(\d{1,4})\s*(\D.*)", text.strip())
        if glued and catalog.find("hardware", text) is None and catalog.find("hardware", glued[2]) is not None:
            raise LookupError(
                f"gpu {brief(text)}: {glued[1]} of them are {glued[1]}x{glued[2]} or {glued[2]}:{glued[1]}"
            )
        return find_hardware(name), None
    if not re.fullmatch("[0-9]{1,4}", count) or not 1 <= int(count) <= MAX_RANKS:
        allowed = f"CARD:COUNT with a count of 1 to {MAX_RANKS}, such as h100-sxm:2"
        raise ValueError(f"gpu {brief(text)}: allowed is {allowed}")
    return find_hardware(name), int(count)


def parse_prices(texts: Sequence[str], cards: Sequence[Hardware]) -> dict[str, float]:
    """``2.2`` (of every card) and ``mi300x=2.2`` -> dollars a card-hour by the card's id.

    Raises ``ValueError`` for another form, a second price of a card, or one of a card that is not asked about;
    ``LookupError`` for an unknown card.
    """
    asked = {card.id for card in cards}
    found: dict[str, float] = {}
    plain: set[str] = set()
    for text in texts:
        name, equals, dollars = text.rpartition("=")
        try:
            price = float(dollars)
        except ValueError:
            price = nan
        if not 0 < price < 1e6:
            raise ValueError(f"price {brief(text)}: allowed are dollars a card-hour above 0, such as 2.2 or mi300x=2.2")
        if not equals:
            if plain:
                raise ValueError("price: give one for every card, or CARD=DOLLARS for each")
            plain = asked
            continue
        card = find_hardware(name).id
        if card not in asked or card in found:
            why = f"two prices of {card}" if card in found else f"--gpu asks about {', '.join(sorted(asked))}"
            raise ValueError(f"price {brief(text)}: {why}")
        found[card] = price
    if plain:
        every = next(float(text) for text in texts if "=" not in text)
        found = {card: found.get(card, every) for card in asked}
    return found


def parse_prefix_hits(text: str) -> float | list[Prompt]:
    """``60%`` or ``0.6``, or the path of a trace with its blocks.  Raises ``ValueError``."""
    from kvsim.analysis.prefix_hits import read_prompts

    if Path(text).exists() or not re.fullmatch(r"[0-9.]+%?", text):
        return read_prompts(Path(text))
    share = float(text[:-1]) / 100 if text.endswith("%") and text.count(".") < 2 else float(text)
    if not 0 <= share < 1:
        raise ValueError(f"prefix-hits {brief(text)}: allowed are 0% to below 100%, 0 to below 1, or a trace")
    return share


SPECULATION = {"draft": ("model", "tokens", "acceptance"), "mtp": ("tokens", "acceptance")}
SPECULATION["ngram"] = (*SPECULATION["mtp"], "proposed")
"""Kinds of drafts and their options."""


def parse_speculation(text: str) -> Speculation:
    """``mtp:tokens=1,acceptance=0.85``, ``ngram:tokens=5,acceptance=0.7,proposed=0.5``,
    ``draft:model=qwen3-0.6b,acceptance=0.8/0.6/0.5`` (a share for each position, as vLLM logs them).

    Raises ``ValueError`` for another form, ``LookupError`` for an unknown model.
    """
    from kvsim.latency.speculation import Speculation, rate_by_position
    from kvsim.models.load import load_model

    kind, given = _head(text)
    own = SPECULATION.get(kind, ())
    options = dict(item.split("=", 1) for item in given if "=" in item)
    if not own or len(options) != len(given) or not options.keys() <= set(own) or "acceptance" not in options:
        forms = "; ".join(f"{name}:{','.join(each)}" for name, each in SPECULATION.items())
        raise ValueError(f"speculate {brief(text)}: allowed are {forms}, each with =, acceptance always")
    try:
        shares = [float(part) for part in options["acceptance"].split("/")]
        proposed, count = float(options.get("proposed", 1)), int(options.get("tokens", len(shares)))
    except ValueError:
        raise ValueError(f"speculate {brief(text)}: an option is not a number") from None
    if len(shares) > 1 and count != len(shares):
        raise ValueError(f"speculate {brief(text)}: {len(shares)} shares for {count} tokens")
    if not 1 <= count <= 64:
        raise ValueError(f"speculate {brief(text)}: tokens: allowed are 1 to 64")
    kept = tuple(shares) if len(shares) > 1 else rate_by_position(shares[0], count)
    return Speculation(kind, kept, proposed, load_model(options["model"]) if "model" in options else None)


def parse_serving(spec: str, card: Hardware | None, num_cards: int = 1) -> Engine:
    """``vllm``, or with its options ``vllm:block_size=32``, as it starts on ``num_cards`` of this card by default.

    Raises ``LookupError`` for an unknown engine, ``ValueError`` for an option that it does not have.
    """
    return parse_engine_choice(spec, {}).on(card, num_cards)


def milliseconds(seconds: float) -> str:
    """Three significant digits, in ms."""
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def parse_lengths(text: str, output_len: int) -> Lengths:
    """``lognormal:mean=2000,sigma=0.8[,output_mean=300,output_sigma=0.6][,max=32k]`` or the path of a CSV trace.

    Raises ``ValueError`` for another form.
    """
    from kvsim.analysis.request_lengths import lognormal, lognormal_outputs, read_trace

    kind, _, given = text.partition(":")
    if kind != "lognormal":
        return read_trace(Path(text), output_len)
    options: dict[str, float] = {}
    for item in filter(None, given.split(",")):
        key, equals, value = item.partition("=")
        if not equals or key.strip() not in LOGNORMAL:
            raise ValueError(f"lengths {text!r}: {item!r} is not one of {', '.join(LOGNORMAL)} (name=value)")
        try:
            options[key.strip()] = parse_size(value, key) if value[-1:] in "kKmM" else float(value)
        except ValueError:
            raise ValueError(f"lengths {text!r}: {item!r} is no number") from None
    if "mean" not in options or "sigma" not in options:
        raise ValueError(f"lengths {text!r}: mean and sigma are needed")
    if ("output_mean" in options) != ("output_sigma" in options):
        raise ValueError(f"lengths {text!r}: output_mean and output_sigma go together")
    output: Lengths | int = output_len
    if "output_mean" in options:
        output = lognormal_outputs(options["output_mean"], options["output_sigma"])
    longest = options.get("max")
    if longest is not None and not 1 <= longest <= LARGEST:
        raise ValueError(f"lengths max {longest:g}: allowed are 1 to {LARGEST:,} tokens")
    return lognormal(options["mean"], options["sigma"], output, None if longest is None else int(longest))


def parse_axis(text: str, what: str) -> Sequence[int]:
    """``1k,4k,8k``; ``16:4096:16`` (from, to, step; a range, however long); ``1k:1M:*2`` (a factor).  Ends included.

    Raises ``ValueError`` for anything else.
    """
    bounds = text.split(":")
    if len(bounds) == 1:
        return tuple(parse_sizes(text, what))
    if len(bounds) > 3:
        raise ValueError(f"{what} {brief(text)}: allowed are from:to, from:to:step, from:to:*factor")
    first, last = parse_size(bounds[0], what), parse_size(bounds[1], what)
    if first > last:
        raise ValueError(f"{what} {brief(text)}: {first} is above {last}")
    if len(bounds) == 2 or not bounds[2].startswith("*"):
        return range(first, last + 1, parse_size(bounds[2], what) if len(bounds) == 3 else 1)
    factor = parse_size(bounds[2][1:], what)
    if factor < 2:
        raise ValueError(f"{what} {brief(text)}: allowed are factors from 2")
    sizes = [first]
    while sizes[-1] * factor <= last:
        sizes.append(sizes[-1] * factor)
    return tuple(sizes)
