"""``llmops init``."""

from __future__ import annotations

import argparse
from pathlib import Path

EPILOG = """examples:
  llmops init
  llmops init --backend slurm --output conf/cluster/ours.yaml
  llmops init --backend k8s --image lab/train:1.0 --output conf/cluster/prod.yaml --force
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Which cluster, and where its configuration goes."""
    parser.description = (
        "Ask a cluster what it has, and write a commented configuration that `llmops submit` can use at once. "
        "Nothing on the cluster is changed."
    )
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--backend", metavar="B", help="slurm or k8s; default: the one that is here")
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="default: conf/cluster/NAME.yaml, by the cluster's own name"
    )
    parser.add_argument("--image", metavar="IMAGE", help="the container image of the pods, for --backend k8s")
    parser.add_argument("--force", action="store_true", help="replace the file when it is there")


def run(arguments: argparse.Namespace) -> int:
    """Write the file, and say how it is used."""
    from rich.console import Console

    from llmops.sites.init import init

    console = Console(stderr=True)
    with console.status("asking the cluster") as status:
        written = init(
            arguments.backend,
            arguments.output,
            arguments.force,
            arguments.image,
            tell=lambda what: status.update(f"asking {what}"),
        )
    print(f"wrote {written.path}")
    print(f"  look   {written.path.name} has what else there is, as comments")
    print(f"  use    {written.use}")
    return 0
