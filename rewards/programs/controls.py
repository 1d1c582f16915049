"""Whether an object of the program answers a test because of what it was asked: the test's negative controls.

Where a test compares objects of a class that the program was asked to write, the program answers, and a class
whose `==` is always true would pass. So what was asked up to such an answer is asked again of a fresh process,
with one value changed: then two sides of a comparison differ, and some such change must change the answer.
The program cannot tell these runs from the real one: they differ by a value.
"""

import copy
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

from rewards.programs.remote import COMPARISONS, Pipe

TRIES, REPEATS, MOST_CHECKED = 8, 2, 3
_NEW = ["new"]
_chance = random.SystemRandom()

Log = list[list[Any]]
"""Messages sent to the program, each with its answer."""
Replay = Callable[[list[Any]], Any]
"""The program's answer to the last of some messages, in a fresh process; `None` where it gave none."""


def doubted(log: Log, asked: list[int], replay: Replay) -> str | None:
    """Why an answer at one of these indices of the log does not count; "" where none can tell, else None."""
    for at in _chance.sample(asked, min(MOST_CHECKED, len(asked))):
        answer, tried = log[at][1], False
        for messages in _variants(log, at):
            other = replay(messages)
            if not other or other[0] != "value":
                continue
            tried = True
            runs = [([sent for sent, _ in log[: at + 1]], answer), (messages, other)] * REPEATS
            _chance.shuffle(runs)
            if other[1] != answer[1] and all(replay(again) == same for again, same in runs):
                break
        else:
            return (
                f"an object of the program answers {log[at][0][2]} alike whatever it is asked"
                if tried
                else ""
            )
    return None


def replay(fd: int, messages: list[Any]) -> dict[str, Any]:
    """Send messages to a fresh program at the end of `fd`; `answer`: its answer to the last."""
    pipe = Pipe(fd)
    answer = pipe.receive()
    for message in messages:
        if _NEW in message[3]:
            if answer[0] != "value" or answer[1][0] != "o":
                return {"answer": None}
            message = [*message[:3], [["j", answer[1][1]]], []]
        pipe.send(message)
        while (answer := pipe.receive())[0] == "print":
            pass
    return {"answer": answer}


def _variants(log: Log, at: int) -> Iterator[list[Any]]:
    """What led to an answer, with one value changed; the likeliest to tell first."""
    sent = [message for message, _ in log[: at + 1]]
    _, target, method, args, _ = sent[at]
    theirs = args[0][1] if isinstance(args[0], list) and args[0][0] == "j" else None
    if theirs is not None and method not in ("__eq__", "__ne__", "__contains__"):
        yield [*sent[:at], ["op", theirs, method, [["j", target]], []]]
    sides = [_related(log[:at], number) for number in (target, theirs) if number is not None]
    one_sided = sides[0] ^ sides[1] if theirs is not None else {at}
    changes = list(_changes(sent, sorted(one_sided, reverse=True)[:TRIES]))
    _chance.shuffle(changes)
    changes.sort(key=lambda change: -change[0])
    yield from (messages for _, messages in changes[:TRIES])
    if theirs is not None and not changes:  # both sides come from the same values: another object beside them
        makers = [i for i in sorted(sides[1]) if _made(log[i][1])]
        for i, messages in list(_changes(sent, makers))[:TRIES]:
            yield [*sent[:at], messages[i], ["op", target, method, [_NEW], []]]


def _changes(sent: list[Any], ops: list[int]) -> Iterator[tuple[int, list[Any]]]:
    """Copies of the messages with one value in one of `ops` changed, and which."""
    given = {type(h[i]): set[Any]() for message in sent for h, i in _spots(message)}
    for message in sent:
        for holder, index in _spots(message):
            if not isinstance(holder[index], list):
                given[type(holder[index])].add(holder[index])
    for i in ops:
        if sent[i][2:3] == ["getattr"]:
            continue
        for spot, (holder, index) in enumerate(_spots(sent[i])):
            for value in _others(holder[index], given):
                changed = copy.deepcopy(sent[i])
                holder, index = list(_spots(changed))[spot]
                holder[index] = value
                yield i, [*sent[:i], changed, *sent[i + 1 :]]


def _others(value: Any, given: dict[type, set[Any]]) -> list[Any]:
    """Other values near one and far from it, and some of those that the tests themselves gave."""
    if isinstance(value, bool):
        return [not value]
    near: list[Any]
    if isinstance(value, (int, float)):
        near = [value + 1, value - 1, 2 * value + 3, value + 10**6, -value - 10**6]
    elif isinstance(value, str):
        counted = re.sub(r"\d+", lambda digits: str(int(digits[0]) + 1), value)
        near = [text for text in (counted, value + "x", "q" + value[1:]) if text != value]
    else:
        return []
    beside = sorted(given[type(value)] - {value})
    return near + _chance.sample(beside, min(2, len(beside)))


def _spots(message: list[Any]) -> Iterator[tuple[list[Any], int]]:
    """Where in a message plain values are, and references to objects: list and index."""
    if message[0] != "op" or message[2] in ("global", "member", "batch"):
        return
    first = 1 if message[2] in ("setattr", "delattr") else 0
    waiting = [(message[3], i) for i in range(first, len(message[3]))] + [(pair, 1) for pair in message[4]]
    while waiting:
        holder, index = waiting.pop()
        node = holder[index]
        if not isinstance(node, list) or node[0] in ("j", "o"):
            yield holder, index
        elif node[0] in ("l", "t", "s", "f", "Q"):
            waiting += [(node[1], i) for i in range(len(node[1]))]
        elif node[0] in ("d", "od", "C"):
            waiting += [(pair, i) for pair in node[1] for i in (0, 1)]


def _made(answer: list[Any], kind: str = "o") -> set[int]:
    data = answer[1] if answer[0] == "value" else None
    return {data[1]} if isinstance(data, list) and data[:1] == [kind] else set()


def _related(log: Log, number: int) -> set[int]:
    """Indices of the messages that had to do with an object, or with objects that had to do with it."""
    shared = {0}.union(*(_made(answer, "T") for _, answer in log))  # classes, and functions of the module
    shared |= {n for sent, answer in log if sent[2:3] == ["global"] for n in _made(answer)}
    links = {}
    for i, (sent, answer) in enumerate(log):
        if sent[0] == "op" and sent[2] != "global" and sent[2] not in COMPARISONS:
            objects = {h[at][1] for h, at in _spots(sent) if isinstance(h[at], list) and h[at][0] == "j"}
            links[i] = ({sent[1]} | objects | _made(answer)) - shared
    known, found, grown = {number}, set[int](), True
    while grown:
        more = {i for i, link in links.items() if i not in found and known & link}
        known, found, grown = known.union(*(links[i] for i in more)), found | more, bool(more)
    return found
