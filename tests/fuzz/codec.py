"""Both codecs and the frames of zstd: every refusal is a documented one, and every reading can be repeated."""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random

import torch

from argrad.errors import ProblemError
from argrad.wire import Decompression, TooLargeError, UnreadableBodyError, compress, decode, encode
from argrad.wire.messages import Message, TensorMap
from tests.fuzz.mutations import mutate
from tests.fuzz.seeds import Seed, seeds
from tests.fuzz.tally import Hang, Tally, no_longer_than, place_of

DOCUMENTED = (UnreadableBodyError, TooLargeError, ProblemError)
"""What `decode` says that it raises for a body of a known format."""

MOST_CPU_S = 2.0
MOST_KEPT = 5000
_NEWEST = 500
_SEEDS = 16
"""Half of the inputs come from a seed itself: what is refused begets what is refused, as a rule."""


def fuzz_messages(content_type: str, count: int, seed: int, *, of_replies: bool = False) -> Tally:
    """Read so many mutations of messages in one format.

    Args:
        content_type: The format.
        count: Inputs.
        seed: Of all chance.
        of_replies: What the client reads, instead of what the service reads.
    """
    corpus = [one for one in seeds(of_replies=of_replies) if one.content_type == content_type]
    tally = Tally(f"{content_type.rpartition('/')[2].removeprefix('x-')} {'replies' if of_replies else 'requests'}")
    random = Random(seed)
    with tally.timed():
        for _ in range(count):
            parent = _choose(random, corpus)
            body = mutate(random, parent.body, content_type, lambda: random.choice(corpus).body)
            mutant = Seed(parent.model, content_type, body)
            if _read(tally, mutant) and len(corpus) < MOST_KEPT:
                corpus.append(mutant)
    return tally


def fuzz_frames(count: int, seed: int) -> Tally:
    """Decompress so many mutations of frames of zstd, under a cap."""
    random, tally, cap = Random(seed), Tally("zstd frames"), 64 * 1024
    whole = [seed.body for seed in seeds()]
    corpus = [b"".join(compress([body * times], len(body) * times)) for body in whole for times in (1, 40)]
    with tally.timed():
        for _ in range(count):
            body = mutate(random, random.choice(corpus), "", lambda: random.choice(corpus))
            piece = random.choice((18, 100, 1 << 16))

            def work(body: bytes = body, piece: int = piece) -> str:
                content = Decompression(cap, f"at most {cap} bytes")
                for at in range(0, max(1, len(body)), piece):
                    content.feed(body[at : at + piece])
                    while not content.is_hungry:
                        content.step(4096)
                if len(content.finish()) > cap:
                    raise AssertionError("more than the cap")
                return "read"

            if _attempt(tally, body, work):
                corpus.append(body)
    return tally


def _choose(random: Random, corpus: list[Seed]) -> Seed:
    return random.choice(corpus[:_SEEDS] if random.random() < 0.5 else corpus[-_NEWEST:])


def _read(tally: Tally, mutant: Seed) -> bool:
    def work() -> str:
        body = bytearray(mutant.body)
        message, tensors = decode(mutant.model, body, mutant.content_type)
        if sum(tensor.nbytes for tensor in tensors.values()) > 8 * len(body):
            raise AssertionError("the tensors take more than eight times the body")
        written = b"".join(encode(message, tensors, mutant.content_type))
        again = decode(mutant.model, bytearray(written), mutant.content_type)
        if not _are_equal((message, tensors), again):
            raise AssertionError("what was read is not what its own writing reads as")
        return "read"

    return _attempt(tally, mutant.body, work)


def _are_equal(one: tuple[Message, TensorMap], other: tuple[Message, TensorMap]) -> bool:
    (message, tensors), (message_2, tensors_2) = one, other
    if message != message_2 or tensors.keys() != tensors_2.keys():
        return False
    return all(
        (t.numel() == tensors_2[name].numel() == 0 or t.shape == tensors_2[name].shape)
        and torch.equal(
            t.double().nan_to_num(nan=7.25e77).flatten(), tensors_2[name].double().nan_to_num(nan=7.25e77).flatten()
        )
        for name, t in tensors.items()
    )


def _attempt(tally: Tally, body: bytes, work: Callable[[], str]) -> bool:
    """Do one input; whether it did what none before it did."""
    tally.inputs += 1
    began = time.perf_counter()
    try:
        with no_longer_than(MOST_CPU_S):
            outcome, place = work(), ("read",)
    except DOCUMENTED as error:
        outcome, place = type(error).__name__, (*place_of(error), error.field, error.wanted[:20])
    except Hang as error:
        tally.find(body, str(error))
        outcome, place = "hang", ("hang",)
    except Exception as error:
        tally.find(body, f"{type(error).__name__}: {error} at {place_of(error)[-1]}")
        outcome, place = "defect", place_of(error)
    tally.slowest_s = max(tally.slowest_s, time.perf_counter() - began)
    tally.outcomes[outcome] += 1
    is_new = place not in tally.behaviours
    tally.behaviours.add(place)
    return is_new and outcome != "hang"
