"""A loop with a live preview: what the model believes the image to be, step by step.

Prints a small picture in the terminal; an app would draw step.x0 in its own window. Press Ctrl-C
whenever you like: the Generator stays usable.
"""

import sys

import numpy as np

from ddpm_edge import Generator

SHADES = np.array(list(" .:-=+*#%@"))


def draw(x0: np.ndarray) -> str:
    """One float32 image (1, H, W) in [-1, 1] as text, every second line left out."""
    shade = np.clip((x0[0, ::2] + 1) / 2 * len(SHADES), 0, len(SHADES) - 1).astype(int)
    return "\n".join("".join(line) for line in SHADES[shade])


steps = int(sys.argv[1]) if len(sys.argv) > 1 else 50
with Generator.load() as generator:
    for step in generator.stream(1, label="ankle-boot", seed=4, steps=steps):
        if sys.stdout.isatty():
            print("\x1b[H\x1b[2J", end="")  # back to the top, clear
        if sys.stdout.isatty() or step.index == step.total - 1:
            print(f"step {step.index + 1} of {step.total}, t = {step.t}")
            print(draw(step.x0[0]))
