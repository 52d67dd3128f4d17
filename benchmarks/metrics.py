"""Metrics: CrossFit's seven, SuperNI's two, accuracy by rank classification for T0, and plain equality for strings.

Each takes predictions (strings) and references (one tuple of strings per example), stripped of surrounding white space,
and returns a number times 100. Deviation: Rouge-L comes from rouge-score, SuperNI's scorer; CrossFit uses the older
package "rouge".

Rouge-L knows the letters a-z and digits alone. For tasks in other languages SuperNI's official scorer takes GPT-2's
tokens instead: XLINGUAL.

The libraries of a metric are imported where it is computed: they take seconds.
"""

import functools
import math
import re
import statistics
import string
from collections import Counter

from transformers import AutoTokenizer

from data import Example
from plumbing.backbones import reach_hub
from plumbing.errors import UserError, say_once


def _plain(text: str) -> list[str]:
    """SuperNI's normalisation: lower case, no punctuation, split at white space."""
    return "".join(c for c in text.lower() if c not in string.punctuation).split()


def _normal(text: str) -> list[str]:
    """SQuAD's normalisation: `_plain` without articles."""
    return re.sub(r"\b(a|an|the)\b", " ", " ".join(_plain(text))).split()


def _token_f1(prediction: str, reference: str) -> float:
    p, r = _normal(prediction), _normal(reference)
    common = sum((Counter(p) & Counter(r)).values())
    return 2 * common / (len(p) + len(r)) if common else 0.0


def _best(score):
    """A metric: each example's best score over its references, averaged over examples."""

    def measure(predictions, references) -> float:
        return 100 * statistics.fmean(measure.of_one(p, rs) for p, rs in zip(predictions, references, strict=True))

    measure.of_one = lambda prediction, references: max(score(prediction, r) for r in references)
    return measure


def _classification_f1(predictions, references) -> float:
    """Macro F1, classes being the strings of first references and predictions: a wrong word is a class of its own."""
    from sklearn.metrics import f1_score

    return 100 * float(f1_score([rs[0] for rs in references], predictions, average="macro", zero_division=0))


def _matthews(predictions, references) -> float:
    """Matthews correlation of "acceptable" against everything else (CoLA's labels)."""
    from sklearn.metrics import matthews_corrcoef

    gold, guess = [rs[0] == "acceptable" for rs in references], [p == "acceptable" for p in predictions]
    return 100 * float(matthews_corrcoef(gold, guess))


def _pearson(predictions, references) -> float:
    """Pearson correlation of outputs read as numbers; 0 where it is undefined (no number, or all equal)."""
    from scipy.stats import pearsonr

    try:
        guess, gold = [float(p) for p in predictions], [float(rs[0]) for rs in references]
    except ValueError:
        return 0.0
    defined = len(set(guess)) > 1 and len(set(gold)) > 1 and all(map(math.isfinite, guess))
    return 100 * float(pearsonr(gold, guess).statistic) if defined else 0.0


XLINGUAL = "Rouge-L-xlingual"


class _Tokens:
    """GPT-2's tokens without the mark of a space before them: the official scorer's tokenizer for other languages."""

    def __init__(self):
        reach_hub()
        try:
            self.gpt2 = AutoTokenizer.from_pretrained("gpt2", trust_remote_code=False)
        except Exception:  # network and cache fail in any way
            what = "Rouge-L of a task that is not in English needs the tokenizer of gpt2 from the hub"
            raise UserError(f"{what}, which does not answer: download it once, or leave the task out") from None

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text."""
        return [token.lstrip("Ġ") for token in self.gpt2.tokenize(text)]


@functools.cache
def _scorer(xlingual: bool = False):
    """The official scorer of Rouge-L, of English or of other languages."""
    from rouge_score.rouge_scorer import RougeScorer

    how = {"tokenizer": _Tokens()} if xlingual else {"use_stemmer": True}
    return RougeScorer(["rougeL"], **how)


def _rouge_l(xlingual: bool = False):
    """The metric of `_scorer`."""
    return _best(lambda p, r: _scorer(xlingual).score(r, p)["rougeL"].fmeasure)


METRICS = {
    "exact": _best(lambda p, r: float(p == r)),  # strings: there, case is part of the answer
    "Rank-ACC": _best(lambda p, r: float(p == r)),  # t0: the prediction is one of the choices
    "EM": _best(lambda p, r: float(_normal(p) == _normal(r))),
    "SuperNI-EM": _best(lambda p, r: float(_plain(p) == _plain(r))),
    "ACC": _best(lambda p, r: float(p.lower() == r.lower())),
    "QA-F1": _best(_token_f1),
    "Rouge-L": _rouge_l(),
    XLINGUAL: _rouge_l(xlingual=True),
    "Classification-F1": _classification_f1,
    "Matthew-Correlation": _matthews,
    "Pearson-Correlation": _pearson,
}


def refuse_unread(references: list[str], where: str = ""):
    """Say of how many references Rouge-L reads less than half: they score 0, or by the rest. Raise UserError, which
    begins with `where`, if that is all of them and they are texts in another script."""
    unread = [reference for reference in references if not mostly_read(reference)]
    if not unread:
        return
    text = next((reference for reference in unread if any(map(str.isalnum, reference))), "")
    reads = f"{where}Rouge-L reads the letters a-z and digits alone"
    if text and len(unread) == len(references):
        fix = 'name the language of its outputs by "Output_language" in its file, or leave the task out'
        raise UserError(f"{reads}, and there are few or none in {text[:40]!r}: {fix}")
    say_once(f"{reads}: {len(unread)} of {len(references)} references, as {unread[0][:40]!r}, have few or none")


def mostly_read(text: str) -> bool:
    """Whether Rouge-L, which reads a-z and 0-9, sees at least half of the letters and digits of a text, and one."""
    letters = [character for character in text.lower() if character.isalnum()]
    return bool(letters) and 2 * sum(character.isascii() for character in letters) >= len(letters)


def score(metric: str, predictions: list[str], examples: list[Example]) -> float:
    """Score predictions by a key of METRICS, times 100.

    Raises ValueError if there are no examples, UserError for a reference in another script than Rouge-L reads.
    """
    if not examples:
        raise ValueError("nothing to score: no examples")
    references = [tuple(output.strip() for output in e.outputs) for e in examples]
    if metric == "Rouge-L":
        refuse_unread([reference for several in references for reference in several])
    return METRICS[metric]([p.strip() for p in predictions], references)


def score_one(metric: str, prediction: str, example: Example) -> float:
    """One example's own score, times 100; under a metric over all examples (a correlation, F1 of classes) 100 where the
    prediction is a reference, else 0."""
    of_one = getattr(METRICS[metric], "of_one", lambda p, references: float(p in references))
    return 100 * of_one(prediction.strip(), tuple(output.strip() for output in example.outputs))
