"""vLLM behind the `RolloutEngine` protocol: the real `vllm.LLM`, CPU build and GPU build alike.

The only file that imports vllm. On a CPU the engine runs in this process and copies the trainer's tensors;
on GPUs it runs in processes of its own, and weights travel by a file in memory.

Two faults of vLLM 0.32's CPU build are worked around here, and the self-test would detect them: the rotary
embedding's custom kernel is wrong for DeepSeek (it is switched off), and a mixture of experts is not repacked
when its weights are loaded a second time (`repack_experts_on_reload`).
"""

import functools
import hashlib
import itertools
import os
import random
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.policy import Policy
from rollout.checkpoint import context_and_vocabulary, eos_of, read_config, stored_shapes
from rollout.engine import EngineDied, StaleWeights
from rollout.settings import DtypeName, RolloutSettings
from rollout.stopping import Stopper, check_prompts, stop_ids
from rollout.text.tokenizer import has_tokenizer, load_tokenizer
from rollout.types import Prompt, Rollout, SamplingParams
from rollout.vllm.options import llm_options, prepare_environment
from rollout.vllm.outputs import Ends, to_rollout
from rollout.vllm.self_test import self_test
from rollout.weights import DTYPES, MODULUS, check_shapes, fingerprint, in_dtype, live_fingerprint, shapes


class VllmEngine:
    """`RolloutEngine` over `vllm.LLM`, for native deepseek_v3 checkpoints and dense ones.

    `version` and `weights`, the fingerprint of what vLLM computes with, name the live policy.
    """

    def __init__(
        self,
        path: Path | str,
        settings: RolloutSettings | None = None,
        *,
        device: str = "",
        policy: Policy | None = None,
        tokenizer: object = None,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> None:
        """On the device that the build of vLLM is for; `device` and `tokenizer` are for the other engines.

        Args:
            settings: `dtype` of vLLM's weights and arithmetic, and `vllm`.
            policy: the trainer's model of the same checkpoint, for the self-test; None loads it for that.
            eos_token_id: ends a completion; None = the checkpoint's.

        Raises:
            ModuleNotFoundError: vLLM is not installed here.
            StaleWeights: the self-test found that vLLM does not compute what our model does.
        """
        settings = settings or RolloutSettings()
        self.path, self.settings = Path(path), settings.vllm
        self.dtype = DTYPES[settings.dtype]
        self.version, self.weights, self.dead = 0, -1, ""
        self.config = read_config(self.path)
        self.max_positions, self.vocab_size = context_and_vocabulary(self.path, self.settings.context)
        self.eos_token_id = eos_of(self.path) if eos_token_id is None else eos_token_id
        self.on_cpu = not torch.cuda.is_available()
        self.in_process = self.on_cpu and self.settings.tensor_parallel == 1
        self.llm = self._start(settings.dtype)
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
        try:
            from vllm import LLM
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "vLLM is not installed in this environment; `make test-vllm` makes .venv-vllm with its CPU "
                "build: run this command with .venv-vllm/bin/python (on GPUs: pip install '.[vllm]')"
            ) from error
        options = llm_options(self.path, self.config, dtype, self.settings, self.max_positions, self.on_cpu)
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

        Every rollout has a generator of its own, seeded by (seed, index, sample): batches do not change it.
        Its random numbers are not those of the native engine.

        Raises:
            ValueError: at once, when a prompt is empty, too long, or of another vocabulary.
            FloatingPointError: when the model's logits are not finite.
            EngineDied: vLLM stopped in the middle; a new engine is needed.
        """
        if self.dead:
            raise EngineDied(f"this vLLM engine has stopped ({self.dead}); open a new one.")
        check_prompts(prompts, self.max_positions, self.vocab_size)
        tokenizer = load_tokenizer(self.path) if sampling.stop and has_tokenizer(self.path) else None
        stopper = Stopper(sampling, self.eos_token_id, tokenizer)
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
                params = vllm_sampling(sampling, index, sample, stops, self.max_positions - len(ids))
                engine.add_request(name, {"prompt_token_ids": ids}, params)
                waiting[name] = (index, sample)
            while waiting:
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
                        yield to_rollout(prompts[index], index, sample, completion, version, end)
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
        self.load_tensors(in_dtype(source.public_weights(), self.dtype), version)

    def load_tensors(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """`load_weights` from tensors by public name, in the engine's type and known to fit."""
        sent = list(weights)
        expected = fingerprint(tensor for _, tensor in sent)
        live = self._call("r1_receive", sent) if self.in_process else self._through_a_file(sent)
        self.llm.reset_prefix_cache()
        if self.settings.tensor_parallel == 1 and live != expected:
            raise StaleWeights(
                f"after the update to version {version} vLLM holds weights with fingerprint {live:016x}, not "
                f"the {expected:016x} that were sent; its completions would not be on policy."
            )
        self.version, self.weights = version, expected

    def _call(self, method: str, *args: object) -> int:
        """The sum of the workers' fingerprints: with several, of their shards together."""
        return sum(self.llm.collective_rpc(method, args=args)) % MODULUS

    def _through_a_file(self, sent: list[tuple[str, Tensor]]) -> int:
        """Send weights to workers in other processes by a file, in memory where /dev/shm has room for it."""
        memory, size = Path("/dev/shm"), sum(tensor.nbytes for _, tensor in sent)
        fits = memory.is_dir() and shutil.disk_usage(memory).free > 1.1 * size
        file = (memory if fits else self.path) / f"r1-weights-{os.getpid()}-{uuid.uuid4().hex}.safetensors"
        try:
            save_file({name: tensor.contiguous() for name, tensor in sent}, file)
            return self._call("r1_receive_file", str(file))
        finally:
            file.unlink(missing_ok=True)

    def live_weights(self) -> int:
        """Fingerprint of the weights that vLLM computes with, read from its tensors now."""
        return self._call("r1_fingerprint")

    def drain(self) -> dict[str, float]:
        """Empty: vLLM's metrics are not read."""
        return {}

    def close(self) -> None:
        """Stop vLLM and free its memory."""
        llm, self.llm = getattr(self, "llm", None), None
        self.dead = self.dead or "closed"
        if llm is None:
            return
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        llm.llm_engine.engine_core.shutdown()
        del llm
        if self.in_process:
            cleanup_dist_env_and_memory()


def vllm_sampling(sampling: SamplingParams, index: int, sample: int, stops: Sequence[int], room: int) -> Any:
    """vLLM's parameters for one rollout. Its seed is a hash of (seed, index, sample)."""
    from vllm import SamplingParams as VllmSampling
    from vllm.sampling_params import RequestOutputKind

    name = f"{sampling.seed} {sampling.first_index + index} {sample}".encode()
    return VllmSampling(
        max_tokens=min(sampling.max_tokens, room),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=int.from_bytes(hashlib.sha256(name).digest()[:8], "little") >> 1,
        stop_token_ids=list(stops),
        min_tokens=sampling.min_tokens,
        ignore_eos=True,  # the eos, unless the request ignores it, is in `stops`
        logprobs=0,  # of the sampled token alone
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.CUMULATIVE if sampling.stop else RequestOutputKind.FINAL_ONLY,
    )


# ---- in vLLM's workers


class WorkerWeights:
    """Methods that vLLM adds to its worker class (`worker_extension_cls`): load weights, fingerprint them."""

    model_runner: Any

    def r1_receive(self, weights: Iterable[tuple[str, Tensor]]) -> int:
        """Load weights by public name; return the fingerprint of the weights that are live afterwards."""
        repack_experts_on_reload()
        watch_packing()
        self.model_runner.reload_weights(weights_iterator=iter(weights))
        return self.r1_fingerprint()

    def r1_receive_file(self, file: str) -> int:
        """`r1_receive` from a safetensors file."""
        return self.r1_receive(load_file(file).items())

    def r1_fingerprint(self) -> int:
        """Fingerprint of every weight that this worker computes with."""
        return live_fingerprint(self.model_runner.get_model())


def watch_packing() -> None:
    """CPU: store each matrix's fingerprint before it is packed for the GEMM library."""
    from vllm.model_executor.layers import utils

    def watched(pack: Callable[..., None], layer: nn.Module, remove_weight: bool) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if not weight.is_meta and weight.ndim == 2:
            layer.r1_packed = fingerprint([weight])  # type: ignore[assignment]
        pack(layer, remove_weight)

    pack = utils.dispatch_cpu_unquantized_gemm
    if not isinstance(pack, functools.partial):
        utils.dispatch_cpu_unquantized_gemm = functools.partial(watched, pack)


def repack_experts_on_reload() -> None:
    """CPU: pack experts on every load, not on the first alone (vLLM 0.32, `_setup_kernel`).

    Without this the kernel reads plain weights as packed ones from the second load on.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod as Method,
    )
    from vllm.platforms import current_platform

    original = Method._setup_kernel
    if not current_platform.is_cpu() or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def setup(self: Any, layer: Any, w13: Tensor, w2: Tensor) -> None:
        again = self.moe_kernel is not None
        original(self, layer, w13, w2)
        if again:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    Method._setup_kernel = setup
