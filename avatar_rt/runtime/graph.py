"""A callable as a replayed graph: captured once per set of shapes over fixed buffers, then one launch a call.

Knows no model: it takes any function of tensors (and of tuples and dictionaries of them) that works on the device
alone. The CPU's counterpart is ``avatar_rt.ops.program``. Capture on a GPU is written for and not yet run on one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from avatar_rt.errors import UnsupportedError

MOST_GRAPHS = 8  # kept at a time; the one longest unused goes first
WARM_UP = 3  # calls before capture: libraries choose and allocate in their first ones

Replay = Callable[[], None]


@dataclass
class _Captured:
    inputs: list[Tensor]  # what a call copies its tensors into
    kept: list[Tensor]  # what the graph reads where it lies
    output: Any
    replay: Replay


def capture_cuda(call: Callable[[], Any]) -> tuple[Any, Replay]:
    """Captures a call on the current device: its output, whose memory the graph owns, and its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    return output, graph.replay


class Graphed:
    """A callable with the signature of ``call``; equal shapes replay one graph. Thread-safe: calls take turns.

    Args:
        call: Any function of tensors on one device.
        fixed: Names of keyword arguments that are read where they lie: the same tensors in every call, not copied.
        capture: How a call becomes a replay; ``capture_cuda`` unless a test brings its own.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        fixed: Sequence[str] = (),
        capture: Callable[[Callable[[], Any]], tuple[Any, Replay]] = capture_cuda,
    ) -> None:
        if capture is capture_cuda and not torch.cuda.is_available():
            raise UnsupportedError(f"graph: torch {torch.__version__} sees no CUDA GPU here")
        self.call, self.fixed, self.capture = call, tuple(fixed), capture
        self._graphs: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        if name == "call":  # not set yet
            raise AttributeError(name)
        return getattr(self.call, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kept = {name: kwargs[name] for name in self.fixed if name in kwargs}
        given = (args, {name: value for name, value in kwargs.items() if name not in kept})
        leaves, spec = pytree.tree_flatten(given)
        still, still_spec = pytree.tree_flatten(kept)
        moving = [x for x in leaves if isinstance(x, Tensor)]
        staying = [x for x in still if isinstance(x, Tensor)]
        key = (
            spec, still_spec,
            tuple((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves),
            tuple((x.data_ptr(), x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in still),
        )  # fmt: skip
        with self._lock:
            captured = self._graphs.get(key)
            if captured is None:
                inputs = [x.clone() for x in moving]
                own = iter(inputs)
                again = [next(own) if isinstance(x, Tensor) else x for x in leaves]
                again_args, again_kwargs = pytree.tree_unflatten(again, spec)
                output, replay = self.capture(lambda: self.call(*again_args, **again_kwargs, **kept))
                captured = self._graphs[key] = _Captured(inputs, staying, output, replay)
                while len(self._graphs) > MOST_GRAPHS:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
            for target, source in zip(captured.inputs, moving, strict=True):
                target.copy_(source)
            captured.replay()
            return pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, captured.output)
