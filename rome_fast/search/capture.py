"""A step in two halves, loss and update, run operator by operator or captured in CUDA graphs and replayed."""

import math
import time
import warnings
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ..models.batches import is_out_of_memory

CAPTURE_SECONDS = 0.35
"""What a capture costs beyond the launches in it: an H200's, as fitted in `rome_fast/bench/gpus/h200.json`."""

Gradient = Callable[[], Tensor]
T = TypeVar("T")


class Recorder(Protocol):
    """Captures what works on tensors that stay where they are."""

    def warm_up(self, work: Callable[[], T]) -> T:
        """Run it as it will be captured."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Take down what it launches, without running it; what is returned launches the same again."""


class CudaRecorder:
    """CUDA graphs, all in one pool of memory: a step leaves nothing there that another one's would overwrite."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], T]) -> T:
        usual = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(usual)
        with torch.cuda.stream(self.stream):
            found = work()
        usual.wait_stream(self.stream)
        return found

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            work()
        return graph.replay


class Step:
    """`evaluate` returns the gradient on call, `move` takes it.

    It is captured once launching it has taken as long as a capture does, if it may take as long again: what is lost is
    then no more than the best choice would have cost, however many steps follow. The first time it is run is the
    warm-up that libraries need which allocate something when they are first called.
    """

    def __init__(
        self,
        evaluate: Callable[[], Gradient],
        move: Callable[[Tensor], None],
        renew: Callable[[], None],  # has everything that depends on contents of tensors made in the next evaluation
        recorder: Recorder | None,
    ) -> None:
        self._evaluate, self._move, self._renew, self.recorder = evaluate, move, renew, recorder
        self._launched = 0.0  # seconds of the host
        self._runs = 0
        self._gradient: Gradient | None = None
        self._replays: tuple[Callable[[], None], Callable[[], None]] | None = None

    def evaluate(self, left: float = math.inf) -> None:
        """With at most so many evaluations left, this one included."""
        if self.recorder is not None and self._replays is None and self._pays(left):
            self._capture(self.recorder)
        self._runs += 1
        if self._replays is not None:
            self._replays[0]()
        else:
            self._gradient = self._launch(self._evaluate)

    def _pays(self, left: float) -> bool:
        launched = self._launched
        return self._runs > 0 and launched >= CAPTURE_SECONDS and launched / self._runs * left >= CAPTURE_SECONDS

    def move(self) -> None:
        """With the gradient where it was evaluated last."""
        if self._replays is not None:
            self._replays[1]()
        elif self._gradient is not None:
            gradient, self._gradient = self._gradient, None
            self._launch(lambda: self._move(gradient()))

    def _launch(self, work: Callable[[], T]) -> T:
        if self.recorder is None:
            return work()
        start = time.perf_counter()
        found = self.recorder.warm_up(work)
        self._launched += time.perf_counter() - start
        return found

    def _capture(self, recorder: Recorder) -> None:
        def evaluate() -> None:
            self._renew()
            self._gradient = self._evaluate()

        def move() -> None:
            if self._gradient is not None:
                self._move(self._gradient())
                self._gradient = None

        try:
            self._replays = recorder.capture(evaluate), recorder.capture(move)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self.recorder = None
            reason = str(error).partition("\n")[0] or type(error).__name__
            warnings.warn(
                f"a step of the search for values could not be captured in a CUDA graph ({reason}); it is launched "
                "operator by operator, which takes longer where few edits are made at once",
                stacklevel=2,
            )
        finally:
            self._gradient = None
