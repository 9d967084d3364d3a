"""An exported GGUF file holds the checkpoint: it reads back equal, and llama.cpp computes the same from it."""

import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from llama_cpp_families import CASES, IDS, RECORD, LlamaCpp, digest, write_checkpoint
from llama_cpp_ids import MARKED, TEXTS, tokenizer_cases
from tiny_gguf import write_tiny_gguf

from lit_swa.checkpoint import convert_hf_checkpoint, load_model
from lit_swa.formats import gguf, gguf_export
from lit_swa.formats.gguf_export import export_gguf
from lit_swa.formats.gguf_models import MODELS, differences, fields_of
from lit_swa.formats.gguf_tokenizer import tokenizer_files
from lit_swa.formats.gguf_vocabulary import vocabulary_of
from lit_swa.tokenizer import Tokenizer

RECORDED = json.loads(RECORD.read_text(encoding="utf-8"))
GELU = "gptneox", "gemma", "phi2", "falcon"  # llama.cpp looks gelu up in a table of float16

SLOW = {  # others have their keys and names too
    "gptneox, serial", "falcon", "stablelm", "exaone4", "command-r", "qwen3", "olmo2", "llama, experts", "gemma",
}  # fmt: skip


def convert(file: Path, directory: Path) -> Path:
    directory.mkdir()
    (directory / file.name).hardlink_to(file)
    convert_hf_checkpoint(directory)
    return directory


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in CASES])
@torch.no_grad()
def test_what_goes_out_comes_back_and_llama_cpp_computes_the_same(case: str, tmp_path: Path) -> None:
    """Catches: rows in another order, a key or tensor that llama.cpp does not read so, a field lost on the way.

    llama.cpp's logits are recorded, with a digest of the file that it read: its keys, and its tensors' names and types.
    """
    model = write_checkpoint(tmp_path / "a", **CASES[case])
    export_gguf(tmp_path / "a", tmp_path / "m.gguf", "f32")
    assert gguf.read_gguf(tmp_path / "m.gguf").architecture == case.split(",")[0]
    assert digest(tmp_path / "m.gguf") == RECORDED[case]["file"]
    config, back = model.config, load_model(convert(tmp_path / "m.gguf", tmp_path / "b"))
    assert not differences(config, back.config)
    for name, weight in model.state_dict().items():
        ours, theirs = weight, back.state_dict()[name]
        assert torch.equal(ours, theirs) or config.norm_unit_offset and torch.allclose(ours, theirs, atol=1e-7)
    ours = back(torch.tensor([IDS]))[0, -1]
    tolerance = 2e-3 if case.startswith(GELU) else 1e-5
    for token, logit in RECORDED[case]["logits"]:
        assert abs(ours[token].item() - logit) < tolerance * ours.abs().max().item()


def test_llama_3s_scaling_at_another_length_comes_back(tmp_path: Path) -> None:
    """Catches: factors that are taken for those of the releases, or not known again."""
    scaling = CASES["llama, 3.1's scaling"]["rope_scaling"] | {"original_max_position_embeddings": 64}
    model = write_checkpoint(tmp_path / "a", **CASES["llama, 3.1's scaling"] | {"rope_scaling": scaling})
    export_gguf(tmp_path / "a", tmp_path / "m.gguf")
    back = fields_of(gguf.read_gguf(tmp_path / "m.gguf"))["rope_scaling"]
    assert back == model.config.rope_scaling == scaling
    odd = CASES["llama, 3.1's scaling"] | {"rope_scaling": scaling | {"low_freq_factor": 2.0}}
    write_checkpoint(tmp_path / "b", **odd)
    with pytest.raises(ValueError, match="factors that are not Llama 3.1's"):
        export_gguf(tmp_path / "b", tmp_path / "n.gguf")


def test_every_architecture_has_a_case() -> None:
    """Catches: a row that no file was made of."""
    assert {case.split(",")[0] for case in CASES} == set(MODELS)


@pytest.mark.parametrize("case", ["llama, biases and yarn", "gemma3", "granite_swa, for Mistral's windows", "gpt-oss"])
@torch.no_grad()
def test_llama_cpp_generates_the_same_tokens(case: str, tmp_path: Path) -> None:
    """Catches: what the record cannot show, on the installed llama.cpp: a step at a time, and its tokenizer."""
    pytest.importorskip("llama_cpp")
    write_checkpoint(tmp_path / "a", **CASES[case])
    export_gguf(tmp_path / "a", tmp_path / "m.gguf", "f16")
    assert_same_tokens(tmp_path / "m.gguf", convert(tmp_path / "m.gguf", tmp_path / "b"), list(IDS), TEXTS[:4])


@pytest.mark.slow
@torch.no_grad()
def test_llama_cpp_generates_the_same_tokens_with_a_real_model(tmp_path: Path) -> None:
    """Catches: what only a real model shows; and another rounding to 8 bits than llama.cpp's own, byte by byte."""
    llama_cpp = pytest.importorskip("llama_cpp")
    source = Path(__file__).resolve().parents[1] / "checkpoints" / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
    if not (source / "lit_config.json").exists():
        pytest.skip("SmolLM2-135M-Instruct is not at hand")
    for dtype in ("f32", "f16", "q8_0"):
        export_gguf(source, tmp_path / f"{dtype}.gguf", dtype)
    ids = Tokenizer(source).encode("The capital of France is")
    assert_same_tokens(tmp_path / "f16.gguf", convert(tmp_path / "f16.gguf", tmp_path / "b"), ids, TEXTS)
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    paths = [str(tmp_path / name).encode() for name in ("f32.gguf", "theirs.gguf")]
    assert llama_cpp.llama_model_quantize(*paths, how) == 0
    assert stored(tmp_path / "q8_0.gguf") == stored(tmp_path / "theirs.gguf")


def stored(path: Path) -> dict[str, tuple[int, bytes]]:
    data = path.read_bytes()
    tensors = gguf.read_gguf(path).tensors.items()
    return {name: (info.type_id, data[info.offset : info.offset + info.n_bytes]) for name, info in tensors}


def assert_same_tokens(file: Path, converted: Path, ids: list[int], texts: list[str]) -> None:
    theirs, model, tokenizer = LlamaCpp(file), load_model(converted).float(), Tokenizer(converted)
    for text in texts:
        assert theirs.model.tokenize(text.encode(), add_bos=False, special=True) == tokenizer.encode(text, bos=False)
    theirs.model.reset()
    theirs.model.eval(ids)
    for _ in range(16):
        token = int(np.argmax(theirs.model.scores[len(ids) - 1]))
        assert token == model(torch.tensor([ids]))[0, -1].argmax()
        ids.append(token)
        theirs.model.eval([token])
    theirs.model.close()


# ------------------------------------------------------------------------------------------------------------- numbers


def test_matrices_are_in_the_chosen_numbers_and_the_rest_in_float32(tmp_path: Path) -> None:
    """Catches: a norm or router in 16 bits, which llama.cpp refuses; an error beyond half a step of 8 bits."""
    model = write_checkpoint(tmp_path / "a", **CASES["qwen3moe"])
    up = model.transformer.h[0].mlp.fc_2.weight.detach()
    for dtype, kind in (("f16", gguf.F16), ("bf16", gguf.BF16), ("q8_0", 8)):
        export_gguf(tmp_path / "a", tmp_path / f"{dtype}.gguf", dtype)
        tensors = gguf.read_gguf(tmp_path / f"{dtype}.gguf").tensors
        exact = {name for name, info in tensors.items() if info.type_id == gguf.F32}
        assert exact == {name for name in tensors if "norm" in name or "ffn_gate_inp" in name}
        assert {info.type_id for name, info in tensors.items() if name not in exact} == {kind}
        back = gguf.dequantize(tensors["blk.0.ffn_up_exps.weight"]).float()
        blocks = up.reshape(-1, 32)
        step = blocks.abs().amax(-1, keepdim=True) / 127 if dtype == "q8_0" else blocks.abs() * 2**-7
        # half a step, and what the rounding of the scale to float16 makes of 127 steps
        assert ((back.reshape(-1, 32) - blocks).abs() <= step * (0.5 + 127 * 2**-11)).all()


def test_a_row_that_is_no_whole_block_is_float16(tmp_path: Path) -> None:
    """Catches: a file in 8 bits that cannot be written, or not be read."""
    write_checkpoint(tmp_path / "a", **CASES["qwen2"] | {"intermediate_size": 40})
    export_gguf(tmp_path / "a", tmp_path / "m.gguf", "q8_0")
    tensors = gguf.read_gguf(tmp_path / "m.gguf").tensors
    kinds = {name: tensors[f"blk.0.{name}.weight"].type_id for name in ("ffn_up", "ffn_down")}
    assert kinds == {"ffn_up": 8, "ffn_down": gguf.F16}


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: an export that holds the model."""
    write_checkpoint(tmp_path / "a", **CASES["qwen2moe"])
    alive, most = weakref.WeakSet(), []
    pieces = gguf_export.pieces

    def counted(tensor: torch.Tensor):
        alive.add(tensor)
        most.append(len(alive))
        return pieces(tensor)

    monkeypatch.setattr(gguf_export, "pieces", counted)
    export_gguf(tmp_path / "a", tmp_path / "m.gguf", "q8_0")
    assert len(most) > 40 and max(most) <= 2  # the one before, until the next is there


# ----------------------------------------------------------------------------------------------------------- tokenizer


CUTS_TO_TRY = ["smollm", "llama3", "qwen2", "qwen35", "tekken"]
TOKENIZERS = [
    *(f"pre {name}" for name in CUTS_TO_TRY),
    "sentencepiece prefix True",
    "sentencepiece prefix False",
    "gemma",
]


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_gives_llama_cpps_ids_when_it_comes_back(case: str, tmp_path: Path) -> None:
    """Catches: another cut, merges or scores in another order, a BOS too many, specials that are plain text."""
    recorded = json.loads((Path(__file__).parent / "llama_cpp_ids.json").read_text(encoding="utf-8"))["ids"]
    case_of = tokenizer_cases(CUTS_TO_TRY)[case]
    write_tiny_gguf(tmp_path / "t.gguf", **case_of)
    file = gguf.read_gguf(tmp_path / "t.gguf")
    for name, text in tokenizer_files(file).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    keys = vocabulary_of(tmp_path, len(file.metadata["tokenizer.ggml.tokens"]) + 3)
    assert keys["tokenizer.ggml.tokens"][-1].startswith("[PAD") and keys["tokenizer.ggml.token_type"][-1] == 5
    for key in ("chat_template", "ggml.model", "ggml.bos_token_id", "ggml.eos_token_id", "ggml.token_type"):
        told, written = file.metadata[f"tokenizer.{key}"], keys[f"tokenizer.{key}"]
        assert told == (written[: len(told)] if isinstance(told, list) else written)
    back = tokenizer_files(gguf.GGUFFile(Path("x"), keys))
    (tmp_path / "tokenizer.json").write_text(back["tokenizer.json"], encoding="utf-8")
    tokenizer = Tokenizer(tmp_path)
    for text, ids in zip(TEXTS + MARKED, recorded[case], strict=True):
        assert tokenizer.encode(text) == ids


def test_a_sentencepiece_model_keeps_its_scores(tmp_path: Path) -> None:
    """Catches: scores of a tokenizer.model that are made up, a piece lost, bytes that are plain text."""
    import sentencepiece

    text = tmp_path / "text.txt"
    text.write_text("\n".join([*TEXTS, Path(__file__).read_text(encoding="utf-8")]), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=600, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2, normalization_rule_name="identity",
        remove_extra_whitespaces=False, character_coverage=1.0,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    n = model.get_piece_size()
    keys = vocabulary_of(tmp_path, n)
    assert keys["tokenizer.ggml.scores"] == [model.get_score(i) for i in range(n)]
    assert keys["tokenizer.ggml.tokens"] == [model.id_to_piece(i) for i in range(n)]
    assert [kind == 6 for kind in keys["tokenizer.ggml.token_type"]] == [model.is_byte(i) for i in range(n)]


# ------------------------------------------------------------------------------------------------------------- refused


REFUSED = {
    "differs in block_size, rope_scaling": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "differs in attention": {"attention": "dual_chunk"},
    "windows, which llama.cpp does not compute there": CASES["llama, experts"]
    | {"attention": "sliding", "sliding_window_size": 6, "rope_scaling": None},
    "with beta_fast=16.0": CASES["qwen3"] | {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 16.0}},
    "tie_embeddings": CASES["olmo2"] | {"tie_embeddings": True},
    "64 layers": CASES["exaone4"] | {"attention": "sliding,full", "positions": "rope,none", "sliding_window_size": 6},
    "rotary_percentage=0.5, which is 1 there": CASES["qwen3"] | {"rotary_percentage": 0.5},
    "differs in positions": {"attention": "sliding", "sliding_window_size": 6, "positions": "none"},
    "export the softmax checkpoint that was made linear": {"attention": "linear"},
    "n_head \\* head_size=128": CASES["olmo2"] | {"head_size": 32, "tie_embeddings": False},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(message: str, tmp_path: Path, run_script) -> None:
    """Catches: a file that runs and is another model."""
    write_checkpoint(tmp_path / "a", **CASES["llama"] | REFUSED[message])
    arguments = ("--checkpoint_dir", tmp_path / "a", "--output_file", tmp_path / "m.gguf")
    code, out, err = run_script("scripts/export_gguf.py", *arguments)
    assert code == 2 and not out and len(err.strip().splitlines()) == 1
    pytest.raises(ValueError, export_gguf, tmp_path / "a", tmp_path / "m.gguf").match(message)
    assert not (tmp_path / "m.gguf").exists()


def test_what_is_there_stays_and_nothing_half_written_appears(tmp_path: Path, monkeypatch, run_script) -> None:
    """Catches: a file replaced without a word, and one that ends in the middle."""
    write_checkpoint(tmp_path / "a", **CASES["llama"])
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        export_gguf(tmp_path / "a", tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_text() == "mine"
    with pytest.raises(ValueError, match="does not end in .gguf"):
        export_gguf(tmp_path / "a", tmp_path / "m.bin")
    write, before = gguf_export.write_tensor, set(tmp_path.iterdir())

    def fail(out, name, *rest):
        if name == "blk.1.attn_q.weight":
            raise OSError(28, "No space left on device")
        write(out, name, *rest)

    monkeypatch.setattr(gguf_export, "write_tensor", fail)
    with pytest.raises(OSError, match="free some space"):
        export_gguf(tmp_path / "a", tmp_path / "new.gguf")
    assert set(tmp_path.iterdir()) == before
    monkeypatch.undo()
    code, out, _ = run_script(
        "scripts/export_gguf.py",
        "--checkpoint_dir",
        tmp_path / "a",
        "--output_file",
        tmp_path / "new.gguf",
        "--dtype",
        "q8_0",
    )
    assert (
        code == 0
        and out.strip() == str(tmp_path / "new.gguf")
        and set(tmp_path.iterdir()) - before == {tmp_path / "new.gguf"}
    )


def test_numbers_and_tokenizers_that_do_not_fit_are_named(tmp_path: Path) -> None:
    """Catches: weights that become infinite, and a tokenizer of another kind, or of another model."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import models

    model = write_checkpoint(tmp_path / "a", **CASES["llama"])
    with torch.no_grad():
        model.transformer.h[1].mlp.proj.weight[3, 4] = 1e6
    from lit_swa.checkpoint import save_checkpoint

    save_checkpoint(model, model.config, tmp_path / "a")
    with pytest.raises(ValueError, match="blk.1.ffn_down.weight has numbers that float16 cannot hold"):
        export_gguf(tmp_path / "a", tmp_path / "m.gguf", "f16")
    with pytest.raises(ValueError, match="568 tokens and an embedding of 300"):
        vocabulary_of(tmp_path / "a", 300)
    Fast(models.WordLevel({"a": 0, "<unk>": 1}, "<unk>")).save(str(tmp_path / "a" / "tokenizer.json"))
    with pytest.raises(ValueError, match="tokenizer that llama.cpp has no like of"):
        export_gguf(tmp_path / "a", tmp_path / "m.gguf", "bf16")
