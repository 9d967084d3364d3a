"""What scripts/benchmark_generate.py measures beside this project: transformers, llama.cpp and gpt-fast.

Each is a class with `prefill(ids)`, if `reads` is true, and `decode(ids, cell)`, which gives what is timed: a function
that decodes the cell's tokens, from the same position whenever it is called, and that may return seconds of its own.
`batches` is true where that may be several sequences.
"""

import importlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._inductor.config as inductor
from torch import Tensor

from lit_swa.formats.files import LazyTensor, as_lazy
from lit_swa.formats.gguf_export import infos, tensors_of, write_gguf
from lit_swa.formats.gguf_models import find_architecture
from lit_swa.formats.hf_export import config_to_hf
from lit_swa.formats.hugging_face import expected_shapes, to_hf
from lit_swa.generate import Sampler, Sampling
from lit_swa.linear_formats import dense_weight, is_linear
from lit_swa.model import GPT


class Cell(NamedTuple):
    """What is decoded: `steps` tokens of each of `batch_size` sequences, the first of them at `position`."""

    batch_size: int
    position: int
    steps: int

    def first_tokens(self, ids: Tensor) -> Tensor:
        """(B, 1): what is fed first, of the text ids (1, T) that each sequence holds."""
        return ids[:, self.position - 1 : self.position].expand(self.batch_size, 1).contiguous()

    def sampler(self, sampling: Sampling, ids: Tensor) -> Sampler:
        return Sampler(sampling, [[0]] * self.batch_size, int(ids.max()) + 1, ids.device)


class LeftOut(ValueError):
    """Why a peer is not measured."""


# --------------------------------------------------------------------------------------------------------- transformers


class Transformers:
    """transformers' model of the same config and weights, step by step."""

    reads, batches = True, True

    def __init__(self, weights: GPT, sampling: Sampling) -> None:
        """Raises LeftOut for a model that transformers has not."""
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        config, state, weight = weights.config, weights.state_dict(), weights.transformer.wte.weight
        if config.tie_embeddings:
            del state["lm_head.weight"]
        lazy = {k: LazyTensor(tuple(v.shape), v.dtype, lambda v=v: v) for k, v in state.items()}
        try:
            fields = config_to_hf(config)
        except ValueError as error:
            raise LeftOut(str(error)) from None
        with torch.device(weight.device):
            shape = AutoConfig.for_model(**fields)
            self.model = AutoModelForCausalLM.from_config(shape, dtype=weight.dtype).eval()
        self.model.load_state_dict({n: t.load() for n, t in to_hf(lazy, config).items()}, strict=False)
        self.model.tie_weights()
        self.sampling, self.can_crop = sampling, not weights.unbounded(cached=True)

    def prefill(self, ids: Tensor) -> None:
        self.model(ids, use_cache=True, logits_to_keep=1)

    def decode(self, ids: Tensor, cell: Cell) -> Callable[[], None]:
        cache = self.model(ids[:, : cell.position], use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(cell.batch_size)
        first, sampler = cell.first_tokens(ids), cell.sampler(self.sampling, ids)

        def run() -> None:
            token = first
            for _ in range(cell.steps):
                logits = self.model(token, past_key_values=cache, use_cache=True).logits
                token = sampler.choose(logits[:, -1])
            if self.can_crop:  # where a window has passed, the oldest keys are gone for good
                cache.crop(-cell.steps)

        return run


class StaticTransformers:
    """transformers' generate with its static cache, for which it compiles the step itself."""

    reads, batches = False, True

    def __init__(self, model: Any, sampling: Sampling) -> None:
        self.model, self.how = model, {"do_sample": False}
        if sampling.temperature:
            self.how = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k or 0}

    def decode(self, ids: Tensor, cell: Cell) -> Callable[[], float]:
        prompt = ids[:, : cell.position].expand(cell.batch_size, -1).contiguous()

        def seconds(tokens: int) -> float:
            started = time.perf_counter()
            options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "cache_implementation": "static"}
            self.model.generate(prompt, **options, **self.how)[0, -1].item()  # the host waits
            return time.perf_counter() - started

        return lambda: seconds(cell.steps + 2) - seconds(2)  # without the prompt and what generate begins with


# ------------------------------------------------------------------------------------------------------------ llama.cpp


class LlamaCpp:
    """llama.cpp's server, by xllamacpp, on weights of the same shape. It measures its own time."""

    reads, batches = True, False

    def __init__(self, weights: GPT, sampling: Sampling, kind: str, length: int) -> None:
        """kind: how the file holds the weights, such as Q8_0. length: tokens of the longest text."""
        import xllamacpp

        self.directory = tempfile.TemporaryDirectory()  # it goes with this object
        path = Path(self.directory.name) / "model.gguf"
        write_file(weights, path, kind)
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(path), length + 64, 1
        params.n_gpu_layers = params.verbosity = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        self.server, self.sampling = xllamacpp.Server(params), sampling

    def complete(self, ids: Tensor, tokens: int, keep: bool) -> dict[str, float]:
        request = {"prompt": ids[0].tolist(), "n_predict": tokens, "ignore_eos": True, "cache_prompt": keep}
        how = {"temperature": self.sampling.temperature, "top_k": self.sampling.top_k or 0}
        return self.server.handle_completions(request | how)["timings"]

    def prefill(self, ids: Tensor) -> float:
        return self.complete(ids, 1, keep=False)["prompt_ms"] / 1e3

    def decode(self, ids: Tensor, cell: Cell) -> Callable[[], float]:
        prompt = ids[:, : cell.position]  # kept from run to run; the clock starts when the first token is there
        return lambda: self.complete(prompt, cell.steps + 1, keep=True)["predicted_ms"] / 1e3


def write_file(weights: GPT, path: Path, kind: str) -> None:
    """A GGUF file of these weights, dense again where they are quantised, with a vocabulary that is made up. Raises
    LeftOut for a model that llama.cpp has not."""
    config = weights.config
    if set(config.layer_variants) != {"full"}:
        raise LeftOut("it is measured with full attention.")
    linears = {f"{name}.weight": module for name, module in weights.named_modules() if is_linear(module)}
    state, shapes = weights.state_dict(), expected_shapes(config)
    tensors = {
        name: LazyTensor(shape, torch.float32, lambda linear=linears[name]: dense_weight(linear).detach())
        if name in linears
        else as_lazy(state[name])
        for name, shape in shapes.items()
    }
    try:
        architecture, metadata = find_architecture(config, lambda name: infos(tensors, config, name))
    except ValueError as error:
        raise LeftOut(str(error)) from None
    words = [f"<{i}>" for i in range(config.padded_vocab_size)]
    made_up = {"model": "llama", "tokens": words, "scores": [0.0] * len(words), "token_type": [1] * len(words)}
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in made_up.items()}
    write_gguf(path, architecture, metadata, tensors_of(tensors, config, architecture), kind)


# ------------------------------------------------------------------------------------------------------------- gpt-fast


class GptFast:
    """gpt-fast's model of the same shape with random weights, and its compiled step, which samples as well."""

    reads, batches = False, True
    settings: dict[str, Any] = {}  # of the compiler, made when gpt-fast is imported: it keeps them, and nobody else

    def __init__(self, weights: GPT, sampling: Sampling, bits: int | None, directory: Path) -> None:
        """bits: of the weights, 8 or 4 (in its groups of 32), or None. directory: of a clone."""
        if not (directory / "generate.py").is_file():
            raise LeftOut(f"{directory} has no generate.py: give the directory of a clone of gpt-fast.")
        sys.path.insert(0, str(directory))
        before = inductor.get_config_copy()
        script, definition, handlers = map(importlib.import_module, ("generate", "model", "quantize"))
        self.settings.update((k, v) for k, v in inductor.get_config_copy().items() if v != before[k])
        inductor.load_config(before)
        config, weight = weights.config, weights.transformer.wte.weight
        shape = {
            "block_size": config.block_size, "vocab_size": config.padded_vocab_size, "n_layer": config.n_layer,
            "n_head": config.n_head, "n_local_heads": config.n_query_groups, "dim": config.n_embd,
            "intermediate_size": config.intermediate_size, "rope_base": config.rope_base, "norm_eps": config.norm_eps,
        }  # fmt: skip
        with torch.device("meta"):
            model = definition.Transformer(definition.ModelArgs(**shape))
        if bits == 8:
            model = handlers.WeightOnlyInt8QuantHandler(model).convert_for_runtime()
        elif bits == 4:
            model = handlers.WeightOnlyInt4QuantHandler(model, 32).convert_for_runtime()
        self.model = randomize(model.to_empty(device=weight.device).eval(), weight.dtype)
        self.how = {"temperature": sampling.temperature, "top_k": sampling.top_k}
        # Not dynamic: each length of the caches gets code of its own, as a run of gpt-fast with that length does.
        self.step = torch.compile(script.decode_one_token, mode="reduce-overhead", fullgraph=True)

    def decode(self, ids: Tensor, cell: Cell) -> Callable[[], None]:
        self.model.max_seq_length = -1  # or it keeps the caches of an earlier cell, and reads them whole
        with torch.device(ids.device):
            self.model.setup_caches(cell.batch_size, cell.position + cell.steps)
        first, input_pos = cell.first_tokens(ids).int(), torch.tensor([cell.position], device=ids.device).int()

        def run() -> None:
            token = first
            input_pos.fill_(cell.position)
            with inductor.patch(self.settings):
                for _ in range(cell.steps):
                    token = self.step(self.model, token, input_pos, **self.how)[0].clone().view(cell.batch_size, 1)
                    input_pos.add_(1)

        return run


def randomize(model: Any, dtype: torch.dtype) -> Any:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = (torch.randn(tensor.shape, device=tensor.device) * 0.02).to(dtype)
        else:
            tensor.data.random_(-127, 127)
    return model
