"""One carrier in a process of its own, so that its memory is its own and its failure nobody else's.

`python -m transfuse.compare.worker` imports the heavy libraries once, then forks per carrier: it reads one JSON
request a line from standard input and writes one JSON message a line to standard output. It ends, and ends a
carrier at work, when its input closes, which is what happens when the parent dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

__all__ = ["main", "run_carrier"]


@contextlib.contextmanager
def _peak_memory() -> Iterator[dict[str, int]]:
    """Watch this process's resident bytes (on a GPU, the bytes allocated there as well) and keep the largest sum."""
    import psutil
    import torch

    process, found, done = psutil.Process(), {"bytes": 0}, threading.Event()
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    if cuda:
        torch.cuda.reset_peak_memory_stats()

    def watch() -> None:
        while not done.wait(0.01):
            found["bytes"] = max(found["bytes"], process.memory_info().rss)

    found["bytes"] = process.memory_info().rss
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found["bytes"] = max(found["bytes"], process.memory_info().rss)
        if cuda:
            found["bytes"] += torch.cuda.max_memory_allocated()


def _bytes_in(folder: Path) -> int:
    """Bytes of a carrier's stored parts; lineage and model card do not count."""
    skipped = {"transfuse.json", "README.md"}
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.name not in skipped)


def _usage(lines: str, recipe: Any) -> str:
    """Lines for the model card: the model as it was loaded here, then the carrier's own."""
    options = "".join(
        f", {name}={value!r}" for name, value, usual in
        (("dtype", recipe.dtype, "auto"), ("device", recipe.device, "cpu")) if value != usual
    )  # fmt: skip
    imports, _, rest = lines.partition("\n\n")
    loading = f"model, tokenizer = transfuse.load({recipe.model!r}{options})"
    return f"import transfuse\n{imports}\n\n{loading}\n{rest}" if lines else ""


def run_carrier(request: dict[str, Any], told: Callable[[str], None]) -> dict[str, Any]:
    """Load the model, install one carrier, measure it, and write its folder (with `record.json`) atomically.

    Args:
        request: `recipe` (fields), `base` (folder of relative files), `output`, `answers` (file of the untouched
            model's answers), `carrier` (uses, with, label), `key`, `model` (its fingerprint), `files`
            (hash of its tokenizer and other files), `settings` (the job's).
        told: Called with the name of each stage.

    Returns:
        The record.

    Raises:
        BadInput: the inputs are no longer those of the request; whatever the carrier raises.
    """
    import torch

    from ..core.errors import BadInput
    from ..core.fields import from_mapping
    from ..core.files import atomic_dir, atomic_write
    from ..core.generate import check_length
    from ..core.lineage import jsonable, write_lineage
    from ..core.models import load
    from ..core.training import seeded
    from .carriers import Bench, NoCarrier, find_carrier
    from .job import Recipe, read_job
    from .measure import baseline, length_of_answers, measure

    start = time.perf_counter()
    recipe = from_mapping(Recipe, request["recipe"])
    output, answers = Path(request["output"]), Path(request["answers"])
    job = read_job(recipe, Path(request["base"]), output)
    if job.settings != request["settings"]:
        raise BadInput(
            "knowledge", recipe.knowledge.facts or recipe.knowledge.questions,
            "or another input file changed while the comparison ran", "run it again",
        )  # fmt: skip
    spec = request["carrier"]
    carrier = find_carrier(spec["uses"])(**spec["with"])
    told("load")
    model, tokenizer = load(recipe.model, dtype=recipe.dtype, device=recipe.device)
    tokens = length_of_answers(job, tokenizer)
    for item in job.knowledge.items:
        check_length(model, len(tokenizer(item.prompt)["input_ids"]) + tokens, f"knowledge: {item.id}")
    bench = Bench(model, tokenizer, job, f"{request['model']} {request['files']}")
    target = output / "carriers" / spec["label"]
    with seeded(recipe.seed), atomic_dir(target) as folder:
        told("install")
        installing = time.perf_counter()
        with _peak_memory() as peak:
            answerer = carrier.install(bench)
        install_seconds, peak_bytes = bench.account(time.perf_counter() - installing, peak["bytes"])
        answerer.save(folder)
        stored = _bytes_in(folder)
        if isinstance(carrier, NoCarrier):
            told("base answers")
            base = baseline(job, answerer, tokens)
            atomic_write(answers, json.dumps(base))
        else:
            told("wait for the base's answers")
            while not answers.is_file():  # made beside this one; if that fails, all end
                time.sleep(0.05)
            base = json.loads(answers.read_text(encoding="utf-8"))
        measured = measure(job, answerer, base, tokens, told)
        record = {
            "carrier": spec["label"],
            "uses": spec["uses"],
            "title": spec.get("title") or carrier.title,
            "status": "done",
            "reason": None,
            "baseline": isinstance(carrier, NoCarrier),
            "uses_context": carrier.uses_context,
            "access": list(carrier.needs()),
            "reversible": carrier.reversible,
            "method": carrier.method,
            "arguments": vars(carrier),
            "dtype": str(model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            **measured,
            "install_seconds": install_seconds,
            "install_peak_bytes": peak_bytes,
            "stored_bytes": stored,
            "folder": f"carriers/{spec['label']}",
            "key": request["key"],
            "seconds": time.perf_counter() - start,
        }
        record = jsonable(record)  # what is not finite becomes null
        (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")
        write_lineage(
            folder,
            method=carrier.method or spec["uses"],
            arguments=vars(carrier),
            inputs={"recipe": asdict(recipe), "knowledge": job.knowledge.hash, "model": request["model"]},
            seed=recipe.seed,
            base_model=recipe.model,
            summary=f"{record['title']}: what `transfuse compare` stored of it.",
            usage=_usage(carrier.usage, recipe),
            measurements={
                k: record[k] for k in ("recall", "locality", "perplexity", "install_seconds", "stored_bytes")
            },
        )
    return record


def _child(line: bytes, out: IO[str]) -> int:
    """Run one request; every outcome is a message. Returns the exit code."""

    def say(**message: Any) -> None:
        out.write(json.dumps(message, default=str) + "\n")
        out.flush()

    from ..core.errors import NotApplicable, TransfuseError

    request = json.loads(line)
    try:
        record = run_carrier(request, lambda stage: say(stage=stage))
        say(record=record)
        return 0
    except NotApplicable as error:
        say(failed=str(error), status="not applicable")
    except (TransfuseError, MemoryError) as error:
        say(failed=str(error) or type(error).__name__, status="failed")
    except Exception as error:  # any other carrier's measurements must go on
        traceback.print_exc()
        say(failed=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", status="failed")
    return 1


def main() -> int:
    """Serve requests until standard input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to standard error, not between the messages
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers.generation.utils
    import transformers.trainer  # noqa: F401

    from . import carriers

    carriers.carriers()
    requests = os.fdopen(os.dup(0), "rb")
    for line in iter(requests.readline, b""):
        child = os.fork()
        if child == 0:
            code = _child(line, messages)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            if select.select([requests], [], [], 0.05)[0] and not requests.peek(1):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return 0
        messages.write(json.dumps({"exit": os.waitstatus_to_exitcode(status)}) + "\n")
        messages.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
