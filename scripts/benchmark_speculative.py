"""Measure rounds of speculative decoding: python scripts/benchmark_speculative.py --name Mistral-7B-v0.1."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed


def main(
    checkpoint_dir: Path | None = None,
    name: str | None = None,
    draft: str = "streaming",
    draft_window: int = 512,
    speculative_k: list[int] | None = None,
    acceptance: float = 0.8,
    context: int = 32768,
    batch_size: int = 1,
    steps: int = 32,
    repeats: int = 5,
    dtype: str = "auto",
    quantize: str | None = None,
    device: str = "auto",
    compile: bool = False,
    output: Path = Path("out/benchmark_speculative.json"),
    model: dict[str, Any] | None = None,
) -> None:
    """Print what plain steps, a draft's steps and whole rounds cost, and the tokens per second that follow.

    The caches are filled with random keys, and a proposed token is accepted with the given probability, so that neither
    weights nor texts matter. All alternate, `repeats` times; medians are given. The ideal is the speed-up of Leviathan
    et al. 2023, E / (k c + 1), with E = (1 - a^(k + 1)) / (1 - a) tokens a round at an acceptance of a: a step of the
    draft takes c of the model's, and the model reads k + 1 tokens in the time of one.

    Args:
        checkpoint_dir: A checkpoint's directory or name. By default SmolLM2-135M-Instruct, which is downloaded once.
        name: A named shape, such as Mistral-7B-v0.1, with random weights in place of a checkpoint.
        draft: lookup, streaming, self-int4, streaming-int4, or a named shape, which gets random weights.
        draft_window: How many recent tokens the streaming draft reads.
        speculative_k: How many tokens are proposed in a round; several as a list. By default 4.
        acceptance: The probability that a proposed token is accepted, if those before it are.
        context: Tokens of each sequence.
        batch_size: How many sequences are continued together.
        steps: How many plain steps are timed together; of rounds, as many as give about so many tokens.
        repeats: How often each is timed; the median counts.
        dtype: float32, bfloat16 or float16; auto is bfloat16 on a GPU and float32 on a CPU.
        quantize: int8 or int4 holds the weights of linear layers so; by default as they are.
        device: auto, cpu or cuda.
        compile: Use the compiled steps.
        output: Where the JSON goes.
        model: Any field of the model's config, as --model.FIELD VALUE (--model.help lists them). block_size is as large
            as the context needs.
    """
    import torch

    from lit_swa.checks import check_range
    from lit_swa.formats.files import write_json
    from lit_swa.random_model import named_or_loaded
    from lit_swa.utils import describe_command, describe_machine, pick_device, pick_dtype

    arguments = {key: value for key, value in locals().items() if isinstance(value, (int, float, str, list, dict))}
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    for field, (least, most) in {"acceptance": (0, 1), "context": (16, 2**30), "steps": (1, 10**6)}.items():
        check_range(field, arguments[field], least, most)
    ks, rows = speculative_k or [4], []
    room = context + (steps + 2) * (max(ks) + 1)
    with torch.inference_mode():
        overrides = {"block_size": room} | (model or {})
        target = named_or_loaded(name, checkpoint_dir, dtype, device, quantize, **overrides)
        session = open_session(target, batch_size, context, room, max(ks), compile)
        proposer = open_draft(draft, session, draft_window, context, room, compile)
        for k in ks:
            rows.append({"k": k} | measure(session, proposer, k, acceptance, context, steps, repeats))
            report(rows[-1])
    output.parent.mkdir(parents=True, exist_ok=True)
    command = describe_command("--output")
    write_json(output, {"command": command, "machine": describe_machine(device), "arguments": arguments, "rows": rows})
    print(f"written to {output}", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------- what is measured


def open_session(target, batch_size: int, context: int, room: int, k: int, compile: bool):
    """A session with random keys, as if it had read `context` tokens."""
    from lit_swa.fast_decode import compile_decode
    from lit_swa.generate import Session
    from lit_swa.linear_formats import pack_for_cpu

    decode = compile_decode(target, tokens=k + 1) if compile else None
    if decode is None:
        pack_for_cpu(target)
    session = Session(target, batch_size, lookahead=k, decode=decode)
    session.reserve(room)
    fill(target, context)
    return session


def open_draft(draft: str, session, window: int, context: int, room: int, compile: bool):
    import torch

    from lit_swa import Config
    from lit_swa.random_model import random_model
    from lit_swa.speculative import SELF_DRAFTS, Lookup, ModelDraft, make_draft

    class Always(Lookup):
        """A look-up that proposes something where nothing is found, since a forced acceptance asks for no text."""

        def look_up(self, row: int, k: int) -> list[int]:
            return super().look_up(row, k) or self.texts[row][-1:] * k

    if draft == "lookup":
        proposer, ids = Always(), torch.randint(0, session.model.config.vocab_size, (session.batch_size, context))
        proposer.start(session, ids.tolist(), room)
    elif draft in SELF_DRAFTS:
        proposer = make_draft(draft, session.model, window, compile)
        proposer.start(session, [], room)
    else:
        weight, config = session.model.transformer.wte.weight, session.model.config
        config = Config.from_name(draft, block_size=room, vocab_size=config.vocab_size, padded_vocab_size=None)
        other = random_model(config, weight.dtype, weight.device)
        proposer = ModelDraft(open_session(other, session.batch_size, context, room, session.lookahead, compile))
        proposer.check(session.model, context)
    return proposer


def fill(model, context: int) -> None:
    """Random keys and values, and the positions before `context` in their slots."""
    import torch

    for cache in model.caches:
        cache.k.normal_()
        cache.v.normal_()
        slots = cache.slots
        pos = torch.arange(context, device=slots.pos.device)
        pos = torch.cat([pos[: slots.sinks], pos[slots.sinks :][-slots.n_slots :]])  # what a rolling cache still holds
        slots.pos.fill_(-1)
        for copy in slots.slots_of(pos):
            slots.pos[:, copy] = pos


def measure(session, draft, k: int, acceptance: float, context: int, steps: int, repeats: int) -> dict[str, Any]:
    """A row: seconds of plain steps, draft steps and rounds, and what they make of each other."""
    device, B = session.device, session.batch_size
    count = Counter(session, draft, context, acceptance)
    expected = sum(acceptance**i for i in range(k + 1))  # tokens a round
    rounds = max(2, round(steps / expected))

    def plain() -> None:
        count.decode(steps, 0)

    def speculative() -> None:
        count.decode(rounds, k)

    def propose() -> None:
        rows = count.begin().rows
        for _ in range(rounds):
            draft.propose(rows, k)

    def verify() -> None:
        count.read(rounds, k)

    timed = {"plain": plain, "propose": propose, "verify": verify, "speculative": speculative}
    seconds = alternate(timed, repeats, device)
    step, propose_s = seconds["plain"] / steps, seconds["propose"] / rounds
    round_s, c = seconds["speculative"] / rounds, seconds["propose"] / rounds / k / step
    ideal = expected / (k * c + 1)
    row = {"plain_ms": step * 1e3, "draft_step_ms": propose_s / k * 1e3, "verify_ms": seconds["verify"] / rounds * 1e3}
    row |= {"round_ms": round_s * 1e3, "c": c, "tokens_a_round": expected, "counted_a_round": count.tokens_a_round()}
    row |= {"plain_tokens_per_second": B / step, "tokens_per_second": B * expected / round_s}
    row |= {"speed_up": expected * step / round_s, "ideal": ideal, "share_of_ideal": expected * step / round_s / ideal}
    return row | peak(device)


class Counter:
    """Runs rounds as lit_swa.speculative does, from the same position each time, with a forced acceptance."""

    def __init__(self, session, draft, context: int, acceptance: float) -> None:
        import torch

        self.session, self.draft, self.context, self.acceptance = session, draft, context, acceptance
        self.generator = torch.Generator(session.device).manual_seed(1)
        self.rounds = self.tokens = 0
        caches = [*session.model.caches, *([] if draft.model is None else draft.model.caches)]
        self.slots = {id(cache.slots.pos): cache.slots.pos for cache in caches}
        self.held = {key: pos.clone() for key, pos in self.slots.items()}

    def accept(self, logits, tokens, q, sampler):
        """lit_swa.speculative.accept, but for how many tokens are accepted."""
        import torch

        from lit_swa.speculative import accept, leading

        following = accept(logits, tokens, q, sampler)[1]
        chance = torch.rand(tokens.shape, device=tokens.device, generator=self.generator)
        return leading(chance < self.acceptance), following

    def begin(self):
        """A run at the context's end: the newest token is not fed yet."""
        import torch

        from lit_swa.generate import Sampler, Sampling
        from lit_swa.speculative import Rows, Speculation

        for key, pos in self.slots.items():
            pos.copy_(self.held[key])
        device, B = self.session.device, self.session.batch_size
        sampler = Sampler(Sampling(), [[0]] * B, self.session.model.config.vocab_size, device)
        newest = torch.zeros(B, 2, dtype=torch.long, device=device)
        rows = Rows(sampler, newest, torch.full((B, 1), self.context, device=device))
        return Speculation(self.session, self.draft, rows, self.accept)

    def decode(self, rounds: int, k: int) -> None:
        """Whole rounds, with what the host does in them; plain steps for k = 0."""
        from lit_swa.speculative import SpeculativeStats, Text, read_round

        run, stats = self.begin(), SpeculativeStats()
        texts = [Text([0], 10**9, []) for _ in range(self.session.batch_size)]
        for _ in range(rounds):
            report = run.round(k)
            read_round(run, texts, report.tolist(), 0.0, stats)
        if k:
            self.rounds, self.tokens = self.rounds + stats.row_rounds, self.tokens + stats.new_tokens

    def tokens_a_round(self) -> float:
        return self.tokens / self.rounds

    def read(self, calls: int, k: int) -> None:
        """The model's calls of k + 1 tokens alone."""
        import torch

        from lit_swa.speculative import run_step

        rows = self.begin().rows
        idx = torch.zeros(self.session.batch_size, k + 1, dtype=torch.long, device=self.session.device)
        for _ in range(calls):
            run_step(self.session.model, self.session.decode, idx, rows.positions(-1, k + 1))


def alternate(runs: dict, repeats: int, device) -> dict:
    """Median seconds of each, run alternately after two rounds of warming up."""
    from statistics import median

    from lit_swa.utils import timed

    times = {who: [] for who in runs}
    for turn in range(repeats + 2):
        for who, run in runs.items():
            seconds = timed(run, device)
            if turn > 1:
                times[who].append(seconds)
    return {who: median(seconds) for who, seconds in times.items()}


def peak(device) -> dict[str, float]:
    import torch

    return {"peak_GB": torch.cuda.max_memory_allocated() / 1e9} if device.type == "cuda" else {}


def report(row: dict[str, Any]) -> None:
    times = f"plain step {row['plain_ms']:.2f} ms, draft step {row['draft_step_ms']:.2f} (c = {row['c']:.2f})"
    times += f", {row['k'] + 1} tokens read {row['verify_ms']:.2f}, round {row['round_ms']:.2f}"
    rates = f"{row['plain_tokens_per_second']:.1f} -> {row['tokens_per_second']:.1f} tok/s, {row['speed_up']:.2f}x"
    ideal = f"{row['share_of_ideal']:.0%} of the ideal {row['ideal']:.2f}x"
    print(f"k {row['k']}: {times} of {row['tokens_a_round']:.2f} tokens | {rates}, {ideal}", flush=True)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
