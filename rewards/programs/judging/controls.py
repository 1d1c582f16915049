"""Whether an object of the program answers a test because of what it was asked: the test's negative controls.

Where a test compares objects of a class that the program was asked to write, the program answers, so a class
whose `==` is always true would pass. What was asked up to such an answer is therefore asked again of a fresh
process, with one value changed: then two sides of a comparison differ, and the answer must change with them.
Likewise a class that is called with other arguments must make another object.
The program cannot tell these runs from the real one: they differ by a value.
"""

import copy
import math
import random
import re
import string
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from rewards.programs.judging.remote import COMPARISONS, Peer, ProgramGone
from rewards.programs.judging.values import CONTAINERS

MOST_CHECKED, GROUPS = 24, 6
"""Answers of one run that are checked; values that are changed for one of them until a change tells."""
LONGEST_LOG, LARGEST_LOG = 5_000, 4 << 20
"""Messages of a run that can be checked, and their size in bytes."""
_NEW = ["new"]
_OPPOSITE = {"__lt__": "__gt__", "__gt__": "__lt__", "__le__": "__ge__", "__ge__": "__le__"}
_LOOSE = {*_OPPOSITE, "__contains__"}  # a value beside one may have the same answer, all values may not
_chance = random.SystemRandom()

Log = list[list[Any]]
"""Messages sent to the program, each with its answer."""
Replay = Callable[[list[Any]], Any]
"""The program's answer to the last of some messages, in a fresh process; `None` where it gave none."""


def doubted(log: Log, asked: list[int], replay: Replay) -> str | None:
    """Why an answer at one of these indices of the log does not count; "" where none can tell, else None."""
    most = min(MOST_CHECKED, len(asked), max(3, 2_000 // len(log)))  # fewer where each run takes longer
    chosen = _chance.sample(asked, most)
    for at in chosen:
        doubt = _doubt(log, at, replay, 2 if len(chosen) < 3 else 1)
        if doubt is not None:
            return doubt
    return None


def _doubt(log: Log, at: int, replay: Replay, repeats: int) -> str | None:
    """Any change of some value must end equality; some change must end membership or an order."""
    method, answer, tried = log[at][0][2], log[at][1], False
    for group in islice(_groups(log, at), GROUPS):
        answers = [(messages, replay(messages)) for messages in group]
        called = method == "__call__"
        told = [(messages, other) for messages, other in answers if other and (other[0] == "value" or called)]
        tried |= bool(told)
        strict, alone = method in ("__lt__", "__gt__"), len(told) == len(group) == 1
        if strict and alone and told[0][1][1] is answer[1] is True:
            break  # both less and greater
        if told and (any if method in _LOOSE else all)(other[1] != answer[1] for _, other in told):
            flips = [run for run in told if run[1][1] != answer[1]]
            runs = [([sent for sent, _ in log[: at + 1]], answer), flips[0]] * repeats
            _chance.shuffle(runs)  # a program that guesses has to guess all of these
            if all(replay(messages) == same for messages, same in runs):
                return None
    return f"an object of the program answers {method} alike whatever it is asked" if tried else ""


def replay(fd: int, messages: list[Any]) -> dict[str, Any]:
    """Send messages to a fresh program at the end of `fd`; `answer`: that to the last, if there is one."""
    peer = Peer(fd)
    try:
        answer = peer.receive()
        for message in messages:
            if _NEW in message[3]:
                if answer[0] != "value" or answer[1][0] != "o":
                    return {}
                message = [*message[:3], [["j", answer[1][1]]], []]
            peer.send(message)
            while (answer := peer.receive())[0] == "print":
                pass
    except (ProgramGone, LookupError, TypeError):
        return {}
    return {"answer": answer}


def _groups(log: Log, at: int) -> Iterator[list[list[Any]]]:
    """What led to an answer with one value changed in some ways, value by value, the likeliest first."""
    sent = [message for message, _ in log[: at + 1]]
    _, target, method, args, _ = sent[at]
    theirs = args[0][1] if isinstance(args[0], list) and args[0][0] == "j" else None
    if method in _OPPOSITE:
        exchanged = (_OPPOSITE[method], args) if theirs is None else (method, [["j", target]])
        yield [[*sent[:at], ["op", target if theirs is None else theirs, *exchanged, []]]]
    sides = [_related(log[:at], number) for number in (target, theirs) if number is not None]
    one_sided = sorted(sides[0] ^ sides[1], reverse=True) if theirs is not None else [at]
    told = False
    for i, others in _changes(sent, one_sided, method in _LOOSE):
        told = True
        yield [[*sent[:i], other, *sent[i + 1 :]] for other in others]
    if theirs is not None and not told:  # both sides come from the same values: another object beside them
        makers = _changes(sent, [i for i in sorted(sides[1]) if _made(log[i][1])], method in _LOOSE)
        last = ["op", target, method, [_NEW], []]
        yield from ([[*sent[:at], other, last] for other in others] for _, others in makers)


def _changes(sent: list[Any], ops: list[int], far: bool) -> Iterator[tuple[int, list[Any]]]:
    """For each value in the messages `ops`: the message, and copies of it in which that value is another."""
    given: dict[type, set[Any]] = {}
    for message in sent:
        for holder, index in _spots(message):
            if not isinstance(holder[index], list):
                given.setdefault(type(holder[index]), set()).add(holder[index])
    for i in ops:
        for spot, (holder, index) in enumerate(_spots(sent[i])):
            copies = []
            for value in _others(holder[index], given, far):
                copies.append(copy.deepcopy(sent[i]))
                there, at = list(_spots(copies[-1]))[spot]
                there[at] = value
            if copies:
                yield i, copies


def _others(value: Any, given: dict[type, set[Any]], far: bool) -> list[Any]:
    """Values beside one, with `far` some at a distance, and one of those that the tests themselves gave."""
    near: list[Any] = []
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        near = [value + 1, value - 1, 2 * value + 3, *([value + 10**6, -value - 10**6] if far else [])]
        common = math.gcd(*given.get(int, ())) if isinstance(value, int) else 0
        if common > 1:  # where all values are even, say, an odd one would give a control away
            alike = (value + common * step for step in range(-9, 10))
            fresh = [n for n in alike if n not in given[int] and n * value >= 0]
            near += _chance.sample(fresh, min(1, len(fresh)))  # tests may give all that are near
    elif isinstance(value, str):
        near = [re.sub(r"\d+", lambda digits: str(int(digits[0]) + 1), value)]
        near += [_misspelt(value), value + _chance.choice(string.ascii_lowercase)]
    beside = sorted(given.get(type(value), set()) - {value}) if near else []
    return [other for other in near if other != value] + _chance.sample(beside, min(1, len(beside)))


def _misspelt(text: str) -> str:
    """A text with one letter changed, in a way that a program cannot foresee."""
    at = _chance.choice([i for i, sign in enumerate(text) if sign.isalpha()] or [len(text)])
    new = _chance.choice([sign for sign in string.ascii_lowercase if sign != text[at : at + 1].lower()])
    return text[:at] + (new.upper() if text[at : at + 1].isupper() else new) + text[at + 1 :]


def _spots(message: list[Any]) -> Iterator[tuple[list[Any], int]]:
    """Where in a message plain values are, and references to objects: list and index."""
    if message[0] != "op" or message[2] in ("global", "getattr", "batch", "item"):
        return
    first = 1 if message[2] in ("setattr", "delattr") else 0
    waiting = [(message[3], i) for i in range(first, len(message[3]))] + [(pair, 1) for pair in message[4]]
    while waiting:
        holder, index = waiting.pop()
        node = holder[index]
        if not isinstance(node, list) or node[0] in ("j", "o"):
            yield holder, index
        elif node[0] in CONTAINERS:
            waiting += [(node, i) for i in range(1, len(node))]


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
