"""One student's training on TRL's SFTTrainer: planned batches in, our run directory out.

TRL owns the loop, the loss (completions only, log-probabilities in chunks), the optimizer and its
checkpoints. Ours: which rows come when (`batches`), the metrics, the console, and what a resume starts from.

Trainer checkpoints lie in LABEL/checkpoint-N. The stage's own checkpoint holds only a pointer to one, with
its hash, so that metrics, pointer and weights always tell of the same step.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from distill.batches import IGNORE, Example, collate
from pipeline.errors import UserError
from pipeline.run.checkpoint import way_out
from pipeline.run.directory import RunDir
from pipeline.run.files import sha256
from pipeline.settings.common import AdamWSettings


@dataclass(frozen=True, slots=True)
class Job:
    """What to train on and how: everything that is settled before the first step."""

    label: str
    """Folder in the run directory: `student` or `plain`."""
    examples: list[Example]
    batches: list[list[int]]
    """Row numbers of each micro-batch, in order."""
    accumulate: int
    """Micro-batches per update."""
    first: int
    """Updates of the stage before this job's."""
    total: int
    """Updates of the whole stage."""
    save_every: int
    """Updates between checkpoints; 0 = only at the end and after a Ctrl-C."""
    log_every: int
    """Updates between lines of the log."""

    @property
    def steps(self) -> int:
        """Updates of this job."""
        return len(self.batches) // self.accumulate

    def tokens(self, steps: int) -> int:
        """Prompt and completion tokens of the first `steps` updates."""
        done = self.batches[: steps * self.accumulate]
        return sum(len(self.examples[row]) for batch in done for row in batch)


def deck(job: Job) -> Dataset:
    """The plan as a data set: a micro-batch is one item, so that Trainer keeps its size and its place."""
    return Dataset.from_dict({"rows": job.batches})


def look_up(
    items: list[dict[str, list[int]]], examples: list[Example], pad_id: int
) -> dict[str, torch.Tensor]:
    """The collator that Trainer calls with one micro-batch of the deck."""
    return collate([examples[row] for row in items[0]["rows"]], pad_id)


class Watch(TrainerCallback):
    """Trainer's events to the run directory, and a Ctrl-C to Trainer."""

    def __init__(self, job: Job, run_dir: RunDir) -> None:
        self.job, self.run_dir = job, run_dir
        self.rows_seen = self.tokens_seen = self.counted = 0
        self.started = time.monotonic()

    def count(self, step: int) -> None:
        """Bring rows and tokens seen up to update `step`."""
        for batch in self.job.batches[self.counted * self.job.accumulate : step * self.job.accumulate]:
            self.rows_seen += len(batch)
            self.tokens_seen += sum(len(self.job.examples[row]) for row in batch)
        self.counted = step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock; loading a checkpoint is not part of the first step."""
        self.count(state.global_step)
        self.started = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After a Ctrl-C: save and stop."""
        if self.run_dir.interrupted:
            control.should_save = control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """One update's metrics; Trainer's closing summary has no loss and is left out."""
        if logs is None or "loss" not in logs:
            return
        updates = state.global_step - self.counted
        self.count(state.global_step)
        now = time.monotonic()
        metrics = {
            "loss/lm": logs["loss"],
            "optim/lr": logs["learning_rate"],
            "optim/grad_norm": logs["grad_norm"],
            "data/epoch": self.rows_seen / len(self.job.examples),
            "data/tokens": self.tokens_seen,
            "time/step_s": (now - self.started) / max(1, updates),
        }
        self.started = now
        self.run_dir.log(self.job.first + state.global_step, self.job.total, metrics)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Point the run directory at the checkpoint that Trainer has just finished."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        pointer = {"label": self.job.label, "step": state.global_step, "sha256": sha256(folder)}

        def write(target: Path) -> None:
            (target / "pointer.json").write_text(json.dumps(pointer) + "\n", encoding="utf-8")

        self.run_dir.checkpoint(self.job.first + state.global_step, write)
        self.started = time.monotonic()


class StudentTrainer(SFTTrainer):
    """SFTTrainer with a cheaper loss on CPUs, less what a run directory has no use for."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean cross-entropy of the update's completion tokens, nats.

        On a GPU TRL's fused kernel does it. On a CPU TRL projects every position, prompts too, and once more
        in the backward; here it is the completion tokens alone, once.
        """
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


def resume_point(job: Job, run_dir: RunDir) -> Path | None:
    """The Trainer checkpoint of this job that the run directory points at, if it points at one.

    Raises:
        UserError: it is gone or damaged.
    """
    newest = run_dir.latest()
    if newest is None:
        return None
    pointer = json.loads((newest[1] / "pointer.json").read_text(encoding="utf-8"))
    if pointer["label"] != job.label:
        return None
    folder = run_dir.path / job.label / f"checkpoint-{pointer['step']}"
    if not folder.is_dir() or sha256(folder) != pointer["sha256"]:
        raise UserError(f"{folder} is missing or corrupted; {way_out(run_dir.path, newest[1])}")
    return folder


def arguments(job: Job, optim: AdamWSettings, output: Path, *, seed: int, bf16: bool) -> SFTConfig:
    """Our settings in Trainer's words."""
    cosine = {"min_lr_rate": optim.min_lr_ratio}
    return SFTConfig(
        output_dir=str(output),
        max_steps=job.steps,
        per_device_train_batch_size=1,  # an item is a whole micro-batch
        gradient_accumulation_steps=job.accumulate,
        train_sampling_strategy="sequential",  # `plan` has settled the order
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        packing=False,  # on a CPU padding is cheaper, see batches.py
        max_length=None,  # too long rows have been dropped, none is cut
        learning_rate=optim.lr,
        lr_scheduler_type="cosine_with_min_lr" if optim.schedule == "cosine" else "constant_with_warmup",
        lr_scheduler_kwargs=cosine if optim.schedule == "cosine" else {},
        warmup_steps=optim.warmup_steps,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.clip,
        optim="adamw_torch_fused",
        bf16=bf16,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=job.log_every,
        logging_nan_inf_filter=False,  # a loss that is not finite must show
        save_strategy="steps",
        save_steps=job.save_every or job.steps,
        save_total_limit=2,
        disable_tqdm=True,
        report_to="none",
        seed=seed,
        data_seed=seed,
    )


def quiet() -> None:
    """Our log has a line for all that matters: no bars, none of Trainer's notes on token ids it aligns."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def train(
    model: PreTrainedModel,
    tokenizer: Any,
    job: Job,
    run_dir: RunDir,
    optim: AdamWSettings,
    *,
    seed: int,
    bf16: bool,
    lora: Any,
) -> Any:
    """Train `model` on the job's batches, from its newest checkpoint if there is one, and give it back.

    After a Ctrl-C all is saved and `KeyboardInterrupt` raised. `lora` is a `peft.LoraConfig` or None; the
    adapters are merged into the weights that are given back.
    """
    trainer = StudentTrainer(
        model=model,
        args=arguments(job, optim, run_dir.path / job.label, seed=seed, bf16=bf16),
        train_dataset=deck(job),
        data_collator=partial(look_up, examples=job.examples, pad_id=tokenizer.pad_token_id),
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[Watch(job, run_dir)],
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = resume_point(job, run_dir)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.global_step < job.steps:
        run_dir.stop_if_interrupted()
    trained: Any = trainer.model
    return trained.merge_and_unload() if lora is not None else trained
