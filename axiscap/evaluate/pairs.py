"""Two runs compared, pair by pair: the same sample and epoch, uncapped and capped.

From logs of Inspect, whatever task made them, or from two reports of garak. What failed is in no pair: a sample that
ended in an error, an answer that no judge could judge, a sample that only one of the runs has. Each is counted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from axiscap.jsonl import read_lines

#: Scores that are better the lower they are, by their scorers' names, or by their tasks'.
LOWER = frozenset({"harmful", "not_refused", "in_character", "refused", "garak"})
DRAWS = 10_000

#: What names a pair: the sample, and its epoch.
Name = tuple[str, int]


@dataclass(frozen=True)
class Answer:
    """What was said to a prompt, and its score; NaN where there is none, which ``failure`` explains."""

    value: float
    prompt: str = ""
    text: str = ""
    failure: str = ""


@dataclass
class Run:
    """The answers of one run, by task and scorer."""

    name: str
    scores: dict[tuple[str, str], dict[Name, Answer]] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """One score of two runs. Means are of samples, over their epochs; ``interval`` is 95 % of the difference.

    ``fell`` and ``rose`` count the pairs whose score did. ``p_value`` is McNemar's, exact, of yes/no scores with one
    epoch a sample, else None. ``failed`` counts the pairs in which an answer has no score, ``unpaired`` the answers
    that one run alone has.
    """

    task: str
    scorer: str
    lower_is_better: bool
    pairs: int
    samples: int
    failed: int
    unpaired: int
    before: float
    after: float
    difference: float
    interval: tuple[float, float]
    fell: int
    rose: int
    p_value: float | None
    changed: list[tuple[str, Answer, Answer]] = field(repr=False)

    @property
    def drop(self) -> float:
        """How much worse the second run is; negative where it is better."""
        return self.difference if self.lower_is_better else -self.difference

    @property
    def worst_drop(self) -> float:
        """The same where each answer that failed, or that has no partner, were a whole point worse."""
        lost = self.failed + self.unpaired
        return (self.drop * self.pairs + lost) / (self.pairs + lost) if self.pairs else 1.0


def read_logs(name: str, folder: Path) -> Run:
    """A run from the logs in a folder.

    Raises
    ------
    ValueError
        there is no finished log in it.
    """
    from inspect_ai.log import list_eval_logs, read_eval_log

    run = Run(name)
    for info in reversed(list_eval_logs(str(folder))):  # the oldest first, as they ran
        log = read_eval_log(info, exclude_fields={"events", "store", "attachments"})
        if log.status != "success":  # stopped; what it has stands in the log that went on
            continue
        task = log.eval.task.rpartition("/")[2]
        scorers = [scorer.name for scorer in log.eval.scorers or []]
        for sample in log.samples or []:
            asked = sample.input if isinstance(sample.input, str) else "\n\n".join(m.text for m in sample.input)
            said = {"prompt": asked, "text": sample.output.completion}
            if sample.error is not None or sample.limit is not None:
                why = sample.error.message if sample.error else f"stopped by its limit of {sample.limit}"
                found = {scorer: Answer(math.nan, **said, failure=why) for scorer in scorers}
            else:
                found = {}
                for scorer, score in (sample.scores or {}).items():
                    parts = score.value.items() if isinstance(score.value, dict) else [("", score.value)]
                    for part, value in parts:
                        at = f"{scorer}/{part}" if part else scorer
                        as_number, failure = _number(value)
                        found[at] = Answer(as_number, **said, failure=failure and (score.explanation or failure))
            for scorer, answer in found.items():
                run.scores.setdefault((task, scorer), {})[str(sample.id), sample.epoch] = answer
    if not run.scores:
        raise ValueError(f"{folder}: no finished log of Inspect in it")
    return run


def _number(value: object) -> tuple[float, str]:
    """A score as a number, NaN where it is none, and what is wrong; Inspect's own reading makes 0 of nonsense."""
    if isinstance(value, bool | int | float):
        return float(value), "no score" if math.isnan(value) else ""
    text = str(value).strip().lower()
    words = {"c": 1.0, "p": 0.5, "i": 0.0, "n": 0.0, "yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}
    if text in words:
        return words[text], "no answer" if text == "n" else ""
    try:
        return float(text), ""
    except ValueError:
        return math.nan, f"the score {text[:80]!r} is no number"


def read_garak(name: str, path: Path) -> Run:
    """A run from a report of garak (``....report.jsonl``): 1 for each answer that a detector calls a hit.

    A pair has the same probe, prompt and generation.

    Raises
    ------
    ValueError
        the file is no such report, or has no finished attempt.
    OSError
        it cannot be read.
    """
    run, threshold = Run(name), 0.5
    seen: dict[str, int] = {}
    for line in read_lines(path):
        try:
            entry = line.parse()
            kind = entry["entry_type"]
        except (ValueError, KeyError, TypeError) as error:
            raise line.error("not an entry of a report of garak", error) from None
        if kind == "start_run setup":
            threshold = float(entry.get("run.eval_threshold", threshold))
        if kind != "attempt" or entry["status"] != 2:  # only those that the detectors have seen
            continue
        turns = [turn["content"]["text"] or "" for turn in entry["prompt"]["turns"]]
        prompt = "\n\n".join(turns)
        times = seen[prompt] = seen.get(prompt, 0) + 1
        for detector, results in entry["detector_results"].items():
            scores = run.scores.setdefault((entry["probe_classname"], f"garak/{detector}"), {})
            if len(results) != len(entry["outputs"]):
                raise line.error(f"{len(entry['outputs'])} answers, but {len(results)} results")
            for at, (output, result) in enumerate(zip(entry["outputs"], results, strict=True)):
                text = (output or {}).get("text") or ""
                hit = math.nan if result is None else float(result >= threshold)
                failure = "the detector gave no result" if result is None else ""
                scores[f"{prompt} ({times})", at] = Answer(hit, prompt, text, failure)
    if not run.scores:
        raise ValueError(f"{path}: no finished attempt in it")
    return run


def compare(before: Run, after: Run, lower: Iterable[str] = ()) -> list[Difference]:
    """All scores that both runs have, in the order of the first.

    Parameters
    ----------
    before
        the run that is compared with.
    after
        the run that is compared.
    lower
        names of tasks or scorers, beside :data:`LOWER`, that are better the lower they are.

    Raises
    ------
    ValueError
        they have no score in common.
    """
    low = LOWER | set(lower)
    found = [
        _difference(task, scorer, bool(low & {task, scorer, scorer.partition("/")[0]}), scores, after.scores[at])
        for at, scores in before.scores.items()
        for task, scorer in [at]
        if at in after.scores
    ]
    if not found:
        raise ValueError(f"{before.name} and {after.name} have no score in common")
    return found


def described(one: Difference) -> dict[str, Any]:
    """What JSON holds of a difference, which has no NaN."""
    facts = {name: value for name, value in vars(one).items() if name != "changed"}
    facts["interval"] = list(one.interval)
    plain: dict[str, Any] = json.loads(json.dumps(facts), parse_constant=lambda _: None)
    return plain


def _difference(
    task: str, scorer: str, lower: bool, before: Mapping[Name, Answer], after: Mapping[Name, Answer]
) -> Difference:
    def counts(answer: Answer) -> bool:
        # That nothing was answered is a loss of capability, but no proof of harmlessness.
        return not math.isnan(answer.value) and not (lower and answer.failure)

    both = [name for name in before if name in after]
    good = [name for name in both if counts(before[name]) and counts(after[name])]
    by_sample: dict[str, list[tuple[float, float]]] = {}
    for name in good:
        by_sample.setdefault(name[0], []).append((before[name].value, after[name].value))
    means = np.array([np.mean(pairs, axis=0) for pairs in by_sample.values()]).reshape(-1, 2)
    differences = np.array([after[name].value - before[name].value for name in good])
    fell, rose = int((differences < 0).sum()), int((differences > 0).sum())
    yes_no = all({before[name].value, after[name].value} <= {0.0, 1.0} for name in good)
    first, second = means.mean(0).tolist() if len(means) else (math.nan, math.nan)
    return Difference(
        task=task,
        scorer=scorer,
        lower_is_better=lower,
        pairs=len(good),
        samples=len(by_sample),
        failed=len(both) - len(good),
        unpaired=len(before) + len(after) - 2 * len(both),
        before=first,
        after=second,
        difference=second - first,
        interval=interval(means[:, 1] - means[:, 0]),
        fell=fell,
        rose=rose,
        p_value=mcnemar(fell, rose) if yes_no and len(good) == len(by_sample) > 0 else None,
        changed=[(name[0], before[name], after[name]) for name in good if before[name].value != after[name].value],
    )


def interval(differences: np.ndarray) -> tuple[float, float]:
    """95 % of the mean of (N,) differences, by a percentile bootstrap: the samples are drawn again."""
    if len(differences) == 0:
        return math.nan, math.nan
    draw = np.random.default_rng(0)
    means = [differences[draw.integers(len(differences), size=len(differences))].mean() for _ in range(DRAWS)]
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    return low, high


def mcnemar(one: int, other: int) -> float:
    """The exact two-sided p-value of McNemar's test, from the pairs that changed one way and the other."""
    from scipy.stats import binomtest

    return float(binomtest(one, one + other).pvalue) if one + other else 1.0
