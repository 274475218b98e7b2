"""The comparison of two runs pair by pair: the same sample and epoch, uncapped and capped.

A run comes from the logs of any Inspect task, or from a report of garak. Failures form no pair, and are counted: a
sample that ended in an error, an answer without a verdict, and a sample that only one run has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from axiscap.data.jsonl import read_lines

#: The names of scorers and tasks whose lower scores are better.
LOWER = frozenset({"harmful", "not_refused", "in_character", "refused", "garak"})
#: The resamples of a bootstrap.
DRAWS = 10_000

#: The name of a pair: the sample's id and the epoch.
Name = tuple[str, int]


@dataclass(frozen=True)
class Answer:
    """An answer to a prompt, and its score. A missing score is NaN, and ``failure`` says why."""

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
    """One score of two runs. ``before``, ``after`` and ``difference`` are means of samples, over their epochs.

    ``interval`` is the 95 % interval of the difference. ``fell`` and ``rose`` count pairs by the change of their score.
    ``p_value`` is exact, by McNemar's test, for yes/no scores with one epoch a sample, else None. ``failed`` counts
    the pairs in which an answer has no score, ``unpaired`` the answers that only one run has.
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
        """How much worse the second run is; negative if it is better."""
        return self.difference if self.lower_is_better else -self.difference

    @property
    def worst_drop(self) -> float:
        """The drop if each failed or unpaired answer counts as one point worse."""
        lost = self.failed + self.unpaired
        return (self.drop * self.pairs + lost) / (self.pairs + lost) if self.pairs else 1.0


def read_logs(name: str, folder: Path) -> Run:
    """The run in a folder of logs.

    Raises
    ------
    ValueError
        the folder has no finished log.
    """
    from inspect_ai.log import list_eval_logs, read_eval_log

    run = Run(name)
    for info in reversed(list_eval_logs(str(folder))):  # the oldest first: later logs replace its answers
        log = read_eval_log(info, exclude_fields={"events", "store", "attachments"})
        if log.status != "success":  # the log that resumed this one has its samples
            continue
        task = log.eval.task.rpartition("/")[2]
        scorers = [scorer.name for scorer in log.eval.scorers or []]
        for sample in log.samples or []:
            for scorer, answer in _read_sample(sample, scorers):
                run.scores.setdefault((task, scorer), {})[str(sample.id), sample.epoch] = answer
    if not run.scores:
        raise ValueError(f"{folder}: no finished log of Inspect in it")
    return run


def _read_sample(sample: Any, scorers: Iterable[str]) -> Iterator[tuple[str, Answer]]:
    """The scored answer of a sample for each scorer, or for each part of a scorer (``scorer/part``)."""
    prompt = sample.input if isinstance(sample.input, str) else "\n\n".join(m.text for m in sample.input)
    texts = {"prompt": prompt, "text": sample.output.completion}
    if sample.error is not None or sample.limit is not None:
        failure = sample.error.message if sample.error else f"stopped by its limit of {sample.limit}"
        for scorer in scorers:
            yield scorer, Answer(math.nan, **texts, failure=failure)
        return
    for scorer, score in (sample.scores or {}).items():
        parts = score.value.items() if isinstance(score.value, dict) else [("", score.value)]
        for part, value in parts:
            number, failure = _number(value)
            answer = Answer(number, **texts, failure=failure and (score.explanation or failure))
            yield f"{scorer}/{part}" if part else scorer, answer


def _number(value: object) -> tuple[float, str]:
    """A score as a number, or NaN and the reason. Inspect's own conversion turns an invalid score into 0."""
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
    """The run of a report of garak (``....report.jsonl``). A score is 1 if a detector calls the answer a hit.

    A pair has the same probe, prompt and generation.

    Raises
    ------
    ValueError
        the file is no such report, or has no finished attempt.
    OSError
        the file cannot be read.
    """
    run, threshold = Run(name), 0.5
    repetitions: dict[str, int] = {}
    for line in read_lines(path):
        try:
            entry = line.parse()
            kind = entry["entry_type"]
        except (ValueError, KeyError, TypeError) as error:
            raise line.error("not an entry of a report of garak", error) from None
        if kind == "start_run setup":
            threshold = float(entry.get("run.eval_threshold", threshold))
        if kind != "attempt" or entry["status"] != 2:  # status 2: the detectors are done
            continue
        turns = [turn["content"]["text"] or "" for turn in entry["prompt"]["turns"]]
        prompt = "\n\n".join(turns)
        repetition = repetitions[prompt] = repetitions.get(prompt, 0) + 1
        for detector, results in entry["detector_results"].items():
            scores = run.scores.setdefault((entry["probe_classname"], f"garak/{detector}"), {})
            if len(results) != len(entry["outputs"]):
                raise line.error(f"{len(entry['outputs'])} answers, but {len(results)} results")
            for generation, (output, result) in enumerate(zip(entry["outputs"], results, strict=True)):
                text = (output or {}).get("text") or ""
                hit = math.nan if result is None else float(result >= threshold)
                failure = "the detector gave no result" if result is None else ""
                scores[f"{prompt} ({repetition})", generation] = Answer(hit, prompt, text, failure)
    if not run.scores:
        raise ValueError(f"{path}: no finished attempt in it")
    return run


def compare(before: Run, after: Run, lower: Iterable[str] = ()) -> list[Difference]:
    """The differences of all scores that both runs have, in the order of ``before``.

    Parameters
    ----------
    lower
        more names of tasks and scorers for :data:`LOWER`.

    Raises
    ------
    ValueError
        the runs have no score in common.
    """
    low = LOWER | set(lower)
    differences = []
    for (task, scorer), scores in before.scores.items():
        if (task, scorer) in after.scores:
            is_low = bool(low & {task, scorer, scorer.partition("/")[0]})
            differences.append(_difference(task, scorer, is_low, scores, after.scores[task, scorer]))
    if not differences:
        raise ValueError(f"{before.name} and {after.name} have no score in common")
    return differences


def described(difference: Difference) -> dict[str, Any]:
    """The difference for JSON: without the changed answers, and with null for NaN."""
    facts = {name: value for name, value in vars(difference).items() if name != "changed"}
    facts["interval"] = list(difference.interval)
    plain: dict[str, Any] = json.loads(json.dumps(facts), parse_constant=lambda _: None)
    return plain


def _difference(
    task: str, scorer: str, lower: bool, before: Mapping[Name, Answer], after: Mapping[Name, Answer]
) -> Difference:
    def counts(answer: Answer) -> bool:
        # A missing answer is a loss of capability, but no proof of harmlessness.
        return not math.isnan(answer.value) and not (lower and answer.failure)

    common = [name for name in before if name in after]
    scored = [name for name in common if counts(before[name]) and counts(after[name])]
    by_sample: dict[str, list[tuple[float, float]]] = {}
    for name in scored:
        by_sample.setdefault(name[0], []).append((before[name].value, after[name].value))
    means = np.array([np.mean(pairs, axis=0) for pairs in by_sample.values()]).reshape(-1, 2)
    differences = np.array([after[name].value - before[name].value for name in scored])
    fell, rose = int((differences < 0).sum()), int((differences > 0).sum())
    yes_no = all({before[name].value, after[name].value} <= {0.0, 1.0} for name in scored)
    first, second = means.mean(0).tolist() if len(means) else (math.nan, math.nan)
    return Difference(
        task=task,
        scorer=scorer,
        lower_is_better=lower,
        pairs=len(scored),
        samples=len(by_sample),
        failed=len(common) - len(scored),
        unpaired=len(before) + len(after) - 2 * len(common),
        before=first,
        after=second,
        difference=second - first,
        interval=interval(means[:, 1] - means[:, 0]),
        fell=fell,
        rose=rose,
        p_value=mcnemar(fell, rose) if yes_no and len(scored) == len(by_sample) > 0 else None,
        changed=[(name[0], before[name], after[name]) for name in scored if before[name].value != after[name].value],
    )


def interval(differences: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean of (N,) differences, by a percentile bootstrap over samples."""
    if len(differences) == 0:
        return math.nan, math.nan
    random = np.random.default_rng(0)
    means = [differences[random.integers(len(differences), size=len(differences))].mean() for _ in range(DRAWS)]
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    return low, high


def mcnemar(one: int, other: int) -> float:
    """The exact two-sided p-value of McNemar's test, from the numbers of pairs that changed in each direction."""
    from scipy.stats import binomtest

    return float(binomtest(one, one + other).pvalue) if one + other else 1.0
