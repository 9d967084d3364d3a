"""lm-eval's tasks on our models: what its three kinds of requests ask for, and tasks of a file.

    loglikelihood           (context, continuation) -> log p of the continuation, and whether greedy text would be it
    loglikelihood_rolling   text -> log p of the whole text, in windows of the context
    generate_until          (context, settings) -> what the model writes behind the context, up to a stop

Tokens are cut as lm-eval's own Hugging Face backend cuts them, so that both give the same figures. lm-eval is imported
by `as_lm` alone.

Shapes: B texts, T tokens of the longest, n tokens whose log p is asked for.
"""

import hashlib
import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_swa.batches import Batch, Request
from lit_swa.config import check_no_prompt
from lit_swa.evaluate import PROJECT_ELEMENTS, pick_chunk_size, read_states
from lit_swa.formats.tokenizer import Tokenizer
from lit_swa.generate import Sampling, context_of, non_finite
from lit_swa.model import GPT
from lit_swa.texts import read_text
from lit_swa.utils import ProgressLine

CALL_TOKENS = {"cpu": 2048, "cuda": 32768}  # of texts that are read in one call, padding included
NEW_TOKENS = 256  # of an answer whose task sets no limit, as in lm-eval

# -------------------------------------------------------------------------------------------------------------- scoring


class Row(NamedTuple):
    """A text of which the last n tokens are scored."""

    ids: list[int]
    n: int


@torch.inference_mode()
def token_scores(model: GPT, idx: Tensor, first: int, chunk_size: int = 0) -> tuple[Tensor, Tensor]:
    """(log p, whether it is the likeliest) of the tokens at positions first .. T - 1 of idx (B, T): (B, T - first).

    The last token is not fed. chunk_size: tokens that are fed in one call, through the caches; 0: all, without a cache.
    """
    check_no_prompt(model.config)
    vocab_size = model.config.vocab_size
    size = max(1, PROJECT_ELEMENTS.get(idx.device.type, 2**27) // (len(idx) * model.config.padded_vocab_size))
    logp, likeliest = [], []
    for start, x in read_states(model, idx[:, :-1], chunk_size):
        for a in range(max(start, first - 1), start + x.size(1), size):
            logits = model.project(x[:, a - start : a - start + size])[..., :vocab_size].float()  # padding is no token
            target = idx[:, a + 1 : a + 1 + logits.size(1), None]
            logp.append(logits.log_softmax(dim=-1).gather(-1, target)[..., 0])
            likeliest.append(logits.argmax(dim=-1) == target[..., 0])
    return torch.cat(logp, dim=1), torch.cat(likeliest, dim=1)


def groups(lengths: Sequence[int], most_rows: float, most_tokens: int, equal: bool) -> Iterator[list[int]]:
    """Indexes of texts that are read together, the longest first: so too little memory shows at once.

    equal: only texts of one length go together.
    """
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        full = group and (len(group) == most_rows or (len(group) + 1) * lengths[group[0]] > most_tokens)
        if full or group and equal and lengths[i] != lengths[group[0]]:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


class Reader:
    """A model and its tokenizer, as lm-eval asks them."""

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, batch_size: int | None = None, max_length: int | None = None
    ) -> None:
        """batch_size: texts that are read at once, at most. max_length: the context that is used; None: the model's,
        which is endless where every layer's cache rolls."""
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.device = model.transformer.wte.weight.device
        self.max_length = max_length or context_of(model)
        first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        if first is None:
            raise ValueError(
                f"{tokenizer.checkpoint_dir} names neither a BOS nor an EOS token, which texts begin with: name one in "
                "its tokenizer_config.json."
            )
        self.prefix = first

    # texts as tokens

    def encode(self, text: str) -> list[int]:
        """With the special tokens that the tokenizer adds, unless the text begins with BOS already."""
        begun = text.startswith(self.tokenizer.decode([self.prefix], skip_special_tokens=False))
        return self.tokenizer.encode(text, bos=False if begun else None)

    def encode_pair(self, context: str, continuation: str) -> Row:
        """White space at the end of the context goes to the continuation, whose tokens are those of the whole text
        from the context's number of tokens on. In front of them stand the context's own, also where a word is cut."""
        if not context:
            ids = self.tokenizer.encode(continuation, bos=False)
            return Row(ids, len(ids) - 1) if ids[:1] == [self.prefix] else Row([self.prefix, *ids], len(ids))
        before = self.encode(context.rstrip() or context)
        behind = self.encode(context + continuation)[len(before) :]
        return Row((before or [self.prefix]) + behind, len(behind))

    def windows(self, ids: list[int]) -> Iterator[Row]:
        """Each token once, with as many before it as the context allows; the first follows the prefix."""
        most = int(min(self.max_length, len(ids)))
        ids, done = [self.prefix, *ids], 0
        while done < len(ids) - 1:
            n = min(most, len(ids) - 1 - done)
            done += n
            yield Row(ids[done - most : done + 1], n)

    # what is asked for

    def loglikelihoods(self, pairs: Iterable[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(log p, is greedy) of each continuation behind its context, which is cut on the left where it is too long."""
        return self.score([self.encode_pair(context, continuation) for context, continuation in pairs])

    def rolling(self, texts: Iterable[str]) -> list[float]:
        """log p of each text."""
        rows = [list(self.windows(self.encode(text))) for text in texts]
        scores = iter(self.score([row for part in rows for row in part]))
        return [math.fsum(next(scores)[0] for _ in part) for part in rows]

    def score(self, rows: Sequence[Row]) -> list[tuple[float, bool]]:
        """(log p, is greedy) of the scored part of each row."""
        rows, scores = [self.fit(row) for row in rows], [(0.0, True)] * len(rows)
        line, done = ProgressLine(len(rows), "texts"), 0
        lengths, most = [len(row.ids) for row in rows], CALL_TOKENS.get(self.device.type, CALL_TOKENS["cpu"])
        for group in groups(lengths, self.batch_size or math.inf, most, self.model.rope.depends_on_length()):
            for i, score in zip(group, self.score_group([rows[i] for i in group]), strict=True):
                scores[i] = score
            done += len(group)
            line.show(done, "scored", tokens=0)
        return scores

    def fit(self, row: Row) -> Row:
        if row.n > self.max_length:
            raise ValueError(
                f"A continuation has {row.n} tokens and the context {self.max_length}: raise it with "
                "--model.block_size, or leave the task out."
            )
        return row if len(row.ids) <= self.max_length + 1 else Row(row.ids[-int(self.max_length) - 1 :], row.n)

    def score_group(self, rows: Sequence[Row]) -> list[tuple[float, bool]]:
        longest, first = max(len(row.ids) for row in rows), min(len(row.ids) - row.n for row in rows)
        if longest == first:  # nothing is asked for
            return [(0.0, True)] * len(rows)
        padded = [row.ids + [0] * (longest - len(row.ids)) for row in rows]  # behind a text, where it sees nothing
        idx = torch.tensor(padded, device=self.device)
        chunk_size = pick_chunk_size(self.model, len(rows), longest - 1)
        logp, likeliest = (scores.cpu() for scores in token_scores(self.model, idx, first, chunk_size))
        found = []
        for i, row in enumerate(rows):
            stop = len(row.ids) - first
            own = slice(stop - row.n, stop)
            found.append((logp[i, own].double().sum().item(), bool(likeliest[i, own].all())))
        if not all(math.isfinite(score) for score, _ in found):
            raise non_finite(self.model, "A text has no finite log-likelihood")
        return found

    def written(self, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """What the model writes behind each context, with settings such as until, max_gen_toks and temperature."""
        kinds: dict[Sampling, list[int]] = {}
        for i, (_, settings) in enumerate(asked):
            kinds.setdefault(sampling_of(settings), []).append(i)
        texts, line, done = [""] * len(asked), ProgressLine(len(asked), "texts"), 0
        for sampling, own in kinds.items():
            requests = [self.request(*asked[i]) for i in own]
            batch = Batch(self.model, requests, sampling, batch_size=self.batch_size, tokenizer=self.tokenizer,
                          stop_tokens=self.tokenizer.eos_ids)  # fmt: skip
            for i, answer in batch.run():
                texts[own[i]], done = answer.text, done + 1
                line.show(done, "written", tokens=0)
        return texts

    def request(self, context: str, settings: dict[str, Any]) -> Request:
        """The context is cut on the left where it leaves no room for the answer."""
        until, names = settings.get("until") or [], ("max_gen_toks", "max_new_tokens", "max_tokens")
        most = int(next((settings[name] for name in names if settings.get(name)), NEW_TOKENS))
        room = self.max_length - most
        if room < 1:
            raise ValueError(
                f"An answer of {most} tokens leaves no room for a prompt in the context of {self.max_length}: raise it "
                "with --model.block_size, or leave the task out."
            )
        ids = self.encode(context) or [self.prefix]
        ids = ids if len(ids) <= room else ids[-int(room) :]
        stops = [until] if isinstance(until, str) else until
        return Request(ids, most, stop=[stop for stop in stops if stop], continues=False)


def sampling_of(settings: dict[str, Any]) -> Sampling:
    """Greedy, unless a temperature is given and sampling is not switched off."""
    temperature = float(settings.get("temperature") or 0.0)
    if not settings.get("do_sample", temperature > 0):
        return Sampling()
    names = [name for name in ("top_k", "top_p", "min_p") if settings.get(name)]
    return Sampling(temperature=temperature or 1.0, **{name: settings[name] for name in names})


def as_lm(reader: Reader) -> Any:
    """The reader as a model of lm-eval, for lm_eval.simple_evaluate. Raises ValueError where lm-eval is missing."""
    try:
        from lm_eval.api.model import LM
    except ImportError:
        raise ValueError("The tasks are those of lm-eval: pip install lm-eval.") from None

    class OurModel(LM):
        tokenizer_name = str(reader.tokenizer.checkpoint_dir)  # a key of caches that lm-eval keeps

        def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
            return reader.loglikelihoods([request.args for request in requests])

        def loglikelihood_rolling(self, requests: list) -> list[float]:
            return reader.rolling([text for (text,) in (request.args for request in requests)])

        def generate_until(self, requests: list) -> list[str]:
            return reader.written([request.args for request in requests])

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return reader.tokenizer.render_chat(chat_history, add_generation_prompt)

    return OurModel()


# --------------------------------------------------------------------------------------------------------- local tasks

SHAPES = '{"question": ..., "choices": [...], "answer": ...} or {"question": ..., "answer": ...}'


def read_task_file(path: Path) -> list[dict[str, Any]]:
    """The questions of a JSONL file, all with choices or all without.

    With choices, "answer" becomes the number of the right one, counted from 0; without, "answers" holds every text
    that is right. Raises ValueError for a line that is neither.
    """
    docs = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            docs.append(read_question(line, f"{path}, line {number}"))
    if len({"choices" in doc for doc in docs}) > 1:
        raise ValueError(f"{path} mixes questions with choices and without: make two files of it.")
    return docs


def read_question(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("question"), str) or "answer" not in found:
        raise ValueError(f"{where} is no question: it must be {SHAPES}.")
    question, answer = found["question"], found["answer"]
    if "choices" not in found:
        answers = answer if isinstance(answer, list) else [answer]
        if not answers or not all(isinstance(text, str) for text in answers):
            raise ValueError(f'{where}: "answer" must be a text, or a list of texts that are all right.')
        return {"question": question, "answers": answers}
    choices = found["choices"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(text, str) for text in choices):
        raise ValueError(f'{where}: "choices" must be a list of two texts or more.')
    right = choices.index(answer) if answer in choices else answer
    if type(right) is not int or not 0 <= right < len(choices):
        raise ValueError(f'{where}: "answer" must be one of the choices, or its number, counted from 0.')
    return {"question": question, "choices": choices, "answer": right}


def local_task(path: Path, num_fewshot: int = 0) -> dict[str, Any]:
    """The questions of a file as a task of lm-eval, which has the file's name. Others of it are the examples."""
    docs = read_task_file(path)
    if num_fewshot >= len(docs):
        raise ValueError(
            f"{path} has {len(docs)} questions, too few for num_fewshot={num_fewshot} beside each: lower it, or add "
            "questions."
        )
    means = {"aggregation": "mean", "higher_is_better": True}
    task: dict[str, Any] = {
        "task": path.stem, "custom_dataset": lambda **_: {"test": as_dataset(docs)}, "dataset_path": "",
        "test_split": "test", "fewshot_split": "test", "doc_to_text": "Question: {{question}}\nAnswer:",
        "metadata": {"version": 1},
    }  # fmt: skip
    if "choices" in docs[0]:
        metrics = [{"metric": name, **means} for name in ("acc", "acc_norm")]
        return task | {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
                       "metric_list": metrics}  # fmt: skip
    settings = {"until": ["\n"], "max_gen_toks": 64, "do_sample": False}
    metrics = [{"metric": name, **means} for name in ("exact_match", "f1")]
    return task | {"output_type": "generate_until", "doc_to_target": "{{answers[0]}}", "generation_kwargs": settings,
                   "process_results": judge, "metric_list": metrics}  # fmt: skip


def as_dataset(docs: list[dict[str, Any]]) -> Any:
    """Dataset.from_list would hash by pickling, which dill 0.4.1 cannot do with pyarrow 26."""
    from datasets import Dataset
    from datasets.table import InMemoryTable

    told = json.dumps(docs).encode()
    return Dataset(InMemoryTable.from_pylist(docs), fingerprint=hashlib.sha256(told).hexdigest()[:16])


def judge(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """SQuAD's measures (arXiv 1606.05250) of an answer beside the right text that it is nearest to."""
    measures: dict[str, Callable[[list[str], list[str]], float]] = {"exact_match": lambda a, b: float(a == b), "f1": f1}
    said = plain_words(results[0])
    return {
        name: max(measure(said, plain_words(text)) for text in doc["answers"]) for name, measure in measures.items()
    }


def plain_words(text: str) -> list[str]:
    """The words in lower case, without punctuation and articles."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(ours: list[str], theirs: list[str]) -> float:
    """Of words, each as often as both have it."""
    if not ours or not theirs:
        return float(ours == theirs)
    same = (Counter(ours) & Counter(theirs)).total()
    return 2 * same / (len(ours) + len(theirs))
