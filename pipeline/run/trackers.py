"""Metrics to TensorBoard, wandb or trackio, through accelerate's `GeneralTracker`s, beside metrics.jsonl."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.run.metrics import say


class Tracker:
    """The tracker of one stage: it starts with the first step, and the run goes on where it fails."""

    def __init__(self, name: str, folder: Path, settings: Mapping[str, Any]) -> None:
        """`folder` is the stage's. Raises `UserError`: it is not installed here."""
        from accelerate import tracking

        if name not in map(str, tracking.get_available_trackers()):
            raise UserError(f"--tracker {name} needs a package: pip install {name}; or leave --tracker out")
        kind, board = tracking.LOGGER_TYPE_TO_CLASS[name], name == "tensorboard"
        more = {"logging_dir": str(folder)} if board else {"name": folder.name}
        self.live: Any = kind(name if board else folder.parent.name, **more)
        self.live.main_process_only = False  # rank 0 alone has one; accelerate must not look for others
        self.name, self.begun = name, False
        self.settings = {key: str(value) for key, value in settings.items()}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Pass on the metrics of a step."""
        if not self.begun:
            from accelerate import PartialState

            self.begun = True
            self.attempt(lambda: (PartialState(), self.live.start()))  # accelerate's log needs its state
            self.attempt(lambda: self.live.store_init_configuration(self.settings))
        self.attempt(lambda: self.live.log(dict(metrics), step=step))

    def finish(self) -> None:
        """Send what is left."""
        if self.begun:
            self.attempt(lambda: self.live.finish())

    def attempt(self, call: Callable[[], object]) -> None:
        """`call`, where nothing has failed yet; a failure is said, once."""
        try:
            if self.live:
                call()
        except Exception as error:
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
            say(f"tracker {self.name} failed ({why}): the run goes on, and metrics.jsonl has every step")
            self.live = None
