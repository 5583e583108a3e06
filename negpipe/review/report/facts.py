"""Facts for the section "What ran": each stage's counts, time, throughput and memory, encoder and index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from negpipe.config.schema import Config
from negpipe.engine.manifest import Manifest
from negpipe.stages.defects import from_cache

_UNITS = {"ingest": "documents", "encode": "texts", "index": "documents", "search": "anchors", "triplets": "rows"}


@dataclass(frozen=True)
class StageFacts:
    """Facts of one stage.

    Attributes:
        count: number of `unit` in the current output.
        bytes: total size of its files.
        seconds: how long the run that completed it took, as in its log; None if not recorded.
        seconds_of_parts: total time of its parts, over all workers and runs.
        rate: number of `unit` per second of these; None if too fast to tell.
        peak: bytes of the largest process; None if parts do not record it.
        finished: time in UTC.
    """

    name: str
    count: int
    unit: str
    parts: int
    bytes: int
    seconds: float | None
    seconds_of_parts: float
    rate: float | None
    peak: int | None
    finished: str


def stages(manifests: Mapping[str, Manifest]) -> list[StageFacts]:
    """Facts of all stages, in order."""
    return [_stage(name, manifest) for name, manifest in manifests.items()]


def _stage(name: str, manifest: Manifest) -> StageFacts:
    of_parts = [part.provenance for part in manifest.parts]
    seconds = sum(float(one.get("seconds", 0.0)) for one in of_parts)
    unit = _UNITS.get(name, "rows")
    count = int(manifest.stats.get(unit, manifest.stats.get("rows", 0)))
    return StageFacts(
        name=name,
        count=count,
        unit=unit,
        parts=len(manifest.parts),
        bytes=sum(file.bytes for part in manifest.parts for file in part.files),
        seconds=manifest.provenance.get("seconds"),
        seconds_of_parts=seconds,
        rate=count / seconds if seconds >= 0.1 else None,
        peak=max((int(one["peak_memory"]) for one in of_parts if "peak_memory" in one), default=None),
        finished=str(manifest.provenance.get("finished", "")).replace("T", " ").replace("+00:00", " UTC"),
    )


_PROMPTS = ("encoder.query_prompt", "encoder.passage_prompt", "encoder.routes")  # inputs that are not digests
_COMMIT = 40  # characters; hub models are identified by commit, others by a digest of their files


def encoder(config: Config, manifest: Manifest) -> dict[str, str]:
    """The origin of the vectors: model, revision, settings, libraries and device."""
    own = config.encoder
    facts: dict[str, str] = {"backend": own.backend}
    if own.model:
        facts["model"] = own.model
    facts |= {
        name.removeprefix("encoder.") + (" (commit)" if len(digest) == _COMMIT else " (digest)"): digest[:16]
        for name, digest in manifest.inputs.items()
        if name.startswith("encoder.") and name not in _PROMPTS
    }
    facts |= {name.removeprefix("encoder."): manifest.inputs[name] for name in _PROMPTS if name in manifest.inputs}
    shown = ["query_instruction", "passage_instruction"]
    if own.runs_here:
        shown += ["revision", "pooling", "query_max_length", "passage_max_length"]
    facts |= {name: str(getattr(own, name)) for name in shown if getattr(own, name) and own.model}
    facts["vectors"] = f"{manifest.stats['dimension']} numbers, {own.storage}"
    for side, cut in manifest.stats.get("cut", {}).items():
        facts[f"{side} cut"] = f"{cut['texts']:,} of {cut['of']:,}, {cut['lost']:.1%} of all tokens lost"
    if equal := manifest.stats.get("equal"):
        facts["documents with another's vector"] = f"{equal['documents']:,} of {equal['of']:,}"
    if sentence := from_cache(manifest.stats):
        facts["cache"] = sentence
    ran = manifest.parts[0].provenance if manifest.parts else {}
    ran = {**ran, **ran.get("libraries", {})}
    libraries = ("FlagEmbedding", "sentence-transformers", "transformers", "torch", "device", "device_kind", "server")
    return facts | {name.replace("_", " "): str(ran[name]) for name in libraries if name in ran}


def index(stats: Mapping[str, Any], triplets: Mapping[str, Any]) -> dict[str, str]:
    """Its kind and, if approximate, its recall, from the statistics of both stages."""
    facts = {"kind": str(stats.get("kind", ""))}
    if "recall" not in stats:
        return facts | {"recall": "1 (exact)"}
    facts["recall"] = f"{stats['recall']:.4f}{_interval(stats['recall_interval'])} over the stored depth"
    window: Mapping[str, Any] = triplets["recall_window"]
    within = f"{window['recall']:.4f}{_interval([window['low'], window['high']])}"
    return facts | {f"recall at ranks {window['first']} to {window['last'] - 1}": within}


def _interval(ends: list[float]) -> str:
    return f" ({ends[0]:.4f} to {ends[1]:.4f} with 95 % confidence)"
