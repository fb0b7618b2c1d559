"""`python -m ddpm_edge`: the command line, also for `accelerate launch -m`."""

from ddpm_edge.cli import main

if __name__ == "__main__":
    main(prog_name="ddpm-edge")
