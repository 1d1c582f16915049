"""What a prompt's code defines beside the function asked for."""

from rewards.programs.helpers import preamble

PROMPT = '''import math
from typing import List
LIMIT = 5
ANSWER: int = 7
print("not a definition")

class Node:
    def __init__(self, val=0):
        self.val = val

class Solution:
    def solve(self, head): ...

class Later:
    """To be written."""
    def later(self):
        raise NotImplementedError

def given(x):
    """Doubles."""
    return 2 * x

def empty(x):
    """To be written."""

def asked(x):
    """Uses `given`."""
    return given(x)
'''


def test_the_given_is_kept_and_what_is_asked_for_is_not():
    namespace: dict = {}
    exec(preamble(PROMPT, "asked"), namespace)
    assert namespace["given"](4) == 8 and namespace["LIMIT"] == 5 and namespace["ANSWER"] == 7
    assert namespace["Node"](3).val == 3 and namespace["math"]
    assert not {"asked", "empty", "Solution", "Later"} & namespace.keys()


def test_an_entry_point_may_be_a_method_and_a_prompt_may_have_a_fence():
    text = f"Write it.\n\n```python\n{PROMPT}```\n"
    assert "class Node" in preamble(text, "Solution().solve") and "Solution" not in preamble(
        text, "Solution().solve"
    )
    assert preamble("Node = 3\nx = 1", "Node") == "x = 1"


def test_words_are_no_code():
    assert (
        preamble("Write a function that adds.", "add") == preamble("add", "add") == preamble("", "add") == ""
    )
