r"""Read one mathematical expression, LaTeX or plain text, completely or not at all.

A grader that drops what it cannot read takes `7 \star 8` for 7. Here every token must belong to the grammar:

    sum      = term (("+" | "-") term)*
    term     = sign* power (("*" | "/" | \cdot | \times | \div | nothing) power)*
    power    = atom ("!" | "%" | degrees)* ["^" power]
    atom     = number | mixed number | name | (sum) | |sum| | \frac.. | \binom.. | \sqrt.. | function argument

A name is a letter or a Greek letter, with a subscript or without. Letters side by side are a product
(`ac+bd`), but more than four of them a word. What people write in two ways is read as they mean it: `\frac12`
is a half, `x^23` the 23rd power, `\sin 2x` the sine of a product, `3\frac12` a mixed number, `1/2x` half of
x."""

import re
from fractions import Fraction
from functools import lru_cache

Tree = tuple  # ("number", Fraction) | ("variable", name) | ("constant", name) | (operation, Tree, ...)

FUNCTIONS = {
    **{name: name for name in "sin cos tan cot sec csc sinh cosh tanh exp ln log lg".split()},  # noqa: SIM905
    **{f"{a}{name}": f"a{name}" for a in ("arc", "a") for name in ("sin", "cos", "tan", "cot", "sec", "csc")},
}
_INVERSE = {name: f"a{name}" for name in ("sin", "cos", "tan", "cot", "sec", "csc")}
_GREEK = frozenset(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta hbar kappa lambda mu nu xi rho "  # noqa: SIM905
    "sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell".split()
)
_ACCENTS = frozenset(("vec", "hat", "bar", "overline", "overrightarrow", "tilde", "mathcal", "dot", "ddot"))
_CONSTANTS = {"pi": "pi", "infty": "inf", "infinity": "inf", "oo": "inf", "inf": "inf"}
_PAIRS = {"(": ")", "[": "]", "{": "}"}
_POSTFIX = {"!": "factorial", "%": "percent", r"\degree": "degree"}
_COMMANDS = {*_GREEK, *_ACCENTS, *FUNCTIONS, *_CONSTANTS} | {
    "triangle", "angle", "frac", "binom", "sqrt", "lfloor", "lceil"
}  # fmt: skip
_NAMES = "|".join(sorted([*FUNCTIONS, "sqrt", "pi", "infinity", "oo", "inf"], key=len, reverse=True))
_TOKEN = re.compile(
    rf"\d*\.\d*\\overline\s*\{{\d+\}}|\d+(?:\.\d*)?|\.\d+|\\[A-Za-z]+|\\.|(?:{_NAMES})(?![a-z])|\S"
)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_ONE_NAME = re.compile(_NAMES)
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))")
_TEN_TO = re.compile(r"(?<=\d)[eE]([+-]?\d{1,3})(?![\d.])")
_MIXED = re.compile(r"(\d+) (\d+) ?/ ?(\d+)(?![\d.!^])")
_MOST_TOKENS = 300
_DEEPEST = 40
_LONGEST_NUMBER = 1200


class Unreadable(ValueError):
    """Not an expression of this grammar."""


@lru_cache(maxsize=8192)
def parse(text: str) -> Tree | None:
    """The tree of a normalised expression, or `None` where any part of it is not understood."""
    text = _TEN_TO.sub(r"\\cdot 10^{\1}", _THOUSANDS.sub("", text))
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    tokens = _TOKEN.findall(text)
    word = any(len(_ONE_NAME.sub("", run)) > 4 for run in _WORD.findall(text))
    if word or not 0 < len(tokens) <= _MOST_TOKENS:
        return None
    parser = _Parser(tokens)
    try:
        tree = parser.sum()
    except ValueError:  # `Unreadable`, or a full stop where a number should be
        return None
    return tree if parser.at == len(tokens) else None


def names(tree: Tree) -> set[str]:
    """The variables in it."""
    if tree[0] == "variable":
        return {tree[1]}
    return set().union(*(names(part) for part in tree[1:] if isinstance(part, tuple)))


def has(tree: Tree, operation: str) -> bool:
    """Whether an operation, or a constant by its name, occurs in it."""
    return operation in tree or any(has(part, operation) for part in tree[1:] if isinstance(part, tuple))


class _Parser:
    """Recursive descent over the tokens; raises `Unreadable`."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.at, self.depth, self.bars = [*tokens, ""], 0, 0, 0

    @property
    def next(self) -> str:
        return self.tokens[self.at]

    def take(self, *symbols: str) -> str:
        """The next token if it is one of `symbols`, else ""."""
        token = self.next
        if not token or token not in symbols:
            return ""
        self.at += 1
        return token

    def between(self, start: str, end: str) -> Tree:
        """The expression in brackets that comes next."""
        bars, self.bars = self.bars, int(start == "|")
        if not self.take(start):
            raise Unreadable(self.next)
        inner = self.sum()
        if not self.take(end):
            raise Unreadable(self.next)
        self.bars = bars
        return inner

    def sum(self) -> Tree:
        terms = [self.term()]
        while sign := self.take("+", "-"):
            term = self.term()
            terms.append(("neg", term) if sign == "-" else term)
        return terms[0] if len(terms) == 1 else ("add", *terms)

    def term(self) -> Tree:
        negative = False
        while sign := self.take("+", "-"):
            negative ^= sign == "-"
        factors = [self.power()]
        while True:
            if self.take("*", r"\cdot", r"\times"):
                factors.append(self.signed())
            elif self.take("/", r"\div"):
                factors.append(("inverse", self.signed()))
            elif self.starts_factor():
                factors.append(self.power())
            else:
                break
        tree: Tree = factors[0] if len(factors) == 1 else ("multiply", *factors)
        return ("neg", tree) if negative else tree

    def signed(self) -> Tree:
        """A factor behind an operator, which may have a sign of its own: `2 * -3`."""
        if sign := self.take("+", "-"):
            return ("neg", self.power()) if sign == "-" else self.power()
        return self.power()

    def starts_factor(self) -> bool:
        """Whether the next token multiplies what stands before it, with no sign between them."""
        token = self.next
        if token == "|":
            return not self.bars
        if token[:1].isdigit() or token[:1] == ".":
            return self.tokens[self.at - 1] in (")", "!")  # a number behind anything else may be an index
        return token[1:] in _COMMANDS if token[:1] == "\\" else token[:1].isalpha() or token in _PAIRS

    def power(self) -> Tree:
        base = self.atom()
        while base[0] != "percent" and (sign := self.take(*_POSTFIX)):
            base = (_POSTFIX[sign], base)
            if sign == self.next:
                raise Unreadable("a double factorial")
        if not self.take("^"):
            return base
        token = self.next
        if token.isdecimal() and len(token) > 1 and self.tokens[self.at + 1] == "^":  # 3^25^2 is 3^2 5^2
            self.tokens[self.at] = token[1:]
            return ("multiply", ("power", base, ("number", Fraction(token[0]))), self.power())
        return ("power", base, self.signed())

    def atom(self) -> Tree:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise Unreadable("nested too deep")
        tree = self.atom_at(self.next)
        self.depth -= 1
        return tree

    def atom_at(self, token: str) -> Tree:
        if not token:
            raise Unreadable("the end")
        if token in _PAIRS:
            return self.between(token, _PAIRS[token])
        if token in (r"\lfloor", r"\lceil", "|"):
            return (token[2:] or "abs", self.between(token, token.replace("\\l", "\\r")))
        self.at += 1
        if token[:1].isdecimal() or token[:1] == ".":
            return self.number(token)
        name = token.removeprefix("\\")
        if name in FUNCTIONS:
            return self.function(FUNCTIONS[name])
        if name == "sqrt":
            degree = self.between("[", "]") if self.next == "[" else ("number", Fraction(2))
            return ("power", self.argument(digits=True), ("inverse", degree))
        if name in _CONSTANTS and not (name == "inf" and token[0] == "\\"):
            return ("constant", _CONSTANTS[name])
        if token in (r"\frac", r"\binom"):
            top, bottom = self.argument(), self.argument()
            return ("multiply", top, ("inverse", bottom)) if name == "frac" else ("binomial", top, bottom)
        if token[0] == "\\" and name in _ACCENTS:
            return self.named(name + self.raw())
        if token in (r"\triangle", r"\angle"):
            while self.next.isupper():
                name += self.raw()
            return ("variable", name)
        if (name in _GREEK and token[0] == "\\") or (len(token) == 1 and token.isascii() and token.isalpha()):
            return self.named(name)
        raise Unreadable(token)

    def named(self, name: str) -> Tree:
        if re.fullmatch(r"\(\d+\)", argument := "".join(self.tokens[self.at : self.at + 3])):
            self.at += 3
            return ("variable", name + argument)  # f(0) is no product
        while self.next == "_" or (self.next == "'" and len(name) == 1):
            name += self.take("_", "'")
            name += self.raw() if name[-1] == "_" else ""
        return ("constant", name) if name in ("e", "i") else ("variable", name)

    def raw(self) -> str:
        """The text of the next token, or of the group in braces that comes next."""
        start = self.at
        self.at += 1
        if self.tokens[start] != "{":
            if not self.tokens[start].isalnum():
                raise Unreadable(self.tokens[start])
            return self.tokens[start]
        while self.next and self.next not in "{}":
            self.at += 1
        if not self.take("}"):
            raise Unreadable(self.next)
        return "".join(self.tokens[start + 1 : self.at - 1])

    def number(self, token: str) -> Tree:
        if len(token) > _LONGEST_NUMBER:
            raise Unreadable("a number of too many digits")
        if "\\" in token:  # 0.1\overline{6}
            fixed, period = token.replace(" ", "").rstrip("}").split("\\overline{")
            nines = (10 ** len(period) - 1) * 10 ** len(fixed.partition(".")[2])
            return ("number", Fraction(fixed + "0") + Fraction(int(period), nines))
        if self.next == "_":
            raise Unreadable("a numeral with a base")
        whole = ("number", Fraction(token.rstrip(".")))
        if self.next != r"\frac" or not token.isdecimal():
            return whole
        fraction = self.atom()
        top, bottom = fraction[1], fraction[2][1]
        mixed = top[0] == bottom[0] == "number" and 0 < top[1] < bottom[1]
        return ("add" if mixed else "multiply", whole, fraction)

    def argument(self, *, digits: bool = False) -> Tree:
        """What \\frac and \\sqrt apply to: a group, or one token, which is one digit of a number."""
        token = self.next
        if token == "{":
            return self.between("{", "}")
        if token[:1].isdecimal() and not digits and len(token) > 1:
            self.tokens[self.at] = token[1:]
            return ("number", Fraction(token[0]))
        if token == "-" or (token == "(" and not digits):
            raise Unreadable(token)
        return self.atom()

    def function(self, name: str) -> Tree:
        exponent = base = None
        if name == "log" and self.take("_"):
            base = self.argument(digits=True)
        if name == "lg":
            base = ("number", Fraction(10))
        if self.take("^"):
            exponent = self.argument(digits=True) if self.next != "-" else self.signed()
        if self.next in _PAIRS:
            inner = self.atom()
        else:
            factors = [self.power()]
            while self.starts_factor() and self.next.removeprefix("\\") not in {"(", "[", "|", *FUNCTIONS}:
                before, coefficient = (self.at, [*self.tokens]), factors[-1][0] in ("number", "constant")
                factors.append(self.power())
                if factors[-1][0] == "power" and not coefficient:  # \sin t e^t is no sine of a product
                    factors.pop()
                    self.at, self.tokens = before
                    break
            inner = factors[0] if len(factors) == 1 else ("multiply", *factors)
        if exponent == ("neg", ("number", Fraction(1))) and name in _INVERSE:
            name, exponent = _INVERSE[name], None
        tree: Tree = (name, inner) if base is None else ("log", inner, base)
        return tree if exponent is None else ("power", tree, exponent)
