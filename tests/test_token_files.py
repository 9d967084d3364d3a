"""Directories of token files, and the loader: what it gives, in which order, and how it goes on."""

import json

import numpy as np
import pytest
import torch
from tiny import tiny_config

from lit_swa import GPT
from lit_swa.config import IGNORED
from lit_swa.data.token_files import tokenizer_hash
from lit_swa.token_buckets import BucketDirectory
from lit_swa.token_files import (
    CYCLE,
    ShardWriter,
    TokenData,
    TokenDirectory,
    interleave,
    make_key,
    permute,
)
from lit_swa.tokenizer import Tokenizer


def write_directory(directory, shards, dtype="uint16", vocab_size=320, tokenizer="t"):
    """A directory with these documents (lists of ids) in each of its shards."""
    directory.mkdir(parents=True)
    records = []
    for number, documents in enumerate(shards):
        name = f"tokens-{number:05d}"
        with open(directory / f"{name}.bin", "wb") as stream:
            writer = ShardWriter(stream, dtype)
            for ids in documents:
                writer.add(np.array(ids), 3 * len(ids))
        (directory / f"{name}.docs").write_bytes(writer.start_bytes())
        records.append({"file": f"{name}.bin", **writer.record()})
    index = {"format": 1, "dtype": dtype, "vocab_size": vocab_size, "tokenizer": tokenizer, "shards": records}
    (directory / "index.json").write_text(json.dumps(index))
    return directory


@pytest.fixture
def numbered(tmp_path):
    """A directory whose token at position i is i, in documents and shards of uneven lengths."""
    rng, at, shards = np.random.default_rng(0), 0, []
    for n_documents in (1, 7, 3):
        shards.append([])
        for length in rng.integers(1, 40, n_documents):
            shards[-1].append(list(range(at, at + length)))
            at += length
    return write_directory(tmp_path / "numbered", shards), [d for shard in shards for d in shard], at


def take(data, n):
    """The next n batches' ids."""
    return [batch.ids.tolist() for _, batch in zip(range(n), data, strict=False)]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_shards_read_as_one_sequence(tmp_path, dtype):
    """Catches: a token lost or doubled where a block reaches over shards, a wrong width, a document's border lost."""
    rng = np.random.default_rng(1)
    shards = [[rng.integers(0, 60000, n).tolist() for n in lengths] for lengths in ((5, 1, 9), (4,), (2, 30, 7))]
    tokens = TokenDirectory(write_directory(tmp_path / "d", shards, dtype, 65536))
    documents = [d for shard in shards for d in shard]
    flat = [i for d in documents for i in d]
    owner = [n for n, d in enumerate(documents) for _ in d]
    assert tokens.n_tokens == len(flat) and tokens.n_documents == 7 and tokens.n_text_bytes == 3 * len(flat)
    for start in range(len(flat)):
        for count in range(1, len(flat) - start + 1):
            assert tokens.read(start, np.empty(count, dtype=np.int64)).tolist() == flat[start : start + count]
            held = owner[start : start + count]
            assert tokens.document_lengths(start, count) == [held.count(n) for n in dict.fromkeys(held)]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 1000])
def test_the_order_is_a_permutation_that_depends_on_its_key(n):
    """Catches: a block that an epoch leaves out or reads twice, and an order that is the same every epoch."""
    orders = [permute(np.arange(n), n, make_key(seed, 1)).tolist() for seed in range(6)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert orders[0] == [int(permute(np.array([i]), n, make_key(0, 1))[0]) for i in range(n)]
    assert n < 3 or len({tuple(order) for order in orders}) > 1
    if n == 1000:  # no trace of the order it came from: neighbours are as far from each other as chance has them
        steps = np.abs(np.diff(orders[0]))
        assert abs(steps.mean() - n / 3) < 40 and abs(np.corrcoef(np.arange(n), orders[0])[0, 1]) < 0.12


def test_the_order_is_that_of_plain_integers():
    """Catches: an order that depends on how numpy multiplies, so that a run cannot go on on another machine."""
    full = 2**64 - 1

    def mix(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & full
        x = (x ^ x >> 27) * 0x94D049BB133111EB & full
        return x ^ x >> 31

    key = 0
    for number in (7, 1, 2):
        key = mix((key + 0x9E3779B97F4A7C15) & full ^ number)
    assert key == int(make_key(7, 1, 2))

    def walk(x, n, half):
        while True:
            left, right = x >> half, x & 2**half - 1
            for r in range(1, 7):
                left, right = right, left ^ mix(right ^ mix(key + r & full)) & 2**half - 1
            x = left << half | right
            if x < n:
                return x

    assert permute(np.arange(1000), 1000, make_key(7, 1, 2)).tolist() == [walk(i, 1000, 5) for i in range(1000)]


def test_an_epoch_predicts_every_token_once(numbered):
    """Catches: a token that is skipped or repeated within an epoch, whatever the number of ranks and micro-batches."""
    directory, _, n_tokens = numbered
    n_blocks = (n_tokens - 1) // 8
    whole = [row for batch in take(TokenData(directory, 8, 1, seed=3), 2 * n_blocks) for row in batch]
    for epoch in (whole[:n_blocks], whole[n_blocks:]):
        assert sorted(t for row in epoch for t in row[1:]) == list(range(1, 8 * n_blocks + 1))
    assert whole[:n_blocks] != whole[n_blocks:]
    assert [row for b in take(TokenData(directory, 8, 4, seed=3), 6) for row in b] == whole[:24]
    for world_size, micro in ((2, 2), (2, 1), (4, 1)):
        ranks = [
            take(TokenData(directory, 8, 4, seed=3, rank=r, world_size=world_size, micro_batch_size=micro), 8)
            for r in range(world_size)
        ]
        rows = [row for batch in zip(*ranks, strict=True) for rank in batch for row in rank]
        assert rows == whole[: len(rows)]


def test_sources_come_by_their_weights(tmp_path):
    """Catches: a weight that counts tokens of the directory twice, a source that is starved, a lumpy mixture."""
    parts = {tmp_path / name: [[[i] * 100 for _ in range(9)]] for i, name in enumerate("abc")}
    for directory, shards in parts.items():
        write_directory(directory, shards)
    data = TokenData(dict(zip(parts, (6.0, 3.0, 1.0), strict=True)), 9, 10, seed=2)
    seen = np.array([row[0] for batch in take(data, 400) for row in batch])
    assert np.abs(np.bincount(seen) / 4000 - [0.6, 0.3, 0.1]).max() < 0.03
    counts = np.bincount(interleave([6, 3, 1], make_key(0)))
    assert counts.sum() == CYCLE and np.abs(counts - CYCLE * np.array([0.6, 0.3, 0.1])).max() < 1
    assert np.bincount(interleave([1, 1e-9], make_key(0))).tolist() == [CYCLE - 1, 1]
    epochs = list(data.epochs().values())
    assert epochs == [np.count_nonzero(seen == i) / 99 for i in range(3)] and epochs[0] > 20
    (tmp_path / "mixture.json").write_text('{"a": 0.6, "b": 0.3, "c": 0.1}')
    mixed = TokenData(tmp_path, 9, 10, seed=2)
    assert take(mixed, 20) == take(TokenData(dict(zip(parts, (0.6, 0.3, 0.1), strict=True)), 9, 10, seed=2), 20)
    (tmp_path / "mixture.json").write_text('{"../a": 1.0}')
    with pytest.raises(ValueError, match="names '../a', which is no directory in it"):
        TokenData(tmp_path, 9, 10)
    (tmp_path / "mixture.json").write_text("{}")
    with pytest.raises(ValueError, match="mixture.json names no directory: give some weights"):
        TokenData(tmp_path, 9, 10)


def test_a_saved_state_goes_on_with_the_next_batch(numbered):
    """Catches: batches that were read ahead and not given counted as read, an order that depends on the workers."""
    directory = numbered[0]
    expected = take(TokenData(directory, 8, 2, seed=5), 30)
    data, got = TokenData(directory, 8, 2, seed=5, num_workers=2), []
    for batch in data:
        got.append(batch.ids.tolist())
        if len(got) == 7:
            break
    state = json.loads(json.dumps(data.state_dict()))
    again = TokenData(directory, 8, 2, seed=5)
    again.load_state_dict(state)
    got += take(again, 23)
    assert got == expected
    other = TokenData(directory, 8, 2, seed=5, rank=1, world_size=2)
    other.load_state_dict(state)
    assert take(other, 3) == [[batch[1]] for batch in expected[7:10]]


def test_documents_are_kept_apart(numbered):
    """Catches: a document's length that is off by one, a target in the next document, lengths that do not fit."""
    directory, documents, _ = numbered
    owner = [n for n, d in enumerate(documents) for _ in d]
    data = TokenData(directory, 16, 3, seed=1, documents=True)
    model = GPT(tiny_config(vocab_size=320, padded_vocab_size=320))
    for _, batch in zip(range(8), data, strict=False):
        lengths = []
        for ids, targets in zip(batch.ids.tolist(), batch.targets.tolist(), strict=True):
            for at, target in enumerate(targets):
                same = owner[ids[at]] == owner[ids[at + 1]]
                assert target == (ids[at + 1] if same else IGNORED)
            held = [owner[i] for i in ids[:-1]]
            lengths += [held.count(n) for n in dict.fromkeys(held)]
        assert batch.documents == lengths and batch.inputs.shape == (3, 16)
    logits = model(batch.inputs.reshape(1, -1), documents=batch.documents)
    assert logits.shape == (1, 48, 320)
    assert TokenData(directory, 16, 3)[0].documents is None and not (TokenData(directory, 16, 3)[0].targets < 0).any()


def test_damaged_files_are_named(numbered):
    """Catches: training on half a shard, or on one that is another's; a directory that is unfinished."""
    directory = numbered[0]
    shard, data = directory / "tokens-00001.bin", (directory / "tokens-00001.bin").read_bytes()
    for wrong, message in (
        (data[:-2], "tokens-00001.bin is truncated: .*SHA-256 [0-9a-f]{16}"),
        (data + b"12", "tokens-00001.bin is too long"),
    ):
        shard.write_bytes(wrong)
        with pytest.raises(ValueError, match=message):
            TokenDirectory(directory)
    shard.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(
        ValueError, match=r"tokens-00001.bin is damaged: its SHA-256 is \w{16}\.\.\. and index.json says"
    ):
        TokenData(directory, 8, 1)
    TokenData(directory, 8, 1, verify=False)
    shard.write_bytes(data)
    starts = (directory / "tokens-00002.docs").read_bytes()
    (directory / "tokens-00002.docs").write_bytes(starts[:-8] + bytes(8))
    with pytest.raises(ValueError, match="tokens-00002.docs is damaged"):
        TokenData(directory, 8, 1)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="tokens-00001.bin is missing"):
        TokenDirectory(directory)
    index = (directory / "index.json").read_text()
    for wrong in ("{}", index.replace("tokens-00001.bin", "../secret.bin"), index.replace('"uint16"', '"object"')):
        (directory / "index.json").write_text(wrong)
        with pytest.raises(ValueError, match="is damaged, or of another version|only plain file names"):
            TokenDirectory(directory)
    (directory / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no index.json"):
        TokenDirectory(directory)
    (directory / "job.json").touch()
    with pytest.raises(FileNotFoundError, match="is unfinished: give the command that made it"):
        TokenDirectory(directory)


def test_what_does_not_fit_is_refused(tmp_path, numbered, tiny_checkpoint):
    """Catches: ids that the model does not have, a batch that repeats a block, ranks that do not divide the batch, a
    resume with other data that goes on in silence."""
    directory, _, n_tokens = numbered
    tokenizer = Tokenizer(tiny_checkpoint)
    with pytest.raises(ValueError, match="was made with another vocabulary .of 320 tokens. than that of .*: prepare"):
        TokenData(directory, 8, 1, tokenizer=tokenizer)
    own = write_directory(tmp_path / "own", [[[1] * 99]], tokenizer=tokenizer_hash(tokenizer))
    TokenData(own, 8, 1, tokenizer=tokenizer, vocab_size=320)
    with pytest.raises(ValueError, match="a vocabulary of 320, and the model's has 300"):
        TokenData(own, 8, 1, vocab_size=300)
    with pytest.raises(ValueError, match="were made with different vocabularies"):
        TokenData({own: 1.0, directory: 1.0}, 8, 1)
    with pytest.raises(ValueError, match=f"holds {n_tokens} tokens, and one batch takes 64 blocks of 8"):
        TokenData(directory, 8, 64)
    with pytest.raises(ValueError, match="takes 1 block of 9999 . 1 from it: .*, or lower the blocks"):
        TokenData(directory, 9999, 1)
    with pytest.raises(ValueError, match="must be a multiple of the 3 processes times their micro-batches of 1"):
        TokenData(directory, 8, 4, world_size=3)
    with pytest.raises(ValueError, match="The weight of x=-1 does not fit"):
        TokenData({"x": -1}, 8, 4)
    state = TokenData(directory, 8, 4, seed=1).state_dict()
    cases = (
        (TokenData(directory, 8, 4, seed=2), "had seed=1 and not 2"),
        (TokenData(directory, 4, 4, seed=1), "had block_length=8 and not 4"),
        (TokenData(directory, 8, 2, seed=1, world_size=2), "had batch_size=4 and not 2"),
        (TokenData(own, 8, 4, seed=1), "had other data or weights"),
    )
    for data, message in cases:
        with pytest.raises(ValueError, match=message):
            data.load_state_dict(state)
    with pytest.raises(ValueError, match="stopped within a step, behind 2 samples, and 4 ranks take 4"):
        TokenData(directory, 8, 4, seed=1, world_size=4).load_state_dict(state | {"position": 2})


def test_a_position_far_into_training_costs_no_memory(numbered, monkeypatch):
    """Catches: an order that is kept as a list, or a place that is found by counting up to it."""
    data = TokenData(numbered[0], 8, 1, seed=3)
    n_blocks = data.sources[0].n_blocks
    epoch = 10**12 // n_blocks
    blocks = set(data.places(epoch * n_blocks + np.arange(n_blocks))[1].tolist())
    assert blocks == set(range(n_blocks))
    numbers = permute(np.arange(5), 10**15, make_key(1))
    assert len(set(numbers.tolist())) == 5 and numbers.max() < 10**15 and numbers.max() > 10**13
    assert torch.equal(data[10**9].ids, TokenData(numbered[0], 8, 1, seed=3)[10**9].ids)


def test_a_bucket_gives_the_batches_of_its_copy(tmp_path, numbered):
    """Catches: another order than on disk, a damaged or missing file that is kept, a shard fetched twice."""
    fsspec = pytest.importorskip("fsspec")
    memory, address = fsspec.filesystem("memory"), "memory://bucket/tokens"
    for path in numbered[0].iterdir():
        memory.pipe(f"/bucket/tokens/{path.name}", path.read_bytes())
    bucket = BucketDirectory(address, tmp_path / "cache")
    assert not list(bucket.directory.glob("tokens-*"))
    expected = take(TokenData(numbered[0], 8, 2, seed=5), 20)
    assert take(TokenData({bucket: 1.0}, 8, 2, seed=5, num_workers=2), 20) == expected
    assert {path.name for path in bucket.directory.glob("*.bin")} == {path.name for path in numbered[0].glob("*.bin")}
    memory.rm("/bucket/tokens/tokens-00001.docs")
    with pytest.raises(FileNotFoundError, match="holds no tokens-00001.docs, which its index.json names"):
        BucketDirectory(address, tmp_path / "cache")
    memory.pipe("/bucket/tokens/tokens-00001.docs", (numbered[0] / "tokens-00001.docs").read_bytes())
    good = (numbered[0] / "tokens-00000.bin").read_bytes()
    memory.pipe("/bucket/tokens/tokens-00000.bin", bytes([good[0] ^ 1]) + good[1:])
    assert take(TokenData({BucketDirectory(address, tmp_path / "cache"): 1.0}, 8, 2, seed=5), 20) == expected
    damaged = BucketDirectory(address, tmp_path / "other")
    with pytest.raises(ValueError, match="tokens-00000.bin is damaged: its SHA-256 is not that of index.json"):
        take(TokenData({damaged: 1.0}, 8, 2, seed=5), 20)
    assert not list(damaged.directory.glob("*00000.bin*"))
    memory.pipe("/bucket/tokens/index.json", (numbered[0] / "index.json").read_bytes() + b" ")
    with pytest.raises(ValueError, match="is not what .*cache.* was filled from"):
        BucketDirectory(address, tmp_path / "cache")
    for wrong, message in (
        ("memory://none", "memory://none cannot be read"),
        ("nosuch://a", "nosuch://a cannot be read"),
    ):
        with pytest.raises((OSError, ValueError), match=message):
            BucketDirectory(wrong, tmp_path)
