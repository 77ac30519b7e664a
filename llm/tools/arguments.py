"""What may be said about a conversion, here and on the launcher's command line. Free of torch."""

from __future__ import annotations

import argparse

FORMATS = ("dcp", "torch", "hf", "peft")
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # torch's names, safetensors' names


def arguments_of_import(parser: argparse.ArgumentParser) -> None:
    """How to read what comes in."""
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint's step (default: what SOURCE says)")
    parser.add_argument(
        "--map",
        choices=("auto", "llama", "none"),
        default="auto",
        help="auto: give the names of our model to a Llama of torchtitan or Hugging Face; llama: refuse anything else",
    )
    parser.add_argument("--heads", type=int, metavar="H", help="query heads (default: what the run's config.yaml says)")
    parser.add_argument(
        "--skip-unreadable", action="store_true", help="leave out values that cannot be read without running code"
    )


def arguments_of_export(parser: argparse.ArgumentParser) -> None:
    """What goes out, and how."""
    parser.add_argument(
        "--format",
        choices=FORMATS,
        required=True,
        help="dcp: for torch.distributed.checkpoint; torch: one file; hf: the weights, for transformers, with "
        "adapters merged; peft: adapters alone",
    )
    parser.add_argument(
        "--only", action="append", metavar="PREFIX", help="tensors whose names begin so (dcp, torch); may be repeated"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="type of the weights (hf, peft; default: as saved)")
