"""The command lines: what they print where, their errors, and a chat that survives Ctrl-C."""

import ast
import importlib
import importlib.util
import io
import json
import pkgutil
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import brute_force
import pytest
import torch

from lit_swa.model import VARIANTS
from lit_swa.utils import run_script

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(
    str(p.relative_to(ROOT))
    for folder in ("generate", "finetune", "pretrain", "scripts")
    for p in (ROOT / folder).glob("*.py")
)
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tutorials").glob("*.md"))]
FENCED = re.compile(r"^```.*?^```", re.M | re.S)


def run(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, stdin: str = "") -> int:
    """Run a script in this process, as `python script arguments` would; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as e:
        return e.code or 0
    return 0


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What each script prints for --help, from one process that runs all of them; it ends where torch is imported."""
    probe = f"""
import contextlib, io, json, runpy, sys
for script in {SCRIPTS!r}:
    sys.argv, printed = [script, "--help"], io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        runpy.run_path(script, run_name="__main__")
    if "torch" in sys.modules:
        sys.exit(f"{{script}} imports torch for its help")
    print(json.dumps([script, printed.getvalue()]), flush=True)
"""
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=120)
    return dict(map(json.loads, done.stdout.splitlines())) | {"error": done.stderr}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_complete_and_needs_no_torch(script, helps):
    """Catches: a heavy import at the top of a script, an argument without a description, half of a first sentence."""
    assert script in helps, helps["error"]
    assert helps[script].partition("\n\noptions:")[0].endswith("."), "its first sentence is longer than a line"
    options = [
        " ".join(block.split())
        for block in helps[script].split("\n  --")[1:]
        if not block.startswith(("config", "print_config"))
    ]
    assert options
    for option in options:
        description = option.split(" ", 2)[2].rpartition("(")[0]
        assert len(description) > 10 and "type:" in option, f"not described: {option}"


def test_every_name_that_is_imported_is_there():
    """Catches: a name that moved, and is missed only when a function of a script imports it."""
    folders, missing = ("lit_swa", "scripts", "generate", "finetune", "pretrain"), []
    for path in [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(("lit_swa", "scripts")):
                continue
            try:
                module = importlib.import_module(node.module)
            except ModuleNotFoundError as error:  # triton, where there is no GPU
                assert not error.name.startswith(("lit_swa", "scripts")), f"{path}: {error}"
                continue
            names = [name.name for name in node.names if name.name != "*" and not hasattr(module, name.name)]
            missing += [
                f"{path.relative_to(ROOT)}, line {node.lineno}: {node.module}.{name}"
                for name in names
                if not hasattr(module, "__path__") or importlib.util.find_spec(f"{node.module}.{name}") is None
            ]
    assert not missing, missing


def commands_of(page: str) -> list[tuple[str, str]]:
    """(script, its arguments) of every command in a page, in a block or within a line."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = "\n".join(block for block in FENCED.findall(text) if block.startswith("```bash"))
    blocks = re.sub(r"'[^']*'", "''", blocks.replace("\\\n", " "))  # what is quoted may hold line ends, and is no flag
    lines = blocks.splitlines() + [" ".join(code.split()) for code in re.findall(r"`([^`]*)`", FENCED.sub("", text))]
    found = [re.search(r"(?:python|nproc_per_node \d+) ((?:\w+/)+\w+\.py)([^#|]*)", line) for line in lines]
    return [(match[1], match[2]) for match in found if match and not match[1].startswith("tests/")]


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_can_be_typed(page, helps):
    """Catches: a page that names a script or a flag which has another name now."""
    for script, arguments in commands_of(page):
        assert script in helps or script.startswith("scripts/peers/"), f"there is no {script}"
        for flag in re.findall(r"(?<!\S)--(\w+)(?![\w.])", arguments):
            assert re.search(rf"--{flag}\b", helps[script]), f"{script} has no --{flag}"


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page):
    """Catches: a file that was moved, or a heading that was reworded, which a page still points to."""
    here = ROOT / page
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", FENCED.sub("", here.read_text(encoding="utf-8"))):
        name, _, anchor = link.partition("#")
        target = here.parent / name if name else here
        assert target.exists(), f"there is no {link}"
        assert not anchor or anchor in headings(target), f"{link} is no heading"


def test_every_module_imports():
    """Catches: a module that needs a package which is not a dependency, or runs something when imported."""
    import lit_swa

    for module in pkgutil.walk_packages(lit_swa.__path__, "lit_swa."):
        kernels = module.name.endswith(("_kernel", "_kernels"))
        if not kernels or importlib.util.find_spec("triton"):  # which comes with CUDA's torch
            importlib.import_module(module.name)


def test_the_answer_goes_to_stdout_and_statistics_to_stderr(tiny_checkpoint, monkeypatch, capsys):
    """Catches: a progress line in a pipe, or a completion without its prompt."""
    fixed = ["--checkpoint_dir", str(tiny_checkpoint)]
    arguments = [*fixed, "--prompt", "the quick brown", "--max_new_tokens", "12", "--seed", "3"]
    assert run("generate/base.py", arguments, monkeypatch) == 0
    first = capsys.readouterr()
    assert first.out.startswith("the quick brown") and len(first.out) > len("the quick brown\n")
    for words in ("prefill", "decode", "first token", "window none (context 512)", "cache", "tok/s"):
        assert words in first.err
    assert run("generate/base.py", arguments, monkeypatch) == 0
    assert capsys.readouterr().out == first.out  # the same seed
    window = ["--model.attention", "sliding", "--model.sliding_window_size", "4", "--model.rolling_kv_cache", "true"]
    assert run("generate/base.py", arguments + window, monkeypatch) == 0
    windowed = capsys.readouterr()
    assert windowed.out != first.out and "window 4 rolling" in windowed.err
    empty = [*fixed, "--prompt", "-", "--max_new_tokens", "0"]
    assert run("generate/base.py", empty, monkeypatch, stdin="from a pipe") == 0
    assert capsys.readouterr().out == "from a pipe\n"


def test_each_completion_is_that_of_its_own_seed(tiny_checkpoint, monkeypatch, capsys):
    """Catches: completions that are all the same, or that depend on those before them."""
    fixed = ["--checkpoint_dir", str(tiny_checkpoint), "--prompt", "the quick", "--max_new_tokens", "12"]
    assert run("generate/base.py", [*fixed, "--seed", "5", "--num_samples", "2"], monkeypatch) == 0
    both, alone = capsys.readouterr().out, []
    for seed in ("5", "6"):
        assert run("generate/base.py", [*fixed, "--seed", seed], monkeypatch) == 0
        alone.append(capsys.readouterr().out)
    assert both == "".join(alone) and alone[0] != alone[1]


def test_a_compiled_run_prints_the_same_text(tiny_checkpoint, monkeypatch, capsys):
    """Catches: a --compile that is accepted and not used, or that is made ready only while it decodes."""
    from lit_swa import completion, cpu_decode

    arguments = ["--checkpoint_dir", str(tiny_checkpoint), "--prompt", "the quick brown", "--temperature", "0"]
    arguments += ["--device", "cpu", "--max_new_tokens", "8"]
    assert run("generate/base.py", arguments, monkeypatch) == 0
    plain, step, warm_up = capsys.readouterr(), cpu_decode.Step.run, completion.warm_up
    calls, warmed = [], []
    monkeypatch.setattr(cpu_decode.Step, "run", lambda *given: (calls.append(1), step(*given))[1])
    monkeypatch.setattr(completion, "warm_up", lambda *given: (warm_up(*given), warmed.append(len(calls)))[0])
    assert run("generate/base.py", [*arguments, "--compile", "true"], monkeypatch) == 0
    compiled = capsys.readouterr()
    assert compiled.out == plain.out and "compiled in" in compiled.err and "compiled in" not in plain.err
    assert len(warmed) == 1 and 0 < warmed[0] <= len(calls) - 7, "of 8 tokens the first comes from the prompt"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--checkpoint_dir", "{missing}"], "nowhere"),
        (["--prompt", ""], "prompt is empty"),
        (["--prompt", "a b " * 500], "tokens and the context 512"),
        (["--temperature", "-1"], "temperature=-1.0"),
        (["--temperature", "warm"], "temperature"),
        (["--dtype", "float7"], "float7"),
        (["--device", "tpu"], "'tpu'"),
        (["--num_samples", "0"], "num_samples"),
        (["--model.sliding_window", "4"], "sliding_window_size"),
        (["--model.sliding_window_size", "4"], "no effect"),
        (["--model.attention", "sliding"], "needs sliding_window_size"),
        (["--model.attention", "sliding", "--model.sliding_window_size", "0"], "sliding_window_size=0"),
        (["--model.n_query_groups", "4"], "does not divide"),
        (["--model.n_layer", "3"], "transformer.h.2"),
        (["--model.n_embd", "64"], "asks for"),
        (["--wat", "1"], "unrecognized arguments: --wat"),
    ],
)
def test_bad_input_ends_in_one_sentence_and_exit_code_2(
    arguments, message, tiny_checkpoint, monkeypatch, capsys, tmp_path
):
    """Catches: a traceback, a silent default, a wrong exit code."""
    arguments = [a.replace("{missing}", str(tmp_path / "nowhere")) for a in arguments]
    if "--checkpoint_dir" not in arguments:
        arguments = ["--checkpoint_dir", str(tiny_checkpoint), *arguments]
    assert run("generate/base.py", arguments, monkeypatch) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.startswith("error: ")
    assert len(printed.err.strip().splitlines()) == 1 and printed.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--stop", ""],
        ["--stop", '["x", ""]'],
        ["--max_new_tokens", "0"],
        ["--max_new_tokens", "1000000000", "--model.block_size", "2147483648"],
    ],
)
def test_a_chat_refuses_what_no_turn_could_mend(arguments, tiny_checkpoint, monkeypatch, capsys):
    """Catches: the same error at every turn, and exit code 0."""
    arguments = ["--checkpoint_dir", str(tiny_checkpoint), *arguments]
    assert run("generate/chat.py", arguments, monkeypatch, stdin="hello\n") == 2
    error = capsys.readouterr().err
    assert any(words in error for words in ("A stop is an empty text", "max_new_tokens=0", "caches of 1,000,000,000"))


@pytest.fixture(scope="module")
def overflowing(tiny_checkpoint, tmp_path_factory) -> Path:
    """A checkpoint whose activations are too large for float16, as Gemma's are."""
    from lit_swa.checkpoint import load_model, save_checkpoint

    model, directory = load_model(tiny_checkpoint), tmp_path_factory.mktemp("large") / "model"
    model.transformer.h[0].norm_2.weight.data.fill_(60000.0)
    save_checkpoint(model, model.config, directory, source_dir=tiny_checkpoint)
    (directory / "text.txt").write_text("the quick brown fox " * 60)
    (directory / "chat.jsonl").write_text('"hello"')
    return directory


@pytest.mark.parametrize(
    "script, arguments",
    [
        ("generate/base.py", ["--temperature", "0"]),
        ("generate/base.py", ["--temperature", "1"]),
        ("generate/chat.py", []),
        ("scripts/evaluate_passkey.py", ["--lengths", "[450]", "--trials", "1"]),
        ("scripts/evaluate_streaming.py", ["--chat", "{}/chat.jsonl"]),
        ("scripts/evaluate_streaming.py", ["--data", "{}/text.txt", "--sinks", "[0]", "--own_attention", "false"]),
        ("scripts/evaluate_ppl.py", ["--data", "{}/text.txt", "--seq_len", "32"]),
        ("scripts/compare_context.py", ["--data", "{}/text.txt", "--lengths", "[32]", "--methods", "[rope, ntk]"]),
    ],
)
def test_logits_beyond_the_dtype_are_said(script, arguments, overflowing, monkeypatch, capsys, tmp_path):
    """Catches: an empty answer and exit code 0, a chat that says the same at every turn, results of nothing."""
    arguments = [a.replace("{}", str(overflowing)) for a in arguments]
    if script.startswith("scripts/"):
        arguments += ["--output", str(tmp_path / "o.json")]
    fixed = ["--checkpoint_dir", str(overflowing), "--dtype", "float16"]
    assert run(script, fixed + arguments, monkeypatch, stdin="hello\nagain\n") == 2
    error = capsys.readouterr().err
    assert "--dtype float32 or bfloat16" in error.splitlines()[-1] and error.count("float16") == 1 + error.count(
        "bfloat16"
    )
    assert not (tmp_path / "o.json").exists()


def test_a_device_that_is_not_there_is_refused(tiny_checkpoint, monkeypatch, capsys):
    """Catches: a fall-back to the CPU that nobody asked for."""
    import torch

    absent = "mps" if torch.cuda.is_available() else "cuda"
    assert run("generate/base.py", ["--checkpoint_dir", str(tiny_checkpoint), "--device", absent], monkeypatch) == 2
    assert "use --device cpu" in capsys.readouterr().err


GREEDY = ["--temperature", "0", "--repetition_penalty", "1"]


def test_a_script_leaves_its_processes_when_it_is_done_and_not_after_an_error(tmp_path, monkeypatch):
    """Catches: threads of torch.distributed that outlive Python, and one that waits for others at an error."""
    group = torch.distributed

    def main(fail: bool = False) -> None:
        if fail:
            raise ValueError("It fails.")

    group.init_process_group("gloo", store=group.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        monkeypatch.setattr(sys, "argv", ["x", "--fail", "true"])
        with pytest.raises(SystemExit):
            run_script(main)
        assert group.is_initialized()
        monkeypatch.setattr(sys, "argv", ["x"])
        run_script(main)
        assert not group.is_initialized()
    finally:
        if group.is_initialized():
            group.destroy_process_group()


def test_a_chat_says_that_training_saw_other_prompts(tiny_checkpoint, monkeypatch, capsys, tmp_path):
    """Catches: a model that was trained on Alpaca's prompts and chatted with in the template's, without a word."""
    for path in tiny_checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    arguments = ["--checkpoint_dir", str(tmp_path), "--max_new_tokens", "1", *GREEDY]
    for record, said in (({"prompt_style": "alpaca"}, True), ({"prompt_style": "chat"}, False), ({"step": 1}, False)):
        (tmp_path / "run.json").write_text(json.dumps(record))
        assert run("generate/chat.py", arguments, monkeypatch, stdin="hello\n") == 0
        assert ("was trained on the prompt style alpaca" in capsys.readouterr().err) == said


def test_a_chat_keeps_its_cache_resets_and_saves(tiny_checkpoint, monkeypatch, capsys, tmp_path):
    """Catches: a turn that is fed again, a reset that forgets nothing, a file overwritten."""
    target = tmp_path / "talk.json"
    long = "x" * 5000  # a line repeats no more than the beginning and the end of it
    turns = f"hello\nagain\n/save {target}\n/save {target}\n/nonsense{long}\n/save {long}\n"
    turns += "/reset\nhello\n/exit\nnever read\n"
    arguments = ["--checkpoint_dir", str(tiny_checkpoint), "--max_new_tokens", "8", *GREEDY]
    assert run("generate/chat.py", arguments, monkeypatch, stdin=turns) == 0
    printed = capsys.readouterr()
    stats = printed.err.split("prefill ")[1:]
    assert len(stats) == 3 and "prompt tokens in it" in stats[1] and "in it" not in stats[0]
    assert "is there already" in printed.err and "no command /nonsense" in printed.err and len(printed.err) < 3000
    messages = json.loads(target.read_text())
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2 and messages[2]["content"] == "again"
    assert printed.out == f"{messages[1]['content']}\n{messages[3]['content']}\n{messages[1]['content']}\n"


def test_chat_equals_reading_the_whole_conversation_again(tiny_checkpoint, monkeypatch, capsys, tmp_path):
    """Catches: a kept cache that is not the conversation's, with a window that has long been outgrown."""
    from lit_swa.checkpoint import load_model
    from lit_swa.generate import generate_text
    from lit_swa.tokenizer import Tokenizer

    window = {"attention": "sliding", "sliding_window_size": 16, "rolling_kv_cache": True}
    target = tmp_path / "talk.json"
    turns = "the quick\nbrown fox\njumps over\n" + f"/save {target}\n"
    arguments = ["--checkpoint_dir", str(tiny_checkpoint), "--max_new_tokens", "24", *GREEDY]
    arguments += [part for k, v in window.items() for part in (f"--model.{k}", str(v).lower())]
    assert run("generate/chat.py", arguments, monkeypatch, stdin=turns) == 0
    capsys.readouterr()
    messages = json.loads(target.read_text())
    tokenizer = Tokenizer(tiny_checkpoint)
    for i in (1, 3, 5):
        model = load_model(tiny_checkpoint, **window)
        ids = tokenizer.apply_chat_template(messages[:i])
        answer = "".join(
            generate_text(model, tokenizer, ids, continues=False, max_new_tokens=24, stop_tokens=tokenizer.eos_ids)
        )
        assert answer == messages[i]["content"]


def test_ctrl_c_stops_the_answer_and_not_the_chat(tiny_checkpoint, monkeypatch, capsys, tmp_path):
    """Catches: a program that ends with the answer, or a conversation that is broken after it."""
    from lit_swa import GPT

    plain, calls = GPT.forward, []

    def forward(self, *arguments, **keywords):
        calls.append(1)
        if len(calls) in (10, 20):  # in the middle of an answer that would not end
            signal.raise_signal(signal.SIGINT)
        return plain(self, *arguments, **keywords)

    monkeypatch.setattr(GPT, "forward", forward)
    window = ["--model.attention", "sliding", "--model.sliding_window_size", "16", "--model.rolling_kv_cache", "true"]
    arguments = ["--checkpoint_dir", str(tiny_checkpoint), "--max_new_tokens", "1000000000", *GREEDY, *window]
    turns = f"hello\nagain\n/save {tmp_path / 'talk.json'}\n"
    assert run("generate/chat.py", arguments, monkeypatch, stdin=turns) == 0
    assert capsys.readouterr().err.count("prefill") == 2 and len(calls) == 20
    assert [m["role"] for m in json.loads((tmp_path / "talk.json").read_text())] == ["user", "assistant"] * 2


def test_the_plots_are_drawn_from_the_model(tmp_path, monkeypatch):
    """Catches: a picture drawn by hand, and a mask, a group of S2-Attn or a distance that is not the method's."""
    pytest.importorskip("matplotlib")
    sizes = ["--tokens", "17", "--window", "5", "--sinks", "3", "--chunk", "4", "--local", "2", "--group", "5"]
    directory = tmp_path / "of" / "its own"
    assert run("scripts/plot_masks.py", ["--output_dir", str(directory), *sizes], monkeypatch) == 0
    masks, distances, scalings = (
        json.loads((directory / f"{name}.json").read_text()) for name in ("masks", "distances", "rope_scalings")
    )
    definitions = {
        "full": brute_force.meet_full,
        "sliding": brute_force.meet_sliding(5),
        "streaming": brute_force.meet_streaming(5, 3),
        "dual_chunk": brute_force.meet_dual_chunk(4, 2),
        "full, linear": lambda i, j, head: (i / 2, j / 2) if j <= i else None,
        "s2 straight": lambda i, j, head: brute_force.meet_shifted_groups(5, 2)(i, j, 0),
        "s2 shifted": lambda i, j, head: brute_force.meet_shifted_groups(5, 2)(i, j, 1),
    }
    for name, meet in definitions.items():
        met = [[meet(i, j, 0) for j in range(17)] for i in range(17)]
        words = [["." if m is None else f"{m[0] - m[1]:g}" for m in row] for row in met]
        if name in distances["distances"]:
            assert distances["distances"][name]["rows"] == [" ".join(row) for row in words]
        if name in masks["masks"]:
            hidden = [[c == "." for c in row] for row in masks["masks"][name]["rows"]]
            assert hidden == [[w == "." for w in row] for row in words]
    variants = {name for name, row in VARIANTS.items() if row.parts}
    assert variants < set(masks["masks"]) and variants < set(distances["distances"])
    assert set(definitions) <= set(masks["masks"]) | set(distances["distances"])
    assert masks["masks"]["dual_chunk"]["rows"][9] == "33332222" + "11" + 7 * "."  # its parts
    assert masks["cache"][-1]["slots"] == [8, 9, 6, 7, 8, 9, 6, 7] and masks["cache"][-1]["read"] == [2, 6]
    assert set(scalings["stretch"]["linear"]) == {4.0} and scalings["stretch"]["ntk"][-1] == pytest.approx(4.0)
    assert all(5000 < (directory / f"{name}.png").stat().st_size for name in ("masks", "distances", "rope_scalings"))
