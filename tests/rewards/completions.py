r"""Whole completions with the verdict they deserve: (class and its reason, gold, completion, verdict).

Written for this project. Each class is a way in which graders of saved generations are known to go wrong, or
a habit of a family of models: the classes and their sources are in the comments. `True` is correct, `False`
incorrect; lenient mode.
"""

from __future__ import annotations

Case = tuple[str, str, str, bool]

THINK = "<think>\nLet me see. Maybe \\boxed{9}? The answer is 9. No.\n</think>\n"


def cases() -> list[Case]:
    """All of them."""
    return [(reason, gold, text, want) for reason, rows in CLASSES.items() for gold, text, want in rows]


CLASSES: dict[str, list[tuple[str, str, bool]]] = {
    # Qwen2.5-Math, DeepSeek-R1 and most instruct models since: the prompt asks for a box.
    "boxed": [
        ("5", "Adding, we get $2+3=5$. Thus the sum is $\\boxed{5}$.", True),
        ("5", "Adding, we get $2+3=6$. Thus the sum is $\\boxed{6}$.", False),
        ("\\frac{3}{4}", "So the probability is\n\\[\n\\boxed{\\dfrac{3}{4}}\n\\]", True),
        ("\\frac{3}{4}", "So the probability is\n\\[\n\\boxed{\\frac{4}{3}}\n\\]", False),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "Hence $\\boxed{(3, \\pi/2)}$.", True),
        ("10", "$\\boxed{10}$ is the value, since $5 \\cdot 2 = 10$ and $3^2 = 9$.", True),
        ("x^2+1", "Therefore $f(x) = \\boxed{x^{2}+1}$ for all $x$.", True),
        ("\\{1,2\\}", "The set is \\boxed{\\{1, 2\\}}.", True),
        ("2", "\\boxed{\\text{2}}", True),
        ("2", "\\boxed{x = 2}", True),
        ("2", "\\boxed{ 2 }.", True),
        ("2", "The final answer is \\fbox{2}.", True),
        ("42", "**Answer**\n$$\\boxed{42}$$", True),
        ("\\frac{1}{2}", "$\\boxed{\\frac{1}{2}}$", True),
        ("\\frac{1}{2}", "$\\boxed{\\frac{1}{\\boxed{2}}}$", True),  # a box in a box
        ("7", "\\boxed{\\boxed{7}}", True),
    ],
    # Graders that take the first box, or count boxes in the thinking (open-source RL code, many projects).
    "which box": [
        ("7", "First $\\boxed{3}$ for part one.\n\nThen we add 4, so the answer is $\\boxed{7}$.", True),
        ("3", "First $\\boxed{3}$ for part one.\n\nThen we add 4, so the answer is $\\boxed{7}$.", False),
        ("7", "I got \\boxed{3}. Wait, that is wrong.\n\nRedoing it: \\boxed{7}", True),
        ("7", THINK + "The result is \\boxed{7}.", True),
        ("9", THINK + "The result is \\boxed{7}.", False),
        ("9", THINK + "I cannot say.", False),
        ("7", "thinking \\boxed{9}</think>\n\\boxed{7}", True),  # the template opened the block
        ("9", "thinking \\boxed{9}</think>\nSorry.", False),
        ("7", "Put the answer in \\boxed{}. So: \\boxed{7}. As asked, it is in \\boxed{}.", True),
        ("7", "So \\boxed{7}. (I was told to use \\boxed{your answer}.)", True),
        ("7", "\\boxed{7}\n\\boxed{7}\n\\boxed{7}\n\\boxed{7}", True),  # loops
        ("7", "The answer is $\\boxed{7}$. " * 50 + "The answer is $\\box", True),
    ],
    # Several boxes for one question, and hedging: math-verify joins neighbours, most graders take the last.
    "several boxes": [
        ("2, 3", "The roots are $x=\\boxed{2}$ and $x=\\boxed{3}$.", True),
        ("2, 3", "The roots are \\boxed{3}, \\boxed{2}", True),
        ("3", "It is either \\boxed{2} or \\boxed{3}.", False),
        ("2", "It is either \\boxed{2} or \\boxed{3}.", False),
        ("42", "\\boxed{41 \\text{ or } 42}", False),
        ("42", "\\boxed{41, 42}", False),
        ("42", "<answer>41</answer><answer>42</answer>", False),
        ("15\\frac{39}{40}", "which is $\\boxed{15\\frac{39}{40}}$ or $\\boxed{\\frac{639}{40}}$.", True),
        ("(1,2)", "$x = \\boxed{1}$, $y = \\boxed{2}$", True),
    ],
    # Malformed boxes: cut off, unclosed, the escape \b eaten by a JSON or Python reader.
    "broken boxes": [
        ("12", "So it is $\\boxed{12", False),
        ("1", "So it is $\\boxed{1", False),
        ("\\frac{1}{2}", "So it is $\\boxed{\\frac{1}{2}", False),
        ("5", "So it is $\\boxed{5$.", True),
        ("\\frac{1}{2}", "So it is $\\boxed{\\frac{1}{2}$.", True),
        ("5", "So it is \x08oxed{5}.", True),
        ("5", "So it is boxed{5}.", True),
        ("5", "So it is \\boxed 5", True),
        ("5", "{" * 300 + "\\boxed{5}", True),
        ("5", "}" * 300 + "\\boxed{5}", True),
        ("5", "\\boxed{" * 300, False),
    ],
    # GSM8K's own format and its fine-tunes.
    "hashes": [
        ("18", "16 - 3 - 4 = <<16-3-4=9>>9 eggs\n9 * 2 = $<<9*2=18>>18\n#### 18", True),
        ("18", "She sells 9 eggs. #### 18", True),
        ("18", "#### $18", True),
        ("18", "#### 18 dollars", True),
        ("18", "#### 18.00", True),
        ("70000", "#### 70,000", True),
        ("-38", "So a loss. #### -$38", True),
        ("18", "#### 19", False),
        ("18", "#### 18\n\nQuestion: Tom has 3 apples. How many?\nAnswer: #### 3", True),
        ("3", "#### 18\n\nQuestion: Tom has 3 apples. How many?\nAnswer: #### 3", False),
        ("12", "#### Step 1\nAdd the numbers.\n#### Step 2\nThe answer is 12.", True),
        ("12", "#### 1. Add\n5 + 7 = 12\n#### 2. Finish\nSo there are 12 apples.", True),
    ],
    # Minerva and Llama prompts: "Final Answer: The final answer is $X$. I hope it is correct."
    "final answer": [
        ("\\frac{1}{2}", "Final Answer: The final answer is $\\frac{1}{2}$. I hope it is correct.", True),
        ("5", "The final answer is: $\\boxed{5}$. I hope it is correct.", True),
        ("5", "The final answer is 5. I hope it is correct.", True),
        ("[2,5)", "Final Answer: The final answer is $[2,5)$. I hope it is correct.", True),
        ("[2,5)", "Final Answer: The final answer is $[2,5]$. I hope it is correct.", False),
        ("24", "Final Answer: The final answer is $24$. I hope it is correct.\n\nProblem:\nIf $x=3$?\n\n"
         "Solution: Final Answer: The final answer is $3$. I hope it is correct.", True),
        ("7", "The answer is 6. Let me check. The final answer is 7.", True),
        ("10", "**Final Answer**\n\n10", True),
        ("10", "### Final Answer\n\nThe speed of the boat is $10$ km/h.", True),
        ("10", "## Final Answer:\n$x = 10$", True),
        ("10", "Final answer: 11", False),
        ("7", "so \\boxed{6}. Wait, I added wrongly. The final answer is 7.", True),
    ],
    # Few-shot chain of thought ("So the answer is 11.") and chat models without a box.
    "the answer is": [
        ("11", "She had 5 and got 6 more: 5 + 6 = 11. The answer is 11.", True),
        ("11", "5 + 6 = 11. So the answer is 11", True),
        ("11", "The answer is 12.", False),
        ("11", "The answer is $11$ apples.", True),
        ("11", "The answer is **11**.", True),
        ("11", "**The answer is: 11**", True),
        ("11", "the answer is \\(11\\).", True),
        ("11", "The answer is\n\n\\[ 11 \\]", True),
        ("11", "The answer is: \n$$x = 11$$", True),
        ("3.5", "The answer is 3.5. I am sure.", True),
        ("3", "The answer is 3.5.", False),
        ("18", "The answer is $18 per day.", True),
        ("18", "The answer is that Janet makes $18 every day.", True),
        ("\\sqrt{2}", "Thus, the answer to the problem is $\\sqrt{2}$, as $2 > 1$.", True),
        ("1, 2", "The answers are $1$ and $2$.", True),
        ("1", "The answers are $1$ and $2$.", False),
        ("5", "The answer is not 4. The answer is 5.", True),
        ("4", "The answer is not 4. The answer is 5.", False),
        ("4", "The answer is not 4.", False),
        ("2", "The answer is 1. No, wait: the answer is 2.", True),
        ("1", "The answer is 1. No, wait: the answer is 2.", False),
        ("Evelyn", "The answer is Evelyn.", True),
        ("\\text{Evelyn}", "The student with the greatest speed is Evelyn, so the answer is \\text{Evelyn}.", True),  # noqa: E501
        ("even", "The answer is odd.", False),
        ("3", "My answer is correct because 2 + 1 = 3.", True),
        ("1080", "The answer is 1,080.", True),
        ("16", "The correct answer is 16 square units.", True),
        ("\\frac{2}{3}", "The answer is 2/3.", True),
        ("\\frac{2}{3}", "The answer is 3/2.", False),
    ],
    "answer:": [
        ("12", "Answer: 12", True),
        ("12", "**Answer:** 12", True),
        ("12", "**Answer**: $12$", True),
        ("12", "ANSWER: 12 apples", True),
        ("12", "Answer:\n12", True),
        ("12", "Answer = 12", True),
        ("12", "Ans: 12", True),
        ("12", "A: 12", True),
        ("12", "Answer: 13", False),
        ("12", "Answer: 12 because 3 * 4 = 12", True),
        ("12", "Answer: Let's think. 3 * 4 = 12. So there are 12.", True),
        ("x+1", "Answer: \\(x+1\\)", True),
        ("C", "Answer: C", True),
        ("C", "Answer: (C) 15", True),
        ("C", "Answer: (B)", False),
        ("C", "The correct option is (C).", True),
    ],
    # Chinese completions (Qwen, DeepSeek).
    "chinese": [
        ("42", "所以答案是42。", True),
        ("42", "因此，答案为：$42$。", True),
        ("42", "答案：43", False),
        ("\\sqrt{2}", "最终答案是 \\(\\sqrt{2}\\)。", True),
        ("42", "综上，最终答案：\\boxed{42}。", True),
        ("42", "一共有 6 个盒子，每盒 7 个，所以一共有 42 个。", True),
        ("42", "所以结果是 41。", False),
        ("12", "答案是１２。", True),
    ],
    # R1's format.
    "answer tags": [
        ("7", "<think>3+4</think><answer>7</answer>", True),
        ("7", "<think>3+4</think>\n<answer> \\boxed{7} </answer>", True),
        ("7", "<think>3+4</think><answer>The answer is $7$.</answer>", True),
        ("7", "<think>7</think><answer>8</answer>", False),
        ("7", "<think>a</think><answer></answer>", False),
        ("7", "<think>a</think><answer>I do not know</answer>", False),
        ("7", "<think>so 7</think>\n<answer>7", True),  # the stop text "</answer>" is taken away
        ("7", "Use <answer> tags. <answer>7</answer>", True),
        ("7", "<answer>6</answer> Hm, wrong. <answer>7</answer>", True),
        ("7", "</answer>7<answer>", True),
        ("7", "<think><answer>7</answer>", True),  # never closed: cut, or the tags were not learned
        ("8", "<answer>7</answer> The answer is 8. \\boxed{8}", False),
    ],
    # Nothing but an expression; and what a finished text states last, with no marker at all.
    "bare": [
        ("42", "42", True),
        ("42", " 42.\n", True),
        ("42", "$42$", True),
        ("42", "43", False),
        ("\\frac{1}{2}", "\\frac{1}{2}", True),
        ("\\frac{1}{2}", "1/2", True),
        ("(1,2)", "(1, 2)", True),
        ("C", "C", True),
        ("7", "", False),
        ("7", "   \n", False),
        ("7", "I do not know.", False),
        ("x^2", "x^2", True),
    ],
    "last stated": [
        ("18", "She has 9 eggs left. Therefore, Janet makes $18 every day at the farmers' market.", True),
        ("18", "Therefore, Janet makes $18 every day at the farmers' market with 9 eggs.", True),
        ("9", "Therefore, Janet makes $18 every day at the farmers' market with 9 eggs.", False),
        ("120", "Thus, Josh makes $120 in 2 weeks.", True),
        ("2", "Thus, Josh makes $120 in 2 weeks.", False),
        ("310", "Mason needs 240+70=310 ounces of sugar to make 8 batches of suckers.", True),
        ("5", "We solve for x. Therefore, x = 5.", True),
        ("5", "We solve for $x$.\n\nThus $x = 5$.", True),
        ("5", "We solve.\n\\[ 2x = 10 \\]\n\\[ x = 5 \\]", True),
        ("5", "We solve.\n\\begin{align*} 2x &= 10 \\\\ x &= 5 \\end{align*}", True),
        ("12", "3 * 4 = 12", True),
        ("12", "So 3 times 4 is **12**. I hope this helps! Let me know if you have questions.", True),
        ("12", "So 3 times 4 is 12. Would you like me to explain step 3?", True),
        ("12", "So 3 times 4 is 13.", False),
        ("9", "To find the total, add 4 and 5, which gives 9 apples", True),
        ("2\\sqrt{3}", "Hence the side has length $2\\sqrt{3}$.", True),
        ("2\\sqrt{3}", "Hence the side has length $3\\sqrt{2}$.", False),
        ("2, 3", "So the solutions are $x = 2$ and $x = 3$.", True),
        ("50", "The discount is 50%.", True),
        ("4000", "Thus, Candy will be able to rent out a total of 4000 chairs in two 4-week months.", True),
        ("-120", "The earnings are -$120.", True),
        ("600", "The total cost for all of it is 160 + 440 = 600$", True),
        ("8", "1. Read the problem.\n2. Add 3 and 5.\n3. The total is 8.", True),
        ("3", "1. Read the problem.\n2. Add 3 and 5.\n3. The total is 8.", False),
    ],
    # A text that breaks off has no last statement; what it stated before does not count as the answer.
    "truncated": [
        ("5", "So we have 3 + 2 =", False),
        ("12", "Next we multiply 3 by 4, which gives 12, and", False),
        ("12", "Let $x = 12$ and $y = ", False),
        ("12", "We know that \\[ x = 12", False),
        ("12", "<think>\nSo there are 12 of them. But then the", False),
        ("7", "First the answer is in 7 steps, so we take the", False),
    ],
    # Generations that run on after their own end (base models, wrong stop tokens).
    "run-on": [
        ("7", "\\boxed{7}<|im_end|>\n<|im_start|>user\nNow 3+3?<|im_end|>\n\\boxed{6}", True),
        ("6", "\\boxed{7}<|im_end|>\n<|im_start|>user\nNow 3+3?<|im_end|>\n\\boxed{6}", False),
        ("7", "The answer is 7.\n\nQ: What is 3+3?\nA: The answer is 6.", True),
        ("7", "The answer is 7</s>The answer is 6", True),
        ("7", "The answer is \\boxed{7}.\n\nHuman: thanks\n\nAssistant: You are welcome! \\boxed{8}", True),
        ("7", "Problem: what is 3+4?\nSolution: 3+4=7. The answer is 7.", True),
    ],
    "boxes that are taken back": [
        ("4", "$\\boxed{4}$ is wrong; the right answer is 9.", False),
        ("9", "$\\boxed{4}$ is wrong; the right answer is 9.", True),
        ("9", "The answer is not $\\boxed{4}$. It is $\\boxed{9}$.", True),
        ("9", "It is $\\boxed{9}$, not $\\boxed{4}$.", True),
        ("4", "It is $\\boxed{9}$, not $\\boxed{4}$.", False),
    ],
    # A marker counts where a value follows it; in other phrases "answer" and "final answer" mark nothing.
    "markers that state nothing": [
        ("9", "The sum is $\\boxed{9}$. I hope the final answer is easy to read.", True),
        ("9", "The sum is $\\boxed{9}$. The final answer is checked by adding again.", True),
        ("6", "So the answer is 6. As a check, the final answer is in line with the data.", True),
        ("9", "The answer choices are 2, 4 and 6.\nAdding both gives 4 + 5 = 9, so the width is 9.", True),
        ("45", "Final Answer: The smallest $k$ is 45.", True),
        ("7", "Final Answer: The number of zeros of $f(x)$ is 7.", True),
        ("7", "Final Answer: The number of zeros of $f(x)$ is 8.", False),
        ("8", "The answer is more than 8.", False),
        ("8", "The answer is at least 8.", False),
    ],
    "no marker": [
        ("5", "Hence\n\n$$\\cos A = 5$$\n\n<|end_of_text_block|>", True),
        ("63", "所以小红一共有63支笔。", True),
        ("5/8", "所占比例为5/8", True),
        ("\\frac{23}{50}", "There are 23 of them, so the chance is \\frac{23}{50}.", True),
        ("(-\\sqrt{7}, \\sqrt{7})", "\\left(-\\sqrt{7},\\ \\sqrt{7}\\right)\\,", True),
        ("6", "By the table, 6 people would take a room that costs $\\$$250.", True),
        ("even", "even", True), ("even", "odd", False),
        ("6", "So there are six ways.", True), ("6", "So there are seven ways.", False),
        ("D", "I think it's D", True),
        ("4, 9", "Maximum = 9, minimum = 4", True), ("4, 9", "Maximum = 9, minimum = 5", False),
        ("rs(y+2)^2", "rs(2+y)^2", True),
        ("\\frac{1}{8}", "Let us expand: a^2 + b^2 < (a + c/2)^2 + (1/8", False),
    ],
    # Words behind or before a number that make it another, and Chinese choices.
    "words that change what is stated": [
        ("4", "4 is wrong", False),
        ("4", "$4$ is not the right answer.", False),
        ("4", "The answer is the negative of 4", False),
        ("4", "The answer is 4 times 2.", False),
        ("4", "The answer is 4 plus 1.", False),
        ("4", "The result is 4 and it is not a square.", True),
        ("B", "故选：B．", True),
        ("B", "所以选B。", True),
        ("B", "不选B", False),
        ("B", "故选：A、B", False),
    ],
}  # fmt: skip
