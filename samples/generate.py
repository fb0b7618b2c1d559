"""Images in ten lines: eight sneakers from the built-in model."""

import sys

from ddpm_edge import Generator, save_grid

output = sys.argv[1] if len(sys.argv) > 1 else "sneakers.png"
with Generator.load() as generator:
    images = generator.sample(8, label="sneaker", seed=0)  # uint8 (8, 28, 28, 1)
    save_grid(images, output)
print(f"{output}: {len(images)} images")
