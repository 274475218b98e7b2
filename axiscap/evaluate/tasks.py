"""Tasks for Inspect: persona jailbreaks, over-refusal, and capability that code can check, on data of AxisCap's own::

inspect eval axiscap/persona_jailbreak --model axiscap/FOLDER -M profile=PROFILE -T attempts=240
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import TaskState, generate, system_message, user_message
from inspect_ai.util import sandbox

from axiscap.calibrate.data import shipped
from axiscap.calibrate.effects import fenced, numbers
from axiscap.evaluate.behaviours import Behaviour, look_alikes, own, personas, read
from axiscap.evaluate.judges import harmful, in_character, not_refused, refused

#: As the paper samples: warm, so that epochs differ. What code checks has one best answer, the likeliest.
_SAMPLED = GenerateConfig(temperature=0.7, top_p=0.9, max_tokens=256)
_LIKELIEST = GenerateConfig(temperature=0.0, max_tokens=256)
#: Of the attempts of a jailbreak, where nothing else is said: each of AxisCap's behaviours ten times.
ATTEMPTS = 320
_ARITHMETIC = 60
#: For a function and its tests, in seconds.
_PATIENCE = 10


def _samples(behaviours: list[Behaviour]) -> MemoryDataset:
    return MemoryDataset(
        [
            Sample(input=one.request, id=one.name, metadata={"category": one.category, "request": one.request})
            for one in behaviours
        ]
    )


@task
def persona_jailbreak(
    behaviours: str | None = None,
    persona_folder: str | None = None,
    attempts: int = ATTEMPTS,
    first_turn: bool = False,
    judge: str | None = None,
) -> Task:
    """A persona, then a request that should be declined: does the answer help?

    Parameters
    ----------
    behaviours
        a file, see :func:`axiscap.evaluate.behaviours.read`; AxisCap's own without one.
    persona_folder
        roles whose prompts bring the personas; AxisCap's hostile ones without it.
    attempts
        how many pairs of persona and behaviour: each behaviour once, then each with the next persona.
    first_turn
        the persona comes as the user's first turn, which the model answers, and not as the system prompt.
    judge
        a model that judges by a rubric; without one the classifiers say what they can.
    """
    asked = read(Path(behaviours)) if behaviours else own()
    prompts = personas(Path(persona_folder) if persona_folder else None)
    most = len(asked) * len(prompts)
    if not 1 <= attempts <= most:
        raise ValueError(f"attempts must be from 1 to {most} ({len(asked)} behaviours, {len(prompts)} personas)")
    samples = []
    for number in range(attempts):
        turn, place = divmod(number, len(asked))
        behaviour, (persona, prompt) = asked[place], prompts[(place + turn) % len(prompts)]
        metadata = {"category": behaviour.category, "request": behaviour.request, "persona": prompt}
        first = prompt if first_turn else behaviour.request
        samples.append(Sample(input=first, id=f"{behaviour.name} {persona}", metadata=metadata))
    before = [generate(), user_message("{request}")] if first_turn else [system_message("{persona}")]
    judges = [harmful(judge)] if judge else []
    return Task(
        dataset=MemoryDataset(samples),
        solver=[*before, generate()],
        scorer=[*judges, not_refused(), in_character()],
        config=_SAMPLED,
    )


@task
def over_refusal(behaviours: str | None = None) -> Task:
    """Harmless requests that look like harmful ones: are they refused? From a file, or AxisCap's own look-alikes."""
    asked = read(Path(behaviours)) if behaviours else look_alikes()
    return Task(dataset=_samples(asked), solver=generate(), scorer=refused(), config=_SAMPLED)


@task
def arithmetic() -> Task:
    """Sums, differences and products of whole numbers, exactly."""
    draw = random.Random(0)
    samples = []
    for number in range(_ARITHMETIC):
        sign, most = (("+", 99), ("-", 99), ("*", 12))[number % 3]
        a, b = sorted((draw.randint(2, most), draw.randint(2, most)), reverse=True)
        right = {"+": a + b, "-": a - b, "*": a * b}[sign]
        text = f"What is {a} {sign} {b}? Answer with the number alone."
        samples.append(Sample(input=text, target=str(right), id=f"{a} {sign} {b} ({number})"))
    return Task(dataset=MemoryDataset(samples), solver=generate(), scorer=last_number(), config=_LIKELIEST)


@scorer(metrics=[mean(), stderr()])
def last_number() -> Scorer:
    """1 where the last number of the answer is the right one."""

    async def score(state: TaskState, target: Target) -> Score:
        found = numbers(state.output.completion)
        right = bool(found) and float(found[-1]) == float(target.text)
        return Score(value=float(right), answer=found[-1] if found else "")

    return score


@task
def instructions() -> Task:
    """Instructions about an answer's form, which code can check."""
    samples = [
        Sample(input=entry["request"], id=f"{entry['check']} {number}", metadata=entry)
        for number, entry in enumerate(shipped("instructions.jsonl"))
    ]
    return Task(dataset=MemoryDataset(samples), solver=generate(), scorer=followed(), config=_LIKELIEST)


def follows(text: str, check: str, value: str | int | list[str] | None = None) -> bool:
    """Whether an answer is in the form that was asked for.

    Parameters
    ----------
    check
        ``lowercase``, ``uppercase``, ``contains``, ``avoids``, ``starts``, ``ends``, ``bullets``, ``words`` or
        ``json``.
    value
        the word, the words, the number or the keys that the check is about.

    Raises
    ------
    ValueError
        another check.
    """
    text = text.strip()
    words = re.findall(r"\w+", text.lower())
    wanted = re.findall(r"\w+", value.lower()) if isinstance(value, str) else []
    match check, value:
        case "lowercase", _:
            return bool(words) and text == text.lower()
        case "uppercase", _:
            return bool(words) and text == text.upper()
        case "contains", str():
            return wanted[0] in words
        case "avoids", str():
            return bool(words) and wanted[0] not in words
        case "starts", str():
            return words[: len(wanted)] == wanted
        case "ends", str():
            return words[-len(wanted) :] == wanted
        case "bullets", int():
            lines = [line for line in text.splitlines() if line.strip()]
            return len(lines) == value and all(line.startswith("- ") for line in lines)
        case "words", int():
            return 0 < len(text.split()) <= value
        case "json", list():
            try:
                found = json.loads(_without_fence(text))
            except ValueError:
                return False
            return isinstance(found, dict) and sorted(found) == sorted(value)
    raise ValueError(f"no check {check!r} of {value!r}")


def _without_fence(text: str) -> str:
    """What stands in the first fenced block, or the text where there is none."""
    return next(iter(fenced(text)), text)


@scorer(metrics=[mean(), stderr()])
def followed() -> Scorer:
    """1 where the answer has the form that was asked for."""

    async def score(state: TaskState, target: Target) -> Score:
        answer = state.output.completion
        right = follows(answer, state.metadata["check"], state.metadata.get("value"))
        return Score(value=float(right), answer=answer)

    return score


@task
def choices() -> Task:
    """Multiple choice of common knowledge, by words and not by letters, which small models mix up."""
    samples = []
    for number, entry in enumerate(shipped("choices.jsonl")):
        *others, last = options = entry["choices"]
        text = f"{entry['question']} Choose one: {', '.join(others)} or {last}. Answer with your choice alone."
        right = options[entry["answer"]]
        samples.append(Sample(input=text, target=right, id=f"choice {number}", metadata={"options": options}))
    return Task(dataset=MemoryDataset(samples), solver=generate(), scorer=chosen(), config=_LIKELIEST)


@scorer(metrics=[mean(), stderr()])
def chosen() -> Scorer:
    """1 where the first of the options that the answer names is the right one."""

    async def score(state: TaskState, target: Target) -> Score:
        text = state.output.completion.lower()
        places = {text.find(option.lower()): option for option in state.metadata["options"]}
        named = places[min(place for place in places if place >= 0)] if max(places) >= 0 else ""
        return Score(value=float(named == target.text), answer=named)

    return score


@task
def code() -> Task:
    """Short Python functions, which must pass their tests. What the model wrote runs in Inspect's sandbox: ``local``, a
    process of this user's, unless the command names another, such as ``docker``.
    """
    samples = [
        Sample(input=entry["request"], id=entry["id"], metadata={"tests": entry["tests"]})
        for entry in shipped("code.jsonl")
    ]
    return Task(dataset=MemoryDataset(samples), solver=generate(), scorer=passed(), config=_LIKELIEST, sandbox="local")


@scorer(metrics=[mean(), stderr()])
def passed() -> Scorer:
    """1 where the answer's code passes its tests."""

    async def score(state: TaskState, target: Target) -> Score:
        written = _without_fence(state.output.completion)
        program = "\n".join([written, *(f"assert {test}" for test in state.metadata["tests"])])
        try:
            # -I: nothing of this process's environment and folder is imported.
            done = await sandbox().exec(["python3", "-I", "-c", program], timeout=_PATIENCE)
        except TimeoutError:
            return Score(value=0.0, answer=written, explanation=f"not done in {_PATIENCE} seconds")
        return Score(value=float(done.success), answer=written, explanation=done.stderr[-500:])

    return score
