"""Small models and texts that many tests share."""

import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

if workers := int(
    os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")
):  # each process of pytest -n with its share of cores
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
os.environ["KINETO_LOG_LEVEL"] = "99"  # read when a process profiles for the first time: see speed.StepTrace

import pytest  # noqa: E402
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests run from a clone, installed or not

import dilated  # noqa: E402
from ranks import Ranks  # noqa: E402
from tiny import randomize, tiny_config  # noqa: E402

from lit_swa import GPT, linear_formats  # noqa: E402


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(1234)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is found out about the machine, and compiled for it, lies in a directory that all workers share. Layouts are
    timed in no time: no test depends on which is the fastest."""
    shared = tmp_path_factory.getbasetemp()
    os.environ["LIT_SWA_CACHE"] = str((shared.parent if workers else shared) / "cache")
    linear_formats.LONGEST, linear_formats.FLUSHED = 0.0, 1


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """Two processes that share work through gloo."""
    ranks = Ranks(2)
    yield ranks
    ranks.end()


@pytest.fixture(params=["fast", "plain"])
def steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test twice: with fast_attention.py, and as if it were not there."""
    if request.param == "plain":
        monkeypatch.setattr("lit_swa.model.fast_attention", lambda: None)
    return request.param


@pytest.fixture
def dilated_row() -> Iterator[None]:
    """The variant of dilated.py is known during the test."""
    with dilated.registered():
        yield


@pytest.fixture
def tiny_model() -> Callable[..., GPT]:
    def build(**fields) -> GPT:
        model = GPT(tiny_config(**fields)).eval()
        randomize(model)
        return model

    return build


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete checkpoint directory: a random two-layer model, a byte-level BPE trained on a page of text, ChatML."""
    import json

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from lit_swa.checkpoint import save_checkpoint

    directory = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([__doc__ * 3, "the quick brown fox jumps over the lazy dog " * 9], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    names = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "chat_template": template,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    torch.manual_seed(5)
    config = tiny_config(vocab_size=tokenizer.get_vocab_size(), padded_vocab_size=328, block_size=512)
    model = GPT(config)
    randomize(model)
    save_checkpoint(model, config, directory)
    return directory


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Run a script in this process, as `python script arguments` would: (exit code, stdout, stderr)."""

    def run(script: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(Path(__file__).resolve().parents[1] / script), run_name="__main__")
        except SystemExit as e:
            code = e.code or 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run
