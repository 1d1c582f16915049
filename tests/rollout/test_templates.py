import copy

import pytest

from rollout.text.templates import next_question
from rollout.text.tokenizer import (
    ASSISTANT,
    BOS,
    EOS,
    TEMPLATES,
    USER,
    completion_text,
    encode_example,
    encode_raw,
    make_prompt,
    template_hash,
)
from rollout.types import Problem, Rollout

QUESTION = "What is {1}+{2}?"  # braces: questions are LaTeX, templates are format strings
WANT = {
    "r1-zero-short": f"User: {QUESTION}\nAssistant:",
    "r1": f"{BOS}{USER}{QUESTION}{ASSISTANT}<think>\n",
    "plain": f"{BOS}{USER}{QUESTION}{ASSISTANT}",
    "boxed": f"{BOS}{USER}{QUESTION}\nPlease reason step by step, and put your final answer within "
    f"\\boxed{{}}.{ASSISTANT}<think>\n",
    "raw": QUESTION,
}


def problem(question=QUESTION):
    return Problem(id="p", kind="math", question=question, answer="3")


@pytest.mark.parametrize("name", WANT)
def test_prompt_text(tokenizer, name):
    prompt = make_prompt(tokenizer, problem(), name)
    assert tokenizer.decode(prompt.token_ids) == WANT[name]
    assert (prompt.template, prompt.problem) == (name, problem())


def test_r1_zero_is_the_papers(tokenizer):
    text = tokenizer.decode(make_prompt(tokenizer, problem(), "r1-zero").token_ids)
    assert text.startswith(
        "A conversation between User and Assistant. The user asks a question, and the Assistant"
    )
    assert "i.e., <think> reasoning process here </think> <answer> answer here </answer>. User: " in text
    assert text.endswith(f"User: {QUESTION}. Assistant:")


SHOTS = [("1+1?", "Two: \\boxed{2}."), (f"{{x}}{EOS}?", "3.")]


def test_worked_examples_come_first(tokenizer, foreign):
    """Earlier turns of a chat, each ended as the model ends an answer; blocks of text, in their order."""
    text = tokenizer.decode(make_prompt(tokenizer, problem(), "qa", SHOTS).token_ids)
    blocks = ["Question: 1+1?\nAnswer: Two: \\boxed{2}.", f"Question: {{x}}{EOS}?\nAnswer: 3."]
    assert text == "\n\n".join([*blocks, f"Question: {QUESTION}\nAnswer:"])
    prompt = make_prompt(tokenizer, problem(), "r1", SHOTS)
    turns = f"{BOS}{USER}1+1?{ASSISTANT}Two: \\boxed{{2}}.{EOS}{USER}{{x}}{EOS}?{ASSISTANT}3.{EOS}"
    assert tokenizer.decode(prompt.token_ids) == f"{turns}{USER}{QUESTION}{ASSISTANT}<think>\n"
    assert prompt.token_ids.count(tokenizer.eos_token_id) == 2, "what reads like one in a question is text"
    asked = foreign.decode(make_prompt(foreign, problem("q"), "boxed", SHOTS[:1]).token_ids)
    assert asked.count("Please reason step by step") == 2 and asked.index("Two:") < asked.index("q\n")
    assert template_hash(tokenizer, "r1", SHOTS) != template_hash(tokenizer, "r1", SHOTS[:1])


@pytest.mark.parametrize(
    "name, mark", [("qa", "\nQuestion:"), ("r1-zero-short", "\nUser:"), ("raw", ""), ("boxed", "")]
)
def test_what_begins_the_next_question(name, mark):
    assert next_question(name) == mark


def test_unknown_template_lists_those_there_are(tokenizer):
    with pytest.raises(ValueError, match="r1-zero-short"):
        make_prompt(tokenizer, problem(), "r2")


@pytest.fixture
def foreign(tokenizer):
    """A chat model that is not ours: another markup, a bos added by the tokenizer, no thinking."""
    from tokenizers import processors

    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, other.bos_token_id)]
    )
    other.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return other


def test_foreign_chat_model_uses_its_own_template(foreign):
    render = {name: foreign.decode(make_prompt(foreign, problem("q"), name).token_ids) for name in TEMPLATES}
    assert render["plain"] == f"{BOS}[user]q[assistant]"
    assert render["r1"] == f"{BOS}[user]q[assistant]<think>\n"
    assert render["boxed"].startswith(f"{BOS}[user]q\nPlease") and render["boxed"].endswith("[assistant]")
    assert render["raw"] == f"{BOS}q"  # its bos, once
    assert (
        foreign.decode(encode_raw(foreign, f"{BOS}q"))
        == f"{BOS}q"
        == foreign.decode(encode_raw(foreign, "q"))
    )
    assert completion_text(foreign, foreign.encode("4", add_special_tokens=False), "boxed") == "4"


def test_chat_template_is_required_where_used(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match="this tokenizer has none"):
        make_prompt(bare, problem(), "r1")
    assert make_prompt(bare, problem(), "r1-zero-short").token_ids


@pytest.mark.parametrize(
    ("name", "opening"),
    [
        ("r1", "<think>\n"),
        ("boxed", "<think>\n"),
        ("plain", ""),
        ("r1-zero", ""),
        ("r1-zero-short", ""),
        ("raw", ""),
    ],
)
def test_completion_text_restores_the_prefill_and_drops_the_eos(tokenizer, name, opening):
    body = "1+2=3\n</think>\n<answer>3</answer>"
    ids = tuple(tokenizer.encode(body + EOS))
    assert completion_text(tokenizer, ids, name) == opening + body
    rollout = Rollout(make_prompt(tokenizer, problem(), name), 0, 0, ids, (0.0,) * len(ids), "stop")
    assert completion_text(tokenizer, rollout, name) == opening + body


def test_completion_text_keeps_a_stop_token_that_is_text(tokenizer):
    ids = tokenizer.encode("<answer>3</answer>")
    assert completion_text(tokenizer, ids, "raw") == "<answer>3</answer>"
    assert completion_text(tokenizer, [], "r1") == "<think>\n"


@pytest.mark.parametrize("name", TEMPLATES)
def test_encode_example_is_what_the_engine_would_have_seen(tokenizer, name):
    body = " 1+2=3\n</think>\n<answer>3</answer>"
    opening = completion_text(tokenizer, [], name)
    prompt_ids, completion_ids = encode_example(tokenizer, QUESTION, name, opening + body)
    assert tuple(prompt_ids) == make_prompt(tokenizer, problem(), name).token_ids
    assert completion_ids[-1] == tokenizer.eos_token_id
    assert completion_text(tokenizer, completion_ids, name) == opening + body
    assert (prompt_ids, completion_ids) == encode_example(tokenizer, QUESTION, name, opening + body + EOS)


def test_encode_example_refuses_a_completion_without_the_prefill(tokenizer):
    with pytest.raises(ValueError, match="prefills"):
        encode_example(tokenizer, QUESTION, "r1", "1+2=3</think>3")


def test_template_hash_changes_with_what_the_template_does(tokenizer, foreign):
    hashes = {name: template_hash(tokenizer, name) for name in TEMPLATES}
    assert hashes["boxed-think"] == hashes["boxed"], "this chat template opens the thinking itself"
    assert len(set(hashes.values())) == len(TEMPLATES) - 1
    assert template_hash(foreign, "boxed-think") != template_hash(foreign, "boxed")
    assert hashes == {name: template_hash(tokenizer, name) for name in TEMPLATES}
    assert template_hash(foreign, "boxed") != hashes["boxed"]
    assert template_hash(foreign, "raw") != hashes["raw"]  # the same text, but a bos before it
