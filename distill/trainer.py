"""One student's training on TRL's SFTTrainer: planned batches in, our run directory out.

TRL and transformers own the loop, the collator, the loss (completions only, the model's own logits, the mean
over an update's tokens), the optimizer, early stopping and the best checkpoint. Ours: which rows come when
(`batches`), how ranks share them, the metrics, the console, and what a resume starts from.

Trainer checkpoints lie in LABEL/checkpoint-N. The stage's own checkpoint holds only a pointer to one, with
its hash, so that metrics, pointer and weights are always of the same step.
"""

import errno
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainerState
from trl import SFTConfig, SFTTrainer

from distill.batches import IGNORE
from pipeline.errors import UserError
from pipeline.run import ranks
from pipeline.run.checkpoint import way_out
from pipeline.run.directory import RunDir
from pipeline.run.files import is_full, read_json, remove, sha256, write_atomic
from pipeline.run.guard import Guard
from pipeline.run.usage import Usage
from pipeline.settings.distill import DistillSettings, StudentOptimSettings


@dataclass(frozen=True, slots=True)
class Job:
    """What one model learns, settled before the first step."""

    label: str
    """Folder in the run directory: `student` or `plain`."""
    template: str
    """Of its prompts."""
    rows: Dataset
    """input_ids and labels of each row, on disk."""
    lengths: Sequence[int]
    """Of the rows, tokens."""
    batches: list[list[int]]
    """Row numbers of each micro-batch of training, in order."""
    checks: list[list[int]]
    """Row numbers of each micro-batch of an evaluation; empty: there is none."""
    accumulate: int
    """Micro-batches per update."""
    optim: StudentOptimSettings

    @property
    def steps(self) -> int:
        """Updates of this job."""
        return len(self.batches) // self.accumulate

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens of all updates."""
        return sum(map(self.size, self.batches))

    def size(self, batch: list[int]) -> int:
        """Prompt and completion tokens of a micro-batch."""
        return sum(self.lengths[row] for row in batch)


class Watch(TrainerCallback):
    """Trainer's events to the run directory, and a Ctrl-C to Trainer."""

    def __init__(self, job: Job, run_dir: RunDir, first: int, total: int, usage: Usage, guard: Guard) -> None:
        """`first` of the stage's `total` updates come before the job."""
        self.job, self.run_dir, self.first, self.total, self.usage = job, run_dir, first, total, usage
        self.guard = guard
        size = job.accumulate
        updates = [job.batches[i : i + size] for i in range(0, len(job.batches), size)]
        self.rows = [0, *itertools.accumulate(sum(map(len, update)) for update in updates)]
        self.tokens = [0, *itertools.accumulate(sum(map(job.size, update)) for update in updates)]
        self.best: dict[str, Any] = {}  # step and sha256 of the best checkpoint
        self.logged, self.started = 0, time.monotonic()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **more: Any) -> None:
        """Start the clock; loading a checkpoint is not part of the first step. It restores the learning rate
        and the intervals that it was saved with, and the job's may be others now."""
        self.logged, self.started = state.global_step, time.monotonic()
        if not ranks.rank():
            self.run_dir.metrics.begin(self.first + self.logged)
        state.compute_steps(args, state.max_steps)
        if state.best_global_step:  # its folder by the path of then
            state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{state.best_global_step}")
        plan, rate = more["lr_scheduler"], self.job.optim.lr
        groups = plan.optimizer.param_groups
        plan.base_lrs = [rate] * len(groups)
        plan._last_lr = [rate * plan.lr_lambdas[0](plan.last_epoch)] * len(groups)
        for group, now in zip(groups, plan._last_lr, strict=True):
            group["lr"] = now

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Clip. An update that the guard does not accept loses its gradients: the optimizer then skips it."""
        clip = self.job.optim.clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(more["model"].parameters(), clip)
        if not self.guard.accepts(float(norm)):
            more["model"].zero_grad(set_to_none=True)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """After a Ctrl-C on any rank: save and stop."""
        if self.run_dir.interrupted or ranks.world() > 1:
            self.run_dir.interrupted = bool(ranks.largest(self.run_dir.interrupted))
        if self.run_dir.interrupted:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        """One update's metrics; those of an evaluation and Trainer's closing summary have no loss."""
        if "loss" not in (logs or {}):
            return
        step, now, size = state.global_step, time.monotonic(), self.job.accumulate
        mine = (
            batch[ranks.rank() :: ranks.world()]
            for batch in self.job.batches[self.logged * size : step * size]
        )
        lengths = (self.job.lengths[row] for row in itertools.chain.from_iterable(mine))
        metrics = self.usage.of(lengths, now - self.started) | {
            "loss/lm": logs["loss"],
            "optim/lr": logs["learning_rate"],
            "optim/grad_norm": logs["grad_norm"],
            "data/epoch": self.rows[step] / (len(self.job.rows) - sum(map(len, self.job.checks))),
            "data/tokens": self.tokens[step],
            "time/step_s": (now - self.started) / max(1, step - self.logged),
        }
        self.logged, self.started = step, now
        metrics = {key: value for key, value in metrics.items() if math.isfinite(value)}
        self.run_dir.log(self.first + step, self.total, metrics | {"optim/skipped": self.guard.skipped})

    def on_evaluate(
        self, args: Any, state: TrainerState, control: Any, metrics: Any = None, **_: Any
    ) -> None:
        """The loss on the held-out rows, in a line of its own."""
        self.run_dir.log(self.first + state.global_step, self.total, {"heldout/loss": metrics["eval_loss"]})
        self.started = time.monotonic()

    def on_save(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Point the run directory at the checkpoint that Trainer has just finished."""
        ranks.wait()  # each rank has put the state of its random numbers there
        if not ranks.rank():
            self.point(Path(args.output_dir), state, args.save_steps)
        self.started = time.monotonic()

    def point(self, folder: Path, state: TrainerState, every: int) -> None:
        """Rank 0's part of `on_save`; Trainer checkpoints that no kept pointer names are removed."""
        step, digest = state.global_step, sha256(folder / f"checkpoint-{state.global_step}")
        if state.best_global_step == step:
            self.best = {"step": step, "sha256": digest}
        pointer = {"label": self.job.label, "step": step, "sha256": digest, "best": self.best}
        text = json.dumps(pointer | {"guard": self.guard.state_dict()}) + "\n"
        due = step % every == 0 or step == self.job.steps  # else a Ctrl-C's
        good = self.guard.applied if due else None
        self.run_dir.checkpoint(self.first + step, lambda at: write_atomic(at / "pointer.json", text), good)
        pointers = [read_json(path) for path in self.run_dir.path.glob("checkpoint-*/pointer.json")]
        kept = {f"checkpoint-{at['step']}" for pair in pointers for at in (pair, pair["best"]) if at}
        for old in folder.glob("checkpoint-*"):
            if old.name not in kept:
                remove(old)


class StudentTrainer(SFTTrainer):
    """SFTTrainer on a job's micro-batches, less what a run directory has no use for."""

    def __init__(self, job: Job, **parts: Any) -> None:
        self.job = job
        super().__init__(train_dataset=job.rows, eval_dataset=job.rows if job.checks else None, **parts)
        if not self.model_accepts_loss_kwargs:
            raise UserError(
                f"{type(self.model).__name__} cannot average its loss over the tokens of an update"
            )
        labels = (job.rows[row]["labels"][1:] for batch in job.checks for row in batch)
        self.checked = sum(label != IGNORE for row in labels for label in row)

    def micro_batches(self, batches: list[list[int]]) -> DataLoader[Any]:
        """This rank's share of each micro-batch, as TRL's collator makes it. TRL cannot plan two corpora for
        equally many tokens in equally many updates. A rank without a row computes one that has no label: all
        ranks must take part in the update."""
        rank, world = self.args.process_index, self.args.world_size

        def share(items: list[list[int]]) -> dict[str, torch.Tensor]:
            mine = items[0][rank::world]
            batch: dict[str, torch.Tensor] = self.data_collator(
                self.job.rows.__getitems__(mine or items[0][:1])
            )
            if not mine:
                batch["labels"].fill_(IGNORE)
            return batch

        data: Any = batches
        return DataLoader(data, 1, collate_fn=share, pin_memory=self.args.dataloader_pin_memory)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The job's batches."""
        return self.micro_batches(self.job.batches)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """The job's held-out rows."""
        return self.micro_batches(self.job.checks)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's; on a CPU Trainer's, of the model's own logits: there TRL's fused head projects every
        position, and again in the backward (16 % of a small model's time, more of a large vocabulary's)."""
        if self.args.use_cpu:
            inputs = inputs | {"use_cache": False}
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        """A held-out micro-batch's loss as a share of all tokens: Trainer's mean over micro-batches of any
        size is then the mean over tokens."""
        items = torch.tensor(self.checked / len(self.job.checks), device=self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=items)
        return loss, None, None

    def _save_checkpoint(self, *args: Any) -> None:
        """TRL's; a full disk is an error of the disk, which torch's writer does not name."""
        try:
            super()._save_checkpoint(*args)
        except Exception as error:
            if is_full(error, Path(str(self.args.output_dir))):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card per checkpoint: the finished model gets ours."""


def resume_point(job: Job, run_dir: RunDir, watch: Watch) -> Path | None:
    """The Trainer checkpoint of this job that the run directory points at, if it points at one; the guard's
    state and the best checkpoint go to `watch`. Raises `UserError`: one of them is gone or damaged."""
    newest = run_dir.latest()
    pointer = read_json(newest[1] / "pointer.json") if newest else {}
    if newest is None or pointer["label"] != job.label:
        return None
    for at in filter(None, (pointer["best"], pointer)):
        folder = run_dir.path / job.label / f"checkpoint-{at['step']}"
        if not folder.is_dir() or sha256(folder) != at["sha256"]:
            raise UserError(f"{folder} is missing or corrupted; {way_out(run_dir.path, newest[1])}")
    watch.guard.load_state_dict(pointer["guard"])
    watch.best = pointer["best"]
    return folder


def arguments(job: Job, config: DistillSettings, output: Path, device: torch.device) -> SFTConfig:
    """Our settings in Trainer's terms."""
    gpu, checks = device.type == "cuda", bool(job.checks)
    optim, cosine = job.optim, job.optim.schedule == "cosine"
    found = SFTConfig(
        output_dir=str(output), report_to="none", disable_tqdm=True, seed=config.seed, data_seed=config.seed,
        use_cpu=not gpu, dataloader_pin_memory=gpu, log_level_replica="error",
        ddp_find_unused_parameters=False,
        # An item is a complete micro-batch, `plan` has settled the order, too long rows have been dropped.
        max_steps=job.steps, per_device_train_batch_size=1, gradient_accumulation_steps=job.accumulate,
        per_device_eval_batch_size=1, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None,
        learning_rate=optim.lr, warmup_steps=optim.warmup_steps,
        lr_scheduler_type="cosine_with_min_lr" if cosine else "constant_with_warmup",
        lr_scheduler_kwargs={"min_lr_rate": optim.min_lr_ratio} if cosine else {},
        optim="adamw_torch_fused", adam_beta1=optim.beta1, adam_beta2=optim.beta2,
        weight_decay=optim.weight_decay, max_grad_norm=0,  # `Watch` clips
        bf16=config.dtype == "bfloat16", gradient_checkpointing=config.recompute,
        gradient_checkpointing_kwargs={"use_reentrant": False} if config.recompute else None,
        logging_steps=config.log_every, logging_nan_inf_filter=False,  # a loss that is not finite must show
        eval_strategy="steps" if checks else "no", eval_steps=config.eval_every,
        load_best_model_at_end=checks, metric_for_best_model="loss", greater_is_better=False,
        save_steps=config.eval_every if checks else config.save_every or job.steps,
    )  # fmt: skip
    found._n_gpu = min(found.n_gpu, 1)  # Trainer would split each micro-batch over every GPU that it sees
    return found


def train(
    model: Any,
    tokenizer: Any,
    job: Job,
    run_dir: RunDir,
    config: DistillSettings,
    watch: Watch,
    lora: Any,
    device: torch.device,
) -> tuple[Any, int, int | None]:
    """Train `model` on the job's batches, from its newest checkpoint if there is one. Returns it, with the
    weights of the lowest held-out loss where there are evaluations; the updates made; and of which update the
    weights are, None = the last. After a Ctrl-C all is saved and `KeyboardInterrupt` raised. `lora` is a
    `peft.LoraConfig` or None; the adapters are merged at the end."""
    checkpoint, stopper = (
        resume_point(job, run_dir, watch),
        EarlyStoppingCallback(config.patience or sys.maxsize),
    )
    if checkpoint and job.checks:
        state = read_json(checkpoint / "trainer_state.json")
        kept = state["stateful_callbacks"]["EarlyStoppingCallback"]["attributes"]
        stopper.early_stopping_patience_counter = kept["early_stopping_patience_counter"]
        if stopper.early_stopping_patience_counter >= stopper.early_stopping_patience:  # it had ended there
            job = replace(job, batches=job.batches[: state["global_step"] * job.accumulate])
    trainer = StudentTrainer(
        job,
        model=model,
        args=arguments(job, config, run_dir.path / job.label, device),
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[watch, stopper] if job.checks else [watch],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    run_dir.stop_if_interrupted()
    trained: Any = trainer.model
    trained = trained.merge_and_unload() if lora is not None else trained
    return trained, trainer.state.global_step, trainer.state.best_global_step if job.checks else None
