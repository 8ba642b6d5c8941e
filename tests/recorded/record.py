"""Writes the recordings beside it anew: python -m tests.recorded.record URL NARROW_URL A B FOLDER.

Both servers serve the dense model in folder A with --skip-tokenizer-init; B holds other weights of it. The second has
--incremental-streaming-output --api-key key --admin-api-key admin --max-running-requests 1 --max-queued-requests 2.
It runs every claim of tests/sglang_contract.py and keeps the answers; of long streams the first and the last events, of
validation errors the words before the place in the server's source. FOLDER is tests/recorded/sglang_ and the version.
Values are left as they came: only shapes are compared with them.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

from tests.sglang_contract import NARROW, ROOMY, Answer, Subject


def main(url: str, narrow_url: str, a: str, b: str, folder: str) -> None:
    config = json.loads((Path(a) / "config.json").read_text())
    same = dict(vocab_size=config["vocab_size"], context_length=config["max_position_embeddings"])
    roomy = Subject(url, a=Path(a), b=Path(b), **same)
    narrow = Subject(narrow_url, a=Path(a), b=Path(b), key="key", admin_key="admin", incremental=True, **same)
    written: set[str] = set()
    for subject, claims in ((roomy, ROOMY), (narrow, NARROW)):
        for claim in claims:
            start = time.monotonic()
            for name, answer in claim(subject).items():
                if name not in written:
                    text = json.dumps(_kept(answer)).replace(a, "/models/a").replace(b, "/models/b")
                    (Path(folder) / f"{name}.json").write_text(text + "\n")
                    written.add(name)
            print(f"{time.monotonic() - start:6.1f} s  {claim.__name__}", flush=True)


def _kept(answer: Answer) -> dict:
    body = answer.body
    if answer.type == "text/event-stream" and len(body) > 8:
        body = body[:2] + body[-2:]
    if isinstance(body, dict) and "  File " in str(body.get("message")):
        body["message"] = re.split(r"\n+  File ", body["message"])[0]
    return {"status": answer.status, "type": answer.type, "body": body}


if __name__ == "__main__":
    main(*sys.argv[1:])
