"""Environments of RL's rollouts by name: `python`, `verifiers:NAME`, or a user's own `module:function`.

`python` is a tool. A program at the end of a turn, in `<python>..</python>` or a fence ```` ```python ````,
runs by itself in the sandbox that grades programs, and what it prints is the observation.

`verifiers` is the package, version 0.1, whose `MultiTurnEnv` answers messages; later ones run the model
behind a server of their own. Its rubric scores a rollout that is done: weight the reward `environment`.
"""

import asyncio
import re
from functools import partial
from typing import Any

from pipeline.errors import UserError
from rewards.pool import WorkerPool
from rewards.registry import own_function
from rollout.turns.engine import Answer, Environment, Message, Step
from rollout.types import Kind, Problem

TIMEOUT_S = 5.0
MOST_CHARACTERS = 2_000
"""Of an output that are shown."""
_PROGRAM = re.compile(
    r"(?:<python>(?P<tagged>(?:(?!<python>).)*)</python>"
    r"|^```(?:python|python3|py)[ \t]*\n(?P<fenced>(?:(?!^```).)*)^```)\s*\Z",
    re.DOTALL | re.MULTILINE,
)


def open_environment(name: str, pool: WorkerPool) -> Environment:
    """The environment `name`; programs run in `pool`. A user's function takes a problem and returns the step
    of its rollout; strings in its attribute `stop`, if any, end a turn. Raises `UserError`: as below."""
    if name == "python":
        return Environment(lambda of: partial(python_step, pool, of.kind), ("</python>", "\n```\n"))
    if name.startswith("verifiers:"):
        return verifiers_environment(name.partition(":")[2])
    start = own_function(name, "environment")
    stop: Any = getattr(start, "stop", ())
    if isinstance(stop, str) or not all(isinstance(each, str) and each for each in stop or ()):
        raise UserError(f"environment {name!r}: its `stop` must be a tuple of strings, not {stop!r}")
    return Environment(start, tuple(stop or ()))


def python_step(pool: WorkerPool, kind: Kind, messages: list[Message]) -> str | None:
    """What the program at the end of the latest turn printed, cut, and why it failed. Without one: "" where
    the turn ends as programs do, else None. A fence is the answer to a problem of `kind` code, and no call.
    Raises `TaskFailed`: the sandbox failed, not the program."""
    text = messages[-1]["content"]
    found = _PROGRAM.search(text)
    if not found or (kind == "code" and found["fenced"] is not None):
        return "" if text.rstrip().endswith(("</python>", "```")) else None
    fenced = found["fenced"] is not None
    code = found["fenced" if fenced else "tagged"].strip("\n")
    reply = pool.call({"op": "output", "code": code, "limits": {"timeout_s": TIMEOUT_S}}, TIMEOUT_S + 10)
    shown = reply["output"].rstrip("\n")
    if len(shown) > MOST_CHARACTERS:
        shown = f"{shown[:MOST_CHARACTERS]}... ({len(shown)} characters)"
    shown = "\n".join(filter(None, (shown, reply["why"]))) or "(no output)"
    return f"```output\n{shown}\n```\n" if fenced else f"<output>{shown}</output>"


def verifiers_environment(name: str) -> Environment:
    """What `verifiers.load_environment(name)` makes. Raises `UserError`: it or the package is not installed,
    or of another kind."""
    try:
        import verifiers

        multi_turn, env = verifiers.MultiTurnEnv, verifiers.load_environment(name)
        client = object.__new__(verifiers.clients.OpenAIChatCompletionsClient)  # the model is ours
    except Exception as error:  # a user's module may raise anything
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        way = 'it needs pip install "verifiers<0.2", and the environment installed'
        raise UserError(f"environment 'verifiers:{name}' cannot be loaded ({why}): {way}") from error
    if not isinstance(env, multi_turn) or getattr(env, "tool_defs", None):
        raise UserError(f"'verifiers:{name}' is no MultiTurnEnv of texts; native tool calls are not read")
    rows = {str(row.get("question") or row["prompt"][-1]["content"]): row for row in env.get_dataset()}
    return Environment(lambda of: verifiers_step(env, client, of, rows.get(of.question, {})))


def verifiers_step(env: Any, client: Any, problem: Problem, row: dict[str, Any]) -> Step:
    """The step of one rollout, which does what `MultiTurnEnv.rollout` does, less the model. `row` is the
    environment's own of that question, if it has one."""
    asked = [{"role": "user", "content": problem.question}]
    given = {"prompt": asked, "answer": problem.answer, "example_id": 0, **row}
    state: Any = None

    async def step(text: str) -> Answer:
        nonlocal state
        if state is None:
            state = await env.init_state(given, client, "policy", None)
            state = await env.setup_state(state) or state
            state["asked"] = await env.get_prompt_messages(state)
        turn: dict[str, Any] = dict.fromkeys(("response", "tokens", "reward", "advantage"))
        turn |= {"prompt": state["asked"], "completion": [{"role": "assistant", "content": text}]}
        turn |= {"is_truncated": False, "trajectory_id": state["trajectory_id"], "extras": {}}
        await env.add_trajectory_step(state, turn)
        if not await env.is_completed(state):
            state["asked"] = await env.get_prompt_messages(state)
            if state.get("final_env_response") is None:
                return "\n".join(str(m["content"]) for m in state["asked"][len(turn["prompt"]) + 1 :])
        await env.render_completion(state)
        await env.rubric.score_rollout(state)
        return float(state["reward"])

    return lambda messages: asyncio.run(step(messages[-1]["content"]))
