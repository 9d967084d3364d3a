"""Pictures: each is drawn from its results, with one style a method, and says what it shows."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from lit_swa import checkpoint, plots
from lit_swa.training.log import METRICS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tutorials/results"
NAMES = sorted(path.stem for path in RESULTS.glob("*.png"))


@pytest.fixture(scope="module")
def figures():
    """draw(name, change=None): the figure of these results, changed or not; without a change each is drawn once."""
    plt = pytest.importorskip("matplotlib.pyplot")
    spec = importlib.util.spec_from_file_location("redraw", ROOT / "scripts/redraw.py")
    redraw, kept = importlib.util.module_from_spec(spec), {}
    spec.loader.exec_module(redraw)

    def draw(name: str, change=None):
        if name in kept and change is None:
            return kept[name]
        path = RESULTS / f"{name}.json"
        content = json.loads(path.read_text())
        if change:
            change(content)
        figure = redraw.draw_of(redraw.script_of(content, path))(plt, content)
        return figure if change else kept.setdefault(name, figure)

    draw.draw_of, draw.pyplot = redraw.draw_of, plt
    with plt.rc_context({"figure.max_open_warning": 0}):  # they are kept
        yield draw
    plt.close("all")


def decoding() -> dict:
    """Results of benchmark_generate.py with every peer, which no single machine has."""
    ways = ("ours", "compiled", "transformers", "transformers static", "llama.cpp", "gpt-fast")
    places = [(mode, position) for mode in ("bf16", "int8") for position in (256, 4096)]
    rows = [{"what": "decode", "mode": mode, "batch_size": 1, "position": p} for mode, p in places]
    rows = [row | {"ways": {way: {"tok_s": 10.0 + n} for n, way in enumerate(ways)}} for row in rows]
    return {"machine": "a machine", "arguments": {"name": "a-model", "checkpoint_dir": None}, "rows": rows}


def colours(figure) -> dict[str, str]:
    """The colours of the named lines and masks of a figure, by the first term of their names."""
    from matplotlib.colors import to_hex

    lines = [(line.get_label(), line.get_color()) for axis in figure.axes for line in axis.lines]
    lines += [(axis.get_title().lower(), axis.images[0].cmap(1)) for axis in figure.axes if axis.images]
    return {label.split(":")[0].split(",")[0]: to_hex(colour).upper() for label, colour in lines if label[:1] != "_"}


def words(figure) -> str:
    """All text of a figure."""
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))


@pytest.mark.parametrize("name", NAMES)
def test_each_picture_comes_from_its_results(figures, tmp_path, name):
    """Catches: a picture that no command can draw again, one of another shape than its results give, a large one, axes
    without units."""
    from PIL import Image

    figure, committed = figures(name), RESULTS / f"{name}.png"
    with Image.open(committed) as image:
        assert image.size == pytest.approx(110 * figure.get_size_inches(), abs=1)
    assert 5_000 < committed.stat().st_size < 150_000
    pages = "".join(page.read_text() for page in ROOT.glob("tutorials/*.md"))
    assert f"(results/{name}.png)" in pages and f"results/{name}.json" in pages
    assert all(
        axis.get_xlabel() for axis in figure.axes if any(text.get_text() for text in axis.get_xticklabels())
    ) or (
        name in ("masks", "distances")  # in a grid, the outer ones are labelled
    )
    if name in ("benchmark_attention_cpu", "compare_longlora"):  # other tests write pictures of the other scripts
        assert plots.save_picture(tmp_path / "new" / "p.png", lambda plt: figure)
        assert 5_000 < (tmp_path / "new" / "p.png").stat().st_size < 150_000


def test_a_method_has_one_colour_everywhere(figures):
    """Catches: colours by order, and a script with a table of its own."""
    seen = {name: colours(figures(name)) for name in NAMES if name != "distances"}
    seen["decode"] = colours(figures.draw_of("benchmark_generate")(figures.pyplot, decoding()))
    known = {(term, colour) for terms in seen.values() for term, colour in terms.items() if term in plots.STYLES}
    assert {term: colour.upper() for term, colour in known} == {t: plots.STYLES[t].colour.upper() for t, _ in known}
    assert len(known) == len(plots.STYLES)  # each is in some picture, with one colour
    table = [style.colour for style in plots.STYLES.values()]
    assert len(set(table)) == len(table)
    attention = colours(figures("benchmark_attention"))
    assert attention["FlashAttention-2 causal"] == attention["cuDNN causal"] == attention["full"]
    assert set(seen["compare_context"]) == {
        "full",
        "linear",
        "ntk",
        "dynamic",
        "yarn",
        "sliding",
        "streaming",
        "dual_chunk",
    }


def test_colours_do_not_depend_on_what_else_is_drawn(figures):
    """Catches: colours by order."""

    def reverse(content: dict) -> None:
        content["rows"] = [row for row in content["rows"][::-1] if row["method"] not in ("rope", "yarn")]
        for row in content["rows"]:
            row["method"] = {"ntk": "base 1e6"}.get(row["method"], row["method"])

    changed, before = colours(figures("compare_context", reverse)), colours(figures("compare_context"))
    own = changed.pop("base 1e6")
    assert changed.items() < before.items() and own == plots.style_of("base 1e6").colour.upper()


def test_pictures_name_model_text_and_trials(figures):
    """Catches: a picture that is understood only with its page."""
    for name in ("compare_context", "compare_longlora", "evaluate_needle", "evaluate_streaming", "finetune_lora_cpu"):
        title = figures(name).get_suptitle()
        assert title.startswith("SmolLM2-135M-Instruct"), name
        assert ("instruction-data.json" if name == "finetune_lora_cpu" else "emma.txt") in title
    assert "8 windows" in figures("compare_context").get_suptitle()

    def record(content: dict) -> None:
        run = content["runs"]["lora"]
        run["command"], run["arguments"] = (
            "python finetune/lora.py --config c.yaml",
            {"checkpoint_dir": "b/M", "data": "my"},
        )

    assert figures("finetune_lora_cpu", record).get_suptitle() == "M finetuned on my: one run"
    assert "10 trials" in figures("evaluate_needle").get_suptitle()
    assert all(
        f"rate {rate}" in words(figures("finetune_methods_cpu")) for rate in ("0.0002", "0.001", "0.003", "2e-05")
    )


def test_pictures_say_what_they_leave_out(figures):
    """Catches: a curve cut off without a word, a panel of equal lines, a curve hidden by another, a lone dot."""
    context = figures("compare_context")
    assert [axis.get_title() for axis in context.axes] == [f"windows of {n} tokens" for n in ("8k", "16k", "32k")]
    assert "No panel for 4k tokens" in words(context) and "full, plain RoPE ↑ 6,260" in words(context)
    assert len({axis.get_ylim() for axis in context.axes}) == 1
    losses, times = figures("evaluate_streaming").axes
    assert times.get_ylim()[1] < 3 and "window 512 begins with up to 3.0 ms" in words(times.figure)
    one, four = (next(x for x in losses.lines if start in x.get_label()) for start in ("1 sink", "4 sinks"))
    assert four.get_linewidth() > 3 * one.get_linewidth()
    assert list(losses.lines).index(four) < list(losses.lines).index(one)
    assert "as a dense mask (at 8k only)" in words(figures("benchmark_attention"))
    assert "original: as it was, every key in reach (up to 16,343)" in words(figures("extend_context_h100"))
    longlora = figures("compare_longlora")
    untrained = next(line for axis in longlora.axes for line in axis.lines if line.get_label().startswith("untrained"))
    assert untrained.get_ydata()[0] == pytest.approx(157.94, abs=0.01) and "groups that are not shifted" in words(
        longlora
    )
    cells = [text.get_text() for text in figures("evaluate_needle").axes[0].texts]
    assert cells[:4] == ["80", "80", "50", "0"] and len(cells) == 44


def test_a_comparison_of_many_lengths_has_four_panels(figures):
    """Catches: panels as narrow as their ticks, a length that is left out without a word."""

    def lengthen(content: dict) -> None:
        rows = [row for row in content["rows"] if row["length"] == 8192]
        content["rows"] += [row | {"length": 8192 + 1024 * n} for row in rows for n in range(1, 5)]

    figure = figures("compare_context", lengthen)
    assert [axis.get_title().split()[2] for axis in figure.axes] == ["11k", "12k", "16k", "32k"]
    assert "No panel for 8k, 9k, 10k tokens either" in words(figure)


def test_a_method_that_cannot_read_a_length_is_named(figures):
    """Catches: a curve that is missing without a word, a label that is lost with it."""

    def fail(content: dict) -> None:
        for row in content["rows"]:
            if row["method"] == "yarn" and row["length"] == 32768:
                row["error"] = "too long"
                del row["buckets"]

    text = words(figures("compare_context", fail))
    assert "Not readable: yarn at 32k." in text and "\nyarn\n" in text


def test_the_command_draws_beside_the_results_and_refuses_others(run_script, tmp_path):
    """Catches: a traceback for a file that has no picture or is cut short, a picture in another place."""
    pytest.importorskip("matplotlib")
    scalings = json.loads((RESULTS / "rope_scalings.json").read_text())
    (tmp_path / "a.json").write_text(json.dumps(scalings))
    code, out, err = run_script("scripts/redraw.py", "--results", tmp_path / "a.json")
    assert code == 0 and out == f"{tmp_path / 'a.png'}\n" and (tmp_path / "a.png").is_file() and err == ""
    del scalings["wavelengths"]
    (tmp_path / "cut.json").write_text(json.dumps(scalings))
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "quote.json").write_text(json.dumps(scalings | {"command": "python 'scripts/plot_masks.py"}))
    for path, message in (
        (tmp_path / "cut.json", "no whole result of scripts/plot_masks.py"),
        (tmp_path / "list.json", "list.json"),
        (tmp_path / "quote.json", "no results that have a picture"),
        (RESULTS / "parity.json", "no results that have a picture"),
        (tmp_path / "none.json", "none.json"),
    ):
        code, _, err = run_script("scripts/redraw.py", "--results", path)
        assert code == 2 and message in err and err.startswith("error: ") and len(err.splitlines()) == 1
    assert not (tmp_path / "cut.png").exists()


def test_without_matplotlib_plot_scripts_do_nothing(run_script, monkeypatch, tmp_path):
    """Catches: a path of a picture that is not there, half of the work done before the refusal."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for script, *arguments in (
        ("plot_masks", "--output_dir", tmp_path / "new"),
        ("plot_metrics", "--runs", f"[{tmp_path}]", "--output", tmp_path / "m.png"),
        ("redraw", "--results", RESULTS / "rope_scalings.json"),
    ):
        code, out, err = run_script(f"scripts/{script}.py", *arguments)
        assert (code, out) == (2, "") and list(tmp_path.iterdir()) == []
        assert err == "error: No picture can be drawn without matplotlib: pip install matplotlib.\n"


def test_without_matplotlib_it_is_said_before_anything_is_measured(run_script, monkeypatch, tmp_path, tiny_checkpoint):
    """Catches: hours of measuring that end without a picture, and nothing said before."""

    def refuse(*arguments, **fields):
        raise ValueError("now it is measured.")

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(checkpoint, "load_model", refuse)
    np.arange(300, dtype="<u2").tofile(tmp_path / "ids.bin")
    model = ["--checkpoint_dir", tiny_checkpoint]
    data = [*model, "--data", tmp_path / "ids.bin"]
    output = tmp_path / "r.json"
    for script, last, *arguments in (
        ("compare_context", "now it is measured.", *data, "--lengths", "[64]"),
        ("evaluate_streaming", "now it is measured.", *data, "--cache_size", "24"),
        ("evaluate_passkey", "now it is measured.", *model, "--lengths", "[450]"),
        ("compare_longlora", "now it is measured.", *data, "--eval_data", tmp_path / "ids.bin", "--context", 128,
         "--methods", "[untrained]"),
        ("benchmark_attention", "There is no method", "--lengths", "[16]", "--methods", "[none]"),
    ):  # fmt: skip
        code, _, err = run_script(f"scripts/{script}.py", *arguments, "--output", output)
        lines = err.splitlines()
        assert code == 2 and last in lines[-1], (script, err)
        assert (
            lines[0].startswith("no picture can be drawn without matplotlib: pip install matplotlib") and len(lines) > 1
        )
        assert f"redraw.py --results {output})" in lines[0]
        for picture in (tmp_path / "r.png",):
            code, _, err = run_script(f"scripts/{script}.py", *arguments, "--output", picture)
            assert code == 2 and "where the picture would go" in err and not picture.exists()


def test_runs_of_one_name_are_kept_apart(run_script, tmp_path):
    """Catches: one of two runs lost, since both directories have one name; figures written over the picture."""
    pytest.importorskip("matplotlib")
    for loss, parent in ((1.5, "a"), (2.5, "b")):
        directory = tmp_path / parent / "lora"
        directory.mkdir(parents=True)
        row = {name: "1" for name in METRICS} | {"loss": str(loss), "val_loss": ""}
        (directory / "metrics.csv").write_text(
            ",".join(METRICS) + "\n" + ",".join(row[name] for name in METRICS) + "\n"
        )
    runs = ["--runs", f"[{tmp_path / 'a/lora'},{tmp_path / 'b/lora'}]"]
    code, out, err = run_script("scripts/plot_metrics.py", *runs, "--output", tmp_path / "new" / "m.png")
    assert code == 0 and out == f"{tmp_path / 'new' / 'm.png'}\n", err
    read = json.loads((tmp_path / "new/m.json").read_text())["runs"]
    assert [run["metrics"]["loss"] for run in read.values()] == [[1.5], [2.5]]
    code, _, err = run_script("scripts/plot_metrics.py", *runs, "--output", tmp_path / "m.json")
    assert code == 2 and "where the figures would go" in err


def test_labels_are_spread_and_numbers_are_short():
    """Catches: labels over each other or outside, a number that is rounded in a label."""
    moved = plots.spread([0.9, 0.1, 0.11, 0.95, 1.3], 0.1)
    assert moved == pytest.approx([0.8, 0.1, 0.2, 0.9, 1.0])
    assert [plots.short_count(n) for n in (0, 300, 1024, 1536, 2000, 8192, 131072)] == [
        "0", "300", "1k", "1.5k", "2000", "8k", "128k",
    ]  # fmt: skip
    assert plots.names_of("[data/a.txt, data/b.txt]") == plots.names_of([Path("a.txt"), "x/b.txt"]) == "a.txt, b.txt"
    command = "python a.py --data '[x.txt, y.txt]' --version=2"
    assert plots.argument_of(command, "data") == "[x.txt, y.txt]" and plots.argument_of(command, "version") == "2"
    assert plots.argument_of(command, "dat") == ""
