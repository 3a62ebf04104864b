"""A reward that needs no reward model: a text shall read like one for the third grade.

    python ma_ppo.py --reward results/readability.py:readability ...

README.md, beside this file, says what came of it.
"""

import re

GRADE, WORST = 3, -12.0


def readability(prompts, responses, rows):
    """Minus the distance of each response's Flesch-Kincaid grade from 3, -12 at worst.

    The grade is the number of years at an American school after which a text is understood:

        grade = 0.39 words / sentences + 11.8 syllables / words - 15.59

    (Kincaid, Fishburne, Rogers and Chissom, 1975: Derivation of new readability formulas for Navy
    enlisted personnel.) It looks at lengths alone: what the words say, it does not see. So that
    saying nothing does not pay, fewer than 15 words, or no sentence, get -12, too.
    """
    scores = []
    for text in responses:
        words = re.findall(r"[a-z]+(?:['’][a-z]+)?", text.lower())
        # A sentence holds a letter, or the "1." of a list would be one; 3.5 has no end in it.
        *before_ends, _ = re.split(r"[.!?]+(?!\w)", text)
        sentences = sum(bool(re.search("[A-Za-z]", part)) for part in before_ends)
        if len(words) < 15 or sentences == 0:
            scores.append(WORST)
            continue
        count = sum(map(syllables, words))
        grade = 0.39 * len(words) / sentences + 11.8 * count / len(words) - 15.59
        scores.append(max(WORST, -abs(grade - GRADE)))
    return scores


def syllables(word):
    """About how many syllables: the groups of vowels, but for a silent e at the end; at least 1."""
    return max(1, len(re.findall("[aeiouy]+", word.removesuffix("e"))))
