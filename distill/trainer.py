"""One student's training on TRL's SFTTrainer: planned batches in, our run directory out.

TRL owns the loop, the loss (completions only, log-probabilities in chunks), the optimizer and its
checkpoints. Ours: which rows come when (`batches`), the metrics, the console, and what a resume starts from.

Trainer checkpoints lie in LABEL/checkpoint-N. The stage's own checkpoint holds only a pointer to one, with
its hash, so that metrics, pointer and weights are always of the same step.
"""

import itertools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from trl import SFTConfig, SFTTrainer

from distill.batches import IGNORE, Example, collate
from pipeline.errors import UserError
from pipeline.run.checkpoint import way_out
from pipeline.run.directory import RunDir
from pipeline.run.files import read_json, remove, sha256, write_atomic
from pipeline.run.guard import Guard
from pipeline.run.usage import Usage
from pipeline.settings.common import AdamWSettings
from pipeline.settings.distill import DistillSettings


@dataclass(frozen=True, slots=True)
class Job:
    """What one model learns, settled before the first step."""

    label: str
    """Folder in the run directory: `base`, `student` or `plain`."""
    template: str
    """Of its prompts."""
    examples: list[Example]
    batches: list[list[int]]
    """Row numbers of each micro-batch, in order."""
    accumulate: int
    """Micro-batches per update."""
    optim: AdamWSettings

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
        return sum(len(self.examples[row]) for row in batch)


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
        self.logged, self.started = 0, time.monotonic()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Start the clock; loading a checkpoint is not part of the first step. It restores the learning rate
        that it was saved with, and the job's may be another now."""
        self.logged, self.started = state.global_step, time.monotonic()
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

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """After a Ctrl-C: save and stop."""
        if self.run_dir.interrupted:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        """One update's metrics; Trainer's closing summary has no loss and is left out."""
        if "loss" not in (logs or {}):
            return
        step, now, size = state.global_step, time.monotonic(), self.job.accumulate
        rows = itertools.chain.from_iterable(self.job.batches[self.logged * size : step * size])
        lengths = (len(self.job.examples[row]) for row in rows)
        metrics = self.usage.of(lengths, now - self.started) | {
            "loss/lm": logs["loss"],
            "optim/lr": logs["learning_rate"],
            "optim/grad_norm": logs["grad_norm"],
            "data/epoch": self.rows[step] / len(self.job.examples),
            "data/tokens": self.tokens[step],
            "time/step_s": (now - self.started) / max(1, step - self.logged),
        }
        self.logged, self.started = step, now
        metrics = {key: value for key, value in metrics.items() if math.isfinite(value)}
        self.run_dir.log(self.first + step, self.total, metrics | {"optim/skipped": self.guard.skipped})

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Point the run directory at the checkpoint that Trainer has just finished."""
        step, digest = state.global_step, sha256(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        pointer = {"label": self.job.label, "step": step, "sha256": digest, "guard": self.guard.state_dict()}
        text = json.dumps(pointer) + "\n"
        due = step % args.save_steps == 0 or step == self.job.steps  # else a Ctrl-C's
        good = self.guard.applied if due else None
        self.run_dir.checkpoint(self.first + step, lambda at: write_atomic(at / "pointer.json", text), good)
        pointers = self.run_dir.path.glob("checkpoint-*/pointer.json")
        kept = {f"checkpoint-{read_json(path)['step']}" for path in pointers}
        for old in Path(args.output_dir).glob("checkpoint-*"):
            if old.name not in kept:
                remove(old)
        self.started = time.monotonic()


class StudentTrainer(SFTTrainer):
    """SFTTrainer with a cheaper loss on CPUs, less what a run directory has no use for."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean cross-entropy of the update's completion tokens, nats. On a GPU TRL's fused kernel does it. On
        a CPU TRL projects every position, and again in the backward; here only completion tokens, once."""
        if not self.args.use_cpu or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        net = self.accelerator.unwrap_model(model)
        net = net.get_base_model() if hasattr(net, "peft_config") else net
        labels = inputs["labels"][:, 1:]
        scored = labels != IGNORE
        with self.accelerator.autocast():
            hidden = net.base_model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            ).last_hidden_state  # b t d
            logits = net.get_output_embeddings()(hidden[:, :-1][scored])  # n v
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[scored], reduction="sum")
        return loss / (scored.sum() if num_items_in_batch is None else num_items_in_batch)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card per checkpoint: the finished model gets ours."""


def resume_point(job: Job, run_dir: RunDir, guard: Guard) -> Path | None:
    """The Trainer checkpoint of this job that the run directory points at, if it points at one; its guard's
    state goes to `guard`. Raises `UserError`: it is gone or damaged."""
    newest = run_dir.latest()
    pointer = read_json(newest[1] / "pointer.json") if newest else {}
    if newest is None or pointer["label"] != job.label:
        return None
    folder = run_dir.path / job.label / f"checkpoint-{pointer['step']}"
    if not folder.is_dir() or sha256(folder) != pointer["sha256"]:
        raise UserError(f"{folder} is missing or corrupted; {way_out(run_dir.path, newest[1])}")
    guard.load_state_dict(pointer["guard"])
    return folder


def arguments(job: Job, config: DistillSettings, output: Path, device: torch.device) -> SFTConfig:
    """Our settings in Trainer's terms."""
    gpu = device.type == "cuda"
    optim, cosine = job.optim, job.optim.schedule == "cosine"
    found = SFTConfig(
        output_dir=str(output), report_to="none", disable_tqdm=True, seed=config.seed, data_seed=config.seed,
        use_cpu=not gpu, dataloader_pin_memory=gpu,
        # An item is a complete micro-batch, `plan` has settled the order, too long rows have been dropped.
        max_steps=job.steps, per_device_train_batch_size=1, gradient_accumulation_steps=job.accumulate,
        train_sampling_strategy="sequential", dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False, max_length=None,
        learning_rate=optim.lr, warmup_steps=optim.warmup_steps,
        lr_scheduler_type="cosine_with_min_lr" if cosine else "constant_with_warmup",
        lr_scheduler_kwargs={"min_lr_rate": optim.min_lr_ratio} if cosine else {},
        optim="adamw_torch_fused", adam_beta1=optim.beta1, adam_beta2=optim.beta2,
        weight_decay=optim.weight_decay, max_grad_norm=0,  # `Watch` clips
        bf16=config.dtype == "bfloat16", gradient_checkpointing=config.recompute,
        gradient_checkpointing_kwargs={"use_reentrant": False} if config.recompute else None,
        logging_steps=config.log_every, logging_nan_inf_filter=False,  # a loss that is not finite must show
        save_steps=config.save_every or job.steps,
    )  # fmt: skip
    found._n_gpu = min(found.n_gpu, 1)  # Trainer would split each micro-batch over every GPU that it sees
    return found


def train(
    model: PreTrainedModel,
    tokenizer: Any,
    job: Job,
    run_dir: RunDir,
    config: DistillSettings,
    watch: Watch,
    lora: Any,
    device: torch.device,
) -> Any:
    """Train `model` on the job's batches, from its newest checkpoint if there is one, and return it. After a
    Ctrl-C all is saved and `KeyboardInterrupt` raised. `lora` is a `peft.LoraConfig` or None; the adapters
    are merged into the weights that are returned."""

    def look_up(items: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return collate([job.examples[row] for row in items[0]["rows"]], tokenizer.pad_token_id)

    trainer = StudentTrainer(
        model=model,
        args=arguments(job, config, run_dir.path / job.label, device),
        train_dataset=Dataset.from_dict({"rows": job.batches}),  # an item, a micro-batch, is not regrouped
        data_collator=look_up,
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = resume_point(job, run_dir, watch.guard)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.global_step < job.steps:
        run_dir.stop_if_interrupted()
    trained: Any = trainer.model
    return trained.merge_and_unload() if lora is not None else trained
