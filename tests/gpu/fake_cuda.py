"""Run our code "on CUDA" without a GPU.

    with fake_cuda() as found:
        stage.run(config, run_dir)          # device = "cuda"
    assert not found.mixed and not found.captured

Tensors on "cuda" are `tests.gpu.fake_tensor.Cuda`. Code that asks for the device takes its GPU branch, with
real values, so its numbers can be compared with the CPU branch's. `found` counts, by line of our code:

    mixed      operators with tensors, or a generator, of both devices: a crash on a real GPU
    captured   waits of the host while a graph is captured: a crash on a real GPU
    syncs      waits of the host: item, tolist, nonzero, boolean masks, copies that are not `non_blocking`,
               indices on the CPU, `grouped_mm` in any type but bf16, ...
    uploads    `non_blocking` copies of pageable memory to the GPU
    peak, largest   bytes of live tensors of the GPU, at most; the largest tensor and the line that made it

Limits. Modes belong to a thread: what another one makes is not covered (`--staleness`). Not covered: Triton
(`fake_kernels` has log-probabilities in its stead), `scaled_mm`, streams, memory between processes, NCCL.
torch's own FakeTensorMode has no values, without which the first `nonzero` or `tolist` ends a run, and on a
CPU build refuses `.to("cuda")`.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from model.kernels import fused
from tests.gpu.fake_kernels import FusedNorm, log_softmax_rows, logits_gradient
from tests.gpu.fake_tensor import (
    CALLS,
    FOUND,
    GENERATORS,
    GPU,
    RECORDED,
    Cuda,
    Found,
    aten,
    leaves,
    mapped,
    moving,
    pin,
    run,
)

NAME = "NVIDIA H100 80GB HBM3"
MEMORY = 85_520_809_984
"""Bytes of that GPU."""


class Dispatch(TorchDispatchMode):
    """What makes tensors on the GPU from none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Functions(TorchFunctionMode):
    """What asks C++ about the device before any operator runs, which a CPU build cannot answer."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if args and isinstance(args[0], Tensor):
            if name in ("to", "cuda", "cpu"):
                return _moved(name, *args, **kwargs)
            if name == "pin_memory":
                return pin(args[0].clone())
            if name == "rms_norm" and isinstance(args[0], Cuda):
                return FusedNorm.apply(args[0], kwargs["weight"], kwargs["eps"])
        if name in ("tensor", "as_tensor") and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            return _moved("cuda", func(*args, **{**kwargs, "device": None}))
        inside = any(isinstance(x, Cuda) for x in leaves(args))
        CALLS.append(inside and kwargs.get("device") is None)
        try:
            return func(*args, **kwargs)
        finally:
            CALLS.pop()


def _moved(name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to`, `.cuda` or `.cpu`."""
    device: Any = kwargs.get("device") or {"cuda": "cuda", "cpu": "cpu"}.get(name)
    dtype = kwargs.get("dtype")
    flags = [arg for arg in args if isinstance(arg, bool)]
    for arg in args:
        if isinstance(arg, Tensor):
            device, dtype = arg.device, arg.dtype
        elif isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, str | torch.device | int) and not isinstance(arg, bool) and name == "to":
            device = arg
    device = x.device if device is None else torch.device(device)
    dtype = dtype or x.dtype
    copy = kwargs.get("copy", False) or flags[1:] == [True]
    if device.type == x.device.type and dtype == x.dtype and not copy:
        return x
    blocking = not (kwargs.get("non_blocking") or flags[:1] == [True])
    with moving():
        out: Tensor = aten._to_copy.default(x, dtype=dtype, device=device, non_blocking=not blocking)
    return out


# ---- torch.cuda


class Generator(torch.Generator):
    """Of the CPU; one for the GPU is remembered as such."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls, "cpu")
        if torch.device(device).type == "cuda":
            GENERATORS.add(made._cdata)
            weakref.finalize(made, GENERATORS.discard, made._cdata).atexit = False
        return made


class Stream:
    """All work is done at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, other: object) -> None:
        pass

    wait_event = record_event = wait_stream

    def synchronize(self) -> None:
        FOUND.sync("synchronize")

    def is_capturing(self) -> bool:
        return FOUND.capturing


class Event:
    """A time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.time = 0.0

    def record(self, stream: object = None) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        FOUND.sync("synchronize")

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.time - self.time)


class Graph:
    """Operators with their arguments and results; `replay` runs them again and overwrites the results."""

    def __init__(self) -> None:
        self.operators: list[Any] = []

    def replay(self) -> None:
        for func, args, kwargs, out in self.operators:
            for old, new in zip(leaves(out), leaves(run(func, args, kwargs)), strict=True):
                if isinstance(old, Cuda) and old.data_ptr() != new.data_ptr():  # neither a view nor in place
                    old.elem.copy_(new.elem)


@contextlib.contextmanager
def capture(graph: Graph, pool: object = None, **options: Any) -> Iterator[None]:
    """`torch.cuda.graph`."""
    RECORDED.append(graph.operators)
    FOUND.capturing = True
    try:
        yield
    finally:
        FOUND.capturing = False
        RECORDED.pop()


def _refuse(mode: int | str) -> None:
    FOUND.refusing = mode in (2, "error")


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _always(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


PROPERTIES = SimpleNamespace(
    name=NAME, total_memory=MEMORY, major=9, minor=0, multi_processor_count=132, warp_size=32, uuid="0"
)
CUDA: dict[str, Any] = {
    **dict.fromkeys(("is_available", "is_initialized", "is_bf16_supported"), _always(True)),
    **dict.fromkeys(("_lazy_init", "set_device", "empty_cache", "ipc_collect", "manual_seed"), _nothing),
    **dict.fromkeys(("manual_seed_all", "set_rng_state", "set_rng_state_all", "init"), _nothing),
    **dict.fromkeys(("reset_peak_memory_stats", "graph_pool_handle"), _nothing),
    **dict.fromkeys(("memory_allocated", "memory_reserved"), lambda *_: FOUND.live),
    **dict.fromkeys(("max_memory_allocated", "max_memory_reserved"), lambda *_: FOUND.peak),
    **dict.fromkeys(("device", "stream", "device_of"), lambda *_: contextlib.nullcontext()),
    "device_count": _always(1),
    "current_device": _always(0),
    "current_stream": lambda *_: Stream(),
    "get_device_capability": _always((9, 0)),
    "get_device_name": _always(NAME),
    "get_device_properties": _always(PROPERTIES),
    "get_rng_state": lambda *_: torch.get_rng_state(),
    "get_rng_state_all": lambda *_: [torch.get_rng_state()],
    "mem_get_info": lambda *_: (MEMORY - FOUND.live, MEMORY),
    "synchronize": lambda *_: FOUND.sync("synchronize"),
    "set_sync_debug_mode": _refuse,
    "Stream": Stream,
    "Event": Event,
    "CUDAGraph": Graph,
    "graph": capture,
}

ENGINE = torch.autograd._engine_run_backward
LOAD, APPLY, GROUPS = torch.load, nn.Module._apply, torch._C._group_tensors_by_device_and_dtype


def _load(file: Any, map_location: Any = None, **kwargs: Any) -> Any:
    """`torch.load`. What was saved on a GPU opens without `map_location` on a GPU alone."""
    if map_location is None:
        FOUND.mix("torch.load without map_location")
    loaded = LOAD(file, map_location="cpu", **kwargs)
    if torch.device(map_location or "cpu").type == "cpu":
        return loaded
    return mapped(lambda x: Cuda(x) if isinstance(x, Tensor) else x, loaded)


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """A module moves by new parameters, since a CPU tensor cannot become a `Cuda`; ties are kept."""
    before = {id(p) for p in self.parameters()} if recurse else set()
    homes = [(m, n, p) for m in self.modules() for n, p in m._parameters.items() if p is not None]
    out = APPLY(self, fn, recurse)
    first: dict[int, Any] = {}
    for module, name, old in homes:
        if id(old) in before:
            module._parameters[name] = first.setdefault(id(old), module._parameters[name])
    return out


def _run_backward(*args: Any, **kwargs: Any) -> Any:
    """The engine of autograd. The call that leads here switches the mode off; recomputed layers need it."""
    with contextlib.nullcontext() if torch._C._len_torch_function_stack() else Functions():
        return ENGINE(*args, **kwargs)


def _groups(tensors: Any, with_indices: bool) -> Any:
    """Lists of tensors by device and dtype; C++ reads another device."""
    groups = {}
    for (device, dtype), found in GROUPS(tensors, with_indices).items():
        first = next(x for x in found[0][0] if x is not None)
        groups[GPU if isinstance(first, Cuda) else device, dtype] = found
    return groups


@contextlib.contextmanager
def fake_cuda() -> Iterator[Found]:
    """A GPU of 80 GB, and what is found on it."""
    FOUND.clear()
    lifted = torch._C._only_lift_cpu_tensors()
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        for name, value in CUDA.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        patches: list[tuple[Any, str, Any]] = [
            *((torch, "load", _load), (torch, "Generator", Generator), (nn.Module, "_apply", _apply)),
            *((torch.version, "cuda", "13.0"), (torch.accelerator, "is_available", _always(True))),
            (torch.accelerator, "current_accelerator", _always(GPU)),
            (torch.autograd, "_engine_run_backward", _run_backward),
            (torch._C, "_group_tensors_by_device_and_dtype", _groups),
            (torch.accelerator, "current_stream", lambda *_: Stream()),
            *((fused, "log_softmax_rows", log_softmax_rows), (fused, "logits_gradient", logits_gradient)),
        ]
        for of, name, value in patches:
            stack.enter_context(mock.patch.object(of, name, value))
        # transformers reads files in threads, which modes do not reach.
        stack.enter_context(mock.patch.dict("os.environ", {"HF_DEACTIVATE_ASYNC_LOAD": "1"}))
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        stack.callback(_refuse, "default")
        torch._C._set_only_lift_cpu_tensors(True)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        with Dispatch(), Functions():
            yield FOUND
