"""A pipeline step: check rows from any miner against the qrels, and stop before training on bad ones.

python examples/audit_pipeline.py quickstart.yaml mined.jsonl

Exits with code 1 if more negatives are wrong than allowed, and with negpipe's exit code if it cannot tell; the findings
are printed as JSON lines for the log.
`negpipe audit --file mined.jsonl CONFIG --fail-on positive,duplicate=0.01` does the same from a shell.
"""

from __future__ import annotations

import argparse
import json
import sys

import negpipe
from negpipe.errors import NegpipeError

ALLOWED = {  # allowed share of the items that each check examines
    "positive_id": 0.0,
    "positive_text": 0.0,
    "positive_normalized": 0.0,
    "shared_anchor": 0.0,
    "repeated_negative": 0.01,
    "near_duplicate": 0.01,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config or a run directory, whose qrels the rows are compared with")
    parser.add_argument("rows", help="Parquet, JSONL, JSON, CSV or TSV, or a folder")
    options = parser.parse_args()

    try:
        run = negpipe.Run(options.config)
        run.mine(only="ingest")  # only the qrels are needed: no model runs
        findings = run.audit(options.rows).findings
    except NegpipeError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    bad = False
    for finding in findings:
        allowed = ALLOWED.get(finding.check)
        if allowed is None or not finding.of:
            continue
        failed = finding.share > allowed
        bad |= failed
        print(json.dumps({"check": finding.check, "count": finding.count, "share": finding.share, "failed": failed}))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
