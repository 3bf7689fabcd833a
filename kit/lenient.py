"""Lenient grading, for evaluation only: the right answer in another form than the one asked for.

    completion --last_answer--> what follows the thoughts, its last <answer> span if there is one
               --plain--> without marks of Markdown and LaTeX
               --named_letter / same_text--> is it the gold answer?

A model that was not trained on the format writes "The answer is (b), as it is red." Graded by
training's reward, that is wrong, and a comparison with it would compare forms. A reward as lenient
as this would be earned by naming letters here and there: so training never sees it, and evaluation
reports it beside the strict accuracy, which is never higher.

Large harnesses have a parser of answers for each benchmark, or ask a model (eval.py --judge does).
Here one rule grades all: the first part that names a letter decides, and who names two letters in
it has named none. Numbers as words are not converted.

Check this file alone:  pytest tests/test_grpo.py -k lenient tests/test_properties.py
"""

import re

from grpo import accuracy_reward, chosen_letter, same_text


def named_letter(text: str, options: tuple[str, ...]) -> str | None:
    """As chosen_letter, but the letter may be lower case and have a reason behind it. None too if
    that names another one; "A man walks" and "I see" name none.

    >>> texts = "(b) red", "B, as it is red", "B, C", "B. blue", "A man walks"
    >>> [named_letter(text, ("blue", "red", "green")) for text in texts]
    ['B', 'B', None, None, None]
    """
    capital = re.sub(r"^\(?[a-z]\b", lambda first: first[0].upper(), text.strip())
    letter = chosen_letter(capital, options)
    letters = [chr(ord("A") + i) for i in range(len(options))]
    behind = r"\s*[).,:;–-]+(?=\s|$)|\s*\n|\s+(?=because\b|is (?:the )?(?:correct|right)\b)"
    reason = re.match(rf"\(?([A-Z])(?:{behind})\s*(.*)", capital)
    if letter or not reason or reason[1] not in letters:
        return letter
    words = re.findall(r"\b([A-Za-z])\b(?!\s+(?!(?:is|or|and)\b)[a-z])", capital)  # no articles
    named = {chosen_letter(word.upper(), options) for word in words}
    named.add(chosen_letter(reason[2].strip(), options))
    return reason[1] if named <= {reason[1], None} else None


def plain(text: str) -> str:
    """Without marks of Markdown and LaTeX; what is boxed stands behind the word "answer"."""
    return re.sub(r"\\text|[*_`$'\"‘’“”{}]", "", text.replace(r"\boxed", " answer "))


def last_answer(completion: str) -> str:
    """Of what follows the thoughts the last <answer> span, or all of it if there is none."""
    said = completion.rpartition("</think>")[2].partition("<think>")[0]
    return said.rpartition("<answer>")[2].partition("</answer>")[0]


def lenient_accuracy(completion: str, gold: str, options: tuple[str, ...] = ()) -> float:
    """1.0 if accuracy_reward says so, or if the gold answer is given in another form.

    With options, the first part of last_answer that names a letter: what is boxed or behind
    "answer", the last one first; what is behind "option"; all of it; its last line. Open-ended:
    behind the last "answer", or the last line.

    >>> two = ("blue", "red")
    >>> [lenient_accuracy(c, "B", two) for c in ("b", "The answer is **B**.", r"\\boxed{B}", "Red")]
    [1.0, 1.0, 1.0, 1.0]
    >>> [lenient_accuracy(c, "A", two) for c in ("A or B", "A man walks", "<think> so A", "A. red")]
    [0.0, 0.0, 0.0, 0.0]
    >>> [lenient_accuracy("<answer>3</answer> No: <answer>4</answer>", gold) for gold in ("3", "4")]
    [0.0, 1.0]
    """
    if accuracy_reward(completion, gold, options):
        return 1.0
    text = plain(last_answer(completion)).strip()
    last_line = text[text.rfind("\n") + 1 :]
    announced = []
    for word in ("answer", "(?<!not )(?:option|choice)"):
        lead = rf"(?i)\b{word}\b(?:\s|:|is\b|the\b)*"
        ends = [found.end() for found in re.finditer(lead, text)]
        announced += [text[end:] for end in reversed(ends)]
    if options:
        texts = tuple(map(plain, options))
        for part in (*announced, text, last_line):
            if letter := named_letter(part, texts):
                return float(letter == gold)
        return 0.0
    candidates = []
    for part in (*announced[:1], last_line):
        candidates += [part.split("\n")[0], re.split(r"\.\s", part)[0]]
    return float(any(c.strip() and same_text(c, plain(gold)) for c in candidates))
