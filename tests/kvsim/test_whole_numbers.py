"""Every whole number and switch among the options of methods, engines and shardings is one, or is refused by name."""

from dataclasses import fields, is_dataclass
from itertools import product
from typing import Any, get_type_hints

import pytest

from kvsim import catalog
from kvsim.analysis.plan import site
from kvsim.cli import run
from kvsim.engines import ENGINES, Vllm, make_engine
from kvsim.hardware import find_hardware
from kvsim.memory.capacity import RESERVE, held_share, room
from kvsim.memory.sharding import Sharding
from kvsim.methods import METHODS, make_method
from kvsim.models.load import load_model
from kvsim.specs import parse_engine, parse_method

FROM_ZERO = {"max_seq_len", "sink_length", "first", "last", "windows", "boost_nbits"}
FROM_ZERO |= {"observed", "window", "recent_length"}


def _fields(factory: Any, kinds: set[Any]) -> list[str]:
    """The fields of a dataclass, or the arguments of a function, of these types."""
    if not is_dataclass(factory):
        return []
    hints = get_type_hints(factory)
    return [field.name for field in fields(factory) if hints[field.name] in kinds]


WHOLE = {int, int | None, int | str | None}
NUMBERS = [(ENGINES, make_engine, name, field) for name in ENGINES for field in _fields(ENGINES[name], WHOLE)]
NUMBERS += [(METHODS, make_method, name, field) for name in METHODS for field in _fields(METHODS[name], WHOLE)]
SWITCHES = [(name, field) for name in ENGINES for field in _fields(ENGINES[name], {bool})]


def test_the_fields_are_found() -> None:
    assert {field for *_, field in NUMBERS} >= {"block_size", "tensor_parallel_size", "n_ubatch", "budget", "nbits"}
    assert len(NUMBERS) >= 20
    assert len(SWITCHES) == 4


@pytest.mark.parametrize(("table", "make", "name", "field"), NUMBERS)
@pytest.mark.parametrize("value", [1.5, 2.0, float("nan"), float("inf"), -1, 10**90, True, "2", "1.5"])
def test_whole_numbers_of_methods_and_engines(table: Any, make: Any, name: str, field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{field.replace('_', '.')}|{field.replace('_', '-')}") as caught:
        make(name, **{field: value})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(("table", "make", "name", "field"), NUMBERS)
def test_none_of_them_is_0_but_where_0_means_something(table: Any, make: Any, name: str, field: str) -> None:
    if field in FROM_ZERO:
        make(name, **{field: 0})
        return
    with pytest.raises(ValueError, match=r"0: allowed are|0 is not a multiple"):
        make(name, **{field: 0})


@pytest.mark.parametrize(("table", "make", "name", "field"), NUMBERS)
@pytest.mark.parametrize("text", ["1.5", "-2", "1e3", "nan"])
def test_whole_numbers_in_specs(table: Any, make: Any, name: str, field: str, text: str) -> None:
    spec = f"{name}:{field}={text}"
    with pytest.raises(ValueError, match=r"allowed are|not a number"):
        parse_engine(spec, {}) if table is ENGINES else parse_method(spec, {})


@pytest.mark.parametrize(("name", "field"), SWITCHES)
def test_switches_are_on_or_off(name: str, field: str) -> None:
    for value in (2, 0.5, "yes", None):
        with pytest.raises(ValueError, match=f"{field.replace('_', '.')}.*: allowed are true and false"):
            make_engine(name, **{field: value})
    for text in ("2", "0.5", "perhaps", "-1"):
        with pytest.raises(ValueError, match=f"{field}={text}.*allowed are true and false"):
            parse_engine(f"{name}:{field}={text}", {})
    assert getattr(parse_engine(f"{name}:{field}=on", {}), field) is True
    assert getattr(parse_engine(f"{name}:{field}=0", {}), field) is False


def test_a_field_of_words_takes_words() -> None:
    assert parse_engine("transformers:cache_implementation=static", {}) == make_engine(
        "transformers", cache_implementation="static"
    )
    with pytest.raises(ValueError, match="cache_implementation '7': allowed are dynamic, static"):
        parse_engine("transformers:cache_implementation=7", {})


def test_a_switch_of_a_sharding_is_one() -> None:
    assert Sharding(enable_expert_parallel=True).enable_expert_parallel
    with pytest.raises(ValueError, match="enable-expert-parallel 1: allowed are true and false"):
        Sharding(enable_expert_parallel=1)


@pytest.mark.parametrize("field", [field.name for field in fields(Sharding) if field.name.endswith("_size")])
@pytest.mark.parametrize("value", [0, -2, 1.5, True])
def test_whole_numbers_of_a_sharding(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field.replace('_', '-')} .*: allowed are 1 and above"):
        Sharding(**{field: value})


@pytest.mark.parametrize(
    "option", ["block_size=1.5", "tensor_parallel_size=0", "tensor_parallel_size=-2", "max_num_seqs=0.5"]
)
def test_commands_refuse_them(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["estimate", "--ctx", "1k"], ["plan", "--users", "4"], ["breakeven"]):
        assert run([*command, "--model", "gpt2", "--gpu", "h100-sxm", "--engine", f"vllm:{option}"]) == 2
        error = capsys.readouterr().err
        assert option.partition("=")[0].replace("_", "-") in error
        assert "allowed are 1 and above" in error


def test_what_is_held_back_is_one_share_everywhere() -> None:
    """estimate's card and plan's, to the byte, on every card; 90 % used is 10 % held back."""
    model = load_model("gpt2")
    cards = [find_hardware(row["id"]) for row in catalog.rows("hardware")]
    cards = [card for card in cards if card.memory_nbytes]
    assert len(cards) > 60
    for card, name in product(cards, ("ideal", "vllm", "llama.cpp", "kvruntime", "transformers")):
        engine = make_engine(name)
        own = room(model, card, 16, held_share(engine), overhead=engine.overhead(model, card))
        if own.cache_nbytes > 0:
            assert site(model, card, 1, 16, engine=engine).cache_nbytes == own.cache_nbytes
        assert room(model, card, 16).reserve_nbytes == room(model, card, 16, held_share(None, None, 0.9)).reserve_nbytes
    assert held_share(make_engine("ideal")) == held_share(None, 0.1) == RESERVE
    assert held_share(Vllm()) == held_share(None, None, 0.92) == 0.08
    with pytest.raises(ValueError, match="not both"):
        held_share(None, 0.1, 0.9)
    for wrong in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"gpu-memory-utilization .*: allowed are above 0 to 1"):
            held_share(None, None, wrong)
