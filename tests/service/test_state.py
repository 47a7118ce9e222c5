from __future__ import annotations

import base64
import threading

import pytest

from argrad_service.state import TOKEN_LENGTH, MemoryStateStore, StateGone, TokenSigner


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_store(budget_bytes: int = 100, ttl_s: float = 60.0, secret: str = "one") -> tuple[MemoryStateStore, Clock]:
    clock = Clock()
    return MemoryStateStore(budget_bytes=budget_bytes, ttl_s=ttl_s, signer=TokenSigner(secret), clock=clock), clock


def test_a_state_survives_repeated_reads_and_ends_with_delete():
    store, _ = make_store()
    token = store.put("value", nbytes=10, owner="me")
    assert [store.get(token, owner="me") for _ in range(3)] == ["value"] * 3
    store.delete(token, owner="me")
    with pytest.raises(StateGone, match="send problem and solution instead"):
        store.get(token, owner="me")
    with pytest.raises(StateGone):
        store.delete(token, owner="me")
    assert store.counts().held_bytes == 0


def test_tokens_are_short_safe_in_urls_and_never_alike():
    signer = TokenSigner("one")
    tokens = {signer.new("me") for _ in range(100)}
    assert len(tokens) == 100
    assert all(len(token) == TOKEN_LENGTH and token.replace("-", "a").replace("_", "a").isalnum() for token in tokens)


def test_the_least_recently_used_goes_first():
    store, _ = make_store(budget_bytes=100)
    first, second = store.put(1, nbytes=40, owner="me"), store.put(2, nbytes=40, owner="me")
    store.get(first, owner="me")
    third = store.put(3, nbytes=40, owner="me")
    assert (store.get(first, owner="me"), store.get(third, owner="me")) == (1, 3)
    with pytest.raises(StateGone):
        store.get(second, owner="me")
    assert (store.counts().evictions, store.counts().held_bytes) == (1, 80)


def test_what_is_over_the_budget_is_not_kept_and_evicts_nobody():
    store, _ = make_store(budget_bytes=100)
    token = store.put(1, nbytes=100, owner="me")
    assert store.put(2, nbytes=101, owner="me") is None
    assert store.get(token, owner="me") == 1
    assert store.counts().refusals == 1


def test_a_budget_of_zero_keeps_nothing():
    store, _ = make_store(budget_bytes=0)
    assert store.put(1, nbytes=1, owner="me") is None


def test_states_expire_a_time_after_their_last_use():
    store, clock = make_store(ttl_s=60)
    used, unused = store.put(1, nbytes=10, owner="me"), store.put(2, nbytes=10, owner="me")
    clock.now += 59.0
    store.get(used, owner="me")
    clock.now += 1.0
    with pytest.raises(StateGone):
        store.get(unused, owner="me")
    assert store.get(used, owner="me") == 1
    store.sweep()
    assert (store.counts().entries, store.counts().expirations, store.counts().held_bytes) == (1, 1, 10)
    clock.now += 60.0
    store.sweep()
    assert store.counts().entries == 0


def test_a_token_of_another_owner_is_gone_for_everyone_else():
    store, _ = make_store()
    token = store.put(1, nbytes=1, owner="me")
    for action in (store.get, store.delete):
        with pytest.raises(StateGone):
            action(token, owner="you")
    assert store.get(token, owner="me") == 1


def test_a_token_of_another_server_is_gone():
    store, _ = make_store(secret="one")
    other, _ = make_store(secret="two")
    with pytest.raises(StateGone):
        store.get(other.put(1, nbytes=1, owner="me"), owner="me")


def test_every_single_forged_character_is_noticed():
    store, _ = make_store()
    token = store.put(1, nbytes=1, owner="me")
    for i in range(TOKEN_LENGTH):
        forged = token[:i] + ("A" if token[i] != "A" else "B") + token[i + 1 :]
        with pytest.raises(StateGone):
            store.get(forged, owner="me")
    assert store.counts().misses == TOKEN_LENGTH


@pytest.mark.parametrize(
    "token",
    ["", "x", "A" * 39, "A" * 41, "A" * 39 + "\n", "A" * 39 + "=", "é" * 40, "A" * 10_000, "A" * 39 + " "],
    ids=repr,
)
def test_what_is_no_token_is_gone(token: str):
    store, _ = make_store()
    with pytest.raises(StateGone):
        store.get(token, owner="me")


def test_a_signed_token_that_was_never_given_out_is_gone():
    store, _ = make_store(secret="one")
    with pytest.raises(StateGone):
        store.get(TokenSigner("one").new("me"), owner="me")


def test_the_signature_covers_the_owner():
    signer = TokenSigner("one")
    token = signer.new("me")
    signer.check(token, "me")
    with pytest.raises(StateGone):
        signer.check(token, "you")
    assert len(base64.urlsafe_b64decode(token)) == 30


def test_threads_may_share_a_store():
    store, _ = make_store(budget_bytes=50)
    failures: list[Exception] = []

    def work() -> None:
        try:
            for _ in range(200):
                token = store.put("x", nbytes=10, owner="me")
                try:
                    store.get(token, owner="me")
                    store.delete(token, owner="me")
                except StateGone:
                    pass  # another thread's put evicted it
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    counts = store.counts()
    assert counts.held_bytes == 10 * counts.entries <= 50


def test_clear_forgets_everything():
    store, _ = make_store()
    token = store.put(1, nbytes=1, owner="me")
    store.clear()
    with pytest.raises(StateGone):
        store.get(token, owner="me")
    assert store.counts().held_bytes == 0
