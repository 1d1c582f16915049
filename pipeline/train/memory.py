"""Whether a stage fits the memory of its place, found before it reads data and opens engines.

The estimate is a lower bound from the model's config: kernels, fragments and a chunk of logits come on top.
So nothing that fits is refused.

Units   GB = 10^9 bytes
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoConfig

from model.config import ModelConfig
from model.sizes.flops import shape
from model.sizes.memory import training_bytes
from pipeline.errors import UserError
from pipeline.settings.common import OptimSettings
from pipeline.train.place import Place
from pipeline.train.policy import loading
from rollout.checkpoint import NATIVE_TYPES, read_config
from rollout.settings import RolloutSettings
from rollout.weights import DTYPES

LEAST_TOKENS = 512
"""Of a micro-batch that is worth proposing."""


@dataclass(frozen=True, slots=True)
class Need:
    """What a stage holds in one memory."""

    config: Any
    optim: OptimSettings
    tokens: int
    """Of the largest micro-batch."""
    reference: bool = False
    vllm: int = 0
    """Bytes of the GPU that vLLM takes."""
    sleeps: bool = False
    """vLLM frees them while the trainer works. While vLLM works there are no gradients and activations."""
    teacher: Any = None
    """Config of another frozen model beside it."""
    device: str = "cuda"
    """Its type decides what layers keep for the backward."""
    queued: int = 0
    """Frozen copies of the policy: one for each step whose rounds wait to be generated."""
    ahead: int = 0
    """Rounds that are generated ahead."""
    engine: int = 0
    """Bytes a number of the engine's own copy; 0 = it has none."""

    def beside(self, rollout: RolloutSettings, gpu: int, depth: int) -> Self:
        """With the engine of `rollout` in the same memory, a GPU's of `gpu` bytes (0: a CPU's), which
        generates up to `depth` rounds ahead (`rollout.collect`)."""
        if rollout.workers:
            return self
        vllm, other = rollout.engine == "vllm", rollout.dtype not in ("auto", self.optim.precision)
        need = replace(self, ahead=depth, queued=depth if depth > 1 or not (vllm or other) else 0)
        if not vllm:
            return replace(need, engine=DTYPES[rollout.dtype].itemsize if other else 0)
        sleeps = rollout.vllm.sleep != "off" and not depth  # with a queue it always works
        return replace(need, vllm=int(rollout.vllm.gpu_memory * gpu), sleeps=sleeps)

    def parts(self) -> dict[str, int]:
        """Bytes by what they are for, those that are there at once; raises as `training_bytes`."""
        parts = training_bytes(
            self.config,
            tokens=self.tokens,
            precision=self.optim.precision,
            moments=self.optim.moments,
            reference=self.reference,
            recompute=self.optim.recompute,
            device=self.device,
        )
        own = 4 if self.optim.precision == "float32" else 2
        parts["queue"] = self.queued * parts["weights"]
        parts["engine"] = self.engine * parts["weights"] // own
        parts["teacher"] = own * shape(self.teacher).parameters.total if self.teacher else 0
        resting = parts["gradients"] + parts["activations"] if self.sleeps else 0
        return parts | {"vLLM": max(0, self.vllm - resting)}

    def total(self) -> int:
        """All of them."""
        return sum(self.parts().values())

    def lighter(self, free: int, gpu: int) -> Iterator[tuple[str, "Need"]]:
        """Settings that take less memory, and what is needed then; `free` of the `gpu` bytes are free."""
        if self.vllm and not self.sleeps and not self.ahead:
            yield "--rollout.vllm.sleep on", replace(self, sleeps=True)
        if self.queued:
            yield "--staleness 0", replace(self, queued=0)
        if not self.optim.recompute:
            yield "--optim.recompute", replace(self, optim=replace(self.optim, recompute=True))
        if self.optim.moments == "float32" and self.optim.beta2 <= 0.99:
            half = replace(self.optim, moments="bfloat16")
            yield "--optim.moments bfloat16", replace(self, optim=half)
        tokens = self.tokens // 2
        while tokens > LEAST_TOKENS and replace(self, tokens=tokens).total() > free:
            tokens //= 2
        if tokens >= LEAST_TOKENS:
            yield f"--micro-tokens {tokens}", replace(self, tokens=tokens)
        if self.optim.precision == "float32":
            yield "--optim.precision bfloat16", replace(self, optim=replace(self.optim, precision="bfloat16"))
        share = int(20 * (self.vllm - self.total() + free) / gpu) / 20 if self.vllm else 0
        if share > 0:
            yield f"--rollout.vllm.gpu-memory {share:g}", replace(self, vllm=int(share * gpu))

    def advice(self, free: int, gpu: int) -> str:
        """Each setting that makes it fit by itself, or else the first few that do together."""
        alone = [flag for flag, less in self.lighter(free, gpu) if less.total() <= free]
        need, flags = self, list[str]()
        while not alone and need.total() > free:
            offers = need.lighter(free, gpu)
            flag, less = next((o for o in offers if o[1].total() < need.total()), ("", need))
            if not flag:
                return f"no setting makes it fit: with {' '.join(flags)} it needs {need.total() / 1e9:.1f} GB"
            flags, need = [*flags, flag], less
        return f"it would fit with {' or '.join(alone) or ' '.join(flags)}"


def check_memory(
    model: Path | ModelConfig,
    place: Place,
    optim: OptimSettings,
    tokens: int,
    *,
    reference: bool | Path = False,
    rollout: RolloutSettings | None = None,
    depth: int = 0,
) -> None:
    """Nothing where a stage may fit, or where the architecture's sizes are not known.

    Args:
        model: its checkpoint, not loaded yet, or its config.
        tokens: of the largest micro-batch.
        reference: a frozen copy of the policy stays beside it, or the teacher in this directory.
        rollout: the engine that generates, up to `depth` rounds ahead.

    Raises:
        UserError: it cannot fit, with the parts and the settings that would.
    """
    on_gpu, free = place.device.type == "cuda", free_bytes(place.device)
    gpu = torch.cuda.mem_get_info(place.device)[1] if on_gpu else 0
    config = config_of(model) if isinstance(model, Path) else model
    teacher = config_of(reference) if isinstance(reference, Path) else None
    need = Need(config, optim, tokens, reference is True, device=place.device.type, teacher=teacher)
    need = need.beside(rollout, gpu, depth) if rollout else need
    try:
        total = need.total()
    except ValueError:
        return
    if free is not None and total > free:
        where = torch.cuda.get_device_name(place.device) if on_gpu else "this machine"
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in need.parts().items() if size)
        raise UserError(
            f"too little memory: training needs at least {total / 1e9:.1f} GB ({parts}), and "
            f"{free / 1e9:.1f} GB are free on {where}; {need.advice(free, gpu)}"
        )


def config_of(path: Path) -> Any:
    """The model's config without its weights: a `ModelConfig`, or a dense model's text config.
    Raises `UserError`: no config.json that can be read."""
    with loading(path):
        values = read_config(path)
        if values.get("model_type") in NATIVE_TYPES:
            return ModelConfig.from_dict(values)
        return AutoConfig.from_pretrained(path).get_text_config()


def free_bytes(device: torch.device) -> int | None:
    """Memory that this process can still take on `device`; of a CPU also swap, and a container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return min([1024 * (kib["MemAvailable"] + kib["SwapFree"]), *container_bytes(Path("/sys/fs/cgroup"))])


def container_bytes(root: Path) -> Iterator[int]:
    """What a container may still take, where it has a limit: control groups, version 2 or 1."""
    for most, used, files in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit, use = ((root / name).read_text().strip() for name in (most, used))
            stat = (root / most).with_name("memory.stat").read_text()
        except OSError:
            continue
        cached = dict(line.split(maxsplit=1) for line in stat.splitlines()).get(files, "0")
        if limit != "max":
            yield int(limit) - int(use) + int(cached)  # what caches files is given back when it is needed
