"""How long networks take on the device at hand, through the program that a run exports.

Other programs come and go while networks are timed, and devices change their pace: each network
runs in turn with one that all are compared with, and the median of the ratios counts.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .elastic.attention import unfused_attention
from .errors import ExportError
from .export import onnx_program, onnx_session

#: Pairs of runs that a ratio is the median of: at least so many, more within the seconds below.
PAIRS = 11
MOST_PAIRS = 101
_SECONDS = 0.5
_WARM = 3
#: Runs that the reference's own time is the median of.
_OWN = 21

Program = Callable[[], object]


class Stopwatch:
    """Times networks for one image on one device, each beside a reference [ours].

    On a CPU they run in ONNX Runtime where that is wanted and can be had, on a GPU and otherwise
    as PyTorch modules. On one CPU thread the clock is the thread's processor time: on a machine of
    one's own that is the latency, and another program that holds the core does not count.

    Attributes:
        runtime: "ONNX Runtime" or "PyTorch".
        seconds: of the reference.

    Args:
        reference: the dense network; copied.
        example: images [N, 3, H, W], the first of which is run.
        device: where to run.
        threads: CPU threads that a network may use.
        onnx: whether ONNX Runtime is wanted.
    """

    def __init__(
        self,
        reference: nn.Module,
        example: Tensor,
        device: torch.device,
        threads: int = 1,
        onnx: bool = True,
    ) -> None:
        self._image = example[:1].detach().contiguous()
        self._device, self._threads = device, threads
        self.runtime = "PyTorch"
        if onnx and device.type == "cpu":
            try:
                self._reference = self._in_onnx(reference)
                self.runtime = "ONNX Runtime"
            except ExportError:
                self._reference = self._in_torch(reference)
        else:
            self._reference = self._in_torch(reference)
        with self._running():
            for _ in range(_WARM):
                self._reference()
            self.seconds = statistics.median(self._once(self._reference) for _ in range(_OWN))

    @property
    def where(self) -> str:
        """The device, its threads and the runtime, in words."""
        if self._device.type == "cuda":
            return f"{torch.cuda.get_device_name(self._device)}, {self.runtime}"
        threads = f"{self._threads} CPU thread{'s' * (self._threads > 1)}"
        return f"{threads}, {self.runtime}"

    def ratio(self, module: nn.Module) -> float:
        """How many times as long as the reference a network takes.

        Args:
            module: any classifier of such images; copied.

        Raises:
            ExportError: it cannot be exported as the reference could be.
        """
        onnx = self.runtime != "PyTorch"
        program = self._in_onnx(module) if onnx else self._in_torch(module)
        ratios: list[float] = []
        with self._running():
            for _ in range(_WARM):
                program()
            until = time.monotonic() + _SECONDS
            while len(ratios) < PAIRS or (len(ratios) < MOST_PAIRS and time.monotonic() < until):
                taken = self._once(program)
                ratios.append(taken / self._once(self._reference))
        return statistics.median(ratios)

    def __call__(self, module: nn.Module) -> float:
        """Seconds of a network: its ratio, and the reference's own seconds. Arguments as for
        `ratio`."""
        return self.ratio(module) * self.seconds

    def _once(self, program: Program) -> float:
        clock = time.perf_counter
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._threads == 1:
            clock = time.thread_time
        began = clock()
        program()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return clock() - began

    def _in_torch(self, module: nn.Module) -> Program:
        frozen = copy.deepcopy(module).eval().to(self._device)
        image = self._image.to(self._device)
        return lambda: frozen(image)

    def _in_onnx(self, module: nn.Module) -> Program:
        session = onnx_session(onnx_program(module, self._image), self._threads)
        feed = {session.get_inputs()[0].name: self._image.cpu().numpy()}
        return lambda: session.run(None, feed)

    @contextmanager
    def _running(self) -> Iterator[None]:
        threads = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            with unfused_attention(), torch.inference_mode():  # as exports have it
                yield
        finally:
            torch.set_num_threads(threads)
