import time
from pathlib import Path
import click

@click.group()
def main(): ...

@main.command()
@click.option("--data", required=True)
@click.option("--preset", default="small")
@click.option("--minutes", type=float)
@click.option("--steps", type=int)
@click.option("--batch", type=int, default=128)
@click.option("--seed", type=int, default=0)
@click.option("--lr", type=float, default=1e-3)
@click.option("-o", "--output", required=True)
def train(data, preset, minutes, steps, batch, seed, lr, output):
    from ddpm_edge.schedule import Schedule
    from ddpm_edge.train.data import load
    from ddpm_edge.train.run import record
    from ddpm_edge.train.trainer import TrainOptions
    from ddpm_edge.train.unet import UNetConfig
    d = load(data)
    o = TrainOptions(steps=steps, minutes=minutes, batch=batch, seed=seed, learning_rate=lr)
    c = UNetConfig.preset(preset, d.sample_shape, len(d.class_names))
    for s in record(Path(output), d, c, Schedule.linear(), o, preset):
        if s.step % 50 == 0: print(s.step, float(s.loss), s.images / s.seconds, flush=True)

main()
