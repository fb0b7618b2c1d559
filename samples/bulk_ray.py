"""Many images by a Ray cluster, in shards of consecutive samples: those that one machine makes.

    python samples/bulk_ray.py 100000 images [BUNDLE]     # images/000000000.npy, 000000480.npy, ...

Directory and bundle are where all workers find them. What is done stays: run it again, or for more.
"""

import os
import sys
from pathlib import Path

import numpy as np
import ray
from ray.util import ActorPool

from ddpm_edge import Generator

SHARD = 480  # a multiple of the 16 that are evaluated at once: no batch differs from one machine's


@ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)  # who dies starts anew
class _Worker:
    def __init__(self, bundle: str | None) -> None:
        self.generator = Generator.load(bundle, threads=1)

    def make(self, path: Path, first: int, n: int) -> None:
        with open(path.with_suffix(".tmp"), "wb") as file:
            np.save(file, self.generator.sample(n, seed=0, first=first))
        os.replace(file.name, path)  # whole, or not there


total, folder, bundle = int(sys.argv[1]), Path(sys.argv[2]).absolute(), (*sys.argv[3:], None)[0]
folder.mkdir(parents=True, exist_ok=True)
shards = [(folder / f"{i:09d}.npy", i, min(SHARD, total - i)) for i in range(0, total, SHARD)]
missing = [s for s in shards if not s[0].exists() or len(np.load(s[0], mmap_mode="r")) < s[2]]
ray.init()
pool = ActorPool([_Worker.remote(bundle) for _ in range(int(ray.cluster_resources()["CPU"]))])
for i, _ in enumerate(pool.map_unordered(lambda w, s: w.make.remote(*s), missing), 1):
    print(f"{len(shards) - len(missing) + i} of {len(shards)} shards", flush=True)
