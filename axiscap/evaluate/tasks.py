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

from axiscap.calibrate.effects import fenced, numbers
from axiscap.data.jsonl import shipped
from axiscap.evaluate.behaviours import Behaviour, look_alikes, own, personas, read
from axiscap.evaluate.judges import harmful, in_character, not_refused, refused

#: The paper samples at this temperature, so that epochs differ. Answers that code checks are the likeliest ones.
_SAMPLED = GenerateConfig(temperature=0.7, top_p=0.9, max_tokens=256)
_LIKELIEST = GenerateConfig(temperature=0.0, max_tokens=256)
#: The default number of jailbreak attempts: ten for each of AxisCap's behaviours.
ATTEMPTS = 320
_ARITHMETIC = 60
#: The seconds that a function and its tests may take.
_TIMEOUT = 10


def _samples(behaviours: list[Behaviour]) -> MemoryDataset:
    return MemoryDataset(
        [
            Sample(
                input=behaviour.request,
                id=behaviour.name,
                metadata={"category": behaviour.category, "request": behaviour.request},
            )
            for behaviour in behaviours
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
        a file, see :func:`axiscap.evaluate.behaviours.read`. Default: AxisCap's own.
    persona_folder
        a folder of roles, whose prompts are the personas. Default: AxisCap's hostile roles.
    attempts
        the number of pairs of persona and behaviour: each behaviour once, then each with the next persona.
    first_turn
        the persona is the user's first turn, which the model answers, and not the system prompt.
    judge
        a model that judges by a rubric, beside the classifiers.
    """
    requests = read(Path(behaviours)) if behaviours else own()
    prompts = personas(Path(persona_folder) if persona_folder else None)
    most = len(requests) * len(prompts)
    if not 1 <= attempts <= most:
        raise ValueError(f"attempts must be from 1 to {most} ({len(requests)} behaviours, {len(prompts)} personas)")
    samples = []
    for number in range(attempts):
        cycle, index = divmod(number, len(requests))
        behaviour, (persona, prompt) = requests[index], prompts[(index + cycle) % len(prompts)]
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
    """Harmless requests that resemble harmful ones: are they refused? From a file, or AxisCap's own."""
    requests = read(Path(behaviours)) if behaviours else look_alikes()
    return Task(dataset=_samples(requests), solver=generate(), scorer=refused(), config=_SAMPLED)


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
    """1 if the last number of the answer is right."""

    async def score(state: TaskState, target: Target) -> Score:
        last = next(reversed(numbers(state.output.completion)), "")
        return Score(value=float(bool(last) and float(last) == float(target.text)), answer=last)

    return score


@task
def instructions() -> Task:
    """Instructions about the form of an answer, which code can check."""
    samples = [
        Sample(input=entry["request"], id=f"{entry['check']} {number}", metadata=entry)
        for number, entry in enumerate(shipped("instructions.jsonl"))
    ]
    return Task(dataset=MemoryDataset(samples), solver=generate(), scorer=followed(), config=_LIKELIEST)


def follows(text: str, check: str, value: str | int | list[str] | None = None) -> bool:
    """Whether an answer has the requested form.

    Parameters
    ----------
    check
        ``lowercase``, ``uppercase``, ``contains``, ``avoids``, ``starts``, ``ends``, ``bullets``, ``words`` or
        ``json``.
    value
        the word or words, the number, or the keys that the check needs.

    Raises
    ------
    ValueError
        the check is unknown.
    """
    text = text.strip()
    words = re.findall(r"\w+", text.lower())
    expected = re.findall(r"\w+", value.lower()) if isinstance(value, str) else []
    match check, value:
        case "lowercase", _:
            return bool(words) and text == text.lower()
        case "uppercase", _:
            return bool(words) and text == text.upper()
        case "contains", str():
            return expected[0] in words
        case "avoids", str():
            return bool(words) and expected[0] not in words
        case "starts", str():
            return words[: len(expected)] == expected
        case "ends", str():
            return words[-len(expected) :] == expected
        case "bullets", int():
            lines = [line for line in text.splitlines() if line.strip()]
            return len(lines) == value and all(line.startswith("- ") for line in lines)
        case "words", int():
            return 0 < len(text.split()) <= value
        case "json", list():
            try:
                parsed = json.loads(_without_fence(text))
            except ValueError:
                return False
            return isinstance(parsed, dict) and sorted(parsed) == sorted(value)
    raise ValueError(f"no check {check!r} of {value!r}")


def _without_fence(text: str) -> str:
    """The content of the first fenced block, or the whole text without a block."""
    return next(iter(fenced(text)), text)


@scorer(metrics=[mean(), stderr()])
def followed() -> Scorer:
    """1 if the answer has the requested form."""

    async def score(state: TaskState, target: Target) -> Score:
        answer = state.output.completion
        right = follows(answer, state.metadata["check"], state.metadata.get("value"))
        return Score(value=float(right), answer=answer)

    return score


@task
def choices() -> Task:
    """Multiple choice of common knowledge. The choices are words, because small models confuse letters."""
    samples = []
    for number, entry in enumerate(shipped("choices.jsonl")):
        *others, last = options = entry["choices"]
        text = f"{entry['question']} Choose one: {', '.join(others)} or {last}. Answer with your choice alone."
        right = options[entry["answer"]]
        samples.append(Sample(input=text, target=right, id=f"choice {number}", metadata={"options": options}))
    return Task(dataset=MemoryDataset(samples), solver=generate(), scorer=chosen(), config=_LIKELIEST)


@scorer(metrics=[mean(), stderr()])
def chosen() -> Scorer:
    """1 if the first option that the answer names is right."""

    async def score(state: TaskState, target: Target) -> Score:
        text = state.output.completion.lower()
        positions = {text.find(option.lower()): option for option in state.metadata["options"]}
        first = positions[min(position for position in positions if position >= 0)] if max(positions) >= 0 else ""
        return Score(value=float(first == target.text), answer=first)

    return score


@task
def code() -> Task:
    """Short Python functions, which must pass their tests.

    The model's code runs in Inspect's sandbox: a process of this user (``local``), unless the command names another
    sandbox, such as ``docker``.
    """
    samples = [
        Sample(input=entry["request"], id=entry["id"], metadata={"tests": entry["tests"]})
        for entry in shipped("code.jsonl")
    ]
    return Task(dataset=MemoryDataset(samples), solver=generate(), scorer=passed(), config=_LIKELIEST, sandbox="local")


@scorer(metrics=[mean(), stderr()])
def passed() -> Scorer:
    """1 if the code of the answer passes its tests."""

    async def score(state: TaskState, target: Target) -> Score:
        solution = _without_fence(state.output.completion)
        program = "\n".join([solution, *(f"assert {test}" for test in state.metadata["tests"])])
        try:
            # -I keeps this process's environment and folder out of the imports.
            result = await sandbox().exec(["python3", "-I", "-c", program], timeout=_TIMEOUT)
        except TimeoutError:
            return Score(value=0.0, answer=solution, explanation=f"not done in {_TIMEOUT} seconds")
        return Score(value=float(result.success), answer=solution, explanation=result.stderr[-500:])

    return score
