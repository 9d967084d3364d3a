"""What each way to put a window on a full model is worth: python scripts/adapt_window.py --data FILE.txt."""

import operator
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

if TYPE_CHECKING:
    import numpy as np
    import torch

    from lit_swa import GPT


ANSWER_ROOM = 8  # tokens that are left for a pass key


def main(
    data: list[Path] | Path,
    checkpoint_dir: Path | None = None,
    window: int = 512,
    n_sink_tokens: int = 4,
    keep_full: int = 8,
    adapters: dict[str, Path] | None = None,
    recipes: list[str] | None = None,
    lengths: list[int] | None = None,
    texts: int = 3,
    scored: int = 256,
    passkeys: int = 10,
    passkey_length: int = 2048,
    harm_texts: int = 2,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 1234,
    output: Path = Path("out/adapt_window.json"),
) -> None:
    """Measure recipes that let a model which was trained in full read prompts under a window (SWAA, arXiv 2512.10411).

    A recipe is a set of fields of the model's config. For each, prompts of several lengths are read and the tokens
    behind them scored: perplexity, and how often the likeliest token is that of the full model. Then pass keys are
    asked for that lie further back than the window. A table goes to stdout; a JSON and a picture are written. An
    interrupted run goes on where it stopped when it is started again with the same arguments.

    Args:
        data: A .txt file (UTF-8), a list or a directory of such files, or a .bin file of token ids.
        checkpoint_dir: A checkpoint's directory or name. By default SmolLM2-135M-Instruct, which is downloaded once.
        window: The sliding_window_size of all recipes.
        n_sink_tokens: How many first tokens streaming keeps in sight.
        keep_full: So many layers attend in full in the recipes that keep some: those that do most harm to the loss when
            they alone have a window, or as many at even distances.
        adapters: Names of recipes and directories that finetune/lora.py wrote: each is measured with the adapter too.
        recipes: Measure these alone, beside full. By default all.
        lengths: Tokens of a prompt and of what is scored behind it together. By default 1024, 2048 and 4096.
        texts: How many texts of each length, spread evenly over the data.
        scored: How many tokens behind a prompt are scored.
        passkeys: How many pass keys to ask for.
        passkey_length: Tokens of a text with a pass key, and of the room for its answer.
        harm_texts: How many texts, the first of the data, measure what a layer's window costs; the others are spread
            behind them.
        device: auto, cpu, cuda or mps.
        dtype: float32, bfloat16 or float16; auto is bfloat16 on a GPU and float32 on a CPU.
        seed: The same seed gives the same pass keys.
        output: The JSON file for the results; the picture goes next to it, as .png.
    """
    from lit_swa import evaluate
    from lit_swa.checkpoint import check_checkpoint_dir, load_config
    from lit_swa.checks import check_at_least
    from lit_swa.formats.checkpoint import tokenizer_dir
    from lit_swa.formats.download import find_checkpoint
    from lit_swa.formats.tokenizer import Tokenizer
    from lit_swa.plots import check_output, draw_results
    from lit_swa.utils import describe_command, describe_machine, memory_in_use

    device, dtype = evaluate.pick_place(device, dtype)
    lengths = sorted(set([1024, 2048, 4096] if lengths is None else lengths))
    checkpoint_dir = find_checkpoint(checkpoint_dir)
    for path in (checkpoint_dir, *(adapters or {}).values()):
        check_checkpoint_dir(path)
    config = load_config(checkpoint_dir)
    check_arguments(config, lengths, window, scored, passkey_length, keep_full)
    check_at_least(texts=(texts, 1), passkeys=(passkeys, 0), harm_texts=(harm_texts, 1))
    check_output(output)
    tokens, prefix = evaluate.read_stream(data, checkpoint_dir, config.vocab_size)
    arguments = {
        "checkpoint_dir": checkpoint_dir, "data": data, "window": window, "n_sink_tokens": n_sink_tokens,
        "keep_full": keep_full, "adapters": adapters or {}, "recipes": recipes, "lengths": lengths, "texts": texts,
        "scored": scored, "passkeys": passkeys, "passkey_length": passkey_length, "harm_texts": harm_texts,
        "device": device, "dtype": dtype, "seed": seed, "prefix": prefix,
        "data_sha256": evaluate.check_tokens(tokens, config.vocab_size, data),
        "weights": [evaluate.weights_identity(path) for path in (checkpoint_dir, *(adapters or {}).values())],
    }  # fmt: skip
    make_recipes(arguments, list(range(keep_full)), config.n_layer)  # wrong names show now
    if passkeys:
        passkey_prompt(Tokenizer(tokenizer_dir(checkpoint_dir)), 0, arguments)  # so does a text that is too short
    with evaluate.Results(output, arguments) as results:
        content = results.finished
        if content is None:
            rows, kept, harm = run(results, Texts(tokens, tuple(prefix), harm_texts, min(max(lengths), 4 * window)))
            content = {"command": describe_command(), "machine": describe_machine(device)}
            content |= {"peak_memory": memory_in_use(), "kept": kept, "harm": harm, "rows": rows}
            results.finish(content)
        else:
            print(f"{output} holds the results of these arguments already", file=sys.stderr)
        report(content)
        draw_results(output, lambda plt: draw(plt, {"arguments": results.arguments} | content))


def check_arguments(config, lengths: list[int], window: int, scored: int, passkey_length: int, keep_full: int) -> None:
    """Raises ValueError for what does not fit, before a model is loaded."""
    from lit_swa.checks import check_at_least, check_range

    check_at_least(lengths=(len(lengths), 1), scored=(scored, 1), window=(window, 1))
    check_range("keep_full", keep_full, 0, config.n_layer - 1)
    if (shortest := min(passkey_length, *(n - scored for n in lengths))) <= window:
        raise ValueError(
            f"window={window} must be smaller than every prompt, and the shortest has {shortest} tokens: lower "
            "--window or --scored, which is taken off each length, or raise --lengths or --passkey_length."
        )
    if set(config.layer_variants) != {"full"}:
        raise ValueError(f"The checkpoint has attention={config.attention!r}: give one that attends in full.")
    if (longest := max(*lengths, passkey_length)) > config.block_size:
        raise ValueError(f"A length of {longest} tokens is more than the context of {config.block_size}: use less.")


# ---------------------------------------------------------------------------------------------------------- the recipes


class Recipe(NamedTuple):
    fields: dict[str, Any]  # of the config
    blind: bool = False  # the last token of a prompt sees the window too, as in the paper
    adapter: str | None = None


def make_recipes(a: dict[str, Any], kept: list[int], n_layer: int) -> dict[str, Recipe]:
    """All recipes by their names. kept: the layers that keep full attention in some."""
    from lit_swa.config import join_pattern

    def pattern(full: list[int]) -> str:
        return join_pattern(["full" if i in full else "streaming" for i in range(n_layer)])

    n, sinks = len(kept), {"sliding_window_size": a["window"], "n_sink_tokens": a["n_sink_tokens"]}
    sliding = {"sliding_window_size": a["window"]}
    spaced = [(2 * j + 1) * n_layer // (2 * n) for j in range(n)]
    found = {
        "full": Recipe({}),
        "sliding": Recipe({"attention": "sliding", "rolling_kv_cache": True} | sliding),
        "streaming": Recipe({"attention": "streaming"} | sinks),
        f"streaming, {n} full by harm": Recipe({"attention": pattern(kept)} | sinks),
        f"streaming, {n} full evenly": Recipe({"attention": pattern(spaced)} | sinks),
        "prompt sliding": Recipe({"prompt_attention": "sliding"} | sliding),
        "prompt streaming": Recipe({"prompt_attention": "streaming"} | sinks),
        "prompt streaming, last token too": Recipe({"prompt_attention": "streaming"} | sinks, blind=True),
        f"prompt streaming, {n} full by harm": Recipe({"prompt_attention": pattern(kept)} | sinks),
    }
    if n == 0:
        found = {name: recipe for name, recipe in found.items() if "0 full" not in name}
    for name, directory in a["adapters"].items():
        if name not in found:
            raise ValueError(f"adapters: there is no recipe {name!r}, choose from {', '.join(found)}.")
        found[f"{name} + LoRA"] = found[name]._replace(adapter=directory)
    chosen = list(found) if a["recipes"] is None else ["full", *a["recipes"]]
    if unknown := [name for name in chosen if name not in found]:
        raise ValueError(f"There is no recipe {unknown[0]!r}: choose from {', '.join(found)}.")
    return {name: found[name] for name in dict.fromkeys(chosen)}


def load(recipe: Recipe, gpt: "GPT", a: dict[str, Any]) -> "GPT":
    """The model of a recipe; without an adapter it shares the weights of gpt."""
    from lit_swa.checkpoint import load_model
    from lit_swa.evaluate import with_fields
    from lit_swa.linear_formats import pack_for_cpu

    if recipe.adapter is None:
        model = with_fields(gpt, **recipe.fields)
    else:
        fields = {"attention": "full", "prompt_attention": None} | recipe.fields
        model = load_model(recipe.adapter, a["dtype"], a["device"], **fields)
    pack_for_cpu(model)
    return model


# -------------------------------------------------------------------------------------------------------- what is asked


class Texts(NamedTuple):
    """The texts of the data: the first ones measure harm, and those of every length are spread behind them."""

    tokens: "np.ndarray"
    prefix: tuple[int, ...]  # what each begins with
    harm_texts: int
    harm_length: int

    def starts(self, length: int, n: int) -> list[int]:
        """Where n texts of this length begin. Raises ValueError for data that is too short."""
        first, last = self.harm_texts * self.harm_length, len(self.tokens) - length
        if last < first:
            raise ValueError(f"The data has {len(self.tokens)} tokens, and {first + length} are needed: give more.")
        return [first + (last - first) * i // max(1, n - 1) for i in range(n)]

    def cut(self, start: int, length: int) -> "torch.Tensor":
        import torch

        ids = [*self.prefix, *self.tokens[start : start + length - len(self.prefix)].tolist()]
        return torch.tensor(ids)


def run(results, texts: Texts) -> tuple[list[dict[str, Any]], list[int], dict[str, float]]:
    """(a row for each recipe, the layers that keep full attention, what a window costs in each layer alone)"""
    from lit_swa.checkpoint import load_model
    from lit_swa.formats.checkpoint import tokenizer_dir
    from lit_swa.formats.tokenizer import Tokenizer
    from lit_swa.utils import ProgressLine, interruptible

    a = results.arguments
    for length in a["lengths"]:
        texts.starts(length, a["texts"])
    results.save()  # a disk that is full or read-only shows now and not after hours
    tokenizer = Tokenizer(tokenizer_dir(a["checkpoint_dir"]))
    gpt = load_model(a["checkpoint_dir"], a["dtype"], a["device"])
    harm = measure_harm(results, gpt, texts) if a["keep_full"] else {}
    kept = sorted(sorted(range(len(harm)), key=lambda i: -harm[str(i)])[: a["keep_full"]])
    recipes, rows = make_recipes(a, kept, gpt.config.n_layer), []
    line = ProgressLine(len(recipes) * (a["texts"] * sum(a["lengths"]) + a["passkeys"] * a["passkey_length"]), "tokens")
    with interruptible() as interrupted:
        for name, recipe in recipes.items():
            model = load(recipe, gpt, a)
            for key, ask in questions(name, recipe, model, tokenizer, texts, a):
                if key not in results.parts:
                    results.add(key, ask())
                read = [p["tokens"] for key, p in results.parts.items() if key != "_harm"]
                line.show(sum(read), name)
                if interrupted():
                    results.save()
                    print("what is measured is kept: the same command goes on", file=sys.stderr)
                    raise KeyboardInterrupt
            rows.append(row_of(name, recipe, results.parts, texts, a))
            model.clear_kv_cache()
    return rows, kept, harm


def measure_harm(results, gpt: "GPT", texts: Texts) -> dict[str, float]:
    """By how much the mean loss of the tokens beyond the window rises where one layer alone is streaming."""
    from lit_swa.evaluate import window_nll, with_fields
    from lit_swa.mixers import harm_of_each
    from lit_swa.utils import ProgressLine

    if (kept := results.parts.get("_harm")) is not None:
        return kept
    a, full = results.arguments, [attn.mixer for attn in gpt.layers]
    sinks = {"sliding_window_size": a["window"], "n_sink_tokens": a["n_sink_tokens"]}
    model = with_fields(gpt, attention="streaming", **sinks)
    read = [texts.cut(i * texts.harm_length, texts.harm_length)[None] for i in range(texts.harm_texts)]
    line = ProgressLine(len(full), "layer")

    def loss() -> float:
        nll = [window_nll(model, ids.to(a["device"]), a["window"]).double().mean().item() for ids in read]
        return sum(nll) / len(nll)

    changed = {i: attn.mixer for i, attn in enumerate(model.layers)}
    before, losses = harm_of_each(model, full, changed, loss, lambda n: line.show(n, "what each layer costs", tokens=0))
    results.add("_harm", {str(i): value - before for i, value in losses.items()}, 0)
    return results.parts["_harm"]


def questions(name: str, recipe: Recipe, model: "GPT", tokenizer, texts: Texts, a: dict[str, Any]):
    """Yield (key, a function that measures it) for everything that a recipe is asked."""
    from functools import partial

    for length in a["lengths"]:
        for start in texts.starts(length, a["texts"]):
            yield f"{name}/{length}/{start}", partial(score, model, recipe, texts.cut(start, length), a["scored"])
    for number in range(a["passkeys"]):
        yield f"{name}/passkey/{number}", partial(ask_passkey, model, recipe, tokenizer, number, a)


def session_of(model: "GPT", recipe: Recipe):
    from lit_swa.generate import Session

    class Blind(Session):
        def read(self, ids, **options):
            return self.feed(ids, prompt=True, **options)

    return Blind(model) if recipe.blind else Session(model)


def score(model: "GPT", recipe: Recipe, ids: "torch.Tensor", scored: int) -> dict[str, Any]:
    """Read a prompt, and score the `scored` tokens behind it."""
    import torch
    from torch.nn.functional import cross_entropy

    session, ids = session_of(model, recipe), ids.to(model.transformer.wte.weight.device)
    session.reserve(len(ids))
    with torch.inference_mode():
        started = time.perf_counter()
        first = session.read(ids[:-scored])
        seconds = time.perf_counter() - started
        rest = session.feed(ids[-scored:-1], logits_to_keep=0) if scored > 1 else first[:, :0]
        logits = torch.cat([first, rest], dim=1)[0].float()
        nll = cross_entropy(logits, ids[-scored:], reduction="sum").item()
    found = {"tokens": len(ids), "nll": nll, "likeliest": logits.argmax(-1).tolist(), "seconds": seconds}
    return found | {"cache_bytes": model.kv_cache_bytes()}


def passkey_prompt(tokenizer, number: int, a: dict[str, Any]) -> tuple[list[int], int, float]:
    """(ids of the prompt, the pass key, the depth). Raises ValueError when the length has no room for them."""
    from lit_swa.passkey import Trial, build_prompt

    depth = (number + 0.5) / a["passkeys"] * (1 - a["window"] / a["passkey_length"])
    return build_prompt(Trial(a["passkey_length"], depth, number), tokenizer, a["seed"], ANSWER_ROOM)


def ask_passkey(model: "GPT", recipe: Recipe, tokenizer, number: int, a: dict[str, Any]) -> dict[str, Any]:
    """One pass key, at a depth that the window does not reach from the text's end."""
    from lit_swa.passkey import ask, find_answer

    ids, passkey, depth = passkey_prompt(tokenizer, number, a)
    answer = ask(session_of(model, recipe), tokenizer, ids, ANSWER_ROOM)
    return {"tokens": a["passkey_length"], "depth": depth, "answer": answer, "right": find_answer(answer) == passkey}


# ----------------------------------------------------------------------------------------------------------- the answer


def row_of(name: str, recipe: Recipe, parts: dict[str, Any], texts: Texts, a: dict[str, Any]) -> dict[str, Any]:
    """What the table says of a recipe."""
    from lit_swa.evaluate import perplexity

    row: dict[str, Any] = {"recipe": name, **recipe._asdict(), "ppl": {}, "agreement": {}}
    for length in a["lengths"]:
        starts = texts.starts(length, a["texts"])
        own, full = ([parts[f"{which}/{length}/{start}"] for start in starts] for which in (name, "full"))
        row["ppl"][str(length)] = perplexity(sum(part["nll"] for part in own) / (len(own) * a["scored"]))
        chosen = [[token for part in of for token in part["likeliest"]] for of in (own, full)]
        row["agreement"][str(length)] = sum(map(operator.eq, *chosen)) / len(chosen[0])
        row["read_seconds"], row["cache_bytes"] = sum(p["seconds"] for p in own) / len(own), own[0]["cache_bytes"]
    found = [parts[f"{name}/passkey/{number}"]["right"] for number in range(a["passkeys"])]
    return row | {"passkeys": sum(found) / len(found) if found else None}


def report(result: dict[str, Any]) -> None:
    """The table on stdout, and which layers do most harm when they alone have a window."""
    print("\n".join(table(result["rows"])))
    patterns = {row["fields"].get("attention", "") for row in result["rows"] if row["recipe"].endswith("full by harm")}
    if result["kept"] and (patterns := patterns - {""}):
        print(f"\nlayers {', '.join(map(str, result['kept']))} keep full attention: --model.attention {patterns.pop()}")


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: a row for each recipe."""
    from lit_swa.utils import format_number

    lengths = list(rows[0]["ppl"])
    names = ["pass keys found", *(f"perplexity behind {n}" for n in lengths), f"same token as full, {lengths[-1]}"]
    names.append(f"cache of {lengths[-1]}")
    lines = ["| recipe | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for row in rows:
        found = "" if row["passkeys"] is None else f"{row['passkeys']:.0%}"
        cells = [found, *(format_number(row["ppl"][n]) for n in lengths), f"{row['agreement'][lengths[-1]]:.0%}"]
        cells.append(f"{row['cache_bytes'] / 1e6:.1f} MB")
        lines.append(f"| {row['recipe']} | " + " | ".join(cells) + " |")
    return lines


def draw(plt, result: dict[str, Any]):
    """Perplexity at every length, the full model's choices, and pass keys: a line for each recipe."""
    from lit_swa.plots import model_of, names_of, set_title, shades, short_count

    a, rows = result["arguments"], result["rows"]
    places, longest = range(len(rows)), str(a["lengths"][-1])
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(12, 0.3 * len(rows) + 2), layout="constrained", sharey=True, width_ratios=(2, 1, 1)
    )
    for length, colour in zip(a["lengths"], shades("#0072B2", len(a["lengths"]))[::-1], strict=True):
        ppl = [row["ppl"][str(length)] for row in rows]
        left.plot(ppl, places, "o", color=colour, label=f"{short_count(length)} tokens")
    left.axvline(rows[0]["ppl"][longest], color="grey", linestyle=":", linewidth=1)
    left.set_yticks(places, [row["recipe"] for row in rows])
    left.invert_yaxis()
    left.set_xlabel(f"perplexity of {a['scored']} tokens behind a prompt")
    left.legend(frameon=False)
    agreement = [100 * row["agreement"][longest] for row in rows]
    found = [100 * (row["passkeys"] or 0) for row in rows]
    for axis, values, colour, title in (
        (middle, agreement, "#56B4E9", f"same token as full, {short_count(int(longest))}, %"),
        (right, found, "#009E73", "pass keys found, %"),
    ):
        axis.barh(places, values, height=0.6, color=colour)
        axis.set_xlim(0, 100)
        axis.set_xlabel(title)
    for axis in (left, middle, right):
        axis.grid(axis="x", alpha=0.3)
    window = f"a window of {a['window']} tokens"
    set_title(figure, f"{model_of(a)} under {window}, reads {names_of(a['data'])}",
              f"{a['texts']} texts of each length, {a['passkeys']} pass keys beyond the window")  # fmt: skip
    return figure


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
