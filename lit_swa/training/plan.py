"""Training on many devices, computed: what each holds, what they exchange, and how long a step takes beside what was
measured of its pieces (scripts/measure_pieces.py)."""

import math
from typing import Any, NamedTuple

import torch

from lit_swa.config import Config
from lit_swa.formats.hugging_face import empty_model, expected_shapes
from lit_swa.rope import RoPE
from lit_swa.training.estimate import Parts, Tracker, course, measure_parts, sharded_parts
from lit_swa.training.flops import token_flops
from lit_swa.training.loop import Batch
from lit_swa.training.memory import recompute_blocks
from lit_swa.training.precision import train_in_float32

FLOAT32 = 4  # bytes: weights are held, and gradients added up, in float32
GATHERED = torch.bfloat16  # in which products are computed, and FSDP gathers weights
DDP_BUCKET = 25 * 2**20  # bytes that DDP adds up at once

# ------------------------------------------------------------------------------------------- what is held and exchanged


class Exchange(NamedTuple):
    """Equal operations of a step on one GPU."""

    operation: str  # all_gather, reduce_scatter or all_reduce
    bytes: int  # of the tensor, whole
    count: int
    n: int  # GPUs that take part
    across: bool  # each of another host

    @property
    def moved(self) -> float:
        """Bytes that a GPU takes in: of a ring, which none does with less."""
        return (2 if self.operation == "all_reduce" else 1) * self.count * self.bytes * (self.n - 1) / self.n


class Plan:
    """A step of training every weight of a model."""

    def __init__(
        self, config: Config, strategy: str, length: int, rows: int, accumulate: int, recompute: int = 0
    ) -> None:
        self.config, self.strategy, self.length, self.rows = config, strategy, length, rows
        self.accumulate, self.recompute, self.tokens = accumulate, recompute, accumulate * rows * length
        sizes = {name: math.prod(shape) for name, shape in expected_shapes(config).items()}
        self.blocks = [sum(n for name, n in sizes.items() if name.startswith(f"transformer.h.{i}."))
                       for i in range(config.n_layer)]  # fmt: skip
        self.weights = sum(sizes.values())
        self.root = self.weights - sum(self.blocks)  # embeddings, the last norm, the head

    def shards(self, n: int, per_host: int) -> int:
        """Over how many GPUs weights, gradients and moments are sharded."""
        return {"ddp": 1, "fsdp": n, "hybrid": min(n, per_host)}[self.strategy]

    def exchanges(self, n: int, per_host: int) -> list[Exchange]:
        """What a step exchanges. FSDP gathers a block for each forward and again for each backward, the rest once a
        micro-batch; gradients are exchanged behind the last one."""
        if n == 1:
            return []
        if self.strategy == "ddp":
            buckets = max(1, round(FLOAT32 * self.weights / DDP_BUCKET))
            return [Exchange("all_reduce", FLOAT32 * self.weights // buckets, buckets, n, per_host == 1)]
        shards, found = self.shards(n, per_host), []
        for size, gathers in [(self.root, 1), *((block, 2) for block in self.blocks)]:
            if shards > 1:
                across = per_host == 1
                whole = GATHERED.itemsize * size
                found.append(Exchange("all_gather", whole, gathers * self.accumulate, shards, across))
                found.append(Exchange("reduce_scatter", FLOAT32 * size, 1, shards, across))
            if n > shards:
                found.append(Exchange("all_reduce", FLOAT32 * size // shards, 1, n // shards, True))
        return found

    def memory(self, n: int, per_host: int) -> int:
        """Bytes on one GPU: weights, gradients and two moments, what is gathered, and activations."""
        shards, whole = self.shards(n, per_host), FLOAT32 * self.weights
        parts = self.parts(shards)
        waiting = whole if self.accumulate > 1 else 0  # gradients; else they come with the backward
        update = (whole + 2 * FLOAT32 * self.largest) // shards
        if shards == 1:
            buckets = whole if n > 1 else 0  # DDP's copies of the gradients
            return 3 * whole + buckets + max(course(parts, self.recompute, waiting), update)
        gathered = GATHERED.itemsize * (self.root + 2 * max(self.blocks))  # the layer at work, and the next one
        return 3 * whole // shards + waiting + gathered + max(course(parts, self.recompute, 0), update)

    @property
    def largest(self) -> int:
        """Weights of the largest matrix, of which the update holds two more."""
        return max(math.prod(shape) for shape in expected_shapes(self.config).values())

    def parts(self, shards: int = 1) -> Parts:
        """What the parts of the model take, as in a dry run."""
        gpt = empty_model(self.config).train()
        train_in_float32(gpt, GATHERED)
        gpt.to_empty(device="cpu")  # no number is written, so that no memory is taken
        gpt.rope = RoPE(gpt.config)
        recompute_blocks(gpt, 0)
        idx = torch.zeros(self.rows, self.length, dtype=torch.long)
        call, where = gpt.plan_call(idx, None, documents=None), torch.arange(idx.numel())
        with Tracker() as tracker:
            parts = measure_parts(tracker, gpt, call, Batch(idx, idx, None, [0]), where)
        return parts if shards == 1 else sharded_parts(parts, gpt, shards)


# ------------------------------------------------------------------------------------------------------------- the time


class Network(NamedTuple):
    """What links hosts."""

    per_host: int
    rate: float  # bytes per second and GPU
    start: float  # seconds for each further host


class Spread(NamedTuple):
    """What steps on several devices took, beside computing and exchanging one after the other."""

    overlap: float = 0.0  # the share of what can overlap that did so
    beside: float = 0.0  # seconds for each weight that a step took longer: what the strategy does besides


class Times(NamedTuple):
    """Seconds of a step."""

    alone: float  # on one GPU
    computing: float
    exchanging: float
    beside: float  # what the strategy does besides
    step: float  # less than all three together, where they overlap


def together(alone: float, computing: float, exchanging: float, room: float, plan: Plan, spread: Spread) -> Times:
    """A step: what is exchanged hides behind `room` seconds of computing, as far as it was measured to."""
    beside = spread.beside * plan.weights
    step = computing + exchanging + beside - spread.overlap * min(exchanging, room)
    return Times(alone, computing, exchanging, beside, step)


class Measured:
    """What was measured, and what follows for a plan."""

    def __init__(self, content: dict[str, Any], config: Config, length: int, network: Network) -> None:
        """Raises ValueError where a step of one device is missing."""
        self.content, self.network = content, network
        known = [row for row in content.get("steps", ()) if row["strategy"] != "hybrid" and row.get("lora_r") is None]
        self.steps = known  # those that train every weight in a way that is planned here
        self.flops = token_flops(config, length)
        if self.flops is None:
            raise ValueError(f"The operations of attention={config.attention!r} are not counted: plan another shape.")
        steps = [row for row in known if row["strategy"] == "one" and row["flops_per_token"]]
        if not steps:
            raise ValueError("The pieces hold no step of one device: run scripts/measure_pieces.py again.")

        def distance(row: dict[str, Any]) -> float:
            work = math.log(row["flops_per_token"] / self.flops)
            return abs(work) + abs(math.log(row["length"] / length))

        self.one = min(steps, key=distance)
        self.per_flop = self.one["micro_s"] / (self.one["flops_per_token"] * self.one["rows"] * self.one["length"])

    def notes(self, plan: Plan) -> list[str]:
        """Where the figures come from."""
        one, share = self.one, f" (MFU {self.one['mfu']:.1%})" if "mfu" in self.one else ""
        lines = [f"Measured on {self.content['machine']}: {one['name']}, {one['rows']} rows of {one['length']}{share}"]
        links = [f"{op} {self.rate(op) / 1e9:.0f} GB/s" for op in ("all_gather", "reduce_scatter", "all_reduce")]
        lines.append(f"measured between {self.content['processes']} devices of a host: " + ", ".join(links))
        spread = self.spread(plan.strategy)
        hidden = f"{spread.overlap:.0%} of what can overlap does"
        beside = f"a step takes {1e3 * spread.beside * plan.weights:,.1f} ms beside computing and exchanging"
        given = f"{self.network.rate / 1e9:g} GB/s and {self.network.start * 1e6:g} us a host"
        lines.append(f"measured for {plan.strategy}: {hidden}; {beside}, by the number of weights")
        return [*lines, f"given, not measured: a network of {given} a GPU"]

    def rate(self, operation: str) -> float:
        """Bytes per second that a device takes in, in the largest exchange."""
        n, rows = self.content["processes"], self.rows(operation)
        return Exchange(operation, rows[-1]["bytes"], 1, n, False).moved / rows[-1]["seconds"]

    def rows(self, operation: str) -> list[dict[str, Any]]:
        """The exchanges of a kind, the smallest first. Raises ValueError where there are none."""
        rows = [row for row in self.content.get("exchanges", ()) if row["operation"] == operation]
        if not rows:
            raise ValueError("The pieces hold no exchanges: run scripts/measure_pieces.py with --devices 2 or more.")
        return sorted(rows, key=lambda row: row["bytes"])

    def seconds(self, e: Exchange) -> float:
        """How long exchanges take: a start, and the bytes at the rate of the slowest link."""
        smallest = self.rows(e.operation)[0]
        own = Exchange(e.operation, smallest["bytes"], 1, self.content["processes"], False).moved
        start, rate = max(0.0, smallest["seconds"] - own / self.rate(e.operation)), self.rate(e.operation)
        hosts = e.n if e.across else -(-e.n // self.network.per_host)
        if e.across:
            rate = min(rate, self.network.rate)
        elif hosts > 1:  # a ring leaves a host by every card
            rate = min(rate, self.network.rate * self.network.per_host)
        return e.count * (start + self.network.start * (hosts - 1)) + e.moved / rate

    def computing(self, plan: Plan, shards: int) -> tuple[float, float]:
        """Seconds of a micro-batch, and of the update of a GPU's share of the weights."""
        again = sum(plan.blocks[: plan.recompute]) / plan.weights / 3  # a forward is a third
        micro = self.per_flop * self.flops * plan.rows * plan.length * (1 + again)
        return micro, self.one["update_s"] * plan.weights / self.one["weights"] / shards

    def times(self, plan: Plan, n: int) -> Times:
        per_host = self.network.per_host
        micro, update = self.computing(plan, plan.shards(n, per_host))
        alone = plan.accumulate * micro + self.computing(plan, 1)[1]
        exchanging = sum(map(self.seconds, plan.exchanges(n, per_host)))
        spread = self.spread(plan.strategy) if n > 1 else Spread()
        return together(alone, plan.accumulate * micro + update, exchanging, self.room(plan, micro), plan, spread)

    @staticmethod
    def room(plan: Plan, micro: float) -> float:
        """Seconds of computing beside which something can be exchanged: DDP has the last backward."""
        return micro * 2 / 3 if plan.strategy == "ddp" else micro * plan.accumulate

    def spread(self, strategy: str, but: dict[str, Any] | None = None) -> Spread:
        """What the steps of a strategy tell; hybrid's are FSDP's. Nothing where none was measured.

        A step that took less than computing and exchanging one after the other hid some of it. One that took more does
        something besides, which no exchange shows: FSDP for its gradients and its update, not for what it gathers
        (tutorials/scale_out.md, LoRA). So that comes once a step, and is taken to grow with the weights.

        but: a step that does not count.
        """
        found = []
        for row in self.spread_steps():
            if row["strategy"] == ("ddp" if strategy == "ddp" else "fsdp") and row is not but:
                computing, exchanging, room = self.parts_of(row)
                hidden = computing + exchanging - row["step_s"]
                overlap = min(1.0, max(0.0, hidden) / min(exchanging, room))
                found.append(Spread(overlap, max(0.0, -hidden) / row["weights"]))
        return Spread(*(sum(values) / len(found) for values in zip(*found, strict=True)))

    def spread_steps(self) -> list[dict[str, Any]]:
        """The steps that were measured on several devices and on one."""
        return [row for row in self.steps if row["strategy"] != "one" and self.alone(row) is not None]

    def alone(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """The same step on one device."""
        keys = ("name", "model", "length", "rows")
        like = [r for r in self.steps if r["strategy"] == "one" and all(r[k] == row[k] for k in keys)]
        return like[0] if like else None

    def plan_of(self, row: dict[str, Any]) -> Plan:
        """The plan of a step that was measured."""
        config = Config.from_name(row["name"], **{"block_size": row["length"]} | row["model"])
        return Plan(config, "fsdp" if row["strategy"] == "fsdp" else "ddp", row["length"], row["rows"], 1)

    def parts_of(self, row: dict[str, Any]) -> tuple[float, float, float]:
        """(seconds of computing, of exchanging, that the latter can hide behind) of a step on several devices."""
        one, plan, n = self.alone(row), self.plan_of(row), row["processes"]
        exchanging = sum(map(self.seconds, plan.exchanges(n, max(n, self.network.per_host))))
        computing = one["micro_s"] + one["update_s"] / plan.shards(n, n)
        return computing, exchanging, self.room(plan, one["micro_s"])

    def checks(self) -> list[str]:
        """What is computed for the steps that were measured on several devices, each by what the others say: without
        another step of its strategy that is computing and exchanging, one after the other."""
        lines = []
        for row in self.spread_steps():
            spread, plan = self.spread(row["strategy"], but=row), self.plan_of(row)
            step = together(0.0, *self.parts_of(row), plan, spread).step
            what = f"{row['strategy']} on {row['processes']} devices, {row['rows']} x {row['length']}"
            how = "" if any(spread) else " with nothing hidden and nothing besides"
            lines.append(f"check: {what}: computed {1e3 * step:,.1f} ms{how}, measured {1e3 * row['step_s']:,.1f} ms")
        for row in [row for row in self.steps if "memory_GB" in row]:
            n, what = row["processes"], f"{row['strategy']}, {row['rows']} x {row['length']}"
            needed = self.plan_of(row).memory(n, max(n, self.network.per_host)) / 1e9
            lines.append(f"check: memory of {what}: computed {needed:.1f} GB, measured {row['memory_GB']:.1f} GB")
        return lines
