"""`map` on several CPUs: in threads, or in processes of our own for work that holds Python's lock.

The processes are plain subprocesses, since those of multiprocessing would run the caller's script once more.
"""

import itertools
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")

FIRST_HERE = 8  # items that are worked on before any process is started, which takes a second
SERVE = "import sys; sys.path[:] = {path!r}; from raygr.prepare.parallel_map import serve; serve()"


class Cpus:
    """Some CPUs of this machine; a context that ends the processes which it started."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._processes: list[subprocess.Popen[bytes]] = []
        self._free: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()

    def __reduce__(self) -> tuple[type["Cpus"], tuple[int]]:
        return Cpus, (self._count,)  # for tasks on Ray

    def in_threads(self, function: Callable[[Given], Made], items: Iterable[Given]) -> Iterator[Made]:
        """`map` in threads; results keep their order, and few items wait."""
        if self._count == 1:
            for item in items:
                yield function(item)  # no `yield from map`: Ray sends values into the generators of its tasks
            return
        with ThreadPoolExecutor(self._count) as pool:
            waiting: deque[Future[Made]] = deque()
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > self._count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def in_processes(self, function: Callable[[Given], Made], items: Iterable[Given]) -> Iterator[Made]:
        """The same in processes; `function`, items and results are pickled. Few items start no process."""
        rest = iter(items)
        if not self._processes:
            for item in rest if self._count == 1 else itertools.islice(rest, FIRST_HERE):
                yield function(item)
        following = next(rest, None)
        if following is not None:
            self._start()
            yield from self.in_threads(lambda item: self._ask(function, item), itertools.chain([following], rest))

    def _start(self) -> None:
        while len(self._processes) < self._count:
            command = [sys.executable, "-c", SERVE.format(path=sys.path)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._processes.append(process)
            self._free.put(process)

    def _ask(self, function: Callable[[Given], Made], item: Given) -> Made:
        """What a free process makes of an item; raises what it raises."""
        process = self._free.get()
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump((function, item), process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            made, error = pickle.load(process.stdout)
        finally:
            self._free.put(process)
        if error is not None:
            raise error
        return made

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            with process:  # closes its pipes and waits
                pass


def serve() -> None:
    """Answers `Cpus` until standard input ends."""
    given, made = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    while True:
        try:
            function, item = pickle.load(given)
        except EOFError:
            return
        answer: tuple[Any, Exception | None]
        try:
            answer = function(item), None
        except Exception as error:
            answer = None, error
        pickle.dump(answer, made, protocol=pickle.HIGHEST_PROTOCOL)
        made.flush()
