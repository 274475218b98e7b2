"""The command line, as a user types it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch
from conftest import REPOSITORY, SHIPPED_PROFILE, assert_same_bits, unit
from rich.progress import Progress
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import axiscap
from axiscap import CapProfile, bench, cli, interop, models
from axiscap.bench.kernels import SHARES
from axiscap.calibrate import with_floors
from axiscap.cli.doctor import cuda_advice
from axiscap.profile import CONVERTED
from axiscap.view import plots, speeds


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command in this process, and returns (exit status, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["axiscap", *map(str, arguments)])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_the_console_script_is_installed():
    script = subprocess.run([f"{sys.prefix}/bin/axiscap", "--version"], capture_output=True, text=True, check=True)
    assert script.stdout.strip() == axiscap.__version__


def test_inspect_prints_a_profile(command):
    status, output, _ = command("inspect", SHIPPED_PROFILE)
    assert status == 0
    for text in (
        "smollm2-135m-instruct",
        "of 30 capped; hidden size 576",
        "held-out AUC",
        "p25",
        "ordinary tokens",
        "sinks",
    ):
        assert text in output
    profile = CapProfile.load(SHIPPED_PROFILE)
    for index, layer in enumerate(profile.layers):
        row = next(line for line in output.splitlines() if line.startswith(f"│ {layer:>5} "))
        assert f"{profile.floors[index, 0].item():.4g}" in row


SINKS = {
    "limit_ratio": [2.0, 2.1, 2.3, 2.2],
    "largest_ordinary": [1.9, 1.8, 1.7, 2.0],
    "share": [0.0, 0.01, 0.086, 0.5],
    "near_the_limit": [0.5, 0.0, 0.0005, 0.5],
}


@pytest.mark.parametrize(
    ("layers", "provenance", "limits", "rule", "warning"),
    [
        ([1, 2], {"sinks": SINKS}, [9.0, 9.5],
         "left alone beyond 2.1-2.3 times the median norm; largest ordinary row 1.8; at most 8.6% of a layer's rows",
         ""),
        ([1, 3], {"sinks": SINKS}, [9.0, 9.5],
         "left alone beyond 2.1-2.2 times the median norm; largest ordinary row 2;",
         "At layer 3 attention sinks and ordinary rows overlap: up to 50.0% of rows are near the limit."),
        ([1, 2], {"norm_limits": CONVERTED}, [9.0, 9.5], "left alone beyond a norm of 9-9.5",
         "come from an older rule"),
        ([1, 2], {"sinks": {"limit_ratio": [2.0], "near_the_limit": [None] * 4}}, [9.0, 9.0],
         "left alone beyond a norm of 9", ""),
        ([1, 2], {}, None, "no limit is known: every row below its floor is lifted", ""),
    ],
)  # fmt: skip
def test_inspect_describes_the_limits_of_sinks(command, tmp_path, layers, provenance, limits, rule, warning):
    path = tmp_path / "profile.safetensors"
    facts = provenance | {"floors": {"population": "p", "percentile": 5.0, "target_percentile": 40.0}}
    norm_limits = None if limits is None else torch.tensor(limits)
    targets = torch.tensor([[1.25], [3.5]])
    CapProfile(layers, unit(2, 1, 8), torch.zeros(2, 1), facts, targets=targets, norm_limits=norm_limits).save(path)
    status, output, errors = command("inspect", path)
    assert (status, errors) == (0, "")
    assert rule in output
    for sentence in ("older rule", "overlap"):
        assert (sentence in output) == (sentence in warning)
    assert warning in output
    assert '"target_percentile": 40.0' in output
    row = next(line for line in output.splitlines() if line.startswith(f"│ {layers[1]:>5} "))
    assert row.split("│")[3:5] == ["     0 ", "    3.5 "]


@pytest.mark.parametrize(
    "provenance",
    [
        {},
        {"evidence": "none", "quantiles": 3, "model": []},
        {"source": "[red]x", "evidence": {"auc": [0.5] * 9, "best_layer": "x"}},
    ],
)
def test_inspect_accepts_any_provenance(command, tmp_path, provenance):
    path = tmp_path / "other.safetensors"
    CapProfile([3], unit(1, 2, 8), torch.tensor([[0.5, -torch.inf]]), provenance).save(path)
    status, output, errors = command("inspect", path)
    assert (status, errors) == (0, "")
    assert "-inf" in output


DEPTH, SIZE = 30, 32


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """A folder with a narrow model of random weights, which has as many layers as the shipped profile."""
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=49152, hidden_size=SIZE, intermediate_size=32, num_hidden_layers=DEPTH, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(models.folder(models.DEFAULT_MODEL)).save_pretrained(folder)
    return folder


def foreign(kind: str, folder) -> CapProfile:
    """A profile that the calibration did not make, or with a provenance that it would not write."""
    shipped = CapProfile.load(SHIPPED_PROFILE)
    facts = json.loads(json.dumps(shipped.provenance))
    facts["model"]["hidden_size"] = SIZE
    axes, floors, axis_all = unit(8, 1, SIZE), torch.zeros(8, 1), unit(DEPTH, SIZE, seed=1)
    tables = {"quantiles": shipped.quantiles, "populations": shipped.populations}
    layers = list(range(14, 22))
    if kind == "imported":
        vectors = {f"v{layer}": {"vector": torch.randn(SIZE), "layer": layer} for layer in layers}
        steps = [{"vector": name, "cap": 0.1} for name in vectors]
        config = {"vectors": vectors, "experiments": [{"id": "e", "interventions": steps}]}
        torch.save(config, folder / "config.pt")
        return interop.read_capping_config(folder / "config.pt", "e")
    if kind == "two directions and no word":
        return CapProfile([3], unit(1, 2, SIZE), torch.tensor([[0.5, -torch.inf]]))
    if kind == "words of other types":
        wrong = {"evidence": "none", "quantiles": 3, "model": [], "sampling": 7, "floors": [], "source": "[red]x"}
        return CapProfile(layers, axes, floors, wrong, axis_all=axis_all, **tables)
    if kind == "tables that are not as stated":
        facts["quantiles"] = {"percentiles": ["a"] * 101, "populations": ["assistant"] * 4}
        return CapProfile(layers, axes, floors, facts, axis_all=axis_all, **tables)
    if kind == "another model's":
        return CapProfile([3], unit(1, 1, 64), torch.zeros(1, 1), {"model": {"hidden_size": 64, "num_layers": 4}})
    if kind == "layers that the model has not":
        return CapProfile([40], unit(1, 1, SIZE), torch.zeros(1, 1))
    if kind == "no axis elsewhere":
        return CapProfile(layers, axes, floors, facts, **tables)
    part, _, field = kind.partition(" without ")
    assert part == "evidence"
    del facts["evidence"][field]
    return CapProfile(layers, axes, floors, facts, axis_all=axis_all, **tables)


FOREIGN = [
    "imported", "two directions and no word", "words of other types", "tables that are not as stated",
    "another model's", "layers that the model has not", "no axis elsewhere", "evidence without auc",
    "evidence without map",
]  # fmt: skip
#: The commands that refuse each profile: it lacks what they need, or does not fit their model.
REFUSED = {
    "imported": {"floors", "sweep", "report", "picture", "compare", "compared"},
    "two directions and no word": {"floors", "sweep", "report", "picture", "compare", "compared"},
    "words of other types": {"floors", "sweep", "report", "picture", "compare", "compared"},
    "tables that are not as stated": {"floors", "sweep"},
    "another model's": {
        "floors", "sweep", "report", "picture", "compare", "compared", "replay", "page", "chat", "run",
    },
    "layers that the model has not": {
        "floors", "sweep", "report", "picture", "compare", "compared", "replay", "page", "chat", "run",
    },
    "no axis elsewhere": {"floors", "sweep"},
    "evidence without auc": {"sweep", "report", "picture", "compare", "compared"},
    "evidence without map": {"sweep", "report", "picture", "compare", "compared"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", FOREIGN)
def test_no_command_fails_on_a_foreign_profile_without_a_sentence(command, tmp_path, monkeypatch, small_model, kind):
    path, conversations = tmp_path / "foreign.safetensors", tmp_path / "conversations.jsonl"
    foreign(kind, tmp_path).save(path)
    said = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A ghost of the sea."}]
    conversations.write_text(json.dumps({"messages": said}) + "\n")
    script = tmp_path / "script.jsonl"
    script.write_text(json.dumps({"name": "n", "turns": ["Who are you?"]}) + "\n")
    lines = iter(["Who are you?"])
    monkeypatch.setattr("axiscap.cli.chat._read_line", lambda: next(lines, ""))
    out = tmp_path / "out"
    model = ("--model", small_model)
    calls = {
        "inspect": ("inspect", path),
        "compare": ("inspect", SHIPPED_PROFILE, path),
        "compared": ("inspect", path, SHIPPED_PROFILE),
        "floors": ("floors", path, out / "floors.safetensors"),
        "sweep": ("sweep", path, out / "b.safetensors", "--rollouts", out / "work", "--picture", out / "s.png", *model),
        "report": ("report", path, out / "report.html"),
        "picture": ("report", path, out / "report.png"),
        "replay": ("replay", conversations, "--profile", path, *model),
        "page": ("report", path, out / "page.html", "--conversations", conversations, *model),
        "chat": ("chat", path, "--terminal", "--max-new-tokens", 3, *model),
        "export": ("export", path, out / "config.pt"),
        "run": ("run", path, "--conversations", script, "--max-new-tokens", 3, "--picture", out / "r.png", *model),
    }  # fmt: skip
    out.mkdir()
    refused = set()
    for name, arguments in calls.items():
        status, _, errors = command(*arguments)
        if status:
            refused.add(name)
            assert status == 1, (name, errors)
            assert errors.startswith("axiscap: "), (name, errors)
            assert len(errors.splitlines()) == 1, (name, errors)
            assert len(errors.split()) >= 6, (name, errors)  # a sentence, not a key
        else:
            assert errors == "", (name, errors)
    assert refused == REFUSED[kind]


@pytest.mark.parametrize(
    ("options", "percentile"), [((), None), (("--percentile", 3), 3), (("--layers", "9-12"), None)]
)
def test_floors_writes_a_weaker_profile(command, tmp_path, options, percentile):
    shipped, out = CapProfile.load(SHIPPED_PROFILE), tmp_path / "weaker.safetensors"
    status, _, errors = command("floors", SHIPPED_PROFILE, out, "--strength", 0.5, *options)
    assert (status, errors) == (0, "")
    weaker = CapProfile.load(out)
    indices = [shipped.layers.index(layer) for layer in weaker.layers]
    assert_same_bits(weaker.lifts, shipped.lifts[indices] * 0.5)
    if percentile is None:
        assert_same_bits(weaker.floors, shipped.floors[indices])
    else:
        assert weaker.provenance["floors"]["percentile"] == percentile
    assert "0.5: a row is lifted by this share of its shortfall" in command("inspect", out)[1]
    status, _, errors = command("floors", SHIPPED_PROFILE, out, "--strength", 1.5)
    assert status == 1
    assert "strength must be from 0 to 1, got 1.5" in errors


def test_commands_create_the_folders_of_their_outputs(command, tmp_path):
    out = tmp_path / "new"
    calls = [
        ("floors", SHIPPED_PROFILE, out / "a" / "floors.safetensors", "--percentile", 3),
        ("report", SHIPPED_PROFILE, out / "b" / "report.png"),
    ]
    CapProfile([1], unit(1, 1, 8), torch.zeros(1, 1)).save(tmp_path / "small.safetensors")
    config = out / "c" / "config.pt"
    calls += [
        ("export", tmp_path / "small.safetensors", config),
        ("import", config, "axiscap", out / "d" / "again.safetensors"),
    ]
    for call in calls:
        status, _, errors = command(*call)
        assert (status, errors) == (0, ""), call
    assert sorted(path.name for path in out.rglob("*.*")) == [
        "again.safetensors",
        "config.pt",
        "floors.safetensors",
        "report.png",
    ]


@pytest.mark.parametrize("target", [None, 40.0])
def test_reports_show_floors_and_targets(command, tmp_path, monkeypatch, target):
    shipped, path = CapProfile.load(SHIPPED_PROFILE), tmp_path / "profile.safetensors"
    with_floors(shipped, 5.0, "ordinary tokens", target_percentile=target).save(path)
    figures = []
    monkeypatch.setattr(plots.pyplot(), "close", figures.append)
    assert command("report", path, tmp_path / "report.png")[0] == 0
    panel = figures[0].axes[2]
    drawn = {line.get_label(): line.get_ydata() for line in panel.lines}
    saved = CapProfile.load(path)
    assert drawn["floor"].tolist() == saved.floors[:, 0].tolist()
    if target is None:
        assert "target" not in drawn
    else:
        assert drawn["target"].tolist() == saved.targets[:, 0].tolist()
    assert command("report", path, tmp_path / "report.html")[0] == 0
    page = (tmp_path / "report.html").read_text()
    assert "Attention sinks: left alone beyond" in page
    assert ("targets" in page) == (target is not None)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"no profile at all, but some bytes", "truncated or no safetensors file")],
)
def test_errors_are_sentences(command, tmp_path, content, message):
    path = tmp_path / "wrong.safetensors"
    if content:
        path.write_bytes(content)
    for name in ("inspect", "run"):
        status, output, errors = command(name, path)
        assert status == 1
        assert output == ""
        assert errors.startswith("axiscap: ")
        assert message in errors.replace("\n", " ")
        assert "Traceback" not in errors


def test_run_prints_tables_and_draws_a_picture(command, tmp_path, demo_model):
    conversations = tmp_path / "conversations.jsonl"
    conversations.write_text(json.dumps({"name": "[short]", "turns": ["You are a ghost. [bold]Who[/bold] are you?"]}))
    picture = tmp_path / "new" / "drift.png"
    options = ["--conversations", conversations, "--max-new-tokens", 6, "--picture", picture]
    status, output, errors = command("run", SHIPPED_PROFILE, *options)
    assert (status, errors) == (0, "")
    for text in ("uncapped", "capped", "conversation: [short]", "[bold]Who[/bold]", "rows fired", "tokens per second"):
        assert text in output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_doctor_prints_the_installation(command):
    status, output, _ = command("doctor")
    assert status == 0
    for text in (axiscap.__version__, torch.__version__, "CPU kernels", "CUDA", "default model", "transformers"):
        assert text in output


@pytest.mark.parametrize(
    ("runtime", "driver", "torch_cuda", "advice"),
    [
        (13000, 0, None, ""),
        (13000, 13000, "13.0", ""),
        (12090, 13010, "13.0", ""),
        (13020, 13000, "12.6", ""),
        (
            13000,
            12080,
            "12.6",
            "the driver runs CUDA 12.8, and these kernels need 13.0 or newer, unlike torch's, of CUDA 12.6: "
            "update the driver, or build with a CUDA toolkit of 12.x",
        ),
        (
            13000,
            12040,
            None,
            "the driver runs CUDA 12.4, and these kernels need 13.0 or newer: "
            "update the driver, or build with a CUDA toolkit of 12.x",
        ),
    ],
)
def test_doctor_advises_on_a_driver_that_is_too_old(runtime, driver, torch_cuda, advice):
    assert cuda_advice(runtime, driver, torch_cuda) == advice


@pytest.mark.slow
def test_the_contenders_of_bench_compute_the_same():
    """All contenders give the same rows, and the figures are ratios of paired times."""
    for fire in SHARES:
        case = bench.Case(hidden_size=256, rows=16, dtype="float32", fire=fire)
        results = {}
        for name, contender in case.contenders().items():
            case.restore()
            output = contender(case.copies[0])
            results[name] = case.copies[0].clone() if name == "axiscap" else output
        for name in ("eager", "compile", "published"):
            torch.testing.assert_close(results[name], results["axiscap"], atol=1e-5, rtol=1e-5)
        changed = (results["axiscap"] != case.pristine).any(-1).sum().item()
        assert changed == round(fire * 16)
        measured = bench.measure_case(case, rounds=3)
        assert measured["of_memory_bound"]["p25"] <= measured["of_memory_bound"]["p75"]
        assert all(value["median"] > 0 for value in measured["microseconds"].values())


def test_the_norm_contenders_of_bench_compute_the_same_norm():
    """The uncapped norm equals the norm of torch, and the capped one differs in every row."""
    case = bench.NormCase(hidden_size=256, rows=16, dtype="float32", fire=1.0)
    hidden, residual = {}, {}
    for name, contender in case.contenders().items():
        case.restore()
        output = contender(case.copies[0])
        residual[name] = case.copies[0][1].clone()
        hidden[name] = case.copies[0][0].clone() if output is None else output
    torch.testing.assert_close(residual["uncapped"], residual["torch"])
    torch.testing.assert_close(hidden["uncapped"], hidden["torch"])
    assert bool((residual["axiscap"] != residual["torch"]).any(-1).all())
    assert set(bench.measure_case(case, rounds=3)["speedup"]) == {"uncapped", "torch"}


def test_bench_without_a_gpu_names_the_reason(command):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    status, output, errors = command("bench", "--device", "cuda")
    assert (status, output) == (1, "")
    assert "torch is a CPU build" in errors or "no device or driver" in errors or "no CUDA kernels" in errors


@pytest.mark.slow
def test_bench_writes_figures_and_a_picture(command, tmp_path, monkeypatch):
    monkeypatch.setattr("axiscap.bench.kernels.ROWS", (1, 4096))
    picture = tmp_path / "bench.png"
    arguments = ["--quick", "--no-decode", "--out", tmp_path / "bench.json", "--picture", picture]
    status, output, errors = command("bench", *arguments)
    assert (status, errors) == (0, "")
    assert "of the read-only bound" in output
    results = json.loads((tmp_path / "bench.json").read_text())
    assert len(results["ops"]) == 6
    assert len(results["norm"]) == 4
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_capped_layer_is_timed_inside_decoding_steps():
    """The three variants run at every capped layer, and the installed hook makes the fewest calls."""
    with Progress(disable=True) as progress:
        loaded = models.load(models.DEFAULT_MODEL)
        result = bench.measure_layer(progress, models.DEFAULT_MODEL, *loaded, sequences=2, rounds=1)
    assert result["layers"] == 8
    assert set(result["microseconds"]) == {"installed", "op", "published"}
    assert all(time["median"] > 0 for time in result["microseconds"].values())
    # Two calls of the clock, the hook, a query of the compiler's state, and the call of the extension.
    assert result["calls"]["installed"] <= 6 < result["calls"]["op"] < result["calls"]["published"]
    (row,) = speeds.layer_targets({"layers": [result]})
    assert row[0] == "smollm2-135m-instruct, 2 sequences"


def test_the_tables_of_the_documentation_match_its_data():
    """performance.md has the tables of the committed bench.json and bench-qwen.json."""
    results = json.loads((REPOSITORY / "docs" / "bench.json").read_text())
    page = (REPOSITORY / "docs" / "performance.md").read_text()
    rows = [(case, goal, *values, met) for case, goal, values, met in speeds.targets(results)]
    rows += speeds.decode_targets(results)
    rows += speeds.layer_targets(results)
    rows += speeds.layer_targets(json.loads((REPOSITORY / "docs" / "bench-qwen.json").read_text()))
    assert len(rows) == 9 + 4 + 4
    for row in rows:
        line = f"| {' | '.join(row)} |"
        assert line in page, line


@pytest.mark.parametrize(
    ("version", "message"),
    [("2.9.1+cpu", "axiscap needs torch 2.10 or newer, and finds torch 2.9.1+cpu ("), ("2.10.0", "invalid ELF")],
)
def test_an_import_under_an_older_torch_names_the_version(tmp_path, version, message):
    package = tmp_path / "axiscap"
    shutil.copytree(REPOSITORY / "axiscap", package, ignore=shutil.ignore_patterns("*.so", "data", "__pycache__"))
    (package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"no module at all" * 100)
    older = f"import torch; torch.__version__ = torch.torch_version.TorchVersion({version!r}); import axiscap"
    process = subprocess.run([sys.executable, "-c", older], capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 1
    assert message in process.stderr.splitlines()[-1]


def test_imports_stay_light():
    """`import axiscap` needs torch and safetensors alone."""
    heavy = "transformers", "matplotlib", "typer", "rich"
    script = f"import sys, axiscap; print([m for m in {heavy} if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
