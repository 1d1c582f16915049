"""A finished student in vLLM: it loads as it lies there and answers a chat message with a think block."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer

from distill.student import run
from pipeline.run.directory import open_run
from pipeline.settings.distill import DistillSettings, StudentOptimSettings
from rollout.text.tokenizer import decode, train_tokenizer
from rollout.types import Problem, Prompt, SamplingParams
from tests.distill.conftest import STAGE, small_llama, toy_rows


def test_vllm_answers_a_chat_message_with_a_think_block(tmp_path: Path) -> None:
    from rollout.vllm.engine import VllmEngine

    trace = {"completion": "<think>\nI add.\n</think>\n<answer>some</answer>"}
    rows = [row | trace for row in toy_rows(60)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_tokenizer((row["question"] + row["completion"] for row in rows), 300)
    tokenizer.save_pretrained(tmp_path / "start")
    small_llama(tokenizer, 64, 128).save_pretrained(tmp_path / "start")
    config = DistillSettings(
        runs=tmp_path, corpus=(str(tmp_path / "corpus.jsonl"),), init_from=str(tmp_path / "start"),
        tokens_per_step=512, max_length=128, steps=50, threads=1, plain_control=False,
        optim=StudentOptimSettings(lr=1e-2),
    )  # fmt: skip
    with open_run(STAGE, config, "") as run_dir:
        assert run_dir is not None
        run(config, run_dir)
    folder = tmp_path / "tiny/distill/student/model"
    spoken = AutoTokenizer.from_pretrained(folder)
    chat = spoken.apply_chat_template([{"role": "user", "content": "1+2"}], add_generation_prompt=True)
    prompt = Prompt(Problem("a", "math", "1+2", "3", (), "", "en"), "r1", tuple(chat["input_ids"]))
    engine = VllmEngine(folder)
    (rollout,) = engine.generate([prompt], SamplingParams(max_tokens=40, temperature=0.0))
    engine.close()
    assert rollout.finish_reason == "stop"
    assert decode(spoken, rollout.token_ids) == "I add.\n</think>\n<answer>some</answer>"
