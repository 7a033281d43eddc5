"""One job of one peer, in the peer's own environment; knows nothing of this project.

    PYTHON run.py PEER prepare|filter|ask INPUTS OUT N [URL]

``with_PEER.py`` beside this file has ``filter_images`` and ``ask``, and may have ``prepare`` (what
makes its own form of input) and ``start`` (what is up before the clock runs). Prints the seconds
that the job took.
"""

import importlib
import json
import sys
import time
from pathlib import Path


def main() -> None:
    """Run what the command line says."""
    peer, what, inputs, out, number, *url = sys.argv[1:]
    module = importlib.import_module(f"with_{peer}")
    if what == "prepare":
        if hasattr(module, "prepare"):
            module.prepare(Path(inputs))
        return
    if hasattr(module, "start"):
        module.start(int(number))
    began = time.perf_counter()
    if what == "filter":
        module.filter_images(Path(inputs), Path(out), int(number))
    else:
        module.ask(Path(inputs), Path(out), int(number), *url)
    print(json.dumps({"seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main()
