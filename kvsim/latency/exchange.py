"""What the cards of one model send to one another beyond tensor parallel's all-reduces.

* **Experts** on the cards of several replicas (data-parallel attention): every token's hidden state goes to the cards
  of its experts in 8 bits where these are stored so, and back in 16, once an expert.
* **Pipeline** stages hand the hidden states on.
* **Context parallel** gathers the queries of the cards that share tokens, and merges their partial outputs.

Within a host the links carry it, between hosts the network; the two overlap.  The four constants are stated, not
fitted: they reproduce DeepEP's published low-latency times on 8 to 256 cards (deepseek-ai/DeepEP@dd758ca
docs/legacy.md: H800, 400 Gb/s a card, 128 tokens of 7,168 channels, 8 experts a token) to 15 %: a test.
"""

from __future__ import annotations

from typing import Any, NamedTuple

NETWORK_BANDWIDTH = 50e9
"""Bytes a second and direction of a card's network: one 400 Gb/s adapter a card, as in hosts of 8 H100 to B300."""
NETWORK_EFFICIENCY = 0.8
LINK_EFFICIENCY = 0.7
"""Share of a link's one direction that an exchange reaches within a host; an all-reduce has a share of its own."""
EXCHANGE_SECONDS = 20e-6
"""What an exchange takes besides its bytes."""


class Wires(NamedTuple):
    """What connects cards: bytes a second and direction of a link within a host (``None``: not known), cards a host."""

    link: float | None
    host_cards: int

    def seconds(self, within: Any, between: Any) -> Any:
        """Of an exchange that sends so many bytes a card within its host and to other hosts.

        Raises ``ValueError`` where the link is not known.
        """
        if not self.link:
            raise ValueError("the bandwidth between cards is not known")
        inside, outside = within / self.link, between / (NETWORK_BANDWIDTH * NETWORK_EFFICIENCY)
        longer = (inside + outside + abs(inside - outside)) / 2  # the larger, of numbers and arrays alike
        return EXCHANGE_SECONDS + longer

    def send(self, nbytes: Any, ranks: int) -> Any:
        """Seconds of every one of ``ranks`` cards in a group sending ``nbytes`` evenly to all of them, itself among
        them."""
        near = min(ranks, self.host_cards)
        return self.seconds(nbytes * (near - 1) / ranks, nbytes * (ranks - near) / ranks)


def dispatch_combine(
    wires: Wires, ranks: int, num_tokens: Any, hidden: int, experts: int, element: float, once_a_host: bool = False
) -> Any:
    """Seconds a layer: ``num_tokens`` a card to the ``experts`` of each over ``ranks`` cards, ``element`` bytes a
    channel, and back in 2.

    ``once_a_host``: a token crosses the network once for all its experts on a host, as in the kernels for prompts.
    """
    hosts = -(-ranks // wires.host_cards)
    if once_a_host and hosts > 1:
        far = (hosts - 1) * (1 - (1 - 1 / hosts) ** experts)
        near = experts * (wires.host_cards - 1) / wires.host_cards
        nbytes = num_tokens * hidden
        return sum(wires.seconds(nbytes * near * wide, nbytes * far * wide) for wide in (element, 2))
    copies = num_tokens * experts * hidden
    return wires.send(copies * element, ranks) + wires.send(2 * copies, ranks)


def pipeline_sends(wires: Wires, stages: int, stage_cards: int, num_tokens: Any, hidden: int) -> Any:
    """Seconds that hidden states of 16 bits take from the first of ``stages`` to the last: each of a stage's cards
    sends its share."""
    nbytes = 2 * num_tokens * hidden / stage_cards
    hosts = -(-stages * stage_cards // wires.host_cards)
    far = min(stages, hosts) - 1
    return far * wires.seconds(0.0, nbytes) + (stages - 1 - far) * wires.seconds(nbytes, 0.0)


def context_merge(wires: Wires, ranks: int, num_tokens: Any, channels: int) -> Any:
    """Seconds a layer: ``ranks`` cards gather one another's queries of ``channels`` each and hand back partial
    outputs as wide, in 16 bits."""
    nbytes = 2 * num_tokens * channels * ranks
    return 2 * wires.send(nbytes, ranks)
