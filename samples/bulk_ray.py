"""Many images by a Ray cluster, in shards of consecutive samples: those that one machine makes.

    python samples/bulk_ray.py 100000 images [BUNDLE]       # both where all workers find them

Files are named by bundle and first sample. What is done stays: run it again, or for more images.
"""

import os
import sys
from pathlib import Path

import numpy as np
import ray

from ddpm_edge import Bundle, Generator

SHARD = 480  # a multiple of the 16 that are evaluated at once: no batch differs from one machine's


@ray.remote(num_cpus=1, max_retries=10)  # for whoever is killed
def _make(path: Path, first: int, n: int, bundle: Path | None) -> None:
    with Generator.load(bundle, runtime="onnxruntime", device="cpu", threads=1) as generator:
        images = generator.sample(n, seed=0, first=first)
    with open(path.with_name(f".{path.name}.{os.getpid()}"), "wb") as file:
        np.save(file, images)
    os.replace(file.name, path)  # whole, or not there


total, folder, *rest = int(sys.argv[1]), *(Path(word).absolute() for word in sys.argv[2:])
bundle = rest[0] if rest else None
folder.mkdir(parents=True, exist_ok=True)
name = Bundle.open(bundle).digest[:8]
files = [(folder / f"{name}-{i:09d}.npy", i) for i in range(0, total, SHARD)]
shards = [(path, i, min(SHARD, total - i)) for path, i in files]
missing = [s for s in shards if not s[0].exists() or len(np.load(s[0], mmap_mode="r")) < s[2]]
running = [_make.remote(*shard, bundle) for shard in missing]
while running:
    ready, running = ray.wait(running)
    ray.get(ready)  # raises what went wrong
    print(f"{len(shards) - len(running)} of {len(shards)} shards", flush=True)
