"""Memory that is used again: never two users at a time."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from jaxembed.checkpoint import buffers
from jaxembed.checkpoint.buffers import Buffers, aligned_empty


class TakenAndGiven(RuleBasedStateMachine):
    """Every buffer that is out keeps the mark that its user wrote to it."""

    taken = Bundle("taken")

    def __init__(self) -> None:
        super().__init__()
        self.buffers = Buffers()
        self.out: dict[int, np.ndarray] = {}
        self.mark = 0

    @rule(target=taken, nbytes=st.one_of(st.integers(0, 300), st.integers(0, 5_000_000)))
    def take(self, nbytes: int) -> int:
        array = self.buffers.take(nbytes)
        assert (array.dtype, array.shape) == (np.uint8, (nbytes,))
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert not nbytes or array.ctypes.data % 64 == 0
        self.mark += 1
        array[:] = self.mark % 251
        self.out[self.mark] = array
        return self.mark

    @rule(mark=consumes(taken), view=st.sampled_from(["itself", "dtype", "shape", "slice", "reversed"]))
    def give(self, mark: int, view: str) -> None:
        array = self.out.pop(mark)
        whole = array[: array.nbytes // 4 * 4]
        views = {
            "itself": array,
            "dtype": whole.view(np.float32),
            "shape": whole.reshape(2, -1).view(np.float16),
            "slice": array[array.nbytes // 2 :],
            "reversed": whole.reshape(4, -1).transpose()[::-1],
        }
        self.buffers.give(views[view])

    @rule(mark=taken)
    def give_what_is_not_theirs(self, mark: int) -> None:
        self.buffers.give(self.out[mark].copy())
        self.buffers.give(np.zeros(3, np.float32))
        self.buffers.give(aligned_empty(100))

    @invariant()
    def nobody_else_wrote(self) -> None:
        for mark, array in self.out.items():
            assert (array == mark % 251).all()


TestTakenAndGiven = TakenAndGiven.TestCase
TestTakenAndGiven.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_memory_that_came_back_is_used_again() -> None:
    pool = Buffers()
    first = pool.take(5_000_000)
    pool.give(first)
    second = pool.take(4_900_000)
    assert np.may_share_memory(first, second)
    pool.give(second)
    pool.give(second)  # a second time is as if it were not
    third, fourth = pool.take(4_000_000), pool.take(4_000_000)
    assert not np.may_share_memory(third, fourth)
    pool.give(third)
    # Not for something far smaller, which would keep all of it in memory.
    assert not np.may_share_memory(third, pool.take(1000))


def test_very_large_memory_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_LARGEST_KEPT", 10_000)
    pool = Buffers()
    first = pool.take(20_000)
    pool.give(first)
    assert not np.may_share_memory(first, pool.take(20_000))


def test_two_threads() -> None:
    pool, start = Buffers(), threading.Barrier(2)

    def use(seed: int) -> None:
        random = np.random.default_rng(seed)
        held: list[tuple[int, np.ndarray]] = []
        start.wait()
        for turn in range(3000):
            value = (2 * turn + seed) % 256
            array = pool.take(int(random.integers(1, 4000)))
            array[:] = value
            held.append((value, array))
            if len(held) > 5:
                expected, array = held.pop(int(random.integers(len(held))))
                assert (array == expected).all()
                pool.give(array)

    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(use, seed) for seed in range(2)]:
            done.result()
