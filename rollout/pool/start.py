"""Ray for a pool: a cluster that is there, or one on this machine that leaves the trainer its GPU."""

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from rollout.engine import EngineDied
from rollout.settings import RolloutSettings

VISIBLE = "CUDA_VISIBLE_DEVICES"
LONGEST_TEMP = 36
"""Characters of a folder for temporary files that Ray can use: its sockets lie 71 below, a path has 107."""


def start_ray(settings: RolloutSettings, trainer: torch.device | None = None) -> None:
    """Join the cluster at `settings.address`, or start a Ray on this machine with CPUs for the workers.

    Raises:
        EngineDied: no cluster there.
        ValueError: too few GPUs on this machine, or beside the trainer's; no folder with a short name.
    """
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    root = str(Path(__file__).parents[2])
    env = {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    env["OMP_NUM_THREADS"] = str(max(1, int(settings.worker_cpus)))
    common: dict[str, Any] = {"runtime_env": {"env_vars": env}, "log_to_driver": False}
    if settings.address:
        try:
            ray.init(address=settings.address, **common)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise EngineDied(f"no Ray cluster at {settings.address}: {last_line(error)}") from error
        return
    if len(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) > LONGEST_TEMP:
        common["_temp_dir"] = short_folder()
    cores = max(os.cpu_count() or 1, int(settings.workers * settings.worker_cpus + 0.999))
    before = os.environ.get(VISIBLE)
    if trainer is not None and trainer.type == "cuda" and settings.worker_gpus >= 1:
        os.environ[VISIBLE] = gpus_beside(trainer, settings)  # for Ray's processes: this one has its CUDA
    elif (need := settings.workers * settings.worker_gpus) > torch.cuda.device_count():
        raise ValueError(
            f"the workers need {need:g} GPUs and torch finds {torch.cuda.device_count()} here: lower "
            "rollout.worker_gpus (0 = workers on CPUs) or rollout.workers."
        )
    try:
        ray.init(
            address="local", num_cpus=cores, include_dashboard=False, logging_level=logging.ERROR, **common
        )
    finally:
        os.environ.pop(VISIBLE, None)
        os.environ |= {} if before is None else {VISIBLE: before}


def short_folder() -> str:
    """A folder for Ray where the usual one has too long a name for sockets.
    Raises `ValueError`: there is none."""
    if not os.access("/tmp", os.W_OK):
        raise ValueError(
            f"{tempfile.gettempdir()}, the folder for temporary files, has too long a name for Ray: "
            f"set RAY_TMPDIR to one of at most {LONGEST_TEMP} characters."
        )
    return f"/tmp/ray-{os.getuid()}"


def gpus_beside(trainer: torch.device, settings: RolloutSettings) -> str:
    """CUDA_VISIBLE_DEVICES without the trainer's GPU. Raises `ValueError`: too few for the workers."""
    visible = os.environ.get(VISIBLE) or ",".join(map(str, range(torch.cuda.device_count())))
    names = visible.split(",")
    others = [name for index, name in enumerate(names) if index != (trainer.index or 0)]
    if len(others) < (need := settings.workers * settings.worker_gpus):
        raise ValueError(
            f"the workers need {need:g} GPUs and {len(others)} are left beside the trainer's: lower "
            "rollout.workers (vllm.data_parallel), or share GPUs with rollout.worker_gpus below 1."
        )
    return ",".join(others)


def last_line(error: BaseException) -> str:
    """The last line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
