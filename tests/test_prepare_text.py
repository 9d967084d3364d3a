"""Texts to directories of token files: the tokenizer's own ids, whatever the file, the processes and their end."""

import contextlib
import gzip
import importlib.util
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_texts import TOKENIZERS

from lit_swa.data import corpora, encode, prepare, sources
from lit_swa.data.encode import DocumentEncoder
from lit_swa.data.sources import Selection, Stream
from lit_swa.token_files import TokenData, TokenDirectory
from lit_swa.tokenizer import Tokenizer

WORDS = "the quick brown fox jumps over the lazy dog caf\u00e9 don't 1234 \u4f60\u597d ... <|im_start|>".split(" ")


def make_texts(n, seed=0, longest=60):
    """Documents of random words, one of them with quotes and line ends."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(n - 1)]
    return [*texts, 'line one\n\nline "two"\n']


@pytest.fixture
def small_parts(monkeypatch):
    """Files of a few kB are cut into parts."""
    monkeypatch.setattr(sources, "SMALLEST_PART", 2000)
    monkeypatch.setattr(prepare, "BATCH_DOCUMENTS", 5)


def run_job(tmp_path, checkpoint, data=(), name="out", processes=1, stream=None, **selection):
    [job] = prepare.make_jobs(tmp_path / name, checkpoint, list(data), Selection(**selection), stream)
    prepare.prepare(job, processes)
    return tmp_path / name


def documents_of(directory):
    """The ids of each document."""
    tokens = TokenDirectory(directory)
    flat = tokens.read(0, np.empty(tokens.n_tokens, dtype=np.int64))
    lengths = tokens.document_lengths(0, tokens.n_tokens)
    return [ids.tolist() for ids in np.split(flat, np.cumsum(lengths[:-1]))]


def encoded(checkpoint, texts):
    tokenizer = Tokenizer(checkpoint)
    return [tokenizer.encode(text, eos=True) for text in texts if text.strip()]


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != ".lit_swa.lock"}


def write_jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)))
    return path


def write_parquet(path, texts, key="text", rows=7, **more):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({key: texts, **more}), path, row_group_size=rows)
    return path


# ------------------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("name", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "json", "csv", "txt"])
def test_every_kind_of_file_gives_the_same_documents(tmp_path, tiny_checkpoint, small_parts, name):
    """Catches: a document lost, doubled or torn at the border of two parts, a blank one kept, an order that changes."""
    texts = make_texts(60)
    texts[7:7], path = [""], tmp_path / f"data.{name}"
    if name == "parquet":
        write_parquet(path, texts, "content")
    elif name == "txt":
        path.write_text("<END>".join(texts))
    elif name == "csv":
        rows = "".join(f'"{text.replace(chr(34), chr(34) * 2)}"\n' for text in texts if text)
        path.write_text("content\n" + rows)
    elif name == "json":
        path.write_text(json.dumps([{"content": text} for text in texts]))
    else:
        data = write_jsonl(path, texts, "content").read_bytes()
        if name.endswith("gz"):
            path.write_bytes(gzip.compress(data))
        if name.endswith("zst"):
            path.write_bytes(pytest.importorskip("zstandard").ZstdCompressor().compress(data))
    texts[-1] = texts[-1].strip("\n") if name == "txt" else texts[-1]
    out = run_job(tmp_path, tiny_checkpoint, [path], key="content", separator="<END>")
    assert documents_of(out) == encoded(tiny_checkpoint, texts)
    index = json.loads((out / "index.json").read_text())
    assert sum(s["text_bytes"] for s in index["shards"]) == sum(len(t.encode()) for t in texts)
    if name in ("jsonl", "parquet", "txt"):
        assert len(index["shards"]) > 3  # parts that several processes can share


def test_a_zst_file_that_ends_too_early_is_refused(tmp_path):
    """Catches: the rest of a file that was not fetched to its end, lost in silence; a second frame that is not read."""
    texts, path = make_texts(40), tmp_path / "a.jsonl.zst"
    data = write_jsonl(tmp_path / "a.jsonl", texts).read_bytes()
    frames = [pytest.importorskip("zstandard").ZstdCompressor().compress(piece) for piece in (data[:999], data[999:])]
    for cut, content in ((False, frames[0] + frames[1]), (True, frames[0] + frames[1][:-9])):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="zst is damaged .it ends within") if cut else contextlib.nullcontext():
            [part] = sources.cut_files([path], Selection())
            assert [text for text, _ in sources.read_part(part, Selection())] == texts


def test_lines_are_read_once(tmp_path, monkeypatch):
    """Catches: a line that begins exactly where a part does, and is read by both parts or by none."""
    texts = make_texts(12, longest=3)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    for size in (1, 2, 3, 30, 64):
        monkeypatch.setattr(sources, "SMALLEST_PART", size)
        parts = sources.cut_files([path], Selection())
        assert [t for part in parts for t, _ in sources.read_part(part, Selection())] == texts, size
        assert sum(n for part in parts for _, n in sources.read_part(part, Selection())) == path.stat().st_size


def test_separators_that_are_line_ends(tmp_path, tiny_checkpoint, monkeypatch):
    """Catches: a run of blank lines across the border of two parts, which gives a text twice or cuts it."""
    rng = random.Random(3)
    texts = make_texts(30, longest=6)[:-1]
    path = tmp_path / "a.txt"
    path.write_text("".join(text + "\n" * rng.randint(2, 7) for text in texts))
    for size in (1, 2, 3, 5, 64):
        monkeypatch.setattr(sources, "SMALLEST_PART", size)
        selection = Selection(separator="\n\n")
        found = [t for part in sources.cut_files([path], selection) for t, _ in sources.read_part(part, selection)]
        assert [t for t in found if t.strip()] == texts, size
    with pytest.raises(ValueError, match="it ends as it begins"):
        run_job(tmp_path, tiny_checkpoint, [path], separator="aba")


def test_a_directory_of_texts(tmp_path, tiny_checkpoint):
    """Catches: a text that is no document of its own, other files of the directory read as texts."""
    texts, data = make_texts(4), tmp_path / "data"
    (data / "more").mkdir(parents=True)
    for name, text in zip(("a.txt", "b.txt", "more/c.txt"), texts[:3], strict=True):
        (data / name).write_text(text)
    write_jsonl(data / "more/d.jsonl", texts[3:])
    (data / "books.json").write_text("{}")
    out = run_job(tmp_path, tiny_checkpoint, [data])
    assert documents_of(out) == encoded(tiny_checkpoint, texts)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_long_documents_have_the_ids_of_the_whole_text(tmp_path, monkeypatch, name):
    """Catches: a cut within a token or in front of a space that a tokenizer adds, BOS or EOS in the middle."""
    TOKENIZERS[name](tmp_path)
    tokenizer = Tokenizer(tmp_path)
    if tokenizer.eos_id is None:
        content = tokenizer.id_to_token(5)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": content}))
        tokenizer = Tokenizer(tmp_path)
    monkeypatch.setattr(encode, "LONG", 200)
    monkeypatch.setattr(encode, "PIECE", 80)
    monkeypatch.setattr(encode, "NEAR", 40)
    rng = random.Random(1)
    long = ["".join(w + rng.choice([" ", "  ", "\n", "\n\n"]) for w in rng.choices(WORDS, k=200)) for _ in range(6)]
    documents = [*long, "short", "a" * 400, *make_texts(3)]
    encoder = DocumentEncoder(tokenizer)
    got = [ids.tolist() for ids in encoder.encode(documents)]
    assert got == [tokenizer.encode(text, eos=True) for text in documents]
    if name == "byte-level":
        assert all(len(encoder.cut(text)) > 5 for text in long)
        (tmp_path / "a.txt").write_text(long[0])
        assert encoder.encode([tmp_path / "a.txt"])[0].tolist() == got[0]


# --------------------------------------------------------------------------------------- processes, ends, going on


def test_processes_and_kills_change_no_byte(tmp_path, tiny_checkpoint, small_parts, monkeypatch):
    """Catches: shards that depend on who wrote them, a half-written file under a final name, a part left out or done
    twice after a kill. Each start is killed at the write of another file, be it a shard, its documents or a record."""
    data = [write_jsonl(tmp_path / "a.jsonl", make_texts(40))]
    expected = contents(run_job(tmp_path, tiny_checkpoint, data, "alone"))
    assert contents(run_job(tmp_path, tiny_checkpoint, data, "two", processes=2)) == expected
    assert len(expected) > 6
    starts, code = 0, 9
    while code == 9:
        starts += 1
        if (process := os.fork()) == 0:
            replace, left = os.replace, [starts % 3 + 3]

            def kill_at_a_rename(*names, replace=replace, left=left):
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)
                replace(*names)

            monkeypatch.setattr(os, "replace", kill_at_a_rename)
            with contextlib.suppress(BaseException):
                run_job(tmp_path, tiny_checkpoint, data, "killed")
                os._exit(0)
            os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if code == 9:
            with pytest.raises(FileNotFoundError, match="is unfinished: give the command"):
                TokenDirectory(tmp_path / "killed")
    assert code == 0 and starts > 3 and contents(tmp_path / "killed") == expected


def test_processes_end_with_the_one_that_started_them(tmp_path, tiny_checkpoint, small_parts, monkeypatch):
    """Catches: processes that go on writing, or wait forever, when their parent was killed."""
    monkeypatch.setattr(sources, "SMALLEST_PART", 300)
    data = [write_jsonl(tmp_path / "a.jsonl", make_texts(60))]
    whole = DocumentEncoder.encode
    reader, writer = os.pipe()  # of which all of them have an end
    if (process := os.fork()) == 0:
        monkeypatch.setattr(DocumentEncoder, "encode", lambda *given: (time.sleep(0.05), whole(*given))[1])
        run_job(tmp_path, tiny_checkpoint, data, processes=2)
        os._exit(0)
    os.close(writer)
    while not list(tmp_path.glob("out/part-*.json")):
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    assert os.read(reader, 1) == b""  # when the last one has ended
    os.close(reader)
    assert len(list(tmp_path.glob("out/part-*.json"))) < 20
    run_job(tmp_path, tiny_checkpoint, data, processes=2)
    assert documents_of(tmp_path / "out") == encoded(tiny_checkpoint, make_texts(60))


def test_a_finished_directory_is_compared_and_left(tmp_path, tiny_checkpoint, run_script, small_parts):
    """Catches: other data written over a directory, a damaged one taken as done, a start that does all again."""
    data = write_jsonl(tmp_path / "a.jsonl", make_texts(30))
    out = tmp_path / "out"
    arguments = ["--data", data, "--output_dir", out, "--checkpoint_dir", tiny_checkpoint, "--processes", 1]
    code, printed, err = run_script("scripts/prepare_text.py", *arguments)
    assert code == 0 and printed.strip() == str(out) and "30 documents" in err
    assert "MB/s" in err and "with 1 process (encode_batch of tokenizers alone, 0.0 MB of it:" in err
    before = {path: path.stat().st_mtime_ns for path in out.glob("tokens-*")}
    code, _, err = run_script("scripts/prepare_text.py", *arguments)
    assert code == 0 and "is there already: comparing it" in err and "30 documents" in err
    assert {path: path.stat().st_mtime_ns for path in out.glob("tokens-*")} == before
    code, _, err = run_script("scripts/prepare_text.py", *arguments, "--key", "id")
    assert code == 2 and f"{out} was begun differently (key): choose another directory, or delete this one." in err
    shard = min(before)
    shard.write_bytes(b"\1\1" + shard.read_bytes()[2:])
    code, _, err = run_script("scripts/prepare_text.py", *arguments)
    assert code == 2 and f"{shard} is damaged: its SHA-256 is" in err


@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_wrong_with_a_file_is_said_in_one_sentence(tmp_path, tiny_checkpoint, small_parts, processes):
    """Catches: a traceback of another process, a line without its number, a directory that looks complete."""
    lines = write_jsonl(tmp_path / "a.jsonl", make_texts(60)).read_text().splitlines(keepends=True)
    for wrong, message in (
        ('{"text": "a", }\n', "a.jsonl line 41 is no JSON"),
        ('{"title": "x"}\n', "a.jsonl line 41 has the keys title: name the one of the text with --key"),
        ('{"text": 3}\n', "a.jsonl line 41, text is a int: it must be a text"),
        ('{"text": "\\ud83d!"}\n', r"jsonl line 41, text has half a character, '.ud83d', which no tokenizer takes"),
        ("[1]\n", "a.jsonl line 41 is a list: it must be an object like"),
    ):
        (tmp_path / "a.jsonl").write_text("".join([*lines[:40], wrong, *lines[40:]]))
        with pytest.raises(ValueError, match=message):
            run_job(tmp_path, tiny_checkpoint, [tmp_path / "a.jsonl"], message[:20], processes)
        assert not (tmp_path / message[:20] / "index.json").exists()
    (tmp_path / "a.jsonl").write_text("".join(lines))
    with pytest.raises(ValueError, match="was begun differently .data.: choose another directory"):
        run_job(tmp_path, tiny_checkpoint, [tmp_path / "a.jsonl"], message[:20], processes)
    for path in (tmp_path / message[:20]).glob("part-*.json"):
        path.unlink()
    out = run_job(tmp_path, tiny_checkpoint, [tmp_path / "a.jsonl"], message[:20], processes)
    assert documents_of(out) == encoded(tiny_checkpoint, make_texts(60))


def test_a_failure_leaves_nothing_half_written(tmp_path, tiny_checkpoint, small_parts, monkeypatch):
    """Catches: what the other processes were writing, which takes room on a disk that is full."""
    lines = write_jsonl(tmp_path / "a.jsonl", make_texts(99, longest=9)).read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join([*lines[:7], "broken\n", *lines[7:]]))  # behind what is encoded first
    whole = DocumentEncoder.encode
    monkeypatch.setattr(DocumentEncoder, "encode", lambda *given: (time.sleep(0.2), whole(*given))[1])
    with pytest.raises(ValueError, match="line 8 is no JSON"):
        run_job(tmp_path, tiny_checkpoint, [tmp_path / "a.jsonl"], processes=2)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lit_swa.lock", "job.json"]


def test_other_mistakes_are_said_in_one_sentence(tmp_path, tiny_checkpoint, run_script, monkeypatch):
    """Catches: a traceback for a package that is missing, for a file that is none, for arguments that do not fit."""
    (tmp_path / "blank.txt").write_text("a")
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n\n')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:-9])
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    (tmp_path / "y.jsonl.zst").write_bytes(b"PAR1")
    (tmp_path / "none").mkdir()
    for name in ("pyarrow", "pyarrow.parquet", "zstandard", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    out, data = ["--output_dir", tmp_path / "out"], tmp_path / "blank.txt"
    for arguments, message in (
        (["--data", tmp_path / "x.parquet", *out], "x.parquet is a Parquet file: to read it, run pip install pyarrow."),
        (["--data", tmp_path / "y.jsonl.zst", *out], "is compressed by zstd: to read it, run pip install zstandard."),
        (["--dataset", "a/b", *out], "a/b is read with the datasets library: run pip install datasets."),
        (["--data", tmp_path / "empty.jsonl", *out], "empty.jsonl holds no text: give a file with some."),
        (["--data", tmp_path / "cut.jsonl.gz", *out], "cut.jsonl.gz is damaged"),
        (["--data", tmp_path / "none", *out], "none holds no text: give .txt, .jsonl"),
        (["--data", tmp_path / "a.pdf", *out], "There is no file"),
        (["--data", data, "--output_dir", tmp_path / "x.parquet"], "x.parquet is a file: give a directory"),
        (["--data", data], "Give --output_dir, a directory for pretraining, or --output"),
        (["--data", data, "--dataset", "a/b", *out], "--dataset is read in place of --data"),
        (["--preset", "pile", *out], "preset='pile' is not known: choose from fineweb-edu, openwebtext"),
        (
            ["--preset", "openwebtext", "--split", "x", *out],
            "split='x' does not fit: Skylion007/openwebtext has train.",
        ),
        (out, "Nothing to read is given"),
    ):
        arguments = [*arguments, "--checkpoint_dir", tiny_checkpoint, "--processes", 1]
        code, _, err = run_script("scripts/prepare_text.py", *arguments)
        assert code == 2 and message in err and err.count("error:") == 1 and "Traceback" not in err, err
        for path in (tmp_path / "out").glob("*.json"):
            path.unlink()
    monkeypatch.setattr("lit_swa.formats.download.find_checkpoint", lambda name: pytest.fail("fetched for nothing"))
    code, _, err = run_script("scripts/prepare_text.py", "--preset", "pile", *out)
    assert code == 2 and "preset='pile' is not known" in err
    code, _, err = run_script("scripts/prepare_text.py", "--data", data, *out, "--processes", 0)
    assert code == 2 and "processes=0 does not fit" in err


# ------------------------------------------------------------------------------------------------ datasets and presets


class FakeStream(list):
    """What datasets.load_dataset(streaming=True) gives: records, in files that can be read one by one."""

    @property
    def num_shards(self):
        return len(self)

    def shard(self, num_shards, index):
        assert num_shards == len(self)
        return FakeStream([self[index]])

    def __iter__(self):
        return (record for file in list.__iter__(self) for record in file)


def test_datasets_are_read_as_they_come(tmp_path, tiny_checkpoint, monkeypatch):
    """Catches: a file of a dataset left out or read twice, a split or configuration that is not passed on."""
    texts, asked = make_texts(20), []
    files = FakeStream([[{"text": t} for t in texts[:9]], [], [{"text": t} for t in texts[9:]]])
    loader = SimpleNamespace(load_dataset=lambda *names, **how: (asked.append((names, how)), files)[1])
    monkeypatch.setitem(sys.modules, "datasets", loader)
    out = run_job(tmp_path, tiny_checkpoint, stream=Stream("a/b", "test", "small"))
    assert documents_of(out) == encoded(tiny_checkpoint, texts)
    assert asked[0] == (("a/b", "small"), {"split": "test", "streaming": True})
    assert [s["documents"] for s in json.loads((out / "index.json").read_text())["shards"]] == [9, 11]

    def refuse(*names, **how):
        raise ConnectionError("no route")

    loader.load_dataset = refuse
    with pytest.raises(OSError, match="The dataset a/b cannot be read .no route.: check its name"):
        run_job(tmp_path, tiny_checkpoint, name="other", stream=Stream("a/b"))


@pytest.mark.parametrize("hub", [False, True])
def test_datasets_of_the_library_itself(tmp_path, tiny_checkpoint, monkeypatch, hub):
    """Catches: a call that the datasets library does not take. The files lie in a directory, in place of the hub."""
    pytest.importorskip("datasets")
    texts = make_texts(30)
    for i in range(3):
        write_parquet(tmp_path / f"hub/some/set/data/train-{i}.parquet", texts[10 * i : 10 * i + 10])
    monkeypatch.setattr(sources, "HUB", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    stream = (
        Stream("some/set", "train", None, "data/train-*.parquet") if hub else Stream(str(tmp_path / "hub/some/set"))
    )
    out = run_job(tmp_path, tiny_checkpoint, stream=stream)
    assert documents_of(out) == encoded(tiny_checkpoint, texts)


@pytest.mark.parametrize("preset", corpora.CORPORA)
def test_presets_read_a_local_copy_of_their_files(tmp_path, tiny_checkpoint, preset):
    """Catches: a pattern or a key that is not the published one's, a split that takes the files of another."""
    layout = {  # a file of the training split on the hub, and one that is not
        "openwebtext": ("plain_text/train-00000-of-00080.parquet", "other/train-0.parquet"),
        "redpajama": ("arxiv_sample.jsonl", "README.txt"),
        "slimpajama": ("train/chunk1/example_train_0.jsonl.zst", "validation/chunk1/example_holdout_0.jsonl.zst"),
        "starcoder": ("python/train-00000-of-00059.parquet", "x/y/z.parquet"),
        "tinystories": ("data/train-00000-of-00004-2d5a1467fff1081b.parquet", "data/validation-00000-of-00001.parquet"),
        "fineweb-edu": ("data/CC-MAIN-2013-20/train-00000-of-00014.parquet", "sample/10BT/000_00000.parquet"),
    }
    texts, has_parquet = make_texts(12), importlib.util.find_spec("pyarrow") is not None
    key = "content" if preset == "starcoder" else "text"
    for name, given in zip(layout[preset], (texts, ["other"] * 3), strict=True):
        path = tmp_path / "copy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not name.endswith(".parquet"):
            write_jsonl(path, given)
        elif has_parquet:
            write_parquet(path, given, key)
        else:
            path.touch()
    [job], weights = prepare.make_preset_jobs(tmp_path / "out", tiny_checkpoint, [tmp_path / "copy"], preset, "train")
    assert job.files == (tmp_path / "copy" / layout[preset][0],) and job.selection.key == key and not weights
    if preset == "redpajama" or has_parquet and preset != "slimpajama":
        prepare.prepare(job, 1)
        assert documents_of(tmp_path / "out") == encoded(tiny_checkpoint, texts)


def test_a_mixture_has_its_parts_and_their_weights(tmp_path, tiny_checkpoint, run_script, monkeypatch):
    """Catches: code that is in the mixture twice, weights that the loader does not see."""
    texts, records = make_texts(40), []
    for i, text in enumerate(texts):
        name = "RedPajamaGithub" if i % 2 else "RedPajamaC4"
        records.append({"text": text, "meta": {"redpajama_set_name": name}})
    slim = corpora.SLIMPAJAMA._replace(splits={"train": "*.jsonl"})
    star = corpora.STARCODER._replace(splits={"train": "*.jsonl"})
    tinyllama = corpora.MIXTURES["tinyllama"]
    plain = {"slimpajama": slim._replace(left_out=tinyllama["slimpajama"][0].left_out), "starcoder": star}
    mixture = {name: (corpus, tinyllama[name][1]) for name, corpus in plain.items()}
    monkeypatch.setitem(corpora.MIXTURES, "tinyllama", mixture)
    for name in plain:
        (tmp_path / name).mkdir()
    (tmp_path / "slimpajama/a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_jsonl(tmp_path / "starcoder/a.jsonl", texts, "content")
    arguments = ["--preset", "tinyllama", "--data", tmp_path, "--output_dir", tmp_path / "out", "--processes", 1]
    code, _, err = run_script("scripts/prepare_text.py", *arguments, "--checkpoint_dir", tiny_checkpoint)
    assert code == 0, err
    assert documents_of(tmp_path / "out/slimpajama") == encoded(tiny_checkpoint, texts[::2])
    assert documents_of(tmp_path / "out/starcoder") == encoded(tiny_checkpoint, texts)
    data = TokenData(tmp_path / "out", 16, 4)
    assert [round(source.weight, 3) for source in data.sources] == [0.694, 0.306]


# ---------------------------------------------------------------------------------------------------------- a tokenizer


def test_a_trained_tokenizer_is_taken_by_the_other_scripts(tmp_path, run_script):
    """Catches: a vocabulary of another size, bytes without a token, a document without its end, no two equal runs."""
    data = write_jsonl(tmp_path / "a.jsonl", make_texts(200))
    for name in ("one", "two"):
        arguments = ["--data", data, "--vocab_size", 300, "--output_dir", tmp_path / name]
        code, out, err = run_script("scripts/train_tokenizer.py", *arguments)
        assert (
            code == 0 and out.strip() == str(tmp_path / name) and "300 tokens; a document ends in <|endoftext|>" in err
        )
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / "two/tokenizer.json").read_bytes()
    tokenizer = Tokenizer(tmp_path / "one")
    assert tokenizer.vocab_size == 300 and tokenizer.bos_id is None and tokenizer.eos_id == 0
    strange = "\u0000\x7f\ud7ff\U0001f600 x\r\n\t 2026"
    assert tokenizer.decode(tokenizer.encode(strange)) == strange
    assert len(tokenizer.encode("the quick brown fox")) < 8 and len(tokenizer.encode("1234")) == 4
    out = ["--output_dir", tmp_path / "out", "--processes", 1]
    assert run_script("scripts/prepare_text.py", "--data", data, "--checkpoint_dir", tmp_path / "one", *out)[0] == 0
    assert documents_of(tmp_path / "out") == encoded(tmp_path / "one", make_texts(200))
    arguments = ["--data", data, "--output_dir", tmp_path / "three"]
    assert "fewer than 8192: no other pair" in run_script("scripts/train_tokenizer.py", *arguments)[2]
    code, _, err = run_script("scripts/train_tokenizer.py", *arguments, "--vocab_size", 200)
    assert code == 2 and "vocab_size=200 does not fit: it must be a whole number from 257" in err
    code, _, err = run_script("scripts/train_tokenizer.py", "--data", tmp_path / "nowhere", "--output_dir", data)
    assert code == 2 and "a.jsonl is a file: give a directory to write to" in err  # before a text is read


def test_the_published_names_are_in_the_help():
    """Catches: a preset that the script does not name."""
    script = (Path(__file__).resolve().parents[1] / "scripts/prepare_text.py").read_text()
    assert all(name in script for name in (*corpora.CORPORA, *corpora.MIXTURES))
