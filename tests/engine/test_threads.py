"""Work that is kept in the calling thread."""

from __future__ import annotations

import threading

import torch

from argrad_service.engine.kernels import pool
from argrad_service.engine.threads import in_one_thread, is_in_one_thread


def test_inside_torch_and_the_kernels_stay_in_the_calling_thread_and_others_do_as_before() -> None:
    ran: set[int] = set()

    def kernel(start: int, stop: int) -> None:
        assert start < stop
        ran.add(threading.get_ident())

    others: list[tuple[int, bool]] = []
    before = torch.get_num_threads()
    with in_one_thread():
        assert is_in_one_thread()
        assert torch.get_num_threads() == 1
        pool.over_batch(kernel, 64, work=1e6)
        other = threading.Thread(target=lambda: others.append((torch.get_num_threads(), is_in_one_thread())))
        other.start()
        other.join()
    assert ran == {threading.get_ident()}
    assert others == [(before, False)]
    assert not is_in_one_thread()
    assert torch.get_num_threads() == before
