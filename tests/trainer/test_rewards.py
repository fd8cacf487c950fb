"""Which answers the default reward pays, in the formats that models write, and which it must not."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
import threading
import time

import pytest
from vgpo_trainer.rewards import exact_answer, extract_answer, normalise_answer, symbolic_worker

MATH_VERIFY = importlib.util.find_spec("math_verify") is not None

RIGHT = [
    ("15", "15"),
    ("15.", "15.0"),
    ("<think>7 + 8</think><answer> 15 </answer>", "15"),
    (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
    ("It is long.\nThe answer is: Paris.", "paris"),
    ("Answer: 1,234 \nThat is all.", "1234"),
    ("first line\n  The  Red   door! ", "the red door!"),
    ("-0.50", "-.5"),
    ("\uff11\uff15", "15"),
    ("100", "1e2"),
    # Announcements and their markup.
    ("**Answer**: 5", "5"),
    ("**Final Answer**: 5", "5"),
    ("**Answer:** 5", "5"),
    ("**Answer: 5**", "5"),
    ("__Answer__: 5", "5"),
    ("Answer\uff1a5", "5"),
    ("Answer = 5", "5"),
    ("The answer is 5.", "5"),
    ("The answer is **5**.", "5"),
    ("So the answer would be 5", "5"),
    ("The answers are 2, 3", "2,3"),
    ("The final answer is: $\\boxed{5}$", "5"),
    ("Therefore, the final answer is: $\\boxed{5}$. I hope it is correct.", "5"),
    ("**Answer:**\n5", "5"),
    ("## Answer\n\n5", "5"),
    ("### Final Answer\n**5**\n", "5"),
    ("Answer:\n$$\n5\n$$", "5"),
    ("Answer:\n\\[\n5\n\\]\nThat is it.", "5"),
    ("Answer: 4. No.\nAnswer: 5", "5"),
    ("She has 3.\n#### 5", "5"),
    ("#### 1,234\n", "1234"),
    ("Answer: 5\n#### Explanation\nFive it is", "5"),
    ("2 + 3\n\n```\n5\n```", "5"),
    # Tags and thoughts.
    ("<answer>5</answer>", "5"),
    ("<ANSWER>\n5\n</ANSWER>", "5"),
    ("<answer>The answer is $5$</answer>", "5"),
    ("<answer>\\boxed{5}</answer>", "5"),
    ("<answer>4</answer> or rather <answer>5</answer>", "5"),
    ("It is 4? Answer: 4</think>\n5", "5"),
    ("<think>Answer: 4</think> **Answer**: 5", "5"),
    # Boxes.
    (r"\boxed{4}, then \boxed{5}", "5"),
    (r"\boxed{\boxed{5}}", "5"),
    (r"\boxed {5}", "5"),
    (r"\boxed{\text{A}}", "A"),
    (r"\boxed{\{1, 2\}}", r"\{1,2\}"),
    # LaTeX.
    ("$5$", "5"),
    ("$$5$$", "5"),
    (r"\( 5 \)", "5"),
    (r"\[5\]", "5"),
    (r"\text{red}", "red"),
    (r"\mathrm{red}", "red"),
    (r"\textbf{\text{red}}", "red"),
    (r"\mathbf{5}", "5"),
    (r"\dfrac{1}{2}", "1/2"),
    (r"\frac12", "0.5"),
    (r"\frac1{2}", "1/2"),
    (r"-\frac{1}{2}", "-0.5"),
    (r"\frac{-1}{2}", "-1/2"),
    (r"2\frac{1}{2}", "2.5"),
    (r"-2\frac{1}{2}", "-2.5"),
    ("2 1/2", "5/2"),
    ("½", "0.5"),
    ("2½", "5/2"),
    (r"\frac{x+1}{2}", r"\dfrac{x + 1}{2}"),
    (r"\frac{\sqrt{3}}{2}", "√3/2"),
    (r"\sqrt{12}", "√12"),
    (r"2\sqrt{3}", "2√3"),
    (r"2\pi", "2π"),
    (r"3 \times 4", "3\u00d74"),
    (r"3 \cdot x", "3 * x"),
    ("x^{2}", "x^2"),
    ("x²", "x^2"),
    (r"90^\circ", "90°"),
    (r"90^{\circ}", "90"),
    (r"\left( 1, 2 \right)", "(1,2)"),
    (r"x \leq 5", "x <= 5"),
    (r"x \le 5", "x≤5"),
    (r"\infty", "∞"),
    (r"\$5", "5"),
    ("$5", r"\$5"),
    (r"50\%", "50%"),
    ("50 percent", "50%"),
    (r"10{,}000", "10000"),
    (r"10\,000", "10,000"),
    (r"1.5 \times 10^{3}", "1500"),
    ("3.0 \u00d7 10⁻²", "0.03"),
    # Numbers.
    ("\u22125", "-5"),
    ("The answer is \u22125", "-5"),
    ("\u20135", "-5"),
    ("+5", "5"),
    ("-0", "0"),
    ("1/2", "0.5"),
    ("2/4", "1/2"),
    ("1,234,567.50", "1234567.5"),
    ("five", "5"),
    ("Twelve.", "12"),
    ("7", "seven"),
    ("5 cm", "5"),
    ("5cm", "5"),
    (r"5\text{ cm}", "5"),
    (r"5~\mathrm{cm}^2", "5"),
    ("5 m", "5"),
    ("5%", "5"),
    (r"5\%", "5"),
    ("5 square meters", "5"),
    ("145", "145°"),
    (r"145^\circ", r"145^{\circ}"),
    ("145 degrees", "145°"),
    ("5 cm", "5cm"),
    ("x = 5", "5"),
    ("$x=5$", "5"),
    ("The answer is x = 5.", "5"),
    ("f(x) = x + 1", "x+1"),
    # Choices.
    ("A", "A"),
    ("a", "A"),
    ("(A)", "A"),
    ("A", "(A)"),
    ("A.", "A"),
    ("A)", "A"),
    ("(A).", "A"),
    ("**A**", "A"),
    ("A) the red door", "A"),
    ("A. the red door", "A"),
    ("A: the red door", "A"),
    ("A. Paris, a city", "A"),
    ("(A) the red door", "A"),
    ("(a) the red door", "A"),
    ("**A**. the red door", "A"),
    ("Option A", "A"),
    ("option (A): a cat", "A"),
    ("The answer is (B).", "B"),
    ("The correct option is **B**.", "B"),
    ("The correct answer is: B. 15", "B"),
    (r"\boxed{B. 15}", "B"),
    (r"\boxed{\text{(B)}}", "B"),
    ("B", r"\boxed{B}"),
    ("A, C", "A,C"),
    # Right answers as data sets give them.
    ("5", "<answer> 5 </answer>"),
    ("5", r"\boxed{5}"),
    ("5", "$5$"),
    ("5", "Half of it, so\n#### 5"),
    ("5", "<think>4 + 1</think> <answer> 5 </answer>"),
    ("B", "<answer> B </answer>"),
    (r"\frac{1}{2}", "It is $\\boxed{\\frac12}$."),
    # Texts.
    ("Yes.", "yes"),
    ('"Paris"', "Paris"),
    ("caf\u00e9", "cafe\u0301"),
    ("new\u00a0york", "New York"),
    ("well\u2010known", "well-known"),
    ("O\u2019Neill", "O'Neill"),
    ("red\u200b", "red"),
    ("5 or 6", "5 or 6"),
    ("Strasse", "Stra\u00dfe"),
]

WRONG = [
    ("15", "16"),
    ("1,2", "12"),
    ("1, 234", "1234"),
    ("1 2", "12"),
    ("0.5", "5"),
    ("", "0"),
    ("", ""),
    ("...", "***"),
    ("the answer is 4. No: 5", "4"),
    ("nan", "inf"),
    ("nan", "0"),
    ("inf", "1e400"),
    ("1/0", "0"),
    ("-0.5", "5"),
    ("**Answer**: 15", "5"),
    ("**Answer**: 5", "15"),
    # Hedges: whatever is read is one answer.
    ("The answer is 5 or 6", "6 or 5"),
    ("The answer is 5 or 6", "5"),
    ("The answer is 5 or 6", "6"),
    ("5, 6", "5"),
    ("5, 6", "6"),
    ("5 6", "56"),
    ("5/6", "5"),
    ("answer: 5 answer: 6", "5"),
    (r"\boxed{5} or \boxed{6}", "5"),
    (r"\boxed{5, 6}", "5"),
    (r"\boxed{5 \text{ or } \boxed{6}}", "6"),
    (r"\boxed{5 \text{ or } \boxed{6}}", "5"),
    ("<answer>5</answer><answer>6</answer>", "5"),
    ("<answer>5\n6</answer>", "6"),
    ("<answer>A\nB\nC\nD</answer>", "D"),
    ("5?", "5"),
    ("~5", "5"),
    (r"\approx 5", "5"),
    ("about 5", "5"),
    ("maybe 5", "5"),
    ("not 5", "5"),
    ("5 (or 6)", "5"),
    ("5±1", "5"),
    (">5", "5"),
    ("5-6", "5"),
    ("5\u20136", "5"),
    ("x = 5 or x = 6", "5"),
    ("x = 5 = 6", "6"),
    ("x = 5, y = 6", "5"),
    ("y = 5", "x = 5"),
    ("5", "x = 5"),
    ("x > 5", "5"),
    # An answer within a sentence.
    ("There are 5 apples", "5"),
    ("The answer is 5 because 2 + 3 is", "5"),
    ("I count 5.", "5"),
    ("Paris is the capital", "Paris"),
    ("yes, it is", "yes"),
    # Choices.
    ("A or B", "A"),
    ("A, B", "A"),
    ("A B C D", "A"),
    ("A/B", "A"),
    ("A and B", "A"),
    ("AB", "A"),
    ("A) 4 B) 5 C) 6", "A"),
    ("A) 4, B) 5", "A"),
    ("A. 4 B. 5 C. 6 D. 7", "A"),
    ("(A) 4 (B) 5", "A"),
    ("(a) 4 (b) 5", "A"),
    ("a) 4 b) 5", "A"),
    ("a)4 b)5", "A"),
    ("A) 4 or b", "A"),
    ("A: not B", "A"),
    ("A: or B", "A"),
    ("A cat", "A"),
    ("a cat", "A"),
    ("A. 5", "5"),
    ("(B) red", "A"),
    ("B, not A", "A"),
    ("The answer is A. Or B.", "A"),
    ("A) foo", "B"),
    ("Vitamin A", "A"),
    # Numbers that only look alike.
    ("10²", "102"),
    ("10^2", "102"),
    ("x²", "x2"),
    ("5½", "51/2"),
    ("5 million", "5"),
    ("5k", "5"),
    ("5 dozen", "5"),
    ("5x", "5"),
    ("5m", "5"),
    ("5!", "5"),
    ("5", "5!"),
    ("5", "5%"),
    ("5%", "0.05"),
    ("5", "5 cm"),
    ("5 km", "5 cm"),
    ("5 cm", "5°"),
    ("20", "20 °C"),
    ("\u20ac5", "\u00a35"),
    ("0.333", "1/3"),
    ("0.33333333333333333333", "1/3"),
    ("3.14", r"\pi"),
    ("5e", "5"),
    ("1_000", "1000"),
    ("1,23", "123"),
    ("1,2345", "12345"),
    ("12,34,567", "1234567"),
    ("0x5", "5"),
    ("5.0.0", "5"),
    ("- 5", "5"),
    ("(5)", "-5"),
    ("2+3", "5"),
    ("2*3", "6"),
    (r"\sqrt{25}", "5"),
    ("10/2 = 5", "6"),
    ("1e400", "inf"),
    ("9" * 101, "8" * 101),
    (r"\frac{1}{3}", r"\frac{2}{3}"),
    (r"\frac{1}{2", "1/2"),
    # What was not finished.
    ("<answer> 5", "5"),
    ("<answer>5", "5"),
    (r"\boxed{5", "5"),
    (r"\boxed{}", "5"),
    ("<think>it is 5, so the answer is 5", "5"),
    ("<think>4 + 1</think>", "5"),
    ("<answer>5</answer></think>", "5"),
    ("<think>a</think> <think> Answer: 5", "5"),
    ("Answer:", "5"),
]


@pytest.mark.parametrize(("response", "answer"), RIGHT)
def test_answers_that_are_right(response, answer):
    assert exact_answer([response], [answer]) == [1.0]


@pytest.mark.parametrize(("response", "answer"), WRONG)
def test_answers_that_are_wrong(response, answer):
    assert exact_answer([response], [answer]) == [0.0]


EQUAL = [
    (r"\sqrt{12}", r"2\sqrt{3}"),
    (r"\boxed{\frac{\sqrt{3}}{3}}", r"\frac{1}{\sqrt{3}}"),
    ("x^2 + 2x + 1", "(x+1)^2"),
    (r"\frac{\pi}{3}", "π/3"),
    (r"2\pi r", r"2 r \pi"),
    ("y + x", "x + y"),
    ("x > 5", "5 < x"),
    (r"x = \frac{\pi}{2}", r"\pi/2"),
    (r"\{2, 1\}", r"\{1, 2\}"),
    ("2*x", "2x"),
]
UNEQUAL = [
    (r"\sqrt{13}", r"2\sqrt{3}"),
    ("x + 2", "x + 1"),
    ("x", "y"),
    ("y + 1", "x + 1"),
    ("(2, 1)", "(1, 2)"),
    ("[1, 2]", "(1, 2)"),
    ("3, 2x", "2x, 3"),
    ("x >= 5", "x > 5"),
    (r"-\infty", r"\infty"),
    ("x = x", "x = 5"),
    ("x = 1 = 2\\pi", r"2\pi"),
    (r"1 = \pi", r"\pi"),
    (r"\pi or 2\pi", r"\pi"),
    (r"3.14159265", r"\pi"),
    # The question is no answer.
    (r"\int_0^\pi \frac{x}{\pi} dx", r"\frac{\pi}{2}"),
    (r"\sin(\frac{\pi}{3})", r"\frac{\sqrt{3}}{2}"),
    # What would never end, or fill the memory.
    ("9^{9^{9^{9}}} x", "2x"),
    ("9^9^9^9^9 + x", "x+1"),
    ("(x+1)^999*(y+2)^999", "x+y"),
    ("(" * 90 + "x" + ")" * 90 + "+1", "x+2"),
]


@pytest.mark.skipif(not MATH_VERIFY, reason="math-verify is not installed")
@pytest.mark.parametrize(("response", "answer"), EQUAL)
def test_expressions_that_are_equal(response, answer):
    assert exact_answer([response], [answer]) == [1.0]


@pytest.mark.parametrize(("response", "answer"), UNEQUAL)
def test_expressions_that_are_not_equal(response, answer):
    begin = time.monotonic()
    assert exact_answer([response], [answer]) == [0.0]
    assert time.monotonic() - begin < 15


@pytest.mark.skipif(not MATH_VERIFY, reason="math-verify is not installed")
def test_expressions_are_compared_in_threads_as_well():
    found: list[float | None] = []

    def judge(number: int) -> None:
        found.extend(exact_answer([rf"\sqrt{{{4 * number}}}x"], [rf"2\sqrt{{{number}}}x"]))

    threads = [threading.Thread(target=judge, args=(number,)) for number in (101, 103, 105, 107)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == [1.0] * 4


def test_expressions_are_compared_where_the_system_limits_no_memory():
    """macOS refuses the limit; and so would nothing be equal."""
    program = """
import resource, runpy, sys, types
def refuse(*arguments):
    raise ValueError("current limit exceeds maximum limit")
resource.setrlimit = refuse
fake = types.ModuleType("math_verify")
fake.LatexExtractionConfig, fake.parse = object, lambda text, *rest, **options: [text]
fake.verify = lambda right, given, **options: right == given
sys.modules["math_verify"] = fake
runpy.run_path(sys.argv[1], run_name="__main__")
"""
    command = [sys.executable, "-c", program, symbolic_worker.__file__]
    said = subprocess.run(command, input="x\tx\nx\ty\n", capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["ready", "equal", "different"]


@pytest.mark.skipif(MATH_VERIFY, reason="math-verify is installed")
def test_without_math_verify_expressions_are_texts():
    assert exact_answer([r"\sqrt{12}", "x + 1"], [r"2\sqrt{3}", "x+1"]) == [0.0, 1.0]


@pytest.mark.parametrize(
    "part",
    [
        "<answer>", "</answer>", "<answer>5</answer>", "<think>", "</think>", r"\boxed{", r"\boxed{5}", "}", "{",
        r"\text{", r"\frac{", r"\frac", "$", "**", "* ", "answer is ", "answer: ", "answer:\n", "answer\n", "####",
        "#### 5\n", " ", "\n", "\t", "9", "9,", "(A", "A) ", "1/", "x=", "\\", "`", "```\n", "_", "-", "^{", "√",
        "½", "²",
    ],
)  # fmt: skip
def test_no_response_takes_long_to_read(part):
    """What would take a pattern that goes back, or a scan within a scan, minutes."""
    text = part * (200_000 // len(part))
    begin = time.monotonic()
    exact_answer([text, f"Answer: {text}", f"<answer>{text}</answer>", rf"\boxed{{{text}}}"], ["5", "A", "x+1", "B"])
    assert time.monotonic() - begin < 3


@pytest.mark.parametrize("part", [r"\text{", r"\frac{1}{", "{", "9", "9,", "x ", "((", "A ", "√", "²"])
def test_no_right_answer_takes_long_to_read(part):
    begin = time.monotonic()
    exact_answer(["5", part * 500], [part * 2000, part * 2000])
    assert time.monotonic() - begin < 3


ALTERNATIVES = ["5", "6", "56", "-5", "1/2", "A", "B", "C", "D", "red", "yes", "5, 6", "x + 1", r"2\sqrt{3}"]
FRAGMENTS = ["5", "6", "-", "A", "B", "(C)", "D.", "a)", "or", "and", ",", ";", "/", "\n", ":", "answer is", "Answer:"]
FRAGMENTS += [r"\boxed{", "}", "<answer>", "</answer>", "**", "$", "red", "yes", "x", "+ 1", "####", "</think>", "="]
FRAGMENTS += [r"\frac{1}{2}", r"\text{", "1/2", r"2\sqrt{3}", "correct option is", "option", "%", "cm", "not", "²", "½"]


def test_no_response_is_paid_for_two_answers():
    """Whatever a response says, it holds one answer at most."""
    choose = random.Random(0)
    paid = 0
    for _ in range(1500):
        response = "".join(choose.choice(FRAGMENTS) + choose.choice(["", " "]) for _ in range(choose.randint(1, 9)))
        right = [answer for answer in ALTERNATIVES if exact_answer([response], [answer]) == [1.0]]
        assert len(right) <= 1, (response, right)
        paid += len(right)
    assert paid > 30


def test_each_of_several_right_answers_counts():
    responses = ["NYC", "New York", "Boston"]
    assert exact_answer(responses, [["New York", "NYC"]] * 3) == [1.0, 1.0, 0.0]


def test_a_row_without_an_answer_gets_no_reward():
    extras, metrics = {}, {}
    rewards = exact_answer(
        ["5", "5", "6"], ["5", None, "5"], log_extra=extras.__setitem__, log_metric=metrics.__setitem__
    )
    assert (rewards, extras, metrics) == ([1.0, None, 0.0], {"correct": [True, None, False]}, {"accuracy": 0.5})


def test_a_number_beyond_writing_down_is_text():
    assert normalise_answer("1e999999999999") == "1e999999999999"
    assert normalise_answer("1" * 300) == "1" * 300


def test_an_unclosed_box_is_no_answer():
    assert extract_answer(r"\boxed{4} then \boxed{5") == "4"


def test_the_reward_reports_accuracy():
    extras, metrics = {}, {}
    messages = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in ("3", "4")]
    rewards = exact_answer(messages, ["3", "3"], log_extra=extras.__setitem__, log_metric=metrics.__setitem__)
    assert (rewards, extras, metrics) == ([1.0, 0.0], {"correct": [True, False]}, {"accuracy": 0.5})
