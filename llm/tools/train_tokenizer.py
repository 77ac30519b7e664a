"""Train a byte-level BPE on texts: ``python -m llm.tools.train_tokenizer --vocab-size 4096 --output FILE TEXT ...``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from llm.data.source import text_bytes
from llm.data.tokenizer_training import train_bpe
from llm.utils.config import ConfigError
from llm.utils.storage import open_storage

CHUNK = 1 << 16  # characters that the trainer gets at a time, and then up to the end of the line


def main(argv: list[str] | None = None) -> int:
    """Train and write; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m llm.tools.train_tokenizer", description="Train a byte-level BPE.")
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="a path, an fsspec URL, or embedded:shakespeare")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="tokens, special ones included")
    parser.add_argument("--output", required=True, metavar="FILE", help="a tokenizer.json: a path or an fsspec URL")
    options = parser.parse_args(argv)
    folder, _, name = options.output.rpartition("/")
    try:
        data = train_bpe((part for text in options.texts for part in parts(text)), options.vocab_size)
        open_storage(folder or ("/" if options.output.startswith("/") else ".")).create(name, data)
    except FileExistsError:
        print(f"error: {options.output} exists and is another tokenizer: choose another --output", file=sys.stderr)
        return 2
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.output}: {len(data)} bytes")
    return 0


def parts(source: str) -> Iterator[str]:
    """The text of ``source`` in pieces that end where a line does. Raises ConfigError."""
    try:
        text = bytes(text_bytes("TEXT", source)).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is no UTF-8: {error}") from error
    start = 0
    while start < len(text):
        end = text.find("\n", start + CHUNK) + 1 or len(text)
        yield text[start:end]
        start = end


if __name__ == "__main__":
    sys.exit(main())
