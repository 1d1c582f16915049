"""Assert-style tests in one process, the program in another, so that the program cannot give the verdict.

`judge` runs the tests. In their namespace the program's functions and classes are stand-ins (`remote`): a
call goes over a socket to `serve` in the program's process, and its answer comes back as data. So expected
values, the tests' source and the verdict exist only outside the program's process: it cannot read them from
frames, the heap or files, cannot patch what compares them, and leaving early leaves the tests unpassed.

What a test believes is decided in one place, `Judge.ask`: plain data, which are compared here. An object of
the program answers a comparison only where its class is one that the tests name, and the verdict stands only
if `controls` shows that another question gets another answer. Built-in names, library modules and what the
tests define are the tests' own.

Known differences from running in one process: an argument changed in place is seen when the statement has
ended, if the call returned something else; a list that a test takes from the program is a copy, so that the
program does not see what the test appends; the tests cannot derive from a class of the program.
"""

import ast
import builtins
import dis
import functools
import importlib
import io
import json
import re
import symtable
import sys
import types
import warnings
from dataclasses import dataclass
from typing import Any

from rewards.programs.judging import controls, pytests
from rewards.programs.judging.remote import (
    ARITHMETIC,
    COMPARISONS,
    PROTOCOL,
    SPECIAL,
    Mirrored,
    Peer,
    ProgramGone,
    Remote,
    at,
    change,
    iterate,
    quiet_loops,
)
from rewards.programs.judging.values import Malformed, is_plain
from rewards.wire import words

_FILE_METHODS = frozenset("read readline readlines write writelines flush seek tell close getvalue".split())  # noqa: SIM905
_PATCHED = re.compile(r"""\bpatch(?:\.\w+)?\(\s*(?!['"](?:builtins\.input|sys\.std)|self)""")  # `mock.patch`
_RUNNER = re.compile(r"(unittest|pytest)\.main\(")
_MODULES = "solution main program module candidate submission answer your_module __main__".split()  # noqa: SIM905


@dataclass(frozen=True)
class _Test:
    """One test text, compiled, and the names in it."""

    code: types.CodeType
    free: frozenset[str]
    """Global names that the text uses and does not bind."""
    suites: tuple[str, ...]
    """Its classes, and its functions that it does not call itself: tests, if their names say so."""
    checked: frozenset[str] | None
    """Names in what is handed to the text's own `check`."""


class Judge(Peer):
    """The tests' end of the socket."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.number(_line)  # object 0: a line of input
        self.gone = self.helped = ""
        self.asked = 0
        self.log: list[list[Any]] = []
        self.doubtful: list[int] = []  # answers in the log that need a control
        self.named: set[int] = set()  # classes that the tests name
        self.functions: set[int] = set()  # and functions
        self._members: dict[tuple[int, int], Any] = {}  # names by which objects were taken from classes
        self._makers: dict[int, int] = {}  # of objects: the class or function that gave each first
        self.helpers: dict[int, str] = {}  # functions that the tests should have brought
        self._holder: types.FrameType | None = None
        self._held: list[tuple[Any, Any]] = []

    def send(self, message: list[Any]) -> None:
        self.log.append([message, None])
        super().send(message)

    def receive(self) -> list[Any]:
        while (message := super().receive())[0] == "print":
            sys.stdout.write(str(message[1]))
        self.log[-1][1] = message
        return message

    def ask(self, number: int, name: str, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """What the test believes of the program's answer."""
        of_program = args and isinstance(args[0], Remote)
        leading = name in COMPARISONS or name in ARITHMETIC  # the question may hold what the test expects
        if leading and not (self._believed(number) and (of_program or is_plain(args[0]))):
            if name == "__contains__":
                return any(item is args[0] or item == args[0] for item in iterate(self._remotes[number]))
            return NotImplemented
        if name == "__exit__":
            args = (*args[:2], None)  # no frames of the test
        self.asked += name != "global"
        value = self._answer_to(number, name, args, kwargs)
        if isinstance(value, Remote) and number not in self.named:
            made = self._makers.setdefault(at(value)[1], number) in self.named
            if made and number in self.functions and args and all(map(is_plain, args)):
                self.doubtful.append(len(self.log) - 1)
        if number in self.helpers and name == "__call__":
            self.helped = f"the tests call {self.helpers[number]}, which neither they nor the prompt define"
            self.doubtful.append(len(self.log) - 1)
        elif leading and value is not NotImplemented and not isinstance(value, Remote):
            if name in COMPARISONS and type(value) is not bool:
                raise TypeError(f"{name} answered with a {type(value).__name__}")
            if name in ARITHMETIC and not of_program:
                self._give_up(f"an object of the program answers {name} with plain data")
            if name not in ("__eq__", "__ne__", "__contains__") or value is (name != "__ne__"):
                self.doubtful.append(len(self.log) - 1)
        elif name == "__exit__" and value:
            return _raised_on_purpose(args[1])
        elif name == "__call__" and number in self.named:
            self._constructed(number, value, args)
        elif name in ("getattr", "item") and number in self._mirrors and isinstance(value, Remote):
            self._taken(number, value, args[0])
        return value

    def _answer_to(self, number: int, name: str, args: tuple[Any, ...], kwargs: Any) -> Any:
        """The program's answer; once it sent nonsense, there are no more."""
        if self.gone:
            raise ProgramGone(self.gone)
        sent = len(self.log)
        try:
            return super().ask(number, name, args, kwargs)
        except (Malformed, ProgramGone, OSError, ValueError, TypeError, LookupError) as error:
            if hasattr(error, "r1_theirs") or len(self.log) == sent:
                raise
            self.gone = str(error) if isinstance(error, (ProgramGone, Malformed)) else "it sent nonsense"
            raise ProgramGone(self.gone) from None

    def _constructed(self, kind: int, value: Any, args: tuple[Any, ...]) -> None:
        """A class makes objects of its own; one that was made elsewhere needs a control."""
        if isinstance(value, BaseException):
            return
        if not isinstance(value, Remote) or not issubclass(type(value), self._mirrors[kind]):
            raise TypeError("a class of the program makes an object that is not its own")
        seen = self._makers.setdefault(at(value)[1], kind)
        if seen != kind and args and all(map(is_plain, args)):
            self.doubtful.append(len(self.log) - 1)

    def _taken(self, kind: int, value: Remote, name: Any) -> None:
        """What two names of a class mean (of an enumeration, mostly) must be two objects."""
        if self._members.setdefault((kind, at(value)[1]), name) != name:
            self._give_up("two names of a class of the program mean the same object")

    def _give_up(self, why: str) -> None:
        self.unjudged = why
        raise TypeError(why)

    def _believed(self, number: int) -> bool:
        mirrors = (kind for kind in type(self._remotes[number]).__mro__ if "r1_class" in vars(kind))
        return not self.named.isdisjoint(at(kind)[1] for kind in mirrors)

    def perform(self, target: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """What the program may do with objects of the tests: their protocols; data of the tests' classes."""
        kind = target if isinstance(target, type) else type(target)
        own = kind.__module__ == "tests"
        if name in ("getattr", "setattr", "delattr"):
            data = kind is not target and not callable(getattr(kind, args[0], None))
            if name == "getattr":
                allowed = own or (data and kind.__module__ == "unittest.mock")
                allowed |= args[0] in (_FILE_METHODS if isinstance(target, io.IOBase) else ())
            else:
                allowed = own and data
            told = name == "getattr" and args[0] in ("__name__", "__doc__")
            if not told and (not allowed or args[0].startswith("_")):
                raise AttributeError(args[0])
        elif name not in PROTOCOL | SPECIAL.keys() or (kind is target and not own):
            raise AttributeError(name)
        return super().perform(target, name, args, kwargs)

    # ---- arguments that the program changed

    def step(self, hold: bool) -> None:
        """Between statements: apply changes; with `hold`, those of the next only when it has ended."""
        frame = sys._getframe(1)
        if self._holder is not frame:
            above = frame.f_back if self._holder else None
            while above and above is not self._holder:
                above = above.f_back
            if above:
                return  # inside a function that the held statement calls
        self.settle()
        self._holder = frame if hold else None

    def settle(self) -> None:
        held, self._held, self._holder = self._held, [], None
        for old, new in held:
            change(old, new)

    def changed(self, old: Any, new: Any, at_once: bool) -> None:
        if self._holder and not at_once:
            self._held.append((old, new))
        else:
            change(old, new)

    def same(self, arg: Any, new: Any) -> Any:
        return arg if new is None or not self._holder else new


def _line() -> str:
    try:
        return builtins.input() + "\n"
    except EOFError:
        return ""


def _raised_on_purpose(error: BaseException | None) -> bool:
    """Whether a test raised this by `raise`, so that a context manager of the program may swallow it."""
    trace = error.__traceback__ if error else None
    if trace is None or isinstance(error, AssertionError):
        return False
    while trace.tb_next:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


@functools.lru_cache(512)
def compiled(text: str, number: int) -> _Test:
    """A test text with steps between its statements; SyntaxError and others where it does not compile."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(text)
        table = symtable.symtable(text, "test", "exec")
    # `unittest.main()` and the like: the judge runs what is defined.
    tree.body = [node for node in tree.body if not _RUNNER.match(ast.unparse(node))]
    symbols, scopes = [], [table]
    while scopes:
        scope = scopes.pop()
        scopes += scope.get_children()
        symbols += [symbol for symbol in scope.get_symbols() if scope is table or symbol.is_global()]
    names = frozenset(symbol.get_name() for symbol in symbols)
    bound = frozenset(s.get_name() for s in symbols if s.is_assigned() or s.is_imported())
    suites, checked, loaded = [], None, set[str]()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            suites.append(node)
            continue
        loaded |= {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
        match node:
            case ast.Expr(value=ast.Call(func=ast.Name(id="check"), args=[given])):
                checked = frozenset(inner.id for inner in ast.walk(given) if isinstance(inner, ast.Name))
    found = tuple(node.name for node in suites if node.name not in loaded or isinstance(node, ast.ClassDef))
    tree.body = _stepped(tree.body)
    code = compile(ast.fix_missing_locations(tree), f"test {number}", "exec")
    return _Test(code, names - bound, found, checked if "check" in bound else None)


def _stepped(body: list[Any]) -> list[Any]:
    out: list[Any] = []
    for node in body:
        for part in (node, *getattr(node, "handlers", ()), *getattr(node, "cases", ())):
            for field in ("body", "orelse", "finalbody"):
                if isinstance(getattr(part, field, None), list) and getattr(part, field):
                    setattr(part, field, _stepped(getattr(part, field)))
        match node:
            case ast.Expr(value=ast.Constant()) | ast.ImportFrom(module="__future__"):
                out.append(node)
                continue
            case ast.Assert(test=ast.BoolOp(values=[_, *rest]) as both):  # `(step, part)[1]`
                pairs = [ast.Tuple([_step(node), part], ast.Load()) for part in rest]
                both.values[1:] = [ast.Subscript(pair, ast.Constant(1), ast.Load()) for pair in pairs]
        out += [ast.Expr(_step(node)), node]
    return [*out, ast.Expr(_step(None))] if out else body


def _step(node: ast.stmt | None) -> ast.expr:
    value = getattr(node, "test", None) or getattr(node, "value", None)
    hold = value is not None
    if isinstance(value, ast.Compare):
        hold = not all(isinstance(op, (ast.Is, ast.IsNot)) for op in value.ops)
    elif isinstance(value, ast.Call):
        inside = [*value.args, *value.keywords]
        hold = any(isinstance(inner, ast.Call) for arg in inside for inner in ast.walk(arg))
    return ast.Call(ast.Name("__step__", ast.Load()), [ast.Constant(hold)], [])


class _Names(dict[str, Any]):
    """The tests' globals; variables of the program are read when a test reads them."""

    def __init__(self, judge: Judge, offered: dict[str, str], tests: list[_Test]) -> None:
        super().__init__(__name__="tests", __step__=judge.step)
        self._judge = judge
        wanted = [name for name in offered if any(name in test.free for test in tests)]
        standard = {name for name in wanted if hasattr(builtins, name) or name in sys.stdlib_module_names}
        about_others = any(offered[name] != "module" for name in wanted if name not in standard)
        self._live = {name for name in wanted if name not in standard or not about_others}
        for name in sorted(wanted, key=lambda name: offered[name] != "class"):
            if offered[name] == "module" and name in standard:
                self[name] = importlib.import_module(name)
            elif name in self._live and offered[name] != "data":
                self[name] = self.fetch(name)
        for test in tests:
            for name in () if test.checked is None else self._live - test.checked:
                if isinstance(self.get(name), (Remote, Mirrored)):
                    judge.helpers[at(self[name])[1]] = name
        sys.modules["tests"] = _module("tests", lambda name: self[name] if name in self else _absent(name))
        program = _module("solution", lambda name: self.fetch(name) if name in offered else _absent(name))
        program.__dict__["__all__"] = [name for name in offered if name[:1] != "_"]
        sys.modules.update(dict.fromkeys(_MODULES, program))

    def fetch(self, name: str) -> Any:
        value = self._judge.ask(0, "global", (name,))
        if isinstance(value, Mirrored) and name[:1].isupper():  # `class f` stands in for a function
            self._judge.named.add(at(value)[1])
        elif isinstance(value, Remote):
            self._judge.functions.add(at(value)[1])
        return value

    def __missing__(self, name: str) -> Any:
        if name not in self._live:
            raise KeyError(name)
        self._judge.asked += 1
        return self.fetch(name)


def _absent(name: str) -> Any:
    raise AttributeError(f"there is no {name}")


def _module(name: str, get: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__["__getattr__"] = get
    return made


def judge(fd: int, tests: list[str], stop_early: bool) -> dict[str, Any]:
    """Run the tests on the program at the end of `fd`: `passed`, `detail`, `log`, `doubtful`; or `error`."""
    compiled_tests = [compiled(test, number) for number, test in enumerate(tests, 1)]
    link = Judge(fd)
    quiet_loops(" ".join(tests))
    passed, detail = 0, ""
    try:
        kind, rest = Peer.receive(link)
        if kind != "ready":
            return {"passed": 0, "detail": f"the program raised {rest}"}
        names = _Names(link, {str(name): str(what) for name, what in rest}, compiled_tests)
    except BaseException as error:
        if isinstance(error, ImportError) and not hasattr(error, "r1_theirs"):
            return {"error": f"the tests need {error.name}, which is not here"}
        return {"passed": 0, "detail": f"{words(error)} before the tests"}
    sys.modules["pytest"] = pytests  # a test may import it
    for number, test in enumerate(compiled_tests, 1):
        try:
            exec(test.code, names)
            link.settle()
            pytests.run([names[name] for name in test.suites if name in names])
            link.settle()
            if link.gone:
                raise ProgramGone(link.gone)  # whatever the test made of it
            passed += 1
        except BaseException as error:
            if isinstance(error, ModuleNotFoundError) and not hasattr(error, "r1_theirs"):
                return {"error": f"test {number} needs {error.name}, which is not here"}
            detail = detail or f"test {number} of {len(tests)}: {words(error)}"
        if (detail and stop_early) or link.gone:
            break
    if passed == len(tests) and not link.asked:
        return {"error": "the tests never asked the program anything"}
    unjudged = link.unjudged or (link.helped if passed == len(tests) else "")
    if passed < len(tests) and any(map(_PATCHED.search, tests)):
        unjudged = "the tests replace what the program uses, in another process"
    result = {"passed": passed, "detail": detail, "unjudged": unjudged}
    if not passed or not link.doubtful:
        return result
    if len(link.log) > controls.LONGEST_LOG or len(json.dumps(link.log)) > controls.LARGEST_LOG:
        return {"error": "the tests ask too much of the program's own objects for it to be checked"}
    return result | {"log": link.log, "doubtful": link.doubtful}
