"""docs/PAPERS.md and docs/ARCHITECTURE.md are right: symbols, files and settings exist, no equation of the
architecture and no line of Algorithm 1 is left out, and the path to the loss is the one that is shown.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "PAPERS.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
SYMBOL = r"(?:model|rollout|rewards|pipeline|distill)\.[\w.]+"
ROWS = re.findall(rf"^\| (.+?) \| .+? \| `({SYMBOL})` \|$", TEXT, re.MULTILINE)
SECTIONS = {part.partition("\n")[0]: part for part in TEXT.split("\n## ")}


def resolved(symbol: str) -> Any:
    """The module, class, function or setting of that dotted name."""
    parts = symbol.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            fields = {f.name: f for f in dataclasses.fields(found)} if dataclasses.is_dataclass(found) else {}
            assert hasattr(found, name) or name in fields, f"no {symbol}"
            found = getattr(found, name, fields.get(name))
        return found
    pytest.fail(f"no module of {symbol}")


@pytest.mark.parametrize(("equation", "symbol"), ROWS)
def test_the_symbol_exists(equation, symbol):
    assert resolved(symbol) is not None, equation


def test_every_row_of_a_table_of_symbols_has_a_symbol():
    """A row whose symbol the pattern above does not see would not be checked."""
    for title, part in SECTIONS.items():
        if "| symbol |" in part:
            table = part.partition("| symbol |")[2].partition("\n\n")[0].splitlines()[2:]
            found = [row for row in table if re.search(rf"`{SYMBOL}` \|$", row)]
            assert found == table, f"{title}: {set(table) - set(found)}"


def test_every_equation_of_the_architecture_is_in_the_table():
    told: set[int] = set()
    for equation in re.findall(
        r"^\| (Eq\. .+?) \|", SECTIONS["DeepSeek-V3, equation by equation"], re.MULTILINE
    ):
        for first, last in re.findall(r"(\d+)(?: to (\d+))?", equation.partition("Eq. ")[2]):
            told |= set(range(int(first), int(last or first) + 1))
    assert set(range(1, 26)) <= told


def test_every_line_of_algorithm_1_and_every_equation_of_grpo_and_dapo_is_there():
    grpo, dapo = SECTIONS["GRPO, line by line"], SECTIONS["DAPO, equation by equation"]
    assert [*map(int, re.findall(r"Algorithm 1, line (\d+)", grpo))] == [*range(1, 13)]
    assert {"3", "4"} <= set(re.findall(r"Eq\. (\d+)", grpo))
    assert {*map(str, range(8, 14))} <= set(re.findall(r"Eq\. (\d+)", dapo))


def test_every_stage_and_section_of_r1_is_there():
    told = set(re.findall(r"Sec\. (2\.\d(?:\.\d)?)", SECTIONS["DeepSeek-R1, stage by stage"]))
    assert {"2.2.1", "2.2.2", "2.3.1", "2.3.2", "2.3.3", "2.3.4", "2.4"} <= told


@pytest.mark.parametrize("text", [TEXT, ARCHITECTURE], ids=["PAPERS", "ARCHITECTURE"])
def test_every_file_that_is_named_exists(text):
    for file in re.findall(r"`([\w/.]+/[\w/.]+\.(?:py|toml))`", text):
        assert (ROOT / file).is_file(), file


@pytest.mark.parametrize(("file", "line"), re.findall(r"`(configs/[\w/.]+)`: `(.+?)`", TEXT))
def test_a_config_has_the_constant_that_is_shown(file, line):
    config = tomllib.loads((ROOT / file).read_text(encoding="utf-8"))
    assert config.items() >= tomllib.loads(line).items()


# ---- docs/ARCHITECTURE.md


@pytest.mark.parametrize("symbol", sorted(set(re.findall(rf"`({SYMBOL})`", ARCHITECTURE))))
def test_a_name_of_the_architecture_page_exists(symbol):
    if not symbol.endswith(".py"):
        assert resolved(symbol) is not None


def test_the_loss_is_three_hops_from_the_stage_table():
    """Each hop's source names what the next one defines; the stage table names the first."""
    rows = re.findall(r"^\| (\d) \| (.+?) \| (.+?) \|$", ARCHITECTURE, re.MULTILINE)
    hops = [
        (re.findall(r"`(.+?)`", start)[0], re.findall(r"`(pipeline\..+?)`", end)) for _, start, end in rows
    ]
    assert [int(number) for number, *_ in rows] == [1, 2, 3]
    assert hops[0][0] == "pipeline.table.STAGES" and hops[-1][1] == ["pipeline.train.losses.grpo"]
    for (_, before), (start, _) in itertools.pairwise(hops):
        assert start in before
    grpo = next(stage for stage in resolved("pipeline.table.STAGES") if stage.name == "grpo")
    assert f"{grpo.module}.run" == hops[0][1][0]
    for caller, called in (
        ("pipeline.stages.grpo.run", "train_rounds("),
        ("pipeline.stages.grpo.train_rounds", "trainer.step("),
        ("pipeline.stages.grpo.Trainer.step", "self.update("),
        ("pipeline.stages.grpo.Trainer.update", "learner.policy_update("),
        ("pipeline.train.learner.Learner.policy_update", "objective.loss("),
    ):
        assert called in inspect.getsource(resolved(caller)), f"{caller} does not call {called}...)"
    assert resolved("pipeline.train.losses.LOSSES")["grpo"] is resolved("pipeline.train.losses.grpo")
