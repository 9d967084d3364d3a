"""What the evaluation scripts share: texts as tokens, perplexity over windows, several processes, results on disk.

Shapes: B windows read at once, T tokens of a window, C n_embd. Perplexity is exp of the mean negative log likelihood
(nll) of a token, in nats.
"""

import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_swa.checks import check_at_least
from lit_swa.config import check_no_prompt
from lit_swa.data.token_files import check_tokens as check_tokens  # scripts take it from here
from lit_swa.data.token_files import open_token_file
from lit_swa.formats.checkpoint import build_model, check_dtype, check_tensors
from lit_swa.formats.files import LazyTensor, write_json
from lit_swa.formats.json_files import MAX_RESULT_BYTES, UNFIT, parse_json
from lit_swa.formats.quantized import quantization_of
from lit_swa.formats.reading import is_listed, read_bytes
from lit_swa.generate import Session, non_finite, prefill_chunk
from lit_swa.model import GPT, Config
from lit_swa.texts import encode_file, find_frame
from lit_swa.utils import check_devices, count_processes, pick_device, pick_dtype

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from lit_swa.formats.tokenizer import Tokenizer

# -------------------------------------------------------------------------------------------------------------- results


class Results:
    """The results file of a run, and the parts that are finished while the run goes on.

    The parts are saved in `<output>.partial`. A run that is started again with the same arguments goes on from there.
    A part whose key begins with "_" is a note, and does not count as work done. `finish` writes `output` and removes
    the partial file, so `output` is never incomplete. Used as `with Results(...) as results`, it names the file that
    was gone on from where what stands in it is no part of such a run.
    """

    def __init__(self, output: Path, arguments: dict[str, Any]) -> None:
        """arguments: everything that the results depend on, of types that JSON can hold.

        Raises ValueError when `output` is a file that holds no results, since it would be lost, and when the partial
        file is damaged.
        """
        self.output, self.arguments = Path(output), json.loads(json.dumps(arguments, default=str))
        self.partial = self.output.with_name(self.output.name + ".partial")
        self.parts: dict[str, Any] = {}
        self.saved = time.monotonic()
        there, kept = self._read(self.output), self._read(self.partial)
        if there is not None and kept is not None and there["arguments"] == kept["arguments"]:
            self.partial.unlink()  # left by a run that was killed behind its end
            kept = None
        if there is None and is_listed(self.output):
            raise ValueError(f"{self.output} is there and holds no results: choose another --output.")
        if is_listed(self.partial) and (kept is None or not isinstance(kept.get("parts"), dict)):
            raise ValueError(f"{self.partial} is damaged: delete it to begin anew.")
        self.source = self.output if self.finished is not None else None  # the file that the run goes on from
        if there is not None and there["arguments"] != self.arguments:
            self._tell(self.output, there["arguments"], "and will be replaced")
        if kept is not None and kept["arguments"] != self.arguments:
            self._tell(self.partial, kept["arguments"], "so the run starts anew")
        elif kept is not None:
            self.parts, self.source = kept["parts"], self.partial
            done = sum(not key.startswith("_") for key in self.parts)
            print(f"going on from {self.partial}: {done} parts are done", file=sys.stderr)

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        shown = self.source == self.output  # no more is done than to show it
        if self.source and isinstance(error, (*UNFIT, ValueError) if shown else UNFIT):
            raise ValueError(f"{self.source} does not hold what such a run writes: delete it to begin anew.") from error

    def _tell(self, path: Path, others: dict[str, Any], consequence: str) -> None:
        """Say in which arguments the run that wrote a file differs from this one."""
        names = [name for name in {**self.arguments, **others} if self.arguments.get(name) != others.get(name)]
        print(f"{path} is of a run with another {', '.join(names)}, {consequence}", file=sys.stderr)

    @staticmethod
    def _read(path: Path) -> dict[str, Any] | None:
        try:
            content = parse_json(read_bytes(path, MAX_RESULT_BYTES), path, max_digits=400)
        except (OSError, ValueError):
            return None
        return content if isinstance(content.get("arguments"), dict) else None

    @property
    def finished(self) -> dict[str, Any] | None:
        """The results of an earlier run with the same arguments, None if there are none."""
        content = self._read(self.output)
        return content if content is not None and content["arguments"] == self.arguments else None

    def add(self, key: str, part: Any, every: float = 5.0) -> None:
        """Keep a finished part. every: seconds that must have passed since the last save before the next one."""
        self.add_all({key: part}, every)

    def add_all(self, parts: dict[str, Any], every: float = 5.0) -> None:
        """Keep parts that belong together: a save has all of them or none."""
        self.parts.update(parts)
        if time.monotonic() - self.saved >= every:
            self.save()

    def save(self) -> None:
        """Write the finished parts to the disk."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.partial, {"arguments": self.arguments, "parts": self.parts})
        self.saved = time.monotonic()

    def finish(self, results: dict[str, Any]) -> None:
        """Write the results file, and remove the parts."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.output, {"arguments": self.arguments} | results)
        self.partial.unlink(missing_ok=True)


def weights_identity(checkpoint_dir: Path) -> str:
    """A hash of the names, sizes and times of the weight files: to hash their content would take too long."""
    patterns = ("lit_model*.safetensors*", "adapter_model.safetensors", "lit_adapter.json")
    paths = sorted(path for pattern in patterns for path in Path(checkpoint_dir).glob(pattern))
    stats = [(path.name, path.stat()) for path in paths]
    return hashlib.sha256(repr([(name, s.st_size, s.st_mtime_ns) for name, s in stats]).encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------- the tokens


def read_tokens(
    data: Path | Sequence[Path], checkpoint_dir: Path, vocab_size: int, max_tokens: int | None = None
) -> np.ndarray:
    """The tokens of texts, or of one token file, as one stream of uint16 or uint32, at most max_tokens of them.

    data: one or several .txt files (UTF-8), or directories of them. The checkpoint's tokenizer encodes each, with the
        special tokens that it adds to a text, and they are joined in order. Or one .bin file of token ids (see
        lit_swa/data/token_files.py), which is mapped into memory and not read.
    Raises ValueError or OSError in one sentence.
    """
    check_at_least(max_tokens=(max_tokens, 1))
    files = find_data(data)
    if files[0].suffix == ".bin":
        return open_token_file(files[0], vocab_size)[:max_tokens]
    from lit_swa.formats.checkpoint import tokenizer_dir
    from lit_swa.formats.tokenizer import Tokenizer

    return encode_files(Tokenizer(tokenizer_dir(checkpoint_dir)), files, max_tokens)


def encode_files(tokenizer: "Tokenizer", files: Sequence[Path], most: int | None) -> np.ndarray:
    """The ids of texts, joined, and no more than the first `most`."""
    parts: list[np.ndarray] = []
    for file in files:
        left = None if most is None else most - sum(map(len, parts))
        if left == 0:
            break
        parts.append(encode_file(tokenizer, file, left))
    return np.concatenate(parts)


def find_data(data: Path | Sequence[Path]) -> list[Path]:
    """The files of `data`: one .bin file, or .txt files. Raises ValueError or FileNotFoundError."""
    files: list[Path] = []
    for path in [data] if isinstance(data, Path) else data:
        if not path.exists():
            raise FileNotFoundError(f"There is no file {path}: give a .txt or .bin file, or a directory of .txt files.")
        files += sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{data} holds no .txt file: give a .txt or .bin file.")
    for file in files:
        if file.suffix not in (".txt", ".bin"):
            raise ValueError(f"{file} is neither a .txt nor a .bin file: texts are .txt, token ids are .bin.")
        if file.suffix == ".bin" and len(files) > 1:
            raise ValueError(f"{file} is one of {len(files)} files: give one .bin file alone, or .txt files.")
    return files


def read_stream(
    data: Path | Sequence[Path], checkpoint_dir: Path, vocab_size: int, max_tokens: int | None = None
) -> tuple[np.ndarray, tuple[int, ...]]:
    """(the tokens of read_tokens, at most max_tokens; those that every window of them begins with).

    A window is a text of its own, so each begins with what the tokenizer puts in front of a text, such as BOS. The
    windows of a .bin file are cut as its tokens stand, which is LongLoRA's way.
    """
    files = find_data(data)
    if files[0].suffix == ".bin" or max_tokens is not None and max_tokens < 1:
        return read_tokens(data, checkpoint_dir, vocab_size, max_tokens), ()
    from lit_swa.formats.checkpoint import tokenizer_dir
    from lit_swa.formats.tokenizer import Tokenizer

    tokenizer = Tokenizer(tokenizer_dir(checkpoint_dir))
    before = (find_frame(tokenizer) or ([], []))[0]
    tokens = encode_files(tokenizer, files, max_tokens and max_tokens + len(before))
    return tokens[len(before) :], tuple(before)


# ---------------------------------------------------------------------------------------------------------- the windows


class Windows(NamedTuple):
    """Which windows of the stream are read, and which of their tokens are targets, in buckets by position.

    The window at `a` holds the P tokens of `prefix`, such as BOS, and tokens a .. a + seq_len - P - 1 of the stream.
    Its targets are its tokens at positions first .. seq_len - 1, each predicted from all tokens before it in the
    window. The prefix, and the token at position 0, which is predicted from nothing, are never targets.
    """

    starts: Sequence[int]
    seq_len: int
    first: int
    bucket: int  # positions in one bucket
    prefix: tuple[int, ...] = ()  # what each window begins with

    def bucket_of_targets(self) -> np.ndarray:
        """(seq_len - first,): the bucket of each target of a window."""
        return np.arange(self.first, self.seq_len) // self.bucket

    def batch(self, tokens: np.ndarray, starts: Sequence[int], device: torch.device | str) -> Tensor:
        """Token ids (B, T) of the windows at `starts`."""
        n = self.seq_len - len(self.prefix)
        rows = np.stack([np.concatenate([self.prefix, tokens[a : a + n]]) for a in starts]).astype(np.int64)
        return torch.from_numpy(rows).to(device)

    def sums(self, nll: Tensor) -> list[list[float]]:
        """For each window, the sums of nll (B, T - first) by bucket, added in float64 and always in the same order."""
        of = self.bucket_of_targets()
        return [np.bincount(of, weights=row)[of[0] :].tolist() for row in nll.double().cpu().numpy()]

    def check_sums(self, sums: Any, n_windows: int) -> None:
        """Raises TypeError unless these, which were read from a file, are the sums of so many windows."""
        n_buckets = len(set(self.bucket_of_targets()))
        numbers = [number for window in sums if len(window) == n_buckets for number in window]
        fits = len(sums) == n_windows and len(numbers) == n_windows * n_buckets and all(map(math.isfinite, numbers))
        if not fits:
            raise TypeError("other sums than those of the windows")

    def summary(self, sums: Sequence[Sequence[float]]) -> dict[str, Any]:
        """Perplexities and counts of windows with these sums. math.fsum is exact, so their order changes nothing."""
        sizes = np.bincount(self.bucket_of_targets())
        used = range(self.first // self.bucket, len(sizes))
        tokens = [len(sums) * int(sizes[i]) for i in used]
        nlls = [math.fsum(window[n] for window in sums) / tokens[n] for n in range(len(tokens))]
        nll = math.fsum(x for window in sums for x in window) / sum(tokens)
        names = [f"{i * self.bucket}-{min((i + 1) * self.bucket, self.seq_len) - 1}" for i in used]
        return {
            "ppl": perplexity(nll),
            "nll": nll,
            "tokens": sum(tokens),
            "buckets": {name: perplexity(x) for name, x in zip(names, nlls, strict=True)},
            "bucket_tokens": dict(zip(names, tokens, strict=True)),
        }


def perplexity(nll: float) -> float:
    """exp(nll), as long as a float can hold it."""
    return math.exp(min(nll, 709.0))


def full_windows(
    n_tokens: int,
    seq_len: int,
    stride: int,
    score: str,
    bucket: int | None = None,
    data: object = "The text",
    prefix: Sequence[int] = (),
) -> Windows:
    """Every full window of seq_len tokens, starting every `stride` tokens; a remainder at the end is not read.

    score: "all" counts every target of every window, and so counts a token again in each window that holds it. This is
        LongLoRA's measure, but for two things: its eval.py leaves out the last window of the stream and averages the
        means of batches, while here every full window and every target counts the same. "last" counts the last
        `stride` targets of each window, the first window included: no token counts twice, and each has at least
        seq_len - stride tokens before it.
    prefix: what each window begins with. It takes part in seq_len, and windows without overlap are then so much shorter
        that no token of the stream is left out.
    Raises ValueError for arguments that do not fit each other or the text.
    """
    check_cut(seq_len, stride, score, bucket)
    room = check_text_length(n_tokens, seq_len, data, prefix)
    stride = min(stride, room)
    first = max(1, len(prefix), seq_len - stride if score == "last" else 1)
    return Windows(
        range(0, n_tokens - room + 1, stride), seq_len, first, bucket or math.ceil(seq_len / 8), tuple(prefix)
    )


def spread_windows(
    n_tokens: int, seq_len: int, count: int, bucket: int, data: object = "The text", prefix: Sequence[int] = ()
) -> Windows:
    """`count` windows of seq_len tokens, evenly spread over the stream; every target counts. Raises ValueError."""
    check_at_least(seq_len=(seq_len, 2), windows=(count, 1), bucket=(bucket, 1))
    last = n_tokens - check_text_length(n_tokens, seq_len, data, prefix)
    count = min(count, last + 1)  # so many can begin at different tokens
    starts = [last * i // max(1, count - 1) for i in range(count)]
    return Windows(starts, seq_len, max(1, len(prefix)), bucket, tuple(prefix))


def pick_place(device: str, dtype: str) -> tuple[str, str]:
    """The device and the dtype of these names, of which "auto" is what suits this machine. Raises ValueError for what
    it lacks."""
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    check_dtype(dtype, device)
    return device, dtype


def check_chat_template(tokenizer: "Tokenizer", wanted: bool) -> None:
    """Raises ValueError where questions are to be asked within a chat template, and the tokenizer has none."""
    if wanted and not tokenizer.has_chat_template:
        raise ValueError(
            f"The tokenizer of {tokenizer.checkpoint_dir} has no chat template: leave --use_chat_template out."
        )


def check_cut(seq_len: int, stride: int, score: str, bucket: int | None) -> None:
    """Raises ValueError for arguments of full_windows that do not fit each other."""
    check_at_least(seq_len=(seq_len, 2), stride=(stride, 1), bucket=(bucket, 1))
    if score not in ("all", "last"):
        raise ValueError(f"score={score!r} does not fit: choose all or last.")
    if stride > seq_len:
        raise ValueError(
            f"stride={stride} is more than seq_len={seq_len}: tokens between the windows would be left out; "
            "give a stride of at most seq_len."
        )


def check_text_length(n_tokens: int, seq_len: int, data: object, prefix: Sequence[int] = ()) -> int:
    """How many tokens of the text a window holds. Raises ValueError when the text has fewer, or there is none."""
    room = seq_len - len(prefix)
    if room < 1:
        raise ValueError(
            f"seq_len={seq_len} has no room behind the {len(prefix)} tokens that a text begins with: raise it."
        )
    if n_tokens < room:
        raise ValueError(
            f"{data} gives {n_tokens} tokens and a window has {room}: read shorter windows (--seq_len, or "
            "--lengths), or give a longer text."
        )
    return room


def check_context(config: Config, seq_len: int, name: str = "seq_len") -> None:
    """Raises ValueError when a model of this config cannot read a window of seq_len tokens. name: of the argument."""
    check_no_prompt(config)
    if seq_len <= config.block_size:
        return
    with torch.device("meta"):  # without memory for weights
        model = GPT(config)
    if not model.unbounded(cached=False):
        raise ValueError(
            f"{name}={seq_len} is more than the context of {config.block_size} tokens: lower it, or raise the context "
            f"with --model.block_size {seq_len} (best with --model.rope_scaling), or give every layer a window with "
            "--model.attention sliding --model.sliding_window_size S."
        )


# -------------------------------------------------------------------------------------------------------------- the nll

PROJECT_ELEMENTS = {"cpu": 2**25, "cuda": 2**28}  # logits that exist at once, twice and in float32: 256 MB and 2 GB


@torch.inference_mode()
def window_nll(model: GPT, idx: Tensor, first: int = 1, chunk_size: int = 0) -> Tensor:
    """-log p of the tokens at positions first .. T - 1 of each window of idx (B, T): (B, T - first) float32.

    chunk_size: tokens of a window in one call of the model; the windows then go through its caches, and what those held
        is lost. 0, or T and more: the whole windows in one call, without a cache. The numbers are the same but for
        rounding.
    Logits exist for a piece of the text at a time, and only where a target follows.
    """
    check_no_prompt(model.config)
    return torch.cat([nll_of_states(model, x, idx, a, first) for a, x in read_states(model, idx, chunk_size)], dim=1)


def read_states(model: GPT, idx: Tensor, chunk_size: int) -> Iterator[tuple[int, Tensor]]:
    """(position of its first token, hidden states (B, t, C)) of each chunk of idx (B, T), cut as in window_nll."""
    B, T = idx.shape
    if not 0 < chunk_size < T:
        yield 0, model.hidden_states(idx)
        return
    session = Session(model, batch_size=B)
    session.reserve(T)
    for start in range(0, T, chunk_size):
        yield start, session.hidden_states(idx[:, start : start + chunk_size])


def nll_of_states(model: GPT, x: Tensor, idx: Tensor, start: int, first: int) -> Tensor:
    """-log p (B, n) of the tokens that follow those at start .. start + t - 1, from their hidden states x (B, t, C).

    Only tokens at positions first and later count, and no token follows the last one of a window.
    """
    (B, T), stop = idx.shape, start + x.size(1)
    size = max(1, PROJECT_ELEMENTS.get(idx.device.type, 2**27) // (B * model.config.padded_vocab_size))
    begin, end, pieces = max(start, first - 1), min(stop, T - 1), [x.new_empty(B, 0, dtype=torch.float32)]
    for a in range(begin, end, size):
        b = min(a + size, end)
        logits = model.project(x[:, a - start : b - start])[..., : model.config.vocab_size]  # padding is no token
        nll = F.cross_entropy(logits.flatten(0, 1).float(), idx[:, a + 1 : b + 1].flatten(), reduction="none")
        pieces.append(nll.view(B, b - a))
    return torch.cat(pieces, dim=1)


def pick_chunk_size(model: GPT, batch_size: int, seq_len: int) -> int:
    """The chunk_size for windows of seq_len tokens: 0 where the memory holds the activations of whole windows.

    Also 0 for a model whose tokens depend on the length read so far, since chunks would make another text of a window.
    """
    if model.rope.depends_on_length():
        return 0
    most = 4096  # the most that prefill_chunk allows; short sequences in a batch take as much memory as one long one
    if prefill_chunk(model, batch_size * math.ceil(seq_len / most)) >= min(most, seq_len):
        return 0
    return prefill_chunk(model, batch_size)


def require_finite(sums: Sequence[Sequence[float]], start: int, model: GPT) -> None:
    """Raises NonFiniteLogits when a sum of these windows, the first of which begins at token `start`, is not finite."""
    if not all(math.isfinite(x) for window in sums for x in window):
        raise non_finite(model, f"The window at token {start} has no finite perplexity")


def read_windows(model: GPT, windows: Windows, tokens: np.ndarray, device: str) -> dict[str, Any]:
    """The summary of `windows` of a stream of `tokens`, read one by one, each in as few calls as the memory allows.

    Raises NonFiniteLogits for a window that has no finite perplexity.
    """
    chunk_size, sums = pick_chunk_size(model, 1, windows.seq_len), []
    for start in windows.starts:
        nll = window_nll(model, windows.batch(tokens, [start], device), windows.first, chunk_size)
        sums += windows.sums(nll)
        require_finite(sums[-1:], start, model)
    return windows.summary(sums)


def with_fields(model: GPT, **fields: Any) -> GPT:
    """A model that shares the weights of this one, with some fields of the config changed.

    Raises ValueError for fields that do not fit each other or the weights.
    """
    config, weight = model.config.override(**fields), model.transformer.wte.weight
    state = model.state_dict()
    if model.config.tie_embeddings:
        del state["lm_head.weight"]
    tensors = {name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in state.items()}
    stored = quantization_of(model)
    check_tensors(config, tensors, "The checkpoint", stored)
    return build_model(config, tensors, weight.dtype, weight.device, stored=stored)


# ---------------------------------------------------------------------------------------------------- several processes


class Ranks:
    """The processes of one run: which of them this is, and what they tell each other. One alone needs no Lightning.

    All processes call `gather` and `broadcast` at the same points of their work.
    """

    def __init__(self, device: str, fabric: "Fabric | None" = None) -> None:
        self.fabric = fabric
        self.rank, self.count = (fabric.global_rank, fabric.world_size) if fabric else (0, 1)
        self.device = str(fabric.device) if fabric else device

    def gather(self, x: Tensor) -> Tensor:
        """The tensors x of all processes as one, (count, ...), on the CPU."""
        if self.fabric is None:
            return x[None]
        x = x.to(self.device)
        gathered = [torch.empty_like(x) for _ in range(self.count)]
        torch.distributed.all_gather(gathered, x)
        return torch.stack(gathered).cpu()

    def broadcast(self, value: Any) -> Any:
        """The value that rank 0 gives."""
        return value if self.fabric is None else self.fabric.broadcast(value)

    def leave(self) -> None:
        """To be called when this process is done."""
        if self.fabric is not None:
            torch.distributed.destroy_process_group()


def launch_ranks(device: str, devices: int = 1, num_nodes: int = 1) -> Ranks:
    """Start the other processes with Lightning Fabric, or join those that torchrun or srun started.

    Raises ValueError when there are fewer devices than that, or Lightning is missing.
    """
    check_at_least(devices=(devices, 1), num_nodes=(num_nodes, 1))
    devices, num_nodes = count_processes(devices, num_nodes)
    if devices * num_nodes == 1:
        return Ranks(device)
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r} does not fit {devices * num_nodes} processes: use cuda or cpu.")
    check_devices(device, devices)
    try:
        from lightning.fabric import Fabric
    except ImportError:
        raise ValueError("Several processes need Lightning Fabric: pip install lightning.") from None
    fabric = Fabric(accelerator=device, devices=devices, num_nodes=num_nodes, strategy="ddp")
    fabric.launch()
    return Ranks(device, fabric)
