"""What rollouts and the metrics of their steps show without the model: a function a kind.

Bounds are chosen so that sound runs, whose end is often certain, short of spread and right, have no finding.
"""

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np

from pipeline.doctor.findings import Finding
from pipeline.doctor.gaps import PRESENT, UNENDED, causes, evidence, signature
from pipeline.doctor.read import Dump, Floats, Line, both_sides

LEAST = 8
"""Rollouts, or groups' pairs, below which nothing is claimed."""
PENALTIES = ("penal", "repet", "overlong", "length", "incorrect", "invalid", "trunc")
"""In names of parts that are 0 where all is well."""
Series = Sequence[dict[str, float]]


def average(values: Sequence[float] | Floats) -> float:
    """Arithmetic mean; 0 of nothing."""
    return float(np.mean(values)) if len(values) else 0.0


def series(dump: Dump) -> Series:
    """Metrics a step, under the names that our runs log: theirs, or those of a dump's rollouts."""
    if dump.metrics:
        return dump.metrics
    out = []
    for step in dump.steps:
        rows = [row for row in dump.rows if row.step == step]
        told = [average(-np.minimum(row.engine, 0)) for row in rows if row.engine is not None]
        told = [row.more["entropy"] for row in rows if "entropy" in row.more] or told
        groups = [g for g in dump.groups() if g[0].step == step]
        spread = [len({r.reward for r in g}) > 1 for g in groups if all(r.reward is not None for r in g)]
        distinct = [len({row.words for row in g}) / len(g) for g in groups]
        found = {
            "step": step,
            "rollout/tokens_mean": average([row.length for row in rows]),
            "reward/mean": average([row.reward for row in rows if row.reward is not None]),
            "policy/entropy": average([t for t in told if np.isfinite(t)]) if told else np.nan,
            "distinct": average(distinct) if distinct else np.nan,
            "reward/groups_with_spread": average(spread) if spread else np.nan,
        }
        out.append({name: value for name, value in found.items() if np.isfinite(value)})
    return out


def ends(steps: Series, name: str) -> tuple[float, float] | None:
    """Means of the first and of the last quarter of at least three steps; of lengths, without what an
    environment wrote."""
    other = "rollout/observed" if name == "rollout/tokens_mean" else ""
    values = [row[name] - row.get(other, 0.0) for row in steps if name in row]
    quarter = max(1, len(values) // 4)
    return (average(values[:quarter]), average(values[-quarter:])) if len(values) >= 3 else None


def succeeds(dump: Dump, steps: Series) -> bool:
    """Whether the latest rewards are near the best there are: then to be certain and brief is no fault."""
    best = max((row.reward for row in dump.rows if row.reward is not None), default=0.0)
    rewards = [row["reward/mean"] for row in steps if "reward/mean" in row]
    return best > 0 and average(rewards[-max(1, len(rewards) // 4) :]) >= 0.75 * best


def collapse(dump: Dump, steps: Series) -> list[Finding]:
    """`entropy_collapse`: to less than a fifth (sound: to a quarter at least); of texts, the share of
    different ones in a group to less than 0.4 of it. `length_collapse`: to less than 0.35. Not of success."""
    if succeeds(dump, steps):
        return []
    out = list[Finding]()
    for name, bound, kind, unit in (
        ("policy/entropy", 0.2, "entropy_collapse", "nats a token"),
        ("distinct", 0.4, "entropy_collapse", "of a group's completions differ"),
        ("rollout/tokens_mean", 0.35, "length_collapse", "long (tokens; of texts characters)"),
    ):
        both = ends(steps, name)
        if both and both[1] < bound * both[0] and kind not in {found.kind for found in out}:
            first, last = int(steps[0]["step"]), int(steps[-1]["step"])
            rewards = ends(steps, "reward/mean") or (0.0, 0.0)
            what = f"{both[0]:.3g} -> {both[1]:.3g} {unit} from step {first} to {last}"
            out.append(
                Finding(kind, f"{what}, while the mean reward went {rewards[0]:.3g} -> {rewards[1]:.3g}")
            )
    return out


def flat_groups(dump: Dump, steps: Series) -> Finding | None:
    """No group had spread in its rewards, or lately less than a tenth had, without success."""
    spread = [row["reward/groups_with_spread"] for row in steps if "reward/groups_with_spread" in row]
    groups = sum(len({row.reward for row in g if row.reward is not None}) >= 1 for g in dump.groups())
    if not spread or (groups < 3 and not dump.metrics):
        return None
    never, late = not any(spread), average(spread[-max(1, len(spread) // 4) :])
    solved = succeeds(dump, steps) and (bool(dump.metrics) or not never)
    if solved or not (never or (late < 0.1 and len(spread) > 1)):
        return None
    rewards = average([row["reward/mean"] for row in steps if "reward/mean" in row])
    what = f"no group of {len(spread)} steps" if never else f"{late:.0%} of the groups of the last steps"
    return Finding("flat_groups", f"{what} had spread in its rewards, whose mean is {rewards:.3g}")


def truncation(dump: Dump, steps: Series) -> Finding | None:
    """A fifth of the completions was cut; where lines do not say, one in five has the largest length."""
    shares = [row["rollout/truncated"] for row in steps if "rollout/truncated" in row]
    told = [row.cut for row in dump.rows if row.cut is not None]
    if shares:
        share, what = average(shares[-max(1, len(shares) // 4) :]), f"of the last of {len(shares)} steps"
    elif told:
        share, what = average(told), f"of {len(told)}"
    else:
        most = max((row.length for row in dump.rows), default=0)
        share, what = (
            average([row.length == most for row in dump.rows]),
            f"of {len(dump.rows)}, all {most} long,",
        )
        if most < 8 or len({row.words for row in dump.rows if row.length == most}) < LEAST:
            return None
    if share < 0.2 or not (shares or len(dump.rows) >= LEAST):
        return None
    return Finding("truncation", f"{share:.0%} of the completions {what} were cut at their limit")


def silent_zero(dump: Dump) -> Finding | None:
    """A reward, or a part of it that is no penalty, is 0 for every rollout, or for all of the last steps
    though it was not before; or the rollouts whose verifier failed have 0."""
    failed = [row for row in dump.rows if row.failed and row.reward == 0]
    kept = [row for row in failed if row.more.get("advantage") or row.more.get("advantages")]
    if len(kept or failed) >= max(2, 0.02 * len(dump.rows)) and (kept or not dump.metrics):
        return Finding("silent_zero", f"{len(failed)} rollouts whose verifier failed have the reward 0")
    names = dict.fromkeys(name for row in dump.rows for name in row.parts)
    for name in ("", *names):
        of = [(row.step, row.parts.get(name) if name else row.reward) for row in dump.rows if not row.failed]
        values = [(step, value) for step, value in of if value is not None]
        if len(values) < 2 * LEAST or any(word in name.lower() for word in PENALTIES):
            continue
        what = f"the {f'part {name!r}' if name else 'reward'} of"
        if not any(value for _, value in values):
            return Finding("silent_zero", f"{what} all {len(values)} rollouts is exactly 0")
        last = max(step for step, value in values if value)
        after = [step for step, _ in values if step > last]
        before = average([value != 0 for step, value in values if step <= last])
        if len(set(after)) >= 2 and before >= 0.2 and len(after) >= 2 * LEAST:
            return Finding(
                "silent_zero", f"{what} all {len(after)} rollouts after step {last:g} is exactly 0"
            )
    return None


def duplicates(dump: Dump) -> Finding | None:
    """More equal pairs in groups than their probability explains. E[p(x)] over samples x is the probability
    that two of a prompt are equal. Without log-probabilities: the same two places of nearly every group are
    equal, and other places are not; or long completions are equal."""
    groups, pairs, equal, expected, long = dump.groups(), 0, 0, 0.0, 0
    places, priced = Counter[tuple[int, int]](), True
    for group in groups:
        words = [row.words for row in group]
        chances = [float(np.exp(row.engine.sum())) for row in group if row.engine is not None]
        priced &= len(chances) == len(group)
        same = [(i, j) for i, j in itertools.combinations(range(len(group)), 2) if words[i] == words[j]]
        places.update(same)
        pairs, equal = pairs + len(group) * (len(group) - 1) // 2, equal + len(same)
        expected += average(chances) * len(group) * (len(group) - 1) / 2
        long += sum(len(group[i].ids) >= 64 or len(group[i].text or "") >= 200 for i, _ in same)
    what = f"{equal} of {pairs} pairs of completions of one prompt are equal"
    if equal < 3:
        return None
    if priced:
        over = equal > 3 * expected + 3
        return Finding("duplicates", f"{what}; their probabilities explain {expected:.1f}") if over else None
    often = [n >= 0.9 * len(groups) for n in places.values()]
    size = max(len(group) for group in groups)
    certain = sum(often) == size * (size - 1) / 2 and succeeds(
        dump, series(dump)
    )  # a policy may be, in the end
    fixed = any(often) and len(groups) >= 3 and not certain
    if fixed or long >= max(3, 0.02 * pairs):
        return Finding(
            "duplicates", what + (", always the same samples" if fixed else f", {long} of them long")
        )
    return None


def micro_batch_loss(dump: Dump) -> Finding | None:
    """Rollouts that are equal, to the engine too, differ in the trainer's log-probabilities; a step has other
    losses with other numbers of micro-batches; or weights differ between micro-batches and not within."""
    scored: dict[tuple[float, str, object], list[Line]] = {}
    losses: dict[float, dict[float, float]] = {}
    shares: dict[float, dict[float, list[float]]] = {}
    for row in dump.rows:
        if row.trainer is not None and row.ids:
            scored.setdefault((row.step, row.group, row.words), []).append(row)
        if {"loss", "micro_batches"} <= row.more.keys():
            losses.setdefault(row.step, {})[row.more["micro_batches"]] = row.more["loss"]
        if {"weight", "micro_batch"} <= row.more.keys():
            shares.setdefault(row.step, {}).setdefault(row.more["micro_batch"], []).append(row.more["weight"])
    apart = 0.0
    for rows in scored.values():
        for one, two in itertools.pairwise(rows):
            if _differ(one.engine, two.engine) < 1e-4:
                apart = max(apart, _differ(one.trainer, two.trainer))
    if apart > 0.01:
        what = f"equal rollouts of a step differ by up to {apart:.2g} nats in the trainer's log-probabilities"
        return Finding("micro_batch_loss", what)
    for step, by_count in losses.items():
        low, high = min(by_count.values()), max(by_count.values())
        if high - low > 0.01 * max(abs(low), abs(high)):
            told = ", ".join(f"{loss:.4g} with {count:g}" for count, loss in sorted(by_count.items()))
            return Finding("micro_batch_loss", f"the loss of step {step:g} is {told} micro-batches")
    for step, by_micro in shares.items():
        means = [average(each) for each in by_micro.values()]
        within = max(max(each) - min(each) for each in by_micro.values())
        if max(means) - min(means) > 0.01 * max(means) + 2 * within:
            told = f"from {min(means):.3g} to {max(means):.3g} between the micro-batches of step {step:g}"
            return Finding("micro_batch_loss", f"a token's weight goes {told}, and is constant within")
    return None


def _differ(a: Floats | None, b: Floats | None) -> float:
    """Largest difference; 0 of what cannot be compared."""
    return float(np.abs(a - b).max()) if a is not None and b is not None and len(a) == len(b) else 0.0


def mismatch(dump: Dump, steps: Series) -> list[Finding]:
    """The causes of a gap between the log-probabilities of engine and trainer, see `pipeline.doctor.gaps`; of
    a run, by the medians over those of its steps that have one."""
    if dump.metrics:
        rows = [row for row in steps if "gap/median" in row]
        sound = any(row.get("policy/mismatch_kl", 1.0) <= PRESENT for row in steps if row not in rows)
        names = [name for name in (rows or [{}])[0] if name.startswith("gap/")]
        usual = {name: float(np.median([row[name] for row in rows if name in row])) for name in names}
        kinds = causes(usual, template=True, updates_began_it=sound)
        kinds = [kind for kind in kinds if not (dump.stale and kind == "stale_weights")]
        return [
            Finding(kind, f"{len(rows)} of {len(steps)} steps; usually {evidence(usual)}") for kind in kinds
        ]
    means = {g[0].group: average([row.reward for row in g if row.reward is not None]) for g in dump.groups()}
    lines = list(both_sides(dump))
    by_step = {step: [line for line in lines if line[0].step == step] for step in dump.steps}
    gaps = {}
    for step, each in [*by_step.items(), (None, lines)]:
        if each:
            starts = np.cumsum([0, *(len(engine) for _, engine, _ in each)])[:-1]
            gains = [(row.reward or 0.0) - means.get(row.group, row.reward or 0.0) for row, _, _ in each]
            engine, trainer = (np.concatenate([line[i] for line in each]) for i in (1, 2))
            gaps[step] = signature(engine, trainer, starts, np.array(gains))
    began = len(gaps) > 2 and not next(iter(gaps.values()))
    found_in = gaps.get(None, {})
    kinds = causes(found_in, template=False, updates_began_it=began)
    return [Finding(kind, evidence(found_in)) for kind in kinds]


def examine(dump: Dump) -> list[Finding]:
    """All that shows without the model."""
    steps = series(dump)
    found = [*mismatch(dump, steps), silent_zero(dump), flat_groups(dump, steps), truncation(dump, steps)]
    found += [micro_batch_loss(dump), duplicates(dump), *collapse(dump, steps)]
    unended = average([row.get("rollout/unended", 0.0) for row in dump.metrics])
    if unended >= UNENDED:
        found.append(Finding("eos", f"{unended:.0%} of the completions that stopped lack their end token"))
    return [each for each in found if each]
