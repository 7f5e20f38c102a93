"""The engine's thread: what waits is done in order, and nothing else runs meanwhile."""

import asyncio
import threading

import pytest

from emt.serving.engine import Engine
from emt.serving.errors import ServingError


class Item:
    def __init__(self, name):
        self.name = name
        self.is_cancelled = False


class Pairs:
    """Answers two at a time, and holds the first batch until it is let go."""

    def __init__(self):
        self.done = []
        self.begun = threading.Event()
        self.go = threading.Event()

    def together(self, waiting):
        return list(waiting[:2])

    def answer(self, batch):
        self.begun.set()
        assert self.go.wait(10)
        self.done.append([item.name for item in batch])


def make(max_waiting=8):
    pairs = Pairs()
    return pairs, Engine(pairs, max_waiting)


def hold(pairs, engine):
    """Keep the engine busy with a first batch."""
    engine.submit([Item("first")])
    assert pairs.begun.wait(10)


def test_functions_and_batches_run_in_the_order_of_their_arrival():
    pairs, engine = make()

    async def main():
        hold(pairs, engine)
        engine.submit([Item("x"), Item("y")])
        between = asyncio.ensure_future(engine.run(lambda: pairs.done.append("function")))
        await asyncio.sleep(0)
        engine.submit([Item("z")])
        assert engine.num_waiting == 3
        pairs.go.set()
        await between
        return await engine.run(lambda number: number + 1, 4)

    assert asyncio.run(main()) == 5
    engine.stop()
    assert pairs.done == [["first"], ["x", "y"], "function", ["z"]]


def test_a_function_runs_in_the_thread_of_the_batches_and_raises_to_its_caller():
    _, engine = make()

    def fail():
        raise ValueError(threading.current_thread().name)

    with pytest.raises(ValueError, match="emt-engine"):
        asyncio.run(engine.run(fail))
    assert asyncio.run(engine.run(lambda: 3)) == 3  # it goes on
    engine.stop()


def test_a_batch_that_raises_does_not_end_the_engine(caplog):
    pairs, engine = make()
    pairs.answer = None
    engine.submit([Item("x")])
    assert asyncio.run(engine.run(lambda: 3)) == 3
    assert "the engine's work failed" in caplog.text
    engine.stop()


def test_the_queue_is_bounded_and_what_is_cancelled_makes_room():
    pairs, engine = make(max_waiting=2)
    hold(pairs, engine)
    waiting = [Item("x"), Item("y")]
    engine.submit(waiting)
    assert not engine.is_ready
    with pytest.raises(ServingError, match="2 are waiting") as refused:
        engine.submit([Item("z")])
    assert refused.value.status == 503
    assert int(refused.value.headers["Retry-After"]) >= 1
    waiting[0].is_cancelled = True
    engine.submit([Item("z")])
    pairs.go.set()
    engine.stop()
    assert pairs.done == [["first"], ["y", "z"]]


def test_all_prompts_of_a_request_wait_or_none():
    pairs, engine = make(max_waiting=2)
    hold(pairs, engine)
    with pytest.raises(ServingError):
        engine.submit([Item("x"), Item("y"), Item("z")])
    assert engine.num_waiting == 0
    pairs.go.set()
    engine.stop()


def test_functions_have_a_bound_of_their_own():
    pairs, engine = make(max_waiting=1)

    async def main():
        hold(pairs, engine)
        engine.submit([Item("x")])
        task = asyncio.ensure_future(engine.run(lambda: 1))
        await asyncio.sleep(0)
        with pytest.raises(ServingError, match="1 are waiting"):
            await engine.run(lambda: 2)
        pairs.go.set()
        return await task

    assert asyncio.run(main()) == 1
    engine.stop()


def test_a_function_whose_caller_is_cancelled_is_not_begun():
    pairs, engine = make()
    ran = []

    async def main():
        hold(pairs, engine)
        task = asyncio.ensure_future(engine.run(ran.append, 1))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        pairs.go.set()

    asyncio.run(main())
    engine.stop()
    assert ran == []


def test_stop_finishes_what_waits_and_takes_nothing_more():
    pairs, engine = make()
    hold(pairs, engine)
    engine.submit([Item("x")])
    stopping = threading.Thread(target=engine.stop)
    stopping.start()
    while engine.is_ready:
        pass
    with pytest.raises(ServingError, match="shutting down"):
        engine.submit([Item("y")])
    pairs.go.set()
    stopping.join(10)
    assert pairs.done == [["first"], ["x"]]
