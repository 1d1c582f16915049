"""vLLM behind the `RolloutEngine` protocol: the real `vllm.LLM`, CPU build and GPU build alike.

On a CPU the engine runs in this process, on GPUs in processes of its own; weights reach its workers
(`rollout.vllm.worker`) by `rollout.transport`.

Two faults of vLLM 0.32's CPU build are worked around, and the self-test would detect them: the rotary
embedding's custom kernel is wrong for DeepSeek (it is switched off), and a mixture of experts is not repacked
when its weights are loaded a second time (`repack_experts_on_reload`).
"""

import functools
import hashlib
import itertools
import math
import random
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.policy import Policy
from rollout.checkpoint import context_and_vocabulary, eos_of, read_config, stored_shapes
from rollout.engine import EngineDied, Renewable, StaleWeights
from rollout.settings import DtypeName, RolloutSettings
from rollout.stopping import Stopper, check_prompts, stop_ids
from rollout.text.tokenizer import has_tokenizer, load_tokenizer
from rollout.transport import BUCKET_BYTES, Outlet, SharedFile, SharedGpu, send
from rollout.types import Eos, Prompt, Rollout, SamplingParams
from rollout.vllm.options import (
    cpu_build,
    excluding_segments,
    kv_copies,
    llm_options,
    prepare_environment,
    refuse_what_cannot_work,
)
from rollout.vllm.outputs import Ends, to_rollout
from rollout.vllm.self_test import self_test
from rollout.vllm.worker import watch_packing
from rollout.weights import DTYPES, check_shapes, device_of, over_ranks, shapes


class VllmEngine(Renewable):
    """`RolloutEngine` over `vllm.LLM`, for native deepseek_v3 checkpoints and dense ones.

    `version` and `weights`, the fingerprint of what vLLM computes with, name the live policy."""

    def __init__(
        self,
        path: Path | str,
        settings: RolloutSettings | None = None,
        *,
        device: str = "",
        policy: Policy | None = None,
        tokenizer: object = None,
        eos_token_id: Eos = None,
    ) -> None:
        """On the device that the build of vLLM is for; `device` and `tokenizer` are for the other engines.

        Args:
            settings: `dtype` of vLLM's weights and arithmetic, and `vllm`.
            policy: the trainer's model of the same checkpoint, for the self-test; None loads it for that.
            eos_token_id: ends a completion; None = the checkpoint's.

        Raises:
            ModuleNotFoundError: vLLM is not installed here.
            ValueError: a version of it, or a setting, that cannot work here.
            StaleWeights: the self-test found that vLLM does not compute what our model does.
        """
        settings = settings or RolloutSettings()
        self.path, self.settings = Path(path), settings.vllm
        name: DtypeName = "bfloat16" if settings.dtype == "bfloat16" else "float32"
        self.dtype = DTYPES[name]
        self.version, self.weights, self.dead = 0, -1, ""
        self.torn = self.asleep = self.busy = False
        self.config = read_config(self.path)
        self.max_positions, self.vocab_size = context_and_vocabulary(self.path, self.settings.context)
        self.eos_token_id = eos_of(self.path) if eos_token_id is None else eos_token_id
        self.on_cpu = cpu_build()
        self.routed_experts = settings.routed_experts
        trainer = policy is not None
        refuse_what_cannot_work(self.settings, self.config, self.on_cpu, trainer, self.routed_experts)
        shared = not self.on_cpu and policy is not None and device_of(policy).type == "cuda"
        self.sleeps = shared if self.settings.sleep == "auto" else self.settings.sleep == "on"
        if shared or self.sleeps:
            excluding_segments()
        self.seed_each = self.on_cpu if self.settings.seed_each == "auto" else self.settings.seed_each == "on"
        self.in_process = self.on_cpu and self.settings.tensor_parallel == 1
        self.llm = self._start(name)
        self._shapes: dict[str, tuple[int, ...]] = {}
        if self.settings.self_test:
            try:
                self_test(self, self.path, policy, self.dtype)
            except BaseException:
                self.close()
                raise

    def _start(self, dtype: DtypeName) -> Any:
        """A `vllm.LLM`. Seeds and thread count of this process, which its start changes, are restored."""
        prepare_environment(self.config, self.on_cpu, self.in_process)
        from vllm import LLM

        model = self.path, self.config, dtype, self.settings, self.max_positions
        options = llm_options(*model, self.on_cpu, self.routed_experts)
        options |= {"enable_sleep_mode": True} if self.sleeps else {}
        states = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        threads, set_threads = torch.get_num_threads(), torch.set_num_threads
        if self.on_cpu:
            watch_packing()
        try:
            return LLM(**options)
        finally:
            torch.set_num_threads = set_threads
            torch.set_num_threads(threads)
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])

    # ---- generation

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Rollout]:
        """Yield each rollout when it ends.

        With `seed_each` every rollout has a generator of its own, seeded by (seed, index, sample): batches do
        not change it. Its random numbers are not those of the native engine.

        Raises:
            ValueError: at once, when a prompt is empty, too long, or of another vocabulary.
            FloatingPointError: when the model's logits are not finite.
            EngineDied: vLLM stopped in the middle; a new engine is needed.
            StaleWeights: it has no complete weights: after `rest`, or an update that failed.
        """
        if self.dead:
            raise EngineDied(f"this vLLM engine has stopped ({self.dead}); open a new one.")
        if self.torn or self.asleep:
            raise StaleWeights("vLLM has no complete weights: load them before the next request.")
        check_prompts(prompts, self.max_positions, self.vocab_size)
        tokenizer = load_tokenizer(self.path) if sampling.stop and has_tokenizer(self.path) else None
        stopper = Stopper(sampling, self.eos_token_id, tokenizer)
        if sampling.stop and self.routed_experts:
            raise ValueError("rollout.routed_experts: vLLM has no experts of rollouts that stop strings end.")
        return self._generate(list(prompts), sampling, stopper)

    def _generate(
        self, prompts: list[Prompt], sampling: SamplingParams, stopper: Stopper
    ) -> Iterator[Rollout]:
        engine, version = self.llm.llm_engine, self.version
        stops, call = stop_ids(self.eos_token_id, sampling), uuid.uuid4().hex[:8]
        ends = Ends(stopper)
        waiting: dict[str, tuple[int, int]] = {}
        try:
            for index, sample in itertools.product(range(len(prompts)), range(sampling.n)):
                name, ids = f"{call}-{index}-{sample}", list(prompts[index].token_ids)
                room = self.max_positions - len(ids)
                params = vllm_sampling(sampling, index, sample, stops, room, self.seed_each)
                engine.add_request(name, {"prompt_token_ids": ids}, params)
                waiting[name] = (index, sample)
            while waiting:
                self.busy = True
                self.renew()
                if not engine.has_unfinished_requests():
                    raise RuntimeError("requests were lost")
                for output in engine.step():
                    name, completion = output.request_id, output.outputs[0]
                    if name not in waiting:
                        continue
                    end = ends.find(name, completion.token_ids)
                    if end is not None and not output.finished:
                        engine.abort_request([name])
                    if output.finished or end is not None:
                        index, sample = waiting.pop(name)
                        made = prompts[index], index, sample, completion, version, end
                        yield replace(to_rollout(*made, self.config), last_version=self.version)
        except (GeneratorExit, FloatingPointError):
            if waiting:
                engine.abort_request(list(waiting))
            raise
        except Exception as error:
            self.dead = f"{type(error).__name__}: {error}".splitlines()[0]
            raise EngineDied(
                f"vLLM stopped with {len(waiting)} rollouts unfinished ({self.dead}); open a new engine, or "
                "let a pool replace it (--rollout.workers)."
            ) from error
        finally:
            self.busy = False

    # ---- weights

    def load_weights(self, source: Policy, version: int) -> None:
        """Copy `source`'s weights to vLLM; when this returns they are live, proven by their fingerprint.

        Raises:
            ValueError: tensors that are missing, or of another shape; the old weights stay live.
            StaleWeights: vLLM holds other weights afterwards than those that were sent.
        """
        found = shapes(source)
        if not self._shapes:
            self._shapes = found if self.settings.self_test else stored_shapes(self.path, found)
        check_shapes(found, self._shapes, self.path)
        self._update(source.public_weights(), version, device_of(source))

    def load_tensors(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """`load_weights` from tensors on one device by public name, known to fit."""
        stream = iter(weights)
        first = next(stream)
        self._update(itertools.chain((first,), stream), version, first[1].device)

    def _update(self, weights: Iterable[tuple[str, Tensor]], version: int, device: torch.device) -> None:
        """Send weights that lie on `device`, and prove what is live afterwards; requests under way halt, and
        are prefilled again. Raises `StaleWeights`: see `load_weights`; the engine then refuses requests until
        an update succeeds."""
        copies = functools.partial(kv_copies, self.config, self.settings.tensor_parallel)
        self.torn = True
        if self.asleep:
            torch.cuda.empty_cache()  # what the trainer's allocator keeps of freed tensors is vLLM's now
            self.llm.wake_up(tags=["weights"])
        halted = self.busy and not self.in_process  # else no step is taken meanwhile
        if halted:
            self.llm.sleep(level=0, mode="keep")
        outlet = self._outlet(device)
        self._call("r1_begin")
        try:
            expected = send(weights, self.dtype, outlet, self._bucket, copies)
        finally:
            live = over_ranks(self._call("r1_end"))  # after a failure too, which leaves layers half loaded
            outlet.close()
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        self.llm.reset_prefix_cache(**({"reset_running_requests": True} if self.busy else {}))
        if halted:
            self.llm.wake_up(tags=["scheduling"])
        if self.settings.quantization == "none" and live != expected:
            raise StaleWeights(
                f"after the update to version {version} vLLM holds weights with fingerprint {live:016x}, not "
                f"the {expected:016x} that were sent; its completions would not be on policy."
            )
        self.version, self.weights, self.torn = version, live, False

    def _bucket(self, message: bytes) -> Callable[[], Sequence[int]]:
        """See `transport.Start`."""
        return lambda: self._call("r1_bucket", message)

    def _outlet(self, device: torch.device) -> Outlet:
        """The way from tensors on `device` to vLLM's workers, which run on this machine."""
        elements = sum(math.prod(shape) for shape in self._shapes.values())
        nbytes = min(BUCKET_BYTES, elements * self.dtype.itemsize) or BUCKET_BYTES
        return SharedGpu(nbytes, device) if device.type == "cuda" else SharedFile(nbytes, self.path)

    def _call(self, method: str, *args: object) -> list[Any]:
        """The answers of all workers, by rank."""
        answers: list[Any] = self.llm.collective_rpc(method, args=args)
        return answers

    def live_weights(self) -> int:
        """Fingerprint of the weights that vLLM computes with, read from its tensors now."""
        return over_ranks(self._call("r1_live"))

    def rest(self) -> bool:
        """Free vLLM's weights and cache, where the setting `sleep` has it."""
        if self.sleeps and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True
        return self.asleep

    def close(self) -> None:
        """Stop vLLM and free its memory."""
        llm, self.llm = getattr(self, "llm", None), None
        self.dead = self.dead or "closed"
        if llm is None:
            return
        llm.llm_engine.engine_core.shutdown()
        del llm
        if self.in_process:
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()


def vllm_sampling(
    sampling: SamplingParams, index: int, sample: int, stops: Sequence[int], room: int, seed_each: bool
) -> Any:
    """vLLM's parameters for one rollout. Its seed, if it has one, is a hash of (seed, index, sample)."""
    from vllm import SamplingParams as VllmSampling
    from vllm.sampling_params import RequestOutputKind

    name = f"{sampling.seed} {sampling.first_index + index} {sample}".encode()
    return VllmSampling(
        max_tokens=min(sampling.max_tokens, room),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=int.from_bytes(hashlib.sha256(name).digest()[:8], "little") >> 1 if seed_each else None,
        stop_token_ids=list(stops),
        min_tokens=sampling.min_tokens,
        ignore_eos=True,  # the eos, unless the request ignores it, is in `stops`
        logprobs=0,  # of the sampled token alone
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.CUMULATIVE if sampling.stop else RequestOutputKind.FINAL_ONLY,
    )
