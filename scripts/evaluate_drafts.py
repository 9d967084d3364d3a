"""Count which tokens of a draft a model accepts in real texts: scripts/evaluate_drafts.py --texts '[FILE.txt]'."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed


def main(
    texts: list[Path],
    checkpoint_dir: Path | None = None,
    drafts: list[str] | None = None,
    draft_windows: list[int] | None = None,
    speculative_k: list[int] | None = None,
    contexts: list[int] | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    dtype: str = "auto",
    device: str = "auto",
    output: Path = Path("out/evaluate_drafts.json"),
    model: dict[str, Any] | None = None,
) -> None:
    """Print a table of drafts: the acceptance in continuations of the texts' beginnings, and the tokens of a round.

    The acceptance a is the share of the proposed tokens that are accepted of those that are judged: the tokens behind
    a refused one are not.

    Args:
        texts: Text files; the model continues the first tokens of each.
        checkpoint_dir: A checkpoint's directory or name. By default SmolLM2-135M-Instruct, which is downloaded once.
        drafts: lookup, streaming, self-int4, streaming-int4, as a list. By default all.
        draft_windows: How many recent tokens the streaming draft reads. By default 64, 128, 256 and 512.
        speculative_k: How many tokens are proposed in a round. By default 4.
        contexts: How many tokens of a text are its prompt. By default 1024 and 4096.
        max_new_tokens: How long the continuations are.
        temperature: 0 takes the likeliest token each time; else tokens are sampled, with a fixed seed.
        dtype: float32, bfloat16 or float16; auto is bfloat16 on a GPU and float32 on a CPU.
        device: auto, cpu or cuda.
        output: Where the JSON goes.
        model: Any field of the model's config, as --model.FIELD VALUE (--model.help lists them).
    """
    from lit_swa.checkpoint import load_model
    from lit_swa.evaluate import pick_place
    from lit_swa.formats.download import find_checkpoint
    from lit_swa.formats.files import write_json
    from lit_swa.generate import Sampling, Session
    from lit_swa.linear_formats import pack_for_cpu
    from lit_swa.speculative import SELF_DRAFTS, SpeculativeStats, make_draft, speculate
    from lit_swa.texts import encode_file
    from lit_swa.tokenizer import Tokenizer
    from lit_swa.utils import describe_command, describe_machine

    (device, dtype), ks = pick_place(device, dtype), speculative_k or [4]
    checkpoint_dir = find_checkpoint(checkpoint_dir)
    target = load_model(checkpoint_dir, dtype=dtype, device=device, **(model or {}))
    pack_for_cpu(target)
    tokenizer, session, rows = Tokenizer(checkpoint_dir), Session(target, lookahead=max(ks)), []
    proposers = {}
    for kind in drafts or ["lookup", *SELF_DRAFTS]:
        for window in draft_windows or [64, 128, 256, 512]:
            name = f"{kind} {window}" if "streaming" in kind else kind
            proposers[name] = proposers.get(name) or make_draft(kind, target, window)
    for context in contexts or [1024, 4096]:
        found = {(name, k): SpeculativeStats() for name in proposers for k in ks}
        for path in texts:
            ids = encode_file(tokenizer, path, context)[:context].tolist()
            for (name, k), stats in found.items():  # the session keeps the prompt for the next draft
                rounds = speculate(
                    session, [ids], proposers[name], speculative_k=k, max_new_tokens=max_new_tokens,
                    sampling=Sampling(temperature=temperature, seed=1), stats=stats,
                )  # fmt: skip
                for _ in rounds:
                    pass
        for (name, k), stats in found.items():
            rows.append({"context": context, "draft": name, "k": k} | summary(stats))
            report(rows[-1])
    output.parent.mkdir(parents=True, exist_ok=True)
    command, machine = describe_command("--output"), describe_machine(device)
    write_json(output, {"command": command, "machine": machine, "dtype": dtype, "rows": rows})
    print(f"written to {output}", file=sys.stderr)


def summary(stats) -> dict[str, Any]:
    """What was accepted, in all texts."""
    judged = stats.accepted + stats.refused
    counts = {"accepted": stats.accepted, "judged": judged, "proposed": stats.proposed, "rounds": stats.rounds}
    a, tokens = stats.accepted / max(1, judged), (stats.accepted + stats.rounds) / max(1, stats.rounds)
    return counts | {"acceptance": a, "tokens_a_round": tokens}


def report(row: dict[str, Any]) -> None:
    print(
        f"context {row['context']:6} | {row['draft']:14} | k {row['k']:2} | acceptance {row['acceptance']:.2f} "
        f"({row['accepted']} of {row['judged']}) | {row['tokens_a_round']:.2f} tokens a round, {row['rounds']} rounds",
        flush=True,
    )


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
