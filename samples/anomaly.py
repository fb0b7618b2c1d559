"""Which images are foreign to a model: those that it finds less likely than almost all known ones.

    python samples/anomaly.py KNOWN NEW [BUNDLE]

KNOWN are images like those that the model was trained with, but none of them; NEW are judged. Both
are a folder of images, or an .npz or .npy file. At most one in twenty known images is flagged.
It needs ddpm-edge[evaluate]; docs/evaluate.md says what likelihood sees, and what it does not.
"""

import sys

import numpy as np

from ddpm_edge import Generator
from ddpm_edge.data import load

if len(sys.argv) not in (3, 4):
    sys.exit(__doc__)
known, new = (load(path) for path in sys.argv[1:3])

with Generator.load(sys.argv[3] if len(sys.argv) == 4 else None) as generator:
    limit, bits = None, []
    for data in (known, new):
        images = data.images.transpose(0, 2, 3, 1)
        bits = generator.bits_per_dim(images, timesteps=20, seed=0)
        limit = np.quantile(bits, 0.95) if limit is None else limit

for name, value in zip(new.names, bits, strict=True):
    print(f"{name}: {value:.3f} bits/dim{', foreign' if value > limit else ''}")
print(f"{np.count_nonzero(bits > limit)} of {len(bits)} above {limit:.3f} bits/dim")
