"""lit_swa/training without texts: a model from random weights, trained on random tokens by the helpers of the loop."""

import ast
import copy
import errno
import fcntl
import gc
import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_config

from lit_swa import GPT
from lit_swa.arguments import Training
from lit_swa.checkpoint import load_model, save_checkpoint
from lit_swa.formats import files
from lit_swa.formats.files import LOCK_NAME, atomic_file, open_safetensors, replace_directory, write_text
from lit_swa.train import (
    Batch,
    Run,
    Saver,
    build_optimizer,
    clip_gradients,
    read_metrics,
    rehearse,
    require_finite,
    set_rate,
    start_fabric,
    steps,
    validate,
)
from lit_swa.training.log import METRICS, Log
from lit_swa.training.loop import warmup_steps
from lit_swa.training.saving import saved_steps
from lit_swa.utils import Unbreakable, format_number, format_perplexity, interruptible

pytest.importorskip("lightning")
TRAINING = Path(__file__).resolve().parents[1] / "lit_swa" / "training"


class RandomTokens:
    """Rows of random tokens, which follow from the step's number, as a feed and as what is validated on."""

    batch_size, steps_per_epoch, row = 3, 10, 16
    identity = {"data": "random", "order": [3, 16]}

    def row_of(self, step: int, n: int) -> Batch:
        ids = torch.from_numpy(np.random.default_rng([step, n]).integers(0, 97, (1, self.row + 1)))
        return Batch(ids[:, :-1], ids[:, 1:], [self.row], [n])

    def batches(self, step=10**6, rank=0, world_size=1):
        return [self.row_of(step, n) for n in range(rank, self.batch_size, world_size)]

    def tokens(self, step):
        return self.batch_size * self.row

    def longest(self):
        return self.row_of(0, 0)


class RandomRows(RandomTokens):
    trained_tokens = 3 * 16

    def head(self):
        return self


class RandomFeed(RandomTokens):
    def trained_tokens(self, step):
        return self.batch_size * self.row


class Pretraining:
    """A pretraining script in small, in two parts: what stands before its loop, and the loop."""

    def __init__(self, out_dir: Path, measure=validate, after_step=lambda *trained: None, **arguments):
        """measure: in place of validate. after_step: is given what a step trained."""
        given = {"learning_rate": 1e-3, "warmup_steps": 2, "save_interval": 2, "keep_last": 9} | arguments
        self.args = args = Training(data="", device="cpu", out_dir=out_dir, **given)
        self.fabric, dtype = start_fabric(args)
        self.run = run = Run(args, self.fabric, dtype, out_dir, RandomFeed(), RandomRows(), args.learning_rate)
        torch.manual_seed(args.seed)
        self.gpt = GPT(tiny_config(n_layer=1))
        self.model = self.fabric.setup_module(self.gpt)
        self.optimizer = self.fabric.setup_optimizers(build_optimizer(self.gpt, args, run.peak_rate))
        self.measure, self.after_step = measure, after_step
        self.saver = Saver(run, self.gpt, self.optimizer, self.save_model, {"pretrained": True})

    def save_model(self, directory: Path) -> None:
        save_checkpoint(self.gpt, self.gpt.config, directory)

    def train(self, stop_after: int | None = None) -> list[float]:
        """The losses of the steps that it made. stop_after: interrupted after that step."""
        run, model, args, losses = self.run, self.model, self.args, []
        progress = self.saver.resume()
        if not run.is_over(progress):
            rehearse(run, model, validate, self.save_model, lambda directory: load_model(directory))
        model.train()
        for step in steps(run, progress, lambda: progress.step == stop_after):
            started = time.perf_counter()
            rate = set_rate(run, self.optimizer, progress)
            batches, tokens = run.feed.batches(step), run.feed.trained_tokens(step)
            loss = sum(model(b.idx, targets=b.targets, documents=b.documents) for b in batches) / tokens
            self.fabric.backward(loss)
            norm = clip_gradients(self.gpt, args.grad_clip)
            require_finite(run, step, loss.item(), norm, batches)
            self.optimizer.step()
            self.after_step(step + 1, list(self.gpt.parameters()), self.optimizer)
            self.optimizer.zero_grad(set_to_none=True)
            progress.advance(run.feed.tokens(step), time.perf_counter() - started)
            val_loss = None
            if run.validates_after(progress.step):
                val_loss = self.measure(self.fabric, model, run.valid)
                progress.note_validation(val_loss)
            run.log.step(progress, loss.item(), rate, norm, val_loss)
            losses.append(loss.item())
            if run.saves_after(progress):
                self.saver.save_step(progress)
        self.saver.finish(progress)
        return losses


def pretrain(out_dir: Path, stop_after: int | None = None, **arguments) -> list[float]:
    return Pretraining(out_dir, **arguments).train(stop_after)


def stored(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.load().clone() for name, tensor in open_safetensors(path).items()}


def names(out_dir: Path) -> list[str]:
    """The steps and final/ of a run, and whatever was left behind."""
    return sorted(p.name for p in out_dir.iterdir() if p.is_dir() or p.name.endswith(".tmp"))


def test_a_model_is_trained_from_random_weights_and_goes_on(tmp_path, capsys):
    """Catches: a helper of the loop that needs a checkpoint, a tokenizer or examples; a resume that begins anew."""
    whole = pretrain(tmp_path / "whole", max_steps=7)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path / "parts", max_steps=7, stop_after=3)
    assert (tmp_path / "parts" / "step-000003").is_dir() and not (tmp_path / "parts" / "final").exists()
    assert pretrain(tmp_path / "parts", max_steps=7, resume="auto") == whole[3:]
    columns, expected = read_metrics(tmp_path / "parts"), read_metrics(tmp_path / "whole")
    assert columns["loss"] == expected["loss"] == whole and columns["val_loss"] == expected["val_loss"]
    idx = torch.arange(9)[None]
    models = [load_model(tmp_path / name / "final")(idx) for name in ("parts", "whole")]
    assert torch.equal(*models)
    with pytest.raises(ValueError, match="differs in its steps"):
        pretrain(tmp_path / "parts", max_steps=9, resume="auto")
    assert "step 7/7 100.0% | loss" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["distribution", "precision", "memory", "loop", "log", "resuming", "saving", "rehearsal"]
)
def test_the_loop_knows_nothing_of_texts(name):
    """Catches: an import by which pretraining would need instructions, prompts or a tokenizer."""
    tree = ast.parse((TRAINING / f"{name}.py").read_text())
    imported = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert not [m for m in imported if m.startswith("lit_swa.data") or "tokenizer" in m or "chat" in m]
    own = [m.rpartition(".")[2] for m in imported if m.startswith("lit_swa.training")]
    assert not {"feed", "finetuning"} & set(own)


# -------------------------------------------------------------------------------------------------- what a step leaves


def spoil_weight(parameters, optimizer):
    with torch.no_grad():
        parameters[-1].view(-1)[-1] = float("nan")


def spoil_moment(parameters, optimizer):
    optimizer.state[parameters[0]]["exp_avg_sq"].view(-1)[3] = float("inf")


@pytest.mark.parametrize("spoil", [spoil_weight, spoil_moment])
@pytest.mark.parametrize("at, kept", [(3, "step-000002"), (4, "step-000003")])
def test_a_step_that_spoils_the_weights_replaces_no_good_one(tmp_path, spoil, at, kept):
    """Catches: NaN that is saved as the last good step, older ones deleted for it, and final/ full of it."""

    def after_step(step, parameters, optimizer):
        if step == at:
            spoil(parameters, optimizer)

    how = {"max_steps": 4, "save_interval": 1, "keep_last": 1, "grad_clip": 0.0, "validation_fraction": 0.0}
    with pytest.raises(ValueError, match=f"no numbers after step {at}, and are not saved; .*{kept} is untouched"):
        pretrain(tmp_path / "run", after_step=after_step, **how)
    assert names(tmp_path / "run") == [kept]
    assert all(t.isfinite().all() for t in stored(tmp_path / "run" / kept / "state.safetensors").values())


def scripted(losses):
    """Validation losses as they are given."""
    left = iter(losses)
    return lambda fabric, model, valid: next(left)


def test_early_stop_keeps_the_weights_of_the_best_validation(tmp_path, capsys):
    """Catches: the last weights in final/, the best ones deleted by keep_last, a run that forgets them when it goes on,
    and one that trains on after its end."""
    how = {"max_steps": 9, "eval_interval": 1, "save_interval": 50, "keep_last": 1, "early_stop": 2}
    how |= {"lr_schedule": "constant"}
    losses = [5.0, 4.0, 4.5, 3.0, 3.5, 3.2, 1.0]
    whole = pretrain(tmp_path / "whole", measure=scripted(losses), **how)
    assert len(whole) == 6 and names(tmp_path / "whole") == ["final", "step-000004", "step-000006"]
    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path / "parts", stop_after=5, measure=scripted(losses), **how)
    assert pretrain(tmp_path / "parts", measure=scripted(losses[5:]), resume="auto", **how) == whole[5:]
    for name in ("whole", "parts"):
        best = stored(tmp_path / "whole" / "step-000004" / "lit_model.safetensors")
        final = stored(tmp_path / name / "final" / "lit_model.safetensors")
        assert all(torch.equal(best[key], final[key]) for key in best | final)
    assert json.loads((tmp_path / "parts" / "final" / "run.json").read_text())["weights_of_step"] == 4
    before = (tmp_path / "parts" / "final").stat()
    assert pretrain(tmp_path / "parts", measure=scripted([]), resume="auto", **how) == []
    assert "it ended after step 6: no step is made; a greater --early_stop goes on" in capsys.readouterr().err
    assert (tmp_path / "parts" / "final").stat().st_ino == before.st_ino
    assert len(pretrain(tmp_path / "parts", measure=scripted([2.0] * 3), resume="auto", **how | {"early_stop": 5})) == 3
    assert json.loads((tmp_path / "parts" / "final" / "run.json").read_text())["weights_of_step"] == 7


def test_a_finished_run_makes_no_step_unless_more_are_asked_for(tmp_path, capsys):
    """Catches: a second start that trains on, or writes final/ anew; one whose final/ is missing and stays so, or that
    leaves what a kill at the very end did not delete; more steps that do not go on where a constant rate ended."""
    how = {"resume": "auto", "lr_schedule": "constant"}
    whole = pretrain(tmp_path / "whole", max_steps=5, **how)
    first = pretrain(tmp_path / "run", max_steps=3, **how)
    rows = (tmp_path / "run" / "metrics.csv").read_text()
    shutil.rmtree(tmp_path / "run" / "final")
    assert pretrain(tmp_path / "run", max_steps=3, **how) == [] and is_complete_model(tmp_path / "run" / "final")
    assert "it ended after step 3: no step is made; more --max_steps or --epochs go on" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.csv").read_text() == rows
    shutil.copytree(tmp_path / "run" / "final", tmp_path / "run" / ".final.lit_swa.tmp")
    before = (tmp_path / "run" / "final").stat().st_ino
    assert "step-000002" in names(tmp_path / "run")
    assert pretrain(tmp_path / "run", max_steps=3, **how, keep_last=1) == []
    assert names(tmp_path / "run") == ["final", "step-000003"] and (tmp_path / "run" / "final").stat().st_ino == before
    assert first + pretrain(tmp_path / "run", max_steps=5, **how) == whole
    assert read_metrics(tmp_path / "run")["loss"] == whole


def test_a_run_that_ended_before_its_first_save_leaves_no_lines(tmp_path):
    """Catches: metrics of a run that nothing is left of, before those of the next."""
    pretrain(tmp_path / "run", max_steps=2)
    for name in names(tmp_path / "run"):
        shutil.rmtree(tmp_path / "run" / name)
    pretrain(tmp_path / "run", max_steps=2)
    assert read_metrics(tmp_path / "run")["step"] == [1, 2]


def test_two_runs_do_not_share_a_directory(tmp_path):
    """Catches: a run that is started twice, whose rows and steps mix, or whose steps the second one deletes; and a
    directory that stays locked when its run has ended."""
    pretraining = Pretraining(tmp_path, max_steps=1)
    pretraining.train()
    with open(tmp_path / LOCK_NAME, "a") as other:  # as another process sees it
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        del pretraining
        gc.collect()
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for resume in ("auto", "restart"):
            with pytest.raises(ValueError, match="Another run is at work in .*: wait for its end, or choose another"):
                pretrain(tmp_path, max_steps=1, resume=resume)
    assert pretrain(tmp_path, max_steps=1, resume="auto") == []


def test_a_best_step_that_was_not_kept_is_said(tmp_path, capsys):
    """Catches: --early_stop that comes to a run later and names a step that nobody has."""
    how = {"max_steps": 4, "eval_interval": 1, "save_interval": 1, "keep_last": 1, "lr_schedule": "constant"}
    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path / "run", stop_after=2, measure=scripted([1.0, 2.0]), **how)
    pretrain(tmp_path / "run", measure=scripted([4.0, 3.0]), resume="auto", early_stop=3, **how)
    assert "looked for anew: step 1, which has it, was not kept" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "final" / "run.json").read_text())["weights_of_step"] == 4


def test_losses_of_other_data_are_not_compared(tmp_path, capsys, monkeypatch):
    """Catches: --early_stop that takes a loss on other validation data for the best."""
    how = {"eval_interval": 1, "save_interval": 1, "lr_schedule": "constant", "early_stop": 3}
    pretrain(tmp_path / "run", measure=scripted([1.0]), max_steps=1, **how)
    monkeypatch.setattr(RandomRows, "identity", "other")
    pretrain(tmp_path / "run", measure=scripted([9.0, 8.0, 8.5]), max_steps=4, resume="auto", **how)
    assert "looked for anew: what is validated on is not what it was" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "final" / "run.json").read_text())["weights_of_step"] == 3


def is_complete_model(directory: Path) -> bool:
    load_model(directory)
    return True


@pytest.mark.parametrize("exchanges", [True, False])
def test_what_is_deleted_is_renamed_first(tmp_path, monkeypatch, exchanges):
    """Catches: a kill that leaves a step or final/ half-deleted under its name, or no final/ at all."""
    out_dir, seen = tmp_path / "run", []
    delete = shutil.rmtree

    def watched(path, *args, **kwargs):
        final = [d for d in (out_dir / "final", out_dir / ".final.old.lit_swa.tmp") if d.exists()]
        whole = [d.name for d in (*saved_steps(out_dir), *final) if is_complete_model(d)]
        seen.append((Path(path).name, whole))
        delete(path, *args, **kwargs)

    how = {"save_interval": 1, "keep_last": 1, "lr_schedule": "constant"}
    pretrain(out_dir, max_steps=2, **how)
    half = out_dir / "step-000001"
    half.mkdir()
    (half / "lit_model.safetensors").write_bytes(b"what a kill left of a step")
    (out_dir / "step-old").mkdir()  # the user's
    if not exchanges:
        monkeypatch.setattr(files, "exchange_names", lambda a, b: False)
    monkeypatch.setattr(files.shutil, "rmtree", watched)
    pretrain(out_dir, max_steps=4, resume="auto", **how)
    assert names(out_dir) == ["final", "step-000004", "step-old"]
    assert all(name.startswith(".") for name, _ in seen) and sum("step-00000" in name for name, _ in seen) >= 3
    assert all(any("final" in name for name in whole) for _, whole in seen)


def test_two_directories_exchange_their_names(tmp_path, monkeypatch):
    """Catches: a moment without the old or the new directory where the system could do it in one step."""
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    monkeypatch.setattr(Path, "rename", None)
    if not files.exchange_names(tmp_path / "new", tmp_path / "old"):
        pytest.skip("this system cannot")
    replace_directory(tmp_path / "old", tmp_path / "new")  # back again
    assert (tmp_path / "new" / "file").read_text() == "new" and not (tmp_path / "old").exists()


def test_a_disk_that_fills_leaves_the_last_good_step(tmp_path, monkeypatch):
    """Catches: an old step deleted before the new one is whole, a part of a step under its final name, an error that
    does not say where."""
    from lit_swa.training import saving

    write = saving.write_safetensors

    def fill_disk_at(n: int):
        calls = []

        def full_disk(path, tensors):
            calls.append(path)
            if len(calls) == n:
                path.write_bytes(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")
            write(path, tensors)

        return full_disk

    arguments = {"max_steps": 6, "save_interval": 1}
    whole = pretrain(tmp_path / "whole", keep_last=1, **arguments)
    for keep, fails_at in ((1, 1), (1, 2), (2, 3), (3, 3), (4, 6), (5, 4)):
        out_dir, how = tmp_path / f"keep-{keep}-fails-{fails_at}", arguments | {"keep_last": keep}
        with monkeypatch.context() as patch:
            patch.setattr(saving, "write_safetensors", fill_disk_at(fails_at))
            with pytest.raises(OSError, match=f"No space left on device for {out_dir}.*free some space.*--resume"):
                pretrain(out_dir, **how)
        left = [f"step-{n:06d}" for n in range(max(1, fails_at - keep), fails_at)]
        assert sorted(p.name for p in out_dir.glob("step-*")) == left
        for name in left:
            load_model(out_dir / name)
        assert whole[fails_at - 1 :] == pretrain(out_dir, resume="auto", **how)
        assert read_metrics(out_dir)["loss"] == whole and not list(out_dir.glob(".*tmp"))
        assert sorted(p.name for p in out_dir.glob("step-*")) == [f"step-{n:06d}" for n in range(7 - keep, 7)]


def test_the_error_of_a_full_disk_says_where(tmp_path):
    """Catches: "[Errno 27] File too large" alone. The system makes the error: no file may grow beyond 8 kB."""
    path, limits = tmp_path / "metrics.csv", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_text(",".join(METRICS) + "\n" + "0,1,1,1,1,1,\n" * 610)
    before = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), limits[1]))
    try:
        for write in (lambda: write_text(path, "x" * 9000), lambda: log_of(tmp_path).write(1, loss=2.0)):
            with pytest.raises(OSError, match=f"File too large for {path}: .*{tmp_path} has .* left: free some space"):
                write()
        with pytest.raises(OSError, match="it takes 9.0 MB and"), atomic_file(path, n_bytes=9_000_000) as stream:
            stream.write(bytes(9000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def log_of(out_dir: Path) -> Log:
    return Log(out_dir, Training(data=""), 9, active=True)


def test_metrics_are_cut_back_in_one_step(tmp_path, monkeypatch):
    """Catches: a kill or a full disk that loses the lines of the steps before; half a line that is read as a step."""
    path, header = tmp_path / "metrics.csv", ",".join(METRICS)
    lines = [f"{step},{step}.5,0.1,1.0,{step * 9},0.25,," for step in range(13)]
    older = [line[: line.rfind(",")] for line in (header, *lines)]  # written before there was the last column
    path.write_text("\r\n".join(older) + "\r\n1")  # a full disk left half of step 13, or 1
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            log_of(tmp_path).rewind(4)
    assert read_metrics(tmp_path)["step"] == list(range(13))
    log_of(tmp_path).rewind(4)
    assert path.read_text() == "\n".join([header, *lines[:5]]) + "\n" and len(list(tmp_path.iterdir())) == 1
    path.write_text(header[:9])  # killed while the file was begun
    log_of(tmp_path).rewind(4)
    assert path.read_text() == header + "\n"


# -------------------------------------------------------------------------------------------------------- a log unread


@pytest.mark.parametrize("gone", ["reader", "disk"])
def test_a_log_that_nobody_reads_ends_no_work(tmp_path, monkeypatch, gone):
    """Catches: a run that dies, or ends with another exit code, since its log's pipe or disk is gone."""
    if gone == "disk" and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w") if gone == "reader" else open("/dev/full", "w")
    with monkeypatch.context() as patch:
        with pytest.raises(OSError):
            print("a line", file=stream, flush=True)
        patch.setattr(sys, "stderr", Unbreakable(stream))
        assert len(pretrain(tmp_path / "run", max_steps=3)) == 3
        sys.stderr.flush()  # as Python does at its end
    assert names(tmp_path / "run") == ["final", "step-000002", "step-000003"]
    assert read_metrics(tmp_path / "run")["step"] == [1, 2, 3]


@pytest.mark.parametrize("ignored", [True, False])
def test_a_terminal_that_is_closed_ends_after_the_step_at_hand(ignored):
    """Catches: a step cut by the second hangup that follows the first; nohup that is overruled."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with interruptible() as interrupted:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGHUP)
            assert interrupted() is not ignored
            os.kill(os.getpid(), signal.SIGTERM)
            assert interrupted()
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "nll, text",
    [(1.5, "4.48"), (13.8, "984609.11"), (14, "1.2e+06"), (700.0, "1.0e+304"), (800.0, "inf"), (float("nan"), "nan")],
)
def test_a_perplexity_fits_a_line(nll, text):
    """Catches: 305 digits, an overflow, a bound that is shown as a value."""
    assert format_perplexity(nll) == text and format_number(-1e30, 4) == "-1.0e+30" and format_number(2, 3) == "2.000"


@pytest.mark.parametrize("wanted, steps, got", [(None, 1, 1), (None, 12, 2), (None, 900, 20), (50, 60, 50), (50, 9, 1)])
def test_the_full_rate_is_reached(wanted, steps, got):
    """Catches: a warmup that is longer than the run, and one that was asked for and is cut without need."""
    assert warmup_steps(steps, Training(data="", warmup_steps=wanted)) == got


# ------------------------------------------------------------------------------------------------------- mutated files


VALUES = [None, True, -1, 3, 10**30, -2.5, 1e308, "", "x" * 10**5, [], [1], {}, {"a": 1}]


def json_places(content, path=()):
    """The path of every value in it."""
    yield path
    for key, value in content.items() if isinstance(content, dict) else ():
        yield from json_places(value, (*path, key))


def mutated_records(record: dict) -> list[str]:
    """run.json with each of its values taken away, and replaced by a value of each kind."""
    made = []
    for path in json_places({key: record[key] for key in ("identity", "progress", "versions")}):
        for value in (..., *VALUES) if path else ():
            content = copy.deepcopy(record)
            parent = content
            for key in path[:-1]:
                parent = parent[key]
            if value is ...:
                del parent[path[-1]]
            else:
                parent[path[-1]] = value
            made.append(json.dumps(content))
    return made + ["[" * 10**5, '{"identity": ' + "[" * 900 + "]" * 900 + "}"]


def mutated_bytes(content: bytes, n: int) -> list[bytes]:
    """It with some bytes changed, most of them near its beginning, or cut."""
    rng, made = np.random.default_rng(7), []
    for i in range(n):
        changed = bytearray(content[: int(rng.integers(len(content)))] if i % 5 == 0 else content) or bytearray(1)
        for at in rng.integers(0, min(len(changed), 4000), 1 + i % 4):
            changed[at] = (0, 10, 13, 34, 44, 255, int(rng.integers(256)))[i % 7]
        made.append(bytes(changed))
    return made


def test_damaged_files_of_a_run_end_in_a_sentence(tmp_path):
    """Catches: KeyError, TypeError, UnicodeDecodeError and RecursionError from run.json, state.safetensors and
    metrics.csv, a message as long as a file, and moments that are lost in silence."""
    out_dir, step = tmp_path / "run", tmp_path / "run" / "step-000002"
    pretrain(out_dir, max_steps=2)
    pretraining = Pretraining(out_dir, max_steps=2, resume="auto")
    ends = {"resumed": 0, "refused": 0}
    for path, mutate in (
        (step / "run.json", lambda data: [text.encode() for text in mutated_records(json.loads(data))]),
        (step / "state.safetensors", lambda data: [data[:0], *mutated_bytes(data, 100)]),
        (out_dir / "metrics.csv", lambda data: mutated_bytes(data, 100)),
    ):
        good = path.read_bytes()
        for data in mutate(good):
            path.write_bytes(data)
            for read in (pretraining.saver.resume, lambda: read_metrics(out_dir)):
                try:
                    read()
                    ends["resumed"] += 1
                except ValueError as error:
                    ends["refused"] += 1
                    assert len(str(error)) < 600 + len(str(tmp_path)) and "\n" not in str(error)
        path.write_bytes(good)
    assert ends["refused"] > 300 and ends["resumed"] > 200
    tensors = open_safetensors(step / "state.safetensors")
    lost = next(name for name in tensors if name.startswith("exp_avg_sq."))
    copied = {name: files.as_lazy(tensor.load().clone()) for name, tensor in tensors.items() if name != lost}
    files.write_safetensors(step / "state.safetensors", copied)
    with pytest.raises(ValueError, match=f"{step} is damaged: state.safetensors has no proper '{lost}'"):
        pretraining.saver.resume()
