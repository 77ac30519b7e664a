"""The last step: the records of all units become the index, and what was needed on the way is removed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from llm.data.format import DataError, Index, TokenizerRecord, blocks_of, record, write_index
from llm.data.prepare.found import SAMPLES, Part, Report, add
from llm.data.prepare.plan import PARTS, made_from
from llm.data.prepare.unit import SPLITS, TRAINED, Job, part_path
from llm.data.tokenizer import tokenizer_file
from llm.utils.config import ConfigError
from llm.utils.local_storage import LocalStorage

THREADS = 16  # records read at a time


def merge(job: Job) -> Index:
    """Write the index. Raises ConfigError: too many bad lines, or nothing is left; DataError: a shard is missing."""
    parts = list(_parts(job))
    report = _report(job, parts)
    _check_found(job, parts, report)
    splits = {name: [shard for part in parts for shard in part.splits[name]] for name in SPLITS}
    sizes = job.storage.sizes("")
    block = record(job.dtype, job.loss).itemsize
    for part in parts:
        for shard in (each for name in SPLITS for each in part.splits[name]):
            if sizes.get(shard.name) != blocks_of(shard.tokens) * block:
                job.storage.remove(part_path("units", part.unit))
                raise DataError(f"{job.storage.url}/{shard.name} is missing or cut off: run this again, to redo it")
    index = Index(
        dtype=job.dtype,
        tokenizer=_tokenizer(job),
        row=job.row,
        loss=job.loss,
        splits={name: shards for name, shards in splits.items() if shards},
        made_from={},
        report=report.to_json(),
    )
    index = msgspec.structs.replace(index, made_from=made_from(job.plan, index.tokenizer))
    write_index(job.storage, index)
    return index


def tidy(job: Job) -> None:
    """Remove what was needed on the way; whoever is killed here leaves it to the next."""
    job.storage.remove_folder(PARTS)
    if isinstance(job.storage, LocalStorage):  # files of workers that were killed while they wrote
        for pattern in (".train-*", ".validation-*", ".tokenizer.*", ".index.json.*"):
            for path in Path(job.storage.url).glob(pattern):
                path.unlink(missing_ok=True)


def _parts(job: Job) -> Iterator[Part]:
    decoder = msgspec.json.Decoder(Part)

    def load(unit: int) -> Part:
        path = part_path("units", unit)
        try:
            part = decoder.decode(job.storage.read(path))
        except msgspec.DecodeError as error:
            raise DataError(f"{job.storage.url}/{path} is damaged: {error}; remove it and run this again") from error
        if part.plan != job.digest:
            raise ConfigError(
                f"{job.storage.url}/{path} is part of another preparation: set overwrite, or name another folder"
            )
        return part

    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(load, range(len(job.plan.units)))


def _report(job: Job, parts: list[Part]) -> Report:
    report = Report()
    before: dict[int, int] = {}  # lines of a file in the units so far
    rows: dict[str, int] = {}
    used: dict[str, int] = {}
    for part in parts:
        for counts, more in (
            (report.documents, part.documents), (report.tokens, part.tokens), (report.bytes, part.bytes),
            (report.filtered, part.filtered), (report.cut, part.cut), (rows, part.rows), (used, part.used),
        ):  # fmt: skip
            for name, count in more.items():
                add(counts, name, count)
        report.duplicates += part.duplicates
        report.records += sum(part.records)
        report.bad_lines += sum(part.bad)
        for index, piece in enumerate(job.plan.units[part.unit]):
            for sample in part.samples:
                if sample.piece == index and len(report.bad_samples) < SAMPLES:
                    line = before.get(piece.file, 0) + sample.line
                    report.bad_samples.append(f"{job.plan.files[piece.file].url}:{line}: {sample.cause}")
            before[piece.file] = before.get(piece.file, 0) + part.lines[index]
    for name, count in rows.items():
        if count and job.row is not None:
            report.packing_efficiency[name] = round(used[name] / (count * job.row), 6)
    return report


def _check_found(job: Job, parts: list[Part], report: Report) -> None:
    if report.bad_lines > job.config.max_bad_fraction * report.records:
        bad: dict[int, int] = {}
        for part in parts:
            for piece, count in zip(job.plan.units[part.unit], part.bad, strict=True):
                bad[piece.file] = bad.get(piece.file, 0) + count
        worst = max(bad, key=lambda file: (bad[file], -file))
        raise ConfigError(
            f"{report.bad_lines} of {report.records} lines are bad, more than prepare.max_bad_fraction="
            f"{job.config.max_bad_fraction:g}; most, {bad[worst]}, in {job.plan.files[worst].url}; "
            f"the first: {report.bad_samples[0]}; mend the input, or raise max_bad_fraction and run this again"
        )
    if not report.tokens.get("train"):
        reasons = [f"{count} {name}" for name, count in sorted(report.filtered.items())]
        reasons += [f"{report.duplicates} duplicates"] if report.duplicates else []
        reasons += [f"{report.tokens['validation']} tokens in validation"] if report.tokens.get("validation") else []
        raise ConfigError(
            f"nothing is left to train on of {report.records} documents ({', '.join(reasons) or 'there are none'}): "
            "change the filters or the input"
        )


def _tokenizer(job: Job) -> TokenizerRecord:
    tokenizer = job.tokenizer
    data = tokenizer_file(tokenizer)
    file = TRAINED if data is not None and data[:1] == b"{" else "tokenizer.tiktoken"
    if data is not None:
        job.storage.replace(file, data)
    return TokenizerRecord(
        name=_name(job),
        sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        end=tokenizer.end,
        file=file if data is not None else None,
    )


def _name(job: Job) -> str:
    """Without the place of the dataset: it says the same wherever it is made."""
    trained = job.config.train_tokenizer
    return f"bpe-{trained}" if trained is not None else job.tokenizer.name
