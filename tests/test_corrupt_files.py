"""Files from strangers: damaged or malicious, they end in one sentence or load; nothing crashes, hangs or runs.

The formats are fuzzed in a child process, so that a crash is seen as such and its memory can be measured. Run as a
script, this file is that child: tests/test_corrupt_files.py COUNT SEED FORMAT... prints a JSON object per format.
"""

import copy
import json
import os
import pickle
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import start_script

ROOT = Path(__file__).resolve().parent.parent
FORMATS = ("safetensors", "gguf", "config", "lit_config", "index")
CALLS_PER_FILE = 1_000_000  # of functions: work that does not depend on the machine
MEMORY_BYTES = 256 * 2**20

# -------------------------------------------------------------------------------------------------------- the mutations

HUGE = (0, 1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
ODD_VALUES = (
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    2**63,
    10**400,
    1e308,
    -0.5,
    "",
    "x",
    "../../etc/passwd",
    "\x00",
    [],
    [[]],
    {},
    [0],
    ["full_attention"] * 7,
    {"rope_type": "yarn"},
    {"type": "linear", "factor": 0},
    {"a": {"a": {"a": 1}}},
)


def mutate_bytes(data: bytes, rng: random.Random, front: int) -> bytes:
    """Flip, cut, repeat, or overwrite with a suspicious integer; most often within the first `front` bytes."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        limit = max(1, min(len(data), front if rng.random() < 0.9 else len(data)))
        at, kind = rng.randrange(limit), rng.randrange(6)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del data[at : at + rng.choice((1, 4, 8, 1000))]
        elif kind == 2:
            data = data[:at]
        elif kind == 3:
            data[at:at] = data[at : at + rng.choice((1, 8, 64))] * rng.choice((1, 2, 1000))
        else:
            data[at : at + 8] = struct.pack("<Q", rng.choice(HUGE))
    return bytes(data)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Change a value or a key somewhere in the tree, or the text itself."""
    if rng.random() < 0.3:
        bombs = (
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b"1" * 10_000,
            b"{" + b'"a":1,' * 1000 + b'"b":NaN}',
            b"\xff\xfe",
            b"null",
        )
        return rng.choice(bombs) if rng.random() < 0.2 else mutate_bytes(data, rng, len(data))
    tree = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        node = tree
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8:
                node = node[key]
                continue
            if rng.random() < 0.2:
                del node[key]
            else:
                node[key] = copy.deepcopy(rng.choice(ODD_VALUES))
            break
    return json.dumps(tree).encode()


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# The largest files that are parsed at all, of the things that take most memory for their length.
LISTS = b'{"a":[' + b"[]," * (4 * 2**20 // 3 - 5) + b"[]]}"
GGUF_BOMB = (
    b"GGUF"
    + struct.pack("<IQQ", 3, 0, 1)
    + struct.pack("<Q", 1)
    + b"a"
    + struct.pack("<IIQ", 9, 8, 1_900_000)
    + (struct.pack("<Q", 4) + "漢x".encode()) * 1_900_000
)

# ---------------------------------------------------------------------------------------------------- the child process


def make_checkpoint(directory: Path) -> None:
    """A tiny Llama in every form: converted, as sharded Hugging Face files, and as GGUF."""
    import torch
    from tiny_gguf import write_tiny_gguf

    from lit_swa.checkpoint import export_hf_checkpoint, save_checkpoint
    from lit_swa.model import GPT, Config

    config = Config(
        n_layer=2,
        n_head=4,
        n_query_groups=2,
        n_embd=32,
        head_size=8,
        intermediate_size=64,
        vocab_size=64,
        block_size=32,
    )
    torch.manual_seed(0)
    save_checkpoint(GPT(config), config, directory / "lit")
    save_checkpoint(GPT(config), config, directory / "lit_sharded", max_shard_bytes=20_000)
    export_hf_checkpoint(directory / "lit", directory / "hf")
    (directory / "gguf").mkdir()
    write_tiny_gguf(directory / "gguf" / "tiny.gguf")


def attack(kind: str, pristine: Path, work: Path, rng: random.Random, bomb: bool) -> Path:
    """A copy of a checkpoint in which one file is mutated, or replaced by one that is meant to fill the memory."""
    source, file = {
        "safetensors": ("lit", "lit_model.safetensors"),
        "gguf": ("gguf", "tiny.gguf"),
        "config": ("hf", "config.json"),
        "lit_config": ("lit", "lit_config.json"),
        "index": ("lit_sharded", "lit_model.safetensors.index.json"),
    }[kind]
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(pristine / source, work)
    data = (work / file).read_bytes()
    if bomb:
        data = {"safetensors": safetensors_bytes(LISTS), "gguf": GGUF_BOMB}.get(kind, LISTS)
    elif kind in ("safetensors", "gguf"):
        data = mutate_bytes(data, rng, 6000)
    else:
        data = mutate_json(data, rng)
    (work / file).write_bytes(data)
    return work


def outcome(kind: str, directory: Path) -> str:
    """ "loaded", "refused" in one sentence, or what went wrong instead."""
    from lit_swa.checkpoint import convert_hf_checkpoint, load_model

    try:
        if kind in ("gguf", "config"):
            convert_hf_checkpoint(directory)
        load_model(directory)
    except (ValueError, OSError) as error:
        text = str(error)
        return "refused" if text and "\n" not in text and len(text) < 700 else f"not one sentence: {text[:1000]!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:500]}"
    return "loaded"


def count_calls(work: Callable[[], str]) -> tuple[str, int]:
    """What `work` returns, and how many calls of Python and C functions it made."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        return work(), calls
    finally:
        sys.setprofile(None)


def child(kind: str, count: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pristine, work = Path(folder) / "pristine", Path(folder) / "work"
        make_checkpoint(pristine)
        shutil.copytree(pristine / {"gguf": "gguf", "config": "hf", "index": "lit_sharded"}.get(kind, "lit"), work)
        assert outcome(kind, work) == "loaded", "the untouched checkpoint must load"
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tally, bad, most_calls = {"loaded": 0, "refused": 0}, [], 0
        for n in range(count):
            bomb = n == 0 and (count > 100 or kind == "safetensors")
            directory = attack(kind, pristine, work, random.Random(f"{kind} {seed} {n}"), bomb)
            result, calls = count_calls(lambda directory=directory: outcome(kind, directory))
            if not (bomb and kind == "gguf"):  # whose strings are as many as a file may hold, each read by some calls
                most_calls = max(most_calls, calls)
            if result in tally:
                tally[result] += 1
            else:
                bad.append(f"{n}: {result}")
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        print(json.dumps({"tally": tally, "bad": bad, "most_calls": most_calls, "grown": grown}), flush=True)


def fuzz(log: Path, count: int, seed: int, *kinds: str, timeout: float) -> list[dict]:
    process = start_script("tests/test_corrupt_files.py", count, seed, *kinds, log=log)
    process.join(timeout)
    process.kill()
    printed = log.read_text()
    assert process.exitcode == 0, f"the child ended with {process.exitcode}: {printed[-2000:]}"
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


def assert_robust(result: dict, count: int) -> None:
    assert result["bad"] == []
    assert sum(result["tally"].values()) == count and result["tally"]["refused"] > count // 4  # the mutations do bite
    assert result["most_calls"] < CALLS_PER_FILE and result["grown"] < MEMORY_BYTES


def test_mutated_files_end_in_one_sentence_or_load(tmp_path: Path) -> None:
    """Would catch any crash, hang, traceback or flood of memory that a damaged file can cause, in every format."""
    results = fuzz(tmp_path / "log", 50, 0, *FORMATS, timeout=1200)  # it ends a hang; slow is fine
    assert len(results) == len(FORMATS)
    for result in results:
        assert_robust(result, 50)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_thousands_of_mutated_files(tmp_path: Path, kind: str) -> None:
    """As above, at length."""
    [result] = fuzz(tmp_path / "log", 2000, 1, kind, timeout=7200)
    assert_robust(result, 2000)


# ----------------------------------------------------------------------------------------------- values of other types

JSON_VALUES = (None, True, -1, "a\nb" * 5000, [], {"a": {}})


def make_adapters(directory: Path) -> None:
    """A DoRA and a LLaMA-Adapter v2 on the tiny Llama of make_checkpoint."""
    from lit_swa import adapter, lora
    from lit_swa.checkpoint import load_model
    from lit_swa.formats import peft

    make_checkpoint(directory)
    model, config = load_model(directory / "lit"), lora.LoRAConfig(r=2, dora=True)
    lora.add_lora(model, config)
    peft.save_adapter(model, directory / "lora", directory / "lit", config)
    model, prompts = load_model(directory / "lit"), adapter.AdapterConfig(start_layer=0, prompt_length=2)
    adapter.add_adapter(model, prompts)
    adapter.save_adapter(model, directory / "prompts", prompts, directory / "lit")


def keys_of(tree: object, above: tuple = ()) -> list[tuple]:
    """The way to every value of a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [way for key, value in items for way in [(*above, key), *keys_of(value, (*above, key))]]


def test_a_value_of_another_type_is_one_sentence_or_loads(tmp_path: Path) -> None:
    """Would catch a stranger's list that is looked up in a table, and a value that is believed."""
    from lit_swa.checkpoint import check_checkpoint_dir, load_model

    make_adapters(tmp_path)
    files = {"lora": ("lit_adapter.json", "adapter_config.json"), "prompts": ("lit_adapter.json",)}
    for directory, name in [(tmp_path / place, name) for place, names in files.items() for name in names]:
        text = (directory / name).read_text()
        for n, way in enumerate(keys_of(json.loads(text))):
            for value in JSON_VALUES[n % 3 :: 3] if len(way) > 1 else JSON_VALUES:
                tree = node = json.loads(text)
                for key in way[:-1]:
                    node = node[key]
                node[way[-1]] = value
                (directory / name).write_text(json.dumps(tree))
                try:
                    check_checkpoint_dir(directory, tokenizer=False)
                    load_model(directory)
                except (ValueError, OSError) as error:
                    assert "\n" not in str(error) and 0 < len(str(error)) < 700, (name, way, value)
        (directory / name).write_text(text)
        load_model(directory)


@pytest.mark.parametrize("value", [[], {}, "x" * 10**6, None, ["linear"]])
def test_a_config_from_anywhere_ends_in_a_short_sentence(value: object) -> None:
    """Would catch a type that is looked up in a table, also on the command line, and a message of a megabyte."""
    from lit_swa import Config

    for fields in ({"rope_scaling": {"type": value}}, {"rope_scaling": {"type": "linear", "factor": value}},
                   {"attention": value}, {"activation": value}, {"n_layer": value}):  # fmt: skip
        with pytest.raises(ValueError) as error:
            Config.from_name("pythia-14m", **fields)
        assert "\n" not in str(error.value) and len(str(error.value)) < 700


# -------------------------------------------------------------------------------------------------------- crafted files


def entry(shape: object = (2,), offsets: object = (0, 8), dtype: object = "F32") -> dict:
    return {"shape": shape, "data_offsets": offsets, "dtype": dtype}


CRAFTED = {
    "empty": (b"", "truncated"),
    "a header of 2**63 bytes": (struct.pack("<Q", 2**63), "truncated"),
    "a header longer than the file": (struct.pack("<Q", 100) + b"{}", "truncated"),
    "no JSON": (safetensors_bytes(b"hello"), "damaged"),
    "a list": (safetensors_bytes([]), "no JSON object"),
    "deep nesting": (safetensors_bytes(b"[" * 10**6), "damaged"),
    "a tensor twice": (safetensors_bytes(b'{"a": {}, "a": {}}'), "twice"),
    "a number of 5000 digits": (safetensors_bytes(b'{"a": ' + b"9" * 5000 + b"}"), "digits"),
    "a shape that overflows": (safetensors_bytes({"a": entry([2**32, 2**32], [0, 0])}), "bytes for the shape"),
    "a negative size": (safetensors_bytes({"a": entry([-2, -1])}, b"x" * 8), "no proper shape"),
    "a size that is true": (safetensors_bytes({"a": entry([True, 2])}, b"x" * 8), "no proper shape"),
    "offsets beyond the file": (safetensors_bytes({"a": entry([4], [0, 16])}, b"x" * 8), "truncated"),
    "offsets backwards": (safetensors_bytes({"a": entry([2], [8, 0])}, b"x" * 8), "bytes for the shape"),
    "a hole": (safetensors_bytes({"a": entry([2], [8, 16])}, b"x" * 16), "starts at byte 8"),
    "an overlap": (safetensors_bytes({"a": entry(), "b": entry()}, b"x" * 8), "starts at byte 0"),
    "bytes left over": (safetensors_bytes({"a": entry()}, b"x" * 9), "truncated or damaged"),
    "an unknown dtype": (safetensors_bytes({"a": entry(dtype="F3")}, b"x" * 8), "'F3'"),
    "metadata that is no text": (safetensors_bytes({"__metadata__": {"a": 1}}), "metadata"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_safetensors_header_is_one_sentence(tmp_path: Path, name: str) -> None:
    """Would catch a length, shape or offset that is believed."""
    from lit_swa.formats.files import open_safetensors

    data, message = CRAFTED[name]
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        open_safetensors(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


def test_a_huge_header_is_not_even_parsed(tmp_path: Path) -> None:
    """Would catch a header of gigabytes that is read into memory."""
    from lit_swa.formats.files import MAX_JSON_BYTES, open_safetensors

    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes(b'{"a":"' + b"x" * MAX_JSON_BYTES + b'"}'))
    with pytest.raises(ValueError, match="no checkpoint has more"):
        open_safetensors(tmp_path / "x.safetensors")


# ---------------------------------------------------------------------------------------------------------------- paths

OUTSIDE = [
    "../secret.safetensors",
    "..",
    ".",
    "",
    "/etc/passwd",
    "a/../../secret.safetensors",
    "sub/x.safetensors",
    "..\\secret",
    "C:secret",
    "x\0y",
    "x\ny",
    "~/x/y",
    "x" * 300,
    "\ud800",
    7,
    None,
    ["x"],
]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize(
    "index", ["model.safetensors.index.json", "lit_model.safetensors.index.json", "pytorch_model.bin.index.json"]
)
def test_an_index_cannot_name_files_outside(tmp_path: Path, monkeypatch, name: object, index: str) -> None:
    """Would catch a weight_map that makes a loader read files elsewhere on the machine."""
    from lit_swa.checkpoint import convert_hf_checkpoint, load_model

    directory = tmp_path / "checkpoint"
    directory.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(safetensors_bytes({"a": entry()}, b"x" * 8))
    (directory / "config.json").write_text("{}")
    (directory / "lit_config.json").write_text("{}")
    (directory / index).write_text(json.dumps({"weight_map": {"a": name}}))
    opened = spy_on_open(monkeypatch)
    with pytest.raises(ValueError, match="only plain file names are allowed|has no weight_map"):
        (load_model if index.startswith("lit_") else convert_hf_checkpoint)(directory)
    assert [
        path for path in opened if directory.resolve() not in (Path(path).resolve(), *Path(path).resolve().parents)
    ] == []


def spy_on_open(monkeypatch) -> list[str]:
    """The paths that are opened from here on, by Python code."""
    import builtins
    import io

    opened: list[str] = []
    real_open = builtins.open

    def spy(path, *args, **kwargs):
        if isinstance(path, str | Path):
            opened.append(str(path))
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", spy)
    monkeypatch.setattr(io, "open", spy)
    return opened


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "lit_config.json", "lit_model.safetensors", "tokenizer.json"]
)
def test_links_cannot_lead_outside(tmp_path: Path, name: str) -> None:
    """Would catch a link in a checkpoint that makes us read, or copy into an export, a file from elsewhere."""
    from lit_swa.checkpoint import convert_hf_checkpoint, export_hf_checkpoint

    make_checkpoint(tmp_path)
    directory = tmp_path / ("lit" if name.startswith(("lit", "tok")) else "hf")
    if not (directory / name).exists():
        (directory / name).write_text("{}")
    (directory / name).rename(tmp_path / "secret")
    (directory / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="leads out of its directory"):
        convert_hf_checkpoint(directory) if directory.name == "hf" else export_hf_checkpoint(
            directory, tmp_path / "out"
        )


SMALL_FILES = (  # beside a vocabulary, and what they may hold
    ("tokenizer.json", None), ("tokenizer_config.json", '{"eos_token": "a"}'), ("generation_config.json", "{}"),
    ("special_tokens_map.json", "{}"), ("added_tokens.json", "{}"), ("chat_template.jinja", "SECRET"),
    ("chat_template.json", "{}"), ("chat_templates/a.jinja", "SECRET"), ("additional_chat_templates/a.jinja", "SECRET"),
)  # fmt: skip


@pytest.mark.parametrize("kind", ["link", "link to nothing", "device", "pipe", "folder"])
@pytest.mark.parametrize("name, text", SMALL_FILES)
def test_a_tokenizers_files_are_regular_and_inside(tmp_path: Path, kind: str, name: str, text: str | None) -> None:
    """Would catch one of them that is read through a link from elsewhere, or that hangs, or that is silently left."""
    from tokenizers import Tokenizer as Rust
    from tokenizers.models import WordLevel

    from lit_swa.formats.tokenizer import Tokenizer

    directory, secret = tmp_path / "a", tmp_path / "secret"
    (directory / name).parent.mkdir(parents=True)
    Rust(WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(directory / "tokenizer.json"))
    assert Tokenizer(directory).encode("b") == [1]
    secret.write_text((directory / "tokenizer.json").read_text() if text is None else text)
    (directory / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(directory / name)
    elif kind == "folder":
        (directory / name).mkdir()
    else:
        places = {"link": secret, "link to nothing": tmp_path / "nowhere", "device": "/dev/zero"}
        (directory / name).symlink_to(places[kind])
    with pytest.raises((ValueError, OSError), match="leads out|does not exist|not a regular file") as error:
        Tokenizer(directory)
    assert "\n" not in str(error.value) and "SECRET" not in str(error.value)


def test_a_folder_of_templates_may_not_be_a_link_out(tmp_path: Path) -> None:
    """Would catch files that are looked for in the directory that the folder itself leads to."""
    from lit_swa.formats.tokenizer_files import read_chat_templates

    (tmp_path / "a").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.jinja").write_text("SECRET")
    (tmp_path / "a/chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leads out of its directory"):
        read_chat_templates(tmp_path / "a", {})


@pytest.mark.parametrize("name", ["dataset.json", "run.json", "lit_adapter.json", "lit_config.json", "metrics.csv"])
def test_every_description_is_regular_and_inside(tmp_path: Path, name: str) -> None:
    """Would catch a reader of a prepared dataset, a run or an adapter that takes what a link or a pipe gives."""
    from lit_swa.checkpoint import load_config
    from lit_swa.data.prepared import load_prepared
    from lit_swa.formats.adapter_files import adapter_kind
    from lit_swa.training.log import read_metrics
    from lit_swa.training.saving import read_record

    read = {
        "dataset.json": lambda path: load_prepared(path, None, 8, {}), "run.json": read_record,
        "metrics.csv": read_metrics, "lit_adapter.json": adapter_kind, "lit_config.json": load_config,
    }[name]  # fmt: skip
    place = tmp_path / ("final" if name == "run.json" else ".") / name
    place.parent.mkdir(exist_ok=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/x").write_text("{}")
    place.symlink_to(tmp_path / "secret/x")
    with pytest.raises(ValueError, match="leads out of its directory"):
        read(tmp_path)


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    """Would catch a named pipe that makes a loader wait for ever."""
    from lit_swa.checkpoint import load_model

    (tmp_path / "lit_config.json").write_text("{}")
    os.mkfifo(tmp_path / "lit_model.safetensors")
    with pytest.raises(ValueError, match="not a regular file"):
        load_model(tmp_path)


def test_no_more_is_read_than_is_allowed(tmp_path: Path) -> None:
    """Would catch a limit that goes by a size of 0, as those of /proc have."""
    from lit_swa.formats.reading import read_bytes

    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    assert Path("/proc/self/maps").stat().st_size == 0
    with pytest.raises(ValueError, match="more than 100 bytes"):
        read_bytes(Path("/proc/self/maps"), 100)


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "pytorch_model.bin",
        "tiny.gguf",
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "a.txt",
    ],
)
def test_a_git_lfs_pointer_is_named_as_such(tmp_path: Path, name: str) -> None:
    """Would catch "truncated" or "no JSON", which sends a user who cloned without git-lfs the wrong way."""
    from lit_swa.checkpoint import convert_hf_checkpoint
    from lit_swa.data.load import find_files
    from lit_swa.formats.tokenizer import Tokenizer

    make_config(tmp_path)
    (tmp_path / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 12345\n")
    if name == "config.json":
        (tmp_path / "model.safetensors").write_bytes(b"")
    read = Tokenizer if name.startswith("tokenizer") else convert_hf_checkpoint
    with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer.*git lfs pull") as error:
        find_files(tmp_path, None) if name == "a.txt" else read(tmp_path)
    assert "\n" not in str(error.value)


def test_a_hugging_face_cache_is_read_through_its_own_links(tmp_path: Path) -> None:
    """Would catch snapshots that must be copied first, and a rule that lets other links pass with them."""
    from lit_swa.checkpoint import convert_hf_checkpoint, load_model

    make_checkpoint(tmp_path / "made")
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for n, file in enumerate(sorted((tmp_path / "made/hf").glob("[!.]*"))):
        file.rename(blobs / f"{n:040x}")
        (snapshot / file.name).symlink_to(Path(f"../../blobs/{n:040x}"))
    convert_hf_checkpoint(snapshot)
    load_model(snapshot)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../made/lit/lit_config.json")
    with pytest.raises(ValueError, match="leads out of its directory"):
        convert_hf_checkpoint(snapshot)
    blobs.rename(tmp_path / "blobs")
    blobs.symlink_to(tmp_path / "blobs")
    with pytest.raises(ValueError, match="leads out of its directory"):
        (snapshot / "config.json").unlink()
        (snapshot / "config.json").symlink_to(f"../../blobs/{0:040x}")
        convert_hf_checkpoint(snapshot)


# -------------------------------------------------------------------------------------------------------------- pickles


class Payload:
    """What a malicious pickle contains: a call, made while it is being read."""

    def __init__(self, target: Path, call) -> None:
        self.target, self.call = target, call

    def __reduce__(self):
        return self.call, (
            f"touch {self.target}"
            if self.call is os.system
            else [sys.executable, "-c", f"open({str(self.target)!r}, 'w')"],
        )


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("call", [os.system, subprocess.call, eval, exec])
@pytest.mark.parametrize("form", ["torch", "legacy", "pickle"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pth"])
def test_a_malicious_pickle_is_refused_and_never_run(tmp_path: Path, call, form: str, name: str) -> None:
    """Would catch any way of reading .bin or .pth files that runs what is in them, also as a second attempt."""
    import torch

    from lit_swa.checkpoint import convert_hf_checkpoint

    make_config(tmp_path)
    content = {"model.embed_tokens.weight": Payload(tmp_path / "executed", call)}
    if form == "pickle":
        (tmp_path / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(ValueError, match="cannot be read as plain weights") as error:
        convert_hf_checkpoint(tmp_path)
    assert not (tmp_path / "executed").exists()
    assert "\n" not in str(error.value) and "weights_only" not in str(
        error.value
    )  # torch's text advises to switch it off


def make_config(directory: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "max_position_embeddings": 8,
        "vocab_size": 8,
    }
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {1: 2}, "text", {"a": {"b": {}}}])
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, content: object) -> None:
    """Would catch a file without weights that ends in a traceback."""
    import torch

    from lit_swa.checkpoint import convert_hf_checkpoint

    make_config(tmp_path)
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="something other than a dict of weights"):
        convert_hf_checkpoint(tmp_path)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_pickled_nested_tensor_is_refused(tmp_path: Path) -> None:
    """Would catch torch's own RuntimeError: such a tensor has no shape."""
    import torch

    from lit_swa.checkpoint import convert_hf_checkpoint

    make_config(tmp_path)
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    torch.save({"model.norm.weight": torch.ones(8), "x": nested}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="something other than a dict of weights"):
        convert_hf_checkpoint(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="a file that cannot be read, of the kernel's own")
def test_a_file_that_the_disk_does_not_give_is_named() -> None:
    """Would catch "[Errno 5] Input/output error", which says nothing of where."""
    from lit_swa.formats.reading import read_bytes

    with pytest.raises(OSError, match=r"^/proc/self/mem cannot be read \(Input/output error\)"):
        read_bytes(Path("/proc/self/mem"), 100)


@pytest.mark.parametrize("kind", ["meta", "expanded"])
def test_a_pickled_tensor_without_its_numbers_is_refused(tmp_path: Path, kind: str) -> None:
    """Would catch a traceback while the weights are written, and a KB that becomes terabytes."""
    import torch

    from lit_swa.checkpoint import convert_hf_checkpoint

    make_config(tmp_path)
    tensor = torch.ones(1).expand(2**20, 2**20) if kind == "expanded" else torch.ones(8, 8, device="meta")
    torch.save(
        {"model.norm.weight": torch.ones(8), "model.embed_tokens.weight": tensor}, tmp_path / "pytorch_model.bin"
    )
    with pytest.raises(ValueError, match="'model.embed_tokens.weight' without all of its numbers"):
        convert_hf_checkpoint(tmp_path)


@pytest.mark.parametrize("seed", range(10))
def test_a_damaged_pickle_is_one_sentence(tmp_path: Path, seed: int) -> None:
    """Would catch a truncated or compressed .bin file that crashes torch's reader or fills the memory."""
    import zipfile

    import torch

    from lit_swa.checkpoint import convert_hf_checkpoint

    make_config(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    torch.save({"model.norm.weight": torch.ones(100)}, path)
    if seed == 0:  # the same archive, its pickle compressed
        with zipfile.ZipFile(path) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in parts.items():
                kind = zipfile.ZIP_DEFLATED if name.endswith("data.pkl") else zipfile.ZIP_STORED
                archive.writestr(name, data, compress_type=kind)
    else:
        path.write_bytes(path.read_bytes()[: 150 * seed])
    with pytest.raises(ValueError, match="cannot be read as plain weights") as error:
        convert_hf_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


if __name__ == "__main__":
    for format_ in sys.argv[3:]:
        child(format_, int(sys.argv[1]), int(sys.argv[2]))
