"""The command line as a module: `torchrun --nproc-per-node 2 -m st_wkl train …`."""

from st_wkl.cli import app

app()
