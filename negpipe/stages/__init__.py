"""The five stages, one per file, in execution order."""

from __future__ import annotations

from negpipe.engine.stage import Stage
from negpipe.stages import encode, index, ingest, search, triplets

STAGES: dict[str, Stage] = {
    stage.name: stage for stage in (ingest.STAGE, encode.STAGE, index.STAGE, search.STAGE, triplets.STAGE)
}
