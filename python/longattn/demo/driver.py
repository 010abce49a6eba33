"""What the demo measures: the same questions on the same context, with different shares of the keys read."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

import longattn as la
from longattn._checks import one_of
from longattn.demo import text
from longattn.demo.report import Progress
from longattn.demo.runner import (
    KeptReader,
    Model,
    PrefillReader,
    Reader,
    RetrievalReader,
    Session,
    SparseReader,
    WindowReader,
    read_all,
)
from longattn.retrieval.ways import WAYS, Kept, Way, chosen_of_all
from longattn.sparse.ways import PromptWay, chosen_prompt_ways

CHUNK = 1024  # tokens per prefill step
PROMPT_CHUNK = 4096  # where a selector chooses, which takes a pass over the keys each
ROOM = 64  # tokens that a question and its answer take at most


@dataclass(frozen=True)
class Settings:
    """Sizes of one run. The window-only contestant gets `window + top_k` keys, as many as retrieval reads.

    `ways` adds contestants: parts of names of `longattn.retrieval.ways` (`WAYS` and `POLICIES`), or "all". So does
    `prefill_ways`, of `longattn.sparse.ways.PROMPT_WAYS`: each reads the prompt anew through its selector, and is asked
    exactly.
    """

    context: int = 65536
    questions: int = 32
    seed: int = 0
    top_k: int = 128
    window: int = 128
    sinks: int = 4
    dtype: str = "float32"
    ways: str = ""
    prefill_ways: str = ""

    def __post_init__(self) -> None:
        for name, least in (
            ("context", 2),
            ("questions", 1),
            ("seed", 0),
            ("top_k", 1),
            ("window", 1),
            ("sinks", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)}, expected at least {least}")
        one_of(self.dtype, "dtype", ("float32", "bfloat16"))
        self.other_ways()
        self.prompt_ways()

    def other_ways(self) -> list[Way | Kept]:
        """The ways beside the default one, and the policies, that are asked."""
        if not self.ways:
            return []
        ways, policies = chosen_of_all(self.ways)
        return [*(way for way in ways if way is not WAYS[0]), *policies]

    def prompt_ways(self) -> Sequence[PromptWay]:
        """The ways to read the prompt beside the exact one."""
        return chosen_prompt_ways(self.prefill_ways) if self.prefill_ways else []

    def haystack(self) -> text.Haystack:
        clear_tail = self.sinks + self.window + self.top_k + ROOM
        return text.haystack(self.context, self.questions, seed=self.seed, clear_head=self.sinks, clear_tail=clear_tail)


@dataclass(frozen=True)
class Step:
    """Seconds of one decoded token: all of it, and the full layers' attention with its cache update."""

    total: float
    attention: float


class Decoder(Protocol):
    """One sequence that can be fed and rewound."""

    def attention_clock(self) -> float:
        """Seconds spent in the full layers' attention so far."""
        ...

    def feed(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [vocabulary] after the last of `tokens`."""
        ...

    def rewind(self) -> None:
        """Back to the end of the haystack."""
        ...


class LongattnDecoder:
    """The numpy runner after its prefill, with one way of reading."""

    def __init__(self, session: Session, read: Reader) -> None:
        self._session, self._read, self._mark = session, read, session.mark()

    def attention_clock(self) -> float:
        return self._session.full_attention_s

    def feed(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        last: NDArray[np.float32] = self._session.forward(tokens, self._read)[-1]
        return last

    def rewind(self) -> None:
        self._session.rewind(self._mark)


@dataclass
class Tally:
    """Answers and times of one contestant."""

    decoder: Decoder
    right: list[bool] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    wrong: list[tuple[str, str, str]] = field(default_factory=list)  # word, expected, answered

    def ask(self, needle: text.Needle) -> None:
        """Feeds all of the question but its last token, then decodes greedily, one token per timed step."""
        question = needle.question
        self.decoder.feed(question[:-1])
        token, answer = int(question[-1]), []
        for _ in needle.code:
            start, before = time.perf_counter(), self.decoder.attention_clock()
            token = int(np.argmax(self.decoder.feed(np.array([token]))))
            self.steps.append(Step(time.perf_counter() - start, self.decoder.attention_clock() - before))
            answer.append(token)
        self.decoder.rewind()
        self.right.append(answer == list(needle.code))
        if not self.right[-1]:
            said = "".join(chr(token) if token < 128 else "?" for token in answer)
            self.wrong.append((needle.word.decode(), needle.code.decode(), said))

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)

    @property
    def ms_per_token(self) -> float:
        return 1000 * statistics.median(step.total for step in self.steps)

    @property
    def attention_ms_per_token(self) -> float:
        return 1000 * statistics.median(step.attention for step in self.steps)


def _faster(peer: Tally | None, ours: Tally) -> float | None:
    """How many times as long the peer's attention in the full layers takes."""
    return peer.attention_ms_per_token / ours.attention_ms_per_token if peer else None


def chunks(tokens: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(tokens), size):
        yield tokens[start : start + size]


def measure(
    settings: Settings,
    haystack: text.Haystack,
    model: Model,
    *,
    peer: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Prefills the haystack, asks everyone every question, returns the figures of `longattn demo --json`.

    Args:
        settings: sizes.
        haystack: `settings.haystack()`.
        model: weights.
        peer: "transformers" adds transformers' own attention and cache; None: only longattn.
        progress: where to show how far it is.

    Raises:
        ValueError: an unknown peer.
        ImportError: the peer is not installed.
    """
    one_of(peer, "peer", ("transformers", None))
    progress = progress or Progress(None)
    session = Session(model, settings.context + ROOM, settings.dtype)
    prefill = PrefillReader()
    start = time.perf_counter()
    for chunk in progress.over("prefill", list(chunks(haystack.tokens, CHUNK)), settings.context):
        session.forward(chunk, prefill)
    prefill_s, exact_attention_s = time.perf_counter() - start, session.full_attention_s

    start = time.perf_counter()
    budget = {"top_k": settings.top_k, "sinks": settings.sinks, "window": settings.window}
    retrieval = RetrievalReader(session.stores, prefill, WAYS[0], **budget)
    index_s = time.perf_counter() - start
    others: dict[str, RetrievalReader | KeptReader] = {}
    for way in progress.over("indexes", settings.other_ways(), len(settings.other_ways())):
        if isinstance(way, Kept):
            others[way.name] = KeptReader(session.stores, prefill, way, **budget)
        else:
            others[way.name] = RetrievalReader(session.stores, prefill, way, **budget)
    tallies = {
        "exact": Tally(LongattnDecoder(session, read_all)),
        "retrieval": Tally(LongattnDecoder(session, retrieval)),
        "window": Tally(LongattnDecoder(session, WindowReader(settings.sinks, settings.window + settings.top_k))),
    }
    tallies |= {name: Tally(LongattnDecoder(session, reader)) for name, reader in others.items()}
    versions = {name: metadata.version(name) for name in ("longattn", "numpy")} | {"python": platform.python_version()}
    peer_figures = None
    if peer == "transformers":
        from longattn.demo.peer import TransformersDecoder

        decoder = TransformersDecoder(settings.dtype)
        start = time.perf_counter()
        for chunk in progress.over(
            "prefill of transformers", list(chunks(haystack.tokens, decoder.chunk)), settings.context
        ):
            decoder.feed(chunk)
        decoder.set_mark()
        peer_figures = {"name": peer, "prefill_s": time.perf_counter() - start}
        tallies["sdpa"] = Tally(decoder)
        versions |= {name: metadata.version(name) for name in ("torch", "transformers")}

    for needle in progress.over("questions", haystack.needles, len(haystack.needles)):
        for tally in tallies.values():
            tally.ask(needle)

    prompts = [
        _through(way, settings, haystack, model, progress) | {"exact_attention_s": exact_attention_s}
        for way in settings.prompt_ways()
    ]
    fraction = retrieval.fraction_read
    everything = dict.fromkeys(tallies, 1.0)
    read = everything | {
        **{name: reader.fraction_read for name, reader in others.items()},
        "retrieval": fraction,
        "window": (settings.sinks + settings.window + settings.top_k) / settings.context,
    }
    ours = {name: tally for name, tally in tallies.items() if name != "sdpa"}
    timed = ("exact", "retrieval", "sdpa")
    return {
        "context": settings.context,
        "questions": settings.questions,
        "accuracy": {name: tally.accuracy for name, tally in ours.items()},
        "keys_read_fraction": fraction,
        "attention_ms_per_token": {
            name: tallies[name].attention_ms_per_token if name in tallies else None for name in timed
        },
        "prefill_s": prefill_s,
        "prefill_attention_s": exact_attention_s,
        "prefill_ways": prompts,
        "versions": versions,
        "index_s": index_s,
        "index_bytes": sum(index.nbytes for index in retrieval.indexes.values()),
        "store_bytes": sum(store.nbytes for store in session.stores.values()),
        "threads": la.get_num_threads(),
        "parameters": model.parameters,
        "text_copies": haystack.copies,
        "settings": vars(settings).copy(),
        "contestants": {
            name: {
                "accuracy": tally.accuracy,
                "keys_read_fraction": read[name],
                "ms_per_token": tally.ms_per_token,
                "attention_ms_per_token": tally.attention_ms_per_token,
                "accuracy_of_exact": tally.accuracy / tallies["exact"].accuracy if tallies["exact"].accuracy else None,
                "faster_than_sdpa": _faster(tallies.get("sdpa"), tally),
                "wrong": tally.wrong,
            }
            for name, tally in tallies.items()
        },
        "peer": peer_figures,
    }


def _through(
    way: PromptWay, settings: Settings, haystack: text.Haystack, model: Model, progress: Progress
) -> dict[str, Any]:
    """Reads the haystack through a selector, asks every question exactly, and returns the figures."""
    session, reader = Session(model, settings.context + ROOM, settings.dtype), SparseReader(way.selector)
    start = time.perf_counter()
    for chunk in progress.over(f"prefill, {way.name}", list(chunks(haystack.tokens, PROMPT_CHUNK)), settings.context):
        session.forward(chunk, reader)
    seconds, attention_s = time.perf_counter() - start, session.full_attention_s
    tally = Tally(LongattnDecoder(session, read_all))
    for needle in progress.over(f"questions, {way.name}", haystack.needles, len(haystack.needles)):
        tally.ask(needle)
    return {
        "name": way.name,
        "prefill_s": seconds,
        "attention_s": attention_s,
        "density": reader.density,
        "accuracy": tally.accuracy,
        "wrong": tally.wrong,
    }
