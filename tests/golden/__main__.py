"""`python -m tests.golden`: write golden.json from the code as it is."""

from __future__ import annotations

import json

import torch

from tests.golden.app import MODELS
from tests.golden.record import FILE, Record, complete, serving
from tests.golden.requests import all_requests


def main() -> None:
    torch.set_num_threads(1)
    asks = all_requests()
    found: dict[str, Record] = {}
    for model in MODELS:
        with serving(model) as client:
            found |= {name: complete(client, ask) for name, ask in asks.items() if ask.model == model}
    FILE.write_text(json.dumps(found, sort_keys=True, indent=1) + "\n")


if __name__ == "__main__":
    main()
