"""CPU tensors with values that call themselves tensors of a GPU, and what their operators would cost there.

`tests.gpu.fake_cuda` switches them on. A `Cuda` is a wrapper subclass: C++ knows it as a CPU tensor (else
autograd looks for a CUDA thread), Python reads the device cuda:0 from it. Every operator runs on the CPU
tensors inside, so values, masks, routing and sampling are real; `run` notes what it would cost on a GPU.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen

from tests.gpu.fake_kernels import varlen_backward, varlen_forward

aten: Any = torch.ops.aten
GPU = torch.device("cuda", 0)
ROOT = Path(__file__).parents[2]
OURS = [f"{ROOT}/{part}/" for part in ("model", "rollout", "rewards", "pipeline", "distill", "tests")]
HARNESS = [f"{ROOT}/tests/gpu/{name}.py" for name in ("fake_tensor", "fake_cuda", "fake_kernels")]

SYNCS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.unique_consecutive.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.bincount.default,
    aten.multinomial.default,
    aten.repeat_interleave.Tensor,
}
"""Operators after which the host waits for a value or a size."""
INDEXED = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
}
MAY_MIX = {aten.copy_.default, aten._to_copy.default, aten.set_.source_Tensor}
# The lazy conjugate and the lazy negative are bits that a wrapper does not have.
INSTEAD: dict[Any, Callable[..., Any]] = {
    aten._conj.default: aten.conj_physical.default,
    aten._neg_view.default: aten.neg.default,
    torch.ops.torch_attn._varlen_attn.default: varlen_forward,
    torch.ops.torch_attn._varlen_attn_backward.default: varlen_backward,
}
assert varlen  # its import registers the operators


class Found:
    """What a piece of code did on the GPU. A count is by line of our code and what happened there."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}  # bytes of a storage that is alive, by address
        self.owners: Counter[int] = Counter()
        self.live = 0
        self.capturing = self.refusing = False
        self.clear()

    def clear(self) -> None:
        """Count from here on."""
        self.mixed, self.captured, self.syncs, self.uploads = (Counter[tuple[str, str]]() for _ in range(4))
        self.peak, self.largest = self.live, (0, "")

    def sync(self, what: str) -> None:
        """The host waits for the GPU: while a graph is captured a real GPU refuses."""
        if self.refusing:
            raise RuntimeError(f"called a synchronizing CUDA operation: {what} at {line()}")
        (self.captured if self.capturing else self.syncs)[line(), what] += 1

    def mix(self, what: str) -> None:
        """An operator with tensors of both devices."""
        self.mixed[line(), what] += 1

    def upload(self, what: str) -> None:
        """Pageable memory goes to the GPU in the background."""
        (self.captured if self.capturing else self.uploads)[line(), what] += 1

    def hold(self, elem: Tensor, owner: Tensor) -> None:
        """`owner` keeps the memory of `elem`, a tensor of the GPU."""
        storage = elem.untyped_storage()
        at, size = storage.data_ptr(), storage.nbytes()
        if not size:
            return
        if not self.owners[at]:
            self.sizes[at] = size
            self.live += size
            self.peak = max(self.peak, self.live)
            if size > self.largest[0]:
                self.largest = size, line()
        self.owners[at] += 1
        weakref.finalize(owner, self.release, at).atexit = False

    def release(self, at: int) -> None:
        """One owner fewer."""
        self.owners[at] -= 1
        if not self.owners[at]:
            del self.owners[at]
            self.live -= self.sizes.pop(at)

    def report(self) -> str:
        """All counts, a line each."""
        size, where = self.largest
        lines = [f"peak {self.peak / 2**20:.1f} MiB, largest tensor {size / 2**20:.2f} MiB at {where}"]
        for kind in ("mixed", "captured", "syncs", "uploads"):
            rows: Counter[tuple[str, str]] = getattr(self, kind)
            lines += [f"{kind}: {n:5d}  {where:40s} {what}" for (where, what), n in rows.most_common()]
        return "\n".join(lines)


FOUND = Found()
"""Of the running `fake_cuda`; there is one at a time."""
PINNED: set[int] = set()
"""Addresses of pinned memory."""
GENERATORS: set[int] = set()
"""Addresses of the GPU's random generators."""
RECORDED: list[list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]]] = []
"""Operators of the graphs that are being captured."""
MOVING: list[bool] = []
"""Whether Python has asked for another device: C++ asks for the CPU whenever it casts."""

CALLS: list[bool] = []
"""Whether the running call of torch has a tensor of the GPU: what C++ then makes on the CPU belongs there."""


def line() -> str:
    """The innermost line of our code that runs now; of a backward there may be none."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if any(map(name.startswith, OURS)) and name not in HARNESS:
            return f"{name[len(str(ROOT)) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "backward"


class Cuda(torch.Tensor):
    """`elem`, a CPU tensor, as a tensor of the GPU."""

    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor) -> Cuda:
        made: Cuda = torch.Tensor._make_wrapper_subclass(
            cls, elem.shape, strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype
        )
        made.elem = elem
        FOUND.hold(elem, made)
        return made

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.elem.untyped_storage()

    def record_stream(self, stream: object) -> None:
        pass

    def __repr__(self) -> str:
        return f"Cuda({self.elem!r})"

    def tolist(self) -> Any:
        FOUND.sync("tolist")
        return self.elem.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copy: Tensor = Cuda(self.elem.clone(memory_format=torch.preserve_format))
            if isinstance(self, torch.nn.Parameter):
                copy = torch.nn.Parameter(copy, self.requires_grad)
            memo[id(self)] = copy
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        FOUND.sync("saved")
        return self.elem.detach().__reduce_ex__(protocol)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, Cuda):
            raise RuntimeError("a CPU tensor becomes the .data of a GPU tensor")
        self.elem = value.elem
        FOUND.hold(self.elem, self)
        with torch._C.DisableTorchFunctionSubclass():
            torch.Tensor.data.__set__(self, value)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Operator `func` on the values of its arguments; its result lies where a GPU build would have it."""
    found = [x for x in leaves((args, kwargs)) if isinstance(x, Tensor)]
    gpu = [x for x in found if isinstance(x, Cuda)]
    on_gpu = _noted(func, args, kwargs, gpu, [x for x in found if not isinstance(x, Cuda)])
    plain: dict[str, Any] = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
    if kwargs.get("device") is not None:
        plain["device"] = torch.device("cpu")
    if func is aten._to_copy.default:
        plain.pop("non_blocking", None)
    out = INSTEAD.get(func, func)(*mapped(_value, args), **mapped(_value, plain))
    if kwargs.get("pin_memory"):
        pin(out)
    if not on_gpu:
        return out
    owner = {id(x.elem): x for x in gpu}

    def wrapped(x: Any) -> Any:
        return x if not isinstance(x, Tensor) else owner[id(x)] if id(x) in owner else Cuda(x)

    out = mapped(wrapped, out)
    for graph in RECORDED:
        graph.append((func, args, kwargs, out))
    return out


def leaves(x: Any) -> Iterator[Any]:
    """What lists, tuples and dictionaries hold. torch's own trees take most of a test's time."""
    if isinstance(x, list | tuple | dict):
        for part in x.values() if isinstance(x, dict) else x:
            yield from leaves(part)
    else:
        yield x


def mapped(function: Callable[[Any], Any], x: Any) -> Any:
    """`x` with each leaf replaced."""
    if isinstance(x, dict):
        return {key: mapped(function, part) for key, part in x.items()}
    if isinstance(x, list | tuple):
        return (list if isinstance(x, list) else tuple)(mapped(function, part) for part in x)
    return function(x)


def _value(x: Any) -> Any:
    return x.elem if isinstance(x, Cuda) else x


def _noted(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], gpu: list[Cuda], cpu: list[Tensor]
) -> bool:
    """Whether the result lies on the GPU; what the operator costs there is noted."""
    device = kwargs.get("device")
    asked = device is not None and (torch.device(device).type == "cuda" or CALLS[-1:] == [True])
    generator = kwargs.get("generator")
    if generator is not None and (generator._cdata in GENERATORS) != (asked or bool(gpu)):
        FOUND.mix(f"{func} with a generator of the other device")
    if func is aten._to_copy.default:
        if isinstance(args[0], Cuda):
            stays = asked or device is None or not MOVING
            if not stays and not kwargs.get("non_blocking"):
                FOUND.sync("copy to the CPU")
            return stays
        if asked:
            _copied(args[0], bool(kwargs.get("non_blocking")))
        return asked
    if func is aten.copy_.default and gpu:
        if not isinstance(args[0], Cuda):
            FOUND.sync("copy_ to the CPU")
        elif cpu and args[1].dim():
            _copied(args[1], bool(args[2] if len(args) > 2 else kwargs.get("non_blocking")))
        return isinstance(args[0], Cuda)
    if not gpu:
        return asked
    indices = list(args[1]) if func in INDEXED else []
    others = [x for x in cpu if x.dim() and not any(x is i for i in indices)]
    if others and func not in MAY_MIX:
        FOUND.mix(f"{func} with a CPU tensor {tuple(others[0].shape)}")
    if func in SYNCS:
        FOUND.sync(str(func))
    if func is aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
        FOUND.sync("grouped_mm that is not bf16: a loop over experts on the host")
    for index in indices:
        if index is not None and index.dtype == torch.bool and not _fills(func, args):
            FOUND.sync("boolean mask")
        if index is not None and not isinstance(index, Cuda) and index.dim():
            FOUND.sync("index on the CPU")
    return True


def _fills(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether a mask assigns a single number, which is a kernel that the host does not wait for."""
    return func is not aten.index.Tensor and len(args[1]) == 1 and args[2].numel() == 1


def _copied(x: Tensor, non_blocking: bool) -> None:
    """CPU tensor `x` goes to the GPU."""
    if not non_blocking:
        FOUND.sync("copy to the GPU that the host waits for")
    elif x.untyped_storage().data_ptr() not in PINNED:
        FOUND.upload("copy to the GPU from pageable memory")


def pin(x: Tensor) -> Tensor:
    """Mark the memory of `x` as pinned while `x` is alive."""
    at = x.untyped_storage().data_ptr()
    PINNED.add(at)
    weakref.finalize(x, PINNED.discard, at).atexit = False
    return x


@contextmanager
def moving() -> Iterator[None]:
    """Python asks for another device or dtype in here."""
    MOVING.append(True)
    try:
        yield
    finally:
        MOVING.pop()
