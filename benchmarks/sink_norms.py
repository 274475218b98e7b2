"""How far ordinary rows stay below the norm limit of attention sinks, on texts that the calibration did not use.

    python benchmarks/sink_norms.py PROFILE --model MODEL

For every kind: the share of rows beyond the limit, in the mean over the capped layers, the same of rows whose token has
letters or digits, and how close such rows come: the 99.9th percentile of norm / limit within the limit. Then an attack:
strings of random tokens, of special tokens and of delimiters stand behind a persona's prompt or in the user's turn. If
rows of the answer in character got norms beyond the limit by that, they would escape the cap.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from axiscap import CapProfile, calibrate, models
from axiscap.calibrate.roles import Task
from axiscap.calibrate.tokens import Text, read
from axiscap.data.jsonl import shipped

#: Texts of a kind, tokens of a long context, and strings of each attack.
TEXTS, LONG, ATTACKS = 24, 8192, 24


class Reader:
    """Reads texts with a model, and compares the norms of rows with the limits of a profile."""

    def __init__(self, profile: CapProfile, model: str, dtype: str) -> None:
        self.profile = profile
        self.model, self.tokenizer = models.load(model, dtype)
        settings = calibrate.Settings(model, str(self.model.dtype))
        self.engine = calibrate.TransformersEngine(self.model, self.tokenizer, settings)
        pieces = self.tokenizer.batch_decode([[token] for token in range(len(self.tokenizer))])
        self.is_word = torch.tensor([any(map(str.isalnum, piece)) for piece in pieces])

    def prompt(self, system: str, user: str) -> list[int]:
        return self.engine.prompts([Task("", 0, 0, system, user)])[0]

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def measure(self, texts: Sequence[Text], of_answers: bool = False) -> tuple[float, float, float, float]:
        """Shares of rows and of words' rows beyond the limits, the 99.9th percentile of norm / limit of words' rows
        within, and the largest share of words' rows beyond in any one text; with ``of_answers``, of answers alone.
        """
        ratios: list[torch.Tensor] = []
        tokens = [[*text.prompt, *text.answer] for text in texts]
        where: list[torch.Tensor] = []

        def see(layer: int, rows: torch.Tensor, owner: torch.Tensor, place: torch.Tensor, answer: torch.Tensor) -> None:
            if layer not in self.profile.layers:
                return
            limit = self.profile.norm_limits[self.profile.layers.index(layer)]
            use = answer if of_answers else torch.ones_like(answer)
            ratios.append(rows[use].float().norm(dim=-1) / limit)
            if layer == self.profile.layers[0]:
                at = torch.tensor([tokens[o][p] for o, p in zip(owner[use].tolist(), place[use].tolist(), strict=True)])
                where.append(torch.stack([owner[use], self.is_word[at]]))

        read(self.model, texts, see)
        layers = len(self.profile.layers)
        ratio = torch.cat([torch.stack(ratios[i : i + layers]) for i in range(0, len(ratios), layers)], 1)
        owner, word = torch.cat(where, 1)
        word = word.bool()
        beyond = (ratio > 1).float()
        of_words = ratio[:, word]
        within = of_words[of_words <= 1]
        by_text = [beyond[:, word & (owner == text)].mean().item() for text in owner.unique().tolist()]
        return (
            beyond.mean().item(),
            beyond[:, word].mean().item(),
            torch.quantile(within[torch.randperm(len(within))[:1_000_000]], 0.999).item(),
            max(by_text),
        )


def kinds(reader: Reader) -> dict[str, list[Text]]:
    work = calibrate.load_work()
    found: dict[str, list[Text]] = {}
    for number, request in enumerate(work.requests):
        task = Task("work", 0, number, "", request.turns[0])
        if work.is_held_out(task):
            found.setdefault(f"work: {request.domain}", []).append(Text("", reader.prompt("", request.turns[0]), []))
    found = {kind: texts[:TEXTS] for kind, texts in found.items()}
    found["prose that no calibration reads"] = [
        Text("", reader.tokens(entry["text"]), []) for entry in shipped("plain.jsonl")
    ]
    found["personas, answers in character"] = [
        Text("", reader.prompt(pair["persona"], pair["question"]), reader.tokens(pair["in_character"]))
        for pair in shipped("pairs.jsonl")
    ]
    found["harmful requests"] = [
        Text("", reader.prompt("", entry["request"]), []) for entry in shipped("behaviours.jsonl")[:TEXTS]
    ]
    everything = reader.tokens("\n\n".join(entry["text"] for entry in shipped("prose.jsonl")))
    most = min(LONG, reader.model.config.get_text_config().max_position_embeddings)
    found[f"a context of {most} tokens"] = [Text("", (everything * (1 + most // len(everything)))[:most], [])]
    return found


def attacks(reader: Reader) -> dict[str, list[Text]]:
    """Answers in character after prompts with hostile strings."""
    generator = random.Random(0)
    special = sorted(set(reader.tokenizer.all_special_ids))
    delimiters = reader.tokens(",.\n;:-()'")
    strings = {
        "none": [[]],
        "random tokens": [generator.choices(range(len(reader.tokenizer)), k=40) for _ in range(ATTACKS)],
        "special tokens": [generator.choices(special, k=20) for _ in range(ATTACKS)],
        "delimiters": [generator.choices(delimiters, k=60) for _ in range(ATTACKS)],
    }
    pairs = shipped("pairs.jsonl")
    result = {}
    for name, suffixes in strings.items():
        result[name] = []
        for at, suffix in enumerate(suffixes * (ATTACKS // len(suffixes))):
            pair = pairs[at % len(pairs)]
            prompt = [*reader.prompt(pair["persona"], pair["question"]), *suffix]
            result[name].append(Text("", prompt, reader.tokens(pair["in_character"])))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile")
    parser.add_argument("--model", default=models.DEFAULT_MODEL)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    reader = Reader(CapProfile.load(options.profile), options.model, options.dtype)
    console = Console(width=120)
    for title, groups, of_answers in (
        ("rows beyond the limit of their norm", kinds(reader), False),
        ("rows of answers in character, behind hostile strings", attacks(reader), True),
    ):
        table = Table("kind", title=title)
        for column in ("rows beyond", "words beyond", "words within, 99.9 %", "words beyond, worst text"):
            table.add_column(column, justify="right")
        for kind, texts in groups.items():
            share, words, closest, worst = reader.measure(texts, of_answers)
            table.add_row(kind, f"{share:.2%}", f"{words:.2%}", f"{closest:.3f}", f"{worst:.2%}")
        console.print(table)


if __name__ == "__main__":
    main()
