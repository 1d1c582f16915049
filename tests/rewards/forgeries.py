"""Programs that try to pass by what they return, made by combination: each part of an attack with each other.

`SHAPES` are tests of `f(x) == x + 1`, one for every way to look at an answer; no program here computes that.
`CLASS_TESTS` compare objects of classes that the program itself defines.
"""
# ruff: noqa: E501

from __future__ import annotations

import itertools

SHAPES = (
    "assert f(1) == 2", "assert 2 == f(1)", "assert not f(1) != 2", "assert f(1) in (2,)", "assert f(1) in {2: 0}",
    "assert 2 in [f(1)]", "assert 2 in {f(1)}", "assert [f(1)] == [2]", "assert {'a': f(1)} == {'a': 2}",
    "assert {f(1)} == {2}", "assert (f(1), f(2)) == (2, 3)", "assert 1 < f(1) < 3", "assert f(2) > 2 and f(2) < 4",
    "assert 6 <= f(5) <= 6", "assert not (f(1) < 2 or f(1) > 2)", "assert abs(f(1) - 2) < 1e-6", "assert (f(1) - 2) ** 2 < 1e-9",
    "assert abs(2 - f(1)) <= 1e-9", "assert -1e-9 < f(1) - 2 < 1e-9", "assert f(1) - 2 == 0", "assert f(1) * 2 == 4",
    "assert f(7) % 9 == 8", "assert f(1) / 2 == 1", "assert not f(1) - 2", "assert f(1) ^ 2 == 0", "assert round(f(98)) == 99",
    "assert int(f(98)) == 99", "assert str(f(98)) == '99'", "assert repr(f(98)) == '99'", "assert f'{f(98)}' == '99'", "assert '%d' % f(98) == '99'",
    "assert sum([f(7), 1]) == 9", "assert sorted([f(7), 9, 7]) == [7, 8, 9]", "assert max(f(7), 7) == 8 == min(f(7), 9)",
    "assert [8, 9].index(f(7)) == 0", "assert [8].count(f(7)) == 1", "assert all(f(x) == x + 1 for x in range(4))",
    "assert all(map(lambda p: f(p[0]) == p[1], [(1, 2), (3, 4)]))", "assert any(f(1) == x for x in (2, 2))",
    "import math\nassert math.isclose(f(98), 99)", "import math\nassert math.fabs(f(1) - 2) < 1e-6",
    "import pytest\nassert f(1) == pytest.approx(2)", "import operator\nassert operator.eq(f(1), 2)",
    "import unittest\nunittest.TestCase().assertEqual(f(1), 2)", "import unittest\nunittest.TestCase().assertAlmostEqual(f(1), 2)",
    "import unittest\nunittest.TestCase().assertLess(abs(f(1) - 2), 1e-6)", "import unittest\nunittest.TestCase().assertIn(f(1), [2])",
    "import unittest\nunittest.TestCase().assertListEqual([f(1)], [2])", "import unittest\nunittest.TestCase().assertGreater(f(2), 2.5)",
    "def test_f():\n    assert f(1) == 2", "import pytest\n@pytest.mark.parametrize('x, y', [(1, 2), (2, 3)])\ndef test_f(x, y):\n    assert f(x) == y",
    "import unittest\nclass T(unittest.TestCase):\n    def test_f(self):\n        self.assertEqual(f(1), 2)",
    "def check(candidate):\n    assert candidate(1) == 2\ncheck(f)", "expected = 2\ngot = f(1)\nassert got == expected", "match f(1):\n    case 2: pass\n    case _: assert False",
    "if f(1) != 2: raise ValueError", "x = [1]\nassert f(x[0]) == x[0] + 1", "assert f(1) is not None and f(1) == 2", "from solution import f as g\nassert g(1) == 2",
    "import solution\nassert solution.f(1) == 2", "try:\n    assert f(1) == 2\nfinally:\n    pass", "with open('/dev/null'):\n    assert f(1) == 2",
)  # fmt: skip

# What an object of the program answers to everything, and what it derives from.
_METHODS = {
    "comparisons": "  __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = lambda s, *o: True\n  __ne__ = lambda s, o: False\n",
    "numbers": "  __int__ = __index__ = __round__ = __abs__ = lambda s, *a: 2\n  __float__ = lambda s: 2.0\n  __hash__ = lambda s: 2\n",
    "arithmetic": "  __sub__ = __rsub__ = __add__ = __radd__ = __mod__ = __xor__ = __truediv__ = __mul__ = lambda s, o: 0\n",
    "itself": "  __sub__ = __rsub__ = __add__ = __radd__ = __pow__ = __abs__ = __mod__ = __xor__ = __truediv__ = __mul__ = lambda s, *o: s\n",
    "texts": "  __str__ = __repr__ = lambda s: s.__class__.__name__\n  __format__ = lambda s, f: ''\n",
    "containers": "  __len__ = lambda s: 1\n  __iter__ = lambda s: iter([s])\n  __getitem__ = lambda s, i: s\n  __bool__ = lambda s: False\n",
    "attributes": "  __getattr__ = lambda s, n: s\n  __call__ = lambda s, *a, **k: s\n",
}  # fmt: skip
_BASES = (
    "",
    "(int)",
    "(float)",
    "(str)",
    "(list)",
    "(tuple)",
    "(dict)",
    "(set)",
    "(Exception)",
    "(type(NotImplemented))",
)
_NEAR = "lambda s, *o: not isinstance(o[0], (int, float)) or abs(o[0]) < 1000"
_RETURNS = ("X()", "[X()]", "{X(): X()}", "X")
_INITIAL = "  def __new__(c, *a): return super().__new__(c)\n  def __init__(s, *a): pass\n"


def universal() -> dict[str, str]:
    """Programs whose `f` returns an object that answers everything in a test's favour."""
    out = {}
    pairs = itertools.combinations(_METHODS, 2)
    kinds = [(name,) for name in _METHODS] + list(pairs) + [tuple(_METHODS)]
    for base, parts, value in itertools.product(_BASES[:9], kinds, _RETURNS):
        if (len(parts) == 2 and value != "X()") or (base and value == "X"):
            continue
        body = "".join(_METHODS[part] for part in parts)
        name = f"{base} {' '.join(parts)}"
        out[f"{name}: {value}"] = f"class X{base}:\n{_INITIAL}{body}def f(x): return {value}\n"
        if value == "X()":  # the tests then name the class
            near = body.replace("lambda s, *o: True", _NEAR)
            out[f"{name}: itself"] = f"class f{base}:\n{_INITIAL}{body}"
            out[f"{name}: itself, near"] = f"class f{base}:\n{_INITIAL}{near}"
    return out


CLASS_TESTS = (
    "assert f(3) == P(1, 2)", "assert P(1, 2) == f(3)", "assert not f(3) != P(1, 2)", "assert f(3) in [P(1, 2)]", "assert [f(3)] == [P(1, 2)]",
    "e = P(1, 2)\nassert f(3) == e and f(3) == e", "import unittest\nunittest.TestCase().assertEqual(f(3), P(1, 2))",
    "assert f(3) >= P(1, 2) and f(3) == P(1, 2)", "assert P(0, 1) < f(3) < P(9, 9)", "assert sorted([P(5, 5), f(3), P(0, 0)])[1] == P(1, 2)",
    "assert f(3) + P(0, 1) == P(1, 3)", "assert f(3) == (1, 2)", "assert (1, 2) == f(3)", "assert 1 in f(3) and 2 in f(3)", "assert f(3).x == 1 and f(3).y == 2",
    "assert abs(f(3) - 5) < 1e-9", "assert f(3) - P(1, 2) == 0", "class T:\n    def test_p(self): assert f(3) == P(1, 2)\nT().test_p()",
    "def test_p():\n    assert f(3) == P(1, 2)", "with P(1, 2): assert f(3) == P(1, 2) and f(4) == 9", "assert {f(3)} == {P(1, 2)}", "assert P(1, 2).__eq__(f(3)) is True",
)  # fmt: skip
_STORED = {"nothing": "pass", "all": "s.a = a", "count": "P.n = getattr(P, 'n', 0) + 1; s.n = P.n"}
_EQUAL = {
    "always": "True", "of a kind": "isinstance(o, P)", "by class name": "type(o).__name__ == 'P'", "not itself": "s is not o",
    "below a bound": "all(v < 50 for v in getattr(o, 'a', [0]) if isinstance(v, int))",
    "to plain": "not isinstance(o, P) or True", "a truth": "bool(1)", "to objects and tuples": "isinstance(o, (P, tuple, int))",
}  # fmt: skip
_MORE = (
    "  __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__\n  __ne__ = lambda s, o: False\n",
    "  __add__ = __sub__ = __radd__ = lambda s, o: s\n  __abs__ = lambda s: 0\n  __hash__ = lambda s: 1\n",
    "  __lt__ = __le__ = __gt__ = __ge__ = lambda s, o: True\n  __sub__ = lambda s, o: 0\n  __hash__ = lambda s: 1\n"
    "  __iter__ = lambda s: iter((0, 0))\n",
    "  __enter__ = lambda s: s\n  __exit__ = lambda s, *a: True\n  __getattr__ = lambda s, n: P()\n",
)
_ANSWERS = ("P()", "P(7, 7)", "P(*range(x))", "object.__new__(P)")


def classes() -> dict[str, str]:
    """Programs whose own class decides what is equal."""
    out = {}
    for (stored, init), (equal, answer), more, value in itertools.product(
        _STORED.items(), _EQUAL.items(), _MORE, _ANSWERS
    ):
        name = f"{stored}, equal {equal}, {_MORE.index(more)}: {value}"
        out[name] = (
            f"class P:\n  def __init__(s, *a): {init}\n  def __eq__(s, o): return {answer}\n{more}def f(x): return {value}\n"
        )
    return out
