"""An image every few seconds until SIGTERM: what ddpm-edge.service and the Dockerfile run.

Written from NVIDIA's documentation; not run on a Jetson yet. On a CPU: --runtime onnxruntime
--variant fp32 --count 2. An error, such as EngineLostError, ends it with code 1: start it anew.
"""

import argparse
import os
import signal
import socket
import sys
import time
from pathlib import Path

from ddpm_edge import Generator, save_image


def notify(state: str) -> None:
    """Tell systemd, where it listens (sd_notify(3))."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.sendto(state.encode(), "\0" * (address[0] == "@") + address.removeprefix("@"))


parser = argparse.ArgumentParser()
parser.add_argument("bundle", nargs="?", help="its directory  [default: the built-in model]")
parser.add_argument("--runtime", default=os.environ.get("DDPM_EDGE_RUNTIME", "tensorrt"))
parser.add_argument("--variant", default=os.environ.get("DDPM_EDGE_VARIANT", "fp16"))
parser.add_argument("--output", type=Path, default=Path(), help="directory of 000.png to 999.png")
parser.add_argument("--every", type=float, default=5.0, help="seconds; less than WatchdogSec")
parser.add_argument("--count", type=int, default=sys.maxsize, help="images in all")
args = parser.parse_args()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # ends a step that is running, too
with Generator.load(args.bundle, runtime=args.runtime, variant=args.variant) as generator:
    generator.warmup()
    notify("READY=1")
    for i in range(args.count):
        result = generator.run(1, callback=lambda _: notify("WATCHDOG=1"))
        save_image(result.images[0], args.output / f"{i % 1000:03d}.png")  # whole, or not at all
        time.sleep(args.every)
